//! The API server is killed, stopped, slowed down and made to expire every watch, at random moments of tasks that end before, near and
//! after their deadline. No verdict is wrong. No task that succeeded is rolled back. No pod is deleted before its end is recorded. A task
//! that is created when the API server is back gets its pod within seconds.
//!
//! The test learns what each agent really did from its container's log, of which it keeps a link beyond the pod's life. This needs neither
//! the API server nor Belay. By default the test runs a sample; `make chaos` (`BELAY_CHAOS=full`) runs 200 tasks through 50 outages. The
//! test prints its seed. `BELAY_CHAOS_SEED` sets the seed, and with it the plan of tasks and outages, but not the machine's timing.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use belay::{
    api::{
        AgentTask,
        agent_task::{Attempt, Phase, RollbackWhen},
    },
    ends::FailureClass,
};
use jiff::Timestamp;
use kube::{
    ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};

use crate::support::{World, class, merge, phase, setting, ticket_contract};

/// The wall time of each task, in seconds.
const WALL: f64 = 30.0;
/// If an agent ends within this many seconds of its deadline, either verdict is right: an interpreter needs some seconds before it prints
/// its first line.
const NEAR: f64 = 6.0;
/// The time within which a task that is created when the API server is back must have its pod, in seconds.
const BACK_WITHIN: f64 = 30.0;
/// Running tasks at a time: as many as two cores can run.
const AT_A_TIME: usize = 10;

/// A reproducible random number generator (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    #[allow(clippy::cast_precision_loss, reason = "53 bits are enough")]
    fn between(&mut self, least: f64, most: f64) -> f64 {
        least + (self.next() >> 11) as f64 / (1_u64 << 53) as f64 * (most - least)
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, usize::try_from(self.next() % (last as u64 + 1)).unwrap());
        }
    }
}

/// An outage of the API server, and its length in seconds.
#[derive(Clone, Copy, Debug)]
enum Outage {
    Killed(f64),
    Stopped(f64),
    Slow(f64),
    /// Killed and started at once, with the whole history compacted: each watch must list again.
    Expired,
}

/// How an agent is meant to end.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ends {
    Early,
    Near,
    After,
    Fails,
}

#[derive(Clone, Copy, Debug)]
struct Planned {
    ends: Ends,
    seconds: f64,
    rolls_back: bool,
}

/// What an attempt's agent did, as its own log says.
#[derive(Clone, Debug, Default)]
struct Facts {
    started: Option<f64>,
    /// The exit code and the time.
    ended: Option<(i32, f64)>,
    ticket: bool,
}

impl Facts {
    /// Whether the agent succeeded clearly before its deadline.
    fn succeeded(&self) -> bool {
        let in_time = |at: f64| self.started.is_some_and(|started| at < started + WALL - NEAR);
        matches!(self.ended, Some((0, at)) if in_time(at))
    }
}

fn outages(full: bool, random: &mut Random) -> Vec<Outage> {
    let mut all = Vec::new();
    if full {
        for _ in 0..14 {
            all.push(Outage::Killed(random.between(0.0, 15.0)));
            all.push(Outage::Stopped(random.between(2.0, 15.0)));
        }
        for seconds in [20.0, 40.0, 60.0, 120.0] {
            all.push(Outage::Killed(seconds));
            all.push(Outage::Stopped(seconds));
        }
        all.push(Outage::Stopped(180.0));
        all.push(Outage::Killed(90.0));
        (0..6).for_each(|_| all.push(Outage::Slow(random.between(10.0, 30.0))));
        (0..6).for_each(|_| all.push(Outage::Expired));
    } else {
        all =
            vec![Outage::Killed(4.0), Outage::Stopped(random.between(5.0, 20.0)), Outage::Slow(12.0), Outage::Expired];
    }
    random.shuffle(&mut all);
    all
}

fn tasks(count: usize, random: &mut Random) -> Vec<Planned> {
    let mut all: Vec<_> = (0..count)
        .map(|index| {
            let (ends, seconds) = match index * 20 / count {
                0..9 => (Ends::Early, random.between(3.0, 14.0)),
                9..14 => (Ends::Near, random.between(WALL - 9.0, WALL + 4.0)),
                14..17 => (Ends::After, WALL + 30.0),
                _ => (Ends::Fails, random.between(3.0, 14.0)),
            };
            Planned { ends, seconds, rolls_back: index % 2 == 0 }
        })
        .collect();
    random.shuffle(&mut all);
    all
}

/// The API server's process. Dropping it starts the API server again, even if the test fails.
struct ApiServer;

impl ApiServer {
    fn pid() -> String {
        let file = PathBuf::from(setting("CACHE")).join("cluster/pids/apiserver");
        std::fs::read_to_string(file).expect("the test cluster is not up").split(' ').next().unwrap().to_owned()
    }

    fn signal(name: &str) {
        let _ = Command::new("kill").args([name, &Self::pid()]).status();
    }

    fn up() {
        let up = concat!(env!("CARGO_MANIFEST_DIR"), "/e2e/cluster/up");
        // `up` starts processes that outlive it, in its own network namespaces: they must not inherit this test's settings.
        let done = Command::new(up)
            .env_remove("KUBECONFIG")
            .env_remove("BELAY_KUBECONFIG")
            .output()
            .expect("no e2e/cluster/up");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    /// Compacts etcd's whole history, so that no watch can continue where it was.
    fn compact() {
        let etcd = |path: &str, body: Value| {
            let url = format!("http://127.0.0.1:2379{path}");
            let done = Command::new("curl")
                .args(["-sS", "-m", "10", "-d", &body.to_string(), &url])
                .output()
                .expect("no curl");
            serde_json::from_slice::<Value>(&done.stdout).expect("no answer of etcd")
        };
        let revision = etcd("/v3/kv/range", json!({"key": "AA=="}))["header"]["revision"].clone();
        etcd("/v3/kv/compaction", json!({"revision": revision, "physical": true}));
    }

    async fn suffer(outage: Outage) {
        match outage {
            Outage::Killed(seconds) => {
                Self::signal("-KILL");
                sleep(seconds).await;
                Self::up();
            }
            Outage::Stopped(seconds) => {
                Self::signal("-STOP");
                sleep(seconds).await;
                Self::signal("-CONT");
            }
            Outage::Slow(seconds) => {
                let end = Instant::now() + Duration::from_secs_f64(seconds);
                while Instant::now() < end {
                    Self::signal("-STOP");
                    sleep(0.45).await;
                    Self::signal("-CONT");
                    sleep(0.05).await;
                }
            }
            Outage::Expired => {
                Self::compact();
                Self::signal("-KILL");
                Self::up();
            }
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        Self::signal("-CONT");
        Self::up();
    }
}

async fn sleep(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
}

fn seconds(at: Timestamp) -> f64 {
    at.as_duration().as_secs_f64()
}

fn now() -> f64 {
    seconds(Timestamp::now())
}

/// Keeps the logs of agents by hard links, because the kubelet deletes the files with the pods.
fn keep_logs(namespace: &str) -> (PathBuf, Arc<AtomicBool>) {
    let from = PathBuf::from(setting("CACHE")).join("cluster/pod-logs");
    let kept = PathBuf::from(setting("CACHE")).join("cluster/chaos-logs");
    let _ = std::fs::remove_dir_all(&kept);
    std::fs::create_dir_all(&kept).unwrap();
    let (stop, prefix, into) = (Arc::new(AtomicBool::new(false)), format!("{namespace}_"), kept.clone());
    let stopped = stop.clone();
    std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            for pod in std::fs::read_dir(&from).into_iter().flatten().flatten() {
                let name = pod.file_name().into_string().unwrap_or_default();
                let Some(name) = name.strip_prefix(&prefix) else { continue };
                let link = into.join(name);
                if !link.exists() {
                    let _ = std::fs::hard_link(pod.path().join("agent/0.log"), link);
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    (kept, stop)
}

/// Reads what the agents did from their logs, keyed by the UID of the pod.
fn facts(kept: &PathBuf) -> BTreeMap<String, Facts> {
    let mut all = BTreeMap::new();
    for log in std::fs::read_dir(kept).into_iter().flatten().flatten() {
        let name = log.file_name().into_string().unwrap_or_default();
        let mut facts = Facts::default();
        for line in std::fs::read_to_string(log.path()).unwrap_or_default().lines() {
            let words: Vec<_> = line.split(' ').skip(3).collect();
            match words.as_slice() {
                ["start", at] => facts.started = at.parse().ok(),
                ["end", code, at] => facts.ended = code.parse().ok().zip(at.parse().ok()),
                ["ticket"] => facts.ticket = true,
                _ => {}
            }
        }
        if let Some((_, uid)) = name.split_once('_') {
            all.insert(uid.to_owned(), facts);
        }
    }
    all
}

/// Returns the agent's program. It prints when it starts, tries to open a ticket until that works, and prints how it ends as its last line.
fn agent(name: &str, planned: Planned) -> String {
    let code = if planned.ends == Ends::Fails { 3 } else { 0 };
    let call = json!({
        "jsonrpc": "2.0", "id": 1, "method": "tools/call",
        "params": {"name": "open_ticket", "arguments": {"title": name, "severity": "low", "body": "b"}},
    });
    format!(
        r#"
import json, os, sys, time, urllib.request
begun = time.time()
print("start", begun, flush=True)
headers = {{"content-type": "application/json", "accept": "application/json, text/event-stream"}}
until, done = begun + {seconds}, False
while time.time() < until:
    if not done:
        try:
            request = urllib.request.Request(os.environ["BELAY_MCP_URL"], {call:?}.encode(), headers)
            done = b'"isError":true' not in urllib.request.urlopen(request, timeout=max(0.1, until - time.time())).read()
            if done: print("ticket", flush=True)
        except Exception as error:
            print("no ticket:", error, flush=True)
            time.sleep(1)
    time.sleep(max(0, min(0.2, until - time.time())))
print("end", {code}, time.time(), flush=True)
sys.exit({code})
"#,
        seconds = planned.seconds,
        call = call.to_string(),
    )
}

async fn world() -> World {
    let egress = json!([{"host": "tickets.world.test", "uses": ["Tools"], "credentials": [{"secret": "world-ticket-key", "key": "token"}]}]);
    let mut class = class("tickets", "gvisor", egress);
    merge(&mut class, json!({"limits": {"wallTimeSeconds": 600}}));
    let world = World::new("chaos", json!([class])).await;
    let open = ["title", "severity", "body"];
    let closing = json!({"title": "args.title", "why": "'rolled back'"});
    let mut undone =
        json!({"rollback": {"call": {"contract": "close-ticket", "arguments": closing, "withinSeconds": 3600}}});
    merge(&mut undone, json!({"input": {"required": open}}));
    world.kubectl_apply(&ticket_contract("open-ticket", "open_ticket", &open, undone));
    let required = json!({"input": {"required": ["title", "why"]}});
    world.kubectl_apply(&ticket_contract("close-ticket", "close_ticket", &["title", "why"], required));
    world
}

/// Creates a task, with as many tries as it takes. Returns the time at which it existed.
async fn make(world: &World, name: &str, planned: Planned) -> f64 {
    let rollback = if planned.rolls_back { RollbackWhen::OnFailure } else { RollbackWhen::OnRequest };
    let manifest = json!({
        "apiVersion": "belay.dev/v1alpha1", "kind": "AgentTask", "metadata": {"name": name},
        "spec": {
            "objective": "outlive the API server", "workflowClass": "tickets", "principal": "kubernetes-admin",
            "agent": {
                "image": crate::support::agent_image(), "command": ["python3", "-S", "-c"], "args": [agent(name, planned)],
                "resources": {"cpu": "40m", "memory": "64Mi"},
            },
            "tools": ["open-ticket"], "rollback": rollback,
            "limits": {"wallTimeSeconds": WALL as i64, "toolCalls": 40, "tokens": 0},
        },
    });
    loop {
        let api = world.api::<AgentTask>();
        let (parameters, patch) = (PatchParams::apply("e2e"), Patch::Apply(&manifest));
        match tokio::time::timeout(Duration::from_secs(5), api.patch(name, &parameters, &patch)).await {
            Ok(Ok(_)) => return now(),
            Ok(Err(kube::Error::Api(refused))) if (400..500).contains(&refused.code) && refused.code != 429 => {
                panic!("task {name} is refused: {refused}")
            }
            _ => sleep(0.3).await,
        }
    }
}

async fn list(world: &World) -> Option<Vec<AgentTask>> {
    let api = world.api::<AgentTask>();
    let listed = tokio::time::timeout(Duration::from_secs(5), api.list(&Default::default())).await;
    listed.ok()?.ok().map(|list| list.items)
}

fn has_ended(task: &AgentTask) -> bool {
    matches!(phase(task), Some(Phase::Succeeded | Phase::Failed))
}

/// Returns the operator's deletions of pods from the audit log: the pod and the time.
fn deletions(namespace: &str, since: Timestamp) -> Vec<(String, f64)> {
    let log = std::fs::read_to_string(setting("BELAY_AUDIT_LOG")).expect("the API server keeps no audit log");
    let events = log
        .lines()
        .filter(|line| line.contains("\"delete\""))
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    events
        .filter(|event| {
            event["verb"] == "delete"
                && event["objectRef"]["resource"] == "pods"
                && event["objectRef"]["namespace"] == namespace
                && event["user"]["username"].as_str().is_some_and(|user| user.ends_with(":belay-operator"))
                && event["responseStatus"]["code"] == 200
        })
        .filter_map(|event| {
            let at: Timestamp = event["stageTimestamp"].as_str()?.parse().ok()?;
            (at >= since).then(|| (event["objectRef"]["name"].as_str().unwrap_or_default().to_owned(), seconds(at)))
        })
        .collect()
}

/// Returns what is wrong with an attempt's verdict, given what its agent did.
fn judge(attempt: &Attempt, facts: &Facts) -> Option<String> {
    let wrong = |why: &str| {
        Some(format!(
            "attempt {} was judged {:?} {:?}, and {why}: {facts:?}",
            attempt.number, attempt.failure_class, attempt.reason
        ))
    };
    match attempt.failure_class {
        None if attempt.finished_at.is_none() => wrong("has no end"),
        None if !matches!(facts.ended, Some((0, _))) => wrong("its agent did not succeed"),
        None => None,
        Some(_) if facts.succeeded() => wrong("its agent had succeeded in time"),
        Some(FailureClass::Agent)
            if attempt.reason.as_deref() == Some("NonZeroExit")
                && !matches!(facts.ended, Some((code, _)) if code != 0) =>
        {
            wrong("its agent did not end so")
        }
        // A budget failure is wrong only if the agent ended clearly in time.
        Some(FailureClass::Budget)
            if facts.ended.is_some_and(|(_, at)| facts.started.is_some_and(|started| at < started + WALL - NEAR)) =>
        {
            wrong("its agent had ended in time")
        }
        Some(_) => None,
    }
}

#[derive(Default)]
struct Figures {
    tasks: usize,
    outages: usize,
    verdicts: BTreeMap<String, usize>,
    wrong: Vec<String>,
    rolled_back: usize,
    rolled_back_wrongly: Vec<String>,
    not_rolled_back: Vec<String>,
    deleted: usize,
    deleted_early: Vec<String>,
    late: Vec<String>,
    slowest_pod: f64,
    invalid: Vec<String>,
    open: Vec<String>,
}

impl Figures {
    fn print(&self, seed: u64, took: Duration) -> String {
        let mut text = String::new();
        let _ =
            writeln!(text, "chaos: seed {seed}, {} tasks, {} outages, {} s", self.tasks, self.outages, took.as_secs());
        for (verdict, count) in &self.verdicts {
            let _ = writeln!(text, "  {count:4}  {verdict}");
        }
        let _ = writeln!(text, "  {:4}  rollbacks", self.rolled_back);
        let _ = writeln!(text, "  {:4}  pods deleted by the operator", self.deleted);
        let _ = writeln!(text, "  slowest pod of a task made when the API server was back: {:.1} s", self.slowest_pod);
        for (what, wrong) in self.failures() {
            let _ = writeln!(text, "  {:4}  {what}", wrong.len());
            wrong.iter().for_each(|one| {
                let _ = writeln!(text, "          {one}");
            });
        }
        text
    }

    fn failures(&self) -> [(&'static str, &Vec<String>); 7] {
        [
            ("wrong verdicts", &self.wrong),
            ("rollbacks of what had succeeded, or where nobody asked for one", &self.rolled_back_wrongly),
            ("failed tasks that are not rolled back", &self.not_rolled_back),
            ("pods deleted before their end was on record", &self.deleted_early),
            ("pods more than 30 s after the API server's return", &self.late),
            ("logs that do not verify", &self.invalid),
            ("tasks that have not ended", &self.open),
        ]
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_verdict_is_wrong_while_the_api_server_comes_and_goes() {
    let full = std::env::var("BELAY_CHAOS").is_ok_and(|scale| scale == "full");
    let number = |name: &str| {
        std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap_or_else(|_| panic!("{name}: expected a number")))
    };
    let seed = number("BELAY_CHAOS_SEED").unwrap_or_else(|| Timestamp::now().as_millisecond().unsigned_abs());
    let mut random = Random(seed);
    let mut outages = outages(full, &mut random);
    if let Some(most) = number("BELAY_CHAOS_OUTAGES") {
        outages.truncate(usize::try_from(most).unwrap());
    }
    let count =
        number("BELAY_CHAOS_TASKS").map_or(if full { 200 } else { 14 }, |count| usize::try_from(count).unwrap());
    let planned = tasks(count, &mut random);
    let gaps: Vec<f64> = outages.iter().map(|_| random.between(3.0, 22.0)).collect();
    eprintln!("chaos: seed {seed}, {count} tasks, {} outages", outages.len());

    let (begun, since) = (Instant::now(), Timestamp::now());
    let world = world().await;
    let (kept, stop) = keep_logs(&world.namespace);
    let _up = ApiServer;
    let name = |index: usize| format!("t{index}");
    // The index of the next task. Two loops create tasks: `making`, and `suffering` after each outage.
    let next = Arc::new(tokio::sync::Mutex::new(0_usize));
    let mut figures = Figures { tasks: count, outages: outages.len(), ..Figures::default() };
    let done = Arc::new(AtomicBool::new(false));
    let progress = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let total = outages.len();

    let making = async {
        let mut random = Random(seed ^ 1);
        loop {
            sleep(random.between(0.2, 2.0)).await;
            let running = list(&world).await.map(|tasks| tasks.iter().filter(|task| !has_ended(task)).count());
            let outages_over = progress.load(Ordering::Relaxed);
            let due = if done.load(Ordering::Relaxed) { count } else { count * (outages_over + 1) / (total + 1) };
            let mut made = next.lock().await;
            if *made >= count {
                return;
            }
            // If the list fails, the API server is down: a task is created nevertheless, and `make` waits for the API server.
            if *made < due && running.is_none_or(|running| running < AT_A_TIME) {
                let index = *made;
                *made += 1;
                drop(made);
                make(&world, &name(index), planned[index]).await;
            }
        }
    };
    let suffering = async {
        let mut back = Vec::new();
        for (outage, gap) in outages.iter().zip(&gaps) {
            sleep(*gap).await;
            let begun = Instant::now();
            ApiServer::suffer(*outage).await;
            while !matches!(
                tokio::time::timeout(Duration::from_secs(2), world.client.apiserver_version()).await,
                Ok(Ok(_))
            ) {
                sleep(0.1).await;
            }
            let returned = now();
            let mut made = next.lock().await;
            if *made < count {
                let index = *made;
                *made += 1;
                drop(made);
                make(&world, &name(index), planned[index]).await;
                back.push((index, returned, *outage));
            }
            let over = progress.fetch_add(1, Ordering::Relaxed) + 1;
            eprintln!("chaos: {over}/{total} {outage:.1?} over after {:.1} s", begun.elapsed().as_secs_f64());
        }
        done.store(true, Ordering::Relaxed);
        back
    };
    let ((), back) = tokio::join!(making, suffering);

    // All tasks must end, rollbacks included.
    let end = Instant::now() + Duration::from_secs(900);
    let ended = loop {
        let tasks = list(&world).await.unwrap_or_default();
        if tasks.len() >= count && tasks.iter().all(has_ended) || Instant::now() > end {
            break tasks;
        }
        sleep(1.0).await;
    };
    stop.store(true, Ordering::Relaxed);
    let facts = facts(&kept);
    let by_name: BTreeMap<_, _> = ended.iter().map(|task| (task.name_any(), task)).collect();

    for (index, planned) in planned.iter().enumerate() {
        let name = name(index);
        let Some(task) = by_name.get(&name) else {
            figures.open.push(format!("{name} is not there"));
            continue;
        };
        let status = task.status.clone().unwrap_or_default();
        let of = |attempt: &Attempt| facts.get(&attempt.pod_uid).cloned().unwrap_or_default();
        if !has_ended(task) {
            figures.open.push(format!(
                "{name}: {:?} {:?} {:?}",
                status.phase,
                status.reason,
                status.conditions.iter().map(|one| &one.message).collect::<Vec<_>>()
            ));
            continue;
        }
        let verdict = format!("{:?} {}", planned.ends, status.reason.clone().unwrap_or_default());
        *figures.verdicts.entry(verdict).or_default() += 1;
        figures.wrong.extend(
            status
                .attempts
                .iter()
                .filter_map(|attempt| judge(attempt, &of(attempt)))
                .map(|why| format!("{name} ({planned:?}): {why}")),
        );
        let last = status.attempts.last();
        let agrees = match last {
            Some(last) => (last.failure_class.is_none()) == (status.phase == Some(Phase::Succeeded)),
            None => false,
        };
        if !agrees {
            figures.wrong.push(format!(
                "{name}: {:?} {:?} is not what its last attempt says, {last:?}",
                status.phase, status.reason
            ));
        }
        let rolled_back = by_name.get(&format!("{name}-rollback"));
        figures.rolled_back += usize::from(rolled_back.is_some());
        let succeeded =
            status.attempts.iter().any(|attempt| of(attempt).succeeded()) || status.phase == Some(Phase::Succeeded);
        if rolled_back.is_some() && (succeeded || !planned.rolls_back) {
            figures.rolled_back_wrongly.push(format!("{name}: {:?} {:?}", status.phase, status.reason));
        }
        let saw_it_fail = last.is_some_and(|last| of(last).ended.is_some_and(|(code, _)| code != 0) && of(last).ticket);
        if planned.rolls_back && saw_it_fail && rolled_back.is_none() {
            figures.not_rolled_back.push(format!("{name}: {:?} {:?}", status.phase, status.reason));
        }
        let (code, report) = world.verify(&name);
        if code != 0 || report["verdict"] != "VALID" {
            figures.invalid.push(format!("{name}: {code} {}", report["verdict"]));
        }
    }
    for (pod, at) in deletions(&world.namespace, since) {
        figures.deleted += 1;
        let attempts = ended.iter().flat_map(|task| task.status.iter().flat_map(|status| &status.attempts));
        let attempt = attempts.into_iter().find(|attempt| attempt.pod == pod);
        let on_record = attempt
            .and_then(|attempt| attempt.finished_at.as_ref())
            .is_some_and(|finished| seconds(finished.0) <= at + 1.0);
        if !on_record {
            figures.deleted_early.push(format!("{pod} at {at:.1}: {attempt:?}"));
        }
    }
    for (index, returned, outage) in back {
        let task = by_name.get(&name(index));
        let first = task.and_then(|task| task.status.as_ref()?.attempts.first()?.started_at.clone());
        let took = first.map_or(f64::INFINITY, |first| (seconds(first.0) - returned).max(0.0));
        figures.slowest_pod = figures.slowest_pod.max(took);
        if took > BACK_WITHIN {
            figures.late.push(format!("{} after {outage:?}: {took:.1} s", name(index)));
        }
    }
    let text = figures.print(seed, begun.elapsed());
    eprintln!("{text}");
    let failed: Vec<_> =
        figures.failures().into_iter().filter(|(_, wrong)| !wrong.is_empty()).map(|(what, _)| what).collect();
    assert!(failed.is_empty(), "{failed:?}; BELAY_CHAOS_SEED={seed}\n{text}");
    world.clean().await;
}
