//! Names to addresses, by the gateway's own resolver.
//!
//! Guarantees: asks the configured name servers for exactly the name that was matched, A and AAAA. An address counts only if its record
//! is owned by that name, or by the name that an unbroken chain of aliases leads to; whatever else an answer holds is ignored.
//! Each answer is bounded in time and cached no longer than its TTL and half a minute.
//! Non-goals: search domains, `/etc/hosts`, DNSSEC, and judging addresses, which is
//! [`egress::Blocked`](crate::policy::egress::Blocked)'s.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use futures::future::BoxFuture;
use hickory_resolver::{
    Resolver, TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    net::{NetError, runtime::TokioRuntimeProvider},
    proto::{
        op::ResponseCode,
        rr::{DNSClass, Name, RData, Record, RecordType},
    },
    system_conf,
};

use crate::policy::hostname::Hostname;

/// An address that is good now may be another's soon: a cached one is not used longer.
const LONGEST_TTL: Duration = Duration::from_secs(30);
/// One question to one server.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Aliases from the name that is asked for to the one that has addresses. Content networks need five or so.
const LONGEST_CHAIN: usize = 12;
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
    // Without the aliases in between, it could not be told whose an address is.
    options.preserve_intermediates = true;
    options.positive_max_ttl = Some(LONGEST_TTL);
    options.negative_max_ttl = Some(LONGEST_TTL);
    // Off-path answers have more to guess.
    options.case_randomization = true;
    options
}

/// Why a question brought no addresses.
enum Unusable {
    /// No answer, or one without records.
    Nothing(String),
    /// An answer that contradicts itself: nothing in it, or beside it, is believed.
    Misleading(String),
}

impl Dns {
    /// The addresses of one type that the name has.
    async fn ask(&self, name: &Name, kind: RecordType) -> Result<Vec<IpAddr>, Unusable> {
        let found = self.0.lookup(name.clone(), kind).await.map_err(|error| Unusable::Nothing(unanswered(&error)))?;
        let header = &found.message().metadata;
        if header.response_code != ResponseCode::NoError || header.truncation {
            let reason = format!("expected a whole answer without an error, found one with {}", header.response_code);
            return Err(Unusable::Misleading(reason));
        }
        owned(name, found.answers()).map_err(Unusable::Misleading)
    }
}

impl Resolve for Dns {
    fn addresses<'a>(&'a self, host: &'a Hostname) -> BoxFuture<'a, Result<Vec<IpAddr>, String>> {
        Box::pin(async move {
            let mut name = Name::from_ascii(host.as_str()).map_err(|e| e.to_string())?;
            // Fully qualified: asked for as it is.
            name.set_fqdn(true);
            let asked = futures::join!(self.ask(&name, RecordType::A), self.ask(&name, RecordType::AAAA));
            let mut addresses = match asked {
                (Err(Unusable::Misleading(why)), _) | (_, Err(Unusable::Misleading(why))) => return Err(why),
                (Err(Unusable::Nothing(why)), Err(_)) => return Err(why),
                // Some servers do not answer one of the two questions.
                (four, six) => [four.unwrap_or_default(), six.unwrap_or_default()].concat(),
            };
            addresses.sort();
            addresses.dedup();
            if addresses.is_empty() { Err("the name has no addresses".to_owned()) } else { Ok(addresses) }
        })
    }
}

/// Why there is no answer, for people.
fn unanswered(error: &NetError) -> String {
    if error.is_nx_domain() {
        return "there is no such name, as its name server says".to_owned();
    }
    match error {
        _ if error.is_no_records_found() => "the name server has no address for it".to_owned(),
        NetError::Timeout => "no name server has answered in time".to_owned(),
        NetError::NoConnections | NetError::Io(_) => format!("no name server can be reached ({error})"),
        other => other.to_string(),
    }
}

/// The addresses in an answer that are the name's own. An answer may hold any records: a server that may speak for one name only
/// would otherwise lend it the addresses of another.
///
/// # Errors
/// If the aliases lead nowhere in particular: two of one name, an alias beside an address, a circle, or too many.
fn owned(name: &Name, answers: &[Record]) -> Result<Vec<IpAddr>, String> {
    let mut owner = name;
    for _ in 0..=LONGEST_CHAIN {
        // Names are compared without case, as RFC 4343 has it.
        let of_owner = || answers.iter().filter(|record| record.dns_class == DNSClass::IN && record.name == *owner);
        let addresses: Vec<IpAddr> = of_owner().filter_map(|record| record.data.ip_addr()).collect();
        let mut aliases = of_owner().filter_map(|record| match &record.data {
            RData::CNAME(alias) => Some(&alias.0),
            _ => None,
        });
        let Some(alias) = aliases.next() else { return Ok(addresses) };
        if aliases.any(|other| other != alias) || !addresses.is_empty() {
            return Err(format!("{owner} has an alias and something else, which may not be"));
        }
        owner = alias;
    }
    Err(format!("the aliases of {name} go in a circle, or are more than {LONGEST_CHAIN}"))
}

#[cfg(test)]
mod tests;
