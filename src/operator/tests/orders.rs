//! Random orders of events: an agent that ends before, at or after its wall time, or never; a harness that closes its log or cannot; an API
//! server that is unavailable, and kubelets that report late what happened in the meantime; watches that stay stale; pods that are deleted
//! and evicted; reads that fail; operators that are restarted; nodes with different clocks. In every order, the sealed end is the real end,
//! or it is `Unknown`.
//!
//! This module tests the reconciler's decisions and its view of the state. [`reconciler`] tests the whole reconciler, with its requests and
//! watches. Without live reads, both must fail. Otherwise the simulation is too easy.

use std::collections::BTreeSet;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use crate::{
    api::agent_task::{Attempt, Retry},
    ends::FailureClass,
    evidence::record::TaskClosed,
    lifecycle::{
        decide::{self, Decision, Next, Observed, Unread},
        observe::{self, PodView},
    },
    operator::reconcile::Seen,
    render::names,
};

mod reconciler;

/// The wall time of the agent, in seconds.
const WALL: i64 = 60;
/// The longest duration of an order, in seconds.
const HORIZON: i64 = 3000;

/// SplitMix64. The same seed gives the same order.
struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn range(&mut self, from: i64, to: i64) -> i64 {
        from + i64::try_from(self.next() % u64::try_from(to - from + 1).unwrap()).unwrap()
    }

    fn percent(&mut self, chance: i64) -> bool {
        self.range(0, 99) < chance
    }
}

/// How an agent really ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Truth {
    /// The agent ended on its own.
    Ended { code: i64 },
    /// The agent was stopped because its wall time was over.
    OutOfTime,
    /// The agent was stopped from outside before that.
    Stopped,
}

#[derive(Clone, Debug)]
struct SimPod {
    pub number: i64,
    pub uid: String,
    made: i64,
    start: i64,
    length: i64,
    code: i64,
    /// The exit code if it is stopped.
    code_stopped: i64,
    stop_takes: i64,
    harness_works: bool,
    log_works: bool,
    evicted_at: Option<i64>,
    deleted_at: Option<i64>,
    clock: i64,
    /// The real state.
    started: bool,
    pub truth: Option<(Truth, i64, i64)>,
    harness_exit: bool,
    /// How and when the log of the pod was closed.
    pub log: Option<(&'static str, i64)>,
    deadline_hit: bool,
    /// When its deletion was requested.
    asked: Option<i64>,
    evicting: bool,
    /// When the kubelet can report its unreported changes.
    untold: Option<i64>,
    /// The pod as the API server shows it.
    pub shown: Value,
    gone_at: Option<i64>,
    pub gone: bool,
}

struct World {
    pub now: i64,
    pub random: Random,
    outages: Vec<(i64, i64)>,
    /// Periods in which the caches show nothing new.
    blind: Vec<(i64, i64)>,
    restarts: Vec<i64>,
    pub deleted_at: Option<i64>,
    pub pods: Vec<SimPod>,
    /// Whether nothing disturbs the task.
    pub calm: bool,
}

fn time(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let calm = random.percent(10);
        let (mut outages, mut blind) = (Vec::new(), Vec::new());
        for _ in 0..if calm { 0 } else { random.range(0, 3) } {
            let from = random.range(1, 150);
            let until = from + random.range(2, 180);
            outages.push((from, until));
            blind.push((from, until + random.range(0, 270)));
        }
        let restarts = (0..if calm { 0 } else { random.range(0, 2) }).map(|_| random.range(1, 300)).collect();
        let deleted_at = (!calm && random.percent(8)).then(|| random.range(5, 200));
        Self { now: 0, random, outages, blind, restarts, deleted_at, pods: vec![], calm }
    }

    fn away(&self) -> bool {
        self.outages.iter().any(|(from, until)| (*from..*until).contains(&self.now))
    }

    fn blind(&self) -> bool {
        self.away() || self.blind.iter().any(|(from, until)| (*from..*until).contains(&self.now))
    }

    fn restarts(&self) -> bool {
        self.restarts.contains(&self.now)
    }

    /// Creates the pod of an attempt, as the operator requested.
    fn make(&mut self, number: i64) {
        let (calm, random) = (self.calm, &mut self.random);
        let length = match random.range(0, 9) {
            0..=2 => random.range(1, WALL - 10),
            3..=6 => random.range(WALL - 5, WALL + 8),
            7 => random.range(WALL, WALL + 100),
            _ => 1_000_000,
        };
        let start = random.range(1, 5);
        let clock = if calm || random.percent(70) { 0 } else { random.range(-40, 40) };
        let pod = SimPod {
            number,
            uid: format!("uid-{number}"),
            made: self.now,
            start,
            length,
            code: if random.percent(70) { 0 } else { 7 },
            code_stopped: if random.percent(40) { 0 } else { 143 },
            stop_takes: random.range(0, 8),
            harness_works: calm || random.percent(75),
            log_works: calm || random.percent(80),
            evicted_at: (!calm && random.percent(8)).then(|| self.now + random.range(5, 80)),
            deleted_at: (!calm && random.percent(8)).then(|| self.now + random.range(1, 120)),
            clock,
            started: false,
            truth: None,
            harness_exit: false,
            log: None,
            deadline_hit: false,
            asked: None,
            evicting: false,
            untold: None,
            shown: json!(null),
            gone_at: None,
            gone: false,
        };
        self.pods.push(SimPod { shown: pod.show(false), ..pod });
    }

    /// Handles a request to delete a pod.
    fn delete(&mut self, uid: &str) {
        let now = self.now;
        if let Some(pod) = self.pods.iter_mut().find(|pod| pod.uid == uid && !pod.gone && pod.asked.is_none()) {
            pod.asked = Some(now);
            // The object shows the deletion at once, whatever its kubelet has reported.
            pod.shown["metadata"]["deletionTimestamp"] = json!(time(now + 30).to_string());
            pod.shown["metadata"]["deletionGracePeriodSeconds"] = json!(30);
        }
    }

    /// Advances the simulation by one second.
    fn tick(&mut self) {
        self.now += 1;
        let (now, away) = (self.now, self.away());
        let returned = self.outages.iter().any(|(_, until)| now - until < 25 && now >= *until);
        let mut asked = Vec::new();
        for pod in &mut self.pods {
            if pod.gone {
                continue;
            }
            let random = &mut self.random;
            let mut changed = false;
            if !pod.started && now >= pod.made + pod.start {
                if pod.asked.is_some() {
                    pod.truth = Some((Truth::Stopped, now, pod.code_stopped));
                }
                (pod.started, changed) = (pod.asked.is_none(), true);
            }
            let began = pod.made + pod.start;
            if pod.started && pod.truth.is_none() {
                if pod.evicted_at.is_some_and(|at| now >= at) && !away && pod.asked.is_none() {
                    pod.evicting = true;
                    asked.push(pod.uid.clone());
                }
                if pod.deleted_at.is_some_and(|at| now >= at) && !away && pod.asked.is_none() {
                    asked.push(pod.uid.clone());
                }
                let kubelet_stops = now >= began + WALL + 300;
                pod.deadline_hit |= kubelet_stops;
                let stopped = pod.asked.is_some_and(|at| now >= at + pod.stop_takes) || kubelet_stops;
                // An agent that ends on its own ends before it is stopped.
                if now >= began + pod.length && pod.asked.is_none_or(|at| began + pod.length < at) {
                    pod.truth = Some((Truth::Ended { code: pod.code }, began + pod.length, pod.code));
                } else if stopped {
                    let out = pod.asked.map_or(now, |at| at) >= began + WALL;
                    pod.truth = Some((if out { Truth::OutOfTime } else { Truth::Stopped }, now, pod.code_stopped));
                }
                if pod.truth.is_none() && pod.harness_works && !pod.harness_exit && now >= began + WALL {
                    pod.harness_exit = true;
                    pod.log = pod.log_works.then_some(("wallTime", now));
                    changed = true;
                }
                if let Some((_, at, _)) = pod.truth {
                    if pod.log.is_none() && pod.harness_works && pod.log_works {
                        pod.log = Some(("terminated", at));
                    }
                    changed = true;
                }
            }
            if changed {
                pod.untold = Some(now + random.range(0, 3));
            }
            // A kubelet that was cut off reports within some seconds of the API server's return.
            if pod.untold.is_some_and(|at| now >= at) && !away && (!returned || random.percent(12)) {
                pod.untold = None;
                pod.shown = pod.show(true);
                if pod.truth.is_some() && pod.asked.is_some() {
                    pod.gone_at = Some(now + random.range(1, 2));
                }
            }
            if pod.truth.is_some() && pod.asked.is_some() && pod.untold.is_none() && pod.gone_at.is_none() && !away {
                pod.gone_at = Some(now + 1);
            }
            pod.gone = pod.gone_at.is_some_and(|at| now >= at) && !away;
        }
        asked.into_iter().for_each(|uid| self.delete(&uid));
        for pod in self.pods.iter_mut().filter(|pod| pod.evicting && !pod.gone) {
            pod.shown["status"]["conditions"] =
                json!([{ "type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI" }]);
        }
    }

    /// Returns how the task really ended, by its last attempt.
    fn truth(&self) -> Option<Truth> {
        self.pods.last().and_then(|pod| pod.truth).map(|(truth, ..)| truth)
    }
}

impl SimPod {
    /// Returns the pod as its kubelet reports it, by the node's clock.
    fn show(&self, taken: bool) -> Value {
        let by_node = |at: i64| time(at + self.clock).to_string();
        let began = self.made + self.start;
        let mut status = json!({ "phase": "Pending" });
        let container = |name: &str, state: Value| json!({ "name": name, "image": "i", "imageID": "i", "ready": false, "restartCount": 0, "state": state });
        if taken {
            status["startTime"] = json!(by_node(self.made));
        }
        if self.started {
            status["phase"] = json!("Running");
            let agent = match self.truth {
                None => json!({ "running": { "startedAt": by_node(began) } }),
                Some((_, at, code)) => {
                    status["phase"] = json!(if code == 0 && !self.deadline_hit { "Succeeded" } else { "Failed" });
                    json!({ "terminated": { "exitCode": code, "reason": "x", "startedAt": by_node(began), "finishedAt": by_node(at) } })
                }
            };
            if self.deadline_hit {
                status["reason"] = json!("DeadlineExceeded");
            }
            status["containerStatuses"] = json!([container(names::AGENT, agent)]);
            let harness = match self.harness_exit {
                true => json!({ "terminated": { "exitCode": 44 } }),
                false => json!({ "running": {} }),
            };
            let probe = container(names::PROBE, json!({ "terminated": { "exitCode": 0 } }));
            status["initContainerStatuses"] = json!([probe, container(names::HARNESS, harness)]);
        } else if self.truth.is_some() {
            status["phase"] = json!("Failed");
        }
        if self.evicting {
            status["conditions"] =
                json!([{ "type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI" }]);
        }
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": format!("triage-{}", self.number), "namespace": "team-a", "uid": self.uid,
                "creationTimestamp": time(self.made).to_string(),
                "labels": { names::ATTEMPT: self.number.to_string(), names::TASK_UID: "5d0e9c1a-0000-4000-8000-000000000001", names::MANAGED_BY: names::MANAGER },
            },
            "spec": { "containers": [], "activeDeadlineSeconds": WALL + 300 },
            "status": status,
        });
        if let Some(asked) = self.asked {
            pod["metadata"]["deletionTimestamp"] = json!(time(asked + 30).to_string());
            pod["metadata"]["deletionGracePeriodSeconds"] = json!(30);
        }
        pod
    }

    fn view(&self) -> PodView {
        observe::pod(&serde_json::from_value::<Pod>(self.shown.clone()).unwrap()).unwrap()
    }
}

/// The result of an order.
#[derive(Debug, Default)]
struct Told {
    pub sealed: Option<TaskClosed>,
    pub rolled_back: bool,
    /// The number of pods that the operator deleted although they had ended and their end was not recorded.
    pub early: u32,
    pub seconds: i64,
}

/// Checks the result of an order.
fn judge(world: &World, told: &Told) -> Result<(), String> {
    let Some(sealed) = &told.sealed else {
        return if told.seconds < HORIZON { Ok(()) } else { Err("never sealed".to_owned()) };
    };
    let truth = world.truth();
    let well = world.pods.iter().any(|pod| matches!(pod.truth, Some((Truth::Ended { code: 0 }, ..))));
    let last_well = truth == Some(Truth::Ended { code: 0 });
    let known = sealed.class() != Some(FailureClass::Unknown);
    let right = match (sealed.phase.as_str(), sealed.failure_class.as_str()) {
        ("Succeeded", _) => well,
        (_, "Unknown" | "Cancelled") => true,
        // An agent whose time was over before it ended on its own is out of time, even if it ended before it was stopped.
        (_, "Budget") => match truth {
            Some(Truth::OutOfTime) => true,
            // The agent was being stopped for another reason when its harness saw that the time was over.
            Some(Truth::Stopped) => world.pods.last().is_some_and(|pod| {
                let ran = pod.truth.is_some_and(|(_, until, _)| until - (pod.made + pod.start) >= WALL);
                pod.harness_exit && ran
            }),
            Some(Truth::Ended { .. }) => world.pods.last().is_some_and(|pod| pod.length >= WALL || pod.harness_exit),
            _ => false,
        },
        (_, "Agent") => matches!(truth, Some(Truth::Ended { code: 7 })),
        (_, "Infrastructure") => !last_well,
        _ => false,
    };
    if !right {
        return Err(format!("sealed {} {} {}, was {truth:?}", sealed.phase, sealed.failure_class, sealed.reason));
    }
    if told.rolled_back && (last_well && !matches!(sealed.failure_class.as_str(), "Budget") || !known) {
        return Err(format!("rolled back what was {truth:?}, sealed {} {}", sealed.failure_class, sealed.reason));
    }
    if world.calm && !known {
        return Err("nothing happened to it, and it is not known how it ended".to_owned());
    }
    if told.early > 0 {
        return Err("a pod was deleted whose end had been told and was not recorded".to_owned());
    }
    Ok(())
}

/// Returns the end that the witness seals.
fn seal(world: &World, attempt: i64, closed: TaskClosed, presumed: bool) -> TaskClosed {
    let pod = world.pods.iter().find(|pod| pod.number == attempt);
    let log = pod.and_then(|pod| pod.log);
    let over = pod.zip(log).is_some_and(|(pod, (_, at))| at - (pod.made + pod.start) >= WALL);
    closed.borne_out(presumed, pod.is_some_and(|pod| pod.started), log.map(|(reason, _)| reason), over)
}

/// Runs the reconciler's decisions alone, on the state that it would have observed.
fn decisions(seed: u64, believes_caches: bool) -> (World, Told) {
    let mut world = World::new(seed);
    let mut told = Told::default();
    let (mut history, mut failures): (Vec<Attempt>, _) = (vec![], std::collections::BTreeMap::new());
    let retry = Retry { agent: i64::from(world.random.percent(30)), infrastructure: world.random.range(0, 2) };
    let (mut cached, mut gone): (Vec<PodView>, Option<PodView>) = (vec![], None);
    let mut made: Option<(PodView, i64)> = None;
    let (mut again, mut in_touch, mut broken) = (0, -1000, false);
    let notices = world.random.percent(85);
    while world.now < HORIZON {
        world.tick();
        let (now, away) = (world.now, world.away());
        told.seconds = now;
        // Most operators notice the failure of a watch.
        if away && notices {
            broken = true;
        } else if broken && !away {
            (broken, in_touch) = (false, now);
        }
        let mut news = false;
        if !world.blind() {
            let fresh: Vec<_> = world.pods.iter().filter(|pod| !pod.gone).map(SimPod::view).collect();
            news = fresh != cached;
            for was in cached.iter().filter(|was| fresh.iter().all(|pod| pod.uid != was.uid)) {
                // A watch that was not stale reports the last status of a deleted pod.
                let last = world.pods.iter().find(|pod| pod.uid == was.uid).map(SimPod::view);
                gone = last.filter(|last| last.terminal).map(|last| PodView { live: true, ..last }).or(gone);
            }
            cached = fresh;
        }
        if world.restarts() {
            (made, gone, again) = (None, None, now);
            if !notices {
                in_touch = now;
            }
        }
        made = made.filter(|(pod, at)| now - at < 10 && cached.iter().all(|known| known.uid != pod.uid));
        let deleting = world.deleted_at.is_some_and(|at| now >= at) && !world.blind();
        if !news && now < again && !world.random.percent(3) {
            continue;
        }
        // One reconciliation.
        let mut pods = cached.clone();
        for pod in made.iter().map(|(pod, _)| pod).chain(&gone) {
            if pods.iter().all(|known| known.uid != pod.uid) {
                pods.push(pod.clone());
            }
        }
        if believes_caches {
            pods.iter_mut().for_each(|pod| pod.live = true);
        }
        let mut seen = Seen { pods, claims: vec![], looked_up: BTreeSet::new(), live: believes_caches };
        seen.claims = world.pods.iter().map(|pod| pod.number).collect();
        let fails = |world: &mut World| world.away() || world.random.percent(if world.calm { 0 } else { 5 });
        let mut deleted = deleting;
        let decision = loop {
            let since = if believes_caches {
                -1000
            } else if broken {
                now
            } else {
                in_touch
            };
            let decision = decide::decide(&Observed {
                uid: "u",
                deleting: deleted,
                finalizer: true,
                phase: None,
                sealed: false,
                live: seen.live,
                rolls_back: true,
                retry: &retry,
                wall_time_seconds: WALL,
                history: &history,
                failures: &failures,
                pods: &seen.pods,
                claims: &seen.claims,
                reusable: None,
                looked_up: &seen.looked_up,
                in_touch_since: time(since),
                now: time(now),
            });
            let Next::Confirm(unread) = decision.next else { break Some(decision) };
            if fails(&mut world) {
                break None;
            }
            match unread {
                Unread::Task => {
                    (seen.live, deleted) = (true, world.deleted_at.is_some_and(|at| now >= at));
                }
                Unread::Pod(number) => {
                    assert!(!seen.looked_up.contains(&number), "asked twice");
                    let live = world.pods.iter().find(|pod| pod.number == number && !pod.gone).map(SimPod::view);
                    seen.look_up(number, live);
                }
            }
        };
        again = now + 10;
        let Some(Decision { attempts, failures: counted, next }) = decision else { continue };
        let mut record = |world: &mut World| {
            let failed = fails(world);
            if !failed {
                (history, failures) = (attempts.clone(), counted.clone());
                if believes_caches {
                    history.iter_mut().for_each(|attempt| attempt.presumed = false);
                }
            }
            !failed
        };
        match next {
            Next::Run { until, .. } => {
                record(&mut world);
                again = until
                    .map_or(now + 600, |until| until.duration_since(time(0)).as_secs().max(now + 1))
                    .min(now + 600);
            }
            Next::Pause(until) => {
                record(&mut world);
                again = until.duration_since(time(0)).as_secs().max(now + 1);
            }
            Next::Start(number) => {
                if record(&mut world) && !fails(&mut world) {
                    world.make(number);
                    made = world.pods.last().map(|pod| (pod.view(), now));
                }
            }
            Next::EndPods(untold) => {
                if deleted || record(&mut world) {
                    for (uid, _) in untold {
                        let pod = world.pods.iter().find(|pod| pod.uid == uid && !pod.gone);
                        // The API server already knew that this pod had ended.
                        told.early += u32::from(!deleted && pod.is_some_and(|pod| pod.view().terminal));
                        world.delete(&uid);
                    }
                }
            }
            Next::Seal { attempt, closed, presumed } => {
                let sealed = seal(&world, attempt, closed, presumed && !believes_caches);
                told.rolled_back = sealed.has_failed() && !deleted;
                told.sealed = Some(sealed);
                break;
            }
            Next::Release | Next::Nothing => break,
            Next::Confirm(_) => unreachable!(),
        }
    }
    (world, told)
}

fn orders(default: u64) -> u64 {
    std::env::var("BELAY_ORDERS").ok().and_then(|orders| orders.parse().ok()).unwrap_or(default)
}

#[test]
fn no_order_of_events_makes_a_verdict_a_guess() {
    let orders = orders(2_000);
    let (mut unknown, mut sealed) = (0_u64, 0_u64);
    let mut ends = std::collections::BTreeMap::<String, u64>::new();
    for seed in 0..orders {
        let (world, told) = decisions(seed, false);
        if let Err(wrong) = judge(&world, &told) {
            panic!("order {seed}: {wrong}\n{told:?}\n{:#?}\noutages {:?}", world.pods, world.outages);
        }
        if let Some(closed) = &told.sealed {
            sealed += 1;
            unknown += u64::from(closed.class() == Some(FailureClass::Unknown));
            *ends.entry(format!("{} {}", closed.failure_class, closed.reason)).or_default() += 1;
        }
    }
    // The operator must not reach this by reporting `Unknown` too often.
    assert!(unknown * 20 < sealed, "{unknown} of {sealed} are not known: {ends:?}");
    for end in [" AgentSucceeded", "Budget DeadlineExceeded", "Agent NonZeroExit"] {
        assert!(ends.get(end).is_some_and(|count| count * 100 > orders), "{end}: {ends:?}");
    }
}

/// The control: an operator that trusts its memory instead of reads fails in this simulation.
#[test]
fn whoever_believes_caches_guesses() {
    let wrong: Vec<_> = (0..3000)
        .filter_map(|seed| {
            let (world, told) = decisions(seed, true);
            judge(&world, &told).err().map(|wrong| (seed, wrong, told.rolled_back))
        })
        .collect();
    assert!(wrong.len() > 30, "{} of 3000: {wrong:?}", wrong.len());
    assert!(wrong.iter().any(|(_, wrong, back)| *back && wrong.contains("Ended { code: 0 }")), "{wrong:?}");
}
