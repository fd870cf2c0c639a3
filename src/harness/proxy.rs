//! The agent's own traffic, as an HTTP proxy: `CONNECT` tunnels and absolute-form requests.
//!
//! The class's list is asked here, so that what is refused leaves no intent behind, and asked again by the gateway, which
//! has the last word and is the only one to resolve the name.

use std::{convert::Infallible, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio_util::io::{InspectReader, InspectWriter};

use super::{
    body::{Body, boxed},
    gate::{Call, Gate, Settlement},
    link::Peer,
};
use crate::{
    evidence::record::{Channel, Effect},
    policy::{
        budget::Spent,
        config::{EgressUse, Sensitivity},
        decide::Denial,
        egress,
        hostname::Authority,
        rule::Rule,
        shorten::shorten,
    },
};

/// Longest body of an absolute-form request. Larger ones can go through a tunnel.
const LONGEST_REQUEST: usize = 16 << 20;

/// Opens a tunnel.
pub async fn connect(gate: Arc<Gate>, request: Request<Incoming>) -> Response<Body> {
    let target = request.uri().authority().map(ToString::to_string).unwrap_or_default();
    let permit = match permit(&gate, &target, request.headers(), (None, 0)).await {
        Ok(permit) => permit,
        Err(denial) => return refuse(&gate, &target, denial).await,
    };
    let (authority, permit) = permit;
    let (mut upstream, address) = match gate.link().tunnel(permit.intent, &authority).await {
        Ok(tunnel) => tunnel,
        Err(undelivered) => {
            let denial = undelivered.denial;
            permit.settle(Settlement { upstream: undelivered.upstream, ..Settlement::not_applied(denial.rule) });
            return refusal(&denial);
        }
    };
    tokio::spawn(async move {
        let (mut sent, mut received) = (0_u64, 0_u64);
        let over = match hyper::upgrade::on(request).await {
            Ok(agent) => {
                let counted = InspectReader::new(TokioIo::new(&mut upstream), |bytes| received += length(bytes));
                let mut upstream = InspectWriter::new(counted, |bytes| sent += length(bytes));
                tokio::io::copy_bidirectional(&mut TokioIo::new(agent), &mut upstream).await.map(drop)
            }
            Err(error) => Err(std::io::Error::other(error)),
        };
        // Agents that reset what they are done with are common. What they sent was answered, or is in doubt.
        let effect = match (over, sent, received) {
            (Ok(()), ..) | (Err(_), _, 1..) => Effect::Applied,
            (Err(_), 0, 0) => Effect::NotApplied,
            (Err(_), 1.., 0) => Effect::Unknown,
        };
        permit.settle(Settlement {
            effect,
            rule: None,
            status: 200,
            response_digest: None,
            response_bytes: received,
            spent: None,
            upstream: address,
            sensitivity: Sensitivity::default(),
            undone_by: None,
        });
    });
    Response::new(boxed(Empty::new().map_err(|error: Infallible| match error {})))
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// Sends one absolute-form request, which is plain HTTP by definition.
pub async fn forward(gate: Arc<Gate>, request: Request<Incoming>) -> Response<Body> {
    let uri = request.uri().clone();
    let target = uri.authority().map(ToString::to_string).unwrap_or_default();
    let target = if uri.port().is_some() { target } else { format!("{target}:80") };
    if uri.scheme_str() != Some("http") {
        let denial = Denial {
            rule: Rule::Request,
            reason: format!("expected http:// in an absolute-form request, found {:?}; use CONNECT", uri.scheme_str()),
        };
        return refuse(&gate, &target, denial).await;
    }
    let (parts, body) = request.into_parts();
    let body = match Limited::new(body, LONGEST_REQUEST).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => {
            let denial = Denial { rule: Rule::Request, reason: format!("the request cannot be read: {error}") };
            return refuse(&gate, &target, denial).await;
        }
    };
    let digest = gate.salt().bytes(&body);
    let (_, permit) = match permit(&gate, &target, &parts.headers, (Some(digest), body.len())).await {
        Ok(permit) => permit,
        Err(denial) => return refuse(&gate, &target, denial).await,
    };
    let mut outgoing = Request::new(body);
    *outgoing.method_mut() = parts.method;
    *outgoing.headers_mut() = parts.headers;
    for hop in [
        header::CONNECTION,
        header::HOST,
        header::PROXY_AUTHORIZATION,
        header::TRANSFER_ENCODING,
        header::CONTENT_LENGTH,
        header::UPGRADE,
        HeaderName::from_static("proxy-connection"),
    ] {
        outgoing.headers_mut().remove(hop);
    }
    // Names of ours are ours alone.
    let ours: Vec<HeaderName> =
        outgoing.headers().keys().filter(|name| name.as_str().starts_with("belay-")).cloned().collect();
    for name in ours {
        outgoing.headers_mut().remove(name);
    }
    match gate.link().forward(Channel::Egress, permit.intent, &uri.to_string(), outgoing).await {
        Ok(reply) => {
            let status = reply.status();
            let (mut parts, body) = reply.into_parts();
            let upstream = Peer::taken(&mut parts.headers);
            permit.settle(Settlement {
                effect: Effect::Applied,
                rule: None,
                status: status.as_u16(),
                response_digest: None,
                response_bytes: hyper::body::Body::size_hint(&body).exact().unwrap_or(0),
                spent: None,
                upstream,
                sensitivity: Sensitivity::default(),
                undone_by: None,
            });
            Response::from_parts(parts, boxed(body.map_err(Into::into)))
        }
        Err(undelivered) => {
            let denial = undelivered.denial;
            let settlement = if undelivered.certain {
                Settlement::not_applied(denial.rule)
            } else {
                Settlement::unknown(Some(denial.rule))
            };
            permit.settle(Settlement { upstream: undelivered.upstream, ..settlement });
            refusal(&denial)
        }
    }
}

async fn permit(
    gate: &Arc<Gate>,
    target: &str,
    headers: &HeaderMap,
    (digest, bytes): (Option<String>, usize),
) -> Result<(String, super::gate::Permit), Denial> {
    gate.open()?;
    let authority = Authority::parse(target, None).map_err(|error| Denial {
        rule: Rule::EgressHost,
        reason: format!("expected host:port, found {:?}: {error}", shorten(target)),
    })?;
    egress::allow(&gate.contracts().policy().egress, &authority, EgressUse::Direct)
        .map_err(|denied| Denial { rule: denied.rule, reason: denied.reason })?;
    if !authority.fits(headers.get_all(header::HOST).iter().map(HeaderValue::as_bytes)) {
        let reason = format!("expected one Host, {}, which the request is for; found another", shorten(target));
        return Err(Denial { rule: Rule::Request, reason });
    }
    let target = authority.to_string();
    let permit = gate
        .permit(Call {
            channel: Channel::Egress,
            target: gate.redactor().authority(&authority, gate.salt()),
            effect: None,
            definition: None,
            request_digest: digest,
            request_bytes: u64::try_from(bytes).unwrap_or(u64::MAX),
            key: None,
            approvals: vec![],
            because: vec![],
            undoes: None,
            judged: None,
            rules: vec![Rule::EgressHost, Rule::EgressPort, Rule::EgressDirect],
            model: None,
            reserve: Spent::default(),
        })
        .await?;
    Ok((target, permit))
}

async fn refuse(gate: &Gate, target: &str, denial: Denial) -> Response<Body> {
    refusal(&gate.deny(Channel::Egress, target, None, denial).await)
}

fn refusal(denial: &Denial) -> Response<Body> {
    let text = format!("Belay refused this connection. rule: {}. {}\n", denial.rule, denial.reason);
    let mut reply = Response::new(boxed(Full::from(text).map_err(|error: Infallible| match error {})));
    *reply.status_mut() = StatusCode::FORBIDDEN;
    if let Ok(rule) = http::HeaderValue::from_str(denial.rule.as_str()) {
        reply.headers_mut().insert(crate::wire::RULE, rule);
    }
    reply
}
