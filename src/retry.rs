//! The pauses between the tries of a request that failed.
//!
//! Guarantees: pauses double up to a limit, and each has a random part. So processes that lost the same gateway or the same store do not
//! come back to it in step.
//!
//! Non-goals: which errors are tried again, and for how long. The caller decides.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// Returns pauses without end. They begin at `first` and double up to `longest`. Each is extended by a random part of itself, so it is less
/// than twice as long.
pub fn pauses(first: Duration, longest: Duration) -> ExponentialBackoff {
    let pauses = ExponentialBuilder::new().with_min_delay(first).with_max_delay(longest).with_factor(2.0);
    pauses.without_max_times().with_jitter().build()
}

/// Sleeps for the next of these pauses.
pub async fn pause(pauses: &mut ExponentialBackoff) {
    if let Some(next) = pauses.next() {
        tokio::time::sleep(next).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_double_to_a_limit_and_no_two_processes_have_the_same() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_secs(2));
        let planned = [100, 200, 400, 800, 1600, 2000, 2000].map(Duration::from_millis);
        let some = || -> Vec<_> { pauses(first, longest).take(planned.len()).collect() };
        let all = some();
        assert!(all.iter().zip(planned).all(|(pause, least)| (least..least * 2).contains(pause)), "{all:?}");
        assert_ne!(all, some());
        assert!(pauses(first, longest).nth(10_000).is_some(), "they end");
    }
}
