//! OpenAI's o200k tokenizer: counts the tokens of a text.
//!
//! Guarantees: the count equals that tokenizer's for any text whose runs without a break are shorter than [`LONGEST_RUN`]. The count is
//! never above one token per byte. The time is proportional to the length of the text, whatever the text is.
//! Non-goals: which tokens they are, and tokenizers of other models.
//!
//! This is an own implementation, because the existing ones take 25 to 70 MB of memory, and a harness has 128 MiB in total. The binary
//! contains the vocabulary (1.6 MB). The index over the vocabulary is built once and takes 10 MB.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    sync::LazyLock,
};

use regex::Regex;

/// All tokens in the order of their ranks: the length in one byte, then the bytes. Generated from OpenAI's published `o200k_base.tiktoken`,
/// whose SHA-256 is 446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d.
static VOCABULARY: &[u8] = include_bytes!("o200k.bin");

/// The pattern that splits a text, as OpenAI publishes it, except for the end of a run of spaces: see [`O200k::pieces`].
const BREAKS: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"|\s*[\r\n]+",
    r"|\s+",
);

/// A run without a break is counted in parts of this many bytes. Each part adds at most one token, and memory stays small.
const LONGEST_RUN: usize = 16 << 10;

static O200K: LazyLock<Option<O200k>> = LazyLock::new(O200k::read);

/// Returns the number of tokens of a text. Without a vocabulary it is one token per byte, but a test ensures that there is one.
pub fn count(text: &str) -> usize {
    O200K.as_ref().map_or(text.len(), |o200k| o200k.count(text))
}

struct O200k {
    ranks: HashMap<&'static [u8], u32>,
    breaks: Regex,
}

impl O200k {
    fn read() -> Option<Self> {
        let mut ranks = HashMap::with_capacity(200_000);
        let mut rest = VOCABULARY;
        while let Some((length, behind)) = rest.split_first() {
            let (token, behind) = behind.split_at_checked(usize::from(*length))?;
            ranks.insert(token, u32::try_from(ranks.len()).ok()?);
            rest = behind;
        }
        Some(Self { ranks, breaks: Regex::new(BREAKS).ok()? })
    }

    fn count(&self, text: &str) -> usize {
        let mut merging = Merging::default();
        self.pieces(text)
            .flat_map(|piece| piece.as_bytes().chunks(LONGEST_RUN))
            .map(|run| merging.count(self, run))
            .sum()
    }

    /// Returns the pieces of a text. The last space of a run of spaces belongs to the next piece.
    fn pieces<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let rest = text.get(from..).filter(|rest| !rest.is_empty())?;
            // Each character is in one of the classes. A character that is in none would be counted alone.
            let end = self.breaks.find(rest).filter(|found| found.start() == 0).map_or_else(
                || rest.chars().next().map_or(1, char::len_utf8),
                |found| leaving_the_last(found.as_str(), found.end() == rest.len()),
            );
            from = from.saturating_add(end);
            rest.get(..end)
        })
    }
}

fn leaving_the_last(piece: &str, at_the_end: bool) -> usize {
    let whole = piece.len();
    match piece.chars().next_back() {
        Some(last)
            if !at_the_end && last.is_whitespace() && !matches!(last, '\r' | '\n') && whole > last.len_utf8() =>
        {
            whole.saturating_sub(last.len_utf8())
        }
        _ => whole,
    }
}

/// Merges the tokens of a piece: always the pair with the lowest rank, and the first of equal pairs. The vocabulary was built in this
/// order.
#[derive(Default)]
struct Merging {
    /// For the token that starts at each byte: the start of the token before it, and its own end. Entries for bytes inside a token are not
    /// read.
    before: Vec<usize>,
    ends: Vec<usize>,
    pairs: BinaryHeap<Reverse<(u32, usize, usize)>>,
}

impl Merging {
    fn count(&mut self, o200k: &O200k, piece: &[u8]) -> usize {
        let length = piece.len();
        if length < 2 || o200k.ranks.contains_key(piece) {
            return 1;
        }
        self.before.clear();
        self.before.extend((0..length).map(|start| start.saturating_sub(1)));
        self.ends.clear();
        self.ends.extend(1..=length);
        self.pairs.clear();
        for start in 0..length.saturating_sub(1) {
            self.pair(o200k, piece, start);
        }
        let mut tokens = length;
        while let Some(Reverse((_, start, end))) = self.pairs.pop() {
            if let Some(middle) = self.is_still(start, end) {
                tokens = tokens.saturating_sub(1);
                self.merge(start, middle, end);
                self.pair(o200k, piece, start);
                if let Some(before) = self.before.get(start).copied().filter(|_| start > 0) {
                    self.pair(o200k, piece, before);
                }
            }
        }
        tokens
    }

    /// Returns the start of the second of two adjacent tokens that together have these bytes, if there still are such tokens.
    fn is_still(&self, start: usize, end: usize) -> Option<usize> {
        let middle = self.ends.get(start).copied().filter(|middle| *middle > start && *middle < end)?;
        (self.ends.get(middle) == Some(&end)).then_some(middle)
    }

    fn merge(&mut self, start: usize, middle: usize, end: usize) {
        if let Some(ends) = self.ends.get_mut(start) {
            *ends = end;
        }
        // No token starts there anymore.
        if let Some(ends) = self.ends.get_mut(middle) {
            *ends = 0;
        }
        if let Some(before) = self.before.get_mut(end) {
            *before = start;
        }
    }

    /// Adds the pair that starts here to the queue, if it is a token.
    fn pair(&mut self, o200k: &O200k, piece: &[u8], start: usize) {
        let end = self.ends.get(start).and_then(|middle| self.ends.get(*middle)).copied();
        let rank = end.and_then(|end| o200k.ranks.get(piece.get(start..end)?).map(|rank| (*rank, end)));
        self.pairs.extend(rank.map(|(rank, end)| Reverse((rank, start, end))));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn the_vocabulary_is_the_published_one() {
        let o200k = O200k::read().unwrap();
        assert_eq!(o200k.ranks.len(), 199_998);
        // The published form is a token in base64 and its rank.
        let mut tokens: Vec<_> = o200k.ranks.iter().map(|(token, rank)| (*rank, *token)).collect();
        tokens.sort_unstable();
        let published: String =
            tokens.iter().map(|(rank, token)| format!("{} {rank}\n", data_encoding::BASE64.encode(token))).collect();
        let digest = hex::encode(Sha256::digest(published.as_bytes()));
        assert_eq!(digest, "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d");
    }

    /// Texts with the token counts of OpenAI's own `tiktoken`.
    #[test]
    fn as_many_as_others_count() {
        let cases: Vec<(String, usize)> = serde_json::from_str(include_str!("bpe/counted.json")).unwrap();
        assert!(cases.len() > 300, "{}", cases.len());
        for (text, tokens) in cases {
            assert_eq!(count(&text), tokens, "{text:?}");
        }
    }

    #[test]
    fn a_long_run_is_counted_in_parts() {
        for (text, exact) in
            [("a".repeat(1 << 20), 131_072), (" ".repeat(1 << 20), 8_192), ("ab".repeat(1 << 19), 262_144)]
        {
            let parts = text.len() / LONGEST_RUN;
            let counted = count(&text);
            assert!((exact..=exact + parts).contains(&counted), "{counted} of {exact}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// A text has at most one token per byte, and the pieces add up to the text.
        #[test]
        fn no_text_has_more_tokens_than_bytes(text in "(\\PC|[ \r\n\t]|[a-zA-Z']){0,300}") {
            let o200k = O200K.as_ref().unwrap();
            prop_assert_eq!(o200k.pieces(&text).collect::<String>(), text.as_str());
            let counted = count(&text);
            prop_assert!(counted <= text.len() && (counted > 0 || text.is_empty()), "{}", counted);
        }
    }
}
