//! The unit of storage: some records, and the checkpoint over the log up to the last of them.
//!
//! A segment is text. Its first line is `{"checkpoint":"<signed note>"}`. After it there is one record per line. Each line is canonical
//! JSON (RFC 8785) and ends with a newline. If records name documents, the first line has their digests as `"documents":["<SHA-256,
//! hex>",…]`, and the documents are the lines between the first line and the records, one per line.
//!
//! Guarantees: `Segment::parse` accepts exactly the bytes that `Segment::to_bytes` writes. So a segment has only one form, and every byte
//! of it is checked. The canonical form also excludes duplicate keys.
//! Non-goals: checking signatures and meaning, which the gateway and the verifier do.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    merkle::{self, Tree},
    note::{Checkpoint, Note, NoteError},
    record::{Encoded, Record, Unread},
};
use crate::canonical;

/// The folder of a log's segments under the log's prefix.
pub const FOLDER: &str = "segments/";
/// The maximum number of levels to which a line is nested. Readers have different limits of their own.
const DEEPEST: usize = 100;
/// The end of a segment's key.
const SUFFIX: &str = ".jsonl";

/// A segment that cannot be read, or does not extend the log.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// A line is not what it must be. Lines count from 1.
    #[error("line {line}: {problem}")]
    Line {
        /// The line.
        line: usize,
        /// The record in this line, by its index in the segment.
        record: Option<usize>,
        /// What was expected and found.
        problem: String,
    },
    /// A later version may be able to read this record.
    #[error("line {line}: {problem}")]
    Newer {
        /// The line, from 1.
        line: usize,
        /// The record in this line, by its index in the segment.
        record: usize,
        /// What this version does not know.
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
    /// The checkpoint does not match the records.
    #[error("line 1: expected a checkpoint of {} records with root {}, found one of {} with {}", .expected.size, .expected.root_base64(), .found.size, .found.root_base64())]
    Checkpoint {
        /// The checkpoint that follows from the records.
        expected: Box<Checkpoint>,
        /// The checkpoint in the segment.
        found: Box<Checkpoint>,
    },
}

impl SegmentError {
    /// Returns the wrong record, by its index in the segment, if the error is about one record.
    pub fn record(&self) -> Option<usize> {
        match self {
            Self::Line { record, .. } => *record,
            Self::Newer { record, .. } => Some(*record),
            Self::Note(_) | Self::Checkpoint { .. } | Self::Position { .. } => None,
        }
    }
}

/// Some records and the checkpoint after the last of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The signed checkpoint.
    pub note: Note,
    /// The sequence number of the first record.
    pub first: u64,
    /// The canonical bytes of each document, in the order in which the records name them.
    pub documents: Vec<Vec<u8>>,
    /// The canonical bytes of each record, without newline.
    pub records: Vec<Vec<u8>>,
}

impl Segment {
    /// Returns a segment of these records, which start at `first`.
    pub fn new(note: Note, first: u64, entries: Vec<Encoded>) -> Self {
        let mut segment = Self { note, first, documents: Vec::new(), records: Vec::new() };
        for entry in entries {
            segment.documents.extend(entry.documents);
            segment.records.push(entry.record);
        }
        segment
    }

    /// Reads a segment. Checks its form, canonical bytes, digests of documents, and unbroken sequence numbers.
    ///
    /// # Errors
    /// Returns an error that names the first wrong line.
    pub fn parse(text: &[u8]) -> Result<Self, SegmentError> {
        let (mut segment, lines) = Self::head(text)?;
        segment.fill(lines, |line, _| {
            let (bytes, value) = canonical_line(line)?;
            let seq = value.get("seq").and_then(Value::as_u64);
            let seq = seq.ok_or_else(|| "expected a number `seq`".to_owned())?;
            Ok((bytes, seq, ()))
        })?;
        Ok(segment)
    }

    /// Reads a segment and decodes its records in one pass.
    ///
    /// # Errors
    /// Returns the errors of [`Segment::parse`] and [`Segment::decode`].
    pub fn read(text: &[u8]) -> Result<(Self, Vec<Record>), SegmentError> {
        let (mut segment, lines) = Self::head(text)?;
        let records = segment.fill(lines, |line, documents| {
            let bytes = whole_line(line)?;
            // A line that equals the canonical form of its record is canonical.
            let record = Record::decode(bytes, documents)?;
            Ok((bytes, record.seq, record))
        })?;
        let named: usize = records.iter().map(Record::documents).sum();
        segment.all_named(named)?;
        Ok((segment, records))
    }

    /// Reads the checkpoint and the documents. Returns them and the remaining lines, numbered from 1.
    fn head(text: &[u8]) -> Result<(Self, impl Iterator<Item = (usize, &[u8])>), SegmentError> {
        let mut lines = text.split_inclusive(|b| *b == b'\n').enumerate().map(|(i, line)| (i + 1, line));
        let (number, header) = lines.next().ok_or_else(|| broken(1, "expected a checkpoint, found nothing"))?;
        let header = canonical_line(header).map_err(|problem| broken(number, problem))?.1;
        let header: Header = serde_json::from_value(header).map_err(|error| {
            broken(
                number,
                format!("expected an object with a signed note as `checkpoint`, and perhaps `documents`: {error}"),
            )
        })?;
        let note = Note::parse(&header.checkpoint)?;
        if header.documents.as_ref().is_some_and(Vec::is_empty) {
            return Err(broken(number, "expected `documents` to be absent or not empty, found an empty list"));
        }
        let mut documents = Vec::new();
        for expected in header.documents.into_iter().flatten() {
            let missing = || broken(number, format!("expected the document {expected}, found none"));
            let (number, line) = lines.next().ok_or_else(missing)?;
            let (bytes, value) = canonical_line(line).map_err(|problem| broken(number, problem))?;
            if let Some(name) = reserved(&value) {
                return Err(broken(number, format!("expected names that every reader takes for such, found {name:?}")));
            }
            let found = hex::encode(canonical::sha256(bytes));
            if found != expected {
                return Err(broken(number, format!("expected the document {expected}, found {found}")));
            }
            documents.push(bytes.to_vec());
        }
        Ok((Self { note, first: 0, documents, records: Vec::new() }, lines))
    }

    /// Reads the records. `each` reads one line and may take documents that no earlier record named. It returns the line's bytes without
    /// the newline, its sequence number, and the decoded value.
    fn fill<'t, T>(
        &mut self,
        lines: impl Iterator<Item = (usize, &'t [u8])>,
        each: impl Fn(&'t [u8], &mut dyn Iterator<Item = &[u8]>) -> Result<(&'t [u8], u64, T), Unread>,
    ) -> Result<Vec<T>, SegmentError> {
        let mut typed = Vec::new();
        let mut expected = None::<u64>;
        let mut documents = self.documents.iter().map(Vec::as_slice);
        for (record, (line, text)) in lines.enumerate() {
            let wrong = |problem| SegmentError::Line { line, record: Some(record), problem };
            let (bytes, seq, one) = each(text, &mut documents).map_err(|unread| unreadable(line, record, unread))?;
            if let Some(expected) = expected.filter(|n| *n != seq) {
                return Err(wrong(format!("expected seq {expected}, found {seq}")));
            }
            if record == 0 {
                self.first = seq;
            }
            expected = Some(seq.checked_add(1).ok_or_else(|| wrong("seq is too large".to_owned()))?);
            self.records.push(bytes.to_vec());
            typed.push(one);
        }
        match expected {
            Some(_) => Ok(typed),
            None => Err(broken(self.documents.len() + 2, "expected at least one record, found none")),
        }
    }

    /// Returns the number of records in the log up to the end of this segment.
    pub fn end(&self) -> u64 {
        self.first.saturating_add(u64::try_from(self.records.len()).unwrap_or(u64::MAX))
    }

    /// Checks whether this segment has the records of another segment at their place.
    pub fn holds(&self, other: &Self) -> bool {
        let from = other.first.checked_sub(self.first).and_then(|from| usize::try_from(from).ok());
        let there = from.and_then(|from| self.records.get(from..)?.get(..other.records.len()));
        there == Some(other.records.as_slice())
    }

    /// Returns the segment's text, which [`Segment::parse`] reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        let documents = (!self.documents.is_empty())
            .then(|| self.documents.iter().map(|document| hex::encode(canonical::sha256(document))).collect());
        // These strings have a canonical form: RFC 8785 writes strings as `serde_json` does, and the keys are in order.
        let header = serde_json::json!(Header { checkpoint: self.note.to_string(), documents }).to_string();
        let mut text = header.into_bytes();
        text.push(b'\n');
        for line in self.documents.iter().chain(&self.records) {
            text.extend_from_slice(line);
            text.push(b'\n');
        }
        text
    }

    /// Decodes the records.
    ///
    /// # Errors
    /// Returns an error if a line is not a complete record of this version with its documents (see [`Record::decode`]), or if there is a
    /// document that no record names.
    pub fn decode(&self) -> Result<Vec<Record>, SegmentError> {
        let mut documents = self.documents.iter().map(Vec::as_slice);
        let decode = |(record, bytes): (usize, &Vec<u8>)| {
            let line = self.documents.len() + 2 + record;
            Record::decode(bytes, &mut documents).map_err(|unread| unreadable(line, record, unread))
        };
        let records = self.records.iter().enumerate().map(decode).collect::<Result<Vec<_>, _>>()?;
        self.all_named(records.iter().map(Record::documents).sum())?;
        Ok(records)
    }

    /// Returns the first record that says itself that it is of a later version, or else the first document of the first record whose form
    /// this version does not know. Such a record or document makes the segment one of a later version, whatever its other records are.
    pub fn newer(&self) -> Option<SegmentError> {
        let newer = |record: usize, bytes: &Vec<u8>| {
            Some(unreadable(self.documents.len() + 2 + record, record, Record::newer(bytes)?))
        };
        let first = self.records.first()?;
        let unknown = |place: usize, document: &Vec<u8>| {
            Some(unreadable(place + 2, 0, Record::newer_document(first, place, document)?))
        };
        let mut records = self.records.iter().enumerate();
        let mut documents = self.documents.iter().enumerate();
        records
            .find_map(|(record, bytes)| newer(record, bytes))
            .or_else(|| documents.find_map(|(place, document)| unknown(place, document)))
    }

    /// Checks that there are no more documents than the records have named.
    fn all_named(&self, named: usize) -> Result<(), SegmentError> {
        let Some(document) = self.documents.get(named) else { return Ok(()) };
        let digest = hex::encode(canonical::sha256(document));
        Err(broken(named + 2, format!("expected a document that a record names, found {digest}")))
    }

    /// Returns the log's tree with this segment's records at its end.
    ///
    /// # Errors
    /// Returns an error if the segment does not start where `tree` ends, or if its checkpoint does not have the size and root of the
    /// result.
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

    /// Returns the key of a segment under the log's prefix, such as `segments/0000000000.jsonl`.
    pub fn key(first: u64) -> String {
        format!("{FOLDER}{first:010}{SUFFIX}")
    }

    /// Returns the first sequence number of a segment from a key that [`Segment::key`] made.
    pub fn first_of(key: &str) -> Option<u64> {
        let first = key.strip_prefix(FOLDER)?.strip_suffix(SUFFIX)?.parse().ok()?;
        (Self::key(first) == key).then_some(first)
    }
}

/// The first line of a segment.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    checkpoint: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    documents: Option<Vec<String>>,
}

/// Returns a line's bytes without the newline.
fn whole_line(line: &[u8]) -> Result<&[u8], String> {
    line.strip_suffix(b"\n").ok_or_else(|| "expected a newline at its end; the segment is cut off".to_owned())
}

/// Returns how deep lists and objects are nested in JSON.
fn levels(json: &[u8]) -> usize {
    let (mut level, mut deepest, mut text, mut escaped) = (0_usize, 0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = text,
            b'"' => text = !text,
            b'[' | b'{' if !text => {
                level = level.saturating_add(1);
                deepest = deepest.max(level);
            }
            b']' | b'}' if !text => level = level.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Returns a line's bytes without the newline, and its value.
fn canonical_line(line: &[u8]) -> Result<(&[u8], Value), String> {
    let bytes = whole_line(line)?;
    let levels = levels(bytes);
    if levels > DEEPEST {
        return Err(format!("expected at most {DEEPEST} levels, found {levels}"));
    }
    let value: Value = serde_json::from_slice(bytes).map_err(|e| format!("not JSON: {e}"))?;
    match canonical::to_bytes(&value) {
        Ok(again) if again == bytes => Ok((bytes, value)),
        _ => Err("not canonical JSON (RFC 8785): keys out of order or twice, spaces, or another way to write the same"
            .to_owned()),
    }
}

/// Returns a name that has a special meaning for `serde_json` if it comes first in its object.
fn reserved(value: &Value) -> Option<&str> {
    match value {
        Value::Object(members) => members.iter().find_map(|(name, value)| match name.starts_with("$serde_json::") {
            true => Some(name.as_str()),
            false => reserved(value),
        }),
        Value::Array(items) => items.iter().find_map(reserved),
        _ => None,
    }
}

/// Returns the error for a line with a record.
fn unreadable(line: usize, record: usize, unread: Unread) -> SegmentError {
    match unread {
        Unread::Wrong(problem) => SegmentError::Line { line, record: Some(record), problem },
        Unread::Newer(problem) => SegmentError::Newer { line, record, problem },
    }
}

/// Returns the error for a line without a record.
fn broken(line: usize, problem: impl Into<String>) -> SegmentError {
    SegmentError::Line { line, record: None, problem: problem.into() }
}

#[cfg(test)]
mod tests;
