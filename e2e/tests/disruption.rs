//! The demo with a disruption: the loss of an agent's pod, an operator or a gateway changes nothing in its result but the number of
//! attempts.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use belay::api::{AgentTask, agent_task::Phase};
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Pod};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams},
};
use serde_json::{Value, json};

use crate::support::{SYSTEM, World, phase, setting};

const CONTRACTS: &str = include_str!("../demo/manifests/contracts.yaml");
const TASK: &str = include_str!("../demo/manifests/task.yaml");
/// The rules of the demo's denials.
const DENIED: [&str; 4] = ["tool.unknown", "tool.precondition", "egress.host", "budget.toolCalls"];

/// The pod that the test deletes during the run.
#[derive(Clone, Copy, PartialEq)]
enum Victim {
    Attempt,
    Operator,
    Gateway,
}

/// Returns the file with the ticket service's tickets. All tests share it, so they run one after the other.
fn tickets() -> PathBuf {
    PathBuf::from(setting("CACHE")).join("world/tickets.jsonl")
}

/// Runs the demo in a namespace of its own, and deletes the victim's pod once the agent's first tool call is on record.
async fn disturbed(name: &str, victim: Victim) {
    let world = World::governed(name, "dev").await;
    std::fs::write(tickets(), "").expect("the world is not up");
    let ca = std::fs::read_to_string(PathBuf::from(setting("CACHE")).join("world/ca.crt")).unwrap();
    world.config_map("world-ca", &[("ca.crt", &ca)]).await;
    world.kubectl_apply(&CONTRACTS.replace("namespace: belay-demo", &format!("namespace: {}", world.namespace)));
    world.kubectl_apply(&TASK.replace("namespace: belay-demo", &format!("namespace: {}", world.namespace)));

    first_tool_call(&world).await;
    assert_eq!(std::fs::read_to_string(tickets()).unwrap(), "", "the ticket was open before the disruption: too late");
    match victim {
        Victim::Attempt => {
            world.api::<Pod>().delete("triage-1", &DeleteParams::default()).await.unwrap();
        }
        Victim::Operator => {
            let leases: Api<Lease> = Api::namespaced(world.client.clone(), SYSTEM);
            let leader = leases.get("belay-operator").await.unwrap().spec.unwrap().holder_identity.unwrap();
            system_pods(&world).delete(&leader, &DeleteParams::default()).await.unwrap();
        }
        Victim::Gateway => {
            let select = ListParams::default().labels("app.kubernetes.io/name=belay-gateway");
            let pods = system_pods(&world).list(&select).await.unwrap().items;
            assert!(pods.len() >= 2, "the demo's gateway has {} replicas", pods.len());
            system_pods(&world).delete(&pods[0].name_any(), &DeleteParams::default()).await.unwrap();
        }
    }

    let task = world.ended("triage", 180).await;
    assert_eq!(phase(&task), Some(Phase::Succeeded), "{:?}", task.status);
    let attempts = task.status.unwrap().attempts;
    assert_eq!(attempts.len(), if victim == Victim::Attempt { 2 } else { 1 }, "{attempts:?}");
    let opened = std::fs::read_to_string(tickets()).unwrap();
    assert_eq!(opened.lines().count(), 1, "{opened}");
    let ticket: Value = serde_json::from_str(&opened).unwrap();
    assert_eq!(ticket["title"], "checkout: payments-db connections exhausted");
    let (code, report) = world.verify("triage");
    assert_eq!((code, &report["verdict"]), (0, &json!("VALID")), "{report:#}");
    for rule in DENIED {
        assert!(report["summary"]["denials"][rule].as_u64() >= Some(1), "{rule} denied nothing: {report:#}");
    }
    world.clean().await;
}

fn system_pods(world: &World) -> Api<Pod> {
    Api::namespaced(world.client.clone(), SYSTEM)
}

/// Waits until the first attempt's log has a tool call.
async fn first_tool_call(world: &World) {
    world.wait("triage", "running", 90, |task: &AgentTask| phase(task) == Some(Phase::Running)).await;
    let end = Instant::now() + Duration::from_secs(60);
    let is_tool_call = |record: &Value| record["kind"] == "call.intent" && record["channel"] == "tool";
    while !world.records("triage-1").await.iter().any(is_tool_call) {
        assert!(Instant::now() < end, "the agent called no tool within 60 s");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn the_demo_survives_the_loss_of_its_pod() {
    disturbed("losepod", Victim::Attempt).await;
}

#[tokio::test]
async fn the_demo_survives_the_loss_of_the_leading_operator() {
    disturbed("loseoperator", Victim::Operator).await;
}

#[tokio::test]
async fn the_demo_survives_the_loss_of_a_gateway() {
    disturbed("losegateway", Victim::Gateway).await;
}
