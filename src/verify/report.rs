//! What a verification found: findings, a verdict that follows from them, and a summary.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

use crate::{
    evidence::{
        record::{Local, TaskClosed},
        store::Mode,
    },
    policy::{
        config::{Limits, Usage},
        rule::Rule,
    },
};

/// A hostile log must not fill the reader's memory: findings beyond these are counted only.
const MAX_FINDINGS: usize = 1000;

/// How much a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Weight {
    /// Worth knowing; nothing is wrong with the log.
    Note,
    /// The log is not at its end.
    Incomplete,
    /// The log goes on in a way that this verifier does not know: it cannot judge it.
    Newer,
    /// The log is not what Belay writes.
    Broken,
}

macro_rules! checks {
    ($($(#[$doc:meta])* $variant:ident = $id:literal $weight:ident),+ $(,)?) => {
        /// What must hold, by its stable identifier.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
        pub enum Check {
            $($(#[$doc])* #[serde(rename = $id)] $variant),+
        }

        impl Check {
            /// Every check.
            pub const ALL: &[Check] = &[$(Check::$variant),+];

            /// The stable identifier.
            pub fn as_str(self) -> &'static str {
                match self { $(Check::$variant => $id),+ }
            }

            /// What it means when it does not hold.
            pub fn weight(self) -> Weight {
                match self { $(Check::$variant => Weight::$weight),+ }
            }
        }
    };
}

checks! {
    /// Every object under `segments/` is a segment, by its key.
    StoreKey = "store.key" Broken,
    /// In a folder, every object is a regular file of a length that objects have.
    StoreObject = "store.object" Broken,
    /// Every segment has exactly one version.
    StoreVersions = "store.versions" Broken,
    /// No object is hidden by a delete marker.
    StoreDeleted = "store.deleted" Broken,
    /// Every segment is locked until after it was written.
    StoreRetention = "store.retention" Broken,
    /// Every incident's name is the digest of its bytes.
    StoreIncident = "store.incident" Broken,
    /// A segment can be read, and its form is the canonical one.
    SegmentForm = "segment.form" Broken,
    /// A segment's key names its first record.
    SegmentKey = "segment.key" Broken,
    /// Segments follow each other without gap or overlap, from record 0.
    SegmentOrder = "segment.order" Broken,
    /// The checkpoint is that of the records up to it, recomputed from the leaves.
    CheckpointRoot = "checkpoint.root" Broken,
    /// All checkpoints are of one log, the expected one.
    CheckpointOrigin = "checkpoint.origin" Broken,
    /// The witness cosigned the checkpoint.
    CheckpointWitness = "checkpoint.witness" Broken,
    /// The attempt's key, as its newest `attempt.opened` has it, signed the checkpoint.
    CheckpointAttempt = "checkpoint.attempt" Broken,
    /// Nobody else signed the checkpoint.
    CheckpointSignatures = "checkpoint.signatures" Broken,
    /// The log ends with the head that the task's status names.
    LogHead = "log.head" Broken,
    /// There is a log.
    LogEmpty = "log.empty" Incomplete,
    /// Every line is a record of a version that this verifier knows, whole.
    RecordForm = "record.form" Broken,
    /// No record is of a later version than this verifier knows, and every policy is one that it knows.
    RecordVersion = "record.version" Newer,
    /// Every record's time is RFC 3339 in UTC, to the millisecond.
    RecordTime = "record.time" Broken,
    /// A segment's records have one writer, and each writer writes only its own kinds.
    RecordActor = "record.actor" Broken,
    /// Attempts never go back, and a segment's records are of one attempt.
    AttemptOrder = "attempt.order" Broken,
    /// Every attempt starts with `attempt.opened`, the first record of its segment, and ends with `attempt.closed`.
    AttemptOpen = "attempt.open" Broken,
    /// The attempt's key is one, and named after the attempt.
    AttemptKey = "attempt.key" Broken,
    /// The policy's digest is that of the policy.
    AttemptPolicy = "attempt.policy" Broken,
    /// The policy is one for this task.
    AttemptTask = "attempt.task" Broken,
    /// The pod was contained before the agent started.
    AttemptContained = "attempt.contained" Broken,
    /// The pod stayed contained while the agent ran.
    ContainmentBroken = "containment.broken" Note,
    /// No call goes out after the containment was seen lost.
    ContainmentLost = "containment.lost" Broken,
    /// Each call has one intent.
    CallUnique = "call.unique" Broken,
    /// Each outcome has its intent, in the same attempt, and each intent at most one; what was unknown is resolved by the contract's read.
    CallOutcome = "call.outcome" Broken,
    /// Each tool call is of a tool in the policy, with that tool's effect, which is allowed.
    CallPolicy = "call.policy" Broken,
    /// Under one idempotency key one effect, as far as anybody knows, and no result but that call's.
    CallIdempotency = "call.idempotency" Broken,
    /// Calls that people must approve were approved, each by enough of them, before it, for that very call, and once.
    CallApproval = "call.approval" Broken,
    /// The pack lets each tool call pass, for what was recorded of its data, rules and risk.
    CallAccess = "call.access" Broken,
    /// A rollback makes the calls of its plan, each in time, as planned and once, and nothing else undoes anything.
    CallRollback = "call.rollback" Broken,
    /// Every call has an outcome; one without may or may not have had its effect.
    CallOpen = "call.open" Note,
    /// The counters follow from the events.
    UsageCount = "usage.count" Broken,
    /// Nothing was allowed beyond the limits in force.
    UsageLimit = "usage.limit" Broken,
    /// No reply cost more than what was left: model APIs count tokens in their own way.
    UsageOverrun = "usage.overrun" Note,
    /// Once the task has ended, tiles and summary are there.
    EndMissing = "end.missing" Incomplete,
    /// Tiles are those of the records, and there are none but those of a log that has ended.
    EndTiles = "end.tiles" Broken,
    /// The summary is what the records come to, signed by the witness.
    EndSummary = "end.summary" Broken,
    /// Nothing follows `task.closed`.
    TaskAfterEnd = "task.afterEnd" Broken,
    /// The last record is `task.closed`.
    TaskClosed = "task.closed" Incomplete,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Something that does not hold, or is worth knowing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The record, where one is to blame.
    pub record: Option<u64>,
    /// The object, where one is to blame.
    pub object: Option<String>,
    /// What does not hold.
    pub rule: Check,
    /// How much that weighs.
    pub weight: Weight,
    /// What was expected and what was found. May quote the log: escape it before it reaches a terminal.
    pub message: String,
}

/// The result in one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// Everything holds, to the end.
    #[default]
    Valid,
    /// Everything holds, but the task has not ended, or its end is missing.
    Incomplete,
    /// Everything holds up to what is of a later version than this verifier knows. It is signed by the witness, and to be judged by a
    /// later verifier.
    Newer,
    /// Something does not hold.
    Invalid,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Valid => "VALID",
            Self::Incomplete => "INCOMPLETE",
            Self::Newer => "NEWER",
            Self::Invalid => "INVALID",
        })
    }
}

/// What a verification found.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The result in one word.
    pub verdict: Verdict,
    /// What does not hold, in the order in which it was found; at most 1000.
    pub findings: Vec<Finding>,
    /// Findings beyond those.
    pub more_findings: u64,
    /// What the log says, as far as it could be read. Trust it only as far as the verdict goes.
    pub summary: Summary,
}

impl Report {
    /// Adds a finding; the verdict follows.
    pub(super) fn add(&mut self, rule: Check, object: Option<&str>, record: Option<u64>, message: impl Into<String>) {
        let weight = rule.weight();
        self.verdict = match (weight, self.verdict) {
            (Weight::Broken, _) | (_, Verdict::Invalid) => Verdict::Invalid,
            (Weight::Newer, _) | (_, Verdict::Newer) => Verdict::Newer,
            (Weight::Incomplete, _) | (_, Verdict::Incomplete) => Verdict::Incomplete,
            (Weight::Note, Verdict::Valid) => Verdict::Valid,
        };
        if self.findings.len() < MAX_FINDINGS {
            let object = object.map(str::to_owned);
            self.findings.push(Finding { record, object, rule, weight, message: message.into() });
        } else {
            self.more_findings += 1;
        }
    }
}

/// What the log says.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// The log's origin line.
    pub origin: Option<String>,
    /// The task's namespace.
    pub namespace: Option<String>,
    /// Its name.
    pub task: Option<String>,
    /// On whose behalf.
    pub principal: Option<String>,
    /// Segments that were read.
    pub segments: u64,
    /// Records that were read.
    pub records: u64,
    /// The recomputed root over them, base64.
    pub root: Option<String>,
    /// Time of the first record, by its writer's clock.
    pub started: Option<String>,
    /// Time of the last record, by its writer's clock.
    pub ended: Option<String>,
    /// Unix time of the witness's last cosignature.
    pub witnessed: Option<u64>,
    /// Records by kind.
    pub kinds: BTreeMap<&'static str, u64>,
    /// The attempts, oldest first.
    pub attempts: Vec<AttemptSummary>,
    /// The counters after the last record, recomputed.
    pub usage: Usage,
    /// The limits of the newest attempt.
    pub limits: Option<Limits>,
    /// Refusals by rule.
    pub denials: BTreeMap<Rule, u64>,
    /// What became of the calls.
    pub effects: Effects,
    /// How the task ended.
    pub closed: Option<TaskClosed>,
    /// Locks of the segments; absent where the store has none.
    pub locks: Option<Locks>,
    /// Incidents that the gateway recorded beside the log.
    pub incidents: u64,
    /// How far a rollback has come.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollback: Option<RollbackSummary>,
    /// Whether the witness is whoever ran the agent, by the name of its key.
    pub self_witnessed: bool,
    /// What stood in for a cluster in the newest attempt, where there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local: Option<Local>,
}

impl Summary {
    /// What a reader has to know beside the verdict, of logs that no cluster vouches for: nothing else is said of other logs.
    pub fn reservations(&self) -> Vec<&'static str> {
        let in_folder = self.local.as_ref().is_some_and(|local| local.store == Local::FOLDER);
        let unlocked = in_folder || self.locks.as_ref().is_some_and(|locks| locks.mode.is_none());
        let all = [(true, "self-witnessed"), (unlocked, "unlocked store")];
        all.into_iter().filter(|(holds, _)| self.self_witnessed && *holds).map(|(_, what)| what).collect()
    }
}

/// How far a rollback has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RollbackSummary {
    /// The log of the task that is undone.
    pub of: String,
    /// Calls that are undone.
    pub undone: usize,
    /// Calls that are left to people, each with its tool and the reason.
    pub left: Vec<String>,
}

/// One attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AttemptSummary {
    /// Its number.
    pub number: i64,
    /// The pod.
    pub pod: String,
    /// Its node.
    pub node: String,
    /// Its runtime class, empty for the cluster's default.
    pub runtime_class: String,
    /// Digest of the policy that it ran by.
    pub policy_digest: String,
    /// When it was opened, by its own clock.
    pub opened: String,
    /// How often: more than once if its harness restarted.
    pub openings: u64,
    /// Why it closed, if in order.
    pub closed: Option<String>,
}

/// What became of the calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Effects {
    /// Upstream said that it did it.
    pub applied: u64,
    /// Certainly not done.
    pub not_applied: u64,
    /// Sent, and no answer.
    pub unknown: u64,
    /// No outcome in the log: done or not, nobody knows.
    pub open: u64,
}

/// Locks of the segments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Locks {
    /// The weakest mode of any segment.
    pub mode: Option<Mode>,
    /// The earliest end of any segment's lock.
    pub until: Option<jiff::Timestamp>,
}
