//! The protocol between harness, operator and gateway: paths, headers, bodies and exit codes.
//!
//! Every request carries `authorization: Bearer <token>`: a projected, pod-bound ServiceAccount token of audience [`AUDIENCE`]. A tunnel
//! carries it as `proxy-authorization`.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{
    evidence::{
        record::{DenialCounts, TaskClosed},
        state::Snapshot,
    },
    policy::{
        approval::{ApprovalSource, ApprovalState, Vote},
        commit::Salt,
        config::{SideEffect, Usage},
        rule::Rule,
    },
};

/// The audience that tokens must be issued for.
pub const AUDIENCE: &str = "belay-gateway";
/// The name in the gateway's certificate. Clients dial the gateway by address, because pods have no DNS.
pub const SERVER_NAME: &str = "belay-gateway";
/// Opens a task's log for an attempt: [`OpenRequest`] → [`OpenReply`].
pub const LOG_OPEN: &str = "/v1/log/open";
/// Appends a segment: [`AppendRequest`] → [`AppendReply`].
pub const LOG_APPEND: &str = "/v1/log/append";
/// Seals a log: [`SealRequest`] → [`SealReply`]. Only the operator may send it.
pub const LOG_SEAL: &str = "/v1/log/seal";
/// Requests approval of one exact call: [`ApprovalAsk`] → [`ApprovalReply`].
pub const APPROVAL: &str = "/v1/approval";
/// Renders and stores the arguments of a call's compensation: [`PutState`] → [`PutReply`].
pub const STATE_PUT: &str = "/v1/state/put";
/// Returns to a rollback the arguments of a compensation of a call of the other task: [`StateRef`] → [`Undo`].
pub const STATE_GET: &str = "/v1/state/get";
/// Stores the result of an idempotent call: [`PutResult`] → [`PutReply`].
pub const RESULT_PUT: &str = "/v1/result/put";
/// Returns a stored result to another attempt of the same task: [`StateRef`] → [`ResultReply`].
pub const RESULT_GET: &str = "/v1/result/get";
/// The longest result that is stored, in bytes.
pub const LONGEST_RESULT: usize = 256 << 10;
/// The longest body of a model request or of a plain HTTP request of the agent, in bytes. Providers accept no more either.
pub const LONGEST_REQUEST: usize = 32 << 20;
/// Sends one HTTP request to an upstream.
pub const FORWARD: &str = "/v1/forward";
/// Calls an HTTP tool. The body is the arguments as JSON. The gateway renders the request from them by the contract.
pub const CALL: &str = "/v1/call";
/// The absolute URL of the upstream, on [`FORWARD`].
pub const TARGET: &str = "belay-target";
/// The [`Channel`](crate::evidence::record::Channel) of a call, on [`FORWARD`] and `CONNECT`.
pub const CHANNEL: &str = "belay-channel";
/// The sequence number of the call's intent record, on [`FORWARD`], [`CALL`] and `CONNECT`.
pub const INTENT: &str = "belay-intent";
/// On `CONNECT` with the value [`TOLD`]: asks the gateway to report its verdict on the agent's first bytes. A gateway that does so sets
/// this header on its reply, too. It checks these bytes before it forwards anything, and writes one line to the stream before anything of
/// the upstream's. An empty line lets the tunnel through; a line with a [`Refusal`] ends it.
pub const OPENING: &str = "belay-opening";
/// The value of [`OPENING`].
pub const TOLD: &str = "told";
/// The longest line with a verdict on a tunnel's first bytes, in bytes.
pub const LONGEST_WORD: usize = 8 << 10;
/// The address that the gateway dialled, on replies.
pub const UPSTREAM: &str = "belay-upstream-address";
/// The SHA-256 of the certificate that the dialled server showed, hex, on replies over TLS.
pub const CERTIFICATE: &str = "belay-upstream-certificate";
/// The rule that denied the request, on denials. An upstream cannot set it, because the gateway removes it from replies.
pub const RULE: &str = "belay-rule";

/// The length of a forwarded reply, as declared by the upstream. The reply may end early.
pub const LENGTH: &str = "belay-content-length";
/// The trailer that says how a forwarded reply ended early: [`Ended`].
pub const ENDED: &str = "belay-ended";

/// How a reply ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The upstream broke off the reply. The bytes that were passed on are all that came.
    BrokeOff,
    /// The reply repeats the credential. The rest is withheld.
    Repeated,
    /// The gateway stopped waiting for the reply or could not read it. The upstream may have continued.
    GivenUp,
}

impl Ended {
    const ALL: [Self; 3] = [Self::BrokeOff, Self::Repeated, Self::GivenUp];

    /// Returns the trailer's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BrokeOff => "broke-off",
            Self::Repeated => "repeated",
            Self::GivenUp => "given-up",
        }
    }

    /// Returns the variant with this trailer value.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|ended| ended.as_str() == name)
    }
}

/// The bytes of one request or reply that may be in flight unread. The bodies that a connection can have at a time fit into
/// [`CONNECTION_WINDOW`], so a reader that leaves some of them unread blocks no others.
pub const STREAM_WINDOW: u32 = 64 << 10;
/// The bytes of one connection that may be in flight unread.
pub const CONNECTION_WINDOW: u32 = STREAMS * STREAM_WINDOW;
/// The number of concurrent requests on one connection.
pub const STREAMS: u32 = 256;

/// The request to open a task's log for an attempt.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OpenRequest {
    /// The number of the attempt.
    pub attempt: i64,
    /// The digest of the rendered policy that the harness enforces.
    pub policy_digest: String,
}

/// The state of an opened log.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenReply {
    /// The log's origin line.
    pub origin: String,
    /// The number of records in the log.
    pub size: u64,
    /// The roots of the perfect subtrees that make up the log, left to right, base64. See [`merkle`](crate::evidence::merkle).
    pub frontier: Vec<String>,
    /// The state that the attempt resumes from.
    pub state: Snapshot,
    /// The salt of the task's commitments.
    pub salt: Salt,
    /// Whether results of idempotent calls are stored outside the pod.
    #[serde(default)]
    pub keeps_results: bool,
    /// The number of calls whose intents never got an outcome. Their tokens and their tool calls stay spent. For information only.
    pub open_calls: u64,
}

/// The request to witness and store a segment. The attempt's signature is on the segment's checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AppendRequest {
    /// The number of the attempt.
    pub attempt: i64,
    /// The first sequence number in the segment.
    pub first: u64,
    /// The segment's text, see [`Segment`](crate::evidence::segment::Segment).
    pub segment: String,
    /// The state that the segment must reach before the gateway replies.
    #[serde(default, skip_serializing_if = "Until::is_stored")]
    pub until: Until,
}

/// The state that a segment must reach before the gateway replies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Until {
    /// The segment is checked, has its place in the log, and is on its way to the bucket. That is enough for a tool read and a model call.
    Witnessed,
    /// The segment is in the bucket, under its lock.
    #[default]
    Stored,
}

impl Until {
    fn is_stored(&self) -> bool {
        *self == Self::Stored
    }
}

/// The reply to an append: the segment has reached the requested state.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AppendReply {
    /// The number of records in the log up to the segment's end.
    pub size: u64,
    /// For a stored segment: a checkpoint in the bucket that covers it, with the witness's cosignature.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
}

/// The request for approval of one exact call. Repeating it for the same call creates no other ApprovalRequest and returns the current
/// state.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ApprovalAsk {
    /// Which policy requires the approval: the contract or the pack.
    pub by: ApprovalSource,
    /// The tool.
    pub tool: String,
    /// What the call may change.
    pub side_effect: SideEffect,
    /// The arguments, RFC 8785 JSON.
    pub arguments: String,
    /// The commitment to the arguments, hex.
    pub request_commitment: String,
    /// How many seconds the gateway may wait for a decision before it replies.
    pub wait: i64,
}

/// The state of an ApprovalRequest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ApprovalReply {
    /// The name of the ApprovalRequest.
    pub name: String,
    /// The UID of the ApprovalRequest.
    pub uid: String,
    /// The number of approvals that are required.
    pub required: i64,
    /// The time at which the request expires, RFC 3339.
    pub expires: String,
    /// The pack's reasons for requiring approval.
    #[serde(default)]
    pub reasons: Vec<String>,
    /// The state of the request.
    pub state: ApprovalState,
    /// The decisions of approvers so far.
    pub decisions: Vec<Vote>,
}

impl ApprovalReply {
    /// Returns whether the request has expired by this clock. A time that cannot be parsed counts as expired.
    pub fn expired(&self) -> bool {
        !self.expires.parse::<jiff::Timestamp>().is_ok_and(|expires| jiff::Timestamp::now() < expires)
    }
}

/// The request to seal a log with a `task.closed` record.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SealRequest {
    /// The namespace of the task.
    pub namespace: String,
    /// The name of the task.
    pub name: String,
    /// The UID of the task.
    pub uid: String,
    /// The last attempt.
    pub attempt: i64,
    /// The `bucket` of the task's pack, as the operator resolved it. The gateway does not read the pack, because it may be deleted by now.
    pub bucket: String,
    /// The `prefix` of the task's pack. See `bucket`.
    pub prefix: String,
    /// How the task ended.
    pub closed: TaskClosed,
    /// Whether `closed` is presumed: nothing observed how the last attempt's agent ended, and `closed` follows from the clock or from the
    /// missing pod. The gateway seals the log with a presumed end only as far as the log confirms it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub presumed: bool,
}

/// The sealed log. Sealing a sealed log returns the same reply and writes nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SealReply {
    /// The log's origin line.
    pub origin: String,
    /// The location of the log, as `s3://bucket/prefix`.
    pub location: String,
    /// The endpoint of the object store; absent for AWS.
    pub endpoint: Option<String>,
    /// The number of records in the log.
    pub size: u64,
    /// The root of the log, base64.
    pub root: String,
    /// The final counters.
    pub usage: Usage,
    /// The number of denials in the log, by channel.
    #[serde(default)]
    pub denied: DenialCounts,
    /// The end that the log is sealed with: the requested one, an unknown one, or the one of an earlier request. Absent from a gateway of
    /// an earlier version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<TaskClosed>,
    /// The contracts of the compensations that would roll back the failed task. Absent if the gateway could not determine them in time.
    #[serde(default)]
    pub compensation_commitment: Option<BTreeSet<String>>,
}

/// The request to store a compensation of a call that took effect. The gateway renders the compensation's arguments by the contract and
/// stores them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PutState {
    /// The sequence number of the call's intent.
    pub intent: u64,
    /// The call's arguments.
    pub arguments: serde_json::Value,
    /// The call's result, or `null` if there is none.
    pub result: serde_json::Value,
}

/// The reply that data of a call is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PutReply {
    /// The commitment to the stored data, hex: for arguments by field, for a result over its bytes.
    pub digest: String,
}

/// The request for the stored arguments of a compensation, for a call of the task that is rolled back, or for the stored result of one of
/// the task's own calls.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StateRef {
    /// The call's name in the log of its task.
    pub call: String,
    /// The commitment to the requested data, hex.
    pub digest: String,
}

/// The arguments of a compensation.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Undo {
    /// The arguments, RFC 8785 JSON.
    pub arguments: String,
}

/// The request to store the result of an idempotent call, so that another attempt can return it again.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PutResult {
    /// The sequence number of the call's intent.
    pub intent: u64,
    /// The result as the agent gets it, as JSON.
    pub result: String,
}

/// The stored result of a call of an earlier attempt.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ResultReply {
    /// The result, as it was stored.
    pub result: String,
}

/// The reason why a request was denied or failed: the body of every reply of the gateway that is not a success.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Refusal {
    /// The rule that denied the request.
    pub rule: Rule,
    /// What was expected, what was found, and what to do.
    pub reason: String,
}
