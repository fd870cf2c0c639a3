//! Refusals, as the client libraries of each API show them to people.

use std::convert::Infallible;

use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};

use crate::{
    harness::body::{Body, boxed},
    policy::{decide::Denial, model::api::Api},
};

/// A refusal in the shape that the API's client libraries show to people. Always 403: they do not try that again.
pub(in crate::harness) fn refusal(api: Api, denial: &Denial) -> Response<Body> {
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
