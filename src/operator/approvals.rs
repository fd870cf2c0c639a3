//! Tracks the undecided ApprovalRequests of each task, and decides what a task's status says about them.
//!
//! Guarantees: Memory holds names and times of undecided requests only, never arguments. If approvers decide each request within
//! [`SETTLE`], the status does not change. Two changes of a status because of requests are at least [`PAUSE`] apart, however many requests
//! come and go. The same requests always give the same text.
//!
//! Non-goals: Decisions about calls, which the gateway makes. Whether the agent works on something else while a request is undecided, which
//! only the agent knows.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use kube::{
    Resource,
    runtime::{reflector::ObjectRef, watcher},
};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

use super::{
    by_task::{ByTask, Entry},
    cache::GuardedTask,
};
use crate::{
    api::ApprovalRequest,
    lenient::Lenient,
    policy::approval::{self, ApprovalState},
    render::{self, names},
};

/// How long a request must be undecided before a status says so. Requests that arrive meanwhile share the write.
pub const SETTLE: Duration = Duration::from_secs(5);
/// The shortest time between two changes of a status because of requests. A burst of requests costs few writes, and approvers, who take
/// longer, see no difference.
pub const PAUSE: Duration = Duration::from_secs(10);
/// The number of requests that a status names.
const SHOWN: usize = 5;

/// The undecided requests of one task, by name.
pub type Requests = BTreeMap<String, Times>;

/// When a request was created, and when it expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// When the gateway created the request.
    pub created: Timestamp,
    /// The time by which approvers must decide.
    pub expires: Timestamp,
}

/// The undecided requests of all tasks, as a watch shows them.
#[derive(Clone)]
pub struct Undecided(Arc<Shared>);

struct Shared {
    listed: Mutex<ByTask<String, Times>>,
    filled: watch::Sender<bool>,
}

impl Default for Undecided {
    fn default() -> Self {
        Self(Arc::new(Shared { listed: Mutex::default(), filled: watch::Sender::new(false) }))
    }
}

impl Undecided {
    fn lock(&self) -> MutexGuard<'_, ByTask<String, Times>> {
        self.0.listed.lock()
    }

    /// Waits until the first list is complete.
    pub async fn wait_until_ready(&self) {
        // The sender is part of `self`, so the channel stays open.
        let _ = self.0.filled.subscribe().wait_for(|filled| *filled).await;
    }

    /// Returns the undecided requests of the task with this UID. They may have expired.
    pub fn of(&self, task_uid: &str) -> Requests {
        self.lock().of(task_uid)
    }

    /// Applies an event of the watch.
    pub fn follow(&self, event: &watcher::Event<Lenient<ApprovalRequest>>) {
        let mut listed = self.lock();
        // The controller reconciles the task at this event, and not again when the list is complete.
        if let watcher::Event::InitApply(request) = event {
            entry(request).into_iter().for_each(|entry| listed.set(entry));
        }
        listed.follow(event, entry);
        if matches!(event, watcher::Event::InitDone) {
            self.0.filled.send_replace(true);
        }
    }
}

/// Returns what a request says: the UID of its task, its name, and its times if it is undecided.
fn entry(request: &Lenient<ApprovalRequest>) -> Option<Entry<String, Times>> {
    let metadata = request.meta();
    let task = metadata.labels.as_ref()?.get(names::TASK_UID)?;
    Some((task.clone(), metadata.name.clone()?, request.0.as_ref().ok().and_then(undecided)))
}

/// Returns the times of a request that approvers have not decided.
fn undecided(request: &ApprovalRequest) -> Option<Times> {
    let asked = render::approval::asked(&request.spec);
    // Whether the request has expired is a question for later, so the time is one before every expiry.
    let state = approval::state(&asked, render::approval::votes(request), Timestamp::MIN);
    let created = request.metadata.creation_timestamp.as_ref().map_or(Timestamp::MIN, |created| created.0);
    (state == ApprovalState::Pending).then_some(Times { created, expires: asked.expires })
}

/// Returns the task of a request, by the labels that the gateway sets.
pub fn task(request: &Lenient<ApprovalRequest>) -> Option<ObjectRef<GuardedTask>> {
    let metadata = request.meta();
    let name = metadata.labels.as_ref()?.get(names::TASK)?;
    Some(ObjectRef::new(name).within(metadata.namespace.as_deref()?))
}

/// What a status says about undecided requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The message. `None` if the task does not wait for approvers.
    pub message: Option<String>,
    /// When the message may change although no request changes.
    pub until: Option<Timestamp>,
}

/// Returns what a status says about these requests, given what it says now, and when requests last changed it.
pub fn report(requests: &Requests, says: Option<&str>, changed: Option<Timestamp>, now: Timestamp) -> Report {
    let open: Vec<_> = requests.iter().filter(|(_, times)| times.expires > now).collect();
    let settled = |times: &Times| after(times.created, SETTLE);
    // A task that already waits goes on to wait for the next request.
    let waits = open.iter().any(|(_, times)| says.is_some() || settled(times) <= now);
    let message = waits.then(|| in_words(&open));
    let held = changed.map(|changed| after(changed, PAUSE)).filter(|held| *held > now);
    if let Some(held) = held.filter(|_| message.as_deref() != says) {
        return Report { message: says.map(str::to_owned), until: Some(held) };
    }
    let settles = open.iter().map(|(_, times)| settled(times)).filter(|_| !waits);
    let expires = open.iter().map(|(_, times)| times.expires);
    Report { message, until: settles.chain(expires).min() }
}

/// Returns the message about undecided requests, the most urgent first.
fn in_words(open: &[(&String, &Times)]) -> String {
    let mut open = open.to_vec();
    open.sort_by_key(|(name, times)| (times.expires, *name));
    let mut parts: Vec<_> = open
        .iter()
        .take(SHOWN)
        .map(|(name, times)| {
            // Whole seconds, as the API server has them.
            let expires = Timestamp::from_second(times.expires.as_second()).unwrap_or(times.expires);
            format!("{name} (expires at {expires})")
        })
        .collect();
    let more = open.len().saturating_sub(SHOWN);
    if more > 0 {
        parts.push(format!("and {more} more"));
    }
    format!("waits for approvers to decide about ApprovalRequest {}", parts.join(", "))
}

fn after(time: Timestamp, by: Duration) -> Timestamp {
    SignedDuration::try_from(by).ok().and_then(|by| time.checked_add(by).ok()).unwrap_or(time)
}

#[cfg(test)]
mod tests;
