//! The values of options.
//!
//! Rejects: invalid values, when the command line is parsed; and a credential itself, because all who list processes would see it.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

use crate::{cli::CliError, policy::hostname::Hostname};

/// Splits `HOST=REST`, if there is a `=`.
fn of_host(text: &str) -> Option<Result<(Hostname, &str), String>> {
    let (host, rest) = text.split_once('=')?;
    Some(Hostname::parse(host).map(|host| (host, rest)).map_err(|error| error.to_string()))
}

/// An option `HOST=ADDRESS[:PORT]`.
#[derive(Clone, Debug)]
pub(super) struct Resolved {
    pub(super) host: Hostname,
    /// The address, with port 0 if none was given.
    pub(super) address: SocketAddr,
}

impl FromStr for Resolved {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("expected HOST=ADDRESS or HOST=ADDRESS:PORT, found {text:?}");
        let (host, address) = of_host(text).ok_or_else(expected)??;
        let alone = address.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 0));
        let address = alone.or_else(|_| address.parse()).map_err(|_| expected())?;
        Ok(Self { host, address })
    }
}

impl Resolved {
    /// Returns the form in which it is recorded.
    pub(super) fn text(&self) -> String {
        let Self { host, address } = self;
        if address.port() == 0 { format!("{host}={}", address.ip()) } else { format!("{host}={address}") }
    }
}

/// An option `SECRET/KEY=env:VARIABLE` or `SECRET/KEY=file:PATH`.
#[derive(Clone, Debug)]
pub(super) struct Credential {
    pub(super) secret: String,
    pub(super) key: String,
    pub(super) from: From,
}

#[derive(Clone, Debug)]
pub(super) enum From {
    Variable(String),
    File(PathBuf),
}

impl FromStr for Credential {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            "expected SECRET/KEY=env:VARIABLE or SECRET/KEY=file:PATH; a value itself would be seen by all who list processes".to_owned()
        };
        let (name, from) = text.split_once('=').ok_or_else(expected)?;
        let (secret, key) = name.split_once('/').ok_or_else(expected)?;
        let from = match from.split_once(':') {
            Some(("env", variable)) if !variable.is_empty() => From::Variable(variable.to_owned()),
            Some(("file", path)) if !path.is_empty() => From::File(path.into()),
            _ => return Err(expected()),
        };
        Ok(Self { secret: secret.to_owned(), key: key.to_owned(), from })
    }
}

impl Credential {
    pub(super) fn value(&self) -> Result<Vec<u8>, CliError> {
        let named = format!("--credential {}/{}", self.secret, self.key);
        let value = match &self.from {
            From::Variable(name) => std::env::var(name)
                .map_err(|_| {
                    CliError::new(format!(
                        "{named}: expected a key in the environment variable {name}, found none; set it"
                    ))
                })?
                .into_bytes(),
            From::File(path) => {
                fs::read(path).map_err(|e| CliError::new(format!("{named}: cannot read {}: {e}", path.display())))?
            }
        };
        let value = value.trim_ascii().to_vec();
        if value.is_empty() { Err(CliError::new(format!("{named}: expected a key, found nothing"))) } else { Ok(value) }
    }
}

/// An option `HOST=COMMAND`.
#[derive(Clone, Debug)]
pub(super) struct Server {
    pub(super) host: Hostname,
    pub(super) command: String,
}

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("expected HOST=COMMAND, such as shop.test='python3 shop.py', found {text:?}");
        let (host, command) = of_host(text).ok_or_else(expected)??;
        if command.trim().is_empty() { Err(expected()) } else { Ok(Self { host, command: command.to_owned() }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("localhost=127.0.0.1:11434", Some("localhost=127.0.0.1:11434"))]
    #[case("models.example.com=10.0.0.7", Some("models.example.com=10.0.0.7"))]
    #[case("m.example.com=[::1]:80", Some("m.example.com=[::1]:80"))]
    #[case("127.0.0.1=127.0.0.1", None)]
    #[case("localhost", None)]
    #[case("localhost=example.com", None)]
    fn an_address_by_hand(#[case] text: &str, #[case] expected: Option<&str>) {
        assert_eq!(text.parse::<Resolved>().ok().map(|one| one.text()).as_deref(), expected);
    }

    #[test]
    fn a_key_is_never_an_argument() {
        assert!("model/token=env:KEY".parse::<Credential>().is_ok());
        assert!("model/token=file:key".parse::<Credential>().is_ok());
        for wrong in ["model/token=sk-123", "model=env:KEY", "model/token=env:", "model/token"] {
            assert!(wrong.parse::<Credential>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_server_has_a_host_and_a_command() {
        let server: Server = "shop.test=PORT=$PORT python3 shop.py".parse().unwrap();
        assert_eq!((server.host.as_str(), server.command.as_str()), ("shop.test", "PORT=$PORT python3 shop.py"));
        for wrong in ["shop.test", "shop.test= ", "=python3 shop.py", "127.0.0.1=python3 shop.py"] {
            assert!(wrong.parse::<Server>().is_err(), "{wrong}");
        }
    }
}
