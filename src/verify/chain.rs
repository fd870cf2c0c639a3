//! Verifies the way from bytes to records: segments, tree, checkpoints and signatures.
//!
//! A segment with a wrong place or wrong content ends the walk, because nothing after it can be checked. An invalid signature does not end
//! the walk, so that one wrong key is reported as exactly that.

use std::collections::BTreeSet;

use super::{
    Expected,
    history::History,
    report::{Check, Report},
    storage,
};
use crate::{
    canonical,
    evidence::{
        dsse::Envelope,
        ending::{Ending, PAYLOAD_TYPE, SUMMARY},
        log::Log,
        merkle::Tree,
        note::{Checkpoint, NoteError, VerifierKey},
        record::{Actor, EncodeError, Event},
        segment::{Segment, SegmentError},
        tiles::File,
    },
};

/// Why the walk cannot continue.
struct SegmentProblem {
    rule: Check,
    record: Option<u64>,
    message: String,
}

/// A verification in progress: the results of the segments so far. [`verify`](super::verify) does a whole verification at once. For logs
/// with the same beginning, a caller verifies the beginning once and each rest from a clone.
#[derive(Clone)]
pub struct Walk {
    witness: VerifierKey,
    expected: Expected,
    report: Report,
    /// Whether the walk has reached every segment so far.
    whole: bool,
    /// Whether the rest of the log is of a later version and is not checked.
    newer: bool,
    tree: Tree,
    head: Option<Checkpoint>,
    history: History,
    ending: Ending,
    /// The files that follow from the records and that later records cannot change.
    files: Vec<File>,
}

impl Walk {
    /// Returns a walk at the beginning of a log.
    pub fn new(witness: &VerifierKey, expected: &Expected) -> Self {
        let mut report = Report::default();
        report.summary.self_witnessed = witness.is_self_witness();
        Self {
            witness: witness.clone(),
            expected: expected.clone(),
            report,
            whole: true,
            newer: false,
            tree: Tree::new(),
            head: None,
            history: History::default(),
            ending: Ending::default(),
            files: Vec::new(),
        }
    }

    /// Switches one rule off.
    #[cfg(test)]
    pub(crate) fn switch_off(&mut self, rule: crate::evidence::state::LogRule) {
        self.history.switch_off(rule);
    }

    /// Checks the object under the next key. The walk ignores an object whose key is not the key of a segment.
    pub fn segment(&mut self, key: &str, bytes: &[u8]) {
        if !self.whole || Segment::first_of(key).is_none() {
            return;
        }
        if let Err(SegmentProblem { rule, record, message }) = self.extend(key, bytes) {
            self.report.add(rule, Some(key), record, message);
            self.whole = false;
        }
    }

    /// Returns the report once all segments of the log have been checked.
    pub fn finish(mut self, log: &Log) -> Report {
        self.history.finish(self.whole, &mut self.report);
        self.report.summary.records = self.tree.size();
        self.report.summary.root = self.head.as_ref().map(Checkpoint::root_base64);
        if self.whole {
            self.end();
            ended(log, &self.witness, (self.ending, self.files), &mut self.report);
        }
        storage::check(log, self.newer, &mut self.report);
        self.report
    }

    /// Checks that the log has an end, and that it is the expected one.
    fn end(&mut self) {
        if self.head.is_none() {
            self.report.add(Check::LogEmpty, None, None, "expected at least one segment, found none");
        }
        if let Expected::Head(head) = &self.expected
            && self.head.as_ref() != Some(head)
        {
            let found = self.head.as_ref().map_or_else(
                || "none".to_owned(),
                |found| format!("{} records and root {}", found.size, found.root_base64()),
            );
            let (size, root) = (head.size, head.root_base64());
            let message = format!(
                "expected the head that the task's status names, {size} records and root {root}, found {found}"
            );
            self.report.add(Check::LogHead, None, None, message);
        }
    }

    fn extend(&mut self, key: &str, bytes: &[u8]) -> Result<(), SegmentProblem> {
        let next = self.tree.size();
        let form = |rule, e: &SegmentError| {
            let record = e.record().and_then(|n| u64::try_from(n).ok());
            SegmentProblem { rule, record: record.map(|n| next.saturating_add(n)), message: e.to_string() }
        };
        // A valid segment is read in one pass, any other step by step. The findings do not depend on the way of reading.
        let (segment, records) = match Segment::read(bytes) {
            Ok((segment, records)) => (segment, Ok(records)),
            Err(_) => {
                let segment = Segment::parse(bytes).map_err(|e| form(Check::SegmentForm, &e))?;
                let records = segment.newer().map_or_else(|| segment.decode(), Err);
                (segment, records)
            }
        };
        if Segment::key(segment.first) != key {
            let message = format!("expected {} for its first record, {}", Segment::key(segment.first), segment.first);
            return Err(SegmentProblem { rule: Check::SegmentKey, record: Some(segment.first), message });
        }
        let tree = segment.extend(&self.tree).map_err(|e| SegmentProblem {
            rule: match e {
                SegmentError::Position { .. } => Check::SegmentOrder,
                SegmentError::Checkpoint { .. } => Check::CheckpointRoot,
                SegmentError::Note(_) | SegmentError::Line { .. } | SegmentError::Newer { .. } => Check::SegmentForm,
            },
            record: Some(segment.first),
            message: e.to_string(),
        })?;
        let checkpoint = segment.note.checkpoint().map_err(|e| form(Check::SegmentForm, &e.into()))?;
        self.origin(&checkpoint, key);
        let records = records.map_err(|e| match e {
            // The witness signed the segment, so it is not a forgery. This verifier only cannot evaluate it.
            SegmentError::Newer { .. } => match segment.note.verify_cosignature(&self.witness) {
                Ok(_) => {
                    self.newer = true;
                    form(Check::RecordVersion, &e)
                }
                Err(unsigned) => form(Check::CheckpointWitness, &unsigned.into()),
            },
            _ => form(Check::RecordForm, &e),
        })?;

        let files = self.ending.take(&segment, &records);
        let long = |e: EncodeError| SegmentProblem { rule: Check::RecordForm, record: None, message: e.to_string() };
        self.files.extend(files.map_err(long)?);
        let writer = records.first().map(|r| (r.actor, r.attempt));
        let report = &mut self.report;
        for (place, record) in records.iter().enumerate() {
            // The key in `attempt.opened` signs the whole segment.
            if place > 0 && matches!(record.event, Event::AttemptOpened(_)) {
                let message = "expected attempt.opened as the first record of its segment, found records before it";
                report.add(Check::AttemptOpen, Some(key), Some(record.seq), message);
            }
            if writer.is_some_and(|(actor, _)| actor != record.actor) {
                report.add(
                    Check::RecordActor,
                    Some(key),
                    Some(record.seq),
                    "expected one writer in a segment, found two",
                );
            } else if writer.is_some_and(|(_, attempt)| attempt != record.attempt) {
                report.add(
                    Check::AttemptOrder,
                    Some(key),
                    Some(record.seq),
                    "expected one attempt in a segment, found two",
                );
            }
            self.history.record(record, &checkpoint.origin, key, report);
        }
        self.signatures(&segment, writer.map_or(Actor::Harness, |(actor, _)| actor), key);

        self.report.summary.segments += 1;
        self.tree = tree;
        self.head = Some(checkpoint);
        Ok(())
    }

    /// Checks that all checkpoints have one origin, the expected one.
    fn origin(&mut self, checkpoint: &Checkpoint, key: &str) {
        let expected = match (&self.head, &self.expected) {
            (Some(head), _) => Some(&head.origin),
            (None, Expected::Origin(origin)) => Some(origin),
            (None, Expected::Head(head)) => Some(&head.origin),
            (None, Expected::Anything) => None,
        };
        if let Some(expected) = expected.filter(|origin| **origin != checkpoint.origin) {
            let message = format!("expected a checkpoint of {expected}, found one of {}", checkpoint.origin);
            self.report.add(Check::CheckpointOrigin, Some(key), None, message);
        }
        self.report.summary.origin.get_or_insert_with(|| checkpoint.origin.clone());
    }

    /// Checks that the witness signed the checkpoint, that the attempt signed its own, and that no other key signed it.
    fn signatures(&mut self, segment: &Segment, writer: Actor, key: &str) {
        let report = &mut self.report;
        match segment.note.verify_cosignature(&self.witness) {
            Ok(time) => report.summary.witnessed = Some(time),
            Err(e) => report.add(Check::CheckpointWitness, Some(key), None, e.to_string()),
        }
        let expected = match writer {
            Actor::Gateway => 1,
            Actor::Harness => {
                let signed = match self.history.key() {
                    Some(attempt) => segment.note.verify(attempt).map_err(|e: NoteError| e.to_string()),
                    None => Err("expected a key in an attempt.opened record before this, found none".to_owned()),
                };
                if let Err(message) = signed {
                    report.add(Check::CheckpointAttempt, Some(key), None, message);
                }
                2
            }
        };
        let found = segment.note.signatures.len();
        if found != expected {
            let message = format!("expected {expected} signature(s) on what the {writer:?} wrote, found {found}");
            report.add(Check::CheckpointSignatures, Some(key), None, message);
        }
    }
}

/// Checks that the tiles and the summary are those that follow from the records.
fn ended(log: &Log, witness: &VerifierKey, (ending, mut files): (Ending, Vec<File>), report: &mut Report) {
    let Some((last, statement)) = ending.finish() else {
        for key in log.ending.keys() {
            report.add(Check::EndTiles, Some(key), None, "expected no such file before the task has ended, found one");
        }
        return;
    };
    files.extend(last);
    for (key, expected) in &files {
        match log.ending.get(key) {
            Some(found) if *found == expected => {}
            Some(_) => report.add(
                Check::EndTiles,
                Some(key),
                None,
                "expected the content that follows from the records, found another",
            ),
            None => report.add(
                Check::EndMissing,
                Some(key),
                None,
                "expected the file that follows from the records, found none",
            ),
        }
    }
    let expected: BTreeSet<&str> = files.iter().map(|(key, _)| key.as_str()).chain([SUMMARY]).collect();
    for key in log.ending.keys().filter(|key| !expected.contains(key.as_str())) {
        report.add(
            Check::EndTiles,
            Some(key),
            None,
            "expected no such file, because none follows from the records, found one",
        );
    }
    let Some(summary) = log.ending.get(SUMMARY) else {
        return report.add(Check::EndMissing, Some(SUMMARY), None, "expected a summary, found none");
    };
    match (Envelope::open(summary, PAYLOAD_TYPE, witness), canonical::to_bytes(&statement)) {
        (Ok(found), Ok(expected)) if found == expected => {}
        (Ok(_), _) => report.add(
            Check::EndSummary,
            Some(SUMMARY),
            None,
            "expected the content that follows from the records, found another",
        ),
        (Err(error), _) => report.add(Check::EndSummary, Some(SUMMARY), None, error.to_string()),
    }
}
