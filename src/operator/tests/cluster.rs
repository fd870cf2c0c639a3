//! An API server in memory: just what the operator asks of one, every request on record, and errors on demand.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use kube::{
    Client,
    runtime::{
        reflector::{self, Store, store::Writer},
        watcher::Event,
    },
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Value>,
    requests: Vec<String>,
    version: u64,
    faults: Vec<(String, StatusCode, &'static str)>,
    /// What is done to an object on its way into the store.
    mutate: Option<fn(&str, &mut Value)>,
    /// What is answered to those who only want to know what would be answered.
    rehearsals: Option<&'static str>,
}

#[derive(Clone, Default)]
pub(in crate::operator) struct Cluster(Arc<Mutex<State>>);

impl Cluster {
    pub(in crate::operator) fn client(&self) -> Client {
        let cluster = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let cluster = cluster.clone();
            async move { Ok::<_, Infallible>(cluster.answer(request).await) }
        });
        Client::new(service, "default")
    }

    /// Puts an object there, as somebody else.
    pub(in crate::operator) fn put(&self, path: &str, mut object: Value) {
        let mut state = self.0.lock().unwrap();
        state.stamp(path, &mut object);
        state.objects.insert(path.to_owned(), object);
    }

    /// Changes an object, as somebody else.
    pub(in crate::operator) fn edit(&self, path: &str, change: impl FnOnce(&mut Value)) {
        let mut state = self.0.lock().unwrap();
        let mut object = state.objects.remove(path).unwrap();
        change(&mut object);
        state.stamp(path, &mut object);
        state.objects.insert(path.to_owned(), object);
    }

    pub(in crate::operator) fn remove(&self, path: &str) {
        self.0.lock().unwrap().objects.remove(path).unwrap();
    }

    pub(in crate::operator) fn get(&self, path: &str) -> Option<Value> {
        self.0.lock().unwrap().objects.get(path).cloned()
    }

    /// Requests whose `METHOD path` begins so are answered with this status, until it is taken back.
    pub(in crate::operator) fn fail(&self, prefix: &str, status: u16) {
        self.fail_with(prefix, status, "on demand");
    }

    /// The same, in these words.
    pub(in crate::operator) fn fail_with(&self, prefix: &str, status: u16, message: &'static str) {
        self.0.lock().unwrap().faults.push((prefix.to_owned(), StatusCode::from_u16(status).unwrap(), message));
    }

    pub(in crate::operator) fn heal(&self) {
        self.0.lock().unwrap().faults.clear();
    }

    pub(in crate::operator) fn mutate(&self, mutate: fn(&str, &mut Value)) {
        self.0.lock().unwrap().mutate = Some(mutate);
    }

    /// Whoever only wants to know what would be answered is told this, as a bad request.
    pub(in crate::operator) fn answer_rehearsals(&self, message: &'static str) {
        self.0.lock().unwrap().rehearsals = Some(message);
    }

    /// The requests since the last call.
    pub(in crate::operator) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().requests)
    }

    /// The requests since the last call that write.
    pub(in crate::operator) fn writes(&self) -> Vec<String> {
        self.requests().into_iter().filter(|request| !request.starts_with("GET")).collect()
    }

    /// Fills a store with every object under this part of a path.
    pub(in crate::operator) fn fill<K>(&self, writer: &mut Writer<K>, plural: &str)
    where
        K: kube::Resource<DynamicType = ()> + DeserializeOwned + Clone,
    {
        writer.apply_watcher_event(&Event::Init);
        for (_, object) in
            self.0.lock().unwrap().objects.iter().filter(|(path, _)| path.contains(&format!("/{plural}/")))
        {
            writer.apply_watcher_event(&Event::InitApply(serde_json::from_value(object.clone()).unwrap()));
        }
        writer.apply_watcher_event(&Event::InitDone);
    }

    async fn answer(&self, request: Request<kube::client::Body>) -> Response<Full<Bytes>> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let body: Value = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
        let path = head.uri.path().to_owned();
        let kind = head.headers.get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let mut state = self.0.lock().unwrap();
        state.requests.push(format!("{} {path}", head.method));
        let line = format!("{} {path}", head.method);
        if let Some((_, status, message)) = state.faults.iter().find(|(prefix, ..)| line.starts_with(prefix)) {
            return refusal(*status, message);
        }
        if head.uri.query().is_some_and(|query| query.contains("dryRun=All")) {
            if let Some(message) = state.rehearsals {
                return refusal(StatusCode::BAD_REQUEST, message);
            }
            let (mut object, path) = (body, format!("{path}/rehearsed"));
            state.stamp(&path, &mut object);
            return reply(StatusCode::OK, &object);
        }
        match state.handle(&head.method, &path, kind, body) {
            Ok(object) => reply(StatusCode::OK, &object),
            Err((status, message)) => refusal(status, message),
        }
    }
}

type Answer = Result<Value, (StatusCode, &'static str)>;

impl State {
    fn stamp(&mut self, path: &str, object: &mut Value) {
        self.version += 1;
        let version = self.version;
        let metadata = object["metadata"].as_object_mut().unwrap();
        metadata.insert("resourceVersion".into(), json!(version.to_string()));
        metadata.entry("uid").or_insert_with(|| json!(format!("uid-{version}")));
        // Whole seconds, as an API server writes them.
        let now = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap();
        metadata.entry("creationTimestamp").or_insert_with(|| json!(now.to_string()));
        if let Some(mutate) = self.mutate {
            mutate(path, object);
        }
    }

    fn handle(&mut self, method: &Method, path: &str, kind: &str, body: Value) -> Answer {
        let missing = (StatusCode::NOT_FOUND, "not found");
        let conflict = (StatusCode::CONFLICT, "conflict");
        match *method {
            Method::GET => self.objects.get(path).cloned().ok_or(missing),
            Method::POST => {
                let path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap());
                if self.objects.contains_key(&path) {
                    return Err((StatusCode::CONFLICT, "already exists"));
                }
                self.store(path, body)
            }
            Method::PUT => {
                let live = self.objects.get(path).ok_or(missing)?;
                if live["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"] {
                    return Err(conflict);
                }
                self.store(path.to_owned(), body)
            }
            Method::PATCH if path.ends_with("/status") => {
                let path = path.trim_end_matches("/status").to_owned();
                let mut object = self.objects.get(&path).cloned().ok_or(missing)?;
                if object["metadata"]["uid"] != body["metadata"]["uid"] {
                    return Err(conflict);
                }
                let usage = object["status"]["usage"].clone();
                object["status"] = body["status"].clone();
                if !usage.is_null() {
                    object["status"]["usage"] = usage;
                }
                self.store(path, object)
            }
            Method::PATCH if kind.contains("apply-patch") => {
                let mut object = body;
                if let Some(live) = self.objects.get(path) {
                    object["metadata"]["uid"] = live["metadata"]["uid"].clone();
                }
                self.store(path.to_owned(), object)
            }
            Method::PATCH => {
                let mut object = self.objects.get(path).cloned().ok_or(missing)?;
                let (live, asked) = (&object["metadata"], &body["metadata"]);
                if !asked["uid"].is_null() && live["uid"] != asked["uid"]
                    || live["resourceVersion"] != asked["resourceVersion"]
                {
                    return Err(conflict);
                }
                merge(&mut object, body);
                self.store(path.to_owned(), object)
            }
            Method::DELETE => {
                let live = self.objects.get(path).ok_or(missing)?;
                if live["metadata"]["uid"] != body["preconditions"]["uid"] {
                    return Err(conflict);
                }
                self.objects.remove(path).ok_or(missing)
            }
            _ => Err((StatusCode::METHOD_NOT_ALLOWED, "not here")),
        }
    }

    fn store(&mut self, path: String, mut object: Value) -> Answer {
        self.stamp(&path, &mut object);
        self.objects.insert(path, object.clone());
        Ok(object)
    }
}

fn refusal(status: StatusCode, message: &str) -> Response<Full<Bytes>> {
    let reason = if status == StatusCode::NOT_FOUND { "NotFound" } else { message };
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason, "code": status.as_u16(),
    });
    reply(status, &body)
}

fn reply(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    Response::builder().status(status).body(Full::new(Bytes::from(body.to_string()))).unwrap()
}

/// A store and the one who fills it.
pub(in crate::operator) fn store<K>() -> (Store<K>, Writer<K>)
where
    K: kube::Resource<DynamicType = ()> + Clone + 'static,
{
    reflector::store()
}

/// JSON merge patch, RFC 7396.
fn merge(object: &mut Value, patch: Value) {
    match patch {
        Value::Object(fields) => {
            if !object.is_object() {
                *object = json!({});
            }
            for (key, value) in fields {
                if value.is_null() {
                    object.as_object_mut().unwrap().remove(&key);
                } else {
                    merge(&mut object[key], value);
                }
            }
        }
        other => *object = other,
    }
}
