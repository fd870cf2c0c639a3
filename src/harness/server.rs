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
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rmcp::transport::streamable_http_server::{
    StreamableHttpServerConfig, StreamableHttpService, session::local::LocalSessionManager,
};
use serde_json::Value;
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
    mcp::{McpServer, Reached, Read},
    model, proxy,
    tools::Tools,
};
use crate::{
    apart,
    evidence::record::Channel,
    policy::{
        decide::Denial,
        json::{self, Ambiguous},
        model::api::Api,
        rule::Rule,
        shorten::{shorten, shorten_to},
    },
};

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
/// The longest body of an MCP request, in bytes.
const LONGEST_BODY: usize = 16 << 20;
/// The longest body that is parsed on the thread that received it, in bytes.
const SHORT_BODY: usize = 128 << 10;
/// The number of longer bodies that are parsed at a time, independent of evaluations.
const READINGS: usize = 2;
/// The number of threads that serve agents in a pod.
const THREADS: usize = 2;
/// The size of their stacks. Evaluation on them recurses. The memory is taken page by page.
const STACK: usize = 16 << 20;
/// How long a rejected client may take to read the reason. If unread bytes remain, the connection is reset and the reply is lost.
const LINGER: Duration = Duration::from_secs(1);
/// The longest reply of the MCP library that is inspected, in bytes.
const LONGEST_ANSWER: usize = 64 << 10;
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

/// Returns the semaphore for parsing long bodies.
fn readings() -> Arc<Semaphore> {
    static PLACES: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(READINGS)));
    PLACES.clone()
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

async fn route(
    tools: Tools,
    mcp: StreamableHttpService<McpServer, LocalSessionManager>,
    request: Request<Incoming>,
) -> Response<Body> {
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
        let (mut request, asked) = match readable(&gate, request).await {
            Ok(read) => read,
            Err(refusal) => return refusal,
        };
        let reached = Reached::default();
        request.extensions_mut().insert(reached.clone());
        let reply = mcp.handle(request).await;
        return match asked {
            Some(asked) if !reached.get() => unmade(&gate, asked, reply).await,
            _ => reply.map(|body| boxed(body.map_err(|error: Infallible| match error {}))),
        };
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

/// A message that was posted to the MCP server.
struct Posted {
    /// The tool that is called, or the path if the message is no call or its tool is unknown.
    target: String,
    body: Bytes,
    id: Value,
    /// Whether the message is a call or may be one.
    is_call: bool,
}

impl Posted {
    /// Creates it from the message's JSON.
    fn of(body: &Bytes, value: &Value) -> Self {
        let method = value.get("method");
        // A JSON-RPC response is not a call.
        let answers = value.get("result").is_some() || value.get("error").is_some();
        let tool = value.pointer("/params/name").and_then(Value::as_str).filter(|_| method.is_some());
        let id = value.get("id").filter(|id| id.is_string() || id.is_i64()).cloned();
        let is_call = method.map_or(!answers, |method| method == "tools/call");
        Self {
            target: tool.filter(|_| is_call).unwrap_or("/mcp").to_owned(),
            body: body.clone(),
            id: id.unwrap_or_default(),
            is_call,
        }
    }
}

/// Records a message that the MCP library rejected although it was meant as a call or may have been one. Returns a reply with a rule.
async fn unmade<B>(gate: &Gate, posted: Posted, reply: Response<B>) -> Response<Body>
where
    B: hyper::body::Body<Data = Bytes, Error = Infallible> + Send + 'static,
{
    let (mut parts, body) = reply.into_parts();
    let streams =
        parts.headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/event"));
    // Requests for missing features (prompts, resources, another version) get the protocol's own reply.
    let refuses = matches!(parts.status.as_u16(), 403 | 406 | 411 | 413 | 415);
    if streams || !(posted.is_call || refuses) {
        return Response::from_parts(parts, boxed(body.map_err(|error: Infallible| match error {})));
    }
    let said = Limited::new(body, LONGEST_ANSWER).collect().await.map(|said| said.to_bytes()).unwrap_or_default();
    let parsed: Value = serde_json::from_slice(&said).unwrap_or_default();
    let text = String::from_utf8_lossy(&said);
    let why = parsed.pointer("/error/message").and_then(Value::as_str).unwrap_or(text.trim());
    let reason = match parts.status.as_u16() {
        406 => "expected both application/json and text/event-stream in the accept header, as MCP requires".to_owned(),
        415 => "expected application/json in the content-type header, as MCP requires".to_owned(),
        status => format!(
            "expected a valid MCP message, found one that cannot be handled (HTTP {status}): {}",
            if why.is_empty() { "it has no id, so it gets no answer" } else { why }
        ),
    };
    let denial = Denial { rule: Rule::Request, reason: shorten_to(&reason, 1024) };
    let digest = Some(gate.salt().bytes(&posted.body));
    let denial = gate.deny(Channel::Tool, &posted.target, digest, denial).await;
    if parsed.is_object() || said.is_empty() {
        // The library's reply is a JSON-RPC error with a reason, or has no body, so it stays.
        return Response::from_parts(parts, boxed(Full::from(said).map_err(|error: Infallible| match error {})));
    }
    let refusal = refusal(&posted.id, &denial);
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    parts.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(parts, refusal.into_body())
}

/// Returns the request with its body read, and the posted message, if the body is JSON that can be parsed in one way only. rmcp keeps the
/// last of two members with one name, and what it takes for a call must be the same for every other parser.
///
/// The arguments of a call are taken out as they were parsed, so that they are parsed once.
async fn readable(
    gate: &Arc<Gate>,
    request: Request<Incoming>,
) -> Result<(Request<Full<Bytes>>, Option<Posted>), Response<Body>> {
    let (mut parts, body) = request.into_parts();
    let body = match Limited::new(body, LONGEST_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => {
            let denial = Denial { rule: Rule::Request, reason: format!("the request cannot be read: {error}") };
            let denial = gate.deny(Channel::Tool, "/mcp", None, denial).await;
            return Err(refusal(&Value::Null, &denial));
        }
    };
    // A request that is not a POST has no body, and rmcp does not act on one.
    if parts.method != Method::POST {
        return Ok((Request::from_parts(parts, Full::from(body)), None));
    }
    let most = gate.contracts().longest_text();
    if body.len() > most {
        let reason = format!(
            "the request is {} bytes long, and no contract takes arguments that need more than {most}; send less",
            body.len()
        );
        let digest = Some(gate.salt().bytes(&body));
        let denial = gate.deny(Channel::Tool, "/mcp", digest, Denial { rule: Rule::ToolRequestBytes, reason }).await;
        return Err(refusal(&Value::Null, &denial));
    }
    let parsed = match body.len() {
        ..=SHORT_BODY => read(&body),
        _ => {
            let body = body.clone();
            match apart::judge(&readings(), apart::LONGEST, move || read(&body)).await {
                Ok(parsed) => parsed,
                Err(unjudged) => {
                    let denial = Denial { rule: Rule::Busy, reason: unjudged.to_string() };
                    let denial = gate.deny(Channel::Tool, "/mcp", None, denial).await;
                    return Err(refusal(&Value::Null, &denial));
                }
            }
        }
    };
    let ambiguous = match parsed {
        Ok(Message { posted, call: None }) => {
            return Ok((Request::from_parts(parts, Full::from(body)), Some(posted)));
        }
        Ok(Message { posted, call: Some((arguments, around)) }) => {
            parts.extensions.insert(arguments);
            parts.headers.remove(header::CONTENT_LENGTH);
            return Ok((Request::from_parts(parts, Full::from(around)), Some(posted)));
        }
        Err(ambiguous) => ambiguous,
    };
    // Only a message that certainly is not a call goes unrecorded.
    let loose = loosely(&body);
    let mut denial = Denial { rule: Rule::RequestJson, reason: ambiguous.to_string() };
    if loose.get("method").is_none_or(|method| method == "tools/call") {
        let tool = loose.pointer("/params/name").and_then(Value::as_str).unwrap_or("/mcp");
        let digest = Some(gate.salt().bytes(&body));
        denial = gate.deny(Channel::Tool, tool, digest, denial).await;
    }
    let id = loose.get("id").filter(|id| id.is_string() || id.is_i64());
    Err(refusal(id.unwrap_or(&Value::Null), &denial))
}

/// Parses what identifies the call of a message, even if the message can be parsed in more than one way.
fn loosely(body: &[u8]) -> Value {
    // A long message could have too many values to build.
    if body.len() > SHORT_BODY { Value::Null } else { serde_json::from_slice(body).unwrap_or_default() }
}

/// A posted message, as it was parsed.
struct Message {
    posted: Posted,
    /// The arguments of a call, and the message without them.
    call: Option<(Read, Vec<u8>)>,
}

/// Parses a message.
///
/// # Errors
/// Returns an error if the text is not JSON or can be parsed in two ways.
fn read(body: &Bytes) -> Result<Message, Ambiguous> {
    let mut message = json::parse(body)?;
    let posted = Posted::of(body, &message);
    let is_call = message.get("method").is_some_and(|method| method == "tools/call");
    let params = message.get_mut("params").filter(|_| is_call).and_then(Value::as_object_mut);
    let Some(Value::Object(arguments)) = params.and_then(|params| params.get_mut("arguments")).map(Value::take) else {
        return Ok(Message { posted, call: None });
    };
    let around = serde_json::to_vec(&message).map_err(|error| Ambiguous(error.to_string()))?;
    Ok(Message { posted, call: Some((Read::new(arguments, body.len()), around)) })
}

/// Returns the JSON-RPC error -32700: the message cannot be parsed.
fn refusal(id: &Value, denial: &Denial) -> Response<Body> {
    let message = denial.told("request");
    let error = serde_json::json!({"jsonrpc": "2.0", "id": id, "error": {"code": -32700, "message": message}});
    let mut reply = Response::new(boxed(Full::from(error.to_string()).map_err(|error: Infallible| match error {})));
    *reply.status_mut() = StatusCode::BAD_REQUEST;
    reply.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    reply
}

fn status(status: StatusCode) -> Response<Body> {
    let mut reply = Response::new(boxed(Empty::new().map_err(|error: Infallible| match error {})));
    *reply.status_mut() = status;
    reply
}
