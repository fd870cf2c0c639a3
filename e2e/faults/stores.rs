//! A store that denies, is busy, full, slow, silent or gone, or does not acknowledge what it stored: calls wait for it, and continue when
//! it is back.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use belay::{
    ends::AttemptEnd,
    evidence::{log::Log, store::log_prefix},
};
use bytes::Bytes;
use serde_json::json;
use tokio::time::Instant;

use super::{
    alone::once,
    api,
    judge::judge,
    relay::{Fault, Moment},
    world::{Setting, Told, World},
};

/// The length of an outage. It is longer than the SDK retries.
const OUTAGE: Duration = Duration::from_secs(4);
/// The time between two polls of what takes minutes.
const LOOK: Duration = Duration::from_secs(1);
/// The number of faults of a store that fails at random.
const FAULTS: u64 = 25;

/// Checks that a call with a side effect waits while the store is away, and leaves when it is back.
async fn waits(world: &World, breaks: impl FnOnce(&World), heals: impl FnOnce(&World)) {
    world.insist("note").await;
    breaks(world);
    let before = world.effects.count("note");
    let healing = async {
        tokio::time::sleep(OUTAGE).await;
        let meanwhile = world.effects.count("note");
        heals(world);
        meanwhile
    };
    let call = world.call("note", json!({"n": world.n()}));
    let (told, meanwhile) = tokio::join!(call, healing);
    assert_eq!(meanwhile, before, "a call left while its intent lay nowhere");
    assert!(matches!(told, Told::Result(_)), "{told:?}");
    world.work().await;
    judge(world).await;
}

#[rstest::rstest]
#[case::denies(Fault::Status(403))]
#[case::is_busy(Fault::Status(503))]
#[case::fails(Fault::Status(500))]
#[case::is_full(Fault::Status(507))]
#[case::is_silent(Fault::Silence)]
#[case::is_cut_off(Fault::Broken(Moment::Before))]
#[case::says_nothing(Fault::Broken(Moment::After))]
fn calls_wait_for_a_store_that(#[case] fault: Fault) {
    once(async || {
        let world = World::begun().await;
        let breaks = |world: &World| world.store.plan(move |_| Some(fault.clone()));
        waits(&world, breaks, |world| world.store.heal()).await;
    });
}

#[test]
fn calls_wait_for_a_store_that_is_gone() {
    once(async || {
        let world = World::begun().await;
        waits(&world, |world| world.s3.stop(), |world| world.s3.keep()).await;
    });
}

#[test]
fn a_store_may_be_reached_as_aws_is() {
    once(async || {
        let world = World::new(Setting { as_aws: true, ..Setting::default() }).await;
        world.begin();
        world.work().await;
        judge(&world).await;
    });
}

#[test]
fn calls_are_as_slow_as_the_store() {
    once(async || {
        let world = World::begun().await;
        world.insist("note").await;
        world.store.plan(|asked| (asked.method == http::Method::PUT).then_some(Fault::Slow(Duration::from_secs(1))));
        world.work().await;
        judge(&world).await;
    });
}

/// The call waits for a minute. Then it is denied, and certainly has no effect. When the store is back, the task continues.
#[test]
fn a_call_is_denied_while_the_store_is_gone_for_long() {
    once(async || {
        let world = World::begun().await;
        world.insist("note").await;
        world.s3.stop();
        let (note, pay) = (json!({"n": world.n()}), json!({"order": "1"}));
        let (note, pay) = tokio::join!(world.call("note", note), world.call("pay", pay));
        for told in [note, pay] {
            assert!(matches!(&told, Told::Refused(rule, _) if rule == "evidence.unavailable"), "{told:?}");
        }
        assert_eq!((world.effects.count("note"), world.effects.count("pay")), (1, 0));
        world.s3.keep();
        world.work().await;
        judge(&world).await;
    });
}

/// After two minutes the harness gives up the attempt and says so by its exit code. If it is restarted, it does not serve. When the store
/// is back, the harness stores the records that it had written down, with the attempt's end.
#[test]
fn an_attempt_is_given_up_while_the_store_is_gone_for_longer() {
    once(async || {
        let world = World::begun().await;
        world.insist("note").await;
        world.s3.stop();
        world.call("note", json!({"n": world.n()})).await;
        let started = Instant::now();
        while !world.harness.has_ended_with(AttemptEnd::Parked.exit_code()) {
            assert!(started.elapsed() < Duration::from_secs(180), "{}", world.harness.said());
            tokio::time::sleep(LOOK).await;
        }
        assert_eq!(world.effects.count("note"), 1);
        world.s3.keep();
        let prefix = log_prefix(None, "team", "t", api::UID);
        let is_parked = |(_, object): (&str, &Bytes)| String::from_utf8_lossy(object).contains(r#""reason":"parked""#);
        let started = Instant::now();
        while !Log::read(&world.bucket(api::EVIDENCE).await, &prefix, true).await.unwrap().objects().any(is_parked) {
            assert!(started.elapsed() < Duration::from_secs(180), "{}", world.harness.said());
            tokio::time::sleep(LOOK).await;
        }
        judge(&world).await;
    });
}

/// Any request can have any fault at random, and both processes can be killed. There are at most [`FAULTS`] faults, because otherwise a
/// gateway that reads the log again from its start would never come to the end.
#[rstest::rstest]
fn a_store_that_fails_at_random(#[values(1, 2)] seed: u64) {
    once(async || {
        let world = World::begun().await;
        let (gateway, harness) = (world.gateway.clone(), world.harness.clone());
        let (state, faults) = (AtomicU64::new(seed), AtomicU64::new(0));
        world.store.plan(move |_| {
            let fault = match random(&state) % 100 {
                0 => Fault::Killed(Moment::Before, vec![gateway.clone()]),
                1 => Fault::Killed(Moment::After, vec![gateway.clone()]),
                2 => Fault::Killed(Moment::After, vec![harness.clone()]),
                3..7 => Fault::Status(503),
                7..10 => Fault::Status(403),
                10..13 => Fault::Broken(Moment::Before),
                13..16 => Fault::Broken(Moment::After),
                16..20 => Fault::Slow(Duration::from_millis(300)),
                _ => return None,
            };
            (faults.fetch_add(1, Ordering::SeqCst) < FAULTS).then_some(fault)
        });
        for _ in 0..3 {
            world.work().await;
        }
        world.store.heal();
        judge(&world).await;
    });
}

/// Returns a random number by xorshift64: the same seed gives the same faults.
fn random(state: &AtomicU64) -> u64 {
    let step = |mut x: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^ (x << 17)
    };
    let next = state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |x| Some(step(x)));
    // Two more steps, because the first values are as small as the seed.
    step(step(next.unwrap_or_default())) >> 20
}
