//! Pauses after errors: for each task its own, longer each time, reset by success.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

/// After the first error.
const FIRST: Duration = Duration::from_millis(200);
/// At most, before jitter.
const LONGEST: Duration = Duration::from_secs(60);
/// At most, before jitter, where the API server did not answer: whoever waits for it goes on soon after it is back.
const LONGEST_AWAY: Duration = Duration::from_secs(8);

/// The pause after this many errors in a row: doubled each time, and up to half as much again, so that tasks that failed
/// together do not come back together.
///
/// `away`: it was no answer that was an error, but that there was none.
pub fn pause(errors: u32, away: bool) -> Duration {
    let longest = if away { LONGEST_AWAY } else { LONGEST };
    let doubled = FIRST.saturating_mul(2_u32.saturating_pow(errors.saturating_sub(1))).min(longest);
    // A fresh hasher's keys are the standard library's own source of randomness.
    let jitter = RandomState::new().hash_one(errors) % 500;
    doubled + doubled.saturating_mul(u32::try_from(jitter).unwrap_or_default()) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_a_limit() {
        for (errors, least) in [(0, 200), (1, 200), (2, 400), (3, 800), (9, 51_200), (10, 60_000), (u32::MAX, 60_000)] {
            let refused = pause(errors, false).as_millis();
            assert!((least..=least * 3 / 2).contains(&refused), "{errors}: {refused}");
            assert!(pause(errors, true) <= Duration::from_secs(12));
        }
    }
}
