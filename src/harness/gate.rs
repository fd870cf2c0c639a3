//! The gate that every call goes through: it decides, and it records what becomes of each call.
//!
//! ```text
//! decide ─▶ evaluation ─▶ permit: reserve, record the intent, store ─▶ the call ─▶ permit: settle, record the outcome
//!    └──────────┴─▶ denials: record, or aggregate
//! ```
//!
//! Guarantees: one gate decides about all calls of an attempt, by one log. Once the gate is stopped, it denies every call, with the first
//! reason for which it was stopped. An evaluation that is slow or has a long input runs on a thread of its own.
//!
//! Non-goals: sending. A caller that has a [`Permit`] sends the call and settles the permit.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::{Notify, Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    approvals::Approvals,
    bounds::Bounds,
    clock::Clock,
    dedup::Deduplicator,
    gateway_client::GatewayClient,
    journal::{Journal, call_id},
};
use crate::{
    apart,
    evidence::{
        record::{CallOutcome, Channel, Containment, Event, Resolved},
        rollback::{CompensationState, Plan},
    },
    policy::{
        access::{AccessDecision, AccessPolicy, AccessRequest},
        commit::Salt,
        config::{SideEffect, Tool},
        cost,
        decide::{Arguments, Contracts, Decision, DecisionInputs, Denial},
        output::Outputs,
        rate::Rates,
        redact::Redactor,
        rule::Rule,
    },
    room::Room,
};

mod call;
mod denials;
mod evaluation;
mod permit;

pub use call::{Call, Settlement};
use denials::Denials;
use evaluation::Evaluator;
pub use evaluation::{Compiled, Decided, Judged};
pub use permit::Permit;

/// The bytes of short bodies and of other bodies that are held at a time. The second fits one body of the maximum length. The harness's
/// memory is bounded.
const ROOM: (usize, usize) = (8 << 20, crate::wire::LONGEST_REQUEST);
/// The number of calls that are evaluated at a time on threads of their own.
const PLACES: usize = 2;

/// Decides about calls and records them.
pub struct Gate {
    policy: Evaluator,
    denials: Denials,
    redactor: Arc<Redactor>,
    /// Lock order: before the journal, never after it.
    rates: Mutex<Rates>,
    once: Deduplicator,
    salt: Salt,
    journal: Arc<Journal>,
    link: Arc<GatewayClient>,
    clock: Arc<Clock>,
    approvals: Arc<Approvals>,
    stopped: Mutex<Option<Denial>>,
    places: Arc<Semaphore>,
    room: Room,
    /// Held by the model call that may reserve next.
    turn: tokio::sync::Mutex<()>,
    /// Notified each time a call settles its reservation.
    settled: Notify,
    /// Background tasks that no caller waits for. They end when calls are denied.
    behind: TaskTracker,
    over: CancellationToken,
}

impl Gate {
    /// Creates a gate that measures wall time with `clock`.
    pub fn new(
        policy: Compiled,
        once: Deduplicator,
        salt: Salt,
        journal: Arc<Journal>,
        link: Arc<GatewayClient>,
        clock: Arc<Clock>,
        approvals: Arc<Approvals>,
    ) -> Self {
        let redactor = Arc::new(Redactor::new(policy.contracts.policy(), policy.guard.detectors()));
        let limit = policy.contracts.policy().limits.denials;
        let denials = Denials::new(limit, journal.clone(), redactor.clone(), salt.clone());
        let rates = Mutex::new(Rates::new(&policy.contracts.policy().tools));
        Self {
            policy: Evaluator::new(policy),
            denials,
            redactor,
            rates,
            once,
            salt,
            journal,
            link,
            clock,
            approvals,
            stopped: Mutex::default(),
            places: Arc::new(Semaphore::new(PLACES)),
            room: Room::new(ROOM.0, ROOM.1),
            turn: tokio::sync::Mutex::new(()),
            settled: Notify::new(),
            behind: TaskTracker::new(),
            over: CancellationToken::new(),
        }
    }

    /// Runs an evaluation on a thread of its own, because it is slow or its input is long.
    ///
    /// # Errors
    /// Returns [`Rule::Busy`] if there is no result in time.
    pub async fn apart<T: Send + 'static>(
        self: &Arc<Self>,
        time: Duration,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Result<T, Denial> {
        let gate = self.clone();
        let judged = apart::judge(&self.places, time.min(apart::LONGEST), move || work(&gate)).await;
        judged.map_err(|unjudged| Denial { rule: Rule::Busy, reason: unjudged.to_string() })
    }

    /// Decides about a tool call by the current state. Runs on this thread if the decision takes microseconds, otherwise on a thread of its
    /// own. `length` is the number of bytes in which the arguments came.
    pub async fn decide(self: &Arc<Self>, tool: &str, arguments: Value, length: usize) -> Decided {
        if length <= cost::SHORT && self.policy.contracts.is_bounded_cost(tool) {
            return self.decide_here(tool, Arguments::Parsed(arguments)).into();
        }
        let time = self.contracts().policy().tool(tool).map_or(apart::LONGEST, |tool| Bounds::of(tool).time);
        let name = tool.to_owned();
        let decided =
            self.apart(time, move |gate| Decided::from(gate.decide_here(&name, Arguments::Parsed(arguments))));
        decided.await.unwrap_or_else(|denial| Decided {
            verdict: Err(denial),
            arguments: Value::Null,
            digest: None,
            bytes: 0,
            needs_approval: false,
        })
    }

    /// Returns the compiled output schemas.
    pub fn outputs(&self) -> &Outputs {
        &self.policy.outputs
    }

    /// Returns the compiled contracts.
    pub fn contracts(&self) -> &Contracts {
        &self.policy.contracts
    }

    /// Returns the pack's rules.
    pub fn guard(&self) -> &AccessPolicy {
        &self.policy.guard
    }

    /// Evaluates the pack's rules for a call by the current state. They are evaluated again when the call's intent is put in order.
    ///
    /// # Errors
    /// Returns the rule that denies the call.
    pub async fn judge(
        self: &Arc<Self>,
        tool: &Tool,
        side_effect: SideEffect,
        arguments: &Value,
        length: usize,
    ) -> Result<AccessDecision, Denial> {
        let judge = move |gate: &Self, tool: &Tool, arguments: &Value| {
            let (usage, seen) = gate.journal.look(|task| (task.usage(), task.seen()));
            gate.policy.guard.judge(AccessRequest { tool, side_effect, usage, seen }, arguments)
        };
        if self.policy.guard.is_silent() || (length <= cost::SHORT && self.policy.guard.is_bounded_cost()) {
            return judge(self, tool, arguments);
        }
        let (of, arguments) = (tool.clone(), arguments.clone());
        self.apart(Bounds::of(tool).time, move |gate| judge(gate, &of, &arguments)).await?
    }

    /// Returns the plan of the task that this task rolls back, if it is a rollback.
    pub fn rollback_plan(&self) -> Option<Plan> {
        self.journal.look(|task| task.rollback().map(|undoing| undoing.plan.clone()))
    }

    /// Returns whether this task is a rollback.
    pub fn is_rollback(&self) -> bool {
        self.journal.look(|task| task.rollback().is_some())
    }

    /// Returns the state of a step of the rollback, if this task is one.
    pub fn compensation(&self, call: &str) -> Option<CompensationState> {
        self.journal.look(|task| task.rollback().map(|undoing| undoing.state(call)))
    }

    /// Returns the log.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// Returns the client for the gateway.
    pub fn link(&self) -> &Arc<GatewayClient> {
        &self.link
    }

    /// Denies everything from now on. Later calls do not replace the first reason.
    pub fn stop(&self, rule: Rule, reason: &str) {
        let mut stopped = self.stopped.lock();
        stopped.get_or_insert_with(|| Denial { rule, reason: reason.to_owned() });
        drop(stopped);
        self.over.cancel();
    }

    /// Waits until everything is denied.
    pub fn over(&self) -> impl Future<Output = ()> + Send + use<> {
        self.over.clone().cancelled_owned()
    }

    /// Runs work in the background, where no caller waits for it. The work must end when [`Gate::over`] returns.
    pub fn behind(&self, work: impl Future<Output = ()> + Send + 'static) {
        // Without a runtime the process is ending, and the reservation stays spent.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            self.behind.spawn_on(work, &runtime);
        }
    }

    /// Waits until all background work has ended. Call it once everything is denied.
    pub async fn nothing_behind(&self) {
        self.behind.close();
        self.behind.wait().await;
    }

    /// Returns the memory for bodies.
    pub fn room(&self) -> &Room {
        &self.room
    }

    /// Returns the salt of the task's commitments.
    pub fn salt(&self) -> &Salt {
        &self.salt
    }

    /// Returns the redactor, which removes from texts what must not be recorded.
    pub fn redactor(&self) -> &Redactor {
        &self.redactor
    }

    /// Returns the idempotency state.
    pub fn once(&self) -> &Deduplicator {
        &self.once
    }

    /// Returns the approvals.
    pub fn approvals(&self) -> &Arc<Approvals> {
        &self.approvals
    }

    /// Decides about a tool call by the current state, on this thread.
    fn decide_here(&self, tool: &str, arguments: Arguments<'_>) -> Decision<'_> {
        let results = self.policy.results();
        let (usage, ignored) = self.journal.look(|task| (task.usage(), task.ignored()));
        let known = DecisionInputs { usage, ignored, results: &results };
        let decision = self.policy.contracts.decide(tool, arguments, known, &self.salt);
        match self.running() {
            Ok(()) => decision,
            Err(denial) => Decision { verdict: Err(denial), ..decision },
        }
    }

    /// Stores a tool's result for preconditions of later calls.
    pub fn keep(&self, tool: &str, result: &Value) {
        self.policy.keep(tool, result);
    }

    /// Waits until the limit on denials is reached.
    pub async fn refused_enough(&self) {
        self.denials.enough().await;
    }

    /// Checks whether any call may be made.
    ///
    /// # Errors
    /// Returns the reason if no call may be made.
    pub fn open(&self) -> Result<(), Denial> {
        self.running()?;
        Ok(self.journal.open()?)
    }

    /// Checks whether the attempt continues. Does not check the limit on denials, which the journal counts under its lock.
    fn running(&self) -> Result<(), Denial> {
        if let Some(denial) = self.journal.failure() {
            return Err(denial);
        }
        if let Some(denial) = &*self.stopped.lock() {
            return Err(denial.clone());
        }
        if self.clock.is_over() {
            let limit = self.policy.contracts.policy().limits.wall_time_seconds;
            return Err(Denial { rule: Rule::WallTime, reason: format!("the attempt's {limit} s are over") });
        }
        Ok(())
    }

    /// Records what a read found out about a call with an unknown outcome.
    ///
    /// # Errors
    /// Returns an error if the log has ended.
    pub fn resolve(&self, call: &str, outcome: CallOutcome, by: u64) -> Result<(), Denial> {
        let resolved = Resolved { call: call.to_owned(), outcome, by: call_id(by) };
        self.journal.record(|_, _| Ok(Event::Resolved(resolved))).map(|_| ())
    }

    /// Records a denial and returns it for the agent. Once the limit on denials is reached, returns that reason instead.
    pub async fn deny(&self, channel: Channel, target: &str, digest: Option<String>, denial: Denial) -> Denial {
        self.denials.deny(channel, target, digest, denial).await
    }

    /// Records the denials that share a record: those whose window is over, or all if `now` is absent.
    pub fn count_waiting(&self, now: Option<Instant>) {
        self.denials.count_waiting(now);
    }

    /// Records the result of a repeated containment probe. Denies everything if the pod is no longer isolated.
    pub fn contained(&self, containment: Containment) {
        if !containment.contained {
            let breaches = containment.breaches.join(", ");
            self.stop(Rule::ContainmentLost, &format!("the pod is not contained any more: {breaches}"));
        }
        if let Err(denial) = self.journal.record(|_, _| Ok(Event::ContainmentChecked(containment))) {
            tracing::error!(reason = denial.reason, "the probe's result could not be recorded");
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
