//! No agent and no peer can stop the harness: agents whose calls take hours to evaluate, and peers that never answer. A ticker and a signal
//! run on the thread of the harness's own work meanwhile. Generated calls are in `src/harness/gate/tests.rs`.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use belay::{
    ends::AttemptEnd,
    harness::{
        self, Ended, Parts, Stop,
        probe::{Looking, Timing},
    },
    policy::config::HarnessConfig,
};
use futures::future::BoxFuture;

use super::*;
use crate::ticker::{Watched, inside, outside};

/// Sends a call over HTTP as an agent does. It blocks its thread.
fn posted(address: SocketAddr, body: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let head = format!(
        "POST /mcp HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nAccept: application/json, text/event-stream\r\n\
         MCP-Protocol-Version: 2025-06-18\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
    let mut reply = String::new();
    let _ = stream.read_to_string(&mut reply);
    reply
}

fn called(name: &str, args: &Value) -> String {
    json!({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": name, "arguments": args}}).to_string()
}

/// The pipeline as a whole: while calls that take hours are evaluated, other calls pass, and the log continues. The same holds for bodies
/// of the maximum length, with any JSON.
#[test]
fn long_judgments_and_long_bodies_are_nobodys_delay() {
    let (outside, inside) = (outside(), inside());
    let each_once = Precondition {
        name: "distinct".into(),
        cel: "args.names.all(x, args.names.exists_one(y, x == y))".into(),
        message: "each once".into(),
    };
    let names = json!({"type": "object", "properties": {"names": {"type": "array"}}, "additionalProperties": false});
    let uniq = Tool {
        input: names.clone(),
        preconditions: vec![each_once.clone()],
        ..tool("uniq", over_http(HttpMethod::Post, "/items", &[]), SideEffect::Read)
    };
    let short = Tool {
        limits: ToolLimits { request_bytes: Some(1000), ..ToolLimits::default() },
        name: "short".into(),
        contract: "short".into(),
        ..uniq.clone()
    };
    let plain = tool("plain", over_http(HttpMethod::Post, "/items", &[]), SideEffect::Read);
    let mut policy = policy(Limits { tool_calls: 1000, ..LIMITS });
    policy.tools = vec![uniq, short, plain];
    let (gateway, mcp, api) = outside.block_on(async {
        let (items, api) = upstreams::api().await;
        let names = vec![("api.test".to_owned(), items)];
        (
            Arc::new(Gateway::start(&policy, names).await),
            upstreams::Tools { calls: Arc::default(), listed: Arc::default() },
            api,
        )
    });
    inside.block_on(async {
        let harness = start(gateway, &policy, 1, mcp, api).await;
        let zeros = format!("[{}0]", "0,".repeat((15 << 20) / 2));
        let nested = format!("{}{}", "[".repeat(1 << 20), "]".repeat(1 << 20));
        let text = format!("\"{}\"", "\\u0061".repeat((14 << 20) / 6));
        let long_bodies = [zeros, nested, text].map(|args| {
            format!(r#"{{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{{"name":"uniq","arguments":{{"names":{args}}}}}}}"#)
        });
        let watched = Watched::begin();
        let address = harness.address;
        let many: Vec<u32> = (0..12_000).collect();
        let post = |body: String| tokio::task::spawn_blocking(move || posted(address, &body));

        // A call that is longer than its contract allows is denied before anything is evaluated.
        let refused = post(called("short", &json!({"names": many}))).await.unwrap();
        assert!(refused.contains("tool.requestBytes"), "{refused}");

        // Six calls that take hours, and meanwhile one that takes no time.
        let long: Vec<_> = (0..6).map(|_| post(called("uniq", &json!({"names": many})))).collect();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let quick = post(called("plain", &json!({}))).await.unwrap();
        assert!(quick.contains("\"isError\":false"), "{quick}");
        harness.gate.journal().caught_up().await.unwrap();
        for one in long {
            let told = one.await.unwrap();
            let rules = ["tool.precondition", "tool.schema", "request.busy"];
            assert!(rules.iter().any(|rule| told.contains(rule)), "{told}");
        }

        // Bodies of the maximum length, with as many values as possible.
        for body in long_bodies {
            let told = post(body).await.unwrap();
            assert!(told.contains("Belay denied"), "{}", &told[..told.len().min(400)]);
        }
        watched.is_in_time();
        // Everything is in the log: the call that passed, and each denial.
        let records = harness.records().await;
        let denied: u64 = records.iter().map(|record| match &record.event {
            Event::Denied(denied) => u64::try_from(denied.count).unwrap(),
            _ => 0,
        }).sum();
        assert!(denied >= 8, "{denied}");
    });
    let _ = outside;
}

/// A containment probe that never returns.
struct Blind;

impl Looking for Blind {
    fn look(&self, _: Timing) -> BoxFuture<'_, Containment> {
        Box::pin(std::future::pending())
    }
}

async fn stopped(after: Duration) -> Stop {
    tokio::time::sleep(after).await;
    Stop::Terminated
}

/// A harness reacts to a stop even if its gateway accepts connections and never answers.
#[test]
fn a_gateway_that_says_nothing_keeps_no_harness() {
    let (outside, inside) = (outside(), inside());
    let policy = policy(LIMITS);
    let gateway = outside.block_on(async { Gateway::start(&policy, vec![]).await });
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("token"), "the-token\n").unwrap();
    std::fs::create_dir(folder.path().join("spool")).unwrap();
    let parts = |gateway_address: String| Parts {
        config: HarnessConfig {
            policy: policy.clone(),
            wiring: Wiring {
                attempt: 1,
                gateway: gateway_address,
                gateway_ca: gateway.ca.clone(),
                probe: Probe { reachable: "r".into(), unreachable: vec![] },
            },
        },
        containment: contained(),
        token: folder.path().join("token"),
        spool: folder.path().join("spool"),
        pod: Pod {
            name: "t-1".into(),
            uid: "pod".into(),
            node: "n".into(),
            runtime_class: String::new(),
            network_policy: String::new(),
        },
        local: None,
        looking: Arc::new(Blind),
        follow: Box::new(|_, _| ()),
        gateway: None,
    };
    let listeners =
        || async { server::Listeners::bind("127.0.0.1:0".parse().unwrap(), "127.0.0.1:0".parse().unwrap()).await };
    inside.block_on(async {
        let address = silent.local_addr().unwrap().to_string();
        let stop = stopped(Duration::from_secs(1));
        let started = Instant::now();
        let ended = harness::run(parts(address), listeners, || panic!("it serves"), stop).await;
        assert!(matches!(ended, Ok(Ended::By(AttemptEnd::Terminated))), "{ended:?}");
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        // The control: with a gateway that answers, the same harness serves until it is stopped.
        let served = AtomicBool::new(false);
        let stop = stopped(Duration::from_secs(2));
        let serving = || served.store(true, Ordering::Relaxed);
        let ended = harness::run(parts(gateway.address.to_string()), listeners, serving, stop).await;
        assert!(matches!(ended, Ok(Ended::By(AttemptEnd::Terminated))), "{ended:?}");
        assert!(served.load(Ordering::Relaxed));
    });
}
