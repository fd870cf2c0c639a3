//! C2SP signed notes, tlog checkpoints and witness cosignatures, with Ed25519 by ring.
//!
//! Guarantees: `Note::verify` and `Note::verify_cosignature` succeed only if there is a signature by exactly that key, and every signature
//! under its name and ID is valid.
//! Rejects: other signature types, extension lines in checkpoints, and any text that is not byte for byte what `Display` would write.
//!
//! There are two kinds of keys, which differ in the type byte of their key IDs. A *log* key (`0x01`) signs the note's text. A *witness* key
//! (`0x04`) signs the text together with a time, and vouches that the log grew and never changed. The name of a `Signer` determines its
//! kind: `WITNESS_NAME` and `SELF_WITNESS_NAME` belong to witnesses, every other name belongs to a log.

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use ring::{
    rand::SystemRandom,
    signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey},
};
use sha2::{Digest, Sha256};

use super::merkle::Hash;

/// The name of the witness's key.
pub const WITNESS_NAME: &str = "belay.dev/witness";
/// The name of a self-witness's key. In `belay run`, the party that runs the agent has the witness's key.
pub const SELF_WITNESS_NAME: &str = "belay.dev/self-witness";
/// The maximum number of signatures. C2SP asks verifiers to accept this many; Belay's notes never have more than two.
const MAX_SIGNATURES: usize = 16;
/// The start of a signature line: em dash and space.
const SIGNATURE_START: &str = "\u{2014} ";

/// Returns the origin of a task's log.
pub fn origin(task_uid: &str) -> String {
    format!("belay.dev/task/{task_uid}")
}

/// Returns the name of the key that signs an attempt's checkpoints.
pub fn attempt_key_name(task_uid: &str, attempt: i64) -> String {
    format!("{}/{attempt}", origin(task_uid))
}

/// A note that cannot be read, or whose signatures do not hold.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoteError {
    /// The text does not have the form of a signed note.
    #[error("not a signed note: {0}")]
    Syntax(&'static str),
    /// The note's text is not a checkpoint.
    #[error("not a checkpoint: {0}")]
    Checkpoint(&'static str),
    /// There is no signature by that key.
    #[error("expected a signature by {name}+{id}, found {found}", id = hex::encode(.id), found = if .found.is_empty() { "none" } else { .found })]
    Missing {
        /// The key's name.
        name: String,
        /// The key's ID.
        id: [u8; 4],
        /// The keys that signed, for the message.
        found: String,
    },
    /// A signature under that key's name and ID does not verify.
    #[error("the signature by {0} does not verify: the text or the signature was changed, or another key made it")]
    Forged(String),
    /// The key is a log key where a witness key is needed, or the other way round.
    #[error("expected {expected}, found {name}, which is another type of key")]
    KeyType {
        /// The type that is needed.
        expected: &'static str,
        /// The key.
        name: String,
    },
}

/// A key that cannot be made or read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The name is not one that C2SP allows.
    #[error("a key name must be non-empty, without spaces, control characters and `+`; found {0:?}")]
    Name(String),
    /// The document is not a PKCS#8 Ed25519 key.
    #[error("expected an Ed25519 private key in PKCS#8 DER, found something else ({0})")]
    Pkcs8(String),
    /// The system has no randomness.
    #[error("the operating system gave no randomness for a new key")]
    Random,
    /// The text is not a verifier key.
    #[error("expected a C2SP verifier key `<name>+<8 hex digits>+<base64>`: {0}")]
    Verifier(&'static str),
}

/// The meaning of a key's signatures, which is its C2SP type byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KeyType {
    /// Signs a note's text.
    Log = 1,
    /// Signs a checkpoint and a time.
    Witness = 4,
}

/// Returns whether a key may have this name.
fn valid_name(name: &str) -> bool {
    !name.is_empty() && !name.chars().any(|c| c == '+' || c.is_whitespace() || c.is_control())
}

/// Returns the key ID: the first four bytes of SHA-256 over name, newline, type and public key.
fn key_id(name: &str, kind: KeyType, public: &[u8]) -> [u8; 4] {
    let digest: Hash =
        Sha256::new().chain_update(name).chain_update([b'\n', kind as u8]).chain_update(public).finalize().into();
    let [a, b, c, d, ..] = digest;
    [a, b, c, d]
}

/// Returns the text that a witness signs.
fn cosigned_text(time: u64, text: &str) -> String {
    format!("cosignature/v1\ntime {time}\n{text}")
}

/// Returns a new Ed25519 private key in PKCS#8 DER, for [`Signer::from_pkcs8`].
///
/// # Errors
/// Returns an error if the system has no randomness.
pub fn generate_pkcs8() -> Result<Vec<u8>, KeyError> {
    let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| KeyError::Random)?;
    Ok(document.as_ref().to_vec())
}

/// A private key with a name.
pub struct Signer {
    key: Ed25519KeyPair,
    verifier: VerifierKey,
}

impl Signer {
    /// Returns a new key, which is never stored.
    ///
    /// # Errors
    /// Returns an error if the name is not allowed or the system has no randomness.
    pub fn generate(name: &str) -> Result<Self, KeyError> {
        Self::from_pkcs8(name, &generate_pkcs8()?)
    }

    /// Returns the key in this PKCS#8 document, as [`generate_pkcs8`] or `openssl genpkey` makes it.
    ///
    /// # Errors
    /// Returns an error if the name is not allowed or the document is not an Ed25519 key.
    pub fn from_pkcs8(name: &str, document: &[u8]) -> Result<Self, KeyError> {
        if !valid_name(name) {
            return Err(KeyError::Name(name.to_owned()));
        }
        let key = Ed25519KeyPair::from_pkcs8_maybe_unchecked(document).map_err(|e| KeyError::Pkcs8(e.to_string()))?;
        let kind = if [WITNESS_NAME, SELF_WITNESS_NAME].contains(&name) { KeyType::Witness } else { KeyType::Log };
        let public = key.public_key().as_ref().try_into().map_err(|_| KeyError::Pkcs8("public key".to_owned()))?;
        Ok(Self { key, verifier: VerifierKey { name: name.to_owned(), kind, public } })
    }

    /// Returns the public half.
    pub fn verifier(&self) -> VerifierKey {
        self.verifier.clone()
    }

    /// Signs a message. The message must not begin like a note, a cosignature, or a label of [`Signer::derived`].
    pub(super) fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.key.sign(message).as_ref().to_vec()
    }

    /// Returns a secret that follows from this key and a label alone. Ed25519 signatures are deterministic, and nobody without the key can
    /// make this one. No label is the text of a note.
    pub fn derived(&self, label: &str) -> [u8; 32] {
        Sha256::digest(self.key.sign(label.as_bytes()).as_ref()).into()
    }

    /// Returns a signature line over a message.
    fn signature(&self, kind: KeyType, time: Option<u64>, message: &str) -> Signature {
        let mut bytes = time.map(|t| t.to_be_bytes().to_vec()).unwrap_or_default();
        bytes.extend_from_slice(self.key.sign(message.as_bytes()).as_ref());
        let VerifierKey { name, public, .. } = &self.verifier;
        Signature { name: name.clone(), id: key_id(name, kind, public), bytes }
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("verifier", &self.verifier.to_string()).finish_non_exhaustive()
    }
}

/// A public key. Its [`Display`](fmt::Display) and [`FromStr`] are C2SP's vkey text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifierKey {
    name: String,
    kind: KeyType,
    public: [u8; 32],
}

impl VerifierKey {
    /// Returns the name in signature lines.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the ID in signature lines.
    pub fn id(&self) -> [u8; 4] {
        key_id(&self.name, self.kind, &self.public)
    }

    /// Returns whether this is a witness's key.
    pub fn is_witness(&self) -> bool {
        self.kind == KeyType::Witness
    }

    /// Returns whether this is the key of a self-witness, which the party that ran the agent has.
    pub fn is_self_witness(&self) -> bool {
        self.is_witness() && self.name == SELF_WITNESS_NAME
    }

    /// Checks whether this key made an Ed25519 signature over a message.
    pub(super) fn made(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, &self.public).verify(message, signature).is_ok()
    }
}

impl fmt::Display for VerifierKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut key = vec![self.kind as u8];
        key.extend_from_slice(&self.public);
        write!(f, "{}+{}+{}", self.name, hex::encode(self.id()), BASE64.encode(key))
    }
}

impl FromStr for VerifierKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        // Base64 may contain a plus sign, names and IDs do not.
        let mut parts = text.splitn(3, '+');
        let (Some(name), Some(id), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(KeyError::Verifier("it needs two plus signs"));
        };
        if !valid_name(name) {
            return Err(KeyError::Name(name.to_owned()));
        }
        let bytes = BASE64.decode(key).map_err(|_| KeyError::Verifier("the key is not base64"))?;
        let (kind, public) = match bytes.split_first() {
            Some((1, public)) => (KeyType::Log, public),
            Some((4, public)) => (KeyType::Witness, public),
            _ => return Err(KeyError::Verifier("the key's type is neither 1 (Ed25519) nor 4 (Ed25519 cosignature)")),
        };
        let public = public.try_into().map_err(|_| KeyError::Verifier("the key is not 32 bytes long"))?;
        let key = Self { name: name.to_owned(), kind, public };
        if hex::encode(key.id()) != id {
            return Err(KeyError::Verifier("the ID is not that of this name and key"));
        }
        Ok(key)
    }
}

/// The head of a log, which is the text of a note.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The log's origin.
    pub origin: String,
    /// The number of records in the log.
    pub size: u64,
    /// The log's root.
    pub root: Hash,
}

impl Checkpoint {
    /// Parses the text of a note.
    ///
    /// # Errors
    /// Returns an error if the text is not exactly origin, size and root, each on a line of its own.
    pub fn parse(text: &str) -> Result<Self, NoteError> {
        let body = text.strip_suffix('\n').ok_or(NoteError::Checkpoint("it does not end with a newline"))?;
        let mut lines = body.split('\n');
        let (Some(origin), Some(size), Some(root), None) = (lines.next(), lines.next(), lines.next(), lines.next())
        else {
            return Err(NoteError::Checkpoint("expected three lines: origin, size and root"));
        };
        if origin.is_empty() || origin.chars().any(char::is_control) {
            return Err(NoteError::Checkpoint("the origin is empty or has control characters"));
        }
        let size = size
            .parse::<u64>()
            .ok()
            .filter(|n| n.to_string() == size)
            .ok_or(NoteError::Checkpoint("the size is not a decimal number without leading zeros"))?;
        let root = BASE64
            .decode(root)
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or(NoteError::Checkpoint("the root is not the base64 of 32 bytes"))?;
        Ok(Self { origin: origin.to_owned(), size, root })
    }

    /// Returns the root in base64, as it is written in notes and in status.
    pub fn root_base64(&self) -> String {
        BASE64.encode(self.root)
    }
}

impl fmt::Display for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}\n{}\n", self.origin, self.size, self.root_base64())
    }
}

/// One signature line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// The key's name.
    pub name: String,
    /// The key's ID.
    pub id: [u8; 4],
    /// The bytes after the ID: the signature of a log key, or the time and the signature of a witness.
    pub bytes: Vec<u8>,
}

impl Signature {
    /// Returns whether the line claims to be by that key.
    pub fn claims(&self, key: &VerifierKey) -> bool {
        self.name == key.name && self.id == key.id()
    }
}

/// A text and the signatures on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// The text, with its final newline.
    pub text: String,
    /// The signatures, in the order of their lines.
    pub signatures: Vec<Signature>,
}

impl Note {
    /// Parses a note. The note may have no signatures yet, while those of C2SP have at least one.
    ///
    /// # Errors
    /// Returns an error if the text does not have the form of a signed note, byte for byte.
    pub fn parse(note: &str) -> Result<Self, NoteError> {
        if note.chars().any(|c| c < ' ' && c != '\n') {
            return Err(NoteError::Syntax("it has control characters"));
        }
        let split =
            note.rfind("\n\n").ok_or(NoteError::Syntax("expected an empty line between text and signatures"))?;
        let (text, lines) = note.split_at_checked(split + 1).ok_or(NoteError::Syntax("it is not text"))?;
        let mut signatures = Vec::new();
        for line in lines.strip_prefix('\n').unwrap_or_default().split_inclusive('\n') {
            if signatures.len() == MAX_SIGNATURES {
                return Err(NoteError::Syntax("it has more than 16 signatures"));
            }
            let line = line.strip_suffix('\n').ok_or(NoteError::Syntax("its last line has no newline"))?;
            let (name, signature) = line
                .strip_prefix(SIGNATURE_START)
                .and_then(|l| l.split_once(' '))
                .ok_or(NoteError::Syntax("a signature line is not `\u{2014} <name> <base64>`"))?;
            if !valid_name(name) {
                return Err(NoteError::Syntax("a signature's key name is empty or has spaces or plus signs"));
            }
            let bytes = BASE64.decode(signature).map_err(|_| NoteError::Syntax("a signature is not base64"))?;
            match bytes.split_first_chunk::<4>() {
                Some((id, rest)) if !rest.is_empty() => {
                    signatures.push(Signature { name: name.to_owned(), id: *id, bytes: rest.to_vec() });
                }
                _ => return Err(NoteError::Syntax("a signature is shorter than five bytes")),
            }
        }
        Ok(Self { text: text.to_owned(), signatures })
    }

    /// Returns the checkpoint as a note without signatures. The gateway's own segments start from it, because they carry the witness's
    /// cosignature alone.
    pub fn unsigned(checkpoint: &Checkpoint) -> Self {
        Self { text: checkpoint.to_string(), signatures: Vec::new() }
    }

    /// Returns the checkpoint with a log's signature (type 1, whatever the signer's name).
    pub fn sign(checkpoint: &Checkpoint, signer: &Signer) -> Self {
        let mut note = Self::unsigned(checkpoint);
        note.signatures.push(signer.signature(KeyType::Log, None, &note.text));
        note
    }

    /// Adds the witness's cosignature as of `unix_time` (seconds), in place of an earlier one by the same key.
    pub fn cosign(&mut self, witness: &Signer, unix_time: u64) {
        let signature = witness.signature(KeyType::Witness, Some(unix_time), &cosigned_text(unix_time, &self.text));
        self.signatures.retain(|s| s.name != signature.name || s.id != signature.id);
        self.signatures.push(signature);
    }

    /// Checks the log key's signature on the text.
    ///
    /// # Errors
    /// Returns an error if there is no signature by that key, or one that does not verify.
    pub fn verify(&self, key: &VerifierKey) -> Result<(), NoteError> {
        if key.is_witness() {
            return Err(NoteError::KeyType { expected: "a log's key (type 1)", name: key.to_string() });
        }
        for signature in self.by(key)? {
            if !key.made(self.text.as_bytes(), &signature.bytes) {
                return Err(NoteError::Forged(key.name.clone()));
            }
        }
        Ok(())
    }

    /// Checks the witness's cosignature and returns its time, in seconds since 1970. If there are several by the same key, returns the
    /// earliest time.
    ///
    /// # Errors
    /// Returns an error if there is no signature by that key, or one that does not verify.
    pub fn verify_cosignature(&self, key: &VerifierKey) -> Result<u64, NoteError> {
        if !key.is_witness() {
            return Err(NoteError::KeyType { expected: "a witness's key (type 4)", name: key.to_string() });
        }
        let mut earliest = u64::MAX;
        for signature in self.by(key)? {
            let forged = || NoteError::Forged(key.name.clone());
            let (time, bytes) = signature.bytes.split_first_chunk::<8>().ok_or_else(forged)?;
            let time = u64::from_be_bytes(*time);
            if i64::try_from(time).is_err() || !key.made(cosigned_text(time, &self.text).as_bytes(), bytes) {
                return Err(forged());
            }
            earliest = earliest.min(time);
        }
        Ok(earliest)
    }

    /// Returns the checkpoint in the text. Does not check who signed it.
    ///
    /// # Errors
    /// Returns an error if the text is not a checkpoint.
    pub fn checkpoint(&self) -> Result<Checkpoint, NoteError> {
        Checkpoint::parse(&self.text)
    }

    /// Returns the signatures that claim to be by that key, at least one.
    fn by(&self, key: &VerifierKey) -> Result<Vec<&Signature>, NoteError> {
        let found: Vec<_> = self.signatures.iter().filter(|s| s.claims(key)).collect();
        if found.is_empty() {
            let others: Vec<_> = self.signatures.iter().map(|s| format!("{}+{}", s.name, hex::encode(s.id))).collect();
            return Err(NoteError::Missing { name: key.name.clone(), id: key.id(), found: others.join(", ") });
        }
        Ok(found)
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.text)?;
        for Signature { name, id, bytes } in &self.signatures {
            let line = [id.as_slice(), bytes].concat();
            writeln!(f, "{SIGNATURE_START}{name} {}", BASE64.encode(line))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
