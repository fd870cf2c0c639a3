//! HTTP upstreams: sends one call and converts its reply into an MCP result.
//!
//! Guarantees: the harness sends the arguments that were decided on, and the gateway renders the request from them. A reply becomes
//! something that a model can read: JSON becomes structured content and text, other text becomes text, images and audio become MCP content.
//! A status of 400 or above becomes an error result that names the status. The outcome follows from the status: 2xx is applied, 4xx and a
//! redirect with 301, 307 or 308 are not applied, everything else is unknown. 408 and 499 are unknown, because proxies also send them while
//! the upstream is at work. A reply that breaks off or is not what it declares is unknown, too.
//!
//! Non-goals: redirects and other kinds of replies.

use std::sync::Arc;

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use rmcp::model::{CallToolResult, ContentBlock};
use serde_json::{Map, Value};

use super::{Prepared, Upstream, text};
use crate::{
    evidence::record::CallOutcome,
    harness::{
        bounds::{Bounds, late},
        gate::Settlement,
        gateway_client::{EndedError, GatewayClient, Peer},
    },
    policy::{
        config::{HttpUpstream, Tool},
        decide::Denial,
        rule::Rule,
        shorten::shorten,
        template::Request,
    },
};

/// The request's arguments, as JSON in its canonical form. The gateway renders the request from them.
pub struct Ready(Bytes);

/// The HTTP upstreams.
pub struct Http {
    link: Arc<GatewayClient>,
}

impl Http {
    /// Creates the upstreams at the other end of this link.
    pub fn new(link: Arc<GatewayClient>) -> Self {
        Self { link }
    }
}

impl Upstream for Http {
    type Ready = Ready;
    type Terms = HttpUpstream;

    async fn prepare(
        &self,
        tool: &Tool,
        http: &HttpUpstream,
        args: &Map<String, Value>,
        rules: &mut Vec<Rule>,
    ) -> Result<Prepared<Ready>, Denial> {
        let malformed = |error: &dyn std::fmt::Display| Denial { rule: Rule::ToolUrl, reason: error.to_string() };
        let request = Request::parse(http).map_err(|error| malformed(&error))?;
        rules.push(Rule::ToolUrl);
        // The gateway renders the request from the same arguments. Arguments that render no request are denied here.
        request.render(args)?;
        Ok(Prepared { ready: Ready(text(args)?.into()), side_effect: tool.side_effect, definition: None })
    }

    async fn call(
        &self,
        tool: &Tool,
        Ready(arguments): Ready,
        _: Map<String, Value>,
        intent: u64,
        bounds: Bounds,
    ) -> (Result<CallToolResult, Denial>, Settlement) {
        let mut settlement = Settlement::unknown(None);
        let exchange = exchange(&self.link, tool, arguments, intent, bounds, &mut settlement);
        let exchanged = tokio::time::timeout(bounds.time, exchange).await;
        let result = match exchanged {
            Ok(Ok(reply)) => result(tool, &reply).inspect_err(|denial| {
                // A body that is not what it declares may come from a call that did not end well.
                if denial.rule == Rule::UpstreamReply {
                    settlement.outcome = CallOutcome::Unknown;
                }
            }),
            Ok(Err(denial)) => Err(denial),
            Err(_) => {
                settlement.outcome = CallOutcome::Unknown;
                Err(late(tool, bounds.time, true))
            }
        };
        settlement.rule = result.as_ref().err().map(|denial| denial.rule);
        (result, settlement)
    }
}

/// A whole reply.
struct Reply {
    status: StatusCode,
    kind: Option<String>,
    body: Bytes,
}

async fn exchange(
    link: &GatewayClient,
    tool: &Tool,
    arguments: Bytes,
    intent: u64,
    bounds: Bounds,
    settlement: &mut Settlement,
) -> Result<Reply, Denial> {
    let reply = match link.call(intent, arguments, bounds.time).await {
        Ok(reply) => reply,
        Err(undelivered) => {
            if undelivered.certain {
                settlement.outcome = CallOutcome::NotApplied;
            }
            settlement.upstream = undelivered.upstream;
            return Err(undelivered.denial);
        }
    };
    let status = reply.status();
    settlement.status = status.as_u16();
    settlement.upstream = Peer::of(reply.headers());
    let kind = reply.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).map(str::to_owned);
    let by_status = match status.as_u16() {
        200..=299 => CallOutcome::Applied,
        408 | 499 => CallOutcome::Unknown,
        301 | 307 | 308 | 400..=499 => CallOutcome::NotApplied,
        _ => CallOutcome::Unknown,
    };
    match Limited::new(reply.into_body(), bounds.reply).collect().await {
        Ok(body) => {
            settlement.outcome = by_status;
            Ok(Reply { status, kind, body: body.to_bytes() })
        }
        Err(error) if error.is::<LengthLimitError>() => {
            settlement.outcome = by_status;
            Err(bounds.too_long(tool))
        }
        Err(error) => {
            let broke_off = || {
                let reason = format!("the reply of {} broke off: {error}", tool.name);
                Denial { rule: Rule::UpstreamReply, reason }
            };
            Err(EndedError::denial(error.as_ref()).unwrap_or_else(broke_off))
        }
    }
}

/// Converts a reply into an MCP result.
fn result(tool: &Tool, reply: &Reply) -> Result<CallToolResult, Denial> {
    let essence = reply.kind.as_deref().unwrap_or_default().split(';').next().unwrap_or_default();
    let essence = essence.trim().to_ascii_lowercase();
    let is_json = essence == "application/json" || essence.ends_with("+json");
    let line = format!("HTTP {}", reply.status);
    let broken = |reason: String| Denial { rule: Rule::UpstreamReply, reason };
    let parsed = || {
        serde_json::from_slice::<Value>(&reply.body)
            .map_err(|error| broken(format!("the reply of {} says that it is JSON, and is not: {error}", tool.name)))
    };
    if !reply.status.is_success() {
        let mut content = vec![ContentBlock::text(line)];
        match std::str::from_utf8(&reply.body) {
            Ok(text) if !text.is_empty() => content.push(ContentBlock::text(text)),
            _ => {}
        }
        return Ok(CallToolResult::error(content));
    }
    if reply.body.is_empty() {
        return Ok(CallToolResult::success(vec![ContentBlock::text(line)]));
    }
    if is_json {
        let value = parsed()?;
        // The text is written from the parsed value, so that text and structure cannot differ.
        let mut result = CallToolResult::success(vec![ContentBlock::text(value.to_string())]);
        // Clients before 2026-07-28 accept objects only.
        result.structured_content = Some(value).filter(Value::is_object);
        return Ok(result);
    }
    let is_text = essence.is_empty()
        || essence.starts_with("text/")
        || essence.ends_with("+xml")
        || ["application/xml", "application/yaml", "application/javascript"].contains(&essence.as_str());
    match std::str::from_utf8(&reply.body) {
        Ok(text) if is_text => return Ok(CallToolResult::success(vec![ContentBlock::text(text)])),
        _ => {}
    }
    let encoded = || BASE64_STANDARD.encode(&reply.body);
    if essence.starts_with("image/") {
        return Ok(CallToolResult::success(vec![ContentBlock::image(encoded(), essence)]));
    }
    if essence.starts_with("audio/") {
        return Ok(CallToolResult::success(vec![ContentBlock::audio(encoded(), essence)]));
    }
    Err(Denial {
        rule: Rule::ToolOutput,
        reason: format!(
            "{} was called and answered, but its reply is withheld: expected JSON, text, a picture or a sound, found {:?}. What the call \
             did stays done: do not repeat it",
            tool.name,
            shorten(&essence)
        ),
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::policy::{
        config::{HttpMethod, HttpUpstream, SideEffect, Upstream},
        decide::tests::policy as small,
    };

    fn tool() -> Tool {
        Tool {
            name: "t".into(),
            upstream: Upstream::Http(HttpUpstream {
                method: HttpMethod::Get,
                url: "http://a.test/".into(),
                query: vec![],
            }),
            input: json!({"type": "object"}),
            preconditions: vec![],
            side_effect: SideEffect::Read,
            ..small(vec![]).tools.remove(0)
        }
    }

    #[rstest]
    #[case::object(200, "application/json", b"{\"a\": 1}", Ok((false, json!([{"type":"text","text":"{\"a\":1}"}]), Some(json!({"a":1})))))]
    #[case::suffix(201, "application/problem+json; charset=utf-8", b"{}", Ok((false, json!([{"type":"text","text":"{}"}]), Some(json!({})))))]
    #[case::array(200, "application/json", b"[1]", Ok((false, json!([{"type":"text","text":"[1]"}]), None)))]
    #[case::not_json(200, "application/json", b"<html>", Err(Rule::UpstreamReply))]
    #[case::text(200, "text/plain", b"hello", Ok((false, json!([{"type":"text","text":"hello"}]), None)))]
    #[case::untyped(200, "", b"hello", Ok((false, json!([{"type":"text","text":"hello"}]), None)))]
    #[case::nothing(204, "", b"", Ok((false, json!([{"type":"text","text":"HTTP 204 No Content"}]), None)))]
    #[case::picture(200, "image/png", b"\x89P", Ok((false, json!([{"type":"image","data":"iVA=","mimeType":"image/png"}]), None)))]
    #[case::sound(200, "audio/wav", b"\x89P", Ok((false, json!([{"type":"audio","data":"iVA=","mimeType":"audio/wav"}]), None)))]
    #[case::binary(200, "application/zip", b"PK", Err(Rule::ToolOutput))]
    #[case::no_text(200, "text/plain", b"\xff\xfe", Err(Rule::ToolOutput))]
    #[case::refused(404, "application/json", b"{\"e\":1}", Ok((true, json!([{"type":"text","text":"HTTP 404 Not Found"},{"type":"text","text":"{\"e\":1}"}]), None)))]
    #[case::failed(500, "", b"", Ok((true, json!([{"type":"text","text":"HTTP 500 Internal Server Error"}]), None)))]
    #[case::redirect(302, "", b"", Ok((true, json!([{"type":"text","text":"HTTP 302 Found"}]), None)))]
    fn replies(
        #[case] status: u16,
        #[case] kind: &str,
        #[case] body: &'static [u8],
        #[case] expected: Result<(bool, Value, Option<Value>), Rule>,
    ) {
        let reply = Reply {
            status: StatusCode::from_u16(status).unwrap(),
            kind: Some(kind.into()).filter(|kind: &String| !kind.is_empty()),
            body: Bytes::from_static(body),
        };
        let found = result(&tool(), &reply)
            .map(|r| (r.is_error == Some(true), serde_json::to_value(&r.content).unwrap(), r.structured_content))
            .map_err(|denial| denial.rule);
        assert_eq!(found, expected);
    }
}
