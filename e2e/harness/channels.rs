//! Ways around a record: requests that the HTTP and MCP libraries reject, denials inside a tunnel, bytes that nobody counts, and arguments
//! that some servers route as another path. Each has a control, in which the same bytes get through without Belay.

use std::{
    process::Stdio,
    sync::{Mutex, atomic::AtomicU64},
};

use belay::evidence::record::{CallOutcome, Channel, Denied, Intent, Outcome};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

use super::*;

/// The longest wait of these tests.
const PATIENCE: Duration = Duration::from_secs(30);

/// Sends bytes, and returns everything that comes back.
async fn raw(to: SocketAddr, bytes: &[u8]) -> String {
    let exchange = async {
        let mut stream = TcpStream::connect(to).await.unwrap();
        // A server may reject a request before it has read all of it, so a write error is no failure.
        let _ = stream.write_all(bytes).await;
        // A client that closes its side before the answer gets none. Only an incomplete request needs the close, because its server waits
        // for the rest.
        if !bytes.windows(4).any(|four| four == b"\r\n\r\n") {
            let _ = stream.shutdown().await;
        }
        let mut back = Vec::new();
        let _ = stream.read_to_end(&mut back).await;
        String::from_utf8_lossy(&back).into_owned()
    };
    tokio::time::timeout(PATIENCE, exchange).await.expect("no answer")
}

fn refusals(records: &[Record]) -> Vec<&Denied> {
    let denied = |record| match record {
        &Record { event: Event::Denied(ref denied), .. } => Some(denied),
        _ => None,
    };
    records.iter().filter_map(denied).collect()
}

fn outcomes(records: &[Record]) -> Vec<(&Intent, &Outcome)> {
    let intents: std::collections::BTreeMap<&str, &Intent> = records
        .iter()
        .filter_map(|record| match &record.event {
            Event::Intent(intent) => Some((intent.call.as_str(), intent)),
            _ => None,
        })
        .collect();
    let outcome = |record| match record {
        &Record { event: Event::Outcome(ref outcome), .. } => Some(outcome),
        _ => None,
    };
    records.iter().filter_map(outcome).map(|outcome| (intents[outcome.call.as_str()], outcome)).collect()
}

/// Starts a server that accepts any bytes as a request, as some servers do. Its answer says how many bytes it read.
async fn lenient() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut piece = vec![0; 100_000];
                let read = stream.read(&mut piece).await.unwrap_or(0);
                let said = format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\ntook {read}");
                let _ = stream.write_all(said.as_bytes()).await;
                let _ = stream.shutdown().await;
                let _ = stream.read_to_end(&mut piece).await;
            });
        }
    });
    address
}

fn no_requests() -> Vec<(&'static str, Vec<u8>, Channel)> {
    let (tool, model, egress) = (Channel::Tool, Channel::Model, Channel::Egress);
    let many = format!("GET /mcp HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(150));
    let long = format!("GET /mcp HTTP/1.1\r\na: {}\r\n\r\n", "b".repeat(100_000));
    let text = |text: &str| text.as_bytes().to_vec();
    vec![
        ("NUL in a host", text("CONNECT docs.test.example\0.evil.test:443 HTTP/1.1\r\n\r\n"), egress),
        ("letters beyond ASCII", text("CONNECT dосs.test.example:443 HTTP/1.1\r\n\r\n"), egress),
        ("two ports", text("CONNECT docs.test.example:80:443 HTTP/1.1\r\n\r\n"), egress),
        ("two lengths", text("POST /mcp HTTP/1.1\r\ncontent-length: 2\r\ncontent-length: 7\r\n\r\n{}"), tool),
        ("a signed length", text("POST /mcp HTTP/1.1\r\ncontent-length: +2\r\n\r\n{}"), tool),
        (
            "length and chunks",
            text("POST /v1/messages HTTP/1.1\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
            model,
        ),
        ("unknown encoding", text("POST /mcp HTTP/1.1\r\ntransfer-encoding: chunked, x\r\n\r\n0\r\n\r\n"), tool),
        (
            "a folded header",
            text("GET http://docs.test.example/ HTTP/1.1\r\nhost: docs.test.example\r\n  evil.test\r\n\r\n"),
            egress,
        ),
        ("a space before the colon", text("GET /mcp HTTP/1.1\r\nhost : a\r\n\r\n"), tool),
        ("HTTP/0.9", text("GET /mcp\r\n"), tool),
        ("HTTP/2 at once", text("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"), egress),
        ("another version", text("GET /mcp HTTP/7.1\r\n\r\n"), tool),
        ("many headers", many.into_bytes(), tool),
        ("a long head", long.into_bytes(), tool),
        ("TLS", vec![0x16, 3, 1, 0, 5, 1, 0, 0, 1, 0], egress),
        ("SOCKS", vec![5, 1, 0], egress),
        ("half a head", text("CONNECT docs.test.example:443 HTTP/1.1\r\nhost: d"), egress),
    ]
}

#[tokio::test]
async fn what_is_no_request_is_answered_recorded_and_counted() {
    let harness = harness().await;
    let elsewhere = lenient().await;
    let all = no_requests();
    for (what, bytes, _) in &all {
        assert!(raw(elsewhere, bytes).await.contains("took"), "{what}: nobody takes it, so it shows nothing");
        let reply = raw(harness.address, bytes).await;
        assert!(reply.starts_with("HTTP/1.1 4"), "{what}: {reply}");
        assert!(reply.contains("belay-rule: request.malformed") && reply.contains("expected"), "{what}: {reply}");
    }
    let records = harness.stored(1 + all.len()).await;
    let found = refusals(&records);
    assert_eq!(found.len(), all.len(), "{found:#?}");
    for (denied, (what, _, channel)) in found.iter().zip(&all) {
        assert_eq!((denied.rule, denied.channel), (Rule::Request, *channel), "{what}: {denied:?}");
    }
    assert_eq!(records.last().unwrap().usage.denials, i64::try_from(all.len()).unwrap());
    // The control: a valid request is served.
    let (error, text) = harness.tool("say", json!({"text": "hello"})).await;
    assert!(!error, "{text}");
}

#[tokio::test]
async fn a_later_request_of_a_connection_is_recorded_as_well() {
    let harness = harness().await;
    let fine = "GET /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n";
    for bad in [
        "GET /mcp HTTP/1.1\r\nhost : a\r\n\r\n",
        "POST /mcp HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        "CONNECT a:1:2 HTTP/1.1\r\n\r\n",
    ] {
        let reply = raw(harness.address, format!("{fine}{bad}").as_bytes()).await;
        assert!(reply.contains("405") && reply.contains("400 Bad Request"), "{reply}");
    }
    assert_eq!(denied(&harness.stored(4).await), [Rule::Request; 3]);
}

#[tokio::test]
async fn a_flood_of_what_is_no_request_does_not_fill_the_log() {
    const FLOOD: usize = 400;
    let harness = Arc::new(harness().await);
    let one = || {
        let address = harness.address;
        tokio::spawn(async move { raw(address, b"GET /mcp HTTP/1.1\r\nhost : a\r\n\r\n").await })
    };
    let all: Vec<_> = (0..FLOOD).map(|_| one()).collect();
    for reply in all {
        let reply = reply.await.unwrap();
        assert!(reply.contains("request.malformed"), "{reply:?}");
    }
    let records = harness.records().await;
    let found = refusals(&records);
    assert!(found.len() < FLOOD / 2, "{} records", found.len());
    assert_eq!(found.iter().map(|denied| denied.count).sum::<i64>(), i64::try_from(FLOOD).unwrap());
}

#[tokio::test]
async fn requests_for_what_is_not_there_are_recorded() {
    let harness = harness().await;
    let mut expected = Vec::new();
    for method in ["GET", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "HEAD", "BREW"] {
        let head = format!("{method} /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        assert!(raw(harness.address, head.as_bytes()).await.contains("belay-rule: model.request"), "{method}");
        expected.push((Rule::ModelRequest, Channel::Model));
    }
    for (method, path, channel) in [
        ("POST", "/v1/files", Channel::Model),
        ("GET", "/v1/responses/resp_1", Channel::Model),
        ("POST", "/audio/speech", Channel::Model),
        ("GET", "/", Channel::Tool),
        ("POST", "/MCP", Channel::Tool),
        ("POST", "/mcp/", Channel::Tool),
        ("POST", "/rollback", Channel::Tool),
        ("PUT", "/mcp", Channel::Tool),
        ("OPTIONS", "/mcp", Channel::Tool),
    ] {
        let head = format!("{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        let reply = raw(harness.address, head.as_bytes()).await;
        assert!(reply.starts_with("HTTP/1.1 40") && reply.contains("request.malformed"), "{method} {path}: {reply}");
        expected.push((Rule::Request, channel));
    }
    // The protocol lets clients send these requests, and lets servers not support them, so they are no denials.
    for method in ["GET", "DELETE"] {
        let head = format!(
            "{method} /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: text/event-stream\r\nconnection: close\r\n\r\n"
        );
        assert!(raw(harness.address, head.as_bytes()).await.starts_with("HTTP/1.1 405"));
    }
    let records = harness.stored(1 + expected.len()).await;
    let found: Vec<_> = refusals(&records).iter().map(|denied| (denied.rule, denied.channel)).collect();
    assert_eq!(found, expected);
}

/// Returns a call with the given headers and body.
fn posted(headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "POST /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    )
    .into_bytes()
}

#[tokio::test]
async fn calls_that_the_mcp_library_refuses_are_recorded() {
    let harness = harness().await;
    let call = |more: Value| {
        let mut call = json!({
            "jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "say", "arguments": {"text": "hello"}}
        });
        call.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        call
    };
    let kind = "content-type: application/json\r\n";
    let accept = "accept: application/json, text/event-stream\r\n";
    let both = format!("{kind}{accept}");
    let plain = call(json!({})).to_string();
    let long = call(json!({"params": {"name": "say", "arguments": {"text": "x".repeat(5 << 20)}}})).to_string();
    let batch = json!([call(json!({})), call(json!({"id": 8}))]).to_string();
    let many = json!(vec![call(json!({})); 65]).to_string();
    let nameless = call(json!({"params": {"arguments": {}}})).to_string();
    let listed = call(json!({"params": {"name": "say", "arguments": ["hello"]}})).to_string();
    let mut unanswered = call(json!({}));
    unanswered.as_object_mut().unwrap().remove("id");
    let refused = [
        ("a page", posted(&format!("{kind}accept: text/html\r\n"), &plain)),
        ("events alone", posted(&format!("{kind}accept: text/event-stream\r\n"), &plain)),
        ("anything but JSON", posted(&format!("{kind}accept: application/json;q=0, */*;q=0\r\n"), &plain)),
        ("a form", posted(&format!("{accept}content-type: text/plain\r\n"), &plain)),
        ("no type", posted(accept, &plain)),
        ("over 4 MiB", posted(&both, &long)),
        ("a batch of a version without", posted(&format!("{both}mcp-protocol-version: 2025-06-18\r\n"), &batch)),
        ("a long batch", posted(&both, &many)),
        ("an empty batch", posted(&both, "[]")),
        ("no name", posted(&both, &nameless)),
        ("a list of arguments", posted(&both, &listed)),
        ("no id", posted(&both, &unanswered.to_string())),
        ("another version of JSON-RPC", posted(&both, &call(json!({"jsonrpc": "1.0"})).to_string())),
        ("another host", {
            let text = String::from_utf8(posted(&both, &plain)).unwrap();
            text.replace("host: 127.0.0.1", "host: evil.test").into_bytes()
        }),
        ("a version that there is not", posted(&format!("{both}mcp-protocol-version: 1999-01-01\r\n"), &plain)),
    ];
    for (what, bytes) in &refused {
        let reply = raw(harness.address, bytes).await;
        assert!(!reply.contains("echo: hello"), "{what}: {reply}");
    }
    let records = harness.stored(1 + refused.len()).await;
    let found = refusals(&records);
    assert_eq!(found.len(), refused.len(), "{found:#?}");
    let expected = |rule| matches!(rule, Rule::Request | Rule::ToolRequestBytes);
    assert!(found.iter().all(|denied| expected(denied.rule) && denied.request_commitment.is_some()), "{found:#?}");
    assert!(harness.gateway.saw().is_empty(), "a refused call left the harness");
    // The control: the same call in the form that the protocol requires.
    let reply = raw(harness.address, &posted(&both, &plain)).await;
    assert!(reply.contains("echo: hello"), "{reply}");
}

/// Every answer is JSON, so a client that accepts JSON is answered, whatever words it uses.
#[rstest::rstest]
#[case::anything("accept: */*\r\n")]
#[case::json("accept: application/json\r\n")]
#[case::nothing_named("")]
#[tokio::test]
async fn a_client_that_accepts_json_is_answered(#[case] accept: &str) {
    let harness = harness().await;
    let call = json!({
        "jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "say", "arguments": {"text": "hello"}}
    });
    let reply =
        raw(harness.address, &posted(&format!("content-type: application/json\r\n{accept}"), &call.to_string())).await;
    assert!(reply.starts_with("HTTP/1.1 200") && reply.contains("echo: hello"), "{reply}");
}

/// MCP 2025-03-26 says that servers must accept batches. Each message of a batch is handled, limited and recorded as if it had come alone.
#[tokio::test]
async fn a_batch_is_answered_message_by_message() {
    let harness = harness().await;
    let message = |id: Value, method: &str, params: Value| json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
    let say = |id: u32, args: Value| message(json!(id), "tools/call", json!({"name": "say", "arguments": args}));
    let batch = json!([
        say(1, json!({"text": "one"})),
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        say(2, json!({"text": "rude"})),
        message(json!("three"), "tools/list", json!({})),
        message(json!(4), "tools/call", json!({"arguments": {}})),
        say(5, json!({"text": "five"})),
    ]);
    let (status, replies) = harness.post("/mcp", batch).await;
    assert_eq!(status, StatusCode::OK, "{replies}");
    let ids: Vec<_> = replies.as_array().unwrap().iter().map(|reply| reply["id"].clone()).collect();
    assert_eq!(ids, [json!(1), json!(2), json!("three"), json!(4), json!(5)], "{replies}");
    assert_eq!(replies[0]["result"]["content"][0]["text"], "echo: one", "{replies}");
    assert!(replies[1]["result"]["content"][0]["text"].as_str().unwrap().contains("tool.precondition"), "{replies}");
    assert_eq!(replies[2]["result"]["tools"].as_array().unwrap().len(), 3, "{replies}");
    assert!(replies[3]["error"]["message"].is_string(), "{replies}");
    assert_eq!(replies[4]["result"]["content"][0]["text"], "echo: five", "{replies}");
    assert_eq!(harness.mcp.calls.load(Ordering::SeqCst), 2);
    let records = harness.stored(9).await;
    let rules: Vec<_> = refusals(&records).iter().map(|denied| denied.rule).collect();
    assert_eq!(rules, [Rule::ToolPrecondition, Rule::Request]);
    assert_eq!(records.last().unwrap().usage.tool_calls, 2);
    // A batch that asks nothing is accepted without a body, as a single notification is.
    let told = json!([{"jsonrpc": "2.0", "method": "notifications/initialized"}]);
    assert_eq!(harness.post("/mcp", told).await, (StatusCode::ACCEPTED, json!("")));
    // A batch does not widen the budget: the third call is the last.
    let (_, replies) =
        harness.post("/mcp", json!([say(6, json!({"text": "six"})), say(7, json!({"text": "seven"}))])).await;
    assert_eq!(replies[0]["result"]["content"][0]["text"], "echo: six", "{replies}");
    assert!(replies[1].to_string().contains("budget.toolCalls"), "{replies}");
}

/// An upstream of the agent's own. It sends its answer after the first bytes of a connection, and counts the bytes that it gets.
struct Upstream {
    address: SocketAddr,
    got: Arc<AtomicU64>,
    firsts: Arc<Mutex<Vec<u8>>>,
}

async fn upstream(answer: Vec<u8>) -> Upstream {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (got, firsts) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(Vec::new())));
    let (counted, kept) = (got.clone(), firsts.clone());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (answer, counted, kept) = (answer.clone(), counted.clone(), kept.clone());
            tokio::spawn(async move {
                let (mut piece, mut answered) = (vec![0; 65_536], false);
                while let Ok(read @ 1..) = stream.read(&mut piece).await {
                    counted.fetch_add(read as u64, Ordering::SeqCst);
                    kept.lock().unwrap().push(piece[0]);
                    if !std::mem::replace(&mut answered, true) {
                        let _ = stream.write_all(&answer).await;
                    }
                }
            });
        }
    });
    Upstream { address, got, firsts }
}

/// Returns a real ClientHello for a host name.
fn hello(name: &str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name.to_owned().try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// Opens a tunnel and sends these bytes. Returns what comes back.
async fn tunnelled(harness: &Harness, bytes: &[u8]) -> Vec<u8> {
    let exchange = async {
        let mut stream = BufReader::new(TcpStream::connect(harness.address).await.unwrap());
        let head = "CONNECT docs.test.example:443 HTTP/1.1\r\nhost: docs.test.example:443\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        assert!(line.starts_with("HTTP/1.1 200"), "{line}");
        while line != "\r\n" {
            line.clear();
            stream.read_line(&mut line).await.unwrap();
        }
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let mut back = Vec::new();
        let _ = stream.read_to_end(&mut back).await;
        back
    };
    tokio::time::timeout(PATIENCE, exchange).await.expect("the tunnel does not end")
}

#[tokio::test]
async fn what_is_refused_in_a_tunnel_is_on_record_and_counts() {
    let upstream = upstream(b"hi".to_vec()).await;
    let harness = harness_of(policy(LIMITS), vec![("docs.test.example".into(), upstream.address)]).await;
    let good = hello("docs.test.example");
    let refused = [
        ("another name", hello("evil.test.example")),
        ("no name", hello("198.51.100.20")),
        ("HTTP", b"GET / HTTP/1.1\r\nhost: evil.test\r\n\r\n".to_vec()),
        ("SSH, which may speak first", b"SSH-2.0-x\r\n".to_vec()),
        ("another tunnel", b"CONNECT evil.test:443 HTTP/1.1\r\n\r\n".to_vec()),
        ("an alert", [&b"\x15\x03\x01\x00\x02\x01\x00"[..], &good].concat()),
        ("half a hello", good[..good.len() - 1].to_vec()),
        ("nothing but bytes", vec![0; 300_000]),
        ("an empty record", [&b"\x16\x03\x01\x00\x00"[..], &good[..20]].concat()),
    ];
    for (what, bytes) in &refused {
        let mut direct = TcpStream::connect(upstream.address).await.unwrap();
        direct.write_all(bytes).await.unwrap();
        let mut back = [0; 2];
        direct.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"hi", "{what}: the control gets no answer");
    }
    let direct = upstream.got.load(Ordering::SeqCst);
    for (what, bytes) in &refused {
        let back = tunnelled(&harness, bytes).await;
        let alert: &[u8] = if bytes[0] == 0x16 { &[0x15, 3, 1, 0, 2, 2, 49] } else { &[] };
        assert_eq!(back, alert, "{what}");
    }
    let records = harness.stored(1 + 3 * refused.len()).await;
    let found = refusals(&records);
    assert_eq!(found.len(), refused.len(), "{found:#?}");
    for (denied, (intent, outcome)) in found.iter().zip(outcomes(&records)) {
        assert_eq!((denied.rule, denied.channel), (Rule::EgressHost, Channel::Egress));
        assert_eq!(
            (denied.target.as_str(), intent.target.as_str()),
            ("docs.test.example:443", "docs.test.example:443")
        );
        assert_eq!(
            (outcome.outcome, outcome.rule, outcome.status),
            (CallOutcome::NotApplied, Some(Rule::EgressHost), 0)
        );
        assert_eq!((outcome.sent_bytes, outcome.response_bytes), (Some(0), 0));
    }
    assert_eq!(records.last().unwrap().usage.denials, i64::try_from(refused.len()).unwrap());
    assert_eq!(upstream.got.load(Ordering::SeqCst), direct, "something of it went on to the host");
    // A tunnel on which the agent sends nothing is no denial.
    assert_eq!(tunnelled(&harness, b"").await, b"");
    // The control: TLS for the host goes through, and so does the reply.
    assert_eq!(tunnelled(&harness, &good).await, b"hi");
    let records = harness.stored(1 + 3 * refused.len() + 4).await;
    assert_eq!(refusals(&records).len(), refused.len());
    let last: Vec<_> = outcomes(&records)
        .into_iter()
        .rev()
        .take(2)
        .map(|(_, outcome)| (outcome.outcome, outcome.sent_bytes))
        .collect();
    assert_eq!(last, [(CallOutcome::Applied, Some(good.len() as u64)), (CallOutcome::NotApplied, Some(0))]);
    assert_eq!(upstream.firsts.lock().unwrap().last(), Some(&0x16));
}

#[tokio::test]
async fn refused_tunnels_end_a_task_that_may_have_few_refusals() {
    let upstream = upstream(b"hi".to_vec()).await;
    let limits = Limits { denials: Some(3), ..LIMITS };
    let harness = harness_of(policy(limits), vec![("docs.test.example".into(), upstream.address)]).await;
    let enough = harness.gate.refused_enough();
    for _ in 0..3 {
        tunnelled(&harness, &hello("evil.test.example")).await;
    }
    tokio::time::timeout(PATIENCE, enough).await.expect("three refusals do not end the task");
    let (status, rule) = connect(harness.address, "docs.test.example:443").await;
    assert_eq!((status, rule.as_deref()), (StatusCode::FORBIDDEN, Some("budget.denials")));
}

#[tokio::test]
async fn a_tunnels_bytes_are_known_both_ways() {
    const BACK: usize = 1 << 20;
    let upstream = upstream(vec![b'y'; BACK]).await;
    let harness = harness_of(policy(LIMITS), vec![("docs.test.example".into(), upstream.address)]).await;
    let sent = [hello("docs.test.example"), vec![b'x'; 3 << 20]].concat();
    assert_eq!(tunnelled(&harness, &sent).await.len(), BACK);
    let records = harness.stored(3).await;
    let [(intent, outcome)] = outcomes(&records)[..] else { panic!("{records:#?}") };
    assert_eq!((intent.request_bytes, outcome.sent_bytes), (0, Some(sent.len() as u64)));
    assert_eq!((outcome.response_bytes, outcome.outcome), (BACK as u64, CallOutcome::Applied));
    assert_eq!(upstream.got.load(Ordering::SeqCst), sent.len() as u64);
}

#[tokio::test]
async fn a_requests_bytes_are_known_both_ways() {
    let chunks = "1000\r\n".to_owned() + &"z".repeat(0x1000) + "\r\n";
    let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nx-long: ";
    let answer = format!("{head}{}\r\n\r\n{}0\r\n\r\n", "h".repeat(9000), chunks.repeat(50));
    let upstream = upstream(answer.into_bytes()).await;
    let harness = harness_of(policy(LIMITS), vec![("docs.test.example".into(), upstream.address)]).await;
    let (path, header) = ("p".repeat(7000), "h".repeat(7000));
    let request = format!(
        "GET http://docs.test.example/{path} HTTP/1.1\r\nhost: docs.test.example\r\nx-data: {header}\r\nconnection: close\r\n\r\n"
    );
    let reply = raw(harness.address, request.as_bytes()).await;
    assert!(reply.starts_with("HTTP/1.1 200") && reply.matches('z').count() == 50 * 0x1000, "{} bytes", reply.len());
    let records = harness.stored(3).await;
    let [(intent, outcome)] = outcomes(&records)[..] else { panic!("{records:#?}") };
    assert!((14_000..16_000).contains(&intent.request_bytes), "{intent:?}");
    assert!((213_000..216_000).contains(&outcome.response_bytes), "{outcome:?}");
    assert!(outcome.response_commitment.is_some() && outcome.sent_bytes.is_none(), "{outcome:?}");
}

#[tokio::test]
async fn a_refused_tunnel_says_why_in_its_first_line() {
    let harness = harness().await;
    let reply =
        raw(harness.address, b"CONNECT evil.test.example:443 HTTP/1.1\r\nhost: evil.test.example:443\r\n\r\n").await;
    let first = reply.lines().next().unwrap();
    assert!(
        first.starts_with("HTTP/1.1 403 Belay denied: egress.host: ") && first.contains("evil.test.example"),
        "{first}"
    );
}

/// A server that decodes `PATH_INFO` before it routes, as PEP 3333 says.
const WSGI: &str = r#"
import json, re, sys
from wsgiref.simple_server import make_server, WSGIRequestHandler
from urllib.parse import unquote
class Quiet(WSGIRequestHandler):
    def log_message(self, *words): pass
def app(env, start):
    # As it is, and once more, as proxies before it do; and without path parameters.
    seen = {re.sub(";[^/]*", "", path) for path in (env["PATH_INFO"], unquote(env["PATH_INFO"]))}
    card = any(re.fullmatch(r"/orders/[^/]+/card|/orders|/|/admin", path.rstrip("/") or "/") for path in seen)
    start("200 OK", [("content-type", "application/json")])
    return [json.dumps({"route": "ANOTHER" if card else "one order"}).encode()]
server = make_server("127.0.0.1", 0, app, handler_class=Quiet)
print(server.server_port, flush=True)
server.serve_forever()
"#;

#[tokio::test]
async fn an_argument_in_a_path_is_one_segment_to_a_server_that_decodes_first() {
    let mut server = tokio::process::Command::new("python3")
        .args(["-c", WSGI])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut port = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut port).await.unwrap();
    let address: SocketAddr = format!("127.0.0.1:{}", port.trim()).parse().unwrap();
    let mut policy = policy(Limits { tool_calls: 100, ..LIMITS });
    policy.tools.push(tool("order", over_http(HttpMethod::Get, "/orders/{id}", &[]), SideEffect::Read));
    let shop = "http://shop.test/orders/{id}";
    policy.tools.last_mut().unwrap().upstream = belay::policy::config::Upstream::Http(HttpUpstream {
        method: HttpMethod::Get,
        url: shop.into(),
        query: vec![],
    });
    policy.egress.push(host("shop.test", &[80], EgressUse::Tools));
    let harness = harness_of(policy, vec![("shop.test".into(), address)]).await;
    let mut led_elsewhere = 0;
    let others = [
        "A-7/card",
        "A-7%2fcard",
        "A-7%252fcard",
        "A-7/./card",
        "A-7;x/card",
        "A-7%2Fcard/",
        "../admin",
        "..",
        "%2e%2e",
        "..;x",
        "",
        ".",
        "%00",
        "A-7\\card",
        "%c0%ae%c0%ae%2fx",
        "A-7%c0%afcard",
        "A-7\u{ff0f}card",
        "A-7?x=1",
        "A-7#x",
        "A-7\0",
        " ",
        "A-7.",
    ];
    for id in others {
        let encoded = percent_encoding::utf8_percent_encode(id, percent_encoding::NON_ALPHANUMERIC);
        let request = format!("GET /orders/{encoded} HTTP/1.1\r\nhost: shop.test\r\nconnection: close\r\n\r\n");
        // The request that the harness would send if it only encoded the argument. For this server, some of these requests name another
        // resource.
        led_elsewhere += usize::from(raw(address, request.as_bytes()).await.contains("ANOTHER"));
        let (error, text) = harness.tool("order", json!({"id": id})).await;
        assert!(error && text.contains("tool.url") && text.contains("\"id\""), "{id:?}: {text}");
    }
    assert!(led_elsewhere >= 5, "the control leads elsewhere {led_elsewhere} times");
    for id in ["A-7", "ä b", "100%", "a&b=c", "a,b+c", "a..b"] {
        let (error, text) = harness.tool("order", json!({"id": id})).await;
        assert!(!error && text.contains("one order"), "{id:?}: {text}");
    }
    let records = harness.records().await;
    assert_eq!(denied(&records), vec![Rule::ToolUrl; others.len()]);
}
