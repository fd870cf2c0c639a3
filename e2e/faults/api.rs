//! The part of the API server that a gateway uses: a task, its pod, contracts and pack, which never change, and reviews of tokens.

use axum::{
    Json,
    body::Body,
    http::{Method, Request, StatusCode},
    response::{IntoResponse, Response},
};
use belay::wire;
use http_body_util::BodyExt;
use serde_json::{Value, json};

use super::upstream::HOST;

/// The UID of the task.
pub const UID: &str = "6f9c3c1e-0000-4000-8000-000000000001";
/// The evidence bucket.
pub const EVIDENCE: &str = "belay-evidence";
/// The state bucket, with idempotent results and the salt.
pub const STATE: &str = "belay-state";
/// The retention of evidence. It is more than a year, because the tests step clocks by a year.
pub const RETENTION_DAYS: i64 = 400;
/// The tokens of the harness and the operator.
pub const TOKENS: [&str; 2] = ["harness", "operator"];

/// Returns the task.
pub fn task() -> Value {
    json!({
        "apiVersion": "belay.dev/v1alpha1", "kind": "AgentTask",
        "metadata": {"namespace": "team", "name": "t", "uid": UID, "generation": 1},
        "spec": {
            "objective": "Tidy up.", "workflowClass": "support", "principal": "jane@example.com",
            "agent": {"image": "localhost/agent:dev"}, "tools": ["look", "note", "pay", "say"],
            "limits": {"wallTimeSeconds": 600, "toolCalls": 1000, "tokens": 1},
        },
    })
}

/// Returns the contracts of the task: a tool that reads, one that writes, one that is idempotent for each order, and one over MCP.
pub fn contracts() -> Vec<Value> {
    let contract = |tool: &str, effect: &str, upstream: Value, more: Value| {
        let mut spec = json!({
            "tool": tool, "description": "A tool.", "input": {"type": "object"}, "sideEffect": effect, "upstream": upstream,
        });
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({
            "apiVersion": "belay.dev/v1alpha1", "kind": "ToolContract",
            "metadata": {"namespace": "team", "name": tool, "uid": format!("contract-{tool}"), "generation": 1},
            "spec": spec,
        })
    };
    let http = |method: &str, path: &str| json!({"http": {"method": method, "url": format!("http://{HOST}{path}")}});
    let input =
        |name: &str, of: &str| json!({"type": "object", "required": [name], "properties": {name: {"type": of}}});
    let n = json!({"input": input("n", "integer")});
    let once = json!({
        "input": input("order", "string"), "idempotency": {"argument": "order", "windowSeconds": 86_400},
    });
    vec![
        contract("look", "read", http("GET", "/look/{n}"), n.clone()),
        contract("note", "write", http("POST", "/call/note"), n.clone()),
        contract("pay", "external", http("POST", "/call/pay"), once),
        contract("say", "write", json!({"mcp": {"url": format!("http://{HOST}/mcp"), "tool": "say"}}), n),
    ]
}

/// Returns the pack.
pub fn pack() -> Value {
    json!({
        "apiVersion": "belay.dev/v1alpha1", "kind": "PolicyPack",
        "metadata": {"name": "dev", "uid": "pack", "generation": 1},
        "spec": {
            "environment": "dev",
            "namespaceSelector": {"matchLabels": {"belay": "dev"}},
            "workflowClasses": [{
                "name": "support", "allowedEffects": ["read", "write", "external"], "resources": {},
                "egress": [{"host": HOST, "ports": [80], "uses": ["Tools"]}],
                "limits": {"wallTimeSeconds": 600, "toolCalls": 1000, "tokens": 1},
            }],
            "models": {},
            "evidence": {"bucket": EVIDENCE, "mode": "Compliance", "retentionDays": RETENTION_DAYS},
            "state": {"bucket": STATE},
        },
    })
}

fn pod() -> Value {
    json!({
        "metadata": {
            "namespace": "team", "name": "t-1", "uid": "pod-1",
            "labels": {"belay.dev/task": "t", "belay.dev/task-uid": UID, "belay.dev/attempt": "1"},
        },
        "status": {"phase": "Running", "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]},
    })
}

/// Answers one request.
pub async fn answer(request: Request<Body>) -> Response {
    let (head, body) = request.into_parts();
    let plural = head.uri.path().trim_end_matches("/status").rsplit('/').next().unwrap_or_default();
    let watches = head.uri.query().unwrap_or_default().contains("watch=true");
    match head.method {
        Method::POST if plural == "tokenreviews" => {
            let body = body.collect().await.unwrap().to_bytes();
            Json(reviewed(serde_json::from_slice(&body).unwrap())).into_response()
        }
        // The gateway writes the usage to the task's status.
        Method::PATCH => Json(task()).into_response(),
        // A watch has no events, because nothing changes.
        Method::GET if watches => {
            Body::from_stream(futures::stream::pending::<Result<Vec<u8>, std::io::Error>>()).into_response()
        }
        Method::GET => match list(plural) {
            Some(items) => {
                let list =
                    json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "1"}, "items": items});
                Json(list).into_response()
            }
            None => StatusCode::NOT_FOUND.into_response(),
        },
        _ => StatusCode::METHOD_NOT_ALLOWED.into_response(),
    }
}

fn list(plural: &str) -> Option<Vec<Value>> {
    Some(match plural {
        "pods" => vec![pod()],
        "agenttasks" => vec![task()],
        "toolcontracts" => contracts(),
        "policypacks" => vec![pack()],
        "namespaces" => vec![json!({"metadata": {"name": "team", "labels": {"belay": "dev"}}})],
        "approvalrequests" | "secrets" => vec![],
        _ => return None,
    })
}

fn reviewed(mut review: Value) -> Value {
    let user = match review["spec"]["token"].as_str() {
        Some("operator") => json!({"username": "system:serviceaccount:belay-system:belay-operator"}),
        Some("harness") => json!({
            "username": "system:serviceaccount:team:default",
            "extra": {
                "authentication.kubernetes.io/pod-name": ["t-1"],
                "authentication.kubernetes.io/pod-uid": ["pod-1"],
            },
        }),
        _ => Value::Null,
    };
    review["status"] = json!({"authenticated": !user.is_null(), "audiences": [wire::AUDIENCE], "user": user});
    review
}
