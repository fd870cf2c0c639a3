//! The records of a task's log.
//!
//! Prompts, arguments and replies are never in a record, only [commitments](crate::policy::commit) to them and their sizes. The policy and
//! the plan of a rollback are too large for a record. They are documents: canonical JSON beside the record, which names each document by
//! its SHA-256. The records of calls and the records of ends have modules of their own. So has the form in which a record is written.
//!
//! Guarantees: a record is the canonical JSON of one [`Record`] and has at most [`LONGEST`] bytes. Every call that is sent has an
//! [`Event::Intent`] before it and an [`Event::Outcome`] after it. Every denial has an [`Event::Denied`].
//!
//! Non-goals: the rules about which record may follow which, see [`state`](crate::evidence::state).

use serde::{Deserialize, Serialize};

use super::rollback::plan::Plan;
use crate::{
    canonical,
    policy::config::{PolicyConfig, Usage},
};

mod call;
mod closed;
mod codec;
mod summary;

pub use call::{Approval, CallOutcome, Channel, DenialCounts, Denied, Intent, Outcome, Replayed, Resolved};
pub use closed::{AttemptClosed, TaskClosed};
pub use codec::{DOCUMENTS, EncodeError, Encoded, LONGEST, Unread};
pub use summary::{Summary, Tone};

/// The record format that this crate writes and reads.
pub const VERSION: u8 = 1;

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Format version, [`VERSION`].
    pub v: u8,
    /// The index in the log, from 0.
    pub seq: u64,
    /// The time by the writer's clock: RFC 3339, UTC, milliseconds.
    pub time: String,
    /// The number of the attempt, from 1.
    pub attempt: i64,
    /// The writer of the record.
    pub actor: Actor,
    /// The counters after this record.
    pub usage: Usage,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

impl Record {
    /// Returns what the record says, for people. `belay watch` and incident reports show it.
    pub fn summary(&self) -> Summary {
        let attempt = self.attempt;
        match &self.event {
            Event::AttemptOpened(opened) => opened.summary(attempt),
            Event::Intent(intent) => intent.summary(),
            Event::Replayed(replayed) => replayed.summary(),
            Event::Outcome(outcome) => outcome.summary(),
            Event::Resolved(resolved) => resolved.summary(),
            Event::Denied(denied) => denied.summary(),
            Event::ApprovalRequested(approval) => approval.summary_of_request(),
            Event::ApprovalDecided(approval) => approval.summary_of_decision(),
            Event::ContainmentChecked(containment) => containment.summary(),
            Event::AttemptClosed(closed) => closed.summary(attempt),
            Event::TaskClosed(closed) => closed.summary(),
        }
    }
}

/// The writer of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Actor {
    /// The harness in the agent's pod. Its segments carry the attempt's signature.
    Harness,
    /// The gateway. Its segments carry the witness's signature alone.
    Gateway,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
pub enum Event {
    /// An attempt's harness started. This is the first record of each attempt. A harness that restarts writes it again.
    #[serde(rename = "attempt.opened")]
    AttemptOpened(Box<AttemptOpened>),
    /// A call is allowed and is about to be sent.
    #[serde(rename = "call.intent")]
    Intent(Intent),
    /// A call was answered with the result of an earlier call and was not sent.
    #[serde(rename = "call.replayed")]
    Replayed(Replayed),
    /// The outcome of a call that was sent.
    #[serde(rename = "call.outcome")]
    Outcome(Outcome),
    /// A read resolved a call whose outcome was unknown.
    #[serde(rename = "call.resolved")]
    Resolved(Resolved),
    /// A call was denied and was not sent.
    #[serde(rename = "call.denied")]
    Denied(Denied),
    /// The approval of a call is requested.
    #[serde(rename = "approval.requested")]
    ApprovalRequested(Approval),
    /// The approvers have decided, or the request has expired.
    #[serde(rename = "approval.decided")]
    ApprovalDecided(Approval),
    /// The containment probe ran again during the attempt.
    #[serde(rename = "containment.checked")]
    ContainmentChecked(Containment),
    /// The harness ended in an orderly way.
    #[serde(rename = "attempt.closed")]
    AttemptClosed(AttemptClosed),
    /// The task has ended. This is the last record of a complete log. The gateway writes it when the operator asks for it.
    #[serde(rename = "task.closed")]
    TaskClosed(TaskClosed),
}

impl Event {
    /// Returns whether the event reports something that has already happened. Something that is only about to happen can still be denied.
    pub fn is_of_the_past(&self) -> bool {
        match self {
            Self::Intent(_)
            | Self::Replayed(_)
            | Self::Resolved(_)
            | Self::ApprovalRequested(_)
            | Self::ApprovalDecided(_) => false,
            Self::AttemptOpened(_)
            | Self::Outcome(_)
            | Self::Denied(_)
            | Self::ContainmentChecked(_)
            | Self::AttemptClosed(_)
            | Self::TaskClosed(_) => true,
        }
    }

    /// Returns the record's `kind`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::AttemptOpened(_) => "attempt.opened",
            Self::Intent(_) => "call.intent",
            Self::Replayed(_) => "call.replayed",
            Self::Outcome(_) => "call.outcome",
            Self::Resolved(_) => "call.resolved",
            Self::Denied(_) => "call.denied",
            Self::ApprovalRequested(_) => "approval.requested",
            Self::ApprovalDecided(_) => "approval.decided",
            Self::ContainmentChecked(_) => "containment.checked",
            Self::AttemptClosed(_) => "attempt.closed",
            Self::TaskClosed(_) => "task.closed",
        }
    }
}

/// The conditions under which an attempt runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttemptOpened {
    /// The public half of the Ed25519 key that signs the attempt's checkpoints, as a C2SP verifier key.
    pub verifier_key: String,
    /// The whole policy, whose digest the gateway confirmed. It is a document.
    #[serde(rename = "policyDigest", serialize_with = "by_digest")]
    pub policy: PolicyConfig,
    /// The pod.
    pub pod: Pod,
    /// What the probe saw before the agent started.
    pub containment: Containment,
    /// The plan of a rollback, made from the log of the other task. It is a document.
    #[serde(default, rename = "rollbackDigest", serialize_with = "by_digest", skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Plan>,
    /// What replaced the cluster, if the attempt ran without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<Local>,
}

impl AttemptOpened {
    fn summary(&self, attempt: i64) -> Summary {
        let Pod { name, node, runtime_class, .. } = &self.pod;
        let runtime = if runtime_class.is_empty() { "the default runtime" } else { runtime_class };
        let Containment { reachable, rounds, .. } = &self.containment;
        let contained = format!("{reachable} answers, and {} silent, in {rounds} rounds", self.containment.silent());
        Summary::new(Tone::Plain, "opened", format!("attempt {attempt} in pod {name} on {node}, {runtime}"), contained)
    }
}

/// The machine on which an attempt ran without a cluster. It tells a reader which isolation was in place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Local {
    /// The sandbox and its version.
    pub sandbox: String,
    /// The agent's root: `host` for the machine's own programs and libraries, read-only, or else the folder of an unpacked image.
    pub root: String,
    /// Where the evidence was written: `folder`, which has no locks, or `s3://bucket`.
    pub store: String,
    /// Hosts with an address that a user chose, as `HOST=ADDRESS`. The address was dialled without checks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resolved: Vec<String>,
}

impl Local {
    /// The [`root`](Self::root) that stands for the machine's own programs.
    pub const HOST: &str = "host";
    /// The [`store`](Self::store) that stands for a folder.
    pub const FOLDER: &str = "folder";
}

/// Serializes a document as its SHA-256 in hex, which is what a record holds.
fn by_digest<T: Serialize, S: serde::Serializer>(document: &T, to: S) -> Result<S::Ok, S::Error> {
    let digest = canonical::digest(document).map_err(serde::ser::Error::custom)?;
    to.serialize_str(&hex::encode(digest))
}

/// The attempt's pod, from the downward API and the gateway's TokenReview.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// The pod's name.
    pub name: String,
    /// The pod's UID.
    pub uid: String,
    /// The pod's node.
    pub node: String,
    /// The pod's runtime class, empty for the cluster's default.
    pub runtime_class: String,
    /// The name and the digest of the NetworkPolicy, as the operator read it back.
    pub network_policy: String,
}

/// What the containment probe saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Containment {
    /// Whether both controls held.
    pub contained: bool,
    /// The number of consecutive rounds in which both controls held.
    pub rounds: u32,
    /// Milliseconds from the first of these rounds to the last.
    pub millis: u64,
    /// The address that answered.
    pub reachable: String,
    /// The addresses that did not answer.
    pub unreachable: Vec<String>,
    /// What the probe saw and should not have seen; empty if the pod is contained.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub breaches: Vec<String>,
}

impl Containment {
    fn summary(&self) -> Summary {
        if self.contained && self.breaches.is_empty() {
            Summary::new(Tone::Plain, "contained", "still contained", format!("{} silent", self.silent()))
        } else {
            Summary::new(Tone::Bad, "breach", "containment lost", self.breaches.join(", "))
        }
    }

    /// Returns the number of silent addresses, with its verb.
    fn silent(&self) -> String {
        match self.unreachable.len() {
            1 => "one other address is".to_owned(),
            count => format!("{count} other addresses are"),
        }
    }
}
