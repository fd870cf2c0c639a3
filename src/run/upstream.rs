//! A server that the user starts for a run as an upstream. It ends with the run.
//!
//! Guarantees: the server is given a port of loopback (`PORT`). Belay waits for it, and the run's gateway dials it there. It ends when the
//! run ends, even if the run is killed. It is started only because the command line says so, and never because a file says so.
//!
//! Non-goals: a sandbox. The server may do what its user may do.

use std::{
    fs,
    io::{self, Read},
    net::SocketAddr,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    net::{TcpListener, TcpStream},
    process::{Child, Command},
};

use super::RunError;
use crate::policy::hostname::Hostname;

/// The hidden subcommand of `belay` that runs such a server.
pub const KEEP: &str = "__keep";
/// The time that the server has until it listens: it may have to be compiled first.
const PATIENCE: Duration = Duration::from_secs(60);
/// The time between two checks whether it listens.
const LOOK: Duration = Duration::from_millis(20);
/// The time from SIGTERM to SIGKILL.
const GRACE: Duration = Duration::from_secs(2);
/// The number of last output lines that are shown if it fails.
const SAID: usize = 8;

/// A running server.
pub struct Upstream {
    host: Hostname,
    command: String,
    address: SocketAddr,
    log: PathBuf,
    child: Child,
}

impl Upstream {
    /// Starts the server and waits until it listens. `belay` is the path of this program. The output of the server goes to a file in
    /// `folder`.
    ///
    /// # Errors
    /// Returns an error with the last output if the server ends, or does not listen in time.
    pub async fn start(belay: &Path, host: &Hostname, command: &str, folder: &Path) -> Result<Self, RunError> {
        let failed = |error: io::Error| RunError::Upstream(format!("{host}: cannot start `{command}`: {error}"));
        // The port was free a moment ago. If another process takes it meanwhile, the command fails and says so.
        let free = TcpListener::bind("127.0.0.1:0").await.and_then(|listener| listener.local_addr());
        let address = free.map_err(failed)?;
        let log = folder.join(format!("upstream-{host}.log"));
        let said = fs::File::create(&log).map_err(failed)?;
        let mut keeper = Command::new(belay);
        keeper.args([KEEP, command]).env("PORT", address.port().to_string()).process_group(0);
        keeper.stdin(Stdio::piped()).stdout(said.try_clone().map_err(failed)?).stderr(said);
        let child = keeper.spawn().map_err(failed)?;
        let mut upstream = Self { host: host.clone(), command: command.to_owned(), address, log, child };
        let started = Instant::now();
        while TcpStream::connect(address).await.is_err() {
            if let Some(trouble) = upstream.trouble() {
                return Err(RunError::Upstream(trouble));
            }
            if started.elapsed() > PATIENCE {
                let Self { host, command, .. } = &upstream;
                return Err(RunError::Upstream(format!(
                    "{host}: expected `{command}` to listen on 127.0.0.1:$PORT (PORT={}) within {} s, found that it does not; {}",
                    address.port(),
                    PATIENCE.as_secs(),
                    upstream.said()
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(upstream)
    }

    /// Returns its host.
    pub fn host(&self) -> &Hostname {
        &self.host
    }

    /// Returns the address on which it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns a message if the server has ended by itself.
    pub fn trouble(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok().flatten()?;
        let Self { host, command, .. } = &*self;
        Some(format!(
            "{host}: expected `{command}` to serve as long as the run, found that it has ended ({status}); {}",
            self.said()
        ))
    }

    /// Ends the server.
    pub async fn end(mut self) {
        drop(self.child.stdin.take());
        let _ = tokio::time::timeout(GRACE * 2, self.child.wait()).await;
    }

    fn said(&self) -> String {
        let said = fs::read(&self.log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<_> = said.lines().rev().take(SAID).collect();
        if lines.is_empty() {
            return "it said nothing".to_owned();
        }
        format!("it said:\n{}", lines.into_iter().rev().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n"))
    }
}

/// Runs the hidden subcommand: the command runs in its own process group until it ends, or until standard input ends, which ends with the
/// run. Returns the exit code of the command.
///
/// # Errors
/// Returns an error if there is no shell to run it.
pub fn keep(command: &str) -> io::Result<u8> {
    let mut child = std::process::Command::new("sh");
    let mut child = child.args(["-c", command]).stdin(Stdio::null()).process_group(0).spawn()?;
    let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else {
        return Err(io::Error::other("it has no process group"));
    };
    std::thread::spawn(move || {
        let _ = io::stdin().lock().read_to_end(&mut Vec::new());
        let _ = kill_process_group(group, Signal::TERM);
        std::thread::sleep(GRACE);
        let _ = kill_process_group(group, Signal::KILL);
    });
    let status = child.wait()?;
    // Processes that the command left behind.
    let _ = kill_process_group(group, Signal::KILL);
    Ok(code(status))
}

/// Returns the exit code as a shell reports it.
fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| signal.saturating_add(128)));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}
