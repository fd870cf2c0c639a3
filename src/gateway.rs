//! The policy gateway: the only way out of an agent's pod, and the witness of its evidence.
//!
//! Promises: every request is from a harness whose pod is alive, is the newest attempt of its task and speaks from its own
//! address; every call that leaves has an intent that lies witnessed in the bucket, goes to a host on its class's list,
//! and is dialled at an address that was checked. Replicas share no state but the bucket and the API server: losing one
//! loses nothing. Refuses: anything it is not sure of; to hand a credential to a pod; to follow redirects.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unreachable)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

/// People's approval of one exact call.
pub mod approvals;
/// Whether one call may leave.
pub mod authorize;
/// Bodies that stream.
pub mod body;
/// The port that only a NetworkPolicy keeps silent.
pub mod canary;
/// What the API server says.
pub mod cluster;
/// What upstreams want to see and pods never do.
pub mod credentials;
/// Connections to addresses that were checked.
pub mod dial;
/// A credential in the forms in which a reply could repeat it.
pub mod forms;
/// One HTTP request to an upstream.
pub mod forward;
/// Who is asking.
pub mod identity;
/// What was refused outside any log.
pub mod incidents;
/// Connections and their bounds.
pub mod listen;
/// What is watched.
pub mod metrics;
/// What the gateway is told when it starts.
pub mod options;
/// Connections to upstreams that wait to be used again.
pub mod pool;
/// Why a request was not served.
pub mod refusal;
/// Names to addresses.
pub mod resolve;
/// Start, serve, stop.
#[cfg(feature = "s3")]
pub mod run;
/// What is done with one request.
pub mod service;
/// The agent's own connections.
pub mod tunnel;
/// Replies that are compressed unasked.
pub mod unpack;
/// `status.usage`.
pub mod usage;
/// Segments of evidence: checked, cosigned, locked in the bucket.
pub mod witness;

#[cfg(test)]
mod testing;
