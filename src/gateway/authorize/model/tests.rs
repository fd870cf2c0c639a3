use rstest::rstest;
use serde_json::{Map, Value, json};

use super::*;
use crate::{
    api::policy_pack::{EvidencePolicy, RetentionMode},
    evidence::record::Channel,
    gateway::testing,
    policy::{
        config::{ModelEndpoint, ModelPrice, PolicyConfig, Sensitivity, Usage},
        model::{
            api::Family,
            estimate,
            members::tests::published::Requests,
            request::{self, Left},
        },
    },
};

fn compiled(cost_micros: Option<i64>) -> Compiled {
    let mut policy = testing::policy();
    policy.limits.cost_micros = cost_micros;
    policy.models.prices = vec![ModelPrice {
        model: "m*".into(),
        input_micros: 1_000_000,
        output_micros: 10_000_000,
        ..ModelPrice::default()
    }];
    of(policy)
}

fn of(policy: PolicyConfig) -> Compiled {
    let evidence =
        EvidencePolicy { bucket: "evidence".into(), prefix: None, mode: RetentionMode::Compliance, retention_days: 1 };
    let credentials = policy.egress.iter().map(|_| None).collect();
    Compiled::new(policy, credentials, evidence).unwrap()
}

/// The agent's request, as the harness sends it.
fn agents() -> Value {
    json!({"model": "m-1", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 50})
}

/// The intent of the request, as the harness records it.
fn intent(compiled: &Compiled, body: &Value) -> IntentFacts {
    let price = &compiled.policy.models.prices[0];
    let known = Model::named("m-1", Some(price));
    let bound = ready::bound(Api::ChatCompletions, body.as_object().unwrap(), &known, Pack::default()).unwrap();
    IntentFacts {
        seq: 1,
        call: "1".into(),
        attempt: 1,
        channel: Channel::Model,
        target: "/v1/chat/completions".into(),
        side_effect: None,
        definition: None,
        request_commitment: None,
        key: None,
        approvals: vec![],
        model: Some("m-1".into()),
        reserved: Spent::of(bound, Some(price)),
        assessment: None,
        policy: compiled.digest.as_str().into(),
        http: None,
        compensates: None,
        usage: Usage::default(),
        seen: Sensitivity::default(),
        open: true,
        became: None,
    }
}

fn judge(compiled: &Compiled, intent: &IntentFacts, body: &str) -> Result<(), Rule> {
    let endpoint = compiled.policy.models.of(None, Some("m-1")).unwrap();
    judge_at(compiled, &api::url(endpoint.base, endpoint.family, &intent.target), intent, body)
}

fn judge_at(compiled: &Compiled, url: &str, intent: &IntentFacts, body: &str) -> Result<(), Rule> {
    let of = (intent, &testing::salt());
    let reviewed = reviewed(compiled, &Target::parse(url).unwrap(), of, (&HeaderMap::new(), body.as_bytes()));
    reviewed.map(|_| ()).map_err(|refused| refused.rule)
}

#[test]
fn what_the_harness_has_set_aside_for_leaves() {
    let compiled = compiled(Some(1_000_000));
    let intent = intent(&compiled, &agents());
    assert_eq!(judge(&compiled, &intent, &agents().to_string()), Ok(()));
    // One token or one millionth less is not enough.
    for less in [Spent { tokens: 1, cost_micros: 0 }, Spent { tokens: 0, cost_micros: 1 }] {
        let reserved = Spent {
            tokens: intent.reserved.tokens - less.tokens,
            cost_micros: intent.reserved.cost_micros - less.cost_micros,
        };
        let found = judge(&compiled, &IntentFacts { reserved, ..intent.clone() }, &agents().to_string());
        assert_eq!(found, Err(Rule::IntentMissing));
    }
}

#[rstest]
#[case::a_larger_output_limit(json!({"max_completion_tokens": 500_000}), Rule::IntentMissing)]
#[case::by_its_old_name(json!({"max_tokens": 500_000, "max_completion_tokens": null}), Rule::IntentMissing)]
#[case::more_replies(json!({"n": 100}), Rule::IntentMissing)]
#[case::a_longer_prompt(json!({"messages": [{"role": "user", "content": "x".repeat(9_000)}]}), Rule::IntentMissing)]
#[case::another_model(json!({"model": "m-2"}), Rule::IntentMissing)]
#[case::no_model(json!({"model": null}), Rule::IntentMissing)]
#[case::no_output_limit(json!({"max_completion_tokens": null}), Rule::ModelRequest)]
#[case::a_stream_without_an_account(json!({"stream": true}), Rule::ModelRequest)]
#[case::a_tool_of_the_providers(json!({"tools": [{"type": "web_search"}]}), Rule::ModelRequest)]
#[case::state_at_the_provider(json!({"previous_response_id": "r"}), Rule::ModelRequest)]
fn what_it_has_not_does_not(#[case] change: Value, #[case] rule: Rule) {
    let compiled = compiled(None);
    let intent = intent(&compiled, &agents());
    let mut body = agents();
    for (name, value) in change.as_object().unwrap() {
        body[name] = value.clone();
    }
    assert_eq!(judge(&compiled, &intent, &body.to_string()), Err(rule), "{body}");
}

#[rstest]
#[case::twice(r#"{"model": "m-1", "max_completion_tokens": 5, "max_completion_tokens": 500000}"#)]
#[case::no_json("{")]
fn what_can_be_read_in_two_ways_does_not(#[case] body: &str) {
    let compiled = compiled(None);
    assert_eq!(judge(&compiled, &intent(&compiled, &agents()), body), Err(Rule::RequestJson));
}

#[test]
fn a_list_is_no_request() {
    let compiled = compiled(None);
    assert_eq!(judge(&compiled, &intent(&compiled, &agents()), "[]"), Err(Rule::RequestJson));
}

#[test]
fn a_path_of_no_api_leads_to_no_provider() {
    let compiled = compiled(None);
    let intent = IntentFacts { target: "/v1/files".into(), ..intent(&compiled, &agents()) };
    assert_eq!(judge(&compiled, &intent, &agents().to_string()), Err(Rule::ModelRequest));
}

/// If the attempt began with another policy, the newest policy's prices are not checked, but the tokens are.
#[test]
fn who_has_begun_by_another_pack_has_its_prices() {
    let compiled = compiled(Some(1_000_000));
    let begun = IntentFacts { policy: "another".into(), ..intent(&compiled, &agents()) };
    let cheap = |tokens| IntentFacts { reserved: Spent { tokens, cost_micros: 0 }, ..begun.clone() };
    assert_eq!(judge(&compiled, &cheap(begun.reserved.tokens), &agents().to_string()), Ok(()));
    assert_eq!(judge(&compiled, &cheap(begun.reserved.tokens - 1), &agents().to_string()), Err(Rule::IntentMissing));
}

#[test]
fn a_model_without_a_price_does_not_leave_where_cost_is_limited() {
    let body = json!({"model": "other", "messages": [], "max_completion_tokens": 5});
    for (limit, expected) in [(Some(1_000_000), Err(Rule::ModelPrice)), (None, Ok(()))] {
        let compiled = compiled(limit);
        let found = IntentFacts { model: Some("other".into()), ..intent(&compiled, &body) };
        assert_eq!(judge(&compiled, &found, &body.to_string()), expected);
    }
}

/// Each model is called at its own endpoint, so that no other provider gets its prompts or uses its credential.
#[test]
fn a_model_is_asked_at_no_endpoint_of_another() {
    let mut policy = compiled(None).policy.clone();
    policy.models.endpoints = vec![ModelEndpoint {
        url: "https://other.test/v1".into(),
        models: vec!["o-*".into()],
        api: Family::OpenAi,
        allow: vec![],
        stream_usage: crate::policy::config::StreamUsage::Ask,
    }];
    let compiled = of(policy);
    let (own, other) = ("https://models.world.test/v1/chat/completions", "https://other.test/v1/chat/completions");
    let mut body = agents();
    for (model, at, elsewhere) in [("m-1", own, other), ("o-1", other, own)] {
        body["model"] = json!(model);
        let intent = IntentFacts { model: Some(model.into()), ..intent(&compiled, &body) };
        assert_eq!(judge_at(&compiled, at, &intent, &body.to_string()), Ok(()), "{model}");
        assert_eq!(judge_at(&compiled, elsewhere, &intent, &body.to_string()), Err(Rule::ModelEndpoint), "{model}");
    }
}

/// A compromised harness may add headers: accounts to bill, cookies, and parts of the API that the pack does not allow.
#[test]
fn headers_leave_by_list() {
    let compiled = compiled(None);
    let intent = intent(&compiled, &agents());
    let headers: HeaderMap = [
        ("content-type", "application/json"),
        ("accept-encoding", "identity"),
        ("traceparent", "00-1"),
        ("openai-organization", "org-other"),
        ("openai-project", "proj-other"),
        ("x-http-method-override", "DELETE"),
        ("cookie", "session=1"),
        ("anthropic-beta", "mcp-client-2025-04-04,context-1m-2025-08-07"),
        ("openai-beta", "assistants=v2"),
    ]
    .into_iter()
    .map(|(name, value)| (http::HeaderName::from_static(name), HeaderValue::from_static(value)))
    .collect();
    let to = Target::parse("https://models.world.test/v1/chat/completions").unwrap();
    let body = agents().to_string();
    let left = reviewed(&compiled, &to, (&intent, &testing::salt()), (&headers, body.as_bytes())).unwrap();
    let mut left: Vec<_> = left.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
    left.sort_unstable();
    let expected = [
        ("accept-encoding", "identity"),
        ("anthropic-beta", "context-1m-2025-08-07"),
        ("content-type", "application/json"),
        ("traceparent", "00-1"),
    ];
    assert_eq!(left, expected);
}

/// The gateway allows what a harness prepares and allows, and denies what a harness denies, over requests that are generated from the
/// providers' published types and then changed. BELAY_REQUESTS sets their number.
#[test]
fn harness_and_gateway_agree_on_each_request() {
    let compiled = compiled(None);
    let policy = &compiled.policy;
    let requests = Requests::new();
    let (mut left, mut stayed) = (0_u64, 0_u64);
    for number in Requests::numbers() {
        let Some((api, body)) = requests.of(number) else { continue };
        let text = Value::Object(body).to_string();
        let model = |body: &Map<String, Value>| body.get("model").and_then(Value::as_str).map(str::to_owned);
        // As the harness does.
        let made = Written::read(text.as_bytes()).ok().and_then(|written| {
            let model = model(written.judged());
            let endpoint = policy.models.of(api.family(), model.as_deref())?;
            let price = model.as_deref().and_then(|model| price::of(&policy.models.prices, model));
            let known = Model::named(model.as_deref().unwrap_or_default(), price);
            let prompt = estimate::prompt(api, written.judged(), &known);
            let left = Left { tokens: 10_000_000, cost: None };
            let bounded =
                request::bound(api, written.judged(), &known, Pack::of(policy, endpoint), prompt, left).ok()?;
            Some((written.with(&bounded.set), Spent::of(bounded.reserved.bound, price), model))
        });
        let (sent, reserved, model, leaves) = match made {
            Some((sent, reserved, model)) => (sent, reserved, model, true),
            None => {
                let lies = Spent { tokens: i64::MAX, cost_micros: i64::MAX };
                let model = serde_json::from_str(&text).ok().and_then(|body: Map<String, Value>| model(&body));
                (text.into_bytes(), lies, model, false)
            }
        };
        let intent = IntentFacts {
            target: api.path().to_owned(),
            model: model.map(|model| shorten(&compiled.redactor.model(&model, policy, &testing::salt()))),
            reserved,
            ..intent(&compiled, &agents())
        };
        let base = policy.models.openai.as_deref().unwrap();
        let to = Target::parse(&api::url(base, Family::OpenAi, api.path())).unwrap();
        let found = reviewed(&compiled, &to, (&intent, &testing::salt()), (&HeaderMap::new(), &sent));
        assert_eq!(found.is_ok(), leaves, "{number}: {found:?}: {}", String::from_utf8_lossy(&sent));
        *if leaves { &mut left } else { &mut stayed } += 1;
    }
    assert!(left * 20 > stayed && stayed * 20 > left, "{left} left, {stayed} stayed");
}
