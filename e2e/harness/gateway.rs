//! A gateway that witnesses and forwards, and asks nobody who is calling.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{any, post},
};
use belay::{
    evidence::{
        merkle::Tree,
        note::{self, VerifierKey},
        record::{Event, Record},
        segment::Segment,
    },
    policy::{config::Usage, rule::Rule},
    wire::{self, AppendReply, AppendRequest, OpenReply, Refusal},
};
use futures::stream::BoxStream;
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use rmcp::{
    ErrorData, RoleServer, ServerHandler,
    model::{
        CallToolRequestParams, CallToolResponse, CallToolResult, ClientJsonRpcMessage, ContentBlock,
        ServerCapabilities, ServerConfig,
    },
    service::RequestContext,
    transport::{
        streamable_http_client::{SseError, StreamableHttpClient, StreamableHttpError, StreamableHttpPostResponse},
        streamable_http_server::{
            StreamableHttpServerConfig, StreamableHttpService, session::local::LocalSessionManager,
        },
    },
};
use serde_json::json;
use sse_stream::Sse;
use tower::Service;

/// The stand-in.
pub struct Gateway {
    pub address: SocketAddr,
    pub ca: String,
    state: Arc<Log>,
}

struct Log {
    records: Mutex<Vec<Vec<u8>>>,
    tree: Mutex<Tree>,
    key: Mutex<Option<VerifierKey>>,
    fails: AtomicBool,
    saw: Mutex<Vec<String>>,
    calls: Arc<AtomicUsize>,
    mcp: StreamableHttpService<Echo, LocalSessionManager>,
}

impl Gateway {
    pub async fn start() -> Self {
        let certified = rcgen::generate_simple_self_signed([wire::SERVER_NAME.to_owned()]).unwrap();
        let key = rustls_pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], key)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let echo = Echo(calls.clone());
        let mut mcp = StreamableHttpServerConfig::default();
        mcp.allowed_hosts = vec!["tools.test".into()];
        let state = Arc::new(Log {
            records: Mutex::default(),
            tree: Mutex::new(Tree::new()),
            key: Mutex::default(),
            fails: AtomicBool::new(false),
            saw: Mutex::default(),
            calls,
            mcp: StreamableHttpService::new(move || Ok(echo.clone()), Arc::default(), mcp),
        });
        let router = Router::new()
            .route(wire::LOG_OPEN, post(open))
            .route(wire::LOG_APPEND, post(append))
            .route(wire::FORWARD, any(forward))
            .with_state(state.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, router) = (acceptor.clone(), router.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = hyper::service::service_fn(move |mut request: Request<hyper::body::Incoming>| {
                        let mut router = router.clone();
                        async move {
                            if request.method() == http::Method::CONNECT {
                                let upgrade = hyper::upgrade::on(&mut request);
                                tokio::spawn(async move { drop(upgrade.await) });
                                return Ok::<_, Infallible>(Response::new(Body::empty()));
                            }
                            router.call(request.map(Body::new)).await
                        }
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .with_upgrades()
                        .await;
                });
            }
        });
        Self { address, ca: certified.cert.pem(), state }
    }

    /// What has been witnessed.
    pub fn records(&self) -> Vec<Record> {
        self.state.records.lock().unwrap().iter().map(|bytes| serde_json::from_slice(bytes).unwrap()).collect()
    }

    /// Requests as they would have gone to upstreams, headers and bodies.
    pub fn saw(&self) -> Vec<String> {
        self.state.saw.lock().unwrap().clone()
    }

    /// Calls that reached the tool.
    pub fn calls(&self) -> usize {
        self.state.calls.load(Ordering::SeqCst)
    }

    pub fn store_fails(&self, fails: bool) {
        self.state.fails.store(fails, Ordering::SeqCst);
    }
}

async fn open() -> impl IntoResponse {
    axum::Json(OpenReply {
        origin: note::origin("uid"),
        size: 0,
        frontier: vec![],
        usage: Usage::default(),
        open_calls: 0,
    })
}

async fn append(State(log): State<Arc<Log>>, axum::Json(request): axum::Json<AppendRequest>) -> Response {
    if log.fails.load(Ordering::SeqCst) {
        let refusal = Refusal { rule: Rule::Evidence, reason: "the bucket is away".into() };
        return (StatusCode::SERVICE_UNAVAILABLE, [(wire::RULE, refusal.rule.as_str())], axum::Json(refusal))
            .into_response();
    }
    let segment = Segment::parse(request.segment.as_bytes()).unwrap();
    let mut tree = log.tree.lock().unwrap();
    let extended = segment.extend(&tree).expect("the checkpoint is not that of the records");
    let mut key = log.key.lock().unwrap();
    if let Event::AttemptOpened(opened) = &segment.decode().unwrap()[0].event {
        *key = Some(opened.key.parse().unwrap());
    }
    segment.note.verify(key.as_ref().expect("the log does not begin with attempt.opened")).unwrap();
    log.records.lock().unwrap().extend(segment.records.clone());
    *tree = extended;
    axum::Json(AppendReply { size: tree.size(), checkpoint: segment.note.to_string() }).into_response()
}

async fn forward(State(log): State<Arc<Log>>, request: Request<Body>) -> Response {
    let (mut parts, body) = request.into_parts();
    assert_eq!(parts.headers[header::AUTHORIZATION], "Bearer the-token");
    let intent: u64 = parts.headers[wire::INTENT].to_str().unwrap().parse().unwrap();
    assert!(intent < log.tree.lock().unwrap().size(), "a call came before its intent");
    let target: http::Uri = parts.headers[wire::TARGET].to_str().unwrap().parse().unwrap();
    parts.headers.remove(header::AUTHORIZATION);
    let body = body.collect().await.unwrap().to_bytes();
    log.saw.lock().unwrap().push(format!("{target} {:?} {}", parts.headers, String::from_utf8_lossy(&body)));
    let mut reply = if target.host() == Some("tools.test") {
        parts.headers.insert(header::HOST, HeaderValue::from_static("tools.test"));
        parts.uri = target;
        log.mcp.handle(Request::from_parts(parts, Full::new(body))).await.map(Body::new)
    } else {
        model(&body)
    };
    reply.headers_mut().insert(wire::UPSTREAM, HeaderValue::from_static("127.0.0.1:1"));
    reply
}

fn model(body: &Bytes) -> Response {
    let usage = json!({"prompt_tokens": 7, "completion_tokens": 5});
    if !String::from_utf8_lossy(body).contains(r#""stream":true"#) {
        return axum::Json(json!({"choices": [], "usage": usage})).into_response();
    }
    let chunks = [
        format!("data: {}\n\n", json!({"choices": [{"delta": {"content": "a"}}]})),
        format!("data: {}\n\n", json!({"choices": [], "usage": usage})),
        "data: [DONE]\n\n".into(),
    ];
    let body = Body::from_stream(futures::stream::iter(chunks.map(Ok::<_, Infallible>)));
    ([(header::CONTENT_TYPE, "text/event-stream")], body).into_response()
}

/// A tool that counts.
#[derive(Clone)]
struct Echo(Arc<AtomicUsize>);

impl ServerHandler for Echo {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        _: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let text = request.arguments.unwrap_or_default()["text"].as_str().unwrap_or_default().to_owned();
        Ok(CallToolResponse::Complete(CallToolResult::success(vec![ContentBlock::text(format!("echo: {text}"))])))
    }
}

/// rmcp's client over plain HTTP: what an agent in the pod has.
#[derive(Clone)]
pub struct Plain(Client<HttpConnector, Full<Bytes>>);

impl Default for Plain {
    fn default() -> Self {
        Self(Client::builder(TokioExecutor::new()).build_http())
    }
}

impl StreamableHttpClient for Plain {
    type Error = std::io::Error;

    async fn post_message(
        &self,
        uri: Arc<str>,
        message: ClientJsonRpcMessage,
        _: Option<Arc<str>>,
        _: Option<String>,
        headers: HashMap<HeaderName, HeaderValue>,
    ) -> Result<StreamableHttpPostResponse, StreamableHttpError<Self::Error>> {
        let mut request = Request::post(uri.as_ref())
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json, text/event-stream")
            .body(Full::from(serde_json::to_vec(&message)?))
            .unwrap();
        let extra: HeaderMap = headers.into_iter().collect();
        request.headers_mut().extend(extra);
        let reply = self.0.request(request).await.map_err(std::io::Error::other)?;
        let status = reply.status();
        let body = reply.into_body().collect().await.map_err(std::io::Error::other)?.to_bytes();
        if status == StatusCode::ACCEPTED {
            return Ok(StreamableHttpPostResponse::Accepted);
        }
        let message = serde_json::from_slice(&body)
            .unwrap_or_else(|error| panic!("{status} {error}: {}", String::from_utf8_lossy(&body)));
        Ok(StreamableHttpPostResponse::Json(message, None))
    }

    async fn delete_session(
        &self,
        _: Arc<str>,
        _: Arc<str>,
        _: Option<String>,
        _: HashMap<HeaderName, HeaderValue>,
    ) -> Result<(), StreamableHttpError<Self::Error>> {
        Ok(())
    }

    async fn get_stream(
        &self,
        _: Arc<str>,
        _: Option<Arc<str>>,
        _: Option<String>,
        _: Option<String>,
        _: HashMap<HeaderName, HeaderValue>,
    ) -> Result<BoxStream<'static, Result<Sse, SseError>>, StreamableHttpError<Self::Error>> {
        Err(StreamableHttpError::ServerDoesNotSupportSse)
    }
}
