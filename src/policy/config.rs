//! The rendered configuration: everything that the decisions of a harness depend on, as plain data.
//!
//! The operator renders it from the custom resources into an immutable ConfigMap. The gateway renders it again from its own view of the
//! resources and compares [`PolicyConfig::digest`]. The evidence log stores its bytes. Unknown fields are rejected, so a harness never runs
//! under a rule that it does not understand.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    approval::{ApprovalSource, Approvers},
    model::{api::Family, table::Capability},
};
use crate::canonical;

/// What a tool call may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum SideEffect {
    /// Nothing.
    Read,
    /// State that the organization owns.
    Write,
    /// Something outside the organization: mail, payments, people.
    External,
}

impl SideEffect {
    /// Returns the name that manifests, records and metrics use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::External => "external",
        }
    }
}

/// What a host may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum EgressUse {
    /// Tool calls that the harness makes.
    Tools,
    /// Model calls that the harness makes.
    Models,
    /// Connections that the agent makes itself through the proxy.
    Direct,
}

/// How sensitive data is. The highest value counts if there are several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum Sensitivity {
    /// Nothing says that the data is sensitive.
    #[default]
    Unclassified,
    /// For members of the organization.
    Internal,
    /// For some members of the organization: data of customers, contracts.
    Confidential,
    /// For very few people: secrets, health data, payment cards.
    Restricted,
}

impl Sensitivity {
    /// Returns the name that manifests, records and CEL expressions use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unclassified => "Unclassified",
            Self::Internal => "Internal",
            Self::Confidential => "Confidential",
            Self::Restricted => "Restricted",
        }
    }

    /// Returns whether nothing says that the data is sensitive.
    pub fn is_unclassified(&self) -> bool {
        *self == Self::Unclassified
    }
}

/// The decision of a pack's rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum RuleDecision {
    /// The call may be made, unless another rule requires more.
    Allow,
    /// The call may be made once approvers have approved it.
    RequireApproval,
    /// The call is denied.
    Deny,
}

/// What the task has used of its limits, across all attempts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// Tool calls sent.
    pub tool_calls: i64,
    /// Tokens of model calls, settled or reserved.
    pub tokens: i64,
    /// Calls and connections denied.
    pub denials: i64,
    /// Cost of model calls, settled or reserved, in millionths of the pack's currency unit.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cost_micros: i64,
}

/// Returns whether a counter is zero.
pub fn is_zero(count: &i64) -> bool {
    *count == 0
}

/// Hard limits, not above the highest values that the workflow class allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Limits {
    /// Seconds that one attempt can run.
    pub wall_time_seconds: i64,
    /// Tool calls over all attempts.
    pub tool_calls: i64,
    /// Model tokens over all attempts.
    pub tokens: i64,
    /// Denials over all attempts that end the task. No limit if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub denials: Option<i64>,
    /// Cost of model calls over all attempts, in millionths of the pack's currency unit. No limit if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_micros: Option<i64>,
    /// Seconds of an attempt that do not count as wall time while a call waits for approval. Longer waits count.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub approval_wait_seconds: i64,
}

/// The file that the operator renders for one attempt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HarnessConfig {
    /// Everything that decisions depend on. The gateway compares its digest, and evidence records the digest.
    pub policy: PolicyConfig,
    /// Addresses. Wrong values make calls fail. They cannot make a call pass.
    pub wiring: Wiring,
}

/// Everything that decisions depend on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicyConfig {
    /// The task.
    pub task: TaskIdentity,
    /// The pack, in the version that was compiled.
    pub pack: PackIdentity,
    /// Hard limits.
    pub limits: Limits,
    /// The side effects that the workflow class allows.
    pub allowed_effects: Vec<SideEffect>,
    /// The tools, sorted by name.
    pub tools: Vec<Tool>,
    /// The endpoints of models, with their prices and policies.
    pub models: ModelEndpoints,
    /// The hosts that the task may reach. They are here for the record: the gateway decides by its own copy.
    pub egress: Vec<EgressHost>,
    /// The pack's policy for tool calls.
    #[serde(default, skip_serializing_if = "Access::is_empty")]
    pub access: Access,
    /// Hosts that the workflow class ignores: host names, `*.` and a domain, or addresses. A connection to one is denied like a connection
    /// to any unlisted host, but the denial does not count towards `limits.denials`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignored_hosts: Vec<String>,
    /// Seconds that an upstream may be silent, if not [`SILENCE`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream_timeout_seconds: Option<i64>,
}

/// How long an upstream may be silent before its reply begins and between two pieces of the reply. The official client libraries of models
/// wait as long.
pub const SILENCE: Duration = Duration::from_secs(600);

impl PolicyConfig {
    /// Returns how long an upstream may be silent before its reply begins and between two pieces of the reply.
    pub fn silence(&self) -> Duration {
        self.upstream_timeout_seconds
            .and_then(|seconds| u64::try_from(seconds).ok())
            .map_or(SILENCE, Duration::from_secs)
    }

    /// Returns the tool with this name.
    pub fn tool(&self, name: &str) -> Option<&Tool> {
        self.tools.iter().find(|tool| tool.name == name)
    }

    /// Returns who must approve a call of the tool, by the contract or by the pack.
    pub fn approval(&self, tool: &str, by: ApprovalSource) -> Option<&Approval> {
        match by {
            ApprovalSource::Contract => self.tool(tool)?.approval.as_ref(),
            ApprovalSource::Pack => self.access.approval.as_ref(),
        }
    }

    /// Returns the SHA-256 digest of the canonical form (RFC 8785), in lower-case hex.
    ///
    /// # Errors
    /// Returns an error if the value has no canonical form. The types prevent this, except for non-finite numbers in a schema.
    pub fn digest(&self) -> Result<String, canonical::CanonicalError> {
        Ok(hex::encode(canonical::digest(self)?))
    }
}

/// The identity of the task, and what it is for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TaskIdentity {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
    /// The UID. A task that is created again under the same name is another task.
    pub uid: String,
    /// The goal of the agent.
    pub objective: String,
    /// The workflow class.
    pub workflow_class: String,
    /// The kind of work, a label of metrics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_class: Option<String>,
    /// The user or team on whose behalf the task acts.
    pub principal: String,
    /// The user who created the task, if admission recorded it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requester: Option<String>,
    /// The agent's image, as the task names it. Empty for a rollback, which has no agent.
    pub image: String,
    /// The task that this task rolls back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback_of: Option<RollbackOf>,
}

/// The task that is rolled back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RollbackOf {
    /// The name of the task, in the same namespace.
    #[cfg_attr(
        feature = "kube",
        schemars(length(min = 1, max = 52), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))
    )]
    pub name: String,
    /// The UID of the task.
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9-]+$")))]
    pub uid: String,
}

/// The identity of the pack that was compiled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PackIdentity {
    /// The name.
    pub name: String,
    /// The UID.
    pub uid: String,
    /// The environment that the pack governs.
    pub environment: String,
}

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
    #[serde(default)]
    pub limits: ToolLimits,
    /// The conditions that must be true before a call is sent.
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
    #[serde(default, skip_serializing_if = "DataClass::is_unclassified")]
    pub data: DataClass,
    /// JSON Pointers to the arguments that approvers do not see.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub redact: Vec<String>,
}

/// The minimum sensitivity of a tool's data. A pack's classification can find more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
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
    Mcp(McpUpstream),
    /// An HTTP request that is rendered from a template.
    Http(HttpUpstream),
}

/// A tool of an MCP server that speaks streamable HTTP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct McpUpstream {
    /// The endpoint of the server.
    pub url: String,
    /// The name of the tool on the server.
    pub tool: String,
    /// The pin: the digest that the server's definition of the tool must have. See [`definition`](super::definition).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// An HTTP request that is rendered from the arguments of a call. See [`template`](super::template).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpUpstream {
    /// The method.
    pub method: HttpMethod,
    /// The URL, with `{name}` in place of each argument.
    pub url: String,
    /// The arguments that are sent in the query.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
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
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ToolLimits {
    /// The number of calls, over all attempts of the task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calls: Option<i64>,
    /// The number of calls per minute. The same number may be made at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_minute: Option<i64>,
    /// Seconds that one call can take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<i64>,
    /// Bytes of the arguments in canonical form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_bytes: Option<i64>,
    /// Bytes of the upstream's reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
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

/// A named condition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Precondition {
    /// The name.
    pub name: String,
    /// A CEL expression that must be true.
    pub cel: String,
    /// The message that the agent gets if the condition is not true.
    pub message: String,
}

/// What makes two calls of a tool the same call. See [`ledger`](super::ledger).
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

impl Tool {
    /// Returns the compensation of the tool's calls, if the contract has one.
    pub fn compensation(&self) -> Option<&Compensation> {
        match &self.rollback {
            Some(Rollback::Call(compensation)) => Some(compensation),
            _ => None,
        }
    }
}

/// The approval that a call needs.
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

/// A pack's policy for tool calls. See [`access`](super::access).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Access {
    /// The patterns that find sensitive data.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classification: Vec<DataPattern>,
    /// The rules about which principals may call which tools.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<AccessRule>,
    /// The risk score of a call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub risk: Option<Risk>,
    /// The approval that a call needs if a rule or the risk score requires it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Approval>,
}

impl Access {
    /// Returns whether the pack says nothing about calls.
    pub fn is_empty(&self) -> bool {
        self.classification.is_empty() && self.rules.is_empty() && self.risk.is_none()
    }

    /// Returns whether the pack can require approval of a call.
    pub fn may_ask(&self) -> bool {
        self.rules.iter().any(|rule| rule.decision == RuleDecision::RequireApproval)
            || self.risk.as_ref().is_some_and(|risk| risk.approve_at.is_some())
    }
}

/// A pattern that finds sensitive data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DataPattern {
    /// The name.
    pub name: String,
    /// A regular expression of the `regex` crate.
    pub pattern: String,
    /// The sensitivity of data in which the pattern matches.
    pub sensitivity: Sensitivity,
}

/// A rule about which principals may call which tools. It applies to calls that match all of its fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessRule {
    /// The name.
    pub name: String,
    /// Principals, or prefixes with `*`. All principals if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub principals: Vec<String>,
    /// Tools, or prefixes with `*`. All tools if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<String>,
    /// Side effects. All side effects if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub effects: Vec<SideEffect>,
    /// A CEL expression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    /// The decision for calls to which the rule applies.
    pub decision: RuleDecision,
    /// The message that the agent gets when the call is denied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// The risk score of a call: the sum of the points of all terms that are true.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Risk {
    /// The terms of the score.
    pub terms: Vec<RiskTerm>,
    /// The score from which on a call needs approval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approve_at: Option<i64>,
    /// The score from which on a call is denied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deny_at: Option<i64>,
}

/// One term of the risk score.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RiskTerm {
    /// The name.
    pub name: String,
    /// A CEL expression. The term counts unless the expression is `false`.
    pub when: String,
    /// The points that the term adds.
    pub points: i64,
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

/// The endpoints of models, and the pack's policy for model calls.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelEndpoints {
    /// The base URL for `/v1/chat/completions` and `/v1/responses`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub openai: Option<String>,
    /// The base URL for `/v1/messages`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anthropic: Option<String>,
    /// Endpoints for some models. The first entry that matches a request takes precedence over `openai` and `anthropic`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<ModelEndpoint>,
    /// Prices and properties of models. The first entry that matches a model's name counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prices: Vec<ModelPrice>,
    /// What providers may do besides answering.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Capability>,
    /// How Belay handles members of requests that it does not know.
    #[serde(default, skip_serializing_if = "UnknownMembers::is_refuse")]
    pub unknown_members: UnknownMembers,
    /// Whether providers may store replies.
    #[serde(default, skip_serializing_if = "StoreReplies::is_as_written")]
    pub store_replies: StoreReplies,
    /// Whether Belay asks for the usage of streamed chat completions.
    #[serde(default, skip_serializing_if = "StreamUsage::is_ask")]
    pub stream_usage: StreamUsage,
}

/// An endpoint for some models.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelEndpoint {
    /// Names of models, as requests write them, or prefixes with `*`.
    pub models: Vec<String>,
    /// The API that the endpoint speaks.
    pub api: Family,
    /// The base URL.
    pub url: String,
    /// What this provider may do besides answering, in addition to what the pack allows for all endpoints.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Capability>,
    /// Whether Belay asks for the usage of this provider's streamed chat completions, if the pack asks at all.
    #[serde(default, skip_serializing_if = "StreamUsage::is_ask")]
    pub stream_usage: StreamUsage,
}

/// How Belay handles members of model requests that it does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum UnknownMembers {
    /// Belay denies the request.
    #[default]
    Refuse,
    /// Belay forwards the members. The intent has the rule `model.unknown`.
    Pass,
}

impl UnknownMembers {
    /// Returns whether it is the default.
    pub fn is_refuse(&self) -> bool {
        *self == Self::Refuse
    }
}

/// Whether providers may store replies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum StoreReplies {
    /// As the agent writes it. The Responses API stores a reply for a month unless the request says otherwise.
    #[default]
    AsWritten,
    /// Belay sets `store: false` in each request whose reply the provider could store.
    Never,
}

impl StoreReplies {
    /// Returns whether it is the default.
    pub fn is_as_written(&self) -> bool {
        *self == Self::AsWritten
    }
}

/// Whether Belay asks for the usage of streamed chat completions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum StreamUsage {
    /// Belay sets `stream_options.include_usage` in each request for a stream.
    #[default]
    Ask,
    /// As the agent writes it. A stream that does not report its usage costs its full reservation.
    AsWritten,
}

impl StreamUsage {
    /// Returns whether it is the default.
    pub fn is_ask(&self) -> bool {
        *self == Self::Ask
    }
}

/// The highest price of a model per million tokens, in millionths of the pack's currency unit, and other properties that the pack sets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelPrice {
    /// The name of a model, as requests write it, or a prefix with `*`.
    pub model: String,
    /// The price of prompt tokens.
    pub input_micros: i64,
    /// The price of reply tokens.
    pub output_micros: i64,
    /// The longest reply of the model, in tokens. The catalogue's value if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_output_tokens: Option<i64>,
    /// The highest number of tokens of prompt and reply together. The catalogue's value if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_tokens: Option<i64>,
    /// The member that limits the reply of a chat completion. The catalogue's value if absent, or else the endpoint's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_limit_field: Option<OutputLimitField>,
    /// How Belay counts the text of a prompt. The catalogue's value if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<Tokenizer>,
}

/// The member that limits the reply of a chat completion on the model's server. It overrides the catalogue. If neither has a value, it is
/// `max_completion_tokens` at OpenAI and Azure, and `max_tokens` elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum OutputLimitField {
    /// The member that all servers know, except OpenAI's own servers for newer models.
    #[default]
    #[serde(rename = "max_tokens")]
    MaxTokens,
    /// The member that OpenAI's own servers know for newer models.
    #[serde(rename = "max_completion_tokens")]
    MaxCompletionTokens,
}

/// How Belay counts the text of a prompt before the call. It overrides the catalogue. `Bytes` reserves much, and no prompt of text costs
/// more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum Tokenizer {
    /// The tokenizer of OpenAI's recent models.
    O200k,
    /// One token per byte. No tokenizer that works on bytes makes more. Belay reserves much, and no prompt can cost more.
    Bytes,
}

/// One entry of the workflow class's list of egress hosts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressHost {
    /// A host name, or `*.` and a domain.
    pub host: String,
    /// The ports.
    pub ports: Vec<u16>,
    /// The uses that the host is listed for.
    pub uses: Vec<EgressUse>,
    /// The name of the credential that the gateway adds to calls to this host: `secret/key`. The pack maps this credential to the task's
    /// principal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<String>,
    /// Whether the host's credentials are only for other principals. If so, this task cannot reach the host.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub barred: bool,
}

/// The addresses that an attempt needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Wiring {
    /// The number of the attempt, from 1.
    pub attempt: i64,
    /// The `address:port` of the gateway.
    pub gateway: String,
    /// The certificate authority of the gateway, in PEM.
    pub gateway_ca: String,
    /// The addresses that the containment probe dials.
    pub probe: Probe,
}

/// The addresses of the containment probe: one that must answer, and those that must not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Probe {
    /// The `address:port` that must answer: the gateway's.
    pub reachable: String,
    /// Each `address:port` that must not answer: the canary and the API server. The pod adds the kubelet of its own node.
    pub unreachable: Vec<String>,
}
