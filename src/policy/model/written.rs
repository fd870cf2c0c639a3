//! A request as the agent wrote it.
//!
//! Guarantees: everything that Belay does not set stays as it is, byte for byte: the order of members, the notation of numbers, escapes,
//! spaces. Belay evaluates what every parser finds in the request: duplicate names in an object are rejected. If parsers differ only in how
//! they represent a value, Belay evaluates the usual form: an unpaired surrogate as U+FFFD, `50.0` as 50, and a number beyond the range of
//! a double as the largest double.
//! Non-goals: what the request may contain.

use std::{fmt, ops::Range};

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value, value::RawValue};

use crate::policy::json::{self, Ambiguous};

/// The text of a request, and its contents.
#[derive(Debug)]
pub struct Written<'t> {
    text: &'t [u8],
    /// The members in order, and the place of each value.
    members: Vec<(String, Range<usize>)>,
    judged: Map<String, Value>,
}

impl<'t> Written<'t> {
    /// Parses a request.
    ///
    /// # Errors
    /// Returns an error if the text is not a JSON object, or if two parsers could read it differently.
    pub fn read(text: &'t [u8]) -> Result<Self, Ambiguous> {
        let Value::Object(judged) = json::whole(json::lenient(text)?) else {
            return Err(Ambiguous("another value than an object".to_owned()));
        };
        let Members(members) =
            serde_json::from_slice(text).map_err(|error: serde_json::Error| Ambiguous(error.to_string()))?;
        let places = members.into_iter().map(|(name, value)| Some((name, place(text, value)?)));
        let members = places
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| Ambiguous("a value that is not where it was read".to_owned()))?;
        Ok(Self { text, members, judged })
    }

    /// Returns the contents.
    pub fn judged(&self) -> &Map<String, Value> {
        &self.judged
    }

    /// Returns the text with these members set to these values. New members are added at the end.
    pub fn with(&self, set: &[(&str, Value)]) -> Vec<u8> {
        let mut edits: Vec<(Range<usize>, String)> = Vec::new();
        let end = self.members.last().map(|(_, place)| place.end);
        let mut is_first = end.is_none();
        // The position after the last value, or after the opening brace.
        let end = end.or_else(|| self.text.iter().position(|byte| *byte == b'{').map(|brace| brace.saturating_add(1)));
        let end = end.unwrap_or(self.text.len());
        for (name, value) in set {
            match self.members.iter().find(|(known, _)| known == name) {
                Some((_, place)) => edits.push((place.clone(), value.to_string())),
                None => {
                    let comma = if std::mem::take(&mut is_first) { "" } else { "," };
                    edits.push((end..end, format!("{comma}{}:{value}", Value::from(*name))));
                }
            }
        }
        // New members keep their order. They come after the last value, even if that value is replaced as well.
        edits.sort_by_key(|(place, _)| (place.start, place.end));
        let mut written = Vec::with_capacity(self.text.len().saturating_add(64));
        let mut from = 0;
        for (place, text) in edits {
            written.extend_from_slice(self.text.get(from..place.start).unwrap_or_default());
            written.extend_from_slice(text.as_bytes());
            from = place.end;
        }
        written.extend_from_slice(self.text.get(from..).unwrap_or_default());
        written
    }
}

/// Returns the place in the text of a value that was parsed from it.
fn place(text: &[u8], value: &RawValue) -> Option<Range<usize>> {
    let start = value.get().as_ptr().addr().checked_sub(text.as_ptr().addr())?;
    let end = start.checked_add(value.get().len())?;
    (text.get(start..end)? == value.get().as_bytes()).then_some(start..end)
}

/// Members in the order in which they are written.
struct Members<'t>(Vec<(String, &'t RawValue)>);

impl<'de: 't, 't> Deserialize<'de> for Members<'t> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Each;
        impl<'de> Visitor<'de> for Each {
            type Value = Vec<(String, &'de RawValue)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(members)
            }
        }
        from.deserialize_map(Each).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_not_set_stays_as_it_is() {
        let text = r#" { "model" : "m",
            "b": {"z": 1, "a": 50.0, "huge": 1.7976931348623157e308, "more": 1e999, "id": 18446744073709551617},
            "max_tokens": 1e3, "text": "cut \ud83d", "\u0061": "\u00e9\/" } "#;
        let written = Written::read(text.as_bytes()).unwrap();
        assert_eq!(written.with(&[]), text.as_bytes());
        assert_eq!(written.judged()["max_tokens"], json!(1000));
        assert_eq!(written.judged()["text"], json!("cut \u{fffd}"));
        assert_eq!(written.judged()["b"]["a"], json!(50));
        let set = [("max_tokens", json!(7)), ("stream_options", json!({"include_usage": true})), ("a", json!(null))];
        let expected =
            text.replace("1e3", "7").replace(r#""\u00e9\/" }"#, r#"null,"stream_options":{"include_usage":true} }"#);
        assert_eq!(String::from_utf8(written.with(&set)).unwrap(), expected);
    }

    #[test]
    fn an_empty_request_can_be_added_to() {
        let written = Written::read(b" { } ").unwrap();
        let text = written.with(&[("a", json!(1)), ("b", json!([2]))]);
        assert_eq!(text, br#" {"a":1,"b":[2] } "#);
    }

    #[test]
    fn what_has_two_readings_is_refused() {
        for text in [
            r#"{"a": 1, "a": 2}"#,
            r#"{"a": 1, "\u0061": 2}"#,
            r#"{"a": {"b": 1, "b": 1}}"#,
            r#"{"\ud83d": 1, "\ud83e": 2}"#,
            "[]",
            "7",
            "",
            r#"{"a": NaN}"#,
            r#"{"a": 01}"#,
            r#"{"a": 1,}"#,
            r#"{"a": "\x"}"#,
            r#"{"a": "\u12"}"#,
            "{\"a\": \"\n\"}",
            r#"{"a": 1} {}"#,
            "\u{feff}{}",
        ] {
            assert!(Written::read(text.as_bytes()).is_err(), "{text}");
        }
        assert!(Written::read(b"{\"a\": \"\xff\"}").is_err());
        assert!(Written::read("[".repeat(1 << 16).as_bytes()).is_err());
    }

    /// JSON with everything that can be written in several ways.
    fn any_text() -> impl Strategy<Value = String> {
        let number = prop_oneof![
            Just("50.0".to_owned()),
            Just("1e3".to_owned()),
            Just("-0".to_owned()),
            Just("1.7976931348623157e308".to_owned()),
            Just("18446744073709551617".to_owned()),
            any::<i64>().prop_map(|number| number.to_string()),
        ];
        let text = prop_oneof![
            Just(r#""\ud83d\ude00""#.to_owned()),
            Just(r#""a\ud83d""#.to_owned()),
            Just(r#""\udE00\\""#.to_owned()),
            Just(r#""\ud83d\ud83d\ude00 \"{[,:""#.to_owned()),
            ".{0,8}".prop_map(|text| Value::from(text).to_string()),
        ];
        let leaf = prop_oneof![number, text, Just("null".to_owned()), Just("true".to_owned())];
        leaf.prop_recursive(3, 24, 4, |inner| {
            let space = prop_oneof![Just(""), Just(" "), Just("\n\t")];
            prop_oneof![
                (prop::collection::vec(inner.clone(), 0..4), space.clone())
                    .prop_map(|(items, space)| format!("[{space}{}{space}]", items.join(&format!(",{space}")))),
                (prop::collection::vec(inner, 0..4), space).prop_map(|(items, space)| {
                    let members: Vec<_> = items
                        .iter()
                        .enumerate()
                        .map(|(index, item)| format!("\"{}\"{space}:{item}", index * 7 % 5))
                        .collect();
                    format!("{{{space}{}{space}}}", members.join(","))
                }),
            ]
        })
    }

    proptest! {
        /// With nothing to set, a request does not change. Otherwise only the members that are set change, and the order stays.
        #[test]
        fn only_what_is_set_changes(values in prop::collection::vec(any_text(), 0..5), set in prop::collection::btree_map(0usize..8, 0i64..100, 0..4)) {
            let names = ["d", "a", "c", "b", "e", "f", "g", "h"];
            let members: Vec<_> = names.iter().zip(&values).map(|(name, value)| format!(" \"{name}\" : {value}")).collect();
            let text = format!("{{{} }}", members.join(","));
            let written = Written::read(text.as_bytes()).unwrap();
            prop_assert_eq!(written.with(&[]), text.as_bytes());
            let set: Vec<_> = set.into_iter().map(|(index, value)| (names[index], Value::from(value))).collect();
            let changed = written.with(&set);
            let again = Written::read(&changed).unwrap();
            let mut expected = written.judged().clone();
            expected.extend(set.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
            prop_assert_eq!(again.judged(), &expected);
            let order = |written: &Written<'_>| written.members.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
            prop_assert!(order(&again).starts_with(&order(&written)));
            // Members that were not set are still there as they were written.
            for (name, place) in &written.members {
                if set.iter().all(|(set, _)| set != name) {
                    let (_, now) = again.members.iter().find(|(known, _)| known == name).unwrap();
                    prop_assert_eq!(&changed[now.clone()], &text.as_bytes()[place.clone()]);
                }
            }
        }

        #[test]
        fn no_bytes_panic(text in prop::collection::vec(prop_oneof![Just(b'{'), Just(b'}'), Just(b'"'), Just(b':'), Just(b','), Just(b'\\'), Just(b'u'), Just(b'd'), Just(b'8'), any::<u8>()], 0..64)) {
            if let Ok(written) = Written::read(&text) {
                prop_assert_eq!(written.with(&[]), text.clone());
                prop_assert!(Written::read(&written.with(&[("set", json!(1))])).is_ok());
            }
        }
    }
}
