//! The programs and libraries that an agent has: the machine's own, or an unpacked image's.
//!
//! Promises: of the machine, what it needs to run programs and to check certificates, and nothing about who uses it: no home, no
//! accounts, no keys, no configuration of services. Refuses: to be written to.

use std::{fs, io, path::Path};

use super::{Bind, Entry};

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

/// The machine's own. What is made for it lies in `folder`.
///
/// # Errors
/// If that cannot be written.
pub fn host(folder: &Path) -> io::Result<Vec<Entry>> {
    let mut root = Vec::new();
    for path in PROGRAMS.into_iter().chain(SETTINGS) {
        root.extend(entry(Path::new(path), path));
    }
    fs::create_dir_all(folder)?;
    for (name, text) in OWN {
        let from = folder.join(name);
        fs::write(&from, text)?;
        root.push(Entry::Bind(Bind { from, to: format!("/etc/{name}") }));
    }
    Ok(root)
}

/// Those of an unpacked image.
///
/// # Errors
/// If it cannot be read.
pub fn image(folder: &Path) -> io::Result<Vec<Entry>> {
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
        _ => fs::canonicalize(from).ok().map(|from| Entry::Bind(Bind { from, to: to.to_owned() })),
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
}
