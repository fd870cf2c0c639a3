//! Makes the commitments that evidence holds instead of arguments, prompts and replies.
//!
//! The plain digest of a short value can be guessed. A commitment cannot be guessed, because it depends on a salt that only the task's
//! harness and the gateway have.
//!
//! Guarantees: within a task, the same content has the same commitment. The holder of the salt and the content can disclose one field of
//! the arguments and prove it ([`Salt::open`], [`Opening::commitment`]) without disclosing the other fields. After the salt is destroyed,
//! nobody can recover or prove the content, and no record changes.
//! Non-goals: storing the content.
//!
//! The commitment to a SHA-256 digest `d` under a label `l` is `SHA-256(s ‖ d)` with `s = HMAC-SHA-256(salt, l ‖ d)`. For opaque bytes, `d`
//! is their digest and `l` is [`BYTES`]. The commitment to JSON is made field by field. Each string, number, boolean, `null`, empty list
//! and empty object is replaced by the hex commitment to its canonical form (RFC 8785) under the label [`FIELD`] ‖ its JSON Pointer
//! (RFC 6901) ‖ `0x00`. The commitment to the whole value is the SHA-256 of the canonical form of the result.

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

/// The label of opaque bytes.
pub const BYTES: u8 = 0;
/// The first byte of the label of a field.
pub const FIELD: u8 = 1;

/// An error of a salt that has the wrong form.
#[derive(Debug, thiserror::Error)]
#[error("expected a salt of 32 bytes in base64")]
pub struct SaltError;

/// The secret that a task's commitments depend on. It never appears in a record or in a message to users.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Salt {
    bytes: [u8; 32],
    /// The key is made once, because the arguments of a call have many fields.
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
    /// Returns the salt with these bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self { bytes, key: hmac::Key::new(hmac::HMAC_SHA256, &bytes) }
    }

    /// Returns the commitment to opaque bytes, in hex.
    pub fn bytes(&self, content: &[u8]) -> String {
        self.digested(&canonical::sha256(content))
    }

    /// Returns the commitment to the opaque bytes that have this SHA-256 digest, in hex.
    pub fn digested(&self, digest: &[u8; 32]) -> String {
        hex::encode(commitment(&self.own(&[BYTES], digest), digest))
    }

    /// Returns the commitment to a JSON value, in hex.
    ///
    /// # Errors
    /// Returns an error if the value has no canonical form.
    pub fn value(&self, value: &Value) -> Result<String, CanonicalError> {
        Ok(hex::encode(canonical::digest(&self.committed(value, &RefCell::default()))?))
    }

    /// Returns the disclosure of one field, by its JSON Pointer, of a value with a commitment. Returns `None` if the value has nothing at
    /// this pointer, or a value that has fields itself.
    ///
    /// # Errors
    /// Returns an error if the value has no canonical form.
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

    /// Returns the value in the form in which it is hashed. `pointer` is the place of the value.
    fn committed<'v>(&'v self, value: &'v Value, pointer: &'v RefCell<String>) -> Committed<'v> {
        Committed { salt: self, value, pointer }
    }

    /// Returns the salt of one commitment.
    fn own(&self, label: &[u8], digest: &[u8; 32]) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(label);
        context.update(digest);
        let mut own = [0; 32];
        own.iter_mut().zip(context.sign().as_ref()).for_each(|(to, from)| *to = *from);
        own
    }
}

/// A value in which each field is replaced by its commitment. It is serialized without a copy in between, because there are many calls.
struct Committed<'v> {
    salt: &'v Salt,
    value: &'v Value,
    pointer: &'v RefCell<String>,
}

impl Committed<'_> {
    /// Calls `write` for the member of this name, with the member's pointer in place.
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

    /// Returns the commitment to a field, in hex.
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

/// Returns whether a value has a commitment of its own.
fn is_field(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
    }
}

/// The proof of one field of a value whose commitment is in a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Opening {
    /// The value, with the commitment of each field in its place.
    pub committed: Value,
    /// The JSON Pointer of the field.
    pub pointer: String,
    /// The value of the field.
    pub value: Value,
    /// The salt of the field's commitment, in hex.
    pub salt: String,
}

/// An error of an opening that proves nothing.
#[derive(Debug, thiserror::Error)]
pub enum OpeningError {
    /// The salt has the wrong form.
    #[error("expected a salt of 32 bytes in hex")]
    Salt,
    /// The commitment at the field's place is not the commitment to this value.
    #[error("expected {expected} at {pointer:?}, which is the commitment to this value, found {found}")]
    Field {
        /// The JSON Pointer of the field.
        pointer: String,
        /// The commitment to the value.
        expected: String,
        /// The value at the field's place.
        found: String,
    },
    /// The value has no canonical form.
    #[error(transparent)]
    Canonical(#[from] CanonicalError),
}

impl Opening {
    /// Returns the commitment to the whole value, in hex. A record has it as its digest.
    ///
    /// # Errors
    /// Returns an error if the salt has the wrong form, or if the commitment at the field's place is not the commitment to this value.
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
