//! Parses host names into one form.
//!
//! Guarantees: a [`Hostname`] is a DNS name in lower-case ASCII (IDNA applied), of non-empty letter-digit-hyphen labels, without a trailing
//! dot, at most 253 octets long. This one value is matched, resolved, sent as SNI and written into `Host`, so these uses cannot differ.
//! Rejects: addresses in any notation (`127.1`, `2130706433`, `0x7f000001`, `[::1]`), userinfo, ports, zone IDs, percent-encoding, control
//! characters, and names that IDNA does not accept.

use std::{fmt, str::FromStr};

use idna::uts46::{AsciiDenyList, DnsLength, Hyphens, Uts46};

/// Longest text that is parsed: a name of 253 octets, each written as the longest UTF-8 sequence.
const LONGEST_INPUT: usize = 253 * 4;

/// An error of a text that is not a host name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostnameError {
    /// The text is empty.
    #[error("expected a host name, found nothing")]
    Empty,
    /// The text is longer than any name.
    #[error("expected a host name of at most 253 octets, found more")]
    Long,
    /// A character that only addresses, URLs and attacks contain.
    #[error("expected a host name of letters, digits, hyphens and dots, found {0:?}")]
    Character(char),
    /// An IPv4 address in any notation.
    #[error("expected a host name, found an address: addresses are not names; use the name that is on the allowlist")]
    Address,
    /// A name that IDNA (UTS 46, STD3) does not accept.
    #[error(
        "expected a host name of labels of 1 to 63 letters, digits and inner hyphens, found something else (IDNA, UTS 46)"
    )]
    Idna,
}

/// A DNS name in its canonical form.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hostname(Box<str>);

impl Hostname {
    /// Parses a host name and nothing else: no port, no scheme.
    ///
    /// # Errors
    /// Returns an error that says what is wrong.
    pub fn parse(text: &str) -> Result<Self, HostnameError> {
        if text.is_empty() {
            return Err(HostnameError::Empty);
        }
        if text.len() > LONGEST_INPUT {
            return Err(HostnameError::Long);
        }
        // IDNA rejects most of these characters as well. This check gives a better error message.
        if let Some(c) = text.chars().find(|c| c.is_control() || c.is_whitespace() || "%@[]:/\\?#".contains(*c)) {
            return Err(HostnameError::Character(c));
        }
        let ascii = Uts46::new()
            .to_ascii(text.as_bytes(), AsciiDenyList::STD3, Hyphens::CheckFirstLast, DnsLength::VerifyAllowRootDot)
            .map_err(|_| HostnameError::Idna)?;
        let name = ascii.strip_suffix('.').unwrap_or(&ascii);
        // The name is only a root dot, or only the trailing dot made it fit the length.
        if name.is_empty() {
            return Err(HostnameError::Empty);
        }
        if name.len() > 253 {
            return Err(HostnameError::Long);
        }
        // This check comes after the mapping, so it sees what full-width digits and ideographic dots become. No top-level domain is a
        // number, and every resolver library that reads `127.1` or `0x7f.1` as an address recognizes it by a numeric last label.
        if name.rsplit('.').next().is_some_and(is_numeric) {
            return Err(HostnameError::Address);
        }
        Ok(Self(name.into()))
    }

    /// Returns the name: lower-case ASCII without a trailing dot.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns whether the name is `domain` with exactly one more label before it.
    pub fn is_one_below(&self, domain: &Hostname) -> bool {
        self.0.split_once('.').is_some_and(|(_, rest)| rest == &*domain.0)
    }
}

/// Returns whether a label is a decimal, octal or hexadecimal number, as `inet_aton` reads it.
fn is_numeric(label: &str) -> bool {
    label.bytes().all(|b| b.is_ascii_digit())
        || label.strip_prefix("0x").is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

impl fmt::Display for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Hostname {
    type Err = HostnameError;

    fn from_str(text: &str) -> Result<Self, HostnameError> {
        Self::parse(text)
    }
}

/// An error of a text that is not `host:port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    /// The host is invalid.
    #[error(transparent)]
    Host(#[from] HostnameError),
    /// The port is invalid.
    #[error("expected a port from 1 to 65535 in plain decimal digits, found something else")]
    Port,
}

/// The host and port of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Authority {
    /// The host.
    pub host: Hostname,
    /// The port, never 0.
    pub port: u16,
}

impl Authority {
    /// Parses `host:port`, or `host` if there is a default port.
    ///
    /// # Errors
    /// Returns an error if the host is not a host name, or if the port is not a plain number from 1 to 65535.
    pub fn parse(text: &str, default_port: Option<u16>) -> Result<Self, AuthorityError> {
        // This check comes first, because in a text with these characters a colon need not precede a port.
        if let Some(c) = text.chars().find(|c| "@[]".contains(*c)) {
            return Err(HostnameError::Character(c).into());
        }
        let (host, port) = match (text.rsplit_once(':'), default_port) {
            (Some((host, port)), _) => (host, port_number(port).ok_or(AuthorityError::Port)?),
            (None, Some(port)) => (text, port),
            (None, None) => return Err(AuthorityError::Port),
        };
        Ok(Self { host: Hostname::parse(host)?, port })
    }

    /// Checks the `Host` values of a request to this authority: none, or exactly one that names the same host and port. If they could
    /// differ, a server of several hosts could take the request for another host's (RFC 9112, section 3.2).
    pub fn fits<'a>(&self, hosts: impl IntoIterator<Item = &'a [u8]>) -> bool {
        let mut hosts = hosts.into_iter();
        match (hosts.next(), hosts.next()) {
            (None, _) => true,
            (Some(host), None) => {
                let host = std::str::from_utf8(host).ok().and_then(|host| Self::parse(host, Some(self.port)).ok());
                host.as_ref() == Some(self)
            }
            _ => false,
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Parses a port. Each port has one notation: no sign, no leading zero, no spaces.
fn port_number(text: &str) -> Option<u16> {
    let plain = !text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| plain)
}

#[cfg(test)]
mod tests;
