//! The compiled policy of a task: what the task may do now, and where its evidence and its state are stored.
//!
//! Guarantees: a policy is rendered by the same function as the operator's, from the newest task, contracts and pack. It is compiled again
//! when one of them changes.
//!
//! Non-goals: finding these objects ([`cluster`](super::cluster)), and decisions by the policy ([`authorize`](super::authorize)).

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use moka::{
    ops::compute::{CompResult, Op},
    sync::Cache as Map,
};

use super::{recent::recent, state::SaltLocation, witness::LogLocation};
use crate::{
    api::{
        AgentTask, PolicyPack, ToolContract,
        policy_pack::{Credential, EvidencePolicy, RetentionMode, StatePolicy},
    },
    evidence::store::{Location, Mode, Retention, log_prefix},
    policy::{
        access::AccessPolicy,
        config::{PolicyConfig, RollbackOf},
        decide::Contracts,
        redact::Redactor,
    },
    render,
};

/// Maximum number of compiled policies in memory.
const COMPILED: usize = 4096;

/// The compiled policy of a task: what it may do now.
pub struct Compiled {
    /// The policy, as the operator renders it.
    pub policy: PolicyConfig,
    /// Its digest.
    pub digest: String,
    /// Its contracts, compiled.
    pub contracts: Contracts,
    /// The pack's rules and risk score, compiled.
    pub guard: AccessPolicy,
    /// Redacts texts before they are recorded.
    pub redactor: Redactor,
    /// The credential of each egress host of the policy, in the same order.
    pub credentials: Vec<Option<Credential>>,
    /// Where evidence goes.
    pub evidence: EvidencePolicy,
    /// Where arguments of compensations, idempotent results and salts are stored.
    pub state: Option<StatePolicy>,
}

impl Compiled {
    /// Compiles a policy.
    ///
    /// # Errors
    /// Returns the reason why the policy cannot be enforced.
    pub fn new(
        policy: PolicyConfig,
        credentials: Vec<Option<Credential>>,
        evidence: EvidencePolicy,
    ) -> Result<Self, String> {
        let guard = AccessPolicy::compile(&policy).map_err(|e| e.to_string())?;
        Ok(Self {
            digest: policy.digest().map_err(|e| e.to_string())?,
            contracts: Contracts::compile(&policy).map_err(|e| e.to_string())?,
            redactor: Redactor::new(&policy, guard.detectors()),
            guard,
            credentials,
            evidence,
            state: None,
            policy,
        })
    }

    /// Returns where the task's log is stored.
    pub fn place(&self) -> LogLocation {
        let task = &self.policy.task;
        place(&self.evidence, &task.namespace, &task.name, &task.uid)
    }

    /// Returns where the log of the task that this one rolls back is stored.
    pub fn rollback_target_log(&self) -> Option<LogLocation> {
        self.policy.task.rollback_of.as_ref().filter(|of| !of.name.contains('/')).map(|of| self.place_of(of))
    }

    /// Returns where the log of another task of the namespace is stored.
    pub fn place_of(&self, task: &RollbackOf) -> LogLocation {
        place(&self.evidence, &self.policy.task.namespace, &task.name, &task.uid)
    }

    /// Returns the task itself as a reference to a rollback.
    pub fn as_rollback(&self) -> RollbackOf {
        RollbackOf { name: self.policy.task.name.clone(), uid: self.policy.task.uid.clone() }
    }

    /// Returns where the arguments of compensations are stored, for the calls of this task or of the one that it rolls back.
    pub fn compensation_location(&self) -> Option<Location> {
        let task = &self.policy.task;
        let of = task.rollback_of.as_ref().filter(|of| !of.name.contains('/'));
        let (name, uid) = of.map_or((&task.name, &task.uid), |of| (&of.name, &of.uid));
        self.kept(name, uid, "rollback")
    }

    /// Returns where the salt of the task's commitments is. A rollback uses the salt of the task that it rolls back.
    pub fn salt(&self) -> SaltLocation {
        let task = &self.policy.task;
        let of = task.rollback_of.as_ref().filter(|of| !of.name.contains('/'));
        let (name, uid) = of.map_or((&task.name, &task.uid), |of| (&of.name, &of.uid));
        SaltLocation { task_uid: uid.clone(), location: self.kept(name, uid, "salt") }
    }

    /// Returns where the results of this task's idempotent calls are stored.
    pub fn results(&self) -> Option<Location> {
        self.kept(&self.policy.task.name, &self.policy.task.uid, "results")
    }

    fn kept(&self, task: &str, uid: &str, folder: &str) -> Option<Location> {
        let state = self.state.as_ref()?;
        let prefix = log_prefix(state.prefix.as_deref(), &self.policy.task.namespace, task, uid);
        Some(Location { bucket: state.bucket.clone(), prefix: format!("{prefix}{folder}/") })
    }
}

/// The objects that a policy was compiled from: UID and generation of each.
type Sources = Vec<(String, i64)>;

/// Compiled policies in memory, by the task's UID.
pub(super) struct Cache(Map<String, (Arc<Sources>, Arc<Compiled>)>);

impl Default for Cache {
    fn default() -> Self {
        Self(recent(COMPILED))
    }
}

impl Cache {
    /// Returns the compiled policy of a task by its contracts and its pack. Compiles it if one of the objects has changed.
    ///
    /// # Errors
    /// Returns the reason why the policy cannot be enforced.
    pub(super) fn compiled(
        &self,
        task: &AgentTask,
        contracts: &[&ToolContract],
        pack: &PolicyPack,
    ) -> Result<Arc<Compiled>, String> {
        let source = |meta: &ObjectMeta| (meta.uid.clone().unwrap_or_default(), meta.generation.unwrap_or_default());
        let mut sources = vec![source(&task.metadata), source(&pack.metadata)];
        sources.extend(contracts.iter().map(|contract| source(&contract.metadata)));
        let uid = task.uid().unwrap_or_default();
        if let Some((from, compiled)) = self.0.get(&uid)
            && *from == sources
        {
            return Ok(compiled);
        }
        // Calls of one task wait while one of them compiles. Other tasks do not wait.
        let entry = self.0.entry(uid).and_try_compute_with(|known| match known {
            Some(known) if *known.value().0 == sources => Ok(Op::Nop),
            _ => compile(task, contracts, pack).map(|compiled| Op::Put((Arc::new(sources), Arc::new(compiled)))),
        })?;
        match entry {
            CompResult::Inserted(entry) | CompResult::ReplacedWith(entry) | CompResult::Unchanged(entry) => {
                Ok(entry.into_value().1)
            }
            CompResult::StillNone(_) | CompResult::Removed(_) => Err("the policy was not compiled".to_owned()),
        }
    }
}

fn compile(task: &AgentTask, contracts: &[&ToolContract], pack: &PolicyPack) -> Result<Compiled, String> {
    let policy = render::task::render_policy(task, contracts, pack)
        .map_err(|findings| findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))?;
    let class = render::pack::class_of(task, pack).map_err(|e| e.to_string())?;
    // One for each egress host of the policy, which is rendered from the same list.
    let credential = |rule| render::pack::credential_for(rule, &task.spec.principal).cloned();
    let credentials = class.egress.iter().map(credential).collect();
    Ok(Compiled { state: pack.spec.state.clone(), ..Compiled::new(policy, credentials, pack.spec.evidence.clone())? })
}

/// Returns where the log of a task is stored.
pub(super) fn place(evidence: &EvidencePolicy, namespace: &str, task: &str, uid: &str) -> LogLocation {
    LogLocation {
        location: Location {
            bucket: evidence.bucket.clone(),
            prefix: log_prefix(evidence.prefix.as_deref(), namespace, task, uid),
        },
        task_uid: uid.to_owned(),
        retention: Some(retention(evidence)),
    }
}

/// Returns how long segments are locked.
pub(super) fn retention(evidence: &EvidencePolicy) -> Retention {
    let mode = match evidence.mode {
        RetentionMode::Compliance => Mode::Compliance,
        RetentionMode::Governance => Mode::Governance,
    };
    Retention { mode, days: evidence.retention_days }
}
