//! The clock of the harness or the gateway is stepped by a year while an agent works.

use serde_json::json;

use super::{
    alone::once,
    judge::{Judged, judge},
    world::{Setting, Told, World},
};

/// Lets the agent work, steps a clock, and lets the agent work again.
async fn stepped(whose: &str, offset: &str) -> (World, Judged) {
    let world = World::new(Setting { clocks: true, ..Setting::default() }).await;
    world.begin();
    world.work().await;
    world.clock(whose, offset);
    world.work().await;
    // The order was paid within the idempotency window of a day, so it is not paid again.
    let order = json!({"order": "7"});
    let told = world.call("pay", order).await;
    assert!(matches!(told, Told::Result(_)), "{told:?}");
    assert_eq!(world.effects.count("pay"), 1, "an order was paid twice");
    let judged = judge(&world).await;
    (world, judged)
}

/// `judge` checks that locks are as long as the pack says, by the store's clock.
#[rstest::rstest]
#[case::forwards("+1y")]
#[case::backwards("-1y")]
fn the_gateways_clock_is_stepped(#[case] offset: &str) {
    once(async || {
        stepped("gateway", offset).await;
    });
}

/// The times of an attempt's records do not go backwards.
#[rstest::rstest]
#[case::forwards("+1y")]
#[case::backwards("-1y")]
fn the_harnesss_clock_is_stepped(#[case] offset: &str) {
    once(async || {
        let (_, judged) = stepped("harness", offset).await;
        assert!(judged.times().is_sorted(), "{:#?}", judged.times());
    });
}

/// A gateway that starts with a wrong clock has not yet seen any other clock.
#[rstest::rstest]
#[case::ahead("+1y")]
#[case::behind("-1y")]
fn the_gateway_begins_with_a_wrong_clock(#[case] offset: &str) {
    once(async || {
        let world = World::new(Setting { clocks: true, ..Setting::default() }).await;
        world.clock("gateway", offset);
        world.begin();
        world.work().await;
        judge(&world).await;
    });
}
