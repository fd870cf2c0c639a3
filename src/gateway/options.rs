//! The command-line options of the gateway. Every flag has an environment variable.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

use clap::Parser;
use ipnet::IpNet;

use crate::policy::private::PrivateUpstream;

/// Belay's policy gateway: the only way out of agents' pods, and the witness of their evidence.
#[derive(Clone, Debug, Parser)]
#[command(name = "belay-gateway", version)]
pub struct Options {
    /// Address that serves harnesses and the operator over TLS.
    #[arg(long, env = "BELAY_LISTEN", default_value = "0.0.0.0:8443")]
    pub listen: SocketAddr,
    /// Address of the canary, which containment probes must not reach.
    #[arg(long, env = "BELAY_CANARY_LISTEN", default_value = "0.0.0.0:8444")]
    pub canary_listen: SocketAddr,
    /// Address that serves /healthz, /readyz and /metrics.
    #[arg(long, env = "BELAY_ADMIN_LISTEN", default_value = "0.0.0.0:8080")]
    pub admin_listen: SocketAddr,
    /// Folder with tls.crt and tls.key. Reloaded when it changes.
    #[arg(long, env = "BELAY_TLS_DIR", default_value = "/etc/belay/tls")]
    pub tls_dir: PathBuf,
    /// File with the witness's Ed25519 key, as PKCS#8 DER.
    #[arg(long, env = "BELAY_WITNESS_KEY", default_value = "/etc/belay/witness/witness.pk8")]
    pub witness_key: PathBuf,
    /// Namespace of the operator and of the Secrets with upstream credentials.
    #[arg(long, env = "BELAY_SYSTEM_NAMESPACE", default_value = "belay-system")]
    pub system_namespace: String,
    /// URL of the object store, if it is not AWS.
    #[arg(long, env = "BELAY_S3_ENDPOINT")]
    pub s3_endpoint: Option<String>,
    /// Region of the buckets.
    #[arg(long, env = "BELAY_S3_REGION")]
    pub s3_region: Option<String>,
    /// Address buckets as endpoint/bucket instead of bucket.endpoint.
    #[arg(long, env = "BELAY_S3_PATH_STYLE")]
    pub s3_path_style: bool,
    /// PEM file of certificate authorities to trust for the object store, in addition to the system's.
    #[arg(long, env = "BELAY_S3_CA")]
    pub s3_ca: Option<PathBuf>,
    /// Name server, as ADDRESS or ADDRESS:PORT. May be repeated. Without it the system's name servers are used.
    #[arg(long, env = "BELAY_NAMESERVER", value_delimiter = ',')]
    pub nameserver: Vec<NameServer>,
    /// PEM file of certificate authorities to trust for upstreams, in addition to the web's.
    #[arg(long, env = "BELAY_UPSTREAM_CA")]
    pub upstream_ca: Option<PathBuf>,
    /// CIDR of addresses that are never dialled, in addition to the built-in ones. Name the CIDRs of pods, Services and nodes, especially
    /// if they are public. May be repeated.
    #[arg(long, env = "BELAY_BLOCKED_CIDR", value_delimiter = ',')]
    pub blocked_cidr: Vec<IpNet>,
    /// Private addresses that the gateway dials for a host, as HOST=CIDR,CIDR. HOST is a name, or `*.DOMAIN` for the names exactly one label
    /// below a domain. May be repeated. Nodes, API servers, agents' pods and metadata services are never dialled.
    #[arg(long, env = "BELAY_PRIVATE_UPSTREAM", value_delimiter = ' ')]
    pub private_upstream: Vec<PrivateUpstream>,
}

/// A name server's address. The default port is 53.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NameServer(pub SocketAddr);

impl FromStr for NameServer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address = text.parse::<SocketAddr>().or_else(|_| text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53)));
        address.map(Self).map_err(|_| format!("expected an IP address with or without port, found {text:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers() {
        let parse = |text: &str| text.parse::<NameServer>().map(|n| n.0.to_string());
        assert_eq!(parse("198.51.100.53"), Ok("198.51.100.53:53".into()));
        assert_eq!(parse("198.51.100.53:5353"), Ok("198.51.100.53:5353".into()));
        assert_eq!(parse("2001:db8::53"), Ok("[2001:db8::53]:53".into()));
        assert_eq!(parse("[2001:db8::53]:54"), Ok("[2001:db8::53]:54".into()));
        assert!(parse("dns.test").is_err());
    }

    #[test]
    fn flags() {
        use clap::CommandFactory;
        Options::command().debug_assert();
        let options = Options::parse_from([
            "belay-gateway",
            "--blocked-cidr",
            "10.0.0.0/8",
            "--blocked-cidr",
            "2001:db8::/32",
            "--nameserver",
            "1.2.3.4",
            "--private-upstream",
            "search.shop.svc.cluster.local=10.96.0.0/12,fd00::/108",
            "--private-upstream=*.corp.test=192.168.7.0/24",
        ]);
        assert_eq!((options.blocked_cidr.len(), options.nameserver.len()), (2, 1));
        assert_eq!(options.private_upstream.len(), 2);
    }
}
