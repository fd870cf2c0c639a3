//! An agent uses a Service of the cluster, by its name, because the administrator has opened the addresses of Services to that name.

use belay::api::agent_task::Phase;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};

use crate::support::{World, agent_image, class, phase};

/// The name and the address of the Service, as e2e/world/hosts and e2e/values.yaml have them.
const HOST: &str = "shop.belay-e2e-private.svc.cluster.local";
const ADDRESS: &str = "10.96.77.7";

/// The server of the Service.
const SHOP: &str = "
import http.server, json
class Shop(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({'order': self.path.rsplit('/', 1)[1], 'state': 'shipped'}).encode()
        self.send_response(200)
        self.send_header('content-type', 'application/json')
        self.send_header('content-length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(('0.0.0.0', 8080), Shop).serve_forever()
";

/// Starts the server and its Service.
async fn shop(world: &World) {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "shop", "labels": {"app": "shop"}},
        "spec": {
            "runtimeClassName": "runc", "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": false,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "shop", "image": agent_image(), "command": ["python3", "-c", SHOP],
                "ports": [{"containerPort": 8080}],
                "readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1},
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
            }],
        },
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "shop"},
        "spec": {"clusterIP": ADDRESS, "selector": {"app": "shop"}, "ports": [{"port": 80, "targetPort": 8080}]},
    });
    let (pods, services): (Api<Pod>, Api<Service>) = (world.api(), world.api());
    pods.patch("shop", &PatchParams::apply("e2e"), &Patch::Apply(pod)).await.unwrap();
    services.patch("shop", &PatchParams::apply("e2e"), &Patch::Apply(service)).await.unwrap();
    world.pod_ready("shop", 60).await;
}

/// Returns the command of an agent that reads an order with each of these tools.
fn reads(tools: &[&str]) -> Value {
    let call = |tool: &&str| {
        let message = json!({
            "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": {"id": "A-1"}},
        });
        format!(
            "curl -sS -H 'content-type: application/json' -H 'accept: application/json, text/event-stream' -d '{message}' \"$BELAY_MCP_URL\"; echo"
        )
    };
    json!(["/bin/dash", "-c", tools.iter().map(call).collect::<Vec<_>>().join("\n")])
}

#[tokio::test]
async fn a_service_of_the_cluster_is_a_tool() {
    let egress = json!([
        {"host": HOST, "ports": [80], "uses": ["Tools"]},
        // It resolves to the same Service, and is not opened.
        {"host": "shop.world.test", "ports": [80], "uses": ["Tools"]},
    ]);
    let world = World::new("private", json!([class("shop", "gvisor", egress)])).await;
    shop(&world).await;
    for (name, host) in [("by-its-name", HOST), ("by-another", "shop.world.test")] {
        let contract = json!({
            "apiVersion": "belay.dev/v1alpha1", "kind": "ToolContract", "metadata": {"name": name},
            "spec": {
                "tool": name.replace('-', "_"), "description": "Reads an order.", "sideEffect": "read",
                "upstream": {"http": {"method": "GET", "url": format!("http://{host}/orders/{{id}}")}},
                "input": {
                    "type": "object", "required": ["id"],
                    "properties": {"id": {"type": "string", "pattern": "^[A-Z]-[0-9]{1,6}$"}},
                },
            },
        });
        world.kubectl_apply(&contract.to_string());
    }
    let agent = json!({"image": "localhost/belay-peers:dev", "command": reads(&["by_its_name", "by_another"])});
    world
        .task("reader", json!({"workflowClass": "shop", "agent": agent, "tools": ["by-its-name", "by-another"]}))
        .await;
    let task = world.ended("reader", 120).await;
    assert_eq!(phase(&task), Some(Phase::Succeeded), "{:?}", task.status);

    let said = world.logs("reader-1", "agent").await;
    assert!(said.contains("shipped"), "the Service was not reached: {said}");
    assert!(said.contains("egress.address") && said.contains("gateway.privateUpstreams"), "{said}");
    let outcomes: Vec<Value> =
        world.records("reader-1").await.into_iter().filter(|record| record["kind"] == "call.outcome").collect();
    let applied: Vec<&Value> = outcomes.iter().filter(|outcome| outcome["rule"].is_null()).collect();
    let [applied] = applied.as_slice() else { panic!("expected one call that was made, found {outcomes:#?}") };
    assert!(applied.to_string().contains(&format!("{ADDRESS}:80")), "the address is not on record: {applied:#}");
    let (code, report) = world.verify("reader");
    assert_eq!((code, report["verdict"].as_str()), (0, Some("VALID")), "{report:#}");
    world.clean().await;
}
