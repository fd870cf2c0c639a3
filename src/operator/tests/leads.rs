//! When a replica leads, and when it lets another one lead: with the Lease, the controller and the watches of the real operator.

use std::{
    convert::Infallible,
    io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use kube::Client;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tower::Layer;

use super::cluster::{self, Cluster};
use crate::{
    contact::{Contact, Listening},
    operator::{LEASE, OperatorError, Replica, Role, Settings, cache, expectations, metrics, serve},
    seal,
};

const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/belay-system/leases";
const PODS: &str = "/api/v1/pods";

/// An API server with a Lease. It may reject watches of pods although it lists them.
#[derive(Clone, Default)]
struct Server {
    cluster: Cluster,
    deaf: Arc<AtomicBool>,
    /// Whether writes of the Lease fail.
    stuck: Arc<AtomicBool>,
}

impl Server {
    fn lease() -> String {
        format!("{LEASES}/{LEASE}")
    }

    /// Returns the identity that holds the Lease.
    fn holder(&self) -> Option<String> {
        let lease = self.cluster.get(&Self::lease())?;
        lease["spec"]["holderIdentity"].as_str().map(str::to_owned)
    }

    /// Gives the Lease to this replica, for a while.
    fn give_lease(&self, identity: &str, seconds: u32) {
        let now = format!("{:.6}", Timestamp::now());
        let spec = json!({ "holderIdentity": identity, "acquireTime": now, "renewTime": now, "leaseDurationSeconds": seconds });
        let metadata = json!({ "name": LEASE, "namespace": "belay-system" });
        let lease =
            json!({ "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec });
        self.cluster.put(&Self::lease(), lease);
    }

    async fn answer(&self, request: Request<kube::client::Body>) -> Response<cluster::Body> {
        let path = request.uri().path().to_owned();
        let watches = request.uri().query().is_some_and(|query| query.contains("watch="));
        if path == PODS && watches && self.deaf.load(Ordering::Relaxed) {
            return cluster::refusal(StatusCode::FORBIDDEN, "Forbidden");
        }
        if path != Self::lease() || request.method() != Method::PATCH {
            return self.cluster.answer(request).await;
        }
        if self.stuck.load(Ordering::Relaxed) {
            return cluster::refusal(StatusCode::INTERNAL_SERVER_ERROR, "InternalError");
        }
        // The Lease is patched without a version, and a field that is null is removed.
        let patch: Value = serde_json::from_slice(&request.into_body().collect().await.unwrap().to_bytes()).unwrap();
        self.cluster.edit(&path, |lease| cluster::merge(lease, patch));
        cluster::reply(StatusCode::OK, &self.cluster.get(&path).unwrap())
    }

    fn client(&self, contact: Arc<Contact>) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let server = server.clone();
            async move { Ok::<_, Infallible>(server.answer(request).await) }
        });
        Client::new(Listening(contact).layer(service), "default")
    }

    /// Serves it on loopback, and returns its address.
    async fn listen(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = self.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let server = server.clone();
                let answer = service_fn(move |request: Request<Incoming>| {
                    let server = server.clone();
                    async move {
                        let (head, body) = request.into_parts();
                        let body = body.collect().await.unwrap().to_bytes().to_vec();
                        let answered = server.answer(Request::from_parts(head, body.into())).await;
                        Ok::<_, io::Error>(answered)
                    }
                });
                tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer));
            }
        });
        format!("http://{address}")
    }
}

fn settings(token: &tempfile::NamedTempFile) -> Settings {
    Settings {
        system_namespace: "belay-system".into(),
        gateway: Some("127.0.0.1:1".into()),
        image: "belay".into(),
        admin_listen: "127.0.0.1:0".parse().unwrap(),
        token: token.path().into(),
        harness_cpu: "50m".into(),
        harness_memory: "64Mi".into(),
        identity: "replica-a".into(),
        s3_endpoint: None,
        webhook: None,
    }
}

/// A replica that waits for the Lease, or leads, in virtual time.
struct Term {
    server: Server,
    contact: Arc<Contact>,
    metrics: metrics::Metrics,
    running: JoinHandle<Result<(), OperatorError>>,
    _token: tempfile::NamedTempFile,
}

impl Term {
    async fn begin(server: Server) -> Self {
        let token = seal::tests::token();
        let contact = Arc::new(Contact::default());
        let client = server.client(contact.clone());
        let (registry, metrics) = metrics::registry(&contact).unwrap();
        let memories = Arc::new(expectations::Expectations::default());
        let (stores, streams) = cache::watch(&client, memories.clone(), &metrics);
        let replica = Replica {
            settings: settings(&token),
            client,
            cluster_url: "https://10.200.0.10:6443".parse().unwrap(),
            registry,
            metrics: metrics.clone(),
            memories,
            stores,
            role: tokio::sync::watch::channel(Role::Standby).0,
            contact: contact.clone(),
        };
        let running = tokio::spawn(async move { replica.term(streams, pin!(std::future::pending())).await });
        let term = Self { server, contact, metrics, running, _token: token };
        term.sleep(5).await;
        assert_eq!(term.server.holder().as_deref(), Some("replica-a"));
        assert!(term.leads());
        term
    }

    async fn sleep(&self, seconds: u64) {
        sleep(Duration::from_secs(seconds)).await;
    }

    fn leads(&self) -> bool {
        !self.running.is_finished() && self.metrics.leader.get() == 1
    }

    /// Returns the age of the watch of pods, in seconds.
    fn age(&self) -> u64 {
        let ages = self.contact.ages();
        ages.iter().find(|(kind, _)| kind == "pods").map(|(_, age)| age.as_secs()).unwrap()
    }

    /// Waits until the watch of pods has this age.
    async fn until(&self, age: u64) {
        while self.age() < age {
            assert!(self.leads(), "it gave up at {} s", self.age());
            self.sleep(1).await;
        }
    }
}

impl Drop for Term {
    fn drop(&mut self) {
        self.running.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_gives_up_once_a_watch_is_60_seconds_old_and_not_before() {
    let mut term = Term::begin(Server::default()).await;
    // The control: each watch brings a bookmark at least, and the leader leads on.
    for _ in 0..300 {
        term.sleep(1).await;
        assert!(term.leads() && term.age() <= 21, "{}", term.age());
    }
    // Watches of pods end, and are rejected for less than a minute. Everything else is answered, the Lease included.
    term.server.deaf.store(true, Ordering::Relaxed);
    term.until(50).await;
    term.server.deaf.store(false, Ordering::Relaxed);
    term.sleep(10).await;
    assert!(term.leads() && term.age() <= 21, "{}", term.age());

    term.server.deaf.store(true, Ordering::Relaxed);
    term.until(59).await;
    let late = Instant::now();
    let ended = timeout(Duration::from_secs(60), &mut term.running).await.expect("it leads on").unwrap();
    assert!(late.elapsed() <= Duration::from_secs(4), "{:?}", late.elapsed());
    let Err(OperatorError::Blind(why)) = ended else { panic!("{ended:?}") };
    assert!(why.contains("pods"), "it says of what it has no news: {why}");
    assert_eq!(term.server.holder(), None, "another replica need not wait until the Lease expires");
}

/// A watch that never began brings as little news as one that ended.
#[tokio::test(start_paused = true)]
async fn a_leader_whose_watch_never_begins_gives_up_as_well() {
    let server = Server::default();
    server.deaf.store(true, Ordering::Relaxed);
    let mut term = Term::begin(server).await;
    let ended = timeout(Duration::from_secs(180), &mut term.running).await.expect("it leads on").unwrap();
    assert!(matches!(ended, Err(OperatorError::Blind(_))), "{ended:?}");
}

/// A Lease that cannot be renewed counts for 13 s of its 15 s, so no other replica can lead meanwhile.
#[tokio::test(start_paused = true)]
async fn a_leader_that_cannot_renew_its_lease_stops_before_another_can_lead() {
    let mut term = Term::begin(Server::default()).await;
    term.sleep(60).await;
    assert!(term.leads());
    term.server.stuck.store(true, Ordering::Relaxed);
    let renewed = term.contact.lease().unwrap();
    let ended = timeout(Duration::from_secs(60), &mut term.running).await.expect("it leads on").unwrap();
    assert!(matches!(ended, Err(OperatorError::LeaseLost)), "{ended:?}");
    let after = renewed.elapsed();
    assert!((Duration::from_secs(13)..Duration::from_secs(15)).contains(&after), "{after:?} after the last renewal");
}

/// Reads one metric of a process without labels, as Prometheus does.
async fn scraped(address: &str, name: &str) -> Option<f64> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let asked = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(asked.as_bytes()).await.ok()?;
    let mut said = String::new();
    stream.read_to_string(&mut said).await.ok()?;
    let line = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    line.trim().parse().ok()
}

/// The process as a whole, over HTTP, in real time: its metric says 1 as long as it holds the Lease, and 0 before and after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_metric_of_the_leader_follows_the_lease() {
    let server = Server::default();
    server.give_lease("replica-b", 3);
    let url = server.listen().await;
    let token = seal::tests::token();
    let admin = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let settings = Settings { admin_listen: admin, ..settings(&token) };
    let running = tokio::spawn(serve(kube::Config::new(url.parse().unwrap()), settings, std::future::pending()));
    let admin = admin.to_string();
    let mut said = Vec::new();
    let mut follow = async |until: &str| {
        for _ in 0..400 {
            let holder = server.holder().unwrap_or_default();
            if let Some(leader) = scraped(&admin, "belay_operator_leader").await {
                // The holder may change while the metrics are read.
                if server.holder().unwrap_or_default() == holder && said.last() != Some(&(holder.clone(), leader)) {
                    said.push((holder, leader));
                }
            }
            if said.last().is_some_and(|(holder, leader)| format!("{holder} {leader}") == until) {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
        panic!("never {until}: {said:?}");
    };
    follow("replica-b 0").await;
    follow("replica-a 1").await;
    server.give_lease("replica-b", 3);
    follow("replica-b 0").await;
    running.abort();
    assert_eq!(said.first(), Some(&("replica-b".to_owned(), 0.0)), "{said:?}");
}
