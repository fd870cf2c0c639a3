//! An intent authorizes one request on every channel, with the body that it commits to, and not after its outcome.

use super::*;

const MCP: &str = "https://tools.world.test/mcp";
const MODEL: &str = "https://models.world.test/v1/chat/completions";
const PLAIN: &str = "http://docs.world.test/page";

fn message(method: &str, name: &str) -> String {
    json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": {"name": name}}).to_string()
}

/// Returns an intent. A model intent reserves enough tokens.
fn intent(call: &str, channel: Channel, target: &str) -> RecordEvent {
    testing::intent(call, channel, target, if channel == Channel::Model { testing::ENOUGH } else { 0 })
}

async fn send(world: &World, (channel, url, intent): (&str, &str, u64), body: String) -> Option<Rule> {
    rule(&world.send(call(channel, url, intent).body(Full::from(body)).unwrap()).await)
}

/// A compromised harness sends more requests while the agent's own call is open. Only the first one leaves.
#[rstest::rstest]
#[case::model(Channel::Model, "/v1/chat/completions", MODEL, testing::ASKED.into())]
#[case::read(Channel::Tool, "search", MCP, message("tools/call", "search"))]
#[case::write(Channel::Tool, "write", MCP, message("tools/call", "write"))]
#[case::plain_http(Channel::Egress, "docs.world.test:80", PLAIN, "hello".into())]
#[tokio::test]
async fn the_second_request_under_an_intent_does_not_leave(
    #[case] channel: Channel,
    #[case] target: &str,
    #[case] url: &str,
    #[case] body: String,
) {
    let world = world().await;
    let intents = vec![intent("1", channel, target), intent("2", channel, target)];
    let mut harness = world.harness(intents).await;
    let call = |intent| (channel.as_str(), url, intent);
    assert_eq!(send(&world, call(1), body.clone()).await, None, "the control: the first leaves");
    for _ in 0..3 {
        assert_eq!(send(&world, call(1), body.clone()).await, Some(Rule::IntentMissing));
    }
    // The other intent was not used. It is closed once its outcome is in the log.
    let request = harness.next(vec![testing::outcome("2", 0)]);
    world.post("harness-1", wire::LOG_APPEND, &request).await.unwrap();
    assert_eq!(send(&world, call(2), body).await, Some(Rule::IntentMissing), "after its outcome");
}

/// An MCP server that does not know a session has done nothing. The call may leave once more, and no third time.
#[rstest::rstest]
#[case::not_found(Some("7"), 404, true)]
#[case::bad_request(Some("7"), 400, true)]
#[case::served(Some("7"), 200, false)]
#[case::too_many(Some("7"), 429, false)]
#[case::failed(Some("7"), 500, false)]
#[case::no_session(None, 400, false)]
#[tokio::test]
async fn a_call_of_a_lost_session_leaves_once_more(
    #[case] session: Option<&str>,
    #[case] status: u16,
    #[case] again: bool,
) {
    let world = world().await;
    world.harness(vec![intent("1", Channel::Tool, "write")]).await;
    let send = || async {
        let mut request = call("tool", MCP, 1).header("x-status", status);
        if let Some(session) = session {
            request = request.header("mcp-session-id", session);
        }
        rule(&world.send(request.body(Full::from(message("tools/call", "write"))).unwrap()).await)
    };
    assert_eq!(send().await, None, "the control: the first leaves");
    assert_eq!(send().await, (!again).then_some(Rule::IntentMissing));
    assert_eq!(send().await, Some(Rule::IntentMissing), "no third");
}

/// A message follows one redirect of its MCP server, with method, body and headers. It is still one request under the intent.
#[rstest::rstest]
#[case::slash("/mcp/", 307, Some("/mcp/"))]
#[case::absolute("https://tools.world.test/v2?a=1", 308, Some("/v2?a=1"))]
#[case::second("/redirect", 307, None)]
#[case::other_host("https://docs.world.test/mcp/", 307, None)]
#[case::in_the_clear("http://tools.world.test/mcp/", 307, None)]
#[case::see_other("/mcp/", 303, None)]
#[tokio::test]
async fn a_message_follows_one_redirect_within_the_origin(
    #[case] location: &str,
    #[case] status: u16,
    #[case] expected: Option<&str>,
) {
    let world = world().await;
    world.harness(vec![intent("1", Channel::Tool, "write"), intent("2", Channel::Listing, "write")]).await;
    let tool = ("tool", 1, message("tools/call", "write"));
    for (channel, intent, message) in [tool, ("listing", 2, message("tools/list", "write"))] {
        let request = || {
            let request = call(channel, MCP, intent).header("x-location", location).header("x-status", status);
            request.header("mcp-session-id", "7").body(Full::from(message.clone())).unwrap()
        };
        let reply = world.send(request()).await;
        match expected {
            Some(path) => {
                let seen = body(reply).await;
                assert_eq!(
                    (&seen["method"], &seen["uri"], &seen["body"]),
                    (&json!("POST"), &json!(path), &json!(message))
                );
                assert_eq!(header(&seen, "mcp-session-id"), ["7"]);
            }
            None => assert!(reply.status().is_redirection(), "{}", reply.status()),
        }
        if channel == "tool" {
            assert_eq!(rule(&world.send(request()).await), Some(Rule::IntentMissing));
        }
    }
}

#[tokio::test]
async fn several_at_once_are_one() {
    let world = Arc::new(world().await);
    world.harness(vec![intent("1", Channel::Model, "/v1/chat/completions")]).await;
    let sends = (0..16).map(|_| {
        let world = world.clone();
        async move { send(&world, ("model", MODEL, 1), testing::ASKED.into()).await }
    });
    let ends = futures::future::join_all(sends).await;
    assert_eq!(ends.iter().filter(|end| end.is_none()).count(), 1, "{ends:?}");
    assert_eq!(ends.iter().filter(|end| **end == Some(Rule::IntentMissing)).count(), 15, "{ends:?}");
}

#[tokio::test]
async fn a_second_tunnel_under_an_intent_is_not_opened() {
    let world = world().await;
    world.harness(direct("docs.world.test:7000", 2)).await;
    let first = world.tunnel("docs.world.test:7000", 1).await;
    assert!(first.is_ok());
    assert_eq!(world.tunnel("docs.world.test:7000", 1).await.err(), Some(Rule::IntentMissing), "while it is open");
    drop(first);
    eventually(|| world.metrics.tunnels.get() == 0).await;
    assert_eq!(world.tunnel("docs.world.test:7000", 1).await.err(), Some(Rule::IntentMissing), "when it has ended");
    assert!(world.tunnel("docs.world.test:7000", 2).await.is_ok(), "another intent is good for another");
}

/// The attack: other bodies under the intent of the agent's own call.
#[rstest::rstest]
#[case::model(Channel::Model, "/v1/chat/completions", MODEL, testing::ASKED)]
#[case::plain_http(Channel::Egress, "docs.world.test:80", PLAIN, "hello")]
#[tokio::test]
async fn another_body_than_the_intents_does_not_leave(
    #[case] channel: Channel,
    #[case] target: &str,
    #[case] url: &str,
    #[case] own: &str,
) {
    let world = world().await;
    world.harness(vec![intent("1", channel, target)]).await;
    let other = r#"{"model":"other","max_tokens":500000,"messages":[],"tools":[{"type":"web_search"}]}"#;
    for body in [other, "", &format!("{own} "), &own.to_uppercase()] {
        assert_eq!(send(&world, (channel.as_str(), url, 1), body.into()).await, Some(Rule::IntentMissing), "{body:?}");
    }
    assert_eq!(send(&world, (channel.as_str(), url, 1), own.into()).await, None, "a refusal uses up nothing");
}

/// A session outlives the listing that opened it and may still end. It lists no more tools, and the number of its messages is bounded.
#[tokio::test]
async fn a_listings_intent_carries_a_sessions_talk_and_no_more() {
    let world = world().await;
    let mut harness = world.harness(vec![testing::intent("1", Channel::Listing, "search", 0)]).await;
    let listing = ("listing", MCP, 1);
    assert_eq!(send(&world, listing, message("initialize", "")).await, None);
    assert_eq!(send(&world, listing, message("tools/list", "")).await, None);
    assert_eq!(send(&world, listing, message("tools/list", "")).await, None, "pages");
    let request = harness.next(vec![testing::outcome("1", 0)]);
    world.post("harness-1", wire::LOG_APPEND, &request).await.unwrap();
    assert_eq!(send(&world, listing, message("notifications/cancelled", "")).await, None, "the session goes on");
    assert_eq!(send(&world, listing, message("tools/list", "")).await, Some(Rule::IntentMissing), "it is over");
    let long = message("notifications/progress", &"x".repeat(300 << 10));
    assert_eq!(send(&world, listing, long).await, Some(Rule::Request), "a session's talk is short");
    let mut left = None;
    for _ in 0..1000 {
        left = send(&world, listing, message("ping", "")).await;
        if left.is_some() {
            break;
        }
    }
    assert_eq!(left, Some(Rule::IntentMissing), "it does not talk without end");
}
