//! Metadata that every object of an attempt has: name, labels and the task as its owner.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Resource;

use super::{names, validated::Attempt};
use crate::api::AgentTask;

/// See the module.
pub(super) fn metadata(attempt: &Attempt<'_>) -> ObjectMeta {
    let task = attempt.task;
    ObjectMeta {
        name: Some(attempt.name()),
        namespace: Some(task.namespace.clone()),
        labels: Some(names::labels(&task.name, &task.uid, attempt.number)),
        owner_references: Some(vec![OwnerReference {
            api_version: AgentTask::api_version(&()).into_owned(),
            kind: AgentTask::kind(&()).into_owned(),
            name: task.name.clone(),
            uid: task.uid.clone(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        }]),
        ..ObjectMeta::default()
    }
}
