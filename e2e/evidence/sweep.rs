//! Changes every place of a policy and of a plan that have every member, in every way that JSON parsers could read differently. Both
//! verifiers give the same verdict on each change. The table of docs/evidence-format.md has every member, so that other verifiers know it,
//! too.
//!
//! `BELAY_SWEEP` is the number of changes to try, 600 by default. `all` tries all of them: `make fuzz`.

use std::collections::{BTreeMap, BTreeSet};

use belay::{canonical, evidence::rollback::Plan, policy::config::PolicyConfig};
use serde_json::{Map, Value, json};

use crate::{
    every,
    forge::Unsigned,
    halves, rich,
    runs::Story,
    say,
    structured::{self, first, places},
};

const FORMAT: &str = "docs/evidence-format.md";

/// The rows of the table: the members of each object by name, each with its type.
type Table = BTreeMap<String, BTreeMap<String, String>>;

fn table() -> Table {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(FORMAT);
    let text = std::fs::read_to_string(path).unwrap();
    let (_, section) = text.split_once("### The policy's form, and the plan's").unwrap();
    let rows =
        section.lines().skip_while(|line| !line.starts_with('|')).skip(2).take_while(|line| line.starts_with('|'));
    let row = |line: &str| {
        let (object, members) = line.trim_matches(['|', ' ']).split_once(" | ").unwrap();
        // Members are between backticks, and their types follow them.
        let parts: Vec<&str> = members.split('`').collect();
        let members = parts[1..].chunks(2).map(|pair| {
            let of = pair[1].trim_start_matches('?').strip_prefix(": ").unwrap_or("text");
            let of = if of.starts_with(['[', '{']) {
                of.split_inclusive([']', '}']).next()
            } else {
                of.split([',', ' ']).next()
            };
            (pair[0].to_owned(), of.unwrap().to_owned())
        });
        (object.to_owned(), members.collect())
    };
    rows.map(row).collect()
}

/// Returns a type's name, alone or in a list. The table has no row for objects whose members can have any name.
fn named(of: &str) -> &str {
    of.trim_matches(['[', ']'])
}

/// Compares objects with the table, and remembers the members that it has seen.
struct Compared<'t> {
    table: &'t Table,
    seen: BTreeSet<(String, String)>,
    /// Reads the whole document as Belay does, and returns the error, if there is one.
    read: fn(Value) -> Option<String>,
}

impl Compared<'_> {
    fn object(&mut self, whole: &Value, at: &str, row: &str) {
        let Some(members) = self.table.get(row) else { return };
        let found = whole.pointer(at).unwrap();
        let said = |missing: &str, where_: &str| {
            format!(
                "{at} of a document has the member `{missing}` {where_} the row `{row}` of the table \"The policy's form\" in {FORMAT}: \
                 say there what it is, and so in FORMS of docs/verifier/belay_records.py, and give it a value in e2e/evidence/rich.rs"
            )
        };
        for (name, value) in found.as_object().unwrap() {
            let of = members.get(name).unwrap_or_else(|| panic!("{}", said(name, "that is not in")));
            self.seen.insert((row.to_owned(), name.clone()));
            let below = format!("{at}/{name}");
            match value {
                Value::Object(_) => self.object(whole, &below, named(of)),
                Value::Array(items) if of.starts_with('[') => {
                    let objects = items.iter().enumerate().filter(|(_, item)| item.is_object());
                    objects.for_each(|(n, _)| self.object(whole, &format!("{below}/{n}"), named(of)));
                }
                _ => {}
            }
        }
        // An object can lack members that its type has. The error of serde for an unknown member lists them.
        let mut other = whole.clone();
        other.pointer_mut(at).unwrap()["\u{1}"] = Value::Null;
        let Some(message) = (self.read)(other).filter(|message| message.starts_with("unknown field")) else { return };
        let (_, expected) = message.split_once("expected").unwrap();
        for name in expected.split('`').skip(1).step_by(2) {
            assert!(members.contains_key(name), "{}", said(name, "by its type, and it is not in"));
        }
    }
}

fn read<T: serde::de::DeserializeOwned>(value: Value) -> Option<String> {
    serde_json::from_value::<T>(value).err().map(|error| error.to_string())
}

/// Returns the documents of a story's first record.
fn documents(story: &Story) -> Vec<Value> {
    let documents = story.segments[0][0].encode().unwrap().documents;
    documents.iter().map(|document| serde_json::from_slice(document).unwrap()).collect()
}

/// A new member of a policy must be in the evidence format, so that everybody who verifies knows it.
#[test]
fn the_format_has_every_member_of_a_policy_and_of_a_plan() {
    let table = table();
    let mut compared = Compared { table: &table, seen: BTreeSet::new(), read: read::<PolicyConfig> };
    let (task, rollback) = (&*rich::TASK, &*rich::ROLLBACK);
    let [policy, of_rollback, plan] = [&documents(task)[0], &documents(rollback)[0], &documents(rollback)[1]];
    compared.object(policy, "", "policy");
    compared.object(of_rollback, "", "policy");
    compared.read = read::<Plan>;
    compared.object(plan, "", "plan");
    let all = table.iter().flat_map(|(row, members)| members.keys().map(|name| (row.clone(), name.clone())));
    let unseen: Vec<_> = all.filter(|member| !compared.seen.contains(member)).collect();
    assert!(unseen.is_empty(), "{FORMAT} has members that no policy in e2e/evidence/rich.rs has: {unseen:?}");
    assert!(compared.seen.len() > 100, "{}", compared.seen.len());
}

/// Returns everything that replaces a value or is added to it. `None` removes the value.
fn odd(value: &Value, table: &Table) -> Vec<(String, Option<Value>)> {
    let mut all = vec![("removed".to_owned(), None)];
    let numbers = [
        "0",
        "1",
        "-1",
        "2",
        "65535",
        "65536",
        "9007199254740991",
        "9007199254740992",
        "9223372036854774000",
        "9223372036854775000",
        "9223372036854776000",
        "-9223372036854775000",
        "-9223372036854776000",
        "18446744073709550000",
        "18446744073709552000",
        "1e+21",
        "0.5",
        "1e-7",
    ];
    let mut others: Vec<Value> = numbers.iter().map(|text| serde_json::from_str(text).unwrap()).collect();
    others.extend([
        json!(null),
        json!(true),
        json!(false),
        json!(""),
        json!("x"),
        json!([]),
        json!({}),
        json!([null]),
        json!({"x": "y"}),
        json!([[]]),
    ]);
    match value {
        Value::Object(fields) => {
            // serde also reads a list as a struct or an enum.
            others.push(fields.values().cloned().collect());
            let with = |name: &str, value: Value| {
                let mut fields = fields.clone();
                fields.insert(name.to_owned(), value);
                Value::Object(fields)
            };
            others.extend([
                with("$serde_json::private::RawValue", json!("1")),
                with("", json!(1)),
                with("é", json!(null)),
            ]);
            let defaults = [
                json!(null),
                json!(0),
                json!(false),
                json!([]),
                json!({}),
                json!("Unclassified"),
                json!("x"),
                json!({"x": 1}),
            ];
            // The other members of objects like this one.
            let like =
                table.values().filter(|row| !fields.is_empty() && fields.keys().all(|name| row.contains_key(name)));
            let more: BTreeSet<_> = like.flat_map(BTreeMap::keys).filter(|name| !fields.contains_key(*name)).collect();
            others.extend(more.into_iter().flat_map(|name| defaults.clone().map(|value| with(name, value))));
        }
        Value::Array(items) => {
            others.push(
                items.iter().enumerate().map(|(n, item)| (n.to_string(), item.clone())).collect::<Map<_, _>>().into(),
            );
            others.push(items.iter().chain(items).cloned().collect());
            others.extend(items.first().cloned());
        }
        Value::String(text) => {
            others.extend([
                json!({text: null}),
                json!({text: {}}),
                json!([text]),
                json!(text.to_uppercase()),
                json!(format!("{text} ")),
            ]);
        }
        _ => others.push(json!(value.to_string())),
    }
    all.extend(others.into_iter().filter(|other| other != value).map(|other| (format!("= {other}"), Some(other))));
    all
}

/// Returns a document with another value in one place.
fn changed(document: &Value, at: &str, value: Option<Value>) -> Option<Value> {
    let mut document = document.clone();
    match value {
        Some(value) => *document.pointer_mut(at)? = value,
        None => {
            let (within, name) = at.rsplit_once('/')?;
            match document.pointer_mut(within)? {
                Value::Array(items) => drop(items.remove(name.parse().ok()?)),
                within => drop(within.as_object_mut()?.remove(&name.replace("~1", "/").replace("~0", "~"))?),
            }
        }
    }
    Some(document)
}

/// Writes the story with this document in all openings, by its own digest.
fn told(story: &Story, place: usize, document: &Value) -> belay::evidence::log::Log {
    let bytes = canonical::to_bytes(document).unwrap();
    let name = belay::evidence::record::DOCUMENTS[place];
    story.told(story.segments.clone(), |written| {
        let openings = written.iter_mut().filter(|Unsigned { entries, .. }| !entries[0].documents.is_empty());
        for Unsigned { entries, .. } in openings {
            let mut record: Value = serde_json::from_slice(&entries[0].record).unwrap();
            record[name] = hex::encode(canonical::sha256(&bytes)).into();
            entries[0].record = canonical::to_bytes(&record).unwrap();
            entries[0].documents[place] = bytes.clone();
        }
    })
}

#[test]
fn whatever_a_document_says_is_judged_alike() {
    let table = table();
    let (task, rollback) = (&*rich::TASK, &*rich::ROLLBACK);
    let mut all = Vec::new();
    for (story, place, below) in [(task, 0, ""), (rollback, 1, ""), (rollback, 0, "/task/rollbackOf")] {
        let document = documents(story).remove(place);
        let mut within = Vec::new();
        places(&document, "", &mut within);
        for at in within.into_iter().filter(|at| at.starts_with(below)) {
            let each = odd(document.pointer(&at).unwrap(), &table);
            all.extend(each.into_iter().map(|(what, value)| (story, place, at.clone(), what, value)));
        }
    }
    let wanted = match std::env::var("BELAY_SWEEP").as_deref() {
        Ok("all") => usize::MAX,
        Ok(wanted) => wanted.parse().unwrap(),
        Err(_) => 600,
    };
    let step = every(all.len(), wanted);
    let step = if wanted >= all.len() { 1 } else { step };
    let counted = halves(|half, second| {
        let (mut counted, mut wrong) = (BTreeMap::<(String, String), usize>::new(), Vec::new());
        for (story, place, at, what, value) in all.iter().step_by(step).skip(half).step_by(2) {
            let document = documents(story).remove(*place);
            let Some(document) = changed(&document, at, value.clone()) else { continue };
            let (log, key) = (told(story, *place, &document), story.witness.verifier());
            let what = format!("{} {place}{at} {what}", story.origin);
            let report = first(&log, &key, &what);
            let (verdict, findings) = second.verdict(&log, &key);
            let said = report.verdict.to_string();
            if said != verdict && !structured::is_said(&report, &verdict, &log) {
                wrong.push(format!(
                    "{what}: belay says {said}, the second {verdict}: {findings}: {:#?}",
                    report.findings
                ));
            }
            *counted.entry((said, verdict)).or_default() += 1;
        }
        (counted, wrong)
    });
    let (mut sum, mut wrong) = (BTreeMap::<(String, String), usize>::new(), Vec::new());
    for (counted, more) in counted {
        counted.into_iter().for_each(|(verdicts, count)| *sum.entry(verdicts).or_default() += count);
        wrong.extend(more);
    }
    say(format_args!("{} changes of documents, one of {step} tried: {sum:?}", all.len()));
    assert!(
        wrong.is_empty(),
        "{} are judged otherwise, such as {}",
        wrong.len(),
        wrong[..wrong.len().min(12)].join("\n")
    );
    for verdict in ["VALID", "INVALID", "NEWER"] {
        assert!(sum.contains_key(&(verdict.to_owned(), verdict.to_owned())), "{sum:?}");
    }
}
