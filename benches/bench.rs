//! `make bench [ONLY=prefix]`, the part that needs a cluster. `evidence` is a target beside this one, and `decision` is a package of its
//! own.
//!
//! Measures are compared with a baseline from the same run, and the two sides take turns. The program fails on an error, but not on a
//! missed goal. It measures the release that runs in the cluster. The client shares the two cores with it, so the figures for bursts are
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
