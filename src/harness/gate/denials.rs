//! The records of denials, and their aggregation when an agent is denied often.
//!
//! Guarantees: every denial is recorded and counted. Once the task's limit on denials is reached, the agent gets that reason instead. The
//! first denials have a record each. When denials come faster than [`EACH_SECOND`], those of one kind share a record with their exact
//! number, and each caller waits until that record is written. So a flood is slowed down, and the log does not grow with it.
//!
//! Non-goals: distinguishing more than [`KINDS`] kinds in one window.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use crate::{
    evidence::record::{Channel, Denied, Event},
    harness::journal::Journal,
    policy::{
        commit::Salt,
        decide::Denial,
        redact::Redactor,
        rule::Rule,
        shorten::{shorten, shorten_to},
    },
};

/// The longest reason of a denial in its record, in characters.
const LONGEST_REASON: usize = 2048;
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

/// Records denials.
pub(super) struct Denials {
    /// The task's limit on denials.
    limit: Option<i64>,
    journal: Arc<Journal>,
    redactor: Arc<Redactor>,
    salt: Salt,
    flood: Mutex<Flood>,
    enough: Notify,
}

impl Denials {
    /// Starts without denials.
    pub(super) fn new(limit: Option<i64>, journal: Arc<Journal>, redactor: Arc<Redactor>, salt: Salt) -> Self {
        Self { limit, journal, redactor, salt, flood: Mutex::new(Flood::new(Instant::now())), enough: Notify::new() }
    }

    /// Waits until the limit on denials is reached.
    pub(super) async fn enough(&self) {
        self.enough.notified().await;
    }

    /// Records a denial and returns it for the agent. Once the limit on denials is reached, returns that reason instead.
    pub(super) async fn deny(&self, channel: Channel, target: &str, digest: Option<String>, denial: Denial) -> Denial {
        self.journal.wait_for_capacity().await;
        let denied = Denied {
            channel,
            target: shorten(&self.redactor.name(target, &self.salt)),
            rule: denial.rule,
            reason: self.recordable(&denial.reason),
            request_commitment: digest,
            count: 1,
        };
        let counted = self.flood().take(denied, Instant::now());
        match counted {
            DenialCount::Alone(denied) => self.count(denied).unwrap_or(denial),
            DenialCount::With(due) => {
                let counted = self.journal.look(|task| task.usage().denials.saturating_sub(task.ignored()));
                let reached = |limit| counted.saturating_add(self.flood().waiting()) >= limit;
                if self.limit.is_some_and(reached) {
                    self.count_waiting(None);
                } else {
                    tokio::time::sleep_until(due.into()).await;
                    // The first waiting caller records the denials of all.
                    self.count_waiting(Some(Instant::now()));
                }
                let above = self.journal.failure().or_else(|| self.journal.open().err().map(Denial::from));
                above.unwrap_or(denial)
            }
        }
    }

    /// Records the denials that share a record: those whose window is over, or all if `now` is absent.
    pub(super) fn count_waiting(&self, now: Option<Instant>) {
        let over = self.flood().over(now);
        over.into_iter().for_each(|denied| drop(self.count(denied)));
    }

    fn flood(&self) -> MutexGuard<'_, Flood> {
        self.flood.lock()
    }

    fn recordable(&self, reason: &str) -> String {
        self.redactor.text(&shorten_to(reason, LONGEST_REASON), &self.salt)
    }

    /// Records denials. Returns the reason that replaces theirs if the limit on denials is reached or the log has failed.
    fn count(&self, mut denied: Denied) -> Option<Denial> {
        let mut over = false;
        let mut above = None;
        let record = self.journal.record(|_, task| {
            let mut budget = task.budget();
            if let Err(spent) = budget.open() {
                let spent = Denial::from(spent);
                (denied.rule, denied.reason) = (spent.rule, self.recordable(&spent.reason));
                above = Some(spent);
            }
            denied.count = match denied.rule {
                Rule::EgressIgnored => budget.count_ignored(denied.count),
                _ => budget.count_denials(denied.count),
            };
            over = budget.open().is_err();
            // The harness's own log shows the same texts as the record.
            let Denied { channel, target, rule, reason, count, .. } = &denied;
            // Each line has a member `target` of its own, the module.
            tracing::info!(channel = channel.as_str(), to = target, %rule, reason, count, "denied");
            Ok(Event::Denied(denied))
        });
        if let Err(failed) = record {
            tracing::error!(reason = failed.reason, "a denial could not be recorded; the log has ended");
            above = Some(failed);
        }
        if over {
            self.enough.notify_one();
        }
        above
    }
}

/// How a denial is recorded.
#[derive(Debug)]
enum DenialCount {
    /// In a record of its own.
    Alone(Denied),
    /// In a shared record that is written at this time.
    With(Instant),
}

/// The aggregator of denials.
struct Flood {
    /// The number of denials that may have a record of their own now.
    left: u32,
    since: Instant,
    waiting: BTreeMap<(&'static str, String, Rule), Denied>,
    due: Instant,
}

impl Flood {
    /// Creates an aggregator without denials.
    fn new(now: Instant) -> Self {
        Self { left: AT_ONCE, since: now, waiting: BTreeMap::new(), due: now }
    }

    /// Adds a denial.
    fn take(&mut self, mut denied: Denied, now: Instant) -> DenialCount {
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
    fn waiting(&self) -> i64 {
        self.waiting.values().filter(|denied| denied.rule != Rule::EgressIgnored).map(|denied| denied.count).sum()
    }

    /// Removes and returns the waiting denials, each with its number, if their window is over or `now` is absent.
    fn over(&mut self, now: Option<Instant>) -> Vec<Denied> {
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
            request_commitment: Some("d".into()),
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
        assert_eq!(shared, [Denied { count: 936, request_commitment: None, ..denied("a") }]);
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
