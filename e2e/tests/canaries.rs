//! An agent on a cluster puts secrets into everything that it can say, in every way to write them. None of the secrets is in the evidence
//! bucket, in the logs of Belay's components, in metrics, in the task's status or in an Event. Every decision still follows from the log.

use std::{collections::BTreeSet, io::Write};

use belay::{
    api::{AgentTask, agent_task::Phase},
    evidence::store::log_prefix,
};
use flate2::{Compression, write::GzEncoder};
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Event, Pod},
};
use kube::{
    Api, ResourceExt,
    api::{ListParams, PostParams},
};
use serde_json::{Value, json};

use crate::{
    locks::store,
    secrets::{found, marks, secrets, written},
    support::{SYSTEM, World, class, merge, phase, setting, system_logs, ticket_contract},
};

const SLIP: &str = include_str!("../canaries/slip.py");

/// Creates a namespace with tools that read, that write, that repeat their arguments when they fail, and that have a precondition that is
/// false.
async fn world() -> World {
    let credentials = |secret: &str| json!([{"secret": secret, "key": "token"}]);
    let egress = json!([
        {"host": "tickets.world.test", "uses": ["Tools"], "credentials": credentials("world-ticket-key")},
        {"host": "models.world.test", "uses": ["Models"], "credentials": credentials("world-model-key")},
        {"host": "docs.world.test", "ports": [80, 443], "uses": ["Direct"]},
        {"host": "*.wild.world.test", "uses": ["Direct"]},
    ]);
    let mut class = class("gvisor", "gvisor", egress);
    merge(&mut class, json!({"limits": {"wallTimeSeconds": 900, "toolCalls": 100_000, "tokens": 1_000_000_000}}));
    let world = World::new("canaries", json!([class])).await;
    let number = json!({"sideEffect": "read", "preconditions": [{"name": "number", "cel": "int(args.service) > 0", "message": "expected a number"}]});
    let once = json!({"input": {"required": ["idempotency_key"]}, "idempotency": {"argument": "idempotency_key", "windowSeconds": 600}});
    for manifest in [
        ticket_contract("query-tickets", "query_tickets", &["service"], json!({"sideEffect": "read"})),
        ticket_contract("number", "query_tickets", &["service"], number),
        ticket_contract("close-ticket", "close_ticket", &["title", "why"], json!({})),
        ticket_contract("open-ticket", "open_ticket", &["title", "severity", "body", "idempotency_key"], once),
    ] {
        world.kubectl_apply(&manifest);
    }
    world
}

/// Returns all objects of a task in the evidence bucket. Objects of earlier runs are locked, and stay.
async fn bucket(world: &World, task: &AgentTask) -> String {
    let prefix = log_prefix(Some("e2e"), &world.namespace, &task.name_any(), &task.uid().unwrap());
    let (client, bucket) = (store("S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY"), setting("S3_BUCKET"));
    let mut pages = client.list_objects_v2().bucket(&bucket).prefix(prefix).into_paginator().send();
    let mut text = String::new();
    while let Some(page) = pages.next().await {
        for object in page.unwrap().contents() {
            let key = object.key().unwrap();
            let got = client.get_object().bucket(&bucket).key(key).send().await.unwrap();
            let bytes = got.body.collect().await.unwrap().into_bytes();
            text.push_str(&format!("{key}\n{}\n", String::from_utf8_lossy(&bytes)));
        }
    }
    text
}

/// Returns the metrics of all pods in the system namespace.
async fn metrics(world: &World) -> String {
    let pods: Api<Pod> = Api::namespaced(world.client.clone(), SYSTEM);
    let mut text = String::new();
    for pod in pods.list(&ListParams::default()).await.unwrap() {
        let ports = pod.spec.iter().flat_map(|spec| &spec.containers).filter_map(|one| one.ports.as_ref()).flatten();
        for port in ports.filter(|port| port.name.as_deref() == Some("admin")).map(|port| port.container_port) {
            let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{}:{port}/proxy/metrics", pod.name_any());
            let request = http::Request::get(path).body(Vec::new()).unwrap();
            text.push_str(&world.client.request_text(request).await.unwrap());
        }
    }
    text
}

#[tokio::test]
async fn no_secret_is_in_anything_that_we_keep_or_say() {
    let world = world().await;
    let since = jiff::Timestamp::now();
    let texts: Vec<String> = secrets().iter().flat_map(|secret| written(secret)).collect();
    let forbidden: BTreeSet<String> = texts.iter().flat_map(|text| marks(text)).collect();
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    gzip.write_all(&serde_json::to_vec(&texts).unwrap()).unwrap();
    let mut config = ConfigMap {
        binary_data: Some([("texts.json.gz".to_owned(), ByteString(gzip.finish().unwrap()))].into()),
        ..ConfigMap::default()
    };
    config.metadata.name = Some("canaries".into());
    config.data = Some([("slip.py".to_owned(), SLIP.to_owned())].into());
    world.api::<ConfigMap>().create(&PostParams::default(), &config).await.unwrap();

    world
        .task(
            "canaries",
            json!({
                "agent": {
                    "command": ["python3", "/canaries/slip.py"], "env": [{"name": "TEXTS", "value": "/canaries/texts.json.gz"}],
                    "resources": {"cpu": "600m", "memory": "256Mi"},
                },
                "tools": ["query-tickets", "number", "close-ticket", "open-ticket"],
                "workspace": {"mounts": [{"path": "/canaries", "configMap": "canaries"}]},
                "limits": {"wallTimeSeconds": 900, "toolCalls": 100_000, "tokens": 1_000_000_000},
            }),
        )
        .await;
    let task = world.ended("canaries", 600).await;
    assert_eq!(phase(&task), Some(Phase::Succeeded), "{:?}", task.status);

    // This does not save a copy for the stage `evidence`: the log has so many objects that a tool which changes each would take too long.
    let (code, report) = world.report("canaries");
    assert_eq!((code, report["verdict"].as_str()), (0, Some("VALID")), "{report:#}");
    let number = |at: &str| report.pointer(at).and_then(Value::as_u64).unwrap_or_default();
    let (records, denials) = (number("/summary/records"), number("/summary/usage/denials"));
    assert!(records > 1_000 && denials > 2_000, "too little was said: {records} records, {denials} refusals");
    for rule in ["tool.unknown", "tool.schema", "tool.precondition", "egress.host", "request.json"] {
        assert!(report["summary"]["denials"][rule].as_u64() > Some(0), "nothing was refused by {rule}: {report:#}");
    }

    let pod = task.status.as_ref().unwrap().attempts.last().unwrap().pod.clone();
    let mut logs = system_logs("belay-gateway", since).await;
    logs.extend(system_logs("belay-operator", since).await);
    for container in ["containment-probe", "harness"] {
        logs.push(world.logs(&pod, container).await);
    }
    let tasks: Vec<AgentTask> = world.api().list(&ListParams::default()).await.unwrap().items;
    let events: Vec<Event> = world.api().list(&ListParams::default()).await.unwrap().items;
    let kept = [
        ("bucket", bucket(&world, &task).await, records),
        ("logs", logs.join("\n"), records),
        ("metrics", metrics(&world).await, 10),
        ("status", serde_json::to_string(&tasks).unwrap(), 1),
        ("events", serde_json::to_string(&events).unwrap(), 1),
        ("report", report.to_string(), 1),
    ];
    for (what, text, lines) in kept {
        assert!(text.len() as u64 > 100 * lines, "{what}: there is next to nothing to look at: {text}");
        assert_eq!(found(&text, &forbidden), None, "in the {what}");
    }
    world.clean().await;
}
