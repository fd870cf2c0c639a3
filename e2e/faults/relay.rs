//! A relay that a test can disturb: it forwards HTTP and records the requests.
//!
//! For each connection to it, the relay opens a connection of the same HTTP version to the server behind it, and closes both together. So
//! the client sees when the server dies.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::process::Process;

/// When a fault happens, relative to the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The request was not forwarded, and will not be.
    Before,
    /// The server has answered, and the answer is not forwarded.
    After,
}

/// What happens to a request instead of an undisturbed answer.
#[derive(Clone)]
pub enum Fault {
    /// The relay answers with this status, and does not forward the request.
    Status(u16),
    /// The relay forwards the request after this time.
    Slow(Duration),
    /// The request is neither forwarded nor answered.
    Silence,
    /// The connection breaks.
    Broken(Moment),
    /// These processes are killed.
    Killed(Moment, Vec<Process>),
}

/// A request that the relay received.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// The number of the request, from 1.
    pub number: usize,
    /// The number of `PUT` requests so far, this one included.
    pub writes: usize,
    /// The method.
    pub method: Method,
    /// The path without a query, as [`path_of`] returns it.
    pub path: String,
    /// The body.
    pub body: Bytes,
    /// When the relay forwarded the answer, if that was a success.
    pub told: Option<Instant>,
}

/// The store's host name, for worlds with [`Setting::as_aws`](super::world::Setting::as_aws).
pub const STORE: &str = "s3.test";

/// Returns what happens to a request.
type Plan = Box<dyn Fn(&Exchange) -> Option<Fault> + Send>;

/// The two sides of TLS.
pub type Tls = (TlsAcceptor, TlsConnector);

/// A relay between a client and a server.
#[derive(Clone)]
pub struct Relay(Arc<Inner>);

struct Inner {
    to: SocketAddr,
    tls: Option<Tls>,
    state: Mutex<State>,
}

struct State {
    plan: Plan,
    seen: Vec<Exchange>,
}

/// The sender of one connection to the server.
#[derive(Clone)]
enum Sender {
    One(Arc<tokio::sync::Mutex<http1::SendRequest<Full<Bytes>>>>),
    Two(http2::SendRequest<Full<Bytes>>),
}

/// A connection with or without TLS.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream for S {}

/// The error that closes the connection.
#[derive(Debug, thiserror::Error)]
#[error("the wire broke")]
struct Broke;

impl Relay {
    /// Starts a relay from one address to another: HTTP/2 over TLS, or HTTP/1.1 without TLS.
    pub async fn start(from: SocketAddr, to: SocketAddr, tls: Option<Tls>) -> Self {
        let state = State { plan: Box::new(|_| None), seen: Vec::new() };
        let relay = Self(Arc::new(Inner { to, tls, state: Mutex::new(state) }));
        let (listener, accepting) = (TcpListener::bind(from).await.unwrap(), relay.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let relay = accepting.clone();
                tokio::spawn(async move { relay.connection(stream).await });
            }
        });
        relay
    }

    /// Sets what happens to requests from now on.
    pub fn plan(&self, plan: impl Fn(&Exchange) -> Option<Fault> + Send + 'static) {
        self.0.state.lock().unwrap().plan = Box::new(plan);
    }

    /// Lets all requests through from now on.
    pub fn heal(&self) {
        self.plan(|_| None);
    }

    /// Returns all requests so far.
    pub fn seen(&self) -> Vec<Exchange> {
        self.0.state.lock().unwrap().seen.clone()
    }

    async fn connection(&self, stream: TcpStream) {
        // If the server cannot be reached, the client's connection is closed.
        let Ok(behind) = TcpStream::connect(self.0.to).await else { return };
        let _ = (stream.set_nodelay(true), behind.set_nodelay(true));
        let Some((acceptor, connector)) = &self.0.tls else { return self.pass(stream, behind).await };
        let name = belay::wire::SERVER_NAME.try_into().unwrap();
        let Ok(behind) = connector.connect(name, behind).await else { return };
        let Ok(stream) = acceptor.accept(stream).await else { return };
        self.pass(stream, behind).await;
    }

    async fn pass(&self, stream: impl Stream, behind: impl Stream) {
        let behind = TokioIo::new(behind);
        let (sender, ended) = if self.0.tls.is_some() {
            let Ok((sender, connection)) = http2::handshake(TokioExecutor::new(), behind).await else { return };
            (Sender::Two(sender), tokio::spawn(async move { drop(connection.await) }))
        } else {
            let Ok((sender, connection)) = http1::handshake(behind).await else { return };
            (Sender::One(Arc::new(sender.into())), tokio::spawn(async move { drop(connection.await) }))
        };
        let relay = self.clone();
        let service = service_fn(move |request| {
            let (relay, sender) = (relay.clone(), sender.clone());
            async move { relay.exchange(request, sender).await }
        });
        let serving = auto::Builder::new(TokioExecutor::new());
        let mut relayed = std::pin::pin!(serving.serve_connection(TokioIo::new(stream), service));
        let abort = ended.abort_handle();
        tokio::select! {
            _ = relayed.as_mut() => {}
            _ = ended => {
                // Answers that came before the end are still forwarded.
                relayed.as_mut().graceful_shutdown();
                let _ = relayed.await;
            }
        }
        abort.abort();
    }

    async fn exchange(&self, request: Request<Incoming>, sender: Sender) -> Result<Response<Full<Bytes>>, Broke> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.map_err(|_| Broke)?.to_bytes();
        let (number, fault) = {
            let mut state = self.0.state.lock().unwrap();
            let before = state.seen.last().map_or((0, 0), |last| (last.number, last.writes));
            let (method, path) = (head.method.clone(), path_of(&head));
            let writes = before.1 + usize::from(method == Method::PUT);
            let exchange = Exchange { number: before.0 + 1, writes, method, path, body: body.clone(), told: None };
            let fault = (state.plan)(&exchange);
            state.seen.push(exchange);
            (before.0, fault)
        };
        match &fault {
            Some(Fault::Status(code)) => return Ok(answer(*code)),
            Some(Fault::Slow(time)) => tokio::time::sleep(*time).await,
            Some(Fault::Silence) => std::future::pending().await,
            _ => broken(fault.as_ref(), Moment::Before)?,
        }
        let request = Request::from_parts(head, Full::new(body));
        let reply = match sender {
            Sender::One(sender) => {
                let mut sender = sender.lock().await;
                sender.ready().await.map_err(|_| Broke)?;
                sender.send_request(request).await
            }
            Sender::Two(mut sender) => sender.send_request(request).await,
        };
        let (head, body) = reply.map_err(|_| Broke)?.into_parts();
        let body = body.collect().await.map_err(|_| Broke)?.to_bytes();
        broken(fault.as_ref(), Moment::After)?;
        if head.status.is_success() {
            self.0.state.lock().unwrap().seen[number].told = Some(Instant::now());
        }
        Ok(Response::from_parts(head, Full::new(body)))
    }
}

/// Returns the path. If the bucket is in the host name, the path starts with it.
fn path_of(head: &http::request::Parts) -> String {
    let host = head.headers.get(http::header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let bucket = host.split_once(&format!(".{STORE}")).map(|(bucket, _)| format!("/{bucket}"));
    bucket.unwrap_or_default() + head.uri.path()
}

/// Breaks the connection and kills processes if the fault is for this moment.
fn broken(fault: Option<&Fault>, moment: Moment) -> Result<(), Broke> {
    match fault {
        Some(Fault::Broken(when)) if *when == moment => Err(Broke),
        Some(Fault::Killed(when, victims)) if *when == moment => {
            victims.iter().for_each(Process::kill);
            Err(Broke)
        }
        _ => Ok(()),
    }
}

/// Returns an error response of S3 with this status.
fn answer(status: u16) -> Response<Full<Bytes>> {
    let code = match status {
        403 => "AccessDenied",
        503 => "SlowDown",
        507 => "InsufficientStorage",
        _ => "InternalError",
    };
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>as the test says</Message></Error>");
    let mut reply = Response::new(Full::from(body));
    *reply.status_mut() = StatusCode::from_u16(status).unwrap();
    reply
}
