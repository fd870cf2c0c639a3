//! From files to what a run is made of.
//!
//! Promises: what `belay lint` finds wrong is said with file and line before anything starts; files that hold Secrets are known, so that the
//! agent does not see them. Refuses: to guess which pack or which task was meant.

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
    plan::{config, names, pack_for},
    run::objects::{self, Objects},
};

/// Label of Secrets that the gateway alone reads.
const UPSTREAM: &str = "belay.dev/upstream-credential";
/// Who asks for a task here: nobody whom admission would know.
const REQUESTER: &str = "system:belay-run";

/// What was read.
pub(super) struct Loaded {
    /// What the run is made of.
    pub(super) objects: Objects,
    /// Files with Secrets in them.
    pub(super) secret_files: Vec<PathBuf>,
    /// What works, and is probably not what was meant.
    pub(super) warnings: Vec<Diagnostic>,
}

/// What was asked for.
pub(super) struct Asked<'a> {
    /// The file with the task.
    pub(super) task: &'a Path,
    /// Where contracts are; beside the task when empty.
    pub(super) contracts: &'a [PathBuf],
    /// Where packs are; beside the task when empty.
    pub(super) packs: &'a [PathBuf],
    /// Which pack.
    pub(super) pack: Option<&'a str>,
}

/// A manifest, and the file that it is in.
struct Manifest<'s> {
    file: &'s Path,
    value: Value,
}

/// Reads, and checks as `belay lint` does. What is wrong is in the error, a line each.
pub(super) fn load(asked: &Asked<'_>) -> Result<Loaded, CliError> {
    let sources = sources(asked)?;
    let manifests = manifests(&sources);
    let of = |file: &Path, kind: &str| {
        let all = manifests.iter().filter(|one| one.is(kind));
        all.filter(|one| one.file == file).collect::<Vec<_>>()
    };
    let found = of(asked.task, "AgentTask");
    let [task] = found.as_slice() else {
        // What is broken is better said by its place.
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
    // Nobody at this terminal could say yes to a task that they have asked for; that it was asked for here, the evidence says.
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

/// The credentials that calls of this task would be made with, by host.
fn wanted_credentials(objects: &Objects) -> Vec<(String, Credential)> {
    let Ok(class) = config::class_of(&objects.task, &objects.pack) else { return Vec::new() };
    let wanted = class.egress.iter().filter_map(|rule| {
        let credential = config::credential_for(rule, &objects.task.spec.principal)?;
        Some((rule.host.clone(), credential.clone()))
    });
    wanted.collect()
}

fn value_of<'o>(objects: &'o Objects, one: &Credential) -> Option<&'o ByteString> {
    objects.credentials.iter().find(|secret| secret.name_any() == one.secret)?.data.as_ref()?.get(&one.key)
}

/// The credentials that calls of this task would be made with, and that are not there.
pub(super) fn missing_credentials(objects: &Objects) -> Vec<(String, Credential)> {
    let mut wanted = wanted_credentials(objects);
    wanted.retain(|(_, one)| value_of(objects, one).is_none());
    wanted
}

/// Why the gateway would not use those that are there.
pub(super) fn unfit_credentials(objects: &Objects) -> Vec<String> {
    let found = wanted_credentials(objects).into_iter().filter_map(|(host, one)| {
        let value = trimmed(value_of(objects, &one)?.0.clone());
        let unfit = Forms::of(&one.prefix, &value).err()?;
        Some(format!("the key {}/{} for {host} {unfit}; have another one made", one.secret, one.key))
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

/// As the API server stores it: `stringData` in `data`.
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
        // What lies beside the task does not count where its place was named.
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

/// The folder that a file is in.
pub(super) fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Other tasks beside this one are none of this run's business; what else is wrong is. Gives what is not wrong, and still worth a word.
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
        // What cannot be read is found by lint.
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

    /// The object, in that namespace unless it names one.
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

/// The pack that governs the namespace: by the namespace's labels where its manifest is there, else the one that there is, or the one that
/// is asked for.
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
