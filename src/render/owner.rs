//! Describes the task as the owner of its attempts' objects: their names, labels and owner reference.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{Resource, ResourceExt};

use super::names;
use crate::api::AgentTask;

/// The identity of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The task's namespace.
    pub namespace: String,
    /// The task's name.
    pub name: String,
    /// The task's UID.
    pub uid: String,
}

impl Owner {
    /// Returns the identity of this task.
    pub fn of(task: &AgentTask) -> Self {
        Self {
            namespace: task.namespace().unwrap_or_default(),
            name: task.name_any(),
            uid: task.uid().unwrap_or_default(),
        }
    }

    /// Returns the metadata of all objects of one attempt.
    pub(super) fn metadata(&self, attempt: i64) -> ObjectMeta {
        ObjectMeta {
            name: Some(names::of_attempt(&self.name, attempt)),
            namespace: Some(self.namespace.clone()),
            labels: Some(names::labels(&self.name, &self.uid, attempt)),
            owner_references: Some(vec![OwnerReference {
                api_version: AgentTask::api_version(&()).into_owned(),
                kind: AgentTask::kind(&()).into_owned(),
                name: self.name.clone(),
                uid: self.uid.clone(),
                controller: Some(true),
                block_owner_deletion: Some(true),
            }]),
            ..ObjectMeta::default()
        }
    }
}
