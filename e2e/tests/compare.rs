//! The demo on the cluster and the demo with `belay run`: the same files give two logs that are equal record by record.
//!
//! [`ELSEWHERE`] lists what may differ, each with a reason. Everything else is compared as it was written, and a member that only one of
//! the two logs has is a difference. The commitments to arguments and results are salted. The test opens those of tool calls, and compares
//! the content.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use belay::{api::agent_task::Phase, evidence::store::log_prefix, policy::commit::Salt};
use kube::ResourceExt;
use rmcp::model::{CallToolResult, ResultType};
use serde_json::{Map, Value, json};
use tokio::sync::OnceCell;

use crate::{
    laptop::{Laptop, first_line},
    locks::store,
    support::{World, belay, in_world, phase, setting},
};

const TASK: &str = include_str!("../demo/manifests/task.yaml");
/// The address of the pretend internet's front proxy.
const FRONT: &str = "198.51.100.20";

/// What may differ: the record kind (`*`: all kinds), the JSON pointer of a member, which side has it, and the reason.
const ELSEWHERE: [(&str, &str, Has, &str); 16] = [
    ("*", "/time", Has::Both, "when it was"),
    ("attempt.opened", "/verifierKey", Has::Both, "each start of a harness has a key of its own"),
    ("attempt.opened", "/pod/uid", Has::Both, "an id"),
    ("attempt.opened", "/pod/node", Has::Both, "a machine's name"),
    (
        "attempt.opened",
        "/pod/runtimeClass",
        Has::Both,
        "the sandbox: the class names a cluster's, a laptop has what is installed",
    ),
    (
        "attempt.opened",
        "/pod/networkPolicy",
        Has::Both,
        "the wall of a cluster; empty on a laptop, whose sandbox has no network",
    ),
    ("attempt.opened", "/containment/millis", Has::Both, "how long the probe took"),
    ("attempt.opened", "/containment/reachable", Has::Both, "an address"),
    ("attempt.opened", "/containment/unreachable", Has::Both, "addresses"),
    ("attempt.opened", "/local", Has::Laptop, "says that it is no cluster, and what stood in for one"),
    (
        "attempt.opened",
        "/policyDigest",
        Has::Both,
        "the policy has ids in it; it is compared itself, as the member `policy`",
    ),
    ("attempt.opened", "/policy/task/uid", Has::Both, "an id"),
    (
        "attempt.opened",
        "/policy/task/requester",
        Has::Both,
        "who asked: a user of the cluster, or whoever is at the laptop",
    ),
    ("attempt.opened", "/policy/pack/uid", Has::Both, "an id"),
    (
        "call.outcome of egress",
        "/responseBytes",
        Has::Both,
        "what is said in a tunnel: TLS, with certificates and tickets of that moment",
    ),
    ("task.closed", "/images", Has::Cluster, "digests of the images that a kubelet pulled"),
];

/// The agent's own tools. Their results depend on the kernel: without a network a connection is unreachable, behind a NetworkPolicy it
/// times out. The model gets these results, so its calls differ in length by exactly their bytes.
const OWN: [&str; 2] = ["connect_directly", "write_file"];

#[derive(Clone, Copy, PartialEq)]
enum Has {
    Both,
    Cluster,
    Laptop,
}

/// One run of the demo.
#[derive(Clone)]
struct Run {
    side: Has,
    /// The records of its log. The record `attempt.opened` has the policy as a member.
    records: Vec<Value>,
    salt: Salt,
    /// The lines that the agent printed.
    said: Vec<String>,
}

/// Reads the records of a downloaded log.
fn records(log: &Path) -> Vec<Value> {
    let files = fs::read_dir(log.join("segments")).unwrap().map(|file| file.unwrap().path());
    let mut all = Vec::new();
    for segment in files.collect::<BTreeSet<_>>() {
        let text = fs::read_to_string(segment).unwrap();
        let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let documents = lines.next().unwrap()["documents"].as_array().map_or(0, Vec::len);
        let policy = lines.by_ref().take(documents).next();
        all.extend(lines);
        if let Some(policy) = policy {
            let opened = all.iter_mut().rev().find(|record| record["kind"] == "attempt.opened");
            opened.unwrap()["policy"] = policy;
        }
    }
    all
}

/// Runs the demo on the cluster, once for all tests of this module.
async fn on_the_cluster() -> &'static Run {
    static RUN: OnceCell<Run> = OnceCell::const_new();
    RUN.get_or_init(|| async {
        let world = World::demo().await;
        world.kubectl_apply(TASK);
        let task = world.ended("triage", 180).await;
        assert_eq!(phase(&task), Some(Phase::Succeeded), "{:?}", task.status);
        let saved = tempfile::tempdir().unwrap();
        let log = saved.path().join("log");
        let verified = belay(&["verify", "triage", "-n", &world.namespace, "--save", log.to_str().unwrap()]);
        assert!(first_line(&verified).starts_with("VALID  "), "{verified:?}");
        let key = log_prefix(Some("dev"), &world.namespace, "triage", &task.uid().unwrap()) + "salt/commitments";
        let client = store("S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY");
        let object = client.get_object().bucket(setting("S3_STATE_BUCKET")).key(key).send().await.expect("the salt");
        let salt = object.body.collect().await.unwrap().into_bytes();
        let salt = Salt::try_from(String::from_utf8(salt.to_vec()).unwrap()).unwrap();
        let said = world.logs("triage-1", "agent").await.lines().map(str::to_owned).collect();
        let run = Run { side: Has::Cluster, records: records(&log), salt, said };
        world.clean().await;
        run
    })
    .await
}

/// Runs the demo's task on this machine, with these contracts and the demo's own image. The ticket service has no tickets before.
fn on_a_laptop(laptop: &Laptop, sandbox: &str, contracts: &str) -> Run {
    fs::write(in_world("tickets.jsonl"), "").unwrap();
    let bundle = setting("BELAY_AGENT_BUNDLE");
    let ran = laptop.run(&[
        "e2e/demo/manifests/task.yaml",
        "--contracts",
        contracts,
        "--root",
        &bundle,
        "--sandbox",
        sandbox,
    ]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    let log = PathBuf::from(ran.log());
    let verified = laptop.belay(&["verify", ran.log()]);
    assert!(first_line(&verified).starts_with("VALID, self-witnessed, unlocked store  "), "{verified:?}");
    let uid = log.file_name().unwrap().to_str().unwrap();
    let kept = log_prefix(Some("dev"), "belay-demo", "triage", uid);
    let salt = laptop.path("belay/state").join(setting("S3_STATE_BUCKET")).join(kept).join("salt/commitments");
    let salt = Salt::try_from(fs::read_to_string(salt).unwrap()).unwrap();
    Run { side: Has::Laptop, records: records(&log), salt, said: ran.said() }
}

/// Returns the tool calls of the demo in their order, see `e2e/world/story.py`.
fn asked() -> Vec<(&'static str, Value)> {
    let body = "payments-db refuses connections since 09:14: its pool of 20 is spent. Runbook: raise the pool, then restart checkout.";
    let ticket = |severity: &str| json!({"title": "checkout: payments-db connections exhausted", "severity": severity, "body": body, "idempotency_key": "checkout-0914"});
    let tickets = json!({"service": "checkout"});
    vec![
        ("read_log", json!({"path": "checkout.log"})),
        ("delete_ticket", json!({"id": "1"})),
        ("open_ticket", ticket("critical")),
        ("query_tickets", tickets.clone()),
        ("open_ticket", ticket("high")),
        ("query_tickets", tickets),
    ]
}

/// Returns the upstreams' answers to the allowed calls. It sends the same calls again, in the same order, without Belay.
fn answered() -> Vec<(String, Vec<u8>)> {
    fs::write(in_world("tickets.jsonl"), "").unwrap();
    let allowed =
        asked().into_iter().filter(|(tool, arguments)| *tool != "delete_ticket" && arguments["severity"] != "critical");
    let answers = allowed.enumerate().map(|(index, (tool, arguments))| {
        let (host, tool) = if tool == "read_log" { ("files.world.test", "read_text_file") } else { ("tickets.world.test", tool) };
        let call = json!({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": arguments}});
        let output = Command::new("curl")
            .args(["-sS", "--fail", "--cacert", in_world("ca.crt").to_str().unwrap(), "--resolve", &format!("{host}:443:{FRONT}")])
            .args(["-H", "content-type: application/json", "-H", "accept: application/json, text/event-stream"])
            .args(["-H", "mcp-protocol-version: 2025-06-18", "-H", "authorization: Bearer world-ticket-key"])
            .args(["-d", &call.to_string(), &format!("https://{host}/mcp")])
            .output()
            .unwrap();
        let reply: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        let mut result: CallToolResult = serde_json::from_value(reply["result"].clone()).unwrap();
        // Newer versions of the protocol have this member, and the harness adds it for all versions.
        result.result_type = Some(ResultType::COMPLETE);
        (format!("answer {index}, of {tool}"), serde_json::to_vec(&result).unwrap())
    });
    answers.collect()
}

impl Run {
    /// Returns the bytes of kernel-dependent results that the model got before its call of this number.
    fn words(&self, before: usize) -> i64 {
        let calls = self.said.iter().filter_map(|line| line.strip_prefix("→ ")?.split(' ').next());
        let results = self.said.iter().filter_map(|line| line.strip_prefix("← "));
        let own = calls.zip(results).take(before).filter(|(tool, _)| OWN.contains(tool));
        own.map(|(_, result)| i64::try_from(result.len()).unwrap()).sum()
    }

    /// Returns the records without the members that depend on the time and the machine.
    fn normalised(&self, answers: &[(String, Vec<u8>)]) -> Vec<Value> {
        let committed = asked()
            .into_iter()
            .map(|(tool, arguments)| (self.salt.value(&arguments).unwrap(), format!("{tool} {arguments}")));
        let answered = answers.iter().map(|(name, bytes)| (self.salt.bytes(bytes), name.clone()));
        let known: HashMap<String, String> = committed.chain(answered).collect();
        let mut unknown: Vec<String> = Vec::new();
        let mut channels: HashMap<String, String> = HashMap::new();
        let (mut models, mut spent) = (0, 0);
        let mut all = self.records.clone();
        for record in &mut all {
            let text = |name: &str| record[name].as_str().unwrap_or_default().to_owned();
            let (kind, call) = (text("kind"), text("call"));
            if kind == "call.intent" {
                channels.insert(call.clone(), text("channel"));
            }
            let channel = channels.get(&call).cloned().unwrap_or_else(|| text("channel"));

            // Replaces a commitment by its content if that is known, and otherwise by a number that shows which commitments are equal.
            for name in ["requestCommitment", "responseCommitment"] {
                let Some(digest) = record[name].as_str().map(str::to_owned) else { continue };
                let content = known.get(&digest).cloned().unwrap_or_else(|| {
                    let at = unknown.iter().position(|one| *one == digest).unwrap_or_else(|| {
                        unknown.push(digest);
                        unknown.len() - 1
                    });
                    format!("content {at} of a {channel}")
                });
                record[name] = content.into();
            }

            // Subtracts from each counter what earlier records account for.
            let number = |name: &str| record[name].as_i64().unwrap_or_default();
            let (bytes, reserved, tokens) = (number("requestBytes"), number("reservedTokens"), number("tokens"));
            spent += tokens;
            let used = record["usage"]["tokens"].as_i64().unwrap();
            record["usage"]["tokens"] = (used - spent - reserved).into();
            match (channel.as_str(), kind.as_str()) {
                ("model", "call.intent") => {
                    record["requestBytes"] = (bytes - self.words(models)).into();
                    // The reservation grows with the bytes of the prompt. The part for the reply is constant.
                    record["reservedTokens"] = (reserved - bytes).into();
                    models += 1;
                }
                // Compared in bytes: the model counts four bytes as one token, and rounds up.
                ("model", "call.outcome") => record["tokens"] = (tokens * 4 - self.words(models - 1)).into(),
                _ => {}
            }

            // On a cluster the kubelet ends the harness by a signal, which does not tell how the agent ended. `belay run` waits for the
            // agent.
            let ended = if self.side == Has::Laptop { "agentEnded" } else { "terminated" };
            if kind == "attempt.closed" && record["reason"] == ended {
                record["reason"] = "in time".into();
            }

            for (of, pointer, has, _) in ELSEWHERE {
                if of != "*" && of != kind && of != format!("{kind} of {channel}") {
                    continue;
                }
                let (above, name) = pointer.rsplit_once('/').unwrap();
                let Some(above) = record.pointer_mut(above).and_then(Value::as_object_mut) else { continue };
                match has {
                    Has::Both => drop(above.entry(name).and_modify(|value| *value = "elsewhere".into())),
                    _ if has == self.side => {
                        above.remove(name).unwrap_or_else(|| panic!("expected {pointer} in {kind}"));
                    }
                    _ => {}
                }
            }
        }
        all
    }
}

/// Collects the leaves of a value, keyed by their JSON pointers.
fn leaves(value: &Value, pointer: &str, all: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(members) if !members.is_empty() => {
            members.iter().for_each(|(name, value)| leaves(value, &format!("{pointer}/{name}"), all));
        }
        Value::Array(items) if !items.is_empty() => {
            items.iter().enumerate().for_each(|(index, value)| leaves(value, &format!("{pointer}/{index}"), all));
        }
        leaf => {
            all.insert(pointer.to_owned(), leaf.clone());
        }
    }
}

/// Returns the differences between two logs, one line for each member.
fn differences(cluster: &[Value], laptop: &[Value]) -> Vec<String> {
    let mut all = Vec::new();
    let nothing = Value::Object(Map::new());
    for index in 0..cluster.len().max(laptop.len()) {
        let (mut left, mut right) = (BTreeMap::new(), BTreeMap::new());
        leaves(cluster.get(index).unwrap_or(&nothing), "", &mut left);
        leaves(laptop.get(index).unwrap_or(&nothing), "", &mut right);
        for pointer in left.keys().chain(right.keys()).collect::<BTreeSet<_>>() {
            let (one, other) = (left.get(pointer), right.get(pointer));
            let of_a_model = left.get("/responseCommitment").is_some_and(|of| of.to_string().contains("of a model"));
            let slack = match pointer.as_str() {
                // The model rounds up to a multiple of four bytes.
                "/tokens" if of_a_model => 3,
                // Names and addresses differ, and their number of tokens does not follow from their bytes.
                "/reservedTokens" => 32,
                _ => 0,
            };
            let near = |one: &Value, other: &Value| Some((one.as_i64()? - other.as_i64()?).abs() <= slack);
            if one == other || one.zip(other).and_then(|(one, other)| near(one, other)) == Some(true) {
                continue;
            }
            let show = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
            all.push(format!("record {index}, {pointer}: {} on the cluster, {} here", show(one), show(other)));
        }
    }
    all
}

async fn decides_the_same(sandbox: &str) {
    let cluster = on_the_cluster().await;
    let laptop = on_a_laptop(&Laptop::new(), sandbox, "e2e/demo/manifests");
    let opened = fs::read_to_string(in_world("tickets.jsonl")).unwrap();
    assert_eq!(opened.lines().count(), 1, "{opened}");
    let answers = answered();
    let (one, other) = (cluster.normalised(&answers), laptop.normalised(&answers));
    let found = differences(&one, &other);
    assert!(found.is_empty(), "{found:#?}\non the cluster: {:#?}\nhere: {:#?}", cluster.said, laptop.said);
    eprintln!("{sandbox}: {} records are equal", one.len());
    // The commitments to all arguments and results of tools were opened, on both sides.
    let closed = |record: &&Value| record.to_string().contains("of a tool");
    assert_eq!(one.iter().find(closed), None);
    // The log is the demo's, and not that of two runs in which nothing happened.
    let denied: Vec<_> =
        one.iter().filter(|record| record["kind"] == "call.denied").map(|record| &record["rule"]).collect();
    assert_eq!(denied, ["tool.unknown", "tool.precondition", "egress.host", "budget.toolCalls"]);
    assert!(one.len() > 60, "{} records", one.len());
}

#[tokio::test]
async fn the_demo_here_in_gvisor_decides_as_on_the_cluster() {
    decides_the_same("runsc").await;
}

#[tokio::test]
async fn the_demo_here_in_bubblewrap_decides_as_on_the_cluster() {
    decides_the_same("bwrap").await;
}

/// The control: the comparison finds a contract that differs.
#[tokio::test]
async fn another_contract_shows() {
    let cluster = on_the_cluster().await;
    let laptop = Laptop::new();
    let contracts = fs::read_to_string("e2e/demo/manifests/contracts.yaml").unwrap();
    let changed = contracts.replace("['low', 'medium', 'high']", "['low', 'medium', 'high', 'critical']");
    assert_ne!(contracts, changed);
    fs::write(laptop.path("contracts.yaml"), changed).unwrap();
    fs::copy("e2e/demo/manifests/namespace.yaml", laptop.path("namespace.yaml")).unwrap();
    let run = on_a_laptop(&laptop, "bwrap", laptop.path("").to_str().unwrap());
    let answers = answered();
    let found = differences(&cluster.normalised(&answers), &run.normalised(&answers));
    let tells = |text: &str| found.iter().any(|one| one.contains(text));
    assert!(tells("record 0, /policy/tools/0/preconditions/0/cel"), "{found:#?}");
    // With the other contract, a call that was denied on the cluster is allowed on this machine.
    assert!(tells(r#"record 12, /kind: "call.denied" on the cluster, "call.intent" here"#), "{found:#?}");
    assert!(tells(r#"record 12, /rule: "tool.precondition" on the cluster, nothing here"#), "{found:#?}");
}
