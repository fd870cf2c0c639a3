//! The model of a new folder's agent, and what follows from it for the files.
//!
//! Guarantees: the pack names the model's host once as an endpoint and once in the egress list. A key appears only by its name.
//!
//! Non-goals: contacting the provider. Whether the model exists shows in the first run.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use http::Uri;

use crate::policy::{
    egress::Blocked,
    hostname::{Hostname, HostnameError},
};

/// The name of this machine in a pack, whose hosts must have a domain. Servers that check the requested name, as Ollama does, accept names
/// below `localhost` (RFC 6761).
const HERE: &str = "model.localhost";
/// The name in a pack of another machine that is known only by its address. No public name has this ending.
const THERE: &str = "model.internal";
/// Endings of names that public name servers do not know.
const OURS: [&str; 12] = [
    "corp",
    "home",
    "home.arpa",
    "internal",
    "intranet",
    "lan",
    "local",
    "localdomain",
    "private",
    "svc",
    "test",
    "vpn",
];

/// The provider of the model, as `--model` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Provider {
    OpenAi,
    Anthropic,
    Ollama,
    /// A server that speaks OpenAI's API, with its base URL.
    Compatible(Base),
}

/// A parsed base URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Base {
    asked: Asked,
    port: u16,
    is_tls: bool,
    /// The path and the query.
    rest: String,
}

/// The host of a URL.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Asked {
    Name(Hostname),
    Address(IpAddr),
}

/// How the gateway of `belay run` finds a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By its name, through public name servers.
    Public,
    /// By this address, which `--resolve` passes.
    At(IpAddr),
    /// By an address that `--resolve` must pass and that is not known here.
    Unknown,
}

/// A host in a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    host: String,
    way: Way,
}

impl FromStr for Provider {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "openai" => Ok(Self::OpenAi),
            "anthropic" => Ok(Self::Anthropic),
            "ollama" => Ok(Self::Ollama),
            url => Base::read(url).map(Self::Compatible),
        }
    }
}

impl Base {
    fn read(text: &str) -> Result<Self, String> {
        let none = || {
            format!(
                "expected openai, anthropic, ollama or the base URL of a server that speaks OpenAI's API, such as \
                 http://localhost:8000/v1, found {text:?}"
            )
        };
        let uri: Uri = text.parse().map_err(|_| none())?;
        let is_tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(none()),
        };
        let (authority, host) = uri.authority().zip(uri.host()).ok_or_else(none)?;
        if authority.as_str().contains('@') {
            return Err(
                "expected a base URL without a user or a key, found one; the gateway gets the key by --credential"
                    .to_owned(),
            );
        }
        let asked = match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            // Servers print this address when they listen on all interfaces. The client connects to this machine.
            Ok(IpAddr::V4(Ipv4Addr::UNSPECIFIED)) => Asked::Address(Ipv4Addr::LOCALHOST.into()),
            Ok(IpAddr::V6(Ipv6Addr::UNSPECIFIED)) => Asked::Address(Ipv6Addr::LOCALHOST.into()),
            Ok(address) => Asked::Address(address),
            Err(_) => Asked::Name(Hostname::parse(host).map_err(|error| match error {
                HostnameError::Address => {
                    format!(
                        "expected a full address in a base URL, such as 127.0.0.1, found {host:?}; write it in full"
                    )
                }
                error => format!("{error}: {host:?} in the base URL; name the server by its address instead"),
            })?),
        };
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        // The whole URL of a call is accepted as a base. The version is a part of the path that agents request.
        let path = uri.path().trim_end_matches('/');
        if path.ends_with("/messages") {
            return Err(format!(
                "expected the base URL of a server that speaks OpenAI's API, found {text:?}, which is for Anthropic's API; \
                 use `--model anthropic` for Anthropic, and `spec.models.anthropic` of the pack for another server"
            ));
        }
        let ends = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/models", "/v1"];
        let path = ends.iter().find_map(|end| path.strip_suffix(end)).unwrap_or(path);
        let rest = uri.query().map_or_else(|| path.to_owned(), |query| format!("{path}?{query}"));
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._~:/%?&=".contains(c);
        if port == 0 || !rest.chars().all(plain) {
            return Err(none());
        }
        Ok(Self { asked, port, is_tls, rest })
    }

    /// Returns the host in the pack and how to find it. `find` returns the addresses that a name has for programs of this machine.
    fn place(&self, find: &dyn Fn(&Hostname) -> Vec<IpAddr>) -> Place {
        let name = match &self.asked {
            Asked::Address(address) => {
                let host = if address.is_loopback() { HERE } else { THERE };
                return Place { host: host.to_owned(), way: Way::At(*address) };
            }
            Asked::Name(name) => name,
        };
        let within = |end: &str| name.as_str().strip_suffix(end).is_some_and(|rest| rest.ends_with('.'));
        if name.as_str() == "localhost" || within("localhost") {
            let host = if within("localhost") { name.as_str() } else { HERE };
            return Place { host: host.to_owned(), way: Way::At(Ipv4Addr::LOCALHOST.into()) };
        }
        // A pack rejects a name without a domain, and the gateway's name servers know none.
        let bare = !name.as_str().contains('.');
        let host = if bare { format!("{name}.internal") } else { name.to_string() };
        let mut found = find(name);
        found.sort_by_key(IpAddr::is_ipv6);
        let inside = found.iter().find(|address| Blocked::default().reason(**address).is_some());
        let way = match (inside, found.first()) {
            (Some(address), _) => Way::At(*address),
            (None, Some(address)) if bare => Way::At(*address),
            (None, None) if bare || OURS.into_iter().any(within) => Way::Unknown,
            (None, _) => Way::Public,
        };
        Place { host, way }
    }
}

/// A model and its location.
#[derive(Clone, Debug)]
pub(super) struct Model {
    provider: Provider,
    name: String,
    base: Base,
    place: Place,
}

impl Model {
    /// Creates a model. `find` returns the addresses that a name has for programs of this machine.
    ///
    /// # Errors
    /// Returns an error if the name of the model is missing and the provider has no usual one, or if the name is not valid.
    pub(super) fn new(
        provider: Provider,
        name: Option<&str>,
        find: &dyn Fn(&Hostname) -> Vec<IpAddr>,
    ) -> Result<Self, String> {
        let usual = match &provider {
            Provider::OpenAi => Some("gpt-4o-mini"),
            Provider::Anthropic => Some("claude-haiku-4-5"),
            Provider::Ollama => Some("llama3.2"),
            Provider::Compatible(_) => None,
        };
        let name = name.or(usual).ok_or("expected the model's name, found none; add --model-name NAME")?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._:/@+".contains(c);
        if name.is_empty() || !name.chars().all(plain) {
            return Err(format!("expected the model's name in letters, digits and -._:/@+, found {name:?}"));
        }
        let base = match &provider {
            Provider::OpenAi => Base::read("https://api.openai.com")?,
            Provider::Anthropic => Base::read("https://api.anthropic.com")?,
            Provider::Ollama => Base::read("http://localhost:11434")?,
            Provider::Compatible(base) => base.clone(),
        };
        // Well-known hosts are not looked up.
        let place = match &provider {
            Provider::OpenAi | Provider::Anthropic => base.place(&|_| Vec::new()),
            Provider::Ollama | Provider::Compatible(_) => base.place(find),
        };
        Ok(Self { provider, name: name.to_owned(), base, place })
    }

    /// Returns the base URL in the pack.
    fn url(&self) -> String {
        let Base { port, is_tls, rest, .. } = &self.base;
        let host = &self.place.host;
        let (scheme, usual) = if *is_tls { ("https", 443) } else { ("http", 80) };
        let place = if *port == usual { host.clone() } else { format!("{host}:{port}") };
        format!("{scheme}://{place}{rest}")
    }

    /// Returns the variable with the key, if the provider needs one. Keys are sent over TLS only.
    fn key(&self) -> Option<&'static str> {
        match &self.provider {
            Provider::OpenAi => Some("OPENAI_API_KEY"),
            Provider::Anthropic => Some("ANTHROPIC_API_KEY"),
            Provider::Ollama => None,
            Provider::Compatible(base) => base.is_tls.then_some("MODEL_API_KEY"),
        }
    }

    /// Returns whether the model is on this machine and is called without TLS.
    fn is_here_in_the_clear(&self) -> bool {
        !self.base.is_tls && matches!(self.place.way, Way::At(address) if address.is_loopback())
    }

    /// Returns whether the agent speaks Anthropic's API.
    pub(super) fn speaks_messages(&self) -> bool {
        self.provider == Provider::Anthropic
    }

    /// Returns the model's lines in the pack: the endpoint, and the host in the class's egress.
    fn lines(&self) -> (String, String) {
        let api = if self.speaks_messages() { "anthropic" } else { "openai" };
        let endpoint = format!("    {api}: {}\n", self.url());
        let listed = |line: &str| format!("          {line}\n");
        let credentials = match self.key() {
            Some(_) => {
                listed("# The gateway adds it. The agent never sees it.")
                    + &listed("credentials: [{secret: model-key, key: token}]")
            }
            None if self.is_here_in_the_clear() && self.provider != Provider::Ollama => {
                listed(
                    "# If it wants a key, with --credential model-key/token=env:MODEL_API_KEY. The agent never sees it.",
                ) + &listed("# credentials: [{secret: model-key, key: token}]")
            }
            None => String::new(),
        };
        let egress = format!(
            "        - host: {}\n          ports: [{}]\n          uses: [Models]\n{credentials}",
            self.place.host, self.base.port
        );
        (endpoint, egress)
    }

    /// Returns the pack with this model in place of the stand-in.
    pub(super) fn pack(&self, standin: &str) -> String {
        let (endpoint, egress) = self.lines();
        let (before, rest) = standin.split_once("  # For a real model").unwrap_or((standin, ""));
        let (_, rest) = rest.split_once("  models:\n    openai: http://shop.test\n").unwrap_or(("", rest));
        let rest = rest.replacen(
            "        - host: shop.test\n          ports: [80]\n          uses: [Models, Tools]\n",
            &format!("{egress}        - host: shop.test\n          ports: [80]\n          uses: [Tools]\n"),
            1,
        );
        format!("{before}  models:\n{endpoint}{rest}")
    }

    /// Returns the agent, which reads the model's name from its environment.
    pub(super) fn agent(&self, with_standin: &str) -> String {
        with_standin.replacen(r#"os.environ.get("MODEL", "stand-in")"#, r#"os.environ["MODEL"]"#, 1)
    }

    /// Returns the stand-in for the shop alone, because the model is real.
    pub(super) fn standin(&self, with_model: &str) -> String {
        let without = |text: String, from: &str, to: &str| match text.split_once(from) {
            Some((before, rest)) => {
                let (_, after) = rest.split_once(to).unwrap_or_default();
                format!("{before}{after}")
            }
            None => text,
        };
        let shop = with_model
            .replacen("Stands in for a model and for a shop, so that no key is needed.", "Stands in for a shop.", 1)
            .replacen(" The model follows a script: it does what an agent should do, and what it should not.", "", 1);
        let shop = without(shop, "SCRIPT = [\n", "\n]\n");
        let asked = "        if \"messages\" in body:\n            return self.answer(model(body[\"messages\"]))\n";
        let shop = shop.replacen(asked, "", 1);
        without(shop, "def model(messages):\n", "\n\n\n")
    }

    /// Returns the task with the model's name in the environment, and with limits that a real model needs.
    pub(super) fn task(&self, standin: &str) -> String {
        let environment = format!("    env:\n      - {{name: MODEL, value: {:?}}}\n    resources:", self.name);
        standin.replacen("    resources:", &environment, 1).replacen(
            "{wallTimeSeconds: 60, toolCalls: 10, tokens: 20000}",
            "{wallTimeSeconds: 300, toolCalls: 10, tokens: 50000}",
            1,
        )
    }

    /// Returns the options that `belay run` needs beside the task.
    pub(super) fn options(&self) -> String {
        let Place { host, way } = &self.place;
        let port = self.base.port;
        let key = self.key().map(|variable| format!(" --credential model-key/token=env:{variable}"));
        let place = match way {
            Way::Public => None,
            Way::At(address) => Some(format!(" --resolve {host}={}", SocketAddr::new(*address, port))),
            Way::Unknown => Some(format!(" --resolve {host}=ADDRESS:{port}")),
        };
        key.into_iter().chain(place).collect()
    }

    /// Returns notes about what the user must know or do first.
    pub(super) fn notes(&self) -> Vec<String> {
        let Place { host, way } = &self.place;
        let mut notes = Vec::new();
        if *way == Way::Unknown {
            notes.push(format!(
                "this machine finds no address of {host} now: replace ADDRESS with the server's address, because the gateway uses public name servers"
            ));
        }
        if *way == Way::Public {
            return notes;
        }
        if self.base.is_tls {
            notes.push(format!(
                "the server needs a certificate for {host}, because the gateway accepts no other name; if no public authority signed it, give the \
                 authority with --upstream-ca FILE"
            ));
        } else if !self.is_here_in_the_clear() {
            notes.push(format!(
                "calls to {host} are not encrypted: others on the network can read and change them, and the gateway adds no key; a key requires https"
            ));
        }
        notes
    }

    /// Returns the lines that an existing pack needs for this model.
    pub(super) fn wanted_of_a_pack(&self) -> String {
        let (endpoint, egress) = self.lines();
        let indented = |text: &str| text.lines().map(|line| format!("  {line}\n")).collect::<String>();
        format!("  spec.models:\n{}  spec.workflowClasses[].egress:\n{}", indented(&endpoint), indented(&egress))
    }
}

#[cfg(test)]
mod tests;
