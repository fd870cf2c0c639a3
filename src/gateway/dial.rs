//! From a host name to a connection: resolve the name, check every address, connect to one of them, and start TLS.
//!
//! Guarantees: the address that is dialled was checked, for the very name that is sent in SNI and checked against the certificate. Each
//! step ends in bounded time.
//!
//! Denies: a name with any blocked address, unless an address was set for the name by hand (`vouching`), or the administrator of the
//! cluster has opened its addresses to the name ([`Opened`]).

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures::future::BoxFuture;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{refusal::Refused, resolve::Resolve};
use crate::policy::{
    egress::Blocked,
    hostname::{Authority, Hostname},
    private::{self, PrivateUpstream},
    rule::Rule,
};

/// Time limit for resolving a name, with all retries and servers.
const RESOLVE: Duration = Duration::from_secs(8);
/// Idle time after which keep-alive probes start, which are then sent about every minute.
const KEEP_ALIVE: Duration = Duration::from_secs(60);
/// Time limit for connecting to one address.
const CONNECT: Duration = Duration::from_secs(5);
/// Maximum number of addresses that are tried.
const TRIED: usize = 3;
/// Time limit for the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Opens TCP connections.
pub trait Connect: Send + Sync {
    /// Connects to exactly this address.
    fn connect(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>>;
}

/// The network of this machine.
pub struct Network;

impl Connect for Network {
    fn connect(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(address))
    }
}

/// The addresses that belong to the cluster itself.
pub trait Own: Send + Sync {
    /// Returns a description of each address that is a node, an API server or an agent's pod, in the order of `addresses`.
    ///
    /// # Errors
    /// Returns the reason why the addresses of the cluster are not known now. Nothing private is dialled then.
    fn describe<'a>(&'a self, addresses: &'a [IpAddr]) -> BoxFuture<'a, Result<Vec<Option<&'static str>>, String>>;
}

/// Private addresses that the administrator of the cluster has opened, and those among them that stay closed.
pub struct Opened {
    /// The entries.
    pub entries: Vec<PrivateUpstream>,
    /// The addresses of the cluster itself.
    pub own: Arc<dyn Own>,
}

/// Dials upstreams.
pub struct Dialer {
    resolve: Arc<dyn Resolve>,
    blocked: Blocked,
    opened: Option<Opened>,
    connect: Arc<dyn Connect>,
    tls: TlsConnector,
    vouched: HashMap<Hostname, SocketAddr>,
    /// Whether the user who sees an error can set an address for a name, because the gateway runs on the user's own machine.
    can_vouch: bool,
}

impl Dialer {
    /// Returns a dialer that trusts these authorities.
    pub fn new(resolve: Arc<dyn Resolve>, blocked: Blocked, connect: Arc<dyn Connect>, roots: RootCertStore) -> Self {
        let mut tls = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Self {
            resolve,
            blocked,
            opened: None,
            connect,
            tls: TlsConnector::from(Arc::new(tls)),
            vouched: HashMap::new(),
            can_vouch: false,
        }
    }

    /// Opens private addresses to names.
    #[must_use]
    pub fn opening(mut self, opened: Opened) -> Self {
        self.opened = Some(opened);
        self
    }

    /// Sets addresses for names by hand. They are dialled whatever they are, and an address with a port whichever port was requested.
    /// Allowlists apply to these names as to all others.
    #[must_use]
    pub fn vouching(mut self, vouched: HashMap<Hostname, SocketAddr>) -> Self {
        self.vouched = vouched;
        self.can_vouch = true;
        self
    }

    /// Returns whether data sent to the host stays on this machine, because a loopback address was set for it by hand. A name server cannot
    /// cause this.
    pub fn stays_here(&self, host: &Hostname) -> bool {
        self.vouched.get(host).is_some_and(|address| address.ip().is_loopback())
    }

    /// Returns a hint how to set an address for a name, if the user can do so.
    fn by_hand(&self, host: &Hostname, address: Option<IpAddr>) -> String {
        let address = address.map_or_else(|| "ADDRESS".to_owned(), |address| address.to_string());
        if self.can_vouch {
            format!(
                "; `belay run --resolve {host}={address}` sets its address, and --upstream {host}=COMMAND starts a server for it"
            )
        } else {
            String::new()
        }
    }

    /// Returns a hint how a blocked address of a name can be reached.
    fn remedy(&self, host: &Hostname, address: Option<IpAddr>) -> String {
        match (self.can_vouch, address) {
            (false, Some(address)) if private::can_be_opened(address) => {
                format!(
                    "; the cluster's administrator can open the address to {host}, with gateway.privateUpstreams of the chart"
                )
            }
            _ => self.by_hand(host, address),
        }
    }

    /// Returns whether the administrator has opened these addresses to the host.
    async fn opens(&self, host: &Hostname, addresses: &[IpAddr]) -> Result<bool, Refused> {
        let Some(opened) = &self.opened else { return Ok(false) };
        let is_opened = private::opened(&opened.entries, host, addresses);
        if !is_opened.map_err(|denied| Refused::denied(denied.rule, denied.reason))? {
            return Ok(false);
        }
        let own = tokio::time::timeout(RESOLVE, opened.own.describe(addresses)).await;
        let own = own.unwrap_or_else(|_| Err("no answer in time".to_owned())).map_err(|cause| {
            let reason = format!("cannot check the addresses of {host}, which are private: the API server was asked for the cluster's own addresses: {cause}");
            Refused::upstream(Rule::UpstreamResolve, reason)
        })?;
        let closed = addresses.iter().zip(own).find_map(|(address, own)| Some((address, own?)));
        match closed {
            Some((address, what)) => Err(Refused::denied(
                Rule::EgressAddress,
                format!(
                    "{host} resolves to {address}, which is {what}: Belay never connects to it, whatever is opened"
                ),
            )),
            None => Ok(true),
        }
    }

    /// Connects to one of a host's addresses.
    ///
    /// # Errors
    /// Returns [`Rule::EgressAddress`] if any of its addresses is blocked, or an upstream rule if the host cannot be reached.
    pub async fn dial(&self, to: &Authority) -> Result<(TcpStream, SocketAddr), Refused> {
        let addresses = self.addresses(to).await?;
        self.connect(&to.host, &addresses).await
    }

    /// Returns the addresses that a host has now, after checking all of them.
    ///
    /// # Errors
    /// Returns [`Rule::EgressAddress`] if any of them is blocked, or [`Rule::UpstreamResolve`] if there are none.
    pub async fn addresses(&self, to: &Authority) -> Result<Vec<SocketAddr>, Refused> {
        let Authority { host, port } = to;
        if let Some(address) = self.vouched.get(host) {
            let port = if address.port() == 0 { *port } else { address.port() };
            return Ok(vec![SocketAddr::new(address.ip(), port)]);
        }
        let resolved = tokio::time::timeout(RESOLVE, self.resolve.addresses(host)).await;
        let unresolved = |cause: &str| {
            let reason = format!("cannot resolve {host}: {cause}{}", self.by_hand(host, None));
            Refused::upstream(Rule::UpstreamResolve, reason)
        };
        let addresses = match resolved {
            Ok(Ok(addresses)) if !addresses.is_empty() => addresses,
            Ok(Ok(_)) => return Err(unresolved("it has no addresses")),
            Ok(Err(cause)) => return Err(unresolved(&cause)),
            Err(_) => return Err(unresolved("no answer in time")),
        };
        if !self.opens(host, &addresses).await? {
            self.blocked.check(host, &addresses).map_err(|denied| {
                let blocked = addresses.iter().copied().find(|address| self.blocked.reason(*address).is_some());
                Refused::denied(denied.rule, format!("{}{}", denied.reason, self.remedy(host, blocked)))
            })?;
        }
        Ok(addresses.into_iter().map(|ip| SocketAddr::new(ip, *port)).collect())
    }

    /// Connects to one of a host's checked addresses.
    ///
    /// # Errors
    /// Returns [`Rule::UpstreamConnect`] if none of the first `TRIED` accepts a connection.
    pub async fn connect(&self, host: &Hostname, addresses: &[SocketAddr]) -> Result<(TcpStream, SocketAddr), Refused> {
        let mut last = String::new();
        for address in addresses.iter().copied().take(TRIED) {
            match tokio::time::timeout(CONNECT, self.connect.connect(address)).await {
                Ok(Ok(stream)) => {
                    // Send small frames of a stream at once.
                    let _ = stream.set_nodelay(true);
                    keep_alive(&stream);
                    return Ok((stream, address));
                }
                Ok(Err(error)) => last = format!("{address}: {error}"),
                Err(_) => last = format!("{address}: no connection in {CONNECT:?}"),
            }
        }
        Err(Refused::upstream(Rule::UpstreamConnect, format!("cannot connect to {host} at {last}")))
    }

    /// Performs the TLS handshake as a client of this host.
    ///
    /// # Errors
    /// Returns [`Rule::UpstreamTls`] if the certificate is not valid for the host, or if the peer does not speak TLS.
    pub async fn secure(&self, host: &Hostname, stream: TcpStream) -> Result<TlsStream<TcpStream>, Refused> {
        let failed = |cause: String| Refused::upstream(Rule::UpstreamTls, format!("no TLS with {host}: {cause}"));
        let name = ServerName::try_from(host.as_str().to_owned()).map_err(|e| failed(e.to_string()))?;
        match tokio::time::timeout(HANDSHAKE, self.tls.connect(name, stream)).await {
            Ok(shaken) => shaken.map_err(|error| failed(unshaken(&error))),
            Err(_) => Err(failed(format!("no handshake in {HANDSHAKE:?}"))),
        }
    }
}

/// Returns the reason of a failed handshake as text for users.
fn unshaken(error: &io::Error) -> String {
    let said = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match said {
        // The reply is not a TLS record.
        Some(rustls::Error::InvalidMessage(_)) => {
            "it answers in another protocol, as a server of plain http does; write http:// in its URL, or make it serve https".to_owned()
        }
        _ if error.kind() == io::ErrorKind::UnexpectedEof => {
            "it ended the connection before TLS began, as some servers of plain http do; for such a server, write http:// in its URL".to_owned()
        }
        _ => error.to_string(),
    }
}

/// Enables TCP keep-alive. Firewalls and address translators drop a connection that is idle for some minutes, and a model may be silent for
/// longer.
fn keep_alive(stream: &TcpStream) {
    use rustix::net::sockopt::{set_socket_keepalive, set_tcp_keepidle};
    let set = set_tcp_keepidle(stream, KEEP_ALIVE).and_then(|()| set_socket_keepalive(stream, true));
    if let Err(error) = set {
        tracing::debug!(%error, "an upstream's connection is not kept alive");
    }
}

/// An error in reading certificate authorities.
#[derive(Debug, thiserror::Error)]
#[error("cannot read certificate authorities: {0}; expected PEM certificates")]
pub struct RootsError(String);

/// Returns the web's authorities and those in `pem`.
///
/// # Errors
/// Returns an error if `pem` contains an invalid certificate, or none.
pub fn roots(pem: Option<&[u8]>) -> Result<RootCertStore, RootsError> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    if let Some(pem) = pem {
        let before = roots.len();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|e| RootsError(e.to_string()))?;
            roots.add(certificate).map_err(|e| RootsError(e.to_string()))?;
        }
        if roots.len() == before {
            return Err(RootsError("found none".to_owned()));
        }
    }
    Ok(roots)
}

#[cfg(test)]
mod tests;
