//! Commitments: what stands in the evidence for arguments, prompts and replies.
//!
//! A plain digest of something short can be guessed. A commitment cannot: it is made with a salt that only the task's harness and the
//! gateway have. Promises: within a task the same content has the same commitment; whoever has salt and content can disclose one
//! field of the arguments and prove it ([`Salt::open`], [`Opening::commitment`]), without a word about the others; once the salt is
//! destroyed, what is committed to is gone, and no record has changed. Refuses: to keep content.
//!
//! A commitment to a SHA-256 digest `d` under a label `l` is `SHA-256(s ‖ d)` with `s = HMAC-SHA-256(salt, l ‖ d)`. Of opaque bytes `d` is their
//! digest, and `l` is [`BYTES`]. JSON is committed to by field: each string, number, boolean, `null` and each empty list or object is replaced by
//! the hex commitment to its canonical form (RFC 8785), under the label [`FIELD`] ‖ its JSON Pointer (RFC 6901) ‖ `0x00`; the commitment to the
//! whole is SHA-256 over the canonical form of what that gives.

use std::cell::RefCell;

use base64::{Engine, prelude::BASE64_STANDARD};
use ring::hmac;
use serde::{
    Deserialize, Serialize, Serializer,
    ser::{Error, SerializeMap, SerializeSeq},
};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::json;
use crate::canonical::{self, CanonicalError};

/// Label of opaque bytes.
pub const BYTES: u8 = 0;
/// What the label of a field begins with.
pub const FIELD: u8 = 1;

/// A salt that is none.
#[derive(Debug, thiserror::Error)]
#[error("expected a salt of 32 bytes in base64")]
pub struct SaltError;

/// What makes a task's commitments. It is never in a record, nor in a message to people.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Salt {
    bytes: [u8; 32],
    /// Made once: a call's arguments have many fields.
    key: hmac::Key,
}

impl PartialEq for Salt {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for Salt {}

impl std::fmt::Debug for Salt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Salt(…)")
    }
}

impl TryFrom<String> for Salt {
    type Error = SaltError;

    fn try_from(text: String) -> Result<Self, SaltError> {
        let bytes = BASE64_STANDARD.decode(text.trim()).map_err(|_| SaltError)?;
        bytes.try_into().map(Self::new).map_err(|_| SaltError)
    }
}

impl From<Salt> for String {
    fn from(salt: Salt) -> Self {
        BASE64_STANDARD.encode(salt.bytes)
    }
}

impl Salt {
    /// The salt of these bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self { bytes, key: hmac::Key::new(hmac::HMAC_SHA256, &bytes) }
    }

    /// The commitment to opaque bytes, hex.
    pub fn bytes(&self, content: &[u8]) -> String {
        self.digested(&canonical::sha256(content))
    }

    /// The commitment to opaque bytes of this SHA-256, hex.
    pub fn digested(&self, digest: &[u8; 32]) -> String {
        hex::encode(commitment(&self.own(&[BYTES], digest), digest))
    }

    /// The commitment to a JSON value, hex.
    ///
    /// # Errors
    /// If it has no canonical form.
    pub fn value(&self, value: &Value) -> Result<String, CanonicalError> {
        Ok(hex::encode(canonical::digest(&self.committed(value, &RefCell::default()))?))
    }

    /// What discloses one field, by its JSON Pointer, of a value that was committed to; `None` if it has none there, or one with fields of its own.
    ///
    /// # Errors
    /// If the value has no canonical form.
    pub fn open(&self, value: &Value, pointer: &str) -> Result<Option<Opening>, CanonicalError> {
        let Some(field) = value.pointer(pointer).filter(|field| is_field(field)) else { return Ok(None) };
        let digest = canonical::digest(field)?;
        Ok(Some(Opening {
            committed: serde_json::to_value(self.committed(value, &RefCell::default()))?,
            pointer: pointer.to_owned(),
            value: field.clone(),
            salt: hex::encode(self.own(&label(pointer), &digest)),
        }))
    }

    /// The value as it is committed to; `pointer` is where it is.
    fn committed<'v>(&'v self, value: &'v Value, pointer: &'v RefCell<String>) -> Committed<'v> {
        Committed { salt: self, value, pointer }
    }

    /// The salt of one commitment.
    fn own(&self, label: &[u8], digest: &[u8; 32]) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(label);
        context.update(digest);
        let mut own = [0; 32];
        own.iter_mut().zip(context.sign().as_ref()).for_each(|(to, from)| *to = *from);
        own
    }
}

/// A value with each of its fields replaced by the commitment to it, written as it is read: calls are many.
struct Committed<'v> {
    salt: &'v Salt,
    value: &'v Value,
    pointer: &'v RefCell<String>,
}

impl Committed<'_> {
    /// What `write` makes of the member of this name, whose pointer is there meanwhile.
    fn member<T>(&self, name: &str, value: &Value, write: impl FnOnce(&Committed<'_>) -> T) -> T {
        let at = self.pointer.borrow().len();
        {
            let mut pointer = self.pointer.borrow_mut();
            pointer.push('/');
            pointer.push_str(&json::pointer_token(name));
        }
        let written = write(&Committed { value, ..*self });
        self.pointer.borrow_mut().truncate(at);
        written
    }

    /// The commitment to a field, hex.
    fn field(&self) -> Result<String, CanonicalError> {
        let digest = canonical::digest(self.value)?;
        let own = self.salt.own(&label(&self.pointer.borrow()), &digest);
        Ok(hex::encode(commitment(&own, &digest)))
    }
}

impl Serialize for Committed<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self.value {
            Value::Array(items) if !items.is_empty() => {
                let mut list = to.serialize_seq(Some(items.len()))?;
                for (index, item) in items.iter().enumerate() {
                    self.member(&index.to_string(), item, |item| list.serialize_element(item))?;
                }
                list.end()
            }
            Value::Object(fields) if !fields.is_empty() => {
                let mut object = to.serialize_map(Some(fields.len()))?;
                for (name, field) in fields {
                    self.member(name, field, |field| object.serialize_entry(name, field))?;
                }
                object.end()
            }
            _ => to.serialize_str(&self.field().map_err(S::Error::custom)?),
        }
    }
}

fn commitment(own: &[u8; 32], digest: &[u8; 32]) -> [u8; 32] {
    Sha256::new().chain_update(own).chain_update(digest).finalize().into()
}

fn label(pointer: &str) -> Vec<u8> {
    [&[FIELD], pointer.as_bytes(), &[0]].concat()
}

/// Whether a value is committed to by itself.
fn is_field(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
    }
}

/// What proves one field of a value that a record commits to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Opening {
    /// The value with the commitments of its fields in their places.
    pub committed: Value,
    /// Where the field is.
    pub pointer: String,
    /// The field.
    pub value: Value,
    /// The salt of its commitment, hex.
    pub salt: String,
}

/// An opening that proves nothing.
#[derive(Debug, thiserror::Error)]
pub enum OpeningError {
    /// The salt is none.
    #[error("expected a salt of 32 bytes in hex")]
    Salt,
    /// The field is not what is committed to.
    #[error("expected {expected} at {pointer:?}, which is the commitment to this value, found {found}")]
    Field {
        /// Where.
        pointer: String,
        /// The value's commitment.
        expected: String,
        /// What is there.
        found: String,
    },
    /// It cannot be hashed.
    #[error(transparent)]
    Canonical(#[from] CanonicalError),
}

impl Opening {
    /// The commitment to the whole value, hex, which a record has as its digest.
    ///
    /// # Errors
    /// If the field is not the one that is committed to.
    pub fn commitment(&self) -> Result<String, OpeningError> {
        let salt = hex::decode(&self.salt).ok().and_then(|salt| salt.try_into().ok()).ok_or(OpeningError::Salt)?;
        let expected = hex::encode(commitment(&salt, &canonical::digest(&self.value)?));
        let found = self.committed.pointer(&self.pointer);
        if found.and_then(Value::as_str) != Some(&expected) {
            let found = found.map_or_else(|| "nothing".to_owned(), Value::to_string);
            return Err(OpeningError::Field { pointer: self.pointer.clone(), expected, found });
        }
        Ok(hex::encode(canonical::digest(&self.committed)?))
    }
}

#[cfg(test)]
mod tests;
