//! Private addresses that the administrator of a cluster has opened to named hosts.
//!
//! Guarantees: an address is opened only to the hosts that an entry names, and only inside the entry's ranges. All addresses of a host must
//! be opened, or none. Loopback, link-local, multicast and metadata addresses cannot be opened.
//!
//! Non-goals: the addresses that only a cluster knows, such as those of its nodes, its API servers and its agents, which the gateway
//! rejects; and the list of hosts that a workflow class may reach, which is the pack's.

use std::{net::IpAddr, str::FromStr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{
    egress::{EgressDenied, HostPattern},
    hostname::Hostname,
    rule::Rule,
};

/// The ranges that can be opened, in addition to public addresses: RFC 1918, RFC 6598 and RFC 4193.
const OPENABLE: [IpNet; 5] = [
    v4([10, 0, 0, 0], 8),
    v4([172, 16, 0, 0], 12),
    v4([192, 168, 0, 0], 16),
    v4([100, 64, 0, 0], 10),
    IpNet::V6(Ipv6Net::new_assert(std::net::Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7)),
];
/// The metadata services of clouds inside these ranges: Alibaba Cloud, AWS and Google Cloud.
const METADATA: [IpNet; 3] = [
    v4([100, 100, 100, 200], 32),
    IpNet::V6(Ipv6Net::new_assert(std::net::Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), 128)),
    IpNet::V6(Ipv6Net::new_assert(std::net::Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254), 128)),
];

const fn v4([a, b, c, d]: [u8; 4], length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(std::net::Ipv4Addr::new(a, b, c, d), length))
}

/// One entry: the ranges that are opened to a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrivateUpstream {
    host: HostPattern,
    ranges: Vec<IpNet>,
}

impl FromStr for PrivateUpstream {
    type Err = String;

    /// Parses `HOST=CIDR,…`. `HOST` can start with `*.`, for the names exactly one label below a domain.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected =
            || format!("expected a host name, an equals sign and CIDRs with commas between them, found {text:?}");
        let (host, ranges) = text.split_once('=').ok_or_else(expected)?;
        let host = HostPattern::parse(host.trim()).map_err(|error| format!("{error}: {:?}", host.trim()))?;
        let ranges = ranges.split(',').map(|range| {
            let net = range.trim().parse::<IpNet>();
            let net = net.map_err(|_| format!("expected a CIDR such as 10.96.0.0/12, found {range:?}"))?;
            if OPENABLE.iter().any(|open| open.contains(&net)) {
                return Ok(net.trunc());
            }
            Err(format!(
                "expected a range inside 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 100.64.0.0/10 or fc00::/7, found {net}; other addresses \
                 cannot be opened"
            ))
        });
        Ok(Self { host, ranges: ranges.collect::<Result<_, _>>()? })
    }
}

impl PrivateUpstream {
    fn opens(&self, address: IpAddr) -> bool {
        can_be_opened(address) && self.ranges.iter().any(|net| net.contains(&address))
    }
}

/// Returns whether an entry could open this address.
pub fn can_be_opened(address: IpAddr) -> bool {
    let is_in = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&address));
    is_in(&OPENABLE) && !is_in(&METADATA)
}

/// Returns whether the entries open all of a host's addresses. Returns `false` if they open none.
///
/// # Errors
/// Returns [`Rule::EgressAddress`] if the entries open some of the addresses and not others. A name with both is an attack or a mistake.
pub fn opened(entries: &[PrivateUpstream], host: &Hostname, addresses: &[IpAddr]) -> Result<bool, EgressDenied> {
    let entries: Vec<_> = entries.iter().filter(|entry| entry.host.matches(host)).collect();
    let is_opened = |address: &IpAddr| entries.iter().any(|entry| entry.opens(*address));
    let (inside, outside): (Vec<&IpAddr>, Vec<&IpAddr>) = addresses.iter().partition(|address| is_opened(address));
    match (inside.first(), outside.first()) {
        (Some(inside), Some(outside)) => Err(EgressDenied {
            rule: Rule::EgressAddress,
            reason: format!(
                "{host} resolves to {inside}, which the cluster's administrator has opened to it, and to {outside}, which is not: expected \
                 all of its addresses in the opened ranges, or none"
            ),
        }),
        (inside, _) => Ok(inside.is_some()),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn entries() -> Vec<PrivateUpstream> {
        ["search.shop.svc.cluster.local=10.96.0.0/12,fd00::/16", "*.corp.test=192.168.7.0/24", "cgn.test=100.64.0.0/10"]
            .map(|entry| entry.parse().unwrap())
            .into()
    }

    #[rstest]
    #[case::its_own("search.shop.svc.cluster.local", &["10.96.0.7"], Ok(true))]
    #[case::in_both_families("search.shop.svc.cluster.local", &["10.96.0.7", "fd00::7"], Ok(true))]
    #[case::one_below("git.corp.test", &["192.168.7.9"], Ok(true))]
    #[case::not_the_domain("corp.test", &["192.168.7.9"], Ok(false))]
    #[case::not_two_below("a.git.corp.test", &["192.168.7.9"], Ok(false))]
    #[case::another_host("search.test", &["10.96.0.7"], Ok(false))]
    #[case::another_range("search.shop.svc.cluster.local", &["10.0.0.7"], Ok(false))]
    #[case::another_hosts_range("search.shop.svc.cluster.local", &["192.168.7.9"], Ok(false))]
    #[case::public("search.shop.svc.cluster.local", &["198.51.100.7"], Ok(false))]
    #[case::mixed_with_public("search.shop.svc.cluster.local", &["10.96.0.7", "198.51.100.7"], Err(Rule::EgressAddress))]
    #[case::mixed_with_private("search.shop.svc.cluster.local", &["192.168.7.9", "10.96.0.7"], Err(Rule::EgressAddress))]
    #[case::metadata("cgn.test", &["100.100.100.200"], Ok(false))]
    #[case::beside_metadata("cgn.test", &["100.100.100.201"], Ok(true))]
    #[case::metadata_of_aws("search.shop.svc.cluster.local", &["fd00:ec2::254"], Ok(false))]
    #[case::mapped("search.shop.svc.cluster.local", &["::ffff:10.96.0.7"], Ok(false))]
    fn an_address_is_opened_to_a_host(#[case] host: &str, #[case] to: &[&str], #[case] expected: Result<bool, Rule>) {
        let host = Hostname::parse(host).unwrap();
        let to: Vec<IpAddr> = to.iter().map(|address| address.parse().unwrap()).collect();
        assert_eq!(opened(&entries(), &host, &to).map_err(|denied| denied.rule), expected);
    }

    #[rstest]
    #[case::loopback("a.test=127.0.0.0/8", "127.0.0.0/8")]
    #[case::link_local("a.test=169.254.169.254/32", "169.254.169.254/32")]
    #[case::all("a.test=0.0.0.0/0", "0.0.0.0/0")]
    #[case::all_of_ipv6("a.test=::/0", "::/0")]
    #[case::wider_than_private("a.test=10.0.0.0/7", "10.0.0.0/7")]
    #[case::mapped("a.test=::ffff:10.0.0.0/104", "::ffff:10.0.0.0/104")]
    #[case::public("a.test=198.51.100.0/24", "198.51.100.0/24")]
    #[case::no_range("a.test", "equals sign")]
    #[case::empty("a.test=", "CIDR")]
    #[case::an_address("a.test=10.0.0.1", "CIDR")]
    #[case::no_host("=10.0.0.0/8", "host name")]
    #[case::a_wildcard_inside("a.*.test=10.0.0.0/8", "letters")]
    fn what_cannot_be_opened_is_rejected(#[case] text: &str, #[case] word: &str) {
        let error = text.parse::<PrivateUpstream>().unwrap_err();
        assert!(error.contains(word), "{error}");
    }
}
