//! `make bench ONLY=evidence`: measures writing evidence, compared with Tessera writing the same entries, and verifying it. It needs no
//! cluster.
//!
//! Writing ([`write`]) is done as by a harness, in a process of its own. The log for verifying ([`verify`]) was written in the same way,
//! with the gateway's own witness at the other end. Figures per core divide by the CPU seconds that were used, on whichever core.
#![allow(clippy::print_stdout, reason = "a program that prints a table")]

#[path = "../measure.rs"]
mod measure;
#[path = "../processor.rs"]
mod processor;
mod task;
mod verify;
mod write;

use std::path::Path;

/// The target folder of this package.
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
