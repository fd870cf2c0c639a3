//! Measures verified records, per second and core, of one log in memory. One measure is the tree alone: leaves, tree, checkpoints and their
//! signatures. The other is all that `belay verify` does, which includes deciding about each call again. Both take turns.

use std::path::Path;

use anyhow::{Context, ensure};
use belay::{
    evidence::{
        log::Log,
        merkle::Tree,
        note::{self, VerifierKey},
        record::Event,
        segment::Segment,
    },
    verify::{Expected, Verdict},
};

use crate::{measure::Measure, processor, task::UID, write};

/// The number of calls in the log, with two records each.
const CALLS: usize = 75_000;
const TURNS: usize = 5;
/// How often a turn verifies the tree. It is more than once because the CPU clock has a low resolution.
const TREES: usize = 5;
/// The goals in records per second and core: the tree alone, and the whole verification.
const GOALS: [f64; 2] = [1_000_000.0, 100_000.0];

pub async fn verify(folder: &Path) -> anyhow::Result<Vec<Measure>> {
    let (store, prefix, witness) = write::written(&folder.join("log"), CALLS)?;
    let log = Log::read(&store, &prefix, false).await?;
    let segments = log.segments.values().map(|text| Ok(Segment::parse(text)?)).collect::<anyhow::Result<Vec<_>>>()?;
    let first = segments.first().context("no segment")?.decode()?;
    let Some(Event::AttemptOpened(opened)) = first.into_iter().next().map(|record| record.event) else {
        anyhow::bail!("the log does not begin with attempt.opened")
    };
    let attempt: VerifierKey = opened.verifier_key.parse()?;
    let expected = Expected::Origin(note::origin(UID));

    let (mut trees, mut wholes, mut records) = (0.0, 0.0, 0);
    for _ in 0..TURNS {
        let began = processor::seconds("self")?;
        for _ in 0..TREES {
            records = tree(&segments, &witness, &attempt)?;
        }
        let between = processor::seconds("self")?;
        let report = belay::verify::verify(&log, &witness, &expected);
        let ended = processor::seconds("self")?;
        ensure!(report.verdict == Verdict::Valid, "{:#?}", report.findings);
        ensure!(report.summary.records == records, "the two sides read different logs");
        (trees, wholes) = (trees + between - began, wholes + ended - between);
    }
    let all = records as f64 * TURNS as f64;
    let n = records as usize;
    let [tree, whole] = GOALS;
    Ok(vec![
        Measure::at_least("evidence.verify.tree", all * TREES as f64 / trees, "1/s", n, tree),
        Measure::at_least("evidence.verify.whole", all / wholes, "1/s", n, whole),
    ])
}

/// Verifies the checkpoints of these segments, and returns the number of records in the tree.
fn tree(segments: &[Segment], witness: &VerifierKey, attempt: &VerifierKey) -> anyhow::Result<u64> {
    let mut tree = Tree::new();
    for (index, segment) in segments.iter().enumerate() {
        tree = segment.extend(&tree)?;
        segment.note.verify_cosignature(witness)?;
        // The gateway's own checkpoint is last, and has no signature of the attempt.
        if index + 1 < segments.len() {
            segment.note.verify(attempt)?;
        }
    }
    Ok(tree.size())
}
