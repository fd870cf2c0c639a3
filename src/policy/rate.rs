//! Limits the calls of each tool per minute, as contracts set it.
//!
//! The rate is a token bucket. It holds the calls of one minute, starts full and fills evenly, so the calls of one minute may be made at
//! once, and the long-term rate is not above the limit. The bucket starts full again when a harness starts. The number of calls that a
//! contract allows over the task follows from the log: see [`state`](crate::evidence::state).
//!
//! Guarantees: a check changes nothing that another check depends on, and [`Rates::take`] cannot fail. A clock that goes backwards fills
//! nothing.
//! Non-goals: clocks of its own, locks.

use std::collections::BTreeMap;

use super::{config::Tool, decide::Denial, rule::Rule};

/// A minute in milliseconds. One call takes this many units from a bucket, and a limit of `n` calls fills `n` units per millisecond.
const MINUTE: u64 = 60_000;

/// The buckets of a task's tools. A tool has no bucket if its contract has no rate.
#[derive(Clone, Debug, Default)]
pub struct Rates(BTreeMap<String, Option<Bucket>>);

#[derive(Clone, Debug)]
struct Bucket {
    per_minute: u64,
    level: u64,
    filled: u64,
}

impl Rates {
    /// Returns full buckets for these tools.
    pub fn new(tools: &[Tool]) -> Self {
        let bucket = |rate: i64| {
            let per_minute = u64::try_from(rate).unwrap_or(0);
            Bucket { per_minute, level: per_minute.saturating_mul(MINUTE), filled: 0 }
        };
        Self(tools.iter().map(|tool| (tool.name.clone(), tool.limits.per_minute.map(bucket))).collect())
    }

    /// Checks whether a call may be made `now`, in milliseconds of any single clock.
    ///
    /// # Errors
    /// Returns [`Rule::ToolRate`] if the bucket does not hold a call; [`Rule::ToolUnknown`] if there is no such tool.
    pub fn check(&self, tool: &str, now: u64) -> Result<(), Denial> {
        let Some(bucket) = self.0.get(tool) else {
            return Err(Denial { rule: Rule::ToolUnknown, reason: "no contract of this task is for this tool".into() });
        };
        let Some(bucket) = bucket else { return Ok(()) };
        let short = MINUTE.saturating_sub(bucket.level_at(now));
        if short > 0 {
            let seconds = short.div_ceil(bucket.per_minute.max(1)).div_ceil(1000);
            let reason = format!(
                "the contract allows {} calls a minute; the next call is possible in {seconds} s",
                bucket.per_minute
            );
            return Err(Denial { rule: Rule::ToolRate, reason });
        }
        Ok(())
    }

    /// Counts a call that [`Rates::check`] allowed at the same time.
    pub fn take(&mut self, tool: &str, now: u64) {
        let Some(Some(bucket)) = self.0.get_mut(tool) else { return };
        bucket.level = bucket.level_at(now).saturating_sub(MINUTE);
        bucket.filled = bucket.filled.max(now);
    }
}

impl Bucket {
    fn level_at(&self, now: u64) -> u64 {
        let filled = now.saturating_sub(self.filled).saturating_mul(self.per_minute);
        self.level.saturating_add(filled).min(self.per_minute.saturating_mul(MINUTE))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::decide::tests::policy as small;

    fn rates(per_minute: Option<i64>) -> Rates {
        let mut tool = Tool { name: "t".into(), ..small(vec![]).tools.remove(0) };
        tool.limits.per_minute = per_minute;
        Rates::new(&[tool])
    }

    fn call(rates: &mut Rates, now: u64) -> Option<Rule> {
        let denied = rates.check("t", now).err().map(|denial| denial.rule);
        if denied.is_none() {
            rates.take("t", now);
        }
        denied
    }

    #[test]
    fn a_tool_that_there_is_not_has_no_rate() {
        assert_eq!(call(&mut rates(None), 0), None);
        assert_eq!(Rates::default().check("t", 0).unwrap_err().rule, Rule::ToolUnknown);
    }

    #[test]
    fn a_minutes_calls_may_be_made_at_once_and_come_back_evenly() {
        let mut rates = super::tests::rates(Some(2));
        assert_eq!([0, 0, 0].map(|now| call(&mut rates, now)), [None, None, Some(Rule::ToolRate)]);
        assert!(rates.check("t", 1_000).unwrap_err().reason.ends_with("in 29 s"));
        assert_eq!(
            [29_999, 30_000, 30_000].map(|now| call(&mut rates, now)),
            [Some(Rule::ToolRate), None, Some(Rule::ToolRate)]
        );
        // A clock that goes backwards neither fills nor empties the bucket.
        assert_eq!([0, 60_000].map(|now| call(&mut rates, now)), [Some(Rule::ToolRate), None]);
    }

    proptest! {
        /// No period has more calls than the bucket holds and fills in it.
        #[test]
        fn the_rate_holds_over_every_stretch(rate in 1i64..20, steps in prop::collection::vec(0u64..20_000, 1..200)) {
            let mut rates = super::tests::rates(Some(rate));
            let mut made = Vec::new();
            let mut now = 0;
            for step in steps {
                now += step;
                if call(&mut rates, now).is_none() {
                    made.push(now);
                }
            }
            for (first, from) in made.iter().enumerate() {
                for (last, to) in made.iter().enumerate().skip(first) {
                    let most = rate as u64 * 60_000 + (to - from) * rate as u64;
                    prop_assert!(((last - first + 1) as u64) * 60_000 <= most);
                }
            }
        }
    }
}
