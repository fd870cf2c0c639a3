//! The idempotency ledger: which calls were made under which key, and their outcomes.
//!
//! Guarantees: calls under one key take effect at most once. The same key with other arguments is a conflict. A call with an unknown
//! outcome is made again only if the upstream recognizes repeated calls by the key. A key belongs to one task, and the calls of other tasks
//! do not affect it.
//! Non-goals: storing results. The ledger has only their digests. The component that stores results replays them.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{commit::Salt, config::Idempotency};
use crate::canonical;

/// Maximum number of keys of one task, because the readers of its log hold all of them in memory.
pub const KEYS: usize = 4096;

/// The state of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// The call has no outcome yet.
    Open,
    /// The call took effect.
    Applied,
    /// The outcome is unknown.
    Unknown,
}

/// The call that was made under a key. A call that certainly had no effect has no entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// The ID of the call, from its intent.
    pub call: String,
    /// The commitment to the arguments, in hex.
    pub request_commitment: String,
    /// The time of the call, in RFC 3339.
    pub time: String,
    /// The state of the call.
    pub fate: Fate,
    /// The commitment to the result that the agent got, in hex. Absent if the agent got no result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_commitment: Option<String>,
}

/// What the ledger says about a new call under a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found<'l> {
    /// The call may be made.
    Free,
    /// The call was made. The agent gets the stored result again.
    Made(&'l Entry),
    /// The call is in progress, or was in progress when its harness ended.
    Open(&'l Entry),
    /// The call was made, and its outcome is unknown.
    Unknown(&'l Entry),
    /// A call with other arguments was made under this key.
    Conflict(&'l Entry),
    /// The task has no keys left.
    Full,
}

/// Returns the key of a call: the SHA-256, in hex, over the task, the tool, and the commitment to what the contract derives the key from.
/// Returns `None` if the key depends on an argument that the call does not have.
///
/// `digest` is the commitment to all arguments.
pub fn key(
    uid: &str,
    tool: &str,
    of: &Idempotency,
    args: &Map<String, Value>,
    (digest, salt): (&str, &Salt),
) -> Option<String> {
    let material = match &of.argument {
        None => digest.to_owned(),
        Some(name) => salt.value(args.get(name)?).ok()?,
    };
    Some(made_of(uid, tool, &material))
}

/// Returns the key for a commitment to all arguments or to one argument.
pub fn made_of(uid: &str, tool: &str, material: &str) -> String {
    hex::encode(canonical::sha256(format!("{uid}\n{tool}\n{material}").as_bytes()))
}

/// The calls of a task by key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ledger(BTreeMap<String, Entry>);

impl Ledger {
    /// Looks up a key. `now` is the current time. A call that is older than the contract's window counts as not made.
    pub fn find(&self, key: &str, request_commitment: &str, of: &Idempotency, now: Timestamp) -> Found<'_> {
        let entry = self.0.get(key).filter(|entry| {
            let window = jiff::SignedDuration::from_secs(of.window_seconds);
            // A call whose time cannot be parsed never expires.
            entry.time.parse::<Timestamp>().map_or(true, |made| now.duration_since(made) < window)
        });
        match entry {
            None if self.0.len() >= KEYS && !self.0.contains_key(key) => Found::Full,
            None => Found::Free,
            Some(entry) if entry.request_commitment != request_commitment => Found::Conflict(entry),
            Some(entry) => match entry.fate {
                Fate::Applied => Found::Made(entry),
                Fate::Open => Found::Open(entry),
                // The upstream recognizes repeated calls by the key.
                Fate::Unknown if of.header.is_some() => Found::Free,
                Fate::Unknown => Found::Unknown(entry),
            },
        }
    }

    /// Records that a call is about to be made under a key.
    pub fn intend(&mut self, key: &str, call: &str, request_commitment: &str, time: &str) {
        let entry = Entry {
            call: call.to_owned(),
            request_commitment: request_commitment.to_owned(),
            time: time.to_owned(),
            fate: Fate::Open,
            response_commitment: None,
        };
        self.0.insert(key.to_owned(), entry);
    }

    /// Records the outcome of the call that was made under a key, with the commitment to the result that the agent got. `None` means that
    /// the call certainly had no effect. The outcome of a call that no longer holds the key changes nothing.
    pub fn settle(&mut self, key: &str, call: &str, fate: Option<Fate>, given: Option<&String>) {
        let Some(entry) = self.0.get_mut(key).filter(|entry| entry.call == call) else { return };
        match fate {
            Some(fate) => (entry.fate, entry.response_commitment) = (fate, given.cloned()),
            None => drop(self.0.remove(key)),
        }
    }

    /// Marks the outcome of every open call as unknown, because the harness that could report it is gone.
    pub fn abandon(&mut self) {
        for entry in self.0.values_mut().filter(|entry| entry.fate == Fate::Open) {
            entry.fate = Fate::Unknown;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn of(header: bool) -> Idempotency {
        Idempotency { argument: None, header: header.then(|| "idempotency-key".into()), window_seconds: 60 }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_key_is_free_until_a_call_is_made_and_while_it_did_nothing() {
        let (of, mut ledger) = (of(false), Ledger::default());
        assert_eq!(ledger.find("k", "d", &of, at(0)), Found::Free);
        ledger.intend("k", "c1", "d", &at(0).to_string());
        assert!(matches!(ledger.find("k", "d", &of, at(1)), Found::Open(_)));
        ledger.settle("k", "c1", None, None);
        assert_eq!(ledger.find("k", "d", &of, at(1)), Found::Free);
        ledger.intend("k", "c2", "d", &at(2).to_string());
        ledger.settle("k", "c1", None, None);
        assert!(matches!(ledger.find("k", "d", &of, at(3)), Found::Open(_)), "another call's end");
        ledger.settle("k", "c2", Some(Fate::Applied), None);
        assert!(matches!(ledger.find("k", "d", &of, at(3)), Found::Made(_)));
        assert!(matches!(ledger.find("k", "e", &of, at(3)), Found::Conflict(_)));
        assert_eq!(ledger.find("k", "d", &of, at(62)), Found::Free, "its window is over");
    }

    #[test]
    fn an_unknown_effect_is_tried_again_only_where_the_upstream_tells_repeats() {
        let mut ledger = Ledger::default();
        ledger.intend("k", "c1", "d", &at(0).to_string());
        ledger.abandon();
        assert!(matches!(ledger.find("k", "d", &of(false), at(1)), Found::Unknown(_)));
        assert_eq!(ledger.find("k", "d", &of(true), at(1)), Found::Free);
        assert!(matches!(ledger.find("k", "e", &of(true), at(1)), Found::Conflict(_)));
    }

    #[test]
    fn keys_are_of_task_tool_and_argument() {
        let salt = Salt::new([0; 32]);
        let all = of(false);
        let one = Idempotency { argument: Some("id".into()), ..of(false) };
        let args = json!({"id": "a", "n": 1}).as_object().unwrap().clone();
        let base = key("u", "t", &one, &args, ("d", &salt)).unwrap();
        assert_eq!(key("u", "t", &one, &args, ("other", &salt)), Some(base.clone()), "of one argument alone");
        assert_ne!(key("u2", "t", &one, &args, ("d", &salt)), Some(base.clone()));
        assert_ne!(key("u", "t2", &one, &args, ("d", &salt)), Some(base.clone()));
        assert_ne!(key("u", "t", &all, &args, ("d", &salt)), Some(base));
        assert_ne!(key("u", "t", &all, &args, ("d", &salt)), key("u", "t", &all, &args, ("e", &salt)));
        assert_eq!(key("u", "t", &one, &Map::new(), ("d", &salt)), None);
    }

    proptest! {
        /// Whatever happens, no key has two calls that may have taken effect, unless the upstream recognizes repeated calls.
        #[test]
        fn a_key_has_one_effect(steps in proptest::collection::vec((0..3_u8, 0..3_u8, 0..4_u8), 1..40)) {
            let (of, mut ledger) = (of(false), Ledger::default());
            let mut effects: BTreeMap<u8, u32> = BTreeMap::new();
            for (n, (key, digest, end)) in steps.into_iter().enumerate() {
                let (name, digest, call) = (key.to_string(), digest.to_string(), format!("c{n}"));
                if ledger.find(&name, &digest, &of, at(1)) == Found::Free {
                    ledger.intend(&name, &call, &digest, &at(0).to_string());
                    if end != 1 {
                        *effects.entry(key).or_default() += 1;
                    }
                    match end {
                        0 => ledger.settle(&name, &call, Some(Fate::Applied), None),
                        1 => ledger.settle(&name, &call, None, None),
                        2 => ledger.settle(&name, &call, Some(Fate::Unknown), None),
                        _ => ledger.abandon(),
                    }
                }
            }
            prop_assert!(effects.values().all(|count| *count <= 1), "{effects:?}");
        }
    }
}
