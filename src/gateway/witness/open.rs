//! The reply to an attempt that opens its log: the state of the task, from which the attempt continues.
//!
//! Guarantees: the state is that after all records of the task, whichever attempt wrote them and whichever replica took them. All of them are
//! in the bucket.
//!
//! Rejects: an attempt that has ended or that a newer attempt has followed, and a policy other than the one that the gateway compiled.

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};

use super::{LogLocation, Witness, ended, own_attempt, same_policy};
use crate::{
    evidence::{note, rollback::Undoing, state::Snapshot},
    gateway::{identity::HarnessIdentity, refusal::Refused},
    policy::{commit::Salt, rule::Rule},
    wire::{OpenReply, OpenRequest},
};

impl Witness {
    /// Returns the state of a task's log to an attempt that opens it. `digest` is the digest of the policy that the gateway compiled, `of`
    /// is the place of the log that this task rolls back.
    ///
    /// # Errors
    /// Returns a denial with the violated rule, or [`Rule::Evidence`] if the bucket cannot be read.
    pub async fn open(
        &self,
        place: &LogLocation,
        principal: &HarnessIdentity,
        request: &OpenRequest,
        digest: &str,
        of: Option<&LogLocation>,
        (salt, keeps_results): (Salt, bool),
    ) -> Result<OpenReply, Refused> {
        own_attempt(principal, request.attempt)?;
        same_policy(&request.policy_digest, digest)?;
        let log = self.log(place);
        let (_writer, history) = self.settled(place, &log).await?;
        if history.state().has_ended() {
            return Err(ended());
        }
        if let Some(rule) = history.state().terminated_by(principal.attempt) {
            return Err(Refused::denied(rule, "this rule ended the attempt: it does not open again"));
        }
        if history.state().attempt() > principal.attempt {
            return Err(superseded(principal.attempt, history.state().attempt()));
        }
        let undoing = match (of, history.state().rollback()) {
            (None, _) => None,
            (Some(_), Some(undoing)) => Some(undoing.clone()),
            (Some(of), None) => Some(Undoing::new(self.plan(of).await?)),
        };
        Ok(OpenReply {
            origin: note::origin(&place.task_uid),
            size: history.tree().size(),
            frontier: history.tree().frontier().iter().map(|hash| BASE64.encode(hash)).collect(),
            state: Snapshot { undoing, ..history.state().snapshot(principal.attempt) },
            salt,
            keeps_results,
            open_calls: u64::try_from(history.state().open_calls().len()).unwrap_or(u64::MAX),
        })
    }
}

fn superseded(attempt: i64, newest: i64) -> Refused {
    Refused::denied(Rule::IdentityAttempt, format!("attempt {attempt} has been followed by attempt {newest}"))
}
