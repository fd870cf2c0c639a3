//! A namespace and a pack for one benchmark, and a clock that observes pods.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::Context;
use belay::{
    api::{AgentTask, PolicyPack},
    render::names::TASK_UID,
};
use futures::TryStreamExt;
use k8s_openapi::api::{
    core::v1::{ConfigMap, Namespace, Pod},
    networking::v1::NetworkPolicy,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
    runtime::{WatchStreamExt, watcher},
};
use serde_json::{Value, json};

pub struct Cluster {
    pub client: Client,
    pub namespace: String,
    pub clock: Clock,
}

impl Cluster {
    pub async fn new(name: &str) -> anyhow::Result<Self> {
        let client = Client::try_default().await.context("no cluster: run this with `make bench`")?;
        let namespace = format!("belay-bench-{name}");
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let manifest = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {
            "name": namespace, "labels": {"belay.dev/environment": namespace, "pod-security.kubernetes.io/enforce": "restricted"},
        }});
        namespaces.patch(&namespace, &PatchParams::apply("bench"), &Patch::Apply(manifest)).await?;
        let packs: Api<PolicyPack> = Api::all(client.clone());
        let bucket = std::env::var("S3_BUCKET").unwrap_or_else(|_| "belay-evidence".into());
        let pack = json!({"apiVersion": "belay.dev/v1alpha1", "kind": "PolicyPack", "metadata": {"name": namespace}, "spec": {
            "environment": "bench",
            "namespaceSelector": {"matchLabels": {"belay.dev/environment": namespace}},
            "workflowClasses": [{
                "name": "bench", "runtimeClassName": "gvisor", "egress": [], "allowedEffects": ["read"],
                "limits": {"wallTimeSeconds": 600, "toolCalls": 1, "tokens": 1},
                "resources": {"cpu": "900", "memory": "256Mi", "ephemeralStorage": "64Mi"},
            }],
            "evidence": {"bucket": bucket, "prefix": "bench", "mode": "Governance", "retentionDays": 1},
        }});
        packs.patch(&namespace, &PatchParams::apply("bench"), &Patch::Apply(pack)).await?;
        let clock = Clock::start(Api::namespaced(client.clone(), &namespace)).await?;
        // The operator's caches must have received the pack.
        tokio::time::sleep(Duration::from_secs(1)).await;
        Ok(Self { client, namespace, clock })
    }

    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Returns a task that requests this much CPU.
    pub fn task(&self, name: &str, image: &str, cpu: &str) -> Value {
        json!({"apiVersion": "belay.dev/v1alpha1", "kind": "AgentTask", "metadata": {"name": name}, "spec": {
            "objective": "be measured", "workflowClass": "bench", "principal": "bench",
            "agent": {"image": image, "command": ["/bin/sleep"], "args": ["300"], "resources": {"cpu": cpu, "memory": "32Mi"}},
            "limits": {"wallTimeSeconds": 600, "toolCalls": 0, "tokens": 0},
            "retry": {"agent": 0, "infrastructure": 0},
        }})
    }

    /// Deletes all tasks and waits until they are gone.
    pub async fn end_tasks(&self) -> anyhow::Result<()> {
        let tasks: Api<AgentTask> = self.api();
        tasks.delete_collection(&DeleteParams::default(), &Default::default()).await?;
        let end = Instant::now() + Duration::from_secs(300);
        while !tasks.list(&Default::default()).await?.items.is_empty() {
            anyhow::ensure!(Instant::now() < end, "tasks of {} do not go away", self.namespace);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Ok(())
    }

    /// Waits until the namespace is empty, including garbage collection, and the controllers have had a moment to become idle.
    pub async fn settle(&self) -> anyhow::Result<()> {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            let mine = ListParams::default().labels(TASK_UID);
            let left = self.api::<Pod>().list_metadata(&ListParams::default()).await?.items.len()
                + self.api::<ConfigMap>().list_metadata(&mine).await?.items.len()
                + self.api::<NetworkPolicy>().list_metadata(&mine).await?.items.len();
            if left == 0 {
                tokio::time::sleep(Duration::from_secs(3)).await;
                return Ok(());
            }
            anyhow::ensure!(Instant::now() < end, "{left} objects of {} do not go away", self.namespace);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Deletes everything, tasks first.
    pub async fn clean(&self) -> anyhow::Result<()> {
        self.end_tasks().await?;
        let end = Instant::now() + Duration::from_secs(120);
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        namespaces.delete(&self.namespace, &DeleteParams::default()).await?;
        // The next run needs the name.
        while namespaces.get_opt(&self.namespace).await?.is_some() {
            anyhow::ensure!(Instant::now() < end, "namespace {} does not go away", self.namespace);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Api::<PolicyPack>::all(self.client.clone()).delete(&self.namespace, &DeleteParams::default()).await?;
        Ok(())
    }
}

/// When pods were first seen and first seen ready, over one long-lived watch.
#[derive(Clone, Default)]
pub struct Clock(Arc<Mutex<HashMap<String, Seen>>>);

#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub created: Instant,
    pub ready: Option<Instant>,
}

impl Clock {
    async fn start(pods: Api<Pod>) -> anyhow::Result<Self> {
        let clock = Self::default();
        let seen = clock.0.clone();
        let (synced, wait) = tokio::sync::oneshot::channel();
        let mut synced = Some(synced);
        tokio::spawn(async move {
            let mut events = std::pin::pin!(watcher(pods, watcher::Config::default()).default_backoff());
            while let Ok(Some(event)) = events.try_next().await {
                let now = Instant::now();
                if matches!(event, watcher::Event::InitDone)
                    && let Some(synced) = synced.take()
                {
                    let _ = synced.send(());
                }
                let watcher::Event::Apply(pod) = event else { continue };
                let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
                let ready = conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"));
                let Ok(mut seen) = seen.lock() else { return };
                let entry = seen.entry(pod.name_any()).or_insert(Seen { created: now, ready: None });
                if ready && entry.ready.is_none() {
                    entry.ready = Some(now);
                }
            }
        });
        wait.await.context("the watch on pods did not start")?;
        Ok(clock)
    }

    /// Waits until `wanted` returns a time for this pod.
    pub async fn wait(&self, pod: &str, wanted: impl Fn(&Seen) -> Option<Instant>) -> anyhow::Result<Instant> {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            if let Some(at) = self.0.lock().ok().and_then(|seen| seen.get(pod).and_then(&wanted)) {
                return Ok(at);
            }
            anyhow::ensure!(Instant::now() < end, "pod {pod} was not seen as wanted within 120 s");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}
