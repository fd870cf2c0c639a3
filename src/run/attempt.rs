//! Runs one attempt, as a kubelet does: the probe, the harness and the agent. A pod's status says how they ended.
//!
//! Guarantees: the agent does not start before its containment is proved and the attempt's first record is stored. The agent is stopped
//! before its harness, whatever stops it. However the attempt ends, the sandbox ends with it.
//!
//! Non-goals: evaluating the end of an attempt, which `lifecycle::observe` does.

use std::{fs, path::Path, process::ExitStatus, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    ByteString,
    api::core::v1::{
        ConfigMap, ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodIP, PodSpec, PodStatus, Secret,
    },
};
use kube::ResourceExt;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader},
    net::TcpListener,
    process::Child,
    sync::{Semaphore, mpsc::UnboundedSender, oneshot},
};
use tokio_util::sync::CancellationToken;

use super::{
    Options, RunError, RunEvent, Slot,
    gateway::Serving,
    objects::{self, Api},
    open_to_agent,
    probe::{self, Controls},
    program::{self, Workspace},
    sandbox::{
        self, Bind, Cell, Kind,
        hold::Hold,
        root,
        watch::{self, LimitExceeded},
    },
    time, write_private,
};
use crate::{
    ends::AttemptEnd,
    evidence::record::{self, Local},
    harness::{self, Ended, HarnessError, Stop, journal::Follow, server::Listeners},
    policy::config::{HarnessConfig, Wiring},
    render::{
        agent::Agent,
        names,
        pod::START_ALLOWANCE_SECONDS,
        validated::{Source, Validated},
    },
};

/// The maximum length of an output line in one event, in bytes. A longer line is sent in parts.
const LINE: u64 = 8 << 10;
/// The maximum size of output lines that wait to be written, in KiB. Lines beyond it are lost, because an agent must not wait for the
/// reader.
const WAITING: usize = 4 << 10;
/// The time to wait for a killed agent to be gone. A process that the kernel does not release is not waited for.
const GONE: Duration = Duration::from_secs(10);
/// The time to read the rest of an agent's output after its end.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// The time beyond the wall time and the approvals before the agent is killed. The harness normally ends the attempt by itself before.
const CLOSING: Duration = Duration::from_secs(10);

/// The environment of an attempt.
pub(super) struct RunContext<'a> {
    pub(super) options: &'a Options,
    pub(super) validated: &'a Validated,
    pub(super) api: &'a Arc<Api>,
    pub(super) gateway: &'a Serving,
    pub(super) local: Local,
    pub(super) tell: &'a UnboundedSender<RunEvent>,
}

/// An attempt that has ended.
pub(super) struct AttemptResult {
    /// The pod, as the API server would have it.
    pub(super) pod: Pod,
    /// Why the attempt could not run, if it could not.
    pub(super) trouble: Option<String>,
}

/// The ends of the containers.
#[derive(Default)]
struct ContainerExits {
    probe: Option<i32>,
    harness: Option<i32>,
    agent: Option<AgentEnd>,
    trouble: Option<String>,
}

struct AgentEnd {
    started: Timestamp,
    code: i32,
    reason: &'static str,
}

impl RunContext<'_> {
    fn step(&self, what: impl Into<String>) {
        // The receiver may be gone.
        let _ = self.tell.send(RunEvent::Step(what.into()));
    }

    /// Runs one attempt to its end.
    pub(super) async fn attempt(&self, number: i64, stop: &CancellationToken) -> Result<AttemptResult, RunError> {
        let folder = self.options.folder.join(format!("attempt-{number}"));
        fs::create_dir_all(folder.join("spool")).map_err(|cause| RunError::File { path: folder.clone(), cause })?;
        let mut pod = self.pod(number)?;
        self.api.apply_pod(pod.clone());
        let token = folder.join("token");
        write_private(&token, &self.api.token_of(&pod)?)?;
        let ends = match self.contained(number, &pod, (&token, &folder), stop).await {
            Ok(ends) => ends,
            // The sandbox could not be made, so nothing ran. This is a failure of the machine, reported in its own words.
            Err(RunError::Sandbox(trouble)) => {
                ContainerExits { probe: Some(1), trouble: Some(trouble), ..ContainerExits::default() }
            }
            Err(error) => return Err(error),
        };
        // The records in the spool are stored by now, or lost as they are lost with a pod.
        let _ = fs::remove_dir_all(&folder);
        let trouble = ends.trouble.clone();
        status(&mut pod, ends, stop.is_cancelled());
        Ok(AttemptResult { pod, trouble })
    }

    async fn contained(
        &self,
        number: i64,
        pod: &Pod,
        (token, folder): (&Path, &Path),
        stop: &CancellationToken,
    ) -> Result<ContainerExits, RunError> {
        let Options { runtime, belay, .. } = self.options;
        let (hold, listener) = Hold::start(belay).await?;
        let cell = self.cell(&self.validated.agent(number), folder)?;
        let controls = Controls { outside: vec![self.gateway.address, self.gateway.canary] };
        self.step(format!("proving containment in {}", runtime.version));
        let containment = probe::from_within((runtime, &cell), &hold, &controls, (belay, folder)).await?;
        if !containment.contained {
            let trouble = format!("containment is not proven: {}", containment.breaches.join("; "));
            return Ok(ContainerExits {
                probe: Some(i32::from(AttemptEnd::ContainmentUnproven.exit_code())),
                trouble: Some(trouble),
                ..ContainerExits::default()
            });
        }
        let parts = harness::Parts {
            config: self.config(number, &controls),
            containment,
            token: token.to_owned(),
            spool: folder.join("spool"),
            pod: self.identity(pod),
            local: Some(self.local.clone()),
            follow: self.follow(),
            looking: Arc::new(probe::Again { pid: hold.pid(), controls, belay: belay.clone() }),
            gateway: Some(self.gateway.link.clone()),
        };
        let ends = self.side_by_side(number, parts, (listener, &cell, &hold, folder), stop).await;
        hold.end().await;
        ends
    }

    /// Runs the harness and the agent until both have ended.
    async fn side_by_side(
        &self,
        number: i64,
        parts: harness::Parts,
        (listener, cell, hold, folder): (std::net::TcpListener, &Cell, &Hold, &Path),
        stop: &CancellationToken,
    ) -> Result<ContainerExits, RunError> {
        self.step("opening the evidence log");
        let (serves, serving) = oneshot::channel();
        let (over, end) = oneshot::channel();
        let listeners = async move || {
            listener.set_nonblocking(true)?;
            Ok(Listeners { agent: TcpListener::from_std(listener)?, health: None })
        };
        let ready = move || serves.send(()).unwrap_or_default();
        let end = async move { end.await.unwrap_or(Stop::Terminated) };
        let mut harness = tokio::spawn(async move { harness::run(parts, listeners, ready, end).await });
        tokio::select! {
            // The harness ended before it listened.
            ended = &mut harness => return Ok(without_agent(said(ended))),
            () = stop.cancelled() => {
                harness.abort();
                return Ok(ContainerExits { probe: Some(0), harness: Some(1), ..ContainerExits::default() });
            }
            Ok(()) = serving => {}
        }
        let mut ends = ContainerExits { probe: Some(0), ..ContainerExits::default() };
        let agent = self.options.runtime.start(cell, hold, (&self.options.belay, &folder.join("agent")));
        let mut agent = match agent {
            Ok(agent) => agent,
            Err(error) => {
                let _ = over.send(Stop::Terminated);
                ends.harness = Some(code(&said(harness.await)));
                ends.trouble = Some(error.to_string());
                return Ok(ends);
            }
        };
        let started = Timestamp::now();
        let _ = self.tell.send(RunEvent::Started { attempt: number });
        let room = Arc::new(Semaphore::new(WAITING));
        let words =
            [self.listen(agent.stdout.take(), false, room.clone()), self.listen(agent.stderr.take(), true, room)];
        let plan = self.validated.agent(number);
        let longest = Duration::from_secs(u64::try_from(self.validated.lifetime_seconds).unwrap_or_default()) + CLOSING;
        let pid = agent.id().unwrap_or_default();
        // A write scope has a size of its own. A sandbox with its own kernel holds the write scopes in its own memory.
        let scopes = plan.write_scopes.iter().map(|scope| scope.size.whole()).sum::<u64>();
        let apart = self.options.runtime.kind == Kind::Gvisor;
        let memory = plan.memory.whole().saturating_add(if apart { scopes } else { 0 });
        let mut harness_ended = None;
        let mut reason = "Completed";
        // Once something else stops the agent, it is not known how the agent would have ended.
        let mut why = Stop::Terminated;
        let status = tokio::select! {
            status = agent.wait() => {
                why = Stop::AgentEnded;
                status
            }
            ended = &mut harness => {
                harness_ended = Some(said(ended));
                kill(&mut agent).await
            }
            () = stop.cancelled() => kill(&mut agent).await,
            () = tokio::time::sleep(longest) => kill(&mut agent).await,
            beyond = watch::until_beyond(pid, memory, sandbox::PROCESSES) => {
                let trouble;
                (reason, trouble) = match beyond {
                    LimitExceeded::Memory => ("OOMKilled", format!("the agent held more than {} of memory", plan.memory.as_str())),
                    LimitExceeded::Processes => ("Error", format!("the agent had more than {} processes", sandbox::PROCESSES)),
                };
                ends.trouble = Some(trouble);
                kill(&mut agent).await
            }
        };
        // The agent is gone before its harness stops listening.
        self.options.runtime.clear(&folder.join("agent"));
        for word in words {
            let _ = tokio::time::timeout(LAST_WORDS, word).await;
        }
        // A harness that has ended does not receive this.
        let _ = over.send(why);
        let harness_ended = match harness_ended {
            Some(ended) => ended,
            None => said(harness.await),
        };
        ends.trouble = ends.trouble.or_else(|| trouble(&harness_ended));
        ends.harness = Some(code(&harness_ended));
        ends.agent = Some(AgentEnd { started, code: exit_code(&status), reason });
        Ok(ends)
    }

    /// Returns a function that reports each record.
    fn follow(&self) -> Follow {
        let tell = self.tell.clone();
        Box::new(move |record, _| drop(tell.send(RunEvent::Record(Box::new(record.clone())))))
    }

    /// Reports an agent's output, line by line.
    fn listen(
        &self,
        from: Option<impl AsyncRead + Unpin + Send + 'static>,
        error: bool,
        room: Arc<Semaphore>,
    ) -> tokio::task::JoinHandle<()> {
        let tell = self.tell.clone();
        tokio::spawn(async move {
            let Some(from) = from else { return };
            let mut lines = BufReader::new(from);
            let (mut rest, mut lost) = (Vec::new(), 0_u64);
            loop {
                let mut line = std::mem::take(&mut rest);
                let left = LINE.saturating_sub(u64::try_from(line.len()).unwrap_or_default());
                let ended = match (&mut lines).take(left).read_until(b'\n', &mut line).await {
                    Ok(0) | Err(_) if line.is_empty() => break,
                    Ok(count) => count == 0,
                    Err(_) => true,
                };
                let goes_on = !ended && !line.ends_with(b"\n");
                if goes_on {
                    // Keep a character whole: the rest of it goes to the next event.
                    rest = line.split_off(whole_characters(&line));
                }
                let line = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
                let size = u32::try_from(line.len() / 1024).unwrap_or(u32::MAX).saturating_add(1);
                match room.clone().try_acquire_many_owned(size) {
                    Ok(slot) => {
                        if lost > 0 {
                            let _ = tell.send(RunEvent::Lost(std::mem::take(&mut lost)));
                        }
                        let _ = tell.send(RunEvent::Said { error, line, goes_on, slot: Slot(Arc::new(slot)) });
                    }
                    Err(_) => lost = lost.saturating_add(1),
                }
            }
            if lost > 0 {
                let _ = tell.send(RunEvent::Lost(lost));
            }
        })
    }

    fn config(&self, number: i64, controls: &Controls) -> HarnessConfig {
        HarnessConfig {
            policy: self.validated.policy().clone(),
            wiring: Wiring {
                attempt: number,
                gateway: self.gateway.address.to_string(),
                gateway_ca: self.gateway.ca.clone(),
                probe: controls.wiring(),
            },
        }
    }

    /// Returns the pod as it is before anything runs in it.
    fn pod(&self, number: i64) -> Result<Pod, RunError> {
        let task = &self.options.objects.task;
        let (name, uid) = (task.name_any(), task.uid().unwrap_or_default());
        let mut pod = Pod::default();
        let now = Timestamp::now();
        pod.metadata.name = Some(names::of_attempt(&name, number));
        pod.metadata.namespace = task.namespace();
        pod.metadata.uid = Some(objects::random_uid()?);
        pod.metadata.labels = Some(names::labels(&name, &uid, number));
        pod.metadata.creation_timestamp = Some(time(now));
        let lifetime = self.validated.lifetime_seconds;
        pod.spec = Some(PodSpec {
            active_deadline_seconds: Some(lifetime.saturating_add(START_ALLOWANCE_SECONDS)),
            ..PodSpec::default()
        });
        let loopback = "127.0.0.1".to_owned();
        pod.status = Some(PodStatus {
            phase: Some("Running".to_owned()),
            pod_ip: Some(loopback.clone()),
            pod_ips: Some(vec![PodIP { ip: loopback }]),
            start_time: Some(time(now)),
            ..PodStatus::default()
        });
        Ok(pod)
    }

    fn identity(&self, pod: &Pod) -> record::Pod {
        let node = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        record::Pod {
            name: pod.name_any(),
            uid: pod.uid().unwrap_or_default(),
            node: node.trim().to_owned(),
            runtime_class: self.options.runtime.kind.name().to_owned(),
            network_policy: String::new(),
        }
    }

    /// Returns everything that the agent is given.
    fn cell(&self, agent: &Agent<'_>, folder: &Path) -> Result<Cell, RunError> {
        let options = self.options;
        let made = folder.join("root");
        let unusable = |path: &Path| {
            let path = path.to_owned();
            move |cause| RunError::File { path, cause }
        };
        let root = match &options.root {
            None => root::host(&made).map_err(unusable(&made))?,
            Some(image) => {
                let entries = image.entries().map_err(unusable(&image.folder))?;
                entries.into_iter().map(|entry| entry.without(&options.hidden)).collect()
            }
        };
        let mut binds = Vec::new();
        for (index, mount) in agent.mounts.iter().enumerate() {
            let from = folder.join(format!("mount-{index}"));
            self.mount(&mount.source, &from)?;
            binds.push(Bind::new(from, mount.path.as_str()));
        }
        let workspace = program::workspace(agent)?;
        let elsewhere = options.read_only.iter().map(|path| (path, path.display().to_string()));
        for (from, to) in elsewhere.chain([(&options.workspace, workspace.at.to_owned())]) {
            binds.push(Bind::new(from, to).without(&options.hidden));
        }
        self.say_what_is_special(agent, &workspace);
        let image = options.root.as_ref();
        Ok(Cell {
            command: program::command(agent, image),
            env: program::environment(agent, image),
            cwd: program::folder(image, workspace.at),
            root,
            binds,
            scopes: agent.write_scopes.iter().map(|one| (one.path.as_str().to_owned(), one.size.whole())).collect(),
            covered: agent.covered.iter().map(|path| (*path).to_owned()).collect(),
        })
    }

    /// Reports what a user of other sandboxes would not expect.
    fn say_what_is_special(&self, agent: &Agent<'_>, workspace: &Workspace) {
        if let Workspace { at, taken_by: Some(path) } = workspace {
            self.step(format!(
                "the task's folder is {at} for the agent, since the task has something of its own at {path}"
            ));
        }
        let scopes: Vec<_> = agent.write_scopes.iter().map(|scope| scope.path.as_str()).collect();
        if !scopes.is_empty() {
            self.step(format!("what the agent writes to {} ends with the run", scopes.join(", ")));
        }
    }

    /// Writes the content of a mounted ConfigMap or Secret to a folder.
    fn mount(&self, source: &Source, folder: &Path) -> Result<(), RunError> {
        let objects = &self.options.objects;
        let absent = |kind: &str, name: &str| {
            RunError::Sandbox(format!(
                "expected {kind} `{name}` among the files, which the task mounts, found none; add its YAML to the task's folder"
            ))
        };
        let files: Vec<(String, Vec<u8>)> = match source {
            Source::ConfigMap(name) => {
                let found = objects.config_maps.iter().find(|one| one.name_any() == *name);
                entries(found.ok_or_else(|| absent("ConfigMap", name))?)
            }
            Source::Secret(name) => {
                let found = objects.secrets.iter().find(|one| one.name_any() == *name);
                secret_entries(found.ok_or_else(|| absent("Secret", name))?)
            }
        };
        let unusable = |cause| RunError::File { path: folder.to_owned(), cause };
        fs::create_dir_all(folder).map_err(unusable)?;
        for (name, bytes) in files {
            let plain = !name.is_empty() && !name.starts_with('.') && !name.contains('/');
            if plain {
                fs::write(folder.join(name), bytes).map_err(unusable)?;
            }
        }
        open_to_agent(folder).map_err(unusable)
    }
}

fn entries(map: &ConfigMap) -> Vec<(String, Vec<u8>)> {
    let texts = map.data.iter().flatten().map(|(name, text)| (name.clone(), text.clone().into_bytes()));
    let bytes = map.binary_data.iter().flatten().map(|(name, ByteString(bytes))| (name.clone(), bytes.clone()));
    texts.chain(bytes).collect()
}

fn secret_entries(secret: &Secret) -> Vec<(String, Vec<u8>)> {
    let bytes = secret.data.iter().flatten().map(|(name, ByteString(bytes))| (name.clone(), bytes.clone()));
    let texts = secret.string_data.iter().flatten().map(|(name, text)| (name.clone(), text.clone().into_bytes()));
    bytes.chain(texts).collect()
}

async fn kill(agent: &mut Child) -> std::io::Result<ExitStatus> {
    // An agent that has already ended is still waited for.
    let _ = agent.start_kill();
    let gone = tokio::time::timeout(GONE, agent.wait()).await;
    gone.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
}

/// Returns how many bytes of a text are whole characters. The end of the text may be a part of one.
fn whole_characters(text: &[u8]) -> usize {
    let first = text.len().saturating_sub(3);
    // The last byte that begins a character.
    let begins = |at: &usize| text.get(*at).is_some_and(|byte| byte & 0xC0 != 0x80);
    let last = (first..text.len()).rev().find(begins);
    match last.filter(|at| *at > 0) {
        Some(at) => match std::str::from_utf8(text.get(at..).unwrap_or_default()) {
            Err(error) if error.error_len().is_none() => at,
            _ => text.len(),
        },
        None => text.len(),
    }
}

/// Returns the exit code as a shell reports it: 128 plus the signal for a process that a signal ended.
fn exit_code(status: &std::io::Result<ExitStatus>) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    let Ok(status) = status else { return 255 };
    status.code().or_else(|| status.signal().map(|signal| signal.saturating_add(128))).unwrap_or(255)
}

/// Returns how the harness ended.
fn said(ended: Result<Result<Ended, HarnessError>, tokio::task::JoinError>) -> Result<Ended, String> {
    match ended {
        Ok(ended) => ended.map_err(|error| error.to_string()),
        Err(error) => Err(format!("the harness broke off: {error}; please report this")),
    }
}

/// Returns the exit code that the harness's own process would have.
fn code(ended: &Result<Ended, String>) -> i32 {
    i32::from(ended.as_ref().map_or(1, |ended| ended.end().exit_code()))
}

fn without_agent(ended: Result<Ended, String>) -> ContainerExits {
    ContainerExits { probe: Some(0), harness: Some(code(&ended)), agent: None, trouble: trouble(&ended) }
}

/// Returns what the user needs to know about the harness's end, beside the failure class and the reason.
fn trouble(ended: &Result<Ended, String>) -> Option<String> {
    match ended {
        Err(error) => Some(error.clone()),
        Ok(Ended::LogFailed(reason)) => {
            Some(format!("the evidence log could not continue, so the run did not succeed: {reason}"))
        }
        Ok(_) => None,
    }
}

/// Writes the containers' ends to the pod's status, as a kubelet does.
fn status(pod: &mut Pod, ends: ContainerExits, deleted: bool) {
    let now = Timestamp::now();
    let terminated = |code: i32, reason: &str, started: Option<Timestamp>| ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: code,
            reason: Some(reason.to_owned()),
            started_at: started.map(time),
            finished_at: Some(time(now)),
            ..ContainerStateTerminated::default()
        }),
        ..ContainerState::default()
    };
    let container = |name: &str, state: ContainerState| ContainerStatus {
        name: name.to_owned(),
        state: Some(state),
        ..ContainerStatus::default()
    };
    let plain = |code: i32| if code == 0 { "Completed" } else { "Error" };
    let mut init = Vec::new();
    init.extend(ends.probe.map(|code| container(names::PROBE, terminated(code, plain(code), Some(now)))));
    init.extend(ends.harness.map(|code| container(names::HARNESS, terminated(code, plain(code), Some(now)))));
    let succeeded = ends.agent.as_ref().is_some_and(|agent| agent.code == 0);
    let agent = ends.agent.map(|agent| {
        let reason = if agent.reason == "Completed" { plain(agent.code) } else { agent.reason };
        container(names::AGENT, terminated(agent.code, reason, Some(agent.started)))
    });
    if deleted {
        // The deletion was requested before the agent ended: a stopped agent did not succeed.
        pod.metadata.deletion_timestamp = Some(time(now));
    }
    let status = pod.status.get_or_insert_default();
    status.phase = Some(if succeeded { "Succeeded" } else { "Failed" }.to_owned());
    status.init_container_statuses = Some(init);
    status.container_statuses = Some(agent.into_iter().collect());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ends::FailureClass, lifecycle::observe};

    fn end(ends: ContainerExits, deleted: bool) -> (Option<FailureClass>, &'static str) {
        let mut pod = Pod::default();
        pod.metadata.labels = Some(names::labels("t", "uid", 1));
        status(&mut pod, ends, deleted);
        let end = observe::pod(&pod).unwrap().end.unwrap();
        (end.class, end.reason)
    }

    #[test]
    fn no_character_is_cut_in_two() {
        for (text, whole) in [("abc", 3), ("ab\u{e9}", 4), ("ab\u{20ac}", 5), ("ab\u{1f600}", 6)] {
            assert_eq!(whole_characters(text.as_bytes()), whole);
            for cut in 3..text.len() {
                assert_eq!(whole_characters(&text.as_bytes()[..cut]), 2, "{text} at {cut}");
            }
        }
        // Bytes that are not text are reported as they are.
        assert_eq!(whole_characters(b"ab\xff"), 3);
        assert_eq!((whole_characters(b""), whole_characters(b"\xe2"), whole_characters(&[0x80; 9])), (0, 1, 9));
    }

    fn agent(code: i32, reason: &'static str) -> Option<AgentEnd> {
        Some(AgentEnd { started: Timestamp::now(), code, reason })
    }

    #[test]
    fn an_end_here_means_what_it_means_in_a_cluster() {
        use FailureClass::{Agent, Budget, Dependency, Infrastructure, Policy};
        let as_end = |end: AttemptEnd, agent| ContainerExits {
            probe: Some(0),
            harness: Some(end.exit_code().into()),
            agent,
            trouble: None,
        };
        let ends =
            |harness: u8, agent| ContainerExits { probe: Some(0), harness: Some(harness.into()), agent, trouble: None };
        for (ends, expected) in [
            (ends(0, agent(0, "Completed")), (None, "AgentSucceeded")),
            (ends(0, agent(3, "Completed")), (Some(Agent), "NonZeroExit")),
            (ends(0, agent(137, "OOMKilled")), (Some(Agent), "OOMKilled")),
            (as_end(AttemptEnd::TooManyDenials, agent(137, "Completed")), (Some(Policy), "TooManyDenials")),
            (as_end(AttemptEnd::WallTime, agent(137, "Completed")), (Some(Budget), "DeadlineExceeded")),
            (as_end(AttemptEnd::Unapproved, agent(137, "Completed")), (Some(Policy), "ApprovalExpired")),
            (as_end(AttemptEnd::Parked, agent(137, "Completed")), (Some(Dependency), "EvidenceUnavailable")),
            (as_end(AttemptEnd::LogFailed, agent(0, "Completed")), (Some(Infrastructure), "LogFailed")),
            (
                ContainerExits {
                    probe: Some(AttemptEnd::ContainmentUnproven.exit_code().into()),
                    ..ContainerExits::default()
                },
                (Some(Infrastructure), "ContainmentUnproven"),
            ),
            (ContainerExits { probe: Some(1), ..ContainerExits::default() }, (Some(Infrastructure), "ProbeFailed")),
            (ends(1, None), (Some(Infrastructure), "PodFailed")),
        ] {
            assert_eq!(end(ends, false), expected);
        }
        assert_eq!(end(ends(0, agent(137, "Completed")), true), (Some(Infrastructure), "PodDeleted"));
    }
}
