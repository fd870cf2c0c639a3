//! `ToolContract`: one tool that an agent may call, and under which terms.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::readiness::Readiness;
use crate::policy::{
    approval::Approvers,
    config::{DataClass, HttpMethod, OnTimeout, SideEffect},
};

/// One tool, as the agent sees it, where it really is, and what must hold before a call leaves.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "belay.dev",
    version = "v1alpha1",
    kind = "ToolContract",
    namespaced,
    shortname = "tc",
    category = "belay",
    status = "Readiness",
    derive = "PartialEq",
    doc = "One tool that an agent may call, and under which terms.",
    printcolumn(name = "Tool", type_ = "string", json_path = ".spec.tool"),
    printcolumn(name = "Effect", type_ = "string", json_path = ".spec.sideEffect"),
    printcolumn(name = "MCP", type_ = "string", json_path = ".spec.upstream.mcp.url"),
    printcolumn(name = "HTTP", type_ = "string", json_path = ".spec.upstream.http.url"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = "1"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ToolContractSpec {
    /// The name under which the agent calls the tool.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9_.-]+$"))]
    pub tool: String,
    /// What the agent is told about the tool. It comes from here, never from the upstream.
    #[schemars(length(min = 1, max = 4096))]
    pub description: String,
    /// Where the tool really is.
    pub upstream: Upstream,
    /// JSON Schema (draft 2020-12) of the arguments, `format` included. Unknown properties are refused unless it says otherwise.
    #[schemars(schema_with = "json_schema_object")]
    pub input: serde_json::Value,
    /// JSON Schema (draft 2020-12) of the result, an object: an MCP result's `structuredContent`, or the JSON in its only text; an
    /// HTTP reply's JSON. A result that does not fit is not given to the agent, who is told so by rule `tool.output`; what the call
    /// did stays done. Properties that the schema does not name pass, unless it says otherwise. Results that the upstream
    /// itself calls errors are not compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "json_schema_object")]
    pub output: Option<serde_json::Value>,
    /// Bounds of the tool's calls. Each that is passed denies by a rule of its own.
    #[serde(default)]
    pub limits: ToolLimits,
    /// Conditions that must all be true before a call leaves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub preconditions: Vec<Precondition>,
    /// What makes two calls one. Without, every call is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency: Option<Idempotency>,
    /// A read that tells whether a call took effect whose reply never came. Without, that stays unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<VerifyRead>,
    /// How a call is undone when its task is rolled back. Without, people are told that nothing says how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Rollback>,
    /// Who must say yes before a call leaves. Nobody is asked without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Approval>,
    /// What a call may change.
    pub side_effect: SideEffect,
    /// How sensitive the tool's data is at least, for the pack's rules and risk. Its patterns may find more.
    #[serde(default, skip_serializing_if = "DataClass::is_unclassified")]
    pub data: DataClass,
    /// JSON Pointers (RFC 6901) to the arguments that people who decide on a call are not shown, such as `/card/number`. They see
    /// `"[redacted]"` in their place; what they approve is the whole call by its digest. The digest is salted: whoever sees the rest
    /// cannot try values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 256), regex(pattern = r"^(/([^~/]|~[01])*)+$")), extend("x-kubernetes-list-type" = "set"))]
    pub redact: Vec<String>,
}

/// One effect for calls that are one, within a task, all attempts together. The same call again is answered with the result that
/// there is, and is not counted; several at once are made once. A call with the same key and other arguments is denied by rule
/// `tool.idempotency`, and so is one of which nobody knows whether it took effect and no `verify` tells, or whose result is not kept any
/// more: results of up to 256 KiB each live in the attempt's harness, up to 8 MiB in all, and in the bucket of the pack's `state`, if it
/// has one, for later attempts. A call that certainly did nothing may be made again.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Idempotency {
    /// The argument that tells calls apart, such as an order's number; `input` requires it. All arguments without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub argument: Option<String>,
    /// For HTTP tools whose upstream tells repeats by a key: the header that carries it, such as `idempotency-key`. The key is a SHA-256
    /// over the task, the tool and the arguments that make it. A call whose fate is unknown is then made again, under its key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[a-z][a-z0-9-]*$"))]
    pub header: Option<String>,
    /// Seconds from a call's start for which its key is remembered.
    #[serde(default = "Idempotency::default_window")]
    #[schemars(range(min = 1, max = 604_800))]
    pub window_seconds: i64,
}

impl Idempotency {
    fn default_window() -> i64 {
        86_400
    }
}

/// A read that tells whether a call took effect whose reply never came: one that timed out, or broke off. It is a call of its own, by its
/// own contract, counted and recorded. Where calls are idempotent, the same call of a later attempt has it made, too, if what became of the
/// earlier one is not known. A `true` counts at once; a `false` counts if it is still one `settleSeconds` after the reply
/// was given up, as the upstream may be at it. While that is found out the agent's call waits; then it is told. A read that fails leaves it unknown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VerifyRead {
    /// The tool to read with, by the name that agents call it: one of the task's, with `sideEffect: read` and without `approval`.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9_.-]+$"))]
    pub tool: String,
    /// Its arguments, each by a JSON Pointer (RFC 6901) into the call's own. A pointer to nothing leaves its argument out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {"type": "string", "maxLength": 256, "pattern": r"^(/([^~/]|~[01])*)*$"}))]
    pub arguments: BTreeMap<String, String>,
    /// A CEL expression over `args`, the call's arguments, and `result`, what was read: whether the call took effect.
    #[schemars(length(min = 1, max = 4096))]
    pub applied: String,
    /// Seconds from when the reply was given up after which a `false` counts.
    #[serde(default = "VerifyRead::default_settle")]
    #[schemars(range(min = 1, max = 300))]
    pub settle_seconds: i64,
}

impl VerifyRead {
    fn default_settle() -> i64 {
        10
    }
}

/// How a call is undone: one of these.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("has(self.call) != has(self.byHand)").message("set exactly one of call and byHand"))]
#[serde(rename_all = "camelCase")]
pub struct Rollback {
    /// By a call of another tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call: Option<Compensation>,
    /// By people: what they are told, such as whom to write to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub by_hand: Option<String>,
}

/// The call that undoes a call. Its arguments are made right after the call, of what was sent and answered, and kept in the pack's
/// `state` bucket: they are in no evidence. A rollback makes the calls in reverse order, each through its own contract, budget and approvals.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Compensation {
    /// Name of the ToolContract of the call, in the same namespace. The agent need not have that tool.
    #[schemars(length(min = 1, max = 253))]
    pub contract: String,
    /// Its arguments, each a CEL expression over `args`, the call's arguments, and `result`, what it answered: its structured
    /// content, or else its only block of text, as JSON where it is JSON. A call for which one cannot be evaluated, or comes to `null`, is left to people.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {"type": "string", "minLength": 1, "maxLength": 4096}))]
    pub arguments: BTreeMap<String, String>,
    /// Seconds from the call's outcome in which it may be undone. Later it is left to people. No limit without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub within_seconds: Option<i64>,
}

/// People's yes to one exact call, as an `ApprovalRequest` for each. An approved call is made once and before the request expires;
/// for the same call again people are asked again. A denied or expired one is denied for the rest of the task (rule `tool.approval`).
///
/// Neither the task's principal nor whoever created the task may approve. While a request is undecided the attempt's wall time
/// stands still, for as long as the limit `approvalWaitSeconds` gives.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("size(self.approvers.users) + size(self.approvers.groups) > 0").message("approvers: name at least one user or group that may decide"))]
#[serde(rename_all = "camelCase")]
pub struct Approval {
    /// A CEL expression over what preconditions see. Where it is `false` nobody is asked; where it cannot be evaluated people are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 4096))]
    pub when: Option<String>,
    /// Who may decide.
    pub approvers: Approvers,
    /// How many of them must approve. One denial is enough to deny.
    #[serde(default = "Approval::default_required")]
    #[schemars(range(min = 1, max = 16))]
    pub required: i64,
    /// Seconds until a request expires.
    #[serde(default = "Approval::default_timeout")]
    #[schemars(range(min = 5, max = 604_800))]
    pub timeout_seconds: i64,
    /// What an expired request means: `Deny` denies the call, `EndTask` ends the task as well, with failure class `Policy`.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// Seconds that a call is held open while it waits. Then the agent is told that it is pending, and asks again by making
    /// the same call again, which is neither counted nor a denial. Keep it below the time that the agent's client gives a call.
    #[serde(default = "Approval::default_hold")]
    #[schemars(range(min = 0, max = 3600))]
    pub hold_seconds: i64,
}

impl Approval {
    fn default_required() -> i64 {
        1
    }
    fn default_timeout() -> i64 {
        3600
    }
    /// Below the minute that MCP's TypeScript SDK gives a call.
    fn default_hold() -> i64 {
        45
    }
}

/// Where a tool is: one of these.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("has(self.mcp) != has(self.http)").message("set exactly one of mcp and http"))]
#[serde(rename_all = "camelCase")]
pub struct Upstream {
    /// A tool of an MCP server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mcp: Option<McpUpstream>,
    /// An HTTP request by a template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpUpstream>,
}

/// A tool of an MCP server that speaks streamable HTTP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct McpUpstream {
    /// The server's endpoint.
    #[schemars(length(min = 8, max = 2048), regex(pattern = r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[^\s#]*)?$"))]
    pub url: String,
    /// The tool's name there.
    #[schemars(length(min = 1, max = 128))]
    pub tool: String,
    /// Pins the server's own definition of the tool: calls are denied by rule `tool.changed` while the server lists another, or none.
    /// Lower-case hex SHA-256 over the RFC 8785 form of the object of those of the members `name`, `title`, `description`,
    /// `inputSchema`, `outputSchema` and `annotations` that the server's `tools/list` gives for the tool (of `annotations` those of
    /// `title`, `readOnlyHint`, `destructiveHint`, `idempotentHint` and `openWorldHint`; `null` counts as absent). Every intent in
    /// the evidence names the digest in force, as does the denial. Without a pin the first definition that an attempt
    /// sees holds for that attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9a-f]{64}$"))]
    pub digest: Option<String>,
}

/// One HTTP request, made of the call's arguments. A JSON reply becomes the result's structured content and its text, other text
/// its text, pictures and sounds MCP content; other replies are refused. A status of 400 and more is an error result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpUpstream {
    /// The method. With GET, HEAD and DELETE every argument must have its place in the URL; with the others the arguments
    /// that have none are the body, a JSON object.
    pub method: HttpMethod,
    /// The URL. `{name}` in a segment of its path, at most one in each, stands for the argument of that name: a string, an integer
    /// or a boolean that `input` requires, percent-encoded as one segment. What some server would take for less or more than one segment
    /// (`/`, `\`, `;`, `?`, `#`, `..`, escapes such as `%2F`, an empty text, control characters, a dot or space at the end, and what
    /// stands for any of these) is denied by rule `tool.url`. `{+name}` as the last segment is several, with `/` between them, each held to
    /// the same. Scheme, host, port and a query written here are literal.
    #[schemars(length(min = 8, max = 2048), regex(pattern = r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?([/?][^\s#]*)?$"))]
    pub url: String,
    /// Arguments that go into the query as `name=value`, in this order, where the call has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(min = 1, max = 128)), extend("x-kubernetes-list-type" = "set"))]
    pub query: Vec<String>,
}

/// Bounds of one tool's calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ToolLimits {
    /// Calls over the whole task, all attempts together (rule `tool.calls`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub calls: Option<i64>,
    /// Calls a minute (rule `tool.rate`): a bucket that holds so many and fills evenly. It begins full when the harness of an
    /// attempt starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 60_000))]
    pub per_minute: Option<i64>,
    /// Seconds that the upstream may take, to list its tools where that is due and for the call itself (rule `tool.timeout`); 120
    /// without. Whether a call took effect that was not answered in time is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 300))]
    pub timeout_seconds: Option<i64>,
    /// Bytes of the arguments, as JSON in canonical form (rule `tool.requestBytes`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 2, max = 4_194_304))]
    pub request_bytes: Option<i64>,
    /// Bytes of the upstream's reply to the call (rule `tool.responseBytes`); 16 MiB without. A longer one is not given to the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_777_216))]
    pub response_bytes: Option<i64>,
}

/// A CEL expression over `args`, `task`, `principal`, `usage` and `results` that must be `true`.
///
/// `results` maps the name of a tool to what its last successful call in this attempt answered: its structured content, or
/// else its only block of text, as JSON where it is JSON. Results longer than 16 KiB are absent, and so are all once the
/// harness has restarted: a condition that needs one then denies, until the tool is called again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Precondition {
    /// Names the condition in denials and in evidence.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?$"))]
    pub name: String,
    /// The expression. An error or anything but `true` denies.
    #[schemars(length(min = 1, max = 4096))]
    pub cel: String,
    /// What the agent is told when it does not hold.
    #[schemars(length(min = 1, max = 1024))]
    pub message: String,
}

/// A JSON Schema inside a structural schema: an object whose inside the API server keeps but does not judge.
fn json_schema_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true, "maxProperties": 64 })
}
