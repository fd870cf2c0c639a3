//! Bounds a request that is complete and about to be sent.
//!
//! Guarantees: harness and gateway evaluate the same request, so they reach the same decision. A request in which all members are set that
//! [`request::bound`] requires passes [`bound`], which finds the same output and no longer prompt.
//! Non-goals: reserving the bound, and counting a prompt twice. The second check uses only the minimum of the prompt, so it does not deny a
//! request that was counted in another way with an older catalogue.

use serde_json::{Map, Value};

use super::{
    Bound,
    api::Api,
    catalogue::Model,
    estimate::{self, Prompt},
    request::{self, Bounded, Left, Pack, Unbounded},
};

/// Unlimited budget: the bound of a request that names its output limit does not depend on what is left.
const UNLIMITED: Left<'static> = Left { tokens: i64::MAX, cost: None };

/// Returns the bound of a request in which nothing has to be set anymore, with the minimum of its prompt.
///
/// # Errors
/// Returns an error if the cost or the effect of the request cannot be bounded, or only with a member that it does not have.
pub fn bound(api: Api, body: &Map<String, Value>, model: &Model, pack: Pack<'_>) -> Result<Bound, Unbounded> {
    let tokens = estimate::least(body, model);
    let prompt = Prompt { tokens, least: tokens };
    let Bounded { reserved, set, .. } = request::bound(api, body, model, pack, prompt, UNLIMITED)?;
    match set.iter().find(|(name, value)| body.get(*name) != Some(value)) {
        None => Ok(reserved.bound),
        Some((name, _)) => Err(Unbounded(format!(
            "expected a request with the value of `{name}` that the harness sets, found another value or none"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::policy::{
        config::{ModelPrice, OutputLimitField},
        model::written::Written,
    };

    fn apis() -> impl Strategy<Value = Api> {
        prop_oneof![Just(Api::ChatCompletions), Just(Api::Responses), Just(Api::Messages)]
    }

    proptest! {
        /// The harness's reservation is enough for the gateway, whatever is set, and never above the budget if Belay sets the limit.
        #[test]
        fn who_makes_it_ready_and_who_judges_it_again_agree(
            api in apis(),
            text in ".{0,60}",
            limit in proptest::option::of(1i64..100_000),
            stream in any::<bool>(),
            left in 1i64..200_000,
            name in prop_oneof![Just("gpt-4o"), Just("claude-sonnet-4"), Just("our-own")],
            most in proptest::option::of(1i64..50_000),
            micros in proptest::option::of(1i64..1_000_000),
        ) {
            let price = ModelPrice { input_micros: 3_000_000, output_micros: 10_000_000, max_output_tokens: most, ..ModelPrice::default() };
            let model = Model::named(name, Some(&price));
            let prompt = if api == Api::Responses { "input" } else { "messages" };
            let mut body = json!({"model": "m", prompt: [{"role": "user", "content": text}]}).as_object().unwrap().clone();
            if stream {
                body.insert("stream".into(), true.into());
            }
            if let Some(limit) = limit {
                body.insert(model.limit_member(api, OutputLimitField::MaxTokens).unwrap().into(), limit.into());
            }
            let left_of = Left { tokens: left, cost: micros.map(|micros| (micros, &price)) };
            let text = Value::Object(body).to_string();
            let written = Written::read(text.as_bytes()).unwrap();
            let prompt = estimate::prompt(api, written.judged(), &model);
            let Bounded { reserved, set, .. } =
                request::bound(api, written.judged(), &model, Pack::default(), prompt, left_of).unwrap();
            let made = reserved.bound;
            let sent = written.with(&set);
            let sent = Written::read(&sent).unwrap();
            prop_assert_eq!(prompt, estimate::prompt(api, sent.judged(), &model), "what is set is no part of it");
            let again = bound(api, sent.judged(), &model, Pack::default()).unwrap();
            prop_assert_eq!(again.output, made.output);
            prop_assert!(again.prompt <= made.prompt);
            let fits = limit.is_some() || made.output == 1 || made.total() <= left;
            prop_assert!(fits, "{:?} of {}", made, left);
        }
    }

    #[test]
    fn what_is_not_ready_has_no_bound() {
        for (api, body, word) in [
            (Api::ChatCompletions, json!({"model": "m", "messages": []}), "max_tokens"),
            (Api::Messages, json!({"model": "m", "messages": []}), "max_tokens"),
            (Api::Responses, json!({"model": "m", "input": "a"}), "max_output_tokens"),
            (Api::ChatCompletions, json!({"model": "m", "max_tokens": 5, "stream": true}), "stream_options"),
            (Api::Responses, json!({"model": "m", "max_output_tokens": 5, "background": true}), "background"),
        ] {
            let model = Model::named("m", None);
            let mut body = body.as_object().unwrap().clone();
            let refused = bound(api, &body, &model, Pack::default()).unwrap_err();
            assert!(refused.to_string().contains(word), "{refused}");
            // The control: the request passes once it is complete, except for requests that are denied either way.
            let left = Left { tokens: 10_000, cost: None };
            let prompt = estimate::prompt(api, &body, &model);
            let made = request::bound(api, &body, &model, Pack::default(), prompt, left);
            assert_eq!(made.is_ok(), word != "background", "{body:?}");
            body.extend(made.into_iter().flat_map(|ready| ready.set).map(|(name, value)| (name.to_owned(), value)));
            assert_eq!(bound(api, &body, &model, Pack::default()).is_ok(), word != "background", "{body:?}");
        }
    }
}
