//! Hosts that client libraries call by themselves: nothing goes there, all of it is recorded, and it ends no task.

use belay::policy::rule::Rule;
use serde_json::json;

use super::{LIMITS, Limits, connect, denied, harness_of, policy, start};

#[tokio::test]
async fn connections_to_ignored_hosts_are_denied_and_do_not_end_the_task() {
    let mut policy = policy(Limits { denials: Some(2), ..LIMITS });
    policy.ignored_hosts = vec!["telemetry.test.example".into(), "*.ingest.test.example".into()];
    let harness = harness_of(policy.clone(), vec![]).await;
    let ignored = ["telemetry.test.example:443", "o1.ingest.test.example:443", "telemetry.test.example:80"];
    for target in ignored.iter().cycle().take(6) {
        let (_, rule) = connect(harness.address, target).await;
        assert_eq!(rule.as_deref(), Some("egress.ignored"), "{target}");
    }
    assert!(harness.gateway.saw().is_empty(), "nothing goes there");
    let records = harness.stored(7).await;
    assert_eq!(denied(&records), [Rule::EgressIgnored; 6]);
    assert_eq!(records[6].usage.denials, 6, "they are counted");
    let (error, text) = harness.tool("say", json!({"text": "hello"})).await;
    assert!(!error, "and end nothing: {text}");

    // Not in the next attempt either, which goes on from the log.
    let next = start(harness.gateway.clone(), &policy, 2, harness.mcp.clone(), harness.api.clone()).await;
    let (error, text) = next.tool("say", json!({"text": "again"})).await;
    assert!(!error, "{text}");
    // The control: two to hosts that nobody has listed do.
    for target in ["evil.test.example:443", "a.b.ingest.test.example:443"] {
        assert_eq!(connect(next.address, target).await.1.as_deref(), Some("egress.host"), "{target}");
    }
    assert_eq!(connect(next.address, "telemetry.test.example:443").await.1.as_deref(), Some("budget.denials"));
    let (error, text) = next.tool("say", json!({"text": "hello"})).await;
    assert!(error && text.contains("budget.denials"), "{text}");
}
