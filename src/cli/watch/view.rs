//! The view of a task: lines for what happened, and a panel for the current state.
//!
//! Guarantees: this module is pure. It takes the task and its records and returns text. All text from outside goes through `Safe`.

use std::collections::BTreeMap;

use jiff::{Timestamp, tz::TimeZone};

use super::super::terminal::{Paint, Safe, times};
use crate::{
    api::{
        AgentTask,
        agent_task::{Attempt, Phase},
        readiness::{READY, STALLED},
    },
    evidence::record::{AttemptOpened, CallOutcome, Channel, Denied, Event, Intent, Outcome, Record, Summary, Tone},
    policy::{
        config::{Limits, ModelEndpoints, Usage},
        model::api::Api,
        price,
    },
};

/// The width of a limit's bar, in cells.
const BAR: usize = 24;
/// The part of a limit from which on its bar is highlighted.
const NEARLY: f64 = 0.8;
/// The maximum number of calls that wait for their outcome. A pod that dies leaves some, and a hostile log must not fill the memory with
/// them.
const MAX_OPEN: usize = 10_000;

/// The state of a task as it is shown.
pub(in crate::cli) struct View {
    name: String,
    paint: Paint,
    zone: TimeZone,
    /// Lines that are not shown yet.
    lines: Vec<String>,
    introduced: bool,
    last_notice: String,
    phase: Option<Phase>,
    reason: String,
    attempt: i64,
    /// The attempts whose end has been shown.
    ended: BTreeMap<i64, String>,
    conditions: BTreeMap<String, String>,
    usage: Usage,
    limits: Option<Limits>,
    open: BTreeMap<String, Call>,
    /// Why calls were not made, for calls whose outcome is not shown yet.
    unmade: BTreeMap<String, String>,
    started: Option<Timestamp>,
    /// When the newest attempt began, for its wall time.
    attempt_started: Option<Timestamp>,
    place: Option<String>,
    /// The pack's model endpoints.
    models: ModelEndpoints,
    deleted: bool,
}

/// A call whose intent is in the log.
struct Call {
    channel: Channel,
    target: String,
    model: Option<String>,
    sent: Option<Timestamp>,
}

impl View {
    /// Creates the view of a task about which nothing is known yet.
    pub(in crate::cli) fn new(namespace: &str, name: &str, paint: Paint) -> Self {
        Self {
            name: format!("{namespace}/{name}"),
            paint,
            zone: TimeZone::system(),
            lines: Vec::new(),
            introduced: false,
            last_notice: String::new(),
            phase: None,
            reason: String::new(),
            attempt: 0,
            ended: BTreeMap::new(),
            conditions: BTreeMap::new(),
            usage: Usage::default(),
            limits: None,
            open: BTreeMap::new(),
            unmade: BTreeMap::new(),
            started: None,
            attempt_started: None,
            place: None,
            models: ModelEndpoints::default(),
            deleted: false,
        }
    }

    /// Returns the lines since the last time.
    pub(in crate::cli) fn take_lines(&mut self) -> Vec<String> {
        std::mem::take(&mut self.lines)
    }

    /// Updates the view from the task, and adds lines for what changed.
    pub(in crate::cli) fn task(&mut self, task: &AgentTask) {
        let now = Timestamp::now();
        if !self.introduced {
            self.introduce(task);
        }
        let spec = &task.spec.limits;
        self.limits.get_or_insert(Limits {
            wall_time_seconds: spec.wall_time_seconds,
            tool_calls: spec.tool_calls,
            tokens: spec.tokens,
            denials: spec.denials,
            cost_micros: spec.cost.as_deref().and_then(price::parse),
            approval_wait_seconds: spec.approval_wait_seconds.unwrap_or_default(),
        });
        let Some(status) = &task.status else { return };
        // Ready and Stalled are for tools. The other conditions say the same to users.
        for condition in status.conditions.iter().filter(|one| one.type_ != READY && one.type_ != STALLED) {
            self.condition(now, condition);
        }
        if let Some(newest) = status.attempt.filter(|n| *n > self.attempt) {
            self.attempt = newest;
            self.attempt_started = None;
        }
        for attempt in &status.attempts {
            self.attempt_ended(now, attempt);
        }
        if let Some(usage) = status.usage {
            // The gateway writes the counters a little later than the harness prints them.
            self.usage.tool_calls = self.usage.tool_calls.max(usage.tool_calls);
            self.usage.denials = self.usage.denials.max(usage.denials);
        }
        self.place = status.evidence.as_ref().map(|e| e.location.clone());
        let reason = status.reason.clone().unwrap_or_default();
        if status.phase != self.phase || reason != self.reason {
            self.phase = status.phase;
            self.reason = reason;
            if !self.is_over() {
                let words = self.standing();
                self.push(now, &words);
            }
        }
    }

    /// Marks the task as deleted.
    pub(in crate::cli) fn deleted(&mut self) {
        self.deleted = true;
    }

    /// Adds a line about the watching itself. The same text twice in a row is shown once.
    pub(in crate::cli) fn notice(&mut self, notice: &str) {
        if self.last_notice != notice {
            notice.clone_into(&mut self.last_notice);
            let text = self.paint.dim(format_args!("  … {}", Safe(notice)));
            self.push(Timestamp::now(), &text);
        }
    }

    /// Adds a line as it is. It must already be safe to show.
    pub(in crate::cli) fn line(&mut self, line: String) {
        self.lines.push(line);
    }

    /// Remembers why a call was not made, for the line of its outcome.
    pub(in crate::cli) fn unmade(&mut self, call: &str, reason: String) {
        if self.unmade.len() < MAX_OPEN {
            self.unmade.insert(call.to_owned(), reason);
        }
    }

    /// Adds a line of the agent's output.
    pub(in crate::cli) fn said(&mut self, line: &str) {
        self.lines.push(format!("{}  {}", self.paint.dim("   agent"), Safe(line)));
    }

    /// Updates the view from a record.
    pub(in crate::cli) fn record(&mut self, attempt: i64, record: &Record) {
        self.last_notice.clear();
        let time = record.time.parse::<Timestamp>().ok();
        let at = time.unwrap_or_else(Timestamp::now);
        self.started = Some(self.started.map_or(at, |t| t.min(at)));
        self.usage = record.usage;
        let paint = self.paint;
        match &record.event {
            Event::AttemptOpened(opened) => self.opened(at, attempt, opened),
            Event::Intent(intent) => self.intent(at, time, intent),
            Event::Outcome(outcome) => self.outcome(at, time, outcome),
            Event::Denied(denied) => self.denied(at, denied),
            Event::ApprovalRequested(asked) => {
                let text = format!(
                    "? {} waits for {} approval(s): belay approve {} or deny it, before {}",
                    Safe(&asked.tool),
                    asked.required,
                    Safe(&asked.name),
                    Safe(&asked.expires)
                );
                self.push(at, &paint.warn(text));
            }
            Event::ContainmentChecked(seen) if seen.contained => {
                let text = format!("  contained still: {} silent", addresses(seen.unreachable.len()));
                self.push(at, &paint.dim(text));
            }
            Event::ContainmentChecked(seen) => {
                let text = format!("✗ CONTAINMENT LOST: {}", Safe(&seen.breaches.join(", ")));
                self.push(at, &paint.bad(paint.strong(text)));
            }
            Event::AttemptClosed(closed) => {
                let text = format!("■ attempt {attempt} closed: {}", Safe(&closed.reason));
                self.push(at, &text);
            }
            // The gateway writes this record, and no pod prints it.
            Event::TaskClosed(_) => {}
            _ => self.summary(at, &record.summary()),
        }
    }

    /// Adds the last line.
    pub(in crate::cli) fn finish(&mut self) {
        let now = Timestamp::now();
        let paint = self.paint;
        let usage = self.usage;
        let word = match (self.deleted, self.phase) {
            (true, _) => paint.bad(paint.strong("● Deleted")),
            (false, Some(Phase::Succeeded)) => paint.good(paint.strong("● Succeeded")),
            (false, Some(Phase::Failed)) => paint.bad(paint.strong("● Failed")),
            (false, _) => paint.warn(paint.strong("● Unknown")),
        };
        let reason = if self.reason.is_empty() { String::new() } else { format!(" ({})", Safe(&self.reason)) };
        let limits = self.limits;
        let of = |limit: Option<i64>| limit.map(|n| format!("/{n}")).unwrap_or_default();
        self.push(
            now,
            &format!(
                "{word}{reason}  attempts {}, tool calls {}{}, tokens {}{}{}, denied {}{}",
                self.attempt,
                usage.tool_calls,
                of(limits.map(|l| l.tool_calls)),
                usage.tokens,
                of(limits.map(|l| l.tokens)),
                self.cost().map(|cost| format!(", cost {cost}")).unwrap_or_default(),
                usage.denials,
                of(limits.and_then(|l| l.denials))
            ),
        );
        if let Some(place) = &self.place {
            let (namespace, task) = self.name.split_once('/').unwrap_or_default();
            let text = format!(
                "           evidence in {}; check it: belay verify {} -n {}",
                Safe(place),
                Safe(task),
                Safe(namespace)
            );
            self.lines.push(paint.dim(text));
        }
    }

    /// Returns the panel with the current state, at most `width` columns wide. It is empty once the task has ended.
    pub(in crate::cli) fn panel(&self, width: usize) -> Vec<String> {
        let Some(limits) = self.limits.filter(|_| !self.is_over()) else { return Vec::new() };
        let paint = self.paint;
        let seconds = self.attempt_started.map_or(0, |t| Timestamp::now().duration_since(t).as_secs().max(0));
        let phase = self.phase.map_or("Unknown".to_owned(), |p| format!("{p:?}"));
        let head =
            format!("{phase}, attempt {}, {} denied, {} under way", self.attempt, self.usage.denials, self.open.len());
        let head = self.cost().map_or(head.clone(), |cost| format!("{head}, cost {cost}"));
        let rule = "─".repeat(width.min(64));
        // A line that is wider than the window would wrap, and the panel would not be where it was drawn.
        let fit = |text: String| text.chars().take(width.saturating_sub(1)).collect::<String>();
        let mut panel = vec![paint.dim(fit(rule)), paint.strong(fit(head))];
        for (name, used, limit) in [
            ("tool calls", self.usage.tool_calls, limits.tool_calls),
            ("tokens", self.usage.tokens, limits.tokens),
            ("wall time", seconds, limits.wall_time_seconds),
        ] {
            let numbers = format!("{used}/{limit}{}", if name == "wall time" { " s" } else { "" });
            let plain = 12 + BAR + 1 + numbers.chars().count();
            panel.push(if plain < width {
                format!("{name:<12}{} {numbers}", self.bar(used, limit))
            } else {
                fit(format!("{name:<12}{numbers}"))
            });
        }
        panel
    }

    fn bar(&self, used: i64, limit: i64) -> String {
        let part = if limit > 0 { (used.max(0) as f64 / limit as f64).min(1.0) } else { 1.0 };
        let full = (part * BAR as f64).round() as usize;
        let bar = "█".repeat(full);
        let rest = self.paint.dim("░".repeat(BAR.saturating_sub(full)));
        let bar = match part {
            p if p >= 1.0 => self.paint.bad(bar),
            p if p >= NEARLY => self.paint.warn(bar),
            _ => self.paint.good(bar),
        };
        format!("{bar}{rest}")
    }

    /// Returns the cost of the models so far and its limit, if the cost is counted.
    fn cost(&self) -> Option<String> {
        let used = self.usage.cost_micros;
        match self.limits.and_then(|limits| limits.cost_micros) {
            Some(limit) => Some(format!("{}/{}", price::show(used), price::show(limit))),
            None => (used > 0).then(|| price::show(used)),
        }
    }

    fn is_over(&self) -> bool {
        self.deleted || matches!(self.phase, Some(Phase::Succeeded | Phase::Failed))
    }

    fn standing(&self) -> String {
        let phase = self.phase.map_or("Unknown".to_owned(), |p| format!("{p:?}"));
        let reason = if self.reason.is_empty() { String::new() } else { format!("  {}", Safe(&self.reason)) };
        format!("● {}{}", self.paint.strong(phase), self.paint.dim(reason))
    }

    fn push(&mut self, at: Timestamp, text: &str) {
        let clock = at.to_zoned(self.zone.clone()).strftime("%H:%M:%S").to_string();
        self.lines.push(format!("{}  {text}", self.paint.dim(clock)));
    }

    fn introduce(&mut self, task: &AgentTask) {
        self.introduced = true;
        let paint = self.paint;
        let spec = &task.spec;
        self.lines.push(format!(
            "{}  class {}, on behalf of {}",
            paint.strong(Safe(&self.name)),
            Safe(&spec.workflow_class),
            Safe(&spec.principal)
        ));
        self.lines.push(paint.dim(format_args!("“{}”", Safe(spec.objective.trim()))));
    }

    fn condition(&mut self, now: Timestamp, condition: &k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition) {
        let told = format!("{} {}", condition.status, condition.reason);
        if self.conditions.insert(condition.type_.clone(), told.clone()) == Some(told) {
            return;
        }
        let text = format!("  {} is {}: {}", Safe(&condition.type_), Safe(&condition.status), Safe(&condition.message));
        let text = if condition.status == "False" { self.paint.warn(text) } else { self.paint.dim(text) };
        self.push(now, &text);
    }

    fn attempt_ended(&mut self, now: Timestamp, attempt: &Attempt) {
        let Some(finished) = &attempt.finished_at else { return };
        let reason = attempt.reason.clone().unwrap_or_default();
        if self.ended.insert(attempt.number, reason.clone()).is_some() {
            return;
        }
        let at = finished.0.min(now);
        let text = match attempt.failure_class {
            Some(class) => {
                self.paint.bad(format_args!("■ attempt {} failed: {} ({class:?})", attempt.number, Safe(&reason)))
            }
            None => format!("■ attempt {} ended {}", attempt.number, self.paint.dim(Safe(&reason))),
        };
        self.push(at, &text);
    }

    fn summary(&mut self, at: Timestamp, summary: &Summary) {
        let Summary { tone, word, what, detail, .. } = summary;
        let text = format!("  {} {word}: {}", Safe(what), Safe(detail));
        let text = match tone {
            Tone::Plain => self.paint.dim(text),
            Tone::Good => self.paint.good(text),
            Tone::Warn => self.paint.warn(text),
            Tone::Bad => self.paint.bad(text),
        };
        self.push(at, &text);
    }

    fn opened(&mut self, at: Timestamp, attempt: i64, opened: &AttemptOpened) {
        self.limits = Some(opened.policy.limits);
        self.models = opened.policy.models.clone();
        self.attempt = self.attempt.max(attempt);
        self.attempt_started = Some(at);
        // A call that an earlier pod left open stays without an outcome.
        self.open.clear();
        let paint = self.paint;
        let pod = &opened.pod;
        let runtime = if pod.runtime_class.is_empty() { "the default runtime" } else { &pod.runtime_class };
        let text = format!(
            "{} {} on {} in {}",
            paint.strong(format_args!("▶ attempt {attempt}")),
            Safe(&pod.name),
            Safe(&pod.node),
            Safe(runtime)
        );
        self.push(at, &text);
        let seen = &opened.containment;
        let text = if seen.contained {
            let (silent, rounds) = (addresses(seen.unreachable.len()), seen.rounds);
            paint.dim(format_args!("  contained: {silent} silent, the gateway answers, {rounds} rounds"))
        } else {
            paint.bad(format_args!("  NOT CONTAINED: {}", Safe(&seen.breaches.join(", "))))
        };
        self.push(at, &text);
    }

    fn intent(&mut self, at: Timestamp, sent: Option<Timestamp>, intent: &Intent) {
        if self.open.len() < MAX_OPEN {
            let call =
                Call { channel: intent.channel, target: intent.target.clone(), model: intent.model.clone(), sent };
            self.open.insert(intent.call.clone(), call);
        }
        let rules: Vec<_> = intent.rules.iter().map(|r| r.as_str()).collect();
        let effect = intent.side_effect.map(|e| format!(" {}", e.as_str())).unwrap_or_default();
        let reserved = if intent.reserved_tokens > 0 {
            format!(", {} tokens reserved", intent.reserved_tokens)
        } else {
            String::new()
        };
        let detail = format!("{effect}  passed {}{reserved}", rules.join(", "));
        let text =
            format!("{} {}{}", self.paint.good("✓"), call(intent.channel, &intent.target), self.paint.dim(detail));
        self.push(at, &text);
    }

    fn outcome(&mut self, at: Timestamp, ended: Option<Timestamp>, outcome: &Outcome) {
        let paint = self.paint;
        let known = self.open.remove(&outcome.call);
        let (name, took) = match &known {
            Some(known) => {
                let took = known.sent.zip(ended).map(|(from, to)| to.duration_since(from).as_millis());
                (call(known.channel, &known.target), took.map(|ms| format!(" in {}", duration(ms))).unwrap_or_default())
            }
            None => (format!("call {}", Safe(&outcome.call)), String::new()),
        };
        let effect = match outcome.outcome {
            CallOutcome::Applied => paint.good("applied"),
            CallOutcome::NotApplied => paint.warn("not applied"),
            CallOutcome::Unknown => paint.bad("unknown effect"),
        };
        let status = if outcome.status == 0 { String::new() } else { format!(" {}", outcome.status) };
        let tokens = if outcome.tokens > 0 { format!(", {} tokens", outcome.tokens) } else { String::new() };
        let rule = outcome.rule.map(|rule| format!(" {}", paint.bad(rule))).unwrap_or_default();
        let sent = outcome.sent_bytes.map(|sent| format!(", {} sent", bytes(sent))).unwrap_or_default();
        let detail = paint.dim(format_args!("{status}{took}{sent}, {}{tokens}", bytes(outcome.response_bytes)));
        self.push(at, &format!("{} {name} {effect}{rule}{detail}", paint.dim("↳")));
        if let Some(why) = self.unmade.remove(&outcome.call).or_else(|| self.answered(known.as_ref(), outcome)) {
            self.lines.push(format!("             {}", paint.warn(Safe(why.trim_end_matches('\n')))));
        }
    }

    /// Returns which provider answered a model call with an error, if the answer is the provider's own.
    fn answered(&self, known: Option<&Call>, outcome: &Outcome) -> Option<String> {
        let known = known.filter(|known| known.channel == Channel::Model && outcome.rule.is_none())?;
        if !(400..600).contains(&outcome.status) {
            return None;
        }
        let model = known.model.as_ref().map(|model| format!(" for model {model}")).unwrap_or_default();
        let family = Api::of_path(&known.target).and_then(Api::family);
        let base = self.models.of(family, known.model.as_deref()).map(|chosen| chosen.base).unwrap_or_default();
        let host = base.split("://").nth(1).and_then(|rest| rest.split(['/', '?']).next()).unwrap_or("its host");
        let at = outcome.upstream.as_ref().map(|address| format!(" ({address})")).unwrap_or_default();
        Some(format!(
            "{} is the provider's own answer{model}, by {host}{at}; Belay passed it on, and the agent has the reason",
            outcome.status
        ))
    }

    fn denied(&mut self, at: Timestamp, denied: &Denied) {
        let paint = self.paint;
        let text = format!(
            "{} {}{} {}  {}",
            paint.bad("✗"),
            call(denied.channel, &denied.target),
            times(denied.count),
            paint.bad(denied.rule),
            Safe(&denied.reason)
        );
        self.push(at, &text);
    }
}

/// Formats a call's channel and target, in columns.
fn call(channel: Channel, target: &str) -> String {
    format!("{:<7} {:<28}", channel.as_str(), Safe(target).to_string())
}

fn addresses(n: usize) -> String {
    if n == 1 { "1 address".to_owned() } else { format!("{n} addresses") }
}

fn duration(milliseconds: i128) -> String {
    if milliseconds < 10_000 { format!("{milliseconds} ms") } else { format!("{} s", milliseconds / 1000) }
}

fn bytes(n: u64) -> String {
    match n {
        0..10_000 => format!("{n} B"),
        10_000..10_000_000 => format!("{} kB", n / 1000),
        _ => format!("{} MB", n / 1_000_000),
    }
}

#[cfg(test)]
mod tests;
