//! Proves that a single record is in a log, with a C2SP tlog-proof.
//!
//! Guarantees: [`Proof::record`] returns a record only if the witness signed a log that has the record at that index.
//! Non-goals: statements about the records around it. They need a verification of the whole log.

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};

use super::{
    merkle::{self, Hash, leaf_hash},
    note::{Checkpoint, Note, NoteError, VerifierKey},
};

/// The first line of a proof.
const VERSION: &str = "c2sp.org/tlog-proof@v1";

/// A proof that cannot be read or does not hold.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// The text is not a proof.
    #[error("expected a C2SP tlog-proof: {0}")]
    Form(&'static str),
    /// The proof's checkpoint does not hold.
    #[error("its checkpoint: {0}")]
    Note(#[from] NoteError),
    /// The record is not at the index that the proof names.
    #[error("expected the record at {index} of {size} to lead to the root {root}, found that it does not")]
    Inclusion {
        /// The index of the record.
        index: u64,
        /// The number of records in the log.
        size: u64,
        /// The checkpoint's root.
        root: String,
    },
}

/// A record, the hashes that lead from the record to a root, and the checkpoint with that root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// The record's bytes, which are the extra data of the format.
    record: Vec<u8>,
    index: u64,
    hashes: Vec<Hash>,
    checkpoint: Note,
}

/// A record with a proof that holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proven {
    /// The record's bytes.
    pub record: Vec<u8>,
    /// The record's index in the log.
    pub index: u64,
    /// The head of the log.
    pub head: Checkpoint,
    /// When the witness signed the head, in seconds since 1970.
    pub witnessed: u64,
}

impl Proof {
    /// Returns the proof of the record with this index. `records` are all records of the log in order, and `checkpoint` is the log's last
    /// note. `None` if the log has no such record.
    pub fn of(records: &[Vec<u8>], index: u64, checkpoint: Note) -> Option<Self> {
        let at = usize::try_from(index).ok()?;
        let leaves: Vec<Hash> = records.iter().map(|record| leaf_hash(record)).collect();
        let hashes = merkle::inclusion_proof(&leaves, at)?;
        Some(Self { record: records.get(at)?.clone(), index, hashes, checkpoint })
    }

    /// Returns the record if the witness with this key signed a log that has it.
    ///
    /// # Errors
    /// Returns what does not hold.
    pub fn record(self, witness: &VerifierKey) -> Result<Proven, ProofError> {
        let witnessed = self.checkpoint.verify_cosignature(witness)?;
        let head = self.checkpoint.checkpoint()?;
        if !merkle::verify_inclusion(leaf_hash(&self.record), self.index, head.size, &self.hashes, &head.root) {
            return Err(ProofError::Inclusion { index: self.index, size: head.size, root: head.root_base64() });
        }
        Ok(Proven { record: self.record, index: self.index, head, witnessed })
    }
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{VERSION}\nextra {}\nindex {}", BASE64.encode(&self.record), self.index)?;
        self.hashes.iter().try_for_each(|hash| writeln!(f, "{}", BASE64.encode(hash)))?;
        write!(f, "\n{}", self.checkpoint)
    }
}

impl FromStr for Proof {
    type Err = ProofError;

    fn from_str(text: &str) -> Result<Self, ProofError> {
        let (head, checkpoint) = text.split_once("\n\n").ok_or(ProofError::Form("it has no checkpoint"))?;
        let mut lines = head.split('\n');
        if lines.next() != Some(VERSION) {
            return Err(ProofError::Form("its first line is not `c2sp.org/tlog-proof@v1`"));
        }
        let mut named = |name: &str| lines.next().and_then(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let record = named("extra").and_then(|extra| BASE64.decode(extra).ok());
        let record = record.ok_or(ProofError::Form("its second line is not `extra` and the record"))?;
        let index = named("index").and_then(|index| index.parse().ok());
        let index = index.ok_or(ProofError::Form("its third line is not `index` and a number"))?;
        let hash = |line| BASE64.decode(line).ok().and_then(|hash| hash.try_into().ok());
        let hashes =
            lines.map(hash).collect::<Option<_>>().ok_or(ProofError::Form("expected hashes after the index"))?;
        let proof = Self { record, index, hashes, checkpoint: Note::parse(checkpoint)? };
        if proof.to_string() != text {
            return Err(ProofError::Form("it is not in its one form"));
        }
        Ok(proof)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::evidence::{
        merkle::Tree,
        note::{Signer, WITNESS_NAME},
    };

    fn log(count: usize) -> (Vec<Vec<u8>>, Note, VerifierKey) {
        let records: Vec<_> = (0..count).map(|n| format!("record {n}").into_bytes()).collect();
        let tree: Tree = records.iter().map(|record| leaf_hash(record)).collect();
        let head = Checkpoint { origin: "belay.dev/task/u".into(), size: tree.size(), root: tree.root() };
        let (mut note, witness) = (Note::unsigned(&head), Signer::generate(WITNESS_NAME).unwrap());
        note.cosign(&witness, 7);
        (records, note, witness.verifier())
    }

    proptest! {
        #[test]
        fn each_record_is_proven_and_no_changed_one(count in 1..40_usize, at in any::<prop::sample::Index>(), change in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let (records, note, witness) = log(count);
            let at = at.index(count);
            let text = Proof::of(&records, at as u64, note.clone()).unwrap().to_string();
            let proven = text.parse::<Proof>().unwrap().record(&witness).unwrap();
            prop_assert_eq!((proven.record, proven.index, proven.witnessed), (records[at].clone(), at as u64, 7));
            prop_assert!(Proof::of(&records, count as u64, note).is_none());

            let mut bytes = text.clone().into_bytes();
            let change = change.index(bytes.len());
            bytes[change] = byte;
            let changed = String::from_utf8(bytes).ok().filter(|changed| *changed != text);
            let changed = changed.and_then(|changed| changed.parse::<Proof>().ok());
            prop_assert!(changed.is_none_or(|changed| changed.record(&witness).is_err()));
        }
    }
}
