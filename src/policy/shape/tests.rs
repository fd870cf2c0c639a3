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

/// Twice as much on each level, of the schema or of the value.
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

/// Each may go on for hours. The control is the same schema over little, or a smaller one.
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
    // What is nested the validator may look at once; what is a list it cannot.
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
    /// Metered or not, a schema says the same, as long as it ends by itself.
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
