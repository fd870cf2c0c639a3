//! One effect for calls that are one: the idempotency ledger as the harness keeps it, with results to give again.
//!
//! Promises: of calls with one key one is under way at a time, and the others wait for it; what was made is answered from its result,
//! recorded before the agent gets it; what the witness would refuse is never written. Results of another harness come from the bucket of
//! the pack's `state`, by the digest that the log has. Refuses: a second effect where a result is not to be had: that is a denial.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use jiff::{SignedDuration, Timestamp};
use rmcp::model::CallToolResult;
use tokio::sync::OwnedMutexGuard;

use super::{
    clock,
    journal::{Journal, call_id},
    link::Link,
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
    wire::{KeepResult, KeptOf, LONGEST_RESULT},
};

/// Longest results together that are kept here.
const LONGEST_RESULTS: usize = 8 << 20;
/// The log goes by the time of the record, which is written a little later: a key lapses here later than there.
const SLACK: SignedDuration = SignedDuration::from_secs(1);

/// A result, as the agent got it.
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

/// Who has which key, and the results that there are. What was made under which key follows from the log.
pub struct Once {
    turns: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
    results: Mutex<Results>,
    /// Whether results are kept outside the pod as well.
    outside: bool,
    /// What commitments are made with.
    salt: Salt,
}

/// A key that a call has to itself.
pub struct Turn {
    /// The key.
    pub key: String,
    _guard: OwnedMutexGuard<()>,
}

impl Once {
    /// No key is taken.
    pub fn new(outside: bool, salt: Salt) -> Self {
        Self { turns: Mutex::default(), results: Mutex::default(), outside, salt }
    }

    /// Waits until no other call with this key is under way.
    pub async fn turn(&self, key: String) -> Turn {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            if turns.len() >= KEYS {
                turns.retain(|_, turn| turn.strong_count() > 0);
            }
            let known = turns.get(&key).and_then(Weak::upgrade);
            let turn = known.unwrap_or_default();
            turns.insert(key.clone(), Arc::downgrade(&turn));
            turn
        };
        Turn { key, _guard: turn.lock_owned().await }
    }

    /// Whether a call may be made under a key, by what the ledger says now.
    ///
    /// # Errors
    /// [`Rule::ToolIdempotency`] if it may not.
    pub fn free(ledger: &Ledger, tool: &str, of: &Idempotency, key: &str, digest: &str) -> Result<(), Denial> {
        match ledger.find(key, digest, of, now()) {
            Found::Free => Ok(()),
            found => Err(refusal(tool, &found)),
        }
    }

    /// The call that was made under a key and of which nobody knows whether it took effect.
    pub fn unknown(journal: &Journal, of: &Idempotency, turn: &Turn, digest: &str) -> Option<String> {
        journal.look(|task| match task.ledger().find(&turn.key, digest, of, now()) {
            Found::Unknown(made) => Some(made.call.clone()),
            _ => None,
        })
    }

    /// The result that there is of the call that was made under a key; `None` if the call is to be made.
    ///
    /// # Errors
    /// [`Rule::ToolIdempotency`] if it may not be made, and [`Rule::Evidence`] if the answer cannot be recorded.
    pub async fn answer(
        &self,
        (journal, link): (&Journal, &Link),
        tool: &Tool,
        of: &Idempotency,
        turn: &Turn,
        digest: &str,
    ) -> Result<Option<CallToolResult>, Denial> {
        let made = journal.look(|task| match task.ledger().find(&turn.key, digest, of, now()) {
            Found::Free => Ok(None),
            Found::Made(made) => Ok(Some(made.clone())),
            found => Err(refusal(&tool.name, &found)),
        });
        let Some(made) = made? else { return Ok(None) };
        let kept = self.results.lock().unwrap_or_else(PoisonError::into_inner).of.get(&made.call).cloned();
        let kept = match kept {
            Some(kept) => Ok(kept),
            None => self.fetch(link, &made).await,
        };
        let kept = kept.map_err(|why| {
            denial(format!(
                "{} was called with this already, as call {} at {}, and that took effect; its result {why}. Do not repeat it: read what it \
                 changed",
                shorten(&tool.name),
                made.call,
                made.time
            ))
        })?;
        let replayed = Replayed {
            call: made.call,
            target: shorten(&tool.name),
            key: turn.key.clone(),
            request_digest: digest.to_owned(),
            response_digest: kept.digest,
        };
        journal.room().await;
        let record = journal.record(|_, task| {
            task.budget().open()?;
            // Its window may have closed since.
            match task.ledger().find(&turn.key, digest, of, clock::now()) {
                Found::Made(_) => Ok(Event::Replayed(replayed)),
                found => Err(refusal(&tool.name, &found)),
            }
        })?;
        journal.stored(record).await?;
        Ok(Some(kept.result))
    }

    /// The result of a call of another harness.
    ///
    /// # Errors
    /// What is the matter with it, to go on from "its result".
    async fn fetch(&self, link: &Link, made: &Entry) -> Result<Kept, String> {
        let Some(digest) = made.response_digest.clone() else { return Err("was not given to the agent".into()) };
        if !self.outside {
            return Err("is not kept any more".into());
        }
        let of = KeptOf { call: made.call.clone(), digest: digest.clone() };
        let text = link.kept_result(&of).await.map_err(|error| format!("cannot be had: {error}"))?;
        let result = result_of(&text, &digest, &self.salt).ok_or("is not as it was kept")?;
        Ok(Kept { result, digest })
    }

    /// Keeps a result to be given again, if it is not too long: here, and for other attempts outside the pod. It has to be there before the
    /// outcome is recorded, by which it may be given again. Where it cannot be kept the call is not repeated all the same.
    pub async fn keep(&self, link: &Link, intent: u64, result: &CallToolResult, digest: Option<&String>) {
        let text = serde_json::to_string(result).ok().filter(|text| text.len() <= LONGEST_RESULT);
        let Some((digest, text)) = digest.zip(text) else { return };
        {
            let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
            let sum = results.size.saturating_add(text.len());
            if sum <= LONGEST_RESULTS {
                results.size = sum;
                results.of.insert(call_id(intent), Kept { result: result.clone(), digest: digest.clone() });
            }
        }
        if self.outside
            && let Err(error) = link.keep_result(&KeepResult { intent, result: text }).await
        {
            tracing::error!(intent, %error, "a result could not be kept: another attempt will be refused it");
        }
    }
}

/// The result that was kept, if it is the one that was committed to: as text, and as it would be given.
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
            "{tool} was called with this already, as call {} at {}, and whether that took effect is not known. Look before it is made again",
            made.call, made.time
        ),
        Found::Full => format!("the task has used its {KEYS} keys; no more calls of {tool}"),
        Found::Made(made) => format!("{tool} was called with this already, as call {} at {}", made.call, made.time),
        Found::Free => {
            format!("the time in which the result of {tool} is given again has just ended; make the call again")
        }
    })
}
