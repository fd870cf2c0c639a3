//! Converts a listed tool to the text of a contract. It uses no network.

use std::collections::BTreeSet;

use rmcp::model::Tool;
use serde_json::{Map, Value, json};

use crate::{
    cli::terminal::Safe,
    policy::{config::SideEffect, definition::Definition},
    render::schema,
};

/// The maximum length of a contract's description, as in the CRD.
const LONGEST_DESCRIPTION: usize = 4096;
/// The maximum length of a tool's name, as in the CRD.
const LONGEST_TOOL: usize = 128;
/// The maximum length of the name that a draft gives to its contract.
const LONGEST_NAME: usize = 63;
/// The maximum number of fields at the top of an input schema, as in the CRD.
const MOST_FIELDS: usize = 64;

/// Words of Belay and of JSON Schema that need no quotes.
const BARE: [&str; 11] = [
    "belay.dev/v1alpha1",
    "ToolContract",
    "read",
    "write",
    "external",
    "object",
    "array",
    "string",
    "integer",
    "number",
    "boolean",
];

/// A draft of a contract.
pub(super) struct Draft {
    /// `metadata.name`, which is also the name of the file.
    pub(super) name: String,
    /// YAML with comments.
    pub(super) text: String,
}

/// Returns a draft for each tool, and the reasons why other tools have none.
pub(super) fn drafts(tools: &[Tool], url: &str, namespace: Option<&str>) -> (Vec<Draft>, Vec<String>) {
    let (mut names, mut tool_names) = (BTreeSet::new(), BTreeSet::new());
    let (mut drafts, mut left_out) = (Vec::new(), Vec::new());
    for tool in tools {
        let listed = tool.name.as_ref();
        if listed.is_empty() || listed.chars().count() > LONGEST_TOOL {
            left_out.push(format!("expected a name of 1 to {LONGEST_TOOL} characters, found `{listed}`"));
            continue;
        }
        let name = unique(&kubernetes_name(listed), "-", LONGEST_NAME, &mut names);
        let tool_name = unique(&agent_name(listed), "_", LONGEST_TOOL, &mut tool_names);
        drafts.push(draft(tool, name, tool_name, url, namespace));
    }
    (drafts, left_out)
}

fn draft(tool: &Tool, name: String, tool_name: String, url: &str, namespace: Option<&str>) -> Draft {
    let mut comments = vec![
        format!(
            "DRAFT, made by `belay contract init` from what {url} lists. A person must review each line before it is applied:"
        ),
        "the server wrote the schema, and the description, which the agent will read. Both are unchecked.".to_owned(),
    ];
    if tool_name != tool.name {
        comments
            .push(format!("tool: the server's name `{}` has characters that an agent's tool may not have.", tool.name));
    }
    let (side_effect, reason) = side_effect(tool);
    comments.push(format!("sideEffect: {reason}"));
    let (description, cut) = description(tool);
    comments.extend(cut.map(|cut| format!("description: {cut}")));
    let (input, dropped) = input(&tool.input_schema);
    comments.extend(dropped.into_iter().map(|dropped| format!("input: {dropped}")));
    let mut metadata = json!({"name": name});
    if let (Some(namespace), Some(metadata)) = (namespace, metadata.as_object_mut()) {
        metadata.insert("namespace".into(), namespace.into());
    }
    let head = [("apiVersion", json!("belay.dev/v1alpha1")), ("kind", json!("ToolContract")), ("metadata", metadata)];
    let mut upstream = json!({"url": url, "tool": tool.name});
    // Pin the definition that a person reviews.
    if let (Ok(definition), Some(upstream)) = (
        serde_json::to_value(tool).map_err(drop).and_then(|tool| Definition::of(&tool).map_err(drop)),
        upstream.as_object_mut(),
    ) {
        upstream.insert("digest".into(), definition.digest.into());
    }
    let spec = [
        ("tool", json!(tool_name)),
        ("description", json!(description)),
        ("sideEffect", json!(side_effect.as_str())),
        ("upstream", json!({"mcp": upstream})),
        ("input", input),
    ];
    let mut text = String::new();
    for comment in comments {
        text.push_str(&format!("# {}\n", Safe(&comment)));
    }
    head.iter().for_each(|(key, value)| yaml(key, value, 0, &mut text));
    text.push_str("spec:\n");
    spec.iter().for_each(|(key, value)| yaml(key, value, 1, &mut text));
    Draft { name, text }
}

/// Writes block YAML with every string in JSON's quotes. So text from a server can neither end its line nor become anything else than text,
/// whatever version of YAML reads it.
fn yaml(key: &str, value: &Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(map) if !map.is_empty() => {
            text.push_str(&format!("{indent}{}:\n", name(key)));
            map.iter().for_each(|(key, value)| yaml(key, value, depth + 1, text));
        }
        other => text.push_str(&format!("{indent}{}: {}\n", name(key), scalar(other))),
    }
}

/// Returns a key, unquoted only if every YAML version reads it as the same text.
fn name(key: &str) -> String {
    const WORDS: [&str; 9] = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];
    let plain = key.chars().all(|c| c.is_ascii_alphanumeric())
        && key.starts_with(|c: char| c.is_ascii_alphabetic())
        && !WORDS.contains(&key.to_ascii_lowercase().as_str());
    if plain { key.to_owned() } else { scalar(&key.into()) }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(word) if BARE.contains(&word.as_str()) => word.clone(),
        other => crate::cli::terminal::safe_json(&other.to_string()),
    }
}

/// Returns the side effect of a call, and the reason for it.
fn side_effect(tool: &Tool) -> (SideEffect, String) {
    let hints = tool.annotations.as_ref();
    let hint = |hint: Option<bool>| hint == Some(true);
    let destructive = hints.and_then(|hints| hints.destructive_hint);
    if hint(hints.and_then(|hints| hints.read_only_hint)) {
        // A tool that claims both contradicts itself, so the worse claim counts.
        if hint(destructive) {
            let reason = "write, because the server says both readOnlyHint and destructiveHint.";
            return (SideEffect::Write, reason.to_owned());
        }
        return (
            SideEffect::Read,
            "read, because the server says readOnlyHint. Check that it is true: a read is not held back.".to_owned(),
        );
    }
    if hint(hints.and_then(|hints| hints.open_world_hint)) {
        let reason = "external, because the server says openWorldHint: it reaches beyond what the organisation owns.";
        return (SideEffect::External, reason.to_owned());
    }
    let reason =
        "write, because the server does not say readOnlyHint. If it sends mail, pays or posts, make it external.";
    (SideEffect::Write, reason.to_owned())
}

fn description(tool: &Tool) -> (String, Option<String>) {
    let listed = tool.description.as_deref().or(tool.title.as_deref()).map(str::trim).unwrap_or_default();
    if listed.is_empty() {
        let none = "the server lists none. Say what the tool does.";
        return (format!("The tool {} of an MCP server.", tool.name), Some(none.to_owned()));
    }
    match listed.char_indices().nth(LONGEST_DESCRIPTION) {
        Some((end, _)) => (
            listed.get(..end).unwrap_or_default().to_owned(),
            Some(format!("cut after {LONGEST_DESCRIPTION} characters. Shorten it.")),
        ),
        None => (listed.to_owned(), None),
    }
}

/// Returns the schema as it will be enforced, and which parts of the listed schema it lacks.
fn input(listed: &Map<String, Value>) -> (Value, Vec<String>) {
    /// The maximum number of repairs. A user would not repair more.
    const MOST: usize = 64;
    let mut schema = Value::Object(listed.clone());
    let mut dropped = Vec::new();
    let without_arguments = |mut dropped: Vec<String>, why: String| {
        dropped.push(format!("{why}; the draft takes no arguments at all. Write the schema yourself."));
        (json!({"type": "object", "additionalProperties": false}), dropped)
    };
    if listed.len() >= MOST_FIELDS {
        return without_arguments(
            dropped,
            format!("the listed schema has more than {MOST_FIELDS} keywords at its top"),
        );
    }
    for _ in 0..MOST {
        let errors = match schema::close(&schema) {
            Ok(closed) => return (closed, dropped),
            Err(errors) => errors,
        };
        let mut mended = false;
        for error in errors {
            let what = format!("{} was dropped: expected {}, found {}", error.pointer, error.expected, error.found);
            if error.pointer == "/type" {
                if let Some(root) = schema.as_object_mut() {
                    root.insert("type".into(), "object".into());
                    dropped.push(format!("type is `object`, because arguments are one; found {}.", error.found));
                    mended = true;
                }
            } else if remove(&mut schema, &error.pointer) {
                dropped.push(if error.pointer == "/$schema" {
                    format!(
                        "$schema was dropped: found {}, and it is read as draft 2020-12. Check what differs.",
                        error.found
                    )
                } else {
                    format!("{what}. Arguments that it forbade are allowed now: write it again.")
                });
                mended = true;
            }
        }
        if !mended {
            break;
        }
    }
    let why = schema::close(&schema).err().and_then(|errors| errors.into_iter().next());
    let why = why.map_or_else(String::new, |error| format!(" (expected {}, found {})", error.expected, error.found));
    without_arguments(dropped, format!("the listed schema cannot be used{why}"))
}

/// Removes what a JSON Pointer leads to. For an item of a list the whole list is removed, because the positions of the other items matter.
fn remove(schema: &mut Value, pointer: &str) -> bool {
    let mut pointer = pointer;
    while let Some((parent, key)) = pointer.rsplit_once('/') {
        if let Some(map) = schema.pointer_mut(parent).and_then(Value::as_object_mut) {
            return map.remove(&key.replace("~1", "/").replace("~0", "~")).is_some();
        }
        pointer = parent;
    }
    false
}

fn kubernetes_name(listed: &str) -> String {
    let mut name = String::new();
    for c in listed.chars() {
        match c.to_ascii_lowercase() {
            c if c.is_ascii_alphanumeric() => name.push(c),
            _ if name.is_empty() || name.ends_with('-') => {}
            _ => name.push('-'),
        }
    }
    let name = name.get(..LONGEST_NAME).unwrap_or(&name).trim_matches('-');
    if name.is_empty() { "tool".to_owned() } else { name.to_owned() }
}

fn agent_name(listed: &str) -> String {
    listed.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-') { c } else { '_' }).collect()
}

/// Returns the name, with a number appended if it is taken.
fn unique(name: &str, separator: &str, longest: usize, taken: &mut BTreeSet<String>) -> String {
    let mut candidate = name.to_owned();
    let mut number = 1_u32;
    while !taken.insert(candidate.clone()) {
        number += 1;
        let end = format!("{separator}{number}");
        let room = longest.saturating_sub(end.len());
        candidate = format!("{}{end}", name.get(..room).unwrap_or(name));
    }
    candidate
}
