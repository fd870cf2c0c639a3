//! The harness: a container beside the agent that enforces contracts and limits and writes evidence.
//!
//! Every call goes through one pipeline: *decide* ([`policy`](crate::policy)) → *reserve* and *record the intent* ([`journal`]) → *wait
//! until the intent is stored, or spooled for a tool read or a model call* → *send* ([`gateway_client`]) → *record the outcome*. The
//! protocols of agents are at one edge: [`mcp`], [`model`], [`proxy`]. Those of tools' upstreams are at the other: `upstream`. [`tools`] is
//! the pipeline of tool calls between them.
//!
//! Guarantees: the agent reaches the harness on the pod's loopback only. A call leaves after its intent is in the evidence bucket; a tool
//! read or a model call leaves after its intent is in the pod's [`spool`] and the witness has it. A call that cannot be decided, recorded
//! or sent is denied.
//!
//! Non-goals: a Kubernetes client, credentials of upstreams, and name resolution. The harness holds one token, which is worthless once the
//! pod ends.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::string_slice)
)]

/// Approvals that a call waits for before it leaves.
pub mod approvals;
/// The response body type.
pub mod body;
/// Limits on the time and the bytes of a tool call.
pub mod bounds;
/// The attempt's wall time.
pub mod clock;
/// The rollback of a task.
pub mod compensation;
/// Idempotency: duplicate calls take effect once.
pub mod dedup;
/// The pipeline that every call goes through.
pub mod gate;
/// The client for the gateway.
pub mod gateway_client;
/// The head of a connection's first request, before the HTTP library parses it.
mod head;
/// The log of the attempt: records in order, batched into segments and sent to the witness.
pub mod journal;
/// The MCP server that the agent sees.
pub mod mcp;
/// Model calls, passed through and metered.
pub mod model;
/// The containment probe.
pub mod probe;
/// The agent's own connections, through an HTTP proxy.
pub mod proxy;
/// The two listeners.
pub mod server;
/// Segments that are not stored yet.
pub mod spool;
/// The pipeline of all tool calls.
pub mod tools;
/// Upstreams of tools.
mod upstream;

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    ends::AttemptEnd,
    evidence::{
        merkle::Tree,
        note::{self, Signer},
        record::{AttemptClosed, AttemptOpened, Containment, Event, Local, Pod},
        state::TaskState,
    },
    in_process::InProcess,
    policy::{
        access::AccessPolicy,
        config::HarnessConfig,
        decide::{Contracts, Denial},
        output::Outputs,
        rule::Rule,
    },
    retry,
};

/// The paths and addresses that the harness starts with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The file with the rendered configuration.
    pub config: PathBuf,
    /// The file that the containment probe wrote.
    pub containment: PathBuf,
    /// The file with the projected token.
    pub token: PathBuf,
    /// The folder with the segments that are not stored yet.
    pub spool: PathBuf,
    /// This pod, from the downward API.
    pub pod: Pod,
    /// The kubelet of this node, as `address:port`. It must not answer.
    pub kubelet: Option<String>,
}

/// The reason why the harness could not start or continue.
#[derive(Debug, thiserror::Error)]
pub enum HarnessError {
    /// A file could not be read or has unexpected content.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// The policy cannot be enforced.
    #[error(transparent)]
    Policy(#[from] crate::policy::decide::CompileError),
    /// The pack's rules cannot be enforced.
    #[error(transparent)]
    Pack(#[from] crate::policy::access::CompileError),
    /// An output schema cannot be enforced.
    #[error(transparent)]
    Output(#[from] crate::policy::output::OutputError),
    /// The policy has no canonical form.
    #[error(transparent)]
    Canonical(#[from] crate::canonical::CanonicalError),
    /// The client for the gateway could not be created.
    #[error(transparent)]
    GatewayClient(#[from] gateway_client::LinkError),
    /// The gateway rejected the request to open the log.
    #[error("the gateway refused to open this attempt's evidence log: {rule}: {reason}")]
    Refused {
        /// The rule that rejected it.
        rule: Rule,
        /// The reason.
        reason: String,
    },
    /// The log's head from the gateway cannot be continued.
    #[error("the gateway's head of the log cannot be continued: {0}")]
    Head(String),
    /// The attempt's key could not be created.
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

/// The maximum wait at the end for replies that are read only to settle them.
const BEHIND: Duration = Duration::from_secs(2);
/// The maximum wait for the last records to be stored. It is shorter than the pod's grace period of 30 s.
const FLUSH: Duration = Duration::from_secs(20);

/// Reads a JSON file.
///
/// # Errors
/// Returns an error if the file does not exist or is not of this type. The error names the file.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &std::path::Path) -> Result<T, HarnessError> {
    let file = |reason: String| HarnessError::File { path: path.to_owned(), reason };
    let text = std::fs::read(path).map_err(|error| file(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| file(format!("not the expected JSON: {error}")))
}

/// The reason why a harness is asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The agent's process has ended by itself, and the caller has waited for it.
    AgentEnded,
    /// A signal. A kubelet sends the same signal when the agent has ended, when the agent never ran, and when the pod is deleted, evicted
    /// or out of time. Nothing in the pod distinguishes these cases.
    Terminated,
}

/// How the harness ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this end, which the log has, unless the records that were last could not be stored. The agent must be stopped from outside if
    /// it still runs, because nothing in the pod can stop it.
    By(AttemptEnd),
    /// The log failed, for this reason. What happened since is in no log, so the agent's own exit code does not count as success.
    LogFailed(String),
}

impl Ended {
    /// Returns the end, without the reason of a failed log.
    pub fn end(&self) -> AttemptEnd {
        match self {
            Self::By(end) => *end,
            Self::LogFailed(_) => AttemptEnd::LogFailed,
        }
    }
}

/// Runs the harness until the pod ends it or the attempt is over. An attempt is over when its limit on denials is reached, when its wall
/// time is over, or when a request for approval with `onTimeout: EndTask` expires.
///
/// A failed log ends the harness at once, whatever the cause, so that no call is answered as if nothing had happened. The harness does not
/// write `attempt.closed` in this case, because that is a record, too.
///
/// The task is parked if a record could not be stored for [`journal::PARK`], or if calls were denied because their records were not stored
/// in time and the agent has ended.
///
/// A harness that is restarted after an end reports the same end. If an earlier harness reached the limit on denials but did not close the
/// log, a restarted harness continues to deny calls and ends with the pod.
///
/// # Errors
/// Returns an error if the harness could not start. Once it serves, failures deny calls instead.
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
        gateway: None,
    };
    let listeners = || server::Listeners::bind(server::AGENT, server::HEALTH);
    let stop = async move {
        let _ = terminate.recv().await;
        Stop::Terminated
    };
    run(parts, listeners, || {}, stop).await
}

/// The inputs of a harness, in a pod or outside a cluster.
pub struct Parts {
    /// The rendered configuration.
    pub config: HarnessConfig,
    /// The result of the containment probe.
    pub containment: Containment,
    /// The file with the token.
    pub token: PathBuf,
    /// The folder with the segments that are not stored yet.
    pub spool: PathBuf,
    /// This pod.
    pub pod: Pod,
    /// What replaces the cluster's isolation and evidence bucket when there is no cluster.
    pub local: Option<Local>,
    /// The containment probe that runs again during the attempt.
    pub looking: Arc<dyn probe::Looking>,
    /// The function that gets each record.
    pub follow: journal::Follow,
    /// The gateway in the same process, whose threads also serve the agent. If absent, the gateway is the one of the wiring, and the agent is
    /// served on threads of its own.
    pub gateway: Option<InProcess>,
}

/// Runs a harness until `stop` is ready or the attempt is over; see [`serve`]. It listens once the log is open and then calls `serving`.
///
/// # Errors
/// Returns an error if the harness could not start.
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
    let Parts { config, containment, token, local, follow, gateway, .. } = options;
    if !containment.contained {
        return Err(HarnessError::Uncontained(containment.breaches));
    }
    // The log of this attempt has failed before. It must not continue, because it would lack some of what has happened.
    if let Some(reason) = spool::failure(&options.spool) {
        tracing::error!(reason, "the log of this attempt has failed before");
        return Ok(Ended::LogFailed(reason));
    }
    let contracts = Contracts::compile(&config.policy)?;
    let (guard, outputs) = (AccessPolicy::compile(&config.policy)?, Outputs::compile(&config.policy.tools)?);
    let policy = gate::Compiled { contracts, guard, outputs };
    let policy_digest = config.policy.digest()?;
    let attempt = config.wiring.attempt;
    let uid = config.policy.task.uid.clone();

    let link = Arc::new(gateway_client::GatewayClient::new(&config.wiring, token, gateway.clone())?);
    let file = |error: std::io::Error| HarnessError::File { path: options.spool.clone(), reason: error.to_string() };
    let (mut spool, left) = spool::Spool::open(&options.spool).map_err(file)?;
    // There is nothing to close until the log is open, so `stop` ends the harness at once.
    let mut opened = tokio::select! {
        opened = open(&link, attempt, &policy_digest) => opened,
        _ = stop.as_mut() => return Ok(Ended::By(AttemptEnd::Terminated)),
    };
    // An earlier harness in this pod recorded these segments and perhaps acted on them. They are sent even if there is no policy to
    // continue with.
    let size = opened.as_ref().map_or(0, |opened| opened.size);
    let left = left.into_iter().filter(|segment| segment.end() > size);
    let sent = tokio::select! {
        sent = journal::send_left(&link, attempt, left) => sent,
        _ = stop.as_mut() => return Ok(Ended::By(AttemptEnd::Terminated)),
    };
    match sent {
        Ok(true) if opened.is_ok() => {
            opened = tokio::select! {
                opened = open(&link, attempt, &policy_digest) => opened,
                _ = stop.as_mut() => return Ok(Ended::By(AttemptEnd::Terminated)),
            };
        }
        Ok(_) => {}
        Err(Denial { rule: rule @ Rule::Evidence, reason }) => {
            opened = opened.and(Err(HarnessError::Refused { rule, reason }));
        }
        // The records tell what has happened, but the witness rejects them. The log's counters are lower than the real ones.
        Err(Denial { rule, reason }) if opened.is_ok() => {
            let reason = format!("the witness rejected the records from before a restart: {rule}: {reason}");
            return Ok(log_failed(&options.spool, reason));
        }
        Err(_) => {}
    }
    let opened = match opened {
        Err(HarnessError::Refused { rule, reason }) if let Some(ended) = AttemptEnd::of_rule(rule).map(Ended::By) => {
            tracing::warn!(%rule, reason, "this attempt is over already");
            return Ok(ended);
        }
        // `open` and `send_left` have already retried for a while.
        Err(HarnessError::Refused { rule: Rule::Evidence, reason }) => {
            tracing::error!(reason, "the log cannot be opened; the task is to be parked");
            return Ok(Ended::By(AttemptEnd::Parked));
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
                verifier_key: key,
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
        _ = stop.as_mut() => return Ok(Ended::By(AttemptEnd::Terminated)),
    }

    let seconds = |count: i64| Duration::from_secs(u64::try_from(count).unwrap_or(0));
    let limits = config.policy.limits;
    let clock = clock::Clock::start(seconds(limits.wall_time_seconds), seconds(limits.approval_wait_seconds));
    let approvals = approvals::Approvals::new(link.clone(), journal.clone(), clock.clone());
    let once = dedup::Deduplicator::new(opened.keeps_results, opened.salt.clone());
    let gate = gate::Gate::new(policy, once, opened.salt, journal.clone(), link, clock.clone(), approvals.clone());
    let tools = tools::Tools::new(Arc::new(gate), &definitions, upstream::LISTING_AGE);
    let gate = tools.gate().clone();
    let listeners = listeners().await?;
    let reprobing = tokio::spawn(probe::repeat(gate.clone(), options.looking));
    let threads = gateway.map_or_else(server::threads, |gateway| gateway.threads().clone());
    let served = server::serve(tools, listeners, &threads)?;
    tracing::info!(attempt, "serving");
    serving();

    // Prepares the tokenizer now, so that the first model call does not wait for it.
    tokio::task::spawn_blocking(crate::policy::model::estimate::prepare);
    let over_before = journal.open().is_err();
    let mut ended = tokio::select! {
        why = stop.as_mut() => match why {
            Stop::AgentEnded => Ended::By(AttemptEnd::AgentEnded),
            Stop::Terminated => Ended::By(AttemptEnd::Terminated),
        },
        () = gate.refused_enough(), if !over_before => Ended::By(AttemptEnd::TooManyDenials),
        () = clock.over() => Ended::By(AttemptEnd::WallTime),
        () = approvals.ended() => Ended::By(AttemptEnd::Unapproved),
        () = journal.stalled() => Ended::By(AttemptEnd::Parked),
        failed = journal.failed() => Ended::LogFailed(failed.reason),
    };
    tracing::info!(?ended, "closing the log");
    reprobing.abort();
    if journal.open().is_err() {
        ended = Ended::By(AttemptEnd::TooManyDenials);
    }
    if ended.end().is_in_time() && journal.has_kept_waiting() {
        ended = Ended::By(AttemptEnd::Parked);
    }
    match journal.failure() {
        Some(failed) => gate.stop(failed.rule, &failed.reason),
        None => gate.stop(Rule::TaskClosed, "the attempt has ended"),
    }
    served.drain().await;
    // Background work ends at once now. Its records must precede the last record.
    if tokio::time::timeout(BEHIND, gate.nothing_behind()).await.is_err() {
        tracing::warn!("replies of models were still read after {BEHIND:?}");
    }
    let end = match ended {
        // A failed log takes no more records.
        Ended::LogFailed(reason) => return Ok(log_failed(&options.spool, reason)),
        Ended::By(end) => end,
    };
    gate.count_waiting(None);
    let closed = end
        .closed()
        .map(|reason| journal.record(|_, _| Ok(Event::AttemptClosed(AttemptClosed { reason: reason.to_owned() }))));
    if let Some(Ok(last)) = closed
        && tokio::time::timeout(FLUSH, journal.stored(last)).await.is_err()
    {
        tracing::error!(
            "the last records could not be stored in {FLUSH:?}; the operator will seal the log without them"
        );
    }
    // The log may have failed after everything else ended. Then the agent's last actions are in no log.
    Ok(match journal.failure() {
        Some(failed) => log_failed(&options.spool, failed.reason),
        None => ended,
    })
}

/// Notes that the log has failed, for a harness that is restarted in this pod. Without the note, that harness would start from the counters
/// of the last stored record, which are lower than the real usage.
fn log_failed(spool: &std::path::Path, reason: String) -> Ended {
    if let Err(error) = spool::note_failure(spool, &reason) {
        tracing::error!(%error, "that the log has failed could not be noted for a restart");
    }
    Ended::LogFailed(reason)
}

/// Opens the log. Retries for a while, because the gateway may be starting or may not have seen the task's objects yet.
async fn open(
    link: &gateway_client::GatewayClient,
    attempt: i64,
    digest: &str,
) -> Result<crate::wire::OpenReply, HarnessError> {
    const PATIENCE: Duration = Duration::from_secs(60);
    let started = tokio::time::Instant::now();
    let mut pauses = retry::pauses(Duration::from_millis(50), Duration::from_secs(2));
    loop {
        let error = match link.open(attempt, digest).await {
            Ok(reply) => return Ok(reply),
            Err(error) => error,
        };
        let transient = match &error {
            gateway_client::CallError::Refused(denial) => {
                matches!(
                    denial.rule,
                    Rule::ConfigDigest | Rule::IdentityAttempt | Rule::IdentitySource | Rule::Evidence
                )
            }
            gateway_client::CallError::Unreachable(_) => true,
        };
        if !transient || started.elapsed() > PATIENCE {
            return Err(match error {
                gateway_client::CallError::Refused(denial) => {
                    HarnessError::Refused { rule: denial.rule, reason: denial.reason }
                }
                gateway_client::CallError::Unreachable(reason) => {
                    HarnessError::Refused { rule: Rule::Evidence, reason }
                }
            });
        }
        tracing::info!(%error, "the log is not open yet");
        retry::pause(&mut pauses).await;
    }
}
