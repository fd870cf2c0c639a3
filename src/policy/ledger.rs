//! The idempotency ledger: which calls were made under which key, and what became of them.
//!
//! Promises: under one key one effect; the same key with other arguments is a conflict; what became of a call that nobody knows is made
//! again only where its upstream tells repeats by the key itself. Refuses: results, but for their digests; who keeps them replays them. A key is of one
//! task: another task's calls are none of its business.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{commit::Salt, config::Idempotency};
use crate::canonical;

/// Keys that one task may have in use: its log's readers keep them all.
pub const KEYS: usize = 4096;

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// It has no outcome yet.
    Open,
    /// It took effect.
    Applied,
    /// Nobody knows.
    Unknown,
}

/// The call that was made under a key. One that certainly did nothing leaves none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// The call, by its intent.
    pub call: String,
    /// The commitment to its arguments, hex.
    pub request_digest: String,
    /// When, RFC 3339.
    pub time: String,
    /// What became of it.
    pub fate: Fate,
    /// The commitment to the result that the agent was given, hex; absent where it got none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_digest: Option<String>,
}

/// What a key says of a call that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found<'l> {
    /// Nothing stands against it.
    Free,
    /// It was made; the result is to be given again.
    Made(&'l Entry),
    /// It is under way, or was when its harness ended.
    Open(&'l Entry),
    /// It was made, and nobody knows what became of it.
    Unknown(&'l Entry),
    /// Another call was made under this key.
    Conflict(&'l Entry),
    /// The task has no more keys.
    Full,
}

/// The key of a call: SHA-256 over the task, the tool and the commitment to what the contract takes it from, hex. `None` if the call has no
/// such argument.
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

/// The key that is made of this: a digest of all arguments, or of one.
pub fn made_of(uid: &str, tool: &str, material: &str) -> String {
    hex::encode(canonical::sha256(format!("{uid}\n{tool}\n{material}").as_bytes()))
}

/// The calls of a task, by key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ledger(BTreeMap<String, Entry>);

impl Ledger {
    /// What is known of a key. `now` and the window are the contract's; a call that is older than that is as none.
    pub fn find(&self, key: &str, request_digest: &str, of: &Idempotency, now: Timestamp) -> Found<'_> {
        let entry = self.0.get(key).filter(|entry| {
            let window = jiff::SignedDuration::from_secs(of.window_seconds);
            // A time that cannot be read never lapses.
            entry.time.parse::<Timestamp>().map_or(true, |made| now.duration_since(made) < window)
        });
        match entry {
            None if self.0.len() >= KEYS && !self.0.contains_key(key) => Found::Full,
            None => Found::Free,
            Some(entry) if entry.request_digest != request_digest => Found::Conflict(entry),
            Some(entry) => match entry.fate {
                Fate::Applied => Found::Made(entry),
                Fate::Open => Found::Open(entry),
                // The upstream tells repeats by the key.
                Fate::Unknown if of.header.is_some() => Found::Free,
                Fate::Unknown => Found::Unknown(entry),
            },
        }
    }

    /// A call is about to be made under a key.
    pub fn intend(&mut self, key: &str, call: &str, request_digest: &str, time: &str) {
        let entry = Entry {
            call: call.to_owned(),
            request_digest: request_digest.to_owned(),
            time: time.to_owned(),
            fate: Fate::Open,
            response_digest: None,
        };
        self.0.insert(key.to_owned(), entry);
    }

    /// What became of the call that was made under a key, with the digest of what the agent was given; `None` where it certainly did
    /// nothing. Another call's end changes nothing.
    pub fn settle(&mut self, key: &str, call: &str, fate: Option<Fate>, given: Option<&String>) {
        let Some(entry) = self.0.get_mut(key).filter(|entry| entry.call == call) else { return };
        match fate {
            Some(fate) => (entry.fate, entry.response_digest) = (fate, given.cloned()),
            None => drop(self.0.remove(key)),
        }
    }

    /// Those who were to say what became of open calls are gone: nobody knows.
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
        /// Whatever happens, no key has two calls that may have taken effect, but where the upstream tells repeats.
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
