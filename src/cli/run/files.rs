//! Reads the objects of a run from files.
//!
//! Guarantees: errors that `belay lint` finds are reported with file and line before anything starts. Files that contain Secrets are known,
//! so that the agent does not see them. The pack and the task are never guessed.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Namespace, Secret},
};
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::super::{
    CliError,
    lint::{self, Diagnostic, Source, document, gather},
};
use crate::{
    api::{AgentTask, PolicyPack, ToolContract, policy_pack::Credential},
    gateway::{credentials::trimmed, forms::Forms},
    render::{names, pack, pack_for},
    run::objects::{self, Objects},
};

/// The label of Secrets that only the gateway reads.
const UPSTREAM: &str = "belay.dev/upstream-credential";
/// The requester of a task here. No user that admission authenticates has this name.
const REQUESTER: &str = "system:belay-run";

/// The objects that were read.
pub(super) struct Loaded {
    /// The objects of the run.
    pub(super) objects: Objects,
    /// The files that contain Secrets.
    pub(super) secret_files: Vec<PathBuf>,
    /// Findings of the linter that are not errors.
    pub(super) warnings: Vec<Diagnostic>,
}

/// The files and the pack that the command line names.
pub(super) struct Asked<'a> {
    /// The file with the task.
    pub(super) task: &'a Path,
    /// The paths of contracts, or the task's folder if empty.
    pub(super) contracts: &'a [PathBuf],
    /// The paths of packs, or the task's folder if empty.
    pub(super) packs: &'a [PathBuf],
    /// The name of the pack.
    pub(super) pack: Option<&'a str>,
}

/// A manifest and its file.
struct Manifest<'s> {
    file: &'s Path,
    value: Value,
}

/// Reads the files, and checks them as `belay lint` does. An error has one line for each finding.
pub(super) fn load(asked: &Asked<'_>) -> Result<Loaded, CliError> {
    let sources = sources(asked)?;
    let manifests = manifests(&sources);
    let of = |file: &Path, kind: &str| {
        let all = manifests.iter().filter(|one| one.is(kind));
        all.filter(|one| one.file == file).collect::<Vec<_>>()
    };
    let found = of(asked.task, "AgentTask");
    let [task] = found.as_slice() else {
        // A finding with its position is a better message for a broken file.
        wrong(&sources, None)?;
        return Err(CliError::new(format!(
            "{}: expected one AgentTask, found {}; name the file of the task that is to run",
            asked.task.display(),
            found.len()
        )));
    };
    let namespace = task.text("/metadata/namespace").unwrap_or("default").to_owned();
    let name = task.text("/metadata/name").unwrap_or_default().to_owned();
    let warnings = wrong(&sources, Some((asked.task, &manifests)))?;

    let mut task: AgentTask = task.typed(&namespace)?;
    task.metadata.uid = Some(objects::random_uid().map_err(|error| CliError::new(error.to_string()))?);
    task.metadata.generation = Some(1);
    // The user at this terminal could not approve calls of a task that they requested. The evidence says that the task was requested here.
    task.annotations_mut().entry(names::REQUESTED_BY.to_owned()).or_insert_with(|| REQUESTER.to_owned());
    let mut contracts: Vec<ToolContract> = all(&manifests, "ToolContract", &namespace)?;
    contracts.retain(|contract| contract.namespace().as_deref() == Some(&namespace));
    let mut packs: Vec<PolicyPack> = all(&manifests, "PolicyPack", "")?;
    packs.iter_mut().for_each(|pack| pack.metadata.namespace = None);
    let metas = contracts.iter_mut().map(Resource::meta_mut);
    for (index, meta) in metas.chain(packs.iter_mut().map(Resource::meta_mut)).enumerate() {
        meta.uid.get_or_insert_with(|| format!("{}-{index}", meta.name.clone().unwrap_or_default()));
        meta.generation = Some(1);
    }
    let namespaces: Vec<Namespace> = all(&manifests, "Namespace", "")?;
    let known = namespaces.into_iter().find(|one| one.name_any() == namespace);
    let (pack, labels) = choose(packs, known.as_ref(), asked.pack, (&namespace, &name))?;
    let mut own = Namespace::default();
    own.metadata.name = Some(namespace.clone());
    own.metadata.labels = Some(labels);

    let secrets: Vec<Secret> = all(&manifests, "Secret", &namespace)?;
    let (credentials, secrets): (Vec<_>, Vec<_>) =
        secrets.into_iter().map(whole).partition(|secret| secret.labels().get(UPSTREAM).is_some_and(|is| is == "true"));
    let secret_files = manifests.iter().filter(|one| one.is("Secret")).map(|one| one.file.to_owned()).collect();
    let config_maps = all(&manifests, "ConfigMap", &namespace)?;
    let here = |meta: &kube::core::ObjectMeta| meta.namespace.as_deref() == Some(namespace.as_str());
    let objects = Objects {
        task,
        contracts,
        pack,
        namespace: own,
        config_maps: config_maps.into_iter().filter(|one: &ConfigMap| here(&one.metadata)).collect(),
        secrets: secrets.into_iter().filter(|one| here(&one.metadata)).collect(),
        credentials,
    };
    Ok(Loaded { objects, secret_files, warnings })
}

/// Returns the credentials that calls of this task would use, with their hosts.
fn wanted_credentials(objects: &Objects) -> Vec<(String, Credential)> {
    let Ok(class) = pack::class_of(&objects.task, &objects.pack) else { return Vec::new() };
    let wanted = class.egress.iter().filter_map(|rule| {
        let credential = pack::credential_for(rule, &objects.task.spec.principal)?;
        Some((rule.host.clone(), credential.clone()))
    });
    wanted.collect()
}

fn value_of<'o>(objects: &'o Objects, one: &Credential) -> Option<&'o ByteString> {
    objects.credentials.iter().find(|secret| secret.name_any() == one.secret)?.data.as_ref()?.get(&one.key)
}

/// Returns the credentials that calls of this task would use and that are missing.
pub(super) fn missing_credentials(objects: &Objects) -> Vec<(String, Credential)> {
    let mut wanted = wanted_credentials(objects);
    wanted.retain(|(_, one)| value_of(objects, one).is_none());
    wanted
}

/// Returns why the gateway would not use credentials that exist.
pub(super) fn unfit_credentials(objects: &Objects) -> Vec<String> {
    let found = wanted_credentials(objects).into_iter().filter_map(|(host, one)| {
        let value = trimmed(value_of(objects, &one)?.0.clone());
        let unfit = Forms::of(&one.prefix, &value).err()?;
        Some(format!("the key {}/{} for {host} {unfit}; create another key", one.secret, one.key))
    });
    found.collect()
}

/// Adds a credential that the command line names.
pub(super) fn add_credential(objects: &mut Objects, secret: &str, key: &str, value: Vec<u8>) {
    let known = objects.credentials.iter_mut().find(|one| one.name_any() == secret);
    let data = |one: &mut Secret| {
        one.data.get_or_insert_default().insert(key.to_owned(), ByteString(value.clone()));
    };
    match known {
        Some(one) => data(one),
        None => {
            let mut one = Secret::default();
            one.metadata.name = Some(secret.to_owned());
            one.metadata.namespace = Some(objects::SYSTEM_NAMESPACE.to_owned());
            data(&mut one);
            objects.credentials.push(one);
        }
    }
}

/// Moves `stringData` to `data`, as the API server stores it.
fn whole(mut secret: Secret) -> Secret {
    for (key, text) in secret.string_data.take().unwrap_or_default() {
        secret.data.get_or_insert_default().insert(key, ByteString(text.into_bytes()));
    }
    secret
}

fn sources(asked: &Asked<'_>) -> Result<Vec<Source>, CliError> {
    let task = asked.task;
    if task.is_dir() {
        return Err(CliError::new(format!(
            "{}: expected the file of an AgentTask, found a folder; name the file, such as {}/task.yaml",
            task.display(),
            task.display()
        )));
    }
    let mut all = Vec::new();
    gather(task, &mut all)?;
    let beside = vec![folder_of(task)];
    for (paths, others) in [(asked.contracts, "PolicyPack"), (asked.packs, "ToolContract")] {
        let mut found = Vec::new();
        for path in if paths.is_empty() { &beside } else { paths } {
            gather(path, &mut found)?;
        }
        // Files beside the task do not count as packs or contracts if the command line names other paths for these.
        let elsewhere = if others == "PolicyPack" { asked.packs } else { asked.contracts };
        let only_others = |source: &Source| {
            let manifests = manifests(std::slice::from_ref(source));
            let wanted = if others == "PolicyPack" { "ToolContract" } else { "PolicyPack" };
            manifests.iter().any(|one| one.is(others)) && !manifests.iter().any(|one| one.is(wanted))
        };
        found.retain(|source| elsewhere.is_empty() || !paths.is_empty() || !only_others(source));
        all.append(&mut found);
    }
    let mut seen = BTreeMap::new();
    all.retain(|source| {
        let path = std::fs::canonicalize(&source.path).unwrap_or_else(|_| source.path.clone());
        seen.insert(path, ()).is_none()
    });
    Ok(all)
}

/// Returns the folder of a file.
pub(super) fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Runs the linter and returns the warnings. Errors in other tasks beside this one do not matter to this run. Other errors do.
fn wrong(sources: &[Source], task: Option<(&Path, &[Manifest<'_>])>) -> Result<Vec<Diagnostic>, CliError> {
    let outcome = lint::on_a_large_stack(sources, "default")?;
    let of_another = |file: &str| {
        let Some((task, manifests)) = task else { return false };
        let mut of_file = manifests.iter().filter(|one| one.file.display().to_string() == file).peekable();
        file != task.display().to_string() && of_file.peek().is_some() && of_file.all(|one| one.is("AgentTask"))
    };
    let (errors, warnings): (Vec<_>, Vec<_>) =
        outcome.diagnostics.into_iter().partition(|found| found.severity == lint::Severity::Error);
    let lines: Vec<_> = errors.iter().filter(|found| !of_another(&found.file)).map(ToString::to_string).collect();
    if lines.is_empty() { Ok(warnings) } else { Err(CliError::Listed(lines)) }
}

fn manifests(sources: &[Source]) -> Vec<Manifest<'_>> {
    let mut all = Vec::new();
    for source in sources {
        // The linter reports files that cannot be read.
        for node in document::read(&source.bytes).unwrap_or_default() {
            let value = node.value();
            match value
                .get("items")
                .and_then(Value::as_array)
                .filter(|_| value.get("kind").is_some_and(|kind| kind == "List"))
            {
                Some(items) => {
                    all.extend(items.iter().map(|item| Manifest { file: &source.path, value: item.clone() }))
                }
                None => all.push(Manifest { file: &source.path, value }),
            }
        }
    }
    all
}

impl Manifest<'_> {
    fn is(&self, kind: &str) -> bool {
        let group = self.text("/apiVersion").unwrap_or_default();
        (group == "v1" || group.starts_with("belay.dev/")) && self.text("/kind") == Some(kind)
    }

    fn text(&self, pointer: &str) -> Option<&str> {
        self.value.pointer(pointer).and_then(Value::as_str)
    }

    /// Returns the object. If it names no namespace, it gets this one.
    fn typed<T: DeserializeOwned + Resource>(&self, namespace: &str) -> Result<T, CliError> {
        let mut object: T = serde_json::from_value(self.value.clone())
            .map_err(|error| CliError::new(format!("{}: {error}; correct it", self.file.display())))?;
        if !namespace.is_empty() {
            object.meta_mut().namespace.get_or_insert_with(|| namespace.to_owned());
        }
        Ok(object)
    }
}

fn all<T: DeserializeOwned + Resource>(
    manifests: &[Manifest<'_>],
    kind: &str,
    namespace: &str,
) -> Result<Vec<T>, CliError> {
    manifests.iter().filter(|one| one.is(kind)).map(|one| one.typed(namespace)).collect()
}

/// Returns the pack that governs the namespace, and the namespace's labels. If the command line names a pack, it is that one. Else, if the
/// Namespace is among the files, its labels select the pack. Else it is the only pack.
fn choose(
    mut packs: Vec<PolicyPack>,
    namespace: Option<&Namespace>,
    wanted: Option<&str>,
    (space, task): (&str, &str),
) -> Result<(PolicyPack, BTreeMap<String, String>), CliError> {
    let list = |packs: &[PolicyPack]| packs.iter().map(ResourceExt::name_any).collect::<Vec<_>>().join(", ");
    if let Some(wanted) = wanted {
        let known = list(&packs);
        packs.retain(|pack| pack.name_any() == wanted);
        if packs.is_empty() {
            return Err(CliError::new(format!("expected a PolicyPack `{wanted}` (--pack), found {}", some(&known))));
        }
    } else if let Some(namespace) = namespace {
        let labels = namespace.labels().clone();
        let pack = pack_for(&labels, &packs)
            .map_err(|finding| CliError::new(format!("AgentTask {space}/{task}: {finding}")))?;
        return Ok((pack.clone(), labels));
    }
    match packs.as_slice() {
        [pack] => {
            let labels = objects::labels_for(&pack.spec.namespace_selector);
            Ok((pack.clone(), labels))
        }
        [] => Err(CliError::new(format!(
            "expected a PolicyPack that says what AgentTask {space}/{task} may do, found none; put one beside the task, or name its folder by --packs; policy-packs/dev is one to copy"
        ))),
        several => Err(CliError::new(format!(
            "expected one PolicyPack for namespace {space}, found {}; choose one by --pack, or add the Namespace with its labels",
            list(several)
        ))),
    }
}

fn some(list: &str) -> &str {
    if list.is_empty() { "none" } else { list }
}
