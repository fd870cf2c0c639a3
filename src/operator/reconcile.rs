//! Reconciles one task: observe, decide, act, report.
//!
//! Guarantees:
//!
//! - A task for which nothing is due causes no request.
//! - The status is written only if it has changed, and never to another task with the same name.
//! - The same error is logged once.
//! - An attempt is ended, a pod deleted, a log sealed or a rollback started only because of state that was read from the API server in the
//!   same reconciliation. If the state cannot be read, nothing is concluded.
//!
//! Non-goals: Actions that are based on a cache alone.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::{ResourceExt, runtime::controller::Action};
use tokio::{sync::watch, time::Instant};
use tracing::Span;

use super::{
    api::{ApiError, Writer},
    apply::ApplyError,
    backoff,
    cache::{GuardedTask, Stores},
    expectations::{EXPECTATION_TTL, Expectations, Memory},
    metrics::Metrics,
    resolve::Resolved,
    status::{self, Progress},
};
use crate::{
    api::{
        AgentTask, AgentTaskStatus,
        agent_task::{Attempt, RollbackWhen},
    },
    contact::Contact,
    ends::FailureClass,
    lifecycle::{
        decide::{self, Decision, Next, Observed, Unread, wait},
        observe::{self, PodView},
    },
    render::{evidence::Location, names, owner::Owner, validated::Installation},
    seal::{Seal, SealError},
};

mod children;
mod clear;
mod monitor;
mod report;
mod seal;
mod seen;
mod start;

pub(super) use seen::Seen;

/// The pause after which a task is reconciled again even if nothing seems to change. It bounds the delay that a missed event causes.
const BACKSTOP: Duration = Duration::from_secs(600);
/// Seconds that a pod may take to start before the status says that it is pending. Most pods start sooner, which saves a write.
const PENDING_AFTER_SECONDS: i64 = 5;

/// Everything that a reconciliation needs.
pub struct Context {
    /// The caches of the cluster's state.
    pub stores: Stores,
    /// What the operator remembers of its own writes.
    pub memories: Arc<Expectations>,
    /// Writes to the API server.
    pub writer: Writer,
    /// The client of the gateway.
    pub gateway: Arc<dyn Seal>,
    /// The settings of the cluster that are the same for every task.
    pub surroundings: watch::Receiver<Option<Installation>>,
    /// The state of the connection to the API server, and the API server's clock.
    pub contact: Arc<Contact>,
    /// The operator's metrics.
    pub metrics: Metrics,
    /// The namespace of operator and gateway.
    pub system_namespace: String,
    /// The endpoint of the object store, for users who verify a log before it is sealed. Absent for AWS.
    pub s3_endpoint: Option<String>,
    /// Treats cached state as if it was just read, as an operator without the guarantees above would do.
    #[cfg(test)]
    pub believes_caches: bool,
}

/// Why a reconciliation was not completed. All of these errors are retried.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// A request failed.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The attempt was not created.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The log was not sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The location of the evidence is not known.
    #[error(
        "expected the place of the task's evidence in its status, on its NetworkPolicies or in the pack of its namespace, found \
         none; restore the PolicyPack"
    )]
    NoEvidenceLocation,
}

impl ReconcileError {
    /// Checks whether the API server did not answer.
    fn is_silence(&self) -> bool {
        let silent = |error: &ApiError| error.code().is_none_or(|code| matches!(code, 502..=504));
        match self {
            Self::Api(error) => silent(error),
            Self::Apply(ApplyError::Before(error) | ApplyError::PodRefused(error) | ApplyError::PodUnknown(error)) => {
                silent(error)
            }
            Self::Apply(_) | Self::Seal(_) | Self::NoEvidenceLocation => false,
        }
    }
}

/// Reconciles a task.
///
/// # Errors
/// See [`ReconcileError`].
#[tracing::instrument(name = "reconcile", skip_all, fields(
    namespace = kube::Resource::meta(&*task).namespace, task = kube::Resource::meta(&*task).name, next, error,
))]
pub async fn reconcile(task: Arc<GuardedTask>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    let begun = Instant::now();
    let uid =
        task.0.as_ref().map_or_else(|invalid| invalid.metadata.uid.clone(), |task| task.uid()).unwrap_or_default();
    let result = match &task.0 {
        Ok(task) => {
            let task = context.memories.newest(Arc::new(task.clone()));
            Reconciliation {
                context: &context,
                owner: Owner::of(&task),
                memory: context.memories.get(&uid),
                failures: BTreeMap::new(),
                now: context.contact.now(),
                task,
            }
            .run()
            .await
        }
        Err(invalid) => report::refuse_unreadable(&context, invalid, &uid).await,
    };
    if let Err(error) = &result {
        Span::current().record("error", tracing::field::display(error));
    }
    let label = if result.is_ok() { "ok" } else { "error" };
    context.metrics.reconciles.with_label_values(&[label]).inc();
    context.metrics.reconcile_seconds.with_label_values(&[label]).observe(begun.elapsed().as_secs_f64());
    if result.is_ok() && !uid.is_empty() && task.0.is_ok() {
        context.memories.reset_errors(&uid);
    }
    result
}

/// Returns when to reconcile again after an error. Logs the error if it differs from the last one.
pub fn after_error(task: &GuardedTask, error: &ReconcileError, context: &Context) -> Action {
    let metadata = kube::Resource::meta(task);
    let text = error.to_string();
    let (errors, known) = context.memories.error(metadata.uid.as_deref().unwrap_or_default(), &text);
    if !known {
        tracing::warn!(namespace = metadata.namespace, task = metadata.name, error = text, "not done yet; tried again");
    }
    Action::requeue(backoff::pause(errors, error.is_silence()))
}

/// One reconciliation.
struct Reconciliation<'a> {
    context: &'a Context,
    task: Arc<AgentTask>,
    owner: Owner,
    memory: Memory,
    /// The number of failed attempts by failure class.
    failures: BTreeMap<String, i64>,
    now: Timestamp,
}

impl Reconciliation<'_> {
    async fn run(&mut self) -> Result<Action, ReconcileError> {
        let mut seen = self.observe();
        let (attempts, next) = loop {
            let Decision { attempts, failures, next } = self.decide(&seen);
            self.failures = failures;
            let Next::Confirm(unread) = next else { break (attempts, next) };
            let Owner { namespace, name, uid } = &self.owner;
            match unread {
                Unread::Pod(attempt) if !seen.looked_up.contains(&attempt) => {
                    let live = self.context.writer.get_pod(namespace, &names::of_attempt(name, attempt)).await?;
                    let live = live.filter(|live| self.owns(live.labels())).as_ref().and_then(observe::pod);
                    seen.look_up(attempt, live.filter(|live| live.attempt == attempt));
                }
                Unread::Task if !seen.live => match self.context.writer.get_task(namespace, name).await? {
                    Some(live) if live.metadata.uid.as_ref() == Some(uid) => {
                        self.task = self.context.memories.newest(Arc::new(live));
                        seen.live = true;
                    }
                    // The task is gone, and its pods are deleted with it. There is nothing to decide.
                    _ => break (Vec::new(), Next::Nothing),
                },
                // What was read in this reconciliation is not old, so nothing is read twice.
                Unread::Pod(_) | Unread::Task => break (attempts, next),
            }
            // The answer also had the current time.
            self.now = self.context.contact.now();
        };
        Span::current().record("next", next.as_str());
        let action = self.act(&seen.pods, attempts, next).await?;
        self.clear(&seen).await?;
        Ok(action)
    }

    /// Returns when to reconcile again even if nothing changes. The pause is short if memory replaces the cache.
    fn backstop(&self) -> Duration {
        let believed = self.memory.pod.as_ref().is_some_and(|(_, made)| made.elapsed() < EXPECTATION_TTL);
        if believed { EXPECTATION_TTL } else { BACKSTOP }
    }

    fn owns(&self, labels: &std::collections::BTreeMap<String, String>) -> bool {
        labels.get(names::TASK_UID) == Some(&self.owner.uid)
    }

    /// Returns an attempt's NetworkPolicy from the cache.
    fn network_policy(&self, attempt: i64) -> Option<NetworkPolicy> {
        let name = names::of_attempt(&self.owner.name, attempt);
        let live = self.context.stores.network_policy(&self.owner.namespace, &name)?;
        live.0.as_ref().ok().filter(|live| self.owns(live.labels())).cloned()
    }

    fn decide(&self, seen: &Seen) -> Decision {
        let status = self.status();
        decide::decide(&Observed {
            uid: &self.owner.uid,
            deleting: self.task.metadata.deletion_timestamp.is_some(),
            finalizer: self.task.finalizers().iter().any(|one| one == names::FINALIZER),
            phase: status.phase,
            sealed: status::is_sealed(&status),
            live: seen.live,
            rolls_back: self.task.spec.rollback == RollbackWhen::OnFailure,
            retry: &self.task.spec.retry,
            wall_time_seconds: self.task.spec.limits.wall_time_seconds,
            history: &status.attempts,
            failures: &status.failures,
            pods: &seen.pods,
            claims: &seen.claims,
            reusable: self.memory.reusable,
            looked_up: &seen.looked_up,
            in_touch_since: if self.believed() { Timestamp::UNIX_EPOCH } else { self.context.contact.since() },
            now: self.now,
        })
    }

    async fn act(&mut self, pods: &[PodView], attempts: Vec<Attempt>, next: Next) -> Result<Action, ReconcileError> {
        let contained = attempts
            .last()
            .and_then(|last| pods.iter().find(|pod| pod.uid == last.pod_uid))
            .and_then(|pod| pod.contained);
        match next {
            Next::Nothing => Ok(Action::await_change()),
            // A confirmation reaches this point only if the object was already read, see `run`.
            Next::Confirm(_) => Ok(Action::requeue(EXPECTATION_TTL)),
            Next::Run { attempt, until } => self.monitor(pods, &attempts, attempt, until, contained).await,
            Next::Pause(until) => {
                let (reason, why) = self.waits_for(pods, &attempts, "Retrying");
                let parked = attempts.last().and_then(|last| last.failure_class) == Some(FailureClass::Dependency);
                let stage = if parked { Progress::Parked(&why) } else { Progress::Waiting(reason, &why) };
                self.report_status(&attempts, contained, stage).await?;
                Ok(Action::requeue(wait(until, self.now)))
            }
            Next::Start(attempt) => self.start(&attempts, contained, attempt).await,
            Next::EndPods(untold) => {
                if self.task.metadata.deletion_timestamp.is_none() {
                    let (reason, why) = self.waits_for(pods, &attempts, "Stopping");
                    self.report_status(&attempts, contained, Progress::Waiting(reason, &why)).await?;
                }
                for (uid, name) in untold {
                    self.context.writer.delete_pod(&self.owner.namespace, &name, &uid).await?;
                }
                Ok(Action::requeue(self.backstop()))
            }
            Next::Seal { attempt, closed, presumed } => {
                self.seal(&attempts, contained, attempt, (closed, presumed)).await
            }
            Next::Release => self.release().await,
        }
    }

    /// Returns the location of the evidence. It is fixed when the task starts, so the oldest source comes first.
    fn location(&self) -> Option<Location> {
        let Owner { namespace, name, uid } = &self.owner;
        let told =
            self.status().evidence.as_ref().and_then(|told| Location::from_log(&told.location, namespace, name, uid));
        let claimed = || {
            let attempts = self.context.stores.with_network_policy.of(uid);
            attempts
                .into_iter()
                .find_map(|attempt| Location::parse(self.network_policy(attempt)?.annotations().get(names::EVIDENCE)?))
        };
        let packed =
            || Resolved::of(&self.task, &self.context.stores).pack().ok().map(|pack| Location::of(&pack.spec.evidence));
        told.or_else(claimed).or_else(packed)
    }

    fn status(&self) -> std::borrow::Cow<'_, AgentTaskStatus> {
        self.task
            .status
            .as_ref()
            .map_or_else(|| std::borrow::Cow::Owned(AgentTaskStatus::default()), std::borrow::Cow::Borrowed)
    }
}
