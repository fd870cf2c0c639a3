//! The second verifier, docs/verifier/belay_verify.py, as a process.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{LazyLock, mpsc},
    thread,
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use belay::evidence::{log::Log, note::VerifierKey};

/// The path of its script.
pub static SCRIPT: LazyLock<PathBuf> =
    LazyLock::new(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/verifier/belay_verify.py"));

/// The Python interpreter that has its dependencies.
pub static PYTHON: LazyLock<PathBuf> = LazyLock::new(|| {
    let install = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/evidence/install");
    let installed = Command::new(install).stderr(Stdio::inherit()).output().unwrap();
    assert!(installed.status.success(), "e2e/evidence/install failed");
    PathBuf::from(String::from_utf8(installed.stdout).unwrap().trim())
});

/// Longest time for one log. More is a hang, not a slow machine.
const PATIENCE: Duration = Duration::from_secs(120);

pub struct Second {
    process: Child,
    input: ChildStdin,
    output: mpsc::Receiver<String>,
}

impl Second {
    pub fn start() -> Self {
        let mut process = Command::new(&*PYTHON)
            .arg(&*SCRIPT)
            .arg("--stream")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, said) = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
        let (tell, output) = mpsc::channel();
        thread::spawn(move || said.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
        Self { process, input, output }
    }

    /// Returns its verdict on a log, and its findings.
    pub fn verdict(&mut self, log: &Log, key: &VerifierKey) -> (String, String) {
        let objects: BTreeMap<_, _> =
            log.objects().map(|(name, bytes)| (name, BASE64_STANDARD.encode(bytes))).collect();
        let asked = serde_json::json!({"key": key.to_string(), "objects": objects});
        writeln!(self.input, "{asked}").unwrap();
        self.input.flush().unwrap();
        let line = self.output.recv_timeout(PATIENCE).expect("the second verifier hangs or has broken off");
        let said: serde_json::Value = serde_json::from_str(&line).unwrap();
        (said["verdict"].as_str().unwrap().to_owned(), said["findings"].to_string())
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
