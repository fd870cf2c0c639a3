//! Checks an object by itself as the API server does: the CRD's structural schema, strictly, and its CEL rules.
//!
//! Guarantees: types, bounds, patterns, required and unknown fields, list keys and `x-kubernetes-validations` are those of
//! [`api`](crate::api), the same definitions that are installed.
//!
//! Non-goals: rules about updates, which need the old object.

use std::collections::HashSet;

use jsonschema::{
    Draft, Validator,
    error::{TypeKind, ValidationErrorKind},
};
use k8s_openapi::{
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::core::cel;
use serde_json::{Map, Value, json};

use super::document::{Node, Place};
use crate::{policy::json::pointer_token, render::Finding};

/// The maximum length of a value in a message.
const LONGEST: usize = 80;
/// Valid names of objects, as in the API server.
const NAME: &str = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$";
/// Valid names of namespaces.
const NAMESPACE: &str = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$";
/// Valid values of labels.
const LABEL: &str = r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$";

/// The schema of one kind, compiled for checks.
pub(super) struct Kind {
    pub(super) name: String,
    pub(super) api_version: String,
    structural: Value,
    validator: Validator,
    rules: cel::CompiledSchema,
}

impl Kind {
    /// Compiles the schema of a CRD.
    ///
    /// # Errors
    /// Returns an error if the CRD has no usable schema. Belay's CRDs always have one.
    pub(super) fn of(crd: &CustomResourceDefinition) -> Result<Self, String> {
        let unusable = |error: &dyn std::fmt::Display| format!("CRD {}: {error}", crd.spec.names.kind);
        let version = crd.spec.versions.first().ok_or_else(|| unusable(&"no version"))?;
        let schema = version.schema.as_ref().and_then(|schema| schema.open_api_v3_schema.as_ref());
        let mut structural = serde_json::to_value(schema).map_err(|error| unusable(&error))?;
        let rules = cel::compile_schema(&structural);
        let root = structural.pointer_mut("/properties").and_then(Value::as_object_mut);
        let root = root.ok_or_else(|| unusable(&"no properties"))?;
        root.insert("apiVersion".into(), json!({"type": "string"}));
        root.insert("kind".into(), json!({"type": "string"}));
        root.insert("metadata".into(), metadata(crd.spec.scope == "Namespaced"));
        if let Some(Value::Array(required)) = structural.get_mut("required") {
            required.push("metadata".into());
        }
        let mut strict = structural.clone();
        make_strict(&mut strict);
        let validator = jsonschema::options().with_draft(Draft::Draft202012).build(&strict);
        Ok(Self {
            name: crd.spec.names.kind.clone(),
            api_version: format!("{}/{}", crd.spec.group, version.name),
            validator: validator.map_err(|error| unusable(&error))?,
            structural,
            rules,
        })
    }

    /// Returns everything that is wrong with an object, with positions.
    pub(super) fn check(&self, node: &Node, object: &Value) -> Vec<(Place, Finding)> {
        let mut found = Vec::new();
        for error in self.validator.iter_errors(object) {
            self.explain(&error, node, &mut found);
        }
        list_keys(&self.structural, object, "", &mut |pointer, finding| {
            let (place, field) = node.at_pointer(pointer);
            found.push((place, Finding { field, ..finding }));
        });
        // As on the API server, rules may rely on the schema.
        if found.is_empty()
            && let Err(errors) = cel::Validator::new().validate_compiled(&self.rules, object, None)
        {
            found.extend(errors.as_slice().iter().map(|error| explain_rule(error, node)));
        }
        found
    }

    fn explain(&self, error: &jsonschema::ValidationError<'_>, node: &Node, found: &mut Vec<(Place, Finding)>) {
        use ValidationErrorKind as Error;
        let pointer = error.instance_path().to_string();
        let (place, field) = node.at_pointer(&pointer);
        let instance: &Value = error.instance();
        let schema = schema_at(&self.structural, &pointer);
        let means = schema.and_then(meaning).map(|text| format!(": {text}")).unwrap_or_default();
        let shown = brief(instance);
        let found_one = |expected: String, mend: String| {
            (place, Finding::new(if field.is_empty() { "the object" } else { &field }, expected, shown.clone(), mend))
        };
        let length = |instance: &Value| instance.as_str().map_or(0, |text| text.chars().count());
        match error.kind() {
            Error::AdditionalProperties { unexpected } => {
                let known: Vec<&str> = schema
                    .and_then(|schema| schema.get("properties")?.as_object())
                    .into_iter()
                    .flat_map(|fields| fields.keys().map(String::as_str))
                    .collect();
                for name in unexpected {
                    let name_pointer = format!("{pointer}/{}", pointer_token(name));
                    let (place, field) = node.at_pointer(&name_pointer);
                    let mend = nearest(name, &known)
                        .map_or_else(|| "remove it".to_owned(), |near| format!("write `{near}`, or remove it"));
                    let expected = format!("one of the fields {}", known.join(", "));
                    found.push((place, Finding::new(field, expected, format!("`{}`", shorten(name)), mend)));
                }
            }
            Error::Required { property } => {
                let name = property.as_str().unwrap_or_default();
                let path = format!("{field}{}{name}", if field.is_empty() { "" } else { "." });
                let means = schema_at(&self.structural, &format!("{pointer}/{name}")).and_then(meaning);
                let mend = means.map_or_else(|| "add it".to_owned(), |text| format!("add it: {text}"));
                found.push((place, Finding::new(path, "a value", "nothing", mend)));
            }
            Error::Type { kind } => {
                let expected = match kind {
                    TypeKind::Single(one) => one.to_string(),
                    TypeKind::Multiple(several) => several
                        .iter()
                        .map(|one| one.to_string())
                        .filter(|one| one != "null")
                        .collect::<Vec<_>>()
                        .join(" or "),
                };
                let article = if expected.starts_with(['a', 'i', 'o']) { "an" } else { "a" };
                let mend = match (expected.as_str(), instance) {
                    ("string", Value::Number(_) | Value::Bool(_)) => "put it in quotes".to_owned(),
                    ("integer", Value::String(_) | Value::Number(_)) => {
                        "write a whole number without quotes".to_owned()
                    }
                    ("array", _) => format!("write a list, `- …`{means}"),
                    ("object", _) => format!("write its fields{means}"),
                    _ => format!("correct it{means}"),
                };
                found.push(found_one(format!("{article} {expected}"), mend));
            }
            Error::Enum { options } => {
                let options: Vec<&str> = options.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                let near = instance.as_str().and_then(|text| nearest(text, &options));
                let mend = near.map_or_else(|| format!("choose one{means}"), |near| format!("write `{near}`"));
                found.push(found_one(format!("one of {}", options.join(", ")), mend));
            }
            Error::Pattern { pattern } => {
                found.push(found_one(format!("text that matches {pattern}"), format!("correct it{means}")));
            }
            Error::Minimum { limit } => {
                found.push(found_one(format!("at least {}", whole(limit)), format!("raise it{means}")));
            }
            Error::Maximum { limit } => {
                found.push(found_one(format!("at most {}", whole(limit)), format!("lower it{means}")));
            }
            Error::MinLength { limit } => {
                found.push(found_one(format!("at least {limit} characters"), format!("fill it in{means}")));
            }
            Error::MaxLength { limit: 0 } => {
                found.push(found_one("nothing".to_owned(), format!("leave it out{means}")))
            }
            Error::MaxLength { limit } => {
                let mut one = found_one(format!("at most {limit} characters"), "shorten it".to_owned());
                one.1.found = format!("{} characters", length(instance));
                found.push(one);
            }
            Error::MinItems { limit } => {
                found.push(found_one(format!("at least {limit} items"), format!("add one{means}")));
            }
            Error::MaxItems { limit } | Error::MaxProperties { limit } => {
                let mut one = found_one(format!("at most {limit} entries"), "keep fewer".to_owned());
                let count = instance.as_array().map(Vec::len).or(instance.as_object().map(Map::len));
                one.1.found = count.unwrap_or_default().to_string();
                found.push(one);
            }
            _ => found.push(found_one(shorten(&error.to_string()), format!("correct it{means}"))),
        }
    }
}

/// Converts a broken rule of a CRD to a finding. The rule's own message says what was expected.
fn explain_rule(error: &cel::ValidationError, node: &Node) -> (Place, Finding) {
    let object = node.value();
    let value = |field: &str| object.pointer(&format!("/{}", field.replace(['.', '['], "/").replace(']', "")));
    // The field that a rule is about: the common part of everything that it reads. For example, `self.metadata.name.size() <= 52` is about
    // the name.
    let words = |text: &'_ str| {
        let path = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '.').next().unwrap_or_default();
        path.split('.').map(str::to_owned).collect::<Vec<_>>()
    };
    let common = error.rule.split("self.").skip(1).map(words).reduce(|common, other| {
        common.into_iter().zip(other).take_while(|(one, other)| one == other).map(|(one, _)| one).collect()
    });
    let common = common.unwrap_or_default();
    let within = |end: usize| {
        let inner = common.get(..end)?.join(".");
        Some(if error.field_path.is_empty() { inner } else { format!("{}.{inner}", error.field_path) })
    };
    let about = (1..=common.len()).rev().filter_map(within).find(|field| value(field).is_some());
    let field = about.unwrap_or_else(|| error.field_path.clone());
    let place = node.at_path(&field);
    let shown = value(&field).map_or_else(|| "an object that breaks it".to_owned(), brief);
    (
        place,
        Finding::new(
            field,
            format!("what the rule asks for ({})", shorten_to(&error.message, 300)),
            shown,
            format!("make `{}` hold", shorten_to(&error.rule, 200)),
        ),
    )
}

/// Returns the schema of the metadata, the part of an object that the API server itself defines.
fn metadata(namespaced: bool) -> Value {
    let settings = schemars::generate::SchemaSettings::openapi3().with(|settings| settings.inline_subschemas = true);
    let schema = settings.into_generator().into_root_schema_for::<ObjectMeta>();
    let mut schema = schema.to_value();
    let replace = |schema: &mut Value, field: &str, with: Value| {
        if let Some(fields) = schema.get_mut("properties").and_then(Value::as_object_mut) {
            fields.insert(field.to_owned(), with);
        }
    };
    let name = "Lower-case letters, digits, dashes and dots, unique among its kind in the namespace.";
    replace(
        &mut schema,
        "name",
        json!({"type": "string", "minLength": 1, "maxLength": 253, "pattern": NAME, "description": name}),
    );
    let namespace = if namespaced {
        json!({"type": "string", "maxLength": 63, "pattern": NAMESPACE, "description": "The name of a namespace."})
    } else {
        json!({"type": "string", "maxLength": 0, "description": "This kind belongs to the whole cluster."})
    };
    replace(&mut schema, "namespace", namespace);
    let labels = json!({"type": "string", "maxLength": 63, "pattern": LABEL, "description": "A label's value."});
    replace(&mut schema, "labels", json!({"type": "object", "nullable": true, "additionalProperties": labels}));
    if let Some(map) = schema.as_object_mut() {
        map.insert("required".into(), json!(["name"]));
        map.insert("description".into(), "The object's name and namespace.".into());
    }
    schema
}

/// Makes a structural schema a JSON Schema that is as strict as the API server.
fn make_strict(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    let is = |map: &Map<String, Value>, key: &str| map.get(key).and_then(Value::as_bool).unwrap_or(false);
    for part in ["properties", "patternProperties"] {
        map.get_mut(part).and_then(Value::as_object_mut).into_iter().flat_map(Map::values_mut).for_each(make_strict);
    }
    for part in ["items", "additionalProperties"] {
        if let Some(inner) = map.get_mut(part) {
            make_strict(inner);
        }
    }
    if is(map, "x-kubernetes-int-or-string") {
        map.insert("type".into(), json!(["integer", "string"]));
    }
    let closed = map.contains_key("properties")
        && !map.contains_key("additionalProperties")
        && !is(map, "x-kubernetes-preserve-unknown-fields");
    if closed {
        map.insert("additionalProperties".into(), Value::Bool(false));
    }
    // A null is replaced by the default, if there is one.
    if is(map, "nullable") || map.contains_key("default") {
        if let Some(kind) = map.get("type").and_then(Value::as_str).map(str::to_owned) {
            map.insert("type".into(), json!([kind, "null"]));
        }
        if let Some(Value::Array(options)) = map.get_mut("enum") {
            options.push(Value::Null);
        }
    }
}

/// Finds duplicate items of lists that are sets, or maps with key fields.
fn list_keys(schema: &Value, value: &Value, pointer: &str, find: &mut dyn FnMut(&str, Finding)) {
    match value {
        Value::Object(fields) => {
            for (name, inner) in fields {
                let property = schema.get("properties").and_then(|fields| fields.get(name));
                if let Some(schema) = property.or_else(|| schema_of_values(schema)) {
                    list_keys(schema, inner, &format!("{pointer}/{}", pointer_token(name)), find);
                }
            }
        }
        Value::Array(items) => {
            let keys: Vec<&str> = schema
                .get("x-kubernetes-list-map-keys")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .collect();
            let set = schema.get("x-kubernetes-list-type").and_then(Value::as_str) == Some("set");
            let key_of = |item: &Value| -> Vec<Value> {
                if set {
                    return vec![item.clone()];
                }
                keys.iter().map(|key| item.get(key).cloned().unwrap_or_default()).collect()
            };
            let mut seen = HashSet::new();
            for (index, item) in items.iter().enumerate() {
                let here = format!("{pointer}/{index}");
                let key = key_of(item);
                if !key.is_empty() && !seen.insert(key.clone()) {
                    let expected = if set { "item".to_owned() } else { keys.join(" and ") };
                    let shown: Vec<_> = key.iter().map(brief).collect();
                    let found = format!("{} again", shown.join(", "));
                    let at = match keys.first() {
                        Some(first) if !set => format!("{here}/{first}"),
                        _ => here.clone(),
                    };
                    find(&at, Finding::new("", format!("each {expected} once"), found, "rename or remove one of them"));
                }
                if let Some(schema) = schema.get("items") {
                    list_keys(schema, item, &here, find);
                }
            }
        }
        _ => {}
    }
}

fn schema_of_values(schema: &Value) -> Option<&Value> {
    schema.get("additionalProperties").filter(|schema| schema.is_object())
}

/// Returns the schema of the value at a JSON Pointer.
fn schema_at<'s>(schema: &'s Value, pointer: &str) -> Option<&'s Value> {
    pointer.split('/').skip(1).try_fold(schema, |schema, part| {
        let part = part.replace("~1", "/").replace("~0", "~");
        let property = schema.get("properties").and_then(|fields| fields.get(&part));
        property.or_else(|| schema.get("items")).or_else(|| schema_of_values(schema))
    })
}

/// Returns the first sentence of a field's documentation.
fn meaning(schema: &Value) -> Option<String> {
    let text = schema.get("description")?.as_str()?;
    let first = text.split("\n\n").next()?.split(". ").next()?.trim_end_matches('.').replace('\n', " ");
    Some(shorten_to(&first, 160))
}

/// Returns the name that was probably meant: one that differs by one or two letters, or by case.
pub(super) fn nearest<'n>(name: &str, known: &[&'n str]) -> Option<&'n str> {
    let near = |other: &&&str| distance(&name.to_lowercase(), &other.to_lowercase()) <= 2.min(name.len() / 2);
    known.iter().filter(near).min_by_key(|other| distance(name, other)).copied()
}

/// Returns how many letters must be inserted, removed or replaced.
fn distance(one: &str, other: &str) -> usize {
    const LONGEST_NAME: usize = 64;
    let other: Vec<char> = other.chars().take(LONGEST_NAME).collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (index, letter) in one.chars().take(LONGEST_NAME).enumerate() {
        let mut corner = index;
        let mut left = index + 1;
        let mut next = vec![left];
        for (above, target) in row.iter().skip(1).zip(&other) {
            left = (left + 1).min(above + 1).min(corner + usize::from(letter != *target));
            corner = *above;
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

/// Returns a bound in the usual notation: `604800`, although a CRD has `604800.0`.
fn whole(limit: &Value) -> String {
    limit.as_f64().map_or_else(|| limit.to_string(), |limit| limit.to_string())
}

/// Returns a value in the form in which messages show it.
pub(super) fn brief(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".to_owned(),
        Value::Array(items) if items.is_empty() => "an empty list".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Null => "null".to_owned(),
        other => shorten(&other.to_string()),
    }
}

fn shorten(text: &str) -> String {
    shorten_to(text, LONGEST)
}

fn shorten_to(text: &str, longest: usize) -> String {
    match text.char_indices().nth(longest) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}
