//! The encodings of a credential in which a reply could repeat it.
//!
//! Guarantees: text that contains the whole credential is recognized, as it is or as hex, base64 (either alphabet, at any offset) or
//! UTF-16, with other capitalization, split by white space, or with any of its characters escaped as in URLs, JSON and HTML, up to three
//! times over. The search takes the same steps for each byte whatever the credential is: it walks one table and never skips ahead where the
//! text is unlike the credential. So neither the result nor the time of a search reveals a part of the credential.
//!
//! Non-goals: recognizing a part of the credential, or what an upstream encrypts, hashes, reverses or otherwise makes of it.

use std::borrow::Cow;

use aho_corasick::{
    Anchored,
    automaton::{Automaton, StateID},
    dfa::DFA,
};
use base64::{Engine, alphabet, engine::GeneralPurpose, engine::general_purpose::NO_PAD};
use memchr::{memchr, memchr3};

/// Minimum length of a credential, in bytes. A shorter one could be guessed, because a reply with thousands of guesses is withheld if one
/// of them is right, and an attacker who can make an upstream repeat text learns that.
pub const SHORTEST: usize = 12;
/// Maximum length of a credential, in bytes.
pub const LONGEST: usize = 8 << 10;
/// Number of last bytes by which a longer credential is recognized. In tokens that begin with claims about their owner these are the
/// signature.
const KNOWN_BY: usize = 128;
/// Number of layers of escapes that are removed.
const ESCAPES: usize = 3;
/// The placeholder for a missing password, by GitHub's convention.
const NO_PASSWORD: &str = "x-oauth-basic";

const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, NO_PAD);
const URL: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, NO_PAD);

/// Why a credential cannot be searched for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnfitError {
    /// It is so short that it could be guessed.
    #[error(
        "is {found} bytes long; expected at least {SHORTEST}, because an attacker who can make an upstream repeat text could guess a shorter one"
    )]
    Short {
        /// Its length.
        found: usize,
    },
    /// It does not fit into the part of a reply that is held back.
    #[error("is {found} bytes long; expected at most {LONGEST}")]
    Long {
        /// Its length.
        found: usize,
    },
    /// Its table cannot be built.
    #[error("cannot be searched for in replies: {0}")]
    Table(String),
}

/// The encodings of one credential, as a search table.
pub struct Forms {
    table: DFA,
    start: Place,
    longest: usize,
}

/// Where a search stands in the table: for the text as it is, and for the text without white space and zero bytes.
#[derive(Clone, Copy)]
struct Place {
    written: StateID,
    condensed: StateID,
}

/// A text that arrives in pieces, and how far it has been searched.
#[derive(Default)]
pub struct Arriving {
    /// The end of the text, with room for the longest encoding with each of its letters escaped once.
    end: Vec<u8>,
    /// Where the search stands after all of the text, unless the text has to be searched without its escapes as well.
    place: Option<Place>,
}

impl Forms {
    /// Builds the table for a secret that is sent after this prefix.
    ///
    /// # Errors
    /// Returns an error if the secret is too short or too long to be searched for.
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
        // Prefilters and smaller tables are faster on text that is unlike the secret and slower on text that is like it, which would reveal
        // it.
        let table = |error: &dyn std::fmt::Display| UnfitError::Table(error.to_string());
        let built = DFA::builder().prefilter(false).ascii_case_insensitive(true).build(&forms);
        let built = built.map_err(|error| table(&error))?;
        let start = built.start_state(Anchored::No).map_err(|error| table(&error))?;
        Ok(Self { table: built, start: Place { written: start, condensed: start }, longest })
    }

    /// Returns whether the text contains the credential in any encoding.
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

    /// Adds the next piece to a text. Returns whether the text now contains the credential in any encoding.
    ///
    /// A piece without escapes is searched from where the search stands, so it takes the same time however much text came before.
    pub fn arrive_in(&self, text: &mut Arriving, piece: &[u8]) -> bool {
        text.end.extend_from_slice(piece);
        let place = text.place.filter(|_| is_plain(piece));
        let found =
            match place.map(|place| (place, piece)).or_else(|| is_plain(&text.end).then_some((self.start, &*text.end)))
            {
                Some((from, new)) => {
                    let (place, found) = self.walk(from, new);
                    text.place = Some(place);
                    found
                }
                None => {
                    text.place = None;
                    self.are_in(&text.end)
                }
            };
        let kept = self.longest.saturating_mul(4);
        text.end.drain(..text.end.len().saturating_sub(kept));
        found
    }

    fn stand_in(&self, text: &[u8]) -> bool {
        self.walk(self.start, text).1
    }

    /// Searches on from this place. Returns the next place, and whether an encoding ended on the way.
    fn walk(&self, mut place: Place, text: &[u8]) -> (Place, bool) {
        let mut found = false;
        let mut step = |state: &mut StateID, byte: u8| {
            *state = self.table.next_state(Anchored::No, *state, byte);
            found |= self.table.is_match(*state);
        };
        for byte in text {
            step(&mut place.written, *byte);
            if !is_space(byte) {
                step(&mut place.condensed, *byte);
            }
        }
        (place, found)
    }
}

/// Decodes the user and the password of basic authentication from base64. Returns the pair and the one of the two that is the secret.
fn pair(encoded: &[u8]) -> Vec<Vec<u8>> {
    let end = encoded.iter().rposition(|byte| *byte != b'=').map_or(0, |last| last + 1);
    let Some(Ok(both)) = encoded.get(..end).map(|text| STANDARD.decode(text)) else { return Vec::new() };
    let Some(colon) = memchr(b':', &both) else { return vec![both] };
    let (user, password) = (both.get(..colon).unwrap_or_default(), both.get(colon + 1..).unwrap_or_default());
    let secret = if password.is_empty() || password == NO_PASSWORD.as_bytes() { user } else { password };
    vec![secret.to_vec(), both.clone()]
}

/// Returns the encodings of one secret, without escapes.
fn written(secret: &[u8]) -> Vec<Vec<u8>> {
    let known = secret.get(secret.len().saturating_sub(KNOWN_BY)..).unwrap_or(secret);
    let mut forms = vec![known.to_vec(), hex::encode(known).into_bytes()];
    // The search also removes from the text what looks like an escape inside the secret.
    forms.extend([condensed(known), unescaped(known)].into_iter().flatten().filter(|form| form.len() >= SHORTEST));
    for engine in [&STANDARD, &URL] {
        for before in 0..3 {
            forms.push(encoded(engine, before, known));
        }
    }
    forms
}

/// Returns the base64 characters that depend on these bytes alone, if `before` other bytes precede them in their group of three.
fn encoded(engine: &GeneralPurpose, before: usize, bytes: &[u8]) -> Vec<u8> {
    let all = engine.encode([&vec![0; before], bytes].concat()).into_bytes();
    // A character has six bits. Drop characters that share bits with the bytes before or after.
    let first = (before * 8).div_ceil(6);
    let last = (before + bytes.len()) * 8 / 6;
    all.get(first..last).unwrap_or_default().to_vec()
}

/// Returns whether a search in the condensed text skips this byte: white space and zero bytes, for wrapped base64 and UTF-16.
fn is_space(byte: &u8) -> bool {
    byte.is_ascii_whitespace() || *byte == 0
}

/// Returns the text without white space and zero bytes if it has any.
fn condensed(text: &[u8]) -> Option<Vec<u8>> {
    text.iter().any(is_space).then(|| text.iter().copied().filter(|byte| !is_space(byte)).collect())
}

/// Returns whether no escape can begin in the text.
fn is_plain(text: &[u8]) -> bool {
    memchr3(b'%', b'\\', b'&', text).is_none()
}

/// Returns the text without one layer of escapes, if it has any.
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
                // No header value can contain half a surrogate pair.
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

/// The decoded value of an escape.
enum Is {
    Byte(u8),
    Code(u32),
}

/// Parses exactly `many` digits. Returns their value and the rest of the text.
fn digits(text: &[u8], many: usize, radix: u32) -> Option<(u32, &[u8])> {
    let (number, after) = text.split_at_checked(many)?;
    let number = number.iter().try_fold(0, |number: u32, digit| {
        Some(number.saturating_mul(radix).saturating_add(char::from(*digit).to_digit(radix)?))
    });
    Some((number.filter(|_| many > 0)?, after))
}

/// Parses as many digits as there are, at most 16, so that leading zeros are allowed.
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
    // Browsers do not require the semicolon.
    Some((Is::Code(code), after.strip_prefix(b";").unwrap_or(after)))
}

#[cfg(test)]
mod tests;
