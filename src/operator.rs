//! The operator: creates attempts for `AgentTask`s, and asks the gateway to seal the evidence of ended tasks.
//!
//! ```text
//! watch ─▶ observe ─▶ decide ─┬─▶ resolve ─▶ validate ─▶ plan ─▶ apply      an attempt begins
//!                             ├─▶ end pods, seal, release                  an attempt, a task ends
//!                             └─▶ status
//! ```
//!
//! Guarantees:
//!
//! - An operator that is killed at any point converges after a restart, without a second pod for the same attempt.
//! - Only the leader acts. Every replica answers the webhook.
//! - Running attempts continue in a cluster without the operator.
//! - A leader whose watches are old reports that and lets another replica lead. A leader that cannot renew its Lease stops before another
//!   replica can lead. Both start again on their own, within seconds of the API server's return.
//!
//! Non-goals: Decisions before every cache is filled. Writes that change nothing.

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

/// Writes to the API server, with counters and UID preconditions.
pub mod api;
/// Creates the objects of an attempt.
pub mod apply;
/// Tracks the undecided ApprovalRequests of each task.
pub mod approvals;
/// Computes pauses after errors.
pub mod backoff;
/// Creates the Secrets of the system namespace.
pub mod bootstrap;
/// What a watch shows of the objects of each task.
mod by_task;
/// Keeps the observed state of the cluster in caches, by watches.
pub mod cache;
/// Remembers the operator's own writes between two reconciliations.
pub mod expectations;
/// Finds the mutating admission that may have changed a pod.
pub mod injectors;
/// Defines the operator's metrics.
pub mod metrics;
/// Reports in their statuses whether contracts and packs are valid.
pub mod ready;
/// Reconciles one task.
pub mod reconcile;
/// Looks up what a task refers to.
pub mod resolve;
/// Computes the status of a task.
pub mod status;
/// Finds the settings of the cluster that are the same for every task.
pub mod surroundings;
/// Serves the admission webhook.
pub mod webhook;

#[cfg(test)]
mod tests;

/// The number of concurrent reconciliations. Each spends most of its time waiting for the API server.
const CONCURRENCY: u16 = 64;
/// The name of the Lease.
const LEASE: &str = "belay-operator";
/// Seconds after a renewal for which the Lease is valid.
const LEASE_SECONDS: u64 = 15;
/// Seconds before the end of the Lease in which the leader renews it.
const LEASE_GRACE_SECONDS: u64 = 5;
/// The time after its last renewal at which a leader that cannot renew its Lease stops. It is shorter than the Lease, so that the leader
/// stops before another replica can lead.
const LEASE_BELIEVED: Duration = Duration::from_secs(LEASE_SECONDS - 2);
/// The time after which an attempt to get the Lease starts again, because the client of an attempt that has failed for a while waits long
/// between its tries.
const LEASE_TRY: Duration = Duration::from_secs(10);
/// The age of a watch at which a leader lets another replica lead.
const BLIND: Duration = Duration::from_secs(60);
/// How often a leader checks whether it may and can still lead.
const DOUBT: Duration = Duration::from_secs(1);
/// The pause before a replica that stopped leading starts again.
const AGAIN: Duration = Duration::from_secs(1);
/// The pause before a replica starts again after it let another replica lead. It is longer, so that the other replica leads first.
const MADE_WAY: Duration = Duration::from_secs(5);
/// The time for which the API server must have answered without interruption before it is ruled out as the cause of a failure.
const SETTLED: jiff::SignedDuration = jiff::SignedDuration::from_secs(30);
/// How often the serving certificates are checked.
const CERTIFICATE_CHECK: Duration = Duration::from_secs(12 * 3600);
/// How often the memories of deleted tasks are dropped.
const TIDY: Duration = Duration::from_secs(300);
/// The time for work in progress when the process is stopped.
const DRAIN: Duration = Duration::from_secs(10);

/// The operator's settings, from its command line.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The namespace of operator and gateway.
    pub system_namespace: String,
    /// The `host:port` of the gateway, for sealing logs. If absent, the address of its Service, which needs no DNS.
    pub gateway: Option<String>,
    /// The image of the harness.
    pub image: String,
    /// The address for health checks and metrics.
    pub admin_listen: SocketAddr,
    /// The file with the operator's token for the gateway.
    pub token: PathBuf,
    /// The CPU request of the harness.
    pub harness_cpu: String,
    /// The memory limit of the harness.
    pub harness_memory: String,
    /// The identity of this replica in the Lease.
    pub identity: String,
    /// The endpoint of the object store, as the gateway has it. Absent for AWS.
    pub s3_endpoint: Option<String>,
    /// The settings of the webhook, if there is one.
    pub webhook: Option<webhook::Options>,
}

/// Why the operator ended.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The API server cannot be used.
    #[error("cannot use the API server: {0}")]
    Client(#[from] kube::Error),
    /// There is neither a kubeconfig nor a ServiceAccount.
    #[error("cannot find the API server: {0}")]
    Config(#[from] kube::config::InferConfigError),
    /// The admin port failed.
    #[error(transparent)]
    Admin(#[from] admin::AdminError),
    /// The metrics cannot be registered.
    #[error("cannot register metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The Lease cannot be used.
    #[error("cannot use Lease {LEASE}: {0}")]
    Lease(#[from] kube_lease_manager::LeaseManagerError),
    /// The gateway has no address.
    #[error(
        "expected Service belay-gateway with a cluster address in the system namespace, found none: install the chart whole"
    )]
    NoGateway,
    /// Another replica holds the Lease, or it was not renewed in time.
    #[error("Lease {LEASE} went to another replica, or could not be renewed in time: only the leader may act")]
    LeaseLost,
    /// A watch is old.
    #[error("{0}; making way for another replica")]
    Blind(String),
    /// The webhook's port failed.
    #[error(transparent)]
    Webhook(#[from] webhook::WebhookError),
    /// The Secrets cannot be created or used.
    #[error(transparent)]
    Bootstrap(#[from] bootstrap::BootstrapError),
    /// The client of the gateway cannot be created, for example because the certificate authority is not valid.
    #[error(transparent)]
    Seal(#[from] seal::SealError),
    /// A watch ended.
    #[error("a watch ended before its cache was filled")]
    Watch,
    /// The controller ended on its own.
    #[error("the controller ended without a signal to stop")]
    Ended,
}

impl OperatorError {
    /// Checks whether the error is temporary, so that the same process can start again. Kubernetes would also restart the process, but
    /// after a longer pause each time.
    fn passes(&self, contact: &Contact) -> bool {
        let settled = contact.now().duration_since(contact.since()) > SETTLED;
        match self {
            Self::LeaseLost | Self::Blind(_) | Self::Watch | Self::Ended | Self::Lease(_) => true,
            Self::Client(_) | Self::Bootstrap(bootstrap::BootstrapError::Kube { .. }) => !settled,
            _ => false,
        }
    }
}

/// Runs until `stop` resolves, or until an error that a restart of the process may fix. A replica that cannot lead any more starts again in
/// the same process.
///
/// # Errors
/// See [`OperatorError`].
pub async fn run(settings: Settings, stop: impl Future<Output = ()> + Send) -> Result<(), OperatorError> {
    let config = kube::Config::infer().await?;
    serve(config, settings, stop).await
}

/// Runs the operator against this API server.
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
    let memories = Arc::new(expectations::Expectations::default());
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
        // Watch everything again, and forget what was remembered, because another leader may have changed it in the meantime.
        replica.contact.forget();
        replica.memories.retain(|_| false);
        let (stores, anew) = cache::watch(&replica.client, replica.memories.clone(), &replica.metrics);
        (replica.stores, streams) = (stores.clone(), anew);
        newest.send_replace(stores);
    }
}

/// The state that every replica has, whether it leads or not.
struct Replica {
    settings: Settings,
    client: Client,
    cluster_url: http::Uri,
    registry: Registry,
    metrics: metrics::Metrics,
    memories: Arc<expectations::Expectations>,
    stores: cache::Stores,
    role: watch::Sender<Role>,
    contact: Arc<Contact>,
}

/// A running task that is aborted on drop.
struct Running<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for Running<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Replica {
    /// Waits for the Lease and leads until there is a reason to stop.
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
                        // A replica that waits for its turn continues to wait. One that got no answer from the API server starts again.
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
                // The webhook needs these caches. The controller continues with the same streams.
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
        // Without a receiver the Lease is released, so that the next leader does not wait until it expires.
        drop((leading, lost));
        let mut lease_task = lease_task;
        if result.is_ok() || matches!(result, Err(OperatorError::Blind(_))) {
            let _ = tokio::time::timeout(DRAIN, &mut lease_task.0).await;
        }
        result
    }

    /// Waits until this replica must stop leading, and returns the reason.
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

/// The role of this replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The replica waits for the Lease.
    Standby,
    /// The replica leads and fills its caches.
    Filling,
    /// The replica leads.
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
    // The collector of the same process from the last time that it led, if any.
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
    // The streams fill the stores only while they are polled, so each reconciliation waits for the caches, not the start of the controller.
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

/// Runs the controller until it is stopped.
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
        .watches_stream(streams.approvals, |request| approvals::task(&request))
        .watches_stream(streams.namespaces.predicate_filter(predicates::labels, cache()), move |namespace| {
            namespaces.tasks_of_namespace(&namespace.name_any())
        })
        .reconcile_all_on(gateway_moved)
        .graceful_shutdown_on(stop)
        .run(
            move |task, context| {
                let mut filled = filled.clone();
                async move {
                    // An empty cache says nothing about the cluster. The sender lives as long as the controller.
                    let _ = filled.wait_for(|filled| *filled).await;
                    reconcile::reconcile(task, context).await
                }
            },
            |task, error, context| reconcile::after_error(&task, error, &context),
            context,
        )
        .for_each(|outcome| {
            match outcome {
                // Both kinds of errors are reported where they occur. A task that is gone when its turn comes is not an error.
                Ok(_) | Err(controller::Error::ReconcilerFailed(..) | controller::Error::ObjectNotFound(_)) => {}
                Err(error) => tracing::warn!(%error, "a watch was interrupted and is started again"),
            }
            std::future::ready(())
        })
        .await;
}

/// Returns a value that changes with the task's generation and its deletion. It does not depend on whether the API server counts a deletion
/// as a new generation.
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

async fn tidy(stores: &cache::Stores, memories: &expectations::Expectations) {
    loop {
        tokio::time::sleep(TIDY).await;
        let uids: std::collections::HashSet<_> = stores.tasks.state().iter().filter_map(|task| task.uid()).collect();
        memories.retain(|uid| uids.contains(uid));
    }
}
