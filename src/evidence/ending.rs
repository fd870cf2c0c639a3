//! Makes what is written once a log has ended: the log as C2SP tlog-tiles, and a signed summary of it.
//!
//! Guarantees: both follow from the records alone, so that anyone with the log can make the same and compare.
//! Non-goals: storage.
//!
//! The summary is an in-toto Statement about the tree's root, in a DSSE envelope that the witness signs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    note::Note,
    record::{CallOutcome, EncodeError, Event, Record, TaskClosed},
    segment::Segment,
    tiles::{File, Tiles},
};
use crate::policy::{
    approval::ApprovalState,
    config::{PackIdentity, Usage},
    rule::Rule,
};

/// The folder of the tiles under the log's prefix.
pub const FOLDER: &str = "tlog/";
/// The key of the summary under the log's prefix.
pub const SUMMARY: &str = "summary.dsse.json";
/// The payload type of in-toto Statements in DSSE.
pub const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
/// The type of Statements in in-toto.
const STATEMENT: &str = "https://in-toto.io/Statement/v1";
/// The type of the predicate.
const PREDICATE: &str = "https://belay.dev/execution/v1";

/// An in-toto Statement about the execution of a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Statement {
    #[serde(rename = "_type")]
    kind: String,
    subject: Vec<Subject>,
    predicate_type: String,
    predicate: Execution,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Subject {
    name: String,
    digest: BTreeMap<String, String>,
}

/// The execution of a task, by its log.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Execution {
    /// The task's namespace and name.
    pub task: String,
    /// The user or team on whose behalf the task acts.
    pub principal: String,
    /// The workflow class.
    pub workflow_class: String,
    /// The task class, empty if there is none.
    pub task_class: String,
    /// The pack; absent if no attempt was opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pack: Option<PackIdentity>,
    /// Digests of the policies, in the order of the attempts.
    pub policy_digests: Vec<String>,
    /// The number of records in the log.
    pub records: u64,
    /// The time of the first record.
    pub started: String,
    /// The time of the last record.
    pub ended: String,
    /// The number of attempts that were opened.
    pub attempts: u64,
    /// How the task ended.
    pub outcome: Option<TaskClosed>,
    /// The counters at the end.
    pub usage: Usage,
    /// The number of calls by outcome.
    pub calls: Calls,
    /// The number of denials by rule.
    pub denials: BTreeMap<Rule, u64>,
    /// The number of decided approvals by their state.
    pub approvals: BTreeMap<String, u64>,
}

/// The number of calls by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Calls {
    /// Calls that took effect.
    pub applied: u64,
    /// Calls that did not take effect.
    pub not_applied: u64,
    /// Calls with an unknown outcome.
    pub unknown: u64,
    /// Calls without an outcome.
    pub open: u64,
}

/// The tiles and the summary of a log, collected segment by segment.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    tiles: Tiles,
    /// The note of the last segment.
    note: Option<Note>,
    execution: Execution,
    /// Calls without an outcome, and calls with an unknown outcome.
    pending: BTreeMap<String, Option<CallOutcome>>,
    attempt: i64,
    closed: bool,
}

impl Ending {
    /// Adds the next segment, whose records are `records`. Returns the files that are complete with it, under the log's prefix.
    ///
    /// # Errors
    /// Returns an error if a record is longer than an entry can be.
    pub fn take(&mut self, segment: &Segment, records: &[Record]) -> Result<Vec<File>, EncodeError> {
        let mut files = Vec::new();
        for bytes in &segment.records {
            files.extend(self.tiles.push(bytes)?);
        }
        records.iter().for_each(|record| self.record(record));
        self.note = Some(segment.note.clone());
        Ok(within(files))
    }

    fn record(&mut self, record: &Record) {
        let of = &mut self.execution;
        if of.records == 0 {
            of.started.clone_from(&record.time);
        }
        of.records = of.records.saturating_add(1);
        of.ended.clone_from(&record.time);
        of.usage = record.usage;
        match &record.event {
            Event::AttemptOpened(opened) => {
                let task = &opened.policy.task;
                of.task = format!("{}/{}", task.namespace, task.name);
                of.principal.clone_from(&task.principal);
                of.workflow_class.clone_from(&task.workflow_class);
                of.task_class = task.task_class.clone().unwrap_or_default();
                of.pack = Some(opened.policy.pack.clone());
                let digest = opened.policy.digest().unwrap_or_default();
                if of.policy_digests.last() != Some(&digest) {
                    of.policy_digests.push(digest);
                }
                if record.attempt != self.attempt {
                    (self.attempt, of.attempts) = (record.attempt, of.attempts.saturating_add(1));
                }
            }
            Event::Intent(intent) => {
                self.pending.insert(intent.call.clone(), None);
            }
            Event::Outcome(outcome) => self.ended(&outcome.call, outcome.outcome),
            Event::Resolved(resolved) => self.ended(&resolved.call, resolved.outcome),
            Event::Denied(denied) => count(&mut of.denials, denied.rule, denied.calls()),
            Event::ApprovalDecided(approval) => {
                let how = match approval.state {
                    ApprovalState::Pending => "pending",
                    ApprovalState::Approved => "approved",
                    ApprovalState::Denied => "denied",
                    ApprovalState::Expired => "expired",
                };
                count(&mut of.approvals, how.to_owned(), 1);
            }
            Event::TaskClosed(closed) => {
                of.outcome = Some(closed.clone());
                self.closed = true;
            }
            _ => {}
        }
    }

    fn ended(&mut self, call: &str, outcome: CallOutcome) {
        let calls = &mut self.execution.calls;
        match outcome {
            CallOutcome::Applied => calls.applied = calls.applied.saturating_add(1),
            CallOutcome::NotApplied => calls.not_applied = calls.not_applied.saturating_add(1),
            // A later read may resolve the call.
            CallOutcome::Unknown => {
                self.pending.insert(call.to_owned(), Some(outcome));
                return;
            }
        }
        self.pending.remove(call);
    }

    /// Returns the remaining files, the checkpoint last, and the statement about the checkpoint's origin and root. The caller must have
    /// checked the segments. `None` if the log has not ended.
    pub fn finish(mut self) -> Option<(Vec<File>, Statement)> {
        let note = self.note.filter(|_| self.closed)?;
        let head = note.checkpoint().ok()?;
        let calls = &mut self.execution.calls;
        for pending in self.pending.values() {
            let of = if pending.is_some() { &mut calls.unknown } else { &mut calls.open };
            *of = of.saturating_add(1);
        }
        let mut files = self.tiles.finish();
        files.push(("checkpoint".to_owned(), note.to_string().into_bytes()));
        let digest = BTreeMap::from([("sha256".to_owned(), hex::encode(head.root))]);
        let statement = Statement {
            kind: STATEMENT.to_owned(),
            subject: vec![Subject { name: head.origin, digest }],
            predicate_type: PREDICATE.to_owned(),
            predicate: self.execution,
        };
        Some((within(files), statement))
    }
}

fn within(files: Vec<File>) -> Vec<File> {
    files.into_iter().map(|(path, bytes)| (format!("{FOLDER}{path}"), bytes)).collect()
}

fn count<K: Ord>(counts: &mut BTreeMap<K, u64>, of: K, more: u64) {
    let count = counts.entry(of).or_default();
    *count = count.saturating_add(more);
}
