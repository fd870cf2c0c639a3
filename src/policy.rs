//! Makes pure decisions about what a task may do and whether one call may be sent.
//!
//! Guarantees: the same input gives the same decision, on any machine and at any time. Anything unknown, malformed or failing is denied.
//! Non-goals: I/O of any kind, Kubernetes, and clocks, except for the time limit of an evaluation ([`meter`]).
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

/// Evaluates a pack's rules, data classification and risk score for one tool call.
pub mod access;
/// Determines whether approvers have approved one exact call.
pub mod approval;
/// Counts usage against limits: reserves before a call and settles after it.
pub mod budget;
/// Makes the commitments that evidence holds instead of arguments, prompts and replies.
pub mod commit;
/// The rendered configuration: everything that the decisions of a harness and a gateway depend on.
pub mod config;
/// Determines which schemas and expressions are cheap enough to evaluate inline.
pub mod cost;
/// Decides whether one tool call is allowed or denied, and by which rule.
pub mod decide;
/// Reads an upstream's definition of a tool: its digest, and whether it tightens a contract.
pub mod definition;
/// Checks which hosts may be reached, and which addresses are never dialled.
pub mod egress;
/// CEL expressions of contracts and packs, and the variables that they see.
pub mod expression;
/// Host names, parsed once into one form.
pub mod hostname;
/// Reads JSON that every parser reads in the same way.
pub mod json;
/// The idempotency ledger: which calls were made under which idempotency key.
pub mod ledger;
/// Bounds the steps, the memory and the time of one evaluation.
pub mod meter;
/// Model calls: which requests may be sent, and what they cost.
pub mod model;
/// Checks results of tools against the output schemas of their contracts.
pub mod output;
/// Computes the cost of model calls.
pub mod price;
/// Private addresses that the administrator of a cluster has opened to named hosts.
pub mod private;
/// Limits the calls of each tool per minute.
pub mod rate;
/// Determines which parts of untrusted text may be recorded.
pub mod redact;
/// Resolves the locations of redirects.
pub mod redirect;
/// Tells the caller of a denied call who can change the cause and whether a retry can help.
pub mod remedy;
/// Rule identifiers: the vocabulary of denials, evidence and metrics.
pub mod rule;
/// Classifies the sensitivity of data by the patterns of a pack.
pub mod sensitivity;
/// JSON Schemas whose validation is metered.
pub mod shape;
/// Shortens and escapes untrusted text for display.
pub mod shorten;
/// Renders HTTP requests from the arguments of a tool call.
pub mod template;
