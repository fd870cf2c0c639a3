//! Twenty malformed manifests of each kind: the API server rejects each, or the operator sets a condition that names the field.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use belay::api::{AgentTask, PolicyPack, ToolContract};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
    core::DynamicObject,
    discovery::ApiResource,
};
use serde_json::{Value, json};

use crate::support::{World, agent_image, class, condition, phase, system_logs};

/// One malformed manifest: the JSON pointer, the value to set there (`null` removes the field), and a word that the answer must contain.
type Case = (&'static str, Value, &'static str);

fn set(manifest: &mut Value, pointer: &str, value: Value) {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let parent = manifest.pointer_mut(parent).unwrap_or_else(|| panic!("no {pointer} in the good manifest"));
    match parent {
        Value::Object(fields) if value.is_null() => drop(fields.remove(key)),
        Value::Object(fields) => drop(fields.insert(key.into(), value)),
        Value::Array(items) => items[key.parse::<usize>().unwrap()] = value,
        _ => panic!("{pointer} is nowhere"),
    }
}

fn good_task() -> Value {
    json!({
        "apiVersion": "belay.dev/v1alpha1", "kind": "AgentTask", "metadata": {"name": "bad"},
        "spec": {
            "objective": "o", "workflowClass": "gvisor", "principal": "e2e", "tools": ["read"],
            "agent": {"image": agent_image(), "command": ["python3"], "env": [{"name": "A", "value": "b"}],
                      "resources": {"cpu": "100m", "memory": "64Mi"}},
            "workspace": {"mounts": [{"path": "/in", "configMap": "c"}], "writeScopes": [{"path": "/out", "size": "1Mi"}]},
            "limits": {"wallTimeSeconds": 60, "toolCalls": 5, "tokens": 100},
            "retry": {"agent": 0, "infrastructure": 0},
        },
    })
}

fn good_contract() -> Value {
    json!({
        "apiVersion": "belay.dev/v1alpha1", "kind": "ToolContract", "metadata": {"name": "bad"},
        "spec": {
            "tool": "bad", "description": "d", "sideEffect": "read",
            "upstream": {"mcp": {"url": "https://files.world.test/mcp", "tool": "t"}},
            "input": {"type": "object", "properties": {"a": {"type": "string"}}},
            "preconditions": [{"name": "p", "cel": "args.a == 'b'", "message": "m"}],
        },
    })
}

fn good_pack() -> Value {
    json!({
        "apiVersion": "belay.dev/v1alpha1", "kind": "PolicyPack", "metadata": {"name": "belay-e2e-bad-pack"},
        "spec": {
            "environment": "e2e", "namespaceSelector": {"matchLabels": {"belay.dev/environment": "bad-pack"}},
            "workflowClasses": [class("c", "gvisor", json!([{"host": "a.example.com", "ports": [443], "uses": ["Tools"]}]))],
            "models": {"openai": "https://models.world.test"},
            "evidence": {"bucket": "belay-evidence", "mode": "Governance", "retentionDays": 1},
        },
    })
}

fn tasks() -> Vec<Case> {
    vec![
        ("/spec/objective", json!(""), "objective"),
        ("/spec/objective", Value::Null, "objective"),
        ("/spec/objective", json!("x".repeat(9000)), "objective"),
        ("/spec/workflowClass", json!("No_Such"), "workflowClass"),
        ("/spec/workflowClass", json!("nosuch"), "workflowClass"),
        ("/spec/principal", json!("a b"), "principal"),
        ("/spec/agent/image", json!(""), "image"),
        ("/spec/agent/image", Value::Null, "image"),
        ("/spec/agent/env/0/name", json!("1A"), "env"),
        ("/spec/agent/env/0/name", json!("OPENAI_BASE_URL"), "env"),
        ("/spec/agent/resources/cpu", json!("lots"), "cpu"),
        ("/spec/agent/resources/memory", json!("64Gi"), "memory"),
        ("/spec/tools/0", json!("nosuch"), "tools"),
        ("/spec/workspace/mounts/0/path", json!("relative"), "path"),
        ("/spec/workspace/mounts/0/path", json!("/var/run/belay"), "path"),
        ("/spec/workspace/mounts/0/secret", json!("both"), "exactly one"),
        ("/spec/workspace/writeScopes/0/path", json!("/in"), "path"),
        ("/spec/workspace/writeScopes/0/size", json!("big"), "size"),
        ("/spec/limits/wallTimeSeconds", json!(0), "wallTimeSeconds"),
        ("/spec/limits/tokens", json!(999_999_999), "tokens"),
        ("/spec/limits/toolCalls", json!("many"), "toolCalls"),
        ("/metadata/name", json!("x".repeat(60)), "name"),
    ]
}

fn contracts() -> Vec<Case> {
    vec![
        ("/spec/tool", json!(""), "tool"),
        ("/spec/tool", json!("a b"), "tool"),
        ("/spec/tool", json!("x".repeat(200)), "tool"),
        ("/spec/description", json!(""), "description"),
        ("/spec/description", Value::Null, "description"),
        ("/spec/sideEffect", json!("none"), "sideEffect"),
        ("/spec/sideEffect", Value::Null, "sideEffect"),
        ("/spec/upstream/mcp/url", json!("ftp://a.b"), "url"),
        ("/spec/upstream/mcp/url", json!("https://user@files.world.test/"), "url"),
        ("/spec/upstream/mcp/url", json!("https://elsewhere.example.com/mcp"), "url"),
        ("/spec/upstream/mcp/tool", json!(""), "tool"),
        ("/spec/upstream/mcp", Value::Null, "mcp"),
        ("/spec/upstream/mcp/digest", json!("AB"), "digest"),
        ("/spec/upstream/http", json!({"method": "GET", "url": "https://files.world.test/"}), "exactly one"),
        ("/spec/upstream", json!({"http": {"method": "GOT", "url": "https://files.world.test/"}}), "method"),
        ("/spec/upstream", json!({"http": {"method": "POST", "url": "https://{a}.world.test/"}}), "url"),
        ("/spec/upstream", json!({"http": {"method": "POST", "url": "https://files.world.test/{a}{a}"}}), "url"),
        ("/spec/upstream", json!({"http": {"method": "GET", "url": "https://files.world.test/"}}), "input"),
        ("/spec/output", json!({"type": "array"}), "output"),
        ("/spec/limits", json!({"perMinute": 0}), "perMinute"),
        ("/spec/limits", json!({"timeoutSeconds": 301}), "timeoutSeconds"),
        ("/spec/input", json!("a string"), "input"),
        ("/spec/input", json!({"type": "object", "properties": {"a": {"type": "strnig"}}}), "input"),
        ("/spec/input", json!({"type": "array"}), "input"),
        ("/spec/input", json!({"$ref": "https://example.com/schema.json"}), "input"),
        ("/spec/preconditions/0/cel", json!("args."), "preconditions"),
        ("/spec/preconditions/0/cel", json!(""), "cel"),
        ("/spec/preconditions/0/name", json!("-"), "name"),
        ("/spec/preconditions/0/message", Value::Null, "message"),
        ("/spec/sideEffect", json!("external"), "sideEffect"),
    ]
}

fn packs() -> Vec<Case> {
    vec![
        ("/spec/environment", json!("Dev!"), "environment"),
        ("/spec/environment", Value::Null, "environment"),
        ("/spec/namespaceSelector", Value::Null, "namespaceSelector"),
        ("/spec/workflowClasses", json!([]), "workflowClasses"),
        ("/spec/workflowClasses/0/name", json!("Bad Name"), "name"),
        ("/spec/workflowClasses/0/allowedEffects", json!([]), "allowedEffects"),
        ("/spec/workflowClasses/0/allowedEffects", json!(["delete"]), "allowedEffects"),
        ("/spec/workflowClasses/0/limits", Value::Null, "limits"),
        ("/spec/workflowClasses/0/limits/tokens", json!(-1), "tokens"),
        ("/spec/workflowClasses/0/egress/0/host", json!("*"), "host"),
        ("/spec/workflowClasses/0/egress/0/host", json!("1.2.3.4:80"), "host"),
        ("/spec/workflowClasses/0/egress/0/host", json!("*.*.example.com"), "host"),
        ("/spec/workflowClasses/0/egress/0/ports", json!([0]), "ports"),
        ("/spec/workflowClasses/0/egress/0/ports", json!([70000]), "ports"),
        ("/spec/workflowClasses/0/egress/0/uses", json!(["Everything"]), "uses"),
        (
            "/spec/workflowClasses/0/egress/0",
            json!({"host": "a.example.com", "uses": ["Direct"], "credentials": [{"secret": "s", "key": "k"}]}),
            "credentials",
        ),
        ("/spec/classification", json!([{"name": "a", "pattern": "", "sensitivity": "Restricted"}]), "pattern"),
        ("/spec/classification", json!([{"name": "a", "pattern": "a", "sensitivity": "High"}]), "sensitivity"),
        ("/spec/rules", json!([{"name": "a", "decision": "Maybe"}]), "decision"),
        ("/spec/rules", json!([{"name": "a", "decision": "Allow", "principals": ["a*b"]}]), "principals"),
        ("/spec/rules", json!([{"name": "a", "decision": "RequireApproval"}]), "approval"),
        ("/spec/risk", json!({"terms": [{"name": "a", "when": "true", "points": 1}]}), "approveAt"),
        ("/spec/risk", json!({"terms": [{"name": "a", "when": "true", "points": 0}], "denyAt": 1}), "points"),
        ("/spec/approval", json!({"approvers": {"users": []}}), "approvers"),
        ("/spec/models/openai", json!("models"), "openai"),
        ("/spec/evidence/bucket", json!("B"), "bucket"),
        ("/spec/evidence/mode", json!("None"), "mode"),
        ("/spec/evidence/retentionDays", json!(0), "retentionDays"),
        ("/spec/evidence", Value::Null, "evidence"),
    ]
}

/// Creates each manifest. If the API server accepts it, a task that needs it must get a condition that names the field.
async fn refused<K>(world: &World, good: Value, cases: Vec<Case>, through_a_task: bool)
where
    K: kube::Resource<DynamicType = ()>,
{
    let resource = ApiResource::erase::<K>(&());
    let api: Api<DynamicObject> = if K::kind(&()) == "PolicyPack" {
        Api::all_with(world.client.clone(), &resource)
    } else {
        Api::namespaced_with(world.client.clone(), &world.namespace, &resource)
    };
    let tasks: Api<AgentTask> = world.api();
    assert!(cases.len() >= 20, "{} cases of {}", cases.len(), K::kind(&()));
    let mut by_the_server = 0;
    for (pointer, value, word) in cases {
        let label = format!("{} {pointer} = {value}", K::kind(&()));
        let mut manifest = good.clone();
        set(&mut manifest, pointer, value);
        let name = manifest["metadata"]["name"].as_str().unwrap().to_owned();
        let object: DynamicObject = serde_json::from_value(manifest).unwrap();
        match api.create(&PostParams::default(), &object).await {
            Err(error) => {
                assert!(error.to_string().contains(word), "{label}: refused without naming {word:?}: {error}");
                by_the_server += 1;
                continue;
            }
            Ok(_) if through_a_task => {
                let mut task = good_task();
                task["spec"]["tools"] = json!([name]);
                tasks.create(&PostParams::default(), &serde_json::from_value(task).unwrap()).await.unwrap();
            }
            Ok(_) => {}
        }
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let task = tasks.get("bad").await.unwrap();
            if let Some(message) = condition(&task, "Accepted", "False") {
                assert!(message.contains(word), "{label}: the condition does not name {word:?}: {message}");
                break;
            }
            assert!(Instant::now() < end, "{label}: no condition within 5 s; phase {:?}", phase(&task));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        tasks.delete("bad", &DeleteParams::default()).await.unwrap();
        if through_a_task {
            api.delete(&name, &DeleteParams::default()).await.unwrap();
        }
        let end = Instant::now() + Duration::from_secs(20);
        while tasks.get_opt("bad").await.unwrap().is_some() {
            assert!(Instant::now() < end, "{label}: the task does not go away");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    eprintln!("{}: {by_the_server} refused by the API server itself", K::kind(&()));
}

#[tokio::test]
async fn malformed_manifests_are_refused_with_the_field_named() {
    let since = jiff::Timestamp::now();
    let files = json!([{"host": "files.world.test", "uses": ["Tools"]}]);
    let world = World::new("badinput", json!([class("gvisor", "gvisor", files)])).await;
    let mut read = good_contract();
    read["metadata"]["name"] = json!("read");
    read["spec"]["tool"] = json!("read");
    let contracts_api: Api<ToolContract> = world.api();
    contracts_api.create(&PostParams::default(), &serde_json::from_value(read).unwrap()).await.unwrap();

    refused::<AgentTask>(&world, good_task(), tasks(), false).await;
    refused::<ToolContract>(&world, good_contract(), contracts(), true).await;
    refused::<PolicyPack>(&world, good_pack(), packs(), false).await;

    // The operator still runs a valid task.
    world.task("good", json!({"agent": {"command": ["python3", "-S", "-c"], "args": ["print(1)"]}})).await;
    let task = world.ended("good", 90).await;
    assert_eq!(phase(&task), Some(belay::api::agent_task::Phase::Succeeded), "{:?}", task.status);
    world.clean().await;

    // The operator logs each warning or error only once.
    let mut said: BTreeMap<String, usize> = BTreeMap::new();
    for line in system_logs("belay-operator", since).await {
        let Ok(mut line) = serde_json::from_str::<Value>(&line) else { continue };
        if matches!(line["level"].as_str(), Some("WARN" | "ERROR")) && line["namespace"] == world.namespace.as_str() {
            line["timestamp"] = Value::Null;
            *said.entry(line.to_string()).or_default() += 1;
        }
    }
    let twice: Vec<_> = said.iter().filter(|(_, times)| **times > 1).collect();
    assert!(twice.is_empty(), "the operator logged these more than once: {twice:#?}");
}
