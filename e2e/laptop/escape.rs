//! An agent tries to get out, under both sandboxes. In the control, the same attempts succeed without a sandbox.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

use hickory_resolver::proto::{
    op::{Message, MessageType},
    rr::{RData, Record, RecordType},
};
use serde_json::Value;

use crate::world::{self, SANDBOXES, World, once};

const ESCAPE: &str = include_str!("escape.py");
const UPSTREAM: &str = include_str!("upstream.py");
/// Listeners at addresses that have no server in this world.
const SOMEBODY: &str = "tcp 8.8.8.8 443 udp 8.8.8.8 443 tcp 8.8.8.8 53 udp 8.8.8.8 53 tcp 8.8.8.8 853 tcp 2001:4860:4860::8888 443 \
                        tcp 169.254.169.254 80 tcp 127.0.0.1 7777 proxy 127.0.0.1 7778";
const ADDRESSES: [&str; 3] = ["8.8.8.8/32", "169.254.169.254/32", "2001:4860:4860::8888/128"];
/// The cases of the adversarial list that both sides must have tried.
const CASES: [&str; 28] = [
    "A1", "A7", "A8", "A9", "A10", "A11", "A12", "A13", "A15", "A23", "A24", "A28", "A29", "A30", "A31", "A32", "A33",
    "A34", "A35", "A36", "A43", "A44", "A47", "A48", "A49", "A50", "A51", "A14",
];

/// One attempt.
#[derive(Debug)]
struct Try {
    case: String,
    tried: String,
    escaped: bool,
    /// Shown if a test of the attempt fails.
    #[expect(dead_code, reason = "shown by Debug")]
    how: String,
}

fn tries(said: &str) -> Vec<Try> {
    assert!(said.contains(r#"{"done": true}"#), "it did not come to its end:\n{said}");
    let all = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    all.filter(|one| one.get("case").is_some())
        .map(|one| Try {
            case: text(&one["case"]),
            tried: text(&one["tried"]),
            escaped: one["escaped"].as_bool().unwrap(),
            how: text(&one["how"]),
        })
        .collect()
}

/// Starts the internet of this world, which ends with the returned process.
fn internet() -> Child {
    for address in ADDRESSES {
        world::run("ip", &["address", "add", address, "dev", "lo"]);
    }
    let words: Vec<_> = SOMEBODY.split_whitespace().collect();
    let mut child = Command::new("python3")
        .args(["-c", UPSTREAM])
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    child
}

/// Starts a name server whose names resolve to forbidden addresses.
fn names() {
    let socket = std::net::UdpSocket::bind("127.0.0.1:5353").unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((read, peer)) = socket.recv_from(&mut buffer) {
            let mut message = Message::from_vec(&buffer[..read]).unwrap();
            message.metadata.message_type = MessageType::Response;
            let query = message.queries[0].clone();
            let addresses: &[[u8; 4]] = match query.name().to_string().to_ascii_lowercase().as_str() {
                "private.test." => &[[10, 0, 0, 1]],
                "loopback.test." => &[[127, 0, 0, 1]],
                "mixed.test." => &[[8, 8, 8, 8], [192, 168, 0, 1]],
                _ => &[[8, 8, 8, 8]],
            };
            if query.query_type() == RecordType::A {
                for address in addresses {
                    message.answers.push(Record::from_rdata(
                        query.name().clone(),
                        60,
                        RData::A(std::net::Ipv4Addr::from(*address).into()),
                    ));
                }
            }
            let _ = socket.send_to(&message.to_vec().unwrap(), peer);
        }
    });
}

/// Returns environment variables about the machine for the attempts.
fn told(world: &World, neighbour: u32) -> [(&'static str, String); 3] {
    let secret = world.state().join("secret");
    fs::create_dir_all(world.state()).unwrap();
    fs::write(&secret, "a key").unwrap();
    [
        ("LOOPBACK", "127.0.0.1:7777".to_owned()),
        ("SECRET", secret.display().to_string()),
        ("NEIGHBOUR", neighbour.to_string()),
    ]
}

fn cases(all: &[Try]) -> BTreeSet<&str> {
    all.iter().map(|one| one.case.as_str()).collect()
}

#[test]
fn the_control_gets_out() {
    once(|world| {
        let internet = internet();
        let mut neighbour = Command::new("sleep").arg("100").spawn().unwrap();
        world.agent("", "");
        let ran = Command::new("python3")
            .args(["-c", ESCAPE])
            .envs(told(world, neighbour.id()))
            .envs([("PROXY", "127.0.0.1:7778".to_owned()), ("WORKSPACE", world.task().display().to_string())])
            .env("WRITABLE", world.state())
            .output()
            .unwrap();
        neighbour.kill().unwrap();
        neighbour.wait().unwrap();
        let all = tries(&String::from_utf8_lossy(&ran.stdout));
        let held: Vec<_> = all.iter().filter(|one| !one.escaped).collect();
        assert!(held.is_empty(), "tries that show nothing, since they fail without a sandbox too: {held:#?}");
        assert_eq!(cases(&all), CASES.into_iter().filter(|case| *case != "A14").collect());
        for path in ["/usr/belay-was-here", "/etc/belay-was-here", "/belay-was-here", "/dev/shm/belay-was-here"] {
            let _ = fs::remove_file(path);
        }
        drop(internet);
    });
}

/// Checks that no attempt succeeds, and that the log has the denials of the proxy under their rules.
fn an_agent_does_not(world: &World, sandbox: &str) {
    let internet = internet();
    names();
    let neighbour = Command::new("sleep").arg("100").spawn().unwrap();
    world.agent("", "");
    // This also covers A14, an agent that ignores the proxy variables: all attempts but those of the proxy connect directly.
    let env: String = told(world, neighbour.id())
        .iter()
        .map(|(name, value)| format!("      - {{name: {name}, value: \"{value}\"}}\n"))
        .collect();
    let more = "      - {name: PROXY, value: \"127.0.0.1:9900\"}\n      - {name: WORKSPACE, value: /workspace}\n      \
                - {name: WRITABLE, value: /out}\n";
    let mark = "      - {name: STORY, value: \"1\"}\n";
    let task =
        world::task().replace(mark, &format!("{env}{more}")).replace("wallTimeSeconds: 30", "wallTimeSeconds: 300");
    world.write("task.yaml", &format!("{task}  workspace: {{writeScopes: [{{path: /out, size: 1Mi}}]}}\n"));
    world.write("agent.py", ESCAPE);
    let ran = world.run(sandbox, &["--nameserver", "127.0.0.1:5353"]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    let all = tries(&ran.said());
    // A user namespace in gVisor is one of gVisor's own kernel, and gives no access to the machine.
    let harmless = |one: &&Try| sandbox == SANDBOXES[1] && one.tried == "unshare";
    let out: Vec<_> = all.iter().filter(|one| one.escaped && !harmless(one)).collect();
    assert!(out.is_empty(), "{sandbox} lets out: {out:#?}");
    assert_eq!(cases(&all), CASES.into_iter().filter(|case| *case != "A14").collect());
    // The requests to the harness are in the log, with the rule.
    let denied: Vec<_> =
        ran.records("call.denied").iter().map(|one| one["rule"].as_str().unwrap().to_owned()).collect();
    let not_applied: Vec<_> =
        ran.records("call.outcome").iter().filter_map(|one| one["rule"].as_str().map(str::to_owned)).collect();
    for rule in ["egress.host", "egress.port", "egress.address", "request.malformed"] {
        assert!(denied.iter().any(|one| one == rule), "expected {rule} among {denied:?}");
    }
    // A denial by the gateway counts as a denial, and is also the outcome of a call.
    let twice = not_applied.iter().filter(|rule| rule.starts_with("egress.")).count();
    let refused = denied.len() + not_applied.len() - twice;
    let by_proxy = ["A15", "A24", "A28", "A29", "A30", "A31", "A32", "A33", "A34", "A35", "A36"];
    let asked = all.iter().filter(|one| by_proxy.contains(&one.case.as_str()) || one.tried == "by the proxy");
    let asked: Vec<_> = asked.map(|one| one.tried.as_str()).collect();
    assert_eq!(refused, asked.len(), "of {asked:#?} these are on record: {denied:?} {not_applied:?}");
    assert!(not_applied.iter().filter(|one| *one == "egress.address").count() >= 3, "{not_applied:?} {denied:?}");
    world.is_valid(&world.log());
    let mut neighbour = neighbour;
    neighbour.kill().unwrap();
    neighbour.wait().unwrap();
    world.nobody_is_left();
    drop(internet);
}

/// A27: the gateway does not follow a redirect of an upstream. In the control, a client that follows it succeeds.
fn nobody_is_led_elsewhere(world: &World, sandbox: &str) {
    world.agent("say(call('greet', name='elsewhere'))", "");
    let ran = world.run(sandbox, &[]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    let paths = || world.asked.lock().unwrap().drain(..).map(|(_, path, _)| path).collect::<Vec<_>>();
    assert_eq!(paths(), ["/greet/elsewhere"]);
    assert_eq!(ran.records("call.outcome").last().unwrap()["status"], 302);
    world::run("python3", &["-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8099/greet/elsewhere')"]);
    assert_eq!(paths(), ["/greet/elsewhere", "/greet/there"]);
    world.is_valid(&world.log());
}

with_both! {
    an_agent => an_agent_does_not;
    redirects => nobody_is_led_elsewhere;
}
