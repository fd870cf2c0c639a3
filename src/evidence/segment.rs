//! The unit of storage: some records, and the checkpoint over the log up to the last of them.
//!
//! A segment is text: a line `{"checkpoint":"<signed note>"}`, then one record a line, each line canonical JSON (RFC 8785)
//! that ends with a newline.
//!
//! Promises: `Segment::parse` accepts exactly the bytes that `Segment::to_bytes` writes, so that a segment has one
//! form and no byte of it goes unchecked; a canonical form also has no duplicate keys. Refuses: judging signatures and
//! meaning, which is the gateway's and the verifier's.

use serde_json::Value;

use super::{
    merkle::{self, Tree},
    note::{Checkpoint, Note, NoteError},
    record::Record,
};
use crate::canonical;

/// Where a log's segments lie, under the log's prefix.
pub const FOLDER: &str = "segments/";
/// How a segment's key ends.
const SUFFIX: &str = ".jsonl";

/// A segment that cannot be read, or does not extend the log.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// A line that is not what it must be. Lines count from 1.
    #[error("line {line}: {problem}")]
    Line {
        /// The line.
        line: usize,
        /// What was expected and found.
        problem: String,
    },
    /// The checkpoint's note cannot be read.
    #[error("line 1: {0}")]
    Note(#[from] NoteError),
    /// The records do not start where the log ends.
    #[error("expected the segment to start at record {expected}, found {found}")]
    Position {
        /// The log's size.
        expected: u64,
        /// The segment's first record.
        found: u64,
    },
    /// The checkpoint is not that of these records.
    #[error("line 1: expected a checkpoint of {} records with root {}, found one of {} with {}", .expected.size, .expected.root_base64(), .found.size, .found.root_base64())]
    Checkpoint {
        /// What the records add up to.
        expected: Box<Checkpoint>,
        /// What the segment says.
        found: Box<Checkpoint>,
    },
}

impl SegmentError {
    /// The line that is wrong, where one line is to blame.
    pub fn line(&self) -> Option<usize> {
        match self {
            Self::Line { line, .. } => Some(*line),
            Self::Note(_) | Self::Checkpoint { .. } => Some(1),
            Self::Position { .. } => None,
        }
    }
}

/// Some records and the checkpoint after the last of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The signed checkpoint.
    pub note: Note,
    /// Sequence number of the first record.
    pub first: u64,
    /// The canonical bytes of each record, without newline.
    pub records: Vec<Vec<u8>>,
}

impl Segment {
    /// Reads a segment: form, canonical bytes and unbroken sequence numbers.
    ///
    /// # Errors
    /// Names the first line that is wrong.
    pub fn parse(text: &[u8]) -> Result<Self, SegmentError> {
        let each = |number, line| {
            let (bytes, value) = canonical_line(number, line)?;
            let seq = value.get("seq").and_then(Value::as_u64);
            Ok((bytes, seq.ok_or_else(|| broken(number, "expected a number `seq`"))?, ()))
        };
        Self::lines(text, each).map(|(segment, _)| segment)
    }

    /// Reads a segment with its records, typed, in one go.
    ///
    /// # Errors
    /// As [`Segment::parse`] and [`Segment::decode`].
    pub fn read(text: &[u8]) -> Result<(Self, Vec<Record>), SegmentError> {
        let each = |number, line| {
            let bytes = whole_line(number, line)?;
            // What a record's own canonical form is equal to is canonical.
            let record = decode(bytes).map_err(|problem| broken(number, problem))?;
            Ok((bytes, record.seq, record))
        };
        Self::lines(text, each)
    }

    /// Reads a segment; `each` reads a line: its bytes without newline, its sequence number, and what else it is.
    fn lines<'t, T>(
        text: &'t [u8],
        each: impl Fn(usize, &'t [u8]) -> Result<(&'t [u8], u64, T), SegmentError>,
    ) -> Result<(Self, Vec<T>), SegmentError> {
        let mut lines = text.split_inclusive(|b| *b == b'\n').enumerate().map(|(i, line)| (i + 1, line));
        let (number, header) = lines.next().ok_or_else(|| broken(1, "expected a checkpoint, found nothing"))?;
        let note = match canonical_line(number, header)?.1 {
            Value::Object(fields) if fields.len() == 1 => match fields.get("checkpoint") {
                Some(Value::String(note)) => Note::parse(note)?,
                _ => return Err(broken(number, "expected the one key `checkpoint` with a signed note")),
            },
            _ => return Err(broken(number, "expected an object with the one key `checkpoint`")),
        };
        let mut first = None;
        let (mut records, mut typed) = (Vec::new(), Vec::new());
        let mut expected = None::<u64>;
        for (number, line) in lines {
            let (bytes, seq, one) = each(number, line)?;
            if let Some(expected) = expected.filter(|n| *n != seq) {
                return Err(broken(number, format!("expected seq {expected}, found {seq}")));
            }
            first.get_or_insert(seq);
            expected = Some(seq.checked_add(1).ok_or_else(|| broken(number, "seq is too large"))?);
            records.push(bytes.to_vec());
            typed.push(one);
        }
        let first = first.ok_or_else(|| broken(2, "expected at least one record, found none"))?;
        Ok((Self { note, first, records }, typed))
    }

    /// Records in the log after it.
    pub fn end(&self) -> u64 {
        self.first.saturating_add(u64::try_from(self.records.len()).unwrap_or(u64::MAX))
    }

    /// Whether the records of another segment are among this one's, at their place.
    pub fn holds(&self, other: &Self) -> bool {
        let from = other.first.checked_sub(self.first).and_then(|from| usize::try_from(from).ok());
        let there = from.and_then(|from| self.records.get(from..)?.get(..other.records.len()));
        there == Some(other.records.as_slice())
    }

    /// The segment's text: what [`Segment::parse`] reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        // A JSON object of one string always has a canonical form: RFC 8785 writes strings as `serde_json` does.
        let header = serde_json::json!({ "checkpoint": self.note.to_string() }).to_string();
        let mut text = header.into_bytes();
        text.push(b'\n');
        for record in &self.records {
            text.extend_from_slice(record);
            text.push(b'\n');
        }
        text
    }

    /// The records, typed.
    ///
    /// # Errors
    /// If one is not a record of this version, whole: a field that [`Record`] does not have is refused.
    pub fn decode(&self) -> Result<Vec<Record>, SegmentError> {
        self.records
            .iter()
            .enumerate()
            .map(|(i, bytes)| decode(bytes).map_err(|problem| broken(i + 2, problem)))
            .collect()
    }

    /// The log's tree with this segment's records at its end.
    ///
    /// # Errors
    /// If the segment does not start where `tree` ends, or its checkpoint's size or root is not that of the result.
    pub fn extend(&self, tree: &Tree) -> Result<Tree, SegmentError> {
        if self.first != tree.size() {
            return Err(SegmentError::Position { expected: tree.size(), found: self.first });
        }
        let mut tree = tree.clone();
        self.records.iter().for_each(|record| tree.push(merkle::leaf_hash(record)));
        let found = self.note.checkpoint()?;
        let expected = Checkpoint { origin: found.origin.clone(), size: tree.size(), root: tree.root() };
        if found != expected {
            return Err(SegmentError::Checkpoint { expected: Box::new(expected), found: Box::new(found) });
        }
        Ok(tree)
    }

    /// Where the segment lies under the log's prefix: `segments/0000000000.jsonl`.
    pub fn key(first: u64) -> String {
        format!("{FOLDER}{first:010}{SUFFIX}")
    }

    /// The first sequence number in a key that [`Segment::key`] made.
    pub fn first_of(key: &str) -> Option<u64> {
        let first = key.strip_prefix(FOLDER)?.strip_suffix(SUFFIX)?.parse().ok()?;
        (Self::key(first) == key).then_some(first)
    }
}

/// One record.
fn decode(bytes: &[u8]) -> Result<Record, String> {
    let record: Record = serde_json::from_slice(bytes).map_err(|e| format!("not a record: {e}"))?;
    match canonical::to_bytes(&record) {
        Ok(again) if again == bytes => Ok(record),
        Ok(_) => Err(format!("the record has fields or values that version {} does not have", super::record::VERSION)),
        Err(e) => Err(e.to_string()),
    }
}

/// A line's bytes without newline.
fn whole_line(number: usize, line: &[u8]) -> Result<&[u8], SegmentError> {
    line.strip_suffix(b"\n").ok_or_else(|| broken(number, "expected a newline at its end; the segment is cut off"))
}

/// A line's bytes without newline, and its value.
fn canonical_line(number: usize, line: &[u8]) -> Result<(&[u8], Value), SegmentError> {
    let bytes = whole_line(number, line)?;
    let value: Value = serde_json::from_slice(bytes).map_err(|e| broken(number, format!("not JSON: {e}")))?;
    match canonical::to_bytes(&value) {
        Ok(again) if again == bytes => Ok((bytes, value)),
        _ => Err(broken(
            number,
            "not canonical JSON (RFC 8785): keys out of order or twice, spaces, or another way to write the same",
        )),
    }
}

fn broken(line: usize, problem: impl Into<String>) -> SegmentError {
    SegmentError::Line { line, problem: problem.into() }
}

#[cfg(test)]
mod tests;
