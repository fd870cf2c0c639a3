//! Evaluations of contract and pack for a tool call.
//!
//! Guarantees: an earlier evaluation counts only if an evaluation now would return the same. An evaluation that runs where records are put
//! in order ends within its allowance. A call that cannot be evaluated is denied.
//!
//! Non-goals: the thread on which an evaluation runs; limits of the log, such as budgets and approvals.

use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::Value;

use crate::policy::{
    access::{AccessDecision, AccessPolicy, AccessRequest},
    config::{Sensitivity, SideEffect, Tool, Usage},
    cost,
    decide::{Contracts, Decision, DecisionInputs, Denial, Results},
    meter::{self, Allowance},
    output::Outputs,
    rule::Rule,
};

/// The reason of a call that is not put in order though no rule denies it: the inputs of its evaluation have changed.
pub(super) const CHANGED: &str =
    "the state that this call depends on changes faster than Belay can evaluate it: make the call again";

/// A compiled policy.
pub struct Compiled {
    /// The contracts.
    pub contracts: Contracts,
    /// The pack's rules.
    pub guard: AccessPolicy,
    /// The contracts' output schemas.
    pub outputs: Outputs,
}

/// The arguments of a tool call and the evaluation of contract and pack on them.
#[derive(Clone)]
pub struct Judged {
    /// The arguments.
    pub arguments: Arc<Value>,
    /// The evaluation, if it takes more than microseconds. Faster evaluations run where records are put in order.
    pub(super) found: Option<Arc<Verdict>>,
    /// The allowance for evaluating the call where records are put in order, if it may be evaluated there.
    pub(super) in_order: Option<Allowance>,
}

/// The result of an evaluation, with the counters and results that it used.
pub(super) struct Verdict {
    usage: Usage,
    seen: Sensitivity,
    results: Arc<Results>,
    answer: Result<(bool, AccessDecision), Denial>,
}

/// The decision about a tool call.
pub struct Decided {
    /// The denial, if the call is denied.
    pub verdict: Result<(), Denial>,
    /// The arguments; null if they could not be read or evaluated.
    pub arguments: Value,
    /// The commitment to the arguments, if there is one.
    pub digest: Option<String>,
    /// The number of bytes of the arguments' canonical form.
    pub bytes: u64,
    /// Whether the contract requires approval of the call.
    pub needs_approval: bool,
}

impl From<Decision<'_>> for Decided {
    fn from(decision: Decision<'_>) -> Self {
        let Decision { verdict, arguments, digest, bytes, needs_approval } = decision;
        Self { verdict: verdict.map(|_| ()), arguments, digest: Some(digest), bytes, needs_approval }
    }
}

/// Contracts, pack and output schemas, with the results that preconditions may use.
pub(super) struct Evaluator {
    /// The contracts.
    pub(super) contracts: Contracts,
    /// The pack's rules.
    pub(super) guard: AccessPolicy,
    /// The contracts' output schemas.
    pub(super) outputs: Outputs,
    results: Mutex<Arc<Results>>,
}

impl Evaluator {
    /// Creates an evaluator without results.
    pub(super) fn new(policy: Compiled) -> Self {
        let Compiled { contracts, guard, outputs } = policy;
        let results = Mutex::new(Arc::new(contracts.no_results()));
        Self { contracts, guard, outputs, results }
    }

    /// Returns the results so far.
    pub(super) fn results(&self) -> Arc<Results> {
        self.results.lock().clone()
    }

    /// Stores a tool's result for preconditions of later calls.
    pub(super) fn keep(&self, tool: &str, result: &Value) {
        let mut results = self.results.lock();
        if let Some(with) = self.contracts.with_result(&results, tool, result) {
            *results = Arc::new(with);
        }
    }

    /// Returns whether calls of a tool with arguments of this length are evaluated where records are put in order.
    pub(super) fn is_bounded_cost(&self, tool: &str, length: usize) -> bool {
        length <= cost::SHORT && self.contracts.is_bounded_cost(tool) && self.guard.is_bounded_cost()
    }

    /// Evaluates contract and pack for a call. Returns `None` if no contract has the tool.
    pub(super) fn evaluate(
        &self,
        target: &str,
        side_effect: Option<SideEffect>,
        arguments: &Value,
        (usage, seen, results): (Usage, Sensitivity, Arc<Results>),
    ) -> Option<Verdict> {
        let tool = self.contracts.policy().tool(target)?;
        let answer = self.answer(tool, side_effect?, arguments, (usage, seen, &results));
        Some(Verdict { usage, seen, results, answer })
    }

    /// Returns whether the contract requires approval, and the pack's decision, where records are put in order.
    ///
    /// # Errors
    /// Returns the rule that denies the call, and [`CHANGED`] if the call must be evaluated again before it is put in order.
    pub(super) fn answer_in_order(
        &self,
        tool: &Tool,
        side_effect: SideEffect,
        judged: &Judged,
        (usage, seen): (Usage, Sensitivity),
    ) -> Result<(bool, AccessDecision), Denial> {
        // Other calls may have been made since the decision: while a listing, a duplicate call or an approval was pending.
        let results = self.results();
        let found = judged.found.as_deref().and_then(|found| self.still(&tool.name, found, (usage, seen, &results)));
        match (found, judged.in_order) {
            (Some(found), _) => found.answer.clone(),
            // All other calls wait for this evaluation, so it must be short.
            (None, Some(allowance)) => meter::within(allowance, || {
                let answer = self.answer(tool, side_effect, &judged.arguments, (usage, seen, &results));
                let changed = |_| Denial { rule: Rule::Busy, reason: CHANGED.to_owned() };
                meter::ended_by_itself().map_err(changed).and(answer)
            }),
            (None, None) => Err(Denial { rule: Rule::Busy, reason: CHANGED.to_owned() }),
        }
    }

    /// Returns whether the contract requires approval, and the pack's decision.
    fn answer(
        &self,
        tool: &Tool,
        side_effect: SideEffect,
        arguments: &Value,
        (usage, seen, results): (Usage, Sensitivity, &Results),
    ) -> Result<(bool, AccessDecision), Denial> {
        // The limit on denials is checked when calls are decided and when their intents are put in order.
        let known = DecisionInputs { usage, ignored: 0, results };
        let by_contract = self.contracts.check_stateful(&tool.name, arguments, known)?;
        Ok((by_contract, self.guard.judge(AccessRequest { tool, side_effect, usage, seen }, arguments)?))
    }

    /// Returns the earlier result of an evaluation if an evaluation now would return the same.
    fn still<'v>(
        &self,
        target: &str,
        found: &'v Verdict,
        now: (Usage, Sensitivity, &Arc<Results>),
    ) -> Option<&'v Verdict> {
        let (by_usage, by_results) = self.contracts.sees(target);
        let (guard_by_usage, guard_by_seen) = self.guard.changes();
        let (usage, seen, results) = now;
        let holds = (!(by_usage || guard_by_usage) || found.usage == usage)
            && (!by_results || Arc::ptr_eq(&found.results, results))
            && (!guard_by_seen || found.seen == seen);
        holds.then_some(found)
    }
}
