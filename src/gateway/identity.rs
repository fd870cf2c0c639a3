//! Who is asking: from a token, a TCP peer and what the cluster says, to a caller.
//!
//! Promises: [`decide`] is made anew for every request, from the pods and tasks as they are now; only the TokenReview
//! behind it is cached ([`reviews`]). A pod that is gone, that is another pod under the same name, that speaks from
//! another address, or that belongs to an attempt which has been followed by another is nobody. Refuses: any identity
//! by address alone, since the agent shares its harness's, and by token alone, since a token can be carried away.

use std::net::IpAddr;

use crate::{gateway::refusal::Refused, policy::rule::Rule};

/// Tokens to reviewed users.
pub mod reviews;

/// What a TokenReview said of a token for our audience.
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
    /// Its namespace: the ServiceAccount's.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
}

/// A pod of an attempt, as far as identity goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Every address that it has.
    pub addresses: Vec<IpAddr>,
    /// Label `belay.dev/task`.
    pub task: String,
    /// Label `belay.dev/task-uid`.
    pub task_uid: String,
    /// Label `belay.dev/attempt`.
    pub attempt: i64,
    /// Whether it has been told to end.
    pub ending: bool,
    /// Whether all of its containers have ended.
    pub finished: bool,
    /// What about it is not as planned.
    pub altered: Option<String>,
}

/// A task, as far as identity goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskFacts {
    /// Its UID.
    pub uid: String,
    /// Whether it is being deleted.
    pub ending: bool,
    /// Whether it has succeeded or failed.
    pub finished: bool,
    /// The newest attempt: in its status, or of any of its pods.
    pub newest_attempt: i64,
}

/// What a caller may still do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// All that its class allows.
    Live,
    /// Its pod or task is being deleted: it may finish its log, and no call leaves any more.
    Ending,
}

/// A harness whose identity holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    /// The task's namespace.
    pub namespace: String,
    /// The task's name.
    pub task: String,
    /// The task's UID.
    pub task_uid: String,
    /// The attempt.
    pub attempt: i64,
    /// The pod's name.
    pub pod: String,
    /// The pod's UID.
    pub pod_uid: String,
    /// What it may still do.
    pub standing: Standing,
}

/// Somebody whom the gateway serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// The operator: it may seal logs, and nothing else.
    Operator,
    /// The harness of an attempt.
    Harness(Principal),
}

/// Decides who a reviewed token from `peer` is. `pod` is the pod that the token is bound to and `task` that pod's task,
/// as far as the cluster has them.
///
/// # Errors
/// By the first rule that does not hold.
pub fn decide(
    reviewed: &Reviewed,
    peer: IpAddr,
    pod: Option<&PodFacts>,
    task: Option<&TaskFacts>,
) -> Result<Principal, Refused> {
    let bound = reviewed.pod.as_ref().ok_or_else(|| {
        token(format!(
            "expected a token bound to a pod, found an unbound one of {}; mount it by a projected volume",
            reviewed.username
        ))
    })?;
    let pod = pod.filter(|pod| pod.namespace == bound.namespace && pod.name == bound.name && pod.uid == bound.uid);
    let Some(pod) = pod else {
        return Err(token(format!(
            "the token's pod {}/{} with UID {} is not there, or is not the pod of an attempt",
            bound.namespace, bound.name, bound.uid
        )));
    };
    if pod.finished {
        return Err(token(format!("the pod {}/{} has ended", pod.namespace, pod.name)));
    }
    // Its log is not opened, so its harness is not ready, so its agent does not start.
    if let Some(altered) = &pod.altered {
        return Err(token(format!(
            "expected the pod {}/{} as it was planned, found that {altered}",
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
    Ok(Principal {
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

impl Principal {
    /// Whether new calls may leave.
    ///
    /// # Errors
    /// [`Rule::IdentityAttempt`] once the pod or its task is being deleted.
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
