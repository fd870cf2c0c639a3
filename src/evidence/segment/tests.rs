use proptest::prelude::*;
use rstest::rstest;

use super::*;
use crate::{
    evidence::{
        note::{Signer, WITNESS_NAME, origin},
        record::{Actor, AttemptClosed, Event, LONGEST, VERSION},
    },
    policy::config::Usage,
    verify::tests::script,
};

fn record(seq: u64) -> Record {
    Record {
        v: VERSION,
        seq,
        time: "2026-11-23T10:00:00.000Z".to_owned(),
        attempt: 1,
        actor: Actor::Harness,
        usage: Usage::default(),
        event: Event::AttemptClosed(AttemptClosed { reason: "agentEnded".to_owned() }),
    }
}

/// Returns a segment of the records `first..first + count`, and the tree of the records before them.
fn segment(first: u64, count: u64) -> (Tree, Segment) {
    let bytes = |seq| canonical::to_bytes(&record(seq)).unwrap();
    let before: Tree = (0..first).map(|seq| merkle::leaf_hash(&bytes(seq))).collect();
    let records: Vec<_> = (first..first + count).map(bytes).collect();
    let mut after = before.clone();
    records.iter().for_each(|r| after.push(merkle::leaf_hash(r)));
    let checkpoint = Checkpoint { origin: origin("0b4f"), size: after.size(), root: after.root() };
    let mut note = Note::sign(&checkpoint, &Signer::generate("belay.dev/task/0b4f/1").unwrap());
    note.cosign(&Signer::generate(WITNESS_NAME).unwrap(), 1_795_000_000);
    (before, Segment { note, first, documents: vec![], records })
}

#[test]
fn a_segment_goes_round_and_extends_its_log() {
    let (before, segment) = segment(3, 4);
    let again = Segment::parse(&segment.to_bytes()).unwrap();
    assert_eq!(again, segment);
    assert_eq!(again.decode().unwrap(), (3..7).map(record).collect::<Vec<_>>());
    assert_eq!(again.extend(&before).unwrap().size(), 7);
    assert!(matches!(again.extend(&Tree::new()), Err(SegmentError::Position { expected: 0, found: 3 })));
    let mut changed = again;
    changed.records[1] = canonical::to_bytes(&Record { attempt: 2, ..record(4) }).unwrap();
    assert!(matches!(changed.extend(&before), Err(SegmentError::Checkpoint { .. })));
}

#[test]
fn keys_sort_as_numbers() {
    assert_eq!(Segment::key(0), "segments/0000000000.jsonl");
    assert_eq!(Segment::key(1_234_567), "segments/0001234567.jsonl");
    assert_eq!(Segment::first_of("segments/0001234567.jsonl"), Some(1_234_567));
    for key in [
        "segments/1.jsonl",
        "segments/+000000001.jsonl",
        "segments/0000000000.json",
        "0000000000.jsonl",
        "x/segments/0000000000.jsonl",
    ] {
        assert_eq!(Segment::first_of(key), None, "{key}");
    }
}

#[rstest]
#[case::empty("", 1, "found nothing")]
#[case::no_records("HEADER\n", 2, "at least one record")]
#[case::cut_off("HEADER\n{\"seq\":0}", 2, "newline")]
#[case::no_checkpoint("{\"seq\":0}\n", 1, "checkpoint")]
#[case::more_in_header("{\"a\":1,\"checkpoint\":\"\"}\n{\"seq\":0}\n", 1, "checkpoint")]
#[case::no_note("{\"checkpoint\":\"\"}\n{\"seq\":0}\n", 1, "signed note")]
#[case::not_json("HEADER\n{\n", 2, "not JSON")]
#[case::empty_line("HEADER\n{\"seq\":0}\n\n", 3, "not JSON")]
#[case::space("HEADER\n{\"seq\": 0}\n", 2, "canonical")]
#[case::order("HEADER\n{\"seq\":0,\"a\":1}\n", 2, "canonical")]
#[case::twice("HEADER\n{\"seq\":0,\"seq\":0}\n", 2, "canonical")]
#[case::number("HEADER\n{\"seq\":0.0}\n", 2, "canonical")]
#[case::escape("HEADER\n{\"a\":\"\\u0041\",\"seq\":0}\n", 2, "canonical")]
#[case::carriage_return("HEADER\n{\"seq\":0}\r\n", 2, "canonical")]
#[case::no_seq("HEADER\n{}\n", 2, "seq")]
#[case::negative("HEADER\n{\"seq\":-1}\n", 2, "seq")]
#[case::gap("HEADER\n{\"seq\":5}\n{\"seq\":7}\n", 3, "expected seq 6, found 7")]
#[case::again("HEADER\n{\"seq\":5}\n{\"seq\":5}\n", 3, "expected seq 6, found 5")]
fn broken_segments_name_the_line(#[case] text: &str, #[case] line: usize, #[case] problem: &str) {
    let (_, good) = segment(0, 1);
    let header = serde_json::json!({ "checkpoint": good.note.to_string() }).to_string();
    let error = Segment::parse(text.replace("HEADER", &header).as_bytes()).unwrap_err().to_string();
    assert!(error.starts_with(&format!("line {line}: ")) && error.contains(problem), "{error}");
}

#[test]
fn a_record_with_a_field_that_this_version_lacks_is_refused() {
    let (_, mut segment) = segment(0, 2);
    let text = String::from_utf8(segment.records[1].clone()).unwrap();
    segment.records[1] = text.replace("\"v\":1", "\"v\":1,\"w\":2").into_bytes();
    let error = segment.decode().unwrap_err().to_string();
    assert!(error.starts_with("line 3: "), "{error}");
    segment.records[1] = b"{\"kind\":\"nonsense\"}".to_vec();
    assert!(segment.decode().is_err());
}

#[test]
fn strings_are_written_in_canonical_form() {
    // `to_bytes` writes its header with `serde_json`: it must be what RFC 8785 writes.
    let (_, mut segment) = segment(0, 1);
    segment.note.text = "\u{1f}\u{7f}\u{2028}\u{e000}\u{1f600}\"\\/\u{8}\n".to_owned();
    let header = segment.to_bytes().split(|b| *b == b'\n').next().unwrap().to_vec();
    let canonical = canonical::to_bytes(&serde_json::json!({ "checkpoint": segment.note.to_string() })).unwrap();
    assert_eq!(header, canonical);
}

proptest! {
    #[test]
    fn nothing_makes_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..500), lines in "(\\{\"(checkpoint|seq)\":[0-9\"—\\\\n a]{0,20}\\}\n){0,4}") {
        let _ = Segment::parse(&bytes);
        let _ = Segment::parse(lines.as_bytes());
    }

    /// Reading with records accepts exactly what parsing and decoding accept.
    #[test]
    fn reading_in_one_go_is_parsing_and_decoding(at in any::<prop::sample::Index>(), byte in any::<u8>(), to in any::<prop::sample::Index>()) {
        let mut text = if byte % 2 == 0 { segment(3, 4).1 } else { opened() }.to_bytes();
        let changed = at.index(text.len());
        text[changed] = byte;
        // Also moves or repeats a line.
        let mut lines: Vec<_> = text.split_inclusive(|b| *b == b'\n').collect();
        let moved = lines[at.index(lines.len())];
        for text in [text.clone(), { lines.insert(to.index(lines.len()), moved); lines.concat() }] {
            let two = Segment::parse(&text).and_then(|segment| segment.decode().map(|records| (segment, records)));
            prop_assert_eq!(Segment::read(&text).ok(), two.ok());
        }
    }

    #[test]
    fn what_is_accepted_has_one_form(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let segment = if byte % 2 == 0 { segment(2, 3).1 } else { opened() };
        let mut bytes = segment.to_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(parsed) = Segment::parse(&bytes) {
            prop_assert_eq!(parsed.to_bytes(), bytes);
            let _ = parsed.decode();
        }
    }
}

/// Returns a segment of two records: one names a policy, the other names no document.
fn opened() -> Segment {
    let key = Signer::generate("belay.dev/task/0b4f/1").unwrap();
    let record = |seq, event| Record { event, ..record(seq) };
    let entries = [record(0, script::opened(&key, 1)), record(1, script::attempt_closed())];
    let entries: Vec<_> = entries.iter().map(|record| record.encode().unwrap()).collect();
    let tree: Tree = entries.iter().map(|entry| merkle::leaf_hash(&entry.record)).collect();
    let checkpoint = Checkpoint { origin: origin("0b4f"), size: 2, root: tree.root() };
    Segment::new(Note::sign(&checkpoint, &key), 0, entries)
}

#[test]
fn documents_go_with_the_record_that_names_them() {
    let segment = opened();
    let text = segment.to_bytes();
    let (again, records) = Segment::read(&text).unwrap();
    assert_eq!((&again, again.decode().unwrap()), (&segment, records.clone()));
    let Event::AttemptOpened(opened) = &records[0].event else { panic!() };
    assert_eq!(opened.policy, script::policy());
    let line = String::from_utf8(segment.records[0].clone()).unwrap();
    assert!(line.contains(&opened.policy.digest().unwrap()) && !line.contains("Tidy up"), "{line}");
    let text = String::from_utf8(text).unwrap();
    assert_eq!(text.lines().count(), 4, "checkpoint, policy, two records");
    for (from, to, problem) in [
        ("Tidy up", "Tidy it", "line 2: expected the document "),
        ("\"documents\":[\"", "\"documents\":[\"00", "line 2: expected the document 00"),
        (",\"documents\":[", ",\"documents\":[],\"x\":[", "line 1: "),
        ("\"policyDigest\":\"", "\"policyDigest\":\"00", "line 3: expected the document 00"),
    ] {
        assert!(text.contains(from), "{from}");
        let error = Segment::read(text.replacen(from, to, 1).as_bytes()).unwrap_err().to_string();
        assert!(error.starts_with(problem), "{error}");
    }
}

/// Documents are read as strictly as records.
#[rstest]
#[case::a_field_more(|policy: &mut Value| policy["extra"] = 1.into(), "this version of belay does not know the document")]
#[case::a_field_that_is_left_out_otherwise(|policy: &mut Value| policy["task"]["taskClass"] = Value::Null, "this version of belay does not know the document")]
#[case::none(|policy: &mut Value| *policy = Value::Null, "this version of belay does not know the document")]
fn a_document_that_this_version_does_not_have_is_refused(#[case] change: fn(&mut Value), #[case] problem: &str) {
    let mut segment = opened();
    let mut policy = serde_json::from_slice(&segment.documents[0]).unwrap();
    let before = hex::encode(canonical::sha256(&segment.documents[0]));
    change(&mut policy);
    segment.documents[0] = canonical::to_bytes(&policy).unwrap();
    let after = hex::encode(canonical::sha256(&segment.documents[0]));
    let line = String::from_utf8(segment.records[0].clone()).unwrap();
    segment.records[0] = line.replace(&before, &after).into_bytes();
    let error = segment.decode().unwrap_err();
    assert!(error.to_string().contains(problem), "{error}");
    assert_eq!(error.record(), Some(0));
}

#[test]
fn a_record_has_a_longest() {
    let long = |len| Record { time: "x".repeat(len), ..record(0) };
    let rest = canonical::to_bytes(&long(0)).unwrap().len();
    assert!(long(LONGEST - rest).encode().is_ok());
    assert!(long(LONGEST - rest + 1).encode().is_err());
    let bytes = canonical::to_bytes(&long(LONGEST - rest + 1)).unwrap();
    assert!(Record::decode(&bytes, &mut std::iter::empty()).unwrap_err().to_string().contains("65535"));
}
