//! What the policy of a log does not allow, written by a liar with all keys: both verifiers say `INVALID`, and the second names the rule of
//! the format that is broken. The stories without a lie are `VALID` to both.

use belay::{
    evidence::{
        log::Log,
        note,
        record::{Approval, CallOutcome, Channel, Event, Intent, Outcome, Record, Replayed},
        rollback::{By, Plan},
    },
    policy::{
        access::Assessment,
        approval::{Answer, ApprovalState},
        config::{PolicyConfig, Sensitivity, SideEffect, Tool, Upstream},
    },
    verify::{Expected, verify},
};
use rstest::rstest;

use crate::{
    forge::{self, Segments},
    rich,
    runs::Story,
    second::Second,
};

fn record(segments: &mut Segments, is: impl Fn(&Event) -> bool) -> &mut Record {
    segments.iter_mut().flatten().find(|record| is(&record.event)).unwrap()
}

fn policy(segments: &mut Segments, change: impl Fn(&mut PolicyConfig)) {
    for record in segments.iter_mut().flatten() {
        if let Event::AttemptOpened(opened) = &mut record.event {
            change(&mut opened.policy);
        }
    }
}

fn tool(segments: &mut Segments, name: &str, change: impl Fn(&mut Tool)) {
    policy(segments, |policy| change(policy.tools.iter_mut().find(|tool| tool.name == name).unwrap()));
}

fn plan(segments: &mut Segments, change: impl Fn(&mut Plan)) {
    for record in segments.iter_mut().flatten() {
        if let Event::AttemptOpened(opened) = &mut record.event {
            change(opened.rollback.as_mut().unwrap());
        }
    }
}

fn intent(segments: &mut Segments, call: &str, change: impl Fn(&mut Intent)) {
    let record = record(segments, |event| matches!(event, Event::Intent(intent) if intent.call == call));
    let Event::Intent(intent) = &mut record.event else { unreachable!() };
    change(intent);
}

fn outcome(segments: &mut Segments, call: &str, change: impl Fn(&mut Outcome)) {
    let record = record(segments, |event| matches!(event, Event::Outcome(outcome) if outcome.call == call));
    let Event::Outcome(outcome) = &mut record.event else { unreachable!() };
    change(outcome);
}

fn assessment(segments: &mut Segments, call: &str, change: impl Fn(&mut Assessment)) {
    intent(segments, call, |intent| change(intent.assessment.as_mut().unwrap()));
}

fn replayed(segments: &mut Segments, change: impl Fn(&mut Replayed)) {
    let record = record(segments, |event| matches!(event, Event::Replayed(_)));
    let Event::Replayed(replayed) = &mut record.event else { unreachable!() };
    change(replayed);
}

/// Changes the decision about an approval request.
fn decided(segments: &mut Segments, name: &str, change: impl Fn(&mut Approval)) {
    let record = record(segments, |event| matches!(event, Event::ApprovalDecided(of) if of.name == name));
    let Event::ApprovalDecided(approval) = &mut record.event else { unreachable!() };
    change(approval);
}

fn without(segments: &mut Segments, is: impl Fn(&Event) -> bool) {
    segments.iter_mut().for_each(|records| records.retain(|record| !is(&record.event)));
}

/// Inserts an event that the story does not have, after the outcome of a call.
fn after(segments: &mut Segments, call: &str, event: Event) {
    let ends = |record: &Record| matches!(&record.event, Event::Outcome(outcome) if outcome.call == call);
    let records = segments.iter_mut().find(|records| records.iter().any(ends)).unwrap();
    let at = records.iter().position(ends).unwrap();
    let record = Record { event, ..records[at].clone() };
    records.insert(at + 1, record);
}

fn judged(story: &Story, segments: Segments) -> (String, String, String) {
    let (log, key): (Log, _) = (story.told(segments, |_| {}), story.witness.verifier());
    let report = verify(&log, &key, &Expected::Anything);
    let (verdict, findings) = Second::start().verdict(&log, &key);
    (report.verdict.to_string(), verdict, format!("{findings}: {:#?}", report.findings))
}

#[rstest]
#[case::a_task(&rich::TASK)]
#[case::a_rollback(&rich::ROLLBACK)]
fn what_a_policy_lets_follow_is_valid_to_both(#[case] story: &Story) {
    let (first, second, findings) = judged(story, story.segments.clone());
    assert_eq!((first.as_str(), second.as_str()), ("VALID", "VALID"), "{findings}");
}

type Lie = fn(&mut Segments);

#[rstest]
#[case::a_cost_beyond_its_limit(8, |s: &mut Segments| policy(s, |p| p.limits.cost_micros = Some(149)))]
#[case::a_call_after_the_last_denial(8, |s: &mut Segments| policy(s, |p| p.limits.denials = Some(3)))]
#[case::no_denials_at_all(8, |s: &mut Segments| policy(s, |p| p.limits.denials = Some(0)))]
#[case::too_many_calls_of_a_tool(8, |s: &mut Segments| tool(s, "pay", |t| t.limits.calls = Some(3)))]
#[case::calls_of_a_tool_below_nothing(8, |s: &mut Segments| tool(s, "find", |t| t.limits.calls = Some(-1)))]
#[case::too_many_bytes(8, |s: &mut Segments| tool(s, "pay", |t| t.limits.request_bytes = Some(119)))]
#[case::another_definition_than_the_pin(9, |s: &mut Segments| intent(s, "f1", |i| i.definition_digest = Some("x".into())))]
#[case::no_definition(9, |s: &mut Segments| intent(s, "n1", |i| i.definition_digest = None))]
#[case::a_definition_of_http(9, |s: &mut Segments| intent(s, "p1", |i| i.definition_digest = Some("x".into())))]
#[case::another_definition_than_before(9, |s: &mut Segments| intent(s, "n2", |i| i.definition_digest = Some("x".into())))]
#[case::an_empty_pin(9, |s: &mut Segments| tool(s, "find", |t| { let Upstream::Mcp(mcp) = &mut t.upstream else { panic!() }; mcp.digest = Some(String::new()); }))]
#[case::cheaper_than_its_price(10, |s: &mut Segments| intent(s, "m1", |i| i.reserved_cost_micros = 99))]
#[case::dearer_than_its_price(10, |s: &mut Segments| intent(s, "m1", |i| i.reserved_cost_micros = 201))]
#[case::by_another_price(10, |s: &mut Segments| policy(s, |p| p.models.prices.reverse()))]
#[case::a_model_without_a_price(10, |s: &mut Segments| intent(s, "m1", |i| i.model = Some("x".into())))]
#[case::a_model_without_a_name(10, |s: &mut Segments| intent(s, "m1", |i| i.model = None))]
#[case::a_tool_that_costs(10, |s: &mut Segments| intent(s, "f1", |i| i.reserved_cost_micros = 1))]
#[case::rounded_down(10, |s: &mut Segments| policy(s, |p| p.models.prices[0].input_micros = 1_500_001))]
#[case::no_key(11, |s: &mut Segments| intent(s, "p1", |i| i.idempotency_key = None))]
#[case::another_key(11, |s: &mut Segments| intent(s, "p1", |i| i.idempotency_key = Some("x".into())))]
#[case::a_key_of_a_tool_without(11, |s: &mut Segments| intent(s, "f1", |i| i.idempotency_key = Some("x".into())))]
#[case::a_key_whose_fate_is_unknown(11, |s: &mut Segments| without(s, |e| matches!(e, Event::Resolved(_))))]
#[case::a_key_in_its_window(11, |s: &mut Segments| tool(s, "note", |t| t.idempotency.as_mut().unwrap().window_seconds = 6000))]
#[case::a_repeat_that_the_upstream_does_not_tell(11, |s: &mut Segments| tool(s, "pay", |t| t.idempotency.as_mut().unwrap().header = None))]
#[case::a_repeat_of_what_applied(11, |s: &mut Segments| outcome(s, "p3", |o| o.outcome = CallOutcome::Applied))]
#[case::another_result_again(12, |s: &mut Segments| replayed(s, |r| r.response_commitment = "0".repeat(64)))]
#[case::other_arguments_again(12, |s: &mut Segments| replayed(s, |r| r.request_commitment = "0".repeat(64)))]
#[case::another_call_again(12, |s: &mut Segments| replayed(s, |r| r.call = "f1".into()))]
#[case::another_key_again(12, |s: &mut Segments| replayed(s, |r| r.idempotency_key = "x".into()))]
#[case::a_result_that_was_withheld(12, |s: &mut Segments| outcome(s, "p1", |o| (o.rule, o.compensation_commitment) = (Some(belay::policy::rule::Rule::ToolOutput), None)))]
#[case::again_after_its_window(12, |s: &mut Segments| tool(s, "pay", |t| t.idempotency.as_mut().unwrap().window_seconds = 1))]
#[case::resolved_by_another_tool(13, |s: &mut Segments| tool(s, "note", |t| t.verify.as_mut().unwrap().tool = "pay".into()))]
#[case::resolved_without_a_read(13, |s: &mut Segments| tool(s, "note", |t| t.verify = None))]
#[case::too_few(14, |s: &mut Segments| decided(s, "c-p1", |a| a.decisions.truncate(2)))]
#[case::one_twice(14, |s: &mut Segments| decided(s, "c-p1", |a| a.decisions[2].by = "ana".into()))]
#[case::the_requester(14, |s: &mut Segments| decided(s, "c-p1", |a| a.decisions[2].by = "ci".into()))]
#[case::a_no(14, |s: &mut Segments| decided(s, "c-p1", |a| a.decisions[0].decision = Answer::Deny))]
#[case::fewer_required(14, |s: &mut Segments| decided(s, "c-p1", |a| a.required = 1))]
#[case::asked_about_another_call(14, |s: &mut Segments| decided(s, "c-p1", |a| a.request_commitment = "0".repeat(64)))]
#[case::of_a_tool_that_needs_none(14, |s: &mut Segments| decided(s, "c-p1", |a| a.tool = "find".into()))]
#[case::expired(14, |s: &mut Segments| decided(s, "c-p1", |a| a.state = ApprovalState::Expired))]
#[case::not_asked_for_the_pack(14, |s: &mut Segments| intent(s, "p1", |i| drop(i.approvals.pop())))]
#[case::not_asked_for_the_contract(14, |s: &mut Segments| intent(s, "p1", |i| drop(i.approvals.remove(0))))]
#[case::an_approval_twice(14, |s: &mut Segments| intent(s, "p4", |i| i.approvals[0] = "c-p3".into()))]
#[case::two_on_one_account(14, |s: &mut Segments| intent(s, "p3", |i| i.approvals.push("c-p2".into())))]
#[case::approvals_of_a_listing(16, |s: &mut Segments| intent(s, "l1", |i| i.approvals = vec!["c-p1".into()]))]
#[case::the_packs_own_risk(14, |s: &mut Segments| policy(s, |p| p.access.risk.as_mut().unwrap().approve_at = Some(0)))]
#[case::a_result_less_than_its_class(15, |s: &mut Segments| outcome(s, "f1", |o| o.sensitivity = Sensitivity::default()))]
#[case::arguments_less_than_their_class(15, |s: &mut Segments| assessment(s, "p1", |a| a.arguments = Sensitivity::Internal))]
#[case::arguments_of_a_class_that_nobody_finds(15, |s: &mut Segments| assessment(s, "n3", |a| a.arguments = Sensitivity::Internal))]
#[case::less_was_seen(15, |s: &mut Segments| assessment(s, "p1", |a| a.seen = Sensitivity::default()))]
#[case::more_was_seen(15, |s: &mut Segments| assessment(s, "f1", |a| a.seen = Sensitivity::Restricted))]
#[case::seen_in_a_reply(15, |s: &mut Segments| outcome(s, "m1", |o| o.sensitivity = Sensitivity::Restricted))]
#[case::a_rule_left_out(16, |s: &mut Segments| assessment(s, "p1", |a| drop(a.rules.pop())))]
#[case::rules_in_another_order(16, |s: &mut Segments| assessment(s, "p1", |a| a.rules.reverse()))]
#[case::a_rule_more(16, |s: &mut Segments| assessment(s, "f1", |a| a.rules.push("asks".into())))]
#[case::a_rule_that_denies(16, |s: &mut Segments| assessment(s, "f1", |a| a.rules.push("never".into())))]
#[case::a_rule_that_denies_all(16, |s: &mut Segments| policy(s, |p| p.access.rules[3].principals.clear()))]
#[case::a_denial_by_the_contracts_own_effect(16, |s: &mut Segments| policy(s, |p| (p.access.rules[3].principals, p.access.rules[3].effects) = (vec![], vec![SideEffect::Read])))]
#[case::no_rule_at_all(16, |s: &mut Segments| policy(s, |p| p.access.rules[0].principals = vec!["jon@*".into()]))]
#[case::another_sum(16, |s: &mut Segments| assessment(s, "p1", |a| a.risk.as_mut().unwrap().score = 9))]
#[case::a_term_that_is_none(16, |s: &mut Segments| assessment(s, "p1", |a| a.risk.as_mut().unwrap().terms.push("x".into())))]
#[case::no_risk(16, |s: &mut Segments| assessment(s, "p1", |a| a.risk = None))]
#[case::a_risk_that_is_denied(16, |s: &mut Segments| policy(s, |p| p.access.risk.as_mut().unwrap().deny_at = Some(10)))]
#[case::no_assessment(16, |s: &mut Segments| intent(s, "f1", |i| i.assessment = None))]
#[case::an_assessment_of_a_model(16, |s: &mut Segments| { let mut of = None; intent_of(s, "f1", &mut of); intent(s, "m1", |i| i.assessment = of.clone()); })]
#[case::undone_where_nothing_is(17, |s: &mut Segments| intent(s, "n3", |i| i.compensates = Some("c9".into())))]
#[case::what_undoes_a_call_that_nothing_undoes(17, |s: &mut Segments| outcome(s, "f1", |o| o.compensation_commitment = Some("0".repeat(64))))]
#[case::what_undoes_a_call_that_did_nothing(17, |s: &mut Segments| outcome(s, "p3", |o| o.compensation_commitment = Some("0".repeat(64))))]
fn what_a_policy_does_not_let_follow_is_invalid_to_both(#[case] rule: u8, #[case] lie: Lie) {
    assert_lie(&rich::TASK, rule, lie);
}

#[rstest]
#[case::other_arguments(|s: &mut Segments| intent(s, "u1", |i| i.request_commitment = Some("0".repeat(64))))]
#[case::another_tool(|s: &mut Segments| plan(s, |p| { let By::Call(undo) = &mut p.steps[0].by else { panic!() }; undo.contract = "pay-v1".into(); }))]
#[case::what_people_are_to_undo(|s: &mut Segments| intent(s, "u1", |i| i.compensates = Some("c8".into())))]
#[case::what_is_in_no_step(|s: &mut Segments| intent(s, "u1", |i| i.compensates = Some("c5".into())))]
#[case::undone_twice(|s: &mut Segments| outcome(s, "u1", |o| o.outcome = CallOutcome::Applied))]
#[case::undone_though_nobody_knows(|s: &mut Segments| without(s, |e| matches!(e, Event::Resolved(_))))]
#[case::late(|s: &mut Segments| plan(s, |p| { let By::Call(undo) = &mut p.steps[0].by else { panic!() }; undo.until = Some("2026-11-18T11:00:00.000Z".into()); }))]
#[case::until_a_time_that_is_none(|s: &mut Segments| plan(s, |p| { let By::Call(undo) = &mut p.steps[0].by else { panic!() }; undo.until = Some("2027-01-01T00:00:00Z".into()); }))]
#[case::a_change_that_undoes_nothing(|s: &mut Segments| intent(s, "u5", |i| i.compensates = None))]
#[case::a_read_that_changes(|s: &mut Segments| intent(s, "f1", |i| i.side_effect = Some(SideEffect::Write)))]
#[case::a_tunnel(|s: &mut Segments| intent(s, "l1", |i| i.channel = Channel::Egress))]
#[case::no_plan(|s: &mut Segments| segments_opened(s, 0, |r| *r = None))]
#[case::no_plan_any_more(|s: &mut Segments| segments_opened(s, 1, |r| *r = None))]
#[case::another_plan(|s: &mut Segments| segments_opened(s, 1, |r| r.as_mut().unwrap().size = 21))]
#[case::a_plan_of_another(|s: &mut Segments| plan(s, |p| p.origin = note::origin("x")))]
#[case::no_rollback_by_its_policy(|s: &mut Segments| policy(s, |p| p.task.rollback_of = None))]
#[case::an_undoing_that_is_undone(|s: &mut Segments| outcome(s, "u5", |o| o.compensation_commitment = Some("0".repeat(64))))]
fn what_a_plan_does_not_let_follow_is_invalid_to_both(#[case] lie: Lie) {
    assert_lie(&rich::ROLLBACK, 17, lie);
}

/// A denied request never becomes approved or expired. A `pending` after the denial changes nothing.
#[test]
fn a_no_stays_one() {
    let story = &*rich::TASK;
    let mut said = None;
    for record in story.segments.iter().flatten() {
        if let Event::ApprovalDecided(of) = &record.event {
            said.get_or_insert_with(|| of.clone());
        }
    }
    let of = |name: &str, state, answer| {
        let mut approval = Approval { name: name.into(), state, ..said.clone().unwrap() };
        approval.decisions.iter_mut().for_each(|vote| vote.decision = answer);
        if state == ApprovalState::Pending {
            approval.decisions.clear();
        }
        Event::ApprovalDecided(approval)
    };
    for (expected, then) in
        [("VALID", ApprovalState::Pending), ("INVALID", ApprovalState::Approved), ("INVALID", ApprovalState::Expired)]
    {
        let mut segments = story.segments.clone();
        after(&mut segments, "f1", of("other", then, Answer::Approve));
        after(&mut segments, "f1", of("other", ApprovalState::Denied, Answer::Deny));
        forge::count(&mut segments);
        let (first, second, findings) = judged(story, segments);
        assert_eq!((first.as_str(), second.as_str()), (expected, expected), "{then:?}: {findings}");
    }
}

fn intent_of(segments: &mut Segments, call: &str, found: &mut Option<Assessment>) {
    let record = record(segments, |event| matches!(event, Event::Intent(intent) if intent.call == call));
    let Event::Intent(intent) = &record.event else { unreachable!() };
    found.clone_from(&intent.assessment);
}

/// Changes the plan in one opening. `turn` is the number of the opening.
fn segments_opened(segments: &mut Segments, turn: usize, change: fn(&mut Option<Plan>)) {
    let mut openings = segments.iter_mut().flatten().filter_map(|record| match &mut record.event {
        Event::AttemptOpened(opened) => Some(opened),
        _ => None,
    });
    change(&mut openings.nth(turn).unwrap().rollback);
}

fn assert_lie(story: &Story, rule: u8, lie: Lie) {
    let mut segments = story.segments.clone();
    lie(&mut segments);
    assert_ne!(segments, story.segments, "nothing is changed");
    forge::count(&mut segments);
    let (first, second, findings) = judged(story, segments);
    assert_eq!((first.as_str(), second.as_str()), ("INVALID", "INVALID"), "{findings}");
    assert!(findings.contains(&format!("rule {rule}:")), "rule {rule}: {findings}");
}
