//! Writes to the API server: each write is counted, has a timeout, and has the object's UID as a precondition.

use std::{future::Future, time::Duration};

use k8s_openapi::api::{
    core::v1::{ConfigMap, Pod},
    networking::v1::NetworkPolicy,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
    core::PartialObjectMeta,
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::metrics::Metrics;
use crate::{
    api::{AgentTask, AgentTaskStatus, readiness::Readiness},
    render::names::{FIELD_MANAGER, FINALIZER, TASK_UID},
};

/// The timeout of one request. The client itself has none for a server that accepts a request and never answers.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The API server returned an error, or the connection to it failed.
    #[error("cannot {verb} {kind} `{name}`: {cause}")]
    Kube {
        /// The verb of the request.
        verb: &'static str,
        /// The kind of the object.
        kind: String,
        /// The name of the object.
        name: String,
        /// The error.
        cause: Box<kube::Error>,
    },
    /// The API server did not answer in time.
    #[error("cannot {verb} {kind} `{name}`: no answer in {} s", TIMEOUT.as_secs())]
    Timeout {
        /// The verb of the request.
        verb: &'static str,
        /// The kind of the object.
        kind: String,
        /// The name of the object.
        name: String,
    },
}

impl ApiError {
    /// Returns the HTTP status, if there was an answer.
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Kube { cause, .. } => match cause.as_ref() {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            },
            Self::Timeout { .. } => None,
        }
    }

    /// Checks whether the API server answered that it rejected the request.
    pub fn is_refusal(&self) -> bool {
        self.code().is_some_and(|code| (400..500).contains(&code))
    }

    /// Returns the API server's message, without the client's additions.
    pub fn message(&self) -> String {
        match self {
            Self::Kube { cause, .. } => match cause.as_ref() {
                kube::Error::Api(status) => status.message.clone(),
                other => other.to_string(),
            },
            Self::Timeout { .. } => self.to_string(),
        }
    }
}

/// A client that counts its writes.
#[derive(Clone)]
pub struct Writer {
    client: Client,
    metrics: Metrics,
}

impl Writer {
    /// Creates a writer with this client.
    pub fn new(client: Client, metrics: Metrics) -> Self {
        Self { client, metrics }
    }

    fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    async fn write<K: Resource<DynamicType = ()>, T>(
        &self,
        verb: &'static str,
        name: &str,
        request: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, ApiError> {
        self.metrics.writes.with_label_values(&[verb, &*K::kind(&())]).inc();
        bounded::<K, T>(verb, name, request).await
    }

    /// Creates a ConfigMap, which is immutable. Returns `true` if it was created, and `false` if the same ConfigMap already exists. A
    /// ConfigMap of the same task with other content is deleted, and the conflict is returned as an error, so that the next try can create
    /// it.
    ///
    /// # Errors
    /// Returns an error if another ConfigMap has the name, or if the API server rejects the request or does not answer.
    pub async fn create_config_map(&self, namespace: &str, object: &ConfigMap) -> Result<bool, ApiError> {
        let (name, api) = (object.name_any(), self.api::<ConfigMap>(namespace));
        let error = match self.write::<ConfigMap, _>("create", &name, api.create(&created_by_us(), object)).await {
            Ok(_) => return Ok(true),
            Err(error) => error,
        };
        if error.code() != Some(409) {
            return Err(error);
        }
        let live = bounded::<ConfigMap, _>("get", &name, api.get(&name)).await?;
        // The garbage collector deletes a ConfigMap of another task. One with an unknown owner must not be deleted here.
        if live.owner_references() != object.owner_references() {
            return Err(error);
        }
        if live.data == object.data && live.immutable == object.immutable {
            return Ok(false);
        }
        self.delete::<ConfigMap>(namespace, &name, live.uid()).await?;
        Err(error)
    }

    /// Creates a NetworkPolicy, or applies it to an existing one. Usually there is none, and a create is less work for the API server than
    /// an apply. Returns the NetworkPolicy from the API server's answer.
    ///
    /// # Errors
    /// Returns an error if the API server rejects the request or does not answer.
    pub async fn apply_network_policy(
        &self,
        namespace: &str,
        object: &NetworkPolicy,
    ) -> Result<NetworkPolicy, ApiError> {
        let (name, api) = (object.name_any(), self.api::<NetworkPolicy>(namespace));
        match self.write::<NetworkPolicy, _>("create", &name, api.create(&created_by_us(), object)).await {
            Err(error) if error.code() == Some(409) => {
                let (parameters, patch) = (PatchParams::apply(FIELD_MANAGER).force(), Patch::Apply(object));
                self.write::<NetworkPolicy, _>("apply", &name, api.patch(&name, &parameters, &patch)).await
            }
            created => created,
        }
    }

    /// Deletes a ConfigMap of a task's attempt. It is not an error if the ConfigMap is gone or one of another owner has the name.
    ///
    /// # Errors
    /// Returns an error if the API server rejects the request or does not answer.
    pub async fn delete_config_map(&self, namespace: &str, name: &str, task_uid: &str) -> Result<(), ApiError> {
        let api = self.api::<ConfigMap>(namespace);
        let live = bounded::<ConfigMap, _>("get", name, api.get_metadata_opt(name)).await?;
        match live.filter(|live| live.labels().get(TASK_UID).is_some_and(|uid| uid == task_uid)) {
            Some(live) => self.delete::<ConfigMap>(namespace, name, live.uid()).await,
            None => Ok(()),
        }
    }

    /// Deletes a NetworkPolicy. It is not an error if the NetworkPolicy is gone or another one has the name.
    ///
    /// # Errors
    /// Returns an error if the API server rejects the request or does not answer.
    pub async fn delete_network_policy(&self, namespace: &str, name: &str, uid: &str) -> Result<(), ApiError> {
        self.delete::<NetworkPolicy>(namespace, name, Some(uid.to_owned())).await
    }

    /// Reads the NetworkPolicy from the API server.
    ///
    /// # Errors
    /// Returns an error if the NetworkPolicy is gone, or the API server does not answer.
    pub async fn get_network_policy(&self, namespace: &str, name: &str) -> Result<NetworkPolicy, ApiError> {
        bounded::<NetworkPolicy, _>("get", name, self.api::<NetworkPolicy>(namespace).get(name)).await
    }

    /// Creates a pod. An existing pod is not changed. Returns the pod and the whole answer, which may have fields that this version does
    /// not know.
    ///
    /// # Errors
    /// Returns an error if the API server rejects the pod or does not answer.
    pub async fn create_pod(&self, namespace: &str, pod: &Pod) -> Result<(Pod, Value), ApiError> {
        let made = async {
            let answer = self.post_pod(namespace, pod, &created_by_us()).await?;
            Ok((Pod::deserialize(&answer).map_err(kube::Error::SerdeError)?, answer))
        };
        self.write::<Pod, _>("create", &pod.name_any(), made).await
    }

    /// Creates a pod in a dry run and returns the API server's answer. Nothing is stored.
    ///
    /// # Errors
    /// Returns an error if the API server rejects the pod or does not answer.
    pub async fn rehearse_pod(&self, namespace: &str, pod: &Pod) -> Result<Value, ApiError> {
        let parameters = PostParams { dry_run: true, ..created_by_us() };
        bounded::<Pod, _>("rehearse", &pod.name_any(), self.post_pod(namespace, pod, &parameters)).await
    }

    async fn post_pod(&self, namespace: &str, pod: &Pod, parameters: &PostParams) -> Result<Value, kube::Error> {
        let body = serde_json::to_vec(pod).map_err(kube::Error::SerdeError)?;
        let path = Pod::url_path(&(), Some(namespace));
        let request = kube::core::Request::new(path).create(parameters, body);
        let mut request = request.map_err(kube::Error::BuildRequest)?;
        request.extensions_mut().insert("create");
        self.client.request(request).await
    }

    /// Returns the objects of a kind that this version may not know, from the first of these paths that exists.
    ///
    /// # Errors
    /// Returns an error if the API server rejects the request or does not answer.
    pub async fn list_any(&self, paths: &[&str]) -> Result<Vec<Value>, kube::Error> {
        for path in paths {
            let request = http::Request::get(*path).body(Vec::new()).map_err(kube::Error::HttpError)?;
            match tokio::time::timeout(TIMEOUT, self.client.request::<Value>(request)).await {
                Ok(Ok(mut list)) => {
                    let items = list.get_mut("items").and_then(Value::as_array_mut);
                    return Ok(items.map(std::mem::take).unwrap_or_default());
                }
                Ok(Err(kube::Error::Api(status))) if status.code == 404 => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(kube::Error::Service("no answer".into())),
            }
        }
        Ok(Vec::new())
    }

    /// Creates a task. It is not an error if a task with the same spec already exists.
    ///
    /// # Errors
    /// Returns an error if another task has the name, or if the API server rejects the request or does not answer.
    pub async fn create_task(&self, task: &AgentTask) -> Result<(), ApiError> {
        let (name, api) = (task.name_any(), self.api::<AgentTask>(&task.namespace().unwrap_or_default()));
        match self.write::<AgentTask, _>("create", &name, api.create(&created_by_us(), task)).await {
            Err(error) if error.code() == Some(409) => {
                let live = bounded::<AgentTask, _>("get", &name, api.get(&name)).await?;
                let same = live.spec == task.spec && live.metadata.deletion_timestamp.is_none();
                if same { Ok(()) } else { Err(error) }
            }
            created => created.map(drop),
        }
    }

    /// Reads the task from the API server.
    ///
    /// # Errors
    /// Returns an error if the API server does not answer.
    pub async fn get_task(&self, namespace: &str, name: &str) -> Result<Option<AgentTask>, ApiError> {
        bounded::<AgentTask, _>("get", name, self.api::<AgentTask>(namespace).get_opt(name)).await
    }

    /// Reads the pod from the API server.
    ///
    /// # Errors
    /// Returns an error if the API server does not answer.
    pub async fn get_pod(&self, namespace: &str, name: &str) -> Result<Option<Pod>, ApiError> {
        bounded::<Pod, _>("get", name, self.api::<Pod>(namespace).get_opt(name)).await
    }

    /// Requests the deletion of a pod. It is not an error if the pod is gone or another one has the name.
    ///
    /// # Errors
    /// Returns an error if the API server rejects the request or does not answer.
    pub async fn delete_pod(&self, namespace: &str, name: &str, uid: &str) -> Result<(), ApiError> {
        self.delete::<Pod>(namespace, name, Some(uid.to_owned())).await
    }

    async fn delete<K>(&self, namespace: &str, name: &str, uid: Option<String>) -> Result<(), ApiError>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + DeserializeOwned
            + Clone
            + std::fmt::Debug,
    {
        let parameters = DeleteParams {
            preconditions: Some(Preconditions { uid, resource_version: None }),
            ..DeleteParams::default()
        };
        let api = self.api::<K>(namespace);
        match self.write::<K, _>("delete", name, api.delete(name, &parameters)).await {
            Err(error) if matches!(error.code(), Some(404 | 409)) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Adds or removes Belay's finalizer. Returns the updated task.
    ///
    /// The resource version protects the finalizers of other writers. The UID protects another task with the same name.
    ///
    /// # Errors
    /// Returns an error if the task was changed in the meantime, or if the API server rejects the request or does not answer.
    pub async fn set_finalizer(&self, task: &AgentTask, present: bool) -> Result<AgentTask, ApiError> {
        let (namespace, name) = (task.namespace().unwrap_or_default(), task.name_any());
        let mut finalizers: Vec<_> = task.finalizers().iter().filter(|one| *one != FINALIZER).cloned().collect();
        if present {
            finalizers.push(FINALIZER.to_owned());
        }
        let metadata = json!({
            "uid": task.uid(),
            "resourceVersion": task.resource_version(),
            "finalizers": finalizers,
        });
        let patch = Patch::Merge(json!({ "metadata": metadata }));
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        let api = self.api::<AgentTask>(&namespace);
        self.write::<AgentTask, _>("patch", &name, api.patch(&name, &parameters, &patch)).await
    }

    /// Applies the status of a contract or a pack. Returns its new resource version.
    ///
    /// # Errors
    /// Returns an error if the object is gone, or if the API server rejects the request or does not answer.
    pub async fn apply_readiness<K>(
        &self,
        namespace: Option<&str>,
        name: &str,
        uid: &str,
        status: &Readiness,
    ) -> Result<Option<String>, ApiError>
    where
        K: Resource<DynamicType = ()>,
    {
        let patch = Patch::Apply(json!({
            "apiVersion": K::api_version(&()),
            "kind": K::kind(&()),
            "metadata": { "name": name, "namespace": namespace, "uid": uid },
            "status": status,
        }));
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let applied = async {
            let path = K::url_path(&(), namespace);
            let request = kube::core::Request::new(path).patch_subresource("status", name, &parameters, &patch);
            let mut request = request.map_err(kube::Error::BuildRequest)?;
            request.extensions_mut().insert("apply-status");
            self.client.request::<PartialObjectMeta<K>>(request).await
        };
        let applied = self.write::<K, _>("apply-status", name, applied).await?;
        Ok(applied.metadata.resource_version)
    }

    /// Applies the operator's fields of the status. Returns the updated task.
    ///
    /// # Errors
    /// Returns an error if the task is gone, or if the API server rejects the request or does not answer.
    pub async fn apply_status(
        &self,
        namespace: &str,
        name: &str,
        uid: Option<&str>,
        status: &AgentTaskStatus,
    ) -> Result<AgentTask, ApiError> {
        let patch = Patch::Apply(json!({
            "apiVersion": AgentTask::api_version(&()),
            "kind": AgentTask::kind(&()),
            "metadata": { "name": name, "namespace": namespace, "uid": uid },
            "status": AgentTaskStatus { usage: None, ..status.clone() },
        }));
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let api = self.api::<AgentTask>(namespace);
        self.write::<AgentTask, _>("apply-status", name, api.patch_status(name, &parameters, &patch)).await
    }
}

fn created_by_us() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

async fn bounded<K: Resource<DynamicType = ()>, T>(
    verb: &'static str,
    name: &str,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, ApiError> {
    let (kind, name) = (K::kind(&()).into_owned(), name.to_owned());
    match tokio::time::timeout(TIMEOUT, request).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(cause)) => Err(ApiError::Kube { verb, kind, name, cause: Box::new(cause) }),
        Err(_) => Err(ApiError::Timeout { verb, kind, name }),
    }
}
