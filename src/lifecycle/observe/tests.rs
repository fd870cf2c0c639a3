use super::*;
use crate::render::fixtures::read;

fn view(status: &str, deletion: &str) -> PodView {
    let yaml = format!(
        r#"
        metadata:
          name: t-1
          uid: p
          creationTimestamp: "2026-01-01T00:00:00Z"
          labels: {{ belay.dev/attempt: "1", belay.dev/task-uid: u }}
          {deletion}
        status: {status}
        "#
    );
    pod(&read(&yaml)).unwrap()
}

fn agent(state: &str) -> String {
    format!(
        r#"containerStatuses: [ {{ name: agent, image: i, imageID: i, ready: false, restartCount: 0, state: {state} }} ]"#
    )
}

fn terminated(code: i32, reason: &str, finished: u8) -> String {
    agent(&format!(
        r#"{{ terminated: {{ exitCode: {code}, reason: {reason}, startedAt: "2026-01-01T00:00:05Z", finishedAt: "2026-01-01T00:00:{finished}Z" }} }}"#
    ))
}

fn init(name: &str, code: i32) -> String {
    format!(
        r#"initContainerStatuses: [ {{ name: {name}, image: i, imageID: i, ready: false, restartCount: 0, state: {{ terminated: {{ exitCode: {code} }} }} }} ]"#
    )
}

const DISRUPTED: &str = r#"conditions: [ { type: DisruptionTarget, status: "True", reason: PreemptionByScheduler } ]"#;

#[rstest::rstest]
#[case::success(&format!("{{ phase: Succeeded, {} }}", terminated(0, "Completed", 30)), None, "AgentSucceeded", Some(0))]
#[case::non_zero(&format!("{{ phase: Failed, {} }}", terminated(3, "Error", 30)), Some(FailureClass::Agent), "NonZeroExit", Some(3))]
#[case::oom(&format!("{{ phase: Failed, {} }}", terminated(137, "OOMKilled", 30)), Some(FailureClass::Agent), "OOMKilled", Some(137))]
#[case::bad_command(&format!("{{ phase: Failed, {} }}", terminated(128, "StartError", 30)), Some(FailureClass::Agent), "StartError", Some(128))]
#[case::deadline(&format!("{{ phase: Failed, reason: DeadlineExceeded, {} }}", terminated(137, "Error", 30)), Some(FailureClass::Budget), "DeadlineExceeded", Some(137))]
#[case::deadline_before_start(
    "{ phase: Failed, reason: DeadlineExceeded }",
    Some(FailureClass::Infrastructure),
    "StartTimeout",
    None
)]
#[case::unproven(&format!("{{ phase: Failed, {} }}", init("containment-probe", 42)), Some(FailureClass::Infrastructure), "ContainmentUnproven", None)]
#[case::probe_broken(&format!("{{ phase: Failed, {} }}", init("containment-probe", 1)), Some(FailureClass::Infrastructure), "ProbeFailed", None)]
#[case::evicted(
    "{ phase: Failed, reason: Evicted, message: The node was low on resource memory }",
    Some(FailureClass::Infrastructure),
    "Evicted",
    None
)]
#[case::storage(
    "{ phase: Failed, reason: Evicted, message: Usage of EmptyDir volume exceeds the limit }",
    Some(FailureClass::Agent),
    "StorageExceeded",
    None
)]
#[case::preempted(&format!("{{ phase: Failed, {DISRUPTED}, {} }}", terminated(137, "Error", 30)), Some(FailureClass::Infrastructure), "Preempted", Some(137))]
#[case::node_lost(&format!("{{ phase: Failed, {} }}", terminated(137, "ContainerStatusUnknown", 30)), Some(FailureClass::Infrastructure), "NodeLost", None)]
#[case::node_shutdown(&format!("{{ phase: Failed, reason: Terminated, {} }}", terminated(137, "Error", 30)), Some(FailureClass::Infrastructure), "Evicted", Some(137))]
#[case::refused_by_node("{ phase: Failed, reason: OutOfcpu }", Some(FailureClass::Infrastructure), "NodeRefused", None)]
#[case::nobody_knows("{ phase: Failed }", Some(FailureClass::Infrastructure), "PodFailed", None)]
fn ends(
    #[case] status: &str,
    #[case] class: Option<FailureClass>,
    #[case] reason: &'static str,
    #[case] exit_code: Option<i32>,
) {
    let view = view(status, "");
    assert!(view.terminal);
    assert_eq!(view.end, Some(End { class, reason, exit_code }));
}

#[rstest::rstest]
#[case::while_running(&agent(r#"{ running: { startedAt: "2026-01-01T00:00:05Z" } }"#), Some(FailureClass::Infrastructure), "PodDeleted")]
#[case::stopped_by_it(&terminated(143, "Error", 21), Some(FailureClass::Infrastructure), "PodDeleted")]
#[case::exit_zero_on_sigterm(&terminated(0, "Completed", 21), Some(FailureClass::Infrastructure), "PodDeleted")]
#[case::in_the_same_second(&terminated(0, "Completed", 20), Some(FailureClass::Infrastructure), "PodDeleted")]
#[case::ended_before(&terminated(0, "Completed", 19), None, "AgentSucceeded")]
#[case::failed_before(&terminated(2, "Error", 19), Some(FailureClass::Agent), "NonZeroExit")]
fn a_deleted_pod(#[case] containers: &str, #[case] class: Option<FailureClass>, #[case] reason: &'static str) {
    let status = format!("{{ phase: Running, {containers} }}");
    let deletion = r#"deletionTimestamp: "2026-01-01T00:00:50Z"
          deletionGracePeriodSeconds: 30"#;
    let view = view(&status, deletion);
    assert!(view.deleting && !view.terminal);
    let end = view.end.unwrap();
    assert_eq!((end.class, end.reason), (class, reason));
}

#[rstest::rstest]
#[case::ended("state: { terminated: { exitCode: 43 } }", true)]
#[case::started_again(
    "state: { running: { startedAt: \"2026-01-01T00:00:09Z\" } }, lastState: { terminated: { exitCode: 43 } }",
    true
)]
#[case::crashed(
    "state: { running: { startedAt: \"2026-01-01T00:00:09Z\" } }, lastState: { terminated: { exitCode: 1 } }",
    false
)]
#[case::runs("state: { running: { startedAt: \"2026-01-01T00:00:09Z\" } }", false)]
fn a_harness_that_refused_enough_ends_the_attempt_while_the_agent_runs(#[case] state: &str, #[case] ends: bool) {
    let running = agent(r#"{ running: { startedAt: "2026-01-01T00:00:05Z" } }"#);
    let harness = format!("{{ name: harness, image: i, imageID: i, ready: true, restartCount: 1, {state} }}");
    let view = view(&format!("{{ phase: Running, initContainerStatuses: [ {harness} ], {running} }}"), "");
    let end = End { class: Some(FailureClass::Policy), reason: "TooManyDenials", exit_code: None };
    assert_eq!(view.end, ends.then_some(end));
    assert!(!view.terminal);
}

#[rstest::rstest]
#[case(43, FailureClass::Policy, "TooManyDenials")]
#[case(44, FailureClass::Budget, "DeadlineExceeded")]
#[case(45, FailureClass::Policy, "ApprovalExpired")]
#[case(46, FailureClass::Dependency, "EvidenceUnavailable")]
#[case(47, FailureClass::Infrastructure, "LogFailed")]
fn a_harness_says_why_the_attempt_is_over(
    #[case] code: i32,
    #[case] class: FailureClass,
    #[case] reason: &'static str,
) {
    let running = agent(r#"{ running: { startedAt: "2026-01-01T00:00:05Z" } }"#);
    let harness = format!(
        "{{ name: harness, image: i, imageID: i, ready: true, restartCount: 1, state: {{ terminated: {{ exitCode: {code} }} }} }}"
    );
    let view = view(&format!("{{ phase: Running, initContainerStatuses: [ {harness} ], {running} }}"), "");
    assert_eq!(view.end, Some(End { class: Some(class), reason, exit_code: None }));
}

#[test]
fn an_agent_that_ended_well_has_failed_if_too_much_was_refused_it() {
    let harness = r#"initContainerStatuses: [ { name: harness, image: i, imageID: i, ready: false, restartCount: 0, state: { terminated: { exitCode: 43 } } } ]"#;
    let view = view(&format!("{{ phase: Succeeded, {harness}, {} }}", terminated(0, "Completed", 30)), "");
    assert_eq!(view.end.unwrap().class, Some(FailureClass::Policy));
}

/// The agent's calls were denied because they could not be recorded. That is not a failure of the agent, and finished work is not repeated.
#[rstest::rstest]
#[case::failed(1, Some(FailureClass::Dependency), "EvidenceUnavailable")]
#[case::was_done(0, None, "AgentSucceeded")]
fn an_agent_that_ended_while_evidence_could_not_be_stored(
    #[case] code: i32,
    #[case] class: Option<FailureClass>,
    #[case] reason: &'static str,
) {
    let harness = r#"initContainerStatuses: [ { name: harness, image: i, imageID: i, ready: false, restartCount: 0, state: { terminated: { exitCode: 46 } } } ]"#;
    let view = view(&format!("{{ phase: Failed, {harness}, {} }}", terminated(code, "Error", 30)), "");
    assert_eq!(view.end, Some(End { class, reason, exit_code: Some(code) }));
}

#[test]
fn an_agent_that_ended_is_under_way_while_its_harness_closes_the_log() {
    let view = view(&format!("{{ phase: Running, {} }}", terminated(0, "Completed", 30)), "");
    assert_eq!(view.end, None);
    assert!(view.agent_started.is_some());
}

#[rstest::rstest]
#[case::pull(r#"{ phase: Pending, startTime: "2026-01-01T00:00:01Z", conditions: [ { type: Initialized, status: "True", lastTransitionTime: "2026-01-01T00:00:09Z" } ], containerStatuses: [ { name: agent, image: i, imageID: "", ready: false, restartCount: 0, state: { waiting: { reason: ImagePullBackOff } } } ] }"#, Some(("ImagePull", 9, true)))]
#[case::harness_pull(r#"{ phase: Pending, startTime: "2026-01-01T00:00:01Z", initContainerStatuses: [ { name: harness, image: i, imageID: "", ready: false, restartCount: 0, state: { waiting: { reason: ErrImagePull } } } ] }"#, Some(("ImagePull", 1, true)))]
#[case::unschedulable(r#"{ phase: Pending, conditions: [ { type: PodScheduled, status: "False", reason: Unschedulable, lastTransitionTime: "2026-01-01T00:00:03Z" } ] }"#, Some(("Unschedulable", 3, false)))]
#[case::starting(r#"{ phase: Pending, containerStatuses: [ { name: agent, image: i, imageID: "", ready: false, restartCount: 0, state: { waiting: { reason: PodInitializing } } } ] }"#, None)]
fn stuck_pods(#[case] status: &str, #[case] expected: Option<(&'static str, u8, bool)>) {
    let stuck = view(status, "").stuck;
    let expected = expected.map(|(reason, second, fatal)| WaitingReason {
        reason,
        since: Some(format!("2026-01-01T00:00:{second:02}Z").parse().unwrap()),
        fatal,
    });
    assert_eq!(stuck, expected);
}

#[test]
fn containment_is_what_the_probe_says() {
    assert_eq!(view(&format!("{{ phase: Pending, {} }}", init("containment-probe", 0)), "").contained, Some(true));
    assert_eq!(view(&format!("{{ phase: Failed, {} }}", init("containment-probe", 42)), "").contained, Some(false));
    assert_eq!(view("{ phase: Pending }", "").contained, None);
}

#[test]
fn a_pod_without_an_attempt_is_not_ours() {
    assert_eq!(pod(&Pod::default()), None);
}

/// A container that was not planned keeps the pod from ending. The attempt ends with its agent.
#[rstest::rstest]
#[case::success(r#"{ terminated: { exitCode: 0, reason: Completed, startedAt: "2026-01-01T00:00:05Z", finishedAt: "2026-01-01T00:00:30Z" } }"#, "running: {}", Some((None, "AgentSucceeded")))]
#[case::failure(r#"{ terminated: { exitCode: 3, reason: Error, startedAt: "2026-01-01T00:00:05Z", finishedAt: "2026-01-01T00:00:30Z" } }"#, "running: {}", Some((Some(FailureClass::Agent), "NonZeroExit")))]
#[case::it_cannot_start(r#"{ terminated: { exitCode: 0, reason: Completed, startedAt: "2026-01-01T00:00:05Z", finishedAt: "2026-01-01T00:00:30Z" } }"#, "waiting: { reason: ImagePullBackOff }", Some((None, "AgentSucceeded")))]
#[case::agent_runs(r#"{ running: { startedAt: "2026-01-01T00:00:05Z" } }"#, "running: {}", None)]
#[case::it_ended_first(r#"{ running: { startedAt: "2026-01-01T00:00:05Z" } }"#, "terminated: { exitCode: 1 }", None)]
#[case::both_ended_and_the_log_is_being_finished(r#"{ terminated: { exitCode: 0, reason: Completed, startedAt: "2026-01-01T00:00:05Z", finishedAt: "2026-01-01T00:00:30Z" } }"#, "terminated: { exitCode: 0 }", None)]
fn a_container_that_nobody_planned_does_not_decide(
    #[case] agent: &str,
    #[case] mesh: &str,
    #[case] expected: Option<(Option<FailureClass>, &'static str)>,
) {
    let one = |name: &str, state: &str| {
        format!("{{ name: {name}, image: i, imageID: i, ready: true, restartCount: 0, state: {state} }}")
    };
    let containers =
        format!("containerStatuses: [ {}, {} ]", one("agent", agent), one("mesh", &format!("{{ {mesh} }}")));
    let view = view(&format!("{{ phase: Running, {containers} }}"), "");
    assert_eq!(view.end.map(|end| (end.class, end.reason)), expected);
}
