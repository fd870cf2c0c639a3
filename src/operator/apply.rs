//! Creates the objects of an attempt, in the order that isolation needs.
//!
//! Guarantees:
//!
//! - The finalizer, the ConfigMap and the NetworkPolicy exist, and the NetworkPolicy was read back, before the pod is created.
//! - An existing pod is adopted and never created twice.
//! - An attempt number that was started before is not started again.
//! - Differences between a pod and its plan are reported at once.
//!
//! Rejects: A pod with the same name and another owner, and a NetworkPolicy that is not as planned.

use k8s_openapi::api::{core::v1::Pod, networking::v1::NetworkPolicy};
use kube::ResourceExt;

use super::{
    api::{ApiError, Writer},
    cache::Stores,
};
use crate::{
    api::AgentTask,
    canonical::CanonicalError,
    render::{
        config_map, intact, names,
        network_policy::{self, Altered, Proof},
        pod,
        validated::{Installation, Validated},
    },
};

/// Why an attempt was not created.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A request before the creation of the pod failed, so there is certainly no pod.
    #[error(transparent)]
    Before(ApiError),
    /// The API server rejected the pod, so there is certainly no pod.
    #[error(transparent)]
    PodRefused(ApiError),
    /// It is unknown whether there is a pod.
    #[error(transparent)]
    PodUnknown(ApiError),
    /// The NetworkPolicy is not as planned.
    #[error(transparent)]
    Altered(#[from] Altered),
    /// This attempt was started before, and the operator does not remember it: its caches are old, or this process is new.
    #[error(
        "expected attempt {number} to be new, found its ConfigMap: the attempt was started before, and the operator looks for it at the API server"
    )]
    Begun {
        /// The number of the attempt.
        number: i64,
    },
    /// The configuration has no canonical form.
    #[error(transparent)]
    Canonical(#[from] CanonicalError),
    /// The pod is not as planned. If it was created, its deletion was requested.
    #[error(
        "expected the task's pod as it was planned, found that {}; the pod was changed at its creation, by {by}. Exclude such pods there: \
         with an objectSelector with {} NotIn ({}), or with a namespaceSelector that does not select namespace `{namespace}`. Until \
         then no pod of this task runs",
        told(differences),
        names::MANAGED_BY,
        names::MANAGER
    )]
    PodAltered {
        /// The namespace of the pod.
        namespace: String,
        /// How the pod differs from its plan.
        differences: Vec<String>,
        /// The mutating admission that may have changed it.
        by: String,
    },
    /// A pod with another owner has the name.
    #[error(
        "expected no other Pod `{name}` than this task's, found one of another owner; delete the Pod, or give the task another name"
    )]
    Namesake {
        /// The name of the pod.
        name: String,
    },
}

impl ApplyError {
    /// Checks whether there is certainly no pod of this attempt.
    pub fn leaves_no_pod(&self) -> bool {
        !matches!(self, Self::PodUnknown(_) | Self::Begun { .. })
    }
}

/// The result of starting an attempt.
pub struct Started {
    /// The pod.
    pub pod: Pod,
    /// How the pod differs from its plan.
    pub differences: Vec<String>,
    /// The updated task, if the finalizer had to be added.
    pub task: Option<AgentTask>,
}

/// Creates the objects of one attempt. `ours`: this operator started the attempt before, and there is certainly no pod of it.
///
/// # Errors
/// See [`ApplyError`].
pub async fn start(
    writer: &Writer,
    stores: &Stores,
    task: &AgentTask,
    validated: &Validated,
    surroundings: &Installation,
    number: i64,
    ours: bool,
) -> Result<Started, ApplyError> {
    let namespace = task.namespace().unwrap_or_default();
    let attempt = validated.attempt(surroundings, number)?;
    let (config_map, planned) = (config_map::build(&attempt), network_policy::build(&attempt));
    let finalizer = async {
        let present = task.finalizers().iter().any(|one| one == names::FINALIZER);
        if present { Ok(None) } else { writer.set_finalizer(task, true).await.map(Some) }
    };
    // The three requests do not depend on each other, and the pod depends on all of them. Each is completed even if another one fails.
    let (finalizer, config_map, proof) = tokio::join!(
        finalizer,
        writer.create_config_map(&namespace, &config_map),
        wall(writer, stores, &namespace, &planned),
    );
    let task_now = finalizer.map_err(ApplyError::Before)?;
    if !config_map.map_err(ApplyError::Before)? && !ours {
        return Err(ApplyError::Begun { number });
    }
    let (pod, differences) = create(writer, &namespace, &pod::build(&attempt, &proof?), task).await?;
    Ok(Started { pod, differences, task: task_now })
}

/// Returns how an attempt's pod would differ from its plan, by a dry run. Nothing is created. After a pod was changed by admission, the
/// next one is created only when this returns no difference.
///
/// # Errors
/// See [`ApplyError`].
pub async fn rehearse(
    writer: &Writer,
    task: &AgentTask,
    validated: &Validated,
    surroundings: &Installation,
    number: i64,
) -> Result<Vec<String>, ApplyError> {
    let attempt = validated.attempt(surroundings, number)?;
    let planned = network_policy::build(&attempt);
    // The NetworkPolicy does not exist yet. It does not need to, because the dry run creates no pod.
    let pod = pod::build(&attempt, &network_policy::prove(&planned, &planned)?);
    match writer.rehearse_pod(&task.namespace().unwrap_or_default(), &pod).await {
        Ok(answer) => Ok(intact::differences(&pod, &answer)),
        // A webhook does not support dry run. Its changes are found when the pod is created.
        Err(error) if error.message().contains("does not support dry run") => Ok(Vec::new()),
        Err(error) if error.is_refusal() => Err(ApplyError::PodRefused(error)),
        Err(error) => Err(ApplyError::Before(error)),
    }
}

/// Returns the first differences, and the number of the others.
fn told(differences: &[String]) -> String {
    const SHOWN: usize = 8;
    let more = differences.len().saturating_sub(SHOWN);
    let shown = differences.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join("; ");
    if more == 0 { shown } else { format!("{shown}; and {more} more") }
}

/// Creates the attempt's NetworkPolicy, or restores it, and reads it back: from the watch, which the components that enforce it also
/// follow, or from the API server if the watch is late.
///
/// # Errors
/// Returns an error if the API server rejects the NetworkPolicy or does not answer, or if what is read back is not as planned.
pub async fn wall(
    writer: &Writer,
    stores: &Stores,
    namespace: &str,
    planned: &NetworkPolicy,
) -> Result<Proof, ApplyError> {
    let written = writer.apply_network_policy(namespace, planned).await.map_err(ApplyError::Before)?;
    let read_back = match stores.read_back(&written).await {
        Some(shown) => shown,
        None => {
            let name = planned.name_any();
            tracing::info!(namespace, name, "the watch of NetworkPolicies is late; the API server is asked");
            writer.get_network_policy(namespace, &name).await.map_err(ApplyError::Before)?
        }
    };
    Ok(network_policy::prove(planned, &read_back)?)
}

async fn create(
    writer: &Writer,
    namespace: &str,
    pod: &Pod,
    task: &AgentTask,
) -> Result<(Pod, Vec<String>), ApplyError> {
    let name = pod.name_any();
    let error = match writer.create_pod(namespace, pod).await {
        Ok((made, answer)) => return Ok((made, intact::differences(pod, &answer))),
        // There is, or may be, a pod with this name.
        Err(error) if error.code() == Some(409) || !error.is_refusal() => error,
        Err(error) => return Err(ApplyError::PodRefused(error)),
    };
    match writer.get_pod(namespace, &name).await {
        Ok(Some(live)) if live.labels().get(names::TASK_UID) == task.uid().as_ref() => {
            // The pod may have an older plan. It carries the digests of its own plan.
            let altered = intact::altered(&live);
            Ok((live, altered.into_iter().collect()))
        }
        Ok(Some(_)) => Err(ApplyError::Namesake { name }),
        // Rejected because of a pod that is gone by now, so this request created none.
        Ok(None) if error.code() == Some(409) => Err(ApplyError::PodRefused(error)),
        _ => Err(ApplyError::PodUnknown(error)),
    }
}
