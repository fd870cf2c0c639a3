//! `ApprovalRequest`: one exact call that waits for approval.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::policy::approval::{ApprovalSource, Approvers, Vote};

/// One exact call that waits for approval. The gateway creates it, and nobody can change its spec. Approvers write their decisions into its
/// status, with `kubectl belay approve` and `deny` or by editing it. It is valid for one call, until it expires.
///
/// RBAC (ClusterRole `belay-approver`) and the contract's `approval.approvers` say who may decide. Admission binds each decision to the
/// authenticated user. It rejects decisions of the task's principal and of the user who asked for the task.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "belay.dev",
    version = "v1alpha1",
    kind = "ApprovalRequest",
    namespaced,
    shortname = "apr",
    category = "belay",
    status = "ApprovalRequestStatus",
    derive = "PartialEq",
    doc = "One exact call that waits for approval.",
    printcolumn(name = "Task", type_ = "string", json_path = ".spec.task.name"),
    printcolumn(name = "Tool", type_ = "string", json_path = ".spec.tool"),
    printcolumn(name = "Needs", type_ = "integer", json_path = ".spec.required"),
    printcolumn(name = "Decided by", type_ = "string", json_path = ".status.decisions[*].by"),
    printcolumn(name = "Decisions", type_ = "string", json_path = ".status.decisions[*].decision"),
    printcolumn(name = "Expires", type_ = "string", json_path = ".spec.expiresAt"),
    printcolumn(name = "Arguments", type_ = "string", json_path = ".spec.arguments", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.spec == oldSelf.spec").message("spec is immutable: approvers decide on it"),
)]
#[serde(rename_all = "camelCase")]
pub struct ApprovalRequestSpec {
    /// The task whose agent made the call.
    pub task: ApprovalTask,
    /// The task's principal. It cannot approve.
    #[schemars(length(min = 1, max = 253))]
    pub principal: String,
    /// The user who asked for the task, if admission recorded it. This user cannot approve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub requester: Option<String>,
    /// Which policy requires the approval: the tool's contract or the pack. A call can need both.
    pub requested_by: ApprovalSource,
    /// Why the pack requires approval: the rules that require it, the risk score and its terms.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 129), inner(length(max = 8_192)))]
    pub reasons: Vec<String>,
    /// The tool, as the agent calls it.
    #[schemars(length(min = 1, max = 128))]
    pub tool: String,
    /// The arguments of the call, as RFC 8785 JSON. Arguments in the contract's `redact` are `"[redacted]"`. The gateway sends this call
    /// and no other.
    #[schemars(length(min = 1, max = 65_536))]
    pub arguments: String,
    /// The salted commitment to the arguments as they are sent, in hex. The intent in the evidence has the same.
    #[schemars(regex(pattern = r"^[0-9a-f]{64}$"))]
    pub commitment: String,
    /// The number of identical calls that were approved and made before this one.
    #[schemars(range(min = 0))]
    pub repeats: i64,
    /// Who may decide.
    pub approvers: Approvers,
    /// The number of approvals that the call needs. One denial denies the call.
    #[schemars(range(min = 1, max = 16))]
    pub required: i64,
    /// The time by which approvers must decide and the call must be made.
    pub expires_at: Time,
}

/// The task whose agent made the call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApprovalTask {
    /// The name of the task.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// The UID of the task.
    #[schemars(length(min = 1, max = 64))]
    pub uid: String,
    /// The attempt that made the call first.
    #[schemars(range(min = 1))]
    pub attempt: i64,
}

/// The decisions of the approvers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApprovalRequestStatus {
    /// One decision for each approver. Nobody can change or withdraw a decision.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["by"]))]
    pub decisions: Vec<Vote>,
}
