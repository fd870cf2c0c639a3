//! HTTP requests that are made of a tool call's arguments.
//!
//! A template is an absolute URL in which `{name}` stands for an argument: at most one in each segment of the path, nowhere
//! else. Scheme, host, port and a query that the template itself has are literal. Arguments are strings, integers and
//! booleans; each is percent-encoded whole, so that `/` is `%2F`. Those that the contract lists go into the query, the others
//! are the JSON body, where the method has one.
//!
//! Promises: no argument changes how many segments the path has or what they mean to a server that decodes once too often
//! (`..`, `%2e%2e%2f`, `..;`, empty ones and control characters are refused, at every depth of decoding). Refuses: bodies of
//! GET, HEAD and DELETE, lists and objects in a URL, and to correct what it is given.

use serde_json::{Map, Value};

use super::{
    config::{HttpMethod, HttpUpstream},
    decide::Denial,
    hostname::Authority,
    rule::Rule,
    shorten::shorten,
};

/// Longest URL. Servers take 8 KiB.
const LONGEST: usize = 8_000;

/// A template that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The scheme is neither.
    #[error("expected http:// or https://")]
    Scheme,
    /// The host or port is none.
    #[error("expected a literal host, and a port or none: {0}")]
    Authority(String),
    /// A segment of the path.
    #[error(
        "expected segments of letters, digits and -._~!$&'()*+,;=:@% with at most one {{name}} in each, none of them empty, `.` or `..`; found {0:?}"
    )]
    Segment(String),
    /// The literal query.
    #[error("expected a query without {{name}}, whose arguments are listed in `query`; found {0:?}")]
    Query(String),
    /// An argument goes to two places.
    #[error("expected each argument in one place, found {0:?} twice")]
    Twice(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    Literal(String),
    Argument { before: String, name: String, after: String },
}

/// A contract's HTTP request, ready to be made of arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    method: HttpMethod,
    secure: bool,
    /// As it is written, for the URL.
    host: String,
    authority: Authority,
    segments: Vec<Segment>,
    literal_query: Option<String>,
    query: Vec<String>,
}

/// A request that a call is made by.
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
    /// Reads a contract's request.
    ///
    /// # Errors
    /// See [`TemplateError`].
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
        Ok(request)
    }

    /// The method.
    pub fn method(&self) -> HttpMethod {
        self.method
    }

    /// Host and port.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The arguments that the path needs.
    pub fn path_arguments(&self) -> impl Iterator<Item = &str> {
        self.segments.iter().filter_map(|segment| match segment {
            Segment::Argument { name, .. } => Some(name.as_str()),
            Segment::Literal(_) => None,
        })
    }

    /// The arguments that go into the query.
    pub fn query_arguments(&self) -> impl Iterator<Item = &str> {
        self.query.iter().map(String::as_str)
    }

    /// The request for these arguments.
    ///
    /// # Errors
    /// [`Rule::ToolUrl`] if an argument cannot go where the template wants it.
    pub fn render(&self, args: &Map<String, Value>) -> Result<Rendered, Denial> {
        let mut rest = args.clone();
        let mut url = format!("{}://{}", if self.secure { "https" } else { "http" }, self.host);
        for segment in &self.segments {
            url.push('/');
            match segment {
                Segment::Literal(text) => url.push_str(text),
                Segment::Argument { before, name, after } => {
                    let value = rest.remove(name).ok_or_else(|| refused(name, "is missing, and the path needs it"))?;
                    let text = text(name, &value)?;
                    if !keeps_its_place(before, &text, after) {
                        return Err(refused(
                            name,
                            "would change the path: expected a text that is not empty, without `.` and `..`, empty parts and control characters",
                        ));
                    }
                    url.push_str(before);
                    url.push_str(&encode(&text));
                    url.push_str(after);
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
            let reason = format!("the arguments make a URL of {} bytes; at most {LONGEST} are sent", url.len());
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
        let plain = (part.is_empty() && is_last) || (literal(part) && keeps_its_place(part, "", ""));
        return if plain { Ok(Segment::Literal(part.to_owned())) } else { Err(wrong()) };
    };
    let (name, after) = rest.split_once('}').ok_or_else(wrong)?;
    if name.is_empty() || name.contains('{') || !literal(before) || !literal(after) {
        return Err(wrong());
    }
    Ok(Segment::Argument { before: before.to_owned(), name: name.to_owned(), after: after.to_owned() })
}

/// RFC 3986 `pchar`, with `%`.
fn is_literal(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-._~!$&'()*+,;=:@%".contains(c)
}

/// An argument as text.
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

/// Whether a segment that is made of these stays one, whatever decodes it, however often.
fn keeps_its_place(before: &str, value: &str, after: &str) -> bool {
    let mut whole = format!("{}{}{}", decoded(before), value, decoded(after));
    if whole.is_empty() || (value.is_empty() && before.is_empty() && after.is_empty()) {
        return false;
    }
    let mut alone = value.to_owned();
    loop {
        let harmless = |part: &str| !matches!(part.split(';').next().unwrap_or_default(), "." | "..");
        let parts_hold = whole.split(['/', '\\']).all(|part| !part.is_empty() && harmless(part));
        if !parts_hold || alone.chars().any(char::is_control) {
            return false;
        }
        let (next, next_alone) = (decoded(&whole), decoded(&alone));
        if next == whole && next_alone == alone {
            return true;
        }
        (whole, alone) = (next, next_alone);
    }
}

/// Everything but RFC 3986's unreserved characters, percent-encoded.
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

/// Percent-decodes; nothing if an escape is none or the result is no text.
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

/// Percent-decodes what can be, as a lenient server does.
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
    #[case::slash(json!({"id": "group/project", "n": 1}), "group%2Fproject", "1")]
    #[case::question(json!({"id": "a?b#c&d=e", "n": 1}), "a%3Fb%23c%26d%3De", "1")]
    #[case::percent(json!({"id": "100%", "n": 1}), "100%25", "1")]
    #[case::encoded_slash(json!({"id": "a%2fb", "n": 1}), "a%252fb", "1")]
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
        /// Whatever an argument is, the URL parses to the template's host and shape.
        #[test]
        fn whatever_renders_has_the_same_shape(id in ".{0,30}", q in ".{0,30}", odd in "[./%2eEfF;\\\\a]{0,12}") {
            let request = request(HttpMethod::Get, "https://a.test/x/{id}/{odd}?v=1", &["q"]);
            if let Ok(rendered) = request.render(json!({"id": id, "q": q, "odd": odd}).as_object().unwrap()) {
                let uri: http::Uri = rendered.url.parse().unwrap();
                prop_assert_eq!(uri.host(), Some("a.test"));
                prop_assert_eq!(uri.path().split('/').count(), 4);
                // As strict as WHATWG's parser, which takes `%2e` for a dot.
                for part in uri.path().split('/').skip(1) {
                    let part = part.to_ascii_lowercase().replace("%2e", ".");
                    prop_assert!(!part.is_empty() && part != "." && part != "..");
                }
            }
        }
    }
}
