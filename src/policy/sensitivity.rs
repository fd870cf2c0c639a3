//! How sensitive data is, by the patterns of a pack.
//!
//! Promises: every text, number and name in a value is looked at, each by itself; time grows with the value's length and
//! not faster, whatever the patterns. Refuses: patterns that take more than their memory, and what is split over two
//! values or encoded.

use regex::{RegexSet, RegexSetBuilder};
use serde_json::Value;

use super::config::{DataPattern, Sensitivity};

/// Memory of all compiled patterns of a pack together, in bytes.
const LARGEST: usize = 4 << 20;

/// Compiled patterns.
pub struct Detectors {
    patterns: RegexSet,
    levels: Vec<Sensitivity>,
}

impl Detectors {
    /// Compiles a pack's patterns.
    ///
    /// # Errors
    /// Why they are none.
    pub fn compile(patterns: &[DataPattern]) -> Result<Self, String> {
        let levels = patterns.iter().map(|pattern| pattern.sensitivity).collect();
        let patterns =
            RegexSetBuilder::new(patterns.iter().map(|pattern| &pattern.pattern)).size_limit(LARGEST).build();
        Ok(Self { patterns: patterns.map_err(|error| error.to_string())?, levels })
    }

    /// Whether there is nothing to look for.
    pub fn is_empty(&self) -> bool {
        self.levels.is_empty()
    }

    /// Whether some pattern tells data of this sensitivity.
    pub fn finds(&self, level: Sensitivity) -> bool {
        self.levels.contains(&level)
    }

    /// How sensitive a value is: as its most sensitive part.
    pub fn of(&self, value: &Value) -> Sensitivity {
        if self.is_empty() {
            return Sensitivity::default();
        }
        match value {
            Value::Null | Value::Bool(_) => Sensitivity::default(),
            Value::Number(number) => self.of_text(&number.to_string()),
            Value::String(text) => self.of_text(text),
            Value::Array(items) => items.iter().map(|item| self.of(item)).max().unwrap_or_default(),
            Value::Object(fields) => {
                fields.iter().map(|(name, value)| self.of_text(name).max(self.of(value))).max().unwrap_or_default()
            }
        }
    }

    /// How sensitive a text is: as the most sensitive of what is in it.
    pub fn of_text(&self, text: &str) -> Sensitivity {
        let found = self.patterns.matches(text).into_iter();
        found.filter_map(|index| self.levels.get(index).copied()).max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn detectors() -> Detectors {
        let pattern = |name: &str, pattern: &str, sensitivity| DataPattern {
            name: name.into(),
            pattern: pattern.into(),
            sensitivity,
        };
        Detectors::compile(&[
            pattern("card", r"\b\d{4}[ -]?\d{4}[ -]?\d{4}[ -]?\d{4}\b", Sensitivity::Restricted),
            pattern("mail", r"(?i)\b[a-z0-9._%+-]+@[a-z0-9.-]+\.[a-z]{2,}\b", Sensitivity::Confidential),
            pattern("codename", "^orion$", Sensitivity::Internal),
        ])
        .unwrap()
    }

    #[rstest::rstest]
    #[case(json!({"a": "nothing", "b": [1, true, null]}), Sensitivity::Unclassified)]
    #[case(json!({"to": "ana@example.test"}), Sensitivity::Confidential)]
    #[case(json!({"ana@example.test": 1}), Sensitivity::Confidential)]
    #[case(json!([["x", {"deep": "4111 1111 1111 1111, ana@example.test"}]]), Sensitivity::Restricted)]
    #[case(json!(4_111_111_111_111_111_i64), Sensitivity::Restricted)]
    #[case(json!("orion"), Sensitivity::Internal)]
    #[case(json!("orion's belt"), Sensitivity::Unclassified)]
    fn finds(#[case] value: Value, #[case] expected: Sensitivity) {
        assert_eq!(detectors().of(&value), expected);
    }

    #[test]
    fn nothing_is_sensitive_where_nobody_says_what_is() {
        assert_eq!(Detectors::compile(&[]).unwrap().of(&json!("4111 1111 1111 1111")), Sensitivity::Unclassified);
    }

    #[rstest::rstest]
    #[case("(")]
    #[case(r"(\w{1000}){1000}")]
    #[case(r"(a)\1")]
    fn refuses(#[case] pattern: &str) {
        let pattern = DataPattern { name: "p".into(), pattern: pattern.into(), sensitivity: Sensitivity::Internal };
        assert!(Detectors::compile(&[pattern]).is_err());
    }

    proptest! {
        /// What is found anywhere in a value is found in the whole.
        #[test]
        fn a_whole_is_as_sensitive_as_its_parts(before in ".{0,40}", after in ".{0,40}", name in "[a-z]{1,8}") {
            let text = format!("{before} 4111-1111-1111-1111 {after}");
            prop_assert_eq!(detectors().of(&json!({"x": [before, {name: text}], "y": after})), Sensitivity::Restricted);
        }
    }
}
