use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{operator::ready, render::fixtures};

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + seconds).unwrap()
}

fn attempt(number: i64) -> Attempt {
    Attempt {
        number,
        pod: format!("t-{number}"),
        pod_uid: format!("u-{number}"),
        started_at: Some(Time(at(0))),
        finished_at: None,
        failure_class: None,
        reason: None,
        presumed: false,
    }
}

fn closed(phase: &str, class: &str, reason: &str) -> TaskClosed {
    TaskClosed {
        phase: phase.into(),
        failure_class: class.into(),
        reason: reason.into(),
        exit_code: None,
        images: Default::default(),
    }
}

fn story<'a>(attempts: &'a [Attempt], contained: Option<bool>, stage: Progress<'a>) -> StatusInput<'a> {
    static NONE: BTreeMap<String, i64> = BTreeMap::new();
    StatusInput { generation: Some(1), attempts, failures: &NONE, contained, evidence: None, stage }
}

#[test]
fn a_life_is_told() {
    let (one, findings) = ([attempt(1)], [Finding::new("spec.tools[0]", "a contract", "nothing", "apply it")]);
    let (good, empty) = (closed("Succeeded", "", "AgentSucceeded"), AgentTaskStatus::default());
    let refused = tell(&empty, &story(&[], None, Progress::Refused(&findings)), at(0));
    let waiting = tell(&refused, &story(&one, None, Progress::Waiting("Unschedulable", "")), at(1));
    let running = tell(&waiting, &story(&one, Some(true), Progress::Running), at(2));
    let sealing = tell(&running, &story(&one, Some(true), Progress::Sealing(&good, "no gateway")), at(3));
    let ended = tell(&sealing, &story(&one, Some(true), Progress::Ended(&good, DenialCounts::default())), at(4));
    insta::assert_yaml_snapshot!("life", [refused, waiting, running, sealing, ended]);
}

/// An agent that catches its errors may succeed without having done anything.
#[test]
fn what_was_refused_is_said_of_an_agent_that_has_ended_well() {
    let (one, good) = ([attempt(1)], closed("Succeeded", "", "AgentSucceeded"));
    for (refused, message) in [
        (DenialCounts::default(), "AgentSucceeded"),
        (
            DenialCounts { model: 12, egress: 1, ..DenialCounts::default() },
            "AgentSucceeded; denied: 12 model calls, 1 connection",
        ),
    ] {
        let story = story(&one, Some(true), Progress::Ended(&good, refused));
        let status = tell(&AgentTaskStatus::default(), &story, at(4));
        let complete = status.conditions.iter().find(|one| one.type_ == COMPLETE).unwrap();
        assert_eq!((complete.reason.as_str(), complete.message.as_str()), ("Succeeded", message));
        assert_eq!(status.reason.as_deref(), Some("AgentSucceeded"));
    }
}

#[test]
fn a_parked_task_says_so() {
    let mut away = attempt(1);
    away.failure_class = Some(FailureClass::Dependency);
    let why = "attempt 1 ended: EvidenceUnavailable";
    let status = tell(&AgentTaskStatus::default(), &story(&[away], Some(true), Progress::Parked(why)), at(0));
    assert_eq!((status.phase, status.reason.as_deref()), (Some(Phase::Parked), Some(PARKED)));
    let complete = status.conditions.iter().find(|one| one.type_ == COMPLETE).unwrap();
    assert_eq!((complete.status.as_str(), complete.reason.as_str(), complete.message.as_str()), ("False", PARKED, why));
}

#[test]
fn a_task_that_waits_for_approvers_says_so() {
    let (one, why) = ([attempt(1)], "waits for approvers to decide about ApprovalRequest a");
    let running = tell(&AgentTaskStatus::default(), &story(&one, Some(true), Progress::Running), at(0));
    assert_eq!(undecided(&running), None);
    let status = tell(&running, &story(&one, Some(true), Progress::Undecided(why)), at(1));
    assert_eq!((status.phase, status.reason.as_deref()), (Some(Phase::Running), Some(WAITING_FOR_APPROVAL)));
    for kind in [COMPLETE, READY] {
        let told = status.conditions.iter().find(|one| one.type_ == kind).unwrap();
        let told = (told.status.as_str(), told.reason.as_str(), told.message.as_str());
        assert_eq!(told, ("False", WAITING_FOR_APPROVAL, why), "{kind}");
    }
    assert!(status.conditions.iter().all(|one| one.type_ != STALLED), "a decision is expected, not a correction");
    assert_eq!(undecided(&status), Some(why));
    let again = tell(&status, &story(&one, Some(true), Progress::Running), at(2));
    assert_eq!((undecided(&again), again.reason.as_deref()), (None, Some(RUNNING)));
    // The agent ended while approvers had not decided, and the gateway is unavailable.
    let good = closed("Succeeded", "", "AgentSucceeded");
    let sealing = tell(&status, &story(&one, Some(true), Progress::Sealing(&good, "no gateway")), at(2));
    assert_eq!((undecided(&sealing), sealing.reason.as_deref()), (None, Some(RUNNING)));
}

#[test]
fn containment_that_was_not_proven_is_said() {
    let mut lost = attempt(1);
    lost.reason = Some(CONTAINMENT_UNPROVEN.into());
    let failed = closed("Failed", "Infrastructure", CONTAINMENT_UNPROVEN);
    let status = tell(
        &AgentTaskStatus::default(),
        &story(&[lost], Some(false), Progress::Ended(&failed, DenialCounts::default())),
        at(0),
    );
    assert_eq!(status.phase, Some(Phase::Failed));
    assert_eq!(status.failure_class, Some(FailureClass::Infrastructure));
    assert_eq!(status.reason.as_deref(), Some(CONTAINMENT_UNPROVEN));
    let contained = status.conditions.iter().find(|one| one.type_ == CONTAINED).unwrap();
    assert_eq!((contained.status.as_str(), contained.reason.as_str()), ("False", CONTAINMENT_UNPROVEN));
}

#[test]
fn five_findings_are_shown() {
    let findings: Vec<_> = (0..8).map(|n| Finding::new(format!("spec.f{n}"), "x", "y", "z")).collect();
    let status = tell(&AgentTaskStatus::default(), &story(&[], None, Progress::Refused(&findings)), at(0));
    let message = &status.conditions[0].message;
    assert!(
        message.contains("spec.f4") && !message.contains("spec.f5") && message.ends_with("and 3 more"),
        "{message}"
    );
}

#[test]
fn usage_is_never_ours() {
    let before = AgentTaskStatus { usage: Some(Default::default()), ..AgentTaskStatus::default() };
    let after = tell(&before, &story(&[], None, Progress::Running), at(0));
    assert_eq!(after.usage, None);
    assert!(!changed(&AgentTaskStatus { usage: before.usage, ..after.clone() }, &after));
}

#[test]
fn ends_are_counted_once() {
    let mut done = attempt(1);
    done.finished_at = Some(Time(at(9)));
    done.failure_class = Some(FailureClass::Agent);
    let before = AgentTaskStatus { attempts: vec![attempt(1)], ..AgentTaskStatus::default() };
    let after = AgentTaskStatus { attempts: vec![done, attempt(2)], ..AgentTaskStatus::default() };
    assert_eq!(newly_ended(&before, &after).collect::<Vec<_>>(), [Some(FailureClass::Agent)]);
    assert_eq!(newly_ended(&after, &after).count(), 0);
}

fn any_stage() -> impl Strategy<Value = u8> {
    0..7_u8
}

proptest! {
    /// The same input at any later time changes nothing, so no status is written in a loop.
    #[test]
    fn a_story_told_twice_changes_nothing(
        first in any_stage(), second in any_stage(), contained in proptest::option::of(any::<bool>()), attempts in 0..3_i64, later in 0..100_000_i64
    ) {
        let attempts: Vec<_> = (1..=attempts).map(attempt).collect();
        let findings = [Finding::new("spec", "a", "b", "c")];
        let good = closed("Succeeded", "", "AgentSucceeded");
        let bad = closed("Failed", "Budget", "DeadlineExceeded");
        let stage = |n: u8| match n {
            0 => Progress::Refused(&findings),
            1 => Progress::Waiting("Unschedulable", "why"),
            2 => Progress::Running,
            3 => Progress::Sealing(&bad, "no gateway"),
            4 => Progress::Ended(&bad, DenialCounts::default()),
            5 => Progress::Undecided("who"),
            _ => Progress::Ended(&good, DenialCounts::default()),
        };
        let before = tell(&AgentTaskStatus::default(), &story(&attempts, None, stage(first)), at(0));
        let once = tell(&before, &story(&attempts, contained, stage(second)), at(1));
        let twice = tell(&once, &story(&attempts, contained, stage(second)), at(1 + later));
        prop_assert!(!changed(&once, &twice));
        prop_assert_eq!(once, twice);
    }
}

/// The health of an object in Argo CD and Flux, in each phase. `e2e/checks/gitops` asks both tools about the objects of this snapshot.
#[test]
fn phases_are_told_to_those_who_deploy_by_git() {
    let task = |case: &str, argo: &str, flux: &str, status: Value| {
        let mut object = serde_json::to_value(fixtures::task()).unwrap();
        object["status"] = status;
        json!({ "case": case, "argo": argo, "flux": flux, "object": object })
    };
    let told = |attempts: &[Attempt], stage| {
        serde_json::to_value(tell(&AgentTaskStatus::default(), &story(attempts, Some(true), stage), at(0))).unwrap()
    };
    // What both tools must show beside the health.
    let says = |mut phase: Value, says: &str| {
        phase["says"] = json!(says);
        phase
    };
    let undecided = "waits for approvers to decide about ApprovalRequest triage-5b1c (expires at 2026-01-01T00:00:00Z)";
    let parked = "attempt 1 ended: EvidenceUnavailable";
    let findings = [Finding::new("spec.tools[0]", "a contract", "nothing", "apply it")];
    let (good, bad) = (closed("Succeeded", "", "AgentSucceeded"), closed("Failed", "Agent", "NonZeroExit"));
    let unknown = bad.clone().unknown();
    let (none, one) = (DenialCounts::default(), [attempt(1)]);
    let mut phases = vec![
        task("that the operator has not seen", "Progressing", "InProgress", json!({ "observedGeneration": -1 })),
        task("that is not valid", "Degraded", "Failed", told(&[], Progress::Refused(&findings))),
        task("that waits for a node", "Progressing", "InProgress", told(&one, Progress::Waiting("Unschedulable", ""))),
        task("that runs", "Progressing", "InProgress", told(&one, Progress::Running)),
        says(
            task("that waits for approvers", "Suspended", "InProgress", told(&one, Progress::Undecided(undecided))),
            undecided,
        ),
        task("that is tried again", "Progressing", "InProgress", told(&one, Progress::Waiting("Retrying", "why"))),
        says(task("that is parked", "Suspended", "InProgress", told(&one, Progress::Parked(parked))), parked),
        task(
            "whose log is not sealed",
            "Progressing",
            "InProgress",
            told(&one, Progress::Sealing(&good, "no gateway")),
        ),
        task("that has succeeded", "Healthy", "Current", told(&one, Progress::Ended(&good, none))),
        task("that has failed", "Degraded", "Failed", told(&one, Progress::Ended(&bad, none))),
        task("whose end nobody knows", "Degraded", "Failed", told(&one, Progress::Ended(&unknown, none))),
    ];
    let mut deleted = task("that is deleted", "Progressing", "Terminating", told(&one, Progress::Running));
    deleted["object"]["metadata"]["deletionTimestamp"] = json!(at(1));
    let mut changed =
        task("that has changed since", "Progressing", "InProgress", told(&one, Progress::Ended(&good, none)));
    changed["object"]["metadata"]["generation"] = json!(2);
    phases.extend([deleted, changed]);
    let (contract, pack) = (fixtures::contracts().remove(0), fixtures::pack());
    for object in [serde_json::to_value(contract).unwrap(), serde_json::to_value(pack).unwrap()] {
        let generation = object["metadata"]["generation"].as_i64().or(Some(1));
        let judged =
            |ready| serde_json::to_value(ready::after(&Default::default(), generation, &ready, at(0))).unwrap();
        for (case, argo, flux, status) in [
            ("that the operator has not seen", "Progressing", "InProgress", json!({ "observedGeneration": -1 })),
            ("that is in order", "Healthy", "Current", judged(Ready::Yes)),
            ("that is not", "Degraded", "Failed", judged(Ready::Stalled(super::told(&findings, SHOWN_FINDINGS)))),
        ] {
            let mut object = object.clone();
            object["metadata"]["generation"] = json!(generation);
            object["status"] = status;
            phases.push(json!({ "case": case, "argo": argo, "flux": flux, "object": object }));
        }
    }
    // Keep the status of each object, and drop its spec.
    for phase in &mut phases {
        phase["object"].as_object_mut().unwrap().remove("spec");
    }
    insta::assert_snapshot!("phases", serde_json::to_string_pretty(&phases).unwrap());
}

/// The API server gives new objects this status.
#[test]
fn what_is_new_is_seen_by_nobody() {
    for crd in &crate::api::all_crds()[..3] {
        let crd = serde_json::to_value(crd).unwrap();
        let status = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"];
        assert_eq!(status["default"], json!({ "observedGeneration": -1 }), "{}", crd["spec"]["names"]["kind"]);
    }
}
