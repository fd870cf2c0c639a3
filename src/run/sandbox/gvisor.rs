//! The OCI bundle for gVisor: a configuration, and a root folder with a mount point for everything that is mounted.
//!
//! Guarantees: the configuration is a pure function of the cell. The network is that of the namespace in which gVisor is started, which has
//! nothing but loopback. The sandbox has no host devices, and no Unix sockets or FIFOs of the host. It writes to nothing but the cell's
//! write scopes.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{Bind, Cell, Entry};
use crate::{render::agent::UID, run::open_to_agent};

/// The root folder in the bundle.
const ROOT: &str = "rootfs";

/// Returns the arguments of `runsc` for a bundle in this folder.
pub(super) fn arguments(folder: &Path) -> Vec<String> {
    let at = |name: &str| folder.join(name).display().to_string();
    [
        "--root",
        &at("state"),
        // The network of the namespace: loopback, where the harness listens.
        "--network=host",
        "--rootless",
        "--ignore-cgroups",
        // Only mounted files exist, and nothing is written to the bundle.
        "--overlay2=root:memory",
        // Sockets and FIFOs of the machine lead to none of its processes.
        "--host-uds=none",
        "--host-fifo=none",
        "run",
        "--bundle",
        &at(""),
        "agent",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Writes the bundle, from the cell and from the cell as the view shows it.
pub(super) fn prepare((cell, viewed): (&Cell, &Cell), folder: &Path) -> io::Result<()> {
    let root = folder.join(ROOT);
    for name in ["proc", "dev", "sys"] {
        fs::create_dir_all(root.join(name))?;
    }
    let inside = |path: &str| root.join(path.trim_start_matches('/'));
    for entry in &cell.root {
        match entry {
            Entry::Bind(bind) => place(bind, &inside(&bind.to))?,
            Entry::Link { target, at } => {
                let at = inside(at);
                at.parent().map_or(Ok(()), fs::create_dir_all)?;
                symlink(target, at)?;
            }
        }
    }
    for path in cell.scopes.iter().map(|(path, _)| path).chain(&cell.covered) {
        fs::create_dir_all(inside(path))?;
    }
    for bind in &cell.binds {
        // A bind inside another bind has its mount point in that one.
        if !cell.binds.iter().any(|other| bind.to.starts_with(&format!("{}/", other.to))) {
            place(bind, &inside(&bind.to))?;
        }
    }
    open_to_agent(&root)?;
    fs::write(folder.join("config.json"), config(viewed, &root).to_string())
}

/// Creates a mount point: a folder for a folder, a file for a file.
fn place(bind: &Bind, at: &PathBuf) -> io::Result<()> {
    if bind.from.is_dir() {
        return fs::create_dir_all(at);
    }
    at.parent().map_or(Ok(()), fs::create_dir_all)?;
    fs::File::create(at).map(drop)
}

fn config(cell: &Cell, root: &Path) -> Value {
    let bind = |bind: &Bind| json!({"destination": bind.to, "type": "bind", "source": bind.from, "options": ["rbind", "ro", "nosuid", "nodev"]});
    let memory = |path: &str, size: u64, how: &str| {
        let options = [how, "nosuid", "nodev", &format!("size={size}"), "mode=1777"].map(str::to_owned);
        json!({"destination": path, "type": "tmpfs", "source": "tmpfs", "options": options})
    };
    let mut mounts = vec![json!({"destination": "/proc", "type": "proc", "source": "proc"})];
    mounts.extend(cell.root.iter().filter_map(|entry| match entry {
        Entry::Bind(one) => Some(bind(one)),
        Entry::Link { .. } => None,
    }));
    // A covered folder with a bind below it is a folder of the read-only root: a file system of its own would have no mount point for the
    // bind.
    let below = |path: &String| cell.binds.iter().any(|bind| bind.to.starts_with(&format!("{path}/")));
    mounts.extend(cell.covered.iter().filter(|path| !below(path)).map(|path| memory(path, 4096, "ro")));
    mounts.extend(cell.scopes.iter().map(|(path, size)| memory(path, *size, "rw")));
    mounts.extend(cell.binds.iter().map(bind));
    let env: Vec<_> = cell.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    json!({
        "ociVersion": "1.0.2",
        "hostname": "agent",
        "process": {
            "user": {"uid": UID, "gid": UID},
            "args": cell.command,
            "env": env,
            "cwd": cell.cwd,
            "noNewPrivileges": true,
            "capabilities": {"bounding": [], "effective": [], "inheritable": [], "permitted": [], "ambient": []},
        },
        "root": {"path": root, "readonly": true},
        "mounts": mounts,
        "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]},
    })
}

#[cfg(test)]
mod tests {
    use super::{super::tests::cell, *};

    #[test]
    fn everything_is_read_only_but_the_scopes() {
        let config = config(&cell(), Path::new("/bundle/rootfs"));
        assert_eq!(config["root"], json!({"path": "/bundle/rootfs", "readonly": true}));
        assert_eq!(config["process"]["args"], json!(["python3", "agent.py"]));
        assert_eq!(config["process"]["env"], json!(["A=1 2"]));
        let mounts = config["mounts"].as_array().unwrap();
        let writable: Vec<_> = mounts
            .iter()
            .filter(|mount| mount["type"] != "proc" && !mount["options"].as_array().unwrap().contains(&json!("ro")))
            .map(|mount| mount["destination"].as_str().unwrap())
            .collect();
        assert_eq!(writable, ["/out"]);
        let sets = config["process"]["capabilities"].as_object().unwrap();
        assert!(sets.values().all(|set| set == &json!([])), "{sets:?}");
    }

    #[test]
    fn a_bundle_has_a_place_for_everything() {
        let folder = tempfile::tempdir().unwrap();
        prepare((&cell(), &cell()), folder.path()).unwrap();
        let root = folder.path().join(ROOT);
        assert!(["usr", "out", "tmp", "dev/shm"].iter().all(|path| root.join(path).is_dir()));
        assert_eq!(fs::read_link(root.join("bin")).unwrap(), Path::new("usr/bin"));
        assert!(!root.join("workspace/facts").exists());
    }
}
