//! Measures durable records per second: the harness's own journal and spool, compared with Tessera's driver for a file system.
//!
//! Several callers at a time record an intent, wait until it is in the spool and synced, and record the outcome, which is written with the
//! next records. On the way, a record is encoded canonically, printed as in a pod's log, hashed, and added to the tree and to a segment
//! whose checkpoint is signed. The receiver of the segments acknowledges them at once, because `call` measures the wire and the witness.
//! Tessera gets the same entries, from as many callers that wait in the same way, on the same file system, and takes turns with Belay.
//! Tessera's entries are then in files that are each synced and that a reader can use as they are. Belay's are served in that form once a
//! log has ended.

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context, anyhow, ensure};
use belay::{
    evidence::{
        merkle::Tree,
        note::{self, Note, Signer, VerifierKey, WITNESS_NAME},
        record::{AttemptClosed, Event, Intent, Outcome, TaskClosed},
        state::{TaskState, User},
        store::{Location, Store, StoreError, dir::Dir, log_prefix},
    },
    gateway::{
        buckets::Buckets,
        identity::{HarnessIdentity, Standing},
        metrics::Metrics,
        witness::{LogLocation, Witness},
    },
    harness::{
        gateway_client::CallError,
        journal::{self, Journal, Start, call_id},
        spool::Spool,
    },
    policy::decide::Denial,
    wire::{AppendReply, AppendRequest, SealRequest},
};
use futures::future::{BoxFuture, try_join_all};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    measure::{Measure, percentile},
    processor,
    task::{self, Call, Calls, NAME, NAMESPACE, POD, UID},
};

/// The environment variable of a process that writes. Its value is a [`Work`].
const WORK: &str = "BELAY_BENCH_WORK";
/// The numbers of concurrent callers.
const AT_A_TIME: [usize; 2] = [16, 256];
/// The number of calls of each caller in a turn, with two records each, and the number of turns.
const CALLS: usize = 200;
const TURNS: usize = 3;
/// The goal in records per second and core.
const GOAL: f64 = 50_000.0;
/// The file to which the writer reports what it took.
const TOOK: &str = "took.json";

/// The work of a writer process.
#[derive(Serialize, Deserialize)]
enum Work {
    /// Writes `calls` calls of each of `callers` callers to the spool.
    Spool { callers: usize, calls: usize },
    /// Writes a log of `calls` calls, witnessed and sealed.
    Log { calls: usize },
}

/// The time that writing took.
#[derive(Serialize, Deserialize)]
struct Took {
    /// Seconds of wall time.
    seconds: f64,
    /// Seconds of CPU time.
    processor: f64,
    /// The duration of each wait, in milliseconds.
    waits: Vec<f64>,
}

/// Does the work in the current folder if this process is a writer, and returns whether it was.
pub async fn child() -> anyhow::Result<bool> {
    let Ok(work) = std::env::var(WORK) else { return Ok(false) };
    match serde_json::from_str(&work)? {
        Work::Spool { callers, calls } => {
            let took = spool(callers, calls).await?;
            std::fs::write(TOOK, serde_json::to_vec(&took)?)?;
        }
        Work::Log { calls } => log(calls).await?,
    }
    Ok(true)
}

/// Starts a writer process in a new folder. Its output goes to the file `records` there, as to a pod's log.
fn run(folder: &Path, work: &Work) -> anyhow::Result<()> {
    std::fs::create_dir(folder)?;
    let status = Command::new(std::env::current_exe()?)
        .env(WORK, serde_json::to_string(work)?)
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(folder.join("records"))?)
        .status()?;
    ensure!(status.success(), "the writer ended with {status}");
    Ok(())
}

/// Writes a log of `calls` calls that ends in order, to a new folder. Returns the store, the log's prefix in it, and the witness's key.
pub fn written(folder: &Path, calls: usize) -> anyhow::Result<(Dir, String, VerifierKey)> {
    run(folder, &Work::Log { calls })?;
    let key = std::fs::read_to_string(folder.join("witness.vkey"))?.trim().parse()?;
    Ok((Dir::new(folder.join("bucket")), place().location.prefix, key))
}

/// Measures both sides in turns.
pub fn write(folder: &Path) -> anyhow::Result<Vec<Measure>> {
    let tessera = std::env::var("BELAY_TESSERA").context("BELAY_TESSERA names no program; `make bench` builds it")?;
    let mut measures = Vec::new();
    for callers in AT_A_TIME {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for turn in 0..TURNS {
            let at = |side: &str| folder.join(format!("{side}-{callers}-{turn}"));
            let (mine, other) = (at("belay"), at("tessera"));
            run(&mine, &Work::Spool { callers, calls: CALLS })?;
            ours.push(serde_json::from_slice::<Took>(&std::fs::read(mine.join(TOOK))?)?);
            // All lines but the policy and the record that opens the attempt.
            let shown = std::fs::read_to_string(mine.join("records"))?;
            let entries: Vec<&str> = shown.lines().skip(2).collect();
            ensure!(entries.len() == 2 * callers * CALLS, "expected two records a call, found {}", entries.len());
            std::fs::create_dir(&other)?;
            std::fs::write(other.join("entries"), entries.join("\n"))?;
            theirs.push(peer(&tessera, &other, callers)?);
            std::fs::remove_dir_all(&mine)?;
            std::fs::remove_dir_all(&other)?;
        }
        let records = (2 * callers * CALLS * TURNS) as f64;
        let rate = |side: &[Took], of: fn(&Took) -> f64| records / side.iter().map(of).sum::<f64>();
        let name = |what: &str| format!("evidence.write.{callers}.{what}");
        let mut add = |what: &str, of: fn(&Took) -> f64| {
            let (value, baseline) = (rate(&ours, of), rate(&theirs, of));
            measures.push(Measure::at_least(name(what), value, "1/s", records as usize, GOAL).beside(baseline));
        };
        add("per-core", |took| took.processor);
        add("wall", |took| took.seconds);
        let waits = |side: Vec<Took>| side.into_iter().flat_map(|took| took.waits).collect::<Vec<_>>();
        let (mut ours, mut theirs) = (waits(ours), waits(theirs));
        for percent in [50.0, 99.0] {
            let [value, baseline] = [&mut ours, &mut theirs].map(|waits| percentile(waits, percent));
            measures.push(Measure::against(name(&format!("ack-p{percent}")), value, "ms", ours.len(), baseline, 1.0));
        }
    }
    Ok(measures)
}

/// Runs Tessera with the entries in this folder.
fn peer(program: &str, folder: &Path, callers: usize) -> anyhow::Result<Took> {
    let output = Command::new(program)
        .args([folder.join("log"), folder.join("entries")])
        .arg(callers.to_string())
        .stdin(Stdio::null())
        .stderr(std::fs::File::create(folder.join("stderr"))?)
        .output()
        .with_context(|| program.to_owned())?;
    let said = || std::fs::read_to_string(folder.join("stderr")).unwrap_or_default();
    ensure!(output.status.success(), "{program} ended with {}: {}", output.status, said());
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn denied(denial: Denial) -> anyhow::Error {
    anyhow!("{}: {}", denial.rule, denial.reason)
}

/// Starts a journal with its spool in the current folder, and opens the attempt.
async fn journal(witness: Arc<dyn journal::Witness>) -> anyhow::Result<Arc<Journal>> {
    let signer = Signer::generate(&note::attempt_key_name(UID, 1))?;
    let key = signer.verifier().to_string();
    let start = Start {
        attempt: 1,
        tree: Tree::new(),
        signer,
        origin: note::origin(UID),
        state: TaskState::new(User::Harness, &note::origin(UID)),
        spool: Spool::open(Path::new("."))?.0,
        follow: journal::on_stdout(),
    };
    let journal = Journal::start(start, witness);
    let opened = task::opened(key)?;
    let first = journal.record(|_, _| Ok(Event::AttemptOpened(Box::new(opened)))).map_err(denied)?;
    journal.stored(first).await.map_err(denied)?;
    Ok(journal)
}

/// Records an intent, as the gate does.
async fn intend(journal: &Journal, intent: Intent) -> Result<u64, Denial> {
    journal.wait_for_capacity().await;
    journal.record(|seq, task| {
        task.budget().open()?;
        Ok(Event::Intent(Intent { call: call_id(seq), ..intent }))
    })
}

/// Records the outcome.
fn settle(journal: &Journal, intent: u64, outcome: Outcome) -> Result<u64, Denial> {
    journal.record(|_, _| Ok(Event::Outcome(Outcome { call: call_id(intent), ..outcome })))
}

async fn spool(callers: usize, calls: usize) -> anyhow::Result<Took> {
    let made = Calls::new()?;
    let prepared = (0..callers)
        .map(|caller| (0..calls).map(|call| made.call(caller * calls + call)).collect())
        .collect::<anyhow::Result<Vec<Vec<Call>>>>()?;
    let journal = journal(Arc::new(AtOnce)).await?;
    let (busy, started) = (processor::seconds("self")?, Instant::now());
    let callers = prepared.into_iter().map(|calls| tokio::spawn(caller(journal.clone(), calls)));
    let mut waits = Vec::new();
    let mut last = 0;
    for caller in try_join_all(callers).await? {
        let (waited, outcome) = caller.map_err(denied)?;
        waits.extend(waited);
        last = last.max(outcome);
    }
    journal.spooled(last).await.map_err(denied)?;
    let (seconds, processor) = (started.elapsed().as_secs_f64(), processor::seconds("self")? - busy);
    Ok(Took { seconds, processor, waits })
}

/// Makes the calls of one caller, one after the other. Returns the duration of each wait, and the last outcome.
async fn caller(journal: Arc<Journal>, calls: Vec<Call>) -> Result<(Vec<f64>, u64), Denial> {
    let (mut waits, mut last) = (Vec::with_capacity(calls.len()), 0);
    for Call { intent, outcome } in calls {
        let started = Instant::now();
        let intent = intend(&journal, intent).await?;
        journal.spooled(intent).await?;
        waits.push(started.elapsed().as_secs_f64() * 1e3);
        last = settle(&journal, intent, outcome)?;
    }
    Ok((waits, last))
}

/// A witness that acknowledges every segment at once.
struct AtOnce;

impl journal::Witness for AtOnce {
    fn append<'a>(&'a self, request: &'a AppendRequest) -> BoxFuture<'a, Result<AppendReply, CallError>> {
        let end = || {
            let header: Value = serde_json::from_str(request.segment.lines().next()?).ok()?;
            Note::parse(header["checkpoint"].as_str()?).ok()?.checkpoint().ok()
        };
        let size = end().map(|checkpoint| checkpoint.size);
        let reply = size.map(|size| AppendReply { size, checkpoint: None });
        Box::pin(async move { reply.ok_or_else(|| CallError::Unreachable("the segment has no checkpoint".into())) })
    }
}

/// The gateway's witness, called without a network between.
struct Gateway {
    witness: Arc<Witness>,
    digest: String,
}

impl journal::Witness for Gateway {
    fn append<'a>(&'a self, request: &'a AppendRequest) -> BoxFuture<'a, Result<AppendReply, CallError>> {
        Box::pin(async move {
            let (place, principal) = (place(), principal());
            let appended = self.witness.append(&place, &principal, request, Ok(self.digest.as_str()), None).await;
            appended.map(|(reply, _)| reply).map_err(|refused| match refused.is_retryable() {
                true => CallError::Unreachable(refused.to_string()),
                false => CallError::Refused(Denial { rule: refused.rule, reason: refused.reason }),
            })
        })
    }
}

/// A folder in place of every bucket.
struct Folder(Dir);

impl Buckets for Folder {
    fn bucket<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Arc<dyn Store>, StoreError>> {
        let store: Arc<dyn Store> = Arc::new(self.0.clone());
        Box::pin(async { Ok(store) })
    }

    fn endpoint(&self) -> Option<String> {
        None
    }
}

fn place() -> LogLocation {
    let prefix = log_prefix(None, NAMESPACE, NAME, UID);
    LogLocation { location: Location { bucket: "evidence".into(), prefix }, task_uid: UID.into(), retention: None }
}

fn principal() -> HarnessIdentity {
    HarnessIdentity {
        namespace: NAMESPACE.into(),
        task: NAME.into(),
        task_uid: UID.into(),
        attempt: 1,
        pod: POD.into(),
        pod_uid: POD.into(),
        standing: Standing::Live,
    }
}

async fn log(calls: usize) -> anyhow::Result<()> {
    let signer = Signer::generate(WITNESS_NAME)?;
    std::fs::write("witness.vkey", format!("{}\n", signer.verifier()))?;
    let metrics = Metrics::new(&prometheus::Registry::new())?;
    let witness = Arc::new(Witness::new(signer, Arc::new(Folder(Dir::new("bucket"))), metrics));
    let digest = task::policy()?.digest()?;
    let journal = journal(Arc::new(Gateway { witness: witness.clone(), digest })).await?;
    let made = Calls::new()?;
    for number in 0..calls {
        let Call { intent, outcome } = made.call(number)?;
        let intent = intend(&journal, intent).await.map_err(denied)?;
        settle(&journal, intent, outcome).map_err(denied)?;
    }
    let closed = AttemptClosed { reason: "agentEnded".into() };
    let last = journal.record(|_, _| Ok(Event::AttemptClosed(closed))).map_err(denied)?;
    journal.stored(last).await.map_err(denied)?;
    let sealed = SealRequest {
        namespace: NAMESPACE.into(),
        name: NAME.into(),
        uid: UID.into(),
        attempt: 1,
        bucket: "evidence".into(),
        prefix: String::new(),
        closed: TaskClosed {
            phase: "Succeeded".into(),
            failure_class: String::new(),
            reason: "Completed".into(),
            exit_code: Some(0),
            images: Default::default(),
        },
        presumed: false,
    };
    witness.seal(&place(), &sealed).await?;
    Ok(())
}
