//! Determines the charge for a call: by the usage that the provider reports if it can be true, or else by the reply.
//!
//! Guarantees: whatever a provider reports, the charge is at least the minimum of the prompt and [`Reported::least_output`], and never more
//! than a record can hold. If the end of a call is unknown, the charge is no less than what is known about it.
//! Non-goals: proving what a provider reports. docs/model-budgets.md says by how much a provider that lies or breaks off can exceed a
//! limit.

use serde_json::Value;

use super::Bound;
use crate::canonical::LARGEST_WHOLE;

/// Maximum bytes per token in a text that models write.
const BYTES_PER_TOKEN: i64 = 16;

/// How much of a reply was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// The whole reply, as its length, its end or the last message of its protocol shows.
    Whole,
    /// The part of the reply before the provider failed: it closed the connection, or sent an error in place of the rest.
    Broken,
    /// The part of the reply before the caller stopped reading and Belay stopped too. The model may have done more until then.
    Unread,
}

/// The reservation for a call, and the minimum cost of its prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// The reservation.
    pub bound: Bound,
    /// The minimum of the prompt.
    pub least_prompt: i64,
}

/// Returns the charge for a call, or `None` if the reservation stays charged.
///
/// `taken` says whether the provider accepted the request, according to the status of the reply. Providers charge nothing for requests that
/// they reject or cannot begin to answer.
pub fn charge(reserved: Reserved, taken: bool, came: Came, said: &Reported) -> Option<Bound> {
    let Reserved { bound, least_prompt } = reserved;
    // A reply without generated output, such as an embedding, reports no output tokens.
    let said = &Reported { output: said.output.or((bound.output == 0).then_some(0)), ..*said };
    match came {
        _ if !taken => Some(Bound { prompt: 0, output: 0 }),
        // The usage of a broken reply could still have grown.
        Came::Whole if !said.failed => match said.both() {
            Some(both) => {
                Some(Bound { prompt: both.prompt.max(least_prompt), output: both.output.max(said.least_output()) })
            }
            None => beyond(bound, said),
        },
        Came::Whole | Came::Broken => Some(Bound {
            prompt: said.prompt.map_or(bound.prompt, |prompt| prompt.max(least_prompt)),
            output: said.output.unwrap_or_default().max(said.written.min(bound.output)).max(said.least_output()),
        }),
        Came::Unread => beyond(bound, said),
    }
}

/// Returns the charge if the received output exceeds the reservation.
fn beyond(bound: Bound, said: &Reported) -> Option<Bound> {
    let output = said.least_output();
    (output > bound.output).then_some(Bound { output, ..bound })
}

/// The usage that a reply, or one event of a streamed reply, reports. Counts only grow within a reply, so the largest value of each count
/// is the final one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reported {
    /// Prompt tokens, including cached tokens.
    pub prompt: Option<i64>,
    /// Completion tokens, including those of a hidden thought.
    pub output: Option<i64>,
    /// Bytes of the model's output in the events of a streamed reply, including the words around it. No token is shorter than a byte.
    pub written: i64,
    /// Bytes of the model's output, without anything else.
    pub shown: i64,
    /// Whether an event reports a failure of the provider.
    pub failed: bool,
    /// Whether an event was the last one of the protocol.
    pub ended: bool,
    /// Whether the usage covers more than the start of the reply.
    pub is_accounted: bool,
}

impl Reported {
    /// Reads what a JSON reply or event reports.
    pub fn see(&mut self, event: &Value) {
        let kind = event.get("type").and_then(Value::as_str);
        // In the Responses API, the members of the error are in the event itself.
        self.failed |= event.get("error").is_some_and(|error| !error.is_null())
            || matches!(kind, Some("error" | "response.failed"));
        self.ended |=
            matches!(kind, Some("message_stop" | "response.completed" | "response.incomplete" | "response.failed"));
        let choices = event.get("choices").and_then(Value::as_array).into_iter().flatten();
        let deltas = choices.filter_map(|choice| choice.get("delta")).chain(event.get("delta"));
        self.written = deltas.map(bytes_of).fold(self.written, i64::saturating_add);
        self.shown = self.shown.saturating_add(shown(event, kind));
        let places = [
            event.get("usage"),
            event.get("response").and_then(|response| response.get("usage")),
            event.get("message").and_then(|message| message.get("usage")),
        ];
        for usage in places.into_iter().flatten() {
            self.account(usage);
        }
        // A Messages stream starts with the usage of the prompt and of a token or two.
        self.is_accounted |= kind != Some("message_start")
            && self.output.is_some()
            && places.iter().any(|place| place.is_some_and(Value::is_object));
    }

    fn account(&mut self, usage: &Value) {
        let count = |of: &Value, name: &str| {
            of.get(name).and_then(Value::as_i64).filter(|count| (0..=LARGEST_WHOLE).contains(count))
        };
        let sum = |names: &[&str]| {
            names
                .iter()
                .filter_map(|name| count(usage, name))
                .fold(None, |sum: Option<i64>, count| Some(sum.unwrap_or(0).saturating_add(count)))
        };
        // OpenAI includes cached tokens in the prompt. Anthropic counts them separately.
        let prompt = count(usage, "prompt_tokens")
            .or_else(|| sum(&["input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"]));
        let output = count(usage, "completion_tokens").or_else(|| count(usage, "output_tokens"));
        // Some providers do not include the tokens of a thought in those of the reply, and report them only in the total or in the details.
        let thought = ["completion_tokens_details", "output_tokens_details"]
            .into_iter()
            .filter_map(|details| count(usage.get(details)?, "reasoning_tokens"))
            .max()
            .unwrap_or(0);
        let output = output.map(|output| if thought > output { output.saturating_add(thought) } else { output });
        let beside =
            count(usage, "total_tokens").zip(prompt).map(|(total, prompt)| total.saturating_sub(prompt).max(0));
        self.prompt = self.prompt.max(prompt);
        self.output = self.output.max(output).max(beside);
    }

    /// Records that a stream of chat completions has sent `[DONE]`.
    pub fn done(&mut self) {
        self.ended = true;
    }

    /// Returns the minimum tokens of the received output.
    pub fn least_output(&self) -> i64 {
        self.shown / BYTES_PER_TOKEN
    }

    /// Returns both counts if both are known. Counts above what a record can hold are not a usage that a provider could have meant, so
    /// there is no usage then, and the reservation stays spent.
    pub fn both(self) -> Option<Bound> {
        let both = Bound { prompt: self.prompt?, output: self.output? };
        both.prompt.checked_add(both.output).filter(|total| *total <= LARGEST_WHOLE).map(|_| both)
    }
}

/// The members that hold a model's output, in all three APIs.
const WRITTEN: [&str; 10] = [
    "content",
    "text",
    "arguments",
    "thinking",
    "reasoning_content",
    "reasoning",
    "refusal",
    "partial_json",
    "summary",
    "input",
];

/// Returns the bytes of the model's output in a whole reply or in one event. Events that repeat the output of other events do not count.
fn shown(event: &Value, kind: Option<&str>) -> i64 {
    let choices = event.get("choices").and_then(Value::as_array).into_iter().flatten();
    let of_choices = choices.flat_map(|choice| [choice.get("message"), choice.get("delta")]).flatten();
    let of_event = match kind {
        // A whole reply of the Messages API.
        Some("message") => event.get("content"),
        Some("content_block_delta") => event.get("delta"),
        Some(kind) if kind.starts_with("response.") && kind.ends_with(".delta") => {
            return event.get("delta").map_or(0, bytes_of);
        }
        // A whole reply of the Responses API.
        None if event.get("object").and_then(Value::as_str) == Some("response") => event.get("output"),
        _ => None,
    };
    of_choices.chain(of_event).map(written).fold(0, i64::saturating_add)
}

/// Returns the bytes of the texts in members with names in [`WRITTEN`], at any depth.
fn written(value: &Value) -> i64 {
    match value {
        Value::Array(items) => items.iter().map(written).fold(0, i64::saturating_add),
        Value::Object(members) => members
            .iter()
            .map(|(name, value)| match value {
                Value::String(_) if WRITTEN.contains(&name.as_str()) => bytes_of(value),
                Value::Array(_) | Value::Object(_) => written(value),
                _ => 0,
            })
            .fold(0, i64::saturating_add),
        _ => 0,
    }
}

/// Returns the bytes of all texts in a value.
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
            // Numbers that are not a usage.
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
    fn how_a_reply_begins_is_no_account_of_it() {
        for (event, is_accounted) in [
            (json!({"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 1}}}), false),
            (json!({"type": "message_delta", "usage": {"output_tokens": 90}}), true),
            (json!({"choices": [{"delta": {}}], "usage": null}), false),
            (json!({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}), true),
            (json!({"type": "response.created", "response": {"usage": null}}), false),
            (
                json!({"type": "response.completed", "response": {"usage": {"input_tokens": 7, "output_tokens": 5}}}),
                true,
            ),
        ] {
            let mut reported = Reported::default();
            reported.see(&event);
            assert_eq!(reported.is_accounted, is_accounted, "{event}");
        }
    }

    #[test]
    fn a_call_is_charged_by_what_came_of_it() {
        let reserved = Reserved { bound: Bound { prompt: 100, output: 1_000 }, least_prompt: 6 };
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
        let failed = json!({"type": "error", "code": "server_error", "message": "gone", "param": null});
        let start = json!({"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 1}}});
        for (taken, came, events, charged) in [
            (true, Came::Whole, vec![text.clone(), usage.clone()], bound(7, 5)),
            // Without a usage, the reservation stays charged, so the hard limit holds.
            (true, Came::Whole, vec![text.clone()], None),
            // The request was rejected, or its reply never began.
            (false, Came::Whole, vec![error.clone()], bound(0, 0)),
            (false, Came::Broken, vec![], bound(0, 0)),
            (false, Came::Unread, vec![], bound(0, 0)),
            // The reply breaks off: the prompt and the received output are charged.
            (true, Came::Broken, vec![], bound(100, 0)),
            (true, Came::Broken, vec![text.clone(), call], bound(100, 12)),
            (true, Came::Broken, vec![start, json!({"delta": {"type": "text_delta", "text": "hi"}})], bound(9, 12)),
            (true, Came::Whole, vec![text.clone(), error], bound(100, 5)),
            (true, Came::Whole, vec![text.clone(), failed], bound(100, 5)),
            (true, Came::Broken, vec![json!({"delta": "x".repeat(5_000)})], bound(100, 1_000)),
            (
                true,
                Came::Broken,
                vec![json!({"usage": {"prompt_tokens": 1_000_000, "completion_tokens": 2}})],
                bound(1_000_000, 2),
            ),
            // A client that stops reading does not pay less.
            (true, Came::Unread, vec![text], None),
            (true, Came::Unread, vec![usage], None),
        ] {
            assert_eq!(charge(reserved, taken, came, &said(&events)), charged, "{taken} {came:?} {events:?}");
        }
    }

    #[test]
    fn an_account_is_taken_where_it_can_be_true() {
        let reserved = Reserved { bound: Bound { prompt: 400, output: 1_000 }, least_prompt: 20 };
        let text = "x".repeat(3_200);
        let chat = |usage: Value| vec![json!({"choices": [{"message": {"content": text}}], "usage": usage})];
        let stream = |usage: Value| {
            let delta = json!({"choices": [{"delta": {"content": "x".repeat(1_600)}}]});
            vec![delta.clone(), delta, json!({"choices": [], "usage": usage})]
        };
        let messages = |usage: Value| {
            vec![
                json!({"type": "message_start", "message": {"usage": {"input_tokens": 0, "output_tokens": 0}}}),
                json!({"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}),
                json!({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}),
            ]
        };
        let responses = |usage: Value| {
            let output = json!([{"type": "message", "content": [{"type": "output_text", "text": text}]}]);
            vec![
                json!({"type": "response.output_text.delta", "delta": text}),
                // This event repeats the whole text.
                json!({"type": "response.output_text.done", "text": text}),
                json!({"type": "response.completed", "response": {"output": output, "usage": usage}}),
            ]
        };
        let bound = |prompt, output| Bound { prompt, output };
        for (events, charged) in [
            // A usage of zero, although output was received: a sixteenth of the output.
            (chat(json!({"prompt_tokens": 0, "completion_tokens": 0})), bound(20, 200)),
            (stream(json!({"prompt_tokens": 0, "completion_tokens": 0})), bound(20, 200)),
            (messages(json!({"output_tokens": 0})), bound(20, 200)),
            (responses(json!({"input_tokens": 0, "output_tokens": 0})), bound(20, 200)),
            (chat(json!({"prompt_tokens": 350, "completion_tokens": 800})), bound(350, 800)),
            // A thought that is not in the completion tokens: in the total, or in the details.
            (chat(json!({"prompt_tokens": 350, "completion_tokens": 800, "total_tokens": 4_150})), bound(350, 3_800)),
            (chat(json!({"prompt_tokens": 350, "total_tokens": 1_150})), bound(350, 800)),
            (
                chat(
                    json!({"prompt_tokens": 350, "completion_tokens": 800, "completion_tokens_details": {"reasoning_tokens": 3_000}}),
                ),
                bound(350, 3_800),
            ),
            // A thought that is in the completion tokens.
            (
                chat(
                    json!({"prompt_tokens": 350, "completion_tokens": 800, "completion_tokens_details": {"reasoning_tokens": 700}, "total_tokens": 1_150}),
                ),
                bound(350, 800),
            ),
            (
                responses(
                    json!({"input_tokens": 350, "output_tokens": 800, "output_tokens_details": {"reasoning_tokens": 700}}),
                ),
                bound(350, 800),
            ),
            // Cached tokens: separate from the prompt at Anthropic, included in it at OpenAI.
            (
                messages(
                    json!({"input_tokens": 5, "cache_creation_input_tokens": 100, "cache_read_input_tokens": 300, "output_tokens": 800}),
                ),
                bound(405, 800),
            ),
            (
                chat(
                    json!({"prompt_tokens": 350, "completion_tokens": 800, "prompt_tokens_details": {"cached_tokens": 300}}),
                ),
                bound(350, 800),
            ),
            // More than the reservation.
            (chat(json!({"prompt_tokens": 3_500, "completion_tokens": 8_000})), bound(3_500, 8_000)),
            // A total that is less than its parts.
            (chat(json!({"prompt_tokens": 350, "completion_tokens": 800, "total_tokens": 3})), bound(350, 800)),
        ] {
            let mut said = Reported::default();
            events.iter().for_each(|event| said.see(event));
            assert_eq!(charge(reserved, true, Came::Whole, &said), Some(charged), "{events:?}");
        }
    }

    /// More output was received than reserved, and no usage is reported.
    #[test]
    fn what_came_counts_beyond_what_was_set_aside() {
        let reserved = Reserved { bound: Bound { prompt: 100, output: 50 }, least_prompt: 6 };
        let mut said = Reported::default();
        said.see(&json!({"choices": [{"delta": {"content": "x".repeat(1_600)}}]}));
        for came in [Came::Whole, Came::Broken, Came::Unread] {
            assert_eq!(charge(reserved, true, came, &said), Some(Bound { prompt: 100, output: 100 }), "{came:?}");
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
