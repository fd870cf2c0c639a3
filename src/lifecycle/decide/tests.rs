use proptest::prelude::*;

use std::collections::BTreeMap;

use super::*;
use crate::lifecycle::observe::WaitingReason;

const NOW: i64 = 1_700_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(NOW + seconds).unwrap()
}

/// A pod whose agent started ten seconds ago.
fn pod(attempt: i64) -> PodView {
    PodView {
        attempt,
        name: format!("t-{attempt}"),
        uid: format!("pod-{attempt}"),
        created: Some(at(-20)),
        deleting: false,
        terminal: false,
        contained: Some(true),
        accepted: Some(at(-19)),
        agent_started: Some(at(-10)),
        agent_finished: None,
        lifetime: None,
        stuck: None,
        altered: None,
        images: [("agent".to_owned(), "ab".repeat(32))].into(),
        end: None,
        live: true,
    }
}

fn ended(attempt: i64, class: Option<FailureClass>, reason: &'static str) -> PodView {
    PodView { terminal: true, end: Some(End { class, reason, exit_code: Some(0) }), ..pod(attempt) }
}

fn record(number: i64, end: Option<(Option<FailureClass>, &str)>) -> Attempt {
    Attempt {
        number,
        pod: format!("t-{number}"),
        pod_uid: format!("pod-{number}"),
        started_at: Some(Time(at(-20))),
        finished_at: end.map(|_| Time(at(-1))),
        failure_class: end.and_then(|(class, _)| class),
        reason: end.map(|(_, reason)| reason.to_owned()),
        presumed: false,
    }
}

/// The observed state of a task. By default, nothing has happened to the task yet.
#[derive(Debug)]
struct Case {
    deleting: bool,
    finalizer: bool,
    phase: Option<Phase>,
    sealed: bool,
    retry: Retry,
    history: Vec<Attempt>,
    pods: Vec<PodView>,
    claims: Vec<i64>,
    reusable: Option<i64>,
    /// Whether every pod was looked up, so that a pod that is not here does not exist.
    looked_up: bool,
    live: bool,
    rolls_back: bool,
    failures: BTreeMap<String, i64>,
    in_touch_since: Timestamp,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            deleting: false,
            finalizer: true,
            phase: None,
            sealed: false,
            retry: Retry { agent: 1, infrastructure: 2 },
            history: vec![],
            pods: vec![],
            claims: vec![],
            reusable: None,
            looked_up: true,
            live: true,
            rolls_back: true,
            failures: BTreeMap::new(),
            in_touch_since: at(-1000),
        }
    }
}

impl Case {
    fn decide_at(&self, now: Timestamp) -> Decision {
        decide(&Observed {
            uid: "u",
            deleting: self.deleting,
            finalizer: self.finalizer,
            phase: self.phase,
            sealed: self.sealed,
            retry: &self.retry,
            wall_time_seconds: 60,
            history: &self.history,
            pods: &self.pods,
            claims: &self.claims,
            reusable: self.reusable,
            failures: &self.failures,
            looked_up: &if self.looked_up { (1..100).collect() } else { BTreeSet::new() },
            live: self.live,
            rolls_back: self.rolls_back,
            in_touch_since: self.in_touch_since,
            now,
        })
    }

    fn next(&self) -> Next {
        self.decide_at(at(0)).next
    }
}

fn seal_of(attempt: i64, phase: &str, class: &str, reason: &str, exit_code: Option<i32>) -> Next {
    // The images are known as long as the pod exists, as the exit code is.
    let images = exit_code.map(|_| pod(attempt).images).unwrap_or_default();
    let closed =
        TaskClosed { phase: phase.into(), failure_class: class.into(), reason: reason.into(), exit_code, images };
    Next::Seal { attempt, closed, presumed: false }
}

use FailureClass::{Agent, Budget, Cancelled, Dependency, Infrastructure, Policy, Unknown};

#[test]
fn a_new_task_starts() {
    assert_eq!(Case::default().next(), Next::Start(1));
}

#[test]
fn a_pod_whose_agent_was_refused_too_much_goes_and_none_follows() {
    let end = End { class: Some(FailureClass::Policy), reason: "TooManyDenials", exit_code: None };
    let running = PodView { end: Some(end.clone()), images: BTreeMap::new(), ..pod(1) };
    let case = Case { pods: vec![running.clone()], claims: vec![1], ..Case::default() };
    assert_eq!(case.next(), Next::EndPods(vec![("pod-1".into(), "t-1".into())]));
    let over = Case { pods: vec![PodView { terminal: true, ..running }], claims: vec![1], ..Case::default() };
    assert_eq!(over.next(), seal_of(1, "Failed", "Policy", "TooManyDenials", None));
}

#[test]
fn a_running_pod_is_left_alone_until_its_time_is_up() {
    let case = Case { pods: vec![pod(1)], claims: vec![1], ..Case::default() };
    let decision = case.decide_at(at(0));
    assert_eq!(decision.next, Next::Run { attempt: 1, until: Some(at(-10 + 60 + 5)) });
    assert_eq!(decision.attempts.len(), 1);
    let over = case.decide_at(at(55));
    assert_eq!(over.next, Next::EndPods(vec![("pod-1".into(), "t-1".into())]));
    assert_eq!(over.attempts[0].failure_class, Some(Budget));
}

#[test]
fn a_budget_is_never_tried_again() {
    let history = vec![record(1, Some((Some(Budget), "DeadlineExceeded")))];
    let still_there =
        Case { history: history.clone(), pods: vec![PodView { deleting: true, ..pod(1) }], ..Case::default() };
    assert_eq!(still_there.next(), Next::EndPods(vec![]));
    let gone = Case { history, ..Case::default() };
    assert_eq!(gone.next(), seal_of(1, "Failed", "Budget", "DeadlineExceeded", None));
}

#[test]
fn success_is_sealed_and_then_settled() {
    let mut case = Case { pods: vec![ended(1, None, "AgentSucceeded")], claims: vec![1], ..Case::default() };
    assert_eq!(case.next(), seal_of(1, "Succeeded", "", "AgentSucceeded", Some(0)));
    case.phase = Some(Phase::Succeeded);
    case.sealed = true;
    case.history = case.decide_at(at(0)).attempts;
    assert_eq!(case.next(), Next::Nothing);
    // Anyone may delete its pod now.
    case.pods.clear();
    assert_eq!(case.next(), Next::Nothing);
}

#[test]
fn the_first_retry_is_at_once_and_the_next_ones_wait() {
    let first = Case { history: vec![record(1, Some((Some(Infrastructure), "NodeLost")))], ..Case::default() };
    assert_eq!(first.next(), Next::Start(2));
    let second = Case {
        history: vec![
            record(1, Some((Some(Infrastructure), "NodeLost"))),
            record(2, Some((Some(Infrastructure), "NodeLost"))),
        ],
        ..Case::default()
    };
    let Next::Pause(until) = second.next() else { panic!("{:?}", second.next()) };
    assert!(until > at(0) && until <= at(2));
    assert_eq!(second.decide_at(until).next, Next::Start(3));
    let mut third = second;
    third.history.push(record(3, Some((Some(Infrastructure), "ContainmentUnproven"))));
    assert_eq!(third.next(), seal_of(3, "Failed", "Infrastructure", "ContainmentUnproven", None));
}

/// Calls that are in no record are not counted, so another attempt would continue from less than what was used.
#[test]
fn an_attempt_whose_log_could_not_go_on_is_the_last() {
    for (reason, is_last) in [("LogFailed", true), ("NodeLost", false)] {
        let retry = Retry { agent: 9, infrastructure: 9 };
        let case = Case { history: vec![record(1, Some((Some(Infrastructure), reason)))], retry, ..Case::default() };
        let expected = if is_last { seal_of(1, "Failed", "Infrastructure", reason, None) } else { Next::Start(2) };
        assert_eq!(case.next(), expected);
    }
}

#[test]
fn a_task_is_parked_for_as_long_as_it_takes() {
    let away = |count: i64| (1..=count).map(|number| record(number, Some((Some(Dependency), "EvidenceUnavailable"))));
    for count in [1, 2, 40] {
        let case =
            Case { history: away(count).collect(), retry: Retry { agent: 0, infrastructure: 0 }, ..Case::default() };
        let Next::Pause(until) = case.next() else { panic!("{:?}", case.next()) };
        assert!(until >= at(59) && until <= at(90), "{until}");
        assert_eq!(case.decide_at(until).next, Next::Start(count + 1));
    }
    let then_fails = away(5).chain([record(6, Some((Some(Agent), "NonZeroExit")))]).collect();
    let case = Case { history: then_fails, retry: Retry { agent: 0, infrastructure: 0 }, ..Case::default() };
    assert_eq!(case.next(), seal_of(6, "Failed", "Agent", "NonZeroExit", None));
}

#[test]
fn classes_have_caps_of_their_own() {
    let case = Case {
        history: vec![
            record(1, Some((Some(Infrastructure), "NodeLost"))),
            record(2, Some((Some(Agent), "NonZeroExit"))),
        ],
        ..Case::default()
    };
    assert_eq!(case.next(), Next::Start(3));
    let none = Case { retry: Retry { agent: 0, infrastructure: 3 }, ..case };
    assert_eq!(none.next(), seal_of(2, "Failed", "Agent", "NonZeroExit", None));
}

#[test]
fn no_attempt_starts_beside_a_pod_that_lives() {
    let case = Case {
        history: vec![record(1, Some((Some(Infrastructure), "ImagePull")))],
        pods: vec![pod(1)],
        ..Case::default()
    };
    assert_eq!(case.next(), Next::EndPods(vec![("pod-1".into(), "t-1".into())]));
    let told = Case { pods: vec![PodView { deleting: true, ..pod(1) }], ..case };
    assert_eq!(told.next(), Next::EndPods(vec![]));
}

#[test]
fn an_older_pod_that_turns_up_is_ended() {
    let case = Case { pods: vec![pod(1), pod(2)], ..Case::default() };
    assert_eq!(case.next(), Next::EndPods(vec![("pod-1".into(), "t-1".into())]));
}

#[test]
fn a_pod_that_is_not_cached_is_looked_up_before_it_is_lost() {
    let mut case = Case { history: vec![record(1, None)], claims: vec![1], looked_up: false, ..Case::default() };
    assert_eq!(case.next(), Next::Confirm(Unread::Pod(1)));
    case.looked_up = true;
    let decision = case.decide_at(at(0));
    assert_eq!(decision.attempts[0].reason.as_deref(), Some("PodLost"));
    assert_eq!(decision.next, Next::Start(2));
}

#[test]
fn a_namesake_of_the_recorded_pod_is_not_that_pod() {
    let other = PodView { uid: "another".into(), ..pod(1) };
    let mut case = Case { history: vec![record(1, None)], pods: vec![other], looked_up: false, ..Case::default() };
    assert_eq!(case.next(), Next::Confirm(Unread::Pod(1)));
    case.looked_up = true;
    assert_eq!(case.next(), Next::EndPods(vec![("another".into(), "t-1".into())]));
}

#[test]
fn a_claim_without_a_pod_uses_up_its_number() {
    let case = Case { claims: vec![1], ..Case::default() };
    assert_eq!(case.next(), Next::Start(2));
    let ours = Case { claims: vec![1], reusable: Some(1), ..Case::default() };
    assert_eq!(ours.next(), Next::Start(1));
}

#[rstest::rstest]
#[case::pull(PodView { agent_started: None, stuck: Some(WaitingReason { reason: "ImagePull", since: Some(at(-60)), fatal: true }), ..pod(1) }, Some("ImagePull"))]
#[case::pull_for_a_moment(PodView { agent_started: None, stuck: Some(WaitingReason { reason: "ImagePull", since: Some(at(-59)), fatal: true }), ..pod(1) }, None)]
#[case::unschedulable(PodView { agent_started: None, accepted: None, stuck: Some(WaitingReason { reason: "Unschedulable", since: Some(at(-9999)), fatal: false }), ..pod(1) }, None)]
#[case::never_started(PodView { agent_started: None, accepted: Some(at(-300)), ..pod(1) }, Some("StartTimeout"))]
fn a_pod_that_does_not_get_on(#[case] pod: PodView, #[case] reason: Option<&str>) {
    let case = Case { pods: vec![pod], ..Case::default() };
    let decision = case.decide_at(at(0));
    assert_eq!(decision.attempts[0].reason.as_deref(), reason);
    match (reason, decision.next) {
        (Some(_), next) => assert_eq!(next, Next::EndPods(vec![("pod-1".into(), "t-1".into())])),
        (None, Next::Run { until, .. }) => {
            if let Some(until) = until {
                assert!(until > at(0));
            }
        }
        (None, next) => panic!("{next:?}"),
    }
}

#[test]
fn deletion_ends_the_pod_seals_and_lets_go() {
    let mut case = Case { deleting: true, pods: vec![pod(1)], claims: vec![1], ..Case::default() };
    assert_eq!(case.next(), Next::EndPods(vec![("pod-1".into(), "t-1".into())]));
    case.pods[0].deleting = true;
    assert_eq!(case.next(), Next::EndPods(vec![]));
    case.history = vec![record(1, Some((Some(Infrastructure), "PodDeleted")))];
    case.pods.clear();
    assert_eq!(case.next(), seal_of(1, "Failed", "Cancelled", "Deleted", None));
    case.phase = Some(Phase::Failed);
    case.sealed = true;
    assert_eq!(case.next(), Next::Release);
    case.finalizer = false;
    assert_eq!(case.next(), Next::Nothing);
}

#[test]
fn deletion_of_a_success_that_is_not_sealed_seals_it_as_one() {
    let case = Case { deleting: true, pods: vec![ended(1, None, "AgentSucceeded")], ..Case::default() };
    assert_eq!(case.next(), seal_of(1, "Succeeded", "", "AgentSucceeded", Some(0)));
}

#[test]
fn deletion_of_what_never_started_lets_go() {
    assert_eq!(Case { deleting: true, ..Case::default() }.next(), Next::Release);
    // A NetworkPolicy exists and a pod may have run, so the log is sealed.
    let claimed = Case { deleting: true, claims: vec![1], ..Case::default() };
    assert_eq!(claimed.next(), seal_of(1, "Failed", "Cancelled", "Deleted", None));
}

#[test]
fn the_status_keeps_a_bounded_number_of_attempts() {
    let history: Vec<_> = (1..=70).map(|n| record(n, Some((Some(Infrastructure), "NodeLost")))).collect();
    let case = Case { history, retry: Retry { agent: 0, infrastructure: 1000 }, ..Case::default() };
    let decision = case.decide_at(at(1000));
    assert_eq!(decision.attempts.len(), MAX_ATTEMPTS);
    assert_eq!(decision.next, Next::Start(71));
}

fn any_pod() -> impl Strategy<Value = PodView> {
    (1..5_i64, any::<bool>(), 0..4_u8).prop_map(|(attempt, deleting, state)| match state {
        0 => PodView { deleting, ..pod(attempt) },
        1 => PodView { deleting, ..ended(attempt, None, "AgentSucceeded") },
        2 => PodView { deleting, ..ended(attempt, Some(Agent), "NonZeroExit") },
        _ => PodView { deleting, ..ended(attempt, Some(Infrastructure), "Evicted") },
    })
}

fn any_case() -> impl Strategy<Value = Case> {
    let history = proptest::collection::btree_map(1..5_i64, proptest::option::of(0..4_u8), 0..4);
    let pods = proptest::collection::vec(any_pod(), 0..4);
    let claims = proptest::collection::btree_set(1..6_i64, 0..4);
    (any::<(bool, bool, bool)>(), history, pods, claims).prop_map(
        |((deleting, finalizer, gone), history, mut pods, claims)| {
            pods.sort_by_key(|pod| pod.attempt);
            pods.dedup_by_key(|pod| pod.attempt);
            let end = |end: u8| match end {
                0 => (None, "AgentSucceeded"),
                1 => (Some(Agent), "NonZeroExit"),
                2 => (Some(Infrastructure), "PodLost"),
                _ => (Some(Budget), "DeadlineExceeded"),
            };
            Case {
                deleting,
                finalizer,
                history: history.into_iter().map(|(number, ended)| record(number, ended.map(end))).collect(),
                pods,
                claims: claims.into_iter().collect(),
                looked_up: gone,
                ..Case::default()
            }
        },
    )
}

proptest! {
    /// In every state, an attempt starts only if no pod runs, and never under a number that may have been used.
    #[test]
    fn an_attempt_begins_alone_and_under_a_new_number(case in any_case()) {
        if let Next::Start(number) = case.next() {
            prop_assert!(case.pods.iter().all(|pod| pod.terminal), "{:?}", case.pods);
            prop_assert!(!case.deleting);
            for used in case.pods.iter().map(|p| p.attempt).chain(case.history.iter().map(|a| a.number)).chain(case.claims.iter().copied()) {
                prop_assert!(number > used);
            }
        }
    }

    /// The log is sealed, and the finalizer removed, only if no pod runs.
    #[test]
    fn nothing_lives_when_the_log_ends(case in any_case()) {
        if matches!(case.next(), Next::Seal { .. } | Next::Release) {
            prop_assert!(case.pods.iter().all(|pod| pod.terminal));
        }
    }

    /// Recording a decision's attempts does not change the decision.
    #[test]
    fn what_is_recorded_stays(case in any_case()) {
        let first = case.decide_at(at(0));
        if !matches!(first.next, Next::Confirm(_) | Next::Nothing) {
            let again = Case { history: first.attempts.clone(), failures: first.failures.clone(), ..case };
            let second = again.decide_at(at(0));
            prop_assert_eq!(first, second);
        }
    }
}

/// A pod that is not as planned did not run what the task asked for, however it ended. It is not a success, and not a failure of the task.
#[test]
fn a_pod_that_is_not_as_planned_is_tried_again_and_is_no_success() {
    let altered = |pod: PodView| PodView { altered: Some("container `mesh` was added".into()), ..pod };
    for pod in [altered(pod(1)), altered(ended(1, None, "AgentSucceeded"))] {
        let decision = Case { pods: vec![pod], claims: vec![1], ..Case::default() }.decide_at(at(0));
        let last = decision.attempts.last().unwrap();
        assert_eq!((last.failure_class, last.reason.as_deref()), (Some(Infrastructure), Some(POD_ALTERED)));
        assert!(!matches!(decision.next, Next::Seal { .. }), "{decision:?}");
    }
    // However often it happens, the task waits, longer each time, and does not fail.
    let history: Vec<_> = (1..=9).map(|number| record(number, Some((Some(Infrastructure), POD_ALTERED)))).collect();
    let case = Case { history, claims: (1..=9).collect(), ..Case::default() };
    assert!(matches!(case.next(), Next::Pause(_)), "{:?}", case.next());
    assert_eq!(case.decide_at(at(200)).next, Next::Start(10));
}

/// A step that would end an attempt, delete a pod or seal a log waits until the state is read. No other step waits.
#[test]
fn what_was_not_just_read_decides_nothing_that_cannot_be_undone() {
    let old = |pod: PodView| PodView { live: false, ..pod };
    let over = PodView { agent_started: Some(at(-70)), ..pod(1) };
    let stuck = PodView {
        agent_started: None,
        stuck: Some(WaitingReason { reason: "ImagePull", since: Some(at(-61)), fatal: true }),
        ..pod(1)
    };
    let unstarted = PodView { agent_started: None, accepted: Some(at(-301)), ..pod(1) };
    for pod in [over, stuck, unstarted, ended(1, None, "AgentSucceeded"), ended(1, Some(Agent), "NonZeroExit")] {
        let case = Case { pods: vec![old(pod.clone())], claims: vec![1], looked_up: false, ..Case::default() };
        assert_eq!(case.next(), Next::Confirm(Unread::Pod(1)), "{pod:?}");
        let read = Case { pods: vec![pod], ..case };
        assert!(matches!(read.next(), Next::EndPods(_) | Next::Seal { .. } | Next::Start(2)), "{:?}", read.next());
    }
    // A pod of an earlier attempt that must end, and a pod of a deleted task.
    let case = Case { pods: vec![old(pod(1)), pod(2)], ..Case::default() };
    assert_eq!(case.next(), Next::Confirm(Unread::Pod(1)));
    let case = Case { deleting: true, pods: vec![pod(1)], live: false, ..Case::default() };
    assert_eq!(case.next(), Next::Confirm(Unread::Task));
    // A failure with a rollback is sealed by the current state of the task. A success, and a failure without a rollback, need no other
    // read.
    let failed = |rolls_back| Case {
        pods: vec![ended(1, Some(Agent), "NonZeroExit")],
        live: false,
        rolls_back,
        retry: Retry { agent: 0, infrastructure: 0 },
        ..Case::default()
    };
    assert_eq!(failed(true).next(), Next::Confirm(Unread::Task));
    assert!(matches!(failed(false).next(), Next::Seal { .. }));
    let well = Case { pods: vec![ended(1, None, "AgentSucceeded")], live: false, ..Case::default() };
    assert!(matches!(well.next(), Next::Seal { .. }));
    // Nothing is read while nothing is due.
    let rests = Case { pods: vec![old(pod(1))], live: false, looked_up: false, ..Case::default() };
    assert!(matches!(rests.next(), Next::Run { .. }));
}

/// The watch of NetworkPolicies may work while the watch of pods is stale, and an operator may end between the creation of a pod and the
/// status update.
#[test]
fn a_claim_without_a_pod_is_looked_up_before_another_attempt_starts() {
    let case = Case { claims: vec![1], looked_up: false, ..Case::default() };
    assert_eq!(case.next(), Next::Confirm(Unread::Pod(1)));
    let there = Case { claims: vec![1], pods: vec![pod(1)], ..Case::default() };
    assert!(matches!(there.next(), Next::Run { attempt: 1, .. }));
    let failed = record(1, Some((Some(Infrastructure), "Evicted")));
    let case = Case { history: vec![failed], claims: vec![1, 2], looked_up: false, ..Case::default() };
    assert_eq!(case.decide_at(at(200)).next, Next::Confirm(Unread::Pod(2)));
    assert_eq!(Case { looked_up: true, ..case }.decide_at(at(200)).next, Next::Start(3));
    // A pod that was certainly never created is not looked up, and neither is a known attempt.
    let case = Case { claims: vec![1], reusable: Some(1), looked_up: false, ..Case::default() };
    assert_eq!(case.next(), Next::Start(1));
}

/// Kubelets that were cut off as well have not yet reported what happened in the meantime.
#[test]
fn after_a_break_nothing_is_concluded_from_silence() {
    let over = PodView { agent_started: Some(at(-70)), ..pod(1) };
    let case = Case { pods: vec![over], in_touch_since: at(-10), ..Case::default() };
    assert_eq!(case.next(), Next::Run { attempt: 1, until: Some(at(-10 + SETTLING_SECONDS)) });
    assert!(matches!(case.decide_at(at(SETTLING_SECONDS)).next, Next::EndPods(_)));
}

#[test]
fn what_the_clock_says_is_presumed_until_the_pod_has_spoken() {
    let over = PodView { agent_started: Some(at(-70)), ..pod(1) };
    let case = Case { pods: vec![over.clone()], ..Case::default() };
    let told = case.decide_at(at(0));
    assert!(told.attempts[0].presumed);
    assert_eq!(told.failures, BTreeMap::from([("Budget".to_owned(), 1)]));
    let then = |pod: Option<PodView>| {
        let case = Case {
            history: told.attempts.clone(),
            failures: told.failures.clone(),
            pods: pod.into_iter().collect(),
            ..Case::default()
        };
        case.decide_at(at(1))
    };
    // The agent had succeeded before its time was over.
    let well = ended(1, None, "AgentSucceeded");
    let well = PodView { agent_started: Some(at(-70)), agent_finished: Some(at(-50)), ..well };
    let decision = then(Some(well.clone()));
    assert_eq!(decision.next, seal_of(1, "Succeeded", "", "AgentSucceeded", Some(0)));
    assert_eq!(decision.failures["Budget"], 0);
    // The agent ran until it was stopped, or until after its time.
    let end = End { class: Some(Infrastructure), reason: "PodDeleted", exit_code: Some(143) };
    let stopped = PodView { end: Some(end), agent_finished: Some(at(1)), ..well.clone() };
    let late = PodView { agent_finished: Some(at(-5)), ..well };
    for pod in [stopped, late] {
        let decision = then(Some(pod));
        assert!(!decision.attempts[0].presumed);
        assert!(
            matches!(&decision.next, Next::Seal { closed, presumed: false, .. } if closed.reason == "DeadlineExceeded")
        );
    }
    // No component saw the end.
    assert!(
        matches!(&then(None).next, Next::Seal { closed, presumed: true, .. } if closed.reason == "DeadlineExceeded")
    );
}

/// The status keeps 64 attempts. If all are parked, they displace the earlier failures, which stay counted.
#[test]
fn a_retry_budget_does_not_refill() {
    let parked = (3..=70).map(|number| record(number, Some((Some(Dependency), "EvidenceUnavailable"))));
    let fails = record(71, Some((Some(Agent), "NonZeroExit")));
    let history: Vec<_> = parked.chain([fails]).collect();
    let failures = BTreeMap::from([("Agent".to_owned(), 2), ("Dependency".to_owned(), 68)]);
    let case = Case { history: history.clone(), failures, ..Case::default() };
    assert!(matches!(case.next(), Next::Seal { attempt: 71, .. }), "{:?}", case.next());
    // The control: the kept attempts show one failure only.
    assert!(matches!(Case { history, ..Case::default() }.next(), Next::Start(72)));
}

/// The first attempts failed, and their pods still exist for debugging. Then the bucket is unavailable for 70 attempts.
#[test]
fn seventy_parked_attempts_leave_every_other_budget_as_it_was() {
    let retry = Retry { agent: 1, infrastructure: 1 };
    let mut case = Case { retry, ..Case::default() };
    let mut now = at(0);
    let mut attempt = |number: i64, class, reason, stays: bool| {
        case.pods.push(ended(number, Some(class), reason));
        // Reconciled more than once.
        for _ in 0..2 {
            let Decision { attempts, failures, .. } = case.decide_at(now);
            (case.history, case.failures) = (attempts, failures);
        }
        case.pods.retain(|pod| stays || pod.attempt != number);
        now += SignedDuration::from_mins(5);
        case.decide_at(now).next
    };
    assert_eq!(attempt(1, Agent, "NonZeroExit", true), Next::Start(2));
    assert_eq!(attempt(2, Infrastructure, "Evicted", true), Next::Start(3));
    for number in 3..73 {
        assert_eq!(attempt(number, Dependency, "EvidenceUnavailable", false), Next::Start(number + 1));
    }
    let next = attempt(73, Infrastructure, "Evicted", false);
    assert!(
        matches!(&next, Next::Seal { attempt: 73, closed, .. } if closed.failure_class == "Infrastructure"),
        "{next:?}"
    );
    let counts = [("Agent".to_owned(), 1), ("Dependency".to_owned(), 70), ("Infrastructure".to_owned(), 2)];
    assert_eq!(case.failures, BTreeMap::from(counts));
    // The same holds for retries after failures of the agent.
    case.failures.insert("Infrastructure".to_owned(), 1);
    case.history.pop();
    case.history.push(record(73, Some((Some(Agent), "NonZeroExit"))));
    case.failures.insert("Agent".to_owned(), 2);
    assert!(matches!(case.next(), Next::Seal { attempt: 73, .. }));
    // The other classes have no retries, and get none.
    for (class, reason) in
        [(Policy, "TooManyDenials"), (Budget, "DeadlineExceeded"), (Cancelled, "Deleted"), (Unknown, "VerdictUnknown")]
    {
        case.history.pop();
        case.history.push(record(73, Some((Some(class), reason))));
        case.failures.insert(class.name().to_owned(), 1);
        assert!(matches!(case.next(), Next::Seal { attempt: 73, .. }), "{reason}: {:?}", case.next());
    }
}
