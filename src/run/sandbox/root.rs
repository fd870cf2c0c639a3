//! The programs and libraries that an agent has: the machine's own, or an unpacked image's.
//!
//! Promises: of the machine, what it needs to run programs and to check certificates, and nothing about who uses it: no home, no
//! accounts, no keys, no configuration of services; of an image that lies in an OCI bundle, what it says to run, where and in which
//! environment, as a kubelet takes it. Refuses: to be written to, and whatever else a bundle asks for: users, mounts, privileges.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{Bind, Entry};
use crate::run::{RunError, open_to_agent};

/// What an OCI bundle says of itself.
const BUNDLE: &str = "config.json";

/// Where programs and libraries are.
const PROGRAMS: [&str; 6] = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64"];
/// What of `/etc` programs need, none of it secret: `/etc/ssl` as a whole has private keys.
const SETTINGS: [&str; 10] = [
    "/etc/alternatives",
    "/etc/ca-certificates",
    "/etc/crypto-policies",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/mime.types",
    "/etc/pki/tls/certs",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
];
/// Files that say who is there and how names are found: nobody but the agent, and by no server.
const OWN: [(&str, &str); 4] = [
    ("passwd", "agent:x:1000:1000:agent:/:/bin/sh\n"),
    ("group", "agent:x:1000:\n"),
    ("hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"),
];

/// What of the machine is shown, if it is there.
pub fn shown() -> impl Iterator<Item = &'static str> {
    PROGRAMS.into_iter().chain(SETTINGS)
}

/// The machine's own. What is made for it lies in `folder`.
///
/// # Errors
/// If that cannot be written.
pub fn host(folder: &Path) -> io::Result<Vec<Entry>> {
    let mut root = Vec::new();
    for path in shown() {
        root.extend(entry(Path::new(path), path));
    }
    fs::create_dir_all(folder)?;
    for (name, text) in OWN {
        let from = folder.join(name);
        fs::write(&from, text)?;
        root.push(Entry::Bind(Bind::new(from, format!("/etc/{name}"))));
    }
    open_to_agent(folder)?;
    Ok(root)
}

/// An unpacked image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its folder, as it was named.
    pub folder: PathBuf,
    /// Its programs and libraries.
    root: PathBuf,
    /// What it says of running it: nothing, unless it lies in a bundle.
    pub process: Process,
}

/// What an image says of running it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Process {
    /// The command: entry point and arguments are one here.
    pub args: Vec<String>,
    /// `NAME=VALUE`.
    env: Vec<String>,
    /// The working folder.
    pub cwd: Option<String>,
}

/// What is read of a bundle's configuration.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Configuration {
    /// By which it is known to be one.
    #[serde(rename = "ociVersion")]
    _version: String,
    root: Root,
    #[serde(default)]
    process: Process,
}

#[derive(Deserialize)]
struct Root {
    path: PathBuf,
}

impl Image {
    /// The image in this folder: an OCI bundle, as `umoci unpack` makes one, or the bare root.
    ///
    /// # Errors
    /// If it is a bundle that cannot be read, or has no root.
    pub fn open(folder: PathBuf) -> Result<Self, RunError> {
        let file = folder.join(BUNDLE);
        let told = match fs::read(&file) {
            // An image may have a file of that name, which is none of ours.
            Ok(text) => serde_json::from_slice(&text).ok(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(cause) => return Err(RunError::File { path: file, cause }),
        };
        let Some(Configuration { root, process, .. }) = told else {
            return Ok(Self { root: folder.clone(), folder, process: Process::default() });
        };
        // A path from the top stays one.
        let root = folder.join(root.path);
        match fs::canonicalize(&root) {
            Ok(root) => Ok(Self { folder, root, process }),
            Err(cause) => Err(RunError::File { path: root, cause }),
        }
    }

    /// The folder of its programs and libraries.
    pub fn root(&self) -> &PathBuf {
        &self.root
    }

    /// Its programs and libraries.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn entries(&self) -> io::Result<Vec<Entry>> {
        image(&self.root)
    }
}

impl Process {
    /// Its variables.
    pub fn variables(&self) -> impl Iterator<Item = (&str, &str)> {
        self.env.iter().filter_map(|one| one.split_once('='))
    }
}

fn image(folder: &Path) -> io::Result<Vec<Entry>> {
    let mut names: Vec<_> = fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    names.sort_by_key(fs::DirEntry::file_name);
    // Those are the sandbox's to make.
    let own = |name: &str| ["dev", "proc", "sys", "tmp"].contains(&name);
    let mut root = Vec::new();
    for one in names {
        let name = one.file_name();
        let Some(name) = name.to_str().filter(|name| !own(name)) else { continue };
        root.extend(entry(&one.path(), &format!("/{name}")));
    }
    Ok(root)
}

/// What is there, as it is there: a link stays one.
fn entry(from: &Path, to: &str) -> Option<Entry> {
    let target = fs::read_link(from).ok().and_then(|target| target.to_str().map(str::to_owned));
    match target {
        Some(target) if to.matches('/').count() == 1 => Some(Entry::Link { target, at: to.to_owned() }),
        _ => fs::canonicalize(from).ok().map(|from| Entry::Bind(Bind::new(from, to))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_machine_there_is_nothing_about_its_people() {
        let folder = tempfile::tempdir().unwrap();
        let root = host(folder.path()).unwrap();
        let seen: Vec<_> = root
            .iter()
            .map(|entry| match entry {
                Entry::Bind(bind) => (bind.to.as_str(), bind.from.starts_with(folder.path())),
                Entry::Link { at, .. } => (at.as_str(), false),
            })
            .collect();
        assert!(seen.contains(&("/usr", false)) && seen.contains(&("/etc/passwd", true)), "{seen:?}");
        for private in ["/etc", "/home", "/root", "/var", "/etc/ssl", "/etc/shadow", "/run", "/opt"] {
            assert!(!seen.iter().any(|(to, _)| *to == private), "{private} in {seen:?}");
        }
    }

    #[test]
    fn a_bundle_says_what_to_run_and_a_bare_root_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(folder.path()).unwrap();
        fs::create_dir_all(path.join("image/usr")).unwrap();
        let bare = Image::open(path.join("image")).unwrap();
        assert_eq!(bare.process, Process::default());

        let bundle = serde_json::json!({
            "ociVersion": "1.0.2", "root": {"path": "image", "readonly": false}, "hostname": "x",
            "process": {"user": {"uid": 0}, "args": ["python3", "agent.py"], "env": ["A=b=c", "none"], "cwd": "/work", "terminal": true},
        });
        fs::write(path.join(BUNDLE), bundle.to_string()).unwrap();
        let image = Image::open(path.clone()).unwrap();
        assert_eq!(image.process.args, ["python3", "agent.py"]);
        assert_eq!(image.process.variables().collect::<Vec<_>>(), [("A", "b=c")]);
        assert_eq!(image.process.cwd.as_deref(), Some("/work"));
        assert_eq!(image.entries().unwrap(), bare.entries().unwrap());

        // A file of the image's own.
        fs::write(path.join("image").join(BUNDLE), "{}").unwrap();
        assert_eq!(Image::open(path.join("image")).unwrap().process, Process::default());
        fs::remove_dir_all(path.join("image")).unwrap();
        assert!(matches!(Image::open(path), Err(RunError::File { .. })));
    }
}
