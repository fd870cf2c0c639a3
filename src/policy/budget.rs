//! Counts usage against limits: reserves before a call and settles after it.
//!
//! Guarantees: a reservation counts as spent until it is settled, so concurrent calls cannot exceed a limit together. A reservation that
//! does not fit changes nothing. No counter exceeds the largest value that a record can hold ([`LARGEST_WHOLE`]).
//! Non-goals: time and locks. The wall time is a deadline, not a counter.

use super::{
    config::{Limits, ModelPrice, Usage},
    model::Bound,
    price,
    rule::Rule,
};
use crate::canonical::LARGEST_WHOLE;

/// An error of a call that would exceed a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} limit is {}, {} are spent{}, and this call needs {}; {}",
    shown(.rule, .limit), shown(.rule, .used), holds(.rule, .held), shown(.rule, .needed), remedy(.rule)
)]
pub struct Exhausted {
    /// The rule of the limit.
    pub rule: Rule,
    /// What is counted.
    pub what: &'static str,
    /// The limit.
    pub limit: i64,
    /// The amount spent so far.
    pub used: i64,
    /// The amount that is also reserved for calls in progress.
    pub held: i64,
    /// The amount that the call needs.
    pub needed: i64,
}

/// Returns what can be done, and who can do it.
fn remedy(rule: &Rule) -> &'static str {
    match rule {
        Rule::Tokens | Rule::Cost => {
            "a shorter prompt or a lower output limit needs less; the author of the task can raise the limit in spec.limits, up to the limit of \
             its class in the PolicyPack"
        }
        _ => {
            "the author of the task can raise the limit in spec.limits, up to the limit of its class in the PolicyPack"
        }
    }
}

fn holds(rule: &Rule, held: &i64) -> String {
    if *held == 0 { String::new() } else { format!(", {} are reserved for calls in progress", shown(rule, held)) }
}

fn shown(rule: &Rule, count: &i64) -> String {
    if *rule == Rule::Cost { price::show(*count) } else { count.to_string() }
}

/// A task's counters and limits.
#[derive(Clone, Debug)]
pub struct Budget {
    limits: Limits,
    usage: Usage,
    /// The part of `usage` that is reserved for calls in progress.
    held: Spent,
    /// The counted denials that do not count towards the limit on denials.
    ignored: i64,
}

/// Whether the budget covers a model call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fits {
    /// The budget covers the call.
    Now,
    /// The budget may cover the call once calls in progress have settled their reservations.
    Later,
    /// The budget does not cover the call, whatever other calls settle.
    Never,
}

impl Budget {
    /// Returns a budget that continues from `usage`: what earlier attempts used stays used.
    pub fn resume(limits: Limits, usage: Usage) -> Self {
        Self { limits, usage, held: Spent::default(), ignored: 0 }
    }

    /// Sets how many of the denials so far do not count towards the limit: see [`Budget::count_ignored`].
    #[must_use]
    pub fn ignoring(self, ignored: i64) -> Self {
        Self { ignored, ..self }
    }

    /// Sets how much of `usage` is reserved for calls in progress.
    #[must_use]
    pub fn holding(self, held: Spent) -> Self {
        Self { held, ..self }
    }

    /// Returns how many denials do not count towards the limit.
    pub fn ignored(&self) -> i64 {
        self.ignored
    }

    /// Returns the counters: settled and reserved.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Returns the tokens that can still be reserved. Never negative.
    pub fn tokens_left(&self) -> i64 {
        self.limits.tokens.min(LARGEST_WHOLE).saturating_sub(self.usage.tokens).max(0)
    }

    /// Returns the money that can still be reserved, or `None` if the cost has no limit. Never negative.
    pub fn cost_left(&self) -> Option<i64> {
        self.limits.cost_micros.map(|limit| limit.saturating_sub(self.usage.cost_micros).max(0))
    }

    /// Returns the tokens that are not spent, including those that are reserved for calls in progress. Never negative.
    pub fn tokens_unspent(&self) -> i64 {
        let spent = self.usage.tokens.saturating_sub(self.held.tokens);
        self.limits.tokens.min(LARGEST_WHOLE).saturating_sub(spent).max(0)
    }

    /// Returns the money that is not spent, including what is reserved for calls in progress, or `None` if the cost has no limit. Never
    /// negative.
    pub fn cost_unspent(&self) -> Option<i64> {
        let spent = self.usage.cost_micros.saturating_sub(self.held.cost_micros);
        self.limits.cost_micros.map(|limit| limit.saturating_sub(spent).max(0))
    }

    /// Checks whether an amount can be reserved for a model call.
    pub fn fits(&self, asked: Spent) -> Fits {
        let within = |tokens: i64, cost: Option<i64>| {
            asked.tokens <= tokens && asked.cost_micros <= cost.unwrap_or(LARGEST_WHOLE)
        };
        match () {
            () if within(self.tokens_left(), self.cost_left()) => Fits::Now,
            () if within(self.tokens_unspent(), self.cost_unspent()) => Fits::Later,
            () => Fits::Never,
        }
    }

    /// Checks whether the task may still make calls.
    ///
    /// # Errors
    /// Returns [`Rule::Denials`] if the limit on denials is reached, which ends the task.
    pub fn open(&self) -> Result<(), Exhausted> {
        let used = self.usage.denials.saturating_sub(self.ignored);
        match self.limits.denials {
            Some(limit) if used >= limit => {
                Err(Exhausted { rule: Rule::Denials, what: "denied call", limit, used, held: 0, needed: 0 })
            }
            _ => Ok(()),
        }
    }

    /// Counts one tool call.
    ///
    /// # Errors
    /// Returns [`Rule::ToolCalls`] if no tool call is left. Nothing is counted then.
    pub fn reserve_tool_call(&mut self) -> Result<(), Exhausted> {
        let used = self.usage.tool_calls;
        if used >= self.limits.tool_calls.min(LARGEST_WHOLE) {
            return Err(Exhausted {
                rule: Rule::ToolCalls,
                what: "tool call",
                limit: self.limits.tool_calls,
                used,
                held: 0,
                needed: 1,
            });
        }
        self.usage.tool_calls = used.saturating_add(1);
        Ok(())
    }

    /// Reserves tokens and money for one model call.
    ///
    /// # Errors
    /// Returns [`Rule::Tokens`] or [`Rule::Cost`] if the budget does not cover the call. Nothing is reserved then.
    pub fn reserve_model(&mut self, tokens: i64, cost: i64) -> Result<(), Exhausted> {
        let (tokens, cost) = (tokens.max(0), cost.max(0));
        let Usage { tokens: used, cost_micros: spent, .. } = self.usage;
        if tokens > self.tokens_left() {
            return Err(Exhausted {
                rule: Rule::Tokens,
                what: "token",
                limit: self.limits.tokens,
                used: used.saturating_sub(self.held.tokens),
                held: self.held.tokens,
                needed: tokens,
            });
        }
        // The cost is counted even if it has no limit.
        let limit = self.limits.cost_micros.unwrap_or(LARGEST_WHOLE).min(LARGEST_WHOLE);
        if cost > limit.saturating_sub(spent).max(0) {
            let held = self.held.cost_micros;
            return Err(Exhausted {
                rule: Rule::Cost,
                what: "cost",
                limit,
                used: spent.saturating_sub(held),
                held,
                needed: cost,
            });
        }
        self.usage.tokens = used.saturating_add(tokens);
        self.usage.cost_micros = spent.saturating_add(cost);
        self.held.tokens = self.held.tokens.saturating_add(tokens);
        self.held.cost_micros = self.held.cost_micros.saturating_add(cost);
        Ok(())
    }

    /// Replaces the reservation by the real usage, and returns what was counted. Usage above the reservation is counted in full, up to the
    /// largest value of a counter: a counter at that value exceeds every limit.
    #[must_use = "the record has what was counted"]
    pub fn settle_model(&mut self, reserved: Spent, used: Spent) -> Spent {
        self.held.tokens = self.held.tokens.saturating_sub(reserved.tokens.max(0)).max(0);
        self.held.cost_micros = self.held.cost_micros.saturating_sub(reserved.cost_micros.max(0)).max(0);
        let settle = |count: &mut i64, reserved: i64, used: i64| {
            let others = count.saturating_sub(reserved.max(0)).max(0);
            let counted = used.clamp(0, LARGEST_WHOLE.saturating_sub(others).max(0));
            *count = others.saturating_add(counted);
            counted
        };
        Spent {
            tokens: settle(&mut self.usage.tokens, reserved.tokens, used.tokens),
            cost_micros: settle(&mut self.usage.cost_micros, reserved.cost_micros, used.cost_micros),
        }
    }

    /// Counts denials, and returns how many were counted.
    #[must_use = "the record has what was counted"]
    pub fn count_denials(&mut self, count: i64) -> i64 {
        let counted = count.clamp(0, LARGEST_WHOLE.saturating_sub(self.usage.denials).max(0));
        self.usage.denials = self.usage.denials.saturating_add(counted);
        counted
    }

    /// Counts denials of hosts that the class ignores, which never count towards the limit. Returns how many were counted.
    #[must_use = "the record has what was counted"]
    pub fn count_ignored(&mut self, count: i64) -> i64 {
        let counted = self.count_denials(count);
        self.ignored = self.ignored.saturating_add(counted);
        counted
    }
}

/// The amount that one model call takes from the budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// Tokens of the prompt and the reply.
    pub tokens: i64,
    /// The cost, in millionths of the pack's currency unit.
    pub cost_micros: i64,
}

impl Spent {
    /// Returns the amount for a number of tokens at the model's price.
    pub fn of(tokens: Bound, price: Option<&ModelPrice>) -> Self {
        let cost_micros = price.map_or(0, |price| price.cost(tokens.prompt, tokens.output));
        Self { tokens: tokens.total(), cost_micros }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits() -> Limits {
        Limits {
            wall_time_seconds: 60,
            tool_calls: 3,
            tokens: 1_000,
            denials: Some(2),
            cost_micros: Some(5_000_000),
            approval_wait_seconds: 0,
        }
    }

    #[test]
    fn what_is_held_is_not_spent() {
        let mut budget = Budget::resume(limits(), Usage::default());
        let asked = |tokens, cost_micros| Spent { tokens, cost_micros };
        budget.reserve_model(700, 4_000_000).unwrap();
        assert_eq!((budget.tokens_left(), budget.tokens_unspent()), (300, 1_000));
        assert_eq!((budget.cost_left(), budget.cost_unspent()), (Some(1_000_000), Some(5_000_000)));
        for (tokens, cost, fits) in [
            (300, 1_000_000, Fits::Now),
            (301, 0, Fits::Later),
            (0, 1_000_001, Fits::Later),
            (1_000, 5_000_000, Fits::Later),
            (1_001, 0, Fits::Never),
            (0, 5_000_001, Fits::Never),
        ] {
            assert_eq!(budget.fits(asked(tokens, cost)), fits, "{tokens} {cost}");
        }
        let refused = budget.reserve_model(500, 0).unwrap_err().to_string();
        assert!(
            refused.contains("0 are spent, 700 are reserved for calls in progress, and this call needs 500"),
            "{refused}"
        );
        let _ = budget.settle_model(asked(700, 4_000_000), asked(900, 1));
        assert_eq!((budget.tokens_left(), budget.tokens_unspent()), (100, 100));
        assert_eq!(budget.fits(asked(300, 0)), Fits::Never);
        // One call exceeds its reservation while another call holds one. What the other call settles is not enough.
        budget.reserve_model(50, 0).unwrap();
        budget.reserve_model(50, 0).unwrap();
        let _ = budget.settle_model(asked(50, 0), asked(90, 0));
        assert_eq!((budget.tokens_left(), budget.tokens_unspent()), (0, 10));
        assert_eq!(budget.fits(asked(20, 0)), Fits::Never);
    }

    #[test]
    fn the_fourth_of_three_calls_is_refused_and_not_counted() {
        let mut budget = Budget::resume(limits(), Usage { tool_calls: 2, ..Usage::default() });
        budget.reserve_tool_call().unwrap();
        let refused = budget.reserve_tool_call().unwrap_err();
        assert_eq!(
            refused.to_string(),
            "tool call limit is 3, 3 are spent, and this call needs 1; the author of the task can raise the limit in spec.limits, up to the \
             limit of its class in the PolicyPack"
        );
        assert_eq!(budget.usage().tool_calls, 3);
    }

    #[test]
    fn usage_beyond_the_limit_leaves_nothing_rather_than_less_than_nothing() {
        let mut budget = Budget::resume(limits(), Usage::default());
        budget.reserve_model(1_000, 5_000_000).unwrap();
        let reserved = Spent { tokens: 1_000, cost_micros: 5_000_000 };
        let used = Spent { tokens: 5_000, cost_micros: 9_000_000 };
        assert_eq!(budget.settle_model(reserved, used), used);
        assert_eq!((budget.tokens_left(), budget.cost_left()), (0, Some(0)));
        assert_eq!(budget.reserve_model(1, 0).unwrap_err().rule, Rule::Tokens);
    }

    #[test]
    fn a_call_that_one_limit_refuses_takes_nothing_of_the_other() {
        let mut budget = Budget::resume(limits(), Usage::default());
        let refused = budget.reserve_model(10, 5_000_001).unwrap_err();
        let refused = refused.to_string();
        assert!(
            refused.starts_with("cost limit is 5, 0 are spent, and this call needs 5.000001; a shorter prompt"),
            "{refused}"
        );
        assert!(refused.contains("the author of the task"), "{refused}");
        assert_eq!(budget.usage(), Usage::default());
    }

    #[test]
    fn so_many_refusals_end_it() {
        let mut budget = Budget::resume(limits(), Usage::default());
        assert_eq!(budget.count_denials(1), 1);
        assert_eq!(budget.open(), Ok(()));
        assert_eq!(budget.count_denials(1), 1);
        assert_eq!(budget.open().unwrap_err().rule, Rule::Denials);
        let unlimited = Limits { denials: None, ..limits() };
        assert_eq!(Budget::resume(unlimited, budget.usage()).open(), Ok(()));
    }

    #[test]
    fn ignored_refusals_are_counted_and_end_nothing() {
        let mut budget = Budget::resume(limits(), Usage::default());
        for _ in 0..10 {
            assert_eq!(budget.count_ignored(3), 3);
        }
        assert_eq!((budget.usage().denials, budget.ignored(), budget.open()), (30, 30, Ok(())));
        let mut next = Budget::resume(limits(), budget.usage()).ignoring(budget.ignored());
        assert_eq!(next.open(), Ok(()));
        // Two other denials do end the task.
        assert_eq!(next.count_denials(2), 2);
        assert_eq!(next.open().unwrap_err().used, 2);
    }

    /// A million concurrent calls for the rest of each counter: exactly as many calls as are left are allowed. The others are denied for
    /// the right reason.
    #[test]
    fn exactly_what_is_left_is_given_however_many_race_for_it() {
        const CALLS: usize = 1_000_000;
        const THREADS: usize = 8;
        const LEFT: usize = 1_234;
        let left = LEFT as i64;
        let limits =
            Limits { tool_calls: left, tokens: left * 7, denials: Some(left), cost_micros: Some(left * 3), ..limits() };
        type Take = fn(&mut Budget) -> Result<(), Exhausted>;
        let takes: [(Rule, Take); 4] = [
            (Rule::ToolCalls, Budget::reserve_tool_call),
            (Rule::Tokens, |budget| budget.reserve_model(7, 0)),
            (Rule::Cost, |budget| budget.reserve_model(0, 3)),
            (Rule::Denials, |budget| {
                budget.open().map(|()| {
                    let _ = budget.count_denials(1);
                })
            }),
        ];
        for (rule, take) in takes {
            let budget = std::sync::Mutex::new(Budget::resume(limits, Usage::default()));
            let race = || {
                let tries = (0..CALLS / THREADS).map(|_| take(&mut budget.lock().unwrap()));
                tries.fold((0, 0), |(given, refused), taken| match taken {
                    Ok(()) => (given + 1, refused),
                    Err(exhausted) => {
                        assert_eq!(exhausted.rule, rule);
                        (given, refused + 1)
                    }
                })
            };
            let (given, refused) = std::thread::scope(|scope| {
                let racers: Vec<_> = (0..THREADS).map(|_| scope.spawn(race)).collect();
                racers
                    .into_iter()
                    .map(|racer| racer.join().unwrap())
                    .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
            });
            assert_eq!((given, given + refused), (LEFT, CALLS), "{rule}");
        }
    }

    proptest! {
        /// Whatever the calls ask for and in whatever order, the reservations never add up to more than the limit.
        #[test]
        fn reservations_never_pass_the_limit(steps in prop::collection::vec((0i64..400, 0i64..2_000_000, 0i64..400), 0..64)) {
            let mut budget = Budget::resume(limits(), Usage::default());
            let mut held = Vec::new();
            for (tokens, cost_micros, used) in steps {
                if budget.reserve_model(tokens, cost_micros).is_ok() {
                    let used = Spent { tokens: used.min(tokens), cost_micros: (used * 5_000).min(cost_micros) };
                    held.push((Spent { tokens, cost_micros }, used));
                }
                prop_assert!(budget.usage().tokens <= limits().tokens);
                prop_assert!(budget.usage().cost_micros <= limits().cost_micros.unwrap());
                if held.len() > 2 {
                    let (reserved, used) = held.remove(0);
                    prop_assert_eq!(budget.settle_model(reserved, used), used);
                }
            }
        }

        /// Whatever usage providers report and whatever the prices are, a record can hold every counter and every counted amount, and the
        /// counters are the sums of what was counted.
        #[test]
        fn no_counter_is_beyond_what_a_record_has(
            said in prop::collection::vec((any::<i64>(), any::<i64>(), any::<i64>()), 0..16), limited in any::<bool>()
        ) {
            let money = limited.then_some(i64::MAX);
            let limits = Limits { tokens: i64::MAX, cost_micros: money, denials: None, tool_calls: i64::MAX, ..limits() };
            let mut budget = Budget::resume(limits, Usage::default());
            let mut sums = Usage::default();
            for (tokens, cost_micros, denials) in said {
                let reserved = Spent { tokens: tokens.rotate_left(7), cost_micros: cost_micros.rotate_left(7) };
                let reserved = if budget.reserve_model(reserved.tokens, reserved.cost_micros).is_ok() {
                    Spent { tokens: reserved.tokens.max(0), cost_micros: reserved.cost_micros.max(0) }
                } else {
                    Spent::default()
                };
                let counted = budget.settle_model(reserved, Spent { tokens, cost_micros });
                sums.tokens += counted.tokens;
                sums.cost_micros += counted.cost_micros;
                sums.denials += budget.count_denials(denials);
                let usage = budget.usage();
                for count in [usage.tokens, usage.cost_micros, usage.denials, counted.tokens, counted.cost_micros] {
                    prop_assert!((0..=LARGEST_WHOLE).contains(&count), "{usage:?}");
                }
                prop_assert_eq!(usage, sums);
            }
        }
    }
}
