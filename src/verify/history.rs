//! Checks the records one after the other against the [state](crate::evidence::state) of the task before them, and adds what they say to
//! the summary.

use super::report::{AttemptSummary, Check, Report, RollbackSummary};
use crate::{
    evidence::{
        note::VerifierKey,
        record::{AttemptOpened, CallOutcome, Event, Outcome, Record},
        state::{LogRule, TaskState, User},
    },
    policy::{budget::Spent, price},
};

/// The state after the records so far.
#[derive(Clone, Default)]
pub(super) struct History {
    /// The state of the task. `None` before the first record.
    state: Option<TaskState>,
    #[cfg(test)]
    off: Option<LogRule>,
}

/// The report, and the record that findings are about.
struct Blame<'a> {
    report: &'a mut Report,
    object: &'a str,
    seq: u64,
}

impl Blame<'_> {
    fn add(&mut self, rule: Check, message: impl Into<String>) {
        self.report.add(rule, Some(self.object), Some(self.seq), message);
    }
}

impl From<LogRule> for Check {
    fn from(rule: LogRule) -> Self {
        match rule {
            LogRule::RecordVersion | LogRule::RecordDigest | LogRule::DenialCount => Self::RecordForm,
            LogRule::RecordTime | LogRule::ApprovalTime => Self::RecordTime,
            LogRule::AfterEnd => Self::TaskAfterEnd,
            LogRule::Writer => Self::RecordActor,
            LogRule::AttemptOrder => Self::AttemptOrder,
            LogRule::AttemptOpen | LogRule::AttemptOver => Self::AttemptOpen,
            LogRule::AttemptKey => Self::AttemptKey,
            LogRule::AttemptContained => Self::AttemptContained,
            LogRule::AttemptTask => Self::AttemptTask,
            LogRule::AttemptPolicy => Self::AttemptPolicy,
            LogRule::RollbackPlan | LogRule::RollbackCall | LogRule::OutcomeUndo => Self::CallRollback,
            LogRule::CallUnique | LogRule::CallBounds => Self::CallUnique,
            LogRule::CallReservation | LogRule::OutcomeAmount | LogRule::Counters => Self::UsageCount,
            LogRule::ContainmentLost => Self::ContainmentLost,
            LogRule::LimitToolCalls
            | LogRule::LimitTokens
            | LogRule::LimitTool
            | LogRule::LimitCost
            | LogRule::LimitDenials => Self::UsageLimit,
            LogRule::CallDefinition | LogRule::CallPolicy | LogRule::DenialIgnored => Self::CallPolicy,
            LogRule::KeyMade | LogRule::KeyFree | LogRule::Replayed => Self::CallIdempotency,
            LogRule::ApprovalUsed
            | LogRule::ApprovalByContract
            | LogRule::ApprovalByPack
            | LogRule::ApprovalRequest
            | LogRule::ApprovalVotes => Self::CallApproval,
            LogRule::CallAccess | LogRule::DataSeen | LogRule::CallAssessment | LogRule::OutcomeData => {
                Self::CallAccess
            }
            LogRule::OutcomeOpen | LogRule::Resolved => Self::CallOutcome,
        }
    }
}

impl History {
    /// Switches one rule off.
    #[cfg(test)]
    pub(super) fn switch_off(&mut self, rule: LogRule) {
        self.off = Some(rule);
    }

    /// Returns the key that signs the newest attempt's checkpoints.
    pub(super) fn key(&self) -> Option<&VerifierKey> {
        self.state.as_ref()?.key()
    }

    /// Checks one record of the log with this origin and applies it.
    pub(super) fn record(&mut self, record: &Record, origin: &str, object: &str, report: &mut Report) {
        let state = self.state.get_or_insert_with(|| {
            let state = TaskState::new(User::Verifier, origin);
            #[cfg(test)]
            let state = match self.off {
                Some(rule) => state.without(rule),
                None => state,
            };
            state
        });
        let mut blame = Blame { report, object, seq: record.seq };
        for violation in state.check(record) {
            blame.add(violation.rule.into(), violation.message);
        }
        summarize(state, record, &mut blame);
        let settles = match &record.event {
            Event::Outcome(outcome) => state.open_calls().get(&outcome.call).map(|call| (outcome, call.reserved)),
            _ => None,
        };
        state.apply(record);
        if let Some((outcome, reserved)) = settles {
            tell_overrun(state, outcome, reserved, &mut blame);
        }
    }

    /// Ends the log. `whole` says whether the walk has reached its last segment.
    pub(super) fn finish(&self, whole: bool, report: &mut Report) {
        let Some(state) = &self.state else { return };
        let mut open: Vec<_> = state.open_calls().values().collect();
        open.sort_by_key(|call| call.seq);
        for call in open {
            report.summary.outcomes.open += 1;
            let message =
                format!("call {} to {} has no outcome: whether it took effect is not known", call.call, call.target);
            report.add(Check::CallOpen, None, Some(call.seq), message);
        }
        report.summary.usage = state.usage();
        report.summary.rollback = state.rollback().map(|undoing| {
            let (undone, left) = undoing.summary();
            let left = left.into_iter().map(|(step, why)| format!("{} {}: {why}", step.call, step.tool)).collect();
            RollbackSummary { of: undoing.plan.origin.clone(), undone, left }
        });
        if whole && !state.has_ended() {
            report.add(
                Check::TaskClosed,
                None,
                None,
                "expected task.closed as the last record; the task runs, or its end is missing",
            );
        }
    }
}

/// Adds what a record says to the summary. `state` is the state before the record.
fn summarize(state: &TaskState, record: &Record, blame: &mut Blame<'_>) {
    let summary = &mut blame.report.summary;
    *summary.kinds.entry(record.event.kind()).or_default() += 1;
    summary.started.get_or_insert_with(|| record.time.clone());
    summary.ended = Some(record.time.clone());
    match &record.event {
        Event::AttemptOpened(opened) => summarize_attempt(record, opened, blame),
        Event::Outcome(outcome) if state.open_calls().contains_key(&outcome.call) => {
            let outcomes = &mut summary.outcomes;
            match outcome.outcome {
                CallOutcome::Applied => outcomes.applied += 1,
                CallOutcome::NotApplied => outcomes.not_applied += 1,
                CallOutcome::Unknown => outcomes.unknown += 1,
            }
        }
        Event::Resolved(resolved) if state.resolution(resolved).is_ok() => {
            let outcomes = &mut summary.outcomes;
            let was_counted = !state.open_calls().contains_key(&resolved.call);
            outcomes.unknown = outcomes.unknown.saturating_sub(u64::from(was_counted));
            match resolved.outcome {
                CallOutcome::Applied => outcomes.applied += 1,
                CallOutcome::NotApplied => outcomes.not_applied += 1,
                CallOutcome::Unknown => {}
            }
        }
        Event::Denied(denied) => {
            let count = summary.denials.entry(denied.rule).or_default();
            *count = count.saturating_add(denied.calls());
        }
        Event::ContainmentChecked(seen) if !seen.contained || !seen.breaches.is_empty() => blame.add(
            Check::ContainmentBroken,
            format!("the pod reached more than the gateway: {}", seen.breaches.join(", ")),
        ),
        Event::AttemptClosed(closed) => {
            if let Some(attempt) = summary.attempts.last_mut() {
                attempt.closed = Some(closed.reason.clone());
            }
        }
        Event::TaskClosed(closed) => summary.closed = Some(closed.clone()),
        _ => {}
    }
}

fn summarize_attempt(record: &Record, opened: &AttemptOpened, blame: &mut Blame<'_>) {
    let task = &opened.policy.task;
    let summary = &mut blame.report.summary;
    summary.limits = Some(opened.policy.limits);
    summary.local.clone_from(&opened.local);
    summary.namespace = Some(task.namespace.clone());
    summary.task = Some(task.name.clone());
    summary.principal = Some(task.principal.clone());
    match summary.attempts.last_mut().filter(|a| a.number == record.attempt) {
        Some(again) => {
            again.openings += 1;
            again.closed = None;
        }
        None => summary.attempts.push(AttemptSummary {
            number: record.attempt,
            pod: opened.pod.name.clone(),
            node: opened.pod.node.clone(),
            runtime_class: opened.pod.runtime_class.clone(),
            policy_digest: opened.policy.digest().unwrap_or_default(),
            opened: record.time.clone(),
            openings: 1,
            closed: None,
        }),
    }
}

/// Reports a reply that exceeded a limit because it cost more than its reservation. Model APIs count tokens in their own way. `state` is
/// the state after the outcome.
fn tell_overrun(state: &TaskState, outcome: &Outcome, reserved: Spent, blame: &mut Blame<'_>) {
    let Some(limits) = state.limits() else { return };
    let usage = state.usage();
    if usage.tokens > limits.tokens && outcome.tokens > reserved.tokens {
        let message = format!(
            "a reply cost {} tokens where {} were reserved: {} of {} are used",
            outcome.tokens, reserved.tokens, usage.tokens, limits.tokens
        );
        blame.add(Check::UsageOverrun, message);
    }
    if let Some(limit) =
        limits.cost_micros.filter(|n| usage.cost_micros > *n && outcome.cost_micros > reserved.cost_micros)
    {
        let [cost, set_aside, used, limit] =
            [outcome.cost_micros, reserved.cost_micros, usage.cost_micros, limit].map(price::show);
        let message = format!("a reply cost {cost} where {set_aside} were reserved: {used} of {limit} are used");
        blame.add(Check::UsageOverrun, message);
    }
}
