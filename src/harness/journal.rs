//! The log of an attempt: records in order, batched into segments and sent to the witness.
//!
//! Guarantees: budgets and records change under one lock, so that a record's counters are those of its place in the log.
//! [`Journal::stored`] returns only when the record is in the evidence bucket. [`Journal::spooled`] returns when the record is in the spool
//! and on its way to the witness. The gateway lets no call through that the witness does not have, so this is enough for a tool read and a
//! model call while the bucket is not far behind. No record is dropped: callers wait when the bucket is slow. A log that fails, because the
//! witness rejects it for good or a record cannot be written, stays failed: [`Journal::failed`] returns, and every later record and every
//! wait for one gets the first reason.
//!
//! Non-goals: the content of records, and the rules of the log, which are in [`state`](crate::evidence::state).
//!
//! ```text
//! record ─▶ queue ─▶ cut, sign, spool ─▶ witnessed ─▶ stored ─▶ removed
//!                            ▲              │ fails     │ fails
//!                            └── again ◀────┴───────────┘
//! ```

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt, future::BoxFuture};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{
    clock,
    gateway_client::{CallError, GatewayClient},
    spool::Spool,
};
use crate::{
    evidence::{
        merkle::Tree,
        note::Signer,
        record::{Actor, Encoded, Event, Record, VERSION},
        state::{LogRule, TaskState, Violation},
    },
    policy::{
        budget::{Exhausted, Fits, Spent},
        config::ModelPrice,
        decide::Denial,
        model::request::Left,
        rule::Rule,
    },
    wire::{AppendReply, AppendRequest},
};

mod outbox;

use outbox::Outbox;
pub use outbox::send_left;

/// The maximum number of records in one segment. A witness checks that many in a few milliseconds.
const BATCH: usize = 256;
/// How far the bucket may be behind before tool reads and model calls wait for it, too.
const BEHIND: Duration = Duration::from_secs(5);
/// How long a record that no caller waits for may wait for others. A read's outcome goes into one segment with the next intent.
const CUT_LINGER: Duration = Duration::from_millis(20);
/// The number of records that may wait for the bucket. Beyond it, callers wait as well.
const BACKLOG: u64 = 2_048;
/// How long a call waits for its intent to be stored before it is denied.
const STORE_PATIENCE: Duration = Duration::from_secs(60);
/// How long a record may wait for the bucket until the task is parked. It is longer than a call waits.
pub const PARK: Duration = Duration::from_secs(120);

/// A receiver of segments: the gateway, at the other end of a [`GatewayClient`].
pub trait Witness: Send + Sync {
    /// Appends a segment. Appending the same segment again returns the same reply.
    fn append<'a>(&'a self, request: &'a AppendRequest) -> BoxFuture<'a, Result<AppendReply, CallError>>;
}

impl Witness for GatewayClient {
    fn append<'a>(&'a self, request: &'a AppendRequest) -> BoxFuture<'a, Result<AppendReply, CallError>> {
        GatewayClient::append(self, request).boxed()
    }
}

/// The inputs of a journal.
pub struct Start {
    /// The number of the attempt.
    pub attempt: i64,
    /// The log so far.
    pub tree: Tree,
    /// The attempt's key.
    pub signer: Signer,
    /// The log's origin line.
    pub origin: String,
    /// The state of the task so far.
    pub state: TaskState,
    /// The spool, which holds segments until they are stored.
    pub spool: Spool,
    /// The function that gets each record as it is written.
    pub follow: Follow,
}

/// A function that gets each record as it is written, with its documents. The record counts only once it is stored.
pub type Follow = Box<dyn Fn(&Record, &Encoded) + Send + Sync>;

/// Returns a function that writes each record and its documents to standard output, one line each, so that the pod's log shows them.
pub fn on_stdout() -> Follow {
    Box::new(|_, entry| {
        let line = |text: &Vec<u8>| [text.as_slice(), b"\n"].concat();
        let shown: Vec<u8> = entry.documents.iter().chain([&entry.record]).flat_map(line).collect();
        // Records are being put in order meanwhile, so this must not wait for a reader.
        crate::output::stdout().say(shown);
    })
}

/// The log of this attempt.
pub struct Journal {
    attempt: i64,
    state: Mutex<State>,
    work: Notify,
    /// The number of records that must be spooled because a caller waits for them.
    wanted: AtomicU64,
    /// The number of records that must be stored because a caller waits for them.
    wanted_stored: AtomicU64,
    progress: watch::Sender<Progress>,
    /// Why the log failed. The same as [`Progress::failed`], for callers that hold the lock, under which `progress` must not be used.
    failed: OnceLock<Denial>,
    /// Whether a call was denied because its record was not stored in time.
    kept_waiting: AtomicBool,
    follow: Follow,
}

struct State {
    next: u64,
    queue: Vec<Encoded>,
    /// When the first record of the queue was put there.
    since: Instant,
    task: TaskState,
}

#[derive(Clone, Debug, Default)]
struct Progress {
    /// The number of records that are in the spool or stored.
    spooled: u64,
    /// When the oldest segment that is not stored was cut.
    behind: Option<Instant>,
    /// The number of records that are in the bucket.
    stored: u64,
    /// Why no more records will be stored.
    failed: Option<Denial>,
}

impl Journal {
    /// Starts the background task that sends segments.
    pub fn start(start: Start, witness: Arc<dyn Witness>) -> Arc<Self> {
        let size = start.tree.size();
        let journal = Arc::new(Self {
            attempt: start.attempt,
            state: Mutex::new(State { next: size, queue: Vec::new(), since: Instant::now(), task: start.state }),
            work: Notify::new(),
            wanted: AtomicU64::new(0),
            wanted_stored: AtomicU64::new(0),
            progress: watch::Sender::new(Progress { spooled: size, behind: None, stored: size, failed: None }),
            failed: OnceLock::new(),
            kept_waiting: AtomicBool::new(false),
            follow: start.follow,
        });
        let Start { attempt, tree, signer, origin, spool, .. } = start;
        let outbox = Outbox::new(attempt, tree, (signer, origin), spool);
        tokio::spawn(journal.clone().send(outbox, witness));
        journal
    }

    /// Appends the record that `event` returns for the next sequence number and the task's state. If `event` returns a denial, or the
    /// record breaks a [rule](crate::evidence::state::rule) of the log, nothing is appended and nothing has changed.
    ///
    /// # Errors
    /// Returns the closure's denial, the denial of the broken rule, or [`Rule::Evidence`] if the log has failed. A record of something that
    /// has already happened and cannot be written makes the log fail, because what happened is in no log.
    pub fn record(&self, event: impl FnOnce(u64, &TaskState) -> Result<Event, Denial>) -> Result<u64, Denial> {
        let mut state = self.lock();
        // This check is under the lock, so that no record follows the failure.
        if let Some(denial) = self.failure() {
            return Err(denial);
        }
        let seq = state.next;
        let event = event(seq, &state.task)?;
        let record = Record {
            v: VERSION,
            seq,
            time: format!("{:.3}", clock::now()),
            attempt: self.attempt,
            actor: Actor::Harness,
            usage: state.task.usage_after(&event),
            event,
        };
        let unwritable = |state: MutexGuard<'_, State>, why: &dyn std::fmt::Display| {
            // Watchers of `progress` may take the lock.
            drop(state);
            Err(self.fail(Denial { rule: Rule::Evidence, reason: format!("record {seq} cannot be written: {why}") }))
        };
        if let Some(Violation { rule, message }) = state.task.check(&record).into_iter().next() {
            return match rule {
                // The log has its last record. What comes later is in no log, and a call without an outcome stays unknown.
                LogRule::AttemptOpen => Err(Denial { rule: Rule::TaskClosed, reason: message }),
                _ if record.event.is_of_the_past() => unwritable(state, &format_args!("{rule}: {message}")),
                _ => Err(Denial { rule: rule.denial(), reason: message }),
            };
        }
        let entry = match record.encode() {
            Ok(entry) => entry,
            Err(error) => return unwritable(state, &error),
        };
        state.task.apply(&record);
        (self.follow)(&record, &entry);
        if state.queue.is_empty() {
            state.since = Instant::now();
        }
        state.queue.push(entry);
        state.next = seq.saturating_add(1);
        // Callers that wait for a record notify the task themselves. The first record of the queue starts the timer.
        let tell = state.queue.len() == 1 || state.queue.len() >= BATCH;
        drop(state);
        if tell {
            self.work.notify_one();
        }
        Ok(seq)
    }

    /// Waits until a record is in the evidence bucket.
    ///
    /// # Errors
    /// Returns [`Rule::Evidence`] if that takes too long or the log has failed.
    pub async fn stored(&self, seq: u64) -> Result<(), Denial> {
        self.want(seq.saturating_add(1));
        let mut progress = self.progress.subscribe();
        let waiting = progress.wait_for(|progress| progress.stored > seq || progress.failed.is_some());
        match tokio::time::timeout(STORE_PATIENCE, waiting).await {
            // A call may leave when its record is stored, even if later records never will be, but not when the log has failed.
            Ok(Ok(progress)) => progress.failed.clone().map_or(Ok(()), Err),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(self.slow()),
        }
    }

    /// Waits until a record is in the spool and on its way to the witness. That is enough for a tool read or a model call, because the
    /// gateway lets it through only once the witness has its intent. If the bucket is [`BEHIND`], waits until the record is stored.
    ///
    /// # Errors
    /// Returns the errors of [`Journal::stored`].
    pub async fn spooled(&self, seq: u64) -> Result<(), Denial> {
        self.flush(seq);
        let mut progress = self.progress.subscribe();
        let now = Instant::now();
        let behind = |since: Instant| now.duration_since(since) > BEHIND;
        let waiting = progress.wait_for(|progress| progress.spooled > seq || progress.failed.is_some());
        let late = match tokio::time::timeout(STORE_PATIENCE, waiting).await {
            Ok(Ok(progress)) if progress.failed.is_none() => progress.behind.is_some_and(behind),
            Ok(_) => true,
            Err(_) => return Err(self.slow()),
        };
        if late { self.stored(seq).await } else { Ok(()) }
    }

    /// Spools a record at once, without waiting for others.
    pub fn flush(&self, seq: u64) {
        if self.wanted.fetch_max(seq.saturating_add(1), Ordering::Relaxed) <= seq {
            self.work.notify_one();
        }
    }

    /// Waits until everything that has been recorded so far is in the evidence bucket.
    ///
    /// # Errors
    /// Returns the errors of [`Journal::stored`].
    pub async fn caught_up(&self) -> Result<(), Denial> {
        let last = self.lock().next.checked_sub(1);
        match last {
            Some(last) => self.stored(last).await,
            None => Ok(()),
        }
    }

    /// Stores this many records as soon as possible.
    fn want(&self, size: u64) {
        self.wanted.fetch_max(size, Ordering::Relaxed);
        if self.wanted_stored.fetch_max(size, Ordering::Relaxed) < size {
            self.work.notify_one();
        }
    }

    /// Waits until few enough records wait for the bucket.
    pub async fn wait_for_capacity(&self) {
        let mut progress = self.progress.subscribe();
        let waiting = |progress: &Progress| self.lock().next.saturating_sub(progress.stored);
        if waiting(&progress.borrow()) > BACKLOG / 2 {
            self.want(self.lock().next);
        }
        let fits = |progress: &Progress| progress.failed.is_some() || waiting(progress) < BACKLOG;
        let _ = progress.wait_for(fits).await;
    }

    /// Waits until a record has waited for the bucket for [`PARK`].
    pub async fn stalled(&self) {
        let mut progress = self.progress.subscribe();
        loop {
            let since = progress.borrow_and_update().behind;
            let due = async {
                match since {
                    Some(since) => tokio::time::sleep_until(since + PARK).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => return,
                changed = progress.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Waits until the log fails, and returns the reason.
    pub async fn failed(&self) -> Denial {
        let mut progress = self.progress.subscribe();
        let failed = progress.wait_for(|progress| progress.failed.is_some()).await;
        failed.ok().and_then(|progress| progress.failed.clone()).unwrap_or_else(gone)
    }

    /// Returns why the log has failed, if it has.
    pub fn failure(&self) -> Option<Denial> {
        self.failed.get().cloned()
    }

    /// Returns whether a call was denied because its record was not stored in time.
    pub fn has_kept_waiting(&self) -> bool {
        self.kept_waiting.load(Ordering::Relaxed)
    }

    /// Returns the denial of a call whose record was not stored in time.
    fn slow(&self) -> Denial {
        self.kept_waiting.store(true, Ordering::Relaxed);
        let reason = format!("the record was not stored within {STORE_PATIENCE:?}; no call leaves without its record");
        Denial { rule: Rule::Evidence, reason }
    }

    /// Calls `look` with the current state of the task.
    pub fn look<T>(&self, look: impl FnOnce(&TaskState) -> T) -> T {
        look(&self.lock().task)
    }

    /// Checks whether the budget allows any call.
    ///
    /// # Errors
    /// Returns the errors of [`Budget::open`].
    pub fn open(&self) -> Result<(), Exhausted> {
        self.lock().task.budget().open()
    }

    /// Returns the budget that is not spent, for a model of this price. A part of it may be reserved for calls in flight.
    pub fn left<'p>(&self, price: Option<&'p ModelPrice>) -> Left<'p> {
        let budget = self.lock().task.budget();
        Left { tokens: budget.tokens_unspent(), cost: budget.cost_unspent().zip(price) }
    }

    /// Returns whether this amount can be reserved for a model call.
    pub fn fits(&self, asked: Spent) -> Fits {
        self.lock().task.budget().fits(asked)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere cannot leave the counters half changed, because every change is one assignment.
        self.state.lock()
    }

    /// Returns the next records, at most [`BATCH`], if a caller waits for one of them or they have waited long enough. Otherwise returns
    /// the time at which they have.
    fn take(&self) -> Result<Vec<Encoded>, Option<Instant>> {
        let wanted = self.wanted.load(Ordering::Relaxed);
        let mut state = self.lock();
        let queued = u64::try_from(state.queue.len()).unwrap_or(u64::MAX);
        if queued == 0 {
            return Err(None);
        }
        let due = state.since + CUT_LINGER;
        if wanted <= state.next.saturating_sub(queued) && state.queue.len() < BATCH && Instant::now() < due {
            return Err(Some(due));
        }
        let count = state.queue.len().min(BATCH);
        Ok(state.queue.drain(..count).collect())
    }

    /// Marks the log as failed. Returns the first reason, which later failures do not replace.
    fn fail(&self, denial: Denial) -> Denial {
        tracing::error!(rule = %denial.rule, reason = denial.reason, "the log cannot go on");
        let first = self.failed.get_or_init(|| denial).clone();
        self.progress.send_modify(|progress| progress.failed = Some(first.clone()));
        // Wakes the sending task, which has nothing to send any more.
        self.work.notify_one();
        first
    }
}

/// Returns the name of a call. It is unique in the log, as sequence numbers are.
pub fn call_id(intent: u64) -> String {
    format!("c{intent}")
}

fn gone() -> Denial {
    Denial { rule: Rule::Evidence, reason: "the log has ended".into() }
}

#[cfg(test)]
mod tests;
