//! Verifies a log: recomputes it from its leaves and reports every violation.
//!
//! Guarantees: nothing in the log is trusted because the log says so. The only trusted input is the witness's public key. `verify` is pure:
//! the same bytes give the same report, on any machine, offline. `VALID` means that a valid signature covers every byte of every segment,
//! that every record follows from the records before it, and that the last record ends the task.
//! Non-goals: storage, networks and clocks. `verify` never calls a log valid that it could not check to the end.
//!
//! Verification cannot detect calls that never reached the harness, a witness key in the wrong hands, and whether an upstream really did
//! what it answered.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use crate::evidence::{log::Log, note::Checkpoint, note::VerifierKey};

mod chain;
mod history;
/// The results of a verification.
pub mod report;
mod storage;

pub use chain::Walk;
pub use report::{Check, Finding, Report, Summary, Verdict, Weight};

/// What the caller knows about the log from another source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Expected {
    /// Nothing: the log may be of any task.
    #[default]
    Anything,
    /// The log must have this origin.
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
