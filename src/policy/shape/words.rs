//! Describes in words why a value does not fit a schema.
//!
//! Guarantees: the reader learns what was expected and what kind of value was found, without knowledge of the validator or of schema
//! keywords. Members are named, and values are not repeated.
//! Non-goals: a complete list of misfits. The first misfit is enough to continue.

use std::fmt::Write;

use jsonschema::{
    JsonType, ValidationError,
    error::{TypeKind, ValidationErrorKind as Kind},
};
use serde_json::Value;

use crate::policy::shorten::shorten_to;

/// Maximum number of names and options that are listed. The rest is only counted.
const MOST_LISTED: usize = 8;
/// Maximum length of a name, in characters.
const LONGEST_NAME: usize = 48;
/// Maximum number of forms of a value that are described one by one.
const MOST_FORMS: usize = 4;
/// Maximum nesting of forms within forms.
const DEEPEST: usize = 2;

/// Describes the misfit at the error's place.
pub fn of(error: &ValidationError<'_>, schema: &Value, whole: &Value) -> String {
    within(error, schema, whole, 0)
}

fn within(error: &ValidationError<'_>, schema: &Value, whole: &Value, depth: usize) -> String {
    let found = kind_of(error.instance());
    let members = |names: &[String]| {
        let known = parent(error, schema).and_then(|schema| schema.get("properties")?.as_object());
        let known: Vec<&str> = known.into_iter().flat_map(|known| known.keys().map(String::as_str)).collect();
        unexpected(error, names, &known)
    };
    match error.kind() {
        Kind::Type { kind } => format!("expected {}, found {found}", types(kind)),
        Kind::Required { property } => format!("expected {} {property}, found none", member(error)),
        Kind::AdditionalProperties { unexpected } | Kind::UnevaluatedProperties { unexpected } => members(unexpected),
        // The validator does not list the members if the schema has no properties.
        Kind::FalseSchema if is_of_others(error) => {
            let object = whole.pointer(error.instance_path().as_str()).and_then(Value::as_object);
            let names: Vec<String> = object.into_iter().flat_map(|object| object.keys().cloned()).collect();
            if names.is_empty() { nothing(found) } else { members(&names) }
        }
        Kind::FalseSchema => nothing(found),
        Kind::Enum { options } => {
            format!("expected {}, found {}", one_of(options), if is_text(options) { other(found) } else { "another value" })
        }
        Kind::Constant { expected_value } => format!("expected {expected_value}, found another value"),
        Kind::Pattern { pattern } => format!("expected text that matches `{pattern}`, found text that does not"),
        Kind::Format { format } => format!("expected text that is a valid `{format}`, found text that is not"),
        Kind::Minimum { limit } => format!("expected a number of at least {limit}, found a smaller one"),
        Kind::Maximum { limit } => format!("expected a number of at most {limit}, found a larger one"),
        Kind::ExclusiveMinimum { limit } => format!("expected a number above {limit}, found a number that is not"),
        Kind::ExclusiveMaximum { limit } => format!("expected a number below {limit}, found a number that is not"),
        Kind::MultipleOf { multiple_of } => format!("expected a multiple of {multiple_of}, found another number"),
        Kind::MinLength { limit } => format!("expected text of at least {}, found less", counted(*limit, "character")),
        Kind::MaxLength { limit } => format!("expected text of at most {}, found more", counted(*limit, "character")),
        Kind::MinItems { limit } => format!("expected a list of at least {}, found fewer", counted(*limit, "item")),
        Kind::MaxItems { limit } => format!("expected a list of at most {}, found more", counted(*limit, "item")),
        Kind::AdditionalItems { limit } => format!("expected a list of at most {limit} items, found more"),
        Kind::UnevaluatedItems { unexpected } => {
            format!("expected a list with {} fewer: the schema allows no more", counted(length(unexpected), "item"))
        }
        Kind::MinProperties { limit } => format!("expected an object of at least {}, found fewer", counted(*limit, "member")),
        Kind::MaxProperties { limit } => format!("expected an object of at most {}, found more", counted(*limit, "member")),
        Kind::UniqueItems => "expected a list without duplicates, found an item twice".to_owned(),
        Kind::Contains => "expected as many items that match `contains` as the schema says, found fewer or more".to_owned(),
        Kind::PropertyNames { error } => format!("the name of a member: {}", within(error, schema, whole, depth)),
        Kind::AnyOf { context } | Kind::OneOfNotValid { context } => forms(error, context, schema, whole, depth),
        Kind::OneOfMultipleValid { .. } => {
            "expected a value that matches exactly one form of the contract, found one that matches several".to_owned()
        }
        Kind::Not { .. } => "expected a value that does not match the schema under `not`, found one that does".to_owned(),
        Kind::ContentEncoding { content_encoding } => format!("expected text encoded as `{content_encoding}`, found other text"),
        Kind::ContentMediaType { content_media_type } => format!("expected text that holds `{content_media_type}`, found other text"),
        Kind::FromUtf8 { .. } => "expected encoded text that is UTF-8, found other bytes".to_owned(),
        Kind::BacktrackLimitExceeded { .. } | Kind::RegexEngineFailure { .. } => {
            "expected text that the schema's `pattern` can check in time, found text that takes too long: send a shorter text".to_owned()
        }
        Kind::Custom { message, .. } => message.clone(),
        Kind::Referencing(_) => "the schema refers to a part that it does not have: the owner of the contract can correct it".to_owned(),
    }
}

/// Returns whether the error is about members of an object that its schema does not name.
fn is_of_others(error: &ValidationError<'_>) -> bool {
    let path = error.schema_path().as_str();
    ["/additionalProperties", "/unevaluatedProperties", "/propertyNames"].iter().any(|keyword| path.ends_with(keyword))
}

/// Returns the part of the schema that contains the error's keyword.
fn parent<'s>(error: &ValidationError<'_>, schema: &'s Value) -> Option<&'s Value> {
    schema.pointer(error.schema_path().as_str().rsplit_once('/')?.0)
}

fn member(error: &ValidationError<'_>) -> &'static str {
    if error.instance_path().as_str().is_empty() { "the argument" } else { "the member" }
}

fn nothing(found: &str) -> String {
    format!("expected nothing, found {found}: leave it out")
}

fn unexpected(error: &ValidationError<'_>, names: &[String], known: &[&str]) -> String {
    let are = if error.instance_path().as_str().is_empty() { "arguments" } else { "members" };
    let expected = if known.is_empty() { format!("no {are}") } else { format!("only the {are} {}", quoted(known)) };
    let them = if names.len() == 1 { "it" } else { "them" };
    format!("found {}, expected {expected}: leave {them} out", quoted(names))
}

fn length<T>(items: &[T]) -> u64 {
    u64::try_from(items.len()).unwrap_or(u64::MAX)
}

fn forms(
    error: &ValidationError<'_>,
    forms: &[Vec<ValidationError<'static>>],
    schema: &Value,
    whole: &Value,
    depth: usize,
) -> String {
    let mut text = format!("expected one of {}, found none of them", counted(length(forms), "form"));
    if depth >= DEEPEST || forms.len() > MOST_FORMS {
        return text;
    }
    for (index, errors) in forms.iter().enumerate() {
        let Some(first) = errors.first() else { continue };
        let place = first.instance_path().as_str();
        let place = if place == error.instance_path().as_str() { String::new() } else { format!(" at {place}:") };
        // Writing to a String never fails.
        let _ = write!(
            text,
            "; form {}:{place} {}",
            index.saturating_add(1),
            within(first, schema, whole, depth.saturating_add(1))
        );
    }
    text
}

fn counted(count: u64, one: &str) -> String {
    if count == 1 { format!("1 {one}") } else { format!("{count} {one}s") }
}

/// Returns the names in quotes, and how many more there are.
fn quoted<T: AsRef<str>>(names: &[T]) -> String {
    let mut text: Vec<_> =
        names.iter().take(MOST_LISTED).map(|name| format!("{:?}", shorten_to(name.as_ref(), LONGEST_NAME))).collect();
    let more = names.len().saturating_sub(MOST_LISTED);
    text.extend((more > 0).then(|| format!("{more} more")));
    text.join(", ")
}

fn is_text(options: &Value) -> bool {
    options.as_array().is_some_and(|options| options.iter().all(Value::is_string))
}

fn other(found: &str) -> &str {
    if found == "text" { "other text" } else { found }
}

fn one_of(options: &Value) -> String {
    let options = options.as_array().map(Vec::as_slice).unwrap_or_default();
    let mut text: Vec<_> = options.iter().take(MOST_LISTED).map(Value::to_string).collect();
    let more = options.len().saturating_sub(MOST_LISTED);
    text.extend((more > 0).then(|| format!("{more} more")));
    if let [only] = text.as_slice() { only.clone() } else { format!("one of {}", text.join(", ")) }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(number) if number.is_f64() => "a number with a fraction",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn types(kind: &TypeKind) -> String {
    let one = |one: JsonType| match one {
        JsonType::Null => "null",
        JsonType::Boolean => "true or false",
        JsonType::Integer => "a whole number",
        JsonType::Number => "a number",
        JsonType::String => "text",
        JsonType::Array => "a list",
        JsonType::Object => "an object",
    };
    match kind {
        TypeKind::Single(single) => one(*single).to_owned(),
        TypeKind::Multiple(several) => several.iter().map(one).collect::<Vec<_>>().join(", or "),
    }
}
