//! Sandbox orchestration: `AgentTask`s become attempts, and ends become sealed evidence.
//!
//! ```text
//! watch ─▶ observe ─▶ decide ─┬─▶ resolve ─▶ validate ─▶ plan ─▶ apply      an attempt begins
//!                             ├─▶ end pods, seal, release                  an attempt, a task ends
//!                             └─▶ status
//! ```
//!
//! Guarantees: killed at any point it converges, without a second pod for the same attempt; only the leader acts, and every replica
//! answers the webhook; a cluster without the operator goes on running what runs; a leader whose watches are old says so and makes way, one
//! that could not renew its Lease stops before another may lead, and both begin anew by themselves, within seconds of the API server's return.
//! Non-goals: to decide before every cache is filled, and to write what has not changed.

use std::{
    net::SocketAddr,
    path::PathBuf,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use futures::{Stream, StreamExt};
use jiff::Timestamp;
use kube::{
    Client, Resource, ResourceExt,
    runtime::{
        Controller, Predicate, PredicateConfig, WatchStreamExt, controller,
        predicates::{self},
    },
};
use kube_lease_manager::LeaseManagerBuilder;
use prometheus::Registry;
use tokio::{sync::watch, time::Instant};

use crate::{
    admin,
    contact::{self, Contact},
    seal,
};

/// Writes, counted and guarded.
pub mod api;
/// Makes an attempt's objects.
pub mod apply;
/// Pauses after errors.
pub mod backoff;
/// The secrets of the system namespace.
pub mod bootstrap;
/// What the cluster says, kept by watches.
pub mod cache;
/// Who changes pods on their way in.
pub mod injectors;
/// What we remember between two looks.
pub mod memory;
/// Metrics.
pub mod metrics;
/// Whether contracts and packs are in order.
pub mod ready;
/// One look at one task.
pub mod reconcile;
/// What a task refers to.
pub mod resolve;
/// What a task's status says.
pub mod status;
/// What the cluster adds to every task.
pub mod surroundings;
/// What is wrong, said when it is applied.
pub mod webhook;

#[cfg(test)]
mod tests;

/// Looks at a time. Each waits for the API server most of the time.
const CONCURRENCY: u16 = 64;
/// Name of the Lease.
const LEASE: &str = "belay-operator";
/// Seconds that a leader is believed after its last sign of life.
const LEASE_SECONDS: u64 = 15;
/// Seconds before that in which it renews.
const LEASE_GRACE_SECONDS: u64 = 5;
/// A leader that could not renew its Lease stops this long after it last did: before another may lead.
const LEASE_BELIEVED: Duration = Duration::from_secs(LEASE_SECONDS - 2);
/// For how long one tries to get the Lease, before it begins anew: one that failed for a while waits long between tries.
const LEASE_TRY: Duration = Duration::from_secs(10);
/// A leader one of whose watches is as old as this makes way for another.
const BLIND: Duration = Duration::from_secs(60);
/// How often a leader asks itself whether it still may and can lead.
const DOUBT: Duration = Duration::from_secs(1);
/// Before a replica that stopped leading begins anew; one that made way lets another lead first.
const AGAIN: Duration = Duration::from_secs(1);
/// See there.
const MADE_WAY: Duration = Duration::from_secs(5);
/// An API server that has answered for so long is not why something failed.
const SETTLED: jiff::SignedDuration = jiff::SignedDuration::from_secs(30);
/// How often the serving certificates are looked at.
const CERTIFICATE_CHECK: Duration = Duration::from_secs(12 * 3600);
/// How often memories of tasks that are gone are dropped.
const TIDY: Duration = Duration::from_secs(300);
/// For what is under way when the process is told to end.
const DRAIN: Duration = Duration::from_secs(10);

/// What the operator is told by its command line.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Namespace of operator and gateway.
    pub system_namespace: String,
    /// `host:port` of the gateway, for sealing logs; its Service's address when absent, which needs no DNS.
    pub gateway: Option<String>,
    /// Image of the harness.
    pub image: String,
    /// Address for health and metrics.
    pub admin_listen: SocketAddr,
    /// File with the operator's token for the gateway.
    pub token: PathBuf,
    /// Processor request of the harness.
    pub harness_cpu: String,
    /// Memory limit of the harness.
    pub harness_memory: String,
    /// Who we are in the Lease.
    pub identity: String,
    /// Endpoint of the evidence store as the gateway has it; absent for AWS.
    pub s3_endpoint: Option<String>,
    /// The webhook, where there is one.
    pub webhook: Option<webhook::Options>,
}

/// Why the operator ended.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The way to the API server.
    #[error("cannot use the API server: {0}")]
    Client(#[from] kube::Error),
    /// No kubeconfig and no ServiceAccount.
    #[error("cannot find the API server: {0}")]
    Config(#[from] kube::config::InferConfigError),
    /// The admin port.
    #[error(transparent)]
    Admin(#[from] admin::AdminError),
    /// Metrics.
    #[error("cannot register metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The Lease.
    #[error("cannot use Lease {LEASE}: {0}")]
    Lease(#[from] kube_lease_manager::LeaseManagerError),
    /// The gateway has no address.
    #[error(
        "expected Service belay-gateway with a cluster address in the system namespace, found none: install the chart whole"
    )]
    NoGateway,
    /// The Lease went to another.
    #[error("Lease {LEASE} went to another replica, or could not be renewed in time: only the leader may act")]
    LeaseLost,
    /// What is watched is old.
    #[error("{0}; making way for another replica")]
    Blind(String),
    /// The webhook's port.
    #[error(transparent)]
    Webhook(#[from] webhook::WebhookError),
    /// The secrets.
    #[error(transparent)]
    Bootstrap(#[from] bootstrap::BootstrapError),
    /// The gateway's authority.
    #[error(transparent)]
    Seal(#[from] seal::SealError),
    /// A watch ended.
    #[error("a watch ended before its cache was filled")]
    Watch,
    /// The controller ended by itself.
    #[error("the controller ended though nobody asked it to")]
    Ended,
}

impl OperatorError {
    /// Whether it is over some time, so that the same process begins anew. Kubernetes would start it again, but later each time.
    fn passes(&self, contact: &Contact) -> bool {
        let settled = contact.now().duration_since(contact.since()) > SETTLED;
        match self {
            Self::LeaseLost | Self::Blind(_) | Self::Watch | Self::Ended | Self::Lease(_) => true,
            Self::Client(_) | Self::Bootstrap(bootstrap::BootstrapError::Kube { .. }) => !settled,
            _ => false,
        }
    }
}

/// Runs until `stop` resolves, or something fails that a restart may cure. A replica that cannot lead any more begins anew.
///
/// # Errors
/// See [`OperatorError`].
pub async fn run(settings: Settings, stop: impl Future<Output = ()> + Send) -> Result<(), OperatorError> {
    let config = kube::Config::infer().await?;
    serve(config, settings, stop).await
}

/// Runs against this API server.
pub(crate) async fn serve(
    config: kube::Config,
    settings: Settings,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), OperatorError> {
    let cluster_url = config.cluster_url.clone();
    let contact = Arc::new(Contact::default());
    let client = contact::client(config, contact.clone())?;
    let (registry, metrics) = metrics::registry(&contact)?;
    let (role, ready) = watch::channel(Role::Standby);
    let heard = contact.clone();
    let admin = admin::serve(settings.admin_listen, registry.clone(), move || match *ready.borrow() {
        Role::Standby | Role::Leading => heard.fresh(contact::OLD),
        Role::Filling => Err("the caches are not filled yet".to_owned()),
    })
    .await?;
    tokio::spawn(admin);
    let memories = Arc::new(memory::Memories::default());
    let (stores, mut streams) = cache::watch(&client, memories.clone(), &metrics);
    let (newest, stores) = watch::channel(stores);
    if let Some(options) = &settings.webhook {
        let judge = webhook::Judge::new(stores.clone(), settings.system_namespace.clone(), metrics.clone());
        tokio::spawn(webhook::serve(options, judge).await?);
    }
    let mut stop = pin!(stop);
    let mut replica = Replica {
        settings,
        client,
        cluster_url,
        registry,
        metrics,
        memories,
        stores: stores.borrow().clone(),
        role,
        contact,
    };
    loop {
        let error = match replica.term(streams, stop.as_mut()).await {
            Err(error) if error.passes(&replica.contact) => error,
            ended => return ended,
        };
        tracing::warn!(%error, "beginning anew");
        replica.metrics.leader.set(0);
        replica.role.send_replace(Role::Standby);
        tokio::select! {
            () = &mut stop => return Ok(()),
            () = tokio::time::sleep(if matches!(error, OperatorError::Blind(_)) { MADE_WAY } else { AGAIN }) => {}
        }
        // What is watched is watched anew, and what was remembered may have been another leader's to change meanwhile.
        replica.contact.forget();
        replica.memories.retain(|_| false);
        let (stores, anew) = cache::watch(&replica.client, replica.memories.clone(), &replica.metrics);
        (replica.stores, streams) = (stores.clone(), anew);
        newest.send_replace(stores);
    }
}

/// What every replica has, whether it leads or not.
struct Replica {
    settings: Settings,
    client: Client,
    cluster_url: http::Uri,
    registry: Registry,
    metrics: metrics::Metrics,
    memories: Arc<memory::Memories>,
    stores: cache::Stores,
    role: watch::Sender<Role>,
    contact: Arc<Contact>,
}

/// Ends what it runs with itself.
struct Running<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for Running<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Replica {
    /// Waits for the Lease and leads, until there is a reason not to.
    async fn term(
        &self,
        mut streams: cache::Streams,
        mut stop: Pin<&mut (impl Future<Output = ()> + Send)>,
    ) -> Result<(), OperatorError> {
        let identity = &self.settings.identity;
        tracing::info!(identity, "waiting for the Lease");
        let (leading, lease_task) = loop {
            let contend = async {
                let lease = LeaseManagerBuilder::new(self.client.clone(), LEASE)
                    .with_namespace(&self.settings.system_namespace)
                    .with_identity(identity)
                    .with_duration(LEASE_SECONDS)
                    .with_grace(LEASE_GRACE_SECONDS)
                    .build()
                    .await?;
                let (mut leading, task) = lease.watch().await;
                let task = Running(task);
                let patience = tokio::time::sleep(LEASE_TRY);
                tokio::pin!(patience);
                loop {
                    tokio::select! {
                        led = leading.wait_for(|leading| *leading) => match led {
                            Ok(_) => break,
                            Err(_) => return Err(OperatorError::LeaseLost),
                        },
                        // One that waits for its turn waits on; one that was without an answer begins anew.
                        () = &mut patience => {
                            if self.contact.now().duration_since(self.contact.since()) < SETTLED {
                                return Err(OperatorError::LeaseLost);
                            }
                            patience.as_mut().reset(Instant::now() + LEASE_TRY);
                        }
                    }
                }
                Ok::<_, OperatorError>((leading, task))
            };
            tokio::select! {
                () = &mut stop => return Ok(()),
                led = contend => match led {
                    Ok(led) => break led,
                    Err(error) if error.passes(&self.contact) => tokio::time::sleep(AGAIN).await,
                    Err(error) => return Err(error),
                },
                // What the webhook judges by. The controller goes on with the same streams.
                never = streams.follow_references(), if self.settings.webhook.is_some() => match never {},
            }
        };
        self.metrics.leader.set(1);
        self.role.send_replace(Role::Filling);
        let mut lost = leading.clone();
        let result = tokio::select! {
            result = lead(self, streams, &mut stop) => result,
            _ = lost.wait_for(|leading| !*leading) => Err(OperatorError::LeaseLost),
            doubt = self.doubt() => Err(doubt),
        };
        // Without a receiver the Lease is given up, so that the next leader need not wait for it to end.
        drop((leading, lost));
        let mut lease_task = lease_task;
        if result.is_ok() || matches!(result, Err(OperatorError::Blind(_))) {
            let _ = tokio::time::timeout(DRAIN, &mut lease_task.0).await;
        }
        result
    }

    /// Why this replica must not lead any longer.
    async fn doubt(&self) -> OperatorError {
        let led = Instant::now();
        loop {
            tokio::time::sleep(DOUBT).await;
            if self.contact.lease().map_or(led, |renewed| renewed.max(led)).elapsed() > LEASE_BELIEVED {
                return OperatorError::LeaseLost;
            }
            if let Err(old) = self.contact.fresh(BLIND) {
                return OperatorError::Blind(old);
            }
            if *self.role.borrow() == Role::Filling && led.elapsed() > BLIND {
                return OperatorError::Blind(format!("the caches were not filled in {} s", BLIND.as_secs()));
            }
        }
    }
}

/// What this replica does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Waits for the Lease.
    Standby,
    /// Leads, and fills its caches.
    Filling,
    /// Leads.
    Leading,
}

async fn lead(
    replica: &Replica,
    streams: cache::Streams,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), OperatorError> {
    tracing::info!("leading");
    let Replica { settings, client, cluster_url, registry, metrics, memories, stores, role, contact } = replica;
    let (namespace, webhook) = (&settings.system_namespace, settings.webhook.is_some());
    let authority = bootstrap::ensure(client, namespace, webhook, Timestamp::now()).await?;
    let gateway = match &settings.gateway {
        Some(gateway) => gateway.clone(),
        None => surroundings::gateway(client, namespace).await?.ok_or(OperatorError::NoGateway)?,
    };
    let gateway = seal::Gateway::new(gateway, settings.token.clone(), &authority)?;
    let api_servers = surroundings::api_servers(client, cluster_url).await?;
    let trust = webhook::keep_trust(client.clone(), authority.clone());
    let (surroundings, gateway_moved) = surroundings::follow(client, settings, authority, api_servers);
    let counted = metrics::TasksByPhase::new(stores.tasks.clone())?;
    // Those that were counted by the same process when it led before, if it did.
    let _ = registry.unregister(Box::new(counted.clone()));
    registry.register(Box::new(counted))?;
    let writer = api::Writer::new(client.clone(), metrics.clone());
    let context = Arc::new(reconcile::Context {
        stores: stores.clone(),
        memories: memories.clone(),
        writer: writer.clone(),
        gateway: Arc::new(gateway),
        surroundings,
        contact: contact.clone(),
        metrics: metrics.clone(),
        system_namespace: namespace.clone(),
        s3_endpoint: settings.s3_endpoint.clone(),
        #[cfg(test)]
        believes_caches: false,
    });
    // The streams fill the stores while they are polled, so that the controller waits inside each look, not before it runs.
    let (filled, is_filled) = watch::channel(false);
    let (stopped, stopping) = tokio::sync::oneshot::channel::<()>();
    let controller = control(streams, gateway_moved, context, is_filled, async {
        let _ = stopping.await;
    });
    let mut controller = pin!(controller);
    let fill = async {
        stores.ready().await.map_err(|_| OperatorError::Watch)?;
        filled.send_replace(true);
        role.send_replace(Role::Leading);
        tracing::info!(tasks = stores.tasks.len(), "caches are filled");
        match ready::keep(stores, &writer, contact).await {}
    };
    tokio::select! {
        () = &mut controller => return Err(OperatorError::Ended),
        failed = fill => return failed,
        failed = keep_certificates(client, namespace, webhook) => return failed,
        never = trust, if webhook => match never {},
        () = tidy(stores, memories) => {}
        () = stop => {}
    }
    tracing::info!("ending; finishing what is under way");
    drop(stopped);
    let _ = tokio::time::timeout(DRAIN, controller).await;
    Ok(())
}

/// Runs the controller until it is told to stop.
async fn control(
    streams: cache::Streams,
    gateway_moved: impl Stream<Item = ()> + Send + 'static,
    context: Arc<reconcile::Context>,
    filled: watch::Receiver<bool>,
    stop: impl Future<Output = ()> + Send + Sync + 'static,
) {
    let (contracts, packs, namespaces) = (context.stores.clone(), context.stores.clone(), context.stores.clone());
    let cache = || PredicateConfig::default();
    let changes = task_changes.combine(predicates::finalizers);
    Controller::for_stream(streams.tasks.predicate_filter(changes, cache()), context.stores.tasks.clone())
        .with_config(controller::Config::default().concurrency(CONCURRENCY))
        .owns_stream(streams.pods)
        .owns_stream(streams.network_policies)
        .watches_stream(streams.contracts, move |contract| contracts.tasks_of_contract(&contract))
        .watches_stream(streams.packs, move |_| packs.tasks_of_packs())
        .watches_stream(streams.namespaces.predicate_filter(predicates::labels, cache()), move |namespace| {
            namespaces.tasks_of_namespace(&namespace.name_any())
        })
        .reconcile_all_on(gateway_moved)
        .graceful_shutdown_on(stop)
        .run(
            move |task, context| {
                let mut filled = filled.clone();
                async move {
                    // An empty cache is no statement about the cluster. The sender lives as long as the controller.
                    let _ = filled.wait_for(|filled| *filled).await;
                    reconcile::reconcile(task, context).await
                }
            },
            |task, error, context| reconcile::after_error(&task, error, &context),
            context,
        )
        .for_each(|outcome| {
            match outcome {
                // Both are told where they arise; a task that is gone when its turn comes is no error.
                Ok(_) | Err(controller::Error::ReconcilerFailed(..) | controller::Error::ObjectNotFound(_)) => {}
                Err(error) => tracing::warn!(%error, "a watch was interrupted and is started again"),
            }
            std::future::ready(())
        })
        .await;
}

/// Generation and deletion. Whether a deletion counts as a generation is for the API server to say; it is not needed here.
fn task_changes(task: &cache::GuardedTask) -> Option<u64> {
    let metadata = task.meta();
    let generation = metadata.generation.unwrap_or_default().unsigned_abs();
    Some(generation.wrapping_mul(2).wrapping_add(u64::from(metadata.deletion_timestamp.is_some())))
}

async fn keep_certificates(client: &Client, namespace: &str, webhook: bool) -> Result<(), OperatorError> {
    loop {
        tokio::time::sleep(CERTIFICATE_CHECK).await;
        bootstrap::ensure(client, namespace, webhook, Timestamp::now()).await?;
    }
}

async fn tidy(stores: &cache::Stores, memories: &memory::Memories) {
    loop {
        tokio::time::sleep(TIDY).await;
        let uids: std::collections::HashSet<_> = stores.tasks.state().iter().filter_map(|task| task.uid()).collect();
        memories.retain(|uid| uids.contains(uid));
    }
}
