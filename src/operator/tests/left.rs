//! What remains of attempts that are over: objects, and counts of failures.

use serde_json::{Value, json};

use super::{CONFIG_MAP, POD, POLICY, Scene, TASK, container};
use crate::{ends::AttemptEnd, render::names};

/// More attempts than a status keeps, so that later attempts change nothing. A week has about 3,500: BELAY_PARKED_ATTEMPTS sets the number.
const PARKED: i64 = 150;

fn numbered(path: &str, number: i64) -> String {
    path.replace("triage-1", &format!("triage-{number}"))
}

/// The status of a pod whose harness reports that it could not write evidence. Its agent runs or has ended.
fn parked(agent_ended: bool) -> Value {
    let times = json!({ "exitCode": 1, "startedAt": "2026-01-01T00:00:05Z", "finishedAt": "2026-01-01T00:00:09Z" });
    let agent = if agent_ended { json!({ "terminated": times }) } else { json!({ "running": {} }) };
    json!({
        "phase": if agent_ended { "Failed" } else { "Running" },
        "initContainerStatuses": [
            container(names::PROBE, json!({ "terminated": { "exitCode": 0 } })),
            container(names::HARNESS, json!({ "terminated": { "exitCode": AttemptEnd::Parked.exit_code() } })),
        ],
        "containerStatuses": [container(names::AGENT, agent)],
    })
}

impl Scene {
    /// Moves the end of the newest attempt one hour back.
    fn pass_an_hour(&self) {
        self.cluster.edit(TASK, |task| {
            let newest = task["status"]["attempts"].as_array_mut().unwrap().last_mut().unwrap();
            let ended: jiff::Timestamp = newest["finishedAt"].as_str().unwrap().parse().unwrap();
            newest["finishedAt"] = json!((ended - jiff::SignedDuration::from_hours(1)).to_string());
        });
        self.cluster.drop_changes();
    }

    /// Returns the task's objects in the cluster, without the task itself.
    fn left(&self) -> Vec<String> {
        let of_attempts = |path: &String| path.contains("/triage-");
        self.cluster.paths().into_iter().filter(of_attempts).collect()
    }
}

/// The bucket is unavailable for long. The agent fails once before that, and once after it.
#[tokio::test]
async fn a_task_that_is_parked_for_a_week_leaves_few_objects_and_no_new_retries() {
    let mut scene = Scene::new().await;
    scene.cluster.edit(TASK, |task| task["spec"]["retry"] = json!({ "agent": 1 }));
    scene.step().await.unwrap();
    scene.end_agent(POD, 7);
    scene.step().await.unwrap();
    scene.pass_an_hour();
    let attempts = std::env::var("BELAY_PARKED_ATTEMPTS").map_or(PARKED, |attempts| attempts.parse().unwrap());
    let mut left = Vec::new();
    // The test only waits for a watch that shows nothing, so the waiting time is skipped.
    tokio::time::pause();
    for number in 2..=attempts {
        scene.step().await.unwrap();
        scene.pod_status(&numbered(POD, number), parked(number % 3 == 0));
        scene.step().await.unwrap();
        scene.step().await.unwrap();
        assert_eq!(scene.status()["phase"], "Parked", "attempt {number}");
        left.push(scene.left().len());
        scene.pass_an_hour();
    }
    tokio::time::resume();
    let most = left.iter().max();
    assert!(most < Some(&10), "{left:?}: {:?}", scene.left());
    assert_eq!(left.iter().rev().take(10).max(), most, "it goes on growing, or shrinks: {left:?}");
    assert_eq!(scene.status()["failures"], json!({ "Agent": 1, "Dependency": attempts - 1 }));

    scene.step().await.unwrap();
    let last = attempts + 1;
    scene.end_agent(&numbered(POD, last), 7);
    for _ in 0..3 {
        scene.step().await.unwrap();
    }
    assert_eq!((&scene.status()["phase"], &scene.status()["failureClass"]), (&json!("Failed"), &json!("Agent")));
    // The agent's output stays available until the task is deleted.
    assert_eq!(scene.left(), [POD.to_owned(), numbered(POD, last)]);
}

/// A pod that the cache does not show keeps its NetworkPolicy as long as it lives.
#[tokio::test]
async fn a_wall_stays_while_its_pod_lives() {
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    let pod = scene.cluster.get(POD).unwrap();
    scene.cluster.remove(POD);
    scene.context.memories.retain(|_| false);
    scene.step().await.unwrap();
    assert!(scene.cluster.get(&numbered(POD, 2)).is_some());
    // The pod was requested before and is created only now.
    scene.run_agent(&numbered(POD, 2));
    scene.sync();
    scene.cluster.put(POD, pod);
    scene.cluster.requests();
    scene.look().await.unwrap();
    assert!(scene.cluster.requests().contains(&format!("GET {POD}")));
    assert!(scene.cluster.get(POLICY).is_some());
    assert!(scene.cluster.get(CONFIG_MAP).is_none(), "it would find its configuration, and start");
    // The pod is seen and ended. After that, none of its objects remains.
    for _ in 0..3 {
        scene.step().await.unwrap();
    }
    assert_eq!((scene.cluster.get(POD), scene.cluster.get(POLICY)), (None, None));
    assert!(scene.cluster.get(&numbered(POLICY, 2)).is_some());
}

/// Belay does not delete a ConfigMap of another owner that has the name of an attempt's ConfigMap.
#[tokio::test]
async fn a_strangers_configuration_is_left_alone() {
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    scene.end_agent(POD, 0);
    scene.cluster.edit(CONFIG_MAP, |map| map["metadata"]["labels"] = json!({ "app": "other" }));
    scene.step().await.unwrap();
    assert_eq!(scene.status()["phase"], "Succeeded");
    assert!(scene.cluster.get(CONFIG_MAP).is_some());
    assert!(scene.cluster.get(POLICY).is_none());
}

/// The operator ended after the last status of a task and before it deleted the remaining objects.
#[tokio::test]
async fn what_an_ended_task_left_is_removed_later() {
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    scene.end_agent(POD, 0);
    scene.cluster.fail("DELETE /api/v1/namespaces/team-a/configmaps", 503);
    scene.step().await.unwrap_err();
    assert_eq!(scene.status()["phase"], "Succeeded");
    assert!(scene.cluster.get(POLICY).is_some());
    scene.cluster.heal();
    scene.step().await.unwrap();
    assert_eq!(scene.left(), [POD]);
}
