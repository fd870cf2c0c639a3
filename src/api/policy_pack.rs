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
        EgressUse, OutputLimitField, RuleDecision, Sensitivity, SideEffect, StoreReplies, StreamUsage, Tokenizer,
        UnknownMembers,
    },
    model::{api::Family, table::Capability},
};

/// What the tasks of the selected namespaces may do. A namespace that no pack selects, or more than one, runs nothing.
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
    validation = Rule::new("!has(self.spec.approval) || !has(self.spec.approval.when)").message("approval.when: leave it out, because rules and risk say when people are asked"),
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
    /// The environment's name, such as `dev`, `stage` or `prod`. Recorded with every run.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub environment: String,
    /// The namespaces that this pack governs.
    pub namespace_selector: LabelSelector,
    /// The kinds of work that are allowed, each with its own walls.
    #[schemars(length(min = 1, max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub workflow_classes: Vec<WorkflowClass>,
    /// The kinds of work that KPIs are told apart by: labels of metrics, of which a task may name one as its `taskClass`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")), extend("x-kubernetes-list-type" = "set"))]
    pub task_classes: Vec<String>,
    /// The model endpoints that `/v1/...` calls are passed to.
    #[serde(default)]
    pub models: Models,
    /// What tells sensitive data in the arguments and results of tools. What a contract's `data` says is the least that it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub classification: Vec<DataPattern>,
    /// Who may call which tools. Without rules every principal may call what the task's contracts and the class allow. With
    /// rules a call needs one that allows it or requires approval, and none that denies it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub rules: Vec<AccessRule>,
    /// How risky a tool call is, and what follows from that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub risk: Option<Risk>,
    /// Who must say yes to a call where a rule or its risk requires that, besides those whom its contract names. Without `when`: rules
    /// and risk say when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Approval>,
    /// Where evidence goes and how long it stays.
    pub evidence: EvidencePolicy,
    /// Where the arguments of calls that undo others are kept, which contracts with a `rollback.call` need, and the results of idempotent
    /// calls, for later attempts to be given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<StatePolicy>,
}

/// A bucket for what must outlive a pod and is no evidence. It holds arguments and results as they are: encrypt it, let none but the gateway read it,
/// and let a lifecycle rule expire it once nobody would roll back or try again any more. It needs no Object Lock, and no default retention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StatePolicy {
    /// The bucket, at the same S3 endpoint as the evidence.
    #[schemars(length(min = 3, max = 63), regex(pattern = r"^[a-z0-9][a-z0-9.-]+[a-z0-9]$"))]
    pub bucket: String,
    /// A prefix in it, without slashes at its ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$"))]
    pub prefix: Option<String>,
}

/// A pattern that tells sensitive data. It is looked for in each text, number and name of arguments and results, each by itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DataPattern {
    /// Its name.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub name: String,
    /// A regular expression in the syntax of Rust's `regex` crate (as RE2's: neither look-around nor back-references), such as
    /// `\b\d{4}-\d{4}\b`.
    #[schemars(length(min = 1, max = 512))]
    pub pattern: String,
    /// What data is that it is found in.
    pub sensitivity: Sensitivity,
}

/// Who may call what. A rule is for the calls that fit all that it names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccessRule {
    /// Its name, by which the evidence names it.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub name: String,
    /// Principals, or their beginnings and `*`, such as `system:serviceaccount:team-a:*`. All without.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 253), regex(pattern = r"^[^*]*\*?$")), extend("x-kubernetes-list-type" = "set"))]
    pub principals: Vec<String>,
    /// Tools by the names that agents call, or their beginnings and `*`. All without.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9_.-]*\*?$")), extend("x-kubernetes-list-type" = "set"))]
    pub tools: Vec<String>,
    /// Side effects. All without.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 3), extend("x-kubernetes-list-type" = "set"))]
    pub effects: Vec<SideEffect>,
    /// A CEL expression over `args`, `task`, `principal`, `usage`, `tool` (its name), `effect`, and `data`: `data.arguments` is how
    /// sensitive the arguments are, `data.seen` the most sensitive data that the task has handled so far, each `'Unclassified'`,
    /// `'Internal'`, `'Confidential'` or `'Restricted'`. Where it cannot be evaluated the rule is taken against the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 4096))]
    pub when: Option<String>,
    /// What that means. One `Deny` outweighs all else.
    pub decision: RuleDecision,
    /// What the agent is told when the rule denies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub message: Option<String>,
}

/// How risky a tool call is: the sum of the points of all terms that hold. The score, its terms and what followed are recorded.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("has(self.approveAt) || has(self.denyAt)").message("name a score from which calls need approval (approveAt), are denied (denyAt), or both"))]
#[serde(rename_all = "camelCase")]
pub struct Risk {
    /// What counts.
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub terms: Vec<RiskTerm>,
    /// From this score on people are asked, as `approval` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub approve_at: Option<i64>,
    /// From this score on calls are denied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub deny_at: Option<i64>,
}

/// One reason for risk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RiskTerm {
    /// Its name, by which the evidence names it.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub name: String,
    /// A CEL expression over what rules see. The term counts unless it is `false`.
    #[schemars(length(min = 1, max = 4096))]
    pub when: String,
    /// What it adds.
    #[schemars(range(min = 1, max = 10_000))]
    pub points: i64,
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
    /// Seconds that an upstream may be silent, before its reply begins and between two pieces of it: 600 when absent, as the client
    /// libraries of models have it. A model that does not stream is silent as long as it thinks. Tools have their contracts' own times besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3600))]
    pub upstream_timeout_seconds: Option<i64>,
    /// Hosts that client libraries call by themselves, for telemetry or to find the cloud that they are in: names, `*.` and a domain, or addresses
    /// such as `169.254.169.254`. A connection there is denied and recorded like any that is not listed, and does not count towards
    /// `limits.denials`.
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
    /// The most that a task may ask for.
    pub limits: Limits,
    /// The most that an agent container may have, and what it gets when it asks for nothing.
    pub resources: Resources,
}

/// One host, or one level of hosts below a domain, and what it may be used for.
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
    /// Ports, 443 when absent.
    #[serde(default = "EgressRule::default_ports")]
    #[schemars(transform = without_default, length(min = 1, max = 16), inner(range(min = 1, max = 65535)), extend("x-kubernetes-list-type" = "set"))]
    pub ports: Vec<i32>,
    /// What may go there: `Tools` and `Models` are calls that the harness makes; `Direct` is the agent's own traffic.
    #[schemars(length(min = 1, max = 3), extend("x-kubernetes-list-type" = "set"))]
    pub uses: Vec<EgressUse>,
    /// A header that the gateway adds, from a Secret that no pod of the task ever sees: the first that is for the task's principal.
    /// Where none is, nothing of that principal's tasks goes there.
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
    /// Principals whose tasks' calls are made with it, or their beginnings and `*`. All without.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 253), regex(pattern = r"^[^*]*\*?$")), extend("x-kubernetes-list-type" = "set"))]
    pub principals: Vec<String>,
    /// The Secret's name.
    #[schemars(length(min = 1, max = 253))]
    pub secret: String,
    /// The key in it.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
    /// The header to set, lower case; `authorization` when absent.
    #[serde(default = "Credential::default_header")]
    #[schemars(transform = without_default, length(min = 1, max = 64), regex(pattern = r"^[a-z][a-z0-9-]*$"))]
    pub header: String,
    /// What stands before the secret in the header; `Bearer ` when absent.
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
    /// Base URL of the API that OpenAI's client libraries speak, as the provider writes it: with `/v1` or without, with a query or without. `/v1` is
    /// put between where the base has no version, and `/chat/completions` and so on behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 8, max = 2048),
        regex(pattern = r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[^\s#?]*)?(\?[^\s#]*)?$")
    )]
    pub openai: Option<String>,
    /// Base URL of the API that Anthropic's client libraries speak, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 8, max = 2048),
        regex(pattern = r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[^\s#?]*)?(\?[^\s#]*)?$")
    )]
    pub anthropic: Option<String>,
    /// Endpoints for some models. The first that speaks a request's API and fits its model goes before the two above.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub endpoints: Vec<ModelEndpoint>,
    /// What models cost, for tasks whose cost is limited. The first entry that fits a model's name counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["model"]))]
    pub prices: Vec<ModelPrice>,
    /// What providers may be made to do besides answering, by name: each is refused without. What it costs beyond the prompt and the output limit
    /// is charged once the provider accounts for it, and not set aside before. See docs/model-requests.md.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "set"))]
    pub allow: Vec<Capability>,
    /// What becomes of members of requests that Belay does not know: `Refuse`, or `Pass`, which each intent then says.
    #[serde(default, skip_serializing_if = "UnknownMembers::is_refuse")]
    pub unknown_members: UnknownMembers,
    /// Whether providers may keep replies for their caller, as the Responses API does for a month: `AsWritten` by the agent, or `Never`.
    #[serde(default, skip_serializing_if = "StoreReplies::is_as_written")]
    pub store_replies: StoreReplies,
    /// Whether streams of chat completions are asked what they cost, by `stream_options.include_usage`: `Ask`, or `AsWritten` by the agent, for
    /// providers that refuse the member. A stream that gives no account is charged all that was set aside for it.
    #[serde(default, skip_serializing_if = "StreamUsage::is_ask")]
    pub stream_usage: StreamUsage,
}

/// An endpoint for some models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelEndpoint {
    /// Models' names as requests have them, or their beginnings and `*`.
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 253), regex(pattern = r"^[^\s\x00-\x1f*]*\*?$")), extend("x-kubernetes-list-type" = "set"))]
    pub models: Vec<String>,
    /// Whose API it speaks: `openai` or `anthropic`.
    pub api: Family,
    /// Its base URL, as the provider writes it.
    #[schemars(
        length(min = 8, max = 2048),
        regex(pattern = r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[^\s#?]*)?(\?[^\s#]*)?$")
    )]
    pub url: String,
    /// What this provider may be made to do besides answering, besides what the pack allows all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "set"))]
    pub allow: Vec<Capability>,
    /// `AsWritten` where this provider refuses `stream_options`: see `streamUsage` of all models.
    #[serde(default, skip_serializing_if = "StreamUsage::is_ask")]
    pub stream_usage: StreamUsage,
}

/// What a million tokens of a model cost, in the pack's currency unit, and what else Belay does not know of it. Name the highest price that a
/// token can have there: that of writing a cache, of the fastest service tier, of audio. What a provider takes off is not counted.
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
    /// The longest reply that the model gives. A request that names no limit gets at most this; 4096 where neither this nor the shipped catalogue
    /// says anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub max_output_tokens: Option<i64>,
    /// The tokens that prompt and reply may have together, such as vLLM's `--max-model-len`. A request that names no limit gets one that leaves
    /// room for its prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub context_tokens: Option<i64>,
    /// The member by which the model's server limits the reply of a chat completion, in place of the shipped catalogue's word. Where neither says
    /// anything it is `max_completion_tokens` at OpenAI and Azure, and `max_tokens` elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_limit_field: Option<OutputLimitField>,
    /// How the text of a prompt is counted before it leaves, in place of the shipped catalogue's word. `Bytes` sets much aside, and no prompt
    /// costs more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<Tokenizer>,
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
