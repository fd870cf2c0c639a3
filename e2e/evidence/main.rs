//! Logs of real runs, and what an attacker could do to them. `belay verify` finds and names every change. The second verifier, which was
//! written from docs/evidence-format.md alone, gives the same verdict.
//!
//! Every log in `corpus` was left by an end-to-end test, see its README. `BELAY_MUTANTS` is the number of mutants to try, in equal shares
//! for each kind: 2,000 by default. `all` tries all mutants, which takes a release build and some minutes: `make fuzz`.

use std::{
    collections::BTreeMap,
    fmt::Display,
    io::Write,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

// The modules that `forge` uses as parts of its own crate.
use belay::{canonical, evidence, policy};
use belay::{
    evidence::{
        log::Log,
        record::{Actor, Event},
        segment::Segment,
    },
    policy::config::SideEffect,
    verify::{Check, Expected, Report, Verdict, Weight, verify},
};

use rstest::rstest;
use serde_json::{Value, json};

use self::{
    forge::Rewrite,
    mutants::{Kind, Mutant},
    runs::{Changes, RUNS, Story},
    script::{Script, change_intent, change_opened, lose, outcome, record},
    second::{SCRIPT, Second},
};

mod folders;
#[path = "../../src/verify/tests/forge.rs"]
mod forge;
mod lies;
mod mutants;
mod rich;
mod runs;
#[expect(dead_code, reason = "it is the lib's")]
#[path = "../../src/verify/tests/script.rs"]
mod script;
mod second;
mod structured;
mod sweep;

/// Returns how many mutants are tried, and how many of them go to the second verifier, which is a hundred times slower.
fn wanted() -> (usize, usize) {
    match std::env::var("BELAY_MUTANTS").as_deref() {
        // Some kinds have fewer mutants than their share, so 13,000 means at least 10,000.
        Ok("all") => (usize::MAX, 13_000),
        Ok(wanted) => (wanted.parse().unwrap(), wanted.parse::<usize>().unwrap() / 10),
        Err(_) => (2_000, 200),
    }
}

/// Returns the step that takes a share of all mutants. It is odd, so that the bits and kinds that it takes alternate.
fn every(count: usize, share: usize) -> usize {
    (count / share.max(1)) | 1
}

/// The progress of a test.
struct Progress {
    total: usize,
    done: AtomicUsize,
    begun: Instant,
}

impl Progress {
    fn of(total: usize) -> Self {
        Self { total, done: AtomicUsize::new(0), begun: Instant::now() }
    }

    fn step(&self, what: &str) {
        let (done, total) = (self.done.fetch_add(1, Ordering::Relaxed) + 1, self.total);
        if done.is_multiple_of((total / 20).max(1)) {
            say(format_args!("{done} of {total}, {} s: {what}", self.begun.elapsed().as_secs()));
        }
    }
}

/// Prints a line for people who wait.
fn say(what: impl Display) {
    let _ = writeln!(std::io::stderr(), "{what}");
}

/// Divides the work between two threads, each with a second verifier of its own.
fn halves<T: Send>(work: impl Fn(usize, &mut Second) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let halves = [0, 1].map(|half| {
            let work = &work;
            scope.spawn(move || work(half, &mut Second::start()))
        });
        halves.into_iter().map(|half| half.join().unwrap()).collect()
    })
}

/// Returns the first rule that does not hold.
fn broken(report: &Report) -> Option<Check> {
    report.findings.iter().find(|finding| finding.weight == Weight::Broken).map(|finding| finding.rule)
}

/// The results for the mutants of one kind.
#[derive(Default)]
struct Tally {
    tried: usize,
    found: usize,
    asked: usize,
    rules: BTreeMap<&'static str, usize>,
    /// Mutants that were not found, that were not named, or that got another verdict from the second verifier.
    wrong: Vec<String>,
}

impl Tally {
    /// Tries a mutant. If `second` is present, the second verifier tries it, too.
    fn take(&mut self, mutant: &Mutant, second: Option<&mut Second>) {
        let (log, report) = mutant.run.verify(&mutant.changes);
        let expected = if mutant.is_cut { Verdict::Incomplete } else { Verdict::Invalid };
        self.tried += 1;
        if report.verdict == expected && (mutant.is_cut || mutant.is_named_in(&report)) {
            self.found += 1;
        } else {
            self.wrong.push(format!("{}: {}: {:#?}", mutant.what, report.verdict, report.findings));
        }
        *self.rules.entry(broken(&report).map_or("incomplete", Check::as_str)).or_default() += 1;
        if let Some(second) = second {
            self.asked += 1;
            let whole = verify(&log, &mutant.run.key, &Expected::Anything);
            assert_eq!(whole.findings, report.findings, "{}", mutant.what);
            let (verdict, findings) = second.verdict(&log, &mutant.run.key);
            if verdict != report.verdict.to_string() {
                self.wrong.push(format!("{}: {verdict} to the second: {findings}: {report:#?}", mutant.what));
            }
        }
    }

    fn join(mut self, other: Self) -> Self {
        self.tried += other.tried;
        self.found += other.found;
        self.asked += other.asked;
        other.rules.into_iter().for_each(|(rule, count)| *self.rules.entry(rule).or_default() += count);
        self.wrong.extend(other.wrong);
        self
    }

    /// Returns a line of the table. The rules that found the most mutants come first.
    fn line(&self, name: &str, all: usize) -> String {
        let Self { tried, found, asked, .. } = self;
        let mut rules: Vec<_> = self.rules.iter().collect();
        rules.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let rules: Vec<_> = rules.into_iter().take(3).map(|(rule, count)| format!("{rule} {count}")).collect();
        format!("{name:<31}{all:>9}{tried:>9}{found:>9}{asked:>7}  {}", rules.join(", "))
    }
}

#[test]
fn honest_logs_are_valid_to_both() {
    let mut second = Second::start();
    for run in &*RUNS {
        let found = verify(&run.log, &run.key, &Expected::Anything);
        assert_eq!(found.verdict, Verdict::Valid, "{}: {:#?}", run.name, found.findings);
        let (verdict, findings) = second.verdict(&run.log, &run.key);
        assert_eq!(verdict, "VALID", "{}: {findings}", run.name);
    }
}

/// No signature covers where a segment ends, or the order of signatures. To change one of them changes no record and no verdict.
#[test]
fn segments_that_are_joined_are_the_same_log() {
    let mut second = Second::start();
    for run in &*RUNS {
        let segments: Vec<_> = run.log.segments.values().map(|bytes| Segment::parse(bytes).unwrap()).collect();
        let harness = run.story.segments.iter().take_while(|records| records[0].actor == Actor::Harness).count();
        let opens = |n: usize| matches!(run.story.segments[n][0].event, Event::AttemptOpened(_));
        let Some(n) = (1..harness).rev().find(|n| !opens(*n)) else { continue };
        let [before, mut joined] = [&segments[n - 1], &segments[n]].map(Segment::clone);
        let gone = Segment::key(joined.first);
        joined.first = before.first;
        joined.documents.splice(..0, before.documents);
        joined.records.splice(..0, before.records);
        joined.note.signatures.reverse();
        let changes = Changes::from([(gone, None), (Segment::key(joined.first), Some(joined.to_bytes().into()))]);
        let (log, report) = run.verify(&changes);
        assert_eq!(report.verdict, Verdict::Valid, "{}: {:#?}", run.name, report.findings);
        assert_eq!(report.summary.root, verify(&run.log, &run.key, &Expected::Anything).summary.root);
        assert_eq!(second.verdict(&log, &run.key).0, "VALID", "{}", run.name);
    }
}

#[test]
fn whatever_is_done_to_a_log_is_found_and_named() {
    let (wanted, asked) = wanted();
    let kinds = Kind::each();
    let counts: Vec<usize> = kinds.iter().map(|kind| kind.all().count()).collect();
    let steps: Vec<usize> = counts.iter().map(|count| every(*count, wanted / kinds.len())).collect();
    let total: usize = counts.iter().zip(&steps).map(|(count, step)| count.div_ceil(*step)).sum();
    let progress = Progress::of(total);
    let tallies = halves(|half, second| {
        let each = kinds.iter().zip(&counts).zip(&steps).map(|((kind, count), step)| {
            let ask = (count.div_ceil(*step) / (asked / kinds.len()).max(1)).max(1);
            let mut tally = Tally::default();
            for (turn, deed) in kind.all().step_by(*step).enumerate().skip(half).step_by(2) {
                tally.take(&deed(), (turn / 2).is_multiple_of(ask).then_some(&mut *second));
                progress.step(kind.name);
            }
            tally
        });
        each.collect::<Vec<_>>()
    });
    let mut halves = tallies.into_iter();
    let (one, other) = (halves.next().unwrap(), halves.next().unwrap());
    let tallies: Vec<Tally> = one.into_iter().zip(other).map(|(one, other)| one.join(other)).collect();
    say(format_args!("{:<31}{:>9}{:>9}{:>9}{:>7}  {}", "what was done", "mutants", "tried", "found", "asked", "by"));
    kinds.iter().zip(&counts).zip(&tallies).for_each(|((kind, count), tally)| say(tally.line(kind.name, *count)));
    let all = tallies.into_iter().fold(Tally::default(), Tally::join);
    say(all.line("in all", counts.iter().sum()));
    assert!(
        all.wrong.is_empty(),
        "{} are wrong, such as {}",
        all.wrong.len(),
        all.wrong[..all.wrong.len().min(9)].join("\n")
    );
    assert_eq!((all.tried, all.found), (total, total));
    assert!(all.asked >= asked * 5 / 6);
}

/// What a liar who can sign everything writes.
#[derive(Debug)]
enum Lie<'s> {
    /// The truth.
    None,
    /// A rewritten record.
    Rewritten(&'s (usize, Rewrite)),
    /// A record with a member that no record has in this form.
    Member(usize, &'static str, &'static str, Value),
}

impl Lie<'_> {
    /// Returns the truth, and all lies about a story.
    fn each(story: &Story) -> Vec<Lie<'_>> {
        let records: Vec<_> = story.segments.iter().flatten().collect();
        let rewritten = story.rewrites.iter().map(Lie::Rewritten);
        let members = (0..records.len()).flat_map(|at| {
            [
                Lie::Member(at, "", "costMicros", 0.into()),
                Lie::Member(at, "/usage", "costMicros", 0.into()),
                Lie::Member(at, "", "reservedCostMicros", 0.into()),
                Lie::Member(at, "", "approvals", json!([])),
                Lie::Member(at, "", "reasons", json!([])),
                Lie::Member(at, "", "decisions", json!([])),
                Lie::Member(at, "", "breaches", json!([])),
                Lie::Member(at, "", "rule", Value::Null),
                Lie::Member(at, "", "more", true.into()),
            ]
        });
        std::iter::once(Lie::None).chain(rewritten).chain(members).collect()
    }

    fn told(&self, story: &Story) -> Log {
        match self {
            Lie::None => story.told(story.segments.clone(), |_| {}),
            Lie::Rewritten((at, rewrite)) => {
                story.told(forge::rewritten(&story.segments, *at, rewrite).unwrap(), |_| {})
            }
            Lie::Member(at, within, name, value) => story.told(story.segments.clone(), |written| {
                let (segment, place) = forge::position(&story.segments, *at).unwrap();
                let bytes = &mut written[segment].entries[place].record;
                let mut record: Value = serde_json::from_slice(bytes).unwrap();
                record.pointer_mut(within).unwrap()[name] = value.clone();
                *bytes = canonical::to_bytes(&record).unwrap();
            }),
        }
    }
}

/// A verifier checks more than signatures. Liars who have all keys, even the witness's, write what they like, and both verifiers give the
/// same verdict, except for expressions and patterns, which the evidence format leaves to `belay verify`.
#[test]
fn what_liars_with_all_keys_write_is_judged_alike() {
    let (_, asked) = wanted();
    let scripts = [Script::good(), script::resolved()]
        .map(|script| Story::new(evidence::note::origin(script::UID), script.segments, script.keys, script.witness));
    let riches = [&*rich::TASK, &*rich::ROLLBACK];
    let stories: Vec<&Story> = RUNS.iter().map(|run| &run.story).chain(&scripts).chain(riches).collect();
    let all: Vec<_> =
        stories.into_iter().flat_map(|story| Lie::each(story).into_iter().map(move |lie| (story, lie))).collect();
    let step = every(all.len(), asked);
    let progress = Progress::of(all.len() / step);
    let counted = halves(|half, second| {
        let mut counted = BTreeMap::<_, usize>::new();
        let some = all.iter().enumerate().filter(|(n, (_, lie))| matches!(lie, Lie::None) || n.is_multiple_of(step));
        for (_, (story, lie)) in some.skip(half).step_by(2) {
            let (log, key) = (lie.told(story), story.witness.verifier());
            let report = verify(&log, &key, &Expected::Anything);
            let (verdict, findings) = second.verdict(&log, &key);
            let what = format!("{}: {lie:?}: {verdict} to the second: {findings}: {report:#?}", story.origin);
            let is_more = structured::is_said(&report, &verdict, &log);
            match lie {
                // The code that writes the mutants writes valid logs, so a mutant is not found by the way it is written.
                Lie::None => assert!(report.verdict == Verdict::Valid && verdict == "VALID", "{what}"),
                Lie::Rewritten(_) => assert!(verdict == report.verdict.to_string() || is_more, "{what}"),
                Lie::Member(..) => assert!(report.verdict == Verdict::Invalid && verdict == "INVALID", "{what}"),
            }
            let alone = if report.verdict.to_string() == verdict { None } else { broken(&report) };
            *counted.entry((verdict, alone.map(Check::as_str))).or_default() += 1;
            progress.step("liars");
        }
        counted
    });
    let mut sum = BTreeMap::<_, usize>::new();
    counted.into_iter().flatten().for_each(|(verdicts, count)| *sum.entry(verdicts).or_default() += count);
    say("liars' logs: what the second verifier says, and by which rule `belay verify` alone says INVALID");
    sum.into_iter().for_each(|((verdict, rule), count)| {
        say(format_args!("{verdict:<12}{:<18}{count:>6}", rule.unwrap_or("the same")))
    });
}

/// What the evidence format says about calls with an unknown outcome, and about keys.
#[rstest]
#[case::resolved("VALID", |_: &mut Script| {})]
#[case::a_key_that_comes_back("VALID", |script: &mut Script| {
    let again = script.at(7).event.clone();
    script.segments.insert(5, vec![record(2, again)]);
})]
#[case::opened_within_a_segment("INVALID", |script: &mut Script| {
    let again = script.at(7).event.clone();
    script.segments[4].push(record(2, again));
})]
#[case::found_lost("VALID", lost)]
#[case::an_outcome_after_it_was_resolved("INVALID", |script: &mut Script| {
    lost(script);
    script.segments[5].insert(4, record(2, outcome("d", 0)));
})]
#[case::resolved_by_an_older_read("INVALID", |script: &mut Script| {
    let told = script.segments[5].remove(3);
    let read = script.segments[5].drain(1..3).collect::<Vec<_>>();
    script.segments[4].splice(1..1, read);
    script.segments[5].insert(1, told);
})]
#[case::resolved_by_a_read_that_failed("INVALID", |script: &mut Script| lose(script, 11))]
#[case::resolved_twice("INVALID", |script: &mut Script| {
    let told = script.at(12).clone();
    script.segments[5].insert(4, told);
})]
#[case::a_contract_that_the_class_forbids("INVALID", |script: &mut Script| {
    change_opened(script, 7, |opened| opened.policy.allowed_effects = vec![SideEffect::Write]);
    change_intent(script, 10, |intent| intent.side_effect = Some(SideEffect::Write));
})]
fn rules_hold_for_both(#[case] expected: &str, #[case] lie: fn(&mut Script)) {
    let mut script = script::resolved();
    lie(&mut script);
    script.count();
    let (log, key) = (Log { versions: None, ..script.write() }, script.witness.verifier());
    let report = verify(&log, &key, &Expected::Anything);
    let (verdict, findings) = Second::start().verdict(&log, &key);
    assert_eq!(
        (report.verdict.to_string().as_str(), verdict.as_str()),
        (expected, expected),
        "{findings}: {report:#?}"
    );
}

/// Makes the harness restart before the outcome of the call.
fn lost(script: &mut Script) {
    script.at(9).event = script.at(7).event.clone();
}

/// The second verifier stays short enough to be read as a whole.
#[test]
fn the_second_verifier_is_short() {
    for file in [&*SCRIPT, &SCRIPT.with_file_name("belay_records.py")] {
        let text = std::fs::read_to_string(file).unwrap();
        assert!(text.lines().count() <= 440 && text.lines().all(|line| line.chars().count() <= 120), "{file:?}");
    }
}
