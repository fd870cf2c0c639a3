//! `belay run`: runs a task on this machine, without a cluster.
//!
//! ```text
//! one process: gateway ◀─in memory, HTTP/2─ harness ◀─ the harness's socket, made in the sandbox's network ─ agent in a sandbox
//! ```
//!
//! Guarantees: this module makes no decision of its own, and plays the parts of the kubelet and the API server. `render` validates the task,
//! the contracts and the pack. `lifecycle::observe` reads the pod of an attempt, and `lifecycle::decide` decides what comes next. The
//! harness decides about calls, and the gateway decides again. The gateway witnesses and seals the log with the same code as in a cluster.
//! An agent never runs without a sandbox, or before the probe has proved its containment.
//!
//! Non-goals: evidence that passes for a cluster's. The witness has another name, and the first record of each attempt says what stood in
//! for the cluster.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use tokio::sync::{OwnedSemaphorePermit, mpsc::UnboundedSender};
use tokio_util::sync::CancellationToken;

use self::{
    attempt::RunContext,
    objects::{Api, Objects},
    sandbox::{Runtime, root::Image},
};
use crate::{
    api::{
        ApprovalRequest,
        agent_task::{AgentTaskStatus, Attempt},
    },
    ends::FailureClass,
    evidence::record::{Local, Record, TaskClosed},
    lifecycle::{
        decide::{self, Decision, Next, Observed},
        observe::{self, PodView},
    },
    render::{
        Finding,
        validated::{self, Validated},
    },
    seal,
    wire::{SealReply, SealRequest},
};

/// Runs one attempt, as a kubelet does.
mod attempt;
/// Starts the real gateway, on loopback.
pub mod gateway;
/// The objects of a run, and the stores that stand in for the API server.
pub mod objects;
/// The containment probe.
pub mod probe;
/// Resolves an agent's command and environment in its sandbox.
pub mod program;
/// The sandbox of an agent.
pub mod sandbox;
/// The store of the evidence.
pub mod store;
/// Servers that the user starts for the run.
pub mod upstream;

/// The number of times that sealing is tried, and the pause between two tries: a store that is full or unreachable may recover.
const SEALS: u32 = 5;
const SEAL_PAUSE: Duration = Duration::from_secs(2);

/// Why a task could not be run, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The task is not valid.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Findings(Vec<Finding>),
    /// The operating system gave no randomness.
    #[error("the operating system gave no randomness")]
    Random,
    /// There is no sandbox, or it does not work.
    #[error("{0}")]
    Sandbox(String),
    /// A server that the user started for the run does not serve.
    #[error("--upstream {0}")]
    Upstream(String),
    /// The gateway does not start.
    #[error("the gateway does not start: {0}")]
    Gateway(String),
    /// A file or a folder of this run cannot be used.
    #[error("cannot use {path}: {cause}")]
    File {
        /// The path.
        path: PathBuf,
        /// The cause.
        cause: std::io::Error,
    },
    /// The log could not be sealed.
    #[error("the log could not be ended, and is as far as it came: {0}")]
    Seal(#[from] seal::SealError),
    /// A value has no canonical form. Strings always have one.
    #[error(transparent)]
    Canonical(#[from] crate::canonical::CanonicalError),
}

/// A permit of one waiting output line of the agent. The number of permits is bounded. The receiver returns the permit when it drops the
/// line.
#[derive(Clone, Debug)]
pub struct Slot(#[expect(dead_code, reason = "it is given back when it is dropped")] Arc<OwnedSemaphorePermit>);

/// An event of a run, sent while it happens.
#[derive(Clone, Debug)]
pub enum RunEvent {
    /// A step before the agent starts.
    Step(String),
    /// An agent starts.
    Started {
        /// The number of the attempt.
        attempt: i64,
    },
    /// A record was written. It counts once it is stored.
    Record(Box<Record>),
    /// The agent wrote a line of output.
    Said {
        /// Whether the line was written to standard error.
        error: bool,
        /// The line.
        line: String,
        /// Whether the line continues in the next event, because it is longer than the maximum of one event.
        goes_on: bool,
        /// Its permit among the lines that wait to be written.
        slot: Slot,
    },
    /// This many output lines of the agent are lost, because the earlier ones were not read in time.
    Lost(u64),
    /// An approval was requested.
    Asked(Box<ApprovalRequest>),
    /// The reason why a call was not made. It is sent before the record of that.
    Unmade {
        /// The ID of the call in the log.
        call: String,
        /// The reason, for the user.
        reason: String,
    },
    /// Evidence could not be stored, for this reason. Storing it is tried again.
    Trouble(String),
    /// The next attempt starts at this time.
    Pause(Timestamp),
}

/// The input of a run.
pub struct Options {
    /// The task and the other objects.
    pub objects: Objects,
    /// The sandbox.
    pub runtime: Runtime,
    /// The agent's programs and libraries: an unpacked image, or the machine's own if absent.
    pub root: Option<Image>,
    /// More folders of the machine that the agent sees, at the same path.
    pub read_only: Vec<PathBuf>,
    /// The folder of the task. The agent sees it.
    pub workspace: PathBuf,
    /// Files and folders that the agent does not see in those folders.
    pub hidden: Vec<PathBuf>,
    /// The location of the evidence, for the first record.
    pub store: String,
    /// The hosts whose addresses the user gave, for the first record.
    pub resolved: Vec<String>,
    /// A folder that belongs to this run, for files that are not needed afterwards.
    pub folder: PathBuf,
    /// The path of this program.
    pub belay: PathBuf,
}

/// How a task ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The content of the last record.
    pub closed: TaskClosed,
    /// The sealed log.
    pub sealed: SealReply,
    /// Why the last attempt could not run, if it could not.
    pub trouble: Option<String>,
}

/// Checks whether the task can be run: it must be valid for the operator, and name an agent and a command.
///
/// # Errors
/// Returns all findings at once.
pub fn validate(objects: &Objects, image: Option<&Image>) -> Result<Validated, RunError> {
    let task = &objects.task;
    let validated = validated::validate(task, &objects.contracts, &objects.pack, objects::SYSTEM_NAMESPACE);
    let validated = validated.map_err(RunError::Findings)?;
    match &task.spec.agent {
        None => Err(RunError::Findings(vec![Finding::new(
            "spec.agent",
            "an agent to run",
            "none: the task rolls another one back",
            "roll back in the cluster that ran it, by `belay rollback`",
        )])),
        Some(agent) if !agent.command.is_empty() => Ok(validated),
        Some(agent) if image.is_none_or(|image| image.process.args.is_empty()) => {
            Err(RunError::Findings(vec![Finding::new(
                "spec.agent.command",
                "a command, since no image is pulled here: images say what to run, programs of this machine do not",
                if agent.args.is_empty() { "none" } else { "arguments alone" },
                "add one, such as `command: [python3, agent.py]`; the task's folder is the agent's own, as /workspace. Or unpack the image to an OCI bundle, which says it, for --root",
            )]))
        }
        // Kubernetes would put these arguments in place of the image's own, but an unpacked image does not say where its own begin.
        Some(agent) if !agent.args.is_empty() => Err(RunError::Findings(vec![Finding::new(
            "spec.agent.args",
            "the whole command, since a bundle does not say where its own ends and its arguments begin",
            "arguments alone",
            "name the image's entry point as `command`",
        )])),
        Some(_) => Ok(validated),
    }
}

/// Runs the task until it ends or until `stop`. After `stop`, the agent is stopped first and the log is sealed afterwards.
///
/// # Errors
/// Returns an error if the run did not end with a sealed log. Whatever is in the store still verifies as what it is.
pub async fn run(
    options: Options,
    api: Arc<Api>,
    gateway: gateway::Serving,
    tell: UnboundedSender<RunEvent>,
    stop: CancellationToken,
) -> Result<Outcome, RunError> {
    let validated = validate(&options.objects, options.root.as_ref())?;
    let local = Local {
        sandbox: options.runtime.version.clone(),
        root: options.root.as_ref().map_or(Local::HOST.to_owned(), |image| image.folder.display().to_string()),
        store: options.store.clone(),
        resolved: options.resolved.clone(),
    };
    let token = options.folder.join("operator.token");
    write_private(&token, &api.operator_token()?)?;
    let operator = seal::Gateway::new(gateway.address.to_string(), token, &gateway.ca)?;
    let surroundings =
        RunContext { options: &options, validated: &validated, api: &api, gateway: &gateway, local, tell: &tell };

    let mut history: Vec<Attempt> = Vec::new();
    let mut failures = std::collections::BTreeMap::new();
    let mut pods: Vec<PodView> = Vec::new();
    let mut trouble = None;
    let uid = options.objects.task.uid().unwrap_or_default();
    let outcome = loop {
        let now = Timestamp::now();
        let Decision { attempts, failures: counted, next } = decide::decide(&Observed {
            uid: &uid,
            deleting: stop.is_cancelled(),
            finalizer: true,
            phase: None,
            sealed: false,
            retry: &options.objects.task.spec.retry,
            wall_time_seconds: options.objects.task.spec.limits.wall_time_seconds,
            history: &history,
            pods: &pods,
            claims: &[],
            reusable: None,
            failures: &failures,
            looked_up: &pods.iter().map(|pod| pod.attempt).chain(history.last().map(|last| last.number)).collect(),
            live: true,
            rolls_back: false,
            // No kubelet that could lose its connection reports these pods.
            in_touch_since: Timestamp::UNIX_EPOCH,
            now,
        });
        (history, failures) = (attempts, counted);
        match next {
            Next::Start(number) => {
                let mut task = options.objects.task.clone();
                task.status = Some(AgentTaskStatus { attempt: Some(number), ..AgentTaskStatus::default() });
                api.apply_task(task);
                let ended = surroundings.attempt(number, &stop).await?;
                trouble = ended.trouble;
                api.apply_pod(ended.pod.clone());
                pods = observe::pod(&ended.pod).map(|pod| PodView { live: true, ..pod }).into_iter().collect();
            }
            Next::Pause(until) => {
                let _ = tell.send(RunEvent::Pause(until));
                tokio::select! {
                    () = tokio::time::sleep(decide::wait(until, now)) => {}
                    () = stop.cancelled() => {}
                }
            }
            Next::Seal { attempt, closed, .. } => break Some((attempt, closed)),
            // A task that is stopped before its first attempt has no log yet, and gets one that says so.
            Next::Release => break Some((0, cancelled())),
            // A pod of a local run has always ended when it is observed.
            Next::Nothing | Next::Run { .. } | Next::EndPods(_) | Next::Confirm(_) => break None,
        }
    };
    let Some((attempt, closed)) = outcome else {
        return Err(RunError::Sandbox("an attempt has no end that counts; please report this".to_owned()));
    };
    let evidence = &options.objects.pack.spec.evidence;
    let request = SealRequest {
        namespace: options.objects.task.namespace().unwrap_or_default(),
        name: options.objects.task.name_any(),
        uid,
        attempt,
        bucket: evidence.bucket.clone(),
        prefix: evidence.prefix.clone().unwrap_or_default(),
        closed: closed.clone(),
        presumed: false,
    };
    let mut tries = 0;
    let sealed = loop {
        tries += 1;
        match operator.seal(&request).await {
            Ok(sealed) => break sealed,
            Err(error) if tries >= SEALS => return Err(error.into()),
            Err(_) => tokio::time::sleep(SEAL_PAUSE).await,
        }
    };
    gateway.end().await;
    let closed = sealed.closed.clone().unwrap_or(closed);
    Ok(Outcome { closed, sealed, trouble })
}

fn cancelled() -> TaskClosed {
    TaskClosed::failed(FailureClass::Cancelled, "Deleted")
}

/// Converts a timestamp to the type of Kubernetes objects.
fn time(at: Timestamp) -> Time {
    Time(at)
}

/// Makes everything in a folder of this run readable for the agent, whatever the umask of the caller is. In a sandbox the agent may be
/// another user, and outside the sandbox no other user can reach the folder.
fn open_to_agent(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let is = std::fs::symlink_metadata(folder)?.file_type();
    if is.is_dir() {
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))?;
        for entry in std::fs::read_dir(folder)? {
            open_to_agent(&entry?.path())?;
        }
    } else if is.is_file() {
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o644))?;
    }
    Ok(())
}

/// Writes a file that only its owner can read.
fn write_private(path: &Path, text: &str) -> Result<(), RunError> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let mut options = std::fs::OpenOptions::new();
    let written = options.write(true).create(true).truncate(true).mode(0o600).open(path);
    let written = written.and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|cause| RunError::File { path: path.to_owned(), cause })
}
