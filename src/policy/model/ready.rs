//! A request that is ready to be sent, and its bound as it stands.
//!
//! Guarantees: harness and gateway bound the very same request, so that they agree on each; what [`make`] has made ready passes
//! [`bound`], with the same bound.
//! Non-goals: reserving it.

use serde_json::{Map, Value};

use super::{
    Bound,
    api::Api,
    catalogue::Model,
    request::{self, Bounded, Left, Unbounded},
};

/// All that there could be: the bound of a request that names its output limit does not depend on what is left.
const UNLIMITED: Left<'static> = Left { tokens: i64::MAX, cost: None };

/// Sets in a request what its bound needs, and gives the bound of what is sent then.
///
/// # Errors
/// If its cost or effect cannot be bounded.
pub fn make(api: Api, body: &mut Map<String, Value>, model: &Model, left: Left<'_>) -> Result<Bound, Unbounded> {
    let first = request::bound(api, body, model, left)?;
    let sent = set(api, body.clone(), model, &first)?;
    // What is set counts as well, and comes off the output limit where that is all that is left.
    let more = sent.bound.prompt.saturating_sub(first.bound.prompt).max(0);
    let less = Left {
        tokens: left.tokens.saturating_sub(more),
        cost: left.cost.map(|(micros, price)| (micros.saturating_sub(price.cost(more, 0)), price)),
    };
    let sent = if more == 0 { sent } else { set(api, body.clone(), model, &request::bound(api, body, model, less)?)? };
    *body = sent.body;
    Ok(sent.bound)
}

/// A request with what had to be set in it.
struct Sent {
    body: Map<String, Value>,
    bound: Bound,
}

fn set(api: Api, mut body: Map<String, Value>, model: &Model, bounded: &Bounded) -> Result<Sent, Unbounded> {
    body.extend(bounded.set.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
    let bound = if bounded.set.is_empty() { bounded.bound } else { bound(api, &body, model)? };
    Ok(Sent { body, bound })
}

/// The bound of a request as it stands, in which nothing has to be set any more.
///
/// # Errors
/// If its cost or effect cannot be bounded, or only with something that it does not say.
pub fn bound(api: Api, body: &Map<String, Value>, model: &Model) -> Result<Bound, Unbounded> {
    let Bounded { bound, set } = request::bound(api, body, model, UNLIMITED)?;
    match set.iter().find(|(name, value)| body.get(*name) != Some(value)) {
        None => Ok(bound),
        Some((name, _)) => Err(Unbounded(format!("expected a request that names `{name}`, found none, or another"))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::policy::config::ModelPrice;

    fn apis() -> impl Strategy<Value = Api> {
        prop_oneof![Just(Api::ChatCompletions), Just(Api::Responses), Just(Api::Messages)]
    }

    proptest! {
        /// What the harness reserves is what the gateway finds, whatever is set, and never more than is left where the limit is ours.
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
            let mut body = json!({"model": "m", "messages": [{"role": "user", "content": text}]}).as_object().unwrap().clone();
            if stream {
                body.insert("stream".into(), true.into());
            }
            if let Some(limit) = limit {
                body.insert(model.limit_member(api).unwrap().into(), limit.into());
            }
            let made = make(api, &mut body, &model, Left { tokens: left, cost: micros.map(|micros| (micros, &price)) }).unwrap();
            prop_assert_eq!(Ok(made), bound(api, &body, &model));
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
            let refused = bound(api, &body, &model).unwrap_err();
            assert!(refused.to_string().contains(word), "{refused}");
            // The control: it passes once it is made ready, but for what is refused either way.
            let left = Left { tokens: 10_000, cost: None };
            assert_eq!(make(api, &mut body, &model, left).is_ok(), word != "background", "{body:?}");
            assert_eq!(bound(api, &body, &model).is_ok(), word != "background", "{body:?}");
        }
    }
}
