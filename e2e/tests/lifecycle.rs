//! The life of tasks: how they converge, that their logs are sealed, and how few writes they cost.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use belay::{
    api::{AgentTask, agent_task::Phase},
    ends::FailureClass,
};
use k8s_openapi::api::{core::v1::Pod, networking::v1::NetworkPolicy};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};

use crate::support::{SYSTEM, World, as_operator, class, condition, phase, setting};

fn python(program: &str) -> Value {
    json!({"agent": {"command": ["python3", "-S", "-c"], "args": [program]}})
}

async fn world(name: &str) -> World {
    let docs = json!([{"host": "docs.world.test", "uses": ["Direct"]}]);
    World::new(name, json!([class("gvisor", "gvisor", docs.clone()), class("runc", "runc", docs)])).await
}

fn failure(task: &AgentTask) -> (Option<FailureClass>, Option<String>) {
    let status = task.status.clone().unwrap_or_default();
    (status.failure_class, status.reason)
}

/// Returns the writes of Belay's components since `since`, from the API server's audit log, as `user verb resource/name`.
fn writes(since: jiff::Timestamp, about: &str) -> Vec<String> {
    let log = std::fs::read_to_string(setting("BELAY_AUDIT_LOG")).expect("the API server keeps no audit log");
    let mut found = Vec::new();
    for event in log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let user = event["user"]["username"].as_str().unwrap_or_default();
        let at: Option<jiff::Timestamp> = event["requestReceivedTimestamp"].as_str().and_then(|at| at.parse().ok());
        let resource = event["objectRef"]["resource"].as_str().unwrap_or_default();
        let ours = user.starts_with(&format!("system:serviceaccount:{SYSTEM}:"));
        if !ours || at.is_none_or(|at| at < since) || matches!(resource, "events" | "leases") {
            continue;
        }
        let name = event["objectRef"]["name"].as_str().unwrap_or_default();
        let namespace = event["objectRef"]["namespace"].as_str().unwrap_or_default();
        // A TokenReview names no task, so this counts all of them: no other test runs on the cluster at the same time.
        if resource == "tokenreviews" || namespace == about {
            let sub = event["objectRef"]["subresource"].as_str().unwrap_or_default();
            let user = user.rsplit(':').next().unwrap_or_default();
            found.push(format!("{user} {} {resource}/{sub} {name}", event["verb"].as_str().unwrap_or_default()));
        }
    }
    found
}

/// Waits until the API server has written its audit log, which it writes in batches.
async fn settle() {
    tokio::time::sleep(Duration::from_secs(3)).await;
}

#[tokio::test]
async fn a_task_succeeds_is_sealed_verifies_and_costs_at_most_ten_writes() {
    let world = world("writes").await;
    let since = jiff::Timestamp::now();
    world.task("short", python("print('done')")).await;
    let task = world.ended("short", 90).await;
    assert_eq!(phase(&task), Some(Phase::Succeeded), "{:?}", task.status);
    let (code, report) = world.verify("short");
    assert_eq!((code, report["verdict"].as_str()), (0, Some("VALID")), "{report:#}");
    settle().await;
    let all = writes(since, &world.namespace);
    eprintln!("writes of one task: {}\n  {}", all.len(), all.join("\n  "));
    assert!(!all.is_empty(), "the audit log shows no write of ours: the count shows nothing");
    assert!(all.len() <= 10, "{} writes: {all:#?}", all.len());

    // A second reconciliation of an ended task writes nothing. A change of its pack and a restart of the operator cause the reconciliation.
    let since = jiff::Timestamp::now();
    let packs: Api<belay::api::PolicyPack> = Api::all(world.client.clone());
    let touch = json!({"metadata": {"annotations": {"e2e/touched": "yes"}}});
    packs.patch(&world.namespace, &PatchParams::default(), &Patch::Merge(touch)).await.unwrap();
    restart(&world, "belay-operator").await;
    settle().await;
    let again: Vec<String> =
        writes(since, &world.namespace).into_iter().filter(|write| !write.contains("tokenreviews")).collect();
    assert!(again.is_empty(), "a settled task was written to again: {again:#?}");
    world.clean().await;
}

/// Deletes all pods of one of Belay's Deployments, and waits until the new ones are ready.
async fn restart(world: &World, name: &str) {
    let pods: Api<Pod> = Api::namespaced(world.client.clone(), SYSTEM);
    let select = ListParams::default().labels(&format!("app.kubernetes.io/name={name}"));
    let old: Vec<String> = pods.list(&select).await.unwrap().iter().filter_map(ResourceExt::uid).collect();
    assert!(!old.is_empty(), "no pod of {name}");
    pods.delete_collection(&DeleteParams::default(), &select).await.unwrap();
    let end = Instant::now() + Duration::from_secs(90);
    loop {
        let now = pods.list(&select).await.unwrap();
        let ready = now.iter().filter(|pod| {
            let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
            !old.contains(&pod.uid().unwrap_or_default())
                && conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
        });
        if ready.count() >= old.len() {
            return;
        }
        assert!(Instant::now() < end, "{name} did not come back");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

#[tokio::test]
async fn a_deleted_pod_is_an_infrastructure_failure_and_tried_again() {
    let world = world("podlost").await;
    world.task("again", python("import os, time; time.sleep(1 if os.environ['BELAY_ATTEMPT'] == '2' else 60)")).await;
    world.wait("again", "running", 60, |task| phase(task) == Some(Phase::Running)).await;
    world.api::<Pod>().delete("again-1", &DeleteParams::default().grace_period(0)).await.unwrap();
    let task = world.ended("again", 120).await;
    assert_eq!(phase(&task), Some(Phase::Succeeded), "{:?}", task.status);
    let attempts = task.status.unwrap().attempts;
    assert_eq!(attempts.len(), 2, "{attempts:?}");
    assert_eq!(attempts[0].failure_class, Some(FailureClass::Infrastructure));
    let (code, report) = world.verify("again");
    assert_eq!(code, 0, "{report:#}");
    world.clean().await;
}

#[tokio::test]
async fn a_failing_agent_fails_its_task_by_its_own_class() {
    let world = world("agentfails").await;
    world.task("fails", python("raise SystemExit(3)")).await;
    let task = world.ended("fails", 90).await;
    assert_eq!(phase(&task), Some(Phase::Failed));
    assert_eq!(failure(&task).0, Some(FailureClass::Agent), "{:?}", task.status);
    let (code, report) = world.verify("fails");
    assert_eq!(code, 0, "a failed run's evidence is as complete as any: {report:#}");
    world.clean().await;
}

#[tokio::test]
async fn wall_time_ends_a_task_for_good() {
    let world = world("walltime").await;
    let mut spec = python("import time; time.sleep(600)");
    spec["limits"] = json!({"wallTimeSeconds": 3});
    spec["retry"] = json!({"agent": 3, "infrastructure": 3});
    world.task("slow", spec).await;
    let task = world.ended("slow", 120).await;
    assert_eq!(failure(&task).0, Some(FailureClass::Budget), "{:?}", task.status);
    assert_eq!(task.status.as_ref().unwrap().attempts.len(), 1);
    world.clean().await;
}

#[tokio::test]
async fn too_many_refused_calls_end_a_task_for_good() {
    let world = world("refused").await;
    let program = "import time, urllib.request\nwhile True:\n  try: urllib.request.urlopen('http://evil.world.test/')\n  except Exception as e: print(e)\n  time.sleep(0.2)";
    let mut spec = python(program);
    spec["limits"] = json!({"denials": 3});
    spec["retry"] = json!({"agent": 2});
    world.task("curious", spec).await;
    let task = world.ended("curious", 120).await;
    assert_eq!(failure(&task), (Some(FailureClass::Policy), Some("TooManyDenials".into())));
    assert_eq!(task.status.as_ref().unwrap().attempts.len(), 1);
    let (code, report) = world.verify("curious");
    assert_eq!((code, report["verdict"].as_str()), (0, Some("VALID")), "{report:#}");
    assert_eq!(report["summary"]["denials"]["egress.host"], 3, "{report:#}");
    world.clean().await;
}

/// Denials come faster than each could have its own record, then the attempt fails, and the task is retried. All denials are counted.
#[tokio::test]
async fn a_flood_of_refusals_is_counted_to_the_last_and_the_task_tried_again() {
    let world = world("flood").await;
    let program = "
import os, http.client, concurrent.futures
def ask(n):
    connection = http.client.HTTPConnection('127.0.0.1', 9900, timeout=60)
    connection.request('GET', 'http://evil.world.test/')
    return connection.getresponse().status
if os.environ['BELAY_ATTEMPT'] == '1':
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        told = list(pool.map(ask, range(400)))
    raise SystemExit(3 if set(told) == {403} else 4)
print('done')";
    let mut spec = python(program);
    spec["retry"] = json!({"agent": 1});
    world.task("again", spec).await;
    let task = world.ended("again", 180).await;
    assert_eq!(phase(&task), Some(Phase::Succeeded), "{:?}", task.status);
    let attempts = task.status.unwrap().attempts;
    assert_eq!(attempts.iter().map(|one| one.failure_class).collect::<Vec<_>>(), [Some(FailureClass::Agent), None]);
    let (code, report) = world.verify("again");
    assert_eq!((code, report["verdict"].as_str()), (0, Some("VALID")), "{report:#}");
    assert_eq!(report["summary"]["denials"]["egress.host"], 400, "{report:#}");
    let records = report["summary"]["kinds"]["call.denied"].as_u64().unwrap();
    assert!((64..200).contains(&records), "{records} records of 400 refusals");
    world.clean().await;
}

#[tokio::test]
async fn deleting_a_running_task_ends_its_pod_seals_its_evidence_and_lets_go() {
    let world = world("deleted").await;
    world.task("gone", python("import time; time.sleep(300)")).await;
    let task = world.wait("gone", "running", 60, |task| phase(task) == Some(Phase::Running)).await;
    let uid = task.uid().unwrap();
    // The phase `Running` says that the pod exists. The log starts only when the harness does.
    tokio::time::sleep(Duration::from_secs(3)).await;
    world.api::<AgentTask>().delete("gone", &DeleteParams::default()).await.unwrap();
    let end = Instant::now() + Duration::from_secs(90);
    while world.api::<AgentTask>().get_opt("gone").await.unwrap().is_some() {
        assert!(Instant::now() < end, "the deleted task does not go away");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    // The garbage collector removes an ended pod, so it may still exist.
    let pod = world.api::<Pod>().get_opt("gone-1").await.unwrap();
    let phase = pod.and_then(|pod| pod.status?.phase);
    assert!(matches!(phase.as_deref(), None | Some("Succeeded" | "Failed")), "its pod still runs: {phase:?}");
    let keys: Api<k8s_openapi::api::core::v1::ConfigMap> = Api::namespaced(world.client.clone(), SYSTEM);
    let key = keys.get("belay-witness-key").await.unwrap().data.unwrap()["vkey"].clone();
    let location = format!("s3://{}/e2e/{}/gone/{uid}", setting("S3_BUCKET"), world.namespace);
    let endpoint = setting("S3_ENDPOINT");
    let output = crate::support::belay(&[
        "verify",
        &location,
        "--endpoint",
        &endpoint,
        "--path-style",
        "--witness-key",
        &key,
        "--output",
        "json",
    ]);
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(output.status.code(), Some(0), "{report:#}");
    world.clean().await;
}

#[tokio::test]
async fn a_cluster_that_does_not_enforce_ends_in_containment_unproven() {
    let world = world("unproven").await;
    // NetworkPolicies are additive: this one allows what Belay's policy blocks, like a network that enforces nothing.
    let open = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "open"},
        "spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]},
    });
    let policies: Api<NetworkPolicy> = Api::namespaced(as_operator().await, &world.namespace);
    policies.patch("open", &PatchParams::apply("e2e"), &Patch::Apply(open)).await.unwrap();
    let mut spec = python("print('I ran')");
    spec["retry"] = json!({"infrastructure": 0});
    world.task("open", spec).await;
    let task = world.ended("open", 120).await;
    assert_eq!(
        failure(&task),
        (Some(FailureClass::Infrastructure), Some("ContainmentUnproven".into())),
        "{:?}",
        task.status
    );
    assert!(condition(&task, "Contained", "False").is_some(), "{:?}", task.status);
    let pod = world.api::<Pod>().get("open-1").await.unwrap();
    let started = pod.status.unwrap().container_statuses.unwrap_or_default();
    assert!(
        started
            .iter()
            .all(|c| c.state.as_ref().is_none_or(|state| state.running.is_none() && state.terminated.is_none())),
        "a byte of the agent ran: {started:?}"
    );
    world.clean().await;
}

#[tokio::test]
async fn a_deleted_network_policy_comes_back_while_the_agent_runs() {
    let world = world("policyback").await;
    world.task("held", python("import time; time.sleep(60)")).await;
    world.wait("held", "running", 60, |task| phase(task) == Some(Phase::Running)).await;
    let policies: Api<NetworkPolicy> = Api::namespaced(as_operator().await, &world.namespace);
    let before = policies.get("held-1").await.unwrap();
    policies.delete("held-1", &DeleteParams::default()).await.unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(after) = policies.get_opt("held-1").await.unwrap()
            && after.uid() != before.uid()
        {
            assert_eq!(after.spec, before.spec);
            break;
        }
        assert!(Instant::now() < end, "the NetworkPolicy did not come back");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    world.clean().await;
}

#[tokio::test]
async fn pods_of_tasks_are_hardened() {
    let world = world("hardened").await;
    world.task("hard", python("import time; time.sleep(30)")).await;
    world.wait("hard", "running", 60, |task| phase(task) == Some(Phase::Running)).await;
    let pod = world.api::<Pod>().get("hard-1").await.unwrap();
    let spec = pod.spec.unwrap();
    assert_eq!(spec.automount_service_account_token, Some(false));
    assert_eq!(spec.enable_service_links, Some(false));
    assert_eq!(spec.dns_policy.as_deref(), Some("None"));
    assert_eq!(spec.runtime_class_name.as_deref(), Some("gvisor"));
    assert!(spec.active_deadline_seconds.is_some());
    let init: Vec<_> = spec.init_containers.unwrap_or_default();
    assert_eq!(init.first().map(|c| c.name.as_str()), Some("containment-probe"));
    let mounts: BTreeMap<String, Vec<String>> = spec
        .containers
        .iter()
        .chain(&init)
        .map(|c| (c.name.clone(), c.volume_mounts.iter().flatten().map(|m| m.mount_path.clone()).collect()))
        .collect();
    let with_token: Vec<&String> = mounts
        .iter()
        .filter(|(_, paths)| paths.iter().any(|p| p.starts_with("/var/run/belay")))
        .map(|(n, _)| n)
        .collect();
    assert_eq!(with_token, ["harness"], "{mounts:?}");
    for container in spec.containers.iter().chain(&init) {
        let context = container.security_context.as_ref().unwrap();
        assert_eq!(context.read_only_root_filesystem, Some(true), "{}", container.name);
        assert_eq!(context.allow_privilege_escalation, Some(false), "{}", container.name);
        let limits = container.resources.as_ref().and_then(|r| r.limits.clone()).unwrap_or_default();
        assert!(limits.contains_key("ephemeral-storage"), "{}", container.name);
    }
    world.clean().await;
}
