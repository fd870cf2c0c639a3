//! Mounts the machine's files that a sandbox sees, in a mount namespace that ends with the sandbox.
//!
//! ```text
//! folder ─▶ overlay of it, read-only ─▶ shown whole, where nothing in it is hidden
//!                                   └─▶ else a new folder with its entries, one by one, without hidden ones
//! ```
//!
//! Guarantees: in an overlay, a socket or a FIFO of the machine leads to no process, whenever it was created; only its name is visible. A
//! lock on a file there is a lock of the overlay. A hidden file has no path in a sandbox that a rename outside could uncover. Neither have
//! copies that are made beside it later. A file system that is mounted on the machine while a sandbox runs does not appear in it. The
//! kernel's own file systems are never shown. If something cannot be shown with these guarantees, nothing starts.
//!
//! Non-goals: following every change. A folder with something hidden in it is shown with the entries that it had when the sandbox started.
//! A file that is replaced by another of the same name may still be seen as it was.

use std::{
    collections::BTreeSet,
    ffi::{CString, OsStr, OsString},
    fs, io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::Mode,
    mount::{MountFlags, mount, mount_bind_recursive},
};
use serde::{Deserialize, Serialize};

use super::{Bind, Cell, Entry};

/// The hidden subcommand of `belay` that mounts the view and then runs the sandbox.
pub const VIEW: &str = "__view";
/// The names in a cell's folder of the plan and of the folder where the view is mounted.
const PLAN: &str = "view.json";
const STAGE: &str = "view";
/// The maximum number of entries in a folder that contains something hidden. Each entry is a mount.
const MOST: usize = 4096;
/// File systems that show the state of the kernel and hold no files of users.
const KERNELS: [&str; 18] = [
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "securityfs",
    "sysfs",
    "tracefs",
];
/// The minimum OOM score adjustment of an agent. The kernel then kills the agent before other processes of its user, including the harness.
const OOM_SCORE: i32 = 500;

/// The content of the plan file.
#[derive(Serialize, Deserialize)]
struct Plan {
    /// Whether sockets and FIFOs lead nowhere in that sandbox without an overlay.
    apart: bool,
    shown: Vec<Shown>,
}

/// A folder or a file, and what is hidden in it.
#[derive(Clone, Serialize, Deserialize)]
struct Shown {
    from: PathBuf,
    hidden: Vec<PathBuf>,
}

/// Writes the plan of what the cell sees, and returns the cell with the paths in that view. `apart` says whether sockets and FIFOs lead
/// nowhere in that sandbox without an overlay.
pub(super) fn prepare(cell: &Cell, folder: &Path, apart: bool) -> io::Result<Cell> {
    fs::create_dir_all(folder.join(STAGE))?;
    let mut plan = Plan { apart, shown: Vec::new() };
    let mut viewed = |bind: &Bind| {
        let at = folder.join(STAGE).join(place(plan.shown.len()));
        plan.shown.push(Shown { from: bind.from.clone(), hidden: bind.hidden.clone() });
        Bind { from: at, to: bind.to.clone(), hidden: Vec::new() }
    };
    let root = cell.root.iter().map(|entry| match entry {
        Entry::Bind(bind) => Entry::Bind(viewed(bind)),
        Entry::Link { .. } => entry.clone(),
    });
    let root = root.collect();
    let binds = cell.binds.iter().map(viewed).collect();
    fs::write(folder.join(PLAN), serde_json::to_vec(&plan)?)?;
    Ok(Cell { root, binds, ..cell.clone() })
}

fn place(index: usize) -> String {
    format!("at-{index}")
}

/// Runs the hidden subcommand: mounts what the plan in that folder lists, resets what else was inherited, and becomes the command. It runs
/// in a mount namespace of its own in which it may mount.
///
/// # Errors
/// Returns an error if something could not be shown. Nothing has started then.
pub async fn enter(folder: &Path, command: &[OsString]) -> Result<std::convert::Infallible, String> {
    let failed = |what: &dyn std::fmt::Display| format!("cannot show files in the sandbox: {what}");
    // The agent must see the folders that are created here, whichever user it is in its sandbox.
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let text = fs::read(folder.join(PLAN)).map_err(|error| failed(&error))?;
    let plan: Plan = serde_json::from_slice(&text).map_err(|error| failed(&error))?;
    let stage = folder.join(STAGE);
    mount("tmpfs", &stage, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=755")
        .map_err(|error| failed(&error))?;
    // Mount options have no room for every folder name, so the names below are short ones relative to this folder.
    std::env::set_current_dir(&stage).map_err(|error| failed(&error))?;
    let mounts = fs::read("/proc/self/mountinfo").map_err(|error| failed(&error))?;
    fs::create_dir(NOTHING).map_err(|error| failed(&error))?;
    let mut stage = Stage { mounts: mounted(&mounts), apart: plan.apart, overlays: 0 };
    for (index, shown) in plan.shown.iter().enumerate() {
        stage.show(shown, Path::new(&place(index)))?;
    }
    std::env::set_current_dir("/").map_err(|error| failed(&error))?;
    let _caught = disinherit().await.map_err(|error| failed(&error))?;
    let [program, arguments @ ..] = command else { return Err(failed(&"there is no command")) };
    let mut next = std::process::Command::new(program);
    if signals("SigBlk:").map_err(|error| failed(&error))? != 0 {
        // Safe Rust cannot unblock a signal. GNU's `env` can.
        next = std::process::Command::new("env");
        next.arg("--default-signal").arg(program);
    }
    Err(failed(&next.args(arguments).exec()))
}

/// Resets what a process inherits beside file descriptors: ignored signals and a low OOM score. A signal whose stream is alive at `exec`
/// has its default disposition in the next program.
async fn disinherit() -> io::Result<Vec<tokio::signal::unix::Signal>> {
    let score = fs::read_to_string("/proc/self/oom_score_adj")?;
    if score.trim().parse::<i32>().is_ok_and(|score| score < OOM_SCORE) {
        fs::write("/proc/self/oom_score_adj", OOM_SCORE.to_string())?;
    }
    let ignored = signals("SigIgn:")?;
    let numbers = (1..=64_i32).filter(|number| (ignored >> (number - 1)) & 1 == 1);
    // A signal that cannot be caught cannot be ignored either.
    let caught = numbers
        .filter_map(|number| tokio::signal::unix::signal(tokio::signal::unix::SignalKind::from_raw(number)).ok());
    Ok(caught.collect())
}

/// Returns a set of signals of this process, see proc_pid_status(5).
fn signals(set: &str) -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix(set)?.trim(), 16).ok());
    mask.ok_or_else(|| io::Error::other(format!("expected {set} in /proc/self/status, found none")))
}

/// The name of the empty folder.
const NOTHING: &str = "none";

/// The working folder, in which views are made.
struct Stage {
    /// The mount points and the types of their file systems.
    mounts: Vec<(PathBuf, String)>,
    apart: bool,
    overlays: usize,
}

impl Stage {
    fn show(&mut self, shown: &Shown, at: &Path) -> Result<(), String> {
        let Shown { from, hidden } = shown;
        let unusable = |error: io::Error| format!("cannot show {} in the sandbox: {error}", from.display());
        if let Some(kind) = self.kernels(from) {
            return Err(format!(
                "expected files to show in the sandbox, found {}, which is the kernel's own ({kind}); show another folder",
                from.display()
            ));
        }
        let is = fs::metadata(from).map_err(unusable)?.file_type();
        if is.is_file() {
            return bind(from, at, false).map_err(unusable);
        }
        if !is.is_dir() {
            let kind = if is.is_socket() {
                "a socket"
            } else if is.is_fifo() {
                "a FIFO"
            } else {
                "a device"
            };
            return Err(format!(
                "expected a folder or a regular file to show in the sandbox, found {kind}: {}; show another",
                from.display()
            ));
        }
        self.folder(from, hidden, at)
    }

    /// Shows a folder at a path that does not exist yet.
    fn folder(&mut self, from: &Path, hidden: &[PathBuf], at: &Path) -> Result<(), String> {
        let unusable = |error: io::Error| format!("cannot show {} in the sandbox: {error}", from.display());
        if hidden.iter().any(|hidden| from.starts_with(hidden)) {
            return bind(Path::new(NOTHING), at, true).map_err(unusable);
        }
        let below: BTreeSet<PathBuf> = self
            .mounts
            .iter()
            .map(|(path, _)| path)
            .filter(|path| *path != from && path.starts_with(from))
            .cloned()
            .collect();
        if self.apart {
            return self.arrange(from, from, (hidden, &BTreeSet::new()), at);
        }
        if below.is_empty() {
            let overlay = self.overlay(from)?;
            return self.arrange(&overlay, from, (hidden, &below), at);
        }
        self.arrange(from, from, (hidden, &below), at)
    }

    /// Shows `from` through `source`: as a whole if nothing in it is hidden or mounted, else entry by entry.
    fn arrange(
        &mut self,
        source: &Path,
        from: &Path,
        (hidden, mounts): (&[PathBuf], &BTreeSet<PathBuf>),
        at: &Path,
    ) -> Result<(), String> {
        let unusable = |error: io::Error| format!("cannot show {} in the sandbox: {error}", from.display());
        let cut = |path: &Path| hidden.iter().chain(mounts).any(|one| one != path && one.starts_with(path));
        if !cut(from) {
            return bind(source, at, true).map_err(unusable);
        }
        fs::create_dir(at).map_err(unusable)?;
        let names: Vec<_> = fs::read_dir(source).map_err(unusable)?.collect::<Result<_, _>>().map_err(unusable)?;
        if names.len() > MOST {
            return Err(format!(
                "expected at most {MOST} files and folders beside something that is hidden from the agent, found {} in {}; move what is hidden ({}) to a folder of its own",
                names.len(),
                from.display(),
                hidden.iter().find(|one| one.starts_with(from)).unwrap_or(&from.to_owned()).display()
            ));
        }
        for name in names.iter().map(fs::DirEntry::file_name) {
            let (inside, path, at) = (source.join(&name), from.join(&name), at.join(&name));
            if hidden.contains(&path) || hidden.iter().any(|one| resembles(one, &path)) || self.kernels(&path).is_some()
            {
                continue;
            }
            let is = fs::symlink_metadata(&inside).map_err(unusable)?.file_type();
            if is.is_symlink() {
                symlink(fs::read_link(&inside).map_err(unusable)?, &at).map_err(unusable)?;
            } else if is.is_dir() && !mounts.is_empty() {
                // No overlay covers it, because something is mounted beside it or in it.
                self.folder(&path, hidden, &at)?;
            } else if is.is_dir() {
                self.arrange(&inside, &path, (hidden, mounts), &at)?;
            } else if is.is_file() {
                bind(&inside, &at, false).map_err(unusable)?;
            }
        }
        Ok(())
    }

    /// Mounts a read-only overlay of a folder that has no mounts below it.
    fn overlay(&mut self, from: &Path) -> Result<PathBuf, String> {
        let (lower, over) = (format!("l-{}", self.overlays), format!("o-{}", self.overlays));
        self.overlays += 1;
        let made = symlink(from, &lower).and_then(|()| fs::create_dir(&over)).and_then(|()| {
            let options = CString::new(format!("lowerdir={lower}:{NOTHING}"))?;
            let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
            Ok(mount("overlay", &over, "overlay", flags, options.as_c_str())?)
        });
        made.map(|()| PathBuf::from(&over)).map_err(|error| {
            format!(
                "expected an overlay file system over {}, because its sockets and FIFOs can lead to processes of this machine, found none ({error}); use Linux 5.11 or later and a file system that can be under an overlay, run with gVisor (--sandbox runsc), or show another folder",
                from.display()
            )
        })
    }

    /// Returns the type of the file system that contains the path, if it is one of the kernel's.
    fn kernels(&self, path: &Path) -> Option<&str> {
        let over = self.mounts.iter().filter(|(at, _)| path.starts_with(at));
        // Of several mounts at one path, the last is visible.
        let (_, kind) = over.max_by_key(|(at, _)| at.components().count())?;
        KERNELS.contains(&kind.as_str()).then_some(kind.as_str())
    }
}

/// Binds a file or a folder to a path that does not exist yet.
fn bind(from: &Path, at: &Path, folder: bool) -> io::Result<()> {
    if folder {
        fs::create_dir(at)?;
    } else {
        fs::File::create_new(at)?;
    }
    // Mounts below come along, because a namespace with fewer rights cannot remove them.
    Ok(mount_bind_recursive(from, at)?)
}

/// Returns whether a file beside a hidden one looks like a copy of it that an editor or a user left: `.key.swp`, `key~`, `#key#`,
/// `key.bak`, `key,v`.
fn resembles(hidden: &Path, other: &Path) -> bool {
    let name = |path: &Path| path.file_name().map(|name| name.as_bytes().to_vec()).unwrap_or_default();
    if hidden.parent() != other.parent() || hidden.is_dir() {
        return false;
    }
    let plain = |name: &[u8]| {
        name.iter().position(|byte| !b".#~%".contains(byte)).map(|at| name.get(at..).unwrap_or_default().to_vec())
    };
    let (Some(hidden), Some(other)) = (plain(&name(hidden)), plain(&name(other))) else { return false };
    match other.strip_prefix(hidden.as_slice()) {
        Some([]) => true,
        Some([next, ..]) => b".~#,-_%".contains(next),
        None => false,
    }
}

/// Parses mount points and file system types, see proc_pid_mountinfo(5).
fn mounted(text: &[u8]) -> Vec<(PathBuf, String)> {
    let lines = text.split(|byte| *byte == b'\n');
    let mount = |line: &[u8]| {
        let mut words = line.split(|byte| *byte == b' ');
        let at = plain(words.nth(4)?);
        words.find(|word| *word == b"-")?;
        Some((PathBuf::from(OsString::from_vec(at)), String::from_utf8_lossy(words.next()?).into_owned()))
    };
    lines.filter_map(mount).collect()
}

/// Decodes the kernel's escapes: a backslash and three octal digits.
fn plain(escaped: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(escaped.len());
    let mut rest = escaped;
    while let [first, others @ ..] = rest {
        let digits = others.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(byte) = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            plain.push(byte);
            rest = others.get(3..).unwrap_or_default();
        } else {
            plain.push(*first);
            rest = others;
        }
    }
    plain
}

/// Returns every path through which this path reaches its file: each symbolic link on the way, and the file itself. A link counts because
/// replacing it by its target would put the file at its path.
pub fn names(path: &Path) -> Vec<PathBuf> {
    /// The maximum number of links on one path, as in the kernel.
    const LINKS: usize = 40;
    let Ok(path) = std::path::absolute(path) else { return Vec::new() };
    let parts =
        |path: &Path| path.components().rev().map(|part| part.as_os_str().to_owned()).collect::<Vec<OsString>>();
    let (mut rest, mut at, mut found) = (parts(&path), PathBuf::from("/"), Vec::new());
    while let Some(part) = rest.pop() {
        if part == OsStr::new("..") {
            at.pop();
            continue;
        }
        let next = if part == OsStr::new(".") { at.clone() } else { at.join(&part) };
        match fs::read_link(&next) {
            Ok(target) if found.len() < LINKS => {
                found.push(next);
                // An absolute target starts at the root: `join` then drops the earlier parts.
                rest.extend(parts(&target));
            }
            _ => at = next,
        }
    }
    found.push(at);
    found
}

/// Returns other names (hard links) of these files below these folders. If no file has another name, no folder is read.
///
/// # Errors
/// Returns an error if a folder that could contain one cannot be read.
pub fn other_names(files: &[PathBuf], folders: &[&Path]) -> io::Result<Vec<PathBuf>> {
    use std::os::unix::fs::MetadataExt;
    let several = files.iter().filter_map(|file| fs::symlink_metadata(file).ok());
    let several: BTreeSet<_> =
        several.filter(|is| is.is_file() && is.nlink() > 1).map(|is| (is.dev(), is.ino())).collect();
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> =
        folders.iter().filter(|_| !several.is_empty()).map(|one| (*one).to_owned()).collect();
    while let Some(folder) = folders.pop() {
        for entry in
            fs::read_dir(&folder).map_err(|error| io::Error::other(format!("{}: {error}", folder.display())))?
        {
            let entry = entry?;
            // A file that has been removed meanwhile has no name.
            let Ok(is) = entry.metadata() else { continue };
            if is.is_dir() {
                folders.push(entry.path());
            } else if several.contains(&(is.dev(), is.ino())) && !files.contains(&entry.path()) {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("key", true)]
    #[case(".key.swp", true)]
    #[case("key~", true)]
    #[case("#key#", true)]
    #[case(".#key", true)]
    #[case("key.bak", true)]
    #[case("key,v", true)]
    #[case("key-old", true)]
    #[case("keyboard", false)]
    #[case("monkey", false)]
    #[case("other", false)]
    #[case("...", false)]
    fn what_editors_leave_of_a_hidden_file_is_hidden(#[case] name: &str, #[case] expected: bool) {
        assert_eq!(resembles(Path::new("/a/key"), &Path::new("/a").join(name)), expected);
        assert!(!resembles(Path::new("/b/key"), &Path::new("/a").join(name)), "of another folder");
    }

    #[test]
    fn mounts_are_known_by_their_places_whatever_those_are_called() {
        let text = b"22 27 0:21 / /proc rw,relatime - proc proc rw\n\
            42 27 254:0 /x /a\\040b\\134c rw shared:1 master:2 - ext4 /dev/vda rw\nnonsense\n";
        let expected = [("/proc", "proc"), ("/a b\\c", "ext4")];
        let expected = expected.map(|(at, kind)| (PathBuf::from(at), kind.to_owned()));
        assert_eq!(mounted(text), expected);
        let stage = Stage { mounts: mounted(text), apart: false, overlays: 0 };
        assert_eq!(stage.kernels(Path::new("/proc/1")), Some("proc"));
        assert_eq!(stage.kernels(Path::new("/process")), None);
    }

    proptest::proptest! {
        #[test]
        fn escapes_of_any_name_are_undone(name in proptest::collection::vec(1_u8..=255, 0..40)) {
            let escaped: Vec<u8> = name.iter().flat_map(|byte| match byte {
                b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
                other => vec![*other],
            }).collect();
            proptest::prop_assert_eq!(plain(&escaped), name);
        }
    }

    #[test]
    fn a_file_has_the_names_of_all_links_that_lead_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let top = fs::canonicalize(folder.path()).unwrap();
        fs::create_dir_all(top.join("vault/..2026")).unwrap();
        fs::write(top.join("vault/..2026/key"), "k").unwrap();
        symlink("..2026", top.join("vault/..data")).unwrap();
        symlink("..data/key", top.join("vault/key")).unwrap();
        symlink(top.join("vault"), top.join("there")).unwrap();
        let expected = ["there", "vault/key", "vault/..data", "vault/..2026/key"].map(|name| top.join(name));
        assert_eq!(names(&top.join("there/../there/key")).into_iter().skip(1).collect::<Vec<_>>(), expected);
        // A missing file has the name it was looked up by, and a loop of links ends.
        assert_eq!(names(&top.join("none/./at")), [top.join("none/at")]);
        symlink("loop", top.join("loop")).unwrap();
        assert_eq!(names(&top.join("loop")).last(), Some(&top.join("loop")));
    }

    #[test]
    fn other_names_of_a_hidden_file_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let top = folder.path();
        fs::create_dir_all(top.join("a/b")).unwrap();
        let key = top.join("key");
        fs::write(&key, "k").unwrap();
        fs::write(top.join("a/b/same-text"), "k").unwrap();
        assert_eq!(other_names(std::slice::from_ref(&key), &[top]).unwrap(), Vec::<PathBuf>::new());
        fs::hard_link(&key, top.join("a/b/notes")).unwrap();
        assert_eq!(other_names(&[key], &[top]).unwrap(), [top.join("a/b/notes")]);
    }
}
