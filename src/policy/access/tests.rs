use proptest::prelude::*;
use rstest::rstest;
use serde_json::json;

use super::*;
use crate::policy::config::{
    DataClass, DataPattern, Limits, McpUpstream, ModelEndpoints, PackIdentity, Risk, TaskIdentity, ToolLimits, Upstream,
};

fn tool(name: &str, data: DataClass) -> Tool {
    Tool {
        contract: name.into(),
        name: name.into(),
        description: "d".into(),
        upstream: Upstream::Mcp(McpUpstream { url: "https://a.test/mcp".into(), tool: name.into(), digest: None }),
        input: json!({}),
        output: None,
        limits: ToolLimits::default(),
        preconditions: vec![],
        idempotency: None,
        verify: None,
        rollback: None,
        approval: None,
        side_effect: SideEffect::Write,
        data,
        redact: vec![],
    }
}

/// A policy for a task of ana, with a tool `mail` and a tool `records` whose results are confidential.
fn policy(access: Access) -> PolicyConfig {
    let records = DataClass { arguments: Sensitivity::Unclassified, result: Sensitivity::Confidential };
    PolicyConfig {
        task: TaskIdentity {
            namespace: "demo".into(),
            name: "t".into(),
            uid: "u".into(),
            objective: "o".into(),
            workflow_class: "support".into(),
            task_class: None,
            principal: "ana@example.test".into(),
            requester: None,
            image: "i".into(),
            rollback_of: None,
        },
        pack: PackIdentity { name: "prod".into(), uid: "p".into(), environment: "prod".into() },
        limits: Limits {
            wall_time_seconds: 60,
            tool_calls: 4,
            tokens: 100,
            denials: None,
            cost_micros: None,
            approval_wait_seconds: 0,
        },
        allowed_effects: vec![SideEffect::Write],
        tools: vec![tool("mail", DataClass::default()), tool("records", records)],
        models: ModelEndpoints::default(),
        egress: vec![],
        access,
        ignored_hosts: vec![],
        upstream_timeout_seconds: None,
    }
}

fn rule(text: &str) -> AccessRule {
    // The fields are: name, decision, principals, tools, effects, when.
    let mut parts = text.splitn(6, ' ');
    let mut next = || parts.next().unwrap_or("-");
    let list = |part: &str| if part == "-" { vec![] } else { part.split(',').map(str::to_owned).collect() };
    let (name, decision, principals, tools, effects, when) = (next(), next(), next(), next(), next(), next());
    AccessRule {
        name: name.into(),
        principals: list(principals),
        tools: list(tools),
        effects: list(effects).iter().map(|effect| serde_json::from_value(json!(effect)).unwrap()).collect(),
        when: Some(when.to_owned()).filter(|when| when != "-"),
        decision: match decision {
            "allow" => RuleDecision::Allow,
            "ask" => RuleDecision::RequireApproval,
            _ => RuleDecision::Deny,
        },
        message: None,
    }
}

fn rules(rules: &[&str]) -> Access {
    Access { rules: rules.iter().map(|text| rule(text)).collect(), ..Access::default() }
}

struct Now {
    tool: &'static str,
    side_effect: SideEffect,
    calls: i64,
    seen: Sensitivity,
}

const NOW: Now = Now { tool: "mail", side_effect: SideEffect::Write, calls: 0, seen: Sensitivity::Unclassified };

fn asked<'p>(policy: &'p PolicyConfig, now: &Now) -> AccessRequest<'p> {
    let usage = Usage { tool_calls: now.calls, ..Usage::default() };
    AccessRequest { tool: policy.tool(now.tool).unwrap(), side_effect: now.side_effect, usage, seen: now.seen }
}

fn judge(access: Access, now: &Now, arguments: Value) -> Result<AccessDecision, Denial> {
    let policy = policy(access);
    AccessPolicy::compile(&policy).unwrap().judge(asked(&policy, now), &arguments)
}

/// The decision of a pack's rules about a call: pass, ask or deny.
#[rstest]
#[case::no_rules(&[], NOW, "pass")]
#[case::allowed(&["a allow"], NOW, "pass")]
#[case::principal(&["a allow ana@example.test"], NOW, "pass")]
#[case::beginning(&["a allow ana@*"], NOW, "pass")]
#[case::other_principal(&["a allow bob@example.test"], NOW, "deny")]
#[case::longer_principal(&["a allow ana@example.tes"], NOW, "deny")]
#[case::tool(&["a allow - mail"], NOW, "pass")]
#[case::other_tool(&["a allow - records"], NOW, "deny")]
#[case::tools(&["a allow - m*"], NOW, "pass")]
#[case::effect(&["a allow - - write"], NOW, "pass")]
#[case::other_effect(&["a allow - - read,external"], NOW, "deny")]
#[case::tightened_effect(&["a allow - - write"], Now { side_effect: SideEffect::External, ..NOW }, "deny")]
#[case::denied_by_the_contracts_own_effect(&["a allow", "d deny - - write"], Now { side_effect: SideEffect::External, ..NOW }, "deny")]
#[case::condition(&["a allow - - - args.to == 'x'"], NOW, "pass")]
#[case::no_condition(&["a allow - - - args.to == 'y'"], NOW, "deny")]
#[case::odd_allow(&["a allow - - - args.nothing == 'x'"], NOW, "deny")]
#[case::odd_deny(&["a allow", "d deny - - - args.nothing == 'x'"], NOW, "deny")]
#[case::odd_ask(&["a allow", "d ask - - - args.nothing == 'x'"], NOW, "ask")]
#[case::no_yes_or_no(&["a allow", "d deny - - - 'no'"], NOW, "deny")]
#[case::denied(&["a allow", "d deny"], NOW, "deny")]
#[case::denied_before_ask(&["k ask", "d deny"], NOW, "deny")]
#[case::denied_others(&["a allow", "d deny bob*"], NOW, "pass")]
#[case::asked(&["k ask"], NOW, "ask")]
#[case::asked_and_allowed(&["a allow", "k ask"], NOW, "ask")]
#[case::counters(&["a allow - - - usage.toolCalls < 2"], Now { calls: 2, ..NOW }, "deny")]
#[case::seen(&["a allow", "d deny - - - data.seen == 'Confidential'"], Now { seen: Sensitivity::Confidential, ..NOW }, "deny")]
#[case::not_seen(&["a allow", "d deny - - - data.seen == 'Confidential'"], NOW, "pass")]
#[case::names(&["a allow - - - tool == 'mail' && effect == 'write' && task.namespace == 'demo' && principal.startsWith('ana')"], NOW, "pass")]
#[case::no_results(&["a allow - - - results.x == 1"], NOW, "deny")]
fn by_rules(#[case] of: &[&str], #[case] now: Now, #[case] expected: &str) {
    let found = match judge(rules(of), &now, json!({"to": "x"})) {
        Ok(AccessDecision { reasons, .. }) if reasons.is_empty() => "pass",
        Ok(_) => "ask",
        Err(denial) => {
            assert_eq!(denial.rule, Rule::AccessRule);
            "deny"
        }
    };
    assert_eq!(found, expected);
}

/// A risk of 10 points for each of: an external side effect, confidential data seen, a long text. Approval at 20, denial at 30.
fn risky() -> Access {
    let term = |name: &str, when: &str| RiskTerm { name: name.into(), when: when.into(), points: 10 };
    let terms = vec![
        term("external", "effect == 'external'"),
        term("seen", "data.seen in ['Confidential', 'Restricted']"),
        term("long", "size(args.to) > 3"),
    ];
    Access { risk: Some(Risk { terms, approve_at: Some(20), deny_at: Some(30) }), ..Access::default() }
}

#[rstest]
#[case::none(NOW, json!({"to": "x"}), Ok((0, false)))]
#[case::one(NOW, json!({"to": "long"}), Ok((10, false)))]
#[case::two(Now { side_effect: SideEffect::External, ..NOW }, json!({"to": "long"}), Ok((20, true)))]
#[case::three(Now { side_effect: SideEffect::External, seen: Sensitivity::Restricted, ..NOW }, json!({"to": "long"}), Err(()))]
#[case::what_cannot_be_told_counts(NOW, json!({"cc": 1}), Ok((10, false)))]
fn by_risk(#[case] now: Now, #[case] arguments: Value, #[case] expected: Result<(i64, bool), ()>) {
    let found = judge(risky(), &now, arguments);
    let found = found.map(|passed| (passed.assessment.unwrap().risk.unwrap().score, !passed.reasons.is_empty()));
    let found = found.map_err(|denial| {
        assert_eq!(denial.rule, Rule::RiskScore);
        assert!(denial.reason.contains("30 (external 10 + seen 10 + long 10)"), "{}", denial.reason);
    });
    assert_eq!(found, expected);
}

#[test]
fn a_person_is_told_why_he_is_asked() {
    let access = Access { rules: vec![rule("outside ask - - external")], ..risky() };
    let now = Now { side_effect: SideEffect::External, ..NOW };
    let passed = judge(access, &now, json!({"to": "long"})).unwrap();
    assert_eq!(passed.reasons, ["rule outside", "risk 20 (external 10 + long 10)"]);
}

#[test]
fn a_refusal_names_the_rule_and_says_what_it_says() {
    let mut access = rules(&["a allow", "no-mail deny - mail"]);
    access.rules[1].message = Some("mail is for people".into());
    let denial = judge(access, &NOW, json!({"to": "s3cret"})).unwrap_err();
    assert_eq!(denial.reason, "rule no-mail of PolicyPack prod: mail is for people");
}

#[test]
fn data_is_as_sensitive_as_pattern_or_contract_say() {
    let card = DataPattern { name: "card".into(), pattern: r"\d{16}".into(), sensitivity: Sensitivity::Restricted };
    let policy = policy(Access { classification: vec![card], ..Access::default() });
    let guard = AccessPolicy::compile(&policy).unwrap();
    let judged = |arguments| guard.judge(asked(&policy, &NOW), &arguments).unwrap().assessment.unwrap().arguments;
    assert_eq!(judged(json!({"to": "4111111111111111"})), Sensitivity::Restricted);
    assert_eq!(judged(json!({"to": "ana"})), Sensitivity::Unclassified);
    let answered = |tool, result: Value| guard.result(policy.tool(tool).unwrap(), &result);
    assert_eq!(answered("mail", json!("done")), Sensitivity::Unclassified);
    assert_eq!(answered("records", json!("done")), Sensitivity::Confidential);
    assert_eq!(answered("records", json!("4111111111111111")), Sensitivity::Restricted);
}

#[test]
fn where_nobody_says_anything_nothing_is_recorded() {
    let mut policy = policy(Access::default());
    policy.tools.pop();
    let guard = AccessPolicy::compile(&policy).unwrap();
    let passed = guard.judge(asked(&policy, &NOW), &json!({})).unwrap();
    assert_eq!(passed, AccessDecision { assessment: None, reasons: vec![] });
    assert_eq!(guard.replay(asked(&policy, &NOW), None), Ok(passed));
    let made_up = Assessment { arguments: Sensitivity::Internal, seen: NOW.seen, rules: vec![], risk: None };
    assert!(guard.replay(asked(&policy, &NOW), Some(&made_up)).is_err());
}

#[rstest]
#[case(&[], None)]
#[case(&["a allow"], None)]
#[case(&["a ask - mail"], None)]
#[case(&["a allow - - - false"], None)]
#[case(&["a allow - records"], Some("no rule allows"))]
#[case(&["a allow bob"], Some("no rule allows"))]
#[case(&["a allow - - external"], Some("no rule allows"))]
#[case(&["a allow", "d deny ana*"], Some("rule d denies"))]
#[case(&["a allow", "d deny ana* - - args.x"], None)]
fn a_tool_that_can_never_be_called(#[case] of: &[&str], #[case] expected: Option<&str>) {
    let found = always_denied(&rules(of), "ana@example.test", &tool("mail", DataClass::default()));
    assert_eq!(found.is_some(), expected.is_some(), "{found:?}");
    assert!(found.unwrap_or_default().contains(expected.unwrap_or_default()));
}

#[test]
fn a_pack_that_cannot_be_enforced_does_not_compile() {
    assert!(AccessPolicy::compile(&policy(rules(&["a allow - - - args."]))).is_err());
    let mut access = risky();
    access.risk.as_mut().unwrap().terms[0].when = "(".into();
    assert!(AccessPolicy::compile(&policy(access)).is_err());
    let pattern = DataPattern { name: "p".into(), pattern: "(".into(), sensitivity: Sensitivity::Internal };
    assert!(AccessPolicy::compile(&policy(Access { classification: vec![pattern], ..Access::default() })).is_err());
}

/// False assessments in a record that replay detects without the arguments.
#[rstest]
#[case::truth(|_: &mut Assessment| (), true)]
#[case::less_risk(|a: &mut Assessment| a.risk.as_mut().unwrap().score = 0, false)]
#[case::no_risk(|a: &mut Assessment| a.risk = None, false)]
#[case::a_term_less(|a: &mut Assessment| a.risk = Some(Score { score: 10, terms: vec!["long".into()] }), false)]
#[case::a_term_that_is_none(|a: &mut Assessment| a.risk.as_mut().unwrap().terms.push("more".into()), false)]
#[case::no_rule(|a: &mut Assessment| a.rules.clear(), false)]
#[case::another_rule(|a: &mut Assessment| a.rules.push("denied".into()), false)]
#[case::a_rule_for_others(|a: &mut Assessment| a.rules.push("others".into()), false)]
#[case::data_of_a_class_that_nobody_gives(|a: &mut Assessment| a.arguments = Sensitivity::Internal, false)]
#[case::less_seen(|a: &mut Assessment| a.seen = Sensitivity::Unclassified, false)]
fn a_record_is_judged_again(#[case] lie: fn(&mut Assessment), #[case] expected: bool) {
    let mut access = risky();
    access.rules = [
        "all allow",
        "denied deny - - - args.to == 'never'",
        "others allow bob",
        "first ask - - - usage.toolCalls == 0",
    ]
    .map(rule)
    .into();
    let policy = policy(access);
    let guard = AccessPolicy::compile(&policy).unwrap();
    let now = Now { seen: Sensitivity::Confidential, ..NOW };
    let passed = guard.judge(asked(&policy, &now), &json!({"to": "long"})).unwrap();
    let mut recorded = passed.assessment.clone().unwrap();
    assert_eq!(recorded.rules, ["all", "first"]);
    lie(&mut recorded);
    let again = guard.replay(asked(&policy, &now), Some(&recorded));
    assert_eq!(again.is_ok(), expected, "{again:?}");
    assert!(!expected || again == Ok(passed));
    assert!(guard.replay(asked(&policy, &now), None).is_err());
}

proptest! {
    /// Replay reproduces the decision about a call that passes, and an additional `Deny` never lets a call pass.
    #[test]
    fn denying_only_tightens(
        decisions in proptest::collection::vec(0..3_usize, 0..5), to in "[a-d]{0,3}", calls in 0..4_i64, external: bool,
    ) {
        const WHEN: [&str; 4] = ["-", "args.to == 'a'", "usage.toolCalls > 1", "args.x == 1"];
        let of = |(at, decision): (usize, &usize)| {
            rule(&format!("r{at} {} - - - {}", ["allow", "ask", "deny"][*decision], WHEN[at % 4]))
        };
        let access = Access { rules: decisions.iter().enumerate().map(of).collect(), ..risky() };
        let side_effect = if external { SideEffect::External } else { SideEffect::Write };
        let now = Now { side_effect, calls, ..NOW };
        let arguments = json!({"to": to});
        let policy = policy(access.clone());
        let found = AccessPolicy::compile(&policy).unwrap().judge(asked(&policy, &now), &arguments);
        if let Ok(passed) = &found {
            let again = AccessPolicy::compile(&policy).unwrap().replay(asked(&policy, &now), passed.assessment.as_ref());
            prop_assert_eq!(again.as_ref(), Ok(passed));
        }
        let mut tighter = access;
        tighter.rules.push(rule("more deny - - - args.to == 'b'"));
        if judge(tighter, &now, arguments).is_ok() {
            prop_assert!(found.is_ok());
        }
    }
}
