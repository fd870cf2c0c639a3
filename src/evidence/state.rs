//! The meaning of a task's log: whether a record may follow, and what it does to the task's state.
//!
//! The rules are written once, here, for everybody who asks them: the harness before it writes a record, the witness before it signs one,
//! the verifier afterwards. [`rule`] is the table of the rules and of who asks which.
//!
//! Guarantees: [`TaskState::check`] changes nothing and finds every violation; [`TaskState::apply`] takes every record, also one that
//! violates a rule, so that one wrong record is one finding and not a hundred; a clone is cheap, because what grows is shared; a bounded
//! state ([`User::Harness`], [`User::Witness`]) takes bounded memory. Non-goals: bytes, signatures and trees (see
//! [`segment`](super::segment)); rules that need more than the log, such as the arguments of a call.

use std::{collections::BTreeMap, sync::Arc};

use imbl::{HashMap, OrdMap};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    fits,
    note::VerifierKey,
    record::{Actor, Channel, Denied, Event, Record, VERSION},
    rollback::Undoing,
};
use crate::policy::{
    access::Guard,
    approval::Approvals,
    budget::{Budget, Spent},
    config::{Limits, PolicyConfig, Sensitivity, Tool, ToolUsage, Usage},
    ledger::Ledger,
    price,
    rule::Rule,
};

/// Approval requests and votes.
mod approvals;
/// Attempts: opening, closing, and who may write between.
mod attempts;
/// Calls: intents, outcomes, replays and resolutions.
mod calls;
/// The table of rules.
pub mod rule;

pub use calls::{IntentFacts, Undoes};
pub use rule::{LogRule, User, Violation};

/// The state of a task after some records.
#[derive(Clone, Debug)]
pub struct TaskState {
    user: User,
    /// The rule that a test has switched off.
    #[cfg(test)]
    off: Option<LogRule>,
    /// The log's origin line.
    origin: Arc<str>,
    /// The newest attempt that any record names.
    named_attempt: i64,
    /// The newest attempt that was opened.
    attempt: i64,
    /// Between `attempt.opened` and `attempt.closed`.
    is_open: bool,
    /// The attempt has seen its containment broken.
    containment_lost: bool,
    /// The rule by which the attempt has ended for good.
    terminated_by: Option<Rule>,
    /// `task.closed` was seen.
    ended: bool,
    /// The key that signs the newest attempt's checkpoints.
    key: Option<Arc<VerifierKey>>,
    policy: Option<Arc<Policy>>,
    usage: Usage,
    /// Of what is counted as used, what is set aside for calls under way.
    held: Spent,
    /// Refusals that end nothing, among those that are counted.
    ignored: i64,
    /// Calls of each tool over all attempts, and the definition by which the newest attempt called it first.
    tools: OrdMap<String, ToolUsage>,
    approvals: Arc<Approvals>,
    ledger: Arc<Ledger>,
    /// What a rollback undoes, and how far that has come.
    rollback: Option<Arc<Undoing>>,
    /// The most sensitive data that the task has handled.
    seen: Sensitivity,
    /// The places of all intents, by the print of their calls' names.
    named: HashMap<u128, u64>,
    /// Calls without an outcome, by their names.
    open_calls: HashMap<String, Arc<IntentFacts>>,
    /// Calls of unknown fate, by their names.
    unknown: OrdMap<String, Unknown>,
    /// Calls by the places of their intents; the recent ones where memory is bounded.
    calls: OrdMap<u64, Arc<IntentFacts>>,
}

/// A policy as records are judged by it.
struct Policy {
    config: PolicyConfig,
    /// Its digest, hex; empty where it has none.
    digest: Arc<str>,
    /// What its pack says to calls, for users that ask.
    guard: Option<Guard>,
}

impl std::fmt::Debug for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Policy({})", self.digest)
    }
}

/// A call of unknown fate: by its outcome, or because its harness is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Unknown {
    /// The tool.
    pub target: String,
    /// The idempotency key under which it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The record from which on its fate is unknown: a read that tells comes after it.
    pub since: u64,
}

/// What another harness of a task goes on from. Approvals are not in it: what people decided is asked for anew.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Snapshot {
    /// The newest attempt that was opened; 0 before the first.
    #[serde(default)]
    pub attempt: i64,
    /// The counters of the last record.
    pub usage: Usage,
    /// How many of its refusals end nothing.
    #[serde(default)]
    pub ignored: i64,
    /// What the log says of each tool, by its name.
    #[serde(default)]
    pub tools: BTreeMap<String, ToolUsage>,
    /// Calls by their idempotency keys.
    #[serde(default)]
    pub ledger: Ledger,
    /// Calls of unknown fate that have a key, by their names.
    #[serde(default)]
    pub unknown: BTreeMap<String, Unknown>,
    /// The most sensitive data that the task has handled.
    #[serde(default)]
    pub seen: Sensitivity,
    /// What a rollback undoes, and how far that has come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undoing: Option<Undoing>,
}

/// What is found of one record.
struct Findings<'s> {
    state: &'s TaskState,
    violations: Vec<Violation>,
}

impl Findings<'_> {
    /// Whether the state's user asks for a rule.
    fn asks(&self, rule: LogRule) -> bool {
        self.state.asks(rule)
    }

    fn violated(&mut self, rule: LogRule, message: impl Into<String>) {
        if self.asks(rule) {
            self.violations.push(Violation { rule, message: message.into() });
        }
    }

    /// Asks for a rule; the message is made where it does not hold.
    fn expect(&mut self, rule: LogRule, holds: bool, message: impl FnOnce() -> String) {
        if !holds {
            self.violated(rule, message());
        }
    }

    /// Asks for a rule whose check says itself what does not hold.
    fn expect_ok<T>(&mut self, rule: LogRule, result: Result<T, String>) -> Option<T> {
        result.map_err(|message| self.violated(rule, message)).ok()
    }
}

impl TaskState {
    /// The state before the first record of the log with this origin line.
    pub fn new(user: User, origin: &str) -> Self {
        Self {
            user,
            #[cfg(test)]
            off: None,
            origin: origin.into(),
            named_attempt: 0,
            attempt: 0,
            is_open: false,
            containment_lost: false,
            terminated_by: None,
            ended: false,
            key: None,
            policy: None,
            usage: Usage::default(),
            held: Spent::default(),
            ignored: 0,
            tools: OrdMap::new(),
            approvals: Arc::default(),
            ledger: Arc::default(),
            rollback: None,
            seen: Sensitivity::default(),
            named: HashMap::new(),
            open_calls: HashMap::new(),
            unknown: OrdMap::new(),
            calls: OrdMap::new(),
        }
    }

    /// The state from which an attempt's harness goes on.
    pub fn resume(origin: &str, snapshot: Snapshot) -> Self {
        let Snapshot { attempt, usage, ignored, tools, ledger, unknown, seen, undoing } = snapshot;
        Self {
            named_attempt: attempt,
            attempt,
            usage,
            ignored,
            tools: tools.into_iter().collect(),
            ledger: Arc::new(ledger),
            unknown: unknown.into_iter().collect(),
            seen,
            rollback: undoing.map(Arc::new),
            ..Self::new(User::Harness, origin)
        }
    }

    /// What a harness of this attempt goes on from, when it opens the log now: what is open stays open for ever.
    pub fn snapshot(&self, attempt: i64) -> Snapshot {
        let mut ledger = (*self.ledger).clone();
        ledger.abandon();
        let of = |(name, used): (&String, &ToolUsage)| {
            // Definitions are each attempt's own.
            let definition = used.definition.clone().filter(|_| attempt == self.attempt);
            (name.clone(), ToolUsage { definition, ..used.clone() })
        };
        let open = self.open_calls.values().map(|call| (call.call.clone(), Unknown::of(call, call.seq)));
        let known = self.unknown.iter().map(|(call, unknown)| (call.clone(), unknown.clone()));
        Snapshot {
            attempt: self.attempt,
            usage: self.usage,
            ignored: self.ignored,
            tools: self.tools.iter().map(of).collect(),
            ledger,
            unknown: open.chain(known).filter(|(_, unknown)| unknown.key.is_some()).collect(),
            seen: self.seen,
            undoing: self.rollback.as_deref().cloned(),
        }
    }

    /// The same state without one rule, for tests that ask whether the rule is tested.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn without(self, rule: LogRule) -> Self {
        Self { off: Some(rule), ..self }
    }

    fn asks(&self, rule: LogRule) -> bool {
        #[cfg(test)]
        if self.off == Some(rule) {
            return false;
        }
        rule.is_asked_by(self.user)
    }

    /// Whether what is kept is bounded.
    fn is_bounded(&self) -> bool {
        self.user != User::Verifier
    }

    /// Everything that does not hold of a record at this place, in the order of the rules.
    pub fn check(&self, record: &Record) -> Vec<Violation> {
        let mut found = Findings { state: self, violations: Vec::new() };
        let kind = record.event.kind();
        found.expect(LogRule::RecordVersion, record.v == VERSION, || {
            format!("expected version {VERSION}, found {}", record.v)
        });
        let time = fits::time(&record.time);
        found.expect(LogRule::RecordTime, time.is_some(), || fits::no_time(&record.time));
        let time = time.unwrap_or(Timestamp::UNIX_EPOCH);
        if let Some(undigested) = fits::undigested(&record.event) {
            found.violated(LogRule::RecordDigest, format!("expected 64 hex digits of a digest, found {undigested:?}"));
        }
        found.expect(LogRule::AfterEnd, !self.ended, || format!("expected nothing after task.closed, found {kind}"));
        self.check_writer(record, &mut found);
        self.check_attempt(record, &mut found);
        match &record.event {
            Event::AttemptOpened(opened) => self.check_opened(record, opened, &mut found),
            Event::Intent(intent) => self.check_intent(time, intent, &mut found),
            Event::Replayed(replayed) => self.check_replayed(time, replayed, &mut found),
            Event::Outcome(outcome) => self.check_outcome(record, outcome, &mut found),
            Event::Resolved(resolved) => drop(found.expect_ok(LogRule::Resolved, self.resolution(resolved).map(drop))),
            Event::Denied(denied) => self.check_denied(denied, &mut found),
            Event::ApprovalRequested(approval) | Event::ApprovalDecided(approval) => {
                self.check_approval(approval, &mut found);
            }
            Event::ContainmentChecked(_) | Event::AttemptClosed(_) | Event::TaskClosed(_) => {}
        }
        if found.asks(LogRule::Counters) {
            let usage = self.usage_after(&record.event);
            found.expect(LogRule::Counters, record.usage == usage, || {
                format!("expected {} after this record, found {}", counters(&usage), counters(&record.usage))
            });
        }
        found.violations
    }

    /// Takes a record in, whether it violates a rule or not. What follows is judged by what follows from its event, and not by its counters.
    pub fn apply(&mut self, record: &Record) {
        let usage = self.usage_after(&record.event);
        if !matches!(record.event, Event::TaskClosed(_)) {
            self.named_attempt = self.named_attempt.max(record.attempt);
        }
        match &record.event {
            Event::AttemptOpened(opened) => self.apply_opened(record, opened),
            Event::Intent(intent) => self.apply_intent(record, intent),
            Event::Outcome(outcome) => self.apply_outcome(record, outcome),
            Event::Resolved(resolved) => self.apply_resolved(resolved),
            Event::Denied(denied) if denied.rule == Rule::EgressIgnored => {
                self.ignored = self.ignored.saturating_add(denied.count);
            }
            Event::ApprovalRequested(approval) | Event::ApprovalDecided(approval) => self.apply_approval(approval),
            Event::ContainmentChecked(seen) => {
                self.containment_lost |= !seen.contained || !seen.breaches.is_empty();
            }
            Event::AttemptClosed(closed) => (self.is_open, self.terminated_by) = (false, closed.rule()),
            Event::TaskClosed(_) => self.ended = true,
            Event::Replayed(_) | Event::Denied(_) => {}
        }
        self.usage = usage;
    }

    /// The counters after an event, as its record has to have them.
    pub fn usage_after(&self, event: &Event) -> Usage {
        let mut usage = self.usage;
        match event {
            Event::Intent(intent) => {
                usage.tokens = usage.tokens.saturating_add(intent.reserved_tokens);
                usage.cost_micros = usage.cost_micros.saturating_add(intent.reserved_cost_micros);
                if intent.channel == Channel::Tool {
                    usage.tool_calls = usage.tool_calls.saturating_add(1);
                }
            }
            Event::Outcome(outcome) => {
                if let Some(Spent { tokens, cost_micros }) =
                    self.open_calls.get(&outcome.call).map(|call| call.reserved)
                {
                    usage.tokens = usage.tokens.saturating_sub(tokens).saturating_add(outcome.tokens);
                    usage.cost_micros =
                        usage.cost_micros.saturating_sub(cost_micros).saturating_add(outcome.cost_micros);
                }
            }
            Event::Denied(denied) => usage.denials = usage.denials.saturating_add(denied.count),
            _ => {}
        }
        usage
    }

    /// Each writer writes its own kinds.
    fn check_writer(&self, record: &Record, found: &mut Findings<'_>) {
        let kind = record.event.kind();
        match (record.actor, &record.event) {
            (Actor::Gateway, Event::TaskClosed(_)) => {}
            (Actor::Gateway, _) => {
                found.violated(LogRule::Writer, format!("expected the gateway to write task.closed only, found {kind}"))
            }
            (Actor::Harness, Event::TaskClosed(_)) => {
                found.violated(LogRule::Writer, "expected the gateway to write task.closed, found the harness");
            }
            (Actor::Harness, _) => {}
        }
    }

    fn check_denied(&self, denied: &Denied, found: &mut Findings<'_>) {
        found.expect(LogRule::DenialCount, denied.is_countable(), || {
            format!("expected one refusal, or several without a digest, found {}", denied.count)
        });
        if denied.rule == Rule::EgressIgnored {
            let lists = self.config().is_some_and(|policy| !policy.ignored_hosts.is_empty());
            found.expect(LogRule::DenialIgnored, lists && denied.channel == Channel::Egress, || {
                "expected connections only to be ignored, by a policy that lists some".to_owned()
            });
        }
    }

    /// The policy of the newest attempt.
    fn config(&self) -> Option<&PolicyConfig> {
        self.policy.as_deref().map(|policy| &policy.config)
    }

    /// A tool by the policy of the newest attempt.
    fn tool(&self, name: &str) -> Option<&Tool> {
        self.config()?.tool(name)
    }

    /// The newest attempt that was opened, 0 before the first.
    pub fn attempt(&self) -> i64 {
        self.attempt
    }

    /// Whether the newest attempt is between its opening and its end.
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// Whether the task has ended.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether the attempt has seen its containment broken: no call of it leaves any more.
    pub fn containment_lost(&self) -> bool {
        self.containment_lost
    }

    /// The rule by which this attempt has come to an end from which it does not open again.
    pub fn terminated_by(&self, attempt: i64) -> Option<Rule> {
        self.terminated_by.filter(|_| attempt == self.attempt)
    }

    /// The key that signs the newest attempt's checkpoints.
    pub fn key(&self) -> Option<&VerifierKey> {
        self.key.as_deref()
    }

    /// The limits of the newest attempt.
    pub fn limits(&self) -> Option<Limits> {
        self.config().map(|policy| policy.limits)
    }

    /// The counters after the last record.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// The counters against the limits of the newest attempt. Without one nothing is left.
    pub fn budget(&self) -> Budget {
        let limits = self.limits().unwrap_or_default();
        Budget::resume(limits, self.usage).ignoring(self.ignored).holding(self.held)
    }

    /// How many of the refusals end nothing.
    pub fn ignored(&self) -> i64 {
        self.ignored
    }

    /// What the log says of approvals.
    pub fn approvals(&self) -> &Approvals {
        &self.approvals
    }

    /// Calls by their idempotency keys.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The most sensitive data that the task has handled.
    pub fn seen(&self) -> Sensitivity {
        self.seen
    }

    /// What a rollback undoes, and how far that has come.
    pub fn rollback(&self) -> Option<&Undoing> {
        self.rollback.as_deref()
    }

    /// Calls without an outcome, by their names.
    pub fn open_calls(&self) -> &HashMap<String, Arc<IntentFacts>> {
        &self.open_calls
    }

    /// The intent with this sequence number; where memory is bounded, if it is recent.
    pub fn intent(&self, seq: u64) -> Option<&IntentFacts> {
        self.calls.get(&seq).map(Arc::as_ref)
    }
}

/// The counters in words.
fn counters(usage: &Usage) -> String {
    let cost =
        if usage.cost_micros == 0 { String::new() } else { format!(", a cost of {}", price::show(usage.cost_micros)) };
    format!("{} tool calls, {} tokens{cost} and {} denials", usage.tool_calls, usage.tokens, usage.denials)
}

#[cfg(test)]
pub(crate) mod tests;
