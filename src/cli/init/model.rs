//! The model that a new folder's agent asks, and what of the folder follows from it.
//!
//! Guarantees: what is written names the model's host once as an endpoint and once in the egress list, and a key is only ever named.
//! Non-goals: to ask the provider anything; whether the model is there shows in the first run.

use std::str::FromStr;

use http::Uri;

/// What this machine is called in a pack, whose hosts have a domain. Servers that look at the name they are asked by, as Ollama does, take those
/// of `localhost` (RFC 6761).
const HERE: &str = "model.localhost";

/// Whose model, as `--model` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Provider {
    OpenAi,
    Anthropic,
    Ollama,
    /// The base URL of a server that speaks OpenAI's API.
    Compatible(Base),
}

/// A base URL, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Base {
    url: String,
    host: String,
    port: u16,
    is_tls: bool,
}

impl FromStr for Provider {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "openai" => Ok(Self::OpenAi),
            "anthropic" => Ok(Self::Anthropic),
            "ollama" => Ok(Self::Ollama),
            url => Base::read(url).map(Self::Compatible).ok_or_else(|| {
                format!(
                    "expected openai, anthropic, ollama or the base URL of a server that speaks OpenAI's API, such as \
                     http://localhost:8000/v1, found {url:?}"
                )
            }),
        }
    }
}

impl Base {
    fn read(text: &str) -> Option<Self> {
        let uri: Uri = text.parse().ok()?;
        let is_tls = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let host = match uri.host()? {
            "localhost" | "127.0.0.1" | "[::1]" => HERE,
            host => host,
        };
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let has_user = uri.authority()?.as_str().contains('@');
        let usual = port == if is_tls { 443 } else { 80 };
        let place = if usual { host.to_owned() } else { format!("{host}:{port}") };
        // The version is a part of what agents ask for.
        let path = uri.path().trim_end_matches('/').trim_end_matches("/v1");
        let url = format!("{}://{place}{path}", uri.scheme_str()?);
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._~:/%".contains(c);
        (!has_user && uri.query().is_none() && url.chars().all(plain)).then(|| Self {
            url,
            host: host.to_owned(),
            port,
            is_tls,
        })
    }

    fn is_local(&self) -> bool {
        self.host == HERE
    }
}

/// A model, and where it is.
#[derive(Clone, Debug)]
pub(super) struct Model {
    provider: Provider,
    name: String,
}

impl Model {
    /// # Errors
    /// If nobody says which model of the server it is.
    pub(super) fn new(provider: Provider, name: Option<&str>) -> Result<Self, String> {
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
        Ok(Self { provider, name: name.to_owned() })
    }

    fn base(&self) -> Base {
        let (url, port, is_tls) = match &self.provider {
            Provider::OpenAi => ("https://api.openai.com", 443, true),
            Provider::Anthropic => ("https://api.anthropic.com", 443, true),
            Provider::Ollama => ("http://model.localhost:11434", 11434, false),
            Provider::Compatible(base) => return base.clone(),
        };
        let host = url.split_once("://").and_then(|(_, rest)| rest.split(':').next()).unwrap_or_default();
        Base { url: url.to_owned(), host: host.to_owned(), port, is_tls }
    }

    /// The variable with the key, where the provider wants one.
    fn key(&self) -> Option<&'static str> {
        match &self.provider {
            Provider::OpenAi => Some("OPENAI_API_KEY"),
            Provider::Anthropic => Some("ANTHROPIC_API_KEY"),
            Provider::Ollama => None,
            Provider::Compatible(base) => (base.is_tls && !base.is_local()).then_some("MODEL_API_KEY"),
        }
    }

    /// Whether its agent speaks Anthropic's API.
    pub(super) fn speaks_messages(&self) -> bool {
        self.provider == Provider::Anthropic
    }

    /// The pack, for this model in place of the stand-in.
    pub(super) fn pack(&self, standin: &str) -> String {
        let Base { url, host, port, .. } = self.base();
        let api = if self.speaks_messages() { "anthropic" } else { "openai" };
        let credentials = match self.key() {
            Some(_) => {
                "\n          # The gateway adds it. The agent never sees it.\n          credentials: [{secret: model-key, key: token}]"
            }
            None => "",
        };
        let (before, rest) = standin.split_once("  # For a real model").unwrap_or((standin, ""));
        let (_, rest) = rest.split_once("  models:\n    openai: http://shop.test\n").unwrap_or(("", rest));
        let rest = rest.replacen(
            "        - host: shop.test\n          ports: [80]\n          uses: [Models, Tools]\n",
            &format!(
                "        - host: {host}\n          ports: [{port}]\n          uses: [Models]{credentials}\n        \
                 - host: shop.test\n          ports: [80]\n          uses: [Tools]\n"
            ),
            1,
        );
        format!("{before}  models:\n    {api}: {url}\n{rest}")
    }

    /// The task, with the model's name where its agent looks for it, and limits that a real model needs.
    pub(super) fn task(&self, standin: &str) -> String {
        let environment = format!("    env:\n      - {{name: MODEL, value: {:?}}}\n    resources:", self.name);
        standin.replacen("    resources:", &environment, 1).replacen(
            "{wallTimeSeconds: 60, toolCalls: 10, tokens: 20000}",
            "{wallTimeSeconds: 300, toolCalls: 10, tokens: 50000}",
            1,
        )
    }

    /// What `belay run` needs beside the task.
    pub(super) fn options(&self) -> String {
        let base = self.base();
        let key = self.key().map(|variable| format!(" --credential model-key/token=env:{variable}"));
        let place = base.is_local().then(|| format!(" --resolve {}=127.0.0.1:{}", base.host, base.port));
        key.into_iter().chain(place).collect()
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("https://openrouter.ai/api/v1", "https://openrouter.ai/api", "openrouter.ai", 443)]
    #[case("http://localhost:8000/v1/", "http://model.localhost:8000", "model.localhost", 8000)]
    #[case("http://vllm.models.svc:8080", "http://vllm.models.svc:8080", "vllm.models.svc", 8080)]
    fn a_base_url_is_read(#[case] text: &str, #[case] url: &str, #[case] host: &str, #[case] port: u16) {
        let Provider::Compatible(base) = text.parse().unwrap() else { panic!("{text}") };
        assert_eq!((base.url.as_str(), base.host.as_str(), base.port), (url, host, port));
    }

    #[rstest]
    #[case("mistral")]
    #[case("ftp://a.test")]
    #[case("https://user:secret@a.test/v1")]
    #[case("http://a.test/\u{e4}")]
    #[case("http://a.test/ x: y")]
    #[case("")]
    fn what_is_none_is_refused(#[case] text: &str) {
        assert!(text.parse::<Provider>().unwrap_err().contains("base URL"));
    }

    #[test]
    fn a_server_is_asked_for_a_model_by_its_name() {
        let provider = || "http://localhost:8000".parse::<Provider>().unwrap();
        assert!(Model::new(provider(), None).unwrap_err().contains("--model-name"));
        assert!(Model::new(provider(), Some("a\"\nb")).unwrap_err().contains("letters"));
        assert_eq!(Model::new(provider(), Some("qwen3:8b")).unwrap().name, "qwen3:8b");
    }
}
