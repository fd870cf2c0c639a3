//! Both readers of a shared type, and a type with `deny_unknown_fields` beside the same type without.

use rstest::rstest;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::policy::config::{Access, DataClass, HttpUpstream, Risk, RollbackOf, Tool, ToolLimits, Upstream};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "a part")]
struct Shared {
    name: String,
    #[serde(default)]
    parts: Vec<Shared>,
    #[serde(default)]
    next: Option<Box<Shared>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    at_most: Option<i64>,
    #[serde(default)]
    kind: Kind,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a part")]
struct Denying {
    name: String,
    #[serde(default)]
    parts: Vec<Denying>,
    #[serde(default)]
    next: Option<Box<Denying>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    at_most: Option<i64>,
    #[serde(default)]
    kind: Kind,
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
enum Kind {
    #[default]
    One,
    Other,
}

/// Every text is read as `deny_unknown_fields` reads it, and rejected with the same words.
#[rstest]
#[case::whole(r#"{"name": "a", "parts": [{"name": "b", "atMost": 1}], "next": {"name": "c", "kind": "Other"}, "atMost": 2, "kind": "One"}"#, true)]
#[case::with_defaults(r#"{"name": "a"}"#, true)]
#[case::with_nulls(r#"{"name": "a", "next": null, "atMost": null}"#, true)]
#[case::as_a_list(r#"["a", [], null, null, "One"]"#, true)]
#[case::with_an_escaped_name(r#"{"n\u0061me": "a"}"#, true)]
#[case::unknown(r#"{"name": "a", "other": 1}"#, false)]
#[case::unknown_null(r#"{"name": "a", "other": null}"#, false)]
#[case::unknown_case(r#"{"name": "a", "at_most": 1}"#, false)]
#[case::unknown_in_a_list(r#"{"name": "a", "parts": [{"name": "b"}, {"name": "c", "other": {}}]}"#, false)]
#[case::unknown_in_an_option(r#"{"name": "a", "next": {"name": "b", "next": {"name": "c", "": []}}}"#, false)]
#[case::unknown_below_a_list_for_an_object(r#"["a", [{"name": "b", "other": 1}], null, null, "One"]"#, false)]
#[case::twice(r#"{"name": "a", "name": "b"}"#, false)]
#[case::missing(r#"{"atMost": 1}"#, false)]
#[case::wrong_type(r#"{"name": 1}"#, false)]
#[case::wrong_list(r#"{"name": "a", "parts": {}}"#, false)]
#[case::wrong_variant(r#"{"name": "a", "kind": "Third"}"#, false)]
#[case::fraction(r#"{"name": "a", "atMost": 1.5}"#, false)]
#[case::no_object("1", false)]
#[case::null("null", false)]
fn what_it_reads_is_what_a_denying_type_reads(#[case] text: &str, #[case] passes: bool) {
    let without_place = |error: serde_json::Error| error.to_string().split(" at line ").next().map(str::to_owned);
    let denying = serde_json::from_str::<Denying>(text);
    let strict = super::read::<_, Shared>(&mut serde_json::Deserializer::from_str(text));
    assert_eq!(denying.is_ok(), passes, "{denying:?}");
    assert_eq!(
        strict.map(|read| serde_json::to_value(read).unwrap()).map_err(without_place),
        denying.map(|read| serde_json::to_value(read).unwrap()).map_err(without_place),
    );
    // The same from a value. Values have no member twice.
    if let Ok(value) = serde_json::from_str::<Value>(text)
        && !text.contains(r#""name": "a", "name""#)
    {
        let denying = serde_json::from_value::<Denying>(value.clone());
        assert_eq!(
            super::read::<_, Shared>(value)
                .map(|read| serde_json::to_value(read).unwrap())
                .map_err(|error| error.to_string()),
            denying.map(|read| serde_json::to_value(read).unwrap()).map_err(|error| error.to_string()),
        );
    }
}

/// Adds an unknown field to the object at this pointer.
fn newer(value: &Value, at: &str) -> Value {
    let mut value = value.clone();
    value.pointer_mut(at).unwrap()["newer"] = json!(1);
    value
}

/// The policy rejects a field of a newer version wherever it shares a type with a CRD.
#[rstest]
#[case::limits("/limits")]
#[case::precondition("/preconditions/0")]
#[case::data("/data")]
#[case::http("/upstream/http")]
fn a_tool_has_no_unknown_field(#[case] at: &str) {
    let tool = json!({
        "contract": "c", "name": "t", "description": "d", "input": {}, "sideEffect": "read",
        "upstream": {"http": {"method": "GET", "url": "https://a.test/x"}},
        "limits": {"calls": 1}, "data": {"result": "Internal"},
        "preconditions": [{"name": "p", "cel": "true", "message": "m"}],
    });
    rejects::<Tool>(&tool, at);
}

#[rstest]
#[case::pattern("/classification/0")]
#[case::rule("/rules/0")]
#[case::risk("/risk")]
#[case::term("/risk/terms/0")]
fn the_rules_of_a_pack_have_no_unknown_field(#[case] at: &str) {
    let access = json!({
        "classification": [{"name": "p", "pattern": "x", "sensitivity": "Internal"}],
        "rules": [{"name": "r", "decision": "Allow"}],
        "risk": {"terms": [{"name": "t", "when": "true", "points": 1}], "denyAt": 1},
    });
    rejects::<Access>(&access, at);
}

#[test]
fn an_upstream_and_a_task_have_no_unknown_field() {
    rejects::<Upstream>(&json!({"mcp": {"url": "https://a.test/mcp", "tool": "t"}}), "/mcp");
    let task = json!({
        "namespace": "n", "name": "t", "uid": "u", "objective": "o", "workflowClass": "w", "principal": "p", "image": "",
        "rollbackOf": {"name": "t", "uid": "u"},
    });
    rejects::<crate::policy::config::TaskIdentity>(&task, "/rollbackOf");
}

fn rejects<T: Serialize + DeserializeOwned>(value: &Value, at: &str) {
    let read = serde_json::from_value::<T>(value.clone()).unwrap();
    assert_eq!(serde_json::to_value(read).unwrap(), *value);
    let error = serde_json::from_value::<T>(newer(value, at)).err().unwrap().to_string();
    assert!(error.starts_with("unknown field `newer`, expected"), "{error}");
}

/// A custom resource of a newer version is read without the fields that this version does not know.
#[test]
fn a_crd_tolerates_unknown_fields() {
    fn tolerates<T: PartialEq + std::fmt::Debug + DeserializeOwned>(value: &Value) {
        let read = serde_json::from_value::<T>(value.clone()).unwrap();
        assert_eq!(serde_json::from_value::<T>(newer(value, "")).unwrap(), read);
    }
    tolerates::<ToolLimits>(&json!({"calls": 1}));
    tolerates::<DataClass>(&json!({"result": "Internal"}));
    tolerates::<RollbackOf>(&json!({"name": "t", "uid": "u"}));
    tolerates::<HttpUpstream>(&json!({"method": "GET", "url": "https://a.test/x"}));
    let risk = json!({"terms": [{"name": "t", "when": "true", "points": 1}], "denyAt": 1});
    tolerates::<Risk>(&risk);
    let term = serde_json::from_value::<Risk>(newer(&risk, "/terms/0")).unwrap();
    assert_eq!(term, serde_json::from_value(risk).unwrap());
}
