use std::os::unix::{ffi::OsStrExt, fs::symlink, net::UnixListener};

use rustix::fs::{CWD, Mode, mknodat};

use super::*;

/// Returns a folder with the log's folders and one plain object.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["segments", "tlog", "incidents"] {
        fs::create_dir(folder.path().join(name)).unwrap();
    }
    fs::write(folder.path().join("segments/0000000000.jsonl"), "plain").unwrap();
    folder
}

#[test]
fn whatever_lies_there_is_seen_and_nothing_is_waited_for() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let fifo = |name: &str| mknodat(CWD, at(name), rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    fifo("segments/0000000001.jsonl");
    fifo("summary.dsse.json");
    symlink("/dev/zero", at("segments/0000000002.jsonl")).unwrap();
    symlink("0000000000.jsonl", at("segments/0000000003.jsonl")).unwrap();
    symlink("..", at("segments/loop")).unwrap();
    symlink("nowhere", at("tlog/.dangling")).unwrap();
    let _socket = UnixListener::bind(at("incidents/socket")).unwrap();
    let long = fs::File::create(at("segments/0000000004.jsonl")).unwrap();
    long.set_len(1 << 40).unwrap();
    fs::create_dir_all(at("segments/.d/e")).unwrap();
    for plain in ["segments/.hidden", "segments/a\\b", "segments/.d/e/f", "tlog/.x", "incidents/.z", "segments/ "] {
        fs::write(at(plain), plain).unwrap();
    }
    fs::write(folder.path().join("segments").join(std::ffi::OsStr::from_bytes(b"\xff")), "x").unwrap();
    // A file whose writing broke off, and something that is not part of a log.
    fs::write(at("segments/.unfinished-1-2-0000000009.jsonl"), "half").unwrap();
    fifo("rollback");
    let log = read(folder.path()).unwrap();
    let found: Vec<_> = log.objects().map(|(key, _)| key).collect();
    let plain = [
        "segments/ ",
        "segments/.d/e/f",
        "segments/.hidden",
        "segments/0000000000.jsonl",
        "segments/a\\b",
        "incidents/.z",
        "tlog/.x",
    ];
    assert_eq!(found, plain);
    let odd: Vec<_> =
        log.odd.iter().map(|(key, found)| (key.as_str(), found.rsplit_once("found ").unwrap().1)).collect();
    let expected = [
        ("incidents/socket", "a socket"),
        ("segments/0000000001.jsonl", "a FIFO"),
        ("segments/0000000002.jsonl", "a symbolic link"),
        ("segments/0000000003.jsonl", "a symbolic link"),
        ("segments/0000000004.jsonl", "one of 1099511627776 bytes"),
        ("segments/loop", "a symbolic link"),
        ("segments/\u{fffd}", "another"),
        ("summary.dsse.json", "a FIFO"),
        ("tlog/.dangling", "a symbolic link"),
    ];
    assert_eq!(odd, expected);
}

#[test]
fn a_folder_of_the_log_that_is_none_is_said() {
    let folder = folder();
    fs::remove_dir(folder.path().join("tlog")).unwrap();
    symlink("segments", folder.path().join("tlog")).unwrap();
    let log = read(folder.path()).unwrap();
    assert_eq!(log.odd["tlog/"], "expected a folder, found a symbolic link");
    assert_eq!(log.objects().count(), 1);
}

#[test]
fn a_key_is_a_short_plain_file() {
    let folder = folder();
    let at = folder.path().join("witness.vkey");
    fs::write(&at, "k").unwrap();
    assert_eq!(key(&at).unwrap(), "k");
    fs::write(&at, vec![b'k'; 5000]).unwrap();
    assert!(matches!(key(&at), Err(Unopened::Odd(_))));
    fs::remove_file(&at).unwrap();
    mknodat(CWD, &at, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
    assert!(matches!(key(&at), Err(Unopened::Odd(_))));
}
