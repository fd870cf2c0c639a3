//! What the gateway stores for tasks beside their segments: the salts of their commitments, data of their calls, and which rollback
//! compensates which call.
//!
//! Guarantees: all replicas use one salt for a task. A salt in a bucket can be destroyed, and data of calls is never locked. Exactly one
//! rollback takes each call, whichever replicas are asked.
//!
//! Rejects: names of calls and commitments that could leave their folder.
//!
//! Non-goals: the check of stored data against the commitment in the log, which its reader makes.

use std::sync::Arc;

use jiff::Timestamp;
use moka::sync::Cache;
use ring::rand::SystemRandom;

use super::{
    buckets::{Buckets, broken, failed, unavailable},
    metrics::Metrics,
    recent::recent,
    refusal::Refused,
    witness::{Compensates, LogLocation, Witness},
};
use crate::{
    evidence::{
        rollback::{self, CompensationState},
        store::{Location, PutError, Store, StoreError},
    },
    policy::{
        commit::Salt,
        config::{RollbackOf, strict},
        rule::Rule,
        shorten::shorten,
    },
};

/// Maximum number of salts in memory.
const SALTS: usize = 4096;
/// Name of the object with the salt, in its folder.
const SALT: &str = "commitments";
/// Maximum number of rollbacks that may take the same call, one after the other.
const ROLLBACKS: u32 = 16;
/// Maximum length of a call's name in an object key, in bytes.
const LONGEST_CALL: usize = 64;

/// Where the salt of a task's commitments is: in the pack's state bucket, or, without one, derived from the witness's key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SaltLocation {
    /// The task's UID.
    pub task_uid: String,
    /// Folder of the salt in the state bucket.
    pub location: Option<Location>,
}

/// The store of salts, data of calls and claims of rollbacks.
pub struct StateStore {
    buckets: Arc<dyn Buckets>,
    metrics: Metrics,
    /// Reads the logs of other rollbacks, and has the key that salts without a bucket are derived from.
    witness: Arc<Witness>,
    salts: Cache<SaltLocation, Salt>,
}

impl StateStore {
    /// Returns a store that uses these buckets.
    pub fn new(buckets: Arc<dyn Buckets>, witness: Arc<Witness>, metrics: Metrics) -> Self {
        Self { buckets, metrics, witness, salts: recent(SALTS) }
    }

    /// Takes a call of another task for the rollback `by`, if the gateway's clock says that it is in time. Exactly one rollback compensates
    /// each call, whichever tasks roll back. A call that another rollback has taken stays with that rollback, unless its log has ended and
    /// shows that it certainly did nothing about the call. `log` returns the place of a task's log by the task's name and UID.
    ///
    /// # Errors
    /// Returns [`Rule::ToolRollback`] if it is too late or another rollback has the call, or [`Rule::Evidence`] if the bucket fails.
    pub async fn undo(
        &self,
        of: &LogLocation,
        compensates: &Compensates,
        by: &RollbackOf,
        log: impl Fn(&RollbackOf) -> LogLocation,
    ) -> Result<(), Refused> {
        let Compensates { call, until } = compensates;
        let refused = |reason: String| Err(Refused::denied(Rule::ToolRollback, reason));
        if let Err(late) = rollback::in_time(call, until.as_deref(), Timestamp::now()) {
            return refused(late);
        }
        plain(call)?;
        let store = self.bucket(&of.location.bucket).await?;
        let claim = serde_json::to_vec(by).map_err(|e| Refused::malformed(e.to_string()))?;
        for turn in 0..ROLLBACKS {
            let key = format!("{}rollback/{call}.{turn}", of.location.prefix);
            match store.put_new(&key, claim.clone().into(), of.retention.as_ref()).await {
                Ok(_) => return Ok(()),
                Err(PutError::Exists) => {}
                Err(PutError::Store(error)) => return Err(self.failed(&error)),
            }
            let held = store.get(&key).await.map_err(|error| self.failed(&error))?;
            let holder: RollbackOf = serde_json::from_slice::<serde_json::Value>(&held)
                .and_then(strict::read)
                .map_err(|error| broken(&key, error))?;
            if holder == *by {
                return Ok(());
            }
            let other = self.witness.rebuilt(&log(&holder)).await?;
            let state = other.state().rollback().map(|undoing| undoing.state(call));
            if !other.state().has_ended() || state != Some(CompensationState::Due) {
                return refused(format!(
                    "expected no other rollback of {call}, found that {} (UID {}) has started one and {}",
                    holder.name,
                    holder.uid,
                    if other.state().has_ended() { "may have made the compensation" } else { "has not ended" }
                ));
            }
        }
        refused(format!("expected fewer than {ROLLBACKS} rollbacks of {call}; undo {call} by hand"))
    }

    /// Returns the salt of a task's commitments, and creates it if there is none. A salt in a bucket can be destroyed, and with it
    /// everything that the task's commitments can prove.
    ///
    /// # Errors
    /// Returns [`Rule::Evidence`] if the bucket fails.
    pub async fn salt(&self, at: &SaltLocation) -> Result<Salt, Refused> {
        if let Some(salt) = self.salts.get(at) {
            return Ok(salt);
        }
        let salt = match &at.location {
            None => Salt::new(self.witness.derived(&format!("belay.dev/salt/{}", at.task_uid))),
            Some(location) => self.stored_salt(location).await?,
        };
        self.salts.insert(at.clone(), salt.clone());
        Ok(salt)
    }

    async fn stored_salt(&self, at: &Location) -> Result<Salt, Refused> {
        let store = self.bucket(&at.bucket).await?;
        let key = format!("{}{SALT}", at.prefix);
        loop {
            match store.get(&key).await {
                Ok(text) => {
                    let text = String::from_utf8_lossy(&text).into_owned();
                    return Salt::try_from(text).map_err(|e| broken(&key, e));
                }
                Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(self.failed(&error)),
            }
            let random = ring::rand::generate(&SystemRandom::new());
            let new = Salt::new(random.map_err(|_| unavailable("the system has no randomness"))?.expose());
            let text = format!("{}\n", String::from(new.clone()));
            match store.put_new(&key, text.into(), None).await {
                Ok(_) => return Ok(new),
                // Another replica stored a salt first.
                Err(PutError::Exists) => {}
                Err(PutError::Store(error)) => return Err(self.failed(&error)),
            }
        }
    }

    /// Stores data of a call, such as the arguments of its compensation or its result, under its commitment. Does nothing if the object
    /// exists.
    ///
    /// # Errors
    /// Returns [`Rule::Evidence`] if the bucket fails.
    pub async fn put(&self, at: &Location, call: &str, digest: &str, content: Vec<u8>) -> Result<(), Refused> {
        plain(call)?;
        let store = self.bucket(&at.bucket).await?;
        match store.put_new(&format!("{}{call}/{digest}.json", at.prefix), content.into(), None).await {
            Ok(_) | Err(PutError::Exists) => Ok(()),
            Err(PutError::Store(error)) => Err(self.failed(&error)),
        }
    }

    /// Returns stored data of a call, if there is any.
    ///
    /// # Errors
    /// Returns [`Rule::Evidence`] if the bucket fails.
    pub async fn get(&self, at: &Location, call: &str, digest: &str) -> Result<Option<Vec<u8>>, Refused> {
        plain(call)?;
        plain(digest)?;
        let store = self.bucket(&at.bucket).await?;
        match store.get(&format!("{}{call}/{digest}.json", at.prefix)).await {
            Ok(content) => Ok(Some(content.into())),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed(&error)),
        }
    }

    async fn bucket(&self, name: &str) -> Result<Arc<dyn Store>, Refused> {
        self.buckets.bucket(name).await.map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &StoreError) -> Refused {
        failed(&self.metrics, error)
    }
}

/// Checks a name that a harness chose and that becomes part of an object key.
fn plain(name: &str) -> Result<(), Refused> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    if (1..=LONGEST_CALL).contains(&name.len()) && name.bytes().all(is_plain) {
        return Ok(());
    }
    Err(Refused::malformed(format!("expected a name of letters and digits, found {:?}", shorten(name))))
}

#[cfg(test)]
mod tests;
