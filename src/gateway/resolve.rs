//! Name resolution by the gateway's own resolver.
//!
//! Guarantees: the resolver queries the configured name servers for exactly the name that was matched, for A and AAAA records. An address
//! counts only if its record is owned by that name, or by the name at the end of an unbroken chain of aliases; all other records of an
//! answer are ignored. Each query is bounded in time. An answer is cached no longer than its TTL and no longer than half a minute.
//!
//! Non-goals: search domains, `/etc/hosts`, DNSSEC, and checking addresses, which [`egress::Blocked`](crate::policy::egress::Blocked) does.

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

/// Maximum time that an address is cached, because it may belong to another party soon.
const LONGEST_TTL: Duration = Duration::from_secs(30);
/// Time limit for one query to one server.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of aliases between the queried name and the one that has addresses. Content delivery networks need about five.
const LONGEST_CHAIN: usize = 12;
/// Maximum number of cached names.
const CACHED: u64 = 1024;

/// Resolves names.
pub trait Resolve: Send + Sync {
    /// Returns every address of the name, at least one.
    fn addresses<'a>(&'a self, host: &'a Hostname) -> BoxFuture<'a, Result<Vec<IpAddr>, String>>;
}

/// An error in setting up the resolver.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up the resolver: {0}; name the servers by --nameserver")]
pub struct ResolverError(#[from] NetError);

/// The DNS resolver.
pub struct Dns(TokioResolver);

impl Dns {
    /// Returns a resolver for these servers, or for the system's if there are none.
    ///
    /// # Errors
    /// Returns an error if the system's configuration cannot be read.
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
    // Without the aliases between, the owner of an address could not be checked.
    options.preserve_intermediates = true;
    options.positive_max_ttl = Some(LONGEST_TTL);
    options.negative_max_ttl = Some(LONGEST_TTL);
    // Makes answers harder to forge for an attacker who does not see the query.
    options.case_randomization = true;
    options
}

/// Why a query returned no addresses.
enum Unusable {
    /// No answer, or one without records.
    Nothing(String),
    /// A contradictory answer. Neither it nor the answer to the other query is used.
    Misleading(String),
}

impl Dns {
    /// Returns the addresses of one record type that the name has.
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
            // A fully qualified name is queried as it is.
            name.set_fqdn(true);
            let asked = futures::join!(self.ask(&name, RecordType::A), self.ask(&name, RecordType::AAAA));
            let mut addresses = match asked {
                (Err(Unusable::Misleading(why)), _) | (_, Err(Unusable::Misleading(why))) => return Err(why),
                (Err(Unusable::Nothing(why)), Err(_)) => return Err(why),
                // Some servers do not answer one of the two queries.
                (four, six) => [four.unwrap_or_default(), six.unwrap_or_default()].concat(),
            };
            addresses.sort();
            addresses.dedup();
            if addresses.is_empty() { Err("the name has no addresses".to_owned()) } else { Ok(addresses) }
        })
    }
}

/// Returns the reason of a failed query as text for users.
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

/// Returns the addresses in an answer that belong to the name. An answer may contain any records, so a server that is responsible for one
/// name could otherwise give it the addresses of another.
///
/// # Errors
/// Returns an error if the aliases are ambiguous: two for one name, an alias beside an address, a cycle, or too many.
fn owned(name: &Name, answers: &[Record]) -> Result<Vec<IpAddr>, String> {
    let mut owner = name;
    for _ in 0..=LONGEST_CHAIN {
        // Names are compared without case, as in RFC 4343.
        let of_owner = || answers.iter().filter(|record| record.dns_class == DNSClass::IN && record.name == *owner);
        let addresses: Vec<IpAddr> = of_owner().filter_map(|record| record.data.ip_addr()).collect();
        let mut aliases = of_owner().filter_map(|record| match &record.data {
            RData::CNAME(alias) => Some(&alias.0),
            _ => None,
        });
        let Some(alias) = aliases.next() else { return Ok(addresses) };
        if aliases.any(|other| other != alias) || !addresses.is_empty() {
            return Err(format!("{owner} has an alias and other records, which DNS forbids"));
        }
        owner = alias;
    }
    Err(format!("the aliases of {name} form a circle, or are more than {LONGEST_CHAIN}"))
}

#[cfg(test)]
mod tests;
