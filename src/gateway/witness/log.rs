//! One log in memory: what its bucket is known to have, and the segments that are on their way there.
//!
//! Promises: segments go to the bucket in the order in which they were taken, several of them in one object; what was taken is let
//! go of only when it lies there, or when the bucket has gone another way, of which whoever waits is told. Those that nobody
//! waits for wait for each other, for [`LINGER`]. Refuses: taking more than [`RECORDS`], [`BYTES`] or [`SEGMENTS`] ahead of the bucket.
//!
//! ```text
//! hold ─▶ held, held, held ─▶ batch ─▶ (put) ─▶ advance
//!         ▲ newest                              ▲ stored
//! ```

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::History;
use crate::{evidence::segment::Segment, gateway::refusal::Refused, policy::rule::Rule};

/// Records of one log that may be on their way: what a segment may have.
const RECORDS: usize = 4096;
/// Their bytes. One segment may always be on its way.
const BYTES: usize = 4 << 20;
/// Segments on their way: with each a whole [`History`] is kept.
const SEGMENTS: usize = 64;
/// So many do not wait for others any more.
const ENOUGH: usize = 16;
/// For so long reads and model calls may leave by what is on its way.
const OLDEST: Duration = Duration::from_secs(5);

/// How long a segment waits for others for which nobody waits, as a read does not: each put costs, in time and in money.
const LINGER: Duration = Duration::from_millis(250);

/// How long a call waits for its intent to be taken.
const ARRIVAL: Duration = Duration::from_millis(100);

/// Intents that are remembered to have been used, before those are forgotten that the log no longer knows: more than it knows.
pub const SENT: usize = 8192;

/// What has left by one intent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    /// How many requests.
    pub times: u32,
    /// One was not counted, because its upstream had done nothing.
    pub again: bool,
}

/// One log.
#[derive(Default)]
pub struct Log {
    /// What has left, by its intents.
    pub sent: Mutex<HashMap<u64, Sent>>,
    /// Whoever holds it may take a segment, or look for what other replicas have stored.
    pub writer: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    progress: watch::Sender<Progress>,
    /// Records that somebody waits for to be in the bucket.
    wanted: AtomicU64,
    hurry: Notify,
    /// The newest attempt of which records have lost their place.
    forked: AtomicI64,
}

#[derive(Default)]
struct State {
    stored: Option<Arc<History>>,
    /// The newest checkpoint in the bucket, cosigned.
    checkpoint: String,
    held: VecDeque<Held>,
    /// Somebody puts what is held.
    storing: bool,
}

/// A segment on its way, and the log after it.
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

/// What whoever waits for a segment is told.
#[derive(Clone, Debug, Default)]
struct Progress {
    /// Records that have been taken.
    newest: u64,
    /// Records in the bucket.
    stored: u64,
    /// How often segments that were held were given up: the bucket has gone another way.
    lost: u64,
    /// How often a put has failed, and why the last time.
    failed: (u64, Option<Refused>),
}

/// Segments that become one object.
pub struct Batch {
    /// Them, under the last one's checkpoint.
    pub segment: Segment,
    /// The log after them.
    pub after: Arc<History>,
}

/// Whether a segment is among those on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Among {
    /// This very one.
    Same,
    /// Another one is in its place.
    Other,
    /// None is in its place.
    None,
}

/// The bucket has gone another way than the segments that were held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost;

impl Log {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The log with all that has been taken.
    pub fn newest(&self) -> Option<Arc<History>> {
        let state = self.state();
        state.held.back().map(|held| held.after.clone()).or_else(|| state.stored.clone())
    }

    /// The log as the bucket is known to have it.
    pub fn stored(&self) -> Option<Arc<History>> {
        self.state().stored.clone()
    }

    /// The newest checkpoint that is known to be in the bucket.
    pub fn checkpoint(&self) -> String {
        self.state().checkpoint.clone()
    }

    /// Whether a segment is on its way.
    pub fn among(&self, segment: &Segment) -> Among {
        let state = self.state();
        let Some(held) = state.held.iter().find(|held| held.end() > segment.first) else { return Among::None };
        let same = held.segment.note.text == segment.note.text && held.segment.records == segment.records;
        match (same, held.segment.first <= segment.first) {
            (true, _) => Among::Same,
            (false, true) => Among::Other,
            (false, false) => Among::None,
        }
    }

    /// Takes a segment, after which the log is `after`; says whether nobody puts them so far, and the caller has to.
    ///
    /// # Errors
    /// [`Rule::Busy`] if too much is on its way.
    pub fn hold(&self, segment: Segment, after: History) -> Result<bool, Refused> {
        let mut state = self.state();
        let held = Held::new(segment, after);
        let sum = |of: fn(&Held) -> usize| state.held.iter().chain([&held]).map(of).sum::<usize>();
        let (records, bytes) = (sum(|held| held.segment.records.len()), sum(|held| held.bytes));
        if !state.held.is_empty() && (records > RECORDS || bytes > BYTES || state.held.len() >= SEGMENTS) {
            let reason = "the bucket is slower than the records that come for it: wait until it has some of them";
            return Err(Refused::retry(Rule::Busy, reason));
        }
        state.held.push_back(held);
        let starts = !std::mem::replace(&mut state.storing, true);
        if state.held.len() >= ENOUGH {
            self.hurry.notify_one();
        }
        self.tell(&state, false);
        Ok(starts)
    }

    /// Waits a moment for a record that is not there yet: a call may be as fast as its intent.
    pub async fn arrival(&self, seq: u64) {
        let mut progress = self.progress.subscribe();
        let _ = tokio::time::timeout(ARRIVAL, progress.wait_for(|now| now.newest.max(now.stored) > seq)).await;
    }

    /// Waits until somebody waits for the next segment, or it has waited long enough for others.
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
                () = self.hurry.notified() => {}
                () = tokio::time::sleep_until(since + LINGER) => return,
            }
        }
    }

    /// The next object: as many of the segments that are held as go into one. Nothing once there are none: another [`Log::hold`] will say
    /// that nobody puts them.
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

    /// The log as it was found in the bucket by somebody who knew nothing of it.
    pub fn begin(&self, stored: Arc<History>) -> Arc<History> {
        let mut state = self.state();
        let stored = state.stored.get_or_insert(stored).clone();
        self.tell(&state, false);
        stored
    }

    /// The bucket has one segment more, after which the log is `stored`, under this checkpoint. Gives the segments that were held and have
    /// lost their place to it, with all that went on from them: calls may have left by them.
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

    /// Says how far the log is. Under the state's lock, so that it is never said backwards.
    fn tell(&self, state: &State, lost: bool) {
        let size = |head: Option<&Arc<History>>| head.map_or(0, |head| head.tree().size());
        let stored = size(state.stored.as_ref());
        self.progress.send_modify(|progress| {
            progress.stored = stored;
            progress.newest = size(state.held.back().map(|held| &held.after)).max(stored);
            progress.lost += u64::from(lost);
        });
    }

    /// Whether records of this attempt that calls may have left by have lost their place: no call of it leaves here any more.
    pub fn is_forked(&self, attempt: i64) -> bool {
        attempt <= self.forked.load(Ordering::Relaxed)
    }

    /// Whether what is held is young enough for reads and model calls to leave by it.
    pub fn is_fresh(&self) -> bool {
        self.state().held.front().is_none_or(|held| held.since.elapsed() < OLDEST)
    }

    /// A put has failed.
    pub fn failed(&self, why: Refused) {
        self.progress.send_modify(|progress| progress.failed = (progress.failed.0 + 1, Some(why)));
    }

    /// Follows what becomes of the segments that are held now.
    pub fn follow(&self) -> Follow<'_> {
        let progress = self.progress.subscribe();
        let from = progress.borrow().clone();
        Follow { log: self, progress, from }
    }
}

/// Whoever waits for segments to lie in the bucket.
pub struct Follow<'l> {
    log: &'l Log,
    progress: watch::Receiver<Progress>,
    from: Progress,
}

impl Follow<'_> {
    /// Waits until the bucket has this many records. `Err(Lost)` says to look again.
    ///
    /// # Errors
    /// The refusal with which a put has failed since.
    pub async fn stored(mut self, size: u64) -> Result<Result<(), Lost>, Refused> {
        self.log.wanted.fetch_max(size, Ordering::Relaxed);
        self.log.hurry.notify_one();
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
