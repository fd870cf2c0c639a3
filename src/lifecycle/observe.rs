//! Interprets the status of a pod for its attempt.
//!
//! Guarantees: Every end of a pod has a failure class and a one-word reason from a closed set. A stop that was requested from outside is
//! never attributed to the agent.
//!
//! Non-goals: Messages of kubelets and container runtimes, except for one that is the only way to tell two causes apart.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::core::v1::{ContainerState, ContainerStatus, Pod, PodStatus},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::ResourceExt;

use crate::{
    canonical,
    ends::{AttemptEnd, FailureClass, TIME_OVER},
    render::{intact, names},
};

/// How much further behind a node's clock may be than the observed difference: the time that a kubelet takes to accept a pod.
const SKEW: SignedDuration = SignedDuration::from_secs(3);

/// The part of a pod's state that decisions depend on.
#[derive(Clone, Debug, PartialEq)]
pub struct PodView {
    /// The number of the pod's attempt.
    pub attempt: i64,
    /// The pod's name.
    pub name: String,
    /// The pod's UID.
    pub uid: String,
    /// When the pod was created.
    pub created: Option<Timestamp>,
    /// Whether the pod's deletion was requested.
    pub deleting: bool,
    /// Whether no container of the pod runs any more.
    pub terminal: bool,
    /// The result of the containment probe, once it has ended.
    pub contained: Option<bool>,
    /// When the kubelet accepted the pod.
    pub accepted: Option<Timestamp>,
    /// When the agent started.
    pub agent_started: Option<Timestamp>,
    /// When the agent finished.
    pub agent_finished: Option<Timestamp>,
    /// Seconds from acceptance after which the kubelet ends the pod.
    pub lifetime: Option<i64>,
    /// Why the pod makes no progress, and since when.
    pub stuck: Option<WaitingReason>,
    /// The SHA-256 digests of the images that the pod runs, in hex, by container.
    pub images: BTreeMap<String, String>,
    /// How the pod differs from the planned pod.
    pub altered: Option<String>,
    /// How the pod ended, once it has ended.
    pub end: Option<End>,
    /// Whether this status was read from the API server just now, or is the last one that the pod will ever have.
    pub live: bool,
}

/// A pod that makes no progress.
#[derive(Clone, Debug, PartialEq)]
pub struct WaitingReason {
    /// The reason, in one word.
    pub reason: &'static str,
    /// When the pod stopped making progress.
    pub since: Option<Timestamp>,
    /// Whether the attempt fails if the pod stays stuck. If not, the operator waits without limit.
    pub fatal: bool,
}

/// How a pod ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The failure class. `None` means success.
    pub class: Option<FailureClass>,
    /// The reason, in one word.
    pub reason: &'static str,
    /// The agent's exit code, if it has one.
    pub exit_code: Option<i32>,
}

impl End {
    fn new(class: FailureClass, reason: &'static str, exit_code: Option<i32>) -> Self {
        Self { class: Some(class), reason, exit_code }
    }
}

/// Reads a pod. Returns `None` if the pod has no attempt label, because then it is not a pod of Belay.
pub fn pod(pod: &Pod) -> Option<PodView> {
    let attempt = pod.labels().get(names::ATTEMPT)?.parse().ok()?;
    let empty = PodStatus::default();
    let status = pod.status.as_ref().unwrap_or(&empty);
    let behind = behind(pod, status);
    let time = |time: &Option<Time>| time.as_ref().map(|time| time.0);
    let container = |name: &str| find(&status.container_statuses, name);
    let init = |name: &str| find(&status.init_container_statuses, name);
    let probe = init(names::PROBE).and_then(state);
    let contained = probe.and_then(|state| state.terminated.as_ref()).map(|ended| ended.exit_code == 0);
    let agent = container(names::AGENT).and_then(state);
    let agent_started = agent
        .and_then(|state| {
            let running = state.running.as_ref().and_then(|running| time(&running.started_at));
            running.or_else(|| state.terminated.as_ref().and_then(|ended| time(&ended.started_at)))
        })
        .filter(|started| *started != Timestamp::UNIX_EPOCH);
    let agent_finished = agent
        .and_then(|state| state.terminated.as_ref().and_then(|ended| time(&ended.finished_at)))
        .filter(|_| agent_started.is_some());
    let phase = status.phase.as_deref().unwrap_or_default();
    Some(PodView {
        attempt,
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        created: time(&pod.creation_timestamp()),
        deleting: pod.metadata.deletion_timestamp.is_some(),
        terminal: matches!(phase, "Succeeded" | "Failed"),
        contained,
        accepted: time(&status.start_time).map(|at| by_the_api_server(at, behind)),
        agent_started: agent_started.map(|at| by_the_api_server(at, behind)),
        agent_finished: agent_finished.map(|at| by_the_api_server(at, behind)),
        lifetime: pod.spec.as_ref().and_then(|spec| spec.active_deadline_seconds),
        stuck: stuck(status),
        images: images(status),
        altered: intact::altered(pod),
        end: end(pod, status, agent_started.is_some(), behind),
        live: false,
    })
}

/// Returns the minimum time by which the node's clock is behind the API server's clock: a kubelet does not accept a pod before it is
/// created and scheduled. Without this correction, a node whose clock is behind would shorten wall times. A node whose clock is ahead
/// extends them, until its kubelet ends the pod itself.
fn behind(pod: &Pod, status: &PodStatus) -> SignedDuration {
    let scheduled = status.conditions.iter().flatten().find(|one| one.type_ == "PodScheduled" && one.status == "True");
    let scheduled = scheduled.and_then(|one| one.last_transition_time.as_ref());
    let earliest = pod.creation_timestamp().map(|time| time.0).max(scheduled.map(|time| time.0));
    match (earliest, &status.start_time) {
        (Some(earliest), Some(accepted)) => earliest.duration_since(accepted.0).max(SignedDuration::ZERO),
        _ => SignedDuration::ZERO,
    }
}

fn by_the_api_server(time: Timestamp, behind: SignedDuration) -> Timestamp {
    time.checked_add(behind).unwrap_or(time)
}

/// Returns the image digests, by container. A tag can change its image, a digest cannot. The kubelet reports the digest once it has created
/// the container.
fn images(status: &PodStatus) -> BTreeMap<String, String> {
    let all = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    all.filter_map(|container| {
        let (_, digest) = container.image_id.rsplit_once("sha256:")?;
        canonical::is_digest(digest).then(|| (container.name.clone(), digest.to_owned()))
    })
    .collect()
}

fn find<'a>(statuses: &'a Option<Vec<ContainerStatus>>, name: &str) -> Option<&'a ContainerStatus> {
    statuses.iter().flatten().find(|status| status.name == name)
}

fn state(status: &ContainerStatus) -> Option<&ContainerState> {
    status.state.as_ref()
}

/// Returns the end of the pod, if it has one that counts.
fn end(pod: &Pod, status: &PodStatus, agent_ran: bool, behind: SignedDuration) -> Option<End> {
    use FailureClass::{Agent, Infrastructure};
    let phase = status.phase.as_deref().unwrap_or_default();
    let over = matches!(phase, "Succeeded" | "Failed") || pod.metadata.deletion_timestamp.is_some() || held_up(status);
    let agent = find(&status.container_statuses, names::AGENT)
        .and_then(state)
        .and_then(|state| state.terminated.as_ref())
        // A pod that is stopped before its agent ran also reports an end of the agent container. No agent ended then.
        .filter(|_| agent_ran);
    let exit_code = agent.map(|ended| ended.exit_code);
    // The harness has closed its log and reported so. The kubelet restarts the harness, and nothing in the pod stops the agent. An agent
    // that succeeded does not run again only because its last records were late.
    let parked_after_success = |class| class == FailureClass::Dependency && exit_code == Some(0);
    if let Some((class, reason)) = harness_ended(status).filter(|(class, _)| !parked_after_success(*class)) {
        return Some(End::new(class, reason, exit_code));
    }
    // The attempt runs until the harness has finished its log.
    if !over {
        return None;
    }
    let disruption =
        status.conditions.iter().flatten().find(|one| one.type_ == "DisruptionTarget" && one.status == "True");
    let before_deletion = match (deletion_asked(pod), agent.and_then(|ended| ended.finished_at.as_ref())) {
        (None, _) => true,
        // Both times have whole seconds. If they are equal, the safe reading is that the agent was stopped from outside, which is not a
        // success. The observed difference of a clock that is behind is smaller than the real one.
        (Some(asked), Some(finished)) => {
            let margin = if behind.is_zero() { SignedDuration::ZERO } else { SKEW };
            by_the_api_server(finished.0, behind.saturating_add(margin)) < asked
        }
        (Some(_), None) => false,
    };
    let told = status.reason.as_deref().unwrap_or_default();
    if told == "DeadlineExceeded" {
        return Some(if agent_ran {
            End::new(TIME_OVER.0, TIME_OVER.1, exit_code)
        } else {
            End::new(Infrastructure, "StartTimeout", None)
        });
    }
    if told == "Evicted"
        && disruption.is_none()
        && status.message.as_deref().is_some_and(|text| text.contains("exceed"))
    {
        return Some(End::new(Agent, "StorageExceeded", exit_code));
    }
    if let Some(disruption) = disruption.filter(|_| exit_code != Some(0) || !before_deletion) {
        let reason = match disruption.reason.as_deref().unwrap_or_default() {
            "PreemptionByScheduler" => "Preempted",
            "DeletionByTaintManager" | "DeletionByPodGC" => "NodeLost",
            _ => "Evicted",
        };
        return Some(End::new(Infrastructure, reason, exit_code));
    }
    if let Some(ended) = agent.filter(|_| before_deletion) {
        return Some(match (ended.exit_code, ended.reason.as_deref().unwrap_or_default()) {
            (0, _) => End { class: None, reason: "AgentSucceeded", exit_code },
            (_, "OOMKilled") => End::new(Agent, "OOMKilled", exit_code),
            (_, "ContainerStatusUnknown") => End::new(Infrastructure, "NodeLost", None),
            (_, "StartError" | "ContainerCannotRun") => End::new(Agent, "StartError", exit_code),
            _ if matches!(told, "Evicted" | "Preempting" | "Terminated" | "NodeShutdown" | "NodeLost") => {
                End::new(Infrastructure, "Evicted", exit_code)
            }
            _ => End::new(Agent, "NonZeroExit", exit_code),
        });
    }
    if pod.metadata.deletion_timestamp.is_some() {
        return Some(End::new(Infrastructure, "PodDeleted", exit_code));
    }
    let probe = find(&status.init_container_statuses, names::PROBE)
        .and_then(state)
        .and_then(|state| state.terminated.as_ref())
        .map(|ended| ended.exit_code);
    let unproven = AttemptEnd::ContainmentUnproven;
    if let Some((class, reason)) = unproven.status().filter(|_| probe == Some(i32::from(unproven.exit_code()))) {
        return Some(End::new(class, reason, None));
    }
    Some(match (probe, told) {
        (_, "Evicted" | "Preempting" | "Terminated" | "NodeShutdown") => End::new(Infrastructure, "Evicted", None),
        (_, "NodeLost") => End::new(Infrastructure, "NodeLost", None),
        (
            _,
            "UnexpectedAdmissionError"
            | "NodeAffinity"
            | "OutOfcpu"
            | "OutOfmemory"
            | "OutOfpods"
            | "OutOfephemeral-storage",
        ) => End::new(Infrastructure, "NodeRefused", None),
        (Some(code), _) if code != 0 => End::new(Infrastructure, "ProbeFailed", None),
        _ => End::new(Infrastructure, "PodFailed", None),
    })
}

/// Checks whether the agent has ended and an unplanned container still runs. Such a pod would not end, and nothing would stop it, although
/// the attempt is over. The kubelet ends the harness after the regular containers, and Belay plans only one of them: the agent.
fn held_up(status: &PodStatus) -> bool {
    let ended = |one: &ContainerStatus| state(one).is_some_and(|state| state.terminated.is_some());
    let mut beside = status.container_statuses.iter().flatten().filter(|one| one.name != names::AGENT);
    find(&status.container_statuses, names::AGENT).is_some_and(ended) && beside.any(|one| !ended(one))
}

/// Returns why the harness ended the attempt, from its current exit code or from the one before its restart.
fn harness_ended(status: &PodStatus) -> Option<(FailureClass, &'static str)> {
    let harness = find(&status.init_container_statuses, names::HARNESS)?;
    let ends =
        [&harness.state, &harness.last_state].into_iter().flatten().filter_map(|state| state.terminated.as_ref());
    ends.filter_map(|ended| AttemptEnd::of_exit_code(u8::try_from(ended.exit_code).ok()?)).find_map(AttemptEnd::status)
}

/// Returns when the deletion was requested. The pod's deletion timestamp is the end of its grace period.
fn deletion_asked(pod: &Pod) -> Option<Timestamp> {
    let grace = SignedDuration::from_secs(pod.metadata.deletion_grace_period_seconds.unwrap_or_default());
    pod.metadata.deletion_timestamp.as_ref().and_then(|time| time.0.checked_sub(grace).ok())
}

/// Returns why a pod that has not ended makes no progress.
fn stuck(status: &PodStatus) -> Option<WaitingReason> {
    let condition = |kind: &str| status.conditions.iter().flatten().find(|one| one.type_ == kind);
    let since = |kind: &str| condition(kind).and_then(|one| one.last_transition_time.as_ref()).map(|time| time.0);
    let accepted = status.start_time.as_ref().map(|time| time.0);
    if let Some(unscheduled) = condition("PodScheduled").filter(|one| one.status == "False") {
        let reason = match unscheduled.reason.as_deref() {
            Some("SchedulingGated") => "SchedulingGated",
            _ => "Unschedulable",
        };
        // Clusters that make room later are common, so the operator waits without limit.
        return Some(WaitingReason { reason, since: since("PodScheduled"), fatal: false });
    }
    let waiting = |statuses: &Option<Vec<ContainerStatus>>| {
        statuses.iter().flatten().find_map(|one| {
            let reason = one.state.as_ref()?.waiting.as_ref()?.reason.as_deref()?;
            match reason {
                "ErrImagePull"
                | "ImagePullBackOff"
                | "ErrImageNeverPull"
                | "ImageInspectError"
                | "RegistryUnavailable" => Some("ImagePull"),
                "InvalidImageName" => Some("InvalidImageName"),
                "CreateContainerConfigError" | "CreateContainerError" => Some("CreateContainerConfigError"),
                _ => None,
            }
        })
    };
    let init = waiting(&status.init_container_statuses).map(|reason| (reason, accepted));
    // The agent's image is pulled after the init containers have completed.
    let agent = || waiting(&status.container_statuses).map(|reason| (reason, since("Initialized").or(accepted)));
    init.or_else(agent).map(|(reason, since)| WaitingReason { reason, since, fatal: true })
}

#[cfg(test)]
mod tests;
