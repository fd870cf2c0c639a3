//! Defines the names that operator, gateway and users share: labels, annotations, finalizer, field managers, fixed objects.

use std::collections::BTreeMap;

/// Label: the task's name.
pub const TASK: &str = "belay.dev/task";
/// Label: the task's UID. Selectors use it, because a deleted task's name can be used again.
pub const TASK_UID: &str = "belay.dev/task-uid";
/// Label: the attempt's number, from 1.
pub const ATTEMPT: &str = "belay.dev/attempt";
/// Label with the value [`MANAGER`], on every object that the operator creates.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// The value of [`MANAGED_BY`].
pub const MANAGER: &str = "belay";
/// Annotation of pods: the digest of the rendered policy.
pub const POLICY_DIGEST: &str = "belay.dev/policy-digest";
/// Annotation of pods: the name and the digest of the NetworkPolicy, as it was read back.
pub const NETWORK_POLICY: &str = "belay.dev/network-policy";
/// Annotation of pods: the digests of the planned spec.
pub const PLAN: &str = "belay.dev/plan";
/// Annotation of tasks: the user who created the task. Admission adds it and keeps it.
pub const REQUESTED_BY: &str = "belay.dev/requested-by";
/// Annotation of NetworkPolicies: where the task's evidence is stored. It is still known if the pack and the status are gone.
pub const EVIDENCE: &str = "belay.dev/evidence";
/// Finalizer that keeps a task until its pod has ended and its evidence is sealed.
pub const FINALIZER: &str = "belay.dev/seal-evidence";
/// The field manager of everything that the operator writes.
pub const FIELD_MANAGER: &str = "belay-operator";
/// The operator's ServiceAccount, and the value of `app.kubernetes.io/name` on its pods.
pub const OPERATOR: &str = "belay-operator";
/// The start of the rejection message of the policy that restricts the operator itself.
pub const OWN_POLICY: &str = "ValidatingAdmissionPolicy 'belay-operator'";
/// The gateway's Service, and the value of `app.kubernetes.io/name` on its pods.
pub const GATEWAY: &str = "belay-gateway";
/// The gateway's TLS port.
pub const GATEWAY_PORT: u16 = 8443;
/// The gateway's canary port. It accepts connections from everywhere, unless a NetworkPolicy blocks them.
pub const CANARY_PORT: u16 = 8444;
/// The name of the webhook's Service and of its ValidatingWebhookConfiguration.
pub const WEBHOOK: &str = "belay-webhook";
/// The container that runs the agent.
pub const AGENT: &str = "agent";
/// The sidecar container that runs the harness.
pub const HARNESS: &str = "harness";
/// The init container that runs the containment probe.
pub const PROBE: &str = "containment-probe";
/// Returns the name of all objects of one attempt: pod, NetworkPolicy, ConfigMap.
pub fn of_attempt(task: &str, attempt: i64) -> String {
    format!("{task}-{attempt}")
}

/// Returns the labels of all objects of one attempt.
pub fn labels(task: &str, uid: &str, attempt: i64) -> BTreeMap<String, String> {
    let mut labels = selector(uid, attempt);
    labels.insert(TASK.to_owned(), task.to_owned());
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    labels
}

/// Returns the labels that select the pod of one attempt and no other.
pub fn selector(uid: &str, attempt: i64) -> BTreeMap<String, String> {
    BTreeMap::from([(TASK_UID.to_owned(), uid.to_owned()), (ATTEMPT.to_owned(), attempt.to_string())])
}
