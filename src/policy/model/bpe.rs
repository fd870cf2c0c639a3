//! OpenAI's o200k tokenizer: how many tokens a text is.
//!
//! Guarantees: as many as that tokenizer makes of any text whose runs without a break are shorter than [`LONGEST_RUN`]; never more than one a
//! byte; time in proportion to the text, whoever wrote it. Non-goals: which tokens they are, and those of other models.
//!
//! Our own, as what there is takes 25 to 70 MB of memory where a harness has 128 MiB in all. The vocabulary lies in the program as it is
//! (1.6 MB); what finds a token in it is made once, and has 10 MB.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    sync::LazyLock,
};

use regex::Regex;

/// Each token by its rank: its length in one byte, and its bytes. Made of OpenAI's published `o200k_base.tiktoken`, whose SHA-256 is
/// 446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d.
static VOCABULARY: &[u8] = include_bytes!("o200k.bin");

/// Where a text breaks, as OpenAI publishes it, but for the end of a run of spaces: see [`O200k::pieces`].
const BREAKS: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"|\s*[\r\n]+",
    r"|\s+",
);

/// A run without a break is counted in parts of so many bytes: a token more for each, at most, and memory stays small.
const LONGEST_RUN: usize = 16 << 10;

static O200K: LazyLock<Option<O200k>> = LazyLock::new(O200k::read);

/// Tokens of a text. A token a byte if there is no vocabulary, which a test rules out.
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

    /// The pieces of a text. A run of spaces leaves its last one to what follows.
    fn pieces<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let rest = text.get(from..).filter(|rest| !rest.is_empty())?;
            // Each character is in one of the classes; if one were not, it would be counted alone.
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

/// Merges the tokens of a piece, the pair of the lowest rank first, and of equal ones the first: as the vocabulary was made.
#[derive(Default)]
struct Merging {
    /// Of the token that begins at each byte: where the one before it begins, and where it ends. What begins inside a token is not looked at.
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

    /// Where the second of two tokens begins that are, together, these bytes, if there still are such.
    fn is_still(&self, start: usize, end: usize) -> Option<usize> {
        let middle = self.ends.get(start).copied().filter(|middle| *middle > start && *middle < end)?;
        (self.ends.get(middle) == Some(&end)).then_some(middle)
    }

    fn merge(&mut self, start: usize, middle: usize, end: usize) {
        if let Some(ends) = self.ends.get_mut(start) {
            *ends = end;
        }
        // Nothing begins there any more.
        if let Some(ends) = self.ends.get_mut(middle) {
            *ends = 0;
        }
        if let Some(before) = self.before.get_mut(end) {
            *before = start;
        }
    }

    /// Notes the pair that begins here, if it is a token.
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
        // As it is published: a token in base64, and its rank.
        let mut tokens: Vec<_> = o200k.ranks.iter().map(|(token, rank)| (*rank, *token)).collect();
        tokens.sort_unstable();
        let published: String =
            tokens.iter().map(|(rank, token)| format!("{} {rank}\n", data_encoding::BASE64.encode(token))).collect();
        let digest = hex::encode(Sha256::digest(published.as_bytes()));
        assert_eq!(digest, "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d");
    }

    /// Texts, and how many tokens OpenAI's own `tiktoken` makes of them.
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
        /// A byte is a token at most, and the pieces are the text.
        #[test]
        fn no_text_has_more_tokens_than_bytes(text in "(\\PC|[ \r\n\t]|[a-zA-Z']){0,300}") {
            let o200k = O200K.as_ref().unwrap();
            prop_assert_eq!(o200k.pieces(&text).collect::<String>(), text.as_str());
            let counted = count(&text);
            prop_assert!(counted <= text.len() && (counted > 0 || text.is_empty()), "{}", counted);
        }
    }
}
