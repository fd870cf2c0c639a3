//! Tests the statuses against an API server in memory.

use std::sync::Arc;

use kube::runtime::reflector::store::Writer as StoreWriter;
use prometheus::Registry;
use serde_json::{Value, json};

use super::*;
use crate::{
    api::{PolicyPack, ToolContract},
    operator::{
        approvals::Undecided,
        cache::Attempts,
        metrics::Metrics,
        tests::cluster::{Cluster, store},
    },
    render::fixtures,
};

const PACK: &str = "/apis/belay.dev/v1alpha1/policypacks/dev";
const CONTRACT: &str = "/apis/belay.dev/v1alpha1/namespaces/team-a/toolcontracts/tickets";

struct Scene {
    cluster: Cluster,
    stores: Stores,
    contracts: StoreWriter<Lenient<ToolContract>>,
    packs: StoreWriter<Lenient<PolicyPack>>,
    writer: Writer,
    statuses: Statuses,
}

impl Scene {
    /// Creates a valid pack and a valid contract without a status, and an operator that has just started to lead.
    fn new() -> Self {
        let cluster = Cluster::default();
        let contract = fixtures::contracts().into_iter().find(|one| one.metadata.name.as_deref() == Some("tickets"));
        cluster.put(PACK, serde_json::to_value(fixtures::pack()).unwrap());
        cluster.put(CONTRACT, serde_json::to_value(contract.unwrap()).unwrap());
        let ((contracts, contracts_writer), (packs, packs_writer)) = (store(), store());
        let stores = Stores {
            tasks: store().0,
            contracts,
            packs,
            namespaces: store().0,
            pods: store().0,
            network_policies: store().0,
            with_pod: Attempts::default(),
            with_network_policy: Attempts::default(),
            approvals: Undecided::default(),
            references_changed: Arc::default(),
            network_policies_changed: Arc::default(),
        };
        for path in [PACK, CONTRACT] {
            cluster.edit(path, |object| {
                object["metadata"]["generation"] = json!(1);
                object["status"] = json!({ "observedGeneration": -1 });
            });
        }
        let writer = Writer::new(cluster.client(), Metrics::new(&Registry::new()).unwrap());
        let statuses = Statuses::default();
        Self { cluster, stores, contracts: contracts_writer, packs: packs_writer, writer, statuses }
    }

    fn sync(&mut self) {
        self.cluster.fill(&mut self.contracts, "toolcontracts", |_| {});
        self.cluster.fill(&mut self.packs, "policypacks", |_| {});
    }

    /// Brings the caches up to date and returns the requests of one pass.
    async fn step(&mut self) -> Vec<String> {
        self.sync();
        self.cluster.requests();
        self.statuses.pass(&self.stores, &self.writer, Timestamp::now()).await.unwrap();
        self.cluster.requests()
    }

    fn change(&self, path: &str, change: impl FnOnce(&mut Value)) {
        self.cluster.edit(path, |object| {
            let generation = object["metadata"]["generation"].as_i64().unwrap();
            object["metadata"]["generation"] = json!(generation + 1);
            change(object);
        });
    }

    fn condition(&self, path: &str, kind: &str) -> Value {
        let object = self.cluster.get(path).unwrap();
        let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.into_iter().find(|one| one["type"] == kind).unwrap_or_default()
    }
}

fn status_of(path: &str) -> String {
    format!("PATCH {path}/status")
}

#[tokio::test]
async fn what_is_in_order_is_said_once() {
    let mut scene = Scene::new();
    assert_eq!(scene.step().await, [status_of(CONTRACT), status_of(PACK)]);
    for path in [PACK, CONTRACT] {
        let ready = scene.condition(path, "Ready");
        assert_eq!((&ready["status"], &ready["reason"]), (&json!("True"), &json!("Valid")), "{path}");
        assert_eq!(ready["observedGeneration"], 1, "kubectl wait compares it");
        assert_eq!(scene.cluster.get(path).unwrap()["status"]["observedGeneration"], 1);
        assert_eq!(scene.condition(path, "Stalled"), Value::Null);
    }
    // Nothing is written with old caches, with up-to-date caches, or by the next leader.
    scene.statuses.pass(&scene.stores, &scene.writer, Timestamp::now()).await.unwrap();
    assert_eq!(scene.cluster.requests(), Vec::<String>::new());
    assert_eq!(scene.step().await, Vec::<String>::new());
    scene.statuses = Statuses::default();
    assert_eq!(scene.step().await, Vec::<String>::new());
}

#[tokio::test]
async fn what_is_wrong_is_said_as_lint_says_it_until_it_is_corrected() {
    let mut scene = Scene::new();
    scene.step().await;
    let good = scene.cluster.get(CONTRACT).unwrap()["spec"].clone();
    scene.change(CONTRACT, |contract| contract["spec"]["input"] = json!({ "type": "string" }));
    assert_eq!(scene.step().await, [status_of(CONTRACT)]);
    let contract: ToolContract = serde_json::from_value(scene.cluster.get(CONTRACT).unwrap()).unwrap();
    let findings: Vec<_> = standalone::contract(&contract).iter().map(ToString::to_string).collect();
    let (ready, stalled) = (scene.condition(CONTRACT, "Ready"), scene.condition(CONTRACT, "Stalled"));
    assert_eq!((&ready["status"], &ready["reason"]), (&json!("False"), &json!("Invalid")));
    assert_eq!(ready["message"], findings.join("\n"));
    assert_eq!((&stalled["status"], &stalled["message"]), (&json!("True"), &ready["message"]));
    assert_eq!(scene.step().await, Vec::<String>::new());

    scene.change(CONTRACT, |contract| contract["spec"] = good);
    assert_eq!(scene.step().await, [status_of(CONTRACT)]);
    assert_eq!(scene.condition(CONTRACT, "Ready")["status"], "True");
    assert_eq!(scene.condition(CONTRACT, "Stalled"), Value::Null);
    assert_eq!(scene.cluster.get(CONTRACT).unwrap()["status"]["observedGeneration"], 3);
}

#[tokio::test]
async fn what_cannot_be_read_is_said_once() {
    let mut scene = Scene::new();
    scene.change(PACK, |pack| pack["spec"]["environment"] = json!(7));
    assert_eq!(scene.step().await, [status_of(CONTRACT), status_of(PACK)]);
    let ready = scene.condition(PACK, "Ready");
    assert_eq!(ready["status"], "False");
    assert!(ready["message"].as_str().unwrap().contains("this version of Belay can read"), "{ready}");
    assert_eq!(scene.step().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_status_that_somebody_changed_is_written_again() {
    let mut scene = Scene::new();
    scene.step().await;
    scene.cluster.edit(PACK, |pack| pack["status"] = json!({}));
    assert_eq!(scene.step().await, [status_of(PACK)]);
    assert_eq!(scene.condition(PACK, "Ready")["status"], "True");
}

#[tokio::test]
async fn one_that_is_refused_keeps_none_of_the_others_from_theirs() {
    let mut scene = Scene::new();
    scene.sync();
    scene.cluster.fail(&status_of(CONTRACT), 503);
    scene.statuses.pass(&scene.stores, &scene.writer, Timestamp::now()).await.unwrap_err();
    assert_eq!(scene.condition(PACK, "Ready")["status"], "True");
    scene.cluster.heal();
    assert_eq!(scene.step().await, [status_of(CONTRACT)]);
    // A deleted object is not an error.
    scene.change(PACK, |_| {});
    scene.sync();
    scene.cluster.remove(PACK);
    scene.statuses.pass(&scene.stores, &scene.writer, Timestamp::now()).await.unwrap();
}
