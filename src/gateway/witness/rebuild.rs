//! Reading a log from its bucket: as a whole, or from the last segment that this replica knows.
//!
//! Guarantees: each segment that is read passes the checks of [`history`](super::history) and has this witness's cosignature. Segments of
//! other replicas are found by their position, without a listing. Held segments that have lost their position to one of them are written
//! beside the log as incidents.
//!
//! Non-goals: repair. A log that does not verify is reported, and not continued.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use jiff::Timestamp;

use super::{LogLocation, Witness, Writer, ended, forked, history::History, log::Log};
use crate::{
    canonical,
    evidence::{
        log::INCIDENTS,
        note,
        record::Record,
        segment::{self, Segment},
        store::StoreError,
    },
    gateway::{
        buckets::{broken, unavailable},
        refusal::Refused,
    },
    policy::rule::Rule,
};

/// Number of segments that are read concurrently when a log is rebuilt.
pub(super) const PARALLEL: usize = 8;
/// Time limit for queued segments to reach the bucket before a log is read or sealed.
const SETTLE: Duration = Duration::from_secs(10);

/// A segment as it is stored in the bucket.
pub(super) struct Stored {
    pub(super) segment: Segment,
    note: String,
}

impl Witness {
    /// Waits until no segment is queued. Returns the log as the bucket has it, and the writer's lock.
    pub(super) async fn settled<'l>(
        &self,
        place: &LogLocation,
        log: &'l Log,
    ) -> Result<(Writer<'l>, Arc<History>), Refused> {
        let size = |head: Option<Arc<History>>| head.map_or(0, |head| head.tree().size());
        let settling = async {
            loop {
                // Do not hold the lock here, because the task that stores segments may need it.
                let follow = log.follow();
                if size(log.newest()) > size(log.stored()) {
                    let _ = follow.stored(size(log.newest())).await?;
                }
                let writer = log.writer.lock().await;
                let stored = self.catch_up(place, log).await?;
                if size(log.newest()) == stored.tree().size() {
                    return Ok((writer, stored));
                }
            }
        };
        tokio::time::timeout(SETTLE, settling).await.map_err(|_| unavailable("the bucket is slow; try again"))?
    }

    /// Returns the log as the bucket has it now. The caller must hold the writer's lock.
    pub(super) async fn catch_up(&self, place: &LogLocation, log: &Log) -> Result<Arc<History>, Refused> {
        let mut history = match log.stored() {
            Some(stored) => stored,
            None => log.begin(Arc::new(self.rebuilt(place).await?)),
        };
        // A segment's key is the log's size before the segment, so segments of other replicas are found without a listing.
        while !history.state().has_ended() {
            let Some(stored) = self.stored(place, history.tree().size()).await? else { break };
            history = Arc::new(self.stored_after(&history, &stored.segment, place)?);
            let lost = log.advance(history.clone(), &stored.segment, stored.note);
            self.lost(place, lost).await;
        }
        Ok(log.stored().unwrap_or(history))
    }

    /// Writes held segments that have lost their position beside the log as incidents, because calls may have left by their intents.
    pub(super) async fn lost(&self, place: &LogLocation, segments: Vec<Segment>) {
        for segment in segments {
            let first = segment.first;
            self.metrics.appends.with_label_values(&["lost"]).inc();
            tracing::error!(place = %place.location, first, "records by which calls may have left have lost their place");
            let told = canonical::to_bytes(&serde_json::json!({
                "v": 1, "time": format!("{:.3}", Timestamp::now()), "actor": "gateway", "rule": Rule::LogFork,
                "reason": format!("records from {first} on were witnessed, and others are in their place; calls may have left by them"),
                "segment": String::from_utf8_lossy(&segment.to_bytes()),
            }));
            let Ok(told) = told else { continue };
            let name = format!("{INCIDENTS}{}.json", hex::encode(canonical::sha256(&told)));
            if let Err(error) = self.put_beside(place, &name, told.into()).await {
                tracing::error!(%error, first, "they could not be kept beside the log");
            }
        }
    }

    /// Reads the log from its first segment on.
    pub(in crate::gateway) async fn rebuilt(&self, place: &LogLocation) -> Result<History, Refused> {
        self.read(place, |_| ()).await
    }

    /// Reads the log from its first segment on, and passes each record to `each`.
    pub(super) async fn read(
        &self,
        place: &LogLocation,
        mut each: impl FnMut(&Record) + Send,
    ) -> Result<History, Refused> {
        let firsts = self.firsts(place).await?;
        let mut segments = futures::stream::iter(firsts).map(|first| self.stored(place, first)).buffered(PARALLEL);
        let mut history = History::new(&note::origin(&place.task_uid));
        // Skip a segment that is listed but hidden by now. The segment after it then does not fit, which is an error.
        while let Some(stored) = segments.next().await {
            let Some(Stored { segment, .. }) = stored? else { continue };
            history = self.stored_after(&history, &segment, place)?;
            segment.decode().map_err(|e| broken(&place.key(segment.first), e))?.iter().for_each(&mut each);
        }
        Ok(history)
    }

    /// Returns the first record of each segment in the bucket, in order.
    pub(super) async fn firsts(&self, place: &LogLocation) -> Result<Vec<u64>, Refused> {
        let folder = format!("{}{}", place.location.prefix, segment::FOLDER);
        let keys = self.store(place).await?.list(&folder).await.map_err(|e| self.failed(&e))?;
        let names = keys.iter().filter_map(|key| key.strip_prefix(&place.location.prefix));
        Ok(names.filter_map(Segment::first_of).collect())
    }

    /// Reads a stored segment and verifies the witness's cosignature on it.
    pub(super) async fn stored(&self, place: &LogLocation, first: u64) -> Result<Option<Stored>, Refused> {
        let key = place.key(first);
        let bytes = match self.store(place).await?.get(&key).await {
            Ok(bytes) => bytes,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(self.failed(&error)),
        };
        let segment = Segment::parse(&bytes).map_err(|e| broken(&key, e))?;
        segment.note.verify_cosignature(&self.verifier).map_err(|e| broken(&key, e))?;
        if segment.first != first {
            return Err(broken(&key, format!("its first record is {}", segment.first)));
        }
        Ok(Some(Stored { note: segment.note.to_string(), segment }))
    }

    fn stored_after(&self, history: &History, segment: &Segment, place: &LogLocation) -> Result<History, Refused> {
        history.extended(segment).map_err(|refused| broken(&place.key(segment.first), refused.reason))
    }

    /// Returns the checkpoint over a segment that is already in the bucket, alone or joined with others in one object.
    pub(super) async fn replayed(
        &self,
        place: &LogLocation,
        segment: &Segment,
        history: &History,
    ) -> Result<String, Refused> {
        let mut stored = self.stored(place, segment.first).await?;
        if stored.is_none() {
            let before = self.firsts(place).await?.into_iter().filter(|first| *first < segment.first).max();
            stored = match before {
                Some(first) => self.stored(place, first).await?,
                None => None,
            };
        }
        match stored.filter(|stored| stored.segment.holds(segment)) {
            Some(stored) => Ok(stored.note),
            // The record in its position is the log's end or comes before the end.
            None if history.state().has_ended() => Err(ended()),
            None => Err(forked(segment)),
        }
    }
}
