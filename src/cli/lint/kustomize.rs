//! What kustomizations among the files say about other files.
//!
//! Guarantees: a namespace that a kustomization sets counts for the files below its folder, and a patch that it lists is no object.
//!
//! Non-goals: everything else that `kustomize` does. Its output can be checked instead.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path, PathBuf},
};

use super::{diagnostic::Source, document::Node};

/// The names under which `kustomize` looks for its own file.
const KUSTOMIZATIONS: [&str; 3] = ["kustomization.yaml", "kustomization.yml", "Kustomization"];

/// What kustomizations among the files say about other files.
pub(super) struct Kustomizations {
    /// The namespace that the kustomization of a folder sets.
    namespaces: BTreeMap<PathBuf, String>,
    /// Files that are patches, not whole objects.
    pub(super) patches: BTreeSet<PathBuf>,
}

impl Kustomizations {
    pub(super) fn of(sources: &[Source], documents: &[Vec<Node>]) -> Self {
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
    pub(super) fn namespace_of(&self, path: &Path) -> Option<&str> {
        plain(path).ancestors().skip(1).find_map(|folder| self.namespaces.get(folder)).map(String::as_str)
    }
}

pub(super) fn is_kustomization(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| KUSTOMIZATIONS.contains(&name))
}

/// Returns a path without `.` and `..`.
pub(super) fn plain(path: &Path) -> PathBuf {
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
