//! Calls: what an intent requires, what an outcome settles, and what a replay and a resolution may say.

use std::sync::Arc;

use jiff::Timestamp;

use super::{Findings, LogRule, TaskState, Unknown};
use crate::{
    canonical,
    evidence::{
        fits,
        record::{CallOutcome, Channel, Intent, Outcome, Record, Replayed, Resolved},
        rollback::{self, Leaving},
    },
    policy::{
        access::{AccessRequest, Assessment},
        approval::ApprovalSource,
        budget::Spent,
        config::{HttpUpstream, Idempotency, Sensitivity, SideEffect, Upstream, Usage},
        ledger::{self, Found},
    },
};

/// The number of intents to which other records can refer, where memory is bounded. A harness has a handful of open calls at a time, and
/// keeps MCP sessions under the intents that opened them.
const RECENT: usize = 4096;
/// The maximum number of open intents. Each takes memory until its outcome.
const OPEN: usize = 4096;
/// The maximum number of tools that are counted. A task may name fewer.
const TOOLS: usize = 4096;
/// The maximum number of calls with an unknown outcome that a read can resolve, where memory is bounded.
const UNKNOWN: usize = 65_536;
/// The maximum length in bytes of the name of a call, a target, a key or a definition.
const NAME: usize = 4096;

/// A call that has an intent, with the state of its attempt and its task before the intent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IntentFacts {
    /// The sequence number of the intent.
    pub seq: u64,
    /// The name of the call.
    pub call: String,
    /// The attempt that makes the call.
    pub attempt: i64,
    /// The channel.
    pub channel: Channel,
    /// The target.
    pub target: String,
    /// The side effect.
    pub side_effect: Option<SideEffect>,
    /// The digest of the upstream's definition of an MCP tool.
    pub definition: Option<String>,
    /// The commitment to the request.
    pub request_commitment: Option<String>,
    /// The idempotency key of the call.
    pub key: Option<String>,
    /// The names of the call's approvals.
    pub approvals: Vec<String>,
    /// The requested model, in the form in which it may be recorded.
    pub model: Option<String>,
    /// The tokens and the cost reserved for the call.
    pub reserved: Spent,
    /// What the pack found about the call.
    pub assessment: Option<Assessment>,
    /// The digest of the policy under which the attempt runs.
    pub policy: Arc<str>,
    /// The upstream of an HTTP tool, by that policy.
    pub http: Option<Arc<HttpUpstream>>,
    /// The call that it compensates.
    pub compensates: Option<Compensates>,
    /// The counters before the call.
    pub usage: Usage,
    /// The most sensitive data that the task had handled before the call.
    pub seen: Sensitivity,
    /// Whether the call still waits for its outcome.
    pub open: bool,
    /// What its outcome says.
    pub became: Option<CallOutcome>,
}

impl IntentFacts {
    /// Returns whether the call may be sent before its intent is stored in the bucket.
    pub fn leaves_witnessed(&self) -> bool {
        self.channel.leaves_witnessed(self.side_effect)
    }

    /// Returns whether no contract says that the call changes something.
    pub fn changes_nothing(&self) -> bool {
        !matches!(self.side_effect, Some(SideEffect::Write | SideEffect::External))
    }
}

/// A call of another task that a call compensates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compensates {
    /// The name of the compensated call.
    pub call: String,
    /// Until when it may be compensated, RFC 3339.
    pub until: Option<String>,
}

impl Unknown {
    /// Returns the entry of a call whose outcome is unknown since a record.
    pub(super) fn of(call: &IntentFacts, since: u64) -> Self {
        Self { target: call.target.clone(), key: call.key.clone(), since }
    }
}

/// Returns a fingerprint of a call's name, the first 128 bits of its SHA-256, which distinguishes it from other names.
fn print(call: &str) -> u128 {
    canonical::sha256(call.as_bytes()).first_chunk().map_or(0, |first| u128::from_be_bytes(*first))
}

impl TaskState {
    pub(super) fn check_intent(&self, time: Timestamp, intent: &Intent, found: &mut Findings<'_>) {
        self.check_bounds(intent, found);
        let Intent { call, channel, target, reserved_tokens: tokens, reserved_cost_micros: cost, .. } = intent;
        found.expect(LogRule::CallReservation, *tokens >= 0 && *cost >= 0, || {
            format!("expected a reservation of at least 0, found {tokens} tokens and a cost of {cost}")
        });
        found.expect(LogRule::CallUnique, !self.named.contains_key(&print(call)), || {
            format!("expected one intent of call {call}, found a second")
        });
        found.expect(LogRule::ContainmentLost, !self.containment_lost, || {
            "expected no call after the containment was lost, found one".to_owned()
        });
        let is_tool = *channel == Channel::Tool;
        found.expect(
            LogRule::CallAccess,
            is_tool || (intent.assessment.is_none() && intent.approvals.is_empty()),
            || "expected an assessment and approvals in tool calls only, found one in another call".to_owned(),
        );
        let Some(policy) = self.config() else { return };
        self.check_limits(intent, found);
        if let Some(problem) = fits::misfit(intent, policy).or_else(|| fits::mispriced(intent, policy)) {
            found.violated(LogRule::CallPolicy, problem);
        }
        self.check_key(time, intent, found);
        found.expect_ok(LogRule::RollbackCall, rollback::lets(self.rollback(), self.leaving(intent), time));
        if !is_tool {
            return;
        }
        if let Some((first, definition)) = self.definition(target).zip(intent.definition_digest.as_ref()) {
            found.expect(LogRule::CallDefinition, first == definition, || {
                format!(
                    "expected the definition {first} of {target}, as in the first call of the attempt, found {definition}"
                )
            });
        }
        if let Some(assessment) = &intent.assessment {
            let (expected, seen) = (self.seen.as_str(), assessment.seen.as_str());
            found.expect(LogRule::DataSeen, assessment.seen == self.seen, || {
                format!("expected {expected} as the sensitivity of the data that the task has seen, found {seen}")
            });
        }
        self.check_approved(intent, found);
    }

    /// Checks the bounds that keep a hostile harness from filling the memory of readers.
    fn check_bounds(&self, intent: &Intent, found: &mut Findings<'_>) {
        let names = [
            Some(&intent.call),
            Some(&intent.target),
            intent.idempotency_key.as_ref(),
            intent.definition_digest.as_ref(),
        ];
        found.expect(LogRule::CallBounds, names.into_iter().flatten().all(|name| name.len() <= NAME), || {
            format!("expected names of at most {NAME} bytes")
        });
        found.expect(LogRule::CallBounds, self.open_calls.len() < OPEN, || {
            format!("expected at most {OPEN} calls without an outcome")
        });
        let counted = self.tools.len() < TOOLS || self.tools.contains_key(&intent.target);
        found.expect(LogRule::CallBounds, intent.channel != Channel::Tool || counted, || {
            format!("expected at most {TOOLS} tools")
        });
    }

    /// Checks the limits of the task and of the contract.
    fn check_limits(&self, intent: &Intent, found: &mut Findings<'_>) {
        let budget = self.budget();
        if intent.channel == Channel::Tool {
            found.expect_ok(LogRule::LimitToolCalls, budget.clone().reserve_tool_call().map_err(|e| e.to_string()));
            found.expect_ok(LogRule::LimitTool, self.calls_left(&intent.target));
        }
        // A reply may have cost more than was left. After that, only calls that reserve more are denied.
        let (tokens, cost) = (intent.reserved_tokens, intent.reserved_cost_micros);
        for (rule, tokens, cost) in [(LogRule::LimitTokens, tokens, 0), (LogRule::LimitCost, 0, cost)] {
            if tokens > 0 || cost > 0 {
                found.expect_ok(rule, budget.clone().reserve_model(tokens, cost).map_err(|e| e.to_string()));
            }
        }
        found.expect_ok(LogRule::LimitDenials, budget.open().map_err(|e| e.to_string()));
    }

    /// Checks that the contract of a tool allows one more call over the task.
    ///
    /// # Errors
    /// Returns how many calls the contract allows, and how many are made.
    pub fn calls_left(&self, tool: &str) -> Result<(), String> {
        let most = self.tool(tool).and_then(|tool| tool.limits.calls);
        let made = self.tools.get(tool).map_or(0, |used| used.calls);
        match most.filter(|most| made >= *most) {
            Some(most) => Err(format!("the contract allows {most} calls in the task, and {made} were made")),
            None => Ok(()),
        }
    }

    /// Checks that a call has the key that its contract makes, and that no other call was made under this key.
    fn check_key(&self, time: Timestamp, intent: &Intent, found: &mut Findings<'_>) {
        let of = self.idempotency(&intent.target).filter(|_| intent.channel == Channel::Tool);
        let (of, key) = match (of, &intent.idempotency_key) {
            (None, None) => return,
            (Some(of), Some(key)) => (of, key),
            (of, _) => {
                let (expected, its) = if of.is_some() { ("a", "none") } else { ("no", "one") };
                return found.violated(LogRule::KeyMade, format!("expected {expected} key, found {its}"));
            }
        };
        let digest = intent.request_commitment.as_deref().unwrap_or_default();
        // A key of one argument cannot be made again from the log, because the log has no arguments.
        if of.argument.is_none() {
            let uid = self.config().map_or("", |policy| policy.task.uid.as_str());
            let expected = ledger::made_of(uid, &intent.target, digest);
            found.expect(LogRule::KeyMade, *key == expected, || {
                format!("expected the key {expected} of these arguments, found {key}")
            });
        }
        let held = self.ledger.find(key, digest, of, time);
        found.expect(LogRule::KeyFree, held == Found::Free, || {
            format!("expected no call under this key, found {held:?}")
        });
    }

    /// Checks that a tool call has the approvals that it requires, and that the pack allows it.
    fn check_approved(&self, intent: &Intent, found: &mut Findings<'_>) {
        let Intent { target, side_effect, .. } = intent;
        let given = self.approvals.usable(&intent.approvals, target, intent.request_commitment.as_deref());
        let given = found.expect_ok(LogRule::ApprovalUsed, given).unwrap_or_default();
        let needs = |by: ApprovalSource| {
            format!("expected a call of {target} with the approval that the {} requires, found none", by.as_str())
        };
        let tool = self.tool(target);
        let always = tool.and_then(|tool| tool.approval.as_ref()).is_some_and(|needs| needs.when.is_none());
        found.expect(LogRule::ApprovalByContract, !always || given.contains(&ApprovalSource::Contract), || {
            needs(ApprovalSource::Contract)
        });
        // An unknown tool is a finding of its own.
        let Some((tool, side_effect)) = tool.zip(*side_effect) else { return };
        let Some(guard) = self.policy.as_deref().and_then(|policy| policy.guard.as_ref()) else { return };
        let asked = AccessRequest { tool, side_effect, usage: self.usage, seen: self.seen };
        let passed = found.expect_ok(LogRule::CallAssessment, guard.replay(asked, intent.assessment.as_ref()));
        let by_pack = passed.is_some_and(|passed| !passed.reasons.is_empty());
        found.expect(LogRule::ApprovalByPack, !by_pack || given.contains(&ApprovalSource::Pack), || {
            needs(ApprovalSource::Pack)
        });
    }

    /// Returns the definition with which the newest attempt first called a tool.
    fn definition(&self, tool: &str) -> Option<&String> {
        self.tools.get(tool)?.definition.as_ref()
    }

    /// Returns the idempotency rule of a tool, by the newest policy.
    fn idempotency(&self, tool: &str) -> Option<&Idempotency> {
        self.tool(tool)?.idempotency.as_ref()
    }

    fn leaving<'c>(&'c self, intent: &'c Intent) -> Leaving<'c> {
        Leaving {
            channel: intent.channel,
            side_effect: intent.side_effect,
            compensates: intent.compensates.as_deref(),
            contract: self.tool(&intent.target).map_or("", |tool| &tool.contract),
            digest: intent.request_commitment.as_deref().unwrap_or_default(),
        }
    }

    pub(super) fn apply_intent(&mut self, record: &Record, intent: &Intent) {
        let facts = Arc::new(self.facts(record, intent));
        if let Some(key) = intent.idempotency_key.as_ref().filter(|_| facts.channel == Channel::Tool)
            && self.idempotency(&intent.target).is_some()
        {
            let digest = intent.request_commitment.as_deref().unwrap_or_default();
            Arc::make_mut(&mut self.ledger).intend(key, &intent.call, digest, &record.time);
        }
        if let Some((undoing, of)) = self.rollback.as_mut().zip(intent.compensates.as_ref()) {
            Arc::make_mut(undoing).intend(of, &intent.call);
        }
        self.held.tokens = self.held.tokens.saturating_add(intent.reserved_tokens.max(0));
        self.held.cost_micros = self.held.cost_micros.saturating_add(intent.reserved_cost_micros.max(0));
        if intent.channel == Channel::Tool {
            if !intent.approvals.is_empty() {
                // An approval that may not be used stays unused.
                let digest = intent.request_commitment.as_deref();
                let _ = Arc::make_mut(&mut self.approvals).used(&intent.approvals, &intent.target, digest);
            }
            let used = self.tools.entry(intent.target.clone()).or_default();
            used.calls = used.calls.saturating_add(1);
            if used.definition.is_none() {
                used.definition.clone_from(&intent.definition_digest);
            }
            if let Some(assessment) = &intent.assessment {
                self.seen = self.seen.max(assessment.arguments);
            }
        }
        // A second intent of a call changes nothing about the first.
        let print = print(&intent.call);
        if !self.named.contains_key(&print) {
            self.named.insert(print, record.seq);
            self.open_calls.insert(intent.call.clone(), facts.clone());
            self.calls.insert(record.seq, facts);
        }
        // Settled calls are removed first, because later records still refer to open calls.
        while self.is_bounded() && self.calls.len() > RECENT {
            let oldest = self.calls.iter().find(|(_, call)| !call.open).or(self.calls.iter().next());
            match oldest.map(|(seq, _)| *seq) {
                Some(seq) => self.calls.remove(&seq),
                None => break,
            };
        }
    }

    fn facts(&self, record: &Record, intent: &Intent) -> IntentFacts {
        let upstream = self.tool(&intent.target).filter(|_| intent.channel == Channel::Tool).map(|tool| &tool.upstream);
        IntentFacts {
            seq: record.seq,
            call: intent.call.clone(),
            attempt: record.attempt,
            channel: intent.channel,
            target: intent.target.clone(),
            side_effect: intent.side_effect,
            definition: intent.definition_digest.clone(),
            request_commitment: intent.request_commitment.clone(),
            key: intent.idempotency_key.clone(),
            approvals: intent.approvals.clone(),
            model: intent.model.clone(),
            reserved: Spent { tokens: intent.reserved_tokens, cost_micros: intent.reserved_cost_micros },
            assessment: intent.assessment.clone(),
            policy: self.policy.as_deref().map(|policy| policy.digest.clone()).unwrap_or_default(),
            http: match upstream {
                Some(Upstream::Http(http)) => Some(Arc::new(http.clone())),
                Some(Upstream::Mcp(_)) | None => None,
            },
            compensates: intent.compensates.clone().map(|call| Compensates {
                until: self.rollback().and_then(|undoing| undoing.undo(&call)).and_then(|undo| undo.until.clone()),
                call,
            }),
            usage: self.usage,
            seen: self.seen,
            open: true,
            became: None,
        }
    }

    pub(super) fn check_outcome(&self, record: &Record, outcome: &Outcome, found: &mut Findings<'_>) {
        let id = &outcome.call;
        let Some(call) = self.open_calls.get(id) else {
            let message = match self.named.contains_key(&print(id)) {
                true => format!("expected one outcome of call {id}, found a second"),
                false => format!("expected an intent of call {id} before its outcome, found none"),
            };
            return found.violated(LogRule::OutcomeOpen, message);
        };
        found.expect(LogRule::OutcomeOpen, call.attempt == record.attempt, || {
            format!("expected the outcome of call {id} in attempt {}, found it in {}", call.attempt, record.attempt)
        });
        let (tokens, cost) = (outcome.tokens, outcome.cost_micros);
        found.expect(LogRule::OutcomeAmount, tokens >= 0 && cost >= 0, || {
            format!("expected tokens and a cost of at least 0, found {tokens} tokens and a cost of {cost}")
        });
        let target = &call.target;
        let tool = self.tool(target);
        let floor = tool.filter(|_| outcome.given().is_some()).map(|tool| tool.data.result).unwrap_or_default();
        found.expect(LogRule::OutcomeData, outcome.sensitivity >= floor, || {
            let (expected, found) = (floor.as_str(), outcome.sensitivity.as_str());
            format!("expected the result of {target} to be at least {expected}, found {found}")
        });
        let undoable = self.rollback.is_none() && tool.is_some_and(|tool| tool.compensation().is_some());
        let holds = outcome.compensation_commitment.is_none() || (undoable && outcome.outcome == CallOutcome::Applied);
        found.expect(LogRule::OutcomeUndo, holds, || format!("expected no compensation of {target}, found one"));
    }

    pub(super) fn apply_outcome(&mut self, record: &Record, outcome: &Outcome) {
        let Some(call) = self.open_calls.remove(&outcome.call) else { return };
        self.held.tokens = self.held.tokens.saturating_sub(call.reserved.tokens.max(0)).max(0);
        self.held.cost_micros = self.held.cost_micros.saturating_sub(call.reserved.cost_micros.max(0)).max(0);
        self.seen = self.seen.max(outcome.sensitivity);
        if let Some(key) = &call.key {
            Arc::make_mut(&mut self.ledger).settle(key, &outcome.call, outcome.outcome.fate(), outcome.given());
        }
        if let Some(undoing) = &mut self.rollback {
            Arc::make_mut(undoing).settle(&outcome.call, outcome.outcome);
        }
        self.end(&call, Some(outcome.outcome));
        // A call that was lost with its harness has an outcome after all.
        self.unknown.remove(&outcome.call);
        if outcome.outcome == CallOutcome::Unknown {
            self.lose(Unknown::of(&call, record.seq), &outcome.call);
        }
    }

    /// Marks a call as no longer waiting for its outcome.
    fn end(&mut self, call: &IntentFacts, became: Option<CallOutcome>) {
        if let Some(call) = self.calls.get_mut(&call.seq) {
            let call = Arc::make_mut(call);
            (call.open, call.became) = (false, became);
        }
    }

    /// Records that the outcome of a call is unknown. A read may resolve the call if its contract names one. Where memory is bounded, other
    /// calls are not recorded.
    pub(super) fn lose(&mut self, unknown: Unknown, call: &str) {
        let told_of = || self.tool(&unknown.target).is_some_and(|tool| tool.verify.is_some());
        if !self.is_bounded() || (self.unknown.len() < UNKNOWN && told_of()) {
            self.unknown.insert(call.to_owned(), unknown);
        }
    }

    /// Checks that a replayed result is that of the call that was made under the key.
    pub(super) fn check_replayed(&self, time: Timestamp, replayed: &Replayed, found: &mut Findings<'_>) {
        let Replayed { call, target, idempotency_key: key, request_commitment, response_commitment } = replayed;
        let held = self.idempotency(target).map(|of| self.ledger.find(key, request_commitment, of, time));
        let made = match &held {
            Some(Found::Made(made)) if made.call == *call => made,
            _ => {
                return found.violated(
                    LogRule::Replayed,
                    format!("expected call {call} of {target} to have been made under its key, found {held:?}"),
                );
            }
        };
        let expected = &made.response_commitment;
        found.expect(LogRule::Replayed, expected.as_ref() == Some(response_commitment), || {
            format!("expected the result {expected:?} of call {call}, found {response_commitment}")
        });
    }

    /// Returns the call that a read resolves. Its outcome must be unknown, in whichever attempt. The read must come after that, must have
    /// succeeded, and must be of the tool that the contract names.
    ///
    /// # Errors
    /// Returns what was expected and what was found.
    pub fn resolution(&self, resolved: &Resolved) -> Result<&Unknown, String> {
        let Resolved { call, outcome, by } = resolved;
        let wrong =
            |found: &str| format!("expected a read that resolves a call with an unknown outcome, found {found}");
        let unknown =
            self.unknown.get(call).ok_or_else(|| wrong(&format!("call {call}, whose outcome was not unknown")))?;
        let reader = self.tool(&unknown.target).and_then(|tool| tool.verify.as_ref()).map(|read| &read.tool);
        // A read that did not succeed says nothing.
        let told = self.named.get(&print(by)).and_then(|seq| self.intent(*seq)).is_some_and(|read| {
            read.seq > unknown.since
                && read.channel == Channel::Tool
                && read.became == Some(CallOutcome::Applied)
                && Some(&read.target) == reader
        });
        if !told || *outcome == CallOutcome::Unknown {
            return Err(wrong(&format!("{by}, which is not a later, applied call of {reader:?}")));
        }
        Ok(unknown)
    }

    pub(super) fn apply_resolved(&mut self, resolved: &Resolved) {
        let Resolved { call, outcome, .. } = resolved;
        let Ok(Unknown { key, .. }) = self.resolution(resolved).cloned() else { return };
        self.unknown.remove(call);
        if let Some(open) = self.open_calls.remove(call) {
            self.end(&open, None);
        }
        if let Some(key) = key {
            Arc::make_mut(&mut self.ledger).settle(&key, call, outcome.fate(), None);
        }
        if let Some(undoing) = &mut self.rollback {
            Arc::make_mut(undoing).settle(call, *outcome);
        }
    }
}
