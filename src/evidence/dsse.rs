//! Envelopes of the Dead Simple Signing Envelope, DSSE v1, with Ed25519.
//!
//! Guarantees: the signature covers the payload together with its type, so that it cannot pass for anything else.
//! Rejects: more than one signature, and any text that is not in the one form that [`Envelope::sign`] writes.

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use serde::{Deserialize, Serialize};

use super::note::{Signer, VerifierKey};
use crate::canonical::{self, CanonicalError};

/// An envelope that cannot be read, or whose signature does not hold.
#[derive(Debug, thiserror::Error)]
pub enum EnvelopeError {
    /// The text is not an envelope.
    #[error("expected a DSSE envelope: {0}")]
    Form(String),
    /// The payload has another type.
    #[error("expected a payload of type {expected}, found {found:?}")]
    Type {
        /// The expected type.
        expected: String,
        /// The type in the envelope.
        found: String,
    },
    /// The envelope is not signed by the key alone.
    #[error("expected one signature by {expected}, found {found}")]
    Signature {
        /// The key.
        expected: String,
        /// What was found.
        found: String,
    },
}

/// A signed envelope.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<Signature>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Signature {
    keyid: String,
    sig: String,
}

/// Returns the bytes that are signed.
fn authenticated(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let start = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len());
    [start.as_bytes(), payload].concat()
}

/// Returns a key's name in envelopes: its name in notes, and its ID.
pub fn key_id(key: &VerifierKey) -> String {
    format!("{}+{}", key.name(), hex::encode(key.id()))
}

impl Envelope {
    /// Signs a payload.
    pub fn sign(payload_type: &str, payload: &[u8], signer: &Signer) -> Self {
        let signature = signer.sign(&authenticated(payload_type, payload));
        Self {
            payload: BASE64.encode(payload),
            payload_type: payload_type.to_owned(),
            signatures: vec![Signature { keyid: key_id(&signer.verifier()), sig: BASE64.encode(signature) }],
        }
    }

    /// Returns the envelope's text: canonical JSON and a newline.
    ///
    /// # Errors
    /// Returns no error in practice, because the envelope consists of text alone.
    pub fn to_bytes(&self) -> Result<Vec<u8>, CanonicalError> {
        let mut text = canonical::to_bytes(self)?;
        text.push(b'\n');
        Ok(text)
    }

    /// Reads an envelope. Returns its payload if it has this type and is signed by this key alone.
    ///
    /// # Errors
    /// Returns what does not hold.
    pub fn open(text: &[u8], payload_type: &str, key: &VerifierKey) -> Result<Vec<u8>, EnvelopeError> {
        let form = |error: &dyn std::fmt::Display| EnvelopeError::Form(error.to_string());
        let envelope: Self = serde_json::from_slice(text).map_err(|error| form(&error))?;
        if envelope.to_bytes().ok().as_deref() != Some(text) {
            return Err(form(&"it is not canonical JSON (RFC 8785) and a newline"));
        }
        if envelope.payload_type != payload_type {
            return Err(EnvelopeError::Type { expected: payload_type.to_owned(), found: envelope.payload_type });
        }
        let payload = BASE64.decode(&envelope.payload).map_err(|error| form(&error))?;
        let expected = key_id(key);
        let found = |found: String| EnvelopeError::Signature { expected: expected.clone(), found };
        let [Signature { keyid, sig }] = envelope.signatures.as_slice() else {
            return Err(found(format!("{} signatures", envelope.signatures.len())));
        };
        if *keyid != expected {
            return Err(found(format!("one by {keyid:?}")));
        }
        let sig = BASE64.decode(sig).map_err(|error| form(&error))?;
        if !key.made(&authenticated(payload_type, &payload), &sig) {
            return Err(found("one that does not verify".to_owned()));
        }
        Ok(payload)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The example of the specification, without its key.
    #[test]
    fn what_is_signed_is_as_the_specification_says() {
        assert_eq!(
            authenticated("http://example.com/HelloWorld", b"hello world"),
            b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
        );
    }

    #[test]
    fn an_envelope_is_opened_by_its_key_and_type_alone() {
        let (signer, other) = (Signer::generate("a.example").unwrap(), Signer::generate("a.example").unwrap());
        let text = Envelope::sign("t", b"{}", &signer).to_bytes().unwrap();
        assert_eq!(Envelope::open(&text, "t", &signer.verifier()).unwrap(), b"{}");
        assert!(matches!(Envelope::open(&text, "u", &signer.verifier()), Err(EnvelopeError::Type { .. })));
        assert!(matches!(Envelope::open(&text, "t", &other.verifier()), Err(EnvelopeError::Signature { .. })));
    }

    proptest! {
        /// Only the bytes that were signed are accepted.
        #[test]
        fn every_changed_byte_shows(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let signer = Signer::generate("a.example").unwrap();
            let mut text = Envelope::sign("t", b"{\"a\":1}", &signer).to_bytes().unwrap();
            let at = at.index(text.len());
            prop_assume!(text[at] != byte);
            text[at] = byte;
            prop_assert!(Envelope::open(&text, "t", &signer.verifier()).is_err());
        }
    }
}
