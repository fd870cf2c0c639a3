//! Sends the log to the evidence bucket: cuts signed segments, spools them, sends them to the witness, and has them stored.
//!
//! Guarantees: segments are sent in order, and the same bytes are sent again until the witness has them or rejects them. A segment is in
//! the spool before it is sent, and leaves the spool once the bucket has it.
//!
//! Non-goals: what is recorded, and who waits for it.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::{
    FutureExt,
    future::{BoxFuture, Fuse, FusedFuture},
};
use tokio::time::Instant;

use super::{Journal, Progress, STORE_PATIENCE, Witness};
use crate::{
    evidence::{
        merkle::{Tree, leaf_hash},
        note::{Checkpoint, Note, Signer},
        record::Encoded,
        segment::Segment,
    },
    harness::{
        gateway_client::{CallError, GatewayClient},
        spool::Spool,
    },
    policy::{decide::Denial, rule::Rule},
    retry,
    wire::{AppendReply, AppendRequest, Until},
};

/// How long it takes until the witness is asked to store records that no caller waits for.
const LINGER: Duration = Duration::from_millis(100);
/// The pause before a segment that did not fit into the spool is written again.
const ROOM: Duration = Duration::from_secs(1);
/// The pauses before segments are sent again, without their random part: the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// A segment that is being sent to the witness.
type Sending = Fuse<BoxFuture<'static, Result<AppendReply, CallError>>>;

/// Segments that are not stored yet.
pub(super) struct Outbox {
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
    /// Creates an outbox without segments, for a log that goes on after this tree.
    pub(super) fn new(attempt: i64, tree: Tree, (signer, origin): (Signer, String), spool: Spool) -> Self {
        Self { attempt, tree, signer, origin, spool, unspooled: None, units: VecDeque::new(), sent: 0 }
    }

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

impl Journal {
    /// Sends segment after segment to the witness and, at the same time, asks it to store the segments that it has. Sends the same bytes
    /// again until the witness has them or rejects them, because appending twice is appending once.
    pub(super) async fn send(self: Arc<Self>, mut outbox: Outbox, witness: Arc<dyn Witness>) {
        let fresh = || retry::pauses(PAUSES.0, PAUSES.1);
        let mut pauses = fresh();
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
                    tracing::warn!(%error, "the spool cannot be written; no call leaves until it can");
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
                    pauses = fresh();
                    self.progress.send_modify(|progress| outbox.tell(progress));
                }
                Err(CallError::Refused(denial)) if denial.rule != Rule::Evidence => {
                    self.fail(Denial {
                        rule: Rule::Evidence,
                        reason: format!("the witness rejected the log: {}: {}", denial.rule, denial.reason),
                    });
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "the log is not stored yet");
                    // The replica that replies next may not have the segments that this one had.
                    (holding, storing) = (Fuse::terminated(), Fuse::terminated());
                    outbox.sent = 0;
                    retry::pause(&mut pauses).await;
                }
            }
        }
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
        let mut pauses = retry::pauses(PAUSES.0, PAUSES.1);
        any = true;
        tracing::info!(first = segment.first, end = segment.end(), "storing what was left");
        while let Err(error) = link.append(&request).await {
            match error {
                CallError::Refused(denial) if denial.rule != Rule::Evidence => {
                    tracing::error!(rule = %denial.rule, reason = denial.reason, "what was left is rejected");
                    return Err(denial);
                }
                error if started.elapsed() > STORE_PATIENCE => return Err(lost(error.to_string())),
                error => tracing::warn!(%error, "what was left is not stored yet"),
            }
            retry::pause(&mut pauses).await;
        }
    }
    Ok(any)
}
