//! The gateway of a run: the real gateway, on loopback, with a certificate that is made for it.
//!
//! Guarantees: it authorizes, dials, witnesses and stores with the same code as in a cluster. Its harness reaches it within the process. It
//! also listens on loopback, as the address that the containment probe must not reach. It does not dial addresses that are not public,
//! unless the user gave a host such an address by name.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, LazyLock},
};

use prometheus::Registry;
use rustls::ServerConfig;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    net::TcpListener,
    runtime::{Handle, Runtime},
    sync::mpsc::UnboundedSender,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use super::{
    RunError, RunEvent,
    objects::{self, Api},
    store::Kept,
};
use crate::{
    evidence::note::{SELF_WITNESS_NAME, Signer},
    gateway::{
        canary,
        cluster::Cluster,
        dial::{self, Dialer, Network},
        identity::reviews::Reviews,
        incidents::Incidents,
        listen,
        metrics::Metrics,
        resolve::{Dns, Resolve},
        service::{Gateway, Parts},
        state::StateStore,
        usage::UsageStatus,
        witness::Witness,
    },
    harness::{journal::call_id, server::start_threads},
    in_process::{self, InProcess},
    policy::{egress::Blocked, hostname::Hostname},
    wire,
};

/// The settings of the gateway.
pub struct Settings {
    /// The key of the witness.
    pub signer: Signer,
    /// Hosts whose addresses the user gave.
    pub resolved: HashMap<Hostname, SocketAddr>,
    /// Name servers, or the system's if empty.
    pub nameservers: Vec<SocketAddr>,
    /// A PEM file of certificate authorities to trust for upstreams, in addition to the web's.
    pub upstream_ca: Option<PathBuf>,
    /// The receiver of the reasons why calls were not made.
    pub tell: UnboundedSender<RunEvent>,
}

/// A running gateway.
pub struct Serving {
    /// Its address.
    pub address: SocketAddr,
    /// The address of the canary.
    pub canary: SocketAddr,
    /// Its certificate authority, as PEM.
    pub ca: String,
    /// The link of its harness, with the thread that serves both and the agent.
    pub link: InProcess,
    witness: Arc<Witness>,
    stop: CancellationToken,
    serving: Vec<JoinHandle<()>>,
}

/// Returns the thread of the traffic: the agent's requests to the harness, the harness's to the gateway, and the gateway's to upstreams. It
/// is one thread, because each part of a reply passes through all three. If each had a thread, most of the time that a call takes longer
/// than without Belay would be that of waking threads. It lasts as long as the process, which does not wait for it.
fn traffic() -> Result<Handle, RunError> {
    static TRAFFIC: LazyLock<std::io::Result<Runtime>> = LazyLock::new(|| start_threads(1));
    let started = TRAFFIC.as_ref().map_err(|error| RunError::Gateway(format!("cannot start a thread: {error}")))?;
    Ok(started.handle().clone())
}

/// Starts a gateway.
///
/// # Errors
/// Returns an error if it cannot listen or if the settings cannot be used.
pub async fn start(api: &Arc<Api>, kept: Kept, settings: Settings) -> Result<Serving, RunError> {
    let failed = |error: &dyn std::fmt::Display| RunError::Gateway(error.to_string());
    if !settings.signer.verifier().is_self_witness() {
        return Err(failed(&format!("expected a witness's key named {SELF_WITNESS_NAME}, found another's")));
    }
    let metrics = Metrics::new(&Registry::new()).map_err(|error| failed(&error))?;
    let buckets = Arc::new(kept);
    let witness = Arc::new(Witness::new(settings.signer, buckets.clone(), metrics.clone()));
    let (incidents, telling) = Incidents::new(witness.clone(), metrics.clone());
    let ca =
        match &settings.upstream_ca {
            Some(file) => Some(std::fs::read(file).map_err(|error| {
                RunError::Gateway(format!("--upstream-ca: cannot read {}: {error}", file.display()))
            })?),
            None => None,
        };
    let roots = dial::roots(ca.as_deref()).map_err(|error| failed(&error))?;
    // On a machine without a name server, hosts whose addresses the user gave still work.
    let resolve: Arc<dyn Resolve> = match Dns::new(&settings.nameservers) {
        Ok(dns) => Arc::new(dns),
        Err(error) => Arc::new(NoDns(error.to_string())),
    };
    let dialer = Dialer::new(resolve, Blocked::default(), Arc::new(Network), roots).vouching(settings.resolved);
    let (stop, shutdown) = (CancellationToken::new(), CancellationToken::new());
    let gateway = Gateway::new(Parts {
        cluster: Arc::new(Cluster::new(api.stores(), api.clone())),
        reviews: Reviews::new(api.clone(), metrics.token_reviews.clone()),
        witness: witness.clone(),
        state: StateStore::new(buckets, witness.clone(), metrics.clone()),
        dialer,
        pool: Arc::default(),
        requests: api.clone(),
        incidents,
        usage: Arc::new(UsageStatus::new(api.clone(), metrics.clone())),
        metrics: metrics.clone(),
        operator: objects::operator(),
        shutdown,
    });
    let tell = settings.tell;
    let gateway = Arc::new(gateway.telling(Box::new(move |intent, refused| {
        // The receiver may be gone.
        let _ = tell.send(RunEvent::Unmade { call: call_id(intent), reason: refused.reason.clone() });
    })));
    let (tls, ca) = certificate()?;
    let own = || TcpListener::bind("127.0.0.1:0");
    let threads = traffic()?;
    // A socket belongs to the threads that bind it.
    let listener = threads.spawn(own()).await.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?;
    let singer = own().await.map_err(|error| failed(&error))?;
    let at = |listener: &TcpListener| listener.local_addr().map_err(|error| failed(&error));
    let (address, canary) = (at(&listener)?, at(&singer)?);
    let (link, connections) = in_process::link(threads.clone());
    let serving = vec![
        threads.spawn(listen::serve_in_process(connections, gateway.clone(), stop.clone())),
        threads.spawn(listen::serve(listener, Arc::new(tls), gateway, metrics, stop.clone())),
        tokio::spawn(async move { match canary::serve(singer).await {} }),
        tokio::spawn(telling),
    ];
    Ok(Serving { address, canary, ca, link, witness, stop, serving })
}

impl Serving {
    /// Waits until everything in transit to the store is stored, and stops.
    pub async fn end(self) {
        self.witness.settle().await;
        self.stop.cancel();
        self.serving.iter().for_each(JoinHandle::abort);
    }
}

/// Creates a certificate with an authority of its own, for the server name that harnesses expect.
fn certificate() -> Result<(ServerConfig, String), RunError> {
    let failed = |error: &dyn std::fmt::Display| RunError::Gateway(format!("cannot make a certificate: {error}"));
    let made = rcgen::generate_simple_self_signed([wire::SERVER_NAME.to_owned()]).map_err(|error| failed(&error))?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let chain = vec![made.cert.der().clone()];
    let mut tls =
        ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).map_err(|error| failed(&error))?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((tls, made.cert.pem()))
}

/// A resolver for machines without a name server. No name has an address.
struct NoDns(String);

impl Resolve for NoDns {
    fn addresses<'a>(
        &'a self,
        _: &'a Hostname,
    ) -> futures::future::BoxFuture<'a, Result<Vec<std::net::IpAddr>, String>> {
        Box::pin(async { Err(self.0.clone()) })
    }
}
