//! The meaning of a task's log: which record may follow, and how a record changes the task's state.
//!
//! The rules are written once, here, for all their users: the harness before it writes a record, the witness before it signs one, and the
//! verifier afterwards. [`rule`] is the table of the rules and of the users that check them.
//!
//! Guarantees: [`TaskState::check`] changes nothing and finds every violation. [`TaskState::apply`] accepts every record, even one that
//! violates a rule, so that one wrong record is one finding and not a hundred. A clone is cheap, because growing data is shared. A bounded
//! state ([`User::Harness`], [`User::Witness`]) takes bounded memory.
//! Non-goals: bytes, signatures and trees (see [`segment`](super::segment)); rules that need more than the log, such as the arguments of a
//! call.

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
    access::AccessPolicy,
    approval::Approvals,
    budget::{Budget, Spent},
    config::{Limits, PolicyConfig, Sensitivity, Tool, ToolUsage, Usage},
    ledger::Ledger,
    price,
    rule::Rule,
};

/// Approval requests and decisions.
mod approvals;
/// Attempts: opening, closing, and who may write in between.
mod attempts;
/// Calls: intents, outcomes, replays and resolutions.
mod calls;
/// The table of rules.
pub mod rule;

pub use calls::{Compensates, IntentFacts};
pub use rule::{LogRule, User, Violation};

/// The state of a task after some records.
#[derive(Clone, Debug)]
pub struct TaskState {
    user: User,
    /// The rule that a test has switched off.
    #[cfg(test)]
    off: Option<LogRule>,
    /// The log's origin.
    origin: Arc<str>,
    /// The newest attempt that a record names.
    named_attempt: i64,
    /// The newest attempt that was opened.
    attempt: i64,
    /// Whether the newest attempt is between `attempt.opened` and `attempt.closed`.
    is_open: bool,
    /// Whether the attempt has seen its containment broken.
    containment_lost: bool,
    /// The rule by which the attempt ended for good.
    terminated_by: Option<Rule>,
    /// Whether the log has `task.closed`.
    ended: bool,
    /// The key that signs the newest attempt's checkpoints.
    key: Option<Arc<VerifierKey>>,
    policy: Option<Arc<Policy>>,
    usage: Usage,
    /// The part of `usage` that is reserved for open calls.
    held: Spent,
    /// The number of counted denials that do not count towards the limit on denials.
    ignored: i64,
    /// Calls of each tool over all attempts, and the definition with which the newest attempt first called the tool.
    tools: OrdMap<String, ToolUsage>,
    approvals: Arc<Approvals>,
    ledger: Arc<Ledger>,
    /// The plan and the progress of a rollback.
    rollback: Option<Arc<Undoing>>,
    /// The most sensitive data that the task has handled.
    seen: Sensitivity,
    /// The sequence numbers of all intents, by the fingerprints of their calls' names.
    named: HashMap<u128, u64>,
    /// Calls without an outcome, by their names.
    open_calls: HashMap<String, Arc<IntentFacts>>,
    /// Calls with an unknown outcome, by their names.
    unknown: OrdMap<String, Unknown>,
    /// Calls by the sequence numbers of their intents. Where memory is bounded, only recent calls.
    calls: OrdMap<u64, Arc<IntentFacts>>,
}

/// The policy against which records are checked.
struct Policy {
    config: PolicyConfig,
    /// The digest of the policy, hex; empty if it has none.
    digest: Arc<str>,
    /// The pack's compiled rules, for users that evaluate them.
    guard: Option<AccessPolicy>,
}

impl std::fmt::Debug for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Policy({})", self.digest)
    }
}

/// A call with an unknown outcome: its outcome says so, or its harness is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Unknown {
    /// The tool.
    pub target: String,
    /// The idempotency key of the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The sequence number of the record since which the outcome is unknown. Only a read after it can resolve the call.
    pub since: u64,
}

/// The state from which another harness of a task continues. It has no approvals, because the harness requests decisions again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Snapshot {
    /// The newest attempt that was opened; 0 before the first.
    #[serde(default)]
    pub attempt: i64,
    /// The counters after the last record.
    pub usage: Usage,
    /// The number of denials that do not count towards the limit on denials.
    #[serde(default)]
    pub ignored: i64,
    /// What the log says about each tool, by the tool's name.
    #[serde(default)]
    pub tools: BTreeMap<String, ToolUsage>,
    /// Calls by their idempotency keys.
    #[serde(default)]
    pub ledger: Ledger,
    /// Calls with an unknown outcome and an idempotency key, by their names.
    #[serde(default)]
    pub unknown: BTreeMap<String, Unknown>,
    /// The most sensitive data that the task has handled.
    #[serde(default)]
    pub seen: Sensitivity,
    /// The plan and the progress of a rollback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undoing: Option<Undoing>,
}

/// The findings about one record.
struct Findings<'s> {
    state: &'s TaskState,
    violations: Vec<Violation>,
}

impl Findings<'_> {
    /// Returns whether the state's user checks a rule.
    fn asks(&self, rule: LogRule) -> bool {
        self.state.asks(rule)
    }

    fn violated(&mut self, rule: LogRule, message: impl Into<String>) {
        if self.asks(rule) {
            self.violations.push(Violation { rule, message: message.into() });
        }
    }

    /// Checks a rule. The message is made only if the rule does not hold.
    fn expect(&mut self, rule: LogRule, holds: bool, message: impl FnOnce() -> String) {
        if !holds {
            self.violated(rule, message());
        }
    }

    /// Checks a rule whose check gives the message itself.
    fn expect_ok<T>(&mut self, rule: LogRule, result: Result<T, String>) -> Option<T> {
        result.map_err(|message| self.violated(rule, message)).ok()
    }
}

impl TaskState {
    /// Returns the state before the first record of the log with this origin.
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

    /// Returns the state from which an attempt's harness continues.
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

    /// Returns the state from which a harness of this attempt continues if it opens the log now. Calls that are open now stay open forever.
    pub fn snapshot(&self, attempt: i64) -> Snapshot {
        let mut ledger = (*self.ledger).clone();
        ledger.abandon();
        let of = |(name, used): (&String, &ToolUsage)| {
            // Definitions belong to one attempt.
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

    /// Returns the same state without one rule, for tests that check whether the rule is tested.
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

    /// Returns whether the memory of the state is bounded.
    fn is_bounded(&self) -> bool {
        self.user != User::Verifier
    }

    /// Returns everything that does not hold about a record at this place, in the order of the rules.
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

    /// Applies a record, whether it violates a rule or not. Later records are checked against what follows from the record's event, and not
    /// against its counters.
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

    /// Returns the counters after an event. The record of the event must have them.
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

    /// Checks that each writer writes only its own kinds of records.
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
            format!("expected one denial, or several without a digest, found {}", denied.count)
        });
        if denied.rule == Rule::EgressIgnored {
            let lists = self.config().is_some_and(|policy| !policy.ignored_hosts.is_empty());
            found.expect(LogRule::DenialIgnored, lists && denied.channel == Channel::Egress, || {
                "expected only connections to be ignored, and only if the policy lists hosts to ignore".to_owned()
            });
        }
    }

    /// Returns the policy of the newest attempt.
    fn config(&self) -> Option<&PolicyConfig> {
        self.policy.as_deref().map(|policy| &policy.config)
    }

    /// Returns a tool from the policy of the newest attempt.
    fn tool(&self, name: &str) -> Option<&Tool> {
        self.config()?.tool(name)
    }

    /// Returns the newest attempt that was opened, 0 before the first.
    pub fn attempt(&self) -> i64 {
        self.attempt
    }

    /// Returns whether the newest attempt is between its opening and its end.
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// Returns whether the task has ended.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Returns whether the attempt has seen its containment broken. No call of the attempt is sent after that.
    pub fn containment_lost(&self) -> bool {
        self.containment_lost
    }

    /// Returns the rule by which this attempt ended for good. It does not open again.
    pub fn terminated_by(&self, attempt: i64) -> Option<Rule> {
        self.terminated_by.filter(|_| attempt == self.attempt)
    }

    /// Returns the key that signs the newest attempt's checkpoints.
    pub fn key(&self) -> Option<&VerifierKey> {
        self.key.as_deref()
    }

    /// Returns the limits of the newest attempt.
    pub fn limits(&self) -> Option<Limits> {
        self.config().map(|policy| policy.limits)
    }

    /// Returns the counters after the last record.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Returns the budget: the limits of the newest attempt without what is used. Before the first attempt nothing is left.
    pub fn budget(&self) -> Budget {
        let limits = self.limits().unwrap_or_default();
        Budget::resume(limits, self.usage).ignoring(self.ignored).holding(self.held)
    }

    /// Returns the number of denials that do not count towards the limit on denials.
    pub fn ignored(&self) -> i64 {
        self.ignored
    }

    /// Returns what the log says about approvals.
    pub fn approvals(&self) -> &Approvals {
        &self.approvals
    }

    /// Returns the calls by their idempotency keys.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Returns the most sensitive data that the task has handled.
    pub fn seen(&self) -> Sensitivity {
        self.seen
    }

    /// Returns the plan and the progress of a rollback.
    pub fn rollback(&self) -> Option<&Undoing> {
        self.rollback.as_deref()
    }

    /// Returns the calls without an outcome, by their names.
    pub fn open_calls(&self) -> &HashMap<String, Arc<IntentFacts>> {
        &self.open_calls
    }

    /// Returns the intent with this sequence number. Where memory is bounded, only a recent intent is found.
    pub fn intent(&self, seq: u64) -> Option<&IntentFacts> {
        self.calls.get(&seq).map(Arc::as_ref)
    }
}

/// Returns the counters in words.
fn counters(usage: &Usage) -> String {
    let cost =
        if usage.cost_micros == 0 { String::new() } else { format!(", a cost of {}", price::show(usage.cost_micros)) };
    format!("{} tool calls, {} tokens{cost} and {} denials", usage.tool_calls, usage.tokens, usage.denials)
}

#[cfg(test)]
pub(crate) mod tests;
