//! Names that operator, gateway and users share: labels, annotations, finalizer, field managers, fixed objects.

use std::collections::BTreeMap;

/// Label: the task's name.
pub const TASK: &str = "belay.dev/task";
/// Label: the task's UID. Selectors use it, because a name can be given again.
pub const TASK_UID: &str = "belay.dev/task-uid";
/// Label: the attempt's number, from 1.
pub const ATTEMPT: &str = "belay.dev/attempt";
/// Label, with the value [`MANAGER`]: everything that the operator made.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// See [`MANAGED_BY`].
pub const MANAGER: &str = "belay";
/// Annotation of pods: digest of the rendered policy.
pub const POLICY_DIGEST: &str = "belay.dev/policy-digest";
/// Annotation of pods: name and digest of the NetworkPolicy, as it was read back.
pub const NETWORK_POLICY: &str = "belay.dev/network-policy";
/// Annotation of pods: digests of their spec as it was planned.
pub const PLAN: &str = "belay.dev/plan";
/// Annotation of tasks: the user who created it. Admission puts it on and keeps it.
pub const REQUESTED_BY: &str = "belay.dev/requested-by";
/// Annotation of NetworkPolicies: where the task's evidence goes, so that it is known even if pack and status are gone.
pub const EVIDENCE: &str = "belay.dev/evidence";
/// Keeps a task until its pod has ended and its evidence is sealed.
pub const FINALIZER: &str = "belay.dev/seal-evidence";
/// Field manager of everything that the operator writes.
pub const FIELD_MANAGER: &str = "belay-operator";
/// The operator's ServiceAccount, and the value of `app.kubernetes.io/name` on its pods.
pub const OPERATOR: &str = "belay-operator";
/// How a refusal begins to tell the policy that bounds what the operator itself may do.
pub const OWN_POLICY: &str = "ValidatingAdmissionPolicy 'belay-operator'";
/// The gateway's Service, and the value of `app.kubernetes.io/name` on its pods.
pub const GATEWAY: &str = "belay-gateway";
/// The gateway's TLS port.
pub const GATEWAY_PORT: u16 = 8443;
/// The gateway's canary port: open to the world, but for the pod's NetworkPolicy.
pub const CANARY_PORT: u16 = 8444;
/// The webhook's Service, and its ValidatingWebhookConfiguration.
pub const WEBHOOK: &str = "belay-webhook";
/// Container that runs the agent.
pub const AGENT: &str = "agent";
/// Sidecar that runs the harness.
pub const HARNESS: &str = "harness";
/// Init container that proves containment.
pub const PROBE: &str = "containment-probe";
/// Name of everything that belongs to one attempt: pod, NetworkPolicy, ConfigMap.
pub fn of_attempt(task: &str, attempt: i64) -> String {
    format!("{task}-{attempt}")
}

/// Labels of everything that belongs to one attempt.
pub fn labels(task: &str, uid: &str, attempt: i64) -> BTreeMap<String, String> {
    let mut labels = selector(uid, attempt);
    labels.insert(TASK.to_owned(), task.to_owned());
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    labels
}

/// Labels that no other pod has.
pub fn selector(uid: &str, attempt: i64) -> BTreeMap<String, String> {
    BTreeMap::from([(TASK_UID.to_owned(), uid.to_owned()), (ATTEMPT.to_owned(), attempt.to_string())])
}
