//! What a pod's status means for its attempt.
//!
//! Promises: every end of a pod has a class and a one-word reason from a closed set; what a pod was told from outside is never
//! taken for the agent's own doing. Refuses: messages of kubelets and runtimes, but for one that nothing else tells apart.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{ContainerState, ContainerStatus, Pod, PodStatus},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::ResourceExt;

use crate::{
    api::agent_task::FailureClass,
    canonical,
    plan::{intact, names},
    wire,
};

/// A pod, as far as decisions go.
#[derive(Clone, Debug, PartialEq)]
pub struct PodView {
    /// Its attempt.
    pub attempt: i64,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// When it was created.
    pub created: Option<Timestamp>,
    /// Whether its deletion was asked for.
    pub deleting: bool,
    /// Whether nothing in it runs any more.
    pub terminal: bool,
    /// What the probe said, once it did.
    pub contained: Option<bool>,
    /// When the kubelet took it.
    pub accepted: Option<Timestamp>,
    /// When the agent started.
    pub agent_started: Option<Timestamp>,
    /// Seconds from its acceptance for which the kubelet lets it live.
    pub lifetime: Option<i64>,
    /// Why it does not get on, and since when.
    pub stuck: Option<Stuck>,
    /// SHA-256 of the images that it runs, hex, by container.
    pub images: BTreeMap<String, String>,
    /// What about it is not as planned.
    pub altered: Option<String>,
    /// How it ended, once it did.
    pub end: Option<End>,
}

/// A pod that does not get on.
#[derive(Clone, Debug, PartialEq)]
pub struct Stuck {
    /// One word.
    pub reason: &'static str,
    /// Since when.
    pub since: Option<Timestamp>,
    /// Whether waiting a while more is hopeless.
    pub fatal: bool,
}

/// How a pod ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The class of the failure; none is success.
    pub class: Option<FailureClass>,
    /// One word.
    pub reason: &'static str,
    /// The agent's exit code, if it has one.
    pub exit_code: Option<i32>,
}

impl End {
    fn new(class: FailureClass, reason: &'static str, exit_code: Option<i32>) -> Self {
        Self { class: Some(class), reason, exit_code }
    }
}

/// Reads a pod. `None` if it carries no attempt, so that it is not ours.
pub fn pod(pod: &Pod) -> Option<PodView> {
    let attempt = pod.labels().get(names::ATTEMPT)?.parse().ok()?;
    let empty = PodStatus::default();
    let status = pod.status.as_ref().unwrap_or(&empty);
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
    let phase = status.phase.as_deref().unwrap_or_default();
    Some(PodView {
        attempt,
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        created: time(&pod.creation_timestamp()),
        deleting: pod.metadata.deletion_timestamp.is_some(),
        terminal: matches!(phase, "Succeeded" | "Failed"),
        contained,
        accepted: time(&status.start_time),
        agent_started,
        lifetime: pod.spec.as_ref().and_then(|spec| spec.active_deadline_seconds),
        stuck: stuck(status),
        images: images(status),
        altered: intact::altered(pod),
        end: end(pod, status, agent_started.is_some()),
    })
}

/// Reason of an attempt whose pod was not the pod that was planned.
pub const POD_ALTERED: &str = "PodAltered";
/// What a tag means may change; a digest does not. The kubelet tells it once it has made the container.
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

/// The pod's end, if it has come to one that counts.
fn end(pod: &Pod, status: &PodStatus, agent_ran: bool) -> Option<End> {
    use FailureClass::{Agent, Budget, Infrastructure};
    let phase = status.phase.as_deref().unwrap_or_default();
    let over = matches!(phase, "Succeeded" | "Failed") || pod.metadata.deletion_timestamp.is_some() || held_up(status);
    let agent = find(&status.container_statuses, names::AGENT)
        .and_then(state)
        .and_then(|state| state.terminated.as_ref())
        // A pod that is stopped before its agent ran reports an end all the same; there was no agent to end.
        .filter(|_| agent_ran);
    let exit_code = agent.map(|ended| ended.exit_code);
    // The harness has closed its log and said so; kubelet starts it again, and nothing in the pod stops the agent. One that was done
    // is not asked to do it all again because the last of its records are late.
    let parked_after_success = |class| class == FailureClass::Dependency && exit_code == Some(0);
    if let Some((class, reason)) = harness_ended(status).filter(|(class, _)| !parked_after_success(*class)) {
        return Some(End::new(class, reason, exit_code));
    }
    // While the harness finishes its log the attempt is still under way.
    if !over {
        return None;
    }
    let disruption =
        status.conditions.iter().flatten().find(|one| one.type_ == "DisruptionTarget" && one.status == "True");
    let before_deletion = match (deletion_asked(pod), agent.and_then(|ended| ended.finished_at.as_ref())) {
        (None, _) => true,
        // Both have whole seconds. In the same one, being stopped from outside is the safe reading: it is no success.
        (Some(asked), Some(finished)) => finished.0 < asked,
        (Some(_), None) => false,
    };
    let told = status.reason.as_deref().unwrap_or_default();
    if told == "DeadlineExceeded" {
        return Some(if agent_ran {
            End::new(Budget, "DeadlineExceeded", exit_code)
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
    Some(match (probe, told) {
        (Some(code), _) if code == i32::from(wire::EXIT_UNPROVEN) => {
            End::new(Infrastructure, "ContainmentUnproven", None)
        }
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

/// Whether the agent has ended and a container that nobody planned has not: the pod would not end, nor be told to, though the attempt is
/// over. The kubelet ends the harness after the containers beside the agent; ours is the agent alone.
fn held_up(status: &PodStatus) -> bool {
    let ended = |one: &ContainerStatus| state(one).is_some_and(|state| state.terminated.is_some());
    let mut beside = status.container_statuses.iter().flatten().filter(|one| one.name != names::AGENT);
    find(&status.container_statuses, names::AGENT).is_some_and(ended) && beside.any(|one| !ended(one))
}

/// Why the harness says that the attempt is over, by its exit code of now or of before it was started again.
fn harness_ended(status: &PodStatus) -> Option<(FailureClass, &'static str)> {
    let harness = find(&status.init_container_statuses, names::HARNESS)?;
    let ends =
        [&harness.state, &harness.last_state].into_iter().flatten().filter_map(|state| state.terminated.as_ref());
    ends.filter_map(|ended| u8::try_from(ended.exit_code).ok()).find_map(|code| match code {
        wire::EXIT_REFUSED_ENOUGH => Some((FailureClass::Policy, "TooManyDenials")),
        wire::EXIT_OUT_OF_TIME => Some((FailureClass::Budget, "DeadlineExceeded")),
        wire::EXIT_UNAPPROVED => Some((FailureClass::Policy, "ApprovalExpired")),
        wire::EXIT_PARKED => Some((FailureClass::Dependency, "EvidenceUnavailable")),
        _ => None,
    })
}

/// When deletion was asked for: the timestamp on a pod is when its grace ends.
fn deletion_asked(pod: &Pod) -> Option<Timestamp> {
    let grace = jiff::SignedDuration::from_secs(pod.metadata.deletion_grace_period_seconds.unwrap_or_default());
    pod.metadata.deletion_timestamp.as_ref().and_then(|time| time.0.checked_sub(grace).ok())
}

/// Why a pod that has not ended does not get on.
fn stuck(status: &PodStatus) -> Option<Stuck> {
    let condition = |kind: &str| status.conditions.iter().flatten().find(|one| one.type_ == kind);
    let since = |kind: &str| condition(kind).and_then(|one| one.last_transition_time.as_ref()).map(|time| time.0);
    let accepted = status.start_time.as_ref().map(|time| time.0);
    if let Some(unscheduled) = condition("PodScheduled").filter(|one| one.status == "False") {
        let reason = match unscheduled.reason.as_deref() {
            Some("SchedulingGated") => "SchedulingGated",
            _ => "Unschedulable",
        };
        // A cluster that makes room later is an ordinary one: this waits for as long as it takes.
        return Some(Stuck { reason, since: since("PodScheduled"), fatal: false });
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
    // The agent's image is pulled once the init containers are through.
    let agent = || waiting(&status.container_statuses).map(|reason| (reason, since("Initialized").or(accepted)));
    init.or_else(agent).map(|(reason, since)| Stuck { reason, since, fatal: true })
}

#[cfg(test)]
mod tests;
