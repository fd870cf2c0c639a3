use std::sync::atomic::Ordering;

use super::*;
use crate::gateway::{
    identity::PodFacts,
    testing::{self, Memory, place},
};

struct Reporter {
    incidents: Incidents,
    bucket: Arc<Memory>,
    metrics: Metrics,
}

/// Returns a reporter, and the task that writes what it reports.
fn reporter() -> (Reporter, impl Future<Output = ()> + Send + 'static) {
    let (bucket, metrics) = (Arc::new(Memory::default()), testing::metrics());
    let witness = testing::replica(&testing::witness_key(), &bucket);
    let (incidents, telling) = Incidents::new(witness, metrics.clone());
    (Reporter { incidents, bucket, metrics }, telling)
}

fn pod(uid: &str) -> PodFacts {
    PodFacts {
        namespace: "team".into(),
        name: "t-1".into(),
        uid: uid.into(),
        addresses: vec![],
        task: "t".into(),
        task_uid: testing::UID.into(),
        attempt: 1,
        ending: false,
        finished: false,
        altered: None,
    }
}

impl Reporter {
    /// Reports an incident of the pod with this UID.
    fn tell(&self, pod_uid: &str, rule: Rule) {
        self.incidents
            .tell(place(), Incident::now(&pod(pod_uid), "10.0.0.8".parse().unwrap(), rule, "another address"));
    }

    /// Returns the counts: written, dropped, failed.
    fn counts(&self) -> [u64; 3] {
        ["written", "dropped", "failed"].map(|result| self.metrics.incidents.with_label_values(&[result]).get())
    }
}

/// Waits for the writer, in virtual time.
async fn while_written() {
    tokio::time::sleep(Duration::from_secs(60)).await;
}

#[tokio::test(start_paused = true)]
async fn each_incident_is_counted_once_by_what_became_of_it() {
    let (reporter, telling) = reporter();
    tokio::spawn(telling);
    while_written().await;
    assert_eq!(reporter.counts(), [0, 0, 0]);
    // The same pod and rule is one incident, however often it is reported.
    for _ in 0..3 {
        reporter.tell("pod-1", Rule::IdentitySource);
    }
    while_written().await;
    assert_eq!((reporter.counts(), reporter.bucket.keys().len()), ([1, 0, 0], 1));
    reporter.tell("pod-1", Rule::IdentityToken);
    reporter.tell("pod-2", Rule::IdentitySource);
    while_written().await;
    assert_eq!((reporter.counts(), reporter.bucket.keys().len()), ([3, 0, 0], 3));

    // One that the bucket does not take within five tries still counts.
    reporter.bucket.down.store(true, Ordering::SeqCst);
    reporter.tell("pod-3", Rule::IdentitySource);
    while_written().await;
    assert_eq!((reporter.counts(), reporter.bucket.keys().len()), ([3, 0, 1], 3));
    // One that the bucket takes late is written.
    reporter.tell("pod-4", Rule::IdentitySource);
    tokio::time::sleep(Duration::from_secs(12)).await;
    reporter.bucket.down.store(false, Ordering::SeqCst);
    while_written().await;
    assert_eq!((reporter.counts(), reporter.bucket.keys().len()), ([4, 0, 1], 4));
}

#[tokio::test(start_paused = true)]
async fn incidents_beyond_the_queue_are_counted_as_dropped() {
    let (reporter, telling) = reporter();
    // Nothing is written yet.
    for n in 0..QUEUE + 3 {
        reporter.tell(&format!("pod-{n}"), Rule::IdentitySource);
    }
    assert_eq!(reporter.counts(), [0, 3, 0]);
    tokio::spawn(telling);
    while_written().await;
    assert_eq!(reporter.counts(), [256, 3, 0]);
}
