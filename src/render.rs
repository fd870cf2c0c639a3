//! Renders a task, its contracts and its pack into the objects of an attempt: policy, pod, NetworkPolicy, ConfigMap.
//!
//! Guarantees: The same input gives the same bytes, in the operator and in the gateway. One pass finds everything that is wrong and names
//! it by its field.
//!
//! Rejects: Input that this version does not understand.
//!
//! Non-goals: Clients, clocks, and the repair of bad input. The one exception is an input schema that does not mention unknown properties:
//! the rendered schema is closed, so that it rejects them.
//!
//! ```text
//! pack_for ─▶ task::render_policy ─▶ validated::validate ─▶ pod, network_policy, config_map (cannot fail)
//! ```
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::{borrow::Borrow, collections::BTreeMap, fmt};

use kube::{
    ResourceExt,
    core::{Selector, SelectorExt},
};

use crate::api::PolicyPack;

/// Renders a pack's rules for tool calls.
pub mod access;
/// Describes the agent of an attempt, whatever runs it.
pub mod agent;
/// Reads ApprovalRequests as plain data.
pub mod approval;
/// Checks CEL preconditions: they compile, name only variables that exist, and are not nested too deeply.
pub mod condition;
/// Builds the ConfigMap of an attempt.
pub mod config_map;
/// Checks and renders contracts.
pub mod contract;
/// Says where a task's evidence is stored.
pub mod evidence;
#[cfg(test)]
pub(crate) mod fixtures;
/// Checks whether a pod is the pod that was planned.
pub mod intact;
/// Defines the labels, annotations and other names that components share.
pub mod names;
/// Builds the NetworkPolicy of an attempt, and proves that it was read back.
pub mod network_policy;
/// Describes the task as the owner of its attempts' objects.
pub mod owner;
/// Checks and renders packs.
pub mod pack;
/// Builds the pod of an attempt.
pub mod pod;
/// Reads Kubernetes quantities.
pub mod quantity;
/// Builds rollback tasks.
pub mod rollback;
/// Checks and closes input schemas: valid, self-contained, closed.
pub mod schema;
/// Checks contracts and packs on their own.
pub mod standalone;
/// Renders the policy of a task.
pub mod task;
#[cfg(test)]
mod tests;
/// Infers the types of CEL expressions.
pub mod types;
/// Validates tasks, with types that can hold only a valid task.
pub mod validated;

/// One problem of an object, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The path of the field. The kind and name of the object come first if it is not the task: `ToolContract/read-log spec.input`.
    pub field: String,
    /// What was expected.
    pub expected: String,
    /// What was found.
    pub found: String,
    /// What to do.
    pub fix: String,
}

impl Finding {
    /// Creates a finding. The arguments have the order in which the finding is displayed.
    pub fn new(
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { field: field.into(), expected: expected.into(), found: found.into(), fix: fix.into() }
    }

    /// Creates the finding about an object that exists and that this version cannot decode, because the object is newer or older.
    pub fn unreadable(field: impl Into<String>, what: &str, error: impl Into<String>) -> Self {
        Self::new(
            field,
            format!("{what} that this version of Belay can read"),
            error,
            "apply it again as the installed CRD has it",
        )
    }

    /// Returns the finding with the field's path inside the object: `ToolContract/read-log spec.input` becomes `spec.input`.
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

/// Returns the one pack that governs a namespace with these labels.
///
/// A pack whose selector cannot be read selects nothing, so that it does not affect the namespaces of other packs.
///
/// # Errors
/// Returns an error if no pack or more than one pack selects the namespace. Belay does not guess which one was meant.
pub fn pack_for<'a, P: Borrow<PolicyPack>>(
    namespace_labels: &BTreeMap<String, String>,
    packs: &'a [P],
) -> Result<&'a PolicyPack, Finding> {
    pack_among(namespace_labels, packs.iter().map(Borrow::borrow))
}

/// Like [`pack_for`], for packs that are not in a slice.
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
