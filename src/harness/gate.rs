//! The pipeline that every call goes through: decide, reserve, record, store, send, record.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use super::{approvals::Approvals, clock::Clock, journal::Journal, link::Link, once::Once};
use crate::{
    evidence::record::{Channel, Containment, Denied, Effect, Event, Intent, Outcome},
    policy::{
        budget::{Budget, Spent},
        config::SideEffect,
        decide::{Arguments, Contracts, Decision, Denial, Known, Results, shorten},
        output::Outputs,
        quota::Quotas,
        rule::Rule,
    },
};

/// A call before it leaves.
#[derive(Clone, Debug)]
pub struct Call {
    /// Which way it goes.
    pub channel: Channel,
    /// The tool's name, the model path, or `host:port`.
    pub target: String,
    /// What it may change.
    pub effect: Option<SideEffect>,
    /// Digest of the upstream's definition of an MCP tool.
    pub definition: Option<String>,
    /// SHA-256 of the request, hex.
    pub request_digest: Option<String>,
    /// Bytes of the request.
    pub request_bytes: u64,
    /// The idempotency key under which it is made.
    pub key: Option<String>,
    /// The approval by which it is made.
    pub approval: Option<String>,
    /// The rules that were asked and allowed it; the budgets are added.
    pub rules: Vec<Rule>,
    /// The model that is asked, as the request names it.
    pub model: Option<String>,
    /// What to set aside.
    pub reserve: Spent,
}

/// A call that may leave: its intent is stored. Dropped without an outcome, it records that nobody knows.
pub struct Permit {
    gate: Arc<Gate>,
    /// The intent's sequence number.
    pub intent: u64,
    key: Option<String>,
    reserved: Spent,
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
    /// SHA-256 of the reply, hex.
    pub response_digest: Option<String>,
    /// Bytes of the reply.
    pub response_bytes: u64,
    /// What it took by the reply's account; the reservation where that is absent.
    pub spent: Option<Spent>,
    /// The address that the gateway dialled.
    pub upstream: Option<String>,
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
            spent: None,
            upstream: None,
        }
    }

    /// A call that certainly did nothing, and cost nothing.
    pub fn not_applied(rule: Rule) -> Self {
        Self { effect: Effect::NotApplied, spent: Some(Spent::default()), ..Self::unknown(Some(rule)) }
    }
}

/// What a gate goes on from: what the log says of the task so far.
pub struct Kept {
    /// Calls of each tool.
    pub quotas: Quotas,
    /// Calls by their idempotency keys.
    pub once: Once,
}

/// Decides over calls and keeps their records.
pub struct Gate {
    contracts: Contracts,
    outputs: Outputs,
    /// Changed only while the journal puts a record in order, as budgets are.
    quotas: Mutex<Quotas>,
    once: Once,
    journal: Arc<Journal>,
    link: Arc<Link>,
    clock: Arc<Clock>,
    approvals: Arc<Approvals>,
    stopped: Mutex<Option<Denial>>,
    results: Mutex<Arc<Results>>,
    refused_enough: Notify,
}

impl Gate {
    /// A gate whose wall time runs by this clock.
    pub fn new(
        contracts: Contracts,
        outputs: Outputs,
        kept: Kept,
        journal: Arc<Journal>,
        link: Arc<Link>,
        clock: Arc<Clock>,
        approvals: Arc<Approvals>,
    ) -> Self {
        let results = Mutex::new(Arc::new(contracts.no_results()));
        Self {
            contracts,
            outputs,
            quotas: Mutex::new(kept.quotas),
            once: kept.once,
            journal,
            link,
            clock,
            approvals,
            stopped: Mutex::default(),
            results,
            refused_enough: Notify::new(),
        }
    }

    /// The compiled output schemas.
    pub fn outputs(&self) -> &Outputs {
        &self.outputs
    }

    /// The compiled contracts.
    pub fn contracts(&self) -> &Contracts {
        &self.contracts
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
    }

    /// Calls by their idempotency keys.
    pub fn once(&self) -> &Once {
        &self.once
    }

    /// Where people are asked.
    pub fn approvals(&self) -> &Arc<Approvals> {
        &self.approvals
    }

    /// Decides over a tool call by what is known now.
    pub fn decide(&self, tool: &str, arguments: Arguments<'_>) -> Decision<'_> {
        let results = self.results.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let known = Known { usage: self.journal.usage(), results: &results };
        let decision = self.contracts.decide(tool, arguments, known);
        match self.running() {
            Ok(()) => decision,
            Err(denial) => Decision { verdict: Err(denial), ..decision },
        }
    }

    /// Keeps what a tool answered, for preconditions of later calls to look at.
    pub fn keep(&self, tool: &str, result: &serde_json::Value) {
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(with) = self.contracts.with_result(&results, tool, result) {
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

    /// Whether the attempt goes on; refusals aside, which the journal counts under its lock.
    fn running(&self) -> Result<(), Denial> {
        if let Some(denial) = &*self.stopped.lock().unwrap_or_else(PoisonError::into_inner) {
            return Err(denial.clone());
        }
        if self.clock.is_over() {
            let limit = self.contracts.policy().limits.wall_time_seconds;
            return Err(Denial { rule: Rule::WallTime, reason: format!("the attempt's {limit} s are over") });
        }
        Ok(())
    }

    /// Reserves what a call needs, records its intent and waits until that is stored.
    ///
    /// # Errors
    /// The rule that refuses it. The refusal is not recorded yet: see [`Gate::deny`].
    pub async fn permit(self: &Arc<Self>, mut call: Call) -> Result<Permit, Denial> {
        self.journal.room().await;
        let (reserved, key) = (call.reserve, call.key.clone());
        let intent = self.journal.record(|seq, budget| {
            // Asked where records are put in order: no intent can follow what stopped the attempt.
            self.running()?;
            budget.open()?;
            let limits = budget.limits();
            let mut rules = std::mem::take(&mut call.rules);
            rules.push(Rule::WallTime);
            rules.extend(limits.denials.map(|_| Rule::Denials));
            match call.channel {
                Channel::Tool => rules.extend(self.reserve_tool_call(&call, seq, budget)?),
                Channel::Model => {
                    budget.reserve_model(reserved.tokens, reserved.cost_micros)?;
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
                key: call.key.clone(),
                approval: call.approval,
                rules,
                model: call.model.as_deref().map(shorten),
                reserved_tokens: reserved.tokens,
                reserved_cost_micros: reserved.cost_micros,
            }))
        })?;
        let permit = Permit { gate: self.clone(), intent, key, reserved, settled: false };
        match self.journal.stored(intent).await {
            Ok(()) => Ok(permit),
            Err(denial) => {
                permit.settle(Settlement::not_applied(denial.rule));
                Err(denial)
            }
        }
    }

    /// Takes a tool call's place in the budget, its quota, its idempotency key and its approval: all of them, or none. Gives the rules
    /// that this asked. Called while the journal puts a record in order.
    fn reserve_tool_call(&self, call: &Call, seq: u64, budget: &mut Budget) -> Result<Vec<Rule>, Denial> {
        let digest = call.request_digest.as_deref();
        let mut quotas = self.quotas.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut approvals, mut ledger) = (self.approvals.log(), self.once.ledger());
        let under = call.key.as_deref().zip(self.contracts.idempotency(&call.target));
        let unusable = |reason| Denial { rule: Rule::ToolApproval, reason };

        let now = u64::try_from(self.clock.elapsed().as_millis()).unwrap_or(u64::MAX);
        quotas.check(&call.target, now)?;
        if let Some(name) = &call.approval {
            approvals.usable(name, &call.target, digest).map_err(unusable)?;
        }
        if let Some((key, of)) = under {
            Once::free(&ledger, &call.target, of, key, digest.unwrap_or_default())?;
        }
        budget.reserve_tool_call()?;

        quotas.take(&call.target, now);
        if let Some(name) = &call.approval {
            approvals.used(name, &call.target, digest).map_err(unusable)?;
        }
        if let Some((key, _)) = under {
            let time = format!("{:.3}", jiff::Timestamp::now());
            ledger.intend(key, &call_id(seq), digest.unwrap_or_default(), &time);
        }
        Ok(under.map(|_| Rule::ToolIdempotency).into_iter().chain([Rule::ToolCalls]).collect())
    }

    /// Records a refusal, and gives it back for the agent to be told. Once too many were refused, that is the reason.
    pub async fn deny(&self, channel: Channel, target: &str, digest: Option<String>, mut denial: Denial) -> Denial {
        self.journal.room().await;
        let mut over = false;
        let record = self.journal.record(|_, budget| {
            if let Err(spent) = budget.open() {
                denial = spent.into();
            }
            budget.count_denial();
            over = budget.open().is_err();
            Ok(Event::Denied(Denied {
                channel,
                target: shorten(target),
                rule: denial.rule,
                reason: denial.reason.clone(),
                request_digest: digest,
            }))
        });
        if let Err(failed) = record {
            tracing::error!(reason = failed.reason, "a refusal could not be recorded; the log has ended");
        }
        if over {
            self.refused_enough.notify_one();
        }
        denial
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
    /// Records what became of the call, and settles its reservation.
    pub fn settle(mut self, settlement: Settlement) {
        self.record(settlement);
    }

    fn record(&mut self, settlement: Settlement) {
        self.settled = true;
        let reserved = self.reserved;
        let spent = settlement.spent.unwrap_or(reserved);
        let result = self.gate.journal.record(|_, budget| {
            budget.settle_model(reserved, spent);
            if let Some(key) = &self.key {
                self.gate.once.ledger().settle(key, &call_id(self.intent), settlement.effect.fate());
            }
            Ok(Event::Outcome(Outcome {
                call: call_id(self.intent),
                effect: settlement.effect,
                rule: settlement.rule,
                status: settlement.status,
                response_digest: settlement.response_digest,
                response_bytes: settlement.response_bytes,
                tokens: spent.tokens,
                cost_micros: spent.cost_micros,
                upstream: settlement.upstream,
            }))
        });
        if let Err(denial) = result {
            tracing::error!(intent = self.intent, reason = denial.reason, "an outcome could not be recorded");
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

/// The name of a call: unique in the log, as sequence numbers are.
pub fn call_id(intent: u64) -> String {
    format!("c{intent}")
}
