//! Rollbacks: automatic after a task has failed, and on request.

use belay::api::{AgentTask, agent_task::Phase};
use kube::{Api, ResourceExt, api::PostParams};
use serde_json::{Value, json};

use crate::support::{World, belay, class, in_world, merge, phase, ticket_contract};

/// Returns the tickets of a test: the title, and the reason for closing if the ticket is closed.
fn tickets(of: &str) -> Vec<(String, Option<String>)> {
    let text = std::fs::read_to_string(in_world("tickets.jsonl")).unwrap();
    let tickets = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let title = |ticket: &Value| ticket["title"].as_str().unwrap().to_owned();
    let of_test = tickets.filter(|ticket| title(ticket).starts_with(of));
    of_test.map(|ticket| (title(&ticket), ticket["closed"].as_str().map(str::to_owned))).collect()
}

/// Creates a namespace with tools that open and close tickets, and a tool that notifies somebody, which has no compensation.
async fn world(name: &str) -> World {
    let egress = json!([{"host": "tickets.world.test", "uses": ["Tools"], "credentials": [{"secret": "world-ticket-key", "key": "token"}]}]);
    let world = World::new(name, json!([class("tickets", "gvisor", egress)])).await;
    let contract = |name: &str, upstream: &str, arguments: &[&str], mut more: Value| {
        merge(&mut more, json!({"input": {"required": arguments}}));
        ticket_contract(name, upstream, arguments, more)
    };
    let open = ["title", "severity", "body"];
    let closing = json!({"title": "args.title", "why": "'rolled back, was ' + args.severity"});
    let closed =
        json!({"rollback": {"call": {"contract": "close-ticket", "arguments": closing, "withinSeconds": 600}}});
    let by_hand = json!({"rollback": {"byHand": "tell them that it was nothing"}});
    for manifest in [
        contract("open-ticket", "open_ticket", &open, closed),
        contract("tell-people", "open_ticket", &open, by_hand),
        contract("close-ticket", "close_ticket", &["title", "why"], json!({})),
    ] {
        world.kubectl_apply(&manifest);
    }
    world
}

/// Runs a task whose agent is a shell script that makes these calls and exits with this code.
async fn task(world: &World, name: &str, calls: &[(&str, String)], exit: i32) {
    let call = |(tool, title): &(&str, String)| {
        let message = json!({
            "jsonrpc": "2.0", "id": 1, "method": "tools/call",
            "params": {"name": tool, "arguments": {"title": title, "severity": "low", "body": "b"}},
        });
        format!(
            "curl -sS --fail-with-body -H 'content-type: application/json' -H 'accept: application/json, text/event-stream' \
             -d '{message}' \"$BELAY_MCP_URL\""
        )
    };
    let script = calls.iter().map(call).chain([format!("exit {exit}")]).collect::<Vec<_>>().join("\n");
    world
        .task(
            name,
            json!({
                "objective": "Open tickets.", "workflowClass": "tickets", "principal": "kubernetes-admin",
                "agent": {"image": "localhost/belay-peers:dev", "command": ["/bin/dash", "-c", script]},
                "tools": ["open-ticket", "tell-people"],
                "limits": {"wallTimeSeconds": 300, "toolCalls": 8, "tokens": 0},
            }),
        )
        .await;
}

/// Returns the calls that a rollback compensated, in the order of its log, as its harness printed the records.
async fn undone(world: &World, rollback: &AgentTask) -> Vec<String> {
    let pod = rollback.status.as_ref().unwrap().attempts.last().unwrap().pod.clone();
    let records = world.records(&pod).await;
    records.iter().filter_map(|record| Some(record["compensates"].as_str()?.to_owned())).collect()
}

fn valid(world: &World, task: &str) -> Value {
    let (code, report) = world.verify(task);
    assert_eq!((code, report["verdict"].as_str()), (0, Some("VALID")), "{report:#}");
    report
}

#[tokio::test]
async fn a_task_that_fails_is_undone() {
    let world = world("undone").await;
    let (one, two) = ("undone: one".to_owned(), "undone: two".to_owned());
    task(&world, "fails", &[("open_ticket", one.clone()), ("open_ticket", two.clone())], 3).await;
    let failed = world.ended("fails", 180).await;
    assert_eq!(phase(&failed), Some(Phase::Failed), "{:?}", failed.status);
    let rollback = world.ended("fails-rollback", 180).await;
    assert_eq!(phase(&rollback), Some(Phase::Succeeded), "{:?}", rollback.status);
    assert_eq!(rollback.spec.principal, failed.spec.principal);
    let closed = Some("rolled back, was low".to_owned());
    assert_eq!(tickets("undone: "), [(one, closed.clone()), (two, closed)]);

    let order = undone(&world, &rollback).await;
    let number = |call: &String| call.trim_start_matches('c').parse::<u64>().unwrap();
    assert!(order.len() == 2 && number(&order[0]) > number(&order[1]), "expected the newest first, found {order:?}");
    valid(&world, "fails");
    let report = valid(&world, "fails-rollback");
    assert_eq!(
        (&report["summary"]["rollback"]["undone"], &report["summary"]["rollback"]["left"]),
        (&json!(2), &json!([]))
    );
    let told = belay(&["rollback", "fails", "-n", &world.namespace]);
    let text = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.status.success() && text.contains("2 of 2 calls undone"), "{text}");

    // A second rollback under another name finds that all calls are compensated.
    let mut again = AgentTask::new("again", rollback.spec.clone());
    again.metadata.namespace = Some(world.namespace.clone());
    Api::<AgentTask>::namespaced(world.client.clone(), &world.namespace)
        .create(&PostParams::default(), &again)
        .await
        .unwrap();
    let again = world.ended("again", 180).await;
    assert_eq!(phase(&again), Some(Phase::Failed), "{:?}", again.status);
    let report = valid(&world, "again");
    assert_eq!(report["summary"]["rollback"]["undone"], json!(0), "{report:#}");
    world.clean().await;
}

#[tokio::test]
async fn what_no_call_undoes_is_left_to_people() {
    let world = world("by-hand").await;
    let (one, two) = ("by-hand: one".to_owned(), "by-hand: two".to_owned());
    task(&world, "ends", &[("open_ticket", one.clone()), ("tell_people", two.clone())], 0).await;
    let ended = world.ended("ends", 180).await;
    assert_eq!(phase(&ended), Some(Phase::Succeeded), "{:?}", ended.status);
    let tasks: Api<AgentTask> = world.api();
    assert!(tasks.get_opt("ends-rollback").await.unwrap().is_none(), "a task that succeeded was rolled back");

    let asked = belay(&["rollback", "ends", "-n", &world.namespace]);
    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
    let rollback = world.ended("ends-rollback", 180).await;
    assert_eq!(phase(&rollback), Some(Phase::Failed), "{:?}", rollback.status);
    assert_eq!(tickets("by-hand: "), [(one, Some("rolled back, was low".to_owned())), (two, None)]);
    let told = belay(&["rollback", "ends", "-n", &world.namespace]);
    let text = String::from_utf8_lossy(&told.stdout).into_owned();
    assert_eq!(told.status.code(), Some(1), "{text}");
    assert!(
        text.contains("1 of 2 calls undone") && text.contains("tell_people: tell them that it was nothing"),
        "{text}"
    );
    let report = valid(&world, "ends-rollback");
    assert_eq!(report["summary"]["rollback"]["undone"], json!(1), "{report:#}");
    assert_eq!(rollback.name_any(), "ends-rollback");
    world.clean().await;
}
