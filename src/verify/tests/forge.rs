//! Writes logs with any set of keys, and rewrites history as a thief of keys would: the thief changes one record, makes all later records
//! fit it, and signs as far as the stolen keys allow.
//!
//! The tests of this crate forge the logs of [`script`](super::script). `e2e/evidence` includes this file for logs of real runs.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::Value;

use crate::{
    canonical,
    evidence::{
        dsse::Envelope,
        ending::{Ending, PAYLOAD_TYPE, SUMMARY},
        log::Log,
        merkle::{self, Tree},
        note::{Checkpoint, Note, Signer},
        record::{
            Actor, AttemptClosed, CallOutcome, Channel, DOCUMENTS, Denied, Encoded, Event, Intent, Outcome, Record,
            TaskClosed,
        },
        segment::Segment,
        store::{Mode, StoredObject},
    },
    policy::{
        config::{Sensitivity, SideEffect, Usage},
        rule::Rule,
    },
};

/// When the witness signs, in seconds since 1970.
const WITNESSED: u64 = 1_795_000_000;

/// A log's records, segment by segment.
pub(crate) type Segments = Vec<Vec<Record>>;

/// Keys of attempts, by their numbers.
pub(crate) type Keys = BTreeMap<i64, Signer>;

/// The witness's signature on rewritten segments.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Witness<'a> {
    /// The witness's old signature, which is over another text.
    Left,
    /// No signature.
    Dropped,
    /// Signatures by this key.
    By(&'a Signer),
}

/// A log before its history was rewritten: the notes of its segments, by their first records, and its summary.
#[derive(Default)]
pub(crate) struct Before {
    notes: BTreeMap<u64, Note>,
    summary: Option<Bytes>,
}

impl Before {
    pub(crate) fn of(log: &Log) -> Self {
        let segments = log.segments.values().map(|bytes| Segment::parse(bytes).unwrap());
        let notes = segments.map(|segment| (segment.first, segment.note)).collect();
        Self { notes, summary: log.ending.get(SUMMARY).cloned() }
    }
}

/// Numbers all records and computes their counters.
pub(crate) fn count(segments: &mut Segments) {
    let mut usage = Usage::default();
    let mut reserved = BTreeMap::new();
    for (seq, record) in segments.iter_mut().flatten().enumerate() {
        match &record.event {
            Event::Intent(intent) => {
                usage.tool_calls += i64::from(intent.channel == Channel::Tool);
                usage.tokens += intent.reserved_tokens;
                usage.cost_micros += intent.reserved_cost_micros;
                reserved.insert(intent.call.clone(), (intent.reserved_tokens, intent.reserved_cost_micros));
            }
            Event::Outcome(outcome) => {
                let (tokens, cost) = reserved.get(&outcome.call).copied().unwrap_or_default();
                usage.tokens += outcome.tokens - tokens;
                usage.cost_micros += outcome.cost_micros - cost;
            }
            Event::Denied(denied) => usage.denials += denied.count,
            _ => {}
        }
        record.seq = seq as u64;
        record.usage = usage;
    }
}

/// A segment as it is written, without its note.
pub(crate) struct Unsigned {
    actor: Actor,
    attempt: i64,
    pub(crate) entries: Vec<Encoded>,
}

/// Encodes records.
pub(crate) fn written(segments: &Segments) -> Vec<Unsigned> {
    let each = segments.iter().map(|records| Unsigned {
        actor: records[0].actor,
        attempt: records[0].attempt,
        entries: records.iter().map(|record| record.encode().unwrap()).collect(),
    });
    each.collect()
}

/// Hashes and signs segments. A segment that is unchanged keeps its signatures.
pub(crate) fn sign(segments: Vec<Unsigned>, origin: &str, keys: &Keys, witness: Witness<'_>, before: &Before) -> Log {
    let mut tree = Tree::new();
    let mut log = Log::default();
    for Unsigned { actor, attempt, entries } in segments {
        let first = tree.size();
        entries.iter().for_each(|entry| tree.push(merkle::leaf_hash(&entry.record)));
        let checkpoint = Checkpoint { origin: origin.to_owned(), size: tree.size(), root: tree.root() };
        let there = before.notes.get(&first);
        let note = match there {
            Some(note) if note.text == checkpoint.to_string() => note.clone(),
            _ => {
                let key = keys.get(&attempt).filter(|_| actor == Actor::Harness);
                let mut note = key.map_or_else(|| Note::unsigned(&checkpoint), |key| Note::sign(&checkpoint, key));
                match witness {
                    Witness::Left => note.signatures.extend(there.and_then(|there| there.signatures.last()).cloned()),
                    Witness::Dropped => {}
                    Witness::By(witness) => note.cosign(witness, WITNESSED + first),
                }
                note
            }
        };
        put(&mut log, &Segment::new(note, first, entries));
    }
    end(&mut log, if let Witness::By(witness) = witness { Ok(witness) } else { Err(before.summary.as_ref()) });
    log
}

/// Writes the tiles of the log, if it has ended. With a key it signs a new summary, without one it writes the earlier summary.
pub(crate) fn end(log: &mut Log, summary: Result<&Signer, Option<&Bytes>>) {
    let (mut ending, mut files) = (Ending::default(), Vec::new());
    for bytes in log.segments.values() {
        let Ok((segment, records)) = Segment::read(bytes) else { return };
        files.extend(ending.take(&segment, &records).unwrap());
    }
    let Some((last, statement)) = ending.finish() else { return };
    files.extend(last);
    let payload = canonical::to_bytes(&statement).unwrap();
    let summary = match summary {
        Ok(key) => Some(Envelope::sign(PAYLOAD_TYPE, &payload, key).to_bytes().unwrap()),
        Err(before) => before.map(|bytes| bytes.to_vec()),
    };
    for (key, bytes) in files.into_iter().chain(summary.map(|bytes| (SUMMARY.to_owned(), bytes))) {
        let object = stored(&key, bytes.len());
        log.versions.get_or_insert_default().push(object);
        log.ending.insert(key, bytes.into());
    }
}

/// Returns an object as a store with locks has it.
fn stored(key: &str, size: usize) -> StoredObject {
    StoredObject {
        key: key.to_owned(),
        version_id: format!("v-{key}"),
        size: size as u64,
        written: Some(jiff::Timestamp::from_second(1_795_000_000).unwrap()),
        retain_until: Some(jiff::Timestamp::from_second(1_795_086_400).unwrap()),
        mode: Some(Mode::Compliance),
        is_latest: true,
        delete_marker: false,
    }
}

/// Writes a segment in place of the one under its key.
pub(crate) fn put(log: &mut Log, segment: &Segment) {
    let (key, bytes) = (Segment::key(segment.first), Bytes::from(segment.to_bytes()));
    let versions = log.versions.get_or_insert_default();
    versions.retain(|v| v.key != key);
    versions.push(stored(&key, bytes.len()));
    log.segments.insert(key, bytes);
}

/// A change to a record. The numbers and counters that follow are recomputed, unless the change is a lie about numbers and counters.
#[derive(Clone, Debug)]
pub(crate) enum Rewrite {
    /// A value in the record, or in a document that it names, is changed.
    Changed(String),
    /// An optional member or item is left out.
    LeftOut(String),
    /// The record is removed.
    Removed,
    /// The record is repeated.
    Repeated,
    /// The record and the next one are swapped.
    Swapped,
    /// An applied call is shown as not applied, and any other call as applied.
    Flipped,
    /// A denied call is shown as made.
    Allowed,
    /// A call that was made is shown as denied.
    Refused,
    /// From this record on, less is shown as used.
    Lowered,
    /// The task is shown as succeeded after this record, and the rest is removed.
    Ended,
}

/// Words with a meaning. Each is replaced by another word of its line.
const WORDS: [&[&str]; 7] = [
    &["applied", "not_applied", "unknown"],
    &["read", "write", "external"],
    &["tool", "listing", "model", "egress"],
    &["pending", "approved", "denied", "expired"],
    &["contract", "pack"],
    &["approve", "deny"],
    &["harness", "gateway"],
];

/// Returns another value of the same type.
fn another(value: &Value) -> Option<Value> {
    Some(match value {
        Value::Bool(flag) => (!flag).into(),
        Value::Number(number) => number.as_i64().map(|n| if n > 0 { n - 1 } else { n + 1 })?.into(),
        Value::String(text) => {
            let word = WORDS.iter().find_map(|words| {
                let at = words.iter().position(|word| word == text)?;
                Some(words[(at + 1) % words.len()].to_owned())
            });
            // Changes the last digit, so that names stay names, times stay times, and digests stay digests.
            let digit = || {
                let at = text.rfind(|c: char| c.is_ascii_digit())?;
                let digit = if text[at..].starts_with('1') { "2" } else { "1" };
                Some([&text[..at], digit, &text[at + 1..]].concat())
            };
            word.or_else(digit).unwrap_or_else(|| format!("{text}x")).into()
        }
        _ => return None,
    })
}

/// Returns the record as JSON, with its documents in the place of their digests, in the form from which [`Record`] is read.
fn whole(record: &Record) -> Value {
    let mut value = serde_json::to_value(record).unwrap();
    let documents = record.encode().unwrap().documents;
    let named: Vec<_> = DOCUMENTS.iter().filter(|name| value.get(name).is_some()).collect();
    for (name, document) in named.into_iter().zip(documents) {
        value[name] = serde_json::from_slice(&document).unwrap();
    }
    value
}

/// Collects JSON Pointers to everything in a value.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    let mut inner = |name: &str, value: &Value| {
        let at = format!("{at}/{}", name.replace('~', "~0").replace('/', "~1"));
        found.push(at.clone());
        pointers(value, &at, found);
    };
    match value {
        Value::Object(members) => members.iter().for_each(|(name, value)| inner(name, value)),
        Value::Array(items) => items.iter().enumerate().for_each(|(n, item)| inner(&n.to_string(), item)),
        _ => {}
    }
}

/// Returns every change that is possible for each record.
pub(crate) fn rewrites(segments: &Segments) -> Vec<(usize, Rewrite)> {
    let each = segments.iter().flatten().enumerate().flat_map(|(at, record)| {
        let mut within = Vec::new();
        pointers(&whole(record), "", &mut within);
        let whole = [
            Rewrite::Removed,
            Rewrite::Repeated,
            Rewrite::Swapped,
            Rewrite::Flipped,
            Rewrite::Allowed,
            Rewrite::Refused,
            Rewrite::Lowered,
            Rewrite::Ended,
        ];
        let within = within.into_iter().flat_map(|path| [Rewrite::Changed(path.clone()), Rewrite::LeftOut(path)]);
        within.chain(whole).map(move |rewrite| (at, rewrite)).collect::<Vec<_>>()
    });
    each.filter(|(at, rewrite)| rewritten(segments, *at, rewrite).is_some()).collect()
}

/// Returns the records after a change to the record at `at`. `None` if the change is not possible or changes nothing.
pub(crate) fn rewritten(segments: &Segments, at: usize, rewrite: &Rewrite) -> Option<Segments> {
    let (segment, place) = position(segments, at)?;
    let record = &segments[segment][place];
    let with = |event| Record { event, ..record.clone() };
    // Clones only if needed, because most changes are not possible for most records, and a log is long.
    let changed = |record: Record| {
        let mut segments = segments.clone();
        segments[segment][place] = record;
        segments
    };
    let mut rewritten = match rewrite {
        Rewrite::Changed(path) => {
            let mut value = whole(record);
            let of = value.pointer_mut(path)?;
            *of = another(of)?;
            changed(serde_json::from_value(value).ok()?)
        }
        Rewrite::LeftOut(path) => {
            let mut value = whole(record);
            let (within, name) = path.rsplit_once('/')?;
            match value.pointer_mut(within)? {
                Value::Array(items) => drop(items.remove(name.parse().ok()?)),
                within => drop(within.as_object_mut()?.remove(&name.replace("~1", "/").replace("~0", "~"))),
            }
            changed(serde_json::from_value(value).ok()?)
        }
        Rewrite::Flipped => {
            let Event::Outcome(outcome) = &record.event else { return None };
            let effect =
                if outcome.outcome == CallOutcome::Applied { CallOutcome::NotApplied } else { CallOutcome::Applied };
            changed(with(Event::Outcome(Outcome { outcome: effect, ..outcome.clone() })))
        }
        Rewrite::Allowed => {
            let Event::Denied(denied) = &record.event else { return None };
            let call = format!("thief-{at}");
            let mut segments = changed(with(Event::Intent(allowed(denied, &call))));
            segments[segment].insert(place + 1, with(Event::Outcome(done(call))));
            segments
        }
        Rewrite::Refused => {
            let Event::Intent(intent) = &record.event else { return None };
            let mut segments = changed(with(Event::Denied(refused(intent))));
            let its = |record: &Record| matches!(&record.event, Event::Outcome(of) if of.call == intent.call);
            segments.iter_mut().for_each(|records| records.retain(|record| !its(record)));
            segments
        }
        Rewrite::Swapped => {
            let (other, there) = position(segments, at + 1)?;
            let mut segments = changed(segments[other][there].clone());
            segments[other][there] = record.clone();
            segments
        }
        Rewrite::Repeated => {
            let mut segments = segments.clone();
            segments[segment].insert(place, record.clone());
            segments
        }
        Rewrite::Removed => {
            // A log without its last record is a log that still goes on.
            position(segments, at + 1)?;
            let mut segments = segments.clone();
            segments[segment].remove(place);
            segments
        }
        Rewrite::Lowered => {
            let mut segments = segments.clone();
            for Record { usage, .. } in segments.iter_mut().flatten().skip(at) {
                for counter in [&mut usage.tool_calls, &mut usage.tokens, &mut usage.denials, &mut usage.cost_micros] {
                    *counter -= i64::from(*counter > 0);
                }
            }
            segments
        }
        Rewrite::Ended => {
            position(segments, at + 1)?;
            let mut segments = segments[..=segment].to_vec();
            segments[segment].truncate(place + 1);
            if !matches!(record.event, Event::AttemptClosed(_)) {
                let reason = "agentEnded".to_owned();
                segments.push(vec![with(Event::AttemptClosed(AttemptClosed { reason }))]);
            }
            segments.push(vec![Record { actor: Actor::Gateway, ..with(Event::TaskClosed(well())) }]);
            segments
        }
    };
    rewritten.retain(|records| !records.is_empty());
    let is_lie = match rewrite {
        Rewrite::Changed(path) => path == "/seq" || path.starts_with("/usage"),
        Rewrite::LeftOut(path) => path.starts_with("/usage"),
        Rewrite::Lowered => true,
        _ => false,
    };
    if !is_lie {
        count(&mut rewritten);
    }
    (rewritten != *segments).then_some(rewritten)
}

/// Returns the segment of a record, and the record's place in it.
pub(crate) fn position(segments: &Segments, at: usize) -> Option<(usize, usize)> {
    segments.iter().enumerate().flat_map(|(n, records)| (0..records.len()).map(move |place| (n, place))).nth(at)
}

fn allowed(denied: &Denied, call: &str) -> Intent {
    Intent {
        call: call.to_owned(),
        channel: denied.channel,
        target: denied.target.clone(),
        side_effect: (denied.channel == Channel::Tool).then_some(SideEffect::Read),
        definition_digest: None,
        request_commitment: denied.request_commitment.clone(),
        request_bytes: 2,
        rules: vec![],
        idempotency_key: None,
        approvals: vec![],
        compensates: None,
        assessment: None,
        model: None,
        reserved_tokens: 0,
        reserved_cost_micros: 0,
    }
}

fn done(call: String) -> Outcome {
    Outcome {
        call,
        outcome: CallOutcome::Applied,
        rule: None,
        status: 200,
        response_commitment: None,
        response_bytes: 2,
        sent_bytes: None,
        tokens: 0,
        cost_micros: 0,
        upstream: None,
        certificate: None,
        sensitivity: Sensitivity::default(),
        compensation_commitment: None,
    }
}

fn refused(intent: &Intent) -> Denied {
    Denied {
        channel: intent.channel,
        target: intent.target.clone(),
        rule: Rule::ToolPrecondition,
        reason: "it was refused, says the thief".to_owned(),
        request_commitment: intent.request_commitment.clone(),
        count: 1,
    }
}

fn well() -> TaskClosed {
    TaskClosed {
        phase: "Succeeded".to_owned(),
        failure_class: String::new(),
        reason: "Completed".to_owned(),
        exit_code: Some(0),
        images: Default::default(),
    }
}
