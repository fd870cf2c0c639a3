//! The witness: checks each segment of evidence, cosigns it, and stores it in the bucket under a lock.
//!
//! Guarantees: a reply to [stored](crate::wire::Until::Stored) means that the segment is in the bucket under its retention. A reply to
//! [witnessed](crate::wire::Until::Witnessed) means that the segment is checked, has its position in the log, and is queued for the bucket
//! ahead of all later segments. If two segments claim the same position, one wins, whichever replicas receive them. Sending the same
//! segment again has the same result. All other memory is a cache: any replica can rebuild a log, including its signatures, from the
//! bucket.
//!
//! Rejects: anything that [`history`] does not accept, a pod that is not contained, a policy other than the one that the gateway compiled,
//! and records after the end of the log. Only tool reads and model calls may leave before the bucket has their intent: until then the
//! witness and the pod's spool hold it.
//!
//! ```text
//! admit (who, what) ─▶ catch up ─▶ extended (history) ─▶ hold ─▶ reply: witnessed
//!                         ▲                                │
//!                         │ exists          several at once▼
//!                         └──────────────── cosign ─▶ put if none ─▶ advance ─▶ reply: stored
//! ```
//!
//! This file has what all requests share: the key, the logs in memory and the access to the bucket. Each request is in a file of its own.

use std::{collections::HashMap, sync::Arc, time::Instant};

use bytes::Bytes;
use jiff::Timestamp;
use parking_lot::Mutex;

use super::{
    buckets::{self, Buckets},
    identity::HarnessIdentity,
    metrics::Metrics,
    refusal::Refused,
};
use crate::{
    evidence::{
        note::{Signer, VerifierKey},
        segment::Segment,
        store::{Location, PutError, Retention, Store, StoreError},
    },
    policy::rule::Rule,
};

/// The check of a new segment, and its way into the bucket.
mod append;
/// The state of a log and the checks of its next segment.
pub mod history;
/// Intents, and what a log says before a call.
mod intents;
/// One log in memory.
mod log;
/// The reply to an attempt that opens its log.
mod open;
/// The calls that roll back a task.
mod plan;
/// A log, read from its bucket.
mod rebuild;
/// The end of a log.
mod seal;

use log::Log;

pub use history::{Before, Compensates, History, IntentFacts};

/// Maximum number of logs in memory. The least recently used logs are dropped and are rebuilt from the bucket when needed.
const CACHED: usize = 4096;

/// Where a log is stored, and how long its segments are locked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLocation {
    /// Bucket and prefix. The prefix ends with a slash.
    pub location: Location,
    /// The task's UID.
    pub task_uid: String,
    /// The pack's retention. Without it the bucket's default retention applies.
    pub retention: Option<Retention>,
}

impl LogLocation {
    fn key(&self, first: u64) -> String {
        format!("{}{}", self.location.prefix, Segment::key(first))
    }
}

struct Cached {
    log: Arc<Log>,
    used: Instant,
}

/// The witness.
pub struct Witness {
    signer: Signer,
    verifier: VerifierKey,
    buckets: Arc<dyn Buckets>,
    metrics: Metrics,
    logs: Mutex<HashMap<(String, String), Cached>>,
}

/// The lock of a log's writer. Its holder may take segments.
type Writer<'l> = tokio::sync::MutexGuard<'l, ()>;

impl Witness {
    /// Returns a witness that signs with this key.
    pub fn new(signer: Signer, buckets: Arc<dyn Buckets>, metrics: Metrics) -> Self {
        let verifier = signer.verifier();
        Self { signer, verifier, buckets, metrics, logs: Mutex::default() }
    }

    /// Waits until no log has queued segments.
    pub async fn settle(&self) {
        let logs: Vec<_> = {
            let logs = self.logs.lock();
            logs.values().map(|cached| cached.log.clone()).collect()
        };
        for log in logs {
            while let Some(newest) = log
                .newest()
                .filter(|newest| log.stored().is_none_or(|stored| stored.tree().size() < newest.tree().size()))
            {
                let _ = log.follow().stored(newest.tree().size()).await;
            }
        }
    }

    /// Checks whether a bucket answers.
    ///
    /// # Errors
    /// Returns an error if it does not.
    pub async fn probe(&self, bucket: &str) -> Result<(), StoreError> {
        // No object has this prefix, because no namespace has such a name.
        self.buckets.bucket(bucket).await?.list("-belay-probe-/").await.map(|_| ())
    }

    /// Writes an object beside a log. An existing object counts as written.
    ///
    /// # Errors
    /// Returns an error if the store fails.
    pub async fn put_beside(&self, place: &LogLocation, name: &str, body: Bytes) -> Result<(), StoreError> {
        let store = self.buckets.bucket(&place.location.bucket).await?;
        let key = format!("{}{name}", place.location.prefix);
        match store.put_new(&key, body, place.retention.as_ref()).await {
            Ok(_) | Err(PutError::Exists) => Ok(()),
            Err(PutError::Store(error)) => Err(error),
        }
    }

    /// Returns a secret that follows from the witness's key and a label alone.
    pub(super) fn derived(&self, label: &str) -> [u8; 32] {
        self.signer.derived(label)
    }

    /// Returns the cached log of a place, or adds an empty one.
    fn log(&self, place: &LogLocation) -> Arc<Log> {
        let key = (place.location.bucket.clone(), place.location.prefix.clone());
        let now = Instant::now();
        let mut logs = self.logs.lock();
        if logs.len() >= CACHED && !logs.contains_key(&key) {
            // Drop only logs that are not in use: two locks for one log would let two writers in. (They would only lose time, because the
            // bucket decides.)
            let mut idle: Vec<_> =
                logs.iter().filter(|(_, c)| Arc::strong_count(&c.log) == 1).map(|(_, c)| c.used).collect();
            let middle = idle.len() / 2;
            if !idle.is_empty() {
                let (_, median, _) = idle.select_nth_unstable(middle);
                let median = *median;
                logs.retain(|_, c| Arc::strong_count(&c.log) > 1 || c.used > median);
            }
        }
        let cached = logs.entry(key).or_insert_with(|| Cached { log: Arc::default(), used: now });
        cached.used = now;
        cached.log.clone()
    }

    async fn put(&self, place: &LogLocation, segment: &Segment) -> Result<(), PutError> {
        let store = self.buckets.bucket(&place.location.bucket).await?;
        let body = Bytes::from(segment.to_bytes());
        store.put_new(&place.key(segment.first), body, place.retention.as_ref()).await.map(drop)
    }

    async fn store(&self, place: &LogLocation) -> Result<Arc<dyn Store>, Refused> {
        self.buckets.bucket(&place.location.bucket).await.map_err(|e| self.failed(&e))
    }

    fn failed(&self, error: &StoreError) -> Refused {
        buckets::failed(&self.metrics, error)
    }
}

fn own_attempt(principal: &HarnessIdentity, attempt: i64) -> Result<(), Refused> {
    if principal.attempt == attempt {
        return Ok(());
    }
    Err(Refused::denied(
        Rule::IdentityAttempt,
        format!("the pod is of attempt {}, the request of attempt {attempt}", principal.attempt),
    ))
}

fn same_policy(found: &str, expected: &str) -> Result<(), Refused> {
    if found == expected {
        return Ok(());
    }
    Err(Refused::denied(
        Rule::ConfigDigest,
        format!(
            "the gateway compiles a policy of digest {expected} for this task, the harness runs by {found}: contracts or \
             pack have changed since the attempt was made; a new attempt takes the new policy"
        ),
    ))
}

fn ended() -> Refused {
    Refused::denied(Rule::TaskClosed, "the task has ended: its log takes no more records and no call leaves")
}

fn forked(segment: &Segment) -> Refused {
    Refused {
        status: http::StatusCode::CONFLICT,
        rule: Rule::LogFork,
        reason: format!("record {} is in the log already, and is another one: open the log again", segment.first),
    }
}

/// Returns the seconds since 1970.
fn unix_time() -> u64 {
    u64::try_from(Timestamp::now().as_second()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
