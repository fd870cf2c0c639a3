//! Tests each version of MCP that begins with `initialize`: with an agent that requests it, and with an upstream that speaks no other.

use std::sync::Mutex;

use axum::{
    http::HeaderMap,
    response::{IntoResponse, Response},
};

use super::*;

const VERSION: &str = "mcp-protocol-version";
/// The versions that begin with `initialize`, and the newest of them.
const VERSIONS: [&str; 4] = ["2024-11-05", "2025-03-26", "2025-06-18", NEWEST];
const NEWEST: &str = "2025-11-25";

/// The version that a client names in each request after `initialize`: a header that came with 2025-06-18.
fn named(version: &'static str) -> Option<&'static str> {
    (version >= "2025-06-18").then_some(version)
}

/// Sends one message as an agent's client does, with this header.
async fn said(harness: &Harness, version: Option<&str>, message: &Value) -> (StatusCode, Value) {
    let client: Client<HttpConnector, Full<bytes::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let mut request = Request::post(format!("http://{}/mcp", harness.address))
        .header("content-type", "application/json")
        .header("accept", "application/json, text/event-stream");
    if let Some(version) = version {
        request = request.header(VERSION, version);
    }
    let reply = client.request(request.body(Full::from(message.to_string())).unwrap()).await.unwrap();
    let status = reply.status();
    let body = reply.into_body().collect().await.unwrap().to_bytes();
    let read = serde_json::from_slice(&body);
    (status, read.unwrap_or_else(|_| Value::from(String::from_utf8_lossy(&body).into_owned())))
}

fn initialize(version: &str) -> Value {
    let client = json!({"name": "agent", "version": "1"});
    let params = json!({"protocolVersion": version, "capabilities": {}, "clientInfo": client});
    json!({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params})
}

fn request(id: u32, method: &str, params: Value) -> Value {
    json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params})
}

#[tokio::test]
async fn an_agent_of_each_version_is_answered_in_it_and_calls_tools() {
    for version in VERSIONS {
        agent_of(version).await;
    }
}

async fn agent_of(version: &'static str) {
    let harness = harness().await;
    let (status, reply) = said(&harness, None, &initialize(version)).await;
    assert_eq!((status, &reply["id"]), (StatusCode::OK, &json!(0)), "{reply}");
    let result = &reply["result"];
    assert_eq!(result["protocolVersion"], version, "{reply}");
    assert!(result["capabilities"]["tools"].is_object() && result["serverInfo"]["name"] == "belay", "{reply}");
    assert!(result["capabilities"].get("prompts").is_none() && result["capabilities"].get("resources").is_none());

    let ready = json!({"jsonrpc": "2.0", "method": "notifications/initialized"});
    assert_eq!(said(&harness, named(version), &ready).await.0, StatusCode::ACCEPTED);
    let (status, listed) = said(&harness, named(version), &request(1, "tools/list", json!({}))).await;
    let names: Vec<_> =
        listed["result"]["tools"].as_array().unwrap().iter().map(|tool| tool["name"].as_str().unwrap()).collect();
    assert_eq!((status, names), (StatusCode::OK, vec!["again", "pay", "say"]), "{listed}");

    let call = |id, name, text| request(id, "tools/call", json!({"name": name, "arguments": {"text": text}}));
    let (status, called) = said(&harness, named(version), &call(2, "say", "hello")).await;
    assert_eq!((status, &called["id"]), (StatusCode::OK, &json!(2)), "{called}");
    assert_eq!(called["result"]["content"][0]["text"], "echo: hello", "{called}");
    assert_ne!(called["result"]["isError"], true, "{called}");
    // A denial is a result in each version: the model sees it.
    let (status, refused) = said(&harness, named(version), &call(3, "pay", "hello")).await;
    assert_eq!((status, &refused["result"]["isError"]), (StatusCode::OK, &json!(true)), "{refused}");
    assert!(refused["result"]["content"][0]["text"].as_str().unwrap().contains("tool.effect"), "{refused}");
    assert_eq!(harness.mcp.calls.load(Ordering::SeqCst), 1);
}

/// By the specification, a server answers a version that it does not speak with one that it speaks, the newest if it can.
#[tokio::test]
async fn an_agent_of_another_version_is_offered_the_newest() {
    let harness = harness().await;
    for version in ["1999-01-01", "2025-06-19", "2099-12-31", "latest", ""] {
        let (status, reply) = said(&harness, None, &initialize(version)).await;
        assert_eq!(
            (status, &reply["result"]["protocolVersion"]),
            (StatusCode::OK, &json!(NEWEST)),
            "{version}: {reply}"
        );
    }
}

/// By the specification, a request with a header of a version that the server does not speak gets 400. Nothing is called, and a call is
/// recorded as denied.
#[tokio::test]
async fn a_header_of_another_version_is_a_bad_request() {
    let harness = harness().await;
    let call = request(1, "tools/call", json!({"name": "say", "arguments": {"text": "hello"}}));
    let list = request(2, "tools/list", json!({}));
    for version in ["1999-01-01", "2025-06-19", "2099-12-31", "latest", ""] {
        for message in [&list, &call] {
            let (status, reply) = said(&harness, Some(version), message).await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{version:?}: {reply}");
        }
    }
    assert_eq!(harness.mcp.calls.load(Ordering::SeqCst), 0);
    let records = harness.stored(2).await;
    assert!(denied(&records).iter().all(|rule| *rule == Rule::Request), "{records:#?}");
    assert_eq!(records.last().unwrap().usage.denials, 5, "each call, and no list");
    // The control: the same call with a header that is known, and without one.
    for (n, version) in [Some("2025-06-18"), None].into_iter().enumerate() {
        let (status, reply) = said(&harness, version, &call).await;
        assert_eq!(
            (status, &reply["result"]["content"][0]["text"]),
            (StatusCode::OK, &json!("echo: hello")),
            "{reply}"
        );
        assert_eq!(harness.mcp.calls.load(Ordering::SeqCst), n + 1);
    }
}

/// The header and the method of each message that an upstream got.
type Got = Arc<Mutex<Vec<(Option<String>, String)>>>;

/// An MCP server that speaks this version and no other, as servers of its time did.
async fn upstream_of(version: &'static str) -> (SocketAddr, Got) {
    let got = Got::default();
    let log = got.clone();
    let answer = move |headers: HeaderMap, axum::Json(asked): axum::Json<Value>| {
        let log = log.clone();
        async move { answered(version, &log, &headers, &asked) }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = axum::Router::new().route("/mcp", axum::routing::post(answer));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (address, got)
}

fn answered(version: &'static str, log: &Got, headers: &HeaderMap, asked: &Value) -> Response {
    let header = headers.get(VERSION).map(|value| value.to_str().unwrap().to_owned());
    let method = asked["method"].as_str().unwrap_or_default();
    log.lock().unwrap().push((header.clone(), method.to_owned()));
    if named(version).is_some() && method != "initialize" && header.is_some_and(|header| header != version) {
        return (StatusCode::BAD_REQUEST, "Bad Request: Unsupported protocol version").into_response();
    }
    if asked.get("id").is_none() {
        return StatusCode::ACCEPTED.into_response();
    }
    let result = match method {
        "initialize" => json!({
            "protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": {"name": "old", "version": "1"},
        }),
        "tools/list" => json!({"tools": [{"name": "echo", "inputSchema": {"type": "object"}}]}),
        "tools/call" => json!({"content": [{"type": "text", "text": format!("in {version}")}]}),
        _ => {
            let error = json!({"code": -32601, "message": "Method not found"});
            return axum::Json(json!({"jsonrpc": "2.0", "id": asked["id"], "error": error})).into_response();
        }
    };
    axum::Json(json!({"jsonrpc": "2.0", "id": asked["id"], "result": result})).into_response()
}

#[tokio::test]
async fn an_upstream_of_each_version_is_listed_and_called_in_it() {
    for version in VERSIONS {
        upstream_is_called_in(version).await;
    }
}

async fn upstream_is_called_in(version: &'static str) {
    let mut policy = policy(LIMITS);
    let upstream = McpUpstream { url: "http://old.test/mcp".into(), tool: "echo".into(), digest: None };
    policy.tools.push(tool("old", Upstream::Mcp(upstream), SideEffect::Write));
    policy.egress.push(host("old.test", &[80], EgressUse::Tools));
    let (address, got) = upstream_of(version).await;
    let harness = harness_of(policy, vec![("old.test".to_owned(), address)]).await;
    let (error, text) = harness.tool("old", json!({})).await;
    assert!(!error && text == format!("in {version}"), "{text}: {:?}", got.lock().unwrap());
    // Once the server has said its version, every message names that one, or none where there was no header.
    let got = got.lock().unwrap().clone();
    let begun = got.iter().rposition(|(_, method)| method == "initialize").unwrap();
    let methods: Vec<_> = got[begun..].iter().map(|(_, method)| method.as_str()).collect();
    assert_eq!(methods, ["initialize", "notifications/initialized", "tools/list", "tools/call"], "{got:?}");
    for (header, method) in &got[begun + 1..] {
        match named(version) {
            Some(version) => assert_eq!(header.as_deref(), Some(version), "{method}"),
            None => assert!(header.as_deref().is_none_or(|header| header == version), "{method}: {header:?}"),
        }
    }
}
