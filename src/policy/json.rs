//! Reads JSON that every parser reads in the same way.
//!
//! Two parsers of one text must see the same value, because Belay decides about a value that another program's parser acts on.
//!
//! Guarantees: every parser that follows RFC 8259 reads an accepted text as the value that [`parse`] returns.
//! Rejects: text that is not JSON (`NaN`, `Infinity`, `1e999`, unpaired surrogates, text after the value), and also duplicate names in an
//! object, more than [`DEEPEST`] levels, more than [`MOST`] values, and numbers that would be rounded. [`exact`] also rejects what
//! programming languages still read differently: numbers beyond ±(2^53 − 1), which JavaScript rounds, and `-0`, which JavaScript writes as
//! `0`. [`lenient`] is for text that is forwarded as written: it rejects duplicate names, and rounds numbers.
//!
//! Names are compared by their characters, after escapes: `a` and `\u0061` are the same name. Nothing is normalized: a name that only looks
//! like another name is a different name.

use std::{borrow::Cow, cell::Cell, fmt};

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Deepest nesting. Later code walks values recursively, on stacks of 2 MiB.
pub const DEEPEST: usize = 100;
/// Maximum number of values, not counting names. A value in memory takes many times the bytes of its text, such as `0,`.
pub const MOST: usize = 1 << 18;
/// Maximum number of values in text that is forwarded as written. A request for embeddings may have 300,000 tokens, each of which is a
/// number.
const MOST_SENT_ON: usize = 320_000;
/// The largest whole number that every JSON parser keeps: 2^53 − 1.
pub const LARGEST: i64 = (1 << 53) - 1;
/// The first whole number from which on doubles have gaps larger than one, so that a number read into a double may have been another
/// number.
const GAPS: f64 = 9_007_199_254_740_992.0;

/// The reason why a text or a value is rejected. It quotes names but not values, because reasons are recorded and arguments must not be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected JSON that can be read in one way only, found {0}")]
pub struct Ambiguous(pub String);

/// Parses one JSON value.
///
/// # Errors
/// Returns an error if the text is not JSON, or if two parsers could read it differently.
pub fn parse(text: &[u8]) -> Result<Value, Ambiguous> {
    read(text, false, MOST)
}

/// Parses one JSON value whose numbers and texts only other programs act on. An unpaired surrogate is read as U+FFFD. Numbers are rounded,
/// and numbers beyond the range of a double become the largest double.
///
/// # Errors
/// Returns an error if the text is not JSON, or if an object has a name twice.
pub fn lenient(text: &[u8]) -> Result<Value, Ambiguous> {
    read(&mended(text), true, MOST_SENT_ON)
}

fn read(text: &[u8], rounds: bool, most: usize) -> Result<Value, Ambiguous> {
    let mut reader = serde_json::Deserializer::from_slice(text);
    let left = Cell::new(most);
    let value = Level { depth: 0, most, left: &left, rounds }.deserialize(&mut reader).map_err(found)?;
    reader.end().map_err(found)?;
    Ok(value)
}

/// Returns the text with U+FFFD for unpaired surrogates, and with the largest double for numbers beyond its range. Invalid JSON stays
/// invalid.
fn mended(text: &[u8]) -> Cow<'_, [u8]> {
    let mut mended: Option<Vec<u8>> = None;
    // The number of bytes of `text` that are in `mended`.
    let mut taken = 0;
    let mut replace = |from: usize, to: usize, with: &[u8]| {
        let mended = mended.get_or_insert_with(|| Vec::with_capacity(text.len()));
        mended.extend_from_slice(text.get(taken..from).unwrap_or_default());
        mended.extend_from_slice(with);
        taken = to;
    };
    let (mut at, mut in_text) = (0, false);
    while let Some(byte) = text.get(at) {
        let mut next = at.saturating_add(1);
        match byte {
            b'"' => in_text = !in_text,
            b'\\' if in_text => {
                next = match (unit(text, at), unit(text, at.saturating_add(6))) {
                    (Some(0xD800..=0xDBFF), Some(0xDC00..=0xDFFF)) => at.saturating_add(12),
                    (Some(0xD800..=0xDFFF), _) => {
                        replace(at, at.saturating_add(6), br"\ufffd");
                        at.saturating_add(6)
                    }
                    _ => at.saturating_add(2),
                };
            }
            b'-' | b'0'..=b'9' if !in_text => {
                let rest = text.get(at..).unwrap_or_default();
                let length = rest.iter().position(|byte| !b"+-.eE0123456789".contains(byte)).unwrap_or(rest.len());
                let number = rest.get(..length).and_then(|number| str::from_utf8(number).ok()).unwrap_or_default();
                next = at.saturating_add(length);
                if number.len() > 300 || number.contains(['e', 'E']) {
                    match number.parse::<f64>() {
                        Ok(f64::INFINITY) => replace(at, next, f64::MAX.to_string().as_bytes()),
                        Ok(f64::NEG_INFINITY) => replace(at, next, f64::MIN.to_string().as_bytes()),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
        at = next;
    }
    match mended {
        None => text.into(),
        Some(mut mended) => {
            mended.extend_from_slice(text.get(taken..).unwrap_or_default());
            mended.into()
        }
    }
}

/// Returns the UTF-16 code unit of the escape at this position.
fn unit(text: &[u8], at: usize) -> Option<u16> {
    let escape = text.get(at..at.checked_add(6)?)?.strip_prefix(br"\u")?;
    let digits = str::from_utf8(escape).ok().filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
    u16::from_str_radix(digits, 16).ok()
}

/// Rejects numbers that JSON parsers of some languages change.
///
/// # Errors
/// Returns an error if there is such a number.
pub fn exact(value: &Value) -> Result<(), Ambiguous> {
    match value {
        Value::Number(number) => exact_number(number),
        Value::Array(items) => items.iter().try_for_each(exact),
        Value::Object(fields) => fields.values().try_for_each(exact),
        Value::Null | Value::Bool(_) | Value::String(_) => Ok(()),
    }
}

/// Returns the value with whole numbers in their shortest form, as RFC 8785 writes them: `1.0` becomes `1`. A value that was serialized and
/// parsed again is then equal to the value of the first decision.
pub fn whole(mut value: Value) -> Value {
    make_whole(&mut value);
    value
}

fn make_whole(value: &mut Value) {
    match value {
        Value::Number(number) => {
            if let Some(whole) = whole_number(number) {
                *number = whole;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(make_whole),
        Value::Object(fields) => fields.values_mut().for_each(make_whole),
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

/// Returns the whole number that equals a double, if there is one.
fn whole_number(number: &Number) -> Option<Number> {
    let double = number.as_f64().filter(|double| number.is_f64() && double.fract() == 0.0 && double.abs() < GAPS)?;
    // The conversion cannot fail, because whole doubles below 2^53 fit into 64 bits.
    format!("{double:.0}").parse::<i64>().ok().map(Number::from)
}

/// Returns a name in the form that a JSON Pointer has (RFC 6901).
pub fn pointer_token(name: &str) -> Cow<'_, str> {
    match name.contains(['~', '/']) {
        true => name.replace('~', "~0").replace('/', "~1").into(),
        false => name.into(),
    }
}

fn exact_number(number: &Number) -> Result<(), Ambiguous> {
    let holds = match (number.as_i64(), number.as_f64()) {
        (Some(whole), _) => (-LARGEST..=LARGEST).contains(&whole),
        // Whole numbers above the range of `i64`, and fractions.
        (None, Some(double)) => double.abs() < GAPS && !(double == 0.0 && double.is_sign_negative()),
        (None, None) => false,
    };
    if holds {
        return Ok(());
    }
    Err(Ambiguous(format!(
        "-0, or a number beyond 2^53 - 1 ({LARGEST}) either way: send 0, and larger numbers as text"
    )))
}

fn found(error: serde_json::Error) -> Ambiguous {
    Ambiguous(error.to_string())
}

/// A value at one depth.
#[derive(Clone, Copy)]
struct Level<'l> {
    depth: usize,
    /// The maximum number of values.
    most: usize,
    /// The number of values that are left.
    left: &'l Cell<usize>,
    /// Whether numbers may be rounded.
    rounds: bool,
}

impl Level<'_> {
    fn below<E: Error>(self) -> Result<Self, E> {
        if self.depth >= DEEPEST {
            return Err(E::custom(format_args!("more than {DEEPEST} levels")));
        }
        Ok(Self { depth: self.depth + 1, ..self })
    }
}

impl<'de> DeserializeSeed<'de> for Level<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let left = self.left.get().checked_sub(1);
        let most = self.most;
        self.left
            .set(left.ok_or_else(|| D::Error::custom(format_args!("more than {most} values: send less at a time")))?);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Level<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        match Number::from_f64(value) {
            Some(number) if self.rounds || value.abs() < GAPS => Ok(Value::Number(number)),
            _ => Err(E::custom("a number so large that it would be rounded: send it as text")),
        }
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let below = self.below()?;
        let mut read = Vec::new();
        while let Some(item) = items.next_element_seed(below)? {
            read.push(item);
        }
        Ok(Value::Array(read))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let below = self.below()?;
        let mut read = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            // serde_json itself gives such objects another meaning, and it may parse this text later.
            if name.starts_with("$serde_json::") {
                return Err(A::Error::custom(format_args!("the name {name:?}, which is reserved")));
            }
            let value = fields.next_value_seed(below)?;
            match read.entry(name) {
                serde_json::map::Entry::Vacant(vacant) => vacant.insert(value),
                serde_json::map::Entry::Occupied(taken) => {
                    return Err(A::Error::custom(format_args!("the name {:?} twice in one object", taken.key())));
                }
            };
        }
        Ok(Value::Object(read))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    #[rstest]
    #[case::twice(r#"{"a":1,"a":2}"#, "twice")]
    #[case::twice_alike(r#"{"a":1,"a":1}"#, "twice")]
    #[case::twice_escaped(r#"{"a":1,"\u0061":2}"#, "twice")]
    #[case::twice_deep(r#"[{"x":{"a":1,"b":2,"a":3}}]"#, "twice")]
    #[case::nan("NaN", "expected value")]
    #[case::infinity("-Infinity", "invalid number")]
    #[case::overflow("1e999", "out of range")]
    #[case::rounded("18446744073709551617", "rounded")]
    #[case::rounded_fraction("9007199254740993.0", "rounded")]
    #[case::trailing("{} {}", "trailing")]
    #[case::comma("[1,]", "trailing comma")]
    #[case::half_a_pair(r#""\ud800""#, "hex escape")]
    #[case::bom("\u{feff}{}", "expected value")]
    #[case::reserved(r#"{"$serde_json::private::RawValue":"{\"a\":1}"}"#, "reserved")]
    #[case::empty("", "EOF")]
    fn refuses(#[case] text: &str, #[case] word: &str) {
        let refused = parse(text.as_bytes()).unwrap_err();
        assert!(refused.to_string().contains(word), "{refused}");
    }

    #[test]
    fn refuses_what_is_not_utf_8_and_what_is_too_deep() {
        assert!(parse(b"\"\xff\"").is_err());
        let nested = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(parse(nested(DEEPEST).as_bytes()).is_ok());
        assert!(parse(nested(DEEPEST + 1).as_bytes()).is_err());
        assert!(parse("[".repeat(1 << 20).as_bytes()).is_err());
    }

    #[test]
    fn refuses_what_takes_more_memory_than_its_text() {
        let zeros = |n: usize| format!("[{}0]", "0,".repeat(n - 1));
        assert!(parse(zeros(MOST - 1).as_bytes()).is_ok());
        let refused = parse(zeros(MOST).as_bytes()).unwrap_err();
        assert!(refused.to_string().contains("262144 values"), "{refused}");
        // OpenAI embeds 300,000 tokens in one request, in lists of at most 2,048.
        let tokens = |n: usize| format!(r#"{{"model":"e","input":[[{}0]]}}"#, "0,".repeat(n - 1));
        assert!(lenient(tokens(300_000).as_bytes()).is_ok());
        assert!(parse(tokens(300_000).as_bytes()).is_err(), "what is judged by contracts may not");
        let refused = lenient(tokens(MOST_SENT_ON).as_bytes()).unwrap_err();
        assert!(refused.to_string().contains("320000 values"), "{refused}");
    }

    #[rstest]
    #[case(json!(9_007_199_254_740_991_i64), true)]
    #[case(json!(9_007_199_254_740_992_i64), false)]
    #[case(json!(-9_007_199_254_740_991_i64), true)]
    #[case(json!(-9_007_199_254_740_992_i64), false)]
    #[case(json!(u64::MAX), false)]
    #[case(json!(-0.0), false)]
    #[case(json!(0.0), true)]
    #[case(json!(0.1), true)]
    #[case(json!(1e300), false)]
    #[case(json!({"a": [{"b": -0.0}]}), false)]
    fn only_numbers_that_every_parser_keeps_are_exact(#[case] value: Value, #[case] holds: bool) {
        assert_eq!(exact(&value).is_ok(), holds, "{value}");
    }

    #[test]
    fn minus_zero_is_seen_however_it_is_written() {
        for text in ["-0", "-0.0", "-0e5", "-1e-999"] {
            assert!(exact(&parse(text.as_bytes()).unwrap()).is_err(), "{text}");
        }
    }

    #[rstest]
    #[case("a", "a")]
    #[case("", "")]
    #[case("a/b~c", "a~1b~0c")]
    #[case("~1", "~01")]
    fn names_in_pointers(#[case] name: &str, #[case] expected: &str) {
        assert_eq!(pointer_token(name), expected);
        assert_eq!(json!({name: 7}).pointer(&format!("/{expected}")), Some(&json!(7)));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e15..1e15).prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(".{0,6}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// What passes is read as serde_json reads it, and nothing panics.
        #[test]
        fn what_passes_is_what_was_written(value in any_json()) {
            prop_assert_eq!(parse(value.to_string().as_bytes()), Ok(value));
        }

        #[test]
        fn no_bytes_panic(text in prop::collection::vec(prop_oneof![Just(b'{'), Just(b'}'), Just(b'"'), Just(b':'), Just(b','), any::<u8>()], 0..64)) {
            if let Ok(value) = parse(&text) {
                prop_assert_eq!(serde_json::from_slice::<Value>(&text).unwrap(), value);
            }
        }
    }
}
