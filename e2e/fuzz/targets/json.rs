//! JSON: an accepted text has the value that serde_json reads, both readers of Belay agree, and the canonical form of a value is a fixed
//! point that another implementation of RFC 8785 writes, too.
#![no_main]

use belay::{canonical, policy::json};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|text: &[u8]| {
    let theirs = serde_json::from_slice::<Value>(text);
    let strict = json::parse(text);
    let lenient = json::lenient(text);
    if let Ok(value) = &strict {
        same(value, theirs.as_ref().expect("serde_json reads what `parse` reads"));
        same(value, lenient.as_ref().expect("`lenient` reads what `parse` reads"));
        assert!(levels(value) <= json::DEEPEST && values(value) <= json::MOST);
        exact(value);
    }
    if let Ok(value) = &lenient {
        // What serde_json rejects are unpaired surrogates and numbers beyond the range of a double.
        theirs.iter().for_each(|theirs| same(value, theirs));
        fixed_point(value);
    }
});

/// Fails if two values differ. `==` would not tell 0.0 from -0.0.
fn same(ours: &Value, theirs: &Value) {
    assert_eq!(ours, theirs);
    assert_eq!(ours.to_string(), theirs.to_string());
}

fn fixed_point(value: &Value) {
    let written = canonical::to_bytes(value).expect("every value has a canonical form");
    assert_eq!(written, serde_json_canonicalizer::to_vec(value).expect("a canonical form"));
    let again: Value = serde_json::from_slice(&written).expect("a canonical form is JSON");
    assert_eq!(canonical::to_bytes(&again).expect("a canonical form"), written);
    let whole = json::whole(value.clone());
    assert_eq!(canonical::to_bytes(&whole).expect("a canonical form"), written);
    same(&json::whole(whole.clone()), &whole);
}

/// A value of which every parser keeps all numbers is read back from its canonical form.
fn exact(value: &Value) {
    if json::exact(value).is_ok() {
        let written = canonical::to_bytes(value).expect("every value has a canonical form");
        let again = json::parse(&written).expect("`parse` reads the canonical form of what it accepted");
        same(&json::whole(again), &json::whole(value.clone()));
    }
}

fn levels(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(levels).max().unwrap_or_default(),
        Value::Object(members) => 1 + members.values().map(levels).max().unwrap_or_default(),
        _ => 0,
    }
}

fn values(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(values).sum::<usize>(),
        Value::Object(members) => 1 + members.values().map(values).sum::<usize>(),
        _ => 1,
    }
}
