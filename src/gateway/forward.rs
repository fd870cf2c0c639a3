//! One HTTP request to an upstream, and its reply, which streams back.
//!
//! Guarantees: the upstream gets the caller's method, path, body and end-to-end headers, the host that was matched, and the pack's
//! credential. The caller gets the reply as it streams, including redirects. A reply to a request with a credential is searched for the
//! credential first, head and body, and is withheld if it cannot be searched.
//!
//! Non-goals: hop-by-hop headers and Belay's own headers in either direction, trailers, upgrades, following redirects
//! (see [`redirect`](super::redirect)), and sending anything twice. If a pooled connection turns out to have ended, the request is sent
//! over a new one only if nothing of it was written.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, Version,
    header::{
        ACCEPT_ENCODING, AUTHORIZATION, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HOST,
        PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
    },
};
use http_body_util::{BodyExt, BodyStream, Limited, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    authorize::Target,
    body::{Alarm, BoxError, Guarded, RepeatedError, ReplyBody, Watched, full},
    credentials::{self, Injected},
    dial::Dialer,
    forms::Forms,
    pool::{Connection, Peer, Pool, Returned, Whole},
    refusal::Refused,
    unpack::{Packing, Unpacked},
};
use crate::{
    canonical,
    policy::{hostname::Authority, rule::Rule},
    wire,
};

/// Maximum bytes of a reply's head.
const LARGEST_HEAD: usize = 64 << 10;

/// Hop-by-hop headers (RFC 9110, section 7.6.1), and those that proxies use.
const HOP_BY_HOP: &[HeaderName] = &[CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, EXPECT];

/// First bytes of compressed files: gzip and Zstandard.
const COMPRESSED: [&[u8]; 2] = [b"\x1f\x8b", b"\x28\xb5\x2f\xfd"];

/// A credential for a request, and the callback for a reply that repeats it.
pub struct Lent {
    /// The credential.
    pub credential: Injected,
    /// The callback.
    pub alarm: Alarm,
}

/// What a reply is searched for.
struct Watch {
    forms: Arc<Forms>,
    alarm: Alarm,
}

/// How a request is sent and its reply is handled.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// How long the upstream may be silent: before the head of its reply, and between two pieces of a body in either direction. A model may
    /// think for minutes without sending a keep-alive.
    pub silence: Duration,
    /// Whether a compressed reply is decompressed, because its reader asked for a plain one and inspects it.
    pub unpacks: bool,
}

/// Sends a request to its target, over an idle connection of `pool` if there is one, or else over a new connection. `keep` lives as long as
/// the reply.
///
/// # Errors
/// Returns [`Rule::EgressAddress`] or an upstream rule.
pub async fn forward<K: Send + Unpin + 'static>(
    dialer: &Dialer,
    pool: Option<&Arc<Pool>>,
    target: &Target,
    lent: Option<Lent>,
    request: Request<ReplyBody>,
    (manner, keep): (Manner, K),
) -> Result<Response<ReplyBody>, Refused> {
    // Resolve and check for every request, so that a connection is reused only to an address that the name still has.
    let addresses = dialer.addresses(&target.authority).await?;
    let pool = pool.filter(|_| framed(&request));
    let (mut request, watch) = outgoing(target, lent, request, manner.silence)?;
    let how = (watch, manner);
    let started = Instant::now();
    while let Some(waiting) = pool.and_then(|pool| pool.take(&addresses, &target.authority.host, target.secure)) {
        match exchange(waiting, pool, target, request, (started, manner.silence)).await {
            Ok(Exchanged::Reply(reply, peer, returned)) => {
                return incoming(reply, (target, peer), how, returned, keep).await;
            }
            // The connection had ended meanwhile, and nothing of the request was sent.
            Ok(Exchanged::Unsent(unsent)) => request = unsent,
            Err(refused) => return Err(refused),
        }
    }
    let (stream, address) = dialer.connect(&target.authority.host, &addresses).await?;
    let connection = if target.secure {
        let stream = dialer.secure(&target.authority.host, stream).await?;
        let shown = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|chain| chain.first().map(|shown| canonical::sha256(shown)));
        handshake(stream, Peer { address, certificate: shown }, target).await?
    } else {
        handshake(stream, Peer { address, certificate: None }, target).await?
    };
    match exchange(connection, pool, target, request, (started, manner.silence)).await? {
        Exchanged::Reply(reply, peer, returned) => incoming(reply, (target, peer), how, returned, keep).await,
        Exchanged::Unsent(_) => Err(Refused::upstream(
            Rule::UpstreamConnect,
            format!("{} at {address} closed the connection before the request", target.authority),
        )),
    }
}

/// Returns whether all servers agree on where the request ends. A server that expects no body could take one for the next request over the
/// connection, which may be another caller's.
fn framed(request: &Request<ReplyBody>) -> bool {
    let usual = [Method::POST, Method::PUT, Method::PATCH].contains(request.method());
    let bodyless = [Method::GET, Method::HEAD, Method::DELETE].contains(request.method());
    usual || (bodyless && request.body().is_end_stream())
}

/// The result of a request over a connection.
enum Exchanged {
    Reply(Response<Incoming>, Peer, Option<Returned>),
    /// The connection had ended before anything of the request was sent.
    Unsent(Request<ReplyBody>),
}

async fn handshake<S>(stream: S, peer: Peer, target: &Target) -> Result<Connection, Refused>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let handshake =
        hyper::client::conn::http1::Builder::new().max_buf_size(LARGEST_HEAD).handshake(TokioIo::new(stream)).await;
    let (sender, connection) = handshake.map_err(|error| {
        Refused::upstream(Rule::UpstreamConnect, format!("{} at {} broke off: {error}", target.authority, peer.address))
    })?;
    // The connection ends when its sender is dropped or the upstream closes it.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "an upstream connection ended with an error");
        }
    });
    Ok(Connection::new(sender, peer))
}

async fn exchange(
    mut connection: Connection,
    pool: Option<&Arc<Pool>>,
    target: &Target,
    request: Request<ReplyBody>,
    (started, silence): (Instant, Duration),
) -> Result<Exchanged, Refused> {
    let peer = connection.peer;
    let failed = |cause: &str| {
        Refused::upstream(Rule::UpstreamReply, format!("{} at {} {cause}", target.authority, peer.address))
    };
    let left = silence.saturating_sub(started.elapsed());
    match tokio::time::timeout(left, connection.sender.try_send_request(request)).await {
        Ok(Ok(reply)) => {
            let returned = pool
                .filter(|_| Connection::is_shareable(reply.headers()))
                .map(|pool| Returned::new(pool.clone(), connection, &target.authority.host, target.secure, &reply));
            Ok(Exchanged::Reply(reply, peer, returned))
        }
        // hyper returns the request only if it has written nothing of it.
        Ok(Err(mut error)) => match error.take_message() {
            Some(unsent) => Ok(Exchanged::Unsent(unsent)),
            None => Err(failed(&format!("sent no reply: {}", chain(error.error())))),
        },
        Err(_) => {
            Err(failed(&format!("sent no reply in {silence:?}; the class sets that time in upstreamTimeoutSeconds")))
        }
    }
}

/// Returns the request for the upstream, and what its reply must be searched for.
fn outgoing(
    target: &Target,
    lent: Option<Lent>,
    request: Request<ReplyBody>,
    silence: Duration,
) -> Result<(Request<ReplyBody>, Option<Watch>), Refused> {
    let (mut parts, body) = request.into_parts();
    parts.version = Version::HTTP_11;
    parts.uri = Uri::from(target.path.clone());
    strip(&mut parts.headers);
    let host = HeaderValue::try_from(target.host_header()).map_err(|e| Refused::malformed(e.to_string()))?;
    parts.headers.insert(HOST, host);
    let watch = lent.map(|Lent { credential, alarm }| {
        // A reply with an unknown compression cannot be searched.
        parts.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        Watch { forms: credential.inject(&mut parts.headers), alarm }
    });
    parts.extensions.clear();
    let body = Guarded::new(body, silence, ());
    Ok((Request::from_parts(parts, body.boxed_unsync()), watch))
}

/// Returns the reply for the caller.
///
/// # Errors
/// Returns [`Rule::UpstreamSecret`] if it repeats the credential before any of it was passed on, or [`Rule::UpstreamReply`] if it cannot be
/// searched.
async fn incoming<K: Send + Unpin + 'static>(
    reply: Response<Incoming>,
    (target, peer): (&Target, Peer),
    (watch, manner): (Option<Watch>, Manner),
    returned: Option<Returned>,
    keep: K,
) -> Result<Response<ReplyBody>, Refused> {
    let (mut parts, body) = reply.into_parts();
    parts.version = Version::HTTP_11;
    // The extensions include the reason phrase of the status.
    parts.extensions.clear();
    let encodings = encodings(&parts.headers);
    strip(&mut parts.headers);
    let body = Guarded::new(Whole::new(body, returned), manner.silence, keep);
    let (encoding, body) = match encodings.as_slice() {
        [how] if manner.unpacks => match Packing::named(how) {
            Some(packing) => {
                parts.headers.remove(CONTENT_ENCODING);
                parts.headers.remove(CONTENT_LENGTH);
                (None, Unpacked::new(body, packing).boxed_unsync())
            }
            None => (Some(how.clone()), body.boxed_unsync()),
        },
        [] => (None, body.boxed_unsync()),
        several => (Some(several.join(", ")), body.boxed_unsync()),
    };
    let body = match watch {
        Some(watch) => watched(&mut parts.headers, (target, encoding), body, watch).await?,
        None => body.map_frame(|frame| Frame::data(frame.into_data().unwrap_or_default())).boxed_unsync(),
    };
    // An address is always a valid header value.
    if let Ok(address) = HeaderValue::try_from(peer.address.to_string()) {
        parts.headers.insert(wire::UPSTREAM, address);
    }
    if let Some(Ok(certificate)) = peer.certificate.map(|digest| HeaderValue::try_from(hex::encode(digest))) {
        parts.headers.insert(wire::CERTIFICATE, certificate);
    }
    Ok(Response::from_parts(parts, body))
}

/// Searches a reply's head, and wraps its body so that it is searched. Waits for the first piece of the body, unless it is an event stream:
/// most replies fit into one piece and are withheld as a whole.
async fn watched<B>(
    headers: &mut HeaderMap,
    (target, encoding): (&Target, Option<String>),
    body: B,
    Watch { forms, alarm }: Watch,
) -> Result<ReplyBody, Refused>
where
    B: Body<Data = bytes::Bytes, Error = BoxError> + Send + 'static,
{
    let host = &target.authority;
    let unreadable = |reason: String| Refused::upstream(Rule::UpstreamReply, reason);
    let compressed = |how: &str| {
        unreadable(format!(
            "expected a reply of {host} in gzip, deflate or no compression, found another ({how}), which cannot be searched for the \
             credential; the reply is withheld; make the upstream respect accept-encoding"
        ))
    };
    if let Some(how) = encoding {
        return Err(compressed(&how));
    }
    if credentials::repeated(headers, &forms) {
        alarm();
        return Err(repeats(host));
    }
    let events = headers.get(CONTENT_TYPE).is_some_and(|kind| {
        kind.as_bytes().get(..EVENTS.len()).is_some_and(|kind| kind.eq_ignore_ascii_case(EVENTS.as_bytes()))
    });
    let mut body = Watched::new(body, forms, events, alarm);
    if events {
        // It may end before its announced length.
        headers.remove(CONTENT_LENGTH);
        return Ok(body.boxed_unsync());
    }
    let first = match body.frame().await {
        None => return Ok(full("")),
        Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
        Some(Err(error)) if error.is::<RepeatedError>() => return Err(repeats(host)),
        Some(Err(error)) => {
            return Err(unreadable(format!("the reply of {host} broke off: {}", chain(error.as_ref()))));
        }
    };
    if COMPRESSED.iter().any(|start| first.starts_with(start)) {
        return Err(compressed("as its first bytes show"));
    }
    if body.is_end_stream() {
        return Ok(full(first));
    }
    let first = futures::stream::iter([Ok::<_, BoxError>(Frame::data(first))]);
    Ok(StreamBody::new(first.chain(BodyStream::new(body))).boxed_unsync())
}

/// The content type of an event stream.
const EVENTS: &str = "text/event-stream";

/// Returns the denial of a reply. The call itself may have taken effect.
fn repeats(host: &Authority) -> Refused {
    Refused::denied(
        Rule::UpstreamSecret,
        format!(
            "the reply of {host} repeats the credential of the request, and is withheld; it is unknown whether the call took effect"
        ),
    )
}

/// Returns the encodings of a reply, except those that leave it plain.
fn encodings(headers: &HeaderMap) -> Vec<String> {
    let encodings = |name: HeaderName| {
        let values: Vec<&HeaderValue> = headers.get_all(name).iter().collect();
        values.into_iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
    };
    let content = encodings(CONTENT_ENCODING).filter(|of| !of.trim_ascii().eq_ignore_ascii_case(b"identity"));
    let transfer = encodings(TRANSFER_ENCODING).filter(|of| !of.trim_ascii().eq_ignore_ascii_case(b"chunked"));
    let found = content.chain(transfer).filter(|of| !of.trim_ascii().is_empty());
    found.map(|of| crate::policy::shorten::shorten(&String::from_utf8_lossy(of.trim_ascii()))).collect()
}

/// Removes headers that belong to one hop, and those between harness and gateway.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // The length frames the body, so a peer must not have it removed.
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

/// Takes the gateway's token out of a request: from `proxy-authorization`, or else from `authorization`, so that a caller that uses the
/// former can send its own `authorization` to the upstream.
///
/// # Errors
/// Returns [`Rule::IdentityToken`] unless there is exactly one bearer token.
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

/// Returns the text of an error and of its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string);
    causes.collect::<Vec<_>>().join(": ")
}

/// Adapts a reply for a caller that used POST where the upstream's request had another method: a reply to HEAD has the length of a body
/// that is not sent.
pub fn as_reply_to_post<B>(mut reply: Response<B>) -> Response<B> {
    reply.headers_mut().remove(CONTENT_LENGTH);
    reply
}

/// Reads a whole request body.
///
/// # Errors
/// Returns [`Rule::Request`] if it is too long, too slow or incomplete.
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
