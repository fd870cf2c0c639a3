//! The log of an attempt: records in order, batched into segments and sent to the witness.
//!
//! Guarantees: budgets and records change under one lock, so that a record's counters are those of its place in the log.
//! [`Journal::stored`] returns only when the record is in the evidence bucket. [`Journal::spooled`] returns when the record is in the spool
//! and on its way to the witness. The gateway lets no call through that the witness does not have, so this is enough for a tool read and a
//! model call while the bucket is not far behind. No record is dropped: callers wait when the bucket is slow. A log that fails, because the
//! witness rejects it for good or a record cannot be written, stays failed: [`Journal::failed`] returns, and every later record and every
//! wait for one gets the first reason.
//!
//! ```text
//! record ─▶ queue ─▶ cut, sign, spool ─▶ witnessed ─▶ stored ─▶ removed
//!                            ▲              │ fails     │ fails
//!                            └── again ◀────┴───────────┘
//! ```

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{
    FutureExt,
    future::{BoxFuture, Fuse, FusedFuture},
};
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
        merkle::{Tree, leaf_hash},
        note::{Checkpoint, Note, Signer},
        record::{Actor, Encoded, Event, Record, VERSION},
        segment::Segment,
        state::{LogRule, TaskState, Violation},
    },
    policy::{
        budget::{Exhausted, Fits, Spent},
        config::ModelPrice,
        decide::Denial,
        model::request::Left,
        rule::Rule,
    },
    wire::{AppendReply, AppendRequest, Until},
};

/// The maximum number of records in one segment. A witness checks that many in a few milliseconds.
const BATCH: usize = 256;
/// How far the bucket may be behind before tool reads and model calls wait for it, too.
const BEHIND: Duration = Duration::from_secs(5);
/// How long a record that no caller waits for may wait for others. A read's outcome goes into one segment with the next intent.
const CUT_LINGER: Duration = Duration::from_millis(20);
/// How long it takes until the witness is asked to store records that no caller waits for.
const LINGER: Duration = Duration::from_millis(100);
/// The number of records that may wait for the bucket. Beyond it, callers wait as well.
const BACKLOG: u64 = 2_048;
/// How long a call waits for its intent to be stored before it is denied.
const STORE_PATIENCE: Duration = Duration::from_secs(60);
/// How long a record may wait for the bucket until the task is parked. It is longer than a call waits.
pub const PARK: Duration = Duration::from_secs(120);
/// The pause before a segment that did not fit into the spool is written again.
const ROOM: Duration = Duration::from_secs(1);
/// The pauses before segments are sent again: the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

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
        let outbox = Outbox { attempt, tree, signer, origin, spool, unspooled: None, units: VecDeque::new(), sent: 0 };
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
        let reason = format!("the record was not stored within {STORE_PATIENCE:?}; nothing leaves unrecorded");
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
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Sends segment after segment to the witness and, at the same time, asks it to store the segments that it has. Sends the same bytes
    /// again until the witness has them or rejects them, because appending twice is appending once.
    async fn send(self: Arc<Self>, mut outbox: Outbox, witness: Arc<dyn Witness>) {
        let (first, longest) = PAUSES;
        let mut pause = first;
        let (mut holding, mut storing): (Sending, Sending) = (Fuse::terminated(), Fuse::terminated());
        loop {
            // The time at which the loop must run again, if any.
            let mut due: Option<Instant> = None;
            if outbox.sent == outbox.units.len() && outbox.unspooled.is_none() {
                match self.take() {
                    Ok(records) => {
                        if let Err(denial) = outbox.seal_segment(records) {
                            self.fail(denial);
                            return;
                        }
                    }
                    Err(linger) => due = linger,
                }
            }
            match outbox.keep() {
                Ok(false) => {}
                Ok(true) => self.progress.send_modify(|progress| outbox.tell(progress)),
                Err(error) => {
                    tracing::warn!(%error, "the spool cannot be written; nothing leaves until it can");
                    due = Some(Instant::now() + ROOM);
                }
            }
            if holding.is_terminated()
                && let Some(unit) = outbox.units.get(outbox.sent)
            {
                holding = unit.send(Until::Witnessed, &witness);
            }
            if storing.is_terminated()
                && let Some((oldest, newest)) = outbox.held()
            {
                let wanted = self.wanted_stored.load(Ordering::Relaxed) > oldest.request.first;
                if wanted || oldest.sealed_at.elapsed() >= LINGER {
                    storing = newest.send(Until::Stored, &witness);
                } else {
                    let linger = oldest.sealed_at + LINGER;
                    due = Some(due.map_or(linger, |due| due.min(linger)));
                }
            }
            let lingered = async {
                match due {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            let sent = tokio::select! {
                sent = &mut holding => sent.map(|_| outbox.sent += 1),
                sent = &mut storing => sent.map(|reply| outbox.stored(reply.size)),
                () = self.work.notified() => continue,
                () = lingered => continue,
            };
            match sent {
                Ok(()) => {
                    pause = first;
                    self.progress.send_modify(|progress| outbox.tell(progress));
                }
                Err(CallError::Refused(denial)) if denial.rule != Rule::Evidence => {
                    self.fail(Denial {
                        rule: Rule::Evidence,
                        reason: format!("the witness refused the log: {}: {}", denial.rule, denial.reason),
                    });
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "the log is not stored yet");
                    // The replica that replies next may not have the segments that this one had.
                    (holding, storing) = (Fuse::terminated(), Fuse::terminated());
                    outbox.sent = 0;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(longest);
                }
            }
        }
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

/// A segment that is being sent to the witness.
type Sending = Fuse<BoxFuture<'static, Result<AppendReply, CallError>>>;

/// Segments that are not stored yet.
struct Outbox {
    attempt: i64,
    tree: Tree,
    signer: Signer,
    origin: String,
    spool: Spool,
    /// A segment that is not in the spool yet, and the tree after it.
    unspooled: Option<(PendingSegment, Tree)>,
    /// The segments in the spool, in order.
    units: VecDeque<PendingSegment>,
    /// The number of these segments that the witness has.
    sent: usize,
}

/// A segment in the outbox.
struct PendingSegment {
    request: AppendRequest,
    end: u64,
    sealed_at: Instant,
}

impl PendingSegment {
    fn send(&self, until: Until, witness: &Arc<dyn Witness>) -> Sending {
        let (request, witness) = (AppendRequest { until, ..self.request.clone() }, witness.clone());
        async move { witness.append(&request).await }.boxed().fuse()
    }
}

impl Outbox {
    /// Cuts a signed segment from these records. It must be spooled next.
    fn seal_segment(&mut self, entries: Vec<Encoded>) -> Result<(), Denial> {
        let lost = |reason: String| Denial { rule: Rule::Evidence, reason };
        let (first, mut tree) = (self.tree.size(), self.tree.clone());
        entries.iter().for_each(|entry| tree.push(leaf_hash(&entry.record)));
        let checkpoint = Checkpoint { origin: self.origin.clone(), size: tree.size(), root: tree.root() };
        let segment = Segment::new(Note::sign(&checkpoint, &self.signer), first, entries);
        let segment =
            String::from_utf8(segment.to_bytes()).map_err(|e| lost(format!("a segment is not UTF-8: {e}")))?;
        let request = AppendRequest { attempt: self.attempt, first, segment, until: Until::default() };
        self.unspooled = Some((PendingSegment { request, end: tree.size(), sealed_at: Instant::now() }, tree));
        Ok(())
    }

    /// Writes the cut segment to the spool, if there is one, and returns whether there was one. If there is no room, removes stored
    /// segments first.
    fn keep(&mut self) -> std::io::Result<bool> {
        let Some((unit, tree)) = self.unspooled.take() else { return Ok(false) };
        let text = unit.request.segment.as_bytes();
        let kept = self.spool.keep(text).or_else(|_| {
            self.spool.make_room(self.units.iter().map(|unit| unit.request.segment.as_bytes()))?;
            self.spool.keep(text)
        });
        match kept {
            Ok(()) => {
                self.tree = tree;
                self.units.push_back(unit);
            }
            Err(_) => self.unspooled = Some((unit, tree)),
        }
        kept.map(|()| true)
    }

    /// Returns the oldest and the newest segment that the witness has.
    fn held(&self) -> Option<(&PendingSegment, &PendingSegment)> {
        self.units.front().zip(self.sent.checked_sub(1).and_then(|last| self.units.get(last)))
    }

    /// Removes the segments up to this size, because the bucket has them.
    fn stored(&mut self, size: u64) {
        while self.units.front().is_some_and(|unit| unit.end <= size) {
            self.units.pop_front();
            self.sent = self.sent.saturating_sub(1);
        }
        if let Err(error) = self.spool.forget(self.units.iter().map(|unit| unit.request.segment.as_bytes())) {
            tracing::warn!(%error, "the spool cannot be cleared");
        }
    }

    fn tell(&self, progress: &mut Progress) {
        let oldest = self.units.front();
        progress.behind = oldest.map(|unit| unit.sealed_at);
        progress.stored = oldest.map_or(self.tree.size(), |unit| unit.request.first);
        progress.spooled = self.tree.size();
    }
}

/// Stores the segments that an earlier harness has left. Returns whether there were any.
///
/// # Errors
/// Returns [`Rule::Evidence`] if the witness cannot be reached for [`STORE_PATIENCE`], and another rule if it rejects them. In the second
/// case, what has happened is in no log.
pub async fn send_left(
    link: &GatewayClient,
    attempt: i64,
    left: impl Iterator<Item = Segment>,
) -> Result<bool, Denial> {
    let lost = |reason: String| Denial { rule: Rule::Evidence, reason };
    let started = Instant::now();
    let mut any = false;
    for segment in left {
        let text = String::from_utf8(segment.to_bytes()).map_err(|e| lost(e.to_string()))?;
        let request = AppendRequest { attempt, first: segment.first, segment: text, until: Until::Stored };
        let (mut pause, longest) = PAUSES;
        any = true;
        tracing::info!(first = segment.first, end = segment.end(), "storing what was left");
        while let Err(error) = link.append(&request).await {
            match error {
                CallError::Refused(denial) if denial.rule != Rule::Evidence => {
                    tracing::error!(rule = %denial.rule, reason = denial.reason, "what was left is refused");
                    return Err(denial);
                }
                error if started.elapsed() > STORE_PATIENCE => return Err(lost(error.to_string())),
                error => tracing::warn!(%error, "what was left is not stored yet"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }
    Ok(any)
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
