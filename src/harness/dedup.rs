//! Idempotency: the harness's view of the idempotency ledger, with results to return again.
//!
//! Guarantees: of calls with one key, one is in flight at a time, and the others wait for it. A call that was made is answered with its
//! stored result, and the replay is recorded before the agent gets it. Nothing is recorded that the witness would reject. Results of
//! another harness come from the state bucket, by the commitment in the log. A duplicate call whose result is not available is denied.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use rmcp::model::CallToolResult;
use tokio::sync::OwnedMutexGuard;

use super::{
    clock,
    gateway_client::GatewayClient,
    journal::{Journal, call_id},
};
use crate::{
    evidence::record::{Event, Replayed},
    policy::{
        commit::Salt,
        config::{Idempotency, Tool},
        decide::Denial,
        ledger::{Entry, Found, KEYS, Ledger},
        rule::Rule,
        shorten::shorten,
    },
    wire::{LONGEST_RESULT, PutResult, StateRef},
};

/// The most bytes of results that are kept here in total.
const LONGEST_RESULTS: usize = 8 << 20;
/// The log uses the time of the record, which is written a little later, so a key expires here later than there.
const SLACK: SignedDuration = SignedDuration::from_secs(1);

/// A result as the agent got it.
#[derive(Clone)]
struct Kept {
    result: CallToolResult,
    digest: String,
}

#[derive(Default)]
struct Results {
    of: HashMap<String, Kept>,
    size: usize,
}

/// The keys that are in use, and the stored results. The log says which calls were made with which keys.
pub struct Deduplicator {
    turns: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
    results: Mutex<Results>,
    /// Whether results are stored outside the pod as well.
    outside: bool,
    /// The salt of the task's commitments.
    salt: Salt,
}

/// A lease on an idempotency key, which only one call holds at a time.
pub struct KeyLease {
    /// The idempotency key.
    pub key: String,
    _guard: OwnedMutexGuard<()>,
}

impl Deduplicator {
    /// Creates the state without any keys in use.
    pub fn new(outside: bool, salt: Salt) -> Self {
        Self { turns: Mutex::default(), results: Mutex::default(), outside, salt }
    }

    /// Waits until no other call with this key is in flight.
    pub async fn turn(&self, key: String) -> KeyLease {
        let turn = {
            let mut turns = self.turns.lock();
            if turns.len() >= KEYS {
                turns.retain(|_, turn| turn.strong_count() > 0);
            }
            let known = turns.get(&key).and_then(Weak::upgrade);
            let turn = known.unwrap_or_default();
            turns.insert(key.clone(), Arc::downgrade(&turn));
            turn
        };
        KeyLease { key, _guard: turn.lock_owned().await }
    }

    /// Checks whether a call may be made with a key, by the current ledger.
    ///
    /// # Errors
    /// Returns [`Rule::ToolIdempotency`] if it may not.
    pub fn free(ledger: &Ledger, tool: &str, of: &Idempotency, key: &str, digest: &str) -> Result<(), Denial> {
        match ledger.find(key, digest, of, now()) {
            Found::Free => Ok(()),
            found => Err(refusal(tool, &found)),
        }
    }

    /// Returns the call that was made with a key and has an unknown outcome, if there is one.
    pub fn unknown(journal: &Journal, of: &Idempotency, turn: &KeyLease, digest: &str) -> Option<String> {
        journal.look(|task| match task.ledger().find(&turn.key, digest, of, now()) {
            Found::Unknown(made) => Some(made.call.clone()),
            _ => None,
        })
    }

    /// Returns the stored result of the call that was made with a key, or `None` if the call must be made.
    ///
    /// # Errors
    /// Returns [`Rule::ToolIdempotency`] if the call may not be made, and [`Rule::Evidence`] if the replay cannot be recorded.
    pub async fn answer(
        &self,
        (journal, link): (&Journal, &GatewayClient),
        tool: &Tool,
        of: &Idempotency,
        turn: &KeyLease,
        digest: &str,
    ) -> Result<Option<CallToolResult>, Denial> {
        let made = journal.look(|task| match task.ledger().find(&turn.key, digest, of, now()) {
            Found::Free => Ok(None),
            Found::Made(made) => Ok(Some(made.clone())),
            found => Err(refusal(&tool.name, &found)),
        });
        let Some(made) = made? else { return Ok(None) };
        let kept = self.results.lock().of.get(&made.call).cloned();
        let kept = match kept {
            Some(kept) => Ok(kept),
            None => self.fetch(link, &made).await,
        };
        let kept = kept.map_err(|why| {
            denial(format!(
                "{} has a call with the same key already, call {} at {}, which took effect; its result {why}. Do not repeat the call: read \
                 what it changed",
                shorten(&tool.name),
                made.call,
                made.time
            ))
        })?;
        let replayed = Replayed {
            call: made.call,
            target: shorten(&tool.name),
            idempotency_key: turn.key.clone(),
            request_commitment: digest.to_owned(),
            response_commitment: kept.digest,
        };
        journal.wait_for_capacity().await;
        let record = journal.record(|_, task| {
            task.budget().open()?;
            // The idempotency window may have closed meanwhile.
            match task.ledger().find(&turn.key, digest, of, clock::now()) {
                Found::Made(_) => Ok(Event::Replayed(replayed)),
                found => Err(refusal(&tool.name, &found)),
            }
        })?;
        journal.stored(record).await?;
        Ok(Some(kept.result))
    }

    /// Fetches the result of a call of another harness.
    ///
    /// # Errors
    /// Returns why the result is not available, as the end of a sentence that begins with "its result".
    async fn fetch(&self, link: &GatewayClient, made: &Entry) -> Result<Kept, String> {
        let Some(digest) = made.response_commitment.clone() else { return Err("was not given to the agent".into()) };
        if !self.outside {
            return Err("is not stored any more".into());
        }
        let of = StateRef { call: made.call.clone(), digest: digest.clone() };
        let text = link.get_result(&of).await.map_err(|error| format!("cannot be read: {error}"))?;
        let result = result_of(&text, &digest, &self.salt).ok_or("is not the one that was stored")?;
        Ok(Kept { result, digest })
    }

    /// Stores a result so that it can be returned again, if it is not too long: here, and outside the pod for other attempts. This must
    /// come before the outcome is recorded, because that record allows replays. A call whose result cannot be stored is still not repeated.
    pub async fn keep(&self, link: &GatewayClient, intent: u64, result: &CallToolResult, digest: Option<&String>) {
        let text = serde_json::to_string(result).ok().filter(|text| text.len() <= LONGEST_RESULT);
        let Some((digest, text)) = digest.zip(text) else { return };
        {
            let mut results = self.results.lock();
            let sum = results.size.saturating_add(text.len());
            if sum <= LONGEST_RESULTS {
                results.size = sum;
                results.of.insert(call_id(intent), Kept { result: result.clone(), digest: digest.clone() });
            }
        }
        if self.outside
            && let Err(error) = link.put_result(&PutResult { intent, result: text }).await
        {
            tracing::error!(intent, %error, "a result could not be stored: another attempt will not get it");
        }
    }
}

/// Parses a stored result if its commitment matches, both for the text and for the result as it would be returned.
fn result_of(text: &str, digest: &str, salt: &Salt) -> Option<CallToolResult> {
    let is = |bytes: &[u8]| salt.bytes(bytes) == digest;
    let result: CallToolResult = serde_json::from_str(text).ok().filter(|_| is(text.as_bytes()))?;
    is(&serde_json::to_vec(&result).ok()?).then_some(result)
}

fn now() -> Timestamp {
    let now = clock::now();
    now.checked_sub(SLACK).unwrap_or(now)
}

fn denial(reason: String) -> Denial {
    Denial { rule: Rule::ToolIdempotency, reason }
}

fn refusal(tool: &str, found: &Found<'_>) -> Denial {
    let tool = shorten(tool);
    denial(match found {
        Found::Conflict(made) => format!(
            "{tool} was called with the same key and other arguments, as call {} at {}: expected the same arguments, or another key",
            made.call, made.time
        ),
        Found::Unknown(made) | Found::Open(made) => format!(
            "{tool} has a call with the same key already, call {} at {}, and its outcome is unknown. Check before you make the call again",
            made.call, made.time
        ),
        Found::Full => format!("the task has used its {KEYS} keys; no more calls of {tool}"),
        Found::Made(made) => {
            format!("{tool} has a call with the same key already, call {} at {}", made.call, made.time)
        }
        Found::Free => {
            format!("the time in which Belay replays the result of {tool} has just ended; make the call again")
        }
    })
}
