use super::*;
use crate::{
    cli::terminal::hidden,
    evidence::record::Containment,
    policy::rule::Rule,
    verify::tests::script::{Script, contained, denied, outcome, record},
};

fn view() -> View {
    View { zone: TimeZone::UTC, ..View::new("team-a", "tidy", Paint::none()) }
}

fn task(status: serde_json::Value) -> AgentTask {
    serde_json::from_value(serde_json::json!({
        "apiVersion": "belay.dev/v1alpha1",
        "kind": "AgentTask",
        "metadata": {"name": "tidy", "namespace": "team-a"},
        "spec": {
            "objective": "Tidy up\u{1b}[2J.",
            "workflowClass": "support",
            "principal": "jane@example.com",
            "agent": {"image": "localhost/agent:dev"},
            "limits": {"wallTimeSeconds": 600, "toolCalls": 4, "tokens": 1000}
        },
        "status": status
    }))
    .unwrap()
}

/// The lines without their times.
fn lines(view: &mut View) -> Vec<String> {
    view.take_lines()
        .into_iter()
        .map(|l| l.split_once("  ").map_or(l.clone(), |(_, text)| text.trim_end().to_owned()))
        .collect()
}

#[test]
fn a_task_from_start_to_end() {
    let mut view = view();
    view.task(&task(serde_json::json!({"phase": "Pending"})));
    view.task(&task(serde_json::json!({"phase": "Running", "attempt": 1})));
    view.task(&task(serde_json::json!({"phase": "Running", "attempt": 1})));
    let script = Script::good();
    for record in script.segments.iter().flatten().filter(|r| r.attempt == 1) {
        view.record(1, record);
    }
    view.task(&task(serde_json::json!({
        "phase": "Running", "attempt": 2,
        "attempts": [{"number": 1, "pod": "tidy-1", "podUid": "u", "finishedAt": "2026-11-23T10:00:09Z", "failureClass": "Infrastructure", "reason": "PodDeleted"}]
    })));
    for record in script.segments.iter().flatten().filter(|r| r.attempt == 2) {
        view.record(2, record);
    }
    view.task(&task(serde_json::json!({
        "phase": "Succeeded", "reason": "Completed", "attempt": 2,
        "attempts": [{"number": 1, "pod": "tidy-1", "podUid": "u", "finishedAt": "2026-11-23T10:00:09Z", "failureClass": "Infrastructure", "reason": "PodDeleted"}],
        "evidence": {"origin": "belay.dev/task/u", "location": "s3://evidence/team-a/tidy/u/", "size": 13, "root": "AA=="}
    })));
    view.finish();
    let shown = view.take_lines().into_iter().map(|l| l.trim_end().to_owned() + "\n").collect::<String>();
    // Lines about the status have the time of this test.
    let shown = shown
        .lines()
        .map(|l| if l.contains('●') { format!("NOW       {}", &l[10..]) } else { l.to_owned() })
        .collect::<Vec<_>>()
        .join("\n");
    insta::assert_snapshot!(shown, @r#"
    team-a/tidy  class support, on behalf of jane@example.com
    “Tidy up\u{1b}[2J.”
    NOW       ● Pending
    NOW       ● Running
    10:00:00  ▶ attempt 1 tidy-1 on node-1 in gvisor
    10:00:00    contained: 1 address silent, the gateway answers, 3 rounds
    10:00:00  ✓ tool    search                       read  passed tool.unknown, tool.schema
    10:00:00  ✓ model   /v1/chat/completions          passed tool.unknown, tool.schema, 300 tokens reserved
    10:00:00  ↳ tool    search                       applied 200 in 0 ms, 640 B
    10:00:00  ✗ egress  evil.world.test:443          egress.host  expected a host of the class's list, found another
    10:00:00  ↳ model   /v1/chat/completions         applied 200 in 0 ms, 640 B, 120 tokens
    10:00:00  ✓ tool    write                        write  passed tool.unknown, tool.schema
    10:00:09  ■ attempt 1 failed: PodDeleted (Infrastructure)
    10:00:00  ▶ attempt 2 tidy-2 on node-1 in gvisor
    10:00:00    contained: 1 address silent, the gateway answers, 3 rounds
    10:00:00  ✓ tool    write                        write  passed tool.unknown, tool.schema
    10:00:00  ↳ tool    write                        applied 200 in 0 ms, 640 B
    10:00:00    contained still: 1 address silent
    10:00:00  ■ attempt 2 closed: agentEnded
    NOW       ● Succeeded (Completed)  attempts 2, tool calls 3/4, tokens 120/1000, denied 1
               evidence in s3://evidence/team-a/tidy/u/; check it: belay verify tidy -n team-a
    "#);
}

#[test]
fn the_panel_fits_and_ends_with_the_task() {
    let mut view = view();
    assert!(view.panel(80).is_empty(), "nothing is known yet");
    view.task(&task(serde_json::json!({"phase": "Running", "attempt": 1})));
    for record in Script::good().segments.iter().flatten().take(7) {
        view.record(1, record);
    }
    view.attempt_started = None;
    insta::assert_snapshot!(view.panel(80).join("\n"), @r#"
    ────────────────────────────────────────────────────────────────
    Running, attempt 1, 1 denied, 1 under way
    tool calls  ████████████░░░░░░░░░░░░ 2/4
    tokens      ███░░░░░░░░░░░░░░░░░░░░░ 120/1000
    wall time   ░░░░░░░░░░░░░░░░░░░░░░░░ 0/600 s
    "#);
    for width in 0..100 {
        assert!(
            view.panel(width).iter().all(|l| l.chars().count() <= width.max(1)),
            "{width}: {:?}",
            view.panel(width)
        );
    }
    view.task(&task(serde_json::json!({"phase": "Failed", "attempt": 1})));
    assert!(view.panel(80).is_empty());
}

#[test]
fn bars_are_full_at_the_limit_and_beyond() {
    let view = view();
    assert_eq!(view.bar(0, 4).matches('█').count(), 0);
    assert_eq!(view.bar(2, 4).matches('█').count(), BAR / 2);
    for (used, limit) in [(4, 4), (9, 4), (0, 0), (1, 0)] {
        assert_eq!(view.bar(used, limit).matches('█').count(), BAR, "{used}/{limit}");
    }
    assert_eq!(view.bar(-3, 4).matches('█').count(), 0);
}

#[test]
fn nothing_from_outside_reaches_the_terminal_as_it_is() {
    let hostile = "x\u{1b}]0;owned\u{7}\r\u{9b}2J\u{202e}\n";
    let mut view = view();
    let mut bad = task(serde_json::json!({
        "phase": "Running", "reason": hostile, "attempt": 1,
        "conditions": [{"type": hostile, "status": "False", "reason": hostile, "message": hostile, "lastTransitionTime": "2026-11-23T10:00:00Z"}],
        "attempts": [{"number": 1, "pod": hostile, "podUid": "u", "finishedAt": "2026-11-23T10:00:09Z", "reason": hostile}],
        "evidence": {"origin": hostile, "location": hostile, "size": 13, "root": hostile}
    }));
    bad.spec.objective = hostile.to_owned();
    bad.spec.principal = hostile.to_owned();
    bad.spec.workflow_class = hostile.to_owned();
    view.task(&bad);
    view.notice(hostile);
    let mut all = vec![
        denied(hostile),
        outcome(hostile, 1),
        Event::ContainmentChecked(Containment { contained: false, breaches: vec![hostile.into()], ..contained() }),
    ];
    if let Event::Denied(denied) = &mut all[0] {
        denied.reason = hostile.to_owned();
        denied.rule = Rule::EgressHost;
    }
    for mut record in Script::good().segments.into_iter().flatten() {
        match &mut record.event {
            Event::AttemptOpened(opened) => {
                for text in [&mut opened.pod.name, &mut opened.pod.node, &mut opened.pod.runtime_class] {
                    hostile.clone_into(text);
                }
            }
            Event::Intent(intent) => hostile.clone_into(&mut intent.target),
            Event::AttemptClosed(closed) => hostile.clone_into(&mut closed.reason),
            _ => {}
        }
        view.record(record.attempt, &record);
    }
    for event in all {
        view.record(1, &record(1, event));
    }
    view.finish();
    for line in view.take_lines().iter().chain(&view.panel(80)) {
        assert!(!line.chars().any(hidden), "{line:?}");
    }
}

#[test]
fn a_notice_is_said_once() {
    let mut view = view();
    view.notice("the API server: no");
    view.notice("the API server: no");
    assert_eq!(lines(&mut view), ["  … the API server: no"]);
}

/// The line of an outcome says why a call was not made, and says of a provider's error that it is the provider's.
#[test]
fn an_outcome_says_why() {
    use crate::verify::tests::script::intent;
    let mut view = view();
    for record in Script::good().segments.iter().flatten().take(1) {
        view.record(1, record);
    }
    let failed = |rule, status| {
        let Event::Outcome(one) = outcome("c-9", 0) else { panic!() };
        Event::Outcome(Outcome { outcome: CallOutcome::NotApplied, rule, status, ..one })
    };
    let asked = || {
        let Event::Intent(one) = intent("c-9", Channel::Model, "/v1/chat/completions", 100) else { panic!() };
        Event::Intent(Intent { model: Some("gpt-4o\u{1b}[2J".to_owned()), ..one })
    };
    view.take_lines();
    view.record(1, &record(1, asked()));
    view.unmade("c-9", "cannot connect to models.test at 127.0.0.1:1: refused\u{1b}[2J\n".to_owned());
    view.record(1, &record(1, failed(Some(Rule::UpstreamConnect), 0)));
    let said = view.take_lines().join("\n");
    assert!(
        said.contains("upstream.connect") && said.contains("\n             cannot connect to models.test"),
        "{said}"
    );
    assert!(!said.chars().any(|c| c != '\n' && hidden(c)), "{said:?}");

    view.record(1, &record(1, asked()));
    view.record(1, &record(1, failed(None, 404)));
    let said = view.take_lines().join("\n");
    for word in ["404 is the provider's own answer for model gpt-4o", " by ", "198.51.100.20:443", "passed it on"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert!(!said.chars().any(|c| c != '\n' && hidden(c)), "{said:?}");
    // A call that worked needs no reason.
    view.record(1, &record(1, asked()));
    view.record(1, &record(1, outcome("c-9", 5)));
    assert!(!view.take_lines().join("\n").contains("provider"));
}

#[test]
fn what_is_said_to_tools_is_not_said_to_people_again() {
    let mut view = view();
    let condition = |kind: &str, reason: &str| serde_json::json!({"type": kind, "status": "False", "reason": reason, "message": format!("why {kind}"), "lastTransitionTime": "2026-11-23T10:00:00Z"});
    let conditions = [condition("Ready", "Parked"), condition("Complete", "Parked"), condition("Stalled", "Invalid")];
    view.task(&task(serde_json::json!({"phase": "Parked", "conditions": conditions})));
    let shown = view.take_lines().join("\n");
    assert!(shown.contains("Complete is False: why Complete"), "{shown}");
    assert!(!shown.contains("Ready is") && !shown.contains("Stalled is"), "{shown}");
}
