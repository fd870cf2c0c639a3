//! Hosts that may be reached, and addresses that may never be.
//!
//! Promises: a host is allowed only by an entry that names it, or the domain exactly one label above it, for this use
//! and this port; an address is dialled only if it is public. Refuses: suffix matches, several labels under one
//! wildcard, and every address that could be the cluster's, the node's or the cloud's own. The documentation ranges
//! (`192.0.2.0/24`, `198.51.100.0/24`, `203.0.113.0/24`, `2001:db8::/32`) route nowhere and are not refused.

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

/// A refusal: the rule and what to tell the caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule}: {reason}")]
pub struct EgressDenied {
    /// The rule.
    pub rule: Rule,
    /// What was asked for and what is allowed.
    pub reason: String,
}

/// An allowlist's host: itself, or exactly one label below a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostPattern {
    /// The name itself.
    Exact(Hostname),
    /// `*.` and this domain.
    OneBelow(Hostname),
}

impl HostPattern {
    /// Reads `host` or `*.domain`.
    ///
    /// # Errors
    /// If the host or domain is not a host name.
    pub fn parse(text: &str) -> Result<Self, HostnameError> {
        match text.strip_prefix("*.") {
            Some(domain) => Hostname::parse(domain).map(Self::OneBelow),
            None => Hostname::parse(text).map(Self::Exact),
        }
    }

    /// Whether it covers the host.
    pub fn matches(&self, host: &Hostname) -> bool {
        match self {
            Self::Exact(name) => name == host,
            Self::OneBelow(domain) => host.is_one_below(domain),
        }
    }
}

/// A host whose refusals do not count. It may be an address, as client libraries ask one for the cloud that they are in: nothing goes there
/// either way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IgnoredHost {
    /// A name, or those below one.
    Named(HostPattern),
    /// An address.
    Address(IpAddr),
}

impl IgnoredHost {
    /// Reads `host`, `*.domain` or an address without a port.
    ///
    /// # Errors
    /// If it is none of these.
    pub fn parse(text: &str) -> Result<Self, HostnameError> {
        match text.parse::<IpAddr>() {
            Ok(address) => Ok(Self::Address(address.to_canonical())),
            Err(_) => HostPattern::parse(text).map(Self::Named),
        }
    }
}

/// The first entry that lets `to` be reached for `purpose`, by its index; exact names go before wildcards, so that the
/// credential of the closest entry is the one that is used.
///
/// # Errors
/// [`Rule::EgressHost`] if no entry has the host, or none has it for the harness's use; [`Rule::EgressDirect`] if the
/// agent's own traffic may not go there; [`Rule::EgressPort`] if only the port is not listed; [`Rule::UpstreamCredential`] if its
/// credentials are for other principals.
pub fn allow(entries: &[EgressHost], to: &Authority, purpose: EgressUse) -> Result<usize, EgressDenied> {
    let Authority { host, port } = to;
    // An entry that is no pattern matches nothing: the API server's schema refuses it before it gets here.
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
        // A host further from it does not stand in.
        Some((_, entry, _)) if entry.barred => Err(denied(
            Rule::UpstreamCredential,
            format!(
                "{host} has credentials for other principals only; have this one added to one of them in the PolicyPack"
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

/// A refusal that does not count, if it is of a host that is not listed, and one of these.
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

/// The refusal of a connection to an address, which no list can allow, if it is one of these. `to` is `address:port`, and the address is written
/// in its usual form: what is written otherwise looks for a way around lists.
#[must_use]
pub fn uncounted_address(ignored: &[String], to: &str) -> Option<EgressDenied> {
    let address = to.parse::<SocketAddr>().ok()?.ip().to_canonical();
    let fits = |host: &String| IgnoredHost::parse(host) == Ok(IgnoredHost::Address(address));
    ignored.iter().any(fits).then(|| is_ignored(&address))
}

fn is_ignored(host: &impl fmt::Display) -> EgressDenied {
    let reason =
        format!("{host} is one of the workflow class's ignoredHosts: no connection goes there, and none counts");
    denied(Rule::EgressIgnored, reason)
}

fn denied(rule: Rule, reason: String) -> EgressDenied {
    EgressDenied { rule, reason }
}

/// IPv4 ranges that are never dialled, and what they are.
const BLOCKED_V4: &[(Ipv4Net, &str)] = &[
    (v4(0, 0, 0, 0, 8), "this host"),
    (v4(10, 0, 0, 0, 8), "private"),
    // Also Alibaba Cloud's metadata, 100.100.100.200.
    (v4(100, 64, 0, 0, 10), "carrier-grade NAT"),
    (v4(127, 0, 0, 0, 8), "loopback"),
    // Azure's host agent: metadata under a public address.
    (v4(168, 63, 129, 16, 32), "cloud metadata"),
    (v4(169, 254, 0, 0, 16), "link-local and cloud metadata"),
    (v4(172, 16, 0, 0, 12), "private"),
    // Also Oracle Cloud's metadata, 192.0.0.192.
    (v4(192, 0, 0, 0, 24), "IETF protocol assignments"),
    (v4(192, 88, 99, 0, 24), "6to4 relay"),
    (v4(192, 168, 0, 0, 16), "private"),
    (v4(198, 18, 0, 0, 15), "benchmarking"),
    (v4(224, 0, 0, 0, 4), "multicast"),
    (v4(240, 0, 0, 0, 4), "reserved and broadcast"),
];

/// What is not global unicast is never dialled: this range holds everything that is.
const GLOBAL_V6: Ipv6Net = v6(0x2000, 0, 3);

/// IPv6 ranges inside [`GLOBAL_V6`] that are never dialled, and what they are.
const BLOCKED_V6: &[(Ipv6Net, &str)] = &[
    // Teredo (which has an IPv4 address in it), ORCHID, benchmarking.
    (v6(0x2001, 0, 23), "IETF protocol assignments"),
    // It has an IPv4 address in it, which may be private.
    (v6(0x2002, 0, 16), "6to4"),
];

/// Names for what lies outside [`GLOBAL_V6`], for the reason only.
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

/// The addresses that are never dialled: the built-in ranges, and the cluster's own.
#[derive(Clone, Debug, Default)]
pub struct Blocked {
    cluster: Vec<IpNet>,
}

impl Blocked {
    /// The built-in ranges and these: pods, Services and nodes may have public-looking addresses.
    pub fn new(cluster: Vec<IpNet>) -> Self {
        Self { cluster }
    }

    /// What the address is, if it must not be dialled.
    pub fn reason(&self, address: IpAddr) -> Option<&'static str> {
        // `--blocked-cidr` in IPv4 must hold for the same host under its IPv6 spelling; those are all refused anyway.
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

    /// Accepts a name's addresses only if every one of them may be dialled: a name that mixes public and private
    /// addresses is an attack or a mistake, and neither is helped by picking one.
    ///
    /// # Errors
    /// [`Rule::EgressAddress`], naming the first address that must not be dialled.
    pub fn check(&self, host: &Hostname, addresses: &[IpAddr]) -> Result<(), EgressDenied> {
        match addresses.iter().find_map(|a| self.reason(*a).map(|what| (a, what))) {
            None => Ok(()),
            Some((address, what)) => Err(denied(
                Rule::EgressAddress,
                format!(
                    "{host} resolves to {address}, which is {what}: only names whose addresses are all public are dialled"
                ),
            )),
        }
    }
}

#[cfg(test)]
mod tests;
