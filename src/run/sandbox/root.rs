//! The programs and libraries of an agent: the machine's own, or those of an unpacked image.
//!
//! Guarantees: of the machine, the agent sees what it needs to run programs and to check certificates. It sees nothing about the machine's
//! users: no home folders, accounts, keys or configuration of services. From an image in an OCI bundle, Belay takes the command, the
//! working folder and the environment, as a kubelet does. The root is read-only.
//!
//! Non-goals: everything else that a bundle asks for: users, mounts, privileges.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{Bind, Entry};
use crate::run::{RunError, open_to_agent};

/// The configuration file of an OCI bundle.
const BUNDLE: &str = "config.json";

/// The folders of programs and libraries.
const PROGRAMS: [&str; 6] = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64"];
/// The parts of `/etc` that programs need. None is secret. `/etc/ssl` as a whole contains private keys.
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
/// Files that define accounts and name resolution: the agent is the only account, and no name server is used.
const OWN: [(&str, &str); 4] = [
    ("passwd", "agent:x:1000:1000:agent:/:/bin/sh\n"),
    ("group", "agent:x:1000:\n"),
    ("hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"),
];

/// Returns the paths of the machine that are shown, if they exist.
pub fn shown() -> impl Iterator<Item = &'static str> {
    PROGRAMS.into_iter().chain(SETTINGS)
}

/// Returns the machine's own programs and libraries. Files that are generated for them lie in `folder`.
///
/// # Errors
/// Returns an error if `folder` cannot be written.
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
    /// Its folder, as the user named it.
    pub folder: PathBuf,
    /// Its programs and libraries.
    root: PathBuf,
    /// What the image says about running it: nothing, unless it lies in a bundle.
    pub process: Process,
}

/// What an image says about running it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Process {
    /// The command: the entry point and its arguments in one list.
    pub args: Vec<String>,
    /// The environment, as `NAME=VALUE`.
    env: Vec<String>,
    /// The working folder.
    pub cwd: Option<String>,
}

/// The parts of a bundle's configuration that Belay reads.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Configuration {
    /// The member that identifies the file as a bundle's configuration.
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
    /// Opens the image in this folder: an OCI bundle, as `umoci unpack` creates it, or a bare root.
    ///
    /// # Errors
    /// Returns an error if it is a bundle that cannot be read or that has no root.
    pub fn open(folder: PathBuf) -> Result<Self, RunError> {
        let file = folder.join(BUNDLE);
        let told = match fs::read(&file) {
            // An image may contain an unrelated file of this name.
            Ok(text) => serde_json::from_slice(&text).ok(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(cause) => return Err(RunError::File { path: file, cause }),
        };
        let Some(Configuration { root, process, .. }) = told else {
            return Ok(Self { root: folder.clone(), folder, process: Process::default() });
        };
        // An absolute path stays absolute.
        let root = folder.join(root.path);
        match fs::canonicalize(&root) {
            Ok(root) => Ok(Self { folder, root, process }),
            Err(cause) => Err(RunError::File { path: root, cause }),
        }
    }

    /// Returns the folder of its programs and libraries.
    pub fn root(&self) -> &PathBuf {
        &self.root
    }

    /// Returns its programs and libraries.
    ///
    /// # Errors
    /// Returns an error if they cannot be read.
    pub fn entries(&self) -> io::Result<Vec<Entry>> {
        image(&self.root)
    }
}

impl Process {
    /// Returns its environment variables.
    pub fn variables(&self) -> impl Iterator<Item = (&str, &str)> {
        self.env.iter().filter_map(|one| one.split_once('='))
    }
}

fn image(folder: &Path) -> io::Result<Vec<Entry>> {
    let mut names: Vec<_> = fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    names.sort_by_key(fs::DirEntry::file_name);
    // The sandbox makes these folders itself.
    let own = |name: &str| ["dev", "proc", "sys", "tmp"].contains(&name);
    let mut root = Vec::new();
    for one in names {
        let name = one.file_name();
        let Some(name) = name.to_str().filter(|name| !own(name)) else { continue };
        root.extend(entry(&one.path(), &format!("/{name}")));
    }
    Ok(root)
}

/// Returns the entry for a path. A link stays a link.
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

        // A file of that name that belongs to the image.
        fs::write(path.join("image").join(BUNDLE), "{}").unwrap();
        assert_eq!(Image::open(path.join("image")).unwrap().process, Process::default());
        fs::remove_dir_all(path.join("image")).unwrap();
        assert!(matches!(Image::open(path), Err(RunError::File { .. })));
    }
}
