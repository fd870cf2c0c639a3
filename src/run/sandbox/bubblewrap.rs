//! The arguments of bubblewrap, as a pure function of the cell.
//!
//! Guarantees: the root is a new file system in memory, and everything in it ends up read-only except the write scopes. The sandbox has its
//! own environment and identity. It has no capability, and cannot get one through another user namespace.
//!
//! Non-goals: network namespaces. The namespace in which the sandbox is started has nothing but loopback.

use super::{Cell, Entry};
use crate::render::agent::UID;

/// The size of a folder that stays empty: one page, in bytes.
const NOTHING: &str = "4096";

/// The files in which the kernel lists the keys of the user that a process runs for, which is the caller. A kernel without keyrings has
/// neither.
pub(super) const KEYS: [&str; 2] = ["/proc/keys", "/proc/key-users"];

/// Returns the arguments. `filter` is the open file of the system call filter. `keys` are those of [`KEYS`] that exist.
pub(super) fn arguments(cell: &Cell, filter: i32, keys: &[&str]) -> Vec<String> {
    let mut all = Vec::new();
    let mut add = |words: &[&str]| all.extend(words.iter().map(|word| (*word).to_owned()));
    add(&["--unshare-user", "--disable-userns", "--unshare-ipc", "--unshare-pid", "--unshare-uts"]);
    add(&["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--hostname", "agent"]);
    add(&["--uid", &UID.to_string(), "--gid", &UID.to_string(), "--cap-drop", "ALL", "--seccomp", &filter.to_string()]);
    add(&["--clearenv"]);
    for (name, value) in &cell.env {
        add(&["--setenv", name, value]);
    }
    for entry in &cell.root {
        match entry {
            Entry::Bind(bind) => add(&["--ro-bind", &bind.from.to_string_lossy(), &bind.to]),
            Entry::Link { target, at } => add(&["--symlink", target, at]),
        }
    }
    // If root runs the agent, the agent owns the kernel's settings, even without capabilities. bubblewrap itself only checks the folder.
    add(&["--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys"]);
    for path in ["/proc/irq", "/proc/bus", "/proc/sysrq-trigger"] {
        add(&["--ro-bind-try", path, path]);
    }
    for path in keys {
        add(&["--ro-bind", "/dev/null", path]);
    }
    add(&["--dev", "/dev"]);
    for path in &cell.covered {
        add(&["--size", NOTHING, "--tmpfs", path]);
    }
    for (path, size) in &cell.scopes {
        add(&["--size", &size.to_string(), "--tmpfs", path]);
    }
    for bind in &cell.binds {
        add(&["--ro-bind", &bind.from.to_string_lossy(), &bind.to]);
    }
    // Only now, because the mount points for the binds below had to be created in them.
    for path in &cell.covered {
        add(&["--remount-ro", path]);
    }
    add(&["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", &cell.cwd, "--"]);
    all.extend(cell.command.iter().cloned());
    all
}

#[cfg(test)]
mod tests {
    use super::{super::tests::cell, *};

    #[test]
    fn everything_is_read_only_but_the_scopes() {
        let told = arguments(&cell(), 7, &KEYS).join(" ");
        for expected in [
            "--unshare-user --disable-userns --unshare-ipc --unshare-pid",
            "--die-with-parent --new-session",
            "--uid 1000 --gid 1000 --cap-drop ALL --seccomp 7 --clearenv --setenv A 1 2 --ro-bind /usr /usr --symlink usr/bin /bin",
            "--size 4096 --tmpfs /dev/shm --size 4096 --tmpfs /tmp --size 4096 --tmpfs /out --ro-bind /home/me/task /workspace --ro-bind /home/me/facts /workspace/facts --remount-ro /dev/shm --remount-ro /tmp --remount-ro /dev --remount-ro / --chdir /workspace -- python3 agent.py",
            "--ro-bind /dev/null /proc/keys",
        ] {
            assert!(told.contains(expected), "expected {expected} in {told}");
        }
        assert!(!told.contains("--bind") && !told.contains("--share-net") && !told.contains("--dev-bind"), "{told}");
    }
}
