//! What records say about calls: the intent, the outcome, the denial, the approval, the replay and the resolution.
//!
//! Guarantees: the content of a call is in none of them, only commitments to it and its size.
//!
//! Non-goals: the rules about which of them may follow which, see [`state`](crate::evidence::state).

use serde::{Deserialize, Serialize};

use super::summary::{Summary, Tone};
use crate::policy::{
    access::Assessment,
    approval::{ApprovalSource, ApprovalState, CallKey, Vote},
    config::{Sensitivity, SideEffect, is_zero},
    ledger::Fate,
    price,
    rule::Rule,
};

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
    pub fn leaves_witnessed(self, side_effect: Option<SideEffect>) -> bool {
        self == Self::Model || (self == Self::Tool && side_effect == Some(SideEffect::Read))
    }
}

/// The number of denied calls by channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct DenialCounts {
    /// Denied model calls.
    pub model: u64,
    /// Denied tool calls.
    pub tool: u64,
    /// Denied listings.
    pub listing: u64,
    /// Denied connections of the agent's own traffic.
    pub egress: u64,
}

impl DenialCounts {
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
        (!kinds.is_empty()).then(|| format!("denied: {}", kinds.join(", ")))
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
    pub side_effect: Option<SideEffect>,
    /// The digest of the upstream's definition of an MCP tool that is in force, see [`definition`](crate::policy::definition).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub definition_digest: Option<String>,
    /// The [commitment](crate::policy::commit) to the request: to a tool's arguments by field, to a model's body as sent. Absent for
    /// tunnels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_commitment: Option<String>,
    /// Bytes of the request, with URL and headers if it goes through the proxy. 0 for tunnels, whose bytes are in the outcome.
    pub request_bytes: u64,
    /// The rules that were evaluated and allowed the call.
    pub rules: Vec<Rule>,
    /// The idempotency key of the call, see [`ledger`](crate::policy::ledger).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
    /// The names of the call's approvals: at most one that the contract requires and one that the pack requires.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub approvals: Vec<String>,
    /// In a rollback: the call that this call compensates, by its name in the other task's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compensates: Option<String>,
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

impl Intent {
    pub(super) fn summary(&self) -> Summary {
        let effect = self.side_effect.map(|effect| format!(" ({})", effect.as_str())).unwrap_or_default();
        let what = format!("{} {}{effect}", self.channel.as_str(), self.target);
        let mut detail = Vec::new();
        if let Some(found) = &self.assessment {
            detail.push(format!("{} data", found.arguments.as_str()));
            detail.extend(found.risk.as_ref().map(|risk| format!("risk {}", risk.score)));
        }
        if !self.approvals.is_empty() {
            detail.push(format!("approved by {}", self.approvals.join(", ")));
        }
        detail.extend(self.compensates.as_ref().map(|call| format!("compensates {call}")));
        detail.extend((self.reserved_tokens > 0).then(|| format!("{} tokens reserved", self.reserved_tokens)));
        Summary::new(Tone::Warn, "allowed", what, detail.join(", ")).by(self.rules.iter().copied())
    }
}

/// Whether a call took effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallOutcome {
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
    pub outcome: CallOutcome,
    /// The rule by which the gateway denied the call or the upstream failed, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<Rule>,
    /// The upstream's HTTP status; 0 without one.
    pub status: u16,
    /// The commitment to the bytes of the reply that the agent got, or would have got without `rule`. Absent without a reply and for
    /// tunnels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_commitment: Option<String>,
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
    pub compensation_commitment: Option<String>,
}

impl Outcome {
    /// Returns the digest of the result that the agent got. `None` if there was no reply or a rule withheld it.
    pub fn given(&self) -> Option<&String> {
        self.response_commitment.as_ref().filter(|_| self.rule.is_none())
    }

    /// Returns what the record says, for people.
    pub fn summary(&self) -> Summary {
        let mut detail = vec![self.outcome.words().to_owned()];
        detail.extend((self.status > 0).then(|| format!("HTTP {}", self.status)));
        detail.extend(self.upstream.clone());
        detail.extend(self.sent_bytes.map(|bytes| format!("{bytes} bytes sent")));
        detail.push(format!("{} bytes", self.response_bytes));
        detail.extend((self.tokens > 0).then(|| format!("{} tokens", self.tokens)));
        detail.extend((self.cost_micros > 0).then(|| format!("a cost of {}", price::show(self.cost_micros))));
        Summary::new(self.outcome.tone(), "outcome", self.call.clone(), detail.join(", ")).by(self.rule)
    }
}

impl CallOutcome {
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

    /// Returns whether the call took effect, in words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Applied => "took effect",
            Self::NotApplied => "did not take effect",
            Self::Unknown => "unknown whether it took effect",
        }
    }

    fn tone(self) -> Tone {
        match self {
            Self::Applied => Tone::Good,
            Self::NotApplied => Tone::Warn,
            Self::Unknown => Tone::Bad,
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
    pub idempotency_key: String,
    /// The commitment to the arguments of both calls.
    pub request_commitment: String,
    /// The commitment to the result, as in the outcome of the earlier call.
    pub response_commitment: String,
}

impl Replayed {
    pub(super) fn summary(&self) -> Summary {
        let detail = format!("the result of {} again", self.call);
        Summary::new(Tone::Plain, "replayed", self.target.clone(), detail)
    }
}

/// The resolution of a call whose outcome was unknown, by a read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resolved {
    /// The call.
    pub call: String,
    /// Whether the call took effect: `applied` or `not_applied`.
    pub outcome: CallOutcome,
    /// The read that resolved it: a later call of the tool that the contract's `verify` names.
    pub by: String,
}

impl Resolved {
    pub(super) fn summary(&self) -> Summary {
        let detail = format!("{}, according to {}", self.outcome.words(), self.by);
        Summary::new(self.outcome.tone(), "resolved", self.call.clone(), detail)
    }
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
    pub request_commitment: Option<String>,
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
        self.request_commitment = None;
    }

    /// Returns how many calls the record counts.
    pub fn calls(&self) -> u64 {
        u64::try_from(self.count).unwrap_or_default()
    }

    /// Returns whether the record is valid: it counts one call, or it counts several and has no request digest.
    pub fn is_countable(&self) -> bool {
        self.count == 1 || (self.count > 1 && self.request_commitment.is_none())
    }

    pub(super) fn summary(&self) -> Summary {
        let times = if self.count == 1 { String::new() } else { format!(", {} times", self.count) };
        let what = format!("{} {}{times}", self.channel.as_str(), self.target);
        Summary::new(Tone::Bad, "denied", what, self.reason.clone()).by([self.rule])
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
    pub requested_by: ApprovalSource,
    /// The tool.
    pub tool: String,
    /// The commitment to the arguments.
    pub request_commitment: String,
    /// How many approvers must approve.
    pub required: i64,
    /// When the request expires, RFC 3339.
    pub expires: String,
    /// The pack's reasons to require approval, as the approvers saw them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
    /// The state of the request.
    pub state: ApprovalState,
    /// The decisions, each with its approver.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub decisions: Vec<Vote>,
}

impl Approval {
    /// Returns the call that the approval is for.
    pub fn call(&self) -> CallKey {
        CallKey { by: self.requested_by, tool: self.tool.clone(), digest: self.request_commitment.clone() }
    }

    pub(super) fn summary_of_request(&self) -> Summary {
        let people =
            if self.required == 1 { "one approver".to_owned() } else { format!("{} approvers", self.required) };
        let because = match self.reasons.as_slice() {
            [] => String::new(),
            reasons => format!("because of {}; ", reasons.join(", ")),
        };
        let what = format!("{} needs the approval of {people}", self.tool);
        Summary::new(Tone::Warn, "asked", what, format!("{because}{}, until {}", self.name, self.expires))
    }

    pub(super) fn summary_of_decision(&self) -> Summary {
        let told = |vote: &Vote| match &vote.reason {
            Some(reason) => format!("{} ({reason})", vote.by),
            None => vote.by.clone(),
        };
        let by: Vec<String> = self.decisions.iter().map(told).collect();
        let by = if by.is_empty() { "by no approver".to_owned() } else { format!("by {}", by.join(", ")) };
        let (tone, word) = match self.state {
            ApprovalState::Approved => (Tone::Good, "approved"),
            ApprovalState::Denied => (Tone::Bad, "denied"),
            ApprovalState::Expired => (Tone::Bad, "expired"),
            ApprovalState::Pending => (Tone::Warn, "pending"),
        };
        Summary::new(tone, word, self.tool.clone(), format!("{by}; {}", self.name))
    }
}
