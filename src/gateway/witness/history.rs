//! What a log says so far, and what may come next: a tree, the state of its task, and what the gateway has to know of it besides.
//!
//! Guarantees: [`History::extended`] takes an unbroken tree, the attempt's own signature, and records that break none of the
//! [rules](crate::evidence::state::rule) that the witness asks: whatever it takes, and docs/evidence-format.md asks for, verifies, but for
//! what the table of rules leaves to the verifier. Non-goals: repair, as a segment holds whole or not at all; judging what the gateway judges
//! before a call leaves.

use std::sync::Arc;

use jiff::Timestamp;

use crate::{
    evidence::{
        fits,
        merkle::Tree,
        record::{Actor, Event, Record, Refusals, TaskClosed},
        segment::Segment,
        state::{TaskState, User, Violation},
    },
    gateway::refusal::Refused,
    policy::{
        approval::Exact,
        config::{Limits, Sensitivity, Usage},
        rule::Rule,
    },
};

pub use crate::evidence::state::{IntentFacts, Undoes};

/// Records in one segment: it is checked under the log's lock.
const RECORDS: usize = 4096;

/// What the log says of a call that people are asked about.
#[derive(Clone, Copy, Debug)]
pub struct Before {
    /// How many calls like it were made by an approval.
    pub made: i64,
    /// The counters.
    pub usage: Usage,
    /// The most sensitive data that the task has handled.
    pub seen: Sensitivity,
}

/// A log, as far as its next segment is judged by it.
#[derive(Clone, Debug)]
pub struct History {
    origin: Arc<str>,
    tree: Tree,
    state: TaskState,
    /// Counts `attempt.opened` and `task.closed`: who signs changes with them.
    incarnation: u64,
    refused: Refusals,
    /// When the attempt was first opened, and when it wrote its newest record, by its own clock.
    lasted: Option<(Timestamp, Timestamp)>,
    /// How the attempt was closed; none before it is.
    parting: Option<Arc<str>>,
    /// How the task ended.
    outcome: Option<Arc<TaskClosed>>,
    /// The class of the task, empty without.
    task_class: Arc<str>,
    /// Whether any attempt had tools whose calls are undone by calls.
    undoable: bool,
}

impl History {
    /// The log with this origin line, before its first record.
    pub fn new(origin: &str) -> Self {
        Self {
            origin: origin.into(),
            tree: Tree::default(),
            state: TaskState::new(User::Witness, origin),
            incarnation: 0,
            refused: Refusals::default(),
            lasted: None,
            parting: None,
            outcome: None,
            task_class: Arc::default(),
            undoable: false,
        }
    }

    /// Asks for one rule no more.
    #[cfg(test)]
    pub(crate) fn switch_off(&mut self, rule: crate::evidence::state::LogRule) {
        self.state = self.state.clone().without(rule);
    }

    /// The tree.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// The state of the task.
    pub fn state(&self) -> &TaskState {
        &self.state
    }

    /// What was refused.
    pub fn refused(&self) -> Refusals {
        self.refused
    }

    /// The class of the task, empty without.
    pub fn task_class(&self) -> Arc<str> {
        self.task_class.clone()
    }

    /// Who signs the log's end, by their number: another harness, though it be of the same attempt, is another.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// How the task ended, once its log is sealed.
    pub fn outcome(&self) -> Option<TaskClosed> {
        self.outcome.as_deref().cloned()
    }

    /// Whether any attempt had tools whose calls are undone by calls.
    pub fn undoable(&self) -> bool {
        self.undoable
    }

    /// What the log is to be sealed with, where whoever seals it says this of its last attempt. What was presumed is borne out by the log or
    /// is not known; and where the log says otherwise, it is not known either.
    pub fn verdict(&self, closed: TaskClosed, attempt: i64, presumed: bool) -> TaskClosed {
        let of_it = attempt == self.state.attempt();
        let parting = self.parting.as_deref().filter(|_| of_it && !self.state.is_open());
        let limit = |limits: Limits| limits.wall_time_seconds.saturating_add(limits.approval_wait_seconds);
        let lasted = self.lasted.zip(self.state.limits().filter(|_| of_it).map(limit));
        let time_over = lasted.is_some_and(|((from, until), limit)| until.duration_since(from).as_secs() >= limit);
        closed.borne_out(presumed, of_it, parting, time_over)
    }

    /// What there was before a call that people are asked about.
    pub fn before(&self, call: &Exact) -> Before {
        Before { made: self.state.approvals().made(call), usage: self.state.usage(), seen: self.state.seen() }
    }

    /// The log with this segment at its end.
    ///
    /// # Errors
    /// [`Rule::LogSegment`] and others, by the first thing that does not hold.
    pub fn extended(&self, segment: &Segment) -> Result<Self, Refused> {
        let records = segment.decode().map_err(|e| broken(e.to_string()))?;
        self.extended_by(segment, &records)
    }

    /// The log with this segment, whose records these are, at its end.
    ///
    /// # Errors
    /// As [`History::extended`].
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

    /// The attempt signed what the harness wrote, and nobody else anything; cosignatures are the witness's business.
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

    /// Remembers what the gateway has to know of a record, by the state before it.
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
            Event::Denied(denied) => self.refused.add(denied),
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
