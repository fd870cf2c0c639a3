//! Traffic that passes in any form: MCP that a server compresses although the client did not ask for it, the agent's own uploads, and
//! pauses in replies.

use std::{
    io::Write,
    sync::atomic::{AtomicUsize, Ordering},
};

use axum::{body::Body, http::HeaderMap, response::IntoResponse};
use flate2::{Compression, write::GzEncoder};
use http::header;

use super::*;

async fn serve(router: axum::Router) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address
}

/// Starts an MCP server with one tool. It answers with JSON or with an event stream, and compresses its answers if `packs` is true.
async fn packing(packs: bool, as_events: bool) -> SocketAddr {
    let answer = move |asked: Value| {
        let result = match asked["method"].as_str().unwrap() {
            "initialize" => json!({
                "protocolVersion": asked["params"]["protocolVersion"], "capabilities": {"tools": {}},
                "serverInfo": {"name": "packs", "version": "1"},
            }),
            "tools/list" => json!({"tools": [{"name": "echo", "inputSchema": {"type": "object"}}]}),
            _ => json!({"content": [{"type": "text", "text": "it is packed"}]}),
        };
        let text = json!({"jsonrpc": "2.0", "id": asked["id"], "result": result}).to_string();
        let (kind, text) = match as_events {
            true => ("text/event-stream", format!("event: message\ndata: {text}\n\n")),
            false => ("application/json", text),
        };
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, kind.parse().unwrap());
        if !packs {
            return (headers, Body::from(text)).into_response();
        }
        headers.insert(header::CONTENT_ENCODING, "gzip".parse().unwrap());
        let mut packed = GzEncoder::new(Vec::new(), Compression::best());
        packed.write_all(text.as_bytes()).unwrap();
        (headers, Body::from(packed.finish().unwrap())).into_response()
    };
    let post = axum::routing::post(move |axum::Json(asked): axum::Json<Value>| async move {
        if asked.get("id").is_some() { answer(asked) } else { StatusCode::ACCEPTED.into_response() }
    });
    serve(axum::Router::new().route("/mcp", post)).await
}

/// The uncompressed forms are the control.
#[tokio::test]
async fn a_tool_server_that_packs_unasked_is_listed_and_called() {
    for (packs, as_events) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut policy = policy(LIMITS);
        let upstream = McpUpstream { url: "http://packed.test/mcp".into(), tool: "echo".into(), digest: None };
        policy.tools.push(tool("packed", Upstream::Mcp(upstream), SideEffect::Write));
        policy.egress.push(host("packed.test", &[80], EgressUse::Tools));
        let harness = harness_of(policy, vec![("packed.test".to_owned(), packing(packs, as_events).await)]).await;
        let (error, text) = harness.tool("packed", json!({})).await;
        assert!(!error && text == "it is packed", "packs {packs}, as events {as_events}: {text}");
        let records = harness.stored(5).await;
        let Event::Outcome(outcome) = &records[4].event else { panic!("{records:#?}") };
        assert_eq!(
            outcome.outcome,
            belay::evidence::record::CallOutcome::Applied,
            "packs {packs}, as events {as_events}"
        );
    }
}

/// An upload may be as long as a model request. The denial of a longer one names the limit.
#[tokio::test]
async fn an_upload_over_plain_http_may_be_as_long_as_a_request_to_a_model() {
    static CAME: AtomicUsize = AtomicUsize::new(0);
    let upload = axum::Router::new().fallback(|body: Body| async move {
        let length = body.collect().await.unwrap().to_bytes().len();
        CAME.fetch_add(length, Ordering::SeqCst);
        length.to_string()
    });
    let upstream = ("docs.test.example".to_owned(), serve(upload).await);
    let harness = harness_of(policy(LIMITS), vec![upstream]).await;
    let put = async |megabytes: usize| {
        let stream = tokio::net::TcpStream::connect(harness.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let body = Full::new(bytes::Bytes::from(vec![b'x'; megabytes << 20]));
        let request = Request::put("http://docs.test.example/backup").header("host", "docs.test.example").body(body);
        let reply = sender.send_request(request.unwrap()).await.unwrap();
        let status = reply.status();
        let text = reply.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(text.to_vec()).unwrap())
    };
    assert_eq!(put(17).await, (StatusCode::OK, (17 << 20).to_string()));
    let (status, text) = put(33).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{text}");
    assert!(text.contains("at most 33554432 bytes") && text.contains("through a tunnel"), "{text}");
    assert_eq!(CAME.load(Ordering::SeqCst), 17 << 20, "some of what was refused went out");
    let records = harness.stored(4).await;
    assert_eq!(denied(&records), [Rule::Request]);
    let Event::Denied(refused) = &records[3].event else { panic!("{records:#?}") };
    assert!(refused.reason.contains("33554432"), "{refused:?}");
}

/// The client libraries of models wait for ten minutes. So does Belay, unless the class sets `upstreamTimeoutSeconds`.
#[test]
fn a_thought_of_ten_minutes_is_waited_for_unless_the_class_says_less() {
    let policy = policy(LIMITS);
    assert!(policy.silence() >= Duration::from_secs(600), "{:?}", policy.silence());
    let hasty = PolicyConfig { upstream_timeout_seconds: Some(2), ..policy };
    assert_eq!(hasty.silence(), Duration::from_secs(2));
}

/// A pause between two pieces of a reply counts as silence. The class's `upstreamTimeoutSeconds` ends a reply that would otherwise wait for
/// ten minutes, and the error names the field. The control sends its pieces in time.
#[tokio::test]
async fn a_reply_that_falls_silent_ends_by_the_classs_time() {
    let pieces = |pause: Duration| {
        let later = futures::stream::once(async move {
            tokio::time::sleep(pause).await;
            Ok::<_, std::convert::Infallible>("\"b\": 2}")
        });
        let first = futures::stream::iter([Ok("{\"a\": 1, ")]);
        ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(first.chain(later))).into_response()
    };
    let router = axum::Router::new()
        .route("/late", axum::routing::get(move || async move { pieces(Duration::from_millis(500)) }))
        .route("/never", axum::routing::get(move || async move { pieces(Duration::from_secs(3_600)) }));
    let mut policy = PolicyConfig { upstream_timeout_seconds: Some(2), ..policy(LIMITS) };
    for name in ["late", "never"] {
        let http = HttpUpstream { method: HttpMethod::Get, url: format!("http://pieces.test/{name}"), query: vec![] };
        policy.tools.push(tool(name, Upstream::Http(http), SideEffect::Read));
    }
    policy.egress.push(host("pieces.test", &[80], EgressUse::Tools));
    let harness = harness_of(policy, vec![("pieces.test".to_owned(), serve(router).await)]).await;
    let (error, text) = harness.tool("late", json!({})).await;
    assert!(!error, "{text}");
    let waited = tokio::time::timeout(Duration::from_secs(60), harness.tool("never", json!({}))).await;
    let (error, text) = waited.expect("it gave up nowhere");
    assert!(error && text.contains("upstream.reply") && text.contains("upstreamTimeoutSeconds"), "{text}");

    // A model's stream has no place for an error message of Belay's. It breaks off, so that it does not look whole.
    let silent = json!({
        "model": "m", "stream": true, "messages": [], "max_tokens": 9, "metadata": {"fails": "never ends"},
    });
    let client: Client<HttpConnector, Full<bytes::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let request = Request::post(format!("http://{}/v1/chat/completions", harness.address))
        .header("content-type", "application/json")
        .body(Full::from(silent.to_string()))
        .unwrap();
    let reply = client.request(request).await.unwrap().into_body();
    let came = tokio::time::timeout(Duration::from_secs(60), reply.collect()).await.expect("it gave up nowhere");
    assert!(came.is_err(), "a stream that fell silent ended as if it were whole");
}
