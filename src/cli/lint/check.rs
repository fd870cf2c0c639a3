//! Checks files and returns findings, without access to files, the clock or the network.
//!
//! ```text
//! sources ─▶ document ─▶ schema ─▶ plan, contract and pack by themselves ─▶ plan, each task with what it names ─▶ diagnostics
//! ```
//!
//! Guarantees: what the operator, the gateway and the API server would reject is found with its line, once, and all in one pass.
//!
//! Non-goals: treating objects that are not among the files as errors. If a namespace, a pack or a field may be elsewhere, a note says so.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt,
    path::{Component, Path, PathBuf},
};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{Resource, ResourceExt, core::ObjectMeta};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{
    cost,
    document::{self, Node, Place},
    schema::{Kind, nearest},
};
use crate::{
    api::{
        AgentTask, ApprovalRequest, PolicyPack, PolicyPackSpec, ToolContract,
        agent_task::{Limits, Resources},
        all_crds,
        policy_pack::{EgressRule, EvidencePolicy, Models, RetentionMode, StatePolicy, WorkflowClass},
    },
    policy::config::{EgressUse, SideEffect},
    render::{Finding, config, names, pack_among, standalone, validated},
};

/// The default namespace of the operator and the gateway, in which no task may run.
const SYSTEM_NAMESPACE: &str = "belay-system";
/// The names under which `kustomize` looks for its own file.
const KUSTOMIZATIONS: [&str; 3] = ["kustomization.yaml", "kustomization.yml", "Kustomization"];

/// A file that was read.
pub(in crate::cli) struct Source {
    /// The path, as it was given or found.
    pub(in crate::cli) path: PathBuf,
    /// Its bytes.
    pub(in crate::cli) bytes: Vec<u8>,
}

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::cli) enum Severity {
    /// The object will be rejected, or will deny what it was meant to allow.
    Error,
    /// The object works, but is probably not what was meant.
    Warning,
}

impl Severity {
    /// Returns the word for messages.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// One finding: what is wrong, where, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(in crate::cli) struct Diagnostic {
    /// The file.
    pub(in crate::cli) file: String,
    /// The line, from 1.
    pub(in crate::cli) line: u64,
    /// The column, from 1.
    pub(in crate::cli) column: u64,
    /// The severity.
    pub(in crate::cli) severity: Severity,
    /// The path of the field in its document.
    pub(in crate::cli) field: String,
    /// What was expected there.
    pub(in crate::cli) expected: String,
    /// What was found.
    pub(in crate::cli) found: String,
    /// What to do.
    pub(in crate::cli) mend: String,
}

impl Diagnostic {
    /// Returns the message without the position and the severity.
    pub(super) fn message(&self) -> String {
        format!("{}: expected {}, found {}; {}", self.field, self.expected, self.found, self.mend)
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (file, line, column) = (&self.file, self.line, self.column);
        write!(f, "{file}:{line}:{column}: {}: {}", self.severity.as_str(), self.message())
    }
}

/// The result of a check.
#[derive(Debug, Default)]
pub(in crate::cli) struct Outcome {
    /// The findings, in the order of files and lines.
    pub(in crate::cli) diagnostics: Vec<Diagnostic>,
    /// What could not be checked, and what was checked instead.
    pub(in crate::cli) notes: Vec<String>,
    /// The number of AgentTasks, ToolContracts and PolicyPacks that were checked.
    pub(in crate::cli) objects: usize,
}

/// Checks all files together. `namespace` is the namespace of objects that name none.
///
/// # Errors
/// Returns an error only if one of Belay's CRDs has no usable schema.
pub(in crate::cli) fn lint(sources: &[Source], namespace: &str) -> Result<Outcome, String> {
    // Only the gateway creates ApprovalRequests. They are not applied from files.
    let applied = |crd: &&CustomResourceDefinition| crd.spec.names.kind != ApprovalRequest::kind(&());
    let kinds: Vec<Kind> = all_crds().iter().filter(applied).map(Kind::of).collect::<Result<_, _>>()?;
    let mut found = Found { sources, list: Vec::new(), taken: HashSet::new() };
    let documents: Vec<Vec<Node>> = sources.iter().enumerate().map(|(file, source)| found.read(file, source)).collect();
    let kustomizations = Kustomizations::of(sources, &documents);
    let mut objects = Vec::new();
    let mut namespaces = BTreeMap::new();
    for (file, (source, nodes)) in sources.iter().zip(&documents).enumerate() {
        if is_kustomization(&source.path) || kustomizations.patches.contains(&plain(&source.path)) {
            continue;
        }
        let set = kustomizations.namespace_of(&source.path);
        for node in nodes {
            let mut add = |node, prefix: String| {
                namespaces.extend(labels_of_namespace(node));
                objects.extend(found.object(&kinds, Entry { file, node, prefix }, set, namespace));
            };
            if node.text("kind") == Some("List") && node.text("apiVersion") == Some("v1") {
                let items = node.get("items").map(Node::items).unwrap_or_default();
                items.iter().enumerate().for_each(|(index, item)| add(item, format!("items[{index}].")));
            } else {
                add(node, String::new());
            }
        }
    }
    found.twice(&objects);
    let (contracts, packs) = (typed::<ToolContract>(&objects), typed::<PolicyPack>(&objects));
    for (object, contract) in &contracts {
        found.alone(object, standalone::contract(contract));
        for finding in standalone::advice(contract).into_iter().chain(cost::contract(contract)) {
            found.add_at_field(&object.entry, Severity::Warning, finding);
        }
    }
    for (object, pack) in &packs {
        found.alone(object, standalone::pack(pack));
        let plain: Vec<&ToolContract> = contracts.iter().map(|(_, contract)| *contract).collect();
        for one in config::in_the_clear(pack, &plain) {
            found.add_at_field(&object.entry, Severity::Warning, one.finding.own());
        }
    }
    let mut notes = found.tasks(&objects, &contracts, &packs, &namespaces);
    notes.extend(packs.iter().flat_map(|(_, pack)| config::bases(pack)));
    found.unused(&objects, &contracts);
    let count = objects.len();
    Ok(Outcome { diagnostics: found.sorted(), notes, objects: count })
}

/// A document, or an item of a list.
struct Entry<'n> {
    file: usize,
    node: &'n Node,
    prefix: String,
}

/// An object of one of Belay's kinds.
struct Object<'n> {
    entry: Entry<'n>,
    kind: String,
    namespace: String,
    name: String,
    typed: Option<Typed>,
}

enum Typed {
    Task(Box<AgentTask>),
    Contract(Box<ToolContract>),
    Pack(Box<PolicyPack>),
}

/// The typed kinds, to select objects by their type.
trait Kinded: Sized {
    fn of(typed: &Typed) -> Option<&Self>;
}
impl Kinded for AgentTask {
    fn of(typed: &Typed) -> Option<&Self> {
        if let Typed::Task(task) = typed { Some(task) } else { None }
    }
}
impl Kinded for ToolContract {
    fn of(typed: &Typed) -> Option<&Self> {
        if let Typed::Contract(contract) = typed { Some(contract) } else { None }
    }
}
impl Kinded for PolicyPack {
    fn of(typed: &Typed) -> Option<&Self> {
        if let Typed::Pack(pack) = typed { Some(pack) } else { None }
    }
}

fn typed<'o, 'n, T: Kinded>(objects: &'o [Object<'n>]) -> Vec<(&'o Object<'n>, &'o T)> {
    objects.iter().filter_map(|object| Some((object, T::of(object.typed.as_ref()?)?))).collect()
}

/// The findings so far.
struct Found<'s> {
    sources: &'s [Source],
    list: Vec<(usize, Place, Severity, Finding)>,
    /// Fields that already have a finding. Consequences of it are not reported as well.
    taken: HashSet<(usize, Place, String)>,
}

impl<'s> Found<'s> {
    fn read(&mut self, file: usize, source: &Source) -> Vec<Node> {
        document::read(&source.bytes).unwrap_or_else(|broken| {
            let finding = Finding::new(
                "YAML",
                "a YAML or JSON file",
                broken.reason,
                "correct it; the file is not checked any further",
            );
            self.list.push((file, broken.at, Severity::Error, finding));
            Vec::new()
        })
    }

    fn add(&mut self, entry: &Entry<'_>, place: Place, severity: Severity, mut finding: Finding) {
        finding.field = format!("{}{}", entry.prefix, finding.field);
        if self.taken.insert((entry.file, entry.node.at, finding.field.clone())) {
            self.list.push((entry.file, place, severity, finding));
        }
    }

    /// Adds a finding of `render`. Its field gives the position.
    fn add_at_field(&mut self, entry: &Entry<'_>, severity: Severity, finding: Finding) {
        self.add(entry, entry.node.at_path(&finding.field), severity, finding);
    }

    /// Checks one object of Belay by itself. Returns `None` for an object of another group.
    fn object<'n>(&mut self, kinds: &[Kind], entry: Entry<'n>, set: Option<&str>, default: &str) -> Option<Object<'n>> {
        let node = entry.node;
        let version = node.text("apiVersion").unwrap_or_default();
        let name = node.text("kind").unwrap_or_default();
        let names: Vec<&str> = kinds.iter().map(|kind| kind.name.as_str()).collect();
        let kind = kinds.iter().find(|kind| kind.name == name);
        let group = version.split('/').next().unwrap_or_default();
        let Some(kind) = kind.filter(|kind| kind.api_version == version) else {
            let ours = kinds.first().map(|kind| kind.api_version.as_str()).unwrap_or_default();
            let our_group = ours.split('/').next().unwrap_or_default();
            let quoted = |text: &str| if text.is_empty() { "nothing".to_owned() } else { format!("`{text}`") };
            let finding = if kind.is_some() {
                let mend = "write it so; this document is not checked any further";
                Finding::new("apiVersion", format!("`{ours}`, the version of {name}"), quoted(version), mend)
            } else if group == our_group {
                let mend = nearest(name, &names)
                    .map_or_else(|| "choose one of them".to_owned(), |near| format!("write `{near}`"));
                Finding::new("kind", format!("one of {}", names.join(", ")), quoted(name), mend)
            } else {
                return None;
            };
            // Another project may have a kind of that name in a group that does not resemble Belay's.
            let stranger = kind.is_some() && !group.is_empty() && nearest(group, &[our_group]).is_none();
            let severity = if stranger { Severity::Warning } else { Severity::Error };
            self.add_at_field(&entry, severity, finding);
            return None;
        };
        for (place, field) in node.boolean_keys() {
            let finding = Finding::new(
                field,
                "a name",
                "a word that YAML takes for a boolean, such as `y` or `on`",
                "put it in quotes",
            );
            self.add(&entry, place, Severity::Error, finding);
        }
        let mut value = node.value();
        for (place, finding) in kind.check(node, &value) {
            self.add(&entry, place, Severity::Error, finding);
        }
        let metadata = node.get("metadata");
        let own = metadata.and_then(|metadata| metadata.text("namespace"));
        let clustered = name == "PolicyPack";
        let namespace = if clustered { "" } else { set.or(own).unwrap_or(default) }.to_owned();
        if !clustered && let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.insert("namespace".into(), namespace.as_str().into());
        }
        let object_name = metadata.and_then(|metadata| metadata.text("name")).unwrap_or_default().to_owned();
        let typed = match name {
            "AgentTask" => self.typed(&entry, value).map(|task| Typed::Task(Box::new(task))),
            "ToolContract" => self.typed(&entry, value).map(|contract| Typed::Contract(Box::new(contract))),
            _ => self.typed(&entry, value).map(|pack| Typed::Pack(Box::new(pack))),
        };
        Some(Object { entry, kind: name.to_owned(), namespace, name: object_name, typed })
    }

    /// Deserializes an object to its type. A failure is reported only if the schema check has not reported why.
    fn typed<T: DeserializeOwned>(&mut self, entry: &Entry<'_>, value: Value) -> Option<T> {
        let error = match serde_json::from_value(value) {
            Ok(typed) => return Some(typed),
            Err(error) => error,
        };
        if !self.taken.iter().any(|(file, at, _)| (*file, *at) == (entry.file, entry.node.at)) {
            let finding =
                Finding::new("the object", "what this version of Belay can read", error.to_string(), "correct it");
            self.add_at_field(entry, Severity::Error, finding);
        }
        None
    }

    fn twice(&mut self, objects: &[Object<'_>]) {
        let mut first: BTreeMap<(&str, &str, &str), &Entry<'_>> = BTreeMap::new();
        for object in objects.iter().filter(|object| !object.name.is_empty()) {
            let key = (object.kind.as_str(), object.namespace.as_str(), object.name.as_str());
            let Some(other) = first.get(&key).copied() else {
                first.insert(key, &object.entry);
                continue;
            };
            let at = other.node.at_path("metadata.name");
            let file = self.sources.get(other.file).map(|source| source.path.display().to_string()).unwrap_or_default();
            let finding = Finding::new(
                "metadata.name",
                format!("one {} of that name{}", object.kind, within(&object.namespace)),
                format!("`{}` again, as in {file}:{}", object.name, at.line),
                "keep one of them, or lint each environment's folder by itself",
            );
            self.add_at_field(&object.entry, Severity::Error, finding);
        }
    }

    /// Adds the findings about an object by itself.
    fn alone(&mut self, object: &Object<'_>, findings: Vec<Finding>) {
        findings.into_iter().for_each(|finding| self.add_at_field(&object.entry, Severity::Error, finding));
    }

    /// Checks each task with the contracts that it names and the pack that governs it.
    fn tasks(
        &mut self,
        objects: &[Object<'_>],
        contracts: &[(&Object<'_>, &ToolContract)],
        packs: &[(&Object<'_>, &PolicyPack)],
        namespaces: &BTreeMap<String, BTreeMap<String, String>>,
    ) -> Vec<String> {
        let mut notes = BTreeSet::new();
        let all: Vec<&PolicyPack> = packs.iter().map(|(_, pack)| *pack).collect();
        let broken_pack = objects.iter().any(|object| object.kind == "PolicyPack" && object.typed.is_none());
        let plain_contracts: Vec<&ToolContract> = contracts.iter().map(|(_, contract)| *contract).collect();
        for (object, task) in typed::<AgentTask>(objects) {
            let name = format!("AgentTask {}/{}", object.namespace, object.name);
            let generous = generous(task, &plain_contracts);
            let candidates = match namespaces.get(&object.namespace) {
                _ if all.is_empty() => {
                    if !broken_pack {
                        notes.insert(format!(
                            "{name}: no PolicyPack is among the files, so nothing is said about what a pack would allow"
                        ));
                    }
                    vec![&generous]
                }
                Some(labels) => match pack_among(labels, all.iter().copied()) {
                    Ok(pack) => vec![pack],
                    // The pack that cannot be read may be the right one.
                    Err(_) if broken_pack => vec![&generous],
                    Err(finding) => {
                        self.add_at_field(&object.entry, Severity::Error, finding);
                        vec![&generous]
                    }
                },
                None => {
                    let names: Vec<_> = all.iter().map(|pack| format!("`{}`", pack.name_any())).collect();
                    notes.insert(format!(
                        "{name}: Namespace `{}` is not among the files, so one of all packs has to admit the task: {}",
                        object.namespace,
                        names.join(", ")
                    ));
                    all.clone()
                }
            };
            let judged: Vec<_> = candidates
                .iter()
                .map(|pack| {
                    (*pack, validated::validate(&as_admitted(task), &plain_contracts, pack, SYSTEM_NAMESPACE).err())
                })
                .collect();
            if judged.iter().any(|(_, findings)| findings.is_none()) {
                continue;
            }
            let several = judged.len() > 1;
            for (pack, findings) in judged {
                for finding in findings.into_iter().flatten() {
                    let (entry, mut finding) = self.attribute(object, objects, packs, pack, finding);
                    if self.of_unreadable(object, objects, task, &finding) {
                        continue;
                    }
                    if several {
                        finding.fix = format!("{} (checked against PolicyPack `{}`)", finding.fix, pack.name_any());
                    } else if !std::ptr::eq(entry, &object.entry) {
                        finding.fix = format!("{} (for {name})", finding.fix);
                    }
                    self.add_at_field(entry, Severity::Error, finding);
                }
            }
        }
        notes.into_iter().collect()
    }

    /// Returns the object that a finding about a task belongs to.
    fn attribute<'o, 'n>(
        &self,
        task: &'o Object<'n>,
        objects: &'o [Object<'n>],
        packs: &[(&'o Object<'n>, &PolicyPack)],
        pack: &PolicyPack,
        finding: Finding,
    ) -> (&'o Entry<'n>, Finding) {
        let of_contract = finding.field.strip_prefix("ToolContract/").and_then(|rest| rest.split_once(' '));
        let object = if let Some((name, _)) = of_contract {
            objects.iter().find(|object| {
                object.kind == "ToolContract" && object.name == name && object.namespace == task.namespace
            })
        } else if finding.field.starts_with("PolicyPack") {
            packs.iter().find(|(_, other)| std::ptr::eq(*other, pack)).map(|(object, _)| *object)
        } else {
            None
        };
        match object {
            Some(object) => (&object.entry, finding.own()),
            None => (&task.entry, finding),
        }
    }

    /// Returns whether a contract counts as missing only because it cannot be read, which is already reported.
    fn of_unreadable(&self, object: &Object<'_>, objects: &[Object<'_>], task: &AgentTask, finding: &Finding) -> bool {
        let index = finding.field.strip_prefix("spec.tools[").and_then(|rest| rest.strip_suffix(']'));
        let name = index.and_then(|index| task.spec.tools.get(index.parse::<usize>().ok()?));
        name.is_some_and(|name| {
            objects.iter().any(|other| {
                other.kind == "ToolContract"
                    && other.typed.is_none()
                    && &other.name == name
                    && other.namespace == object.namespace
            })
        })
    }

    /// Finds contracts that no task names. If there are no tasks at all, users create them elsewhere, and no contract counts as unused.
    fn unused(&mut self, objects: &[Object<'_>], contracts: &[(&Object<'_>, &ToolContract)]) {
        let tasks: Vec<_> = objects.iter().filter(|object| object.kind == "AgentTask").collect();
        for (object, _) in contracts {
            let mut around = tasks.iter().filter(|task| task.namespace == object.namespace).peekable();
            // A task that cannot be read may name the contract.
            let unused = around.peek().is_some()
                && around.all(|task| {
                    task.typed
                        .as_ref()
                        .and_then(AgentTask::of)
                        .is_some_and(|task| !task.spec.tools.contains(&object.name))
                });
            if unused {
                let finding = Finding::new(
                    "metadata.name",
                    format!("a ToolContract that a task{} names", within(&object.namespace)),
                    format!("`{}`, which none does", object.name),
                    "add it to a task's spec.tools, or remove it",
                );
                self.add_at_field(&object.entry, Severity::Warning, finding);
            }
        }
    }

    fn sorted(mut self) -> Vec<Diagnostic> {
        self.list.sort_by(|(file, place, severity, finding), (other_file, other_place, other_severity, other)| {
            (file, place, severity, &finding.field).cmp(&(other_file, other_place, other_severity, &other.field))
        });
        let diagnostic = |(file, place, severity, finding): (usize, Place, Severity, Finding)| Diagnostic {
            file: self.sources.get(file).map(|source| source.path.display().to_string()).unwrap_or_default(),
            line: place.line,
            column: place.column,
            severity,
            field: finding.field,
            expected: finding.expected,
            found: finding.found,
            mend: finding.fix,
        };
        self.list.into_iter().map(diagnostic).collect()
    }
}

fn within(namespace: &str) -> String {
    if namespace.is_empty() { String::new() } else { format!(" in namespace `{namespace}`") }
}

/// Returns the name and the labels of a Namespace.
fn labels_of_namespace(node: &Node) -> Option<(String, BTreeMap<String, String>)> {
    if node.text("kind") != Some("Namespace") || node.text("apiVersion") != Some("v1") {
        return None;
    }
    let metadata: ObjectMeta = serde_json::from_value(node.get("metadata")?.value()).ok()?;
    Some((metadata.name?, metadata.labels.unwrap_or_default()))
}

/// Returns a pack that allows everything that the task and its contracts ask for: a finding under this pack holds under any pack.
fn generous(task: &AgentTask, contracts: &[&ToolContract]) -> PolicyPack {
    let hosts = contracts.iter().filter_map(|contract| config::authority_of(&contract.spec.upstream));
    let egress = hosts.map(|at| EgressRule {
        host: at.host.to_string(),
        ports: vec![at.port.into()],
        uses: vec![EgressUse::Tools],
        credentials: vec![],
    });
    let most = || Some("999999T".to_owned());
    PolicyPack::new(
        "any",
        PolicyPackSpec {
            state: Some(StatePolicy { bucket: "any".into(), prefix: None }),
            environment: "any".into(),
            namespace_selector: Default::default(),
            workflow_classes: vec![WorkflowClass {
                name: task.spec.workflow_class.clone(),
                runtime_class_name: None,
                egress: egress.collect(),
                ignored_hosts: vec![],
                upstream_timeout_seconds: None,
                allowed_effects: vec![SideEffect::Read, SideEffect::Write, SideEffect::External],
                limits: Limits {
                    wall_time_seconds: i64::MAX,
                    tool_calls: i64::MAX,
                    tokens: i64::MAX,
                    denials: None,
                    cost: None,
                    approval_wait_seconds: Some(i64::MAX),
                },
                resources: Resources { cpu: most(), memory: most(), ephemeral_storage: most() },
            }],
            task_classes: task.spec.task_class.iter().cloned().collect(),
            models: Models::default(),
            classification: vec![],
            rules: vec![],
            risk: None,
            approval: None,
            evidence: EvidencePolicy {
                bucket: "any".into(),
                prefix: None,
                mode: RetentionMode::Compliance,
                retention_days: 1,
            },
        },
    )
}

/// What kustomizations among the files say about other files.
struct Kustomizations {
    /// The namespace that the kustomization of a folder sets.
    namespaces: BTreeMap<PathBuf, String>,
    /// Files that are patches, not whole objects.
    patches: BTreeSet<PathBuf>,
}

impl Kustomizations {
    fn of(sources: &[Source], documents: &[Vec<Node>]) -> Self {
        let mut all = Self { namespaces: BTreeMap::new(), patches: BTreeSet::new() };
        for (source, nodes) in sources.iter().zip(documents).filter(|(source, _)| is_kustomization(&source.path)) {
            let folder = plain(source.path.parent().unwrap_or(Path::new("")));
            for node in nodes {
                if let Some(namespace) = node.text("namespace") {
                    all.namespaces.insert(folder.clone(), namespace.to_owned());
                }
                let listed = |field: &str| node.get(field).map(Node::items).unwrap_or_default();
                let by_path = listed("patches").iter().chain(listed("patchesJson6902"));
                let paths = by_path.filter_map(|patch| patch.text("path").map(str::to_owned));
                let merged =
                    listed("patchesStrategicMerge").iter().filter_map(|path| path.value().as_str().map(str::to_owned));
                all.patches.extend(paths.chain(merged).map(|path| plain(&folder.join(path))));
            }
        }
        all
    }

    /// Returns the namespace that the nearest kustomization around a file sets. It replaces the file's own namespace, as kustomize does.
    fn namespace_of(&self, path: &Path) -> Option<&str> {
        plain(path).ancestors().skip(1).find_map(|folder| self.namespaces.get(folder)).map(String::as_str)
    }
}

fn is_kustomization(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| KUSTOMIZATIONS.contains(&name))
}

/// Returns the task as admission changes it: with a record of who created it.
fn as_admitted(task: &AgentTask) -> AgentTask {
    let mut task = task.clone();
    let principal = task.spec.principal.clone();
    task.annotations_mut().entry(names::REQUESTED_BY.to_owned()).or_insert(principal);
    task
}

/// Returns a path without `.` and `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if plain.file_name().is_some() => {
                plain.pop();
            }
            other => plain.push(other),
        }
    }
    plain
}
