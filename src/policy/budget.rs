//! Counters against limits: reserve before a call, settle after it.
//!
//! Promises: what is reserved is spent until it is settled, so that calls that run at the same time cannot pass a limit
//! together; a reservation that does not fit changes nothing. Refuses: time, locks. Wall time is a deadline, not a counter.

use super::config::{Limits, Usage};
use super::rule::Rule;

/// A limit would be passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} limit is {limit}, {used} are spent or reserved, and this call needs {needed}")]
pub struct Exhausted {
    /// The rule of the limit.
    pub rule: Rule,
    /// What is counted.
    pub what: &'static str,
    /// The limit.
    pub limit: i64,
    /// Spent or reserved so far.
    pub used: i64,
    /// What the call needs.
    pub needed: i64,
}

/// A task's counters and limits.
#[derive(Clone, Debug)]
pub struct Budget {
    limits: Limits,
    usage: Usage,
}

impl Budget {
    /// A budget that goes on from `usage`: what earlier attempts used stays used.
    pub fn resume(limits: Limits, usage: Usage) -> Self {
        Self { limits, usage }
    }

    /// The counters: settled and reserved.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Tokens that can still be reserved; never negative.
    pub fn tokens_left(&self) -> i64 {
        self.limits.tokens.saturating_sub(self.usage.tokens).max(0)
    }

    /// Counts one tool call.
    ///
    /// # Errors
    /// [`Rule::ToolCalls`] if none is left; nothing is counted then.
    pub fn reserve_tool_call(&mut self) -> Result<(), Exhausted> {
        let used = self.usage.tool_calls;
        if used >= self.limits.tool_calls {
            return Err(Exhausted {
                rule: Rule::ToolCalls,
                what: "tool call",
                limit: self.limits.tool_calls,
                used,
                needed: 1,
            });
        }
        self.usage.tool_calls = used.saturating_add(1);
        Ok(())
    }

    /// Sets tokens aside for one model call.
    ///
    /// # Errors
    /// [`Rule::Tokens`] if so many are not left; nothing is set aside then.
    pub fn reserve_tokens(&mut self, needed: i64) -> Result<(), Exhausted> {
        let used = self.usage.tokens;
        let needed = needed.max(0);
        if needed > self.tokens_left() {
            return Err(Exhausted { rule: Rule::Tokens, what: "token", limit: self.limits.tokens, used, needed });
        }
        self.usage.tokens = used.saturating_add(needed);
        Ok(())
    }

    /// Replaces a reservation by what was really used. A model that used more than was reserved is counted in full.
    pub fn settle_tokens(&mut self, reserved: i64, used: i64) {
        self.usage.tokens = self.usage.tokens.saturating_sub(reserved.max(0)).saturating_add(used.max(0)).max(0);
    }

    /// Counts a refusal.
    pub fn count_denial(&mut self) {
        self.usage.denials = self.usage.denials.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits() -> Limits {
        Limits { wall_time_seconds: 60, tool_calls: 3, tokens: 1_000 }
    }

    #[test]
    fn the_fourth_of_three_calls_is_refused_and_not_counted() {
        let mut budget = Budget::resume(limits(), Usage { tool_calls: 2, ..Usage::default() });
        budget.reserve_tool_call().unwrap();
        let refused = budget.reserve_tool_call().unwrap_err();
        assert_eq!(refused.to_string(), "tool call limit is 3, 3 are spent or reserved, and this call needs 1");
        assert_eq!(budget.usage().tool_calls, 3);
    }

    #[test]
    fn usage_beyond_the_limit_leaves_nothing_rather_than_less_than_nothing() {
        let mut budget = Budget::resume(limits(), Usage::default());
        budget.reserve_tokens(1_000).unwrap();
        budget.settle_tokens(1_000, 5_000);
        assert_eq!(budget.tokens_left(), 0);
        assert_eq!(budget.reserve_tokens(1).unwrap_err().rule, Rule::Tokens);
    }

    proptest! {
        /// Whatever is asked for in whatever order, reservations never add up to more than the limit.
        #[test]
        fn reservations_never_pass_the_limit(steps in prop::collection::vec((0i64..400, 0i64..400), 0..64)) {
            let mut budget = Budget::resume(limits(), Usage::default());
            let mut held = Vec::new();
            for (ask, used) in steps {
                if budget.reserve_tokens(ask).is_ok() {
                    held.push((ask, used.min(ask)));
                }
                prop_assert!(budget.usage().tokens <= limits().tokens);
                if held.len() > 2 {
                    let (ask, used) = held.remove(0);
                    budget.settle_tokens(ask, used);
                }
            }
        }
    }
}
