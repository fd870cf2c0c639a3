//! Measures the time from apply until the pod is Ready, including the containment proof and the opened evidence log. The baseline is the
//! same pod created by hand.
//!
//! The pod by hand is a copy of the attempt's own pod without the probe and without what only the operator can provide (labels, owner,
//! token). A sidecar in the same kind of sandbox answers the same startup probe and does nothing else. The work of the harness before it is
//! ready, such as opening the log and storing its first record, counts for Belay only.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::{Measure, cluster::Cluster, percentile};

const RUNS: usize = 10;
/// Any image with busybox works, because the benchmark measures the start, not the agent.
const IMAGE: &str = "localhost/box:1";

pub async fn ready() -> anyhow::Result<Vec<Measure>> {
    let cluster = Cluster::new("start").await?;
    let (mut ours, mut by_hand) = (Vec::new(), Vec::new());
    let mut template = None;
    // One pair more than is counted: the first pair warms caches, and its pod is the one that is copied.
    for run in 0..=RUNS {
        let (name, elapsed) = task(&cluster, run).await?;
        let pods: Api<Pod> = cluster.api();
        if template.is_none() {
            template = Some(copy(serde_json::to_value(pods.get(&name).await?)?));
        }
        end(&pods, &name).await?;
        let Some(pod) = &template else { continue };
        let hand = make(&cluster, pod, run).await?;
        if run > 0 {
            ours.push(elapsed);
            by_hand.push(hand);
        }
    }
    cluster.clean().await?;
    let baseline = percentile(&mut by_hand, 50.0);
    let tail = percentile(&mut by_hand, 99.0);
    Ok(vec![
        Measure::against("start.ready.p50", percentile(&mut ours, 50.0), "ms", RUNS, baseline, 1.5),
        Measure::against("start.ready.p99", percentile(&mut ours, 99.0), "ms", RUNS, tail, 1.5),
    ])
}

async fn task(cluster: &Cluster, run: usize) -> anyhow::Result<(String, f64)> {
    let name = format!("ours-{run}");
    let manifest = cluster.task(&name, IMAGE, "50m");
    let started = Instant::now();
    let tasks: Api<belay::api::AgentTask> = cluster.api();
    tasks.patch(&name, &PatchParams::apply("bench"), &Patch::Apply(manifest)).await?;
    let pod = format!("{name}-1");
    let at = cluster.clock.wait(&pod, |seen| seen.ready).await?;
    Ok((pod, millis(at - started)))
}

async fn make(cluster: &Cluster, template: &Value, run: usize) -> anyhow::Result<f64> {
    let name = format!("hand-{run}");
    let mut pod = template.clone();
    pod["metadata"]["name"] = json!(name);
    let pod = serde_json::from_value(pod)?;
    let pods: Api<Pod> = cluster.api();
    let started = Instant::now();
    pods.create(&PostParams::default(), &pod).await?;
    let at = cluster.clock.wait(&name, |seen| seen.ready).await?;
    end(&pods, &name).await?;
    Ok(millis(at - started))
}

/// Deletes a pod and waits, so that both sides start on an idle node.
async fn end(pods: &Api<Pod>, name: &str) -> anyhow::Result<()> {
    pods.delete(name, &DeleteParams::default().grace_period(0)).await?;
    while pods.get_opt(name).await?.is_some() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::time::sleep(Duration::from_millis(700)).await;
    Ok(())
}

fn copy(mut pod: Value) -> Value {
    let spec = &mut pod["spec"];
    if let Some(init) = spec["initContainers"].as_array_mut() {
        init.retain(|container| container["name"] == "harness");
        for container in init {
            container["image"] = json!(IMAGE);
            container["command"] = json!(["/bin/sh", "-c"]);
            container["args"] =
                json!(["mkdir -p /tmp/www && touch /tmp/www/readyz && exec httpd -f -p 9901 -h /tmp/www"]);
            container["volumeMounts"] = json!([{"name": "www", "mountPath": "/tmp"}]);
        }
    }
    for container in spec["containers"].as_array_mut().into_iter().flatten() {
        container["volumeMounts"] = json!([]);
    }
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {},
        "spec": {
            "runtimeClassName": spec["runtimeClassName"], "restartPolicy": "Never",
            "automountServiceAccountToken": false, "enableServiceLinks": false,
            "dnsPolicy": spec["dnsPolicy"], "dnsConfig": spec["dnsConfig"],
            "securityContext": spec["securityContext"],
            "initContainers": spec["initContainers"], "containers": spec["containers"],
            "volumes": [{"name": "www", "emptyDir": {}}],
        },
    })
}

pub fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
