use std::{hint::black_box, time::Instant};

use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE};
use proptest::prelude::*;

use super::*;

const SECRET: &str = "sk-live-9fQ2/xZ7b+rT5mK";

fn forms() -> Forms {
    Forms::of("Bearer ", SECRET.as_bytes()).unwrap()
}

fn each(write: impl Fn(char) -> String) -> String {
    SECRET.chars().map(write).collect()
}

/// The secret as replies could repeat it, in each encoding.
fn repeated() -> Vec<(&'static str, Vec<u8>)> {
    let utf16 = |big: bool| {
        let unit = move |unit: u16| if big { unit.to_be_bytes() } else { unit.to_le_bytes() };
        SECRET.encode_utf16().flat_map(unit).collect::<Vec<u8>>()
    };
    let percent = |c: char| format!("%{:02x}", u32::from(c));
    let wrapped = BASE64_STANDARD.encode(format!("Authorization: Bearer {SECRET}, and so on and so forth"));
    let lines: Vec<&[u8]> = wrapped.as_bytes().chunks(16).collect();
    let text = |text: String| text.into_bytes();
    vec![
        ("as it is", SECRET.into()),
        ("in capitals", text(SECRET.to_uppercase())),
        ("in small letters", text(SECRET.to_lowercase())),
        ("base64", text(BASE64_STANDARD.encode(SECRET))),
        ("base64 with one byte before", text(BASE64_STANDARD.encode(format!(":{SECRET}")))),
        ("base64 with two before and some after", text(BASE64_STANDARD.encode(format!("a:{SECRET}\n--")))),
        ("base64 of the header", text(BASE64_STANDARD.encode(format!("Bearer {SECRET}")))),
        ("base64 of a user and it", text(BASE64_STANDARD.encode(format!("user:{SECRET}")))),
        ("base64 for URLs", text(BASE64_URL_SAFE.encode(format!("x{SECRET}")))),
        ("base64 in lines", lines.join(&b"\r\n"[..])),
        ("base64 in lines, in JSON", lines.join(&br"\n"[..])),
        (
            "base64 in a URL",
            text(BASE64_STANDARD.encode(format!("ab{SECRET}")).replace('+', "%2B").replace('/', "%2f")),
        ),
        ("hex", text(hex::encode(SECRET))),
        ("hex in capitals", text(hex::encode_upper(SECRET))),
        ("hex with spaces", text(each(|c| format!("{:02x} ", u32::from(c))))),
        ("a URL's escapes", text(each(percent))),
        ("a URL's escapes in capitals", text(each(|c| format!("%{:02X}", u32::from(c))))),
        ("some of a URL's escapes", text(SECRET.replace('/', "%2F").replace('+', "%2b").replace('9', "%39"))),
        ("a URL's escapes twice", text(each(percent).replace('%', "%25"))),
        ("wide escapes of a URL", text(each(|c| format!("%u{:04x}", u32::from(c))))),
        ("JSON's escapes", text(each(|c| format!("\\u{:04x}", u32::from(c))))),
        ("some of JSON's escapes", text(SECRET.replace('/', "\\/").replace('k', "\\u006B"))),
        ("JSON in JSON", text(each(|c| format!("\\\\u{:04X}", u32::from(c))))),
        ("JSON in JSON in JSON", text(SECRET.replace('/', r"\\\\\/"))),
        ("JavaScript's escapes", text(each(|c| format!("\\u{{{:x}}}", u32::from(c))))),
        ("a program's escapes", text(each(|c| format!("\\x{:02x}", u32::from(c))))),
        ("HTML's numbers", text(each(|c| format!("&#{};", u32::from(c))))),
        ("HTML's numbers in hex", text(each(|c| format!("&#x{:06X};", u32::from(c))))),
        (
            "HTML's numbers without an end",
            text(each(|c| format!("&#{}", u32::from(c)).replace("&#43", "&plus;")) + " "),
        ),
        ("HTML's names", text(SECRET.replace('/', "&sol;").replace('+', "&plus;"))),
        ("HTML in JSON in a URL", text(each(|c| format!("%5cu0026%2523{};", u32::from(c))))),
        ("UTF-16", utf16(false)),
        ("UTF-16, the other way round", utf16(true)),
        ("UTF-16 in JSON", text(each(|c| format!("{c}\\u0000")))),
        ("cut by lines", text(SECRET.replace('f', "f\r\n "))),
    ]
}

#[test]
fn a_credential_is_known_in_every_form() {
    let forms = forms();
    for (form, text) in repeated() {
        assert!(forms.are_in(&text), "{form}");
        let within = [&b"{\"error\": \"bad key "[..], &text, b"\", \"more\": \"words\"}"].concat();
        // In UTF-16 the byte before a letter would be its other half.
        assert!(form.starts_with("UTF-16") || forms.are_in(&within), "{form}, in a text");
    }
}

/// The control: text without the whole credential is not recognized.
#[test]
fn all_but_the_whole_is_not_it() {
    let forms = forms();
    for text in
        [&SECRET[1..], &SECRET[..SECRET.len() - 1], "", "sk-live-", "9fQ2/xZ7b+rT5mKsk-live-", "%", "\\", "&#", "\\u00"]
    {
        assert!(!forms.are_in(text.as_bytes()), "{text}");
        assert!(!forms.are_in(each(|c| format!("%{:02x}", u32::from(c))).replace("%39", "%38").as_bytes()));
    }
    let other = SECRET.replace('Q', "R");
    for text in [BASE64_STANDARD.encode(&other), hex::encode(&other), other] {
        assert!(!forms.are_in(text.as_bytes()), "{text}");
    }
}

#[test]
fn of_a_user_and_a_password_each_form_is_known() {
    let password = "correct-horse-battery";
    let encoded = BASE64_STANDARD.encode(format!("deploy:{password}"));
    let forms = Forms::of("Basic ", encoded.as_bytes()).unwrap();
    for text in [encoded.clone(), format!("deploy:{password}"), password.to_owned(), BASE64_STANDARD.encode(password)] {
        assert!(forms.are_in(text.as_bytes()), "{text}");
    }
    assert!(!forms.are_in(b"deploy"), "a user's name is no secret");
    let token = BASE64_STANDARD.encode(format!("{SECRET}:x-oauth-basic"));
    assert!(Forms::of("Basic ", token.as_bytes()).unwrap().are_in(SECRET.as_bytes()));
    let token = BASE64_STANDARD.encode(format!("{SECRET}:"));
    assert!(Forms::of("basic ", token.as_bytes()).unwrap().are_in(SECRET.as_bytes()));
    let weak = BASE64_STANDARD.encode("deployment-of-the-shop:hunter2");
    assert_eq!(Forms::of("Basic ", weak.as_bytes()).err(), Some(UnfitError::Short { found: 7 }));
}

#[test]
fn what_could_be_found_by_trying_is_not_taken() {
    assert_eq!(Forms::of("Bearer ", b"12345678901").err(), Some(UnfitError::Short { found: 11 }));
    assert!(Forms::of("Bearer ", b"123456789012").is_ok());
    assert!(Forms::of("Bearer ", &[b'a'; LONGEST]).is_ok());
    assert!(Forms::of("Bearer ", &[b'a'; LONGEST + 1]).is_err());
}

#[test]
fn a_long_token_is_known_by_its_end() {
    let token: String =
        (0..600_u32).map(|n| char::from_digit(n.wrapping_mul(2_654_435_761) >> 27, 32).unwrap()).collect();
    let forms = Forms::of("Bearer ", token.as_bytes()).unwrap();
    assert!(forms.are_in(token.as_bytes()));
    assert!(forms.are_in(BASE64_STANDARD.encode(format!("Bearer {token}")).as_bytes()));
    assert!(!forms.are_in(&token.as_bytes()[..500]));
}

proptest! {
    /// Each letter is as it is, or in any of its escapes.
    #[test]
    fn any_mix_of_escapes_is_known(how in proptest::collection::vec(0..7_u8, SECRET.len())) {
        let text: String = SECRET.chars().zip(how).map(|(c, how)| {
            let code = u32::from(c);
            match how {
                0 => format!("%{code:02x}"),
                1 => format!("\\u{code:04X}"),
                2 => format!("&#x{code:x};"),
                3 => format!("&#{code};"),
                4 => format!("%25{code:02X}"),
                5 => format!("\\\\u{code:04x}"),
                _ => c.to_string(),
            }
        }).collect();
        prop_assert!(forms().are_in(text.as_bytes()), "{}", text);
    }

    #[test]
    fn any_secret_is_known_and_no_text_is_trouble(secret in proptest::collection::vec(0x20..0x7f_u8, SHORTEST..200), text in proptest::collection::vec(any::<u8>(), 0..300)) {
        let secret = String::from_utf8(secret).unwrap().trim().replace(' ', "_");
        prop_assume!(secret.len() >= SHORTEST);
        let forms = Forms::of("Bearer ", secret.as_bytes()).unwrap();
        let all = [&text[..], b"\n", secret.as_bytes(), b"\n", &text].concat();
        prop_assert!(forms.are_in(&all));
        forms.are_in(&text);
        for before in ["", "a", "ab"] {
            let encoded = BASE64_URL_SAFE.encode(format!("{before}{secret}{before}"));
            prop_assert!(forms.are_in(encoded.as_bytes()));
        }
    }
}

/// Text that is made of parts of the secret in all its encodings, escapes, white space and other letters.
fn parts() -> impl Strategy<Value = Vec<u8>> {
    let whole: Vec<Vec<u8>> = repeated().into_iter().map(|(_, text)| text).collect();
    let part = (proptest::sample::select(whole), any::<proptest::sample::Index>()).prop_map(|(text, at)| {
        let at = at.index(text.len());
        text[at..].to_vec()
    });
    let other = proptest::sample::select(vec![
        "%",
        "\\",
        "&",
        "%2",
        " ",
        "\n",
        "\0",
        "s",
        "sk-live-9fQ2/xZ7",
        "b+rT5mK",
        "...........",
    ]);
    let secret = Just(SECRET.as_bytes().to_vec());
    prop_oneof![3 => part, 6 => other.prop_map(|text| text.as_bytes().to_vec()), 1 => secret]
}

proptest! {
    /// A text that arrives in pieces is searched as the text that has arrived so far is.
    #[test]
    fn pieces_are_searched_as_the_whole(pieces in proptest::collection::vec(parts(), 0..8), sizes in proptest::collection::vec(1..20_usize, 1..4)) {
        let forms = forms();
        let text = pieces.concat();
        let (mut arriving, mut at) = (Arriving::default(), 0);
        for size in sizes.iter().cycle() {
            let next = text.len().min(at + size);
            // What is kept of a longer text is its end.
            let kept = &text[at.saturating_sub(forms.longest * 4)..next];
            let found = forms.arrive_in(&mut arriving, &text[at..next]);
            prop_assert!(!forms.are_in(kept) || found, "not noticed at {}", next);
            prop_assert!(!found || forms.are_in(kept) || forms.are_in(&text[..next]), "noticed at {} and not there", next);
            at = next;
            // A reply ends where the credential is noticed.
            if found || at == text.len() {
                break;
            }
        }
    }
}

/// After escapes, plain text is searched from where it stands again.
#[test]
fn plain_text_after_escapes_is_searched_on() {
    let forms = forms();
    let mut arriving = Arriving::default();
    assert!(!forms.arrive_in(&mut arriving, b"&amp; 100%"));
    for _ in 0..200 {
        assert!(!forms.arrive_in(&mut arriving, b"more words "));
    }
    assert!(arriving.place.is_some(), "the escapes are long gone");
    for (at, letter) in SECRET.char_indices() {
        let found = forms.arrive_in(&mut arriving, letter.to_string().as_bytes());
        assert_eq!(found, at + 1 == SECRET.len(), "{at}");
    }
}

/// Returns the ratio of the search times over right and over wrong guesses, by the medians of alternating runs.
fn ratio(look: impl Fn(&[u8]) -> bool) -> f64 {
    // The secret without its last letter, repeated: no text without the secret is more like it.
    let right = SECRET[..SECRET.len() - 1].repeat(400);
    let wrong = right.replace('9', "8").replace('Z', "Y").replace("sk", "xx").replace('T', "U");
    let mut took = [Vec::new(), Vec::new()];
    for _ in 0..150 {
        for (text, took) in [&right, &wrong].into_iter().zip(&mut took) {
            let began = Instant::now();
            assert!(!black_box(look(black_box(text.as_bytes()))));
            took.push(began.elapsed().as_secs_f64());
        }
    }
    let [right, wrong] = took.map(|mut took| {
        took.sort_by(f64::total_cmp);
        took[took.len() / 2]
    });
    right / wrong
}

/// A search takes as long over text that is nearly the secret as over any other text. The control is the former search.
#[test]
fn how_long_it_takes_tells_nothing() {
    let forms = forms();
    // Other processes may disturb the measurement, so the best of several rounds counts.
    let off = (0..5).map(|_| (ratio(|text| forms.are_in(text)) - 1.0).abs()).fold(f64::INFINITY, f64::min);
    assert!(off < 0.1, "right guesses take {off:+.3} longer or shorter");
    let before = memchr::memmem::Finder::new(SECRET.as_bytes());
    let told = ratio(|text| before.find(text).is_some());
    assert!((told - 1.0).abs() > 0.2, "the control tells: {told:.3}");
}
