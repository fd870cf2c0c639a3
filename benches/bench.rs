//! `make bench [ONLY=prefix]`, as far as it needs a cluster; `evidence` is beside this, and `decision` a package of its own.
//!
//! Figures are compared with something measured in the same run, the two sides in turn. It fails on an error, never on a
//! figure. It measures the release that the cluster runs; the client beside it shares the two cores, so bursts are
//! pessimistic.
#![allow(clippy::print_stdout, reason = "a program that prints a table")]
#![allow(missing_docs, reason = "a program, not a library")]

mod burst;
mod call;
mod cluster;
mod measure;
mod processor;
mod start;

use std::path::Path;

use anyhow::Context;
pub use measure::{Measure, percentile};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    rustls::crypto::ring::default_provider().install_default().ok().context("a TLS provider is installed already")?;
    if call::gateway().await? {
        return Ok(());
    }
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut measures = Vec::new();
    let wanted = |group: &str| group.starts_with(&only) || only.starts_with(group);
    if wanted("call") {
        measures.extend(call::call().await?);
    }
    if wanted("start.ready") {
        measures.extend(start::ready().await?);
    }
    if wanted("start.burst") {
        measures.extend(burst::burst().await?);
    }
    anyhow::ensure!(!measures.is_empty(), "no measure begins with {only:?}; there are: call, start.ready, start.burst");
    measure::report(&measures, Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/target/bench.jsonl")))
}
