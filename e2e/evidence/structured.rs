//! Mutants that are made from the parts of a log: records, JSON, numbers, times, names, versions, segments, notes, summaries and objects,
//! each changed at random. Their author has all keys and signs everything, so that signatures alone find nothing. A mutant that one
//! verifier accepts and the other does not shows up.
//!
//! `BELAY_STRUCTURED` is the number of mutants, 400 by default. `BELAY_SEED` chooses them: the same seed makes the same mutants. `make
//! fuzz` makes 5,000.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use belay::{
    canonical,
    evidence::{
        log::Log,
        note::VerifierKey,
        record::{DOCUMENTS, Event},
        segment::Segment,
    },
    verify::{Check, Expected, Report, Verdict, Weight, verify},
};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::{
    forge::{self, Unsigned},
    halves, rich,
    runs::{RUNS, Story},
    say,
    script::{self, Script},
};

/// Longest time of a verifier for a log of a few hundred records. More is a hang, not a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// SplitMix64, which is the same on every machine.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, most: usize) -> usize {
        (self.roll() % most.max(1) as u64) as usize
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

/// Makes a mutant and describes it, or returns `None` if the change does not apply.
type Deed = fn(&Story, &mut Dice) -> Option<(String, Log)>;

const KINDS: [(&str, Deed); 12] = [
    ("a value of a record", value),
    ("a member of a record", member),
    ("records in their order", order),
    ("a number", number),
    ("a time", time),
    ("a name", name),
    ("a version", version),
    ("a document", document),
    ("JSON as it is written", raw),
    ("a segment", segment),
    ("a note", note),
    ("an object", object),
];

/// Writes the story after `change` has changed its written segments.
fn told(story: &Story, change: impl FnOnce(&mut [Unsigned])) -> Log {
    story.told(story.segments.clone(), change)
}

/// Picks a record at random. Returns its segment, its place and its JSON.
fn pick(story: &Story, dice: &mut Dice) -> (usize, usize, Value) {
    let all: usize = story.segments.iter().map(Vec::len).sum();
    let (segment, place) = forge::position(&story.segments, dice.below(all)).unwrap();
    let bytes = story.segments[segment][place].encode().unwrap().record;
    (segment, place, serde_json::from_slice(&bytes).unwrap())
}

/// Finds every place in a value, as JSON Pointers.
pub fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Object(members) => members.iter().for_each(|(name, value)| {
            places(value, &format!("{at}/{}", name.replace('~', "~0").replace('/', "~1")), found);
        }),
        Value::Array(items) => items.iter().enumerate().for_each(|(n, item)| places(item, &format!("{at}/{n}"), found)),
        _ => {}
    }
}

fn place(value: &Value, dice: &mut Dice, fits: impl Fn(&Value) -> bool) -> Option<String> {
    let mut all = Vec::new();
    places(value, "", &mut all);
    all.retain(|at| !at.is_empty() && fits(value.pointer(at).unwrap()));
    (!all.is_empty()).then(|| dice.one(&all).clone())
}

/// Writes the story with another record in this place.
fn with(story: &Story, (segment, place): (usize, usize), record: &Value) -> Log {
    let bytes = canonical::to_bytes(record).unwrap();
    with_bytes(story, (segment, place), bytes)
}

fn with_bytes(story: &Story, (segment, place): (usize, usize), bytes: Vec<u8>) -> Log {
    told(story, |written| written[segment].entries[place].record = bytes)
}

const NUMBERS: [&str; 24] = [
    "0",
    "1",
    "-1",
    "255",
    "256",
    "999",
    "65535",
    "65536",
    "2147483647",
    "2147483648",
    "-2147483648",
    "-2147483649",
    "4294967295",
    "4294967296",
    "9007199254740990",
    "9007199254740991",
    "9007199254740992",
    "9007199254740994",
    "-9007199254740991",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "0.5",
];

/// Returns an unusual number, as a JSON parser reads it.
fn odd_number(dice: &mut Dice) -> Value {
    let text: &&str = dice.one(&NUMBERS);
    serde_json::from_str(text).unwrap()
}

fn odd_value(dice: &mut Dice) -> Value {
    match dice.below(9) {
        0 => Value::Null,
        1 => true.into(),
        2 => odd_number(dice),
        3 => "".into(),
        4 => "a\u{0}\u{7f}\u{feff}\u{202e}\u{1f600}".into(),
        5 => json!([]),
        6 => json!({}),
        7 => json!({"kind": "call.intent", "v": 2}),
        _ => "x".repeat(dice.below(300)).into(),
    }
}

fn value(story: &Story, dice: &mut Dice) -> Option<(String, Log)> {
    let (segment, at, mut record) = pick(story, dice);
    let pointer = place(&record, dice, |_| true)?;
    let odd = odd_value(dice);
    let what = format!("{segment}.{at}{pointer} = {odd}");
    *record.pointer_mut(&pointer)? = odd;
    Some((what, with(story, (segment, at), &record)))
}

fn member(story: &Story, dice: &mut Dice) -> Option<(String, Log)> {
    let (segment, at, mut record) = pick(story, dice);
    let mut all = vec![String::new()];
    all.extend(place(&record, dice, Value::is_object));
    let within = dice.one(&all).clone();
    let members = record.pointer_mut(&within)?.as_object_mut()?;
    let names: Vec<String> = members.keys().cloned().collect();
    let name = if names.is_empty() { "a".to_owned() } else { dice.one(&names).clone() };
    let what = match dice.below(4) {
        0 => {
            members.remove(&name);
            format!("without {within}/{name}")
        }
        1 => {
            let value = members.remove(&name)?;
            members.insert(format!("{name}s"), value);
            format!("{within}/{name} renamed")
        }
        2 => {
            let new = *dice.one(&[
                "more",
                "costMicros",
                "rule",
                "breaches",
                "rules",
                "reservedCostMicros",
                "count",
                "v",
                "é",
                "",
            ]);
            let odd = odd_value(dice);
            let what = format!("{within}/{new} = {odd} added");
            members.insert(new.to_owned(), odd);
            what
        }
        _ => {
            let others = pick(story, dice).2;
            let from = place(&others, dice, |_| true)?;
            let value = others.pointer(&from)?.clone();
            members.insert(name.clone(), value);
            format!("{within}/{name} is another record's {from}")
        }
    };
    Some((format!("{segment}.{at}: {what}"), with(story, (segment, at), &record)))
}

fn order(story: &Story, dice: &mut Dice) -> Option<(String, Log)> {
    let mut segments = story.segments.clone();
    let all: usize = segments.iter().map(Vec::len).sum();
    let (one, other) = (dice.below(all), dice.below(all));
    let (from, to) = (forge::position(&segments, one)?, forge::position(&segments, other)?);
    let deed = dice.below(5);
    match deed {
        0 => {
            let record = segments[from.0][from.1].clone();
            segments[to.0].insert(to.1, record);
        }
        1 => drop(segments[from.0].remove(from.1)),
        2 => {
            let record = segments[from.0].remove(from.1);
            segments.insert(to.0, vec![record]);
        }
        3 if from.0 + 1 < segments.len() => {
            let next = segments.remove(from.0 + 1);
            segments[from.0].extend(next);
        }
        _ => {
            let rest = segments[from.0].split_off(from.1);
            segments.insert(from.0 + 1, rest);
        }
    }
    segments.retain(|records| !records.is_empty());
    // Half of the mutants have correct counters and sequence numbers.
    if dice.below(2) == 0 {
        forge::count(&mut segments);
    }
    Some((format!("{deed}: {one} and {other}"), story.told(segments, |_| {})))
}

fn number(story: &Story, dice: &mut Dice) -> Option<(String, Log)> {
    let (segment, at, mut record) = pick(story, dice);
    let pointer = place(&record, dice, Value::is_number)?;
    let odd = odd_number(dice);
    let what = format!("{segment}.{at}{pointer} = {odd}");
    *record.pointer_mut(&pointer)? = odd;
    Some((what, with(story, (segment, at), &record)))
}

const TIMES: [&str; 26] = [
    "1970-01-01T00:00:00.000Z",
    "1969-12-31T23:59:59.999Z",
    "9998-12-31T23:59:59.999Z",
    "9999-01-01T00:00:00.000Z",
    "9999-12-30T22:00:00.000Z",
    "9999-12-31T23:59:59.999Z",
    "0000-01-01T00:00:00.000Z",
    "0001-01-01T00:00:00.000Z",
    "+010000-01-01T00:00:00.000Z",
    "-000001-01-01T00:00:00.000Z",
    "2016-12-31T23:59:60.000Z",
    "2026-11-26T23:59:60.000Z",
    "2026-11-26T24:00:00.000Z",
    "2026-02-29T00:00:00.000Z",
    "2024-02-29T00:00:00.000Z",
    "2026-13-01T00:00:00.000Z",
    "2026-00-01T00:00:00.000Z",
    "2026-11-26T21:00:00.000+00:00",
    "2026-11-26t21:00:00.000z",
    "2026-11-26 21:00:00.000Z",
    "2026-11-26T21:00:00Z",
    "2026-11-26T21:00:00.123456789Z",
    "2026-11-26T21:00Z",
    "２０２６-11-26T21:00:00.000Z",
    "2026-11-26T21:00:00.000Z\n",
    "",
];

fn time(story: &Story, dice: &mut Dice) -> Option<(String, Log)> {
    let (segment, at, mut record) = pick(story, dice);
    let named = if record.get("expires").is_some() && dice.below(2) == 0 { "expires" } else { "time" };
    let odd = *dice.one(&TIMES);
    record[named] = odd.into();
    Some((format!("{segment}.{at}/{named} = {odd:?}"), with(story, (segment, at), &record)))
}

const NAMES: [&str; 22] = [
    "tool.later",
    "later",
    "a.b.c",
    "0",
    "",
    "tool_later",
    "tool later",
    "tool.späte",
    "x\u{200b}",
    "belay.dev/task/other/1",
    "Tool",
    "tool",
    "write",
    "Write",
    "not_applied",
    "notApplied",
    "unknown",
    "Restricted",
    "Contract",
    "task.closed",
    "call.intent",
    "gateway",
];

fn name(story: &Story, dice: &mut Dice) -> Option<(String, Log)> {
    let (segment, at, mut record) = pick(story, dice);
    let pointer = place(&record, dice, Value::is_string)?;
    let old = record.pointer(&pointer)?.as_str()?.to_owned();
    let new = match dice.below(6) {
        0 => old.to_uppercase(),
        1 => format!("{old} "),
        2 => format!("{old}\u{301}"),
        3 => old.chars().rev().collect(),
        4 => "f".repeat(64),
        _ => (*dice.one(&NAMES)).to_owned(),
    };
    let what = format!("{segment}.{at}{pointer}: {old:?} = {new:?}");
    *record.pointer_mut(&pointer)? = new.into();
    Some((what, with(story, (segment, at), &record)))
}

/// Gives a record another version, true or not. The rest of a record of a later version may have another form.
fn version(story: &Story, dice: &mut Dice) -> Option<(String, Log)> {
    let (segment, at, record) = pick(story, dice);
    let versions =
        ["2", "3", "255", "256", "300", "9007199254740991", "9007199254740992", "0", "-2", "2.5", "\"2\"", "null"];
    let v: &&str = dice.one(&versions);
    let v: Value = serde_json::from_str(v).unwrap();
    let how = dice.below(6);
    let mut later = record.clone();
    later["v"] = v.clone();
    match how {
        0 => {}
        1 => later["kind"] = "call.paused".into(),
        2 => later["more"] = json!({"deep": [1, 2.5, null]}),
        3 => drop(later.as_object_mut()?.remove("usage")),
        4 => later = json!({"v": v, "seq": record["seq"]}),
        _ => later = json!({"v": v}),
    }
    Some((format!("{segment}.{at}: {how} of version {v}"), with(story, (segment, at), &later)))
}

/// Replaces the policy or the plan of an attempt, in most cases with its own digest.
fn document(story: &Story, dice: &mut Dice) -> Option<(String, Log)> {
    let openings = story.segments.iter().enumerate().filter(|(_, of)| matches!(of[0].event, Event::AttemptOpened(_)));
    let opening = *dice.one(&openings.map(|(n, _)| n).collect::<Vec<_>>());
    let entry = story.segments[opening][0].encode().unwrap();
    let which = dice.below(entry.documents.len());
    let mut document: Value = serde_json::from_slice(&entry.documents[which]).unwrap();
    let nested = |depth: usize| (0..depth).fold(json!(1), |inner, _| json!([inner]));
    let how = dice.below(8);
    let what = match how {
        0 => {
            document["later"] = json!({"a": true});
            "another member".to_owned()
        }
        1 => {
            let pointer = place(&document, dice, Value::is_object)?;
            document.pointer_mut(&pointer)?["later"] = true.into();
            format!("another member in {pointer}")
        }
        2 => {
            let pointer = place(&document, dice, |_| true)?;
            let odd = odd_value(dice);
            let what = format!("{pointer} = {odd}");
            *document.pointer_mut(&pointer)? = odd;
            what
        }
        3 => {
            let pointer = place(&document, dice, Value::is_number)?;
            let odd = odd_number(dice);
            let what = format!("{pointer} = {odd}");
            *document.pointer_mut(&pointer)? = odd;
            what
        }
        4 => {
            // The policy, its list of tools, a tool and its schema are levels, too.
            let depth = *dice.one(&[1, 90, 95, 96, 97, 98, 120, 122, 123]);
            let within = if which == 0 { "/tools/0/input" } else { "/steps/0" };
            document.pointer_mut(within)?.as_object_mut()?.insert("x".into(), nested(depth));
            format!("{depth} levels deep in a schema")
        }
        5 => {
            document = nested(*dice.one(&[1, 99, 100, 101]));
            "a list".to_owned()
        }
        6 => {
            document = json!({});
            "empty".to_owned()
        }
        _ => {
            *document.pointer_mut(if which == 0 { "/task/uid" } else { "/origin" })? = "other".into();
            "another task's".to_owned()
        }
    };
    let bytes = canonical::to_bytes(&document).ok()?;
    let keeps_digest = dice.below(8) == 0;
    let log = told(story, |written| {
        let entry = &mut written[opening].entries[0];
        let mut record: Value = serde_json::from_slice(&entry.record).unwrap();
        if !keeps_digest {
            record[DOCUMENTS[which]] = hex::encode(canonical::sha256(&bytes)).into();
        }
        entry.record = canonical::to_bytes(&record).unwrap();
        entry.documents[which] = bytes;
    });
    Some((format!("{how}: {what}, by the digest of another: {keeps_digest}"), log))
}

/// Writes JSON in another form, or something that is not JSON.
fn raw(story: &Story, dice: &mut Dice) -> Option<(String, Log)> {
    let (segment, at, record) = pick(story, dice);
    let text = canonical::to_bytes(&record).unwrap();
    let inside = |text: &[u8], with: &[u8]| [&text[..1], with, &text[1..]].concat();
    let numbers = [
        "-0",
        "0.0",
        "1e2",
        "1E2",
        "1e-2",
        "01",
        "+1",
        "1.",
        ".5",
        "0x1",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        "-1e400",
        "9007199254740993",
        "18446744073709551617",
        "1_000",
        "１",
    ];
    let how = dice.below(20);
    let (what, bytes) = match how {
        0 => ("a byte order mark".to_owned(), [b"\xef\xbb\xbf".as_slice(), &text].concat()),
        1 => ("a space".to_owned(), inside(&text, b" ")),
        2 => ("a member twice".to_owned(), inside(&text, b"\"v\":1,")),
        3 => ("a member twice, by an escape".to_owned(), inside(&text, b"\"\\u0076\":1,")),
        4 => ("half of a pair".to_owned(), inside(&text, b"\"a\":\"\\ud800\",")),
        5 => ("halves the wrong way round".to_owned(), inside(&text, b"\"a\":\"\\udc00\\ud800\",")),
        6 => ("bytes that are no UTF-8".to_owned(), inside(&text, b"\"a\":\"\xff\xfe\",")),
        7 => ("an escape that need not be".to_owned(), inside(&text, b"\"a\":\"\\/\\u0041\",")),
        8 => ("a raw control".to_owned(), inside(&text, b"\"a\":\"\x01\",")),
        9 => (
            "something behind it".to_owned(),
            [text.as_slice(), dice.one(&[" ", "\r", "\0", "{}", ",", "}"]).as_bytes()].concat(),
        ),
        10 => ("a comma at its end".to_owned(), [&text[..text.len() - 1], b",}"].concat()),
        11 => {
            let depth = *dice.one(&[50_usize, 99, 100, 101, 126, 127, 128, 1000, 20_000]);
            let deep = ["[".repeat(depth), "]".repeat(depth)].concat();
            (format!("{depth} levels"), inside(&text, format!("\"a\":{deep},").as_bytes()))
        }
        12 => {
            let depth = 30_000;
            (format!("{depth} levels that are not closed"), "[".repeat(depth).into_bytes())
        }
        13 => {
            let most = *dice.one(&[65_535_usize, 65_536, 70_000]);
            let mut long = record.clone();
            let named = if long.get("reason").is_some() { "reason" } else { "kind" };
            let more = most.saturating_sub(text.len());
            long[named] = format!("{}{}", long[named].as_str()?, "x".repeat(more)).into();
            (format!("{most} bytes"), canonical::to_bytes(&long).unwrap())
        }
        14 => (format!("{} digits", 5_000), inside(&text, format!("\"a\":{},", "9".repeat(5_000)).as_bytes())),
        15 => ("no object".to_owned(), dice.one(&["[]", "1", "null", "\"a\"", "", "true", "{}"]).as_bytes().to_vec()),
        16 => ("names in another order".to_owned(), [b"{\"v\":1,".as_slice(), &text[1..text.len() - 7], b"}"].concat()),
        _ => {
            let number = *dice.one(&numbers);
            let text = String::from_utf8(text).unwrap();
            let named =
                format!("\"{}\":", dice.one(&["seq", "attempt", "v", "tokens", "toolCalls", "status", "requestBytes"]));
            let start = text.find(&named)? + named.len();
            let end = start + text[start..].find(|c: char| !c.is_ascii_digit())?;
            (format!("{named}{number}"), format!("{}{number}{}", &text[..start], &text[end..]).into_bytes())
        }
    };
    Some((format!("{segment}.{at}: {how}: {what}"), with_bytes(story, (segment, at), bytes)))
}

/// Changes the lines of a segment. No signature covers the lines, only what they contain.
fn segment(story: &Story, dice: &mut Dice) -> Option<(String, Log)> {
    let mut log = told(story, |_| {});
    let keys: Vec<String> = log.segments.keys().cloned().collect();
    let key = dice.one(&keys).clone();
    let text = String::from_utf8(log.segments[&key].to_vec()).unwrap();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let how = dice.below(14);
    let joined = |lines: &[String]| lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    let new = match how {
        0 => String::new(),
        1 => "\n".to_owned(),
        2 => text.trim_end().to_owned(),
        3 => format!("{text}\n"),
        4 => text.replace('\n', "\r\n"),
        5 => joined(&lines[..1]),
        6 => {
            lines[0] = lines[0].replacen('{', "{\"a\":1,", 1);
            joined(&lines)
        }
        7 => {
            lines[0] = lines[0].replacen('}', ",\"documents\":[]}", 1);
            joined(&lines)
        }
        8 => {
            lines[0] = lines[0].replacen("\"documents\":[", "\"documents\":[\"00\",", 1);
            joined(&lines)
        }
        9 => {
            let at = dice.below(lines.len());
            lines.insert(at, "{}".to_owned());
            joined(&lines)
        }
        10 => format!("\u{feff}{text}"),
        11 => joined(&lines[1..]),
        12 => text.repeat(2),
        _ => {
            lines[0] = dice.one(&["[]", "{}", "null", "{\"checkpoint\":1}", "{\"checkpoint\":\"\"}", "1"]).to_string();
            joined(&lines)
        }
    };
    if new == text {
        return None;
    }
    log.segments.insert(key.clone(), Bytes::from(new));
    Some((format!("{how}: {key}"), log))
}

/// Changes the signatures of a segment's note.
fn note(story: &Story, dice: &mut Dice) -> Option<(String, Log)> {
    let mut log = told(story, |_| {});
    let keys: Vec<String> = log.segments.keys().cloned().collect();
    let key = dice.one(&keys).clone();
    let mut segment = Segment::parse(&log.segments[&key]).unwrap();
    let how = dice.below(8);
    let signatures = &mut segment.note.signatures;
    match how {
        0 => signatures.reverse(),
        1 => drop(signatures.pop()),
        2 => drop(signatures.remove(0)),
        3 => {
            let first = signatures[0].clone();
            signatures.push(first);
        }
        4 => {
            let first = signatures[0].clone();
            signatures.extend(std::iter::repeat_n(first, 15));
        }
        5 => {
            let others = Segment::parse(&log.segments[dice.one(&keys)]).unwrap();
            *signatures = others.note.signatures;
        }
        6 => {
            let header = String::from_utf8(log.segments[&key].to_vec()).unwrap();
            let other = *dice.one(&[
                ("\\n\\n", "\\n"),
                ("\\n\\n", "\\n\\n\\n"),
                ("— ", "- "),
                ("— ", "—  "),
                ("==", "="),
                ("=\\n", "\\n"),
            ]);
            let changed = header.replacen(other.0, other.1, 1);
            if changed == header {
                return None;
            }
            log.segments.insert(key.clone(), changed.into_bytes().into());
            return Some((format!("{how}: {key}: {other:?}"), log));
        }
        _ => segment.note.text = segment.note.text.replace("belay.dev/task/", "belay.dev/tasks/"),
    }
    log.segments.insert(key.clone(), segment.to_bytes().into());
    Some((format!("{how}: {key}"), log))
}

/// Adds, removes or changes an object.
fn object(story: &Story, dice: &mut Dice) -> Option<(String, Log)> {
    let mut log = told(story, |_| {});
    let keys: Vec<String> = log.objects().map(|(key, _)| key.to_owned()).collect();
    let key = dice.one(&keys).clone();
    let bytes = log.of(&key)[&key].clone();
    let odd = [
        "segments/.hidden",
        "segments/a\\b",
        "segments/.d/x",
        "segments/",
        "segments/0.jsonl",
        "segments/00000000000.jsonl",
        "segments/0000009999.jsonl",
        "segments/0000000000.jsonl ",
        "segments/0000000000.JSONL",
        "segments/-000000001.jsonl",
        "segments/٠٠٠٠٠٠٠٠٠٠.jsonl",
        "segments/99999999999999999999.jsonl",
        "segments/\u{200b}",
        "tlog/.x",
        "tlog/tile/.y",
        "tlog/tile/0/000",
        "tlog/tile/0/x000/000",
        "tlog/tile/8/000",
        "tlog/tile/data/000",
        "incidents/.z",
        "incidents/x.json",
        "incidents/",
        "summary.dsse.json/x",
        "summary.dsse.json.",
        "rollback/c1.0",
        "notes.txt",
        "witness.vkey",
        "..",
        "segments/../x",
    ];
    let how = dice.below(8);
    let what = match how {
        0 => {
            log.of(&key).remove(&key);
            "gone".to_owned()
        }
        1 | 2 => {
            let name = *dice.one(&odd);
            if !Log::has(name) {
                return None;
            }
            let content = if dice.below(2) == 0 { bytes } else { Bytes::from_static(b"x") };
            log.of(name).insert(name.to_owned(), content);
            format!("{name:?} is there")
        }
        3 => {
            let content = Bytes::from(odd_value(dice).to_string());
            let name = format!("incidents/{}.json", hex::encode(canonical::sha256(&content)));
            log.incidents.insert(name, content);
            "an incident".to_owned()
        }
        4 => {
            log.of(&key).insert(key.clone(), Bytes::new());
            "empty".to_owned()
        }
        5 => {
            let mut more = bytes.to_vec();
            more.push(*dice.one(b"\n \0x"));
            log.of(&key).insert(key.clone(), more.into());
            "longer".to_owned()
        }
        6 => {
            let mut changed = bytes.to_vec();
            let at = dice.below(changed.len());
            *changed.get_mut(at)? ^= 1 << dice.below(8);
            log.of(&key).insert(key.clone(), changed.into());
            format!("bit of byte {at}")
        }
        _ => {
            // Changes one member of the summary's envelope.
            let summary = log.ending.get("summary.dsse.json")?.clone();
            let mut envelope: Value = serde_json::from_slice(&summary).ok()?;
            let pointer = place(&envelope, dice, |_| true)?;
            let value = odd_value(dice);
            let what = format!("{pointer} = {value}");
            *envelope.pointer_mut(&pointer)? = value;
            let mut text = canonical::to_bytes(&envelope).ok()?;
            text.push(b'\n');
            log.ending.insert("summary.dsse.json".to_owned(), text.into());
            what
        }
    };
    Some((format!("{how}: {key}: {what}"), log))
}

/// Returns the report of `belay verify`, which must neither panic nor hang.
pub fn first(log: &Log, key: &VerifierKey, what: &str) -> Report {
    let begun = Instant::now();
    let report = catch_unwind(AssertUnwindSafe(|| verify(log, key, &Expected::Anything)));
    assert!(begun.elapsed() < PATIENCE, "{what}: {:?}", begun.elapsed());
    report.unwrap_or_else(|_| panic!("belay verify has panicked over {what}"))
}

/// Returns whether the verdicts differ only in what the format leaves to `belay verify`: whether the policy's patterns and expressions
/// compile, and the values of those that do not depend on the arguments.
pub fn is_said(report: &Report, second: &str, log: &Log) -> bool {
    let mut texts = Vec::new();
    for bytes in log.segments.values() {
        for document in Segment::parse(bytes).map(|segment| segment.documents).unwrap_or_default() {
            let access = serde_json::from_slice::<Value>(&document).unwrap()["access"].take();
            let each = ["classification", "rules"].map(|name| access[name].clone());
            for one in each.iter().chain([&access["risk"]["terms"]]).filter_map(Value::as_array).flatten() {
                texts.extend([&one["pattern"], &one["when"]].into_iter().filter_map(Value::as_str).map(str::to_owned));
            }
        }
    }
    let may = |rule: Check| match rule {
        Check::AttemptPolicy => !texts.is_empty(),
        Check::CallAccess => texts.iter().any(|text| !text.contains("args")),
        _ => false,
    };
    let mut broken = report.findings.iter().filter(|finding| finding.weight == Weight::Broken);
    report.verdict == Verdict::Invalid && ["VALID", "INCOMPLETE"].contains(&second) && broken.all(|one| may(one.rule))
}

#[test]
fn structured_mutants_are_judged_alike() {
    let number = |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (count, seed) = (number("BELAY_STRUCTURED", 400), number("BELAY_SEED", 21));
    let scripts = [Script::good(), script::resolved()].map(|script| {
        Story::new(belay::evidence::note::origin(script::UID), script.segments, script.keys, script.witness)
    });
    let riches = [&*rich::TASK, &*rich::ROLLBACK];
    let stories: Vec<&Story> = RUNS.iter().map(|run| &run.story).chain(&scripts).chain(riches).collect();
    let begun = Instant::now();
    let counted = halves(|half, second| {
        let mut counted = BTreeMap::<(&str, String, String), usize>::new();
        let mut wrong = Vec::new();
        for turn in (half as u64..count).step_by(2) {
            let mut dice = Dice(seed.wrapping_mul(0x1_0000_0001).wrapping_add(turn));
            let (kind, deed) = KINDS[turn as usize / 2 % KINDS.len()];
            // Some changes do not apply to some records.
            let (story, what, log) = loop {
                let story = *dice.one(&stories);
                if let Some((what, log)) = deed(story, &mut dice) {
                    break (story, what, log);
                }
            };
            let what = format!("seed {seed}, mutant {turn}: {kind}: {what}");
            let key = story.witness.verifier();
            let report = first(&log, &key, &what);
            let (verdict, findings) = second.verdict(&log, &key);
            let said = report.verdict.to_string();
            let alike = said == verdict;
            if !alike && !is_said(&report, &verdict, &log) {
                wrong.push(format!(
                    "{what}: belay says {said}, the second {verdict}: {findings}: {:#?}",
                    report.findings
                ));
            }
            let other = if alike { "the same".to_owned() } else { format!("{verdict}, but for an expression") };
            *counted.entry((kind, said, other)).or_default() += 1;
        }
        (counted, wrong)
    });
    let (mut sum, mut wrong) = (BTreeMap::new(), Vec::new());
    for (counted, more) in counted {
        counted.into_iter().for_each(|(key, count)| *sum.entry(key).or_insert(0) += count);
        wrong.extend(more);
    }
    say(format_args!("{count} structured mutants, seed {seed}, {} s", begun.elapsed().as_secs()));
    sum.iter().for_each(|((kind, said, other), count)| say(format_args!("{kind:<26}{said:<12}{other:<34}{count:>6}")));
    let (shown, all) = (wrong[..wrong.len().min(12)].join("\n"), wrong.len());
    assert!(wrong.is_empty(), "{all} are judged otherwise, such as {shown}");
    // The mutants are of all kinds, and get every verdict. A generator of garbage alone would show nothing.
    let verdicts: std::collections::BTreeSet<&str> = sum.keys().map(|(_, said, _)| said.as_str()).collect();
    assert!(
        count < 200 || ["VALID", "INVALID", "INCOMPLETE", "NEWER"].iter().all(|one| verdicts.contains(one)),
        "{verdicts:?}"
    );
}
