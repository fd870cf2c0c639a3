//! The sandbox of an agent on a machine without a cluster: gVisor if it is installed, else bubblewrap.
//!
//! ```text
//! hold: a network namespace with a loopback interface and nothing else; the harness's socket is made there and handed out
//!   ├─ probe: `belay` itself in the very sandbox that the agent gets, before the agent
//!   └─ agent, each in a mount namespace of its own in which `belay` mounts what it is shown
//! ```
//!
//! Guarantees: a sandbox has no network interface but loopback. It sees no process, file or device of the machine except what a [`Cell`]
//! names. It inherits no file descriptor, signal disposition, limit or OOM score from the caller, and has no privileges. It ends when the
//! process that started it ends. A pure function for each runtime derives the sandbox's arguments from its cell alone. Nothing runs without
//! a sandbox.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
};

use tokio::process::{Child, Command};

use super::RunError;

/// The arguments of bubblewrap.
mod bubblewrap;
/// Checks whether a command is a program in the sandbox.
pub mod command;
/// The OCI bundle for gVisor.
mod gvisor;
/// The network namespace, and the process that holds it.
pub mod hold;
/// The programs and libraries that an agent has.
pub mod root;
/// The filter of system calls that no agent needs.
mod seccomp;
/// Mounts the machine's files that a sandbox sees.
pub mod view;
/// Measures repeatedly what a sandbox uses.
pub mod watch;

/// The maximum number of files that one process may have open.
const OPEN_FILES: u64 = 4096;
/// The maximum number of processes and threads of an agent.
pub const PROCESSES: u64 = 1024;
/// The oldest bubblewrap with all options that this module uses: `--size`, `--disable-userns`.
const OLDEST_BUBBLEWRAP: (u64, u64) = (0, 8);
/// Programs of util-linux that start a sandbox in its namespaces and with its limits.
const TOOLS: [&str; 4] = ["unshare", "nsenter", "prlimit", "setpriv"];

/// The kind of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// gVisor, which has its own kernel.
    Gvisor,
    /// bubblewrap: namespaces and a filter of system calls.
    Bubblewrap,
}

/// A sandbox that is installed.
#[derive(Clone, Debug)]
pub struct Runtime {
    /// Its kind.
    pub kind: Kind,
    /// Its program.
    pub program: PathBuf,
    /// Its name and version, for the evidence.
    pub version: String,
}

/// A folder or a file of the machine that the sandbox sees read-only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Its path on the machine.
    pub from: PathBuf,
    /// Its path in the sandbox.
    pub to: String,
    /// Files and folders that the sandbox does not see there. Each is below `from` or contains it.
    pub hidden: Vec<PathBuf>,
}

impl Bind {
    /// Returns a bind that hides nothing.
    pub fn new(from: impl Into<PathBuf>, to: impl Into<String>) -> Self {
        Self { from: from.into(), to: to.into(), hidden: Vec::new() }
    }

    /// Hides those of these files and folders that concern this bind.
    #[must_use]
    pub fn without(mut self, hidden: &[PathBuf]) -> Self {
        let from = &self.from;
        self.hidden = hidden.iter().filter(|one| one.starts_with(from) || from.starts_with(one)).cloned().collect();
        self
    }
}

/// An entry of a root file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A folder or file.
    Bind(Bind),
    /// A symbolic link.
    Link {
        /// The target of the link.
        target: String,
        /// The path of the link.
        at: String,
    },
}

impl Entry {
    /// Hides those of these files and folders that concern this entry.
    #[must_use]
    pub fn without(self, hidden: &[PathBuf]) -> Self {
        match self {
            Self::Bind(bind) => Self::Bind(bind.without(hidden)),
            link @ Self::Link { .. } => link,
        }
    }
}

/// Everything that runs in a sandbox and everything that the sandbox contains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// The command.
    pub command: Vec<String>,
    /// Its environment.
    pub env: Vec<(String, String)>,
    /// Its working folder.
    pub cwd: String,
    /// Programs and libraries, in mount order.
    pub root: Vec<Entry>,
    /// Other files and folders that it sees, in mount order.
    pub binds: Vec<Bind>,
    /// The paths that it may write to, with the maximum number of bytes.
    pub scopes: Vec<(String, u64)>,
    /// Empty folders that stay empty.
    pub covered: Vec<String>,
}

impl Runtime {
    /// Returns the wanted sandbox, or else the best that is installed.
    ///
    /// # Errors
    /// Returns an error that says what to install if no usable sandbox is installed.
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

    /// Starts a cell in the network namespace that `hold` holds. `folder` is empty and belongs to this cell alone. `belay` is the path of
    /// this program.
    ///
    /// # Errors
    /// Returns an error if the cell cannot be prepared or started.
    pub fn start(&self, cell: &Cell, hold: &hold::Hold, (belay, folder): (&Path, &Path)) -> Result<Child, RunError> {
        let failed = |error: io::Error| RunError::Sandbox(format!("cannot prepare {}: {error}", folder.display()));
        fs::create_dir_all(folder).map_err(failed)?;
        let mut limits = vec![format!("--nofile={OPEN_FILES}:{OPEN_FILES}")];
        // An agent gets no priority over other programs, whatever the caller has.
        limits.extend(["--core=0:0", "--rtprio=0:0", "--nice=0:0"].map(str::to_owned));
        // A sandbox with its own kernel also has its own sockets and FIFOs.
        let viewed = view::prepare(cell, folder, self.kind == Kind::Gvisor).map_err(failed)?;
        // The file stays open until the child process has inherited it.
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

    /// Removes what an ended cell left in its folder.
    pub fn clear(&self, folder: &Path) {
        // Files that cannot be removed stay in a folder of this run, which is not read again.
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

    /// Returns the name in the evidence.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gvisor => "gvisor",
            Self::Bubblewrap => "bubblewrap",
        }
    }
}

impl Cell {
    /// Returns this cell with another command and more binds.
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

/// Returns the first executable of that name on PATH.
fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let executable =
        |file: &PathBuf| fs::metadata(file).is_ok_and(|is| is.is_file() && is.permissions().mode() & 0o111 != 0);
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(executable)
}

#[cfg(test)]
mod tests;
