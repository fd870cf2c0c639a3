//! Hosts that client libraries connect to by themselves. Belay denies and records these connections, and they end no task.

use belay::{
    evidence::record::{DenialCounts, Event},
    policy::rule::Rule,
};
use http::Request;
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use serde_json::json;

use super::{LIMITS, Limits, SocketAddr, connect, denied, harness_of, policy, start};

/// Sends a plain HTTP request to the proxy, as a client does. Returns the status and the rule of the denial.
async fn get(address: SocketAddr, url: &str) -> (u16, Option<String>) {
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = Request::get(url).body(Full::<bytes::Bytes>::default()).unwrap();
    let reply = sender.send_request(request).await.unwrap();
    let rule = reply.headers().get("belay-rule").map(|rule| rule.to_str().unwrap().to_owned());
    (reply.status().as_u16(), rule)
}

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

    // They do not end the next attempt either, which continues from the log.
    let next = start(harness.gateway.clone(), &policy, 2, harness.mcp.clone(), harness.api.clone()).await;
    let (error, text) = next.tool("say", json!({"text": "again"})).await;
    assert!(!error, "{text}");
    // The control: two denials for hosts that are not listed end the task.
    for target in ["evil.test.example:443", "a.b.ingest.test.example:443"] {
        assert_eq!(connect(next.address, target).await.1.as_deref(), Some("egress.host"), "{target}");
    }
    assert_eq!(connect(next.address, "telemetry.test.example:443").await.1.as_deref(), Some("budget.denials"));
    let (error, text) = next.tool("say", json!({"text": "hello"})).await;
    assert!(error && text.contains("budget.denials"), "{text}");
}

/// Client libraries connect to addresses to find out which cloud they are in. Belay denies these connections, even if `ignoredHosts` has
/// the address.
#[tokio::test]
async fn connections_to_ignored_addresses_are_denied_and_do_not_end_the_task() {
    let mut policy = policy(Limits { denials: Some(2), ..LIMITS });
    policy.ignored_hosts = vec!["169.254.169.254".into(), "fd00:ec2::254".into(), "127.0.0.1".into()];
    let harness = harness_of(policy, vec![]).await;
    let ignored = [
        "169.254.169.254:80",
        "169.254.169.254:443",
        "[fd00:ec2::254]:80",
        "[::ffff:169.254.169.254]:80",
        "127.0.0.1:80",
    ];
    for target in ignored {
        assert_eq!(connect(harness.address, target).await.1.as_deref(), Some("egress.ignored"), "{target}");
    }
    let absolute =
        ["http://169.254.169.254/computeMetadata/v1/", "http://169.254.169.254:80/", "http://[fd00:ec2::254]/latest/"];
    for url in absolute {
        let (status, rule) = get(harness.address, url).await;
        assert_eq!((status, rule.as_deref()), (403, Some("egress.ignored")), "{url}");
    }
    assert!(harness.gateway.saw().is_empty(), "something went there");
    let records = harness.stored(9).await;
    assert_eq!(denied(&records), [Rule::EgressIgnored; 8]);
    let mut refusals = DenialCounts::default();
    for record in &records {
        if let Event::Denied(denied) = &record.event {
            refusals.add(denied);
        }
    }
    assert_eq!(refusals.in_words(), None, "the last line of a run says nothing of them");
    let (error, text) = harness.tool("say", json!({"text": "hello"})).await;
    assert!(!error, "and they end nothing: {text}");
    // The control: other addresses, and a listed address in another spelling, count as any host does.
    for target in ["169.254.169.253:80", "2852039166:80"] {
        assert_eq!(connect(harness.address, target).await.1.as_deref(), Some("egress.host"), "{target}");
    }
    let (error, text) = harness.tool("say", json!({"text": "hello"})).await;
    assert!(error && text.contains("budget.denials"), "{text}");
}
