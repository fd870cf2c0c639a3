//! What a log says so far, and what may come next.
//!
//! Guarantees: [`History::extended`] takes an unbroken tree, the attempt's own signature, attempts in order, every counter
//! as its events make it, no call past a limit, and nothing after the end: whatever it takes, and docs/evidence-format.md asks for,
//! verifies. But for one thing, which is worse lost than seen: that containment was lost, and what was meant to follow.
//! Non-goals: repair, as a segment holds whole or not at all; judging again what [`verify`](crate::verify) decides again beyond the format: votes of
//! approvers, assessments by the pack, and keys of all arguments. The gateway judges those before a call leaves.

use std::{collections::BTreeMap, sync::Arc};

use imbl::{HashMap, HashSet, OrdMap};
use jiff::Timestamp;

use crate::{
    canonical,
    evidence::{
        fits,
        merkle::Tree,
        note::{self, VerifierKey},
        record::{
            Actor, AttemptOpened, Channel, Effect, Event, Intent, Outcome, Record, Refusals, Replayed, Resolved,
            TaskClosed, VERSION,
        },
        rollback::{self, Leaving, Undoing},
        segment::Segment,
    },
    gateway::refusal::Refused,
    policy::{
        access::Assessment,
        approval::{Approvals, Exact},
        budget::Spent,
        config::{HttpUpstream, Idempotency, PolicyConfig, Sensitivity, SideEffect, Tool, ToolUsage, Upstream, Usage},
        ledger::{Found, Ledger},
        rule::Rule,
    },
};

/// Intents that are remembered for calls to refer to. A harness has a handful open at a time, and keeps MCP sessions under
/// the intents that opened them.
const RECENT: usize = 4096;
/// Intents that may be open at once: each takes memory until its outcome.
const OPEN: usize = 4096;
/// Tools that are counted: more than a task may name.
const TOOLS: usize = 4096;
/// Calls of unknown fate that are remembered for reads to resolve.
const UNKNOWN: usize = 65_536;
/// Bytes of a call's, a target's or a key's name.
const NAME: usize = 4096;
/// Records in one segment: it is checked under the log's lock.
const RECORDS: usize = 4096;

/// What the log says of a call that people are asked about.
#[derive(Clone, Copy, Debug)]
pub struct Before {
    /// How many calls like it were made by an approval.
    pub made: i64,
    /// The counters.
    pub usage: Usage,
    /// The most sensitive data that the task has handled.
    pub seen: Sensitivity,
}

/// An intent that lies witnessed in the bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IntentFacts {
    /// Its place in the log.
    pub seq: u64,
    /// The call.
    pub call: String,
    /// The attempt that means to make it.
    pub attempt: i64,
    /// Which way.
    pub channel: Channel,
    /// To what.
    pub target: String,
    /// What it may change.
    pub effect: Option<SideEffect>,
    /// The digest of the upstream's definition of an MCP tool.
    pub definition: Option<String>,
    /// The digest of the request.
    pub request_digest: Option<String>,
    /// The idempotency key under which it is made.
    pub key: Option<String>,
    /// The approvals by which it is made.
    pub approvals: Vec<String>,
    /// The model that is asked, as it may be recorded.
    pub model: Option<String>,
    /// What is set aside for it.
    pub reserved: Spent,
    /// What the pack found of it.
    pub assessment: Option<Assessment>,
    /// The digest of the policy by which its attempt runs.
    pub policy: String,
    /// Where an HTTP tool is, by that policy.
    pub http: Option<Arc<HttpUpstream>>,
    /// What it undoes.
    pub undoes: Option<Undoes>,
    /// The counters before it.
    pub usage: Usage,
    /// The most sensitive data that the task had handled before it.
    pub seen: Sensitivity,
    /// Whether it still waits for its outcome.
    pub open: bool,
    /// What its outcome says.
    pub became: Option<Effect>,
}

impl IntentFacts {
    /// Whether its call leaves before it lies in the bucket.
    pub fn leaves_witnessed(&self) -> bool {
        self.channel.leaves_witnessed(self.effect)
    }

    /// Whether no contract says that it changes something.
    pub fn changes_nothing(&self) -> bool {
        !matches!(self.effect, Some(SideEffect::Write | SideEffect::External))
    }
}

/// A call of another task that a call undoes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undoes {
    /// The call.
    pub call: String,
    /// Until when, RFC 3339.
    pub until: Option<String>,
}

/// A call without an outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
struct OpenCall {
    target: Arc<str>,
    key: Option<Arc<str>>,
    seq: u64,
    attempt: i64,
    tokens: i64,
    cost: i64,
}

/// A call of unknown fate: by its outcome, or because its harness is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Lost {
    target: Arc<str>,
    key: Option<Arc<str>>,
    /// The place in the log from which on that is so.
    since: u64,
}

/// What a contract says of a tool, as far as records are judged by it.
#[derive(Clone, Debug)]
struct Terms {
    contract: String,
    /// Calls that it allows.
    calls: Option<i64>,
    /// What makes two calls one.
    idempotency: Option<Idempotency>,
    /// Where it is, if over HTTP.
    http: Option<Arc<HttpUpstream>>,
    /// How sensitive its results are at least.
    floor: Sensitivity,
    /// The tool that tells what became of its calls.
    verify: Option<String>,
    /// Whether its calls are undone by calls.
    undoable: bool,
}

impl Terms {
    fn of(tool: &Tool) -> Self {
        Self {
            contract: tool.contract.clone(),
            calls: tool.limits.calls,
            idempotency: tool.idempotency.clone(),
            http: match &tool.upstream {
                Upstream::Http(http) => Some(Arc::new(http.clone())),
                Upstream::Mcp(_) => None,
            },
            floor: tool.data.result,
            verify: tool.verify.as_ref().map(|read| read.tool.clone()),
            undoable: tool.compensation().is_some(),
        }
    }
}

/// A call's name, in as little as tells it from others: whoever looks for two of one print finds that his own is refused.
fn print(call: &str) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = canonical::sha256(call.as_bytes());
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// A log, as far as its next segment is judged by it.
#[derive(Clone, Debug, Default)]
pub struct History {
    tree: Tree,
    usage: Usage,
    refused: Refusals,
    /// Refusals that end nothing, among those that are counted.
    ignored: i64,
    attempt: i64,
    /// Counts `attempt.opened` and `task.closed`: who signs changes with them.
    incarnation: u64,
    /// Between `attempt.opened` and `attempt.closed`.
    opened: bool,
    /// The attempt has seen its containment broken.
    loose: bool,
    /// The rule by which the attempt has come to an end from which it does not open again.
    over: Option<Rule>,
    closed: bool,
    /// When the attempt was first opened, and when it wrote its newest record, by its own clock.
    lasted: Option<(Timestamp, Timestamp)>,
    /// How the attempt was closed; none before it is.
    parting: Option<Arc<str>>,
    /// How the task ended.
    outcome: Option<Arc<TaskClosed>>,
    key: Option<Arc<VerifierKey>>,
    /// The attempt's policy.
    policy: Option<Arc<PolicyConfig>>,
    /// The digest of the attempt's policy.
    policy_digest: Arc<str>,
    /// The class of the task, empty without.
    task_class: Arc<str>,
    /// What its contracts say of its tools.
    terms: Arc<BTreeMap<String, Terms>>,
    /// Whether any attempt had tools whose calls are undone by calls.
    undoable: bool,
    /// What a rollback undoes, and how far that has come.
    undoing: Option<Arc<Undoing>>,
    /// What has been called: all attempts' calls, and the newest one's definitions.
    tools: OrdMap<String, ToolUsage>,
    approvals: Arc<Approvals>,
    ledger: Arc<Ledger>,
    /// The most sensitive data that the task has handled.
    seen: Sensitivity,
    lost: Arc<BTreeMap<String, Lost>>,
    calls: HashMap<String, OpenCall>,
    /// All calls that there were, by the [`print`] of their names.
    named: HashSet<u64>,
    intents: OrdMap<u64, Arc<IntentFacts>>,
}

impl History {
    /// The tree.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// The counters after the last record.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// How many of the refusals end nothing.
    pub fn ignored(&self) -> i64 {
        self.ignored
    }

    /// What was refused.
    pub fn refused(&self) -> Refusals {
        self.refused
    }

    /// What the log says of each tool, to an attempt: definitions are each attempt's own.
    pub fn tools(&self, attempt: i64) -> BTreeMap<String, ToolUsage> {
        let of = |(name, used): (&String, &ToolUsage)| {
            let definition = used.definition.clone().filter(|_| attempt == self.attempt);
            (name.clone(), ToolUsage { definition, ..used.clone() })
        };
        self.tools.iter().map(of).collect()
    }

    /// Calls by their idempotency keys, as an attempt that opens now finds them: what is open stays so for ever.
    pub fn ledger(&self) -> Ledger {
        let mut ledger = (*self.ledger).clone();
        ledger.abandon();
        ledger
    }

    /// The class of the task, empty without.
    pub fn task_class(&self) -> Arc<str> {
        self.task_class.clone()
    }

    /// The last attempt that opened, 0 before the first.
    pub fn attempt(&self) -> i64 {
        self.attempt
    }

    /// Who signs the log's end, by their number: another harness, though it be of the same attempt, is another.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Whether the task has ended.
    pub fn closed(&self) -> bool {
        self.closed
    }

    /// Whether the attempt has seen its containment broken: no call of it leaves any more.
    pub fn loose(&self) -> bool {
        self.loose
    }

    /// The rule by which this attempt has come to an end from which it does not open again.
    pub fn over(&self, attempt: i64) -> Option<Rule> {
        self.over.filter(|_| attempt == self.attempt)
    }

    /// How the task ended, once its log is sealed.
    pub fn outcome(&self) -> Option<TaskClosed> {
        self.outcome.as_deref().cloned()
    }

    /// What the log is to be sealed with, where whoever seals it says this of its last attempt. What was presumed is borne out by the log or
    /// is not known; and where the log says otherwise, it is not known either.
    pub fn verdict(&self, closed: TaskClosed, attempt: i64, presumed: bool) -> TaskClosed {
        let of_it = attempt == self.attempt;
        let parting = self.parting.as_deref().filter(|_| of_it && !self.opened);
        let limits = self.policy.as_ref().filter(|_| of_it).map(|policy| policy.limits);
        let limit = limits.map(|limits| limits.wall_time_seconds.saturating_add(limits.approval_wait_seconds));
        let lasted = self.lasted.zip(limit);
        let time_over = lasted.is_some_and(|((from, until), limit)| until.duration_since(from).as_secs() >= limit);
        closed.borne_out(presumed, of_it, parting, time_over)
    }

    /// The most sensitive data that the task has handled.
    pub fn seen(&self) -> Sensitivity {
        self.seen
    }

    /// What there was before a call that people are asked about.
    pub fn before(&self, call: &Exact) -> Before {
        Before { made: self.approvals.made(call), usage: self.usage, seen: self.seen }
    }

    /// Calls that have no outcome.
    pub fn open_calls(&self) -> usize {
        self.calls.len()
    }

    /// The intent with this sequence number, if it is recent.
    pub fn intent(&self, seq: u64) -> Option<&IntentFacts> {
        self.intents.get(&seq).map(Arc::as_ref)
    }

    /// The log with this segment at its end.
    ///
    /// # Errors
    /// [`Rule::LogSegment`] and others, by the first thing that does not hold.
    pub fn extended(&self, segment: &Segment, origin: &str) -> Result<Self, Refused> {
        let records = segment.decode().map_err(|e| broken(e.to_string()))?;
        self.extended_by(segment, &records, origin)
    }

    /// The log with this segment, whose records these are, at its end.
    ///
    /// # Errors
    /// As [`History::extended`].
    pub fn extended_by(&self, segment: &Segment, records: &[Record], origin: &str) -> Result<Self, Refused> {
        if self.closed {
            return Err(Refused::denied(Rule::TaskClosed, "the task has ended: its log takes no more records"));
        }
        let checkpoint = segment.note.checkpoint().map_err(|e| broken(e.to_string()))?;
        if checkpoint.origin != origin {
            return Err(broken(format!("expected a checkpoint of {origin}, found one of {}", checkpoint.origin)));
        }
        if segment.records.len() > RECORDS {
            return Err(broken(format!("expected at most {RECORDS} records, found {}", segment.records.len())));
        }
        let mut next = Self { tree: segment.extend(&self.tree).map_err(|e| broken(e.to_string()))?, ..self.clone() };
        let Some(first) = records.first() else { return Err(broken("expected at least one record")) };
        for (index, record) in records.iter().enumerate() {
            if (record.actor, record.attempt) != (first.actor, first.attempt) {
                return Err(at(record, "expected one writer and one attempt in a segment, found two"));
            }
            next.record(record, index, origin)?;
        }
        next.signed(segment, first.actor)?;
        Ok(next)
    }

    /// The attempt signed what the harness wrote, and nobody else anything; cosignatures are the witness's business.
    fn signed(&self, segment: &Segment, writer: Actor) -> Result<(), Refused> {
        if writer == Actor::Gateway {
            return Ok(());
        }
        let key = self.key.as_ref().ok_or_else(|| broken("expected attempt.opened as the log's first record"))?;
        segment.note.verify(key).map_err(|e| broken(e.to_string()))
    }

    fn record(&mut self, record: &Record, index: usize, origin: &str) -> Result<(), Refused> {
        let kind = record.event.kind();
        if record.v != VERSION {
            return Err(at(record, format!("expected version {VERSION}, found {}", record.v)));
        }
        let Some(time) = fits::time(&record.time) else {
            return Err(at(record, fits::no_time(&record.time)));
        };
        if let Some(found) = fits::undigested(&record.event) {
            return Err(at(record, format!("expected 64 hex digits of a digest, found {found:?}")));
        }
        if self.closed {
            return Err(at(record, "expected nothing after task.closed"));
        }
        let ends = matches!(record.event, Event::TaskClosed(_));
        if (record.actor == Actor::Gateway) != ends {
            return Err(at(
                record,
                format!("expected task.closed from the gateway and all else from the harness, found {kind}"),
            ));
        }
        if record.attempt < self.attempt {
            return Err(Refused::denied(
                Rule::IdentityAttempt,
                format!(
                    "record {}: attempt {} has been followed by attempt {}",
                    record.seq, record.attempt, self.attempt
                ),
            ));
        }
        match &record.event {
            // An attempt's key must be known before the first signature by it.
            Event::AttemptOpened(_) if index != 0 => {
                return Err(at(record, "expected attempt.opened at the start of a segment only"));
            }
            Event::AttemptOpened(_) | Event::TaskClosed(_) => {}
            _ if record.attempt != self.attempt || !self.opened => {
                return Err(at(record, format!("expected attempt.opened before {kind} in attempt {}", record.attempt)));
            }
            _ => {}
        }
        let mut usage = self.usage;
        match &record.event {
            Event::AttemptOpened(_) if self.over(record.attempt).is_some() => {
                return Err(at(record, "expected an attempt that is over to stay closed"));
            }
            Event::AttemptOpened(opened) => {
                let key: VerifierKey = opened.key.parse().map_err(|e| at(record, format!("{e}")))?;
                let name = format!("{origin}/{}", record.attempt);
                if record.attempt < 1 || key.name() != name || key.is_witness() {
                    return Err(at(record, format!("expected a log key named {name}, found {}", key.name())));
                }
                if !opened.containment.contained || !opened.containment.breaches.is_empty() {
                    let reason = format!("record {}: expected a contained pod, found one that is not", record.seq);
                    return Err(Refused::denied(Rule::ContainmentLost, reason));
                }
                if note::origin(&opened.policy.task.uid) != origin {
                    return Err(at(record, "expected the policy of this task, found another's"));
                }
                self.tools = self.tools(record.attempt).into_iter().collect();
                self.terms =
                    Arc::new(opened.policy.tools.iter().map(|tool| (tool.name.clone(), Terms::of(tool))).collect());
                // Those who were to say what became of open calls are gone.
                Arc::make_mut(&mut self.ledger).abandon();
                let open: Vec<_> = self.calls.iter().map(|(call, open)| (call.clone(), open.clone())).collect();
                open.into_iter().for_each(|(call, open)| self.lose(call, open.target, open.key, record.seq));
                self.undoable |= self.terms.values().any(|terms| terms.undoable);
                self.task_class = opened.policy.task.task_class.as_deref().unwrap_or_default().into();
                self.policy_digest = opened.policy.digest().map_err(|e| at(record, e))?.into();
                self.plan(record, opened)?;
                if record.attempt != self.attempt {
                    self.lasted = Some((time, time));
                }
                self.parting = None;
                (self.attempt, self.opened, self.loose, self.over) = (record.attempt, true, false, None);
                (self.key, self.policy) = (Some(Arc::new(key)), Some(Arc::new(opened.policy.clone())));
                self.incarnation += 1;
            }
            Event::Intent(intent) => self.intended(record, time, intent, &mut usage)?,
            Event::Outcome(outcome) => self.settled(record, outcome, &mut usage)?,
            Event::Replayed(replayed) => {
                let Replayed { call, target, key, request_digest, response_digest } = replayed;
                let found = match self.terms.get(target).and_then(|terms| terms.idempotency.as_ref()) {
                    Some(of) => self.ledger.find(key, request_digest, of, time),
                    None => return Err(at(record, format!("expected a tool that is idempotent, found {target:?}"))),
                };
                if !matches!(found, Found::Made(made) if made.call == *call && made.response_digest.as_ref() == Some(response_digest))
                {
                    return Err(at(
                        record,
                        format!(
                            "expected call {call} to have been made under its key with this result, found {found:?}"
                        ),
                    ));
                }
            }
            Event::Resolved(resolved) => self.resolved(record, resolved)?,
            Event::Denied(denied) if denied.is_countable() => {
                usage.denials = usage.denials.saturating_add(denied.count);
                self.refused.add(denied);
                if denied.rule == Rule::EgressIgnored {
                    let lists = self.policy.as_ref().is_some_and(|policy| !policy.ignored_hosts.is_empty());
                    if denied.channel != Channel::Egress || !lists {
                        return Err(at(record, "expected connections only to be ignored, by a policy that lists some"));
                    }
                    self.ignored = self.ignored.saturating_add(denied.count);
                }
            }
            Event::Denied(denied) => {
                return Err(at(
                    record,
                    format!("expected one refusal, or several without a digest, found {}", denied.count),
                ));
            }
            Event::ApprovalRequested(approval) | Event::ApprovalDecided(approval) => {
                let approvals = Arc::make_mut(&mut self.approvals);
                let seen = approvals.seen(&approval.name, &approval.call(), approval.standing);
                seen.map_err(|reason| at(record, reason))?;
            }
            Event::ContainmentChecked(seen) => self.loose |= !seen.contained || !seen.breaches.is_empty(),
            Event::AttemptClosed(closed) => {
                (self.opened, self.over) = (false, closed.rule());
                self.parting = Some(closed.reason.as_str().into());
            }
            Event::TaskClosed(closed) => {
                self.closed = true;
                self.outcome = Some(Arc::new(closed.clone()));
                self.incarnation += 1;
            }
        }
        if let Some((_, until)) = self.lasted.as_mut().filter(|_| !ends) {
            *until = time;
        }
        if record.usage != usage {
            return Err(at(record, format!("expected counters {usage:?}, found {:?}", record.usage)));
        }
        self.usage = usage;
        Ok(())
    }

    fn intended(
        &mut self,
        record: &Record,
        time: jiff::Timestamp,
        intent: &Intent,
        usage: &mut Usage,
    ) -> Result<(), Refused> {
        let names = [Some(&intent.call), Some(&intent.target), intent.key.as_ref(), intent.definition.as_ref()];
        if names.into_iter().flatten().any(|name| name.len() > NAME) {
            return Err(at(record, format!("expected names of at most {NAME} bytes")));
        }
        if intent.reserved_tokens < 0 || intent.reserved_cost_micros < 0 {
            return Err(at(record, "expected a reservation of no less than 0"));
        }
        if self.named.contains(&print(&intent.call)) {
            return Err(at(record, format!("expected one intent of call {:?}, found a second", intent.call)));
        }
        if self.calls.len() >= OPEN {
            return Err(at(record, format!("expected at most {OPEN} calls without an outcome")));
        }
        usage.tokens = usage.tokens.saturating_add(intent.reserved_tokens);
        usage.cost_micros = usage.cost_micros.saturating_add(intent.reserved_cost_micros);
        if intent.channel == Channel::Tool {
            usage.tool_calls = usage.tool_calls.saturating_add(1);
        }
        let policy = self.policy.clone().ok_or_else(|| at(record, "expected attempt.opened first"))?;
        let limits = policy.limits;
        let over = |rule, used: i64, limit: i64| {
            Refused::denied(rule, format!("record {}: this call would make {used} of {limit}", record.seq))
        };
        if intent.channel == Channel::Tool && usage.tool_calls > limits.tool_calls {
            return Err(over(Rule::ToolCalls, usage.tool_calls, limits.tool_calls));
        }
        if intent.reserved_tokens > 0 && usage.tokens > limits.tokens {
            return Err(over(Rule::Tokens, usage.tokens, limits.tokens));
        }
        if intent.channel == Channel::Tool {
            if !self.tools.contains_key(&intent.target) && self.tools.len() >= TOOLS {
                return Err(at(record, format!("expected at most {TOOLS} tools")));
            }
            let used = self.tools.entry(intent.target.clone()).or_default();
            used.calls = used.calls.saturating_add(1);
            let most = self.terms.get(&intent.target).and_then(|terms| terms.calls);
            if let Some(most) = most.filter(|most| used.calls > *most) {
                return Err(over(Rule::ToolLimitCalls, used.calls, most));
            }
            if let Some(definition) = &intent.definition {
                let first = used.definition.get_or_insert_with(|| definition.clone());
                if first != definition {
                    return Err(Refused::denied(
                        Rule::ToolChanged,
                        format!(
                            "record {}: expected the definition {first} of {}, by which the attempt called it first, found {definition}",
                            record.seq, intent.target
                        ),
                    ));
                }
            }
        }
        if let Some(limit) = limits.cost_micros.filter(|limit| usage.cost_micros > *limit)
            && intent.reserved_cost_micros > 0
        {
            return Err(over(Rule::Cost, usage.cost_micros, limit));
        }
        let counted = usage.denials.saturating_sub(self.ignored);
        if let Some(limit) = limits.denials.filter(|limit| counted >= *limit) {
            return Err(Refused::denied(
                Rule::Denials,
                format!("record {}: {counted} of {limit} denials are used: no call leaves any more", record.seq),
            ));
        }
        if let Some(problem) = fits::misfit(intent, &policy).or_else(|| fits::mispriced(intent, &policy)) {
            return Err(at(record, problem));
        }
        let terms = self.terms.clone();
        let terms = terms.get(&intent.target).filter(|_| intent.channel == Channel::Tool);
        match (terms.and_then(|terms| terms.idempotency.as_ref()), &intent.key) {
            (None, None) => {}
            (Some(of), Some(key)) => {
                let digest = intent.request_digest.as_deref().unwrap_or_default();
                let found = self.ledger.find(key, digest, of, time);
                if found != Found::Free {
                    return Err(Refused::denied(
                        Rule::ToolIdempotency,
                        format!("record {}: expected no call under this key, found {found:?}", record.seq),
                    ));
                }
                Arc::make_mut(&mut self.ledger).intend(key, &intent.call, digest, &record.time);
            }
            (Some(_), None) => return Err(at(record, "expected an idempotency key, found none")),
            (None, Some(_)) => return Err(at(record, "expected no idempotency key, found one")),
        }
        self.undoes(record, time, intent)?;
        if !intent.approvals.is_empty() {
            Arc::make_mut(&mut self.approvals)
                .used(&intent.approvals, &intent.target, intent.request_digest.as_deref())
                .map_err(|reason| Refused::denied(Rule::ToolApproval, format!("record {}: {reason}", record.seq)))?;
        }
        if intent.channel != Channel::Tool && (intent.assessment.is_some() || !intent.approvals.is_empty()) {
            return Err(at(record, "expected an assessment and approvals of tool calls only"));
        }
        let (before, seen) = (self.usage, self.seen);
        if let Some(assessment) = &intent.assessment {
            if assessment.seen != seen {
                let (expected, found) = (seen.as_str(), assessment.seen.as_str());
                return Err(at(record, format!("expected {expected} data to have been seen, found {found}")));
            }
            self.seen = seen.max(assessment.arguments);
        }
        self.named.insert(print(&intent.call));
        self.calls.insert(
            intent.call.clone(),
            OpenCall {
                target: intent.target.as_str().into(),
                key: intent.key.as_deref().map(Into::into),
                seq: record.seq,
                attempt: record.attempt,
                tokens: intent.reserved_tokens,
                cost: intent.reserved_cost_micros,
            },
        );
        self.intents.insert(
            record.seq,
            Arc::new(IntentFacts {
                seq: record.seq,
                call: intent.call.clone(),
                attempt: record.attempt,
                channel: intent.channel,
                target: intent.target.clone(),
                effect: intent.effect,
                definition: intent.definition.clone(),
                request_digest: intent.request_digest.clone(),
                key: intent.key.clone(),
                approvals: intent.approvals.clone(),
                model: intent.model.clone(),
                reserved: Spent { tokens: intent.reserved_tokens, cost_micros: intent.reserved_cost_micros },
                assessment: intent.assessment.clone(),
                policy: self.policy_digest.to_string(),
                http: terms.and_then(|terms| terms.http.clone()),
                undoes: intent.undoes.clone().map(|call| Undoes {
                    until: self.undoing().and_then(|undoing| undoing.undo(&call)).and_then(|undo| undo.until.clone()),
                    call,
                }),
                usage: before,
                seen,
                open: true,
                became: None,
            }),
        );
        // Settled ones go first: an open one is still to be referred to.
        while self.intents.len() > RECENT {
            let oldest = self.intents.iter().find(|(_, i)| !i.open).or(self.intents.iter().next()).map(|(seq, _)| *seq);
            match oldest {
                Some(seq) => self.intents.remove(&seq),
                None => break,
            };
        }
        Ok(())
    }

    fn settled(&mut self, record: &Record, outcome: &Outcome, usage: &mut Usage) -> Result<(), Refused> {
        let call = self.calls.get(&outcome.call).filter(|call| call.attempt == record.attempt).cloned();
        let Some(OpenCall { target, key, seq, tokens, cost, .. }) = call else {
            return Err(at(record, format!("expected an open call of this attempt, found {:?}", outcome.call)));
        };
        if outcome.tokens < 0 || outcome.cost_micros < 0 {
            return Err(at(record, "expected no less than 0 tokens, and no less than no cost"));
        }
        self.calls.remove(&outcome.call);
        let terms = self.terms.get(&*target);
        let floor = terms.map(|terms| terms.floor).filter(|_| outcome.given().is_some()).unwrap_or_default();
        if outcome.sensitivity < floor {
            let (expected, found) = (floor.as_str(), outcome.sensitivity.as_str());
            return Err(at(
                record,
                format!("expected a result of {target} to be {expected} data at least, found {found}"),
            ));
        }
        self.seen = self.seen.max(outcome.sensitivity);
        if let Some(key) = &key {
            Arc::make_mut(&mut self.ledger).settle(key, &outcome.call, outcome.effect.fate(), outcome.given());
        }
        if outcome.undone_by.is_some()
            && (outcome.effect != Effect::Applied
                || self.undoing.is_some()
                || !terms.is_some_and(|terms| terms.undoable))
        {
            return Err(at(record, format!("expected no call that undoes {target}, found one")));
        }
        if let Some(undoing) = &mut self.undoing {
            Arc::make_mut(undoing).settle(&outcome.call, outcome.effect);
        }
        // What was lost with its harness has an outcome after all.
        if self.lost.contains_key(&outcome.call) {
            Arc::make_mut(&mut self.lost).remove(&outcome.call);
        }
        if outcome.effect == Effect::Unknown {
            self.lose(outcome.call.clone(), target, key, record.seq);
        }
        if let Some(intent) = self.intents.get_mut(&seq) {
            let intent = Arc::make_mut(intent);
            (intent.open, intent.became) = (false, Some(outcome.effect));
        }
        usage.tokens = usage.tokens.saturating_sub(tokens).saturating_add(outcome.tokens);
        usage.cost_micros = usage.cost_micros.saturating_sub(cost).saturating_add(outcome.cost_micros);
        Ok(())
    }

    /// A rollback has the plan that its first attempt began with, and nothing else has one. Whether that is the true one was asked when it
    /// came, see the witness.
    fn plan(&mut self, record: &Record, opened: &AttemptOpened) -> Result<(), Refused> {
        let wrong = |found: &str| Err(at(record, format!("expected the plan of what the task undoes, found {found}")));
        match (&opened.policy.task.rollback_of, &opened.rollback, &self.undoing) {
            (None, None, _) => self.undoing = None,
            (Some(of), Some(plan), undoing) if plan.origin == note::origin(&of.uid) => match undoing {
                Some(undoing) if undoing.plan != *plan => return wrong("another than before"),
                Some(_) => {}
                None => self.undoing = Some(Arc::new(Undoing::new(plan.clone()))),
            },
            (_, Some(_), _) => return wrong("another's"),
            (Some(_), None, _) => return wrong("none"),
        }
        Ok(())
    }

    /// In a rollback what changes something undoes something, as planned; elsewhere nothing does.
    fn undoes(&mut self, record: &Record, time: jiff::Timestamp, intent: &Intent) -> Result<(), Refused> {
        let leaving = Leaving {
            channel: intent.channel,
            effect: intent.effect,
            undoes: intent.undoes.as_deref(),
            contract: self.terms.get(&intent.target).map_or("", |terms| &terms.contract),
            digest: intent.request_digest.as_deref().unwrap_or_default(),
        };
        rollback::lets(self.undoing(), leaving, time)
            .map_err(|reason| Refused::denied(Rule::ToolRollback, format!("record {}: {reason}", record.seq)))?;
        if let Some((undoing, undoes)) = self.undoing.as_mut().zip(intent.undoes.as_ref()) {
            Arc::make_mut(undoing).intend(undoes, &intent.call);
        }
        Ok(())
    }

    /// How far a rollback has come.
    pub fn undoing(&self) -> Option<&Undoing> {
        self.undoing.as_deref()
    }

    /// Whether any attempt had tools whose calls are undone by calls.
    pub fn undoable(&self) -> bool {
        self.undoable
    }

    /// Nobody knows what became of a call. Where its contract names a read that tells, one may.
    fn lose(&mut self, call: String, target: Arc<str>, key: Option<Arc<str>>, since: u64) {
        let verify = self.terms.get(&*target).is_some_and(|terms| terms.verify.is_some());
        if verify && self.lost.len() < UNKNOWN {
            Arc::make_mut(&mut self.lost).entry(call).or_insert(Lost { target, key, since });
        }
    }

    /// A read tells what became of a call whose fate was unknown, of whichever attempt: one made after that was known, that succeeded, by the
    /// tool that the contract names.
    fn resolved(&mut self, record: &Record, resolved: &Resolved) -> Result<(), Refused> {
        let Resolved { call, effect, by } = resolved;
        let Some(Lost { target, key, since }) = self.lost.get(call).cloned() else {
            return Err(at(record, format!("expected a call of unknown fate, found {call:?}")));
        };
        let reader = self.terms.get(&*target).and_then(|terms| terms.verify.as_ref());
        // What did not succeed has told nothing.
        let is_read = |read: &IntentFacts| {
            read.call == *by
                && read.channel == Channel::Tool
                && read.became == Some(Effect::Applied)
                && Some(&read.target) == reader
        };
        let told = self.intents.range(since..).any(|(_, read)| is_read(read));
        if !told || *effect == Effect::Unknown {
            return Err(at(
                record,
                format!("expected a read by {reader:?} to tell what became of {call}, found {by:?}"),
            ));
        }
        Arc::make_mut(&mut self.lost).remove(call);
        self.calls.remove(call);
        if let Some(undoing) = &mut self.undoing {
            Arc::make_mut(undoing).settle(call, *effect);
        }
        if let Some(key) = key {
            Arc::make_mut(&mut self.ledger).settle(&key, call, effect.fate(), None);
        }
        Ok(())
    }
}

fn broken(reason: impl std::fmt::Display) -> Refused {
    Refused::denied(Rule::LogSegment, format!("the segment does not extend the log: {reason}"))
}

fn at(record: &Record, reason: impl std::fmt::Display) -> Refused {
    broken(format!("record {}: {reason}", record.seq))
}
