use super::*;

pub(super) fn cell() -> Cell {
    let bind = |from: &str, to: &str| Bind::new(from, to);
    Cell {
        command: vec!["python3".into(), "agent.py".into()],
        env: vec![("A".into(), "1 2".into())],
        cwd: "/workspace".into(),
        root: vec![Entry::Bind(bind("/usr", "/usr")), Entry::Link { target: "usr/bin".into(), at: "/bin".into() }],
        binds: vec![bind("/home/me/task", "/workspace"), bind("/home/me/facts", "/workspace/facts")],
        scopes: vec![("/out".into(), 4096)],
        covered: vec!["/dev/shm".into(), "/tmp".into()],
    }
}

#[rstest::rstest]
#[case("0.8.0", true)]
#[case("0.11.0", true)]
#[case("1.0", true)]
#[case("0.6.1", false)]
#[case("unknown", false)]
fn an_old_bubblewrap_is_refused(#[case] version: &str, #[case] good: bool) {
    assert_eq!(new_enough(version), good);
}

/// Names the file that [`a_process_that_looks`] writes, where it runs in a process of its own.
const FOUND: &str = "BELAY_TEST_FOUND";
/// The sandbox that it is to find, if only one will do.
const WANTED: &str = "BELAY_TEST_WANTED";

/// Writes which sandbox is found on this process's PATH. The test below runs it in processes with a PATH of their own.
#[test]
fn a_process_that_looks() {
    let Some(file) = std::env::var_os(FOUND) else { return };
    let wanted = std::env::var(WANTED).ok().map(|kind| if kind == "runsc" { Kind::Gvisor } else { Kind::Bubblewrap });
    let found = match Runtime::find(wanted) {
        Ok(found) => format!("{}; {}", found.program.display(), found.version),
        Err(error) => format!("none: {error}"),
    };
    fs::write(file, found).unwrap();
}

/// A program on PATH that says its version, or a file of that name that is no program. Another process writes it: a program that this
/// process has open for writing cannot be started, and processes that other tests start inherit what is open.
fn install(folder: &Path, name: &str, says: &str, mode: &str) {
    let write = "printf '#!/bin/sh\\necho \"%s\"\\n' \"$1\" > \"$2\" && chmod \"$3\" \"$2\"";
    let mut shell = std::process::Command::new("/bin/sh");
    let written = shell.args(["-c", write, "sh", says]).arg(folder.join(name)).arg(mode).status().unwrap();
    assert!(written.success());
}

const RUNSC: (&str, &str) = ("runsc", "runsc version release-20260105.0");
const BWRAP: (&str, &str) = ("bwrap", "bubblewrap 0.11.0");
const OLD_BWRAP: (&str, &str) = ("bwrap", "bubblewrap 0.6.1");

/// gVisor if it is installed, else bubblewrap, else a message that says what to install: an agent never runs without a sandbox.
#[rstest::rstest]
#[case::both(&[RUNSC, BWRAP], "", "", &["/runsc; gvisor release-20260105.0"])]
#[case::gvisor_alone(&[RUNSC], "", "", &["/runsc; gvisor release-20260105.0"])]
#[case::bubblewrap_alone(&[BWRAP], "", "", &["/bwrap; bubblewrap 0.11.0"])]
#[case::gvisor_beside_an_old_bubblewrap(&[RUNSC, OLD_BWRAP], "", "", &["/runsc; gvisor"])]
#[case::gvisor_is_no_program(&[RUNSC, BWRAP], "runsc", "", &["/bwrap; bubblewrap"])]
#[case::neither(&[], "", "", &["none: ", "expected runsc or bwrap on PATH", "install bubblewrap", "or gVisor"])]
#[case::an_old_bubblewrap(&[OLD_BWRAP], "", "", &["none: ", "0.8 or later, found 0.6.1", "upgrade it, or install gVisor"])]
#[case::bubblewrap_was_asked_for(&[RUNSC, BWRAP], "", "bwrap", &["/bwrap; bubblewrap"])]
#[case::gvisor_was_asked_for(&[RUNSC, BWRAP], "", "runsc", &["/runsc; gvisor"])]
#[case::only_the_other_is_there(&[BWRAP], "", "runsc", &["none: ", "expected runsc on PATH", "or gVisor"])]
#[case::no_util_linux(&[RUNSC, BWRAP], "nsenter", "", &["none: ", "expected `nsenter` of util-linux on PATH", "install util-linux"])]
fn the_best_sandbox_that_is_installed_is_used(
    #[case] installed: &[(&str, &str)],
    #[case] unusable: &str,
    #[case] wanted: &str,
    #[case] found: &[&str],
) {
    let (path, out) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
    let mode = |name: &str| if name == unusable { "644" } else { "755" };
    for (name, says) in TOOLS.iter().map(|name| (*name, "")).chain(installed.iter().copied()) {
        install(path.path(), name, says, mode(name));
    }
    let mut looks = std::process::Command::new(std::env::current_exe().unwrap());
    looks
        .args(["--exact", "run::sandbox::tests::a_process_that_looks"])
        .env("PATH", path.path())
        .env(FOUND, out.path());
    if !wanted.is_empty() {
        looks.env(WANTED, wanted);
    }
    let ended = looks.output().unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stdout));
    let said = fs::read_to_string(out.path()).unwrap();
    for part in found {
        assert!(said.contains(part), "expected {part:?}, found {said:?}");
    }
    assert_eq!(said.starts_with("none: "), found.contains(&"none: "), "{said}");
}
