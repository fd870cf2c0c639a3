//! The world of one story (a run of one test): namespaces of its own, a home, a task's folder, and an upstream.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use serde_json::Value;

/// The environment variable that is set in the process that runs the story.
const STORY: &str = "BELAY_LAPTOP_STORY";
/// The time limit for a wait.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// The upstream's address. `--resolve` maps the world's names to it.
pub const UPSTREAM: &str = "127.0.0.1:8099";

/// The sandboxes that stories use.
pub const SANDBOXES: [&str; 2] = ["bwrap", "runsc"];

/// Runs a story in namespaces of its own: the test starts this program again.
pub fn once(story: impl FnOnce(&World)) {
    if std::env::var_os(STORY).is_some() {
        run("ip", &["link", "set", "lo", "up"]);
        return story(&World::new());
    }
    let name = std::thread::current().name().unwrap_or("main").to_owned();
    assert_ne!(name, "main", "tests have their names on threads of their own: run with --test-threads=2 or more");
    let told = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"])
        .arg(std::env::current_exe().unwrap())
        .args([&name, "--exact", "--nocapture", "--test-threads=2"])
        .env(STORY, "1")
        .output()
        .unwrap();
    // The lines are indented, because `e2e/test` counts results at the beginning of a line.
    let said = format!("{}{}", String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr));
    let said: String = said.lines().map(|line| format!("  | {line}\n")).collect();
    assert!(told.status.success(), "{said}");
}

macro_rules! with_both {
    ($($name:ident => $story:expr;)+) => {
        $(
            mod $name {
                use super::*;

                #[test]
                fn bwrap() {
                    $crate::world::once(|world| $story(world, $crate::world::SANDBOXES[0]));
                }

                #[test]
                fn runsc() {
                    $crate::world::once(|world| $story(world, $crate::world::SANDBOXES[1]));
                }
            }
        )+
    };
}

pub fn run(program: &str, args: &[&str]) {
    let ran = Command::new(program).args(args).output().unwrap();
    assert!(ran.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&ran.stderr));
}

/// The world of one story.
pub struct World {
    folder: tempfile::TempDir,
    /// The requests that the upstream got: method, path, and credential.
    pub asked: Arc<Mutex<Vec<(String, String, String)>>>,
}

/// A run that has ended.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    /// The events of `--output json`.
    pub events: Vec<Value>,
    pub stderr: String,
}

impl Ran {
    /// Returns the records of a kind.
    pub fn records(&self, kind: &str) -> Vec<&Value> {
        let all = self.events.iter().filter(|event| event["event"] == "record").map(|event| &event["record"]);
        all.filter(|record| record["kind"] == kind).collect()
    }

    /// Returns what the agent printed to either stream.
    pub fn said(&self) -> String {
        let lines = self.events.iter().filter(|event| event["event"] == "said");
        lines.map(|event| format!("{}\n", event["line"].as_str().unwrap())).collect()
    }

    pub fn last(&self) -> &Value {
        self.events.last().unwrap_or_else(|| panic!("nothing was said: {}", self.stderr))
    }
}

impl World {
    fn new() -> Self {
        let world = Self { folder: tempfile::tempdir().unwrap(), asked: Arc::default() };
        fs::create_dir_all(world.task()).unwrap();
        let listener = TcpListener::bind(UPSTREAM).unwrap();
        let asked = world.asked.clone();
        std::thread::spawn(move || upstream(&listener, &asked));
        world.write("pack.yaml", PACK);
        world.write("contracts.yaml", CONTRACTS);
        world
    }

    /// Returns the folder of the task.
    pub fn task(&self) -> PathBuf {
        self.folder.path().join("task")
    }

    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.task().join(name), text).unwrap();
    }

    /// Writes a task whose agent is this Python program; `more` is added to its spec.
    pub fn agent(&self, python: &str, more: &str) {
        self.write("agent.py", &format!("{PREAMBLE}\n{python}\n"));
        self.write("task.yaml", &format!("{TASK}{more}"));
    }

    /// Returns the command `belay` with these arguments, not started.
    pub fn belay(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_belay"));
        command.current_dir(self.task()).args(args).env("XDG_STATE_HOME", self.state()).env("USER", "carol");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs `task.yaml`.
    pub fn run(&self, sandbox: &str, more: &[&str]) -> Ran {
        let output = self.start(sandbox, more).wait_with_output().unwrap();
        ended(output)
    }

    /// Starts a run of `task.yaml`.
    pub fn start(&self, sandbox: &str, more: &[&str]) -> Child {
        let resolve = format!("tools.test={UPSTREAM}");
        let usual = ["run", "task.yaml", "--output", "json", "--sandbox", sandbox, "--resolve", &resolve];
        self.belay(&[&usual[..], more].concat()).spawn().unwrap()
    }

    /// Returns the folder of the only log.
    pub fn log(&self) -> PathBuf {
        let tasks = self.state().join("belay/evidence/default/hello");
        let mut logs = fs::read_dir(tasks).unwrap().map(|entry| entry.unwrap().path());
        let log = logs.next().unwrap();
        assert_eq!(logs.next(), None, "expected one log");
        log
    }

    /// Returns what both verifiers say about a log: the first line of each.
    pub fn verify(&self, log: &Path) -> (String, String) {
        let said = self.belay(&["verify", log.to_str().unwrap()]).output().unwrap();
        let second = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/verifier/belay_verify.py");
        let other = Command::new("python3").arg(second).arg(log).output().unwrap();
        let line = |output: &Output| {
            let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            said.lines().next().unwrap_or_default().to_owned()
        };
        (line(&said), line(&other))
    }

    /// Checks that both verifiers find the log valid and self-witnessed.
    pub fn is_valid(&self, log: &Path) {
        let (first, second) = self.verify(log);
        assert!(first.starts_with("VALID, self-witnessed, unlocked store  "), "{first}");
        assert_eq!(second, "VALID, self-witnessed");
    }

    /// Checks that the run has left no process in this world's namespace.
    pub fn nobody_is_left(&self) {
        let started = Instant::now();
        loop {
            let all = processes();
            let ours = |command: &str| {
                let program = command.split(' ').next().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
                ["bwrap", "runsc", "runsc-sandbox", "runsc-gofer", "nsenter"].contains(&program)
                    || ["__hold", "__probe", "__keep", "agent.py", "agent.sh", "standin.py", "models.py"]
                        .iter()
                        .any(|one| command.contains(one))
            };
            let left: Vec<_> = all.iter().filter(|(_, command)| ours(command)).collect();
            if left.is_empty() {
                return;
            }
            assert!(started.elapsed() < PATIENCE, "left behind: {left:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Returns the content of all files in the state folder.
    pub fn all_that_is_kept(&self) -> Vec<u8> {
        fn gather(folder: &Path, all: &mut Vec<u8>) {
            for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if entry.is_dir() { gather(&entry, all) } else { all.extend(fs::read(entry).unwrap()) }
            }
        }
        let mut all = Vec::new();
        gather(&self.state(), &mut all);
        all
    }
}

/// Returns the command lines of the processes in this namespace.
pub fn processes() -> BTreeMap<u32, String> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let line = |pid: u32| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ");
    pids.map(|pid| (pid, line(pid))).filter(|(_, line)| !line.is_empty()).collect()
}

pub fn ended(output: Output) -> Ran {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let events =
        stdout.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"))).collect();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Ran { code: output.status.code().unwrap_or(-1), events, stderr }
}

/// Reads events until one contains this text.
pub fn until(child: &mut Child, text: &str) -> Vec<String> {
    let mut seen = Vec::new();
    // This reads byte by byte, because the caller reads what comes after.
    let stdout = child.stdout.as_mut().unwrap();
    let mut line = Vec::new();
    let mut byte = [0];
    while stdout.read(&mut byte).unwrap() == 1 {
        if byte[0] != b'\n' {
            line.push(byte[0]);
            continue;
        }
        seen.push(String::from_utf8_lossy(&line).into_owned());
        line.clear();
        if seen.last().unwrap().contains(text) {
            return seen;
        }
    }
    let mut stderr = String::new();
    child.stderr.as_mut().unwrap().read_to_string(&mut stderr).unwrap();
    panic!("expected {text} in {seen:#?}\n{stderr}");
}

/// Serves HTTP: it answers with the path and the credential of the request, late if the path ends with `slow`.
fn upstream(listener: &TcpListener, asked: &Mutex<Vec<(String, String, String)>>) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let (mut head, mut line) = (Vec::new(), String::new());
        while reader.read_line(&mut line).is_ok_and(|read| read > 2) {
            head.push(std::mem::take(&mut line).trim().to_owned());
        }
        let header = |name: &str| {
            let found = head.iter().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
            });
            found.unwrap_or_default()
        };
        let mut body = vec![0; header("content-length").parse().unwrap_or(0)];
        let _ = reader.read_exact(&mut body);
        let Some((method, rest)) = head.first().and_then(|line| line.split_once(' ')) else { continue };
        let path = rest.split(' ').next().unwrap_or_default().to_owned();
        let key = header("authorization");
        let reply = serde_json::json!({"path": path, "key": key}).to_string();
        // A client that follows this redirect makes a second request.
        let status = match path.strip_suffix("/elsewhere") {
            Some(here) => format!("302 Found\r\nlocation: http://{UPSTREAM}{here}/there"),
            None => "200 OK".to_owned(),
        };
        if path.ends_with("/slow") {
            std::thread::sleep(Duration::from_secs(4));
        }
        asked.lock().unwrap().push((method.to_owned(), path, key));
        let _ = write!(
            stream,
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{reply}",
            reply.len()
        );
    }
}

/// The start of the agents' programs: calls of tools without a library.
const PREAMBLE: &str = r#"
import json, os, sys, time, urllib.error, urllib.request

def call(tool, **arguments):
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}
    headers = {"content-type": "application/json", "accept": "application/json, text/event-stream", "mcp-protocol-version": "2025-06-18"}
    reply = urllib.request.urlopen(urllib.request.Request(os.environ["BELAY_MCP_URL"], json.dumps(body).encode(), headers))
    return json.load(reply)["result"]["content"][0]["text"]

def say(text):
    print(text, flush=True)
"#;

const TASK: &str = "\
apiVersion: belay.dev/v1alpha1
kind: AgentTask
metadata: {name: hello}
spec:
  objective: Say hello.
  workflowClass: small
  principal: alice@example.com
  agent:
    image: none
    command: [python3, -B, agent.py]
    resources: {memory: 256Mi}
    env:
      - {name: STORY, value: \"1\"}
  tools: [greet, refund]
  limits: {wallTimeSeconds: 30, toolCalls: 5, tokens: 1000}
";

/// Returns the manifest of the ordinary task.
pub fn task() -> &'static str {
    TASK
}

const PACK: &str = "\
apiVersion: belay.dev/v1alpha1
kind: PolicyPack
metadata: {name: laptop}
spec:
  environment: laptop
  namespaceSelector: {matchLabels: {belay.dev/environment: laptop}}
  workflowClasses:
    - name: small
      allowedEffects: [read, write]
      egress:
        - host: tools.test
          ports: [80]
          uses: [Tools]
        - host: keyed.test
          uses: [Tools]
          credentials: [{secret: tools-key, key: token}]
        - {host: allowed.test, uses: [Direct]}
        - {host: \"*.wild.test\", uses: [Direct]}
        - {host: private.test, uses: [Direct]}
        - {host: loopback.test, uses: [Direct]}
        - {host: mixed.test, uses: [Direct]}
      limits: {wallTimeSeconds: 600, toolCalls: 20, tokens: 100000}
      resources: {cpu: \"1\", memory: 512Mi, ephemeralStorage: 64Mi}
  evidence: {bucket: evidence, mode: Compliance, retentionDays: 1}
---
apiVersion: v1
kind: Secret
metadata:
  name: tools-key
  namespace: belay-system
  labels: {belay.dev/upstream-credential: \"true\"}
stringData: {token: sesame-opens-nothing-else}
";

const CONTRACTS: &str = "\
apiVersion: belay.dev/v1alpha1
kind: ToolContract
metadata: {name: greet}
spec:
  tool: greet
  description: Greets.
  sideEffect: read
  upstream: {http: {method: GET, url: \"http://tools.test/greet/{name}\"}}
  input: {type: object, required: [name], properties: {name: {type: string, maxLength: 20}}}
  preconditions: [{name: polite, cel: \"args.name != 'nobody'\", message: Greet somebody.}]
---
apiVersion: belay.dev/v1alpha1
kind: ToolContract
metadata: {name: refund}
spec:
  tool: refund
  description: Refunds.
  sideEffect: write
  upstream: {http: {method: POST, url: \"http://tools.test/refund\"}}
  input: {type: object, required: [amount], properties: {amount: {type: number}}}
  approval: {approvers: {groups: [finance]}, required: 1, timeoutSeconds: 60}
";
