//! Replies that are late, compressed or long, and requests that are long: providers and their client libraries rely on them.

use std::{io::Write, net::SocketAddr, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::Path,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{any, get},
};
use belay::{
    evidence::record::{CallOutcome, Event, Outcome, Record},
    policy::{
        config::{EgressHost, EgressUse, HttpMethod, HttpUpstream, Limits, PolicyConfig, SideEffect, Upstream},
        rule::Rule,
    },
};
use flate2::{
    Compression,
    write::{DeflateEncoder, GzEncoder, ZlibEncoder},
};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde_json::{Value, json};

use super::{Harness, LIMITS, denied, harness_of, policy, tool};

const HOST: &str = "packed.test";

/// Starts an upstream that compresses its replies as its path says, whatever encoding the client accepts.
async fn packing() -> SocketAddr {
    let router = Router::new()
        .route(
            "/{how}/v1/{*api}",
            any(|Path((how, _)): Path<(String, String)>, body: String| async move { answer(&how, &body) }),
        )
        .route(
            "/{how}/item",
            get(|Path(how): Path<String>| async move { pack(&how, "application/json", r#"{"id": 7}"#) }),
        );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address
}

fn answer(how: &str, asked: &str) -> Response {
    let asked: Value = serde_json::from_str(asked).unwrap();
    let usage = json!({"prompt_tokens": 7, "completion_tokens": 5});
    if asked["stream"] == true {
        let said = json!({"choices": [{"delta": {"content": "hello"}}]});
        let account = json!({"choices": [], "usage": usage});
        return pack(how, "text/event-stream", &format!("data: {said}\n\ndata: {account}\n\ndata: [DONE]\n\n"));
    }
    pack(how, "application/json", &json!({"choices": [{"message": {"content": "hello"}}], "usage": usage}).to_string())
}

fn pack(how: &str, kind: &str, text: &str) -> Response {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, kind.parse().unwrap());
    let packed = match how {
        "gzip" | "cut" | "bomb" => {
            let mut packed = GzEncoder::new(Vec::new(), Compression::best());
            packed.write_all(text.as_bytes()).unwrap();
            if how == "bomb" {
                packed.write_all(&vec![b' '; 65 << 20]).unwrap();
            }
            packed.finish().unwrap()
        }
        "zlib" => {
            let mut packed = ZlibEncoder::new(Vec::new(), Compression::default());
            packed.write_all(text.as_bytes()).unwrap();
            packed.finish().unwrap()
        }
        "raw" => {
            let mut packed = DeflateEncoder::new(Vec::new(), Compression::default());
            packed.write_all(text.as_bytes()).unwrap();
            packed.finish().unwrap()
        }
        _ => text.as_bytes().to_vec(),
    };
    let packed = if how == "cut" { packed[..packed.len() - 10].to_vec() } else { packed };
    let said = match how {
        "zlib" | "raw" => Some("deflate"),
        "plain" => None,
        "br" => Some("br"),
        _ => Some("gzip"),
    };
    headers.extend(said.map(|said| (header::CONTENT_ENCODING, said.parse().unwrap())));
    (StatusCode::OK, headers, Body::from(packed)).into_response()
}

fn to_packing(how: &str) -> PolicyConfig {
    let mut policy = policy(LIMITS);
    policy.models.openai = Some(format!("http://{HOST}/{how}"));
    let url = format!("http://{HOST}/{how}/item");
    let http = Upstream::Http(HttpUpstream { method: HttpMethod::Get, url, query: vec![] });
    policy.tools.push(tool("item", http, SideEffect::Read));
    policy.egress.push(EgressHost {
        host: HOST.into(),
        ports: vec![80],
        uses: vec![EgressUse::Models, EgressUse::Tools],
        credential: None,
        barred: false,
    });
    policy
}

fn outcomes(records: &[Record]) -> Vec<Outcome> {
    let outcome = |record: &Record| match &record.event {
        Event::Outcome(outcome) => Some(outcome.clone()),
        _ => None,
    };
    records.iter().filter_map(outcome).collect()
}

/// A reply reads the same and its usage is found, whatever its compression. The plain reply is the control.
#[tokio::test]
async fn a_reply_that_is_packed_unasked_reads_like_one_that_is_not() {
    for how in ["plain", "gzip", "zlib", "raw"] {
        let harness = harness_of(to_packing(how), vec![(HOST.to_owned(), packing().await)]).await;
        for stream in [false, true] {
            let asked = json!({"model": "m", "messages": [], "max_tokens": 100, "stream": stream});
            let (status, reply) = harness.post("/v1/chat/completions", asked).await;
            assert_eq!(status, StatusCode::OK, "{how}: {reply}");
            assert!(reply.to_string().contains("hello"), "{how}: {reply}");
        }
        let (error, text) = harness.tool("item", json!({})).await;
        assert!(!error && text.contains('7'), "{how}: {text}");
        let records = harness.stored(7).await;
        let spent: Vec<_> = outcomes(&records).iter().map(|outcome| (outcome.outcome, outcome.tokens)).collect();
        assert_eq!(spent, [(CallOutcome::Applied, 12), (CallOutcome::Applied, 12), (CallOutcome::Applied, 0)], "{how}");
    }
}

#[tokio::test]
async fn a_reply_whose_packing_is_broken_or_a_bomb_is_never_a_whole_one() {
    for how in ["cut", "bomb"] {
        let harness = harness_of(to_packing(how), vec![(HOST.to_owned(), packing().await)]).await;
        let body = json!({"model": "m", "messages": [], "max_tokens": 100}).to_string();
        let request = hyper::Request::post(format!("http://{}/v1/chat/completions", harness.address))
            .body(Full::from(body))
            .unwrap();
        let client: Client<_, Full<bytes::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let reply = client.request(request).await.unwrap();
        let status = reply.status();
        let came = reply.into_body().collect().await.map(|came| came.to_bytes());
        // The reply breaks off, or it broke off before its head was sent.
        assert!(came.is_err() || status == StatusCode::BAD_GATEWAY, "{how}: {status} {came:?}");
        let (error, text) = harness.tool("item", json!({})).await;
        assert!(error, "{how}: {text}");
        let records = harness.stored(5).await;
        assert_eq!(
            outcomes(&records).first().map(|outcome| outcome.outcome),
            Some(CallOutcome::Unknown),
            "{how}: {records:#?}"
        );
    }
}

fn patient(silence: Option<i64>) -> PolicyConfig {
    let limits = Limits { tokens: 100_000_000, ..LIMITS };
    PolicyConfig { upstream_timeout_seconds: silence, ..policy(limits) }
}

fn asks(how: &str) -> Value {
    json!({"model": "m", "messages": [], "max_tokens": 100, "metadata": {"fails": how}})
}

/// Harness and gateway both use the class's timeout, and the error names it. The control answers in time.
#[tokio::test]
async fn an_upstream_may_be_silent_for_as_long_as_the_class_says() {
    let harness = harness_of(patient(Some(2)), vec![]).await;
    let (status, reply) = harness.post("/v1/chat/completions", asks("thinks")).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    let waited = tokio::time::timeout(Duration::from_secs(60), harness.post("/v1/chat/completions", asks("is silent")));
    let (status, reply) = waited.await.expect("it gave up nowhere");
    assert_eq!(status, StatusCode::BAD_GATEWAY, "{reply}");
    let message = reply["error"]["message"].as_str().unwrap();
    assert!(message.contains("upstream.reply") && message.contains("upstreamTimeoutSeconds"), "{message}");
    assert!(message.contains("No policy denied it"), "{message}");
}

/// Returns a request with a picture of `length` characters of base64.
fn shows(length: usize) -> Value {
    let url = format!("data:image/png;base64,{}", "A".repeat(length));
    let content = json!([{"type": "image_url", "image_url": {"url": url}}]);
    json!({"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": content}]})
}

/// Whatever the budget, a request may be as long as providers accept. The denial of a longer one names the limit.
#[tokio::test]
async fn a_request_may_be_as_long_as_providers_take() {
    let harness = harness_of(patient(None), vec![]).await;
    let long = |megabytes: usize| shows(megabytes << 20);
    let (status, reply) = harness.post("/v1/chat/completions", long(17)).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    for (path, at, kind) in [
        ("/v1/chat/completions", "/error/type", "invalid_request_error"),
        ("/v1/messages", "/error/type", "request_too_large"),
    ] {
        let (status, reply) = harness.post(path, long(33)).await;
        assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{reply}");
        assert_eq!(reply.pointer(at), Some(&json!(kind)), "{reply}");
        assert!(reply.to_string().contains("at most 33554432 bytes"), "{reply}");
    }
    assert_eq!(denied(&harness.stored(5).await), [Rule::ModelRequest; 2]);
}

/// Concurrent long requests wait until there is room for them. All requests get an answer.
#[tokio::test]
async fn long_requests_at_once_wait_for_each_other_and_short_ones_do_not() {
    let harness = std::sync::Arc::new(harness_of(patient(None), vec![]).await);
    let post = |harness: &std::sync::Arc<Harness>, body: Value| {
        let harness = harness.clone();
        tokio::spawn(async move { harness.post("/v1/chat/completions", body).await.0 })
    };
    let all: Vec<_> = [12 << 20, 12 << 20, 12 << 20, 10, 10, 10].map(|length| post(&harness, shows(length))).into();
    for status in futures::future::join_all(all).await {
        assert_eq!(status.unwrap(), StatusCode::OK);
    }
}
