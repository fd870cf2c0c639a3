//! A process that is started again when it has ended, as a kubelet does, until it is told to end.

use std::{
    fs::{File, OpenOptions},
    path::PathBuf,
    process::{Child, Command, ExitStatus},
    sync::{Arc, Mutex},
    time::Duration,
};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// What starts it, by how often it was started before.
type Make = Box<dyn Fn(usize) -> Command + Send + Sync>;

/// One process after another.
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
    /// Not started yet. What it says goes to this file.
    pub fn new(log: PathBuf, make: impl Fn(usize) -> Command + Send + Sync + 'static) -> Self {
        Self(Arc::new(Inner { make: Box::new(make), log, state: Mutex::default() }))
    }

    /// Starts it, and again whenever it has ended.
    pub fn keep(&self) {
        self.start(&mut self.0.state.lock().unwrap());
        let process = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK).await;
                // Under one lock: what is stopped in between stays stopped.
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

    /// SIGKILL. When this returns it is gone; it is started again.
    pub fn kill(&self) {
        if let Some(child) = &mut self.0.state.lock().unwrap().child {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// SIGKILL, for good.
    pub fn stop(&self) {
        if let Some(mut child) = self.0.state.lock().unwrap().child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// SIGTERM, for good: waits until it has ended.
    pub async fn end(&self) -> ExitStatus {
        let mut child = self.0.state.lock().unwrap().child.take().unwrap();
        // One that is only just being executed does not know the signal yet, and ends by it.
        let _ = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// How often it was started.
    pub fn starts(&self) -> usize {
        self.0.state.lock().unwrap().starts
    }

    /// Whether it has ever ended with this exit code.
    pub fn has_ended_with(&self, code: u8) -> bool {
        self.0.state.lock().unwrap().ends.iter().any(|status| status.code() == Some(code.into()))
    }

    /// What it said.
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
