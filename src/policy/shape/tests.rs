use std::time::{Duration, Instant};

use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Value, json};

use super::*;
use crate::policy::meter::Allowance;

const FEW: Allowance = Allowance { steps: 20_000, bytes: 1 << 20, time: Duration::from_secs(60) };

fn nested(levels: usize) -> Value {
    (0..levels).fold(json!(1), |inner, _| json!({"a": inner, "b": 1}))
}

/// A schema whose cost doubles on each level.
fn doubling(levels: usize) -> Value {
    let definitions: Map<String, Value> = (0..levels)
        .map(|level| {
            let next = format!("#/$defs/d{}", level + 1);
            (format!("d{level}"), json!({"allOf": [{"$ref": next}, {"$ref": next}]}))
        })
        .chain([(format!("d{levels}"), json!(true))])
        .collect();
    json!({"$ref": "#/$defs/d0", "$defs": definitions})
}

/// Each of these could take hours. The control is the same schema on a small value, or a smaller schema.
#[rstest]
#[case::any_of(
    json!({"anyOf": [{"properties": {"a": {"$ref": "#"}}, "required": ["c"]}, {"properties": {"a": {"$ref": "#"}}, "required": ["b"]}, {"const": 1}]}),
    nested(3), nested(60)
)]
#[case::one_of(json!({"oneOf": [{"properties": {"a": {"$ref": "#"}}}, {"properties": {"a": {"$ref": "#"}}, "required": ["c"]}]}), nested(3), nested(60))]
#[case::negated(json!({"not": {"not": {"properties": {"a": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}}}}}), nested(3), nested(60))]
#[case::conditional(json!({"if": {"properties": {"a": {"$ref": "#"}}}, "then": {"properties": {"a": {"$ref": "#"}}}}), nested(3), nested(60))]
#[case::every_item_with_every_other(
    json!({"properties": {"l": {"items": {"$ref": "#/$defs/i"}}}, "$defs": {"i": {"enum": (0..50).collect::<Vec<_>>()}}}),
    json!({"l": [1, 2]}), json!({"l": vec![1; 60_000]})
)]
#[case::unevaluated(
    json!({"allOf": [{"properties": {"a": {"$ref": "#"}}}, {"properties": {"a": {"$ref": "#"}, "b": true}}], "unevaluatedProperties": false}),
    nested(2), nested(60)
)]
#[case::unique(json!({"properties": {"l": {"uniqueItems": true}}}), json!({"l": [1, 2]}), json!({"l": (0..60_000).collect::<Vec<_>>()}))]
#[case::contained(
    json!({"properties": {"l": {"contains": {"not": {"anyOf": [{"type": "integer"}, {"minimum": 5}]}}, "minContains": 0}}}),
    json!({"l": [1, 2]}), json!({"l": vec![1; 60_000]})
)]
fn no_schema_goes_on(#[case] schema: Value, #[case] little: Value, #[case] much: Value) {
    let shape = Shape::compile(&schema).unwrap();
    meter::within(FEW, || assert!(!matches!(shape.check(&little), Err(Misfit::Exceeded(_))), "{schema}"));
    let started = Instant::now();
    let found = meter::within(FEW, || shape.check(&much));
    // The validator may read nested values only once, but not lists.
    assert!(much.get("l").is_none() || matches!(found, Err(Misfit::Exceeded(_))), "{schema}: {found:?}");
    assert!(started.elapsed() < Duration::from_secs(20), "{schema}: {:?}", started.elapsed());
}

#[test]
fn no_reference_that_doubles_goes_on() {
    meter::within(FEW, || assert_eq!(Shape::compile(&doubling(8)).unwrap().check(&json!(1)), Ok(())));
    let found = meter::within(FEW, || Shape::compile(&doubling(60)).unwrap().check(&json!(1)));
    assert!(matches!(found, Err(Misfit::Exceeded(_))), "{found:?}");
}

#[rstest]
#[case(json!([1, 1.0]), false)]
#[case(json!([{"a": 1, "b": 2}, {"b": 2, "a": 1}]), false)]
#[case(json!([1, "1", [1], {"1": 1}, true, null]), true)]
#[case(json!("no list"), true)]
fn items_are_the_same_whatever_they_look_like(#[case] items: Value, #[case] fits: bool) {
    assert_eq!(Shape::compile(&json!({"uniqueItems": true})).unwrap().check(&items).is_ok(), fits);
    assert!(Shape::compile(&json!({"uniqueItems": false})).unwrap().check(&items).is_ok());
}

#[test]
fn what_does_not_fit_is_named_and_not_repeated() {
    let shape = Shape::compile(&json!({"properties": {"n": {"type": "integer"}}})).unwrap();
    let Err(Misfit::At { instance, schema, words }) = shape.check(&json!({"n": "secret"})) else { panic!() };
    assert_eq!((instance.as_str(), schema.as_str()), ("/n", "/properties/n/type"));
    assert!(!words.contains("secret"), "{words}");
}

/// Misfits are described in words for the author of the call. Each description says what was expected, what was found and where, and has no
/// words of the validator.
#[rstest]
#[case(json!({"type": "object", "additionalProperties": false}), json!({"n": 1}), "", r#"found "n", expected no arguments: leave it out"#)]
#[case(json!({"type": "object", "properties": {}, "additionalProperties": false}), json!({"m": 2}), "", r#"found "m", expected no arguments: leave it out"#)]
#[case(
    json!({"properties": {"a": true, "b": true}, "additionalProperties": false}), json!({"a": 1, "c": 1}), "",
    r#"found "c", expected only the arguments "a", "b": leave it out"#
)]
#[case(
    json!({"properties": {"f": {"properties": {"a": true}, "additionalProperties": false}}}), json!({"f": {"c": 1}}), "/f",
    r#"found "c", expected only the members "a": leave it out"#
)]
#[case(
    json!({"$ref": "#/$defs/f", "$defs": {"f": {"type": "object", "properties": {"a": true}, "additionalProperties": false}}}), json!({"c": 1}), "",
    r#"found "c", expected only the arguments "a": leave it out"#
)]
#[case(
    json!({"properties": {"a": true}, "unevaluatedProperties": false}), json!({"c": 1}), "",
    r#"found "c", expected only the arguments "a": leave it out"#
)]
#[case(json!({"unevaluatedProperties": false}), json!({"c": 1}), "", r#"found "c", expected no arguments: leave it out"#)]
#[case(json!({"properties": {"a": false}}), json!({"a": "x"}), "/a", "expected nothing, found text: leave it out")]
#[case(json!({"not": {"required": ["a"]}}), json!({"a": 1}), "", "expected a value that does not match the schema under `not`, found one that does")]
#[case(json!({"propertyNames": false}), json!({"a": 1}), "", r#"found "a", expected no arguments: leave it out"#)]
#[case(json!({"propertyNames": {"maxLength": 1}}), json!({"ab": 1}), "", "the name of a member: expected text of at most 1 character, found more")]
#[case(json!({"required": ["a"]}), json!({}), "", r#"expected the argument "a", found none"#)]
#[case(json!({"properties": {"f": {"required": ["a"]}}}), json!({"f": {}}), "/f", r#"expected the member "a", found none"#)]
#[case(json!({"properties": {"n": {"type": "integer"}}}), json!({"n": 1.5}), "/n", "expected a whole number, found a number with a fraction")]
#[case(json!({"properties": {"n": {"type": ["string", "null"]}}}), json!({"n": {}}), "/n", "expected null, or text, found an object")]
#[case(
    json!({"properties": {"n": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}), json!({"n": 7}), "/n",
    "expected one of 2 forms, found none of them; form 1: expected text, found a number; form 2: expected null, found a number"
)]
#[case(
    json!({"oneOf": [{"properties": {"a": {"type": "string"}}}, {"required": ["b"]}]}), json!({"a": 7}), "",
    r#"expected one of 2 forms, found none of them; form 1: at /a: expected text, found a number; form 2: expected the argument "b", found none"#
)]
#[case(json!({"properties": {"n": {"oneOf": [{"minimum": 1}, {"minimum": 2}]}}}), json!({"n": 7}), "/n", "expected a value that matches exactly one form of the contract, found one that matches several")]
#[case(json!({"properties": {"s": {"enum": ["low", "high"]}}}), json!({"s": "x"}), "/s", r#"expected one of "low", "high", found other text"#)]
#[case(json!({"properties": {"s": {"const": 5}}}), json!({"s": "x"}), "/s", "expected 5, found another value")]
#[case(json!({"properties": {"s": {"pattern": "^a+$"}}}), json!({"s": "x"}), "/s", "expected text that matches `^a+$`, found text that does not")]
#[case(json!({"properties": {"s": {"format": "uuid"}}}), json!({"s": "x"}), "/s", "expected text that is a valid `uuid`, found text that is not")]
#[case(json!({"properties": {"s": {"maxLength": 3}}}), json!({"s": "abcd"}), "/s", "expected text of at most 3 characters, found more")]
#[case(json!({"properties": {"n": {"exclusiveMinimum": 3}}}), json!({"n": 3}), "/n", "expected a number above 3, found a number that is not")]
#[case(json!({"properties": {"l": {"uniqueItems": true}}}), json!({"l": [1, 1]}), "/l", "expected a list without duplicates, found an item twice")]
#[case(json!({"properties": {"l": {"prefixItems": [true], "items": false}}}), json!({"l": [1, 1]}), "/l/1", "expected nothing, found a number: leave it out")]
#[case(json!({"properties": {"l": {"contains": {"const": 1}}}}), json!({"l": [2]}), "/l", "expected as many items that match `contains` as the schema says, found fewer or more")]
fn a_misfit_is_told_in_words(#[case] schema: Value, #[case] value: Value, #[case] at: &str, #[case] expected: &str) {
    let Err(Misfit::At { instance, words, .. }) = Shape::compile(&schema).unwrap().check(&value) else { panic!() };
    assert_eq!((instance.as_str(), words.as_str()), (at, expected));
}

fn schema() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!(true)),
        Just(json!({"type": "integer"})),
        Just(json!({"type": ["string", "array", "object"]})),
        Just(json!({"minimum": 2})),
        Just(json!({"enum": [1, "a", [1]]})),
        Just(json!({"$ref": "#/$defs/d"})),
        Just(json!({"pattern": "^a"})),
        Just(json!({"uniqueItems": true})),
        Just(json!({"required": ["a"]})),
        Just(json!(false)),
    ];
    leaf.prop_recursive(4, 24, 3, |inner| {
        let many = prop::collection::vec(inner.clone(), 1..3);
        prop_oneof![
            (many.clone(), prop::sample::select(vec!["allOf", "anyOf", "oneOf", "prefixItems"]))
                .prop_map(|(all, of)| json!({of: all})),
            (
                inner.clone(),
                prop::sample::select(vec![
                    "items",
                    "not",
                    "contains",
                    "additionalProperties",
                    "propertyNames",
                    "unevaluatedProperties"
                ])
            )
                .prop_map(|(one, of)| json!({of: one})),
            (inner.clone(), inner.clone())
                .prop_map(|(a, b)| json!({"properties": {"a": a, "b": b}, "unevaluatedProperties": false})),
            (inner.clone(), inner.clone(), inner)
                .prop_map(|(a, b, c)| json!({"if": a, "then": b, "else": c, "$ref": "#/$defs/d"})),
        ]
    })
}

proptest! {
    /// Whatever the misfit is, the description does not use the validator's own words.
    #[test]
    fn no_words_of_the_validator_are_told(schema in schema()) {
        let whole = json!({"allOf": [schema], "$defs": {"d": {"type": "string"}}});
        let Ok(shape) = Shape::compile(&whole) else { return Ok(()) };
        for value in [json!(1), json!("a"), json!([1, 1]), json!([1, "a", [1]]), json!({"a": {"a": 1}, "b": [2]}), json!({})] {
            let Err(Misfit::At { words, .. }) = shape.check(&value) else { continue };
            for word in ["alse schema", "is not of type", "valid under", "keyword", "dditional properties", "nevaluated", STEP] {
                prop_assert!(!words.contains(word), "{}: {}", whole, words);
            }
            prop_assert!(words.contains("expected"), "{}: {}", whole, words);
        }
    }

    /// A metered schema has the same result as the plain one, if it ends within its allowance.
    #[test]
    fn metered_schemas_agree_with_those_that_are_not(schema in schema(), defined in schema()) {
        let whole = json!({"allOf": [schema], "$defs": {"d": {"type": "object", "properties": {"a": defined}}}});
        let Ok(plain) = jsonschema::draft202012::options().build(&whole) else { return Ok(()) };
        let shape = Shape::compile(&whole).unwrap();
        for value in [json!(1), json!("a"), json!([1, 1]), json!([1, "a", [1]]), json!({"a": 3}), json!({"a": {"a": 1}, "b": [2]}), json!({})] {
            prop_assert_eq!(shape.check(&value).is_ok(), plain.is_valid(&value), "{} over {}", whole, value);
        }
    }
}
