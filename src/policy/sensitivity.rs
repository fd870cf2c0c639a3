//! Classifies the sensitivity of data by the patterns of a pack.
//!
//! Guarantees: every text, number and name in a value is checked, each by itself. The time is linear in the length of the value, whatever
//! the patterns are.
//! Non-goals: data that is encoded, or split over two values.
//! Rejects: patterns that need more than the memory limit.

use regex::{RegexSet, RegexSetBuilder};
use serde_json::Value;

use super::config::{DataPattern, Sensitivity};

/// Maximum memory of all compiled patterns of a pack together, in bytes.
const LARGEST: usize = 4 << 20;

/// The compiled patterns of a pack.
pub struct Detectors {
    patterns: RegexSet,
    levels: Vec<Sensitivity>,
}

impl Detectors {
    /// Compiles a pack's patterns.
    ///
    /// # Errors
    /// Returns the reason if a pattern is invalid or the patterns need too much memory.
    pub fn compile(patterns: &[DataPattern]) -> Result<Self, String> {
        let levels = patterns.iter().map(|pattern| pattern.sensitivity).collect();
        let patterns =
            RegexSetBuilder::new(patterns.iter().map(|pattern| &pattern.pattern)).size_limit(LARGEST).build();
        Ok(Self { patterns: patterns.map_err(|error| error.to_string())?, levels })
    }

    /// Returns whether there are no patterns.
    pub fn is_empty(&self) -> bool {
        self.levels.is_empty()
    }

    /// Returns whether a pattern finds data of this sensitivity.
    pub fn finds(&self, level: Sensitivity) -> bool {
        self.levels.contains(&level)
    }

    /// Returns the sensitivity of a value: the highest of its parts.
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

    /// Returns the sensitivity of a text: the highest of the patterns that match.
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
        /// Data that is found anywhere in a value is found in the whole value.
        #[test]
        fn a_whole_is_as_sensitive_as_its_parts(before in ".{0,40}", after in ".{0,40}", name in "[a-z]{1,8}") {
            let text = format!("{before} 4111-1111-1111-1111 {after}");
            prop_assert_eq!(detectors().of(&json!({"x": [before, {name: text}], "y": after})), Sensitivity::Restricted);
        }
    }
}
