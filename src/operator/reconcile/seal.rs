//! Ends a task: has its log sealed, and releases a task that is deleted.
//!
//! Guarantees: the status has the task's end only after the log was sealed. The log has precedence over what the operator saw.
//!
//! Non-goals: the seal itself, which the gateway makes.

use kube::runtime::controller::Action;

use super::{ReconcileError, Reconciliation};
use crate::{
    api::agent_task::{Attempt, EvidenceStatus},
    evidence::record::TaskClosed,
    operator::status::Progress,
    render::{evidence::Location, owner::Owner},
    wire::SealRequest,
};

impl Reconciliation<'_> {
    pub(super) async fn seal(
        &mut self,
        attempts: &[Attempt],
        contained: Option<bool>,
        attempt: i64,
        (closed, presumed): (TaskClosed, bool),
    ) -> Result<Action, ReconcileError> {
        let sealed = match self.location() {
            Some(Location { bucket, prefix }) => {
                let Owner { namespace, name, uid } = self.owner.clone();
                let closed = closed.clone();
                let request = SealRequest { namespace, name, uid, attempt, bucket, prefix, closed, presumed };
                self.context.gateway.seal(&request).await.map_err(ReconcileError::from)
            }
            None => Err(ReconcileError::NoEvidenceLocation),
        };
        let reply = match sealed {
            Ok(reply) => reply,
            Err(error) => {
                let why = error.to_string();
                self.report_status(attempts, contained, Progress::Sealing(&closed, &why)).await?;
                return Err(error);
            }
        };
        if self.task.metadata.deletion_timestamp.is_some() {
            return self.release().await;
        }
        // The log has precedence: it may have been sealed before with another end, or it may not confirm a presumed end.
        let closed = match reply.closed {
            Some(sealed) => sealed,
            None if presumed => closed.unknown(),
            None => closed,
        };
        self.roll_back(&closed, reply.compensation_commitment).await?;
        let evidence = EvidenceStatus {
            origin: reply.origin,
            location: reply.location,
            endpoint: reply.endpoint,
            size: i64::try_from(reply.size).unwrap_or(i64::MAX),
            root: reply.root,
        };
        self.report_status_with(attempts, contained, Progress::Ended(&closed, reply.denied), Some(evidence)).await?;
        Ok(Action::await_change())
    }

    pub(super) async fn release(&self) -> Result<Action, ReconcileError> {
        match self.context.writer.set_finalizer(&self.task, false).await {
            Err(error) if error.code() == Some(404) => {}
            other => drop(other?),
        }
        self.context.memories.forget(&self.owner.uid);
        Ok(Action::await_change())
    }
}
