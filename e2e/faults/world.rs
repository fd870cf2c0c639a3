//! A world: a store, a gateway and a harness, relays between them, a name server, an upstream that counts, and an agent.
//!
//! ```text
//! agent ─▶ harness ─▶ log (relay) ─▶ gateway ─▶ store (relay) ─▶ versitygw
//!                                       └─────▶ upstream
//! ```

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{Router, routing::any};
use belay::{
    api::{AgentTask, PolicyPack, ToolContract},
    evidence::{
        note::{self, Signer, VerifierKey, WITNESS_NAME},
        record::{Containment, TaskClosed},
        store::s3::{Options, S3},
    },
    policy::config::{HarnessConfig, Probe, Wiring},
    render::task::render_policy,
    seal,
    wire::{self, SealReply, SealRequest},
};
use hickory_resolver::proto::{
    op::{Message, MessageType},
    rr::{RData, Record, RecordType},
};
use rmcp::{
    RoleClient, ServiceExt,
    model::{CallToolRequestParams, ContentBlock},
    service::RunningService,
    transport::StreamableHttpClientTransport,
};
use serde_json::{Value, json};
use tokio::{
    net::{TcpStream, UdpSocket},
    time::Instant,
};

use super::{
    api,
    process::Process,
    relay::{Relay, STORE, Tls},
    upstream::{self, Effects},
};

const fn port(port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// The addresses in each world.
const API: SocketAddr = port(6443);
const DNS: SocketAddr = port(5353);
const S3: SocketAddr = port(7070);
const S3_WIRE: SocketAddr = port(7071);
const STS: SocketAddr = port(7072);
const GATEWAY: SocketAddr = port(8443);
const GATEWAY_WIRE: SocketAddr = port(8445);
const SILENT: SocketAddr = port(9);
const HARNESS: SocketAddr = belay::harness::server::AGENT;
/// The store's access key and region, as environment variables of each world.
pub const KEYS: [(&str, &str); 3] =
    [("AWS_ACCESS_KEY_ID", "belay-root"), ("AWS_SECRET_ACCESS_KEY", "belay-secret"), ("AWS_REGION", "us-east-1")];
/// The gateway's web identity token if it has no access key, and the role that it assumes with the token.
const IDENTITY: &str = "the-gateway";
const ROLE: &str = "arn:aws:iam::000000000000:role/belay-gateway";
/// The path of Debian's library that changes clocks.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";
/// The time limit for the start of a process.
const START: Duration = Duration::from_secs(60);

/// The settings of a world that differ from the ordinary.
#[derive(Default)]
pub struct Setting {
    /// The fault that strace injects into system calls of the first harness on its spool, such as `write:signal=KILL:when=3`.
    pub inject: Option<String>,
    /// The size in bytes of a small file system for the spool. It also has few inodes.
    pub spool: Option<u64>,
    /// The spool is lost with each harness, as it is lost with a pod.
    pub forgets: bool,
    /// The clocks of gateway and harness can be changed.
    pub clocks: bool,
    /// The gateway uses the store as it uses AWS: the bucket is in the host name, and the credentials come from a web identity.
    pub as_aws: bool,
}

/// The answer to the agent's call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// The result.
    Result(String),
    /// Belay denied the call or does not know its outcome: the rule, and the whole text.
    Refused(String, String),
    /// The connection broke.
    Nothing,
}

/// A call as the agent made it.
#[derive(Clone, Debug)]
pub struct Call {
    /// The tool.
    pub tool: String,
    /// Its arguments.
    pub args: Value,
    /// The answer.
    pub told: Told,
}

type Client = RunningService<RoleClient, ()>;

/// A world of one story.
pub struct World {
    /// The calls that took effect.
    pub effects: Effects,
    /// The relay between gateway and store.
    pub store: Relay,
    /// The relay between harness and gateway.
    pub log: Relay,
    /// The store.
    pub s3: Process,
    /// The gateway.
    pub gateway: Process,
    /// The harness.
    pub harness: Process,
    /// The spool's folder.
    pub spool: PathBuf,
    /// Whether the spool is lost with each harness.
    pub forgets: bool,
    /// The witness's public key.
    pub witness: VerifierKey,
    ca: String,
    folder: tempfile::TempDir,
    client: tokio::sync::Mutex<Option<Arc<Client>>>,
    calls: Mutex<Vec<Call>>,
    n: AtomicU64,
}

impl World {
    /// Starts a world without gateway and harness; [`World::begin`] starts these.
    pub async fn new(setting: Setting) -> Self {
        run("ip", &["link", "set", "lo", "up"]);
        run("ip", &["address", "add", &format!("{}/32", upstream::ADDRESS), "dev", "lo"]);
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let (ca, tls) = certified(&at("tls"));
        let spool = at("spool");
        std::fs::create_dir(&spool).unwrap();
        if let Some(size) = setting.spool {
            let size = format!("size={size},nr_inodes=32");
            run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", &text(&spool)]);
        }
        let key = note::generate_pkcs8().unwrap();
        std::fs::write(at("witness.pk8"), &key).unwrap();
        configure(folder.path(), &ca);

        let listener = tokio::net::TcpListener::bind(API).await.unwrap();
        tokio::spawn(async move { axum::serve(listener, Router::new().fallback(any(api::answer))).await });
        tokio::spawn(names());
        if setting.as_aws {
            name_the_store(folder.path());
            std::fs::write(at("identity"), IDENTITY).unwrap();
            tokio::spawn(identities());
        }
        let s3 = versitygw(folder.path());
        s3.keep();
        buckets().await;
        let store = Relay::start(S3_WIRE, S3, None).await;
        let log = Relay::start(GATEWAY_WIRE, GATEWAY, Some(tls)).await;
        Self {
            effects: Effects::start(spool.join("segments.jsonl")).await,
            store,
            log,
            s3,
            gateway: gateway(folder.path(), &setting),
            forgets: setting.forgets,
            harness: harness(folder.path(), &spool, setting),
            spool,
            witness: Signer::from_pkcs8(WITNESS_NAME, &key).unwrap().verifier(),
            ca,
            folder,
            client: tokio::sync::Mutex::default(),
            calls: Mutex::default(),
            n: AtomicU64::new(0),
        }
    }

    /// Starts a world with the default settings, with gateway and harness.
    pub async fn begun() -> Self {
        let world = Self::new(Setting::default()).await;
        world.begin();
        world
    }

    /// Starts gateway and harness.
    pub fn begin(&self) {
        self.gateway.keep();
        self.harness.keep();
    }

    /// Returns a number that no call has had.
    pub fn n(&self) -> u64 {
        self.n.fetch_add(1, Ordering::SeqCst)
    }

    /// Makes a call, as an agent that waits for its harness.
    pub async fn call(&self, tool: &str, args: Value) -> Told {
        let client = self.client().await;
        let mut params = CallToolRequestParams::new(tool.to_owned());
        params.arguments = args.as_object().cloned();
        let told = match client.call_tool(params).await {
            Ok(result) => {
                let said: Vec<_> = result.content.iter().filter_map(ContentBlock::as_text).collect();
                let said = said.first().map(|block| block.text.clone()).unwrap_or_default();
                let refused = said.strip_prefix("Belay ").and_then(|said| said.split_once(" this call. rule: "));
                match refused.and_then(|(_, said)| said.split_once(". ")) {
                    Some((rule, _)) => Told::Refused(rule.to_owned(), said),
                    None => Told::Result(said),
                }
            }
            Err(_) => {
                *self.client.lock().await = None;
                Told::Nothing
            }
        };
        self.calls.lock().unwrap().push(Call { tool: tool.to_owned(), args, told: told.clone() });
        told
    }

    /// Returns the agent's MCP client. After a call without an answer this is a new client, as soon as a harness listens.
    async fn client(&self) -> Arc<Client> {
        let mut known = self.client.lock().await;
        let started = Instant::now();
        loop {
            if let Some(client) = &*known {
                return client.clone();
            }
            // It is costly to create a client, so a plain connection shows first whether a harness listens.
            if TcpStream::connect(HARNESS).await.is_ok() {
                let transport = StreamableHttpClientTransport::from_uri(format!("http://{HARNESS}/mcp"));
                *known = ().serve(transport).await.ok().map(Arc::new);
            } else {
                assert!(started.elapsed() < START, "no harness listens");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// Makes calls of a tool with different numbers until one has a result.
    pub async fn insist(&self, tool: &str) -> String {
        for _ in 0..20 {
            if let Told::Result(said) = self.call(tool, json!({"n": self.n()})).await {
                return said;
            }
        }
        panic!("no call of {tool} was answered: {:#?}", self.calls());
    }

    /// Makes the calls that the agent makes in most stories.
    pub async fn work(&self) {
        self.insist("look").await;
        self.insist("note").await;
        self.insist("say").await;
        let order = json!({"order": "7"});
        self.call("pay", order.clone()).await;
        self.call("pay", order).await;
        self.call("nothing", json!({})).await;
        tokio::join!(self.insist("look"), self.insist("note"));
    }

    /// Returns all calls so far.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    /// Ends the harness, as after the end of its agent, and has the log sealed, as the operator does.
    pub async fn end(&self) -> SealReply {
        self.harness.end().await;
        let operator = seal::Gateway::new(GATEWAY.to_string(), self.folder.path().join("operator"), &self.ca).unwrap();
        let request = SealRequest {
            namespace: "team".into(),
            name: "t".into(),
            uid: api::UID.into(),
            attempt: 1,
            bucket: api::EVIDENCE.into(),
            prefix: String::new(),
            closed: TaskClosed {
                phase: "Succeeded".into(),
                failure_class: String::new(),
                reason: "Completed".into(),
                exit_code: Some(0),
                images: Default::default(),
            },
            presumed: false,
        };
        let started = Instant::now();
        loop {
            match operator.seal(&request).await {
                Ok(sealed) => return sealed,
                Err(error) => assert!(started.elapsed() < START, "the log is not sealed: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Returns a client of a bucket that does not use the relay.
    pub async fn bucket(&self, name: &str) -> S3 {
        bucket(name).await
    }

    /// Changes the clock of gateway or harness by an offset: `+1y`, `-1y`.
    pub fn clock(&self, whose: &str, offset: &str) {
        move_clock(self.folder.path(), whose, offset);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (name, process) in [("versitygw", &self.s3), ("gateway", &self.gateway), ("harness", &self.harness)] {
                eprintln!("--- {name}, started {} times:\n{}", process.starts(), process.said());
            }
            for exchange in self.store.seen() {
                let done = exchange.told.is_some();
                eprintln!("store {} {} {} {done}", exchange.number, exchange.method, exchange.path);
            }
        }
        for process in [&self.harness, &self.gateway, &self.s3] {
            process.stop();
        }
        // The folder of the world cannot be removed while the spool's file system is mounted.
        let _ = Command::new("umount").arg(&self.spool).stderr(std::process::Stdio::null()).status();
    }
}

fn run(program: &str, args: &[&str]) {
    let done = Command::new(program).args(args).output().unwrap();
    assert!(done.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Creates the gateway's certificate in its folder, and returns it with both sides of TLS for the relay.
fn certified(folder: &Path) -> (String, Tls) {
    let certified = rcgen::generate_simple_self_signed([wire::SERVER_NAME.to_owned()]).unwrap();
    std::fs::create_dir(folder).unwrap();
    std::fs::write(folder.join("tls.crt"), certified.cert.pem()).unwrap();
    std::fs::write(folder.join("tls.key"), certified.signing_key.serialize_pem()).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
    let server = rustls::ServerConfig::builder().with_no_client_auth();
    let mut server = server.with_single_cert(vec![certified.cert.der().clone()], key).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certified.cert.der().clone()).unwrap();
    let mut client = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    server.alpn_protocols = vec![b"h2".to_vec()];
    client.alpn_protocols = vec![b"h2".to_vec()];
    (certified.cert.pem(), (Arc::new(server).into(), Arc::new(client).into()))
}

/// Writes the files of gateway, harness and operator.
fn configure(folder: &Path, ca: &str) {
    let write = |name: &str, content: String| std::fs::write(folder.join(name), content).unwrap();
    api::TOKENS.iter().for_each(|token| write(token, (*token).to_owned()));
    write("kubeconfig", kubeconfig());
    let task: AgentTask = serde_json::from_value(api::task()).unwrap();
    let pack: PolicyPack = serde_json::from_value(api::pack()).unwrap();
    let contracts: Vec<ToolContract> =
        api::contracts().into_iter().map(|contract| serde_json::from_value(contract).unwrap()).collect();
    // The operator renders the policy in the same way.
    let policy = render_policy(&task, &contracts, &pack).unwrap();
    let probe = Probe { reachable: GATEWAY_WIRE.to_string(), unreachable: vec![SILENT.to_string()] };
    let containment = Containment {
        contained: true,
        rounds: 3,
        millis: 1,
        reachable: probe.reachable.clone(),
        unreachable: probe.unreachable.clone(),
        breaches: vec![],
    };
    let wiring = Wiring { attempt: 1, gateway: GATEWAY_WIRE.to_string(), gateway_ca: ca.to_owned(), probe };
    write("config.json", serde_json::to_string(&HarnessConfig { policy, wiring }).unwrap());
    write("containment.json", serde_json::to_string(&containment).unwrap());
    for whose in ["gateway", "harness"] {
        move_clock(folder, whose, "+0");
    }
}

fn kubeconfig() -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "world",
        "clusters": [{"name": "world", "cluster": {"server": format!("http://{API}")}}],
        "contexts": [{"name": "world", "context": {"cluster": "world", "user": "gateway"}}],
        "users": [{"name": "gateway", "user": {}}],
    })
    .to_string()
}

fn clock_of(folder: &Path, whose: &str) -> PathBuf {
    folder.join(format!("{whose}.clock"))
}

fn move_clock(folder: &Path, whose: &str, offset: &str) {
    // The file is replaced by a rename, because the processes read it all the time.
    let (at, new) = (clock_of(folder, whose), folder.join("clock.new"));
    std::fs::write(&new, format!("{offset}\n")).unwrap();
    std::fs::rename(new, at).unwrap();
}

/// Makes a process take its clock from the file. The monotonic clock is not changed, as on a real machine.
fn with_clock(command: &mut Command, clock: &Path) {
    command.env("LD_PRELOAD", FAKETIME).env("FAKETIME_TIMESTAMP_FILE", clock);
    for (name, value) in [("FAKETIME_NO_CACHE", "1"), ("FAKETIME_DONT_FAKE_MONOTONIC", "1"), ("NO_FAKE_STAT", "1")] {
        command.env(name, value);
    }
}

fn gateway(folder: &Path, setting: &Setting) -> Process {
    let (folder, clocks, as_aws) = (folder.to_owned(), setting.clocks, setting.as_aws);
    Process::new(folder.join("gateway.log"), move |_| {
        let at = |name: &str| text(&folder.join(name));
        let mut command = Command::new(env!("CARGO_BIN_EXE_belay-gateway"));
        for (flag, value) in [
            ("--listen", GATEWAY.to_string()),
            ("--canary-listen", port(8444).to_string()),
            ("--admin-listen", port(8080).to_string()),
            ("--tls-dir", at("tls")),
            ("--witness-key", at("witness.pk8")),
            ("--nameserver", DNS.to_string()),
        ] {
            command.args([flag, &value]);
        }
        command.env("KUBECONFIG", at("kubeconfig"));
        if as_aws {
            command.args(["--s3-endpoint", &format!("http://{STORE}:{}", S3_WIRE.port())]);
            command.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY");
            command.env("AWS_WEB_IDENTITY_TOKEN_FILE", at("identity")).env("AWS_ROLE_ARN", ROLE);
            command.env("AWS_ENDPOINT_URL_STS", format!("http://{STS}"));
        } else {
            command.args(["--s3-path-style", "--s3-endpoint", &format!("http://{S3_WIRE}")]);
        }
        if clocks {
            with_clock(&mut command, &clock_of(&folder, "gateway"));
        }
        command
    })
}

fn harness(folder: &Path, spool: &Path, setting: Setting) -> Process {
    let (folder, spool) = (folder.to_owned(), spool.to_owned());
    Process::new(folder.join("harness.log"), move |starts| {
        let at = |name: &str| text(&folder.join(name));
        if setting.forgets {
            let _ = std::fs::remove_file(spool.join("segments.jsonl"));
        }
        let program = env!("CARGO_BIN_EXE_belay-harness");
        let mut command = match &setting.inject {
            Some(inject) if starts == 0 => {
                let mut command = Command::new("strace");
                // With `-D` the harness is this process's child, as it is without strace.
                command.args(["-D", "-q", "-o", "/dev/null"]);
                let calls = inject.split(':').next().unwrap_or_default();
                for file in ["segments.jsonl", "segments.new"] {
                    command.args(["-P", &text(&spool.join(file))]);
                }
                command.args(["-e", &format!("trace={calls}"), "-e", &format!("inject={inject}"), program]);
                command
            }
            _ => Command::new(program),
        };
        command.arg("serve").args(["--pod-name", "t-1", "--pod-uid", "pod-1", "--node-name", "node"]);
        for (flag, value) in [
            ("--config", at("config.json")),
            ("--containment", at("containment.json")),
            ("--token", at("harness")),
            ("--spool", text(&spool)),
        ] {
            command.args([flag, &value]);
        }
        if setting.clocks {
            with_clock(&mut command, &clock_of(&folder, "harness"));
        }
        command
    })
}

fn versitygw(folder: &Path) -> Process {
    let cache =
        std::env::var("BELAY_CACHE").unwrap_or_else(|_| format!("{}/.cache/belay", std::env::var("HOME").unwrap()));
    let (data, versions) = (folder.join("s3"), folder.join("versions"));
    for folder in [&data, &versions] {
        std::fs::create_dir(folder).unwrap();
    }
    let [(_, access), (_, secret), (_, region)] = KEYS;
    Process::new(folder.join("versitygw.log"), move |_| {
        let mut command = Command::new(format!("{cache}/bin/versitygw"));
        command.args(["--port", &S3.to_string(), "--region", region, "--quiet"]);
        command.args(["--virtual-domain", STORE, "posix", "--versioning-dir"]);
        command.arg(&versions).arg(&data).env("ROOT_ACCESS_KEY", access).env("ROOT_SECRET_KEY", secret);
        command
    })
}

async fn bucket(name: &str) -> S3 {
    let endpoint = Some(format!("http://{S3}"));
    let options = Options { bucket: name.into(), endpoint, path_style: true, ..Options::default() };
    S3::connect(options).await.unwrap()
}

/// Creates both buckets as soon as the store answers.
async fn buckets() {
    let [(_, access), (_, secret), (_, region)] = KEYS;
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(aws_sdk_s3::config::BehaviorVersion::latest())
        .region(aws_sdk_s3::config::Region::new(region))
        .endpoint_url(format!("http://{S3}"))
        .credentials_provider(aws_sdk_s3::config::Credentials::new(access, secret, None, None, "world"))
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .force_path_style(true)
        .build();
    let client = aws_sdk_s3::Client::from_conf(config);
    let started = Instant::now();
    for (name, locks) in [(api::EVIDENCE, true), (api::STATE, false)] {
        while let Err(error) = client.create_bucket().bucket(name).object_lock_enabled_for_bucket(locks).send().await {
            assert!(started.elapsed() < START, "no store: {error:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Gives names to the store and its buckets, in this world's own hosts file.
fn name_the_store(folder: &Path) {
    let names = [String::new(), format!("{}.", api::EVIDENCE), format!("{}.", api::STATE)].map(|bucket| bucket + STORE);
    let hosts = folder.join("hosts");
    std::fs::write(&hosts, format!("127.0.0.1 localhost {}\n", names.join(" "))).unwrap();
    run("mount", &["--bind", &text(&hosts), "/etc/hosts"]);
}

/// Serves AWS STS: for the gateway's token and role it returns the store's own access key, which is valid without a session.
async fn identities() {
    let answer = async |form: String| {
        let [(_, access), (_, secret), _] = KEYS;
        let has = |name: &str, value: &str| form.split('&').any(|part| part == format!("{name}={value}"));
        let role = ROLE.replace(':', "%3A").replace('/', "%2F");
        if !has("Action", "AssumeRoleWithWebIdentity") || !has("RoleArn", &role) || !has("WebIdentityToken", IDENTITY) {
            return (http::StatusCode::FORBIDDEN, String::new());
        }
        let keys = format!(
            "<AccessKeyId>{access}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey>\
             <SessionToken></SessionToken><Expiration>2100-01-01T00:00:00Z</Expiration>"
        );
        let action = "AssumeRoleWithWebIdentity";
        let space = "https://sts.amazonaws.com/doc/2011-06-15/";
        let body = format!(
            "<{action}Response xmlns=\"{space}\"><{action}Result><Credentials>{keys}</Credentials></{action}Result></{action}Response>"
        );
        (http::StatusCode::OK, body)
    };
    let listener = tokio::net::TcpListener::bind(STS).await.unwrap();
    axum::serve(listener, Router::new().fallback(any(answer))).await.unwrap();
}

/// Serves DNS: every name has the address of the upstream.
async fn names() {
    let socket = UdpSocket::bind(DNS).await.unwrap();
    let mut buffer = [0; 1500];
    while let Ok((read, peer)) = socket.recv_from(&mut buffer).await {
        let mut message = Message::from_vec(&buffer[..read]).unwrap();
        message.metadata.message_type = MessageType::Response;
        let query = message.queries[0].clone();
        if query.query_type() == RecordType::A {
            message.answers.push(Record::from_rdata(query.name().clone(), 60, RData::A(upstream::ADDRESS.into())));
        }
        let _ = socket.send_to(&message.to_vec().unwrap(), peer).await;
    }
}
