//! Permits: a call is put in order, its intent is recorded and stored, and later its outcome is recorded.
//!
//! Guarantees: a call has a permit only if its intent is stored, or spooled for a tool read or a model call. Everything that may deny the
//! call is checked at the intent's place in the log, whatever was decided before. A permit that is dropped without an outcome records an
//! unknown outcome. While a slow evaluation runs, no lock is held that other calls need.
//!
//! Non-goals: the record of a denial, see [`Gate::deny`].

use std::{sync::Arc, time::Duration};

use serde_json::Value;

use super::{
    Gate,
    call::{Call, Settlement},
    evaluation::{CHANGED, Judged, Verdict},
};
use crate::{
    evidence::{
        record::{Channel, Event, Intent, Outcome},
        state::TaskState,
    },
    harness::{dedup::Deduplicator, journal::call_id},
    policy::{
        access::Assessment,
        approval::ApprovalSource,
        budget::{Fits, Spent},
        commit::Salt,
        decide::Denial,
        meter::Allowance,
        rule::Rule,
        shorten::shorten,
    },
};

/// The number of times that a call with a slow evaluation is evaluated.
const ROUNDS: usize = 8;
/// The first round in which a call may use a short allowance where records are put in order.
const PATIENT: usize = 2;

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
            outcome: settlement.outcome,
            rule: settlement.rule,
            status: settlement.status,
            response_commitment: settlement.response_commitment,
            response_bytes: settlement.response_bytes,
            sent_bytes: settlement.sent_bytes,
            tokens: spent.tokens,
            cost_micros: spent.cost_micros,
            upstream,
            certificate,
            sensitivity: settlement.sensitivity,
            compensation_commitment: settlement.compensation_commitment,
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

impl Gate {
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
        let (target, side_effect, arguments) = (call.target.clone(), call.side_effect, arguments.clone());
        let found = self.apart(time, move |gate| {
            let results = gate.policy.results();
            let (usage, seen) = gate.journal.look(|task| (task.usage(), task.seen()));
            gate.policy.evaluate(&target, side_effect, &arguments, (usage, seen, results)).map(Arc::new)
        });
        found.await
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
        if self.policy.is_bounded_cost(&call.target, length) {
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
        let early = call.channel.leaves_witnessed(call.side_effect);
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
        let mut rates = is_tool.then(|| self.rates.lock());
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
                side_effect: call.side_effect,
                definition_digest: call.definition,
                request_commitment: call.request_commitment,
                request_bytes: call.request_bytes,
                idempotency_key: call.key,
                approvals: call.approvals,
                compensates: call.compensates,
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
        let digest = call.request_commitment.as_deref();
        let unusable = |reason| Denial { rule: Rule::ToolApproval, reason };
        let by = task.approvals().usable(&call.approvals, &call.target, digest).map_err(unusable)?;
        let tool = self.policy.contracts.policy().tool(&call.target);
        let judged = tool.zip(call.side_effect).zip(call.judged.as_ref());
        let Some(((tool, side_effect), judged)) = judged else {
            let reason = format!("no contract of this task has a tool {:?}", shorten(&call.target));
            return Err(Denial { rule: Rule::ToolUnknown, reason });
        };
        let known = (task.usage(), task.seen());
        let (by_contract, passed) = self.policy.answer_in_order(tool, side_effect, judged, known)?;
        if by_contract && !by.contains(&ApprovalSource::Contract) {
            return Err(unusable("the contract requires approval by now; make the call again to ask for it".into()));
        }
        // What happened after the approval was requested may be a reason that the approvers have not seen.
        let asked_for = |reason: &&String| by.contains(&ApprovalSource::Pack) && call.reasons.contains(reason);
        if let Some(reason) = passed.reasons.iter().find(|reason| !asked_for(reason)) {
            return Err(unusable(format!(
                "the pack requires approval by now, for {reason}; make the call again to ask for it"
            )));
        }
        if let Some((key, of)) = call.key.as_deref().zip(tool.idempotency.as_ref()) {
            Deduplicator::free(task.ledger(), &call.target, of, key, digest.unwrap_or_default())?;
        }
        Ok(passed.assessment)
    }
}
