//! Makes an attempt's objects, in the order that containment needs.
//!
//! Guarantees: finalizer, ConfigMap and NetworkPolicy are there, and the policy was read back, before the pod is asked for; a pod that
//! is there already is adopted, never made twice; a number that somebody has begun with is not begun with again; what is not as planned
//! about a pod is told at once. Non-goals: to use a namesake's pod, or a policy that is not as planned.

use k8s_openapi::api::{core::v1::Pod, networking::v1::NetworkPolicy};
use kube::ResourceExt;

use super::{
    api::{ApiError, Writer},
    cache::Stores,
};
use crate::{
    api::AgentTask,
    canonical::CanonicalError,
    plan::{
        config_map, intact, names,
        network_policy::{self, Altered, Proof},
        pod,
        validated::{Surroundings, Validated},
    },
};

/// Why an attempt was not made.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A request before the pod's failed: there is certainly no pod.
    #[error(transparent)]
    Before(ApiError),
    /// The pod was refused: there is certainly none.
    #[error(transparent)]
    PodRefused(ApiError),
    /// Nobody knows whether there is a pod.
    #[error(transparent)]
    PodUnknown(ApiError),
    /// The policy is not as planned.
    #[error(transparent)]
    Altered(#[from] Altered),
    /// Somebody has begun with this attempt, and we do not remember it: what we watch is old, or we are new here.
    #[error(
        "expected attempt {number} to be new, found its ConfigMap: it was begun with before, and is looked for at the API server"
    )]
    Begun {
        /// The attempt.
        number: i64,
    },
    /// The configuration has no canonical form.
    #[error(transparent)]
    Canonical(#[from] CanonicalError),
    /// The pod is not the pod that was planned. If it was made, it was told to end.
    #[error(
        "expected the task's pod as it was planned, found that {}; it was changed when it was created, by {by}. Leave it out there: by \
         an objectSelector with {} NotIn ({}), or by a namespaceSelector that does not select namespace `{namespace}`. Until then no \
         pod of this task runs",
        told(differences),
        names::MANAGED_BY,
        names::MANAGER
    )]
    PodAltered {
        /// The namespace.
        namespace: String,
        /// What is not as planned.
        differences: Vec<String>,
        /// Who may have changed it.
        by: String,
    },
    /// Somebody else's pod has the name.
    #[error(
        "expected no Pod `{name}` but this task's, found one of another owner; delete it, or give the task another name"
    )]
    Namesake {
        /// The name.
        name: String,
    },
}

impl ApplyError {
    /// Whether there is certainly no pod of this attempt.
    pub fn leaves_no_pod(&self) -> bool {
        !matches!(self, Self::PodUnknown(_) | Self::Begun { .. })
    }
}

/// What was made.
pub struct Started {
    /// The pod.
    pub pod: Pod,
    /// What is not as planned about it.
    pub differences: Vec<String>,
    /// The task, where the finalizer had to be added.
    pub task: Option<AgentTask>,
}

/// Makes one attempt. `ours`: we have begun with it before, and there is certainly no pod of it.
///
/// # Errors
/// See [`ApplyError`].
pub async fn start(
    writer: &Writer,
    stores: &Stores,
    task: &AgentTask,
    validated: &Validated,
    surroundings: &Surroundings,
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
    // The three do not depend on each other, and the pod depends on all. Each is seen to its end, whatever becomes of the others.
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

/// What would not be as planned about an attempt's pod. Nothing is made: where a pod was changed on its way in, the next is made when
/// that is over.
///
/// # Errors
/// See [`ApplyError`].
pub async fn rehearse(
    writer: &Writer,
    task: &AgentTask,
    validated: &Validated,
    surroundings: &Surroundings,
    number: i64,
) -> Result<Vec<String>, ApplyError> {
    let attempt = validated.attempt(surroundings, number)?;
    let planned = network_policy::build(&attempt);
    // The policy is not there yet, and need not be: nor will the pod be.
    let pod = pod::build(&attempt, &network_policy::prove(&planned, &planned)?);
    match writer.rehearse_pod(&task.namespace().unwrap_or_default(), &pod).await {
        Ok(answer) => Ok(intact::differences(&pod, &answer)),
        // A webhook that cannot be rehearsed with. What it does is seen when the pod is made.
        Err(error) if error.message().contains("does not support dry run") => Ok(Vec::new()),
        Err(error) if error.is_refusal() => Err(ApplyError::PodRefused(error)),
        Err(error) => Err(ApplyError::Before(error)),
    }
}

/// The first differences, and how many more there are.
fn told(differences: &[String]) -> String {
    const SHOWN: usize = 8;
    let more = differences.len().saturating_sub(SHOWN);
    let shown = differences.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join("; ");
    if more == 0 { shown } else { format!("{shown}; and {more} more") }
}

/// Makes the attempt's NetworkPolicy, or makes it again, and reads it back: from the watch, which those that enforce it follow too, or
/// from the API server where the watch is late.
///
/// # Errors
/// If the API server refuses it or does not answer, or what is read back is not as planned.
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
        // There is a pod of that name, or there may be one.
        Err(error) if error.code() == Some(409) || !error.is_refusal() => error,
        Err(error) => return Err(ApplyError::PodRefused(error)),
    };
    match writer.get_pod(namespace, &name).await {
        Ok(Some(live)) if live.labels().get(names::TASK_UID) == task.uid().as_ref() => {
            // It may be of an older plan: it carries its own.
            let altered = intact::altered(&live);
            Ok((live, altered.into_iter().collect()))
        }
        Ok(Some(_)) => Err(ApplyError::Namesake { name }),
        // Refused because of one that has gone since: this request made none.
        Ok(None) if error.code() == Some(409) => Err(ApplyError::PodRefused(error)),
        _ => Err(ApplyError::PodUnknown(error)),
    }
}
