//! Builds the pod of one attempt: probe, harness, agent.
//!
//! Guarantees: The pod has Pod Security `restricted`, no added capability, no token and no name server that the agent can reach, and all
//! limits set. Its NetworkPolicy was read back first (the [`Proof`] in the signature). The agent can write only where its task says: an
//! empty read-only volume covers the paths that runtimes leave open, `/tmp` and `/dev/shm`.
//!
//! The token's volume is mounted in the harness container only. The mount alone keeps the token from the agent. Its mode is 0444 without
//! `fsGroup`: the kubelet writes projected tokens as root and gives them to a UID only if all containers share it, and `fsGroup` would add
//! its group to the agent's process as well. Neither would separate more than the mount does.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{
        Capabilities, ConfigMapVolumeSource, Container, EmptyDirVolumeSource, EnvVar, EnvVarSource, HTTPGetAction,
        ObjectFieldSelector, Pod, PodDNSConfig, PodSecurityContext, PodSpec, Probe, ProjectedVolumeSource,
        ResourceRequirements, SeccompProfile, SecretVolumeSource, SecurityContext, ServiceAccountTokenProjection,
        Volume, VolumeMount, VolumeProjection,
    },
    apimachinery::pkg::{api::resource::Quantity as ApiQuantity, util::intstr::IntOrString},
};

use super::{
    agent, config_map, intact, names,
    network_policy::Proof,
    validated::{Attempt, Source, Workload},
};
use crate::wire;

/// Seconds beyond the wall time for which the kubelet lets a pod live: for image pulls, the probe and the harness's last segment. The
/// harness and the operator measure the wall time itself from the agent's start.
pub const START_ALLOWANCE_SECONDS: i64 = 300;
/// Seconds between SIGTERM and SIGKILL: enough for the witness to cosign the harness's last segment.
const GRACE_SECONDS: i64 = 30;
/// The user of probe and harness, `nonroot` of distroless images.
const HARNESS_UID: i64 = 65532;
/// The lifetime of a token in seconds. The kubelet renews it after four fifths of it.
const TOKEN_SECONDS: i64 = 3600;
/// The harness's port for the kubelet.
const KUBELET_PORT: u16 = 9901;
/// Seconds within which the harness must answer for the first time. It opens the log at the gateway before it answers.
const START_PROBES: i32 = 60;

const CONFIG_DIR: &str = "/etc/belay";
const TOKEN_DIR: &str = "/var/run/belay";
/// Not under `/run`: in many images, `/var/run` is a link to `/run`, and this mount would hide the token's mount.
const RUN_DIR: &str = "/var/lib/belay";
const SPOOL_DIR: &str = "/var/spool/belay";
/// The volume that covers open paths that the task does not declare.
const COVER: &str = "cover";

/// Labels that tell well-known injectors to skip this pod. A mesh's proxy, a tracer or a log agent could not reach anything because of the
/// NetworkPolicy, and a pod that has one anyway is not the planned pod.
const NOT_INJECTED_LABELS: [(&str, &str); 4] = [
    ("sidecar.istio.io/inject", "false"),
    ("istio.io/dataplane-mode", "none"),
    ("kuma.io/sidecar-injection", "disabled"),
    ("admission.datadoghq.com/enabled", "false"),
];
/// Annotations with the same purpose.
const NOT_INJECTED_ANNOTATIONS: [(&str, &str); 12] = [
    ("sidecar.istio.io/inject", "false"),
    ("linkerd.io/inject", "disabled"),
    ("consul.hashicorp.com/connect-inject", "false"),
    ("vault.hashicorp.com/agent-inject", "false"),
    ("dapr.io/enabled", "false"),
    ("dynatrace.com/inject", "false"),
    ("sidecar.opentelemetry.io/inject", "false"),
    ("instrumentation.opentelemetry.io/inject-dotnet", "false"),
    ("instrumentation.opentelemetry.io/inject-go", "false"),
    ("instrumentation.opentelemetry.io/inject-java", "false"),
    ("instrumentation.opentelemetry.io/inject-nodejs", "false"),
    ("instrumentation.opentelemetry.io/inject-python", "false"),
];

/// Builds the pod of an attempt.
pub fn build(attempt: &Attempt<'_>, network_policy: &Proof) -> Pod {
    let task = attempt.task;
    let spec = PodSpec {
        restart_policy: Some("Never".to_owned()),
        runtime_class_name: task.runtime_class.clone(),
        service_account_name: Some("default".to_owned()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        share_process_namespace: Some(false),
        dns_policy: Some("None".to_owned()),
        dns_config: Some(PodDNSConfig { nameservers: Some(vec!["127.0.0.1".to_owned()]), ..PodDNSConfig::default() }),
        active_deadline_seconds: Some(task.lifetime_seconds.saturating_add(START_ALLOWANCE_SECONDS)),
        termination_grace_period_seconds: Some(GRACE_SECONDS),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            seccomp_profile: Some(runtime_default()),
            ..PodSecurityContext::default()
        }),
        init_containers: Some(vec![probe(attempt), harness(attempt)]),
        containers: vec![agent_container(attempt)],
        volumes: Some(volumes(attempt)),
        ..PodSpec::default()
    };
    let owned = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<BTreeMap<_, _>>()
    };
    let mut metadata = task.owner.metadata(attempt.number);
    metadata.labels.get_or_insert_default().extend(owned(&NOT_INJECTED_LABELS));
    let mut annotations = owned(&NOT_INJECTED_ANNOTATIONS);
    annotations.extend([
        (names::POLICY_DIGEST.to_owned(), task.policy_digest().to_owned()),
        (names::NETWORK_POLICY.to_owned(), network_policy.as_str().to_owned()),
        (names::PLAN.to_owned(), intact::plan(&spec)),
    ]);
    metadata.annotations = Some(annotations);
    Pod { metadata, spec: Some(spec), status: None }
}

fn probe(attempt: &Attempt<'_>) -> Container {
    Container {
        name: names::PROBE.to_owned(),
        image: Some(attempt.surroundings.image.clone()),
        command: Some(vec!["/belay-harness".to_owned()]),
        args: Some(strings(&[
            "probe",
            "--config",
            "/etc/belay/config.json",
            "--out",
            "/var/lib/belay/containment.json",
        ])),
        env: Some(vec![downward("HOST_IP", "status.hostIP")]),
        resources: Some(system_resources(attempt)),
        security_context: Some(security(HARNESS_UID)),
        volume_mounts: Some(vec![mount("config", CONFIG_DIR, true), mount("run", RUN_DIR, false)]),
        ..Container::default()
    }
}

fn harness(attempt: &Attempt<'_>) -> Container {
    Container {
        name: names::HARNESS.to_owned(),
        image: Some(attempt.surroundings.image.clone()),
        // A native sidecar starts before the agent and outlives it.
        restart_policy: Some("Always".to_owned()),
        command: Some(vec!["/belay-harness".to_owned()]),
        args: Some(strings(&[
            "serve",
            "--config",
            "/etc/belay/config.json",
            "--containment",
            "/var/lib/belay/containment.json",
            "--token",
            "/var/run/belay/token",
            "--spool",
            SPOOL_DIR,
        ])),
        env: Some(vec![
            downward("POD_NAME", "metadata.name"),
            downward("POD_UID", "metadata.uid"),
            downward("POD_NAMESPACE", "metadata.namespace"),
            downward("NODE_NAME", "spec.nodeName"),
            downward("HOST_IP", "status.hostIP"),
            downward("NETWORK_POLICY", &format!("metadata.annotations['{}']", names::NETWORK_POLICY)),
            plain("RUNTIME_CLASS", attempt.task.runtime_class.as_deref().unwrap_or_default()),
        ]),
        resources: Some(system_resources(attempt)),
        security_context: Some(security(HARNESS_UID)),
        startup_probe: Some(Probe {
            http_get: Some(HTTPGetAction {
                path: Some("/readyz".to_owned()),
                port: IntOrString::Int(i32::from(KUBELET_PORT)),
                ..HTTPGetAction::default()
            }),
            period_seconds: Some(1),
            failure_threshold: Some(START_PROBES),
            ..Probe::default()
        }),
        volume_mounts: Some(vec![
            mount("config", CONFIG_DIR, true),
            mount("token", TOKEN_DIR, true),
            mount("run", RUN_DIR, true),
            mount("spool", SPOOL_DIR, false),
        ]),
        ..Container::default()
    }
}

fn agent_container(attempt: &Attempt<'_>) -> Container {
    let agent = attempt.task.agent(attempt.number);
    let resources = BTreeMap::from([
        ("cpu".to_owned(), ApiQuantity(agent.cpu.as_str().to_owned())),
        ("memory".to_owned(), ApiQuantity(agent.memory.as_str().to_owned())),
        ("ephemeral-storage".to_owned(), ApiQuantity(agent.ephemeral_storage.as_str().to_owned())),
    ]);
    let mounts =
        agent.mounts.iter().enumerate().map(|(index, one)| mount(&format!("mount-{index}"), one.path.as_str(), true));
    let scopes = agent
        .write_scopes
        .iter()
        .enumerate()
        .map(|(index, one)| mount(&format!("scope-{index}"), one.path.as_str(), false));
    let (image, command, args) = match agent.workload {
        Workload::Agent { image, command, args } => (image, command.clone(), args.clone()),
        Workload::Rollback => (&attempt.surroundings.image, strings(&["/belay-harness"]), strings(&["undo"])),
    };
    Container {
        name: names::AGENT.to_owned(),
        image: Some(image.clone()),
        command: some(command),
        args: some(args),
        env: Some(agent.env.iter().map(|(name, value)| plain(name, value)).collect()),
        resources: Some(ResourceRequirements {
            requests: Some(resources.clone()),
            limits: Some(resources),
            ..ResourceRequirements::default()
        }),
        security_context: Some(security(agent::UID)),
        volume_mounts: some(
            mounts.chain(scopes).chain(agent.covered.iter().map(|path| mount(COVER, path, true))).collect(),
        ),
        termination_message_policy: Some("File".to_owned()),
        ..Container::default()
    }
}

fn volumes(attempt: &Attempt<'_>) -> Vec<Volume> {
    let task = attempt.task;
    let mut volumes = vec![
        Volume {
            name: "config".to_owned(),
            config_map: Some(ConfigMapVolumeSource {
                name: attempt.name(),
                default_mode: Some(0o444),
                items: Some(vec![k8s_openapi::api::core::v1::KeyToPath {
                    key: config_map::KEY.to_owned(),
                    path: config_map::KEY.to_owned(),
                    mode: None,
                }]),
                optional: None,
            }),
            ..Volume::default()
        },
        Volume {
            name: "token".to_owned(),
            projected: Some(ProjectedVolumeSource {
                default_mode: Some(0o444),
                sources: Some(vec![VolumeProjection {
                    service_account_token: Some(ServiceAccountTokenProjection {
                        audience: Some(wire::AUDIENCE.to_owned()),
                        expiration_seconds: Some(TOKEN_SECONDS),
                        path: "token".to_owned(),
                    }),
                    ..VolumeProjection::default()
                }]),
            }),
            ..Volume::default()
        },
        empty_dir("run", "1Mi", Some("Memory")),
        // In memory: like a directory on disk, it outlives the container and ends with the pod. A sync to memory does not cost a read the
        // milliseconds that a sync to disk costs.
        empty_dir("spool", "16Mi", Some("Memory")),
    ];
    if !task.agent(attempt.number).covered.is_empty() {
        volumes.push(empty_dir(COVER, "1Mi", None));
    }
    for (index, one) in task.mounts.iter().enumerate() {
        let mut volume = Volume { name: format!("mount-{index}"), ..Volume::default() };
        match &one.source {
            Source::ConfigMap(name) => {
                volume.config_map = Some(ConfigMapVolumeSource {
                    name: name.clone(),
                    default_mode: Some(0o444),
                    ..ConfigMapVolumeSource::default()
                });
            }
            Source::Secret(name) => {
                volume.secret = Some(SecretVolumeSource {
                    secret_name: Some(name.clone()),
                    default_mode: Some(0o444),
                    ..SecretVolumeSource::default()
                });
            }
        }
        volumes.push(volume);
    }
    volumes.extend(
        task.write_scopes
            .iter()
            .enumerate()
            .map(|(index, one)| empty_dir(&format!("scope-{index}"), one.size.as_str(), None)),
    );
    volumes
}

fn empty_dir(name: &str, size: &str, medium: Option<&str>) -> Volume {
    Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource {
            medium: medium.map(str::to_owned),
            size_limit: Some(ApiQuantity(size.to_owned())),
        }),
        ..Volume::default()
    }
}

/// Returns the resources of probe and harness. The requests are small, so that most of the pod's resources go to the agent. Memory and disk
/// have limits.
fn system_resources(attempt: &Attempt<'_>) -> ResourceRequirements {
    let quantity = |value: &str| ApiQuantity(value.to_owned());
    let memory = quantity(&attempt.surroundings.harness_memory);
    ResourceRequirements {
        requests: Some(BTreeMap::from([
            ("cpu".to_owned(), quantity(&attempt.surroundings.harness_cpu)),
            ("memory".to_owned(), memory.clone()),
            ("ephemeral-storage".to_owned(), quantity("64Mi")),
        ])),
        limits: Some(BTreeMap::from([
            ("memory".to_owned(), memory),
            ("ephemeral-storage".to_owned(), quantity("128Mi")),
        ])),
        ..ResourceRequirements::default()
    }
}

fn security(uid: i64) -> SecurityContext {
    SecurityContext {
        run_as_user: Some(uid),
        run_as_group: Some(uid),
        run_as_non_root: Some(true),
        read_only_root_filesystem: Some(true),
        allow_privilege_escalation: Some(false),
        privileged: Some(false),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
        seccomp_profile: Some(runtime_default()),
        ..SecurityContext::default()
    }
}

fn runtime_default() -> SeccompProfile {
    SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }
}

fn mount(volume: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: volume.to_owned(),
        mount_path: path.to_owned(),
        read_only: Some(read_only),
        ..VolumeMount::default()
    }
}

/// Returns a variable whose value is used literally. Kubernetes reads `$$` as `$`, and `$(NAME)` as a reference.
fn plain(name: &str, value: &str) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value.replace('$', "$$")), value_from: None }
}

fn downward(name: &str, path: &str) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value: None,
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector { api_version: Some("v1".to_owned()), field_path: path.to_owned() }),
            ..EnvVarSource::default()
        }),
    }
}

fn strings(values: &[&str]) -> Vec<String> {
    values.iter().map(|value| (*value).to_owned()).collect()
}

fn some<T>(values: Vec<T>) -> Option<Vec<T>> {
    if values.is_empty() { None } else { Some(values) }
}
