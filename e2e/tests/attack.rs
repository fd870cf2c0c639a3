//! Attacks that were first found on a laptop, repeated in a pod, under gVisor and runc: calls without a record, evaluations that take too
//! long, memory that is not mapped, and file descriptors that nobody declared. Each kind has a control: the same attempt in a harmless form
//! succeeds.

use belay::api::agent_task::Phase;
use k8s_openapi::api::core::v1::Pod;
use kube::api::LogParams;
use serde_json::{Value, json};

use crate::support::{World, class, phase};

const CHANNELS: &str = include_str!("../escape/channels.py");
/// An agent that calls `uniq` with the numbers below its argument: once if the argument is 3, otherwise until it is ended.
const JUDGED: &str = r#"
import json, os, sys, time, urllib.request
def call():
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "uniq", "arguments": {"names": list(range(int(sys.argv[1])))}}}
    headers = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
    with urllib.request.urlopen(urllib.request.Request(os.environ["BELAY_MCP_URL"], json.dumps(body).encode(), headers)) as reply:
        return reply.read().decode()
if sys.argv[1] == "3":
    print(call())
else:
    import threading
    def again():
        while True:
            try: call()
            except OSError: time.sleep(0.1)
    for _ in range(4): threading.Thread(target=again).start()
"#;
/// An agent that holds memory that no process maps, in pieces of 16 MiB.
const UNMAPPED: &str = r#"
import os, sys
files = [os.memfd_create("m") for _ in range(int(sys.argv[1]))]
for file in files: [os.write(file, b"x" * (1 << 20)) for _ in range(16)]
print("held", len(files))
"#;
const DESCRIPTORS: &str = r#"
import os
for number in map(int, os.listdir("/proc/self/fd")):
    try: print("fd", number, os.readlink("/proc/self/fd/%d" % number), flush=True)
    except OSError: pass
"#;

/// Creates a namespace with a class of this runtime and the contracts that the tasks name.
async fn world(runtime: &str) -> World {
    let hosts = json!([
        {"host": "tickets.world.test", "uses": ["Direct"]},
        {"host": "docs.world.test", "uses": ["Tools"]},
        {"host": "models.world.test", "uses": ["Models"]},
    ]);
    let world = World::new(&format!("attack-{runtime}"), json!([class("attacked", runtime, hosts)])).await;
    let contract = |name: &str, spec: Value| {
        json!({"apiVersion": "belay.dev/v1alpha1", "kind": "ToolContract", "metadata": {"name": name}, "spec": spec})
            .to_string()
    };
    world.kubectl_apply(&contract(
        "greet",
        json!({
            "tool": "greet", "description": "Greets.", "sideEffect": "read",
            "upstream": {"http": {"method": "GET", "url": "https://docs.world.test/greet/{name}"}},
            "input": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
        }),
    ));
    world.kubectl_apply(&contract("uniq", json!({
        "tool": "uniq", "description": "Takes distinct names.", "sideEffect": "read",
        "upstream": {"http": {"method": "POST", "url": "https://docs.world.test/uniq"}},
        "input": {"type": "object", "required": ["names"], "properties": {"names": {"type": "array", "items": {"type": "integer"}}}},
        "preconditions": [{"name": "distinct", "cel": "args.names.all(x, args.names.exists_one(y, x == y))", "message": "each once"}],
    })));
    let agents =
        [("channels.py", CHANNELS), ("judged.py", JUDGED), ("unmapped.py", UNMAPPED), ("descriptors.py", DESCRIPTORS)];
    world.config_map("attack", &agents).await;
    world
}

/// How a task ended.
#[derive(Debug)]
struct Ran {
    phase: Option<Phase>,
    reason: String,
    said: String,
    /// The summary in the report of `belay verify`.
    summary: Value,
}

/// Runs an agent, and returns after its task has ended.
async fn ran(world: &World, name: &str, agent: &[&str], more: Value) -> Ran {
    let mut spec = json!({
        "workflowClass": "attacked", "tools": ["greet", "uniq"],
        "agent": {"command": ["python3", "-S"], "args": agent},
        "workspace": {"mounts": [{"path": "/attack", "configMap": "attack"}]},
        "limits": {"toolCalls": 100, "denials": 1000},
    });
    crate::support::merge(&mut spec, more);
    world.task(name, spec).await;
    let task = world.ended(name, 180).await;
    let (code, report) = world.verify(name);
    assert_eq!(code, 0, "{name}: {report:#}");
    let agents = LogParams { container: Some("agent".into()), ..LogParams::default() };
    Ran {
        phase: phase(&task),
        reason: task.status.and_then(|status| status.reason).unwrap_or_default(),
        // The pod of a task that ran out of time is deleted.
        said: world.api::<Pod>().logs(&format!("{name}-1"), &agents).await.unwrap_or_default(),
        summary: report["summary"].clone(),
    }
}

async fn attacked(runtime: &str) {
    let world = world(runtime).await;
    channels(&world, runtime).await;
    time_goes_on(&world, runtime).await;

    let held = async |name: &str, pieces: &str| ran(&world, name, &["/attack/unmapped.py", pieces], json!({})).await;
    let little = held("held", "2").await;
    assert!(little.phase == Some(Phase::Succeeded) && little.said.contains("held 2"), "{runtime}: {little:#?}");
    let much = held("unmapped", "40").await;
    assert!(much.phase == Some(Phase::Failed) && !much.said.contains("held"), "{runtime}: 640 MiB of 128: {much:#?}");

    let Ran { phase, said, .. } = ran(&world, "descriptors", &["/attack/descriptors.py"], json!({})).await;
    assert_eq!(phase, Some(Phase::Succeeded), "{runtime}: {said}");
    let beyond = |line: &&str| {
        let number = line.split(' ').nth(1).and_then(|number| number.parse::<u32>().ok());
        // `listdir` itself has a descriptor of the folder, which is closed before its link is read.
        number.is_some_and(|number| number > 2) && !line.contains("/proc/")
    };
    let inherited: Vec<_> = said.lines().filter(beyond).collect();
    assert!(inherited.is_empty() && said.contains("fd 1 "), "{runtime}: {said}");
    world.clean().await;
}

/// Checks that denials within a tunnel or by an HTTP library have records and count, that no argument changes the path of a URL, and that
/// an honest tunnel works.
async fn channels(world: &World, runtime: &str) {
    let environment = json!([
        {"name": "TO", "value": "127.0.0.1:9900"},
        {"name": "HOST", "value": "tickets.world.test"},
        // The first bytes of a TLS server's handshake.
        {"name": "MARK", "value": "1603"},
        {"name": "FILL", "value": "0"},
    ]);
    let more = json!({"agent": {"env": environment}});
    let Ran { phase, said, .. } = ran(world, "channels", &["/attack/channels.py"], more).await;
    assert_eq!(phase, Some(Phase::Succeeded), "{runtime}: {said}");
    let tries: Vec<Value> = said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let tries: Vec<&Value> = tries.iter().filter(|one| one.get("kind").is_some()).collect();
    assert_eq!(tries.len(), 30, "{runtime}: {said}");
    let out: Vec<_> = tries.iter().filter(|one| one["through"] != (one["kind"] == "control")).collect();
    assert!(out.is_empty(), "{runtime}: {out:#?}");
    let records = world.records("channels-1").await;
    let denied: Vec<_> = records.iter().filter(|one| one["kind"] == "call.denied").collect();
    let of = |rule: &str| denied.iter().filter(|one| one["rule"] == rule).count();
    let counts = [of("egress.host"), of("request.malformed"), of("model.request"), of("tool.url")];
    assert_eq!(counts, [9, 10, 1, 9], "{runtime}: {denied:#?}");
    let passed = records.iter().rfind(|one| one["kind"] == "call.outcome").unwrap();
    assert!(
        passed["sentBytes"].as_u64() > Some(200) && passed["responseBytes"].as_u64() > Some(0),
        "{runtime}: {passed}"
    );
}

/// Checks that calls whose evaluation takes too long do not stop the wall time, the log or the seal.
async fn time_goes_on(world: &World, runtime: &str) {
    let calls = async |name: &str, count: &str| {
        ran(world, name, &["/attack/judged.py", count], json!({"limits": {"wallTimeSeconds": 15}})).await
    };
    let few = calls("few", "3").await;
    assert_eq!(few.phase, Some(Phase::Succeeded), "{runtime}: {few:#?}");
    assert_eq!(few.summary["usage"]["toolCalls"], 1, "{runtime}: three numbers are few enough to judge: {few:#?}");
    let many = calls("many", "12000").await;
    assert_eq!((many.phase, many.reason.as_str()), (Some(Phase::Failed), "DeadlineExceeded"), "{runtime}: {many:#?}");
    assert_eq!(many.summary["attempts"][0]["closed"], "wallTime", "{runtime}: {many:#?}");
    assert!(many.summary["denials"]["tool.precondition"].as_u64() > Some(0), "{runtime}: none was refused: {many:#?}");
}

#[tokio::test]
async fn in_a_pod_of_gvisor() {
    attacked("gvisor").await;
}

#[tokio::test]
async fn in_a_pod_of_runc() {
    attacked("runc").await;
}
