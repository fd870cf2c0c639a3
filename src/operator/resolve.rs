//! Looks up what a task refers to in the caches.

use std::{collections::BTreeMap, sync::Arc};

use kube::{Resource, ResourceExt, runtime::reflector::ObjectRef};

use super::cache::Stores;
use crate::{
    api::{AgentTask, PolicyPack, ToolContract},
    lenient::Lenient,
    render::{
        Finding, pack_among,
        task::contract_missing,
        validated::{Validated, validate},
    },
};

/// The pack that governs a task and the contracts that it names.
pub struct Resolved {
    packs: Vec<Arc<Lenient<PolicyPack>>>,
    contracts: Vec<Arc<Lenient<ToolContract>>>,
    labels: BTreeMap<String, String>,
}

impl Resolved {
    /// Looks everything up. Validation reports what is missing.
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

    /// Returns the pack that governs the task's namespace.
    ///
    /// # Errors
    /// Returns an error if no pack or more than one pack governs it.
    pub fn pack(&self) -> Result<&PolicyPack, Finding> {
        pack_among(&self.labels, self.packs.iter().filter_map(|pack| pack.0.as_ref().ok()))
    }

    /// Returns the contracts that can be decoded.
    fn contracts(&self) -> Vec<&ToolContract> {
        self.contracts.iter().filter_map(|contract| contract.0.as_ref().ok()).collect()
    }

    /// Returns findings about what does not exist yet and may still be created: contracts, and one pack for the namespace.
    pub fn missing(&self, task: &AgentTask) -> Vec<Finding> {
        let there = |name: &String| self.contracts.iter().any(|contract| contract.meta().name.as_ref() == Some(name));
        let namespace = task.namespace().unwrap_or_default();
        let absent = task.spec.tools.iter().enumerate().filter(|(_, name)| !there(name));
        let absent = absent.map(|(index, name)| contract_missing(index, name, &namespace));
        absent.chain(self.pack().err()).collect()
    }

    /// Validates the task. The operator and the webhook use the same validation, so they report the same findings.
    ///
    /// # Errors
    /// Returns everything that is wrong, at once.
    pub fn validate(&self, task: &AgentTask, system_namespace: &str) -> Result<Validated, Vec<Finding>> {
        let unreadable = self.unreadable();
        if !unreadable.is_empty() {
            return Err(unreadable);
        }
        let pack = self.pack().map_err(|finding| vec![finding])?;
        validate(task, &self.contracts(), pack, system_namespace)
    }

    /// Returns findings about contracts that cannot be decoded.
    fn unreadable(&self) -> Vec<Finding> {
        let unreadable = self.contracts.iter().filter_map(|contract| contract.0.as_ref().err());
        unreadable
            .map(|invalid| {
                let name = invalid.metadata.name.as_deref().unwrap_or_default();
                Finding::unreadable(format!("ToolContract/{name}"), "a contract", invalid.error.clone())
            })
            .collect()
    }
}
