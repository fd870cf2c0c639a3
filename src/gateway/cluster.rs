//! The gateway's view of the cluster: watched stores, and what follows from them for one task.
//!
//! Guarantees: decisions use the newest objects that the API server has sent, so that a stricter pack or a deleted pod takes effect at
//! once. An object that cannot be decoded counts as absent and stops no watch. Before a caller is denied because the stores lag, the API
//! server is asked once.
//!
//! Non-goals: writing anything.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{StreamExt, future::BoxFuture};
use k8s_openapi::{
    api::core::v1::{Namespace, Pod, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    runtime::{
        WatchStreamExt,
        reflector::{ObjectRef, Store, store::Writer},
        watcher,
    },
};
use serde::de::DeserializeOwned;

use super::{
    identity::{self, BoundPod, HarnessIdentity, PodFacts, Reviewed, TaskFacts},
    metrics::Metrics,
    refusal::Refused,
    witness::{LogLocation, SaltLocation},
};
use crate::{
    api::{
        AgentTask, ApprovalRequest, PolicyPack, ToolContract,
        agent_task::Phase,
        policy_pack::{Credential, EvidencePolicy, RetentionMode, StatePolicy},
    },
    contact,
    evidence::store::{Location, Mode, Retention, log_prefix},
    lenient::Lenient,
    policy::{
        access::AccessPolicy,
        config::{PolicyConfig, RollbackOf},
        decide::Contracts,
        redact::Redactor,
        rule::Rule,
    },
    render::{self, intact},
};

/// Label with the task's name, on every object that belongs to a task.
pub const TASK_LABEL: &str = "belay.dev/task";
/// Label with the task's UID.
pub const TASK_UID_LABEL: &str = "belay.dev/task-uid";
/// Label with the attempt's number.
pub const ATTEMPT_LABEL: &str = "belay.dev/attempt";
/// Label selector of the Secrets that upstreams may get.
pub const CREDENTIAL_SELECTOR: &str = "belay.dev/upstream-credential=true";

/// Field selector of pods that have an address. The API server sends no other pods.
const WITH_ADDRESS: &str = "status.podIP!=";

/// How long an object that was fetched because the stores did not have it is used: until the watch has caught up.
const FETCHED_FOR: Duration = Duration::from_secs(1);
/// Maximum number of fetched pods in memory.
const FETCHED: usize = 1024;
/// Time limit for the API server.
const FETCH_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum number of compiled policies in memory.
const COMPILED: usize = 4096;

/// A store that holds undecodable objects, too, which count as absent.
pub type Guarded<K> = Store<Lenient<K>>;

/// The stores that the gateway watches.
#[derive(Clone)]
pub struct Stores {
    /// Pods of attempts that have an address. Without an address a pod cannot call.
    pub pods: Guarded<Pod>,
    /// Tasks.
    pub tasks: Guarded<AgentTask>,
    /// Contracts.
    pub contracts: Guarded<ToolContract>,
    /// Packs.
    pub packs: Guarded<PolicyPack>,
    /// Namespaces, for their labels.
    pub namespaces: Guarded<Namespace>,
    /// ApprovalRequests.
    pub approvals: Guarded<ApprovalRequest>,
    /// Secrets of the system namespace that upstreams may get.
    pub secrets: Guarded<Secret>,
}

/// Fetches single objects when the stores lag.
pub trait Fetch: Send + Sync {
    /// Returns a pod, if it exists.
    fn pod<'a>(&'a self, namespace: &'a str, name: &'a str) -> BoxFuture<'a, Result<Option<Pod>, String>>;
    /// Returns a task, if it exists.
    fn task<'a>(&'a self, namespace: &'a str, name: &'a str) -> BoxFuture<'a, Result<Option<AgentTask>, String>>;
}

impl Fetch for Client {
    fn pod<'a>(&'a self, namespace: &'a str, name: &'a str) -> BoxFuture<'a, Result<Option<Pod>, String>> {
        let api = Api::<Pod>::namespaced(self.clone(), namespace);
        Box::pin(async move { api.get_opt(name).await.map_err(|e| e.to_string()) })
    }

    fn task<'a>(&'a self, namespace: &'a str, name: &'a str) -> BoxFuture<'a, Result<Option<AgentTask>, String>> {
        let api = Api::<AgentTask>::namespaced(self.clone(), namespace);
        Box::pin(async move { api.get_opt(name).await.map_err(|e| e.to_string()) })
    }
}

/// A fetched pod and its task.
#[derive(Clone, Default)]
struct Fetched {
    pod: Option<Arc<Pod>>,
    task: Option<Arc<AgentTask>>,
}

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

/// The objects that a policy was compiled from: UID and generation of each.
type Sources = Vec<(String, i64)>;

/// The cluster.
pub struct Cluster {
    stores: Stores,
    fetch: Arc<dyn Fetch>,
    synced: AtomicBool,
    fetched: Mutex<HashMap<String, (Instant, Fetched)>>,
    compiled: Mutex<HashMap<String, (Sources, Arc<Compiled>)>>,
}

impl Cluster {
    /// Returns a view of the cluster in these stores.
    pub fn new(stores: Stores, fetch: Arc<dyn Fetch>) -> Self {
        Self { stores, fetch, synced: AtomicBool::new(false), fetched: Mutex::default(), compiled: Mutex::default() }
    }

    /// Waits until every store has been filled once.
    ///
    /// # Errors
    /// Returns an error if a watch has ended, which should never happen.
    pub async fn wait_until_synced(&self) -> Result<(), String> {
        let Stores { pods, tasks, contracts, packs, namespaces, approvals, secrets } = &self.stores;
        let ended = |e| format!("a watch has ended: {e}");
        pods.wait_until_ready().await.map_err(ended)?;
        tasks.wait_until_ready().await.map_err(ended)?;
        contracts.wait_until_ready().await.map_err(ended)?;
        packs.wait_until_ready().await.map_err(ended)?;
        namespaces.wait_until_ready().await.map_err(ended)?;
        approvals.wait_until_ready().await.map_err(ended)?;
        secrets.wait_until_ready().await.map_err(ended)?;
        self.synced.store(true, Ordering::Release);
        Ok(())
    }

    /// Returns whether every store has been filled once.
    pub fn synced(&self) -> bool {
        self.synced.load(Ordering::Acquire)
    }

    /// Identifies the bearer of a reviewed token.
    ///
    /// # Errors
    /// See [`identity::decide`].
    pub async fn identify(&self, reviewed: &Reviewed, peer: IpAddr) -> Result<HarnessIdentity, Refused> {
        let known = self.decide(reviewed, peer, &Fetched::default());
        let (Err(refused), Some(bound)) = (&known, &reviewed.pod) else { return known };
        // A denial by the stores may be outdated, except that a task which has ended stays ended.
        if matches!(refused.rule, Rule::TaskClosed) {
            return known;
        }
        self.decide(reviewed, peer, &self.fetched(bound).await)
    }

    fn decide(&self, reviewed: &Reviewed, peer: IpAddr, fetched: &Fetched) -> Result<HarnessIdentity, Refused> {
        let pod = fetched.pod.clone().or_else(|| {
            let bound = reviewed.pod.as_ref()?;
            get(&self.stores.pods, &bound.namespace, &bound.name)
        });
        let pod = pod.as_deref().and_then(pod_facts);
        let task = fetched.task.clone().or_else(|| {
            let pod = pod.as_ref()?;
            get(&self.stores.tasks, &pod.namespace, &pod.task)
        });
        let task = task.map(|task| self.task_facts(&task));
        identity::decide(reviewed, peer, pod.as_ref(), task.as_ref())
    }

    /// Fetches a pod and its task from the API server, at most once a second for each pod.
    async fn fetched(&self, bound: &BoundPod) -> Fetched {
        let now = Instant::now();
        {
            let mut fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
            fetched.retain(|_, (at, _)| now.duration_since(*at) < FETCHED_FOR);
            if let Some((_, known)) = fetched.get(&bound.uid) {
                return known.clone();
            }
            if fetched.len() >= FETCHED {
                return Fetched::default();
            }
            // Concurrent callers use the stores while this one fetches.
            fetched.insert(bound.uid.clone(), (now, Fetched::default()));
        }
        let asked = async {
            let pod = self.fetch.pod(&bound.namespace, &bound.name).await?.map(Arc::new);
            let name = pod.as_deref().and_then(pod_facts).map(|facts| facts.task);
            let task = match name {
                Some(name) => self.fetch.task(&bound.namespace, &name).await?.map(Arc::new),
                None => None,
            };
            Ok::<_, String>(Fetched { pod, task })
        };
        let found = match tokio::time::timeout(FETCH_TIMEOUT, asked).await {
            Ok(Ok(found)) => found,
            Ok(Err(cause)) => {
                tracing::warn!(cause, "a pod that is not in the store could not be fetched");
                Fetched::default()
            }
            Err(_) => Fetched::default(),
        };
        let mut fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        fetched.insert(bound.uid.clone(), (Instant::now(), found.clone()));
        found
    }

    fn task_facts(&self, task: &AgentTask) -> TaskFacts {
        let (namespace, uid) = (task.namespace().unwrap_or_default(), task.uid().unwrap_or_default());
        let status = task.status.as_ref();
        let of_pods = self.stores.pods.state().into_iter().filter_map(|pod| {
            let pod = pod.0.as_ref().ok()?;
            let of_task = pod.metadata.namespace.as_deref() == Some(&namespace)
                && pod.labels().get(TASK_UID_LABEL).is_some_and(|label| *label == uid);
            of_task.then(|| pod_facts(pod)).flatten().map(|facts| facts.attempt)
        });
        TaskFacts {
            newest_attempt: of_pods.chain(status.and_then(|s| s.attempt)).max().unwrap_or_default(),
            ending: task.metadata.deletion_timestamp.is_some(),
            finished: status.and_then(|s| s.phase).is_some_and(|p| matches!(p, Phase::Succeeded | Phase::Failed)),
            uid,
        }
    }

    /// Returns a task by name and UID.
    pub fn task(&self, namespace: &str, name: &str, uid: &str) -> Option<Arc<AgentTask>> {
        let is_it = |task: &Arc<AgentTask>| task.metadata.uid.as_deref() == Some(uid);
        get(&self.stores.tasks, namespace, name).filter(is_it).or_else(|| {
            let fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
            fetched.values().filter_map(|(_, f)| f.task.clone()).find(is_it)
        })
    }

    /// Returns the pod that a token is bound to, if it belongs to a task.
    pub fn pod_of(&self, bound: &BoundPod) -> Option<PodFacts> {
        let pod = get(&self.stores.pods, &bound.namespace, &bound.name)?;
        pod_facts(&pod).filter(|facts| facts.uid == bound.uid)
    }

    /// Returns the pod that has this address, if it belongs to a task.
    pub fn pod_at(&self, address: IpAddr) -> Option<PodFacts> {
        let address = address.to_canonical();
        self.stores.pods.state().into_iter().find_map(|pod| {
            let facts = pod_facts(pod.0.as_ref().ok()?)?;
            (!facts.finished && facts.addresses.iter().any(|a| a.to_canonical() == address)).then_some(facts)
        })
    }

    /// Returns what `read` reads from the pack that governs a namespace.
    fn pack<R>(&self, namespace: &str, read: impl FnOnce(&PolicyPack) -> R) -> Result<R, String> {
        let unknown = || format!("the namespace {namespace} is not known yet");
        let guarded = self.stores.namespaces.get(&ObjectRef::new(namespace)).ok_or_else(unknown)?;
        let labels = guarded.0.as_ref().map_err(|_| unknown())?.metadata.labels.clone().unwrap_or_default();
        let guarded = self.stores.packs.state();
        let packs: Vec<&PolicyPack> = guarded.iter().filter_map(|pack| pack.0.as_ref().ok()).collect();
        render::pack_for(&labels, &packs).map(read).map_err(|finding| finding.to_string())
    }

    /// Returns the compiled policy of a task.
    ///
    /// # Errors
    /// Returns [`Rule::ConfigDigest`], which may be retried: the stores may lag, or the contract or the pack may be fixed later.
    pub fn compiled(&self, principal: &HarnessIdentity) -> Result<Arc<Compiled>, Refused> {
        let HarnessIdentity { namespace, task: name, task_uid, .. } = principal;
        let unready = |reason: String| {
            Refused::retry(Rule::ConfigDigest, format!("no policy can be compiled for {namespace}/{name}: {reason}"))
        };
        let task = self.task(namespace, name, task_uid).ok_or_else(|| unready("the task is not there".into()))?;
        self.pack(namespace, |pack| self.compiled_by(&task, pack)).and_then(|compiled| compiled).map_err(unready)
    }

    fn compiled_by(&self, task: &AgentTask, pack: &PolicyPack) -> Result<Arc<Compiled>, String> {
        let namespace = task.namespace().unwrap_or_default();
        let guarded: Vec<_> = task
            .spec
            .tools
            .iter()
            .filter_map(|tool| self.stores.contracts.get(&ObjectRef::new(tool).within(&namespace)))
            .collect();
        let contracts: Vec<&ToolContract> = guarded.iter().filter_map(|contract| contract.0.as_ref().ok()).collect();
        let source = |meta: &ObjectMeta| (meta.uid.clone().unwrap_or_default(), meta.generation.unwrap_or_default());
        let mut sources = vec![source(&task.metadata), source(&pack.metadata)];
        sources.extend(contracts.iter().map(|contract| source(&contract.metadata)));
        let uid = task.uid().unwrap_or_default();
        let mut cache = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((from, compiled)) = cache.get(&uid)
            && *from == sources
        {
            return Ok(compiled.clone());
        }
        let compiled = Arc::new(compile(task, &contracts, pack)?);
        if cache.len() >= COMPILED {
            cache.clear();
        }
        cache.insert(uid, (sources, compiled.clone()));
        Ok(compiled)
    }

    /// Returns where the evidence of a task is stored, if its pack is known.
    pub fn place(&self, namespace: &str, task: &str, uid: &str) -> Option<LogLocation> {
        self.pack(namespace, |pack| place(&pack.spec.evidence, namespace, task, uid)).ok()
    }

    /// Returns the retention of a namespace's evidence, if its pack is known and uses that bucket.
    pub fn retention(&self, namespace: &str, bucket: &str) -> Option<Retention> {
        let given = |pack: &PolicyPack| {
            let evidence = &pack.spec.evidence;
            (evidence.bucket == bucket).then(|| retention(evidence))
        };
        self.pack(namespace, given).ok().flatten()
    }

    /// Returns the evidence buckets of all packs.
    pub fn buckets(&self) -> Vec<String> {
        let packs = self.stores.packs.state();
        let readable = packs.iter().filter_map(|pack| pack.0.as_ref().ok());
        let mut buckets: Vec<_> = readable.map(|pack| pack.spec.evidence.bucket.clone()).collect();
        buckets.sort();
        buckets.dedup();
        buckets
    }

    /// Returns an ApprovalRequest.
    pub fn approval(&self, namespace: &str, name: &str) -> Option<Arc<ApprovalRequest>> {
        get(&self.stores.approvals, namespace, name)
    }

    /// Returns all ApprovalRequests of a task.
    pub fn approvals(&self, namespace: &str, task_uid: &str) -> Vec<Arc<ApprovalRequest>> {
        let of_task = |request: &&ApprovalRequest| {
            request.metadata.namespace.as_deref() == Some(namespace) && request.spec.task.uid == task_uid
        };
        let all = self.stores.approvals.state();
        let readable = all.iter().filter_map(|guarded| guarded.0.as_ref().ok());
        readable.filter(of_task).cloned().map(Arc::new).collect()
    }

    /// Checks that a caller that was identified before may still make calls, by the stores alone.
    ///
    /// # Errors
    /// See [`identity::decide`] and [`HarnessIdentity::may_call`].
    pub fn recheck_caller(&self, reviewed: &Reviewed, peer: IpAddr) -> Result<(), Refused> {
        self.decide(reviewed, peer, &Fetched::default())?.may_call()
    }

    /// Returns the value of a credential, if its Secret exists and has the label.
    pub fn secret(&self, name: &str, key: &str) -> Option<Vec<u8>> {
        let secrets = self.stores.secrets.state();
        let mut readable = secrets.iter().filter_map(|secret| secret.0.as_ref().ok());
        let secret = readable.find(|secret| secret.metadata.name.as_deref() == Some(name))?;
        secret.data.as_ref()?.get(key).map(|value| value.0.clone())
    }
}

fn compile(task: &AgentTask, contracts: &[&ToolContract], pack: &PolicyPack) -> Result<Compiled, String> {
    let policy = render::config::render_policy(task, contracts, pack)
        .map_err(|findings| findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))?;
    let class = render::config::class_of(task, pack).map_err(|e| e.to_string())?;
    // One for each egress host of the policy, which is rendered from the same list.
    let credential = |rule| render::config::credential_for(rule, &task.spec.principal).cloned();
    let credentials = class.egress.iter().map(credential).collect();
    Ok(Compiled { state: pack.spec.state.clone(), ..Compiled::new(policy, credentials, pack.spec.evidence.clone())? })
}

fn retention(evidence: &EvidencePolicy) -> Retention {
    let mode = match evidence.mode {
        RetentionMode::Compliance => Mode::Compliance,
        RetentionMode::Governance => Mode::Governance,
    };
    Retention { mode, days: evidence.retention_days }
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

fn place(evidence: &EvidencePolicy, namespace: &str, task: &str, uid: &str) -> LogLocation {
    LogLocation {
        location: Location {
            bucket: evidence.bucket.clone(),
            prefix: log_prefix(evidence.prefix.as_deref(), namespace, task, uid),
        },
        task_uid: uid.to_owned(),
        retention: Some(retention(evidence)),
    }
}

/// Returns the facts of an attempt's pod that identification needs, or `None` if the pod lacks one of Belay's labels.
pub fn pod_facts(pod: &Pod) -> Option<PodFacts> {
    let label = |key: &str| pod.metadata.labels.as_ref()?.get(key).cloned();
    let status = pod.status.as_ref();
    let addresses = status
        .and_then(|s| s.pod_ips.as_ref())
        .into_iter()
        .flatten()
        .map(|ip| ip.ip.as_str())
        .chain(status.and_then(|s| s.pod_ip.as_deref()))
        .filter_map(|ip| ip.parse().ok())
        .collect();
    Some(PodFacts {
        namespace: pod.metadata.namespace.clone()?,
        name: pod.metadata.name.clone()?,
        uid: pod.metadata.uid.clone()?,
        addresses,
        task: label(TASK_LABEL)?,
        task_uid: label(TASK_UID_LABEL)?,
        attempt: label(ATTEMPT_LABEL)?.parse().ok().filter(|n| *n >= 1)?,
        ending: pod.metadata.deletion_timestamp.is_some(),
        finished: status.and_then(|s| s.phase.as_deref()).is_some_and(|p| matches!(p, "Succeeded" | "Failed")),
        altered: intact::altered(pod),
    })
}

/// Returns the object, if it exists and can be decoded.
fn get<K>(store: &Guarded<K>, namespace: &str, name: &str) -> Option<Arc<K>>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    let guarded = store.get(&ObjectRef::new(name).within(namespace))?;
    guarded.0.as_ref().ok().cloned().map(Arc::new)
}

/// Watches all objects without end. The returned future ends only if a watch does, which must end the process.
pub fn watch(client: &Client, system_namespace: &str, metrics: &Metrics) -> (Stores, BoxFuture<'static, ()>) {
    let any = contact::watching;
    let addressed = any().labels(TASK_LABEL).fields(WITH_ADDRESS);
    let (pods, a) = follow::<Pod>(Api::all(client.clone()), addressed, metrics, |pod| {
        intact::remember(pod);
        pod.spec = None;
    });
    let (tasks, b) = follow::<AgentTask>(Api::all(client.clone()), any(), metrics, |_| ());
    let (contracts, c) = follow::<ToolContract>(Api::all(client.clone()), any(), metrics, |_| ());
    let (packs, d) = follow::<PolicyPack>(Api::all(client.clone()), any(), metrics, |_| ());
    let (namespaces, e) = follow::<Namespace>(Api::all(client.clone()), any(), metrics, |_| ());
    let (secrets, f) = follow::<Secret>(
        Api::namespaced(client.clone(), system_namespace),
        any().labels(CREDENTIAL_SELECTOR),
        metrics,
        |_| (),
    );
    let (approvals, g) = follow::<ApprovalRequest>(Api::all(client.clone()), any(), metrics, |_| ());
    let stores = Stores { pods, tasks, contracts, packs, namespaces, approvals, secrets };
    let all = async move {
        futures::future::select_all([a, b, c, d, e, f, g]).await;
    };
    (stores, Box::pin(all))
}

/// Starts one watch. `trim` removes the parts of an object that the gateway does not read.
fn follow<K>(
    api: Api<Lenient<K>>,
    config: watcher::Config,
    metrics: &Metrics,
    trim: fn(&mut K),
) -> (Guarded<K>, BoxFuture<'static, ()>)
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Send + Sync + 'static,
{
    let writer = Writer::<Lenient<K>>::default();
    let store = writer.as_reader();
    let kind = K::kind(&());
    let unreadable = metrics.unreadable.with_label_values(&[&*kind]);
    let events = watcher(api, config)
        .backoff(contact::pauses())
        .modify(move |guarded| match &mut guarded.0 {
            Ok(object) => trim(object),
            Err(invalid) => {
                unreadable.inc();
                let (namespace, name) = (&invalid.metadata.namespace, &invalid.metadata.name);
                tracing::warn!(kind = %K::kind(&()), ?namespace, ?name, error = %invalid.error, "an object cannot be read and counts as absent");
            }
        })
        .reflect(writer);
    let run = async move {
        futures::pin_mut!(events);
        while let Some(event) = events.next().await {
            if let Err(error) = event {
                tracing::warn!(kind = %K::kind(&()), %error, "a watch failed and is tried again");
            }
        }
    };
    (store, Box::pin(run))
}

#[cfg(test)]
mod tests;
