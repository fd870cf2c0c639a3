//! The checks that the gateway makes of a model request.
//!
//! Guarantees: the request passes the same review that the harness has made, by the gateway's own reading of the body. The tokens of its
//! reply at most and of its prompt at least are within what its intent has reserved, and so is their cost by the prices of the attempt's
//! policy. It asks for the model that the record names, at the endpoint that the pack has for that model, and leaves with listed headers
//! only.
//!
//! Non-goals: what the model replies, and whether the budget has that much left, which the witness checks for every intent.

use http::{
    HeaderMap, HeaderValue,
    header::{ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE},
};
use serde_json::Value;

use crate::{
    gateway::{authorize::Target, compiled::Compiled, refusal::Refused, witness::IntentFacts},
    policy::{
        budget::Spent,
        commit::Salt,
        model::{
            Bound,
            api::{self, Api},
            catalogue::Model,
            headers,
            members::Terms,
            ready,
            request::Pack,
            written::Written,
        },
        price,
        rule::Rule,
        shorten::shorten,
    },
};

/// Checks that a body is a request that may leave to this target and for which its intent has reserved enough. Returns the headers to send.
///
/// # Errors
/// Returns [`Rule::RequestJson`] or [`Rule::ModelRequest`] for a request that may not leave at all, [`Rule::ModelEndpoint`] for a model
/// that the pack has no endpoint or another endpoint for, [`Rule::ModelPrice`] for a model without a price if cost is limited, or
/// [`Rule::IntentMissing`] for a request that the intent is not for.
pub fn reviewed(
    compiled: &Compiled,
    to: &Target,
    (intent, salt): (&IntentFacts, &Salt),
    (headers, body): (&HeaderMap, &[u8]),
) -> Result<HeaderMap, Refused> {
    let unfit = |reason: String| Refused::denied(Rule::ModelRequest, reason);
    let path = intent.target.split_once('?').map_or(intent.target.as_str(), |(path, _)| path);
    let api = Api::of_path(path)
        .ok_or_else(|| unfit(format!("expected the path of a model's API, found {}", intent.target)))?;
    if api == Api::Models {
        let models = &compiled.policy.models;
        let terms = Terms { allow: &models.allow, unknown: models.unknown_members, ..Terms::default() };
        let headers = by_list(headers, terms);
        return if body.is_empty() { Ok(headers) } else { Err(unfit("expected no body, found one".to_owned())) };
    }
    let written = Written::read(body).map_err(|error| Refused::denied(Rule::RequestJson, error.to_string()))?;
    let body = written.judged();
    let model = body.get("model").and_then(Value::as_str);
    let endpoint = compiled.policy.models.of(api.family(), model).ok_or_else(|| {
        let reason = format!("expected a model that the pack has an endpoint for at {}, found another", api.path());
        Refused::denied(Rule::ModelEndpoint, reason)
    })?;
    let expected = api::url(endpoint.base, endpoint.family, &intent.target);
    if Target::parse(&expected).as_ref() != Ok(to) {
        let reason = format!("expected a model whose endpoint in the pack is {}, found another", to.authority);
        return Err(Refused::denied(Rule::ModelEndpoint, reason));
    }
    let pack = Pack::of(&compiled.policy, endpoint);
    let price = model.and_then(|model| price::of(&compiled.policy.models.prices, model));
    let known = Model::named(model.unwrap_or_default(), price);
    let bound = ready::bound(api, body, &known, pack).map_err(|unbounded| unfit(unbounded.to_string()))?;
    is_enough(bound.total(), intent.reserved.tokens, "tokens")?;
    // An attempt that began with another policy uses that policy's names and prices, by which the log is verified.
    if *intent.policy == *compiled.digest {
        is_as_recorded(compiled, (intent, salt), model, (api, bound))?;
    }
    Ok(by_list(headers, pack.terms))
}

/// Returns the headers to send: those on the lists, and those that describe the body and the reply.
fn by_list(given: &HeaderMap, terms: Terms<'_>) -> HeaderMap {
    let framing = [CONTENT_TYPE, CONTENT_LENGTH, ACCEPT_ENCODING];
    let passed = given.iter().filter_map(|(name, value)| {
        if framing.contains(name) {
            return Some((name.clone(), value.clone()));
        }
        let value = headers::passed(name.as_str(), value.as_bytes(), terms)?;
        Some((name.clone(), HeaderValue::from_bytes(&value).ok()?))
    });
    let mut all = HeaderMap::new();
    for (name, value) in passed {
        all.append(name, value);
    }
    all
}

fn is_as_recorded(
    compiled: &Compiled,
    (intent, salt): (&IntentFacts, &Salt),
    model: Option<&str>,
    (api, bound): (Api, Bound),
) -> Result<(), Refused> {
    let policy = &compiled.policy;
    let named = model.map(|model| shorten(&compiled.redactor.model(model, policy, salt)));
    if named != intent.model {
        let quoted =
            |name: &Option<String>| name.as_ref().map_or_else(|| "none".to_owned(), |name| format!("{name:?}"));
        return Err(missing(format!(
            "expected the model {} that the intent names, found {}",
            quoted(&intent.model),
            quoted(&named)
        )));
    }
    let price = model.and_then(|model| price::of(&policy.models.prices, model));
    if price.is_none() && policy.limits.cost_micros.is_some() && !api.is_free() {
        let reason =
            "expected a model with a price in the pack, because the task has a cost limit; found another model";
        return Err(Refused::denied(Rule::ModelPrice, reason));
    }
    let Spent { cost_micros, .. } = Spent::of(bound, price);
    is_enough(cost_micros, intent.reserved.cost_micros, "millionths")
}

fn is_enough(needed: i64, reserved: i64, unit: &str) -> Result<(), Refused> {
    if needed <= reserved {
        return Ok(());
    }
    Err(missing(format!(
        "expected an intent that reserves {needed} {unit} for this request, found one that reserves {reserved}"
    )))
}

fn missing(reason: String) -> Refused {
    Refused::denied(Rule::IntentMissing, reason)
}

#[cfg(test)]
mod tests;
