//! Model calls, passed through and metered.
//!
//! The body is sent as the agent wrote it, except for the members that must be set. Its cost is bounded and reserved before it leaves, and
//! settled from the usage that the reply reports, if that usage can be true. A call that the provider rejects costs nothing. A reply that
//! breaks off at the provider costs its prompt and what came. A reply that its client did not read to the end, or did not wait for, is read
//! on for a while. A reply without usage stays charged in full. Streams pass chunk by chunk, and end where their protocol ends.

/// Headers between an agent and a provider.
mod headers;
/// Metering of replies while they pass.
mod meter;
/// Denials in the shape of each API.
mod refusal;
/// Removal of the usage event from a stream whose client did not ask for it.
mod unasked;

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use serde_json::{Map, Value};
use tokio::sync::{Semaphore, oneshot};

pub(super) use self::refusal::refusal;
use self::{
    headers::passed_on,
    meter::{READ_ON, Told, meter},
    refusal::refusal_as,
};
use super::{
    body::Body,
    gate::{Call, Gate, Permit, Settlement},
    gateway_client::DeliveryError,
};
use crate::{
    evidence::record::Channel,
    policy::{
        budget::Spent,
        config::PolicyConfig,
        decide::Denial,
        model::{
            api::{self, Api, Chosen, Family},
            catalogue::{self, Model},
            estimate::{self, Prompt},
            request::{self, Bounded, Pack},
            written::Written,
        },
        price,
        rule::Rule,
        shorten::shorten,
    },
    room::Unread,
    wire::LONGEST_REQUEST,
};

/// The longest request whose tokens are counted on the current thread, in bytes: that takes milliseconds.
const COUNTED_HERE: usize = 32 << 10;

/// Handles one model call.
pub async fn handle(gate: Arc<Gate>, api: Api, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let (parts, body) = request.into_parts();
    if parts.method.as_str() != api.method() {
        let reason = format!("{path} takes {} only, found {}", api.method(), parts.method);
        let denial = gate.deny(Channel::Model, &path, None, Denial { rule: Rule::ModelRequest, reason }).await;
        return refusal_as(api, &denial, refusal::wrong_method(&parts.headers));
    }
    // The body keeps its memory until the reply begins.
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
    let target = api.target(&path, parts.uri.query());
    match call(&gate, api, &target, &parts.headers, &body).await {
        Ok(reply) => reply,
        Err(denial) => {
            let digest = Some(gate.salt().bytes(&body));
            refusal(api, &gate.deny(Channel::Model, &path, digest, denial).await)
        }
    }
}

/// Makes the call.
///
/// # Errors
/// Returns a denial that is not recorded yet. A denial that follows an intent is recorded as the intent's outcome and returned as a reply.
async fn call(
    gate: &Arc<Gate>,
    api: Api,
    path: &str,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Response<Body>, Denial> {
    gate.open()?;
    // A list of models is requested with GET, which has no body.
    let text = if api == Api::Models { b"{}" } else { body };
    let written =
        Written::read(text).map_err(|ambiguous| Denial { rule: Rule::RequestJson, reason: ambiguous.to_string() })?;
    let model = written.judged().get("model").and_then(Value::as_str).map(str::to_owned);
    let policy = gate.contracts().policy();
    let endpoint = endpoint(policy, api, headers, model.as_deref()).ok_or_else(|| Denial {
        rule: Rule::ModelEndpoint,
        reason: format!(
            "the PolicyPack has no endpoint for {path} and the model {:?}; endpoints are in spec.models",
            model.as_deref().map_or_else(|| "(none)".into(), shorten)
        ),
    })?;
    let pack = Pack::of(policy, endpoint);
    let price = model.as_deref().and_then(|model| price::of(&policy.models.prices, model));
    if price.is_none() && policy.limits.cost_micros.is_some() && !api.is_free() {
        return Err(unpriced(model.as_deref()));
    }
    let known = Model::named(model.as_deref().unwrap_or_default(), price);
    let prompt = prompt_of(api, written.judged(), text.len(), &known).await?;
    let Bounded { reserved, set, noted } =
        request::bound(api, written.judged(), &known, pack, prompt, gate.journal().left(price))
            .map_err(|unbounded| Denial { rule: Rule::ModelRequest, reason: unbounded.to_string() })?;
    let mut rules = vec![Rule::RequestJson, Rule::ModelEndpoint, Rule::ModelRequest];
    rules.extend((!noted.allowed.is_empty()).then_some(Rule::ModelAllowed));
    rules.extend((!noted.unknown.is_empty()).then_some(Rule::ModelUnknown));
    rules.extend(policy.limits.cost_micros.map(|_| Rule::ModelPrice));
    let body = if api == Api::Models { vec![] } else { written.with(&set) };
    let digest = gate.salt().bytes(&body);
    let permit = gate
        .permit(Call {
            channel: Channel::Model,
            target: path.to_owned(),
            side_effect: None,
            definition: None,
            request_commitment: Some(digest.clone()),
            request_bytes: u64::try_from(body.len()).unwrap_or(u64::MAX),
            key: None,
            approvals: vec![],
            reasons: vec![],
            compensates: None,
            judged: None,
            rules,
            model: model.map(|model| shorten(&gate.redactor().model(&model, policy, gate.salt()))),
            reserve: Spent::of(reserved.bound, price),
        })
        .await?;

    let mut outgoing = Request::new(Bytes::from(body));
    *outgoing.method_mut() = if api == Api::Models { Method::GET } else { Method::POST };
    *outgoing.headers_mut() = passed_on(headers, pack.terms);
    let target = api::url(endpoint.base, endpoint.family, path);
    let (reserved, price, silence) = (reserved, price.cloned(), policy.silence());
    let has_asked = request::asks_for_usage(api, written.judged());
    let told = Told { gate: gate.clone(), path: path.to_owned(), digest, has_asked };
    let replied = async move {
        let gate = &told.gate;
        match gate.link().forward((Channel::Model, permit.intent), &target, outgoing, silence).await {
            Ok(reply) => meter(reply, permit, (reserved, price), told),
            Err(undelivered) => undone(permit, undelivered, &told, api).await,
        }
    };
    waited_for(gate, replied).await.ok_or_else(|| {
        let reason = "the attempt was over before the model's reply began";
        gate.open().err().unwrap_or_else(|| Denial { rule: Rule::Busy, reason: reason.to_owned() })
    })
}

/// Returns the beginning of the call's reply. If the client has gone, the call continues in the background for a while, because the model
/// continues, too, and its usage is known once it has ended. Returns `None` if the attempt ends before.
async fn waited_for(
    gate: &Gate,
    replied: impl Future<Output = Response<Body>> + Send + 'static,
) -> Option<Response<Body>> {
    let (mut told, heard) = oneshot::channel();
    let over = gate.over();
    gate.behind(async move {
        let reply = tokio::select! {
            reply = replied => reply,
            () = async {
                told.closed().await;
                tokio::time::sleep(READ_ON).await;
            } => return,
            () = over => return,
        };
        // If no client waits for the reply any more, dropping it reads it on in the background.
        let _ = told.send(reply);
    });
    heard.await.ok()
}

/// Settles a call that got no reply, and returns the error reply for the agent.
async fn undone(permit: Permit, undelivered: DeliveryError, told: &Told, api: Api) -> Response<Body> {
    let DeliveryError { denial, certain, upstream } = undelivered;
    let settlement =
        if certain { Settlement::not_applied(denial.rule) } else { Settlement::unknown(Some(denial.rule)) };
    permit.settle(Settlement { upstream, ..settlement });
    // The call is over, and its reply is denied.
    let denial = match denial.rule {
        Rule::UpstreamSecret => told.gate.deny(Channel::Model, &told.path, Some(told.digest.clone()), denial).await,
        _ => denial,
    };
    refusal(api, &denial)
}

/// Counts the tokens of a prompt. Long prompts are counted on a separate thread, so that no other call waits for them, and few at a time.
async fn prompt_of(api: Api, body: &Map<String, Value>, length: usize, model: &Model) -> Result<Prompt, Denial> {
    static PLACES: Semaphore = Semaphore::const_new(2);
    if length <= COUNTED_HERE {
        return Ok(estimate::prompt(api, body, model));
    }
    let uncounted = |error: String| Denial {
        rule: Rule::ModelRequest,
        reason: format!("the tokens of this request could not be counted: {error}; please report this"),
    };
    let place = PLACES.acquire().await.map_err(|error| uncounted(error.to_string()))?;
    let (body, model) = (body.clone(), model.clone());
    let counted = tokio::task::spawn_blocking(move || {
        let _place = place;
        estimate::prompt(api, &body, &model)
    });
    counted.await.map_err(|error| uncounted(error.to_string()))
}

/// Returns the denial of a call whose cost is unknown. The catalogue's list prices are only a hint, because currencies, contracts and tiers
/// differ.
fn unpriced(model: Option<&str>) -> Denial {
    let listed = model.and_then(|name| Model::named(name, None).listed).map_or_else(String::new, |(input, output)| {
        let date = catalogue::date();
        format!(" (listed on {date} in US dollars: input {input:?}, output {output:?}, caches and faster tiers apart)")
    });
    Denial {
        rule: Rule::ModelPrice,
        reason: format!(
            "the task has a cost limit, and the PolicyPack has no price for the model {:?}; the owner of the PolicyPack can add one in \
             spec.models.prices{listed}",
            model.map_or_else(|| "(none)".into(), shorten)
        ),
    }
}

/// Returns the endpoint that a call goes to.
fn endpoint<'p>(policy: &'p PolicyConfig, api: Api, headers: &HeaderMap, model: Option<&str>) -> Option<Chosen<'p>> {
    // The libraries of both families request lists of models at the same path. Only one of them sends a version.
    let anthropic = || headers.contains_key("anthropic-version").then_some(Family::Anthropic);
    match api.family() {
        Some(family) => policy.models.of(Some(family), model),
        None => {
            anthropic().and_then(|family| policy.models.of(Some(family), None)).or_else(|| policy.models.of(None, None))
        }
    }
}
