//! Aggregation of denials when an agent is denied often.
//!
//! Guarantees: the first denials have a record each. When denials come faster than [`EACH_SECOND`], those of one kind share a record with
//! their exact number, and each caller waits until that record is written. So a flood is slowed down, and the log does not grow with it.
//!
//! Non-goals: distinguishing more than [`KINDS`] kinds in one window.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{
    evidence::record::{Channel, Denied},
    policy::rule::Rule,
};

/// The number of denials that may have a record each at once.
const AT_ONCE: u32 = 64;
/// The number of further denials a second that have a record each.
const EACH_SECOND: u32 = 8;
/// How long a shared record waits for more denials of its kind.
const WINDOW: Duration = Duration::from_millis(500);
/// The number of kinds in one window. Denials of further kinds are merged by channel and rule.
const KINDS: usize = 32;
/// The target in the record of merged kinds.
const OTHERS: &str = "(others)";

/// How a denial is recorded.
#[derive(Debug)]
pub enum DenialCount {
    /// In a record of its own.
    Alone(Denied),
    /// In a shared record that is written at this time.
    With(Instant),
}

/// The aggregator of denials.
pub struct Flood {
    /// The number of denials that may have a record of their own now.
    left: u32,
    since: Instant,
    waiting: BTreeMap<(&'static str, String, Rule), Denied>,
    due: Instant,
}

impl Flood {
    /// Creates an aggregator without denials.
    pub fn new(now: Instant) -> Self {
        Self { left: AT_ONCE, since: now, waiting: BTreeMap::new(), due: now }
    }

    /// Adds a denial.
    pub fn take(&mut self, mut denied: Denied, now: Instant) -> DenialCount {
        let more = now.duration_since(self.since).as_secs();
        if more > 0 {
            let more = u32::try_from(more).unwrap_or(u32::MAX).saturating_mul(EACH_SECOND);
            (self.left, self.since) = (self.left.saturating_add(more).min(AT_ONCE), now);
        }
        if self.left > 0 && self.waiting.is_empty() {
            self.left -= 1;
            return DenialCount::Alone(denied);
        }
        if self.waiting.is_empty() {
            self.due = now + WINDOW;
        }
        let kind = |channel: Channel, target: &str, rule| (channel.as_str(), target.to_owned(), rule);
        let mut of = kind(denied.channel, &denied.target, denied.rule);
        if self.waiting.len() >= KINDS && !self.waiting.contains_key(&of) {
            of = kind(denied.channel, OTHERS, denied.rule);
            denied.target = OTHERS.to_owned();
        }
        self.waiting.entry(of).and_modify(|first| first.more()).or_insert(denied);
        DenialCount::With(self.due)
    }

    /// Returns the number of denials that wait for their record and count against the task's limit.
    pub fn waiting(&self) -> i64 {
        self.waiting.values().filter(|denied| denied.rule != Rule::EgressIgnored).map(|denied| denied.count).sum()
    }

    /// Removes and returns the waiting denials, each with its number, if their window is over or `now` is absent.
    pub fn over(&mut self, now: Option<Instant>) -> Vec<Denied> {
        if now.is_some_and(|now| now < self.due) {
            return Vec::new();
        }
        std::mem::take(&mut self.waiting).into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denied(target: &str) -> Denied {
        Denied {
            channel: Channel::Tool,
            target: target.into(),
            rule: Rule::ToolUnknown,
            reason: "no such tool".into(),
            request_digest: Some("d".into()),
            count: 1,
        }
    }

    #[test]
    fn first_ones_stand_alone_and_others_share_a_record_with_their_number() {
        let start = Instant::now();
        let mut flood = Flood::new(start);
        let alone = (0..1_000).filter(|_| matches!(flood.take(denied("a"), start), DenialCount::Alone(_))).count();
        assert_eq!(alone, 64);
        assert!(flood.over(Some(start)).is_empty(), "before its time");
        let shared = flood.over(Some(start + WINDOW));
        assert_eq!(shared, [Denied { count: 936, request_digest: None, ..denied("a") }]);
        assert_eq!(flood.waiting(), 0);
        assert!(matches!(flood.take(denied("a"), start + Duration::from_secs(1)), DenialCount::Alone(_)));
    }

    #[test]
    fn kinds_are_bounded_and_nothing_is_lost() {
        let start = Instant::now();
        let mut flood = Flood::new(start);
        let targets = (0..5_000).map(|n| format!("t{n}"));
        let alone = targets.filter(|target| matches!(flood.take(denied(target), start), DenialCount::Alone(_))).count();
        let shared = flood.over(None);
        assert_eq!(shared.len(), KINDS + 1);
        let sum: i64 = shared.iter().map(|denied| denied.count).sum();
        assert_eq!(usize::try_from(sum).unwrap() + alone, 5_000);
    }

    #[test]
    fn one_by_itself_keeps_its_digest() {
        let start = Instant::now();
        let mut flood = Flood::new(start);
        for n in 0..=AT_ONCE {
            flood.take(denied(&n.to_string()), start);
        }
        assert_eq!(flood.over(None), [denied("64")]);
    }
}
