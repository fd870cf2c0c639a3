//! Validates a task, with types that can hold only a valid task.
//!
//! Guarantees: A [`Validated`] has everything that is needed to build every object. Validation names every wrong field at once.
//!
//! Rejects: Paths that hide parts of the system, names that Belay sets itself, and resources above the class's resources.

use std::borrow::Borrow;

use kube::ResourceExt;

use super::{Finding, access, evidence::Location, names, owner::Owner, pack, quantity::Quantity, task};
use crate::{
    api::{AgentTask, PolicyPack, ToolContract, policy_pack::WorkflowClass},
    canonical::{self, CanonicalError},
    policy::config::{HarnessConfig, PolicyConfig, Probe, Wiring},
};

/// The resources of a class that sets none: enough for an interpreter and its libraries, and not all of a node.
pub const DEFAULT_CPU: &str = "1";
/// See [`DEFAULT_CPU`].
pub const DEFAULT_MEMORY: &str = "1Gi";
/// See [`DEFAULT_CPU`].
pub const DEFAULT_EPHEMERAL_STORAGE: &str = "1Gi";

/// The maximum size of a rendered policy, in bytes. A ConfigMap holds 1 MiB, and the first record of each attempt contains the policy as
/// well.
pub const MAX_POLICY_BYTES: usize = 512 * 1024;

/// Directories of the system, the image or Belay. Mounts and write scopes must not overlap with them.
const RESERVED_PATHS: [&str; 18] = [
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/proc",
    "/root",
    "/run/belay",
    "/run/secrets",
    "/sbin",
    "/sys",
    "/usr",
    "/var/lib",
    "/var/run/belay",
    "/var/run/secrets",
    "/var/spool/belay",
];

/// Directories that a runtime makes writable for everyone even if the root is read-only. They are covered unless the task declares them. A
/// task can declare them only as a whole, because nothing can be mounted inside a read-only cover.
pub const OPEN_PATHS: [&str; 2] = ["/dev/shm", "/tmp"];

/// Environment variables that Belay sets, in upper case. The task may set other variables that start with the same letters.
const RESERVED_ENV: [&str; 7] = [
    "OPENAI_BASE_URL",
    "OPENAI_API_KEY",
    "ANTHROPIC_BASE_URL",
    "ANTHROPIC_API_KEY",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
];
/// The prefix of Belay's own variables, in upper case.
const RESERVED_ENV_PREFIX: &str = "BELAY_";

/// A valid task.
#[derive(Clone, Debug)]
pub struct Validated {
    pub(super) owner: Owner,
    pub(super) objective: String,
    pub(super) runtime_class: Option<String>,
    pub(crate) lifetime_seconds: i64,
    pub(super) workload: Workload,
    pub(super) env: Vec<(EnvName, String)>,
    pub(super) resources: AgentResources,
    pub(super) mounts: Vec<ReadOnlyMount>,
    pub(super) write_scopes: Vec<Scope>,
    pub(super) evidence: Location,
    policy: PolicyConfig,
    policy_digest: String,
}

/// What runs in the agent container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Workload {
    /// An agent.
    Agent {
        /// The image.
        image: String,
        /// The entrypoint. The image's own if empty.
        command: Vec<String>,
        /// The arguments.
        args: Vec<String>,
    },
    /// Belay's own image. It tells the harness to roll back another task and waits for the result.
    Rollback,
}

/// The name of an environment variable that Belay does not set itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnvName(pub(super) String);

impl EnvName {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An absolute path in the agent container that hides nothing and overlaps with no other path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentPath(pub(super) String);

impl AgentPath {
    /// Returns the path.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The resources of the agent container, within the class's resources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentResources {
    pub(super) cpu: Quantity,
    pub(super) memory: Quantity,
    pub(super) ephemeral_storage: Quantity,
}

/// A read-only mount and its one source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadOnlyMount {
    /// The path in the agent container.
    pub path: AgentPath,
    /// The source of the mount.
    pub source: Source,
}

/// The source of a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A ConfigMap, by name.
    ConfigMap(String),
    /// A Secret, by name.
    Secret(String),
}

/// A directory that the agent may write to, and its size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// The path in the agent container.
    pub path: AgentPath,
    /// The maximum size, in bytes.
    pub size: Quantity,
}

/// Settings of the cluster, the same for every task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    /// The namespace of operator and gateway. No task runs there, because its Secrets belong to the gateway.
    pub system_namespace: String,
    /// The image of the harness.
    pub image: String,
    /// The cluster address of the gateway, without a port.
    pub gateway: String,
    /// The certificate authority of the gateway, in PEM.
    pub gateway_ca: String,
    /// The `address:port` of each API server. An agent must not reach them.
    pub api_servers: Vec<String>,
    /// The CPU request of the harness.
    pub harness_cpu: String,
    /// The memory limit of the harness.
    pub harness_memory: String,
}

/// One attempt of a valid task: everything that its objects are built from.
#[derive(Clone, Debug)]
pub struct Attempt<'a> {
    pub(super) task: &'a Validated,
    pub(super) surroundings: &'a Installation,
    pub(super) number: i64,
    pub(super) config: String,
}

impl Validated {
    /// Returns the rendered policy.
    pub fn policy(&self) -> &PolicyConfig {
        &self.policy
    }

    /// Returns the digest of the rendered policy, in lower-case hex.
    pub fn policy_digest(&self) -> &str {
        &self.policy_digest
    }

    /// Returns where the evidence is stored.
    pub fn evidence(&self) -> &Location {
        &self.evidence
    }

    /// Returns one attempt of the task.
    ///
    /// # Errors
    /// Returns an error only if the surroundings have no canonical form. Strings always have one.
    pub fn attempt<'a>(&'a self, surroundings: &'a Installation, number: i64) -> Result<Attempt<'a>, CanonicalError> {
        let at = |port: u16| authority(&surroundings.gateway, port);
        let mut unreachable = vec![at(names::CANARY_PORT)];
        unreachable.extend(surroundings.api_servers.iter().cloned());
        let config = HarnessConfig {
            policy: self.policy.clone(),
            wiring: Wiring {
                attempt: number,
                gateway: at(names::GATEWAY_PORT),
                gateway_ca: surroundings.gateway_ca.clone(),
                probe: Probe { reachable: at(names::GATEWAY_PORT), unreachable },
            },
        };
        let config = String::from_utf8_lossy(&canonical::to_bytes(&config)?).into_owned();
        Ok(Attempt { task: self, surroundings, number, config })
    }
}

impl Attempt<'_> {
    /// Returns the name of the attempt's pod, NetworkPolicy and ConfigMap.
    pub fn name(&self) -> String {
        names::of_attempt(&self.task.owner.name, self.number)
    }

    /// Returns the attempt's number, from 1.
    pub fn number(&self) -> i64 {
        self.number
    }
}

/// Returns `address:port`, with brackets around an IPv6 address.
pub fn authority(address: &str, port: u16) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

/// Validates a task against its contracts and the pack that governs it.
///
/// # Errors
/// Returns everything that is wrong, at once.
pub fn validate<C: Borrow<ToolContract>>(
    task: &AgentTask,
    contracts: &[C],
    pack: &PolicyPack,
    system_namespace: &str,
) -> Result<Validated, Vec<Finding>> {
    let mut findings = Vec::new();
    let namespace = task.namespace().unwrap_or_default();
    if namespace == system_namespace {
        findings.push(Finding::new(
            "metadata.namespace",
            "a namespace for tasks",
            format!("`{namespace}`, which has the gateway's credentials"),
            "apply the task in another namespace",
        ));
    }
    if task.spec.agent.is_some() == task.spec.rollback_of.is_some() {
        findings.push(Finding::new(
            "spec.agent",
            "exactly one of agent and rollbackOf",
            if task.spec.agent.is_some() { "both" } else { "neither" },
            "set one of them",
        ));
    }
    let policy = task::render_policy(task, contracts, pack).map_err(|found| findings.extend(found)).ok();
    if let Some(policy) = &policy {
        access::unreachable(policy, &mut findings);
    }
    let digest = policy.as_ref().and_then(|policy| digest(policy, &mut findings));
    // Without a class there are no limits to compare with. The missing class is already a finding.
    let resources = pack::class_of(task, pack).ok().and_then(|class| resources(task, class, &mut findings));
    let env = env(task, &mut findings);
    let mut paths = Vec::new();
    let mounts = mounts(task, &mut paths, &mut findings);
    let write_scopes = write_scopes(task, resources.as_ref(), &mut paths, &mut findings);
    match (policy, digest, resources, pack::class_of(task, pack)) {
        (Some(policy), Some(policy_digest), Some(resources), Ok(class)) if findings.is_empty() => Ok(Validated {
            owner: Owner::of(task),
            objective: task.spec.objective.clone(),
            runtime_class: class.runtime_class_name.clone(),
            lifetime_seconds: policy.limits.wall_time_seconds.saturating_add(policy.limits.approval_wait_seconds),
            workload: task.spec.agent.as_ref().map_or(Workload::Rollback, |agent| Workload::Agent {
                image: agent.image.clone(),
                command: agent.command.clone(),
                args: agent.args.clone(),
            }),
            env,
            resources,
            mounts,
            write_scopes,
            evidence: Location::of(&pack.spec.evidence),
            policy,
            policy_digest,
        }),
        _ => Err(findings),
    }
}

fn digest(policy: &PolicyConfig, findings: &mut Vec<Finding>) -> Option<String> {
    let mut find = |found: String| {
        findings.push(Finding::new(
            "spec.tools",
            format!("contracts that render to at most {MAX_POLICY_BYTES} bytes"),
            found,
            "name fewer tools, or shorten their descriptions and schemas",
        ));
    };
    match canonical::to_bytes(policy) {
        Ok(bytes) if bytes.len() > MAX_POLICY_BYTES => {
            find(format!("{} bytes", bytes.len()));
            None
        }
        Ok(bytes) => Some(hex::encode(canonical::sha256(&bytes))),
        Err(error) => {
            find(error.to_string());
            None
        }
    }
}

fn resources(task: &AgentTask, class: &WorkflowClass, findings: &mut Vec<Finding>) -> Option<AgentResources> {
    let agent = task.spec.agent.as_ref().map(|agent| agent.resources.clone());
    let (asked, most) = (agent.unwrap_or_default(), &class.resources);
    let mut one = |field: &str, asked: Option<String>, most: &Option<String>, default: &str| {
        let ceiling = ceiling(class, field, most, default, findings);
        let asked = asked.as_deref().map(Quantity::parse).transpose().map_err(|found| {
            findings.push(Finding::new(
                format!("spec.agent.resources.{field}"),
                "a quantity above zero, such as `500m` or `512Mi`",
                found.to_string(),
                "correct it, or leave it out to get the class's value",
            ));
        });
        let (ceiling, asked) = (ceiling?, asked.ok()?);
        if let Some(asked) = asked.as_ref().filter(|asked| **asked > ceiling) {
            findings.push(Finding::new(
                format!("spec.agent.resources.{field}"),
                format!("at most `{}`, the limit of class `{}`", ceiling.as_str(), class.name),
                format!("`{}`", asked.as_str()),
                "correct it, or have the class's limit raised in the pack",
            ));
        }
        // The container of a rollback task only waits, so it needs very little, whatever the class allows.
        let idle = if field == "cpu" { "50m" } else { "32Mi" };
        let idle = Quantity::parse(idle).ok().filter(|idle| task.spec.agent.is_none() && *idle < ceiling);
        Some(asked.or(idle).unwrap_or(ceiling))
    };
    let cpu = one("cpu", asked.cpu, &most.cpu, DEFAULT_CPU);
    let memory = one("memory", asked.memory, &most.memory, DEFAULT_MEMORY);
    let storage = one("ephemeralStorage", asked.ephemeral_storage, &most.ephemeral_storage, DEFAULT_EPHEMERAL_STORAGE);
    Some(AgentResources { cpu: cpu?, memory: memory?, ephemeral_storage: storage? })
}

/// Checks the resources of a class on their own, whatever task names the class.
pub fn check_class(class: &WorkflowClass) -> Vec<Finding> {
    let mut findings = Vec::new();
    let most = &class.resources;
    ceiling(class, "cpu", &most.cpu, DEFAULT_CPU, &mut findings);
    ceiling(class, "memory", &most.memory, DEFAULT_MEMORY, &mut findings);
    ceiling(class, "ephemeralStorage", &most.ephemeral_storage, DEFAULT_EPHEMERAL_STORAGE, &mut findings);
    findings
}

fn ceiling(
    class: &WorkflowClass,
    field: &str,
    most: &Option<String>,
    default: &str,
    findings: &mut Vec<Finding>,
) -> Option<Quantity> {
    let ceiling = Quantity::parse(most.as_deref().unwrap_or(default));
    let ceiling = ceiling.map_err(|found| {
        findings.push(Finding::new(
            format!("PolicyPack spec.workflowClasses[{}].resources.{field}", class.name),
            "a quantity above zero, such as `500m` or `512Mi`",
            found.to_string(),
            "correct the pack",
        ));
    });
    ceiling.ok()
}

fn env(task: &AgentTask, findings: &mut Vec<Finding>) -> Vec<(EnvName, String)> {
    let mut env: Vec<(EnvName, String)> = Vec::new();
    for (index, variable) in task.spec.agent.iter().flat_map(|agent| &agent.env).enumerate() {
        let upper = variable.name.to_ascii_uppercase();
        let reserved = RESERVED_ENV.contains(&upper.as_str()) || upper.starts_with(RESERVED_ENV_PREFIX);
        let identifier = !upper.is_empty()
            && !upper.starts_with(|c: char| c.is_ascii_digit())
            && upper.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        let twice = env.iter().any(|(name, _)| name.0 == variable.name);
        if reserved || twice || !identifier {
            findings.push(Finding::new(
                format!("spec.agent.env[{index}].name"),
                format!("a C identifier, once, that Belay does not set itself ({}, {RESERVED_ENV_PREFIX}*)", RESERVED_ENV.join(", ")),
                format!("`{}`", variable.name),
                match upper.as_str() {
                    "OPENAI_API_KEY" | "ANTHROPIC_API_KEY" => {
                        "leave it out: the gateway adds the key, from the credentials of the model's host in the policy pack (of `belay run`: \
                         --credential)"
                    }
                    _ => "choose another name",
                },
            ));
        }
        env.push((EnvName(variable.name.clone()), variable.value.clone()));
    }
    env
}

fn mounts(task: &AgentTask, paths: &mut Vec<(String, String)>, findings: &mut Vec<Finding>) -> Vec<ReadOnlyMount> {
    let mut mounts = Vec::new();
    for (index, mount) in task.spec.workspace.mounts.iter().enumerate() {
        let field = format!("spec.workspace.mounts[{index}]");
        let source = match (&mount.config_map, &mount.secret) {
            (Some(name), None) => Source::ConfigMap(name.clone()),
            (None, Some(name)) => Source::Secret(name.clone()),
            (config_map, _) => {
                findings.push(Finding::new(
                    field,
                    "exactly one of configMap and secret",
                    if config_map.is_some() { "both" } else { "neither" },
                    "set one of them",
                ));
                continue;
            }
        };
        let path = agent_path(&mount.path, format!("{field}.path"), paths, findings);
        mounts.push(ReadOnlyMount { path, source });
    }
    mounts
}

fn write_scopes(
    task: &AgentTask,
    resources: Option<&AgentResources>,
    paths: &mut Vec<(String, String)>,
    findings: &mut Vec<Finding>,
) -> Vec<Scope> {
    let mut scopes = Vec::new();
    let mut total: u128 = 0;
    for (index, scope) in task.spec.workspace.write_scopes.iter().enumerate() {
        let field = format!("spec.workspace.writeScopes[{index}]");
        let path = agent_path(&scope.path, format!("{field}.path"), paths, findings);
        match Quantity::parse(&scope.size) {
            Ok(size) => {
                total = total.saturating_add(size.milli());
                scopes.push(Scope { path, size });
            }
            Err(found) => findings.push(Finding::new(
                format!("{field}.size"),
                "a quantity above zero, such as `64Mi`",
                found.to_string(),
                "correct it",
            )),
        }
    }
    if let Some(storage) = resources.map(|resources| &resources.ephemeral_storage).filter(|most| total > most.milli()) {
        findings.push(Finding::new(
            "spec.workspace.writeScopes",
            format!("sizes that add up to at most the agent's ephemeral storage, `{}`", storage.as_str()),
            format!("{} bytes", total / 1000),
            "make them smaller, or ask for more spec.agent.resources.ephemeralStorage",
        ));
    }
    scopes
}

/// Checks a path against the reserved paths and all earlier paths.
fn agent_path(path: &str, field: String, taken: &mut Vec<(String, String)>, findings: &mut Vec<Finding>) -> AgentPath {
    let plain = path.starts_with('/')
        && path.len() > 1
        && path.split('/').skip(1).all(|part| !matches!(part, "" | "." | ".."))
        && !path.contains(':');
    if !plain {
        findings.push(Finding::new(
            field.clone(),
            "an absolute path without `.`, `..`, `:` and empty parts",
            format!("`{path}`"),
            "write it out",
        ));
    }
    let open = OPEN_PATHS.iter().find(|open| overlap(open, path));
    if let Some(open) = open.filter(|open| **open != path) {
        findings.push(Finding::new(
            field.clone(),
            format!("`{open}` itself, or a path apart from it"),
            format!("`{path}`"),
            "choose a place such as `/workspace`",
        ));
    } else if open.is_none()
        && let Some(reserved) = RESERVED_PATHS.iter().find(|reserved| overlap(reserved, path))
    {
        findings.push(Finding::new(
            field.clone(),
            "a path apart from those of the system, the image and Belay",
            format!("`{path}`, which overlaps `{reserved}`"),
            "choose a place such as `/workspace`",
        ));
    }
    if let Some((other, at)) = taken.iter().find(|(other, _)| overlap(other, path)) {
        findings.push(Finding::new(
            field.clone(),
            "paths that do not overlap",
            format!("`{path}`, which overlaps `{other}` of {at}"),
            "choose another path",
        ));
    }
    taken.push((path.to_owned(), field));
    AgentPath(path.to_owned())
}

/// Checks whether one path is the other or lies inside it.
fn overlap(one: &str, other: &str) -> bool {
    let inside = |inner: &str, outer: &str| {
        inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    inside(one, other) || inside(other, one)
}
