//! Upstreams on loopback: an MCP server whose tools can be changed, an HTTP API, and a model.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, RawQuery, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{any, get, post},
};
use futures::StreamExt;
use rmcp::{
    ErrorData, RoleServer, ServerHandler,
    model::{
        CallToolRequestParams, CallToolResponse, CallToolResult, ContentBlock, ListToolsResult, PaginatedRequestParams,
        ResourceContents, ServerCapabilities, ServerConfig, Tool, ToolAnnotations,
    },
    service::RequestContext,
    transport::streamable_http_server::{
        StreamableHttpServerConfig, StreamableHttpService, session::local::LocalSessionManager,
    },
};
use serde_json::{Value, json};

/// The MCP server.
#[derive(Clone)]
pub struct Tools {
    pub calls: Arc<AtomicUsize>,
    pub listed: Arc<Mutex<Vec<Tool>>>,
}

/// The requests that the API got: method, path and query, body.
pub type Asked = Arc<Mutex<Vec<(String, String, String)>>>;

/// Returns the tools that the server lists at first.
pub fn listed() -> Vec<Tool> {
    let tool = |name: &'static str| {
        let schema = json!({"type": "object", "properties": {"text": {"type": "string"}}});
        Tool::new(name, format!("{name}, by the upstream"), Arc::new(schema.as_object().unwrap().clone()))
    };
    let mut destroy = tool("destroy");
    destroy.annotations = Some(ToolAnnotations::from_raw(None, None, Some(true), None, None));
    let mut harmless = tool("harmless");
    harmless.annotations = Some(ToolAnnotations::from_raw(None, Some(true), Some(false), None, None));
    let mut all = vec![destroy, harmless];
    all.extend(["echo", "weather", "slow", "big"].map(tool));
    all.extend(
        [
            "simple_text",
            "image_content",
            "audio_content",
            "embedded_resource",
            "multiple_content_types",
            "error_handling",
        ]
        .map(|name| tool(Box::leak(format!("test_{name}").into_boxed_str()))),
    );
    all
}

impl ServerHandler for Tools {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
    }

    /// Returns the tools in two pages, so that every client has to request the second page.
    async fn list_tools(
        &self,
        page: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        let listed = self.listed.lock().unwrap().clone();
        let (first, second) = listed.split_at(listed.len() / 2);
        Ok(match page.and_then(|page| page.cursor) {
            None => {
                let mut page = ListToolsResult::with_all_items(first.to_vec());
                page.next_cursor = Some("second".into());
                page
            }
            Some(_) => ListToolsResult::with_all_items(second.to_vec()),
        })
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        _: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let args = Value::from(request.arguments.unwrap_or_default());
        let text = |text: &str| CallToolResult::success(vec![ContentBlock::text(text)]);
        const PIXEL: &str =
            "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
        let picture = || ContentBlock::image(PIXEL, "image/png");
        let resource = || {
            ContentBlock::resource(ResourceContents::TextResourceContents {
                uri: "test://embedded-resource".into(),
                mime_type: Some("text/plain".into()),
                text: "This is an embedded resource content.".into(),
                meta: None,
            })
        };
        let result = match request.name.as_ref() {
            "weather" if args["how"] == "text" => text(&args["is"].to_string()),
            "weather" if args["how"] == "prose" => text("it is fine"),
            "weather" if args["how"] == "error" => CallToolResult::error(vec![ContentBlock::text("no weather")]),
            "weather" => CallToolResult::structured(args["is"].clone()),
            "slow" => {
                tokio::time::sleep(Duration::from_millis(args["ms"].as_u64().unwrap_or(0))).await;
                text("slept")
            }
            "big" => text(&"x".repeat(usize::try_from(args["n"].as_u64().unwrap_or(0)).unwrap())),
            "test_simple_text" => text("This is a simple text response for testing."),
            "test_image_content" => CallToolResult::success(vec![picture()]),
            "test_audio_content" => CallToolResult::success(vec![ContentBlock::audio("UklGRiQAAABXQVZF", "audio/wav")]),
            "test_embedded_resource" => CallToolResult::success(vec![resource()]),
            "test_multiple_content_types" => {
                CallToolResult::success(vec![ContentBlock::text("Multiple content types test:"), picture(), resource()])
            }
            "test_error_handling" => {
                CallToolResult::error(vec![ContentBlock::text("This tool intentionally returns an error for testing")])
            }
            _ => text(&format!("echo: {}", args["text"].as_str().unwrap_or_default())),
        };
        Ok(CallToolResponse::Complete(result))
    }
}

/// Starts the MCP server. `/mcp` has sessions and event streams, `/json` has neither.
pub async fn mcp() -> (SocketAddr, Tools) {
    let tools = Tools { calls: Arc::default(), listed: Arc::new(Mutex::new(listed())) };
    let service = |stateless: bool| {
        let tools = tools.clone();
        let mut config = StreamableHttpServerConfig::default();
        config.allowed_hosts = vec!["tools.test".into()];
        config.legacy_session_mode = !stateless;
        config.json_response = stateless;
        let sessions: Arc<LocalSessionManager> = Arc::default();
        let service = StreamableHttpService::new(move || Ok(tools.clone()), sessions, config);
        any(move |request: axum::extract::Request| {
            let service = service.clone();
            async move { service.handle(request).await.map(Body::new) }
        })
    };
    let router = Router::new().route("/mcp", service(false)).route("/json", service(true));
    (serve(router).await, tools)
}

/// Starts the API.
pub async fn api() -> (SocketAddr, Asked) {
    let asked = Asked::default();
    let reply = |status: u16, kind: &'static str, body: Body| {
        (StatusCode::from_u16(status).unwrap(), [(header::CONTENT_TYPE, kind)], body).into_response()
    };
    async fn echo(
        State(asked): State<Asked>,
        method: axum::http::Method,
        uri: axum::http::Uri,
        RawQuery(query): RawQuery,
        body: Bytes,
    ) -> Json<Value> {
        let body = String::from_utf8_lossy(&body).into_owned();
        let path = uri.path().to_owned();
        let at = query.map_or(path.clone(), |query| format!("{path}?{query}"));
        asked.lock().unwrap().push((method.to_string(), at.clone(), body.clone()));
        Json(json!({"method": method.as_str(), "at": at, "body": body}))
    }
    let router = Router::new()
        .route("/items/{id}", any(echo))
        .route("/items", any(echo))
        // Requests for other paths are recorded too, so that tests can find them.
        .fallback(echo)
        .route("/weather", post(|Json(asked): Json<Value>| async move { Json(asked["is"].clone()) }))
        .route(
            "/slow/{ms}",
            any(|Path(ms): Path<u64>| async move {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                "slept"
            }),
        )
        .route("/big/{n}", get(|Path(n): Path<usize>| async move { "x".repeat(n) }))
        .route(
            "/status/{code}",
            any(move |Path(code): Path<u16>| async move { reply(code, "text/plain", Body::from("so it is")) }),
        )
        .route(
            "/verbose/{n}",
            post(|Path(n): Path<usize>| async move {
                let header = |index| (format!("x-{index}"), "h".repeat(1_000));
                axum::response::AppendHeaders((0..n).map(header).collect::<Vec<_>>())
                    .into_response()
                    .map(|_| Body::from("said much"))
            }),
        )
        .route("/zip", get(move || async move { reply(200, "application/zip", Body::from("PK")) }))
        .route("/liar", get(move || async move { reply(200, "application/json", Body::from("<html>")) }))
        .route(
            "/torn",
            any(|| async {
                let pieces = futures::stream::unfold(0, |piece| async move {
                    match piece {
                        0 => Some((Ok(Bytes::from_static(b"{\"half\":")), 1)),
                        _ => {
                            tokio::time::sleep(Duration::from_millis(50)).await;
                            Some((Err(std::io::Error::other("torn")), 2))
                        }
                    }
                });
                ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(pieces))
            }),
        )
        .with_state(asked.clone());
    (serve(router).await, asked)
}

/// Starts the model.
pub async fn model() -> SocketAddr {
    serve(Router::new().fallback(completion).layer(axum::extract::DefaultBodyLimit::disable())).await
}

/// Returns the reply of a model that calls the tool `pay` until it has a result.
fn scripted(messages: &[Value]) -> Value {
    let content = messages.last().map_or(&Value::Null, |message| &message["content"]);
    let parts = content.as_array().into_iter().flatten().filter_map(|part| part["text"].as_str());
    let last = content.as_str().map_or_else(|| parts.collect::<String>(), str::to_owned);
    let answered = messages.last().is_some_and(|message| message["role"] == "tool") && !last.contains("pending");
    let (message, reason) = if answered {
        (json!({"role": "assistant", "content": format!("the tool said: {last}")}), "stop")
    } else {
        let function = json!({"name": "pay", "arguments": r#"{"text":"hello"}"#});
        let call = json!({"id": format!("call_{}", messages.len()), "type": "function", "function": function});
        (json!({"role": "assistant", "content": null, "tool_calls": [call]}), "tool_calls")
    };
    json!({
        "id": "c", "object": "chat.completion", "created": 0, "model": "scripted",
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
    })
}

async fn completion(body: Bytes) -> Response {
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    if let ("scripted", Some(messages)) = (asked["model"].as_str().unwrap_or_default(), asked["messages"].as_array()) {
        return Json(scripted(messages)).into_response();
    }
    // A request can choose the usage that the model reports.
    let usage = asked.pointer("/metadata/usage").cloned();
    let usage = usage.unwrap_or_else(|| json!({"prompt_tokens": 7, "completion_tokens": 5}));
    let delta = || format!("data: {}\n\n", json!({"choices": [{"delta": {"content": "hello"}}]}));
    let events = |events: futures::stream::BoxStream<'static, Result<String, std::io::Error>>| {
        ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(events)).into_response()
    };
    // A request can also choose one of the ways in which providers fail.
    match asked.pointer("/metadata/fails").and_then(Value::as_str) {
        Some("overloaded") => {
            let error = json!({"type": "error", "error": {"type": "overloaded_error", "message": "try again"}});
            return (StatusCode::from_u16(529).unwrap(), Json(error)).into_response();
        }
        Some("thinks") => tokio::time::sleep(Duration::from_millis(300)).await,
        Some("is silent") => std::future::pending().await,
        Some("hangs up") => {
            let cut = async {
                tokio::time::sleep(Duration::from_millis(200)).await;
                Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset))
            };
            let said = futures::stream::iter([Ok(delta()), Ok(delta())]);
            return events(said.chain(futures::stream::once(cut)).boxed());
        }
        Some("ends early") => return events(futures::stream::iter([Ok(delta()), Ok(delta())]).boxed()),
        Some("says so") => {
            let error = format!("data: {}\n\n", json!({"error": {"code": 502, "message": "gone"}}));
            return events(futures::stream::iter([Ok(delta()), Ok(error)]).boxed());
        }
        // The reply is complete, but the connection stays open.
        Some("lingers") => {
            let account = format!("data: {}\n\n", json!({"choices": [], "usage": usage}));
            let all = futures::stream::iter([Ok(delta()), Ok(account), Ok("data: [DONE]\n\n".to_owned())]);
            return events(all.chain(futures::stream::pending()).boxed());
        }
        // A part of the reply arrives at once, and the rest later or never.
        Some("takes its time") => {
            let later = futures::stream::once(async move {
                tokio::time::sleep(Duration::from_millis(500)).await;
                Ok(format!("data: {}\n\ndata: [DONE]\n\n", json!({"choices": [], "usage": usage})))
            });
            return events(futures::stream::iter([Ok(delta())]).chain(later).boxed());
        }
        Some("never ends") => {
            return events(futures::stream::iter([Ok(delta())]).chain(futures::stream::pending()).boxed());
        }
        Some("says much") => {
            let much = json!({"choices": [{"delta": {"content": "word ".repeat(640)}}]});
            let all = format!("data: {much}\n\ndata: {}\n\ndata: [DONE]\n\n", json!({"choices": [], "usage": usage}));
            let all = Body::from_stream(futures::stream::iter([Ok::<_, Infallible>(all)]));
            return ([(header::CONTENT_TYPE, "Text/Event-Stream; charset=utf-8")], all).into_response();
        }
        // The reply never ends.
        Some("rambles") => {
            return events(
                futures::stream::repeat_with(move || Ok(delta()))
                    .then(async |event| {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                        event
                    })
                    .boxed(),
            );
        }
        _ => {}
    }
    if !String::from_utf8_lossy(&body).contains(r#""stream":true"#) {
        return Json(json!({"choices": [], "usage": usage})).into_response();
    }
    let chunks = [
        format!("data: {}\n\n", json!({"choices": [{"delta": {"content": "a"}}]})),
        format!("data: {}\n\n", json!({"choices": [], "usage": usage})),
        "data: [DONE]\n\n".into(),
    ];
    let body = Body::from_stream(futures::stream::iter(chunks.map(Ok::<_, Infallible>)));
    ([(header::CONTENT_TYPE, "text/event-stream")], body).into_response()
}

/// Starts a listener that accepts connections and never answers.
pub async fn silent() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    address
}

async fn serve(router: Router) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = hyper_util::service::TowerToHyperService::new(router.clone());
            tokio::spawn(async move {
                let io = hyper_util::rt::TokioIo::new(stream);
                let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
            });
        }
    });
    address
}
