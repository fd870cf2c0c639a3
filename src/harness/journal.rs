//! Records, in order, batched into segments and sent to the witness.
//!
//! Promises: budgets and records change under one lock, so that a record's counters are those of its place in the log;
//! [`Journal::stored`] returns only when the record lies in the evidence store, [`Journal::spooled`] when it is in the spool and on
//! its way to the witness, without whom no call passes the gateway: for a tool's read and a model's call that is enough as long as the store is
//! not far behind; no record is dropped. When the store is slow the callers wait. A log that cannot go on, because the witness refuses it for good or
//! a record has no form, stays so: [`Journal::failed`] returns, and every later record, and every wait for one, is refused with the first reason.
//!
//! ```text
//! record ─▶ queue ─▶ cut, sign, spool ─▶ witnessed ─▶ stored ─▶ let go
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
    link::{CallError, Link},
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

/// Records in one segment at most: what a witness checks in a few milliseconds.
const BATCH: usize = 256;
/// How long the store may take over a record before reads and model calls wait for it as well.
const BEHIND: Duration = Duration::from_secs(5);
/// How long a record that nobody waits for waits for others: a read's outcome goes with the next intent.
const CUT_LINGER: Duration = Duration::from_millis(20);
/// How long it takes until records that nobody waits for are asked to be stored.
const LINGER: Duration = Duration::from_millis(100);
/// Records that may wait for the store. Beyond it callers wait with them.
const BACKLOG: u64 = 2_048;
/// How long a call waits for its intent to be stored before it is denied.
const STORE_PATIENCE: Duration = Duration::from_secs(60);
/// How long a record may wait for the store until the task is parked: longer than a call waits.
pub const PARK: Duration = Duration::from_secs(120);
/// Between two tries to keep a segment for which there is no room.
const ROOM: Duration = Duration::from_secs(1);
/// Pauses between two tries to send segments: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Whoever takes segments: the gateway, at the other end of a [`Link`].
pub trait Witness: Send + Sync {
    /// Takes a segment, or says again that it has it.
    fn append<'a>(&'a self, request: &'a AppendRequest) -> BoxFuture<'a, Result<AppendReply, CallError>>;
}

impl Witness for Link {
    fn append<'a>(&'a self, request: &'a AppendRequest) -> BoxFuture<'a, Result<AppendReply, CallError>> {
        Link::append(self, request).boxed()
    }
}

/// What a journal starts from.
pub struct Start {
    /// The attempt.
    pub attempt: i64,
    /// The log so far.
    pub tree: Tree,
    /// The attempt's key.
    pub signer: Signer,
    /// The log's origin line.
    pub origin: String,
    /// The state of the task so far.
    pub state: TaskState,
    /// Where segments are until they are stored.
    pub spool: Spool,
    /// Whoever follows what is recorded, as it is.
    pub follow: Follow,
}

/// Is given each record as it is written, after its documents; it counts only once it is stored.
pub type Follow = Box<dyn Fn(&Record, &Encoded) + Send + Sync>;

/// Whoever follows the pod's log sees the records there: a line each, on standard output.
pub fn on_stdout() -> Follow {
    Box::new(|_, entry| {
        let line = |text: &Vec<u8>| [text.as_slice(), b"\n"].concat();
        let shown: Vec<u8> = entry.documents.iter().chain([&entry.record]).flat_map(line).collect();
        // Records are put in order meanwhile: nobody waits for who reads them.
        crate::output::stdout().say(shown);
    })
}

/// The log of this attempt.
pub struct Journal {
    attempt: i64,
    state: Mutex<State>,
    work: Notify,
    /// Records that somebody waits for to be spooled.
    wanted: AtomicU64,
    /// Records that somebody waits for to be stored.
    wanted_stored: AtomicU64,
    progress: watch::Sender<Progress>,
    /// Why the log cannot go on: [`Progress::failed`], for those who hold the lock, under which nobody asks for `progress`.
    failed: OnceLock<Denial>,
    /// A call was denied because its record was not stored in time.
    kept_waiting: AtomicBool,
    follow: Follow,
}

struct State {
    next: u64,
    queue: Vec<Encoded>,
    /// When the first in the queue was put there.
    since: Instant,
    task: TaskState,
}

#[derive(Clone, Debug, Default)]
struct Progress {
    /// Records that are in the spool or stored.
    spooled: u64,
    /// Since when the oldest of those that are not stored waits.
    behind: Option<Instant>,
    /// Records that lie in the store.
    stored: u64,
    /// Why no more will.
    failed: Option<Denial>,
}

impl Journal {
    /// Starts the task that stores segments.
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
        let outbox = Outbox { attempt, tree, signer, origin, spool, cut: None, units: VecDeque::new(), sent: 0 };
        tokio::spawn(journal.clone().send(outbox, witness));
        journal
    }

    /// Appends what `event` makes of the next sequence number and the task's state. If it makes a denial, or the record breaks a
    /// [rule](crate::evidence::state::rule) of the log, nothing is appended and nothing has changed.
    ///
    /// # Errors
    /// The closure's denial, that of the rule, or [`Rule::Evidence`] once the log cannot go on. A record of what has happened already that
    /// cannot be written is such an end: what happened is in no log.
    pub fn record(&self, event: impl FnOnce(u64, &TaskState) -> Result<Event, Denial>) -> Result<u64, Denial> {
        let mut state = self.lock();
        // Under the lock, so that nothing is put in order after what ended the log.
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
            // Whoever is told by `progress` may ask for the lock.
            drop(state);
            Err(self.fail(Denial { rule: Rule::Evidence, reason: format!("record {seq} cannot be written: {why}") }))
        };
        if let Some(Violation { rule, message }) = state.task.check(&record).into_iter().next() {
            return match rule {
                // The log has ended in order: what comes later is in none, and a call without an outcome stays unknown.
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
        // Whoever waits for a record says so, and needs no other call; the first has a time by which it goes.
        let tell = state.queue.len() == 1 || state.queue.len() >= BATCH;
        drop(state);
        if tell {
            self.work.notify_one();
        }
        Ok(seq)
    }

    /// Waits until a record lies in the evidence store.
    ///
    /// # Errors
    /// [`Rule::Evidence`] if that takes too long or cannot be any more.
    pub async fn stored(&self, seq: u64) -> Result<(), Denial> {
        self.want(seq.saturating_add(1));
        let mut progress = self.progress.subscribe();
        let waiting = progress.wait_for(|progress| progress.stored > seq || progress.failed.is_some());
        match tokio::time::timeout(STORE_PATIENCE, waiting).await {
            // By a record that is stored a call may leave, though what comes after it never will be: but not from a log that has failed.
            Ok(Ok(progress)) => progress.failed.clone().map_or(Ok(()), Err),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(self.slow()),
        }
    }

    /// Waits until a record is in the spool and on its way to the witness: enough for a call that reads or asks a model, which the gateway lets pass once
    /// the witness holds its intent. Where the store is [`BEHIND`], until it lies there.
    ///
    /// # Errors
    /// See [`Journal::stored`].
    pub async fn spooled(&self, seq: u64) -> Result<(), Denial> {
        self.soon(seq);
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

    /// Has a record spooled at once: it does not wait for others.
    pub fn soon(&self, seq: u64) {
        if self.wanted.fetch_max(seq.saturating_add(1), Ordering::Relaxed) <= seq {
            self.work.notify_one();
        }
    }

    /// Waits until everything that has been recorded so far lies in the evidence store.
    ///
    /// # Errors
    /// See [`Journal::stored`].
    pub async fn caught_up(&self) -> Result<(), Denial> {
        let last = self.lock().next.checked_sub(1);
        match last {
            Some(last) => self.stored(last).await,
            None => Ok(()),
        }
    }

    /// Has so many records stored as soon as that can be.
    fn want(&self, size: u64) {
        self.wanted.fetch_max(size, Ordering::Relaxed);
        if self.wanted_stored.fetch_max(size, Ordering::Relaxed) < size {
            self.work.notify_one();
        }
    }

    /// Waits until few enough records wait for the store.
    pub async fn room(&self) {
        let mut progress = self.progress.subscribe();
        let waiting = |progress: &Progress| self.lock().next.saturating_sub(progress.stored);
        if waiting(&progress.borrow()) > BACKLOG / 2 {
            self.want(self.lock().next);
        }
        let fits = |progress: &Progress| progress.failed.is_some() || waiting(progress) < BACKLOG;
        let _ = progress.wait_for(fits).await;
    }

    /// Returns once a record has waited for the store for [`PARK`].
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

    /// Returns, with the reason, once the log cannot go on.
    pub async fn failed(&self) -> Denial {
        let mut progress = self.progress.subscribe();
        let failed = progress.wait_for(|progress| progress.failed.is_some()).await;
        failed.ok().and_then(|progress| progress.failed.clone()).unwrap_or_else(gone)
    }

    /// Why the log cannot go on, if so.
    pub fn failure(&self) -> Option<Denial> {
        self.failed.get().cloned()
    }

    /// Whether a call was denied because its record was not stored in time.
    pub fn has_kept_waiting(&self) -> bool {
        self.kept_waiting.load(Ordering::Relaxed)
    }

    /// The denial of a call whose record was not stored in time.
    fn slow(&self) -> Denial {
        self.kept_waiting.store(true, Ordering::Relaxed);
        let reason = format!("the record was not stored within {STORE_PATIENCE:?}; nothing leaves unrecorded");
        Denial { rule: Rule::Evidence, reason }
    }

    /// What the log says now of the task.
    pub fn look<T>(&self, look: impl FnOnce(&TaskState) -> T) -> T {
        look(&self.lock().task)
    }

    /// Whether the budget takes calls at all.
    ///
    /// # Errors
    /// See [`Budget::open`].
    pub fn open(&self) -> Result<(), Exhausted> {
        self.lock().task.budget().open()
    }

    /// What is not spent, for a model of this price. Some of it may be held for calls under way.
    pub fn left<'p>(&self, price: Option<&'p ModelPrice>) -> Left<'p> {
        let budget = self.lock().task.budget();
        Left { tokens: budget.tokens_unspent(), cost: budget.cost_unspent().zip(price) }
    }

    /// Whether so much can be reserved for a model call.
    pub fn fits(&self, asked: Spent) -> Fits {
        self.lock().task.budget().fits(asked)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere cannot leave the counters half changed: every change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next records, at most [`BATCH`], if somebody waits for one of them or they have waited long enough; else by when they have.
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

    /// Has the witness hold segment after segment, and asks beside that for what is held to be stored. The same bytes are sent again and
    /// again until it has them or refuses them: appending twice is appending once.
    async fn send(self: Arc<Self>, mut outbox: Outbox, witness: Arc<dyn Witness>) {
        let (first, longest) = PAUSES;
        let mut pause = first;
        let (mut holding, mut storing): (Sending, Sending) = (Fuse::terminated(), Fuse::terminated());
        loop {
            // By when there is something to do at the latest.
            let mut due: Option<Instant> = None;
            if outbox.sent == outbox.units.len() && outbox.cut.is_none() {
                match self.take() {
                    Ok(records) => {
                        if let Err(denial) = outbox.cut(records) {
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
                if wanted || oldest.cut.elapsed() >= LINGER {
                    storing = newest.send(Until::Stored, &witness);
                } else {
                    let linger = oldest.cut + LINGER;
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
                    // Whoever answers next may not have what was held.
                    (holding, storing) = (Fuse::terminated(), Fuse::terminated());
                    outbox.sent = 0;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(longest);
                }
            }
        }
    }

    /// Ends the log. The first reason stays, and is given back.
    fn fail(&self, denial: Denial) -> Denial {
        tracing::error!(rule = %denial.rule, reason = denial.reason, "the log cannot go on");
        let first = self.failed.get_or_init(|| denial).clone();
        self.progress.send_modify(|progress| progress.failed = Some(first.clone()));
        // Whoever sends has nothing to send any more.
        self.work.notify_one();
        first
    }
}

/// A segment on its way to the witness.
type Sending = Fuse<BoxFuture<'static, Result<AppendReply, CallError>>>;

/// Segments that are not stored yet.
struct Outbox {
    attempt: i64,
    tree: Tree,
    signer: Signer,
    origin: String,
    spool: Spool,
    /// A segment that is not in the spool yet, and the log after it.
    cut: Option<(Unit, Tree)>,
    /// In order.
    units: VecDeque<Unit>,
    /// How many of them the witness holds.
    sent: usize,
}

/// One of them.
struct Unit {
    request: AppendRequest,
    end: u64,
    cut: Instant,
}

impl Unit {
    fn send(&self, until: Until, witness: &Arc<dyn Witness>) -> Sending {
        let (request, witness) = (AppendRequest { until, ..self.request.clone() }, witness.clone());
        async move { witness.append(&request).await }.boxed().fuse()
    }
}

impl Outbox {
    /// Makes a segment of these records, signed, to be kept.
    fn cut(&mut self, entries: Vec<Encoded>) -> Result<(), Denial> {
        let lost = |reason: String| Denial { rule: Rule::Evidence, reason };
        let (first, mut tree) = (self.tree.size(), self.tree.clone());
        entries.iter().for_each(|entry| tree.push(leaf_hash(&entry.record)));
        let checkpoint = Checkpoint { origin: self.origin.clone(), size: tree.size(), root: tree.root() };
        let segment = Segment::new(Note::sign(&checkpoint, &self.signer), first, entries);
        let segment =
            String::from_utf8(segment.to_bytes()).map_err(|e| lost(format!("a segment is not UTF-8: {e}")))?;
        let request = AppendRequest { attempt: self.attempt, first, segment, until: Until::default() };
        self.cut = Some((Unit { request, end: tree.size(), cut: Instant::now() }, tree));
        Ok(())
    }

    /// Keeps the segment that was cut, if there is one; says so. Where there is no room, those that are stored make some.
    fn keep(&mut self) -> std::io::Result<bool> {
        let Some((unit, tree)) = self.cut.take() else { return Ok(false) };
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
            Err(_) => self.cut = Some((unit, tree)),
        }
        kept.map(|()| true)
    }

    /// The oldest and the newest of those that the witness holds.
    fn held(&self) -> Option<(&Unit, &Unit)> {
        self.units.front().zip(self.sent.checked_sub(1).and_then(|last| self.units.get(last)))
    }

    /// The store has the log up to this size.
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
        progress.behind = oldest.map(|unit| unit.cut);
        progress.stored = oldest.map_or(self.tree.size(), |unit| unit.request.first);
        progress.spooled = self.tree.size();
    }
}

/// Has segments stored that a harness before this one has left; says whether there were any.
///
/// # Errors
/// [`Rule::Evidence`] if the witness cannot be had for [`STORE_PATIENCE`]; another rule if it refuses them: what has happened is in no log.
pub async fn send_left(link: &Link, attempt: i64, left: impl Iterator<Item = Segment>) -> Result<bool, Denial> {
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

/// The name of a call: unique in the log, as sequence numbers are.
pub fn call_id(intent: u64) -> String {
    format!("c{intent}")
}

fn gone() -> Denial {
    Denial { rule: Rule::Evidence, reason: "the log has ended".into() }
}

#[cfg(test)]
mod tests;
