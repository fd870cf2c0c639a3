//! The agent's own traffic, through an HTTP proxy: `CONNECT` tunnels and absolute-form requests.
//!
//! The class's list of egress hosts is checked here, so that a denied call leaves no intent behind. The gateway checks it again. Its
//! decision is final, and only the gateway resolves the name.
//!
//! Guarantees: whatever harness or gateway denies, before a tunnel is open or because of its first bytes, is in the log with its rule and
//! counts as a denial, and the first line of the reply says why. The bytes that were sent and received are known: of a tunnel from its
//! outcome, of a request including its URL and headers. Non-goals: knowing what is in a tunnel.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};

use super::{
    body::{Body, BodyError, boxed},
    gate::{Call, Gate, Permit, Settlement},
    gateway_client::{Carried, DeliveryError, Peer, Tunnel},
};
use crate::{
    evidence::record::{CallOutcome, Channel},
    policy::{
        budget::Spent, config::EgressUse, decide::Denial, egress, hostname::Authority, rule::Rule, shorten::shorten,
    },
    wire,
};

/// The size of a piece of a tunnel that is passed on, in bytes.
const PIECE: usize = 16 << 10;
/// The longest reason in a reply's first line, in characters.
const LONGEST_PHRASE: usize = 200;
/// The first byte of a TLS connection.
const TLS_HANDSHAKE: u8 = 0x16;
/// The fatal TLS alert `access_denied`.
const ACCESS_DENIED: [u8; 7] = [0x15, 3, 1, 0, 2, 2, 49];

/// Opens a tunnel.
pub async fn connect(gate: Arc<Gate>, request: Request<Incoming>) -> Response<Body> {
    let target = request.uri().authority().map(ToString::to_string).unwrap_or_default();
    let permit = match permit(&gate, &target, request.headers(), (None, 0)).await {
        Ok(permit) => permit,
        Err(denial) => return refuse(&gate, &target, denial).await,
    };
    let (authority, permit) = permit;
    let tunnel = match gate.link().tunnel(permit.intent, &authority).await {
        Ok(tunnel) => tunnel,
        Err(undelivered) => return refusal(&undone(&gate, permit, &authority, undelivered).await),
    };
    tokio::spawn(carry(gate, permit, authority, request, tunnel));
    Response::new(boxed(Empty::new().map_err(|error: Infallible| match error {})))
}

/// The reason why a tunnel ended before both sides were done.
enum End {
    /// One side broke off.
    Broken(std::io::Error),
    /// Nothing was passed on, and the gateway did not say why.
    Unsaid,
    /// Nothing was passed on, because of this denial.
    Refused(Denial),
}

/// Carries a tunnel after the `200`. A denial by the gateway is recorded and counted like any other.
async fn carry(gate: Arc<Gate>, permit: Permit, target: String, request: Request<Incoming>, tunnel: Tunnel) {
    let Tunnel { stream, upstream, tells } = tunnel;
    let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));
    let over = match hyper::upgrade::on(request).await {
        Ok(agent) => through(TokioIo::new(agent), TokioIo::new(stream), tells, (&sent, &received)).await,
        Err(error) => Err(End::Broken(std::io::Error::other(error))),
    };
    let (sent, received) = (sent.into_inner(), received.into_inner());
    let ended = |outcome| Settlement {
        outcome,
        status: 200,
        response_bytes: received,
        sent_bytes: Some(sent),
        spent: Some(Spent::default()),
        upstream: upstream.clone(),
        ..Settlement::unknown(None)
    };
    let nothing = Settlement { status: 0, sent_bytes: Some(0), ..ended(CallOutcome::NotApplied) };
    // Agents often reset connections that they are done with. What they sent was answered, or its outcome is unknown.
    match over {
        Ok(()) => permit.settle(ended(CallOutcome::Applied)),
        Err(End::Broken(error)) => {
            tracing::debug!(%error, "a tunnel broke off");
            permit.settle(ended(match (sent, received) {
                (_, 1..) => CallOutcome::Applied,
                (0, 0) => CallOutcome::NotApplied,
                (1.., 0) => CallOutcome::Unknown,
            }));
        }
        Err(End::Unsaid) => permit.settle(Settlement { rule: (sent > 0).then_some(Rule::UpstreamConnect), ..nothing }),
        Err(End::Refused(denial)) => {
            permit.settle(Settlement { rule: Some(denial.rule), ..nothing });
            gate.deny(Channel::Egress, &target, None, denial).await;
        }
    }
}

/// Passes bytes both ways, once the gateway allows it.
async fn through(
    agent: impl AsyncRead + AsyncWrite,
    gateway: impl AsyncRead + AsyncWrite,
    tells: bool,
    (sent, received): (&AtomicU64, &AtomicU64),
) -> Result<(), End> {
    let (agent_reads, mut agent_writes) = tokio::io::split(agent);
    let (gateway_reads, gateway_writes) = tokio::io::split(gateway);
    let (mut gateway_reads, first) = (BufReader::with_capacity(PIECE, gateway_reads), AtomicU8::new(0));
    let open = AtomicBool::new(!tells);
    let up = async {
        let over = pump(agent_reads, gateway_writes, sent, Some(&first)).await;
        if over.is_err() && !open.load(Ordering::Relaxed) {
            // The gateway's verdict is still to come.
            std::future::pending::<()>().await;
        }
        over.map_err(End::Broken)
    };
    let down = async {
        if tells {
            verdict(&mut gateway_reads).await?;
            open.store(true, Ordering::Relaxed);
        }
        pump(gateway_reads, &mut agent_writes, received, None).await.map_err(End::Broken)
    };
    let over = tokio::try_join!(up, down).map(|_| ());
    if matches!(over, Err(End::Refused(_))) && first.load(Ordering::Relaxed) == TLS_HANDSHAKE {
        // The agent's TLS library shows this alert as `access denied`. The agent already has its 200 and reads no other reply.
        let _ = agent_writes.write_all(&ACCESS_DENIED).await;
        let _ = agent_writes.shutdown().await;
    }
    over
}

/// Reads the gateway's verdict on a tunnel's first bytes.
async fn verdict(gateway: &mut (impl AsyncBufRead + Unpin)) -> Result<(), End> {
    let mut line = Vec::new();
    let _ = gateway.take(length(wire::LONGEST_WORD)).read_until(b'\n', &mut line).await;
    match line.as_slice() {
        b"\n" => Ok(()),
        line => match serde_json::from_slice::<wire::Refusal>(line) {
            Ok(refusal) => Err(End::Refused(Denial { rule: refusal.rule, reason: refusal.reason })),
            Err(_) => Err(End::Unsaid),
        },
    }
}

/// Passes bytes on until there are no more, and then shuts the other side down. Counts the bytes and stores the first one.
async fn pump(
    reads: impl AsyncRead,
    writes: impl AsyncWrite,
    counter: &AtomicU64,
    first: Option<&AtomicU8>,
) -> std::io::Result<()> {
    futures::pin_mut!(reads, writes);
    let mut piece = vec![0; PIECE];
    let over = loop {
        let read = match reads.read(&mut piece).await {
            Ok(read) => read,
            Err(error) => break Err(error),
        };
        let Some(new @ [byte, ..]) = piece.get(..read) else { break Ok(()) };
        if let Some(first) = first.filter(|_| counter.load(Ordering::Relaxed) == 0) {
            first.store(*byte, Ordering::Relaxed);
        }
        writes.write_all(new).await?;
        writes.flush().await?;
        counter.fetch_add(length(read), Ordering::Relaxed);
    };
    // The other side may still have something to send.
    writes.shutdown().await.and(over)
}

fn length(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Records a call that was not made or has an unknown outcome, and returns the reason. A denial by the gateway's egress rules counts like a
/// denial by the harness.
async fn undone(gate: &Gate, permit: Permit, target: &str, undelivered: DeliveryError) -> Denial {
    let DeliveryError { denial, certain, upstream } = undelivered;
    let settlement =
        if certain { Settlement::not_applied(denial.rule) } else { Settlement::unknown(Some(denial.rule)) };
    permit.settle(Settlement { upstream, ..settlement });
    match denial.rule {
        Rule::EgressHost | Rule::EgressPort | Rule::EgressAddress | Rule::EgressDirect => {
            gate.deny(Channel::Egress, target, None, denial).await
        }
        _ => denial,
    }
}

/// A reply on its way to the agent. It is settled at its end or when it is given up.
struct Passing {
    body: Carried,
    permit: Option<Permit>,
    settlement: Settlement,
    hasher: Sha256,
}

impl Passing {
    fn settle(&mut self) {
        let Some(permit) = self.permit.take() else { return };
        let response_commitment = Some(permit.salt().digested(&self.hasher.clone().finalize().into()));
        permit.settle(Settlement { response_commitment, ..self.settlement.clone() });
    }
}

impl hyper::body::Body for Passing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = std::task::ready!(Pin::new(&mut self.body).poll_frame(context));
        match &polled {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.hasher.update(data);
                    let bytes = self.settlement.response_bytes.saturating_add(length(data.len()));
                    self.settlement.response_bytes = bytes;
                }
            }
            Some(Err(_)) => {
                self.settlement.rule = Some(Rule::UpstreamReply);
                self.settle();
            }
            None => self.settle(),
        }
        Poll::Ready(polled.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        self.settle();
    }
}

/// Returns the number of bytes of headers, as HTTP/1.1 writes them.
fn of_headers(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len().saturating_add(value.len()).saturating_add(4)).sum()
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
    let (body, _place) = match gate.room().read(body, wire::LONGEST_REQUEST).await {
        Ok(read) => read,
        Err(unread) => {
            let denial = Denial { rule: Rule::Request, reason: format!("{unread}; larger ones go through a tunnel") };
            return refuse(&gate, &target, denial).await;
        }
    };
    let silence = gate.contracts().policy().silence();
    let digest = gate.salt().bytes(&body);
    // The URL and the headers leave the pod as well, so they count.
    let line = parts.method.as_str().len().saturating_add(uri.to_string().len()).saturating_add(" HTTP/1.1\r\n ".len());
    let bytes = line.saturating_add(of_headers(&parts.headers)).saturating_add(body.len());
    let (authority, permit) = match permit(&gate, &target, &parts.headers, (Some(digest), bytes)).await {
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
    // Header names that begin with `belay-` are reserved for Belay.
    let ours: Vec<HeaderName> =
        outgoing.headers().keys().filter(|name| name.as_str().starts_with("belay-")).cloned().collect();
    for name in ours {
        outgoing.headers_mut().remove(name);
    }
    match gate.link().forward((Channel::Egress, permit.intent), &uri.to_string(), outgoing, silence).await {
        Ok(reply) => {
            let status = reply.status();
            let (mut parts, body) = reply.into_parts();
            let upstream = Peer::taken(&mut parts.headers);
            let settlement = Settlement {
                outcome: CallOutcome::Applied,
                status: status.as_u16(),
                response_bytes: length(of_headers(&parts.headers)),
                spent: Some(Spent::default()),
                upstream,
                ..Settlement::unknown(None)
            };
            let passing = Passing { body, permit: Some(permit), settlement, hasher: Sha256::new() };
            Response::from_parts(parts, boxed(passing))
        }
        Err(undelivered) => refusal(&undone(&gate, permit, &authority, undelivered).await),
    }
}

async fn permit(
    gate: &Arc<Gate>,
    target: &str,
    headers: &HeaderMap,
    (digest, bytes): (Option<String>, usize),
) -> Result<(String, Permit), Denial> {
    gate.open()?;
    let policy = gate.contracts().policy();
    let authority = Authority::parse(target, None).map_err(|error| {
        let ignored = egress::uncounted_address(&policy.ignored_hosts, target);
        ignored.map_or_else(
            || Denial {
                rule: Rule::EgressHost,
                reason: format!("expected host:port, found {:?}: {error}", shorten(target)),
            },
            |denied| Denial { rule: denied.rule, reason: denied.reason },
        )
    })?;
    egress::allow(&policy.egress, &authority, EgressUse::Direct).map_err(|denied| {
        let denied = egress::uncounted(denied, &policy.ignored_hosts, &authority);
        Denial { rule: denied.rule, reason: denied.reason }
    })?;
    if !authority.fits(headers.get_all(header::HOST).iter().map(HeaderValue::as_bytes)) {
        let reason = format!("expected one Host, {}, which the request is for; found another", shorten(target));
        return Err(Denial { rule: Rule::Request, reason });
    }
    let target = authority.to_string();
    let permit = gate
        .permit(Call {
            channel: Channel::Egress,
            target: gate.redactor().authority(&authority, gate.salt()),
            side_effect: None,
            definition: None,
            request_commitment: digest,
            request_bytes: u64::try_from(bytes).unwrap_or(u64::MAX),
            key: None,
            approvals: vec![],
            reasons: vec![],
            compensates: None,
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
    let text = format!("{}\n", denial.told("connection"));
    let mut reply = Response::new(boxed(Full::from(text).map_err(|error: Infallible| match error {})));
    *reply.status_mut() = StatusCode::FORBIDDEN;
    // Most clients show only the first line of the reply to CONNECT.
    let phrase: String = format!("Belay denied: {}: {}", denial.rule, denial.reason)
        .chars()
        .take(LONGEST_PHRASE)
        .map(|c| if matches!(c, ' '..='~') { c } else { '?' })
        .collect();
    if let Ok(phrase) = hyper::ext::ReasonPhrase::try_from(phrase) {
        reply.extensions_mut().insert(phrase);
    }
    if let Ok(rule) = http::HeaderValue::from_str(denial.rule.as_str()) {
        reply.headers_mut().insert(wire::RULE, rule);
    }
    reply
}
