//! Duplicate calls, over MCP and over HTTP, through a real client, with what the gateway lets pass and what the log says.

use belay::policy::config::Idempotency;
use futures::StreamExt;

use super::*;

const MANY: Limits = Limits {
    // Ten thousand calls took a slow machine more than two minutes.
    wall_time_seconds: 600,
    tool_calls: 20,
    tokens: 0,
    denials: None,
    cost_micros: None,
    approval_wait_seconds: 0,
};

/// Returns a policy with tools that are idempotent by all arguments, by one argument, or with a header.
fn idempotent() -> PolicyConfig {
    use HttpMethod::Post;
    let by = |argument: Option<&str>, header: Option<&str>| {
        let (argument, header) = (argument.map(Into::into), header.map(Into::into));
        Some(Idempotency { argument, header, window_seconds: 3600 })
    };
    let (all, one) = (by(None, None), by(Some("id"), None));
    let write = |name: &str, upstream, idempotency| Tool { idempotency, ..tool(name, upstream, SideEffect::Write) };
    let mut policy = policy(MANY);
    policy.tools = vec![
        write("mcp.all", over_mcp("echo"), all.clone()),
        write("mcp.one", over_mcp("echo"), one.clone()),
        write("http.all", over_http(Post, "/items", &[]), all.clone()),
        write("http.one", over_http(Post, "/items", &[]), one),
        write("http.header", over_http(Post, "/items", &[]), by(None, Some("idempotency-key"))),
        write(
            "http.short",
            over_http(Post, "/items", &[]),
            Some(Idempotency { window_seconds: 1, ..all.clone().unwrap() }),
        ),
        write("http.slow", over_http(Post, "/slow/{ms}", &[]), all.clone()),
        write("http.status", over_http(Post, "/status/{code}", &[]), all.clone()),
        write("http.torn", over_http(Post, "/torn", &[]), all),
        write("http.torn.header", over_http(Post, "/torn", &[]), by(None, Some("idempotency-key"))),
    ];
    policy
}

async fn idempotent_harness() -> Harness {
    harness_of(idempotent(), vec![]).await
}

impl Harness {
    /// Returns the calls that reached an upstream.
    fn made(&self) -> Vec<String> {
        let call = |seen: &String| seen.contains("\"tools/call\"") || seen.starts_with("POST http://api.test");
        self.gateway.saw().into_iter().filter(call).collect()
    }

    fn replayed(&self) -> usize {
        self.gateway.records().iter().filter(|record| record.event.kind() == "call.replayed").count()
    }
}

#[rstest::rstest]
#[case("mcp.all")]
#[case("mcp.one")]
#[case("http.all")]
#[case("http.one")]
#[tokio::test]
async fn the_same_call_again_has_the_same_result_and_no_second_effect(#[case] name: &str) {
    let harness = idempotent_harness().await;
    let args = json!({"text": "hello", "id": 7});
    let first = harness.tool(name, args.clone()).await;
    assert!(!first.0, "{first:?}");
    assert_eq!(harness.tool(name, args).await, first);
    assert_eq!((harness.made().len(), harness.replayed()), (1, 1));
    assert_eq!(harness.gate.journal().look(|task| task.usage()).tool_calls, 1, "a repeat was counted");

    // A call with other arguments is no duplicate.
    let (error, text) = harness.tool(name, json!({"text": "hello", "id": 8})).await;
    assert!(!error, "{text}");
    assert_eq!(harness.made().len(), 2);
}

#[rstest::rstest]
#[case("mcp.one")]
#[case("http.one")]
#[tokio::test]
async fn the_same_key_for_another_call_is_a_conflict(#[case] name: &str) {
    let harness = idempotent_harness().await;
    harness.tool(name, json!({"text": "hello", "id": 7})).await;
    let (error, text) = harness.tool(name, json!({"text": "other", "id": 7})).await;
    assert!(error && text.contains("tool.idempotency") && text.contains("other arguments"), "{text}");
    let (error, text) = harness.tool(name, json!({"text": "no key"})).await;
    assert!(error && text.contains("tool.idempotency") && text.contains("\"id\""), "{text}");
    assert_eq!(harness.made().len(), 1);
    let records = harness.stored(5).await;
    assert_eq!(denied(&records), [Rule::ToolIdempotency; 2]);
}

#[tokio::test]
async fn the_key_goes_to_the_upstream_where_the_contract_says() {
    let harness = idempotent_harness().await;
    harness.tool("http.header", json!({"text": "hello"})).await;
    let made = harness.made().remove(0);
    let key = harness.records().await.iter().find_map(|record| match &record.event {
        Event::Intent(intent) => intent.idempotency_key.clone(),
        _ => None,
    });
    assert!(made.contains(&format!("\"idempotency-key\": \"{}\"", key.unwrap())), "{made}");
}

#[rstest::rstest]
#[case::refused("http.status", json!({"code": 404}), 2, false)]
#[case::failed("http.status", json!({"code": 500}), 1, true)]
#[case::torn("http.torn", json!({}), 1, true)]
#[case::torn_with_a_header("http.torn.header", json!({}), 2, false)]
#[tokio::test]
async fn what_becomes_of_a_repeat_follows_from_what_became_of_the_call(
    #[case] name: &str,
    #[case] args: Value,
    #[case] made: usize,
    #[case] refused: bool,
) {
    let harness = idempotent_harness().await;
    harness.tool(name, args.clone()).await;
    let (_, text) = harness.tool(name, args).await;
    assert_eq!(text.contains("its outcome is unknown"), refused, "{text}");
    assert_eq!(harness.made().len(), made);
}

#[tokio::test]
async fn a_key_lapses_with_its_window() {
    let harness = idempotent_harness().await;
    let args = json!({"text": "hello"});
    harness.tool("http.short", args.clone()).await;
    harness.tool("http.short", args.clone()).await;
    assert_eq!(harness.made().len(), 1);
    tokio::time::sleep(Duration::from_millis(2_200)).await;
    harness.tool("http.short", args).await;
    assert_eq!(harness.made().len(), 2);
}

/// What the gateway has of the result when the second attempt begins.
#[derive(Clone, Copy, PartialEq)]
enum Has {
    It,
    Nothing,
    Another,
    NoBucket,
}

#[rstest::rstest]
#[case::over_mcp("mcp.all", Has::It, None)]
#[case::over_http("http.all", Has::It, None)]
#[case::lost("http.all", Has::Nothing, Some("cannot be read"))]
#[case::forged("http.all", Has::Another, Some("is not the one that was stored"))]
#[case::without_a_bucket("http.all", Has::NoBucket, Some("is not stored any more"))]
#[tokio::test]
async fn another_attempt_is_given_the_result_or_refused_and_makes_no_second_call(
    #[case] name: &str,
    #[case] has: Has,
    #[case] refused: Option<&str>,
) {
    let harness = idempotent_harness().await;
    let first = harness.tool(name, json!({"text": "hello"})).await;
    assert!(!first.0, "{first:?}");
    let records = harness.records().await;
    let Harness { gateway, mcp, api, .. } = harness;
    match has {
        Has::It => {}
        Has::Nothing => gateway.kept().clear(),
        Has::Another => gateway.kept().values_mut().for_each(|kept| *kept = kept.replace("hello", "other")),
        Has::NoBucket => gateway.keep_results(false),
    }
    let again = start(gateway, &idempotent(), 2, mcp, api).await;
    let second = again.tool(name, json!({"text": "hello"})).await;
    assert_eq!(again.made().len(), 1);
    match refused {
        Some(words) => {
            assert!(second.0 && second.1.contains("tool.idempotency") && second.1.contains(words), "{second:?}");
            assert_eq!(again.replayed(), 0);
        }
        None => {
            assert_eq!(second, first);
            let given = |event: &Event| match event {
                Event::Outcome(outcome) => outcome.response_commitment.clone(),
                Event::Replayed(replayed) => Some(replayed.response_commitment.clone()),
                _ => None,
            };
            let made: Vec<_> = records.iter().filter_map(|record| given(&record.event)).collect();
            let now: Vec<_> = again.records().await.iter().filter_map(|record| given(&record.event)).collect();
            assert_eq!(now, [made[0].clone(), made[0].clone()]);
        }
    }
}

/// 10^4 duplicates, 300 of them at a time, while the first call is still under way at its upstream: one call takes effect.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_ten_thousand_twins_one_is_made() {
    const TWINS: usize = 10_000;
    let harness = Arc::new(idempotent_harness().await);
    let message = json!({
        "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "http.slow", "arguments": {"ms": 500}},
    });
    let client: Client<HttpConnector, Full<bytes::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let results: Vec<String> = futures::stream::iter(0..TWINS)
        .map(|_| {
            let request = Request::post(format!("http://{}/mcp", harness.address))
                .header("content-type", "application/json")
                .header("accept", "application/json, text/event-stream")
                .body(Full::from(message.to_string()))
                .unwrap();
            let reply = client.request(request);
            async move {
                let body = reply.await.unwrap().into_body().collect().await.unwrap().to_bytes();
                String::from_utf8(body.to_vec()).unwrap()
            }
        })
        .buffer_unordered(300)
        .collect()
        .await;
    assert!(results[0].contains("slept"), "{}", results[0]);
    assert_eq!(results.iter().find(|result| *result != &results[0]), None);
    assert_eq!(harness.made().len(), 1, "an upstream that counts");
    assert_eq!(harness.gate.journal().look(|task| task.usage()).tool_calls, 1);
    assert_eq!(harness.replayed(), TWINS - 1);
}
