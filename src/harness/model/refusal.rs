//! Denials in the form that the client libraries of each API show to users and use to decide about retries.
//!
//! Guarantees: a denial has the shape of its API's errors, and a status at which the official client libraries do not retry what cannot
//! succeed. They retry at 408, 409, 429 and from 500 on, unless `x-should-retry` says otherwise. The denial sets this header as well.
//!
//! Non-goals: errors of providers, which pass unchanged.

use std::convert::Infallible;

use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};

use crate::{
    harness::body::{Body, boxed},
    policy::{
        decide::Denial,
        model::api::Api,
        remedy::{Again, Whose},
        rule::Rule,
    },
};

/// The header that the client libraries check first.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// Returns the reply for a denial.
pub(in crate::harness) fn refusal(api: Api, denial: &Denial) -> Response<Body> {
    refusal_as(api, denial, status(denial.rule))
}

/// Returns the reply for a denial, with this status.
pub(in crate::harness) fn refusal_as(api: Api, denial: &Denial, status: StatusCode) -> Response<Body> {
    let body = error(api, denial, status).to_string();
    let mut reply = Response::new(boxed(Full::from(body).map_err(|error: Infallible| match error {})));
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let (again, after) = match denial.rule.again() {
        Again::Never => ("false", None),
        Again::Soon => ("true", Some("1")),
        Again::Later => ("true", Some("5")),
    };
    headers.insert(SHOULD_RETRY, HeaderValue::from_static(again));
    if let Some(after) = after {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static(after));
    }
    if let Ok(rule) = HeaderValue::from_str(denial.rule.as_str()) {
        headers.insert(crate::wire::RULE, rule);
    }
    reply
}

/// Returns the status of a denial because of the method. A client that requests a WebSocket, as Codex does first, continues without one
/// only after 426. After 400 it gives up, and after other statuses it retries for half a minute.
pub(super) fn wrong_method(headers: &HeaderMap) -> StatusCode {
    if headers.contains_key(header::UPGRADE) { StatusCode::UPGRADE_REQUIRED } else { StatusCode::METHOD_NOT_ALLOWED }
}

/// Returns the status of a denial by a rule.
fn status(rule: Rule) -> StatusCode {
    match (rule.again(), rule.whose()) {
        (Again::Soon, _) => StatusCode::TOO_MANY_REQUESTS,
        (Again::Later, Whose::Upstream) => StatusCode::BAD_GATEWAY,
        (Again::Later, _) => StatusCode::SERVICE_UNAVAILABLE,
        (Again::Never, Whose::Agent) => StatusCode::BAD_REQUEST,
        (Again::Never, _) if rule.is_upstreams() => StatusCode::BAD_GATEWAY,
        (Again::Never, _) => StatusCode::FORBIDDEN,
    }
}

/// Returns the body of a denial, in the shape of the API's errors.
fn error(api: Api, denial: &Denial, status: StatusCode) -> Value {
    let (message, code) = (denial.told("call"), status.as_u16());
    match api {
        // Anthropic's client libraries let the provider hold a conversation unasked. After this error they send the whole conversation
        // instead.
        Api::Messages if member(denial) == Some("thread") => json!({
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": message,
                "details": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]},
            },
        }),
        Api::Messages | Api::CountTokens => json!({
            "type": "error",
            "error": {
                "type": match code {
                    400 => "invalid_request_error",
                    404 => "not_found_error",
                    413 => "request_too_large",
                    429 => "rate_limit_error",
                    500.. => "api_error",
                    _ => "permission_error",
                },
                "message": message,
            },
        }),
        _ => json!({
            "error": {
                "type": match code {
                    400 | 404 | 405 | 413 => "invalid_request_error",
                    429 => "rate_limit_exceeded",
                    500.. => "server_error",
                    _ => "belay_denied",
                },
                "code": denial.rule,
                "param": member(denial),
                "message": message,
            },
        }),
    }
}

/// Returns the member of the request that the reason names, if it names one.
fn member(denial: &Denial) -> Option<&str> {
    let is_about_one = matches!(denial.rule, Rule::ModelRequest);
    let named = denial.reason.split('`').nth(1).filter(|_| is_about_one)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '[' | ']' | '-');
    (!named.is_empty() && named.chars().all(plain)).then_some(named)
}

/// Returns the last event of a stream that has begun: the denial, as the API's own streams report an error.
pub(super) fn event(api: Api, denial: &Denial) -> String {
    let error = error(api, denial, status(denial.rule));
    match api {
        Api::Messages => format!("event: error\ndata: {error}\n\n"),
        Api::Responses => {
            let of = |name: &str| error.pointer(&format!("/error/{name}")).cloned().unwrap_or_default();
            let told = json!({"type": "error", "code": of("code"), "message": of("message"), "param": of("param")});
            format!("event: error\ndata: {told}\n\n")
        }
        _ => format!("data: {error}\n\n"),
    }
}

#[cfg(test)]
mod tests;
