//! Reports in their statuses whether contracts and packs are valid.
//!
//! Guarantees: The status of an object reports what `belay lint` and the webhook report about the object on its own. Only the leader writes
//! a status, and only if it has changed. Each generation of an object is checked once.
//!
//! Non-goals: Problems that involve two objects, such as two packs for one namespace. The statuses of the affected tasks report them.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
};

use jiff::Timestamp;
use kube::{Resource, runtime::reflector::Store};
use serde::de::DeserializeOwned;

use super::{
    api::{ApiError, Writer},
    backoff,
    cache::Stores,
    expectations,
    status::{self, Ready},
};
use crate::{
    api::readiness::Readiness,
    contact::Contact,
    lenient::Lenient,
    render::{Finding, standalone},
};

/// The last reported state of an object.
struct Told {
    generation: Option<i64>,
    ready: Ready,
    /// The resource version that the operator's last write created. The cache may be older.
    version: Option<u64>,
}

/// The last reported states, by UID.
#[derive(Default)]
pub struct Statuses(HashMap<String, Told>);

/// Keeps all statuses up to date while it is polled. The caches must be filled before.
pub async fn keep(stores: &Stores, writer: &Writer, contact: &Contact) -> Infallible {
    let (mut statuses, mut errors, mut known) = (Statuses::default(), 0, None);
    loop {
        match statuses.pass(stores, writer, contact.now()).await {
            Ok(()) => {
                (errors, known) = (0, None);
                stores.references_changed.notified().await;
            }
            Err(error) => {
                errors += 1;
                let text = Some(error.to_string());
                if known != text {
                    tracing::warn!(error = text, "not done yet; tried again");
                }
                known = text;
                tokio::time::sleep(backoff::pause(errors, error.code().is_none())).await;
            }
        }
    }
}

impl Statuses {
    /// Writes the statuses that are not up to date.
    ///
    /// # Errors
    /// Returns an error if a status could not be written. All others are written.
    pub async fn pass(&mut self, stores: &Stores, writer: &Writer, now: Timestamp) -> Result<(), ApiError> {
        let mut there = HashSet::new();
        let contracts =
            self.tell(&stores.contracts, writer, now, "a contract", standalone::contract, |one| &one.status);
        let contracts = contracts.await.map(|some| there.extend(some));
        let packs = self.tell(&stores.packs, writer, now, "a pack", standalone::pack, |one| &one.status);
        let packs = packs.await.map(|some| there.extend(some));
        contracts.and(packs)?;
        self.0.retain(|uid, _| there.contains(uid));
        Ok(())
    }

    /// Writes the statuses of one kind, and returns the UIDs of all its objects.
    async fn tell<K>(
        &mut self,
        store: &Store<Lenient<K>>,
        writer: &Writer,
        now: Timestamp,
        what: &str,
        judge: fn(&K) -> Vec<Finding>,
        status: fn(&K) -> &Option<Readiness>,
    ) -> Result<Vec<String>, ApiError>
    where
        K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + 'static,
    {
        let (mut there, mut outcome) = (Vec::new(), Ok(()));
        for object in store.state() {
            let meta = object.meta();
            let (Some(uid), Some(name)) = (&meta.uid, &meta.name) else { continue };
            there.push(uid.clone());
            let told = self.0.get(uid).filter(|told| told.generation == meta.generation);
            let version = meta.resource_version.as_deref().and_then(expectations::number);
            if meta.deletion_timestamp.is_some() || told.is_some_and(|told| told.version > version) {
                continue;
            }
            let ready = match (told, &object.0) {
                (Some(told), _) => told.ready.clone(),
                (None, Ok(read)) => stalled_by(&judge(read)),
                (None, Err(invalid)) => stalled_by(&[Finding::unreadable("spec", what, invalid.error.clone())]),
            };
            let before = match &object.0 {
                Ok(read) => status(read).clone().unwrap_or_default(),
                // The status of such an object cannot be decoded either. A status that was written for this generation stays.
                Err(_) if told.is_some() => continue,
                Err(_) => Readiness::default(),
            };
            let after = after(&before, meta.generation, &ready, now);
            let mut told = Told { generation: meta.generation, ready, version: None };
            if before != after {
                match writer.apply_readiness::<K>(meta.namespace.as_deref(), name, uid, &after).await {
                    Ok(written) => told.version = written.as_deref().and_then(expectations::number),
                    // The object is gone, or another object has its name, so there is no status to write.
                    Err(error) if matches!(error.code(), Some(404 | 409)) => {}
                    Err(error) => {
                        outcome = Err(error);
                        continue;
                    }
                }
            }
            self.0.insert(uid.clone(), told);
            // The checks take a while, and other tasks of the runtime must not wait for all of them.
            tokio::task::yield_now().await;
        }
        outcome.map(|()| there)
    }
}

fn stalled_by(findings: &[Finding]) -> Ready {
    if findings.is_empty() { Ready::Yes } else { Ready::Stalled(status::told(findings, status::SHOWN_FINDINGS)) }
}

pub(super) fn after(before: &Readiness, generation: Option<i64>, ready: &Ready, now: Timestamp) -> Readiness {
    let mut after = Readiness { observed_generation: generation, conditions: before.conditions.clone() };
    let reason = if *ready == Ready::Yes { status::VALID } else { status::INVALID };
    status::set_readiness(&mut after.conditions, generation, now, reason, ready);
    after
}

#[cfg(test)]
mod tests;
