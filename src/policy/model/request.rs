//! Bounds a request: its prompt, and the output limit that it names, or a modest limit that Belay sets.

use serde_json::{Map, Value};

use super::{
    Bound,
    api::{Api, Chosen},
    catalogue::{Model, OUTPUT_UNKNOWN},
    estimate::Prompt,
    members::{self, Noted, Terms},
    settle::Reserved,
};
use crate::policy::config::{ModelPrice, OutputLimitField, PolicyConfig, StoreReplies, StreamUsage};

/// A request without a limit reserves one part in this many of the remaining budget for its reply, so a task can make several calls at once
/// and continue after each.
const SHARE: i64 = 4;
/// A reply may have one part in this many of the model's context beside any prompt, because the estimate of the prompt is rather too high.
const SHARE_OF_CONTEXT: i64 = 16;

/// An error of a request that cannot be bounded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unbounded(pub String);

/// The remaining budget for a request.
#[derive(Clone, Copy, Debug)]
pub struct Left<'p> {
    /// Tokens.
    pub tokens: i64,
    /// Money in millionths, and the price of the model. Absent if the cost has no limit.
    pub cost: Option<(i64, &'p ModelPrice)>,
}

impl Left<'_> {
    /// Returns the longest reply that the budget covers after a prompt.
    fn output(&self, prompt: i64) -> i64 {
        let affordable = self.cost.map_or(i64::MAX, |(micros, price)| price.output_for(micros, prompt));
        self.tokens.saturating_sub(prompt).min(affordable)
    }

    /// Returns the limit for each reply of a request that names none: the model's own limit, as far as it leaves budget for other calls and
    /// the model's context has room for it beside the prompt. The provider rejects a limit that is too high. A limit that is too low cuts
    /// off a reply, or a thought before it.
    fn unnamed(&self, model: &Model, prompt: i64, replies: i64) -> i64 {
        let there_is = self.output(prompt).checked_div(replies).unwrap_or(0);
        let share = (there_is / SHARE).max(OUTPUT_UNKNOWN);
        let beside = model.context.map_or(i64::MAX, |context| {
            context.saturating_sub(prompt).max(OUTPUT_UNKNOWN.min(context / SHARE_OF_CONTEXT))
        });
        // If nothing is left, the sum is above what is left, and the reservation fails with its own message.
        model.max_output.unwrap_or(OUTPUT_UNKNOWN).min(share).min(there_is).min(beside).max(1)
    }
}

/// The bound of a request that may be sent, as far as its own bytes determine that.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounded {
    /// The reservation for the request, and the minimum cost of its prompt.
    pub reserved: Reserved,
    /// The members that must be set in the request for the bound to hold. Nothing else changes.
    pub set: Vec<(&'static str, Value)>,
    /// What the record says about the request.
    pub noted: Noted,
}

/// The pack's policy for a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pack<'p> {
    /// The policy for its contents.
    pub terms: Terms<'p>,
    /// Whether the provider may store its reply.
    pub store: StoreReplies,
    /// Whether Belay asks for the usage of a stream.
    pub stream_usage: StreamUsage,
    /// The member that limits the reply of a chat completion at the endpoint, unless it is known for the model.
    pub limit_field: OutputLimitField,
}

impl<'p> Pack<'p> {
    /// Returns the rendered policy of a task for calls to one of its endpoints.
    pub fn of(policy: &'p PolicyConfig, endpoint: Chosen<'p>) -> Self {
        let models = &policy.models;
        let terms = Terms {
            allow: &models.allow,
            also: endpoint.allow,
            unknown: models.unknown_members,
            egress: &policy.egress,
        };
        Self {
            terms,
            store: models.store_replies,
            stream_usage: endpoint.stream_usage,
            limit_field: endpoint.limit_field(),
        }
    }
}

/// Bounds a request to this model, whose prompt has the given size.
///
/// # Errors
/// Returns an error if the cost or effect of the request cannot be bounded. The message says which member is the cause and what to do.
pub fn bound(
    api: Api,
    body: &Map<String, Value>,
    model: &Model,
    pack: Pack<'_>,
    prompt: Prompt,
    left: Left<'_>,
) -> Result<Bounded, Unbounded> {
    let noted = members::review(api, body, pack.terms)?;
    if !api.writes() {
        let least = if api.is_free() { 0 } else { prompt.least };
        let prompt = if api.is_free() { 0 } else { prompt.tokens.max(tokens_of_numbers(body)) };
        let reserved = Reserved { bound: Bound { prompt, output: 0 }, least_prompt: least };
        return Ok(Bounded { reserved, set: vec![], noted });
    }
    let replies = replies(body)?;
    let usage = wish_for_usage(api, body, pack.stream_usage);
    let mut set: Vec<_> = usage.into_iter().chain(no_store(api, body, pack.store)).collect();
    let each = match named_limit(api, body)? {
        // A model never exceeds its own limit. Whether it accepts a higher value is up to the provider.
        Some(limit) => limit.min(model.max_output.unwrap_or(i64::MAX)),
        None => {
            let each = left.unnamed(model, prompt.tokens, replies);
            set.extend(model.limit_member(api, pack.limit_field).map(|member| (member, each.into())));
            each
        }
    };
    let bound = Bound { prompt: prompt.tokens, output: each.saturating_mul(replies) };
    Ok(Bounded { reserved: Reserved { bound, least_prompt: prompt.least }, set, noted })
}

/// Returns the output limit that a request names. The largest of several limits counts, because servers differ in which members they know.
fn named_limit(api: Api, body: &Map<String, Value>) -> Result<Option<i64>, Unbounded> {
    let mut largest = None;
    for value in api.output_limits().iter().filter_map(|field| body.get(*field)).filter(|value| !value.is_null()) {
        let limit = value.as_i64().filter(|limit| *limit > 0);
        let wrong = || Unbounded(format!("the output limit must be a whole number above 0, found {value}"));
        largest = largest.max(Some(limit.ok_or_else(wrong)?));
    }
    Ok(largest)
}

/// Returns the number of tokens in an embedding's input that is already tokenized: it consists of numbers.
fn tokens_of_numbers(body: &Map<String, Value>) -> i64 {
    fn count(value: &Value) -> i64 {
        match value {
            Value::Number(_) => 1,
            Value::Array(items) => items.iter().map(count).fold(0, i64::saturating_add),
            _ => 0,
        }
    }
    body.get("input").map_or(0, count)
}

/// Returns the member that keeps a provider from storing the reply, if the pack forbids storing.
fn no_store(api: Api, body: &Map<String, Value>, store: StoreReplies) -> Option<(&'static str, Value)> {
    let keeps = match api {
        Api::Responses => body.get("store") != Some(&Value::Bool(false)),
        Api::ChatCompletions => body.get("store").is_some_and(|store| !store.is_null() && *store != Value::Bool(false)),
        _ => false,
    };
    (keeps && store == StoreReplies::Never).then_some(("store", Value::Bool(false)))
}

/// Returns how many replies a request asks for.
fn replies(body: &Map<String, Value>) -> Result<i64, Unbounded> {
    let Some(n) = body.get("n").filter(|n| !n.is_null()) else { return Ok(1) };
    let wrong = || Unbounded(format!("`n` must be a whole number from 1 to 128, found {n}"));
    n.as_i64().filter(|n| (1..=128).contains(n)).ok_or_else(wrong)
}

/// Returns whether a reply reports its usage: the request asks for it, or the API always reports it.
pub fn asks_for_usage(api: Api, body: &Map<String, Value>) -> bool {
    let asked = || body.get("stream_options")?.get("include_usage")?.as_bool();
    api != Api::ChatCompletions || asked().unwrap_or(false)
}

/// Returns the member that asks for the usage in a streamed reply. Without it, a stream of chat completions does not report its usage, so
/// the full reservation stays spent. A pack accepts that for a provider that rejects the member.
fn wish_for_usage(api: Api, body: &Map<String, Value>, usage: StreamUsage) -> Option<(&'static str, Value)> {
    if !usage.is_ask() || api != Api::ChatCompletions || body.get("stream") != Some(&Value::Bool(true)) {
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

    use super::{super::estimate, *};

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    fn model() -> Model {
        Model::named("our-own", None)
    }

    type Set = Vec<(&'static str, Value)>;

    /// Returns the bound of a request, and the members that are set in it.
    fn bounded(api: Api, body: &Map<String, Value>, model: &Model, left: Left<'_>) -> Result<(Bound, Set), Unbounded> {
        let prompt = estimate::prompt(api, body, model);
        let Bounded { reserved, set, .. } = bound(api, body, model, Pack::default(), prompt, left)?;
        Ok((reserved.bound, set))
    }

    fn tokens(tokens: i64) -> Left<'static> {
        Left { tokens, cost: None }
    }

    #[test]
    fn an_absent_output_limit_is_what_money_is_left_for() {
        let price = ModelPrice {
            model: "m".into(),
            input_micros: 1_000_000,
            output_micros: 10_000_000,
            ..ModelPrice::default()
        };
        let body = object(json!({"model": "m", "messages": []}));
        let left = Left { tokens: 1_000_000, cost: Some((5_000, &price)) };
        let (bound, set) = bounded(Api::Messages, &body, &model(), left).unwrap();
        assert!((400..500).contains(&bound.output), "{bound:?}");
        assert!(price.cost(bound.prompt, bound.output) <= 5_000);
        assert_eq!(set, [("max_tokens", json!(bound.output))]);
    }

    #[test]
    fn an_absent_output_limit_becomes_a_modest_one_or_what_is_left() {
        for (left, output) in [(1_000_000, Some(OUTPUT_UNKNOWN)), (1_000, None)] {
            let body = object(json!({"model": "m", "messages": [{"role": "user", "content": "hello"}]}));
            let (bound, set) = bounded(Api::ChatCompletions, &body, &model(), tokens(left)).unwrap();
            assert_eq!(bound.output, output.unwrap_or(left - bound.prompt), "{bound:?}");
            assert_eq!(set, [("max_tokens", json!(bound.output))]);
        }
    }

    /// The reply of a well-known model can be as long as the model's limit, but leaves budget for other calls and room for the prompt.
    #[test]
    fn an_absent_output_limit_is_the_models_own_as_far_as_there_is_room() {
        let long = "word ".repeat(1_000);
        for (name, left, content, outputs) in [
            ("gpt-4o", 10_000_000, "hi", 16_384..=16_384),
            ("gpt-4o", 200_000, "hi", 16_384..=16_384),
            ("gpt-4o", 40_000, "hi", 9_900..=10_000),
            ("gpt-4o", 10_000, "hi", 4_096..=4_096),
            ("gpt-4o", 2_000, "hi", 1_800..=1_999),
            ("gpt-5", 200_000, "hi", 49_900..=50_000),
            ("gpt-5", 10_000_000, "hi", 128_000..=128_000),
            ("gpt-4", 10_000_000, long.as_str(), 4_096..=4_096),
            ("claude-opus-4-1", 10_000_000, "hi", 32_000..=32_000),
            ("our-own", 10_000_000, "hi", OUTPUT_UNKNOWN..=OUTPUT_UNKNOWN),
            ("gpt-4o", 0, "hi", 1..=1),
        ] {
            let body = object(json!({"model": name, "messages": [{"role": "user", "content": content}]}));
            let (bound, _) = bounded(Api::ChatCompletions, &body, &Model::named(name, None), tokens(left)).unwrap();
            assert!(outputs.contains(&bound.output), "{name} of {left}: {bound:?}");
            let of_three = object(json!({"model": name, "messages": [], "n": 3}));
            let (three, _) = bounded(Api::ChatCompletions, &of_three, &Model::named(name, None), tokens(left)).unwrap();
            assert!(left < 2_000 || three.total() <= left, "{name} of {left}: {three:?}");
        }
    }

    /// A limit above the model's own is for the provider to reject. The reservation is only what the model can generate.
    #[test]
    fn a_named_limit_above_the_models_own_sets_the_models_own_aside() {
        for (name, limit, output) in [("gpt-4o", 500_000, 16_384), ("gpt-4o", 100, 100), ("our-own", 500_000, 500_000)]
        {
            let body = object(json!({"model": name, "messages": [], "max_tokens": limit}));
            let (bound, set) = bounded(Api::ChatCompletions, &body, &Model::named(name, None), tokens(1_000)).unwrap();
            assert_eq!((bound.output, set), (output, vec![]), "{name}");
        }
    }

    #[test]
    fn a_named_output_limit_stays_and_counts_for_each_reply() {
        let body = object(json!({"model": "m", "messages": [], "max_tokens": 50, "n": 3}));
        let (bound, set) = bounded(Api::ChatCompletions, &body, &model(), tokens(10_000)).unwrap();
        assert_eq!((bound.output, set), (150, vec![]));
    }

    #[test]
    fn what_writes_nothing_costs_its_prompt_or_nothing() {
        for (api, body, costs) in [
            (Api::Embeddings, json!({"model": "e", "input": ["hello", "world"]}), true),
            (Api::Embeddings, json!({"model": "e", "input": [[1, 2], [3]]}), true),
            (Api::Embeddings, json!({"model": "e", "input": [1, 2]}), true),
            (Api::Moderations, json!({"input": [{"type": "text", "text": "x"}]}), false),
            (Api::CountTokens, json!({"model": "m", "messages": []}), false),
            (Api::InputTokens, json!({"model": "m", "input": "x"}), false),
            (Api::Models, json!({}), false),
        ] {
            let (bound, set) = bounded(api, &object(body), &model(), tokens(0)).unwrap();
            assert_eq!((bound.output, set, bound.prompt > 0), (0, vec![], costs), "{api:?}");
        }
        // Tokenized input has as many tokens as numbers.
        let numbers = object(json!({"model": "e", "input": vec![vec![7; 500]; 3]}));
        let (bound, _) = bounded(Api::Embeddings, &numbers, &model(), tokens(0)).unwrap();
        assert!((1_500..2_000).contains(&bound.prompt), "{bound:?}");
        let file =
            object(json!({"messages": [{"role": "user", "content": [{"type": "container_upload", "file_id": "f"}]}]}));
        assert!(bounded(Api::CountTokens, &file, &model(), tokens(0)).is_err());
        let fetched = object(json!({"input": [{"image": "https://evil.test"}]}));
        assert!(bounded(Api::Embeddings, &fetched, &model(), tokens(9)).is_err());
    }

    #[test]
    fn the_largest_of_several_output_limits_counts() {
        for (one, other) in [(1, 50_000), (50_000, 1)] {
            let body = object(json!({"messages": [], "max_completion_tokens": one, "max_tokens": other}));
            let (bound, set) = bounded(Api::ChatCompletions, &body, &model(), tokens(100_000)).unwrap();
            assert_eq!((bound.output, set), (50_000, vec![]));
        }
    }

    #[test]
    fn replies_are_kept_unless_the_pack_says_never() {
        let never = Pack { store: StoreReplies::Never, ..Pack::default() };
        for (api, store, set) in [
            (Api::Responses, json!(null), true),
            (Api::Responses, json!(true), true),
            (Api::Responses, json!(false), false),
            (Api::ChatCompletions, json!(null), false),
        ] {
            let body = object(json!({"store": store, "max_output_tokens": 5, "max_tokens": 5}));
            let body: Map<_, _> = body
                .into_iter()
                .filter(|(name, _)| name == "store" || api.output_limits().contains(&name.as_str()))
                .collect();
            let (_, kept) = bounded(api, &body, &model(), tokens(10_000)).unwrap();
            assert_eq!(kept, [], "{api:?} {store}");
            let prompt = estimate::prompt(api, &body, &model());
            let found = bound(api, &body, &model(), never, prompt, tokens(10_000)).unwrap();
            let expected = if set { vec![("store", json!(false))] } else { vec![] };
            assert_eq!(found.set, expected, "{api:?} {store}");
        }
    }

    #[test]
    fn a_stream_is_asked_for_its_usage() {
        for options in [json!(null), json!({}), json!({"include_usage": false})] {
            let body = object(
                json!({"model": "m", "messages": [], "max_tokens": 9, "stream": true, "stream_options": options}),
            );
            let (_, set) = bounded(Api::ChatCompletions, &body, &model(), tokens(10_000)).unwrap();
            assert_eq!(set, [("stream_options", json!({"include_usage": true}))]);
        }
    }

    /// With `AsWritten`, streams are forwarded as written, for a provider that rejects the member.
    #[test]
    fn a_stream_goes_out_as_written_where_the_pack_says_so() {
        let pack = Pack { stream_usage: StreamUsage::AsWritten, ..Pack::default() };
        for options in [None, Some(json!(null)), Some(json!({})), Some(json!({"include_usage": true}))] {
            let mut body = object(json!({"model": "m", "messages": [], "max_tokens": 9, "stream": true}));
            body.extend(options.map(|options| ("stream_options".to_owned(), options)));
            let prompt = estimate::prompt(Api::ChatCompletions, &body, &model());
            let left = tokens(10_000);
            let bounded = bound(Api::ChatCompletions, &body, &model(), pack, prompt, left).unwrap();
            assert_eq!(bounded.set, [], "{body:?}");
            assert_eq!(bounded.reserved.bound.output, 9);
        }
    }

    /// For a model with a small context, known from the catalogue or the pack, the prompt and the limit that is set never exceed the
    /// context.
    #[test]
    fn an_absent_output_limit_leaves_room_for_the_prompt() {
        let pack = |context: i64, most: Option<i64>| ModelPrice {
            context_tokens: Some(context),
            max_output_tokens: most,
            ..ModelPrice::default()
        };
        for (name, window, most, words, outputs) in [
            ("our-own", 4_096, None, 1, 3_900..=4_095),
            ("our-own", 4_096, None, 1_500, 1_400..=1_700),
            ("our-own", 4_096, Some(512), 1, 512..=512),
            ("our-own", 2_048, Some(100_000), 100, 1_750..=1_900),
            ("our-own", 1_000_000, None, 1_500, 4_096..=4_096),
            // The pack's value overrides the catalogue's, which is 128,000.
            ("gpt-4o", 8_192, None, 1_000, 6_900..=7_150),
            // A prompt is not denied because of its estimate: it may fit by the model's own tokenizer.
            ("our-own", 4_096, None, 4_000, 256..=256),
            ("our-own", 16, None, 100, 1..=1),
        ] {
            let body = object(json!({"messages": [{"role": "user", "content": "word ".repeat(words)}]}));
            let model = Model::named(name, Some(&pack(window, most)));
            let (bound, _) = bounded(Api::ChatCompletions, &body, &model, tokens(10_000_000)).unwrap();
            assert!(outputs.contains(&bound.output), "{name} of {window} with {words} words: {bound:?}");
        }
        // By the catalogue alone: 8,192 for prompt and reply.
        let body = object(json!({"messages": [{"role": "user", "content": "word ".repeat(5_000)}]}));
        let (bound, _) =
            bounded(Api::ChatCompletions, &body, &Model::named("gpt-4", None), tokens(10_000_000)).unwrap();
        assert!(bound.total() <= 8_192, "{bound:?}");
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
            let refused = bounded(api, &object(body), &model(), tokens(1_000)).unwrap_err();
            assert!(refused.to_string().contains(word), "{refused}");
        }
    }

    proptest! {
        /// The remaining budget covers the reservation, whatever it is, unless it does not cover the prompt.
        #[test]
        fn an_absent_limit_never_takes_more_than_there_is(text in ".{0,200}", left in 0i64..100_000, n in 1i64..5) {
            let body = object(json!({"messages": [{"role": "user", "content": text}], "n": n}));
            for name in ["our-own", "gpt-4o", "claude-opus-5"] {
                let (bound, _) = bounded(Api::ChatCompletions, &body, &Model::named(name, None), tokens(left)).unwrap();
                prop_assert!(bound.total() <= left || bound.prompt.saturating_add(n) >= left, "{bound:?}");
            }
        }
    }
}
