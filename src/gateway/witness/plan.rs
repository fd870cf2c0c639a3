//! The calls that roll back a task, read from the task's log.
//!
//! Guarantees: a plan is made only from a log that has ended, so every replica makes the same plan at any time.
//!
//! Non-goals: the order and the state of a running rollback ([`rollback`](crate::evidence::rollback)); which rollback may compensate a call
//! ([`StateStore::undo`](crate::gateway::state::StateStore::undo)).

use std::{collections::BTreeSet, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};

use super::{LogLocation, Witness};
use crate::{
    evidence::{
        note,
        rollback::{Plan, Planner},
    },
    gateway::refusal::Refused,
    policy::rule::Rule,
};

/// Time limit for reading a log to find the compensations of its task while the log is sealed, because the caller of `seal` does not wait
/// without end.
const PLAN_TIME: Duration = Duration::from_secs(15);

impl Witness {
    /// Returns the plan that rolls back a task, whose log must have ended.
    ///
    /// # Errors
    /// Returns [`Rule::ToolRollback`] if the log has not ended, or [`Rule::Evidence`] if the bucket cannot be read.
    pub async fn plan(&self, of: &LogLocation) -> Result<Plan, Refused> {
        let refused = |reason: String| Refused::denied(Rule::ToolRollback, reason);
        let mut planner = Planner::default();
        let history = self.read(of, |record| planner.take(record)).await?;
        let origin = note::origin(&of.task_uid);
        if !history.state().has_ended() {
            let size = history.tree().size();
            return Err(refused(format!(
                "expected the log of a task that has ended at {}, found {size} records of {origin}",
                of.location
            )));
        }
        Ok(Plan {
            origin,
            size: history.tree().size(),
            root: BASE64.encode(history.tree().root()),
            steps: planner.steps(),
        })
    }

    /// Returns the contracts of the calls that would roll back a task, or `None` if the log is too long to read in time.
    pub(super) async fn compensation_commitment(
        &self,
        place: &LogLocation,
    ) -> Result<Option<BTreeSet<String>>, Refused> {
        let mut planner = Planner::default();
        let read = tokio::time::timeout(PLAN_TIME, self.read(place, |record| planner.take(record))).await;
        read.ok().transpose().map(|read| read.map(|_| planner.contracts()))
    }
}
