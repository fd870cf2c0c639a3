//! What a process has used of the processors.

use anyhow::Context;

/// Seconds, to a hundredth, of a process by its ID; `self` is this one's.
pub fn seconds(process: &str) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    let after = stat.rsplit_once(')').context("no name")?.1;
    let fields: Vec<f64> = after.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    // utime and stime, the 14th and 15th; the state is no number. In hundredths of a second.
    Ok((fields.get(10).context("no utime")? + fields.get(11).context("no stime")?) / 100.0)
}
