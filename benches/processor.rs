//! The CPU time that a process has used.

use anyhow::Context;

/// Returns the CPU time of a process in seconds, with a resolution of a hundredth. The process is an ID, or `self` for this process.
pub fn seconds(process: &str) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    let after = stat.rsplit_once(')').context("no name")?.1;
    let fields: Vec<f64> = after.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    // utime and stime, fields 14 and 15, in hundredths of a second. The state is not a number and is filtered out.
    Ok((fields.get(10).context("no utime")? + fields.get(11).context("no stime")?) / 100.0)
}
