//! What undoing a task takes, from its log, and how far that has come, from the log of its rollback.
//!
//! Promises: pure. Each call that may have changed something is a [`Step`], newest first: undone by a call whose arguments were kept, or
//! left to people with the reason. A step's call is made as it is planned, and not again once it took effect or nobody knows whether it
//! did. Refuses: to guess, whether a call took effect or how it could be undone.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

pub use self::plan::{By, Plan, Step, Undo};
use super::{
    fits,
    record::{Channel, Effect, Event, Record},
};
use crate::policy::{
    config::{Rollback, SideEffect},
    shorten::shorten,
};

/// What is to be undone, as it is recorded.
pub mod plan;

/// Steps of a plan at most: it is one record, and has to fit into a segment.
pub const STEPS: usize = 4096;

/// Reads a log, record by record, for what undoing it takes.
#[derive(Debug, Default)]
pub struct Planner {
    /// How calls of each tool are undone, by the newest attempt's policy.
    tools: BTreeMap<String, Option<Rollback>>,
    /// Calls that may have changed something, by their places in the log.
    calls: BTreeMap<u64, Made>,
    /// Their places by their names.
    places: BTreeMap<String, u64>,
}

#[derive(Debug)]
struct Made {
    call: String,
    tool: String,
    rollback: Option<Rollback>,
    applied: bool,
    /// When its outcome was recorded, and the digest of what undoes it.
    ended: String,
    undone_by: Option<String>,
}

impl Planner {
    /// Takes the next record in.
    pub fn take(&mut self, record: &Record) {
        match &record.event {
            Event::AttemptOpened(opened) => {
                let tools = opened.policy.tools.iter();
                self.tools = tools.map(|tool| (tool.name.clone(), tool.rollback.clone())).collect();
            }
            Event::Intent(intent)
                if intent.channel == Channel::Tool && intent.effect.is_some_and(|of| of != SideEffect::Read) =>
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
                        undone_by: None,
                    },
                );
            }
            Event::Outcome(outcome) => {
                if let Some(made) = self.ended(&outcome.call, outcome.effect) {
                    made.ended.clone_from(&record.time);
                    made.undone_by.clone_from(&outcome.undone_by);
                }
            }
            Event::Resolved(resolved) => drop(self.ended(&resolved.call, resolved.effect)),
            _ => {}
        }
    }

    fn ended(&mut self, call: &str, effect: Effect) -> Option<&mut Made> {
        let place = self.places.get(call)?;
        if effect == Effect::NotApplied {
            self.calls.remove(place);
            return None;
        }
        let made = self.calls.get_mut(place)?;
        made.applied = effect == Effect::Applied;
        Some(made)
    }

    /// The contracts of the calls that undo others.
    pub fn contracts(&self) -> BTreeSet<String> {
        let contract = |made: &Made| match made.by() {
            By::Call(undo) => Some(undo.contract),
            By::People(_) => None,
        };
        self.calls.values().filter_map(contract).collect()
    }

    /// The steps, newest first. Beyond [`STEPS`] the oldest are one, for people.
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
        match (&self.rollback, &self.undone_by) {
            (None, _) => people("its contract does not say how"),
            (Some(Rollback::ByHand(how)), _) => people(how),
            (Some(Rollback::Call(_)), None) => people("the arguments that undo it could not be made or kept"),
            (Some(Rollback::Call(compensation)), Some(digest)) => By::Call(Undo {
                contract: compensation.contract.clone(),
                request_digest: digest.clone(),
                until: compensation.within_seconds.map(|seconds| after(&self.ended, seconds)),
            }),
        }
    }
}

/// A time and some seconds. One that cannot be read is long ago.
fn after(time: &str, seconds: i64) -> String {
    let time: Timestamp = time.parse().unwrap_or(Timestamp::UNIX_EPOCH);
    format!("{:.3}", time.checked_add(SignedDuration::from_secs(seconds)).unwrap_or(time))
}

/// How far the calls of a plan have come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Undoing {
    /// What is undone.
    pub plan: Plan,
    /// The calls that were made, by the calls that they undo.
    #[serde(default)]
    made: BTreeMap<String, Try>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Try {
    /// The call that undoes.
    by: String,
    /// What became of it; nothing while it is under way.
    effect: Option<Effect>,
}

/// Where one step stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its call is to be made.
    Due,
    /// Its call took effect.
    Undone,
    /// Its call was made, and nobody knows whether it took effect.
    Unknown,
}

/// A call that is about to leave.
#[derive(Clone, Copy, Debug)]
pub struct Leaving<'a> {
    /// Which way.
    pub channel: Channel,
    /// What it may change.
    pub effect: Option<SideEffect>,
    /// The call that it undoes.
    pub undoes: Option<&'a str>,
    /// The contract of its tool.
    pub contract: &'a str,
    /// SHA-256 of its arguments, hex.
    pub digest: &'a str,
}

/// Whether a call may leave, by what its task undoes: a rollback makes the calls of its plan and reads, and nothing else undoes anything.
///
/// # Errors
/// What was expected, and what was found.
pub fn lets(undoing: Option<&Undoing>, call: Leaving<'_>, now: Timestamp) -> Result<(), String> {
    let Leaving { channel, effect, undoes, contract, digest } = call;
    let reads = matches!((channel, effect), (Channel::Listing, _) | (Channel::Tool, Some(SideEffect::Read)));
    match (undoing, undoes) {
        (None, None) => Ok(()),
        (None, Some(undoes)) => {
            Err(format!("expected nothing to be undone, as the task is no rollback, found {undoes:?}"))
        }
        (Some(undoing), Some(undoes)) if channel == Channel::Tool => undoing.check(undoes, contract, digest, now),
        (Some(_), None) if reads => Ok(()),
        (Some(_), _) => {
            Err("expected a rollback to make the calls of its plan and to read, and nothing else".to_owned())
        }
    }
}

/// Whether a call may still be undone. A time that is not in the form of a record's is over.
///
/// # Errors
/// Until when it could be.
pub fn in_time(undoes: &str, until: Option<&str>, now: Timestamp) -> Result<(), String> {
    match until {
        Some(until) if fits::time(until).is_none_or(|until| now > until) => {
            Err(format!("expected {undoes} to be undone until {until}; it is later: undo it by hand"))
        }
        _ => Ok(()),
    }
}

impl Undoing {
    /// A plan of which nothing has been done.
    pub fn new(plan: Plan) -> Self {
        Self { plan, made: BTreeMap::new() }
    }

    /// The planned call that undoes another.
    pub fn undo(&self, undoes: &str) -> Option<&Undo> {
        self.plan.steps.iter().find(|step| step.call == undoes).and_then(|step| match &step.by {
            By::Call(undo) => Some(undo),
            By::People(_) => None,
        })
    }

    /// Where a step stands. A call under way counts as one of which nobody knows.
    pub fn standing(&self, undoes: &str) -> Standing {
        match self.made.get(undoes).map(|made| made.effect) {
            None => Standing::Due,
            Some(Some(Effect::Applied)) => Standing::Undone,
            Some(_) => Standing::Unknown,
        }
    }

    /// Whether a call may be made now: of this contract, with arguments of this digest, to undo that call.
    fn check(&self, undoes: &str, contract: &str, digest: &str, now: Timestamp) -> Result<(), String> {
        let Some(undo) = self.undo(undoes) else {
            return Err(format!("expected a call that the plan undoes by a call, found {undoes:?}"));
        };
        if undo.contract != contract || undo.request_digest != digest {
            return Err(format!(
                "expected {undoes} to be undone by {} with arguments of digest {}, found {contract} and {digest}",
                undo.contract, undo.request_digest
            ));
        }
        in_time(undoes, undo.until.as_deref(), now)?;
        match self.standing(undoes) {
            Standing::Due => Ok(()),
            Standing::Undone => Err(format!("{undoes} is undone already")),
            Standing::Unknown => {
                Err(format!("{undoes} has a call that undoes it, and whether that took effect is not known"))
            }
        }
    }

    /// A call is about to undo another; it was [let](lets).
    pub fn intend(&mut self, undoes: &str, by: &str) {
        self.made.insert(undoes.to_owned(), Try { by: by.to_owned(), effect: None });
    }

    /// What became of a call. One that certainly did nothing may be made again.
    pub fn settle(&mut self, by: &str, effect: Effect) {
        match effect {
            Effect::NotApplied => self.made.retain(|_, made| made.by != by),
            effect => self.made.values_mut().filter(|made| made.by == by).for_each(|made| made.effect = Some(effect)),
        }
    }

    /// Steps that are undone, of how many, and what is left to people with its reason.
    pub fn summary(&self) -> (usize, Vec<(&Step, String)>) {
        let left = self.plan.steps.iter().filter_map(|step| {
            let why = match (&step.by, self.standing(&step.call)) {
                (By::People(why), _) => why.clone(),
                (By::Call(_), Standing::Undone) => return None,
                (By::Call(_), Standing::Due) => "it was not undone".to_owned(),
                (By::Call(_), Standing::Unknown) => "whether it was undone is not known".to_owned(),
            };
            Some((step, why))
        });
        let left: Vec<_> = left.collect();
        (self.plan.steps.len().saturating_sub(left.len()), left)
    }
}

#[cfg(test)]
mod tests;
