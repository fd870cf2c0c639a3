//! Determines which schemas and expressions are cheap enough to evaluate inline.
//!
//! Contracts are written by tenants, and a tenant can write one that takes long on purpose: a schema that refers to itself, or nested loops
//! in an expression.
//!
//! Guarantees: the time of what is quick here is proportional to the product of its own length and the length of the arguments. Both
//! lengths are bounded, and no intermediate value grows beyond that.
//! Non-goals: an estimate of the time of everything else, which is evaluated apart from the requests of others.

use serde_json::Value;

/// Longest short arguments, in bytes of JSON.
pub const SHORT: usize = 1 << 10;
/// Longest quick schema, in bytes of JSON.
const LONGEST_SCHEMA: usize = 8 << 10;
/// Longest quick expression, in bytes.
const LONGEST_EXPRESSION: usize = 1 << 10;

/// Functions that read each part of a value once. No looping macro consists only of these functions: it needs a sum, or
/// `@not_strictly_false`.
const FUNCTIONS: [&str; 17] = [
    "_&&_",
    "_||_",
    "!_",
    "_?_:_",
    "_==_",
    "_!=_",
    "_<_",
    "_<=_",
    "_>_",
    "_>=_",
    "-_",
    "_[_]",
    "@in",
    "size",
    "startsWith",
    "endsWith",
    "contains",
];

/// Returns whether an expression with these functions is quick.
pub fn expression<'f>(source: &str, functions: impl IntoIterator<Item = &'f str>) -> bool {
    source.len() <= LONGEST_EXPRESSION && functions.into_iter().all(|function| FUNCTIONS.contains(&function))
}

/// Returns whether a JSON Schema is quick.
pub fn schema(schema: &Value) -> bool {
    serde_json::to_vec(schema).is_ok_and(|text| text.len() <= LONGEST_SCHEMA) && looks_once(schema)
}

/// Returns whether a schema applies each of its parts at most once to a part of the value: it has no references and no patterns, and does
/// not compare items with each other.
fn looks_once(schema: &Value) -> bool {
    let members = match schema {
        Value::Bool(_) => return true,
        Value::Object(members) => members,
        _ => return false,
    };
    members.iter().all(|(keyword, value)| match keyword.as_str() {
        "$schema" | "$comment" | "title" | "description" | "default" | "examples" | "deprecated" => true,
        "type" | "enum" | "const" | "required" | "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" => {
            true
        }
        "minLength" | "maxLength" | "minItems" | "maxItems" | "minProperties" | "maxProperties" => true,
        "properties" => value.as_object().is_some_and(|properties| properties.values().all(looks_once)),
        "additionalProperties" | "items" => looks_once(value),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::policy::expression::Expression;

    #[rstest]
    #[case("args.count <= 7 && (!has(args.severity) || args.severity in ['low', 'high'])", true)]
    #[case("args.path.startsWith('/srv/') && size(args.path) < 64", true)]
    #[case("args.list.all(x, x > 1)", false)]
    #[case("args.list.exists(x, x > 1)", false)]
    #[case("args.list.exists_one(x, x > 1)", false)]
    #[case("size(args.list.map(x, x)) > 1", false)]
    #[case("size(args.list.map(x, x > 1, x)) > 1", false)]
    #[case("size(args.list.filter(x, x > 1)) > 1", false)]
    #[case("args.text + args.text == 'aa'", false)]
    #[case("args.text.matches('(a*)*b')", false)]
    fn no_loop_is_quick(#[case] source: &str, #[case] quick: bool) {
        assert_eq!(Expression::compile(source).unwrap().is_bounded_cost(), quick, "{source}");
    }

    #[test]
    fn nothing_long_is_quick() {
        let long = format!("args.name != '{}'", "a".repeat(LONGEST_EXPRESSION));
        assert!(!Expression::compile(&long).unwrap().is_bounded_cost());
        assert!(!schema(&json!({"enum": ["a".repeat(LONGEST_SCHEMA)]})));
    }

    #[rstest]
    #[case(json!({"type": "object", "required": ["a"], "additionalProperties": false, "properties": {"a": {"type": "string", "maxLength": 7}}}), true)]
    #[case(json!({"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3}), true)]
    #[case(json!({"properties": {"pattern": {"type": "string"}}}), true)]
    #[case(json!(true), true)]
    #[case(json!({"properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}), false)]
    #[case(json!({"anyOf": [{"properties": {"a": {"$ref": "#"}}}, {"properties": {"a": {"$ref": "#"}}}]}), false)]
    #[case(json!({"items": {"$ref": "#"}}), false)]
    #[case(json!({"type": "array", "uniqueItems": true}), false)]
    #[case(json!({"patternProperties": {"^a": true}}), false)]
    #[case(json!({"someKeywordToCome": 1}), false)]
    #[case(json!({"properties": 7}), false)]
    fn only_schemas_that_look_once_are(#[case] found: Value, #[case] quick: bool) {
        assert_eq!(schema(&found), quick, "{found}");
    }
}
