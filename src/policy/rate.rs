//! How many calls of each tool a contract allows a minute.
//!
//! The rate is a token bucket: it holds a minute's calls, begins full and fills evenly, so that a minute's calls may be made
//! at once and no more than that a minute in the long run. The bucket begins full again when a harness starts. How many calls a contract
//! allows over the task follows from the log: see [`state`](crate::evidence::state).
//!
//! Guarantees: asking changes nothing that another answer depends on, and [`Rates::take`] cannot fail; a clock that goes
//! backwards fills nothing. Non-goals: clocks of its own, locks.

use std::collections::BTreeMap;

use super::{config::Tool, decide::Denial, rule::Rule};

/// A minute in milliseconds: the worth of one call in a bucket, so that a limit of `n` fills `n` a millisecond.
const MINUTE: u64 = 60_000;

/// The calls of a task's tools; without a bucket where the contract has no rate.
#[derive(Clone, Debug, Default)]
pub struct Rates(BTreeMap<String, Option<Bucket>>);

#[derive(Clone, Debug)]
struct Bucket {
    per_minute: u64,
    level: u64,
    filled: u64,
}

impl Rates {
    /// The rates of these tools, with full buckets.
    pub fn new(tools: &[Tool]) -> Self {
        let bucket = |rate: i64| {
            let per_minute = u64::try_from(rate).unwrap_or(0);
            Bucket { per_minute, level: per_minute.saturating_mul(MINUTE), filled: 0 }
        };
        Self(tools.iter().map(|tool| (tool.name.clone(), tool.limits.per_minute.map(bucket))).collect())
    }

    /// Whether a call may be made `now`, in milliseconds of any one clock.
    ///
    /// # Errors
    /// [`Rule::ToolRate`]; [`Rule::ToolKnown`] for a tool that there is not.
    pub fn check(&self, tool: &str, now: u64) -> Result<(), Denial> {
        let Some(bucket) = self.0.get(tool) else {
            return Err(Denial { rule: Rule::ToolKnown, reason: "no contract of this task is for this tool".into() });
        };
        let Some(bucket) = bucket else { return Ok(()) };
        let short = MINUTE.saturating_sub(bucket.level_at(now));
        if short > 0 {
            let seconds = short.div_ceil(bucket.per_minute.max(1)).div_ceil(1000);
            let reason = format!(
                "the contract allows {} calls a minute; the next may be made in {seconds} s",
                bucket.per_minute
            );
            return Err(Denial { rule: Rule::ToolRate, reason });
        }
        Ok(())
    }

    /// Counts a call that [`Rates::check`] let pass at the same time.
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
        assert_eq!(Rates::default().check("t", 0).unwrap_err().rule, Rule::ToolKnown);
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
        // A clock that goes backwards gives nothing, and takes nothing.
        assert_eq!([0, 60_000].map(|now| call(&mut rates, now)), [Some(Rule::ToolRate), None]);
    }

    proptest! {
        /// In no stretch of time are there more calls than the bucket holds and fills in it.
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
