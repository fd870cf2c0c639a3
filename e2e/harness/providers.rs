//! Providers other than OpenAI that reject what OpenAI accepts. Each is a stand-in with the rule of a real provider. The control is the
//! same provider under a pack that does not know it.

use belay::policy::config::StreamUsage;

use super::*;

/// Starts a provider of chat completions. Its rule returns the usage of a request, or the error.
async fn provider(rule: fn(&Value) -> Result<Value, Value>) -> SocketAddr {
    let app = axum::Router::new().fallback(move |axum::Json(body): axum::Json<Value>| async move {
        let json = [(http::header::CONTENT_TYPE, "application/json")];
        match rule(&body) {
            Err(error) => (StatusCode::UNPROCESSABLE_ENTITY, json, json!({"error": error}).to_string()),
            Ok(_) if body["stream"] == true => {
                let pieces = ["hel", "lo"].map(|text| json!({"choices": [{"index": 0, "delta": {"content": text}}]}));
                let pieces: String = pieces.iter().map(|piece| format!("data: {piece}\n\n")).collect();
                let stream = [(http::header::CONTENT_TYPE, "text/event-stream")];
                (StatusCode::OK, stream, format!("{pieces}data: [DONE]\n\n"))
            }
            Ok(usage) => {
                let choice = json!({"index": 0, "message": {"role": "assistant", "content": "hello"}});
                (StatusCode::OK, json, json!({"choices": [choice], "usage": usage}).to_string())
            }
        }
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    address
}

/// Returns a harness with one provider, which has this rule. `pack` changes the endpoints of its pack.
async fn before(rule: fn(&Value) -> Result<Value, Value>, pack: impl FnOnce(&mut ModelEndpoints)) -> Harness {
    let mut policy = policy(Limits { tokens: 1_000_000, ..LIMITS });
    policy.models.openai = Some("http://provider.test/v1".into());
    policy.egress.push(host("provider.test", &[80], EgressUse::Models));
    pack(&mut policy.models);
    harness_of(policy, vec![("provider.test".to_owned(), provider(rule).await)]).await
}

/// The rule of servers that reject members that they do not know.
fn without_stream_options(body: &Value) -> Result<Value, Value> {
    match body.get("stream_options") {
        None => Ok(json!({"prompt_tokens": 5, "completion_tokens": 2})),
        Some(_) => Err(json!({"type": "extra_forbidden", "loc": ["body", "stream_options"]})),
    }
}

/// The rule of vLLM with `--max-model-len 4096`, at one token for each word of the prompt.
fn with_a_window_of_4096(body: &Value) -> Result<Value, Value> {
    let words = body["messages"][0]["content"].as_str().unwrap_or_default().split_whitespace().count();
    let words = u64::try_from(words).unwrap();
    let asked = body["max_tokens"].as_u64().ok_or_else(|| json!({"message": "no max_tokens"}))?;
    if words + asked > 4_096 {
        return Err(
            json!({"message": format!("This model's maximum context length is 4096 tokens. However, you requested {}", words + asked)}),
        );
    }
    Ok(json!({"prompt_tokens": words, "completion_tokens": 2}))
}

#[tokio::test]
async fn a_provider_that_refuses_stream_options_serves_streams_as_written() {
    let stream =
        json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400});
    let asks = before(without_stream_options, |_| {}).await;
    let (status, reply) = asks.post("/v1/chat/completions", stream.clone()).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "the control is served: {reply}");
    for by_endpoint in [false, true] {
        let harness = before(without_stream_options, |models| {
            if by_endpoint {
                models.endpoints = vec![belay::policy::config::ModelEndpoint {
                    models: vec!["m".into()],
                    api: belay::policy::model::api::Family::OpenAi,
                    url: "http://provider.test/v1".into(),
                    allow: vec![],
                    stream_usage: StreamUsage::AsWritten,
                }];
            } else {
                models.stream_usage = StreamUsage::AsWritten;
            }
        })
        .await;
        let (status, reply) = harness.post("/v1/chat/completions", stream.clone()).await;
        assert_eq!(status, StatusCode::OK, "{reply}");
        assert!(reply.as_str().unwrap().contains("[DONE]"), "{reply}");
        let sent = harness.gateway.saw().pop().unwrap();
        assert!(!sent.contains("stream_options"), "{sent}");
        let records = harness.stored(3).await;
        let Event::Intent(intent) = &records[1].event else { panic!("{records:#?}") };
        let Event::Outcome(_) = &records[2].event else { panic!("{records:#?}") };
        assert!(intent.reserved_tokens >= 400);
        assert_eq!(records[2].usage.tokens, intent.reserved_tokens, "without an account what was set aside is charged");
    }
}

#[tokio::test]
async fn a_server_with_a_small_window_serves_calls_that_name_no_limit() {
    let prompt = "word ".repeat(1_000);
    let call = json!({"model": "mine", "messages": [{"role": "user", "content": prompt}]});
    let unknown = before(with_a_window_of_4096, |_| {}).await;
    let (status, reply) = unknown.post("/v1/chat/completions", call.clone()).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "the control is served: {reply}");
    let harness = before(with_a_window_of_4096, |models| models.prices[0].context_tokens = Some(4_096)).await;
    for words in [1_000, 1, 2_000, 2_400] {
        let call = json!({"model": "mine", "messages": [{"role": "user", "content": "word ".repeat(words)}]});
        let (status, reply) = harness.post("/v1/chat/completions", call).await;
        assert_eq!(status, StatusCode::OK, "{words} words: {reply}");
    }
    // If the agent sets a limit, Belay leaves the decision about it to the provider.
    let named = json!({"model": "mine", "messages": [{"role": "user", "content": prompt}], "max_tokens": 4_096});
    assert_eq!(harness.post("/v1/chat/completions", named).await.0, StatusCode::UNPROCESSABLE_ENTITY);
}

/// A deployment has any name that its owner gave it, and a reasoning model behind it accepts the newer limit only.
#[tokio::test]
async fn a_deployment_on_azure_gets_the_limit_that_its_models_take() {
    fn thinks(body: &Value) -> Result<Value, Value> {
        match body.get("max_tokens") {
            Some(_) => Err(json!({"message": "Unsupported parameter: 'max_tokens' is not supported with this model."})),
            None => Ok(json!({"prompt_tokens": 5, "completion_tokens": 2})),
        }
    }
    let call = json!({"model": "our-thinker", "messages": [{"role": "user", "content": "hi"}]});
    let elsewhere = before(thinks, |_| {}).await;
    let (status, reply) = elsewhere.post("/v1/chat/completions", call.clone()).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "the control is served: {reply}");
    let azure = before(thinks, |models| {
        models.openai =
            Some("http://provider.test/openai/deployments/our-thinker?api-version=2025-01-01-preview".into());
    })
    .await;
    let (status, reply) = azure.post("/v1/chat/completions", call).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
}

/// Tokenized input has one number for each token, and OpenAI accepts 300,000 tokens in one request. The denial of a longer request says how
/// many it has.
#[tokio::test]
async fn embeddings_of_300_000_tokens_pass() {
    fn embeds(body: &Value) -> Result<Value, Value> {
        let tokens =
            body["input"].as_array().map_or(0, |texts| texts.iter().filter_map(Value::as_array).map(Vec::len).sum());
        Ok(json!({"prompt_tokens": tokens, "total_tokens": tokens}))
    }
    let harness = before(embeds, |_| {}).await;
    let texts = |count: usize| json!({"model": "m", "input": vec![vec![7; 1_000]; count]});
    let (status, reply) = harness.post("/v1/embeddings", texts(300)).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    assert_eq!(harness.stored(3).await[2].usage.tokens, 300_000);
    let (status, reply) = harness.post("/v1/embeddings", texts(320)).await;
    assert!(status.is_client_error() && reply.to_string().contains("320000 values"), "{reply}");
}
