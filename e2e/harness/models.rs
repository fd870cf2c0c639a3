//! Requests to models: what reaches a provider, in which form and at which URL, and what is recorded. The provider here accepts every
//! request, so each denial is Belay's. Requests that pass are the control.

use std::sync::Mutex;

use axum::{Router, body::Body, extract::State, response::IntoResponse};
use belay::{
    evidence::record::{Channel, Denied, Intent, Outcome},
    policy::{
        config::{ModelEndpoint, StoreReplies, StreamUsage, UnknownMembers},
        model::{api::Family, table::Capability},
    },
};
use bytes::Bytes;

use super::*;

/// A request as the provider got it.
#[derive(Clone, Debug)]
struct Came {
    method: String,
    path: String,
    headers: http::HeaderMap,
    body: String,
}

type All = Arc<Mutex<Vec<Came>>>;

/// Starts a provider that accepts every request.
async fn provider() -> (SocketAddr, All) {
    let all = All::default();
    let router = Router::new().fallback(take).with_state(all.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    (address, all)
}

async fn take(State(all): State<All>, request: http::Request<Body>) -> impl IntoResponse {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let path = parts.uri.path_and_query().unwrap().to_string();
    let usage = match parts.uri.path() {
        path if path.ends_with("/embeddings") => json!({"prompt_tokens": 3, "total_tokens": 3}),
        path if path.ends_with("/messages") => json!({"input_tokens": 7, "output_tokens": 5}),
        path if path.ends_with("/completions") => json!({"prompt_tokens": 7, "completion_tokens": 5}),
        path if path.ends_with("/responses") => json!({"input_tokens": 7, "output_tokens": 5}),
        _ => Value::Null,
    };
    all.lock().unwrap().push(Came {
        method: parts.method.to_string(),
        path,
        headers: parts.headers,
        body: String::from_utf8_lossy(&body).into_owned(),
    });
    let headers = [
        ("x-request-id", "r-1"),
        ("x-ratelimit-remaining-tokens", "7"),
        ("set-cookie", "session=of-the-provider"),
        ("alt-svc", "h3=\":443\""),
    ];
    (headers, axum::Json(json!({"usage": usage, "input_tokens": 12, "data": []})))
}

struct World {
    harness: Harness,
    all: All,
}

/// Returns a harness whose pack has these endpoints. One provider answers for all host names.
async fn world(models: ModelEndpoints, limits: Limits) -> World {
    let (address, all) = provider().await;
    let mut policy = policy(limits);
    let names = ["listed.test", "azure.test", "claude.test"];
    policy.egress.extend(names.iter().map(|name| host(name, &[80], EgressUse::Models)));
    policy.models = models;
    let names = names.iter().map(|name| ((*name).to_owned(), address)).collect();
    World { harness: harness_of(policy, names).await, all }
}

const MANY: Limits = Limits { tokens: 1_000_000, ..LIMITS };

async fn plain() -> World {
    world(both(), MANY).await
}

fn both() -> ModelEndpoints {
    ModelEndpoints {
        openai: Some("http://listed.test".into()),
        anthropic: Some("http://listed.test".into()),
        ..ModelEndpoints::default()
    }
}

impl World {
    fn came(&self) -> Vec<Came> {
        self.all.lock().unwrap().clone()
    }

    fn last(&self) -> Came {
        self.came().last().cloned().expect("nothing came to the provider")
    }

    async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> http::Response<Bytes> {
        let client: Client<HttpConnector, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let mut request = Request::builder().method(method).uri(format!("http://{}{path}", self.harness.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let reply = client.request(request.body(Full::from(body.to_owned())).unwrap()).await.unwrap();
        let (parts, body) = reply.into_parts();
        http::Response::from_parts(parts, body.collect().await.unwrap().to_bytes())
    }

    /// Returns the intents and the outcomes of model calls.
    async fn calls(&self, count: usize) -> Vec<(Intent, Outcome)> {
        let records = self.harness.stored(1 + 2 * count).await;
        let intents = records.iter().filter_map(|record| match &record.event {
            Event::Intent(intent) if intent.channel == Channel::Model => Some(intent.clone()),
            _ => None,
        });
        let outcome = |intent: &Intent| {
            records.iter().find_map(|record| match &record.event {
                Event::Outcome(outcome) if outcome.call == intent.call => Some(outcome.clone()),
                _ => None,
            })
        };
        intents
            .map(|intent| {
                let outcome = outcome(&intent).unwrap();
                (intent, outcome)
            })
            .collect()
    }
}

fn refusals(records: &[Record]) -> Vec<Denied> {
    let denied = |record: &Record| match &record.event {
        Event::Denied(denied) => Some(denied.clone()),
        _ => None,
    };
    records.iter().filter_map(denied).collect()
}

#[tokio::test]
async fn what_the_agent_wrote_goes_out_as_it_wrote_it() {
    let world = plain().await;
    // The order of members, the forms of numbers, escapes and spaces stay as written. A limit is a whole number in any notation.
    let odd = r#""z":{"reasoning":1.0,"answer":50.0,"huge":1.7976931348623157e308,"beyond":18446744073709551617,"text":"cut \ud83d","e":"\u00e9\/"}"#;
    let requests = [
        (
            "/v1/chat/completions",
            format!(r#"{{ "messages" : [ ], "max_tokens" : 50.0, "model":"m", "metadata":{{{odd}}} }}"#),
        ),
        (
            "/v1/responses",
            format!(r#"{{"max_output_tokens":5e1,"input":"cut \uDE00", "model":"m",{}"metadata":{{{odd}}}}}"#, "\n\t"),
        ),
        (
            "/v1/messages",
            format!(
                r#"{{"model":"m","max_tokens":50,"messages":[{{"role":"user","content":"x"}}],"metadata":{{{odd}}}}}"#
            ),
        ),
    ];
    for (path, text) in &requests {
        let (status, reply) = world.harness.post_text(path, text.clone()).await;
        assert_eq!(status, StatusCode::OK, "{path}: {reply}");
        assert_eq!(&world.last().body, text, "{path}");
    }
    // Belay adds a missing limit, and changes nothing else.
    for (path, text) in &requests {
        let [with, without] = [text.replace("\"max_", "\"_"), text.clone()];
        let bare = with
            .replace("\"_tokens\" : 50.0, ", "")
            .replace("\"_output_tokens\":5e1,", "")
            .replace("\"_tokens\":50,", "");
        assert_ne!(bare, without);
        let (status, reply) = world.harness.post_text(path, bare.clone()).await;
        assert_eq!(status, StatusCode::OK, "{path}: {reply}");
        let came = world.last().body;
        let kept = bare.trim_end_matches(['}', ' ']);
        assert!(came.starts_with(kept) && came.len() < bare.len() + 40, "{path}: {came}");
    }
    // The control: a request that can be read in two ways is denied.
    let (status, _) = world
        .harness
        .post_text("/v1/messages", r#"{"model":"m","max_tokens":1,"max_tokens":2,"messages":[]}"#.into())
        .await;
    assert!(status.is_client_error(), "{status}");
    assert_eq!(world.came().len(), 6);
}

#[tokio::test]
async fn what_the_client_runs_passes_and_what_the_provider_would_do_is_refused_and_recorded() {
    let world = plain().await;
    let url = "https://evil.test/?secret=1";
    let chat = |more: Value| ("/v1/chat/completions", json!({"model": "m", "max_tokens": 5, "messages": []}), more);
    let responses = |more: Value| ("/v1/responses", json!({"model": "m", "max_output_tokens": 5, "input": "hi"}), more);
    let messages = |more: Value| ("/v1/messages", json!({"model": "m", "max_tokens": 5, "messages": []}), more);
    let said = |part: Value| json!({"messages": [{"role": "user", "content": [part]}]});
    let post = async |(path, mut body, more): (&'static str, Value, Value)| {
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, reply) = world.harness.post(path, body).await;
        (path, status, reply)
    };
    for request in [
        messages(json!({"tools": [{"type": "bash_20250124", "name": "bash"}]})),
        messages(
            json!({"tools": [{"type": "computer_20250124", "name": "computer", "display_width_px": 1, "display_height_px": 1}]}),
        ),
        messages(json!({"tools": [{"type": "memory_20250818", "name": "memory"}]})),
        responses(
            json!({"tools": [{"type": "local_shell"}, {"type": "apply_patch"}, {"type": "shell", "environment": {"type": "local"}}]}),
        ),
        responses(json!({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]}]})),
        chat(said(json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}))),
        chat(said(json!({"type": "image_url", "image_url": {"url": "https://docs.test.example/a.png"}}))),
    ] {
        let (path, status, reply) = post(request).await;
        assert_eq!(status, StatusCode::OK, "{path}: {reply}");
    }
    let passed = world.came().len();
    let refused = [
        messages(json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}]})),
        messages(said(json!({"type": "document", "source": {"type": "url", "url": url}}))),
        messages(said(json!({"type": "container_upload", "file_id": "f"}))),
        responses(json!({"tools": [{"type": "shell"}]})),
        responses(json!({"tools": [{"type": "namespace", "tools": [{"type": "web_search"}]}]})),
        responses(json!({"input": [{"id": "msg_1"}]})),
        responses(json!({"input": [{"role": "user", "content": [{"type": "input_file", "file_url": url}]}]})),
        chat(json!({"max_completion_tokens": 1, "n_predict": 50_000})),
        chat(json!({"plugins": [{"id": "web"}]})),
        chat(json!({"brand_new": true})),
        chat(said(json!({"type": "image_url", "image_url": {"url": url}}))),
    ];
    let count = refused.len();
    for request in refused {
        let (path, status, reply) = post(request).await;
        assert!(status.is_client_error(), "{path}: {reply}");
        assert!(reply.to_string().contains("model.request"), "{reply}");
    }
    assert_eq!(world.came().len(), passed, "a refused request reached the provider");
    let records = world.harness.stored(1 + 2 * passed + count).await;
    let found = refusals(&records);
    assert_eq!(found.len(), count);
    assert!(
        found.iter().all(|denied| denied.rule == Rule::ModelRequest && denied.request_commitment.is_some()),
        "{found:#?}"
    );
}

#[tokio::test]
async fn what_a_pack_allows_by_name_passes_and_the_intent_says_so() {
    let entry = ModelEndpoint {
        models: vec!["searches".into()],
        api: Family::OpenAi,
        url: "http://listed.test".into(),
        allow: vec![Capability::WebSearch],
        stream_usage: StreamUsage::Ask,
    };
    let models = ModelEndpoints {
        endpoints: vec![entry],
        allow: vec![Capability::Stored],
        unknown_members: UnknownMembers::Pass,
        store_replies: StoreReplies::Never,
        ..both()
    };
    let world = world(models, MANY).await;
    let post = async |model: &str, more: Value| {
        let mut body = json!({"model": model, "input": "hi", "max_output_tokens": 5});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        world.harness.post("/v1/responses", body).await.0
    };
    let search = json!({"tools": [{"type": "web_search", "filters": {"allowed_domains": ["a.test"]}}]});
    assert_eq!(post("searches", search.clone()).await, StatusCode::OK);
    assert!(post("other", search).await.is_client_error(), "the entry of one endpoint allows it for another");
    assert_eq!(post("other", json!({"previous_response_id": "r", "store": true})).await, StatusCode::OK);
    assert!(world.last().body.contains(r#""store":false"#), "{}", world.last().body);
    assert_eq!(post("other", json!({"brand_new": 1})).await, StatusCode::OK);
    assert!(post("other", json!({"tools": [{"type": "brand_new"}]})).await.is_client_error());
    let rules: Vec<_> = world.harness.stored(1 + 2 * 3 + 2).await;
    let rules: Vec<_> = rules
        .iter()
        .filter_map(|record| match &record.event {
            Event::Intent(intent) => {
                let noted = [Rule::ModelAllowed, Rule::ModelUnknown];
                Some(noted.map(|rule| intent.rules.contains(&rule)))
            }
            _ => None,
        })
        .collect();
    assert_eq!(rules, [[true, false], [true, false], [false, true]]);
}

#[tokio::test]
async fn headers_pass_by_list_in_both_directions() {
    let world = plain().await;
    let body = r#"{"model":"m","max_tokens":5,"messages":[]}"#;
    let sent = [
        ("authorization", "Bearer of-the-agent"),
        ("x-api-key", "of-the-agent"),
        ("api-key", "of-the-agent"),
        ("cookie", "of-the-agent"),
        ("openai-organization", "other"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-http-method-override", "DELETE"),
        ("anthropic-beta", "computer-use-2025-01-24,mcp-client-2025-04-04,web-fetch-2025-09-10"),
        ("anthropic-version", "2023-06-01"),
        ("x-stainless-lang", "python"),
        ("idempotency-key", "k-1"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("user-agent", "an-agent/1"),
    ];
    let reply = world.send("POST", "/v1/messages", &sent, body).await;
    assert_eq!(reply.status(), StatusCode::OK);
    let came = world.last().headers;
    let value = |name: &str| came.get(name).map(|value| value.to_str().unwrap().to_owned());
    for (name, sent) in &sent[..7] {
        assert_eq!(value(name), None, "{name}: {sent}");
    }
    assert_eq!(value("anthropic-beta").as_deref(), Some("computer-use-2025-01-24"));
    for (name, sent) in &sent[8..] {
        assert_eq!(value(name).as_deref(), Some(*sent), "{name}");
    }
    assert!(!format!("{came:?}").contains("of-the-agent"), "{came:?}");
    let back = reply.headers();
    assert_eq!(back["x-request-id"], "r-1");
    assert_eq!(back["x-ratelimit-remaining-tokens"], "7");
    for name in ["set-cookie", "alt-svc", "belay-upstream-address"] {
        assert!(!back.contains_key(name), "{back:?}");
    }
}

#[tokio::test]
async fn calls_go_where_bases_lead_as_providers_write_them() {
    let entry = |models: &[&str], api, url: &str| ModelEndpoint {
        models: models.iter().map(|model| (*model).to_owned()).collect(),
        api,
        url: url.into(),
        allow: vec![],
        stream_usage: StreamUsage::Ask,
    };
    let models = ModelEndpoints {
        openai: Some("http://listed.test/v1beta/openai/".into()),
        anthropic: Some("http://claude.test/v1".into()),
        endpoints: vec![
            entry(
                &["gpt-4o", "gpt-5*"],
                Family::OpenAi,
                "http://azure.test/openai/deployments/d?api-version=2024-10-21",
            ),
            entry(&["local/*"], Family::OpenAi, "http://azure.test"),
        ],
        ..ModelEndpoints::default()
    };
    let world = world(models, MANY).await;
    for (path, model, host, expected) in [
        ("/v1/chat/completions", "gemini", "listed.test", "/v1beta/openai/chat/completions"),
        ("/chat/completions", "gemini", "listed.test", "/v1beta/openai/chat/completions"),
        (
            "/v1/chat/completions",
            "gpt-4o",
            "azure.test",
            "/openai/deployments/d/chat/completions?api-version=2024-10-21",
        ),
        (
            "/v1/chat/completions?api-version=mine",
            "gpt-5-mini",
            "azure.test",
            "/openai/deployments/d/chat/completions?api-version=2024-10-21",
        ),
        ("/v1/chat/completions", "local/m", "azure.test", "/v1/chat/completions"),
        ("/v1/messages?beta=true", "claude", "claude.test", "/v1/messages"),
        ("/messages", "gpt-4o", "claude.test", "/v1/messages"),
    ] {
        let (status, reply) = world.harness.post(path, json!({"model": model, "max_tokens": 5, "messages": []})).await;
        assert_eq!(status, StatusCode::OK, "{path} {model}: {reply}");
        let came = world.last();
        assert_eq!((came.headers["host"].to_str().unwrap(), came.path.as_str()), (host, expected), "{path} {model}");
    }
    for (intent, _) in world.calls(7).await {
        assert!(["/v1/chat/completions", "/v1/messages"].contains(&intent.target.as_str()), "{}", intent.target);
    }
    // A class with an endpoint for one API does not serve the other.
    let only = ModelEndpoints { anthropic: None, ..both() };
    let world = super::models::world(only, MANY).await;
    let (status, reply) =
        world.harness.post("/v1/messages", json!({"model": "m", "max_tokens": 5, "messages": []})).await;
    assert!(status.is_client_error(), "{status}");
    assert!(reply.to_string().contains("model.endpoint") && reply["type"] == "error", "{reply}");
}

#[tokio::test]
async fn what_is_beside_the_three_apis_is_served_charged_and_recorded() {
    // The cost is limited, and only models `m*` have a price.
    let prices = vec![ModelPrice {
        model: "m*".into(),
        input_micros: 1_000_000,
        output_micros: 10_000_000,
        ..ModelPrice::default()
    }];
    let limits = Limits { cost_micros: Some(1_000_000), ..MANY };
    let world = world(ModelEndpoints { prices, ..both() }, limits).await;
    let post = |path: &'static str, body: Value| ("POST", path, body.to_string());
    let requests = [
        (post("/v1/embeddings", json!({"model": "m", "input": ["hello", "world"]})), "/v1/embeddings", 3),
        (post("/embeddings", json!({"model": "m", "input": [[1, 2], [3, 4]]})), "/v1/embeddings", 3),
        (post("/v1/moderations", json!({"input": "hello"})), "/v1/moderations", 0),
        (
            post(
                "/v1/messages/count_tokens",
                json!({"model": "claude", "messages": [{"role": "user", "content": "hi"}]}),
            ),
            "/v1/messages/count_tokens",
            0,
        ),
        (post("/v1/responses/input_tokens", json!({"model": "gpt", "input": "hi"})), "/v1/responses/input_tokens", 0),
        (("GET", "/v1/models", String::new()), "/v1/models", 0),
        (("GET", "/models/org/model:free?limit=3&key=k", String::new()), "/v1/models/org/model:free?limit=3", 0),
    ];
    for ((method, path, body), target, _) in &requests {
        let reply = world.send(method, path, &[], body).await;
        assert_eq!(reply.status(), StatusCode::OK, "{path}: {reply:?}");
        let came = world.last();
        assert_eq!((came.method.as_str(), came.path.as_str(), &came.body), (*method, *target, body), "{path}");
    }
    let calls = world.calls(requests.len()).await;
    assert_eq!(calls.len(), requests.len());
    for ((intent, outcome), (_, target, tokens)) in calls.iter().zip(&requests) {
        assert_eq!((intent.target.as_str(), outcome.tokens), (*target, *tokens), "{intent:?} {outcome:?}");
        assert_eq!(intent.reserved_tokens > 0, *tokens > 0, "{intent:?}");
        assert!(intent.request_commitment.is_some() && outcome.response_commitment.is_some());
    }
    // A call that costs money needs a price, and its content is checked.
    for (path, body, rule) in [
        ("/v1/embeddings", json!({"model": "other", "input": "x"}), "model.price"),
        ("/v1/embeddings", json!({"model": "m", "input": [{"image": "https://evil.test"}]}), "model.request"),
        (
            "/v1/messages/count_tokens",
            json!({"model": "m", "messages": [], "mcp_servers": [{"url": "https://evil.test"}]}),
            "model.request",
        ),
        (
            "/v1/moderations",
            json!({"input": [{"type": "image_url", "image_url": {"url": "https://evil.test"}}]}),
            "model.request",
        ),
    ] {
        let (status, reply) = world.harness.post(path, body).await;
        assert!(status.is_client_error() && reply.to_string().contains(rule), "{path}: {reply}");
    }
    assert_eq!(world.came().len(), requests.len());
}

#[tokio::test]
async fn what_is_not_served_is_answered_in_the_apis_form_and_recorded() {
    let world = plain().await;
    let paths = [
        ("GET", "/v1/responses/resp_1", false),
        ("POST", "/v1/files", false),
        ("GET", "/v1/files/f/content", false),
        ("POST", "/v1/audio/speech", false),
        ("POST", "/images/generations", false),
        ("POST", "/v1/batches", false),
        ("POST", "/v1/messages/batches", true),
        ("POST", "/messages/batches", true),
        ("DELETE", "/v1/models/../files", false),
        ("GET", "/v1/models/%2e%2e/files", false),
        ("POST", "/v1/v1/chat/completions", false),
        ("POST", "/v1/brand_new", false),
    ];
    for (method, path, anthropic) in paths {
        let reply = world.send(method, path, &[], "").await;
        assert_eq!(reply.status(), StatusCode::NOT_FOUND, "{path}");
        let body: Value = serde_json::from_slice(reply.body()).unwrap_or_else(|_| panic!("{path}: {reply:?}"));
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains("request.malformed") && message.contains("/embeddings"), "{message}");
        assert_eq!(body["type"] == "error", anthropic, "{path}: {body}");
    }
    let records = world.harness.stored(1 + paths.len()).await;
    let found = refusals(&records);
    assert_eq!(found.len(), paths.len());
    assert!(found.iter().all(|denied| (denied.rule, denied.channel) == (Rule::Request, Channel::Model)), "{found:#?}");
    assert!(world.came().is_empty());
}
