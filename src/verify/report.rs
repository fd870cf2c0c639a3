//! The results of a verification: findings, a verdict that follows from them, and a summary.

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

/// The maximum number of findings in a report. Further findings are only counted, so that a hostile log cannot fill the reader's memory.
const MAX_FINDINGS: usize = 1000;

/// The weight of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Weight {
    /// Worth knowing. Nothing is wrong with the log.
    Note,
    /// The log does not have its end.
    Incomplete,
    /// The log continues in a later version, which this verifier cannot evaluate.
    Newer,
    /// The log is not what Belay writes.
    Broken,
}

macro_rules! checks {
    ($($(#[$doc:meta])* $variant:ident = $id:literal $weight:ident),+ $(,)?) => {
        /// A condition that a log must meet, with its stable identifier.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
        pub enum Check {
            $($(#[$doc])* #[serde(rename = $id)] $variant),+
        }

        impl Check {
            /// Every check.
            pub const ALL: &[Check] = &[$(Check::$variant),+];

            /// Returns the stable identifier.
            pub fn as_str(self) -> &'static str {
                match self { $(Check::$variant => $id),+ }
            }

            /// Returns the weight of a finding of this check.
            pub fn weight(self) -> Weight {
                match self { $(Check::$variant => Weight::$weight),+ }
            }
        }
    };
}

checks! {
    /// Every object under `segments/` has the key of a segment.
    StoreKey = "store.key" Broken,
    /// In a folder, every object is a regular file that is not too long for an object.
    StoreObject = "store.object" Broken,
    /// Every object has exactly one version.
    StoreVersions = "store.versions" Broken,
    /// No object is hidden by a delete marker.
    StoreDeleted = "store.deleted" Broken,
    /// Every object except incidents has a lock that ends after the object was written.
    StoreRetention = "store.retention" Broken,
    /// The name of every incident is the digest of its bytes.
    StoreIncident = "store.incident" Broken,
    /// Every segment can be read and is in canonical form.
    SegmentForm = "segment.form" Broken,
    /// The key of every segment names its first record.
    SegmentKey = "segment.key" Broken,
    /// Segments follow each other without gap or overlap, from record 0.
    SegmentOrder = "segment.order" Broken,
    /// Every checkpoint matches the records up to it, recomputed from the leaves.
    CheckpointRoot = "checkpoint.root" Broken,
    /// All checkpoints have the same origin, the expected one.
    CheckpointOrigin = "checkpoint.origin" Broken,
    /// The witness cosigned every checkpoint.
    CheckpointWitness = "checkpoint.witness" Broken,
    /// The key in the newest `attempt.opened` signed the checkpoint.
    CheckpointAttempt = "checkpoint.attempt" Broken,
    /// No other key signed the checkpoint.
    CheckpointSignatures = "checkpoint.signatures" Broken,
    /// The log ends with the head that the task's status names.
    LogHead = "log.head" Broken,
    /// The log has at least one segment.
    LogEmpty = "log.empty" Incomplete,
    /// Every line is a complete record of a version that this verifier knows.
    RecordForm = "record.form" Broken,
    /// No record is of a later version than this verifier knows, and this verifier knows the form of every policy.
    RecordVersion = "record.version" Newer,
    /// Every record's time is RFC 3339 in UTC, to the millisecond.
    RecordTime = "record.time" Broken,
    /// All records of a segment have one writer, and each writer writes only its own kinds of records.
    RecordActor = "record.actor" Broken,
    /// The attempt numbers never decrease, and all records of a segment are of one attempt.
    AttemptOrder = "attempt.order" Broken,
    /// Every attempt starts with `attempt.opened`, the first record of its segment, and writes nothing after `attempt.closed` until it
    /// opens again.
    AttemptOpen = "attempt.open" Broken,
    /// The attempt's key is a valid key and is named after the attempt.
    AttemptKey = "attempt.key" Broken,
    /// The expressions and patterns of the policy's pack compile.
    AttemptPolicy = "attempt.policy" Broken,
    /// The policy is for this task.
    AttemptTask = "attempt.task" Broken,
    /// The pod was contained before the agent started.
    AttemptContained = "attempt.contained" Broken,
    /// The pod stayed contained while the agent ran.
    ContainmentBroken = "containment.broken" Note,
    /// No call is sent after the containment was lost.
    ContainmentLost = "containment.lost" Broken,
    /// Each call has one intent.
    CallUnique = "call.unique" Broken,
    /// Each outcome has an intent in the same attempt, each intent has at most one outcome, and only the read that the contract names
    /// resolves an unknown outcome.
    CallOutcome = "call.outcome" Broken,
    /// Each tool call is of a tool in the policy, with a side effect that the contract and the class allow.
    CallPolicy = "call.policy" Broken,
    /// As far as the log shows, at most one call with the same idempotency key took effect, and a replay gives the result of that call.
    CallIdempotency = "call.idempotency" Broken,
    /// Calls that require approval were approved by enough approvers, before the call, for exactly that call, and for one call only.
    CallApproval = "call.approval" Broken,
    /// The pack allows each tool call, by what was recorded about its data, rules and risk.
    CallAccess = "call.access" Broken,
    /// A rollback makes the calls of its plan, each in time, as planned and once. No other call compensates anything.
    CallRollback = "call.rollback" Broken,
    /// Every call has an outcome. A call without one may or may not have taken effect.
    CallOpen = "call.open" Note,
    /// The counters follow from the events.
    UsageCount = "usage.count" Broken,
    /// No call was allowed beyond the limits in force.
    UsageLimit = "usage.limit" Broken,
    /// No reply cost more than the remaining budget. A reply can do so, because model APIs count tokens in their own way.
    UsageOverrun = "usage.overrun" Note,
    /// Once the task has ended, the tiles and the summary exist.
    EndMissing = "end.missing" Incomplete,
    /// The tiles match the records, and only a log that has ended has tiles.
    EndTiles = "end.tiles" Broken,
    /// The summary matches the records and is signed by the witness.
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

/// A violation, or something that is worth knowing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The record that the finding is about, if any.
    pub record: Option<u64>,
    /// The object that the finding is about, if any.
    pub object: Option<String>,
    /// The check that found it.
    pub rule: Check,
    /// The weight of the check.
    pub weight: Weight,
    /// What was expected and what was found. The text may quote the log: escape it before you print it to a terminal.
    pub message: String,
}

/// The verdict about a log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// Everything holds, up to the end of the log.
    #[default]
    Valid,
    /// Everything holds, but the task has not ended, or the end of the log is missing.
    Incomplete,
    /// Everything holds up to a part of a later version than this verifier knows. The witness signed that part, and a later verifier can
    /// check it.
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

/// The results of a verification.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The verdict.
    pub verdict: Verdict,
    /// What does not hold, in the order in which it was found; at most 1000.
    pub findings: Vec<Finding>,
    /// The number of further findings.
    pub more_findings: u64,
    /// What the log says, as far as it could be read. Trust it only as far as the verdict allows.
    pub summary: Summary,
}

impl Report {
    /// Adds a finding and updates the verdict.
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

/// A summary of what the log says.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// The log's origin.
    pub origin: Option<String>,
    /// The task's namespace.
    pub namespace: Option<String>,
    /// The task's name.
    pub task: Option<String>,
    /// The user or team on whose behalf the task acts.
    pub principal: Option<String>,
    /// The number of segments that were read.
    pub segments: u64,
    /// The number of records that were read.
    pub records: u64,
    /// The recomputed root over these records, base64.
    pub root: Option<String>,
    /// Time of the first record, by its writer's clock.
    pub started: Option<String>,
    /// Time of the last record, by its writer's clock.
    pub ended: Option<String>,
    /// Unix time of the witness's last cosignature.
    pub witnessed: Option<u64>,
    /// The number of records of each kind.
    pub kinds: BTreeMap<&'static str, u64>,
    /// The attempts, oldest first.
    pub attempts: Vec<AttemptSummary>,
    /// The counters after the last record, recomputed.
    pub usage: Usage,
    /// The limits of the newest attempt.
    pub limits: Option<Limits>,
    /// The number of denials by rule.
    pub denials: BTreeMap<Rule, u64>,
    /// The number of calls by outcome.
    pub outcomes: Outcomes,
    /// How the task ended.
    pub closed: Option<TaskClosed>,
    /// The locks of the log's objects; absent if the store has no locks.
    pub locks: Option<Locks>,
    /// The number of incidents that the gateway recorded beside the log.
    pub incidents: u64,
    /// The progress of a rollback.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollback: Option<RollbackSummary>,
    /// Whether the party that ran the agent is also the witness, by the name of the witness's key.
    pub self_witnessed: bool,
    /// What replaced the cluster in the newest attempt, if it ran without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local: Option<Local>,
}

impl Summary {
    /// Returns what a reader must know besides the verdict about a log that no cluster vouches for. For other logs the list is empty.
    pub fn reservations(&self) -> Vec<&'static str> {
        let in_folder = self.local.as_ref().is_some_and(|local| local.store == Local::FOLDER);
        let unlocked = in_folder || self.locks.as_ref().is_some_and(|locks| locks.mode.is_none());
        let all = [(true, "self-witnessed"), (unlocked, "unlocked store")];
        all.into_iter().filter(|(holds, _)| self.self_witnessed && *holds).map(|(_, what)| what).collect()
    }
}

/// The progress of a rollback.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RollbackSummary {
    /// The origin of the log of the task that is rolled back.
    pub of: String,
    /// The number of compensated calls.
    pub undone: usize,
    /// The calls that need manual action, each with its tool and the reason.
    pub left: Vec<String>,
}

/// A summary of one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AttemptSummary {
    /// The attempt's number.
    pub number: i64,
    /// The pod's name.
    pub pod: String,
    /// The pod's node.
    pub node: String,
    /// The pod's runtime class, empty for the cluster's default.
    pub runtime_class: String,
    /// The digest of the policy under which the attempt ran.
    pub policy_digest: String,
    /// When the attempt was opened, by the harness's clock.
    pub opened: String,
    /// How often the attempt was opened: more than once if its harness restarted.
    pub openings: u64,
    /// The reason in `attempt.closed`; absent without that record.
    pub closed: Option<String>,
}

/// The number of calls by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcomes {
    /// Calls that took effect, by the upstream's answer or by a later read.
    pub applied: u64,
    /// Calls that certainly did not take effect.
    pub not_applied: u64,
    /// Calls that were sent and got no answer.
    pub unknown: u64,
    /// Calls without an outcome in the log. Whether they took effect is not known.
    pub open: u64,
}

/// The locks of the log's objects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Locks {
    /// The weakest mode of any lock.
    pub mode: Option<Mode>,
    /// The earliest end of any lock.
    pub until: Option<jiff::Timestamp>,
}
