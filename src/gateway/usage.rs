//! Reports of `status.usage` of tasks, from witnessed evidence.
//!
//! Guarantees: there is at most one write while a task runs, when it has used half of a limit, and one at its end. A write happens only if
//! the usage has changed, with the gateway's own field manager, and only to the task with that UID.
//!
//! Non-goals: reliable delivery. Evidence has the counters, and the status is for users; no request waits for it.

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use moka::sync::Cache;
use serde_json::json;

use super::{
    metrics::Metrics,
    recent::{first, recent},
};
use crate::{
    api::AgentTask,
    policy::{config::Usage, price},
};

/// The gateway's field manager.
const MANAGER: &str = "belay-gateway";
/// Time limit for the API server.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of tasks that are remembered as written. Then all are forgotten, and the status itself shows whether usage was written.
const REMEMBERED: usize = 16_384;

/// Writes `status.usage`.
pub trait WriteUsage: Send + Sync {
    /// Writes the usage once.
    fn write<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
        uid: &'a str,
        usage: Usage,
    ) -> BoxFuture<'a, Result<(), String>>;
}

impl WriteUsage for Client {
    fn write<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
        uid: &'a str,
        usage: Usage,
    ) -> BoxFuture<'a, Result<(), String>> {
        let api = Api::<AgentTask>::namespaced(self.clone(), namespace);
        Box::pin(async move {
            // With the UID, a new task under the same name is not changed.
            let patch = json!({
                "apiVersion": "belay.dev/v1alpha1",
                "kind": "AgentTask",
                "metadata": { "name": name, "uid": uid },
                "status": { "usage": usage },
            });
            let params = PatchParams::apply(MANAGER).force();
            let patch = Patch::Apply(&patch);
            let written = tokio::time::timeout(TIMEOUT, api.patch_status(name, &params, &patch));
            written.await.map_err(|_| "no answer in 5 s".to_owned())?.map(|_| ()).map_err(|e| e.to_string())
        })
    }
}

/// Decides when usage is written.
pub struct UsageStatus {
    api: Arc<dyn WriteUsage>,
    metrics: Metrics,
    /// UIDs of tasks whose usage was written while they ran.
    written: Cache<String, ()>,
}

impl UsageStatus {
    /// Returns a reporter that writes with `api`.
    pub fn new(api: Arc<dyn WriteUsage>, metrics: Metrics) -> Self {
        Self { api, metrics, written: recent(REMEMBERED) }
    }

    /// Writes the usage of a running task once it has used half of a limit.
    pub async fn running(&self, task: &AgentTask, usage: Usage) {
        let limits = &task.spec.limits;
        let half = |used: i64, limit: i64| used > 0 && used.saturating_mul(2) >= limit;
        let cost = limits.cost.as_deref().and_then(price::parse);
        let due = half(usage.tool_calls, limits.tool_calls)
            || half(usage.tokens, limits.tokens)
            || limits.denials.is_some_and(|limit| half(usage.denials, limit))
            || cost.is_some_and(|limit| half(usage.cost_micros, limit));
        let seen = task.status.as_ref().is_some_and(|status| status.usage.is_some());
        let Some(uid) = task.metadata.uid.as_deref().filter(|_| due && !seen) else { return };
        if first(&self.written, uid.to_owned()) {
            self.write(task, usage).await;
        }
    }

    /// Writes the final usage of a task, unless its status has it already. Nothing is written for a task without usage.
    pub async fn ended(&self, task: &AgentTask, usage: Usage) {
        let before = task.status.as_ref().and_then(|status| status.usage).unwrap_or_default();
        if before != usage {
            self.write(task, usage).await;
        }
    }

    async fn write(&self, task: &AgentTask, usage: Usage) {
        let meta = &task.metadata;
        let (Some(namespace), Some(name), Some(uid)) = (&meta.namespace, &meta.name, &meta.uid) else { return };
        let result = match self.api.write(namespace, name, uid, usage).await {
            Ok(()) => "written",
            Err(cause) => {
                tracing::warn!(namespace, name, cause, "status.usage could not be written");
                "failed"
            }
        };
        self.metrics.usage_writes.with_label_values(&[result]).inc();
    }
}

#[cfg(test)]
mod tests;
