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

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::{
    api::{core::v1::Namespace, networking::v1::NetworkPolicy},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    ResourceExt,
    core::{PartialObjectMeta, error_boundary::InvalidObject},
    runtime::{controller::Action, reflector::ObjectRef},
};
use tokio::{sync::watch, time::Instant};
use tracing::Span;

use super::{
    api::{ApiError, Writer},
    apply::{self, ApplyError},
    backoff,
    cache::{GuardedTask, Stores},
    expectations::{EXPECTATION_TTL, Expectations, Memory},
    injectors,
    metrics::Metrics,
    resolve::Resolved,
    status::{self, Progress, StatusInput},
};
use crate::{
    api::{
        AgentTask, AgentTaskStatus, ToolContract,
        agent_task::{Attempt, EvidenceStatus, FailureClass, Phase, RollbackWhen},
    },
    contact::Contact,
    evidence::{note, record::TaskClosed},
    lifecycle::{
        decide::{self, Decision, Next, Observed, Unread, later, wait},
        observe::{self, POD_ALTERED, PodView},
    },
    render::{Finding, evidence::Location, names, network_policy, owner::Owner, rollback, validated::Installation},
    seal::{Seal, SealError},
    wire::SealRequest,
};

/// The pause after which a task is reconciled again even if nothing seems to change. It bounds the delay that a missed event causes.
const BACKSTOP: Duration = Duration::from_secs(600);
/// The pause after which a task that waits for another task is reconciled again.
const SOON: Duration = Duration::from_secs(2);
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
        Err(invalid) => refuse_unreadable(&context, invalid, &uid).await,
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

/// Reports once, in its status, that this version cannot decode a task.
async fn refuse_unreadable(context: &Context, invalid: &InvalidObject, uid: &str) -> Result<Action, ReconcileError> {
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

/// The observed state of a task in one reconciliation.
pub(super) struct Seen {
    pub(super) pods: Vec<PodView>,
    /// The attempts that have a NetworkPolicy.
    pub(super) claims: Vec<i64>,
    /// The attempts whose pod was looked up in this reconciliation.
    pub(super) looked_up: BTreeSet<i64>,
    /// Whether the task was read in this reconciliation.
    pub(super) live: bool,
}

impl Seen {
    /// Records the result of looking up the attempt's pod: this pod, or none.
    pub(super) fn look_up(&mut self, attempt: i64, live: Option<PodView>) {
        self.looked_up.insert(attempt);
        // Any other pod that the cache has for this attempt is outdated. The last status of a deleted pod is kept.
        self.pods
            .retain(|pod| pod.attempt != attempt || pod.live && live.as_ref().is_none_or(|live| live.uid != pod.uid));
        self.pods.extend(live.map(|live| PodView { live: true, ..live }));
    }
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

    /// Deletes the objects of attempts that are over: the ConfigMap and NetworkPolicy of each attempt before the newest one in the status,
    /// and of all attempts once the task has ended. Also deletes the pods of parked attempts, because there may be thousands of them. The
    /// ConfigMap and NetworkPolicy of the newest attempt keep its number in use until a status has a higher one.
    async fn clear(&self, seen: &Seen) -> Result<(), ReconcileError> {
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

    /// Returns the task's pods and the attempts that have a NetworkPolicy, as far as they are known without a request.
    fn observe(&self) -> Seen {
        let stores = &self.context.stores;
        let recent = |made: Instant| made.elapsed() < EXPECTATION_TTL;
        let remembered = self.memory.pod.as_ref().filter(|(_, made)| recent(*made)).map(|(pod, _)| pod.clone());
        let claimed = self.memory.claim.filter(|(_, made)| recent(*made)).map(|(attempt, _)| attempt);
        let pod = |attempt| {
            let live = stores.pod(&self.owner.namespace, &names::of_attempt(&self.owner.name, attempt))?;
            live.0.as_ref().ok().filter(|live| self.owns(live.labels())).and_then(observe::pod)
        };
        let mut pods: Vec<_> = stores.with_pod.of(&self.owner.uid).into_iter().filter_map(pod).collect();
        let mut claims = stores.with_network_policy.of(&self.owner.uid);
        claims.retain(|attempt| self.network_policy(*attempt).is_some());
        claims.extend(claimed);
        for pod in remembered.into_iter().chain(self.memory.gone.clone()) {
            if pods.iter().all(|known| known.uid != pod.uid) {
                pods.push(pod);
            }
        }
        #[cfg(test)]
        if self.context.believes_caches {
            pods.iter_mut().for_each(|pod| pod.live = true);
        }
        Seen { pods, claims: claims.into_iter().collect(), looked_up: BTreeSet::new(), live: self.believed() }
    }

    #[cfg(test)]
    fn believed(&self) -> bool {
        self.context.believes_caches
    }

    #[cfg(not(test))]
    fn believed(&self) -> bool {
        false
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

    /// Handles a running attempt: keeps its NetworkPolicy in place and updates the status.
    async fn monitor(
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
        let stage = match pod.and_then(|pod| pod.stuck.as_ref()) {
            _ if running => Progress::Running,
            Some(stuck) => Progress::Waiting(stuck.reason, ""),
            None => Progress::Waiting("PodStarting", ""),
        };
        let again =
            [until, due].into_iter().flatten().min().map_or(BACKSTOP, |at| wait(at, self.now)).min(self.backstop());
        if running || told || due.is_none() || attempts.len() > 1 {
            self.report_status(attempts, contained, stage).await?;
        }
        Ok(Action::requeue(again))
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

    async fn start(
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
                self.altered(attempt, vec![format!("the API server refuses what became of it ({})", refusal.message())])
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

    /// Returns why a task waits after an attempt. If the last pod was not as planned, that stays the reason until a pod is as planned.
    fn waits_for(&self, pods: &[PodView], attempts: &[Attempt], otherwise: &'static str) -> (&'static str, String) {
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

    /// Returns a message if the task that this rollback rolls back still runs. A task that is gone has ended, and its log shows how.
    fn undone_runs(&self) -> Option<String> {
        let of = self.task.spec.rollback_of.as_ref()?;
        let live = self.context.stores.tasks.get(&ObjectRef::new(&of.name).within(&self.owner.namespace))?;
        let live = live.0.as_ref().ok().filter(|live| live.uid().as_ref() == Some(&of.uid))?;
        let phase = live.status.as_ref().and_then(|status| status.phase);
        let over = matches!(phase, Some(Phase::Succeeded | Phase::Failed));
        (!over).then(|| {
            format!("expected task `{}` to have ended, found that it has not; this one begins after it", of.name)
        })
    }

    /// Creates the rollback task of this task if it has failed and there is something to roll back.
    async fn roll_back(&self, closed: &TaskClosed, by: Option<BTreeSet<String>>) -> Result<(), ReconcileError> {
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

    async fn seal(
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
        self.roll_back(&closed, reply.undone_by).await?;
        let evidence = EvidenceStatus {
            origin: reply.origin,
            location: reply.location,
            endpoint: reply.endpoint,
            size: i64::try_from(reply.size).unwrap_or(i64::MAX),
            root: reply.root,
        };
        self.report_status_with(attempts, contained, Progress::Ended(&closed, reply.refused), Some(evidence)).await?;
        Ok(Action::await_change())
    }

    async fn release(&self) -> Result<Action, ReconcileError> {
        match self.context.writer.set_finalizer(&self.task, false).await {
            Err(error) if error.code() == Some(404) => {}
            other => drop(other?),
        }
        self.context.memories.forget(&self.owner.uid);
        Ok(Action::await_change())
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

    async fn report_status(
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
    async fn report_status_with(
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
            let class = class.map_or("None", decide::class_name);
            let task_class = super::metrics::counted_as(&task).unwrap_or_default();
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

fn ended_message(attempts: &[Attempt]) -> String {
    attempts.last().map_or_else(String::new, |last| {
        format!("attempt {} ended: {}", last.number, last.reason.as_deref().unwrap_or("unknown"))
    })
}
