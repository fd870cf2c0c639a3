//! Real clients against the harness: MCP clients (rmcp's, the official Python and TypeScript SDKs, the conformance suite), HTTP clients,
//! and a client of the proxy. Behind the harness are the gateway's own witnessing, authorization and forwarding, and servers on loopback.

mod access;
mod approvals;
mod canaries;
mod carried;
mod channels;
mod conformance;
mod contracts;
mod failed;
mod gateway;
mod ignored;
mod inherited;
mod large;
mod models;
mod once;
mod peers;
mod providers;
mod rollback;
#[path = "../secrets.rs"]
mod secrets;
mod sends;
mod spending;
mod spoken;
#[path = "../../src/harness/gate/tests/ticker.rs"]
mod ticker;
mod time;
mod told;
mod upstreams;
mod verify;
mod versions;

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use belay::{
    evidence::{
        merkle::Tree,
        note::{self, Signer},
        record::{AttemptOpened, Containment, Event, Pod, Record},
        state::TaskState,
    },
    harness::{
        approvals::Approvals,
        clock::Clock,
        dedup::Deduplicator,
        gate::{Compiled, Gate},
        gateway_client::GatewayClient,
        journal, server,
        spool::Spool,
        tools::Tools,
    },
    policy::{
        access::AccessPolicy,
        config::{
            Access, DataClass, EgressHost, EgressUse, HttpMethod, HttpUpstream, Limits, McpUpstream, ModelEndpoints,
            ModelPrice, PackIdentity, PolicyConfig, Precondition, Probe, SideEffect, TaskIdentity, Tool, ToolLimits,
            Upstream, Usage, Wiring,
        },
        decide::Contracts,
        output::Outputs,
        rule::Rule,
    },
};
use futures::StreamExt;
use gateway::Gateway;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use rmcp::{
    ServiceExt,
    model::{CallToolRequestParams, CallToolResult},
    transport::{StreamableHttpClientTransport, streamable_http_client::StreamableHttpClientTransportConfig},
};
use serde_json::{Value, json};

/// A harness under test.
struct Harness {
    address: SocketAddr,
    gateway: Arc<Gateway>,
    gate: Arc<Gate>,
    mcp: upstreams::Tools,
    api: upstreams::Asked,
    folder: tempfile::TempDir,
}

/// How long the harness uses an upstream's listing in these tests.
const LISTING_AGE: Duration = Duration::from_secs(2);
const LIMITS: Limits = Limits {
    wall_time_seconds: 60,
    tool_calls: 3,
    tokens: 5_000,
    denials: None,
    cost_micros: None,
    approval_wait_seconds: 0,
};

fn tool(name: &str, upstream: Upstream, side_effect: SideEffect) -> Tool {
    Tool {
        contract: name.into(),
        name: name.into(),
        description: format!("{name}, as its contract says"),
        upstream,
        input: json!({"type": "object"}),
        output: None,
        limits: ToolLimits::default(),
        preconditions: vec![],
        idempotency: None,
        verify: None,
        rollback: None,
        approval: None,
        side_effect,
        data: DataClass::default(),
        redact: vec![],
    }
}

fn over_mcp(tool: &str) -> Upstream {
    Upstream::Mcp(McpUpstream { url: "http://tools.test/mcp".into(), tool: tool.into(), digest: None })
}

fn over_http(method: HttpMethod, path: &str, query: &[&str]) -> Upstream {
    let query = query.iter().map(|name| (*name).to_owned()).collect();
    Upstream::Http(HttpUpstream { method, url: format!("http://api.test{path}"), query })
}

/// Returns a host that a class may reach, for one use.
fn host(host: &str, ports: &[u16], uses: EgressUse) -> EgressHost {
    EgressHost { host: host.into(), ports: ports.to_vec(), uses: vec![uses], credential: None, barred: false }
}

fn policy(limits: Limits) -> PolicyConfig {
    let text = json!({
        "type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"], "additionalProperties": false
    });
    let precondition =
        Precondition { name: "polite".into(), cel: "args.text != 'rude'".into(), message: "be polite".into() };
    let said_before = Precondition {
        name: "said".into(),
        cel: "results.say == 'echo: ' + args.text".into(),
        message: "say it first".into(),
    };
    let again = Tool {
        input: text.clone(),
        preconditions: vec![said_before],
        ..tool("again", over_mcp("echo"), SideEffect::Write)
    };
    let pay = Tool { input: text.clone(), ..tool("pay", over_mcp("echo"), SideEffect::External) };
    let say =
        Tool { input: text, preconditions: vec![precondition], ..tool("say", over_mcp("echo"), SideEffect::Write) };
    PolicyConfig {
        task: TaskIdentity {
            namespace: "n".into(),
            name: "t".into(),
            uid: "uid".into(),
            objective: "o".into(),
            workflow_class: "c".into(),
            task_class: None,
            principal: "p".into(),
            requester: None,
            image: "i".into(),
            rollback_of: None,
        },
        pack: PackIdentity { name: "k".into(), uid: "k".into(), environment: "dev".into() },
        limits,
        allowed_effects: vec![SideEffect::Read, SideEffect::Write],
        tools: vec![again, pay, say],
        models: ModelEndpoints {
            openai: Some("http://models.test".into()),
            anthropic: Some("http://models.test".into()),
            prices: vec![ModelPrice {
                model: "m*".into(),
                input_micros: 1_000_000,
                output_micros: 10_000_000,
                ..ModelPrice::default()
            }],
            ..ModelEndpoints::default()
        },
        egress: vec![
            host("docs.test.example", &[443, 80], EgressUse::Direct),
            host("tools.test", &[80], EgressUse::Tools),
            host("api.test", &[80], EgressUse::Tools),
            host("silent.test", &[80], EgressUse::Tools),
            host("everything.test", &[80], EgressUse::Tools),
            host("models.test", &[80], EgressUse::Models),
        ],
        access: Access::default(),
        ignored_hosts: vec![],
        upstream_timeout_seconds: None,
    }
}

/// Starts a harness, its gateway and its upstreams. `more` are additional upstreams.
async fn harness_of(policy: PolicyConfig, more: Vec<(String, SocketAddr)>) -> Harness {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (tools, mcp) = upstreams::mcp().await;
    let (items, api) = upstreams::api().await;
    let mut names = vec![
        ("tools.test".to_owned(), tools),
        ("api.test".to_owned(), items),
        ("silent.test".to_owned(), upstreams::silent().await),
        ("models.test".to_owned(), upstreams::model().await),
    ];
    names.extend(more);
    let gateway = Arc::new(Gateway::start(&policy, names).await);
    start(gateway, &policy, 1, mcp, api).await
}

/// Returns the result of a containment probe that found no breach.
fn contained() -> Containment {
    Containment {
        contained: true,
        rounds: 3,
        millis: 1,
        reachable: "r".into(),
        unreachable: vec!["u".into()],
        breaches: vec![],
    }
}

/// Starts a harness for an attempt, as its main function does.
async fn start(
    gateway: Arc<Gateway>,
    policy: &PolicyConfig,
    attempt: i64,
    mcp: upstreams::Tools,
    api: upstreams::Asked,
) -> Harness {
    belay::policy::model::estimate::prepare();
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "the-token\n").unwrap();
    let wiring = Wiring {
        attempt,
        gateway: gateway.address.to_string(),
        gateway_ca: gateway.ca.clone(),
        probe: Probe { reachable: gateway.address.to_string(), unreachable: vec![] },
    };
    let link = Arc::new(GatewayClient::new(&wiring, token, None).unwrap());
    let limits = policy.limits;
    let opened = link.open(attempt, "digest").await.unwrap();
    let signer = Signer::generate(&note::attempt_key_name("uid", attempt)).unwrap();
    let key = signer.verifier().to_string();
    let (used, salt) = (opened.state.tools.clone(), opened.salt.clone());
    let once = Deduplicator::new(opened.keeps_results, salt.clone());
    let rollback = opened.state.undoing.as_ref().map(|undoing| undoing.plan.clone());
    let tree = Tree::from_frontier(opened.size, opened.decoded_frontier().unwrap()).unwrap();
    let (spool, _) = Spool::open(folder.path()).unwrap();
    let start = journal::Start {
        attempt,
        tree,
        signer,
        origin: note::origin("uid"),
        state: TaskState::resume(&note::origin("uid"), opened.state),
        spool,
        follow: journal::on_stdout(),
    };
    let journal = journal::Journal::start(start, link.clone());
    let containment = contained();
    let pod = Pod {
        name: "t-1".into(),
        uid: "pod".into(),
        node: "node".into(),
        runtime_class: "gvisor".into(),
        network_policy: "t-1".into(),
    };
    let opened = AttemptOpened { verifier_key: key, policy: policy.clone(), pod, containment, rollback, local: None };
    let first = journal.record(|_, _| Ok(Event::AttemptOpened(Box::new(opened)))).unwrap();
    journal.stored(first).await.unwrap();
    let contracts = Contracts::compile(policy).unwrap();
    let (guard, outputs) = (AccessPolicy::compile(policy).unwrap(), Outputs::compile(&policy.tools).unwrap());
    let compiled = Compiled { contracts, guard, outputs };
    let seconds = |count: i64| Duration::from_secs(u64::try_from(count).unwrap());
    let clock = Clock::start(seconds(limits.wall_time_seconds), seconds(limits.approval_wait_seconds));
    let approvals = Approvals::new(link.clone(), journal.clone(), clock.clone());
    let gate = Arc::new(Gate::new(compiled, once, salt, journal, link, clock, approvals));
    let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let address = free();
    let listeners = server::Listeners::bind(address, free()).await.unwrap();
    server::serve(Tools::new(gate.clone(), &used, LISTING_AGE), listeners, &server::threads()).unwrap();
    Harness { address, gateway, gate, mcp, api, folder }
}

async fn harness_with(limits: Limits) -> Harness {
    harness_of(policy(limits), vec![]).await
}

async fn harness() -> Harness {
    harness_with(LIMITS).await
}

impl Harness {
    /// Calls a tool as an agent's MCP client does. Returns whether the result is an error, and its text.
    async fn tool(&self, name: &str, args: Value) -> (bool, String) {
        let result = self.result(name, args).await;
        let text = serde_json::to_value(&result.content).unwrap()[0]["text"].as_str().unwrap_or_default().to_owned();
        (result.is_error == Some(true), text)
    }

    /// Calls a tool as an agent's MCP client does. Returns the whole result.
    async fn result(&self, name: &str, args: Value) -> CallToolResult {
        let config = StreamableHttpClientTransportConfig::with_uri(format!("http://{}/mcp", self.address));
        let transport = StreamableHttpClientTransport::with_client(gateway::Plain::default(), config);
        let client = ().serve(transport).await.expect("no MCP session with the harness");
        let mut params = CallToolRequestParams::new(name.to_owned());
        params.arguments = args.as_object().cloned();
        client.call_tool(params).await.expect("a refusal must be a result")
    }

    async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.post_text(path, body.to_string()).await
    }

    async fn post_text(&self, path: &str, body: String) -> (StatusCode, Value) {
        let client: Client<HttpConnector, Full<bytes::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let request = Request::post(format!("http://{}{path}", self.address))
            .header("content-type", "application/json")
            .header("accept", "application/json, text/event-stream")
            .header("authorization", "Bearer belay")
            .body(Full::from(body))
            .unwrap();
        let reply = client.request(request).await.unwrap();
        let status = reply.status();
        let body = reply.into_body().collect().await.unwrap().to_bytes();
        (
            status,
            serde_json::from_slice(&body).unwrap_or_else(|_| Value::from(String::from_utf8_lossy(&body).into_owned())),
        )
    }

    /// Waits until all records are stored, and returns them.
    async fn records(&self) -> Vec<Record> {
        // A log that has ended gets no more records, so its error does not matter.
        let _ = self.gate.journal().caught_up().await;
        self.gateway.records()
    }

    /// Waits until at least `count` records are stored, and returns all records.
    async fn stored(&self, count: usize) -> Vec<Record> {
        for _ in 0..100 {
            let records = self.gateway.records();
            if records.len() >= count {
                return self.records().await;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("expected {count} records, found {:#?}", self.gateway.records());
    }
}

fn denied(records: &[Record]) -> Vec<Rule> {
    let rule = |record: &Record| match &record.event {
        Event::Denied(denied) => Some(denied.rule),
        _ => None,
    };
    records.iter().filter_map(rule).collect()
}

fn kinds(records: &[Record]) -> Vec<&'static str> {
    records.iter().map(|record| record.event.kind()).collect()
}

#[tokio::test]
async fn an_allowed_call_reaches_the_upstream_between_its_intent_and_its_outcome() {
    let harness = harness().await;
    let (error, text) = harness.tool("say", json!({"text": "hello"})).await;
    assert!(!error, "{text}");
    assert_eq!(text, "echo: hello");
    let records = harness.stored(5).await;
    // The harness lists the upstream's tools first, which is not a tool call.
    assert_eq!(kinds(&records), ["attempt.opened", "call.intent", "call.outcome", "call.intent", "call.outcome"]);
    assert_eq!(records[2].usage.tool_calls, 0);
    let Event::Outcome(outcome) = &records[4].event else { panic!() };
    assert_eq!(outcome.outcome, belay::evidence::record::CallOutcome::Applied);
    assert_eq!(outcome.upstream.as_deref(), Some("198.51.100.1:80"));
    assert_eq!(records[4].usage.tool_calls, 1);
    assert!(
        harness.gateway.saw().iter().all(|seen| !seen.contains("belay.dev/intent")),
        "our own mark left the harness"
    );
    assert!(!serde_json::to_string(&records).unwrap().contains("hello"), "arguments are in the log");
}

#[tokio::test]
async fn refusals_name_their_rule_to_the_agent_and_to_the_log() {
    let harness = harness().await;
    for (tool, args, rule) in [
        ("nothing", json!({}), Rule::ToolUnknown),
        ("pay", json!({"text": "a"}), Rule::ToolEffect),
        ("say", json!({}), Rule::ToolSchema),
        ("say", json!({"text": "a", "admin": true}), Rule::ToolSchema),
        ("say", json!({"text": "rude"}), Rule::ToolPrecondition),
    ] {
        let (error, text) = harness.tool(tool, args).await;
        assert!(error && text.contains(rule.as_str()), "{text}");
    }
    let records = harness.stored(6).await;
    let expected = [Rule::ToolUnknown, Rule::ToolEffect, Rule::ToolSchema, Rule::ToolSchema, Rule::ToolPrecondition];
    assert_eq!(denied(&records), expected);
    assert_eq!(records[5].usage, Usage { denials: 5, ..Usage::default() });
    assert!(harness.gateway.saw().is_empty(), "a refused call left the harness");
}

#[tokio::test]
async fn a_call_that_could_be_read_in_two_ways_is_refused_and_recorded() {
    let harness = harness().await;
    let call = |params: &str| format!(r#"{{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{params}}}"#);
    for params in [
        r#"{"name":"say","arguments":{"text":"rude","text":"hello"}}"#,
        r#"{"name":"say","arguments":{"text":"hello","\u0074ext":"rude"}}"#,
        r#"{"name":"pay","name":"say","arguments":{"text":"hello"}}"#,
        r#"{"name":"say","arguments":{"text":"hello"},"arguments":{"text":"rude"}}"#,
        r#"{"name":"say","arguments":{"text":1e999}}"#,
        r#"{"name":"say","arguments":{"text":NaN}}"#,
    ] {
        let (status, reply) = harness.post_text("/mcp", call(params)).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{params}: {reply}");
        assert!(reply["error"]["message"].as_str().unwrap().contains("request.json"), "{reply}");
    }
    // One reading in JSON, but another one in JavaScript.
    let (_, reply) = harness.post_text("/mcp", call(r#"{"name":"say","arguments":{"text":-0}}"#)).await;
    assert!(reply.to_string().contains("request.json"), "{reply}");
    // This is no call, so there is nothing to record.
    let list = r#"{"jsonrpc":"2.0","id":1,"id":1,"method":"tools/list"}"#;
    assert_eq!(harness.post_text("/mcp", list.into()).await.0, StatusCode::BAD_REQUEST);
    let model = r#"{"model":"m","messages":[],"max_tokens":1,"max_tokens":100000}"#;
    let (status, reply) = harness.post_text("/v1/chat/completions", model.into()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(reply.to_string().contains("request.json"), "{reply}");
    assert_eq!(denied(&harness.stored(9).await), [Rule::RequestJson; 8]);
    assert!(harness.gateway.saw().is_empty(), "a refused call left the harness");
    let (error, text) = harness.tool("say", json!({"text": "hello"})).await;
    assert!(!error, "{text}");
}

#[tokio::test]
async fn a_precondition_sees_what_an_earlier_call_answered() {
    let harness = harness().await;
    let (error, text) = harness.tool("again", json!({"text": "hello"})).await;
    assert!(error && text.contains("tool.precondition"), "{text}");
    for text in ["other", "hello"] {
        assert!(!harness.tool("say", json!({"text": text})).await.0);
    }
    let (error, text) = harness.tool("again", json!({"text": "other"})).await;
    assert!(error && text.contains("say it first"), "the last answer counts: {text}");
    let (error, text) = harness.tool("again", json!({"text": "hello"})).await;
    assert!(!error, "{text}");
}

#[tokio::test]
async fn so_many_refusals_end_everything() {
    let limits = Limits {
        wall_time_seconds: 60,
        tool_calls: 3,
        tokens: 5_000,
        denials: Some(4),
        cost_micros: None,
        approval_wait_seconds: 0,
    };
    let harness = Arc::new(harness_with(limits).await);
    let calls = (0..12).map(|_| {
        let harness = harness.clone();
        tokio::spawn(async move { harness.tool("nothing", json!({})).await.1 })
    });
    let texts: Vec<_> = futures::future::join_all(calls).await.into_iter().map(Result::unwrap).collect();
    let by = |rule: &str| texts.iter().filter(|text| text.contains(rule)).count();
    assert_eq!((by("tool.unknown"), by("budget.denials")), (4, 8));
    tokio::time::timeout(Duration::from_secs(5), harness.gate.refused_enough()).await.expect("nobody was told");
    let (error, text) = harness.tool("say", json!({"text": "a"})).await;
    assert!(error && text.contains("budget.denials"), "{text}");
    let (status, reply) = harness.post("/v1/messages", json!({"model": "m", "messages": []})).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(reply.to_string().contains("budget.denials"), "{reply}");
    let (_, rule) = connect(harness.address, "docs.test.example:443").await;
    assert_eq!(rule.as_deref(), Some("budget.denials"));
    assert!(harness.gateway.saw().is_empty());
}

#[tokio::test]
async fn a_flood_of_refusals_is_counted_and_slowed_down_and_does_not_swell_the_log() {
    let harness = harness().await;
    let call = r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"nothing","arguments":{}}}"#;
    let calls = (0..2_000).map(|_| harness.post_text("/mcp", call.into()));
    let told = futures::stream::iter(calls).buffer_unordered(500).map(|(_, reply)| reply.to_string());
    assert!(told.all(|told| async move { told.contains("tool.unknown") }).await);
    let records = harness.records().await;
    assert_eq!(records.last().unwrap().usage.denials, 2_000);
    let counts = records.iter().filter_map(|record| match &record.event {
        Event::Denied(denied) => Some(denied.count),
        _ => None,
    });
    assert_eq!(counts.sum::<i64>(), 2_000);
    assert!(records.len() < 200, "{}", records.len());
}

#[tokio::test]
async fn money_is_reserved_for_the_longest_reply_and_settled_by_the_account() {
    let limits = Limits {
        wall_time_seconds: 60,
        tool_calls: 0,
        tokens: 1_000_000,
        denials: None,
        cost_micros: Some(5_000),
        approval_wait_seconds: 0,
    };
    let harness = harness_with(limits).await;
    let hello = json!([{"role": "user", "content": "hi"}]);
    let (status, reply) = harness.post("/v1/chat/completions", json!({"model": "x", "messages": hello})).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(reply.to_string().contains("model.price"), "{reply}");
    let long = json!({"model": "m", "messages": hello, "max_tokens": 500});
    let (_, reply) = harness.post("/v1/chat/completions", long).await;
    assert!(reply.to_string().contains("budget.cost"), "{reply}");
    let (status, reply) = harness.post("/v1/chat/completions", json!({"model": "m", "messages": hello})).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    let records = harness.stored(5).await;
    assert_eq!(denied(&records), [Rule::ModelPrice, Rule::Cost]);
    let Event::Intent(intent) = &records[3].event else { panic!("{records:#?}") };
    assert!((4_990..=5_000).contains(&intent.reserved_cost_micros), "{intent:?}");
    assert!(intent.rules.ends_with(&[Rule::Tokens, Rule::Cost]), "{intent:?}");
    assert_eq!(intent.model.as_deref(), Some("m"));
    // 7 tokens of the prompt cost 1 each, and 5 tokens of the reply cost 10 each.
    assert_eq!(records[4].usage.cost_micros, 57);
}

#[tokio::test]
async fn parallel_calls_cannot_share_the_last_unit_of_a_budget() {
    let harness = Arc::new(harness().await);
    let calls = (0..12).map(|n| {
        let harness = harness.clone();
        tokio::spawn(async move { harness.tool("say", json!({"text": format!("{n}")})).await })
    });
    let results = futures::future::join_all(calls).await;
    let allowed = results.iter().filter(|result| !result.as_ref().unwrap().0).count();
    assert_eq!(allowed, 3);
    let refused = results.iter().filter(|result| result.as_ref().unwrap().1.contains("budget.toolCalls")).count();
    assert_eq!(refused, 9);
    assert_eq!(harness.mcp.calls.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_model_call_is_reserved_for_and_settled_by_its_own_account() {
    let harness = harness().await;
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    let (status, reply) = harness.post("/v1/chat/completions", body).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    let records = harness.stored(3).await;
    let Event::Intent(intent) = &records[1].event else { panic!("{records:#?}") };
    let prompt = intent.reserved_tokens - 4_096;
    assert!((60..100).contains(&prompt), "an absent output limit is a modest one: {}", intent.reserved_tokens);
    assert_eq!(records[2].usage.tokens, 12, "settled by the reply's usage");
    let sent = harness.gateway.saw().pop().unwrap();
    assert!(sent.contains("\"max_tokens\":4096"), "{sent}");
    assert!(!sent.contains("Bearer belay"), "the agent's placeholder credential was sent on");
}

#[tokio::test]
async fn a_streamed_reply_streams_and_is_metered() {
    let harness = harness().await;
    let body = json!({"model": "m", "stream": true, "messages": []});
    let (status, reply) = harness.post("/v1/chat/completions", body).await;
    assert_eq!(status, StatusCode::OK);
    assert!(reply.as_str().unwrap().contains("data: [DONE]"), "{reply}");
    let records = harness.stored(3).await;
    assert_eq!(records[2].usage.tokens, 12);
}

/// A call that would fit without the reservations of concurrent calls waits for its turn. A call that can never fit does not wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_fits_but_for_what_others_hold_waits_for_them() {
    let harness = Arc::new(harness_with(Limits { tokens: 1_000, ..LIMITS }).await);
    let body = json!({
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 600, "metadata": {"fails": "thinks"},
    });
    let calls = (0..4).map(|_| {
        let (harness, body) = (harness.clone(), body.clone());
        tokio::spawn(async move { harness.post("/v1/chat/completions", body).await })
    });
    for call in futures::future::join_all(calls).await {
        let (status, reply) = call.unwrap();
        assert_eq!(status, StatusCode::OK, "{reply}");
    }
    assert_eq!(harness.stored(9).await.last().unwrap().usage.tokens, 48);
    let mut never = body;
    never["metadata"]["fails"] = "is silent".into();
    let held = {
        let harness = harness.clone();
        tokio::spawn(async move { harness.post("/v1/chat/completions", never).await })
    };
    harness.stored(10).await;
    let large = json!({"model": "m", "messages": [], "max_tokens": 2_000});
    let (status, reply) = harness.post("/v1/chat/completions", large).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(!held.is_finished(), "it is refused at once, for what calls under way hold is not enough");
    let reply = reply.to_string();
    assert!(reply.contains("48 are spent") && reply.contains("reserved for calls in progress"), "{reply}");
    held.abort();
}

/// The client has gone before the reply began, because a guardrail was triggered or a person pressed a key. The model continues, so the
/// call is settled by its usage.
#[tokio::test]
async fn a_call_that_nobody_waits_for_is_charged_what_it_cost() {
    for stream in [false, true] {
        let harness = Arc::new(harness().await);
        let body = json!({
            "model": "m", "stream": stream, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1_000,
            "metadata": {"fails": "thinks"},
        });
        let asked = {
            let harness = harness.clone();
            tokio::spawn(async move { harness.post("/v1/chat/completions", body).await })
        };
        harness.stored(2).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!asked.is_finished());
        asked.abort();
        let records = harness.stored(3).await;
        let Event::Outcome(outcome) = &records[2].event else { panic!("{records:#?}") };
        assert_eq!((outcome.tokens, outcome.status), (12, 200), "{records:#?}");
    }
}

/// Belay requests the usage of each stream. An agent that did not request it reads `choices[0]` of every event.
#[tokio::test]
async fn the_account_of_a_stream_goes_to_who_has_asked_for_it() {
    for (options, asked) in [
        (json!(null), false),
        (json!({"include_usage": false}), false),
        (json!({"include_obfuscation": false}), false),
        (json!({"include_usage": true}), true),
    ] {
        let harness = harness().await;
        let mut body =
            json!({"model": "m", "stream": true, "max_tokens": 20, "messages": [{"role": "user", "content": "hi"}]});
        if !options.is_null() {
            body["stream_options"] = options.clone();
        }
        let client: Client<HttpConnector, Full<bytes::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let request = Request::post(format!("http://{}/v1/chat/completions", harness.address))
            .header("content-type", "application/json")
            .body(Full::from(body.to_string()))
            .unwrap();
        let reply = client.request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
        let reply = String::from_utf8(reply.to_vec()).unwrap();
        assert_eq!(reply.contains(r#""choices":[]"#), asked, "{options}: {reply}");
        assert!(reply.contains(r#""content":"a""#) && reply.ends_with("data: [DONE]\n\n"), "{options}: {reply}");
        let records = harness.stored(3).await;
        assert_eq!(records[2].usage.tokens, 12, "{options}: it is charged by its account all the same");
    }
}

/// A provider's failure, or a client that stops reading, does not use up the task's budget: a call costs what has arrived.
#[rstest::rstest]
#[case::refused("overloaded", "", 0)]
// The prompt, and two pieces of five bytes each.
#[case::hung_up("hangs up", "", 10)]
// If a proxy cuts off a stream, its body ends as if it were whole.
#[case::ended_before_its_protocol_does("ends early", "", 10)]
#[case::an_error_in_place_of_the_rest("says so", "", 5)]
#[case::done_and_left_open("lingers", "[DONE]", 12)]
// If the client stops reading, the call costs at least its reservation, because the model continues.
#[case::unread("rambles", "hello", 20)]
#[tokio::test]
async fn what_breaks_off_is_charged_for_what_came(#[case] fails: &str, #[case] until: &str, #[case] output: i64) {
    let harness = harness().await;
    let body = json!({
        "model": "m", "stream": true, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20,
        "metadata": {"fails": fails},
    });
    let client: Client<HttpConnector, Full<bytes::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let request = Request::post(format!("http://{}/v1/chat/completions", harness.address))
        .header("content-type", "application/json")
        .body(Full::from(body.to_string()))
        .unwrap();
    let mut reply = client.request(request).await.unwrap().into_body();
    let mut said = Vec::new();
    while let Some(Ok(frame)) = reply.frame().await {
        said.extend(frame.into_data().unwrap_or_default());
        if !until.is_empty() && String::from_utf8_lossy(&said).contains(until) {
            break;
        }
    }
    drop(reply);
    let records = harness.stored(3).await;
    let Event::Intent(intent) = &records[1].event else { panic!("{records:#?}") };
    let prompt = intent.reserved_tokens - 20;
    let charged = if matches!(fails, "overloaded" | "lingers") { output } else { prompt + output };
    assert_eq!(records[2].usage.tokens, charged, "{records:#?}");
}

#[tokio::test]
async fn a_model_call_beyond_the_budget_does_not_leave() {
    let harness = harness_with(Limits {
        wall_time_seconds: 60,
        tool_calls: 0,
        tokens: 100,
        denials: None,
        cost_micros: None,
        approval_wait_seconds: 0,
    })
    .await;
    for (path, prompt) in
        [("/v1/chat/completions", "messages"), ("/v1/responses", "input"), ("/v1/messages", "messages")]
    {
        let body = json!({"model": "m", prompt: [{"role": "user", "content": "word ".repeat(200)}]});
        let (status, reply) = harness.post(path, body).await;
        assert_eq!(status, StatusCode::FORBIDDEN);
        assert!(reply.to_string().contains("budget.tokens"), "{reply}");
    }
    assert_eq!(denied(&harness.stored(4).await), [Rule::Tokens; 3]);
    assert!(harness.gateway.saw().is_empty());
}

#[tokio::test]
async fn the_proxy_tunnels_to_listed_hosts_only() {
    let harness = harness().await;
    for (target, rule) in [
        ("evil.test.example:443", "egress.host"),
        ("docs.test.example:22", "egress.port"),
        ("127.0.0.1:443", "egress.host"),
        ("[::1]:443", "egress.host"),
    ] {
        let (status, found) = connect(harness.address, target).await;
        assert_eq!((status, found.as_deref()), (StatusCode::FORBIDDEN, Some(rule)), "{target}");
    }
    let (status, _) = connect(harness.address, "docs.test.example:443").await;
    assert_eq!(status, StatusCode::OK);
}

async fn connect(address: SocketAddr, target: &str) -> (StatusCode, Option<String>) {
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    let request = Request::builder().method(Method::CONNECT).uri(target).body(Full::<bytes::Bytes>::default()).unwrap();
    let reply = sender.send_request(request).await.unwrap();
    let rule = reply.headers().get("belay-rule").map(|rule| rule.to_str().unwrap().to_owned());
    (reply.status(), rule)
}

#[tokio::test]
async fn nothing_leaves_while_the_store_is_away_and_everything_is_there_when_it_is_back() {
    let harness = Arc::new(harness().await);
    harness.gateway.store_fails(true);
    let calling = {
        let harness = harness.clone();
        tokio::spawn(async move { harness.tool("say", json!({"text": "later"})).await })
    };
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(harness.mcp.calls.load(Ordering::SeqCst), 0, "a call left before its intent was stored");
    harness.gateway.store_fails(false);
    let (error, text) = calling.await.unwrap();
    assert!(!error, "{text}");
    let records = harness.stored(5).await;
    assert_eq!(kinds(&records), ["attempt.opened", "call.intent", "call.outcome", "call.intent", "call.outcome"]);
}

/// Returns a policy with the additional tool `look`, which reads.
fn reading() -> PolicyConfig {
    let mut policy = policy(LIMITS);
    policy.tools.push(tool("look", over_http(HttpMethod::Get, "/items/{id}", &[]), SideEffect::Read));
    policy
}

#[tokio::test]
async fn reads_leave_while_the_bucket_is_away_and_nothing_else_does() {
    let harness = Arc::new(harness_of(reading(), vec![]).await);
    harness.gateway.bucket_is_away(true);
    let (error, text) = harness.tool("look", json!({"id": 7})).await;
    assert!(!error, "{text}");
    let calling = {
        let harness = harness.clone();
        tokio::spawn(async move { harness.tool("say", json!({"text": "later"})).await })
    };
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(harness.mcp.calls.load(Ordering::SeqCst), 0, "a write left before its intent was stored");
    harness.gateway.bucket_is_away(false);
    let (error, text) = calling.await.unwrap();
    assert!(!error, "{text}");
}

#[tokio::test]
async fn a_model_call_does_not_wait_for_the_bucket() {
    for stream in [false, true] {
        let harness = harness().await;
        harness.gateway.bucket_is_away(true);
        let asked = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream});
        let (status, reply) = harness.post("/v1/chat/completions", asked).await;
        assert_eq!(status, StatusCode::OK, "{reply}");
        // The control: the intent is witnessed, and no call leaves without that.
        let intents = |harness: &Harness| {
            harness.gateway.records().iter().filter(|record| record.event.kind() == "call.intent").count()
        };
        assert_eq!(intents(&harness), 1);
        harness.gateway.store_fails(true);
        let again = json!({"model": "m", "messages": [{"role": "user", "content": "again"}], "stream": stream});
        let unwitnessed = harness.post("/v1/chat/completions", again);
        assert!(tokio::time::timeout(Duration::from_millis(600), unwitnessed).await.is_err());
        assert_eq!(harness.gateway.saw().len(), 1);
    }
}

#[tokio::test]
async fn what_a_harness_leaves_in_its_spool_the_next_one_has_stored() {
    let harness = Arc::new(harness_of(reading(), vec![]).await);
    let before = harness.gateway.records().len();
    harness.gateway.store_fails(true);
    let calling = {
        let harness = harness.clone();
        tokio::spawn(async move { harness.tool("look", json!({"id": 7})).await })
    };
    tokio::time::sleep(Duration::from_millis(400)).await;
    calling.abort();
    // As far as the spool is concerned, the harness is killed here and started again.
    let killed = tempfile::tempdir().unwrap();
    std::fs::copy(harness.folder.path().join("segments.jsonl"), killed.path().join("segments.jsonl")).unwrap();
    let (_, left) = Spool::open(killed.path()).unwrap();
    let left: Vec<_> = left.into_iter().filter(|segment| segment.end() > 1).collect();
    harness.gateway.store_fails(false);
    let link = harness.gate.link();
    for again in [left.clone(), left] {
        assert!(journal::send_left(link, 1, again.into_iter()).await.unwrap());
        let kinds = kinds(&harness.gateway.records()[before..]);
        assert_eq!(kinds.first(), Some(&"call.intent"), "{kinds:?}");
        assert_eq!(kinds.iter().filter(|kind| **kind == "call.intent").count(), 1, "appending twice is appending once");
    }
    assert!(!journal::send_left(link, 1, std::iter::empty()).await.unwrap());
}

#[tokio::test]
async fn after_wall_time_everything_is_refused() {
    let harness = harness_with(Limits {
        wall_time_seconds: 0,
        tool_calls: 3,
        tokens: 5_000,
        denials: None,
        cost_micros: None,
        approval_wait_seconds: 0,
    })
    .await;
    let (error, text) = harness.tool("say", json!({"text": "a"})).await;
    assert!(error && text.contains("budget.wallTime"), "{text}");
    harness.gate.stop(Rule::ContainmentLost, "too late to matter");
    assert_eq!(denied(&harness.stored(2).await), [Rule::WallTime]);
}

/// What the probe finds reaches the agent: calls that wait are answered, and no call of any channel follows.
#[tokio::test]
async fn a_lost_containment_ends_the_calls_that_wait_and_denies_all_others() {
    let harness = Arc::new(harness().await);
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 600, "metadata": {"fails": "is silent"}});
    let waits = {
        let (harness, body) = (harness.clone(), body.clone());
        tokio::spawn(async move { harness.post("/v1/chat/completions", body).await })
    };
    harness.stored(2).await;
    // A probe that finds the pod contained changes nothing.
    harness.gate.contained(contained());
    let (error, text) = harness.tool("say", json!({"text": "hello"})).await;
    assert!(!error && !waits.is_finished(), "{text}");

    let breaches = vec!["10.96.0.1:443 answered, and must not".to_owned()];
    harness.gate.contained(Containment { contained: false, breaches, ..contained() });
    let (status, reply) = tokio::time::timeout(Duration::from_secs(5), waits).await.expect("it waits on").unwrap();
    assert_eq!(status, StatusCode::FORBIDDEN, "{reply}");
    assert!(reply.to_string().contains("containment.lost"), "{reply}");
    let (calls, left) = (harness.mcp.calls.load(Ordering::SeqCst), harness.gateway.saw().len());
    let (error, text) = harness.tool("say", json!({"text": "hello"})).await;
    assert!(error && text.contains("containment.lost") && text.contains("10.96.0.1:443 answered"), "{text}");
    let (status, reply) = harness.post("/v1/chat/completions", body).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{reply}");
    let (status, rule) = connect(harness.address, "docs.test.example:443").await;
    assert_eq!((status, rule.as_deref()), (StatusCode::FORBIDDEN, Some("containment.lost")));
    assert_eq!((harness.mcp.calls.load(Ordering::SeqCst), harness.gateway.saw().len()), (calls, left), "a call left");
    let records = harness.records().await;
    let lost =
        records.iter().position(|record| matches!(&record.event, Event::ContainmentChecked(seen) if !seen.contained));
    let after = &records[lost.unwrap() + 1..];
    assert!(after.iter().all(|record| record.event.kind() != "call.intent"), "{after:#?}");
    // The call that waited, whose denial may be recorded before the loss, and the three after it.
    assert_eq!(denied(&records), [Rule::ContainmentLost; 4]);
}
