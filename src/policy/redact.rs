//! What of other people's words may be recorded.
//!
//! Reasons, names and hosts come to the log with what agents and upstreams wrote. Promises: in a [`Redactor`]'s text stands what the policy
//! says, which is in the log anyway, and what reads as a word, a number or a name; all else is replaced by the
//! [commitment](super::commit) to it, `[redacted:…]`, which whoever has salt and content can open. What is in quotes is somebody else's,
//! and is one name or is replaced whole; a text in which a pattern of the pack finds something is replaced whole. Refuses: to tell
//! a secret that reads as a word from a word. The agent is told what it said itself, as it said it.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
};

use serde_json::Value;

use super::{
    commit::Salt,
    config::{PolicyConfig, Sensitivity},
    hostname::{Authority, Hostname},
    price,
    sensitivity::Detectors,
};

/// Longest name.
const LONGEST_NAME: usize = 64;
/// Longest run of letters that reads as a word.
const LONGEST_WORD: usize = 20;
/// Longest run of letters with capitals among them, such as `JavaScriptCore`.
const LONGEST_CAMEL: usize = 16;
/// Changes of case among eleven letters, beside a first capital: those of `readLogFile`. Where there are more it is base64.
const MOST_CHANGES: usize = 4;
/// Longest number.
const LONGEST_NUMBER: usize = 10;
/// Longest run of letters and digits, such as `v1beta2`.
const LONGEST_MIXED: usize = 8;
/// Letters and digits of a name that are in runs with digits, such as those of `gpt-4o-2024-08-06`.
const MOST_DIGITS: usize = 10;
/// Longest run of capitals, such as `AUTHORIZATION`.
const LONGEST_CAPITALS: usize = 13;
/// Pairs of capitals beside small letters, such as those of `getHTTPStatus`.
const MOST_CAPITALS: usize = 4;
/// Parts of one text that are replaced one by one. From here on the rest is one.
const MOST_PARTS: usize = 8;
/// What refusals name and does not read so: the largest number that every JSON parser keeps, and a field of the class.
const OURS: [&str; 2] = ["9007199254740991", "upstreamTimeoutSeconds"];
/// Texts that are learnt beside the policy's.
const MOST_LEARNT: usize = 1024;

/// Replaces what may not be recorded.
pub struct Redactor {
    /// Names in the policy.
    known: HashSet<String>,
    learnt: Mutex<HashSet<String>>,
    detectors: Arc<Detectors>,
}

impl Redactor {
    /// A redactor for a policy, with its pack's patterns.
    pub fn new(policy: &PolicyConfig, detectors: Arc<Detectors>) -> Self {
        let mut known = HashSet::new();
        // What has no JSON cannot be in a log either.
        collect(&serde_json::to_value(policy).unwrap_or_default(), &mut known);
        Self { known, learnt: Mutex::default(), detectors }
    }

    /// Has a text stay from now on that we have made ourselves, such as a digest. The first [`MOST_LEARNT`] do.
    pub fn learn(&self, ours: &str) {
        let mut learnt = self.learnt.lock().unwrap_or_else(PoisonError::into_inner);
        if learnt.len() < MOST_LEARNT {
            learnt.insert(ours.to_owned());
        }
    }

    /// A text as it may be recorded.
    pub fn text(&self, text: &str, salt: &Salt) -> String {
        if self.is_sensitive(text) {
            return redacted(text, salt);
        }
        let mut shown = String::with_capacity(text.len());
        let mut parts = 0;
        for part in parts_of(text, |token| self.reads(token)) {
            match part {
                Part::Shown(text) => shown.push_str(text),
                Part::Hidden(_) if parts >= MOST_PARTS => {}
                Part::Hidden(text) => {
                    parts += 1;
                    shown.push_str(&redacted(text, salt));
                }
            }
        }
        shown
    }

    /// A name as it may be recorded: whole, or not at all.
    pub fn name(&self, name: &str, salt: &Salt) -> String {
        if self.is_name(name) { name.to_owned() } else { redacted(name, salt) }
    }

    /// A model's name as it may be recorded: by what is, the same price is found.
    pub fn model(&self, model: &str, policy: &PolicyConfig, salt: &Salt) -> String {
        if self.is_name(model) {
            return model.to_owned();
        }
        let price = price::of(&policy.models.prices, model);
        let beginning = price.and_then(|price| price.model.strip_suffix('*')).unwrap_or_default();
        format!("{beginning}{}", redacted(model, salt))
    }

    /// A host and port that the policy lets be reached, as they may be recorded: see [`Redactor::host`].
    pub fn authority(&self, to: &Authority, salt: &Salt) -> String {
        format!("{}:{}", self.host(&to.host, salt), to.port)
    }

    /// A host that the policy lets be reached, as it may be recorded. Of one below a domain of the policy the first label may be
    /// anything: what is none to be shown is `redacted-` and the beginning of the commitment to it.
    pub fn host(&self, host: &Hostname, salt: &Salt) -> String {
        let text = host.as_str();
        match (self.is_name(text), text.split_once('.')) {
            (false, Some((label, domain))) => {
                let mut hex = salt.bytes(label.as_bytes());
                hex.truncate(40);
                format!("redacted-{hex}.{domain}")
            }
            _ => text.to_owned(),
        }
    }

    fn is_sensitive(&self, text: &str) -> bool {
        !self.detectors.is_empty() && self.detectors.of_text(text) > Sensitivity::default()
    }

    fn is_name(&self, text: &str) -> bool {
        !text.contains(char::is_whitespace) && self.reads(text) && !self.is_sensitive(text)
    }

    /// Whether a text without spaces may be shown.
    fn reads(&self, token: &str) -> bool {
        let token = token.trim_matches(is_punctuation);
        is_wordlike(token)
            || self.known.contains(token)
            || self.known.contains(without_port(token))
            || self.learnt.lock().unwrap_or_else(PoisonError::into_inner).contains(token)
    }
}

/// A text of which nobody knows the policy, as it may be logged: what is no word is `[redacted]`.
pub fn plain(text: &str) -> String {
    parts_of(text, |token| is_wordlike(token.trim_matches(is_punctuation)))
        .into_iter()
        .map(|part| match part {
            Part::Shown(text) => text,
            Part::Hidden(_) => "[redacted]",
        })
        .collect()
}

fn redacted(text: &str, salt: &Salt) -> String {
    format!("[redacted:{}]", salt.bytes(text.as_bytes()))
}

/// The names in a value, whatever it is: words of all texts that are not words to everybody.
fn collect(value: &Value, known: &mut HashSet<String>) {
    let mut add = |text: &str| {
        let tokens = text.split_whitespace().chain([text]).map(|token| token.trim_matches(is_punctuation));
        known.extend(tokens.filter(|token| !is_wordlike(token)).map(str::to_owned));
    };
    match value {
        Value::Null | Value::Bool(_) => {}
        // The bounds of a schema, such as `maximum`.
        Value::Number(number) => add(&number.to_string()),
        Value::String(text) => add(text),
        Value::Array(items) => items.iter().for_each(|item| collect(item, known)),
        Value::Object(fields) => {
            fields.keys().for_each(|name| add(name));
            fields.values().for_each(|field| collect(field, known));
        }
    }
}

/// What a sentence puts around a name.
fn is_punctuation(c: char) -> bool {
    matches!(c, '.' | ',' | ';' | ':' | '!' | '?' | '(' | ')' | '[' | ']' | '"' | '\'' | '`' | '…')
}

/// What stands before a port.
fn without_port(text: &str) -> &str {
    match text.rsplit_once(':') {
        Some((host, port)) if port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => text,
    }
}

/// Whether a text is an address, in whatever spelling, with or without a port: where a call was to go matters most where it was none
/// that is allowed.
fn is_address(text: &str) -> bool {
    let host = if text.parse::<Ipv6Addr>().is_ok() { text } else { without_port(text) };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let is_hex = |hex: &str| hex.len() <= 8 && hex.bytes().all(|b| b.is_ascii_hexdigit());
    host.parse::<IpAddr>().is_ok()
        || (host.len() <= LONGEST_NUMBER && !host.is_empty() && host.bytes().all(|b| b.is_ascii_digit()))
        || host.strip_prefix("0x").is_some_and(is_hex)
}

/// Whether a text without spaces is a word, a number or a name of such, to whoever reads it.
fn is_wordlike(token: &str) -> bool {
    if is_address(token) || OURS.contains(&token) || token.parse::<jiff::Timestamp>().is_ok() {
        return true;
    }
    // What these are in is an account, a parameter, an escape or base64.
    let is_plain = |c: char| c.is_ascii_graphic() && !matches!(c, '@' | '=' | '%' | '&' | '\\' | '+');
    if token.len() > LONGEST_NAME || !token.chars().all(is_plain) {
        return false;
    }
    let mut digits = 0_usize;
    let mut runs = token.split(|c: char| !c.is_ascii_alphanumeric()).map(str::as_bytes);
    runs.all(|run| {
        let all = |is: fn(&u8) -> bool| run.iter().all(is);
        let some = |is: fn(&u8) -> bool| run.iter().any(is);
        let change = |pair: &[u8]| !pair.iter().all(u8::is_ascii_uppercase) && pair.iter().any(u8::is_ascii_uppercase);
        let changes = run.windows(2).skip(usize::from(run.first().is_some_and(u8::is_ascii_uppercase)));
        let changes = changes.filter(|pair| change(pair)).count();
        let longest = match (some(u8::is_ascii_digit), some(u8::is_ascii_lowercase)) {
            (true, _) if all(u8::is_ascii_digit) => LONGEST_NUMBER,
            (true, _) => LONGEST_MIXED,
            (false, true) if changes == 0 => LONGEST_WORD,
            (false, true) => LONGEST_CAMEL,
            (false, false) => LONGEST_CAPITALS,
        };
        // Capitals side by side between small letters are those of base64.
        let capitals = run.windows(2).filter(|pair| pair.iter().all(u8::is_ascii_uppercase)).count();
        digits = digits.saturating_add(if some(u8::is_ascii_digit) { run.len() } else { 0 });
        run.len() <= longest
            && (capitals <= MOST_CAPITALS || !some(u8::is_ascii_lowercase))
            && (changes <= 1 || changes.saturating_mul(11) <= run.len().saturating_mul(MOST_CHANGES))
    }) && digits <= MOST_DIGITS
}

/// A part of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part<'t> {
    Shown(&'t str),
    Hidden(&'t str),
}

/// The parts of a text of which each is shown or hidden: its quotations, and the words between them. Hidden words beside one another are one.
fn parts_of<'t>(text: &'t str, reads: impl Fn(&str) -> bool) -> Vec<Part<'t>> {
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (plain, quoted, after) = next_quotation(rest);
        words(plain, &reads, &mut parts);
        if let Some((mark, inner, end)) = quoted {
            let is_name = !inner.contains(char::is_whitespace) && reads(inner);
            parts.extend([Part::Shown(mark), if is_name { Part::Shown(inner) } else { Part::Hidden(inner) }]);
            parts.push(Part::Shown(end));
        }
        rest = after;
    }
    parts
}

/// The text before the next quotation; the quotation, with its marks; the text after it. A quotation that has no end goes to the text's.
fn next_quotation(text: &str) -> (&str, Option<(&str, &str, &str)>, &str) {
    let mut before = ' ';
    let opens = |(_, c): &(usize, char)| {
        // An apostrophe has a letter before it.
        let opens = matches!(c, '"' | '`') || (*c == '\'' && !before.is_alphanumeric());
        before = *c;
        opens
    };
    let Some((start, mark)) = text.char_indices().find(opens) else { return (text, None, "") };
    let (plain, quoted) = text.split_at(start);
    let (open, inner) = quoted.split_at(mark.len_utf8());
    let mut escaped = false;
    let mut chars = inner.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let inside = c == '\'' && chars.peek().is_some_and(|(_, next)| next.is_alphanumeric());
        if c == mark && !escaped && !inside {
            let (inner, after) = inner.split_at(at);
            let (end, after) = after.split_at(mark.len_utf8());
            return (plain, Some((open, inner, end)), after);
        }
        escaped = c == '\\' && !escaped;
    }
    (plain, Some((open, inner, "")), "")
}

/// The words of a text without quotations.
fn words<'t>(text: &'t str, reads: &impl Fn(&str) -> bool, parts: &mut Vec<Part<'t>>) {
    // Where the part begins that is not told yet, and the last word that is hidden in it ends.
    let (mut start, mut hidden): (usize, Option<(usize, usize)>) = (0, None);
    let slice = |from: usize, to: usize| text.get(from..to).unwrap_or_default();
    let mut at = 0;
    for token in text.split_inclusive(char::is_whitespace) {
        let word = token.trim_end();
        let end = at + word.len();
        match (word.is_empty() || reads(word), hidden) {
            (true, Some((from, to))) if !word.is_empty() => {
                parts.extend([Part::Shown(slice(start, from)), Part::Hidden(slice(from, to))]);
                (start, hidden) = (to, None);
            }
            (true, _) => {}
            (false, Some((from, _))) => hidden = Some((from, end)),
            (false, None) => hidden = Some((at, end)),
        }
        at += token.len();
    }
    if let Some((from, to)) = hidden {
        parts.extend([Part::Shown(slice(start, from)), Part::Hidden(slice(from, to))]);
        start = to;
    }
    parts.push(Part::Shown(slice(start, text.len())));
}

#[cfg(test)]
mod tests;
