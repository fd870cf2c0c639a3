//! A folder that the probe is shown as the agent is shown the task's folder. It contains everything that must lead nowhere, and the checks
//! from within.
//!
//! Guarantees: each thing works from outside at the time of the probe, or the probe proves nothing. Some of it is created only after the
//! sandbox has started, and the hidden file is replaced all the time.
//!
//! Non-goals: examining the agent's own folders, which need not contain any of this.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, IsTerminal, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{OpenOptionsExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use serde::{Deserialize, Serialize};

use crate::run::{open_to_agent, sandbox::Bind};

/// The names of the open and the half-hidden part of the folder and of their files, and the content of those files.
const OPEN: &str = "open";
const HIDING: &str = "hiding";
const PLAIN: &str = "plain";
const HIDDEN: &str = "hidden";
const WORD: &str = "belay";
/// The suffixes of sockets and FIFOs: those created before the sandbox starts, and those created after.
const TIMES: [&str; 2] = ["before", "later"];
/// The pause between two replacements of the hidden file outside, and between two checks inside.
const PAUSE: Duration = Duration::from_millis(5);
/// The number of checks inside.
const LOOKS: u32 = 20;

/// The folder, and the open ends of its sockets and FIFOs.
pub(super) struct Outside {
    folder: PathBuf,
    /// A held lock. A sandbox with its own locks can take it once more.
    lock: File,
    /// The ends of the sockets and FIFOs that were created before the sandbox.
    _ends: Vec<(UnixListener, File)>,
}

/// The path of the folder inside the sandbox.
#[derive(Serialize, Deserialize)]
pub(super) struct Inside {
    pub(super) folder: PathBuf,
}

impl Outside {
    pub(super) fn make(folder: &Path) -> io::Result<Self> {
        for part in [OPEN, HIDING] {
            fs::create_dir_all(folder.join(part))?;
            fs::write(folder.join(part).join(PLAIN), WORD)?;
        }
        fs::write(folder.join(HIDING).join(HIDDEN), WORD)?;
        let lock = File::open(folder.join(OPEN).join(PLAIN))?;
        lock.lock()?;
        open_to_agent(folder)?;
        let held = vec![ends(&folder.join(OPEN), TIMES[0])?];
        Ok(Self { folder: folder.to_owned(), lock, _ends: held })
    }

    /// Returns the bind that shows the folder.
    pub(super) fn bind(&self, inside: &Inside) -> Bind {
        let hidden = self.folder.join(HIDING).join(HIDDEN);
        Bind::new(&self.folder, inside.folder.display().to_string()).without(&[hidden])
    }

    /// Changes the folder until the future is dropped, or returns the error that ended the changes.
    pub(super) async fn change(&self) -> io::Error {
        let change = async || -> io::Result<std::convert::Infallible> {
            let _later = ends(&self.folder.join(OPEN), TIMES[1])?;
            let hiding = self.folder.join(HIDING);
            for number in 0_u64.. {
                let new = hiding.join(format!(".new-{number}"));
                fs::write(&new, WORD)?;
                tokio::time::sleep(PAUSE).await;
                fs::rename(&new, hiding.join(HIDDEN))?;
            }
            Err(io::Error::other("it was changed for ever"))
        };
        match change().await {
            Err(error) => error,
        }
    }

    /// Returns what does not work from outside either.
    pub(super) fn silent(&self) -> Vec<String> {
        let open = self.folder.join(OPEN);
        let mut silent = reached(&open, &TIMES[..1]).map_or_else(
            |error| vec![error],
            |reached| {
                let all =
                    ["socket", "FIFO"].into_iter().filter(|kind| !reached.iter().any(|one| one.starts_with(kind)));
                all.map(|kind| format!("a {kind} of the probe's leads nowhere from outside either")).collect()
            },
        );
        let held = File::open(open.join(PLAIN)).map(|file| file.try_lock());
        if !matches!(held, Ok(Err(fs::TryLockError::WouldBlock))) {
            silent.push("a lock of the probe's does not hold from outside either".to_owned());
        }
        let hidden = self.folder.join(HIDING).join(HIDDEN);
        if fs::read_to_string(hidden).ok().as_deref() != Some(WORD) {
            silent.push("what is hidden from the probe is not there from outside either".to_owned());
        }
        let _ = self.lock.unlock();
        silent.into_iter().map(|one| format!("{one}, so that its silence inside proves nothing")).collect()
    }
}

/// Creates a socket with a listener, and a FIFO that is open and has a word in it.
fn ends(folder: &Path, when: &str) -> io::Result<(UnixListener, File)> {
    // Paths of sockets must be short, but the path of the folder may be long.
    let short = File::open(folder)?;
    let at = format!("/proc/self/fd/{}/socket-{when}", short.as_raw_fd());
    let socket = UnixListener::bind(&at)?;
    let fifo = folder.join(format!("fifo-{when}"));
    mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
    // In a sandbox with its own kernel the agent is another user. The isolation must keep it out, not the mode.
    for (path, mode) in [(Path::new(&at), 0o777), (fifo.as_path(), 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    let mut held = OpenOptions::new().read(true).write(true).open(fifo)?;
    held.write_all(WORD.as_bytes())?;
    Ok((socket, held))
}

/// Returns what leads to a process: sockets, and FIFOs by either end.
fn reached(folder: &Path, times: &[&str]) -> Result<Vec<String>, String> {
    let short = File::open(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let at = |name: &str| format!("/proc/self/fd/{}/{name}", short.as_raw_fd());
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let mut reached = Vec::new();
    for when in times {
        let (socket, fifo) = (format!("socket-{when}"), format!("fifo-{when}"));
        if UnixStream::connect(at(&socket)).is_ok() {
            reached.push(format!("socket {socket}"));
        }
        let mut word = [0; WORD.len()];
        let open = |write: bool| OpenOptions::new().read(!write).write(write).custom_flags(nonblocking).open(at(&fifo));
        if open(false).and_then(|mut end| end.read(&mut word)).is_ok_and(|read| read > 0) {
            reached.push(format!("FIFO {fifo} by reading"));
        }
        // A FIFO without a reader cannot be opened for writing.
        if open(true).is_ok() {
            reached.push(format!("FIFO {fifo} by writing"));
        }
    }
    Ok(reached)
}

impl Inside {
    /// Returns everything that works here and must not.
    pub(super) async fn breaches(&self) -> Vec<String> {
        let (open, hiding) = (self.folder.join(OPEN), self.folder.join(HIDING));
        let mut breaches = Vec::new();
        for part in [&open, &hiding] {
            // A folder that is not shown at all proves nothing about what is hidden in it.
            if fs::read_to_string(part.join(PLAIN)).ok().as_deref() != Some(WORD) {
                breaches.push(format!("{} is not shown, so that nothing is proven by it", part.join(PLAIN).display()));
            }
        }
        let mut leads = |reached: Result<Vec<String>, String>| match reached {
            Ok(reached) => {
                breaches.extend(reached.iter().map(|one| format!("{one} of the machine's leads to a process")))
            }
            Err(error) => breaches.push(error),
        };
        let names = || -> BTreeSet<OsString> {
            fs::read_dir(&hiding).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect()
        };
        // Names that existed when the sandbox started may be visible.
        let (first, mut seen) = (names(), Vec::new());
        for _ in 0..LOOKS {
            leads(reached(&open, &TIMES));
            seen.extend(names().difference(&first).map(|name| name.display().to_string()));
            seen.extend(fs::read(hiding.join(HIDDEN)).ok().map(|_| HIDDEN.to_owned()));
            tokio::time::sleep(PAUSE).await;
        }
        breaches.extend(seen.iter().map(|name| format!("{name} is seen, and must not be")));
        if File::open(open.join(PLAIN)).is_ok_and(|file| matches!(file.try_lock(), Err(fs::TryLockError::WouldBlock))) {
            breaches.push("a lock of the machine's holds here".to_owned());
        }
        if io::stdin().is_terminal() || io::stdout().is_terminal() || io::stderr().is_terminal() {
            breaches.push("a standard descriptor is a terminal".to_owned());
        }
        if File::open("/dev/tty").is_ok() {
            breaches.push("there is a terminal that controls this process".to_owned());
        }
        breaches.extend(status(&fs::read_to_string("/proc/self/status").unwrap_or_default()));
        if fs::read_to_string("/proc/keys").is_ok_and(|keys| !keys.is_empty()) {
            breaches.push("keys of whoever calls are listed".to_owned());
        }
        breaches.sort();
        breaches.dedup();
        breaches
    }
}

/// Returns what a process may do that an agent must not, from its status.
fn status(text: &str) -> Vec<String> {
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    let mut breaches = Vec::new();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        // A set that the kernel does not report does not exist: gVisor's kernel has fewer.
        if value(set).is_some_and(|set| set.bytes().any(|digit| digit != b'0')) {
            breaches.push(format!("{set} is {} and must be empty", value(set).unwrap_or_default()));
        }
    }
    if value("CapEff").is_none() {
        breaches.push("/proc/self/status says nothing of capabilities".to_owned());
    }
    if value("NoNewPrivs").is_some_and(|is| is != "1") {
        breaches.push("new privileges may be had".to_owned());
    }
    for set in ["SigIgn", "SigBlk"] {
        // This program ignores SIGPIPE itself. Two signals belong to the C library, and nothing else can set them.
        const OWN: u64 = (1 << 12) | (0b11 << 31);
        let mask = value(set).and_then(|mask| u64::from_str_radix(mask, 16).ok()).unwrap_or(0) & !OWN;
        if mask != 0 {
            breaches.push(format!("{set} is {mask:016x}, of whoever calls"));
        }
    }
    breaches
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Outside a sandbox everything is reached: each thing that the probe checks for can be found.
    #[tokio::test]
    async fn where_nothing_holds_everything_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let outside = Outside::make(folder.path()).unwrap();
        let inside = Inside { folder: folder.path().to_owned() };
        let breaches = tokio::select! {
            breaches = inside.breaches() => breaches,
            error = outside.change() => panic!("{error}"),
        };
        for expected in [
            "socket socket-before of",
            "socket socket-later of",
            "FIFO fifo-before by reading",
            "FIFO fifo-before by writing",
            "FIFO fifo-later by reading",
            "hidden is seen",
            ".new-",
            "a lock of the machine's",
        ] {
            assert!(breaches.iter().any(|one| one.contains(expected)), "expected {expected} in {breaches:#?}");
        }
        assert_eq!(outside.silent(), Vec::<String>::new());
    }

    #[tokio::test]
    async fn a_folder_that_is_not_shown_proves_nothing() {
        let inside = Inside { folder: "/nowhere".into() };
        let breaches = inside.breaches().await;
        assert!(breaches.iter().filter(|one| one.contains("nothing is proven")).count() == 2, "{breaches:#?}");
    }

    #[test]
    fn silence_outside_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let outside = Outside::make(folder.path()).unwrap();
        fs::remove_dir_all(folder.path().join(OPEN)).unwrap();
        fs::remove_file(folder.path().join(HIDING).join(HIDDEN)).unwrap();
        assert_eq!(outside.silent().len(), 3, "{:#?}", outside.silent());
    }

    #[rstest::rstest]
    #[case("CapInh:\t0000000000000000\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\nSigIgn:\t0000000180001000\n", 0)]
    #[case("CapEff:\t0000000000000000\nCapAmb:\t0000000000000001\nNoNewPrivs:\t1\n", 1)]
    #[case("CapEff:\t0000000000000000\nNoNewPrivs:\t0\n", 1)]
    #[case("CapEff:\t0000000000000000\nSigIgn:\t0000000000000001\nSigBlk:\t0000000000004000\n", 2)]
    #[case("", 1)]
    fn a_status_says_what_a_process_may(#[case] text: &str, #[case] expected: usize) {
        assert_eq!(status(text).len(), expected, "{:?}", status(text));
    }
}
