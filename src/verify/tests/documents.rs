//! Policies and plans in a form that this version does not know. Such a log says nothing false, but this version cannot evaluate it.

use serde_json::{Value, json};

use super::*;

/// Returns the script's log with a changed last document in its first record. The record names the document by its new digest if `named`,
/// and by the old digest otherwise.
fn with_document(script: &Script, named: bool, change: impl FnOnce(&mut Value)) -> Log {
    let mut written = forge::written(&script.segments);
    let entry = &mut written[0].entries[0];
    let last = entry.documents.len() - 1;
    let mut document = serde_json::from_slice(&entry.documents[last]).unwrap();
    change(&mut document);
    entry.documents[last] = canonical::to_bytes(&document).unwrap();
    if named {
        let mut record: Value = serde_json::from_slice(&entry.record).unwrap();
        record[record::DOCUMENTS[last]] = hex::encode(canonical::sha256(&entry.documents[last])).into();
        entry.record = canonical::to_bytes(&record).unwrap();
    }
    sign(script, written)
}

fn sign(script: &Script, written: Vec<forge::Unsigned>) -> Log {
    forge::sign(written, &note::origin(UID), &script.keys, Witness::By(&script.witness), &Before::default())
}

/// A policy is of a later version if serde cannot read it, or if serde writes it differently. Something that is not an object is invalid.
#[rstest]
#[case::as_it_is(Verdict::Valid, |_: &mut Value| {})]
#[case::another_member(Verdict::Newer, |p: &mut Value| p["later"] = true.into())]
#[case::another_member_deep(Verdict::Newer, |p: &mut Value| p["tools"][0]["upstream"]["mcp"]["later"] = true.into())]
#[case::another_value(Verdict::Newer, |p: &mut Value| p["tools"][0]["sideEffect"] = "none".into())]
#[case::another_type(Verdict::Newer, |p: &mut Value| p["limits"]["tokens"] = "9".into())]
#[case::a_number_beyond_64_bits(Verdict::Newer, |p: &mut Value| p["limits"]["tokens"] = u64::MAX.into())]
#[case::a_large_number(Verdict::Valid, |p: &mut Value| p["limits"]["tokens"] = 9_223_372_036_854_775_000_i64.into())]
#[case::without_a_member(Verdict::Newer, |p: &mut Value| drop(p.as_object_mut().unwrap().remove("egress")))]
#[case::without_a_default(Verdict::Newer, |p: &mut Value| drop(p["tools"][0].as_object_mut().unwrap().remove("limits")))]
#[case::a_default_written_out(Verdict::Newer, |p: &mut Value| p["limits"]["approvalWaitSeconds"] = 0.into())]
#[case::nothing_written_out(Verdict::Newer, |p: &mut Value| p["task"]["taskClass"] = Value::Null)]
#[case::a_list_for_an_object(Verdict::Newer, |p: &mut Value| p["pack"] = json!(["dev", "6f9c3c1e-0000-4000-8000-000000000002", 3, "dev"]))]
#[case::an_object_for_a_word(Verdict::Newer, |p: &mut Value| p["tools"][0]["sideEffect"] = json!({"external": null}))]
#[case::an_empty_object(Verdict::Newer, |p: &mut Value| *p = json!({}))]
#[case::a_list(Verdict::Invalid, |p: &mut Value| *p = json!([1]))]
#[case::nothing(Verdict::Invalid, |p: &mut Value| *p = Value::Null)]
#[case::a_name_that_serde_keeps_for_itself(Verdict::Invalid, |p: &mut Value| p["tools"][0]["input"] = json!({"$serde_json::private::RawValue": "1"}))]
#[case::such_a_name_after_another(Verdict::Invalid, |p: &mut Value| p["tools"][0]["input"] = json!({"#": 1, "$serde_json::private::Number": "1"}))]
fn a_policy_that_is_not_known_is_newer(#[case] expected: Verdict, #[case] change: fn(&mut Value)) {
    let script = Script::good();
    let report = run(&script, &with_document(&script, true, change));
    assert_eq!(report.verdict, expected, "{:?}", report.findings);
    // The witness with this key has not signed the log.
    let other = Signer::generate(WITNESS_NAME).unwrap().verifier();
    let log = with_document(&script, true, change);
    assert_eq!(verify(&log, &other, &Expected::Anything).verdict, Verdict::Invalid);
}

#[rstest]
#[case::as_it_is(Verdict::Valid, |_: &mut Value| {})]
#[case::another_member(Verdict::Newer, |p: &mut Value| p["later"] = true.into())]
#[case::another_member_of_a_step(Verdict::Newer, |p: &mut Value| p["steps"][0]["later"] = true.into())]
#[case::another_way_to_undo(Verdict::Newer, |p: &mut Value| p["steps"][0]["by"] = json!({"time": "1"}))]
#[case::two_ways_to_undo(Verdict::Newer, |p: &mut Value| p["steps"][0]["by"]["people"] = "x".into())]
#[case::nothing_written_out(Verdict::Newer, |p: &mut Value| p["steps"][0]["by"]["call"]["until"] = Value::Null)]
#[case::less_than_nothing(Verdict::Newer, |p: &mut Value| p["size"] = (-1).into())]
#[case::a_policy(Verdict::Newer, |p: &mut Value| *p = serde_json::to_value(script::policy()).unwrap())]
#[case::text(Verdict::Invalid, |p: &mut Value| *p = "x".into())]
fn a_plan_that_is_not_known_is_newer(#[case] expected: Verdict, #[case] change: fn(&mut Value)) {
    let mut script = rollback();
    // Only the first attempt has begun.
    script.segments.truncate(1);
    let report = run(&script, &with_document(&script, true, change));
    let expected = if expected == Verdict::Valid { Verdict::Incomplete } else { expected };
    assert_eq!(report.verdict, expected, "{:?}", report.findings);
}

/// Whether a segment is of a later version depends neither on its other records nor on a document that no record names.
#[test]
fn what_is_said_of_a_document_depends_on_nothing_else() {
    let script = Script::good();
    let later = |policy: &mut Value| policy["later"] = true.into();
    assert_eq!(run(&script, &with_document(&script, false, later)).verdict, Verdict::Invalid, "another was named");
    let mut joined = Script::good();
    let next = joined.segments.remove(1);
    joined.segments[0].extend(next);
    joined.at(2).time = "yesterday".into();
    assert_eq!(run(&joined, &with_document(&joined, true, later)).verdict, Verdict::Newer, "it is not judged");
    // A record that contains its policy names no document.
    let mut written = forge::written(&script.segments);
    let entry = &mut written[0].entries[0];
    let mut record: Value = serde_json::from_slice(&entry.record).unwrap();
    record["policyDigest"] = serde_json::from_slice(&entry.documents[0]).unwrap();
    entry.record = canonical::to_bytes(&record).unwrap();
    entry.documents.clear();
    assert_eq!(run(&script, &sign(&script, written)).verdict, Verdict::Invalid);
}
