//! A task, its contracts and its pack become what is to be: policy, pod, NetworkPolicy, ConfigMap.
//!
//! Promises: the same input gives the same bytes, in the operator and in the gateway; everything that is wrong is found in
//! one pass and named by its field; what is not understood is refused. Refuses: clients, clocks, and repair of
//! bad input, but for one thing: an input schema that is silent about unknown properties refuses them.
//!
//! ```text
//! pack_for ─▶ config::render_policy ─▶ validated::validate ─▶ pod, network_policy, config_map (cannot fail)
//! ```

use std::{borrow::Borrow, collections::BTreeMap, fmt};

use kube::{
    ResourceExt,
    core::{Selector, SelectorExt},
};

use crate::api::PolicyPack;

/// What a pack says to tool calls.
pub mod access;
/// What runs in the agent's place, whatever runs it.
pub mod agent;
/// Contracts and packs by themselves.
pub mod alone;
/// ApprovalRequests as plain data.
pub mod approval;
/// CEL preconditions: that they compile, name only what exists and stay shallow.
pub mod condition;
/// The rendered policy.
pub mod config;
/// The ConfigMap of an attempt.
pub mod config_map;
/// Where a task's evidence goes.
pub mod evidence;
#[cfg(test)]
pub(crate) mod fixtures;
/// Whether a pod is the pod that was planned.
pub mod intact;
/// Labels, annotations and other names that are shared.
pub mod names;
/// The NetworkPolicy of an attempt, and the proof that it was read back.
pub mod network_policy;
/// The task as the owner of its attempts' objects.
pub mod owner;
/// The pod of an attempt.
pub mod pod;
/// Kubernetes quantities.
pub mod quantity;
/// The task that undoes another.
pub mod rollback;
/// Input schemas: valid, self-contained, closed.
pub mod schema;
#[cfg(test)]
mod tests;
/// Types of CEL expressions.
pub mod types;
/// A task in order, as types that hold nothing else.
pub mod validated;

/// One thing that is wrong, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Path of the field. A field of another object than the task is preceded by its kind and name: `ToolContract/read-log spec.input`.
    pub field: String,
    /// What was expected.
    pub expected: String,
    /// What was found.
    pub found: String,
    /// What to do.
    pub fix: String,
}

impl Finding {
    /// A finding, in the order in which it is read.
    pub fn new(
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { field: field.into(), expected: expected.into(), found: found.into(), fix: fix.into() }
    }

    /// An object that is there, and is not what its type says: newer than this version, or older.
    pub fn unreadable(field: impl Into<String>, what: &str, error: impl Into<String>) -> Self {
        Self::new(
            field,
            format!("{what} that this version of Belay can read"),
            error,
            "apply it again as the installed CRD has it",
        )
    }

    /// The finding, with the field as the object itself has it: `ToolContract/read-log spec.input` is `spec.input`.
    #[must_use]
    pub fn own(mut self) -> Self {
        if let Some((_, field)) = self.field.split_once(" spec") {
            self.field = format!("spec{field}");
        }
        self
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: expected {}, found {}; {}", self.field, self.expected, self.found, self.fix)
    }
}

impl std::error::Error for Finding {}

/// The one pack that governs a namespace with these labels.
///
/// A pack whose selector cannot be read selects nothing: it must not take the other packs' namespaces down with it.
///
/// # Errors
/// If no pack selects the namespace, or more than one does: which one was meant is not for us to guess.
pub fn pack_for<'a, P: Borrow<PolicyPack>>(
    namespace_labels: &BTreeMap<String, String>,
    packs: &'a [P],
) -> Result<&'a PolicyPack, Finding> {
    pack_among(namespace_labels, packs.iter().map(Borrow::borrow))
}

/// [`pack_for`] over packs that lie elsewhere.
///
/// # Errors
/// See [`pack_for`].
pub fn pack_among<'a>(
    namespace_labels: &BTreeMap<String, String>,
    packs: impl IntoIterator<Item = &'a PolicyPack>,
) -> Result<&'a PolicyPack, Finding> {
    let mut unreadable = Vec::new();
    let mut selecting = Vec::new();
    for pack in packs {
        match Selector::try_from(pack.spec.namespace_selector.clone()) {
            Ok(selector) if selector.matches(namespace_labels) => selecting.push(pack),
            Ok(_) => {}
            Err(error) => {
                unreadable.push(format!("PolicyPack `{}` has no readable selector ({error})", pack.name_any()))
            }
        }
    }
    selecting.sort_by_key(|pack| pack.name_any());
    match selecting.as_slice() {
        [pack] => Ok(*pack),
        [] => Err(Finding::new(
            "metadata.namespace",
            "a namespace that exactly one PolicyPack selects",
            if unreadable.is_empty() {
                "none that does".to_owned()
            } else {
                format!("none that does; {}", unreadable.join(", "))
            },
            "label the namespace as a pack's namespaceSelector asks, or apply a PolicyPack for it",
        )),
        several => Err(Finding::new(
            "metadata.namespace",
            "a namespace that exactly one PolicyPack selects",
            several.iter().map(|pack| format!("`{}`", pack.name_any())).collect::<Vec<_>>().join(", "),
            "change the packs' namespaceSelectors so that one of them remains",
        )),
    }
}
