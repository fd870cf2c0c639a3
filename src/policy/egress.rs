//! Checks which hosts may be reached, and which addresses are never dialled.
//!
//! Guarantees: a host is allowed only by an entry that names it, or that names the domain exactly one label above it, for this use and this
//! port. An address is dialled only if it is public.
//! Rejects: suffix matches, several labels under one wildcard, and every address that could belong to the cluster, the node or the cloud.
//! The documentation ranges (`192.0.2.0/24`, `198.51.100.0/24`, `203.0.113.0/24`, `2001:db8::/32`) route nowhere and are not rejected.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{
    config::{EgressHost, EgressUse},
    hostname::{Authority, Hostname, HostnameError},
    rule::Rule,
};

/// A denial: the rule, and the reason that the caller gets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule}: {reason}")]
pub struct EgressDenied {
    /// The rule.
    pub rule: Rule,
    /// What was requested and what is allowed.
    pub reason: String,
}

/// A host of an allowlist: a name, or every name exactly one label below a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostPattern {
    /// The name.
    Exact(Hostname),
    /// `*.` and the domain.
    OneBelow(Hostname),
}

impl HostPattern {
    /// Parses `host` or `*.domain`.
    ///
    /// # Errors
    /// Returns an error if the host or domain is not a host name.
    pub fn parse(text: &str) -> Result<Self, HostnameError> {
        match text.strip_prefix("*.") {
            Some(domain) => Hostname::parse(domain).map(Self::OneBelow),
            None => Hostname::parse(text).map(Self::Exact),
        }
    }

    /// Checks whether the pattern covers the host.
    pub fn matches(&self, host: &Hostname) -> bool {
        match self {
            Self::Exact(name) => name == host,
            Self::OneBelow(domain) => host.is_one_below(domain),
        }
    }
}

/// A host whose denials do not count. It can be an address, because client libraries contact an address to find out which cloud they are
/// in. Belay never connects to the host either way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IgnoredHost {
    /// A name, or the names below a domain.
    Named(HostPattern),
    /// An address.
    Address(IpAddr),
}

impl IgnoredHost {
    /// Parses `host`, `*.domain` or an address without a port.
    ///
    /// # Errors
    /// Returns an error if the text is none of these.
    pub fn parse(text: &str) -> Result<Self, HostnameError> {
        match text.parse::<IpAddr>() {
            Ok(address) => Ok(Self::Address(address.to_canonical())),
            Err(_) => HostPattern::parse(text).map(Self::Named),
        }
    }
}

/// Returns the index of the first entry that allows `to` to be reached for `purpose`. Exact names take precedence over wildcards, so the
/// credential of the closest entry is used.
///
/// # Errors
/// Returns [`Rule::EgressHost`] if no entry covers the host, or if no entry lists it for the harness's use; [`Rule::EgressDirect`] if the
/// agent's own traffic may not go there; [`Rule::EgressPort`] if only the port is not listed; [`Rule::UpstreamCredential`] if the host's
/// credentials are for other principals.
pub fn allow(entries: &[EgressHost], to: &Authority, purpose: EgressUse) -> Result<usize, EgressDenied> {
    let Authority { host, port } = to;
    // An entry that is not a pattern matches nothing. The API server's schema rejects such an entry before it gets here.
    let mut matching: Vec<_> = entries
        .iter()
        .enumerate()
        .filter_map(|(i, entry)| HostPattern::parse(&entry.host).ok().map(|pattern| (i, entry, pattern)))
        .filter(|(_, _, pattern)| pattern.matches(host))
        .collect();
    matching.sort_by_key(|(_, _, pattern)| matches!(pattern, HostPattern::OneBelow(_)));
    if matching.is_empty() {
        return Err(denied(
            Rule::EgressHost,
            format!("{host} is not on the workflow class's egress list; ask for it in the PolicyPack"),
        ));
    }
    let for_purpose: Vec<_> = matching.iter().filter(|(_, entry, _)| entry.uses.contains(&purpose)).collect();
    if for_purpose.is_empty() {
        let (rule, what) = match purpose {
            EgressUse::Direct => (Rule::EgressDirect, "the agent's own traffic (Direct)"),
            EgressUse::Tools => (Rule::EgressHost, "tool calls (Tools)"),
            EgressUse::Models => (Rule::EgressHost, "model calls (Models)"),
        };
        return Err(denied(rule, format!("{host} is on the workflow class's egress list, but not for {what}")));
    }
    match for_purpose.iter().find(|(_, entry, _)| entry.ports.contains(port)) {
        // An entry that matches less closely does not take its place.
        Some((_, entry, _)) if entry.barred => Err(denied(
            Rule::UpstreamCredential,
            format!(
                "{host} has credentials for other principals only; the PolicyPack can add this principal to one of them"
            ),
        )),
        Some((index, _, _)) => Ok(*index),
        None => {
            let mut ports: Vec<_> = for_purpose.iter().flat_map(|(_, entry, _)| &entry.ports).copied().collect();
            ports.sort_unstable();
            ports.dedup();
            Err(denied(Rule::EgressPort, format!("{host} may be reached on ports {ports:?}, not on {port}")))
        }
    }
}

/// Returns the denial that does not count, if the denial is about an unlisted host and the host is one of `ignored`. Returns `denied`
/// otherwise.
#[must_use]
pub fn uncounted(denied: EgressDenied, ignored: &[String], to: &Authority) -> EgressDenied {
    let fits = |host: &String| match IgnoredHost::parse(host) {
        Ok(IgnoredHost::Named(pattern)) => pattern.matches(&to.host),
        _ => false,
    };
    if denied.rule != Rule::EgressHost || !ignored.iter().any(fits) {
        return denied;
    }
    is_ignored(&to.host)
}

/// Returns the denial of a connection to an address, if the address is one of `ignored`. No list can allow an address. `to` is
/// `address:port` with the address in its usual form: an address in another form is an attempt to evade lists.
#[must_use]
pub fn uncounted_address(ignored: &[String], to: &str) -> Option<EgressDenied> {
    let address = to.parse::<SocketAddr>().ok()?.ip().to_canonical();
    let fits = |host: &String| IgnoredHost::parse(host) == Ok(IgnoredHost::Address(address));
    ignored.iter().any(fits).then(|| is_ignored(&address))
}

fn is_ignored(host: &impl fmt::Display) -> EgressDenied {
    let reason = format!(
        "{host} is one of the workflow class's ignoredHosts: connections to it are denied and do not count as denials"
    );
    denied(Rule::EgressIgnored, reason)
}

fn denied(rule: Rule, reason: String) -> EgressDenied {
    EgressDenied { rule, reason }
}

/// IPv4 ranges that are never dialled, with a description of each.
const BLOCKED_V4: &[(Ipv4Net, &str)] = &[
    (v4(0, 0, 0, 0, 8), "this host"),
    (v4(10, 0, 0, 0, 8), "private"),
    // Contains the metadata address of Alibaba Cloud, 100.100.100.200.
    (v4(100, 64, 0, 0, 10), "carrier-grade NAT"),
    (v4(127, 0, 0, 0, 8), "loopback"),
    // Azure's host agent serves metadata at a public address.
    (v4(168, 63, 129, 16, 32), "cloud metadata"),
    (v4(169, 254, 0, 0, 16), "link-local and cloud metadata"),
    (v4(172, 16, 0, 0, 12), "private"),
    // Contains the metadata address of Oracle Cloud, 192.0.0.192.
    (v4(192, 0, 0, 0, 24), "IETF protocol assignments"),
    (v4(192, 88, 99, 0, 24), "6to4 relay"),
    (v4(192, 168, 0, 0, 16), "private"),
    (v4(198, 18, 0, 0, 15), "benchmarking"),
    (v4(224, 0, 0, 0, 4), "multicast"),
    (v4(240, 0, 0, 0, 4), "reserved and broadcast"),
];

/// The range of all global unicast addresses. Addresses outside it are never dialled.
const GLOBAL_V6: Ipv6Net = v6(0x2000, 0, 3);

/// IPv6 ranges inside [`GLOBAL_V6`] that are never dialled, with a description of each.
const BLOCKED_V6: &[(Ipv6Net, &str)] = &[
    // Teredo (which embeds an IPv4 address), ORCHID, benchmarking.
    (v6(0x2001, 0, 23), "IETF protocol assignments"),
    // It embeds an IPv4 address, which may be private.
    (v6(0x2002, 0, 16), "6to4"),
];

/// Descriptions of ranges outside [`GLOBAL_V6`]. They are used only in the reason.
const NAMED_V6: &[(Ipv6Net, &str)] = &[
    (Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 128), "unspecified"),
    (Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128), "loopback"),
    (Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96), "IPv4-mapped"),
    (v6(0x64, 0xff9b, 32), "NAT64"),
    (v6(0xfc00, 0, 7), "unique local"),
    (v6(0xfe80, 0, 10), "link-local"),
    (v6(0xff00, 0, 8), "multicast"),
];

const fn v4(a: u8, b: u8, c: u8, d: u8, length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length)
}

const fn v6(a: u16, b: u16, length: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, 0), length)
}

/// The addresses that are never dialled: the built-in ranges, and the cluster's own addresses.
#[derive(Clone, Debug, Default)]
pub struct Blocked {
    cluster: Vec<IpNet>,
}

impl Blocked {
    /// Returns the built-in ranges and `cluster`, because pods, Services and nodes may have addresses that look public.
    pub fn new(cluster: Vec<IpNet>) -> Self {
        Self { cluster }
    }

    /// Returns a description of the address if it must not be dialled.
    pub fn reason(&self, address: IpAddr) -> Option<&'static str> {
        // `--blocked-cidr` in IPv4 must also cover the IPv6 notation of the same host. All such notations are rejected below.
        if self.cluster.iter().any(|net| net.contains(&address)) {
            return Some("the cluster's own");
        }
        match address {
            IpAddr::V4(a) => BLOCKED_V4.iter().find(|(net, _)| net.contains(&a)).map(|(_, what)| *what),
            IpAddr::V6(a) if GLOBAL_V6.contains(&a) => {
                BLOCKED_V6.iter().find(|(net, _)| net.contains(&a)).map(|(_, what)| *what)
            }
            IpAddr::V6(a) => {
                let known = NAMED_V6.iter().find(|(net, _)| net.contains(&a)).map(|(_, what)| *what);
                Some(known.unwrap_or("not global unicast"))
            }
        }
    }

    /// Accepts the addresses of a name only if all of them may be dialled. A name with both public and private addresses is an attack or a
    /// mistake, and to pick one of its addresses helps in neither case.
    ///
    /// # Errors
    /// Returns [`Rule::EgressAddress`] with the first address that must not be dialled.
    pub fn check(&self, host: &Hostname, addresses: &[IpAddr]) -> Result<(), EgressDenied> {
        match addresses.iter().find_map(|a| self.reason(*a).map(|what| (a, what))) {
            None => Ok(()),
            Some((address, what)) => Err(denied(
                Rule::EgressAddress,
                format!(
                    "{host} resolves to {address}, which is {what}: Belay connects only to names whose addresses are all public"
                ),
            )),
        }
    }
}

#[cfg(test)]
mod tests;
