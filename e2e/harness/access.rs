//! The pack's access rules: principals, data and risk, over MCP and over HTTP, through a real client. The harness evaluates each call, and
//! the gateway's own steps evaluate it again.

use belay::{
    evidence::record::Intent,
    policy::{
        access::{Assessment, Score},
        approval::{Answer, ApprovalSource},
        config::{Access, AccessRule, DataClass, DataPattern, Risk, RiskTerm, RuleDecision, Sensitivity},
    },
};
use kube::ResourceExt;

use super::*;

fn rule(name: &str, decision: RuleDecision) -> AccessRule {
    AccessRule {
        name: name.into(),
        principals: vec![],
        tools: vec![],
        effects: vec![],
        when: None,
        decision,
        message: None,
    }
}

/// Returns tools over MCP and over HTTP: one writes, one returns confidential data, and one needs approval. All of them redact the argument
/// `card`.
fn tools() -> Vec<Tool> {
    let secret = DataClass { result: Sensitivity::Confidential, ..DataClass::default() };
    let kinds = [
        ("write", SideEffect::Write, DataClass::default(), false),
        ("records", SideEffect::Read, secret, false),
        ("twice", SideEffect::Write, DataClass::default(), true),
    ];
    let both = kinds.into_iter().flat_map(|(name, effect, data, asks)| {
        let mcp = tool(&format!("mcp.{name}"), over_mcp("echo"), effect);
        let http = tool(&format!("http.{name}"), over_http(HttpMethod::Post, "/items", &[]), effect);
        let approval = asks.then(|| approvals::approval_held(20));
        [mcp, http].map(|tool| Tool { data, redact: vec!["/card".into()], approval: approval.clone(), ..tool })
    });
    both.collect()
}

/// Returns the access rules of a pack that allows every call, denies the text `forbidden`, requires approval for the text `asked`, and has
/// a risk score that depends on the data that the task has seen.
fn access() -> Access {
    let when = |rule: AccessRule, when: &str| AccessRule { when: Some(when.into()), ..rule };
    let forbidden = AccessRule {
        message: Some("say something else".into()),
        ..when(rule("forbidden", RuleDecision::Deny), "args.text == 'forbidden'")
    };
    let others = AccessRule { principals: vec!["somebody-else".into()], ..rule("others", RuleDecision::Deny) };
    let term = |name: &str, when: &str, points| RiskTerm { name: name.into(), when: when.into(), points };
    Access {
        classification: vec![DataPattern {
            name: "card".into(),
            pattern: r"\b\d{16}\b".into(),
            sensitivity: Sensitivity::Restricted,
        }],
        rules: vec![
            rule("all", RuleDecision::Allow),
            forbidden,
            others,
            when(rule("asked", RuleDecision::RequireApproval), "args.text == 'asked'"),
        ],
        risk: Some(Risk {
            terms: vec![
                term("change", "effect != 'read'", 10),
                term("secrets-seen", "data.seen == 'Confidential'", 20),
                term("card", "data.arguments == 'Restricted'", 60),
            ],
            approve_at: Some(30),
            deny_at: Some(80),
        }),
        approval: Some(approvals::approval_held(20)),
    }
}

fn guarded() -> PolicyConfig {
    let mut policy = policy(Limits {
        wall_time_seconds: 60,
        tool_calls: 20,
        tokens: 0,
        denials: None,
        cost_micros: None,
        approval_wait_seconds: 600,
    });
    policy.task.requester = Some("ci".into());
    (policy.tools, policy.access) = (tools(), access());
    policy
}

async fn guarded_harness() -> Harness {
    harness_of(guarded(), vec![]).await
}

fn made(records: &[Record]) -> Vec<Intent> {
    let tool = belay::evidence::record::Channel::Tool;
    records
        .iter()
        .filter_map(|record| match &record.event {
            Event::Intent(intent) if intent.channel == tool => Some(intent.clone()),
            _ => None,
        })
        .collect()
}

#[rstest::rstest]
#[case::mcp("mcp.write")]
#[case::http("http.write")]
#[tokio::test]
async fn a_call_that_passes_leaves_with_what_was_found_of_it(#[case] name: &str) {
    let harness = guarded_harness().await;
    let (error, text) = harness.tool(name, json!({"text": "hello"})).await;
    assert!(!error, "{text}");
    let intent = made(&harness.records().await).remove(0);
    let expected = Assessment {
        arguments: Sensitivity::Unclassified,
        seen: Sensitivity::Unclassified,
        rules: vec!["all".into()],
        risk: Some(Score { score: 10, terms: vec!["change".into()] }),
    };
    assert_eq!(intent.assessment, Some(expected));
    for rule in [Rule::AccessRule, Rule::RiskScore, Rule::ToolApproval] {
        assert!(intent.rules.contains(&rule), "{:?}", intent.rules);
    }
}

#[rstest::rstest]
#[case::mcp_rule("mcp.write", json!({"text": "forbidden"}), Rule::AccessRule, "rule forbidden of PolicyPack k: say something else")]
#[case::http_rule("http.write", json!({"text": "forbidden"}), Rule::AccessRule, "rule forbidden of PolicyPack k: say something else")]
#[tokio::test]
async fn a_rule_that_denies_is_named(#[case] name: &str, #[case] args: Value, #[case] rule: Rule, #[case] words: &str) {
    let harness = guarded_harness().await;
    let (error, text) = harness.tool(name, args).await;
    assert!(error && text.contains(rule.as_str()) && text.contains(words), "{text}");
    assert_eq!(denied(&harness.records().await), [rule]);
    assert!(made(&harness.records().await).is_empty());
}

#[tokio::test]
async fn a_principal_without_a_rule_calls_nothing() {
    let mut policy = guarded();
    policy.access.rules[0].principals = vec!["somebody-else".into()];
    policy.access.rules[3].principals = vec!["somebody-else".into()];
    let harness = harness_of(policy, vec![]).await;
    for name in ["mcp.write", "http.write"] {
        let (error, text) = harness.tool(name, json!({"text": "hello"})).await;
        assert!(error && text.contains("access.rule") && text.contains("allows p to call"), "{text}");
    }
}

/// The result of one tool raises the risk score of the next call, whichever of the two goes over MCP and which over HTTP.
#[rstest::rstest]
#[case("mcp.records", "http.write")]
#[case("http.records", "mcp.write")]
#[tokio::test]
async fn data_that_was_seen_makes_a_change_need_a_person(#[case] reads: &str, #[case] writes: &str) {
    let harness = guarded_harness().await;
    let (error, text) = harness.tool(writes, json!({"text": "before"})).await;
    assert!(!error, "nothing was seen yet: {text}");
    assert!(!harness.tool(reads, json!({"text": "x"})).await.0);
    let approve = async {
        let asked = harness.undecided_within(1, Duration::from_secs(4)).await;
        harness.gateway.decide(&asked[0], "ana", Answer::Approve);
    };
    let ((error, text), ()) = tokio::join!(harness.tool(writes, json!({"text": "after"})), approve);
    assert!(!error, "{text}");
    let request = harness.gateway.requests().remove(0);
    assert_eq!(request.spec.requested_by, ApprovalSource::Pack);
    assert_eq!(request.spec.reasons, ["risk 30 (change 10 + secrets-seen 20)"]);
    let records = harness.records().await;
    let intents = made(&records);
    assert_eq!(intents[2].approvals, [request.name_any()]);
    assert_eq!(intents[2].assessment.as_ref().unwrap().seen, Sensitivity::Confidential);
    let of = records.iter().filter_map(|record| match &record.event {
        Event::Outcome(outcome) if outcome.call == intents[1].call => Some(outcome.sensitivity),
        _ => None,
    });
    assert_eq!(of.collect::<Vec<_>>(), [Sensitivity::Confidential]);
    // A card number in the arguments raises the score beyond `deny_at`.
    let (error, text) = harness.tool(writes, json!({"text": "x", "card": "4111111111111111"})).await;
    assert!(
        error && text.contains("access.risk") && text.contains("90 (change 10 + secrets-seen 20 + card 60)"),
        "{text}"
    );
}

/// Contract and pack both require approval: both requests exist at the same time, and the call needs both approvals.
#[rstest::rstest]
#[case("mcp.twice")]
#[case("http.twice")]
#[tokio::test]
async fn contract_and_pack_are_asked_each_for_itself(#[case] name: &str) {
    let harness = guarded_harness().await;
    let approve = async {
        let asked = harness.undecided_within(2, Duration::from_secs(4)).await;
        for name in &asked {
            assert!(made(&harness.records().await).is_empty());
            harness.gateway.decide(name, "ana", Answer::Approve);
        }
    };
    let ((error, text), ()) = tokio::join!(harness.tool(name, json!({"text": "asked"})), approve);
    assert!(!error, "{text}");
    let requests = harness.gateway.requests();
    let mut by: Vec<_> = requests.iter().map(|request| request.spec.requested_by).collect();
    by.sort();
    assert_eq!(by, [ApprovalSource::Contract, ApprovalSource::Pack]);
    assert_eq!(made(&harness.records().await)[0].approvals.len(), 2);
}

#[rstest::rstest]
#[case("mcp.twice")]
#[case("http.twice")]
#[tokio::test]
async fn one_no_of_two_is_enough(#[case] name: &str) {
    let harness = guarded_harness().await;
    let decide = async {
        harness.undecided_within(2, Duration::from_secs(4)).await;
        for request in harness.gateway.requests() {
            let yes = request.spec.requested_by == ApprovalSource::Contract;
            harness.gateway.decide(&request.name_any(), "ana", if yes { Answer::Approve } else { Answer::Deny });
        }
    };
    let ((error, text), ()) = tokio::join!(harness.tool(name, json!({"text": "asked"})), decide);
    assert!(error && text.contains("tool.approval") && text.contains("ana denied this call"), "{text}");
    assert!(made(&harness.records().await).is_empty());
}

/// Approvers see the arguments except those that the contract redacts. The upstream gets all arguments.
#[rstest::rstest]
#[case("mcp.write")]
#[case("http.write")]
#[tokio::test]
async fn what_is_redacted_is_not_shown_and_is_sent(#[case] name: &str) {
    let harness = guarded_harness().await;
    let approve = async {
        let asked = harness.undecided_within(1, Duration::from_secs(4)).await;
        harness.gateway.decide(&asked[0], "ana", Answer::Approve);
    };
    let args = json!({"text": "pay", "card": "4111111111111111"});
    let ((error, text), ()) = tokio::join!(harness.tool(name, args), approve);
    assert!(!error, "{text}");
    let request = harness.gateway.requests().remove(0);
    assert_eq!(request.spec.arguments, r#"{"card":"[redacted]","text":"pay"}"#);
    assert!(harness.gateway.saw().last().unwrap().contains("4111111111111111"));
    assert!(!serde_json::to_string(&harness.records().await).unwrap().contains("4111111111111111"));
}

/// The pack was tightened, and only the gateway knows it: the gateway denies the call.
#[rstest::rstest]
#[case("mcp.write", Rule::AccessRule)]
#[case("http.write", Rule::AccessRule)]
#[tokio::test]
async fn the_gateway_judges_for_itself(#[case] name: &str, #[case] expected: Rule) {
    let harness = guarded_harness().await;
    let mut tighter = guarded();
    tighter.access.rules.push(rule("freeze", RuleDecision::Deny));
    harness.gateway.goes_by(&tighter);
    let (error, text) = harness.tool(name, json!({"text": "hello"})).await;
    assert!(error && text.contains(expected.as_str()) && text.contains("rule freeze"), "{text}");
    let sent = harness.gateway.saw();
    assert!(!sent.iter().any(|sent| sent.contains("hello")), "{sent:?}");
}

/// The harness of the next attempt knows which data the task has seen.
#[tokio::test]
async fn what_was_seen_outlives_the_harness() {
    let harness = guarded_harness().await;
    assert!(!harness.tool("mcp.records", json!({"text": "x"})).await.0);
    harness.stored(5).await;
    harness.records().await;
    let again = start(harness.gateway.clone(), &guarded(), 2, harness.mcp.clone(), harness.api.clone()).await;
    let ask = again.tool("http.write", json!({"text": "after"}));
    let approve = async {
        let asked = again.undecided_within(1, Duration::from_secs(4)).await;
        again.gateway.decide(&asked[0], "ana", Answer::Approve);
    };
    let ((error, text), ()) = tokio::join!(ask, approve);
    assert!(!error, "{text}");
}
