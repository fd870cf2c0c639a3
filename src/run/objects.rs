//! The objects of a run, and the stores from which the gateway reads them as it reads those of a cluster.
//!
//! Guarantees: the gateway and the harness see the task, the contracts and the pack as the API server would return them: with UIDs,
//! generations, and a namespace whose labels select the pack. A token belongs to one pod or to the operator, and no other token is valid.
//!
//! Non-goals: objects that are not among the files.

use std::collections::{BTreeMap, HashMap};

use futures::future::BoxFuture;
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewStatus, UserInfo},
    core::v1::{ConfigMap, Namespace, Pod, Secret},
};
use kube::{
    Resource, ResourceExt,
    runtime::{reflector::store::Writer, watcher},
};
use parking_lot::Mutex;
use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::mpsc::UnboundedSender;

use super::{RunError, RunEvent};
use crate::{
    api::{AgentTask, ApprovalRequest, PolicyPack, ToolContract},
    gateway::{
        approvals::Create,
        cluster::{Fetch, Stores},
        identity::reviews::Review,
        usage::WriteUsage,
    },
    lenient::Lenient,
    policy::{
        approval::{Answer, Vote},
        config::Usage,
    },
    render::names,
    wire,
};

/// The namespace of the operator and the gateway in a cluster.
pub const SYSTEM_NAMESPACE: &str = "belay-system";

/// The objects of a run, as they were read.
#[derive(Clone, Debug)]
pub struct Objects {
    /// The task.
    pub task: AgentTask,
    /// All contracts.
    pub contracts: Vec<ToolContract>,
    /// The pack that governs the namespace of the task.
    pub pack: PolicyPack,
    /// The namespace.
    pub namespace: Namespace,
    /// The ConfigMaps of the namespace, for mounts.
    pub config_maps: Vec<ConfigMap>,
    /// The Secrets of the namespace, for mounts.
    pub secrets: Vec<Secret>,
    /// The Secrets for upstreams, which only the gateway reads.
    pub credentials: Vec<Secret>,
}

/// Returns a text that cannot be guessed: 32 random bytes, as hex.
///
/// # Errors
/// Returns an error if the operating system gives no randomness.
pub fn random_token() -> Result<String, RunError> {
    random::<32>().map(hex::encode)
}

/// Returns a random UID (RFC 9562, version 4).
///
/// # Errors
/// Returns an error if the operating system gives no randomness.
pub fn random_uid() -> Result<String, RunError> {
    let mut bytes = random::<16>()?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let text = hex::encode(bytes);
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| text.get(part).unwrap_or_default().to_owned());
    Ok(parts.join("-"))
}

fn random<const N: usize>() -> Result<[u8; N], RunError> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| RunError::Random)?;
    Ok(bytes)
}

/// A reflector store that this module writes.
struct Written<K>(Mutex<Writer<Lenient<K>>>)
where
    K: Resource<DynamicType = ()> + Clone + 'static;

impl<K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + Send + Sync + 'static> Written<K> {
    fn of(objects: impl IntoIterator<Item = K>) -> Self {
        let written = Self(Mutex::new(Writer::default()));
        objects.into_iter().for_each(|object| written.apply(object));
        written
    }

    fn apply(&self, object: K) {
        let event = watcher::Event::Apply(Lenient(Ok(object)));
        self.0.lock().apply_watcher_event(&event);
    }

    fn reader(&self) -> crate::gateway::cluster::Guarded<K> {
        self.0.lock().as_reader()
    }
}

/// The stand-in for the API server.
pub struct Api {
    tasks: Written<AgentTask>,
    contracts: Written<ToolContract>,
    packs: Written<PolicyPack>,
    namespaces: Written<Namespace>,
    pods: Written<Pod>,
    approvals: Written<ApprovalRequest>,
    secrets: Written<Secret>,
    tokens: Mutex<HashMap<String, UserInfo>>,
    tell: UnboundedSender<RunEvent>,
}

impl Api {
    /// Creates the stores of these objects. New approval requests are sent to `tell`.
    pub fn new(objects: &Objects, tell: UnboundedSender<RunEvent>) -> Self {
        Self {
            tasks: Written::of([objects.task.clone()]),
            contracts: Written::of(objects.contracts.iter().cloned()),
            packs: Written::of([objects.pack.clone()]),
            namespaces: Written::of([objects.namespace.clone()]),
            pods: Written::of([]),
            approvals: Written::of([]),
            secrets: Written::of(objects.credentials.iter().cloned()),
            tokens: Mutex::default(),
            tell,
        }
    }

    /// Returns the stores that the gateway watches.
    pub fn stores(&self) -> Stores {
        Stores {
            pods: self.pods.reader(),
            tasks: self.tasks.reader(),
            contracts: self.contracts.reader(),
            packs: self.packs.reader(),
            namespaces: self.namespaces.reader(),
            approvals: self.approvals.reader(),
            secrets: self.secrets.reader(),
        }
    }

    /// Stores the current state of a pod.
    pub fn apply_pod(&self, pod: Pod) {
        self.pods.apply(pod);
    }

    /// Stores the current state of the task.
    pub fn apply_task(&self, task: AgentTask) {
        self.tasks.apply(task);
    }

    /// Returns a new token that belongs to this pod.
    ///
    /// # Errors
    /// Returns an error if the operating system gives no randomness.
    pub fn token_of(&self, pod: &Pod) -> Result<String, RunError> {
        let namespace = pod.namespace().unwrap_or_default();
        let bound = [
            ("authentication.kubernetes.io/pod-name", pod.name_any()),
            ("authentication.kubernetes.io/pod-uid", pod.uid().unwrap_or_default()),
        ];
        self.token(UserInfo {
            username: Some(format!("system:serviceaccount:{namespace}:default")),
            extra: Some(bound.map(|(key, value)| (key.to_owned(), vec![value])).into()),
            ..UserInfo::default()
        })
    }

    /// Returns a new token that belongs to the operator.
    ///
    /// # Errors
    /// Returns an error if the operating system gives no randomness.
    pub fn operator_token(&self) -> Result<String, RunError> {
        self.token(UserInfo { username: Some(operator()), ..UserInfo::default() })
    }

    fn token(&self, user: UserInfo) -> Result<String, RunError> {
        let token = random_token()?;
        self.tokens.lock().insert(token.clone(), user);
        Ok(token)
    }

    /// Adds an approver's decision to a request. As at admission, an approver has one decision.
    pub fn decide(&self, name: &str, by: &str, decision: Answer, reason: Option<String>) {
        let store = self.approvals.reader();
        let known = store.state().into_iter().filter_map(|guarded| guarded.0.as_ref().ok().cloned());
        let Some(mut request) = known.into_iter().find(|request| request.name_any() == name) else { return };
        let decisions = &mut request.status.get_or_insert_default().decisions;
        if decisions.iter().all(|vote| vote.by != by) {
            decisions.push(Vote { by: by.to_owned(), decision, reason });
            self.approvals.apply(request);
        }
    }
}

/// Returns the user name of the operator.
pub fn operator() -> String {
    format!("system:serviceaccount:{SYSTEM_NAMESPACE}:{}", names::OPERATOR)
}

impl Review for Api {
    fn review(&self, review: TokenReview) -> BoxFuture<'_, Result<TokenReviewStatus, String>> {
        let tokens = self.tokens.lock();
        let user = review.spec.token.and_then(|token| tokens.get(&token).cloned());
        let status = TokenReviewStatus {
            authenticated: Some(user.is_some()),
            audiences: Some(vec![wire::AUDIENCE.to_owned()]),
            user,
            error: None,
        };
        Box::pin(async move { Ok(status) })
    }
}

impl Fetch for Api {
    /// The stores are always current, so nothing more is fetched.
    fn pod<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<Option<Pod>, String>> {
        Box::pin(async { Ok(None) })
    }

    fn task<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<Option<AgentTask>, String>> {
        Box::pin(async { Ok(None) })
    }
}

impl Create for Api {
    fn create(
        &self,
        namespace: String,
        mut request: ApprovalRequest,
    ) -> BoxFuture<'_, Result<ApprovalRequest, String>> {
        Box::pin(async move {
            request.metadata.namespace = Some(namespace);
            request.metadata.uid = Some(random_uid().map_err(|error| error.to_string())?);
            self.approvals.apply(request.clone());
            // The receiver may be gone. Then no approver decides, and the request expires.
            let _ = self.tell.send(RunEvent::Asked(Box::new(request.clone())));
            Ok(request)
        })
    }
}

impl WriteUsage for Api {
    /// Does nothing, because every reported record contains the counters.
    fn write<'a>(&'a self, _: &'a str, _: &'a str, _: &'a str, _: Usage) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async { Ok(()) })
    }
}

/// Returns labels that match a selector.
pub fn labels_for(
    selector: &k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector,
) -> BTreeMap<String, String> {
    let mut labels = selector.match_labels.clone().unwrap_or_default();
    for one in selector.match_expressions.iter().flatten() {
        let first = one.values.iter().flatten().next().cloned().unwrap_or_default();
        if matches!(one.operator.as_str(), "In" | "Exists") {
            labels.entry(one.key.clone()).or_insert(first);
        }
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_are_of_version_4() {
        let uid = random_uid().unwrap();
        assert_eq!((uid.len(), uid.get(14..15)), (36, Some("4")), "{uid}");
        assert!(matches!(uid.get(19..20), Some("8" | "9" | "a" | "b")), "{uid}");
        assert_ne!(uid, random_uid().unwrap());
    }

    #[test]
    fn labels_are_those_that_are_selected() {
        let selector = serde_json::from_value(serde_json::json!({
            "matchLabels": {"a": "1"},
            "matchExpressions": [
                {"key": "b", "operator": "In", "values": ["2", "3"]},
                {"key": "c", "operator": "Exists"},
                {"key": "d", "operator": "DoesNotExist"},
            ],
        }));
        let labels = labels_for(&selector.unwrap());
        assert_eq!(labels, [("a", "1"), ("b", "2"), ("c", "")].map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    }
}
