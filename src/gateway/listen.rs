//! The listener: TCP, TLS, HTTP/1.1 or HTTP/2, and their bounds.
//!
//! Guarantees: a peer that is slow, silent, has too many connections or sends too much loses its connection, without harm to others. A
//! shutdown lets requests end. Bytes that are not a request are counted and reported as an incident.
//!
//! Rejects: HTTP without TLS, except from within the process.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::{metrics::Metrics, service::Gateway};
use crate::{
    in_process::{Connections, Version},
    wire,
};

/// Maximum number of open connections.
const CONNECTIONS: usize = 8192;
/// Maximum number of open connections of one address, which agent and harness share.
const PER_PEER: usize = 256;
/// Time limit for the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Time limit for a request's head, and for the pause between requests on HTTP/1.1.
const HEADER: Duration = Duration::from_secs(30);
/// Maximum bytes of a request's head.
const LARGEST_HEADER: usize = 64 << 10;
/// Maximum number of headers of a request.
const MOST_HEADERS: usize = 100;
/// Interval between two pings on HTTP/2, and time limit for their answer.
const PING: Duration = Duration::from_secs(20);
/// Delay after a failed accept, which means that the process has no file descriptor left.
const PAUSE: Duration = Duration::from_millis(100);

/// Number of open connections of each peer.
#[derive(Default)]
struct Open(Mutex<HashMap<IpAddr, usize>>);

/// One open connection.
struct Slot {
    open: Arc<Open>,
    peer: IpAddr,
    metrics: Metrics,
}

impl Open {
    fn slot(self: &Arc<Self>, peer: IpAddr, metrics: &Metrics) -> Option<Slot> {
        let mut open = self.0.lock();
        let total: usize = usize::try_from(metrics.connections.get()).unwrap_or_default();
        let of_peer = open.get(&peer).copied().unwrap_or_default();
        if total >= CONNECTIONS || of_peer >= PER_PEER {
            metrics.connections_refused.inc();
            return None;
        }
        open.insert(peer, of_peer + 1);
        metrics.connections.inc();
        Some(Slot { open: self.clone(), peer, metrics: metrics.clone() })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.metrics.connections.dec();
        let mut open = self.open.0.lock();
        match open.get_mut(&self.peer) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                open.remove(&self.peer);
            }
        }
    }
}

/// Serves until `stop` is cancelled. Then returns when the last connection has ended; the caller bounds that time.
pub async fn serve(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    gateway: Arc<Gateway>,
    metrics: Metrics,
    stop: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(tls);
    let open = Arc::new(Open::default());
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            // Removes ended connections, so that the set does not grow.
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, address)) = accepted else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let peer = address.ip().to_canonical();
        let Some(slot) = open.slot(peer, &metrics) else { continue };
        let (acceptor, gateway, stop) = (acceptor.clone(), gateway.clone(), stop.clone());
        connections.spawn(async move {
            connection(stream, peer, acceptor, gateway, stop).await;
            drop(slot);
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connection(
    stream: TcpStream,
    peer: IpAddr,
    acceptor: TlsAcceptor,
    gateway: Arc<Gateway>,
    stop: CancellationToken,
) {
    let _ = stream.set_nodelay(true);
    let shaken = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await;
    let stream = match shaken {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) if is_no_tls(&error) => return gateway.misheard(peer, "something else than TLS"),
        // A probe that only connects, or a peer that does not trust the certificate: there is nothing to report.
        _ => return,
    };
    let version = match stream.get_ref().1.alpn_protocol() {
        Some(b"h2") => Version::Http2,
        _ => Version::Http1,
    };
    converse((stream, version), peer, gateway, stop).await;
}

/// Serves the connections of harnesses in this process until `stop` is cancelled. Then returns when the last connection has ended.
pub async fn serve_in_process(mut opened: Connections, gateway: Arc<Gateway>, stop: CancellationToken) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let connection = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            Some(connection) = opened.next() => connection,
        };
        connections.spawn(converse(connection, Ipv4Addr::LOCALHOST.into(), gateway.clone(), stop.clone()));
    }
    while connections.join_next().await.is_some() {}
}

/// Serves the requests of one connection.
async fn converse<S>((stream, version): (S, Version), peer: IpAddr, gateway: Arc<Gateway>, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let http2 = version == Version::Http2;
    let serving = gateway.clone();
    let service = service_fn(move |request| serving.clone().serve(request, peer));
    let io = TokioIo::new(stream);
    // An error is the peer's: it violated the protocol, went away or was too slow.
    let ended = |ended: hyper::Result<()>| {
        if let Err(error) = ended
            && (error.is_parse() || (http2 && breaks_the_protocol(&error)))
        {
            gateway.misheard(peer, &error.to_string());
        }
    };
    if http2 {
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(wire::STREAMS)
            .initial_stream_window_size(wire::STREAM_WINDOW)
            .initial_connection_window_size(wire::CONNECTION_WINDOW)
            .max_header_list_size(u32::try_from(LARGEST_HEADER).unwrap_or(u32::MAX))
            .keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .serve_connection(io, service);
        let mut connection = pin!(connection);
        tokio::select! {
            over = connection.as_mut() => return ended(over),
            () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        ended(connection.await);
    } else {
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER)
            .max_header_size(LARGEST_HEADER)
            .max_buf_size(LARGEST_HEADER * 2)
            .max_headers(MOST_HEADERS)
            .serve_connection(io, service)
            .with_upgrades();
        let mut connection = pin!(connection);
        tokio::select! {
            over = connection.as_mut() => return ended(over),
            () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        ended(connection.await);
    }
}

/// Returns whether a peer's first bytes were not TLS.
fn is_no_tls(error: &std::io::Error) -> bool {
    let error = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(error, Some(rustls::Error::InvalidMessage(_)))
}

/// Returns whether a violation of HTTP/2 by the peer ended a connection, and not the network or a timeout.
fn breaks_the_protocol(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if cause.is::<std::io::Error>() {
            return false;
        }
        source = cause.source();
    }
    !(error.is_timeout() || error.is_closed() || error.is_canceled() || error.is_incomplete_message())
}
