//! What an operator of the gateway watches. Labels are closed sets: channels, decisions, rules, results.

use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

/// From a local cache hit to a slow model: seconds.
const LATENCIES: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];

/// The gateway's metrics.
#[derive(Clone)]
pub struct Metrics {
    /// Requests by channel (`model`, `tool`, `egress`, `log`, `other`), decision (`allowed`, `denied`, `failed`) and rule.
    pub requests: IntCounterVec,
    /// Seconds from dialling to the upstream's reply head, by channel.
    pub upstream: HistogramVec,
    /// Appends to logs, by result (`written`, `replayed`, `refused`, `failed`).
    pub appends: IntCounterVec,
    /// Seconds of an append, bucket included.
    pub append_seconds: HistogramVec,
    /// Tunnels that are open now.
    pub tunnels: IntGauge,
    /// Connections that are open now.
    pub connections: IntGauge,
    /// Connections refused because of a limit.
    pub connections_refused: IntCounter,
    /// TokenReviews by result (`valid`, `invalid`, `failed`, `throttled`).
    pub token_reviews: IntCounterVec,
    /// Failures of the object store, by what was tried (`read`, `write`, `list`).
    pub store_errors: IntCounterVec,
    /// Whether the buckets of all packs answer (1), by the last look.
    pub store_up: IntGauge,
    /// Incidents by result (`written`, `dropped`, `failed`).
    pub incidents: IntCounterVec,
    /// Writes of `status.usage` by result (`written`, `failed`).
    pub usage_writes: IntCounterVec,
    /// Objects that the API server has but that cannot be read, by kind. They count as absent.
    pub unreadable: IntCounterVec,
    /// Whether the serving certificate could be loaded (1) when last looked at.
    pub certificate_ok: IntGauge,
}

impl Metrics {
    /// Makes and registers them.
    ///
    /// # Errors
    /// If the registry has one of them already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let connections_refused = IntCounter::new(
            "belay_gateway_connections_refused_total",
            "Connections that were closed because their peer or the gateway had too many.",
        )?;
        registry.register(Box::new(connections_refused.clone()))?;
        let upstream = HistogramVec::new(
            HistogramOpts::new(
                "belay_gateway_upstream_seconds",
                "Time from dialling an upstream to the head of its reply, by channel.",
            )
            .buckets(LATENCIES.to_vec()),
            &["channel"],
        )?;
        registry.register(Box::new(upstream.clone()))?;
        let append_seconds = HistogramVec::new(
            HistogramOpts::new(
                "belay_gateway_append_seconds",
                "Time until a segment of evidence is witnessed, or stored.",
            )
            .buckets(LATENCIES.to_vec()),
            &["until"],
        )?;
        registry.register(Box::new(append_seconds.clone()))?;
        Ok(Self {
            requests: counters(
                "belay_gateway_requests_total",
                "Requests by channel, decision and the rule that decided against them.",
                &["channel", "decision", "rule"],
            )?,
            upstream,
            appends: counters("belay_gateway_log_appends_total", "Segments of evidence by result.", &["result"])?,
            append_seconds,
            tunnels: gauge("belay_gateway_tunnels_open", "Tunnels that are open.")?,
            connections: gauge("belay_gateway_connections_open", "Connections that are open.")?,
            connections_refused,
            token_reviews: counters(
                "belay_gateway_token_reviews_total",
                "Questions to the API server about tokens, by result.",
                &["result"],
            )?,
            store_errors: counters(
                "belay_gateway_store_errors_total",
                "Failures of the evidence store, by what was tried.",
                &["action"],
            )?,
            store_up: gauge(
                "belay_gateway_store_up",
                "1 if every pack's evidence bucket answered when last asked, 0 if one did not.",
            )?,
            incidents: counters(
                "belay_gateway_incidents_total",
                "Incidents recorded outside any log, by result.",
                &["result"],
            )?,
            usage_writes: counters(
                "belay_gateway_usage_writes_total",
                "Writes of AgentTask status.usage, by result.",
                &["result"],
            )?,
            unreadable: counters(
                "belay_gateway_unreadable_objects_total",
                "Objects of the API server that could not be read and count as absent, by kind.",
                &["kind"],
            )?,
            certificate_ok: gauge(
                "belay_gateway_certificate_ok",
                "1 if the serving certificate could be loaded when last looked at.",
            )?,
        })
    }

    /// Notes how long an upstream took.
    pub fn upstream_took(&self, channel: &str, time: Duration) {
        self.upstream.with_label_values(&[channel]).observe(time.as_secs_f64());
    }
}
