//! Logs and traces of our own processes.
//!
//! Promises: one JSON object a line on standard error, from `info` up unless `RUST_LOG` says otherwise; spans to an
//! OpenTelemetry collector (OTLP over gRPC) where `OTEL_EXPORTER_OTLP_ENDPOINT` names one. Refuses: failing a process
//! because a collector is away; spans are then dropped. Nothing of an agent's prompts, arguments or credentials is ever
//! a field here: that is the callers' duty, and evidence has the digests.

use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

/// Names the collector: OpenTelemetry's own variable.
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
/// What is logged where `RUST_LOG` does not say. rmcp tells of each request in other people's words; the evidence tells of it without.
pub const FILTER: &str = "info,rmcp=off";
/// A collector that does not take the last spans by then does not get them: a process must end in time.
const FLUSH: Duration = Duration::from_secs(3);

/// The subscriber cannot be installed.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The exporter does not take its settings.
    #[error(
        "cannot export traces to {endpoint} ({ENDPOINT}): {cause}; expected the URL of an OTLP gRPC collector, such as http://collector:4317"
    )]
    Exporter {
        /// What the variable says.
        endpoint: String,
        /// What is wrong with it.
        cause: String,
    },
    /// There is one already.
    #[error("logging was set up twice in one process: {0}")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

/// Keeps telemetry going; sends what is left when dropped.
#[must_use = "dropping it ends the export of traces"]
pub struct Guard(Option<SdkTracerProvider>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.take().map(|provider| provider.shutdown_with_timeout(FLUSH)) {
            tracing::warn!(%error, "the last spans were not exported");
        }
    }
}

/// Installs the process's subscriber. Call it inside the Tokio runtime: the exporter lives there.
///
/// # Errors
/// If the collector's URL cannot be used, or there is a subscriber already.
pub fn init(service: &'static str) -> Result<Guard, TelemetryError> {
    let filter = || EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(FILTER));
    let logs = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false)
        // Whoever tells something never waits for whoever reads it.
        .with_writer(crate::output::stderr)
        .with_filter(filter());
    let provider = std::env::var(ENDPOINT).ok().filter(|e| !e.is_empty()).map(|e| exporter(service, e)).transpose()?;
    // The exporter's own connection makes spans too; exported, each batch would cause the next.
    let traces = provider.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer(service))
            .with_filter(tracing_subscriber::filter::Targets::new().with_target("belay", tracing::Level::INFO))
    });
    tracing_subscriber::registry().with(logs).with(traces).try_init()?;
    Ok(Guard(provider))
}

fn exporter(service: &'static str, endpoint: String) -> Result<SdkTracerProvider, TelemetryError> {
    // Headers and timeouts come from the standard variables, which the exporter reads itself.
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
mod tests {
    use opentelemetry::trace::Tracer;
    use tokio::{io::AsyncReadExt, net::TcpListener};

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn spans_are_sent_to_the_collector() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let provider = exporter("belay-test", endpoint).unwrap();
        provider.tracer("belay-test").in_span("a span", |_| ());
        let flushing = tokio::task::spawn_blocking(move || drop(Guard(Some(provider))));
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut preface = [0; 14];
        stream.read_exact(&mut preface).await.unwrap();
        assert_eq!(&preface, b"PRI * HTTP/2.0");
        drop(stream);
        flushing.await.unwrap();
    }

    #[tokio::test]
    async fn a_collector_that_is_no_url_is_named() {
        let error = exporter("belay-test", "no url".to_owned()).unwrap_err().to_string();
        assert!(error.contains("no url") && error.contains(ENDPOINT), "{error}");
    }
}
