//! The gateway's process: options, telemetry, run.

use belay::{
    gateway::{options::Options, run},
    telemetry,
};
use clap::Parser;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    // Two providers in one process, or none, would be a panic at the first handshake.
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider was installed before"))?;
    let _telemetry = telemetry::init("belay-gateway")?;
    Ok(run::run(options).await.inspect_err(|error| tracing::error!(%error, "the gateway ends"))?)
}
