//! What happened: the entries of a task's log.
//!
//! A record is canonical JSON of one `Record`, at most [`LONGEST`] bytes. Prompts, arguments and replies are never in it, only
//! [commitments](crate::policy::commit) to them and their sizes. What a record is too small for, the policy and the plan of a rollback, are documents: canonical JSON that lies beside
//! the record, which names it by its SHA-256. Every call that leaves has an `Event::Intent` before and an `Event::Outcome` after; every refusal has an
//! `Event::Denied`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::rollback::plan::Plan;
use crate::{
    canonical::{self, CanonicalError},
    policy::{
        access::Assessment,
        approval::{AskedBy, Exact, Standing, Vote},
        config::{PolicyConfig, Sensitivity, SideEffect, Usage, is_zero},
        ledger::Fate,
        rule::Rule,
    },
};

/// The record format that this crate writes and reads.
pub const VERSION: u8 = 1;

/// Longest record in bytes: entries of C2SP's tlog-tiles have their length in 16 bits.
pub const LONGEST: usize = 65_535;

/// A record that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// It has no canonical form.
    #[error(transparent)]
    Canonical(#[from] CanonicalError),
    /// It is too long.
    #[error("expected a record of at most {LONGEST} bytes, found {0}")]
    Long(usize),
}

/// A record as it is written, and the documents that it names, in the order in which it does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Canonical JSON.
    pub record: Vec<u8>,
    /// Canonical JSON, each.
    pub documents: Vec<Vec<u8>>,
}

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Format version, [`VERSION`].
    pub v: u8,
    /// Index in the log, from 0.
    pub seq: u64,
    /// When, by the writer's clock: RFC 3339, UTC, milliseconds.
    pub time: String,
    /// The attempt, from 1.
    pub attempt: i64,
    /// Who wrote it.
    pub actor: Actor,
    /// The counters after this record.
    pub usage: Usage,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// Who wrote a record.
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
    /// An attempt's harness has started. The first record of each attempt; a harness that restarted writes it again.
    #[serde(rename = "attempt.opened")]
    AttemptOpened(Box<AttemptOpened>),
    /// A call is allowed and about to leave.
    #[serde(rename = "call.intent")]
    Intent(Intent),
    /// A call was answered with the result of one that was made before, and did not leave.
    #[serde(rename = "call.replayed")]
    Replayed(Replayed),
    /// What became of a call that left.
    #[serde(rename = "call.outcome")]
    Outcome(Outcome),
    /// Whether a call took effect was not known, and a read has told.
    #[serde(rename = "call.resolved")]
    Resolved(Resolved),
    /// A call was refused, and did not leave.
    #[serde(rename = "call.denied")]
    Denied(Denied),
    /// People are asked whether a call may be made.
    #[serde(rename = "approval.requested")]
    ApprovalRequested(Approval),
    /// They have decided, or their time is over.
    #[serde(rename = "approval.decided")]
    ApprovalDecided(Approval),
    /// The containment probe ran again during the attempt.
    #[serde(rename = "containment.checked")]
    ContainmentChecked(Containment),
    /// The harness has ended in order.
    #[serde(rename = "attempt.closed")]
    AttemptClosed(AttemptClosed),
    /// The task has ended. The last record of a complete log, written by the gateway when the operator says so.
    #[serde(rename = "task.closed")]
    TaskClosed(TaskClosed),
}

impl Event {
    /// Whether it tells what has happened already. What is about to happen can still be refused.
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

    /// The record's `kind`.
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

/// Under what an attempt runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttemptOpened {
    /// The Ed25519 key that signs the attempt's checkpoints: a C2SP verifier key.
    pub key: String,
    /// The policy, whole, by the digest that the gateway confirmed: a document.
    #[serde(rename = "policyDigest", serialize_with = "by_digest")]
    pub policy: PolicyConfig,
    /// The pod.
    pub pod: Pod,
    /// What the probe saw before the agent started.
    pub containment: Containment,
    /// What a rollback is to undo, as the log of the other task has it: a document.
    #[serde(default, rename = "rollbackDigest", serialize_with = "by_digest", skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Plan>,
    /// What stood in for a cluster, where there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<Local>,
}

/// A machine on which an attempt ran without a cluster: what a reader has to know of the walls that were there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Local {
    /// The sandbox and its version.
    pub sandbox: String,
    /// The agent's root: `host` for the machine's own programs and libraries, read-only, else the folder of an unpacked image.
    pub root: String,
    /// Where evidence went: `folder`, which has no locks, or `s3://bucket`.
    pub store: String,
    /// Hosts to which somebody gave an address, `HOST=ADDRESS`: it was dialled unchecked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resolved: Vec<String>,
}

impl Local {
    /// As [`root`](Self::root): the machine's own programs.
    pub const HOST: &str = "host";
    /// As [`store`](Self::store): a folder.
    pub const FOLDER: &str = "folder";
}

/// In a record there is a document's SHA-256, hex.
fn by_digest<T: Serialize, S: serde::Serializer>(document: &T, to: S) -> Result<S::Ok, S::Error> {
    let digest = canonical::digest(document).map_err(serde::ser::Error::custom)?;
    to.serialize_str(&hex::encode(digest))
}

/// The documents of `attempt.opened`, in their order.
pub const DOCUMENTS: [&str; 2] = ["policyDigest", "rollbackDigest"];

impl Record {
    /// The record as it is written.
    ///
    /// # Errors
    /// If it has no canonical form, a number beyond [`LARGEST_WHOLE`](canonical::LARGEST_WHOLE), or is longer than [`LONGEST`].
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

    /// Why a record cannot be judged by this version, if it says itself that it is of a later one.
    pub fn newer(bytes: &[u8]) -> Option<Unread> {
        let value: Value = serde_json::from_slice(bytes).ok()?;
        let v = value.get("v").and_then(Value::as_u64)?;
        let later = v > u64::from(VERSION) && v <= canonical::LARGEST_WHOLE.unsigned_abs();
        later.then(|| Unread::Newer(format!("expected version {VERSION}, found {v}: use a belay that knows it")))
    }

    /// Why a document cannot be judged by this version: a record's bytes name it as its `place`th, and it is an object that is not, byte for
    /// byte, what this version would write of what it reads there. What decides over calls grows with belay, and the form of records does
    /// not.
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

    /// How many documents it names.
    pub fn documents(&self) -> usize {
        match &self.event {
            Event::AttemptOpened(opened) => 1 + usize::from(opened.rollback.is_some()),
            _ => 0,
        }
    }

    /// Reads a record, which takes the documents that it names from the front of `documents`.
    ///
    /// # Errors
    /// What was expected and found, if it is not a record of this version, whole, with its documents: a field that [`Record`] does not
    /// have is refused.
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

    /// Reads a record that names no documents. Those of calls, which most are, are read twice, once for what every record has and once for
    /// what is theirs: where serde finds out by itself what a flattened event is, it keeps every member of it in between, twice.
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

    /// Reads a record with its documents, where it may name some: each stands where its digest is.
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

/// Why a document is none that a record of this version may name so.
fn unknown(name: &str, value: Value, document: &[u8]) -> Option<String> {
    let problem = match name {
        "policyDigest" => unlike::<PolicyConfig>(value, document),
        _ => unlike::<Plan>(value, document),
    };
    let its = || hex::encode(canonical::sha256(document));
    problem.map(|problem| format!("the document {} is none that this version of belay knows: {problem}", its()))
}

/// Why a document is not one of a form, written as that is.
fn unlike<T: Serialize + serde::de::DeserializeOwned>(value: Value, document: &[u8]) -> Option<String> {
    let again = serde_json::from_value::<T>(value).map_err(|error| error.to_string());
    // Serde takes more than it writes: a list for an object, `null` for what is not there, a default that is left out.
    match again.and_then(|read| canonical::to_bytes(&read).map_err(|error| error.to_string())) {
        Ok(again) if again == document => None,
        Ok(_) => Some("it has fields or values that are not written so".to_owned()),
        Err(problem) => Some(problem),
    }
}

/// A record that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unread {
    /// It is none of the version that it says it is: what was expected and found.
    #[error("{0}")]
    Wrong(String),
    /// A later version may know it: this one cannot judge it.
    #[error("{0}")]
    Newer(String),
}

impl From<String> for Unread {
    fn from(problem: String) -> Self {
        Self::Wrong(problem)
    }
}

impl Unread {
    /// Says better what is wrong with a record, where its bytes tell: that it is of a later version, or has a number that none has.
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

/// A number that no record has.
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
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Its node.
    pub node: String,
    /// Its runtime class, empty for the cluster's default.
    pub runtime_class: String,
    /// Name and digest of the NetworkPolicy, as the operator read it back.
    pub network_policy: String,
}

/// What the containment probe saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Containment {
    /// Whether both controls held.
    pub contained: bool,
    /// Consecutive rounds in which they did.
    pub rounds: u32,
    /// Milliseconds from the first round to the last.
    pub millis: u64,
    /// The address that answered.
    pub reachable: String,
    /// The addresses that did not.
    pub unreachable: Vec<String>,
    /// What was seen that should not have been; empty when contained.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub breaches: Vec<String>,
}

/// Which way a call goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Channel {
    /// A tool call, over MCP or plain HTTP.
    Tool,
    /// The list of an MCP upstream's tools, which their definitions are taken from. It counts as no tool call.
    Listing,
    /// A model call.
    Model,
    /// The agent's own traffic through the proxy.
    Egress,
}

impl Channel {
    /// The name in records, headers and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tool => "tool",
            Self::Listing => "listing",
            Self::Model => "model",
            Self::Egress => "egress",
        }
    }

    /// Whether a call leaves once its intent is witnessed. Any other leaves once it is stored: it may change something that no later record
    /// tells of.
    pub fn leaves_witnessed(self, effect: Option<SideEffect>) -> bool {
        self == Self::Model || (self == Self::Tool && effect == Some(SideEffect::Read))
    }
}

/// Refused calls, by the way that they would have gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Refusals {
    /// To models.
    pub model: u64,
    /// To tools.
    pub tool: u64,
    /// For lists of tools.
    pub listing: u64,
    /// Of the agent's own traffic.
    pub egress: u64,
}

impl Refusals {
    /// Counts what a record says, unless nobody is to hear of it.
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

    /// What whoever reads how a task ended should know: an agent that catches its errors ends well without having done a thing.
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

/// A call that is about to leave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Intent {
    /// Identifies the call in its outcome: unique in the log.
    pub call: String,
    /// Which way it goes.
    pub channel: Channel,
    /// The tool's name, the model path, `host:port`, or for a listing the name of the tool that it was made for.
    pub target: String,
    /// What it may change; absent for models, listings and direct traffic. A tool's is its contract's, or a tighter one where the
    /// upstream itself says that the tool changes something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<SideEffect>,
    /// Digest of the upstream's definition of an MCP tool that is in force, see
    /// [`definition`](crate::policy::definition).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub definition: Option<String>,
    /// The [commitment](crate::policy::commit) to the request: a tool's arguments by field, a model's body as sent. Absent for tunnels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_digest: Option<String>,
    /// Bytes of the request; of one through the proxy with its URL and headers. 0 for tunnels, of which the outcome has them.
    pub request_bytes: u64,
    /// The rules that were asked and allowed it.
    pub rules: Vec<Rule>,
    /// The idempotency key under which it is made, see [`ledger`](crate::policy::ledger).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The approvals by which it is made: at most one on account of the contract, and one of the pack.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub approvals: Vec<String>,
    /// In a rollback: the call that it undoes, by its name in the other task's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undoes: Option<String>,
    /// What the pack found of a tool call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assessment: Option<Assessment>,
    /// The model that is asked, by which its price is found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Tokens set aside until the outcome.
    pub reserved_tokens: i64,
    /// Cost set aside until the outcome, in millionths of the pack's currency unit.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub reserved_cost_micros: i64,
}

/// Whether a call's effect took place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// The upstream answered that it did it.
    Applied,
    /// It certainly did not: the request did not leave, or the upstream refused it.
    NotApplied,
    /// Nobody knows: sent, and no answer.
    Unknown,
}

/// What became of a call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// The intent's call.
    pub call: String,
    /// Whether its effect took place.
    pub effect: Effect,
    /// The rule by which the gateway refused it or the upstream failed, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<Rule>,
    /// The upstream's HTTP status; 0 without one.
    pub status: u16,
    /// The commitment to the reply's bytes as the agent got them, or would have but for `rule`; absent without a reply and for tunnels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_digest: Option<String>,
    /// Bytes of the reply; of a tunnel and of a request through the proxy all that came back, heads included.
    pub response_bytes: u64,
    /// Of a tunnel: bytes that the agent sent through it. Of other calls the intent has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<u64>,
    /// Tokens by the reply's own account, or the reservation where it gave none.
    pub tokens: i64,
    /// What they cost, in millionths of the pack's currency unit.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cost_micros: i64,
    /// The address that the gateway dialled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
    /// SHA-256 of the certificate that the upstream showed to the gateway, hex; absent without TLS, and for tunnels, in which it is the agent's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// How sensitive the result is that the agent got.
    #[serde(default, skip_serializing_if = "Sensitivity::is_unclassified")]
    pub sensitivity: Sensitivity,
    /// The commitment to the arguments of the call that undoes this one by its contract. They are kept outside the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undone_by: Option<String>,
}

impl Outcome {
    /// The digest of the result that the agent got: there was a reply, and no rule withheld it.
    pub fn given(&self) -> Option<&String> {
        self.response_digest.as_ref().filter(|_| self.rule.is_none())
    }
}

impl Effect {
    /// The name in records and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::NotApplied => "not_applied",
            Self::Unknown => "unknown",
        }
    }

    /// What the ledger keeps of a call that ended so; nothing where it certainly did nothing.
    pub fn fate(self) -> Option<Fate> {
        match self {
            Self::Applied => Some(Fate::Applied),
            Self::NotApplied => None,
            Self::Unknown => Some(Fate::Unknown),
        }
    }
}

/// A call that was made before, and its result given again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Replayed {
    /// The call whose result it is.
    pub call: String,
    /// The tool.
    pub target: String,
    /// The idempotency key of both.
    pub key: String,
    /// The commitment to the arguments of both.
    pub request_digest: String,
    /// The commitment to the result, as the call's outcome has it.
    pub response_digest: String,
}

/// What a read has told of a call whose fate was unknown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resolved {
    /// The call.
    pub call: String,
    /// Whether its effect took place: `applied` or `not_applied`.
    pub effect: Effect,
    /// The call that has read it, after the other and of the tool that the contract's `verify` names.
    pub by: String,
}

/// A refusal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Denied {
    /// Which way the call would have gone.
    pub channel: Channel,
    /// What was asked for: at most 256 characters, control characters escaped.
    pub target: String,
    /// The rule that refused it.
    pub rule: Rule,
    /// What the agent was told.
    pub reason: String,
    /// The commitment to the request, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_digest: Option<String>,
    /// How many calls of this channel, target and rule were refused, where they came too fast for a record each.
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
    /// Counts one more of its kind: the record is of no request any more.
    pub fn more(&mut self) {
        self.count = self.count.saturating_add(1);
        self.request_digest = None;
    }

    /// How many calls it counts.
    pub fn calls(&self) -> u64 {
        u64::try_from(self.count).unwrap_or_default()
    }

    /// Whether it can be: it counts one call, or several and names the request of none.
    pub fn is_countable(&self) -> bool {
        self.count == 1 || (self.count > 1 && self.request_digest.is_none())
    }
}

/// Where people's approval of one exact call stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Approval {
    /// Name of the ApprovalRequest, which follows from the call.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// On whose account people are asked.
    pub by: AskedBy,
    /// The tool.
    pub tool: String,
    /// The commitment to the arguments.
    pub request_digest: String,
    /// How many people must approve.
    pub required: i64,
    /// By when, RFC 3339.
    pub expires: String,
    /// Why the pack asks, as people saw it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub because: Vec<String>,
    /// Where it stands.
    pub standing: Standing,
    /// Who has decided what.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub decisions: Vec<Vote>,
}

impl Approval {
    /// The call that it is for.
    pub fn call(&self) -> Exact {
        Exact { by: self.by, tool: self.tool.clone(), digest: self.request_digest.clone() }
    }
}

/// How an attempt's harness ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttemptClosed {
    /// `agentEnded`, `terminated`, `wallTime`, `denials`, `unapproved` or `parked`. Only after the first two may the same attempt open again.
    pub reason: String,
}

impl AttemptClosed {
    /// The agent has ended by itself, while its wall time was not over, and whoever ran it has waited for it. A pod's harness cannot know
    /// this: `belay run` does.
    pub const AGENT_ENDED: &str = "agentEnded";
    /// The harness was told to end while the attempt's wall time was not over. The agent had ended, or never ran, or its pod was deleted or
    /// evicted: the pod's status says which, and this word does not.
    pub const TERMINATED: &str = "terminated";
    /// The attempt's wall time was over.
    pub const WALL_TIME: &str = "wallTime";
    /// So many calls were refused that the task is over.
    pub const DENIALS: &str = "denials";
    /// A call that nobody approved in time has ended the task.
    pub const UNAPPROVED: &str = "unapproved";
    /// Evidence could not be stored for long.
    pub const PARKED: &str = "parked";

    /// Whether the harness ended while the attempt had wall time left, by its own clock, and for no reason of its own: whoever holds that
    /// the attempt ran out of time is contradicted by this. It does not say that the agent has succeeded.
    pub fn is_in_time(&self) -> bool {
        matches!(self.reason.as_str(), Self::AGENT_ENDED | Self::TERMINATED)
    }

    /// The rule by which the attempt is over for good. An attempt that was only told to end may open again: its harness was started again.
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

/// How a task ended, by the operator's word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TaskClosed {
    /// `Succeeded` or `Failed`.
    pub phase: String,
    /// The failure class, empty on success; `Unknown` where it is not known how the agent ended.
    pub failure_class: String,
    /// One word for why.
    pub reason: String,
    /// The agent's exit code in its last attempt, where it had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// SHA-256 of the images that the kubelet ran in its last attempt, hex, by container: as far as it has told.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, String>,
}

impl TaskClosed {
    /// The failure class of a task of which it is not known how its agent ended.
    pub const UNKNOWN: &str = "Unknown";
    /// The reason of such an end.
    pub const VERDICT_UNKNOWN: &str = "VerdictUnknown";

    /// The end of a task of which nobody knows how its agent ended.
    pub fn unknown(self) -> Self {
        let (phase, failure_class) = ("Failed".to_owned(), Self::UNKNOWN.to_owned());
        Self { phase, failure_class, reason: Self::VERDICT_UNKNOWN.to_owned(), ..self }
    }

    /// What a task is sealed with, where whoever seals it says this. `began` is whether its last attempt opened
    /// the log, without which no agent runs, `parting` how it was closed, if it was, and `time_over` whether its records reach beyond its time.
    /// What was presumed, because nobody has seen the agent's end, is borne out by the log or is not known: but that its time was over, the
    /// log itself tells. Where the log says otherwise of what was seen, it is not known either.
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
            // Its agent may have ended well before its pod was gone, and nobody has seen.
            _ => !began || parting.is_some_and(|parting| !in_time(parting)),
        };
        if holds { self } else { self.unknown() }
    }

    /// Whether the task has failed in a way that is known, so that what it did may be undone.
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
