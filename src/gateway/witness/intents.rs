//! Intents of calls: which intent authorizes a call, whether a request has already left by it, and the log before a call that needs
//! approval.
//!
//! Guarantees: an intent authorizes one request at each replica, and the intent of a listing a bounded number of messages. Before a call
//! that changes something the bucket is read, so an outcome, a lost containment or an end that another replica stored counts.
//!
//! Non-goals: a mark of used intents that replicas share; the comparison of an intent with the request
//! ([`authorize`](crate::gateway::authorize)).

use std::sync::Arc;

use super::{
    LogLocation, Witness, ended,
    history::{Before, History, IntentFacts},
    log::{self, Sent},
};
use crate::{
    evidence::record::Channel,
    gateway::refusal::Refused,
    policy::{approval::CallKey, rule::Rule},
};

/// Maximum number of messages that may leave by one intent of a listing: pages of lists, and the session messages of an MCP session during
/// its whole life. A session that has used them up is followed by another session with its own intent.
const TALK: u32 = 512;

impl Witness {
    /// Returns the state of the log before a call that needs approval, as the bucket has it now.
    ///
    /// # Errors
    /// Returns [`Rule::TaskClosed`] after the end of the log, or [`Rule::Evidence`] if the bucket cannot be read.
    pub async fn before(&self, place: &LogLocation, call: &CallKey) -> Result<Before, Refused> {
        let log = self.log(place);
        let _writer = log.writer.lock().await;
        let stored = self.catch_up(place, &log).await?;
        let history = log.newest().unwrap_or(stored);
        if history.state().has_ended() {
            return Err(ended());
        }
        Ok(history.before(call))
    }

    /// Marks an intent as used: it authorizes one request, whatever its channel. The intent of a listing authorizes up to `TALK` messages
    /// of an MCP session.
    ///
    /// Replicas do not share this mark: an open intent authorizes one request at each replica.
    ///
    /// # Errors
    /// Returns [`Rule::IntentMissing`] if a request has already left by this intent, or if the call has its outcome.
    pub fn claim(&self, place: &LogLocation, intent: &IntentFacts) -> Result<(), Refused> {
        let refused = |reason: String| Err(Refused::denied(Rule::IntentMissing, reason));
        let log = self.log(place);
        let head = log.newest();
        let (most, talks) = if intent.channel == Channel::Listing { (TALK, true) } else { (1, false) };
        // Records that arrived since the intent was looked up count, too. An intent that is no longer known here was denied at the look-up.
        let is_over = |head: &Arc<History>| head.state().intent(intent.seq).is_none_or(|now| !now.open);
        if !talks && head.as_ref().is_some_and(is_over) {
            return refused(format!("the call {:?} has its outcome already", intent.call));
        }
        let mut sent = log.sent.lock();
        if sent.len() >= log::SENT {
            sent.retain(|seq, _| head.as_ref().is_none_or(|head| head.state().intent(*seq).is_some()));
        }
        let sent = sent.entry(intent.seq).or_default();
        if sent.times >= most {
            return refused(format!(
                "the call {:?} was sent before: each call has an intent of its own{}",
                intent.call,
                if talks { ", and an MCP session has a limited number of messages: open another session" } else { "" }
            ));
        }
        sent.times += 1;
        Ok(())
    }

    /// Compensates [`Witness::claim`], because no request left by the intent.
    pub fn release(&self, place: &LogLocation, intent: &IntentFacts) {
        let log = self.log(place);
        let mut sent = log.sent.lock();
        if let Some(sent) = sent.get_mut(&intent.seq) {
            sent.times = sent.times.saturating_sub(1);
        }
    }

    /// Allows a call to be sent again because its upstream reported that it did nothing. Works once for each intent, so that an upstream
    /// cannot have a call sent without end.
    pub fn again(&self, place: &LogLocation, intent: &IntentFacts) {
        let log = self.log(place);
        let mut sent = log.sent.lock();
        if let Some(sent) = sent.get_mut(&intent.seq).filter(|sent| !sent.again) {
            *sent = Sent { times: sent.times.saturating_sub(1), again: true };
        }
    }

    /// Returns an intent that authorizes a call, by its sequence number. The intent is in the bucket or, for a tool read or a model call,
    /// queued for it.
    ///
    /// # Errors
    /// Returns [`Rule::IntentMissing`] if there is none, [`Rule::TaskClosed`] after the end of the log, or [`Rule::Evidence`] if the bucket
    /// cannot be read.
    pub async fn intent(&self, place: &LogLocation, seq: u64) -> Result<IntentFacts, Refused> {
        let log = self.log(place);
        let has = |head: Option<Arc<History>>, fits: fn(&IntentFacts) -> bool| {
            head.filter(|head| head.state().intent(seq).is_some_and(fits))
        };
        if log.newest().is_some_and(|newest| newest.tree().size() <= seq) {
            log.arrival(seq).await;
        }
        // The state in memory is enough for an intent of a read or of a model call. Before a call that changes something, read the bucket:
        // another replica may have stored the call's outcome, the loss of containment or the end of the task.
        let held = if log.is_fresh() { log.newest() } else { None };
        let known =
            has(held, IntentFacts::leaves_witnessed).or_else(|| has(log.stored(), IntentFacts::changes_nothing));
        let history = match known {
            Some(head) => head,
            None => {
                let _writer = log.writer.lock().await;
                self.catch_up(place, &log).await?
            }
        };
        let newest = log.newest().unwrap_or_else(|| history.clone());
        if history.state().has_ended() || newest.state().has_ended() {
            return Err(ended());
        }
        if history.state().containment_lost() || newest.state().containment_lost() {
            return Err(Refused::denied(
                Rule::ContainmentLost,
                "the attempt has lost its containment: no call leaves any more",
            ));
        }
        let size = history.tree().size();
        if history.state().intent(seq).is_some_and(|intent| log.is_forked(intent.attempt)) {
            let reason = "records that may have authorized calls of this attempt lost their place in the log: no call leaves any more";
            return Err(Refused::denied(Rule::LogFork, reason));
        }
        history.state().intent(seq).cloned().ok_or_else(|| {
            let reason = format!(
                "expected record {seq} to be a recent call.intent; the log has {size} records: append the intent first"
            );
            // Another replica may have taken the intent.
            let refused = if seq < size { Refused::denied } else { Refused::retry };
            refused(Rule::IntentMissing, reason)
        })
    }
}
