//! What the records say, one after the other: attempts, calls, counters and limits.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;

use super::report::{AttemptSummary, Check, Report, RollbackSummary};
use crate::{
    evidence::{
        fits,
        note::{self, VerifierKey},
        record::{
            Actor, Approval, AttemptOpened, Channel, Denied, Effect, Event, Intent, Outcome, Record, Replayed,
            Resolved, VERSION,
        },
        rollback::{self, Leaving, Undoing},
    },
    policy::{
        access::{Asked, Guard},
        approval::{self, Approvals, AskedBy, Standing},
        budget::Spent,
        config::{Idempotency, PolicyConfig, Sensitivity, Usage},
        ledger::{self, Found, Ledger},
        price,
        rule::Rule,
    },
};

/// What is known after some records.
#[derive(Clone, Default)]
pub(super) struct History {
    attempt: i64,
    /// The attempt that opened last.
    opened_attempt: i64,
    /// Whether the attempt is between `attempt.opened` and `attempt.closed`.
    open: bool,
    /// Whether the attempt has seen its containment broken.
    loose: bool,
    /// Whether `task.closed` has been seen.
    ended: bool,
    key: Option<VerifierKey>,
    policy: Option<PolicyConfig>,
    /// What its pack says to calls.
    guard: Option<Arc<Guard>>,
    /// The most sensitive data that the task has handled.
    seen: Sensitivity,
    usage: Usage,
    /// Refusals that end nothing, among those that are counted.
    ignored: i64,
    /// Calls of each tool, over all attempts.
    tool_calls: BTreeMap<String, i64>,
    /// The definition by which the newest attempt called each tool first.
    definitions: BTreeMap<String, String>,
    approvals: Approvals,
    ledger: Ledger,
    /// What a rollback undoes, and how far that has come.
    undoing: Option<Undoing>,
    calls: BTreeMap<String, Call>,
}

/// A call that has an intent.
#[derive(Clone)]
struct Call {
    key: Option<String>,
    /// What its outcome says, and where.
    effect: Option<(Effect, u64)>,
    seq: u64,
    attempt: i64,
    channel: Channel,
    target: String,
    reserved: Spent,
    /// The `attempt.opened` that first found it without an outcome: its harness is gone.
    left_at: Option<u64>,
    /// Whether a read has told what became of it.
    resolved: bool,
    /// Whether it has an outcome, or a read has told.
    settled: bool,
}

/// The report, and the record to blame.
struct Blame<'a> {
    report: &'a mut Report,
    object: &'a str,
    seq: u64,
}

impl Blame<'_> {
    fn add(&mut self, rule: Check, message: impl Into<String>) {
        self.report.add(rule, Some(self.object), Some(self.seq), message);
    }
}

impl History {
    /// The key that signs the newest attempt's checkpoints.
    pub(super) fn key(&self) -> Option<&VerifierKey> {
        self.key.as_ref()
    }

    /// Takes one record in.
    pub(super) fn record(&mut self, record: &Record, origin: &str, object: &str, report: &mut Report) {
        let mut blame = Blame { report, object, seq: record.seq };
        let summary = &mut blame.report.summary;
        *summary.kinds.entry(record.event.kind()).or_default() += 1;
        summary.started.get_or_insert_with(|| record.time.clone());
        summary.ended = Some(record.time.clone());

        if record.v != VERSION {
            blame.add(Check::RecordForm, format!("expected version {VERSION}, found {}", record.v));
        }
        let now = fits::time(&record.time).unwrap_or_else(|| {
            blame.add(Check::RecordTime, fits::no_time(&record.time));
            Timestamp::UNIX_EPOCH
        });
        if let Some(found) = fits::undigested(&record.event) {
            blame.add(Check::RecordForm, format!("expected 64 hex digits of a digest, found {found:?}"));
        }
        if self.ended {
            blame
                .add(Check::TaskAfterEnd, format!("expected nothing after task.closed, found {}", record.event.kind()));
        }
        self.writer(record, &mut blame);
        self.attempt(record, &mut blame);

        let mut usage = self.usage;
        match &record.event {
            Event::AttemptOpened(opened) => self.opened(record, opened, origin, &mut blame),
            Event::Intent(intent) => {
                self.key_of((record, now), intent, &mut blame);
                self.undoes(now, intent, &mut blame);
                self.intent(intent, record.attempt, &mut usage, &mut blame);
            }
            Event::Replayed(replayed) => self.replayed(now, replayed, &mut blame),
            Event::Outcome(outcome) => self.outcome(outcome, record.attempt, &mut usage, &mut blame),
            Event::Resolved(resolved) => self.resolved(resolved, &mut blame),
            Event::Denied(denied) => {
                if !denied.is_countable() {
                    let message = format!("expected one refusal, or several without a digest, found {}", denied.count);
                    blame.add(Check::RecordForm, message);
                }
                usage.denials = usage.denials.saturating_add(denied.count);
                self.ignored(denied, &mut blame);
                let count = blame.report.summary.denials.entry(denied.rule).or_default();
                *count = count.saturating_add(denied.calls());
            }
            Event::ApprovalRequested(approval) | Event::ApprovalDecided(approval) => {
                self.approval(approval, &mut blame)
            }
            Event::ContainmentChecked(seen) if !seen.contained || !seen.breaches.is_empty() => {
                self.loose = true;
                blame.add(
                    Check::ContainmentBroken,
                    format!("the pod reached more than the gateway: {}", seen.breaches.join(", ")),
                );
            }
            Event::ContainmentChecked(_) => {}
            Event::AttemptClosed(closed) => {
                self.open = false;
                if let Some(attempt) = blame.report.summary.attempts.last_mut() {
                    attempt.closed = Some(closed.reason.clone());
                }
            }
            Event::TaskClosed(closed) => {
                self.ended = true;
                blame.report.summary.closed = Some(closed.clone());
            }
        }
        if record.usage != usage {
            blame.add(
                Check::UsageCount,
                format!("expected {} after this record, found {}", counters(&usage), counters(&record.usage)),
            );
        }
        // What follows is judged by what follows from the events, so that one wrong counter is one finding.
        self.usage = usage;
    }

    /// Ends the log. `whole`: whether its last segment was reached.
    pub(super) fn finish(&self, whole: bool, report: &mut Report) {
        let mut open: Vec<_> = self.calls.iter().filter(|(_, call)| !call.settled).collect();
        open.sort_by_key(|(_, call)| call.seq);
        for (id, call) in open {
            report.summary.effects.open += 1;
            let message = format!("call {id} to {} has no outcome: whether it took effect is not known", call.target);
            report.add(Check::CallOpen, None, Some(call.seq), message);
        }
        report.summary.usage = self.usage;
        report.summary.rollback = self.undoing.as_ref().map(|undoing| {
            let (undone, left) = undoing.summary();
            let left = left.into_iter().map(|(step, why)| format!("{} {}: {why}", step.call, step.tool)).collect();
            RollbackSummary { of: undoing.plan.origin.clone(), undone, left }
        });
        if whole && !self.ended && !report.summary.kinds.is_empty() {
            report.add(
                Check::TaskClosed,
                None,
                None,
                "expected task.closed as the last record; the task runs, or its end is missing",
            );
        }
    }

    /// Each writer writes its own kinds.
    fn writer(&self, record: &Record, blame: &mut Blame<'_>) {
        let kind = record.event.kind();
        match (record.actor, &record.event) {
            (Actor::Gateway, Event::TaskClosed(_)) => {}
            (Actor::Gateway, _) => {
                blame.add(Check::RecordActor, format!("expected the gateway to write task.closed only, found {kind}"))
            }
            (Actor::Harness, Event::TaskClosed(_)) => {
                blame.add(Check::RecordActor, "expected the gateway to write task.closed, found the harness")
            }
            (Actor::Harness, _) => {}
        }
    }

    /// Attempts go up, and do nothing before they open and after they close.
    fn attempt(&mut self, record: &Record, blame: &mut Blame<'_>) {
        let kind = record.event.kind();
        // A task that ends without an attempt has none to name.
        let least = if matches!(record.event, Event::TaskClosed(_)) { self.attempt } else { self.attempt.max(1) };
        if record.attempt < least {
            let message = format!("expected attempt {least} or a later one, found {}", record.attempt);
            blame.add(Check::AttemptOrder, message);
        }
        match &record.event {
            Event::AttemptOpened(_) => {}
            // An attempt may fail before its harness opens it; the end of the task names it all the same.
            Event::TaskClosed(_) => return,
            _ if record.attempt != self.attempt => {
                blame.add(
                    Check::AttemptOpen,
                    format!("expected attempt.opened first in attempt {}, found {kind}", record.attempt),
                );
            }
            _ if !self.open => {
                blame.add(Check::AttemptOpen, format!("expected nothing after attempt.closed, found {kind}"))
            }
            _ => {}
        }
        self.attempt = self.attempt.max(record.attempt);
    }

    fn opened(&mut self, record: &Record, opened: &AttemptOpened, origin: &str, blame: &mut Blame<'_>) {
        self.open = true;
        for call in self.calls.values_mut().filter(|call| !call.settled) {
            call.left_at.get_or_insert(record.seq);
        }
        self.loose = false;
        self.ledger.abandon();
        if self.opened_attempt != record.attempt {
            self.opened_attempt = record.attempt;
            self.definitions.clear();
        }
        if !opened.containment.contained || !opened.containment.breaches.is_empty() {
            blame
                .add(Check::AttemptContained, "expected a contained pod, found one that reaches more than the gateway");
        }
        self.guard = match Guard::compile(&opened.policy) {
            Ok(guard) => Some(Arc::new(guard)),
            Err(e) => {
                blame.add(Check::AttemptPolicy, e.to_string());
                None
            }
        };
        self.plan(opened, blame);
        let task = &opened.policy.task;
        if note::origin(&task.uid) != origin {
            blame.add(
                Check::AttemptTask,
                format!("expected the policy of {origin}, found one of task UID {}", task.uid),
            );
        }
        // Whatever does not hold about the key: an older one must not go on signing.
        self.key = match opened.key.parse::<VerifierKey>() {
            Ok(key) if key.name() == format!("{origin}/{}", record.attempt) => Some(key),
            Ok(key) => {
                blame.add(
                    Check::AttemptKey,
                    format!("expected a key named {origin}/{}, found {}", record.attempt, key.name()),
                );
                None
            }
            Err(e) => {
                blame.add(Check::AttemptKey, e.to_string());
                None
            }
        };
        let summary = &mut blame.report.summary;
        summary.limits = Some(opened.policy.limits);
        summary.local.clone_from(&opened.local);
        summary.namespace = Some(task.namespace.clone());
        summary.task = Some(task.name.clone());
        summary.principal = Some(task.principal.clone());
        match summary.attempts.last_mut().filter(|a| a.number == record.attempt) {
            Some(again) => {
                again.openings += 1;
                again.closed = None;
            }
            None => summary.attempts.push(AttemptSummary {
                number: record.attempt,
                pod: opened.pod.name.clone(),
                node: opened.pod.node.clone(),
                runtime_class: opened.pod.runtime_class.clone(),
                policy_digest: opened.policy.digest().unwrap_or_default(),
                opened: record.time.clone(),
                openings: 1,
                closed: None,
            }),
        }
        self.policy = Some(opened.policy.clone());
    }

    /// A rollback has the plan that it began with, for the task that it undoes, and nothing else has one. Whether it is what that task's log
    /// makes is for who has both.
    fn plan(&mut self, opened: &AttemptOpened, blame: &mut Blame<'_>) {
        let of = opened.policy.task.rollback_of.as_ref();
        let origin = opened.rollback.as_ref().map(|plan| plan.origin.as_str());
        let expected = of.map(|of| note::origin(&of.uid));
        if origin != expected.as_deref() {
            blame.add(Check::CallRollback, format!("expected a plan to undo {expected:?}, found one for {origin:?}"));
        }
        match (&self.undoing, &opened.rollback) {
            (Some(undoing), Some(plan)) if undoing.plan == *plan => {}
            (Some(_), _) => {
                blame.add(Check::CallRollback, "expected the plan that the rollback began with, found another")
            }
            (None, plan) => self.undoing = plan.clone().map(Undoing::new),
        }
    }

    /// A rollback makes the calls of its plan and reads, and nothing else undoes anything.
    fn undoes(&mut self, now: Timestamp, intent: &Intent, blame: &mut Blame<'_>) {
        let tool = self.policy.as_ref().and_then(|policy| policy.tool(&intent.target));
        let leaving = Leaving {
            channel: intent.channel,
            effect: intent.effect,
            undoes: intent.undoes.as_deref(),
            contract: tool.map_or("", |tool| &tool.contract),
            digest: intent.request_digest.as_deref().unwrap_or_default(),
        };
        if let Err(reason) = rollback::lets(self.undoing.as_ref(), leaving, now) {
            blame.add(Check::CallRollback, reason);
        }
        if let Some((undoing, undoes)) = self.undoing.as_mut().zip(intent.undoes.as_ref()) {
            undoing.intend(undoes, &intent.call);
        }
    }

    /// What makes calls of a tool one, by the newest policy.
    fn idempotency(&self, tool: &str) -> Option<&Idempotency> {
        self.policy.as_ref()?.tool(tool)?.idempotency.as_ref()
    }

    /// A call has the key that its contract makes, and no other call was made under it.
    fn key_of(&mut self, (record, now): (&Record, Timestamp), intent: &Intent, blame: &mut Blame<'_>) {
        let of = self.idempotency(&intent.target).filter(|_| intent.channel == Channel::Tool);
        let (of, key) = match (of, &intent.key) {
            (None, None) => return,
            (Some(of), Some(key)) => (of, key),
            (of, _) => {
                let (expected, found) = if of.is_some() { ("a", "none") } else { ("no", "one") };
                return blame.add(Check::CallIdempotency, format!("expected {expected} key, found {found}"));
            }
        };
        let digest = intent.request_digest.as_deref().unwrap_or_default();
        let uid = self.policy.as_ref().map_or("", |policy| policy.task.uid.as_str());
        // A key of one argument cannot be made again from the log, which has no arguments.
        let expected = ledger::made_of(uid, &intent.target, digest);
        if of.argument.is_none() && *key != expected {
            blame.add(Check::CallIdempotency, format!("expected the key {expected} of these arguments, found {key}"));
        }
        let found = self.ledger.find(key, digest, of, now);
        if found != Found::Free {
            blame.add(Check::CallIdempotency, format!("expected no call under this key, found {found:?}"));
        }
        self.ledger.intend(key, &intent.call, digest, &record.time);
    }

    /// A result that was given again is that of the call which was made under the key.
    fn replayed(&self, now: Timestamp, replayed: &Replayed, blame: &mut Blame<'_>) {
        let Replayed { call, target, key, request_digest, response_digest } = replayed;
        let found = self.idempotency(target).map(|of| self.ledger.find(key, request_digest, of, now));
        let made = match &found {
            Some(Found::Made(made)) if made.call == *call => made,
            _ => {
                let message =
                    format!("expected call {call} of {target} to have been made under its key, found {found:?}");
                return blame.add(Check::CallIdempotency, message);
            }
        };
        if made.response_digest.as_ref() != Some(response_digest) {
            let expected = &made.response_digest;
            let message = format!("expected the result {expected:?} of call {call}, found {response_digest}");
            blame.add(Check::CallIdempotency, message);
        }
    }

    /// Refusals by this rule end nothing: they are of connections, where the policy lists hosts that are ignored.
    fn ignored(&mut self, denied: &Denied, blame: &mut Blame<'_>) {
        if denied.rule != Rule::EgressIgnored {
            return;
        }
        let lists = self.policy.as_ref().is_some_and(|policy| !policy.ignored_hosts.is_empty());
        if denied.channel != Channel::Egress || !lists {
            let message = "expected connections only to be ignored, by a policy that lists some".to_owned();
            blame.add(Check::CallPolicy, message);
        }
        self.ignored = self.ignored.saturating_add(denied.count);
    }

    /// A read tells what became of a call whose fate was unknown, of whichever attempt: one made after that was known, that succeeded, by
    /// the tool that the contract names.
    fn resolved(&mut self, resolved: &Resolved, blame: &mut Blame<'_>) {
        let Resolved { call, effect, by } = resolved;
        let wrong =
            |found: &str| format!("expected a read to tell what became of a call of unknown fate, found {found}");
        let lost = self.calls.get(call).filter(|lost| !lost.resolved);
        let since = lost.and_then(|lost| match lost.effect {
            Some((Effect::Unknown, since)) => Some(since),
            // Its harness is gone.
            None => lost.left_at,
            _ => None,
        });
        let Some((lost, since)) = lost.zip(since) else {
            return blame.add(Check::CallOutcome, wrong(&format!("call {call}, whose fate was not unknown")));
        };
        let tool = self.policy.as_ref().and_then(|policy| policy.tool(&lost.target));
        let reader = tool.and_then(|tool| tool.verify.as_ref()).map(|read| &read.tool);
        let (key, was_counted) = (lost.key.clone(), lost.settled);
        let is_read = |read: &&Call| read.channel == Channel::Tool && Some(&read.target) == reader && read.seq > since;
        let read = self.calls.get(by).filter(is_read);
        if !read.is_some_and(|read| matches!(read.effect, Some((Effect::Applied, _)))) || *effect == Effect::Unknown {
            return blame.add(Check::CallOutcome, wrong(&format!("{by}, which is none by {reader:?} after it")));
        }
        if let Some(key) = key {
            self.ledger.settle(&key, call, effect.fate(), None);
        }
        if let Some(undoing) = &mut self.undoing {
            undoing.settle(call, *effect);
        }
        if let Some(lost) = self.calls.get_mut(call) {
            (lost.resolved, lost.settled) = (true, true);
        }
        let effects = &mut blame.report.summary.effects;
        effects.unknown = effects.unknown.saturating_sub(u64::from(was_counted));
        match effect {
            Effect::Applied => effects.applied += 1,
            Effect::NotApplied => effects.not_applied += 1,
            Effect::Unknown => {}
        }
    }

    /// What is said of an approval fits what was said before, what the contract asks for, and who has decided.
    fn approval(&mut self, approval: &Approval, blame: &mut Blame<'_>) {
        let Approval { name, by, tool, standing, decisions, .. } = approval;
        if let Err(reason) = self.approvals.seen(name, &approval.call(), *standing) {
            blame.add(Check::CallApproval, reason);
        }
        let Some(policy) = &self.policy else { return };
        let Some(contract) = policy.tool(tool).and_then(|_| policy.approval(tool, *by)) else {
            let message = format!("expected a tool that needs approval by the {}, found {tool}", by.as_str());
            return blame.add(Check::CallApproval, message);
        };
        if approval.required != contract.required {
            let (expected, found) = (contract.required, approval.required);
            blame.add(Check::CallApproval, format!("expected {expected} to have to approve, found {found}"));
        }
        let Some(expires) = fits::expiry(&approval.expires) else {
            return blame
                .add(Check::RecordTime, format!("expected an RFC 3339 time of expiry, found {:?}", approval.expires));
        };
        let barred = [Some(policy.task.principal.as_str()), policy.task.requester.as_deref()];
        let asked = approval::Asked { required: contract.required, barred, expires };
        // What has expired is the gateway's clock's to say. By the votes alone:
        let voted = approval::standing(&asked, decisions, Timestamp::MIN);
        if *standing != voted && !(*standing == Standing::Expired && voted != Standing::Denied) {
            let message = format!("expected approval {name} to be {voted:?} by its decisions, found it {standing:?}");
            blame.add(Check::CallApproval, message);
        }
    }

    fn intent(&mut self, intent: &Intent, attempt: i64, usage: &mut Usage, blame: &mut Blame<'_>) {
        let Intent { call, channel, target, .. } = intent;
        let before = *usage;
        let reserved = Spent { tokens: intent.reserved_tokens, cost_micros: intent.reserved_cost_micros };
        if self.loose {
            blame.add(Check::ContainmentLost, "expected no call after the containment was lost, found one");
        }
        if reserved.tokens < 0 || reserved.cost_micros < 0 {
            blame.add(Check::UsageCount, format!("expected a reservation of no less than 0, found {reserved:?}"));
        }
        usage.tokens = usage.tokens.saturating_add(reserved.tokens);
        usage.cost_micros = usage.cost_micros.saturating_add(reserved.cost_micros);
        if *channel == Channel::Tool {
            usage.tool_calls = usage.tool_calls.saturating_add(1);
        }
        if *channel != Channel::Tool && (intent.assessment.is_some() || !intent.approvals.is_empty()) {
            blame.add(
                Check::CallAccess,
                "expected an assessment and approvals of tool calls only, found one of another",
            );
        }
        if let Some(policy) = &self.policy {
            let limits = policy.limits;
            if *channel == Channel::Tool && usage.tool_calls > limits.tool_calls {
                blame.add(
                    Check::UsageLimit,
                    format!("expected at most {} tool calls, found {}", limits.tool_calls, usage.tool_calls),
                );
            }
            // A reply may have cost more than was left; only what asks for more is to be refused then.
            if reserved.tokens > 0 && usage.tokens > limits.tokens {
                blame.add(
                    Check::UsageLimit,
                    format!("expected at most {} tokens, found {} reserved", limits.tokens, usage.tokens),
                );
            }
            if let Some(limit) = limits.cost_micros.filter(|limit| usage.cost_micros > *limit)
                && reserved.cost_micros > 0
            {
                let (limit, found) = (price::show(limit), price::show(usage.cost_micros));
                blame.add(Check::UsageLimit, format!("expected a cost of at most {limit}, found {found} reserved"));
            }
            let counted = usage.denials.saturating_sub(self.ignored);
            if let Some(limit) = limits.denials.filter(|limit| counted >= *limit) {
                blame.add(Check::UsageLimit, format!("expected no call after {limit} denials, found one"));
            }
            if let Some(problem) = fits::misfit(intent, policy).or_else(|| fits::mispriced(intent, policy)) {
                blame.add(Check::CallPolicy, problem);
            }
            if *channel == Channel::Tool {
                let made = self.tool_calls.entry(target.clone()).or_default();
                *made = made.saturating_add(1);
                let tool = policy.tool(target);
                if let Some(most) = tool.and_then(|tool| tool.limits.calls).filter(|most| *made > *most) {
                    let message = format!("expected at most {most} calls of {target}, found {made}");
                    blame.add(Check::UsageLimit, message);
                }
                let given = self.approvals.used(&intent.approvals, target, intent.request_digest.as_deref());
                let given = given.unwrap_or_else(|reason| {
                    blame.add(Check::CallApproval, reason);
                    vec![]
                });
                let always = tool.and_then(|tool| tool.approval.as_ref()).is_some_and(|needs| needs.when.is_none());
                let asked = tool.zip(intent.effect).map(|(tool, effect)| Asked {
                    tool,
                    effect,
                    usage: before,
                    seen: self.seen,
                });
                let judged = asked.zip(self.guard.as_ref());
                let by_pack = match judged.map(|(asked, guard)| guard.replay(asked, intent.assessment.as_ref())) {
                    Some(Ok(passed)) => !passed.because.is_empty(),
                    Some(Err(reason)) => {
                        blame.add(Check::CallAccess, reason);
                        false
                    }
                    // That there is no such tool is a finding of its own.
                    None => false,
                };
                for (needed, by) in [(always, AskedBy::Contract), (by_pack, AskedBy::Pack)] {
                    if needed && !given.contains(&by) {
                        let by = by.as_str();
                        blame.add(
                            Check::CallApproval,
                            format!("expected a call of {target} to be approved on account of the {by}, found none"),
                        );
                    }
                }
                if let Some(found) = &intent.assessment {
                    self.seen = self.seen.max(found.arguments);
                }
                if let Some(definition) = &intent.definition {
                    let first = self.definitions.entry(target.clone()).or_insert_with(|| definition.clone());
                    if first != definition {
                        let message = format!(
                            "expected the definition {first} of {target}, by which the attempt called it first, found {definition}"
                        );
                        blame.add(Check::CallPolicy, message);
                    }
                }
            }
        }
        if self.calls.contains_key(call) {
            blame.add(Check::CallUnique, format!("expected one intent of call {call}, found a second"));
        } else {
            let (seq, target) = (blame.seq, target.clone());
            let key = intent.key.clone();
            self.calls.insert(
                call.clone(),
                Call {
                    key,
                    effect: None,
                    seq,
                    attempt,
                    channel: *channel,
                    target,
                    reserved,
                    left_at: None,
                    resolved: false,
                    settled: false,
                },
            );
        }
    }

    fn outcome(&mut self, outcome: &Outcome, attempt: i64, usage: &mut Usage, blame: &mut Blame<'_>) {
        let id = &outcome.call;
        let Some(call) = self.calls.get_mut(id) else {
            return blame
                .add(Check::CallOutcome, format!("expected an intent of call {id} before its outcome, found none"));
        };
        if call.settled {
            return blame.add(Check::CallOutcome, format!("expected one outcome of call {id}, found a second"));
        }
        if call.attempt != attempt {
            let message =
                format!("expected the outcome of call {id} in attempt {}, found it in {attempt}", call.attempt);
            blame.add(Check::CallOutcome, message);
        }
        call.settled = true;
        call.effect = Some((outcome.effect, blame.seq));
        let tool = self.policy.as_ref().and_then(|policy| policy.tool(&call.target));
        let floor = tool.filter(|_| outcome.given().is_some()).map(|tool| tool.data.result).unwrap_or_default();
        if outcome.sensitivity < floor {
            let (target, expected, found) = (&call.target, floor.as_str(), outcome.sensitivity.as_str());
            let message = format!("expected a result of {target} to be {expected} data at least, found {found}");
            blame.add(Check::CallAccess, message);
        }
        let undoable = self.undoing.is_none() && tool.is_some_and(|tool| tool.compensation().is_some());
        if outcome.undone_by.is_some() && !(undoable && outcome.effect == Effect::Applied) {
            let message = format!("expected no call that undoes {}, found one", call.target);
            blame.add(Check::CallRollback, message);
        }
        if let Some(undoing) = &mut self.undoing {
            undoing.settle(id, outcome.effect);
        }
        self.seen = self.seen.max(outcome.sensitivity);
        if let Some(key) = &call.key {
            self.ledger.settle(key, id, outcome.effect.fate(), outcome.given());
        }
        if outcome.tokens < 0 || outcome.cost_micros < 0 {
            let (tokens, cost) = (outcome.tokens, outcome.cost_micros);
            blame
                .add(Check::UsageCount, format!("expected no less than 0, found {tokens} tokens and a cost of {cost}"));
        }
        let reserved = call.reserved;
        usage.tokens = usage.tokens.saturating_sub(reserved.tokens).saturating_add(outcome.tokens);
        usage.cost_micros = usage.cost_micros.saturating_sub(reserved.cost_micros).saturating_add(outcome.cost_micros);
        if let Some(limit) = self
            .policy
            .as_ref()
            .map(|p| p.limits.tokens)
            .filter(|n| usage.tokens > *n && outcome.tokens > reserved.tokens)
        {
            let message = format!(
                "a reply cost {} tokens where {} were reserved: {} of {limit} are used",
                outcome.tokens, reserved.tokens, usage.tokens
            );
            blame.add(Check::UsageOverrun, message);
        }
        if let Some(limit) = self
            .policy
            .as_ref()
            .and_then(|p| p.limits.cost_micros)
            .filter(|n| usage.cost_micros > *n && outcome.cost_micros > reserved.cost_micros)
        {
            let [cost, set_aside, used, limit] =
                [outcome.cost_micros, reserved.cost_micros, usage.cost_micros, limit].map(price::show);
            let message = format!("a reply cost {cost} where {set_aside} were reserved: {used} of {limit} are used");
            blame.add(Check::UsageOverrun, message);
        }
        let effects = &mut blame.report.summary.effects;
        match outcome.effect {
            Effect::Applied => effects.applied += 1,
            Effect::NotApplied => effects.not_applied += 1,
            Effect::Unknown => effects.unknown += 1,
        }
    }
}

/// The counters in words.
fn counters(usage: &Usage) -> String {
    let cost =
        if usage.cost_micros == 0 { String::new() } else { format!(", a cost of {}", price::show(usage.cost_micros)) };
    format!("{} tool calls, {} tokens{cost} and {} denials", usage.tool_calls, usage.tokens, usage.denials)
}
