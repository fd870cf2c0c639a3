//! Approvals: an unmodified agent on the OpenAI Agents SDK opens its ticket only after an approver has approved that exact ticket.

use belay::api::{AgentTask, ApprovalRequest, PolicyPack, agent_task::Phase};
use k8s_openapi::api::rbac::v1::RoleBinding;
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};

use crate::support::{World, belay, class, condition, in_world, phase, setting};

const CONTRACTS: &str = include_str!("../demo/manifests/contracts.yaml");
const TASK: &str = include_str!("../demo/manifests/task.yaml");

fn tickets() -> usize {
    std::fs::read_to_string(in_world("tickets.jsonl")).unwrap().lines().count()
}

/// A kubeconfig that impersonates another user, for the `belay` command.
struct As {
    folder: tempfile::TempDir,
}

impl As {
    fn new(user: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let own = std::fs::read_to_string(setting("KUBECONFIG")).unwrap();
        let mut config: Value = serde_saphyr::from_str(&own).unwrap();
        for one in config["users"].as_array_mut().unwrap() {
            one["user"]["as"] = user.into();
            one["user"]["as-groups"] = json!(["oncall"]);
        }
        std::fs::write(folder.path().join("config"), config.to_string()).unwrap();
        Self { folder }
    }

    fn belay(&self, args: &[&str]) -> (i32, String) {
        let path = self.folder.path().join("config");
        let args: Vec<&str> = args.iter().copied().chain(["--kubeconfig", path.to_str().unwrap()]).collect();
        let output = belay(&args);
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
    }
}

/// Applies the demo's task in a namespace of its own, with `more` in the spec of the contract `open-ticket`.
async fn triage(world: &World, more: &str) {
    triage_by(world, more, TASK).await;
}

async fn triage_by(world: &World, more: &str, task: &str) {
    let own = |manifests: &str| manifests.replace("namespace: belay-demo", &format!("namespace: {}", world.namespace));
    let marker = "  tool: open_ticket\n  description";
    let asking = format!("  {more}\n{marker}");
    let contracts = own(CONTRACTS);
    assert!(contracts.contains(marker));
    world.kubectl_apply(&contracts.replace(marker, &asking));
    let authority = std::fs::read_to_string(in_world("ca.crt")).unwrap();
    world.config_map("world-ca", &[("ca.crt", &authority)]).await;
    // The ticket service does not open a ticket that exists, so each test starts without tickets.
    std::fs::write(in_world("tickets.jsonl"), "").unwrap();
    approvers(world).await;
    world.kubectl_apply(&own(task));
}

/// Binds the group `oncall` to the role of approvers.
async fn approvers(world: &World) {
    let approvers = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "approvers"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "belay-approver"},
        "subjects": [
            {"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "oncall"},
        ],
    });
    world
        .api::<RoleBinding>()
        .patch("approvers", &PatchParams::apply("e2e"), &Patch::Apply(approvers))
        .await
        .expect("cannot bind the approvers");
}

async fn approved_by_ana(world: &World) -> String {
    let name = asked(world).await.name_any();
    let (code, text) = As::new("ana").belay(&["approve", &name, "-n", &world.namespace]);
    assert_eq!(code, 0, "{text}");
    name
}

async fn asked(world: &World) -> ApprovalRequest {
    let requests: Api<ApprovalRequest> = world.api();
    for _ in 0..600 {
        if let Some(request) = requests.list(&Default::default()).await.unwrap().items.pop() {
            return request;
        }
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    let task = world.api::<AgentTask>().get("triage").await.unwrap();
    panic!("nobody was asked; the task: {:#?}, {:?}", task.status, condition(&task, "Accepted", "False"));
}

/// Returns what the task's status says once it waits for approvers.
async fn waits(world: &World) -> String {
    let mut says = None;
    for _ in 0..150 {
        let task = world.api::<AgentTask>().get("triage").await.unwrap();
        says = condition(&task, "Ready", "False");
        if let Some(says) = says.clone().filter(|says| says.starts_with("WaitingForApproval: ")) {
            return says;
        }
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    panic!("the status does not say that the task waits: {says:?}");
}

#[tokio::test]
async fn an_agents_ticket_waits_for_the_right_person() {
    let world = World::governed("approval", "dev").await;
    triage(&world, "approval: {approvers: {groups: [oncall]}, holdSeconds: 90}").await;
    let request = asked(&world).await;
    let name = request.name_any();
    let arguments: Value = serde_json::from_str(&request.spec.arguments).unwrap();
    assert_eq!(arguments["severity"], "high");
    assert_eq!((request.spec.principal.as_str(), request.spec.tool.as_str()), ("oncall@example.com", "open_ticket"));
    let requester = request.spec.requester.clone().expect("who asked for the task is not known");

    // Neither the task's principal nor its requester may approve the call.
    for user in ["oncall@example.com", requester.as_str()] {
        let (code, text) = As::new(user).belay(&["approve", &name, "-n", &world.namespace]);
        assert!(code != 0 && text.contains("expected an approval by another user"), "{user}: {text}");
    }
    assert_eq!(tickets(), 0, "a ticket was opened before anybody approved it");
    let says = waits(&world).await;
    assert!(says.contains(&format!("ApprovalRequest {name} (expires at ")), "{says}");
    let (code, text) = As::new("ana").belay(&["approvals", "-n", &world.namespace]);
    assert!(code == 0 && text.contains(&name), "{text}");
    let (code, text) = As::new("ana").belay(&["approve", &name, "--reason", "seen", "-n", &world.namespace]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = As::new("ana").belay(&["deny", &name, "-n", &world.namespace]);
    assert!(code != 0, "a decision was changed: {text}");

    let task = world.ended("triage", 180).await;
    assert_eq!(phase(&task), Some(Phase::Succeeded), "{:?}", task.status);
    assert_eq!(tickets(), 1);
    let pod = task.status.as_ref().unwrap().attempts.last().unwrap().pod.clone();
    let records = world.records(&pod).await;
    let kinds: Vec<&str> = records.iter().filter_map(|record| record["kind"].as_str()).collect();
    let at = |kind: &str| kinds.iter().position(|found| *found == kind).unwrap_or_else(|| panic!("no {kind}"));
    assert!(at("approval.requested") < at("approval.decided"));
    let made = records.iter().filter(|record| record["approvals"] == json!([name])).count();
    assert_eq!(made, 1, "expected one call by the approval");
    let (code, report) = world.verify("triage");
    assert_eq!((code, report["verdict"].as_str()), (0, Some("VALID")), "{report:#}");
    world.clean().await;
}

#[tokio::test]
async fn a_task_may_end_when_nobody_approves_in_time() {
    let world = World::governed("unapproved", "dev").await;
    triage(&world, "approval: {approvers: {groups: [oncall]}, timeoutSeconds: 5, onTimeout: EndTask}").await;
    let task = world.ended("triage", 120).await;
    let status = task.status.clone().unwrap();
    assert_eq!(status.reason.as_deref(), Some("ApprovalExpired"), "{status:?}");
    let (code, report) = world.verify("triage");
    assert_eq!((code, report["verdict"].as_str()), (0, Some("VALID")), "{report:#}");
    world.clean().await;
}

/// The pack requires the approval, not the contract. Approvers see the reasons, but not the arguments that the contract redacts. The
/// gateway sends the one credential that the pack has for this principal to the ticket service.
#[tokio::test]
async fn a_pack_has_people_asked_and_a_credential_for_the_principal() {
    let mut class = class(
        "triage",
        "gvisor",
        json!([
            {"host": "models.world.test", "uses": ["Models"], "credentials": [{"secret": "world-model-key", "key": "token"}]},
            {"host": "files.world.test", "uses": ["Tools"]},
            {"host": "tickets.world.test", "uses": ["Tools"], "credentials": [
                {"secret": "nobodys-key", "key": "token", "principals": ["somebody-else@example.com"]},
                {"secret": "world-ticket-key", "key": "token", "principals": ["oncall@*"]},
            ]},
            {"host": "docs.world.test", "uses": ["Direct"]},
        ]),
    );
    class["limits"]["wallTimeSeconds"] = 3600.into();
    let world = World::new("pack-asks", json!([class])).await;
    let pack = json!({
        "spec": {
            "rules": [
                {"name": "by-contract", "decision": "Allow"},
                {"name": "tickets-are-seen", "tools": ["open_*"], "effects": ["write"], "decision": "RequireApproval"},
            ],
            "risk": {
                "terms": [{"name": "change", "when": "effect != 'read'", "points": 40}],
                "approveAt": 40,
            },
            "approval": {"approvers": {"groups": ["oncall"]}, "holdSeconds": 90},
        },
    });
    let packs: Api<PolicyPack> = Api::all(world.client.clone());
    packs.patch(&world.namespace, &PatchParams::default(), &Patch::Merge(&pack)).await.expect("cannot change the pack");
    triage(&world, "redact: [/title]").await;
    let request = asked(&world).await;
    let name = request.name_any();
    assert_eq!(request.spec.reasons, ["rule tickets-are-seen", "risk 40 (change 40)"]);
    let shown: Value = serde_json::from_str(&request.spec.arguments).unwrap();
    assert_eq!((&shown["title"], &shown["severity"]), (&json!("[redacted]"), &json!("high")));
    let (code, text) = As::new("ana").belay(&["approvals", "-n", &world.namespace]);
    assert!(code == 0 && text.contains("by the pack") && text.contains("rule tickets-are-seen"), "{text}");
    let (code, text) = As::new("ana").belay(&["approve", &name, "-n", &world.namespace]);
    assert_eq!(code, 0, "{text}");

    let task = world.ended("triage", 180).await;
    assert_eq!(phase(&task), Some(Phase::Succeeded), "{:?}", task.status);
    assert_eq!(tickets(), 1);
    let pod = task.status.as_ref().unwrap().attempts.last().unwrap().pod.clone();
    let records = world.records(&pod).await;
    let made: Vec<&Value> = records.iter().filter(|record| record["approvals"] == json!([name])).collect();
    let [made] = made.as_slice() else { panic!("expected one call by the approval, found {made:#?}") };
    assert_eq!(made["assessment"]["risk"], json!({"score": 40, "terms": ["change"]}));
    let (code, report) = world.verify("triage");
    assert_eq!((code, report["verdict"].as_str()), (0, Some("VALID")), "{report:#}");
    world.clean().await;
}

/// LangGraph's agent is unmodified except for its environment. It gets the answer "pending", and calls again until an approver has
/// approved.
#[tokio::test]
async fn a_langgraph_agents_ticket_is_approved() {
    let world = World::governed("langgraph", "dev").await;
    let agent = "image: localhost/belay-peers:dev\n    command: [python3, -S, /opt/agent/langgraph_agent.py]\n    \
                 env:\n      - {name: MODEL, value: triage}";
    let task = TASK.replace("image: localhost/belay-demo-agent:dev\n    env:", agent);
    assert_ne!(task, TASK);
    triage_by(&world, "approval: {approvers: {groups: [oncall]}, holdSeconds: 2}", &task).await;
    let request = asked(&world).await;
    // Long enough for the agent to get the answer "pending" more than once.
    tokio::time::sleep(std::time::Duration::from_secs(6)).await;
    assert_eq!(tickets(), 0);
    assert_eq!(approved_by_ana(&world).await, request.name_any());
    let ended = world.ended("triage", 180).await;
    assert_eq!(phase(&ended), Some(Phase::Succeeded), "{:?}", ended.status);
    assert_eq!(tickets(), 1);
    let (code, report) = world.verify("triage");
    assert_eq!((code, report["verdict"].as_str()), (0, Some("VALID")), "{report:#}");
    world.clean().await;
}

/// The agent is one `curl`. It keeps the connection open while an approver decides about a tool whose upstream is an HTTP request.
#[tokio::test]
async fn a_plain_curl_waits_for_its_approval() {
    let egress = json!([{"host": "docs.world.test", "uses": ["Tools"]}]);
    let world = World::new("curl", json!([class("read", "gvisor", egress)])).await;
    approvers(&world).await;
    world.kubectl_apply(
        &json!({
            "apiVersion": "belay.dev/v1alpha1", "kind": "ToolContract", "metadata": {"name": "read-page"},
            "spec": {
                "tool": "read_page", "description": "Reads a page.", "sideEffect": "read",
                "upstream": {"http": {"method": "GET", "url": "https://docs.world.test/{page}"}},
                "input": {"type": "object", "required": ["page"], "properties": {"page": {"type": "string"}}},
                "approval": {"approvers": {"groups": ["oncall"]}, "holdSeconds": 90},
            },
        })
        .to_string(),
    );
    let message = json!({
        "jsonrpc": "2.0", "id": 1, "method": "tools/call",
        "params": {"name": "read_page", "arguments": {"page": "runbook"}},
    });
    let curl = format!(
        "curl -sS --fail-with-body -H 'content-type: application/json' -H 'accept: application/json, text/event-stream' \
         -d '{message}' \"$BELAY_MCP_URL\""
    );
    world
        .task(
            "curl",
            json!({
                "objective": "Read the runbook.", "workflowClass": "read", "principal": "oncall@example.com",
                "agent": {"image": "localhost/belay-peers:dev", "command": ["/bin/dash", "-c", curl]},
                "tools": ["read-page"],
                "limits": {"wallTimeSeconds": 300, "toolCalls": 1, "tokens": 0},
            }),
        )
        .await;
    let name = approved_by_ana(&world).await;
    let ended = world.ended("curl", 120).await;
    assert_eq!(phase(&ended), Some(Phase::Succeeded), "{:?}", ended.status);
    let pod = ended.status.as_ref().unwrap().attempts.last().unwrap().pod.clone();
    let seen = world.logs(&pod, "agent").await;
    assert!(seen.contains("restart checkout"), "{seen}");
    let records = world.records(&pod).await;
    assert_eq!(records.iter().filter(|record| record["approvals"] == json!([name])).count(), 1);
    let (code, report) = world.verify("curl");
    assert_eq!((code, report["verdict"].as_str()), (0, Some("VALID")), "{report:#}");
    world.clean().await;
}
