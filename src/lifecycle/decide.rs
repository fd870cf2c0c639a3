//! Decides what to do next about a task, from its observed state. The decision is a pure function.
//!
//! Guarantees:
//!
//! - A new attempt starts only when no pod of the task can act any more, and under a number that was never used.
//! - An end is recorded before anything acts on it.
//! - An attempt is ended, a pod deleted or a log sealed only because of state that was read from the API server in this reconciliation. If
//!   the state is older, the decision is to read it first.
//! - An end that follows only from the clock is presumed, and what the pod itself reports replaces it. The sealed log has precedence over
//!   both.
//!
//! Non-goals: Clocks and clients. The same observation always gives the same decision.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::observe::{End, PodView};
use crate::{
    api::agent_task::{Attempt, Phase, Retry},
    ends::{AttemptEnd, FailureClass, POD_ALTERED, Retries, TIME_OVER},
    evidence::record::TaskClosed,
    render::pod::START_ALLOWANCE_SECONDS,
};

/// How long a pod may fail to pull an image or to be configured, in seconds. A registry can recover from a short failure in this time.
const STUCK_SECONDS: i64 = 60;
/// Seconds after the wall time in which the harness, which then stops every call by itself, closes its log and ends.
const CLOSING_SECONDS: i64 = 5;
/// Seconds after an interruption in which the API server did not answer. During this time, nothing is concluded from what a pod does not
/// report: kubelets were cut off as well, and report within some seconds of the API server's return what happened in the meantime.
pub const SETTLING_SECONDS: i64 = 45;
/// The longest pause before another attempt, in seconds.
const MAX_PAUSE_SECONDS: i64 = 60;
/// The number of attempts that a task's status keeps.
pub const MAX_ATTEMPTS: usize = 64;

/// The observed state of a task.
#[derive(Clone, Debug)]
pub struct Observed<'a> {
    /// The task's UID. It spreads the pauses of tasks that failed together.
    pub uid: &'a str,
    /// Whether the deletion of the task was requested.
    pub deleting: bool,
    /// Whether the task has Belay's finalizer.
    pub finalizer: bool,
    /// The task's phase.
    pub phase: Option<Phase>,
    /// Whether the task's evidence is sealed.
    pub sealed: bool,
    /// Whether the task was read from the API server just now.
    pub live: bool,
    /// Whether a rollback task is created if the task fails.
    pub rolls_back: bool,
    /// How often the task may be retried.
    pub retry: &'a Retry,
    /// The seconds that an attempt may run.
    pub wall_time_seconds: i64,
    /// The attempts in the task's status.
    pub history: &'a [Attempt],
    /// The number of failed attempts by failure class, as the task's status has it.
    pub failures: &'a BTreeMap<String, i64>,
    /// The task's pods.
    pub pods: &'a [PodView],
    /// The attempts that have a NetworkPolicy. The NetworkPolicy is created before the pod and outlives it, until a status has a later
    /// attempt.
    pub claims: &'a [i64],
    /// An attempt with a NetworkPolicy whose pod was certainly never created.
    pub reusable: Option<i64>,
    /// The attempts whose pod was looked up at the API server in this reconciliation. If such a pod is not among `pods`, it does not exist.
    pub looked_up: &'a BTreeSet<i64>,
    /// The time since which the API server has answered without interruption.
    pub in_touch_since: Timestamp,
    /// The current time, by the API server's clock.
    pub now: Timestamp,
}

/// An object that must be read from the API server before a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// The task.
    Task,
    /// The pod of this attempt.
    Pod(i64),
}

/// The next step for a task.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// Do nothing. The task needs no more work.
    Nothing,
    /// Wait until this time. An attempt failed, and the next one must wait.
    Pause(Timestamp),
    /// Create the objects of this attempt.
    Start(i64),
    /// An attempt is running. Check it again at a later time.
    Run {
        /// The number of the attempt.
        attempt: i64,
        /// The time at which something may be due even if no object changes.
        until: Option<Timestamp>,
    },
    /// Delete these pods, given by UID and name, whose deletion was not requested yet, and wait until all other pods that must end have
    /// ended.
    EndPods(Vec<(String, String)>),
    /// The known state is old. Read this object and decide again.
    Confirm(Unread),
    /// Seal the log.
    Seal {
        /// The number of the last attempt.
        attempt: i64,
        /// The end of the task.
        closed: TaskClosed,
        /// No component saw the end, so the log has precedence.
        presumed: bool,
    },
    /// Remove the finalizer of a deleted task.
    Release,
}

impl Next {
    /// Returns one word for the step, for traces.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Pause(_) => "pause",
            Self::Start(_) => "start",
            Self::Run { .. } => "run",
            Self::EndPods(_) => "end-pods",
            Self::Confirm(_) => "confirm",
            Self::Seal { .. } => "seal",
            Self::Release => "release",
        }
    }
}

/// The updated attempts and the next step.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The attempts, oldest first.
    pub attempts: Vec<Attempt>,
    /// The number of failed attempts, by failure class.
    pub failures: BTreeMap<String, i64>,
    /// The next step.
    pub next: Next,
}

/// Decides what to do next about a task.
pub fn decide(observed: &Observed<'_>) -> Decision {
    let before = || (observed.history.to_vec(), failures(observed));
    let ended = matches!(observed.phase, Some(Phase::Succeeded | Phase::Failed)) && observed.sealed;
    if observed.deleting && !observed.finalizer || ended && !observed.deleting {
        let (attempts, failures) = before();
        return Decision { attempts, failures, next: Next::Nothing };
    }
    let (attempts, failures) = match attempts(observed) {
        Ok(known) => known,
        Err(unread) => {
            let (attempts, failures) = before();
            return Decision { attempts, failures, next: Next::Confirm(unread) };
        }
    };
    let next = match observed.deleting {
        true => cleanup(observed, &attempts, ended),
        false => pursue(observed, &attempts, &failures),
    };
    Decision { attempts, failures, next }
}

/// Returns the failures by class before this reconciliation. For a status that was written before failures were counted, it counts the
/// attempts in the status.
fn failures(observed: &Observed<'_>) -> BTreeMap<String, i64> {
    let mut failures = observed.failures.clone();
    if failures.is_empty() {
        observed
            .history
            .iter()
            .filter(|attempt| attempt.reason.as_deref() != Some(POD_ALTERED))
            .filter_map(|attempt| attempt.failure_class)
            .for_each(|class| count(&mut failures, class, 1));
    }
    failures
}

fn count(failures: &mut BTreeMap<String, i64>, class: FailureClass, more: i64) {
    let count = failures.entry(class.name().to_owned()).or_default();
    *count = count.saturating_add(more).max(0);
}

/// Returns the status's attempts and failures, updated from the pods. `Err` says what must be read first.
fn attempts(observed: &Observed<'_>) -> Result<(Vec<Attempt>, BTreeMap<String, i64>), Unread> {
    let mut attempts = observed.history.to_vec();
    let mut failures = failures(observed);
    // An attempt that the status has dropped was recorded and counted once.
    let oldest = attempts.first().filter(|_| attempts.len() >= MAX_ATTEMPTS).map_or(0, |oldest| oldest.number);
    for pod in observed.pods {
        if pod.attempt > oldest && attempts.iter().all(|attempt| attempt.number != pod.attempt) {
            attempts.push(Attempt {
                number: pod.attempt,
                pod: pod.name.clone(),
                pod_uid: pod.uid.clone(),
                started_at: pod.created.map(Time),
                finished_at: None,
                failure_class: None,
                reason: None,
                presumed: false,
            });
        }
    }
    attempts.sort_by_key(|attempt| attempt.number);
    let newest = attempts.last().map(|attempt| attempt.number);
    for attempt in &mut attempts {
        let pod = observed.pods.iter().find(|pod| pod.uid == attempt.pod_uid);
        if attempt.finished_at.is_some() {
            let newest = Some(attempt.number) == newest;
            if let Some(pod) = pod.filter(|pod| attempt.presumed && newest && pod.terminal) {
                own_word(attempt, pod, observed, &mut failures)?;
            }
            continue;
        }
        let judged = match pod {
            Some(pod) => pod_end(pod, observed)?,
            None if observed.looked_up.contains(&attempt.number) => {
                let end = End { class: Some(FailureClass::Infrastructure), reason: "PodLost", exit_code: None };
                Some((end, true))
            }
            None => return Err(Unread::Pod(attempt.number)),
        };
        if let Some((end, presumed)) = judged {
            attempt.finished_at = Some(Time(observed.now));
            attempt.failure_class = end.class;
            attempt.reason = Some(end.reason.to_owned());
            attempt.presumed = presumed;
            // An altered pod is not a failure of the task.
            let counted = end.class.filter(|_| end.reason != POD_ALTERED);
            counted.into_iter().for_each(|class| count(&mut failures, class, 1));
        }
    }
    // Keep the newest attempts, so that the numbers keep growing. The evidence says how the dropped attempts failed.
    let excess = attempts.len().saturating_sub(MAX_ATTEMPTS);
    attempts.drain(..excess);
    Ok((attempts, failures))
}

/// Applies the end that a pod reports to an attempt whose end was presumed: the presumed end is confirmed or replaced.
fn own_word(
    attempt: &mut Attempt,
    pod: &PodView,
    observed: &Observed<'_>,
    failures: &mut BTreeMap<String, i64>,
) -> Result<(), Unread> {
    let Some(end) = &pod.end else { return Ok(()) };
    if !pod.live {
        return Err(Unread::Pod(pod.attempt));
    }
    attempt.presumed = false;
    let out_of_time = attempt.failure_class == Some(FailureClass::Budget)
        && later(pod.agent_started, wall(pod, observed).saturating_sub(CLOSING_SECONDS)) <= pod.agent_finished
        && pod.agent_finished.is_some();
    // The agent was still running when the pod was stopped for the presumed reason.
    if end.reason == "PodDeleted" || out_of_time {
        return Ok(());
    }
    attempt.failure_class.into_iter().for_each(|class| count(failures, class, -1));
    end.class.into_iter().for_each(|class| count(failures, class, 1));
    attempt.failure_class = end.class;
    attempt.reason = Some(end.reason.to_owned());
    Ok(())
}

/// Returns the end of a pod: the one that the pod reports, or a presumed one because its time is over.
fn pod_end(pod: &PodView, observed: &Observed<'_>) -> Result<Option<(End, bool)>, Unread> {
    let unread = || Err(Unread::Pod(pod.attempt));
    // Whatever ran in the pod was not what the task asked for, so it is not a success.
    if pod.altered.is_some() {
        let altered = End { class: Some(FailureClass::Infrastructure), reason: POD_ALTERED, exit_code: None };
        return if pod.live { Ok(Some((altered, false))) } else { unread() };
    }
    if let Some(end) = &pod.end {
        // The deletion of the pod was requested, and the end of its agent is not known yet.
        let presumed = !pod.terminal && end.class == Some(FailureClass::Infrastructure) && end.exit_code.is_none();
        return if pod.live { Ok(Some((end.clone(), presumed))) } else { unread() };
    }
    match overdue(pod, observed) {
        Some((at, _)) if at > observed.now => Ok(None),
        Some(_) if !pod.live => unread(),
        Some((_, (class, reason))) => Ok(Some((End { class: Some(class), reason, exit_code: None }, true))),
        None => Ok(None),
    }
}

/// Returns when the end of a pod is due even if its status does not change, and the failure class and reason of that end.
fn overdue(pod: &PodView, observed: &Observed<'_>) -> Option<(Timestamp, (FailureClass, &'static str))> {
    let infrastructure = |reason| (FailureClass::Infrastructure, reason);
    let wall = later(pod.agent_started, wall(pod, observed)).map(|at| (at, TIME_OVER));
    let stuck = pod.stuck.as_ref().filter(|stuck| stuck.fatal);
    let stuck = stuck.and_then(|stuck| Some((later(stuck.since, STUCK_SECONDS)?, infrastructure(stuck.reason))));
    let start = later(pod.accepted, START_ALLOWANCE_SECONDS).filter(|_| pod.agent_started.is_none());
    let start = start.map(|at| (at, infrastructure("StartTimeout")));
    let (at, end) = [wall, stuck, start].into_iter().flatten().min_by_key(|(at, _)| *at)?;
    Some((later(Some(observed.in_touch_since), SETTLING_SECONDS).map_or(at, |settled| at.max(settled)), end))
}

/// Returns the seconds after the start of the agent at which a pod's time is over, whatever its harness reports: the wall time plus the
/// time for which calls may wait for approval.
fn wall(pod: &PodView, observed: &Observed<'_>) -> i64 {
    let lifetime = pod.lifetime.map(|seconds| seconds.saturating_sub(START_ALLOWANCE_SECONDS));
    lifetime.unwrap_or(observed.wall_time_seconds).saturating_add(CLOSING_SECONDS)
}

/// Returns the next step for a task that is not being deleted.
fn pursue(observed: &Observed<'_>, attempts: &[Attempt], failures: &BTreeMap<String, i64>) -> Next {
    let Some(last) = attempts.last() else {
        return start(observed, 0);
    };
    if let Some(next) = end_pods(observed, |pod| pod.attempt < last.number) {
        return next;
    }
    if last.finished_at.is_none() {
        let pod = observed.pods.iter().find(|pod| pod.uid == last.pod_uid);
        return Next::Run { attempt: last.number, until: pod.and_then(|pod| overdue(pod, observed)).map(|(at, _)| at) };
    }
    if let Some(next) = end_pods(observed, |_| true) {
        return next;
    }
    match last.failure_class {
        None => seal(observed, attempts, last.number),
        Some(class) => match pause(observed, attempts, failures, class) {
            Some(until) if until > observed.now => Next::Pause(until),
            Some(_) => start(observed, last.number),
            None => seal(observed, attempts, last.number),
        },
    }
}

/// Returns the next step for a task that is being deleted.
fn cleanup(observed: &Observed<'_>, attempts: &[Attempt], sealed: bool) -> Next {
    if let Some(next) = end_pods(observed, |_| true) {
        return next;
    }
    let newest = attempts.last().map(|attempt| attempt.number);
    match newest.into_iter().chain(observed.claims.iter().copied()).max() {
        Some(newest) if !sealed => seal(observed, attempts, newest),
        _ => Next::Release,
    }
}

/// Returns the step that ends the matching pods that still run, or `None` if none runs.
fn end_pods(observed: &Observed<'_>, which: impl Fn(&PodView) -> bool) -> Option<Next> {
    let running: Vec<_> = observed.pods.iter().filter(|pod| !pod.terminal && which(pod)).collect();
    let untold = || running.iter().filter(|pod| !pod.deleting);
    if let Some(pod) = untold().find(|pod| !pod.live) {
        return Some(Next::Confirm(Unread::Pod(pod.attempt)));
    }
    if observed.deleting && !observed.live && untold().next().is_some() {
        return Some(Next::Confirm(Unread::Task));
    }
    let untold = untold().map(|pod| (pod.uid.clone(), pod.name.clone())).collect();
    (!running.is_empty()).then_some(Next::EndPods(untold))
}

/// Returns the step that starts a new attempt after `last`. An attempt that was claimed since, and that is not in the status yet, may have
/// a pod that a stale cache does not show. An old status may not have the attempt after `last`.
fn start(observed: &Observed<'_>, last: i64) -> Next {
    if last > 0 && !observed.live {
        return Next::Confirm(Unread::Task);
    }
    let unseen =
        |claim: &&i64| **claim > last && Some(**claim) != observed.reusable && !observed.looked_up.contains(*claim);
    match observed.claims.iter().find(unseen) {
        Some(claim) => Next::Confirm(Unread::Pod(*claim)),
        None => Next::Start(next_number(observed, last)),
    }
}

/// Returns a number that no pod of this task has had. An attempt with a NetworkPolicy and without a pod may have had a pod.
fn next_number(observed: &Observed<'_>, last: i64) -> i64 {
    let claimed = observed.claims.iter().copied().filter(|claim| Some(*claim) != observed.reusable).max();
    last.max(claimed.unwrap_or_default()).saturating_add(1)
}

/// Returns when the next attempt may start, or `None` if no retry is left.
fn pause(
    observed: &Observed<'_>,
    attempts: &[Attempt],
    failures: &BTreeMap<String, i64>,
    class: FailureClass,
) -> Option<Timestamp> {
    let reason = attempts.last()?.reason.as_deref();
    let altered = reason == Some(POD_ALTERED);
    let allowed = match class.retries() {
        _ if reason == AttemptEnd::LogFailed.status().map(|(_, reason)| reason) => return None,
        // The administrator must fix it, and it is not a failure of the task.
        _ if altered => i64::MAX,
        Retries::Never => 0,
        Retries::Agent => observed.retry.agent,
        Retries::Infrastructure => observed.retry.infrastructure,
        Retries::Unlimited => i64::MAX,
    };
    let failures = if altered {
        let altered = attempts.iter().filter(|attempt| attempt.reason.as_deref() == Some(POD_ALTERED)).count();
        i64::try_from(altered).unwrap_or(i64::MAX)
    } else {
        failures.get(class.name()).copied().unwrap_or_default()
    };
    if failures > allowed {
        return None;
    }
    let last = attempts.last()?.finished_at.as_ref().map(|time| time.0)?;
    // The first retry starts at once, because the most common cause is the node. Later retries wait 2, 4, 8, … seconds, plus up to half as
    // much. A dependency that was unavailable for minutes gets the longest pause from the first retry on.
    let seconds = match failures {
        _ if class.retries() == Retries::Unlimited => MAX_PAUSE_SECONDS,
        ..=1 => 0,
        n => 2_i64.saturating_pow(u32::try_from(n - 1).unwrap_or(u32::MAX)).min(MAX_PAUSE_SECONDS),
    };
    later(Some(last), seconds.saturating_add(spread(observed.uid, seconds / 2)))
}

/// Returns a number from 0 to `most` that depends on the task's UID only.
fn spread(uid: &str, most: i64) -> i64 {
    let hash = uid.bytes().fold(0_i64, |hash, byte| (hash * 31 + i64::from(byte)) % 1_000_003);
    hash.checked_rem(most.saturating_add(1)).unwrap_or_default()
}

fn seal(observed: &Observed<'_>, attempts: &[Attempt], attempt: i64) -> Next {
    let last = attempts.last().filter(|last| last.number == attempt && last.finished_at.is_some());
    let pod = last.and_then(|last| observed.pods.iter().find(|pod| pod.uid == last.pod_uid));
    match pod {
        Some(pod) if !pod.live => return Next::Confirm(Unread::Pod(attempt)),
        None if !observed.looked_up.contains(&attempt) => return Next::Confirm(Unread::Pod(attempt)),
        _ => {}
    }
    let failed = last.is_none_or(|last| last.failure_class.is_some());
    // Whether the task is being deleted decides how it is sealed, and whether a rollback task is created.
    if !observed.live && (observed.deleting || failed && observed.rolls_back) {
        return Next::Confirm(Unread::Task);
    }
    let exit_code = pod.and_then(|pod| pod.end.as_ref()).and_then(|end| end.exit_code);
    let images = pod.map(|pod| pod.images.clone()).unwrap_or_default();
    let closed = match last {
        Some(Attempt { failure_class: None, reason, .. }) => {
            TaskClosed::succeeded(reason.as_deref().unwrap_or("AgentSucceeded"))
        }
        // A deleted task whose last attempt failed might have had a retry, so it was cancelled.
        Some(Attempt { failure_class: Some(class), reason, .. }) if !observed.deleting => {
            TaskClosed::failed(*class, reason.as_deref().unwrap_or("PodFailed"))
        }
        _ => TaskClosed::failed(FailureClass::Cancelled, "Deleted"),
    };
    let closed = TaskClosed { exit_code, images, ..closed };
    let cancelled = closed.class() == Some(FailureClass::Cancelled);
    // The pod was being stopped, and its agent reports success. Times have whole seconds, so it is unknown whether the agent finished
    // before.
    let may_be_done = closed.class() == Some(FailureClass::Infrastructure) && closed.exit_code == Some(0);
    let presumed = !cancelled && (may_be_done || last.is_some_and(|last| last.presumed));
    Next::Seal { attempt, closed, presumed }
}

/// Returns the time `seconds` after `since`.
pub fn later(since: Option<Timestamp>, seconds: i64) -> Option<Timestamp> {
    since.and_then(|since| since.checked_add(SignedDuration::from_secs(seconds)).ok())
}

/// Returns the duration until `until`, at least 50 ms.
pub fn wait(until: Timestamp, now: Timestamp) -> Duration {
    const LEAST: Duration = Duration::from_millis(50);
    Duration::try_from(until.duration_since(now)).unwrap_or_default().max(LEAST)
}

#[cfg(test)]
mod tests;
