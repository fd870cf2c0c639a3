//! `ApprovalRequest`: one exact call that waits for people.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::policy::approval::{Approvers, AskedBy, Vote};

/// One exact call that waits for people. The gateway makes it, and nobody changes it; people put their decisions into its status, by
/// `kubectl belay approve` and `deny` or by editing it. It is good for one call, before it expires.
///
/// Who may decide is said by RBAC (ClusterRole `belay-approver`) and by the contract's `approval.approvers`; an admission policy pins
/// each decision to the authenticated user, and refuses those on whose behalf the agent acts and who asked for the task.
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
    doc = "One exact call that waits for people.",
    printcolumn(name = "Task", type_ = "string", json_path = ".spec.task.name"),
    printcolumn(name = "Tool", type_ = "string", json_path = ".spec.tool"),
    printcolumn(name = "Needs", type_ = "integer", json_path = ".spec.required"),
    printcolumn(name = "Decided by", type_ = "string", json_path = ".status.decisions[*].by"),
    printcolumn(name = "Decisions", type_ = "string", json_path = ".status.decisions[*].decision"),
    printcolumn(name = "Expires", type_ = "string", json_path = ".spec.expiresAt"),
    printcolumn(name = "Arguments", type_ = "string", json_path = ".spec.arguments", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.spec == oldSelf.spec").message("spec is immutable: it is what people decide on"),
)]
#[serde(rename_all = "camelCase")]
pub struct ApprovalRequestSpec {
    /// The task whose agent asks.
    pub task: ApprovalTask,
    /// On whose behalf the agent acts. May not decide.
    #[schemars(length(min = 1, max = 253))]
    pub principal: String,
    /// Who asked for the task, where admission recorded it. May not decide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub requester: Option<String>,
    /// On whose account people are asked: the tool's contract's, or the pack's. A call may need both.
    pub requested_by: AskedBy,
    /// Why the pack asks: the rules that require it, the risk and what made it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 129), inner(length(max = 8_192)))]
    pub because: Vec<String>,
    /// The tool, as the agent calls it.
    #[schemars(length(min = 1, max = 128))]
    pub tool: String,
    /// The arguments of the call: RFC 8785 JSON, with `"[redacted]"` where the contract's `redact` points. The gateway sends this call
    /// and no other.
    #[schemars(length(min = 1, max = 65_536))]
    pub arguments: String,
    /// The salted commitment to the arguments as they are sent, hex: the intent in the evidence has the same.
    #[schemars(regex(pattern = r"^[0-9a-f]{64}$"))]
    pub digest: String,
    /// How many calls that were the same have been approved and made before this one.
    #[schemars(range(min = 0))]
    pub repeats: i64,
    /// Who may decide.
    pub approvers: Approvers,
    /// How many of them must approve. One denial is enough to deny.
    #[schemars(range(min = 1, max = 16))]
    pub required: i64,
    /// By when it must be decided and the call made.
    pub expires_at: Time,
}

/// The task whose agent asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApprovalTask {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Its UID.
    #[schemars(length(min = 1, max = 64))]
    pub uid: String,
    /// The attempt that asked first.
    #[schemars(range(min = 1))]
    pub attempt: i64,
}

/// What people decided.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApprovalRequestStatus {
    /// One decision a person. None is changed or taken back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["by"]))]
    pub decisions: Vec<Vote>,
}
