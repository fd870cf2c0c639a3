//! What a task's status says while approvers must decide, and how many writes that costs.

use std::{sync::Arc, time::Duration};

use futures::stream;
use jiff::{SignedDuration, Timestamp};
use prometheus::Registry;
use serde_json::{Value, json};
use tokio::{sync::watch, time};

use super::{POD, STATUS, Scene};
use crate::{
    operator::{cache, control, expectations::Expectations, metrics::Metrics, reconcile::Context},
    render::names,
};

const REQUESTS: &str = "/apis/belay.dev/v1alpha1/namespaces/team-a/approvalrequests";

impl Scene {
    /// Returns a task whose agent runs, and stops the clock.
    async fn running() -> Self {
        let mut scene = Self::new().await;
        scene.step().await.unwrap();
        scene.run_agent(POD);
        scene.step().await.unwrap();
        scene.cluster.requests();
        time::pause();
        scene
    }

    /// Creates a request as the gateway does. It expires after this many seconds.
    fn ask(&self, name: &str, now: Timestamp, lasts: i64) {
        let now = Timestamp::from_second(now.as_second()).unwrap();
        let task = self.cluster.get(super::TASK).unwrap();
        let uid = task["metadata"]["uid"].as_str().unwrap();
        self.cluster.put(&format!("{REQUESTS}/{name}"), json!({
            "apiVersion": "belay.dev/v1alpha1", "kind": "ApprovalRequest",
            "metadata": {
                "name": name, "namespace": "team-a", "creationTimestamp": now,
                "labels": { names::TASK: "triage", names::TASK_UID: uid },
            },
            "spec": {
                "task": { "name": "triage", "uid": uid, "attempt": 1 },
                "principal": "alice", "requestedBy": "Contract", "tool": "refund", "arguments": "{}", "commitment": "0".repeat(64),
                "repeats": 0, "approvers": { "users": ["bob"] }, "required": 1,
                "expiresAt": now.checked_add(SignedDuration::from_secs(lasts)).unwrap(),
            },
        }));
    }

    fn answer(&self, name: &str, decision: &str) {
        let decisions = json!([{ "by": "bob", "decision": decision }]);
        self.cluster
            .edit(&format!("{REQUESTS}/{name}"), |request| request["status"] = json!({ "decisions": decisions }));
    }

    /// Lets time pass and reconciles. Returns the writes.
    async fn after(&mut self, seconds: u64) -> Vec<String> {
        time::advance(Duration::from_secs(seconds)).await;
        self.step().await.unwrap();
        self.cluster.writes()
    }

    fn told(&self) -> (Value, Value, Value) {
        let (status, ready) = (self.status(), self.condition("Ready"));
        assert_eq!(ready["reason"], status["reason"]);
        assert_eq!(self.condition("Complete")["reason"], status["reason"]);
        (status["phase"].clone(), status["reason"].clone(), ready["message"].clone())
    }
}

fn says(reason: &str, message: &str) -> (Value, Value, Value) {
    (json!("Running"), json!(reason), json!(message))
}

#[tokio::test]
async fn a_task_says_which_decision_it_waits_for_and_until_when() {
    let mut scene = Scene::running().await;
    let now = scene.now();
    scene.ask("triage-a", now, 3600);
    assert_eq!(scene.after(0).await, [""; 0], "most approvals of machines come at once");
    assert_eq!(scene.after(6).await, [STATUS]);
    let expires = now.as_second() + 3600;
    let expires = Timestamp::from_second(expires).unwrap();
    let message = format!("waits for approvers to decide about ApprovalRequest triage-a (expires at {expires})");
    assert_eq!(scene.told(), says("WaitingForApproval", &message));
    assert_eq!(scene.after(60).await, [""; 0]);
    // A second request, and the decision about the first.
    scene.ask("triage-b", scene.now(), 60);
    assert_eq!(scene.after(0).await, [STATUS]);
    assert!(scene.told().2.as_str().unwrap().contains("triage-b (expires at "), "{:?}", scene.told());
    scene.answer("triage-a", "Approve");
    assert_eq!(scene.after(5).await, [""; 0], "it is not long since the last change");
    assert_eq!(scene.after(5).await, [STATUS]);
    assert!(!scene.told().2.as_str().unwrap().contains("triage-a"), "{:?}", scene.told());
    // The second expires.
    assert_eq!(scene.after(50).await, [STATUS]);
    assert_eq!(scene.told(), says("Running", ""));
    assert_eq!(scene.after(60).await, [""; 0]);
}

#[tokio::test]
async fn a_restarted_operator_repeats_no_write() {
    let mut scene = Scene::running().await;
    scene.ask("triage-a", scene.now(), 3600);
    assert_eq!(scene.after(6).await, [STATUS]);
    scene.context.memories.retain(|_| false);
    assert_eq!(scene.after(0).await, [""; 0]);
    scene.answer("triage-a", "Deny");
    assert_eq!(scene.after(0).await, [STATUS]);
    assert_eq!(scene.told(), says("Running", ""));
}

/// An agent makes a call that needs approval each second for a minute, and approvers take eight seconds for each.
#[tokio::test]
async fn a_burst_of_requests_costs_few_writes() {
    let mut scene = Scene::running().await;
    let mut writes = Vec::new();
    for second in 0..90 {
        if second < 60 {
            scene.ask(&format!("triage-{second}"), scene.now(), 3600);
        }
        if (8..68).contains(&second) {
            scene.answer(&format!("triage-{}", second - 8), "Approve");
        }
        writes.extend(scene.after(1).await);
    }
    assert!((2..=9).contains(&writes.len()), "{writes:?}");
    assert_eq!(scene.told(), says("Running", ""));
}

/// A parked task waits for its dependency, although a request is undecided.
#[tokio::test]
async fn an_attempt_that_has_ended_waits_for_no_decision() {
    let mut scene = Scene::running().await;
    scene.ask("triage-a", scene.now(), 3600);
    scene.after(6).await;
    assert_eq!(scene.status()["reason"], "WaitingForApproval");
    scene.pod_status(POD, super::left::parked(true));
    scene.after(1).await;
    assert_eq!((&scene.status()["phase"], &scene.status()["reason"]), (&json!("Parked"), &json!("Parked")));
}

/// The controller and the watches of the real operator, in virtual time.
#[tokio::test]
async fn a_request_and_its_decision_reach_the_status_by_themselves() {
    let scene = Scene::new().await;
    time::pause();
    let (client, memories, metrics) =
        (scene.cluster.client(), Arc::new(Expectations::default()), Metrics::new(&Registry::new()).unwrap());
    let (stores, streams) = cache::watch(&client, memories.clone(), &metrics);
    let context = Arc::new(Context {
        stores: stores.clone(),
        memories,
        writer: scene.context.writer.clone(),
        gateway: scene.context.gateway.clone(),
        surroundings: scene.context.surroundings.clone(),
        contact: Arc::default(),
        metrics,
        system_namespace: scene.context.system_namespace.clone(),
        s3_endpoint: None,
        believes_caches: false,
    });
    let contact = context.contact.clone();
    let (filled, is_filled) = watch::channel(false);
    let operator = async {
        let fill = async {
            stores.ready().await.unwrap();
            filled.send_replace(true);
        };
        let never = std::future::pending();
        tokio::join!(control(streams, stream::pending(), context, is_filled, never), fill);
    };
    let reason = || scene.status()["reason"].clone();
    let story = async {
        let pass = |seconds| time::sleep(Duration::from_secs(seconds));
        pass(3).await;
        scene.run_agent(POD);
        pass(3).await;
        assert_eq!(reason(), "Running");
        scene.ask("triage-a", contact.now(), 60);
        pass(2).await;
        assert_eq!(reason(), "Running");
        pass(5).await;
        assert_eq!(reason(), "WaitingForApproval");
        scene.answer("triage-a", "Approve");
        pass(11).await;
        assert_eq!(reason(), "Running");
        // One that expires.
        scene.ask("triage-b", contact.now(), 30);
        pass(11).await;
        assert_eq!(reason(), "WaitingForApproval");
        pass(30).await;
        assert_eq!(reason(), "Running");
        let writes = scene.cluster.writes();
        assert_eq!(writes.iter().filter(|write| *write == STATUS).count(), 5, "{writes:?}");
    };
    tokio::select! {
        () = operator => panic!("the controller ended"),
        () = story => {}
    }
}
