//! RFC 8785 canonical JSON, and SHA-256 over it.

use serde::Serialize;
use sha2::{Digest, Sha256};

/// A value that has no canonical form, such as one with a number that JSON cannot write.
#[derive(Debug, thiserror::Error)]
#[error("this value has no canonical JSON (RFC 8785) form: {0}")]
pub struct CanonicalError(#[from] serde_json::Error);

/// The value's one and only byte form.
///
/// # Errors
/// If the value cannot be written as JSON.
pub fn to_bytes<T: Serialize>(value: &T) -> Result<Vec<u8>, CanonicalError> {
    Ok(serde_json_canonicalizer::to_vec(value)?)
}

/// SHA-256 of the canonical form.
///
/// # Errors
/// If the value cannot be written as JSON.
pub fn digest<T: Serialize>(value: &T) -> Result<[u8; 32], CanonicalError> {
    Ok(sha256(&to_bytes(value)?))
}

/// SHA-256 of bytes as they are.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}
