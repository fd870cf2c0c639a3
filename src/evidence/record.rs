//! The records of a task's log.
//!
//! A record is the canonical JSON of one `Record` and has at most [`LONGEST`] bytes. Prompts, arguments and replies are never in a record,
//! only [commitments](crate::policy::commit) to them and their sizes. The policy and the plan of a rollback are too large for a record.
//! They are documents: canonical JSON beside the record, which names each document by its SHA-256. Every call that is sent has an
//! `Event::Intent` before it and an `Event::Outcome` after it. Every denial has an `Event::Denied`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::rollback::plan::Plan;
use crate::{
    canonical::{self, CanonicalError},
    policy::{
        access::Assessment,
        approval::{ApprovalSource, ApprovalState, CallKey, Vote},
        config::{PolicyConfig, Sensitivity, SideEffect, Usage, is_zero},
        ledger::Fate,
        rule::Rule,
    },
};

/// The record format that this crate writes and reads.
pub const VERSION: u8 = 1;

/// The maximum length of a record in bytes: entries of C2SP's tlog-tiles have their length in 16 bits.
pub const LONGEST: usize = 65_535;

/// A record that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The record has no canonical form.
    #[error(transparent)]
    Canonical(#[from] CanonicalError),
    /// The record is too long.
    #[error("expected a record of at most {LONGEST} bytes, found {0}")]
    Long(usize),
}

/// A record as it is written, and the documents that it names, in the order in which it names them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The record in canonical JSON.
    pub record: Vec<u8>,
    /// The documents, each in canonical JSON.
    pub documents: Vec<Vec<u8>>,
}

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
    pub key: String,
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

/// The names of the documents of `attempt.opened`, in their order.
pub const DOCUMENTS: [&str; 2] = ["policyDigest", "rollbackDigest"];

impl Record {
    /// Returns the record as it is written.
    ///
    /// # Errors
    /// Returns an error if the record has no canonical form, has a number beyond [`LARGEST_WHOLE`](canonical::LARGEST_WHOLE), or is longer
    /// than [`LONGEST`].
    pub fn encode(&self) -> Result<Encoded, EncodeError> {
        let record = canonical::to_whole(self)?;
        if record.len() > LONGEST {
            return Err(EncodeError::Long(record.len()));
        }
        let documents = match &self.event {
            Event::AttemptOpened(opened) => {
                let plan = opened.rollback.as_ref().map(canonical::to_bytes);
                std::iter::once(canonical::to_bytes(&opened.policy)).chain(plan).collect::<Result<_, _>>()?
            }
            _ => Vec::new(),
        };
        Ok(Encoded { record, documents })
    }

    /// Returns why this version cannot evaluate a record, if the record says itself that it is of a later version.
    pub fn newer(bytes: &[u8]) -> Option<Unread> {
        let value: Value = serde_json::from_slice(bytes).ok()?;
        let v = value.get("v").and_then(Value::as_u64)?;
        let later = v > u64::from(VERSION) && v <= canonical::LARGEST_WHOLE.unsigned_abs();
        later.then(|| Unread::Newer(format!("expected version {VERSION}, found {v}: use a belay that knows it")))
    }

    /// Returns why this version cannot evaluate a document. It cannot if the record names the document under the name at `place` in
    /// [`DOCUMENTS`], and the document is an object that differs from what this version would write after reading it. Documents hold what
    /// Belay decides by. They grow with new versions of Belay, while the form of records does not.
    pub fn newer_document(bytes: &[u8], place: usize, document: &[u8]) -> Option<Unread> {
        let record: Value = serde_json::from_slice(bytes).ok()?;
        let its = hex::encode(canonical::sha256(document));
        let value: Value = serde_json::from_slice(document).ok()?;
        let name = *DOCUMENTS.get(place)?;
        if record.get(name) != Some(&its.as_str().into()) || !value.is_object() {
            return None;
        }
        unknown(name, value, document).map(Unread::Newer)
    }

    /// Returns the number of documents that the record names.
    pub fn documents(&self) -> usize {
        match &self.event {
            Event::AttemptOpened(opened) => 1 + usize::from(opened.rollback.is_some()),
            _ => 0,
        }
    }

    /// Reads a record. Takes the documents that the record names from the front of `documents`.
    ///
    /// # Errors
    /// Returns what was expected and found if the bytes are not a complete record of this version with its documents. A field that
    /// [`Record`] does not have is rejected.
    pub fn decode(bytes: &[u8], documents: &mut dyn Iterator<Item = &[u8]>) -> Result<Self, Unread> {
        if bytes.len() > LONGEST {
            return Err(EncodeError::Long(bytes.len()).to_string().into());
        }
        let mut taken = Vec::new();
        let read = match Self::typed(bytes) {
            Ok(record) => Ok(record),
            Err(_) => Self::with_documents(bytes, documents, &mut taken),
        };
        let again = read.and_then(|record| {
            let again = record.encode().map_err(|error| error.to_string())?;
            Ok((record, again))
        });
        let (record, again) = again.map_err(|problem| problem.explained(bytes))?;
        if let Some(newer) = (record.v > VERSION).then(|| Self::newer(bytes)).flatten() {
            return Err(newer);
        }
        if again.documents != taken {
            let problem =
                "a document of the record has fields or values that this version of belay does not know".to_owned();
            return Err(Unread::from(problem).explained(bytes));
        }
        if again.record != bytes {
            let problem = format!("the record has fields or values that version {VERSION} does not have");
            return Err(Unread::from(problem).explained(bytes));
        }
        Ok(record)
    }

    /// Reads a record that names no documents. Intents and outcomes, which most records are, are parsed twice: once for the members of
    /// every record and once for their own. Otherwise serde would determine the flattened event itself and buffer every member twice.
    fn typed(bytes: &[u8]) -> serde_json::Result<Self> {
        #[derive(Deserialize)]
        struct Common<'b> {
            v: u8,
            seq: u64,
            time: String,
            attempt: i64,
            actor: Actor,
            usage: Usage,
            kind: &'b str,
        }
        let Common { v, seq, time, attempt, actor, usage, kind } = serde_json::from_slice(bytes)?;
        let event = match kind {
            "call.intent" => Event::Intent(serde_json::from_slice(bytes)?),
            "call.outcome" => Event::Outcome(serde_json::from_slice(bytes)?),
            _ => return serde_json::from_slice(bytes),
        };
        Ok(Self { v, seq, time, attempt, actor, usage, event })
    }

    /// Reads a record that may name documents. Puts each document in the place of its digest.
    fn with_documents<'d>(
        bytes: &[u8],
        documents: &mut dyn Iterator<Item = &'d [u8]>,
        taken: &mut Vec<&'d [u8]>,
    ) -> Result<Self, Unread> {
        let none = |error| format!("not a record: {error}");
        let mut value: Value = serde_json::from_slice(bytes).map_err(none)?;
        let opened = value.get("kind").is_some_and(|kind| kind == "attempt.opened");
        for name in DOCUMENTS.into_iter().filter(|_| opened) {
            let Some(digest) = value.get_mut(name) else { continue };
            let expected = digest.as_str().ok_or_else(|| format!("expected a digest as {name}"))?;
            let found = documents.next().ok_or_else(|| format!("expected the document {expected}, found none"))?;
            let its = hex::encode(canonical::sha256(found));
            if its != expected {
                return Err(format!("expected the document {expected}, found {its}").into());
            }
            let document: Value = serde_json::from_slice(found).map_err(|error| format!("document {its}: {error}"))?;
            if let Some(problem) = unknown(name, document.clone(), found) {
                return Err(problem.into());
            }
            *digest = document;
            taken.push(found);
        }
        Ok(serde_json::from_value(value).map_err(none)?)
    }
}

/// Returns why a document is not one that a record of this version may name under this name.
fn unknown(name: &str, value: Value, document: &[u8]) -> Option<String> {
    let problem = match name {
        "policyDigest" => unlike::<PolicyConfig>(value, document),
        _ => unlike::<Plan>(value, document),
    };
    let its = || hex::encode(canonical::sha256(document));
    problem.map(|problem| format!("the document {} is none that this version of belay knows: {problem}", its()))
}

/// Returns why a document is not a `T` in the form in which this version writes it.
fn unlike<T: Serialize + serde::de::DeserializeOwned>(value: Value, document: &[u8]) -> Option<String> {
    let again = serde_json::from_value::<T>(value).map_err(|error| error.to_string());
    // Serde reads more than it writes: a list for an object, `null` for an absent member, a member that has a default and is left out.
    match again.and_then(|read| canonical::to_bytes(&read).map_err(|error| error.to_string())) {
        Ok(again) if again == document => None,
        Ok(_) => Some("it has fields or values that are not written so".to_owned()),
        Err(problem) => Some(problem),
    }
}

/// A record that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unread {
    /// The record does not have the form of its version: what was expected and found.
    #[error("{0}")]
    Wrong(String),
    /// A later version may be able to read the record. This version cannot evaluate it.
    #[error("{0}")]
    Newer(String),
}

impl From<String> for Unread {
    fn from(problem: String) -> Self {
        Self::Wrong(problem)
    }
}

impl Unread {
    /// Returns a more exact error if the record's bytes show one: the record is of a later version, or has a number that no record may
    /// have.
    fn explained(self, bytes: &[u8]) -> Self {
        if let Some(newer) = Record::newer(bytes) {
            return newer;
        }
        let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return self };
        match beyond(&value) {
            Some(number) => Self::Wrong(canonical::beyond(number)),
            None => self,
        }
    }
}

/// Returns the first number that no record may have.
fn beyond(value: &Value) -> Option<&serde_json::Number> {
    match value {
        Value::Number(number) => {
            let whole =
                number.as_i64().is_some_and(|whole| whole.unsigned_abs() <= canonical::LARGEST_WHOLE.unsigned_abs());
            (!whole).then_some(number)
        }
        Value::Array(items) => items.iter().find_map(beyond),
        Value::Object(members) => members.values().find_map(beyond),
        _ => None,
    }
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

/// The kind of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Channel {
    /// A tool call, over MCP or plain HTTP.
    Tool,
    /// A listing of an MCP upstream's tools, from which their definitions are taken. It does not count as a tool call.
    Listing,
    /// A model call.
    Model,
    /// The agent's own traffic through the proxy.
    Egress,
}

impl Channel {
    /// Returns the name in records, headers and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tool => "tool",
            Self::Listing => "listing",
            Self::Model => "model",
            Self::Egress => "egress",
        }
    }

    /// Returns whether a call may be sent once its intent is witnessed. Any other call is sent once its intent is stored, because it may
    /// change something that no later record mentions.
    pub fn leaves_witnessed(self, effect: Option<SideEffect>) -> bool {
        self == Self::Model || (self == Self::Tool && effect == Some(SideEffect::Read))
    }
}

/// The number of denied calls by channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Refusals {
    /// Denied model calls.
    pub model: u64,
    /// Denied tool calls.
    pub tool: u64,
    /// Denied listings.
    pub listing: u64,
    /// Denied connections of the agent's own traffic.
    pub egress: u64,
}

impl Refusals {
    /// Counts the denials of a record, unless they are of an ignored host.
    pub fn add(&mut self, denied: &Denied) {
        if denied.rule == Rule::EgressIgnored {
            return;
        }
        let of = match denied.channel {
            Channel::Model => &mut self.model,
            Channel::Tool => &mut self.tool,
            Channel::Listing => &mut self.listing,
            Channel::Egress => &mut self.egress,
        };
        *of = of.saturating_add(denied.calls());
    }

    /// Returns the counts in words; `None` if no call was denied. They belong beside the end of a task: an agent that catches its errors
    /// can succeed without having done anything.
    pub fn in_words(&self) -> Option<String> {
        let counted = |count: u64, one: &str| match count {
            0 => None,
            1 => Some(format!("1 {one}")),
            more => Some(format!("{more} {one}s")),
        };
        let kinds = [
            counted(self.model, "model call"),
            counted(self.tool, "tool call"),
            counted(self.listing, "listing"),
            counted(self.egress, "connection"),
        ];
        let kinds: Vec<_> = kinds.into_iter().flatten().collect();
        (!kinds.is_empty()).then(|| format!("refused: {}", kinds.join(", ")))
    }
}

/// A call that is about to be sent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Intent {
    /// The name of the call, unique in the log. The outcome refers to it.
    pub call: String,
    /// The channel of the call.
    pub channel: Channel,
    /// The tool's name, the model path, `host:port`, or, for a listing, the name of the tool that it was made for.
    pub target: String,
    /// The side effect; absent for models, listings and direct traffic. It is that of the tool's contract, or a stricter one if the
    /// upstream says that the tool changes something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<SideEffect>,
    /// The digest of the upstream's definition of an MCP tool that is in force, see [`definition`](crate::policy::definition).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub definition: Option<String>,
    /// The [commitment](crate::policy::commit) to the request: to a tool's arguments by field, to a model's body as sent. Absent for
    /// tunnels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_digest: Option<String>,
    /// Bytes of the request, with URL and headers if it goes through the proxy. 0 for tunnels, whose bytes are in the outcome.
    pub request_bytes: u64,
    /// The rules that were evaluated and allowed the call.
    pub rules: Vec<Rule>,
    /// The idempotency key of the call, see [`ledger`](crate::policy::ledger).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The names of the call's approvals: at most one that the contract requires and one that the pack requires.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub approvals: Vec<String>,
    /// In a rollback: the call that this call compensates, by its name in the other task's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undoes: Option<String>,
    /// What the pack found about a tool call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assessment: Option<Assessment>,
    /// The requested model, which determines the price.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Tokens reserved until the outcome.
    pub reserved_tokens: i64,
    /// Cost reserved until the outcome, in millionths of the pack's currency unit.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub reserved_cost_micros: i64,
}

/// Whether a call took effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// The upstream answered that it executed the call.
    Applied,
    /// The call certainly did not take effect: the request was not sent, or the upstream rejected it.
    NotApplied,
    /// Not known: the request was sent and got no answer.
    Unknown,
}

/// The outcome of a call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// The name of the call, as in its intent.
    pub call: String,
    /// Whether the call took effect.
    pub effect: Effect,
    /// The rule by which the gateway denied the call or the upstream failed, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<Rule>,
    /// The upstream's HTTP status; 0 without one.
    pub status: u16,
    /// The commitment to the bytes of the reply that the agent got, or would have got without `rule`. Absent without a reply and for
    /// tunnels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_digest: Option<String>,
    /// Bytes of the reply. For a tunnel and for a request through the proxy: all bytes that came back, including heads.
    pub response_bytes: u64,
    /// For a tunnel: the bytes that the agent sent through it. For other calls the intent has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<u64>,
    /// Tokens by the usage that the reply reports, or the reservation if it reports none.
    pub tokens: i64,
    /// The cost of these tokens, in millionths of the pack's currency unit.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cost_micros: i64,
    /// The address that the gateway dialled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
    /// SHA-256, hex, of the certificate that the upstream showed to the gateway. Absent without TLS, and for tunnels, whose TLS is the
    /// agent's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// The sensitivity of the result that the agent got.
    #[serde(default, skip_serializing_if = "Sensitivity::is_unclassified")]
    pub sensitivity: Sensitivity,
    /// The commitment to the arguments of this call's compensation, as its contract describes it. The arguments are stored outside the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undone_by: Option<String>,
}

impl Outcome {
    /// Returns the digest of the result that the agent got. `None` if there was no reply or a rule withheld it.
    pub fn given(&self) -> Option<&String> {
        self.response_digest.as_ref().filter(|_| self.rule.is_none())
    }
}

impl Effect {
    /// Returns the name in records and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::NotApplied => "not_applied",
            Self::Unknown => "unknown",
        }
    }

    /// Returns what the ledger stores about a call with this effect. `None` if the call certainly did nothing.
    pub fn fate(self) -> Option<Fate> {
        match self {
            Self::Applied => Some(Fate::Applied),
            Self::NotApplied => None,
            Self::Unknown => Some(Fate::Unknown),
        }
    }
}

/// A call that was answered with the result of an earlier call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Replayed {
    /// The earlier call.
    pub call: String,
    /// The tool.
    pub target: String,
    /// The idempotency key of both calls.
    pub key: String,
    /// The commitment to the arguments of both calls.
    pub request_digest: String,
    /// The commitment to the result, as in the outcome of the earlier call.
    pub response_digest: String,
}

/// The resolution of a call whose outcome was unknown, by a read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resolved {
    /// The call.
    pub call: String,
    /// Whether the call took effect: `applied` or `not_applied`.
    pub effect: Effect,
    /// The read that resolved it: a later call of the tool that the contract's `verify` names.
    pub by: String,
}

/// A denial.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Denied {
    /// The channel of the denied call.
    pub channel: Channel,
    /// The requested target: at most 256 characters, control characters escaped.
    pub target: String,
    /// The rule that denied the call.
    pub rule: Rule,
    /// The reason that the agent was given.
    pub reason: String,
    /// The commitment to the request, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_digest: Option<String>,
    /// How many calls of this channel, target and rule were denied. More than 1 if they came too fast for one record each.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub count: i64,
}

fn one() -> i64 {
    1
}

fn is_one(count: &i64) -> bool {
    *count == 1
}

impl Denied {
    /// Counts one more denial of the same kind. The record then no longer refers to one request.
    pub fn more(&mut self) {
        self.count = self.count.saturating_add(1);
        self.request_digest = None;
    }

    /// Returns how many calls the record counts.
    pub fn calls(&self) -> u64 {
        u64::try_from(self.count).unwrap_or_default()
    }

    /// Returns whether the record is valid: it counts one call, or it counts several and has no request digest.
    pub fn is_countable(&self) -> bool {
        self.count == 1 || (self.count > 1 && self.request_digest.is_none())
    }
}

/// The state of the approval of one exact call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Approval {
    /// The name of the ApprovalRequest, which follows from the call.
    pub name: String,
    /// The UID of the ApprovalRequest.
    pub uid: String,
    /// Which policy requires the approval: the contract or the pack.
    pub by: ApprovalSource,
    /// The tool.
    pub tool: String,
    /// The commitment to the arguments.
    pub request_digest: String,
    /// How many approvers must approve.
    pub required: i64,
    /// When the request expires, RFC 3339.
    pub expires: String,
    /// The pack's reasons to require approval, as the approvers saw them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub because: Vec<String>,
    /// The state of the request.
    pub standing: ApprovalState,
    /// The decisions, each with its approver.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub decisions: Vec<Vote>,
}

impl Approval {
    /// Returns the call that the approval is for.
    pub fn call(&self) -> CallKey {
        CallKey { by: self.by, tool: self.tool.clone(), digest: self.request_digest.clone() }
    }
}

/// How an attempt's harness ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttemptClosed {
    /// `agentEnded`, `terminated`, `wallTime`, `denials`, `unapproved` or `parked`. The same attempt may open again only after the first
    /// two.
    pub reason: String,
}

impl AttemptClosed {
    /// The agent ended by itself within its wall time, and the process that ran it waited for its end. The harness in a pod cannot know
    /// this; `belay run` does.
    pub const AGENT_ENDED: &str = "agentEnded";
    /// The harness was told to end within the attempt's wall time. The agent had ended or never ran, or its pod was deleted or evicted. The
    /// pod's status says which of these happened; this value does not.
    pub const TERMINATED: &str = "terminated";
    /// The attempt's wall time was over.
    pub const WALL_TIME: &str = "wallTime";
    /// So many calls were denied that the task is over.
    pub const DENIALS: &str = "denials";
    /// A call that was not approved in time ended the task.
    pub const UNAPPROVED: &str = "unapproved";
    /// Evidence could not be stored for a long time.
    pub const PARKED: &str = "parked";

    /// Returns whether the harness ended within the attempt's wall time, by its own clock, and not for a reason of its own. This
    /// contradicts the statement that the attempt ran out of time. It does not say that the agent succeeded.
    pub fn is_in_time(&self) -> bool {
        matches!(self.reason.as_str(), Self::AGENT_ENDED | Self::TERMINATED)
    }

    /// Returns the rule by which the attempt is over for good. An attempt that was only told to end may open again if its harness restarts.
    pub fn rule(&self) -> Option<Rule> {
        match self.reason.as_str() {
            Self::AGENT_ENDED | Self::TERMINATED => None,
            Self::WALL_TIME => Some(Rule::WallTime),
            Self::DENIALS => Some(Rule::Denials),
            Self::UNAPPROVED => Some(Rule::ToolApproval),
            Self::PARKED => Some(Rule::Evidence),
            _ => Some(Rule::TaskClosed),
        }
    }
}

/// How a task ended, as the operator reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TaskClosed {
    /// `Succeeded` or `Failed`.
    pub phase: String,
    /// The failure class, empty on success. `Unknown` if it is not known how the agent ended.
    pub failure_class: String,
    /// The reason in one word.
    pub reason: String,
    /// The agent's exit code in the last attempt, if it had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// SHA-256, hex, of the images that the kubelet ran in the last attempt, by container, as far as the kubelet reported them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, String>,
}

impl TaskClosed {
    /// The failure class of a task for which it is not known how its agent ended.
    pub const UNKNOWN: &str = "Unknown";
    /// The reason of a task for which it is not known how its agent ended.
    pub const VERDICT_UNKNOWN: &str = "VerdictUnknown";

    /// Returns the end of a task for which it is not known how its agent ended.
    pub fn unknown(self) -> Self {
        let (phase, failure_class) = ("Failed".to_owned(), Self::UNKNOWN.to_owned());
        Self { phase, failure_class, reason: Self::VERDICT_UNKNOWN.to_owned(), ..self }
    }

    /// Returns the end with which a task is sealed if the party that seals it reports this end.
    ///
    /// `presumed` says that nobody saw the agent's end. `began` says whether the last attempt opened the log; no agent runs before that.
    /// `parting` is the reason with which the attempt was closed, if it was. `time_over` says whether its records reach beyond its wall
    /// time.
    ///
    /// The log must confirm a presumed end, or else the end is unknown. There is one exception: if the attempt was closed because its wall
    /// time was over, that is the end, because the log itself reports it. An observed end is unknown, too, if the log contradicts it.
    pub fn borne_out(self, presumed: bool, began: bool, parting: Option<&str>, time_over: bool) -> Self {
        let in_time = |parting: &str| AttemptClosed { reason: parting.to_owned() }.is_in_time();
        let holds = match (self.phase.as_str(), self.failure_class.as_str()) {
            ("Succeeded", _) => {
                let ends = [AttemptClosed::WALL_TIME, AttemptClosed::DENIALS, AttemptClosed::UNAPPROVED];
                !parting.is_some_and(|parting| ends.contains(&parting))
            }
            _ if !presumed => true,
            (_, class) if parting == Some(AttemptClosed::WALL_TIME) && class != "Budget" => {
                return Self { failure_class: "Budget".to_owned(), reason: "DeadlineExceeded".to_owned(), ..self };
            }
            (_, "Budget") => match parting {
                Some(AttemptClosed::WALL_TIME) => true,
                Some(parting) if !in_time(parting) => false,
                _ => time_over,
            },
            // The agent may have succeeded before its pod was gone, and nobody saw it.
            _ => !began || parting.is_some_and(|parting| !in_time(parting)),
        };
        if holds { self } else { self.unknown() }
    }

    /// Returns whether the task failed in a known way, so that it may be rolled back.
    pub fn has_failed(&self) -> bool {
        self.phase == "Failed" && self.failure_class != Self::UNKNOWN && self.failure_class != "Cancelled"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case::seen("Succeeded", "", false, Some("terminated"), "")]
    #[case::seen_and_out_of_time("Succeeded", "", false, Some("wallTime"), "Unknown")]
    #[case::seen_to_fail("Failed", "Agent", false, Some("wallTime"), "Agent")]
    #[case::presumed_out_of_time("Failed", "Budget", true, Some("wallTime"), "Budget")]
    #[case::presumed_though_told_to_end_in_time("Failed", "Budget", true, Some("terminated"), "Unknown")]
    #[case::presumed_without_a_word("Failed", "Budget", true, None, "Unknown")]
    #[case::lost("Failed", "Infrastructure", true, Some("terminated"), "Unknown")]
    #[case::lost_without_a_word("Failed", "Infrastructure", true, None, "Unknown")]
    #[case::lost_after_its_time("Failed", "Infrastructure", true, Some("wallTime"), "Budget")]
    #[case::lost_after_its_denials("Failed", "Infrastructure", true, Some("denials"), "Infrastructure")]
    fn the_log_bears_it_out(
        #[case] phase: &str,
        #[case] class: &str,
        #[case] presumed: bool,
        #[case] parting: Option<&str>,
        #[case] sealed: &str,
    ) {
        let closed = TaskClosed {
            phase: phase.into(),
            failure_class: class.into(),
            reason: "R".into(),
            exit_code: None,
            images: BTreeMap::new(),
        };
        let sealed_as = closed.borne_out(presumed, true, parting, false);
        assert_eq!(sealed_as.failure_class, sealed, "{sealed_as:?}");
    }
}
