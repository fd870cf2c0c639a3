//! What to do next about a task, from what is seen of it: a pure function.
//!
//! Promises: a new attempt starts only when no pod of the task can act any more, under a number that was never used; an end is
//! recorded before anything acts on it; the last word is the sealed log. Refuses: clocks and clients; the same observation
//! always gives the same decision.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::observe::{End, POD_ALTERED, PodView};
use crate::{
    api::agent_task::{Attempt, FailureClass, Phase, Retry},
    evidence::record::TaskClosed,
    plan::pod::START_ALLOWANCE_SECONDS,
};

/// For how long a pod may fail to pull an image or to be configured: long enough for a registry's hiccup.
const STUCK_SECONDS: i64 = 60;
/// Beyond the wall time, at which the harness stops every call by itself, closes its log and ends.
const CLOSING_SECONDS: i64 = 5;
/// Longest pause before another attempt.
const MAX_PAUSE_SECONDS: i64 = 60;
/// A task keeps this many attempts in its status.
pub const MAX_ATTEMPTS: usize = 64;

/// What is seen of a task.
#[derive(Clone, Debug)]
pub struct Observed<'a> {
    /// The task's UID: spreads the pauses of tasks that failed together.
    pub uid: &'a str,
    /// Whether its deletion was asked for.
    pub deleting: bool,
    /// Whether our finalizer is on it.
    pub finalizer: bool,
    /// Its phase.
    pub phase: Option<Phase>,
    /// Whether its evidence is sealed.
    pub sealed: bool,
    /// How often it may be tried again.
    pub retry: &'a Retry,
    /// Seconds that an attempt may run.
    pub wall_time_seconds: i64,
    /// The attempts that its status has.
    pub history: &'a [Attempt],
    /// Its pods.
    pub pods: &'a [PodView],
    /// Attempts that have a NetworkPolicy: made before the pod, they outlive it.
    pub claims: &'a [i64],
    /// A claim whose pod was certainly never made.
    pub reusable: Option<i64>,
    /// The newest recorded pod was looked up at the API server and is not there.
    pub confirmed_gone: bool,
    /// Now.
    pub now: Timestamp,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// Nothing, for ever.
    Nothing,
    /// Nothing until then: an attempt failed, and the next must wait.
    Pause(Timestamp),
    /// Make this attempt's objects.
    Start(i64),
    /// An attempt is under way. Look again then.
    Run {
        /// Its number.
        attempt: i64,
        /// When something may have to be done though nothing changes.
        until: Option<Timestamp>,
    },
    /// These pods must go: UIDs and names of those that were not told yet. The rest is waited for.
    EndPods(Vec<(String, String)>),
    /// The newest recorded pod is not in the cache: look it up.
    Confirm {
        /// Its name.
        pod: String,
    },
    /// Seal the log.
    Seal {
        /// The last attempt.
        attempt: i64,
        /// How the task ended.
        closed: TaskClosed,
    },
    /// Let go of a deleted task.
    Release,
}

impl Next {
    /// One word for it, in traces.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Pause(_) => "pause",
            Self::Start(_) => "start",
            Self::Run { .. } => "run",
            Self::EndPods(_) => "end-pods",
            Self::Confirm { .. } => "confirm",
            Self::Seal { .. } => "seal",
            Self::Release => "release",
        }
    }
}

/// The attempts as they are now known, and what to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Oldest first.
    pub attempts: Vec<Attempt>,
    /// What to do.
    pub next: Next,
}

/// Decides.
pub fn decide(observed: &Observed<'_>) -> Decision {
    let ended = matches!(observed.phase, Some(Phase::Succeeded | Phase::Failed)) && observed.sealed;
    if observed.deleting && !observed.finalizer || ended && !observed.deleting {
        return Decision { attempts: observed.history.to_vec(), next: Next::Nothing };
    }
    let attempts = match attempts(observed) {
        Ok(attempts) => attempts,
        Err(pod) => return Decision { attempts: observed.history.to_vec(), next: Next::Confirm { pod } },
    };
    let next = if observed.deleting { cleanup(observed, &attempts, ended) } else { pursue(observed, &attempts) };
    Decision { attempts, next }
}

/// The status's attempts, brought up to date from the pods. `Err` names a pod that must be looked up first.
fn attempts(observed: &Observed<'_>) -> Result<Vec<Attempt>, String> {
    let mut attempts = observed.history.to_vec();
    for pod in observed.pods {
        if attempts.iter().all(|attempt| attempt.number != pod.attempt) {
            attempts.push(Attempt {
                number: pod.attempt,
                pod: pod.name.clone(),
                pod_uid: pod.uid.clone(),
                started_at: pod.created.map(Time),
                finished_at: None,
                failure_class: None,
                reason: None,
            });
        }
    }
    attempts.sort_by_key(|attempt| attempt.number);
    let newest = attempts.last().map(|attempt| attempt.number);
    for attempt in attempts.iter_mut().filter(|attempt| attempt.finished_at.is_none()) {
        let pod = observed.pods.iter().find(|pod| pod.uid == attempt.pod_uid);
        let end = match pod {
            Some(pod) => pod_end(pod, observed),
            None if Some(attempt.number) == newest && !observed.confirmed_gone => return Err(attempt.pod.clone()),
            None => Some(End { class: Some(FailureClass::Infrastructure), reason: "PodLost", exit_code: None }),
        };
        if let Some(end) = end {
            attempt.finished_at = Some(Time(observed.now));
            attempt.failure_class = end.class;
            attempt.reason = Some(end.reason.to_owned());
        }
    }
    // Keeping the newest keeps the numbers growing; which old ones failed how is in the evidence.
    let excess = attempts.len().saturating_sub(MAX_ATTEMPTS);
    attempts.drain(..excess);
    Ok(attempts)
}

/// The end of a pod, by its own account or because its time is up.
fn pod_end(pod: &PodView, observed: &Observed<'_>) -> Option<End> {
    let over = |since: Option<Timestamp>, seconds: i64| later(since, seconds).is_some_and(|at| at <= observed.now);
    let infrastructure = |reason| Some(End { class: Some(FailureClass::Infrastructure), reason, exit_code: None });
    // Whatever ran there was not what was asked for, and is no success.
    if pod.altered.is_some() {
        return infrastructure(POD_ALTERED);
    }
    if pod.end.is_some() {
        return pod.end.clone();
    }
    if over(pod.agent_started, wall(pod, observed)) {
        return Some(End { class: Some(FailureClass::Budget), reason: "DeadlineExceeded", exit_code: None });
    }
    if let Some(stuck) = pod.stuck.as_ref().filter(|stuck| stuck.fatal && over(stuck.since, STUCK_SECONDS)) {
        return infrastructure(stuck.reason);
    }
    if pod.agent_started.is_none() && over(pod.accepted, START_ALLOWANCE_SECONDS) {
        return infrastructure("StartTimeout");
    }
    None
}

/// Seconds after its agent's start at which a pod's time is up, whatever its harness says: its wall time, and what its calls may wait for
/// people.
fn wall(pod: &PodView, observed: &Observed<'_>) -> i64 {
    let lifetime = pod.lifetime.map(|seconds| seconds.saturating_sub(START_ALLOWANCE_SECONDS));
    lifetime.unwrap_or(observed.wall_time_seconds).saturating_add(CLOSING_SECONDS)
}

/// When a pod's end is due though nothing about it changes.
fn due(pod: &PodView, observed: &Observed<'_>) -> Option<Timestamp> {
    let wall = later(pod.agent_started, wall(pod, observed));
    let stuck = pod.stuck.as_ref().filter(|stuck| stuck.fatal).and_then(|stuck| later(stuck.since, STUCK_SECONDS));
    let start = later(pod.accepted, START_ALLOWANCE_SECONDS).filter(|_| pod.agent_started.is_none());
    [wall, stuck, start].into_iter().flatten().min()
}

/// A task that goes on.
fn pursue(observed: &Observed<'_>, attempts: &[Attempt]) -> Next {
    let Some(last) = attempts.last() else {
        return Next::Start(next_number(observed, 0));
    };
    if let Some(next) = end_pods(observed, |pod| pod.attempt < last.number) {
        return next;
    }
    if last.finished_at.is_none() {
        let pod = observed.pods.iter().find(|pod| pod.uid == last.pod_uid);
        return Next::Run { attempt: last.number, until: pod.and_then(|pod| due(pod, observed)) };
    }
    if let Some(next) = end_pods(observed, |_| true) {
        return next;
    }
    match last.failure_class {
        None => seal(observed, attempts, last.number),
        Some(class) => match pause(observed, attempts, class) {
            Some(until) if until > observed.now => Next::Pause(until),
            Some(_) => Next::Start(next_number(observed, last.number)),
            None => seal(observed, attempts, last.number),
        },
    }
}

/// A task that is being deleted.
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

/// Ends those pods that are still there, if any is.
fn end_pods(observed: &Observed<'_>, which: impl Fn(&PodView) -> bool) -> Option<Next> {
    let live: Vec<_> = observed.pods.iter().filter(|pod| !pod.terminal && which(pod)).collect();
    let untold = live.iter().filter(|pod| !pod.deleting).map(|pod| (pod.uid.clone(), pod.name.clone())).collect();
    (!live.is_empty()).then_some(Next::EndPods(untold))
}

/// A number that no pod of this task has had. What was claimed without a pod to show for it may have had one.
fn next_number(observed: &Observed<'_>, last: i64) -> i64 {
    let claimed = observed.claims.iter().copied().filter(|claim| Some(*claim) != observed.reusable).max();
    last.max(claimed.unwrap_or_default()).saturating_add(1)
}

/// When the next attempt may start, if there may be one.
fn pause(observed: &Observed<'_>, attempts: &[Attempt], class: FailureClass) -> Option<Timestamp> {
    let altered = attempts.last().and_then(|last| last.reason.as_deref()) == Some(POD_ALTERED);
    let allowed = match class {
        // The administrator's to mend, and no failure of the task's.
        _ if altered => i64::MAX,
        FailureClass::Agent => observed.retry.agent,
        FailureClass::Infrastructure => observed.retry.infrastructure,
        // It was nobody's fault of the task's, and is over some time.
        FailureClass::Dependency => i64::MAX,
        FailureClass::Policy | FailureClass::Budget | FailureClass::Cancelled => 0,
    };
    let failures = attempts.iter().filter(|attempt| attempt.failure_class == Some(class)).count();
    let failures = i64::try_from(failures).unwrap_or(i64::MAX);
    if failures > allowed {
        return None;
    }
    let last = attempts.last()?.finished_at.as_ref().map(|time| time.0)?;
    // The first again at once: most often it was the node. Then 2, 4, 8, … seconds, and up to half as much more. What was away for
    // minutes is given them from the first.
    let seconds = match failures {
        _ if class == FailureClass::Dependency => MAX_PAUSE_SECONDS,
        ..=1 => 0,
        n => 2_i64.saturating_pow(u32::try_from(n - 1).unwrap_or(u32::MAX)).min(MAX_PAUSE_SECONDS),
    };
    later(Some(last), seconds.saturating_add(spread(observed.uid, seconds / 2)))
}

/// A number from 0 to `most` that is the task's own.
fn spread(uid: &str, most: i64) -> i64 {
    let hash = uid.bytes().fold(0_i64, |hash, byte| (hash * 31 + i64::from(byte)) % 1_000_003);
    hash.checked_rem(most.saturating_add(1)).unwrap_or_default()
}

fn seal(observed: &Observed<'_>, attempts: &[Attempt], attempt: i64) -> Next {
    let last = attempts.last().filter(|last| last.number == attempt && last.finished_at.is_some());
    let pod = last.and_then(|last| observed.pods.iter().find(|pod| pod.uid == last.pod_uid));
    let exit_code = pod.and_then(|pod| pod.end.as_ref()).and_then(|end| end.exit_code);
    let images = pod.map(|pod| pod.images.clone()).unwrap_or_default();
    let outcome = |phase: &str, class: Option<FailureClass>, reason: &str| TaskClosed {
        phase: phase.to_owned(),
        failure_class: class.map(|class| class_name(class).to_owned()).unwrap_or_default(),
        reason: reason.to_owned(),
        exit_code,
        images: images.clone(),
    };
    let closed = match last {
        Some(Attempt { failure_class: None, reason, .. }) => {
            outcome("Succeeded", None, reason.as_deref().unwrap_or("AgentSucceeded"))
        }
        // A deleted task whose last attempt had failed might have been tried again: it was cancelled.
        Some(Attempt { failure_class: Some(class), reason, .. }) if !observed.deleting => {
            outcome("Failed", Some(*class), reason.as_deref().unwrap_or("PodFailed"))
        }
        _ => outcome("Failed", Some(FailureClass::Cancelled), "Deleted"),
    };
    Next::Seal { attempt, closed }
}

/// The class's name in records, status and metrics.
pub fn class_name(class: FailureClass) -> &'static str {
    match class {
        FailureClass::Policy => "Policy",
        FailureClass::Infrastructure => "Infrastructure",
        FailureClass::Dependency => "Dependency",
        FailureClass::Agent => "Agent",
        FailureClass::Budget => "Budget",
        FailureClass::Cancelled => "Cancelled",
    }
}

/// The class of that name.
pub fn class_of(name: &str) -> Option<FailureClass> {
    use FailureClass::{Agent, Budget, Cancelled, Dependency, Infrastructure, Policy};
    [Policy, Infrastructure, Dependency, Agent, Budget, Cancelled].into_iter().find(|class| class_name(*class) == name)
}

/// Some seconds later.
pub fn later(since: Option<Timestamp>, seconds: i64) -> Option<Timestamp> {
    since.and_then(|since| since.checked_add(SignedDuration::from_secs(seconds)).ok())
}

/// How long it is until then, at least a little.
pub fn wait(until: Timestamp, now: Timestamp) -> Duration {
    const LEAST: Duration = Duration::from_millis(50);
    Duration::try_from(until.duration_since(now)).unwrap_or_default().max(LEAST)
}

#[cfg(test)]
mod tests;
