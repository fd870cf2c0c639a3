//! An API server in memory with the parts that the operator uses, including lists and watches. It records every request and returns errors
//! on demand.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures::stream;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use jiff::Timestamp;
use kube::{
    Client,
    runtime::{
        reflector::{self, Store, store::Writer},
        watcher::Event,
    },
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::{sync::Notify, time::Instant};

/// A body that may last long, such as the body of a watch.
pub(in crate::operator) type Body = UnsyncBoxBody<Bytes, io::Error>;

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Value>,
    requests: Vec<String>,
    version: u64,
    changes: Changes,
    /// The current time. The time of this machine if it is not set.
    now: Option<Timestamp>,
    faults: Vec<(String, StatusCode, &'static str)>,
    /// A change to each object before it is stored, as mutating admission makes it.
    mutate: Option<fn(&str, &mut Value)>,
    /// The error message that answers dry runs.
    rehearsals: Option<&'static str>,
}

/// The state that lists and watches show. It may be older than the stored state.
#[derive(Default)]
struct Changes {
    events: Vec<Change>,
    /// The number of events that are shown.
    told: usize,
    held: bool,
    shown: BTreeMap<String, Value>,
    /// Watches cannot continue from versions before this one.
    compacted: u64,
    /// The number of times that all connections were cut.
    cuts: u64,
    news: Arc<Notify>,
}

#[derive(Clone)]
struct Change {
    version: u64,
    kind: &'static str,
    path: String,
    object: Value,
}

impl Changes {
    fn push(&mut self, version: u64, kind: &'static str, path: &str, object: &Value) {
        self.events.push(Change { version, kind, path: path.to_owned(), object: object.clone() });
        self.tell();
    }

    fn tell(&mut self) {
        if self.held {
            return;
        }
        for event in self.events.iter().skip(self.told) {
            match event.kind {
                "DELETED" => drop(self.shown.remove(&event.path)),
                _ => drop(self.shown.insert(event.path.clone(), event.object.clone())),
            }
        }
        self.told = self.events.len();
        self.news.notify_waiters();
    }

    /// Returns the version of the state that is shown.
    fn version(&self) -> u64 {
        self.told.checked_sub(1).map_or(1, |last| self.events[last].version)
    }
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

    /// Stores an object, as another client.
    pub(in crate::operator) fn put(&self, path: &str, mut object: Value) {
        let mut state = self.0.lock().unwrap();
        state.stamp(path, &mut object);
        state.keep(path, object);
    }

    /// Changes an object, as another client.
    pub(in crate::operator) fn edit(&self, path: &str, change: impl FnOnce(&mut Value)) {
        let mut state = self.0.lock().unwrap();
        let mut object = state.objects.get(path).cloned().unwrap();
        change(&mut object);
        state.stamp(path, &mut object);
        state.keep(path, object);
    }

    pub(in crate::operator) fn remove(&self, path: &str) {
        self.0.lock().unwrap().remove(path).unwrap();
    }

    /// Sets the current time.
    pub(in crate::operator) fn set_time(&self, now: Timestamp) {
        self.0.lock().unwrap().now = Some(now);
    }

    /// Stops lists and watches from showing changes, or shows all changes again.
    pub(in crate::operator) fn hold(&self, held: bool) {
        let mut state = self.0.lock().unwrap();
        state.changes.held = held;
        state.changes.tell();
    }

    /// Ends all watches, even in the middle of an event.
    pub(in crate::operator) fn cut(&self) {
        let mut state = self.0.lock().unwrap();
        state.changes.cuts += 1;
        state.changes.news.notify_waiters();
    }

    /// Makes watches expire that continue from before the state that is shown.
    pub(in crate::operator) fn compact(&self) {
        let mut state = self.0.lock().unwrap();
        state.changes.compacted = state.changes.version();
    }

    pub(in crate::operator) fn get(&self, path: &str) -> Option<Value> {
        self.0.lock().unwrap().objects.get(path).cloned()
    }

    /// Answers requests whose `METHOD path` has this prefix with this status, until `heal` is called.
    pub(in crate::operator) fn fail(&self, prefix: &str, status: u16) {
        self.fail_with(prefix, status, "on demand");
    }

    /// Like `fail`, with this message.
    pub(in crate::operator) fn fail_with(&self, prefix: &str, status: u16, message: &'static str) {
        self.0.lock().unwrap().faults.push((prefix.to_owned(), StatusCode::from_u16(status).unwrap(), message));
    }

    pub(in crate::operator) fn heal(&self) {
        self.0.lock().unwrap().faults.clear();
    }

    pub(in crate::operator) fn mutate(&self, mutate: fn(&str, &mut Value)) {
        self.0.lock().unwrap().mutate = Some(mutate);
    }

    /// Rejects dry runs as bad requests with this message.
    pub(in crate::operator) fn answer_rehearsals(&self, message: &'static str) {
        self.0.lock().unwrap().rehearsals = Some(message);
    }

    /// Returns the paths of all objects.
    pub(in crate::operator) fn paths(&self) -> Vec<String> {
        self.0.lock().unwrap().objects.keys().cloned().collect()
    }

    /// Drops the history that only watches need. A test of a week without watches would need much memory for it.
    pub(in crate::operator) fn drop_changes(&self) {
        let mut state = self.0.lock().unwrap();
        (state.changes.events, state.changes.told) = (Vec::new(), 0);
    }

    /// Returns the requests since the last call.
    pub(in crate::operator) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().requests)
    }

    /// Returns the write requests since the last call.
    pub(in crate::operator) fn writes(&self) -> Vec<String> {
        self.requests().into_iter().filter(|request| !request.starts_with("GET")).collect()
    }

    /// Fills a store, and the component that follows it, with every object of a kind.
    pub(in crate::operator) fn fill<K>(&self, writer: &mut Writer<K>, plural: &str, follow: impl Fn(&Event<K>))
    where
        K: kube::Resource<DynamicType = ()> + DeserializeOwned + Clone,
    {
        let state = self.0.lock().unwrap();
        let objects = state.objects.iter().filter(|(path, _)| path.contains(&format!("/{plural}/")));
        let objects = objects.map(|(_, object)| Event::InitApply(serde_json::from_value(object.clone()).unwrap()));
        for event in [Event::Init].into_iter().chain(objects).chain([Event::InitDone]) {
            writer.apply_watcher_event(&event);
            follow(&event);
        }
    }

    pub(in crate::operator) async fn answer(&self, request: Request<kube::client::Body>) -> Response<Body> {
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
        let query: BTreeMap<_, _> =
            head.uri.query().unwrap_or_default().split('&').filter_map(|one| one.split_once('=')).collect();
        if query.contains_key("watch") {
            let (from, lasts) = (query["resourceVersion"].parse().unwrap(), query["timeoutSeconds"].parse().unwrap());
            drop(state);
            return self.watch(&path, from, Duration::from_secs(lasts));
        }
        if query.contains_key("limit") && head.method == Method::GET {
            return reply(StatusCode::OK, &state.list(&path));
        }
        if query.get("dryRun") == Some(&"All") {
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

    /// Streams the changes of a collection after a version, until the timeout or until all connections are cut.
    fn watch(&self, path: &str, from: u64, lasts: Duration) -> Response<Body> {
        struct Watch {
            cluster: Cluster,
            next: usize,
            cuts: u64,
            ends: Instant,
            over: bool,
        }
        let (plural, cluster) = (format!("/{}/", path.rsplit('/').next().unwrap()), self.clone());
        let watch = {
            let state = self.0.lock().unwrap();
            if from < state.changes.compacted {
                let gone = refusal(StatusCode::GONE, "too old resource version");
                // API servers report this inside the watch. Some proxies in front of them do not.
                if state.changes.cuts % 4 == 3 {
                    return gone;
                }
                let body = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410 });
                return reply(StatusCode::OK, &json!({ "type": "ERROR", "object": body }));
            }
            let next = state.changes.events.partition_point(|event| event.version <= from);
            let cuts = state.changes.cuts;
            Watch { cluster, next, cuts, ends: Instant::now() + lasts, over: false }
        };
        let line = |kind: &str, object: &Value| {
            let line = format!("{}\n", json!({ "type": kind, "object": object }));
            Ok(Frame::data(Bytes::from(line)))
        };
        let frames = stream::unfold((watch, plural), move |(mut watch, plural)| async move {
            loop {
                let news = {
                    let state = watch.cluster.0.lock().unwrap();
                    let changes = &state.changes;
                    if watch.over {
                        return None;
                    }
                    if watch.cuts != changes.cuts {
                        watch.over = true;
                        let cut = Err(io::Error::from(io::ErrorKind::ConnectionReset));
                        drop(state);
                        return Some((cut, (watch, plural)));
                    }
                    let found = (watch.next..changes.told).find(|at| changes.events[*at].path.contains(&plural));
                    if let Some(at) = found {
                        let frame = line(changes.events[at].kind, &changes.events[at].object);
                        watch.next = at + 1;
                        drop(state);
                        return Some((frame, (watch, plural)));
                    }
                    watch.next = watch.next.max(changes.told);
                    if Instant::now() >= watch.ends {
                        watch.over = true;
                        let version = changes.version().to_string();
                        drop(state);
                        let mark = json!({ "kind": "Bookmark", "apiVersion": "v1", "metadata": { "resourceVersion": version } });
                        return Some((line("BOOKMARK", &mark), (watch, plural)));
                    }
                    // Created under the lock, so that no change can be missed.
                    changes.news.clone().notified_owned()
                };
                let _ = tokio::time::timeout_at(watch.ends, news).await;
            }
        });
        Response::new(StreamBody::new(frames).boxed_unsync())
    }
}

type Answer = Result<Value, (StatusCode, &'static str)>;

impl State {
    /// Returns the objects of a kind in all namespaces, as far as they are shown.
    fn list(&self, path: &str) -> Value {
        let plural = format!("/{}/", path.rsplit('/').next().unwrap());
        let items: Vec<_> =
            self.changes.shown.iter().filter(|(path, _)| path.contains(&plural)).map(|(_, object)| object).collect();
        let version = self.changes.version().to_string();
        json!({ "kind": "List", "apiVersion": "v1", "metadata": { "resourceVersion": version }, "items": items })
    }

    fn keep(&mut self, path: &str, object: Value) {
        let old = self.objects.insert(path.to_owned(), object.clone());
        let kind = if old.is_some() { "MODIFIED" } else { "ADDED" };
        self.changes.push(self.version, kind, path, &object);
    }

    fn remove(&mut self, path: &str) -> Option<Value> {
        let mut object = self.objects.remove(path)?;
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.changes.push(self.version, "DELETED", path, &object);
        Some(object)
    }

    fn stamp(&mut self, path: &str, object: &mut Value) {
        self.version += 1;
        let version = self.version;
        let metadata = object["metadata"].as_object_mut().unwrap();
        metadata.insert("resourceVersion".into(), json!(version.to_string()));
        metadata.entry("uid").or_insert_with(|| json!(format!("uid-{version}")));
        // Whole seconds, as an API server writes them.
        let now = Timestamp::from_second(self.now.unwrap_or_else(Timestamp::now).as_second()).unwrap();
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
                let finalizers = object["metadata"]["finalizers"].as_array().is_none_or(Vec::is_empty);
                if finalizers && !object["metadata"]["deletionTimestamp"].is_null() {
                    self.remove(path);
                    return Ok(object);
                }
                self.store(path.to_owned(), object)
            }
            Method::DELETE => {
                let live = self.objects.get(path).ok_or(missing)?;
                if live["metadata"]["uid"] != body["preconditions"]["uid"] {
                    return Err(conflict);
                }
                self.remove(path).ok_or(missing)
            }
            _ => Err((StatusCode::METHOD_NOT_ALLOWED, "not here")),
        }
    }

    fn store(&mut self, path: String, mut object: Value) -> Answer {
        self.stamp(&path, &mut object);
        self.keep(&path, object.clone());
        Ok(object)
    }
}

pub(in crate::operator) fn refusal(status: StatusCode, message: &str) -> Response<Body> {
    let reason = if status == StatusCode::NOT_FOUND { "NotFound" } else { message };
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason, "code": status.as_u16(),
    });
    reply(status, &body)
}

pub(in crate::operator) fn reply(status: StatusCode, body: &Value) -> Response<Body> {
    let body = Full::new(Bytes::from(body.to_string())).map_err(|never| match never {});
    Response::builder().status(status).body(body.boxed_unsync()).unwrap()
}

/// Creates a store and its writer.
pub(in crate::operator) fn store<K>() -> (Store<K>, Writer<K>)
where
    K: kube::Resource<DynamicType = ()> + Clone + 'static,
{
    reflector::store()
}

/// Applies a JSON merge patch (RFC 7396).
pub(in crate::operator) fn merge(object: &mut Value, patch: Value) {
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
