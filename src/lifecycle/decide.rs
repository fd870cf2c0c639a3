//! What to do next about a task, from what is seen of it: a pure function.
//!
//! Guarantees: a new attempt starts only when no pod of the task can act any more, under a number that was never used; an end is
//! recorded before anything acts on it; what ends an attempt, deletes a pod or seals a log was read from the API server in this very look,
//! or else it is to be read first; what the clock alone says is presumed, and the pod's own word replaces it; the last word is the sealed
//! log. Non-goals: clocks and clients; the same observation always gives the same decision.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::observe::{End, LOG_FAILED, POD_ALTERED, PodView};
use crate::{
    api::agent_task::{Attempt, FailureClass, Phase, Retry},
    evidence::record::TaskClosed,
    plan::pod::START_ALLOWANCE_SECONDS,
};

/// For how long a pod may fail to pull an image or to be configured: long enough for a registry's hiccup.
const STUCK_SECONDS: i64 = 60;
/// Beyond the wall time, at which the harness stops every call by itself, closes its log and ends.
const CLOSING_SECONDS: i64 = 5;
/// After a break in which the API server did not answer, nothing is concluded for so long from what a pod does not say: kubelets were cut off
/// as well, and tell what happened meanwhile within some seconds of its return.
pub const SETTLING_SECONDS: i64 = 45;
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
    /// Whether the task was just read from the API server.
    pub live: bool,
    /// Whether another task undoes it if it fails.
    pub rolls_back: bool,
    /// How often it may be tried again.
    pub retry: &'a Retry,
    /// Seconds that an attempt may run.
    pub wall_time_seconds: i64,
    /// The attempts that its status has.
    pub history: &'a [Attempt],
    /// How many attempts failed by which class, as its status has it.
    pub failures: &'a BTreeMap<String, i64>,
    /// Its pods.
    pub pods: &'a [PodView],
    /// Attempts that have a NetworkPolicy: made before the pod, they outlive it, until a status has a later attempt.
    pub claims: &'a [i64],
    /// A claim whose pod was certainly never made.
    pub reusable: Option<i64>,
    /// Attempts whose pod was looked up at the API server in this look: what is not among the pods is not there.
    pub looked_up: &'a BTreeSet<i64>,
    /// Since when the API server has answered without a break.
    pub in_touch_since: Timestamp,
    /// Now, by the API server's clock.
    pub now: Timestamp,
}

/// What is to be read from the API server before something is decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// The task.
    Task,
    /// The pod of this attempt.
    Pod(i64),
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
    /// What is known is old: read this, and decide again.
    Confirm(Unread),
    /// Seal the log.
    Seal {
        /// The last attempt.
        attempt: i64,
        /// How the task ended.
        closed: TaskClosed,
        /// Nobody has seen how it ended: the log has the last word.
        presumed: bool,
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
            Self::Confirm(_) => "confirm",
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
    /// How many attempts have failed, by class.
    pub failures: BTreeMap<String, i64>,
    /// What to do.
    pub next: Next,
}

/// Decides.
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

/// Failures by class before this look. A status that was written before they were counted has those that it keeps.
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
    let count = failures.entry(class_name(class).to_owned()).or_default();
    *count = count.saturating_add(more).max(0);
}

/// The status's attempts and failures, brought up to date from the pods. `Err` says what must be read first.
fn attempts(observed: &Observed<'_>) -> Result<(Vec<Attempt>, BTreeMap<String, i64>), Unread> {
    let mut attempts = observed.history.to_vec();
    let mut failures = failures(observed);
    // One that is not kept any more was recorded and counted once.
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
            // Nobody's failure of the task's.
            let counted = end.class.filter(|_| end.reason != POD_ALTERED);
            counted.into_iter().for_each(|class| count(&mut failures, class, 1));
        }
    }
    // Keeping the newest keeps the numbers growing; which old ones failed how is in the evidence.
    let excess = attempts.len().saturating_sub(MAX_ATTEMPTS);
    attempts.drain(..excess);
    Ok((attempts, failures))
}

/// What a pod says at its end of an attempt of which that was presumed: it holds, or is replaced.
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
    // It was running when it was told to end, for the reason that was presumed.
    if end.reason == "PodDeleted" || out_of_time {
        return Ok(());
    }
    attempt.failure_class.into_iter().for_each(|class| count(failures, class, -1));
    end.class.into_iter().for_each(|class| count(failures, class, 1));
    attempt.failure_class = end.class;
    attempt.reason = Some(end.reason.to_owned());
    Ok(())
}

/// The end of a pod, by its own account, or, presumed, because its time is up.
fn pod_end(pod: &PodView, observed: &Observed<'_>) -> Result<Option<(End, bool)>, Unread> {
    let unread = || Err(Unread::Pod(pod.attempt));
    // Whatever ran there was not what was asked for, and is no success.
    if pod.altered.is_some() {
        let altered = End { class: Some(FailureClass::Infrastructure), reason: POD_ALTERED, exit_code: None };
        return if pod.live { Ok(Some((altered, false))) } else { unread() };
    }
    if let Some(end) = &pod.end {
        // Its deletion was asked for, and how its agent ends is not known yet.
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

/// When a pod's end is due though nothing about it changes, and as what.
fn overdue(pod: &PodView, observed: &Observed<'_>) -> Option<(Timestamp, (FailureClass, &'static str))> {
    let infrastructure = |reason| (FailureClass::Infrastructure, reason);
    let wall = later(pod.agent_started, wall(pod, observed)).map(|at| (at, (FailureClass::Budget, "DeadlineExceeded")));
    let stuck = pod.stuck.as_ref().filter(|stuck| stuck.fatal);
    let stuck = stuck.and_then(|stuck| Some((later(stuck.since, STUCK_SECONDS)?, infrastructure(stuck.reason))));
    let start = later(pod.accepted, START_ALLOWANCE_SECONDS).filter(|_| pod.agent_started.is_none());
    let start = start.map(|at| (at, infrastructure("StartTimeout")));
    let (at, end) = [wall, stuck, start].into_iter().flatten().min_by_key(|(at, _)| *at)?;
    Some((later(Some(observed.in_touch_since), SETTLING_SECONDS).map_or(at, |settled| at.max(settled)), end))
}

/// Seconds after its agent's start at which a pod's time is up, whatever its harness says: its wall time, and what its calls may wait for
/// people.
fn wall(pod: &PodView, observed: &Observed<'_>) -> i64 {
    let lifetime = pod.lifetime.map(|seconds| seconds.saturating_sub(START_ALLOWANCE_SECONDS));
    lifetime.unwrap_or(observed.wall_time_seconds).saturating_add(CLOSING_SECONDS)
}

/// A task that goes on.
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

/// A new attempt after this one. What was claimed since and is no attempt yet may have a pod that a blind cache does not show, and a status
/// that is old may not have the attempt after this one.
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

/// A number that no pod of this task has had. What was claimed without a pod to show for it may have had one.
fn next_number(observed: &Observed<'_>, last: i64) -> i64 {
    let claimed = observed.claims.iter().copied().filter(|claim| Some(*claim) != observed.reusable).max();
    last.max(claimed.unwrap_or_default()).saturating_add(1)
}

/// When the next attempt may start, if there may be one.
fn pause(
    observed: &Observed<'_>,
    attempts: &[Attempt],
    failures: &BTreeMap<String, i64>,
    class: FailureClass,
) -> Option<Timestamp> {
    let altered = attempts.last().and_then(|last| last.reason.as_deref()) == Some(POD_ALTERED);
    let allowed = match class {
        // It would fail again in the same way.
        _ if attempts.last()?.reason.as_deref() == Some(LOG_FAILED) => return None,
        // The administrator's to mend, and no failure of the task's.
        _ if altered => i64::MAX,
        FailureClass::Agent => observed.retry.agent,
        FailureClass::Infrastructure => observed.retry.infrastructure,
        // It was nobody's fault of the task's, and is over some time.
        FailureClass::Dependency => i64::MAX,
        FailureClass::Policy | FailureClass::Budget | FailureClass::Cancelled | FailureClass::Unknown => 0,
    };
    let failures = if altered {
        let altered = attempts.iter().filter(|attempt| attempt.reason.as_deref() == Some(POD_ALTERED)).count();
        i64::try_from(altered).unwrap_or(i64::MAX)
    } else {
        failures.get(class_name(class)).copied().unwrap_or_default()
    };
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
    match pod {
        Some(pod) if !pod.live => return Next::Confirm(Unread::Pod(attempt)),
        None if !observed.looked_up.contains(&attempt) => return Next::Confirm(Unread::Pod(attempt)),
        _ => {}
    }
    let failed = last.is_none_or(|last| last.failure_class.is_some());
    // Whether it is being deleted decides what it is sealed as, and whether another task undoes it.
    if !observed.live && (observed.deleting || failed && observed.rolls_back) {
        return Next::Confirm(Unread::Task);
    }
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
    let cancelled = closed.failure_class == class_name(FailureClass::Cancelled);
    // It was being stopped and says that all is well: times have whole seconds, and nobody knows whether it was done before.
    let may_be_done = closed.failure_class == class_name(FailureClass::Infrastructure) && closed.exit_code == Some(0);
    let presumed = !cancelled && (may_be_done || last.is_some_and(|last| last.presumed));
    Next::Seal { attempt, closed, presumed }
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
        FailureClass::Unknown => "Unknown",
    }
}

/// The class of that name.
pub fn class_of(name: &str) -> Option<FailureClass> {
    use FailureClass::{Agent, Budget, Cancelled, Dependency, Infrastructure, Policy, Unknown};
    [Policy, Infrastructure, Dependency, Agent, Budget, Cancelled, Unknown]
        .into_iter()
        .find(|class| class_name(*class) == name)
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
