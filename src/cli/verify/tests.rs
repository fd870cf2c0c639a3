use clap::Parser;

use super::*;
use crate::{
    cli::terminal::hidden,
    evidence::{
        record::Event,
        segment::Segment,
        store::{Store, dir::Dir},
    },
    policy::commit::Salt,
    verify::tests::script::Script,
};

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

/// Runs `belay verify` with these arguments.
async fn verify(args: &[&str]) -> (Result<u8, CliError>, String) {
    let line = Line::parse_from([&["verify"], args].concat());
    let mut out = Vec::new();
    let code = run(&line.args, &mut out).await;
    (code, String::from_utf8(out).unwrap())
}

/// Saves a log to a folder, and returns the folder and the witness's key.
async fn saved(script: &Script) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let store = Dir::new(folder.path());
    for (key, bytes) in script.write().objects() {
        store.put_new(key, bytes.clone(), None).await.unwrap();
    }
    (folder, script.witness.verifier().to_string())
}

#[tokio::test]
async fn a_good_log_is_valid_in_words_and_json() {
    let script = Script::good();
    let (folder, key) = saved(&script).await;
    let path = folder.path().to_str().unwrap();
    let (code, text) = verify(&[path, "--witness-key", &key]).await;
    assert_eq!(code.unwrap(), 0);
    let root = script.write().segments[&Segment::key(12)].clone();
    let root = Segment::parse(&root).unwrap().note.checkpoint().unwrap().root_base64();
    let text = text.replace(path, "FOLDER").replace(&key, "KEY").replace(&root, "ROOT");
    insta::assert_snapshot!(text, @r#"
    VALID  belay.dev/task/6f9c3c1e-0000-4000-8000-000000000001  13 records, 2 attempts, 3 tool calls, 120 tokens, 1 denial

    task       team-a/tidy, on behalf of jane@example.com
    ended      Succeeded (Completed), exit code 0
    time       2026-11-23T10:00:00.000Z to 2026-11-23T10:00:00.000Z, by the writers' clocks
    attempt    1  tidy-1 on node-1 in gvisor; never closed: the pod was lost or stopped
    attempt    2  tidy-2 on node-1 in gvisor; agentEnded
    usage      3 of 4 tool calls, 120 of 1000 tokens, 1 denial
    outcomes   3 applied, 0 not applied, 0 unknown, 1 without an outcome
    denied by  egress.host 1
    locked     not checked: FOLDER is a folder and has no locks
    witness    KEY, last at 2026-11-18T11:06:52Z
    root       ROOT over 13 records in 7 segments

    Findings
      note        record 6  call.open
                  call c to write has no outcome: whether it took effect is not known
    "#);

    let (code, json) = verify(&[path, "--witness-key", &key, "--output", "json"]).await;
    assert_eq!(code.unwrap(), 0);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["verdict"], "VALID");
    assert_eq!(json["witnessKey"], key);
    assert_eq!(json["summary"]["kinds"]["call.intent"], 4);
    assert_eq!(json["summary"]["usage"]["toolCalls"], 3);
    assert_eq!(json["findings"][0]["rule"], "call.open");
}

#[tokio::test]
async fn the_exit_code_is_the_verdict() {
    let mut script = Script::good();
    script.segments.pop();
    let (folder, key) = saved(&script).await;
    let path = folder.path().to_str().unwrap();
    let (code, text) = verify(&[path, "--witness-key", &key]).await;
    assert_eq!(code.unwrap(), 3);
    assert!(text.starts_with("INCOMPLETE  belay.dev/task/"), "{text}");

    let mut script = Script::good();
    script.at(4).usage.denials = 0;
    let (folder, key) = saved(&script).await;
    let (code, text) = verify(&[folder.path().to_str().unwrap(), "--witness-key", &key]).await;
    assert_eq!(code.unwrap(), 1);
    assert!(text.starts_with("INVALID  belay.dev/task/"), "{text}");
    assert!(text.contains("record 4  usage.count  segments/0000000003.jsonl"), "{text}");
}

#[tokio::test]
async fn a_copy_verifies_by_itself() {
    let script = Script::good();
    let (folder, key) = saved(&script).await;
    let copy = tempfile::tempdir().unwrap();
    let place = copy.path().join("copy");
    let place = place.to_str().unwrap();
    let (code, _) = verify(&[folder.path().to_str().unwrap(), "--witness-key", &key, "--save", place]).await;
    assert_eq!(code.unwrap(), 0);
    let (code, text) = verify(&[place]).await;
    assert_eq!(code.unwrap(), 0);
    assert!(text.contains("according to the folder"), "{text}");
    let key_file = copy.path().join("copy/witness.vkey");
    let (code, _) = verify(&[place, "--witness-key", key_file.to_str().unwrap()]).await;
    assert_eq!(code.unwrap(), 0);
    // A second log is not written to the same folder.
    let (code, _) = verify(&[folder.path().to_str().unwrap(), "--witness-key", &key, "--save", place]).await;
    assert!(code.unwrap_err().to_string().contains("new or empty folder"));
}

#[tokio::test]
async fn what_cannot_be_judged_is_an_error() {
    let (folder, key) = saved(&Script::good()).await;
    let path = folder.path().to_str().unwrap();
    let (code, _) = verify(&[path]).await;
    assert!(code.unwrap_err().to_string().contains("expected --witness-key"));
    let (code, _) = verify(&[path, "--witness-key", "nonsense"]).await;
    let said = code.unwrap_err().to_string();
    assert!(said.contains("found `nonsense`, which is not a file"), "{said}");
    let empty = tempfile::tempdir().unwrap();
    let (code, _) = verify(&[empty.path().to_str().unwrap(), "--witness-key", &key]).await;
    assert!(code.unwrap_err().to_string().contains("found no segments"));
    // For the folder of all evidence, of a namespace or of a task, the error names the logs below it, but none behind a link.
    let log = empty.path().join("default/tidy/0f0e");
    std::fs::create_dir_all(log.join("segments")).unwrap();
    std::os::unix::fs::symlink(empty.path().join("default"), empty.path().join("again")).unwrap();
    for above in ["", "default", "default/tidy"] {
        let above = empty.path().join(above).display().to_string();
        let (code, _) = verify(&[&above, "--witness-key", &key]).await;
        let said = code.unwrap_err().to_string();
        assert!(said.contains(log.to_str().unwrap()) && !said.contains("again"), "{said}");
    }
    let (code, _) = verify(&["s3://evidence/prod"]).await;
    assert!(code.unwrap_err().to_string().contains("expected --witness-key"));
}

#[tokio::test]
async fn nothing_in_a_log_reaches_the_terminal_as_it_is() {
    let hostile = "x\u{1b}]0;owned\u{7}\r\u{9b}2J\u{202e}\n";
    let mut script = Script::good();
    for record in script.segments.iter_mut().flatten() {
        hostile.clone_into(&mut record.time);
        match &mut record.event {
            Event::AttemptOpened(opened) => {
                let task = &mut opened.policy.task;
                for text in
                    [&mut task.name, &mut task.namespace, &mut task.principal, &mut task.uid, &mut opened.pod.node]
                {
                    hostile.clone_into(text);
                }
            }
            Event::Intent(intent) => {
                hostile.clone_into(&mut intent.target);
                intent.call.push_str(hostile);
            }
            Event::TaskClosed(closed) => {
                for text in [&mut closed.phase, &mut closed.reason, &mut closed.failure_class] {
                    hostile.clone_into(text);
                }
            }
            Event::AttemptClosed(closed) => hostile.clone_into(&mut closed.reason),
            _ => {}
        }
    }
    let (folder, key) = saved(&script).await;
    for format in ["text", "json"] {
        let (code, text) = verify(&[folder.path().to_str().unwrap(), "--witness-key", &key, "-o", format]).await;
        assert_eq!(code.unwrap(), 1);
        assert!(text.contains("owned") && !text.chars().any(|c| c != '\n' && hidden(c)), "{text:?}");
    }
}

/// Runs a `belay` command that writes to a file, and returns the file.
async fn written(folder: &Path, name: &str, args: &[&str]) -> PathBuf {
    #[derive(Debug, Parser)]
    enum Commands {
        Prove(prove::Args),
        Disclose(prove::Disclose),
    }
    let mut out = Vec::new();
    let code = match Commands::parse_from([&["belay"], args].concat()) {
        Commands::Prove(args) => prove::run(&args, &mut out).await,
        Commands::Disclose(args) => prove::disclose(&args, &mut out),
    };
    assert_eq!(code.unwrap(), 0);
    let file = folder.join(name);
    std::fs::write(&file, out).unwrap();
    file
}

#[tokio::test]
async fn one_record_is_proven_without_the_log() {
    let script = Script::good();
    let (folder, key) = saved(&script).await;
    let (path, elsewhere) = (folder.path().to_str().unwrap(), tempfile::tempdir().unwrap());
    let args = ["prove", path, "--witness-key", &key, "--record", "4"];
    let proof = written(elsewhere.path(), "denied.tlog-proof", &args).await;
    let (code, text) = verify(&[proof.to_str().unwrap(), "--witness-key", &key]).await;
    assert_eq!(code.unwrap(), 0);
    assert!(
        text.starts_with("PROVEN  record 4 of 13 in belay.dev/task/") && text.contains("evil.world.test"),
        "{text}"
    );

    let other = crate::evidence::note::Signer::generate(crate::evidence::note::WITNESS_NAME).unwrap();
    let (code, text) = verify(&[proof.to_str().unwrap(), "--witness-key", &other.verifier().to_string()]).await;
    assert!(code.unwrap() == 1 && text.starts_with("INVALID  its checkpoint"), "{text}");
    let forged = std::fs::read_to_string(&proof).unwrap().replace("index 4", "index 5");
    std::fs::write(&proof, forged).unwrap();
    let (code, text) = verify(&[proof.to_str().unwrap(), "--witness-key", &key]).await;
    assert!(code.unwrap() == 1 && text.contains("expected the record at 5 of 13"), "{text}");
}

/// Record 1 commits to arguments of which one field is disclosed.
#[tokio::test]
async fn a_field_that_was_disclosed_is_found_in_the_log() {
    let (arguments, salt) = (serde_json::json!({"order": 7, "card": "4111"}), Salt::new([9; 32]));
    let mut script = Script::good();
    let Event::Intent(intent) = &mut script.at(1).event else { panic!() };
    intent.request_commitment = Some(salt.value(&arguments).unwrap());
    let (folder, key) = saved(&script).await;
    let (path, elsewhere) = (folder.path().to_str().unwrap(), tempfile::tempdir().unwrap());
    let [call, kept] = ["call.json", "salt"].map(|name| elsewhere.path().join(name));
    std::fs::write(&call, "{ \"card\": \"4111\", \"order\": 7.0 }").unwrap();
    std::fs::write(&kept, String::from(salt)).unwrap();
    let [call, kept] = [&call, &kept].map(|path| path.to_str().unwrap());
    let opening =
        written(elsewhere.path(), "opening.json", &["disclose", "/order", "--arguments", call, "--salt", kept]).await;
    let text = std::fs::read_to_string(&opening).unwrap();
    assert!(!text.contains("4111"), "{text}");
    let args = [path, "--witness-key", &key, "--opening", opening.to_str().unwrap()];
    let (code, found) = verify(&args).await;
    assert_eq!(code.unwrap(), 0);
    assert!(found.contains("opening    record 1  call.intent a to search: /order is 7"), "{found}");

    std::fs::write(&opening, text.replace("\"value\": 7", "\"value\": 8")).unwrap();
    let (code, found) = verify(&args).await;
    assert!(code.unwrap() == 1 && found.contains("opening    INVALID"), "{found}");
    let other = Salt::new([8; 32]).open(&arguments, "/order").unwrap().unwrap();
    std::fs::write(&opening, serde_json::to_string(&other).unwrap()).unwrap();
    let (code, found) = verify(&args).await;
    assert!(code.unwrap() == 1 && found.contains("no record of this log commits to it"), "{found}");
}
