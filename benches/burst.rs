//! Measures the time from apply until the pod is created, for 200 tasks that 8 clients post at once. The baseline is plain pods posted in
//! the same way. The pods request more CPU than there is, so that only the API server and the operator are measured.

use std::{path::Path, sync::Arc, time::Instant};

use anyhow::Context;
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{DeleteParams, PostParams},
};
use serde_json::json;

use crate::{
    Measure,
    cluster::{Cluster, Seen},
    percentile,
    start::millis,
};

const TASKS: usize = 200;
const CLIENTS: usize = 8;
/// The number of rounds that count. The two sides take turns, and a burst begins when the previous one is gone. One more round comes first
/// and does not count: after an installation, the API server must fill its caches and load its types, for plain pods as for tasks.
const ROUNDS: usize = 3;
const CPU: &str = "900";

pub async fn burst() -> anyhow::Result<Vec<Measure>> {
    let cluster = Arc::new(Cluster::new("burst").await?);
    let (mut plain, mut ours) = (Vec::new(), Vec::new());
    let mut resident = 0.0_f64;
    for round in 0..=ROUNDS {
        if round == 1 {
            (plain, ours) = (Vec::new(), Vec::new());
        }
        plain.extend(post(&cluster, &format!("plain-{round}"), "").await?);
        cluster.api::<Pod>().delete_collection(&DeleteParams::default().grace_period(0), &Default::default()).await?;
        cluster.settle().await?;
        ours.extend(post(&cluster, &format!("task-{round}"), "-1").await?);
        resident = resident.max(operator_rss()?);
        cluster.end_tasks().await?;
        cluster.settle().await?;
    }
    cluster.clean().await?;
    let baseline = percentile(&mut plain, 50.0);
    let tail = percentile(&mut plain, 99.0);
    Ok(vec![
        Measure::absolute("start.burst.p50", percentile(&mut ours, 50.0), "ms", ours.len(), 400.0).beside(baseline),
        Measure::absolute("start.burst.p99", percentile(&mut ours, 99.0), "ms", ours.len(), 800.0).beside(tail),
        Measure::absolute("start.burst.operator-rss", resident, "MB", 1, 60.0),
    ])
}

/// Posts all objects of a kind, and returns for each the time until its pod was seen.
async fn post(cluster: &Arc<Cluster>, kind: &str, suffix: &'static str) -> anyhow::Result<Vec<f64>> {
    let clients = (0..CLIENTS).map(|client| {
        let (cluster, kind) = (cluster.clone(), kind.to_owned());
        tokio::spawn(async move {
            // A connection of its own, as 8 users would have.
            let api = Client::try_default().await?;
            let mut posted = Vec::new();
            for n in (client..TASKS).step_by(CLIENTS) {
                let name = format!("{kind}-{n}");
                let at = Instant::now();
                if suffix.is_empty() {
                    let pods: Api<Pod> = Api::namespaced(api.clone(), &cluster.namespace);
                    pods.create(&PostParams::default(), &pod(&name)?).await?;
                } else {
                    let tasks: Api<belay::api::AgentTask> = Api::namespaced(api.clone(), &cluster.namespace);
                    let task = serde_json::from_value(cluster.task(&name, "localhost/box:1", CPU))?;
                    tasks.create(&PostParams::default(), &task).await?;
                }
                posted.push((format!("{name}{suffix}"), at));
            }
            anyhow::Ok(posted)
        })
    });
    let mut elapsed = Vec::new();
    for posted in try_join_all(clients).await? {
        for (pod, at) in posted? {
            let seen = cluster.clock.wait(&pod, |seen: &Seen| Some(seen.created)).await?;
            elapsed.push(millis(seen.saturating_duration_since(at)));
        }
    }
    Ok(elapsed)
}

fn pod(name: &str) -> anyhow::Result<Pod> {
    Ok(serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "automountServiceAccountToken": false,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "agent", "image": "localhost/box:1", "command": ["/bin/sleep", "300"],
                "resources": {"requests": {"cpu": CPU}},
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
            }],
        },
    }))?)
}

/// Returns the resident memory of the leading operator: the largest of the processes of that name on this machine, because a standby has no
/// stores.
fn operator_rss() -> anyhow::Result<f64> {
    let mut largest: Option<f64> = None;
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let status = std::fs::read_to_string(entry.path().join(Path::new("status"))).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if field("Name:").is_some_and(|name| name.starts_with("belay-operator"))
            && let Some(kib) = field("VmRSS:").and_then(|rss| rss.split(' ').next()?.parse::<f64>().ok())
        {
            largest = Some(largest.unwrap_or(0.0).max(kib * 1024.0 / 1e6));
        }
    }
    largest.context("no belay-operator process on this machine: the test cluster runs its pods here")
}
