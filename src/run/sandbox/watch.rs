//! What a sandbox uses, looked at again and again: for machines that give users no control groups.
//!
//! Promises: a sandbox whose processes together hold more memory than the agent was given is ended within a moment of being seen.
//! Refuses: to pretend: between two looks more may be used, and what the kernel keeps for a process is not counted.

use std::{collections::BTreeMap, fs, time::Duration};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// Why a sandbox was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beyond {
    /// Its memory.
    Memory,
    /// Its processes.
    Processes,
}

/// Returns once the processes below this one use more than that.
pub async fn until_beyond(pid: u32, memory: u64, processes: u64) -> Beyond {
    loop {
        tokio::time::sleep(PAUSE).await;
        let (held, count) = used(pid);
        if held > memory {
            return Beyond::Memory;
        }
        if count > processes {
            return Beyond::Processes;
        }
    }
}

/// Bytes and processes of this one and all below it. A page that several of them have is shared out among them.
fn used(top: u32) -> (u64, u64) {
    let mut parents: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        if let Some(parent) = parent(pid) {
            parents.entry(parent).or_default().push(pid);
        }
    }
    let (mut held, mut count, mut next) = (0, 0, vec![top]);
    while let Some(pid) = next.pop() {
        held += memory(pid);
        count += 1;
        next.extend(parents.remove(&pid).unwrap_or_default());
    }
    (held, count)
}

/// `/proc/PID/stat`: the name in parentheses may have anything in it.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn memory(pid: u32) -> u64 {
    let kilobytes = |file: &str, name: &str| {
        let text = fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
    };
    // Shared pages count by their part where that may be read, and in whole where not.
    let held = kilobytes("smaps_rollup", "Pss:").or_else(|| kilobytes("status", "VmRSS:"));
    held.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_counts() {
        let (alone, one) = used(std::process::id());
        let mut child = std::process::Command::new("sleep").arg("10").spawn().unwrap();
        let (_, two) = used(std::process::id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(alone > 1 << 20 && two > one, "{alone} bytes, {one} and {two} processes");
    }
}
