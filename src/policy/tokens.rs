//! Prompt estimates and output limits of model requests.
//!
//! A request is bounded before it leaves: at most one token a byte of its body for the prompt (byte-level tokenizers
//! never make more), a flat sum for each image, and the output limit that the request names, or a modest one that is set for it.
//! A request whose cost or effect cannot be bounded from its own bytes is refused: state kept at the provider, tools that
//! run at the provider, files by reference.

use serde_json::{Map, Value};

use super::config::ModelPrice;
use crate::canonical::LARGEST_WHOLE;

/// The API that a request speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `/v1/chat/completions`.
    ChatCompletions,
    /// `/v1/responses`.
    Responses,
    /// `/v1/messages`.
    Messages,
}

/// The output limit of a request that names none: what every model of the last years takes, and no call sets a task's whole budget aside.
const OUTPUT_UNNAMED: i64 = 4_096;
/// Tokens that one image may cost: above what the large providers charge for their largest tiling.
const TOKENS_PER_IMAGE: i64 = 4_096;
/// Tokens that roles, separators and the reply's priming may add to a message beyond its bytes.
const TOKENS_PER_REQUEST: i64 = 64;

/// A request that cannot be bounded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unbounded(pub String);

/// What is left for a request.
#[derive(Clone, Copy, Debug)]
pub struct Left<'p> {
    /// Tokens.
    pub tokens: i64,
    /// Money in millionths, and the model's price; absent where money is not limited.
    pub cost: Option<(i64, &'p ModelPrice)>,
}

impl Left<'_> {
    /// The longest reply to a prompt that this pays for.
    fn output(&self, prompt: i64) -> i64 {
        let affordable = self.cost.map_or(i64::MAX, |(micros, price)| price.output_for(micros, prompt));
        self.tokens.saturating_sub(prompt).min(affordable)
    }
}

/// Tokens: what a request may cost at most, or what it did cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// Of the prompt.
    pub prompt: i64,
    /// Of all replies together.
    pub output: i64,
}

impl Bound {
    /// All of them.
    pub fn total(self) -> i64 {
        self.prompt.saturating_add(self.output)
    }
}

/// Bounds a request, and writes into it what makes the bound hold: the output limit where the agent gave none ([`OUTPUT_UNNAMED`], or what is
/// left after the prompt where that is less), and the wish for usage in a streamed reply.
///
/// # Errors
/// If the request's cost or effect cannot be bounded; the message says which field and what to do.
pub fn bound(api: Api, body: &mut Map<String, Value>, left: Left<'_>) -> Result<Bound, Unbounded> {
    refuse_unbounded(api, body)?;
    let replies = match body.get("n") {
        None | Some(Value::Null) => 1,
        Some(n) => n
            .as_i64()
            .filter(|n| (1..=128).contains(n))
            .ok_or_else(|| Unbounded(format!("`n` must be a whole number from 1 to 128, found {n}")))?,
    };
    if api == Api::ChatCompletions && body.get("stream") == Some(&Value::Bool(true)) {
        // Without it a streamed reply says nothing of its cost, and the whole reservation would have to stay spent.
        let options = body.entry("stream_options").or_insert_with(|| Value::Object(Map::new()));
        match options {
            Value::Object(options) => {
                options.insert("include_usage".into(), Value::Bool(true));
            }
            _ => *options = serde_json::json!({"include_usage": true}),
        }
    }
    let prompt = prompt_bound(body);
    let named = output_fields(api).iter().find_map(|field| body.get(*field).filter(|value| !value.is_null()));
    let output = match named {
        Some(value) => value
            .as_i64()
            .filter(|limit| *limit > 0)
            .ok_or_else(|| Unbounded(format!("the output limit must be a whole number above 0, found {value}")))?
            .saturating_mul(replies),
        None => {
            let each = left.output(prompt).checked_div(replies).unwrap_or(0).min(OUTPUT_UNNAMED);
            if each > 0 {
                let field = match api {
                    Api::ChatCompletions => "max_completion_tokens",
                    Api::Responses => "max_output_tokens",
                    Api::Messages => "max_tokens",
                };
                body.insert(field.into(), Value::from(each));
            }
            // With nothing left the sum is above what is left, and the reservation fails with its own message.
            each.max(1).saturating_mul(replies)
        }
    };
    Ok(Bound { prompt, output })
}

fn output_fields(api: Api) -> &'static [&'static str] {
    match api {
        Api::ChatCompletions => &["max_completion_tokens", "max_tokens"],
        Api::Responses => &["max_output_tokens"],
        Api::Messages => &["max_tokens"],
    }
}

fn prompt_bound(body: &Map<String, Value>) -> i64 {
    let bytes = serde_json::to_vec(body).map_or(i64::MAX, |bytes| i64::try_from(bytes.len()).unwrap_or(i64::MAX));
    let images = body.values().map(count_images).fold(0i64, i64::saturating_add);
    bytes.saturating_add(images.saturating_mul(TOKENS_PER_IMAGE)).saturating_add(TOKENS_PER_REQUEST)
}

fn count_images(value: &Value) -> i64 {
    match value {
        Value::Array(items) => items.iter().map(count_images).fold(0, i64::saturating_add),
        Value::Object(fields) => {
            let own = matches!(
                fields.get("type").and_then(Value::as_str),
                Some("image_url" | "input_image" | "image" | "input_audio" | "file" | "input_file" | "document")
            );
            fields.values().map(count_images).fold(i64::from(own), i64::saturating_add)
        }
        _ => 0,
    }
}

fn refuse_unbounded(api: Api, body: &Map<String, Value>) -> Result<(), Unbounded> {
    let set = |field: &str| body.get(field).is_some_and(|value| !value.is_null() && *value != Value::Bool(false));
    for (field, why) in [
        ("previous_response_id", "its prompt lies at the provider; send the whole conversation"),
        ("conversation", "its prompt lies at the provider; send the whole conversation"),
        ("prompt", "its prompt lies at the provider; send the whole conversation"),
        ("background", "its reply would not pass here; wait for it instead"),
        ("mcp_servers", "its tools would be called by the provider, past their contracts; use BELAY_MCP_URL"),
        ("container", "its code would run at the provider, outside the sandbox"),
        ("web_search_options", "the search would be made by the provider, past any contract"),
        ("prediction", "rejected predictions are charged beyond the output limit"),
    ] {
        if set(field) {
            return Err(Unbounded(format!("`{field}` is refused: {why}")));
        }
    }
    let Some(tools) = body.get("tools").and_then(Value::as_array) else { return Ok(()) };
    for tool in tools {
        let kind = tool.get("type").and_then(Value::as_str);
        let runs_here = match api {
            Api::ChatCompletions | Api::Responses => matches!(kind, Some("function" | "custom")),
            Api::Messages => matches!(kind, None | Some("custom")),
        };
        if !runs_here {
            return Err(Unbounded(format!(
                "`tools` has one of type {:?}, which the provider would run itself, past its contract; offer it as a function",
                kind.unwrap_or("(none)")
            )));
        }
    }
    Ok(())
}

/// How much of a reply came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// All of it, by its length, by its end, or by what its protocol ends with.
    Whole,
    /// What the provider was able to say before it failed: it hung up, or sent an error in place of the rest.
    Broken,
    /// Whoever asked stopped reading. What the model did until then may be more than what came.
    Unread,
}

/// What a call is charged; absent where what was set aside stays charged.
///
/// `taken`: whether the provider has taken the request, by the reply's status. Providers charge nothing for what they refuse, and nothing
/// for what they fail to begin with.
pub fn charge(reserved: Bound, taken: bool, came: Came, said: &Reported) -> Option<Bound> {
    match came {
        _ if !taken => Some(Bound { prompt: 0, output: 0 }),
        // An account of a reply that broke off may still have grown.
        Came::Whole if !said.failed => said.both(),
        Came::Whole | Came::Broken => Some(Bound {
            prompt: said.prompt.unwrap_or(reserved.prompt).min(reserved.prompt),
            output: said.output.unwrap_or_default().max(said.written).min(reserved.output),
        }),
        Came::Unread => None,
    }
}

/// The usage that a reply, or one event of a streamed reply, accounts for. Counts only grow within a reply, so the
/// largest seen of each is the final one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reported {
    /// Prompt tokens, cached ones included.
    pub prompt: Option<i64>,
    /// Completion tokens.
    pub output: Option<i64>,
    /// Bytes of what the model wrote, as the events of a streamed reply have it: no token is less than a byte.
    pub written: i64,
    /// Whether an event says that the provider has failed.
    pub failed: bool,
    /// Whether an event was the last that there is, by its protocol.
    pub ended: bool,
}

impl Reported {
    /// Takes in what a JSON reply or event says.
    pub fn see(&mut self, event: &Value) {
        let kind = event.get("type").and_then(Value::as_str);
        self.failed |= event.get("error").is_some_and(|error| !error.is_null()) || kind == Some("response.failed");
        self.ended |=
            matches!(kind, Some("message_stop" | "response.completed" | "response.incomplete" | "response.failed"));
        let choices = event.get("choices").and_then(Value::as_array).into_iter().flatten();
        let deltas = choices.filter_map(|choice| choice.get("delta")).chain(event.get("delta"));
        self.written = deltas.map(bytes_of).fold(self.written, i64::saturating_add);
        let places = [
            event.get("usage"),
            event.get("response").and_then(|response| response.get("usage")),
            event.get("message").and_then(|message| message.get("usage")),
        ];
        for usage in places.into_iter().flatten() {
            let count = |name: &str| {
                usage.get(name).and_then(Value::as_i64).filter(|count| (0..=LARGEST_WHOLE).contains(count))
            };
            let sum = |names: &[&str]| {
                names
                    .iter()
                    .filter_map(|name| count(name))
                    .fold(None, |sum: Option<i64>, count| Some(sum.unwrap_or(0).saturating_add(count)))
            };
            let prompt = count("prompt_tokens")
                .or_else(|| sum(&["input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"]));
            let output = count("completion_tokens").or_else(|| count("output_tokens"));
            self.prompt = self.prompt.max(prompt);
            self.output = self.output.max(output);
        }
    }

    /// Takes in that a stream of chat completions has said `[DONE]`.
    pub fn done(&mut self) {
        self.ended = true;
    }

    /// Both, once both are known. More than a record can have is no account that anybody could have meant: there is none then, and the
    /// reservation stays spent.
    pub fn both(self) -> Option<Bound> {
        let both = Bound { prompt: self.prompt?, output: self.output? };
        both.prompt.checked_add(both.output).filter(|total| *total <= LARGEST_WHOLE).map(|_| both)
    }
}

/// Bytes of the texts in it.
fn bytes_of(value: &Value) -> i64 {
    match value {
        Value::String(text) => i64::try_from(text.len()).unwrap_or(i64::MAX),
        Value::Array(items) => items.iter().map(bytes_of).fold(0, i64::saturating_add),
        Value::Object(fields) => fields.values().map(bytes_of).fold(0, i64::saturating_add),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    fn tokens(tokens: i64) -> Left<'static> {
        Left { tokens, cost: None }
    }

    #[test]
    fn an_absent_output_limit_is_what_money_is_left_for() {
        let price = ModelPrice { model: "m".into(), input_micros: 1_000_000, output_micros: 10_000_000 };
        let mut body = object(json!({"model": "m", "messages": []}));
        let left = Left { tokens: 1_000_000, cost: Some((5_000, &price)) };
        let bound = bound(Api::Messages, &mut body, left).unwrap();
        assert!((400..500).contains(&bound.output), "{bound:?}");
        assert!(price.cost(bound.prompt, bound.output) <= 5_000);
        assert_eq!(body["max_tokens"], json!(bound.output));
    }

    #[test]
    fn an_absent_output_limit_becomes_a_modest_one_or_what_is_left() {
        for (left, output) in [(1_000_000, OUTPUT_UNNAMED), (1_000, 876)] {
            let mut body = object(json!({"model": "m", "messages": [{"role": "user", "content": "hello"}]}));
            let bound = bound(Api::ChatCompletions, &mut body, tokens(left)).unwrap();
            assert_eq!(bound.output, output, "{bound:?}");
            assert_eq!(body["max_completion_tokens"], json!(bound.output));
        }
    }

    #[test]
    fn a_named_output_limit_stays_and_counts_for_each_reply() {
        let mut body = object(json!({"model": "m", "messages": [], "max_tokens": 50, "n": 3}));
        assert_eq!(bound(Api::ChatCompletions, &mut body, tokens(10_000)).unwrap().output, 150);
        assert_eq!(body["max_tokens"], json!(50));
    }

    #[test]
    fn a_stream_is_asked_for_its_usage() {
        let mut body = object(json!({"model": "m", "messages": [], "stream": true, "stream_options": null}));
        bound(Api::ChatCompletions, &mut body, tokens(10_000)).unwrap();
        assert_eq!(body["stream_options"], json!({"include_usage": true}));
    }

    #[test]
    fn what_cannot_be_bounded_is_refused_by_name() {
        for (api, body, word) in [
            (Api::Responses, json!({"previous_response_id": "r1"}), "previous_response_id"),
            (Api::Responses, json!({"background": true}), "background"),
            (Api::Responses, json!({"tools": [{"type": "web_search"}]}), "web_search"),
            (Api::Messages, json!({"mcp_servers": [{}]}), "mcp_servers"),
            (Api::Messages, json!({"tools": [{"type": "web_search_20250305"}]}), "web_search_20250305"),
            (Api::ChatCompletions, json!({"n": 0}), "`n`"),
            (Api::ChatCompletions, json!({"max_tokens": -1}), "output limit"),
        ] {
            let refused = bound(api, &mut object(body), tokens(1_000)).unwrap_err();
            assert!(refused.to_string().contains(word), "{refused}");
        }
    }

    #[test]
    fn usage_is_read_from_all_three_apis() {
        for (events, total) in [
            (vec![json!({"usage": {"prompt_tokens": 7, "completion_tokens": 5}})], Some(12)),
            (vec![json!({"response": {"usage": {"input_tokens": 7, "output_tokens": 5}}})], Some(12)),
            (
                vec![
                    json!({"message": {"usage": {"input_tokens": 7, "cache_read_input_tokens": 3, "output_tokens": 1}}}),
                    json!({"usage": {"output_tokens": 5}}),
                ],
                Some(15),
            ),
            (vec![json!({"choices": []})], None),
            // Numbers that are no account.
            (
                vec![json!({"usage": {"prompt_tokens": 9_007_199_254_740_990_i64, "completion_tokens": 1}})],
                Some(LARGEST_WHOLE),
            ),
            (vec![json!({"usage": {"prompt_tokens": LARGEST_WHOLE, "completion_tokens": LARGEST_WHOLE}})], None),
            (vec![json!({"usage": {"prompt_tokens": LARGEST_WHOLE, "completion_tokens": 1}})], None),
            (vec![json!({"usage": {"prompt_tokens": 9_007_199_254_740_992_i64, "completion_tokens": 1}})], None),
            (vec![json!({"usage": {"prompt_tokens": u64::MAX, "completion_tokens": 1}})], None),
            (vec![json!({"usage": {"prompt_tokens": i64::MAX, "completion_tokens": i64::MAX}})], None),
            (vec![json!({"usage": {"prompt_tokens": 1e300, "completion_tokens": 1}})], None),
            (vec![json!({"usage": {"prompt_tokens": -1, "completion_tokens": 1}})], None),
            (vec![json!({"usage": {"prompt_tokens": 1.5, "completion_tokens": 1}})], None),
        ] {
            let mut reported = Reported::default();
            events.iter().for_each(|event| reported.see(event));
            assert_eq!(reported.both().map(Bound::total), total);
        }
    }

    #[test]
    fn a_call_is_charged_by_what_came_of_it() {
        let reserved = Bound { prompt: 100, output: 1_000 };
        let bound = |prompt, output| Some(Bound { prompt, output });
        let said = |events: &[Value]| {
            let mut said = Reported::default();
            events.iter().for_each(|event| said.see(event));
            said
        };
        let usage = json!({"usage": {"prompt_tokens": 7, "completion_tokens": 5}});
        let text = json!({"choices": [{"delta": {"content": "hello"}}]});
        let call = json!({"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "{\"a\":1}"}}]}}]});
        let error = json!({"error": {"code": 502, "message": "gone"}});
        let start = json!({"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 1}}});
        for (taken, came, events, charged) in [
            (true, Came::Whole, vec![text.clone(), usage.clone()], bound(7, 5)),
            // It gives no account: the hard limit holds by what was set aside.
            (true, Came::Whole, vec![text.clone()], None),
            // Refused, or never begun with.
            (false, Came::Whole, vec![error.clone()], bound(0, 0)),
            (false, Came::Broken, vec![], bound(0, 0)),
            (false, Came::Unread, vec![], bound(0, 0)),
            // It breaks off: the prompt, and what came.
            (true, Came::Broken, vec![], bound(100, 0)),
            (true, Came::Broken, vec![text.clone(), call], bound(100, 12)),
            (true, Came::Broken, vec![start, json!({"delta": {"type": "text_delta", "text": "hi"}})], bound(9, 12)),
            (true, Came::Whole, vec![text.clone(), error], bound(100, 5)),
            (true, Came::Broken, vec![json!({"delta": "x".repeat(5_000)})], bound(100, 1_000)),
            (
                true,
                Came::Broken,
                vec![json!({"usage": {"prompt_tokens": 1_000_000, "completion_tokens": 2}})],
                bound(100, 2),
            ),
            // Whoever stops reading does not thereby pay less.
            (true, Came::Unread, vec![text], None),
            (true, Came::Unread, vec![usage], None),
        ] {
            assert_eq!(charge(reserved, taken, came, &said(&events)), charged, "{taken} {came:?} {events:?}");
        }
    }

    #[test]
    fn a_stream_ends_where_its_protocol_ends() {
        for (event, ended) in [
            (json!({"type": "message_stop"}), true),
            (json!({"type": "response.completed", "response": {}}), true),
            (json!({"type": "response.incomplete", "response": {}}), true),
            (json!({"type": "response.failed", "response": {}}), true),
            (json!({"type": "message_delta", "delta": {"stop_reason": "end_turn"}}), false),
            (json!({"choices": [{"delta": {}, "finish_reason": "stop"}]}), false),
        ] {
            let mut said = Reported::default();
            said.see(&event);
            assert_eq!(said.ended, ended, "{event}");
        }
    }

    proptest! {
        /// A body is never said to cost less than a token for each byte of the text in it.
        #[test]
        fn the_prompt_bound_covers_the_text(text in ".{0,200}", left in 0i64..100_000) {
            let mut body = object(json!({"messages": [{"role": "user", "content": text}]}));
            let bound = bound(Api::ChatCompletions, &mut body, tokens(left)).unwrap();
            prop_assert!(bound.prompt >= i64::try_from(text.len()).unwrap());
            prop_assert!(bound.total() <= left || bound.prompt.saturating_add(1) >= left);
        }
    }
}
