//! Logs of real runs, from `corpus`.

use std::{collections::BTreeMap, path::Path, sync::LazyLock};

use belay::{
    evidence::{
        log::Log,
        note::{Signer, VerifierKey, WITNESS_NAME},
        record::{Event, Record},
        segment::{self, Segment},
    },
    verify::{Expected, Report, Walk},
};
use bytes::Bytes;

use crate::forge::{self, Before, Keys, Rewrite, Segments, Unsigned, Witness};

/// Changed objects, by their names. `None` is a removed object.
pub type Changes = BTreeMap<String, Option<Bytes>>;

/// All runs.
pub static RUNS: LazyLock<Vec<Run>> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/evidence/corpus");
    let each = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let mut runs: Vec<_> = each.filter(|path| path.is_dir()).map(|path| Run::read(&path)).collect();
    runs.sort_by(|one, other| one.name.cmp(&other.name));
    assert!(runs.len() >= 6, "{folder:?}");
    runs
});

/// A log of a real run.
pub struct Run {
    pub name: String,
    pub log: Log,
    pub before: Before,
    pub key: VerifierKey,
    /// The states of the verification, before each segment and at the end.
    walks: Vec<Walk>,
    pub story: Story,
}

/// What a log says, and a liar who writes it. The liar's keys are not the real keys, but have some of the same names.
pub struct Story {
    pub origin: String,
    pub segments: Segments,
    pub keys: Keys,
    pub witness: Signer,
    /// The possible rewrites of each record.
    pub rewrites: Vec<(usize, Rewrite)>,
}

impl Story {
    pub fn new(origin: String, segments: Segments, keys: Keys, witness: Signer) -> Self {
        let rewrites = forge::rewrites(&segments);
        Self { origin, segments, keys, witness, rewrites }
    }

    /// Replaces the keys of the attempts by the liar's keys.
    pub fn opens<'r>(&self, records: impl Iterator<Item = &'r mut Record>) {
        for record in records {
            if let (Event::AttemptOpened(opened), Some(key)) = (&mut record.event, self.keys.get(&record.attempt)) {
                opened.verifier_key = key.verifier().to_string();
            }
        }
    }

    /// Writes this story or another one, signed with the liar's keys.
    pub fn told(&self, mut segments: Segments, change: impl FnOnce(&mut [Unsigned])) -> Log {
        self.opens(segments.iter_mut().flatten());
        let mut written = forge::written(&segments);
        change(&mut written);
        let log = forge::sign(written, &self.origin, &self.keys, Witness::By(&self.witness), &Before::default());
        Log { versions: None, ..log }
    }
}

impl Run {
    fn read(folder: &Path) -> Self {
        let mut log = Log::default();
        read(folder, folder, &mut log);
        let key = std::fs::read_to_string(folder.join("witness.vkey")).unwrap().trim().parse().unwrap();
        let mut walks = vec![Walk::new(&key, &Expected::Anything)];
        let mut segments = Segments::new();
        for (name, bytes) in &log.segments {
            let mut next = walks[segments.len()].clone();
            next.segment(name, bytes);
            walks.push(next);
            segments.push(Segment::read(bytes).unwrap().1);
        }
        let opened = |record: &Record| match &record.event {
            Event::AttemptOpened(opened) => Some((record.attempt, opened.verifier_key.parse::<VerifierKey>().unwrap())),
            _ => None,
        };
        let keys = segments.iter().flatten().filter_map(opened);
        let keys = keys.map(|(attempt, key)| (attempt, Signer::generate(key.name()).unwrap())).collect();
        let first = Segment::parse(log.segments.values().next().unwrap()).unwrap();
        let origin = first.note.checkpoint().unwrap().origin;
        let story = Story::new(origin, segments, keys, Signer::generate(WITNESS_NAME).unwrap());
        Self {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            before: Before::of(&log),
            log,
            key,
            walks,
            story,
        }
    }

    /// Returns the log after these changes, and what `belay verify` says about it. This is [`verify`](belay::verify::verify), but what
    /// comes before the first changed segment has been verified already.
    pub fn verify(&self, changes: &Changes) -> (Log, Report) {
        let mut log = self.log.clone();
        for (name, change) in changes.iter().filter(|(name, _)| Log::has(name)) {
            match change {
                Some(bytes) => log.of(name).insert(name.clone(), bytes.clone()),
                None => log.of(name).remove(name),
            };
        }
        let first = changes.keys().find(|name| name.starts_with(segment::FOLDER));
        let before = |name: &String| first.is_none_or(|first| name < first);
        let known = self.log.segments.keys().take_while(|name| before(name)).count();
        let mut walk = self.walks[known].clone();
        log.segments.iter().skip(known).for_each(|(name, bytes)| walk.segment(name, bytes));
        let report = walk.finish(&log);
        (log, report)
    }
}

fn read(root: &Path, folder: &Path, log: &mut Log) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let key = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            read(root, &path, log);
        } else if Log::has(&key) {
            log.of(&key).insert(key, std::fs::read(&path).unwrap().into());
        }
    }
}
