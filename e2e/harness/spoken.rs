//! MCP as servers speak it: refusals, lost sessions, odd tools and odd results, streams and redirects, each over a real connection.

use std::sync::Mutex;

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, Uri, header},
    response::{IntoResponse, Response},
};
use belay::evidence::record::{CallOutcome, Channel, Outcome};

use super::*;

const HOST: &str = "spoken.test";

/// What the server got.
#[derive(Clone, Debug, PartialEq)]
struct Request {
    http: String,
    path: String,
    /// The method of the message, empty if there is no message.
    method: String,
    id: Value,
    session: Option<String>,
    last_event: Option<String>,
}

type Got = Arc<Mutex<Vec<Request>>>;

/// Starts a server that answers as the path says: `/KIND` or `/KIND/ARGUMENT`.
async fn server() -> (SocketAddr, Got) {
    let got = Got::default();
    let router = axum::Router::new().fallback(answered).with_state(got.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (address, got)
}

async fn answered(
    State(got): State<Got>,
    method: axum::http::Method,
    uri: Uri,
    headers: HeaderMap,
    body: String,
) -> Response {
    let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let asked: Value = serde_json::from_str(&body).unwrap_or_default();
    let request = Request {
        http: method.to_string(),
        path: uri.path().to_owned(),
        method: asked["method"].as_str().unwrap_or_default().to_owned(),
        id: asked["id"].clone(),
        session: header("mcp-session-id"),
        last_event: header("last-event-id"),
    };
    let sessions = {
        let mut got = got.lock().unwrap();
        got.push(request.clone());
        got.iter().filter(|request| request.method == "initialize").count()
    };
    if request.http == "GET" {
        return resumed(&got, &request);
    }
    if let Some(to) = redirect(uri.path()) {
        return (StatusCode::from_u16(to.0).unwrap(), [(header::LOCATION, to.1)]).into_response();
    }
    let kind = uri.path().split('/').nth(1).unwrap_or_default().to_owned();
    let argument = uri.path().split('/').nth(2).unwrap_or_default().to_owned();
    let result = |result: Value| json!({"jsonrpc": "2.0", "id": asked["id"], "result": result});
    match request.method.as_str() {
        "initialize" => {
            let reply = result(json!({
                "protocolVersion": asked["params"]["protocolVersion"], "capabilities": {"tools": {}},
                "serverInfo": {"name": "spoken", "version": "1"},
            }));
            ([("mcp-session-id", format!("s-{sessions}"))], axum::Json(reply)).into_response()
        }
        "tools/list" => axum::Json(result(listed(&kind))).into_response(),
        "tools/call" => called(&kind, &argument, &asked, &request),
        method if method.starts_with("notifications/") => StatusCode::ACCEPTED.into_response(),
        _ => {
            let error = json!({"code": -32601, "message": "Method not found"});
            axum::Json(json!({"jsonrpc": "2.0", "id": asked["id"], "error": error})).into_response()
        }
    }
}

fn listed(kind: &str) -> Value {
    let tool = |name: &str| json!({"name": name, "inputSchema": {"type": "object"}});
    let hinted =
        |name: &str| json!({"name": name, "inputSchema": {"type": "object"}, "annotations": {"readOnlyHint": "yes"}});
    let others = match kind {
        "twice" => vec![tool("other"), tool("other")],
        "no-schema" => vec![json!({"name": "other", "description": "no schema"})],
        "hint" => vec![hinted("other")],
        "twice-itself" => vec![tool("do")],
        "odd-itself" => return json!({"tools": [tool("other"), hinted("do")]}),
        _ => vec![],
    };
    json!({"tools": others.into_iter().chain([tool("do")]).collect::<Vec<_>>()})
}

/// Returns the redirect of a path.
fn redirect(path: &str) -> Option<(u16, &'static str)> {
    match path {
        "/slash" => Some((307, "/slash/")),
        "/ever" => Some((308, "http://spoken.test:80/ever/")),
        "/chain" => Some((307, "/chain/second")),
        "/chain/second" => Some((307, "/chain/")),
        "/away" => Some((307, "http://docs.test.example/mcp")),
        "/moved" => Some((301, "/moved/")),
        "/login" => Some((302, "/sign-in?next=mcp")),
        _ => None,
    }
}

/// Answers a client that resumes a stream: the result comes with the second resumption. `/resumed/401` and `/resumed/405` do not resume.
fn resumed(got: &Got, request: &Request) -> Response {
    let argument = request.path.split('/').nth(2).unwrap_or_default();
    let before = got.lock().unwrap().iter().filter(|got| got.http == "GET").count();
    let events = |text: String| reply(200, "text/event-stream", text);
    match (argument, before, request.last_event.as_deref()) {
        (_, _, None) => reply(405, "text/plain", "no stream".into()),
        ("never", ..) => events("id: 1\nretry: 100\ndata:\n\n".into()),
        ("flood", ..) => events(format!("id: 2\nretry: 100\ndata: {}\n\n", "x".repeat(1_500))),
        ("failing", 1, _) => reply(503, "text/plain", "in a moment".into()),
        ("failing" | "", 1 | 2, Some("1")) => events("id: 2\nretry: 100\ndata:\n\n".into()),
        ("failing" | "", _, Some("2")) => {
            let call = got.lock().unwrap().iter().find(|got| got.method == "tools/call").cloned().unwrap();
            let result = json!({"content": [{"type": "text", "text": "done at last"}]});
            let answer = json!({"jsonrpc": "2.0", "id": call.id, "result": result});
            events(format!("id: 3\ndata: {answer}\n\n"))
        }
        (status, ..) => reply(status.parse().unwrap_or(404), "text/plain", "no".into()),
    }
}

fn reply(status: u16, kind: &str, body: String) -> Response {
    (StatusCode::from_u16(status).unwrap(), [(header::CONTENT_TYPE, kind.to_owned())], Body::from(body)).into_response()
}

fn called(kind: &str, argument: &str, asked: &Value, request: &Request) -> Response {
    let answer = |result: Value| json!({"jsonrpc": "2.0", "id": asked["id"], "result": result});
    let done = || answer(json!({"content": [{"type": "text", "text": "done"}]}));
    let error = |id: Value, code: i64, message: &str| {
        json!({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": message}}).to_string()
    };
    let json = |status: u16, body: String| reply(status, "application/json", body);
    // The server was deployed anew after the listing, or forgets each session.
    let is_lost = argument == "always" || request.session.as_deref() == Some("s-1");
    match kind {
        "lost-404" if is_lost => json(404, String::new()),
        "lost-400" if is_lost => json(400, error(Value::Null, -32000, "Bad Request: No valid session ID provided")),
        "lost-word" if is_lost => json(400, error(json!("server-error"), -32600, "Bad Request: Not found")),
        "lost-own" if is_lost => json(400, error(asked["id"].clone(), -32001, "Session not found")),
        "lost-text" if is_lost => reply(400, "text/plain", "Invalid or missing session ID".into()),
        "error" => json(200, error(asked["id"].clone(), argument.parse().unwrap(), "so it is")),
        "nobody" => json(200, error(Value::Null, argument.parse().unwrap(), "so it is")),
        "events" => {
            let error = error(asked["id"].clone(), argument.parse().unwrap(), "so it is");
            reply(200, "text/event-stream", format!("data: {error}\n\n"))
        }
        "status" => reply(argument.parse().unwrap(), "text/plain", "so it is".into()),
        "empty" => json(argument.parse().unwrap(), String::new()),
        "page" => reply(200, "text/html", "<html>".into()),
        "ended" => reply(200, "text/event-stream", ": nothing\n\n".into()),
        "resumed" => reply(200, "text/event-stream", "id: 1\nretry: 100\ndata:\n\n".into()),
        "failed" => {
            json(200, answer(json!({"content": [{"type": "text", "text": "no"}], "isError": true})).to_string())
        }
        "odd" => {
            let odd = json!({"type": "json", "json": {"a": 1}});
            let result = answer(json!({"content": [{"type": "text", "text": "done"}, odd]})).to_string();
            match argument {
                "events" => reply(200, "text/event-stream", format!("data: {result}\n\n")),
                _ => json(200, result),
            }
        }
        _ => json(200, done().to_string()),
    }
}

/// Starts a harness with a tool whose server answers as this path says.
async fn with_path(path: &str) -> (Harness, Got) {
    with_limits(path, ToolLimits { timeout_seconds: Some(10), ..ToolLimits::default() }).await
}

async fn with_limits(path: &str, limits: ToolLimits) -> (Harness, Got) {
    let mut policy = policy(LIMITS);
    let upstream = McpUpstream { url: format!("http://{HOST}/{path}"), tool: "do".into(), digest: None };
    policy.tools.push(Tool { limits, ..tool("do", Upstream::Mcp(upstream), SideEffect::Write) });
    policy.egress.push(host(HOST, &[80], EgressUse::Tools));
    let (address, got) = server().await;
    (harness_of(policy, vec![(HOST.to_owned(), address)]).await, got)
}

/// Calls the tool of a server that answers as this path says. Returns whether the result is an error, its text, the outcome in the log, and
/// what the server got.
async fn spoken(path: &str) -> (bool, String, Outcome, Vec<Request>) {
    let (harness, got) = with_path(path).await;
    let called = tokio::time::timeout(Duration::from_secs(5), harness.tool("do", json!({}))).await;
    let (error, text) = called.unwrap_or_else(|_| panic!("{path}: the call hangs"));
    let outcome = outcome_of_call(&harness, path).await;
    let got = got.lock().unwrap().clone();
    (error, text, outcome, got)
}

/// Returns the outcome of the only tool call.
async fn outcome_of_call(harness: &Harness, path: &str) -> Outcome {
    let records = harness.stored(5).await;
    let call = records.iter().find_map(|record| match &record.event {
        Event::Intent(intent) if intent.channel == Channel::Tool => Some(intent.call.clone()),
        _ => None,
    });
    let call = call.unwrap_or_else(|| panic!("{path}: no call: {records:#?}"));
    let outcome = records.iter().find_map(|record| match &record.event {
        Event::Outcome(outcome) if outcome.call == call => Some(outcome.clone()),
        _ => None,
    });
    outcome.unwrap_or_else(|| panic!("{path}: no outcome: {records:#?}"))
}

fn calls(got: &[Request]) -> Vec<Option<&str>> {
    got.iter().filter(|request| request.method == "tools/call").map(|request| request.session.as_deref()).collect()
}

/// A server that has forgotten the session has not run the tool. The call is sent again over another session, and the agent does not notice.
#[rstest::rstest]
#[case::as_the_specification_says("lost-404")]
#[case::without_an_id("lost-400")]
#[case::with_a_word_for_an_id("lost-word")]
#[case::with_the_id("lost-own")]
#[case::as_text("lost-text")]
#[tokio::test]
async fn a_call_of_a_lost_session_is_made_in_another(#[case] path: &str) {
    let (error, text, outcome, got) = spoken(path).await;
    assert!(!error && text == "done", "{text}: {got:#?}");
    assert_eq!(outcome.outcome, CallOutcome::Applied);
    assert_eq!(calls(&got), [Some("s-1"), Some("s-2")], "{got:#?}");
    // A server that forgets each session gets the call twice and no third time, and the outcome is certain.
    let path = format!("{path}/always");
    let (error, text, outcome, got) = spoken(&path).await;
    assert!(error && text.contains("did not run the tool"), "{text}");
    assert_eq!(outcome.outcome, CallOutcome::NotApplied);
    assert_eq!(calls(&got).len(), 2, "{got:#?}");
}

/// The table of `docs/tool-contracts.md`, over a real connection. No other reply makes Belay send a call again.
#[rstest::rstest]
#[case::result("fine", CallOutcome::Applied, 200)]
#[case::tool_error("failed", CallOutcome::Applied, 200)]
#[case::unknown_tool("error/-32602", CallOutcome::NotApplied, 200)]
#[case::unknown_method("error/-32601", CallOutcome::NotApplied, 200)]
#[case::internal("error/-32603", CallOutcome::Unknown, 200)]
#[case::of_the_server("error/-32000", CallOutcome::Unknown, 200)]
#[case::parse_error_without_an_id("nobody/-32700", CallOutcome::NotApplied, 200)]
#[case::error_without_an_id("nobody/-32000", CallOutcome::Unknown, 200)]
#[case::refused_in_a_stream("events/-32602", CallOutcome::NotApplied, 200)]
#[case::failed_in_a_stream("events/-32603", CallOutcome::Unknown, 200)]
#[case::bad_request("status/400", CallOutcome::NotApplied, 400)]
#[case::unauthorized("status/401", CallOutcome::NotApplied, 401)]
#[case::timeout("status/408", CallOutcome::Unknown, 408)]
#[case::too_many("status/429", CallOutcome::NotApplied, 429)]
#[case::failure("status/500", CallOutcome::Unknown, 500)]
#[case::unavailable("status/503", CallOutcome::Unknown, 503)]
#[case::see_other("status/303", CallOutcome::Unknown, 303)]
#[case::accepted("empty/202", CallOutcome::Unknown, 202)]
#[case::empty("empty/200", CallOutcome::Unknown, 200)]
#[case::page("page", CallOutcome::Unknown, 200)]
#[case::ended("ended", CallOutcome::Unknown, 200)]
#[tokio::test]
async fn each_reply_means_what_the_table_says(#[case] path: &str, #[case] expected: CallOutcome, #[case] status: u16) {
    let (error, text, outcome, got) = spoken(path).await;
    assert_eq!((outcome.outcome, outcome.status), (expected, status), "{text}");
    assert_eq!(error, path != "fine", "{text}");
    assert_eq!(calls(&got).len(), 1, "{got:#?}");
    assert!(!text.contains("rmcp"), "{text}");
    if error && path != "failed" {
        let said = text.contains("did not run the tool");
        assert_eq!(said, expected == CallOutcome::NotApplied, "{text}");
        assert!(said || text.contains("unknown whether the call took effect"), "{text}");
    }
}

#[tokio::test]
async fn an_unknown_block_passes_as_json_beside_the_others() {
    for path in ["odd", "odd/events"] {
        let (harness, _) = with_path(path).await;
        let result = harness.result("do", json!({})).await;
        let content = serde_json::to_value(&result.content).unwrap();
        assert_eq!(content[0], json!({"type": "text", "text": "done"}), "{path}");
        let unknown: Value = serde_json::from_str(content[1]["text"].as_str().unwrap()).unwrap();
        assert_eq!(unknown, json!({"type": "json", "json": {"a": 1}}), "{path}");
        assert_eq!(outcome_of_call(&harness, path).await.outcome, CallOutcome::Applied);
    }
}

/// An odd tool takes away only itself. The contract's own tool must not be odd, and the denial says what is wrong with it.
#[rstest::rstest]
#[case::twice("twice", None)]
#[case::no_schema("no-schema", None)]
#[case::a_hint_in_words("hint", None)]
#[case::twice_itself("twice-itself", Some("found this name 2 times"))]
#[case::odd_itself("odd-itself", Some("`annotations.readOnlyHint` is neither true nor false"))]
#[tokio::test]
async fn an_odd_tool_takes_away_only_itself(#[case] path: &str, #[case] expected: Option<&str>) {
    let (harness, got) = with_path(path).await;
    let (error, text) = harness.tool("do", json!({})).await;
    let Some(words) = expected else {
        assert!(!error && text == "done", "{text}");
        return;
    };
    assert!(error && text.contains("tool.changed") && text.contains(words), "{text}");
    assert!(calls(&got.lock().unwrap()).is_empty());
    let records = harness.stored(4).await;
    let denied = records.iter().find_map(|record| match &record.event {
        Event::Denied(denied) => Some(denied.clone()),
        _ => None,
    });
    assert_eq!(denied.unwrap().rule, Rule::ToolChanged);
}

/// MCP 2025-11-25: the server ends the stream, and the client asks for the rest.
#[rstest::rstest]
#[case::at_once("resumed", 2)]
#[case::after_a_failure("resumed/failing", 3)]
#[tokio::test]
async fn a_stream_that_ends_before_the_answer_is_resumed(#[case] path: &str, #[case] gets: usize) {
    let (error, text, outcome, got) = spoken(path).await;
    assert!(!error && text == "done at last", "{text}: {got:#?}");
    assert_eq!((outcome.outcome, outcome.status), (CallOutcome::Applied, 200));
    let resumed: Vec<_> = got.iter().filter(|request| request.http == "GET").collect();
    assert_eq!(resumed.len(), gets, "{got:#?}");
    assert!(resumed.iter().all(|request| request.session.as_deref() == Some("s-1")), "{got:#?}");
    assert_eq!(resumed.last().unwrap().last_event.as_deref(), Some("2"));
    assert_eq!(calls(&got).len(), 1);
}

/// What cannot be resumed is unknown. Nothing is resumed beyond the call's time and length.
#[rstest::rstest]
#[case::refused("resumed/405", Rule::UpstreamReply, 1)]
#[case::forgotten("resumed/404", Rule::UpstreamReply, 1)]
#[case::too_long("resumed/flood", Rule::ToolResponseBytes, 2)]
#[case::without_an_id("ended", Rule::UpstreamReply, 0)]
#[case::never("resumed/never", Rule::ToolTimeout, 1)]
#[tokio::test]
async fn what_cannot_be_resumed_is_unknown(#[case] path: &str, #[case] rule: Rule, #[case] gets: usize) {
    let limits = ToolLimits { timeout_seconds: Some(1), response_bytes: Some(2_000), ..ToolLimits::default() };
    let (harness, got) = with_limits(path, limits).await;
    let started = std::time::Instant::now();
    let (error, text) = harness.tool("do", json!({})).await;
    assert!(started.elapsed() < Duration::from_secs(4), "{text}");
    assert!(error, "{text}");
    let outcome = outcome_of_call(&harness, path).await;
    assert_eq!(outcome.outcome, CallOutcome::Unknown);
    let resumed = got.lock().unwrap().iter().filter(|request| request.http == "GET").count();
    if path == "resumed/never" {
        // The stream is not resumed after the call's time, so the call ends a moment earlier or by its timeout.
        assert!(matches!(outcome.rule, Some(Rule::ToolTimeout | Rule::UpstreamReply)), "{outcome:?}");
        assert!((gets..=10).contains(&resumed), "{resumed}");
    } else {
        assert_eq!((outcome.rule, resumed), (Some(rule), gets), "{text}");
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(got.lock().unwrap().iter().filter(|request| request.http == "GET").count(), resumed, "it ends");
}

/// A redirect to the same origin keeps method, body and session. The agent does not notice.
#[rstest::rstest]
#[case::slash("slash")]
#[case::for_ever("ever")]
#[tokio::test]
async fn a_redirect_within_the_origin_is_followed(#[case] path: &str) {
    let (error, text, outcome, got) = spoken(path).await;
    assert!(!error && text == "done", "{text}: {got:#?}");
    assert_eq!((outcome.outcome, outcome.status), (CallOutcome::Applied, 200));
    let called: Vec<_> = got.iter().filter(|request| request.method == "tools/call").collect();
    let expected = [(format!("/{path}"), Some("s-2")), (format!("/{path}/"), Some("s-2"))];
    let found: Vec<_> = called.iter().map(|call| (call.path.clone(), call.session.as_deref())).collect();
    assert_eq!(
        found.iter().map(|(path, _)| path).collect::<Vec<_>>(),
        expected.iter().map(|(path, _)| path).collect::<Vec<_>>()
    );
    assert!(called.iter().all(|call| call.http == "POST" && call.session == called[0].session), "{found:?}");
}

/// What is not followed is denied with the URL that the contract needs.
#[rstest::rstest]
#[case::twice("chain", "set spec.upstream.mcp.url of the contract `do` to \"http://spoken.test/chain/\"")]
#[case::another_host("away", "set spec.upstream.mcp.url of the contract `do` to \"http://docs.test.example/mcp\"")]
#[case::moved("moved", "set spec.upstream.mcp.url of the contract `do` to \"http://spoken.test/moved/\"")]
#[case::login("login", "HTTP 302")]
#[tokio::test]
async fn another_redirect_is_denied_with_the_url_for_the_contract(#[case] path: &str, #[case] expected: &str) {
    let (harness, got) = with_path(path).await;
    let (error, text) = harness.tool("do", json!({})).await;
    assert!(error && text.contains(expected) && text.contains("does not follow"), "{text}");
    assert!(!text.contains("rmcp"), "{text}");
    assert!(calls(&got.lock().unwrap()).is_empty());
}
