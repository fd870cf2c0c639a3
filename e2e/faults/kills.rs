//! SIGKILL of gateway or harness while an agent works, at each step that persists something and at every other request between them.

use http::Method;

use super::{
    alone::each,
    judge::judge,
    relay::{Exchange, Fault, Moment},
    world::{Setting, World},
};

/// Lets the agent work, ends the task and checks the world. Returns whether a process was killed.
async fn ends_well(world: &World, killed: impl Fn() -> bool) -> bool {
    world.begin();
    world.work().await;
    judge(world).await;
    killed()
}

/// The requests to the store read and write segments, tiles, the summary, results and the salt.
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

/// The object is stored, but the gateway gets no reply. (There is no such case for reads: a kill after a read is a kill before the next
/// request.)
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

/// The requests to the gateway open the log, append segments that are held and stored, make calls and store results. In the case
/// `with_its_spool` the spool is lost as well, and the gateway has everything that was acknowledged.
#[rstest::rstest]
#[case::before(Moment::Before, false)]
#[case::after(Moment::After, false)]
#[case::with_its_spool(Moment::Before, true)]
fn the_harness_is_killed_at_each_request_to_the_gateway(#[case] moment: Moment, #[case] forgets: bool) {
    each(async |n| {
        let world = World::new(Setting { forgets, ..Setting::default() }).await;
        let harness = world.harness.clone();
        world.log.plan(move |asked| (asked.number == n).then(|| Fault::Killed(moment, vec![harness.clone()])));
        // The last request may come while the harness ends, and then it is not started again.
        ends_well(&world, || world.log.seen().len() >= n).await
    });
}

/// The harness is killed on entry to the n-th system call of a kind on the spool's files, so this call does nothing.
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

/// Both are killed at once: what only they had in memory is in the spool.
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
