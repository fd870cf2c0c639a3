//! The whole gateway over real sockets: TLS in front, a local upstream behind, the cluster and the bucket in memory.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewStatus, UserInfo};
use kube::runtime::{reflector::store::Writer, watcher::Event};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};

use super::*;
use crate::{
    api::AgentTask,
    evidence::{record::Event as RecordEvent, store::Store},
    gateway::{
        cluster::{Fetch, Stores},
        dial::{Connect, Dialer},
        identity::reviews::Review,
        listen,
        pod_quota::CALLS,
        resolve::Resolve,
        testing::{self, Harness, Memory, UID},
        usage::WriteUsage,
    },
    lenient::Lenient,
    policy::{config::Usage, egress::Blocked, hostname::Hostname},
    render::names,
    wire::OpenRequest,
};

/// An API server that knows the tokens `harness-<attempt>` and `operator`, has no objects, and counts reviews.
#[derive(Default)]
struct Api {
    reviews: AtomicUsize,
    usage: Mutex<Vec<Usage>>,
}

impl Review for Api {
    fn review(&self, review: TokenReview) -> BoxFuture<'_, Result<TokenReviewStatus, String>> {
        self.reviews.fetch_add(1, Ordering::SeqCst);
        let token = review.spec.token.unwrap_or_default();
        let username = match token.as_str() {
            "operator" => "system:serviceaccount:belay-system:belay-operator",
            _ => "system:serviceaccount:team:default",
        };
        let extra = token.strip_prefix("harness-").map(|attempt| {
            [("pod-name", format!("t-{attempt}")), ("pod-uid", format!("pod-{attempt}"))]
                .map(|(key, value)| (format!("authentication.kubernetes.io/{key}"), vec![value]))
                .into()
        });
        let status = TokenReviewStatus {
            authenticated: Some(token == "operator" || extra.is_some()),
            audiences: Some(vec![wire::AUDIENCE.into()]),
            user: Some(UserInfo { username: Some(username.into()), extra, ..UserInfo::default() }),
            error: None,
        };
        Box::pin(async move { Ok(status) })
    }
}

impl Fetch for Api {
    fn pod<'a>(
        &'a self,
        _: &'a str,
        _: &'a str,
    ) -> BoxFuture<'a, Result<Option<k8s_openapi::api::core::v1::Pod>, String>> {
        Box::pin(async { Ok(None) })
    }

    fn task<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<Option<AgentTask>, String>> {
        Box::pin(async { Ok(None) })
    }
}

impl WriteUsage for Api {
    fn write<'a>(&'a self, _: &'a str, _: &'a str, _: &'a str, usage: Usage) -> BoxFuture<'a, Result<(), String>> {
        self.usage.lock().unwrap().push(usage);
        Box::pin(async { Ok(()) })
    }
}

/// Creates no ApprovalRequest.
struct Nobody;

impl Create for Nobody {
    fn create(
        &self,
        _: String,
        _: crate::api::ApprovalRequest,
    ) -> BoxFuture<'_, Result<crate::api::ApprovalRequest, String>> {
        Box::pin(async { Err("nobody is there".into()) })
    }
}

/// The writers of the stores.
struct Writers {
    pods: Writer<Lenient<k8s_openapi::api::core::v1::Pod>>,
    tasks: Writer<Lenient<AgentTask>>,
    contracts: Writer<Lenient<crate::api::ToolContract>>,
    packs: Writer<Lenient<crate::api::PolicyPack>>,
    namespaces: Writer<Lenient<k8s_openapi::api::core::v1::Namespace>>,
    approvals: Writer<Lenient<crate::api::ApprovalRequest>>,
    secrets: Writer<Lenient<k8s_openapi::api::core::v1::Secret>>,
}

fn put<K>(writer: &mut Writer<Lenient<K>>, object: Value)
where
    K: kube::Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + 'static,
{
    writer.apply_watcher_event(&Event::Apply(serde_json::from_value(object).unwrap()));
}

fn pod(attempt: i64, address: &str) -> Value {
    json!({
        "metadata": {
            "namespace": "team", "name": format!("t-{attempt}"), "uid": format!("pod-{attempt}"),
            "labels": { names::TASK: "t", names::TASK_UID: UID, names::ATTEMPT: attempt.to_string() },
        },
        "status": { "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }] },
    })
}

fn contract(name: &str, url: &str, effect: &str) -> Value {
    json!({
        "metadata": { "namespace": "team", "name": name, "uid": format!("contract-{name}"), "generation": 1 },
        "spec": {
            "tool": name, "description": "A tool.", "input": { "type": "object" }, "sideEffect": effect,
            "upstream": { "mcp": { "url": url, "tool": name } },
        },
    })
}

fn pack(generation: i64, direct: &[&str]) -> Value {
    let mut egress = vec![
        json!({ "host": "tools.world.test", "uses": ["Tools"] }),
        json!({ "host": "models.world.test", "uses": ["Models"], "credentials": [{
            "secret": "models", "key": "token", "header": "authorization", "prefix": "Bearer " }] }),
    ];
    egress.extend(direct.iter().map(|host| json!({ "host": host, "ports": [443, 80, 7000], "uses": ["Direct"] })));
    json!({
        "metadata": { "name": "dev", "uid": "pack", "generation": generation },
        "spec": {
            "environment": "dev",
            "namespaceSelector": { "matchLabels": { "belay": "dev" } },
            "workflowClasses": [{
                "name": "support", "allowedEffects": ["read", "write"], "egress": egress, "resources": {},
                "limits": { "wallTimeSeconds": 600, "toolCalls": 4, "tokens": 1_000_000 },
            }],
            "models": { "openai": "https://models.world.test" },
            "evidence": { "bucket": "evidence", "mode": "Compliance", "retentionDays": 30 },
            "state": { "bucket": "state" },
        },
    })
}

const DIRECT: &[&str] = &["docs.world.test", "mixed.world.test", "loopback.world.test", "nowhere.world.test"];

fn task() -> Value {
    json!({
        "metadata": { "namespace": "team", "name": "t", "uid": UID, "generation": 1 },
        "spec": {
            "objective": "Tidy up.", "workflowClass": "support", "principal": "jane@example.com",
            "agent": { "image": "localhost/agent:dev" }, "tools": ["search", "write"],
            "limits": { "wallTimeSeconds": 600, "toolCalls": 4, "tokens": 1_000_000 },
        },
    })
}

/// The names of the simulated internet.
struct Names;

impl Resolve for Names {
    fn addresses<'a>(&'a self, host: &'a Hostname) -> BoxFuture<'a, Result<Vec<IpAddr>, String>> {
        let front = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 20));
        let addresses = match host.as_str() {
            "nowhere.world.test" => return Box::pin(async { Err("NXDOMAIN".to_owned()) }),
            "mixed.world.test" => vec![front, "10.0.0.5".parse().unwrap()],
            "loopback.world.test" => vec!["127.0.0.1".parse().unwrap()],
            _ => vec![front],
        };
        Box::pin(async move { Ok(addresses) })
    }
}

/// The network of the simulated internet: ports of 198.51.100.20 lead to local listeners.
struct Wires(HashMap<u16, SocketAddr>);

impl Connect for Wires {
    fn connect(&self, address: SocketAddr) -> BoxFuture<'_, std::io::Result<TcpStream>> {
        assert_eq!(address.ip(), IpAddr::V4(Ipv4Addr::new(198, 51, 100, 20)), "only checked addresses are dialled");
        let local = self.0.get(&address.port()).copied();
        Box::pin(async move { TcpStream::connect(local.ok_or(std::io::ErrorKind::ConnectionRefused)?).await })
    }
}

struct World {
    gateway: SocketAddr,
    ca: rustls::RootCertStore,
    api: Arc<Api>,
    bucket: Arc<Memory>,
    writers: Writers,
    cluster: Arc<Cluster>,
    metrics: Metrics,
    /// The harness for [`World::say`], after its first use.
    speaker: tokio::sync::Mutex<Option<Harness>>,
}

/// A certificate authority, which issues certificates for the gateway and the upstreams.
struct Ca {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    root: rustls::RootCertStore,
}

impl Ca {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        let mut root = rustls::RootCertStore::empty();
        root.add(certificate.der().clone()).unwrap();
        Self { issuer: rcgen::Issuer::new(params, key), root }
    }

    fn server(&self, names: &[&str], alpn: &[&str]) -> Arc<rustls::ServerConfig> {
        let key = rcgen::KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = rcgen::CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder().with_no_client_auth();
        let mut config = config.with_single_cert(vec![certificate.der().clone()], key).unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Arc::new(config)
    }
}

/// Describes the request that the upstream received.
fn echo(request: &Request<Incoming>) -> Value {
    let headers: Vec<_> = request
        .headers()
        .iter()
        .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    json!({ "method": request.method().as_str(), "uri": request.uri().to_string(), "headers": headers })
}

/// The credential of the model upstream.
const SECRET: &str = "sk-live-9fQ2xZ7b-rT5mK1wE";

/// Replies with the requested text in the requested way. `KEY` stands for the received credential.
fn says(asked: &[u8], authorization: Option<&HeaderValue>) -> http::Result<Response<ReplyBody>> {
    let asked: Value = serde_json::from_slice(asked).unwrap_or_default();
    let asked = asked["messages"][0]["content"].as_str().unwrap_or_default();
    let asked: Value = serde_json::from_str(asked).unwrap_or_default();
    let key = authorization.and_then(|value| value.to_str().ok()).and_then(|value| value.strip_prefix("Bearer "));
    let text = asked["say"].as_str().unwrap_or_default().replace("KEY", key.unwrap_or("none"));
    let reply = Response::builder().status(u16::try_from(asked["status"].as_u64().unwrap_or(200)).unwrap());
    match asked["as"].as_str().unwrap_or_default() {
        "header" => reply.header("x-said", text).body(full("{}")),
        "header's name" => reply.header(text, "1").body(full("{}")),
        "cookie" => reply.header("set-cookie", format!("session={}", hex::encode(text))).body(full("{}")),
        "location" => reply.status(307).header("location", format!("https://a.test/?key={text}")).body(full("")),
        "packed" => {
            let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            std::io::Write::write_all(&mut packed, text.as_bytes()).unwrap();
            reply.header("content-encoding", "gzip").body(full(packed.finish().unwrap()))
        }
        "gzip" => reply.header("content-encoding", "gzip").body(full(text)),
        "gzip unsaid" => reply.body(full([b"\x1f\x8b\x08", text.as_bytes()].concat())),
        "chunks" | "events" => {
            let kind = if asked["as"] == "events" { "text/event-stream; charset=utf-8" } else { "text/plain" };
            let pieces: Vec<_> = text.split('|').map(|piece| Bytes::from(piece.to_owned())).collect();
            let frames = futures::stream::iter(pieces).then(|piece| async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Ok::<_, Infallible>(Frame::data(piece))
            });
            let body = StreamBody::new(frames).map_err(|never| match never {}).boxed_unsync();
            reply.header("content-type", kind).body(body)
        }
        "broken events" | "broken" => {
            // The connection ends after the last piece.
            let kind = if asked["as"] == "broken" { "application/json" } else { "text/event-stream" };
            let reply = reply.header("content-type", kind);
            let reply = if asked["as"] == "broken" { reply.header("content-length", text.len() + 10) } else { reply };
            let pieces: Vec<_> = text.split('|').map(|piece| Ok(Frame::data(Bytes::from(piece.to_owned())))).collect();
            let pieces = futures::stream::iter(pieces).then(async |piece| {
                tokio::time::sleep(Duration::from_millis(20)).await;
                piece
            });
            let end = futures::stream::once(async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Err::<Frame<Bytes>, crate::gateway::body::BoxError>("the connection ends".into())
            });
            reply.body(StreamBody::new(pieces.chain(end)).boxed_unsync())
        }
        "trailer" => {
            let trailers = HeaderMap::from_iter([(http::HeaderName::from_static("x-said"), text.parse().unwrap())]);
            let frames = [Ok::<_, Infallible>(Frame::data(Bytes::from("{}"))), Ok(Frame::trailers(trailers))];
            let body = StreamBody::new(futures::stream::iter(frames)).map_err(|never| match never {}).boxed_unsync();
            reply.header("trailer", "x-said").body(body)
        }
        _ => reply.header("content-type", "application/json").body(full(text)),
    }
}

/// The upstream: it echoes, redirects and streams.
async fn upstream(request: Request<Incoming>) -> Result<Response<ReplyBody>, Infallible> {
    let path = request.uri().path().to_owned();
    let seen = echo(&request);
    let authorization = request.headers().get("authorization").cloned();
    let status = request.headers().get("x-status").and_then(|status| status.to_str().ok()?.parse::<u16>().ok());
    let location = request.headers().get("x-location").cloned();
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let reply = match path.as_str() {
        "/mcp" if location.is_some() => {
            Response::builder().status(status.unwrap_or(307)).header("location", location.unwrap()).body(full(""))
        }
        "/redirect" => Response::builder().status(302).header("location", "http://169.254.169.254/").body(full("")),
        "/stream" => {
            let frames = futures::stream::unfold(0, |n| async move {
                if n == 3 {
                    return None;
                }
                tokio::time::sleep(Duration::from_millis(50 * n)).await;
                Some((Ok::<_, Infallible>(Frame::data(Bytes::from(format!("piece {n}\n")))), n + 1))
            });
            Response::builder()
                .header("content-type", "text/event-stream")
                .body(StreamBody::new(frames).map_err(|never| match never {}).boxed_unsync())
        }
        "/v1/chat/completions" => says(&body, authorization.as_ref()),
        _ => {
            let mut seen = seen;
            seen["body"] = json!(String::from_utf8_lossy(&body));
            let mut reply = Response::builder()
                .status(status.unwrap_or(200))
                .header("belay-rule", "egress.host")
                .header("connection", "x-hop")
                .header("x-hop", "1")
                .header("x-end", "2");
            if let Some(authorization) = authorization {
                reply = reply.header("x-echo", authorization);
            }
            reply.body(full(serde_json::to_vec(&seen).unwrap()))
        }
    };
    Ok(reply.unwrap())
}

/// Serves the upstream with or without TLS, and returns its address.
async fn serve_upstream(tls: Option<Arc<rustls::ServerConfig>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let tls = tls.clone();
            tokio::spawn(async move {
                let http = hyper::server::conn::http1::Builder::new();
                let service = hyper::service::service_fn(upstream);
                match tls {
                    Some(tls) => {
                        let Ok(stream) = TlsAcceptor::from(tls).accept(stream).await else { return };
                        let _ = http.serve_connection(TokioIo::new(stream), service).await;
                    }
                    None => {
                        let _ = http.serve_connection(TokioIo::new(stream), service).await;
                    }
                }
            });
        }
    });
    address
}

/// Serves a port that echoes bytes.
async fn serve_echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut reads, mut writes) = stream.split();
                let _ = tokio::io::copy(&mut reads, &mut writes).await;
            });
        }
    });
    address
}

async fn world() -> World {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let ca = Ca::new();
    let world_names = ["tools.world.test", "models.world.test", "docs.world.test"];
    let https = serve_upstream(Some(ca.server(&world_names, &["http/1.1"]))).await;
    let http = serve_upstream(None).await;
    let wires = Wires(HashMap::from([(443, https), (80, http), (7000, serve_echo().await)]));

    let mut writers = Writers {
        pods: Writer::default(),
        tasks: Writer::default(),
        contracts: Writer::default(),
        packs: Writer::default(),
        namespaces: Writer::default(),
        approvals: Writer::default(),
        secrets: Writer::default(),
    };
    let stores = Stores {
        pods: writers.pods.as_reader(),
        tasks: writers.tasks.as_reader(),
        contracts: writers.contracts.as_reader(),
        packs: writers.packs.as_reader(),
        namespaces: writers.namespaces.as_reader(),
        approvals: writers.approvals.as_reader(),
        secrets: writers.secrets.as_reader(),
    };
    put(&mut writers.pods, pod(1, "127.0.0.1"));
    put(&mut writers.tasks, task());
    put(&mut writers.contracts, contract("search", "https://tools.world.test/mcp", "read"));
    put(&mut writers.contracts, contract("write", "https://tools.world.test/mcp", "write"));
    put(&mut writers.packs, pack(1, DIRECT));
    put(&mut writers.namespaces, json!({ "metadata": { "name": "team", "labels": { "belay": "dev" } } }));
    put(
        &mut writers.secrets,
        // The secret with the newline that an editor adds, in base64.
        json!({ "metadata": { "namespace": "belay-system", "name": "models" }, "data": { "token": BASE64_STANDARD.encode(format!("{SECRET}\n")) } }),
    );

    let api = Arc::new(Api::default());
    let cluster = Arc::new(Cluster::new(stores, api.clone()));
    let (bucket, metrics) = (Arc::new(Memory::default()), testing::metrics());
    let salt = String::from(testing::salt());
    bucket.put_new(&format!("team/t/{UID}/salt/commitments"), salt.into(), None).await.unwrap();
    let witness = testing::replica(&testing::witness_key(), &bucket);
    let (incidents, telling) = Incidents::new(witness.clone(), metrics.clone());
    tokio::spawn(telling);
    let gateway = Arc::new(Gateway::new(Parts {
        cluster: cluster.clone(),
        reviews: Reviews::new(api.clone(), metrics.token_reviews.clone()),
        state: testing::state(&witness, &bucket),
        witness,
        dialer: Dialer::new(Arc::new(Names), Blocked::default(), Arc::new(wires), ca.root.clone()),
        pool: Arc::default(),
        requests: Arc::new(Nobody),
        incidents,
        usage: Arc::new(UsageStatus::new(api.clone(), metrics.clone())),
        metrics: metrics.clone(),
        operator: "system:serviceaccount:belay-system:belay-operator".into(),
        shutdown: CancellationToken::new(),
    }));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = ca.server(&[wire::SERVER_NAME], &["h2", "http/1.1"]);
    tokio::spawn(listen::serve(listener, tls, gateway, metrics.clone(), CancellationToken::new()));
    World {
        gateway: address,
        ca: ca.root,
        api,
        bucket,
        writers,
        cluster,
        metrics,
        speaker: tokio::sync::Mutex::default(),
    }
}

impl World {
    async fn connect(&self, alpn: &str) -> TlsStream<TcpStream> {
        let config = rustls::ClientConfig::builder().with_root_certificates(self.ca.clone());
        let mut config = config.with_no_client_auth();
        config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        let stream = TcpStream::connect(self.gateway).await.unwrap();
        let name = ServerName::try_from(wire::SERVER_NAME).unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }

    /// Sends one request on a new connection.
    async fn send(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        let io = TokioIo::new(self.connect("http/1.1").await);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.unwrap()
    }

    /// Has the model upstream reply with a text in some way.
    async fn say(&self, say: &str, how: &str) -> Response<Incoming> {
        let request = self.asked(say, how).await;
        self.send(request).await
    }

    /// Does the same over HTTP/2, as a harness does.
    async fn say_over_http2(&self, say: &str, how: &str) -> Response<Incoming> {
        let (mut parts, body) = self.asked(say, how).await.into_parts();
        parts.uri = format!("https://{}{}", wire::SERVER_NAME, wire::FORWARD).parse().unwrap();
        parts.headers.remove("host");
        let io = TokioIo::new(self.connect("h2").await);
        let builder = hyper::client::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
        let (mut sender, connection) = builder.handshake(io).await.unwrap();
        tokio::spawn(connection);
        sender.send_request(Request::from_parts(parts, body)).await.unwrap()
    }

    /// Returns a request that has the model upstream reply with a text in some way.
    async fn asked(&self, say: &str, how: &str) -> Request<Full<Bytes>> {
        let url = "https://models.world.test/v1/chat/completions";
        let asked = json!({ "say": say, "as": how }).to_string();
        let messages = json!([{ "role": "user", "content": asked }]);
        let asked = json!({ "model": "m", "max_completion_tokens": 1, "messages": messages }).to_string();
        // An intent authorizes one request with one body.
        let mut speaker = self.speaker.lock().await;
        let speaker = match &mut *speaker {
            Some(speaker) => speaker,
            none => none.insert(self.harness(vec![]).await),
        };
        let seq = speaker.tree.size();
        let mut intent = testing::intent(&seq.to_string(), Channel::Model, "/v1/chat/completions", 2_000);
        if let RecordEvent::Intent(of) = &mut intent {
            of.request_commitment = Some(testing::salt().bytes(asked.as_bytes()));
        }
        let request = speaker.next(vec![intent]);
        self.post("harness-1", wire::LOG_APPEND, &request).await.unwrap();
        call("model", url, seq).body(Full::from(asked)).unwrap()
    }

    async fn post<T: Serialize>(&self, token: &str, path: &str, body: &T) -> Result<Value, Rule> {
        let request = Request::post(path)
            .header("host", wire::SERVER_NAME)
            .header("authorization", format!("Bearer {token}"))
            .body(Full::from(serde_json::to_vec(body).unwrap()))
            .unwrap();
        let reply = self.send(request).await;
        let (status, rule) = (reply.status(), rule(&reply));
        let body = reply.into_body().collect().await.unwrap().to_bytes();
        if status == StatusCode::OK { Ok(serde_json::from_slice(&body).unwrap()) } else { Err(rule.unwrap()) }
    }

    /// Opens the log as the harness of attempt 1, and records these events.
    async fn harness(&self, events: Vec<RecordEvent>) -> Harness {
        let compiled = self.cluster.compiled(&testing::principal(1)).unwrap();
        let open = OpenRequest { attempt: 1, policy_digest: compiled.digest.clone() };
        self.post("harness-1", wire::LOG_OPEN, &open).await.unwrap();
        let mut harness = Harness::new(1);
        let RecordEvent::AttemptOpened(mut opened) = harness.opened() else { panic!() };
        opened.policy = compiled.policy.clone();
        let mut all = vec![RecordEvent::AttemptOpened(opened)];
        all.extend(events);
        let request = harness.next(all);
        self.post("harness-1", wire::LOG_APPEND, &request).await.unwrap();
        harness
    }

    async fn forward(&self, channel: &str, url: &str, intent: u64) -> Response<Incoming> {
        self.send(call(channel, url, intent).body(Full::from("hello")).unwrap()).await
    }

    /// Opens a tunnel, or returns the rule that denied it.
    async fn tunnel(&self, to: &str, intent: u64) -> Result<TokioIo<hyper::upgrade::Upgraded>, Rule> {
        let request = Request::builder()
            .method("CONNECT")
            .uri(to)
            .header("host", to)
            .header("proxy-authorization", "Bearer harness-1")
            .header(wire::CHANNEL, "egress")
            .header(wire::INTENT, intent)
            .body(Full::default())
            .unwrap();
        let reply = self.send(request).await;
        match reply.status() {
            StatusCode::OK => {
                assert!(reply.headers()[wire::UPSTREAM].to_str().unwrap().starts_with("198.51.100.20:"));
                Ok(TokioIo::new(hyper::upgrade::on(reply).await.unwrap()))
            }
            _ => Err(rule(&reply).unwrap()),
        }
    }

    fn incidents(&self) -> Vec<Value> {
        let objects = self.bucket.objects.lock().unwrap();
        let incidents = objects.iter().filter(|(key, _)| key.contains("/incidents/"));
        incidents.map(|(_, (body, _))| serde_json::from_slice(body).unwrap()).collect()
    }
}

fn call(channel: &str, url: &str, intent: u64) -> http::request::Builder {
    Request::post(wire::FORWARD)
        .header("host", wire::SERVER_NAME)
        .header("authorization", "Bearer harness-1")
        .header(wire::CHANNEL, channel)
        .header(wire::TARGET, url)
        .header(wire::INTENT, intent)
}

/// Returns this number of intents for the agent's own traffic to a host.
fn direct(to: &str, many: u64) -> Vec<RecordEvent> {
    (1..=many).map(|n| testing::intent(&n.to_string(), Channel::Egress, to, 0)).collect()
}

fn rule<B>(reply: &Response<B>) -> Option<Rule> {
    let rule = reply.headers().get(wire::RULE)?.to_str().ok()?;
    Rule::ALL.iter().copied().find(|known| known.as_str() == rule)
}

async fn eventually(what: impl Fn() -> bool) {
    for _ in 0..500 {
        if what() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("it did not happen in 10 s");
}

async fn body(reply: Response<Incoming>) -> Value {
    serde_json::from_slice(&reply.into_body().collect().await.unwrap().to_bytes()).unwrap()
}

fn header<'a>(seen: &'a Value, name: &str) -> Vec<&'a str> {
    let headers = seen["headers"].as_array().unwrap();
    headers.iter().filter(|pair| pair[0] == name).map(|pair| pair[1].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_tool_call_goes_out_as_itself_and_without_our_headers() {
    let world = world().await;
    world.harness(vec![testing::intent("1", Channel::Tool, "write", 0)]).await;
    let request = call("tool", "https://tools.world.test/mcp", 1)
        .header("mcp-session-id", "7")
        .header("connection", "x-drop")
        .header("x-drop", "1")
        .header("belay-secret", "1");
    let message = r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"write"}}"#;
    let reply = world.send(request.body(Full::from(message)).unwrap()).await;
    assert_eq!(reply.status(), 200);
    assert_eq!(reply.headers()[wire::UPSTREAM], "198.51.100.20:443");
    assert_eq!(reply.headers()["x-end"], "2");
    assert!(!reply.headers().contains_key("x-hop") && !reply.headers().contains_key(wire::RULE));
    let seen = body(reply).await;
    assert_eq!((&seen["method"], &seen["uri"], &seen["body"]), (&json!("POST"), &json!("/mcp"), &json!(message)));
    assert_eq!(header(&seen, "host"), ["tools.world.test"]);
    assert_eq!(header(&seen, "mcp-session-id"), ["7"]);
    for name in ["authorization", "x-drop", "belay-secret", "belay-target", "belay-intent", "belay-channel"] {
        assert!(header(&seen, name).is_empty(), "{name}: {seen}");
    }
}

/// An intent authorizes one request on every channel.
mod once;
/// Tokens that are bound to pods that belong to no attempt.
mod strangers;

/// Also while the outcome is not in the log yet.
#[tokio::test]
async fn a_call_that_changes_something_is_sent_once() {
    let world = world().await;
    let both = vec![testing::intent("1", Channel::Tool, "write", 0), testing::intent("2", Channel::Tool, "search", 0)];
    world.harness(both).await;
    let message =
        |name: &str| format!(r#"{{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{{"name":"{name}"}}}}"#);
    for (intent, name, expected) in [
        (1, "write", None),
        (1, "write", Some(Rule::IntentMissing)),
        (2, "search", None),
        (2, "search", Some(Rule::IntentMissing)),
    ] {
        let request = call("tool", "https://tools.world.test/mcp", intent).body(Full::from(message(name))).unwrap();
        assert_eq!(rule(&world.send(request).await), expected, "{name}");
    }
}

#[tokio::test]
async fn an_intent_carries_its_own_message_to_an_mcp_server_and_no_other() {
    let world = world().await;
    let read = testing::intent("1", Channel::Tool, "search", 0);
    world.harness(vec![read, testing::intent("2", Channel::Listing, "search", 0)]).await;
    let message = |method: &str, name: &str| {
        json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": {"name": name}}).to_string()
    };
    for (channel, intent, body, expected) in [
        ("tool", 1, message("tools/call", "search"), None),
        ("tool", 1, message("tools/call", "write"), Some(Rule::IntentMissing)),
        ("tool", 1, message("tools/list", ""), Some(Rule::IntentMissing)),
        ("listing", 2, message("tools/list", ""), None),
        ("listing", 2, message("tools/call", "search"), Some(Rule::IntentMissing)),
        ("listing", 1, message("tools/list", ""), Some(Rule::IntentMissing)),
        ("listing", 2, "hello".into(), Some(Rule::Request)),
    ] {
        let request = call(channel, "https://tools.world.test/mcp", intent).body(Full::from(body.clone())).unwrap();
        assert_eq!(rule(&world.send(request).await), expected, "{channel} {intent} {body}");
    }
}

/// Results are stored only if the pack has a state bucket.
#[tokio::test]
async fn what_an_idempotent_call_answered_is_kept_for_the_tasks_own_attempts() {
    let mut world = world().await;
    let of = |name: &str, more: Value| {
        let mut contract = contract(name, "https://tools.world.test/mcp", "write");
        contract["spec"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        contract
    };
    put(&mut world.writers.contracts, of("write", json!({"idempotency": {}})));
    let keep = |intent, result: &str| wire::PutResult { intent, result: result.into() };
    let key = |call: &str| {
        let RecordEvent::Intent(mut intent) = testing::intent(call, Channel::Tool, "write", 0) else { panic!() };
        let digest = intent.request_commitment.as_deref().unwrap_or_default();
        intent.idempotency_key = Some(crate::policy::ledger::made_of(testing::UID, "write", digest));
        RecordEvent::Intent(intent)
    };
    let search = testing::intent("b", Channel::Tool, "search", 0);
    world.harness(vec![key("a"), search]).await;
    let digest = testing::salt().bytes(b"{}");
    let kept = world.post("harness-1", wire::RESULT_PUT, &keep(1, "{}")).await.unwrap();
    assert_eq!(kept["digest"], digest);
    let get = |call: &str, digest: &str| wire::StateRef { call: call.into(), digest: digest.into() };
    let found = world.post("harness-1", wire::RESULT_GET, &get("a", &digest)).await.unwrap();
    assert_eq!(found["result"], "{}");
    for of in [get("b", &digest), get("a", "00"), get("../a", &digest)] {
        let found = world.post("harness-1", wire::RESULT_GET, &of).await;
        assert!(matches!(found, Err(Rule::ToolIdempotency | Rule::Request)), "{of:?}: {found:?}");
    }
    let long = "x".repeat(wire::LONGEST_RESULT + 1);
    for (refused, why) in [(keep(2, "{}"), "a call without a key"), (keep(1, &long), "too long")] {
        assert_eq!(world.post("harness-1", wire::RESULT_PUT, &refused).await, Err(Rule::ToolIdempotency), "{why}");
    }
    let other = world.post("operator", wire::RESULT_GET, &get("a", &digest)).await;
    assert!(other.is_err(), "a result is its task's alone: {other:?}");
    // A task that is not a rollback gets no arguments of compensations.
    let undo = world.post("harness-1", wire::STATE_GET, &get("a", &digest)).await;
    assert_eq!(undo, Err(Rule::ToolRollback));

    let mut pack = pack(2, DIRECT);
    pack["spec"].as_object_mut().unwrap().remove("state");
    put(&mut world.writers.packs, pack);
    let refused = world.post("harness-1", wire::RESULT_PUT, &keep(1, "{}")).await;
    assert_eq!(refused, Err(Rule::ToolIdempotency), "there is no bucket");
}

#[tokio::test]
async fn a_model_call_gets_its_credential_and_the_caller_never_sees_it() {
    let world = world().await;
    let reply = world.say("{}", "body").await;
    assert_eq!(reply.status(), StatusCode::OK);
    let reply = world.say("KEY", "body").await;
    assert_eq!((reply.status(), rule(&reply)), (StatusCode::FORBIDDEN, Some(Rule::UpstreamSecret)));
    // Without its Secret the call does not leave.
    let mut world = world;
    let gone =
        serde_json::from_value(json!({ "metadata": { "namespace": "belay-system", "name": "models" } })).unwrap();
    world.writers.secrets.apply_watcher_event(&Event::Delete(gone));
    let reply = world.say("{}", "body").await;
    assert_eq!((reply.status(), rule(&reply)), (StatusCode::BAD_GATEWAY, Some(Rule::UpstreamCredential)));
}

/// Returns the status and the rule of a reply, the pieces of its body, and whether it ended early.
async fn came(reply: Response<Incoming>) -> (u16, Option<Rule>, Vec<Bytes>, bool) {
    let (status, rule) = (reply.status().as_u16(), rule(&reply));
    let (mut body, mut pieces) = (reply.into_body(), Vec::new());
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => pieces.extend(frame.into_data().ok()),
            Err(_) => return (status, rule, pieces, true),
        }
    }
    (status, rule, pieces, false)
}

#[tokio::test]
async fn a_reply_that_repeats_the_credential_is_withheld_whatever_part_of_it_does() {
    for (say, how) in [
        ("KEY", "body"),
        ("[\"bad key: Bearer KEY\"]", "body"),
        ("KEY", "header"),
        ("KEY", "header's name"),
        ("KEY", "cookie"),
        ("KEY", "location"),
        ("none of it|KEY|KEY", "chunks"),
        ("[\"bad key: KEY\"]", "packed"),
    ] {
        let world = world().await;
        let (status, rule, pieces, _) = came(world.say(say, how).await).await;
        assert_eq!((status, rule), (403, Some(Rule::UpstreamSecret)), "{how}");
        assert!(!String::from_utf8_lossy(&pieces.concat()).contains("sk-live"), "{how}");
        // The control: another text in the same place is passed on.
        let other = say.replace("KEY", "sk-live-9fQ2xZ7b-rT5mK1wF");
        let (status, rule, pieces, broke) = came(world.say(&other, how).await).await;
        assert_eq!((rule, broke), (None, false), "{how}: {status} {pieces:?}");
        eventually(|| world.incidents().iter().any(|i| i["rule"] == "upstream.secret")).await;
    }
    let world = world().await;
    // A reply that cannot be searched is withheld, too. Trailers are not passed on.
    for how in ["gzip", "gzip unsaid"] {
        assert_eq!(rule(&world.say("x", how).await), Some(Rule::UpstreamReply), "{how}");
    }
    let (status, _, pieces, broke) = came(world.say("KEY", "trailer").await).await;
    assert_eq!((status, pieces.concat(), broke), (200, b"{}".to_vec(), false));
    // Events that were passed on cannot be taken back. The stream ends before the credential.
    let (status, _, pieces, broke) = came(world.say("data: a\n\n|data: KEY\n\n|data: b\n\n", "events").await).await;
    assert_eq!((status, pieces.concat(), broke), (200, b"data: a\n\n".to_vec(), true));
}

/// The caller gets all bytes of a reply that have arrived, even if it ends right after them, and over HTTP/2 the reason of the end.
#[tokio::test]
async fn what_came_of_a_reply_that_ends_early_is_passed_on_and_why_it_ended_is_told() {
    let world = world().await;
    for (say, how, expected, ended) in [
        ("data: a\n\n|data: b", "broken events", "data: a\n\ndata: b", Some("broke-off")),
        ("", "broken events", "", Some("broke-off")),
        ("{\"a\":", "broken", "{\"a\":", Some("broke-off")),
        ("data: a\n\n|data: KEY\n\n|data: b\n\n", "events", "data: a\n\n", Some("repeated")),
        // The control: a complete reply.
        ("data: a\n\n|data: b\n\n", "events", "data: a\n\ndata: b\n\n", None),
        ("{}", "body", "{}", None),
    ] {
        let (status, rule, pieces, broke) = came(world.say(say, how).await).await;
        assert_eq!((status, rule), (200, None), "{say} {how}");
        assert_eq!(
            (String::from_utf8_lossy(&pieces.concat()), broke),
            (expected.into(), ended.is_some()),
            "{say} {how}"
        );

        let reply = world.say_over_http2(say, how).await;
        assert_eq!((reply.status(), self::rule(&reply)), (StatusCode::OK, None), "{say} {how}");
        let length = match how {
            "broken" => Some(say.len() + 10),
            "body" => Some(say.len()),
            _ => None,
        };
        let length = length.map(|length| length.to_string());
        assert_eq!(reply.headers().get(wire::LENGTH).map(|of| of.to_str().unwrap().to_owned()), length, "{say} {how}");
        let whole = reply.into_body().collect().await.unwrap();
        let told = whole.trailers().and_then(|trailers| trailers.get(wire::ENDED)?.to_str().ok().map(str::to_owned));
        assert_eq!((told.as_deref(), &*String::from_utf8_lossy(&whole.to_bytes())), (ended, expected), "{say} {how}");
    }
}

/// A pod that could go on to guess a credential gets no more credentials.
#[tokio::test]
async fn a_pod_whose_replies_repeat_a_credential_has_none_any_more() {
    let world = world().await;
    assert_eq!(came(world.say("{}", "body").await).await.0, 200);
    for _ in 0..3 {
        assert_eq!(rule(&world.say("KEY", "body").await), Some(Rule::UpstreamSecret));
    }
    let reply = world.say("{}", "body").await;
    assert_eq!((reply.status(), rule(&reply)), (StatusCode::FORBIDDEN, Some(Rule::UpstreamCredential)));
}

/// Over real sockets, a prompt that contains the beginning of the credential is echoed like any other.
#[tokio::test]
async fn what_begins_like_the_credential_comes_back_as_anything_else() {
    let world = world().await;
    let sizes = async |guess: &str, how: &str| {
        let said = format!("{}{guess}|\n\ndata: [DONE]\n\n", ".".repeat(50));
        let (status, rule, pieces, broke) = came(world.say(&said, how).await).await;
        assert_eq!(pieces.concat(), said.replace('|', "").into_bytes());
        (status, rule, pieces.iter().map(Bytes::len).collect::<Vec<_>>(), broke)
    };
    for length in 1..SECRET.len() {
        let right = &SECRET[..length];
        let wrong = format!("{}~", &SECRET[..length - 1]);
        for how in ["events", "chunks"] {
            assert_eq!(sizes(right, how).await, sizes(&wrong, how).await, "{how} {length}");
        }
    }
}

#[tokio::test]
async fn plain_http_of_the_agent_keeps_its_own_authorization() {
    let world = world().await;
    let mut intent = testing::intent("1", Channel::Egress, "docs.world.test:80", 0);
    let RecordEvent::Intent(of) = &mut intent else { panic!() };
    of.request_commitment = Some(testing::salt().bytes(b""));
    world.harness(vec![intent]).await;
    let mut request = call("egress", "http://docs.world.test/page?x=1", 1).body(Full::default()).unwrap();
    *request.method_mut() = Method::GET;
    request.headers_mut().insert("proxy-authorization", "Bearer harness-1".parse().unwrap());
    request.headers_mut().insert("authorization", "Basic agent".parse().unwrap());
    let seen = body(world.send(request).await).await;
    assert_eq!((&seen["method"], &seen["uri"]), (&json!("GET"), &json!("/page?x=1")));
    assert_eq!(header(&seen, "authorization"), ["Basic agent"]);
    assert!(header(&seen, "proxy-authorization").is_empty());
}

#[tokio::test]
async fn a27_redirects_are_the_callers_to_follow_and_streams_stream() {
    let world = world().await;
    world.harness(direct("docs.world.test:443", 2)).await;
    let reply = world.forward("egress", "https://docs.world.test/redirect", 1).await;
    assert_eq!(
        (reply.status().as_u16(), &reply.headers()["location"]),
        (302, &"http://169.254.169.254/".parse().unwrap())
    );
    let reply = world.forward("egress", "https://docs.world.test/stream", 2).await;
    assert_eq!(reply.headers()["content-type"], "text/event-stream");
    let mut pieces = reply.into_body();
    let first = pieces.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(first, "piece 0\n", "the first piece does not wait for the others");
    assert_eq!(pieces.collect().await.unwrap().to_bytes(), "piece 1\npiece 2\n");
}

#[tokio::test]
async fn what_may_not_leave_does_not() {
    let world = world().await;
    let egress = |call: &str, to: &str| testing::intent(call, Channel::Egress, to, 0);
    world
        .harness(vec![
            testing::intent("1", Channel::Tool, "write", 0),
            egress("2", "evil.world.test:443"),
            egress("3", "mixed.world.test:443"),
            egress("4", "loopback.world.test:443"),
            egress("5", "nowhere.world.test:443"),
            egress("6", "docs.world.test:443"),
        ])
        .await;
    let table = [
        ("tool", "https://evil.world.test/mcp", 1, Rule::EgressHost),
        ("tool", "https://tools.world.test/other", 1, Rule::IntentMissing),
        ("tool", "https://tools.world.test/mcp", 0, Rule::IntentMissing),
        ("tool", "https://tools.world.test/mcp", 7, Rule::IntentMissing),
        ("tool", "https://tools.world.test/mcp", 6, Rule::IntentMissing),
        ("model", "https://tools.world.test/mcp", 1, Rule::EgressHost),
        ("egress", "https://tools.world.test/mcp", 1, Rule::EgressDirect),
        ("egress", "https://evil.world.test/", 2, Rule::EgressHost),
        ("egress", "https://mixed.world.test/", 3, Rule::EgressAddress),
        ("egress", "https://loopback.world.test/", 4, Rule::EgressAddress),
        ("egress", "https://nowhere.world.test/", 5, Rule::UpstreamResolve),
        ("egress", "https://docs.world.test:8443/", 6, Rule::EgressPort),
        ("egress", "https://docs.world.test:7000/", 6, Rule::IntentMissing),
        ("egress", "https://169.254.169.254/", 6, Rule::EgressHost),
        ("egress", "https://docs.world.test@evil.world.test/", 6, Rule::EgressHost),
        ("egress", "docs.world.test", 6, Rule::Request),
        ("other", "https://docs.world.test/", 6, Rule::Request),
    ];
    for (channel, url, intent, expected) in table {
        let reply = world.forward(channel, url, intent).await;
        assert_eq!(rule(&reply), Some(expected), "{channel} {url} {intent}");
        let told = body(reply).await;
        assert_eq!(told["rule"], expected.as_str());
    }
    let twice = call("egress", "https://docs.world.test/", 6).header(wire::TARGET, "https://evil.world.test/");
    assert_eq!(rule(&world.send(twice.body(Full::default()).unwrap()).await), Some(Rule::Request));
    assert!(world.forward("egress", "https://docs.world.test/", 6).await.status().is_success());
    let denied = world.metrics.requests.with_label_values(&["egress", "denied", "egress.address"]).get();
    assert_eq!(denied, 2);
}

#[tokio::test]
async fn a_tightened_pack_tells_at_once() {
    let mut world = world().await;
    world.harness(vec![testing::intent("1", Channel::Egress, "docs.world.test:443", 0)]).await;
    assert!(world.forward("egress", "https://docs.world.test/", 1).await.status().is_success());
    put(&mut world.writers.packs, pack(2, &[]));
    assert_eq!(rule(&world.forward("egress", "https://docs.world.test/", 1).await), Some(Rule::EgressHost));
    // A pack that cannot be decoded counts as absent.
    let broken = json!({ "metadata": { "name": "dev", "uid": "pack", "generation": 3 }, "spec": { "environment": 7 } });
    put(&mut world.writers.packs, broken);
    let reply = world.forward("egress", "https://docs.world.test/", 1).await;
    assert_eq!((reply.status(), rule(&reply)), (StatusCode::SERVICE_UNAVAILABLE, Some(Rule::ConfigDigest)));
}

#[tokio::test]
async fn identity_follows_the_pods() {
    let mut world = world().await;
    world.harness(direct("docs.world.test:443", 3)).await;
    let url = "https://docs.world.test/";
    assert!(world.forward("egress", url, 1).await.status().is_success());
    for token in ["", "Bearer", "Bearer nobody", "Basic harness-1"] {
        let mut request = call("egress", url, 1).body(Full::default()).unwrap();
        request.headers_mut().insert("authorization", token.parse().unwrap());
        assert_eq!(rule(&world.send(request).await), Some(Rule::IdentityToken), "{token:?}");
    }
    let two = call("egress", url, 1).header("authorization", "Bearer harness-1");
    assert_eq!(rule(&world.send(two.body(Full::default()).unwrap()).await), Some(Rule::IdentityToken));
    // The operator's token may only seal logs, and a harness's token may do everything else.
    let mut request = call("egress", url, 1).body(Full::default()).unwrap();
    request.headers_mut().insert("authorization", "Bearer operator".parse().unwrap());
    assert_eq!(rule(&world.send(request).await), Some(Rule::IdentityToken));
    let seal = testing::seal_request();
    assert_eq!(world.post("harness-1", wire::LOG_SEAL, &seal).await, Err(Rule::IdentityToken));

    // A45: a token that is presented from an address that is not its pod's.
    put(&mut world.writers.pods, pod(1, "10.244.0.9"));
    assert_eq!(rule(&world.forward("egress", url, 1).await), Some(Rule::IdentitySource));
    assert_eq!(rule(&world.forward("egress", url, 1).await), Some(Rule::IdentitySource));
    eventually(|| world.incidents().iter().any(|i| i["rule"] == "identity.source")).await;
    let told: Vec<_> = world.incidents().into_iter().filter(|i| i["rule"] == "identity.source").collect();
    assert_eq!(told.len(), 1, "told once");
    assert_eq!((&told[0]["peer"], &told[0]["podUid"]), (&json!("127.0.0.1"), &json!("pod-1")));
    assert!(world.bucket.keys().iter().any(|key| key.starts_with(&format!("team/t/{UID}/incidents/"))));

    // The next attempt shuts out the first, and a deleted pod is not identified any more.
    put(&mut world.writers.pods, pod(1, "127.0.0.1"));
    assert!(world.forward("egress", url, 2).await.status().is_success());
    put(&mut world.writers.pods, pod(2, "127.0.0.1"));
    assert_eq!(rule(&world.forward("egress", url, 1).await), Some(Rule::IdentityAttempt));
    let second = serde_json::from_value(pod(2, "127.0.0.1")).unwrap();
    world.writers.pods.apply_watcher_event(&Event::Delete(second));
    assert!(world.forward("egress", url, 3).await.status().is_success());
    let mut ending = pod(1, "127.0.0.1");
    ending["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    put(&mut world.writers.pods, ending);
    assert_eq!(rule(&world.forward("egress", url, 1).await), Some(Rule::IdentityAttempt));
    let first = serde_json::from_value(pod(1, "127.0.0.1")).unwrap();
    world.writers.pods.apply_watcher_event(&Event::Delete(first));
    assert_eq!(rule(&world.forward("egress", url, 1).await), Some(Rule::IdentityToken));
    assert_eq!(world.api.reviews.load(Ordering::SeqCst), 3, "one review a token, however often it comes");
}

#[tokio::test]
async fn a_run_is_sealed_and_its_usage_told_twice_at_most() {
    let world = world().await;
    let search = |call: &str| testing::intent(call, Channel::Tool, "search", 0);
    let mut harness = world.harness(vec![search("1")]).await;
    for call in ["2", "3"] {
        let request = harness.next(vec![search(call)]);
        world.post("harness-1", wire::LOG_APPEND, &request).await.unwrap();
    }
    eventually(|| !world.api.usage.lock().unwrap().is_empty()).await;
    let sealed = world.post("operator", wire::LOG_SEAL, &testing::seal_request()).await.unwrap();
    assert_eq!(sealed["usage"]["toolCalls"], 3);
    assert_eq!(sealed["location"], format!("s3://evidence/team/t/{UID}/"));
    let usage = world.api.usage.lock().unwrap().clone();
    assert_eq!(usage.iter().map(|u| u.tool_calls).collect::<Vec<_>>(), [2, 3]);
    let late = harness.next(vec![testing::denied()]);
    assert_eq!(world.post("harness-1", wire::LOG_APPEND, &late).await, Err(Rule::TaskClosed));
    assert_eq!(rule(&world.forward("tool", "https://tools.world.test/mcp", 3).await), Some(Rule::TaskClosed));
    let open = OpenRequest { attempt: 1, policy_digest: "00".into() };
    assert_eq!(world.post("harness-1", wire::LOG_OPEN, &open).await, Err(Rule::ConfigDigest));
}

#[tokio::test]
async fn tunnels_carry_bytes_and_on_443_only_tls_for_their_host() {
    let world = world().await;
    let egress = |call: &str, to: &str| testing::intent(call, Channel::Egress, to, 0);
    world
        .harness(vec![
            egress("1", "docs.world.test:7000"),
            egress("2", "docs.world.test:443"),
            egress("3", "mixed.world.test:443"),
            testing::intent("4", Channel::Tool, "write", 0),
            egress("5", "docs.world.test:443"),
            egress("6", "docs.world.test:443"),
            egress("7", "docs.world.test:443"),
        ])
        .await;
    let mut tunnel = world.tunnel("docs.world.test:7000", 1).await.unwrap();
    tunnel.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    tunnel.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"hello");
    assert_eq!(world.metrics.tunnels.get(), 1);
    drop(tunnel);
    eventually(|| world.metrics.tunnels.get() == 0).await;

    // TLS is end to end: the gateway sees only the ClientHello.
    let agent = |name: &'static str| {
        let config = rustls::ClientConfig::builder().with_root_certificates(world.ca.clone()).with_no_client_auth();
        (TlsConnector::from(Arc::new(config)), ServerName::try_from(name).unwrap())
    };
    let (tls, name) = agent("docs.world.test");
    let tunnel = world.tunnel("docs.world.test:443", 2).await.unwrap();
    let mut stream = tls.connect(name, tunnel).await.unwrap();
    stream.write_all(b"GET /page HTTP/1.1\r\nhost: docs.world.test\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut page = String::new();
    let _ = stream.read_to_string(&mut page).await;
    assert!(page.starts_with("HTTP/1.1 200"), "{page}");

    // A37: another name. A39, A40: not TLS. None of the bytes reaches the upstream.
    let (tls, name) = agent("models.world.test");
    let tunnel = world.tunnel("docs.world.test:443", 5).await.unwrap();
    assert!(tls.connect(name, tunnel).await.is_err());
    for (intent, bytes) in
        [(6, "GET / HTTP/1.1\r\nhost: docs.world.test\r\n\r\n"), (7, "CONNECT evil.world.test:443 HTTP/1.1\r\n\r\n")]
    {
        let mut tunnel = world.tunnel("docs.world.test:443", intent).await.unwrap();
        tunnel.write_all(bytes.as_bytes()).await.unwrap();
        let mut back = Vec::new();
        let _ = tunnel.read_to_end(&mut back).await;
        assert!(back.is_empty(), "{back:?}");
    }
    eventually(|| world.incidents().iter().any(|i| i["rule"] == "egress.host")).await;

    for (to, intent, expected) in [
        ("mixed.world.test:443", 3, Rule::EgressAddress),
        ("docs.world.test:443", 1, Rule::IntentMissing),
        ("docs.world.test:22", 1, Rule::EgressPort),
        ("tools.world.test:443", 4, Rule::EgressDirect),
        ("evil.world.test:443", 2, Rule::EgressHost),
        ("2130706433:443", 2, Rule::EgressHost),
        ("[::1]:443", 2, Rule::EgressHost),
        ("docs.world.test:0", 2, Rule::EgressPort),
    ] {
        assert_eq!(world.tunnel(to, intent).await.err(), Some(expected), "{to}");
    }
}

#[tokio::test]
async fn a_tunnel_ends_with_its_pod_and_with_its_permission() {
    let mut world = world().await;
    world.harness(direct("docs.world.test:7000", 2)).await;
    for (intent, change) in
        (1..).zip([(|world: &mut World| put(&mut world.writers.packs, pack(2, &[]))) as fn(&mut World), |world| {
            let pod = serde_json::from_value(pod(1, "127.0.0.1")).unwrap();
            world.writers.pods.apply_watcher_event(&Event::Delete(pod));
        }])
    {
        put(&mut world.writers.packs, pack(3, DIRECT));
        let mut tunnel = world.tunnel("docs.world.test:7000", intent).await.unwrap();
        tunnel.write_all(b"x").await.unwrap();
        tunnel.read_exact(&mut [0]).await.unwrap();
        change(&mut world);
        let ended = tokio::time::timeout(Duration::from_secs(10), tunnel.read(&mut [0])).await;
        assert!(matches!(ended, Ok(Ok(0) | Err(_))), "{ended:?}");
    }
}

/// Sends raw bytes to the gateway and returns the reply.
async fn raw(world: &World, bytes: &[u8]) -> String {
    let mut stream = world.connect("http/1.1").await;
    stream.write_all(bytes).await.unwrap();
    let mut back = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut back)).await;
    String::from_utf8_lossy(&back).into_owned()
}

#[tokio::test]
async fn malformed_connects_are_refused() {
    let world = world().await;
    world.harness(vec![testing::intent("1", Channel::Egress, "docs.world.test:443", 0)]).await;
    let head =
        "proxy-authorization: Bearer harness-1\r\nbelay-channel: egress\r\nbelay-intent: 1\r\nconnection: close\r\n";
    for (name, line, host) in [
        ("A28 NUL", "docs.world.test\0.evil.test:443", ""),
        ("A28 percent", "docs.world.test%00.evil.test:443", ""),
        ("A31 userinfo", "docs.world.test@evil.test:443", ""),
        ("A32 zone", "[fe80::1%25eth0]:443", ""),
        ("A33 two ports", "docs.world.test:443:22", ""),
        ("A33 no port", "docs.world.test", ""),
        ("A33 large port", "docs.world.test:65979", ""),
        ("A34 two Hosts", "docs.world.test:443", "host: docs.world.test:443\r\nhost: evil.test:443\r\n"),
        ("A34 folded Host", "docs.world.test:443", "host: docs.world.test\r\n :443\r\n"),
        ("A35 another Host", "docs.world.test:443", "host: evil.test:443\r\n"),
        ("absolute form", "http://docs.world.test:443/", ""),
    ] {
        let reply = raw(&world, format!("CONNECT {line} HTTP/1.1\r\n{host}{head}\r\n").as_bytes()).await;
        assert!(reply.starts_with("HTTP/1.1 40"), "{name}: {reply}");
    }
    // What the library rejected before there was a request is counted and reported.
    let misheard = world.metrics.requests.with_label_values(&["other", "denied", "request.malformed"]);
    eventually(|| misheard.get() >= 3).await;
    let told = |incident: &Value| incident["rule"] == "request.malformed";
    eventually(|| world.incidents().iter().any(told)).await;
    // A58: a head that is too long.
    let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(200 << 10));
    let reply = raw(&world, long.as_bytes()).await;
    assert!(reply.is_empty() || reply.starts_with("HTTP/1.1 4"), "{reply}");
}

#[tokio::test]
async fn http2_works_and_one_pod_has_its_share() {
    let world = world().await;
    let most = u64::try_from(CALLS).unwrap();
    world.harness(direct("docs.world.test:7000", most + 1)).await;
    let mut tunnels = Vec::new();
    for intent in 1..=most {
        tunnels.push(world.tunnel("docs.world.test:7000", intent).await.unwrap());
    }
    assert_eq!(world.tunnel("docs.world.test:7000", most + 1).await.err(), Some(Rule::Busy));
    drop(tunnels.pop());
    eventually(|| world.metrics.tunnels.get() < i64::try_from(CALLS).unwrap()).await;

    let io = TokioIo::new(world.connect("h2").await);
    let builder = hyper::client::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
    let (mut sender, connection) = builder.handshake(io).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post(format!("https://{}{}", wire::SERVER_NAME, wire::LOG_OPEN))
        .header("authorization", "Bearer harness-1")
        .body(Full::<Bytes>::from(r#"{"attempt":1,"policyDigest":"","unknown":1}"#))
        .unwrap();
    let reply = sender.send_request(request).await.unwrap();
    assert_eq!(rule(&reply), Some(Rule::Request), "unknown fields are refused");
}
