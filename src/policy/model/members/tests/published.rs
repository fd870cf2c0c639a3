//! Compares the tables with the request types that the providers publish with their SDKs (`e2e/model/publish` writes them to a file), and
//! with requests that are generated from these types and then changed.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Published {
    apis: BTreeMap<String, Vec<String>>,
    types: BTreeMap<String, Type>,
}

#[derive(Deserialize)]
struct Type {
    fields: BTreeMap<String, Form>,
    required: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Form {
    Name(String),
    Ref { r#ref: String },
    Any { any: Vec<Form> },
    List { list: Box<Form> },
    Map { map: Box<Form> },
    Literal { literal: Vec<Value> },
}

fn published() -> Published {
    serde_json::from_str(include_str!("../../../../../e2e/model/published.json")).unwrap()
}

fn api(name: &str) -> Api {
    match name {
        "chat_completions" => Api::ChatCompletions,
        "responses" => Api::Responses,
        "response_input_tokens" => Api::InputTokens,
        "messages" => Api::Messages,
        "count_tokens" => Api::CountTokens,
        "embeddings" => Api::Embeddings,
        "moderations" => Api::Moderations,
        other => panic!("{other}"),
    }
}

/// Compares types with tables, and lists what the tables do not name.
struct Comparison<'p> {
    published: &'p Published,
    seen: BTreeSet<(String, usize)>,
    unknown: BTreeSet<String>,
}

impl Comparison<'_> {
    fn members(&mut self, name: &str, shape: &'static Shape) {
        if !self.seen.insert((name.to_owned(), std::ptr::from_ref(shape).addr())) {
            return;
        }
        for (member, form) in &self.published.types[name].fields {
            let at = format!("{name} {member}");
            match table::row(shape.rows, member) {
                None => drop(self.unknown.insert(format!("{at}: no member of {}", shape.is))),
                Some(row) => self.fate(form, &row.fate, &at),
            }
        }
    }

    fn fate(&mut self, form: &Form, fate: &'static Fate, at: &str) {
        if let Fate::Passes(of) | Fate::Bounded(of, _) = fate {
            self.form(form, of, at);
        }
    }

    fn form(&mut self, form: &Form, of: &'static Of, at: &str) {
        let either = |fits: fn(&Of) -> bool| match of {
            Of::Either(forms) => forms.iter().find(|form| fits(form)).unwrap_or(of),
            of => of,
        };
        match form {
            _ if matches!(of, Of::Data) => {}
            Form::Name(name) if ["null", "skip"].contains(&name.as_str()) => {}
            Form::Any { any } => any.iter().for_each(|form| self.form(form, of, at)),
            Form::Ref { r#ref } => match either(|of| matches!(of, Of::Object(_) | Of::Kinds(_) | Of::Data)) {
                Of::Data => {}
                Of::Object(shape) => self.members(r#ref, shape),
                Of::Kinds(kinds) => self.kind(r#ref, kinds, at),
                other => drop(self.unknown.insert(format!("{at}: an object, where expected is {other:?}"))),
            },
            Form::List { list } => match either(|of| matches!(of, Of::List(_) | Of::Data)) {
                Of::Data => {}
                Of::List(each) => self.form(list, each, at),
                Of::Plain if matches!(**list, Form::Name(_) | Form::Literal { .. }) => {}
                Of::Plain => self.form(list, of, at),
                other => drop(self.unknown.insert(format!("{at}: a list, where expected is {other:?}"))),
            },
            Form::Name(_) | Form::Literal { .. } => {
                let simple =
                    |of: &Of| matches!(of, Of::Plain | Of::Url | Of::Inline | Of::Switch(_) | Of::Words(..) | Of::Data);
                if !simple(either(simple)) {
                    self.unknown.insert(format!("{at}: {form:?}, where expected is an object or a list"));
                }
            }
            Form::Map { map } => drop(self.unknown.insert(format!("{at}: an object of any names ({map:?})"))),
        }
    }

    /// Compares an object that has a `type`.
    fn kind(&mut self, name: &str, kinds: &'static Kinds, at: &str) {
        let Some(form) = self.published.types[name].fields.get("type") else {
            self.unknown.insert(format!("{at}: {name} has no type"));
            return;
        };
        let forms = if let Form::Any { any } = form { any.clone() } else { vec![form.clone()] };
        for value in forms
            .iter()
            .filter_map(|form| if let Form::Literal { literal } = form { Some(literal) } else { None })
            .flatten()
        {
            let kind = value.as_str().unwrap();
            match table::row(kinds.rows, kind) {
                None => drop(self.unknown.insert(format!("{at}: {kind} is not known of {}", kinds.are))),
                Some(row) => self.fate(&Form::Ref { r#ref: name.to_owned() }, &row.fate, at),
            }
        }
    }
}

#[test]
fn the_tables_know_all_that_providers_publish() {
    let published = published();
    let mut comparison = Comparison { published: &published, seen: BTreeSet::new(), unknown: BTreeSet::new() };
    for (name, roots) in &published.apis {
        roots.iter().for_each(|root| comparison.members(root, api(name).table()));
    }
    let unknown: Vec<_> = comparison.unknown.into_iter().collect();
    assert!(unknown.is_empty(), "decide on these in src/policy/model/requests:\n{}", unknown.join("\n"));
    assert!(comparison.seen.len() > 200, "only {} types were compared", comparison.seen.len());
}

/// The control: a new member, a new part and a new tool are noticed.
#[test]
fn what_is_new_is_noticed() {
    let mut published = published();
    let text: Form = serde_json::from_value(json!("string")).unwrap();
    let mut root = published.apis["messages"][0].clone();
    published.types.get_mut(&root).unwrap().fields.insert("brand_new".into(), text.clone());
    let tool = json!({"fields": {"type": {"literal": ["brand_new_tool"]}}, "required": ["type"]});
    published.types.insert("new.Tool".into(), serde_json::from_value(tool).unwrap());
    let tools = json!({"list": {"any": [{"ref": "new.Tool"}]}});
    published.types.get_mut(&root).unwrap().fields.insert("tools".into(), serde_json::from_value(tools).unwrap());
    let mut comparison = Comparison { published: &published, seen: BTreeSet::new(), unknown: BTreeSet::new() };
    comparison.members(&root, Api::Messages.table());
    root.push_str(" brand_new: no member");
    assert!(comparison.unknown.iter().any(|line| line.starts_with(&root)), "{:?}", comparison.unknown);
    assert!(
        comparison.unknown.iter().any(|line| line.contains("brand_new_tool is not known")),
        "{:?}",
        comparison.unknown
    );
    assert_eq!(comparison.unknown.len(), 2, "{:?}", comparison.unknown);
}

/// A sequence of numbers from a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        // SplitMix64 by Steele and Vigna.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) >> 33).unwrap() % end.max(1)
    }

    fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    fn value(&mut self, published: &Published, form: &Form, deep: usize) -> Value {
        match form {
            Form::Any { any } => {
                let form = self.one_of(any).clone();
                self.value(published, &form, deep)
            }
            Form::Literal { literal } => self.one_of(literal).clone(),
            Form::List { list } if deep > 0 => {
                (0..=self.below(2)).map(|_| self.value(published, list, deep - 1)).collect()
            }
            Form::List { .. } => json!([]),
            Form::Map { .. } => json!({"some": "thing"}),
            Form::Ref { r#ref } => {
                let of = &published.types[r#ref];
                let chosen = of.fields.iter().filter(|(name, _)| {
                    of.required.contains(name) || *name == "type" || (deep > 0 && self.below(4) == 0)
                });
                let chosen: Vec<_> = chosen.collect();
                let members = chosen
                    .into_iter()
                    .map(|(name, form)| (name.clone(), self.value(published, form, deep.saturating_sub(1))));
                Value::Object(members.collect())
            }
            Form::Name(name) => match name.as_str() {
                "string" => self
                    .one_of(&[json!("text"), json!("data:x;base64,AA"), json!("https://evil.test/"), json!("AAAA")])
                    .clone(),
                "integer" => json!(self.below(9)),
                "number" => json!(0.5),
                "boolean" => json!(self.below(2) == 0),
                "any" => json!({"any": ["thing"]}),
                _ => Value::Null,
            },
        }
    }

    /// Changes a random part of a value.
    fn mutate(&mut self, value: &mut Value) {
        match value {
            Value::Object(object) if !object.is_empty() && self.below(3) > 0 => {
                let names: Vec<_> = object.keys().cloned().collect();
                let name = self.one_of(&names).clone();
                self.mutate(&mut object[&name]);
            }
            Value::Array(items) if !items.is_empty() && self.below(3) > 0 => {
                let index = self.below(items.len());
                self.mutate(&mut items[index]);
            }
            Value::Object(object) => {
                let names = [
                    "tools",
                    "file_id",
                    "url",
                    "brand_new",
                    "type",
                    "mcp_servers",
                    "image_url",
                    "content",
                    "n_predict",
                    "container",
                ];
                let name = (*self.one_of(&names)).to_owned();
                let new = self.anything();
                object.insert(name, new);
            }
            Value::Array(items) => {
                let new = self.anything();
                items.push(new);
            }
            other => *other = self.anything(),
        }
    }

    fn anything(&mut self) -> Value {
        let all = [
            json!({"type": "web_search"}),
            json!({"type": "mcp", "server_url": "https://evil.test"}),
            json!([{"type": "web_fetch_20250910"}]),
            json!({"type": "brand_new"}),
            json!({"type": "file", "file_id": "f"}),
            json!({"brand_new": 1}),
            json!("https://evil.test"),
            json!({}),
            json!([]),
            json!(null),
            json!(true),
            json!(1e300),
            json!([[1]]),
            json!("container_auto"),
            json!({"type": "image", "source": {"type": "url", "url": "https://evil.test"}}),
        ];
        self.one_of(&all).clone()
    }
}

/// Requests that are generated from the types that providers publish, and then changed: one for each number.
pub(crate) struct Requests {
    published: Published,
    roots: Vec<(Api, String)>,
}

impl Requests {
    pub(crate) fn new() -> Self {
        let published = published();
        let roots = published.apis.iter().flat_map(|(name, roots)| roots.iter().map(|root| (api(name), root.clone())));
        Self { roots: roots.collect(), published }
    }

    /// Returns as many numbers as the environment sets, starting at its seed.
    pub(crate) fn numbers() -> std::ops::Range<u64> {
        let asked = |name: &str, usual: u64| std::env::var(name).map_or(usual, |text| text.parse().unwrap());
        let seed = asked("BELAY_SEED", 22);
        seed..seed + asked("BELAY_REQUESTS", 1_000)
    }

    /// Returns the request with this number, if it is an object.
    pub(crate) fn of(&self, number: u64) -> Option<(Api, Map<String, Value>)> {
        let mut dice = Dice(number);
        let (api, root) = dice.one_of(&self.roots);
        let mut body = dice.value(&self.published, &Form::Ref { r#ref: root.clone() }, 6);
        for _ in 0..dice.below(3) {
            dice.mutate(&mut body);
        }
        let Value::Object(body) = body else { return None };
        Some((*api, body))
    }
}

/// Returns whether a table names everything in a value. This walk differs from the tested one and is simpler.
fn is_named(of: &Of, value: &Value) -> bool {
    let passes = |fate: &Fate, value: &Value| match fate {
        Fate::Passes(of) | Fate::Bounded(of, _) => is_named(of, value),
        Fate::Refused(_) | Fate::Named(..) => matches!(value, Value::Null | Value::Bool(false)) || *value == json!([]),
    };
    match (of, value) {
        (_, Value::Null) | (Of::Data, _) => true,
        // If there are forms for lists, a list must match one of them.
        (Of::Either(forms), Value::Array(_)) if forms.iter().any(|of| matches!(of, Of::List(_))) => {
            forms.iter().filter(|of| matches!(of, Of::List(_))).any(|of| is_named(of, value))
        }
        (Of::Either(forms), value) => forms.iter().any(|of| is_named(of, value)),
        (Of::List(of), Value::Array(items)) => items.iter().all(|item| is_named(of, item)),
        (Of::Object(shape), Value::Object(object)) => {
            let known = |(name, value): (&String, &Value)| {
                table::row(shape.rows, name).is_some_and(|row| passes(&row.fate, value))
            };
            let needed =
                shape.needs.as_ref().is_none_or(|(name, _)| object.get(*name).is_some_and(|value| !value.is_null()));
            needed && object.iter().all(known)
        }
        (Of::Kinds(kinds), Value::Object(object)) => match object.get("type") {
            None | Some(Value::Null) => {
                let given = |row: &&Row| object.get(row.names).is_some_and(|value| !value.is_null());
                kinds.untyped.iter().find(given).is_some_and(|row| passes(&row.fate, value))
            }
            Some(kind) => {
                kind.as_str().and_then(|kind| table::row(kinds.rows, kind)).is_some_and(|row| passes(&row.fate, value))
            }
        },
        (Of::Plain, Value::Array(items)) => items.iter().all(|item| !item.is_array() && !item.is_object()),
        (Of::Plain, value) => !value.is_object(),
        (Of::Switch(_), value) => *value == Value::Bool(false),
        (Of::Words(words, _), Value::String(word)) => words.contains(&word.as_str()),
        (Of::Url, Value::String(url)) => url.starts_with("data:"),
        (Of::Inline, Value::String(text)) => !text.contains("://"),
        _ => false,
    }
}

#[test]
fn the_betas_that_are_published_are_decided_on() {
    let published = published();
    let forms = published.apis["messages"].iter().filter_map(|root| published.types[root].fields.get("betas"));
    let mut names: BTreeSet<&str> = BTreeSet::new();
    for form in forms {
        let Form::List { list } = form else { panic!("{form:?}") };
        let Form::Any { any } = &**list else { panic!("{list:?}") };
        let literals =
            any.iter().filter_map(|form| if let Form::Literal { literal } = form { Some(literal) } else { None });
        names.extend(literals.flatten().filter_map(Value::as_str));
    }
    assert!(names.len() > 40, "{names:?}");
    let unknown: Vec<_> =
        names.into_iter().filter(|name| table::row(super::super::super::headers::BETAS, name).is_none()).collect();
    assert!(unknown.is_empty(), "decide on these in src/policy/model/headers.rs: {unknown:?}");
}

#[test]
fn a_generated_request_that_passes_has_nothing_that_the_tables_do_not_name() {
    let requests = Requests::new();
    let numbers = Requests::numbers();
    let count = numbers.end - numbers.start;
    let (mut passed, mut refused) = (0, 0);
    for number in numbers {
        let Some((api, object)) = requests.of(number) else { continue };
        let body = Value::Object(object.clone());
        match review(api, &object, Terms::default()) {
            Ok(_) => {
                passed += 1;
                assert!(is_named(&Of::Object(api.table()), &body), "seed {number}: {body}");
            }
            Err(unbounded) => {
                refused += 1;
                // Some models are denied by their names.
                let named = is_named(&Of::Object(api.table()), &body) && !unbounded.0.contains("this model");
                assert!(!named, "seed {number}: {unbounded}: {body}");
            }
        }
    }
    assert!(passed * 20 > count && refused * 20 > count, "{passed} of {count} passed, {refused} were refused");
}
