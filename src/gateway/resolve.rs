//! Names to addresses, by the gateway's own resolver.
//!
//! Promises: asks the configured name servers for exactly the name that was matched, A and AAAA, each answer bounded in
//! time and cached no longer than its TTL and half a minute. Refuses: search domains, `/etc/hosts`, and judging addresses,
//! which is [`egress::Blocked`](crate::policy::egress::Blocked)'s.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use futures::future::BoxFuture;
use hickory_resolver::{
    Resolver, TokioResolver,
    config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    net::{NetError, runtime::TokioRuntimeProvider},
    proto::rr::Name,
    system_conf,
};

use crate::policy::hostname::Hostname;

/// An address that is good now may be another's soon: a cached one is not used longer.
const LONGEST_TTL: Duration = Duration::from_secs(30);
/// One question to one server.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Names that are remembered.
const CACHED: u64 = 1024;

/// Names to addresses.
pub trait Resolve: Send + Sync {
    /// Every address that the name has, at least one.
    fn addresses<'a>(&'a self, host: &'a Hostname) -> BoxFuture<'a, Result<Vec<IpAddr>, String>>;
}

/// The resolver cannot be set up.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up the resolver: {0}; name the servers by --nameserver")]
pub struct ResolverError(#[from] NetError);

/// DNS.
pub struct Dns(TokioResolver);

impl Dns {
    /// A resolver that asks these servers, or the system's where there are none.
    ///
    /// # Errors
    /// If the system's configuration cannot be read.
    pub fn new(servers: &[SocketAddr]) -> Result<Self, ResolverError> {
        let servers = if servers.is_empty() {
            system_conf::read_system_conf()?.0.name_servers().to_vec()
        } else {
            servers.iter().map(name_server).collect()
        };
        let config = ResolverConfig::from_parts(None, Vec::new(), servers);
        let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
        *builder.options_mut() = options();
        Ok(Self(builder.build()?))
    }
}

fn name_server(address: &SocketAddr) -> NameServerConfig {
    let on_port = |mut connection: ConnectionConfig| {
        connection.port = address.port();
        connection
    };
    let connections = vec![on_port(ConnectionConfig::udp()), on_port(ConnectionConfig::tcp())];
    NameServerConfig::new(address.ip(), true, connections)
}

fn options() -> ResolverOpts {
    let mut options = ResolverOpts::default();
    options.ndots = 0;
    options.timeout = TIMEOUT;
    options.attempts = 2;
    options.cache_size = CACHED;
    options.use_hosts_file = ResolveHosts::Never;
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    options.positive_max_ttl = Some(LONGEST_TTL);
    options.negative_max_ttl = Some(LONGEST_TTL);
    // Off-path answers have more to guess.
    options.case_randomization = true;
    options
}

impl Resolve for Dns {
    fn addresses<'a>(&'a self, host: &'a Hostname) -> BoxFuture<'a, Result<Vec<IpAddr>, String>> {
        Box::pin(async move {
            let mut name = Name::from_ascii(host.as_str()).map_err(|e| e.to_string())?;
            // Fully qualified: asked for as it is.
            name.set_fqdn(true);
            let found = self.0.lookup_ip(name).await.map_err(|e| e.to_string())?;
            let mut addresses: Vec<_> = found.iter().collect();
            addresses.sort();
            addresses.dedup();
            if addresses.is_empty() { Err("the name has no addresses".to_owned()) } else { Ok(addresses) }
        })
    }
}

#[cfg(test)]
mod tests;
