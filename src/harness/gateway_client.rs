//! The client for the gateway: TLS to a fixed address with a fixed server name, or a connection within the process, and the pod's token on
//! every request.
//!
//! All requests except tunnels share one HTTP/2 connection, so that a call goes to the replica that has just witnessed its intent. Once the
//! intent is in the bucket, any other replica can take the call as well.

/// Replies that the gateway forwards.
mod reply;

use std::{
    path::PathBuf,
    pin::Pin,
    sync::Arc,
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
    rt::{TokioIo, TokioTimer},
};
use parking_lot::Mutex;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

pub use self::reply::{Carried, EndedError, withheld};
use crate::{
    evidence::{merkle::Hash, record::Channel},
    in_process::{InProcess, Version},
    policy::{config::Wiring, decide::Denial, rule::Rule},
    retry,
    wire::{
        self, AppendReply, AppendRequest, ApprovalAsk, ApprovalReply, OpenReply, OpenRequest, PutReply, PutResult,
        PutState, Refusal, ResultReply, StateRef, Undo,
    },
};

/// How long requests for stored arguments and results are retried.
const STATE_PATIENCE: Duration = Duration::from_secs(30);
/// The timeout of a connection to the gateway, which is in the same cluster.
const CONNECT: Duration = Duration::from_secs(5);
/// The most bytes of a reply's head, with 32 more counted for each header: as many as the gateway accepts from upstreams, and room for its
/// own headers.
const LARGEST_HEAD: u32 = 128 << 10;
/// The interval of pings to the gateway, and the timeout of a ping. A replica whose node is gone does not close the connection.
const PING: Duration = Duration::from_secs(5);
/// The timeout of the gateway's replies about the log.
const LOG_REPLY: Duration = Duration::from_secs(30);
/// How much longer than the upstream the gateway may take, so that the harness learns from the gateway what became of the call.
const WORD: Duration = Duration::from_secs(15);
/// How long a failing gateway is retried before a call is given up: longer than it takes to notice a replica's restart.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long a token that was read from its file is used. The kubelet replaces it long before it expires.
const TOKEN_AGE: Duration = Duration::from_secs(30);
/// The longest denial, and the longest reply about the log, which contains the task's idempotency keys, in bytes.
const LONGEST_REPLY: usize = 2 << 20;

/// The reason why the client could not be created.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The address is malformed.
    #[error("wiring.gateway: expected address:port, found {0:?}")]
    Address(String),
    /// The certificate authority is malformed.
    #[error("wiring.gatewayCa: expected PEM certificates: {0}")]
    Authority(String),
    /// TLS could not be configured.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// The reason why a request got no result.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// The gateway denied the request.
    #[error("{}: {}", .0.rule, .0.reason)]
    Refused(Denial),
    /// The gateway did not reply.
    #[error("the gateway cannot be reached: {0}")]
    Unreachable(String),
}

/// The reason why a forwarded request got no reply from the upstream.
#[derive(Clone, Debug)]
pub struct DeliveryError {
    /// The denial.
    pub denial: Denial,
    /// Whether it is certain that the upstream did not get the request.
    pub certain: bool,
    /// The server that the gateway dialled, if it dialled one.
    pub upstream: Option<Peer>,
}

/// A tunnel that the gateway has opened.
pub struct Tunnel {
    /// The stream of the tunnel.
    pub stream: Upgraded,
    /// The server that the gateway dialled.
    pub upstream: Option<Peer>,
    /// Whether the gateway first reports its verdict on the agent's first bytes: see [`wire::OPENING`].
    pub tells: bool,
}

/// A client for the gateway.
pub struct GatewayClient {
    tunnels: Dialer,
    client: Client<Dialer, Full<Bytes>>,
    token: PathBuf,
    cached: Mutex<Option<(Instant, HeaderValue)>>,
}

impl GatewayClient {
    /// Creates a client from this wiring. Does not connect yet. Reaches a gateway in the same process, if there is one, without a socket.
    ///
    /// # Errors
    /// Returns an error if the wiring is malformed.
    pub fn new(wiring: &Wiring, token: PathBuf, in_process: Option<InProcess>) -> Result<Self, LinkError> {
        let address = wiring.gateway.parse().map_err(|_| LinkError::Address(wiring.gateway.clone()))?;
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(wiring.gateway_ca.as_bytes()) {
            let certificate = certificate.map_err(|error| LinkError::Authority(error.to_string()))?;
            roots.add(certificate).map_err(|error| LinkError::Authority(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(LinkError::Authority("none found".into()));
        }
        let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let dialer = |version: Version, config: ClientConfig| {
            let tls = TlsConnector::from(Arc::new(config));
            Dialer { address, tls, version, in_process: in_process.clone() }
        };
        let tunnels = dialer(Version::Http1, config.clone());
        config.alpn_protocols = vec![b"h2".to_vec()];
        let dialer = dialer(Version::Http2, config);
        let threads = Threads(in_process.clone());
        let client = Client::builder(threads)
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
        Ok(Self { tunnels, client, token, cached: Mutex::new(None) })
    }

    /// Opens the log for an attempt.
    ///
    /// # Errors
    /// Returns an error if the gateway rejects the request or cannot be reached.
    pub async fn open(&self, attempt: i64, digest: &str) -> Result<OpenReply, CallError> {
        self.post(wire::LOG_OPEN, &OpenRequest { attempt, policy_digest: digest.to_owned() }).await
    }

    /// Appends a segment.
    ///
    /// # Errors
    /// Returns an error if the gateway rejects the segment or cannot be reached.
    pub async fn append(&self, request: &AppendRequest) -> Result<AppendReply, CallError> {
        self.post(wire::LOG_APPEND, request).await
    }

    /// Requests approval of one exact call.
    ///
    /// # Errors
    /// Returns an error if the gateway denies the request or cannot be reached.
    pub async fn approval(&self, ask: &ApprovalAsk) -> Result<ApprovalReply, CallError> {
        self.post(wire::APPROVAL, ask).await
    }

    /// Renders and stores the arguments of a call's compensation. Returns the commitment to them. Retries for a while if the gateway cannot
    /// be reached.
    ///
    /// # Errors
    /// Returns an error if the gateway denies the request or cannot be reached.
    pub async fn put_state(&self, put: &PutState) -> Result<String, CallError> {
        let stored: PutReply = self.post_patiently(wire::STATE_PUT, put).await?;
        Ok(stored.digest)
    }

    /// Returns the stored arguments of a compensation. Retries for a while if the gateway cannot be reached.
    ///
    /// # Errors
    /// Returns an error if the gateway denies the request or cannot be reached.
    pub async fn get_state(&self, of: &StateRef) -> Result<String, CallError> {
        let undo: Undo = self.post_patiently(wire::STATE_GET, of).await?;
        Ok(undo.arguments)
    }

    /// Stores the result of an idempotent call outside the pod. Retries for a while if the gateway cannot be reached.
    ///
    /// # Errors
    /// Returns an error if the gateway denies the request or cannot be reached.
    pub async fn put_result(&self, put: &PutResult) -> Result<(), CallError> {
        self.post_patiently::<_, PutReply>(wire::RESULT_PUT, put).await.map(|_| ())
    }

    /// Returns the stored result of a call of an earlier harness. Retries for a while if the gateway cannot be reached.
    ///
    /// # Errors
    /// Returns an error if the gateway denies the request or cannot be reached.
    pub async fn get_result(&self, of: &StateRef) -> Result<String, CallError> {
        let stored: ResultReply = self.post_patiently(wire::RESULT_GET, of).await?;
        Ok(stored.result)
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

    /// Sends one request to an upstream, which may take up to `silence` before its reply begins. Retries only while it is certain that the
    /// gateway did not get the request, or while the gateway itself asks for a retry.
    ///
    /// # Errors
    /// Returns an error if the gateway denied the request or the upstream did not reply.
    pub async fn forward(
        &self,
        (channel, intent): (Channel, u64),
        target: &str,
        request: Request<Bytes>,
        silence: Duration,
    ) -> Result<Response<Carried>, DeliveryError> {
        let (mut parts, body) = request.into_parts();
        let malformed = |_| undelivered(Rule::Request, "the target cannot be sent".into(), true);
        parts.headers.insert(wire::TARGET, HeaderValue::from_str(target).map_err(malformed)?);
        parts.headers.insert(wire::CHANNEL, HeaderValue::from_static(channel.as_str()));
        self.deliver(Uri::from_static("https://belay-gateway/v1/forward"), intent, &parts, (body, silence)).await
    }

    /// Calls an HTTP tool with these arguments, JSON. Retries only while it is certain that the gateway did not get the request, or while
    /// the gateway itself asks for a retry.
    ///
    /// # Errors
    /// Returns an error if the gateway denied the request or the upstream did not reply.
    pub async fn call(
        &self,
        intent: u64,
        arguments: Bytes,
        silence: Duration,
    ) -> Result<Response<Carried>, DeliveryError> {
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
    ) -> Result<Response<Carried>, DeliveryError> {
        let patience = silence.saturating_add(WORD);
        let started = Instant::now();
        let mut pauses = retry::pauses(Duration::from_millis(50), Duration::from_secs(1));
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
                // The gateway itself says that it did not send the request and that a retry may succeed.
                Ok(Ok(reply))
                    if is_transient(reply.status())
                        && reply.headers().contains_key(wire::RULE)
                        && started.elapsed() < PATIENCE =>
                {
                    retry::pause(&mut pauses).await;
                }
                Ok(Ok(reply)) => return self.judge(reply).await,
                Ok(Err(error)) if error.is_connect() && started.elapsed() < PATIENCE => {
                    tracing::warn!(error = chain(&error), "the gateway cannot be reached; trying again");
                    retry::pause(&mut pauses).await;
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

    /// Separates the gateway's own replies, which carry a rule, from the upstream's.
    async fn judge(&self, reply: Response<Incoming>) -> Result<Response<Carried>, DeliveryError> {
        let Some(rule) = reply.headers().get(wire::RULE) else { return Ok(reply::reply(reply)) };
        // An unknown rule may belong to a call whose reply never came.
        let rule = serde_json::from_slice(format!("\"{}\"", rule.to_str().unwrap_or_default()).as_bytes());
        let rule = rule.unwrap_or(Rule::UpstreamReply);
        let upstream = Peer::of(reply.headers());
        let body = Limited::new(reply.into_body(), LONGEST_REPLY).collect().await;
        let refusal = body.ok().and_then(|body| serde_json::from_slice::<Refusal>(&body.to_bytes()).ok());
        let refusal = refusal.unwrap_or(Refusal { rule, reason: "refused without a reason".into() });
        // Only a request whose reply never came or is withheld may have had an effect.
        let certain = !matches!(refusal.rule, Rule::UpstreamReply | Rule::UpstreamSecret);
        Err(DeliveryError { denial: Denial { rule: refusal.rule, reason: refusal.reason }, certain, upstream })
    }

    /// Opens a tunnel to `host:port`.
    ///
    /// # Errors
    /// Returns an error if the gateway denied the tunnel or the upstream cannot be reached.
    pub async fn tunnel(&self, intent: u64, authority: &str) -> Result<Tunnel, DeliveryError> {
        let lost = |error: &dyn std::fmt::Display| undelivered(Rule::UpstreamConnect, error.to_string(), true);
        let uri: Uri = authority.parse().map_err(|error| undelivered(Rule::EgressHost, format!("{error}"), true))?;
        let started = Instant::now();
        let stream = loop {
            match self.tunnels.dial().await {
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
        let mut cached = self.cached.lock();
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
    /// Decodes the frontier into hashes.
    ///
    /// # Errors
    /// Returns an error if an entry is not 32 bytes in base64.
    pub fn decoded_frontier(&self) -> Result<Vec<Hash>, String> {
        use base64::{Engine, prelude::BASE64_STANDARD};
        let decode = |text: &String| {
            let bytes = BASE64_STANDARD.decode(text).map_err(|error| format!("frontier: {error}"))?;
            Hash::try_from(bytes.as_slice()).map_err(|_| format!("frontier: expected 32 bytes, found {}", bytes.len()))
        };
        self.frontier.iter().map(decode).collect()
    }
}

/// The server that the gateway dialled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The address.
    pub address: String,
    /// The SHA-256 of the certificate that it showed, hex, if the gateway connected with TLS.
    pub certificate: Option<String>,
}

impl Peer {
    /// Parses the peer from a reply's headers.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let text = |name| headers.get(name)?.to_str().ok().map(str::to_owned);
        Some(Self { address: text(wire::UPSTREAM)?, certificate: text(wire::CERTIFICATE) })
    }

    /// Parses the peer from a reply's headers and removes it from them, because agents must not see it.
    pub fn taken(headers: &mut HeaderMap) -> Option<Self> {
        let peer = Self::of(headers);
        headers.remove(wire::UPSTREAM);
        headers.remove(wire::CERTIFICATE);
        peer
    }
}

fn undelivered(rule: Rule, reason: String, certain: bool) -> DeliveryError {
    DeliveryError { denial: Denial { rule, reason }, certain, upstream: None }
}

/// Returns whether a denial is temporary: the gateway is busy or has not caught up.
fn is_transient(status: http::StatusCode) -> bool {
    matches!(status, http::StatusCode::SERVICE_UNAVAILABLE | http::StatusCode::TOO_MANY_REQUESTS)
}

/// Returns an error's text with its causes, which hyper's own text hides.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// The threads that serve the connection to the gateway: those of the gateway in the same process, or else those of the caller.
#[derive(Clone)]
struct Threads(Option<InProcess>);

impl<F> hyper::rt::Executor<F> for Threads
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, task: F) {
        match &self.0 {
            Some(gateway) => drop(gateway.threads().spawn(task)),
            None => drop(tokio::spawn(task)),
        }
    }
}

/// A connector that dials the gateway, whatever the URI says.
#[derive(Clone)]
struct Dialer {
    address: std::net::SocketAddr,
    tls: TlsConnector,
    version: Version,
    in_process: Option<InProcess>,
}

/// A connection to the gateway.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Dialer {
    async fn dial(&self) -> std::io::Result<Box<dyn Stream>> {
        if let Some(gateway) = &self.in_process {
            return Ok(Box::new(gateway.open(self.version).await?));
        }
        let name = ServerName::try_from(wire::SERVER_NAME).map_err(std::io::Error::other)?;
        let connect = async {
            let stream = TcpStream::connect(self.address).await?;
            stream.set_nodelay(true)?;
            self.tls.connect(name, stream).await
        };
        match tokio::time::timeout(CONNECT, connect).await {
            Ok(stream) => Ok(Box::new(stream?)),
            Err(_) => Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "no connection in time")),
        }
    }
}

impl tower::Service<Uri> for Dialer {
    type Response = Dialled;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Dialled, std::io::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let dialer = self.clone();
        Box::pin(async move { Ok(Dialled(TokioIo::new(dialer.dial().await?))) })
    }
}

/// A connection for hyper's pool.
struct Dialled(TokioIo<Box<dyn Stream>>);

impl Connection for Dialled {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl hyper::rt::Read for Dialled {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl hyper::rt::Write for Dialled {
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
