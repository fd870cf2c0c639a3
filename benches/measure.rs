//! Measures, their baselines and goals, the table, and `target/bench.jsonl`, which has one object for each measure.

use std::{fs::OpenOptions, io::Write, path::Path};

use anyhow::Context;
use serde::Serialize;

/// One measure, as written to `target/bench.jsonl`.
#[derive(Debug, Serialize)]
pub struct Measure {
    /// `group.what.percentile`.
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    /// The number of samples.
    pub n: usize,
    /// The value that it is compared with, from the same run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// The goal, for the ratio if there is one, else for the value.
    pub goal: f64,
    pub ok: bool,
}

impl Measure {
    /// Creates a measure whose value should be at most `goal`.
    pub fn absolute(name: impl Into<String>, value: f64, unit: &'static str, n: usize, goal: f64) -> Self {
        Self { name: name.into(), value, unit, n, baseline: None, ratio: None, goal, ok: value <= goal }
    }

    /// Creates a measure whose value should be at least `goal`.
    pub fn at_least(name: impl Into<String>, value: f64, unit: &'static str, n: usize, goal: f64) -> Self {
        Self { ok: value >= goal, ..Self::absolute(name, value, unit, n, goal) }
    }

    /// Creates a measure whose value should be at most `goal` times its baseline.
    pub fn against(
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        n: usize,
        baseline: f64,
        goal: f64,
    ) -> Self {
        let ratio = value / baseline;
        Self {
            name: name.into(),
            value,
            unit,
            n,
            baseline: Some(baseline),
            ratio: Some(ratio),
            goal,
            ok: ratio <= goal,
        }
    }

    /// Adds a baseline for comparison. The goal still applies to the value.
    pub fn beside(mut self, baseline: f64) -> Self {
        self.baseline = Some(baseline);
        self.ratio = Some(self.value / baseline);
        self
    }
}

/// Returns the sample at a percentile from 0 to 100, by nearest rank. Sorts the samples in place.
pub fn percentile(samples: &mut [f64], percent: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * samples.len() as f64).ceil() as usize;
    samples.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// Prints a table, and appends the measures to the file.
pub fn report(measures: &[Measure], path: &Path) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let file = OpenOptions::new().create(true).append(true).open(path);
    let mut file = file.with_context(|| format!("cannot write {}", path.display()))?;
    println!(
        "{:<28} {:>10} {:<4} {:>6} {:>10} {:>7} {:>7}  ok",
        "measure", "value", "unit", "n", "baseline", "ratio", "goal"
    );
    for measure in measures {
        writeln!(file, "{}", serde_json::to_string(measure)?)?;
        let optional = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2}"));
        println!(
            "{:<28} {:>10.2} {:<4} {:>6} {:>10} {:>7} {:>7.2}  {}",
            measure.name,
            measure.value,
            measure.unit,
            measure.n,
            optional(measure.baseline),
            optional(measure.ratio),
            measure.goal,
            if measure.ok { "yes" } else { "no" }
        );
    }
    Ok(())
}
