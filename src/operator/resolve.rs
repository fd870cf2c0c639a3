//! What a task refers to, from the caches.

use std::{collections::BTreeMap, sync::Arc};

use kube::{ResourceExt, core::DeserializeGuard, runtime::reflector::ObjectRef};

use super::cache::Stores;
use crate::{
    api::{AgentTask, PolicyPack, ToolContract},
    plan::{Finding, pack_among},
};

/// The pack that governs a task and the contracts that it names.
pub struct Resolved {
    packs: Vec<Arc<DeserializeGuard<PolicyPack>>>,
    contracts: Vec<Arc<DeserializeGuard<ToolContract>>>,
    labels: BTreeMap<String, String>,
}

impl Resolved {
    /// Looks everything up. What is missing is for validation to say.
    pub fn of(task: &AgentTask, stores: &Stores) -> Self {
        let namespace = task.namespace().unwrap_or_default();
        let labels = stores.namespaces.get(&ObjectRef::new(&namespace));
        let contracts =
            task.spec.tools.iter().filter_map(|name| stores.contracts.get(&ObjectRef::new(name).within(&namespace)));
        Self {
            packs: stores.packs.state(),
            contracts: contracts.collect(),
            labels: labels.map(|namespace| namespace.labels().clone()).unwrap_or_default(),
        }
    }

    /// The pack that governs the task's namespace.
    ///
    /// # Errors
    /// If none does, or several do.
    pub fn pack(&self) -> Result<&PolicyPack, Finding> {
        pack_among(&self.labels, self.packs.iter().filter_map(|pack| pack.0.as_ref().ok()))
    }

    /// The contracts that can be read.
    pub fn contracts(&self) -> Vec<&ToolContract> {
        self.contracts.iter().filter_map(|contract| contract.0.as_ref().ok()).collect()
    }

    /// What cannot be read.
    pub fn unreadable(&self) -> Vec<Finding> {
        let unreadable = self.contracts.iter().filter_map(|contract| contract.0.as_ref().err());
        unreadable
            .map(|invalid| {
                let name = invalid.metadata.name.as_deref().unwrap_or_default();
                Finding::unreadable(format!("ToolContract/{name}"), "a contract", invalid.error.clone())
            })
            .collect()
    }
}
