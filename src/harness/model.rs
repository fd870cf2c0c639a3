//! Model calls, passed through and metered.
//!
//! The body is parsed once, strictly, and what was parsed is what is sent; its cost is bounded and reserved before it leaves, and
//! settled from the reply's own account. What a provider refuses costs nothing, what breaks off at the provider its prompt and what came. A
//! reply that gives no account, or that whoever asked did not read to its end, stays charged in full. Streams pass chunk by chunk, and
//! end where their protocol ends.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use futures::StreamExt;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyDataStream, BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    body::{Body, boxed},
    gate::{Call, Gate, Permit, Settlement},
    link::{self, Peer},
};
use crate::{
    evidence::record::{Channel, Effect},
    policy::{
        budget::Spent,
        config::{ModelPrice, Sensitivity},
        decide::Denial,
        json, price,
        rule::Rule,
        shorten::shorten,
        tokens::{self, Api, Bound, Came, Reported},
    },
};

/// Longest request that is taken.
const LONGEST_REQUEST: usize = 16 << 20;
/// Longest part of a reply that is kept to find its usage in: a whole JSON reply, or one line of a stream.
const LONGEST_SCAN: usize = 16 << 20;

/// Which API a path speaks.
pub fn api_of(path: &str) -> Option<Api> {
    match path {
        "/v1/chat/completions" => Some(Api::ChatCompletions),
        "/v1/responses" => Some(Api::Responses),
        "/v1/messages" => Some(Api::Messages),
        _ => None,
    }
}

/// Handles one model call.
pub async fn handle(gate: Arc<Gate>, api: Api, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let (parts, body) = request.into_parts();
    if parts.method != Method::POST {
        let denial =
            Denial { rule: Rule::ModelRequest, reason: format!("{path} takes POST only, found {}", parts.method) };
        return refusal(api, &gate.deny(Channel::Model, &path, None, denial).await);
    }
    let body = match Limited::new(body, LONGEST_REQUEST).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => {
            let denial = Denial { rule: Rule::ModelRequest, reason: format!("the request cannot be read: {error}") };
            return refusal(api, &gate.deny(Channel::Model, &path, None, denial).await);
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
    let body =
        json::parse(body).map_err(|ambiguous| Denial { rule: Rule::RequestJson, reason: ambiguous.to_string() })?;
    let Value::Object(mut body) = body else {
        let reason = "expected a JSON object, found another JSON value".to_owned();
        return Err(Denial { rule: Rule::ModelRequest, reason });
    };
    let model = body.get("model").and_then(Value::as_str).map(str::to_owned);
    let policy = gate.contracts().policy();
    let price = model.as_deref().and_then(|model| price::of(&policy.models.prices, model));
    if price.is_none() && policy.limits.cost_micros.is_some() {
        return Err(Denial {
            rule: Rule::ModelPrice,
            reason: format!(
                "the task's cost is limited, and the policy pack has no price for the model {:?}; it would be under \
                 spec.models.prices",
                model.as_deref().map_or_else(|| "(none)".into(), shorten)
            ),
        });
    }
    let bound = tokens::bound(api, &mut body, gate.journal().left(price))
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
            reserve: spent(bound, price),
        })
        .await?;

    let mut outgoing = Request::new(Bytes::from(body));
    *outgoing.method_mut() = Method::POST;
    *outgoing.headers_mut() = passed_on(headers);
    let target = format!("{}{path}", base.trim_end_matches('/'));
    match gate.link().forward(Channel::Model, permit.intent, &target, outgoing).await {
        Ok(reply) => {
            let told = Told { gate: gate.clone(), path: path.to_owned(), digest };
            Ok(meter(reply, permit, (bound, price.cloned()), told))
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

/// What so many tokens take of the budget.
fn spent(tokens: Bound, price: Option<&ModelPrice>) -> Spent {
    let cost_micros = price.map_or(0, |price| price.cost(tokens.prompt, tokens.output));
    Spent { tokens: tokens.total(), cost_micros }
}

/// What of the agent's headers goes to the provider. Credentials do not: the gateway has the real ones.
fn passed_on(headers: &HeaderMap) -> HeaderMap {
    let mut passed = HeaderMap::new();
    for (name, value) in headers {
        let passes = name == header::ACCEPT
            || name == header::USER_AGENT
            || ["openai-", "anthropic-", "x-stainless-"].iter().any(|prefix| name.as_str().starts_with(prefix));
        if passes {
            passed.append(name, value.clone());
        }
    }
    passed.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    // A compressed reply could not be metered.
    passed.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    passed
}

/// Whom to tell of a reply that the gateway has ended, and which call it was.
struct Told {
    gate: Arc<Gate>,
    path: String,
    digest: String,
}

fn meter(
    reply: Response<Incoming>,
    permit: Permit,
    (reserved, price): (Bound, Option<ModelPrice>),
    told: Told,
) -> Response<Body> {
    let (mut parts, body) = reply.into_parts();
    let streamed = parts
        .headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.starts_with("text/event-stream"));
    let meter = Meter {
        permit: Some(permit),
        rule: None,
        reserved,
        price,
        status: parts.status,
        upstream: Peer::taken(&mut parts.headers),
        streamed,
        hasher: Sha256::new(),
        bytes: 0,
        scan: Vec::new(),
        looked: 0,
        reported: Reported::default(),
        // Whoever reads a reply of known length stops at its last byte, and never asks for its end.
        length: hyper::body::Body::size_hint(&body).exact(),
        came: Came::Unread,
    };
    for hop in [header::CONNECTION, header::TRANSFER_ENCODING] {
        parts.headers.remove(hop);
    }
    let parts_of = (BodyDataStream::new(body), Some(meter), told);
    let stream = futures::stream::unfold(parts_of, |(mut body, mut meter, told)| async move {
        match body.next().await {
            Some(Ok(chunk)) => {
                if let Some(meter) = &mut meter {
                    meter.see(&chunk);
                }
                Some((Ok(Frame::data(chunk)), (body, meter, told)))
            }
            Some(Err(error)) => {
                let ended = link::ended(&error);
                if let Some(mut meter) = meter.take() {
                    meter.rule = ended.as_ref().map(|denial| denial.rule);
                    // What the gateway has ended, the provider may have said to its end.
                    if meter.came == Came::Unread && ended.is_none() {
                        meter.came = Came::Broken;
                    }
                }
                if let Some(denial) = ended {
                    let Told { gate, path, digest } = &told;
                    gate.deny(Channel::Model, path, Some(digest.clone()), denial).await;
                }
                Some((Err(Box::<dyn std::error::Error + Send + Sync>::from(error)), (body, meter, told)))
            }
            None => {
                if let Some(mut meter) = meter {
                    meter.came = Came::Whole;
                }
                None
            }
        }
    });
    Response::from_parts(parts, BodyExt::boxed_unsync(StreamBody::new(stream)))
}

/// Reads along. Dropped at the end of the reply, or when the agent or the provider hangs up.
struct Meter {
    permit: Option<Permit>,
    /// Why the gateway has ended the reply.
    rule: Option<Rule>,
    reserved: Bound,
    price: Option<ModelPrice>,
    status: StatusCode,
    upstream: Option<Peer>,
    streamed: bool,
    hasher: Sha256,
    bytes: u64,
    scan: Vec<u8>,
    /// So much of it has no end of a line.
    looked: usize,
    reported: Reported,
    length: Option<u64>,
    came: Came,
}

impl Meter {
    fn see(&mut self, chunk: &[u8]) {
        self.hasher.update(chunk);
        self.bytes = self.bytes.saturating_add(chunk.len() as u64);
        if self.scan.len().saturating_add(chunk.len()) <= LONGEST_SCAN {
            self.scan.extend_from_slice(chunk);
        }
        if self.streamed {
            // Each byte is looked at once, however long a line is.
            let from = std::mem::take(&mut self.looked);
            let ends = |scan: &[u8], from: usize| {
                let rest = scan.get(from..).unwrap_or_default();
                rest.iter().position(|byte| *byte == b'\n').map(|end| from.saturating_add(end))
            };
            let mut next = ends(&self.scan, from);
            while let Some(end) = next {
                let line: Vec<u8> = self.scan.drain(..=end).collect();
                next = ends(&self.scan, 0);
                if let Some(data) = line.strip_prefix(b"data:") {
                    match serde_json::from_slice(data) {
                        Ok(event) => self.reported.see(&event),
                        Err(_) if data.trim_ascii() == b"[DONE]" => self.reported.done(),
                        Err(_) => {}
                    }
                }
            }
            self.looked = self.scan.len();
        }
        // Many clients hang up there, and do not wait for the end of the connection's reply.
        if self.reported.ended || self.length == Some(self.bytes) {
            self.came = Came::Whole;
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        let Some(permit) = self.permit.take() else { return };
        if !self.streamed {
            match serde_json::from_slice(&self.scan) {
                Ok(reply) => self.reported.see(&reply),
                // It was written whole before its first byte came.
                Err(_) => {
                    self.reported.written =
                        self.length.and_then(|length| i64::try_from(length).ok()).unwrap_or(i64::MAX);
                }
            }
        }
        let charged = tokens::charge(self.reserved, self.status.is_success(), self.came, &self.reported);
        let spent = charged.map(|tokens| spent(tokens, self.price.as_ref()));
        let effect = match (self.came, self.status) {
            (Came::Whole, status) if status.is_success() => Effect::Applied,
            (Came::Whole, status) if status.is_client_error() => Effect::NotApplied,
            _ => Effect::Unknown,
        };
        let response = permit.salt().digested(&self.hasher.clone().finalize().into());
        permit.settle(Settlement {
            effect,
            rule: self.rule,
            status: self.status.as_u16(),
            response_digest: Some(response),
            response_bytes: self.bytes,
            sent_bytes: None,
            spent,
            upstream: self.upstream.take(),
            sensitivity: Sensitivity::default(),
            undone_by: None,
        });
    }
}

/// A refusal in the shape that the API's client libraries show to people. Always 403: they do not try that again.
pub fn refusal(api: Api, denial: &Denial) -> Response<Body> {
    let message = format!("Belay refused this call. rule: {}. {}", denial.rule, denial.reason);
    let body = match api {
        Api::ChatCompletions | Api::Responses => serde_json::json!({
            "error": {"message": message, "type": "belay_denied", "code": denial.rule, "param": null}
        }),
        Api::Messages => serde_json::json!({
            "type": "error", "error": {"type": "permission_error", "message": message}
        }),
    };
    let mut reply = Response::new(boxed(Full::from(body.to_string()).map_err(|error: Infallible| match error {})));
    *reply.status_mut() = StatusCode::FORBIDDEN;
    reply.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Ok(rule) = HeaderValue::from_str(denial.rule.as_str()) {
        reply.headers_mut().insert(crate::wire::RULE, rule);
    }
    reply
}
