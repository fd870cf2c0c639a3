//! Serves the admission webhook, which reports at `kubectl apply` what `belay lint` reports offline and the operator would report later.
//!
//! ```text
//! API server ─▶ TLS ─▶ AdmissionReview ─▶ judge ─▶ allowed, allowed with a warning, or denied with every finding
//! ```
//!
//! Guarantees: Every replica answers from its own caches, with the functions that lint and operator use. An object that does not exist yet
//! causes a warning, because GitOps applies objects in any order. Objects that are being deleted, and updates that keep the spec, pass.
//!
//! Non-goals: To be a security control. The API server continues without the webhook (`failurePolicy: Ignore`), and operator and gateway
//! check everything again.

use std::{
    convert::Infallible,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;

pub use self::{judge::Judge, trust::keep as keep_trust};
use crate::{certificate, stack};

/// Evaluates an object.
mod judge;
/// Keeps the certificate authority in the webhook's configuration.
mod trust;

#[cfg(test)]
mod tests;

/// The only path.
const PATH: &str = "/validate";
/// The maximum size of a review, in bytes. An API server accepts objects of 1.5 MiB, and an update contains two.
const LARGEST: usize = 3 << 20;
/// The number of concurrent reviews. Each may take ten times its size in memory, and the chart gives the container 256 MiB.
const REVIEWS: usize = 4;
/// The timeout of one review. The API server waits no longer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The number of concurrent connections. Each API server has a few.
const CONNECTIONS: usize = 256;
/// The timeout of the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The timeout for a request's headers, and between requests. API servers close idle connections after 90 s, and the webhook must not close
/// them first.
const HEADER: Duration = Duration::from_secs(120);
/// The pause after a failed accept, which means that the process cannot open more files.
const PAUSE: Duration = Duration::from_millis(100);

/// The address and the certificate of the webhook.
#[derive(Clone, Debug)]
pub struct Options {
    /// The address to listen on.
    pub listen: SocketAddr,
    /// The directory with `tls.crt` and `tls.key`, from a Secret that the leader creates.
    pub tls_dir: PathBuf,
}

/// The error if the port cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for the admission webhook: {cause}")]
pub struct WebhookError {
    address: SocketAddr,
    cause: std::io::Error,
}

/// Opens the port. The returned future serves it forever.
///
/// # Errors
/// Returns an error if the address cannot be bound.
pub async fn serve(
    options: &Options,
    judge: Judge,
) -> Result<impl Future<Output = Infallible> + Send + 'static, WebhookError> {
    let address = options.listen;
    let listener = TcpListener::bind(address).await.map_err(|cause| WebhookError { address, cause })?;
    Ok(listen(listener, options.tls_dir.clone(), judge))
}

async fn listen(listener: TcpListener, folder: PathBuf, judge: Judge) -> Infallible {
    let (mut tls, current) = tokio::select! {
        loaded = load(&folder) => loaded,
        never = turn_away(&listener) => match never {},
    };
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    tracing::info!("the admission webhook answers");
    tokio::select! {
        never = accept(&listener, TlsAcceptor::from(Arc::new(tls)), judge) => never,
        never = current => never,
    }
}

/// Waits until there is a certificate. The leader creates the Secret, and the kubelet takes up to a minute to mount it.
async fn load(folder: &Path) -> (ServerConfig, impl Future<Output = Infallible> + Send + 'static + use<>) {
    let mut told = false;
    loop {
        match certificate::serve(folder.to_owned(), |_| {}) {
            Ok(loaded) => return loaded,
            Err(error) if !told => tracing::info!(%error, "the admission webhook waits for its certificate"),
            Err(_) => {}
        }
        told = true;
        tokio::time::sleep(certificate::LOOK).await;
    }
}

/// Closes connections that arrive before there is a certificate, so that clients do not wait.
async fn turn_away(listener: &TcpListener) -> Infallible {
    loop {
        if listener.accept().await.is_err() {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

async fn accept(listener: &TcpListener, acceptor: TlsAcceptor, judge: Judge) -> Infallible {
    let (connections, reviews) = (Arc::new(Semaphore::new(CONNECTIONS)), Arc::new(Semaphore::new(REVIEWS)));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let Ok(slot) = connections.clone().try_acquire_owned() else { continue };
        let (acceptor, judge, reviews) = (acceptor.clone(), judge.clone(), reviews.clone());
        tokio::spawn(async move {
            connection(stream, acceptor, judge, reviews).await;
            drop(slot);
        });
    }
}

async fn connection(stream: TcpStream, acceptor: TlsAcceptor, judge: Judge, reviews: Arc<Semaphore>) {
    let _ = stream.set_nodelay(true);
    // If the client does not trust the certificate, the API server's log says so.
    let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await else { return };
    let service = service_fn(move |request: Request<Incoming>| {
        let (judge, reviews) = (judge.clone(), reviews.clone());
        async move { Ok::<_, Infallible>(respond(request, judge, reviews).await) }
    });
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn respond(request: Request<Incoming>, judge: Judge, reviews: Arc<Semaphore>) -> Response<Full<Bytes>> {
    if request.uri().path() != PATH {
        return text(StatusCode::NOT_FOUND, format!("expected {PATH}, found {}", request.uri().path()));
    }
    if request.method() != Method::POST {
        return text(StatusCode::METHOD_NOT_ALLOWED, format!("expected POST, found {}", request.method()));
    }
    match tokio::time::timeout(TIMEOUT, review(request, judge, reviews)).await {
        Ok(Ok(answer)) => reply(StatusCode::OK, "application/json", answer),
        Ok(Err((status, why))) => text(status, why),
        Err(_) => text(StatusCode::SERVICE_UNAVAILABLE, format!("no answer in {} s", TIMEOUT.as_secs())),
    }
}

/// Reads a review and answers it, on a blocking thread with a large stack, because contracts may need much time and stack.
async fn review(
    request: Request<Incoming>,
    judge: Judge,
    reviews: Arc<Semaphore>,
) -> Result<Vec<u8>, (StatusCode, String)> {
    let broken = |error: &dyn std::fmt::Display| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string());
    let slot = reviews.acquire_owned().await.map_err(|error| broken(&error))?;
    let body = Limited::new(request.into_body(), LARGEST).collect().await.map_err(|error| {
        if error.is::<LengthLimitError>() {
            (StatusCode::PAYLOAD_TOO_LARGE, format!("expected a review of at most {LARGEST} bytes, found more"))
        } else {
            (StatusCode::BAD_REQUEST, format!("expected a whole body, found {error}"))
        }
    })?;
    let body = body.to_bytes();
    let work = move || {
        let answer = stack::with_large_stack(|| judge.answer(&body));
        drop(slot);
        answer
    };
    let answer = tokio::task::spawn_blocking(work).await.map_err(|error| broken(&error))?;
    answer.map_err(|error| broken(&error))?.map_err(|why| (StatusCode::BAD_REQUEST, why))
}

fn text(status: StatusCode, why: String) -> Response<Full<Bytes>> {
    reply(status, "text/plain; charset=utf-8", format!("{why}\n").into_bytes())
}

fn reply(status: StatusCode, content_type: &'static str, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut reply = Response::new(Full::new(Bytes::from(body)));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    reply
}
