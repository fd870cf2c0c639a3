use proptest::prelude::*;
use rstest::rstest;

use super::*;

fn entry(host: &str, ports: &[u16], uses: &[EgressUse]) -> EgressHost {
    EgressHost { host: host.into(), ports: ports.to_vec(), uses: uses.to_vec(), credential: None, barred: false }
}

fn list() -> Vec<EgressHost> {
    use EgressUse::{Direct, Models, Tools};
    vec![
        entry("*.allowed.com", &[443], &[Direct]),
        entry("allowed.com", &[443, 8443], &[Tools]),
        entry("models.test", &[443], &[Models]),
        entry("api.allowed.com", &[443], &[Direct, Tools]),
    ]
}

#[rstest]
#[case::exact("allowed.com:443", EgressUse::Tools, Ok(1))]
#[case::second_port("allowed.com:8443", EgressUse::Tools, Ok(1))]
#[case::exact_before_wildcard("api.allowed.com:443", EgressUse::Direct, Ok(3))]
#[case::wildcard("www.allowed.com:443", EgressUse::Direct, Ok(0))]
#[case::a29_upper_case_and_dot("WWW.Allowed.COM.:443", EgressUse::Direct, Ok(0))]
#[case::a36_apex("allowed.com:443", EgressUse::Direct, Err(Rule::EgressDirect))]
#[case::a36_two_labels("a.b.allowed.com:443", EgressUse::Direct, Err(Rule::EgressHost))]
#[case::a30_suffix("evilallowed.com:443", EgressUse::Tools, Err(Rule::EgressHost))]
#[case::a30_suffix_of_wildcard("www.evilallowed.com:443", EgressUse::Direct, Err(Rule::EgressHost))]
#[case::a30_prefix("allowed.com.evil.com:443", EgressUse::Tools, Err(Rule::EgressHost))]
#[case::a29_homoglyph("\u{430}llowed.com:443", EgressUse::Tools, Err(Rule::EgressHost))]
#[case::other_use("models.test:443", EgressUse::Tools, Err(Rule::EgressHost))]
#[case::direct_to_model("models.test:443", EgressUse::Direct, Err(Rule::EgressDirect))]
#[case::port("models.test:80", EgressUse::Models, Err(Rule::EgressPort))]
#[case::single_label("localhost:443", EgressUse::Direct, Err(Rule::EgressHost))]
fn allowlist(#[case] to: &str, #[case] purpose: EgressUse, #[case] expected: Result<usize, Rule>) {
    let to = Authority::parse(to, None).unwrap();
    assert_eq!(allow(&list(), &to, purpose).map_err(|e| e.rule), expected);
}

#[test]
fn an_empty_list_allows_nothing() {
    let to = Authority::parse("allowed.com:443", None).unwrap();
    assert_eq!(allow(&[], &to, EgressUse::Tools).unwrap_err().rule, Rule::EgressHost);
}

#[rstest]
#[case("0.0.0.0")]
#[case("0.1.2.3")]
#[case("10.0.0.5")]
#[case("100.64.0.1")]
#[case("100.100.100.200")]
#[case("127.0.0.1")]
#[case("127.255.255.255")]
#[case("168.63.129.16")]
#[case("169.254.169.254")]
#[case("172.16.0.1")]
#[case("172.31.255.255")]
#[case("192.0.0.192")]
#[case("192.88.99.1")]
#[case("192.168.1.1")]
#[case("198.18.0.1")]
#[case("224.0.0.1")]
#[case("240.0.0.1")]
#[case("255.255.255.255")]
#[case("::")]
#[case("::1")]
#[case::mapped_private("::ffff:10.0.0.5")]
#[case::mapped_public("::ffff:8.8.8.8")]
#[case::compatible("::127.0.0.1")]
#[case::nat64("64:ff9b::a00:5")]
#[case::nat64_local("64:ff9b:1::a00:5")]
#[case::six_to_four("2002:0a00:0005::1")]
#[case::teredo("2001:0:53aa:64c::1")]
#[case("fc00::1")]
#[case::aws_metadata("fd00:ec2::254")]
#[case("fe80::1")]
#[case("fec0::1")]
#[case("ff02::1")]
#[case("100::1")]
#[case("4000::1")]
fn blocked(#[case] address: &str) {
    assert!(Blocked::default().reason(address.parse().unwrap()).is_some(), "{address}");
}

#[rstest]
#[case("8.8.8.8")]
#[case("1.1.1.1")]
#[case("100.63.255.255")]
#[case("100.128.0.0")]
#[case("172.15.255.255")]
#[case("172.32.0.0")]
#[case("168.63.129.17")]
#[case("198.20.0.1")]
#[case("223.255.255.255")]
#[case::documentation("198.51.100.20")]
#[case("2001:4860:4860::8888")]
#[case::documentation_v6("2001:db8::1")]
#[case("2606:4700::1111")]
fn public(#[case] address: &str) {
    assert_eq!(Blocked::default().reason(address.parse().unwrap()), None, "{address}");
}

#[test]
fn the_clusters_own_ranges_are_blocked_too() {
    let blocked = Blocked::new(vec!["203.0.113.0/24".parse().unwrap(), "2001:db8:1::/48".parse().unwrap()]);
    assert_eq!(blocked.reason("203.0.113.7".parse().unwrap()), Some("the cluster's own"));
    assert_eq!(blocked.reason("2001:db8:1::7".parse().unwrap()), Some("the cluster's own"));
    assert_eq!(blocked.reason("198.51.100.20".parse().unwrap()), None);
}

#[test]
fn a24_a26_one_blocked_answer_denies_all_of_them() {
    let host = Hostname::parse("mixed.world.test").unwrap();
    let answers = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<Vec<IpAddr>>();
    let check = |texts: &[&str]| Blocked::default().check(&host, &answers(texts)).map_err(|e| e.rule);
    assert_eq!(check(&["198.51.100.20", "198.51.100.21"]), Ok(()));
    for bad in ["10.0.0.5", "127.0.0.1", "100.64.0.1", "169.254.169.254", "::ffff:10.0.0.5", "fd00::1"] {
        assert_eq!(check(&["198.51.100.20", bad]), Err(Rule::EgressAddress), "{bad}");
        assert_eq!(check(&[bad, "198.51.100.20"]), Err(Rule::EgressAddress), "{bad}");
        assert_eq!(check(&[bad]), Err(Rule::EgressAddress), "{bad}");
    }
}

/// The specification of [`HostPattern::matches`], naively over lists of labels.
fn reference(pattern: &str, host: &str) -> bool {
    let (pattern, host): (Vec<_>, Vec<_>) = (pattern.split('.').collect(), host.split('.').collect());
    pattern.len() == host.len() && pattern.iter().zip(&host).all(|(p, h)| *p == "*" || p == h)
}

proptest! {
    #[test]
    fn the_matcher_agrees_with_the_reference(pattern in "(\\*\\.)?[ab]{1,2}(\\.[ab]{1,2}){0,3}", host in "[ab]{1,2}(\\.[ab]{1,2}){0,4}") {
        let found = HostPattern::parse(&pattern).unwrap().matches(&Hostname::parse(&host).unwrap());
        prop_assert_eq!(found, reference(&pattern, &host));
    }

    #[test]
    fn no_ipv4_address_is_reached_by_an_ipv6_spelling(bits: u32) {
        let v4 = Ipv4Addr::from(bits);
        let [a, b, c, d] = v4.octets();
        let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        for v6 in [
            v4.to_ipv6_mapped(),
            Ipv6Addr::new(0, 0, 0, 0, 0, 0, high, low),
            Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low),
            Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1),
            Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, !high, !low),
        ] {
            prop_assert!(Blocked::default().reason(IpAddr::V6(v6)).is_some(), "{}", v6);
        }
    }
}

/// If a host's credentials are for other principals, neither a wider entry nor a second entry of the host takes its place.
#[test]
fn a_host_of_other_principals_is_closed() {
    let barred = EgressHost { barred: true, ..entry("api.world.test", &[443], &[EgressUse::Tools]) };
    let wider = entry("*.world.test", &[443], &[EgressUse::Tools]);
    let again = entry("api.world.test", &[443], &[EgressUse::Tools]);
    let to = |host: &str| Authority::parse(host, None).unwrap();
    for entries in [vec![barred.clone()], vec![wider.clone(), barred.clone()], vec![barred.clone(), again]] {
        let found = allow(&entries, &to("api.world.test:443"), EgressUse::Tools);
        assert_eq!(found.unwrap_err().rule, Rule::UpstreamCredential);
    }
    assert_eq!(allow(&[barred, wider], &to("docs.world.test:443"), EgressUse::Tools), Ok(1));
}

/// Host names, and addresses in the form in which clients contact them.
#[rstest]
#[case("telemetry.test", "telemetry.test:443", true)]
#[case("*.ingest.test", "a.ingest.test:443", true)]
#[case("*.ingest.test", "ingest.test:443", false)]
#[case("169.254.169.254", "169.254.169.254:80", true)]
#[case("169.254.169.254", "[::ffff:169.254.169.254]:80", true)]
#[case("::ffff:169.254.169.254", "169.254.169.254:80", true)]
#[case("fd00:ec2::254", "[fd00:ec2:0:0::254]:80", true)]
#[case("169.254.169.254", "169.254.169.253:80", false)]
#[case("169.254.169.254", "2852039166:80", false)]
#[case("169.254.169.254", "169.254.169.254", false)]
#[case("169.254.169.254:80", "169.254.169.254:80", false)]
#[case("169.254.0.0/16", "169.254.169.254:80", false)]
#[case("127.1", "127.0.0.1:80", false)]
fn ignored(#[case] listed: &str, #[case] to: &str, #[case] is_ignored: bool) {
    let listed = [listed.to_owned()];
    let denied = EgressDenied { rule: Rule::EgressHost, reason: String::new() };
    let named = Authority::parse(to, None).map(|to| uncounted(denied, &listed, &to).rule == Rule::EgressIgnored);
    let addressed = uncounted_address(&listed, to).is_some_and(|denied| denied.rule == Rule::EgressIgnored);
    assert_eq!(named.unwrap_or(false) || addressed, is_ignored);
}
