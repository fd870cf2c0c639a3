//! The gateway for [`super`]: the real service, witness, dialer and listener, in a process of its own. The objects of the cluster are in
//! memory, any token is accepted, and the one public name resolves to an address that is connected to loopback.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex},
};

use anyhow::{Context, anyhow};
use belay::{
    api::{AgentTask, ApprovalRequest},
    evidence::{
        note::{self, Signer, WITNESS_NAME},
        record::Containment,
        store::{Store, StoreError, dir::Dir, s3},
    },
    gateway::{
        approvals::Create,
        buckets::Buckets,
        cluster::{Cluster, Fetch, Stores},
        dial::{Connect, Dialer, roots},
        identity::{
            HarnessIdentity, Standing,
            reviews::{Review, Reviews},
        },
        incidents::Incidents,
        listen,
        metrics::Metrics,
        resolve::Resolve,
        service::{Gateway, Parts},
        state::StateStore,
        usage::{UsageStatus, WriteUsage},
        witness::Witness,
    },
    lenient::Lenient,
    policy::{
        config::{HarnessConfig, Probe, Usage, Wiring},
        egress::Blocked,
        hostname::Hostname,
    },
    render::names,
    wire,
};
use futures::future::BoxFuture;
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewStatus, UserInfo},
    core::v1::Pod,
};
use kube::runtime::{reflector::store::Writer, watcher::Event};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

const UID: &str = "6f9c3c1e-0000-4000-8000-0000000000be";
const POD: &str = "bench-1";
/// The address to which the one public name resolves.
const OUTSIDE: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 20));

/// An API server that only reviews tokens.
struct Api;

impl Review for Api {
    fn review(&self, _: TokenReview) -> BoxFuture<'_, Result<TokenReviewStatus, String>> {
        let extra = [("pod-name", POD), ("pod-uid", POD)]
            .map(|(key, value)| (format!("authentication.kubernetes.io/{key}"), vec![value.to_owned()]));
        let username = Some("system:serviceaccount:team:default".into());
        let status = TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec![wire::AUDIENCE.into()]),
            user: Some(UserInfo { username, extra: Some(extra.into()), ..UserInfo::default() }),
            error: None,
        };
        Box::pin(async move { Ok(status) })
    }
}

impl Fetch for Api {
    fn pod<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<Option<Pod>, String>> {
        Box::pin(async { Ok(None) })
    }

    fn task<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<Option<AgentTask>, String>> {
        Box::pin(async { Ok(None) })
    }
}

impl WriteUsage for Api {
    fn write<'a>(&'a self, _: &'a str, _: &'a str, _: &'a str, _: Usage) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async { Ok(()) })
    }
}

impl Create for Api {
    fn create(&self, _: String, _: ApprovalRequest) -> BoxFuture<'_, Result<ApprovalRequest, String>> {
        Box::pin(async { Err("nobody is there".into()) })
    }
}

/// The internet: one name, one address and one server.
struct Internet(SocketAddr);

impl Resolve for Internet {
    fn addresses<'a>(&'a self, _: &'a Hostname) -> BoxFuture<'a, Result<Vec<IpAddr>, String>> {
        Box::pin(async { Ok(vec![OUTSIDE]) })
    }
}

impl Connect for Internet {
    fn connect(&self, _: SocketAddr) -> BoxFuture<'_, std::io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(self.0))
    }
}

/// A real S3 if there is one, else a folder whose files are synced.
struct Bucket(Mutex<HashMap<String, Arc<dyn Store>>>, std::path::PathBuf);

impl Buckets for Bucket {
    fn bucket<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Arc<dyn Store>, StoreError>> {
        Box::pin(async move {
            if let Some(known) = self.0.lock().ok().and_then(|known| known.get(name).cloned()) {
                return Ok(known);
            }
            let store: Arc<dyn Store> = match self.endpoint() {
                Some(endpoint) => {
                    let ca = std::env::var("S3_CA").ok().and_then(|file| std::fs::read(file).ok());
                    let (bucket, endpoint) = (name.to_owned(), Some(endpoint));
                    let options = s3::Options { bucket, endpoint, path_style: true, ca, ..s3::Options::default() };
                    let unreachable = |e: s3::OptionsError| StoreError::Unavailable {
                        action: "reach",
                        key: String::new(),
                        place: name.to_owned(),
                        detail: e.to_string(),
                    };
                    Arc::new(s3::S3::connect(options).await.map_err(unreachable)?)
                }
                None => Arc::new(Dir::new(&self.1)),
            };
            if let Ok(mut known) = self.0.lock() {
                known.insert(name.to_owned(), store.clone());
            }
            Ok(store)
        })
    }

    fn endpoint(&self) -> Option<String> {
        std::env::var("S3_ENDPOINT").ok()
    }
}

fn store<K>(objects: &[Value]) -> anyhow::Result<kube::runtime::reflector::Store<Lenient<K>>>
where
    K: kube::Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + 'static,
{
    let mut writer = Writer::default();
    for object in objects {
        writer.apply_watcher_event(&Event::Apply(serde_json::from_value(object.clone())?));
    }
    Ok(writer.as_reader())
}

/// Returns the objects of the task, with two tools that read: one over HTTP and one over MCP.
fn cluster() -> anyhow::Result<Cluster> {
    let contract = |name: &str, upstream: Value| {
        json!({
            "metadata": {"namespace": "team", "name": name, "uid": name, "generation": 1},
            "spec": {
                "tool": name, "description": "Reads an item.", "sideEffect": "read", "upstream": upstream,
                "input": {
                    "type": "object", "properties": {"id": {"type": "string", "maxLength": 40}}, "required": ["id"],
                    "additionalProperties": false,
                },
                "preconditions": [{"name": "named", "cel": "size(args.id) > 0", "message": "name an item"}],
            },
        })
    };
    let limits = json!({"wallTimeSeconds": 3600, "toolCalls": 10_000_000, "tokens": 1});
    let task = json!({
        "metadata": {"namespace": "team", "name": "bench", "uid": UID, "generation": 1},
        "spec": {
            "objective": "Read.", "workflowClass": "bench", "principal": "jane@example.com",
            "agent": {"image": "localhost/agent:dev"}, "tools": ["get", "find"], "limits": limits,
        },
    });
    let pack = json!({
        "metadata": {"name": "bench", "uid": "pack", "generation": 1},
        "spec": {
            "environment": "bench", "namespaceSelector": {"matchLabels": {"belay": "bench"}},
            "workflowClasses": [{
                "name": "bench", "allowedEffects": ["read"], "resources": {}, "limits": limits,
                "egress": [{"host": "api.test.example", "ports": [80], "uses": ["Tools"]}],
            }],
            "evidence": {
                "bucket": std::env::var("S3_BUCKET").unwrap_or_else(|_| "evidence".into()),
                // Each run has its own prefix, because an existing log would be continued.
                "prefix": format!("bench-{}", jiff::Timestamp::now().as_millisecond()),
                "mode": "Governance", "retentionDays": 1,
            },
        },
    });
    let pod = json!({
        "metadata": {
            "namespace": "team", "name": POD, "uid": POD,
            "labels": {names::TASK: "bench", names::TASK_UID: UID, names::ATTEMPT: "1"},
        },
        "status": {"phase": "Running", "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]},
    });
    let contracts = [
        contract("get", json!({"http": {"method": "GET", "url": "http://api.test.example/items/{id}"}})),
        contract("find", json!({"mcp": {"url": "http://api.test.example/mcp", "tool": "find"}})),
    ];
    let stores = Stores {
        pods: store(&[pod])?,
        tasks: store(&[task])?,
        contracts: store(&contracts)?,
        packs: store(&[pack])?,
        namespaces: store(&[json!({"metadata": {"name": "team", "labels": {"belay": "bench"}}})])?,
        approvals: store(&[])?,
        secrets: store(&[])?,
    };
    Ok(Cluster::new(stores, Arc::new(Api)))
}

/// Writes the files that a harness needs to the folder, and serves. The internet is at `upstream`.
pub async fn serve(folder: &Path, upstream: SocketAddr) -> anyhow::Result<()> {
    let cluster = Arc::new(cluster()?);
    let metrics = Metrics::new(&prometheus::Registry::new())?;
    let buckets = Arc::new(Bucket(Mutex::default(), folder.join("bucket")));
    let signer = Signer::from_pkcs8(WITNESS_NAME, &note::generate_pkcs8()?)?;
    let witness = Arc::new(Witness::new(signer, buckets.clone(), metrics.clone()));
    let (incidents, telling) = Incidents::new(witness.clone(), metrics.clone());
    tokio::spawn(telling);
    let internet = Arc::new(Internet(upstream));
    let gateway = Arc::new(Gateway::new(Parts {
        cluster: cluster.clone(),
        reviews: Reviews::new(Arc::new(Api), metrics.token_reviews.clone()),
        state: StateStore::new(buckets, witness.clone(), metrics.clone()),
        witness,
        dialer: Dialer::new(internet.clone(), Blocked::default(), internet, roots(None)?),
        pool: Arc::default(),
        requests: Arc::new(Api),
        incidents,
        usage: Arc::new(UsageStatus::new(Arc::new(Api), metrics.clone())),
        metrics: metrics.clone(),
        operator: "operator".into(),
        shutdown: CancellationToken::new(),
    }));
    let certified = rcgen::generate_simple_self_signed([wire::SERVER_NAME.to_owned()])?;
    let key = rustls_pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der())
        .map_err(|error| anyhow!("the key: {error}"))?;
    let mut tls = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key)?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();

    let principal = HarnessIdentity {
        namespace: "team".into(),
        task: "bench".into(),
        task_uid: UID.into(),
        attempt: 1,
        pod: POD.into(),
        pod_uid: POD.into(),
        standing: Standing::Live,
    };
    let policy = cluster.compiled(&principal).map_err(|refused| anyhow!("{refused}"))?.policy.clone();
    // An address that nobody uses (RFC 5737).
    let outside = "192.0.2.1:443".to_owned();
    let probe = Probe { reachable: address.clone(), unreachable: vec![outside.clone()] };
    let wiring = Wiring { attempt: 1, gateway: address.clone(), gateway_ca: certified.cert.pem(), probe };
    let containment = Containment {
        contained: true,
        rounds: 1,
        millis: 1,
        reachable: address,
        unreachable: vec![outside],
        breaches: vec![],
    };
    let write = |name: &str, text: Vec<u8>| std::fs::write(folder.join(name), text).context("cannot write");
    write("token", b"bench".to_vec())?;
    write("containment.json", serde_json::to_vec(&containment)?)?;
    write("config.json", serde_json::to_vec(&HarnessConfig { policy, wiring })?)?;
    write("ready", vec![])?;
    listen::serve(listener, Arc::new(tls), gateway, metrics, CancellationToken::new()).await;
    Ok(())
}
