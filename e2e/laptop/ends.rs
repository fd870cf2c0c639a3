//! Ends of runs: success, a signal, SIGKILL, a limit, a full disk. Each leaves a log that verifies as what it is, and no process.

use std::{fs, process::Command, thread::sleep, time::Duration};

use crate::world::{self, SANDBOXES, World, ended, once, processes, until};

/// Checks what an agent may do, what is denied, what it is told, and what it never sees.
fn an_ordinary_run(world: &World, sandbox: &str) {
    world.agent(
        r#"
say(call("greet", name="you"))
say(call("greet", name="nobody"))
say(call("remove", everything=True))
open("/out/file", "w").write("x" * 1000)
say(" ".join(sorted(os.listdir("/"))))
say(os.environ["HOME"] + str(os.getuid()) + os.getcwd())
try: say("secret: " + open("pack.yaml").read())
except OSError as error: say(error)
"#,
        "  workspace: {writeScopes: [{path: /out, size: 1Mi}]}\n",
    );
    let ran = world.run(sandbox, &[]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    let said = ran.said();
    assert!(said.contains("/greet/you"), "{said}");
    assert!(said.contains("rule: tool.precondition") && said.contains("rule: tool.unknown"), "{said}");
    assert!(said.contains("/1000/workspace"), "{said}");
    for private in ["home", "root", "var", "opt", "srv"] {
        assert!(!said.lines().any(|line| line.split(' ').any(|word| word == private)), "{private} in {said}");
    }
    assert_eq!(world.asked.lock().unwrap().as_slice(), [("GET".into(), "/greet/you".into(), String::new())]);
    // Only the gateway has the credential: neither the agent, whose folder has the file, nor the evidence.
    assert!(!said.contains("sesame"), "{said}");
    assert!(!String::from_utf8_lossy(&world.all_that_is_kept()).contains("sesame"));

    let opened = ran.records("attempt.opened");
    let [opened] = opened.as_slice() else { panic!("{opened:?}") };
    assert_eq!(opened["local"]["root"], "host");
    assert_eq!(opened["local"]["store"], "folder");
    assert_eq!(opened["local"]["resolved"], serde_json::json!(["tools.test=127.0.0.1:8099"]));
    let containment = &opened["containment"];
    assert_eq!((containment["contained"].as_bool(), containment["rounds"].as_i64()), (Some(true), Some(3)));
    let denied: Vec<_> =
        ran.records("call.denied").iter().map(|record| record["rule"].as_str().unwrap().to_owned()).collect();
    assert_eq!(denied, ["tool.precondition", "tool.unknown"]);
    // The run succeeded, and its last line still counts the denials.
    assert_eq!((ran.last()["closed"]["phase"].as_str(), &ran.last()["denied"]["tool"]), (Some("Succeeded"), &2.into()));
    world.is_valid(&world.log());
    world.nobody_is_left();
}

/// Checks that a first signal ends the run in order.
fn stopped(world: &World, sandbox: &str, signal: &str) {
    world.agent("say(call('greet', name='you'))\nsay('begun')\ntime.sleep(300)", "");
    let mut child = world.start(sandbox, &[]);
    until(&mut child, "begun");
    world::run("kill", &[&format!("-{signal}"), &child.id().to_string()]);
    let ran = ended(child.wait_with_output().unwrap());
    assert_eq!(ran.code, 130, "{ran:#?}");
    assert_eq!(ran.last()["closed"]["failureClass"], "Cancelled", "{ran:#?}");
    // The agent ended before the log was sealed, so no record follows.
    assert_eq!(ran.records("attempt.closed").len(), 1);
    world.is_valid(&world.log());
    world.nobody_is_left();
}

fn killed(world: &World, sandbox: &str) {
    world.agent("say(call('greet', name='you'))\nsay('begun')\ntime.sleep(300)", "");
    let mut child = world.start(sandbox, &[]);
    until(&mut child, "begun");
    child.kill().unwrap();
    child.wait().unwrap();
    world.nobody_is_left();
    let (first, second) = world.verify(&world.log());
    assert!(first.starts_with("INCOMPLETE, self-witnessed"), "{first}");
    assert_eq!(second, "INCOMPLETE, self-witnessed");
    // The next run removes what the killed run left.
    world.agent("say('again')", "");
    fs::remove_dir_all(world.log()).unwrap();
    assert_eq!(world.run(sandbox, &[]).code, 0);
    assert_eq!(fs::read_dir(world.state().join("belay/runs")).unwrap().count(), 0);
}

/// Checks the exit code and the reason of an end.
fn ends(world: &World, sandbox: &str, (python, more): (&str, &str), (code, reason): (i32, &str)) {
    world.agent(python, more);
    let ran = world.run(sandbox, &[]);
    assert_eq!((ran.code, ran.last()["closed"]["reason"].as_str()), (code, Some(reason)), "{ran:#?}");
    world.is_valid(&world.log());
    world.nobody_is_left();
}

const LIMITS: &str = "  limits: {wallTimeSeconds: 30, toolCalls: 5, tokens: 1000}\n";

with_both! {
    ordinary => an_ordinary_run;
    interrupted => |world, sandbox| stopped(world, sandbox, "INT");
    terminated => |world, sandbox| stopped(world, sandbox, "TERM");
    killed_itself => killed;
    agent_fails => |world, sandbox| ends(world, sandbox, ("sys.exit(7)", ""), (1, "NonZeroExit"));
    too_much_memory => |world, sandbox| {
        ends(world, sandbox, ("a = []\nwhile True: a.append(bytearray(b'x' * (8 << 20))); time.sleep(0.01)", ""), (1, "OOMKilled"));
    };
    out_of_time => |world: &World, sandbox| {
        let short = world::task().replace("wallTimeSeconds: 30", "wallTimeSeconds: 2");
        world.agent("time.sleep(300)", "");
        world.write("task.yaml", &short);
        let ran = world.run(sandbox, &[]);
        assert_eq!((ran.code, ran.last()["closed"]["reason"].as_str()), (5, Some("DeadlineExceeded")), "{ran:#?}");
        world.is_valid(&world.log());
        world.nobody_is_left();
    };
    too_many_denials => |world: &World, sandbox| {
        world.agent("for n in range(20): call('nothing')\ntime.sleep(300)", "");
        world.write("task.yaml", &world::task().replace("tokens: 1000}", "tokens: 1000, denials: 3}"));
        let ran = world.run(sandbox, &[]);
        assert_eq!((ran.code, ran.last()["closed"]["reason"].as_str()), (4, Some("TooManyDenials")), "{ran:#?}");
        world.is_valid(&world.log());
        world.nobody_is_left();
    };
    tried_again => |world: &World, sandbox| {
        world.agent("sys.exit(0 if os.environ['BELAY_ATTEMPT'] == '2' else 1)", "  retry: {agent: 1}\n");
        let ran = world.run(sandbox, &[]);
        assert_eq!((ran.code, ran.records("attempt.opened").len()), (0, 2), "{ran:#?}");
        world.is_valid(&world.log());
    };
    a_full_write_scope => |world: &World, sandbox| {
        let python = "
try:
    with open('/out/x', 'wb') as file:
        while True: file.write(b'x' * 65536); file.flush()
except OSError as error: say(error.strerror)
say(os.path.getsize('/out/x') <= 1 << 20)";
        world.agent(python, "  workspace: {writeScopes: [{path: /out, size: 1Mi}]}\n");
        let ran = world.run(sandbox, &[]);
        assert_eq!(ran.said(), "No space left on device\nTrue\n", "{ran:#?}");
    };
    a_full_disk => |world: &World, sandbox| {
        // There is room for the first record and little more.
        let folder = world.task().join("evidence");
        fs::create_dir(&folder).unwrap();
        world::run("mount", &["-t", "tmpfs", "-o", "size=128k", "tmpfs", folder.to_str().unwrap()]);
        fs::write(folder.join("ballast"), vec![0; 96 << 10]).unwrap();
        world.agent("for n in range(5): say(call('greet', name='you'))", "");
        let ran = world.run(sandbox, &["--evidence", folder.to_str().unwrap()]);
        assert!([3, 6].contains(&ran.code), "{ran:#?}");
        assert!(ran.last()["error"].as_str().is_some_and(|error| error.contains("evidence.unavailable")), "{ran:#?}");
        world.nobody_is_left();
        // No call left without a record in the log.
        let log = folder.join("default/hello");
        let log = fs::read_dir(log).unwrap().next().unwrap().unwrap().path();
        let (first, _) = world.verify(&log);
        assert!(!first.starts_with("INVALID") && !first.starts_with("VALID"), "{first}");
        world::run("umount", &[folder.to_str().unwrap()]);
    };
    a_fork_bomb => |world: &World, sandbox| {
        world.agent("
while True:
    try:
        if os.fork() == 0: time.sleep(300)
    except OSError: time.sleep(0.05)", "");
        world.write("task.yaml", &world::task().replace("wallTimeSeconds: 30", "wallTimeSeconds: 8"));
        let ran = world.run(sandbox, &[]);
        assert!([1, 5].contains(&ran.code), "{ran:#?}");
        world.is_valid(&world.log());
        world.nobody_is_left();
    };
}

#[test]
fn a_program_that_is_not_there() {
    once(|world| {
        for sandbox in SANDBOXES {
            world.agent("", "");
            world.write("task.yaml", &world::task().replace("python3, -B, agent.py", "no-such-program"));
            let ran = world.run(sandbox, &[]);
            assert_eq!(ran.code, 2, "{ran:#?}");
            assert!(ran.stderr.contains("no-such-program") && ran.events.is_empty(), "{ran:#?}");
            // A file that only looks like a program fails in the sandbox.
            world.write("broken", "\x7fELF");
            world::run("chmod", &["755", world.task().join("broken").to_str().unwrap()]);
            world.write("task.yaml", &world::task().replace("python3, -B, agent.py", "./broken"));
            let ran = world.run(sandbox, &[]);
            assert_eq!(ran.code, 1, "{ran:#?}");
            fs::remove_dir_all(world.log()).unwrap();
        }
    });
}

/// A signal to the whole process group reaches only `belay run`, because the agent is not in its group.
#[test]
fn an_interrupt_of_the_whole_group_is_an_end_in_order() {
    once(|world| {
        use std::os::unix::process::CommandExt;
        world.agent("say('begun')\ntime.sleep(300)", "");
        let mut command = world.belay(&["run", "task.yaml", "--output", "json", "--sandbox", "bwrap"]);
        let mut child = command.process_group(0).spawn().unwrap();
        until(&mut child, "begun");
        let sent = Command::new("kill").args(["-INT", "--", &format!("-{}", child.id())]).status().unwrap();
        assert!(sent.success());
        let ran = ended(child.wait_with_output().unwrap());
        assert_eq!((ran.code, ran.last()["closed"]["failureClass"].as_str()), (130, Some("Cancelled")), "{ran:#?}");
        world.is_valid(&world.log());
    });
}

#[test]
fn a_second_interrupt_does_not_wait() {
    once(|world| {
        world.agent("say('begun')\ntime.sleep(300)", "");
        let mut child = world.start("bwrap", &[]);
        until(&mut child, "begun");
        for _ in 0..2 {
            world::run("kill", &["-INT", &child.id().to_string()]);
            sleep(Duration::from_millis(5));
        }
        assert_eq!(ended(child.wait_with_output().unwrap()).code, 130);
        world.nobody_is_left();
        assert!(!processes().is_empty() && LIMITS.contains("wallTime"));
    });
}
