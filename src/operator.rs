//! Sandbox orchestration: `AgentTask`s become attempts, and ends become sealed evidence.
//!
//! ```text
//! watch ─▶ observe ─▶ decide ─┬─▶ resolve ─▶ validate ─▶ plan ─▶ apply      an attempt begins
//!                             ├─▶ end pods, seal, release                  an attempt, a task ends
//!                             └─▶ status
//! ```
//!
//! Promises: killed at any point it converges, without a second pod for the same attempt; only the leader acts, and every replica
//! answers the webhook; a cluster without the operator goes on running what runs. Refuses: to decide before every cache is
//! filled, and to write what has not changed.

use std::{net::SocketAddr, path::PathBuf, pin::pin, sync::Arc, time::Duration};

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
use tokio::sync::watch;

use crate::{admin, seal};

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
    #[error("Lease {LEASE} went to another replica: ending at once, because only the leader may act")]
    LeaseLost,
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

/// Runs until `stop` resolves, the Lease is lost, or something fails that a restart may cure.
///
/// # Errors
/// See [`OperatorError`].
pub async fn run(settings: Settings, stop: impl Future<Output = ()> + Send) -> Result<(), OperatorError> {
    let config = kube::Config::infer().await?;
    let cluster_url = config.cluster_url.clone();
    let client = Client::try_from(config)?;
    let registry = Registry::new();
    let metrics = metrics::Metrics::new(&registry)?;
    let (role, ready) = watch::channel(Role::Standby);
    let admin = admin::serve(settings.admin_listen, registry.clone(), move || match *ready.borrow() {
        Role::Standby | Role::Leading => Ok(()),
        Role::Filling => Err("the caches are not filled yet".to_owned()),
    })
    .await?;
    tokio::spawn(admin);
    let memories = Arc::new(memory::Memories::default());
    let (stores, mut streams) = cache::watch(&client, memories.clone(), &metrics);
    if let Some(options) = &settings.webhook {
        let judge = webhook::Judge::new(stores.clone(), settings.system_namespace.clone(), metrics.clone());
        tokio::spawn(webhook::serve(options, judge).await?);
    }
    let lease = LeaseManagerBuilder::new(client.clone(), LEASE)
        .with_namespace(&settings.system_namespace)
        .with_identity(&settings.identity)
        .with_duration(LEASE_SECONDS)
        .with_grace(LEASE_GRACE_SECONDS)
        .build()
        .await?;
    let (mut leading, lease_task) = lease.watch().await;
    let replica = Replica { settings, client, cluster_url, registry, metrics, memories, stores, role };
    let mut stop = pin!(stop);
    let result = 'led: {
        tracing::info!(identity = replica.settings.identity, "waiting for the Lease");
        tokio::select! {
            () = &mut stop => break 'led Ok(()),
            led = leading.wait_for(|leading| *leading) => if led.is_err() { break 'led Err(OperatorError::LeaseLost) },
            // What the webhook judges by. The controller goes on with the same streams.
            never = streams.follow_references(), if replica.settings.webhook.is_some() => match never {},
        }
        replica.metrics.leader.set(1);
        replica.role.send_replace(Role::Filling);
        let mut lost = leading.clone();
        tokio::select! {
            result = lead(&replica, streams, &mut stop) => result,
            _ = lost.wait_for(|leading| !*leading) => Err(OperatorError::LeaseLost),
        }
    };
    // Without a receiver the Lease is given up, so that the next leader need not wait for it to end.
    drop(leading);
    if result.is_ok() {
        let _ = tokio::time::timeout(DRAIN, lease_task).await;
    }
    result
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
    let Replica { settings, client, cluster_url, registry, metrics, memories, stores, role } = replica;
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
    registry.register(Box::new(metrics::TasksByPhase::new(stores.tasks.clone())?))?;
    let context = Arc::new(reconcile::Context {
        stores: stores.clone(),
        memories: memories.clone(),
        writer: api::Writer::new(client.clone(), metrics.clone()),
        gateway,
        surroundings,
        metrics: metrics.clone(),
        system_namespace: namespace.clone(),
        s3_endpoint: settings.s3_endpoint.clone(),
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
        std::future::pending::<Result<(), OperatorError>>().await
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
