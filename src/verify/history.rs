//! What the records say, one after the other: attempts, calls, counters and limits.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::report::{AttemptSummary, Check, Report};
use crate::{
    evidence::{
        note::{self, VerifierKey},
        record::{Actor, Approval, AttemptOpened, Channel, Effect, Event, Intent, Outcome, Record, Replayed, VERSION},
    },
    policy::{
        approval::{self, Approvals, Asked, Standing},
        budget::Spent,
        config::{Idempotency, McpUpstream, PolicyConfig, Upstream, Usage},
        ledger::{self, Found, Ledger},
        price,
    },
};

/// What is known after some records.
#[derive(Default)]
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
    usage: Usage,
    /// Calls of each tool, over all attempts.
    tool_calls: BTreeMap<String, i64>,
    /// The definition by which the newest attempt called each tool first.
    definitions: BTreeMap<String, String>,
    approvals: Approvals,
    ledger: Ledger,
    calls: BTreeMap<String, Call>,
}

/// A call that has an intent.
struct Call {
    key: Option<String>,
    /// Digest of the reply, once there is one.
    response: Option<String>,
    seq: u64,
    attempt: i64,
    target: String,
    reserved: Spent,
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
        if record.time.parse::<jiff::Timestamp>().is_err() {
            blame.add(Check::RecordTime, format!("expected an RFC 3339 time, found {:?}", record.time));
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
                self.key_of(record, intent, &mut blame);
                self.intent(intent, record.attempt, &mut usage, &mut blame);
            }
            Event::Replayed(replayed) => self.replayed(record, replayed, &mut blame),
            Event::Outcome(outcome) => self.outcome(outcome, record.attempt, &mut usage, &mut blame),
            Event::Denied(denied) => {
                usage.denials = usage.denials.saturating_add(1);
                *blame.report.summary.denials.entry(denied.rule).or_default() += 1;
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
        match opened.policy.digest() {
            Ok(digest) if digest == opened.policy_digest => {}
            Ok(digest) => blame
                .add(Check::AttemptPolicy, format!("expected policyDigest {digest}, found {}", opened.policy_digest)),
            Err(e) => blame.add(Check::AttemptPolicy, e.to_string()),
        }
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
                policy_digest: opened.policy_digest.clone(),
                opened: record.time.clone(),
                openings: 1,
                closed: None,
            }),
        }
        self.policy = Some(opened.policy.clone());
    }

    /// What makes calls of a tool one, by the newest policy.
    fn idempotency(&self, tool: &str) -> Option<&Idempotency> {
        self.policy.as_ref()?.tool(tool)?.idempotency.as_ref()
    }

    /// A call has the key that its contract makes, and no other call was made under it.
    fn key_of(&mut self, record: &Record, intent: &Intent, blame: &mut Blame<'_>) {
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
        // A time that cannot be read is a finding of its own.
        let now = record.time.parse().unwrap_or(Timestamp::UNIX_EPOCH);
        let found = self.ledger.find(key, digest, of, now);
        if found != Found::Free {
            blame.add(Check::CallIdempotency, format!("expected no call under this key, found {found:?}"));
        }
        self.ledger.intend(key, &intent.call, digest, &record.time);
    }

    /// A result that was given again is that of the call which was made under the key.
    fn replayed(&self, record: &Record, replayed: &Replayed, blame: &mut Blame<'_>) {
        let Replayed { call, target, key, request_digest, response_digest } = replayed;
        let now = record.time.parse().unwrap_or(Timestamp::UNIX_EPOCH);
        let found = self.idempotency(target).map(|of| self.ledger.find(key, request_digest, of, now));
        if !matches!(&found, Some(Found::Made(made)) if made.call == *call) {
            let message = format!("expected call {call} of {target} to have been made under its key, found {found:?}");
            blame.add(Check::CallIdempotency, message);
        }
        let response = self.calls.get(call).and_then(|made| made.response.as_ref());
        if response != Some(response_digest) {
            let message = format!("expected the result {response:?} of call {call}, found {response_digest}");
            blame.add(Check::CallIdempotency, message);
        }
    }

    /// What is said of an approval fits what was said before, what the contract asks for, and who has decided.
    fn approval(&mut self, approval: &Approval, blame: &mut Blame<'_>) {
        let Approval { name, tool, request_digest, standing, decisions, .. } = approval;
        if let Err(reason) = self.approvals.seen(name, tool, request_digest, *standing) {
            blame.add(Check::CallApproval, reason);
        }
        let Some(policy) = &self.policy else { return };
        let contract = policy.tool(tool).and_then(|tool| tool.approval.as_ref());
        let Some(contract) = contract else {
            return blame.add(Check::CallApproval, format!("expected a tool that needs approval, found {tool}"));
        };
        if approval.required != contract.required {
            let (expected, found) = (contract.required, approval.required);
            blame.add(Check::CallApproval, format!("expected {expected} to have to approve, found {found}"));
        }
        let Ok(expires) = approval.expires.parse() else {
            return blame
                .add(Check::RecordTime, format!("expected an RFC 3339 time of expiry, found {:?}", approval.expires));
        };
        let barred = [Some(policy.task.principal.as_str()), policy.task.requester.as_deref()];
        let asked = Asked { required: contract.required, barred, expires };
        // What has expired is the gateway's clock's to say. By the votes alone:
        let voted = approval::standing(&asked, decisions, Timestamp::MIN);
        if *standing != voted && !(*standing == Standing::Expired && voted != Standing::Denied) {
            let message = format!("expected approval {name} to be {voted:?} by its decisions, found it {standing:?}");
            blame.add(Check::CallApproval, message);
        }
    }

    fn intent(&mut self, intent: &Intent, attempt: i64, usage: &mut Usage, blame: &mut Blame<'_>) {
        let Intent { call, channel, target, .. } = intent;
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
            if let Some(limit) = limits.denials.filter(|limit| usage.denials >= *limit) {
                blame.add(Check::UsageLimit, format!("expected no call after {limit} denials, found one"));
            }
            if let Some(problem) = misfit(intent, policy).or_else(|| mispriced(intent, policy)) {
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
                let needs = tool.and_then(|tool| tool.approval.as_ref()).is_some_and(|needs| needs.when.is_none());
                match &intent.approval {
                    Some(name) => {
                        if let Err(reason) = self.approvals.used(name, target, intent.request_digest.as_deref()) {
                            blame.add(Check::CallApproval, reason);
                        }
                    }
                    None if needs => blame
                        .add(Check::CallApproval, format!("expected a call of {target} to be approved, found none")),
                    None => {}
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
            self.calls
                .insert(call.clone(), Call { key, response: None, seq, attempt, target, reserved, settled: false });
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
        call.response.clone_from(&outcome.response_digest);
        if let Some(key) = &call.key {
            self.ledger.settle(key, id, outcome.effect.fate());
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

/// Why the policy does not give this tool call, if so.
fn misfit(intent: &Intent, policy: &PolicyConfig) -> Option<String> {
    if intent.channel != Channel::Tool {
        return None;
    }
    let Some(tool) = policy.tool(&intent.target) else {
        return Some(format!("expected a tool of the policy, found {}", intent.target));
    };
    let Some(effect) = intent.effect.filter(|effect| *effect >= tool.side_effect) else {
        let found = intent.effect.map_or("none", |e| e.as_str());
        return Some(format!(
            "expected the effect {} that the contract of {} names or a tighter one, found {found}",
            tool.side_effect.as_str(),
            tool.name
        ));
    };
    for effect in [tool.side_effect, effect] {
        if !policy.allowed_effects.contains(&effect) {
            return Some(format!("expected an effect that the class allows, found {}", effect.as_str()));
        }
    }
    if let Some(most) =
        tool.limits.request_bytes.and_then(|most| u64::try_from(most).ok()).filter(|n| intent.request_bytes > *n)
    {
        return Some(format!(
            "expected at most {most} bytes of arguments of {}, found {}",
            tool.name, intent.request_bytes
        ));
    }
    let found = intent.definition.as_deref();
    let expected = match &tool.upstream {
        Upstream::Mcp(McpUpstream { digest: Some(pin), .. }) if found == Some(pin) => return None,
        Upstream::Mcp(McpUpstream { digest: None, .. }) if found.is_some() => return None,
        Upstream::Http(_) if found.is_none() => return None,
        Upstream::Mcp(McpUpstream { digest: Some(pin), .. }) => pin.as_str(),
        Upstream::Mcp(_) => "the upstream listed",
        Upstream::Http(_) => "none, as an HTTP tool has",
    };
    Some(format!("expected the definition of {} to be {expected}, found {}", tool.name, found.unwrap_or("none")))
}

/// Why the cost that a model call set aside does not follow from the policy's prices, if so. How its tokens divide between
/// prompt and reply is not in the log: the cost lies between that of all the one and all the other.
fn mispriced(intent: &Intent, policy: &PolicyConfig) -> Option<String> {
    if intent.channel != Channel::Model {
        return (intent.reserved_cost_micros != 0).then(|| "expected no cost but of models, found some".to_owned());
    }
    let model = intent.model.as_deref().unwrap_or_default();
    let Some(price) = price::of(&policy.models.prices, model) else {
        let priced = policy.limits.cost_micros.is_none() && intent.reserved_cost_micros == 0;
        return (!priced).then(|| format!("expected a model that has a price, found {model:?}"));
    };
    let (tokens, found) = (intent.reserved_tokens, intent.reserved_cost_micros);
    let ends = [price.cost(tokens, 0), price.cost(0, tokens)];
    let (least, most) = (ends.into_iter().min()?, ends.into_iter().max()?);
    (!(least..=most).contains(&found)).then(|| {
        let [least, most, found] = [least, most, found].map(price::show);
        format!("expected {tokens} tokens of {model:?} to cost {least} to {most}, found {found}")
    })
}

/// The counters in words.
fn counters(usage: &Usage) -> String {
    let cost =
        if usage.cost_micros == 0 { String::new() } else { format!(", a cost of {}", price::show(usage.cost_micros)) };
    format!("{} tool calls, {} tokens{cost} and {} denials", usage.tool_calls, usage.tokens, usage.denials)
}
