//! A credential in the forms in which a reply could repeat it.
//!
//! Guarantees: text that holds the whole credential is known by it, as it is or as hex, base64 (either alphabet, wherever it begins),
//! UTF-16, in other capitals, cut by white space, or with any of its characters escaped as URLs, JSON and HTML do, up to three times over.
//! Looking takes the same steps for each byte whatever the credential is: one table is walked, and nothing skips ahead where
//! the text is unlike it, so that neither what is found nor how long that takes tells a part of it.
//! Non-goals: a part of the credential, and what an upstream encrypts, hashes, reverses or otherwise makes of it.

use std::borrow::Cow;

use aho_corasick::{AhoCorasick, AhoCorasickKind};
use base64::{Engine, alphabet, engine::GeneralPurpose, engine::general_purpose::NO_PAD};
use memchr::{memchr, memchr3};

/// Shortest credential. Of a shorter one every value could be tried: a reply that holds thousands of them is withheld if it holds the
/// right one, and whoever can make an upstream repeat text learns that much.
pub const SHORTEST: usize = 12;
/// Longest credential.
pub const LONGEST: usize = 8 << 10;
/// A longer credential is known by its last bytes. Those of tokens that say whose they are first are their signature.
const KNOWN_BY: usize = 128;
/// Times that escapes are taken out.
const ESCAPES: usize = 3;
/// What stands for a password that is none, by GitHub's convention.
const NO_PASSWORD: &str = "x-oauth-basic";

const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, NO_PAD);
const URL: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, NO_PAD);

/// A credential that could not be looked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnfitError {
    /// It could be found by trying.
    #[error(
        "is {found} bytes long; expected at least {SHORTEST}, since whoever can make an upstream repeat text could find a shorter one by trying"
    )]
    Short {
        /// Its length.
        found: usize,
    },
    /// It would not fit into what is held of a reply.
    #[error("is {found} bytes long; expected at most {LONGEST}")]
    Long {
        /// Its length.
        found: usize,
    },
    /// There is no table of it.
    #[error("cannot be looked for in replies: {0}")]
    Table(String),
}

/// The forms of one credential.
pub struct Forms {
    table: AhoCorasick,
    longest: usize,
}

impl Forms {
    /// The forms of a secret that is sent after this prefix.
    ///
    /// # Errors
    /// If it is too short or too long to be looked for.
    pub fn of(prefix: &str, secret: &[u8]) -> Result<Self, UnfitError> {
        let mut parts = vec![secret.to_vec()];
        if prefix.trim().eq_ignore_ascii_case("basic") {
            parts.extend(pair(secret));
        }
        let mut forms = Vec::new();
        for part in parts {
            match part.len() {
                found @ ..SHORTEST => return Err(UnfitError::Short { found }),
                found if found > LONGEST => return Err(UnfitError::Long { found }),
                _ => forms.extend(written(&part)),
            }
        }
        forms.sort();
        forms.dedup();
        let longest = forms.iter().map(Vec::len).max().unwrap_or_default();
        // Prefilters and the smaller tables are quicker where text is unlike all forms, and slower where it is like one: that would tell.
        let table = AhoCorasick::builder()
            .kind(Some(AhoCorasickKind::DFA))
            .prefilter(false)
            .ascii_case_insensitive(true)
            .build(&forms)
            .map_err(|error| UnfitError::Table(error.to_string()))?;
        Ok(Self { table, longest })
    }

    /// Length of the longest form.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Whether the text holds the credential in any form.
    pub fn are_in(&self, text: &[u8]) -> bool {
        let mut text = Cow::Borrowed(text);
        for _ in 0..ESCAPES {
            if self.stand_in(&text) {
                return true;
            }
            let Some(plain) = unescaped(&text) else { return false };
            text = Cow::Owned(plain);
        }
        self.stand_in(&text)
    }

    fn stand_in(&self, text: &[u8]) -> bool {
        self.table.is_match(text) || condensed(text).is_some_and(|text| self.table.is_match(&text))
    }
}

/// Of a user and a password in base64: both as they are, and whichever of them is the secret.
fn pair(encoded: &[u8]) -> Vec<Vec<u8>> {
    let end = encoded.iter().rposition(|byte| *byte != b'=').map_or(0, |last| last + 1);
    let Some(Ok(both)) = encoded.get(..end).map(|text| STANDARD.decode(text)) else { return Vec::new() };
    let Some(colon) = memchr(b':', &both) else { return vec![both] };
    let (user, password) = (both.get(..colon).unwrap_or_default(), both.get(colon + 1..).unwrap_or_default());
    let secret = if password.is_empty() || password == NO_PASSWORD.as_bytes() { user } else { password };
    vec![secret.to_vec(), both.clone()]
}

/// The forms of one secret that are not escapes.
fn written(secret: &[u8]) -> Vec<Vec<u8>> {
    let known = secret.get(secret.len().saturating_sub(KNOWN_BY)..).unwrap_or(secret);
    let mut forms = vec![known.to_vec(), hex::encode(known).into_bytes()];
    // What looks like an escape in it is taken out of the text as well.
    forms.extend([condensed(known), unescaped(known)].into_iter().flatten().filter(|form| form.len() >= SHORTEST));
    for engine in [&STANDARD, &URL] {
        for before in 0..3 {
            forms.push(encoded(engine, before, known));
        }
    }
    forms
}

/// The characters that base64 has for these bytes alone, where so many others are before them in their group of three.
fn encoded(engine: &GeneralPurpose, before: usize, bytes: &[u8]) -> Vec<u8> {
    let all = engine.encode([&vec![0; before], bytes].concat()).into_bytes();
    // A character has six bits. Those that have some of what is before or after do not count.
    let first = (before * 8).div_ceil(6);
    let last = (before + bytes.len()) * 8 / 6;
    all.get(first..last).unwrap_or_default().to_vec()
}

/// The text without white space and zeros, if it has any: lines of base64, and UTF-16.
fn condensed(text: &[u8]) -> Option<Vec<u8>> {
    let goes = |byte: &u8| byte.is_ascii_whitespace() || *byte == 0;
    text.iter().any(goes).then(|| text.iter().copied().filter(|byte| !goes(byte)).collect())
}

/// The text without one layer of escapes, if it has any.
fn unescaped(text: &[u8]) -> Option<Vec<u8>> {
    let mut plain = Vec::new();
    let (mut rest, mut changed) = (text, false);
    while let Some(place) = memchr3(b'%', b'\\', b'&', rest) {
        let (before, from) = rest.split_at_checked(place)?;
        plain.extend_from_slice(before);
        let (lead, after) = from.split_first()?;
        let escape = match lead {
            b'%' => percent(after),
            b'\\' => backslash(after),
            _ => entity(after),
        };
        match escape {
            Some((Is::Byte(byte), after)) => {
                plain.push(byte);
                (rest, changed) = (after, true);
            }
            Some((Is::Code(code), after)) => {
                // Half a pair is nothing that a header could hold.
                let letter = char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER);
                plain.extend_from_slice(letter.encode_utf8(&mut [0; 4]).as_bytes());
                (rest, changed) = (after, true);
            }
            None => {
                plain.push(*lead);
                rest = after;
            }
        }
    }
    plain.extend_from_slice(rest);
    changed.then_some(plain)
}

/// What an escape stands for.
enum Is {
    Byte(u8),
    Code(u32),
}

/// So many digits, and what follows.
fn digits(text: &[u8], many: usize, radix: u32) -> Option<(u32, &[u8])> {
    let (number, after) = text.split_at_checked(many)?;
    let number = number.iter().try_fold(0, |number: u32, digit| {
        Some(number.saturating_mul(radix).saturating_add(char::from(*digit).to_digit(radix)?))
    });
    Some((number.filter(|_| many > 0)?, after))
}

/// As many digits as there are, up to those of a long number with zeros before it.
fn number(text: &[u8], radix: u32) -> Option<(u32, &[u8])> {
    let many = text.iter().take(16).take_while(|digit| char::from(**digit).is_digit(radix)).count();
    digits(text, many, radix)
}

fn percent(after: &[u8]) -> Option<(Is, &[u8])> {
    if let Some(wide) = after.strip_prefix(b"u") {
        return digits(wide, 4, 16).map(|(code, after)| (Is::Code(code), after));
    }
    byte(digits(after, 2, 16))
}

fn byte(found: Option<(u32, &[u8])>) -> Option<(Is, &[u8])> {
    found.and_then(|(code, after)| Some((Is::Byte(u8::try_from(code).ok()?), after)))
}

fn backslash(after: &[u8]) -> Option<(Is, &[u8])> {
    let (kind, after) = after.split_first()?;
    let code = |found: Option<(u32, _)>| found.map(|(code, after)| (Is::Code(code), after));
    match kind {
        b'u' => match after.strip_prefix(b"{") {
            Some(inside) => number(inside, 16).and_then(|(c, after)| Some((Is::Code(c), after.strip_prefix(b"}")?))),
            None => code(digits(after, 4, 16)),
        },
        b'x' => byte(digits(after, 2, 16)),
        b'"' | b'\'' | b'\\' | b'/' => Some((Is::Byte(*kind), after)),
        b'n' | b'r' | b't' | b'f' | b'b' => Some((Is::Byte(b' '), after)),
        _ => None,
    }
}

fn entity(after: &[u8]) -> Option<(Is, &[u8])> {
    const NAMED: [(&[u8], u8); 15] = [
        (b"amp;", b'&'),
        (b"lt;", b'<'),
        (b"gt;", b'>'),
        (b"quot;", b'"'),
        (b"apos;", b'\''),
        (b"plus;", b'+'),
        (b"sol;", b'/'),
        (b"bsol;", b'\\'),
        (b"equals;", b'='),
        (b"lowbar;", b'_'),
        (b"hyphen;", b'-'),
        (b"period;", b'.'),
        (b"colon;", b':'),
        (b"dollar;", b'$'),
        (b"percnt;", b'%'),
    ];
    let Some(numeric) = after.strip_prefix(b"#") else {
        return NAMED.iter().find_map(|(name, byte)| Some((Is::Byte(*byte), after.strip_prefix(*name)?)));
    };
    let hexadecimal = numeric.strip_prefix(b"x").or_else(|| numeric.strip_prefix(b"X"));
    let (code, after) = match hexadecimal {
        Some(digits) => number(digits, 16)?,
        None => number(numeric, 10)?,
    };
    // Browsers do without the semicolon.
    Some((Is::Code(code), after.strip_prefix(b";").unwrap_or(after)))
}

#[cfg(test)]
mod tests;
