//! SIGKILL at each step that something is persisted in, while an agent works, and at every other request between them.

use http::Method;

use super::{
    alone::each,
    judge::judge,
    relay::{Exchange, Fault, Moment},
    world::{Setting, World},
};

/// The agent works, the task ends, and all holds; says whether anybody was killed in the meantime.
async fn ends_well(world: &World, killed: impl Fn() -> bool) -> bool {
    world.begin();
    world.work().await;
    judge(world).await;
    killed()
}

/// Of the store are asked: segments, tiles, summary, results and the salt, written and read.
#[test]
fn the_gateway_is_killed_before_each_request_to_the_store() {
    each(async |n| {
        let world = World::new(Setting::default()).await;
        let gateway = world.gateway.clone();
        world
            .store
            .plan(move |asked| (asked.number == n).then(|| Fault::Killed(Moment::Before, vec![gateway.clone()])));
        ends_well(&world, || world.gateway.starts() > 1).await
    });
}

/// What it wrote is there, and nobody was told. (To be killed after a read is to be killed before the next request.)
#[test]
fn the_gateway_is_killed_after_each_object_is_written() {
    each(async |n| {
        let world = World::new(Setting::default()).await;
        let gateway = world.gateway.clone();
        let is = move |asked: &Exchange| asked.method == Method::PUT && asked.writes == n;
        world.store.plan(move |asked| is(asked).then(|| Fault::Killed(Moment::After, vec![gateway.clone()])));
        ends_well(&world, || world.gateway.starts() > 1).await
    });
}

/// Of the gateway are asked: to open the log, segments, held and stored, calls, and results to be kept. Without the spool it has all that
/// was acknowledged.
#[rstest::rstest]
#[case::before(Moment::Before, false)]
#[case::after(Moment::After, false)]
#[case::with_its_spool(Moment::Before, true)]
fn the_harness_is_killed_at_each_request_to_the_gateway(#[case] moment: Moment, #[case] forgets: bool) {
    each(async |n| {
        let world = World::new(Setting { forgets, ..Setting::default() }).await;
        let harness = world.harness.clone();
        world.log.plan(move |asked| (asked.number == n).then(|| Fault::Killed(moment, vec![harness.clone()])));
        // The last of them may be while it ends, after which it is not started again.
        ends_well(&world, || world.log.seen().len() >= n).await
    });
}

/// On entering the n-th system call of a kind on the spool's files: what it is to do is not done.
#[rstest::rstest]
#[case::write("write")]
#[case::replaced("rename")]
fn the_harness_is_killed_at_each_step_of_the_spool(#[case] call: &str) {
    each(async |n| {
        let inject = Some(format!("{call}:signal=KILL:when={n}"));
        let world = World::new(Setting { inject, ..Setting::default() }).await;
        ends_well(&world, || world.harness.starts() > 1).await
    });
}

/// Both at once: what only they held is in the spool.
#[test]
fn both_are_killed_after_each_object_is_written() {
    each(async |n| {
        let world = World::new(Setting::default()).await;
        let is = move |asked: &Exchange| asked.method == Method::PUT && asked.writes == n;
        let both = vec![world.gateway.clone(), world.harness.clone()];
        world.store.plan(move |asked| is(asked).then(|| Fault::Killed(Moment::After, both.clone())));
        ends_well(&world, || world.gateway.starts() > 1).await
    });
}
