//! The state of a log and the checks of its next segment: the Merkle tree, the state of the task, and what else the gateway needs from the
//! log.
//!
//! Guarantees: [`History::extended`] accepts a segment only if the tree is unbroken, the attempt has signed it, and its records violate
//! none of the [rules](crate::evidence::state::rule) that the witness checks. A log that it accepts is valid by docs/evidence-format.md,
//! except for the rules that the table of rules leaves to the verifier.
//!
//! Non-goals: repair, because a segment is accepted as a whole or not at all; the checks that the gateway makes before a call leaves.

use std::sync::Arc;

use jiff::Timestamp;

use crate::{
    evidence::{
        fits,
        merkle::Tree,
        record::{Actor, DenialCounts, Event, Record, TaskClosed},
        segment::Segment,
        state::{TaskState, User, Violation},
    },
    gateway::refusal::Refused,
    policy::{
        approval::CallKey,
        config::{Limits, Sensitivity, Usage},
        rule::Rule,
    },
};

pub use crate::evidence::state::{Compensates, IntentFacts};

/// Maximum number of records in one segment, because a segment is checked under the log's lock.
const RECORDS: usize = 4096;

/// The state of the log before a call that needs approval.
#[derive(Clone, Copy, Debug)]
pub struct Before {
    /// Number of calls like it that an approval has allowed.
    pub made: i64,
    /// The counters.
    pub usage: Usage,
    /// The highest sensitivity of data that the task has handled.
    pub seen: Sensitivity,
}

/// The state of a log, as far as the checks of its next segment need it.
#[derive(Clone, Debug)]
pub struct History {
    origin: Arc<str>,
    tree: Tree,
    state: TaskState,
    /// Number of `attempt.opened` and `task.closed` records. The signer changes with each of them.
    incarnation: u64,
    denied: DenialCounts,
    /// When the attempt first opened the log and when it wrote its newest record, by its own clock.
    lasted: Option<(Timestamp, Timestamp)>,
    /// The reason of the attempt's `attempt.closed`, if there is one.
    parting: Option<Arc<str>>,
    /// How the task ended.
    outcome: Option<Arc<TaskClosed>>,
    /// The task class, empty if the task has none.
    task_class: Arc<str>,
    /// Whether any attempt had tools with a compensation.
    undoable: bool,
}

impl History {
    /// Returns the log with this origin line, before its first record.
    pub fn new(origin: &str) -> Self {
        Self {
            origin: origin.into(),
            tree: Tree::default(),
            state: TaskState::new(User::Witness, origin),
            incarnation: 0,
            denied: DenialCounts::default(),
            lasted: None,
            parting: None,
            outcome: None,
            task_class: Arc::default(),
            undoable: false,
        }
    }

    /// Disables the check of one rule.
    #[cfg(test)]
    pub(crate) fn switch_off(&mut self, rule: crate::evidence::state::LogRule) {
        self.state = self.state.clone().without(rule);
    }

    /// Returns the tree.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Returns the state of the task.
    pub fn state(&self) -> &TaskState {
        &self.state
    }

    /// Returns the numbers of denials.
    pub fn denied(&self) -> DenialCounts {
        self.denied
    }

    /// Returns the task class, empty if the task has none.
    pub fn task_class(&self) -> Arc<str> {
        self.task_class.clone()
    }

    /// Returns the number of the signer of the log's end. Another harness is another signer, even within the same attempt.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Returns how the task ended, once its log is sealed.
    pub fn outcome(&self) -> Option<TaskClosed> {
        self.outcome.as_deref().cloned()
    }

    /// Returns whether any attempt had tools with a compensation.
    pub fn undoable(&self) -> bool {
        self.undoable
    }

    /// Returns the `task.closed` to seal the log with, given what the caller says about the last attempt. An end that the caller only
    /// presumes becomes unknown unless the log confirms it. An end that the log contradicts becomes unknown, too.
    pub fn verdict(&self, closed: TaskClosed, attempt: i64, presumed: bool) -> TaskClosed {
        let of_it = attempt == self.state.attempt();
        let parting = self.parting.as_deref().filter(|_| of_it && !self.state.is_open());
        let limit = |limits: Limits| limits.wall_time_seconds.saturating_add(limits.approval_wait_seconds);
        let lasted = self.lasted.zip(self.state.limits().filter(|_| of_it).map(limit));
        let time_over = lasted.is_some_and(|((from, until), limit)| until.duration_since(from).as_secs() >= limit);
        closed.borne_out(presumed, of_it, parting, time_over)
    }

    /// Returns the state of the log before a call that needs approval.
    pub fn before(&self, call: &CallKey) -> Before {
        Before { made: self.state.approvals().made(call), usage: self.state.usage(), seen: self.state.seen() }
    }

    /// Returns the log extended by this segment.
    ///
    /// # Errors
    /// Returns [`Rule::LogSegment`] or another rule, for the first check that fails.
    pub fn extended(&self, segment: &Segment) -> Result<Self, Refused> {
        let records = segment.decode().map_err(|e| broken(e.to_string()))?;
        self.extended_by(segment, &records)
    }

    /// Returns the log extended by this segment, whose decoded records are `records`.
    ///
    /// # Errors
    /// See [`History::extended`].
    pub fn extended_by(&self, segment: &Segment, records: &[Record]) -> Result<Self, Refused> {
        if self.state.has_ended() {
            return Err(Refused::denied(Rule::TaskClosed, "the task has ended: its log takes no more records"));
        }
        let checkpoint = segment.note.checkpoint().map_err(|e| broken(e.to_string()))?;
        if checkpoint.origin != *self.origin {
            return Err(broken(format!(
                "expected a checkpoint of {}, found one of {}",
                self.origin, checkpoint.origin
            )));
        }
        if segment.records.len() > RECORDS {
            return Err(broken(format!("expected at most {RECORDS} records, found {}", segment.records.len())));
        }
        let mut next = Self { tree: segment.extend(&self.tree).map_err(|e| broken(e.to_string()))?, ..self.clone() };
        let Some(first) = records.first() else { return Err(broken("expected at least one record")) };
        for (index, record) in records.iter().enumerate() {
            if (record.actor, record.attempt) != (first.actor, first.attempt) {
                return Err(at(record, "expected one writer and one attempt in a segment, found two"));
            }
            // An attempt's key must be known before the first signature by it.
            if index > 0 && matches!(record.event, Event::AttemptOpened(_)) {
                return Err(at(record, "expected attempt.opened at the start of a segment only"));
            }
            next.record(record)?;
        }
        next.signed(segment, first.actor)?;
        Ok(next)
    }

    /// Verifies the attempt's signature on the harness's records. A segment of the gateway needs none. The witness verifies cosignatures.
    fn signed(&self, segment: &Segment, writer: Actor) -> Result<(), Refused> {
        if writer == Actor::Gateway {
            return Ok(());
        }
        let key = self.state.key().ok_or_else(|| broken("expected attempt.opened as the log's first record"))?;
        segment.note.verify(key).map_err(|e| broken(e.to_string()))
    }

    fn record(&mut self, record: &Record) -> Result<(), Refused> {
        if let Some(Violation { rule, message }) = self.state.check(record).into_iter().next() {
            return Err(match rule.denial() {
                Rule::LogSegment => at(record, message),
                denial => Refused::denied(denial, format!("record {}: {message}", record.seq)),
            });
        }
        self.follow(record);
        self.state.apply(record);
        Ok(())
    }

    /// Updates what else the gateway needs from the log. Must run before the state applies the record.
    fn follow(&mut self, record: &Record) {
        let time = fits::time(&record.time).unwrap_or(Timestamp::UNIX_EPOCH);
        match &record.event {
            Event::AttemptOpened(opened) => {
                self.undoable |= opened.policy.tools.iter().any(|tool| tool.compensation().is_some());
                self.task_class = opened.policy.task.task_class.as_deref().unwrap_or_default().into();
                if record.attempt != self.state.attempt() {
                    self.lasted = Some((time, time));
                }
                self.parting = None;
                self.incarnation += 1;
            }
            Event::Denied(denied) => self.denied.add(denied),
            Event::AttemptClosed(closed) => self.parting = Some(closed.reason.as_str().into()),
            Event::TaskClosed(closed) => {
                self.outcome = Some(Arc::new(closed.clone()));
                self.incarnation += 1;
                return;
            }
            _ => {}
        }
        if let Some((_, until)) = &mut self.lasted {
            *until = time;
        }
    }
}

fn broken(reason: impl std::fmt::Display) -> Refused {
    Refused::denied(Rule::LogSegment, format!("the segment does not extend the log: {reason}"))
}

fn at(record: &Record, reason: impl std::fmt::Display) -> Refused {
    broken(format!("record {}: {reason}", record.seq))
}
