use rstest::rstest;

use super::*;
use crate::{
    api::policy_pack::{EvidencePolicy, RetentionMode},
    gateway::testing,
    policy::config::{EgressHost, EgressUse, HttpMethod, HttpUpstream, Idempotency},
};

/// SHA-256 of `{}`.
const NO_ARGUMENTS: &str = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

fn compiled() -> Compiled {
    use EgressUse::{Direct, Models, Tools};
    let entry = |host: &str, ports: &[u16], uses: &[EgressUse]| EgressHost {
        host: host.into(),
        ports: ports.to_vec(),
        uses: uses.to_vec(),
    };
    let credential = || {
        Some(Credential { secret: "s".into(), key: "k".into(), header: "authorization".into(), prefix: String::new() })
    };
    let policy = testing::policy();
    Compiled {
        digest: policy.digest().unwrap(),
        policy,
        egress: vec![
            entry("tools.world.test", &[443], &[Tools]),
            entry("models.world.test", &[443, 80], &[Models]),
            entry("docs.world.test", &[443, 80], &[Direct]),
            entry("*.docs.world.test", &[443], &[Direct]),
        ],
        credentials: vec![None, credential(), credential(), None],
        evidence: EvidencePolicy {
            bucket: "evidence".into(),
            prefix: None,
            mode: RetentionMode::Compliance,
            retention_days: 1,
        },
    }
}

#[rstest]
#[case("https://a.test", Ok(("a.test:443", "a.test", "/")))]
#[case("http://a.test", Ok(("a.test:80", "a.test", "/")))]
#[case("HTTPS://A.Test.:8443/x?y=1", Ok(("a.test:8443", "a.test:8443", "/x?y=1")))]
#[case("http://a.test:443/", Ok(("a.test:443", "a.test:443", "/")))]
#[case("https://a.test:443?q", Ok(("a.test:443", "a.test", "/?q")))]
#[case::relative("/x", Err(Rule::Request))]
#[case::authority_only("a.test:443", Err(Rule::Request))]
#[case::scheme("ftp://a.test/", Err(Rule::Request))]
#[case::no_host("https:///x", Err(Rule::Request))]
#[case::fragment("https://a.test/#x", Err(Rule::Request))]
#[case::space("https://a.test/ x", Err(Rule::Request))]
#[case::newline("https://a.test/\nx", Err(Rule::Request))]
#[case::a31_userinfo("https://a.test@evil.test/", Err(Rule::EgressHost))]
#[case::a31_password("https://a.test:443@evil.test/", Err(Rule::EgressHost))]
#[case::a32_v6("https://[::1]/", Err(Rule::EgressHost))]
#[case::a15_decimal("https://2130706433/", Err(Rule::EgressHost))]
#[case::a15_hex("https://0x7f000001/", Err(Rule::EgressHost))]
#[case::a15_octal("https://0177.0.0.1/", Err(Rule::EgressHost))]
#[case::a33_zero("https://a.test:0/", Err(Rule::EgressPort))]
#[case::backslash("https://a.test\\@evil.test/", Err(Rule::Request))]
fn targets(#[case] text: &str, #[case] expected: Result<(&str, &str, &str), Rule>) {
    let found = Target::parse(text);
    let found = found
        .as_ref()
        .map(|t| (t.authority.to_string(), t.host_header(), t.path.to_string()))
        .map_err(|refused| refused.rule);
    assert_eq!(found, expected.map(|(a, h, p)| (a.to_owned(), h.to_owned(), p.to_owned())));
}

#[rstest]
#[case::tool(Channel::Tool, "https://tools.world.test/mcp", Ok(false))]
#[case::model(Channel::Model, "https://models.world.test/v1/messages", Ok(true))]
#[case::model_in_the_clear(Channel::Model, "http://models.world.test/v1/messages", Err(Rule::UpstreamCredential))]
#[case::direct_never_gets_a_credential(Channel::Egress, "http://docs.world.test/", Ok(false))]
#[case::direct_below(Channel::Egress, "https://a.docs.world.test/", Ok(false))]
#[case::tool_to_model(Channel::Tool, "https://models.world.test/v1/messages", Err(Rule::EgressHost))]
#[case::direct_to_tool(Channel::Egress, "https://tools.world.test/mcp", Err(Rule::EgressDirect))]
#[case::port(Channel::Tool, "https://tools.world.test:8443/mcp", Err(Rule::EgressPort))]
#[case::unlisted(Channel::Egress, "https://evil.world.test/", Err(Rule::EgressHost))]
fn lists(#[case] channel: Channel, #[case] url: &str, #[case] expected: Result<bool, Rule>) {
    let target = Target::parse(url).unwrap();
    let found = listed(&compiled(), channel, Destination::Url(&target, &Method::POST));
    assert_eq!(found.map(|credential| credential.is_some()).map_err(|e| e.rule), expected);
}

fn facts(channel: Channel, target: &str, effect: Option<SideEffect>) -> IntentFacts {
    let definition = effect.map(|_| testing::DEFINITION.to_owned());
    IntentFacts {
        call: "1".into(),
        attempt: 1,
        channel,
        target: target.into(),
        effect,
        definition,
        request_digest: Some(NO_ARGUMENTS.into()),
        key: None,
        approval: None,
        open: true,
    }
}

#[rstest]
#[case::tool(Channel::Tool, "https://tools.world.test/mcp", facts(Channel::Tool, "write", Some(SideEffect::Write)), Ok(()))]
#[case::tool_over(
    Channel::Tool,
    "https://tools.world.test/mcp",
    IntentFacts { open: false, ..facts(Channel::Tool, "write", Some(SideEffect::Write)) },
    Err(Rule::IntentMissing)
)]
#[case::read_over(
    Channel::Tool,
    "https://tools.world.test/mcp",
    IntentFacts { open: false, ..facts(Channel::Tool, "search", Some(SideEffect::Read)) },
    Ok(())
)]
#[case::other_path(
    Channel::Tool,
    "https://tools.world.test/admin",
    facts(Channel::Tool, "write", Some(SideEffect::Write)),
    Err(Rule::IntentMissing)
)]
#[case::other_host(
    Channel::Tool,
    "https://docs.world.test/mcp",
    facts(Channel::Tool, "write", Some(SideEffect::Write)),
    Err(Rule::IntentMissing)
)]
#[case::plain(
    Channel::Tool,
    "http://tools.world.test:443/mcp",
    facts(Channel::Tool, "write", Some(SideEffect::Write)),
    Err(Rule::IntentMissing)
)]
#[case::unknown_tool(
    Channel::Tool,
    "https://tools.world.test/mcp",
    facts(Channel::Tool, "drop", Some(SideEffect::Write)),
    Err(Rule::ToolKnown)
)]
#[case::harmless_by_its_own_word(
    Channel::Tool,
    "https://tools.world.test/mcp",
    facts(Channel::Tool, "write", Some(SideEffect::Read)),
    Err(Rule::ToolEffect)
)]
#[case::tighter(
    Channel::Tool,
    "https://tools.world.test/mcp",
    facts(Channel::Tool, "search", Some(SideEffect::Write)),
    Ok(())
)]
#[case::tighter_than_the_class_allows(
    Channel::Tool,
    "https://tools.world.test/mcp",
    facts(Channel::Tool, "search", Some(SideEffect::External)),
    Err(Rule::ToolEffect)
)]
#[case::tighter_over(
    Channel::Tool,
    "https://tools.world.test/mcp",
    IntentFacts { open: false, ..facts(Channel::Tool, "search", Some(SideEffect::Write)) },
    Err(Rule::IntentMissing)
)]
#[case::no_definition(
    Channel::Tool,
    "https://tools.world.test/mcp",
    IntentFacts { definition: None, ..facts(Channel::Tool, "write", Some(SideEffect::Write)) },
    Err(Rule::ToolChanged)
)]
#[case::listing(Channel::Listing, "https://tools.world.test/mcp", facts(Channel::Listing, "write", None), Ok(()))]
#[case::listing_over(
    Channel::Listing,
    "https://tools.world.test/mcp",
    IntentFacts { open: false, ..facts(Channel::Listing, "write", None) },
    Ok(())
)]
#[case::listing_elsewhere(
    Channel::Listing,
    "https://tools.world.test/admin",
    facts(Channel::Listing, "write", None),
    Err(Rule::IntentMissing)
)]
#[case::listing_for_a_call(
    Channel::Tool,
    "https://tools.world.test/mcp",
    facts(Channel::Listing, "write", None),
    Err(Rule::IntentMissing)
)]
#[case::no_effect(
    Channel::Tool,
    "https://tools.world.test/mcp",
    facts(Channel::Tool, "write", None),
    Err(Rule::ToolEffect)
)]
#[case::other_attempt(
    Channel::Tool,
    "https://tools.world.test/mcp",
    IntentFacts { attempt: 2, ..facts(Channel::Tool, "write", Some(SideEffect::Write)) },
    Err(Rule::IntentMissing)
)]
#[case::other_channel(
    Channel::Tool,
    "https://tools.world.test/mcp",
    facts(Channel::Egress, "tools.world.test:443", None),
    Err(Rule::IntentMissing)
)]
#[case::model(Channel::Model, "https://models.world.test/v1/messages?beta=true", facts(Channel::Model, "/v1/messages", None), Ok(()))]
#[case::model_query_in_intent(Channel::Model, "https://models.world.test/v1/messages?beta=true", facts(Channel::Model, "/v1/messages?beta=true", None), Ok(()))]
#[case::model_other_path(
    Channel::Model,
    "https://models.world.test/v1/files",
    facts(Channel::Model, "/v1/messages", None),
    Err(Rule::ModelEndpoint)
)]
#[case::model_dots(
    Channel::Model,
    "https://models.world.test/v1/messages/../files",
    facts(Channel::Model, "/v1/messages", None),
    Err(Rule::ModelEndpoint)
)]
#[case::model_other_host(
    Channel::Model,
    "https://tools.world.test/v1/messages",
    facts(Channel::Model, "/v1/messages", None),
    Err(Rule::ModelEndpoint)
)]
#[case::direct(Channel::Egress, "https://docs.world.test/any?thing", facts(Channel::Egress, "docs.world.test:443", None), Ok(()))]
#[case::direct_other_port(
    Channel::Egress,
    "http://docs.world.test/",
    facts(Channel::Egress, "docs.world.test:443", None),
    Err(Rule::IntentMissing)
)]
#[case::direct_other_host(
    Channel::Egress,
    "https://a.docs.world.test/",
    facts(Channel::Egress, "docs.world.test:443", None),
    Err(Rule::IntentMissing)
)]
fn intents(
    #[case] channel: Channel,
    #[case] url: &str,
    #[case] intent: IntentFacts,
    #[case] expected: Result<(), Rule>,
) {
    let target = Target::parse(url).unwrap();
    let found =
        intended(&compiled(), 1, channel, Destination::Url(&target, &Method::POST), &intent).map_err(|e| e.rule);
    assert_eq!(found, expected);
}

#[test]
fn a_tunnel_is_for_the_agents_own_traffic() {
    let to = Authority::parse("tools.world.test:443", None).unwrap();
    let tool = facts(Channel::Tool, "write", Some(SideEffect::Write));
    let found = intended(&compiled(), 1, Channel::Tool, Destination::Tunnel(&to), &tool);
    assert_eq!(found.unwrap_err().rule, Rule::EgressDirect);
    let to = Authority::parse("docs.world.test:443", None).unwrap();
    let direct = facts(Channel::Egress, "docs.world.test:443", None);
    assert_eq!(intended(&compiled(), 1, Channel::Egress, Destination::Tunnel(&to), &direct), Ok(()));
}

#[test]
fn a_tool_that_the_class_forbids_now_is_refused() {
    let mut compiled = compiled();
    compiled.policy.allowed_effects = vec![SideEffect::Read];
    let target = Target::parse("https://tools.world.test/mcp").unwrap();
    let intent = facts(Channel::Tool, "write", Some(SideEffect::Write));
    let found = intended(&compiled, 1, Channel::Tool, Destination::Url(&target, &Method::POST), &intent);
    assert_eq!(found.unwrap_err().rule, Rule::ToolEffect);
}

#[rstest]
#[case::listing_post(Channel::Listing, Method::POST, true)]
#[case::listing_get(Channel::Listing, Method::GET, true)]
#[case::listing_delete(Channel::Listing, Method::DELETE, true)]
#[case::listing_put(Channel::Listing, Method::PUT, false)]
#[case::call(Channel::Tool, Method::POST, true)]
#[case::call_get(Channel::Tool, Method::GET, false)]
#[case::call_delete(Channel::Tool, Method::DELETE, false)]
fn methods_of_mcp(#[case] channel: Channel, #[case] method: Method, #[case] allowed: bool) {
    let target = Target::parse("https://tools.world.test/mcp").unwrap();
    let effect = (channel == Channel::Tool).then_some(SideEffect::Write);
    let found = intended(&compiled(), 1, channel, Destination::Url(&target, &method), &facts(channel, "write", effect));
    assert_eq!(found.map_err(|e| e.rule), if allowed { Ok(()) } else { Err(Rule::IntentMissing) });
}

#[test]
fn a_pin_is_asked_for_again() {
    let mut compiled = compiled();
    let Upstream::Mcp(mcp) = &mut compiled.policy.tools[1].upstream else { panic!() };
    mcp.digest = Some("ab".repeat(32));
    let target = Target::parse("https://tools.world.test/mcp").unwrap();
    let by = |definition: Option<String>| {
        let intent = IntentFacts { definition, ..facts(Channel::Tool, "write", Some(SideEffect::Write)) };
        let to = Destination::Url(&target, &Method::POST);
        intended(&compiled, 1, Channel::Tool, to, &intent).map_err(|e| e.rule)
    };
    assert_eq!(by(Some("ab".repeat(32))), Ok(()));
    assert_eq!(by(Some("cd".repeat(32))), Err(Rule::ToolChanged));
    assert_eq!(by(None), Err(Rule::ToolChanged));
}

#[rstest]
#[case::call(Channel::Tool, r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"write"}}"#, Ok(()))]
#[case::other_tool(
    Channel::Tool,
    r#"{"id":1,"method":"tools/call","params":{"name":"drop"}}"#,
    Err(Rule::IntentMissing)
)]
#[case::no_tool(Channel::Tool, r#"{"id":1,"method":"tools/call"}"#, Err(Rule::IntentMissing))]
#[case::no_call(Channel::Tool, r#"{"id":1,"method":"tools/list"}"#, Err(Rule::IntentMissing))]
#[case::named_twice(
    Channel::Tool,
    r#"{"method":"tools/call","params":{"name":"write","name":"drop"}}"#,
    Err(Rule::Request)
)]
#[case::method_twice(Channel::Listing, r#"{"method":"ping","method":"tools/call"}"#, Err(Rule::Request))]
#[case::batch(Channel::Tool, r#"[{"method":"tools/call","params":{"name":"write"}}]"#, Err(Rule::Request))]
#[case::no_json(Channel::Tool, "", Err(Rule::Request))]
#[case::no_arguments(Channel::Tool, r#"{"id":1,"method":"tools/call","params":{"name":"write","arguments":{}}}"#, Ok(()))]
#[case::other_arguments(
    Channel::Tool,
    r#"{"id":1,"method":"tools/call","params":{"name":"write","arguments":{"a":1}}}"#,
    Err(Rule::IntentMissing)
)]
#[case::list(Channel::Listing, r#"{"id":1,"method":"tools/list","params":{"cursor":"x"}}"#, Ok(()))]
#[case::begin(Channel::Listing, r#"{"id":1,"method":"initialize","params":{}}"#, Ok(()))]
#[case::discover(Channel::Listing, r#"{"id":1,"method":"server/discover"}"#, Ok(()))]
#[case::notification(Channel::Listing, r#"{"method":"notifications/cancelled","params":{}}"#, Ok(()))]
#[case::answer(Channel::Listing, r#"{"id":1,"result":{}}"#, Ok(()))]
#[case::call_in_a_listing(
    Channel::Listing,
    r#"{"id":1,"method":"tools/call","params":{"name":"write"}}"#,
    Err(Rule::IntentMissing)
)]
#[case::resource_in_a_listing(Channel::Listing, r#"{"id":1,"method":"resources/read"}"#, Err(Rule::IntentMissing))]
fn messages(#[case] channel: Channel, #[case] body: &str, #[case] expected: Result<(), Rule>) {
    let found = says(&compiled(), channel, &facts(channel, "write", None), body.as_bytes());
    assert_eq!(found.map_err(|e| e.rule), expected);
}

#[rstest]
#[case::it(Method::POST, "https://tools.world.test/t/7?q=1", true, Ok(()))]
#[case::other_argument(Method::POST, "https://tools.world.test/t/8", true, Ok(()))]
#[case::method(Method::PUT, "https://tools.world.test/t/7", true, Err(Rule::IntentMissing))]
#[case::path(Method::POST, "https://tools.world.test/admin", true, Err(Rule::IntentMissing))]
#[case::deeper(Method::POST, "https://tools.world.test/t/7/8", true, Err(Rule::IntentMissing))]
#[case::dots(Method::POST, "https://tools.world.test/t/..", true, Err(Rule::IntentMissing))]
#[case::query(Method::POST, "https://tools.world.test/t/7?admin=1", true, Err(Rule::IntentMissing))]
#[case::host(Method::POST, "https://docs.world.test/t/7", true, Err(Rule::IntentMissing))]
#[case::plain(Method::POST, "http://tools.world.test:443/t/7", true, Err(Rule::IntentMissing))]
#[case::over(Method::POST, "https://tools.world.test/t/7", false, Err(Rule::IntentMissing))]
fn http_tools(#[case] method: Method, #[case] url: &str, #[case] open: bool, #[case] expected: Result<(), Rule>) {
    let mut compiled = compiled();
    compiled.policy.tools[1].upstream = Upstream::Http(HttpUpstream {
        method: HttpMethod::Post,
        url: "https://tools.world.test/t/{id}".into(),
        query: vec!["q".into()],
    });
    let target = Target::parse(url).unwrap();
    let intent = IntentFacts { open, definition: None, ..facts(Channel::Tool, "write", Some(SideEffect::Write)) };
    let found = intended(&compiled, 1, Channel::Tool, Destination::Url(&target, &method), &intent);
    assert_eq!(found.map_err(|e| e.rule), expected);
    assert!(!is_message(&compiled, Channel::Tool, &method, &intent), "its body is no JSON-RPC");
}

#[rstest]
#[case::it("https://api.test/t/7?q=x", r#"{"text":"a"}"#, Ok(()))]
#[case::spaced("https://api.test/t/7?q=x", r#"{ "text": "a" }"#, Ok(()))]
#[case::other_path("https://api.test/t/8?q=x", r#"{"text":"a"}"#, Err(Rule::ToolApproval))]
#[case::other_query("https://api.test/t/7?q=y", r#"{"text":"a"}"#, Err(Rule::ToolApproval))]
#[case::other_body("https://api.test/t/7?q=x", r#"{"text":"b"}"#, Err(Rule::ToolApproval))]
#[case::more_body("https://api.test/t/7?q=x", r#"{"text":"a","to":"b"}"#, Err(Rule::ToolApproval))]
#[case::no_body("https://api.test/t/7?q=x", "", Err(Rule::ToolApproval))]
#[case::no_json("https://api.test/t/7?q=x", "text=a", Err(Rule::ToolApproval))]
#[case::twice("https://api.test/t/7?q=x", r#"{"text":"b","text":"a"}"#, Err(Rule::ToolApproval))]
fn what_people_approved_is_the_request(#[case] url: &str, #[case] body: &str, #[case] expected: Result<(), Rule>) {
    let http =
        HttpUpstream { method: HttpMethod::Post, url: "https://api.test/t/{id}".into(), query: vec!["q".into()] };
    let args = serde_json::json!({"id": 7, "q": "x", "text": "a"});
    let found = as_approved(&http, &Target::parse(url).unwrap(), &args, body.as_bytes());
    assert_eq!(found.map_err(|e| e.rule), expected);
}

#[rstest]
#[case::it(&["k"], Ok(()))]
#[case::none(&[], Err(Rule::ToolIdempotency))]
#[case::another(&["l"], Err(Rule::ToolIdempotency))]
#[case::twice(&["k", "k"], Err(Rule::ToolIdempotency))]
fn an_upstream_gets_the_key_of_the_intent(#[case] sent: &[&'static str], #[case] expected: Result<(), Rule>) {
    let mut compiled = compiled();
    compiled.policy.tools[1].idempotency =
        Some(Idempotency { argument: None, header: Some("idempotency-key".into()), window_seconds: 60 });
    let intent = IntentFacts { key: Some("k".into()), ..facts(Channel::Tool, "write", Some(SideEffect::Write)) };
    let mut headers = HeaderMap::new();
    for key in sent {
        headers.append("idempotency-key", http::HeaderValue::from_static(key));
    }
    assert_eq!(carries_key(&compiled, &intent, &headers).map_err(|e| e.rule), expected);
}

/// Intents and contracts agree on whether calls are idempotent.
#[rstest]
#[case(false, None, Ok(()))]
#[case(false, Some("k"), Err(Rule::ToolIdempotency))]
#[case(true, None, Err(Rule::ToolIdempotency))]
#[case(true, Some("k"), Ok(()))]
fn an_intent_has_a_key_where_its_contract_says(
    #[case] idempotent: bool,
    #[case] key: Option<&str>,
    #[case] expected: Result<(), Rule>,
) {
    let mut compiled = compiled();
    compiled.policy.tools[1].idempotency =
        idempotent.then_some(Idempotency { argument: None, header: None, window_seconds: 60 });
    let intent = IntentFacts { key: key.map(Into::into), ..facts(Channel::Tool, "write", Some(SideEffect::Write)) };
    let target = Target::parse("https://tools.world.test/mcp").unwrap();
    let found = intended(&compiled, 1, Channel::Tool, Destination::Url(&target, &Method::POST), &intent);
    assert_eq!(found.map_err(|e| e.rule), expected);
}
