//! Logs and traces of Belay's own processes.
//!
//! Guarantees: the log is one JSON object a line on standard error, from `info` up unless `RUST_LOG` says otherwise. Spans go to an
//! OpenTelemetry collector (OTLP over gRPC) if `OTEL_EXPORTER_OTLP_ENDPOINT` names one. A missing collector does not fail a process: its
//! spans are dropped.
//!
//! Non-goals: redaction. Callers must never put an agent's prompts, arguments or credentials into a field. Evidence has commitments to
//! them.

use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

/// OpenTelemetry's own environment variable for the collector.
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
/// The default for `RUST_LOG`. rmcp is off because it logs each request with text that is not Belay's. Evidence records requests without
/// that text.
pub const FILTER: &str = "info,rmcp=off";
/// The timeout for exporting the last spans. Later ones are lost, because a process must end in time.
const FLUSH: Duration = Duration::from_secs(3);

/// The reason why the subscriber cannot be installed.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The exporter rejects its settings.
    #[error(
        "cannot export traces to {endpoint} ({ENDPOINT}): {cause}; expected the URL of an OTLP gRPC collector, such as http://collector:4317"
    )]
    Exporter {
        /// The value of the variable.
        endpoint: String,
        /// What is wrong with the value.
        cause: String,
    },
    /// A subscriber is already installed.
    #[error("logging was set up twice in one process: {0}")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

/// A guard that keeps telemetry running and exports the remaining spans on drop.
#[must_use = "dropping it ends the export of traces"]
pub struct Guard(Option<SdkTracerProvider>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.take().map(|provider| provider.shutdown_with_timeout(FLUSH)) {
            tracing::warn!(%error, "the last spans were not exported");
        }
    }
}

/// Installs the process's subscriber. Must be called inside the Tokio runtime, because the exporter runs there.
///
/// # Errors
/// Returns an error if the collector's URL cannot be used or a subscriber is already installed.
pub fn init(service: &'static str) -> Result<Guard, TelemetryError> {
    let filter = || EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(FILTER));
    let logs = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false)
        // Logging never waits for the reader of the log.
        .with_writer(crate::output::stderr)
        .with_filter(filter());
    let provider = std::env::var(ENDPOINT).ok().filter(|e| !e.is_empty()).map(|e| exporter(service, e)).transpose()?;
    // The exporter's own connection creates spans, too. If they were exported, each batch would cause the next.
    let traces = provider.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer(service))
            .with_filter(tracing_subscriber::filter::Targets::new().with_target("belay", tracing::Level::INFO))
    });
    tracing_subscriber::registry().with(logs).with(traces).try_init()?;
    Ok(Guard(provider))
}

fn exporter(service: &'static str, endpoint: String) -> Result<SdkTracerProvider, TelemetryError> {
    // The exporter itself reads headers and timeouts from the standard environment variables.
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(&endpoint)
        .build()
        .map_err(|e| TelemetryError::Exporter { endpoint, cause: e.to_string() })?;
    Ok(SdkTracerProvider::builder()
        .with_resource(Resource::builder().with_service_name(service).build())
        .with_batch_exporter(exporter)
        .build())
}

#[cfg(test)]
mod tests;
