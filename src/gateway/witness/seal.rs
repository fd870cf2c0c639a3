//! The end of a log: `task.closed` as its last record, and then the objects that are derived from the whole log.
//!
//! Guarantees: a log is sealed once, whichever replicas get the request. The reply to a later request describes the existing end. The
//! summary is written last, so its presence shows that tiles and checkpoint are there.
//!
//! Non-goals: the decision that a task has ended, which the operator makes; its reason, which [`History::verdict`] compares with the log.

use std::{collections::BTreeSet, sync::Arc};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use futures::StreamExt;
use jiff::Timestamp;

use super::{
    LogLocation, Witness,
    history::History,
    rebuild::{PARALLEL, Stored},
    unix_time,
};
use crate::{
    canonical::{self, CanonicalError},
    evidence::{
        dsse::Envelope,
        ending::{self, Ending},
        merkle::leaf_hash,
        note::{self, Checkpoint, Note},
        record::{Actor, Event, Record, TaskClosed, VERSION},
        segment::Segment,
        store::{PutError, Retention, StoreError},
        tiles::File,
    },
    gateway::{
        buckets::{broken, unavailable},
        refusal::Refused,
    },
    wire::{SealReply, SealRequest},
};

/// Maximum number of attempts to seal a log while the harness's last segments take its position.
const SEAL_TRIES: u32 = 8;

impl Witness {
    /// Seals a log with `task.closed`. If the log has ended already, the reply describes the existing end.
    ///
    /// # Errors
    /// Returns [`Rule::Evidence`] if the bucket fails.
    pub async fn seal(self: &Arc<Self>, place: &LogLocation, request: &SealRequest) -> Result<SealReply, Refused> {
        let log = self.log(place);
        let place = &LogLocation { retention: self.retention(place).await?, ..place.clone() };
        for _ in 0..SEAL_TRIES {
            let (writer, history) = self.settled(place, &log).await?;
            let sealed = if history.state().has_ended() {
                history
            } else {
                let (segment, next) = self.last_segment(place, request, &history)?;
                match self.put(place, &segment).await {
                    Ok(()) => {
                        let next = Arc::new(next);
                        let lost = log.advance(next.clone(), &segment, segment.note.to_string());
                        self.lost(place, lost).await;
                        next
                    }
                    Err(PutError::Exists) => continue,
                    Err(PutError::Store(error)) => return Err(self.failed(&error)),
                }
            };
            drop(writer);
            // The request may be cancelled. The log's end is written anyway.
            let ended = tokio::spawn(self.clone().end(place.clone()));
            ended.await.map_err(|e| unavailable(&format!("the log's end could not be written: {e}")))??;
            let closed = sealed.outcome();
            let failed = closed.as_ref().is_some_and(TaskClosed::has_failed);
            let compensation_commitment = match sealed.undoable() && sealed.state().rollback().is_none() && failed {
                true => self.compensation_commitment(place).await?,
                false => Some(BTreeSet::new()),
            };
            return Ok(SealReply {
                compensation_commitment,
                closed,
                origin: note::origin(&place.task_uid),
                location: place.location.to_string(),
                endpoint: self.buckets.endpoint(),
                size: sealed.tree().size(),
                root: BASE64.encode(sealed.tree().root()),
                usage: sealed.state().usage(),
                denied: sealed.denied(),
            });
        }
        Err(unavailable("the log grows faster than it can be sealed; try again"))
    }

    /// Writes the derived objects of a log that has ended: tiles and checkpoint, and then the summary, whose presence shows that all of
    /// them are there.
    async fn end(self: Arc<Self>, place: LogLocation) -> Result<(), Refused> {
        let store = self.store(&place).await?;
        let key = |name: &str| format!("{}{name}", place.location.prefix);
        match store.get(&key(ending::SUMMARY)).await {
            Ok(_) => return Ok(()),
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(self.failed(&error)),
        }
        let put = async |(name, bytes): File| match store
            .put_new(&key(&name), bytes.into(), place.retention.as_ref())
            .await
        {
            Ok(_) => Ok(()),
            Err(PutError::Exists) => {
                Err(broken(&key(&name), "expected the content that follows from the records, found another"))
            }
            Err(PutError::Store(error)) => Err(self.failed(&error)),
        };
        let mut ending = Ending::default();
        let mut segments = futures::stream::iter(self.firsts(&place).await?)
            .map(|first| self.stored(&place, first))
            .buffered(PARALLEL);
        while let Some(stored) = segments.next().await {
            let Some(Stored { segment, .. }) = stored? else { continue };
            let wrong = |e: &dyn std::fmt::Display| broken(&place.key(segment.first), e.to_string());
            let records = segment.decode().map_err(|e| wrong(&e))?;
            for file in ending.take(&segment, &records).map_err(|e| wrong(&e))? {
                put(file).await?;
            }
        }
        let (files, statement) = ending.finish().ok_or_else(|| unavailable("the log has no end yet; try again"))?;
        for file in files {
            put(file).await?;
        }
        let unwritable = |e: CanonicalError| Refused::malformed(e.to_string());
        let payload = canonical::to_bytes(&statement).map_err(unwritable)?;
        let summary = Envelope::sign(ending::PAYLOAD_TYPE, &payload, &self.signer).to_bytes().map_err(unwritable)?;
        put((ending::SUMMARY.to_owned(), summary)).await
    }

    /// Returns the retention to seal with: the pack's, or, if the pack is gone, the longest retention of the log's own segments.
    async fn retention(&self, place: &LogLocation) -> Result<Option<Retention>, Refused> {
        if place.retention.is_some() {
            return Ok(place.retention);
        }
        let versions = self.store(place).await?.list_versions(&place.location.prefix).await;
        let locked = versions.map_err(|e| self.failed(&e))?.into_iter().filter_map(|version| {
            let (mode, from, until) = (version.mode?, version.written?, version.retain_until?);
            // Round to whole days, as the retention was requested: the two clocks differ a little.
            Some(Retention { mode, days: (until.duration_since(from).as_hours() + 12) / 24 })
        });
        Ok(locked.filter(|retention| retention.days > 0).max_by_key(|retention| retention.days))
    }

    /// Returns the segment that ends this log: one record, signed by the witness alone.
    fn last_segment(
        &self,
        place: &LogLocation,
        request: &SealRequest,
        history: &History,
    ) -> Result<(Segment, History), Refused> {
        let record = Record {
            v: VERSION,
            seq: history.tree().size(),
            time: format!("{:.3}", Timestamp::now()),
            attempt: request.attempt.max(history.state().attempt()),
            actor: Actor::Gateway,
            usage: history.state().usage(),
            event: Event::TaskClosed(history.verdict(request.closed.clone(), request.attempt, request.presumed)),
        };
        let entry = record.encode().map_err(|e| Refused::malformed(e.to_string()))?;
        let mut tree = history.tree().clone();
        tree.push(leaf_hash(&entry.record));
        let origin = note::origin(&place.task_uid);
        let mut note = Note::unsigned(&Checkpoint { origin: origin.clone(), size: tree.size(), root: tree.root() });
        note.cosign(&self.signer, unix_time());
        let segment = Segment::new(note, record.seq, vec![entry]);
        let next = history.extended(&segment)?;
        Ok((segment, next))
    }
}
