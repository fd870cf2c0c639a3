//! A harness that is somebody else's by now, with the real one's token and link: what it sends under the intents of the agent's own calls.

use belay::{evidence::record::Channel, policy::rule::Rule};
use bytes::Bytes;
use http::{Method, Request};
use serde_json::json;

use super::{StatusCode, harness};

/// The agent's own call is the control: it leaves, and its digest is the one that the gateway asks for.
#[tokio::test]
async fn nothing_leaves_by_the_intent_of_a_model_call_that_is_over() {
    let harness = harness().await;
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    let (status, reply) = harness.post("/v1/chat/completions", body.clone()).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    let records = harness.stored(3).await;
    let intent = records[1].seq;
    let own = harness.gateway.saw();
    let sent = own.last().and_then(|sent| sent.split_once("} ")).map(|(_, body)| body.to_owned()).unwrap();

    let url = "http://models.test/v1/chat/completions";
    let other = json!({"model": "other", "max_tokens": 500_000, "messages": [], "tools": [{"type": "web_search"}]});
    for (channel, method, url, body) in [
        (Channel::Model, Method::POST, url, other.to_string()),
        (Channel::Model, Method::POST, url, sent),
        (Channel::Model, Method::GET, url, String::new()),
        (Channel::Model, Method::POST, "http://models.test/v1/responses", other.to_string()),
        (Channel::Egress, Method::POST, "http://docs.test.example/", other.to_string()),
        (Channel::Listing, Method::POST, "http://tools.test/mcp", other.to_string()),
        (Channel::Tool, Method::POST, "http://tools.test/mcp", other.to_string()),
    ] {
        let mut request = Request::new(Bytes::from(body.clone()));
        *request.method_mut() = method.clone();
        let refused = harness.gate.link().forward(channel, intent, url, request).await;
        let refused = refused.err().map(|refused| refused.denial.rule);
        assert_eq!(refused, Some(Rule::IntentMissing), "{channel:?} {method} {url} {body}");
    }
    assert_eq!(harness.gateway.saw(), own, "nothing more reached an upstream");
}
