//! The gateway's own log, authorization, dialing and forwarding, over TLS, without authentication of the caller. Names are fixed, and lead
//! to servers on loopback.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{any, post},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use belay::{
    api::{
        AgentTask, ApprovalRequest,
        policy_pack::{EvidencePolicy, RetentionMode},
    },
    evidence::{
        note,
        record::{Channel, Record},
        rollback::{Plan, Planner, Undoing},
        segment::Segment,
        state::Snapshot,
    },
    gateway::{
        approvals::{self, Create},
        authorize::{self, Destination, Target},
        body::{Carried, full},
        cluster::{Cluster, Fetch, Stores},
        compiled::Compiled,
        dial::{Connect, Dialer, roots},
        forward,
        identity::{HarnessIdentity, Standing},
        pool::Pool,
        redirect,
        refusal::Refused,
        resolve::Resolve,
        tunnel,
        witness::{History, IntentFacts},
    },
    lenient::Lenient,
    policy::{
        approval::{Answer, CallKey, Vote},
        commit::Salt,
        config::{PolicyConfig, TaskIdentity},
        egress::Blocked,
        hostname::Hostname,
        rule::Rule,
    },
    wire::{self, AppendReply, AppendRequest, ApprovalAsk, OpenReply, OpenRequest, Refusal, Until},
};
use futures::{future::BoxFuture, stream::BoxStream};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    ResourceExt,
    runtime::{reflector::store::Writer, watcher},
};
use rmcp::{
    model::ClientJsonRpcMessage,
    transport::streamable_http_client::{
        SseError, StreamableHttpClient, StreamableHttpError, StreamableHttpPostResponse,
    },
};
use serde_json::Value;
use sse_stream::Sse;
use tokio::{io::AsyncWriteExt, net::TcpStream};
use tower::Service;

/// The longest silence of a tunnel.
const SILENCE: Duration = Duration::from_secs(600);

/// A gateway for the tests.
pub struct Gateway {
    pub address: SocketAddr,
    pub ca: String,
    state: Arc<Log>,
}

struct Log {
    records: Mutex<Vec<Record>>,
    history: Mutex<History>,
    fails: AtomicBool,
    /// The status and the rule with which every segment is rejected.
    refuses: Mutex<Option<(StatusCode, Rule)>>,
    /// Segments that begin with this record or a later one are rejected.
    refuses_beyond: Mutex<Option<u64>>,
    /// The evidence bucket is away: segments are accepted, but not stored.
    away: AtomicBool,
    /// Whether there is a bucket for results.
    keeps_results: AtomicBool,
    saw: Mutex<Vec<String>>,
    compiled: Mutex<Compiled>,
    cluster: Cluster,
    people: Arc<People>,
    dialer: Dialer,
    pool: Arc<Pool>,
    kept: Mutex<HashMap<String, String>>,
    undoing: Mutex<Option<Undoing>>,
}

/// The API server's ApprovalRequests, which approvers decide about.
struct People(Mutex<Writer<Lenient<ApprovalRequest>>>);

impl People {
    fn apply(&self, request: ApprovalRequest) {
        let event = watcher::Event::Apply(Lenient(Ok(request)));
        self.0.lock().unwrap().apply_watcher_event(&event);
    }

    fn requests(&self) -> Vec<ApprovalRequest> {
        let store = self.0.lock().unwrap().as_reader();
        store.state().iter().filter_map(|guarded| guarded.0.as_ref().ok().cloned()).collect()
    }
}

impl Create for People {
    fn create(
        &self,
        namespace: String,
        mut request: ApprovalRequest,
    ) -> BoxFuture<'_, Result<ApprovalRequest, String>> {
        request.metadata.namespace = Some(namespace);
        request.metadata.uid = Some(format!("uid-of-{}", request.name_any()));
        self.apply(request.clone());
        Box::pin(async move { Ok(request) })
    }
}

/// Host names with servers on loopback. A name has a pretended public address, which leads to its server.
struct Names(Vec<(String, SocketAddr)>);

impl Names {
    fn public(index: usize) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(198, 51, 100, u8::try_from(index + 1).unwrap()))
    }
}

impl Resolve for Names {
    fn addresses<'a>(&'a self, host: &'a Hostname) -> BoxFuture<'a, Result<Vec<IpAddr>, String>> {
        let index = self.0.iter().position(|(name, _)| name == host.as_str());
        Box::pin(async move { index.map(|index| vec![Self::public(index)]).ok_or_else(|| "NXDOMAIN".to_owned()) })
    }
}

impl Connect for Names {
    fn connect(&self, address: SocketAddr) -> BoxFuture<'_, std::io::Result<TcpStream>> {
        let index = (0..self.0.len()).find(|index| Self::public(*index) == address.ip()).unwrap();
        Box::pin(TcpStream::connect(self.0[index].1))
    }
}

impl Gateway {
    /// Starts a gateway for a task with this policy. `names` are its upstreams.
    pub async fn start(policy: &PolicyConfig, names: Vec<(String, SocketAddr)>) -> Self {
        let certified = rcgen::generate_simple_self_signed([wire::SERVER_NAME.to_owned()]).unwrap();
        let key = rustls_pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
        let mut config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let names = Arc::new(Names(names));
        let (cluster, people) = cluster(policy);
        let state = Arc::new(Log {
            records: Mutex::default(),
            history: Mutex::new(History::new(&note::origin("uid"))),
            fails: AtomicBool::new(false),
            refuses: Mutex::default(),
            refuses_beyond: Mutex::default(),
            away: AtomicBool::new(false),
            keeps_results: AtomicBool::new(true),
            saw: Mutex::default(),
            compiled: Mutex::new(compiled(policy)),
            cluster,
            people,
            dialer: Dialer::new(names.clone(), Blocked::default(), names, roots(None).unwrap()),
            pool: Arc::default(),
            kept: Mutex::default(),
            undoing: Mutex::default(),
        });
        let router = Router::new()
            .route(wire::LOG_OPEN, post(open))
            .route(wire::LOG_APPEND, post(append))
            .route(wire::APPROVAL, post(approval))
            .route(wire::STATE_PUT, post(keep))
            .route(wire::STATE_GET, post(kept))
            .route(wire::RESULT_PUT, post(keep_result))
            .route(wire::RESULT_GET, post(kept_result))
            .route(wire::FORWARD, any(forward))
            .route(wire::CALL, post(call))
            .with_state(state.clone());
        let log = state.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, router, log) = (acceptor.clone(), router.clone(), log.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = hyper::service::service_fn(move |mut request: Request<hyper::body::Incoming>| {
                        let (mut router, log) = (router.clone(), log.clone());
                        async move {
                            if request.method() == http::Method::CONNECT {
                                return Ok::<_, Infallible>(tunnel(&log, &mut request).await);
                            }
                            router.call(request.map(Body::new)).await
                        }
                    });
                    let _ = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new())
                        .serve_connection_with_upgrades(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self { address, ca: certified.cert.pem(), state }
    }

    /// Returns the witnessed records.
    pub fn records(&self) -> Vec<Record> {
        self.state.records.lock().unwrap().clone()
    }

    /// Returns the requests as they were sent to upstreams, with headers and bodies.
    pub fn saw(&self) -> Vec<String> {
        self.state.saw.lock().unwrap().clone()
    }

    pub fn store_fails(&self, fails: bool) {
        self.state.fails.store(fails, Ordering::SeqCst);
    }

    /// Makes the gateway reject every segment with this status and rule, or none.
    pub fn refuses(&self, so: Option<(StatusCode, Rule)>) {
        *self.state.refuses.lock().unwrap() = so;
    }

    /// Makes the gateway reject segments that begin with this record or a later one.
    pub fn refuses_beyond(&self, first: Option<u64>) {
        *self.state.refuses_beyond.lock().unwrap() = first;
    }

    pub fn bucket_is_away(&self, away: bool) {
        self.state.away.store(away, Ordering::SeqCst);
    }

    /// Sets whether results are kept outside the pod from now on.
    pub fn keep_results(&self, keep: bool) {
        self.state.keeps_results.store(keep, Ordering::SeqCst);
    }

    /// Returns the ApprovalRequests, oldest first.
    pub fn requests(&self) -> Vec<ApprovalRequest> {
        let mut requests = self.state.people.requests();
        requests.sort_by_key(|request| (request.spec.repeats, request.name_any()));
        requests
    }

    /// Adds an approver's decision to a request, as the API server's admission would allow it.
    pub fn decide(&self, name: &str, by: &str, decision: Answer) {
        let mut request = self.requests().into_iter().find(|request| request.name_any() == name).unwrap();
        let vote = Vote { by: by.into(), decision, reason: Some("because".into()) };
        request.status.get_or_insert_default().decisions.push(vote);
        self.state.people.apply(request);
    }

    /// Changes the requests in a way that the API server would reject.
    pub fn forge(&self, change: impl Fn(&mut ApprovalRequest)) {
        for mut request in self.requests() {
            change(&mut request);
            self.state.people.apply(request);
        }
    }

    /// Returns the stored arguments of compensations and the stored results, by their commitments.
    pub fn kept(&self) -> std::sync::MutexGuard<'_, HashMap<String, String>> {
        self.state.kept.lock().unwrap()
    }

    /// Begins a new log that rolls back the log so far: with the plan of the compensations, and with this policy.
    pub fn rolls_back(&self, policy: &PolicyConfig) {
        let mut planner = Planner::default();
        self.records().iter().for_each(|record| planner.take(record));
        let of = policy.task.rollback_of.as_ref().unwrap();
        let origin = note::origin(&of.uid);
        let plan = Plan { origin, size: 0, root: String::new(), steps: planner.steps() };
        *self.state.undoing.lock().unwrap() = Some(Undoing::new(plan));
        *self.state.history.lock().unwrap() = History::new(&note::origin("uid"));
        self.state.records.lock().unwrap().clear();
        self.goes_by(policy);
    }

    /// Makes the gateway use another policy than the harness from now on.
    pub fn goes_by(&self, policy: &PolicyConfig) {
        *self.state.compiled.lock().unwrap() = compiled(policy);
    }
}

/// Opens a tunnel, with the gateway's own steps. A tunnel to an unknown name ends at once.
async fn tunnel(log: &Arc<Log>, request: &mut Request<hyper::body::Incoming>) -> Response {
    let to = authorize::authority(request.uri().authority().unwrap().as_str(), None).unwrap();
    let tells = request.headers().contains_key(wire::OPENING) && tunnel::is_looked_at(&to);
    let dialled = log.dialer.dial(&to).await;
    let upgrade = hyper::upgrade::on(request);
    tokio::spawn(async move {
        let (Ok(agent), Ok((mut upstream, _))) = (upgrade.await, dialled) else { return };
        let mut agent = TokioIo::new(agent);
        let opening = tunnel::opening(&mut agent, &to).await;
        if opening.as_ref().is_ok_and(|opening| opening.is_empty() && tunnel::is_looked_at(&to)) {
            return;
        }
        if tells {
            tunnel::tell(&mut agent, opening.as_ref().err()).await.unwrap();
        }
        let Ok(opening) = opening else { return };
        upstream.write_all(&opening).await.unwrap();
        tunnel::relay(agent, upstream, (&tunnel::Traffic::default(), SILENCE), || Ok(())).await;
    });
    let mut reply = Response::new(Body::empty());
    if tells {
        reply.headers_mut().insert(wire::OPENING, HeaderValue::from_static(wire::TOLD));
    }
    reply
}

/// Returns the salt of all commitments.
pub fn salt() -> Salt {
    Salt::new([7; 32])
}

/// Returns a cluster that has the task and the ApprovalRequests, and no other object.
fn cluster(policy: &PolicyConfig) -> (Cluster, Arc<People>) {
    let task: AgentTask = serde_json::from_value(serde_json::json!({
        "apiVersion": "belay.dev/v1alpha1", "kind": "AgentTask",
        "metadata": {"namespace": policy.task.namespace, "name": policy.task.name, "uid": policy.task.uid},
        "spec": {
            "objective": "o", "workflowClass": "c", "principal": "p", "agent": {"image": "i"},
            "limits": {"wallTimeSeconds": 60, "toolCalls": 1, "tokens": 1},
        },
    }))
    .unwrap();
    let (people, mut tasks) = (Writer::default(), Writer::default());
    tasks.apply_watcher_event(&watcher::Event::Apply(Lenient(Ok(task))));
    let stores = Stores {
        pods: Writer::default().as_reader(),
        tasks: tasks.as_reader(),
        contracts: Writer::default().as_reader(),
        packs: Writer::default().as_reader(),
        namespaces: Writer::default().as_reader(),
        approvals: people.as_reader(),
        secrets: Writer::default().as_reader(),
    };
    (Cluster::new(stores, Arc::new(Nothing)), Arc::new(People(Mutex::new(people))))
}

/// A `Fetch` that finds no object.
struct Nothing;

impl Fetch for Nothing {
    fn pod<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<Option<Pod>, String>> {
        Box::pin(async { Ok(None) })
    }
    fn task<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<Option<AgentTask>, String>> {
        Box::pin(async { Ok(None) })
    }
}

fn compiled(policy: &PolicyConfig) -> Compiled {
    let evidence =
        EvidencePolicy { bucket: "evidence".into(), prefix: None, mode: RetentionMode::Compliance, retention_days: 1 };
    Compiled::new(policy.clone(), policy.egress.iter().map(|_| None).collect(), evidence).unwrap()
}

async fn open(State(log): State<Arc<Log>>, axum::Json(request): axum::Json<OpenRequest>) -> impl IntoResponse {
    let history = log.history.lock().unwrap();
    axum::Json(OpenReply {
        origin: note::origin("uid"),
        size: history.tree().size(),
        frontier: history.tree().frontier().iter().map(|hash| BASE64_STANDARD.encode(hash)).collect(),
        state: Snapshot {
            undoing: history.state().rollback().cloned().or_else(|| log.undoing.lock().unwrap().clone()),
            ..history.state().snapshot(request.attempt)
        },
        salt: salt(),
        keeps_results: log.keeps_results.load(Ordering::SeqCst),
        open_calls: u64::try_from(history.state().open_calls().len()).unwrap(),
    })
}

async fn append(State(log): State<Arc<Log>>, axum::Json(request): axum::Json<AppendRequest>) -> Response {
    let away = log.away.load(Ordering::SeqCst) && request.until == Until::Stored;
    if away || log.fails.load(Ordering::SeqCst) {
        return refusal(&Refused {
            status: StatusCode::SERVICE_UNAVAILABLE,
            rule: Rule::Evidence,
            reason: "the bucket is away".into(),
        });
    }
    let beyond = log.refuses_beyond.lock().unwrap().filter(|first| request.first >= *first);
    let beyond = beyond.map(|_| (StatusCode::FORBIDDEN, Rule::LogSegment));
    if let Some((status, rule)) = log.refuses.lock().unwrap().or(beyond) {
        return refusal(&Refused { status, rule, reason: "the witness does not take it".into() });
    }
    let (segment, records) = Segment::read(request.segment.as_bytes()).unwrap();
    let mut history = log.history.lock().unwrap();
    if segment.end() <= history.tree().size() {
        return axum::Json(AppendReply { size: segment.end(), checkpoint: Some(segment.note.to_string()) })
            .into_response();
    }
    match history.extended_by(&segment, &records) {
        Ok(extended) => *history = extended,
        Err(refused) => return refusal(&refused),
    }
    log.records.lock().unwrap().extend(records);
    axum::Json(AppendReply { size: history.tree().size(), checkpoint: Some(segment.note.to_string()) }).into_response()
}

async fn keep(State(log): State<Arc<Log>>, axum::Json(keep): axum::Json<wire::PutState>) -> Response {
    let intent = log.history.lock().unwrap().state().intent(keep.intent).cloned().unwrap();
    let compiled = log.compiled.lock().unwrap();
    if let Err(refused) = authorize::resolve_tool(&compiled, intent.attempt, &intent)
        .and_then(|_| authorize::are_intended(&intent, &salt(), &keep.arguments))
    {
        return refusal(&refused);
    }
    match compiled.contracts.undo(&intent.target, &keep.arguments, &keep.result) {
        Ok(undo) => {
            let arguments = belay::canonical::to_bytes(&undo).unwrap();
            let digest = salt().value(&serde_json::Value::Object(undo)).unwrap();
            log.kept.lock().unwrap().insert(digest.clone(), String::from_utf8(arguments).unwrap());
            axum::Json(wire::PutReply { digest }).into_response()
        }
        Err(reason) => refusal(&Refused::denied(Rule::ToolRollback, reason)),
    }
}

async fn kept(State(log): State<Arc<Log>>, axum::Json(of): axum::Json<wire::StateRef>) -> Response {
    match log.kept.lock().unwrap().get(&of.digest).cloned() {
        Some(arguments) => axum::Json(wire::Undo { arguments }).into_response(),
        None => refusal(&Refused::denied(Rule::ToolRollback, "not kept")),
    }
}

async fn keep_result(State(log): State<Arc<Log>>, axum::Json(keep): axum::Json<wire::PutResult>) -> Response {
    let intent = log.history.lock().unwrap().state().intent(keep.intent).cloned().unwrap();
    assert!(intent.open && intent.key.is_some(), "{intent:?}");
    let digest = salt().bytes(keep.result.as_bytes());
    log.kept.lock().unwrap().insert(digest.clone(), keep.result);
    axum::Json(wire::PutReply { digest }).into_response()
}

async fn kept_result(State(log): State<Arc<Log>>, axum::Json(of): axum::Json<wire::StateRef>) -> Response {
    match log.kept.lock().unwrap().get(&of.digest).cloned() {
        Some(result) => axum::Json(wire::ResultReply { result }).into_response(),
        None => refusal(&Refused::denied(Rule::ToolIdempotency, "not kept")),
    }
}

async fn approval(State(log): State<Arc<Log>>, axum::Json(ask): axum::Json<ApprovalAsk>) -> Response {
    let compiled = Arc::new(compiled(&log.compiled.lock().unwrap().policy));
    let places = Arc::new(tokio::sync::Semaphore::new(2));
    let call = CallKey { by: ask.by, tool: ask.tool.clone(), digest: ask.request_commitment.clone() };
    let before = log.history.lock().unwrap().before(&call);
    let TaskIdentity { namespace, name, uid, .. } = &compiled.policy.task;
    let principal = HarnessIdentity {
        namespace: namespace.clone(),
        pod: "t-1".into(),
        pod_uid: "pod".into(),
        task: name.clone(),
        task_uid: uid.clone(),
        attempt: 1,
        standing: Standing::Live,
    };
    let asking = (&principal, &places);
    match approvals::ask(&log.cluster, log.people.as_ref(), &compiled, asking, (&ask, &salt()), before).await {
        Ok(reply) => axum::Json(reply).into_response(),
        Err(refused) => refusal(&refused),
    }
}

async fn forward(State(log): State<Arc<Log>>, request: Request<Body>) -> Response {
    forwarded(&log, request).await.unwrap_or_else(|refused| refusal(&refused))
}

async fn call(State(log): State<Arc<Log>>, request: Request<Body>) -> Response {
    called(&log, request).await.unwrap_or_else(|refused| refusal(&refused))
}

/// Does what the gateway's service does once it knows the caller: returns the intent, and the request without the caller's token.
async fn intended(log: &Log, request: Request<Body>) -> Result<(IntentFacts, Parts, Bytes), Refused> {
    let (mut parts, body) = request.into_parts();
    assert_eq!(parts.headers[header::AUTHORIZATION], "Bearer the-token");
    parts.headers.remove(header::AUTHORIZATION);
    let seq = parts.headers[wire::INTENT].to_str().unwrap().parse().unwrap();
    let body = body.collect().await.unwrap().to_bytes();
    let mut intent = None;
    for _ in 0..100 {
        intent = log.history.lock().unwrap().state().intent(seq).cloned();
        if intent.is_some() {
            break;
        }
        // A read can be as fast as its intent.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let intent = intent.ok_or_else(|| Refused::denied(Rule::IntentMissing, "a call came before its intent"))?;
    Ok((intent, parts, body))
}

async fn forwarded(log: &Log, request: Request<Body>) -> Result<Response, Refused> {
    let (intent, parts, body) = intended(log, request).await?;
    // The agent wrote some of it, so it may not be UTF-8.
    let header = |name: &str| String::from_utf8_lossy(parts.headers[name].as_bytes()).into_owned();
    let channel = match header(wire::CHANNEL).as_str() {
        "tool" => Channel::Tool,
        "listing" => Channel::Listing,
        "model" => Channel::Model,
        _ => Channel::Egress,
    };
    let target = Target::parse(&header(wire::TARGET))?;
    let mut parts = parts;
    {
        let compiled = log.compiled.lock().unwrap();
        let to = Destination::Url(&target, &parts.method);
        authorize::listed(&compiled, channel, to, |_| false)?;
        authorize::intended(&compiled, intent.attempt, channel, to, (&intent, &salt()))?;
        if authorize::is_message(&compiled, channel, &parts.method, &intent) {
            if let Some(arguments) = authorize::parse_mcp_message(&compiled, channel, (&intent, &salt()), &body)? {
                judged(log, &compiled, &intent, &arguments)?;
            }
        } else {
            authorize::is_intended(channel, &intent, &salt(), &body)?;
            if channel == Channel::Model {
                let of = (&intent, &salt());
                parts.headers = authorize::model::reviewed(&compiled, &target, of, (&parts.headers, &body))?;
            }
        }
    }
    send(log, (&target, channel), Request::from_parts(parts, body)).await
}

async fn called(log: &Log, request: Request<Body>) -> Result<Response, Refused> {
    let (intent, _, body) = intended(log, request).await?;
    let (target, request) = {
        let compiled = log.compiled.lock().unwrap();
        let arguments = authorize::arguments(&intent, &salt(), &body)?;
        let (target, request) = authorize::request(&compiled, intent.attempt, &intent, &arguments)?;
        authorize::listed(&compiled, Channel::Tool, Destination::Url(&target, request.method()), |_| false)?;
        judged(log, &compiled, &intent, &arguments)?;
        (target, request)
    };
    send(log, (&target, Channel::Tool), request).await.map(forward::as_reply_to_post)
}

fn judged(log: &Log, compiled: &Compiled, intent: &IntentFacts, arguments: &Value) -> Result<(), Refused> {
    let needed = authorize::judge(compiled, intent, arguments)?;
    let find = |name: &str| log.cluster.approval(&compiled.policy.task.namespace, name);
    approvals::approved(compiled, intent, arguments, &needed, find)
}

async fn send(log: &Log, (target, channel): (&Target, Channel), request: Request<Bytes>) -> Result<Response, Refused> {
    log.saw.lock().unwrap().push(format!(
        "{} {}://{}{} {:?} {}",
        request.method(),
        if target.secure { "https" } else { "http" },
        target.host_header(),
        target.path,
        request.headers(),
        String::from_utf8_lossy(request.body())
    ));
    let silence = log.compiled.lock().unwrap().policy.silence();
    let manner = forward::Manner { silence, unpacks: channel != Channel::Egress };
    let (dialer, pool) = (&log.dialer, Some(&log.pool));
    let again = request.clone().map(full);
    let mut reply = forward::forward(dialer, pool, target, None, request.map(full), (manner, ())).await?;
    let is_message = matches!(channel, Channel::Tool | Channel::Listing) && again.method() == http::Method::POST;
    if let Some(to) = redirect::followed(target, &reply).filter(|_| is_message) {
        reply = forward::forward(dialer, pool, &to, None, again, (manner, ())).await?;
    }
    // The harness asks over HTTP/2.
    Ok(Carried::reply(reply, http::Version::HTTP_2).map(Body::new))
}

fn refusal(refused: &Refused) -> Response {
    let body = Refusal { rule: refused.rule, reason: refused.reason.clone() };
    (refused.status, [(wire::RULE, refused.rule.as_str())], axum::Json(body)).into_response()
}

/// rmcp's client over plain HTTP, as an agent in the pod has it.
#[derive(Clone)]
pub struct Plain(Client<HttpConnector, Full<Bytes>>);

impl Default for Plain {
    fn default() -> Self {
        Self(Client::builder(TokioExecutor::new()).build_http())
    }
}

impl StreamableHttpClient for Plain {
    type Error = std::io::Error;

    async fn post_message(
        &self,
        uri: Arc<str>,
        message: ClientJsonRpcMessage,
        _: Option<Arc<str>>,
        _: Option<String>,
        headers: HashMap<HeaderName, HeaderValue>,
    ) -> Result<StreamableHttpPostResponse, StreamableHttpError<Self::Error>> {
        let mut request = Request::post(uri.as_ref())
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json, text/event-stream")
            .body(Full::from(serde_json::to_vec(&message)?))
            .unwrap();
        let extra: HeaderMap = headers.into_iter().collect();
        request.headers_mut().extend(extra);
        let reply = self.0.request(request).await.map_err(std::io::Error::other)?;
        let status = reply.status();
        let body = reply.into_body().collect().await.map_err(std::io::Error::other)?.to_bytes();
        if status == StatusCode::ACCEPTED {
            return Ok(StreamableHttpPostResponse::Accepted);
        }
        let message = serde_json::from_slice(&body)
            .unwrap_or_else(|error| panic!("{status} {error}: {}", String::from_utf8_lossy(&body)));
        Ok(StreamableHttpPostResponse::Json(message, None))
    }

    async fn delete_session(
        &self,
        _: Arc<str>,
        _: Arc<str>,
        _: Option<String>,
        _: HashMap<HeaderName, HeaderValue>,
    ) -> Result<(), StreamableHttpError<Self::Error>> {
        Ok(())
    }

    async fn get_stream(
        &self,
        _: Arc<str>,
        _: Option<Arc<str>>,
        _: Option<String>,
        _: Option<String>,
        _: HashMap<HeaderName, HeaderValue>,
    ) -> Result<BoxStream<'static, Result<Sse, SseError>>, StreamableHttpError<Self::Error>> {
        Err(StreamableHttpError::ServerDoesNotSupportSse)
    }
}
