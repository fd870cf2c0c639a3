//! `belay run`: a task on this machine, without a cluster.
//!
//! ```text
//! one process: gateway ◀─loopback, TLS─ harness ◀─ the harness's socket, made in the sandbox's network ─ agent in a sandbox
//! ```
//!
//! Promises: nothing is decided here. Task, contracts and pack are judged by `plan`, the pod of an attempt is seen through
//! `lifecycle::observe`, what comes next is `lifecycle::decide`'s, calls are decided by the harness and again by the gateway, the log is
//! witnessed and sealed by the gateway's own path. This module is what a kubelet and an API server are to those. Refuses: to run an
//! agent without a sandbox, or before it is shown to hold; and to pass for a cluster: the witness has another name, and the first record
//! of each attempt says what stood in for what.

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
    attempt::Surroundings,
    objects::{Api, Objects},
    sandbox::{Runtime, root::Image},
};
use crate::{
    api::{
        ApprovalRequest,
        agent_task::{AgentTaskStatus, Attempt},
    },
    evidence::record::{Local, Record, TaskClosed},
    lifecycle::{
        decide::{self, Decision, Next, Observed},
        observe::{self, PodView},
    },
    plan::{
        Finding,
        validated::{self, Validated},
    },
    seal,
    wire::{SealReply, SealRequest},
};

/// One attempt, as a kubelet runs it.
mod attempt;
/// The real gateway, on loopback.
pub mod gateway;
/// What a run is made of.
pub mod objects;
/// The containment probe.
pub mod probe;
/// What an agent's command is in its sandbox.
pub mod program;
/// Where the agent runs.
pub mod sandbox;
/// Where evidence goes.
pub mod store;
/// Servers of the user's own.
pub mod upstream;

/// Tries of sealing a log, and what lies between two: a store that is full or away may come back.
const SEALS: u32 = 5;
const SEAL_PAUSE: Duration = Duration::from_secs(2);

/// Why nothing could be run, or not be brought to its end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The task will not do.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Findings(Vec<Finding>),
    /// The system has no randomness.
    #[error("the operating system gave no randomness")]
    Random,
    /// There is no sandbox, or none that works.
    #[error("{0}")]
    Sandbox(String),
    /// A server of the user's own does not serve.
    #[error("--upstream {0}")]
    Upstream(String),
    /// The gateway does not start.
    #[error("the gateway does not start: {0}")]
    Gateway(String),
    /// A file or folder of this run.
    #[error("cannot use {path}: {cause}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        cause: std::io::Error,
    },
    /// The log could not be ended.
    #[error("the log could not be ended, and is as far as it came: {0}")]
    Seal(#[from] seal::SealError),
    /// Something has no canonical form, which strings always have.
    #[error(transparent)]
    Canonical(#[from] crate::canonical::CanonicalError),
}

/// The place of an agent's line among those that are not written yet. There are so many, and whoever writes a line gives it back.
#[derive(Clone, Debug)]
pub struct Slot(#[expect(dead_code, reason = "it is given back when it is dropped")] Arc<OwnedSemaphorePermit>);

/// What happens, as it happens.
#[derive(Clone, Debug)]
pub enum Told {
    /// What is done now, before there is an agent.
    Step(String),
    /// An agent starts.
    Started {
        /// The attempt.
        attempt: i64,
    },
    /// Something was recorded. It counts once it is stored.
    Record(Box<Record>),
    /// A line of the agent's own.
    Said {
        /// On standard error.
        error: bool,
        /// The line.
        line: String,
        /// Whether it goes on in the next one, as it is longer than is told at a time.
        goes_on: bool,
        /// Its place among those that are not written yet.
        slot: Slot,
    },
    /// So many lines of the agent's are lost, because nobody read those before.
    Lost(u64),
    /// People are asked.
    Asked(Box<ApprovalRequest>),
    /// Why a call has not been made, before the record of that.
    Unmade {
        /// The call, by its name in the log.
        call: String,
        /// Why, for people.
        reason: String,
    },
    /// Evidence cannot be kept, and why. It is tried again.
    Trouble(String),
    /// Another attempt will start then.
    Pause(Timestamp),
}

/// All that a run needs.
pub struct Options {
    /// What it is made of.
    pub objects: Objects,
    /// The sandbox.
    pub runtime: Runtime,
    /// Programs and libraries of the agent: an unpacked image; the machine's own when absent.
    pub root: Option<Image>,
    /// Further folders of the machine that the agent sees at the same place.
    pub read_only: Vec<PathBuf>,
    /// The folder of the task, which the agent sees.
    pub workspace: PathBuf,
    /// Files and folders that it must not see there.
    pub hidden: Vec<PathBuf>,
    /// Where evidence goes, for the first record.
    pub store: String,
    /// Hosts to which somebody gave an address, for the first record.
    pub resolved: Vec<String>,
    /// A folder of this run's own, for what ends with it.
    pub folder: PathBuf,
    /// This program.
    pub belay: PathBuf,
}

/// How a task ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What the last record says.
    pub closed: TaskClosed,
    /// The sealed log.
    pub sealed: SealReply,
    /// Why the last attempt could not be run, where it could not.
    pub trouble: Option<String>,
}

/// Whether there is anything to run: what the operator would refuse is refused.
///
/// # Errors
/// Everything that is wrong, at once.
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
        // Whose arguments they take the place of, an unpacked image no longer says.
        Some(agent) if !agent.args.is_empty() => Err(RunError::Findings(vec![Finding::new(
            "spec.agent.args",
            "the whole command, since a bundle does not say where its own ends and its arguments begin",
            "arguments alone",
            "name the image's entry point as `command`",
        )])),
        Some(_) => Ok(validated),
    }
}

/// Runs the task to its end, or until `stop`: then the agent is stopped first, and the log ended.
///
/// # Errors
/// If it could not be run to a sealed log. What is in the store verifies as what it is.
pub async fn run(
    options: Options,
    api: Arc<Api>,
    gateway: gateway::Serving,
    tell: UnboundedSender<Told>,
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
        Surroundings { options: &options, validated: &validated, api: &api, gateway: &gateway, local, tell: &tell };

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
            // Its pods are told by no kubelet that could be cut off.
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
                let _ = tell.send(Told::Pause(until));
                tokio::select! {
                    () = tokio::time::sleep(decide::wait(until, now)) => {}
                    () = stop.cancelled() => {}
                }
            }
            Next::Seal { attempt, closed, .. } => break Some((attempt, closed)),
            // A task that was stopped before its first attempt has no log to end, and gets one that says so.
            Next::Release => break Some((0, cancelled())),
            // A pod of ours has always ended when it is looked at.
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
    TaskClosed {
        phase: "Failed".to_owned(),
        failure_class: decide::class_name(crate::api::agent_task::FailureClass::Cancelled).to_owned(),
        reason: "Deleted".to_owned(),
        exit_code: None,
        images: std::collections::BTreeMap::new(),
    }
}

/// The objects' times.
fn time(at: Timestamp) -> Time {
    Time(at)
}

/// Has everything in a folder of this run's be readable for an agent, whatever the mask of whoever calls: in a sandbox it may be another user,
/// and outside nobody else gets at the folder.
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

/// Writes a file that nobody else reads.
fn write_private(path: &Path, text: &str) -> Result<(), RunError> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let mut options = std::fs::OpenOptions::new();
    let written = options.write(true).create(true).truncate(true).mode(0o600).open(path);
    let written = written.and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|cause| RunError::File { path: path.to_owned(), cause })
}
