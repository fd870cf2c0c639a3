//! What a call is charged: by the provider's own account, or by what came of the reply.

use serde_json::Value;

use super::Bound;
use crate::canonical::LARGEST_WHOLE;

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
    use serde_json::json;

    use super::*;

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
}
