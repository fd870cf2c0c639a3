//! The quotas of each pod: how many of its requests the gateway serves, evaluates and holds in memory at a time.
//!
//! Guarantees: no pod has more under way than its quotas, whatever the number of its connections, so one agent cannot starve the others. A
//! pod is forgotten only when nothing of it is under way and nothing counts against it.
//!
//! Non-goals: the limits of a task, which the harness and the log enforce; the number of connections ([`listen`](super::listen)).

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use http::StatusCode;
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{identity::HarnessIdentity, refusal::Refused};
use crate::{
    apart,
    policy::rule::Rule,
    room::{self, Room, Unread},
    wire,
};

/// Maximum number of concurrent calls and tunnels of one pod.
pub(super) const CALLS: usize = 128;
/// Maximum number of concurrent requests of one pod about its log. More would only wait for the log's lock.
const LOG_REQUESTS: usize = 8;
/// Maximum number of concurrent requests for approval of one pod: the undecided ones of a harness, and as many again that its agent has
/// abandoned.
const QUESTIONS: usize = 2 * crate::policy::approval::PENDING;
/// Maximum number of one pod's calls that are evaluated at a time.
const JUDGED: usize = 2;
/// Maximum bytes of bodies of one pod's forwarded requests that are in memory at a time: for short bodies, and for others. The latter has
/// room for one body of any permitted length.
const ROOM: (usize, usize) = (8 << 20, wire::LONGEST_REQUEST);
/// The same for all pods together.
const ROOM_OF_ALL: (usize, usize) = (32 << 20, 3 * wire::LONGEST_REQUEST);
/// Number of pods whose shares are remembered.
const PODS: usize = 8192;

/// The share of one pod: its bounds, and what counts against it.
pub(super) struct Share {
    /// Calls and tunnels.
    pub(super) calls: Arc<Semaphore>,
    /// Requests about the log.
    pub(super) log: Arc<Semaphore>,
    /// Requests for approval.
    pub(super) questions: Arc<Semaphore>,
    /// Evaluations of calls.
    pub(super) judged: Arc<Semaphore>,
    /// Memory for bodies.
    pub(super) room: Arc<Room>,
    /// Number of replies that repeated a credential.
    pub(super) repeated: Arc<AtomicU32>,
}

impl Share {
    /// Returns whether the share must be kept: it is in use, or it counts against the pod.
    fn matters(&self) -> bool {
        let semaphores = [&self.calls, &self.log, &self.questions, &self.judged];
        // The holder of a permit holds its semaphore, too.
        semaphores.into_iter().any(|of| Arc::strong_count(of) > 1)
            || Arc::strong_count(&self.repeated) > 1
            || Arc::strong_count(&self.room) > 1
            || self.repeated.load(Ordering::Relaxed) > 0
    }
}

/// The quotas of all pods.
pub(super) struct PodQuotas {
    shares: Mutex<HashMap<String, Share>>,
    room: Room,
}

impl PodQuotas {
    /// Returns quotas that no pod has used.
    pub(super) fn new() -> Self {
        Self { shares: Mutex::default(), room: Room::new(ROOM_OF_ALL.0, ROOM_OF_ALL.1) }
    }

    /// Takes a permit from the pod's share.
    pub(super) fn permit(
        &self,
        principal: &HarnessIdentity,
        of: fn(&Share) -> &Arc<Semaphore>,
    ) -> Result<OwnedSemaphorePermit, Refused> {
        self.of(principal, of).try_acquire_owned().map_err(|_| Refused {
            status: StatusCode::TOO_MANY_REQUESTS,
            rule: Rule::Busy,
            reason: "the pod has as many requests under way as it may; wait for one of them to end".to_owned(),
        })
    }

    /// Returns one of the bounds of a pod.
    pub(super) fn of<T>(&self, principal: &HarnessIdentity, of: fn(&Share) -> &Arc<T>) -> Arc<T> {
        let mut shares = self.shares.lock();
        if shares.len() >= PODS {
            shares.retain(|_, share| share.matters());
        }
        let share = shares.entry(principal.pod_uid.clone()).or_insert_with(|| Share {
            calls: Arc::new(Semaphore::new(CALLS)),
            log: Arc::new(Semaphore::new(LOG_REQUESTS)),
            questions: Arc::new(Semaphore::new(QUESTIONS)),
            judged: Arc::new(Semaphore::new(JUDGED)),
            room: Arc::new(Room::new(ROOM.0, ROOM.1)),
            repeated: Arc::default(),
        });
        of(share).clone()
    }

    /// Runs work for a pod on a thread of its own, when the pod's turn comes.
    pub(super) async fn apart<T: Send + 'static>(
        &self,
        principal: &HarnessIdentity,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Refused> {
        let places = self.of(principal, |share| &share.judged);
        apart::judge(&places, apart::LONGEST, work)
            .await
            .map_err(|unjudged| Refused::retry(Rule::Busy, unjudged.to_string()))
    }

    /// Waits for room for a body, in the pod's share and in the room of all pods, for up to `wait`.
    pub(super) async fn places(
        &self,
        principal: &HarnessIdentity,
        body: &Incoming,
        most: usize,
        wait: Duration,
    ) -> Result<(room::Place, room::Place), Refused> {
        let own = self.of(principal, |share| &share.room);
        let both = async {
            let own = own.place(body, most).await?;
            Ok::<_, Unread>((own, self.room.place(body, most).await?))
        };
        match tokio::time::timeout(wait, both).await {
            Ok(places) => places.map_err(|unread| Refused::malformed(unread.to_string())),
            Err(_) => Err(Refused::retry(
                Rule::Busy,
                "there is no memory for a body of this length now: others are in progress",
            )),
        }
    }
}
