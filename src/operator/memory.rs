//! What the operator remembers of a task between two looks at it, because the caches may be behind its own writes.
//!
//! Promises: losing it is safe. All that a decision needs lies in the cluster; this saves writes that would be repeated, and attempt
//! numbers that would be skipped.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kube::ResourceExt;
use tokio::time::Instant;

use crate::{api::AgentTask, lifecycle::observe::PodView};

/// For how long our own writes are believed over caches that do not show them.
pub const BELIEVED: Duration = Duration::from_secs(10);

/// Of one task.
#[derive(Clone, Default)]
pub struct Memory {
    /// Errors in a row.
    pub errors: u32,
    /// The last error's text, to log it once.
    pub last_error: Option<String>,
    /// When it was first seen; gone once its first pod was made.
    pub first_seen: Option<Instant>,
    /// The task as our last write left it.
    pub latest: Option<Arc<AgentTask>>,
    /// The pod that we made and the cache does not show yet.
    pub pod: Option<(PodView, Instant)>,
    /// The newest of its pods that is gone, as the API server last showed it: how it ended may be said nowhere else.
    pub gone: Option<PodView>,
    /// The attempt whose NetworkPolicy we made and the cache does not show yet.
    pub claim: Option<(i64, Instant)>,
    /// The attempt that we began and whose pod was certainly not made.
    pub reusable: Option<i64>,
}

/// Of all tasks, by UID.
#[derive(Default)]
pub struct Memories(Mutex<HashMap<String, Memory>>);

impl Memories {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Memory>> {
        // The map is whole after every operation: a panic elsewhere leaves nothing half done in it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of this task, as it is now.
    pub fn get(&self, uid: &str) -> Memory {
        self.lock().get(uid).cloned().unwrap_or_default()
    }

    /// Changes it.
    pub fn update<T>(&self, uid: &str, change: impl FnOnce(&mut Memory) -> T) -> T {
        change(self.lock().entry(uid.to_owned()).or_default())
    }

    /// A task appeared.
    pub fn see(&self, uid: &str) {
        self.lock()
            .entry(uid.to_owned())
            .or_insert_with(|| Memory { first_seen: Some(Instant::now()), ..Memory::default() });
    }

    /// The cache shows this pod, or showed it: from now on the cache is believed.
    pub fn pod_cached(&self, task_uid: &str, pod_uid: &str) {
        if let Some(memory) = self.lock().get_mut(task_uid) {
            memory.pod.take_if(|(pod, _)| pod.uid == pod_uid);
        }
    }

    /// A pod is gone, and this is the last that was said of it.
    pub fn pod_gone(&self, task_uid: &str, pod: PodView) {
        self.update(task_uid, |memory| {
            if memory.gone.as_ref().is_none_or(|gone| gone.attempt <= pod.attempt) {
                // Nothing of it runs any more, and nothing else will ever be said of it.
                memory.gone = Some(PodView { terminal: true, live: true, ..pod });
            }
        });
    }

    /// The cache shows an attempt's NetworkPolicy, or showed it: if it is not there any more, it was deleted.
    pub fn policy_cached(&self, task_uid: &str, attempt: &str) {
        if let Some(memory) = self.lock().get_mut(task_uid) {
            memory.claim.take_if(|(claimed, _)| claimed.to_string() == attempt);
        }
    }

    /// All went well.
    pub fn reset_errors(&self, uid: &str) {
        if let Some(memory) = self.lock().get_mut(uid) {
            (memory.errors, memory.last_error) = (0, None);
        }
    }

    /// Something went wrong: how often in a row, and whether it is the same as the last.
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

    /// Forgets those that are no more.
    pub fn retain(&self, exists: impl Fn(&str) -> bool) {
        self.lock().retain(|uid, _| exists(uid));
    }

    /// The cache shows this version: what was remembered up to it is of no more use.
    pub fn cached(&self, uid: &str, version: Option<&str>) {
        let cached = version.and_then(number);
        if let Some(memory) = self.lock().get_mut(uid) {
            memory.latest.take_if(|latest| number_of(latest) <= cached);
        }
    }

    /// The newer of the cached task and the one that our last write left.
    pub fn newest(&self, cached: Arc<AgentTask>) -> Arc<AgentTask> {
        let Some(uid) = cached.uid() else { return cached };
        let latest = self.lock().get(&uid).and_then(|memory| memory.latest.clone());
        latest.filter(|latest| number_of(latest) > number_of(&cached)).unwrap_or(cached)
    }
}

/// Resource versions of one kind are numbers that grow. Where they are not numbers the cache is believed.
pub fn number(version: &str) -> Option<u64> {
    version.parse().ok()
}

fn number_of(task: &AgentTask) -> Option<u64> {
    number(task.metadata.resource_version.as_deref()?)
}
