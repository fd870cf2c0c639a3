//! Identification of callers: from a token, a TCP peer and the cluster's objects to a caller.
//!
//! Guarantees: [`decide`] runs for every request, on the pods and tasks as they are now. Only the TokenReview behind it is cached
//! ([`reviews`]). A pod is not identified if it is gone, if it is another pod under the same name, if it sends from another address, or if
//! its attempt has been followed by another.
//!
//! Denies: identification by address alone, because the agent shares its harness's address, and by token alone, because a token can be
//! copied.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;

use crate::{
    gateway::refusal::Refused,
    policy::rule::Rule,
    render::{intact, names},
};

/// Reviews of tokens.
pub mod reviews;

/// The result of a TokenReview for the gateway's audience.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reviewed {
    /// `system:serviceaccount:<namespace>:<name>`.
    pub username: String,
    /// The pod that the token is bound to.
    pub pod: Option<BoundPod>,
}

/// The pod that a token is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundPod {
    /// The pod's namespace, which is the ServiceAccount's.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's UID.
    pub uid: String,
}

/// The facts about an attempt's pod that identification needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's UID.
    pub uid: String,
    /// All addresses of the pod.
    pub addresses: Vec<IpAddr>,
    /// Label `belay.dev/task`.
    pub task: String,
    /// Label `belay.dev/task-uid`.
    pub task_uid: String,
    /// Label `belay.dev/attempt`.
    pub attempt: i64,
    /// Whether the pod is being deleted.
    pub ending: bool,
    /// Whether all containers of the pod have ended.
    pub finished: bool,
    /// How the pod differs from its plan, if it does.
    pub altered: Option<String>,
}

/// The facts about a task that identification needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskFacts {
    /// The task's UID.
    pub uid: String,
    /// Whether the task is being deleted.
    pub ending: bool,
    /// Whether the task has succeeded or failed.
    pub finished: bool,
    /// The newest attempt in the task's status or of any of its pods.
    pub newest_attempt: i64,
}

/// What a caller may still do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Everything that its class allows.
    Live,
    /// Finish its log only, because its pod or task is being deleted. No new calls leave.
    Ending,
}

/// An identified harness.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HarnessIdentity {
    /// The task's namespace.
    pub namespace: String,
    /// The task's name.
    pub task: String,
    /// The task's UID.
    pub task_uid: String,
    /// The number of the attempt.
    pub attempt: i64,
    /// The pod's name.
    pub pod: String,
    /// The pod's UID.
    pub pod_uid: String,
    /// What the harness may still do.
    pub standing: Standing,
}

/// A caller that the gateway serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// The operator, which may only seal logs.
    Operator,
    /// The harness of an attempt.
    Harness(HarnessIdentity),
}

/// Returns the facts of an attempt's pod that identification needs, or `None` if the pod lacks one of Belay's labels.
pub(super) fn pod_facts(pod: &Pod) -> Option<PodFacts> {
    let label = |key: &str| pod.metadata.labels.as_ref()?.get(key).cloned();
    let status = pod.status.as_ref();
    let addresses = status
        .and_then(|s| s.pod_ips.as_ref())
        .into_iter()
        .flatten()
        .map(|ip| ip.ip.as_str())
        .chain(status.and_then(|s| s.pod_ip.as_deref()))
        .filter_map(|ip| ip.parse().ok())
        .collect();
    Some(PodFacts {
        namespace: pod.metadata.namespace.clone()?,
        name: pod.metadata.name.clone()?,
        uid: pod.metadata.uid.clone()?,
        addresses,
        task: label(names::TASK)?,
        task_uid: label(names::TASK_UID)?,
        attempt: label(names::ATTEMPT)?.parse().ok().filter(|n| *n >= 1)?,
        ending: pod.metadata.deletion_timestamp.is_some(),
        finished: status.and_then(|s| s.phase.as_deref()).is_some_and(|p| matches!(p, "Succeeded" | "Failed")),
        altered: intact::altered(pod),
    })
}

/// Identifies the bearer of a reviewed token from `peer`. `pod` is the pod that the token is bound to and `task` is that pod's task, if the
/// cluster has them.
///
/// # Errors
/// Returns the first rule that is violated.
pub fn decide(
    reviewed: &Reviewed,
    peer: IpAddr,
    pod: Option<&PodFacts>,
    task: Option<&TaskFacts>,
) -> Result<HarnessIdentity, Refused> {
    let bound = reviewed.pod.as_ref().ok_or_else(|| {
        token(format!(
            "expected a token bound to a pod, found an unbound one of {}; mount it by a projected volume",
            reviewed.username
        ))
    })?;
    let pod = pod.filter(|pod| pod.namespace == bound.namespace && pod.name == bound.name && pod.uid == bound.uid);
    let Some(pod) = pod else {
        return Err(token(format!(
            "the token's pod {}/{} with UID {} does not exist, or is not the pod of an attempt",
            bound.namespace, bound.name, bound.uid
        )));
    };
    if pod.finished {
        return Err(token(format!("the pod {}/{} has ended", pod.namespace, pod.name)));
    }
    // The log of an altered pod is not opened, so its harness does not become ready and its agent does not start.
    if let Some(altered) = &pod.altered {
        return Err(token(format!(
            "expected the pod {}/{} as the operator planned it, found that {altered}",
            pod.namespace, pod.name
        )));
    }
    let peer = peer.to_canonical();
    if !pod.addresses.iter().any(|address| address.to_canonical() == peer) {
        return Err(Refused::denied(
            Rule::IdentitySource,
            format!(
                "the token of pod {}/{} was presented from {peer}, which is not its address",
                pod.namespace, pod.name
            ),
        ));
    }
    let attempt = |reason: String| Refused::denied(Rule::IdentityAttempt, reason);
    let task = task.filter(|task| task.uid == pod.task_uid).ok_or_else(|| {
        attempt(format!("there is no AgentTask {}/{} with UID {}", pod.namespace, pod.task, pod.task_uid))
    })?;
    if pod.attempt < task.newest_attempt {
        return Err(attempt(format!(
            "attempt {} of {}/{} has been followed by attempt {}",
            pod.attempt, pod.namespace, pod.task, task.newest_attempt
        )));
    }
    if task.finished {
        return Err(Refused::denied(Rule::TaskClosed, format!("the task {}/{} has ended", pod.namespace, pod.task)));
    }
    Ok(HarnessIdentity {
        namespace: pod.namespace.clone(),
        task: pod.task.clone(),
        task_uid: pod.task_uid.clone(),
        attempt: pod.attempt,
        pod: pod.name.clone(),
        pod_uid: pod.uid.clone(),
        standing: if pod.ending || task.ending { Standing::Ending } else { Standing::Live },
    })
}

fn token(reason: String) -> Refused {
    Refused::denied(Rule::IdentityToken, reason)
}

impl HarnessIdentity {
    /// Checks whether new calls may leave.
    ///
    /// # Errors
    /// Returns [`Rule::IdentityAttempt`] if the pod or its task is being deleted.
    pub fn may_call(&self) -> Result<(), Refused> {
        match self.standing {
            Standing::Live => Ok(()),
            Standing::Ending => Err(Refused::denied(
                Rule::IdentityAttempt,
                format!("the pod {}/{} or its task is being deleted: no new calls", self.namespace, self.pod),
            )),
        }
    }
}

#[cfg(test)]
mod tests;
