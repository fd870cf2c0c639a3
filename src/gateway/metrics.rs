//! The gateway's metrics. Labels are closed sets: channels, decisions, rules, results.

use std::{sync::Arc, time::Duration};

use prometheus::{HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::{
    contact::{Contact, WatchAges},
    evidence::record::{Channel, Event},
    policy::config::SideEffect,
};

/// Buckets of latencies in seconds, from a local cache hit to a slow model.
const LATENCIES: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];

/// Buckets of risk scores, in the points that packs give.
const POINTS: &[f64] = &[0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0];

/// The gateway's metrics.
#[derive(Clone)]
pub struct Metrics {
    /// Requests by channel (`model`, `tool`, `listing`, `egress`, `log`, `other`), decision (`allowed`, `denied`, `failed`) and rule.
    pub requests: IntCounterVec,
    /// Seconds from dialling to the head of the upstream's reply, by channel.
    pub upstream: HistogramVec,
    /// Appends to logs, by result (`written`, `replayed`, `refused`, `failed`, `lost`).
    pub appends: IntCounterVec,
    /// Seconds until a segment is witnessed or stored.
    pub append_seconds: HistogramVec,
    /// Decisions in the evidence, including the harness's, by task class, channel, decision (`allowed`, `denied`) and the rule of a denial.
    pub decisions: IntCounterVec,
    /// Tool calls in the evidence by task class, side effect, and sensitivity of their arguments.
    pub tool_calls: IntCounterVec,
    /// Risk scores of tool calls by task class, if the pack has risk terms.
    pub risk: HistogramVec,
    /// Ended calls in the evidence by task class and outcome (`applied`, `not_applied`, `unknown`).
    pub outcomes: IntCounterVec,
    /// Number of open tunnels.
    pub tunnels: IntGauge,
    /// Number of open connections.
    pub connections: IntGauge,
    /// Connections that were closed because of a limit.
    pub connections_refused: IntCounter,
    /// TokenReviews by result (`valid`, `invalid`, `failed`, `throttled`).
    pub token_reviews: IntCounterVec,
    /// Failures of the object store by action (`read`, `write`, `list`, `lock`, `name`, `reach`).
    pub store_errors: IntCounterVec,
    /// Whether the buckets of all packs answered (1) at the last check.
    pub store_up: IntGauge,
    /// Incidents by result (`written`, `dropped`, `failed`).
    pub incidents: IntCounterVec,
    /// Writes of `status.usage` by result (`written`, `failed`).
    pub usage_writes: IntCounterVec,
    /// Objects of the API server that cannot be decoded, by kind. They count as absent.
    pub undecodable: IntCounterVec,
    /// Whether the serving certificate could be loaded (1) at the last check.
    pub certificate_ok: IntGauge,
}

/// Returns the registry of the gateway's process: its metrics and the ages of its watches.
///
/// # Errors
/// Never in practice, because the names are valid and unique.
pub fn registry(contact: &Arc<Contact>) -> Result<(Registry, Metrics), prometheus::Error> {
    let registry = Registry::new();
    let metrics = Metrics::new(&registry)?;
    registry.register(Box::new(WatchAges::new("belay_gateway_watch_age_seconds", contact.clone())?))?;
    Ok((registry, metrics))
}

impl Metrics {
    /// Creates and registers the metrics.
    ///
    /// # Errors
    /// Returns an error if the registry has one of them already.
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
        let risk = HistogramVec::new(
            HistogramOpts::new("belay_gateway_tool_call_risk", "Points of risk of tool calls, by class of task.")
                .buckets(POINTS.to_vec()),
            &["task_class"],
        )?;
        registry.register(Box::new(risk.clone()))?;
        Ok(Self {
            decisions: counters(
                "belay_gateway_decisions_total",
                "Decisions in the evidence, by class of task, channel, decision and the rule that decided against it.",
                &["task_class", "channel", "decision", "rule"],
            )?,
            tool_calls: counters(
                "belay_gateway_tool_calls_total",
                "Tool calls in the evidence, by class of task, side effect, and how sensitive their arguments are.",
                &["task_class", "side_effect", "sensitivity"],
            )?,
            risk,
            outcomes: counters(
                "belay_gateway_outcomes_total",
                "Calls in the evidence that ended, by class of task and whether they took effect.",
                &["task_class", "outcome"],
            )?,
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
            undecodable: counters(
                "belay_gateway_undecodable_objects_total",
                "Objects of the API server that could not be read and count as absent, by kind.",
                &["kind"],
            )?,
            certificate_ok: gauge(
                "belay_gateway_certificate_ok",
                "1 if the serving certificate could be loaded when last looked at.",
            )?,
        })
    }

    /// Counts a record of a task's log. There are few task classes, because the pack lists them.
    pub fn recorded(&self, task_class: &str, event: &Event) {
        match event {
            Event::Intent(intent) => {
                self.decisions.with_label_values(&[task_class, intent.channel.as_str(), "allowed", "none"]).inc();
                if intent.channel != Channel::Tool {
                    return;
                }
                let found = intent.assessment.as_ref();
                let sensitivity = found.map(|found| found.arguments).unwrap_or_default();
                let side_effect = intent.side_effect.map_or("none", SideEffect::as_str);
                self.tool_calls.with_label_values(&[task_class, side_effect, sensitivity.as_str()]).inc();
                if let Some(risk) = found.and_then(|found| found.risk.as_ref()) {
                    let score = i32::try_from(risk.score).unwrap_or(i32::MAX);
                    self.risk.with_label_values(&[task_class]).observe(score.into());
                }
            }
            Event::Denied(denied) => {
                let labels = [task_class, denied.channel.as_str(), "denied", denied.rule.label()];
                self.decisions.with_label_values(&labels).inc_by(denied.calls());
            }
            Event::Outcome(outcome) => self.outcomes.with_label_values(&[task_class, outcome.outcome.as_str()]).inc(),
            _ => {}
        }
    }

    /// Records how long an upstream took.
    pub fn upstream_took(&self, channel: &str, time: Duration) {
        self.upstream.with_label_values(&[channel]).observe(time.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admin::reference,
        gateway::testing,
        policy::access::{Assessment, Score},
    };

    /// Every metric that the process registers. Each vector has one child, so that the registry reports it.
    #[test]
    fn the_reference_has_every_metric() {
        let (registry, metrics) = registry(&Arc::new(Contact::default())).unwrap();
        let Metrics {
            requests,
            upstream,
            appends,
            append_seconds,
            decisions,
            tool_calls,
            risk,
            outcomes,
            tunnels: _,
            connections: _,
            connections_refused: _,
            token_reviews,
            store_errors,
            store_up: _,
            incidents,
            usage_writes,
            undecodable,
            certificate_ok: _,
        } = metrics;
        let counters = [
            requests,
            appends,
            decisions,
            tool_calls,
            outcomes,
            token_reviews,
            store_errors,
            incidents,
            usage_writes,
            undecodable,
        ];
        counters.iter().for_each(reference::touch);
        [upstream, append_seconds, risk].iter().for_each(reference::touch);
        let ages = WatchAges::new("belay_gateway_watch_age_seconds", Arc::default()).unwrap();
        reference::is_complete("belay_gateway_", &registry, &ages);
    }

    #[test]
    fn what_is_recorded_is_counted_by_the_class_of_its_task() {
        let metrics = testing::metrics();
        let Event::Intent(mut intent) = testing::intent("a", Channel::Tool, "write", 0) else { panic!() };
        intent.assessment = Some(Assessment {
            arguments: crate::policy::config::Sensitivity::Internal,
            seen: crate::policy::config::Sensitivity::Unclassified,
            rules: vec![],
            risk: Some(Score { score: 40, terms: vec!["change".into()] }),
        });
        for event in [
            Event::Intent(intent),
            testing::outcome("a", 0),
            testing::denied(),
            testing::intent("b", Channel::Model, "/v1/responses", 5),
        ] {
            metrics.recorded("triage", &event);
        }
        let decided =
            |channel, decision, rule| metrics.decisions.with_label_values(&["triage", channel, decision, rule]).get();
        assert_eq!(decided("tool", "allowed", "none"), 1);
        assert_eq!(decided("model", "allowed", "none"), 1);
        assert_eq!(decided("egress", "denied", "egress.host"), 1);
        assert_eq!(metrics.tool_calls.with_label_values(&["triage", "write", "Internal"]).get(), 1);
        assert_eq!(metrics.outcomes.with_label_values(&["triage", "applied"]).get(), 1);
        let risk = metrics.risk.with_label_values(&["triage"]);
        assert_eq!((risk.get_sample_count(), risk.get_sample_sum()), (1, 40.0));
    }
}
