//! The administrative port of Belay's processes: `/healthz`, `/readyz` and `/metrics` over plain HTTP.
//!
//! Guarantees: `/healthz` answers as long as the process schedules work; `/readyz` says why the process is not ready; `/metrics` is
//! Prometheus text.
//! Rejects: every other path and method. Request bodies are not read. The port says nothing about tasks, and NetworkPolicies keep agents
//! from reaching it.

use std::{convert::Infallible, future::Future, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::{Registry, TextEncoder};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

/// The maximum number of concurrent connections. The clients are the kubelet, Prometheus, and one or two people.
const CONNECTIONS: usize = 64;
/// The time limit for a request's head, and for the wait between two requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(15);
/// The pause after a failed accept. A failed accept means that the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The error of a port that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for health and metrics: {cause}")]
pub struct AdminError {
    address: SocketAddr,
    cause: std::io::Error,
}

/// Opens the port. The returned future serves it forever.
///
/// # Errors
/// Returns an error if the address cannot be bound.
pub async fn serve<R>(
    address: SocketAddr,
    registry: Registry,
    ready: R,
) -> Result<impl Future<Output = Infallible> + Send + 'static, AdminError>
where
    R: Fn() -> Result<(), String> + Send + Sync + 'static,
{
    let listener = TcpListener::bind(address).await.map_err(|cause| AdminError { address, cause })?;
    Ok(accept(listener, registry, Arc::new(ready)))
}

async fn accept<R>(listener: TcpListener, registry: Registry, ready: Arc<R>) -> Infallible
where
    R: Fn() -> Result<(), String> + Send + Sync + 'static,
{
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        // Without a free slot the connection is dropped, because health checks retry.
        let Ok(slot) = slots.clone().try_acquire_owned() else { continue };
        let (registry, ready) = (registry.clone(), ready.clone());
        tokio::spawn(async move {
            connection(stream, &registry, &*ready).await;
            drop(slot);
        });
    }
}

async fn connection<R: Fn() -> Result<(), String>>(stream: TcpStream, registry: &Registry, ready: &R) {
    let service = service_fn(|request: http::Request<Incoming>| {
        let reply = respond(request.method(), request.uri().path(), registry, ready);
        async move { Ok::<_, Infallible>(reply) }
    });
    // A peer that breaks the protocol loses its connection. There is nowhere to report the error.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

fn respond(
    method: &Method,
    path: &str,
    registry: &Registry,
    ready: impl Fn() -> Result<(), String>,
) -> Response<Full<Bytes>> {
    let text = |status, body: String| reply(status, "text/plain; charset=utf-8", body);
    match path {
        _ if method != Method::GET && method != Method::HEAD => {
            text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".into())
        }
        "/healthz" => text(StatusCode::OK, "ok\n".into()),
        "/readyz" => match ready() {
            Ok(()) => text(StatusCode::OK, "ok\n".into()),
            Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
        },
        "/metrics" => match TextEncoder::new().encode_to_string(&registry.gather()) {
            Ok(metrics) => reply(StatusCode::OK, prometheus::TEXT_FORMAT, metrics),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        _ => text(StatusCode::NOT_FOUND, "expected /healthz, /readyz or /metrics\n".into()),
    }
}

fn reply(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut reply = Response::new(Full::new(Bytes::from(body)));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    reply
}

/// Compares `docs/reference/metrics.md` with the metrics that a process registers.
#[cfg(test)]
pub(crate) mod reference {
    use std::{collections::BTreeMap, fs, path::Path};

    use prometheus::{
        Registry,
        core::{Collector, MetricVec, MetricVecBuilder},
        proto::MetricType,
    };

    /// The type and the labels of each metric.
    type Listed = BTreeMap<String, (String, Vec<String>)>;

    /// Creates one child of a vector, because a registry does not report a vector without children.
    pub(crate) fn touch<B: MetricVecBuilder>(metrics: &MetricVec<B>) {
        let labels = metrics.desc()[0].variable_labels.len();
        metrics.with_label_values(&vec!["x"; labels]);
    }

    /// Asserts that the page lists exactly the registered metrics. `ages` collects the ages of watches; a registry reports them only once a
    /// watch exists.
    pub(crate) fn is_complete(prefix: &str, registry: &Registry, ages: &dyn Collector) {
        let mut registered: Listed = registry.gather().iter().map(of_family).collect();
        for desc in ages.desc() {
            registered.insert(desc.fq_name.clone(), ("gauge".to_owned(), desc.variable_labels.clone()));
        }
        registered.values_mut().for_each(|(_, labels)| labels.sort());
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/metrics.md");
        let mut listed = rows(&fs::read_to_string(path).unwrap());
        listed.retain(|name, _| name.starts_with(prefix));
        assert!(registered.keys().all(|name| name.starts_with(prefix)), "{registered:#?}");
        assert_eq!(listed, registered, "docs/reference/metrics.md (left) is not what is registered (right)");
    }

    fn of_family(family: &prometheus::proto::MetricFamily) -> (String, (String, Vec<String>)) {
        let kind = match family.get_field_type() {
            MetricType::COUNTER => "counter",
            MetricType::GAUGE => "gauge",
            MetricType::HISTOGRAM => "histogram",
            MetricType::SUMMARY => "summary",
            MetricType::UNTYPED => "untyped",
        };
        let labels = family.get_metric()[0].get_label().iter().map(|label| label.name().to_owned()).collect();
        (family.name().to_owned(), (kind.to_owned(), labels))
    }

    /// Parses rows of the form `| name | type | labels | meaning |`, where names are in backticks.
    fn rows(page: &str) -> Listed {
        let mut listed = Listed::new();
        for line in page.lines() {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let ["", name, kind, labels, _meaning, ""] = cells[..] else { continue };
            let Some(name) = name.strip_prefix('`').and_then(|name| name.strip_suffix('`')) else { continue };
            let mut labels: Vec<String> = labels.split('`').skip(1).step_by(2).map(str::to_owned).collect();
            labels.sort();
            let before = listed.insert(name.to_owned(), (kind.to_owned(), labels));
            assert!(before.is_none(), "{name} is on the page twice");
        }
        listed
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    async fn ask(method: Method, path: &str, ready: Result<(), String>) -> (StatusCode, String) {
        let registry = Registry::new();
        let counter = prometheus::IntCounter::new("belay_things_total", "Things.").unwrap();
        registry.register(Box::new(counter.clone())).unwrap();
        counter.inc();
        let reply = respond(&method, path, &registry, || ready.clone());
        let status = reply.status();
        (status, String::from_utf8(reply.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap())
    }

    #[tokio::test]
    async fn says_what_it_is_asked() {
        assert_eq!(ask(Method::GET, "/healthz", Err("no".into())).await.0, StatusCode::OK);
        assert_eq!(ask(Method::GET, "/readyz", Ok(())).await.0, StatusCode::OK);
        let (status, why) = ask(Method::GET, "/readyz", Err("no pods yet".into())).await;
        assert_eq!((status, why.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "no pods yet\n"));
        assert!(ask(Method::GET, "/metrics", Ok(())).await.1.contains("belay_things_total 1"));
        assert_eq!(ask(Method::GET, "/", Ok(())).await.0, StatusCode::NOT_FOUND);
        assert_eq!(ask(Method::POST, "/healthz", Ok(())).await.0, StatusCode::METHOD_NOT_ALLOWED);
    }

    #[tokio::test]
    async fn serves_over_a_socket() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(accept(listener, Registry::new(), Arc::new(|| Ok(()))));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        assert!(reply.starts_with("HTTP/1.1 200 OK"), "{reply}");
    }
}
