//! Measures repeatedly what a sandbox uses, for machines that do not give users control groups.
//!
//! Guarantees: a sandbox is ended soon after a measurement finds that its processes together hold more memory than the agent was given.
//! What counts is mapped memory, what of it is swapped out, page tables, and anonymous files (`memfd_create`) that a process has open,
//! whether they are mapped or not.
//!
//! Non-goals: an exact bound. More may be used between two measurements. Buffers of pipes and sockets belong to the kernel and do not
//! count. Neither does an anonymous file that is in transit through a socket and not open anywhere. Files in a write scope are bounded by
//! the scope's own size.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Read,
    os::unix::fs::MetadataExt,
    time::Duration,
};

/// The time between two measurements.
const PAUSE: Duration = Duration::from_millis(200);
/// Every so many measurements all processes of the machine are read. The kernel's list of the children of a process may lack one while
/// others end.
const THOROUGH: u32 = 10;
/// The prefixes by which the kernel names files in memory that have no path: from `memfd_create`, and of shared mappings.
const NAMELESS: [&str; 4] = ["/memfd:", "/dev/zero (deleted)", "/SYSV", "/secretmem"];
/// The unit of `st_blocks`, in bytes.
const BLOCK: u64 = 512;

/// The limit that a sandbox exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitExceeded {
    /// The memory.
    Memory,
    /// The number of processes.
    Processes,
}

/// Returns once the process and those below it use more than the given memory or number of processes.
pub async fn until_beyond(pid: u32, memory: u64, processes: u64) -> LimitExceeded {
    let mut measurements = (0..THOROUGH).cycle();
    loop {
        tokio::time::sleep(PAUSE).await;
        let family = if measurements.next() == Some(0) { of_all } else { of_children };
        // The threads of this runtime serve the agent, which would wait meanwhile.
        let Ok((held, count)) = tokio::task::spawn_blocking(move || used(&family(pid))).await else { continue };
        if held > memory {
            return LimitExceeded::Memory;
        }
        if count > processes {
            return LimitExceeded::Processes;
        }
    }
}

/// Returns this process and all below it, by the parents of all processes of the machine. A machine has hundreds of processes, so this
/// takes milliseconds.
fn of_all(top: u32) -> Vec<u32> {
    let mut parents: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        if let Some(parent) = parent(pid) {
            parents.entry(parent).or_default().push(pid);
        }
    }
    below(top, |pid| parents.remove(&pid).unwrap_or_default())
}

/// Returns this process and all below it, by the kernel's lists of children: a fraction of the work of [`of_all`], which it calls if this
/// kernel has no such lists.
fn of_children(top: u32) -> Vec<u32> {
    if fs::metadata(format!("/proc/{top}/task/{top}/children")).is_err() {
        return of_all(top);
    }
    below(top, |pid| {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
        lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
    })
}

/// Returns a process and all below it.
fn below(top: u32, mut children: impl FnMut(u32) -> Vec<u32>) -> Vec<u32> {
    let (mut family, mut next) = (Vec::new(), vec![top]);
    while let Some(pid) = next.pop() {
        family.push(pid);
        next.extend(children(pid));
    }
    family
}

/// Returns the bytes that these processes hold, and their number. A page that several of them map is divided among them.
fn used(family: &[u32]) -> (u64, u64) {
    let mut files = BTreeMap::new();
    family.iter().for_each(|pid| files.extend(open(*pid)));
    // Mapped pages of a file that is counted as a whole do not count again.
    let inodes: BTreeSet<u64> = files.keys().map(|(_, inode)| *inode).collect();
    let mapped = |pid: &u32| if inodes.is_empty() { 0 } else { shared(*pid, &inodes) };
    let held = family.iter().map(|pid| memory(*pid).saturating_sub(mapped(pid))).sum::<u64>();
    (held.saturating_add(files.values().sum()), u64::try_from(family.len()).unwrap_or(u64::MAX))
}

/// Reads the parent from `/proc/PID/stat`. The name in parentheses may contain any character.
fn parent(pid: u32) -> Option<u32> {
    // Read at once: a file of unknown length is otherwise read in small pieces, and there are many processes.
    let mut stat = [0; 1024];
    let length = fs::File::open(format!("/proc/{pid}/stat")).ok()?.read(&mut stat).ok()?;
    let stat = String::from_utf8_lossy(stat.get(..length)?);
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Returns the bytes that a process has mapped, and those of its page tables.
fn memory(pid: u32) -> u64 {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let (rollup, status) = (read("smaps_rollup"), read("status"));
    // Shared pages count proportionally if `smaps_rollup` is readable, and fully if it is not.
    let held = match kilobytes(&rollup, "Pss:") {
        Some(held) => held.saturating_add(kilobytes(&rollup, "SwapPss:").unwrap_or(0)),
        None => kilobytes(&status, "VmRSS:").unwrap_or(0).saturating_add(kilobytes(&status, "VmSwap:").unwrap_or(0)),
    };
    held.saturating_add(kilobytes(&status, "VmPTE:").unwrap_or(0)).saturating_mul(1024)
}

/// Returns the nameless files that a process has open, and their bytes: the pages that exist, whatever the file's length is.
fn open(pid: u32) -> Vec<((u64, u64), u64)> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let files = descriptors.filter_map(|one| {
        let path = one.path();
        let of = fs::read_link(&path).ok()?;
        let of = of.to_string_lossy();
        if !NAMELESS.iter().any(|name| of.starts_with(name)) {
            return None;
        }
        let is = fs::metadata(path).ok()?;
        Some(((is.dev(), is.ino()), is.blocks().saturating_mul(BLOCK)))
    });
    files.collect()
}

/// Returns the bytes that a process has mapped of nameless files with these inodes.
fn shared(pid: u32, inodes: &BTreeSet<u64>) -> u64 {
    let Ok(text) = fs::read_to_string(format!("/proc/{pid}/smaps")) else { return 0 };
    let (mut bytes, mut counts) = (0_u64, false);
    for line in text.lines() {
        // `ADDRESSES RIGHTS OFFSET DEVICE INODE NAME` starts a mapping. Its attributes follow as `Name: VALUE`.
        let mut words = line.split_ascii_whitespace();
        if words.next().is_some_and(|first| !first.ends_with(':')) {
            let inode = words.nth(3).and_then(|inode| inode.parse().ok());
            let name = words.next().unwrap_or_default();
            counts = inode.is_some_and(|inode| inodes.contains(&inode))
                && NAMELESS.iter().any(|one| one.starts_with(name) || name.starts_with(one));
        } else if counts {
            let part = ["Pss:", "SwapPss:"].iter().find_map(|name| kilobytes(line, name));
            bytes = bytes.saturating_add(part.unwrap_or(0).saturating_mul(1024));
        }
    }
    bytes
}

/// Returns the value of the line of that name, in kilobytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write};

    use super::*;

    /// Both ways find the children of every thread and their children. Other tests start and end processes meanwhile.
    #[test]
    fn what_is_below_counts() {
        let (alone, _) = used(&of_children(std::process::id()));
        assert!(alone > 1 << 20, "{alone} bytes");
        let child = std::thread::spawn(|| {
            let mut shell = std::process::Command::new("sh");
            shell.args(["-c", "sleep 30 & echo $!; wait"]).stdout(std::process::Stdio::piped()).spawn().unwrap()
        });
        let mut child = child.join().unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
        let below: u32 = line.trim().parse().unwrap();
        for family in [of_children, of_all] {
            let found = family(std::process::id());
            assert!(found.contains(&child.id()) && found.contains(&below), "{found:?}");
            assert_eq!(family(below), [below]);
        }
        let _ = std::process::Command::new("kill").arg(below.to_string()).status();
        child.wait().unwrap();
    }

    #[test]
    fn memory_that_nobody_has_mapped_counts_once_however_often_it_is_open() {
        const MUCH: u64 = 64 << 20;
        let create = |name: &str| File::from(rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        // Measure this process alone, because tests that run beside this one have such files too.
        let own = || open(std::process::id()).into_iter().collect::<BTreeMap<_, _>>().values().sum::<u64>();
        let before = own();
        let mut file = create("much");
        // A long file without content uses little memory.
        let long = create("long");
        long.set_len(1 << 40).unwrap();
        file.write_all(&vec![1; usize::try_from(MUCH).unwrap()]).unwrap();
        let again = file.try_clone().unwrap();
        let held = own() - before;
        assert!((MUCH..MUCH + (8 << 20)).contains(&held), "{held}");
        drop((file, again, long));
        assert!(own() < before + MUCH);
    }
}
