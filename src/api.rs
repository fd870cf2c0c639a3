//! The custom resources of group `belay.dev`: data and validation rules, nothing else.
//!
//! Promises: every list and string has a bound, every refusal that the API server can make is in the schema, and
//! a field that nothing acts on is not here. Refuses: behaviour. Meaning is given to these types by
//! [`plan`](crate::plan), which turns them into validated plain data.

#![allow(clippy::duplicated_attributes, reason = "kube's derive takes one printcolumn a column, and they look alike")]

pub mod agent_task;
pub mod approval_request;
/// The reference pages of the kinds.
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

/// A field of a list's items whose default is the code's alone. What the API server fills in inside a list is drift to tools that compare
/// whole lists, such as Argo CD: they know no schema.
fn without_default(schema: &mut Schema) {
    schema.remove("default");
}

/// Every custom resource definition, in the order in which `crds/` lists them.
pub fn all_crds() -> Vec<CustomResourceDefinition> {
    vec![AgentTask::crd(), ToolContract::crd(), PolicyPack::crd(), ApprovalRequest::crd()]
}

#[cfg(test)]
mod tests;
