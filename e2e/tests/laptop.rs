//! `belay run` with the pretend internet and the object store: evidence in a bucket, with and without Object Lock.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use aws_sdk_s3::{
    primitives::{DateTime, DateTimeFormat},
    types::ObjectLockMode,
};
use belay::evidence::store::Location;
use serde_json::{Value, json};

use crate::{
    locks::store,
    support::{in_world, setting},
};

/// The address of the pretend internet's name server.
const NAMES: &str = "198.51.100.53";

/// A laptop with a state folder of its own.
pub struct Laptop {
    folder: tempfile::TempDir,
}

/// A run that has ended.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub events: Vec<Value>,
    /// Shown if a test of the run fails.
    #[expect(dead_code, reason = "shown by Debug")]
    pub stderr: String,
}

impl Ran {
    /// Returns the location of its evidence.
    pub fn log(&self) -> &str {
        self.events.last().and_then(|event| event["evidence"].as_str()).unwrap_or_else(|| panic!("{self:#?}"))
    }

    /// Returns the lines that the agent printed.
    pub fn said(&self) -> Vec<String> {
        self.events.iter().filter_map(|event| event["line"].as_str().map(str::to_owned)).collect()
    }
}

impl Laptop {
    pub fn new() -> Self {
        let laptop = Self { folder: tempfile::tempdir().unwrap() };
        let authority = fs::read_to_string(in_world("ca.crt")).unwrap();
        let metadata = json!({"name": "world-ca", "namespace": "belay-demo"});
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"ca.crt": authority}});
        fs::write(laptop.path("world-ca.yaml"), map.to_string()).unwrap();
        laptop
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Returns the command `belay`, run from the repository's root.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_belay"));
        command
            .args(args)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("XDG_STATE_HOME", self.folder.path())
            .envs([("MODEL_KEY", "world-model-key"), ("TICKET_KEY", "world-ticket-key")])
            .env("AWS_ACCESS_KEY_ID", setting("S3_ACCESS_KEY"))
            .env("AWS_SECRET_ACCESS_KEY", setting("S3_SECRET_KEY"))
            .env("AWS_REGION", setting("S3_REGION"))
            .stdin(Stdio::null());
        command
    }

    pub fn belay(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Returns `belay run` with the pack `dev`, and with the options to reach the pretend internet.
    fn running(&self, more: &[&str]) -> Command {
        let (map, authority) = (self.path("world-ca.yaml"), in_world("ca.crt"));
        let usual = [
            &["run", "--output", "json", "--packs", "policy-packs/dev", "--contracts", map.to_str().unwrap()][..],
            &["--upstream-ca", authority.to_str().unwrap(), "--nameserver", NAMES],
            &["--credential", "world-model-key/token=env:MODEL_KEY"],
            &["--credential", "world-ticket-key/token=env:TICKET_KEY"],
        ];
        self.command(&[&usual.concat()[..], more].concat())
    }

    pub fn run(&self, more: &[&str]) -> Ran {
        ended(&mut self.running(more))
    }

    /// Returns `belay run` of a task that needs no internet, with its evidence in a bucket.
    fn with_evidence_in(&self, bucket: &str) -> Command {
        let task = json!({
            "apiVersion": "belay.dev/v1alpha1", "kind": "AgentTask", "metadata": {"name": "hello"},
            "spec": {
                "objective": "Say hello.", "workflowClass": "triage", "principal": "alice@example.com",
                "agent": {"image": "none", "command": ["echo", "hello"]},
                "limits": {"wallTimeSeconds": 60, "toolCalls": 1, "tokens": 1},
            },
        });
        fs::write(self.path("task.yaml"), task.to_string()).unwrap();
        let now = jiff::Timestamp::now().as_nanosecond();
        let place = format!("s3://{bucket}/e2e/laptop/{now}");
        let (task, endpoint) = (self.path("task.yaml"), setting("S3_ENDPOINT"));
        self.running(&[task.to_str().unwrap(), "--sandbox", "bwrap", "--store", &place, "--endpoint", &endpoint])
    }
}

fn ended(command: &mut Command) -> Ran {
    let output = command.output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let events =
        stdout.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{output:?}"))).collect();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Ran { code: output.status.code().unwrap_or(-1), events, stderr }
}

pub fn first_line(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn a_bucket_with_locks_locks_what_a_laptop_writes() {
    let laptop = Laptop::new();
    let bucket = setting("S3_BUCKET");
    let ran = ended(&mut laptop.with_evidence_in(&bucket));
    assert_eq!(ran.code, 0, "{ran:#?}");
    assert_eq!(ran.said(), ["hello"]);
    // The run names the command that verifies it, and the command works.
    let check = ran.events.last().unwrap()["verify"].as_str().unwrap().to_owned();
    let verified = laptop.belay(&check.split(' ').skip(1).collect::<Vec<_>>());
    assert!(first_line(&verified).starts_with("VALID, self-witnessed  "), "{check}: {verified:?}");
    assert_eq!(verified.status.code(), Some(0));

    // Each object is locked as the pack says: in Compliance mode, for a day.
    let place: Location = ran.log().parse().unwrap();
    let client = store("S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY");
    let versions = client.list_object_versions().bucket(&bucket).prefix(&place.prefix).send().await.unwrap();
    let soon = DateTime::from_secs(jiff::Timestamp::now().as_second() + 23 * 60 * 60);
    let mut names = Vec::new();
    for version in versions.versions() {
        let (key, id) = (version.key().unwrap(), version.version_id().unwrap());
        // This does not use `GetObjectRetention`, because this store answers it in a form that the SDK cannot read.
        let head = client.head_object().bucket(&bucket).key(key).version_id(id).send().await.unwrap();
        assert_eq!(head.object_lock_mode(), Some(&ObjectLockMode::Compliance), "{key}");
        let until = *head.object_lock_retain_until_date().unwrap();
        assert!(until > soon, "{key} is locked until {}", until.fmt(DateTimeFormat::DateTime).unwrap());
        let deleted = client.delete_object().bucket(&bucket).key(key).version_id(id).send().await;
        assert!(deleted.is_err(), "{key} could be deleted");
        names.push(key.trim_start_matches(&place.prefix).to_owned());
    }
    for expected in ["segments/0000000000.jsonl", "tlog/checkpoint", "summary.dsse.json"] {
        assert!(names.iter().any(|name| name == expected), "expected {expected} among {names:?}");
    }
}

/// A bucket without Object Lock counts as unavailable: no agent runs if its evidence could be deleted, and the run says why it waits.
#[tokio::test]
async fn a_bucket_without_locks_is_refused() {
    let laptop = Laptop::new();
    let mut run = laptop.with_evidence_in(&setting("S3_STATE_BUCKET")).stdout(Stdio::piped()).spawn().unwrap();
    let id = run.id().to_string();
    let mut said: Vec<String> = Vec::new();
    for line in BufReader::new(run.stdout.take().unwrap()).lines().map(Result::unwrap) {
        if line.contains(r#""event":"trouble""#) && !said.iter().any(|line| line.contains("trouble")) {
            // The test does not wait until the run gives up.
            assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
        }
        said.push(line);
    }
    let ended = run.wait().unwrap();
    assert!(said.iter().any(|line| line.contains("missing ObjectLockConfiguration")), "{said:#?}");
    assert!(!said.iter().any(|line| line.contains("started") || line.contains("hello\"")), "{said:#?}");
    assert!([Some(3), Some(130)].contains(&ended.code()), "{ended:?}");
}
