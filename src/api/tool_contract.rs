//! `ToolContract`: one tool that an agent may call, and under which terms.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::readiness::Readiness;
use crate::policy::{
    approval::Approvers,
    config::{DataClass, HttpUpstream, McpUpstream, OnTimeout, Precondition, SideEffect, ToolLimits},
};

/// One tool: what the agent sees, where the call goes, and which conditions must be true before it leaves.
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
    /// The description for the agent. It comes from here, never from the upstream.
    #[schemars(length(min = 1, max = 4096))]
    pub description: String,
    /// Where calls of the tool go.
    pub upstream: Upstream,
    /// JSON Schema (draft 2020-12) of the arguments, including `format`. Calls with unknown properties are denied unless the schema allows
    /// them.
    #[schemars(schema_with = "json_schema_object")]
    pub input: serde_json::Value,
    /// JSON Schema (draft 2020-12) of the result, an object: the `structuredContent` of an MCP result, or the JSON in its only text; the
    /// JSON of an HTTP reply. The agent does not get a result that does not fit, but an error with rule `tool.output`. The effect of the
    /// call remains. Properties that the schema does not name pass, unless the schema forbids them. Results that the upstream marks as
    /// errors are not checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "json_schema_object")]
    pub output: Option<serde_json::Value>,
    /// Limits on the tool's calls. Each limit has a rule of its own.
    #[serde(default)]
    pub limits: ToolLimits,
    /// Conditions that must all be true before a call leaves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub preconditions: Vec<Precondition>,
    /// When two calls are duplicates. If absent, every call is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency: Option<Idempotency>,
    /// A read that shows whether a call without a reply took effect. If absent, its outcome stays unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<VerifyRead>,
    /// How a call is undone in a rollback. If absent, the rollback lists the call for manual action.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Rollback>,
    /// Who must approve a call before it leaves. If absent, the contract requires no approval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Approval>,
    /// What a call may change.
    pub side_effect: SideEffect,
    /// The minimum sensitivity of the tool's data, for the pack's rules and risk score. The pack's patterns can find more.
    #[serde(default, skip_serializing_if = "DataClass::is_unclassified")]
    pub data: DataClass,
    /// JSON Pointers (RFC 6901) to arguments that approvers do not see, such as `/card/number`. They see `"[redacted]"` instead. They
    /// approve the whole call, by its salted commitment. The salt prevents a reader from guessing the values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 256), regex(pattern = r"^(/([^~/]|~[01])*)+$")), extend("x-kubernetes-list-type" = "set"))]
    pub redact: Vec<String>,
}

/// Duplicate calls have one effect within a task, across all attempts. A repeated call gets the stored result and does not count.
/// Concurrent duplicates run once. Rule `tool.idempotency` denies a call with the same key and other arguments. It also denies a repeated
/// call if the outcome is unknown and no `verify` resolves it, or if the result is no longer stored. The attempt's harness stores results
/// of up to 256 KiB each, 8 MiB in total. The pack's state bucket, if it has one, stores them for later attempts. A call that certainly had
/// no effect can be made again.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Idempotency {
    /// The argument that identifies a call, such as an order number. `input` must require it. All arguments if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub argument: Option<String>,
    /// For HTTP tools whose upstream deduplicates by a key: the header of the key, such as `idempotency-key`. The key is a SHA-256 over the
    /// task, the tool and the identifying arguments. With it, a call with an unknown outcome is made again under its key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[a-z][a-z0-9-]*$"))]
    pub header: Option<String>,
    /// Seconds from a call's start for which Belay remembers its key.
    #[serde(default = "Idempotency::default_window")]
    #[schemars(range(min = 1, max = 604_800))]
    pub window_seconds: i64,
}

impl Idempotency {
    fn default_window() -> i64 {
        86_400
    }
}

/// A read that shows whether a call without a reply took effect: a call that timed out or broke off. The read is a call of its own, by its
/// own contract, and it is counted and recorded. For idempotent calls, the same call of a later attempt also causes the read, if the
/// outcome of the earlier call is unknown. `true` counts at once. `false` counts only `settleSeconds` after Belay gave up waiting for the
/// reply, because the upstream may still work on it. The agent's call waits for the answer and gets it. If the read fails, the outcome
/// stays unknown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VerifyRead {
    /// The name of the read tool: one of the task's tools, with `sideEffect: read` and without `approval`.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9_.-]+$"))]
    pub tool: String,
    /// The arguments of the read, each as a JSON Pointer (RFC 6901) into the arguments of the call. A pointer to nothing omits the
    /// argument.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {"type": "string", "maxLength": 256, "pattern": r"^(/([^~/]|~[01])*)*$"}))]
    pub arguments: BTreeMap<String, String>,
    /// A CEL expression over `args`, the arguments of the call, and `result`, the result of the read. It says whether the call took effect.
    #[schemars(length(min = 1, max = 4096))]
    pub applied: String,
    /// Seconds after which `false` counts, from when Belay gave up waiting for the reply.
    #[serde(default = "VerifyRead::default_settle")]
    #[schemars(range(min = 1, max = 300))]
    pub settle_seconds: i64,
}

impl VerifyRead {
    fn default_settle() -> i64 {
        10
    }
}

/// How a call is undone. Set exactly one field.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("has(self.call) != has(self.byHand)").message("set exactly one of call and byHand"))]
#[serde(rename_all = "camelCase")]
pub struct Rollback {
    /// A call of another tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call: Option<Compensation>,
    /// Instructions for a person, such as whom to write to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub by_hand: Option<String>,
}

/// The compensation of a call. Belay computes its arguments right after the call, from the arguments and the result, and stores them in the
/// pack's state bucket. They are not in the evidence. A rollback makes the compensations in reverse order, each through its own contract,
/// budget and approvals.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Compensation {
    /// The name of the compensation's ToolContract, in the same namespace. The agent does not need this tool.
    #[schemars(length(min = 1, max = 253))]
    pub contract: String,
    /// The arguments, each a CEL expression over `args`, the arguments of the call, and `result`, its result: the structured content, or
    /// the only block of text, parsed if it is JSON. If an expression cannot be evaluated or is `null`, the call is listed for manual
    /// action.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {"type": "string", "minLength": 1, "maxLength": 4096}))]
    pub arguments: BTreeMap<String, String>,
    /// Seconds from the call's outcome in which the compensation can be made. Later, the call is listed for manual action. No limit if
    /// absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub within_seconds: Option<i64>,
}

/// Approval of each exact call, with one `ApprovalRequest` for each. An approved call is made once, before the request expires. The same
/// call again needs a new approval. A denied or expired call is denied for the rest of the task (rule `tool.approval`).
///
/// The task's principal and the creator of the task cannot approve. While a request is pending, the wall time of the attempt stops, for at
/// most `approvalWaitSeconds`.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("size(self.approvers.users) + size(self.approvers.groups) > 0").message("approvers: name at least one user or group that may decide"))]
#[serde(rename_all = "camelCase")]
pub struct Approval {
    /// A CEL expression over the same variables as preconditions. If it is `false`, the call needs no approval. If it cannot be evaluated,
    /// the call needs approval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 4096))]
    pub when: Option<String>,
    /// Who may decide.
    pub approvers: Approvers,
    /// The number of approvals that the call needs. One denial denies the call.
    #[serde(default = "Approval::default_required")]
    #[schemars(range(min = 1, max = 16))]
    pub required: i64,
    /// Seconds until a request expires.
    #[serde(default = "Approval::default_timeout")]
    #[schemars(range(min = 5, max = 604_800))]
    pub timeout_seconds: i64,
    /// What happens when a request expires: `Deny` denies the call. `EndTask` also ends the task, with failure class `Policy`.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// Seconds that Belay holds a waiting call open. Then the agent gets the answer that the call is pending, and makes the same call again
    /// to wait on. This is neither counted nor a denial. Keep it below the timeout of the agent's client.
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

/// Where calls of a tool go. Set exactly one field.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("has(self.mcp) != has(self.http)").message("set exactly one of mcp and http"))]
#[serde(rename_all = "camelCase")]
pub struct Upstream {
    /// A tool of an MCP server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mcp: Option<McpUpstream>,
    /// An HTTP request from a template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpUpstream>,
}

/// Returns the structural schema of a field that contains a JSON Schema: an object whose content the API server stores without checking it.
fn json_schema_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true, "maxProperties": 64 })
}
