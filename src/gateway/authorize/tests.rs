use rstest::rstest;
use serde_json::json;

use super::*;
use crate::{
    api::policy_pack::{EvidencePolicy, RetentionMode},
    gateway::testing,
    policy::{
        access::Assessment,
        approval::Approvers,
        budget::Spent,
        config::{
            AccessRule, Approval, EgressHost, EgressUse, HttpMethod, HttpUpstream, Idempotency, OnTimeout,
            PolicyConfig, Precondition, RuleDecision, Sensitivity, Usage,
        },
    },
};

fn compiled() -> Compiled {
    use EgressUse::{Direct, Models, Tools};
    let entry = |host: &str, ports: &[u16], uses: &[EgressUse]| EgressHost {
        host: host.into(),
        ports: ports.to_vec(),
        uses: uses.to_vec(),
        credential: None,
        barred: false,
    };
    let credential = || {
        Some(Credential {
            principals: vec![],
            secret: "s".into(),
            key: "k".into(),
            header: "authorization".into(),
            prefix: String::new(),
        })
    };
    let mut policy = testing::policy();
    policy.egress = vec![
        entry("tools.world.test", &[443], &[Tools]),
        entry("models.world.test", &[443, 80], &[Models]),
        entry("docs.world.test", &[443, 80], &[Direct]),
        entry("*.docs.world.test", &[443], &[Direct]),
        entry("here.world.test", &[80], &[Models]),
    ];
    by(policy, vec![None, credential(), credential(), None, credential()])
}

fn by(policy: PolicyConfig, credentials: Vec<Option<Credential>>) -> Compiled {
    let evidence =
        EvidencePolicy { bucket: "evidence".into(), prefix: None, mode: RetentionMode::Compliance, retention_days: 1 };
    Compiled::new(policy, credentials, evidence).unwrap()
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
#[case::no_path("https://a.test", "https://a.test/")]
#[case::query_without_path("https://a.test?x=1", "https://a.test/?x=1")]
#[case::port("https://a.test:443/x", "https://A.test/x")]
fn one_target_in_two_notations_is_equal(#[case] one: &str, #[case] other: &str) {
    assert_eq!(Target::parse(one).unwrap(), Target::parse(other).unwrap());
}

#[rstest]
#[case::tool(Channel::Tool, "https://tools.world.test/mcp", Ok(false))]
#[case::model(Channel::Model, "https://models.world.test/v1/messages", Ok(true))]
#[case::model_in_the_clear(Channel::Model, "http://models.world.test/v1/messages", Err(Rule::UpstreamCredential))]
#[case::model_in_the_clear_on_this_machine(Channel::Model, "http://here.world.test/v1/messages", Ok(true))]
#[case::direct_in_the_clear_on_this_machine(Channel::Egress, "http://here.world.test/", Err(Rule::EgressDirect))]
#[case::direct_never_gets_a_credential(Channel::Egress, "http://docs.world.test/", Ok(false))]
#[case::direct_below(Channel::Egress, "https://a.docs.world.test/", Ok(false))]
#[case::tool_to_model(Channel::Tool, "https://models.world.test/v1/messages", Err(Rule::EgressHost))]
#[case::direct_to_tool(Channel::Egress, "https://tools.world.test/mcp", Err(Rule::EgressDirect))]
#[case::port(Channel::Tool, "https://tools.world.test:8443/mcp", Err(Rule::EgressPort))]
#[case::unlisted(Channel::Egress, "https://evil.world.test/", Err(Rule::EgressHost))]
fn lists(#[case] channel: Channel, #[case] url: &str, #[case] expected: Result<bool, Rule>) {
    let target = Target::parse(url).unwrap();
    let stays_here = |host: &Hostname| host.as_str() == "here.world.test";
    let found = listed(&compiled(), channel, Destination::Url(&target, &Method::POST), stays_here);
    assert_eq!(found.map(|credential| credential.is_some()).map_err(|e| e.rule), expected);
}

fn facts(channel: Channel, target: &str, side_effect: Option<SideEffect>) -> IntentFacts {
    let definition = side_effect.map(|_| testing::DEFINITION.to_owned());
    IntentFacts {
        seq: 1,
        call: "1".into(),
        attempt: 1,
        channel,
        target: target.into(),
        side_effect,
        definition,
        request_commitment: Some(testing::salt().value(&json!({})).unwrap()),
        key: None,
        approvals: vec![],
        model: None,
        reserved: Spent::default(),
        assessment: None,
        policy: "of another pack".into(),
        http: None,
        compensates: None,
        usage: Usage::default(),
        seen: Sensitivity::default(),
        open: true,
        became: None,
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
    Err(Rule::IntentMissing)
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
    Err(Rule::ToolUnknown)
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
#[case::model(Channel::Model, "https://models.world.test/v1/messages", facts(Channel::Model, "/v1/messages", None), Ok(()))]
#[case::model_query_of_its_own(
    Channel::Model,
    "https://models.world.test/v1/messages?beta=true",
    facts(Channel::Model, "/v1/messages", None),
    Err(Rule::ModelEndpoint)
)]
#[case::model_query_in_intent(Channel::Model, "https://models.world.test/v1/messages?beta=true", facts(Channel::Model, "/v1/messages?beta=true", None), Ok(()))]
#[case::models(
    Channel::Model,
    "https://models.world.test/v1/models?limit=2",
    facts(Channel::Model, "/v1/models?limit=2", None),
    Err(Rule::IntentMissing)
)]
#[case::model_embeddings(Channel::Model, "https://models.world.test/v1/embeddings", facts(Channel::Model, "/v1/embeddings", None), Ok(()))]
#[case::model_files_in_intent(
    Channel::Model,
    "https://models.world.test/v1/files",
    facts(Channel::Model, "/v1/files", None),
    Err(Rule::ModelEndpoint)
)]
#[case::model_over(
    Channel::Model,
    "https://models.world.test/v1/messages",
    IntentFacts { open: false, ..facts(Channel::Model, "/v1/messages", None) },
    Err(Rule::IntentMissing)
)]
#[case::direct_over(
    Channel::Egress,
    "https://docs.world.test/",
    IntentFacts { open: false, ..facts(Channel::Egress, "docs.world.test:443", None) },
    Err(Rule::IntentMissing)
)]
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
        intended(&compiled(), 1, channel, Destination::Url(&target, &Method::POST), (&intent, &testing::salt()))
            .map_err(|e| e.rule);
    assert_eq!(found, expected);
}

#[test]
fn a_tunnel_is_for_the_agents_own_traffic() {
    let to = Authority::parse("tools.world.test:443", None).unwrap();
    let tool = facts(Channel::Tool, "write", Some(SideEffect::Write));
    let found = intended(&compiled(), 1, Channel::Tool, Destination::Tunnel(&to), (&tool, &testing::salt()));
    assert_eq!(found.unwrap_err().rule, Rule::EgressDirect);
    let to = Authority::parse("docs.world.test:443", None).unwrap();
    let direct = facts(Channel::Egress, "docs.world.test:443", None);
    assert_eq!(
        intended(&compiled(), 1, Channel::Egress, Destination::Tunnel(&to), (&direct, &testing::salt())),
        Ok(())
    );
}

#[test]
fn a_tunnel_under_an_intent_that_is_over_is_refused() {
    let to = Authority::parse("docs.world.test:443", None).unwrap();
    let over = IntentFacts { open: false, ..facts(Channel::Egress, "docs.world.test:443", None) };
    let found = intended(&compiled(), 1, Channel::Egress, Destination::Tunnel(&to), (&over, &testing::salt()));
    assert_eq!(found.unwrap_err().rule, Rule::IntentMissing);
}

#[rstest]
#[case::post(Method::POST, Ok(()))]
#[case::get(Method::GET, Err(Rule::IntentMissing))]
#[case::delete(Method::DELETE, Err(Rule::IntentMissing))]
#[case::put(Method::PUT, Err(Rule::IntentMissing))]
fn methods_of_models(#[case] method: Method, #[case] expected: Result<(), Rule>) {
    let target = Target::parse("https://models.world.test/v1/messages").unwrap();
    let intent = facts(Channel::Model, "/v1/messages", None);
    let to = Destination::Url(&target, &method);
    let found = intended(&compiled(), 1, Channel::Model, to, (&intent, &testing::salt()));
    assert_eq!(found.map_err(|e| e.rule), expected);
    // Lists of models use GET.
    let target = Target::parse("https://models.world.test/v1/models").unwrap();
    let intent = facts(Channel::Model, "/v1/models", None);
    let to = Destination::Url(&target, &method);
    let found = intended(&compiled(), 1, Channel::Model, to, (&intent, &testing::salt()));
    assert_eq!(found.is_ok(), method == Method::GET);
}

#[rstest]
#[case::model(Channel::Model, b"prompt", Ok(()))]
#[case::direct(Channel::Egress, b"prompt", Ok(()))]
#[case::longer(Channel::Model, b"prompt ", Err(Rule::IntentMissing))]
#[case::none(Channel::Egress, b"", Err(Rule::IntentMissing))]
#[case::end_of_a_session(Channel::Listing, b"", Ok(()))]
#[case::end_with_a_body(Channel::Listing, b"prompt", Err(Rule::IntentMissing))]
fn a_body_is_that_of_the_intent(#[case] channel: Channel, #[case] body: &[u8], #[case] expected: Result<(), Rule>) {
    let digest = testing::salt().bytes(b"prompt");
    let intent = IntentFacts { request_commitment: Some(digest), ..facts(channel, "any", None) };
    assert_eq!(is_intended(channel, &intent, &testing::salt(), body).map_err(|e| e.rule), expected);
    let without = IntentFacts { request_commitment: None, ..intent };
    if channel != Channel::Listing {
        assert!(is_intended(channel, &without, &testing::salt(), body).is_err(), "an intent for no body");
    }
}

#[test]
fn a_tool_that_the_class_forbids_now_is_refused() {
    let mut compiled = compiled();
    compiled.policy.allowed_effects = vec![SideEffect::Read];
    let target = Target::parse("https://tools.world.test/mcp").unwrap();
    let intent = facts(Channel::Tool, "write", Some(SideEffect::Write));
    let found =
        intended(&compiled, 1, Channel::Tool, Destination::Url(&target, &Method::POST), (&intent, &testing::salt()));
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
    let found = intended(
        &compiled(),
        1,
        channel,
        Destination::Url(&target, &method),
        (&facts(channel, "write", effect), &testing::salt()),
    );
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
        intended(&compiled, 1, Channel::Tool, to, (&intent, &testing::salt())).map_err(|e| e.rule)
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
#[case::other_case(
    Channel::Tool,
    r#"{"id":1,"method":"tools/call","params":{"name":"write","arguments":{},"Arguments":{"a":1}}}"#,
    Err(Rule::Request)
)]
#[case::more_beside(
    Channel::Tool,
    r#"{"id":1,"method":"tools/call","params":{"name":"write"},"Params":{"name":"drop"}}"#,
    Err(Rule::Request)
)]
#[case::marked(Channel::Tool, r#"{"id":1,"method":"tools/call","params":{"name":"write","_meta":{"x":1}}}"#, Ok(()))]
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
    let found =
        parse_mcp_message(&compiled(), channel, (&facts(channel, "write", None), &testing::salt()), body.as_bytes());
    assert_eq!(found.as_ref().map(|_| ()).map_err(|e| e.rule), expected);
    let arguments = found.ok().flatten();
    assert_eq!(arguments, (expected.is_ok() && channel == Channel::Tool).then(|| json!({})));
}

/// Compiles the policy with a change.
fn with(change: impl FnOnce(&mut PolicyConfig)) -> Compiled {
    let mut policy = testing::policy();
    change(&mut policy);
    by(policy, vec![])
}

fn http() -> HttpUpstream {
    HttpUpstream { method: HttpMethod::Post, url: "https://tools.world.test/t/{id}".into(), query: vec!["q".into()] }
}

fn over_http(tool: &mut Tool) {
    tool.upstream = Upstream::Http(http());
}

/// Returns an intent to call `write` with these arguments.
fn to_write(arguments: &Value) -> IntentFacts {
    let digest = testing::salt().value(arguments).unwrap();
    let facts = facts(Channel::Tool, "write", Some(SideEffect::Write));
    IntentFacts { definition: None, request_commitment: Some(digest), http: Some(http().into()), ..facts }
}

#[rstest]
#[case::it(json!({"id": 7, "q": "x y", "text": "a"}), 1, true, Ok(("/t/7?q=x%20y", r#"{"text":"a"}"#)))]
#[case::no_query(json!({"id": "a&b"}), 1, true, Ok(("/t/a%26b", "{}")))]
#[case::two_segments(json!({"id": "a/b"}), 1, true, Err(Rule::ToolUrl))]
#[case::two_segments_decoded_twice(json!({"id": "a%252fb"}), 1, true, Err(Rule::ToolUrl))]
#[case::dots(json!({"id": ".."}), 1, true, Err(Rule::ToolUrl))]
#[case::missing(json!({"q": "x"}), 1, true, Err(Rule::ToolUrl))]
#[case::no_object(json!([7]), 1, true, Err(Rule::Request))]
#[case::over(json!({"id": 7}), 1, false, Err(Rule::IntentMissing))]
#[case::other_attempt(json!({"id": 7}), 2, true, Err(Rule::IntentMissing))]
fn an_http_tools_request_is_made_of_its_arguments(
    #[case] arguments: Value,
    #[case] attempt: i64,
    #[case] open: bool,
    #[case] expected: Result<(&str, &str), Rule>,
) {
    let compiled = with(|policy| over_http(&mut policy.tools[1]));
    let intent = IntentFacts { open, ..to_write(&arguments) };
    let found = request(&compiled, attempt, &intent, &arguments);
    let found = found.map(|(target, request)| {
        assert_eq!((target.secure, target.authority.to_string()), (true, "tools.world.test:443".to_owned()));
        assert_eq!(
            (request.method(), request.headers()[ACCEPT_ENCODING].as_bytes()),
            (&Method::POST, &b"identity"[..])
        );
        assert!(!request.headers().contains_key("authorization"));
        (target.path.to_string(), String::from_utf8(request.into_body().to_vec()).unwrap())
    });
    assert_eq!(found.map_err(|e| e.rule), expected.map(|(path, body)| (path.to_owned(), body.to_owned())));
}

#[test]
fn an_http_tool_is_called_in_no_other_way_and_nothing_else_in_this() {
    let compiled = with(|policy| over_http(&mut policy.tools[1]));
    let intent = to_write(&json!({"id": 7}));
    let target = Target::parse("https://tools.world.test/t/7").unwrap();
    let found =
        intended(&compiled, 1, Channel::Tool, Destination::Url(&target, &Method::POST), (&intent, &testing::salt()));
    assert_eq!(found.unwrap_err().rule, Rule::IntentMissing, "a request that the harness made");
    assert!(!is_message(&compiled, Channel::Tool, &Method::POST, &intent), "its body is no JSON-RPC");
    let listed = IntentFacts { definition: Some("0d".repeat(32)), ..intent.clone() };
    assert_eq!(request(&compiled, 1, &listed, &json!({"id": 7})).unwrap_err().rule, Rule::ToolChanged);
    let elsewhere = IntentFacts { http: Some(HttpUpstream { query: vec![], ..http() }.into()), ..intent.clone() };
    assert_eq!(request(&compiled, 1, &elsewhere, &json!({"id": 7})).unwrap_err().rule, Rule::IntentMissing);
    let over_mcp = with(|_| ());
    assert_eq!(request(&over_mcp, 1, &intent, &json!({"id": 7})).unwrap_err().rule, Rule::IntentMissing);
    let model = facts(Channel::Model, "write", None);
    assert_eq!(request(&compiled, 1, &model, &json!({"id": 7})).unwrap_err().rule, Rule::IntentMissing);
}

#[rstest]
#[case::it(r#"{"a":1}"#, Ok(()))]
#[case::spaced(r#"{ "a" : 1.0 }"#, Ok(()))]
#[case::others(r#"{"a":2}"#, Err(Rule::IntentMissing))]
#[case::more(r#"{"a":1,"b":1}"#, Err(Rule::IntentMissing))]
#[case::twice(r#"{"a":2,"a":1}"#, Err(Rule::Request))]
#[case::none("", Err(Rule::Request))]
fn arguments_are_those_of_the_intent(#[case] body: &str, #[case] expected: Result<(), Rule>) {
    let found = arguments(&to_write(&json!({"a": 1})), &testing::salt(), body.as_bytes());
    assert_eq!(found.map(|_| ()).map_err(|e| e.rule), expected);
}

#[test]
fn an_upstream_gets_the_key_of_the_intent() {
    let compiled = with(|policy| {
        over_http(&mut policy.tools[1]);
        policy.tools[1].idempotency =
            Some(Idempotency { argument: None, header: Some("idempotency-key".into()), window_seconds: 60 });
    });
    let intent = IntentFacts { key: Some("k".into()), ..to_write(&json!({"id": 7})) };
    let (_, sent) = request(&compiled, 1, &intent, &json!({"id": 7})).unwrap();
    assert_eq!(sent.headers().get_all("idempotency-key").iter().collect::<Vec<_>>(), ["k"]);
    let without = IntentFacts { key: None, ..intent };
    assert_eq!(request(&compiled, 1, &without, &json!({"id": 7})).unwrap_err().rule, Rule::ToolIdempotency);
}

fn rule(name: &str, decision: RuleDecision, when: Option<&str>) -> AccessRule {
    AccessRule {
        name: name.into(),
        principals: vec![],
        tools: vec![],
        effects: vec![],
        when: when.map(Into::into),
        decision,
        message: None,
    }
}

fn assessment(rules: &[&str]) -> Option<Assessment> {
    Some(Assessment {
        arguments: Sensitivity::default(),
        seen: Sensitivity::default(),
        rules: rules.iter().map(|rule| (*rule).into()).collect(),
        risk: None,
    })
}

fn approval(when: Option<&str>) -> Approval {
    Approval {
        when: when.map(Into::into),
        approvers: Approvers::default(),
        required: 1,
        timeout_seconds: 60,
        on_timeout: OnTimeout::Deny,
        hold_seconds: 0,
    }
}

/// Contract and pack are evaluated again, whatever the harness found.
#[rstest]
#[case::nothing_said(json!({"n": 1}), |_: &mut PolicyConfig| (), None, Ok((false, false)))]
#[case::schema(json!({"n": "x"}), |p: &mut PolicyConfig| p.tools[1].input = json!({"properties": {"n": {"type": "number"}}}), None, Err(Rule::ToolSchema))]
#[case::precondition(json!({"n": 9}), |p: &mut PolicyConfig| p.tools[1].preconditions = vec![condition("args.n < 5")], None, Err(Rule::ToolPrecondition))]
#[case::precondition_over_results(json!({"n": 9}), |p: &mut PolicyConfig| p.tools[1].preconditions = vec![condition("results.x == 5")], None, Ok((false, false)))]
#[case::asked_always(json!({"n": 1}), |p: &mut PolicyConfig| p.tools[1].approval = Some(approval(None)), None, Ok((true, false)))]
#[case::asked_when(json!({"n": 9}), |p: &mut PolicyConfig| p.tools[1].approval = Some(approval(Some("args.n > 5"))), None, Ok((true, false)))]
#[case::not_asked_when(json!({"n": 1}), |p: &mut PolicyConfig| p.tools[1].approval = Some(approval(Some("args.n > 5"))), None, Ok((false, false)))]
#[case::asked_by_what_only_the_harness_knows(json!({}), |p: &mut PolicyConfig| p.tools[1].approval = Some(approval(Some("usage.tokens > 5"))), None, Ok((false, false)))]
#[case::allowed(json!({}), |p: &mut PolicyConfig| p.access.rules = vec![rule("all", RuleDecision::Allow, None)], assessment(&["all"]), Ok((false, false)))]
#[case::denied(json!({"n": 9}), |p: &mut PolicyConfig| p.access.rules = vec![rule("all", RuleDecision::Allow, None), rule("no", RuleDecision::Deny, Some("args.n > 5"))], assessment(&["all"]), Err(Rule::AccessRule))]
#[case::asked_by_pack(json!({}), |p: &mut PolicyConfig| p.access.rules = vec![rule("ask", RuleDecision::RequireApproval, None)], assessment(&["ask"]), Ok((false, true)))]
#[case::not_assessed(json!({}), |p: &mut PolicyConfig| p.access.rules = vec![rule("all", RuleDecision::Allow, None)], None, Err(Rule::AccessRule))]
#[case::assessed_otherwise(json!({"n": 9}), |p: &mut PolicyConfig| p.access.rules = vec![rule("all", RuleDecision::Allow, None), rule("ask", RuleDecision::RequireApproval, Some("args.n > 5"))], assessment(&["all"]), Err(Rule::AccessRule))]
fn contract_and_pack_are_asked_again(
    #[case] arguments: Value,
    #[case] change: fn(&mut PolicyConfig),
    #[case] assessment: Option<Assessment>,
    #[case] expected: Result<(bool, bool), Rule>,
) {
    let compiled = with(change);
    let intent = IntentFacts { assessment, policy: compiled.digest.as_str().into(), ..to_write(&arguments) };
    let found = judge(&compiled, &intent, &arguments).map(|needed| (needed.by_contract, !needed.reasons.is_empty()));
    assert_eq!(found.map_err(|e| e.rule), expected);
}

/// Only fast evaluations run inline.
#[rstest]
#[case::plain(cost::SHORT, |p: &mut PolicyConfig| p.tools[1].preconditions = vec![condition("args.n < 5")], true)]
#[case::long_arguments(cost::SHORT + 1, |_: &mut PolicyConfig| (), false)]
#[case::a_schema_with_a_pattern(9, |p: &mut PolicyConfig| p.tools[1].input = json!({"properties": {"n": {"pattern": "^(a+)+$"}}}), false)]
#[case::a_loop(9, |p: &mut PolicyConfig| p.tools[1].preconditions = vec![condition("args.n.all(x, x > 1)")], false)]
#[case::a_loop_of_the_packs(9, |p: &mut PolicyConfig| p.access.rules = vec![rule("all", RuleDecision::Allow, Some("args.n.all(x, x > 1)"))], false)]
fn only_what_is_quick_is_judged_where_it_is(
    #[case] length: usize,
    #[case] change: fn(&mut PolicyConfig),
    #[case] expected: bool,
) {
    assert_eq!(is_bounded_cost(&with(change), &to_write(&json!({"n": 1})), length), expected);
}

/// The evaluation uses the counters and the data that the log had before the call.
#[test]
fn what_the_log_says_counts() {
    let compiled = with(|policy| {
        let few = rule("few", RuleDecision::Allow, Some("usage.toolCalls < 2 && data.seen == 'Internal'"));
        policy.access.rules = vec![few];
    });
    let found = |tool_calls, seen| {
        let usage = Usage { tool_calls, ..Usage::default() };
        let intent = IntentFacts { usage, seen, ..to_write(&json!({})) };
        judge(&compiled, &intent, &json!({})).map_err(|e| e.rule)
    };
    assert_eq!(found(1, Sensitivity::Internal), Ok(Needed::default()));
    assert_eq!(found(2, Sensitivity::Internal), Err(Rule::AccessRule));
    assert_eq!(found(1, Sensitivity::Restricted), Err(Rule::AccessRule));
}

/// A pack that changed during the attempt decides, whatever the harness found by the former pack.
#[test]
fn the_newest_pack_is_judged_by() {
    let compiled = with(|policy| policy.access.rules = vec![rule("renamed", RuleDecision::Allow, None)]);
    let intent = IntentFacts { assessment: assessment(&["all"]), ..to_write(&json!({})) };
    assert_eq!(judge(&compiled, &intent, &json!({})), Ok(Needed::default()));
    let by_this_one = IntentFacts { policy: compiled.digest.as_str().into(), ..intent };
    assert_eq!(judge(&compiled, &by_this_one, &json!({})).unwrap_err().rule, Rule::AccessRule);
}

#[rstest]
#[case(SideEffect::Read, SideEffect::Read, true, true)]
#[case(SideEffect::Read, SideEffect::Write, true, true)]
#[case(SideEffect::Read, SideEffect::Write, false, false)]
#[case(SideEffect::Read, SideEffect::External, true, false)]
#[case(SideEffect::Write, SideEffect::External, true, false)]
#[case(SideEffect::Write, SideEffect::Read, true, false)]
fn an_effect_is_the_contracts_or_what_a_server_makes_of_it(
    #[case] of: SideEffect,
    #[case] named: SideEffect,
    #[case] over_mcp: bool,
    #[case] expected: bool,
) {
    let compiled = with(|policy| {
        policy.allowed_effects = vec![SideEffect::Read, SideEffect::Write, SideEffect::External];
        policy.tools[1].side_effect = of;
        if !over_mcp {
            over_http(&mut policy.tools[1]);
        }
    });
    let found = resolve_tool(&compiled, 1, &IntentFacts { side_effect: Some(named), ..to_write(&json!({})) });
    assert_eq!(found.map(|_| ()).map_err(|e| e.rule), if expected { Ok(()) } else { Err(Rule::ToolEffect) });
}

fn condition(cel: &str) -> Precondition {
    Precondition { name: "c".into(), cel: cel.into(), message: "no".into() }
}

/// An intent has an idempotency key if and only if its contract has `idempotency`.
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
    let found =
        intended(&compiled, 1, Channel::Tool, Destination::Url(&target, &Method::POST), (&intent, &testing::salt()));
    assert_eq!(found.map_err(|e| e.rule), expected);
}
