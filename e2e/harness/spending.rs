//! What model calls reserve and what they cost, through harness and gateway.

use std::time::Instant;

use super::*;

/// Reads a streamed reply until these words have arrived, and hangs up.
async fn left_at(harness: &Harness, fails: &str, words: &str) {
    let body = json!({
        "model": "m", "stream": true, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400,
        "metadata": {"fails": fails},
    });
    let client: Client<HttpConnector, Full<bytes::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let request = Request::post(format!("http://{}/v1/chat/completions", harness.address))
        .header("content-type", "application/json")
        .body(Full::from(body.to_string()))
        .unwrap();
    let mut reply = client.request(request).await.unwrap().into_body();
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).contains(words) {
        said.extend(reply.frame().await.unwrap().unwrap().into_data().unwrap_or_default());
    }
}

/// A request without an output limit gets the model's own limit, in the member that its provider reads.
#[tokio::test]
async fn an_unnamed_limit_is_the_models_own() {
    let harness = harness_with(Limits { tokens: 1_000_000, ..LIMITS }).await;
    let hello = json!([{"role": "user", "content": "hi"}]);
    for (path, model, set) in [
        ("/v1/chat/completions", "gpt-4o", r#""max_completion_tokens":16384"#),
        ("/v1/chat/completions", "openai/gpt-4.1-mini", r#""max_completion_tokens":32768"#),
        ("/v1/chat/completions", "deepseek-chat", r#""max_tokens":8192"#),
        ("/v1/chat/completions", "llama3.1:8b", r#""max_tokens":4096"#),
        ("/v1/chat/completions", "our-own", r#""max_tokens":4096"#),
        ("/v1/responses", "gpt-5", r#""max_output_tokens":128000"#),
        ("/v1/messages", "claude-opus-4-1", r#""max_tokens":32000"#),
    ] {
        let prompt = if path == "/v1/responses" { "input" } else { "messages" };
        let (status, reply) = harness.post(path, json!({"model": model, prompt: hello})).await;
        assert_eq!(status, StatusCode::OK, "{reply}");
        let sent = harness.gateway.saw().pop().unwrap();
        assert!(sent.contains(set), "{model}: {sent}");
        assert_eq!(sent.matches("_tokens\":").count(), 1, "{sent}");
    }
}

/// The pack describes models that the catalogue does not have.
#[tokio::test]
async fn the_pack_says_what_the_list_does_not() {
    let mut policy = policy(Limits { tokens: 1_000_000, ..LIMITS });
    policy.models.prices[0].max_output_tokens = Some(20_000);
    policy.models.prices[0].output_limit_field = Some(belay::policy::config::OutputLimitField::MaxCompletionTokens);
    let harness = harness_of(policy, vec![]).await;
    let (status, reply) = harness.post("/v1/chat/completions", json!({"model": "mine", "messages": []})).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    let sent = harness.gateway.saw().pop().unwrap();
    assert!(sent.contains(r#""max_completion_tokens":20000"#), "{sent}");
}

/// 300 kB of a picture fit into a budget of 5,000 tokens. The same data as text needs more than the budget.
#[tokio::test]
async fn a_picture_is_no_text() {
    let harness = harness().await;
    let mut noise = 7_u32;
    let noise = (0..300_000).map(|_| {
        noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        noise.to_be_bytes()[0]
    });
    let picture = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x03\x20\0\0\x02\x58\x08\x02\0\0\0".iter().copied().chain(noise);
    let url = format!("data:image/png;base64,{}", data_encoding::BASE64.encode(&picture.collect::<Vec<_>>()));
    let asked =
        |part: Value| json!({"model": "gpt-4o", "messages": [{"role": "user", "content": [part]}], "max_tokens": 50});
    let (status, reply) = harness.post("/v1/chat/completions", asked(json!({"type": "text", "text": url}))).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(reply.to_string().contains("budget.tokens"), "{reply}");
    let picture = asked(json!({"type": "image_url", "image_url": {"url": url}}));
    let (status, reply) = harness.post("/v1/chat/completions", picture).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    let records = harness.stored(4).await;
    let Event::Intent(intent) = &records[2].event else { panic!("{records:#?}") };
    // 800 by 600 pixels are 4 tiles: 765 tokens.
    assert!((765 + 50..1_000).contains(&intent.reserved_tokens), "{intent:?}");
}

/// The client hangs up. Belay reads the rest of the reply for its usage, and the call does not cost its reservation.
#[tokio::test]
async fn a_reply_that_nobody_reads_is_charged_by_its_account() {
    let harness = harness().await;
    left_at(&harness, "takes its time", "hello").await;
    let records = harness.stored(3).await;
    assert_eq!(records[2].usage.tokens, 12, "{records:#?}");
    // The next call can use the rest of the budget at once.
    let (status, _) =
        harness.post("/v1/chat/completions", json!({"model": "m", "messages": [], "max_tokens": 4_900})).await;
    assert_eq!(status, StatusCode::OK);
}

/// The attempt ends while Belay reads the rest of a reply. The outcome is recorded before the end, and costs the reservation.
#[tokio::test]
async fn the_end_of_the_attempt_ends_what_is_read_on() {
    let harness = harness().await;
    left_at(&harness, "never ends", "hello").await;
    harness.stored(2).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(harness.gateway.records().len(), 2, "it is read on");
    let begun = Instant::now();
    harness.gate.stop(Rule::TaskClosed, "the attempt has ended");
    harness.gate.nothing_behind().await;
    assert!(begun.elapsed() < Duration::from_secs(5));
    let records = harness.stored(3).await;
    let (Event::Intent(intent), Event::Outcome(outcome)) = (&records[1].event, &records[2].event) else {
        panic!("{records:#?}")
    };
    assert_eq!(outcome.tokens, intent.reserved_tokens);
}

/// The provider reports that no tokens were used, although much was sent in both directions.
#[tokio::test]
async fn an_account_of_nothing_is_not_believed() {
    let harness = harness().await;
    let body = json!({
        "model": "m", "stream": true, "messages": [{"role": "user", "content": "word ".repeat(640)}], "max_tokens": 900,
        "metadata": {"fails": "says much", "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}},
    });
    let (status, _) = harness.post("/v1/chat/completions", body).await;
    assert_eq!(status, StatusCode::OK);
    let records = harness.stored(3).await;
    // A sixteenth of 3,200 bytes in each direction.
    assert!((400..420).contains(&records[2].usage.tokens), "{}", records[2].usage.tokens);
}

/// The total includes reasoning tokens, and the count of the reply does not.
#[tokio::test]
async fn a_thought_beside_the_reply_is_charged() {
    let harness = harness().await;
    let usage = json!({"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 912});
    let body = json!({"model": "m", "messages": [], "max_tokens": 1_000, "metadata": {"usage": usage}});
    let (status, _) = harness.post("/v1/chat/completions", body).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(harness.stored(3).await[2].usage.tokens, 912);
}

/// A denial says how much is spent, how much is reserved, how much the call needs, and who can change the limit.
#[tokio::test]
async fn a_refusal_tells_what_there_is() {
    let harness = harness_with(Limits { tokens: 3_000, ..LIMITS }).await;
    left_at(&harness, "never ends", "hello").await;
    let (status, reply) =
        harness.post("/v1/chat/completions", json!({"model": "m", "messages": [], "max_tokens": 6_000})).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    let reply = reply.to_string();
    for words in [
        "token limit is 3000",
        "0 are spent",
        "are reserved for calls in progress",
        "this call needs 60",
        "the author of the task",
    ] {
        assert!(reply.contains(words), "{words}: {reply}");
    }
}
