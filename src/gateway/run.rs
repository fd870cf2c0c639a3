//! Startup, serving and shutdown of the gateway.
//!
//! Guarantees: the gateway listens only once every store is filled, and is ready exactly as long as it listens. Failures of the object
//! store do *not* end readiness: all replicas share the store, and without any ready replica the containment probes could not tell a
//! contained pod from a broken network. Such failures show as `belay_gateway_store_up` and in the error responses. The process ends when a
//! watch has ended, because stale stores would allow what has been forbidden.

use std::{
    collections::HashMap,
    future::pending,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

use super::{
    buckets::Buckets,
    canary,
    cluster::{self, Cluster},
    dial::{self, Dialer, Network, Opened},
    identity::reviews::Reviews,
    incidents::Incidents,
    listen,
    metrics::{self, Metrics},
    options::Options,
    own::OwnAddresses,
    resolve::{Dns, ResolverError},
    service::{Gateway, Parts},
    state::StateStore,
    usage::UsageStatus,
    witness::Witness,
};
use crate::{
    admin, certificate,
    contact::{self, Contact},
    evidence::{
        note::{KeyError, Signer, WITNESS_NAME},
        store::{
            Store, StoreError,
            s3::{self, S3},
        },
    },
    policy::egress::Blocked,
    render::names,
};

/// Time after SIGTERM until Services no longer list this pod. Connections that still arrive are served.
const DRAIN_DELAY: Duration = Duration::from_secs(3);
/// Time after that for requests and tunnels to end.
const GRACE: Duration = Duration::from_secs(20);
/// Interval between two checks of the buckets.
const PROBE: Duration = Duration::from_secs(30);

/// Why the gateway cannot start or cannot continue.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A metric is registered twice.
    #[error("cannot register metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// There is no API server.
    #[error("cannot make a client of the API server: {0}; run in a cluster or set KUBECONFIG")]
    Client(#[from] kube::Error),
    /// The administrative port cannot be served.
    #[error(transparent)]
    Admin(#[from] admin::AdminError),
    /// The serving certificate cannot be used.
    #[error(transparent)]
    Certificate(#[from] certificate::CertificateError),
    /// The upstreams' certificate authorities cannot be read.
    #[error(transparent)]
    Roots(#[from] dial::RootsError),
    /// The resolver cannot be set up.
    #[error(transparent)]
    Resolver(#[from] ResolverError),
    /// A file that a flag names cannot be read.
    #[error("cannot read {}: {cause}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// The witness's key cannot be used.
    #[error("cannot use the witness's key {}: {cause}", file.display())]
    WitnessKey {
        /// The file.
        file: PathBuf,
        /// The cause.
        cause: KeyError,
    },
    /// A port cannot be listened on.
    #[error("cannot listen on {address}: {cause}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The cause.
        cause: io::Error,
    },
    /// SIGTERM cannot be caught.
    #[error("cannot wait for signals: {0}")]
    Signal(io::Error),
    /// A watch has ended, which should never happen.
    #[error("a watch of the API server has ended; stale objects would allow what has been forbidden")]
    Watch,
}

/// Runs a gateway until it is stopped by a signal.
///
/// # Errors
/// Returns an error if the gateway cannot start, or if a watch has ended.
pub async fn run(options: Options) -> Result<(), RunError> {
    let contact = Arc::new(Contact::default());
    let (registry, metrics) = metrics::registry(&contact)?;
    let config = kube::Config::infer().await.map_err(kube::Error::InferConfig)?;
    let client = contact::client(config, contact.clone())?;
    let (stores, watches) = cluster::watch(&client, &options.system_namespace, &metrics);
    let cluster = Arc::new(Cluster::new(stores, Arc::new(client.clone())));
    let listening = Arc::new(AtomicBool::new(false));
    let ready = {
        let (cluster, listening) = (cluster.clone(), listening.clone());
        move || match (cluster.synced(), listening.load(Ordering::Acquire)) {
            // Stale objects would allow what has been forbidden since.
            (true, true) => contact.fresh(contact::OLD),
            (true, false) => Err("not listening: starting or stopping".to_owned()),
            (false, _) => Err("the API server's objects are not all there yet".to_owned()),
        }
    };
    let admin = admin::serve(options.admin_listen, registry, ready).await?;
    let canary = canary::serve(bind(options.canary_listen).await?);
    let loaded = metrics.certificate_ok.clone();
    let (mut tls, certificate) = certificate::serve(options.tls_dir.clone(), move |good| loaded.set(i64::from(good)))?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];

    let stop = CancellationToken::new();
    let end = CancellationToken::new();
    let buckets: Arc<dyn Buckets> = Arc::new(buckets(&options)?);
    let witness = Arc::new(Witness::new(witness_key(&options.witness_key)?, buckets.clone(), metrics.clone()));
    let (incidents, telling) = Incidents::new(witness.clone(), metrics.clone());
    let gateway = Arc::new(Gateway::new(Parts {
        reviews: Reviews::new(Arc::new(client.clone()), metrics.token_reviews.clone()),
        witness: witness.clone(),
        state: StateStore::new(buckets, witness.clone(), metrics.clone()),
        dialer: dialer(&options, &client, &cluster)?,
        pool: Arc::default(),
        requests: Arc::new(client.clone()),
        incidents,
        usage: Arc::new(UsageStatus::new(Arc::new(client), metrics.clone())),
        metrics: metrics.clone(),
        operator: format!("system:serviceaccount:{}:{}", options.system_namespace, names::OPERATOR),
        shutdown: end.clone(),
        cluster: cluster.clone(),
    }));
    let serving = async {
        cluster.wait_until_synced().await.map_err(|_| RunError::Watch)?;
        let listener = bind(options.listen).await?;
        listening.store(true, Ordering::Release);
        tracing::info!(address = %options.listen, "serving");
        listen::serve(listener, Arc::new(tls), gateway, metrics.clone(), stop.clone()).await;
        while metrics.tunnels.get() > 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        witness.settle().await;
        Ok(())
    };
    let stopping = async {
        terminated().await?;
        tracing::info!("stopping");
        listening.store(false, Ordering::Release);
        tokio::time::sleep(DRAIN_DELAY).await;
        stop.cancel();
        tokio::time::sleep(GRACE).await;
        end.cancel();
        Ok(())
    };
    let probing = async {
        cluster.wait_until_synced().await.map_err(|_| RunError::Watch)?;
        probe(&cluster, &witness, &metrics).await;
        Ok(())
    };
    // The writer of incidents ends when the gateway is dropped, which must not end the process.
    let telling = async {
        telling.await;
        pending::<()>().await;
    };
    tokio::select! {
        served = serving => served,
        stopped = stopping => stopped,
        () = watches => Err(RunError::Watch),
        probed = probing => probed,
        () = telling => Ok(()),
        never = admin => match never {},
        never = canary => match never {},
        never = certificate => match never {},
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, RunError> {
    TcpListener::bind(address).await.map_err(|cause| RunError::Listen { address, cause })
}

async fn terminated() -> Result<(), RunError> {
    let mut term = signal(SignalKind::terminate()).map_err(RunError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signal)?;
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

async fn probe(cluster: &Cluster, witness: &Witness, metrics: &Metrics) {
    loop {
        let mut up = 1;
        for bucket in cluster.buckets() {
            if let Err(error) = witness.probe(&bucket).await {
                tracing::warn!(bucket, %error, "an evidence bucket does not answer");
                up = 0;
            }
        }
        metrics.store_up.set(up);
        tokio::time::sleep(PROBE).await;
    }
}

fn witness_key(file: &Path) -> Result<Signer, RunError> {
    Signer::from_pkcs8(WITNESS_NAME, &read(file)?)
        .map_err(|cause| RunError::WitnessKey { file: file.to_owned(), cause })
}

fn dialer(options: &Options, client: &kube::Client, cluster: &Arc<Cluster>) -> Result<Dialer, RunError> {
    let pem = options.upstream_ca.as_deref().map(read).transpose()?;
    let servers: Vec<_> = options.nameserver.iter().map(|server| server.0).collect();
    let blocked = Blocked::new(options.blocked_cidr.clone());
    let dialer = Dialer::new(Arc::new(Dns::new(&servers)?), blocked, Arc::new(Network), dial::roots(pem.as_deref())?);
    if options.private_upstream.is_empty() {
        return Ok(dialer);
    }
    // The kubelet sets this variable in every container.
    let service = std::env::var("KUBERNETES_SERVICE_HOST").ok().and_then(|address| address.parse().ok());
    let cluster = cluster.clone();
    let own = OwnAddresses::new(client.clone(), service, move |address| cluster.pod_at(address).is_some());
    Ok(dialer.opening(Opened { entries: options.private_upstream.clone(), own: Arc::new(own) }))
}

fn read(file: &Path) -> Result<Vec<u8>, RunError> {
    std::fs::read(file).map_err(|cause| RunError::File { file: file.to_owned(), cause })
}

/// The buckets of one S3 store, each with its own client.
pub struct S3Buckets {
    options: s3::Options,
    clients: Mutex<HashMap<String, Arc<dyn Store>>>,
}

fn buckets(options: &Options) -> Result<S3Buckets, RunError> {
    Ok(S3Buckets::new(s3::Options {
        bucket: String::new(),
        endpoint: options.s3_endpoint.clone(),
        path_style: options.s3_path_style,
        region: options.s3_region.clone(),
        ca: options.s3_ca.as_deref().map(read).transpose()?,
    }))
}

impl S3Buckets {
    /// Returns the buckets of the store that these options name. The bucket in the options is ignored.
    pub fn new(options: s3::Options) -> Self {
        Self { options, clients: Mutex::default() }
    }
}

impl Buckets for S3Buckets {
    fn bucket<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Arc<dyn Store>, StoreError>> {
        Box::pin(async move {
            if let Some(known) = self.clients.lock().get(name) {
                return Ok(known.clone());
            }
            let options = s3::Options { bucket: name.to_owned(), ..self.options.clone() };
            let client: Arc<dyn Store> = Arc::new(S3::connect(options).await.map_err(|e| StoreError::Unavailable {
                action: "reach",
                key: String::new(),
                place: name.to_owned(),
                detail: e.to_string(),
            })?);
            self.clients.lock().insert(name.to_owned(), client.clone());
            Ok(client)
        })
    }

    fn endpoint(&self) -> Option<String> {
        self.options.endpoint.clone()
    }
}

#[cfg(test)]
mod tests;
