//! Defines the operator's metrics. The values of labels are bounded: a task, a namespace or an image is never a label.

use std::{collections::HashMap, sync::Arc};

use kube::runtime::reflector::Store;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use crate::{
    api::{AgentTask, agent_task::Phase},
    contact::{Contact, WatchAges},
    lenient::Lenient,
};

/// Buckets from milliseconds to half a minute.
const SECONDS: [f64; 13] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30.0];

/// All metrics of the operator, except [`TasksByPhase`].
#[derive(Clone)]
pub struct Metrics {
    /// Reconciliations, by result: `ok`, `error`.
    pub reconciles: IntCounterVec,
    /// The duration of reconciliations in seconds, by result.
    pub reconcile_seconds: HistogramVec,
    /// Ended attempts, by kind (`agent`, `rollback`), task class and failure class. `None` means success.
    pub attempts: IntCounterVec,
    /// Seconds from when a task is first seen to the creation of its first pod.
    pub apply_to_pod: Histogram,
    /// Write requests to the API server, by verb and kind.
    pub writes: IntCounterVec,
    /// NetworkPolicies that were deleted or changed while their pod ran, and were created again.
    pub policies_restored: IntCounter,
    /// Objects that could not be decoded, by kind.
    pub undecodable: IntCounterVec,
    /// Objects that the webhook checked, by kind and result: `allowed`, `warned`, `denied`.
    pub reviews: IntCounterVec,
    /// 1 if this replica leads.
    pub leader: prometheus::IntGauge,
}

/// Returns the registry of an operator process, with its metrics and the ages of its watches. A leader also registers [`TasksByPhase`].
///
/// # Errors
/// Returns an error if the metrics cannot be registered, which does not happen in practice: their names are valid and unique.
pub fn registry(contact: &Arc<Contact>) -> Result<(Registry, Metrics), prometheus::Error> {
    let registry = Registry::new();
    let metrics = Metrics::new(&registry)?;
    registry.register(Box::new(WatchAges::new("belay_operator_watch_age_seconds", contact.clone())?))?;
    Ok((registry, metrics))
}

impl Metrics {
    /// Creates and registers the metrics.
    ///
    /// # Errors
    /// Returns an error if a metric is already registered.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let options = |name: &str, help: &str| HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
        let metrics = Self {
            reconciles: counter("belay_operator_reconciles_total", "Reconciliations by result.", &["result"])?,
            reconcile_seconds: HistogramVec::new(
                options("belay_operator_reconcile_seconds", "Seconds of a reconciliation, by result."),
                &["result"],
            )?,
            attempts: counter(
                "belay_operator_attempts_total",
                "Attempts that ended, by what they were for, class of task, and failure class; class None is success.",
                &["kind", "task_class", "class"],
            )?,
            apply_to_pod: Histogram::with_opts(options(
                "belay_operator_apply_to_pod_seconds",
                "Seconds from the first sight of a task to the creation of its first pod.",
            ))?,
            writes: counter("belay_operator_api_writes_total", "Write requests to the API server.", &["verb", "kind"])?,
            undecodable: counter(
                "belay_operator_undecodable_objects_total",
                "Objects that this version cannot read, by kind.",
                &["kind"],
            )?,
            policies_restored: IntCounter::new(
                "belay_operator_network_policies_restored_total",
                "NetworkPolicies that were deleted or changed under a living pod, and made again.",
            )?,
            reviews: counter(
                "belay_operator_admission_reviews_total",
                "Objects that the webhook judged, by kind and result.",
                &["kind", "result"],
            )?,
            leader: prometheus::IntGauge::new("belay_operator_leader", "1 where this replica leads.")?,
        };
        registry.register(Box::new(metrics.reconcile_seconds.clone()))?;
        registry.register(Box::new(metrics.apply_to_pod.clone()))?;
        registry.register(Box::new(metrics.leader.clone()))?;
        registry.register(Box::new(metrics.policies_restored.clone()))?;
        Ok(metrics)
    }
}

/// Tasks by phase and task class. They are counted when the metrics are read.
#[derive(Clone)]
pub struct TasksByPhase {
    store: Store<Lenient<AgentTask>>,
    gauge: IntGaugeVec,
}

impl TasksByPhase {
    /// Creates the collector for this store.
    ///
    /// # Errors
    /// Returns an error if the name of the metric is not valid, which does not happen in practice.
    pub fn new(store: Store<Lenient<AgentTask>>) -> Result<Self, prometheus::Error> {
        let gauge =
            IntGaugeVec::new(Opts::new("belay_operator_tasks", "Tasks by phase and class."), &["phase", "task_class"])?;
        Ok(Self { store, gauge })
    }
}

impl Collector for TasksByPhase {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let phases = ["Pending", "Running", "Parked", "Succeeded", "Failed"];
        let mut counts = HashMap::from(phases.map(|phase| ((phase, String::new()), 0)));
        for task in self.store.state() {
            let class = task.0.as_ref().ok().and_then(|task| counted_as(task)).unwrap_or_default();
            *counts.entry((phase_name(&task), class.to_owned())).or_insert(0) += 1;
        }
        // Reset the gauge, because tasks and their task classes disappear.
        self.gauge.reset();
        for ((phase, class), count) in counts {
            self.gauge.with_label_values(&[phase, &class]).set(count);
        }
        self.gauge.collect()
    }
}

/// Returns the task class that a task counts for: its own, once a pack with this task class has accepted the task.
pub fn counted_as(task: &AgentTask) -> Option<&str> {
    let attempts = task.status.as_ref().and_then(|status| status.attempt).unwrap_or_default();
    task.spec.task_class.as_deref().filter(|_| attempts > 0)
}

fn phase_name(task: &Arc<Lenient<AgentTask>>) -> &'static str {
    let phase = task.0.as_ref().ok().and_then(|task| task.status.as_ref()).and_then(|status| status.phase);
    match phase {
        None | Some(Phase::Pending) => "Pending",
        Some(Phase::Running) => "Running",
        Some(Phase::Parked) => "Parked",
        Some(Phase::Succeeded) => "Succeeded",
        Some(Phase::Failed) => "Failed",
    }
}

#[cfg(test)]
mod tests {
    use kube::runtime::reflector;

    use super::*;
    use crate::admin::reference;

    /// Registers every metric of the process, each vector with one child, so that the registry returns it.
    #[test]
    fn the_reference_has_every_metric() {
        let (registry, metrics) = registry(&Arc::new(Contact::default())).unwrap();
        let Metrics {
            reconciles,
            reconcile_seconds,
            attempts,
            apply_to_pod: _,
            writes,
            policies_restored: _,
            undecodable,
            reviews,
            leader: _,
        } = metrics;
        [reconciles, attempts, writes, undecodable, reviews].iter().for_each(reference::touch);
        reference::touch(&reconcile_seconds);
        let (store, _writer) = reflector::store();
        registry.register(Box::new(TasksByPhase::new(store).unwrap())).unwrap();
        let ages = WatchAges::new("belay_operator_watch_age_seconds", Arc::default()).unwrap();
        reference::is_complete("belay_operator_", &registry, &ages);
    }
}
