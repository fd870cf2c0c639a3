//! Computes the cost of model calls.
//!
//! Amounts are whole millionths of the pack's currency unit, and every rounding is upwards, so a limit holds for the cost that is counted
//! here. Prices are the highest that a token of the model can cost. Discounts of providers, for cached prompts or batches, are not
//! subtracted.

use super::config::ModelPrice;

/// Millionths per unit, and tokens per price.
const MILLION: i128 = 1_000_000;

/// Parses an amount such as `12.50`: digits, and at most six more after a point.
pub fn parse(text: &str) -> Option<i64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || fraction.len() > 6 {
        return None;
    }
    let fraction: i64 = format!("{fraction:0<6}").parse().ok()?;
    whole.parse::<i64>().ok()?.checked_mul(1_000_000)?.checked_add(fraction)
}

/// Formats an amount as a decimal.
pub fn show(micros: i64) -> String {
    let text = format!("{}.{:06}", micros / 1_000_000, (micros % 1_000_000).unsigned_abs());
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if micros < 0 && micros > -1_000_000 { format!("-{text}") } else { text.to_owned() }
}

/// Returns the price of a model: the first entry that matches its name.
pub fn of<'p>(prices: &'p [ModelPrice], model: &str) -> Option<&'p ModelPrice> {
    prices.iter().find(|price| match price.model.strip_suffix('*') {
        Some(beginning) => model.starts_with(beginning),
        None => price.model == model,
    })
}

impl ModelPrice {
    /// Returns the cost of this many tokens, rounded up.
    pub fn cost(&self, prompt: i64, output: i64) -> i64 {
        let sum = self.exact(prompt, output);
        i64::try_from(sum.saturating_add(MILLION - 1) / MILLION).unwrap_or(i64::MAX)
    }

    /// Returns the reply tokens that the amount covers after the prompt, or 0 if it does not cover the prompt.
    pub fn output_for(&self, micros: i64, prompt: i64) -> i64 {
        let left = i128::from(micros.max(0)).saturating_mul(MILLION).saturating_sub(self.exact(prompt, 0));
        match i128::from(self.output_micros) {
            _ if left < 0 => 0,
            ..=0 => i64::MAX,
            each => i64::try_from(left / each).unwrap_or(i64::MAX),
        }
    }

    /// Returns the cost in millionths of millionths.
    fn exact(&self, prompt: i64, output: i64) -> i128 {
        let part = |tokens: i64, price: i64| i128::from(tokens.max(0)).saturating_mul(i128::from(price.max(0)));
        part(prompt, self.input_micros).saturating_add(part(output, self.output_micros))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("0", Some(0))]
    #[case("12.5", Some(12_500_000))]
    #[case("0.000001", Some(1))]
    #[case("999999999", Some(999_999_999_000_000))]
    #[case("0.0000001", None)]
    #[case(".5", None)]
    #[case("5.", None)]
    #[case("-1", None)]
    #[case("+1", None)]
    #[case("1e3", None)]
    #[case("", None)]
    #[case("99999999999999999999", None)]
    fn sums_are_read(#[case] text: &str, #[case] micros: Option<i64>) {
        assert_eq!(parse(text), micros);
    }

    #[test]
    fn the_first_price_that_fits_counts() {
        let price = |model: &str, input_micros| ModelPrice {
            model: model.into(),
            input_micros,
            output_micros: 0,
            ..ModelPrice::default()
        };
        let prices = [price("gpt-5-mini", 1), price("gpt-5*", 2), price("*-large", 3)];
        let found = |model| of(&prices, model).map(|price| price.input_micros);
        assert_eq!(found("gpt-5-mini"), Some(1));
        assert_eq!(found("gpt-5-mini-2"), Some(2));
        assert_eq!(found("gpt-4"), None);
        assert_eq!(found("x-large"), None, "a star stands at the end only");
    }

    proptest! {
        #[test]
        fn a_sum_that_is_shown_is_read_again(micros in 0..i64::MAX / 2) {
            prop_assert_eq!(parse(&show(micros)), Some(micros));
        }

        /// The affordable output costs no more than the amount. One more token would cost more.
        #[test]
        fn what_can_be_paid_for_fits(micros in 0i64..1_000_000_000, prompt in 0i64..100_000, input in 0i64..100_000_000, output in 1i64..100_000_000) {
            let price = ModelPrice { model: "m".into(), input_micros: input, output_micros: output, ..ModelPrice::default() };
            let most = price.output_for(micros, prompt);
            if most > 0 {
                prop_assert!(price.cost(prompt, most) <= micros);
            }
            prop_assert!(price.cost(prompt, most.saturating_add(1)) > micros);
        }

        #[test]
        fn nothing_overflows(prompt: i64, output: i64, input: i64, each: i64, micros: i64) {
            let price = ModelPrice { model: "m".into(), input_micros: input, output_micros: each, ..ModelPrice::default() };
            prop_assert!(price.cost(prompt, output) >= 0);
            prop_assert!(price.output_for(micros, prompt) >= 0);
        }
    }
}
