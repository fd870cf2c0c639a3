//! Computes the token cost of pictures from their size, by the published rule of the model's provider.
//!
//! Guarantees: a picture whose size cannot be read costs the most that a picture can cost.
//! Non-goals: decoding pictures.

use serde::Deserialize;

/// The rule of a provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Pictures {
    /// OpenAI's older models: a base, and an amount for each square of 512 pixels, after the picture is scaled to fit 2048 by 2048 and to a
    /// short side of 768.
    Tiles(i64, i64),
    /// The side of a square in pixels, the maximum long side in pixels, the maximum number of squares, and the tokens per 100 squares. Used
    /// by Anthropic's models, OpenAI's newer models, Mistral's and Qwen's.
    Patches(i64, i64, i64, i64),
    /// Google's older models: an amount for each crop.
    Crops(i64),
    /// A fixed amount, whatever the size.
    Flat(i64),
}

/// The rule for unknown models: for any size, more than the defaults of the large providers.
impl Default for Pictures {
    fn default() -> Self {
        Self::Patches(28, 2_576, 4_784, 120)
    }
}

/// The level of detail at which a model reads a picture, in OpenAI's terms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Detail {
    /// The whole picture, scaled down.
    Low,
    /// The provider's default, and any unknown level.
    #[default]
    High,
    /// The picture in its original size.
    Original,
}

/// The maximum number of squares, and the maximum long side, of a picture in its original size.
const ORIGINAL: (i64, i64) = (6_000, 10_000);

impl Pictures {
    /// Returns the tokens of a picture with this width and height, or of the largest picture if the size is unknown.
    pub fn tokens(self, size: Option<(i64, i64)>, detail: Detail) -> i64 {
        let size = size.filter(|(width, height)| *width > 0 && *height > 0);
        match self {
            Self::Flat(tokens) => tokens,
            Self::Tiles(base, _) if detail == Detail::Low => base,
            Self::Tiles(base, each) => base.saturating_add(each.saturating_mul(size.map_or(8, tiles))),
            Self::Patches(square, side, most, percent) => {
                let (side, most) = if detail == Detail::Original { ORIGINAL.max((side, most)) } else { (side, most) };
                let patches = size.map_or(most, |size| patches(size, square, side).min(most));
                patches.saturating_mul(percent).saturating_add(99) / 100
            }
            Self::Crops(each) => each.saturating_mul(size.map_or(64, crops)),
        }
    }
}

fn covers(length: f64, square: f64) -> i64 {
    // Sizes are whole numbers of 32 bits, and the divisor is greater than 1.
    #[allow(clippy::cast_possible_truncation, reason = "far below 2^53")]
    let count = (length / square).ceil() as i64;
    count.max(1)
}

fn tiles((width, height): (i64, i64)) -> i64 {
    let (width, height) = (float(width), float(height));
    let fits = (2_048.0 / width.max(height)).min(1.0);
    let fits = fits * (768.0 / (width.min(height) * fits)).min(1.0);
    // A scaled picture has whole pixels. A fraction of a pixel is dropped, because it could add a tile.
    covers((width * fits).floor().max(1.0), 512.0).saturating_mul(covers((height * fits).floor().max(1.0), 512.0))
}

fn patches((width, height): (i64, i64), square: i64, side: i64) -> i64 {
    let (width, height, square) = (float(width), float(height), float(square));
    let fits = (float(side) / width.max(height)).min(1.0);
    covers(width * fits, square).saturating_mul(covers(height * fits, square))
}

fn crops((width, height): (i64, i64)) -> i64 {
    if width <= 384 && height <= 384 {
        return 1;
    }
    let unit = (float(width.min(height)) / 1.5).floor().clamp(256.0, 768.0);
    covers(float(width), unit).saturating_mul(covers(float(height), unit)).min(64)
}

#[allow(clippy::cast_precision_loss, reason = "sizes of pictures have 32 bits")]
fn float(length: i64) -> f64 {
    length.min(i64::from(u32::MAX)) as f64
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const GPT_4O: Pictures = Pictures::Tiles(85, 170);
    const CLAUDE: Pictures = Pictures::Patches(28, 1_568, 1_568, 100);
    const CLAUDE_HIGH: Pictures = Pictures::Patches(28, 2_576, 4_784, 100);
    const GPT_6: Pictures = Pictures::Patches(32, 2_048, 2_500, 120);

    /// The examples that providers publish, and measurements by others.
    #[rstest]
    #[case(GPT_4O, 1_024, 1_024, Detail::High, 765)]
    #[case(GPT_4O, 2_048, 4_096, Detail::High, 1_105)]
    #[case(GPT_4O, 4_096, 8_192, Detail::Low, 85)]
    #[case(GPT_4O, 512, 512, Detail::High, 255)]
    #[case(GPT_4O, 1, 1, Detail::High, 255)]
    #[case::gpt_4_1_mini(Pictures::Patches(32, 2_048, 1_536, 100), 1_024, 1_024, Detail::High, 1_024)]
    #[case(GPT_6, 1_024, 1_024, Detail::High, 1_229)]
    #[case(CLAUDE, 1_000, 1_000, Detail::High, 1_296)]
    #[case(CLAUDE, 1_568, 728, Detail::High, 1_456)]
    #[case(CLAUDE_HIGH, 8_000, 8_000, Detail::High, 4_784)]
    #[case::gemini_small(Pictures::Crops(258), 384, 384, Detail::High, 258)]
    #[case::gemini_1080p(Pictures::Crops(258), 1_920, 1_080, Detail::High, 6 * 258)]
    fn a_picture_costs_what_its_provider_says(
        #[case] rule: Pictures,
        #[case] width: i64,
        #[case] height: i64,
        #[case] detail: Detail,
        #[case] tokens: i64,
    ) {
        assert_eq!(rule.tokens(Some((width, height)), detail), tokens);
    }

    #[test]
    fn what_cannot_be_read_costs_the_most() {
        for rule in
            [GPT_4O, CLAUDE, CLAUDE_HIGH, GPT_6, Pictures::Crops(258), Pictures::Flat(1_120), Pictures::default()]
        {
            for detail in [Detail::High, Detail::Original] {
                let most = rule.tokens(None, detail);
                assert_eq!(rule.tokens(Some((0, 5)), detail), most);
                for width in [1, 100, 383, 767, 1_000, 2_047, 5_000, 20_000, i64::from(u32::MAX)] {
                    for height in [1, 64, 385, 900, 1_568, 3_000, 20_000, i64::MAX] {
                        let tokens = rule.tokens(Some((width, height)), detail);
                        assert!((1..=most).contains(&tokens), "{rule:?} {width} by {height}: {tokens} of {most}");
                    }
                }
            }
        }
    }
}
