//! What the gateway refused outside any log: one object beside the task's log for each pod and rule.
//!
//! Promises: an incident is told once for each pod, rule and replica, however often it is tried; telling it never delays a
//! refusal. Refuses: prompts, tokens and anything else of the caller's making but its address. When the bucket is away or
//! the queue full, the metric and the log line remain.

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::mpsc;

use super::{
    metrics::Metrics,
    witness::{Place, Witness},
};
use crate::{canonical, evidence::log::INCIDENTS, policy::rule::Rule};

/// Incidents that wait to be written. Beyond it they are counted only.
const QUEUE: usize = 256;
/// Pods and rules that are remembered. Beyond it all are forgotten, and may be told again.
const REMEMBERED: usize = 16_384;
/// Times that writing one is tried.
const TRIES: u32 = 5;
/// Between two of them.
const PAUSE: Duration = Duration::from_secs(5);
/// Longest reason, in bytes.
const LONGEST: usize = 512;

/// The object's content.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Incident {
    /// Format version.
    pub v: u8,
    /// When, by the gateway's clock.
    pub time: String,
    /// Always `gateway`.
    pub actor: &'static str,
    /// The rule that refused.
    pub rule: Rule,
    /// Whence the request came.
    pub peer: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// The pod whose token it was; without a valid token, the pod at that address.
    pub pod: String,
    /// That pod's UID.
    pub pod_uid: String,
    /// That pod's task.
    pub task: String,
    /// That pod's attempt.
    pub attempt: i64,
    /// What was expected and found.
    pub reason: String,
}

impl Incident {
    /// An incident of now.
    pub fn now(pod: &super::identity::PodFacts, peer: IpAddr, rule: Rule, reason: &str) -> Self {
        let mut reason = reason.to_owned();
        reason.truncate(reason.floor_char_boundary(LONGEST));
        Self {
            v: 1,
            time: format!("{:.3}", Timestamp::now()),
            actor: "gateway",
            rule,
            peer: peer.to_string(),
            namespace: pod.namespace.clone(),
            pod: pod.name.clone(),
            pod_uid: pod.uid.clone(),
            task: pod.task.clone(),
            attempt: pod.attempt,
            reason,
        }
    }
}

/// Tells incidents.
pub struct Incidents {
    queue: mpsc::Sender<(Place, Incident)>,
    told: Mutex<HashSet<(String, Rule)>>,
    metrics: Metrics,
}

impl Incidents {
    /// A teller, and what writes for it until the teller is gone.
    pub fn new(witness: Arc<Witness>, metrics: Metrics) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (queue, waiting) = mpsc::channel(QUEUE);
        (Self { queue, told: Mutex::default(), metrics: metrics.clone() }, write(witness, waiting, metrics))
    }

    /// Whether an incident of this pod and rule is still to be told.
    pub fn is_new(&self, pod_uid: &str, rule: Rule) -> bool {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        !told.contains(&(pod_uid.to_owned(), rule))
    }

    /// Tells an incident, unless one of this pod and rule has been told.
    pub fn tell(&self, place: Place, incident: Incident) {
        let key = (incident.pod_uid.clone(), incident.rule);
        {
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            if told.len() >= REMEMBERED {
                told.clear();
            }
            if !told.insert(key) {
                return;
            }
        }
        if self.queue.try_send((place, incident)).is_err() {
            self.metrics.incidents.with_label_values(&["dropped"]).inc();
        }
    }
}

async fn write(witness: Arc<Witness>, mut waiting: mpsc::Receiver<(Place, Incident)>, metrics: Metrics) {
    while let Some((place, incident)) = waiting.recv().await {
        let Ok(bytes) = canonical::to_bytes(&incident) else { continue };
        let name = format!("{INCIDENTS}{}.json", hex::encode(canonical::sha256(&bytes)));
        let bytes = Bytes::from(bytes);
        let mut result = "failed";
        for _ in 0..TRIES {
            match witness.put_beside(&place, &name, bytes.clone()).await {
                Ok(()) => {
                    result = "written";
                    break;
                }
                Err(error) => {
                    tracing::warn!(%error, "an incident could not be written");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        metrics.incidents.with_label_values(&[result]).inc();
    }
}
