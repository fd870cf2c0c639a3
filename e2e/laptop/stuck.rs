//! Whatever an agent, an upstream, a name server or a reader of the output does, a run ends in its wall time and reacts to signals. Each
//! case has a control, in which the same does no harm.

use std::{
    io::{Read, Write},
    net::{TcpListener, UdpSocket},
    process::{Child, ExitStatus},
    thread::sleep,
    time::{Duration, Instant},
};

use crate::world::{self, PATIENCE, Ran, World, ended, until};

/// The wall time of these runs, in seconds.
const WALL: u64 = 4;
/// The time limit for the end of a run whose wall time is over: running calls have 5 s, and the machine may be slow and busy.
const SOON: Duration = Duration::from_secs(WALL + 30);

/// Contracts with the expression that people write for "each once", without a bound on its input.
const CONTRACTS: &str = "\
---
apiVersion: belay.dev/v1alpha1
kind: ToolContract
metadata: {name: uniq}
spec:
  tool: uniq
  description: Takes a list of distinct names.
  sideEffect: read
  upstream: {http: {method: POST, url: \"http://tools.test/uniq\"}}
  input: {type: object, required: [names], properties: {names: {type: array, items: {type: integer}}}}
  preconditions: [{name: distinct, cel: \"args.names.all(x, args.names.exists_one(y, x == y))\", message: each once}]
---
apiVersion: belay.dev/v1alpha1
kind: ToolContract
metadata: {name: short}
spec:
  tool: short
  description: Takes a short list of distinct names.
  sideEffect: read
  upstream: {http: {method: POST, url: \"http://tools.test/uniq\"}}
  input: {type: object, required: [names], properties: {names: {type: array, items: {type: integer}}}}
  limits: {requestBytes: 1000, timeoutSeconds: 5}
  preconditions: [{name: distinct, cel: \"args.names.all(x, args.names.exists_one(y, x == y))\", message: each once}]
---
apiVersion: belay.dev/v1alpha1
kind: ToolContract
metadata: {name: asks}
spec:
  tool: asks
  description: Is approved where names are there twice.
  sideEffect: read
  upstream: {http: {method: POST, url: \"http://tools.test/asks\"}}
  input: {type: object, required: [names], properties: {names: {type: array, items: {type: integer}}}}
  approval: {when: \"!args.names.all(x, args.names.exists_one(y, x == y))\", approvers: {groups: [finance]}, required: 1, timeoutSeconds: 60, holdSeconds: 0}
---
apiVersion: belay.dev/v1alpha1
kind: ToolContract
metadata: {name: tree}
spec:
  tool: tree
  description: Takes a tree.
  sideEffect: read
  upstream: {http: {method: POST, url: \"http://tools.test/tree\"}}
  input:
    type: object
    properties: {a: {$ref: '#/$defs/node'}}
    $defs:
      node:
        anyOf:
          - {type: object, required: [c], properties: {a: {$ref: '#/$defs/node'}, b: true}}
          - {type: object, required: [b], properties: {a: {$ref: '#/$defs/node'}, b: {enum: [1]}}, not: {properties: {a: {$ref: '#/$defs/node'}}, required: [z]}}
          - {const: 1}
";

fn with_contracts(world: &World) {
    let contracts = std::fs::read_to_string(world.task().join("contracts.yaml")).unwrap();
    world.write("contracts.yaml", &format!("{contracts}{CONTRACTS}"));
}

fn agent(world: &World, python: &str) {
    world.agent(python, "");
    let task = world::task()
        .replace("tools: [greet, refund]", "tools: [greet, refund, uniq, short, asks, tree]")
        .replace("wallTimeSeconds: 30, toolCalls: 5", &format!("wallTimeSeconds: {WALL}, toolCalls: 20"));
    world.write("task.yaml", &task);
}

/// Gives the task more time than any of these runs takes, however slow the machine is.
fn unhurried(world: &World) {
    let task = std::fs::read_to_string(world.task().join("task.yaml")).unwrap();
    world.write("task.yaml", &task.replace(&format!("wallTimeSeconds: {WALL},"), "wallTimeSeconds: 300,"));
}

/// Waits for the end of a process for at most this time.
fn wait(child: &mut Child, most: Duration) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if started.elapsed() > most {
            let _ = child.kill();
            panic!("it has not ended after {most:?}");
        }
        sleep(Duration::from_millis(20));
    }
}

/// Checks that a run ends at its wall time, and that its log verifies.
fn out_of_time(world: &World, sandbox: &str, python: &str, more: &[&str]) -> Ran {
    with_contracts(world);
    agent(world, python);
    let started = Instant::now();
    let ran = world.run(sandbox, more);
    assert!(started.elapsed() < SOON, "{:?}: {ran:#?}", started.elapsed());
    assert_eq!((ran.code, ran.last()["closed"]["reason"].as_str()), (5, Some("DeadlineExceeded")), "{ran:#?}");
    assert_eq!(ran.records("attempt.closed").len(), 1, "{ran:#?}");
    world.is_valid(&world.log());
    world.nobody_is_left();
    ran
}

/// Checks that the same run with enough time succeeds.
fn well(world: &World, sandbox: &str, python: &str, more: &[&str]) -> Ran {
    with_contracts(world);
    agent(world, python);
    // There is time enough for an evaluation that takes as long as it may.
    unhurried(world);
    let ran = world.run(sandbox, more);
    assert_eq!(ran.code, 0, "{ran:#?}");
    ran
}

/// An agent that makes calls without end. Each would take hours to evaluate.
const MANY: &str = r#"
import threading
def on():
    while True:
        try: say(CALL)
        except Exception as error: say(error)
threads = [threading.Thread(target=on) for _ in range(6)]
[one.start() for one in threads]
[one.join() for one in threads]
"#;

fn judged(world: &World, sandbox: &str, call: &str) {
    out_of_time(world, sandbox, &MANY.replace("CALL", call), &[]);
}

/// Checks that the agent ends at once after a signal.
fn agent_ends() {
    let started = Instant::now();
    while world::processes().values().any(|line| line.contains("agent.py") && !line.contains("belay")) {
        assert!(started.elapsed() < Duration::from_secs(5), "the agent goes on");
        sleep(Duration::from_millis(20));
    }
}

/// Checks that a signal ends the run while calls are evaluated.
fn heard(world: &World, sandbox: &str, signal: &str) {
    with_contracts(world);
    agent(world, &format!("say('begun')\n{}", MANY.replace("CALL", "call('uniq', names=list(range(12000)))")));
    unhurried(world);
    let mut child = world.start(sandbox, &[]);
    until(&mut child, "begun");
    sleep(Duration::from_secs(1));
    world::run("kill", &[&format!("-{signal}"), &child.id().to_string()]);
    // The agent ends at once. Running calls may take a few seconds.
    let started = Instant::now();
    agent_ends();
    let ran = ended(child.wait_with_output().unwrap());
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    assert_eq!((ran.code, ran.last()["closed"]["failureClass"].as_str()), (130, Some("Cancelled")), "{ran:#?}");
    world.is_valid(&world.log());
    world.nobody_is_left();
}

/// An agent that prints more than anybody reads.
const LOUD: &str = "import itertools\nfor n in itertools.count(): print(n, 'x' * 4000)";

/// Checks that the run ends in time if nobody reads its output.
fn unread(world: &World, sandbox: &str, more: &[&str], both: bool) {
    with_contracts(world);
    agent(world, LOUD);
    let resolve = format!("tools.test={}", world::UPSTREAM);
    let mut command = world.belay(&[&["run", "task.yaml", "--sandbox", sandbox, "--resolve", &resolve], more].concat());
    let (reader, writer) = std::io::pipe().unwrap();
    if both {
        command.stderr(writer.try_clone().unwrap());
    }
    let mut child = command.stdout(writer).spawn().unwrap();
    drop(command);
    let status = wait(&mut child, SOON);
    assert_eq!(status.code(), Some(5), "{status:?}");
    world.is_valid(&world.log());
    world.nobody_is_left();
    // The pipe was full: it holds as much as it can.
    let mut text = Vec::new();
    let mut reader = reader;
    reader.read_to_end(&mut text).unwrap();
    assert!(text.len() >= 60_000, "{}", text.len());
}

/// Checks that a reader that reads too late is told how many lines are lost, and that a signal ends the run meanwhile.
fn read_late(world: &World, sandbox: &str) {
    with_contracts(world);
    // It prints more than Belay and the pipe hold, says so to the upstream, and goes on.
    agent(
        world,
        "for n in range(2500): print(n, 'x' * 4000)\ncall('greet', name='you')\nwhile True: print('x' * 4000)",
    );
    unhurried(world);
    let mut child = world.start(sandbox, &[]);
    until(&mut child, "\"started\"");
    let started = Instant::now();
    while world.asked.lock().unwrap().is_empty() {
        assert!(started.elapsed() < Duration::from_secs(120), "the agent has not printed enough");
        sleep(Duration::from_millis(100));
    }
    world::run("kill", &["-TERM", &child.id().to_string()]);
    agent_ends();
    let ran = ended(child.wait_with_output().unwrap());
    let lost: u64 =
        ran.events.iter().filter(|event| event["event"] == "lost").filter_map(|event| event["lines"].as_u64()).sum();
    assert!(lost > 0, "{:?}", ran.events.len());
    assert_eq!(ran.code, 130);
    world.is_valid(&world.log());
}

/// Checks that a reader that closes the pipe does not end the run.
fn gone(world: &World, sandbox: &str) {
    with_contracts(world);
    agent(world, "for n in range(200): print('x' * 4000)\nsay(call('greet', name='you'))");
    unhurried(world);
    let mut child = world.start(sandbox, &[]);
    until(&mut child, "\"started\"");
    drop(child.stdout.take());
    assert_eq!(wait(&mut child, Duration::from_secs(120)).code(), Some(0));
    world.is_valid(&world.log());
}

/// Starts a server that accepts connections and writes nothing, or a byte now and then.
fn silent(dripping: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut all = Vec::new();
        for stream in listener.incoming().map_while(Result::ok) {
            let mut kept = stream.try_clone().unwrap();
            all.push(stream);
            std::thread::spawn(move || {
                let head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n";
                if dripping && kept.write_all(head).is_ok() {
                    while kept.write_all(b" ").is_ok() {
                        sleep(Duration::from_millis(500));
                    }
                }
            });
        }
    });
    format!("tools.test={address}")
}

fn upstream(world: &World, sandbox: &str, dripping: bool) {
    with_contracts(world);
    agent(world, &MANY.replace("CALL", "call('greet', name='you')"));
    let upstream = silent(dripping);
    let started = Instant::now();
    let output = world
        .belay(&["run", "task.yaml", "--output", "json", "--sandbox", sandbox, "--resolve", &upstream])
        .output()
        .unwrap();
    let ran = ended(output);
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    assert_eq!((ran.code, ran.last()["closed"]["reason"].as_str()), (5, Some("DeadlineExceeded")), "{ran:#?}");
    world.is_valid(&world.log());
    world.nobody_is_left();
}

fn names(world: &World, sandbox: &str) {
    with_contracts(world);
    agent(world, &MANY.replace("CALL", "call('greet', name='you')"));
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap().to_string();
    let started = Instant::now();
    let output = world
        .belay(&["run", "task.yaml", "--output", "json", "--sandbox", sandbox, "--nameserver", &address])
        .output()
        .unwrap();
    let ran = ended(output);
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    assert_eq!((ran.code, ran.last()["closed"]["reason"].as_str()), (5, Some("DeadlineExceeded")), "{ran:#?}");
    // The name server was asked. The control is every other test, in which names resolve.
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(server.recv(&mut [0; 512]).is_ok());
    world.is_valid(&world.log());
}

with_both! {
    an_expression => |world: &World, sandbox| judged(world, sandbox, "call('uniq', names=list(range(12000)))");
    an_approvals_condition => |world: &World, sandbox| judged(world, sandbox, "call('asks', names=list(range(12000)))");
    a_schema => |world: &World, sandbox| {
        judged(world, sandbox, "call('tree', a=__import__('functools').reduce(lambda inner, _: {'a': inner, 'b': 1}, range(80), 1))");
    };
    little_of_all_that => |world: &World, sandbox| {
        let ran = well(world, sandbox, "say(call('uniq', names=list(range(20))))\nsay(call('short', names=[1]))\nsay(call('tree', a={'a': 1, 'b': 1}))", &[]);
        assert_eq!(ran.said().matches("/uniq").count(), 2, "{ran:#?}");
        assert!(ran.said().contains("/tree"), "{ran:#?}");
    };
    what_is_longer_than_its_contract_takes_is_not_judged => |world: &World, sandbox| {
        let ran = well(world, sandbox, "say(call('short', names=list(range(12000))))", &[]);
        let denied = ran.records("call.denied");
        assert!(matches!(denied.as_slice(), [one] if one["rule"] == "tool.requestBytes"), "{denied:?}");
    };
    what_takes_too_long_is_denied_and_says_why => |world: &World, sandbox| {
        let ran = well(world, sandbox, "say(call('uniq', names=list(range(12000))))\nsay(call('greet', name='you'))", &[]);
        let denied = ran.records("call.denied");
        let [denied] = denied.as_slice() else { panic!("{denied:?}") };
        assert_eq!(denied["rule"], "tool.precondition");
        let reason = denied["reason"].as_str().unwrap();
        assert!(["distinct", "more than", "ToolContract uniq", "maxItems"].iter().all(|word| reason.contains(word)), "{reason}");
        assert!(ran.said().contains("/greet/you"), "{ran:#?}");
    };
    terminated_while_judging => |world, sandbox| heard(world, sandbox, "TERM");
    interrupted_while_judging => |world, sandbox| heard(world, sandbox, "INT");
    nobody_reads_stdout => |world, sandbox| unread(world, sandbox, &[], false);
    nobody_reads_json => |world, sandbox| unread(world, sandbox, &["--output", "json"], false);
    nobody_reads_anything => |world, sandbox| unread(world, sandbox, &[], true);
    a_reader_that_is_late => read_late;
    a_reader_that_is_gone => gone;
    an_upstream_that_says_nothing => |world, sandbox| upstream(world, sandbox, false);
    an_upstream_that_says_a_byte_now_and_then => |world, sandbox| upstream(world, sandbox, true);
    a_name_server_that_says_nothing => names;
    an_agent_that_ignores_signals => |world: &World, sandbox| {
        out_of_time(world, sandbox, "import signal\n[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]\ntime.sleep(300)", &[]);
    };
    an_agent_that_is_stopped => |world: &World, sandbox| {
        out_of_time(world, sandbox, "os.kill(os.getpid(), 19)\ntime.sleep(300)", &[]);
    };
    an_agent_that_reads_no_answer => |world: &World, sandbox| {
        out_of_time(world, sandbox, r#"
import socket
body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "greet", "arguments": {"name": "nobody" * 3}}}).encode()
head = b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1:9900\r\ncontent-type: application/json\r\naccept: application/json, text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(body)
all = []
for _ in range(50):
    one = socket.create_connection(("127.0.0.1", 9900))
    one.setblocking(False)
    try:
        while True: one.send(head + body)
    except BlockingIOError: pass
    all.append(one)
time.sleep(300)
"#, &[]);
    };
    an_agent_that_sends_half_a_request => |world: &World, sandbox| {
        out_of_time(world, sandbox, r#"
import socket
all = [socket.create_connection(("127.0.0.1", 9900)) for _ in range(100)]
for one in all: one.send(b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1:9900\r\ncontent-length: 1000000\r\n\r\n{")
time.sleep(300)
"#, &[]);
    };
    lines_are_not_cut_within_a_character => |world: &World, sandbox| {
        let ran = well(world, sandbox, "print('a' + '\u{20ac}' * 9000)", &[]);
        let said: String = ran.said().lines().collect();
        assert_eq!(said, format!("a{}", "\u{20ac}".repeat(9000)));
        assert!(ran.events.iter().any(|event| event["goesOn"] == true), "what goes on says so");
    };
}

/// The control of all cases: a run without any of these obstacles succeeds.
#[test]
fn nothing_in_the_way() {
    world::once(|world| {
        let ran = well(world, world::SANDBOXES[0], "say(call('greet', name='you'))", &[]);
        assert!(ran.said().contains("/greet/you"));
        assert!(!ran.events.iter().any(|event| event["event"] == "lost"));
    });
}
