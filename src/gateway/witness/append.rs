//! The way of a segment into the bucket: it is checked, gets its position in the log, is cosigned and stored.
//!
//! Guarantees: a segment is stored even if the request that brought it is cancelled. Segments that wait for the bucket are stored in their
//! order, several of them in one object. A reply to [`Until::Stored`] comes after the check that the store locks the object with the
//! attempt's policy as the pack asks.
//!
//! Rejects: a segment of another attempt or pod than the caller's, one that opens under another policy than the gateway's, and one that the
//! history does not accept.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    LogLocation, Witness, forked,
    log::{Batch, Log, PendingMatch},
    own_attempt, same_policy, unix_time,
};
use crate::{
    evidence::{
        record::{Actor, Event, Record},
        segment::Segment,
        store::PutError,
    },
    gateway::{buckets::unavailable, identity::HarnessIdentity, refusal::Refused},
    policy::{config::Usage, rule::Rule},
    retry,
    wire::{AppendReply, AppendRequest, Until},
};

/// Delays between attempts to store a segment after a failure, without their random part: the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Maximum number of attempts to append a segment when other replicas store segments meanwhile.
const TRIES: u32 = 4;

/// The state of a segment after [`Witness::take`].
enum Admission {
    /// The segment is queued for the bucket. The usage is the counters after it.
    Held(Receipt, Usage),
    /// The segment is in the bucket under this checkpoint.
    Stored(String, Usage),
}

/// Whether a segment was taken by this request or by an earlier one.
enum Receipt {
    New,
    Duplicate,
}

impl Witness {
    /// Witnesses a segment and stores it before the reply or after it, as the request asks. Returns also the counters after the segment.
    /// `digest` is the digest of the policy that the gateway compiled, which only a new attempt needs. `of` is the place of the log that
    /// this task rolls back.
    ///
    /// # Errors
    /// Returns a denial with the violated rule, [`Rule::LogFork`] if another segment has the position, or [`Rule::Evidence`] if the bucket
    /// fails: the same segment may then be sent again.
    pub async fn append(
        self: &Arc<Self>,
        place: &LogLocation,
        principal: &HarnessIdentity,
        request: &AppendRequest,
        digest: Result<&str, Refused>,
        of: Option<&LogLocation>,
    ) -> Result<(AppendReply, Usage), Refused> {
        let started = Instant::now();
        let appended = self.try_append(place, principal, request, digest, of).await;
        let until = match request.until {
            Until::Witnessed => "witnessed",
            Until::Stored => "stored",
        };
        self.metrics.append_seconds.with_label_values(&[until]).observe(started.elapsed().as_secs_f64());
        let result = match &appended {
            Ok((_, _, Receipt::New)) => "written",
            Ok((_, _, Receipt::Duplicate)) => "replayed",
            Err(refused) if refused.is_retryable() => "failed",
            Err(_) => "rejected",
        };
        self.metrics.appends.with_label_values(&[result]).inc();
        appended.map(|(reply, usage, _)| (reply, usage))
    }

    async fn try_append(
        self: &Arc<Self>,
        place: &LogLocation,
        principal: &HarnessIdentity,
        request: &AppendRequest,
        digest: Result<&str, Refused>,
        of: Option<&LogLocation>,
    ) -> Result<(AppendReply, Usage, Receipt), Refused> {
        own_attempt(principal, request.attempt)?;
        let (segment, records) = Segment::read(request.segment.as_bytes())
            .map_err(|e| Refused::denied(Rule::LogSegment, format!("the segment cannot be read: {e}")))?;
        admit(&segment, &records, request, principal, digest)?;
        let end = segment.end();
        let log = self.log(place);
        for _ in 0..TRIES {
            // Subscribe before the log is read, so that no progress is missed.
            let follow = log.follow();
            let (taken, usage) = match self.take(place, &log, (&segment, &records), of).await? {
                Admission::Held(taken, usage) => (taken, usage),
                Admission::Stored(checkpoint, usage) => {
                    self.is_locked(place, &segment).await?;
                    return Ok((AppendReply { size: end, checkpoint: Some(checkpoint) }, usage, Receipt::Duplicate));
                }
            };
            if request.until == Until::Witnessed {
                return Ok((AppendReply { size: end, checkpoint: None }, usage, taken));
            }
            if let Ok(()) = follow.stored(end).await? {
                self.is_locked(place, &segment).await?;
                return Ok((AppendReply { size: end, checkpoint: Some(log.checkpoint()) }, usage, taken));
            }
            // Another replica stored a segment first. The bucket now shows whether it contains this segment.
        }
        Err(unavailable("other writers are at this place; try again"))
    }

    /// Takes a segment, or finds it queued or in the bucket.
    async fn take(
        self: &Arc<Self>,
        place: &LogLocation,
        log: &Arc<Log>,
        (segment, records): (&Segment, &[Record]),
        of: Option<&LogLocation>,
    ) -> Result<Admission, Refused> {
        let _writer = log.writer.lock().await;
        let history = match log.newest() {
            Some(head) if head.tree().size() == segment.first => head,
            newest => {
                match (log.among(segment), newest) {
                    (PendingMatch::Same, Some(newest)) => {
                        return Ok(Admission::Held(Receipt::Duplicate, newest.state().usage()));
                    }
                    (PendingMatch::Other, _) => return Err(forked(segment)),
                    _ => {}
                }
                let stored = self.catch_up(place, log).await?;
                if segment.first < stored.tree().size() {
                    let checkpoint = self.replayed(place, segment, &stored).await?;
                    return Ok(Admission::Stored(checkpoint, stored.state().usage()));
                }
                log.newest().unwrap_or(stored)
            }
        };
        let size = history.tree().size();
        if segment.first > size && !history.state().has_ended() {
            // Another replica has taken the records before it and is about to store them.
            let reason =
                format!("expected records from {size} on, found some from {}: send those before", segment.first);
            return Err(unavailable(&reason));
        }
        let next = history.extended_by(segment, records)?;
        if let Some(undoing) = next.state().rollback().filter(|_| history.state().rollback().is_none()) {
            // A task whose rolled back log cannot be read has no plan.
            let plan = match of {
                Some(of) => Some(self.plan(of).await?),
                None => None,
            };
            if plan.as_ref() != Some(&undoing.plan) {
                let reason =
                    "expected the plan that follows from the other task's log, found another: open the log again";
                return Err(Refused::denied(Rule::ToolRollback, reason));
            }
        }
        let usage = next.state().usage();
        let task_class = next.task_class();
        if log.enqueue(segment.clone(), next)? {
            // The request may be cancelled. The segment is stored anyway.
            tokio::spawn(self.clone().store_held(place.clone(), log.clone()));
        }
        records.iter().for_each(|record| self.metrics.recorded(&task_class, &record.event));
        Ok(Admission::Held(Receipt::New, usage))
    }

    /// Stores held segments until there are none.
    async fn store_held(self: Arc<Self>, place: LogLocation, log: Arc<Log>) {
        let fresh = || retry::pauses(PAUSES.0, PAUSES.1);
        let mut pauses = fresh();
        loop {
            log.due().await;
            let Some(Batch { mut segment, after }) = log.batch() else { return };
            segment.note.cosign(&self.signer, unix_time());
            let refused = match self.put(&place, &segment).await {
                Ok(()) => {
                    let lost = log.advance(after, &segment, segment.note.to_string());
                    self.lost(&place, lost).await;
                    pauses = fresh();
                    continue;
                }
                // Another replica stored a segment first, or an earlier attempt to store this segment succeeded after all.
                Err(PutError::Exists) => {
                    let _writer = log.writer.lock().await;
                    match self.catch_up(&place, &log).await {
                        Ok(stored) if stored.tree().size() > segment.first => continue,
                        Ok(_) => unavailable("another writer is at this place; try again"),
                        Err(refused) => refused,
                    }
                }
                Err(PutError::Store(error)) => self.failed(&error),
            };
            log.failed(refused);
            retry::pause(&mut pauses).await;
        }
    }

    /// Checks, before any call leaves, that the store locks the object with an attempt's policy, with which every attempt begins, as the
    /// pack asks, whoever stored it. Otherwise only an auditor would notice a store that ignores retention.
    async fn is_locked(&self, place: &LogLocation, segment: &Segment) -> Result<(), Refused> {
        let Some(asked) = place.retention.as_ref().filter(|_| !segment.documents.is_empty()) else { return Ok(()) };
        let locked = self.store(place).await?.locked(&place.key(segment.first), asked).await;
        locked.map_err(|error| self.failed(&error))
    }
}

/// Checks everything that needs no history: the segment is this pod's, of this attempt, and opens under the gateway's own policy.
fn admit(
    segment: &Segment,
    records: &[Record],
    request: &AppendRequest,
    principal: &HarnessIdentity,
    digest: Result<&str, Refused>,
) -> Result<(), Refused> {
    let refused = |rule, reason: String| Err(Refused::denied(rule, reason));
    if segment.first != request.first {
        return refused(
            Rule::LogSegment,
            format!("expected a segment from record {}, found one from {}", request.first, segment.first),
        );
    }
    if segment.note.signatures.len() != 1 {
        return refused(
            Rule::LogSegment,
            format!("expected the attempt's signature alone, found {} signatures", segment.note.signatures.len()),
        );
    }
    for record in records {
        if record.actor != Actor::Harness || record.attempt != principal.attempt {
            return refused(
                Rule::LogSegment,
                format!(
                    "record {}: expected the harness of attempt {}, found {:?} of {}",
                    record.seq, principal.attempt, record.actor, record.attempt
                ),
            );
        }
        if let Event::AttemptOpened(opened) = &record.event {
            if opened.pod.uid != principal.pod_uid || opened.pod.name != principal.pod {
                return refused(
                    Rule::LogSegment,
                    format!(
                        "record {}: expected pod {} with UID {}, found {} with {}",
                        record.seq, principal.pod, principal.pod_uid, opened.pod.name, opened.pod.uid
                    ),
                );
            }
            if !opened.containment.contained || !opened.containment.breaches.is_empty() {
                return refused(
                    Rule::ContainmentLost,
                    format!("record {}: expected a contained pod, found one that is not", record.seq),
                );
            }
            let digest = digest.clone()?;
            let found = opened.policy.digest().map_err(|e| Refused::malformed(e.to_string()))?;
            same_policy(&found, digest)?;
        }
    }
    Ok(())
}
