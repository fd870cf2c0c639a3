//! The bound of a request: its prompt, and the output limit that it names, or a modest one that is set for it.

use serde_json::{Map, Value};

use super::{Bound, api::Api, estimate, members};
use crate::policy::config::ModelPrice;

/// The output limit of a request that names none: what every model of the last years takes, and no call sets a task's whole budget aside.
const OUTPUT_UNNAMED: i64 = 4_096;

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

/// A request that may leave, as far as its own bytes tell.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounded {
    /// What it may cost.
    pub bound: Bound,
    /// The members that have to be set in it for the bound to hold, and nothing else changes.
    pub set: Vec<(&'static str, Value)>,
}

/// Bounds a request.
///
/// # Errors
/// If its cost or effect cannot be bounded; the message says which member and what to do.
pub fn bound(api: Api, body: &Map<String, Value>, left: Left<'_>) -> Result<Bounded, Unbounded> {
    members::review(api, body)?;
    let replies = replies(body)?;
    let mut set: Vec<_> = wish_for_usage(api, body).into_iter().collect();
    let prompt = estimate::prompt(body);
    let named = api.output_limits().iter().find_map(|field| body.get(*field).filter(|value| !value.is_null()));
    let each = match named {
        Some(value) => value
            .as_i64()
            .filter(|limit| *limit > 0)
            .ok_or_else(|| Unbounded(format!("the output limit must be a whole number above 0, found {value}")))?,
        None => {
            // With nothing left the sum is above what is left, and the reservation fails with its own message.
            let each = left.output(prompt).checked_div(replies).unwrap_or(0).clamp(1, OUTPUT_UNNAMED);
            set.extend(api.output_limits().first().map(|field| (*field, each.into())));
            each
        }
    };
    Ok(Bounded { bound: Bound { prompt, output: each.saturating_mul(replies) }, set })
}

/// How many replies it asks for.
fn replies(body: &Map<String, Value>) -> Result<i64, Unbounded> {
    let Some(n) = body.get("n").filter(|n| !n.is_null()) else { return Ok(1) };
    let wrong = || Unbounded(format!("`n` must be a whole number from 1 to 128, found {n}"));
    n.as_i64().filter(|n| (1..=128).contains(n)).ok_or_else(wrong)
}

/// The wish for an account in a streamed reply. Without it a stream of chat completions says nothing of its cost, and what is set aside would
/// have to stay spent.
fn wish_for_usage(api: Api, body: &Map<String, Value>) -> Option<(&'static str, Value)> {
    if api != Api::ChatCompletions || body.get("stream") != Some(&Value::Bool(true)) {
        return None;
    }
    let mut options = body.get("stream_options").and_then(Value::as_object).cloned().unwrap_or_default();
    options.insert("include_usage".to_owned(), Value::Bool(true));
    Some(("stream_options", Value::Object(options)))
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
        let body = object(json!({"model": "m", "messages": []}));
        let left = Left { tokens: 1_000_000, cost: Some((5_000, &price)) };
        let Bounded { bound, set } = bound(Api::Messages, &body, left).unwrap();
        assert!((400..500).contains(&bound.output), "{bound:?}");
        assert!(price.cost(bound.prompt, bound.output) <= 5_000);
        assert_eq!(set, [("max_tokens", json!(bound.output))]);
    }

    #[test]
    fn an_absent_output_limit_becomes_a_modest_one_or_what_is_left() {
        for (left, output) in [(1_000_000, OUTPUT_UNNAMED), (1_000, 876)] {
            let body = object(json!({"model": "m", "messages": [{"role": "user", "content": "hello"}]}));
            let Bounded { bound, set } = bound(Api::ChatCompletions, &body, tokens(left)).unwrap();
            assert_eq!(bound.output, output, "{bound:?}");
            assert_eq!(set, [("max_completion_tokens", json!(bound.output))]);
        }
    }

    #[test]
    fn a_named_output_limit_stays_and_counts_for_each_reply() {
        let body = object(json!({"model": "m", "messages": [], "max_tokens": 50, "n": 3}));
        let Bounded { bound, set } = bound(Api::ChatCompletions, &body, tokens(10_000)).unwrap();
        assert_eq!((bound.output, set), (150, vec![]));
    }

    #[test]
    fn a_stream_is_asked_for_its_usage() {
        for options in [json!(null), json!({}), json!({"include_usage": false})] {
            let body = object(
                json!({"model": "m", "messages": [], "max_tokens": 9, "stream": true, "stream_options": options}),
            );
            let set = bound(Api::ChatCompletions, &body, tokens(10_000)).unwrap().set;
            assert_eq!(set, [("stream_options", json!({"include_usage": true}))]);
        }
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
            let refused = bound(api, &object(body), tokens(1_000)).unwrap_err();
            assert!(refused.to_string().contains(word), "{refused}");
        }
    }

    proptest! {
        /// A body is never said to cost less than a token for each byte of the text in it.
        #[test]
        fn the_prompt_bound_covers_the_text(text in ".{0,200}", left in 0i64..100_000) {
            let body = object(json!({"messages": [{"role": "user", "content": text}]}));
            let bound = bound(Api::ChatCompletions, &body, tokens(left)).unwrap().bound;
            prop_assert!(bound.prompt >= i64::try_from(text.len()).unwrap());
            prop_assert!(bound.total() <= left || bound.prompt.saturating_add(1) >= left);
        }
    }
}
