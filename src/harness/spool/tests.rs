use proptest::prelude::*;

use super::*;
use crate::evidence::{
    merkle::{Tree, leaf_hash},
    note::{self, Checkpoint, Note, Signer},
};

/// Returns the segments of a log, with this many records each.
fn log(sizes: &[usize]) -> Vec<Segment> {
    let signer = Signer::generate(&note::attempt_key_name("uid", 1)).unwrap();
    let mut tree = Tree::new();
    let cut = |&size: &usize| {
        let first = tree.size();
        let record = |seq: u64| format!(r#"{{"event":"{}","seq":{seq}}}"#, "x".repeat(200)).into_bytes();
        let records: Vec<_> = (first..first + size as u64).map(record).collect();
        records.iter().for_each(|record| tree.push(leaf_hash(record)));
        let checkpoint = Checkpoint { origin: note::origin("uid"), size: tree.size(), root: tree.root() };
        Segment { note: Note::sign(&checkpoint, &signer), first, documents: vec![], records }
    };
    sizes.iter().map(cut).collect()
}

fn kept(folder: &Path) -> Vec<Segment> {
    Spool::open(folder).unwrap().1
}

#[test]
fn what_was_kept_is_found_again_and_what_was_let_go_of_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let segments = log(&[1, 3, 2]);
    let (mut spool, none) = Spool::open(folder.path()).unwrap();
    assert!(none.is_empty());
    segments.iter().for_each(|segment| spool.keep(&segment.to_bytes()).unwrap());
    assert_eq!(kept(folder.path()), segments);
    // The spool that was opened after it has replaced the file, as a second harness does, and continues from there.
    let (mut spool, _) = Spool::open(folder.path()).unwrap();
    spool.keep(&segments[2].to_bytes()).unwrap();
    assert_eq!(kept(folder.path()).len(), 4);
    spool.clear().unwrap();
    assert_eq!(kept(folder.path()), []);
}

#[test]
fn what_there_was_no_room_for_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let segments = log(&[1, 2]);
    let (mut spool, _) = Spool::open(folder.path()).unwrap();
    for segment in &segments {
        let text = segment.to_bytes();
        // A full disk leaves a part of a segment.
        spool.file.write_all(&text[..text.len() / 2]).unwrap();
        spool.torn = true;
        spool.keep(&text).unwrap();
    }
    assert_eq!(kept(folder.path()), segments);
}

#[test]
fn it_makes_room_by_what_is_stored() {
    let folder = tempfile::tempdir().unwrap();
    let segments = log(&[1, 2]);
    let (mut spool, _) = Spool::open(folder.path()).unwrap();
    segments.iter().for_each(|segment| spool.keep(&segment.to_bytes()).unwrap());
    spool.make_room([segments[1].to_bytes()].iter()).unwrap();
    assert_eq!(kept(folder.path()), segments[1..]);
}

#[test]
fn it_does_not_grow_with_what_is_stored() {
    let folder = tempfile::tempdir().unwrap();
    let segments = log(&[100; 200]);
    let (mut spool, _) = Spool::open(folder.path()).unwrap();
    for (index, segment) in segments.iter().enumerate() {
        spool.keep(&segment.to_bytes()).unwrap();
        let rest: Vec<_> = segments[index.saturating_sub(2)..=index].iter().map(Segment::to_bytes).collect();
        spool.forget(rest.iter()).unwrap();
        let size = std::fs::metadata(folder.path().join(FILE)).unwrap().len();
        assert!(size < 2 * STALE, "{size} bytes after {index}");
        assert!(kept_by(folder.path()).ends_with(&segments[index.saturating_sub(2)..=index]));
    }
}

/// Works like [`kept`], but does not replace the file.
fn kept_by(folder: &Path) -> Vec<Segment> {
    segments(&std::fs::read(folder.join(FILE)).unwrap()).unwrap()
}

#[test]
fn what_is_broken_before_its_end_is_not_gone_on_from() {
    let folder = tempfile::tempdir().unwrap();
    let mut text: Vec<u8> = log(&[2, 2]).iter().flat_map(Segment::to_bytes).collect();
    let end = text.windows(2).position(|two| two == b"}\n").unwrap();
    text[end] = b' ';
    std::fs::write(folder.path().join(FILE), &text).unwrap();
    let error = Spool::open(folder.path()).err().unwrap();
    assert!(error.to_string().contains("the segment at byte 0"), "{error}");
    std::fs::write(folder.path().join(FILE), b"what is this\n").unwrap();
    let error = Spool::open(folder.path()).err().unwrap();
    assert!(error.to_string().contains("expected a segment at the start"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A process may be killed at any byte of what it writes.
    #[test]
    fn cut_off_anywhere_it_holds_every_whole_segment(sizes in prop::collection::vec(1_usize..4, 1..5), cut in any::<prop::sample::Index>()) {
        let all = log(&sizes);
        let texts: Vec<_> = all.iter().map(Segment::to_bytes).collect();
        let text = texts.concat();
        let cut = cut.index(text.len() + 1);
        let whole = texts.iter().scan(0, |sum, text| { *sum += text.len(); Some(*sum) }).filter(|end| *end <= cut).count();
        let found = segments(&text[..cut]).unwrap();
        prop_assert_eq!(&found, &all[..whole]);
    }
}
