//! Rollbacks, over MCP and over HTTP: one task makes the compensations of another task's calls.

use std::collections::BTreeMap;

use belay::{
    evidence::record::Intent,
    policy::{
        approval::Answer,
        config::{Compensation, Rollback, RollbackOf},
    },
};

use super::{approvals::MANY, *};

/// Returns a compensation by `unsay`, with the text of the call that it compensates.
fn by_echo(of: &str) -> Option<Rollback> {
    let said = format!("'undo {of} ' + args.text");
    let arguments = BTreeMap::from([("text".to_owned(), said)]);
    Some(Rollback::Call(Compensation { contract: "unsay".into(), arguments, within_seconds: None }))
}

/// Returns the policy of an agent's task. The compensation of `say` and `tell` is `unsay`, which the agent does not have. `shout` is undone
/// by hand, and the contract of `hum` does not say how to undo it.
fn agents() -> PolicyConfig {
    let change = |name: &str, rollback| Tool { rollback, ..tool(name, over_mcp("echo"), SideEffect::Write) };
    let mut tell = tool("tell", over_http(HttpMethod::Post, "/items", &[]), SideEffect::Write);
    tell.rollback = by_echo("tell");
    let mut policy = policy(MANY);
    policy.tools = vec![
        change("hum", None),
        change("say", by_echo("say")),
        change("shout", Some(Rollback::ByHand("apologise to the neighbours".into()))),
        tell,
        tool("weather", over_mcp("weather"), SideEffect::Read),
    ];
    policy
}

/// Returns the policy of the task that rolls back the agent's task.
fn undoing(upstream: Upstream) -> PolicyConfig {
    let mut policy = policy(MANY);
    policy.task.rollback_of = Some(RollbackOf { name: "t".into(), uid: "the-other".into() });
    policy.tools = vec![tool("unsay", upstream, SideEffect::Write)];
    policy
}

/// Runs an agent's task that has called each of its tools, `say` twice.
async fn ran() -> Harness {
    let harness = harness_of(agents(), vec![]).await;
    for (name, args) in [
        ("say", json!({"text": "one"})),
        ("weather", json!({})),
        ("shout", json!({"text": "two"})),
        ("tell", json!({"text": "three"})),
        ("hum", json!({"text": "four"})),
        ("say", json!({"text": "five"})),
    ] {
        let (error, text) = harness.tool(name, args).await;
        assert!(!error, "{name}: {text}");
    }
    harness.gate.journal().caught_up().await.unwrap();
    harness
}

/// Starts a harness that rolls back what another harness did.
async fn rolling_back(of: Harness, policy: &PolicyConfig, attempt: i64) -> Harness {
    start(of.gateway.clone(), policy, attempt, of.mcp.clone(), of.api.clone()).await
}

fn names(of: &Value) -> Vec<(&str, &str)> {
    let left = of["left"].as_array().unwrap();
    left.iter().map(|left| (left["tool"].as_str().unwrap(), left["why"].as_str().unwrap())).collect()
}

fn undone(records: &[Record]) -> Vec<String> {
    let compensates = |record: &Record| match &record.event {
        Event::Intent(Intent { compensates, .. }) => compensates.clone(),
        _ => None,
    };
    records.iter().filter_map(compensates).collect()
}

#[rstest::rstest]
#[case::mcp(over_mcp("echo"))]
#[case::http(over_http(HttpMethod::Post, "/items", &[]))]
#[tokio::test]
async fn calls_are_undone_newest_first_and_the_rest_is_left_to_people(#[case] upstream: Upstream) {
    let ran = ran().await;
    let policy = undoing(upstream);
    ran.records().await;
    ran.gateway.rolls_back(&policy);
    let before = ran.gateway.saw().len();
    let harness = rolling_back(ran, &policy, 1).await;
    let (status, report) = harness.post("/rollback", Value::Null).await;
    assert_eq!(status, StatusCode::OK, "{report}");
    assert_eq!(report["undone"].as_array().unwrap().len(), 3, "{report}");
    assert_eq!(
        names(&report),
        [("hum", "its contract does not say how"), ("shout", "apologise to the neighbours")],
        "{report}"
    );
    let saw: Vec<_> = harness.gateway.saw().into_iter().skip(before).filter(|sent| sent.contains("undo ")).collect();
    for (sent, text) in saw.iter().zip(["undo say five", "undo tell three", "undo say one"]) {
        assert!(sent.contains(text), "expected {text} in {sent}");
    }
    assert_eq!(saw.len(), 3);

    // A second request makes no call again, and neither does the next attempt.
    let (_, again) = harness.post("/rollback", Value::Null).await;
    assert_eq!(again, report);
    harness.records().await;
    let next = rolling_back(harness, &policy, 2).await;
    let (_, again) = next.post("/rollback", Value::Null).await;
    assert_eq!(again, report);
    assert_eq!(undone(&next.records().await).len(), 3);
}

/// What an agent would try in place of a rollback.
#[tokio::test]
async fn nothing_else_leaves() {
    let ran = ran().await;
    let policy = undoing(over_mcp("echo"));
    ran.records().await;
    ran.gateway.rolls_back(&policy);
    let harness = rolling_back(ran, &policy, 1).await;
    let (error, text) = harness.tool("unsay", json!({"text": "undo say one"})).await;
    assert!(error && text.contains("tool.rollback"), "{text}");
    let (_, model) = harness.post("/v1/chat/completions", json!({"model": "m", "messages": [], "max_tokens": 1})).await;
    assert!(model.to_string().contains("tool.rollback") || model.to_string().contains("budget"), "{model}");
    let records = harness.stored(3).await;
    assert_eq!(denied(&records).first(), Some(&Rule::ToolRollback));
    assert!(undone(&records).is_empty());
}

#[tokio::test]
async fn an_agents_attempt_rolls_nothing_back() {
    let ran = ran().await;
    let (status, text) = ran.post("/rollback", Value::Null).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert!(text.as_str().unwrap().contains("rule: request.malformed"), "{text}");
    // It is denied and recorded like any request for something that does not exist.
    let refused = ran.records().await.iter().filter(|record| record.event.kind() == "call.denied").count();
    assert_eq!(refused, 1);
}

/// If one compensation fails, the others are still made. The next attempt repeats the failed one.
#[tokio::test]
async fn what_fails_is_left_and_tried_again() {
    let ran = ran().await;
    let policy = undoing(over_mcp("echo"));
    ran.records().await;
    ran.gateway.rolls_back(&policy);
    let lost: Vec<_> = ran
        .gateway
        .kept()
        .iter()
        .filter(|(_, text)| text.contains("three"))
        .map(|(d, t)| (d.clone(), t.clone()))
        .collect();
    ran.gateway.kept().retain(|digest, _| lost.iter().all(|(lost, _)| lost != digest));
    let harness = rolling_back(ran, &policy, 1).await;
    let (_, report) = harness.post("/rollback", Value::Null).await;
    assert_eq!(report["undone"].as_array().unwrap().len(), 2, "{report}");
    let reasons = names(&report);
    assert!(reasons.iter().any(|(tool, why)| *tool == "tell" && why.contains("not kept")), "{reasons:?}");
    harness.gateway.kept().extend(lost);
    let next = rolling_back(harness, &policy, 2).await;
    let (_, report) = next.post("/rollback", Value::Null).await;
    assert_eq!(report["undone"].as_array().unwrap().len(), 3, "{report}");
}

#[tokio::test]
async fn kept_arguments_that_were_changed_are_not_sent() {
    let ran = ran().await;
    let policy = undoing(over_mcp("echo"));
    ran.records().await;
    ran.gateway.rolls_back(&policy);
    ran.gateway.kept().values_mut().for_each(|text| *text = text.replace("undo", "burn"));
    let harness = rolling_back(ran, &policy, 1).await;
    let (_, report) = harness.post("/rollback", Value::Null).await;
    assert_eq!(report["undone"].as_array().unwrap().len(), 0, "{report}");
    assert!(harness.gateway.saw().iter().all(|sent| !sent.contains("burn")));
}

/// If the expression of a compensation cannot be evaluated, the call is left for a person to undo. The agent's call itself is not affected.
#[tokio::test]
async fn what_cannot_be_made_is_left_to_people() {
    let mut policy = agents();
    let arguments = BTreeMap::from([("text".to_owned(), "result.nowhere".to_owned())]);
    let call = Compensation { contract: "unsay".into(), arguments, within_seconds: None };
    policy
        .tools
        .iter_mut()
        .filter(|tool| tool.name == "say")
        .for_each(|tool| tool.rollback = Some(Rollback::Call(call.clone())));
    let harness = harness_of(policy, vec![]).await;
    let (error, text) = harness.tool("say", json!({"text": "one"})).await;
    assert!(!error, "{text}");
    harness.gate.journal().caught_up().await.unwrap();
    let kept = harness.gateway.kept().clone();
    assert!(kept.is_empty(), "{kept:?}");
    let policy = undoing(over_mcp("echo"));
    harness.records().await;
    harness.gateway.rolls_back(&policy);
    let harness = rolling_back(harness, &policy, 1).await;
    let (_, report) = harness.post("/rollback", Value::Null).await;
    assert_eq!(names(&report), [("say", "the arguments that undo it could not be made or kept")]);
}

/// A call that the upstream answered with an error may have taken effect or not. It has no compensation. A compensation with such an answer
/// does not count as made, and is not repeated.
#[tokio::test]
async fn an_error_is_neither_undone_nor_does_it_undo() {
    let mut policy = agents();
    let fails = tool("fails", over_mcp("test_error_handling"), SideEffect::Write);
    let arguments = BTreeMap::from([("text".to_owned(), "'undo'".to_owned())]);
    let call = Compensation { contract: "unsay".into(), arguments, within_seconds: None };
    policy.tools.insert(0, Tool { rollback: Some(Rollback::Call(call)), ..fails });
    let harness = harness_of(policy, vec![]).await;
    let (error, text) = harness.tool("fails", json!({})).await;
    assert!(error && !text.contains("Belay denied"), "{text}");
    assert!(harness.gateway.kept().is_empty());

    let ran = ran().await;
    let policy = undoing(over_mcp("test_error_handling"));
    ran.records().await;
    ran.gateway.rolls_back(&policy);
    let harness = rolling_back(ran, &policy, 1).await;
    let (_, report) = harness.post("/rollback", Value::Null).await;
    assert_eq!(report["undone"], json!([]), "{report}");
    let reasons = names(&report);
    assert!(reasons.iter().any(|(tool, why)| *tool == "say" && why.contains("answered with an error")), "{reasons:?}");
    let next = rolling_back(harness, &policy, 2).await;
    let (_, report) = next.post("/rollback", Value::Null).await;
    assert!(names(&report).iter().any(|(_, why)| why.contains("whether it was undone is not known")), "{report}");
    assert_eq!(undone(&next.records().await).len(), 3, "nothing is called again");
}

/// The arguments of a compensation can also depend on the result of the call.
#[tokio::test]
async fn what_was_answered_is_undone() {
    let mut policy = agents();
    let arguments = BTreeMap::from([("text".to_owned(), "'undo ' + result.id".to_owned())]);
    let call = Compensation { contract: "unsay".into(), arguments, within_seconds: None };
    let change = tool("change", over_mcp("weather"), SideEffect::Write);
    policy.tools.push(Tool { rollback: Some(Rollback::Call(call)), ..change });
    policy.tools.sort_by(|one, other| one.name.cmp(&other.name));
    let harness = harness_of(policy, vec![]).await;
    let (error, text) = harness.tool("change", json!({"is": {"id": "INC-7"}})).await;
    assert!(!error, "{text}");
    let kept: Vec<_> = harness.gateway.kept().values().cloned().collect();
    assert_eq!(kept, [r#"{"text":"undo INC-7"}"#]);
}

/// A compensation can need approval, as any other call can.
#[tokio::test]
async fn what_undoes_may_need_approval() {
    let ran = ran().await;
    let mut policy = undoing(over_mcp("echo"));
    policy.tools[0].approval = Some(super::approvals::approval_held(0));
    ran.records().await;
    ran.gateway.rolls_back(&policy);
    let harness = rolling_back(ran, &policy, 1).await;
    let gateway = harness.gateway.clone();
    let people = tokio::spawn(async move {
        let mut decided = std::collections::BTreeSet::new();
        while decided.len() < 3 {
            for request in gateway.requests() {
                let name = kube::ResourceExt::name_any(&request);
                if decided.insert(name.clone()) {
                    gateway.decide(&name, "bob", if decided.len() == 2 { Answer::Deny } else { Answer::Approve });
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let (_, report) = harness.post("/rollback", Value::Null).await;
    people.await.unwrap();
    assert_eq!(report["undone"].as_array().unwrap().len(), 2, "{report}");
    assert!(names(&report).iter().any(|(tool, why)| *tool == "tell" && why.contains("tool.approval")), "{report}");
}
