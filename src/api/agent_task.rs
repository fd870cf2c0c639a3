//! `AgentTask`: one objective, worked on by one agent image, on somebody's behalf.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::policy::config::{RollbackOf, Usage};

/// That a member of the spec is as it was: there or not, and the same.
macro_rules! same {
    ($member:literal) => {
        concat!(
            "has(self.spec.", $member, ") == has(oldSelf.spec.", $member, ") && ",
            "(!has(self.spec.", $member, ") || self.spec.", $member, " == oldSelf.spec.", $member, ")"
        )
    };
    ($first:literal, $($more:literal),+) => { concat!(same!($first), $(" && ", same!($more)),+) };
}

/// Every member of the spec that decides something, as it was. A member that is not here may be changed: it must not be in what the evidence
/// says of a task.
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

/// What an agent is to do, with what, and within which limits.
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
    /// What the agent is asked to achieve, in words. It reaches the agent as `BELAY_OBJECTIVE`.
    #[schemars(length(min = 1, max = 8192))]
    pub objective: String,

    /// The workflow class, by its name in the PolicyPack that selects this namespace.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub workflow_class: String,

    /// The kind of work, one of the pack's `taskClasses`: KPIs are told apart by it, and expressions read it as `task.taskClass`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub task_class: Option<String>,

    /// On whose behalf the agent acts. An admission policy pins it to the authenticated creator unless that creator may
    /// `impersonate` AgentTasks' principals.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[^\s\x00-\x1f]+$"))]
    pub principal: String,

    /// The agent's container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<Agent>,

    /// In place of an agent: the ended task that this one undoes, by the `rollback` of its contracts. `tools` names the contracts of the
    /// calls that undo. `belay rollback` makes such a task, and so does the operator when a task has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback_of: Option<RollbackOf>,

    /// Whether what the task did is undone when it fails.
    #[serde(default)]
    pub rollback: RollbackWhen,

    /// Names of the ToolContracts in this namespace that the agent may call. Nothing else is callable.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(min = 1, max = 253)), extend("x-kubernetes-list-type" = "set"))]
    pub tools: Vec<String>,

    /// Files that the agent sees and places where it may write. Everything else is read-only.
    #[serde(default)]
    pub workspace: Workspace,

    /// Hard limits. The workflow class has ceilings; a task may only ask for less.
    pub limits: Limits,

    /// How often a failed attempt is tried again.
    #[serde(default)]
    pub retry: Retry,
}

/// When a task is rolled back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RollbackWhen {
    /// When it has failed and made calls whose contracts have a `rollback.call`: the operator makes a task for that.
    #[default]
    OnFailure,
    /// When somebody asks for it, by `belay rollback`.
    OnRequest,
}

/// The agent's container: any image that speaks MCP, an OpenAI- or Anthropic-style API, or HTTP through a proxy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Agent {
    /// Container image. In production name it by digest.
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^[^\s]+$"))]
    pub image: String,
    /// Entrypoint; the image's own when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 4096)))]
    pub command: Vec<String>,
    /// Arguments; the image's own when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 4096)))]
    pub args: Vec<String>,
    /// Plain environment variables. Names that Belay sets itself are refused, and there is no way to name a Secret here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub env: Vec<EnvVar>,
    /// Requests and limits of the agent container; the class's ceiling when absent.
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
    /// Its value, taken as it is: no `$(VAR)` is expanded.
    #[schemars(length(max = 4096))]
    pub value: String,
}

/// Compute resources as Kubernetes quantities. Requests equal limits, so that a task's room is known before it starts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// Processors, such as `500m`.
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
    /// Where the agent may write: empty directories that end with the pod. Nowhere else, `/tmp` and `/dev/shm` included.
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
    /// Size limit as a Kubernetes quantity; the pod is evicted beyond it.
    #[schemars(length(min = 1, max = 16), regex(pattern = r"^[0-9]+(Ki|Mi|Gi)$"))]
    pub size: String,
}

/// Hard limits over the whole task, all attempts together but for wall time, which is each attempt's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// Seconds that one attempt may run.
    #[schemars(range(min = 1, max = 604_800))]
    pub wall_time_seconds: i64,
    /// Tool calls that may be sent.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub tool_calls: i64,
    /// Model tokens, prompt and completion together.
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub tokens: i64,
    /// Refused calls and connections that end the task, with failure class `Policy`. No limit when neither task nor class
    /// names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub denials: Option<i64>,
    /// What model calls may cost by the prices of the pack, in its currency unit: a decimal such as `12.50`. A model without
    /// a price is refused then. No limit when neither task nor class names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16), regex(pattern = r"^[0-9]{1,9}(\.[0-9]{1,6})?$"))]
    pub cost: Option<String>,
    /// Seconds of each attempt that do not count as wall time because a call waited for people's approval; what is more counts. A day
    /// when neither task nor class says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 604_800))]
    pub approval_wait_seconds: Option<i64>,
}

/// Retries by failure class. `Budget` and `Policy` failures are never tried again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Retry {
    /// More attempts after the agent itself failed (class `Agent`).
    #[serde(default)]
    #[schemars(range(min = 0, max = 20))]
    pub agent: i64,
    /// More attempts after the cluster failed it (class `Infrastructure`): eviction, node loss, a deleted pod.
    #[serde(default = "Retry::default_infrastructure")]
    #[schemars(range(min = 0, max = 20))]
    pub infrastructure: i64,
}

impl Retry {
    /// Enough for a drain and a bad node; few enough that a broken cluster shows.
    fn default_infrastructure() -> i64 {
        3
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self { agent: 0, infrastructure: Self::default_infrastructure() }
    }
}

/// What has been seen of the task. The operator writes all of it but `usage`, which is the gateway's.
///
/// Until the operator has looked, its generation is −1, by which `kubectl wait`, Flux and Argo CD know that it has not.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("default" = { "observedGeneration": -1 }))]
pub struct AgentTaskStatus {
    /// Where the task stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// One word for why; a failure's reason once it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub reason: Option<String>,
    /// The generation that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The number of the newest attempt, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<i64>,
    /// The attempts, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub attempts: Vec<Attempt>,
    /// How many attempts have failed, by failure class: of all that there were, not of those alone that `attempts` still has.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub failures: BTreeMap<String, i64>,
    /// What has been used of the limits. Written by the gateway from witnessed evidence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Standard conditions. `Ready` is true once the task has succeeded and its evidence is sealed, for tools that wait for that, and
    /// `Stalled` where nothing but a person helps: it has failed, or is not valid. `Complete` is true for success alone, `Failed` for
    /// failure; `EvidenceSealed` for either end. `Accepted` says whether spec, contracts and pack are in order, `Contained` whether the newest
    /// attempt's pod reaches the gateway and nothing else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Where the evidence lies and the head of its log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<EvidenceStatus>,
    /// The class of the failure, once the task has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_class: Option<FailureClass>,
}

/// Where a task stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Not started: not accepted yet, or waiting for its pod.
    Pending,
    /// An attempt is under way.
    Running,
    /// What every task depends on was away for long: its evidence store or its gateway. It goes on by itself once that is back.
    Parked,
    /// The agent ended well and the evidence is sealed.
    Succeeded,
    /// No attempt is left and the evidence is sealed.
    Failed,
}

/// Every end has one class, and each class one rule for trying again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum FailureClass {
    /// The task asks for what its pack does not give, or its agent did so too often.
    Policy,
    /// Eviction, preemption, node lost, image pull, containment unproven.
    Infrastructure,
    /// The evidence store or the gateway was away for long. The task is parked, and tried again without end.
    Dependency,
    /// The agent exited non-zero or ran out of memory.
    Agent,
    /// Wall time.
    Budget,
    /// The task was deleted before it ended.
    Cancelled,
    /// How it ended is not known: the clock says one thing, the log another or nothing. A person looks at it and decides.
    Unknown,
}

/// One attempt: one pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Attempt {
    /// From 1.
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
    /// When its end was seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// The class of its failure; absent while it runs and when it succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_class: Option<FailureClass>,
    /// One word for how it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub reason: Option<String>,
    /// Nobody has seen how its agent ended: class and reason follow from the clock, or from the pod being gone. What the pod itself says
    /// replaces them, and the log is asked before they are sealed.
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
    /// Endpoint of the object store; absent for AWS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub endpoint: Option<String>,
    /// Records in the sealed log; 0 until it is sealed.
    pub size: i64,
    /// Root hash of the sealed log, base64; empty until it is sealed.
    #[schemars(length(max = 64))]
    pub root: String,
}
