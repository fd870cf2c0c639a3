//! Where an agent runs on a machine without a cluster: gVisor where it is installed, else bubblewrap.
//!
//! ```text
//! hold: a network namespace with a loopback interface and nothing else; the harness's socket is made there and handed out
//!   ├─ probe: `belay` itself in the very sandbox that the agent gets, before the agent
//!   └─ agent, each in a mount namespace of its own in which `belay` mounts what it is shown
//! ```
//!
//! Promises: no interface but loopback, no process, file or device of the machine but what a [`Cell`] names, no descriptor, signal, limit or
//! charm of whoever calls, no privileges, and an end with whoever started it; what a sandbox is told follows from its cell alone, by a pure function for each runtime. Refuses: to run
//! anything without a sandbox.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
};

use tokio::process::{Child, Command};

use super::RunError;

/// bubblewrap's arguments.
mod bubblewrap;
/// Whether a command is a program there.
pub mod command;
/// gVisor's bundle.
mod gvisor;
/// A network namespace, and who holds it.
pub mod hold;
/// The programs and libraries that an agent has.
pub mod root;
/// System calls that no agent needs.
mod seccomp;
/// What a sandbox is shown of the machine's files.
pub mod view;
/// What a sandbox uses, looked at again and again.
pub mod watch;

/// Files that one process may have open.
const OPEN_FILES: u64 = 4096;
/// Processes and threads of an agent.
pub const PROCESSES: u64 = 1024;
/// Oldest bubblewrap that has all that is asked of it: `--size`, `--disable-userns`.
const OLDEST_BUBBLEWRAP: (u64, u64) = (0, 8);
/// Programs of util-linux that put a sandbox where it belongs.
const TOOLS: [&str; 4] = ["unshare", "nsenter", "prlimit", "setpriv"];

/// Which sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// gVisor: a kernel of its own.
    Gvisor,
    /// bubblewrap: namespaces and a filter of system calls.
    Bubblewrap,
}

/// A sandbox that is installed.
#[derive(Clone, Debug)]
pub struct Runtime {
    /// Which.
    pub kind: Kind,
    /// Its program.
    pub program: PathBuf,
    /// Name and version, for the evidence.
    pub version: String,
}

/// A folder or file of the machine, to be seen in the sandbox and not to be changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Where it is.
    pub from: PathBuf,
    /// Where it is seen.
    pub to: String,
    /// Files and folders that are not to be seen there: what of them is below, or around, `from`.
    pub hidden: Vec<PathBuf>,
}

impl Bind {
    /// The whole of it.
    pub fn new(from: impl Into<PathBuf>, to: impl Into<String>) -> Self {
        Self { from: from.into(), to: to.into(), hidden: Vec::new() }
    }

    /// Without what of these is in it.
    #[must_use]
    pub fn without(mut self, hidden: &[PathBuf]) -> Self {
        let from = &self.from;
        self.hidden = hidden.iter().filter(|one| one.starts_with(from) || from.starts_with(one)).cloned().collect();
        self
    }
}

/// Something of a root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A folder or file.
    Bind(Bind),
    /// A symbolic link.
    Link {
        /// What it says.
        target: String,
        /// Where it is.
        at: String,
    },
}

impl Entry {
    /// Without what of these is in it.
    #[must_use]
    pub fn without(self, hidden: &[PathBuf]) -> Self {
        match self {
            Self::Bind(bind) => Self::Bind(bind.without(hidden)),
            link @ Self::Link { .. } => link,
        }
    }
}

/// All that runs in a sandbox, and all that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// What to run.
    pub command: Vec<String>,
    /// Its environment.
    pub env: Vec<(String, String)>,
    /// Its folder.
    pub cwd: String,
    /// Programs and libraries, in order.
    pub root: Vec<Entry>,
    /// What else it sees, in order.
    pub binds: Vec<Bind>,
    /// Where it may write, and how many bytes.
    pub scopes: Vec<(String, u64)>,
    /// Empty folders that stay empty.
    pub covered: Vec<String>,
}

impl Runtime {
    /// The one that is asked for, or the best that is installed.
    ///
    /// # Errors
    /// If there is none, with what to install.
    pub fn find(wanted: Option<Kind>) -> Result<Self, RunError> {
        if let Some(missing) = TOOLS.into_iter().find(|tool| on_path(tool).is_none()) {
            return Err(RunError::Sandbox(format!(
                "expected `{missing}` of util-linux on PATH, found none; install util-linux"
            )));
        }
        let kinds = wanted.map_or(vec![Kind::Gvisor, Kind::Bubblewrap], |kind| vec![kind]);
        let found = kinds.iter().find_map(|kind| Some((*kind, on_path(kind.program())?)));
        let Some((kind, program)) = found else {
            let looked = kinds.iter().map(|kind| kind.program()).collect::<Vec<_>>().join(" or ");
            return Err(RunError::Sandbox(format!(
                "expected {looked} on PATH, found none: an agent never runs without a sandbox; install bubblewrap (`apt-get install bubblewrap`, `dnf install bubblewrap`), or gVisor (https://gvisor.dev/docs/user_guide/install)"
            )));
        };
        let said = std::process::Command::new(&program).arg("--version").output();
        let said = said.map(|said| String::from_utf8_lossy(&said.stdout).into_owned()).unwrap_or_default();
        let version =
            said.lines().next().and_then(|line| line.split_whitespace().last()).unwrap_or("unknown").to_owned();
        if kind == Kind::Bubblewrap && !new_enough(&version) {
            let (major, minor) = OLDEST_BUBBLEWRAP;
            return Err(RunError::Sandbox(format!(
                "expected bubblewrap {major}.{minor} or later, found {version} at {}; upgrade it, or install gVisor (https://gvisor.dev/docs/user_guide/install)",
                program.display()
            )));
        }
        Ok(Self { kind, program, version: format!("{} {version}", kind.name()) })
    }

    /// Starts a cell in the network namespace that `hold` holds. `folder` is this cell's own, empty and nobody else's; `belay` is this program.
    ///
    /// # Errors
    /// If it cannot be prepared or started.
    pub fn start(&self, cell: &Cell, hold: &hold::Hold, (belay, folder): (&Path, &Path)) -> Result<Child, RunError> {
        let failed = |error: io::Error| RunError::Sandbox(format!("cannot prepare {}: {error}", folder.display()));
        fs::create_dir_all(folder).map_err(failed)?;
        let mut limits = vec![format!("--nofile={OPEN_FILES}:{OPEN_FILES}")];
        // Whatever whoever calls may have: no agent goes before other programs.
        limits.extend(["--core=0:0", "--rtprio=0:0", "--nice=0:0"].map(str::to_owned));
        // A sandbox with a kernel of its own has sockets and FIFOs of its own too.
        let viewed = view::prepare(cell, folder, self.kind == Kind::Gvisor).map_err(failed)?;
        // Open for as long as it takes to hand it over.
        let mut filter = None;
        let sandbox = match self.kind {
            Kind::Bubblewrap => {
                limits.push(format!("--nproc={PROCESSES}:{PROCESSES}"));
                let keys: Vec<_> = bubblewrap::KEYS.into_iter().filter(|path| Path::new(path).exists()).collect();
                let file = seccomp::file(folder).map_err(failed)?;
                let arguments = bubblewrap::arguments(&viewed, seccomp::inherit(&file).map_err(failed)?, &keys);
                filter = Some(file);
                arguments
            }
            Kind::Gvisor => {
                gvisor::prepare((cell, &viewed), folder).map_err(failed)?;
                gvisor::arguments(folder)
            }
        };
        let mut command = Command::new("nsenter");
        command.args(["--preserve-credentials", "--user", "--net", "--target", &hold.pid().to_string(), "--"]);
        command.args(["unshare", "--mount", "--propagation", "private", "--"]);
        command.arg(belay).arg(view::VIEW).arg(folder);
        command.arg("prlimit").args(limits).arg("--");
        command.args(["setpriv", "--pdeathsig", "KILL", "--"]).arg(&self.program).args(sandbox);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).process_group(0);
        let started = command.spawn().map_err(|error| RunError::Sandbox(format!("cannot start nsenter: {error}")));
        drop(filter);
        started
    }

    /// Takes away what a cell that has ended left in its folder.
    pub fn clear(&self, folder: &Path) {
        // What cannot be removed lies in a folder of this run's, which nobody reads again.
        let _ = fs::remove_dir_all(folder);
    }
}

impl Kind {
    fn program(self) -> &'static str {
        match self {
            Self::Gvisor => "runsc",
            Self::Bubblewrap => "bwrap",
        }
    }

    /// Its name in the evidence.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gvisor => "gvisor",
            Self::Bubblewrap => "bubblewrap",
        }
    }
}

impl Cell {
    /// The same, with another command and more to see.
    #[must_use]
    pub fn running(&self, command: Vec<String>, more: Vec<Bind>) -> Self {
        let binds = self.binds.iter().cloned().chain(more).collect();
        Self { command, binds, cwd: "/".to_owned(), ..self.clone() }
    }
}

fn new_enough(version: &str) -> bool {
    let mut parts = version.split('.').map(|part| part.parse::<u64>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= OLDEST_BUBBLEWRAP
}

/// The first program of that name on PATH.
fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let executable =
        |file: &PathBuf| fs::metadata(file).is_ok_and(|is| is.is_file() && is.permissions().mode() & 0o111 != 0);
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(executable)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn cell() -> Cell {
        let bind = |from: &str, to: &str| Bind::new(from, to);
        Cell {
            command: vec!["python3".into(), "agent.py".into()],
            env: vec![("A".into(), "1 2".into())],
            cwd: "/workspace".into(),
            root: vec![Entry::Bind(bind("/usr", "/usr")), Entry::Link { target: "usr/bin".into(), at: "/bin".into() }],
            binds: vec![bind("/home/me/task", "/workspace"), bind("/home/me/facts", "/workspace/facts")],
            scopes: vec![("/out".into(), 4096)],
            covered: vec!["/dev/shm".into(), "/tmp".into()],
        }
    }

    #[rstest::rstest]
    #[case("0.8.0", true)]
    #[case("0.11.0", true)]
    #[case("1.0", true)]
    #[case("0.6.1", false)]
    #[case("unknown", false)]
    fn an_old_bubblewrap_is_refused(#[case] version: &str, #[case] good: bool) {
        assert_eq!(new_enough(version), good);
    }
}
