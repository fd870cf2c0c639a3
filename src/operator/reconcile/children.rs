//! The tasks that follow from a task: its rollback.
//!
//! Guarantees: a rollback is created only for a task that has failed in a known way and asks for it, and it begins only after that task has
//! ended.
//!
//! Non-goals: the plan of the rollback, which the harness makes from the log.

use std::collections::BTreeSet;

use kube::{ResourceExt, runtime::reflector::ObjectRef};

use super::{ReconcileError, Reconciliation};
use crate::{
    api::{
        ToolContract,
        agent_task::{Phase, RollbackWhen},
    },
    evidence::record::TaskClosed,
    render::{names, rollback},
};

impl Reconciliation<'_> {
    /// Returns a message if the task that this rollback rolls back still runs. A task that is gone has ended, and its log shows how.
    pub(super) fn undone_runs(&self) -> Option<String> {
        let of = self.task.spec.rollback_of.as_ref()?;
        let live = self.context.stores.tasks.get(&ObjectRef::new(&of.name).within(&self.owner.namespace))?;
        let live = live.0.as_ref().ok().filter(|live| live.uid().as_ref() == Some(&of.uid))?;
        let phase = live.status.as_ref().and_then(|status| status.phase);
        let over = matches!(phase, Some(Phase::Succeeded | Phase::Failed));
        (!over).then(|| {
            format!("expected task `{}` to have ended, found that it has not; this task starts after its end", of.name)
        })
    }

    /// Creates the rollback task of this task if it has failed and there is something to roll back.
    pub(super) async fn roll_back(
        &self,
        closed: &TaskClosed,
        by: Option<BTreeSet<String>>,
    ) -> Result<(), ReconcileError> {
        if !closed.has_failed() || self.task.spec.rollback != RollbackWhen::OnFailure {
            return Ok(());
        }
        let contracts = self.context.stores.contracts.state();
        let contracts: Vec<&ToolContract> = contracts.iter().filter_map(|one| one.0.as_ref().ok()).collect();
        let operator = format!("system:serviceaccount:{}:{}", self.context.system_namespace, names::OPERATOR);
        // If the gateway could not compute the compensations in time, use the contracts as they are now.
        let by = by.unwrap_or_else(|| rollback::contracts(&self.task, &contracts));
        let task = rollback::task(&self.task, by, &contracts, &self.task.spec.principal, &operator);
        let Some(task) = task else { return Ok(()) };
        let (namespace, name, by) = (&self.owner.namespace, &self.owner.name, task.name_any());
        match self.context.writer.create_task(&task).await {
            Ok(()) => tracing::info!(namespace, task = name, by, "a task that undoes this one is made"),
            // The task ends anyway. An administrator must find out who uses the name, or why the task was rejected.
            Err(error) if error.is_refusal() && error.code() != Some(429) => {
                tracing::error!(namespace, task = name, by, %error, "no task could be made that undoes this one");
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}
