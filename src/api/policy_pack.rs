//! `PolicyPack`: what the tasks of an environment may do.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::agent_task::{Limits, Resources};
use crate::policy::config::{EgressUse, SideEffect};

/// What the tasks of the selected namespaces may do. A namespace that no pack selects, or more than one, runs nothing.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "belay.dev",
    version = "v1alpha1",
    kind = "PolicyPack",
    shortname = "pp",
    category = "belay",
    derive = "PartialEq",
    doc = "What the tasks of an environment may do, and where their evidence goes.",
    printcolumn(name = "Environment", type_ = "string", json_path = ".spec.environment"),
    printcolumn(name = "Bucket", type_ = "string", json_path = ".spec.evidence.bucket"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.evidence.mode"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct PolicyPackSpec {
    /// The environment's name, such as `dev`, `stage` or `prod`. Recorded with every run.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub environment: String,
    /// The namespaces that this pack governs.
    pub namespace_selector: LabelSelector,
    /// The kinds of work that are allowed, each with its own walls.
    #[schemars(length(min = 1, max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub workflow_classes: Vec<WorkflowClass>,
    /// The model endpoints that `/v1/...` calls are passed to.
    #[serde(default)]
    pub models: Models,
    /// Where evidence goes and how long it stays.
    pub evidence: EvidencePolicy,
}

/// One kind of work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkflowClass {
    /// Tasks choose the class by this name.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub name: String,
    /// The RuntimeClass of the pods, such as `gvisor`. The cluster's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub runtime_class_name: Option<String>,
    /// Hosts that may be reached at all, and for what.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128))]
    pub egress: Vec<EgressRule>,
    /// Side effects that a tool call may have.
    #[schemars(length(min = 1, max = 3), extend("x-kubernetes-list-type" = "set"))]
    pub allowed_effects: Vec<SideEffect>,
    /// The most that a task may ask for.
    pub limits: Limits,
    /// The most that an agent container may have, and what it gets when it asks for nothing.
    pub resources: Resources,
}

/// One host, or one level of hosts below a domain, and what it may be used for.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("!(has(self.credential) && 'Direct' in self.uses)").message("a credential is never given to traffic of the agent's own making: drop credential, or Direct from uses"))]
#[serde(rename_all = "camelCase")]
pub struct EgressRule {
    /// A host name, or `*.` and a domain: exactly one more label.
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^(\*\.)?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+$")
    )]
    pub host: String,
    /// Ports, 443 when absent.
    #[serde(default = "EgressRule::default_ports")]
    #[schemars(length(min = 1, max = 16), inner(range(min = 1, max = 65535)), extend("x-kubernetes-list-type" = "set"))]
    pub ports: Vec<i32>,
    /// What may go there: `Tools` and `Models` are calls that the harness makes; `Direct` is the agent's own traffic.
    #[schemars(length(min = 1, max = 3), extend("x-kubernetes-list-type" = "set"))]
    pub uses: Vec<EgressUse>,
    /// A header that the gateway adds, from a Secret that no pod of the task ever sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<Credential>,
}

impl EgressRule {
    fn default_ports() -> Vec<i32> {
        vec![443]
    }
}

/// A header made from a Secret of the system namespace that carries the label `belay.dev/upstream-credential: "true"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Credential {
    /// The Secret's name.
    #[schemars(length(min = 1, max = 253))]
    pub secret: String,
    /// The key in it.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
    /// The header to set, lower case.
    #[serde(default = "Credential::default_header")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[a-z][a-z0-9-]*$"))]
    pub header: String,
    /// What stands before the secret in the header.
    #[serde(default = "Credential::default_prefix")]
    #[schemars(length(max = 32))]
    pub prefix: String,
}

impl Credential {
    fn default_header() -> String {
        "authorization".into()
    }
    fn default_prefix() -> String {
        "Bearer ".into()
    }
}

/// Model endpoints, by the API that they speak.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Models {
    /// Base URL for `/v1/chat/completions` and `/v1/responses`; `/v1/...` is appended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 8, max = 2048), regex(pattern = r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[^\s#?]*)?$"))]
    pub openai: Option<String>,
    /// Base URL for `/v1/messages`; `/v1/...` is appended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 8, max = 2048), regex(pattern = r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[^\s#?]*)?$"))]
    pub anthropic: Option<String>,
    /// What models cost, for tasks whose cost is limited. The first entry that fits a model's name counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["model"]))]
    pub prices: Vec<ModelPrice>,
}

/// What a million tokens of a model cost, in the pack's currency unit. Name the highest price that a token can have there:
/// that of writing a cache, of the fastest service tier, of audio. What a provider takes off is not counted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelPrice {
    /// A model's name as requests have it, or its beginning and `*`.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[^\s\x00-\x1f*]*\*?$"))]
    pub model: String,
    /// Of a million tokens of prompt: a decimal such as `1.25`.
    #[schemars(length(min = 1, max = 16), regex(pattern = r"^[0-9]{1,9}(\.[0-9]{1,6})?$"))]
    pub input: String,
    /// Of a million tokens of reply.
    #[schemars(length(min = 1, max = 16), regex(pattern = r"^[0-9]{1,9}(\.[0-9]{1,6})?$"))]
    pub output: String,
}

/// Where evidence goes and how long it stays.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EvidencePolicy {
    /// A bucket with Object Lock.
    #[schemars(length(min = 3, max = 63), regex(pattern = r"^[a-z0-9][a-z0-9.-]+[a-z0-9]$"))]
    pub bucket: String,
    /// A prefix in it, without slashes at its ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$"))]
    pub prefix: Option<String>,
    /// `Compliance`: nobody can delete before the date. `Governance`: those with the bypass permission can.
    pub mode: RetentionMode,
    /// Days from the writing of a segment.
    #[schemars(range(min = 1, max = 36_500))]
    pub retention_days: i64,
}

/// S3 Object Lock's two modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RetentionMode {
    /// Nobody can delete or shorten.
    Compliance,
    /// Holders of `s3:BypassGovernanceRetention` can.
    Governance,
}
