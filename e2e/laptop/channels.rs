//! Attempts to make calls without a record, under both sandboxes: denials within a tunnel or by an HTTP library are in the log and count,
//! the bytes of a tunnel are known, and no argument changes the path of a URL. In the control there is no harness, and every attempt
//! succeeds.

use std::{
    io::{Read, Write},
    net::TcpListener,
    process::Command,
};

use serde_json::Value;

use crate::world::{self, World, once};

const AGENT: &str = include_str!("../escape/channels.py");
/// The server of `allowed.test`.
const OPEN: &str = "127.0.0.1:8443";
/// The number of attempts of each kind.
const KINDS: [(&str, usize); 4] = [("tunnel", 9), ("head", 11), ("path", 9), ("control", 1)];

/// Starts a server that accepts anything and answers `through`.
fn open() {
    let listener = TcpListener::bind(OPEN).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            std::thread::spawn(move || {
                let mut piece = [0; 65_536];
                if stream.read(&mut piece).is_ok_and(|read| read > 0) {
                    let _ = stream.write_all(b"through");
                }
                while stream.read(&mut piece).is_ok_and(|read| read > 0) {}
            });
        }
    });
}

fn tries(said: &str) -> Vec<(String, String, bool)> {
    assert!(said.contains(r#"{"done": true}"#), "it did not come to its end:\n{said}");
    let all = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let all: Vec<_> = all
        .filter(|one| one.get("kind").is_some())
        .map(|one| (text(&one["kind"]), text(&one["tried"]), one["through"].as_bool().unwrap()))
        .collect();
    for (kind, count) in KINDS {
        assert_eq!(all.iter().filter(|(one, ..)| one == kind).count(), count, "{kind}: {all:#?}");
    }
    all
}

#[test]
fn where_nobody_stands_before_it_all_gets_through() {
    once(|_| {
        open();
        let ran = Command::new("python3").args(["-c", AGENT]).envs([("TO", OPEN), ("DIRECT", OPEN)]).output().unwrap();
        let all = tries(&String::from_utf8_lossy(&ran.stdout));
        let held: Vec<_> = all.iter().filter(|(.., through)| !through).collect();
        assert!(held.is_empty(), "tries that show nothing: {held:#?}");
    });
}

fn agent(world: &World, denials: Option<i64>) {
    open();
    world.agent("", "");
    let limits = denials.map(|count| format!(", denials: {count}")).unwrap_or_default();
    let task = world::task().replace("{name: STORY, value: \"1\"}", "{name: TO, value: \"127.0.0.1:9900\"}").replace(
        "{wallTimeSeconds: 30, toolCalls: 5, tokens: 1000}",
        &format!("{{wallTimeSeconds: 300, toolCalls: 50, tokens: 1000{limits}}}"),
    );
    let pack = std::fs::read_to_string(world.task().join("pack.yaml")).unwrap();
    world.write("pack.yaml", &pack.replace("toolCalls: 20,", "toolCalls: 50,"));
    world.write("task.yaml", &task);
    world.write("agent.py", AGENT);
}

fn everything_is_on_record(world: &World, sandbox: &str) {
    agent(world, None);
    let ran = world.run(sandbox, &["--resolve", &format!("allowed.test={OPEN}")]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    let all = tries(&ran.said());
    let out: Vec<_> = all.iter().filter(|(kind, _, through)| *through != (kind == "control")).collect();
    assert!(out.is_empty(), "{sandbox}: {out:#?}");
    let denied = ran.records("call.denied");
    let of = |rule: &str| denied.iter().filter(|one| one["rule"] == rule).count();
    let counts = [of("egress.host"), of("request.malformed"), of("model.request"), of("tool.url")];
    assert_eq!(counts, [9, 10, 1, 9], "{denied:#?}");
    assert_eq!(denied.last().unwrap()["usage"]["denials"], 29);
    let outcomes = ran.records("call.outcome");
    assert_eq!(
        outcomes.iter().filter(|one| one["rule"] == "egress.host" && one["sentBytes"] == 0).count(),
        9,
        "{outcomes:#?}"
    );
    let passed = outcomes.last().unwrap();
    assert!(passed["sentBytes"].as_u64().unwrap() > 1 << 20 && passed["responseBytes"] == 7, "{passed}");
    assert!(world.asked.lock().unwrap().is_empty(), "an argument has led somewhere");
    world.is_valid(&world.log());
    world.nobody_is_left();
}

fn tunnels_that_are_refused_end_a_task(world: &World, sandbox: &str) {
    agent(world, Some(4));
    let ran = world.run(sandbox, &["--resolve", &format!("allowed.test={OPEN}")]);
    assert_eq!(ran.code, 4, "{ran:#?}");
    assert_eq!(ran.records("attempt.closed").last().unwrap()["reason"], "denials", "{ran:#?}");
    let rules: Vec<_> = ran.records("call.denied").iter().map(|one| one["rule"].clone()).take(4).collect();
    assert_eq!(rules, ["egress.host"; 4]);
    world.is_valid(&world.log());
}

/// The agent waits for a tool that is slow, and then for the end of a tunnel that is silent.
const PATIENT: &str = r#"
import socket, ssl, time, urllib.parse

began = time.monotonic()
said = call("greet", name="slow")
say(json.dumps({"tool": said, "took": time.monotonic() - began}))
proxy = urllib.parse.urlsplit(os.environ["HTTPS_PROXY"])
tunnel = socket.create_connection((proxy.hostname, proxy.port))
tunnel.sendall(b"CONNECT allowed.test:443 HTTP/1.1\r\nhost: allowed.test:443\r\n\r\n")
while not tunnel.recv(4096).endswith(b"\r\n\r\n"): pass
incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
hello = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="allowed.test")
try: hello.do_handshake()
except ssl.SSLWantReadError: pass
tunnel.sendall(outgoing.read())
assert tunnel.recv(4096) == b"through"
tunnel.settimeout(6)
try: said = "ended" if tunnel.recv(4096) == b"" else "more"
except TimeoutError: said = "open"
say(json.dumps({"tunnel": said}))
"#;

/// The class's `upstreamTimeoutSeconds` ends what is silent, calls and tunnels, and not before.
fn silence_ends_by_the_time_of_the_class(world: &World, sandbox: &str) {
    open();
    world.agent(PATIENT, "");
    let pack = std::fs::read_to_string(world.task().join("pack.yaml")).unwrap();
    let said = |seconds: u64| {
        let class = format!("      upstreamTimeoutSeconds: {seconds}\n      limits:");
        world.write("pack.yaml", &pack.replacen("      limits:", &class, 1));
        let ran = world.run(sandbox, &["--resolve", &format!("allowed.test={OPEN}")]);
        assert_eq!(ran.code, 0, "{ran:#?}");
        let lines = ran.said();
        let all: Vec<Value> = lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let [tool, tunnel] = all.as_slice() else { panic!("{ran:#?}") };
        (tool["tool"].as_str().unwrap().to_owned(), tool["took"].as_f64().unwrap(), tunnel["tunnel"].clone(), ran)
    };
    let (tool, took, tunnel, ran) = said(1);
    assert!(tool.contains("upstream.reply") && tool.contains("upstreamTimeoutSeconds") && took < 3.0, "{took}: {tool}");
    assert_eq!(tunnel, "ended", "{ran:#?}");
    let (tool, took, tunnel, ran) = said(30);
    assert!(tool.contains("/greet/slow") && took > 3.0, "{took}: {tool}");
    assert_eq!(tunnel, "open", "{ran:#?}");
}

/// Error messages are printed in lines.
#[test]
fn findings_and_what_an_upstream_said_come_in_lines() {
    once(|world| {
        world.agent("", "");
        let task = world::task()
            .replace("wallTimeSeconds: 30", "wallTimeSeconds: 3000")
            .replace("toolCalls: 5", "toolCalls: 500");
        world.write("task.yaml", &task);
        let said = world.belay(&["run", "task.yaml"]).output().unwrap();
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(
            said.lines().filter(|line| line.starts_with("error: ")).count() >= 2 && !said.contains("\\n"),
            "{said}"
        );
        world.agent("", "");
        let said =
            world.belay(&["run", "task.yaml", "--upstream", "tools.test=echo one; echo two; exit 3"]).output().unwrap();
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(!said.contains("\\n") && said.lines().any(|line| line.ends_with("  two")), "{said}");
    });
}

with_both! {
    on_record => everything_is_on_record;
    counted => tunnels_that_are_refused_end_a_task;
    silence => silence_ends_by_the_time_of_the_class;
}
