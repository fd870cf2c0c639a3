//! Checks whether a pod is the pod that was planned.
//!
//! Guarantees: Every difference in what the pod runs, what it sees and how it is isolated is described, in words for users. A difference
//! that is not known to be harmless counts. The additions of API servers, Kubernetes' own admission and schedulers are known by name. A pod
//! carries the digests of its plan, so that it can be checked after the sources of the plan have changed.
//!
//! Non-goals: Who made the change. The values of environment variables, which may be secret. Annotations that a runtime reads and that this
//! module does not know.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use kube::ResourceExt;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{names, quantity::Quantity};
use crate::canonical;

/// The version of [`Plan`]. Another version computes the digests in another way, so pods of another version are not checked by them.
const VERSION: u32 = 1;

/// Fields that decide where and in which order a pod runs, and the overhead of that. They belong to the scheduler.
const PLACE: [&str; 13] = [
    "affinity",
    "imagePullSecrets",
    "nodeName",
    "nodeSelector",
    "overhead",
    "preemptionPolicy",
    "priority",
    "priorityClassName",
    "readinessGates",
    "schedulerName",
    "schedulingGates",
    "tolerations",
    "topologySpreadConstraints",
];

/// Domains or prefixes of annotations that tell runtimes, network plugins and the kubelet what to do with a pod.
const ACTING: [&str; 16] = [
    "antrea.io",
    "cdi.k8s.io",
    "cilium.io",
    "cncf.io",
    "container.apparmor.security.beta.kubernetes.io",
    "container.seccomp.security.alpha.kubernetes.io",
    "crio.io",
    "dev.gvisor",
    "io.containerd",
    "io.katacontainers",
    "io.kubernetes.cri",
    "io.kubernetes.cri-o",
    "nri.io",
    "ovn.org",
    "projectcalico.org",
    "seccomp.security.alpha.kubernetes.io",
];

/// Fields of a container that decide what its process is and what it sees. The other fields are compared only when the pod is created.
const OF_CONTAINERS: [&str; 12] = [
    "args",
    "command",
    "env",
    "envFrom",
    "image",
    "lifecycle",
    "name",
    "restartPolicy",
    "securityContext",
    "volumeDevices",
    "volumeMounts",
    "workingDir",
];

/// Fields of a pod that decide what its processes are and what they see.
const OF_PODS: [&str; 13] = [
    "automountServiceAccountToken",
    "dnsConfig",
    "dnsPolicy",
    "enableServiceLinks",
    "hostAliases",
    "hostIPC",
    "hostNetwork",
    "hostPID",
    "resourceClaims",
    "runtimeClassName",
    "securityContext",
    "serviceAccountName",
    "shareProcessNamespace",
];

/// The digests of the planned spec, in an annotation of the pod.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Plan {
    version: u32,
    /// The containers of every kind, by name.
    containers: BTreeMap<String, String>,
    /// The names of the init containers, in order.
    order: Vec<String>,
    /// The volumes, by name.
    volumes: BTreeMap<String, String>,
    /// The digest of the pod's own fields.
    pod: String,
}

/// Returns the digests of a spec, for [`names::PLAN`].
pub fn plan(spec: &PodSpec) -> String {
    serde_json::to_string(&Plan::of(spec)).unwrap_or_default()
}

/// Annotation of pods in caches, which do not keep containers: how the containers differed from the plan. See [`remember`].
const ALTERED: &str = "belay.dev/altered";

/// Records in an annotation how a pod differs from the plan, for a cache that drops the pod's spec.
pub fn remember(pod: &mut Pod) {
    match altered(pod) {
        Some(altered) => drop(pod.annotations_mut().insert(ALTERED.to_owned(), altered)),
        None => drop(pod.metadata.annotations.as_mut().and_then(|annotations| annotations.remove(ALTERED))),
    }
}

/// Returns how a pod differs from the plan, by the digests that it carries. Returns `None` for a pod that is as planned, or that carries no
/// digests.
pub fn altered(live: &Pod) -> Option<String> {
    if live.spec.as_ref().is_none_or(|spec| spec.containers.is_empty()) {
        return live.annotations().get(ALTERED).cloned();
    }
    let told: Plan = serde_json::from_str(live.annotations().get(names::PLAN)?).ok()?;
    if told.version != VERSION {
        return None;
    }
    let mut found = Vec::new();
    let now = Plan::of(live.spec.as_ref()?);
    changed("container", &told.containers, &now.containers, &mut found);
    changed("volume", &told.volumes, &now.volumes, &mut found);
    let known = now.order.iter().filter(|name| told.order.contains(name));
    if !known.eq(&told.order) && told.order.iter().all(|name| now.containers.contains_key(name)) {
        found.push("the init containers are not those that were planned, in their order".to_owned());
    }
    if told.pod != now.pod {
        found.push(
            "the pod's own settings (namespaces, service account, DNS, runtime class or security) were changed"
                .to_owned(),
        );
    }
    let by: Vec<_> = writers(live).into_iter().collect();
    if !found.is_empty() && !by.is_empty() {
        found.push(format!("written since by {}", by.join(", ")));
    }
    (!found.is_empty()).then(|| found.join("; "))
}

/// Returns the field managers other than Belay's that have written the pod's spec since it was created. Changes by admission leave no such
/// trace.
fn writers(live: &Pod) -> BTreeSet<String> {
    let fields = live.metadata.managed_fields.iter().flatten();
    let of_spec = fields.filter(|one| one.subresource.as_deref() != Some("status"));
    of_spec.filter_map(|one| one.manager.clone()).filter(|manager| manager != names::FIELD_MANAGER).collect()
}

impl Plan {
    fn of(spec: &PodSpec) -> Self {
        let mut spec = serde_json::to_value(spec).unwrap_or_default();
        // Multi-category security isolates the pod further.
        spec.get_mut("securityContext").and_then(Value::as_object_mut).map(|one| one.remove("seLinuxOptions"));
        tidy(&mut spec);
        let named = |lists: &[&str], keep: Option<&[&str]>| {
            let all = lists.iter().flat_map(|list| items(&spec, list));
            all.map(|one| (text(one, "name").to_owned(), digest(one, keep))).collect()
        };
        Self {
            version: VERSION,
            containers: named(&["initContainers", "containers", "ephemeralContainers"], Some(&OF_CONTAINERS)),
            order: items(&spec, "initContainers").map(|one| text(one, "name").to_owned()).collect(),
            volumes: named(&["volumes"], None),
            pod: digest(&spec, Some(&OF_PODS)),
        }
    }
}

/// Returns half of the SHA-256 of an object, or of some of its fields. 128 bits are enough, because the digest is not a defence against
/// anyone who can choose the fields.
fn digest(value: &Value, keep: Option<&[&str]>) -> String {
    let fields = value.as_object().into_iter().flatten();
    let kept: BTreeMap<_, _> = fields.filter(|(key, _)| keep.is_none_or(|keep| keep.contains(&key.as_str()))).collect();
    let mut hex = canonical::digest(&kept).map(hex::encode).unwrap_or_default();
    hex.truncate(32);
    hex
}

fn changed(kind: &str, told: &BTreeMap<String, String>, now: &BTreeMap<String, String>, found: &mut Vec<String>) {
    for (name, digest) in now {
        match told.get(name) {
            None => found.push(format!("{kind} `{name}` was added")),
            Some(planned) if planned != digest => found.push(format!("{kind} `{name}` was changed")),
            Some(_) => {}
        }
    }
    let removed = told.keys().filter(|name| !now.contains_key(*name));
    found.extend(removed.map(|name| format!("{kind} `{name}` was removed")));
}

/// Returns how a pod, as the API server returned it, differs from the planned pod, in one sentence for each difference. Returns an empty
/// list for a pod that is as planned.
pub fn differences(planned: &Pod, live: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let mut planned = serde_json::to_value(planned).unwrap_or_default();
    let mut live = live.clone();
    tidy(&mut planned);
    tidy(&mut live);
    let part = |of: &Value, key: &str| of.get(key).cloned().unwrap_or_default();
    metadata(&part(&planned, "metadata"), &part(&live, "metadata"), &mut found);
    let (planned, live) = (part(&planned, "spec"), part(&live, "spec"));
    for key in keys(&planned, &live) {
        match key {
            "containers" => containers("container", key, &planned, &live, &mut found),
            "initContainers" => containers("init container", key, &planned, &live, &mut found),
            "ephemeralContainers" => containers("ephemeral container", key, &planned, &live, &mut found),
            "volumes" => {
                let about = |volume: &Value| {
                    let kind = volume.as_object().into_iter().flatten().map(|(key, _)| key).find(|key| *key != "name");
                    kind.map_or_else(String::new, |kind| format!(" ({kind})"))
                };
                listed("volume", "name", key, (&planned, &live), &mut found, about, |name, planned, live, found| {
                    values(&format!("volume `{name}`"), "", Some(planned), Some(live), &|_| false, found);
                });
            }
            _ if PLACE.contains(&key) && planned.get(key).is_none() => {}
            // The deprecated name of the same field.
            "serviceAccount" if live.get(key) == planned.get("serviceAccountName") => {}
            // Multi-category security isolates the pod further, and OpenShift gives each namespace its own category.
            "securityContext" => {
                let more = |path: &str| path.starts_with("securityContext.seLinuxOptions");
                values("the pod", key, planned.get(key), live.get(key), &more, &mut found);
            }
            _ => values("the pod", key, planned.get(key), live.get(key), &|_| false, &mut found),
        }
    }
    found
}

fn metadata(planned: &Value, live: &Value, found: &mut Vec<String>) {
    let map = |of: &Value, key: &str| of.get(key).and_then(Value::as_object).cloned().unwrap_or_default();
    // Other components may add their own labels and annotations.
    let ours = |key: &str| domain(key) == "belay.dev";
    for (list, word) in [("labels", "label"), ("annotations", "annotation")] {
        let refused = |key: &str| ours(key) || list == "annotations" && acts(key);
        let (planned, live) = (map(planned, list), map(live, list));
        for (key, value) in &planned {
            match live.get(key) {
                Some(same) if same == value => {}
                Some(_) => found.push(format!("{word} `{key}` was changed")),
                None => found.push(format!("{word} `{key}` was removed")),
            }
        }
        let added = live.keys().filter(|key| !planned.contains_key(*key) && refused(key));
        found.extend(added.map(|key| format!("{word} `{key}` was added")));
    }
    let owners = |of: &Value| of.get("ownerReferences").cloned();
    if owners(planned) != owners(live) {
        found.push("the owner references were changed".to_owned());
    }
}

fn domain(key: &str) -> &str {
    key.split_once('/').map_or(key, |(domain, _)| domain)
}

/// Checks whether an annotation is known to change how a pod runs or what it reaches.
fn acts(key: &str) -> bool {
    let of = |name: &str, known: &str| {
        let below = name.strip_suffix(known).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        below || name.strip_prefix(known).is_some_and(|rest| rest.starts_with('.'))
    };
    ACTING.iter().any(|known| of(domain(key), known))
}

fn containers(kind: &str, list: &str, planned: &Value, live: &Value, found: &mut Vec<String>) {
    let about = |container: &Value| {
        let image = text(container, "image");
        if image.is_empty() { String::new() } else { format!(" (image `{image}`)") }
    };
    listed(kind, "name", list, (planned, live), found, about, |name, planned, live, found| {
        container(&format!("{kind} `{name}`"), planned, live, found);
    });
    let names = |of: &Value| items(of, list).map(|one| text(one, "name").to_owned()).collect::<Vec<_>>();
    let (planned, live) = (names(planned), names(live));
    // The order of init containers matters, because they run one after the other.
    if list == "initContainers" && !live.iter().filter(|name| planned.contains(name)).eq(&planned) {
        found.push(format!("the init containers run in another order than {}", planned.join(", ")));
    }
}

fn container(of: &str, planned: &Value, live: &Value, found: &mut Vec<String>) {
    let silent = |_: &Value| String::new();
    for key in keys(planned, live) {
        let (was, is) = (planned.get(key), live.get(key));
        match key {
            "image" if was != is => {
                let name = |image: Option<&Value>| image.and_then(Value::as_str).unwrap_or("none").to_owned();
                found.push(format!("the image of {of} is `{}`, not `{}`", name(is), name(was)));
            }
            "env" => {
                listed(
                    &format!("in {of}, variable"),
                    "name",
                    key,
                    (planned, live),
                    found,
                    silent,
                    |name, was, is, found| {
                        if was != is {
                            found.push(format!("in {of}, variable `{name}` was changed"));
                        }
                    },
                );
            }
            "volumeMounts" => {
                let about = |mount: &Value| format!(" (volume `{}`)", text(mount, "name"));
                listed(
                    &format!("in {of}, mount"),
                    "mountPath",
                    key,
                    (planned, live),
                    found,
                    about,
                    |path, was, is, found| {
                        values(&format!("mount `{path}` of {of}"), "", Some(was), Some(is), &|_| false, found);
                    },
                );
            }
            // A LimitRange may add missing limits and requests. Existing ones must stay.
            "resources" => {
                let bounds =
                    |path: &str| path.starts_with("resources.limits") || path.starts_with("resources.requests");
                values(of, key, was, is, &bounds, found);
            }
            "startupProbe" => {
                let defaults =
                    ["startupProbe.httpGet.scheme", "startupProbe.timeoutSeconds", "startupProbe.successThreshold"];
                values(of, key, was, is, &|path| defaults.contains(&path), found);
            }
            "imagePullPolicy" | "terminationMessagePath" | "terminationMessagePolicy"
                if was.is_none() && is.and_then(Value::as_str).is_some_and(is_default) => {}
            _ => values(of, key, was, is, &|_| false, found),
        }
    }
}

/// Checks whether the value is a default of the API server or of `AlwaysPullImages`.
fn is_default(value: &str) -> bool {
    matches!(value, "/dev/termination-log" | "File" | "Always" | "IfNotPresent")
}

/// Compares two lists whose items have names. If a name occurs more often than planned, an item was added: the last of several variables
/// with the same name takes effect.
fn listed(
    word: &str,
    key: &str,
    list: &str,
    (planned, live): (&Value, &Value),
    found: &mut Vec<String>,
    about: impl Fn(&Value) -> String,
    mut both: impl FnMut(&str, &Value, &Value, &mut Vec<String>),
) {
    let mut left: Vec<&Value> = items(planned, list).collect();
    for live in items(live, list) {
        let name = text(live, key);
        match left.iter().position(|planned| text(planned, key) == name) {
            Some(at) => both(name, left.remove(at), live, found),
            None => found.push(format!("{word} `{name}`{} was added", about(live))),
        }
    }
    found.extend(left.into_iter().map(|planned| format!("{word} `{}` was removed", text(planned, key))));
}

/// Compares two values, field by field. A field that may be added at its path is not a difference.
fn values(
    of: &str,
    path: &str,
    planned: Option<&Value>,
    live: Option<&Value>,
    may_be_added: &dyn Fn(&str) -> bool,
    found: &mut Vec<String>,
) {
    let (planned, live) = match (planned, live) {
        (Some(planned), Some(live)) => (planned, live),
        (None, Some(_)) if may_be_added(path) => return,
        (None, Some(_)) => return found.push(format!("`{path}` of {of} was added")),
        (Some(_), None) => return found.push(format!("`{path}` of {of} was removed")),
        (None, None) => return,
    };
    if planned.is_object() && live.is_object() {
        for key in keys(planned, live) {
            let path = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
            values(of, &path, planned.get(key), live.get(key), may_be_added, found);
        }
    } else if planned != live {
        let plain = |value: &Value| !value.is_array() && !value.is_object();
        let from_to = if plain(planned) && plain(live) { format!(" from {planned} to {live}") } else { String::new() };
        found.push(format!("`{path}` of {of} was changed{from_to}"));
    }
}

fn keys<'a>(planned: &'a Value, live: &'a Value) -> BTreeSet<&'a str> {
    [planned, live].into_iter().filter_map(Value::as_object).flat_map(Map::keys).map(String::as_str).collect()
}

fn items<'a>(of: &'a Value, list: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    of.get(list).and_then(Value::as_array).into_iter().flatten()
}

fn text<'a>(of: &'a Value, key: &str) -> &'a str {
    of.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// Removes empty values and writes quantities in one form, because an API server drops empty values and rewrites quantities.
fn tidy(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (key, field) in fields.iter_mut() {
                match key.as_str() {
                    "limits" | "requests" => {
                        field.as_object_mut().into_iter().flatten().for_each(|(_, one)| plain(one))
                    }
                    "sizeLimit" => plain(field),
                    _ => {}
                }
                tidy(field);
            }
            fields.retain(|key, field| match field {
                Value::Null => false,
                Value::String(text) => !(text.is_empty() || key == "procMount" && text == "Default"),
                Value::Array(items) => !items.is_empty(),
                Value::Object(fields) => !fields.is_empty(),
                Value::Bool(on) => *on || key != "readOnly",
                Value::Number(_) => true,
            });
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        _ => {}
    }
}

fn plain(quantity: &mut Value) {
    if let Some(read) = quantity.as_str().and_then(|text| Quantity::parse(text).ok()) {
        let milli = read.milli();
        *quantity = Value::String(if milli % 1000 == 0 { (milli / 1000).to_string() } else { format!("{milli}m") });
    }
}

#[cfg(test)]
mod tests;
