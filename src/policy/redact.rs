//! Determines which parts of untrusted text may be recorded.
//!
//! Reasons, names and hosts in the log contain text that agents and upstreams wrote.
//!
//! Guarantees: the text of a [`Redactor`] contains only what the policy says, which is in the log anyway, and what looks like a word, a
//! number or a name. Everything else is replaced by the [commitment](super::commit) to it, `[redacted:…]`, which the holder of the salt and
//! the content can open. Text in quotes is untrusted: it is shown if it is a single name, or else replaced whole. A text in which a pattern
//! of the pack matches is replaced whole.
//! Non-goals: distinguishing a secret that looks like a word from a word. The agent gets its own text back unchanged.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use parking_lot::Mutex;
use serde_json::Value;

use super::{
    commit::Salt,
    config::{PolicyConfig, Sensitivity},
    hostname::{Authority, Hostname},
    price,
    sensitivity::Detectors,
};

/// Longest name, in characters.
const LONGEST_NAME: usize = 64;
/// Longest run of lower-case letters that counts as a word.
const LONGEST_WORD: usize = 20;
/// Longest run of letters with inner capitals, such as `JavaScriptCore`.
const LONGEST_CAMEL: usize = 16;
/// Maximum number of case changes per eleven letters, not counting a leading capital, as in `readLogFile`. A run with more is base64.
const MOST_CHANGES: usize = 4;
/// Longest number, in digits.
const LONGEST_NUMBER: usize = 10;
/// Longest run of letters and digits, such as `v1beta2`.
const LONGEST_MIXED: usize = 8;
/// Maximum number of letters and digits of a name in runs with digits, as in `gpt-4o-2024-08-06`.
const MOST_DIGITS: usize = 10;
/// Longest run of capitals, such as `AUTHORIZATION`.
const LONGEST_CAPITALS: usize = 13;
/// Maximum number of pairs of adjacent capitals in a run with lower-case letters, as in `getHTTPStatus`.
const MOST_CAPITALS: usize = 4;
/// Parts of one text that are replaced one by one. All later hidden parts are dropped.
const MOST_PARTS: usize = 8;
/// Texts in Belay's own reasons that do not look like words: the largest number that every JSON parser keeps, and a field of the class.
const OURS: [&str; 2] = ["9007199254740991", "upstreamTimeoutSeconds"];
/// Maximum number of texts that are allow-listed besides the policy's.
const MOST_LEARNT: usize = 1024;

/// Replaces text that may not be recorded.
pub struct Redactor {
    /// The names in the policy.
    known: HashSet<String>,
    learnt: Mutex<HashSet<String>>,
    detectors: Arc<Detectors>,
}

impl Redactor {
    /// Returns a redactor for a policy, with the patterns of its pack.
    pub fn new(policy: &PolicyConfig, detectors: Arc<Detectors>) -> Self {
        let mut known = HashSet::new();
        // A policy that cannot be serialized cannot be in a log either.
        collect(&serde_json::to_value(policy).unwrap_or_default(), &mut known);
        Self { known, learnt: Mutex::default(), detectors }
    }

    /// Allow-lists a text that Belay generated, such as a digest. Only the first [`MOST_LEARNT`] texts are accepted.
    pub fn learn(&self, ours: &str) {
        let mut learnt = self.learnt.lock();
        if learnt.len() < MOST_LEARNT {
            learnt.insert(ours.to_owned());
        }
    }

    /// Returns a text in the form that may be recorded.
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

    /// Returns a name in the form that may be recorded: whole, or replaced whole.
    pub fn name(&self, name: &str, salt: &Salt) -> String {
        if self.is_name(name) { name.to_owned() } else { redacted(name, salt) }
    }

    /// Returns a model's name in the form that may be recorded. The recorded name has the same price.
    pub fn model(&self, model: &str, policy: &PolicyConfig, salt: &Salt) -> String {
        if self.is_name(model) {
            return model.to_owned();
        }
        let price = price::of(&policy.models.prices, model);
        let beginning = price.and_then(|price| price.model.strip_suffix('*')).unwrap_or_default();
        format!("{beginning}{}", redacted(model, salt))
    }

    /// Returns an allowed host and its port in the form that may be recorded: see [`Redactor::host`].
    pub fn authority(&self, to: &Authority, salt: &Salt) -> String {
        format!("{}:{}", self.host(&to.host, salt), to.port)
    }

    /// Returns an allowed host in the form that may be recorded. The first label of a host below a domain of the policy can be anything. A
    /// label that may not be recorded becomes `redacted-` and the start of the commitment to it.
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

    /// Returns whether a text without spaces may be recorded.
    fn reads(&self, token: &str) -> bool {
        let token = token.trim_matches(is_punctuation);
        is_wordlike(token)
            || self.known.contains(token)
            || self.known.contains(without_port(token))
            || self.learnt.lock().contains(token)
    }
}

/// Returns a text in the form that may be logged if its policy is not known: everything that does not look like a word becomes
/// `[redacted]`.
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

/// Collects the names in a value: the words of all its texts that do not count as words by themselves.
fn collect(value: &Value, known: &mut HashSet<String>) {
    let mut add = |text: &str| {
        let tokens = text.split_whitespace().chain([text]).map(|token| token.trim_matches(is_punctuation));
        known.extend(tokens.filter(|token| !is_wordlike(token)).map(str::to_owned));
    };
    match value {
        Value::Null | Value::Bool(_) => {}
        // Bounds in a schema, such as `maximum`.
        Value::Number(number) => add(&number.to_string()),
        Value::String(text) => add(text),
        Value::Array(items) => items.iter().for_each(|item| collect(item, known)),
        Value::Object(fields) => {
            fields.keys().for_each(|name| add(name));
            fields.values().for_each(|field| collect(field, known));
        }
    }
}

/// Returns whether a character is punctuation that a sentence puts around a name.
fn is_punctuation(c: char) -> bool {
    matches!(c, '.' | ',' | ';' | ':' | '!' | '?' | '(' | ')' | '[' | ']' | '"' | '\'' | '`' | '…')
}

/// Returns the text without the port at its end.
fn without_port(text: &str) -> &str {
    match text.rsplit_once(':') {
        Some((host, port)) if port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => text,
    }
}

/// Returns whether a text is an address in any notation, with or without a port. Addresses are shown, because the target of a call matters
/// most if it is not an allowed one.
fn is_address(text: &str) -> bool {
    let host = if text.parse::<Ipv6Addr>().is_ok() { text } else { without_port(text) };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let is_hex = |hex: &str| hex.len() <= 8 && hex.bytes().all(|b| b.is_ascii_hexdigit());
    host.parse::<IpAddr>().is_ok()
        || (host.len() <= LONGEST_NUMBER && !host.is_empty() && host.bytes().all(|b| b.is_ascii_digit()))
        || host.strip_prefix("0x").is_some_and(is_hex)
}

/// Returns whether a text without spaces looks like a word, a number or a name made of these.
fn is_wordlike(token: &str) -> bool {
    if is_address(token) || OURS.contains(&token) || token.parse::<jiff::Timestamp>().is_ok() {
        return true;
    }
    // A text with one of these characters is an account, a parameter, an escape or base64.
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
        // Adjacent capitals between lower-case letters are a sign of base64.
        let capitals = run.windows(2).filter(|pair| pair.iter().all(u8::is_ascii_uppercase)).count();
        digits = digits.saturating_add(if some(u8::is_ascii_digit) { run.len() } else { 0 });
        run.len() <= longest
            && (capitals <= MOST_CAPITALS || !some(u8::is_ascii_lowercase))
            && (changes <= 1 || changes.saturating_mul(11) <= run.len().saturating_mul(MOST_CHANGES))
    }) && digits <= MOST_DIGITS
}

/// A part of a text, and whether it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part<'t> {
    Shown(&'t str),
    Hidden(&'t str),
}

/// Splits a text into parts that are shown or hidden: its quotations, and the words between them. Adjacent hidden words are one part. If text
/// touches a quotation, the whole of it is hidden unless it reads as one name, because quotation marks inside a secret would otherwise cut it
/// into short names.
fn parts_of<'t>(text: &'t str, reads: impl Fn(&str) -> bool) -> Vec<Part<'t>> {
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (plain, run, after) = next_run(rest);
        words(plain, &reads, &mut parts);
        if is_one_quotation(run) || reads(run) {
            quotations(run, &reads, &mut parts);
        } else {
            parts.push(Part::Hidden(run));
        }
        rest = after;
    }
    parts
}

/// Returns the text before the next run without spaces that contains a quotation, the run, and the text after it. Spaces inside quotations do
/// not end a run.
fn next_run(text: &str) -> (&str, &str, &str) {
    let (plain, quoted, mut rest) = next_quotation(text);
    if quoted.is_none() {
        return (text, "", "");
    }
    let start = plain.trim_end_matches(|c: char| !c.is_whitespace()).len();
    loop {
        let (plain, quoted, after) = next_quotation(rest);
        let end = plain.find(char::is_whitespace);
        if let Some(end) = end.or(quoted.is_none().then_some(plain.len())) {
            let (_, after) = rest.split_at(end);
            let (before, run) = text.split_at(text.len() - after.len()).0.split_at(start);
            return (before, run, after);
        }
        rest = after;
    }
}

/// Returns whether a run is a single quotation, with nothing but punctuation around it.
fn is_one_quotation(run: &str) -> bool {
    let (plain, _, after) = next_quotation(run);
    plain.chars().chain(after.chars()).all(|c| is_punctuation(c) && !matches!(c, '"' | '\'' | '`'))
}

/// Splits a run into its quotations and the words between them.
fn quotations<'t>(run: &'t str, reads: &impl Fn(&str) -> bool, parts: &mut Vec<Part<'t>>) {
    let mut rest = run;
    while !rest.is_empty() {
        let (plain, quoted, after) = next_quotation(rest);
        words(plain, reads, parts);
        if let Some((mark, inner, end)) = quoted {
            let is_name = !inner.contains(char::is_whitespace) && reads(inner);
            parts.extend([Part::Shown(mark), if is_name { Part::Shown(inner) } else { Part::Hidden(inner) }]);
            parts.push(Part::Shown(end));
        }
        rest = after;
    }
}

/// Returns the text before the next quotation, the quotation with its quotation marks, and the text after it. A quotation without an end
/// extends to the end of the text.
fn next_quotation(text: &str) -> (&str, Option<(&str, &str, &str)>, &str) {
    let mut before = ' ';
    let opens = |(_, c): &(usize, char)| {
        // An apostrophe follows a letter.
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

/// Splits a text without quotations into parts.
fn words<'t>(text: &'t str, reads: &impl Fn(&str) -> bool, parts: &mut Vec<Part<'t>>) {
    // The start of the text that is not in `parts` yet, and the range of the hidden words in it.
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
