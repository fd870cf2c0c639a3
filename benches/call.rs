//! Measures what harness and gateway add to a tool's read, compared with the same request made directly, at several numbers of concurrent
//! calls.
//!
//! The harness runs as its own binary. The gateway's service runs in another process, with TLS between them. The client, which is the
//! agent, and the upstream run in this process. All of them share the cores of this machine. The direct requests do too, but use much less.
//! With more concurrent calls than cores, the added time is mostly the wait for a core. Therefore the same request also goes through two
//! nginx that only pass it on, with TLS between them: this is the baseline. Evidence goes to the test cluster's S3 (`S3_ENDPOINT`), or to a
//! folder whose files are synced.

mod gateway;
mod nginx;

use std::{
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

use crate::{Measure, percentile, processor};

/// Environment variables of the gateway's process: the folder of its files, and the address of the upstream.
const FOLDER: &str = "BELAY_BENCH_FOLDER";
const UPSTREAM: &str = "BELAY_BENCH_UPSTREAM";
/// The numbers of concurrent calls.
const AT_A_TIME: [usize; 3] = [1, 10, 100];
/// The duration of one turn of a side, and the number of turns.
const TURN: Duration = Duration::from_secs(2);
const TURNS: usize = 3;
/// The address on which the harness serves the agent.
const HARNESS: &str = "127.0.0.1:9900";

/// Runs the gateway if this process is the gateway's, and returns whether it was.
pub async fn gateway() -> anyhow::Result<bool> {
    let (Ok(folder), Ok(upstream)) = (std::env::var(FOLDER), std::env::var(UPSTREAM)) else { return Ok(false) };
    gateway::serve(Path::new(&folder), upstream.parse()?).await?;
    Ok(true)
}

/// A child process that is killed when this value is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    /// Returns a field of its status, in MB.
    fn memory(&self, field: &str) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
        Ok(line.trim_matches([':', ' ', '\t', 'k', 'B']).trim().parse::<f64>()? * 1024.0 / 1e6)
    }

    /// Returns the CPU time that it has used, in seconds.
    fn processor(&self) -> anyhow::Result<f64> {
        processor::seconds(&self.0.id().to_string())
    }
}

/// The two upstream types of a read.
#[derive(Clone, Copy)]
enum Way {
    Http,
    Mcp,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Mcp => "mcp",
        }
    }

    fn direct(self) -> anyhow::Result<Request<Full<Bytes>>> {
        match self {
            Self::Http => Ok(Request::get("/items/7").header("host", "api.test.example").body(Full::default())?),
            Self::Mcp => message("/mcp", &called("find")),
        }
    }

    /// Returns the agent's request, which is the same MCP call for both types.
    fn through(self) -> anyhow::Result<Request<Full<Bytes>>> {
        message("/mcp", &called(if matches!(self, Self::Http) { "get" } else { "find" }))
    }
}

fn called(tool: &str) -> Value {
    json!({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": {"id": "7"}}})
}

fn message(path: &str, body: &Value) -> anyhow::Result<Request<Full<Bytes>>> {
    Ok(Request::post(path)
        .header("host", "127.0.0.1")
        .header("content-type", "application/json")
        .header("accept", "application/json, text/event-stream")
        .header("mcp-protocol-version", "2025-06-18")
        .body(Full::from(serde_json::to_vec(body)?))?)
}

pub async fn call() -> anyhow::Result<Vec<Measure>> {
    let folder = tempfile::tempdir()?;
    let upstream = serve_upstream().await?;
    let gateway = start_gateway(folder.path(), upstream)?;
    wait_for(|| folder.path().join("ready").exists()).await.context("the gateway does not start")?;
    // In memory, as in a pod.
    let spool = tempfile::tempdir_in("/dev/shm")?;
    let harness = start_harness(folder.path(), spool.path())?;
    wait_for(|| std::net::TcpStream::connect(HARNESS).is_ok()).await.context("the harness does not start")?;
    let harness_address: SocketAddr = HARNESS.parse()?;
    let (_control, control) = nginx::start(folder.path(), upstream).await?;

    let mut measures = Vec::new();
    for way in [Way::Http, Way::Mcp] {
        for count in AT_A_TIME {
            let (mut direct, mut through, mut passed) = (Vec::new(), Vec::new(), Vec::new());
            let (mut busy, mut seconds) = (0.0, 0.0);
            // Warm up first, so that connections, sessions and caches are not measured.
            together(harness_address, way.through()?, count, TURN / 4).await?;
            together(control, way.direct()?, count, TURN / 4).await?;
            for _ in 0..TURNS {
                direct.extend(together(upstream, way.direct()?, count, TURN / 2).await?);
                passed.extend(together(control, way.direct()?, count, TURN / 2).await?);
                let (before, started) = (harness.processor()? + gateway.processor()?, Instant::now());
                through.extend(together(harness_address, way.through()?, count, TURN).await?);
                busy += harness.processor()? + gateway.processor()? - before;
                seconds += started.elapsed().as_secs_f64();
            }
            let n = through.len();
            for (percent, goal) in [(50.0, 0.5), (99.0, 2.0)] {
                let direct = percentile(&mut direct, percent);
                let baseline = percentile(&mut passed, percent) - direct;
                let added = percentile(&mut through, percent) - direct;
                let name = format!("call.{}.{count}.added-p{percent}", way.name());
                measures.push(Measure::absolute(name, added, "ms", n, goal).beside(baseline));
            }
            let name = |what: &str| format!("call.{}.{count}.{what}", way.name());
            measures.push(Measure::at_least(name("per-core"), n as f64 / busy, "1/s", n, 2_000.0));
            measures.push(Measure::at_least(name("throughput"), n as f64 / seconds, "1/s", n, 1_000.0));
        }
    }
    measures.push(Measure::absolute("call.harness-peak-rss", harness.memory("VmHWM")?, "MB", 1, 64.0));
    measures.push(Measure::absolute("call.gateway-peak-rss", gateway.memory("VmHWM")?, "MB", 1, 128.0));
    Ok(measures)
}

fn start_gateway(folder: &Path, upstream: SocketAddr) -> anyhow::Result<Process> {
    let child = Command::new(std::env::current_exe()?)
        .env(FOLDER, folder)
        .env(UPSTREAM, upstream.to_string())
        .stdin(Stdio::null())
        .spawn()
        .context("the gateway")?;
    Ok(Process(child))
}

fn start_harness(folder: &Path, spool: &Path) -> anyhow::Result<Process> {
    let log = |name: &str| std::fs::File::create(folder.join(name));
    // Without RUST_LOG the harness logs as a release does.
    let child = Command::new(env!("CARGO_BIN_EXE_belay-harness"))
        .env_remove("RUST_LOG")
        .arg("serve")
        .args(
            [("--config", "config.json"), ("--containment", "containment.json"), ("--token", "token")]
                .map(|(flag, file)| format!("{flag}={}", folder.join(file).display())),
        )
        .arg(format!("--spool={}", spool.display()))
        .args(["--pod-name=bench-1", "--pod-uid=bench-1", "--node-name=here"])
        .stdin(Stdio::null())
        .stdout(log("records")?)
        .stderr(log("harness.log")?)
        .spawn()
        .context("the harness")?;
    Ok(Process(child))
}

async fn wait_for(ready: impl Fn() -> bool) -> anyhow::Result<()> {
    let started = Instant::now();
    while !ready() {
        ensure!(started.elapsed() < Duration::from_secs(20), "not within 20 s");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Runs `count` clients for `time`, each with one request at a time. Returns the duration of each request in milliseconds.
async fn together(
    to: SocketAddr,
    request: Request<Full<Bytes>>,
    count: usize,
    time: Duration,
) -> anyhow::Result<Vec<f64>> {
    let request = Arc::new(request);
    let until = Instant::now() + time;
    let clients: Vec<_> = (0..count).map(|_| tokio::spawn(client(to, request.clone(), until))).collect();
    let mut took = Vec::new();
    for client in clients {
        took.extend(client.await??);
    }
    Ok(took)
}

async fn client(to: SocketAddr, request: Arc<Request<Full<Bytes>>>, until: Instant) -> anyhow::Result<Vec<f64>> {
    let mut sender = connect(to).await?;
    let mut took = Vec::new();
    while Instant::now() < until {
        let started = Instant::now();
        let reply = sender.send_request((*request).clone()).await?;
        let status = reply.status();
        let body = reply.into_body().collect().await?.to_bytes();
        took.push(started.elapsed().as_secs_f64() * 1e3);
        let said = String::from_utf8_lossy(&body);
        ensure!(
            status.is_success() && said.contains("an item") && !said.contains("isError\":true"),
            "{status}: {said}"
        );
    }
    Ok(took)
}

async fn connect(to: SocketAddr) -> anyhow::Result<SendRequest<Full<Bytes>>> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// Starts an API and an MCP server that have one item.
async fn serve_upstream() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            let service = hyper::service::service_fn(upstream);
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
    Ok(address)
}

async fn upstream(request: Request<Incoming>) -> anyhow::Result<Response<Full<Bytes>>> {
    let item = r#"{"id":"7","name":"an item","price":12}"#;
    let is_mcp = request.uri().path() == "/mcp";
    let body = request.into_body().collect().await?.to_bytes();
    let json = |body: String| Ok(Response::builder().header("content-type", "application/json").body(body.into())?);
    if !is_mcp {
        return json(item.to_owned());
    }
    let message: Value = serde_json::from_slice(&body).unwrap_or_default();
    let result = match message["method"].as_str().unwrap_or_default() {
        "initialize" => json!({
            "protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": {"name": "bench", "version": "1"},
        }),
        "tools/list" => {
            let input = json!({"type": "object", "properties": {"id": {"type": "string"}}});
            json!({"tools": [{"name": "find", "description": "Finds an item.", "inputSchema": input}]})
        }
        "tools/call" => json!({"content": [{"type": "text", "text": item}]}),
        _ if message.get("id").is_none() => return Ok(Response::builder().status(202).body(Full::default())?),
        method => {
            let error = json!({"code": -32601, "message": format!("no method {method}")});
            return json(json!({"jsonrpc": "2.0", "id": message["id"], "error": error}).to_string());
        }
    };
    json(json!({"jsonrpc": "2.0", "id": message["id"], "result": result}).to_string())
}
