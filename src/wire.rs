//! What harness, operator and gateway say to each other: paths, headers and bodies, exit codes, and nothing else.
//!
//! Every request carries `authorization: Bearer <token>`: a projected, pod-bound ServiceAccount token of audience
//! [`AUDIENCE`]. A tunnel carries it as `proxy-authorization`.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{
    evidence::{
        record::{Refusals, TaskClosed},
        state::Snapshot,
    },
    policy::{
        approval::{AskedBy, Standing, Vote},
        commit::Salt,
        config::{SideEffect, Usage},
        rule::Rule,
    },
};

/// The audience that tokens must be issued for.
pub const AUDIENCE: &str = "belay-gateway";
/// The name in the gateway's certificate. It is dialled by address, as pods have no DNS.
pub const SERVER_NAME: &str = "belay-gateway";
/// Opens a task's log for an attempt: [`OpenRequest`] → [`OpenReply`].
pub const LOG_OPEN: &str = "/v1/log/open";
/// Appends a segment: [`AppendRequest`] → [`AppendReply`].
pub const LOG_APPEND: &str = "/v1/log/append";
/// Ends a log: [`SealRequest`] → [`SealReply`]. The operator's alone.
pub const LOG_SEAL: &str = "/v1/log/seal";
/// Asks people about one exact call: [`ApprovalAsk`] → [`ApprovalReply`].
pub const APPROVAL: &str = "/v1/approval";
/// Makes and keeps the arguments that undo a call: [`Keep`] → [`Kept`].
pub const STATE_KEEP: &str = "/v1/state/keep";
/// Gives a rollback the arguments that undo a call of the other task: [`KeptOf`] → [`Undo`].
pub const STATE_GET: &str = "/v1/state/get";
/// Keeps the result of an idempotent call: [`KeepResult`] → [`Kept`].
pub const RESULT_KEEP: &str = "/v1/result/keep";
/// Gives it to another attempt of the same task: [`KeptOf`] → [`KeptResult`].
pub const RESULT_GET: &str = "/v1/result/get";
/// Longest result that is kept, in bytes.
pub const LONGEST_RESULT: usize = 256 << 10;
/// Longest body of a request to a model or of the agent's own, in bytes: what the providers themselves take, and no more.
pub const LONGEST_REQUEST: usize = 32 << 20;
/// Sends one HTTP request to an upstream.
pub const FORWARD: &str = "/v1/forward";
/// Calls an HTTP tool: the body is the arguments, as JSON, of which the gateway makes the request by the contract.
pub const CALL: &str = "/v1/call";
/// Absolute URL of the upstream, on [`FORWARD`].
pub const TARGET: &str = "belay-target";
/// [`Channel`](crate::evidence::record::Channel) of a call, on [`FORWARD`] and `CONNECT`.
pub const CHANNEL: &str = "belay-channel";
/// Sequence number of the call's intent record, on [`FORWARD`], [`CALL`] and `CONNECT`.
pub const INTENT: &str = "belay-intent";
/// On `CONNECT` and on its reply, [`TOLD`]: the gateway looks at what the agent begins with before anything goes on, and says on the
/// stream, before anything of the upstream's, what it thinks of that. An empty line lets it through; a line with a [`Refusal`] ends it.
pub const OPENING: &str = "belay-opening";
/// The value of [`OPENING`].
pub const TOLD: &str = "told";
/// Longest such line.
pub const LONGEST_WORD: usize = 8 << 10;
/// The address that was dialled, on replies.
pub const UPSTREAM: &str = "belay-upstream-address";
/// SHA-256 of the certificate that was shown there, hex, on replies over TLS.
pub const CERTIFICATE: &str = "belay-upstream-certificate";
/// The rule that refused, on refusals. An upstream cannot set it: the gateway strips it.
pub const RULE: &str = "belay-rule";

/// The length of a forwarded reply, as its upstream has said it. It may end early.
pub const LENGTH: &str = "belay-content-length";
/// How a forwarded reply ended early, as a trailer: [`Ended`].
pub const ENDED: &str = "belay-ended";

/// How a reply ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The upstream broke it off: what has been passed on is all that came.
    BrokeOff,
    /// It repeats the credential: what follows is withheld.
    Repeated,
    /// The gateway did not wait for more, or could not read it: the upstream may have gone on.
    GivenUp,
}

impl Ended {
    const ALL: [Self; 3] = [Self::BrokeOff, Self::Repeated, Self::GivenUp];

    /// The trailer's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BrokeOff => "broke-off",
            Self::Repeated => "repeated",
            Self::GivenUp => "given-up",
        }
    }

    /// By the trailer's value.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|ended| ended.as_str() == name)
    }
}

/// Bytes of one request or reply that may be under way unread. So many bodies as a connection has at a time do not fill
/// [`CONNECTION_WINDOW`]: whoever leaves some of them unread holds up nothing else.
pub const STREAM_WINDOW: u32 = 64 << 10;
/// Bytes of one connection that may be under way unread.
pub const CONNECTION_WINDOW: u32 = STREAMS * STREAM_WINDOW;
/// Requests at a time on one connection.
pub const STREAMS: u32 = 256;

/// Exit code of the containment probe when containment is unproven.
pub const EXIT_UNPROVEN: u8 = 42;
/// Exit code of the harness once so many calls were refused that the task is over.
pub const EXIT_REFUSED_ENOUGH: u8 = 43;
/// Exit code of the harness once the attempt's wall time is over.
pub const EXIT_OUT_OF_TIME: u8 = 44;
/// Exit code of the harness once a call that nobody approved in time has ended the task.
pub const EXIT_UNAPPROVED: u8 = 45;
/// Exit code of the harness once evidence could not be stored for so long that the task is to be parked.
pub const EXIT_PARKED: u8 = 46;
/// Exit code of the harness once its log cannot go on: what happened since is in no log.
pub const EXIT_LOG_FAILED: u8 = 47;

/// Opens a task's log for an attempt.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OpenRequest {
    /// Number of the attempt.
    pub attempt: i64,
    /// Digest of the rendered policy that the harness runs by.
    pub policy_digest: String,
}

/// Where the log stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenReply {
    /// The log's origin line.
    pub origin: String,
    /// Records in the log.
    pub size: u64,
    /// Roots of the perfect subtrees that make up the log, left to right, base64. See [`merkle`](crate::evidence::merkle).
    pub frontier: Vec<String>,
    /// What the attempt goes on from.
    pub state: Snapshot,
    /// What the task's commitments are made with.
    pub salt: Salt,
    /// Whether results of idempotent calls are kept outside the pod.
    #[serde(default)]
    pub keeps_results: bool,
    /// Tokens and tool calls of intents that never got an outcome stay spent; this is their number, for the record.
    pub open_calls: u64,
}

/// A segment to witness and store: the body's one field is the segment's text, see
/// [`Segment`](crate::evidence::segment::Segment), with the attempt's signature on its checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AppendRequest {
    /// Number of the attempt.
    pub attempt: i64,
    /// First sequence number in the segment.
    pub first: u64,
    /// The segment's text.
    pub segment: String,
    /// How far the reply waits.
    #[serde(default, skip_serializing_if = "Until::is_stored")]
    pub until: Until,
}

/// How far a segment is to be before there is a reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Until {
    /// Checked, in its place, and on its way to the bucket: enough for a tool to read.
    Witnessed,
    /// It lies locked in the bucket.
    #[default]
    Stored,
}

impl Until {
    fn is_stored(&self) -> bool {
        *self == Self::Stored
    }
}

/// The segment is as far as was asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AppendReply {
    /// Records in the log up to its end.
    pub size: u64,
    /// Once it lies in the bucket: a checkpoint there that covers it, with the witness's cosignature.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
}

/// Asks people about one exact call. Asking again for the same call asks nobody again, and tells where it stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ApprovalAsk {
    /// On whose account.
    pub by: AskedBy,
    /// The tool.
    pub tool: String,
    /// What the call may change.
    pub effect: SideEffect,
    /// The arguments, RFC 8785 JSON.
    pub arguments: String,
    /// Their SHA-256, hex.
    pub request_digest: String,
    /// Seconds for which the reply may wait for a decision.
    pub wait: i64,
}

/// Where the request stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ApprovalReply {
    /// Name of the ApprovalRequest.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// How many must approve.
    pub required: i64,
    /// By when, RFC 3339.
    pub expires: String,
    /// Why the pack asks.
    #[serde(default)]
    pub because: Vec<String>,
    /// Where it stands.
    pub standing: Standing,
    /// Who has decided what.
    pub decisions: Vec<Vote>,
}

impl ApprovalReply {
    /// Whether its time is over by this clock. A time that cannot be read is.
    pub fn expired(&self) -> bool {
        !self.expires.parse::<jiff::Timestamp>().is_ok_and(|expires| jiff::Timestamp::now() < expires)
    }
}

/// Ends a log with a `task.closed` record.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SealRequest {
    /// Namespace of the task.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// The last attempt.
    pub attempt: i64,
    /// `bucket` and `prefix` of the task's pack, as the operator resolved them: the pack may be gone by now.
    pub bucket: String,
    /// See `bucket`.
    pub prefix: String,
    /// How the task ended.
    pub closed: TaskClosed,
    /// Nobody has seen how the last attempt's agent ended: `closed` follows from the clock, or from the pod being gone. It is sealed only as
    /// far as the log bears it out.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub presumed: bool,
}

/// The sealed log. Sealing a sealed log answers the same again and writes nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SealReply {
    /// The log's origin line.
    pub origin: String,
    /// `s3://bucket/prefix` of the log.
    pub location: String,
    /// Endpoint of the object store; absent for AWS.
    pub endpoint: Option<String>,
    /// Records in it.
    pub size: u64,
    /// Its root, base64.
    pub root: String,
    /// Final counters.
    pub usage: Usage,
    /// What was refused in it.
    #[serde(default)]
    pub refused: Refusals,
    /// What the log is sealed with: what was asked for, or that it is not known, or what it was sealed with before. Absent from a gateway of
    /// an earlier version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<TaskClosed>,
    /// The contracts of the calls that would undo the task, where it has failed. Absent if that could not be told in time.
    #[serde(default)]
    pub undone_by: Option<BTreeSet<String>>,
}

/// A call has taken effect: the gateway makes the arguments of the call that undoes it, by its contract, and keeps them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Keep {
    /// Sequence number of the call's intent.
    pub intent: u64,
    /// The call's arguments.
    pub arguments: serde_json::Value,
    /// What it answered, `null` without.
    pub result: serde_json::Value,
}

/// What belongs to a call is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Kept {
    /// The commitment to it, hex: to arguments by field, and to a result's bytes.
    pub digest: String,
}

/// Asks for the arguments that undo a call of the task that is undone, or for the result of a call of the task's own.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KeptOf {
    /// The call, by its name in its task's log.
    pub call: String,
    /// The commitment to what is asked for, hex.
    pub digest: String,
}

/// The arguments that undo a call.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Undo {
    /// RFC 8785 JSON.
    pub arguments: String,
}

/// Has the result of an idempotent call kept, for another attempt to give again.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KeepResult {
    /// Sequence number of the call's intent.
    pub intent: u64,
    /// The result, as the agent gets it: JSON.
    pub result: String,
}

/// The result of a call of an earlier attempt.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KeptResult {
    /// As it was kept.
    pub result: String,
}

/// Why a request was refused or failed: the body of every reply from the gateway that is not a success.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Refusal {
    /// The rule.
    pub rule: Rule,
    /// What was expected, what was found, what to do.
    pub reason: String,
}
