//! The harness: a sidecar beside the agent that enforces its contracts and budgets and writes its evidence.
//!
//! One pipeline for every call: *decide* ([`policy`](crate::policy)) → *reserve* and *record the intent*
//! ([`journal`]) → *wait until it is stored, or for a read spooled* → *send* ([`link`]) → *record the outcome*. Wire protocols are at the edge:
//! [`mcp`], [`rest`], [`model`], [`proxy`].
//!
//! Promises: the agent can reach it on the pod's loopback only; nothing leaves before its intent lies in the evidence
//! store, or where a tool only reads, in the pod's [`spool`] and in the witness's hands; whatever cannot be decided, recorded or sent is denied. Refuses: a Kubernetes client, credentials of upstreams,
//! name resolution. It is trusted with one token, whose worth ends with the pod.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::string_slice)
)]

/// Asking people before a call leaves.
pub mod approvals;
/// What every reply of ours is made of.
pub mod body;
/// What a tool call may take.
pub mod bounds;
/// The attempt's wall time.
pub mod clock;
/// Refusals of an agent that asks for much that it may not.
mod flood;
/// The pipeline that every call goes through.
pub mod gate;
/// The beginning of a connection, before it is HTTP.
mod head;
/// Records, in order, batched into segments and sent to the witness.
pub mod journal;
/// The connection to the gateway.
pub mod link;
/// Tools, as an MCP server to the agent and an MCP client to upstreams.
pub mod mcp;
/// Model calls, passed through and metered.
pub mod model;
/// One effect for calls that are one.
pub mod once;
/// The containment probe.
pub mod probe;
/// The agent's own traffic, as an HTTP proxy.
pub mod proxy;
/// HTTP tools, as requests of a template.
pub mod rest;
/// The two listeners.
pub mod server;
/// Segments that are not stored yet.
pub mod spool;
/// Rolling back a task.
pub mod undo;

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    evidence::{
        merkle::Tree,
        note::{self, Signer},
        record::{AttemptClosed, AttemptOpened, Containment, Event, Local, Pod},
        state::TaskState,
    },
    policy::{
        access::Guard,
        config::HarnessConfig,
        decide::{Contracts, Denial},
        output::Outputs,
        rule::Rule,
    },
    wire,
};

/// Where the harness finds what it needs.
#[derive(Clone, Debug)]
pub struct Options {
    /// The rendered configuration.
    pub config: PathBuf,
    /// What the probe wrote.
    pub containment: PathBuf,
    /// The projected token.
    pub token: PathBuf,
    /// The folder of segments that are not stored yet.
    pub spool: PathBuf,
    /// This pod, from the downward API.
    pub pod: Pod,
    /// The kubelet of this node, which must not answer: `address:port`.
    pub kubelet: Option<String>,
}

/// Why the harness could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum HarnessError {
    /// A file could not be read or is not what it should be.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        reason: String,
    },
    /// The policy cannot be enforced.
    #[error(transparent)]
    Policy(#[from] crate::policy::decide::CompileError),
    /// What the pack says to calls cannot be enforced.
    #[error(transparent)]
    Pack(#[from] crate::policy::access::CompileError),
    /// An output schema cannot be enforced.
    #[error(transparent)]
    Output(#[from] crate::policy::output::OutputError),
    /// The policy has no canonical form.
    #[error(transparent)]
    Canonical(#[from] crate::canonical::CanonicalError),
    /// The link could not be made.
    #[error(transparent)]
    Link(#[from] link::LinkError),
    /// The gateway refused to open the log.
    #[error("the gateway refused to open this attempt's evidence log: {rule}: {reason}")]
    Refused {
        /// By which rule.
        rule: Rule,
        /// Why.
        reason: String,
    },
    /// The log's head is not one.
    #[error("the gateway's head of the log cannot be continued: {0}")]
    Head(String),
    /// No key could be made.
    #[error(transparent)]
    Key(#[from] note::KeyError),
    /// Containment was not proven.
    #[error("containment is not proven: {0:?}; the agent must not start")]
    Uncontained(Vec<String>),
    /// A listener or a signal handler could not be set up.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The opening record could not be stored.
    #[error("evidence cannot be written: {0}")]
    Evidence(String),
}

/// How long replies may take to be settled that nobody waits for.
const BEHIND: Duration = Duration::from_secs(2);
/// How long the flush of the last records may take; shorter than the pod's grace period of 30 s.
const FLUSH: Duration = Duration::from_secs(20);

/// Reads a JSON file.
///
/// # Errors
/// If it is not there or not of this type; the message names the place.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &std::path::Path) -> Result<T, HarnessError> {
    let file = |reason: String| HarnessError::File { path: path.to_owned(), reason };
    let text = std::fs::read(path).map_err(|error| file(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| file(format!("not the expected JSON: {error}")))
}

/// Why a harness is told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The agent's process has ended by itself, and whoever tells us has waited for it.
    AgentEnded,
    /// A signal. A kubelet sends the same one when the agent has ended, when the agent never ran, and when the pod is deleted, evicted or
    /// out of time: nothing in the pod tells these apart.
    Terminated,
}

/// How the harness ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The agent has ended by itself.
    AgentEnded,
    /// The harness was told to end, in time; what became of the agent is for the pod's status to say.
    Terminated,
    /// So many calls were refused that the task is over. The pod has to be told: nothing in it may stop the agent.
    RefusedEnough,
    /// The attempt's wall time is over; the same holds.
    OutOfTime,
    /// A call that nobody approved in time has ended the task; the same holds.
    Unapproved,
    /// Evidence could not be stored, or the log not be opened, for so long that the task is to be tried again later.
    Parked,
    /// The log cannot go on, for this reason: what happened since is in no log, and whatever the agent says of itself is no success.
    LogFailed(String),
}

impl Ended {
    /// The exit code by which a harness says so: what the operator reads.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::AgentEnded | Self::Terminated => 0,
            Self::RefusedEnough => wire::EXIT_REFUSED_ENOUGH,
            Self::OutOfTime => wire::EXIT_OUT_OF_TIME,
            Self::Unapproved => wire::EXIT_UNAPPROVED,
            Self::Parked => wire::EXIT_PARKED,
            Self::LogFailed(_) => wire::EXIT_LOG_FAILED,
        }
    }

    /// The end that an attempt has come to before, by the rule with which the gateway refuses to open it again.
    fn by(rule: Rule) -> Option<Self> {
        match rule {
            Rule::Denials => Some(Self::RefusedEnough),
            Rule::WallTime => Some(Self::OutOfTime),
            Rule::ToolApproval => Some(Self::Unapproved),
            _ => None,
        }
    }
}

/// Runs the harness until the pod ends it, or the attempt is over: too many calls were refused, its wall time is up, or the task was to
/// end with a call that nobody approved.
///
/// A log that cannot go on ends it at once, whatever the cause: nothing is answered any more as if nothing had happened. It is not closed, as
/// that is a record, too.
///
/// The task is parked where evidence could not be stored for [`journal::PARK`], or calls were denied for that and the agent has ended.
///
/// One that is started again after that says the same again. Where its log was not closed and too many calls were refused before, it
/// goes on refusing and ends with the pod.
///
/// # Errors
/// If it could not start. Once it serves, failures deny calls instead.
pub async fn serve(options: Options) -> Result<Ended, HarnessError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let config: HarnessConfig = read_json(&options.config)?;
    let looking = Arc::new(probe::Targets::new(&config.wiring.probe, options.kubelet));
    let parts = Parts {
        containment: read_json(&options.containment)?,
        config,
        token: options.token,
        spool: options.spool,
        pod: options.pod,
        local: None,
        looking,
        follow: journal::on_stdout(),
    };
    let listeners = || server::Listeners::bind(server::AGENT, server::HEALTH);
    let stop = async move {
        let _ = terminate.recv().await;
        Stop::Terminated
    };
    run(parts, listeners, || {}, stop).await
}

/// What a harness is made of, wherever it runs.
pub struct Parts {
    /// The rendered configuration.
    pub config: HarnessConfig,
    /// What the probe has seen.
    pub containment: Containment,
    /// The file of the token.
    pub token: PathBuf,
    /// The folder of segments that are not stored yet.
    pub spool: PathBuf,
    /// This pod.
    pub pod: Pod,
    /// What stands in for a cluster, where there is none.
    pub local: Option<Local>,
    /// How containment is looked at again.
    pub looking: Arc<dyn probe::Looking>,
    /// Whoever follows what is recorded.
    pub follow: journal::Follow,
}

/// Runs a harness until `stop`, or until the attempt is over; see [`serve`]. It listens once the log is open, and says so by `serving`.
///
/// # Errors
/// If it could not start.
pub async fn run<L>(
    options: Parts,
    listeners: impl FnOnce() -> L,
    serving: impl FnOnce(),
    stop: impl Future<Output = Stop>,
) -> Result<Ended, HarnessError>
where
    L: Future<Output = std::io::Result<server::Listeners>>,
{
    let mut stop = std::pin::pin!(stop);
    let Parts { config, containment, token, local, follow, .. } = options;
    if !containment.contained {
        return Err(HarnessError::Uncontained(containment.breaches));
    }
    // The log of this attempt could not go on, and it does not go on from less than has happened.
    if let Some(reason) = spool::failure(&options.spool) {
        tracing::error!(reason, "the log of this attempt has failed before");
        return Ok(Ended::LogFailed(reason));
    }
    let contracts = Contracts::compile(&config.policy)?;
    let (guard, outputs) = (Guard::compile(&config.policy)?, Outputs::compile(&config.policy.tools)?);
    let policy = gate::Compiled { contracts, guard, outputs };
    let policy_digest = config.policy.digest()?;
    let attempt = config.wiring.attempt;
    let uid = config.policy.task.uid.clone();

    let link = Arc::new(link::Link::new(&config.wiring, token)?);
    let file = |error: std::io::Error| HarnessError::File { path: options.spool.clone(), reason: error.to_string() };
    let (mut spool, left) = spool::Spool::open(&options.spool).map_err(file)?;
    // Until the log is open there is nothing to end in order: who says stop is heard at once.
    let mut opened = tokio::select! {
        opened = open(&link, attempt, &policy_digest) => opened,
        _ = stop.as_mut() => return Ok(Ended::Terminated),
    };
    // What a harness before this one has recorded, and perhaps acted on: also where there is no policy any more to go on by.
    let size = opened.as_ref().map_or(0, |opened| opened.size);
    let left = left.into_iter().filter(|segment| segment.end() > size);
    let sent = tokio::select! {
        sent = journal::send_left(&link, attempt, left) => sent,
        _ = stop.as_mut() => return Ok(Ended::Terminated),
    };
    match sent {
        Ok(true) if opened.is_ok() => {
            opened = tokio::select! {
                opened = open(&link, attempt, &policy_digest) => opened,
                _ = stop.as_mut() => return Ok(Ended::Terminated),
            };
        }
        Ok(_) => {}
        Err(Denial { rule: rule @ Rule::Evidence, reason }) => {
            opened = opened.and(Err(HarnessError::Refused { rule, reason }));
        }
        // It has happened, and the log will not have it: its counters are lower than the truth.
        Err(Denial { rule, reason }) if opened.is_ok() => {
            let reason = format!("the witness refused what was recorded before a restart: {rule}: {reason}");
            return Ok(log_failed(&options.spool, reason));
        }
        Err(_) => {}
    }
    let opened = match opened {
        Err(HarnessError::Refused { rule, reason }) if let Some(ended) = Ended::by(rule) => {
            tracing::warn!(%rule, reason, "this attempt is over already");
            return Ok(ended);
        }
        // Patience was shown in opening it.
        Err(HarnessError::Refused { rule: Rule::Evidence, reason }) => {
            tracing::error!(reason, "the log cannot be opened; the task is to be parked");
            return Ok(Ended::Parked);
        }
        opened => opened?,
    };
    spool.clear().map_err(file)?;
    let head = |error: &dyn std::fmt::Display| HarnessError::Head(error.to_string());
    let frontier = opened.decoded_frontier().map_err(|error| head(&error))?;
    let tree = Tree::from_frontier(opened.size, frontier).map_err(|error| head(&error))?;
    let expected = note::origin(&uid);
    if opened.origin != expected {
        return Err(HarnessError::Head(format!("expected origin {expected}, found {}", opened.origin)));
    }
    let signer = Signer::generate(&note::attempt_key_name(&uid, attempt))?;
    let key = signer.verifier().to_string();

    let rollback = opened.state.undoing.as_ref().map(|undoing| undoing.plan.clone());
    let definitions = opened.state.tools.clone();
    let state = TaskState::resume(&expected, opened.state);
    let journal = journal::Journal::start(
        journal::Start { attempt, tree, signer, origin: expected, state, spool, follow },
        link.clone(),
    );
    let first = journal
        .record(|_, _| {
            Ok(Event::AttemptOpened(Box::new(AttemptOpened {
                key,
                policy: config.policy.clone(),
                pod: options.pod.clone(),
                containment,
                rollback,
                local,
            })))
        })
        .map_err(|denial| HarnessError::Evidence(denial.reason))?;
    tokio::select! {
        stored = journal.stored(first) => stored.map_err(|denial| HarnessError::Evidence(denial.reason))?,
        _ = stop.as_mut() => return Ok(Ended::Terminated),
    }

    let seconds = |count: i64| Duration::from_secs(u64::try_from(count).unwrap_or(0));
    let limits = config.policy.limits;
    let clock = clock::Clock::start(seconds(limits.wall_time_seconds), seconds(limits.approval_wait_seconds));
    let approvals = approvals::Approvals::new(link.clone(), journal.clone(), clock.clone());
    let once = once::Once::new(opened.keeps_results, opened.salt.clone());
    let gate = gate::Gate::new(policy, once, opened.salt, journal.clone(), link, clock.clone(), approvals.clone());
    let tools = mcp::Tools::new(Arc::new(gate), &definitions, mcp::LISTING_AGE);
    let gate = tools.gate().clone();
    let listeners = listeners().await?;
    let reprobing = tokio::spawn(probe::repeat(gate.clone(), options.looking));
    let served = server::serve(tools, listeners)?;
    tracing::info!(attempt, "serving");
    serving();

    // The first call of a model need not wait for it.
    tokio::task::spawn_blocking(crate::policy::model::estimate::prepare);
    let over_before = journal.open().is_err();
    let mut ended = tokio::select! {
        why = stop.as_mut() => match why {
            Stop::AgentEnded => Ended::AgentEnded,
            Stop::Terminated => Ended::Terminated,
        },
        () = gate.refused_enough(), if !over_before => Ended::RefusedEnough,
        () = clock.over() => Ended::OutOfTime,
        () = approvals.ended() => Ended::Unapproved,
        () = journal.stalled() => Ended::Parked,
        failed = journal.failed() => Ended::LogFailed(failed.reason),
    };
    tracing::info!(?ended, "closing the log");
    reprobing.abort();
    if journal.open().is_err() {
        ended = Ended::RefusedEnough;
    }
    if matches!(ended, Ended::AgentEnded | Ended::Terminated) && journal.has_kept_waiting() {
        ended = Ended::Parked;
    }
    match journal.failure() {
        Some(failed) => gate.stop(failed.rule, &failed.reason),
        None => gate.stop(Rule::TaskClosed, "the attempt has ended"),
    }
    served.drain().await;
    // It ends at once now; what it has to record comes before the end.
    if tokio::time::timeout(BEHIND, gate.nothing_behind()).await.is_err() {
        tracing::warn!("replies of models were still read after {BEHIND:?}");
    }
    let reason = match ended {
        // It takes no record any more.
        Ended::LogFailed(reason) => return Ok(log_failed(&options.spool, reason)),
        Ended::AgentEnded => AttemptClosed::AGENT_ENDED,
        Ended::Terminated => AttemptClosed::TERMINATED,
        Ended::RefusedEnough => AttemptClosed::DENIALS,
        Ended::OutOfTime => AttemptClosed::WALL_TIME,
        Ended::Unapproved => AttemptClosed::UNAPPROVED,
        Ended::Parked => AttemptClosed::PARKED,
    };
    gate.count_waiting(None);
    let closed = journal.record(|_, _| Ok(Event::AttemptClosed(AttemptClosed { reason: reason.into() })));
    if let Ok(last) = closed
        && tokio::time::timeout(FLUSH, journal.stored(last)).await.is_err()
    {
        tracing::error!(
            "the last records could not be stored in {FLUSH:?}; the operator will seal the log without them"
        );
    }
    // Also where it failed after everything else had ended: what the agent did last is in no log.
    Ok(match journal.failure() {
        Some(failed) => log_failed(&options.spool, failed.reason),
        None => ended,
    })
}

/// Has a harness that is started again in this pod know that the log has failed: it would find the counters of the last record that was
/// stored, and go on from less than was used.
fn log_failed(spool: &std::path::Path, reason: String) -> Ended {
    if let Err(error) = spool::note_failure(spool, &reason) {
        tracing::error!(%error, "that the log has failed could not be noted for a restart");
    }
    Ended::LogFailed(reason)
}

/// Opens the log. The gateway may not have seen the task's objects yet, and may be starting: both pass.
async fn open(link: &link::Link, attempt: i64, digest: &str) -> Result<crate::wire::OpenReply, HarnessError> {
    const PATIENCE: Duration = Duration::from_secs(60);
    let started = tokio::time::Instant::now();
    let mut pause = Duration::from_millis(50);
    loop {
        let error = match link.open(attempt, digest).await {
            Ok(reply) => return Ok(reply),
            Err(error) => error,
        };
        let transient = match &error {
            link::CallError::Refused(denial) => {
                matches!(
                    denial.rule,
                    Rule::ConfigDigest | Rule::IdentityAttempt | Rule::IdentitySource | Rule::Evidence
                )
            }
            link::CallError::Unreachable(_) => true,
        };
        if !transient || started.elapsed() > PATIENCE {
            return Err(match error {
                link::CallError::Refused(denial) => HarnessError::Refused { rule: denial.rule, reason: denial.reason },
                link::CallError::Unreachable(reason) => HarnessError::Refused { rule: Rule::Evidence, reason },
            });
        }
        tracing::info!(%error, "the log is not open yet");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(2));
    }
}
