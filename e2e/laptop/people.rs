//! Approvals on a laptop: at the prompt, beforehand by an option, or with nobody there.

use std::process::{Command, Stdio};

use crate::world::{self, once};

/// A program that runs a command at a terminal and answers `question` with `answer`. It prints the exit code, then everything that was on
/// the screen.
const TERMINAL: &str = r#"
import os, pty, sys
question, answer, command = sys.argv[1].encode(), sys.argv[2].encode(), sys.argv[3:]
pid, terminal = pty.fork()
if pid == 0:
    os.execvp(command[0], command)
seen, answered = b"", False
while True:
    try:
        part = os.read(terminal, 4096)
    except OSError:
        break
    if not part:
        break
    seen += part
    if question in seen and not answered:
        answered = True
        os.write(terminal, answer + b"\n")
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
sys.stdout.write(seen.decode(errors="replace"))
"#;

fn at_the_prompt(answer: &str) -> (String, String) {
    let mut all = (String::new(), String::new());
    once(|world| {
        world.agent("say(call('refund', amount=3))", "");
        let belay = env!("CARGO_BIN_EXE_belay");
        let run = [belay, "run", "task.yaml", "--sandbox", "bwrap", "--resolve", "tools.test=127.0.0.1:8099"];
        let told = Command::new("python3")
            .args(["-c", TERMINAL, "y or n", answer])
            .args(run)
            .current_dir(world.task())
            .env("XDG_STATE_HOME", world.state())
            .envs([("USER", "carol"), ("TERM", "xterm")])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&told.stdout).into_owned();
        let (code, screen) = said.split_once('\n').unwrap();
        all = (code.to_owned(), screen.to_owned());
        world.is_valid(&world.log());
        check(answer, &all, &world.asked.lock().unwrap());
    });
    all
}

fn check(answer: &str, (code, screen): &(String, String), asked: &[(String, String, String)]) {
    assert_eq!(code, "0", "{screen}");
    for shown in [
        "refund",
        "\"amount\": 3",
        "group finance",
        "this machine does not check that carol is an approver",
        "░",
        "tool calls",
        "Succeeded",
        "belay verify ",
    ] {
        assert!(screen.contains(shown), "expected {shown} in {screen}");
    }
    let made = asked.iter().filter(|(method, path, _)| (method.as_str(), path.as_str()) == ("POST", "/refund")).count();
    if answer.starts_with('y') {
        assert!(screen.contains("approved: by carol") && made == 1, "{screen}");
    } else {
        assert!(screen.contains("denied: by carol") && screen.contains("rule: tool.approval") && made == 0, "{screen}");
    }
}

#[test]
fn yes_at_the_prompt_makes_the_call() {
    at_the_prompt("y it was cancelled");
}

#[test]
fn no_at_the_prompt_denies_it() {
    at_the_prompt("n the wrong order");
}

#[test]
fn yes_beforehand_is_recorded_as_a_decision() {
    once(|world| {
        world.agent("say(call('refund', amount=3))", "");
        let ran = world.run("bwrap", &["--approve", "refund"]);
        let decided = ran.records("approval.decided");
        assert_eq!(decided.len(), 1, "{ran:#?}");
        assert_eq!(decided[0]["decisions"][0]["by"], "carol");
        assert_eq!(decided[0]["state"], "approved");
        assert_eq!(world.asked.lock().unwrap().len(), 1);
        world.is_valid(&world.log());
    });
}

#[test]
fn nobody_there_is_no_yes() {
    once(|world| {
        world.agent("say(call('refund', amount=3))", "");
        let contracts = std::fs::read_to_string(world.task().join("contracts.yaml")).unwrap();
        world.write("contracts.yaml", &contracts.replace("timeoutSeconds: 60", "timeoutSeconds: 5, holdSeconds: 30"));
        let ran = world.run("bwrap", &[]);
        assert!(ran.said().contains("rule: tool.approval"), "{ran:#?}");
        assert_eq!(world.asked.lock().unwrap().len(), 0);
        world.is_valid(&world.log());
        // The principal cannot approve the call either.
        std::fs::remove_dir_all(world.log()).unwrap();
        let ran = world.run("bwrap", &["--approve", "refund", "--as", "alice@example.com"]);
        assert!(ran.said().contains("rule: tool.approval"), "{ran:#?}");
        assert_eq!(world.asked.lock().unwrap().len(), 0);
        let _ = world::PATIENCE;
    });
}
