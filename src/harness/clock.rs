//! The current time, and the attempt's wall time, which stops while approvals are pending.
//!
//! Guarantees: the time that approvers take does not count against the agent, up to the allowance. Overlapping waits count once. The time
//! of records, by which windows close, advances evenly even if the machine's clock is set. It never goes back.
//!
//! Non-goals: surviving the harness. A restarted harness begins anew, and the operator's own deadline applies.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;

/// The machine's time when this clock was first read.
static BEGAN: LazyLock<(Timestamp, std::time::Instant)> =
    LazyLock::new(|| (Timestamp::now(), std::time::Instant::now()));

/// Returns the current time: the machine's time when this clock was first read, plus the time that has passed since.
pub fn now() -> Timestamp {
    let (began, since) = *BEGAN;
    let passed = SignedDuration::try_from(since.elapsed()).unwrap_or(SignedDuration::MAX);
    began.checked_add(passed).unwrap_or(Timestamp::MAX)
}

/// The interval at which a clock that may be stopped is checked.
const TICK: Duration = Duration::from_millis(500);

/// The attempt's wall time.
pub struct Clock {
    wall: Duration,
    allowance: Duration,
    state: Mutex<State>,
}

struct State {
    started: Instant,
    /// The number of waits in progress. `since` is when the first of them began.
    waits: usize,
    since: Instant,
    /// The total time of waits that are over.
    waited: Duration,
}

/// A wait. The clock continues when the last wait is dropped.
pub struct Wait(Arc<Clock>);

impl Clock {
    /// Starts a clock. Up to `allowance` of all waiting does not count.
    pub fn start(wall: Duration, allowance: Duration) -> Arc<Self> {
        let started = Instant::now();
        let state = Mutex::new(State { started, waits: 0, since: started, waited: Duration::ZERO });
        Arc::new(Self { wall, allowance, state })
    }

    /// Returns the time since the start, including waits.
    pub fn elapsed(&self) -> Duration {
        self.lock().started.elapsed()
    }

    /// Returns the wall time that is left.
    pub fn left(&self) -> Duration {
        let state = self.lock();
        let waiting = if state.waits > 0 { state.since.elapsed() } else { Duration::ZERO };
        let excused = state.waited.saturating_add(waiting).min(self.allowance);
        self.wall.saturating_add(excused).saturating_sub(state.started.elapsed())
    }

    /// Returns whether the wall time is over.
    pub fn is_over(&self) -> bool {
        self.left().is_zero()
    }

    /// Waits until the wall time is over.
    pub async fn over(&self) {
        loop {
            let left = self.left();
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(TICK)).await;
        }
    }

    /// Stops the clock until the wait is dropped.
    pub fn wait(self: &Arc<Self>) -> Wait {
        let mut state = self.lock();
        if state.waits == 0 {
            state.since = Instant::now();
        }
        state.waits = state.waits.saturating_add(1);
        drop(state);
        Wait(self.clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.waits = state.waits.saturating_sub(1);
        if state.waits == 0 {
            state.waited = state.waited.saturating_add(state.since.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn time_goes_on_and_is_the_machines_as_long_as_nobody_sets_that() {
        let (before, now) = (now(), now());
        assert!(before <= now);
        assert!(Timestamp::now().duration_since(now).abs() < SignedDuration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn waits_do_not_count_and_overlapping_ones_do_so_once() {
        let clock = Clock::start(seconds(10), seconds(100));
        tokio::time::advance(seconds(4)).await;
        let one = clock.wait();
        tokio::time::advance(seconds(20)).await;
        assert_eq!(clock.left(), seconds(6));
        let two = clock.wait();
        tokio::time::advance(seconds(20)).await;
        drop(one);
        tokio::time::advance(seconds(20)).await;
        drop(two);
        assert_eq!(clock.left(), seconds(6));
        tokio::time::advance(seconds(6)).await;
        assert!(clock.is_over());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_waited_beyond_the_allowance_counts() {
        let clock = Clock::start(seconds(10), seconds(5));
        let wait = clock.wait();
        tokio::time::advance(seconds(12)).await;
        assert_eq!(clock.left(), seconds(3));
        drop(wait);
        clock.over().await;
        assert_eq!(clock.elapsed(), seconds(15));
    }
}
