//! Renders HTTP requests from the arguments of a tool call.
//!
//! A template is an absolute URL in which `{name}` stands for an argument: at most one in each segment of the path, and nowhere else. The
//! last segment may be `{+name}`, as in RFC 6570: an argument of one or more segments. Scheme, host, port and the template's own query are
//! literal. Arguments are strings, integers and booleans, percent-encoded. Arguments that the contract lists are sent in the query. The
//! others are the JSON body, if the method has one.
//!
//! Guarantees: `{name}` is one segment, and `{+name}` has as many segments as it is written with. This holds for a server that routes by
//! the path as sent, by the path decoded once, as in WSGI, or decoded more often, with lenient decoders, with folded characters (NFKC, best
//! fit), with trailing dots and spaces removed, or with path parameters removed. No argument in the query ends its value or sets a
//! parameter that the template sets.
//! Non-goals: bodies of GET, HEAD and DELETE, lists and objects in a URL, and the correction of input. Arguments that do not fit are
//! denied.

use serde_json::{Map, Value};
use unicode_normalization::UnicodeNormalization;

use super::{
    config::{HttpMethod, HttpUpstream},
    decide::Denial,
    hostname::Authority,
    rule::Rule,
    shorten::shorten,
};

/// Longest URL, in bytes. Servers accept 8 KiB.
const LONGEST: usize = 8_000;

/// An error of an invalid template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The scheme is neither `http` nor `https`.
    #[error("expected http:// or https://")]
    Scheme,
    /// The host or port is invalid.
    #[error("expected a literal host and an optional port: {0}")]
    Authority(String),
    /// A segment of the path is invalid.
    #[error(
        "expected segments of letters, digits and -._~!$&'()*+,;=:@% with at most one {{name}} in each, or {{+name}} as the last, none of them empty, `.` or `..`; found {0:?}"
    )]
    Segment(String),
    /// The literal query is invalid.
    #[error("expected a query without {{name}}, whose arguments are listed in `query`; found {0:?}")]
    Query(String),
    /// An argument is used in two places.
    #[error("expected each argument in one place, found {0:?} twice")]
    Twice(String),
    /// An argument would be a second value of a parameter that the template's own query sets.
    #[error("expected arguments in `query` that the URL's own query does not set, found {0:?}")]
    Set(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    Literal(String),
    Argument {
        before: String,
        name: String,
        after: String,
    },
    /// One or more segments.
    Rest {
        name: String,
    },
}

/// The HTTP request of a contract, ready to be rendered from arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    method: HttpMethod,
    secure: bool,
    /// The host as written, for the URL.
    host: String,
    authority: Authority,
    segments: Vec<Segment>,
    literal_query: Option<String>,
    query: Vec<String>,
}

/// A rendered request.
#[derive(Clone, Debug, PartialEq)]
pub struct Rendered {
    /// The method.
    pub method: HttpMethod,
    /// The URL.
    pub url: String,
    /// The JSON body, if the method has one.
    pub body: Option<Map<String, Value>>,
}

impl Request {
    /// Parses the request of a contract.
    ///
    /// # Errors
    /// Returns an error if the template is invalid. See [`TemplateError`].
    pub fn parse(http: &HttpUpstream) -> Result<Self, TemplateError> {
        let (secure, rest) = match http.url.split_once("://") {
            Some(("https", rest)) => (true, rest),
            Some(("http", rest)) => (false, rest),
            _ => return Err(TemplateError::Scheme),
        };
        let (rest, literal_query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, Some(query.to_owned())),
            None => (rest, None),
        };
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let authority = Authority::parse(host, Some(if secure { 443 } else { 80 }))
            .map_err(|error| TemplateError::Authority(error.to_string()))?;
        let parts: Vec<&str> = path.split('/').collect();
        let last = parts.len().saturating_sub(1);
        let segments = parts
            .iter()
            .enumerate()
            .map(|(index, part)| segment(part, index == last))
            .collect::<Result<Vec<_>, _>>()?;
        if let Some(query) = literal_query.as_ref().filter(|q| !q.chars().all(|c| is_literal(c) || "/?".contains(c))) {
            return Err(TemplateError::Query(query.clone()));
        }
        let request = Self {
            method: http.method,
            secure,
            host: host.to_owned(),
            authority,
            segments,
            literal_query,
            query: http.query.clone(),
        };
        let mut seen = std::collections::BTreeSet::new();
        if let Some(twice) = request.path_arguments().chain(request.query_arguments()).find(|name| !seen.insert(*name))
        {
            return Err(TemplateError::Twice(twice.to_owned()));
        }
        let set: Vec<_> = literal_names(request.literal_query.as_deref().unwrap_or_default()).collect();
        if let Some(again) = request.query_arguments().find(|name| set.contains(&loosely(name))) {
            return Err(TemplateError::Set(again.to_owned()));
        }
        Ok(request)
    }

    /// Returns the method.
    pub fn method(&self) -> HttpMethod {
        self.method
    }

    /// Returns host and port.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Returns the arguments that the path needs.
    pub fn path_arguments(&self) -> impl Iterator<Item = &str> {
        self.segments.iter().filter_map(|segment| match segment {
            Segment::Argument { name, .. } | Segment::Rest { name } => Some(name.as_str()),
            Segment::Literal(_) => None,
        })
    }

    /// Returns the arguments that are sent in the query.
    pub fn query_arguments(&self) -> impl Iterator<Item = &str> {
        self.query.iter().map(String::as_str)
    }

    /// Renders the request for these arguments.
    ///
    /// # Errors
    /// Returns [`Rule::ToolUrl`] if an argument is missing or does not fit into its place, or if the URL is too long.
    pub fn render(&self, args: &Map<String, Value>) -> Result<Rendered, Denial> {
        let mut rest = args.clone();
        let mut url = format!("{}://{}", if self.secure { "https" } else { "http" }, self.host);
        let mut take = |name: &str| {
            let value = rest.remove(name).ok_or_else(|| refused(name, "is missing, and the path needs it"))?;
            text(name, &value)
        };
        for segment in &self.segments {
            url.push('/');
            match segment {
                Segment::Literal(text) => url.push_str(text),
                Segment::Argument { before, name, after } => {
                    let text = take(name)?;
                    fits(name, "one segment of the path", (before, &text, after))?;
                    url.push_str(before);
                    url.push_str(&encode(&text));
                    url.push_str(after);
                }
                Segment::Rest { name } => {
                    let text = take(name)?;
                    let mut parts = Vec::new();
                    for part in text.split('/') {
                        fits(name, "segments of the path", ("", part, ""))?;
                        parts.push(encode(part));
                    }
                    url.push_str(&parts.join("/"));
                }
            }
        }
        let mut separator = '?';
        if let Some(query) = &self.literal_query {
            url.push(separator);
            url.push_str(query);
            separator = '&';
        }
        for name in &self.query {
            let Some(value) = rest.remove(name) else { continue };
            url.push(separator);
            url.push_str(&format!("{}={}", encode(name), encode(&text(name, &value)?)));
            separator = '&';
        }
        if url.len() > LONGEST {
            let reason = format!("the arguments make a URL of {} bytes; expected at most {LONGEST}", url.len());
            return Err(Denial { rule: Rule::ToolUrl, reason });
        }
        if self.method.has_body() {
            return Ok(Rendered { method: self.method, url, body: Some(rest) });
        }
        match rest.keys().next() {
            Some(left) => Err(refused(left, &format!("has no place in a {} request", self.method.as_str()))),
            None => Ok(Rendered { method: self.method, url, body: None }),
        }
    }
}

fn segment(part: &str, is_last: bool) -> Result<Segment, TemplateError> {
    let wrong = || TemplateError::Segment(part.to_owned());
    let literal = |text: &str| text.chars().all(is_literal) && decode(text).is_some();
    let Some((before, rest)) = part.split_once('{') else {
        // A path may end in a slash.
        let plain = (part.is_empty() && is_last) || (literal(part) && is_one_place(part));
        return if plain { Ok(Segment::Literal(part.to_owned())) } else { Err(wrong()) };
    };
    let (name, after) = rest.split_once('}').ok_or_else(wrong)?;
    if let Some(name) = name.strip_prefix('+') {
        let alone = is_last && before.is_empty() && after.is_empty() && !name.is_empty() && !name.contains(['{', '+']);
        return if alone { Ok(Segment::Rest { name: name.to_owned() }) } else { Err(wrong()) };
    }
    if name.is_empty() || name.contains('{') || !literal(before) || !literal(after) {
        return Err(wrong());
    }
    Ok(Segment::Argument { before: before.to_owned(), name: name.to_owned(), after: after.to_owned() })
}

/// Returns whether a character is in `pchar` of RFC 3986 or is `%`.
fn is_literal(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-._~!$&'()*+,;=:@%".contains(c)
}

/// Returns an argument as text.
fn text(name: &str, value: &Value) -> Result<String, Denial> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Bool(truth) => Ok(truth.to_string()),
        Value::Number(number) if number.is_i64() || number.is_u64() => Ok(number.to_string()),
        _ => Err(refused(name, "cannot go into a URL: expected a string, an integer or a boolean")),
    }
}

fn refused(name: &str, what: &str) -> Denial {
    Denial { rule: Rule::ToolUrl, reason: format!("the argument {:?} {what}", shorten(name)) }
}

/// Checks whether an argument fits into its place in the path.
fn fits(name: &str, place: &str, (before, value, after): (&str, &str, &str)) -> Result<(), Denial> {
    let Some(found) = misplaced(&decoded(before), value, &decoded(after)) else { return Ok(()) };
    Err(refused(
        name,
        &format!(
            "cannot be {place}: found {found}; expected a text without slashes, backslashes, semicolons, question marks, number signs, \
             control characters and percent escapes, without a dot at its end or a space at either end, and without characters that \
             some servers take for one of these"
        ),
    ))
}

/// Returns what keeps a value from being one segment, alone or together with the literals around it.
fn misplaced(before: &str, value: &str, after: &str) -> Option<&'static str> {
    if let Some(found) = shape((before, value, after)) {
        return Some(found);
    }
    if value.is_ascii() {
        return None;
    }
    // Some servers drop invisible characters, and others replace a character by the nearest one that they know.
    let seen = || value.chars().filter(|c| !is_ignorable(*c));
    let (folded, fitted): (String, String) = (seen().nfkc().collect(), seen().map(best_fit).collect());
    [folded, fitted].iter().find_map(|other| shape((before, other, after))).map(|found| match found {
        "nothing" => "no visible character",
        "a control character" => "a character that some servers take for a control character",
        "an escape" => "characters that some servers take for an escape",
        _ => "a character that some servers take for one that ends or moves a segment",
    })
}

/// Returns what keeps exactly these characters from being one segment.
fn shape((before, value, after): (&str, &str, &str)) -> Option<&'static str> {
    let single = |c: char| match c {
        '/' => Some("a slash"),
        '\\' => Some("a backslash"),
        ';' => Some("a semicolon"),
        '?' => Some("a question mark"),
        '#' => Some("a number sign"),
        // Unicode's line and paragraph separators end lines, as control characters do.
        '\u{2028}' | '\u{2029}' => Some("a control character"),
        c if c.is_control() => Some("a control character"),
        _ => None,
    };
    if value.is_empty() {
        return Some("nothing");
    }
    if let Some(found) = value.chars().find_map(single) {
        return Some(found);
    }
    // The check includes the ends of the literals: `%2` may be theirs, and the rest the argument's. It covers two hex digits, `%u` and
    // similar escapes of any decoder.
    let near: Vec<char> = before.chars().rev().take(2).collect::<Vec<_>>().into_iter().rev().collect();
    let near: Vec<char> = near.into_iter().chain(value.chars()).chain(after.chars().take(2)).collect();
    if near.windows(2).any(|pair| matches!(pair, ['%', next] if next.is_ascii_alphanumeric())) {
        return Some("an escape");
    }
    let trimmed = |c: char| c == '.' || c.is_whitespace();
    let at_start = before.is_empty() && value.starts_with(char::is_whitespace);
    let at_end = after.is_empty() && value.ends_with(trimmed);
    let whole = [before, value, after].concat();
    (at_start || at_end || whole.trim_matches(trimmed).is_empty())
        .then_some("a dot or a space where some servers cut it off")
}

/// Returns whether a character is invisible and dropped by some servers before they compare: Unicode's default ignorable code points.
fn is_ignorable(c: char) -> bool {
    matches!(
        c,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fff8}' | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}'
    )
}

/// Returns the character that servers with code pages substitute for a character that the code page does not have. Only relevant characters
/// are covered.
fn best_fit(c: char) -> char {
    match c {
        // Fraction slash, division slash, big solidus and the box drawing diagonal.
        '\u{2044}' | '\u{2215}' | '\u{29f8}' | '\u{2571}' => '/',
        // Set minus and similar signs. The yen and won signs take the place of `\` in Japanese and Korean code pages.
        '\u{2216}' | '\u{29f5}' | '\u{29f9}' | '\u{20e5}' | '\u{a5}' | '\u{20a9}' => '\\',
        '\u{66a}' => '%',
        c => c,
    }
}

/// Returns whether a literal segment stays one segment in its place, however often it is decoded.
fn is_one_place(literal: &str) -> bool {
    let mut text = literal.to_owned();
    loop {
        let harmless = |part: &str| !matches!(part.split(';').next().unwrap_or_default(), "." | "..");
        if !text.split(['/', '\\']).all(|part| !part.is_empty() && harmless(part)) {
            return false;
        }
        let next = decoded(&text);
        if next == text {
            return true;
        }
        text = next;
    }
}

/// Returns the names of the parameters that a literal query sets.
fn literal_names(query: &str) -> impl Iterator<Item = String> {
    query.split(['&', ';']).map(|pair| loosely(&decoded(pair.split('=').next().unwrap_or_default())))
}

/// Returns a parameter's name as the most lenient server reads it: without case, without `[]`, with PHP's underscores.
fn loosely(name: &str) -> String {
    let name = name.trim().split('[').next().unwrap_or_default();
    name.chars().flat_map(char::to_lowercase).map(|c| if matches!(c, '.' | ' ' | '+') { '_' } else { c }).collect()
}

/// Percent-encodes everything except RFC 3986's unreserved characters.
fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// Percent-decodes a text. Returns `None` if an escape is invalid or the result is not UTF-8.
fn decode(encoded: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut rest = encoded.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
        bytes.push(u8::try_from(digit()? * 16 + digit()?).ok()?);
    }
    String::from_utf8(bytes).ok()
}

/// Percent-decodes all valid escapes, as a lenient server does.
fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let digit = |offset: usize| bytes.get(at + offset).and_then(|digit| char::from(*digit).to_digit(16));
        match (byte, digit(1), digit(2)) {
            (b'%', Some(high), Some(low)) => {
                plain.push(u8::try_from(high * 16 + low).unwrap_or_default());
                at += 3;
            }
            _ => {
                plain.push(*byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn upstream(method: HttpMethod, url: &str, query: &[&str]) -> HttpUpstream {
        HttpUpstream { method, url: url.into(), query: query.iter().map(|name| (*name).to_owned()).collect() }
    }

    fn request(method: HttpMethod, url: &str, query: &[&str]) -> Request {
        Request::parse(&upstream(method, url, query)).unwrap()
    }

    const URL: &str = "https://api.test/v1/users/{id}/notes-{n}.json";

    #[rstest]
    #[case::plain(json!({"id": "ada", "n": 7}), "ada", "7")]
    #[case::bool(json!({"id": true, "n": -1}), "true", "-1")]
    #[case::ampersand(json!({"id": "a&d=e+f", "n": 1}), "a%26d%3De%2Bf", "1")]
    #[case::percent(json!({"id": "100%", "n": 1}), "100%25", "1")]
    #[case::percent_and_more(json!({"id": "5% off, 10%", "n": "50%"}), "5%25%20off%2C%2010%25", "50%25")]
    #[case::joined(json!({"id": "\u{1f469}\u{200d}\u{1f4bb}", "n": 1}), "%F0%9F%91%A9%E2%80%8D%F0%9F%92%BB", "1")]
    #[case::half(json!({"id": "½ l", "n": 1}), "%C2%BD%20l", "1")]
    #[case::dots_inside(json!({"id": "a..b", "n": "..."}), "a..b", "...")]
    #[case::unicode(json!({"id": "ä b", "n": 1}), "%C3%A4%20b", "1")]
    #[case::at(json!({"id": "@evil.test:1", "n": 1}), "%40evil.test%3A1", "1")]
    #[case::largest(json!({"id": u64::MAX, "n": i64::MIN}), "18446744073709551615", "-9223372036854775808")]
    fn arguments_become_segments(#[case] args: Value, #[case] id: &str, #[case] n: &str) {
        let request = request(HttpMethod::Get, URL, &[]);
        let rendered = request.render(args.as_object().unwrap()).unwrap();
        assert_eq!(rendered.url, format!("https://api.test/v1/users/{id}/notes-{n}.json"));
    }

    #[rstest]
    #[case::empty(json!(""))]
    #[case::dot(json!("."))]
    #[case::dots(json!(".."))]
    #[case::climbing(json!("../admin"))]
    #[case::climbing_within(json!("a/../../admin"))]
    #[case::backslash(json!("..\\admin"))]
    #[case::encoded(json!("..%2fadmin"))]
    #[case::encoded_dots(json!("%2e%2e"))]
    #[case::encoded_twice(json!("%252e%252e%252fadmin"))]
    #[case::parameters(json!("..;x"))]
    #[case::absolute(json!("/etc/passwd"))]
    #[case::trailing(json!("a/"))]
    #[case::newline(json!("a\r\nHost: evil.test"))]
    #[case::nul(json!("a\0"))]
    #[case::encoded_newline(json!("a%0d%0a"))]
    #[case::another_resource(json!("A-7/card"))]
    #[case::inner_backslash(json!("A-7\\card"))]
    #[case::question(json!("a?admin=1"))]
    #[case::fragment(json!("a#b"))]
    #[case::matrix(json!("a;role=admin"))]
    #[case::encoded_slash(json!("a%2fcard"))]
    #[case::encoded_slash_twice(json!("a%252fcard"))]
    #[case::encoded_slash_thrice(json!("a%25252Fcard"))]
    #[case::split_escape(json!("a%%32%66card"))]
    #[case::overlong_dots(json!("%c0%ae%c0%ae%2fx"))]
    #[case::overlong_slash(json!("a%c0%afcard"))]
    #[case::overlong_three(json!("a%e0%80%afcard"))]
    #[case::encoded_backslash(json!("a%5ccard"))]
    #[case::encoded_nul(json!("a%00"))]
    #[case::encoded_semicolon(json!("a%3Bb"))]
    #[case::percent_u(json!("a%u2215card"))]
    #[case::sloppy_escape(json!("a%2 card"))]
    #[case::fullwidth_slash(json!("a\u{ff0f}card"))]
    #[case::fullwidth_backslash(json!("a\u{ff3c}card"))]
    #[case::fullwidth_escape(json!("a\u{ff05}2fcard"))]
    #[case::fullwidth_dots(json!("\u{ff0e}\u{ff0e}"))]
    #[case::leader(json!("\u{2025}"))]
    #[case::division(json!("a\u{2215}card"))]
    #[case::fraction_slash(json!("a\u{2044}card"))]
    #[case::account_of(json!("\u{2100}"))]
    #[case::yen(json!("a\u{a5}card"))]
    #[case::greek_question_mark(json!("a\u{37e}b"))]
    #[case::hidden_between(json!(".\u{200b}."))]
    #[case::hidden_escape(json!("a%\u{200b}2fcard"))]
    #[case::hidden_alone(json!("\u{feff}"))]
    #[case::line_separator(json!("a\u{2028}b"))]
    #[case::next_line(json!("a\u{85}b"))]
    #[case::delete(json!("a\u{7f}"))]
    #[case::dot_at_the_end(json!("card."))]
    #[case::space_at_the_end(json!("card "))]
    #[case::space_at_the_start(json!(" card"))]
    #[case::dots_and_spaces(json!(". ."))]
    #[case::blank(json!(" "))]
    #[case::fraction(json!(1.5))]
    #[case::exponent(json!(1e300))]
    #[case::null(json!(null))]
    #[case::list(json!(["a"]))]
    #[case::object(json!({"a": 1}))]
    #[case::long(json!("x".repeat(9_000)))]
    fn what_would_change_the_path_is_refused(#[case] id: Value) {
        let request = request(HttpMethod::Get, URL, &[]);
        let denial = request.render(json!({"id": id, "n": 1}).as_object().unwrap()).unwrap_err();
        assert_eq!(denial.rule, Rule::ToolUrl);
        assert!(denial.reason.contains("the argument \"id\"") || denial.reason.contains("bytes"), "{denial:?}");
    }

    #[test]
    fn a_path_of_several_segments_is_what_the_contract_says() {
        let request = request(HttpMethod::Get, "https://a.test/files/{+path}", &[]);
        let url = |path: &str| request.render(json!({"path": path}).as_object().unwrap()).map(|rendered| rendered.url);
        assert_eq!(url("src/main file.rs").unwrap(), "https://a.test/files/src/main%20file.rs");
        assert_eq!(url("one").unwrap(), "https://a.test/files/one");
        for path in [
            "",
            "/",
            "/etc/passwd",
            "a/",
            "a//b",
            "..",
            "a/../b",
            "a/./b",
            "a/..",
            "../a",
            "a/%2e%2e/b",
            "a/..;/b",
            "a\\..\\b",
        ] {
            assert_eq!(url(path).unwrap_err().rule, Rule::ToolUrl, "{path}");
        }
        for path in ["a/.\u{200b}./b", "a/\u{ff0e}\u{ff0e}/b", "a\u{2215}b", "a/b?c", "a/b#c", "a/b. ", "a/ b", "a/b\0"]
        {
            assert_eq!(url(path).unwrap_err().rule, Rule::ToolUrl, "{path:?}");
        }
    }

    #[test]
    fn an_escape_is_not_made_of_a_literal_and_an_argument() {
        let request = request(HttpMethod::Get, "http://a.test/%25{x}2fb", &[]);
        for (x, fits) in [("", false), ("2f", false), ("%", false), ("-", true)] {
            assert_eq!(request.render(json!({"x": x}).as_object().unwrap()).is_ok(), fits, "{x}");
        }
    }

    #[rstest]
    #[case::same("http://a.test/?v=2", "v")]
    #[case::case("http://a.test/?v=2", "V")]
    #[case::list("http://a.test/?v=2", "v[]")]
    #[case::without_a_value("http://a.test/?debug", "debug")]
    #[case::encoded("http://a.test/?%76=2", "v")]
    #[case::php("http://a.test/?a_b=2", "a.b")]
    #[case::semicolons("http://a.test/?x=1;v=2", "v")]
    fn no_argument_is_a_second_value_of_what_the_template_sets(#[case] url: &str, #[case] name: &str) {
        let parsed = Request::parse(&upstream(HttpMethod::Get, url, &[name]));
        assert!(matches!(parsed, Err(TemplateError::Set(_))), "{parsed:?}");
        assert!(Request::parse(&upstream(HttpMethod::Get, url, &["other"])).is_ok());
    }

    #[test]
    fn what_is_missing_or_left_over_is_refused() {
        let request = request(HttpMethod::Delete, URL, &["force"]);
        for args in [json!({"n": 1}), json!({"id": "a", "n": 1, "body": 1}), json!({"id": "a", "n": 1, "force": null})]
        {
            assert_eq!(request.render(args.as_object().unwrap()).unwrap_err().rule, Rule::ToolUrl, "{args}");
        }
    }

    #[test]
    fn a_literal_around_an_argument_does_not_become_dots_with_it() {
        let request = request(HttpMethod::Get, "http://a.test/.{x}", &[]);
        for (x, fits) in [(".", false), ("", false), ("a", true), ("./b", false), ("hidden", true)] {
            assert_eq!(request.render(json!({"x": x}).as_object().unwrap()).is_ok(), fits, "{x}");
        }
    }

    #[test]
    fn queries_and_bodies_take_the_rest() {
        let get = request(HttpMethod::Get, "http://a.test:8080/search?v=2", &["q", "deep"]);
        let url = |args: Value| get.render(args.as_object().unwrap()).unwrap().url;
        assert_eq!(
            url(json!({"q": "a&b=c/../d\n", "deep": true})),
            "http://a.test:8080/search?v=2&q=a%26b%3Dc%2F..%2Fd%0A&deep=true"
        );
        assert_eq!(url(json!({})), "http://a.test:8080/search?v=2");
        let post = request(HttpMethod::Post, "https://a.test/{kind}", &["dry"]);
        let args = json!({"kind": "t", "dry": false, "title": "x", "tags": ["a"]});
        let rendered = post.render(args.as_object().unwrap()).unwrap();
        assert_eq!(rendered.url, "https://a.test/t?dry=false");
        assert_eq!(Value::from(rendered.body.unwrap()), json!({"title": "x", "tags": ["a"]}));
    }

    #[rstest]
    #[case::root("https://a.test", Ok(()))]
    #[case::slash("https://a.test/", Ok(()))]
    #[case::ending_in_a_slash("https://a.test/x/", Ok(()))]
    #[case::scheme("ftp://a.test/", Err("http://"))]
    #[case::host_argument("https://{host}/", Err("host"))]
    #[case::host_part("https://{tenant}.a.test/", Err("host"))]
    #[case::port_argument("https://a.test:{port}/", Err("host"))]
    #[case::user("https://me@a.test/", Err("host"))]
    #[case::fragment("https://a.test/#x", Err("segments"))]
    #[case::two_in_a_segment("https://a.test/{a}{b}", Err("segments"))]
    #[case::unclosed("https://a.test/{a", Err("segments"))]
    #[case::nameless("https://a.test/{}", Err("segments"))]
    #[case::several("https://a.test/{+a}", Ok(()))]
    #[case::several_within("https://a.test/{+a}/b", Err("segments"))]
    #[case::several_after("https://a.test/b{+a}", Err("segments"))]
    #[case::several_nameless("https://a.test/{+}", Err("segments"))]
    #[case::dots("https://a.test/../x", Err("segments"))]
    #[case::encoded_dots("https://a.test/%2e%2e/x", Err("segments"))]
    #[case::empty_segment("https://a.test//x", Err("segments"))]
    #[case::space("https://a.test/a b", Err("segments"))]
    #[case::bad_escape("https://a.test/%zz", Err("segments"))]
    #[case::query_argument("https://a.test/?q={q}", Err("query"))]
    #[case::path_twice("https://a.test/{a}/{a}", Err("twice"))]
    #[case::path_and_query("https://a.test/{q}", Err("twice"))]
    fn templates(#[case] url: &str, #[case] expected: Result<(), &str>) {
        let parsed = Request::parse(&upstream(HttpMethod::Get, url, if url.contains("{q}") { &["q"] } else { &[] }));
        match (parsed, expected) {
            (Ok(_), Ok(())) => {}
            (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
            (parsed, expected) => panic!("expected {expected:?}, found {parsed:?}"),
        }
    }

    proptest! {
        /// Whatever an argument is, the URL parses to the template's host and shape: as it is, and however often strict or lenient servers
        /// decode it.
        #[test]
        fn whatever_renders_has_the_same_shape(
            id in ".{0,30}", q in ".{0,30}", odd in "[./%2eEfFcCuU0aA; \\\\\u{ff0f}\u{ff05}\u{2215}\u{200b}\u{ff0e}]{0,8}"
        ) {
            let request = request(HttpMethod::Get, "https://a.test/x/{id}/{odd}?v=1", &["q"]);
            if let Ok(rendered) = request.render(json!({"id": id, "q": q, "odd": odd}).as_object().unwrap()) {
                let uri: http::Uri = rendered.url.parse().unwrap();
                prop_assert_eq!(uri.host(), Some("a.test"));
                let mut path = uri.path().as_bytes().to_vec();
                for _ in 0..4 {
                    let lenient: String = String::from_utf8_lossy(&path).nfkc().collect();
                    prop_assert_eq!(lenient.split(['/', '\\']).count(), 4, "{}", lenient);
                    for part in lenient.split('/').skip(1) {
                        prop_assert!(!part.trim_matches(['.', ' ']).is_empty() && !part.contains([';', '?', '#', '\0']), "{}", lenient);
                    }
                    // No parameter has two values either.
                    path = percent_encoding::percent_decode(&path).collect();
                }
                let pairs: Vec<&str> = uri.query().unwrap_or_default().split(['&', ';']).collect();
                prop_assert_eq!(pairs.len(), 2);
                prop_assert!(pairs.iter().all(|pair| pair.matches('=').count() == 1));
            }
        }
    }
}
