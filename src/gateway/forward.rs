//! One HTTP request to an upstream, and its reply back as it comes.
//!
//! Promises: the upstream sees the method, path, body and end-to-end headers of the caller, the host that was matched, and the
//! credential that the pack gives; the caller sees the reply as it streams, redirects among it. Refuses: hop-by-hop
//! headers and ours in either direction, upgrades, and following redirects: the harness asks anew, and is judged anew.

use std::{net::SocketAddr, time::Duration};

use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, Uri, Version,
    header::{
        AUTHORIZATION, CONNECTION, CONTENT_LENGTH, EXPECT, HOST, PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING,
        UPGRADE,
    },
};
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Incoming};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    authorize::Target,
    body::{BoxError, Guarded, ReplyBody},
    credentials::{self, Injected},
    dial::Dialer,
    refusal::Refused,
};
use crate::{policy::rule::Rule, wire};

/// From the request to the head of the reply: a model that does not stream thinks for minutes.
const HEAD: Duration = Duration::from_secs(300);
/// Between two pieces of a body, either way: a model that streams pauses, and sends no keep-alive while it does.
const IDLE: Duration = Duration::from_secs(300);
/// Bytes of a request: prompts with pictures in them.
const LARGEST_REQUEST: usize = 64 << 20;
/// Bytes of a reply's head.
const LARGEST_HEAD: usize = 64 << 10;

/// Headers of one hop, RFC 9110 7.6.1, and those by which proxies talk.
const HOP_BY_HOP: &[HeaderName] = &[CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, EXPECT];

/// Sends a request to its target. `keep` lives as long as the reply does.
///
/// # Errors
/// [`Rule::EgressAddress`], and upstream rules.
pub async fn forward<K: Send + Unpin + 'static>(
    dialer: &Dialer,
    target: &Target,
    credential: Option<Injected>,
    request: Request<Incoming>,
    keep: K,
) -> Result<Response<ReplyBody>, Refused> {
    if request.body().size_hint().lower() > LARGEST_REQUEST as u64 {
        return Err(Refused::malformed(format!("expected a body of at most {LARGEST_REQUEST} bytes")));
    }
    let (stream, address) = dialer.dial(&target.authority).await?;
    if target.secure {
        let stream = dialer.secure(&target.authority.host, stream).await?;
        exchange(stream, address, target, credential, request, keep).await
    } else {
        exchange(stream, address, target, credential, request, keep).await
    }
}

async fn exchange<S, K>(
    stream: S,
    address: SocketAddr,
    target: &Target,
    credential: Option<Injected>,
    request: Request<Incoming>,
    keep: K,
) -> Result<Response<ReplyBody>, Refused>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    K: Send + Unpin + 'static,
{
    let failed =
        |cause: &str| Refused::upstream(Rule::UpstreamReply, format!("{} at {address} {cause}", target.authority));
    let handshake =
        hyper::client::conn::http1::Builder::new().max_buf_size(LARGEST_HEAD).handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|e| failed(&format!("broke off: {e}")))?;
    // It ends with the exchange: when the reply is over, or nobody wants it any more.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "an upstream connection ended with an error");
        }
    });
    let (request, secret) = outgoing(target, credential, request)?;
    let reply = match tokio::time::timeout(HEAD, sender.send_request(request)).await {
        Ok(Ok(reply)) => reply,
        Ok(Err(error)) => return Err(failed(&format!("gave no reply: {}", chain(&error)))),
        Err(_) => return Err(failed(&format!("gave no reply in {HEAD:?}"))),
    };
    Ok(incoming(reply, address, secret.as_deref(), keep))
}

/// The request as the upstream gets it, and the secret in it.
fn outgoing(
    target: &Target,
    credential: Option<Injected>,
    request: Request<Incoming>,
) -> Result<(Request<ReplyBody>, Option<Vec<u8>>), Refused> {
    let (mut parts, body) = request.into_parts();
    parts.version = Version::HTTP_11;
    parts.uri = Uri::from(target.path.clone());
    strip(&mut parts.headers);
    let host = HeaderValue::try_from(target.host_header()).map_err(|e| Refused::malformed(e.to_string()))?;
    parts.headers.insert(HOST, host);
    let secret = credential.map(|credential| credential.inject(&mut parts.headers));
    parts.extensions.clear();
    let body = Guarded::new(Limited::new(body, LARGEST_REQUEST), IDLE, ());
    Ok((Request::from_parts(parts, body.boxed_unsync()), secret))
}

/// The reply as the caller gets it.
fn incoming<K: Send + Unpin + 'static>(
    reply: Response<Incoming>,
    address: SocketAddr,
    secret: Option<&[u8]>,
    keep: K,
) -> Response<ReplyBody> {
    let (mut parts, body) = reply.into_parts();
    parts.version = Version::HTTP_11;
    parts.extensions.clear();
    strip(&mut parts.headers);
    if let Some(secret) = secret {
        credentials::scrub(&mut parts.headers, secret);
    }
    // An address is always a header value.
    if let Ok(address) = HeaderValue::try_from(address.to_string()) {
        parts.headers.insert(wire::UPSTREAM, address);
    }
    let body = Guarded::new(body, IDLE, keep);
    Response::from_parts(parts, body.boxed_unsync())
}

/// Drops what belongs to one hop, and what is between harness and gateway.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // The length frames the body: nobody may have it dropped.
        .filter(|name| *name != CONTENT_LENGTH)
        .collect();
    let ours: Vec<HeaderName> = headers
        .keys()
        .filter(|name| {
            let name = name.as_str();
            name.starts_with("belay-") || name.starts_with("proxy-") || name == "keep-alive"
        })
        .cloned()
        .collect();
    for name in named.iter().chain(&ours).chain(HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// Takes the gateway's token out of a request: from `proxy-authorization`, or else from `authorization`, so that a caller
/// which uses the former can have an `authorization` of its own for the upstream.
///
/// # Errors
/// [`Rule::IdentityToken`] without exactly one bearer token.
pub fn take_token(headers: &mut HeaderMap) -> Result<String, Refused> {
    let refused = || {
        Refused::denied(
            Rule::IdentityToken,
            "expected one `authorization: Bearer <token>` (or `proxy-authorization`), with the pod's projected token",
        )
    };
    let name = if headers.contains_key(PROXY_AUTHORIZATION) { PROXY_AUTHORIZATION } else { AUTHORIZATION };
    let mut values = headers.get_all(&name).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return Err(refused()) };
    let value = value.to_str().map_err(|_| refused())?;
    let (scheme, token) = value.split_once(' ').ok_or_else(refused)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(refused());
    }
    let token = token.trim().to_owned();
    headers.remove(name);
    Ok(token)
}

/// An error and what caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string);
    causes.collect::<Vec<_>>().join(": ")
}

/// Reads a whole body of ours.
///
/// # Errors
/// [`Rule::Request`] if it is too long, too slow or breaks off.
pub async fn whole(body: Incoming, most: usize, time: Duration) -> Result<bytes::Bytes, Refused> {
    let read = tokio::time::timeout(time, Limited::new(body, most).collect()).await;
    match read {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) => {
            let error: BoxError = error;
            Err(Refused::malformed(format!("expected a body of at most {most} bytes: {error}")))
        }
        Err(_) => Err(Refused::malformed(format!("expected the whole body within {time:?}"))),
    }
}

#[cfg(test)]
mod tests;
