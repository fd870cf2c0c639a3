//! `make bench ONLY=evidence`: what it takes to write evidence, beside Tessera writing the same entries, and to verify it. It needs no
//! cluster.
//!
//! Written is as a harness does it ([`write`]), in a process of its own; what is verified ([`verify`]) was written so too, with the gateway's
//! own witness at the other end. Per core means: by the seconds of processor that were used, whichever core they were of.
#![allow(clippy::print_stdout, reason = "a program that prints a table")]

#[path = "../measure.rs"]
mod measure;
#[path = "../processor.rs"]
mod processor;
mod task;
mod verify;
mod write;

use std::path::Path;

/// Of this package.
const TARGET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target");

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    if write::child().await? {
        return Ok(());
    }
    let only = std::env::var("ONLY").unwrap_or_default();
    let wanted = |group: &str| group.starts_with(&only) || only.starts_with(group);
    // Not in memory, where syncing takes no time.
    std::fs::create_dir_all(TARGET)?;
    let folder = tempfile::tempdir_in(TARGET)?;
    let mut measures = Vec::new();
    if wanted("evidence.write") {
        measures.extend(write::write(folder.path())?);
    }
    if wanted("evidence.verify") {
        measures.extend(verify::verify(folder.path()).await?);
    }
    anyhow::ensure!(
        !measures.is_empty(),
        "no measure begins with {only:?}; there are: evidence.write, evidence.verify"
    );
    measure::report(&measures, &Path::new(TARGET).join("bench.jsonl"))
}
