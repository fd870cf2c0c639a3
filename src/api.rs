//! Defines the custom resources of the group `belay.dev`: data and validation rules only.
//!
//! Guarantees: Every list and every string has a bound. The schema contains every check that the API server can make. Every field has an
//! effect.
//!
//! Leaf types that the policy writes in the same way are in [`policy::config`](crate::policy::config) and
//! [`policy::approval`](crate::policy::approval). The kinds here use them.
//!
//! Non-goals: Behaviour. [`render`](crate::render) turns these types into validated plain data and gives them their meaning.

#![allow(clippy::duplicated_attributes, reason = "kube's derive takes one printcolumn a column, and they look alike")]

pub mod agent_task;
pub mod approval_request;
/// Generates the reference pages of the kinds.
pub mod docs;
pub mod policy_pack;
pub mod readiness;
pub mod tool_contract;

pub use agent_task::{AgentTask, AgentTaskSpec, AgentTaskStatus};
pub use approval_request::{ApprovalRequest, ApprovalRequestSpec};
pub use policy_pack::{PolicyPack, PolicyPackSpec};
pub use tool_contract::{ToolContract, ToolContractSpec};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use schemars::Schema;

/// Removes the default of a field inside a list's items from the schema, so that only the code applies it. The API server would write the
/// default into the list. Tools that compare whole lists and do not know the schema, such as Argo CD, would report that as drift.
fn without_default(schema: &mut Schema) {
    schema.remove("default");
}

/// Returns every custom resource definition, in the order in which `crds/` lists them.
pub fn all_crds() -> Vec<CustomResourceDefinition> {
    vec![AgentTask::crd(), ToolContract::crd(), PolicyPack::crd(), ApprovalRequest::crd()]
}

#[cfg(test)]
mod tests;
