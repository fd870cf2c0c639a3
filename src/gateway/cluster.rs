//! The gateway's view of the cluster: watched stores, and the objects in them that concern one task.
//!
//! Guarantees: decisions use the newest objects that the API server has sent, so that a stricter pack or a deleted pod takes effect at
//! once. An object that cannot be decoded counts as absent and stops no watch. Before a caller is denied because the stores lag, the API
//! server is asked once.
//!
//! Non-goals: writing anything; what follows from the objects, for a caller ([`identity`]) and for a policy ([`compiled`]).

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{StreamExt, future::BoxFuture};
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret};
use kube::{
    Api, Client, Resource, ResourceExt,
    runtime::{
        WatchStreamExt,
        reflector::{ObjectRef, Store, store::Writer},
        watcher,
    },
};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;

use super::{
    compiled::{self, Cache, Compiled},
    identity::{self, BoundPod, HarnessIdentity, PodFacts, Reviewed, TaskFacts, pod_facts},
    metrics::Metrics,
    refusal::Refused,
    witness::LogLocation,
};
use crate::{
    api::{AgentTask, ApprovalRequest, PolicyPack, ToolContract, agent_task::Phase},
    contact,
    evidence::store::Retention,
    lenient::Lenient,
    policy::rule::Rule,
    render::{self, intact, names},
};

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

/// The cluster.
pub struct Cluster {
    stores: Stores,
    fetch: Arc<dyn Fetch>,
    synced: AtomicBool,
    fetched: Mutex<HashMap<String, (Instant, Fetched)>>,
    compiled: Cache,
}

impl Cluster {
    /// Returns a view of the cluster in these stores.
    pub fn new(stores: Stores, fetch: Arc<dyn Fetch>) -> Self {
        Self { stores, fetch, synced: AtomicBool::new(false), fetched: Mutex::default(), compiled: Cache::default() }
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
            let mut fetched = self.fetched.lock();
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
        let mut fetched = self.fetched.lock();
        fetched.insert(bound.uid.clone(), (Instant::now(), found.clone()));
        found
    }

    fn task_facts(&self, task: &AgentTask) -> TaskFacts {
        let (namespace, uid) = (task.namespace().unwrap_or_default(), task.uid().unwrap_or_default());
        let status = task.status.as_ref();
        let of_pods = self.stores.pods.state().into_iter().filter_map(|pod| {
            let pod = pod.0.as_ref().ok()?;
            let of_task = pod.metadata.namespace.as_deref() == Some(&namespace)
                && pod.labels().get(names::TASK_UID).is_some_and(|label| *label == uid);
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
            let fetched = self.fetched.lock();
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
        self.compiled.compiled(task, &contracts, pack)
    }

    /// Returns where the evidence of a task is stored, if its pack is known.
    pub fn place(&self, namespace: &str, task: &str, uid: &str) -> Option<LogLocation> {
        self.pack(namespace, |pack| compiled::place(&pack.spec.evidence, namespace, task, uid)).ok()
    }

    /// Returns the retention of a namespace's evidence, if its pack is known and uses that bucket.
    pub fn retention(&self, namespace: &str, bucket: &str) -> Option<Retention> {
        let given = |pack: &PolicyPack| {
            let evidence = &pack.spec.evidence;
            (evidence.bucket == bucket).then(|| compiled::retention(evidence))
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
    let addressed = any().labels(names::TASK).fields(WITH_ADDRESS);
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
    let undecodable = metrics.undecodable.with_label_values(&[&*kind]);
    let events = watcher(api, config)
        .backoff(contact::pauses())
        .modify(move |guarded| match &mut guarded.0 {
            Ok(object) => trim(object),
            Err(invalid) => {
                undecodable.inc();
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
