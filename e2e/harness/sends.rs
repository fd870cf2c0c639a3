//! A compromised harness, with the token and the link of the real one: what it sends under the intents of the agent's own calls.

use std::time::Duration;

use belay::{
    evidence::record::Channel,
    harness::gate::{Call, Permit, Settlement},
    policy::{budget::Spent, rule::Rule},
};
use bytes::Bytes;
use http::{Method, Request};
use serde_json::{Value, json};

use super::{Harness, StatusCode, harness};

const SILENCE: Duration = Duration::from_secs(60);

/// The agent's own call is the control: it leaves, and its commitment is the one that the gateway requires.
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
        let refused = harness.gate.link().forward((channel, intent), url, request, SILENCE).await;
        let refused = refused.err().map(|refused| refused.denial.rule);
        assert_eq!(refused, Some(Rule::IntentMissing), "{channel:?} {method} {url} {body}");
    }
    assert_eq!(harness.gateway.saw(), own, "nothing more reached an upstream");
}

/// Writes an intent as a compromised harness can: with the commitment to this body, and with any model and reservation.
async fn intends(harness: &Harness, path: &str, body: &str, model: &str, reserve: Spent) -> Permit {
    let call = Call {
        channel: Channel::Model,
        target: path.to_owned(),
        side_effect: None,
        definition: None,
        request_commitment: Some(harness.gate.salt().bytes(body.as_bytes())),
        request_bytes: body.len() as u64,
        key: None,
        approvals: vec![],
        reasons: vec![],
        compensates: None,
        judged: None,
        rules: vec![Rule::RequestJson, Rule::ModelEndpoint, Rule::ModelRequest],
        model: Some(model.to_owned()),
        reserve,
    };
    harness.gate.permit(call).await.unwrap()
}

/// Sends a request with this body under an intent. Returns the rule by which the request is denied, if it is denied.
async fn sends(harness: &Harness, intent: u64, path: &str, body: &str) -> Option<Rule> {
    let mut request = Request::new(Bytes::from(body.to_owned()));
    *request.method_mut() = Method::POST;
    let url = format!("http://models.test{path}");
    let sent = harness.gate.link().forward((Channel::Model, intent), &url, request, SILENCE).await;
    sent.err().map(|refused| refused.denial.rule)
}

#[tokio::test]
async fn a_harness_that_lies_about_a_model_call_gets_no_further_than_the_gateway() {
    let asks = |path: &str, change: Value| {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5});
        if path == "/v1/responses" {
            body = json!({"model": "m", "input": "hi", "max_output_tokens": 20, "store": false});
        }
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        body.to_string()
    };
    let hi = "data:image/png;base64,aGk=";
    let picture = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": hi}}]}]);
    let enough = Spent { tokens: 200, cost_micros: 300 };
    let (chat, messages, responses) = ("/v1/chat/completions", "/v1/messages", "/v1/responses");
    for (why, path, change, reserve, rule) in [
        ("the control", chat, json!({}), enough, None),
        ("the control of another API", messages, json!({}), enough, None),
        ("more output", chat, json!({"max_tokens": 500_000}), enough, Some(Rule::IntentMissing)),
        ("more output", messages, json!({"max_tokens": 500_000}), enough, Some(Rule::IntentMissing)),
        ("more replies", chat, json!({"n": 128}), enough, Some(Rule::IntentMissing)),
        ("a longer prompt", chat, json!({"user": "x".repeat(50_000)}), enough, Some(Rule::IntentMissing)),
        ("pictures", chat, json!({"messages": picture}), enough, Some(Rule::IntentMissing)),
        ("nothing set aside", chat, json!({}), Spent::default(), Some(Rule::IntentMissing)),
        // 200 tokens cost at least 200. Here, the 25 tokens of the reply alone can cost 250.
        (
            "too little money",
            chat,
            json!({"max_tokens": 25}),
            Spent { cost_micros: 200, ..enough },
            Some(Rule::IntentMissing),
        ),
        ("another model", chat, json!({"model": "mm"}), enough, Some(Rule::IntentMissing)),
        ("a search", chat, json!({"tools": [{"type": "web_search"}]}), enough, Some(Rule::ModelRequest)),
        ("the control of a third", responses, json!({}), enough, None),
        ("no limit", responses, json!({"max_output_tokens": null}), enough, Some(Rule::ModelRequest)),
        ("a reply elsewhere", responses, json!({"background": true}), enough, Some(Rule::ModelRequest)),
        ("state there", responses, json!({"previous_response_id": "r"}), enough, Some(Rule::ModelRequest)),
        ("servers there", messages, json!({"mcp_servers": [{}]}), enough, Some(Rule::ModelRequest)),
    ] {
        let harness = harness().await;
        let body = asks(path, change);
        let permit = intends(&harness, path, &body, "m", reserve).await;
        assert_eq!(sends(&harness, permit.intent, path, &body).await, rule, "{why}: {body}");
        assert_eq!(harness.gateway.saw().len(), usize::from(rule.is_none()), "{why}: {body}");
        permit.settle(Settlement::not_applied(Rule::Busy));
    }
}

#[tokio::test]
async fn another_body_does_not_leave_by_an_open_intent_and_the_intents_own_does() {
    let harness = harness().await;
    let path = "/v1/chat/completions";
    let body = json!({"model": "m", "messages": [], "max_tokens": 5}).to_string();
    let permit = intends(&harness, path, &body, "m", Spent { tokens: 200, cost_micros: 300 }).await;
    for other in [body.replace("[]", r#"[{"role":"user","content":"x"}]"#), format!("{body} "), String::new()] {
        assert_eq!(sends(&harness, permit.intent, path, &other).await, Some(Rule::IntentMissing), "{other}");
    }
    assert_eq!(sends(&harness, permit.intent, "/v1/messages", &body).await, Some(Rule::ModelEndpoint));
    assert!(harness.gateway.saw().is_empty());
    assert_eq!(sends(&harness, permit.intent, path, &body).await, None);
    permit.settle(Settlement::not_applied(Rule::Busy));
}
