//! Records, in order, batched into segments and sent to the witness.
//!
//! Promises: budgets and records change under one lock, so that a record's counters are those of its place in the log;
//! [`Journal::stored`] returns only when the record lies in the evidence store; no record is dropped. When the store is
//! slow the callers wait; when it refuses for good, every later call is denied.

use std::{
    io::Write,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::{Notify, watch};

use super::link::{CallError, Link};
use crate::{
    canonical,
    evidence::{
        merkle::{Tree, leaf_hash},
        note::{Checkpoint, Note, Signer},
        record::{Actor, Event, Record, VERSION},
        segment::Segment,
    },
    policy::{
        budget::{Budget, Exhausted},
        config::{ModelPrice, Usage},
        decide::Denial,
        rule::Rule,
        tokens::Left,
    },
    wire::AppendRequest,
};

/// Records in one segment at most: what a witness checks in a few milliseconds.
const BATCH: usize = 256;
/// Records that may wait for the store. Beyond it callers wait with them.
const BACKLOG: usize = 1_024;
/// How long a call waits for its intent to be stored before it is denied.
const STORE_PATIENCE: Duration = Duration::from_secs(60);
/// Longest pause between two tries to store a segment.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

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
    /// The counters so far.
    pub budget: Budget,
}

/// The log of this attempt.
pub struct Journal {
    attempt: i64,
    state: Mutex<State>,
    work: Notify,
    progress: watch::Sender<Progress>,
}

struct State {
    next: u64,
    queue: Vec<Vec<u8>>,
    budget: Budget,
}

#[derive(Clone, Debug, Default)]
struct Progress {
    /// Records that lie in the store.
    stored: u64,
    /// Why no more will.
    failed: Option<Denial>,
}

impl Journal {
    /// Starts the task that stores segments.
    pub fn start(start: Start, link: Arc<Link>) -> Arc<Self> {
        let size = start.tree.size();
        let journal = Arc::new(Self {
            attempt: start.attempt,
            state: Mutex::new(State { next: size, queue: Vec::new(), budget: start.budget }),
            work: Notify::new(),
            progress: watch::Sender::new(Progress { stored: size, failed: None }),
        });
        tokio::spawn(journal.clone().store(start.tree, start.signer, start.origin, link));
        journal
    }

    /// Appends what `event` makes of the next sequence number and the counters. If it makes a denial, nothing is appended.
    ///
    /// # Errors
    /// The closure's denial, or [`Rule::Evidence`] once the log cannot go on.
    pub fn record(&self, event: impl FnOnce(u64, &mut Budget) -> Result<Event, Denial>) -> Result<u64, Denial> {
        if let Some(denial) = &self.progress.borrow().failed {
            return Err(denial.clone());
        }
        let mut state = self.lock();
        let seq = state.next;
        let before = state.budget.clone();
        let event = event(seq, &mut state.budget)?;
        let record = Record {
            v: VERSION,
            seq,
            time: format!("{:.3}", jiff::Timestamp::now()),
            attempt: self.attempt,
            actor: Actor::Harness,
            usage: state.budget.usage(),
            event,
        };
        let bytes = match canonical::to_bytes(&record) {
            Ok(bytes) => bytes,
            Err(error) => {
                state.budget = before;
                return Err(Denial { rule: Rule::Evidence, reason: error.to_string() });
            }
        };
        // Whoever follows the pod's log sees the record at once; it counts only once it is stored.
        let mut line = bytes.clone();
        line.push(b'\n');
        if let Err(error) = std::io::stdout().lock().write_all(&line) {
            tracing::debug!(%error, "the record could not be shown on stdout");
        }
        state.queue.push(bytes);
        state.next = seq.saturating_add(1);
        drop(state);
        self.work.notify_one();
        Ok(seq)
    }

    /// Waits until a record lies in the evidence store.
    ///
    /// # Errors
    /// [`Rule::Evidence`] if that takes too long or cannot be any more.
    pub async fn stored(&self, seq: u64) -> Result<(), Denial> {
        let mut progress = self.progress.subscribe();
        let waiting = progress.wait_for(|progress| progress.stored > seq || progress.failed.is_some());
        match tokio::time::timeout(STORE_PATIENCE, waiting).await {
            Ok(Ok(progress)) if progress.stored > seq => Ok(()),
            Ok(Ok(progress)) => Err(progress.failed.clone().unwrap_or_else(gone)),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(Denial {
                rule: Rule::Evidence,
                reason: format!("the record was not stored within {STORE_PATIENCE:?}; nothing leaves unrecorded"),
            }),
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

    /// Waits until few enough records wait for the store.
    pub async fn room(&self) {
        let mut progress = self.progress.subscribe();
        let next = || self.lock().next;
        let fits =
            |progress: &Progress| progress.failed.is_some() || next().saturating_sub(progress.stored) < BACKLOG as u64;
        let _ = progress.wait_for(fits).await;
    }

    /// The counters now.
    pub fn usage(&self) -> Usage {
        self.lock().budget.usage()
    }

    /// Whether the budget takes calls at all.
    ///
    /// # Errors
    /// See [`Budget::open`].
    pub fn open(&self) -> Result<(), Exhausted> {
        self.lock().budget.open()
    }

    /// What can still be reserved for a model of this price.
    pub fn left<'p>(&self, price: Option<&'p ModelPrice>) -> Left<'p> {
        let state = self.lock();
        Left { tokens: state.budget.tokens_left(), cost: state.budget.cost_left().zip(price) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere cannot leave the counters half changed: every change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn store(self: Arc<Self>, mut tree: Tree, signer: Signer, origin: String, link: Arc<Link>) {
        loop {
            let records: Vec<Vec<u8>> = {
                let mut state = self.lock();
                let count = state.queue.len().min(BATCH);
                state.queue.drain(..count).collect()
            };
            if records.is_empty() {
                self.work.notified().await;
                continue;
            }
            let first = tree.size();
            for record in &records {
                tree.push(leaf_hash(record));
            }
            let checkpoint = Checkpoint { origin: origin.clone(), size: tree.size(), root: tree.root() };
            let segment = Segment { note: Note::sign(&checkpoint, &signer), first, records };
            if let Err(denial) = self.append(&segment, &link).await {
                tracing::error!(rule = %denial.rule, reason = denial.reason, "the log cannot go on");
                self.progress.send_modify(|progress| progress.failed = Some(denial));
                return;
            }
            self.progress.send_modify(|progress| progress.stored = tree.size());
        }
    }

    /// The same bytes again and again until the gateway has them or refuses them: appending twice is appending once.
    async fn append(&self, segment: &Segment, link: &Link) -> Result<(), Denial> {
        let text = String::from_utf8(segment.to_bytes())
            .map_err(|error| Denial { rule: Rule::LogSegment, reason: format!("a segment is not UTF-8: {error}") })?;
        let request = AppendRequest { attempt: self.attempt, first: segment.first, segment: text };
        let mut pause = Duration::from_millis(50);
        loop {
            match link.append(&request).await {
                Ok(_) => return Ok(()),
                Err(CallError::Refused(denial)) if denial.rule != Rule::Evidence => {
                    return Err(Denial {
                        rule: Rule::Evidence,
                        reason: format!("the witness refused the log: {}: {}", denial.rule, denial.reason),
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, first = segment.first, "the segment is not stored yet");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }
}

fn gone() -> Denial {
    Denial { rule: Rule::Evidence, reason: "the log has ended".into() }
}
