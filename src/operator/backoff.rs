//! Pauses after errors: for each task its own, longer each time, reset by success.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

/// After the first error.
const FIRST: Duration = Duration::from_millis(200);
/// At most, before jitter.
const LONGEST: Duration = Duration::from_secs(60);

/// The pause after this many errors in a row: doubled each time, and up to half as much again, so that tasks that failed
/// together do not come back together.
pub fn pause(errors: u32) -> Duration {
    let doubled = FIRST.saturating_mul(2_u32.saturating_pow(errors.saturating_sub(1))).min(LONGEST);
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
            let pause = pause(errors).as_millis();
            assert!((least..=least * 3 / 2).contains(&pause), "{errors}: {pause}");
        }
    }
}
