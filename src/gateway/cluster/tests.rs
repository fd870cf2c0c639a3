use std::sync::atomic::AtomicUsize;

use serde_json::{Value, json};

use super::*;
use crate::gateway::testing::UID;

/// An API server that has one pod and its task, and counts requests.
#[derive(Default)]
struct Api {
    asked: AtomicUsize,
    empty: bool,
}

impl Fetch for Api {
    fn pod<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<Option<Pod>, String>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move { Ok((!self.empty).then(|| serde_json::from_value(pod("10.0.0.7")).unwrap())) })
    }

    fn task<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<Option<AgentTask>, String>> {
        Box::pin(async move { Ok((!self.empty).then(|| serde_json::from_value(task()).unwrap())) })
    }
}

fn pod(address: &str) -> Value {
    json!({
        "metadata": {
            "namespace": "team", "name": "t-1", "uid": "pod-1",
            "labels": { names::TASK: "t", names::TASK_UID: UID, names::ATTEMPT: "1" },
        },
        "status": { "phase": "Running", "podIP": address },
    })
}

fn task() -> Value {
    json!({
        "metadata": { "namespace": "team", "name": "t", "uid": UID, "generation": 1 },
        "spec": {
            "objective": "x", "workflowClass": "support", "principal": "jane", "agent": { "image": "a" },
            "limits": { "wallTimeSeconds": 1, "toolCalls": 4, "tokens": 0 },
        },
    })
}

fn cluster(api: Api) -> (Cluster, Writer<Lenient<Pod>>, Arc<Api>) {
    let writer = Writer::default();
    let stores = Stores {
        pods: writer.as_reader(),
        tasks: Writer::default().as_reader(),
        contracts: Writer::default().as_reader(),
        packs: Writer::default().as_reader(),
        namespaces: Writer::default().as_reader(),
        approvals: Writer::default().as_reader(),
        secrets: Writer::default().as_reader(),
    };
    let api = Arc::new(api);
    (Cluster::new(stores, api.clone()), writer, api)
}

fn reviewed() -> Reviewed {
    Reviewed {
        username: "system:serviceaccount:team:default".into(),
        pod: Some(BoundPod { namespace: "team".into(), name: "t-1".into(), uid: "pod-1".into() }),
    }
}

#[tokio::test]
async fn a_pod_that_the_stores_do_not_have_yet_is_fetched_once() {
    let (cluster, _writer, api) = cluster(Api::default());
    let peer = "10.0.0.7".parse().unwrap();
    for _ in 0..5 {
        assert_eq!(cluster.identify(&reviewed(), peer).await.unwrap().task, "t");
    }
    assert_eq!(api.asked.load(Ordering::SeqCst), 1);
    assert!(cluster.task("team", "t", UID).is_some(), "its task is known as well");
    assert_eq!(cluster.task("team", "t", "other"), None);
}

#[tokio::test]
async fn a_pod_whose_address_the_stores_do_not_have_yet_is_fetched() {
    let (cluster, mut writer, _) = cluster(Api::default());
    let mut starting = pod("10.0.0.7");
    starting["status"] = json!({ "phase": "Pending" });
    writer.apply_watcher_event(&watcher::Event::Apply(serde_json::from_value(starting).unwrap()));
    assert!(cluster.identify(&reviewed(), "10.0.0.7".parse().unwrap()).await.is_ok());
    // A caller from another address is denied by what the API server says.
    let refused = cluster.identify(&reviewed(), "10.0.0.8".parse().unwrap()).await.unwrap_err();
    assert_eq!(refused.rule, Rule::IdentitySource);
}

#[tokio::test]
async fn a_stranger_does_not_make_the_gateway_ask_without_end() {
    let (cluster, _writer, api) = cluster(Api { empty: true, ..Api::default() });
    for _ in 0..100 {
        assert!(cluster.identify(&reviewed(), "10.0.0.7".parse().unwrap()).await.is_err());
    }
    assert_eq!(api.asked.load(Ordering::SeqCst), 1);
}
