//! Checks the input and output schemas of contracts: JSON Schema draft 2020-12, self-contained, closed.
//!
//! Guarantees: A schema that passes compiles, refers to nothing outside itself, and rejects properties that it does not name unless it says
//! otherwise.
//!
//! Rejects: Other drafts, remote references, and `$id`, because it would change the meaning of references.

use std::collections::HashSet;

use jsonschema::Draft;
use serde_json::{Map, Value};

use crate::policy::json::pointer_token;

/// The only dialect. A schema may name this dialect or none.
pub const DIALECT: &str = "https://json-schema.org/draft/2020-12/schema";

/// The deepest nesting. JSON from an API server is at most 128 levels deep. A schema of a tool's arguments needs a tenth of that.
const MAX_DEPTH: usize = 64;

/// Keywords whose schemas apply to the same instance as the schema that contains them.
const IN_PLACE: [&str; 11] = [
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "then",
    "else",
    "dependentSchemas",
    "$ref",
    "$dynamicRef",
    "$recursiveRef",
];

/// Why a schema cannot be used: the JSON Pointer of the problem, and what is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaError {
    /// The JSON Pointer into the schema. Empty at its root.
    pub pointer: String,
    /// What was expected.
    pub expected: String,
    /// What was found.
    pub found: String,
}

impl SchemaError {
    fn new(pointer: &str, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self { pointer: pointer.to_owned(), expected: expected.into(), found: found.into() }
    }
}

/// Returns the schema as it is enforced: checked, and closed where it says nothing about other properties.
///
/// An object with `properties` and without `additionalProperties` and `unevaluatedProperties` rejects all other properties. If objects are
/// composed (`allOf`, `$ref`, …), the whole is closed, not each part. The root is closed even if it has no `properties`.
///
/// # Errors
/// Returns everything that is wrong with the schema.
pub fn close(schema: &Value) -> Result<Value, Vec<SchemaError>> {
    check(schema)?;
    let mut closed = schema.clone();
    close_at(&mut closed, schema, true);
    compiles(&closed)?;
    Ok(closed)
}

/// Checks whether a schema can be enforced as it is written: it describes an object, is self-contained and has the one dialect.
///
/// # Errors
/// Returns everything that is wrong with the schema.
pub fn check(schema: &Value) -> Result<(), Vec<SchemaError>> {
    let mut errors = Vec::new();
    let Some(root) = schema.as_object() else {
        return Err(vec![SchemaError::new("", "an object", "another JSON value")]);
    };
    if root.get("type").and_then(Value::as_str) != Some("object") {
        let found = root.get("type").map_or_else(|| "nothing".to_owned(), brief);
        errors.push(SchemaError::new("/type", "\"object\", because a tool's arguments and results are objects", found));
    }
    match root.get("$schema") {
        Some(Value::String(dialect)) if dialect.trim_end_matches('#') == DIALECT => {}
        Some(other) => errors.push(SchemaError::new("/$schema", DIALECT, brief(other))),
        None => {}
    }
    references(schema, "", 0, &mut errors);
    if !errors.is_empty() {
        return Err(errors);
    }
    if let Err(error) = jsonschema::draft202012::meta::validate(schema) {
        return Err(vec![SchemaError::new(
            &error.instance_path().to_string(),
            "JSON Schema draft 2020-12",
            shorten(&error.to_string()),
        )]);
    }
    compiles(schema)
}

fn compiles(schema: &Value) -> Result<(), Vec<SchemaError>> {
    match jsonschema::options().with_draft(Draft::Draft202012).build(schema) {
        Ok(_) => Ok(()),
        Err(error) => Err(vec![SchemaError::new(
            &error.instance_path().to_string(),
            "a schema that compiles",
            shorten(&error.to_string()),
        )]),
    }
}

/// Rejects references to the outside everywhere. A keyword's name inside `enum` or `const` is rare, so it is rejected as well.
fn references(value: &Value, pointer: &str, depth: usize, errors: &mut Vec<SchemaError>) {
    if depth > MAX_DEPTH {
        errors.push(SchemaError::new(pointer, format!("at most {MAX_DEPTH} levels"), "more"));
        return;
    }
    match value {
        Value::Object(map) => {
            for (key, inner) in map {
                let here = format!("{pointer}/{}", pointer_token(key));
                match (key.as_str(), inner) {
                    ("$ref" | "$dynamicRef", Value::String(target)) if !target.starts_with('#') => {
                        errors.push(SchemaError::new(
                            &here,
                            "a reference inside this schema (`#/$defs/...`)",
                            shorten(&format!("\"{target}\"")),
                        ))
                    }
                    // `properties` may contain an argument called `$id`, but a string value can only be the keyword.
                    ("$id", Value::String(_)) => {
                        errors.push(SchemaError::new(
                            &here,
                            "no `$id`: it would change what references mean",
                            brief(inner),
                        ));
                    }
                    _ => references(inner, &here, depth + 1, errors),
                }
            }
        }
        Value::Array(items) => {
            for (index, inner) in items.iter().enumerate() {
                references(inner, &format!("{pointer}/{index}"), depth + 1, errors);
            }
        }
        _ => {}
    }
}

/// Closes a schema and the schemas of the instances inside its instance.
fn close_at(schema: &mut Value, root: &Value, is_root: bool) {
    let Some(map) = schema.as_object_mut() else { return };
    let says = map.contains_key("additionalProperties") || map.contains_key("unevaluatedProperties");
    if !says && (is_root || names_properties(map, root, &mut HashSet::new())) {
        let composed = IN_PLACE.iter().any(|keyword| map.contains_key(*keyword));
        let keyword = if composed { "unevaluatedProperties" } else { "additionalProperties" };
        map.insert(keyword.to_owned(), Value::Bool(false));
    }
    descend(map, root);
}

/// Visits the schemas of the instances inside this one. Parts that apply to this instance itself are traversed, but not closed.
fn descend(map: &mut Map<String, Value>, root: &Value) {
    for (key, inner) in map.iter_mut() {
        match key.as_str() {
            "properties" | "patternProperties" => {
                inner
                    .as_object_mut()
                    .into_iter()
                    .flat_map(Map::values_mut)
                    .for_each(|schema| close_at(schema, root, false));
            }
            "items" | "contains" | "additionalProperties" | "unevaluatedItems" | "unevaluatedProperties" => {
                close_at(inner, root, false);
            }
            "prefixItems" => {
                inner.as_array_mut().into_iter().flatten().for_each(|schema| close_at(schema, root, false))
            }
            // `not` and `if` only test. Closing a schema inside them would invert their result.
            "allOf" | "anyOf" | "oneOf" => {
                inner
                    .as_array_mut()
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_object_mut)
                    .for_each(|part| descend(part, root));
            }
            "then" | "else" => {
                if let Some(part) = inner.as_object_mut() {
                    descend(part, root);
                }
            }
            "$defs" | "definitions" | "dependentSchemas" => inner
                .as_object_mut()
                .into_iter()
                .flat_map(Map::values_mut)
                .filter_map(Value::as_object_mut)
                .for_each(|part| descend(part, root)),
            _ => {}
        }
    }
}

/// Checks whether the schema, or a part that applies to the same instance, has `properties`.
fn names_properties<'s>(map: &'s Map<String, Value>, root: &'s Value, visited: &mut HashSet<&'s str>) -> bool {
    if map.contains_key("properties") {
        return true;
    }
    let mut part = |value: &'s Value| value.as_object().is_some_and(|map| names_properties(map, root, visited));
    for (key, inner) in map {
        let names = match key.as_str() {
            "allOf" | "anyOf" | "oneOf" => inner.as_array().is_some_and(|parts| parts.iter().any(&mut part)),
            "then" | "else" => part(inner),
            "dependentSchemas" => inner.as_object().is_some_and(|parts| parts.values().any(&mut part)),
            _ => false,
        };
        if names {
            return true;
        }
    }
    let target = map.get("$ref").or_else(|| map.get("$dynamicRef")).and_then(Value::as_str);
    let Some(target) = target.filter(|target| visited.insert(target)) else { return false };
    match target.strip_prefix('#').and_then(|pointer| root.pointer(pointer)) {
        Some(found) => found.as_object().is_some_and(|map| names_properties(map, root, visited)),
        // An anchor is not looked up here. Assume that its target has `properties`, and close the schema.
        None => true,
    }
}

fn brief(value: &Value) -> String {
    shorten(&value.to_string())
}

/// Shortens text, so that a hostile schema cannot fill the conditions of a status.
fn shorten(text: &str) -> String {
    const LONGEST: usize = 160;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[rstest::rstest]
    #[case::plain(json!({"type":"object","properties":{"a":{"type":"string"}}}), json!({"a":"x"}), json!({"a":"x","b":1}))]
    #[case::no_arguments(json!({"type":"object"}), json!({}), json!({"b":1}))]
    #[case::nested(
        json!({"type":"object","properties":{"a":{"type":"array","items":{"type":"object","properties":{"b":{}}}}}}),
        json!({"a":[{"b":1}]}), json!({"a":[{"b":1,"c":2}]})
    )]
    #[case::all_of(
        json!({"type":"object","allOf":[{"properties":{"a":{}}},{"properties":{"b":{}}}]}),
        json!({"a":1,"b":2}), json!({"a":1,"b":2,"c":3})
    )]
    #[case::conditional(
        json!({"type":"object","properties":{"kind":{},"n":{}},"if":{"properties":{"kind":{"const":"x"}}},"then":{"required":["n"]}}),
        json!({"kind":"x","n":1}), json!({"kind":"x"})
    )]
    #[case::reference(
        json!({"type":"object","properties":{"p":{"$ref":"#/$defs/point"}},"$defs":{"point":{"type":"object","properties":{"x":{}}}}}),
        json!({"p":{"x":1}}), json!({"p":{"x":1,"y":2}})
    )]
    #[case::recursive(
        json!({"type":"object","properties":{"n":{"$ref":"#/$defs/node"}},"$defs":{"node":{"type":"object","properties":{"next":{"$ref":"#/$defs/node"}}}}}),
        json!({"n":{"next":{"next":{}}}}), json!({"n":{"next":{"other":{}}}})
    )]
    #[case::one_of(
        json!({"type":"object","oneOf":[{"properties":{"a":{}},"required":["a"]},{"properties":{"b":{}},"required":["b"]}]}),
        json!({"a":1}), json!({"a":1,"z":1})
    )]
    fn closes(#[case] schema: Value, #[case] accepted: Value, #[case] refused: Value) {
        let closed = close(&schema).unwrap();
        assert!(jsonschema::is_valid(&closed, &accepted), "{closed}");
        assert!(!jsonschema::is_valid(&closed, &refused), "{closed}");
    }

    #[rstest::rstest]
    #[case::said_so(json!({"type":"object","properties":{"a":{}},"additionalProperties":true}), json!({"b":1}))]
    #[case::a_map(json!({"type":"object","properties":{"labels":{"type":"object"}}}), json!({"labels":{"x":"y"}}))]
    #[case::a_map_by_reference(
        json!({"type":"object","properties":{"l":{"$ref":"#/$defs/map"}},"$defs":{"map":{"type":"object"}}}), json!({"l":{"x":1}})
    )]
    #[case::typed_map(json!({"type":"object","properties":{"m":{"additionalProperties":{"type":"string"}}}}), json!({"m":{"x":"y"}}))]
    #[case::an_argument_called_id(json!({"type":"object","properties":{"$id":{"type":"string"},"$ref":{"type":"string"}}}), json!({"$id":"1"}))]
    fn leaves_open(#[case] schema: Value, #[case] accepted: Value) {
        let closed = close(&schema).unwrap();
        assert!(jsonschema::is_valid(&closed, &accepted), "{closed}");
    }

    #[rstest::rstest]
    #[case::not_an_object(json!([]), "")]
    #[case::no_type(json!({}), "/type")]
    #[case::other_type(json!({"type":"string"}), "/type")]
    #[case::other_draft(json!({"type":"object","$schema":"http://json-schema.org/draft-07/schema#"}), "/$schema")]
    #[case::remote(json!({"type":"object","properties":{"a":{"$ref":"https://evil.test/x"}}}), "/properties/a/$ref")]
    #[case::file(json!({"type":"object","properties":{"a":{"$ref":"file:///etc/passwd"}}}), "/properties/a/$ref")]
    #[case::id(json!({"type":"object","$id":"https://evil.test/x"}), "/$id")]
    #[case::bad_keyword(json!({"type":"object","properties":{"a":{"type":"strin"}}}), "/properties/a/type")]
    #[case::bad_bound(json!({"type":"object","properties":{"a":{"minLength":-1}}}), "/properties/a/minLength")]
    #[case::dangling(json!({"type":"object","properties":{"a":{"$ref":"#/$defs/none"}}}), "")]
    fn refuses(#[case] schema: Value, #[case] pointer: &str) {
        let errors = close(&schema).unwrap_err();
        assert_eq!(errors.first().map(|error| error.pointer.as_str()), Some(pointer), "{errors:?}");
    }

    #[test]
    fn refuses_a_bad_pattern() {
        assert!(close(&json!({"type":"object","properties":{"a":{"pattern":"("}}})).is_err());
    }

    #[test]
    fn closing_twice_changes_nothing() {
        let schema =
            json!({"type":"object","properties":{"p":{"$ref":"#/$defs/q"}},"$defs":{"q":{"properties":{"x":{}}}}});
        let once = close(&schema).unwrap();
        assert_eq!(close(&once).unwrap(), once);
    }
}
