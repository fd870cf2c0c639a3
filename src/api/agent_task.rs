//! `AgentTask`: one objective, which one agent works on for one principal.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    ends::FailureClass,
    policy::config::{RollbackOf, Usage},
};

/// The CEL expression that is true if a field of the spec has not changed: it is present or absent as before, and its value is the same.
macro_rules! same {
    ($member:literal) => {
        concat!(
            "has(self.spec.", $member, ") == has(oldSelf.spec.", $member, ") && ",
            "(!has(self.spec.", $member, ") || self.spec.", $member, " == oldSelf.spec.", $member, ")"
        )
    };
    ($first:literal, $($more:literal),+) => { concat!(same!($first), $(" && ", same!($more)),+) };
}

/// The CEL expression that is true if no field of the spec that decides something has changed. A field that is not listed here stays
/// mutable, so the evidence of a task must not depend on it.
const IMMUTABLE: &str = same!(
    "objective",
    "workflowClass",
    "taskClass",
    "principal",
    "agent",
    "rollbackOf",
    "rollback",
    "tools",
    "workspace",
    "limits",
    "retry"
);

/// What an agent does, which tools it can use, and within which limits.
///
/// Immutable: evidence refers to the spec by its digest, and a change would rewrite history. Apply a new task instead.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "belay.dev",
    version = "v1alpha1",
    kind = "AgentTask",
    namespaced,
    shortname = "at",
    category = "belay",
    status = "AgentTaskStatus",
    derive = "PartialEq",
    doc = "One objective, worked on by one agent in a sandboxed pod, within hard limits, with evidence.",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Class", type_ = "string", json_path = ".spec.workflowClass"),
    printcolumn(name = "Attempt", type_ = "integer", json_path = ".status.attempt"),
    printcolumn(name = "Calls", type_ = "integer", json_path = ".status.usage.toolCalls"),
    printcolumn(name = "Tokens", type_ = "integer", json_path = ".status.usage.tokens"),
    printcolumn(name = "Denied", type_ = "integer", json_path = ".status.usage.denials"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new(IMMUTABLE).message("spec is immutable: evidence refers to it by digest; delete this task or apply one with another name"),
    validation = Rule::new("has(self.spec.agent) != has(self.spec.rollbackOf)").message("set exactly one of spec.agent and spec.rollbackOf"),
    validation = Rule::new("self.metadata.name.size() <= 52 && self.metadata.name.matches('^[a-z0-9]([a-z0-9-]*[a-z0-9])?$')").message("metadata.name must be at most 52 lower-case letters, digits and dashes, because pods are named after it"),
)]
#[serde(rename_all = "camelCase")]
pub struct AgentTaskSpec {
    /// The goal of the agent, in words. The agent gets it as `BELAY_OBJECTIVE`.
    #[schemars(length(min = 1, max = 8192))]
    pub objective: String,

    /// The name of a workflow class in the PolicyPack that selects this namespace.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub workflow_class: String,

    /// The kind of work, one of the pack's `taskClasses`. It is a label of metrics, and expressions read it as `task.taskClass`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub task_class: Option<String>,

    /// The user or team on whose behalf the agent acts. Admission requires that it is the authenticated creator, unless the creator may
    /// `impersonate` the principals of AgentTasks.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[^\s\x00-\x1f]+$"))]
    pub principal: String,

    /// The agent's container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<Agent>,

    /// In place of an agent: the ended task that this task rolls back, by the `rollback` of its contracts. `tools` names the contracts of
    /// the compensations. `belay rollback` creates such a task. The operator creates one when a task has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback_of: Option<RollbackOf>,

    /// Whether the task is rolled back when it fails.
    #[serde(default)]
    pub rollback: RollbackWhen,

    /// Names of the ToolContracts in this namespace whose tools the agent may call. It can call no other tool.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(min = 1, max = 253)), extend("x-kubernetes-list-type" = "set"))]
    pub tools: Vec<String>,

    /// Files that the agent sees, and directories that it may write to. Everything else is read-only.
    #[serde(default)]
    pub workspace: Workspace,

    /// Hard limits. The workflow class sets the highest values; a task can only ask for less.
    pub limits: Limits,

    /// How often Belay retries a failed attempt.
    #[serde(default)]
    pub retry: Retry,
}

/// When a task is rolled back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RollbackWhen {
    /// When it failed after calls whose contracts have a `rollback.call`. The operator creates a rollback task.
    #[default]
    OnFailure,
    /// On request, with `belay rollback`.
    OnRequest,
}

/// The agent's container: any image that speaks MCP, an OpenAI- or Anthropic-style API, or HTTP through a proxy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Agent {
    /// The container image. In production, name it by its digest. `belay run` does not pull it: there, any name will do.
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^[^\s]+$"))]
    pub image: String,
    /// The entrypoint. The image's own if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 4096)))]
    pub command: Vec<String>,
    /// The arguments. The image's own if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 4096)))]
    pub args: Vec<String>,
    /// Environment variables with plain values. Belay rejects names that it sets itself. A variable cannot refer to a Secret.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub env: Vec<EnvVar>,
    /// Requests and limits of the agent container. The class's highest values if absent.
    #[serde(default)]
    pub resources: Resources,
}

/// One environment variable.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EnvVar {
    /// A C identifier.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z_][A-Za-z0-9_]*$"))]
    pub name: String,
    /// The value, as written. `$(VAR)` is not expanded.
    #[schemars(length(max = 4096))]
    pub value: String,
}

/// Compute resources as Kubernetes quantities. Requests equal limits, so the resources of a task are known before it starts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// CPU, such as `500m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16), regex(pattern = r"^[0-9]+(\.[0-9]{1,3})?m?$"))]
    pub cpu: Option<String>,
    /// Memory, such as `512Mi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16), regex(pattern = r"^[0-9]+(Ki|Mi|Gi|Ti|k|M|G|T)?$"))]
    pub memory: Option<String>,
    /// Ephemeral storage: logs and the write scopes together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16), regex(pattern = r"^[0-9]+(Ki|Mi|Gi|Ti|k|M|G|T)?$"))]
    pub ephemeral_storage: Option<String>,
}

/// The agent's file system beyond its read-only image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Workspace {
    /// Read-only mounts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub mounts: Vec<Mount>,
    /// Empty directories that the agent may write to. They end with the pod. The agent cannot write elsewhere, not even to `/tmp` and
    /// `/dev/shm`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub write_scopes: Vec<WriteScope>,
}

/// A read-only mount of one object of the task's namespace.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("has(self.configMap) != has(self.secret)").message("set exactly one of configMap and secret"))]
#[serde(rename_all = "camelCase")]
pub struct Mount {
    /// Absolute path in the agent container.
    #[schemars(length(min = 2, max = 255), regex(pattern = r"^(/[A-Za-z0-9_.-]+)+$"))]
    pub path: String,
    /// Name of a ConfigMap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub config_map: Option<String>,
    /// Name of a Secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub secret: Option<String>,
}

/// A directory in which the agent may write.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WriteScope {
    /// Absolute path in the agent container.
    #[schemars(length(min = 2, max = 255), regex(pattern = r"^(/[A-Za-z0-9_.-]+)+$"))]
    pub path: String,
    /// The size limit, as a Kubernetes quantity. The kubelet evicts a pod that exceeds it.
    #[schemars(length(min = 1, max = 16), regex(pattern = r"^[0-9]+(Ki|Mi|Gi)$"))]
    pub size: String,
}

/// Hard limits for the whole task, across all attempts. The wall time is for each attempt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// Seconds that one attempt can run.
    #[schemars(range(min = 1, max = 604_800))]
    pub wall_time_seconds: i64,
    /// The number of tool calls.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub tool_calls: i64,
    /// The number of tokens of model calls, prompts and replies together.
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub tokens: i64,
    /// The number of denials that ends the task, with failure class `Policy`. No limit if neither the task nor the class sets one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub denials: Option<i64>,
    /// The cost of model calls by the prices of the pack, in its currency: a decimal such as `12.50`. With this limit, calls of a model
    /// without a price are denied. No limit if neither the task nor the class sets one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16), regex(pattern = r"^[0-9]{1,9}(\.[0-9]{1,6})?$"))]
    pub cost: Option<String>,
    /// Seconds for each attempt during which the wall time stops while a call waits for approval. Longer waits count as wall time. One day
    /// if neither the task nor the class sets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 604_800))]
    pub approval_wait_seconds: Option<i64>,
}

/// Retries by failure class. Belay never retries `Budget` and `Policy` failures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Retry {
    /// Retries after a failure of the agent (class `Agent`).
    #[serde(default)]
    #[schemars(range(min = 0, max = 20))]
    pub agent: i64,
    /// Retries after a failure of the cluster (class `Infrastructure`): eviction, a lost node, a deleted pod.
    #[serde(default = "Retry::default_infrastructure")]
    #[schemars(range(min = 0, max = 20))]
    pub infrastructure: i64,
}

impl Retry {
    /// Three retries are enough for a drain and a bad node, and few enough that a broken cluster becomes visible.
    fn default_infrastructure() -> i64 {
        3
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self { agent: 0, infrastructure: Self::default_infrastructure() }
    }
}

/// The observed state of the task. The gateway writes `usage`. The operator writes all other fields.
///
/// Until the operator has processed the task, `observedGeneration` is -1. `kubectl wait`, Flux and Argo CD wait for a later one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("default" = { "observedGeneration": -1 }))]
pub struct AgentTaskStatus {
    /// The phase of the task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// The reason for the phase, in one word. After a failure, the reason of the failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub reason: Option<String>,
    /// The generation that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The number of the newest attempt, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<i64>,
    /// The attempts, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub attempts: Vec<Attempt>,
    /// The number of failed attempts by failure class. It counts all attempts, also those that `attempts` no longer has.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub failures: BTreeMap<String, i64>,
    /// What the task has used of its limits. The gateway writes it from witnessed evidence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Standard conditions. `Ready` is true if the task has succeeded and its evidence is sealed. Tools that wait for a task use it.
    /// `Stalled` is present if only a person can help: the task has failed or is not valid. `Complete` is true if the task has succeeded,
    /// `Failed` if it has failed, and `EvidenceSealed` if its evidence is sealed after either. `Accepted` says whether spec, contracts and
    /// pack are valid together. `Contained` says whether the pod of the newest attempt reaches the gateway and nothing else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The location of the evidence, and the head of its log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<EvidenceStatus>,
    /// The failure class, if the task has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_class: Option<FailureClass>,
}

/// Where a task stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Not started: the task is not accepted yet, or waits for its pod.
    Pending,
    /// An attempt is running.
    Running,
    /// The evidence bucket or the gateway has been unavailable for long. The task continues by itself when it is available again.
    Parked,
    /// The agent succeeded, and the evidence is sealed.
    Succeeded,
    /// No retry is left, and the evidence is sealed.
    Failed,
}

/// One attempt: one pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Attempt {
    /// The number of the attempt, from 1.
    pub number: i64,
    /// The pod's name.
    #[schemars(length(max = 253))]
    pub pod: String,
    /// The pod's UID.
    #[schemars(length(max = 64))]
    pub pod_uid: String,
    /// When the pod was created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When the operator saw the end of the attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// The failure class. Absent while the attempt runs and if it succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_class: Option<FailureClass>,
    /// The reason of the end, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub reason: Option<String>,
    /// No component saw the end of the agent. Class and reason follow from the clock, or from the missing pod. What the pod itself reports
    /// replaces them. Belay compares them with the log before it seals it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub presumed: bool,
}

/// The head of the task's evidence log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EvidenceStatus {
    /// The log's origin line.
    #[schemars(length(max = 256))]
    pub origin: String,
    /// `s3://bucket/prefix` of the log.
    #[schemars(length(max = 1024))]
    pub location: String,
    /// The endpoint of the object store. Absent for AWS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub endpoint: Option<String>,
    /// The number of records in the sealed log. 0 until the log is sealed.
    pub size: i64,
    /// The root hash of the sealed log, in base64. Empty until the log is sealed.
    #[schemars(length(max = 64))]
    pub root: String,
}
