//! YAML and JSON documents with the position of everything in them.
//!
//! Guarantees: the content is what `kubectl` would send. Aliases and merges are expanded, and `yes`, `on` and `y` are booleans, even as
//! keys. Every field has its line and column.
//!
//! Rejects: duplicate keys, and more nesting, nodes or expansion than a manifest needs (serde-saphyr's budget), so that no input exhausts
//! the stack or the memory.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};
use serde_saphyr::Spanned;

use crate::policy::json::pointer_token;

/// Line and column, both from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::cli) struct Place {
    pub(in crate::cli) line: u64,
    pub(in crate::cli) column: u64,
}

impl Place {
    /// The start of a file, for findings without a better position.
    pub(in crate::cli) const START: Self = Self { line: 1, column: 1 };

    fn of(location: serde_saphyr::Location) -> Self {
        Self { line: location.line().max(1), column: location.column().max(1) }
    }
}

/// A value and its position.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Node {
    pub(in crate::cli) at: Place,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    Scalar(Value),
    Sequence(Vec<Node>),
    Mapping(Vec<(Key, Node)>),
}

#[derive(Clone, Debug)]
struct Key {
    at: Place,
    name: String,
    kind: KeyKind,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum KeyKind {
    Text,
    /// A boolean that is text only because JSON has no other keys: `y:` becomes `"true"`.
    Boolean,
    /// A list, an object or null.
    None,
}

/// A text that is not YAML: the position and the reason.
#[derive(Debug)]
pub(in crate::cli) struct Broken {
    pub(in crate::cli) at: Place,
    pub(in crate::cli) reason: String,
}

/// Parses the documents of a file. Empty documents are left out.
pub(in crate::cli) fn read(bytes: &[u8]) -> Result<Vec<Node>, Broken> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let before = bytes.get(..error.valid_up_to()).unwrap_or_default();
        let line = before.split(|byte| *byte == b'\n');
        let column = line.clone().next_back().map_or(0, <[u8]>::len);
        Broken {
            at: Place { line: line.count() as u64, column: column as u64 + 1 },
            reason: "bytes that are not UTF-8".into(),
        }
    })?;
    let nodes: Vec<Node> = serde_saphyr::from_multiple(text).map_err(|error| {
        let plain = error.without_snippet();
        let reason = plain.to_string();
        let at = plain.location().map_or(Place::START, Place::of);
        let reason = reason
            .lines()
            .next()
            .unwrap_or("text that is not YAML")
            .replace(&format!(" at line {}, column {}", at.line, at.column), "");
        Broken { at: tab_from(text, at, &reason).unwrap_or(at), reason: reason.trim().to_owned() }
    })?;
    let mut nameless = Vec::new();
    nodes.iter().for_each(|node| node.collect_keys(KeyKind::None, "", &mut nameless));
    if let Some((at, _)) = nameless.first() {
        return Err(Broken { at: *at, reason: "a key that is not text, such as a template's braces".into() });
    }
    Ok(nodes.into_iter().filter(|node| !matches!(node.content, Content::Scalar(Value::Null))).collect())
}

/// Returns the position of a tab that indents a line. The parser ends the value before it, and reports the error there.
fn tab_from(text: &str, from: Place, reason: &str) -> Option<Place> {
    let mut lines = (1..).zip(text.lines()).filter(|(line, _)| reason.contains("tab") && *line >= from.line);
    let indented = |text: &str| {
        text.find(|c: char| c != ' ').filter(|end| text.get(*end..).is_some_and(|rest| rest.starts_with('\t')))
    };
    lines.find_map(|(line, text)| Some(Place { line, column: indented(text)? as u64 + 1 }))
}

impl Node {
    /// Returns the plain value.
    pub(in crate::cli) fn value(&self) -> Value {
        match &self.content {
            Content::Scalar(value) => value.clone(),
            Content::Sequence(items) => Value::Array(items.iter().map(Self::value).collect()),
            Content::Mapping(entries) => {
                Value::Object(entries.iter().map(|(key, node)| (key.name.clone(), node.value())).collect::<Map<_, _>>())
            }
        }
    }

    /// Returns the items if it is a sequence, else an empty list.
    pub(in crate::cli) fn items(&self) -> &[Self] {
        match &self.content {
            Content::Sequence(items) => items,
            _ => &[],
        }
    }

    /// Returns a field and the position of its key.
    fn entry(&self, key: &str) -> Option<(Place, &Self)> {
        let Content::Mapping(entries) = &self.content else { return None };
        let (key, node) = entries.iter().find(|(other, _)| other.name == key)?;
        Some((key.at, node))
    }

    /// Returns a field.
    pub(in crate::cli) fn get(&self, key: &str) -> Option<&Self> {
        self.entry(key).map(|(_, node)| node)
    }

    /// Returns a field that is text.
    pub(in crate::cli) fn text(&self, key: &str) -> Option<&str> {
        match &self.get(key)?.content {
            Content::Scalar(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// Returns the positions and the paths of keys that are booleans in YAML 1.1, which `kubectl` reads. Their authors hardly meant
    /// booleans.
    pub(in crate::cli) fn boolean_keys(&self) -> Vec<(Place, String)> {
        let mut found = Vec::new();
        self.collect_keys(KeyKind::Boolean, "", &mut found);
        found
    }

    fn collect_keys(&self, kind: KeyKind, path: &str, found: &mut Vec<(Place, String)>) {
        match &self.content {
            Content::Scalar(_) => {}
            Content::Sequence(items) => {
                for (index, item) in items.iter().enumerate() {
                    item.collect_keys(kind, &format!("{path}[{index}]"), found);
                }
            }
            Content::Mapping(entries) => {
                for (key, node) in entries {
                    let path = format!("{path}{}{}", if path.is_empty() { "" } else { "." }, key.name);
                    if key.kind == kind {
                        found.push((key.at, path.clone()));
                    }
                    node.collect_keys(kind, &path, found);
                }
            }
        }
    }

    /// Returns the position of a JSON Pointer and the same path in the usual notation. If the last part does not exist, its position is
    /// where it would have to be added.
    pub(in crate::cli) fn at_pointer(&self, pointer: &str) -> (Place, String) {
        let (mut node, mut place, mut path) = (Some(self), self.at, String::new());
        for part in pointer.split('/').skip(1) {
            let part = part.replace("~1", "/").replace("~0", "~");
            let next = node.and_then(|node| node.step(&part));
            if let Some(Content::Sequence(_)) = node.map(|node| &node.content) {
                path.push_str(&format!("[{part}]"));
            } else {
                path.push_str(&format!("{}{part}", if path.is_empty() { "" } else { "." }));
            }
            if let Some((at, _)) = next {
                place = at;
            }
            node = next.map(|(_, node)| node);
        }
        (place, path)
    }

    fn step(&self, part: &str) -> Option<(Place, &Self)> {
        match &self.content {
            Content::Sequence(items) => {
                let item = items.get(part.parse::<usize>().ok()?)?;
                Some((item.at, item))
            }
            _ => self.entry(part),
        }
    }

    /// Returns the position of a path in the usual notation (`spec.tools[0]`, `spec.input.anyOf.0.a.b`, `workflowClasses[triage]`), as far
    /// as the path exists.
    pub(in crate::cli) fn at_path(&self, path: &str) -> Place {
        let (mut node, mut place, mut rest) = (self, self.at, path);
        while !rest.is_empty() {
            let found = match &node.content {
                Content::Scalar(_) => None,
                Content::Sequence(items) => index(rest).and_then(|(name, after)| {
                    let named = || items.iter().find(|item| item.text("name") == Some(name));
                    let item = name.parse().map_or_else(|_| named(), |index: usize| items.get(index))?;
                    Some((item.at, item, after))
                }),
                Content::Mapping(entries) => entries
                    .iter()
                    .filter_map(|(key, inner)| {
                        let after = rest.strip_prefix(&*pointer_token(&key.name))?;
                        let whole = after.is_empty() || after.starts_with(['.', '[']);
                        whole.then_some((key.at, inner, after))
                    })
                    // A key may contain dots.
                    .min_by_key(|(_, _, after)| after.len()),
            };
            let Some((at, inner, after)) = found else { break };
            (node, place, rest) = (inner, at, after.strip_prefix('.').unwrap_or(after));
        }
        place
    }
}

/// Splits `[3]…`, `[name]…` or `3.…` into the index and the rest.
fn index(path: &str) -> Option<(&str, &str)> {
    match path.strip_prefix('[') {
        Some(path) => path.split_once(']'),
        None => Some(path.split_at(path.find(['.', '[']).unwrap_or(path.len()))),
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Content>::deserialize(deserializer)?;
        Ok(Self { at: Place::of(spanned.defined), content: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value that JSON has")
            }
            fn visit_bool<E>(self, value: bool) -> Result<Content, E> {
                Ok(Content::Scalar(value.into()))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Content, E> {
                Ok(Content::Scalar(value.into()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Content, E> {
                Ok(Content::Scalar(value.into()))
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Content, E> {
                let number = Number::from_f64(value).ok_or_else(|| E::custom("a number that JSON does not have"))?;
                Ok(Content::Scalar(Value::Number(number)))
            }
            fn visit_str<E>(self, value: &str) -> Result<Content, E> {
                Ok(Content::Scalar(value.into()))
            }
            fn visit_unit<E>(self) -> Result<Content, E> {
                Ok(Content::Scalar(Value::Null))
            }
            fn visit_none<E>(self) -> Result<Content, E> {
                Ok(Content::Scalar(Value::Null))
            }
            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Content, D::Error> {
                deserializer.deserialize_any(self)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Content, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = access.next_element()? {
                    items.push(item);
                }
                Ok(Content::Sequence(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Content, A::Error> {
                let mut entries = Vec::new();
                while let Some((key, node)) = access.next_entry::<Node, Node>()? {
                    let (name, kind) = match key.content {
                        Content::Scalar(Value::String(name)) => (name, KeyKind::Text),
                        Content::Scalar(Value::Bool(name)) => (name.to_string(), KeyKind::Boolean),
                        Content::Scalar(Value::Number(name)) => (name.to_string(), KeyKind::Text),
                        _ => (String::new(), KeyKind::None),
                    };
                    entries.push((Key { at: key.at, name, kind }, node));
                }
                Ok(Content::Mapping(entries))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_where_everything_stands() {
        let text = "---\n---\na:\n  - b: 1\n    c/d.e: {f: [x, 2.5]}\n---\n{\"g\": yes, \"h\": null}\n";
        let documents = read(text.as_bytes()).unwrap();
        let [first, second] = documents.as_slice() else { panic!("{documents:?}") };
        assert_eq!(first.value(), serde_json::json!({"a": [{"b": 1, "c/d.e": {"f": ["x", 2.5]}}]}));
        assert_eq!(second.value(), serde_json::json!({"g": true, "h": null}));
        let at = |line, column| Place { line, column };
        assert_eq!(first.at_path("a[0].b"), at(4, 5));
        assert_eq!(first.at_path("a[0].c~1d.e.f[1]"), at(5, 20));
        assert_eq!(first.at_path("a.0.c~1d.e.f.1"), at(5, 20));
        assert_eq!(first.at_path("a[0].none"), at(4, 5));
        assert_eq!(first.at_pointer("/a/0/c~1d.e/f/0"), (at(5, 17), "a[0].c/d.e.f[0]".into()));
        assert_eq!(second.at_path("h"), at(7, 12));
    }

    #[test]
    fn reads_keys_as_kubectl_does() {
        let documents = read(b"a: [{x: 1, y: 2, 'n': 3, 4: 5}]\n").unwrap();
        let document = documents.first().unwrap();
        assert_eq!(document.value(), serde_json::json!({"a": [{"x": 1, "true": 2, "n": 3, "4": 5}]}));
        assert_eq!(document.boolean_keys(), [(Place { line: 1, column: 12 }, "a[0].true".to_owned())]);
    }

    #[test]
    fn an_alias_leads_to_what_it_stands_for() {
        let documents = read(b"a: &x\n  b: 1\nc: *x\n").unwrap();
        let document = documents.first().unwrap();
        assert_eq!(document.value(), serde_json::json!({"a": {"b": 1}, "c": {"b": 1}}));
        assert_eq!(document.at_path("c.b"), Place { line: 2, column: 3 });
    }

    #[rstest::rstest]
    #[case::duplicate_key(b"a: 1\nb: 2\na: 3\n", 3)]
    #[case::unclosed(b"a: [1,\nb: 2\n", 1)]
    #[case::tab(b"a:\n  b: c\n\td: e\n", 3)]
    #[case::key_without_a_name(b"a: 1\n~: 2\n", 2)]
    #[case::template(b"a: 1\nb: {{ .Values.b }}\n", 2)]
    #[case::no_utf8(b"a: 1\nb: \xff\n", 2)]
    #[case::unknown_alias(b"a: 1\nb: *c\n", 2)]
    fn says_where_it_breaks(#[case] text: &[u8], #[case] line: u64) {
        let broken = read(text).unwrap_err();
        assert_eq!(broken.at.line, line, "{broken:?}");
        assert!(!broken.reason.is_empty());
    }
}
