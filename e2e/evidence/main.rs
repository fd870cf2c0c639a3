//! Logs of real runs, and what somebody could do to them: whatever it is, `belay verify` finds and names it, and the second verifier, which
//! was written from docs/evidence-format.md alone, says the same of it.
//!
//! Every log in `corpus` was left by an end-to-end test, see its README. `BELAY_MUTANTS` says how many of all mutants are tried, 2,000 by
//! default, or `all`, which takes a release build and the better part of an hour: `make fuzz`.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use belay::{
    evidence::{
        log::{INCIDENTS, Log},
        note::VerifierKey,
        segment,
    },
    verify::{Expected, Report, Verdict, verify},
};
use bytes::Bytes;

type Objects = BTreeMap<String, Bytes>;

/// A log of a real run.
struct Run {
    name: String,
    objects: Objects,
    key: VerifierKey,
}

/// What was done to a log, and what came of it.
struct Mutant {
    what: String,
    objects: Objects,
    /// Nothing but the end is missing, without a trace.
    is_cut: bool,
}

fn corpus() -> Vec<Run> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/evidence/corpus");
    let mut runs: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .map(|path| {
            let mut objects = Objects::new();
            read(&path, &path, &mut objects);
            let key = objects.remove("witness.vkey").unwrap();
            let key = std::str::from_utf8(&key).unwrap().trim().parse().unwrap();
            Run { name: path.file_name().unwrap().to_string_lossy().into_owned(), objects, key }
        })
        .collect();
    runs.sort_by(|one, other| one.name.cmp(&other.name));
    assert!(runs.len() >= 6, "{folder:?}");
    runs
}

fn read(root: &Path, folder: &Path, objects: &mut Objects) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read(root, &path, objects);
        } else {
            let key = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            objects.insert(key, std::fs::read(&path).unwrap().into());
        }
    }
}

fn report(objects: &Objects, key: &VerifierKey) -> Report {
    let mut log = Log::default();
    for (name, bytes) in objects.clone() {
        let of = if name.starts_with(segment::FOLDER) {
            &mut log.segments
        } else if name.starts_with(INCIDENTS) {
            &mut log.incidents
        } else {
            &mut log.ending
        };
        of.insert(name, bytes);
    }
    verify(&log, key, &Expected::Anything)
}

fn changed(objects: &Objects, name: &str, bytes: impl Into<Bytes>) -> Objects {
    let mut objects = objects.clone();
    objects.insert(name.to_owned(), bytes.into());
    objects
}

/// Everything that is done to a log; `other` is one of another task.
fn mutants<'r>(run: &'r Run, other: &'r Run) -> impl Iterator<Item = Mutant> + 'r {
    let mutant = |what: String, objects| Mutant { what, objects, is_cut: false };
    let each = || run.objects.iter();
    let segments: Vec<&String> = run.objects.keys().filter(|name| name.starts_with(segment::FOLDER)).collect();
    let flips = each().flat_map(move |(name, bytes)| {
        (0..bytes.len() * 8).map(move |bit| {
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            mutant(format!("bit {bit} of {name} flipped"), changed(&run.objects, name, flipped))
        })
    });
    let cuts = each().flat_map(move |(name, bytes)| {
        (0..bytes.len())
            .map(move |at| mutant(format!("{name} cut at {at}"), changed(&run.objects, name, bytes.slice(..at))))
    });
    let lines = segments.clone().into_iter().flat_map(move |name| {
        let lines: Vec<&[u8]> = run.objects[name].split_inclusive(|byte| *byte == b'\n').collect();
        let count = lines.len();
        let with = move |what: &str, at: usize, change: &dyn Fn(&mut Vec<&'r [u8]>)| {
            let mut lines = lines.clone();
            change(&mut lines);
            mutant(format!("line {at} of {name} {what}"), changed(&run.objects, name, lines.concat()))
        };
        (0..count).flat_map(move |at| {
            let mut all = vec![
                with("dropped", at, &|lines| {
                    lines.remove(at);
                }),
                with("twice", at, &|lines| lines.insert(at, lines[at])),
            ];
            all.extend((at + 1..count).map(|to| with("swapped", at, &|lines| lines.swap(at, to))));
            all
        })
    });
    let objects =
        each().flat_map(move |(name, bytes)| {
            let without = || {
                let mut objects = run.objects.clone();
                objects.remove(name);
                objects
            };
            let mut all = vec![
                Mutant { is_cut: !name.starts_with(segment::FOLDER), ..mutant(format!("{name} deleted"), without()) },
                mutant(format!("{name} of another name"), changed(&without(), &format!("{name}0"), bytes.clone())),
                mutant(
                    format!("{name} as segment 9999"),
                    changed(&run.objects, "segments/0000009999.jsonl", bytes.clone()),
                ),
            ];
            all.extend(each().filter(|(to, _)| *to != name).map(|(to, _)| {
                mutant(format!("{to} has what is in {name}"), changed(&run.objects, to, bytes.clone()))
            }));
            all.extend(
                other.objects.get(name).filter(|theirs| *theirs != bytes).map(|theirs| {
                    mutant(format!("{name} of another log"), changed(&run.objects, name, theirs.clone()))
                }),
            );
            all
        });
    // The end taken away: what was written once it was there betrays that, and so it is taken away, too.
    let tails = (0..segments.len()).flat_map(move |keep| {
        let cut = segments.get(keep).map(|name| (*name).clone()).unwrap_or_default();
        let kept = move |name: &str| name < cut.as_str() || !name.starts_with(segment::FOLDER);
        let shorter: Objects = each().filter(|(name, _)| kept(name)).map(|(n, b)| (n.clone(), b.clone())).collect();
        let live: Objects = shorter
            .iter()
            .filter(|(name, _)| name.starts_with(segment::FOLDER))
            .map(|(n, b)| (n.clone(), b.clone()))
            .collect();
        [
            mutant(format!("all from segment {keep} on deleted"), shorter),
            Mutant { is_cut: true, ..mutant(format!("all from segment {keep} on deleted, and its end"), live) },
        ]
    });
    flips.chain(cuts).chain(lines).chain(objects).chain(tails)
}

/// The second verifier, as a process.
struct Second {
    process: Child,
    input: std::process::ChildStdin,
    output: BufReader<std::process::ChildStdout>,
}

impl Second {
    fn start() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let installed = Command::new(root.join("e2e/evidence/install")).stderr(Stdio::inherit()).output().unwrap();
        assert!(installed.status.success(), "e2e/evidence/install failed");
        let python = PathBuf::from(String::from_utf8(installed.stdout).unwrap().trim());
        let script = root.join("docs/verifier/belay_verify.py");
        let mut child = Command::new(python)
            .arg(script)
            .arg("--stream")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { process: child, input, output }
    }

    fn verdict(&mut self, objects: &Objects, key: &VerifierKey) -> (String, String) {
        let objects: BTreeMap<_, _> =
            objects.iter().map(|(name, bytes)| (name, BASE64_STANDARD.encode(bytes))).collect();
        let asked = serde_json::json!({"key": key.to_string(), "objects": objects});
        writeln!(self.input, "{asked}").unwrap();
        self.input.flush().unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        let said: serde_json::Value = serde_json::from_str(&line).unwrap();
        (said["verdict"].as_str().unwrap().to_owned(), said["findings"].to_string())
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn honest_logs_are_valid_to_both() {
    let mut second = Second::start();
    for run in corpus() {
        let found = report(&run.objects, &run.key);
        assert_eq!(found.verdict, Verdict::Valid, "{}: {:#?}", run.name, found.findings);
        let (verdict, findings) = second.verdict(&run.objects, &run.key);
        assert_eq!(verdict, "VALID", "{}: {findings}", run.name);
    }
}

#[test]
fn whatever_is_done_to_a_log_is_found_and_named() {
    let wanted = std::env::var("BELAY_MUTANTS").unwrap_or_else(|_| "2000".to_owned());
    let runs = corpus();
    let total: usize = (0..runs.len()).map(|n| mutants(&runs[n], &runs[(n + 1) % runs.len()]).count()).sum();
    // Every so many, an odd number, so that bits and kinds take turns; and of those every so many for the second verifier.
    let wanted = if wanted == "all" { total } else { wanted.parse().unwrap() };
    let (step, ask) = ((total / wanted) | 1, (wanted / 10_000).max(10));
    let runs = &runs;
    let counted: Vec<(usize, usize)> = thread::scope(|scope| {
        let halves: Vec<_> = (0..2)
            .map(|half| {
                scope.spawn(move || {
                    let mut second = Second::start();
                    let (mut tried, mut asked) = (0, 0);
                    let all = (0..runs.len()).flat_map(|n| {
                        mutants(&runs[n], &runs[(n + 1) % runs.len()]).map(move |mutant| (&runs[n], mutant))
                    });
                    for (turn, (run, mutant)) in all.step_by(step).enumerate().skip(half).step_by(2) {
                        let found = report(&mutant.objects, &run.key);
                        let (what, findings) = (format!("{}: {}", run.name, mutant.what), &found.findings);
                        if mutant.is_cut {
                            assert_eq!(found.verdict, Verdict::Incomplete, "{what}: {findings:#?}");
                        } else {
                            assert_eq!(found.verdict, Verdict::Invalid, "{what}: {findings:#?}");
                            let named = |one: &belay::verify::Finding| one.object.is_some() || one.record.is_some();
                            assert!(findings.iter().any(named), "{what}: {findings:#?}");
                        }
                        tried += 1;
                        if (turn / 2) % ask == 0 {
                            let (verdict, their_findings) = second.verdict(&mutant.objects, &run.key);
                            let said = found.verdict.to_string();
                            assert_eq!(verdict, said, "{what}: {findings:#?}; the second verifier: {their_findings}");
                            asked += 1;
                        }
                    }
                    (tried, asked)
                })
            })
            .collect();
        halves.into_iter().map(|half| half.join().unwrap()).collect()
    });
    let (tried, asked) = counted.into_iter().fold((0, 0), |sum, half| (sum.0 + half.0, sum.1 + half.1));
    let _ = writeln!(
        std::io::stderr(),
        "{tried} of {total} mutants were found and named; both verifiers said the same of {asked}"
    );
    assert!(tried >= total / step && asked >= tried / ask);
}
