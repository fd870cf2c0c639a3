//! JSON Schemas whose validation is metered.
//!
//! Guarantees: a value fits or does not fit, by JSON Schema draft 2020-12. Validation ends within the allowance of its evaluation
//! ([`meter`](super::meter)), even if a schema refers to itself, compares items with each other, or is applied repeatedly. A value does not
//! fit if the allowance is used up. The reason of a misfit does not repeat the value.
//! Non-goals: interrupting the match of one pattern on one text. The regex engine has limits of its own.
//!
//! The validator has no such limits, but it supports custom keywords. Belay adds a keyword that counts a step to every part of the schema
//! and before each reference, because only references can make a schema apply a part of itself again.

pub mod words;

use std::collections::HashSet;

use jsonschema::{Keyword, PatternOptions, ValidationError, Validator};
use serde_json::{Map, Value, json};

use super::meter::{self, Exceeded};
use crate::canonical;

/// A keyword that counts each time that a part of the schema is applied.
const STEP: &str = "belay.dev/step";
/// Maximum number of backtracking steps of the regex engine on one text. Patterns without look-around take none.
const STEPS_BACK: usize = 100_000;
/// Maximum memory of one compiled pattern, in bytes.
const LARGEST_PATTERN: usize = 4 << 20;

/// A compiled schema and its source.
pub struct Shape(Validator, Value);

/// The reason why a value does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// A part of the value does not fit.
    At {
        /// The place in the value, as a JSON Pointer.
        instance: String,
        /// The place in the schema, as a JSON Pointer.
        schema: String,
        /// What was expected, without the value.
        words: String,
    },
    /// The check exceeded its allowance.
    Exceeded(Exceeded),
}

impl Shape {
    /// Compiles a schema.
    ///
    /// # Errors
    /// Returns the reason if the schema is invalid.
    pub fn compile(schema: &Value) -> Result<Self, String> {
        let patterns = PatternOptions::fancy_regex().backtrack_limit(STEPS_BACK).size_limit(LARGEST_PATTERN);
        jsonschema::draft202012::options()
            // A contract with `format: uuid` means a check.
            .should_validate_formats(true)
            .with_pattern_options(patterns)
            .with_keyword(STEP, |_, _, _| Ok(Box::new(Step)))
            .with_keyword("uniqueItems", |_, wanted, _| Ok(Box::new(Unique(wanted == &Value::Bool(true)))))
            .build(&metered(schema))
            .map(|validator| Self(validator, schema.clone()))
            .map_err(|error| error.to_string())
    }

    /// Checks whether a value fits.
    ///
    /// # Errors
    /// Returns the reason if the value does not fit.
    pub fn check(&self, value: &Value) -> Result<(), Misfit> {
        meter::metered(|| {
            let fits = self.0.is_valid(value);
            meter::ended_by_itself().map_err(Misfit::Exceeded)?;
            if fits {
                return Ok(());
            }
            // Errors copy parts of the value, so they are only made for a misfit.
            let found = self.0.validate(value);
            meter::ended_by_itself().map_err(Misfit::Exceeded)?;
            found.map_err(|error| Misfit::At {
                instance: error.instance_path().to_string(),
                schema: error.schema_path().to_string(),
                words: words::of(&error, &self.1, value),
            })
        })
    }
}

/// Returns the schema with keywords that count steps.
fn metered(schema: &Value) -> Value {
    let Value::Object(members) = schema else { return schema.clone() };
    let each = |schemas: &Map<String, Value>| {
        Value::Object(schemas.iter().map(|(name, schema)| (name.clone(), metered(schema))).collect())
    };
    let mut made = Map::new();
    let mut references = Map::new();
    for (keyword, value) in members {
        let value = match (keyword.as_str(), value) {
            ("$ref" | "$dynamicRef", _) => {
                references.insert(keyword.clone(), value.clone());
                continue;
            }
            (
                "properties" | "patternProperties" | "$defs" | "definitions" | "dependentSchemas",
                Value::Object(schemas),
            ) => each(schemas),
            ("allOf" | "anyOf" | "oneOf" | "prefixItems", Value::Array(schemas)) => {
                schemas.iter().map(metered).collect()
            }
            (
                "items"
                | "contains"
                | "additionalProperties"
                | "propertyNames"
                | "not"
                | "if"
                | "then"
                | "else"
                | "unevaluatedItems"
                | "unevaluatedProperties",
                schema,
            ) => metered(schema),
            (_, value) => value.clone(),
        };
        made.insert(keyword.clone(), value);
    }
    made.insert(STEP.to_owned(), Value::Bool(true));
    if !references.is_empty() {
        // `if` is the one keyword that evaluates its parts in order: without a step left, the reference is not followed. It is the last
        // item, because other references may refer to the existing items by their index.
        let after = json!({"if": {STEP: true}, "then": references, "else": false});
        match made.get_mut("allOf").and_then(Value::as_array_mut) {
            Some(all) => all.push(after),
            None => drop(made.insert("allOf".to_owned(), json!([after]))),
        }
    }
    Value::Object(made)
}

struct Step;

impl<'i> Keyword<'i> for Step {
    fn validate(&self, instance: &'i Value) -> Result<(), ValidationError<'i>> {
        if self.is_valid(instance) { Ok(()) } else { Err(ValidationError::custom("this takes too much")) }
    }

    fn is_valid(&self, _: &'i Value) -> bool {
        meter::step(1).is_ok()
    }
}

/// `uniqueItems`, by the canonical form of each item.
struct Unique(bool);

impl<'i> Keyword<'i> for Unique {
    fn validate(&self, instance: &'i Value) -> Result<(), ValidationError<'i>> {
        if self.is_valid(instance) {
            Ok(())
        } else {
            Err(ValidationError::custom("expected a list without duplicates, found an item twice"))
        }
    }

    fn is_valid(&self, instance: &'i Value) -> bool {
        let (true, Value::Array(items)) = (self.0, instance) else { return true };
        let mut seen = HashSet::new();
        items.iter().all(|item| {
            let form = canonical::to_bytes(item).unwrap_or_else(|_| item.to_string().into_bytes());
            let steps = u64::try_from(form.len()).unwrap_or(u64::MAX) / 64 + 1;
            meter::step(steps).is_ok() && seen.insert(form)
        })
    }
}

#[cfg(test)]
mod tests;
