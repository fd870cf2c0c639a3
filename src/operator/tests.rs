//! The operator against an API server in memory: order of requests, number of writes, crashes in between.

use std::sync::Arc;

use k8s_openapi::api::{
    core::v1::{Namespace, Pod},
    networking::v1::NetworkPolicy,
};
use kube::{
    core::PartialObjectMeta,
    runtime::{
        controller::Action,
        reflector::{ObjectRef, store::Writer},
    },
};
use prometheus::Registry;
use serde_json::{Value, json};
use tokio::sync::watch;

use self::cluster::{Cluster, store};
use super::{
    api::Writer as ApiWriter,
    approvals::Undecided,
    cache::{Attempts, GuardedTask, Stores},
    expectations::Expectations,
    metrics::Metrics,
    reconcile::{Context, ReconcileError, after_error, reconcile},
};
use crate::{
    api::{ApprovalRequest, PolicyPack, ToolContract},
    lenient::Lenient,
    render::{fixtures, names},
    seal::{self, Gateway},
    wire,
};

mod approvals;
pub(super) mod cluster;
mod injected;
mod leads;
mod left;
mod orders;

const TASK: &str = "/apis/belay.dev/v1alpha1/namespaces/team-a/agenttasks/triage";
const STATUS: &str = "PATCH /apis/belay.dev/v1alpha1/namespaces/team-a/agenttasks/triage/status";
const POD: &str = "/api/v1/namespaces/team-a/pods/triage-1";
const POD_2: &str = "/api/v1/namespaces/team-a/pods/triage-2";
const CONFIG_MAP: &str = "/api/v1/namespaces/team-a/configmaps/triage-1";
const POLICY: &str = "/apis/networking.k8s.io/v1/namespaces/team-a/networkpolicies/triage-1";
const POLICIES: &str = "/apis/networking.k8s.io/v1/namespaces/team-a/networkpolicies";
const PACK: &str = "/apis/belay.dev/v1alpha1/policypacks/dev";
const CONTRACT: &str = "/apis/belay.dev/v1alpha1/namespaces/team-a/toolcontracts/tickets";

/// A cluster with one task, and an operator.
struct Scene {
    cluster: Cluster,
    context: Arc<Context>,
    stores: StoreWriters,
    _token: tempfile::NamedTempFile,
}

struct StoreWriters {
    tasks: Writer<GuardedTask>,
    contracts: Writer<Lenient<ToolContract>>,
    packs: Writer<Lenient<PolicyPack>>,
    namespaces: Writer<PartialObjectMeta<Namespace>>,
    pods: Writer<Lenient<Pod>>,
    network_policies: Writer<Lenient<NetworkPolicy>>,
    approvals: Writer<Lenient<ApprovalRequest>>,
}

impl Scene {
    async fn new() -> Self {
        let cluster = Cluster::default();
        let mut task = serde_json::to_value(fixtures::task()).unwrap();
        task.as_object_mut().unwrap().remove("status");
        cluster.put(TASK, task);
        cluster.put(PACK, serde_json::to_value(fixtures::pack()).unwrap());
        for contract in fixtures::contracts() {
            let path = CONTRACT.replace("tickets", contract.metadata.name.as_deref().unwrap());
            cluster.put(&path, serde_json::to_value(contract).unwrap());
        }
        cluster.put(
            "/api/v1/namespaces/team-a",
            json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "team-a", "labels": { "belay.dev/environment": "dev" } } }),
        );
        Self::over(cluster, 200, &serde_json::to_string(&seal::tests::reply()).unwrap()).await
    }

    /// Creates an operator that has just started and whose gateway gives this answer.
    async fn over(cluster: Cluster, status: u16, answer: &str) -> Self {
        let (address, authority) = seal::tests::gateway(wire::SERVER_NAME, status, answer.to_owned()).await;
        let token = seal::tests::token();
        let (tasks, tasks_writer) = store();
        let (contracts, contracts_writer) = store();
        let (packs, packs_writer) = store();
        let (namespaces, namespaces_writer) = store();
        let (pods, pods_writer) = store();
        let (network_policies, policies_writer) = store();
        let metrics = Metrics::new(&Registry::new()).unwrap();
        let context = Context {
            stores: Stores {
                tasks,
                contracts,
                packs,
                namespaces,
                pods,
                network_policies,
                with_pod: Attempts::default(),
                with_network_policy: Attempts::default(),
                approvals: Undecided::default(),
                references_changed: Arc::default(),
                network_policies_changed: Arc::default(),
            },
            memories: Arc::new(Expectations::default()),
            writer: ApiWriter::new(cluster.client(), metrics.clone()),
            gateway: Arc::new(Gateway::new(address, token.path().into(), &authority).unwrap()),
            surroundings: watch::channel(Some(fixtures::surroundings())).1,
            contact: Arc::default(),
            metrics,
            system_namespace: "belay-system".into(),
            s3_endpoint: None,
            believes_caches: false,
        };
        let mut scene = Self {
            cluster,
            context: Arc::new(context),
            stores: StoreWriters {
                tasks: tasks_writer,
                contracts: contracts_writer,
                packs: packs_writer,
                namespaces: namespaces_writer,
                pods: pods_writer,
                network_policies: policies_writer,
                approvals: store().1,
            },
            _token: token,
        };
        scene.sync();
        scene
    }

    /// Copies all objects of the cluster to the caches.
    fn sync(&mut self) {
        let Stores { with_pod, with_network_policy, approvals, .. } = &self.context.stores;
        self.cluster.fill(&mut self.stores.tasks, "agenttasks", |_| {});
        self.cluster.fill(&mut self.stores.contracts, "toolcontracts", |_| {});
        self.cluster.fill(&mut self.stores.packs, "policypacks", |_| {});
        self.stores.namespaces.apply_watcher_event(&kube::runtime::watcher::Event::Apply(
            serde_json::from_value(self.cluster.get("/api/v1/namespaces/team-a").unwrap()).unwrap(),
        ));
        self.cluster.fill(&mut self.stores.pods, "pods", |event| with_pod.follow(event));
        self.cluster.fill(&mut self.stores.network_policies, "networkpolicies", |event| {
            with_network_policy.follow(event);
        });
        self.cluster.fill(&mut self.stores.approvals, "approvalrequests", |event| approvals.follow(event));
        if let Some(task) = self.task() {
            let metadata = kube::Resource::meta(task.as_ref()).clone();
            let uid = metadata.uid.unwrap();
            self.context.memories.cached(&uid, metadata.resource_version.as_deref());
            for pod in self.context.stores.pods.state() {
                self.context.memories.pod_cached(&uid, kube::Resource::meta(pod.as_ref()).uid.as_deref().unwrap());
            }
            for policy in self.context.stores.network_policies.state() {
                let labels = kube::Resource::meta(policy.as_ref()).labels.clone().unwrap();
                self.context.memories.policy_cached(&uid, &labels[names::ATTEMPT]);
            }
        }
    }

    fn task(&self) -> Option<Arc<GuardedTask>> {
        self.context.stores.tasks.get(&ObjectRef::new("triage").within("team-a"))
    }

    async fn look(&self) -> Result<Action, ReconcileError> {
        let task = self.task().unwrap();
        let outcome = reconcile(task.clone(), self.context.clone()).await;
        if let Err(error) = &outcome {
            after_error(&task, error, &self.context);
        }
        outcome
    }

    /// Brings the caches up to date and reconciles.
    async fn step(&mut self) -> Result<Action, ReconcileError> {
        self.sync();
        self.look().await
    }

    /// Returns the current time, by the operator's clock.
    fn now(&self) -> jiff::Timestamp {
        self.context.contact.now()
    }

    fn pod_status(&self, path: &str, status: Value) {
        self.cluster.edit(path, |pod| pod["status"] = status);
    }

    fn run_agent(&self, path: &str) {
        self.pod_status(path, json!({
            "phase": "Running",
            "startTime": "2026-01-01T00:00:00Z",
            "initContainerStatuses": [ container(names::PROBE, json!({ "terminated": { "exitCode": 0 } })) ],
            "containerStatuses": [ container(names::AGENT, json!({ "running": { "startedAt": jiff::Timestamp::now().to_string() } })) ],
        }));
    }

    fn end_agent(&self, path: &str, code: i32) {
        let (started, finished) = ("2026-01-01T00:00:05Z", "2026-01-01T00:00:09Z");
        let ended =
            json!({ "terminated": { "exitCode": code, "reason": "x", "startedAt": started, "finishedAt": finished } });
        self.pod_status(
            path,
            json!({
                "phase": if code == 0 { "Succeeded" } else { "Failed" },
                "initContainerStatuses": [ container(names::PROBE, json!({ "terminated": { "exitCode": 0 } })) ],
                "containerStatuses": [ container(names::AGENT, ended) ],
            }),
        );
    }

    fn status(&self) -> Value {
        self.cluster.get(TASK).unwrap()["status"].clone()
    }

    fn condition(&self, kind: &str) -> Value {
        let status = self.status();
        let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
        conditions.into_iter().find(|one| one["type"] == kind).unwrap_or_default()
    }
}

fn container(name: &str, state: Value) -> Value {
    json!({ "name": name, "image": "i", "imageID": "i", "ready": false, "restartCount": 0, "state": state })
}

/// Reconciles until the NetworkPolicy is created, and then lets the watch show it.
async fn look_beside_a_watch(scene: &mut Scene) -> Result<Action, ReconcileError> {
    scene.sync();
    let look = tokio::spawn(reconcile(scene.task().unwrap(), scene.context.clone()));
    while scene.cluster.get(POLICY).is_none() {
        tokio::task::yield_now().await;
    }
    scene.sync();
    scene.context.stores.network_policies_changed.notify_waiters();
    look.await.unwrap()
}

#[tokio::test]
async fn the_wall_is_read_back_from_the_watch_and_from_the_server_where_that_is_late() {
    let reads = |requests: &[String]| requests.iter().filter(|one| **one == format!("GET {POLICY}")).count();
    let mut scene = Scene::new().await;
    look_beside_a_watch(&mut scene).await.unwrap();
    assert!(scene.cluster.get(POD).is_some());
    assert_eq!(reads(&scene.cluster.requests()), 0);

    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    assert!(scene.cluster.get(POD).is_some());
    assert_eq!(reads(&scene.cluster.requests()), 1);
}

#[tokio::test]
async fn a_wall_that_the_watch_shows_otherwise_holds_no_pod() {
    let mut scene = Scene::new().await;
    scene.cluster.mutate(|path, object| {
        if path == POLICY {
            object["spec"]["egress"] = json!([{}]);
        }
    });
    let error = look_beside_a_watch(&mut scene).await.unwrap_err().to_string();
    assert!(error.contains("NetworkPolicy"), "{error}");
    assert!(scene.cluster.get(POD).is_none());
}

#[tokio::test]
async fn what_the_watch_showed_before_the_write_is_not_what_was_written() {
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    scene.sync();
    let written = serde_json::from_value(scene.cluster.get(POLICY).unwrap()).unwrap();
    assert_eq!(scene.context.stores.read_back(&written).await.as_ref(), Some(&written));
    // The watch does not show another object with the same name yet, and neither a later version of this object.
    for (field, value) in [("uid", "other"), ("resourceVersion", "1000000")] {
        let mut unseen = scene.cluster.get(POLICY).unwrap();
        unseen["metadata"][field] = json!(value);
        let unseen = serde_json::from_value(unseen).unwrap();
        assert_eq!(scene.context.stores.read_back(&unseen).await, None, "{field}");
    }
}

#[tokio::test]
async fn a_whole_task_costs_eight_writes_and_then_none() {
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    let requests = scene.cluster.requests();
    let position = |request: &str| {
        let found: Vec<_> = requests.iter().enumerate().filter(|(_, one)| *one == request).map(|(at, _)| at).collect();
        assert_eq!(found.len(), 1, "{request} in {requests:?}");
        found[0]
    };
    let pod = position("POST /api/v1/namespaces/team-a/pods");
    let read_back = position(&format!("GET {POLICY}"));
    for before in [
        format!("PATCH {TASK}"),
        "POST /api/v1/namespaces/team-a/configmaps".to_owned(),
        format!("POST {POLICIES}"),
        format!("GET {POLICY}"),
    ] {
        assert!(position(&before) < pod, "{requests:?}");
    }
    assert!(position(&format!("POST {POLICIES}")) < read_back);
    assert_eq!(requests.len(), 5, "{requests:?}");

    // While the pod starts, nothing is written, with old caches and with up-to-date caches.
    scene.look().await.unwrap();
    scene.step().await.unwrap();
    scene.pod_status(POD, json!({ "phase": "Pending" }));
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.requests(), Vec::<String>::new());

    scene.run_agent(POD);
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.requests(), [STATUS]);
    assert_eq!(scene.status()["phase"], "Running");
    assert_eq!(scene.condition("Contained")["status"], "True");
    scene.look().await.unwrap();
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.requests(), Vec::<String>::new());

    // A success costs one read, because the sealed state must be read.
    scene.end_agent(POD, 0);
    scene.step().await.unwrap();
    let removed = [format!("GET {CONFIG_MAP}"), format!("DELETE {CONFIG_MAP}"), format!("DELETE {POLICY}")];
    assert_eq!(scene.cluster.requests(), [vec![format!("GET {POD}"), STATUS.to_owned()], removed.to_vec()].concat());
    assert_eq!(scene.status()["phase"], "Succeeded");
    assert_eq!(scene.status()["evidence"]["size"], 3);
    for _ in 0..3 {
        scene.step().await.unwrap();
        scene.look().await.unwrap();
    }
    assert_eq!(scene.cluster.requests(), Vec::<String>::new());
}

#[tokio::test]
async fn a_task_whose_pod_waits_is_pending() {
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    scene.cluster.edit(POD, |pod| {
        pod["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
        pod["status"] = json!({ "phase": "Pending", "conditions": [ { "type": "PodScheduled", "status": "False", "reason": "Unschedulable" } ] });
    });
    scene.cluster.requests();
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.requests(), [STATUS]);
    assert_eq!((&scene.status()["phase"], &scene.status()["reason"]), (&json!("Pending"), &json!("Unschedulable")));
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.requests(), Vec::<String>::new());
}

#[tokio::test]
async fn a_restarted_operator_makes_no_second_pod() {
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    let pod = scene.cluster.get(POD);
    // The operator is killed before it wrote any status.
    let mut scene = Scene::over(scene.cluster, 200, &serde_json::to_string(&seal::tests::reply()).unwrap()).await;
    scene.cluster.requests();
    scene.step().await.unwrap();
    assert!(scene.cluster.writes().iter().all(|write| write == STATUS));
    assert_eq!(scene.cluster.get(POD), pod);
    assert_eq!(scene.cluster.get(POD_2), None);
}

#[tokio::test]
async fn killed_between_policy_and_pod_the_number_is_not_used_again() {
    let mut scene = Scene::new().await;
    scene.cluster.fail("POST /api/v1/namespaces/team-a/pods", 503);
    scene.step().await.unwrap_err();
    scene.cluster.heal();
    let mut scene = Scene::over(scene.cluster, 200, "").await;
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.get(POD), None);
    assert!(scene.cluster.get(POD_2).is_some());
}

#[tokio::test]
async fn a_refused_pod_is_told_and_tried_again_under_its_number() {
    let mut scene = Scene::new().await;
    scene.cluster.fail("POST /api/v1/namespaces/team-a/pods", 403);
    scene.step().await.unwrap_err();
    scene.step().await.unwrap_err();
    assert_eq!(scene.status()["reason"], "PodRefused");
    assert_eq!(scene.condition("Complete")["message"], "on demand");
    scene.cluster.heal();
    scene.step().await.unwrap();
    assert!(scene.cluster.get(POD).is_some());
}

#[tokio::test]
async fn a_pod_that_is_there_already_is_adopted() {
    let scene = Scene::new().await;
    let labels = json!({ names::TASK_UID: fixtures::task().metadata.uid, names::ATTEMPT: "1" });
    scene.cluster.put(POD, json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "triage-1", "namespace": "team-a", "uid": "first", "labels": labels } }));
    // The caches do not show the pod yet.
    scene.look().await.unwrap();
    assert_eq!(scene.cluster.get(POD).unwrap()["metadata"]["uid"], "first");
    assert_eq!(scene.cluster.get(POD_2), None);
}

#[tokio::test]
async fn a_namesakes_pod_is_not_touched() {
    let mut scene = Scene::new().await;
    scene.cluster.put(POD, json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "triage-1", "namespace": "team-a", "labels": {} } }));
    let before = scene.cluster.get(POD);
    let error = scene.step().await.unwrap_err();
    assert!(error.to_string().contains("another owner"), "{error}");
    assert_eq!(scene.cluster.get(POD), before);
}

#[tokio::test]
async fn a_configuration_in_the_way_is_kept_if_it_is_the_same_replaced_if_it_is_ours_and_left_if_it_is_not() {
    let mut scene = Scene::new().await;
    scene.cluster.fail("POST /api/v1/namespaces/team-a/pods", 403);
    scene.step().await.unwrap_err();
    scene.cluster.heal();
    let same = scene.cluster.get(CONFIG_MAP).unwrap();

    let edit = |scene: &Scene, change: fn(&mut Value)| {
        scene.cluster.put(CONFIG_MAP, same.clone());
        scene.cluster.edit(CONFIG_MAP, change);
    };
    edit(&scene, |config| config["metadata"]["ownerReferences"] = json!([]));
    scene.step().await.unwrap_err();
    assert!(scene.cluster.get(CONFIG_MAP).is_some(), "a stranger's was deleted");
    assert!(scene.cluster.get(POD).is_none());

    edit(&scene, |config| config["data"] = json!({"config.json": "{}"}));
    scene.step().await.unwrap_err();
    assert!(scene.cluster.get(CONFIG_MAP).is_none(), "one of ours that differs stays in the way");
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.get(CONFIG_MAP).unwrap()["data"], same["data"]);
    assert!(scene.cluster.get(POD).is_some());
}

#[tokio::test]
async fn a_policy_that_is_not_as_planned_has_no_pod() {
    let mut scene = Scene::new().await;
    scene.cluster.mutate(|path, object| {
        if path.contains("networkpolicies") {
            object["spec"]["egress"] = json!([{}]);
        }
    });
    let error = scene.step().await.unwrap_err();
    assert!(error.to_string().contains("something else writes it"), "{error}");
    assert_eq!(scene.cluster.get(POD), None);
}

#[tokio::test]
async fn a_policy_that_is_deleted_or_changed_is_made_again() {
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    scene.run_agent(POD);
    scene.step().await.unwrap();
    let planned = scene.cluster.get(POLICY).unwrap()["spec"].clone();
    scene.context.memories.update(&fixtures::task().metadata.uid.unwrap(), |memory| memory.claim = None);
    scene.cluster.requests();
    scene.cluster.remove(POLICY);
    // The pack is gone as well, but the location of the evidence was recorded.
    scene.cluster.remove(PACK);
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.requests(), [format!("POST {POLICIES}"), format!("GET {POLICY}")]);
    assert_eq!(scene.cluster.get(POLICY).unwrap()["spec"], planned);
    scene.cluster.edit(POLICY, |policy| policy["spec"]["policyTypes"] = json!(["Ingress"]));
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.get(POLICY).unwrap()["spec"], planned);
    scene.cluster.requests();
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.requests(), Vec::<String>::new());
}

/// The metric is one to alert on: it counts what somebody else did to the NetworkPolicy of a living pod, and nothing that Belay does.
#[tokio::test]
async fn the_metric_of_restored_policies_counts_those_and_nothing_else() {
    let restored = |scene: &Scene| scene.context.metrics.policies_restored.get();
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    scene.step().await.unwrap();
    scene.run_agent(POD);
    scene.step().await.unwrap();
    // A label of somebody else opens nothing.
    scene.cluster.edit(POLICY, |policy| policy["metadata"]["labels"]["team"] = json!("a"));
    scene.step().await.unwrap();
    assert_eq!(restored(&scene), 0, "one that is made and watched is not restored");
    scene.context.memories.update(&fixtures::task().metadata.uid.unwrap(), |memory| memory.claim = None);
    for times in [1, 2] {
        scene.cluster.remove(POLICY);
        scene.step().await.unwrap();
        scene.step().await.unwrap();
        assert_eq!(restored(&scene), times, "deleted, and restored once");
    }
    scene.cluster.edit(POLICY, |policy| policy["spec"]["egress"] = json!([{}]));
    scene.step().await.unwrap();
    assert_eq!(restored(&scene), 3, "changed");
    // Until it is there again, it is not restored.
    scene.cluster.remove(POLICY);
    scene.cluster.fail(&format!("POST {POLICIES}"), 500);
    scene.step().await.unwrap_err();
    assert_eq!(restored(&scene), 3);
    scene.cluster.heal();
    scene.step().await.unwrap();
    assert_eq!(restored(&scene), 4);
    // The operator deletes it itself when the pod has ended.
    scene.end_agent(POD, 0);
    for _ in 0..4 {
        scene.step().await.unwrap();
    }
    assert_eq!(scene.status()["phase"], "Succeeded");
    assert!(scene.cluster.get(POLICY).is_none());
    assert_eq!(restored(&scene), 4, "what Belay deletes is not restored");
}

#[tokio::test]
async fn what_is_wrong_is_told_once_and_cured_by_what_was_missing() {
    let mut scene = Scene::new().await;
    let contract = scene.cluster.get(CONTRACT).unwrap();
    scene.cluster.remove(CONTRACT);
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.requests(), [STATUS]);
    let accepted = scene.condition("Accepted");
    assert_eq!(accepted["status"], "False");
    assert!(accepted["message"].as_str().unwrap().starts_with("spec.tools[0]: expected the name of a ToolContract"));
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.requests(), Vec::<String>::new());
    scene.cluster.put(CONTRACT, contract);
    scene.sync();
    assert_eq!(scene.context.stores.tasks_of_contract(&fixtures::contracts()[0]).len(), 1);
    assert_eq!(scene.context.stores.tasks_of_packs().len(), 1);
    assert_eq!(scene.context.stores.tasks_of_namespace("team-b").len(), 0);
    scene.step().await.unwrap();
    assert!(scene.cluster.get(POD).is_some());
}

#[tokio::test]
async fn a_contract_that_cannot_be_read_is_named() {
    let mut scene = Scene::new().await;
    scene.cluster.edit(CONTRACT, |contract| contract["spec"]["sideEffect"] = json!("none"));
    scene.step().await.unwrap();
    let message = scene.condition("Accepted")["message"].as_str().unwrap().to_owned();
    assert!(message.starts_with("ToolContract/tickets: expected a contract that this version"), "{message}");
}

#[tokio::test]
async fn a_task_that_cannot_be_read_is_told_once() {
    let mut scene = Scene::new().await;
    scene.cluster.edit(TASK, |task| task["spec"]["limits"] = json!("none"));
    for _ in 0..3 {
        scene.step().await.unwrap();
    }
    assert_eq!(scene.cluster.requests(), [STATUS]);
    assert!(scene.condition("Accepted")["message"].as_str().unwrap().contains("this version of Belay can read"));
}

#[tokio::test]
async fn a_lost_pod_is_followed_by_another_and_never_by_two() {
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    scene.run_agent(POD);
    scene.step().await.unwrap();
    // The cache is old: the pod still exists, and nothing is done.
    let pod = scene.cluster.get(POD).unwrap();
    scene.cluster.remove(POD);
    scene.sync();
    scene.cluster.put(POD, pod);
    scene.cluster.requests();
    scene.look().await.unwrap();
    assert_eq!(scene.cluster.requests(), [format!("GET {POD}")]);
    // The pod is gone.
    scene.cluster.remove(POD);
    scene.step().await.unwrap();
    let requests = scene.cluster.requests();
    assert_eq!(requests[..3], [format!("GET {POD}"), format!("GET {TASK}"), STATUS.to_owned()]);
    assert!(scene.cluster.get(POD_2).is_some());
    assert_eq!(scene.status()["attempts"][0]["reason"], "PodLost");
    assert_eq!(scene.status()["attempts"][0]["failureClass"], "Infrastructure");
}

#[tokio::test]
async fn deletion_ends_the_pod_seals_and_lets_go() {
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    scene.run_agent(POD);
    scene.step().await.unwrap();
    scene.cluster.edit(TASK, |task| task["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z"));
    scene.cluster.requests();
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.requests(), [format!("GET {POD}"), format!("GET {TASK}"), format!("DELETE {POD}")]);
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.writes(), [format!("PATCH {TASK}")]);
    assert_eq!(scene.cluster.get(TASK), None);
}

#[tokio::test]
async fn what_was_begun_with_before_is_looked_for_first() {
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    let (pod, config_map) = (scene.cluster.get(POD).unwrap(), scene.cluster.get(CONFIG_MAP).unwrap());
    // In another process, the API server shows the state from before the attempt, and still does after the next reconciliation.
    let cluster = Cluster::default();
    let before = Scene::new().await;
    for path in [TASK, PACK, CONTRACT, &CONTRACT.replace("tickets", "read-log"), "/api/v1/namespaces/team-a"] {
        cluster.put(path, before.cluster.get(path).unwrap());
    }
    let scene = Scene::over(cluster, 200, "{}").await;
    scene.cluster.put(CONFIG_MAP, config_map);
    let error = scene.look().await.unwrap_err().to_string();
    assert!(error.contains("started before"), "{error}");
    assert_eq!(scene.cluster.get(POD), None);
    // The pod exists and is adopted.
    scene.cluster.put(POD, pod);
    scene.cluster.requests();
    scene.look().await.unwrap();
    assert!(scene.cluster.requests().contains(&format!("GET {POD}")));
    assert_eq!(scene.cluster.get(POD_2), None);
}

#[tokio::test]
async fn a_task_is_kept_while_its_evidence_cannot_be_sealed() {
    let scene = Scene::new().await;
    let refusal = r#"{"rule":"evidence.unavailable","reason":"the bucket is away"}"#;
    let mut scene = Scene::over(scene.cluster, 503, refusal).await;
    scene.step().await.unwrap();
    scene.end_agent(POD, 0);
    scene.step().await.unwrap_err();
    assert_eq!(scene.condition("EvidenceSealed")["reason"], "SealFailed");
    assert!(scene.condition("EvidenceSealed")["message"].as_str().unwrap().contains("the bucket is away"));
    assert_eq!(
        (&scene.condition("Complete")["status"], &scene.condition("Ready")["status"]),
        (&json!("False"), &json!("False"))
    );
    scene.cluster.requests();
    scene.cluster.edit(TASK, |task| task["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z"));
    for _ in 0..3 {
        scene.step().await.unwrap_err();
    }
    assert_eq!(scene.cluster.writes(), Vec::<String>::new());
    assert_eq!(scene.cluster.get(TASK).unwrap()["metadata"]["finalizers"], json!([names::FINALIZER]));
    // The gateway is available again.
    let mut scene = Scene::over(scene.cluster, 200, &serde_json::to_string(&seal::tests::reply()).unwrap()).await;
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.writes(), [format!("PATCH {TASK}")]);
}

#[tokio::test]
async fn an_agent_that_fails_is_final_without_retries() {
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    scene.end_agent(POD, 7);
    scene.step().await.unwrap();
    let status = scene.status();
    assert_eq!(
        (&status["phase"], &status["failureClass"], &status["reason"]),
        (&json!("Failed"), &json!("Agent"), &json!("NonZeroExit"))
    );
    assert_eq!(scene.cluster.get(POD_2), None);
}

/// Creates a task with a compensation whose agent ended with this exit code.
async fn undoable(exit: i32, rollback: &str) -> Scene {
    let scene = Scene::new().await;
    scene.cluster.edit(PACK, |pack| pack["spec"]["state"] = json!({ "bucket": "state" }));
    scene.cluster.edit(CONTRACT, |contract| {
        contract["spec"]["rollback"] = json!({ "call": { "contract": "close", "arguments": { "id": "result.id" } } });
    });
    scene.cluster.edit(TASK, |task| task["spec"]["rollback"] = rollback.into());
    let reply = wire::SealReply { compensation_commitment: Some(["close".to_owned()].into()), ..seal::tests::reply() };
    let mut scene = Scene::over(scene.cluster, 200, &serde_json::to_string(&reply).unwrap()).await;
    scene.step().await.unwrap();
    scene.end_agent(POD, exit);
    scene
}

const ROLLBACK: &str = "/apis/belay.dev/v1alpha1/namespaces/team-a/agenttasks/triage-rollback";

#[tokio::test]
async fn a_task_that_fails_is_undone_by_another() {
    let mut scene = undoable(7, "OnFailure").await;
    scene.step().await.unwrap();
    assert_eq!(scene.status()["phase"], "Failed");
    let made = scene.cluster.get(ROLLBACK).unwrap();
    assert_eq!(made["spec"]["rollbackOf"], json!({ "name": "triage", "uid": "5d0e9c1a-0000-4000-8000-000000000001" }));
    assert_eq!((&made["spec"]["tools"], &made["spec"]["principal"]), (&json!(["close"]), &json!("alice@example.test")));
    assert_eq!(
        made["metadata"]["annotations"][names::REQUESTED_BY],
        "system:serviceaccount:belay-system:belay-operator",
        "who asked for it may not approve its calls"
    );
    assert_eq!(made["spec"].get("agent"), None);
}

#[rstest::rstest]
#[case::it_succeeded(0, "OnFailure")]
#[case::on_request_only(7, "OnRequest")]
#[tokio::test]
async fn others_are_left_as_they_are(#[case] exit: i32, #[case] rollback: &str) {
    let mut scene = undoable(exit, rollback).await;
    scene.step().await.unwrap();
    assert!(["Succeeded", "Failed"].contains(&scene.status()["phase"].as_str().unwrap()));
    assert_eq!(scene.cluster.get(ROLLBACK), None);
}

/// Another task has the name of the rollback task, and the task ends anyway.
#[tokio::test]
async fn a_name_that_is_taken_does_not_keep_a_task_from_its_end() {
    let mut scene = undoable(7, "OnFailure").await;
    let mut other = scene.cluster.get(TASK).unwrap();
    other["metadata"]["name"] = "triage-rollback".into();
    scene.cluster.put(ROLLBACK, other.clone());
    scene.step().await.unwrap();
    assert_eq!(scene.status()["phase"], "Failed");
    assert_eq!(scene.cluster.get(ROLLBACK).unwrap()["spec"], other["spec"]);
}

#[tokio::test]
async fn a_rollback_begins_once_the_other_task_has_ended() {
    let scene = Scene::new().await;
    let mut other = scene.cluster.get(TASK).unwrap();
    other["metadata"]["name"] = "other".into();
    other["metadata"]["uid"] = "of-the-other".into();
    let path = TASK.replace("triage", "other");
    scene.cluster.put(&path, other);
    scene.cluster.edit(TASK, |task| {
        task["spec"].as_object_mut().unwrap().remove("agent");
        task["spec"]["rollbackOf"] = json!({ "name": "other", "uid": "of-the-other" });
    });
    let mut scene = Scene::over(scene.cluster, 200, &serde_json::to_string(&seal::tests::reply()).unwrap()).await;
    let action = scene.step().await.unwrap();
    assert_eq!(
        (scene.status()["reason"].as_str(), action),
        (Some("UndoneTaskRuns"), Action::requeue(std::time::Duration::from_secs(2)))
    );
    assert_eq!(scene.cluster.get(POD), None);
    scene.cluster.edit(&path, |task| task["status"] = json!({ "phase": "Failed" }));
    scene.sync();
    scene.step().await.unwrap();
    assert!(scene.cluster.get(POD).is_some());
}

#[tokio::test]
async fn usage_of_the_gateway_survives() {
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    scene.cluster.edit(TASK, |task| task["status"] = json!({ "usage": { "toolCalls": 1, "tokens": 2, "denials": 3 } }));
    scene.run_agent(POD);
    scene.step().await.unwrap();
    assert_eq!(scene.status()["usage"]["tokens"], 2);
}
