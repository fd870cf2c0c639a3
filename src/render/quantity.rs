//! Reads the Kubernetes quantities that the custom resources accept. Quantities can be compared, and they keep their original text.

use std::cmp::Ordering;

/// A quantity above zero, in thousandths of its unit, with its original text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quantity {
    milli: u128,
    text: String,
}

/// The error for text that is not a quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}`")]
pub struct QuantityError(String);

impl Quantity {
    /// Parses digits with up to three decimals and an optional unit: one of `m k M G T Ki Mi Gi Ti`.
    ///
    /// # Errors
    /// Returns an error if the text is anything else, or zero.
    pub fn parse(text: &str) -> Result<Self, QuantityError> {
        let error = || QuantityError(text.to_owned());
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at_checked(end).ok_or_else(error)?;
        let milli_of_unit: u128 = match unit {
            // Kubernetes rounds fractions of a thousandth, so they are rejected as mistakes.
            "m" if !number.contains('.') => 1,
            "" => 1000,
            "k" => 1000 * 1000,
            "M" => 1000 * 1000_u128.pow(2),
            "G" => 1000 * 1000_u128.pow(3),
            "T" => 1000 * 1000_u128.pow(4),
            "Ki" => 1000 * 1024,
            "Mi" => 1000 * 1024_u128.pow(2),
            "Gi" => 1000 * 1024_u128.pow(3),
            "Ti" => 1000 * 1024_u128.pow(4),
            _ => return Err(error()),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        if whole.is_empty() || fraction.is_empty() || fraction.len() > 3 {
            return Err(error());
        }
        let whole: u128 = whole.parse().map_err(|_| error())?;
        let thousandths: u128 = format!("{fraction:0<3}").parse().map_err(|_| error())?;
        let milli = whole
            .checked_mul(1000)
            .and_then(|milli| milli.checked_add(thousandths))
            .and_then(|milli| milli.checked_mul(milli_of_unit))
            .map(|milli| milli / 1000)
            .filter(|milli| *milli > 0)
            .ok_or_else(error)?;
        Ok(Self { milli, text: text.to_owned() })
    }

    /// Returns the value in thousandths of the unit, such as a CPU or a byte.
    pub fn milli(&self) -> u128 {
        self.milli
    }

    /// Returns the value in whole units, such as bytes, saturating at `u64::MAX`.
    pub fn whole(&self) -> u64 {
        u64::try_from(self.milli / 1000).unwrap_or(u64::MAX)
    }

    /// Returns the original text.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.milli.cmp(&other.milli))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("500m", 500)]
    #[case("1", 1000)]
    #[case("0.25", 250)]
    #[case("1.5Gi", 1_610_612_736_000)]
    #[case("512Mi", 536_870_912_000)]
    #[case("1k", 1_000_000)]
    fn reads(#[case] text: &str, #[case] milli: u128) {
        assert_eq!(Quantity::parse(text).unwrap().milli(), milli);
    }

    #[rstest::rstest]
    #[case("")]
    #[case("0")]
    #[case("0m")]
    #[case("m")]
    #[case("-1")]
    #[case("1.5m")]
    #[case("1.")]
    #[case(".5")]
    #[case("1.2.3")]
    #[case("1e3")]
    #[case("1Mib")]
    #[case("1 Gi")]
    #[case("1.2345")]
    #[case("99999999999999999999999999999999999999999Ti")]
    #[case("１")]
    fn refuses(#[case] text: &str) {
        assert!(Quantity::parse(text).is_err(), "{text}");
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,20}") {
            let _ = Quantity::parse(&text);
        }
    }
}
