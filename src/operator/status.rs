//! Computes the status of a task: a pure function of the previous status and of what is known now.
//!
//! Guarantees: The same input gives the same status, so that a second reconciliation changes nothing. The transition time of a condition
//! changes only with its status.
//!
//! Non-goals: `status.usage`, because the gateway writes it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use crate::{
    api::{
        agent_task::{AgentTaskStatus, Attempt, EvidenceStatus, Phase},
        readiness::{READY, STALLED},
    },
    ends::FailureClass,
    evidence::record::{DenialCounts, TaskClosed},
    render::Finding,
};

/// Condition: the task's spec, contracts and pack are valid.
pub const ACCEPTED: &str = "Accepted";
/// Condition: the newest attempt's pod reaches the gateway and nothing else.
pub const CONTAINED: &str = "Contained";
/// Condition: the task has succeeded.
pub const COMPLETE: &str = "Complete";
/// Condition that is present once it is true: the task has failed.
pub const FAILED: &str = "Failed";
/// Condition: the evidence is sealed.
pub const EVIDENCE_SEALED: &str = "EvidenceSealed";

/// Reason of [`ACCEPTED`]: everything is valid.
pub const VALID: &str = "Valid";
/// Reason of [`ACCEPTED`]: something is wrong, and the message says what.
pub const INVALID: &str = "Invalid";
/// Reason of [`COMPLETE`] and of the status: an attempt is running.
pub const RUNNING: &str = "Running";
/// Reason of [`COMPLETE`], of [`READY`] and of the status: an attempt is running, and ApprovalRequests of the task are undecided.
pub const WAITING_FOR_APPROVAL: &str = "WaitingForApproval";
/// Reason of [`COMPLETE`] and of the status: a dependency of every task was unavailable for long.
pub const PARKED: &str = "Parked";
/// Reason of [`EVIDENCE_SEALED`]: the log is sealed.
pub const SEALED: &str = "Sealed";
/// Reason of [`EVIDENCE_SEALED`]: the log is not sealed yet.
pub const OPEN: &str = "Open";
/// Reason of [`EVIDENCE_SEALED`]: the gateway did not seal the log. The operator retries.
pub const SEAL_FAILED: &str = "SealFailed";
/// Reason of [`CONTAINED`]: the containment probe has not ended yet.
pub const UNPROVEN_YET: &str = "ProbePending";
/// Reason of [`CONTAINED`]: the probe reached the gateway and nothing else.
pub const PROVEN: &str = "ProbePassed";
/// Reason of [`CONTAINED`] and of the status: the cluster does not enforce the NetworkPolicy, or the probe could not prove that it does.
pub const CONTAINMENT_UNPROVEN: &str = "ContainmentUnproven";

/// The maximum number of findings in a condition. A user corrects these first.
pub const SHOWN_FINDINGS: usize = 5;
/// The maximum length of a message, in characters. The API server accepts 32 KiB.
const LONGEST_MESSAGE: usize = 4096;

/// What is known about a task.
#[derive(Clone, Debug)]
pub struct StatusInput<'a> {
    /// The generation of the task.
    pub generation: Option<i64>,
    /// The attempts.
    pub attempts: &'a [Attempt],
    /// The number of failed attempts by failure class.
    pub failures: &'a BTreeMap<String, i64>,
    /// The result of the newest pod's containment probe.
    pub contained: Option<bool>,
    /// Where the evidence is stored, once that is fixed.
    pub evidence: Option<EvidenceStatus>,
    /// The stage of the task.
    pub stage: Progress<'a>,
}

/// The stage of a task.
#[derive(Clone, Debug)]
pub enum Progress<'a> {
    /// The task is not valid.
    Refused(&'a [Finding]),
    /// The task is valid and waits: the reason in one word, and the message.
    Waiting(&'static str, &'a str),
    /// A dependency is unavailable: the message.
    Parked(&'a str),
    /// The agent runs.
    Running,
    /// The agent runs, and approvers must decide: the message.
    Undecided(&'a str),
    /// The task ended and its log is not sealed: the end, and why the log is not sealed.
    Sealing(&'a TaskClosed, &'a str),
    /// The task ended and its log is sealed: the end, and the denials.
    Ended(&'a TaskClosed, DenialCounts),
}

/// Returns the new status, given the previous status.
pub fn tell(before: &AgentTaskStatus, story: &StatusInput<'_>, now: Timestamp) -> AgentTaskStatus {
    let mut status = AgentTaskStatus {
        phase: Some(phase(before, story)),
        reason: Some(reason(before, story)),
        observed_generation: story.generation,
        attempt: story.attempts.last().map(|attempt| attempt.number),
        attempts: story.attempts.to_vec(),
        failures: story.failures.clone(),
        usage: None,
        conditions: before.conditions.clone(),
        evidence: story.evidence.clone().or_else(|| before.evidence.clone()),
        failure_class: None,
    };
    let mut set = |kind: &str, value: &str, reason: &str, message: &str| {
        set_condition(&mut status.conditions, story.generation, now, kind, value, reason, message);
    };
    match &story.stage {
        Progress::Refused(findings) => set(ACCEPTED, "False", INVALID, &told(findings, SHOWN_FINDINGS)),
        _ => set(ACCEPTED, "True", VALID, ""),
    }
    if !story.attempts.is_empty() {
        let lost = story.attempts.last().and_then(|last| last.reason.as_deref()) == Some(CONTAINMENT_UNPROVEN);
        match story.contained {
            _ if lost => set(
                CONTAINED,
                "False",
                CONTAINMENT_UNPROVEN,
                "the containment probe reached more than the gateway, or did not reach the gateway; see the log of container containment-probe",
            ),
            Some(true) => set(CONTAINED, "True", PROVEN, ""),
            _ if !before.conditions.iter().any(|one| one.type_ == CONTAINED) => {
                set(CONTAINED, "Unknown", UNPROVEN_YET, "")
            }
            _ => {}
        }
    }
    match &story.stage {
        Progress::Sealing(closed, problem) => {
            let why =
                format!("the last attempt has ended ({}), and its evidence is not sealed: {problem}", closed.reason);
            set(COMPLETE, "False", SEAL_FAILED, &why);
            set(EVIDENCE_SEALED, "False", SEAL_FAILED, problem);
        }
        Progress::Ended(closed, refused) => {
            let refused = refused.in_words().map(|refused| format!("; {refused}")).unwrap_or_default();
            let why = format!("{}{refused}", ended(closed));
            if closed.has_succeeded() {
                set(COMPLETE, "True", &closed.phase, &why);
            } else {
                set(COMPLETE, "False", &closed.phase, &why);
                set(FAILED, "True", &closed.reason, &why);
            }
            set(EVIDENCE_SEALED, "True", SEALED, "");
        }
        Progress::Waiting(reason, message) => set(COMPLETE, "False", reason, message),
        Progress::Parked(message) => set(COMPLETE, "False", PARKED, message),
        Progress::Undecided(message) => set(COMPLETE, "False", WAITING_FOR_APPROVAL, message),
        _ if story.attempts.is_empty() => {}
        _ => set(COMPLETE, "False", RUNNING, ""),
    }
    if !story.attempts.is_empty() && !matches!(story.stage, Progress::Sealing(..) | Progress::Ended(..)) {
        set(EVIDENCE_SEALED, "False", OPEN, "");
    }
    let readiness = readiness(story);
    set_readiness(&mut status.conditions, story.generation, now, &reason(before, story), &readiness);
    if let Progress::Ended(closed, _) = &story.stage {
        status.failure_class = closed.class();
    }
    status
}

/// Returns what the status says about undecided ApprovalRequests.
pub fn undecided(status: &AgentTaskStatus) -> Option<&str> {
    let ready = status.conditions.iter().find(|one| one.type_ == READY && one.reason == WAITING_FOR_APPROVAL);
    ready.map(|ready| ready.message.as_str())
}

/// Checks whether the task's log is sealed.
pub fn is_sealed(status: &AgentTaskStatus) -> bool {
    status.conditions.iter().any(|one| one.type_ == EVIDENCE_SEALED && one.status == "True")
}

/// Checks whether the task needs no more work.
pub fn has_ended(status: &AgentTaskStatus) -> bool {
    is_sealed(status) && matches!(status.phase, Some(Phase::Succeeded | Phase::Failed))
}

/// Whether an object is ready, becomes ready, or needs a person, with the message.
#[derive(Clone, Debug, PartialEq)]
pub enum Ready {
    /// The object is ready.
    Yes,
    /// The object becomes ready without a person, or may do so.
    NotYet(String),
    /// Only a person can resolve the problem.
    Stalled(String),
}

/// Returns whether a task is ready, for tools that wait for it.
fn readiness(story: &StatusInput<'_>) -> Ready {
    match &story.stage {
        Progress::Refused(findings) => Ready::Stalled(told(findings, SHOWN_FINDINGS)),
        Progress::Ended(closed, _) if closed.has_succeeded() => Ready::Yes,
        Progress::Ended(closed, _) => Ready::Stalled(ended(closed).to_owned()),
        Progress::Waiting(_, why) | Progress::Parked(why) | Progress::Undecided(why) | Progress::Sealing(_, why) => {
            Ready::NotYet((*why).to_owned())
        }
        Progress::Running => Ready::NotYet(String::new()),
    }
}

/// Sets [`READY`] and [`STALLED`] by the rules of kstatus, which Flux and Argo CD follow: `Stalled` is present only while it is true.
pub fn set_readiness(
    conditions: &mut Vec<Condition>,
    generation: Option<i64>,
    now: Timestamp,
    reason: &str,
    ready: &Ready,
) {
    let mut set =
        |kind: &str, value: &str, why: &str| set_condition(conditions, generation, now, kind, value, reason, why);
    match ready {
        Ready::Yes => set(READY, "True", ""),
        Ready::NotYet(why) => set(READY, "False", why),
        Ready::Stalled(why) => {
            set(READY, "False", why);
            set(STALLED, "True", why);
        }
    }
    if !matches!(ready, Ready::Stalled(_)) {
        conditions.retain(|one| one.type_ != STALLED);
    }
}

/// Returns the message about a task's end, for users.
fn ended(closed: &TaskClosed) -> &str {
    if closed.class() == Some(FailureClass::Unknown) {
        "VerdictUnknown: Belay did not see how the agent ended, and the evidence log does not confirm what the clock says. Nothing was undone. \
         Read the log (belay watch, belay verify) and decide: to undo what the task did, use belay rollback; to repeat it, create the \
         task again"
    } else {
        &closed.reason
    }
}

fn phase(before: &AgentTaskStatus, story: &StatusInput<'_>) -> Phase {
    match &story.stage {
        Progress::Refused(_) | Progress::Waiting(..) => Phase::Pending,
        Progress::Parked(_) => Phase::Parked,
        Progress::Running | Progress::Undecided(_) => Phase::Running,
        Progress::Sealing(..) => before.phase.unwrap_or(Phase::Running),
        Progress::Ended(closed, _) if closed.has_succeeded() => Phase::Succeeded,
        Progress::Ended(..) => Phase::Failed,
    }
}

fn reason(before: &AgentTaskStatus, story: &StatusInput<'_>) -> String {
    match &story.stage {
        Progress::Refused(_) => INVALID.to_owned(),
        Progress::Waiting(reason, _) => (*reason).to_owned(),
        Progress::Parked(_) => PARKED.to_owned(),
        Progress::Running => RUNNING.to_owned(),
        Progress::Undecided(_) => WAITING_FOR_APPROVAL.to_owned(),
        // The agent has ended, so the task waits for no approvers.
        Progress::Sealing(..) if before.reason.as_deref() == Some(WAITING_FOR_APPROVAL) => RUNNING.to_owned(),
        Progress::Sealing(closed, _) => before.reason.clone().unwrap_or_else(|| closed.reason.clone()),
        Progress::Ended(closed, _) => closed.reason.clone(),
    }
}

/// Returns the first findings, and the number of the others.
pub fn told(findings: &[Finding], most: usize) -> String {
    let mut lines: Vec<_> = findings.iter().take(most).map(Finding::to_string).collect();
    let more = findings.len().saturating_sub(most);
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    lines.join("\n")
}

fn set_condition(
    conditions: &mut Vec<Condition>,
    generation: Option<i64>,
    now: Timestamp,
    kind: &str,
    value: &str,
    reason: &str,
    message: &str,
) {
    let message: String = message.chars().take(LONGEST_MESSAGE).collect();
    match conditions.iter_mut().find(|one| one.type_ == kind) {
        Some(one) => {
            if one.status != value {
                one.last_transition_time = Time(now);
            }
            value.clone_into(&mut one.status);
            reason.clone_into(&mut one.reason);
            one.message = message;
            one.observed_generation = generation;
        }
        None => conditions.push(Condition {
            type_: kind.to_owned(),
            status: value.to_owned(),
            reason: reason.to_owned(),
            message,
            observed_generation: generation,
            last_transition_time: Time(now),
        }),
    }
}

/// Checks whether `after` needs a write. The gateway's field does not count, and neither do fractions of seconds, which the API server
/// drops.
pub fn changed(before: &AgentTaskStatus, after: &AgentTaskStatus) -> bool {
    let plain = |status: &AgentTaskStatus| {
        let mut status = AgentTaskStatus { usage: None, ..status.clone() };
        let whole = |time: &mut Time| time.0 = Timestamp::from_second(time.0.as_second()).unwrap_or(time.0);
        status.conditions.iter_mut().for_each(|one| whole(&mut one.last_transition_time));
        status.conditions.sort_by(|one, other| one.type_.cmp(&other.type_));
        for attempt in &mut status.attempts {
            attempt.started_at.iter_mut().chain(&mut attempt.finished_at).for_each(whole);
        }
        status
    };
    plain(before) != plain(after)
}

/// Returns the failure class of each attempt that ended in `after` and had not ended in `before`. `None` means success.
pub fn newly_ended<'a>(
    before: &'a AgentTaskStatus,
    after: &'a AgentTaskStatus,
) -> impl Iterator<Item = Option<FailureClass>> + 'a {
    let known = |number: i64| before.attempts.iter().any(|one| one.number == number && one.finished_at.is_some());
    let ended = after.attempts.iter().filter(|attempt| attempt.finished_at.is_some());
    ended.filter(move |attempt| !known(attempt.number)).map(|attempt| attempt.failure_class)
}

#[cfg(test)]
mod tests;
