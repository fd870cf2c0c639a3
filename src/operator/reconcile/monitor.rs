//! Handles a running attempt.
//!
//! Guarantees: the attempt's NetworkPolicy is created again if it was deleted or changed while its pod lives.
//!
//! Non-goals: the end of the attempt, which [`decide`](crate::lifecycle::decide) finds.

use jiff::Timestamp;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::runtime::controller::Action;

use super::{BACKSTOP, PENDING_AFTER_SECONDS, ReconcileError, Reconciliation};
use crate::{
    api::agent_task::Attempt,
    lifecycle::{
        decide::{later, wait},
        observe::PodView,
    },
    operator::{
        apply, approvals,
        expectations::EXPECTATION_TTL,
        status::{self, Progress},
    },
    render::network_policy,
};

impl Reconciliation<'_> {
    /// Handles a running attempt: keeps its NetworkPolicy in place and updates the status.
    pub(super) async fn monitor(
        &mut self,
        pods: &[PodView],
        attempts: &[Attempt],
        attempt: i64,
        until: Option<Timestamp>,
        contained: Option<bool>,
    ) -> Result<Action, ReconcileError> {
        self.ensure_network_policy(attempt).await?;
        let pod = attempts.last().and_then(|last| pods.iter().find(|pod| pod.uid == last.pod_uid));
        let running = pod.is_some_and(|pod| pod.agent_started.is_some());
        let told = self.status().attempts.iter().any(|one| one.number == attempt);
        let due = later(pod.and_then(|pod| pod.created), PENDING_AFTER_SECONDS).filter(|due| *due > self.now);
        let approval = self.approval(running);
        let stage = match pod.and_then(|pod| pod.stuck.as_ref()) {
            _ if running => approval.message.as_deref().map_or(Progress::Running, Progress::Undecided),
            Some(stuck) => Progress::Waiting(stuck.reason, ""),
            None => Progress::Waiting("PodStarting", ""),
        };
        let again = [until, due, approval.until]
            .into_iter()
            .flatten()
            .min()
            .map_or(BACKSTOP, |at| wait(at, self.now))
            .min(self.backstop());
        if running || told || due.is_none() || attempts.len() > 1 {
            let said = status::undecided(&self.status()).map(str::to_owned);
            self.report_status(attempts, contained, stage).await?;
            if said != approval.message {
                self.context.memories.update(&self.owner.uid, |memory| memory.approvals_told = Some(self.now));
            }
        }
        Ok(Action::requeue(again))
    }

    /// Returns what the status of a task says about its undecided ApprovalRequests. They matter only while the agent runs.
    fn approval(&self, running: bool) -> approvals::Report {
        if !running {
            return approvals::Report { message: None, until: None };
        }
        let requests = self.context.stores.approvals.of(&self.owner.uid);
        approvals::report(&requests, status::undecided(&self.status()), self.memory.approvals_told, self.now)
    }

    /// Creates the attempt's NetworkPolicy again if it was deleted or changed.
    async fn ensure_network_policy(&self, attempt: i64) -> Result<(), ReconcileError> {
        let system_namespace = &self.context.system_namespace;
        let live = self.network_policy(attempt);
        let intact = |live: &NetworkPolicy| network_policy::is_intact(live, &self.owner.uid, attempt, system_namespace);
        let just_made = self.memory.claim.is_some_and(|(made, at)| made == attempt && at.elapsed() < EXPECTATION_TTL);
        if live.as_ref().is_some_and(intact) || live.is_none() && just_made {
            return Ok(());
        }
        let location = self.location().ok_or(ReconcileError::NoEvidenceLocation)?;
        let planned = network_policy::rebuild(&self.owner, attempt, system_namespace, &location);
        tracing::warn!(
            namespace = self.owner.namespace,
            task = self.owner.name,
            attempt,
            "the NetworkPolicy was deleted or changed while its pod lives; it is made again"
        );
        apply::wall(&self.context.writer, &self.context.stores, &self.owner.namespace, &planned).await?;
        self.context.metrics.policies_restored.inc();
        Ok(())
    }
}
