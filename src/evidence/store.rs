//! Where segments lie: objects that are written once.
//!
//! Promises: `Store::put_new` never replaces an object, and when it succeeds the bytes are durable and, where the store
//! has locks, locked. Refuses: deleting and replacing; no store here can.

use std::{fmt, str::FromStr};

use bytes::Bytes;
use futures::future::BoxFuture;
use jiff::SignedDuration;

/// A folder: for development and for downloaded logs.
pub mod dir;
/// A bucket with Object Lock.
#[cfg(feature = "s3")]
pub mod s3;

/// A prefix in a bucket: `s3://bucket/prefix`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    /// The bucket.
    pub bucket: String,
    /// The prefix, with a slash at its end unless empty.
    pub prefix: String,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.prefix)
    }
}

/// Not an S3 location.
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

/// The prefix of a task's log: `<prefix>/<namespace>/<task>/<uid>/`.
pub fn log_prefix(pack_prefix: Option<&str>, namespace: &str, task: &str, uid: &str) -> String {
    match pack_prefix {
        Some(prefix) if !prefix.is_empty() => format!("{prefix}/{namespace}/{task}/{uid}/"),
        _ => format!("{namespace}/{task}/{uid}/"),
    }
}

/// S3 Object Lock's two modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Mode {
    /// Nobody can delete or shorten.
    Compliance,
    /// Holders of `s3:BypassGovernanceRetention` can.
    Governance,
}

/// How long an object is locked, from its writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// How hard.
    pub mode: Mode,
    /// For how many days.
    pub days: i64,
}

impl Retention {
    /// What a store makes of its clock between being asked and writing.
    const SLACK: SignedDuration = SignedDuration::from_mins(1);

    /// Whether an object is locked as this asks for, by the store's own clock.
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
    /// Its whole key.
    pub key: String,
    /// Its version; `null` where the bucket keeps none.
    pub version_id: String,
    /// Bytes; 0 for a delete marker.
    pub size: u64,
    /// When it was written, by the store's clock.
    pub written: Option<jiff::Timestamp>,
    /// Until when it is locked.
    pub retain_until: Option<jiff::Timestamp>,
    /// How hard it is locked.
    pub mode: Option<Mode>,
    /// Whether a plain read gives this version.
    pub is_latest: bool,
    /// Whether it is a delete marker: somebody tried to hide the object.
    pub delete_marker: bool,
}

/// A store that fails.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No such object.
    #[error("there is no object {key} in {place}")]
    NotFound {
        /// The object.
        key: String,
        /// The bucket or folder.
        place: String,
    },
    /// The store refuses the caller.
    #[error("{place} refuses to {action} {key}: {detail}; check the credentials and their permissions")]
    Forbidden {
        /// What was tried.
        action: &'static str,
        /// The object or prefix.
        key: String,
        /// The bucket or folder.
        place: String,
        /// The store's words.
        detail: String,
    },
    /// The store cannot be reached, or fails: trying again may help.
    #[error("cannot {action} {key} in {place}: {detail}")]
    Unavailable {
        /// What was tried.
        action: &'static str,
        /// The object or prefix.
        key: String,
        /// The bucket or folder.
        place: String,
        /// The store's words.
        detail: String,
    },
    /// The store has taken an object, and does not lock it as it was asked to.
    #[error(
        "expected {key} to be locked for {days} days ({mode:?}), found {found}; evidence needs a bucket with Object Lock, and a user who may set it"
    )]
    Unlocked {
        /// The object.
        key: String,
        /// How hard.
        mode: Mode,
        /// For how long.
        days: i64,
        /// What the store says of it.
        found: String,
    },
    /// A key that no log has: it would lead out of the folder.
    #[error("{0:?} is not a key: expected names joined by single slashes")]
    Key(String),
}

/// Why an object was not written.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    /// There is another one under that key (HTTP 412): somebody else extended the log.
    #[error("there is already another object under this key")]
    Exists,
    /// The store failed. The object may or may not have been written: put the same bytes again to find out.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Objects that are written once. Keys are whole keys in the bucket or folder.
pub trait Store: Send + Sync {
    /// Writes a new object and gives its version. [`PutError::Exists`] if there is one under that key, even the same.
    /// Callers want [`Store::put_new`].
    fn create<'a>(
        &'a self,
        key: &'a str,
        body: Bytes,
        retention: Option<&'a Retention>,
    ) -> BoxFuture<'a, Result<String, PutError>>;

    /// The object's bytes.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Bytes, StoreError>>;

    /// Every version of every object under the prefix, delete markers among them, with their locks.
    fn list_versions<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<StoredObject>, StoreError>>;

    /// The object on top and its lock, as the store has it now; nothing where the store, a folder, has no locks at all.
    fn lock<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<StoredObject>, StoreError>>;

    /// The keys under the prefix, sorted.
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<String>, StoreError>>;

    /// Writes a new object and gives its version. Writing the same bytes again succeeds: when a reply is lost, the next
    /// try finds the object there, reads it back, and knows it for its own.
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

    /// Reads back whether an object is locked as it was asked to be.
    ///
    /// # Errors
    /// [`StoreError::Unlocked`] if it is not.
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
