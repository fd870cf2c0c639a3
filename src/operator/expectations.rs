//! Remembers the operator's own writes for a task between two reconciliations, because the caches may be older than these writes.
//!
//! Guarantees: Losing the memory is safe. The cluster has everything that a decision needs. The memory only avoids repeated writes and
//! skipped attempt numbers.

use std::{collections::HashMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use kube::ResourceExt;
use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;

use crate::{api::AgentTask, lifecycle::observe::PodView};

/// How long the operator trusts its own writes over caches that do not show them.
pub const EXPECTATION_TTL: Duration = Duration::from_secs(10);

/// What is remembered about one task.
#[derive(Clone, Default)]
pub struct Memory {
    /// The number of errors in a row.
    pub errors: u32,
    /// The text of the last error, so that the same error is logged once.
    pub last_error: Option<String>,
    /// When the task was first seen. `None` once its first pod was created.
    pub first_seen: Option<Instant>,
    /// The task as the operator's last write left it.
    pub latest: Option<Arc<AgentTask>>,
    /// The pod that the operator created and that the cache does not show yet.
    pub pod: Option<(PodView, Instant)>,
    /// The newest of the task's deleted pods, as the API server last showed it. There may be no other information about its end.
    pub gone: Option<PodView>,
    /// The attempt whose NetworkPolicy the operator created and the cache does not show yet.
    pub claim: Option<(i64, Instant)>,
    /// The attempt that the operator started and whose pod was certainly not created.
    pub reusable: Option<i64>,
    /// When undecided ApprovalRequests last changed the status.
    pub approvals_told: Option<Timestamp>,
}

/// What is remembered about all tasks, by UID.
#[derive(Default)]
pub struct Expectations(Mutex<HashMap<String, Memory>>);

impl Expectations {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Memory>> {
        // Each operation leaves the map consistent, so a panic elsewhere does not leave a partial change.
        self.0.lock()
    }

    /// Returns a copy of what is remembered about this task.
    pub fn get(&self, uid: &str) -> Memory {
        self.lock().get(uid).cloned().unwrap_or_default()
    }

    /// Changes what is remembered about this task.
    pub fn update<T>(&self, uid: &str, change: impl FnOnce(&mut Memory) -> T) -> T {
        change(self.lock().entry(uid.to_owned()).or_default())
    }

    /// Records that a task was seen.
    pub fn see(&self, uid: &str) {
        self.lock()
            .entry(uid.to_owned())
            .or_insert_with(|| Memory { first_seen: Some(Instant::now()), ..Memory::default() });
    }

    /// Records that the cache shows or has shown this pod. From now on, the cache is trusted.
    pub fn pod_cached(&self, task_uid: &str, pod_uid: &str) {
        if let Some(memory) = self.lock().get_mut(task_uid) {
            memory.pod.take_if(|(pod, _)| pod.uid == pod_uid);
        }
    }

    /// Records the last status of a pod that is gone.
    pub fn pod_gone(&self, task_uid: &str, pod: PodView) {
        self.update(task_uid, |memory| {
            if memory.gone.as_ref().is_none_or(|gone| gone.attempt <= pod.attempt) {
                // No container of the pod runs any more, and its status is final.
                memory.gone = Some(PodView { terminal: true, live: true, ..pod });
            }
        });
    }

    /// Records that the cache shows or has shown an attempt's NetworkPolicy. If the NetworkPolicy is missing later, it was deleted.
    pub fn policy_cached(&self, task_uid: &str, attempt: &str) {
        if let Some(memory) = self.lock().get_mut(task_uid) {
            memory.claim.take_if(|(claimed, _)| claimed.to_string() == attempt);
        }
    }

    /// Resets the errors after a success.
    pub fn reset_errors(&self, uid: &str) {
        if let Some(memory) = self.lock().get_mut(uid) {
            (memory.errors, memory.last_error) = (0, None);
        }
    }

    /// Records an error. Returns the number of errors in a row, and whether the error is the same as the last one.
    pub fn error(&self, uid: &str, text: &str) -> (u32, bool) {
        self.update(uid, |memory| {
            memory.errors = memory.errors.saturating_add(1);
            let known = memory.last_error.as_deref() == Some(text);
            memory.last_error = Some(text.to_owned());
            (memory.errors, known)
        })
    }

    /// Forgets a task.
    pub fn forget(&self, uid: &str) {
        self.lock().remove(uid);
    }

    /// Forgets tasks that do not exist any more.
    pub fn retain(&self, exists: impl Fn(&str) -> bool) {
        self.lock().retain(|uid, _| exists(uid));
    }

    /// Records that the cache shows this version of the task, so that the remembered task up to this version is not needed any more.
    pub fn cached(&self, uid: &str, version: Option<&str>) {
        let cached = version.and_then(number);
        if let Some(memory) = self.lock().get_mut(uid) {
            memory.latest.take_if(|latest| number_of(latest) <= cached);
        }
    }

    /// Returns the newer of the cached task and the task that the operator's last write left.
    pub fn newest(&self, cached: Arc<AgentTask>) -> Arc<AgentTask> {
        let Some(uid) = cached.uid() else { return cached };
        let latest = self.lock().get(&uid).and_then(|memory| memory.latest.clone());
        latest.filter(|latest| number_of(latest) > number_of(&cached)).unwrap_or(cached)
    }
}

/// Parses a resource version. The versions of one kind are increasing numbers. If they are not numbers, the cache is trusted.
pub fn number(version: &str) -> Option<u64> {
    version.parse().ok()
}

fn number_of(task: &AgentTask) -> Option<u64> {
    number(task.metadata.resource_version.as_deref()?)
}
