use proptest::prelude::*;
use rstest::rstest;

use super::*;
use crate::{
    evidence::record::{Outcome, Resolved},
    policy::config::{Compensation, PolicyConfig},
    verify::tests::script::{intent, opened, outcome, policy, record as scripted, signer},
};

const DIGEST: &str = "5a5a";

/// Returns a policy in which `write` has this rollback.
fn undone_by(rollback: Option<Rollback>) -> PolicyConfig {
    let mut policy = policy();
    policy.tools.iter_mut().filter(|tool| tool.name == "write").for_each(|tool| tool.rollback.clone_from(&rollback));
    policy
}

fn call(within_seconds: Option<i64>) -> Option<Rollback> {
    let arguments = BTreeMap::from([("id".to_owned(), "result.id".to_owned())]);
    Some(Rollback::Call(Compensation { contract: "close".into(), arguments, within_seconds }))
}

/// Returns the steps of a log with these events, under this policy.
fn steps(policy: PolicyConfig, events: Vec<Event>) -> Vec<Step> {
    let Event::AttemptOpened(mut first) = opened(&signer(), 1) else { panic!("another event") };
    first.policy = policy;
    let events = [vec![Event::AttemptOpened(first)], events].concat();
    let mut planner = Planner::default();
    for (seq, event) in events.into_iter().enumerate() {
        let seq = u64::try_from(seq).unwrap();
        planner.take(&Record { seq, ..scripted(1, event) });
    }
    planner.steps()
}

fn write(call: &str) -> Event {
    intent(call, Channel::Tool, "write", 0)
}

fn ended(call: &str, how: CallOutcome, commitment: Option<&str>) -> Event {
    let Event::Outcome(of) = outcome(call, 0) else { panic!("another event") };
    Event::Outcome(Outcome { outcome: how, compensation_commitment: commitment.map(Into::into), ..of })
}

fn resolved(call: &str, outcome: CallOutcome) -> Event {
    Event::Resolved(Resolved { call: call.into(), outcome, by: "c9".into() })
}

#[rstest]
#[case::by_a_call(call(None), vec![write("1"), ended("1", CallOutcome::Applied, Some(DIGEST))], Some(By::Call(Undo { contract: "close".into(), request_commitment: DIGEST.into(), until: None })))]
#[case::in_time(call(Some(60)), vec![write("1"), ended("1", CallOutcome::Applied, Some(DIGEST))], Some(By::Call(Undo { contract: "close".into(), request_commitment: DIGEST.into(), until: Some("2026-11-23T10:01:00.000Z".into()) })))]
#[case::not_kept(call(None), vec![write("1"), ended("1", CallOutcome::Applied, None)], Some(By::People("the arguments that undo it could not be made or kept".into())))]
#[case::by_hand(Some(Rollback::ByHand("ask the bank".into())), vec![write("1"), ended("1", CallOutcome::Applied, None)], Some(By::People("ask the bank".into())))]
#[case::nobody_says(None, vec![write("1"), ended("1", CallOutcome::Applied, None)], Some(By::People("its contract does not say how".into())))]
#[case::unknown(call(None), vec![write("1"), ended("1", CallOutcome::Unknown, None)], Some(By::People("whether it took effect is not known".into())))]
#[case::open(call(None), vec![write("1")], Some(By::People("whether it took effect is not known".into())))]
#[case::not_applied(call(None), vec![write("1"), ended("1", CallOutcome::NotApplied, None)], None)]
#[case::read_says_no(call(None), vec![write("1"), ended("1", CallOutcome::Unknown, None), resolved("1", CallOutcome::NotApplied)], None)]
#[case::read_says_yes(call(None), vec![write("1"), ended("1", CallOutcome::Unknown, None), resolved("1", CallOutcome::Applied)], Some(By::People("the arguments that undo it could not be made or kept".into())))]
#[case::a_read(call(None), vec![intent("1", Channel::Tool, "search", 0), ended("1", CallOutcome::Applied, None)], None)]
#[case::a_model(call(None), vec![intent("1", Channel::Model, "/v1/x", 5), ended("1", CallOutcome::Applied, None)], None)]
fn a_step(#[case] rollback: Option<Rollback>, #[case] events: Vec<Event>, #[case] expected: Option<By>) {
    let found = steps(undone_by(rollback), events);
    assert_eq!(found.into_iter().map(|step| step.by).next(), expected);
}

#[test]
fn the_newest_is_first_and_too_many_are_for_people() {
    let applied = |call: &str| vec![write(call), ended(call, CallOutcome::Applied, Some(DIGEST))];
    let found = steps(undone_by(call(None)), [applied("1"), applied("2")].concat());
    assert_eq!(found.iter().map(|step| step.call.as_str()).collect::<Vec<_>>(), ["2", "1"]);
    let mut planner = Planner::default();
    for seq in 0..=u64::try_from(STEPS).unwrap() {
        planner.take(&Record { seq, ..scripted(1, write(&seq.to_string())) });
    }
    let found = planner.steps();
    assert_eq!((found.len(), found[0].call.as_str()), (STEPS + 1, "4096"));
    assert_eq!(found[STEPS].by, By::People("1 older calls are more than a rollback undoes: see the log".into()));
}

fn plan(calls: &[&str]) -> Plan {
    let by = || By::Call(Undo { contract: "close".into(), request_commitment: DIGEST.into(), until: None });
    let step = |call: &&str| Step { call: (*call).into(), tool: "write".into(), by: by() };
    Plan { origin: "o".into(), size: 9, root: String::new(), steps: calls.iter().map(step).collect() }
}

fn leaving<'a>(compensates: Option<&'a str>) -> Leaving<'a> {
    let side_effect = Some(SideEffect::Write);
    Leaving { channel: Channel::Tool, side_effect, compensates, contract: "close", digest: DIGEST }
}

#[rstest]
#[case::planned(leaving(Some("1")), None)]
#[case::not_planned(leaving(Some("7")), Some("expected a call that has a compensation in the plan"))]
#[case::other_contract(Leaving { contract: "open", ..leaving(Some("1")) }, Some("found open"))]
#[case::other_arguments(Leaving { digest: "00", ..leaving(Some("1")) }, Some("found close and 00"))]
#[case::nothing(leaving(None), Some("and nothing else"))]
#[case::a_read(Leaving { side_effect: Some(SideEffect::Read), ..leaving(None) }, None)]
#[case::a_listing(Leaving { channel: Channel::Listing, side_effect: None, ..leaving(None) }, None)]
#[case::a_model(Leaving { channel: Channel::Model, side_effect: None, ..leaving(None) }, Some("and nothing else"))]
#[case::a_host(Leaving { channel: Channel::Egress, side_effect: None, ..leaving(None) }, Some("and nothing else"))]
#[case::over_another_way(Leaving { channel: Channel::Model, ..leaving(Some("1")) }, Some("and nothing else"))]
fn what_a_rollback_lets_pass(#[case] call: Leaving<'_>, #[case] expected: Option<&str>) {
    let undoing = Undoing::new(plan(&["2", "1"]));
    let found = lets(Some(&undoing), call, Timestamp::now()).err();
    match (&found, expected) {
        (None, None) => {}
        (Some(found), Some(expected)) => assert!(found.contains(expected), "{found}"),
        other => panic!("{other:?}"),
    }
    // Outside a rollback, a call passes exactly if it compensates nothing.
    assert_eq!(lets(None, call, Timestamp::now()).is_err(), call.compensates.is_some());
}

#[test]
fn too_late_is_too_late() {
    let mut plan = plan(&["1"]);
    let By::Call(undo) = &mut plan.steps[0].by else { panic!("another event") };
    undo.until = Some("2026-11-23T10:01:00.000Z".into());
    let undoing = Undoing::new(plan);
    let at = |time: &str| lets(Some(&undoing), leaving(Some("1")), time.parse().unwrap());
    assert_eq!(at("2026-11-23T10:01:00Z"), Ok(()));
    assert!(at("2026-11-23T10:01:00.001Z").unwrap_err().contains("by hand"));
}

proptest! {
    /// Whatever is tried in whatever order: a step whose call took effect, or may have taken effect, has no other call.
    #[test]
    fn each_step_takes_effect_once(tries in proptest::collection::vec((0usize..4, 0usize..4), 0..64)) {
        let names = ["1", "2", "3", "4"];
        let mut undoing = Undoing::new(plan(&names));
        let mut may_have: BTreeMap<&str, usize> = BTreeMap::new();
        for (number, (step, end)) in tries.into_iter().enumerate() {
            let (name, by) = (names[step], format!("c{number}"));
            if lets(Some(&undoing), leaving(Some(name)), Timestamp::now()).is_err() {
                continue;
            }
            undoing.intend(name, &by);
            let outcome = [Some(CallOutcome::Applied), Some(CallOutcome::NotApplied), Some(CallOutcome::Unknown), None][end];
            if let Some(outcome) = outcome {
                undoing.settle(&by, outcome);
            }
            *may_have.entry(name).or_default() += usize::from(outcome != Some(CallOutcome::NotApplied));
        }
        prop_assert!(may_have.values().all(|times| *times <= 1), "{may_have:?}");
        let (undone, left) = undoing.summary();
        prop_assert_eq!(undone + left.len(), names.len());
        let text = serde_json::to_string(&undoing).unwrap();
        prop_assert_eq!(serde_json::from_str::<Undoing>(&text).unwrap(), undoing);
    }
}
