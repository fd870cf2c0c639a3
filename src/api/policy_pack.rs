//! `PolicyPack`: what the tasks of an environment may do.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    agent_task::{Limits, Resources},
    readiness::Readiness,
    tool_contract::Approval,
    without_default,
};
use crate::policy::{
    config::{
        AccessRule, DataPattern, EgressUse, OutputLimitField, Risk, SideEffect, StoreReplies, StreamUsage, Tokenizer,
        UnknownMembers,
    },
    model::{api::Family, table::Capability},
};

/// What the tasks of the selected namespaces may do. A namespace that no pack or more than one pack selects runs no tasks.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "belay.dev",
    version = "v1alpha1",
    kind = "PolicyPack",
    shortname = "pp",
    category = "belay",
    status = "Readiness",
    derive = "PartialEq",
    validation = Rule::new("has(self.spec.approval) || !(has(self.spec.rules) && self.spec.rules.exists(rule, rule.decision == 'RequireApproval') || has(self.spec.risk) && has(self.spec.risk.approveAt))").message("approval: say who decides, because a rule or risk.approveAt requires approval"),
    validation = Rule::new("!has(self.spec.approval) || !has(self.spec.approval.when)").message("approval.when: leave it out, because rules and risk say when a call needs approval"),
    doc = "What the tasks of an environment may do, and where their evidence goes.",
    printcolumn(name = "Environment", type_ = "string", json_path = ".spec.environment"),
    printcolumn(name = "Bucket", type_ = "string", json_path = ".spec.evidence.bucket"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.evidence.mode"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct PolicyPackSpec {
    /// The environment's name, such as `dev`, `stage` or `prod`. The evidence of each attempt has it.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub environment: String,
    /// The namespaces that this pack governs.
    pub namespace_selector: LabelSelector,
    /// The workflow classes of the environment.
    #[schemars(length(min = 1, max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub workflow_classes: Vec<WorkflowClass>,
    /// Kinds of work for metrics. A task can name one of them as its `taskClass`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")), extend("x-kubernetes-list-type" = "set"))]
    pub task_classes: Vec<String>,
    /// The model endpoints that serve `/v1/...` calls.
    #[serde(default)]
    pub models: Models,
    /// Patterns that find sensitive data in the arguments and results of tools. A contract's `data` sets the minimum sensitivity.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub classification: Vec<DataPattern>,
    /// Who may call which tools. Without rules, every principal may call what the task's contracts and the class allow. With rules, a call
    /// needs one rule that allows it or requires approval, and no rule that denies it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub rules: Vec<AccessRule>,
    /// The risk score of tool calls, and what follows from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub risk: Option<Risk>,
    /// Who approves calls for which a rule or the risk score requires approval. This is in addition to the approval of the contract. It has
    /// no `when`, because rules and risk decide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Approval>,
    /// Where Belay stores evidence, and for how long.
    pub evidence: EvidencePolicy,
    /// Where Belay stores the arguments of compensations and the results of idempotent calls. Contracts with a `rollback.call` need it.
    /// With it, later attempts get the results of earlier ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<StatePolicy>,
}

/// A bucket for data that must outlive a pod and is not evidence. It holds arguments and results in plain form. Encrypt it, let only the
/// gateway read it, and add a lifecycle rule that expires objects when no rollback or retry needs them. It needs no Object Lock and no
/// default retention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StatePolicy {
    /// The bucket. It has the same S3 endpoint as the evidence bucket.
    #[schemars(length(min = 3, max = 63), regex(pattern = r"^[a-z0-9][a-z0-9.-]+[a-z0-9]$"))]
    pub bucket: String,
    /// A prefix in the bucket, without a slash at its start or its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$"))]
    pub prefix: Option<String>,
}

/// A workflow class.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkflowClass {
    /// The name by which tasks choose the class.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub name: String,
    /// The RuntimeClass of the pods, such as `gvisor`. The cluster's default if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub runtime_class_name: Option<String>,
    /// The hosts that tasks may reach, and their uses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128))]
    pub egress: Vec<EgressRule>,
    /// Seconds that an upstream can be silent, before its reply begins and between two parts of it. 600 if absent, as in the client
    /// libraries of models. A model that does not stream is silent while it thinks. Tools also have the timeouts of their contracts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3600))]
    pub upstream_timeout_seconds: Option<i64>,
    /// Hosts that client libraries call on their own, for telemetry or to detect the cloud: names, `*.` and a domain, or addresses such as
    /// `169.254.169.254`. A connection to them is denied and recorded, but does not count for `limits.denials`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 64),
        inner(length(min = 1, max = 253), regex(pattern = r"^((\*\.)?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+|[0-9a-f:.]*:[0-9a-f:.]*)$")),
        extend("x-kubernetes-list-type" = "set")
    )]
    pub ignored_hosts: Vec<String>,
    /// Side effects that a tool call may have.
    #[schemars(length(min = 1, max = 3), extend("x-kubernetes-list-type" = "set"))]
    pub allowed_effects: Vec<SideEffect>,
    /// The highest limits that a task may ask for.
    pub limits: Limits,
    /// The highest resources of an agent container, and its resources if the task sets none.
    pub resources: Resources,
}

/// One host, or one level of hosts below a domain, and its uses.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("!(has(self.credentials) && 'Direct' in self.uses)").message("a credential is never given to traffic of the agent's own making: drop credentials, or Direct from uses"))]
#[serde(rename_all = "camelCase")]
pub struct EgressRule {
    /// A host name, or `*.` and a domain: exactly one more label.
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^(\*\.)?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+$")
    )]
    pub host: String,
    /// Ports. 443 if absent.
    #[serde(default = "EgressRule::default_ports")]
    #[schemars(transform = without_default, length(min = 1, max = 16), inner(range(min = 1, max = 65535)), extend("x-kubernetes-list-type" = "set"))]
    pub ports: Vec<i32>,
    /// The uses. `Tools` and `Models` are calls that the harness makes. `Direct` is traffic of the agent itself.
    #[schemars(length(min = 1, max = 3), extend("x-kubernetes-list-type" = "set"))]
    pub uses: Vec<EgressUse>,
    /// Headers that the gateway adds, from Secrets that no agent's pod sees. The gateway uses the first one for the task's principal. If
    /// none is for the principal, the calls of its tasks to this host are denied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub credentials: Vec<Credential>,
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
    /// The principals whose tasks use this credential, or prefixes with `*`. All principals if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 253), regex(pattern = r"^[^*]*\*?$")), extend("x-kubernetes-list-type" = "set"))]
    pub principals: Vec<String>,
    /// The Secret's name.
    #[schemars(length(min = 1, max = 253))]
    pub secret: String,
    /// The key in the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
    /// The header to set, in lower case. `authorization` if absent.
    #[serde(default = "Credential::default_header")]
    #[schemars(transform = without_default, length(min = 1, max = 64), regex(pattern = r"^[a-z][a-z0-9-]*$"))]
    pub header: String,
    /// The text before the secret in the header. `Bearer ` if absent.
    #[serde(default = "Credential::default_prefix")]
    #[schemars(transform = without_default, length(max = 32))]
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
    /// The base URL of the API that OpenAI's client libraries speak, as the provider writes it: with or without `/v1`, with or without a
    /// query. Belay adds `/v1` if the base has no version, and appends paths such as `/chat/completions`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 8, max = 2048),
        regex(pattern = r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[^\s#?]*)?(\?[^\s#]*)?$")
    )]
    pub openai: Option<String>,
    /// The base URL of the API that Anthropic's client libraries speak, in the same form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 8, max = 2048),
        regex(pattern = r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[^\s#?]*)?(\?[^\s#]*)?$")
    )]
    pub anthropic: Option<String>,
    /// Endpoints for some models. The first one with a request's API and model comes before the two above.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub endpoints: Vec<ModelEndpoint>,
    /// Prices of models, for tasks with a cost limit. The first entry that matches a model's name counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["model"]))]
    pub prices: Vec<ModelPrice>,
    /// What a request may have a provider do besides answering, by name. Everything else is denied. The cost beyond the prompt and the
    /// output limit is charged when the provider reports it, and not reserved before. See docs/model-requests.md.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "set"))]
    pub allow: Vec<Capability>,
    /// How Belay handles members of requests that it does not know: `Refuse` denies the request. `Pass` forwards them, and the intent
    /// records it.
    #[serde(default, skip_serializing_if = "UnknownMembers::is_refuse")]
    pub unknown_members: UnknownMembers,
    /// Whether providers may store replies, as the Responses API does for a month: `AsWritten` by the agent, or `Never`.
    #[serde(default, skip_serializing_if = "StoreReplies::is_as_written")]
    pub store_replies: StoreReplies,
    /// Whether Belay asks for the usage of streamed chat completions, with `stream_options.include_usage`: `Ask`, or `AsWritten` by the
    /// agent, for providers that reject the member. A stream without a usage costs its full reservation.
    #[serde(default, skip_serializing_if = "StreamUsage::is_ask")]
    pub stream_usage: StreamUsage,
}

/// An endpoint for some models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelEndpoint {
    /// Names of models as requests have them, or prefixes with `*`.
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 253), regex(pattern = r"^[^\s\x00-\x1f*]*\*?$")), extend("x-kubernetes-list-type" = "set"))]
    pub models: Vec<String>,
    /// The API that the endpoint speaks: `openai` or `anthropic`.
    pub api: Family,
    /// The base URL of the endpoint, as the provider writes it.
    #[schemars(
        length(min = 8, max = 2048),
        regex(pattern = r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[^\s#?]*)?(\?[^\s#]*)?$")
    )]
    pub url: String,
    /// What a request may have this provider do besides answering, in addition to what the pack allows for all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "set"))]
    pub allow: Vec<Capability>,
    /// `AsWritten` if this provider rejects `stream_options`. See `streamUsage` of all models.
    #[serde(default, skip_serializing_if = "StreamUsage::is_ask")]
    pub stream_usage: StreamUsage,
}

/// The price of a million tokens of a model, in the pack's currency, and other facts about the model. Set the highest price that a token
/// can have: for writing a cache, for the fastest service tier, for audio. Belay does not count discounts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelPrice {
    /// The name of a model as requests have it, or a prefix with `*`.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[^\s\x00-\x1f*]*\*?$"))]
    pub model: String,
    /// The price of a million tokens of prompt: a decimal such as `1.25`.
    #[schemars(length(min = 1, max = 16), regex(pattern = r"^[0-9]{1,9}(\.[0-9]{1,6})?$"))]
    pub input: String,
    /// The price of a million tokens of reply.
    #[schemars(length(min = 1, max = 16), regex(pattern = r"^[0-9]{1,9}(\.[0-9]{1,6})?$"))]
    pub output: String,
    /// The longest reply of the model, in tokens. A request without a limit gets at most this. 4096 if neither this field nor the catalogue
    /// has a value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub max_output_tokens: Option<i64>,
    /// The highest number of tokens of prompt and reply together, such as vLLM's `--max-model-len`. A request without a limit gets one that
    /// leaves room for its prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub context_tokens: Option<i64>,
    /// The member that limits the reply of a chat completion on the model's server. It overrides the catalogue. If neither has a value, it
    /// is `max_completion_tokens` at OpenAI and Azure, and `max_tokens` elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_limit_field: Option<OutputLimitField>,
    /// How Belay counts the text of a prompt before the call. It overrides the catalogue. `Bytes` reserves much, and no prompt costs more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<Tokenizer>,
}

/// Where Belay stores evidence, and for how long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EvidencePolicy {
    /// A bucket with Object Lock.
    #[schemars(length(min = 3, max = 63), regex(pattern = r"^[a-z0-9][a-z0-9.-]+[a-z0-9]$"))]
    pub bucket: String,
    /// A prefix in the bucket, without a slash at its start or its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$"))]
    pub prefix: Option<String>,
    /// `Compliance`: nobody can delete an object before its date. `Governance`: users with the bypass permission can.
    pub mode: RetentionMode,
    /// Days for which each segment is locked, from when it is written.
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
