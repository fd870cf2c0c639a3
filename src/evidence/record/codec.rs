//! The form in which records and their documents are written and read.
//!
//! Guarantees: a record has one form only. What is read is written again, and must have the same bytes. A record or a document that a
//! later version of Belay wrote has an error of its own.
//!
//! Non-goals: evaluation of what a record says.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Actor, Event, Record, VERSION};
use crate::{
    canonical::{self, CanonicalError},
    evidence::rollback::plan::Plan,
    policy::config::{PolicyConfig, Usage},
};

/// The maximum length of a record in bytes: entries of C2SP's tlog-tiles have their length in 16 bits.
pub const LONGEST: usize = 65_535;

/// A record that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The record has no canonical form.
    #[error(transparent)]
    Canonical(#[from] CanonicalError),
    /// The record is too long.
    #[error("expected a record of at most {LONGEST} bytes, found {0}")]
    Long(usize),
}

/// A record as it is written, and the documents that it names, in the order in which it names them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The record in canonical JSON.
    pub record: Vec<u8>,
    /// The documents, each in canonical JSON.
    pub documents: Vec<Vec<u8>>,
}

/// The names of the documents of `attempt.opened`, in their order.
pub const DOCUMENTS: [&str; 2] = ["policyDigest", "rollbackDigest"];

impl Record {
    /// Returns the record as it is written.
    ///
    /// # Errors
    /// Returns an error if the record has no canonical form, has a number beyond [`LARGEST_WHOLE`](canonical::LARGEST_WHOLE), or is longer
    /// than [`LONGEST`].
    pub fn encode(&self) -> Result<Encoded, EncodeError> {
        let record = canonical::to_whole(self)?;
        if record.len() > LONGEST {
            return Err(EncodeError::Long(record.len()));
        }
        let documents = match &self.event {
            Event::AttemptOpened(opened) => {
                let plan = opened.rollback.as_ref().map(canonical::to_bytes);
                std::iter::once(canonical::to_bytes(&opened.policy)).chain(plan).collect::<Result<_, _>>()?
            }
            _ => Vec::new(),
        };
        Ok(Encoded { record, documents })
    }

    /// Returns why this version cannot evaluate a record, if the record says itself that it is of a later version.
    pub fn newer(bytes: &[u8]) -> Option<Unread> {
        let value: Value = serde_json::from_slice(bytes).ok()?;
        let v = value.get("v").and_then(Value::as_u64)?;
        let later = v > u64::from(VERSION) && v <= canonical::LARGEST_WHOLE.unsigned_abs();
        later.then(|| Unread::Newer(format!("expected version {VERSION}, found {v}: use a belay that knows it")))
    }

    /// Returns why this version cannot evaluate a document. It cannot if the record names the document under the name at `place` in
    /// [`DOCUMENTS`], and the document is an object that differs from what this version would write after reading it. Documents hold what
    /// Belay decides by. They grow with new versions of Belay, while the form of records does not.
    pub fn newer_document(bytes: &[u8], place: usize, document: &[u8]) -> Option<Unread> {
        let record: Value = serde_json::from_slice(bytes).ok()?;
        let its = hex::encode(canonical::sha256(document));
        let value: Value = serde_json::from_slice(document).ok()?;
        let name = *DOCUMENTS.get(place)?;
        if record.get(name) != Some(&its.as_str().into()) || !value.is_object() {
            return None;
        }
        unknown(name, value, document).map(Unread::Newer)
    }

    /// Returns the number of documents that the record names.
    pub fn documents(&self) -> usize {
        match &self.event {
            Event::AttemptOpened(opened) => 1 + usize::from(opened.rollback.is_some()),
            _ => 0,
        }
    }

    /// Reads a record. Takes the documents that the record names from the front of `documents`.
    ///
    /// # Errors
    /// Returns what was expected and found if the bytes are not a complete record of this version with its documents. A field that
    /// [`Record`] does not have is rejected.
    pub fn decode(bytes: &[u8], documents: &mut dyn Iterator<Item = &[u8]>) -> Result<Self, Unread> {
        if bytes.len() > LONGEST {
            return Err(EncodeError::Long(bytes.len()).to_string().into());
        }
        let mut taken = Vec::new();
        let read = match Self::typed(bytes) {
            Ok(record) => Ok(record),
            Err(_) => Self::with_documents(bytes, documents, &mut taken),
        };
        let again = read.and_then(|record| {
            let again = record.encode().map_err(|error| error.to_string())?;
            Ok((record, again))
        });
        let (record, again) = again.map_err(|problem| problem.explained(bytes))?;
        if let Some(newer) = (record.v > VERSION).then(|| Self::newer(bytes)).flatten() {
            return Err(newer);
        }
        if again.documents != taken {
            let problem =
                "a document of the record has fields or values that this version of belay does not know".to_owned();
            return Err(Unread::from(problem).explained(bytes));
        }
        if again.record != bytes {
            let problem = format!("the record has fields or values that version {VERSION} does not have");
            return Err(Unread::from(problem).explained(bytes));
        }
        Ok(record)
    }

    /// Reads a record that names no documents. Intents and outcomes, which most records are, are parsed twice: once for the members of
    /// every record and once for their own. Otherwise serde would determine the flattened event itself and buffer every member twice.
    fn typed(bytes: &[u8]) -> serde_json::Result<Self> {
        #[derive(Deserialize)]
        struct Common<'b> {
            v: u8,
            seq: u64,
            time: String,
            attempt: i64,
            actor: Actor,
            usage: Usage,
            kind: &'b str,
        }
        let Common { v, seq, time, attempt, actor, usage, kind } = serde_json::from_slice(bytes)?;
        let event = match kind {
            "call.intent" => Event::Intent(serde_json::from_slice(bytes)?),
            "call.outcome" => Event::Outcome(serde_json::from_slice(bytes)?),
            _ => return serde_json::from_slice(bytes),
        };
        Ok(Self { v, seq, time, attempt, actor, usage, event })
    }

    /// Reads a record that may name documents. Puts each document in the place of its digest.
    fn with_documents<'d>(
        bytes: &[u8],
        documents: &mut dyn Iterator<Item = &'d [u8]>,
        taken: &mut Vec<&'d [u8]>,
    ) -> Result<Self, Unread> {
        let none = |error| format!("not a record: {error}");
        let mut value: Value = serde_json::from_slice(bytes).map_err(none)?;
        let opened = value.get("kind").is_some_and(|kind| kind == "attempt.opened");
        for name in DOCUMENTS.into_iter().filter(|_| opened) {
            let Some(digest) = value.get_mut(name) else { continue };
            let expected = digest.as_str().ok_or_else(|| format!("expected a digest as {name}"))?;
            let found = documents.next().ok_or_else(|| format!("expected the document {expected}, found none"))?;
            let its = hex::encode(canonical::sha256(found));
            if its != expected {
                return Err(format!("expected the document {expected}, found {its}").into());
            }
            let document: Value = serde_json::from_slice(found).map_err(|error| format!("document {its}: {error}"))?;
            if let Some(problem) = unknown(name, document.clone(), found) {
                return Err(problem.into());
            }
            *digest = document;
            taken.push(found);
        }
        Ok(serde_json::from_value(value).map_err(none)?)
    }
}

/// Returns why a document is not one that a record of this version may name under this name.
fn unknown(name: &str, value: Value, document: &[u8]) -> Option<String> {
    let problem = match name {
        "policyDigest" => unlike::<PolicyConfig>(value, document),
        _ => unlike::<Plan>(value, document),
    };
    let its = || hex::encode(canonical::sha256(document));
    problem.map(|problem| format!("this version of belay does not know the document {}: {problem}", its()))
}

/// Returns why a document is not a `T` in the form in which this version writes it.
fn unlike<T: Serialize + serde::de::DeserializeOwned>(value: Value, document: &[u8]) -> Option<String> {
    let again = serde_json::from_value::<T>(value).map_err(|error| error.to_string());
    // Serde reads more than it writes: a list for an object, `null` for an absent member, a member that has a default and is left out.
    match again.and_then(|read| canonical::to_bytes(&read).map_err(|error| error.to_string())) {
        Ok(again) if again == document => None,
        Ok(_) => Some("it has fields or values that this version writes in another way".to_owned()),
        Err(problem) => Some(problem),
    }
}

/// A record that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unread {
    /// The record does not have the form of its version: what was expected and found.
    #[error("{0}")]
    Wrong(String),
    /// A later version may be able to read the record. This version cannot evaluate it.
    #[error("{0}")]
    Newer(String),
}

impl From<String> for Unread {
    fn from(problem: String) -> Self {
        Self::Wrong(problem)
    }
}

impl Unread {
    /// Returns a more exact error if the record's bytes show one: the record is of a later version, or has a number that no record may
    /// have.
    fn explained(self, bytes: &[u8]) -> Self {
        if let Some(newer) = Record::newer(bytes) {
            return newer;
        }
        let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return self };
        match beyond(&value) {
            Some(number) => Self::Wrong(canonical::beyond(number)),
            None => self,
        }
    }
}

/// Returns the first number that no record may have.
fn beyond(value: &Value) -> Option<&serde_json::Number> {
    match value {
        Value::Number(number) => {
            let whole =
                number.as_i64().is_some_and(|whole| whole.unsigned_abs() <= canonical::LARGEST_WHOLE.unsigned_abs());
            (!whole).then_some(number)
        }
        Value::Array(items) => items.iter().find_map(beyond),
        Value::Object(members) => members.values().find_map(beyond),
        _ => None,
    }
}
