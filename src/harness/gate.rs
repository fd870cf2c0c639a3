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
    flood::{Counted, Flood},
    journal::{Journal, call_id},
    link::{Link, Peer},
    once::Once,
};
use crate::{
    apart,
    evidence::{
        record::{Channel, Containment, Denied, Effect, Event, Intent, Outcome, Resolved},
        rollback::{Plan, Standing},
        state::TaskState,
    },
    policy::{
        access::{Asked, Assessment, Guard, Passed},
        approval::AskedBy,
        budget::{Fits, Spent},
        commit::Salt,
        config::{Sensitivity, SideEffect, Tool, Usage},
        decide::{Arguments, Contracts, Decision, Denial, Known, Results},
        meter::{self, Allowance},
        output::Outputs,
        quick,
        rate::Rates,
        redact::Redactor,
        rule::Rule,
        shorten::{shorten, shorten_to},
    },
    room::Room,
};

/// Longest reason of a refusal in its record, in characters.
const LONGEST_REASON: usize = 2048;

/// What contract and pack have said to a tool's call, and by what.
#[derive(Clone)]
pub struct Judged {
    /// The arguments.
    pub arguments: Arc<Value>,
    /// What was found, where that takes more than microseconds; all else is asked where the call is put in order.
    found: Option<Arc<Verdict>>,
    /// What it may take there, if anything.
    in_order: Option<Allowance>,
}

/// What was found, and by what counters and results.
struct Verdict {
    usage: Usage,
    seen: Sensitivity,
    results: Arc<Results>,
    answer: Result<(bool, Passed), Denial>,
}

/// Why a call is not put in order though nothing refuses it: what it was judged by has changed.
const CHANGED: &str = "what this call is judged by changes faster than it can be judged: make it again";
/// So often a call is judged anew whose judgment takes long.
const ROUNDS: usize = 8;
/// From this round on it may take a little time where it is put in order.
const PATIENT: usize = 2;
/// Bytes of bodies that are held at a time: of short ones, and of others, one of which may be as long as any. The harness's memory is bounded.
const ROOM: (usize, usize) = (8 << 20, crate::wire::LONGEST_REQUEST);
/// Calls that are judged at a time, apart.
const PLACES: usize = 2;

/// What was decided over a tool's call.
pub struct Decided {
    /// Why it may not leave, if so.
    pub verdict: Result<(), Denial>,
    /// The arguments; null where they could not be read or judged.
    pub arguments: Value,
    /// The commitment to them, where there is one.
    pub digest: Option<String>,
    /// Bytes of their canonical form.
    pub bytes: u64,
    /// Whether people must say yes to the call first.
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
    /// Which way it goes.
    pub channel: Channel,
    /// The tool's name, the model path, or `host:port`.
    pub target: String,
    /// What it may change.
    pub effect: Option<SideEffect>,
    /// Digest of the upstream's definition of an MCP tool.
    pub definition: Option<String>,
    /// The commitment to the request, hex.
    pub request_digest: Option<String>,
    /// Bytes of the request.
    pub request_bytes: u64,
    /// The idempotency key under which it is made.
    pub key: Option<String>,
    /// The approvals by which it is made.
    pub approvals: Vec<String>,
    /// The pack's reasons for which people have approved it.
    pub because: Vec<String>,
    /// In a rollback: the call that it undoes.
    pub undoes: Option<String>,
    /// What a tool's call is judged by where it is put in order.
    pub judged: Option<Judged>,
    /// The rules that were asked and allowed it; the budgets are added.
    pub rules: Vec<Rule>,
    /// The model that is asked, as it may be recorded.
    pub model: Option<String>,
    /// What to set aside.
    pub reserve: Spent,
}

/// A call that may leave: its intent is stored, or spooled where a tool reads or a model is asked. Dropped without an outcome, it records that nobody knows.
pub struct Permit {
    gate: Arc<Gate>,
    /// The intent's sequence number.
    pub intent: u64,
    reserved: Spent,
    /// Whether it leaves once its intent is witnessed.
    early: bool,
    settled: bool,
}

/// What became of a call.
#[derive(Clone, Debug)]
pub struct Settlement {
    /// Whether its effect took place.
    pub effect: Effect,
    /// The rule by which it failed, if so.
    pub rule: Option<Rule>,
    /// The upstream's HTTP status; 0 without one.
    pub status: u16,
    /// The commitment to the reply, hex.
    pub response_digest: Option<String>,
    /// Bytes of the reply.
    pub response_bytes: u64,
    /// Bytes that the agent sent through a tunnel.
    pub sent_bytes: Option<u64>,
    /// What it took by the reply's account; the reservation where that is absent.
    pub spent: Option<Spent>,
    /// Whom the gateway has dialled.
    pub upstream: Option<Peer>,
    /// How sensitive the result is that the agent gets.
    pub sensitivity: Sensitivity,
    /// The commitment to the arguments that undo it, once they are kept.
    pub undone_by: Option<String>,
}

impl Settlement {
    /// A call whose fate is unknown.
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

    /// A call that certainly did nothing, and cost nothing.
    pub fn not_applied(rule: Rule) -> Self {
        Self { effect: Effect::NotApplied, spent: Some(Spent::default()), ..Self::unknown(Some(rule)) }
    }
}

/// A policy, compiled.
pub struct Compiled {
    /// What contracts say to calls.
    pub contracts: Contracts,
    /// What the pack says to them.
    pub guard: Guard,
    /// What contracts say of results.
    pub outputs: Outputs,
}

/// Decides over calls and keeps their records.
pub struct Gate {
    policy: Compiled,
    redactor: Redactor,
    /// Locked before the journal, never after it.
    rates: Mutex<Rates>,
    once: Once,
    salt: Salt,
    journal: Arc<Journal>,
    link: Arc<Link>,
    clock: Arc<Clock>,
    approvals: Arc<Approvals>,
    stopped: Mutex<Option<Denial>>,
    results: Mutex<Arc<Results>>,
    flood: Mutex<Flood>,
    refused_enough: Notify,
    places: Arc<Semaphore>,
    room: Room,
    /// Whoever has it is the next whose model call is paid for.
    turn: tokio::sync::Mutex<()>,
    /// Told each time that a model call has settled what was held for it.
    settled: Notify,
    /// What goes on though nobody waits for it, and ends when calls are denied.
    behind: TaskTracker,
    over: CancellationToken,
}

impl Gate {
    /// A gate whose wall time runs by this clock.
    pub fn new(
        policy: Compiled,
        once: Once,
        salt: Salt,
        journal: Arc<Journal>,
        link: Arc<Link>,
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

    /// Has something judged on a thread of its own: whatever is not quick, and whatever is long.
    ///
    /// # Errors
    /// [`Rule::Busy`] if there is no answer in time.
    pub async fn apart<T: Send + 'static>(
        self: &Arc<Self>,
        time: Duration,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Result<T, Denial> {
        let gate = self.clone();
        let judged = apart::judge(&self.places, time.min(apart::LONGEST), move || work(&gate)).await;
        judged.map_err(|unjudged| Denial { rule: Rule::Busy, reason: unjudged.to_string() })
    }

    /// Decides over a tool call by what is known now: here, where that takes microseconds, or else apart. `length` is in how many bytes the
    /// arguments came.
    pub async fn decide(self: &Arc<Self>, tool: &str, arguments: Value, length: usize) -> Decided {
        if length <= quick::SHORT && self.policy.contracts.is_quick(tool) {
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

    /// What contract and pack say to a call now, for [`Gate::permit`] to take.
    ///
    /// # Errors
    /// [`Rule::Busy`] if there is no answer in time.
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

    /// Whether people must say yes by the contract, and what the pack says.
    fn answer(
        &self,
        tool: &Tool,
        effect: SideEffect,
        arguments: &Value,
        (usage, seen, results): (Usage, Sensitivity, &Results),
    ) -> Result<(bool, Passed), Denial> {
        // How many refusals there were is looked at where calls are decided over, and where they are put in order.
        let known = Known { usage, ignored: 0, results };
        let by_contract = self.policy.contracts.again(&tool.name, arguments, known)?;
        Ok((by_contract, self.policy.guard.judge(Asked { tool, effect, usage, seen }, arguments)?))
    }

    /// Whether calls of a tool with arguments of this length are judged where they are put in order.
    fn is_quick(&self, tool: &str, length: usize) -> bool {
        length <= quick::SHORT && self.policy.contracts.is_quick(tool) && self.policy.guard.is_quick()
    }

    /// As [`Gate::permit`], for a tool's call with arguments of this length: what takes time is judged before, and again as long as what it
    /// is judged by changes meanwhile. Nothing that others need is held for that.
    ///
    /// # Errors
    /// The rule that refuses it.
    pub async fn permit_tool(
        self: &Arc<Self>,
        mut call: Call,
        arguments: Value,
        length: usize,
        time: Duration,
    ) -> Result<Permit, Denial> {
        let arguments = Arc::new(arguments);
        let mut judged = Judged { arguments: arguments.clone(), found: None, in_order: None };
        if self.is_quick(&call.target, length) {
            // Microseconds, however busy the machine is.
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

    /// What was found of a call, if it is what would be found now.
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

    /// The compiled output schemas.
    pub fn outputs(&self) -> &Outputs {
        &self.policy.outputs
    }

    /// The compiled contracts.
    pub fn contracts(&self) -> &Contracts {
        &self.policy.contracts
    }

    /// What the pack says to calls.
    pub fn guard(&self) -> &Guard {
        &self.policy.guard
    }

    /// What the pack says to a call now. It is asked again where the call's intent is put in order.
    ///
    /// # Errors
    /// The rule that refuses it.
    pub async fn judge(
        self: &Arc<Self>,
        tool: &Tool,
        effect: SideEffect,
        arguments: &Value,
        length: usize,
    ) -> Result<Passed, Denial> {
        let judge = move |gate: &Self, tool: &Tool, arguments: &Value| {
            let (usage, seen) = gate.journal.look(|task| (task.usage(), task.seen()));
            gate.policy.guard.judge(Asked { tool, effect, usage, seen }, arguments)
        };
        if self.policy.guard.is_silent() || (length <= quick::SHORT && self.policy.guard.is_quick()) {
            return judge(self, tool, arguments);
        }
        let (of, arguments) = (tool.clone(), arguments.clone());
        self.apart(Bounds::of(tool).time, move |gate| judge(gate, &of, &arguments)).await?
    }

    /// What this task undoes, if it is a rollback.
    pub fn rollback_plan(&self) -> Option<Plan> {
        self.journal.look(|task| task.rollback().map(|undoing| undoing.plan.clone()))
    }

    /// Whether this task is a rollback.
    pub fn is_rollback(&self) -> bool {
        self.journal.look(|task| task.rollback().is_some())
    }

    /// Where a step of the rollback stands, if this task is one.
    pub fn standing(&self, undoes: &str) -> Option<Standing> {
        self.journal.look(|task| task.rollback().map(|undoing| undoing.standing(undoes)))
    }

    /// The log.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The connection to the gateway.
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Denies everything from now on. The first reason stays.
    pub fn stop(&self, rule: Rule, reason: &str) {
        let mut stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        stopped.get_or_insert_with(|| Denial { rule, reason: reason.to_owned() });
        drop(stopped);
        self.over.cancel();
    }

    /// Returns once everything is denied.
    pub fn over(&self) -> impl Future<Output = ()> + Send + use<> {
        self.over.clone().cancelled_owned()
    }

    /// Has something go on though nobody waits for it. It ends when [`Gate::over`] returns.
    pub fn behind(&self, work: impl Future<Output = ()> + Send + 'static) {
        // Without a runtime the process is ending, and what was set aside stays spent.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            self.behind.spawn_on(work, &runtime);
        }
    }

    /// Waits until all that goes on behind has ended, once everything is denied.
    pub async fn nothing_behind(&self) {
        self.behind.close();
        self.behind.wait().await;
    }

    /// Room for bodies.
    pub fn room(&self) -> &Room {
        &self.room
    }

    /// What commitments are made with.
    pub fn salt(&self) -> &Salt {
        &self.salt
    }

    /// What takes out of a text what is not recorded.
    pub fn redactor(&self) -> &Redactor {
        &self.redactor
    }

    /// Calls by their idempotency keys.
    pub fn once(&self) -> &Once {
        &self.once
    }

    /// Where people are asked.
    pub fn approvals(&self) -> &Arc<Approvals> {
        &self.approvals
    }

    /// Decides over a tool call by what is known now, on this thread.
    fn decide_here(&self, tool: &str, arguments: Arguments<'_>) -> Decision<'_> {
        let results = self.results();
        let (usage, ignored) = self.journal.look(|task| (task.usage(), task.ignored()));
        let known = Known { usage, ignored, results: &results };
        let decision = self.policy.contracts.decide(tool, arguments, known, &self.salt);
        match self.running() {
            Ok(()) => decision,
            Err(denial) => Decision { verdict: Err(denial), ..decision },
        }
    }

    /// Keeps what a tool answered, for preconditions of later calls to look at.
    pub fn keep(&self, tool: &str, result: &serde_json::Value) {
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(with) = self.policy.contracts.with_result(&results, tool, result) {
            *results = Arc::new(with);
        }
    }

    /// Returns once so many calls were refused that the task is over.
    pub async fn refused_enough(&self) {
        self.refused_enough.notified().await;
    }

    /// Whether calls are taken at all.
    ///
    /// # Errors
    /// Why not.
    pub fn open(&self) -> Result<(), Denial> {
        self.running()?;
        Ok(self.journal.open()?)
    }

    /// Waits, in the order of those who ask, for what would fit but for what calls under way hold. What can never fit does not wait.
    async fn turn_for(&self, asked: Spent) -> tokio::sync::MutexGuard<'_, ()> {
        /// How often it is looked at anew whether the attempt still runs.
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

    /// Whether the attempt goes on; refusals aside, which the journal counts under its lock.
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

    /// Reserves what a call needs, records its intent and waits until that is stored; for a tool that reads and for a model, until it is
    /// spooled.
    ///
    /// # Errors
    /// The rule that refuses it. The refusal is not recorded yet: see [`Gate::deny`].
    pub async fn permit(self: &Arc<Self>, call: Call) -> Result<Permit, Denial> {
        self.journal.room().await;
        let reserved = call.reserve;
        // Until it is set aside, nobody else's is.
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

    /// Records the intent of a call, where contract, pack, rate and log let it follow.
    fn intend(&self, mut call: Call) -> Result<u64, Denial> {
        let is_tool = call.channel == Channel::Tool;
        let now = u64::try_from(self.clock.elapsed().as_millis()).unwrap_or(u64::MAX);
        // What is no tool's call does not wait for those that are judged.
        let mut rates = is_tool.then(|| self.rates.lock().unwrap_or_else(PoisonError::into_inner));
        let target = call.target.clone();
        let intent = self.journal.record(|seq, task| {
            // Asked where records are put in order: no intent can follow what stopped the attempt.
            self.running()?;
            task.budget().open()?;
            let mut rules = std::mem::take(&mut call.rules);
            rules.push(Rule::WallTime);
            let limits = self.policy.contracts.policy().limits;
            rules.extend(limits.denials.map(|_| Rule::Denials));
            let mut assessment = None;
            match call.channel {
                Channel::Tool => {
                    // That no call is left stands above when the next may be made.
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

    /// Asks contract and pack about a tool's call where its intent is put in order. Gives what the pack finds of it.
    fn judge_in_order(&self, call: &Call, task: &TaskState) -> Result<Option<Assessment>, Denial> {
        let digest = call.request_digest.as_deref();
        let unusable = |reason| Denial { rule: Rule::ToolApproval, reason };
        let by = task.approvals().usable(&call.approvals, &call.target, digest).map_err(unusable)?;
        let tool = self.policy.contracts.policy().tool(&call.target);
        let judged = tool.zip(call.effect).zip(call.judged.as_ref());
        let Some(((tool, effect), judged)) = judged else {
            let reason = format!("no contract of this task has a tool {:?}", shorten(&call.target));
            return Err(Denial { rule: Rule::ToolKnown, reason });
        };
        // Much may have been called since it was decided over: in the time that a listing, a twin or people took.
        let results = self.results();
        let now_known = (task.usage(), task.seen(), &results);
        let found = judged.found.as_deref().and_then(|found| self.still(&call.target, found, now_known));
        let (by_contract, passed) = match (found, judged.in_order) {
            (Some(found), _) => found.answer.clone()?,
            // Everybody waits for this: it is short, or not done here.
            (None, Some(allowance)) => meter::within(allowance, || {
                let answer = self.answer(tool, effect, &judged.arguments, (task.usage(), task.seen(), &results));
                let changed = |_| Denial { rule: Rule::Busy, reason: CHANGED.to_owned() };
                meter::ended_by_itself().map_err(changed).and(answer)
            })?,
            (None, None) => return Err(Denial { rule: Rule::Busy, reason: CHANGED.to_owned() }),
        };
        if by_contract && !by.contains(&AskedBy::Contract) {
            return Err(unusable("the contract requires approval by now; make the call again to ask for it".into()));
        }
        // What has happened since people were asked may be a reason that they have not seen.
        let asked_for = |because: &&String| by.contains(&AskedBy::Pack) && call.because.contains(because);
        if let Some(because) = passed.because.iter().find(|because| !asked_for(because)) {
            return Err(unusable(format!(
                "the pack requires approval by now, for {because}; make the call again to ask for it"
            )));
        }
        if let Some((key, of)) = call.key.as_deref().zip(tool.idempotency.as_ref()) {
            Once::free(task.ledger(), &call.target, of, key, digest.unwrap_or_default())?;
        }
        Ok(passed.assessment)
    }

    /// Records what a read has told of a call whose fate was unknown.
    ///
    /// # Errors
    /// If the log has ended.
    pub fn resolve(&self, call: &str, effect: Effect, by: u64) -> Result<(), Denial> {
        let resolved = Resolved { call: call.to_owned(), effect, by: call_id(by) };
        self.journal.record(|_, _| Ok(Event::Resolved(resolved))).map(|_| ())
    }

    /// Records a refusal, and gives it back for the agent to be told. Once too many were refused, that is the reason.
    pub async fn deny(&self, channel: Channel, target: &str, digest: Option<String>, denial: Denial) -> Denial {
        self.journal.room().await;
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
            Counted::Alone(denied) => self.count(denied).unwrap_or(denial),
            Counted::With(due) => {
                let limit = self.policy.contracts.policy().limits.denials;
                let counted = self.journal.look(|task| task.usage().denials.saturating_sub(task.ignored()));
                let reached = |limit| counted.saturating_add(self.flood().waiting()) >= limit;
                if limit.is_some_and(reached) {
                    self.count_waiting(None);
                } else {
                    tokio::time::sleep_until(due.into()).await;
                    // Whoever comes first does it for all.
                    self.count_waiting(Some(Instant::now()));
                }
                let above = self.journal.failure().or_else(|| self.journal.open().err().map(Denial::from));
                above.unwrap_or(denial)
            }
        }
    }

    /// Records the refusals that share a record: those whose time is over, or all.
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

    /// Records refusals; gives the reason that stands above theirs, once so many were refused that the task is over.
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
            // As it is recorded, for those who read the harness's own log.
            let Denied { channel, target, rule, reason, count, .. } = &denied;
            tracing::info!(channel = channel.as_str(), target, %rule, reason, count, "refused");
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

    /// Stops everything if the repeated probe saw that the pod is not contained any more, and records what it saw.
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
    /// What commitments are made with.
    pub fn salt(&self) -> &Salt {
        &self.gate.salt
    }

    /// Records what became of the call, and settles its reservation.
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
            // The less time, the less often it is not known what a call has changed.
            Ok(outcome) => self.gate.journal.soon(outcome),
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
mod tests;
