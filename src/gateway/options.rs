//! What the gateway is told when it starts. Every flag has an environment variable.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

use clap::Parser;
use ipnet::IpNet;

/// Belay's policy gateway: the only way out of agents' pods, and the witness of their evidence.
#[derive(Clone, Debug, Parser)]
#[command(name = "belay-gateway", version)]
pub struct Options {
    /// Address for harnesses and the operator (TLS).
    #[arg(long, env = "BELAY_LISTEN", default_value = "0.0.0.0:8443")]
    pub listen: SocketAddr,
    /// Address of the canary, which containment probes expect not to reach.
    #[arg(long, env = "BELAY_CANARY_LISTEN", default_value = "0.0.0.0:8444")]
    pub canary_listen: SocketAddr,
    /// Address for /healthz, /readyz and /metrics.
    #[arg(long, env = "BELAY_ADMIN_LISTEN", default_value = "0.0.0.0:8080")]
    pub admin_listen: SocketAddr,
    /// Folder with tls.crt and tls.key. Read again when it changes.
    #[arg(long, env = "BELAY_TLS_DIR", default_value = "/etc/belay/tls")]
    pub tls_dir: PathBuf,
    /// The witness's Ed25519 key, PKCS#8 DER.
    #[arg(long, env = "BELAY_WITNESS_KEY", default_value = "/etc/belay/witness/witness.pk8")]
    pub witness_key: PathBuf,
    /// Namespace of the operator and of upstream credentials.
    #[arg(long, env = "BELAY_SYSTEM_NAMESPACE", default_value = "belay-system")]
    pub system_namespace: String,
    /// URL of an object store that is not AWS.
    #[arg(long, env = "BELAY_S3_ENDPOINT")]
    pub s3_endpoint: Option<String>,
    /// Region of the buckets.
    #[arg(long, env = "BELAY_S3_REGION")]
    pub s3_region: Option<String>,
    /// Address buckets as endpoint/bucket rather than bucket.endpoint.
    #[arg(long, env = "BELAY_S3_PATH_STYLE")]
    pub s3_path_style: bool,
    /// PEM file of authorities to trust for the object store, beside the system's.
    #[arg(long, env = "BELAY_S3_CA")]
    pub s3_ca: Option<PathBuf>,
    /// A name server, ADDRESS or ADDRESS:PORT; may be given again. The system's when absent.
    #[arg(long, env = "BELAY_NAMESERVER", value_delimiter = ',')]
    pub nameserver: Vec<NameServer>,
    /// PEM file of authorities to trust for upstreams, beside the web's.
    #[arg(long, env = "BELAY_UPSTREAM_CA")]
    pub upstream_ca: Option<PathBuf>,
    /// Addresses that are never dialled, beside the built-in ones: name the pods', Services' and nodes' CIDRs, above all
    /// if they are public. May be given again.
    #[arg(long, env = "BELAY_BLOCKED_CIDR", value_delimiter = ',')]
    pub blocked_cidr: Vec<IpNet>,
}

/// A name server's address, with port 53 where none is given.
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
        ]);
        assert_eq!((options.blocked_cidr.len(), options.nameserver.len()), (2, 1));
    }
}
