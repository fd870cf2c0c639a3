//! The policy gateway: the only way out of an agent's pod, and the witness of its evidence.
//!
//! Guarantees: every request comes from a harness whose pod is alive, belongs to the newest attempt of its task and sends from its own
//! address. Every call that leaves has a witnessed intent, goes to a host that its class lists, and is dialled at an address that was
//! checked. Replicas share no state but the bucket and the API server, so the loss of a replica loses nothing.
//!
//! Denies: every request that the gateway is not sure about. The gateway gives no credential to a pod. It follows no redirect, but one of an
//! MCP server within its own origin.
//!
//! ```text
//! listen ─▶ service ─┬─▶ service/log ─────▶ witness, approvals
//!                    ├─▶ service/state ───▶ state
//!                    ├─▶ service/calls ───▶ authorize, approvals ─▶ forward ─▶ dial
//!                    └─▶ service/tunnels ─▶ authorize ─▶ tunnel ─▶ dial
//!
//! cluster ─▶ identity, compiled      who a caller is and what it may do, by the objects of the API server
//! witness, state ─▶ buckets          logs, and what is stored beside them
//! ```
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unreachable)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

/// Approval of one exact call.
pub mod approvals;
/// The decision whether one call may leave.
pub mod authorize;
/// Streaming bodies.
pub mod body;
/// The buckets, by name.
pub mod buckets;
/// The canary: the port that connections reach unless a NetworkPolicy blocks them.
pub mod canary;
/// The gateway's view of the API server's objects.
pub mod cluster;
/// The compiled policy of a task.
pub mod compiled;
/// Credentials for upstreams, which pods never see.
pub mod credentials;
/// Connections to checked addresses.
pub mod dial;
/// The encodings of a credential that the gateway searches for in replies.
pub mod forms;
/// One HTTP request to an upstream.
pub mod forward;
/// Identification of callers.
pub mod identity;
/// Incidents: requests that were denied outside any log.
pub mod incidents;
/// The listener and its bounds.
pub mod listen;
/// The gateway's metrics.
pub mod metrics;
/// The command-line options of the gateway.
pub mod options;
/// The cluster's own addresses, which stay closed whatever is opened.
pub mod own;
/// The quotas of each pod.
mod pod_quota;
/// Idle connections to upstreams, kept for reuse.
pub mod pool;
/// Maps of bounded size that keep what was used most recently.
mod recent;
/// The redirect of an MCP server that is followed.
pub mod redirect;
/// Why a request was not served.
pub mod refusal;
/// Name resolution.
pub mod resolve;
/// Startup, serving and shutdown.
#[cfg(feature = "s3")]
pub mod run;
/// The handling of one request.
pub mod service;
/// Salts, data of calls, and claims of rollbacks.
pub mod state;
/// Tunnels: the agent's own connections.
pub mod tunnel;
/// Decompression of replies that are compressed although the request did not ask for it.
pub mod unpack;
/// Reports of `status.usage`.
pub mod usage;
/// The witness: checks, cosigns and stores segments of evidence.
pub mod witness;

#[cfg(test)]
mod testing;
