//! What the gate knows about a call: a [`Call`] before the call is sent, and a [`Settlement`] after it.
//!
//! Guarantees: both have commitments to contents, and sizes. The only content is that of a tool call's arguments, for their evaluation.
//!
//! Non-goals: what a channel sends, and the form of records.

use super::evaluation::Judged;
use crate::{
    evidence::record::{CallOutcome, Channel},
    harness::gateway_client::Peer,
    policy::{
        budget::Spent,
        config::{Sensitivity, SideEffect},
        rule::Rule,
    },
};

/// A call before it leaves.
#[derive(Clone)]
pub struct Call {
    /// The channel of the call.
    pub channel: Channel,
    /// The tool's name, the model path, or `host:port`.
    pub target: String,
    /// What it may change.
    pub side_effect: Option<SideEffect>,
    /// The digest of the upstream's definition of an MCP tool.
    pub definition: Option<String>,
    /// The commitment to the request, hex.
    pub request_commitment: Option<String>,
    /// The number of bytes of the request.
    pub request_bytes: u64,
    /// The idempotency key of the call.
    pub key: Option<String>,
    /// The names of the approvals that the call uses.
    pub approvals: Vec<String>,
    /// The pack's reasons for which approvers have approved the call.
    pub reasons: Vec<String>,
    /// In a rollback: the call that this call compensates.
    pub compensates: Option<String>,
    /// For a tool call: the inputs of its evaluation where records are put in order.
    pub judged: Option<Judged>,
    /// The rules that were checked and allowed the call. The rules of the budgets are added.
    pub rules: Vec<Rule>,
    /// The name of the model, as it may be recorded.
    pub model: Option<String>,
    /// The amount to reserve.
    pub reserve: Spent,
}

/// The outcome of a call.
#[derive(Clone, Debug)]
pub struct Settlement {
    /// Whether the call took effect.
    pub outcome: CallOutcome,
    /// The rule by which the call failed, if it failed.
    pub rule: Option<Rule>,
    /// The upstream's HTTP status; 0 if there is none.
    pub status: u16,
    /// The commitment to the reply, hex.
    pub response_commitment: Option<String>,
    /// The number of bytes of the reply.
    pub response_bytes: u64,
    /// The number of bytes that the agent sent through a tunnel.
    pub sent_bytes: Option<u64>,
    /// The cost by the usage in the reply. If absent, the reservation stays spent.
    pub spent: Option<Spent>,
    /// The upstream that the gateway dialled.
    pub upstream: Option<Peer>,
    /// The sensitivity of the result that the agent gets.
    pub sensitivity: Sensitivity,
    /// The commitment to the stored arguments of the call's compensation.
    pub compensation_commitment: Option<String>,
}

impl Settlement {
    /// Returns the settlement of a call with an unknown outcome.
    pub fn unknown(rule: Option<Rule>) -> Self {
        Self {
            outcome: CallOutcome::Unknown,
            rule,
            status: 0,
            response_commitment: None,
            response_bytes: 0,
            sent_bytes: None,
            spent: None,
            upstream: None,
            sensitivity: Sensitivity::default(),
            compensation_commitment: None,
        }
    }

    /// Returns the settlement of a call that certainly had no effect and no cost.
    pub fn not_applied(rule: Rule) -> Self {
        Self { outcome: CallOutcome::NotApplied, spent: Some(Spent::default()), ..Self::unknown(Some(rule)) }
    }
}
