//! A segment of a log: a text has the form of a segment only if it is what Belay would write, byte for byte, and both ways to read a
//! segment agree.
#![no_main]

use belay::{
    canonical,
    evidence::{
        merkle::Tree,
        note::Note,
        record::Record,
        segment::{Segment, SegmentError},
    },
};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|text: &[u8]| {
    check(text);
    if let Some(mended) = mended(text) {
        check(&mended);
    }
});

fn check(text: &[u8]) {
    let parsed = Segment::parse(text);
    if let Ok(segment) = &parsed {
        assert_eq!(segment.to_bytes(), text, "expected the text of which the segment was read");
        assert!(segment.holds(segment));
        assert_eq!(segment.end() - segment.first, segment.records.len() as u64);
        assert_eq!(Segment::first_of(&Segment::key(segment.first)), Some(segment.first));
        segment.newer();
        extend(segment);
    }
    let in_two_steps = parsed.and_then(|segment| segment.decode().map(|records| (segment, records)));
    match (in_two_steps, Segment::read(text)) {
        (Ok(expected), Ok(found)) => {
            assert_eq!(found, expected);
            let (segment, records) = found;
            written(&segment, &records);
        }
        (Err(_), Err(_)) => {}
        (expected, found) => {
            panic!("expected that `read` agrees with `parse` and `decode`, found {found:?} and {expected:?}")
        }
    }
}

/// What was decoded is written in the bytes from which it was read.
fn written(segment: &Segment, records: &[Record]) {
    let encoded = records.iter().map(|record| record.encode().expect("a record that was read can be written"));
    assert_eq!(Segment::new(segment.note.clone(), segment.first, encoded.collect()), *segment);
}

/// The checkpoint that an error names as the expected one is the right one.
fn extend(segment: &Segment) {
    if let Err(SegmentError::Checkpoint { expected, .. }) = segment.extend(&Tree::new()) {
        let right = Segment { note: Note::unsigned(&expected), ..segment.clone() };
        let tree = right.extend(&Tree::new()).expect("the expected checkpoint is the right one");
        assert_eq!((tree.size(), tree.root()), (segment.end(), expected.root));
    }
}

/// Returns the text with every line in canonical form and with the digests of its documents. Without this, nearly every mutant would fail
/// at one of the two.
fn mended(text: &[u8]) -> Option<Vec<u8>> {
    let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let lines: Vec<Value> = lines.map(|line| serde_json::from_slice(line).ok()).collect::<Option<_>>()?;
    let (header, rest) = lines.split_first()?;
    let mut mended = String::new();
    for line in &lines {
        mended.push_str(&String::from_utf8(canonical::to_bytes(line).ok()?).ok()?);
        mended.push('\n');
    }
    let named = header.get("documents").and_then(Value::as_array);
    for (digest, document) in named.into_iter().flatten().zip(rest) {
        let digest = digest.as_str().filter(|digest| canonical::is_digest(digest))?;
        mended = mended.replace(digest, &hex::encode(canonical::digest(document).ok()?));
    }
    (mended.as_bytes() != text).then(|| mended.into_bytes())
}
