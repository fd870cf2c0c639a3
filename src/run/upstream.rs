//! An upstream of the user's own: a server that is started for a run, and ends with it.
//!
//! Promises: it is told a port of loopback (`PORT`), it is waited for, and the run's gateway dials it there; it ends when the run does,
//! even where the run is killed. Refuses: to pass for a part of the sandbox. It may do what its user may, and is started only because the
//! command line says so: never by what a file says.

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

/// The hidden subcommand of `belay` that keeps one.
pub const KEEP: &str = "__keep";
/// Until it has to listen: it may have to be compiled first.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks whether it listens.
const LOOK: Duration = Duration::from_millis(20);
/// From SIGTERM to SIGKILL.
const GRACE: Duration = Duration::from_secs(2);
/// Last lines of what it has said, where it fails.
const SAID: usize = 8;

/// A server that runs.
pub struct Upstream {
    host: Hostname,
    command: String,
    address: SocketAddr,
    log: PathBuf,
    child: Child,
}

impl Upstream {
    /// Starts it, and waits until it listens. `belay` is this program; what the server says goes to a file in `folder`.
    ///
    /// # Errors
    /// If it ends, or does not listen in time, with what it has said.
    pub async fn start(belay: &Path, host: &Hostname, command: &str, folder: &Path) -> Result<Self, RunError> {
        let failed = |error: io::Error| RunError::Upstream(format!("{host}: cannot start `{command}`: {error}"));
        // Free a moment ago; whoever takes it in between makes the command fail, which says so.
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

    /// Its host.
    pub fn host(&self) -> &Hostname {
        &self.host
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// That it has ended by itself, where it has.
    pub fn trouble(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok().flatten()?;
        let Self { host, command, .. } = &*self;
        Some(format!(
            "{host}: expected `{command}` to serve as long as the run, found that it has ended ({status}); {}",
            self.said()
        ))
    }

    /// Ends it.
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

/// What the hidden subcommand does: runs the command in a process group of its own until that ends, or until standard input does, which
/// ends with the run. Gives the command's exit code.
///
/// # Errors
/// If there is no shell to run it.
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
    // Whoever it has left behind.
    let _ = kill_process_group(group, Signal::KILL);
    Ok(code(status))
}

/// As a shell says it.
fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| signal.saturating_add(128)));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}
