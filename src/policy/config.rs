//! The rendered configuration: all that a harness decides by, as plain data.
//!
//! The operator renders it from the custom resources into an immutable ConfigMap; the gateway renders it again from its
//! own view of them and compares [`PolicyConfig::digest`]; the evidence log keeps its bytes. Unknown fields are refused:
//! a harness never runs under a rule that it does not understand.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    approval::{Approvers, AskedBy},
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
    /// The world outside: mail, payments, people.
    External,
}

impl SideEffect {
    /// The name in manifests, records and metrics.
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
    /// The name in manifests, records and CEL.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unclassified => "Unclassified",
            Self::Internal => "Internal",
            Self::Confidential => "Confidential",
            Self::Restricted => "Restricted",
        }
    }

    /// Whether nothing says that the data is sensitive.
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

/// Whether a counter says nothing.
pub fn is_zero(count: &i64) -> bool {
    *count == 0
}

/// Hard limits, already bounded by the class's ceiling.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Limits {
    /// Seconds that one attempt can run.
    pub wall_time_seconds: i64,
    /// Tool calls over all attempts.
    pub tool_calls: i64,
    /// Model tokens over all attempts.
    pub tokens: i64,
    /// Refused calls over all attempts that end the task; absent for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub denials: Option<i64>,
    /// Cost of model calls over all attempts, in millionths of the pack's currency unit; absent for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_micros: Option<i64>,
    /// Seconds of an attempt that do not count, because a call waited for people; what is more counts.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub approval_wait_seconds: i64,
}

/// The file that the operator renders for one attempt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HarnessConfig {
    /// What is decided by. Its digest is compared by the gateway and recorded.
    pub policy: PolicyConfig,
    /// Where things are. Wrong values here make calls fail; they cannot make one pass.
    pub wiring: Wiring,
}

/// Everything that decides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicyConfig {
    /// The task.
    pub task: TaskIdentity,
    /// The pack, as it was compiled.
    pub pack: PackIdentity,
    /// Hard limits.
    pub limits: Limits,
    /// Side effects that a call may have.
    pub allowed_effects: Vec<SideEffect>,
    /// The tools, sorted by name.
    pub tools: Vec<Tool>,
    /// Where model calls go.
    pub models: ModelEndpoints,
    /// The hosts that the gateway lets the task reach, for the record: the gateway decides by its own copy.
    pub egress: Vec<EgressHost>,
    /// What the pack says to each tool call.
    #[serde(default, skip_serializing_if = "Access::is_empty")]
    pub access: Access,
    /// Hosts that a connection to is refused, as to any that is not listed, without counting towards `limits.denials`: names, `*.` and a domain,
    /// or addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignored_hosts: Vec<String>,
    /// Seconds that an upstream may be silent, where that is not [`SILENCE`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream_timeout_seconds: Option<i64>,
}

/// How long an upstream may be silent, before its reply begins and between two pieces of it: as long as the official client libraries of
/// models wait.
pub const SILENCE: Duration = Duration::from_secs(600);

impl PolicyConfig {
    /// How long an upstream may be silent: before its reply begins, and between two pieces of it.
    pub fn silence(&self) -> Duration {
        self.upstream_timeout_seconds
            .and_then(|seconds| u64::try_from(seconds).ok())
            .map_or(SILENCE, Duration::from_secs)
    }

    /// The tool of that name.
    pub fn tool(&self, name: &str) -> Option<&Tool> {
        self.tools.iter().find(|tool| tool.name == name)
    }

    /// Who must say yes where a tool's contract asks for that, or the pack.
    pub fn approval(&self, tool: &str, by: AskedBy) -> Option<&Approval> {
        match by {
            AskedBy::Contract => self.tool(tool)?.approval.as_ref(),
            AskedBy::Pack => self.access.approval.as_ref(),
        }
    }

    /// Lower-case hex SHA-256 of the RFC 8785 form.
    ///
    /// # Errors
    /// Only if the value has no canonical form, which the types rule out but for non-finite numbers in a schema.
    pub fn digest(&self) -> Result<String, canonical::CanonicalError> {
        Ok(hex::encode(canonical::digest(self)?))
    }
}

/// Which task this is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TaskIdentity {
    /// Its namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
    /// Its UID: a task made again under the same name is another task.
    pub uid: String,
    /// What the agent was asked to do.
    pub objective: String,
    /// The workflow class.
    pub workflow_class: String,
    /// The kind of work, by which KPIs are told apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_class: Option<String>,
    /// On whose behalf.
    pub principal: String,
    /// Who asked for the task, where admission recorded it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requester: Option<String>,
    /// The agent's image as the task names it; empty for a rollback, which has no agent.
    pub image: String,
    /// The task that this one undoes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback_of: Option<RollbackOf>,
}

/// Which task is undone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RollbackOf {
    /// Its name, in the same namespace.
    #[cfg_attr(
        feature = "kube",
        schemars(length(min = 1, max = 52), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))
    )]
    pub name: String,
    /// Its UID.
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9-]+$")))]
    pub uid: String,
}

/// Which pack was compiled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PackIdentity {
    /// The name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// The environment that it speaks for.
    pub environment: String,
}

/// One tool, as its contract has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Tool {
    /// The contract's name.
    pub contract: String,
    /// The name that the agent calls.
    pub name: String,
    /// What the agent is told.
    pub description: String,
    /// Where it really is.
    pub upstream: Upstream,
    /// JSON Schema of the arguments.
    pub input: serde_json::Value,
    /// JSON Schema of the result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<serde_json::Value>,
    /// What one tool may take and use.
    #[serde(default)]
    pub limits: ToolLimits,
    /// What must hold.
    pub preconditions: Vec<Precondition>,
    /// What makes two calls one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency: Option<Idempotency>,
    /// What tells whether a call took effect whose reply never came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<VerifyRead>,
    /// How a call is undone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Rollback>,
    /// Who must say yes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Approval>,
    /// What a call may change.
    pub side_effect: SideEffect,
    /// How sensitive its data is at least.
    #[serde(default, skip_serializing_if = "DataClass::is_unclassified")]
    pub data: DataClass,
    /// JSON Pointers to the arguments that people who approve a call are not shown.
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
    /// Whether nothing is said of either.
    pub fn is_unclassified(&self) -> bool {
        *self == Self::default()
    }
}

/// Where a tool really is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Upstream {
    /// A tool of an MCP server.
    Mcp(McpUpstream),
    /// An HTTP request from a template.
    Http(HttpUpstream),
}

/// A tool of an MCP server that speaks streamable HTTP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct McpUpstream {
    /// Endpoint of the server.
    pub url: String,
    /// The tool's name there.
    pub tool: String,
    /// The digest that the server's definition of the tool must have, see [`definition`](super::definition).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// An HTTP request that is made of a call's arguments, see [`template`](super::template).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpUpstream {
    /// Its method.
    pub method: HttpMethod,
    /// Its URL, with `{name}` where arguments go.
    pub url: String,
    /// The arguments that go into the query.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub query: Vec<String>,
}

/// Method of an HTTP tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "UPPERCASE")]
pub enum HttpMethod {
    /// Without a body.
    Get,
    /// Without a body, and without one in the reply.
    Head,
    /// Without a body.
    Delete,
    /// What is not in path and query is a JSON body.
    Post,
    /// What is not in path and query is a JSON body.
    Put,
    /// What is not in path and query is a JSON body.
    Patch,
}

impl HttpMethod {
    /// The name in manifests and on the wire.
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

    /// Whether a request of this method has a body.
    pub fn has_body(self) -> bool {
        matches!(self, Self::Post | Self::Put | Self::Patch)
    }
}

/// Limits on the calls of one tool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ToolLimits {
    /// Calls over all attempts of the task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calls: Option<i64>,
    /// Calls a minute, and at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_minute: Option<i64>,
    /// Seconds that one call may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<i64>,
    /// Bytes of a call's arguments in canonical form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_bytes: Option<i64>,
    /// Bytes of the upstream's reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_bytes: Option<i64>,
}

/// What a log says of one tool so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ToolUsage {
    /// Calls sent, over all attempts.
    pub calls: i64,
    /// The digest of the upstream's definition by which the newest attempt called it first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub definition: Option<String>,
}

/// One named condition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Precondition {
    /// The name.
    pub name: String,
    /// A CEL expression that must be `true`.
    pub cel: String,
    /// What the agent is told otherwise.
    pub message: String,
}

/// What makes two calls of a tool one, see [`ledger`](super::ledger).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Idempotency {
    /// The argument that tells calls apart; all arguments without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub argument: Option<String>,
    /// The header in which the key goes to an HTTP upstream that tells repeats by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<String>,
    /// Seconds for which a key is remembered.
    pub window_seconds: i64,
}

/// A read that tells whether a call took effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VerifyRead {
    /// The tool to read with.
    pub tool: String,
    /// Its arguments, by JSON Pointers into the call's own.
    pub arguments: BTreeMap<String, String>,
    /// A CEL expression over `args` and `result`.
    pub applied: String,
    /// Seconds after which `false` counts, from when Belay gave up waiting for the reply.
    pub settle_seconds: i64,
}

impl VerifyRead {
    /// The arguments to read with.
    pub fn arguments(&self, of: &serde_json::Value) -> serde_json::Map<String, serde_json::Value> {
        let found =
            self.arguments.iter().filter_map(|(name, pointer)| Some((name.clone(), of.pointer(pointer)?.clone())));
        found.collect()
    }
}

/// How a call is undone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Rollback {
    /// A call of another tool.
    Call(Compensation),
    /// By people, as this text tells them.
    ByHand(String),
}

/// The call that undoes a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Compensation {
    /// Name of its ToolContract, of the same namespace.
    pub contract: String,
    /// Its arguments, each a CEL expression over `args` and `result`.
    pub arguments: BTreeMap<String, String>,
    /// Seconds from the call's outcome in which it may be undone; for ever without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within_seconds: Option<i64>,
}

impl Tool {
    /// The call that undoes a call of it, where its contract names one.
    pub fn compensation(&self) -> Option<&Compensation> {
        match &self.rollback {
            Some(Rollback::Call(compensation)) => Some(compensation),
            _ => None,
        }
    }
}

/// Who must say yes to a call, and what that takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Approval {
    /// A CEL expression: where it is `false`, nobody needs to be asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    /// Who may decide.
    pub approvers: Approvers,
    /// How many must approve.
    pub required: i64,
    /// Seconds until a request expires.
    pub timeout_seconds: i64,
    /// What becomes of the task then.
    pub on_timeout: OnTimeout,
    /// Seconds that a call is held open before the agent is told that it is pending.
    pub hold_seconds: i64,
}

/// What a pack says to tool calls, see [`access`](super::access).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Access {
    /// By what sensitive data is told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classification: Vec<DataPattern>,
    /// Who may call what.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<AccessRule>,
    /// How risky a call is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub risk: Option<Risk>,
    /// Who must say yes where a rule or the risk asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Approval>,
}

impl Access {
    /// Whether the pack says nothing of calls.
    pub fn is_empty(&self) -> bool {
        self.classification.is_empty() && self.rules.is_empty() && self.risk.is_none()
    }

    /// Whether it can come to asking people.
    pub fn may_ask(&self) -> bool {
        self.rules.iter().any(|rule| rule.decision == RuleDecision::RequireApproval)
            || self.risk.as_ref().is_some_and(|risk| risk.approve_at.is_some())
    }
}

/// A pattern that tells sensitive data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DataPattern {
    /// The name.
    pub name: String,
    /// A regular expression of the `regex` crate.
    pub pattern: String,
    /// What data that it is found in is.
    pub sensitivity: Sensitivity,
}

/// Who may call what. A rule applies to calls that match all of its fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessRule {
    /// The name.
    pub name: String,
    /// Principals, or their beginnings and `*`; all when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub principals: Vec<String>,
    /// Tools, or their beginnings and `*`; all when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<String>,
    /// Effects; all when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub effects: Vec<SideEffect>,
    /// A CEL expression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    /// What that means.
    pub decision: RuleDecision,
    /// What the agent is told when it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// How risky a call is: the sum of the points of all terms that hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Risk {
    /// The terms of the score.
    pub terms: Vec<RiskTerm>,
    /// From this score on people are asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approve_at: Option<i64>,
    /// From this score on calls are denied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deny_at: Option<i64>,
}

/// One term of the risk score.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RiskTerm {
    /// The name.
    pub name: String,
    /// A CEL expression. It counts unless it is `false`.
    pub when: String,
    /// The points that the term adds.
    pub points: i64,
}

/// What a request that nobody decided in time means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum OnTimeout {
    /// The call is denied, and the agent goes on without it.
    #[default]
    Deny,
    /// The call is denied, and the task ends.
    EndTask,
}

/// Base URLs of the model APIs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelEndpoints {
    /// For `/v1/chat/completions` and `/v1/responses`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub openai: Option<String>,
    /// For `/v1/messages`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anthropic: Option<String>,
    /// For some models. The first that fits a request goes before the two.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<ModelEndpoint>,
    /// What models cost. The first entry that fits a model's name counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prices: Vec<ModelPrice>,
    /// What a provider may be made to do besides answering.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Capability>,
    /// What becomes of members of requests that Belay does not know.
    #[serde(default, skip_serializing_if = "UnknownMembers::is_refuse")]
    pub unknown_members: UnknownMembers,
    /// Whether a provider may keep replies for its caller.
    #[serde(default, skip_serializing_if = "StoreReplies::is_as_written")]
    pub store_replies: StoreReplies,
    /// Whether streams of chat completions are asked what they cost.
    #[serde(default, skip_serializing_if = "StreamUsage::is_ask")]
    pub stream_usage: StreamUsage,
}

/// An endpoint for some models.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelEndpoint {
    /// Names of models as requests have them, or prefixes with `*`.
    pub models: Vec<String>,
    /// Whose API it speaks.
    pub api: Family,
    /// Its base URL.
    pub url: String,
    /// What this provider may be made to do, besides what the pack allows all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Capability>,
    /// Whether its streams of chat completions are asked what they cost, where the pack asks at all.
    #[serde(default, skip_serializing_if = "StreamUsage::is_ask")]
    pub stream_usage: StreamUsage,
}

/// What becomes of members of model requests that Belay does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum UnknownMembers {
    /// The request is refused.
    #[default]
    Refuse,
    /// They pass, and the intent has the rule `model.unknown`.
    Pass,
}

impl UnknownMembers {
    /// Whether it is what it is without a word.
    pub fn is_refuse(&self) -> bool {
        *self == Self::Refuse
    }
}

/// Whether a provider may keep replies for its caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum StoreReplies {
    /// As requests say it; the Responses API keeps them for a month where they do not say it.
    #[default]
    AsWritten,
    /// `store` is `false` in each request that could have it.
    Never,
}

impl StoreReplies {
    /// Whether it is what it is without a word.
    pub fn is_as_written(&self) -> bool {
        *self == Self::AsWritten
    }
}

/// Whether streams of chat completions are asked what they cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum StreamUsage {
    /// `stream_options.include_usage` is set in each.
    #[default]
    Ask,
    /// As requests say it. A stream that gives no account is charged what was set aside.
    AsWritten,
}

impl StreamUsage {
    /// Whether it is what it is without a word.
    pub fn is_ask(&self) -> bool {
        *self == Self::Ask
    }
}

/// What a million tokens cost at most, in millionths of the pack's currency unit, and what else the pack says of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelPrice {
    /// The name of a model as requests have it, or a prefix with `*`.
    pub model: String,
    /// Of the prompt.
    pub input_micros: i64,
    /// Of the reply.
    pub output_micros: i64,
    /// The longest reply that it gives; the catalogue's word without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_output_tokens: Option<i64>,
    /// The longest prompt and reply together that it takes; the catalogue's word without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_tokens: Option<i64>,
    /// By which member a reply of chat completions is limited; the catalogue's word without, or the endpoint's kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_limit_field: Option<OutputLimitField>,
    /// How its text is counted; the catalogue's word without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<Tokenizer>,
}

/// The member that limits the reply of a chat completion on the model's server. It overrides the catalogue. If neither has a value, it is
/// `max_completion_tokens` at OpenAI and Azure, and `max_tokens` elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum OutputLimitField {
    /// What all servers know but OpenAI's own for its newer models.
    #[default]
    #[serde(rename = "max_tokens")]
    MaxTokens,
    /// What OpenAI's own for its newer models know.
    #[serde(rename = "max_completion_tokens")]
    MaxCompletionTokens,
}

/// How the text of a prompt is counted before it leaves, in place of the shipped catalogue's word. `Bytes` sets much aside, and no prompt of text
/// costs more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum Tokenizer {
    /// As OpenAI's models of the last years do.
    O200k,
    /// One a byte: no tokenizer that works on bytes makes more. Much is set aside, and no prompt can cost more.
    Bytes,
}

/// One entry of the class's allowlist.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressHost {
    /// A host name, or `*.` and a domain.
    pub host: String,
    /// Its ports.
    pub ports: Vec<u16>,
    /// What may go there.
    pub uses: Vec<EgressUse>,
    /// What the gateway adds to calls that go there, by its name: `secret/key`. It is the one that the pack maps to the task's principal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<String>,
    /// Its credentials are for other principals: nothing of this task's goes there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub barred: bool,
}

/// Where things are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Wiring {
    /// Number of the attempt, from 1.
    pub attempt: i64,
    /// `address:port` of the gateway.
    pub gateway: String,
    /// Its certificate authority, PEM.
    pub gateway_ca: String,
    /// What the containment probe dials.
    pub probe: Probe,
}

/// Both controls of the containment probe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Probe {
    /// `address:port` that must answer: the gateway's.
    pub reachable: String,
    /// `address:port` that must not: the canary, the API server. The kubelet of the pod's own node is added by the pod.
    pub unreachable: Vec<String>,
}
