//! The connection to the gateway: TLS to a fixed address under a fixed name, and the pod's token on every request.
//!
//! One HTTP/2 connection for all but tunnels, so that a call goes to the replica that has just witnessed its intent. Any other will
//! do as well, once the bucket has it.

/// Replies that the gateway carries.
mod reply;

use std::{
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, Uri,
    header::{AUTHORIZATION, CONTENT_TYPE, PROXY_AUTHORIZATION},
    request::Parts,
};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, upgrade::Upgraded};
use hyper_util::{
    client::legacy::{
        Client,
        connect::{Connected, Connection},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

pub use self::reply::{Carried, EndedError, withheld};
use crate::{
    evidence::{merkle::Hash, record::Channel},
    policy::{config::Wiring, decide::Denial, rule::Rule},
    wire::{
        self, AppendReply, AppendRequest, ApprovalAsk, ApprovalReply, Keep, KeepResult, Kept, KeptOf, KeptResult,
        OpenReply, OpenRequest, Refusal, Undo,
    },
};

/// How long it is tried to keep, or to get, arguments that undo a call.
const STATE_PATIENCE: Duration = Duration::from_secs(30);
/// How long a connection to the gateway may take: it is in the same cluster.
const CONNECT: Duration = Duration::from_secs(5);
/// Bytes of a reply's head, each header counted with 32 more: what the gateway takes from upstreams, and room for its own.
const LARGEST_HEAD: u32 = 128 << 10;
/// Between two pings of the gateway, and for its answer: a replica whose node is gone says nothing.
const PING: Duration = Duration::from_secs(5);
/// How long the gateway may take over a request about the log.
const LOG_REPLY: Duration = Duration::from_secs(30);
/// How much longer the gateway may take than the upstream: its word on what has become of the call is to be heard.
const WORD: Duration = Duration::from_secs(15);
/// How long a failing gateway is tried again before a call is given up: longer than a replica's restart takes to notice.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long a token read from its file is used: kubelet replaces it long before it expires.
const TOKEN_AGE: Duration = Duration::from_secs(30);
/// Longest reply to a request about the log, in which a task's idempotency keys are, and longest refusal.
const LONGEST_REPLY: usize = 2 << 20;

/// The link could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The address is not one.
    #[error("wiring.gateway: expected address:port, found {0:?}")]
    Address(String),
    /// The certificate authority is not one.
    #[error("wiring.gatewayCa: expected PEM certificates: {0}")]
    Authority(String),
    /// TLS could not be configured.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// A request that brought no result.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// The gateway answered no.
    #[error("{}: {}", .0.rule, .0.reason)]
    Refused(Denial),
    /// No answer.
    #[error("the gateway cannot be reached: {0}")]
    Unreachable(String),
}

/// How a forwarded request ended without a reply from the upstream.
#[derive(Clone, Debug)]
pub struct Undelivered {
    /// Why.
    pub denial: Denial,
    /// Whether it is certain that the upstream did not get it.
    pub certain: bool,
    /// Who was dialled, if somebody was.
    pub upstream: Option<Peer>,
}

/// A tunnel that the gateway has opened.
pub struct Tunnel {
    /// What goes through it.
    pub stream: Upgraded,
    /// Who was dialled.
    pub upstream: Option<Peer>,
    /// Whether the gateway says first whether it lets anything through: see [`wire::OPENING`].
    pub tells: bool,
}

/// A connection to the gateway.
pub struct Link {
    address: std::net::SocketAddr,
    tls: TlsConnector,
    client: Client<Dialer, Full<Bytes>>,
    token: PathBuf,
    cached: Mutex<Option<(Instant, HeaderValue)>>,
}

impl Link {
    /// A link by this wiring. Nothing is dialled yet.
    ///
    /// # Errors
    /// If the wiring is malformed.
    pub fn new(wiring: &Wiring, token: PathBuf) -> Result<Self, LinkError> {
        let address = wiring.gateway.parse().map_err(|_| LinkError::Address(wiring.gateway.clone()))?;
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(wiring.gateway_ca.as_bytes()) {
            let certificate = certificate.map_err(|error| LinkError::Authority(error.to_string()))?;
            roots.add(certificate).map_err(|error| LinkError::Authority(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(LinkError::Authority("none found".into()));
        }
        let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let tls = TlsConnector::from(Arc::new(config.clone()));
        let dialer = {
            let mut http2 = config;
            http2.alpn_protocols = vec![b"h2".to_vec()];
            Dialer { address, tls: TlsConnector::from(Arc::new(http2)) }
        };
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(20))
            .http2_only(true)
            .http2_max_header_list_size(LARGEST_HEAD)
            .http2_initial_stream_window_size(wire::STREAM_WINDOW)
            .http2_initial_connection_window_size(wire::CONNECTION_WINDOW)
            .http2_keep_alive_interval(PING)
            .http2_keep_alive_timeout(PING)
            .http2_keep_alive_while_idle(true)
            .build(dialer);
        Ok(Self { address, tls, client, token, cached: Mutex::new(None) })
    }

    /// Opens the log for an attempt.
    ///
    /// # Errors
    /// If the gateway refuses or cannot be reached.
    pub async fn open(&self, attempt: i64, digest: &str) -> Result<OpenReply, CallError> {
        self.post(wire::LOG_OPEN, &OpenRequest { attempt, policy_digest: digest.to_owned() }).await
    }

    /// Appends a segment.
    ///
    /// # Errors
    /// If the gateway refuses or cannot be reached.
    pub async fn append(&self, request: &AppendRequest) -> Result<AppendReply, CallError> {
        self.post(wire::LOG_APPEND, request).await
    }

    /// Asks people about one exact call.
    ///
    /// # Errors
    /// If the gateway refuses or cannot be reached.
    pub async fn approval(&self, ask: &ApprovalAsk) -> Result<ApprovalReply, CallError> {
        self.post(wire::APPROVAL, ask).await
    }

    /// Has the arguments of the call that undoes another made and kept; gives their digest. Tried again for a while where nobody answers.
    ///
    /// # Errors
    /// If the gateway refuses or cannot be reached.
    pub async fn keep(&self, keep: &Keep) -> Result<String, CallError> {
        let kept: Kept = self.post_patiently(wire::STATE_KEEP, keep).await?;
        Ok(kept.digest)
    }

    /// The arguments that were kept to undo a call. Tried again for a while where nobody answers.
    ///
    /// # Errors
    /// If the gateway refuses or cannot be reached.
    pub async fn kept(&self, of: &KeptOf) -> Result<String, CallError> {
        let undo: Undo = self.post_patiently(wire::STATE_GET, of).await?;
        Ok(undo.arguments)
    }

    /// Has the result of an idempotent call kept outside the pod. Tried again for a while where nobody answers.
    ///
    /// # Errors
    /// If the gateway refuses or cannot be reached.
    pub async fn keep_result(&self, keep: &KeepResult) -> Result<(), CallError> {
        self.post_patiently::<_, Kept>(wire::RESULT_KEEP, keep).await.map(|_| ())
    }

    /// The result of a call of an earlier harness, as it was kept. Tried again for a while where nobody answers.
    ///
    /// # Errors
    /// If the gateway refuses or cannot be reached.
    pub async fn kept_result(&self, of: &KeptOf) -> Result<String, CallError> {
        let kept: KeptResult = self.post_patiently(wire::RESULT_GET, of).await?;
        Ok(kept.result)
    }

    async fn post_patiently<Q: serde::Serialize, R: serde::de::DeserializeOwned>(
        &self,
        path: &str,
        body: &Q,
    ) -> Result<R, CallError> {
        let started = Instant::now();
        loop {
            match self.post(path, body).await {
                Err(CallError::Unreachable(_)) if started.elapsed() < STATE_PATIENCE => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                done => return done,
            }
        }
    }

    async fn post<Q: serde::Serialize, R: serde::de::DeserializeOwned>(
        &self,
        path: &str,
        body: &Q,
    ) -> Result<R, CallError> {
        let unreachable = |error: &dyn std::fmt::Display| CallError::Unreachable(error.to_string());
        let body = serde_json::to_vec(body).map_err(|error| unreachable(&error))?;
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("https://{}{path}", wire::SERVER_NAME))
            .header(CONTENT_TYPE, "application/json")
            .header(AUTHORIZATION, self.bearer().map_err(|error| unreachable(&error))?)
            .body(Full::from(body))
            .map_err(|error| unreachable(&error))?;
        let exchange = async {
            let reply = self.client.request(request).await.map_err(|error| unreachable(&chain(&error)))?;
            let success = reply.status().is_success();
            let status = reply.status();
            let body = Limited::new(reply.into_body(), LONGEST_REPLY);
            let body = body.collect().await.map_err(|error| unreachable(&error))?.to_bytes();
            if success {
                return serde_json::from_slice(&body).map_err(|error| unreachable(&error));
            }
            match serde_json::from_slice::<Refusal>(&body) {
                Ok(refusal) if is_transient(status) => {
                    Err(unreachable(&format!("{}: {}", refusal.rule, refusal.reason)))
                }
                Ok(refusal) => Err(CallError::Refused(Denial { rule: refusal.rule, reason: refusal.reason })),
                Err(_) => Err(unreachable(&format!("status {status} without a reason"))),
            }
        };
        tokio::time::timeout(LOG_REPLY, exchange)
            .await
            .unwrap_or_else(|_| Err(unreachable(&format!("no answer within {LOG_REPLY:?}"))))
    }

    /// Sends one request to an upstream, which may be silent for so long before its reply begins. Tried again only while it is certain that the
    /// gateway did not get it.
    ///
    /// # Errors
    /// If the gateway refused it or the upstream did not answer.
    pub async fn forward(
        &self,
        (channel, intent): (Channel, u64),
        target: &str,
        request: Request<Bytes>,
        silence: Duration,
    ) -> Result<Response<Carried>, Undelivered> {
        let (mut parts, body) = request.into_parts();
        let malformed = |_| undelivered(Rule::Request, "the target cannot be sent".into(), true);
        parts.headers.insert(wire::TARGET, HeaderValue::from_str(target).map_err(malformed)?);
        parts.headers.insert(wire::CHANNEL, HeaderValue::from_static(channel.as_str()));
        self.deliver(Uri::from_static("https://belay-gateway/v1/forward"), intent, &parts, (body, silence)).await
    }

    /// Calls an HTTP tool with these arguments, JSON. Tried again only while it is certain that the gateway did not get it.
    ///
    /// # Errors
    /// If the gateway refused it or the upstream did not answer.
    pub async fn call(
        &self,
        intent: u64,
        arguments: Bytes,
        silence: Duration,
    ) -> Result<Response<Carried>, Undelivered> {
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let (parts, ()) = request.into_parts();
        self.deliver(Uri::from_static("https://belay-gateway/v1/call"), intent, &parts, (arguments, silence)).await
    }

    async fn deliver(
        &self,
        to: Uri,
        intent: u64,
        parts: &Parts,
        (body, silence): (Bytes, Duration),
    ) -> Result<Response<Carried>, Undelivered> {
        let patience = silence.saturating_add(WORD);
        let started = Instant::now();
        let mut pause = Duration::from_millis(50);
        loop {
            let bearer = self.bearer().map_err(|error| undelivered(Rule::IdentityToken, error.to_string(), true))?;
            let mut again = Request::new(Full::from(body.clone()));
            *again.method_mut() = parts.method.clone();
            *again.uri_mut() = to.clone();
            *again.headers_mut() = parts.headers.clone();
            again.headers_mut().insert(wire::INTENT, HeaderValue::from(intent));
            again.headers_mut().insert(AUTHORIZATION, bearer);
            let exchange = tokio::time::timeout(patience, self.client.request(again));
            match exchange.await {
                // The gateway itself says that it did not send it, and to come again.
                Ok(Ok(reply))
                    if is_transient(reply.status())
                        && reply.headers().contains_key(wire::RULE)
                        && started.elapsed() < PATIENCE =>
                {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
                Ok(Ok(reply)) => return self.judge(reply).await,
                Ok(Err(error)) if error.is_connect() && started.elapsed() < PATIENCE => {
                    tracing::warn!(error = chain(&error), "the gateway cannot be reached; trying again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
                Ok(Err(error)) => {
                    return Err(undelivered(Rule::UpstreamConnect, chain(&error), error.is_connect()));
                }
                Err(_) => {
                    return Err(undelivered(Rule::UpstreamReply, format!("no reply within {patience:?}"), false));
                }
            }
        }
    }

    /// A reply that carries a rule is the gateway's own; any other is the upstream's.
    async fn judge(&self, reply: Response<Incoming>) -> Result<Response<Carried>, Undelivered> {
        let Some(rule) = reply.headers().get(wire::RULE) else { return Ok(reply::reply(reply)) };
        // One that we do not know may be of a call whose reply never came.
        let rule = serde_json::from_slice(format!("\"{}\"", rule.to_str().unwrap_or_default()).as_bytes());
        let rule = rule.unwrap_or(Rule::UpstreamReply);
        let upstream = Peer::of(reply.headers());
        let body = Limited::new(reply.into_body(), LONGEST_REPLY).collect().await;
        let refusal = body.ok().and_then(|body| serde_json::from_slice::<Refusal>(&body.to_bytes()).ok());
        let refusal = refusal.unwrap_or(Refusal { rule, reason: "refused without a reason".into() });
        // Only a request whose reply never came, or is withheld, may have done something.
        let certain = !matches!(refusal.rule, Rule::UpstreamReply | Rule::UpstreamSecret);
        Err(Undelivered { denial: Denial { rule: refusal.rule, reason: refusal.reason }, certain, upstream })
    }

    /// Opens a tunnel to `host:port`.
    ///
    /// # Errors
    /// If the gateway refused it or the upstream cannot be reached.
    pub async fn tunnel(&self, intent: u64, authority: &str) -> Result<Tunnel, Undelivered> {
        let lost = |error: &dyn std::fmt::Display| undelivered(Rule::UpstreamConnect, error.to_string(), true);
        let uri: Uri = authority.parse().map_err(|error| undelivered(Rule::EgressHost, format!("{error}"), true))?;
        let started = Instant::now();
        let stream = loop {
            match dial(self.address, &self.tls).await {
                Ok(stream) => break stream,
                Err(error) if started.elapsed() > PATIENCE => return Err(lost(&error)),
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| lost(&error))?;
        tokio::spawn(connection.with_upgrades());
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri(uri)
            .header(http::header::HOST, authority)
            .header(PROXY_AUTHORIZATION, self.bearer().map_err(|error| lost(&error))?)
            .header(wire::CHANNEL, Channel::Egress.as_str())
            .header(wire::OPENING, wire::TOLD)
            .header(wire::INTENT, HeaderValue::from(intent))
            .body(Full::<Bytes>::default())
            .map_err(|error| lost(&error))?;
        let reply = sender.send_request(request).await.map_err(|error| lost(&error))?;
        if !reply.status().is_success() {
            return match self.judge(reply).await {
                Err(undelivered) => Err(undelivered),
                Ok(reply) => Err(lost(&format!("status {}", reply.status()))),
            };
        }
        let (upstream, tells) = (Peer::of(reply.headers()), reply.headers().contains_key(wire::OPENING));
        let stream = hyper::upgrade::on(reply).await.map_err(|error| lost(&error))?;
        Ok(Tunnel { stream, upstream, tells })
    }

    fn bearer(&self) -> Result<HeaderValue, std::io::Error> {
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((read, value)) = &*cached
            && read.elapsed() < TOKEN_AGE
        {
            return Ok(value.clone());
        }
        let token = std::fs::read_to_string(&self.token)?;
        let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
            .map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidData, error))?;
        value.set_sensitive(true);
        *cached = Some((Instant::now(), value.clone()));
        Ok(value)
    }
}

impl OpenReply {
    /// The frontier as hashes.
    ///
    /// # Errors
    /// If one is not 32 bytes in base64.
    pub fn decoded_frontier(&self) -> Result<Vec<Hash>, String> {
        use base64::{Engine, prelude::BASE64_STANDARD};
        let decode = |text: &String| {
            let bytes = BASE64_STANDARD.decode(text).map_err(|error| format!("frontier: {error}"))?;
            Hash::try_from(bytes.as_slice()).map_err(|_| format!("frontier: expected 32 bytes, found {}", bytes.len()))
        };
        self.frontier.iter().map(decode).collect()
    }
}

/// Whom the gateway has dialled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The address.
    pub address: String,
    /// SHA-256 of the certificate that it showed, hex, over TLS of the gateway's own.
    pub certificate: Option<String>,
}

impl Peer {
    /// By a reply's headers.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let text = |name| headers.get(name)?.to_str().ok().map(str::to_owned);
        Some(Self { address: text(wire::UPSTREAM)?, certificate: text(wire::CERTIFICATE) })
    }

    /// By a reply's headers, in which it is not any more then: agents are not told.
    pub fn taken(headers: &mut HeaderMap) -> Option<Self> {
        let peer = Self::of(headers);
        headers.remove(wire::UPSTREAM);
        headers.remove(wire::CERTIFICATE);
        peer
    }
}

fn undelivered(rule: Rule, reason: String, certain: bool) -> Undelivered {
    Undelivered { denial: Denial { rule, reason }, certain, upstream: None }
}

/// Refusals that pass: the gateway is busy, or has not caught up.
fn is_transient(status: http::StatusCode) -> bool {
    matches!(status, http::StatusCode::SERVICE_UNAVAILABLE | http::StatusCode::TOO_MANY_REQUESTS)
}

/// An error with its causes: hyper's own text hides them.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

async fn dial(address: std::net::SocketAddr, tls: &TlsConnector) -> std::io::Result<TlsStream<TcpStream>> {
    let name = ServerName::try_from(wire::SERVER_NAME).map_err(std::io::Error::other)?;
    let connect = async {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        tls.connect(name, stream).await
    };
    tokio::time::timeout(CONNECT, connect)
        .await
        .unwrap_or_else(|_| Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "no connection in time")))
}

/// Dials the one address that there is, whatever the URI says.
#[derive(Clone)]
struct Dialer {
    address: std::net::SocketAddr,
    tls: TlsConnector,
}

impl tower::Service<Uri> for Dialer {
    type Response = Secured;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Secured, std::io::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let (address, tls) = (self.address, self.tls.clone());
        Box::pin(async move { Ok(Secured(TokioIo::new(dial(address, &tls).await?))) })
    }
}

/// A TLS stream that hyper's pool can keep.
struct Secured(TokioIo<TlsStream<TcpStream>>);

impl Connection for Secured {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl hyper::rt::Read for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl hyper::rt::Write for Secured {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
