//! Checks files and returns findings, without access to files, the clock or the network.
//!
//! ```text
//! sources ─▶ document ─▶ single: schema and type ─▶ render: each contract and pack ─▶ tasks: each task with what it names ─▶ found
//! ```
//!
//! Guarantees: what the operator, the gateway and the API server would reject is found with its line, once, and all in one pass.
//!
//! Non-goals: treating objects that are not among the files as errors. If a namespace, a pack or a field may be elsewhere, a note says so.

use std::collections::BTreeMap;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{Resource, core::ObjectMeta};

use super::{
    cost,
    diagnostic::{Outcome, Severity, Source},
    document::Node,
    found::Found,
    kustomize::{Kustomizations, is_kustomization, plain},
    object::{Entry, Kinded, Object, typed},
    schema::Kind,
};
use crate::{
    api::{AgentTask, ApprovalRequest, PolicyPack, ToolContract, all_crds},
    render::{Finding, pack, standalone},
};

/// Checks all files together. `namespace` is the namespace of objects that name none.
///
/// # Errors
/// Returns an error only if one of Belay's CRDs has no usable schema.
pub(in crate::cli) fn lint(sources: &[Source], namespace: &str) -> Result<Outcome, String> {
    // Only the gateway creates ApprovalRequests. They are not applied from files.
    let applied = |crd: &&CustomResourceDefinition| crd.spec.names.kind != ApprovalRequest::kind(&());
    let kinds: Vec<Kind> = all_crds().iter().filter(applied).map(Kind::of).collect::<Result<_, _>>()?;
    let mut found = Found::new(sources);
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
        for one in pack::in_the_clear(pack, &plain) {
            found.add_at_field(&object.entry, Severity::Warning, one.finding.own());
        }
    }
    let mut notes = found.tasks(&objects, &contracts, &packs, &namespaces);
    notes.extend(packs.iter().flat_map(|(_, pack)| pack::bases(pack).into_iter().chain(pack::private_hosts(pack))));
    found.unused(&objects, &contracts);
    let count = objects.len();
    Ok(Outcome { diagnostics: found.sorted(), notes, objects: count })
}

impl Found<'_> {
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
                    format!("`{}`, which no task names", object.name),
                    "add it to a task's spec.tools, or remove it",
                );
                self.add_at_field(&object.entry, Severity::Warning, finding);
            }
        }
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
