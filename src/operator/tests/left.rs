//! What remains of attempts that are over: objects, and counts of failures.

use std::time::Duration;

use serde_json::{Value, json};

use super::{CONFIG_MAP, POD, POLICY, Scene, TASK, container};
use crate::{ends::AttemptEnd, render::names};

/// How many hours the bucket is unavailable: twice as many attempts as a status keeps. From then on each attempt leaves what the one before
/// left, as the test checks, so a week leaves no more. BELAY_PARKED_HOURS=168 runs the week, which takes minutes in a debug build, because
/// each write has the 64 attempts of the status.
const HOURS: u64 = 8;
/// The time from the creation of a pod to the start of its agent.
const START: Duration = Duration::from_secs(5);
/// How long a harness waits for the bucket until it gives up.
const PARK: Duration = Duration::from_secs(120);
/// The number of objects that a task may leave at any time, without the task itself.
const MOST: usize = 10;

fn numbered(path: &str, number: i64) -> String {
    path.replace("triage-1", &format!("triage-{number}"))
}

/// The status of a pod whose agent runs.
fn running(started: &str) -> Value {
    json!({
        "phase": "Running",
        "startTime": started,
        "initContainerStatuses": [container(names::PROBE, json!({ "terminated": { "exitCode": 0 } }))],
        "containerStatuses": [container(names::AGENT, json!({ "running": { "startedAt": started } }))],
    })
}

/// The status of a pod whose harness reports that it could not write evidence. Its agent runs or has ended.
pub(super) fn parked(agent_ended: bool) -> Value {
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
    /// Lets time pass, for the operator and for the API server.
    async fn pass(&self, time: Duration) {
        tokio::time::advance(time).await;
        self.cluster.set_time(self.now());
    }

    /// Brings the caches up to date, reconciles, and checks how many objects the task has. Returns that number.
    async fn counted_step(&mut self) -> usize {
        self.step().await.unwrap();
        let left = self.left();
        assert!(left.len() <= MOST, "{} objects: {left:?}", left.len());
        left.len()
    }

    /// Reconciles each second until an attempt has its pod, and returns the time that this took.
    async fn begins(&mut self, number: i64) -> Duration {
        for seconds in 0..=90 {
            self.counted_step().await;
            if self.cluster.get(&numbered(POD, number)).is_some() {
                return Duration::from_secs(seconds);
            }
            self.pass(Duration::from_secs(1)).await;
        }
        panic!("attempt {number} does not begin: {}", self.status());
    }

    /// Returns the kind of each of the task's objects, and how many attempts before this one it belongs to. The pod of attempt 1 stays.
    fn shape(&self, number: i64) -> Vec<(String, i64)> {
        let of_attempt = |path: &String| {
            let (kind, attempt) = path.rsplit_once("/triage-").unwrap();
            (kind.to_owned(), number - attempt.parse::<i64>().unwrap())
        };
        let left = self.left();
        let mut shape: Vec<_> = left.iter().filter(|path| *path != POD).map(of_attempt).collect();
        shape.sort();
        shape
    }

    /// Returns the task's objects in the cluster, without the task itself.
    fn left(&self) -> Vec<String> {
        let of_attempts = |path: &String| path.contains("/triage-");
        self.cluster.paths().into_iter().filter(of_attempts).collect()
    }
}

/// The bucket is unavailable for long, in virtual time: each attempt starts, gives up when the harness does, and is followed by the next
/// one as soon as the operator allows it. The agent fails once before that, and once after it.
#[tokio::test]
async fn a_task_that_is_parked_for_a_week_leaves_few_objects_and_no_new_retries() {
    let mut scene = Scene::new().await;
    scene.cluster.edit(TASK, |task| task["spec"]["retry"] = json!({ "agent": 1 }));
    scene.step().await.unwrap();
    scene.end_agent(POD, 7);
    tokio::time::pause();
    scene.begins(2).await;
    let hours: u64 = std::env::var("BELAY_PARKED_HOURS").map_or(HOURS, |hours| hours.parse().unwrap());
    let back = scene.now().checked_add(Duration::from_secs(hours * 3600)).unwrap();
    let (mut pause, mut number) = (None, 2);
    let (mut left, mut shapes) = (Vec::new(), Vec::new());
    while scene.now() < back {
        scene.pass(START).await;
        let started = scene.now().to_string();
        scene.pod_status(&numbered(POD, number), running(&started));
        left.push(scene.counted_step().await);
        assert_eq!(scene.status()["phase"], "Running", "attempt {number}");
        scene.pass(PARK).await;
        scene.pod_status(&numbered(POD, number), parked(number % 3 == 0));
        // The pod of an agent that still runs is ended first.
        left.push(scene.counted_step().await);
        left.push(scene.counted_step().await);
        assert_eq!(scene.status()["phase"], "Parked", "attempt {number}");
        number += 1;
        match pause {
            Some(pause) => {
                scene.pass(pause).await;
                left.push(scene.counted_step().await);
            }
            // Times have whole seconds, so a later attempt may begin a second later.
            None => pause = Some(scene.begins(number).await + Duration::from_secs(1)),
        }
        assert!(scene.cluster.get(&numbered(POD, number)).is_some(), "attempt {number}: {}", scene.status());
        shapes.push(scene.shape(number));
        scene.cluster.requests();
        scene.cluster.drop_changes();
    }
    tokio::time::resume();
    // About one attempt in three minutes.
    let hourly = number / i64::try_from(hours).unwrap();
    assert!((15..22).contains(&hourly), "{number} attempts in {hours} hours");
    // One attempt in three has another end.
    let late = &shapes[70..];
    assert!(late.len() > 6 && late.iter().zip(&late[3..]).all(|(before, after)| before == after), "{late:?}");
    let (most, late) = (left.iter().max(), left.iter().rev().take(100).max());
    assert_eq!(late, most, "it goes on growing, or shrinks");
    assert_eq!(scene.status()["failures"], json!({ "Agent": 1, "Dependency": number - 2 }));

    scene.end_agent(&numbered(POD, number), 7);
    for _ in 0..3 {
        scene.counted_step().await;
    }
    assert_eq!((&scene.status()["phase"], &scene.status()["failureClass"]), (&json!("Failed"), &json!("Agent")));
    // The agent's output stays available until the task is deleted.
    assert_eq!(scene.left(), [POD.to_owned(), numbered(POD, number)]);
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
