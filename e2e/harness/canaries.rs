//! Secrets that agents and upstreams reveal, in every place where they can write text and in every encoding. No secret is in the log, in
//! the spool, in the logs and spans of the process, or in the reasons of denials. Every decision still follows from the log.

use std::{
    collections::BTreeSet,
    io::Write,
    sync::{Arc, Mutex, OnceLock},
};

use axum::{Json, Router, body::Bytes, extract::State, response::IntoResponse, routing::post};
use belay::policy::{
    commit::Salt,
    config::{DataPattern, Sensitivity},
    redact::Redactor,
};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tracing_subscriber::{EnvFilter, fmt::format::FmtSpan};

use super::{
    secrets::{found, halves, marks, secrets, written},
    *,
};

/// A buffer of what the process logs.
#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<u8>>>);

impl Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Returns the buffer of this process's logs and spans. The first call installs the subscriber, which filters as Belay's does.
fn logged() -> Logged {
    static LOGGED: OnceLock<Logged> = OnceLock::new();
    let begun = || {
        let logged = Logged::default();
        let writer = logged.clone();
        tracing_subscriber::fmt()
            .json()
            .with_span_events(FmtSpan::CLOSE)
            .with_env_filter(EnvFilter::new(belay::telemetry::FILTER))
            .with_writer(move || writer.clone())
            .try_init()
            .unwrap();
        logged
    };
    LOGGED.get_or_init(begun).clone()
}

/// Starts an upstream that repeats the text `said` wherever it can: an MCP server at `/mcp` whose listings fail with it, one at `/answers`
/// whose results and errors contain it, an API and a model.
async fn parrot(said: Arc<Mutex<String>>) -> SocketAddr {
    async fn mcp(fails: bool, said: String, asked: Value) -> Json<Value> {
        let ok = |result: Value| json!({"jsonrpc": "2.0", "id": asked["id"], "result": result});
        let schema = json!({"type": "object"});
        Json(match asked["method"].as_str().unwrap_or_default() {
            "initialize" => ok(json!({
                "protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "instructions": said,
                "serverInfo": {"name": said, "version": "1"},
            })),
            "tools/list" if !fails => ok(json!({"tools": [
                {"name": "parrot", "description": "p", "inputSchema": schema},
                {"name": "throws", "description": "t", "inputSchema": schema},
            ]})),
            "tools/call" if asked["params"]["name"] == "parrot" => ok(
                json!({"content": [{"type": "text", "text": said}], "structuredContent": {said.clone(): said}, "isError": true}),
            ),
            _ => json!({"jsonrpc": "2.0", "id": asked["id"], "error": {"code": -32000, "message": said, "data": said}}),
        })
    }
    let mcp = |fails: bool| {
        post(move |State(said): State<Arc<Mutex<String>>>, Json(asked): Json<Value>| async move {
            let said = said.lock().unwrap().clone();
            if asked["id"].is_null() {
                StatusCode::ACCEPTED.into_response()
            } else {
                mcp(fails, said, asked).await.into_response()
            }
        })
    };
    let other = |State(said): State<Arc<Mutex<String>>>, _: Bytes| async move {
        let said = said.lock().unwrap().clone();
        let usage = json!({"prompt_tokens": 1, "completion_tokens": 1});
        Json(
            json!({"id": said, "model": said, "choices": [{"message": {"role": "assistant", "content": said}}], "usage": usage}),
        )
    };
    let failing = |State(said): State<Arc<Mutex<String>>>, _: Bytes| async move {
        let said = said.lock().unwrap().clone();
        let header = axum::http::HeaderValue::from_str(&said).ok();
        let headers = header.map(|header| [("x-said", header.clone()), ("content-type", header)]);
        (StatusCode::INTERNAL_SERVER_ERROR, headers.map(axum::response::AppendHeaders), said)
    };
    let router = Router::new()
        .route("/mcp", mcp(true))
        .route("/answers", mcp(false))
        .route("/fails", axum::routing::any(failing))
        .fallback(other)
        .with_state(said);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

fn canary_policy() -> PolicyConfig {
    let limits = Limits {
        wall_time_seconds: 600,
        tool_calls: 1_000_000,
        tokens: 1_000_000_000,
        denials: None,
        cost_micros: None,
        approval_wait_seconds: 0,
    };
    let mut policy = policy(limits);
    let at = |path: &str, tool: &str| {
        Upstream::Mcp(McpUpstream { url: format!("http://parrot.test{path}"), tool: tool.into(), digest: None })
    };
    let api = |path: &str| {
        Upstream::Http(HttpUpstream {
            method: HttpMethod::Post,
            url: format!("http://parrot.test{path}"),
            query: vec![],
        })
    };
    let strict = json!({
        "type": "object", "properties": {"text": {"type": "string"}, "count": {"type": "integer"}}, "additionalProperties": false
    });
    let number =
        Precondition { name: "number".into(), cel: "int(args.text) > 0".into(), message: "expected a number".into() };
    let once = belay::policy::config::Idempotency { argument: Some("text".into()), header: None, window_seconds: 600 };
    policy.tools.extend([
        tool("unlisted", at("/mcp", "parrot"), SideEffect::Read),
        tool("parrot", at("/answers", "parrot"), SideEffect::Read),
        tool("throws", at("/answers", "throws"), SideEffect::Write),
        Tool {
            output: Some(json!({"type": "object", "required": ["x"]})),
            ..tool("shaped", api("/any"), SideEffect::Read)
        },
        tool("fails", api("/fails"), SideEffect::Write),
        Tool { input: strict, ..tool("strict", api("/any"), SideEffect::Read) },
        Tool { preconditions: vec![number], ..tool("number", api("/any"), SideEffect::Read) },
        Tool { idempotency: Some(once), ..tool("once", api("/any"), SideEffect::Write) },
    ]);
    policy.tools.sort_by(|one, other| one.name.cmp(&other.name));
    policy.models.openai = Some("http://parrot.test".into());
    let host = |host: &str, uses| EgressHost {
        host: host.into(),
        ports: vec![80, 443],
        uses: vec![uses],
        credential: None,
        barred: false,
    };
    policy.egress.extend([
        host("parrot.test", EgressUse::Tools),
        host("parrot.test", EgressUse::Models),
        host("*.wild.test", EgressUse::Direct),
    ]);
    let pattern = |name: &str, pattern: &str| DataPattern {
        name: name.into(),
        pattern: pattern.into(),
        sensitivity: Sensitivity::Restricted,
    };
    policy.access.classification = vec![pattern("card", r"\b\d{4} \d{4} \d{4} \d{4}\b")];
    policy
}

impl Harness {
    /// Puts a text in one of the [`PLACES`] of a call or of a reply. Returns what the agent gets.
    async fn slip(&self, place: usize, said: &Mutex<String>, text: &str) -> String {
        *said.lock().unwrap() = text.to_owned();
        let call = |name: &str, args: Value| json!({"jsonrpc": "2.0", "id": text, "method": "tools/call", "params": {"name": name, "arguments": args, "_meta": {"x": text}}});
        let tell = |name: &str, args: Value| {
            let call = call(name, args);
            async move { told(&self.post("/mcp", call).await.1) }
        };
        let ask = |body: Value| async move { told(&self.post("/v1/chat/completions", body).await.1) };
        let (first, second) = halves(text);
        let client: Client<HttpConnector, Full<bytes::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let proxied = |uri: &str, headers: &[(&str, &str)]| {
            let request =
                headers.iter().fold(Request::get("/"), |request, (name, value)| request.header(*name, *value));
            let (uri, request) = (uri.to_owned(), request.body(()));
            let address = self.address;
            async move {
                let Ok(request) = request else { return String::new() };
                let headers = request.headers().iter().fold(String::new(), |head, (name, value)| {
                    format!("{head}{name}: {}\r\n", String::from_utf8_lossy(value.as_bytes()))
                });
                raw(address, &format!("GET {uri} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n")).await
            }
        };
        match place {
            0 => tell(text, json!({})).await,
            1 => tell("strict", json!({"text": first, text: second})).await,
            2 => tell("strict", json!({"count": text})).await,
            3 => tell("number", json!({"text": text})).await,
            4 => tell("shaped", json!({"text": text})).await,
            5 => tell("unlisted", json!({"text": text})).await,
            6 => tell("parrot", json!({first: {second: [text, first, second]}})).await,
            7 => tell("throws", json!({"text": text})).await,
            8 => tell("fails", json!({"text": text})).await,
            9 => {
                tell("once", json!({"text": text, "other": first})).await;
                tell("once", json!({"text": text, "other": second})).await
            }
            10 => ask(json!({"model": text, "max_tokens": 9, "messages": [{"role": "user", "content": text}]})).await,
            11 => {
                let unknown = ask(json!({"model": "m", "messages": [], text: first})).await;
                let beyond =
                    json!({"model": "m", "max_tokens": 1_i64 << 50, "messages": [{"role": "user", "content": text}]});
                format!("{unknown} {}", ask(beyond).await)
            }
            12 => told(&self.post_text("/v1/chat/completions", format!("{{\"model\": \"m\", {text}: 1}}")).await.1),
            13 => told(&self.post_text("/mcp", format!("{{\"a{first}\": 1, \"a{first}\": \"{second}\"")).await.1),
            14 => told(
                &self.post("/mcp", json!({"jsonrpc": "2.0", "id": 1, "method": text, "params": {"x": text}})).await.1,
            ),
            15 => raw(self.address, &format!("CONNECT {text}:443 HTTP/1.1\r\nhost: {text}\r\n\r\n")).await,
            16 => raw(self.address, &format!("CONNECT user:{text}@docs.test.example:443 HTTP/1.1\r\n\r\n")).await,
            17 => {
                raw(
                    self.address,
                    &format!("CONNECT {text}.wild.test:443 HTTP/1.1\r\nhost: {text}.wild.test:443\r\n\r\n"),
                )
                .await
            }
            18 => proxied(&format!("http://{text}/x"), &[]).await,
            19 => {
                proxied(&format!("http://docs.test.example/{text}?q={text}"), &[("x-token", text), ("cookie", text)])
                    .await
            }
            20 => {
                proxied(
                    &format!("http://a:{text}@docs.test.example/"),
                    &[("authorization", text), ("belay-target", text)],
                )
                .await
            }
            21 => proxied("http://docs.test.example/", &[("proxy-authorization", text), ("user-agent", text)]).await,
            22 => {
                let request =
                    Request::get(format!("http://{}/{}", self.address, utf8_percent_encode(text, NON_ALPHANUMERIC)));
                drop(client.request(request.body(Full::default()).unwrap()).await);
                String::new()
            }
            _ => {
                // The two halves and the whole text, in three concurrent calls.
                let parts = [first, second, text].map(|part| tell(part, json!({part: part})));
                futures::future::join_all(parts).await.join(" ")
            }
        }
    }
}

/// The number of places of [`Harness::slip`].
const PLACES: usize = 24;

/// Returns the text that a reply has for the agent.
fn told(reply: &Value) -> String {
    let places = ["/result/content/0/text", "/error/message"].map(|at| reply.pointer(at).and_then(Value::as_str));
    places.into_iter().flatten().next().or(reply.as_str()).unwrap_or_default().to_owned()
}

/// Sends bytes that do not have to be HTTP. Returns the reply, or an empty text if none arrives within two seconds.
async fn raw(address: SocketAddr, text: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut reply = vec![0; 16 << 10];
    let read = tokio::time::timeout(Duration::from_secs(2), stream.read(&mut reply)).await;
    let length = read.ok().and_then(Result::ok).unwrap_or_default();
    String::from_utf8_lossy(&reply[..length]).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_anything_that_we_write() {
    let logged = logged();
    let said = Arc::new(Mutex::new(String::new()));
    let parrot = parrot(said.clone()).await;
    let policy = canary_policy();
    let more = vec![("parrot.test".to_owned(), parrot)];
    let harness = harness_of(policy, more).await;
    let mut forbidden = BTreeSet::new();
    let mut slips = Vec::new();
    for (which, secret) in secrets().iter().enumerate() {
        for (way, text) in written(secret).into_iter().enumerate() {
            forbidden.extend(marks(&text));
            // Each text goes to two places, so that over all texts each secret and each encoding reaches every place.
            slips.extend([0, 13].map(|more| ((which + way + more) % PLACES, text.clone())));
        }
    }
    // Many at a time, because the harness delays its answers to an agent that is denied often.
    let (harness, said) = (&harness, &said);
    let answers =
        futures::stream::iter(slips).map(|(place, text)| async move { harness.slip(place, said, &text).await });
    let answers: Vec<String> = answers.buffer_unordered(256).collect().await;
    // In a flood of denials, few get a record of their own. Any of them could have got one, so all of their reasons are checked.
    let (redactor, salt) = (harness.gate.redactor(), harness.gate.salt());
    let refusals = answers.iter().filter(|answer| answer.contains("Belay denied"));
    let reasons: String = refusals.map(|reason| redactor.text(reason, salt)).collect();
    let records = harness.records().await;
    let log = serde_json::to_string(&records).unwrap();
    let mut spool = String::new();
    for entry in walk(harness.folder.path()) {
        spool.push_str(&String::from_utf8_lossy(&std::fs::read(entry).unwrap()));
    }
    let lines = String::from_utf8(logged.0.lock().unwrap().clone()).unwrap();
    for (what, text) in [("log", &log), ("spool", &spool), ("logs and spans", &lines), ("reasons", &reasons)] {
        assert_eq!(found(text, &forbidden), None, "in the {what}");
    }
    let rules: BTreeSet<_> = denied(&records).into_iter().collect();
    for rule in
        [Rule::ToolUnknown, Rule::ToolSchema, Rule::ToolPrecondition, Rule::EgressHost, Rule::RequestJson, Rule::Tokens]
    {
        assert!(rules.contains(&rule), "nothing was refused by {rule}: {rules:?}");
    }
    let refused = records.last().unwrap().usage.denials;
    assert!(refused > 2_000, "{refused}");
    assert!(records.len() > 1_000, "{}", records.len());
}

/// Checks every text, whole and in halves. The test above sends each text to two places only.
#[test]
fn no_secret_reads_as_a_name() {
    let policy = canary_policy();
    let redactor = Redactor::new(&policy, AccessPolicy::compile(&policy).unwrap().detectors());
    let salt = Salt::new([1; 32]);
    let mut shown = Vec::new();
    for text in secrets().iter().flat_map(|secret| written(secret)) {
        let (first, second) = halves(&text);
        let marks = marks(&text);
        for part in [&text, first, second] {
            let recorded = redactor.text(&format!("no contract of this task has a tool \"{part}\""), &salt);
            shown.extend(found(&recorded, &marks));
        }
    }
    assert!(shown.is_empty(), "{} are shown: {:#?}", shown.len(), &shown[..shown.len().min(20)]);
}

fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}
