//! Writes a task's status.
//!
//! Guarantees: the status is written only if it has changed, and never to another task with the same name. That a task cannot be decoded is
//! reported once.
//!
//! Non-goals: the content of the status, see [`status`].

use std::{collections::BTreeMap, sync::Arc};

use kube::{core::error_boundary::InvalidObject, runtime::controller::Action};

use super::{Context, ReconcileError, Reconciliation};
use crate::{
    api::{
        AgentTaskStatus,
        agent_task::{Attempt, EvidenceStatus},
    },
    ends::{FailureClass, POD_ALTERED},
    evidence::note,
    lifecycle::observe::PodView,
    operator::{
        metrics,
        status::{self, Progress, StatusInput},
    },
    render::{Finding, owner::Owner},
};

/// Reports once, in its status, that this version cannot decode a task.
pub(super) async fn refuse_unreadable(
    context: &Context,
    invalid: &InvalidObject,
    uid: &str,
) -> Result<Action, ReconcileError> {
    if context.memories.get(uid).last_error.as_deref() == Some(&invalid.error) {
        return Ok(Action::await_change());
    }
    let finding = [Finding::unreadable("spec", "a task", invalid.error.clone())];
    let metadata = &invalid.metadata;
    let story = StatusInput {
        generation: metadata.generation,
        attempts: &[],
        failures: &BTreeMap::new(),
        contained: None,
        evidence: None,
        stage: Progress::Refused(&finding),
    };
    let status = status::tell(&AgentTaskStatus::default(), &story, context.contact.now());
    let (namespace, name) =
        (metadata.namespace.as_deref().unwrap_or_default(), metadata.name.as_deref().unwrap_or_default());
    match context.writer.apply_status(namespace, name, Some(uid), &status).await {
        // The answer has a task that this version cannot decode either, so only an error status counts as an error.
        Err(error) if error.code().is_some() => return Err(error.into()),
        _ => {}
    }
    context.memories.error(uid, &invalid.error);
    Ok(Action::await_change())
}

impl Reconciliation<'_> {
    /// Returns why a task waits after an attempt. If the last pod was not as planned, that stays the reason until a pod is as planned.
    pub(super) fn waits_for(
        &self,
        pods: &[PodView],
        attempts: &[Attempt],
        otherwise: &'static str,
    ) -> (&'static str, String) {
        let Some(last) = attempts.last().filter(|last| last.reason.as_deref() == Some(POD_ALTERED)) else {
            return (otherwise, ended_message(attempts));
        };
        let status = self.status();
        let told = status.conditions.iter().find(|one| one.type_ == status::COMPLETE && one.reason == POD_ALTERED);
        let seen = pods.iter().find(|pod| pod.uid == last.pod_uid).and_then(|pod| pod.altered.as_deref());
        let seen = seen.map(|what| format!("expected the task's pod as it was planned, found that {what}"));
        let why = told.map(|told| told.message.clone()).or(seen);
        (POD_ALTERED, why.unwrap_or_else(|| ended_message(attempts)))
    }

    pub(super) async fn report_status(
        &mut self,
        attempts: &[Attempt],
        contained: Option<bool>,
        stage: Progress<'_>,
    ) -> Result<(), ReconcileError> {
        // Before the first pod, the location is not fixed.
        let evidence = if attempts.is_empty() || self.status().evidence.is_some() {
            None
        } else {
            let Owner { namespace, name, uid } = &self.owner;
            self.location().map(|location| EvidenceStatus {
                origin: note::origin(uid),
                location: location.of_log(namespace, name, uid),
                endpoint: self.context.s3_endpoint.clone(),
                size: 0,
                root: String::new(),
            })
        };
        self.report_status_with(attempts, contained, stage, evidence).await
    }

    /// Writes the status if it has changed.
    pub(super) async fn report_status_with(
        &mut self,
        attempts: &[Attempt],
        contained: Option<bool>,
        stage: Progress<'_>,
        evidence: Option<EvidenceStatus>,
    ) -> Result<(), ReconcileError> {
        let (generation, failures) = (self.task.metadata.generation, &self.failures);
        let story = StatusInput { generation, attempts, failures, contained, evidence, stage };
        let before = self.status().into_owned();
        let after = status::tell(&before, &story, self.now);
        if !status::changed(&before, &after) {
            return Ok(());
        }
        let Owner { namespace, name, uid } = &self.owner;
        let task = match self.context.writer.apply_status(namespace, name, Some(uid), &after).await {
            Ok(task) => Arc::new(task),
            // The task is gone, so there is no status to write.
            Err(error) if error.code() == Some(404) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let kind = if self.task.spec.rollback_of.is_some() { "rollback" } else { "agent" };
        for class in status::newly_ended(&before, &after) {
            let class = class.map_or("None", FailureClass::name);
            let task_class = metrics::counted_as(&task).unwrap_or_default();
            self.context.metrics.attempts.with_label_values(&[kind, task_class, class]).inc();
        }
        if before.phase != after.phase || before.reason != after.reason {
            tracing::info!(
                namespace,
                task = name,
                phase = after.phase.map(tracing::field::debug),
                reason = after.reason,
                attempt = after.attempt,
                "status changed"
            );
        }
        self.context.memories.update(&self.owner.uid, |memory| memory.latest = Some(task.clone()));
        self.task = task;
        Ok(())
    }
}

pub(super) fn ended_message(attempts: &[Attempt]) -> String {
    attempts.last().map_or_else(String::new, |last| {
        format!("attempt {} ended: {}", last.number, last.reason.as_deref().unwrap_or("unknown"))
    })
}
