use std::collections::VecDeque;

use parking_lot::Mutex;
use serde_json::json;

use super::*;
use crate::{
    evidence::record::{Channel, Event},
    harness::gate::{Call, tests::gate_followed_by},
    policy::{
        budget::Spent,
        config::{Limits, SideEffect},
        decide::{Denial, tests::policy},
        rule::Rule,
    },
};

const QUICK: Timing = Timing {
    rounds: 2,
    floor: Duration::from_millis(20),
    answer: Duration::from_millis(200),
    patience: Duration::from_millis(200),
};

async fn listener() -> (tokio::net::TcpListener, String) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

#[tokio::test]
async fn both_controls_must_hold() {
    let (_open, open) = listener().await;
    let (closed_listener, closed) = listener().await;
    drop(closed_listener);
    for (reachable, unreachable, contained) in [
        (&open, vec![closed.clone()], true),
        (&open, vec![closed.clone(), open.clone()], false),
        (&closed, vec![closed.clone()], false),
        (&open, vec![], false),
    ] {
        let targets = Targets { reachable: reachable.clone(), unreachable };
        let seen = run(&targets, QUICK).await;
        assert_eq!(seen.contained, contained, "{seen:?}");
        assert_eq!(seen.breaches.is_empty(), contained, "{seen:?}");
    }
}

/// A probe that finds what a test says, and then that the pod is contained.
#[derive(Default)]
struct Scripted {
    finds: Mutex<VecDeque<bool>>,
    looks: Mutex<Vec<(Instant, Timing)>>,
}

impl Scripted {
    fn of(finds: &[bool]) -> Arc<Self> {
        Arc::new(Self { finds: Mutex::new(finds.iter().copied().collect()), looks: Mutex::default() })
    }

    /// Returns the times between the probes.
    fn pauses(&self) -> Vec<Duration> {
        self.looks.lock().windows(2).map(|pair| pair[1].0 - pair[0].0).collect()
    }
}

impl Looking for Scripted {
    fn look(&self, timing: Timing) -> BoxFuture<'_, Containment> {
        self.looks.lock().push((Instant::now(), timing));
        let contained = self.finds.lock().pop_front().unwrap_or(true);
        let breaches = if contained { vec![] } else { vec!["10.96.0.1:443 answered, and must not".into()] };
        let (reachable, unreachable) = ("gateway".into(), vec!["10.96.0.1:443".into()]);
        Box::pin(std::future::ready(Containment { contained, rounds: 1, millis: 1, reachable, unreachable, breaches }))
    }
}

/// The records of a gate: the kind of each, and for `containment.checked` whether the pod was contained.
type Records = Arc<Mutex<Vec<(&'static str, Option<bool>)>>>;

fn gate() -> (Arc<Gate>, Records) {
    let records = Records::default();
    let written = records.clone();
    let mut policy = policy(vec![SideEffect::Write]);
    policy.limits = Limits { wall_time_seconds: 1 << 20, ..policy.limits };
    let gate = gate_followed_by(
        policy,
        Box::new(move |record, _| {
            let contained = match &record.event {
                Event::ContainmentChecked(seen) => Some(seen.contained),
                _ => None,
            };
            written.lock().push((record.event.kind(), contained));
        }),
    );
    (gate, records)
}

/// Tries a connection to an egress host.
async fn call(gate: &Arc<Gate>) -> Result<(), Denial> {
    let call = Call {
        channel: Channel::Egress,
        target: "docs.test:443".into(),
        side_effect: None,
        definition: None,
        request_commitment: None,
        request_bytes: 0,
        key: None,
        approvals: vec![],
        reasons: vec![],
        compensates: None,
        judged: None,
        rules: vec![Rule::EgressHost, Rule::EgressPort],
        model: None,
        reserve: Spent::default(),
    };
    gate.permit(call).await.map(drop)
}

#[tokio::test(start_paused = true)]
async fn it_repeats_at_random_times_and_each_time_is_recorded() {
    let (gate, records) = gate();
    let probe = Scripted::of(&[]);
    let repeats = tokio::spawn(repeat(gate.clone(), probe.clone()));
    tokio::time::sleep(Duration::from_secs(4 * 3600)).await;
    repeats.abort();
    let pauses = probe.pauses();
    // Four hours of pauses of 20 s to 60 s.
    assert!((239..720).contains(&pauses.len()), "{}", pauses.len());
    let seconds = |from, to| Duration::from_secs(from)..=Duration::from_secs(to);
    assert!(pauses.iter().all(|pause| seconds(20, 60).contains(pause)), "{pauses:?}");
    // An agent cannot predict the next one: each quarter of the range occurs, whatever the pause before it was.
    for (from, to) in [(20, 30), (30, 40), (40, 50), (50, 60)] {
        assert!(pauses.iter().any(|pause| seconds(from, to).contains(pause)), "none of {from} s to {to} s");
    }
    let after_short =
        || pauses.windows(2).filter(|pair| seconds(20, 30).contains(&pair[0])).map(|pair| pair[1].as_secs());
    assert!(after_short().any(|pause| pause < 40) && after_short().any(|pause| pause >= 40), "{pauses:?}");
    let checked = records.lock().iter().filter(|(kind, _)| *kind == "containment.checked").count();
    assert_eq!(checked, probe.looks.lock().len());
    call(&gate).await.unwrap();
}

/// One failure may be a restart of the gateway. The second one counts.
#[tokio::test(start_paused = true)]
async fn a_loss_that_is_seen_twice_denies_every_call_for_good() {
    let (gate, records) = gate();
    // Contained; a failure that passes; a loss.
    let probe = Scripted::of(&[true, false, true, false, false]);
    let repeats = tokio::spawn(repeat(gate.clone(), probe.clone()));
    let mut over = Box::pin(gate.over());
    let checks = || records.lock().iter().filter_map(|(_, contained)| *contained).collect::<Vec<_>>();
    while checks().len() < 2 {
        call(&gate).await.unwrap();
        gate.decide("open_ticket", json!({"title": "a"}), 13).await.verdict.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(checks(), [true, true], "a failure that passes is recorded as what was found in the end");
    assert!(futures::poll!(&mut over).is_pending());

    // What waits for the end of the attempt, such as a model call, is told at once.
    tokio::time::timeout(Duration::from_secs(600), over).await.expect("a loss ends nothing");
    assert_eq!(checks(), [true, true, false]);
    let intents = records.lock().iter().filter(|(kind, _)| *kind == "call.intent").count();
    let patience: Vec<_> = probe.looks.lock().iter().map(|(_, timing)| timing.patience.as_secs()).collect();
    assert_eq!(patience, [1, 1, 10, 1, 10], "the second look is a longer one");
    // It stays so, though later probes find the pod contained.
    for _ in 0..10 {
        let denial = call(&gate).await.unwrap_err();
        assert_eq!(denial.rule, Rule::ContainmentLost);
        assert!(denial.reason.contains("10.96.0.1:443 answered"), "{}", denial.reason);
        let denial = gate.decide("open_ticket", json!({"title": "a"}), 13).await.verdict.unwrap_err();
        assert_eq!(denial.rule, Rule::ContainmentLost);
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    repeats.abort();
    assert!(checks().len() > 3 && checks()[3..].iter().all(|contained| *contained), "{:?}", checks());
    assert_eq!(records.lock().iter().filter(|(kind, _)| *kind == "call.intent").count(), intents);
}
