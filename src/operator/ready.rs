//! Whether contracts and packs are in order, said in their statuses.
//!
//! Guarantees: what is said of an object is what `belay lint` and the webhook say of it by itself; a status is written when it changed, and
//! by the leader alone; each object is judged once for each of its generations. Non-goals: what follows from two objects, such as two packs
//! for one namespace; the tasks that are concerned say that.

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
    memory,
    status::{self, Ready},
};
use crate::{
    api::readiness::Readiness,
    contact::Contact,
    lenient::Lenient,
    plan::{Finding, alone},
};

/// What was last said of an object.
struct Told {
    generation: Option<i64>,
    ready: Ready,
    /// The version that our last write made. The cache may be behind it.
    version: Option<u64>,
}

/// What was last said, by UID.
#[derive(Default)]
pub struct Statuses(HashMap<String, Told>);

/// Keeps all statuses, for as long as it is polled. The caches must be filled.
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
    /// Writes the statuses that are not what they should be.
    ///
    /// # Errors
    /// If one could not be written; the others are.
    pub async fn pass(&mut self, stores: &Stores, writer: &Writer, now: Timestamp) -> Result<(), ApiError> {
        let mut there = HashSet::new();
        let contracts = self.tell(&stores.contracts, writer, now, "a contract", alone::contract, |one| &one.status);
        let contracts = contracts.await.map(|some| there.extend(some));
        let packs = self.tell(&stores.packs, writer, now, "a pack", alone::pack, |one| &one.status);
        let packs = packs.await.map(|some| there.extend(some));
        contracts.and(packs)?;
        self.0.retain(|uid, _| there.contains(uid));
        Ok(())
    }

    /// The UIDs of those that there are.
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
            let version = meta.resource_version.as_deref().and_then(memory::number);
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
                // What its status says cannot be read either; what was written of this generation stays.
                Err(_) if told.is_some() => continue,
                Err(_) => Readiness::default(),
            };
            let after = after(&before, meta.generation, &ready, now);
            let mut told = Told { generation: meta.generation, ready, version: None };
            if before != after {
                match writer.apply_readiness::<K>(meta.namespace.as_deref(), name, uid, &after).await {
                    Ok(written) => told.version = written.as_deref().and_then(memory::number),
                    // Gone, or another under the same name: there is nobody to tell.
                    Err(error) if matches!(error.code(), Some(404 | 409)) => {}
                    Err(error) => {
                        outcome = Err(error);
                        continue;
                    }
                }
            }
            self.0.insert(uid.clone(), told);
            // Judging takes a while, and others wait for their turn.
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
