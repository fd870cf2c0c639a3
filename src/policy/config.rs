//! The rendered configuration: everything that the decisions of a harness depend on, as plain data.
//!
//! The operator renders it from the custom resources into an immutable ConfigMap. The gateway renders it again from its own view of the
//! resources and compares [`PolicyConfig::digest`]. The evidence log stores its bytes. Unknown fields are rejected, so a harness never runs
//! under a rule that it does not understand.
//!
//! A type that derives `JsonSchema` is also a part of a CRD. The comments of its fields are the descriptions in the CRD. It has no
//! `deny_unknown_fields`, because an older operator must read a resource with newer fields. The policy reads it with `strict::read`. A
//! type that looks like a CRD's, but has other defaults, is a type of its own, and says so.
//!
//! Guarantees: equal policies have the same digest, whichever process wrote them.
//! Non-goals: rendering, see `render`, and decisions, see [`decide`](super::decide) and [`access`](super::access).

/// A pack's policy for tool calls.
mod access;
/// The endpoints and prices of models.
mod models;
/// Reads types that the policy shares with a CRD.
pub(crate) mod strict;
/// Tools, as their contracts describe them.
mod tool;

pub use self::{
    access::{Access, AccessRule, DataPattern, Risk, RiskTerm, RuleDecision},
    models::{
        ModelEndpoint, ModelEndpoints, ModelPrice, OutputLimitField, StoreReplies, StreamUsage, Tokenizer,
        UnknownMembers,
    },
    tool::{
        Approval, Compensation, DataClass, HttpMethod, HttpUpstream, Idempotency, McpUpstream, OnTimeout, Precondition,
        Rollback, Tool, ToolLimits, ToolUsage, Upstream, VerifyRead,
    },
};

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::approval::ApprovalSource;
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
    #[serde(default, deserialize_with = "strict::read", skip_serializing_if = "Option::is_none")]
    pub rollback_of: Option<RollbackOf>,
}

/// The task that is rolled back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
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
