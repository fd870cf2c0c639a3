//! The operator's process: parses the command line and runs. It exits with 0 after a signal to stop, and with 1 if it could not go on.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use belay::{operator, telemetry};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// Runs AgentTasks in sandboxed pods and seals their evidence.
#[derive(Parser)]
#[command(name = "belay-operator", version)]
struct Arguments {
    /// Namespace of the operator and the gateway.
    #[arg(long, env = "BELAY_SYSTEM_NAMESPACE", default_value = "belay-system")]
    system_namespace: String,
    /// host:port of the gateway, for sealing logs; the address of its Service if absent.
    #[arg(long, env = "BELAY_GATEWAY")]
    gateway: Option<String>,
    /// Image of the harness.
    #[arg(long, env = "BELAY_IMAGE")]
    image: String,
    /// Address for health checks and metrics.
    #[arg(long, env = "BELAY_ADMIN_LISTEN", default_value = "0.0.0.0:8080")]
    admin_listen: SocketAddr,
    /// File with the operator's ServiceAccount token for the gateway (audience belay-gateway).
    #[arg(long, env = "BELAY_TOKEN", default_value = "/var/run/belay/token")]
    token: PathBuf,
    /// CPU request of each harness.
    #[arg(long, env = "BELAY_HARNESS_CPU", default_value = "10m")]
    harness_cpu: String,
    /// Memory limit of each harness.
    #[arg(long, env = "BELAY_HARNESS_MEMORY", default_value = "128Mi")]
    harness_memory: String,
    /// Name of this replica in the Lease: the name of its pod.
    #[arg(long, env = "POD_NAME")]
    identity: String,
    /// Endpoint of the evidence store as the gateway uses it, for the status of tasks; AWS if absent.
    #[arg(long, env = "BELAY_S3_ENDPOINT")]
    s3_endpoint: Option<String>,
    /// Address of the admission webhook; no webhook is served if absent.
    #[arg(long, env = "BELAY_WEBHOOK_LISTEN")]
    webhook_listen: Option<SocketAddr>,
    /// Folder with the webhook's tls.crt and tls.key, which the leader creates.
    #[arg(long, env = "BELAY_WEBHOOK_TLS_DIR", default_value = "/etc/belay/webhook-tls")]
    webhook_tls_dir: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    // rustls has no default provider. Installing fails only if this same one is already installed.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let arguments = Arguments::parse();
    match run(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the operator ends");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let _telemetry = telemetry::init("belay-operator")?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let settings = operator::Settings {
        system_namespace: arguments.system_namespace,
        gateway: arguments.gateway,
        image: arguments.image,
        admin_listen: arguments.admin_listen,
        token: arguments.token,
        harness_cpu: arguments.harness_cpu,
        harness_memory: arguments.harness_memory,
        identity: arguments.identity,
        s3_endpoint: arguments.s3_endpoint,
        webhook: arguments
            .webhook_listen
            .map(|listen| operator::webhook::Options { listen, tls_dir: arguments.webhook_tls_dir }),
    };
    Ok(operator::run(settings, stop).await?)
}
