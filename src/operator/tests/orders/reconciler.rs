//! The same simulation with the operator's own controller, caches, watches, clock and pauses, in virtual time. Only the Lease is left out.
//! The operator's requests are rejected, cut, answered late, or executed without an answer. The API server is killed or hangs, drops its
//! history, and shows old state.
//!
//! The jitter comes from the standard library, so a seed reproduces the events of an order, but not their exact timing.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::stream;
use http::{Method, Request, Response, StatusCode};
use kube::Client;
use prometheus::Registry;
use serde_json::{Value, json};
use tokio::{runtime, sync::watch, task::JoinHandle, time::sleep};
use tower::Layer;

use super::{HORIZON, Random, SimPod, Told, WALL, World, judge, orders, time};
use crate::{
    contact::{Contact, Listening},
    ends::FailureClass,
    operator::{
        BLIND,
        api::Writer,
        cache::{self, Stores},
        control,
        expectations::Expectations,
        metrics::Metrics,
        reconcile::Context,
        tests::{
            CONTRACT, PACK, POLICIES, TASK,
            cluster::{self, Cluster},
        },
    },
    render::{fixtures, names},
    seal::{self, Seal, SealError},
    wire::{SealReply, SealRequest},
};

const PODS: &str = "/api/v1/namespaces/team-a/pods";
const TASKS: &str = "/apis/belay.dev/v1alpha1/namespaces/team-a/agenttasks";

/// The effect of an outage on requests.
#[derive(Clone, Copy, PartialEq)]
enum Away {
    /// The API server accepts no connection, and existing connections end.
    Killed,
    /// The API server accepts requests and answers them after the outage.
    Stands,
}

struct Sim {
    world: World,
    told: Told,
    away: Away,
    /// Random numbers of its own, so that the simulation does not depend on requests.
    chance: Random,
    /// An attempt whose pod was requested although the attempt had had one, or although the agent of another attempt ran.
    twice: Option<i64>,
    /// An attempt whose NetworkPolicy was deleted while its agent ran or could still run.
    open: Option<i64>,
    /// Whether the operator treats presumed ends as known ends.
    believes: bool,
    /// The planned pods. The reported status is added to them.
    planned: BTreeMap<String, Value>,
}

#[derive(Clone)]
struct Server {
    sim: Arc<Mutex<Sim>>,
    cluster: Cluster,
    /// Sends the time each second.
    tick: watch::Sender<i64>,
}

/// The outcome of a request.
enum Fate {
    Answered,
    Refused,
    /// The request is executed, and the client gets no answer.
    Unheard,
}

impl Server {
    fn new(seed: u64) -> Self {
        let (mut world, mut chance) = (World::new(seed), Random(!seed));
        // In the simulation, periods of blindness affect caches. Here they affect what the API server shows.
        let away = if chance.percent(50) { Away::Killed } else { Away::Stands };
        let retry = json!({ "agent": i64::from(world.random.percent(30)), "infrastructure": world.random.range(0, 2) });
        let cluster = Cluster::default();
        cluster.set_time(time(0));
        let mut task = serde_json::to_value(fixtures::task()).unwrap();
        task.as_object_mut().unwrap().remove("status");
        task["spec"]["limits"]["wallTimeSeconds"] = json!(WALL);
        task["spec"]["rollback"] = json!("OnFailure");
        task["spec"]["retry"] = retry;
        cluster.put(TASK, task);
        let mut pack = serde_json::to_value(fixtures::pack()).unwrap();
        pack["spec"]["state"] = json!({ "bucket": "state" });
        cluster.put(PACK, pack);
        for contract in fixtures::contracts() {
            let path = CONTRACT.replace("tickets", contract.metadata.name.as_deref().unwrap());
            let mut contract = serde_json::to_value(contract).unwrap();
            if path == CONTRACT {
                contract["spec"]["rollback"] =
                    json!({ "call": { "contract": "close", "arguments": { "id": "result.id" } } });
            }
            cluster.put(&path, contract);
        }
        cluster.put(
            "/api/v1/namespaces/team-a",
            json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "team-a", "labels": { "belay.dev/environment": "dev" } } }),
        );
        let sim = Sim {
            world,
            told: Told::default(),
            away,
            chance,
            twice: None,
            open: None,
            believes: false,
            planned: BTreeMap::new(),
        };
        Self { sim: Arc::new(Mutex::new(sim)), cluster, tick: watch::channel(0).0 }
    }

    fn client(&self, contact: Arc<Contact>) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let server = server.clone();
            async move { server.take(request).await }
        });
        Client::new(Listening(contact).layer(service), "default")
    }

    /// Handles a request. An API server that hangs executes a request after the outage, even if no client waits any more.
    async fn take(&self, request: Request<kube::client::Body>) -> io::Result<Response<cluster::Body>> {
        let reset = || Err(io::Error::from(io::ErrorKind::ConnectionReset));
        let (away, how) = {
            let sim = self.sim.lock().unwrap();
            (sim.world.away(), sim.away)
        };
        match (away, how) {
            (true, Away::Killed) => return reset(),
            (true, Away::Stands) => {
                let server = self.clone();
                let done = tokio::spawn(async move {
                    let mut tick = server.tick.subscribe();
                    while server.sim.lock().unwrap().world.away() {
                        let _ = tick.changed().await;
                    }
                    server.answer(request).await
                });
                return done.await.unwrap_or_else(|_| reset());
            }
            (false, _) => {}
        }
        let watched = request.uri().query().is_some_and(|query| query.contains("watch="));
        let fate = {
            let mut sim = self.sim.lock().unwrap();
            match if sim.world.calm || watched { 100 } else { sim.chance.range(0, 99) } {
                0..=2 => Fate::Refused,
                3..=5 => Fate::Unheard,
                _ => Fate::Answered,
            }
        };
        match fate {
            Fate::Refused => Ok(cluster::refusal(StatusCode::INTERNAL_SERVER_ERROR, "etcdserver: request timed out")),
            Fate::Unheard => self.answer(request).await.and_then(|_| reset()),
            Fate::Answered => self.answer(request).await,
        }
    }

    async fn answer(&self, request: Request<kube::client::Body>) -> io::Result<Response<cluster::Body>> {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let dry = request.uri().query().is_some_and(|query| query.contains("dryRun"));
        if method == Method::DELETE
            && let Some(number) = path.strip_prefix(POLICIES).and_then(|name| name.strip_prefix("/triage-"))
        {
            let (mut sim, number) = (self.sim.lock().unwrap(), number.parse().unwrap());
            if sim.world.pods.iter().any(|pod| pod.number == number && pod.truth.is_none()) {
                sim.open = Some(number);
            }
        }
        let mut answer = match (&method, path.strip_prefix(PODS)) {
            (&Method::POST, Some("")) if !dry => self.make(request).await,
            (&Method::DELETE, Some(name)) => self.end(name.trim_start_matches('/'), &path),
            // The rollback task is not run here.
            (&Method::POST, None) if path == TASKS => {
                self.sim.lock().unwrap().told.rolled_back = true;
                let body = http_body_util::BodyExt::collect(request.into_body()).await.unwrap().to_bytes();
                cluster::reply(StatusCode::CREATED, &serde_json::from_slice(&body).unwrap())
            }
            (&Method::PATCH, None) if path.ends_with("/status") && self.sim.lock().unwrap().believes => {
                self.cluster.answer(certain(request).await).await
            }
            _ => self.cluster.answer(request).await,
        };
        let now = time(self.sim.lock().unwrap().world.now);
        let date = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&now).unwrap();
        answer.headers_mut().insert(http::header::DATE, date.parse().unwrap());
        Ok(answer)
    }

    /// Creates a pod, and adds it to the simulation.
    async fn make(&self, request: Request<kube::client::Body>) -> Response<cluster::Body> {
        let body = http_body_util::BodyExt::collect(request.into_body()).await.unwrap().to_bytes();
        let planned: Value = serde_json::from_slice(&body).unwrap();
        let number = planned["metadata"]["labels"][names::ATTEMPT].as_str().unwrap().parse().unwrap();
        let path = format!("{PODS}/{}", planned["metadata"]["name"].as_str().unwrap());
        if self.cluster.get(&path).is_some() {
            return cluster::refusal(StatusCode::CONFLICT, "AlreadyExists");
        }
        let object = {
            let mut sim = self.sim.lock().unwrap();
            if sim.world.pods.iter().any(|pod| pod.number == number || pod.truth.is_none()) {
                sim.twice = Some(number);
                return cluster::refusal(StatusCode::IM_A_TEAPOT, "a second pod");
            }
            sim.world.make(number);
            sim.planned.insert(path.clone(), planned);
            let pod = sim.world.pods.last().unwrap();
            shown(&sim.planned[&path], pod)
        };
        self.cluster.put(&path, object);
        cluster::reply(StatusCode::CREATED, &self.cluster.get(&path).unwrap())
    }

    /// Deletes a pod.
    fn end(&self, name: &str, path: &str) -> Response<cluster::Body> {
        let Some(object) = self.cluster.get(path) else {
            return cluster::refusal(StatusCode::NOT_FOUND, "not found");
        };
        let task = self.cluster.get(TASK).unwrap_or_default();
        let uid = object["metadata"]["uid"].as_str().unwrap();
        let mut sim = self.sim.lock().unwrap();
        let over = sim.world.pods.iter().find(|pod| pod.uid == uid).is_some_and(|pod| pod.view().terminal);
        let recorded = task["status"]["attempts"].as_array().is_some_and(|all| {
            all.iter().any(|one| one["podUid"] == uid && one["pod"] == name && !one["finishedAt"].is_null())
        });
        if over && !recorded && task["metadata"]["deletionTimestamp"].is_null() {
            sim.told.early += 1;
        }
        sim.world.delete(uid);
        drop(sim);
        self.show();
        cluster::reply(StatusCode::OK, &object)
    }

    /// Shows what the kubelets have reported by now.
    fn show(&self) {
        let sim = self.sim.lock().unwrap();
        for pod in &sim.world.pods {
            let path = format!("{PODS}/triage-{}", pod.number);
            match self.cluster.get(&path) {
                Some(_) if pod.gone => self.cluster.remove(&path),
                Some(before) => {
                    let mut after = shown(&sim.planned[&path], pod);
                    after["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"].clone();
                    if after != before {
                        self.cluster.put(&path, after);
                    }
                }
                None => {}
            }
        }
    }

    /// Advances the simulation by one second.
    fn pass(&self) {
        let (was_away, away, now) = {
            let mut sim = self.sim.lock().unwrap();
            let was_away = sim.world.away();
            sim.world.tick();
            if let Some(at) = sim.world.deleted_at.filter(|at| sim.world.now >= *at && !sim.world.away()) {
                let gone = self.cluster.get(TASK).is_none_or(|task| !task["metadata"]["deletionTimestamp"].is_null());
                if !gone {
                    let held =
                        |task: &Value| task["metadata"]["finalizers"].as_array().is_some_and(|all| !all.is_empty());
                    if held(&self.cluster.get(TASK).unwrap()) {
                        self.cluster
                            .edit(TASK, |task| task["metadata"]["deletionTimestamp"] = json!(time(at).to_string()));
                    } else {
                        self.cluster.remove(TASK);
                    }
                }
            }
            (was_away, sim.world.away(), sim.world.now)
        };
        self.cluster.set_time(time(now));
        {
            let mut sim = self.sim.lock().unwrap();
            if away && !was_away && sim.away == Away::Killed {
                self.cluster.cut();
            }
            if was_away && !away && sim.chance.percent(30) {
                self.cluster.compact();
                self.cluster.cut();
            }
        }
        self.show();
        self.cluster.hold(self.sim.lock().unwrap().world.blind());
        self.tick.send_replace(now);
    }

    fn task_phase(&self) -> Option<String> {
        Some(self.cluster.get(TASK)?["status"]["phase"].as_str().unwrap_or_default().to_owned())
    }
}

/// Removes the marks of presumed ends from a status.
async fn certain(request: Request<kube::client::Body>) -> Request<kube::client::Body> {
    let (head, body) = request.into_parts();
    let body = http_body_util::BodyExt::collect(body).await.unwrap().to_bytes();
    let mut body: Value = serde_json::from_slice(&body).unwrap();
    for attempt in body["status"]["attempts"].as_array_mut().into_iter().flatten() {
        attempt.as_object_mut().unwrap().remove("presumed");
    }
    Request::from_parts(head, serde_json::to_vec(&body).unwrap().into())
}

/// Returns a planned pod with the status that its kubelet has reported.
fn shown(planned: &Value, pod: &SimPod) -> Value {
    let mut object = planned.clone();
    for field in ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        if !pod.shown["metadata"][field].is_null() {
            object["metadata"][field] = pod.shown["metadata"][field].clone();
        }
    }
    object["status"] = pod.shown["status"].clone();
    object
}

/// The gateway. It is unavailable together with the API server, and keeps the first end that a log was sealed with.
struct Witness(Server);

impl Seal for Witness {
    fn seal<'a>(&'a self, request: &'a SealRequest) -> futures::future::BoxFuture<'a, Result<SealReply, SealError>> {
        Box::pin(async move {
            let unreachable = || SealError::Unreachable { address: "gateway".into(), cause: "connection reset".into() };
            let mut sim = self.0.sim.lock().unwrap();
            if sim.world.away() {
                return Err(unreachable());
            }
            let fate = if sim.world.calm { 100 } else { sim.chance.range(0, 99) };
            if fate < 5 {
                return Err(unreachable());
            }
            let sealed = super::seal(&sim.world, request.attempt, request.closed.clone(), request.presumed);
            let sealed = sim.told.sealed.get_or_insert(sealed).clone();
            if fate < 10 {
                return Err(unreachable());
            }
            let compensation_commitment = sealed.has_failed().then(|| ["close".to_owned()].into());
            Ok(SealReply { closed: Some(sealed), compensation_commitment, ..seal::tests::reply() })
        })
    }
}

/// The operator as the leader runs it.
struct Operator {
    contact: Arc<Contact>,
    running: JoinHandle<()>,
}

impl Operator {
    fn begin(server: &Server, believes_caches: bool) -> Self {
        let contact = Arc::new(Contact::default());
        let client = server.client(contact.clone());
        let memories = Arc::new(Expectations::default());
        let metrics = Metrics::new(&Registry::new()).unwrap();
        let (stores, streams) = cache::watch(&client, memories.clone(), &metrics);
        let context = Context {
            stores: stores.clone(),
            memories,
            writer: Writer::new(client, metrics.clone()),
            gateway: Arc::new(Witness(server.clone())),
            surroundings: watch::channel(Some(fixtures::surroundings())).1,
            contact: contact.clone(),
            metrics,
            system_namespace: "belay-system".into(),
            s3_endpoint: None,
            believes_caches,
        };
        let running = tokio::spawn(lead(stores, streams, Arc::new(context)));
        Self { contact, running }
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.running.abort();
    }
}

async fn lead(stores: Stores, streams: cache::Streams, context: Arc<Context>) {
    let (filled, is_filled) = watch::channel(false);
    let fill = async {
        stores.ready().await.unwrap();
        filled.send_replace(true);
    };
    let never = std::future::pending();
    tokio::join!(control(streams, stream::pending(), context, is_filled, never), fill);
}

/// Runs one order of events to its end.
async fn order(server: &Server, believes_caches: bool) {
    server.sim.lock().unwrap().believes = believes_caches;
    let mut operator = Operator::begin(server, believes_caches);
    loop {
        sleep(Duration::from_secs(1)).await;
        server.pass();
        let (now, restarts) = {
            let sim = server.sim.lock().unwrap();
            (sim.world.now, sim.world.restarts())
        };
        let over = server.task_phase().is_none_or(|phase| matches!(phase.as_str(), "Succeeded" | "Failed"));
        server.sim.lock().unwrap().told.seconds = now;
        if over || now >= HORIZON {
            return;
        }
        // An operator that is killed at any moment, or one whose watches are old and that lets another replica lead.
        if restarts || !believes_caches && operator.contact.fresh(BLIND).is_err() {
            operator = Operator::begin(server, believes_caches);
        }
    }
}

/// Runs an order and checks its result.
fn run(server: &Server, believes_caches: bool) -> Result<(), String> {
    let virtually = runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    virtually.block_on(order(server, believes_caches));
    drop(virtually);
    let sim = server.sim.lock().unwrap();
    if let Some(number) = sim.open {
        return Err(format!("the wall of attempt {number} was taken down while its agent ran, or could"));
    }
    match sim.twice {
        Some(number) => Err(format!("attempt {number} was given a second pod, or one beside another's agent")),
        None => judge(&sim.world, &sim.told).and_then(|()| agrees(&server.cluster, &sim.told)),
    }
}

/// Checks whether the task's status matches the end that its log was sealed with.
fn agrees(cluster: &Cluster, told: &Told) -> Result<(), String> {
    let Some(task) = cluster.get(TASK) else { return Ok(()) };
    let (status, sealed) = (&task["status"], told.sealed.as_ref().ok_or("it has ended, and its log was not sealed")?);
    let phase = status["phase"].as_str().unwrap_or_default();
    let class = status["failureClass"].as_str().unwrap_or_default();
    if phase == sealed.phase && class == sealed.failure_class {
        return Ok(());
    }
    Err(format!("the task says {phase} {class}, its log {} {}", sealed.phase, sealed.failure_class))
}

#[test]
fn no_order_makes_the_reconciler_guess() {
    let orders = orders(150);
    let next = std::sync::atomic::AtomicU64::new(0);
    let ends = Mutex::new(BTreeMap::<String, u64>::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if seed >= orders {
                        return;
                    }
                    let server = Server::new(seed);
                    let verdict = run(&server, false);
                    let sim = server.sim.lock().unwrap();
                    if let Err(wrong) = verdict {
                        let task = server.cluster.get(TASK);
                        panic!(
                            "order {seed}: {wrong}\n{:?}\n{:#?}\noutages {:?}\n{:#?}",
                            sim.told,
                            sim.world.pods,
                            sim.world.outages,
                            task.map(|task| task["status"].clone())
                        );
                    }
                    if let Some(closed) = &sim.told.sealed {
                        let end = format!("{} {}", closed.failure_class, closed.reason);
                        *ends.lock().unwrap().entry(end).or_default() += 1;
                    }
                }
            });
        }
    });
    let ends = ends.into_inner().unwrap();
    let unknown: u64 =
        ends.iter().filter(|(end, _)| end.starts_with(FailureClass::Unknown.name())).map(|(_, count)| count).sum();
    // The operator must not reach this by reporting `Unknown` too often.
    assert!(unknown * 20 < orders, "{ends:?}");
    for end in [" AgentSucceeded", "Budget DeadlineExceeded", "Agent NonZeroExit"] {
        assert!(ends.get(end).is_some_and(|count| count * 100 > orders), "{end}: {ends:?}");
    }
}

/// The control: the API server is unavailable for some seconds, and shows old state for minutes. An operator that trusts caches reports
/// wrong ends, and one that reads does not.
#[test]
fn a_reconciler_that_believes_caches_guesses() {
    let short = |seed, believes_caches| {
        let server = Server::new(seed);
        let mut sim = server.sim.lock().unwrap();
        let world = &mut sim.world;
        (world.outages, world.blind) = (vec![(20, 30)], vec![(20, 300)]);
        (world.restarts, world.deleted_at) = (vec![], None);
        drop(sim);
        run(&server, believes_caches)
    };
    let guesses = |seed| short(seed, true).is_err_and(|wrong| wrong.contains("was Some(Ended { code: 0 })"));
    assert!((0..40).any(guesses), "40 orders, and who believes caches is right in each: the world is too kind");
    for seed in 0..40 {
        assert_eq!(short(seed, false), Ok(()), "order {seed}");
    }
}

/// This holds for every duration and kind of outage.
#[test]
fn a_task_made_when_the_api_server_is_back_has_its_pod_within_30_seconds() {
    for seed in 0..40 {
        let server = Server::new(seed);
        let task = {
            let mut sim = server.sim.lock().unwrap();
            let (from, lasts) = (sim.chance.range(1, 60), sim.chance.range(2, 900));
            sim.world.outages = vec![(from, from + lasts)];
            (sim.world.blind, sim.world.restarts, sim.world.deleted_at) = (vec![], vec![], None);
            sim.world.calm = true;
            let task = server.cluster.get(TASK).unwrap();
            server.cluster.remove(TASK);
            task
        };
        let virtually = runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        virtually.block_on(async {
            let mut operator = Operator::begin(&server, false);
            let back = server.sim.lock().unwrap().world.outages[0].1;
            for second in 1..=back + 30 {
                sleep(Duration::from_secs(1)).await;
                server.pass();
                if second == back {
                    server.cluster.put(TASK, task.clone());
                }
                if operator.contact.fresh(BLIND).is_err() {
                    operator = Operator::begin(&server, false);
                }
            }
        });
        let sim = server.sim.lock().unwrap();
        assert!(!sim.world.pods.is_empty(), "order {seed}: no pod 30 s after {:?}", sim.world.outages);
    }
}
