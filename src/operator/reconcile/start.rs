//! Starts an attempt: its ConfigMap, its NetworkPolicy and its pod.
//!
//! Guarantees: an attempt starts only if the task is valid by its pack and its contracts, and only after the status has the end of the
//! attempt before it. A pod that admission changed is deleted before its containers have started, and the next attempt
//! waits until its pod would be as planned.
//!
//! Non-goals: the requests themselves, see [`apply`]; the decision that an attempt is due.

use std::{sync::Arc, time::Duration};

use k8s_openapi::{api::core::v1::Namespace, apimachinery::pkg::apis::meta::v1::Time};
use kube::{
    ResourceExt,
    core::PartialObjectMeta,
    runtime::{controller::Action, reflector::ObjectRef},
};
use tokio::time::Instant;

use super::{BACKSTOP, Context, PENDING_AFTER_SECONDS, ReconcileError, Reconciliation, report::ended_message};
use crate::{
    api::agent_task::Attempt,
    ends::{FailureClass, POD_ALTERED},
    lifecycle::observe::{self, PodView},
    operator::{
        apply::{self, ApplyError},
        injectors,
        resolve::Resolved,
        status::Progress,
    },
    render::{names, owner::Owner},
};

/// The pause after which a task that waits for another task is reconciled again.
const SOON: Duration = Duration::from_secs(2);

impl Reconciliation<'_> {
    pub(super) async fn start(
        &mut self,
        attempts: &[Attempt],
        contained: Option<bool>,
        attempt: i64,
    ) -> Result<Action, ReconcileError> {
        if let Some(why) = self.undone_runs() {
            self.report_status(attempts, contained, Progress::Waiting("UndoneTaskRuns", &why)).await?;
            return Ok(Action::requeue(SOON));
        }
        let resolved = Resolved::of(&self.task, &self.context.stores);
        let validated = match resolved.validate(&self.task, &self.context.system_namespace) {
            Ok(validated) => validated,
            Err(findings) => {
                self.report_status(attempts, contained, Progress::Refused(&findings)).await?;
                return Ok(Action::requeue(BACKSTOP));
            }
        };
        let surroundings = self.context.surroundings.borrow().clone();
        let Some(surroundings) = surroundings else {
            let why = format!(
                "expected Service `{}` with a cluster address in namespace `{}`, found none; install the gateway",
                names::GATEWAY,
                self.context.system_namespace
            );
            self.report_status(attempts, contained, Progress::Waiting("GatewayAbsent", &why)).await?;
            return Ok(Action::requeue(BACKSTOP));
        };
        let refused_before = attempts.last().and_then(|last| last.reason.as_deref()) == Some(POD_ALTERED);
        if refused_before {
            let rehearsed = apply::rehearse(&self.context.writer, &self.task, &validated, &surroundings, attempt).await;
            let differences = match rehearsed {
                Ok(differences) => differences,
                Err(error) => return self.not_made(attempts, contained, attempt, error).await,
            };
            if !differences.is_empty() {
                let error = self.altered(attempt, differences).await;
                return self.not_made(attempts, contained, attempt, error).await;
            }
        }
        if !attempts.is_empty() {
            // Record the end of the previous attempt before the next one starts.
            let why = ended_message(attempts);
            self.report_status(attempts, contained, Progress::Waiting("Retrying", &why)).await?;
        }
        let memories = &self.context.memories;
        memories.update(&self.owner.uid, |memory| {
            memory.claim = Some((attempt, Instant::now()));
            memory.reusable = Some(attempt);
        });
        let Context { writer, stores, .. } = self.context;
        let ours = self.memory.reusable == Some(attempt);
        match apply::start(writer, stores, &self.task, &validated, &surroundings, attempt, ours).await {
            Ok(started) if !started.differences.is_empty() => self.refuse(attempts, contained, attempt, started).await,
            Ok(started) => {
                let first_seen = memories.update(&self.owner.uid, |memory| {
                    memory.reusable = None;
                    memory.pod = observe::pod(&started.pod).map(|pod| (pod, Instant::now()));
                    if let Some(task) = started.task {
                        memory.latest = Some(Arc::new(task));
                    }
                    memory.first_seen.take()
                });
                if let Some(first_seen) = first_seen.filter(|_| attempt == 1) {
                    self.context.metrics.apply_to_pod.observe(first_seen.elapsed().as_secs_f64());
                }
                Ok(Action::requeue(Duration::from_secs(PENDING_AFTER_SECONDS.unsigned_abs())))
            }
            Err(error) => {
                if !error.leaves_no_pod() {
                    memories.update(&self.owner.uid, |memory| memory.reusable = None);
                }
                self.not_made(attempts, contained, attempt, error).await
            }
        }
    }

    /// Reports why no attempt was created, if the API server or a mutating admission is the reason.
    async fn not_made(
        &mut self,
        attempts: &[Attempt],
        contained: Option<bool>,
        attempt: i64,
        error: ApplyError,
    ) -> Result<Action, ReconcileError> {
        let error = match error {
            // The policy admits pods as they are planned. It rejected this pod as mutating admission had changed it.
            ApplyError::PodRefused(refusal) if refusal.message().contains(names::OWN_POLICY) => {
                self.altered(
                    attempt,
                    vec![format!("the API server rejects the pod after these changes ({})", refusal.message())],
                )
                .await
            }
            error => error,
        };
        let told = match &error {
            ApplyError::PodRefused(refusal) => Some(("PodRefused", refusal.message())),
            ApplyError::PodAltered { .. } => Some((POD_ALTERED, error.to_string())),
            _ => None,
        };
        if let Some((reason, why)) = told {
            self.report_status(attempts, contained, Progress::Waiting(reason, &why)).await?;
        }
        Err(error.into())
    }

    /// Deletes a pod that admission changed, before its containers have started. The failed attempt is not a failure of the task. The next
    /// attempt waits until its pod would be as planned.
    async fn refuse(
        &mut self,
        attempts: &[Attempt],
        contained: Option<bool>,
        number: i64,
        started: apply::Started,
    ) -> Result<Action, ReconcileError> {
        let (name, uid) = (started.pod.name_any(), started.pod.uid().unwrap_or_default());
        let deleted = self.context.writer.delete_pod(&self.owner.namespace, &name, &uid).await;
        let (what, deleting) = (started.differences.join("; "), deleted.is_ok());
        self.context.memories.update(&self.owner.uid, |memory| {
            memory.reusable = None;
            memory.pod = observe::pod(&started.pod)
                .map(|pod| (PodView { altered: Some(what), deleting, ..pod }, Instant::now()));
            if let Some(task) = started.task {
                memory.latest = Some(Arc::new(task));
            }
        });
        self.task = self.context.memories.newest(self.task.clone());
        let mut attempts = attempts.to_vec();
        attempts.push(Attempt {
            number,
            pod: name,
            pod_uid: uid,
            started_at: started.pod.creation_timestamp(),
            finished_at: Some(Time(self.now)),
            failure_class: Some(FailureClass::Infrastructure),
            reason: Some(POD_ALTERED.to_owned()),
            presumed: false,
        });
        let error = self.altered(number, started.differences).await;
        let refused = self.not_made(&attempts, contained, number, error).await;
        deleted?;
        refused
    }

    /// Returns the error about an attempt's pod that is not as planned, with the mutating admission that may have changed it.
    async fn altered(&self, attempt: i64, differences: Vec<String>) -> ApplyError {
        let Owner { namespace, name, uid } = &self.owner;
        let labels = |namespace: &PartialObjectMeta<Namespace>| namespace.labels().clone();
        let of_namespace = self.context.stores.namespaces.get(&ObjectRef::new(namespace)).map(|one| labels(&one));
        let of_pod = names::labels(name, uid, attempt);
        let by = injectors::of_pod(&self.context.writer, &of_namespace.unwrap_or_default(), &of_pod).await;
        ApplyError::PodAltered { namespace: namespace.clone(), differences, by }
    }
}
