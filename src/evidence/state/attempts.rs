//! Attempts: who may write when, and with which key and policy.

use std::sync::Arc;

use super::{Findings, LogRule, Policy, TaskState, Unknown};
use crate::{
    evidence::{
        note::{self, VerifierKey},
        record::{AttemptOpened, Event, Record},
        rollback::Undoing,
    },
    policy::{access::AccessPolicy, budget::Spent, config::ToolUsage},
};

impl TaskState {
    /// Checks that attempt numbers never decrease, and that an attempt writes nothing before it opens and after it closes.
    pub(super) fn check_attempt(&self, record: &Record, found: &mut Findings<'_>) {
        let kind = record.event.kind();
        // A task that ends without an attempt has no attempt to name.
        let least =
            if matches!(record.event, Event::TaskClosed(_)) { self.named_attempt } else { self.named_attempt.max(1) };
        found.expect(LogRule::AttemptOrder, record.attempt >= least, || {
            format!("expected attempt {least} or a later one, found {}", record.attempt)
        });
        match &record.event {
            // An attempt may fail before its harness opens it. The end of the task names it nevertheless.
            Event::AttemptOpened(_) | Event::TaskClosed(_) => {}
            _ if record.attempt != self.named_attempt => found.violated(
                LogRule::AttemptOpen,
                format!("expected attempt.opened first in attempt {}, found {kind}", record.attempt),
            ),
            _ => found.expect(LogRule::AttemptOpen, self.is_open, || {
                format!("expected nothing after attempt.closed, found {kind}")
            }),
        }
    }

    pub(super) fn check_opened(&self, record: &Record, opened: &AttemptOpened, found: &mut Findings<'_>) {
        let over = self.terminated_by(record.attempt);
        found.expect(LogRule::AttemptOver, over.is_none(), || {
            format!("expected attempt {} to stay closed: a limit has ended it", record.attempt)
        });
        found.expect_ok(LogRule::AttemptKey, self.key_of(record.attempt, &opened.verifier_key));
        found.expect(
            LogRule::AttemptContained,
            opened.containment.contained && opened.containment.breaches.is_empty(),
            || "expected a contained pod, found one that reaches more than the gateway".to_owned(),
        );
        let uid = &opened.policy.task.uid;
        found.expect(LogRule::AttemptTask, note::origin(uid) == *self.origin, || {
            format!("expected the policy of {}, found one of task UID {uid}", self.origin)
        });
        if found.asks(LogRule::AttemptPolicy) {
            found.expect_ok(
                LogRule::AttemptPolicy,
                AccessPolicy::compile(&opened.policy).map_err(|error| error.to_string()),
            );
        }
        let origin = opened.rollback.as_ref().map(|plan| plan.origin.as_str());
        let expected = opened.policy.task.rollback_of.as_ref().map(|of| note::origin(&of.uid));
        found.expect(LogRule::RollbackPlan, origin == expected.as_deref(), || {
            format!("expected a plan to roll back {expected:?}, found one for {origin:?}")
        });
        // Only a party with both logs can check that the plan is the one that follows from the other task's log.
        if let Some(undoing) = &self.rollback {
            found.expect(LogRule::RollbackPlan, opened.rollback.as_ref() == Some(&undoing.plan), || {
                "expected the rollback's first plan, found another".to_owned()
            });
        }
    }

    /// Returns the key of an attempt from its opening, if the key has the right name and type.
    fn key_of(&self, attempt: i64, key: &str) -> Result<VerifierKey, String> {
        let key: VerifierKey = key.parse().map_err(|error: note::KeyError| error.to_string())?;
        let expected = format!("{}/{attempt}", self.origin);
        if key.name() != expected || key.is_witness() {
            return Err(format!("expected a log key named {expected}, found {}", key.name()));
        }
        Ok(key)
    }

    pub(super) fn apply_opened(&mut self, record: &Record, opened: &AttemptOpened) {
        if self.attempt != record.attempt {
            self.attempt = record.attempt;
            // Definitions belong to one attempt.
            let forget = |(name, used): (&String, &ToolUsage)| (name.clone(), ToolUsage { definition: None, ..*used });
            self.tools = self.tools.iter().map(forget).collect();
        }
        (self.is_open, self.containment_lost, self.terminated_by) = (true, false, None);
        // An invalid key removes the older one, too, because the older one must not sign any more.
        self.key = self.key_of(record.attempt, &opened.verifier_key).ok().map(Arc::new);
        // A restarted harness and most retries have the same policy: it is not compiled again.
        if self.config() != Some(&opened.policy) {
            self.policy = Some(Arc::new(Policy {
                config: opened.policy.clone(),
                digest: opened.policy.digest().unwrap_or_default().into(),
                guard: self.asks(LogRule::CallAssessment).then(|| AccessPolicy::compile(&opened.policy).ok()).flatten(),
            }));
        }
        // The harness that would have reported the outcomes of open calls is gone.
        self.held = Spent::default();
        Arc::make_mut(&mut self.ledger).abandon();
        let lost = self.open_calls.values().filter(|call| !self.unknown.contains_key(&call.call));
        for call in lost.cloned().collect::<Vec<_>>() {
            self.lose(Unknown::of(&call, record.seq), &call.call);
        }
        if self.rollback.is_none() {
            self.rollback = opened.rollback.clone().map(|plan| Arc::new(Undoing::new(plan)));
        }
    }
}
