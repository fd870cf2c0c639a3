//! Deletes the objects of attempts that are over.
//!
//! Guarantees: the NetworkPolicy of an attempt is deleted only when its pod has ended or is gone. A task that is deleted loses nothing
//! here, because garbage collection deletes its objects.
//!
//! Non-goals: the pod of an attempt that has ended by itself. Its logs stay, unless the attempt was parked.

use kube::ResourceExt;

use super::{ReconcileError, Reconciliation, Seen};
use crate::{
    ends::FailureClass,
    lifecycle::observe::{self, PodView},
    operator::status,
    render::{names, owner::Owner},
};

impl Reconciliation<'_> {
    /// Deletes the objects of attempts that are over: the ConfigMap and NetworkPolicy of each attempt before the newest one in the status,
    /// and of all attempts once the task has ended. Also deletes the pods of parked attempts, because there may be thousands of them. The
    /// ConfigMap and NetworkPolicy of the newest attempt keep its number in use until a status has a higher one.
    pub(super) async fn clear(&self, seen: &Seen) -> Result<(), ReconcileError> {
        if self.task.metadata.deletion_timestamp.is_some() {
            return Ok(());
        }
        let (status, writer) = (self.status(), &self.context.writer);
        let Some(newest) = status.attempts.last().map(|newest| newest.number) else { return Ok(()) };
        let over = |attempt: i64| attempt < newest || status::has_ended(&status);
        let Owner { namespace, name, .. } = &self.owner;
        for attempt in seen.claims.iter().copied().filter(|attempt| over(*attempt)) {
            let Some(policy) = self.network_policy(attempt) else { continue };
            let pod = seen.pods.iter().find(|pod| pod.attempt == attempt);
            if pod.is_some_and(|pod| !pod.terminal) {
                continue;
            }
            let name = names::of_attempt(name, attempt);
            // The ConfigMap is deleted first. Without it, a pod that was requested long ago and is created only now cannot start.
            writer.delete_config_map(namespace, &name, &self.owner.uid).await?;
            if pod.is_none() {
                let live = writer.get_pod(namespace, &name).await?;
                let live = live.filter(|live| self.owns(live.labels())).as_ref().and_then(observe::pod);
                if live.is_some_and(|live| !live.terminal) {
                    continue;
                }
            }
            writer.delete_network_policy(namespace, &name, &policy.uid().unwrap_or_default()).await?;
        }
        let parked = |pod: &&PodView| {
            let mut attempts = status.attempts.iter().filter(|attempt| attempt.pod_uid == pod.uid);
            attempts.any(|attempt| attempt.number < newest && attempt.failure_class == Some(FailureClass::Dependency))
        };
        for pod in seen.pods.iter().filter(|pod| pod.terminal && !pod.deleting).filter(parked) {
            writer.delete_pod(namespace, &pod.name, &pod.uid).await?;
        }
        Ok(())
    }
}
