//! Incidents: requests that the gateway denied outside any log, written as one object for each pod and rule beside the task's log.
//!
//! Guarantees: each replica reports an incident once for each pod and rule, however often it happens. Reporting never delays an error
//! response. If the bucket is unavailable or the queue is full, the metric and the log line remain.
//!
//! Non-goals: recording prompts, tokens or anything else that the caller chose, except its address.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use jiff::Timestamp;
use moka::sync::Cache;
use serde::Serialize;
use tokio::sync::mpsc;

use super::{
    metrics::Metrics,
    recent::{first, recent},
    witness::{LogLocation, Witness},
};
use crate::{canonical, evidence::log::INCIDENTS, policy::rule::Rule};

/// Maximum number of incidents in the queue. Further ones are only counted.
const QUEUE: usize = 256;
/// Maximum number of remembered pairs of pod and rule. Then all are forgotten, and may be reported again.
const REMEMBERED: usize = 16_384;
/// Number of attempts to write an incident.
const TRIES: u32 = 5;
/// Delay between two attempts.
const PAUSE: Duration = Duration::from_secs(5);
/// Maximum length of a reason, in bytes.
const LONGEST: usize = 512;

/// The content of the object.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Incident {
    /// Format version.
    pub v: u8,
    /// The time, by the gateway's clock.
    pub time: String,
    /// Always `gateway`.
    pub actor: &'static str,
    /// The rule of the denial.
    pub rule: Rule,
    /// The address that the request came from.
    pub peer: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// The pod that the token is bound to, or, without a valid token, the pod at that address.
    pub pod: String,
    /// The pod's UID.
    pub pod_uid: String,
    /// The pod's task.
    pub task: String,
    /// The pod's attempt.
    pub attempt: i64,
    /// What was expected and what was found.
    pub reason: String,
}

impl Incident {
    /// Returns an incident with the current time.
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

/// The reporter of incidents.
pub struct Incidents {
    queue: mpsc::Sender<(LogLocation, Incident)>,
    told: Cache<(String, Rule), ()>,
    metrics: Metrics,
}

impl Incidents {
    /// Returns a reporter and the task that writes its incidents until the reporter is dropped.
    pub fn new(witness: Arc<Witness>, metrics: Metrics) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (queue, waiting) = mpsc::channel(QUEUE);
        (Self { queue, told: recent(REMEMBERED), metrics: metrics.clone() }, write(witness, waiting, metrics))
    }

    /// Returns whether no incident of this pod and rule has been reported yet.
    pub fn is_new(&self, pod_uid: &str, rule: Rule) -> bool {
        !self.told.contains_key(&(pod_uid.to_owned(), rule))
    }

    /// Reports an incident, unless one of this pod and rule has been reported.
    pub fn tell(&self, place: LogLocation, incident: Incident) {
        if !first(&self.told, (incident.pod_uid.clone(), incident.rule)) {
            return;
        }
        if self.queue.try_send((place, incident)).is_err() {
            self.metrics.incidents.with_label_values(&["dropped"]).inc();
        }
    }
}

async fn write(witness: Arc<Witness>, mut waiting: mpsc::Receiver<(LogLocation, Incident)>, metrics: Metrics) {
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

#[cfg(test)]
mod tests;
