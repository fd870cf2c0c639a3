//! Recomputes a log from its leaves and reports what does not hold.
//!
//! Promises: nothing in the log is believed because the log says so. The one thing taken on trust is the witness's public
//! key. `verify` is pure: the same bytes give the same report, on any machine, offline. `VALID` means that every byte of
//! every segment is covered by a signature that holds, every record follows from the ones before it, and the last one ends
//! the task. Refuses: storage, networks, clocks, and to call anything valid that it could not check to the end.
//!
//! What it cannot see: calls that never reached the harness, a witness key in the wrong hands, and whether an upstream did
//! what it answered.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use crate::evidence::{log::Log, note::Checkpoint, note::VerifierKey};

mod chain;
mod history;
/// What a verification found.
pub mod report;
mod storage;

pub use chain::Walk;
pub use report::{Check, Finding, Report, Summary, Verdict, Weight};

/// What is known of the log from elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Expected {
    /// Nothing: any task's log will do.
    #[default]
    Anything,
    /// The log must be the one of this origin.
    Origin(String),
    /// The log must end with exactly this head.
    Head(Checkpoint),
}

/// Verifies a log against the witness's key.
pub fn verify(log: &Log, witness: &VerifierKey, expected: &Expected) -> Report {
    let mut walk = Walk::new(witness, expected);
    log.segments.iter().for_each(|(key, bytes)| walk.segment(key, bytes));
    walk.finish(log)
}

#[cfg(test)]
pub(crate) mod tests;
