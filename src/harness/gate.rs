//! The pipeline that every call goes through: decide, reserve, record, store, send, record.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::sync::{Notify, Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    approvals::Approvals,
    bounds::Bounds,
    clock::Clock,
    dedup::Deduplicator,
    flood::{DenialCount, Flood},
    gateway_client::{GatewayClient, Peer},
    journal::{Journal, call_id},
};
use crate::{
    apart,
    evidence::{
        record::{Channel, Containment, Denied, Effect, Event, Intent, Outcome, Resolved},
        rollback::{CompensationState, Plan},
        state::TaskState,
    },
    policy::{
        access::{AccessDecision, AccessPolicy, AccessRequest, Assessment},
        approval::ApprovalSource,
        budget::{Fits, Spent},
        commit::Salt,
        config::{Sensitivity, SideEffect, Tool, Usage},
        cost,
        decide::{Arguments, Contracts, Decision, DecisionInputs, Denial, Results},
        meter::{self, Allowance},
        output::Outputs,
        rate::Rates,
        redact::Redactor,
        rule::Rule,
        shorten::{shorten, shorten_to},
    },
    room::Room,
};

/// The longest reason of a denial in its record, in characters.
const LONGEST_REASON: usize = 2048;

/// The arguments of a tool call and the evaluation of contract and pack on them.
#[derive(Clone)]
pub struct Judged {
    /// The arguments.
    pub arguments: Arc<Value>,
    /// The evaluation, if it takes more than microseconds. Faster evaluations run where records are put in order.
    found: Option<Arc<Verdict>>,
    /// The allowance for evaluating the call where records are put in order, if it may be evaluated there.
    in_order: Option<Allowance>,
}

/// The result of an evaluation, with the counters and results that it used.
struct Verdict {
    usage: Usage,
    seen: Sensitivity,
    results: Arc<Results>,
    answer: Result<(bool, AccessDecision), Denial>,
}

/// The reason of a call that is not put in order though no rule denies it: the inputs of its evaluation have changed.
const CHANGED: &str = "what this call is judged by changes faster than it can be judged: make it again";
/// The number of times that a call with a slow evaluation is evaluated.
const ROUNDS: usize = 8;
/// The first round in which a call may use a short allowance where records are put in order.
const PATIENT: usize = 2;
/// The bytes of short bodies and of other bodies that are held at a time. The second fits one body of the maximum length. The harness's
/// memory is bounded.
const ROOM: (usize, usize) = (8 << 20, crate::wire::LONGEST_REQUEST);
/// The number of calls that are evaluated at a time on threads of their own.
const PLACES: usize = 2;

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

/// A call before it leaves.
#[derive(Clone)]
pub struct Call {
    /// The channel of the call.
    pub channel: Channel,
    /// The tool's name, the model path, or `host:port`.
    pub target: String,
    /// What it may change.
    pub effect: Option<SideEffect>,
    /// The digest of the upstream's definition of an MCP tool.
    pub definition: Option<String>,
    /// The commitment to the request, hex.
    pub request_digest: Option<String>,
    /// The number of bytes of the request.
    pub request_bytes: u64,
    /// The idempotency key of the call.
    pub key: Option<String>,
    /// The names of the approvals that the call uses.
    pub approvals: Vec<String>,
    /// The pack's reasons for which approvers have approved the call.
    pub because: Vec<String>,
    /// In a rollback: the call that this call compensates.
    pub undoes: Option<String>,
    /// For a tool call: the inputs of its evaluation where records are put in order.
    pub judged: Option<Judged>,
    /// The rules that were checked and allowed the call. The rules of the budgets are added.
    pub rules: Vec<Rule>,
    /// The name of the model, as it may be recorded.
    pub model: Option<String>,
    /// The amount to reserve.
    pub reserve: Spent,
}

/// A call that may leave. Its intent is stored, or spooled for a tool read or a model call. A permit that is dropped without an outcome
/// records an unknown outcome.
pub struct Permit {
    gate: Arc<Gate>,
    /// The sequence number of the intent.
    pub intent: u64,
    reserved: Spent,
    /// Whether the call leaves once its intent is witnessed.
    early: bool,
    settled: bool,
}

/// The outcome of a call.
#[derive(Clone, Debug)]
pub struct Settlement {
    /// Whether the call took effect.
    pub effect: Effect,
    /// The rule by which the call failed, if it failed.
    pub rule: Option<Rule>,
    /// The upstream's HTTP status; 0 if there is none.
    pub status: u16,
    /// The commitment to the reply, hex.
    pub response_digest: Option<String>,
    /// The number of bytes of the reply.
    pub response_bytes: u64,
    /// The number of bytes that the agent sent through a tunnel.
    pub sent_bytes: Option<u64>,
    /// The cost by the usage in the reply. If absent, the reservation stays spent.
    pub spent: Option<Spent>,
    /// The upstream that the gateway dialled.
    pub upstream: Option<Peer>,
    /// The sensitivity of the result that the agent gets.
    pub sensitivity: Sensitivity,
    /// The commitment to the stored arguments of the call's compensation.
    pub undone_by: Option<String>,
}

impl Settlement {
    /// Returns the settlement of a call with an unknown outcome.
    pub fn unknown(rule: Option<Rule>) -> Self {
        Self {
            effect: Effect::Unknown,
            rule,
            status: 0,
            response_digest: None,
            response_bytes: 0,
            sent_bytes: None,
            spent: None,
            upstream: None,
            sensitivity: Sensitivity::default(),
            undone_by: None,
        }
    }

    /// Returns the settlement of a call that certainly had no effect and no cost.
    pub fn not_applied(rule: Rule) -> Self {
        Self { effect: Effect::NotApplied, spent: Some(Spent::default()), ..Self::unknown(Some(rule)) }
    }
}

/// A compiled policy.
pub struct Compiled {
    /// The contracts.
    pub contracts: Contracts,
    /// The pack's rules.
    pub guard: AccessPolicy,
    /// The contracts' output schemas.
    pub outputs: Outputs,
}

/// Decides about calls and records them.
pub struct Gate {
    policy: Compiled,
    redactor: Redactor,
    /// Lock order: before the journal, never after it.
    rates: Mutex<Rates>,
    once: Deduplicator,
    salt: Salt,
    journal: Arc<Journal>,
    link: Arc<GatewayClient>,
    clock: Arc<Clock>,
    approvals: Arc<Approvals>,
    stopped: Mutex<Option<Denial>>,
    results: Mutex<Arc<Results>>,
    flood: Mutex<Flood>,
    refused_enough: Notify,
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
        let results = Mutex::new(Arc::new(policy.contracts.no_results()));
        let redactor = Redactor::new(policy.contracts.policy(), policy.guard.detectors());
        let rates = Mutex::new(Rates::new(&policy.contracts.policy().tools));
        Self {
            policy,
            redactor,
            rates,
            once,
            salt,
            journal,
            link,
            clock,
            approvals,
            stopped: Mutex::default(),
            results,
            flood: Mutex::new(Flood::new(Instant::now())),
            refused_enough: Notify::new(),
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

    /// Evaluates contract and pack for a call by the current state, for [`Gate::permit`].
    ///
    /// # Errors
    /// Returns [`Rule::Busy`] if there is no result in time.
    async fn judge_anew(
        self: &Arc<Self>,
        call: &Call,
        arguments: &Arc<Value>,
        time: Duration,
    ) -> Result<Option<Arc<Verdict>>, Denial> {
        let (target, effect, arguments) = (call.target.clone(), call.effect, arguments.clone());
        let found = self.apart(time, move |gate| {
            let results = gate.results();
            let (usage, seen) = gate.journal.look(|task| (task.usage(), task.seen()));
            let tool = gate.policy.contracts.policy().tool(&target)?;
            let answer = gate.answer(tool, effect?, &arguments, (usage, seen, &results));
            Some(Arc::new(Verdict { usage, seen, results, answer }))
        });
        found.await
    }

    /// Returns whether the contract requires approval, and the pack's decision.
    fn answer(
        &self,
        tool: &Tool,
        effect: SideEffect,
        arguments: &Value,
        (usage, seen, results): (Usage, Sensitivity, &Results),
    ) -> Result<(bool, AccessDecision), Denial> {
        // The limit on denials is checked when calls are decided and when their intents are put in order.
        let known = DecisionInputs { usage, ignored: 0, results };
        let by_contract = self.policy.contracts.check_stateful(&tool.name, arguments, known)?;
        Ok((by_contract, self.policy.guard.judge(AccessRequest { tool, effect, usage, seen }, arguments)?))
    }

    /// Returns whether calls of a tool with arguments of this length are evaluated where records are put in order.
    fn is_bounded_cost(&self, tool: &str, length: usize) -> bool {
        length <= cost::SHORT && self.policy.contracts.is_bounded_cost(tool) && self.policy.guard.is_bounded_cost()
    }

    /// Works like [`Gate::permit`], for a tool call with arguments of this length. A slow evaluation happens before the call is put in
    /// order, and is repeated while its inputs change. No lock that other calls need is held meanwhile.
    ///
    /// # Errors
    /// Returns the rule that denies the call.
    pub async fn permit_tool(
        self: &Arc<Self>,
        mut call: Call,
        arguments: Value,
        length: usize,
        time: Duration,
    ) -> Result<Permit, Denial> {
        let arguments = Arc::new(arguments);
        let mut judged = Judged { arguments: arguments.clone(), found: None, in_order: None };
        if self.is_bounded_cost(&call.target, length) {
            // This takes microseconds of the thread's time, however busy the machine is.
            judged.in_order = Some(Allowance::CALL);
            call.judged = Some(judged);
            return self.permit(call).await;
        }
        for round in 0..ROUNDS {
            let found = self.judge_anew(&call, &arguments, time).await?;
            judged = Judged { found, in_order: (round >= PATIENT).then_some(Allowance::IN_ORDER), ..judged };
            match self.permit(Call { judged: Some(judged.clone()), ..call.clone() }).await {
                Err(denial) if denial.rule == Rule::Busy && denial.reason == CHANGED => {}
                done => return done,
            }
        }
        Err(Denial { rule: Rule::Busy, reason: CHANGED.to_owned() })
    }

    fn results(&self) -> Arc<Results> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the earlier result of an evaluation if an evaluation now would return the same.
    fn still<'v>(
        &self,
        target: &str,
        found: &'v Verdict,
        now: (Usage, Sensitivity, &Arc<Results>),
    ) -> Option<&'v Verdict> {
        let (by_usage, by_results) = self.policy.contracts.sees(target);
        let (guard_by_usage, guard_by_seen) = self.policy.guard.changes();
        let (usage, seen, results) = now;
        let holds = (!(by_usage || guard_by_usage) || found.usage == usage)
            && (!by_results || Arc::ptr_eq(&found.results, results))
            && (!guard_by_seen || found.seen == seen);
        holds.then_some(found)
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
        effect: SideEffect,
        arguments: &Value,
        length: usize,
    ) -> Result<AccessDecision, Denial> {
        let judge = move |gate: &Self, tool: &Tool, arguments: &Value| {
            let (usage, seen) = gate.journal.look(|task| (task.usage(), task.seen()));
            gate.policy.guard.judge(AccessRequest { tool, effect, usage, seen }, arguments)
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
    pub fn standing(&self, undoes: &str) -> Option<CompensationState> {
        self.journal.look(|task| task.rollback().map(|undoing| undoing.standing(undoes)))
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
        let mut stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
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
        let results = self.results();
        let (usage, ignored) = self.journal.look(|task| (task.usage(), task.ignored()));
        let known = DecisionInputs { usage, ignored, results: &results };
        let decision = self.policy.contracts.decide(tool, arguments, known, &self.salt);
        match self.running() {
            Ok(()) => decision,
            Err(denial) => Decision { verdict: Err(denial), ..decision },
        }
    }

    /// Stores a tool's result for preconditions of later calls.
    pub fn keep(&self, tool: &str, result: &serde_json::Value) {
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(with) = self.policy.contracts.with_result(&results, tool, result) {
            *results = Arc::new(with);
        }
    }

    /// Waits until the limit on denials is reached.
    pub async fn refused_enough(&self) {
        self.refused_enough.notified().await;
    }

    /// Checks whether any call may be made.
    ///
    /// # Errors
    /// Returns the reason if no call may be made.
    pub fn open(&self) -> Result<(), Denial> {
        self.running()?;
        Ok(self.journal.open()?)
    }

    /// Waits, in the order of arrival, while the amount would fit if calls in flight settled. Does not wait for an amount that can never
    /// fit.
    async fn turn_for(&self, asked: Spent) -> tokio::sync::MutexGuard<'_, ()> {
        /// How often to check whether the attempt still runs.
        const LOOK: Duration = Duration::from_millis(500);
        let turn = self.turn.lock().await;
        loop {
            let settled = self.settled.notified();
            if self.running().is_err() || self.journal.fits(asked) != Fits::Later {
                return turn;
            }
            let _ = tokio::time::timeout(LOOK, settled).await;
        }
    }

    /// Checks whether the attempt continues. Does not check the limit on denials, which the journal counts under its lock.
    fn running(&self) -> Result<(), Denial> {
        if let Some(denial) = self.journal.failure() {
            return Err(denial);
        }
        if let Some(denial) = &*self.stopped.lock().unwrap_or_else(PoisonError::into_inner) {
            return Err(denial.clone());
        }
        if self.clock.is_over() {
            let limit = self.policy.contracts.policy().limits.wall_time_seconds;
            return Err(Denial { rule: Rule::WallTime, reason: format!("the attempt's {limit} s are over") });
        }
        Ok(())
    }

    /// Reserves the budget for a call, records its intent, and waits until the intent is stored; for a tool read or a model call, until it
    /// is spooled.
    ///
    /// # Errors
    /// Returns the rule that denies the call. The denial is not recorded yet: see [`Gate::deny`].
    pub async fn permit(self: &Arc<Self>, call: Call) -> Result<Permit, Denial> {
        self.journal.wait_for_capacity().await;
        let reserved = call.reserve;
        // No other model call reserves before this one has reserved.
        let turn = match call.channel {
            Channel::Model => Some(self.turn_for(reserved).await),
            _ => None,
        };
        let early = call.channel.leaves_witnessed(call.effect);
        let intent = self.intend(call)?;
        drop(turn);
        let permit = Permit { gate: self.clone(), intent, reserved, early, settled: false };
        let kept = if early { self.journal.spooled(intent).await } else { self.journal.stored(intent).await };
        match kept {
            Ok(()) => Ok(permit),
            Err(denial) => {
                permit.settle(Settlement::not_applied(denial.rule));
                Err(denial)
            }
        }
    }

    /// Records the intent of a call if contract, pack, rate limit and log allow it.
    fn intend(&self, mut call: Call) -> Result<u64, Denial> {
        let is_tool = call.channel == Channel::Tool;
        let now = u64::try_from(self.clock.elapsed().as_millis()).unwrap_or(u64::MAX);
        // Only tool calls have rates: other calls do not wait for this lock.
        let mut rates = is_tool.then(|| self.rates.lock().unwrap_or_else(PoisonError::into_inner));
        let target = call.target.clone();
        let intent = self.journal.record(|seq, task| {
            // This check runs where records are put in order, so that no intent follows what stopped the attempt.
            self.running()?;
            task.budget().open()?;
            let mut rules = std::mem::take(&mut call.rules);
            rules.push(Rule::WallTime);
            let limits = self.policy.contracts.policy().limits;
            rules.extend(limits.denials.map(|_| Rule::Denials));
            let mut assessment = None;
            match call.channel {
                Channel::Tool => {
                    // The call limit comes before the rate, because no wait helps against it.
                    let none_left = |reason| Denial { rule: Rule::ToolLimitCalls, reason };
                    task.calls_left(&call.target).map_err(none_left)?;
                    rates.as_ref().map_or(Ok(()), |rates| rates.check(&call.target, now))?;
                    assessment = self.judge_in_order(&call, task)?;
                    rules.extend(call.key.as_ref().map(|_| Rule::ToolIdempotency));
                    rules.push(Rule::ToolCalls);
                }
                Channel::Model => {
                    rules.push(Rule::Tokens);
                    rules.extend(limits.cost_micros.map(|_| Rule::Cost));
                }
                Channel::Listing | Channel::Egress => {}
            }
            Ok(Event::Intent(Intent {
                call: call_id(seq),
                channel: call.channel,
                target: shorten(&call.target),
                effect: call.effect,
                definition: call.definition,
                request_digest: call.request_digest,
                request_bytes: call.request_bytes,
                key: call.key,
                approvals: call.approvals,
                undoes: call.undoes,
                assessment,
                rules,
                model: call.model,
                reserved_tokens: call.reserve.tokens,
                reserved_cost_micros: call.reserve.cost_micros,
            }))
        })?;
        if let Some(rates) = &mut rates {
            rates.take(&target, now);
        }
        Ok(intent)
    }

    /// Evaluates contract and pack for a tool call where its intent is put in order. Returns the pack's assessment.
    fn judge_in_order(&self, call: &Call, task: &TaskState) -> Result<Option<Assessment>, Denial> {
        let digest = call.request_digest.as_deref();
        let unusable = |reason| Denial { rule: Rule::ToolApproval, reason };
        let by = task.approvals().usable(&call.approvals, &call.target, digest).map_err(unusable)?;
        let tool = self.policy.contracts.policy().tool(&call.target);
        let judged = tool.zip(call.effect).zip(call.judged.as_ref());
        let Some(((tool, effect), judged)) = judged else {
            let reason = format!("no contract of this task has a tool {:?}", shorten(&call.target));
            return Err(Denial { rule: Rule::ToolUnknown, reason });
        };
        // Other calls may have been made since the decision: while a listing, a duplicate call or an approval was pending.
        let results = self.results();
        let now_known = (task.usage(), task.seen(), &results);
        let found = judged.found.as_deref().and_then(|found| self.still(&call.target, found, now_known));
        let (by_contract, passed) = match (found, judged.in_order) {
            (Some(found), _) => found.answer.clone()?,
            // All other calls wait for this evaluation, so it must be short.
            (None, Some(allowance)) => meter::within(allowance, || {
                let answer = self.answer(tool, effect, &judged.arguments, (task.usage(), task.seen(), &results));
                let changed = |_| Denial { rule: Rule::Busy, reason: CHANGED.to_owned() };
                meter::ended_by_itself().map_err(changed).and(answer)
            })?,
            (None, None) => return Err(Denial { rule: Rule::Busy, reason: CHANGED.to_owned() }),
        };
        if by_contract && !by.contains(&ApprovalSource::Contract) {
            return Err(unusable("the contract requires approval by now; make the call again to ask for it".into()));
        }
        // What happened after the approval was requested may be a reason that the approvers have not seen.
        let asked_for = |because: &&String| by.contains(&ApprovalSource::Pack) && call.because.contains(because);
        if let Some(because) = passed.because.iter().find(|because| !asked_for(because)) {
            return Err(unusable(format!(
                "the pack requires approval by now, for {because}; make the call again to ask for it"
            )));
        }
        if let Some((key, of)) = call.key.as_deref().zip(tool.idempotency.as_ref()) {
            Deduplicator::free(task.ledger(), &call.target, of, key, digest.unwrap_or_default())?;
        }
        Ok(passed.assessment)
    }

    /// Records what a read found out about a call with an unknown outcome.
    ///
    /// # Errors
    /// Returns an error if the log has ended.
    pub fn resolve(&self, call: &str, effect: Effect, by: u64) -> Result<(), Denial> {
        let resolved = Resolved { call: call.to_owned(), effect, by: call_id(by) };
        self.journal.record(|_, _| Ok(Event::Resolved(resolved))).map(|_| ())
    }

    /// Records a denial and returns it for the agent. Once the limit on denials is reached, returns that reason instead.
    pub async fn deny(&self, channel: Channel, target: &str, digest: Option<String>, denial: Denial) -> Denial {
        self.journal.wait_for_capacity().await;
        let denied = Denied {
            channel,
            target: shorten(&self.redactor.name(target, &self.salt)),
            rule: denial.rule,
            reason: self.recordable(&denial.reason),
            request_digest: digest,
            count: 1,
        };
        let counted = self.flood().take(denied, Instant::now());
        match counted {
            DenialCount::Alone(denied) => self.count(denied).unwrap_or(denial),
            DenialCount::With(due) => {
                let limit = self.policy.contracts.policy().limits.denials;
                let counted = self.journal.look(|task| task.usage().denials.saturating_sub(task.ignored()));
                let reached = |limit| counted.saturating_add(self.flood().waiting()) >= limit;
                if limit.is_some_and(reached) {
                    self.count_waiting(None);
                } else {
                    tokio::time::sleep_until(due.into()).await;
                    // The first waiting caller records the denials of all.
                    self.count_waiting(Some(Instant::now()));
                }
                let above = self.journal.failure().or_else(|| self.journal.open().err().map(Denial::from));
                above.unwrap_or(denial)
            }
        }
    }

    /// Records the denials that share a record: those whose window is over, or all if `now` is absent.
    pub fn count_waiting(&self, now: Option<Instant>) {
        let over = self.flood().over(now);
        over.into_iter().for_each(|denied| drop(self.count(denied)));
    }

    fn flood(&self) -> MutexGuard<'_, Flood> {
        self.flood.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recordable(&self, reason: &str) -> String {
        self.redactor.text(&shorten_to(reason, LONGEST_REASON), &self.salt)
    }

    /// Records denials. Returns the reason that replaces theirs if the limit on denials is reached or the log has failed.
    fn count(&self, mut denied: Denied) -> Option<Denial> {
        let mut over = false;
        let mut above = None;
        let record = self.journal.record(|_, task| {
            let mut budget = task.budget();
            if let Err(spent) = budget.open() {
                let spent = Denial::from(spent);
                (denied.rule, denied.reason) = (spent.rule, self.recordable(&spent.reason));
                above = Some(spent);
            }
            denied.count = match denied.rule {
                Rule::EgressIgnored => budget.count_ignored(denied.count),
                _ => budget.count_denials(denied.count),
            };
            over = budget.open().is_err();
            // The harness's own log shows the same texts as the record.
            let Denied { channel, target, rule, reason, count, .. } = &denied;
            // Each line has a member `target` of its own, the module.
            tracing::info!(channel = channel.as_str(), to = target, %rule, reason, count, "refused");
            Ok(Event::Denied(denied))
        });
        if let Err(failed) = record {
            tracing::error!(reason = failed.reason, "a refusal could not be recorded; the log has ended");
            above = Some(failed);
        }
        if over {
            self.refused_enough.notify_one();
        }
        above
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

impl Permit {
    /// Returns the salt of the task's commitments.
    pub fn salt(&self) -> &Salt {
        &self.gate.salt
    }

    /// Records the outcome of the call and settles its reservation.
    pub fn settle(mut self, settlement: Settlement) {
        self.record(settlement);
    }

    fn record(&mut self, settlement: Settlement) {
        self.settled = true;
        let reserved = self.reserved;
        let spent = settlement.spent.unwrap_or(reserved);
        let (upstream, certificate) = settlement.upstream.map_or((None, None), |p| (Some(p.address), p.certificate));
        let mut outcome = Outcome {
            call: call_id(self.intent),
            effect: settlement.effect,
            rule: settlement.rule,
            status: settlement.status,
            response_digest: settlement.response_digest,
            response_bytes: settlement.response_bytes,
            sent_bytes: settlement.sent_bytes,
            tokens: spent.tokens,
            cost_micros: spent.cost_micros,
            upstream,
            certificate,
            sensitivity: settlement.sensitivity,
            undone_by: settlement.undone_by,
        };
        let result = self.gate.journal.record(|_, task| {
            let spent = task.budget().settle_model(reserved, spent);
            (outcome.tokens, outcome.cost_micros) = (spent.tokens, spent.cost_micros);
            Ok(Event::Outcome(outcome))
        });
        self.gate.settled.notify_waiters();
        match result {
            Ok(_) if self.early => {}
            // Recording the outcome soon makes it less likely that a restart leaves the outcome unknown.
            Ok(outcome) => self.gate.journal.flush(outcome),
            Err(denial) => {
                tracing::error!(intent = self.intent, reason = denial.reason, "an outcome could not be recorded");
            }
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if !self.settled {
            self.record(Settlement::unknown(None));
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
