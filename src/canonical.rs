//! RFC 8785 canonical JSON, and SHA-256 over it.
//!
//! Guarantees: [`to_bytes`] returns the one canonical form of a value: members are ordered by the UTF-16 code units of their names, and
//! numbers are written as in ECMAScript.
//! Rejects: two members with the same name, and raw JSON, because raw JSON may not be canonical.
//!
//! Every record is written and checked in this form. So the writer does not allocate for a member whose name is plain ASCII, and does not
//! move members that are already in order.

use std::{cell::RefCell, io};

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, Serializer};
use sha2::{Digest, Sha256};

/// The largest integer that is written as it is. ECMAScript numbers are doubles, and larger integers may not have an exact double.
const LARGEST: u64 = 1 << 53;

/// The largest integer in a record. Some larger integers have no exact double, so readers could disagree about them.
pub const LARGEST_WHOLE: i64 = (1 << 53) - 1;

/// A value without a canonical form: JSON cannot represent it, or two of its members have the same name.
#[derive(Debug, thiserror::Error)]
#[error("this value has no canonical JSON (RFC 8785) form: {0}")]
pub struct CanonicalError(#[from] serde_json::Error);

/// Returns the canonical bytes of a value.
///
/// # Errors
/// Returns an error if the value cannot be written as JSON.
pub fn to_bytes<T: Serialize>(value: &T) -> Result<Vec<u8>, CanonicalError> {
    written(value, false)
}

/// Returns the canonical bytes of a value whose numbers are all integers with an absolute value of at most [`LARGEST_WHOLE`].
///
/// # Errors
/// Returns an error if the value has any other number or cannot be written as JSON.
pub fn to_whole<T: Serialize>(value: &T) -> Result<Vec<u8>, CanonicalError> {
    written(value, true)
}

fn written<T: Serialize>(value: &T, whole: bool) -> Result<Vec<u8>, CanonicalError> {
    let text = RefCell::new(Text { bytes: Vec::with_capacity(512), ..Text::default() });
    value.serialize(&mut Serializer::with_formatter(Output(&text), Canonical { text: &text, whole }))?;
    Ok(text.into_inner().bytes)
}

/// Returns the message for a number that no record may have.
pub fn beyond(found: impl std::fmt::Display) -> String {
    format!("expected whole numbers up to 2^53 - 1, found {found}")
}

/// Returns the SHA-256 of the canonical form.
///
/// # Errors
/// Returns an error if the value cannot be written as JSON.
pub fn digest<T: Serialize>(value: &T) -> Result<[u8; 32], CanonicalError> {
    Ok(sha256(&to_bytes(value)?))
}

/// Returns the SHA-256 of the given bytes.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Checks whether a text is a SHA-256 digest in the form of records: 64 lower-case hex digits.
pub fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}

/// The bytes written so far, and the members of the objects that are still open.
#[derive(Default)]
struct Text {
    bytes: Vec<u8>,
    /// For each open object: the position where its members begin, and the number of members recorded before it.
    open: Vec<(usize, usize)>,
    /// The members of the open objects. Those of the innermost object come last.
    members: Vec<Member>,
}

/// The positions of a member: the start of its quoted name, the colon, and the end of its value.
#[derive(Clone, Copy, Default)]
struct Member {
    start: usize,
    colon: usize,
    end: usize,
}

impl Member {
    /// Returns the name as it is written between the quotation marks.
    fn name<'b>(&self, bytes: &'b [u8]) -> &'b [u8] {
        bytes.get(self.start + 1..self.colon.saturating_sub(1)).unwrap_or_default()
    }

    /// Returns the name in UTF-16, by which members are ordered.
    fn units(&self, bytes: &[u8]) -> Vec<u16> {
        let quoted = bytes.get(self.start..self.colon).unwrap_or_default();
        serde_json::from_slice(quoted).map_or_else(|_| Vec::new(), |name: String| name.encode_utf16().collect())
    }
}

impl Text {
    /// Closes the innermost object: sorts its members and rejects duplicate names.
    fn close(&mut self) -> io::Result<()> {
        let Self { bytes, open, members } = self;
        let (start, first) = open.pop().unwrap_or_default();
        let mine = members.get_mut(first..).unwrap_or_default();
        // ASCII names without escapes sort by their written bytes as they sort by UTF-16.
        let plain = |name: &[u8]| name.is_ascii() && !name.contains(&b'\\');
        let plain = mine.iter().all(|member| plain(member.name(bytes)));
        if !plain || !mine.is_sorted_by(|a, b| a.name(bytes) < b.name(bytes)) {
            if plain {
                mine.sort_unstable_by(|a, b| a.name(bytes).cmp(b.name(bytes)));
            } else {
                mine.sort_by_cached_key(|member| member.units(bytes));
            }
            if mine.windows(2).any(|pair| matches!(pair, [a, b] if a.name(bytes) == b.name(bytes))) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "two members of an object have one name"));
            }
            let was = bytes.split_off(start);
            for member in mine {
                if bytes.len() > start {
                    bytes.push(b',');
                }
                let its = was.get(member.start - start..member.end - start).unwrap_or_default();
                bytes.extend_from_slice(its);
            }
        }
        members.truncate(first);
        bytes.push(b'}');
        Ok(())
    }
}

/// The writer that `serde_json` writes to.
struct Output<'t>(&'t RefCell<Text>);

impl io::Write for Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.borrow_mut().bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The formatter. Methods that it does not override write as `serde_json` does without spaces.
struct Canonical<'t> {
    text: &'t RefCell<Text>,
    /// Whether to reject numbers that no record may have.
    whole: bool,
}

impl Canonical<'_> {
    /// Rejects a number that is larger than any record may have.
    fn fits(&self, amount: impl TryInto<i64> + std::fmt::Display + Copy) -> io::Result<()> {
        let fits = !self.whole || amount.try_into().is_ok_and(|amount: i64| amount <= LARGEST_WHOLE);
        if fits { Ok(()) } else { Err(io::Error::new(io::ErrorKind::InvalidData, beyond(amount))) }
    }

    /// Stores the current position in one field of the newest member.
    fn mark(&self, of: fn(&mut Member) -> &mut usize) {
        let mut text = self.text.borrow_mut();
        let here = text.bytes.len();
        if let Some(member) = text.members.last_mut() {
            *of(member) = here;
        }
    }
}

impl Formatter for Canonical<'_> {
    fn write_i64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: i64) -> io::Result<()> {
        self.fits(value.unsigned_abs())?;
        match value.unsigned_abs() {
            ..=LARGEST => CompactFormatter.write_i64(writer, value),
            _ => double(writer, value as f64),
        }
    }

    fn write_u64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: u64) -> io::Result<()> {
        self.fits(value)?;
        match value {
            ..=LARGEST => CompactFormatter.write_u64(writer, value),
            _ => double(writer, value as f64),
        }
    }

    fn write_i128<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: i128) -> io::Result<()> {
        self.fits(value.unsigned_abs())?;
        double(writer, value as f64)
    }

    fn write_u128<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: u128) -> io::Result<()> {
        self.fits(value)?;
        double(writer, value as f64)
    }

    fn write_f32<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f32) -> io::Result<()> {
        self.write_f64(writer, value.into())
    }

    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        if self.whole {
            return Err(io::Error::new(io::ErrorKind::InvalidData, beyond(value)));
        }
        double(writer, value)
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b"{")?;
        let mut text = self.text.borrow_mut();
        let open = (text.bytes.len(), text.members.len());
        text.open.push(open);
        Ok(())
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(b",")?;
        }
        self.text.borrow_mut().members.push(Member::default());
        self.mark(|member| &mut member.start);
        Ok(())
    }

    fn end_object_key<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.mark(|member| &mut member.colon);
        Ok(())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.mark(|member| &mut member.end);
        Ok(())
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.text.borrow_mut().close()
    }

    fn write_raw_fragment<W: ?Sized + io::Write>(&mut self, _: &mut W, _: &str) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "raw JSON may be in another form"))
    }
}

/// Writes a double as ECMAScript does.
fn double<W: ?Sized + io::Write>(writer: &mut W, value: f64) -> io::Result<()> {
    writer.write_all(ryu_js::Buffer::new().format_finite(value).as_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn text(value: &impl Serialize) -> String {
        String::from_utf8(to_bytes(value).unwrap()).unwrap()
    }

    /// The example of RFC 8785, section 3.2.3: order by UTF-16, not by Unicode.
    #[test]
    fn members_are_in_the_order_of_utf_16() {
        let value = json!({
            "\u{20ac}": "Euro Sign", "\r": "Carriage Return", "\u{fb33}": "Hebrew Letter Dalet With Dagesh", "1": "One",
            "\u{1f600}": "Emoji: Grinning Face", "\u{80}": "Control", "\u{f6}": "Latin Small Letter O With Diaeresis",
        });
        let again: Vec<String> = text(&value).split("\":\"").map(str::to_owned).collect();
        let ends = ["Carriage", "One", "Control", "Latin", "Euro", "Emoji", "Hebrew"];
        assert!(again.iter().skip(1).zip(ends).all(|(found, expected)| found.starts_with(expected)), "{again:?}");
        // The closing quotation mark must not take part in the comparison if one name is a prefix of another.
        assert_eq!(text(&json!({"a!": 1, "a": {"c": [{}], "b": 2}})), r#"{"a":{"b":2,"c":[{}]},"a!":1}"#);
    }

    #[test]
    fn numbers_are_those_of_ecmascript() {
        assert_eq!(text(&json!([1e21, 1.0, -0.0, 1e-7, 0.1])), "[1e+21,1,0,1e-7,0.1]");
        assert_eq!(text(&json!([LARGEST, LARGEST + 1, u64::MAX, i64::MIN, -7])).matches("9007199254740992").count(), 2);
        assert_eq!(text(&(u64::MAX, i64::MIN)), "[18446744073709552000,-9223372036854776000]");
        assert_eq!(text(&(1_u128 << 70, i128::MIN, 0.5_f32)), "[1.1805916207174113e+21,-1.7014118346046923e+38,0.5]");
    }

    #[test]
    fn what_is_to_be_whole_has_no_number_that_readers_would_not_agree_on() {
        let largest = u64::try_from(LARGEST_WHOLE).unwrap();
        let fits = json!([0, largest, -LARGEST_WHOLE, -7, "9007199254740993", {"9007199254740993": 1}]);
        assert_eq!(to_whole(&fits).unwrap(), to_bytes(&fits).unwrap());
        let beyond = [largest + 1, largest + 2, u64::MAX];
        let beyond = beyond.into_iter().map(Value::from);
        for beyond in beyond.chain([json!(i64::MIN), json!(-LARGEST_WHOLE - 1), json!(0.5), json!(1e300), json!(-0.0)])
        {
            let refused = to_whole(&json!({"a": [beyond]})).unwrap_err().to_string();
            assert!(refused.contains("expected whole numbers up to 2^53 - 1, found "), "{beyond}: {refused}");
        }
        assert!(to_whole(&(u128::MAX, 1)).is_err() && to_whole(&(i128::MIN, 1)).is_err());
        assert!(to_whole(&(7_u128, -7_i128)).is_ok());
    }

    #[test]
    fn a_name_that_is_there_twice_is_refused() {
        struct Twice;
        impl Serialize for Twice {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_map([("b", 1), ("a", 2), ("b", 3)])
            }
        }
        assert!(to_bytes(&Twice).is_err());
        assert!(to_bytes(&serde_json::value::to_raw_value(&1).unwrap()).is_err());
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 64, 8, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..8).prop_map(Value::from),
                prop::collection::hash_map("[a-c\"\\\\!\u{0}\u{e9}\u{fb33}\u{1f600}]{0,3}|.*", inner, 0..8)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// The output equals that of another implementation, byte for byte.
        #[test]
        fn another_implementation_writes_the_same(value in value()) {
            let expected = serde_json_canonicalizer::to_vec(&value).unwrap();
            let found = to_bytes(&value).unwrap();
            prop_assert_eq!(String::from_utf8(found).unwrap(), String::from_utf8(expected).unwrap());
        }
    }
}
