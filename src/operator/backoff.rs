//! Computes pauses after errors: separate for each task, longer after each error, and reset by a success.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

/// The pause after the first error.
const FIRST: Duration = Duration::from_millis(200);
/// The longest pause, before jitter.
const LONGEST: Duration = Duration::from_secs(60);
/// The longest pause if the API server did not answer, before jitter. It is short, so that tasks continue soon after the API server
/// returns.
const LONGEST_AWAY: Duration = Duration::from_secs(8);

/// Returns the pause after this many errors in a row. It doubles with each error and grows by up to half, so that tasks that failed
/// together are not retried together.
///
/// `away`: the error is that there was no answer, not an answer with an error.
pub fn pause(errors: u32, away: bool) -> Duration {
    let longest = if away { LONGEST_AWAY } else { LONGEST };
    let doubled = FIRST.saturating_mul(2_u32.saturating_pow(errors.saturating_sub(1))).min(longest);
    // The keys of a new hasher are the standard library's own source of randomness.
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
