//! Stores for segments: objects that are written once.
//!
//! Guarantees: `Store::put_new` never replaces an object. When it succeeds, the bytes are durable and, if the store has locks, locked.
//! Non-goals: deleting and replacing objects. No store here can do that.

use std::{fmt, str::FromStr};

use bytes::Bytes;
use futures::future::BoxFuture;
use jiff::SignedDuration;

/// A folder as a store, for development and for downloaded logs.
pub mod dir;
/// A bucket with Object Lock as a store.
#[cfg(feature = "s3")]
pub mod s3;

/// A prefix in a bucket: `s3://bucket/prefix`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    /// The bucket.
    pub bucket: String,
    /// The prefix, with a slash at its end unless it is empty.
    pub prefix: String,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.prefix)
    }
}

/// A text that is not an S3 location.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected s3://bucket/prefix, found {0:?}")]
pub struct LocationError(String);

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, LocationError> {
        let rest = text.strip_prefix("s3://").ok_or_else(|| LocationError(text.to_owned()))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(LocationError(text.to_owned()));
        }
        let prefix = if prefix.is_empty() || prefix.ends_with('/') { prefix.to_owned() } else { format!("{prefix}/") };
        Ok(Self { bucket: bucket.to_owned(), prefix })
    }
}

/// Returns the prefix of a task's log: `<prefix>/<namespace>/<task>/<uid>/`.
pub fn log_prefix(pack_prefix: Option<&str>, namespace: &str, task: &str, uid: &str) -> String {
    match pack_prefix {
        Some(prefix) if !prefix.is_empty() => format!("{prefix}/{namespace}/{task}/{uid}/"),
        _ => format!("{namespace}/{task}/{uid}/"),
    }
}

/// A mode of S3 Object Lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Mode {
    /// Nobody can delete the object or shorten the lock.
    Compliance,
    /// Holders of `s3:BypassGovernanceRetention` can delete the object or shorten the lock.
    Governance,
}

/// How long an object is locked after it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// The mode of the lock.
    pub mode: Mode,
    /// The length of the lock in days.
    pub days: i64,
}

impl Retention {
    /// The tolerance for the time that passes, by the store's clock, between a request and the write.
    const SLACK: SignedDuration = SignedDuration::from_mins(1);

    /// Checks whether an object is locked as required, by the store's own clock.
    pub fn holds(&self, object: &StoredObject) -> bool {
        let hard = object.mode == Some(self.mode) || object.mode == Some(Mode::Compliance);
        let (Some(written), Some(until)) = (object.written, object.retain_until) else { return false };
        let asked = SignedDuration::from_hours(self.days.saturating_mul(24));
        hard && until.duration_since(written).saturating_add(Self::SLACK) >= asked
    }
}

/// One version of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredObject {
    /// The full key.
    pub key: String,
    /// The version ID; `null` if the bucket has no versions.
    pub version_id: String,
    /// The size in bytes; 0 for a delete marker.
    pub size: u64,
    /// When it was written, by the store's clock.
    pub written: Option<jiff::Timestamp>,
    /// When the lock ends.
    pub retain_until: Option<jiff::Timestamp>,
    /// The mode of the lock.
    pub mode: Option<Mode>,
    /// Whether a plain read returns this version.
    pub is_latest: bool,
    /// Whether it is a delete marker: somebody tried to hide the object.
    pub delete_marker: bool,
}

/// An error of a store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The object does not exist.
    #[error("there is no object {key} in {place}")]
    NotFound {
        /// The object.
        key: String,
        /// The bucket or folder.
        place: String,
    },
    /// The store denies the caller access.
    #[error("{place} denies permission to {action} {key}: {detail}; check the credentials and their permissions")]
    Forbidden {
        /// What was tried.
        action: &'static str,
        /// The object or prefix.
        key: String,
        /// The bucket or folder.
        place: String,
        /// The store's message.
        detail: String,
    },
    /// The store cannot be reached, or fails. Another try may help.
    #[error("cannot {action} {key} in {place}: {detail}")]
    Unavailable {
        /// What was tried.
        action: &'static str,
        /// The object or prefix.
        key: String,
        /// The bucket or folder.
        place: String,
        /// The store's message.
        detail: String,
    },
    /// The store accepted an object and did not lock it as requested.
    #[error(
        "expected {key} to be locked for {days} days ({mode:?}), found {found}; evidence needs a bucket with Object Lock, and a user who may set it"
    )]
    Unlocked {
        /// The object.
        key: String,
        /// The requested mode.
        mode: Mode,
        /// The requested number of days.
        days: i64,
        /// What the store reports about the lock.
        found: String,
    },
    /// The key is not one of a log, because it would lead out of the folder.
    #[error("{0:?} is not a key: expected names joined by single slashes")]
    Key(String),
}

/// Why an object was not written.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    /// Another object exists under that key (HTTP 412): another writer extended the log.
    #[error("there is already another object under this key")]
    Exists,
    /// The store failed. The object may or may not have been written. Put the same bytes again to find out.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A store of objects that are written once. Keys are full keys in the bucket or folder.
pub trait Store: Send + Sync {
    /// Writes a new object and returns its version. Returns [`PutError::Exists`] if an object exists under that key, even the same one.
    /// Callers should use [`Store::put_new`].
    fn create<'a>(
        &'a self,
        key: &'a str,
        body: Bytes,
        retention: Option<&'a Retention>,
    ) -> BoxFuture<'a, Result<String, PutError>>;

    /// Returns the object's bytes.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Bytes, StoreError>>;

    /// Returns every version of every object under the prefix, including delete markers, with their locks.
    fn list_versions<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<StoredObject>, StoreError>>;

    /// Returns the newest version of the object with its lock, as the store has it now. `None` if the store, a folder, has no locks at all.
    fn lock<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<StoredObject>, StoreError>>;

    /// Returns the keys under the prefix, sorted.
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<String>, StoreError>>;

    /// Writes a new object and returns its version. Writing the same bytes again succeeds: after a lost reply, the next try finds the
    /// object, reads it back, and recognizes it.
    fn put_new<'a>(
        &'a self,
        key: &'a str,
        body: Bytes,
        retention: Option<&'a Retention>,
    ) -> BoxFuture<'a, Result<String, PutError>> {
        Box::pin(async move {
            match self.create(key, body.clone(), retention).await {
                Err(PutError::Exists) if self.get(key).await? == body => {
                    let versions = self.list_versions(key).await?;
                    let ours = versions.into_iter().find(|v| v.key == key && v.is_latest && !v.delete_marker);
                    ours.map(|v| v.version_id).ok_or(PutError::Exists)
                }
                written => written,
            }
        })
    }

    /// Reads the lock of an object back and checks that it is as requested.
    ///
    /// # Errors
    /// Returns [`StoreError::Unlocked`] if it is not.
    fn locked<'a>(&'a self, key: &'a str, asked: &'a Retention) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let Some(object) = self.lock(key).await?.filter(|object| !asked.holds(object)) else {
                return Ok(());
            };
            let found = match (object.mode, object.retain_until) {
                (Some(mode), Some(until)) => format!("a lock until {until} ({mode:?})"),
                _ => "no lock".to_owned(),
            };
            Err(StoreError::Unlocked { key: key.to_owned(), mode: asked.mode, days: asked.days, found })
        })
    }
}

#[cfg(test)]
mod tests;
