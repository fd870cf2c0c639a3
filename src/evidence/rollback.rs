//! Finds in a task's log how to roll the task back, and in the rollback's log how far the rollback has come.
//!
//! Guarantees: all functions are pure. Each call that may have changed something is a [`Step`], newest first. A step has either a
//! compensation whose arguments were stored, or manual action with the reason. A compensation is made as planned. It is not made again once
//! it took effect or its outcome is unknown.
//! Non-goals: guessing whether a call took effect or how it could be compensated.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

pub use self::plan::{By, Plan, Step, Undo};
use super::{
    fits,
    record::{CallOutcome, Channel, Event, Record},
};
use crate::policy::{
    config::{Rollback, SideEffect},
    shorten::shorten,
};

/// The recorded plan of a rollback.
pub mod plan;

/// The maximum number of steps in a plan. A plan is one document and must fit into a segment.
pub const STEPS: usize = 4096;

/// Reads a log, record by record, and collects what its rollback needs.
#[derive(Debug, Default)]
pub struct Planner {
    /// How calls of each tool are compensated, by the newest attempt's policy.
    tools: BTreeMap<String, Option<Rollback>>,
    /// Calls that may have changed something, by the sequence numbers of their intents.
    calls: BTreeMap<u64, Made>,
    /// The sequence numbers of these intents, by the names of the calls.
    places: BTreeMap<String, u64>,
}

#[derive(Debug)]
struct Made {
    call: String,
    tool: String,
    rollback: Option<Rollback>,
    applied: bool,
    /// When the outcome was recorded. `compensation_commitment` is the commitment to the arguments of the compensation.
    ended: String,
    compensation_commitment: Option<String>,
}

impl Planner {
    /// Adds the next record.
    pub fn take(&mut self, record: &Record) {
        match &record.event {
            Event::AttemptOpened(opened) => {
                let tools = opened.policy.tools.iter();
                self.tools = tools.map(|tool| (tool.name.clone(), tool.rollback.clone())).collect();
            }
            Event::Intent(intent)
                if intent.channel == Channel::Tool && intent.side_effect.is_some_and(|of| of != SideEffect::Read) =>
            {
                self.places.insert(intent.call.clone(), record.seq);
                let rollback = self.tools.get(&intent.target).cloned().flatten();
                self.calls.insert(
                    record.seq,
                    Made {
                        call: intent.call.clone(),
                        tool: intent.target.clone(),
                        rollback,
                        applied: false,
                        ended: record.time.clone(),
                        compensation_commitment: None,
                    },
                );
            }
            Event::Outcome(outcome) => {
                if let Some(made) = self.ended(&outcome.call, outcome.outcome) {
                    made.ended.clone_from(&record.time);
                    made.compensation_commitment.clone_from(&outcome.compensation_commitment);
                }
            }
            Event::Resolved(resolved) => drop(self.ended(&resolved.call, resolved.outcome)),
            _ => {}
        }
    }

    fn ended(&mut self, call: &str, outcome: CallOutcome) -> Option<&mut Made> {
        let place = self.places.get(call)?;
        if outcome == CallOutcome::NotApplied {
            self.calls.remove(place);
            return None;
        }
        let made = self.calls.get_mut(place)?;
        made.applied = outcome == CallOutcome::Applied;
        Some(made)
    }

    /// Returns the contracts of the compensations.
    pub fn contracts(&self) -> BTreeSet<String> {
        let contract = |made: &Made| match made.by() {
            By::Call(undo) => Some(undo.contract),
            By::People(_) => None,
        };
        self.calls.values().filter_map(contract).collect()
    }

    /// Returns the steps, newest first. Beyond [`STEPS`], the oldest calls are one step with manual action.
    pub fn steps(self) -> Vec<Step> {
        let older = self.calls.len().saturating_sub(STEPS);
        let step = |made: Made| Step { by: made.by(), call: made.call, tool: made.tool };
        let mut steps: Vec<Step> = self.calls.into_values().rev().take(STEPS).map(step).collect();
        if older > 0 {
            let why = format!("{older} older calls are more than a rollback undoes: see the log");
            steps.push(Step { call: String::new(), tool: String::new(), by: By::People(why) });
        }
        steps
    }
}

impl Made {
    fn by(&self) -> By {
        let people = |why: &str| By::People(shorten(why));
        if !self.applied {
            return people("whether it took effect is not known");
        }
        match (&self.rollback, &self.compensation_commitment) {
            (None, _) => people("its contract does not say how"),
            (Some(Rollback::ByHand(how)), _) => people(how),
            (Some(Rollback::Call(_)), None) => people("the arguments that undo it could not be made or kept"),
            (Some(Rollback::Call(compensation)), Some(digest)) => By::Call(Undo {
                contract: compensation.contract.clone(),
                request_commitment: digest.clone(),
                until: compensation.within_seconds.map(|seconds| after(&self.ended, seconds)),
            }),
        }
    }
}

/// Returns a time plus some seconds. A time that cannot be read counts as 1970.
fn after(time: &str, seconds: i64) -> String {
    let time: Timestamp = time.parse().unwrap_or(Timestamp::UNIX_EPOCH);
    format!("{:.3}", time.checked_add(SignedDuration::from_secs(seconds)).unwrap_or(time))
}

/// The progress of a rollback.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Undoing {
    /// The plan of the rollback.
    pub plan: Plan,
    /// The compensations that were made, by the calls that they compensate.
    #[serde(default)]
    made: BTreeMap<String, Try>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Try {
    /// The name of the compensation's call.
    by: String,
    /// Whether the compensation took effect. `None` while it has no outcome.
    outcome: Option<CallOutcome>,
}

/// The state of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompensationState {
    /// The compensation is still to be made.
    Due,
    /// The compensation took effect.
    Undone,
    /// The compensation was made, and its outcome is unknown.
    Unknown,
}

/// A call that is about to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Leaving<'a> {
    /// The channel.
    pub channel: Channel,
    /// The side effect.
    pub side_effect: Option<SideEffect>,
    /// The call that it compensates.
    pub compensates: Option<&'a str>,
    /// The contract of its tool.
    pub contract: &'a str,
    /// The commitment to its arguments, hex.
    pub digest: &'a str,
}

/// Checks whether a call may be sent, given what its task rolls back. A rollback makes the calls of its plan and reads. No other task
/// compensates anything.
///
/// # Errors
/// Returns what was expected and what was found.
pub fn lets(undoing: Option<&Undoing>, call: Leaving<'_>, now: Timestamp) -> Result<(), String> {
    let Leaving { channel, side_effect, compensates, contract, digest } = call;
    let reads = matches!((channel, side_effect), (Channel::Listing, _) | (Channel::Tool, Some(SideEffect::Read)));
    match (undoing, compensates) {
        (None, None) => Ok(()),
        (None, Some(call)) => {
            Err(format!("expected no compensation, because the task is not a rollback, found one of {call:?}"))
        }
        (Some(undoing), Some(of)) if channel == Channel::Tool => undoing.check(of, contract, digest, now),
        (Some(_), None) if reads => Ok(()),
        (Some(_), _) => Err("expected a rollback to make reads and the calls of its plan, and nothing else".to_owned()),
    }
}

/// Checks whether a call may still be compensated. A deadline that does not have the form of a record's time has passed.
///
/// # Errors
/// Returns the deadline if it has passed.
pub fn in_time(call: &str, until: Option<&str>, now: Timestamp) -> Result<(), String> {
    match until {
        Some(until) if fits::time(until).is_none_or(|until| now > until) => {
            Err(format!("expected the compensation of {call} until {until}, found a later time; undo {call} by hand"))
        }
        _ => Ok(()),
    }
}

impl Undoing {
    /// Returns the progress of a plan before its first call.
    pub fn new(plan: Plan) -> Self {
        Self { plan, made: BTreeMap::new() }
    }

    /// Returns the planned compensation of a call.
    pub fn undo(&self, call: &str) -> Option<&Undo> {
        self.plan.steps.iter().find(|step| step.call == call).and_then(|step| match &step.by {
            By::Call(undo) => Some(undo),
            By::People(_) => None,
        })
    }

    /// Returns the state of a step. A compensation without an outcome counts as unknown.
    pub fn state(&self, call: &str) -> CompensationState {
        match self.made.get(call).map(|made| made.outcome) {
            None => CompensationState::Due,
            Some(Some(CallOutcome::Applied)) => CompensationState::Undone,
            Some(_) => CompensationState::Unknown,
        }
    }

    /// Checks whether a call of this contract, with arguments of this digest, may be made now to compensate the call `call`.
    fn check(&self, call: &str, contract: &str, digest: &str, now: Timestamp) -> Result<(), String> {
        let Some(undo) = self.undo(call) else {
            return Err(format!("expected a call that has a compensation in the plan, found {call:?}"));
        };
        if undo.contract != contract || undo.request_commitment != digest {
            return Err(format!(
                "expected {call} to be undone by {} with arguments of digest {}, found {contract} and {digest}",
                undo.contract, undo.request_commitment
            ));
        }
        in_time(call, undo.until.as_deref(), now)?;
        match self.state(call) {
            CompensationState::Due => Ok(()),
            CompensationState::Undone => Err(format!("{call} is undone already")),
            CompensationState::Unknown => Err(format!("{call} has a compensation, and its outcome is unknown")),
        }
    }

    /// Records that a compensation is about to be sent. [`lets`] must have allowed it.
    pub fn intend(&mut self, call: &str, by: &str) {
        self.made.insert(call.to_owned(), Try { by: by.to_owned(), outcome: None });
    }

    /// Records the outcome of a compensation. A compensation that certainly did nothing may be made again.
    pub fn settle(&mut self, by: &str, outcome: CallOutcome) {
        match outcome {
            CallOutcome::NotApplied => self.made.retain(|_, made| made.by != by),
            outcome => {
                self.made.values_mut().filter(|made| made.by == by).for_each(|made| made.outcome = Some(outcome))
            }
        }
    }

    /// Returns the number of compensated steps, and the steps that need manual action, each with its reason.
    pub fn summary(&self) -> (usize, Vec<(&Step, String)>) {
        let left = self.plan.steps.iter().filter_map(|step| {
            let why = match (&step.by, self.state(&step.call)) {
                (By::People(why), _) => why.clone(),
                (By::Call(_), CompensationState::Undone) => return None,
                (By::Call(_), CompensationState::Due) => "it was not undone".to_owned(),
                (By::Call(_), CompensationState::Unknown) => "whether it was undone is not known".to_owned(),
            };
            Some((step, why))
        });
        let left: Vec<_> = left.collect();
        (self.plan.steps.len().saturating_sub(left.len()), left)
    }
}

#[cfg(test)]
mod tests;
