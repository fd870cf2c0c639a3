//! The gateway's process: parses the options, starts telemetry, and runs.

use belay::{
    gateway::{options::Options, run},
    telemetry,
};
use clap::Parser;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    // With two providers in one process, or none, the first handshake would panic.
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider was installed before"))?;
    let _telemetry = telemetry::init("belay-gateway")?;
    Ok(run::run(options).await.inspect_err(|error| tracing::error!(%error, "the gateway ends"))?)
}
