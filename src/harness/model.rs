//! Model calls, passed through and metered.
//!
//! The body is parsed once, strictly, and what was parsed is what is sent; its cost is bounded and reserved before it leaves, and
//! settled from the reply's own account where that can be true. What a provider refuses costs nothing, what breaks off at the provider its prompt
//! and what came. A reply that whoever asked did not read to its end is read on for a while; one that gives no account stays charged in full.
//! Streams pass chunk by chunk, and end where their protocol ends.

/// Headers between an agent and a provider.
mod headers;
/// Replies, read along.
mod meter;
/// Refusals in the shape of each API.
mod refusal;

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use serde_json::{Map, Value};
use tokio::sync::Semaphore;

pub(super) use self::refusal::refusal;
use self::{
    headers::passed_on,
    meter::{Told, meter},
    refusal::refusal_as,
};
use super::{
    body::Body,
    gate::{Call, Gate, Settlement},
};
use crate::{
    evidence::record::Channel,
    policy::{
        budget::Spent,
        decide::Denial,
        json,
        model::{
            api::Api,
            catalogue::{self, Model},
            estimate::{self, Prompt},
            ready,
        },
        price,
        rule::Rule,
        shorten::shorten,
    },
    room::Unread,
    wire::LONGEST_REQUEST,
};

/// The tokens of a request that is no longer are counted where it is read: in milliseconds.
const COUNTED_HERE: usize = 32 << 10;

/// Handles one model call.
pub async fn handle(gate: Arc<Gate>, api: Api, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let (parts, body) = request.into_parts();
    if parts.method != Method::POST {
        let denial =
            Denial { rule: Rule::ModelRequest, reason: format!("{path} takes POST only, found {}", parts.method) };
        return refusal(api, &gate.deny(Channel::Model, &path, None, denial).await);
    }
    // What is held of it has its place until the reply begins.
    let (body, _place) = match gate.room().read(body, LONGEST_REQUEST).await {
        Ok(read) => read,
        Err(unread) => {
            let denial = Denial { rule: Rule::ModelRequest, reason: unread.to_string() };
            let denial = gate.deny(Channel::Model, &path, None, denial).await;
            let too_long = matches!(unread, Unread::TooLong { .. });
            let status = if too_long { StatusCode::PAYLOAD_TOO_LARGE } else { StatusCode::BAD_REQUEST };
            return refusal_as(api, &denial, status);
        }
    };
    match call(&gate, api, &path, &parts.headers, &body).await {
        Ok(reply) => reply,
        Err(denial) => {
            let digest = Some(gate.salt().bytes(&body));
            refusal(api, &gate.deny(Channel::Model, &path, digest, denial).await)
        }
    }
}

/// # Errors
/// A refusal that is not recorded yet. One that follows an intent is recorded as its outcome and answered.
async fn call(
    gate: &Arc<Gate>,
    api: Api,
    path: &str,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Response<Body>, Denial> {
    gate.open()?;
    let endpoints = &gate.contracts().policy().models;
    let base = match api {
        Api::ChatCompletions | Api::Responses => endpoints.openai.as_deref(),
        Api::Messages => endpoints.anthropic.as_deref(),
    };
    let base = base.ok_or_else(|| Denial {
        rule: Rule::ModelEndpoint,
        reason: format!("the policy pack has no endpoint for {path}; it would be under spec.models"),
    })?;
    let length = body.len();
    let body =
        json::parse(body).map_err(|ambiguous| Denial { rule: Rule::RequestJson, reason: ambiguous.to_string() })?;
    let Value::Object(body) = body else {
        let reason = "expected a JSON object, found another JSON value".to_owned();
        return Err(Denial { rule: Rule::ModelRequest, reason });
    };
    let model = body.get("model").and_then(Value::as_str).map(str::to_owned);
    let policy = gate.contracts().policy();
    let price = model.as_deref().and_then(|model| price::of(&policy.models.prices, model));
    if price.is_none() && policy.limits.cost_micros.is_some() {
        return Err(unpriced(model.as_deref()));
    }
    let known = Model::named(model.as_deref().unwrap_or_default(), price);
    let (mut body, prompt) = prompt_of(api, body, length, &known).await?;
    let reserved = ready::make(api, &mut body, &known, prompt, gate.journal().left(price))
        .map_err(|unbounded| Denial { rule: Rule::ModelRequest, reason: unbounded.to_string() })?;
    let mut rules = vec![Rule::RequestJson, Rule::ModelEndpoint, Rule::ModelRequest];
    rules.extend(policy.limits.cost_micros.map(|_| Rule::ModelPrice));
    let body =
        serde_json::to_vec(&body).map_err(|error| Denial { rule: Rule::ModelRequest, reason: error.to_string() })?;
    let digest = gate.salt().bytes(&body);
    let permit = gate
        .permit(Call {
            channel: Channel::Model,
            target: path.to_owned(),
            effect: None,
            definition: None,
            request_digest: Some(digest.clone()),
            request_bytes: u64::try_from(body.len()).unwrap_or(u64::MAX),
            key: None,
            approvals: vec![],
            because: vec![],
            undoes: None,
            judged: None,
            rules,
            model: model.map(|model| shorten(&gate.redactor().model(&model, policy, gate.salt()))),
            reserve: Spent::of(reserved.bound, price),
        })
        .await?;

    let mut outgoing = Request::new(Bytes::from(body));
    *outgoing.method_mut() = Method::POST;
    *outgoing.headers_mut() = passed_on(headers);
    let target = format!("{}{path}", base.trim_end_matches('/'));
    match gate.link().forward((Channel::Model, permit.intent), &target, outgoing, policy.silence()).await {
        Ok(reply) => {
            let told = Told { gate: gate.clone(), path: path.to_owned(), digest };
            Ok(meter(reply, permit, (reserved, price.cloned()), told))
        }
        Err(undelivered) => {
            let denial = undelivered.denial;
            let settlement = if undelivered.certain {
                Settlement::not_applied(denial.rule)
            } else {
                Settlement::unknown(Some(denial.rule))
            };
            permit.settle(Settlement { upstream: undelivered.upstream, ..settlement });
            // The call is over, and what came of it is refused.
            let denial = match denial.rule {
                Rule::UpstreamSecret => gate.deny(Channel::Model, path, Some(digest), denial).await,
                _ => denial,
            };
            Ok(refusal(api, &denial))
        }
    }
}

/// The tokens of a prompt. Those of a long one are counted on a thread apart: nobody else waits for them, and few are counted at a time.
async fn prompt_of(
    api: Api,
    body: Map<String, Value>,
    length: usize,
    model: &Model,
) -> Result<(Map<String, Value>, Prompt), Denial> {
    static PLACES: Semaphore = Semaphore::const_new(2);
    if length <= COUNTED_HERE {
        let prompt = estimate::prompt(api, &body, model);
        return Ok((body, prompt));
    }
    let uncounted = |error: String| Denial {
        rule: Rule::ModelRequest,
        reason: format!("the tokens of this request could not be counted: {error}; please report this"),
    };
    let place = PLACES.acquire().await.map_err(|error| uncounted(error.to_string()))?;
    let model = model.clone();
    let counted = tokio::task::spawn_blocking(move || {
        let _place = place;
        let prompt = estimate::prompt(api, &body, &model);
        (body, prompt)
    });
    counted.await.map_err(|error| uncounted(error.to_string()))
}

/// The refusal of a call whose cost nobody can tell. What the catalogue lists is no pack's word: currencies, contracts and tiers differ.
fn unpriced(model: Option<&str>) -> Denial {
    let listed = model.and_then(|name| Model::named(name, None).listed).map_or_else(String::new, |(input, output)| {
        let date = catalogue::date();
        format!(" (listed on {date} in US dollars: input {input:?}, output {output:?}, caches and faster tiers apart)")
    });
    Denial {
        rule: Rule::ModelPrice,
        reason: format!(
            "the task's cost is limited, and the policy pack has no price for the model {:?}; whoever keeps the pack can add one under \
             spec.models.prices{listed}",
            model.map_or_else(|| "(none)".into(), shorten)
        ),
    }
}
