//! The witness: checks each segment of evidence, cosigns it, and stores it in the bucket under a lock.
//!
//! Guarantees: a reply to [`Until::Stored`] means that the segment is in the bucket under its retention. A reply to [`Until::Witnessed`]
//! means that the segment is checked, has its position in the log, and is queued for the bucket ahead of all later segments. If two
//! segments claim the same position, one wins, whichever replicas receive them. Sending the same segment again has the same result. All
//! other memory is a cache: any replica can rebuild a log, including its signatures, from the bucket.
//!
//! Rejects: anything that [`history`] does not accept, a pod that is not contained, a policy other than the one that the gateway compiled,
//! and records after the end of the log. Only tool reads and model calls may leave before the bucket has their intent: until then the
//! witness and the pod's spool hold it.
//!
//! ```text
//! admit (who, what) ─▶ catch up ─▶ extended (history) ─▶ hold ─▶ reply: witnessed
//!                         ▲                                │
//!                         │ exists          several at once▼
//!                         └──────────────── cosign ─▶ put if none ─▶ advance ─▶ reply: stored
//! ```

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture};
use jiff::Timestamp;
use ring::rand::SystemRandom;

use super::{identity::HarnessIdentity, metrics::Metrics, refusal::Refused};
use crate::{
    canonical::{self, CanonicalError},
    evidence::{
        dsse::Envelope,
        ending::{self, Ending},
        log::INCIDENTS,
        merkle::leaf_hash,
        note::{self, Checkpoint, Note, Signer, VerifierKey},
        record::{Actor, Channel, Event, Record, TaskClosed, VERSION},
        rollback::{self, CompensationState, Plan, Planner, Undoing},
        segment::{self, Segment},
        state::Snapshot,
        store::{Location, PutError, Retention, Store, StoreError},
        tiles::File,
    },
    policy::{
        approval::CallKey,
        commit::Salt,
        config::{RollbackOf, Usage},
        rule::Rule,
        shorten::shorten,
    },
    wire::{AppendReply, AppendRequest, OpenReply, OpenRequest, SealReply, SealRequest, Until},
};

/// The state of a log and the checks of its next segment.
pub mod history;
/// One log in memory.
mod log;

use log::{Batch, Log, PendingMatch, Sent};

pub use history::{Before, History, IntentFacts, Undoes};

/// Maximum number of logs in memory. The least recently used logs are dropped and are rebuilt from the bucket when needed.
const CACHED: usize = 4096;
/// Number of segments that are read concurrently when a log is rebuilt.
const PARALLEL: usize = 8;
/// Name of the object with the salt, in its folder.
const SALT: &str = "commitments";
/// Maximum number of rollbacks that may take the same call, one after the other.
const ROLLBACKS: u32 = 16;
/// Time limit for reading a log to find the compensations of its task while the log is sealed, because the caller of `seal` does not wait
/// without end.
const PLAN_TIME: Duration = Duration::from_secs(15);
/// Maximum number of messages that may leave by one intent of a listing: pages of lists, and the session messages of an MCP session during
/// its whole life. A session that has used them up is followed by another session with its own intent.
const TALK: u32 = 512;
/// Maximum length of a call's name in an object key, in bytes.
const LONGEST_CALL: usize = 64;
/// Delays between attempts to store a segment after a failure: the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Time limit for queued segments to reach the bucket before a log is read or sealed.
const SETTLE: Duration = Duration::from_secs(10);
/// Maximum number of attempts to append a segment when other replicas store segments meanwhile.
const TRIES: u32 = 4;
/// Maximum number of attempts to seal a log while the harness's last segments take its position.
const SEAL_TRIES: u32 = 8;

/// Buckets by name.
pub trait Buckets: Send + Sync {
    /// Returns the bucket. Does not access it yet.
    fn bucket<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Arc<dyn Store>, StoreError>>;

    /// Returns the URL of the object store, if it is not AWS.
    fn endpoint(&self) -> Option<String>;
}

/// Where the salt of a task's commitments is: in the pack's state bucket, or, without one, derived from the witness's key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SaltLocation {
    /// The task's UID.
    pub task_uid: String,
    /// Folder of the salt in the state bucket.
    pub location: Option<Location>,
}

/// Where a log is stored, and how long its segments are locked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLocation {
    /// Bucket and prefix. The prefix ends with a slash.
    pub location: Location,
    /// The task's UID.
    pub task_uid: String,
    /// The pack's retention. Without it the bucket's default retention applies.
    pub retention: Option<Retention>,
}

impl LogLocation {
    fn key(&self, first: u64) -> String {
        format!("{}{}", self.location.prefix, Segment::key(first))
    }
}

struct Cached {
    log: Arc<Log>,
    used: Instant,
}

/// The witness.
pub struct Witness {
    signer: Signer,
    verifier: VerifierKey,
    buckets: Arc<dyn Buckets>,
    metrics: Metrics,
    logs: Mutex<HashMap<(String, String), Cached>>,
    salts: Mutex<HashMap<SaltLocation, Salt>>,
}

/// The lock of a log's writer. Its holder may take segments.
type Writer<'l> = tokio::sync::MutexGuard<'l, ()>;

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

/// A segment as it is stored in the bucket.
struct Stored {
    segment: Segment,
    note: String,
}

impl Witness {
    /// Returns a witness that signs with this key.
    pub fn new(signer: Signer, buckets: Arc<dyn Buckets>, metrics: Metrics) -> Self {
        let verifier = signer.verifier();
        Self { signer, verifier, buckets, metrics, logs: Mutex::default(), salts: Mutex::default() }
    }

    /// Returns the state of a task's log to an attempt that opens it. `digest` is the digest of the policy that the gateway compiled, `of`
    /// is the place of the log that this task rolls back.
    ///
    /// # Errors
    /// Returns a denial with the violated rule, or [`Rule::Evidence`] if the bucket cannot be read.
    pub async fn open(
        &self,
        place: &LogLocation,
        principal: &HarnessIdentity,
        request: &OpenRequest,
        digest: &str,
        of: Option<&LogLocation>,
        (salt, keeps_results): (Salt, bool),
    ) -> Result<OpenReply, Refused> {
        own_attempt(principal, request.attempt)?;
        same_policy(&request.policy_digest, digest)?;
        let log = self.log(place);
        let (_writer, history) = self.settled(place, &log).await?;
        if history.state().has_ended() {
            return Err(ended());
        }
        if let Some(rule) = history.state().terminated_by(principal.attempt) {
            return Err(Refused::denied(rule, "the attempt has come to its end by this rule: it does not open again"));
        }
        if history.state().attempt() > principal.attempt {
            return Err(superseded(principal.attempt, history.state().attempt()));
        }
        let undoing = match (of, history.state().rollback()) {
            (None, _) => None,
            (Some(_), Some(undoing)) => Some(undoing.clone()),
            (Some(of), None) => Some(Undoing::new(self.plan(of).await?)),
        };
        Ok(OpenReply {
            origin: note::origin(&place.task_uid),
            size: history.tree().size(),
            frontier: history.tree().frontier().iter().map(|hash| BASE64.encode(hash)).collect(),
            state: Snapshot { undoing, ..history.state().snapshot(principal.attempt) },
            salt,
            keeps_results,
            open_calls: u64::try_from(history.state().open_calls().len()).unwrap_or(u64::MAX),
        })
    }

    /// Returns the plan that rolls back a task, whose log must have ended.
    ///
    /// # Errors
    /// Returns [`Rule::ToolRollback`] if the log has not ended, or [`Rule::Evidence`] if the bucket cannot be read.
    pub async fn plan(&self, of: &LogLocation) -> Result<Plan, Refused> {
        let refused = |reason: String| Refused::denied(Rule::ToolRollback, reason);
        let mut planner = Planner::default();
        let history = self.read(of, |record| planner.take(record)).await?;
        let origin = note::origin(&of.task_uid);
        if !history.state().has_ended() {
            let size = history.tree().size();
            return Err(refused(format!(
                "expected the log of a task that has ended at {}, found {size} records of {origin}",
                of.location
            )));
        }
        Ok(Plan {
            origin,
            size: history.tree().size(),
            root: BASE64.encode(history.tree().root()),
            steps: planner.steps(),
        })
    }

    /// Takes a call of another task for the rollback `by`, if the gateway's clock says that it is in time. Exactly one rollback compensates
    /// each call, whichever tasks roll back. A call that another rollback has taken stays with that rollback, unless its log has ended and
    /// shows that it certainly did nothing about the call. `log` returns the place of a task's log by the task's name and UID.
    ///
    /// # Errors
    /// Returns [`Rule::ToolRollback`] if it is too late or another rollback has the call, or [`Rule::Evidence`] if the bucket fails.
    pub async fn undo(
        &self,
        of: &LogLocation,
        undoes: &Undoes,
        by: &RollbackOf,
        log: impl Fn(&RollbackOf) -> LogLocation,
    ) -> Result<(), Refused> {
        let Undoes { call, until } = undoes;
        let refused = |reason: String| Err(Refused::denied(Rule::ToolRollback, reason));
        if let Err(late) = rollback::in_time(call, until.as_deref(), Timestamp::now()) {
            return refused(late);
        }
        plain(call)?;
        let store = self.store(of).await?;
        let claim = serde_json::to_vec(by).map_err(|e| Refused::malformed(e.to_string()))?;
        for turn in 0..ROLLBACKS {
            let key = format!("{}rollback/{call}.{turn}", of.location.prefix);
            match store.put_new(&key, claim.clone().into(), of.retention.as_ref()).await {
                Ok(_) => return Ok(()),
                Err(PutError::Exists) => {}
                Err(PutError::Store(error)) => return Err(self.failed(&error)),
            }
            let held = store.get(&key).await.map_err(|error| self.failed(&error))?;
            let holder: RollbackOf = serde_json::from_slice(&held).map_err(|error| broken(&key, error))?;
            if holder == *by {
                return Ok(());
            }
            let other = self.rebuilt(&log(&holder)).await?;
            let standing = other.state().rollback().map(|undoing| undoing.standing(call));
            if !other.state().has_ended() || standing != Some(CompensationState::Due) {
                return refused(format!(
                    "expected {call} to be undone by nobody else, found that {} (UID {}) has taken it and {}",
                    holder.name,
                    holder.uid,
                    if other.state().has_ended() { "may have undone it" } else { "has not ended" }
                ));
            }
        }
        refused(format!("expected {call} to be tried by fewer than {ROLLBACKS} rollbacks; undo it by hand"))
    }

    /// Returns the salt of a task's commitments, and creates it if there is none. A salt in a bucket can be destroyed, and with it
    /// everything that the task's commitments can prove.
    ///
    /// # Errors
    /// Returns [`Rule::Evidence`] if the bucket fails.
    pub async fn salt(&self, at: &SaltLocation) -> Result<Salt, Refused> {
        let salts = || self.salts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(salt) = salts().get(at) {
            return Ok(salt.clone());
        }
        let salt = match &at.location {
            None => Salt::new(self.signer.derived(&format!("belay.dev/salt/{}", at.task_uid))),
            Some(location) => self.stored_salt(location).await?,
        };
        let mut salts = salts();
        if salts.len() >= CACHED {
            salts.clear();
        }
        salts.insert(at.clone(), salt.clone());
        Ok(salt)
    }

    async fn stored_salt(&self, at: &Location) -> Result<Salt, Refused> {
        let store = self.buckets.bucket(&at.bucket).await.map_err(|e| self.failed(&e))?;
        let key = format!("{}{SALT}", at.prefix);
        loop {
            match store.get(&key).await {
                Ok(text) => {
                    let text = String::from_utf8_lossy(&text).into_owned();
                    return Salt::try_from(text).map_err(|e| broken(&key, e));
                }
                Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(self.failed(&error)),
            }
            let random = ring::rand::generate(&SystemRandom::new());
            let new = Salt::new(random.map_err(|_| unavailable("the system has no randomness"))?.expose());
            let text = format!("{}\n", String::from(new.clone()));
            match store.put_new(&key, text.into(), None).await {
                Ok(_) => return Ok(new),
                // Another replica stored a salt first.
                Err(PutError::Exists) => {}
                Err(PutError::Store(error)) => return Err(self.failed(&error)),
            }
        }
    }

    /// Stores data of a call, such as the arguments of its compensation or its result, under its commitment. Does nothing if the object
    /// exists.
    ///
    /// # Errors
    /// Returns [`Rule::Evidence`] if the bucket fails.
    pub async fn keep(&self, at: &Location, call: &str, digest: &str, content: Vec<u8>) -> Result<(), Refused> {
        plain(call)?;
        let store = self.buckets.bucket(&at.bucket).await.map_err(|e| self.failed(&e))?;
        match store.put_new(&format!("{}{call}/{digest}.json", at.prefix), content.into(), None).await {
            Ok(_) | Err(PutError::Exists) => Ok(()),
            Err(PutError::Store(error)) => Err(self.failed(&error)),
        }
    }

    /// Returns stored data of a call, if there is any.
    ///
    /// # Errors
    /// Returns [`Rule::Evidence`] if the bucket fails.
    pub async fn kept(&self, at: &Location, call: &str, digest: &str) -> Result<Option<Vec<u8>>, Refused> {
        plain(call)?;
        plain(digest)?;
        let store = self.buckets.bucket(&at.bucket).await.map_err(|e| self.failed(&e))?;
        match store.get(&format!("{}{call}/{digest}.json", at.prefix)).await {
            Ok(content) => Ok(Some(content.into())),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed(&error)),
        }
    }

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
            Err(_) => "refused",
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
                let reason = "expected the plan that the other task's log makes, found another: open the log again";
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
        let (first, longest) = PAUSES;
        let mut pause = first;
        loop {
            log.due().await;
            let Some(Batch { mut segment, after }) = log.batch() else { return };
            segment.note.cosign(&self.signer, unix_time());
            let refused = match self.put(&place, &segment).await {
                Ok(()) => {
                    let lost = log.advance(after, &segment, segment.note.to_string());
                    self.lost(&place, lost).await;
                    pause = first;
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
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    /// Waits until no segment is queued. Returns the log as the bucket has it, and the writer's lock.
    async fn settled<'l>(&self, place: &LogLocation, log: &'l Log) -> Result<(Writer<'l>, Arc<History>), Refused> {
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

    /// Waits until no log has queued segments.
    pub async fn settle(&self) {
        let logs: Vec<_> = {
            let logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
            logs.values().map(|cached| cached.log.clone()).collect()
        };
        for log in logs {
            while let Some(newest) = log
                .newest()
                .filter(|newest| log.stored().is_none_or(|stored| stored.tree().size() < newest.tree().size()))
            {
                let _ = log.follow().stored(newest.tree().size()).await;
            }
        }
    }

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
            let undone_by = match sealed.undoable() && sealed.state().rollback().is_none() && failed {
                true => self.undone_by(place).await?,
                false => Some(BTreeSet::new()),
            };
            return Ok(SealReply {
                undone_by,
                closed,
                origin: note::origin(&place.task_uid),
                location: place.location.to_string(),
                endpoint: self.buckets.endpoint(),
                size: sealed.tree().size(),
                root: BASE64.encode(sealed.tree().root()),
                usage: sealed.state().usage(),
                refused: sealed.refused(),
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
                Err(broken(&key(&name), "expected what the records come to, found something else"))
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

    /// Returns the contracts of the calls that would roll back a task, or `None` if the log is too long to read in time.
    async fn undone_by(&self, place: &LogLocation) -> Result<Option<BTreeSet<String>>, Refused> {
        let mut planner = Planner::default();
        let read = tokio::time::timeout(PLAN_TIME, self.read(place, |record| planner.take(record))).await;
        read.ok().transpose().map(|read| read.map(|_| planner.contracts()))
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

    /// Returns the state of the log before a call that needs approval, as the bucket has it now.
    ///
    /// # Errors
    /// Returns [`Rule::TaskClosed`] after the end of the log, or [`Rule::Evidence`] if the bucket cannot be read.
    pub async fn before(&self, place: &LogLocation, call: &CallKey) -> Result<Before, Refused> {
        let log = self.log(place);
        let _writer = log.writer.lock().await;
        let stored = self.catch_up(place, &log).await?;
        let history = log.newest().unwrap_or(stored);
        if history.state().has_ended() {
            return Err(ended());
        }
        Ok(history.before(call))
    }

    /// Marks an intent as used: it authorizes one request, whatever its channel. The intent of a listing authorizes up to `TALK` messages
    /// of an MCP session.
    ///
    /// Replicas do not share this mark: an open intent authorizes one request at each replica.
    ///
    /// # Errors
    /// Returns [`Rule::IntentMissing`] if a request has already left by this intent, or if the call has its outcome.
    pub fn claim(&self, place: &LogLocation, intent: &IntentFacts) -> Result<(), Refused> {
        let refused = |reason: String| Err(Refused::denied(Rule::IntentMissing, reason));
        let log = self.log(place);
        let head = log.newest();
        let (most, talks) = if intent.channel == Channel::Listing { (TALK, true) } else { (1, false) };
        // Records that arrived since the intent was looked up count, too. An intent that is no longer known here was denied at the look-up.
        let is_over = |head: &Arc<History>| head.state().intent(intent.seq).is_none_or(|now| !now.open);
        if !talks && head.as_ref().is_some_and(is_over) {
            return refused(format!("the call {:?} has its outcome already", intent.call));
        }
        let mut sent = log.sent.lock().unwrap_or_else(PoisonError::into_inner);
        if sent.len() >= log::SENT {
            sent.retain(|seq, _| head.as_ref().is_none_or(|head| head.state().intent(*seq).is_some()));
        }
        let sent = sent.entry(intent.seq).or_default();
        if sent.times >= most {
            return refused(format!(
                "the call {:?} was sent before: each call has an intent of its own{}",
                intent.call,
                if talks { ", and an MCP session no more messages than its own: open another" } else { "" }
            ));
        }
        sent.times += 1;
        Ok(())
    }

    /// Undoes [`Witness::claim`], because no request left by the intent.
    pub fn release(&self, place: &LogLocation, intent: &IntentFacts) {
        let log = self.log(place);
        let mut sent = log.sent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sent) = sent.get_mut(&intent.seq) {
            sent.times = sent.times.saturating_sub(1);
        }
    }

    /// Allows a call to be sent again because its upstream reported that it did nothing. Works once for each intent, so that an upstream
    /// cannot have a call sent without end.
    pub fn again(&self, place: &LogLocation, intent: &IntentFacts) {
        let log = self.log(place);
        let mut sent = log.sent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sent) = sent.get_mut(&intent.seq).filter(|sent| !sent.again) {
            *sent = Sent { times: sent.times.saturating_sub(1), again: true };
        }
    }

    /// Returns an intent that authorizes a call, by its sequence number. The intent is in the bucket or, for a tool read or a model call,
    /// queued for it.
    ///
    /// # Errors
    /// Returns [`Rule::IntentMissing`] if there is none, [`Rule::TaskClosed`] after the end of the log, or [`Rule::Evidence`] if the bucket
    /// cannot be read.
    pub async fn intent(&self, place: &LogLocation, seq: u64) -> Result<IntentFacts, Refused> {
        let log = self.log(place);
        let has = |head: Option<Arc<History>>, fits: fn(&IntentFacts) -> bool| {
            head.filter(|head| head.state().intent(seq).is_some_and(fits))
        };
        if log.newest().is_some_and(|newest| newest.tree().size() <= seq) {
            log.arrival(seq).await;
        }
        // The state in memory is enough for an intent of a read or of a model call. Before a call that changes something, read the bucket:
        // another replica may have stored the call's outcome, the loss of containment or the end of the task.
        let held = if log.is_fresh() { log.newest() } else { None };
        let known =
            has(held, IntentFacts::leaves_witnessed).or_else(|| has(log.stored(), IntentFacts::changes_nothing));
        let history = match known {
            Some(head) => head,
            None => {
                let _writer = log.writer.lock().await;
                self.catch_up(place, &log).await?
            }
        };
        let newest = log.newest().unwrap_or_else(|| history.clone());
        if history.state().has_ended() || newest.state().has_ended() {
            return Err(ended());
        }
        if history.state().containment_lost() || newest.state().containment_lost() {
            return Err(Refused::denied(
                Rule::ContainmentLost,
                "the attempt has lost its containment: no call leaves any more",
            ));
        }
        let size = history.tree().size();
        if history.state().intent(seq).is_some_and(|intent| log.is_forked(intent.attempt)) {
            let reason =
                "records of this attempt that calls may have left by have lost their place: no call leaves any more";
            return Err(Refused::denied(Rule::LogFork, reason));
        }
        history.state().intent(seq).cloned().ok_or_else(|| {
            let reason = format!(
                "expected record {seq} to be a recent call.intent; the log has {size} records: append the intent first"
            );
            // Another replica may have taken the intent.
            let refused = if seq < size { Refused::denied } else { Refused::retry };
            refused(Rule::IntentMissing, reason)
        })
    }

    /// Checks whether a bucket answers.
    ///
    /// # Errors
    /// Returns an error if it does not.
    pub async fn probe(&self, bucket: &str) -> Result<(), StoreError> {
        // No object has this prefix, because no namespace has such a name.
        self.buckets.bucket(bucket).await?.list("-belay-probe-/").await.map(|_| ())
    }

    /// Writes an object beside a log. An existing object counts as written.
    ///
    /// # Errors
    /// Returns an error if the store fails.
    pub async fn put_beside(&self, place: &LogLocation, name: &str, body: Bytes) -> Result<(), StoreError> {
        let store = self.buckets.bucket(&place.location.bucket).await?;
        let key = format!("{}{name}", place.location.prefix);
        match store.put_new(&key, body, place.retention.as_ref()).await {
            Ok(_) | Err(PutError::Exists) => Ok(()),
            Err(PutError::Store(error)) => Err(error),
        }
    }

    /// Returns the cached log of a place, or adds an empty one.
    fn log(&self, place: &LogLocation) -> Arc<Log> {
        let key = (place.location.bucket.clone(), place.location.prefix.clone());
        let now = Instant::now();
        let mut logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        if logs.len() >= CACHED && !logs.contains_key(&key) {
            // Drop only logs that are not in use: two locks for one log would let two writers in. (They would only lose time, because the
            // bucket decides.)
            let mut idle: Vec<_> =
                logs.iter().filter(|(_, c)| Arc::strong_count(&c.log) == 1).map(|(_, c)| c.used).collect();
            let middle = idle.len() / 2;
            if !idle.is_empty() {
                let (_, median, _) = idle.select_nth_unstable(middle);
                let median = *median;
                logs.retain(|_, c| Arc::strong_count(&c.log) > 1 || c.used > median);
            }
        }
        let cached = logs.entry(key).or_insert_with(|| Cached { log: Arc::default(), used: now });
        cached.used = now;
        cached.log.clone()
    }

    /// Returns the log as the bucket has it now. The caller must hold the writer's lock.
    async fn catch_up(&self, place: &LogLocation, log: &Log) -> Result<Arc<History>, Refused> {
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
    async fn lost(&self, place: &LogLocation, segments: Vec<Segment>) {
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
    async fn rebuilt(&self, place: &LogLocation) -> Result<History, Refused> {
        self.read(place, |_| ()).await
    }

    /// Reads the log from its first segment on, and passes each record to `each`.
    async fn read(&self, place: &LogLocation, mut each: impl FnMut(&Record) + Send) -> Result<History, Refused> {
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
    async fn firsts(&self, place: &LogLocation) -> Result<Vec<u64>, Refused> {
        let folder = format!("{}{}", place.location.prefix, segment::FOLDER);
        let keys = self.store(place).await?.list(&folder).await.map_err(|e| self.failed(&e))?;
        let names = keys.iter().filter_map(|key| key.strip_prefix(&place.location.prefix));
        Ok(names.filter_map(Segment::first_of).collect())
    }

    /// Reads a stored segment and verifies the witness's cosignature on it.
    async fn stored(&self, place: &LogLocation, first: u64) -> Result<Option<Stored>, Refused> {
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
    async fn replayed(&self, place: &LogLocation, segment: &Segment, history: &History) -> Result<String, Refused> {
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

    async fn put(&self, place: &LogLocation, segment: &Segment) -> Result<(), PutError> {
        let store = self.buckets.bucket(&place.location.bucket).await?;
        let body = Bytes::from(segment.to_bytes());
        store.put_new(&place.key(segment.first), body, place.retention.as_ref()).await.map(drop)
    }

    /// Checks, before any call leaves, that the store locks the object with an attempt's policy, with which every attempt begins, as the
    /// pack asks, whoever stored it. Otherwise only an auditor would notice a store that ignores retention.
    async fn is_locked(&self, place: &LogLocation, segment: &Segment) -> Result<(), Refused> {
        let Some(asked) = place.retention.as_ref().filter(|_| !segment.documents.is_empty()) else { return Ok(()) };
        let locked = self.store(place).await?.locked(&place.key(segment.first), asked).await;
        locked.map_err(|error| self.failed(&error))
    }

    async fn store(&self, place: &LogLocation) -> Result<Arc<dyn Store>, Refused> {
        self.buckets.bucket(&place.location.bucket).await.map_err(|e| self.failed(&e))
    }

    fn failed(&self, error: &StoreError) -> Refused {
        let action = match error {
            StoreError::Forbidden { action, .. } | StoreError::Unavailable { action, .. } => action,
            StoreError::NotFound { .. } => "read",
            StoreError::Unlocked { .. } => "lock",
            StoreError::Key(_) => "name",
        };
        self.metrics.store_errors.with_label_values(&[action]).inc();
        tracing::warn!(%error, "the evidence store failed");
        unavailable(match error {
            StoreError::Unlocked { .. } => {
                "the evidence store does not lock what it takes as the pack asks for; nothing leaves"
            }
            _ => "the evidence store cannot be written or read; try again",
        })
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

/// Checks a name that a harness chose and that becomes part of an object key.
fn plain(name: &str) -> Result<(), Refused> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    if (1..=LONGEST_CALL).contains(&name.len()) && name.bytes().all(is_plain) {
        return Ok(());
    }
    Err(Refused::malformed(format!("expected a name of letters and digits, found {:?}", shorten(name))))
}

fn own_attempt(principal: &HarnessIdentity, attempt: i64) -> Result<(), Refused> {
    if principal.attempt == attempt {
        return Ok(());
    }
    Err(Refused::denied(
        Rule::IdentityAttempt,
        format!("the pod is of attempt {}, the request of attempt {attempt}", principal.attempt),
    ))
}

fn same_policy(found: &str, expected: &str) -> Result<(), Refused> {
    if found == expected {
        return Ok(());
    }
    Err(Refused::denied(
        Rule::ConfigDigest,
        format!(
            "the gateway compiles a policy of digest {expected} for this task, the harness runs by {found}: contracts or \
             pack have changed since the attempt was made; a new attempt takes the new policy"
        ),
    ))
}

fn ended() -> Refused {
    Refused::denied(Rule::TaskClosed, "the task has ended: its log takes no more records and no call leaves")
}

fn forked(segment: &Segment) -> Refused {
    Refused {
        status: http::StatusCode::CONFLICT,
        rule: Rule::LogFork,
        reason: format!("record {} is in the log already, and is another one: open the log again", segment.first),
    }
}

fn superseded(attempt: i64, newest: i64) -> Refused {
    Refused::denied(Rule::IdentityAttempt, format!("attempt {attempt} has been followed by attempt {newest}"))
}

fn unavailable(reason: &str) -> Refused {
    Refused::retry(Rule::Evidence, reason)
}

/// Reports an object in the bucket that this witness would not have written. The log cannot continue from there.
fn broken(key: &str, reason: impl std::fmt::Display) -> Refused {
    tracing::error!(key, %reason, "the log in the bucket does not verify");
    unavailable(&format!("the log in the bucket does not verify at {key}: {reason}; ask its administrator"))
}

/// Returns the seconds since 1970.
fn unix_time() -> u64 {
    u64::try_from(Timestamp::now().as_second()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
