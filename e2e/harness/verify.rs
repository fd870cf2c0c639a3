//! Calls whose reply never arrives, and the read that resolves their outcome: over MCP and over HTTP, through a real client.

use std::collections::BTreeMap;

use belay::{
    evidence::record::CallOutcome,
    policy::config::{Idempotency, VerifyRead},
};

use super::*;

/// Returns a policy in which `change` takes as long as its argument says, and its contract allows one second. `look` returns what its
/// argument says.
fn verified(limits: Limits) -> PolicyConfig {
    let read = |of: &str| VerifyRead {
        tool: format!("{of}.look"),
        arguments: BTreeMap::from([("is".to_owned(), "/truth".to_owned())]),
        applied: "result.there".into(),
        settle_seconds: 3,
    };
    let pairs = [
        ("mcp", over_mcp("slow"), over_mcp("weather")),
        ("http", over_http(HttpMethod::Post, "/slow/{ms}", &[]), over_http(HttpMethod::Post, "/weather", &[])),
    ];
    let mut policy = policy(limits);
    policy.tools = pairs
        .into_iter()
        .flat_map(|(of, change, look)| {
            let change = Tool {
                limits: ToolLimits { timeout_seconds: Some(1), ..ToolLimits::default() },
                idempotency: Some(Idempotency { argument: None, header: None, window_seconds: 600 }),
                verify: Some(read(of)),
                ..tool(&format!("{of}.change"), change, SideEffect::Write)
            };
            [change, tool(&format!("{of}.look"), look, SideEffect::Read)]
        })
        .collect();
    policy
}

const MANY: Limits = Limits {
    wall_time_seconds: 60,
    tool_calls: 20,
    tokens: 0,
    denials: None,
    cost_micros: None,
    approval_wait_seconds: 0,
};

fn resolved(records: &[Record]) -> Vec<CallOutcome> {
    let effect = |record: &Record| match &record.event {
        Event::Resolved(resolved) => Some(resolved.outcome),
        _ => None,
    };
    records.iter().filter_map(effect).collect()
}

/// The read returns `truth`. `true` counts at once, `false` counts only after `settle_seconds`, and any other value resolves nothing.
#[rstest::rstest]
#[case::mcp_applied("mcp", json!({"there": true}), Some(CallOutcome::Applied), "the call took effect: do not repeat it")]
#[case::http_applied("http", json!({"there": true}), Some(CallOutcome::Applied), "the call took effect: do not repeat it")]
#[case::mcp_not_applied("mcp", json!({"there": false}), Some(CallOutcome::NotApplied), "you can make it again")]
#[case::http_not_applied("http", json!({"there": false}), Some(CallOutcome::NotApplied), "you can make it again")]
#[case::mcp_no_answer("mcp", json!({"there": "perhaps"}), None, "does not tell the outcome")]
#[case::http_no_answer("http", json!({"elsewhere": true}), None, "does not tell the outcome")]
#[tokio::test]
async fn a_read_tells_what_became_of_a_call(
    #[case] of: &str,
    #[case] truth: Value,
    #[case] expected: Option<CallOutcome>,
    #[case] words: &str,
) {
    let harness = harness_of(verified(MANY), vec![]).await;
    let args = json!({"ms": 20_000, "truth": truth});
    let started = std::time::Instant::now();
    let (error, text) = harness.tool(&format!("{of}.change"), args.clone()).await;
    assert!(error && text.contains("tool.timeout") && text.contains(words), "{text}");
    let waited = started.elapsed();
    assert_eq!(
        expected == Some(CallOutcome::NotApplied),
        waited >= Duration::from_secs(3),
        "a `false` counts later: {waited:?}"
    );
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(resolved(&harness.records().await), Vec::from_iter(expected));

    // The key is free again only if the call had no effect.
    let (_, again) = harness.tool(&format!("{of}.change"), args).await;
    assert_eq!(again.contains("tool.idempotency"), expected != Some(CallOutcome::NotApplied), "{again}");
}

/// A read counts as any call does: without budget for it, the outcome stays unknown.
#[tokio::test]
async fn a_read_that_is_refused_leaves_it_unknown() {
    let harness = harness_of(verified(Limits { tool_calls: 1, ..MANY }), vec![]).await;
    let (error, text) = harness.tool("http.change", json!({"ms": 20_000, "truth": {"there": true}})).await;
    assert!(error && text.contains("http.look could not be called") && text.contains("tool call limit is 1"), "{text}");
    let records = harness.stored(4).await;
    assert_eq!(denied(&records), [Rule::ToolCalls]);
    assert!(resolved(&records).is_empty());
}

#[tokio::test]
async fn a_call_that_is_answered_needs_no_read() {
    let harness = harness_of(verified(MANY), vec![]).await;
    let (error, text) = harness.tool("mcp.change", json!({"ms": 0, "truth": {"there": true}})).await;
    assert!(!error, "{text}");
    assert_eq!(harness.gate.journal().look(|task| task.usage()).tool_calls, 1);
}

/// A harness is lost while a call is under way. The next attempt repeats the call, and the read first resolves the outcome of the earlier
/// one. `made` is how often the call reaches its upstream in total.
#[rstest::rstest]
#[case::applied("mcp", json!({"there": true}), Some(CallOutcome::Applied), 1)]
#[case::not_applied("http", json!({"there": false}), Some(CallOutcome::NotApplied), 2)]
#[case::not_told("http", json!({"there": "perhaps"}), None, 1)]
#[tokio::test]
async fn a_read_tells_what_became_of_a_call_of_an_earlier_attempt(
    #[case] of: &str,
    #[case] truth: Value,
    #[case] expected: Option<CallOutcome>,
    #[case] made: usize,
) {
    let (name, args) = (format!("{of}.change"), json!({"ms": 800, "truth": truth}));
    let Harness { gateway, mcp, api, .. } = harness_of(verified(MANY), vec![]).await;
    // Everything that the harness runs on ends at once, as it does when its pod is gone.
    let pod = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (at, upstreams) = (gateway.clone(), (mcp.clone(), api.clone()));
    let (called, lost) = (name.clone(), args.clone());
    pod.spawn(async move {
        let harness = start(at, &verified(MANY), 2, upstreams.0, upstreams.1).await;
        harness.tool(&called, lost).await
    });
    let intents = || gateway.records().iter().filter(|record| record.event.kind() == "call.intent").count();
    let listings = usize::from(of == "mcp");
    while intents() <= listings {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    pod.shutdown_background();

    let again = start(gateway, &verified(MANY), 3, mcp, api).await;
    let (error, text) = again.tool(&name, args).await;
    assert_eq!(error, expected != Some(CallOutcome::NotApplied), "{text}");
    assert!(!error || text.contains("tool.idempotency"), "{text}");
    assert_eq!(resolved(&again.records().await), Vec::from_iter(expected));
    let target = if of == "mcp" { "\"slow\"" } else { "/slow/800" };
    let sent = again.gateway.saw().into_iter().filter(|seen| seen.contains(target)).count();
    assert_eq!(sent, made, "{:?}", again.gateway.saw());
}
