use proptest::prelude::*;
use rstest::rstest;

use super::*;

#[rstest]
#[case("example.com", "example.com")]
#[case::a29_upper_case("EXAMPLE.Com", "example.com")]
#[case::a29_trailing_dot("example.com.", "example.com")]
#[case::a29_ideographic_dots("example\u{3002}com\u{3002}", "example.com")]
#[case::a29_full_width("\u{ff45}xample.com", "example.com")]
#[case::a29_umlaut("b\u{fc}cher.example", "xn--bcher-kva.example")]
#[case::a29_punycode("XN--BCHER-KVA.example", "xn--bcher-kva.example")]
#[case::two_hyphens_inside("r3---sn.example", "r3---sn.example")]
#[case::one_label("localhost", "localhost")]
#[case::digits_in_front("1.2.3.4.example", "1.2.3.4.example")]
#[case::hex_like_but_no_number("1.0xyz", "1.0xyz")]
fn one_form(#[case] text: &str, #[case] expected: &str) {
    assert_eq!(Hostname::parse(text).unwrap().as_str(), expected);
}

#[test]
fn a_homoglyph_is_another_name() {
    // The first letter is Cyrillic.
    let look_alike = Hostname::parse("\u{430}llowed.com").unwrap();
    assert_ne!(look_alike, Hostname::parse("allowed.com").unwrap());
    assert!(look_alike.as_str().starts_with("xn--"), "{look_alike}");
}

#[rstest]
#[case::empty("", HostnameError::Empty)]
#[case::root(".", HostnameError::Idna)]
#[case::a28_nul("allowed.com\0.evil.com", HostnameError::Character('\0'))]
#[case::a28_crlf("allowed.com\r\nHost: evil.com", HostnameError::Character('\r'))]
#[case::a28_lf("allowed.com\n", HostnameError::Character('\n'))]
#[case::space(" allowed.com", HostnameError::Character(' '))]
#[case::no_break_space("allowed.com\u{a0}", HostnameError::Character('\u{a0}'))]
#[case::a31_userinfo("allowed.com@evil.com", HostnameError::Character('@'))]
#[case::a32_brackets("[::1]", HostnameError::Character('['))]
#[case::a32_zone("fe80::1%eth0", HostnameError::Character(':'))]
#[case::a32_zone_in_name("host%eth0", HostnameError::Character('%'))]
#[case::percent("allowed%2ecom", HostnameError::Character('%'))]
#[case::a33_port("allowed.com:443", HostnameError::Character(':'))]
#[case::path("allowed.com/x", HostnameError::Character('/'))]
#[case::backslash("allowed.com\\.evil.com", HostnameError::Character('\\'))]
#[case::full_width_at("allowed.com\u{ff20}evil.com", HostnameError::Idna)]
#[case::empty_label("allowed..com", HostnameError::Idna)]
#[case::leading_dot(".allowed.com", HostnameError::Idna)]
#[case::two_trailing_dots("allowed.com..", HostnameError::Idna)]
#[case::underscore("a_b.com", HostnameError::Idna)]
#[case::hyphen_first("-a.com", HostnameError::Idna)]
#[case::hyphen_last("a-.com", HostnameError::Idna)]
#[case::wildcard("*.allowed.com", HostnameError::Idna)]
#[case::bad_punycode("xn--\u{fc}.com", HostnameError::Idna)]
#[case::hidden_joiner("allo\u{200d}wed.com", HostnameError::Idna)]
#[case::a15_dotted("127.0.0.1", HostnameError::Address)]
#[case::a15_trailing_dot("127.0.0.1.", HostnameError::Address)]
#[case::a15_short("127.1", HostnameError::Address)]
#[case::a15_decimal("2130706433", HostnameError::Address)]
#[case::a15_octal("0177.0.0.1", HostnameError::Address)]
#[case::a15_octal_whole("017700000001", HostnameError::Address)]
#[case::a15_hex("0x7f000001", HostnameError::Address)]
#[case::a15_hex_upper("0X7F.0.0.0X1", HostnameError::Address)]
#[case::a15_hex_empty("127.0.0.0x", HostnameError::Address)]
#[case::a15_full_width("\u{ff11}\u{ff12}\u{ff17}.0.0.1", HostnameError::Address)]
#[case::a15_ideographic("127\u{3002}0\u{3002}0\u{3002}1", HostnameError::Address)]
#[case::a15_circled("\u{2460}27.0.0.1", HostnameError::Address)]
fn refused(#[case] text: &str, #[case] expected: HostnameError) {
    assert_eq!(Hostname::parse(text), Err(expected));
}

#[test]
fn lengths() {
    let label = "a".repeat(63);
    assert!(Hostname::parse(&format!("{label}.com")).is_ok());
    assert_eq!(Hostname::parse(&format!("{label}a.com")), Err(HostnameError::Idna));
    let long = format!("{label}.{label}.{label}.{}", "b".repeat(61));
    assert_eq!(long.len(), 253);
    assert_eq!(Hostname::parse(&long).unwrap().as_str(), long);
    assert_eq!(Hostname::parse(&format!("{long}.")).unwrap().as_str(), long);
    assert!(Hostname::parse(&format!("{long}b")).is_err());
    assert_eq!(Hostname::parse(&"a.".repeat(100_000)), Err(HostnameError::Long));
}

#[rstest]
#[case("a.test:443", Some(("a.test", 443)))]
#[case("a.test:65535", Some(("a.test", 65535)))]
#[case("A.test.:1", Some(("a.test", 1)))]
#[case::a33_two_ports("a.test:443:22", None)]
#[case::a33_zero("a.test:0", None)]
#[case::a33_large("a.test:65536", None)]
#[case::a33_wraps("a.test:65979", None)]
#[case::a33_empty("a.test:", None)]
#[case::a33_sign("a.test:+443", None)]
#[case::a33_negative("a.test:-1", None)]
#[case::a33_leading_zero("a.test:0443", None)]
#[case::a33_space("a.test: 443", None)]
#[case::a33_hex("a.test:0x1bb", None)]
#[case::a33_full_width("a.test:\u{ff14}43", None)]
#[case::no_port("a.test", None)]
#[case::no_host(":443", None)]
#[case::a32_address("[::1]:443", None)]
#[case::a31_userinfo("a.test:443@evil.test:443", None)]
fn authorities(#[case] text: &str, #[case] expected: Option<(&str, u16)>) {
    let found = Authority::parse(text, None).ok();
    assert_eq!(found.as_ref().map(|a| (a.host.as_str(), a.port)), expected);
}

#[test]
fn a_default_port_stands_in_for_an_absent_one_only() {
    assert_eq!(Authority::parse("a.test", Some(80)).unwrap().port, 80);
    assert_eq!(Authority::parse("a.test:", Some(80)), Err(AuthorityError::Port));
}

proptest! {
    #[test]
    fn never_panics_and_has_one_form(text in ".{0,80}") {
        if let Ok(name) = Hostname::parse(&text) {
            let written = name.as_str();
            prop_assert!(written.len() <= 253);
            prop_assert!(written.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.')), "{written}");
            prop_assert!(written.split('.').all(|l| (1..=63).contains(&l.len())), "{written}");
            prop_assert!(written.parse::<std::net::IpAddr>().is_err());
            prop_assert_eq!(Hostname::parse(written), Ok(name.clone()));
        }
    }

    #[test]
    fn host_like_texts_keep_one_form(text in "[a-zA-Z0-9.\u{fc}\u{3002}xn:-]{1,40}") {
        if let Ok(authority) = Authority::parse(&text, Some(443)) {
            prop_assert_eq!(Authority::parse(&authority.to_string(), None), Ok(authority));
        }
    }

    #[test]
    fn every_address_is_refused(bits: u32) {
        let [a, b, c, d] = bits.to_be_bytes();
        for text in [
            format!("{a}.{b}.{c}.{d}"), format!("{bits}"), format!("{bits:#x}"), format!("{bits:#X}"), format!("0{bits:o}"),
            format!("0{a:o}.{b}.{c}.{d}"), format!("{a}.{b}.{c}.{d:#x}"), format!("{a}.{}", bits & 0xff_ffff),
        ] {
            prop_assert_eq!(Hostname::parse(&text), Err(HostnameError::Address), "{}", text);
        }
    }
}

#[rstest]
#[case::none(&[], true)]
#[case::the_same(&["docs.example.com:8443"], true)]
#[case::without_its_port(&["docs.example.com"], true)]
#[case::another_spelling(&["DOCS.example.com."], true)]
#[case::a34_two(&["docs.example.com:8443", "evil.example"], false)]
#[case::a34_twice(&["docs.example.com:8443", "docs.example.com:8443"], false)]
#[case::a35_another(&["evil.example:8443"], false)]
#[case::another_port(&["docs.example.com:443"], false)]
#[case::none_at_all(&[""], false)]
fn a_host_fits_what_the_request_is_for(#[case] hosts: &[&str], #[case] fits: bool) {
    let authority = Authority::parse("docs.example.com:8443", None).unwrap();
    assert_eq!(authority.fits(hosts.iter().map(|host| host.as_bytes())), fits);
}
