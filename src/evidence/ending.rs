//! What is written once a log has ended: the log as C2SP tlog-tiles, and a signed summary of it.
//!
//! Promises: both follow from the records alone, so that whoever has the log makes the same and compares. Refuses: storage. The summary is an
//! in-toto Statement about the tree's root, in a DSSE envelope that the witness signs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    note::Note,
    record::{Effect, EncodeError, Event, Record, TaskClosed},
    segment::Segment,
    tiles::{File, Tiles},
};
use crate::policy::{
    approval::Standing,
    config::{PackIdentity, Usage},
    rule::Rule,
};

/// Where the tiles lie, under the log's prefix.
pub const FOLDER: &str = "tlog/";
/// The summary's name under the log's prefix.
pub const SUMMARY: &str = "summary.dsse.json";
/// DSSE's type of in-toto Statements.
pub const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
/// In-toto's type of Statements.
const STATEMENT: &str = "https://in-toto.io/Statement/v1";
/// What the predicate is.
const PREDICATE: &str = "https://belay.dev/execution/v1";

/// An in-toto Statement: how a task's execution went.
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

/// How a task's execution went, by its log.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Execution {
    /// The task's namespace and name.
    pub task: String,
    /// On whose behalf.
    pub principal: String,
    /// The workflow class.
    pub workflow_class: String,
    /// The class of the task, empty without.
    pub task_class: String,
    /// The pack; absent where no attempt was opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pack: Option<PackIdentity>,
    /// Digests of the policies, in the order of the attempts.
    pub policy_digests: Vec<String>,
    /// Records in the log.
    pub records: u64,
    /// Time of the first record.
    pub started: String,
    /// Time of the last.
    pub ended: String,
    /// Attempts that were opened.
    pub attempts: u64,
    /// How it ended.
    pub outcome: Option<TaskClosed>,
    /// The counters at the end.
    pub usage: Usage,
    /// What became of calls.
    pub calls: Calls,
    /// Refusals by rule.
    pub denials: BTreeMap<Rule, u64>,
    /// Approvals that were decided, by how.
    pub approvals: BTreeMap<String, u64>,
}

/// Calls, by whether they took effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Calls {
    /// They did.
    pub applied: u64,
    /// They did not.
    pub not_applied: u64,
    /// Nobody knows.
    pub unknown: u64,
    /// They have no outcome.
    pub open: u64,
}

/// What a log comes to.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    tiles: Tiles,
    /// That of the last segment.
    note: Option<Note>,
    execution: Execution,
    /// Calls without an outcome, and those of which nobody knows.
    pending: BTreeMap<String, Option<Effect>>,
    attempt: i64,
    closed: bool,
}

impl Ending {
    /// Takes the next segment in, whose records these are; gives the files that are whole with it, under the log's prefix.
    ///
    /// # Errors
    /// If a record is longer than an entry can be.
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
            Event::Outcome(outcome) => self.ended(&outcome.call, outcome.effect),
            Event::Resolved(resolved) => self.ended(&resolved.call, resolved.effect),
            Event::Denied(denied) => count(&mut of.denials, denied.rule, denied.calls()),
            Event::ApprovalDecided(approval) => {
                let how = match approval.standing {
                    Standing::Pending => "pending",
                    Standing::Approved => "approved",
                    Standing::Denied => "denied",
                    Standing::Expired => "expired",
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

    fn ended(&mut self, call: &str, effect: Effect) {
        let calls = &mut self.execution.calls;
        match effect {
            Effect::Applied => calls.applied = calls.applied.saturating_add(1),
            Effect::NotApplied => calls.not_applied = calls.not_applied.saturating_add(1),
            // A read may tell later.
            Effect::Unknown => {
                self.pending.insert(call.to_owned(), Some(effect));
                return;
            }
        }
        self.pending.remove(call);
    }

    /// The other files, the checkpoint last, and the statement about its origin and root, which whoever took the segments has checked.
    /// `None` if the log has not ended.
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
