//! JSON Schemas that count what they take.
//!
//! Guarantees: a value fits or does not, by JSON Schema draft 2020-12; a schema that refers to itself, compares items with each other or is
//! applied over and over ends within its judgment's allowance ([`meter`](super::meter)), and then the value does not fit; why is said without
//! repeating the value. Non-goals: to interrupt one pattern over one text. Its engine has bounds of its own.
//!
//! The validator has no such bounds, and takes keywords of ours: one is in every part of the schema, and stands before each reference, which
//! are the only ways by which a schema comes to a part of itself again.

pub mod words;

use std::collections::HashSet;

use jsonschema::{Keyword, PatternOptions, ValidationError, Validator};
use serde_json::{Map, Value, json};

use super::meter::{self, Exceeded};
use crate::canonical;

/// Counts that a part of the schema is applied.
const STEP: &str = "belay.dev/step";
/// Steps back that an engine of patterns takes at most over one text. Patterns without looks around take none.
const STEPS_BACK: usize = 100_000;
/// Memory of one compiled pattern, in bytes.
const LARGEST_PATTERN: usize = 4 << 20;

/// A compiled schema, and the text of it.
pub struct Shape(Validator, Value);

/// Why a value does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// A part of it is not as it should be.
    At {
        /// JSON Pointer into the value.
        instance: String,
        /// JSON Pointer into the schema.
        schema: String,
        /// What was expected, without the value.
        words: String,
    },
    /// It takes too much to find out.
    Exceeded(Exceeded),
}

impl Shape {
    /// Compiles a schema.
    ///
    /// # Errors
    /// Why it is none.
    pub fn compile(schema: &Value) -> Result<Self, String> {
        let patterns = PatternOptions::fancy_regex().backtrack_limit(STEPS_BACK).size_limit(LARGEST_PATTERN);
        jsonschema::draft202012::options()
            // A contract that says `format: uuid` means it.
            .should_validate_formats(true)
            .with_pattern_options(patterns)
            .with_keyword(STEP, |_, _, _| Ok(Box::new(Step)))
            .with_keyword("uniqueItems", |_, wanted, _| Ok(Box::new(Unique(wanted == &Value::Bool(true)))))
            .build(&metered(schema))
            .map(|validator| Self(validator, schema.clone()))
            .map_err(|error| error.to_string())
    }

    /// Whether a value fits.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, value: &Value) -> Result<(), Misfit> {
        meter::metered(|| {
            let fits = self.0.is_valid(value);
            meter::ended_by_itself().map_err(Misfit::Exceeded)?;
            if fits {
                return Ok(());
            }
            // Errors are made of copies, so only now.
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

/// The schema, with steps to count.
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
        // The one keyword that looks at its parts in order: where no step is left, nothing is referred to. At the end, as others may refer to
        // what was there by its place.
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

/// `uniqueItems`, by each item's one form.
struct Unique(bool);

impl<'i> Keyword<'i> for Unique {
    fn validate(&self, instance: &'i Value) -> Result<(), ValidationError<'i>> {
        if self.is_valid(instance) {
            Ok(())
        } else {
            Err(ValidationError::custom("expected a list in which each item is there once, found one twice"))
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
