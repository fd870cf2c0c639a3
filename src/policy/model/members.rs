//! Checks the members of a request against the [tables](super::requests).
//!
//! Guarantees: a request that passes has no member, part or tool that the tables do not name, except for members if the pack lets unknown
//! members pass. Nothing in it makes a provider fetch, run, remember or call something, unless the pack allows it by name. What a provider
//! fetches for a message comes from a host that the agent may reach itself.
//! Non-goals: the cost of the request ([`request`](super::request)), what a provider does on its own, and where an allowed host redirects a
//! provider to.

use std::{collections::BTreeSet, fmt};

use serde_json::{Map, Value};

use super::{
    api::Api,
    request::Unbounded,
    requests,
    table::{self, Capability, Fate, Kinds, Of, Row, Shape},
};
use crate::policy::{
    config::{EgressHost, EgressUse, UnknownMembers},
    egress,
    hostname::Authority,
    json::pointer_token,
    shorten::shorten_to,
};

/// Longest name that is quoted, in bytes. A name is quoted whole and once, because nobody could see whether a name that was cut contains a
/// secret.
const LONGEST_NAME: usize = 256;

/// The pack's policy for the contents of requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terms<'p> {
    /// What the pack allows providers to do, for all endpoints.
    pub allow: &'p [Capability],
    /// What the pack's entry for the endpoint allows the provider to do.
    pub also: &'p [Capability],
    /// How members are handled that no table names.
    pub unknown: UnknownMembers,
    /// The hosts that the agent may reach itself, and that a provider may fetch from for the agent.
    pub egress: &'p [EgressHost],
}

impl Terms<'_> {
    /// Returns whether the pack allows the provider to do it.
    pub fn allows(self, capability: Capability) -> bool {
        self.allow.contains(&capability) || self.also.contains(&capability)
    }
}

/// What the record says about a request that passes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Noted {
    /// What the pack allows by name and the request uses.
    pub allowed: BTreeSet<Capability>,
    /// Members that no table names.
    pub unknown: Vec<String>,
}

/// Checks a request against the tables.
///
/// # Errors
/// Returns an error that says what is denied and where, why, what to do, and who can change it.
pub(super) fn review(api: Api, body: &Map<String, Value>, terms: Terms<'_>) -> Result<Noted, Unbounded> {
    let mut walk = Walk { terms, noted: Noted::default() };
    if let Some(model) = body.get("model").and_then(Value::as_str) {
        walk.model(model)?;
    }
    walk.members(api.table(), body, &Place::Root)?;
    Ok(walk.noted)
}

/// The place of a value in a request, as a JSON Pointer. The tables name all its parts.
enum Place<'a> {
    Root,
    Member(&'a Place<'a>, &'a str),
    Item(&'a Place<'a>, usize),
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Member(of, name) => write!(f, "{of}/{}", pointer_token(name)),
            Self::Item(of, index) => write!(f, "{of}/{index}"),
        }
    }
}

struct Walk<'p> {
    terms: Terms<'p>,
    noted: Noted,
}

impl Walk<'_> {
    fn model(&mut self, name: &str) -> Result<(), Unbounded> {
        let lower = name.to_ascii_lowercase();
        let found = requests::MODELS.iter().find(|(pattern, _)| is_like(pattern, &lower));
        let Some((_, capability)) = found else { return Ok(()) };
        let why = "this model does more than answer, whatever the request contains; use another model";
        self.named(*capability, why, name, &Place::Member(&Place::Root, "model"))
    }

    fn members(&mut self, shape: &'static Shape, object: &Map<String, Value>, at: &Place<'_>) -> Result<(), Unbounded> {
        if let Some((name, fate)) = &shape.needs
            && object.get(*name).is_none_or(Value::is_null)
        {
            self.fate(fate, &Value::Bool(true), name, at)?;
        }
        for (name, value) in object {
            match table::row(shape.rows, name) {
                Some(row) => self.fate(&row.fate, value, name, &Place::Member(at, name))?,
                None => self.unknown(shape, name, at)?,
            }
        }
        Ok(())
    }

    fn fate(&mut self, fate: &'static Fate, value: &Value, name: &str, at: &Place<'_>) -> Result<(), Unbounded> {
        match fate {
            Fate::Passes(of) | Fate::Bounded(of, _) => self.value(of, value, name, at),
            Fate::Refused(_) | Fate::Named(..) if says_nothing(value) => Ok(()),
            Fate::Refused(why) => Err(Unbounded(format!("{} is denied: {why}", quoted(name, at)))),
            Fate::Named(capability, why) => self.named(*capability, why, name, at),
        }
    }

    fn named(&mut self, capability: Capability, why: &str, name: &str, at: &Place<'_>) -> Result<(), Unbounded> {
        if self.terms.allows(capability) {
            self.noted.allowed.insert(capability);
            return Ok(());
        }
        Err(Unbounded(format!(
            "{} is denied: {why}; or have the owner of the PolicyPack allow it by name (spec.models.allow: [{}])",
            quoted(name, at),
            capability.as_str()
        )))
    }

    fn unknown(&mut self, shape: &Shape, name: &str, at: &Place<'_>) -> Result<(), Unbounded> {
        match self.terms.unknown {
            UnknownMembers::Pass => {
                self.noted.unknown.push(Place::Member(at, name).to_string());
                Ok(())
            }
            UnknownMembers::Refuse => Err(Unbounded(format!(
                "{} is unknown: expected a member of {} that Belay knows, see docs/model-requests.md; leave it out, or have the owner of \
                 the PolicyPack let unknown members pass (spec.models.unknownMembers: Pass)",
                quoted_in(name, at),
                shape.is
            ))),
        }
    }

    fn value(&mut self, of: &'static Of, value: &Value, name: &str, at: &Place<'_>) -> Result<(), Unbounded> {
        match (of, value) {
            (_, Value::Null) | (Of::Data, _) => Ok(()),
            (Of::Plain, value) if is_plain(value) => Ok(()),
            (Of::Switch(on), Value::Bool(set)) => {
                if *set {
                    self.fate(on, value, name, at)
                } else {
                    Ok(())
                }
            }
            (Of::Words(known, _), Value::String(word)) if known.contains(&word.as_str()) => Ok(()),
            (Of::Words(_, other), Value::String(_)) => self.fate(other, value, name, at),
            (Of::Url, Value::String(url)) => self.url(url, at),
            (Of::Inline, Value::String(text)) => {
                if is_url(text) {
                    self.url(text, at)
                } else {
                    Ok(())
                }
            }
            (Of::Object(shape), Value::Object(object)) => self.members(shape, object, at),
            (Of::Kinds(kinds), Value::Object(object)) => self.kind(kinds, object, value, at),
            (Of::List(each), Value::Array(items)) => items
                .iter()
                .enumerate()
                .try_for_each(|(index, item)| self.value(each, item, name, &Place::Item(at, index))),
            (Of::Either(forms), value) => match forms.iter().find(|form| form.may_be(value)) {
                Some(form) => self.value(form, value, name, at),
                None => Err(misformed(of, value, name, at)),
            },
            (of, value) => Err(misformed(of, value, name, at)),
        }
    }

    fn kind(
        &mut self,
        kinds: &'static Kinds,
        object: &Map<String, Value>,
        value: &Value,
        at: &Place<'_>,
    ) -> Result<(), Unbounded> {
        let unknown = |found: &str| {
            Unbounded(format!(
                "{} is unknown: expected {} of a type that Belay knows, see docs/model-requests.md; offer it as a function or as a tool of a \
                 contract",
                quoted(found, at),
                kinds.are
            ))
        };
        match object.get("type") {
            Some(Value::String(kind)) => match table::row(kinds.rows, kind) {
                Some(row) => self.fate(&row.fate, value, kind, at),
                None => Err(unknown(kind)),
            },
            None | Some(Value::Null) => {
                let has = |row: &&Row| object.get(row.names).is_some_and(|value| !value.is_null());
                match kinds.untyped.iter().find(has) {
                    Some(row) => self.fate(&row.fate, value, row.names, at),
                    None => Err(unknown("(no type)")),
                }
            }
            Some(_) => Err(unknown("(a type that is not text)")),
        }
    }

    /// Checks a URL that the provider fetches. It is traffic of the agent, by way of the provider.
    fn url(&self, url: &str, at: &Place<'_>) -> Result<(), Unbounded> {
        let begins = |with: &str| url.get(..with.len()).is_some_and(|start| start.eq_ignore_ascii_case(with));
        if begins("data:") {
            return Ok(());
        }
        let refused = |reason: String| {
            Unbounded(format!(
                "the URL at {at} is denied: the provider would fetch it for the agent, and {reason}; send the content in the request, as a \
                 data: URL or base64, or have the owner of the PolicyPack list the host in the class's egress for `Direct`"
            ))
        };
        let to = authority(url).map_err(&refused)?;
        egress::allow(self.terms.egress, &to, EgressUse::Direct).map(|_| ()).map_err(|denied| refused(denied.reason))
    }
}

impl Of {
    /// Returns whether the JSON type of a value matches this form.
    fn may_be(&self, value: &Value) -> bool {
        match self {
            Self::Data => true,
            Self::Object(_) | Self::Kinds(_) => value.is_object(),
            Self::List(_) => value.is_array(),
            Self::Plain => is_plain(value),
            Self::Switch(_) => value.is_boolean(),
            Self::Words(..) | Self::Url | Self::Inline => value.is_string(),
            Self::Either(forms) => forms.iter().any(|form| form.may_be(value)),
        }
    }

    /// Describes the expected form in words.
    fn in_words(&self) -> String {
        match self {
            Self::Data => "anything".to_owned(),
            Self::Plain => "a text, a number, true or false, or a list of those".to_owned(),
            Self::Switch(_) => "true or false".to_owned(),
            Self::Words(words, _) => format!("one of {}", words.join(", ")),
            Self::Url => "a URL".to_owned(),
            Self::Inline => "a text".to_owned(),
            Self::Object(shape) => format!("{} (an object)", shape.is),
            Self::Kinds(kinds) => format!("{} (an object with a type)", kinds.are),
            Self::List(each) => format!("a list in which each item is {}", each.in_words()),
            Self::Either(forms) => forms.iter().map(Self::in_words).collect::<Vec<_>>().join("; or "),
        }
    }
}

/// Describes what is denied, and its place.
fn quoted(name: &str, at: &Place<'_>) -> String {
    match at {
        Place::Root => shown(name),
        at => format!("{} at {at}", shown(name)),
    }
}

/// Describes a member that no table names, and the place that contains it.
fn quoted_in(name: &str, at: &Place<'_>) -> String {
    match at {
        Place::Root => shown(name),
        at => format!("{} in {at}", shown(name)),
    }
}

/// Returns a name that the agent wrote, in quotation marks that it cannot end.
fn shown(name: &str) -> String {
    match name.len() {
        ..=LONGEST_NAME => {
            format!("`{}`", shorten_to(name, usize::MAX).replace('\\', r"\\").replace('`', r"\`"))
        }
        long => format!("a name of {long} bytes"),
    }
}

fn misformed(of: &Of, value: &Value, name: &str, at: &Place<'_>) -> Unbounded {
    let found = match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    Unbounded(format!("{} is malformed: expected {}, found {found}", quoted(name, at), of.in_words()))
}

/// Returns whether a member is as good as absent. An empty object is not, because it may ask for something with its defaults.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

fn is_plain(value: &Value) -> bool {
    match value {
        Value::Object(_) => false,
        Value::Array(items) => items.iter().all(|item| !item.is_object() && !item.is_array()),
        _ => true,
    }
}

/// Returns whether a text is a URL to fetch: it starts with a scheme and `://`.
fn is_url(text: &str) -> bool {
    let scheme = text.trim_start().split_once("://").map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+.-".contains(&byte)))
}

/// Returns the host and port of a URL, if every parser finds the same.
fn authority(url: &str) -> Result<Authority, String> {
    let of_scheme = |scheme: &str, port| {
        let start = url.get(..scheme.len()).filter(|start| start.eq_ignore_ascii_case(scheme))?;
        Some((url.get(start.len()..)?, port))
    };
    let (rest, port) = of_scheme("https://", 443)
        .or_else(|| of_scheme("http://", 80))
        .ok_or("it is not an http, https or data URL")?;
    // Some parsers drop such characters, or take one for another.
    if url.chars().any(|letter| letter.is_whitespace() || letter.is_control() || letter == '\\') {
        return Err("it has spaces, control characters or backslashes, which parsers read in different ways".to_owned());
    }
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let host = rest.get(..end).unwrap_or_default();
    Authority::parse(host, Some(port)).map_err(|error| error.to_string())
}

/// Returns whether a name matches a pattern, in which `*` at the start or the end stands for any text.
fn is_like(pattern: &str, name: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(_), Some(_)) => name.contains(pattern.trim_matches('*')),
        (Some(end), None) => name.ends_with(end),
        (None, Some(beginning)) => name.starts_with(beginning),
        (None, None) => name == pattern,
    }
}

#[cfg(test)]
pub(crate) mod tests;
