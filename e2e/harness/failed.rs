//! A log that cannot continue ends the attempt: the agent is stopped at once, no call gets a normal answer, and the attempt does not
//! succeed, whatever the agent reports.

use std::path::Path;

use belay::{
    ends::AttemptEnd,
    harness::{self, Ended, HarnessError, Parts, Stop, probe::Targets},
};
use tokio::{sync::oneshot, task::JoinHandle};

use super::*;

/// A harness that runs as in its main function.
struct Running {
    address: SocketAddr,
    stop: oneshot::Sender<Stop>,
    ended: JoinHandle<Result<Ended, HarnessError>>,
}

impl Running {
    /// Waits until the harness has ended by itself, and returns how it ended.
    async fn end(self) -> Ended {
        tokio::time::timeout(Duration::from_secs(60), self.ended).await.expect("it goes on").unwrap().unwrap()
    }
}

/// Starts a harness that uses this gateway and has its spool in `folder`. If the harness ends before it serves, returns how it ended.
async fn run(gateway: &Gateway, policy: &PolicyConfig, folder: &Path) -> Result<Running, Ended> {
    let token = folder.join("token");
    std::fs::write(&token, "the-token\n").unwrap();
    let probe = Probe { reachable: gateway.address.to_string(), unreachable: vec![] };
    let wiring = Wiring {
        attempt: 1,
        gateway: gateway.address.to_string(),
        gateway_ca: gateway.ca.clone(),
        probe: probe.clone(),
    };
    let containment = contained();
    let parts = Parts {
        config: belay::policy::config::HarnessConfig { policy: policy.clone(), wiring },
        containment,
        token,
        spool: folder.to_owned(),
        pod: Pod {
            name: "t-1".into(),
            uid: "pod".into(),
            node: "node".into(),
            runtime_class: "gvisor".into(),
            network_policy: "t-1".into(),
        },
        local: None,
        looking: Arc::new(Targets::new(&probe, None)),
        follow: Box::new(|_, _| {}),
        gateway: None,
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (serves, serving) = oneshot::channel();
    let (stop, stopped) = oneshot::channel();
    let listeners = async move || Ok(server::Listeners { agent: listener, health: None });
    let stopped = async move { stopped.await.unwrap_or(Stop::Terminated) };
    let mut ended = tokio::spawn(harness::run(parts, listeners, move || serves.send(()).unwrap(), stopped));
    tokio::select! {
        Ok(()) = serving => Ok(Running { address, stop, ended }),
        ended = &mut ended => Err(ended.unwrap().unwrap()),
    }
}

/// Calls a tool as an agent does. Returns its text, or as an error the text of the denial or the reason why there was no answer.
async fn say(address: SocketAddr) -> Result<String, String> {
    let config = StreamableHttpClientTransportConfig::with_uri(format!("http://{address}/mcp"));
    let transport = StreamableHttpClientTransport::with_client(gateway::Plain::default(), config);
    let client = ().serve(transport).await.map_err(|error| error.to_string())?;
    let mut params = CallToolRequestParams::new("say");
    params.arguments = json!({"text": "a"}).as_object().cloned();
    let result = client.call_tool(params).await.map_err(|error| error.to_string())?;
    let text = serde_json::to_value(&result.content).unwrap()[0]["text"].as_str().unwrap_or_default().to_owned();
    if result.is_error == Some(true) { Err(text) } else { Ok(text) }
}

async fn beside() -> (Arc<Gateway>, PolicyConfig) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (tools, _) = upstreams::mcp().await;
    let policy = policy(Limits { tool_calls: 100, ..LIMITS });
    (Arc::new(Gateway::start(&policy, vec![("tools.test".to_owned(), tools)]).await), policy)
}

#[rstest::rstest]
#[case::not_what_follows(StatusCode::FORBIDDEN, Rule::LogSegment)]
#[case::another_is_in_its_place(StatusCode::CONFLICT, Rule::LogFork)]
#[case::beyond_a_limit(StatusCode::FORBIDDEN, Rule::ToolCalls)]
#[case::not_read(StatusCode::BAD_REQUEST, Rule::Request)]
#[case::from_somebody_else(StatusCode::FORBIDDEN, Rule::IdentityAttempt)]
#[case::the_task_has_ended(StatusCode::FORBIDDEN, Rule::TaskClosed)]
#[case::too_long(StatusCode::PAYLOAD_TOO_LARGE, Rule::Request)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_the_witness_refuses_ends_the_run(#[case] status: StatusCode, #[case] rule: Rule) {
    let (gateway, policy) = beside().await;
    let folder = tempfile::tempdir().unwrap();
    let running = run(&gateway, &policy, folder.path()).await.unwrap_or_else(|ended| panic!("{ended:?}"));
    // The control: the harness works and continues.
    assert_eq!(say(running.address).await.as_deref(), Ok("echo: a"));
    assert!(!running.ended.is_finished());
    gateway.refuses(Some((status, rule)));
    // The request that ends an upstream's session is not a call.
    let calls = || gateway.saw().iter().filter(|saw| saw.contains("tools/call")).count();
    assert_eq!(calls(), 1);
    let refused = say(running.address).await.unwrap_err();
    assert_eq!(calls(), 1, "nothing leaves: {refused}");
    let Ended::LogFailed(reason) = running.end().await else { panic!("it ended as if all were well") };
    assert!(reason.contains(rule.as_str()), "{reason}");
    // The witness would accept the segment now. The same pod must not continue all the same.
    gateway.refuses(None);
    let again = run(&gateway, &policy, folder.path()).await.err();
    assert_eq!(again, Some(Ended::LogFailed(reason)));
    assert_eq!(again.unwrap().end(), AttemptEnd::LogFailed);
    assert!(!gateway.records().iter().any(|record| matches!(record.event, Event::AttemptClosed(_))));
}

/// The agent has ended, and the witness rejects its last record: the attempt has not succeeded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_whose_last_record_is_refused_has_not_succeeded() {
    for refuses in [false, true] {
        let (gateway, policy) = beside().await;
        let folder = tempfile::tempdir().unwrap();
        let running = run(&gateway, &policy, folder.path()).await.unwrap_or_else(|ended| panic!("{ended:?}"));
        say(running.address).await.unwrap();
        gateway.refuses(refuses.then_some((StatusCode::FORBIDDEN, Rule::LogSegment)));
        running.stop.send(Stop::AgentEnded).unwrap();
        let ended = running.ended.await.unwrap().unwrap();
        assert_eq!(matches!(ended, Ended::LogFailed(_)), refuses, "{ended:?}");
        assert_eq!(ended.end().exit_code() == 0, !refuses);
    }
}

/// What a harness recorded before it was killed has happened, even if the witness rejects the records.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_left_and_is_refused_ends_the_run_too() {
    for refuses in [false, true] {
        let harness = Arc::new(harness_of(reading(), vec![]).await);
        harness.gateway.store_fails(true);
        let calling = {
            let harness = harness.clone();
            tokio::spawn(async move { harness.tool("look", json!({"id": 7})).await })
        };
        tokio::time::sleep(Duration::from_millis(400)).await;
        calling.abort();
        let killed = tempfile::tempdir().unwrap();
        std::fs::copy(harness.folder.path().join("segments.jsonl"), killed.path().join("segments.jsonl")).unwrap();
        harness.gateway.refuses_beyond(refuses.then_some(1));
        harness.gateway.store_fails(false);
        let ended = run(&harness.gateway, &reading(), killed.path()).await;
        assert_eq!(matches!(ended, Err(Ended::LogFailed(_))), refuses, "{:?}", ended.err());
    }
}

/// Usage that a record cannot have is not counted: the reservation stays spent, and the log continues.
#[rstest::rstest]
#[case::of_a_call(json!({"prompt_tokens": 7, "completion_tokens": 5}), Some(12))]
#[case::both(json!({"prompt_tokens": 9_007_199_254_740_991_i64, "completion_tokens": 9_007_199_254_740_991_i64}), None)]
#[case::the_sum(json!({"prompt_tokens": 9_007_199_254_740_991_i64, "completion_tokens": 1}), None)]
#[case::one_more(json!({"prompt_tokens": 9_007_199_254_740_992_i64, "completion_tokens": 1}), None)]
#[case::all_that_there_is(json!({"prompt_tokens": u64::MAX, "completion_tokens": 1}), None)]
#[case::less_than_nothing(json!({"prompt_tokens": -1, "completion_tokens": 1}), None)]
#[case::a_part(json!({"prompt_tokens": 0.5, "completion_tokens": 1}), None)]
#[case::the_most(json!({"prompt_tokens": 9_007_199_254_740_990_i64, "completion_tokens": 1}), Some(9_007_199_254_740_991 - 12))]
#[tokio::test]
async fn what_a_provider_says_of_its_cost_does_not_end_the_log(#[case] usage: Value, #[case] counted: Option<i64>) {
    let harness = harness_with(Limits { tokens: 100_000, ..LIMITS }).await;
    let body = json!({"model": "m", "messages": [], "max_tokens": 5});
    assert_eq!(harness.post("/v1/chat/completions", body.clone()).await.0, StatusCode::OK);
    let mut lying = body;
    lying["metadata"] = json!({"usage": usage});
    assert_eq!(harness.post("/v1/chat/completions", lying).await.0, StatusCode::OK);
    let (error, text) = harness.tool("unheard-of", json!({})).await;
    assert!(error && text.contains("tool.unknown"), "{text}");
    let records = harness.stored(6).await;
    let mut reserved = records.iter().filter_map(|record| match &record.event {
        Event::Intent(intent) => Some(intent.reserved_tokens),
        _ => None,
    });
    let (reserved, last) = (reserved.next_back().unwrap(), records.last().unwrap());
    assert!(matches!(last.event, Event::Denied(_)), "{last:?}");
    assert_eq!(last.usage.tokens, 12 + counted.unwrap_or(reserved));
    assert!(harness.gate.journal().failure().is_none());
}
