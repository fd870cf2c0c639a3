//! Keeps the observed state of the cluster in caches, by watches.
//!
//! Guarantees: One object that cannot be decoded never stops a watch, and neither does another watch. Nothing is decided before every store
//! is filled. The last status of a deleted pod is kept, if the API server reported it.
//!
//! Non-goals: Data that nothing uses, such as managed fields and nearly all of a pod's spec.

use std::{collections::BTreeSet, convert::Infallible, sync::Arc, time::Duration};

use futures::{Stream, StreamExt, stream::BoxStream};
use k8s_openapi::api::{
    core::v1::{Namespace, Pod, PodSpec},
    networking::v1::NetworkPolicy,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::ObjectMeta,
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt,
        reflector::{self, ObjectRef, Store, store::WriterDropped},
        watcher,
    },
};
use parking_lot::{Mutex, MutexGuard};
use serde::de::DeserializeOwned;
use tokio::{sync::Notify, time::timeout};

use super::{
    approvals::Undecided,
    by_task::ByTask,
    expectations::{self, Expectations},
    metrics::Metrics,
};
use crate::{
    api::{AgentTask, ApprovalRequest, PolicyPack, ToolContract, agent_task::Phase},
    contact,
    lenient::Lenient,
    lifecycle::observe,
    render::{intact, names},
};

/// How long the watch may lag before the operator asks the API server instead.
const PATIENCE: Duration = Duration::from_millis(500);
/// The number of ApprovalRequests in one part of a list. Each can have 64 KiB of arguments, which the operator drops.
const APPROVALS_AT_ONCE: u32 = 50;

/// A task, or the reason why it cannot be decoded.
pub type GuardedTask = Lenient<AgentTask>;

/// The caches of everything that is watched.
#[derive(Clone)]
pub struct Stores {
    /// Tasks.
    pub tasks: Store<GuardedTask>,
    /// Contracts.
    pub contracts: Store<Lenient<ToolContract>>,
    /// Packs.
    pub packs: Store<Lenient<PolicyPack>>,
    /// The labels of the namespaces.
    pub namespaces: Store<PartialObjectMeta<Namespace>>,
    /// Belay's pods.
    pub pods: Store<Lenient<Pod>>,
    /// Belay's NetworkPolicies.
    pub network_policies: Store<Lenient<NetworkPolicy>>,
    /// The attempts that have a pod.
    pub with_pod: Attempts,
    /// The attempts that have a NetworkPolicy.
    pub with_network_policy: Attempts,
    /// The undecided ApprovalRequests.
    pub approvals: Undecided,
    /// Notified at each change of a contract or a pack.
    pub references_changed: Arc<Notify>,
    /// Notified at each change of Belay's NetworkPolicies.
    pub network_policies_changed: Arc<Notify>,
}

impl Stores {
    /// Waits until all stores are filled.
    ///
    /// # Errors
    /// Returns an error if a watch has ended.
    pub async fn ready(&self) -> Result<(), WriterDropped> {
        let (tasks, pods, policies) = (&self.tasks, &self.pods, &self.network_policies);
        tokio::try_join!(tasks.wait_until_ready(), pods.wait_until_ready(), policies.wait_until_ready())?;
        self.approvals.wait_until_ready().await;
        self.references_ready().await
    }

    /// Waits until the stores of what tasks refer to are filled: contracts, packs, namespaces.
    ///
    /// # Errors
    /// Returns an error if a watch has ended.
    pub async fn references_ready(&self) -> Result<(), WriterDropped> {
        let (contracts, packs, namespaces) = (&self.contracts, &self.packs, &self.namespaces);
        tokio::try_join!(contracts.wait_until_ready(), packs.wait_until_ready(), namespaces.wait_until_ready())?;
        Ok(())
    }

    /// Returns one of Belay's pods by its name.
    pub fn pod(&self, namespace: &str, name: &str) -> Option<Arc<Lenient<Pod>>> {
        self.pods.get(&ObjectRef::new(name).within(namespace))
    }

    /// Returns one of Belay's NetworkPolicies by its name.
    pub fn network_policy(&self, namespace: &str, name: &str) -> Option<Arc<Lenient<NetworkPolicy>>> {
        self.network_policies.get(&ObjectRef::new(name).within(namespace))
    }

    /// Returns a NetworkPolicy that was written just now, as the watch shows it at that version or a later one. Returns `None` if the watch
    /// does not show it in time.
    pub async fn read_back(&self, written: &NetworkPolicy) -> Option<NetworkPolicy> {
        let (namespace, name) = (written.namespace().unwrap_or_default(), written.name_any());
        let shown = async {
            loop {
                let changed = self.network_policies_changed.notified();
                let shown = self.network_policy(&namespace, &name);
                let shown = shown.as_ref().and_then(|shown| shown.0.as_ref().ok());
                if let Some(shown) = shown.filter(|shown| includes(&shown.metadata, &written.metadata)) {
                    return shown.clone();
                }
                changed.await;
            }
        };
        timeout(PATIENCE, shown).await.ok()
    }

    /// Returns the tasks that have not ended and for which `applies` is true.
    fn tasks_where(&self, applies: impl Fn(&AgentTask) -> bool) -> Vec<ObjectRef<GuardedTask>> {
        let open = |task: &AgentTask| {
            !matches!(task.status.as_ref().and_then(|status| status.phase), Some(Phase::Succeeded | Phase::Failed))
        };
        self.tasks
            .state()
            .iter()
            .filter(|task| task.0.as_ref().is_ok_and(|task| open(task) && applies(task)))
            .map(|task| ObjectRef::from_obj(task.as_ref()))
            .collect()
    }

    /// Returns the tasks that name a contract.
    pub fn tasks_of_contract(&self, contract: &impl ResourceExt) -> Vec<ObjectRef<GuardedTask>> {
        let (namespace, name) = (contract.namespace(), contract.name_any());
        self.tasks_where(|task| task.namespace() == namespace && task.spec.tools.contains(&name))
    }

    /// Returns the tasks that a change of a pack may affect. That is every task, because the selector of the pack may have started or
    /// stopped selecting any namespace.
    pub fn tasks_of_packs(&self) -> Vec<ObjectRef<GuardedTask>> {
        self.tasks_where(|_| true)
    }

    /// Returns the tasks of a namespace.
    pub fn tasks_of_namespace(&self, namespace: &str) -> Vec<ObjectRef<GuardedTask>> {
        self.tasks_where(|task| task.namespace().as_deref() == Some(namespace))
    }
}

/// The attempts of each task that have an object of one kind, according to the store of that kind. The numbers have gaps: a task that was
/// parked for a week has had thousands of attempts, and only the newest ones have objects.
#[derive(Clone, Default)]
pub struct Attempts(Arc<Mutex<ByTask<i64, ()>>>);

impl Attempts {
    fn lock(&self) -> MutexGuard<'_, ByTask<i64, ()>> {
        self.0.lock()
    }

    /// Returns the attempts of the task with this UID.
    pub fn of(&self, task_uid: &str) -> BTreeSet<i64> {
        self.lock().of(task_uid).into_keys().collect()
    }

    /// Applies an event of a watch, as the store does.
    pub fn follow<K: Resource>(&self, event: &watcher::Event<K>) {
        self.lock().follow(event, |object| attempt_of(object.meta()).map(|(task, number)| (task, number, Some(()))));
    }
}

/// Returns the UID of the task that an object of an attempt belongs to, and the attempt's number.
fn attempt_of(metadata: &ObjectMeta) -> Option<(String, i64)> {
    let labels = metadata.labels.as_ref()?;
    Some((labels.get(names::TASK_UID)?.clone(), labels.get(names::ATTEMPT)?.parse().ok()?))
}

/// The changes of all watches, which one controller merges. An error of one watch is logged and does not stop the others: that watch waits
/// and starts again.
pub struct Streams {
    /// Changes of tasks that exist.
    pub tasks: Changes<GuardedTask>,
    /// Contracts that were created, changed or deleted.
    pub contracts: Changes<Lenient<ToolContract>>,
    /// Changes of packs.
    pub packs: Changes<Lenient<PolicyPack>>,
    /// Changes of namespaces.
    pub namespaces: Changes<PartialObjectMeta<Namespace>>,
    /// Changes of pods.
    pub pods: Changes<Lenient<Pod>>,
    /// Changes of NetworkPolicies.
    pub network_policies: Changes<Lenient<NetworkPolicy>>,
    /// Changes of ApprovalRequests.
    pub approvals: Changes<Lenient<ApprovalRequest>>,
}

/// Objects of one kind, each time they change. No item is an error, because a controller pauses all of its streams for an error of one.
pub type Changes<K> = BoxStream<'static, watcher::Result<K>>;

impl Streams {
    /// Keeps the caches of contracts, packs and namespaces up to date forever, for a replica that looks them up and does not act.
    pub async fn follow_references(&mut self) -> Infallible {
        tokio::join!(drain(&mut self.contracts), drain(&mut self.packs), drain(&mut self.namespaces)).0
    }
}

async fn drain<K>(changes: &mut Changes<K>) -> Infallible {
    while changes.next().await.is_some() {}
    std::future::pending().await
}

/// Returns the changes of a watch. Interruptions are logged and left out.
fn changes<T: Send + 'static>(
    kind: &'static str,
    watch: impl Stream<Item = watcher::Result<T>> + Send + 'static,
) -> Changes<T> {
    let told = move |item: watcher::Result<T>| {
        if let Err(error) = &item {
            tracing::warn!(kind, %error, "a watch was interrupted and is started again");
        }
        std::future::ready(item.ok().map(Ok))
    };
    watch.filter_map(told).boxed()
}

/// Prepares the watches. They run while the streams are polled.
pub fn watch(client: &Client, memories: Arc<Expectations>, metrics: &Metrics) -> (Stores, Streams) {
    let all = contact::watching;
    let ours = || contact::watching().labels(&format!("{}={}", names::MANAGED_BY, names::MANAGER));
    let (of_pods, of_policies) = (memories.clone(), memories.clone());
    let network_policies_changed = Arc::new(Notify::new());
    let changed = network_policies_changed.clone();
    let (task_store, writer) = reflector::store();
    let tasks = watcher(Api::<GuardedTask>::all(client.clone()), all())
        .backoff(contact::pauses())
        .reflect(writer)
        .inspect(move |event| match event {
            Ok(watcher::Event::Apply(task) | watcher::Event::InitApply(task)) => seen(&memories, task),
            Ok(watcher::Event::Delete(task)) => memories.forget(task.meta().uid.as_deref().unwrap_or_default()),
            _ => {}
        })
        .inspect(report::<AgentTask>(metrics))
        .applied_objects();
    let (contract_store, writer) = reflector::store();
    let references_changed = Arc::new(Notify::new());
    let contract_changed = references_changed.clone();
    let contracts = guarded::<ToolContract>(client, all(), metrics)
        .reflect(writer)
        .inspect(move |_| contract_changed.notify_one())
        .touched_objects();
    let (pack_store, writer) = reflector::store();
    let pack_changed = references_changed.clone();
    let packs = guarded::<PolicyPack>(client, all(), metrics)
        .reflect(writer)
        .inspect(move |_| pack_changed.notify_one())
        .touched_objects();
    let (with_pod, with_network_policy) = (Attempts::default(), Attempts::default());
    let (pods_listed, policies_listed) = (with_pod.clone(), with_network_policy.clone());
    let (pod_store, writer) = reflector::store();
    let pods = guarded::<Pod>(client, ours(), metrics)
        .modify(|pod| {
            if let Ok(pod) = &mut pod.0 {
                intact::remember(pod);
                // The operator uses only this field of the spec: how long the pod may live.
                pod.spec = pod.spec.as_ref().map(|spec| PodSpec {
                    active_deadline_seconds: spec.active_deadline_seconds,
                    ..PodSpec::default()
                });
            }
        })
        .reflect(writer)
        .inspect(move |event| {
            event.iter().for_each(|event| pods_listed.follow(event));
            if let Some((task, pod)) = touched(event) {
                of_pods.pod_cached(task, pod.uid.as_deref().unwrap_or_default());
            }
            if let Ok(watcher::Event::Delete(Lenient(Ok(pod)))) = event
                && let Some(task) = pod.labels().get(names::TASK_UID)
                && let Some(view) = observe::pod(pod)
            {
                of_pods.pod_gone(task, view);
            }
        })
        .touched_objects();
    let (policy_store, writer) = reflector::store();
    let policies = guarded::<NetworkPolicy>(client, ours(), metrics)
        .reflect(writer)
        .inspect(move |event| {
            event.iter().for_each(|event| policies_listed.follow(event));
            if let Some((task, policy)) = touched(event)
                && let Some(attempt) = policy.labels.as_ref().and_then(|labels| labels.get(names::ATTEMPT))
            {
                of_policies.policy_cached(task, attempt);
            }
            changed.notify_waiters();
        })
        .touched_objects();
    let approvals = Undecided::default();
    let requests = guarded::<ApprovalRequest>(client, all().page_size(APPROVALS_AT_ONCE), metrics)
        .inspect({
            let approvals = approvals.clone();
            move |event| event.iter().for_each(|event| approvals.follow(event))
        })
        .touched_objects();
    let (namespace_store, writer) = reflector::store();
    let namespaces = watcher(Api::<PartialObjectMeta<Namespace>>::all(client.clone()), all())
        .backoff(contact::pauses())
        .modify(|namespace: &mut PartialObjectMeta<Namespace>| namespace.metadata.managed_fields = None)
        .reflect(writer)
        .touched_objects();
    let stores = Stores {
        tasks: task_store,
        contracts: contract_store,
        packs: pack_store,
        namespaces: namespace_store,
        pods: pod_store,
        network_policies: policy_store,
        with_pod,
        with_network_policy,
        approvals,
        references_changed,
        network_policies_changed,
    };
    let streams = Streams {
        tasks: changes("AgentTask", tasks),
        contracts: changes("ToolContract", contracts),
        packs: changes("PolicyPack", packs),
        namespaces: changes("Namespace", namespaces),
        pods: changes("Pod", pods),
        network_policies: changes("NetworkPolicy", policies),
        approvals: changes("ApprovalRequest", requests),
    };
    (stores, streams)
}

type Events<K> = watcher::Result<watcher::Event<K>>;

fn guarded<K>(
    client: &Client,
    config: watcher::Config,
    metrics: &Metrics,
) -> impl Stream<Item = Events<Lenient<K>>> + Send + 'static + use<K>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
{
    watcher(Api::<Lenient<K>>::all(client.clone()), config).backoff(contact::pauses()).inspect(report::<K>(metrics))
}

/// Counts and logs objects that cannot be decoded, once each time they change, because an unchanged object sends no event.
fn report<K: Resource<DynamicType = ()>>(metrics: &Metrics) -> impl Fn(&Events<Lenient<K>>) + Send + 'static + use<K> {
    let counter = metrics.undecodable.clone();
    move |event| {
        let object = match event {
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => object,
            _ => return,
        };
        if let Err(invalid) = &object.0 {
            counter.with_label_values(&[&*K::kind(&())]).inc();
            tracing::warn!(
                kind = %K::kind(&()), namespace = invalid.metadata.namespace, name = invalid.metadata.name, error = invalid.error,
                "an object cannot be read and is passed over"
            );
        }
    }
}

/// Returns the metadata of an attempt's object that an event is about, even if it was deleted, and the UID of its task.
fn touched<K: Resource>(event: &Events<K>) -> Option<(&str, &ObjectMeta)> {
    let Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object) | watcher::Event::Delete(object)) = event
    else {
        return None;
    };
    let task = object.meta().labels.as_ref()?.get(names::TASK_UID)?;
    Some((task, object.meta()))
}

/// Checks whether an object is the written one, at that version or a later one. Versions are increasing numbers.
fn includes(shown: &ObjectMeta, written: &ObjectMeta) -> bool {
    let version = |metadata: &ObjectMeta| metadata.resource_version.as_deref().and_then(expectations::number);
    shown.uid == written.uid && version(written).is_some_and(|written| version(shown) >= Some(written))
}

fn seen(memories: &Expectations, task: &GuardedTask) {
    let Some(uid) = &task.meta().uid else { return };
    if task.0.as_ref().is_ok_and(|task| task.status.as_ref().is_none_or(|status| status.phase.is_none())) {
        memories.see(uid);
    }
    memories.cached(uid, task.meta().resource_version.as_deref());
}
