//! Secrets, and ways to write them. They must not be in anything that Belay stores or prints.

use std::{collections::BTreeSet, io::Write};

use data_encoding::{BASE32, BASE32HEX, BASE64, BASE64_NOPAD, BASE64URL, BASE64URL_NOPAD, HEXLOWER, HEXUPPER};
use flate2::{
    Compression,
    write::{DeflateEncoder, GzEncoder, ZlibEncoder},
};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

/// Returns secrets and personal data. None of them looks like a word, because nothing distinguishes such a secret from a word.
pub fn secrets() -> Vec<String> {
    let key = |n: u8, alphabet: &[u8], length: usize| -> String {
        let bytes = hex::decode(belay::policy::commit::Salt::new([n; 32]).bytes(b"canary")).unwrap();
        let digits = bytes.iter().cycle().enumerate().map(|(at, byte)| usize::from(*byte) + at * 7);
        digits.take(length).map(|digit| char::from(alphabet[digit % alphabet.len()])).collect()
    };
    const UPPER: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    const MIXED: &[u8] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    const HEX: &[u8] = b"0123456789abcdef";
    const DIGITS: &[u8] = b"0123456789";
    let mut secrets = Vec::new();
    for n in 0..5 {
        let mixed = |length| key(n, MIXED, length);
        secrets.extend([
            format!("AKIA{}", key(n, UPPER, 16)),
            mixed(40),
            format!("ghp_{}", mixed(36)),
            format!("sk-ant-api03-{}", mixed(48)),
            format!("xoxb-{}-{}-{}", key(n, DIGITS, 12), key(n + 50, DIGITS, 12), mixed(24)),
            format!("eyJhbGciOiJIUzI1NiJ9.{}.{}", mixed(60), mixed(43)),
            key(n, HEX, 64),
            format!(
                "{}-{}-4{}-a{}-{}",
                key(n, HEX, 8),
                key(n + 9, HEX, 4),
                key(n, HEX, 3),
                key(n, HEX, 3),
                key(n, HEX, 12)
            ),
            format!("postgres://app:{}@db.internal/orders", mixed(18)),
            format!("DE89{}", key(n, DIGITS, 18)),
            format!(
                "4{} {} {} {}",
                key(n, DIGITS, 3),
                key(n + 1, DIGITS, 4),
                key(n + 2, DIGITS, 4),
                key(n + 3, DIGITS, 4)
            ),
            format!("{}@{}.test", key(n, b"abcdefghij01234567", 14), key(n, b"klmnopqrst01234567", 14)),
        ]);
    }
    secrets
}

fn compressed<W: Write>(text: &str, mut with: W, finish: impl FnOnce(W) -> Vec<u8>) -> Vec<u8> {
    with.write_all(text.as_bytes()).unwrap();
    finish(with)
}

fn each(text: &str, write: impl Fn(u8) -> String) -> String {
    text.bytes().map(write).collect()
}

/// Returns a secret in 40 encodings.
pub fn written(secret: &str) -> Vec<String> {
    let bytes = secret.as_bytes();
    let gzip = compressed(secret, GzEncoder::new(vec![], Compression::best()), |with| with.finish().unwrap());
    let zlib = compressed(secret, ZlibEncoder::new(vec![], Compression::best()), |with| with.finish().unwrap());
    let deflate = compressed(secret, DeflateEncoder::new(vec![], Compression::best()), |with| with.finish().unwrap());
    let url = utf8_percent_encode(secret, NON_ALPHANUMERIC).to_string();
    let every = each(secret, |b| format!("%{b:02x}"));
    let utf16: Vec<u8> = secret.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let rotated = |n: u8| {
        let rotate = |c: char, first: u8| char::from(first + (u8::try_from(c).unwrap() - first + n) % 26);
        let turn = |c: char| match c {
            'a'..='z' => rotate(c, b'a'),
            'A'..='Z' => rotate(c, b'A'),
            c => c,
        };
        secret.chars().map(turn).collect::<String>()
    };
    let json = serde_json::to_string(secret).unwrap();
    let ways = vec![
        secret.to_owned(),
        secret.to_uppercase(),
        secret.to_lowercase(),
        secret.chars().rev().collect(),
        rotated(13),
        rotated(5),
        each(secret, |b| char::from(b ^ 0x01).to_string()),
        HEXLOWER.encode(bytes),
        HEXUPPER.encode(bytes),
        format!("0x{}", HEXLOWER.encode(bytes)),
        each(secret, |b| format!("\\x{b:02x}")),
        each(secret, |b| format!("{b:02x}:")),
        each(secret, |b| format!("{b:02x} ")),
        each(secret, |b| format!("\\{b:03o}")),
        each(secret, |b| format!("{b:08b}")),
        format!("{bytes:?}"),
        BASE64.encode(bytes),
        BASE64_NOPAD.encode(bytes),
        BASE64URL.encode(bytes),
        BASE64URL_NOPAD.encode(bytes),
        BASE64.encode(BASE64.encode(bytes).as_bytes()),
        BASE64.encode(HEXLOWER.encode(bytes).as_bytes()),
        BASE32.encode(bytes),
        BASE32HEX.encode(bytes),
        url.clone(),
        every.clone(),
        utf8_percent_encode(&every, NON_ALPHANUMERIC).to_string(),
        each(secret, |b| format!("&#{b};")),
        each(secret, |b| format!("&#x{b:x};")),
        each(secret, |b| format!("\\u{b:04x}")),
        each(secret, |b| format!("={b:02X}")),
        HEXLOWER.encode(&utf16),
        BASE64.encode(&utf16),
        BASE64.encode(&gzip),
        HEXLOWER.encode(&gzip),
        BASE64.encode(&zlib),
        BASE64URL_NOPAD.encode(&deflate),
        each(secret, |b| format!("{}\u{200b}", char::from(b))),
        json.clone(),
        serde_json::to_string(&json).unwrap(),
    ];
    assert_eq!(ways.len(), 40);
    ways
}

/// Returns the texts that must not be found anywhere: the encoded secret, its halves, and the longest run of letters and digits of each,
/// because the text around a secret can escape or drop other characters.
pub fn marks(written: &str) -> BTreeSet<String> {
    let (first, second) = halves(written);
    let mut marks: BTreeSet<String> = [written, first, second].map(str::to_owned).into();
    let longest =
        |text: &str| text.split(|c: char| !c.is_ascii_alphanumeric()).max_by_key(|run| run.len()).map(str::to_owned);
    marks.extend([written, first, second].into_iter().filter_map(longest));
    // A shorter text reveals little, and occurs in many other texts.
    marks.retain(|mark| mark.len() >= 12);
    marks
}

/// Returns the first and the second half of a text.
pub fn halves(text: &str) -> (&str, &str) {
    text.split_at(text.floor_char_boundary(text.len() / 2))
}

/// Returns the first of these marks that a text contains, and the text around it.
pub fn found(text: &str, marks: &BTreeSet<String>) -> Option<(String, String)> {
    let (mark, at) = marks.iter().find_map(|mark| Some((mark, text.find(mark.as_str())?)))?;
    let around = text.floor_char_boundary(at.saturating_sub(300))..text.ceil_char_boundary((at + 200).min(text.len()));
    Some((mark.clone(), text[around].to_owned()))
}
