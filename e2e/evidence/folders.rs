//! Logs in folders that an untrusted party has filled: both verifiers give the same verdict, and no file in the folder makes one of them
//! wait.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::symlink, net::UnixListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use belay::{
    evidence::{folder, note::VerifierKey},
    verify::{Expected, verify},
};
use rstest::rstest;

use crate::second::{PYTHON, SCRIPT};

/// Longest time for a verifier to end. None of these logs takes a second, even on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Returns a folder with a real log, which `with` has changed.
fn filled(with: impl Fn(&Path)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/evidence/corpus/agentfails-fails");
    copy(&from, folder.path());
    with(folder.path());
    folder
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let into = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &into);
        } else {
            fs::copy(entry.path(), into).unwrap();
        }
    }
}

fn fifo(at: PathBuf) {
    assert!(Command::new("mkfifo").arg(at).status().unwrap().success());
}

fn write(folder: &Path, name: &str) {
    let at = folder.join(name);
    fs::create_dir_all(at.parent().unwrap()).unwrap();
    fs::write(at, "x").unwrap();
}

/// Returns the exit code of the second verifier for a folder.
fn second(folder: &Path) -> i32 {
    let (out, begun) = (tempfile::tempfile().unwrap(), Instant::now());
    let mut process =
        Command::new(&*PYTHON).arg(&*SCRIPT).arg(folder).stdin(Stdio::null()).stdout(out).spawn().unwrap();
    while begun.elapsed() < PATIENCE {
        if let Some(status) = process.try_wait().unwrap() {
            return status.code().unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    process.kill().unwrap();
    process.wait().unwrap();
    panic!("the second verifier waits for what lies in the folder");
}

/// Returns the exit code for the verdict of `belay verify` on a folder.
fn first(folder: &Path) -> i32 {
    let folder = folder.to_owned();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let key = folder::key(&folder.join("witness.vkey")).map(|key| key.trim().parse::<VerifierKey>().unwrap());
        let verdict = key
            .ok()
            .zip(folder::read(&folder).ok())
            .map(|(key, log)| verify(&log, &key, &Expected::Anything).verdict.to_string());
        let _ = tell.send(match verdict.as_deref() {
            Some("VALID") => 0,
            Some("INVALID") => 1,
            Some("INCOMPLETE") => 3,
            Some("NEWER") => 4,
            _ => 2,
        });
    });
    told.recv_timeout(PATIENCE).expect("belay verify waits for what lies in the folder")
}

#[rstest]
#[case::as_it_was(0, |_: &Path| ())]
#[case::other_objects(0, |at: &Path| ["notes.txt", "rollback/c1.0", ".git/config", "x/segments/0"].iter().for_each(|name| write(at, name)))]
#[case::what_is_not_the_logs(0, |at: &Path| fifo(at.join("rollback")))]
#[case::whose_writing_was_broken_off(0, |at: &Path| write(at, "segments/.unfinished-1-2-0000000009.jsonl"))]
#[case::a_folder_without_files(0, |at: &Path| fs::create_dir_all(at.join("segments/.d/e")).unwrap())]
#[case::hidden(1, |at: &Path| write(at, "segments/.hidden"))]
#[case::a_backslash(1, |at: &Path| write(at, "segments/a\\b"))]
#[case::in_a_hidden_folder(1, |at: &Path| write(at, "segments/.d/e/0000000000.jsonl"))]
#[case::a_hidden_tile(1, |at: &Path| write(at, "tlog/tile/.y"))]
#[case::beside_the_tiles(1, |at: &Path| write(at, "tlog/.x"))]
#[case::a_hidden_incident(1, |at: &Path| write(at, "incidents/.z"))]
#[case::a_newline(1, |at: &Path| write(at, "segments/0000000000.jsonl\n"))]
#[case::a_space(1, |at: &Path| write(at, "segments/ "))]
#[case::no_utf_8(1, |at: &Path| fs::write(at.join("segments").join(OsStr::from_bytes(b"\xff\xfe")), "x").unwrap())]
#[case::a_fifo(1, |at: &Path| fifo(at.join("segments/0000000009.jsonl")))]
#[case::a_fifo_for_a_segment(1, |at: &Path| {
    fs::remove_file(at.join("segments/0000000000.jsonl")).unwrap();
    fifo(at.join("segments/0000000000.jsonl"));
})]
#[case::a_fifo_for_the_summary(1, |at: &Path| {
    fs::remove_file(at.join("summary.dsse.json")).unwrap();
    fifo(at.join("summary.dsse.json"));
})]
#[case::a_fifo_for_a_folder(1, |at: &Path| fifo(at.join("incidents")))]
#[case::a_socket(1, |at: &Path| drop(UnixListener::bind(at.join("tlog/s")).unwrap()))]
#[case::a_link_to_itself(1, |at: &Path| symlink("l", at.join("segments/l")).unwrap())]
#[case::a_link_to_what_never_ends(1, |at: &Path| symlink("/dev/zero", at.join("segments/0000000009.jsonl")).unwrap())]
#[case::a_link_to_nothing(1, |at: &Path| symlink("nowhere", at.join("incidents.x")).and_then(|()| symlink("nowhere", at.join("tlog/x"))).unwrap())]
#[case::a_segment_by_a_link(1, |at: &Path| {
    fs::rename(at.join("segments/0000000001.jsonl"), at.join("moved")).unwrap();
    symlink("../moved", at.join("segments/0000000001.jsonl")).unwrap();
})]
#[case::segments_by_a_link(1, |at: &Path| {
    fs::rename(at.join("segments"), at.join("moved")).unwrap();
    symlink("moved", at.join("segments")).unwrap();
})]
#[case::a_folder_for_a_segment(1, |at: &Path| {
    fs::remove_file(at.join("segments/0000000001.jsonl")).unwrap();
    write(at, "segments/0000000001.jsonl/x");
})]
#[case::a_folder_for_the_summary(1, |at: &Path| {
    fs::remove_file(at.join("summary.dsse.json")).unwrap();
    fs::create_dir(at.join("summary.dsse.json")).unwrap();
})]
#[case::a_link_up(1, |at: &Path| symlink("..", at.join("tlog/up")).unwrap())]
#[case::a_file_without_end(1, |at: &Path| fs::File::create(at.join("segments/0000000009.jsonl")).unwrap().set_len(1 << 40).unwrap())]
#[case::a_file_a_little_too_long(1, |at: &Path| fs::File::create(at.join("tlog/long")).unwrap().set_len((1 << 28) + 1).unwrap())]
#[case::a_fifo_for_the_key(2, |at: &Path| {
    fs::remove_file(at.join("witness.vkey")).unwrap();
    fifo(at.join("witness.vkey"));
})]
#[case::a_key_without_end(2, |at: &Path| fs::File::create(at.join("witness.vkey")).unwrap().set_len(1 << 40).unwrap())]
fn whatever_lies_in_a_folder_is_judged_alike(#[case] expected: i32, #[case] with: fn(&Path)) {
    let folder = filled(with);
    assert_eq!((first(folder.path()), second(folder.path())), (expected, expected));
}
