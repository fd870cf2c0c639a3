//! A wire that a test can disturb: HTTP is passed on, and noted.
//!
//! Each connection to it is one to whoever is behind it, of the same HTTP version, and ends with that one: who dies is seen to have died.

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

/// Whether what was asked for is done already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// It was not passed on, and will not be.
    Before,
    /// It is done, and nobody is told.
    After,
}

/// What happens to a request.
#[derive(Clone)]
pub enum Fault {
    /// It is answered so, and not passed on.
    Status(u16),
    /// It is passed on after so long.
    Slow(Duration),
    /// It is never answered, nor passed on.
    Silence,
    /// Its connection breaks.
    Broken(Moment),
    /// These are killed.
    Killed(Moment, Vec<Process>),
}

/// A request that came.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// How many there were before it, and itself.
    pub number: usize,
    /// How many wrote something, with it.
    pub writes: usize,
    /// Its method.
    pub method: Method,
    /// Its path, as [`path_of`] has it, without a query.
    pub path: String,
    /// Its body.
    pub body: Bytes,
    /// When whoever asked was told that it is done, if so.
    pub told: Option<Instant>,
}

/// The store's name where it has one.
pub const STORE: &str = "s3.test";

/// What is to happen to a request.
type Plan = Box<dyn Fn(&Exchange) -> Option<Fault> + Send>;

/// Both ends of TLS.
pub type Tls = (TlsAcceptor, TlsConnector);

/// A wire.
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

/// Sends over one connection.
#[derive(Clone)]
enum Sender {
    One(Arc<tokio::sync::Mutex<http1::SendRequest<Full<Bytes>>>>),
    Two(http2::SendRequest<Full<Bytes>>),
}

/// One end.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream for S {}

/// The connection is to break.
#[derive(Debug, thiserror::Error)]
#[error("the wire broke")]
struct Broke;

impl Relay {
    /// From one address to another: HTTP/2 over TLS, or HTTP/1.1 without.
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

    /// From now on this happens to requests.
    pub fn plan(&self, plan: impl Fn(&Exchange) -> Option<Fault> + Send + 'static) {
        self.0.state.lock().unwrap().plan = Box::new(plan);
    }

    /// From now on nothing happens to requests.
    pub fn heal(&self) {
        self.plan(|_| None);
    }

    /// All that came.
    pub fn seen(&self) -> Vec<Exchange> {
        self.0.state.lock().unwrap().seen.clone()
    }

    async fn connection(&self, stream: TcpStream) {
        // Where nobody is behind it, nobody is here.
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
                // What it has answered before is still passed on.
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

/// The path, with the bucket in it also where that is in the host's name.
fn path_of(head: &http::request::Parts) -> String {
    let host = head.headers.get(http::header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let bucket = host.split_once(&format!(".{STORE}")).map(|(bucket, _)| format!("/{bucket}"));
    bucket.unwrap_or_default() + head.uri.path()
}

/// Breaks, and kills, if this is the moment for it.
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

/// As S3 says it.
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
