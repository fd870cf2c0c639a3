//! The buckets of the gateway, by name, and what a caller is told when one fails.
//!
//! Guarantees: each failure is counted once, by what the gateway did, and logged. Callers learn that the store failed and whether a retry
//! helps, and nothing about the store itself.
//!
//! Non-goals: the stores ([`evidence::store`](crate::evidence::store)), and who may read which bucket.

use std::sync::Arc;

use futures::future::BoxFuture;

use super::{metrics::Metrics, refusal::Refused};
use crate::{
    evidence::store::{Store, StoreError},
    policy::rule::Rule,
};

/// Buckets by name.
pub trait Buckets: Send + Sync {
    /// Returns the bucket. Does not access it yet.
    fn bucket<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Arc<dyn Store>, StoreError>>;

    /// Returns the URL of the object store, if it is not AWS.
    fn endpoint(&self) -> Option<String>;
}

/// Counts and logs the failure of a store. Returns the error response.
pub(super) fn failed(metrics: &Metrics, error: &StoreError) -> Refused {
    let action = match error {
        StoreError::Forbidden { action, .. } | StoreError::Unavailable { action, .. } => action,
        StoreError::NotFound { .. } => "read",
        StoreError::Unlocked { .. } => "lock",
        StoreError::Key(_) => "name",
    };
    metrics.store_errors.with_label_values(&[action]).inc();
    tracing::warn!(%error, "the evidence store failed");
    unavailable(match error {
        StoreError::Unlocked { .. } => "the evidence store does not lock objects as the pack requires; no call leaves",
        _ => "the evidence store cannot be written or read; try again",
    })
}

pub(super) fn unavailable(reason: &str) -> Refused {
    Refused::retry(Rule::Evidence, reason)
}

/// Reports an object in the bucket that this witness would not have written. The log cannot continue from there.
pub(super) fn broken(key: &str, reason: impl std::fmt::Display) -> Refused {
    tracing::error!(key, %reason, "the log in the bucket does not verify");
    unavailable(&format!("the log in the bucket does not verify at {key}: {reason}; ask its administrator"))
}
