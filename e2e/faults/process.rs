//! A process that is restarted when it ends, as a kubelet does, until a test ends it.

use std::{
    fs::{File, OpenOptions},
    path::PathBuf,
    process::{Child, Command, ExitStatus},
    sync::{Arc, Mutex},
    time::Duration,
};

/// The time between two polls.
const LOOK: Duration = Duration::from_millis(20);

/// Returns the command that starts the process, given the number of earlier starts.
type Make = Box<dyn Fn(usize) -> Command + Send + Sync>;

/// A process, and its successors after restarts.
#[derive(Clone)]
pub struct Process(Arc<Inner>);

struct Inner {
    make: Make,
    log: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    child: Option<Child>,
    starts: usize,
    ends: Vec<ExitStatus>,
}

impl Process {
    /// Returns a process that is not started yet. Its stderr goes to `log`.
    pub fn new(log: PathBuf, make: impl Fn(usize) -> Command + Send + Sync + 'static) -> Self {
        Self(Arc::new(Inner { make: Box::new(make), log, state: Mutex::default() }))
    }

    /// Starts the process, and restarts it whenever it ends.
    pub fn keep(&self) {
        self.start(&mut self.0.state.lock().unwrap());
        let process = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK).await;
                // The poll and the restart hold the lock, so a process that a test has stopped stays stopped.
                let mut state = process.0.state.lock().unwrap();
                let Some(child) = &mut state.child else { return };
                if let Some(status) = child.try_wait().unwrap() {
                    state.ends.push(status);
                    process.start(&mut state);
                }
            }
        });
    }

    fn start(&self, state: &mut State) {
        let log = OpenOptions::new().create(true).append(true).open(&self.0.log).unwrap();
        let mut command = (self.0.make)(state.starts);
        command.stdin(std::process::Stdio::null()).stdout(File::create("/dev/null").unwrap()).stderr(log);
        state.child = Some(command.spawn().unwrap());
        state.starts += 1;
    }

    /// Kills the process with SIGKILL and waits for its end. It is restarted.
    pub fn kill(&self) {
        if let Some(child) = &mut self.0.state.lock().unwrap().child {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Kills the process with SIGKILL, without a restart.
    pub fn stop(&self) {
        if let Some(mut child) = self.0.state.lock().unwrap().child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Ends the process with SIGTERM, without a restart, and waits for its end.
    pub async fn end(&self) -> ExitStatus {
        let mut child = self.0.state.lock().unwrap().child.take().unwrap();
        // A process that has just been started has no handler for the signal yet, and ends by it.
        let _ = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Returns how often the process was started.
    pub fn starts(&self) -> usize {
        self.0.state.lock().unwrap().starts
    }

    /// Returns whether the process has ever ended with this exit code.
    pub fn has_ended_with(&self, code: u8) -> bool {
        self.0.state.lock().unwrap().ends.iter().any(|status| status.code() == Some(code.into()))
    }

    /// Returns what the process wrote to stderr.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.0.log).unwrap_or_default()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(mut child) = self.state.lock().unwrap().child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
