//! What a reconciliation has seen of a task: its pods, and the attempts that have a NetworkPolicy.
//!
//! Guarantees: what was looked up in this reconciliation replaces what a cache has. The last status of a deleted pod is kept.
//!
//! Non-goals: requests. [`decide`](crate::lifecycle::decide) finds what must be read.

use std::collections::BTreeSet;

use kube::ResourceExt;
use tokio::time::Instant;

use super::Reconciliation;
use crate::{
    lifecycle::observe::{self, PodView},
    operator::expectations::EXPECTATION_TTL,
    render::names,
};

/// The observed state of a task in one reconciliation.
pub(in crate::operator) struct Seen {
    pub(in crate::operator) pods: Vec<PodView>,
    /// The attempts that have a NetworkPolicy.
    pub(in crate::operator) claims: Vec<i64>,
    /// The attempts whose pod was looked up in this reconciliation.
    pub(in crate::operator) looked_up: BTreeSet<i64>,
    /// Whether the task was read in this reconciliation.
    pub(in crate::operator) live: bool,
}

impl Seen {
    /// Records the result of looking up the attempt's pod: this pod, or none.
    pub(in crate::operator) fn look_up(&mut self, attempt: i64, live: Option<PodView>) {
        self.looked_up.insert(attempt);
        // Any other pod that the cache has for this attempt is outdated. The last status of a deleted pod is kept.
        self.pods
            .retain(|pod| pod.attempt != attempt || pod.live && live.as_ref().is_none_or(|live| live.uid != pod.uid));
        self.pods.extend(live.map(|live| PodView { live: true, ..live }));
    }
}

impl Reconciliation<'_> {
    /// Returns the task's pods and the attempts that have a NetworkPolicy, as far as they are known without a request.
    pub(super) fn observe(&self) -> Seen {
        let stores = &self.context.stores;
        let recent = |made: Instant| made.elapsed() < EXPECTATION_TTL;
        let remembered = self.memory.pod.as_ref().filter(|(_, made)| recent(*made)).map(|(pod, _)| pod.clone());
        let claimed = self.memory.claim.filter(|(_, made)| recent(*made)).map(|(attempt, _)| attempt);
        let pod = |attempt| {
            let live = stores.pod(&self.owner.namespace, &names::of_attempt(&self.owner.name, attempt))?;
            live.0.as_ref().ok().filter(|live| self.owns(live.labels())).and_then(observe::pod)
        };
        let mut pods: Vec<_> = stores.with_pod.of(&self.owner.uid).into_iter().filter_map(pod).collect();
        let mut claims = stores.with_network_policy.of(&self.owner.uid);
        claims.retain(|attempt| self.network_policy(*attempt).is_some());
        claims.extend(claimed);
        for pod in remembered.into_iter().chain(self.memory.gone.clone()) {
            if pods.iter().all(|known| known.uid != pod.uid) {
                pods.push(pod);
            }
        }
        #[cfg(test)]
        if self.context.believes_caches {
            pods.iter_mut().for_each(|pod| pod.live = true);
        }
        Seen { pods, claims: claims.into_iter().collect(), looked_up: BTreeSet::new(), live: self.believed() }
    }

    #[cfg(test)]
    pub(super) fn believed(&self) -> bool {
        self.context.believes_caches
    }

    #[cfg(not(test))]
    pub(super) fn believed(&self) -> bool {
        false
    }
}
