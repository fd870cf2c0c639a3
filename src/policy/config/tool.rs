//! Tools, as their contracts describe them.
//!
//! Guarantees: what a ToolContract and the policy write alike is one type: the upstreams, the limits, the preconditions, the sensitivity.
//! Non-goals: requests from templates, see [`template`](crate::policy::template), and pins, see [`definition`](crate::policy::definition).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Sensitivity, SideEffect, strict};
use crate::policy::approval::Approvers;

/// One tool, as its contract describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Tool {
    /// The contract's name.
    pub contract: String,
    /// The name that the agent calls.
    pub name: String,
    /// The description that the agent gets.
    pub description: String,
    /// The server that the gateway calls for the tool.
    pub upstream: Upstream,
    /// The JSON Schema of the arguments.
    pub input: serde_json::Value,
    /// The JSON Schema of the result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<serde_json::Value>,
    /// The limits of the tool.
    #[serde(default, deserialize_with = "strict::read")]
    pub limits: ToolLimits,
    /// The conditions that must be true before a call is sent.
    #[serde(deserialize_with = "strict::read")]
    pub preconditions: Vec<Precondition>,
    /// What makes two calls the same call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency: Option<Idempotency>,
    /// The read that finds out whether a call without a reply took effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<VerifyRead>,
    /// How a call is compensated: by another call, or by hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Rollback>,
    /// The approval that a call needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Approval>,
    /// The side effect of a call.
    pub side_effect: SideEffect,
    /// The minimum sensitivity of the tool's data.
    #[serde(default, deserialize_with = "strict::read", skip_serializing_if = "DataClass::is_unclassified")]
    pub data: DataClass,
    /// JSON Pointers to the arguments that approvers do not see.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub redact: Vec<String>,
}

impl Tool {
    /// Returns the compensation of the tool's calls, if the contract has one.
    pub fn compensation(&self) -> Option<&Compensation> {
        match &self.rollback {
            Some(Rollback::Call(compensation)) => Some(compensation),
            _ => None,
        }
    }
}

/// The minimum sensitivity of a tool's data. A pack's classification can find more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DataClass {
    /// The minimum sensitivity of the arguments.
    #[serde(default, skip_serializing_if = "Sensitivity::is_unclassified")]
    pub arguments: Sensitivity,
    /// The minimum sensitivity of the result.
    #[serde(default, skip_serializing_if = "Sensitivity::is_unclassified")]
    pub result: Sensitivity,
}

impl DataClass {
    /// Returns whether the contract says nothing about the sensitivity.
    pub fn is_unclassified(&self) -> bool {
        *self == Self::default()
    }
}

/// The server that the gateway calls for a tool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Upstream {
    /// A tool of an MCP server.
    Mcp(#[serde(deserialize_with = "strict::read")] McpUpstream),
    /// An HTTP request that is rendered from a template.
    Http(#[serde(deserialize_with = "strict::read")] HttpUpstream),
}

/// A tool of an MCP server that speaks streamable HTTP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct McpUpstream {
    /// The server's endpoint.
    #[cfg_attr(
        feature = "kube",
        schemars(length(min = 8, max = 2048), regex(pattern = r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[^\s#]*)?$"))
    )]
    pub url: String,
    /// The tool's name on the server.
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 128)))]
    pub tool: String,
    /// Pins the server's own definition of the tool. Rule `tool.changed` denies calls while the server lists another definition, or none.
    /// The pin is the SHA-256, in lower-case hex, over the RFC 8785 form of an object. The object has the members `name`, `title`,
    /// `description`, `inputSchema`, `outputSchema` and `annotations`, as far as the server's `tools/list` has them for the tool. Of
    /// `annotations` it has `title`, `readOnlyHint`, `destructiveHint`, `idempotentHint` and `openWorldHint`. `null` counts as absent.
    /// Every intent in the evidence names the digest in force, and so does the denial. Without a pin, the first definition that an attempt
    /// sees holds for that attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(regex(pattern = r"^[0-9a-f]{64}$")))]
    pub digest: Option<String>,
}

/// One HTTP request, made from the arguments of the call. A JSON reply becomes the structured content and the text of the result. Other
/// text becomes its text. Pictures and sounds become MCP content. Other replies are denied. A status of 400 or more is an error result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct HttpUpstream {
    /// The method. With GET, HEAD and DELETE, every argument must have a place in the URL. With other methods, the arguments without a
    /// place form the body, a JSON object.
    pub method: HttpMethod,
    /// The URL. `{name}` in a segment of the path, at most one in each segment, is the argument of that name: a string, an integer or a
    /// boolean that `input` requires, percent-encoded as one segment. Rule `tool.url` denies values that a server could read as less or
    /// more than one segment: `/`, `\`, `;`, `?`, `#`, `..`, escapes such as `%2F`, an empty text, control characters, a dot or a space at
    /// the end, and equivalents of these. `{+name}` as the last segment stands for several segments with `/` between them, each under the
    /// same rule. Scheme, host, port and a query in the URL are literal.
    #[cfg_attr(
        feature = "kube",
        schemars(
            length(min = 8, max = 2048),
            regex(pattern = r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?([/?][^\s#]*)?$")
        )
    )]
    pub url: String,
    /// Arguments that go into the query as `name=value`, in this order, if the call has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "kube", schemars(length(max = 32), inner(length(min = 1, max = 128)), extend("x-kubernetes-list-type" = "set")))]
    pub query: Vec<String>,
}

/// The method of an HTTP tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "UPPERCASE")]
pub enum HttpMethod {
    /// No body.
    Get,
    /// No body, neither in the request nor in the reply.
    Head,
    /// No body.
    Delete,
    /// Arguments that are not in the path or the query are sent as a JSON body.
    Post,
    /// Arguments that are not in the path or the query are sent as a JSON body.
    Put,
    /// Arguments that are not in the path or the query are sent as a JSON body.
    Patch,
}

impl HttpMethod {
    /// Returns the name that manifests and HTTP use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::Delete => "DELETE",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
        }
    }

    /// Returns whether a request with this method has a body.
    pub fn has_body(self) -> bool {
        matches!(self, Self::Post | Self::Put | Self::Patch)
    }
}

/// Limits on the calls of one tool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ToolLimits {
    /// Calls in the whole task, across all attempts (rule `tool.calls`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(range(min = 0, max = 1_000_000)))]
    pub calls: Option<i64>,
    /// Calls a minute (rule `tool.rate`): a token bucket of this size that refills evenly. It is full when the harness of an attempt
    /// starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(range(min = 1, max = 60_000)))]
    pub per_minute: Option<i64>,
    /// Seconds for the call, including a listing of the upstream's tools if it is due (rule `tool.timeout`). 120 if absent. A call without
    /// a reply in this time has an unknown outcome.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(range(min = 1, max = 300)))]
    pub timeout_seconds: Option<i64>,
    /// Bytes of the arguments, as JSON in canonical form (rule `tool.requestBytes`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(range(min = 2, max = 4_194_304)))]
    pub request_bytes: Option<i64>,
    /// Bytes of the upstream's reply (rule `tool.responseBytes`). 16 MiB if absent. The agent does not get a longer reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(range(min = 1, max = 16_777_216)))]
    pub response_bytes: Option<i64>,
}

/// The state of one tool in a log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ToolUsage {
    /// Calls sent, over all attempts.
    pub calls: i64,
    /// The digest of the upstream's definition at the first call of the newest attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub definition: Option<String>,
}

/// A CEL expression over `args`, `task`, `principal`, `usage` and `results` that must be `true`.
///
/// `results` maps the name of a tool to the result of its last successful call in this attempt: the structured content, or the only block
/// of text, parsed if it is JSON. Results longer than 16 KiB are absent. After a restart of the harness, all results are absent. A
/// condition that needs a result then denies until the tool is called again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Precondition {
    /// The name of the condition in denials and in evidence.
    #[cfg_attr(
        feature = "kube",
        schemars(length(min = 1, max = 63), regex(pattern = r"^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?$"))
    )]
    pub name: String,
    /// The expression. An error or a value other than `true` denies the call.
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 4096)))]
    pub cel: String,
    /// The message to the agent if the condition is not true.
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 1024)))]
    pub message: String,
}

/// What makes two calls of a tool the same call. See [`ledger`](crate::policy::ledger).
// The CRD has a type of its own, in which `windowSeconds` has a default. Here the field is required.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Idempotency {
    /// The argument whose value identifies a call. All arguments if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub argument: Option<String>,
    /// The header that carries the idempotency key to an HTTP upstream. The upstream recognizes repeated calls by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<String>,
    /// Seconds that a key is remembered.
    pub window_seconds: i64,
}

/// A read that finds out whether a call took effect.
// The CRD has a type of its own, which leaves out empty `arguments`, and in which `settleSeconds` has a default. Here `arguments` are always
// written, and both fields are required.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VerifyRead {
    /// The name of the tool that reads.
    pub tool: String,
    /// The arguments of the read, as JSON Pointers into the arguments of the call.
    pub arguments: BTreeMap<String, String>,
    /// A CEL expression over `args` and `result` that is true if the call took effect.
    pub applied: String,
    /// Seconds from the moment at which Belay gave up waiting for the reply. `false` counts only after that time.
    pub settle_seconds: i64,
}

impl VerifyRead {
    /// Returns the arguments of the read for a call with the arguments `of`.
    pub fn arguments(&self, of: &serde_json::Value) -> serde_json::Map<String, serde_json::Value> {
        let found =
            self.arguments.iter().filter_map(|(name, pointer)| Some((name.clone(), of.pointer(pointer)?.clone())));
        found.collect()
    }
}

/// How a call is compensated: by another call, or by hand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Rollback {
    /// A compensation: a call of another tool.
    Call(Compensation),
    /// By hand. The text describes how.
    ByHand(String),
}

/// The call that undoes an earlier call.
// The CRD has a type of its own, which leaves out empty `arguments`. Here they are always written, and the field is required.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Compensation {
    /// The name of the ToolContract of the call, in the same namespace.
    pub contract: String,
    /// The arguments of the call. Each is a CEL expression over `args` and `result`.
    pub arguments: BTreeMap<String, String>,
    /// Seconds after the outcome of the earlier call in which the compensation may be made. No limit if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within_seconds: Option<i64>,
}

/// The approval that a call needs.
// The CRD has a type of its own, in which all fields but `approvers` can be absent. Here only `when` can.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Approval {
    /// A CEL expression. If it is `false`, the call needs no approval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    /// Who may decide.
    pub approvers: Approvers,
    /// The number of approvers who must approve.
    pub required: i64,
    /// Seconds until a request expires.
    pub timeout_seconds: i64,
    /// What happens when a request expires.
    pub on_timeout: OnTimeout,
    /// Seconds that a call waits for the decision before the agent is told that it is pending.
    pub hold_seconds: i64,
}

/// What happens when a request expires before approvers have decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum OnTimeout {
    /// The call is denied, and the agent continues.
    #[default]
    Deny,
    /// The call is denied, and the task ends.
    EndTask,
}
