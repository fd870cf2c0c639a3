//! Everything that an attacker could do to a log of a real run.
//!
//! Without keys, attackers flip bits, cut objects off, and drop, repeat, swap and rename lines and objects. A thief of a pod's key rewrites
//! history, see [`forge`]. The keys of these runs are gone, so the thief has another key, and gets it into the log as well as possible.

use std::collections::BTreeMap;

use belay::{
    evidence::{
        log::Log,
        record::{Event, Record},
        segment,
    },
    verify::{Finding, Report, Weight},
};
use bytes::Bytes;

use crate::{
    forge::{self, Rewrite, Segments, Witness},
    runs::{Changes, RUNS, Run},
};

/// A changed log.
pub struct Mutant {
    pub run: &'static Run,
    pub what: String,
    pub changes: Changes,
    /// Whether nothing but the end is missing, without a trace.
    pub is_cut: bool,
    /// The object that the report names in place of the changed one.
    instead: Option<&'static String>,
}

/// Makes a mutant. Most mutants are only counted, and never made.
pub type Deed = Box<dyn FnOnce() -> Mutant>;
pub type Deeds = Box<dyn Iterator<Item = Deed>>;

/// Returns all mutants of a run that are made in one way, without keys.
type Keyless = fn(&'static Run) -> Deeds;
/// Returns all mutants of a run that are made in one way.
type Of = Box<dyn Fn(&'static Run) -> Deeds + Send + Sync>;

/// A way to make mutants.
pub struct Kind {
    pub name: &'static str,
    of: Of,
}

impl Kind {
    /// Returns all mutants of this kind, of all runs.
    pub fn all(&self) -> impl Iterator<Item = Deed> {
        RUNS.iter().flat_map(&self.of)
    }

    /// Returns all kinds.
    pub fn each() -> Vec<Self> {
        let keyless: [(&str, Keyless); 8] = [
            ("a bit is flipped", flips),
            ("an object is cut off", cuts),
            ("a line is gone", |run| lines(run, |lines, at| vec![without(lines, at)])),
            ("a line is there twice", |run| lines(run, |lines, at| vec![twice(lines, at)])),
            ("two lines change places", |run| lines(run, swapped)),
            ("an object is gone or elsewhere", moves),
            ("an object is another", exchanges),
            ("the end is gone", tails),
        ];
        let keyless = keyless.into_iter().map(|(name, of)| Self { name, of: Box::new(of) });
        let mut thefts: Vec<_> =
            RUNS.iter().flat_map(|run| &run.story.rewrites).map(|(_, rewrite)| named(rewrite)).collect();
        thefts.sort_unstable();
        thefts.dedup();
        let theft = |name| Self { name, of: Box::new(move |run| forgeries(run, name)) };
        keyless.chain(thefts.into_iter().map(theft)).collect()
    }
}

impl Mutant {
    /// Returns whether the report names the first changed object. The objects after it depend on it. A deleted object cannot be named
    /// itself.
    pub fn is_named_in(&self, report: &Report) -> bool {
        let first = self.changes.iter().find_map(|(name, change)| change.as_ref().map(|_| name));
        let first = self.instead.or(first);
        let names = |one: &Finding| one.object.as_ref().is_some_and(|object| first.is_none_or(|first| first == object));
        report.findings.iter().filter(|finding| finding.weight == Weight::Broken).any(names)
    }
}

fn deed(run: &'static Run, make: impl FnOnce() -> (String, Changes) + 'static) -> Deed {
    Box::new(move || {
        let (what, changes) = make();
        Mutant { run, what: format!("{}: {what}", run.name), changes, is_cut: false, instead: None }
    })
}

/// Returns the change of one object's bytes.
fn change(name: &str, bytes: impl Into<Bytes>) -> Changes {
    Changes::from([(name.to_owned(), Some(bytes.into()))])
}

fn flips(run: &'static Run) -> Deeds {
    Box::new(run.log.objects().flat_map(move |(name, bytes)| {
        (0..bytes.len() * 8).map(move |bit| {
            deed(run, move || {
                let mut flipped = bytes.to_vec();
                flipped[bit / 8] ^= 1 << (bit % 8);
                (format!("bit {bit} of {name}"), change(name, flipped))
            })
        })
    }))
}

fn cuts(run: &'static Run) -> Deeds {
    Box::new(run.log.objects().flat_map(move |(name, bytes)| {
        let cut = move |at| deed(run, move || (format!("{name} at {at}"), change(name, bytes.slice(..at))));
        (0..bytes.len()).map(cut)
    }))
}

type Lines = Vec<&'static [u8]>;

/// Returns the mutants in which one line of a segment is changed.
fn lines(run: &'static Run, deeds: fn(&Lines, usize) -> Vec<Lines>) -> Deeds {
    Box::new(run.log.segments.iter().flat_map(move |(name, bytes)| {
        let lines: Lines = bytes.split_inclusive(|byte| *byte == b'\n').collect();
        let each = (0..lines.len()).flat_map(move |at| deeds(&lines, at).into_iter().map(move |lines| (at, lines)));
        each.map(move |(at, lines)| deed(run, move || (format!("line {at} of {name}"), change(name, lines.concat()))))
    }))
}

fn without(lines: &Lines, at: usize) -> Lines {
    [&lines[..at], &lines[at + 1..]].concat()
}

fn twice(lines: &Lines, at: usize) -> Lines {
    [&lines[..at], &lines[at..=at], &lines[at..]].concat()
}

fn swapped(lines: &Lines, at: usize) -> Vec<Lines> {
    let with = |to| {
        let mut lines = lines.clone();
        lines.swap(at, to);
        lines
    };
    (at + 1..lines.len()).map(with).collect()
}

fn moves(run: &'static Run) -> Deeds {
    Box::new(run.log.objects().flat_map(move |(name, bytes)| {
        let gone = move || (name.to_owned(), None);
        let renamed = move || {
            let changes = Changes::from([gone(), (format!("{name}0"), Some(bytes.clone()))]);
            (format!("{name} of another name"), changes)
        };
        let deleted = move || (format!("{name} deleted"), Changes::from([gone()]));
        // A log that lacks a file of its end is incomplete, because its end may not be written yet. A log has no other files under tlog/,
        // but there may be other files beside tlog/.
        let ends = !name.starts_with(segment::FOLDER);
        let again = move || (format!("{name} as segment 9999"), change("segments/0000009999.jsonl", bytes.clone()));
        let cut = move |deed: Deed, is_cut: bool| -> Deed { Box::new(move || Mutant { is_cut, ..deed() }) };
        [cut(deed(run, deleted), ends), cut(deed(run, renamed), !Log::has(&format!("{name}0"))), deed(run, again)]
    }))
}

fn exchanges(run: &'static Run) -> Deeds {
    let at = RUNS.iter().position(|one| std::ptr::eq(one, run)).unwrap();
    let other = &RUNS[(at + 1) % RUNS.len()];
    Box::new(run.log.objects().flat_map(move |(name, bytes)| {
        let of = move |what: String, theirs: &'static Bytes| deed(run, move || (what, change(name, theirs.clone())));
        let mine = run.log.objects().filter(move |(from, _)| *from != name);
        let mine = mine.map(move |(from, theirs)| of(format!("{name} has what is in {from}"), theirs));
        // The first segment of another log is valid in itself. The next segment does not fit it.
        let mut segments = run.log.segments.keys();
        let instead = segments.next().filter(|first| *first == name).and_then(|_| segments.next());
        let theirs = other.log.objects().filter(move |(from, theirs)| *from == name && *theirs != bytes);
        let theirs = theirs.map(move |(_, theirs)| -> Deed {
            let deed = of(format!("{name} of {}", other.name), theirs);
            Box::new(move || Mutant { instead, ..deed() })
        });
        mine.chain(theirs)
    }))
}

/// Takes the end of a log away. The files that are written after the end reveal that, so another mutant lacks them, too.
fn tails(run: &'static Run) -> Deeds {
    Box::new((0..run.log.segments.len()).flat_map(move |keep| {
        let tail = move || run.log.segments.keys().skip(keep).map(|name| (name.clone(), None));
        let end = move || run.log.ending.keys().map(|name| (name.clone(), None));
        let live: Deed = {
            let all =
                deed(run, move || (format!("from segment {keep} on, and the end"), tail().chain(end()).collect()));
            Box::new(move || Mutant { is_cut: true, ..all() })
        };
        [deed(run, move || (format!("from segment {keep} on"), tail().collect())), live]
    }))
}

/// Describes a rewrite in a few words.
fn named(rewrite: &Rewrite) -> &'static str {
    match rewrite {
        Rewrite::Changed(_) => "a value is another",
        Rewrite::LeftOut(_) => "a member is left out",
        Rewrite::Removed => "a record is gone",
        Rewrite::Repeated => "a record is there twice",
        Rewrite::Swapped => "two records change places",
        Rewrite::Flipped => "an outcome is flipped",
        Rewrite::Allowed => "a denial is a call",
        Rewrite::Refused => "a call is a denial",
        Rewrite::Lowered => "counters are lower",
        Rewrite::Ended => "the log ends otherwise",
    }
}

/// How the thief gets the signing key into the log.
#[derive(Clone, Copy, Debug)]
enum Hand {
    /// The key is not in the log.
    Signs,
    /// The key replaces the one in `attempt.opened`.
    Opens,
    /// The key is in another `attempt.opened`, as if the harness had restarted.
    Reopens,
}

/// Returns the mutants that rewrite history, record by record.
fn forgeries(run: &'static Run, kind: &'static str) -> Deeds {
    let rewrites = run.story.rewrites.iter().filter(move |(_, rewrite)| named(rewrite) == kind);
    Box::new(rewrites.flat_map(move |(at, rewrite)| {
        // If the rewritten log ends in another way, the old objects may be left beside the new ones.
        let beside: &'static [bool] = if matches!(rewrite, Rewrite::Ended) { &[false, true] } else { &[false] };
        let hands = [Hand::Signs, Hand::Opens, Hand::Reopens];
        let witnesses = [Witness::Left, Witness::Dropped, Witness::By(&run.story.witness)];
        let ways = beside.iter().flat_map(move |beside| hands.map(|hand| (*beside, hand)));
        ways.flat_map(move |(beside, hand)| witnesses.map(|witness| (beside, hand, witness))).map(
            move |(beside, hand, witness)| {
                deed(run, move || {
                    let story = &run.story;
                    let mut segments = forge::rewritten(&story.segments, *at, rewrite).unwrap();
                    hand.reaches(&mut segments, *at, run);
                    let written = forge::written(&segments);
                    let forged = forge::sign(written, &story.origin, &story.keys, witness, &run.before);
                    let what = format!("record {at}: {rewrite:?}, {hand:?}, {witness:?}, beside: {beside}");
                    (what, difference(&run.log, &forged, beside))
                })
            },
        )
    }))
}

impl Hand {
    /// Gets the key into the log, from the attempt of a record on.
    fn reaches(self, segments: &mut Segments, at: usize, run: &Run) {
        let opens = |record: &Record| matches!(record.event, Event::AttemptOpened(_));
        let records: Vec<&Record> = segments.iter().flatten().collect();
        let newest = records[..records.len().min(at + 1)].iter().rposition(|record| opens(record)).unwrap_or(0);
        let from = match (self, forge::position(segments, at)) {
            (Self::Signs, _) => return,
            (Self::Reopens, Some((segment, _))) => reopen(segments, segment, newest),
            _ => newest,
        };
        run.story.opens(segments.iter_mut().flatten().skip(from));
    }
}

/// Opens the attempt of the record `newest` again, before a segment. Returns the number of the record that does.
fn reopen(segments: &mut Segments, segment: usize, newest: usize) -> usize {
    let records: Vec<&Record> = segments.iter().flatten().collect();
    let at = segments[..segment].iter().flatten().count();
    let usage = at.checked_sub(1).map_or_else(Default::default, |before| records[before].usage);
    let again = Record { seq: at as u64, usage, ..records[newest].clone() };
    segments[segment..].iter_mut().flatten().for_each(|record| record.seq += 1);
    segments.insert(segment, vec![again]);
    at
}

/// Returns the changes that turn one log into another. If `beside` is true, no object is removed.
fn difference(before: &Log, after: &Log, beside: bool) -> Changes {
    let [before, after] = [before, after].map(|log| log.objects().collect::<BTreeMap<_, _>>());
    let gone = before.keys().filter(|name| !beside && !after.contains_key(*name));
    let gone = gone.map(|name| ((*name).to_owned(), None));
    let other = after.iter().filter(|(name, bytes)| before.get(*name) != Some(bytes));
    gone.chain(other.map(|(name, bytes)| ((*name).to_owned(), Some((*bytes).clone())))).collect()
}
