//! Pure decisions: what a task may do, and whether one call may leave.
//!
//! Promises: the same input gives the same answer, on any machine and at any time; anything unknown, malformed or
//! failing is denied. Refuses: input and output of any kind, Kubernetes, and clocks, but for the time that a judgment may take itself
//! ([`meter`]).
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

/// What a pack says to one tool call: data, principal, risk.
pub mod access;
/// Whether people said yes to one exact call.
pub mod approval;
/// Counters against limits: reserve before, settle after.
pub mod budget;
/// What stands in the evidence for arguments, prompts and replies.
pub mod commit;
/// The rendered configuration: everything that a harness and a gateway decide by.
pub mod config;
/// One tool call: allow or deny, and by which rule.
pub mod decide;
/// What an upstream says of its own tool: its digest, and how it tightens a contract.
pub mod definition;
/// Hosts that may be reached, and addresses that may never be.
pub mod egress;
/// CEL expressions of contracts and packs, and what they see.
pub mod expression;
/// Host names, parsed once.
pub mod hostname;
/// JSON that can be read in one way only.
pub mod json;
/// Which calls were made under which idempotency key.
pub mod ledger;
/// What one judgment may take.
pub mod meter;
/// Model calls: which may leave, and what they cost.
pub mod model;
/// Results of tools, against their contracts' output schemas.
pub mod output;
/// What model calls cost.
pub mod price;
/// Rules that take microseconds.
pub mod quick;
/// How many calls of each tool a minute.
pub mod rate;
/// What of other people's words may be recorded.
pub mod redact;
/// What whoever is refused can do about it.
pub mod remedy;
/// Rule identifiers: the vocabulary of denials, evidence and metrics.
pub mod rule;
/// How sensitive data is, by the patterns of a pack.
pub mod sensitivity;
/// JSON Schemas that count what they take.
pub mod shape;
/// Other people's words, for people to read.
pub mod shorten;
/// HTTP requests that are made of a tool call's arguments.
pub mod template;
