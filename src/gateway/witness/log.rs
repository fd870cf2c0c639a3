//! One log in memory: the records that its bucket is known to have, and the segments that are queued for the bucket.
//!
//! Guarantees: segments are stored in the order in which they were taken, several of them in one object. A segment is dropped from memory
//! only when it is in the bucket, or when the bucket has another segment in its position; waiting requests are told so. Segments that no
//! request waits for are delayed by up to [`LINGER`], so that they are stored together.
//!
//! Rejects: segments beyond [`RECORDS`], [`BYTES`] or [`SEGMENTS`] ahead of the bucket.
//!
//! ```text
//! hold ─▶ held, held, held ─▶ batch ─▶ (put) ─▶ advance
//!         ▲ newest                              ▲ stored
//! ```

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::history::History;
use crate::{evidence::segment::Segment, gateway::refusal::Refused, policy::rule::Rule};

/// Maximum number of queued records of one log: the maximum of a segment.
const RECORDS: usize = 4096;
/// Maximum number of their bytes. One segment is always accepted.
const BYTES: usize = 4 << 20;
/// Maximum number of queued segments, because a whole [`History`] is kept with each of them.
const SEGMENTS: usize = 64;
/// Number of queued segments from which on they are stored without delay.
const ENOUGH: usize = 16;
/// Maximum age of the oldest queued segment for reads and model calls to leave by queued intents.
const OLDEST: Duration = Duration::from_secs(5);

/// Maximum delay of a segment that no request waits for, such as that of a read, because each object costs time and money.
const LINGER: Duration = Duration::from_millis(250);

/// How long a call waits until its intent is taken.
const ARRIVAL: Duration = Duration::from_millis(100);

/// Maximum number of used intents in memory, before those that the log no longer knows are removed. It is more than the log knows.
pub const SENT: usize = 8192;

/// The use of one intent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    /// Number of requests that left.
    pub times: u32,
    /// Whether one request was not counted because its upstream did nothing.
    pub again: bool,
}

/// One log.
#[derive(Default)]
pub struct Log {
    /// Used intents, by sequence number.
    pub sent: Mutex<HashMap<u64, Sent>>,
    /// The writer's lock. Its holder may take a segment or look for segments of other replicas.
    pub writer: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    progress: watch::Sender<Progress>,
    /// Number of records that requests wait for to be in the bucket.
    wanted: AtomicU64,
    flush: Notify,
    /// The newest attempt whose records have lost their position.
    forked: AtomicI64,
}

#[derive(Default)]
struct State {
    stored: Option<Arc<History>>,
    /// The newest checkpoint in the bucket, cosigned.
    checkpoint: String,
    held: VecDeque<Held>,
    /// Whether a task is storing the held segments.
    storing: bool,
}

/// A queued segment, and the log after it.
struct Held {
    segment: Segment,
    after: Arc<History>,
    bytes: usize,
    since: Instant,
}

impl Held {
    fn new(segment: Segment, after: History) -> Self {
        let bytes = segment.documents.iter().chain(&segment.records).map(Vec::len).sum();
        Self { segment, after: Arc::new(after), bytes, since: Instant::now() }
    }

    fn end(&self) -> u64 {
        self.after.tree().size()
    }
}

/// The progress of a log, as waiting requests see it.
#[derive(Clone, Debug, Default)]
struct Progress {
    /// Number of records that have been taken.
    newest: u64,
    /// Number of records in the bucket.
    stored: u64,
    /// How often held segments were dropped because the bucket has another segment in their position.
    lost: u64,
    /// Number of failed attempts to store a segment, and the last failure.
    failed: (u64, Option<Refused>),
}

/// Segments that are stored as one object.
pub struct Batch {
    /// The joined segment, with the checkpoint of the last one.
    pub segment: Segment,
    /// The log after it.
    pub after: Arc<History>,
}

/// Whether a segment is queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PendingMatch {
    /// The same segment is queued.
    Same,
    /// Another segment is queued in its position.
    Other,
    /// No segment is queued in its position.
    None,
}

/// Another replica stored a different segment at this position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost;

impl Log {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Returns the log with all segments that have been taken.
    pub fn newest(&self) -> Option<Arc<History>> {
        let state = self.state();
        state.held.back().map(|held| held.after.clone()).or_else(|| state.stored.clone())
    }

    /// Returns the log as the bucket is known to have it.
    pub fn stored(&self) -> Option<Arc<History>> {
        self.state().stored.clone()
    }

    /// Returns the newest checkpoint that is known to be in the bucket.
    pub fn checkpoint(&self) -> String {
        self.state().checkpoint.clone()
    }

    /// Returns whether a segment is queued.
    pub fn among(&self, segment: &Segment) -> PendingMatch {
        let state = self.state();
        let Some(held) = state.held.iter().find(|held| held.end() > segment.first) else { return PendingMatch::None };
        let same = held.segment.note.text == segment.note.text && held.segment.records == segment.records;
        match (same, held.segment.first <= segment.first) {
            (true, _) => PendingMatch::Same,
            (false, true) => PendingMatch::Other,
            (false, false) => PendingMatch::None,
        }
    }

    /// Queues a segment, after which the log is `after`. Returns whether the caller must start storing, because no task does so.
    ///
    /// # Errors
    /// Returns [`Rule::Busy`] if too much is queued.
    pub fn enqueue(&self, segment: Segment, after: History) -> Result<bool, Refused> {
        let mut state = self.state();
        let held = Held::new(segment, after);
        let sum = |of: fn(&Held) -> usize| state.held.iter().chain([&held]).map(of).sum::<usize>();
        let (records, bytes) = (sum(|held| held.segment.records.len()), sum(|held| held.bytes));
        if !state.held.is_empty() && (records > RECORDS || bytes > BYTES || state.held.len() >= SEGMENTS) {
            let reason = "the bucket is slower than the new records: wait until it has stored some of them";
            return Err(Refused::retry(Rule::Busy, reason));
        }
        state.held.push_back(held);
        let starts = !std::mem::replace(&mut state.storing, true);
        if state.held.len() >= ENOUGH {
            self.flush.notify_one();
        }
        self.tell(&state, false);
        Ok(starts)
    }

    /// Waits a moment for a record that is not there yet, because a call may arrive before its intent.
    pub async fn arrival(&self, seq: u64) {
        let mut progress = self.progress.subscribe();
        let _ = tokio::time::timeout(ARRIVAL, progress.wait_for(|now| now.newest.max(now.stored) > seq)).await;
    }

    /// Waits until the first queued segment is due: a request waits for it, enough segments are queued, or it has waited for `LINGER`.
    pub async fn due(&self) {
        loop {
            let (since, first, count) = {
                let state = self.state();
                let Some(held) = state.held.front() else { return };
                (held.since, held.segment.first, state.held.len())
            };
            if count >= ENOUGH || self.wanted.load(Ordering::Relaxed) > first {
                return;
            }
            tokio::select! {
                () = self.flush.notified() => {}
                () = tokio::time::sleep_until(since + LINGER) => return,
            }
        }
    }

    /// Returns the next object: as many queued segments as one object may have. Returns `None` if there are none; the next [`Log::enqueue`]
    /// then tells its caller to start storing.
    pub fn batch(&self) -> Option<Batch> {
        let mut state = self.state();
        let Some(first) = state.held.front() else {
            state.storing = false;
            return None;
        };
        let mut batch = Batch { segment: first.segment.clone(), after: first.after.clone() };
        let mut bytes = first.bytes;
        for next in state.held.iter().skip(1) {
            let records = batch.segment.records.len() + next.segment.records.len();
            // An attempt's own key must be known before its first signature.
            let joins = next.after.incarnation() == batch.after.incarnation();
            bytes += next.bytes;
            if !joins || records > RECORDS || bytes > BYTES {
                break;
            }
            batch.segment.note = next.segment.note.clone();
            batch.segment.documents.extend(next.segment.documents.iter().cloned());
            batch.segment.records.extend(next.segment.records.iter().cloned());
            batch.after = next.after.clone();
        }
        Some(batch)
    }

    /// Sets the log as it was rebuilt from the bucket, unless it is known already. Returns the known log.
    pub fn begin(&self, stored: Arc<History>) -> Arc<History> {
        let mut state = self.state();
        let stored = state.stored.get_or_insert(stored).clone();
        self.tell(&state, false);
        stored
    }

    /// Records that the bucket has one more segment, after which the log is `stored`, under this checkpoint. Returns the held segments that
    /// have lost their position to it, with all later ones: calls may have left by their intents.
    pub fn advance(&self, stored: Arc<History>, by: &Segment, checkpoint: String) -> Vec<Segment> {
        let mut state = self.state();
        let size = stored.tree().size();
        if state.stored.as_ref().is_some_and(|known| known.tree().size() >= size) {
            return Vec::new();
        }
        let mut lost = Vec::new();
        while let Some(held) = state.held.front().filter(|held| held.segment.first < size) {
            if !by.holds(&held.segment) {
                self.forked.fetch_max(held.after.state().attempt(), Ordering::Relaxed);
                lost.extend(state.held.drain(..).map(|held| held.segment));
                break;
            }
            state.held.pop_front();
        }
        (state.stored, state.checkpoint) = (Some(stored), checkpoint);
        self.tell(&state, !lost.is_empty());
        lost
    }

    /// Publishes the progress. The caller holds the state's lock, so that the progress never goes backwards.
    fn tell(&self, state: &State, lost: bool) {
        let size = |head: Option<&Arc<History>>| head.map_or(0, |head| head.tree().size());
        let stored = size(state.stored.as_ref());
        self.progress.send_modify(|progress| {
            progress.stored = stored;
            progress.newest = size(state.held.back().map(|held| &held.after)).max(stored);
            progress.lost += u64::from(lost);
        });
    }

    /// Returns whether records of this attempt by which calls may have left have lost their position. No more calls of the attempt leave at
    /// this replica.
    pub fn is_forked(&self, attempt: i64) -> bool {
        attempt <= self.forked.load(Ordering::Relaxed)
    }

    /// Returns whether the queued segments are young enough for reads and model calls to leave by them.
    pub fn is_fresh(&self) -> bool {
        self.state().held.front().is_none_or(|held| held.since.elapsed() < OLDEST)
    }

    /// Records that storing a segment failed.
    pub fn failed(&self, why: Refused) {
        self.progress.send_modify(|progress| progress.failed = (progress.failed.0 + 1, Some(why)));
    }

    /// Subscribes to the progress of the segments that are held now.
    pub fn follow(&self) -> Follow<'_> {
        let progress = self.progress.subscribe();
        let from = progress.borrow().clone();
        Follow { log: self, progress, from }
    }
}

/// A subscription to the progress of a log.
pub struct Follow<'l> {
    log: &'l Log,
    progress: watch::Receiver<Progress>,
    from: Progress,
}

impl Follow<'_> {
    /// Waits until the bucket has this many records. `Err(Lost)` means that the caller must read the log again.
    ///
    /// # Errors
    /// Returns the failure of an attempt to store a segment since the subscription.
    pub async fn stored(mut self, size: u64) -> Result<Result<(), Lost>, Refused> {
        self.log.wanted.fetch_max(size, Ordering::Relaxed);
        self.log.flush.notify_one();
        let from = self.from;
        let over = |now: &Progress| now.stored >= size || now.lost > from.lost || now.failed.0 > from.failed.0;
        let Ok(now) = self.progress.wait_for(over).await else { return Ok(Err(Lost)) };
        match &now.failed.1 {
            _ if now.lost > from.lost => Ok(Err(Lost)),
            _ if now.stored >= size => Ok(Ok(())),
            Some(why) => Err(why.clone()),
            None => Ok(Err(Lost)),
        }
    }
}
