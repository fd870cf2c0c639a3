//! The two listeners: the agent's on the pod's loopback, and the kubelet's, which only says whether the first is there.
//!
//! Guarantees: agents are served on the threads that [`serve`] is given. Whatever their requests cost, wall time, signals, the containment
//! probe, the journal and the kubelet's listener continue, because they run where [`serve`] was called. A request is read only as far as
//! the contracts allow arguments to be long.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, LazyLock},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rmcp::transport::streamable_http_server::{
    StreamableHttpServerConfig, StreamableHttpService, session::local::LocalSessionManager,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    runtime::{Builder, Handle, Runtime},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    body::{Body, boxed},
    compensation,
    gate::Gate,
    head::{self, First, Misheard},
    mcp::McpServer,
    model, proxy,
    tools::Tools,
};
use crate::{
    evidence::record::Channel,
    policy::{decide::Denial, model::api::Api, rule::Rule, shorten::shorten},
};

mod messages;

/// The agent's listener. It is on the pod's loopback only.
pub const AGENT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9900);
/// The kubelet's listener. It serves no data.
pub const HEALTH: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 9901);
/// The maximum number of concurrent connections. Further connections wait.
const CONNECTIONS: usize = 512;
/// The timeout for a request's head.
const HEAD: Duration = Duration::from_secs(10);
/// The longest request head, in bytes.
const LONGEST_HEAD: usize = 64 << 10;
/// The number of threads that serve agents in a pod.
const THREADS: usize = 2;
/// The size of their stacks. Evaluation on them recurses. The memory is taken page by page.
const STACK: usize = 16 << 20;
/// How long a rejected client may take to read the reason. If unread bytes remain, the connection is reset and the reply is lost.
const LINGER: Duration = Duration::from_secs(1);
/// The paths that are served.
const SERVED: &str = "/mcp, an HTTP proxy, and of models, with /v1 before it or without: POST /chat/completions, /responses, /responses/input_tokens, \
                      /messages, /messages/count_tokens, /embeddings, /moderations, GET /models";
/// The first path segments of model APIs that are not served. They store data at the provider, or let it run what no contract and no limit
/// bounds.
const UNSERVED: [&str; 24] = [
    "assistants",
    "audio",
    "batches",
    "chat",
    "completions",
    "containers",
    "conversations",
    "evals",
    "files",
    "fine_tuning",
    "images",
    "messages",
    "models",
    "organization",
    "organizations",
    "realtime",
    "responses",
    "rerank",
    "sessions",
    "skills",
    "threads",
    "uploads",
    "vector_stores",
    "videos",
];
/// How long calls in flight may continue after the agent has ended.
const DRAIN: Duration = Duration::from_secs(5);

/// The running listeners.
pub struct Serving {
    stop: CancellationToken,
    connections: TaskTracker,
}

impl Serving {
    /// Stops accepting connections, and waits a short time for those that are open.
    pub async fn drain(self) {
        self.stop.cancel();
        self.connections.close();
        if tokio::time::timeout(DRAIN, self.connections.wait()).await.is_err() {
            tracing::warn!("connections were still open after {DRAIN:?}");
        }
    }
}

/// The two listening sockets.
pub struct Listeners {
    /// The agent's socket.
    pub agent: TcpListener,
    /// The kubelet's socket, if there is one.
    pub health: Option<TcpListener>,
}

impl Listeners {
    /// Binds the sockets of a pod.
    ///
    /// # Errors
    /// Returns an error if a port is taken.
    pub async fn bind(agent: SocketAddr, health: SocketAddr) -> std::io::Result<Self> {
        Ok(Self { agent: TcpListener::bind(agent).await?, health: Some(TcpListener::bind(health).await?) })
    }
}

/// Starts threads that can serve agents.
///
/// # Errors
/// Returns an error if the system has no thread left.
pub fn start_threads(count: usize) -> std::io::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(count)
        .thread_stack_size(STACK)
        .thread_name("agents")
        .enable_all()
        .build()
}

/// Returns the threads that serve agents in a pod. They last as long as the process, which does not wait for them.
pub fn threads() -> Handle {
    static THREADS_OF_AGENTS: LazyLock<std::io::Result<Runtime>> = LazyLock::new(|| start_threads(THREADS));
    match &*THREADS_OF_AGENTS {
        Ok(threads) => threads.handle().clone(),
        Err(error) => {
            tracing::error!(%error, "the agent has no threads of its own");
            Handle::current()
        }
    }
}

/// Moves a listener to another runtime.
fn moved(listener: TcpListener, threads: &Handle) -> std::io::Result<TcpListener> {
    let listener = listener.into_std()?;
    let _there = threads.enter();
    TcpListener::from_std(listener)
}

/// Serves the agent on these threads, and the kubelet on those of the caller.
///
/// # Errors
/// Returns an error if the agent's listener cannot be used.
pub fn serve(tools: Tools, listeners: Listeners, threads: &Handle) -> std::io::Result<Serving> {
    let Listeners { agent, health } = listeners;
    let agent = moved(agent, threads)?;
    let stop = CancellationToken::new();
    let connections = TaskTracker::new();

    let mut config = StreamableHttpServerConfig::default();
    // Every call is independent: there is no session to lose when the agent or the harness restarts.
    config.legacy_session_mode = false;
    config.json_response = true;
    // Belay itself denies longer bodies, and records that.
    config.max_request_body_bytes = messages::LONGEST_BODY;
    config.cancellation_token = stop.child_token();
    let (agents, undoing) = (McpServer::new(tools.clone()), tools);
    let mcp = StreamableHttpService::new(move || Ok(agents.clone()), Arc::new(LocalSessionManager::default()), config);

    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let gate = Some(undoing.gate().clone());
    threads.spawn(accept((agent, gate), stop.clone(), connections.clone(), slots.clone(), move |request| {
        route(undoing.clone(), mcp.clone(), request)
    }));
    if let Some(health) = health {
        let slots = Arc::new(Semaphore::new(16));
        tokio::spawn(accept((health, None), stop.clone(), TaskTracker::new(), slots, |request| async move {
            let known = matches!(request.uri().path(), "/readyz" | "/healthz");
            status(if known { StatusCode::OK } else { StatusCode::NOT_FOUND })
        }));
    }
    Ok(Serving { stop, connections })
}

/// Accepts connections. If there is a gate, it denies what is not a valid request.
async fn accept<F, R>(
    (listener, gate): (TcpListener, Option<Arc<Gate>>),
    stop: CancellationToken,
    connections: TaskTracker,
    slots: Arc<Semaphore>,
    handle: F,
) where
    F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
    R: Future<Output = Response<Body>> + Send + 'static,
{
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let stream = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be taken");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let _ = stream.set_nodelay(true);
        let handle = handle.clone();
        let (stop, gate) = (stop.clone(), gate.clone());
        connections.spawn(async move {
            let (mut reads, writes) = stream.into_split();
            let head = match &gate {
                None => Bytes::new(),
                Some(gate) => {
                    let first = tokio::select! {
                        first = head::first(&mut reads, HEAD) => first,
                        () = stop.cancelled() => return,
                    };
                    match first {
                        First::Silence => return,
                        First::Head(head) => head,
                        First::Refused(misheard) => return turn_away(gate, &misheard, reads, writes).await,
                    }
                }
            };
            let stream = tokio::io::join(std::io::Cursor::new(head).chain(reads), writes);
            let service = service_fn(move |request| {
                let reply = handle(request);
                async move { Ok::<_, Infallible>(reply.await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .max_buf_size(LONGEST_HEAD)
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            let mut connection = std::pin::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = stop.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection of the agent's broke off");
                // A later request of the connection was invalid. Nothing else is known about it.
                if let Some(gate) = gate.filter(|_| error.is_parse()) {
                    let reason = format!("expected an HTTP/1.1 request, found one that cannot be read: {error}");
                    let denial = Denial { rule: Rule::Request, reason };
                    gate.deny(Channel::Egress, "(no request)", None, denial).await;
                }
            }
            drop(slot);
        });
    }
}

/// Replies to an invalid request, after the denial is recorded.
async fn turn_away(gate: &Gate, misheard: &Misheard, mut reads: OwnedReadHalf, mut writes: OwnedWriteHalf) {
    let denial = gate.deny(misheard.channel, &misheard.target, None, misheard.denial()).await;
    let rest = async {
        writes.write_all(misheard.answer(&denial).as_bytes()).await?;
        writes.shutdown().await?;
        tokio::io::copy(&mut reads, &mut tokio::io::sink()).await
    };
    let _ = tokio::time::timeout(LINGER, rest).await;
}

async fn route(tools: Tools, mcp: messages::Service, request: Request<Incoming>) -> Response<Body> {
    let gate = tools.gate().clone();
    if request.method() == Method::CONNECT {
        return proxy::connect(gate, request).await;
    }
    if request.uri().scheme().is_some() {
        return proxy::forward(gate, request).await;
    }
    let path = request.uri().path();
    if let Some(api) = Api::of_path(path) {
        return model::handle(gate, api, request).await;
    }
    if path == "/mcp" {
        // Clients request a stream of the server's own and delete sessions. Replying that there are none is not a denial of a call.
        if !matches!(*request.method(), Method::POST | Method::GET | Method::DELETE) {
            return unknown(&gate, &request, StatusCode::METHOD_NOT_ALLOWED).await;
        }
        return messages::handle(&gate, &mcp, request).await;
    }
    // A variable of its own, so that the guard is not held while the request is handled.
    let rolls_back = gate.is_rollback();
    if path == compensation::PATH && request.method() == Method::POST && rolls_back {
        return compensation::handle(&tools).await;
    }
    unknown(&gate, &request, StatusCode::NOT_FOUND).await
}

/// Denies a request for a path or a method that is not served.
async fn unknown(gate: &Gate, request: &Request<Incoming>, status: StatusCode) -> Response<Body> {
    let path = request.uri().path();
    let reason = format!("expected one of {SERVED}; found {} {}", request.method(), shorten(path));
    let denial = Denial { rule: Rule::Request, reason };
    let of_model = path.strip_prefix("/v1/").or_else(|| {
        let first = path.strip_prefix('/')?;
        UNSERVED.contains(&first.split('/').next().unwrap_or_default()).then_some(first)
    });
    let mut reply = if let Some(path_of_model) = of_model {
        let anthropic = path_of_model.starts_with("messages") || request.headers().contains_key("anthropic-version");
        let api = if anthropic { Api::Messages } else { Api::ChatCompletions };
        model::refusal(api, &gate.deny(Channel::Model, path, None, denial).await)
    } else {
        let denial = gate.deny(Channel::Tool, path, None, denial).await;
        let text = format!("{}\n", denial.told("request"));
        Response::new(boxed(Full::from(text).map_err(|error: Infallible| match error {})))
    };
    *reply.status_mut() = status;
    reply
}

fn status(status: StatusCode) -> Response<Body> {
    let mut reply = Response::new(boxed(Empty::new().map_err(|error: Infallible| match error {})));
    *reply.status_mut() = status;
    reply
}
