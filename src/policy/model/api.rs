//! The APIs of model providers by their paths, and the names that each API has for the same thing.
//!
//! Guarantees: a path belongs to one API or to none, with `/v1` before it or without, because client libraries differ in that. The same
//! question about the endpoint of a call always has the same answer.
//! Non-goals: whether the host may be reached.

use serde::{Deserialize, Serialize};

use super::{
    requests,
    table::{Capability, Shape},
};
use crate::policy::config::{ModelEndpoints, OutputLimitField, StreamUsage};

/// The API that a request speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `POST /v1/chat/completions`.
    ChatCompletions,
    /// `POST /v1/responses`.
    Responses,
    /// `POST /v1/responses/input_tokens`: counts the prompt of a response.
    InputTokens,
    /// `POST /v1/messages`.
    Messages,
    /// `POST /v1/messages/count_tokens`: counts the prompt of a message.
    CountTokens,
    /// `POST /v1/embeddings`.
    Embeddings,
    /// `POST /v1/moderations`.
    Moderations,
    /// `GET /v1/models`: lists the models, or describes one by its name.
    Models,
}

/// The API that an endpoint speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// The OpenAI-style API: `/chat/completions`, `/responses` and the paths beside them.
    OpenAi,
    /// The Anthropic-style API: `/messages` and the paths beside it.
    Anthropic,
}

/// The query parameters that `GET /models` forwards.
const PAGES: [&str; 4] = ["after", "after_id", "before_id", "limit"];

impl Api {
    /// All APIs.
    pub const ALL: [Self; 8] = [
        Self::ChatCompletions,
        Self::Responses,
        Self::InputTokens,
        Self::Messages,
        Self::CountTokens,
        Self::Embeddings,
        Self::Moderations,
        Self::Models,
    ];

    /// Returns the API of a path.
    pub fn of_path(path: &str) -> Option<Self> {
        let path = path.strip_prefix("/v1").unwrap_or(path);
        let known = Self::ALL.into_iter().find(|api| api.path().strip_prefix("/v1") == Some(path));
        known.or_else(|| path.strip_prefix("/models/").filter(|name| is_model(name)).map(|_| Self::Models))
    }

    /// Returns the path of the API.
    pub fn path(self) -> &'static str {
        match self {
            Self::ChatCompletions => "/v1/chat/completions",
            Self::Responses => "/v1/responses",
            Self::InputTokens => "/v1/responses/input_tokens",
            Self::Messages => "/v1/messages",
            Self::CountTokens => "/v1/messages/count_tokens",
            Self::Embeddings => "/v1/embeddings",
            Self::Moderations => "/v1/moderations",
            Self::Models => "/v1/models",
        }
    }

    /// Returns the target of the request to a provider for a request to this path: the path with `/v1`, and the query parameters that page
    /// through lists.
    pub fn target(self, path: &str, query: Option<&str>) -> String {
        if self != Self::Models {
            return self.path().to_owned();
        }
        let path = path.strip_prefix("/v1").unwrap_or(path);
        let pages = query.unwrap_or_default().split('&').filter(|pair| {
            let plain = |value: &str| value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
            pair.split_once('=').is_some_and(|(name, value)| PAGES.contains(&name) && plain(value))
        });
        let pages: Vec<_> = pages.collect();
        let mark = if pages.is_empty() { "" } else { "?" };
        format!("/v1{path}{mark}{}", pages.join("&"))
    }

    /// Returns the family of the API, or `None` for a list of models, which both families have.
    pub fn family(self) -> Option<Family> {
        match self {
            Self::ChatCompletions | Self::Responses | Self::InputTokens | Self::Embeddings | Self::Moderations => {
                Some(Family::OpenAi)
            }
            Self::Messages | Self::CountTokens => Some(Family::Anthropic),
            Self::Models => None,
        }
    }

    /// Returns the table of what a request may contain.
    pub fn table(self) -> &'static Shape {
        match self {
            Self::ChatCompletions => &requests::CHAT_COMPLETIONS,
            Self::Responses | Self::InputTokens => &requests::RESPONSES,
            Self::Messages | Self::CountTokens => &requests::MESSAGES,
            Self::Embeddings => &requests::EMBEDDINGS,
            Self::Moderations => &requests::MODERATIONS,
            Self::Models => &requests::NOTHING,
        }
    }

    /// Returns the HTTP method.
    pub fn method(self) -> &'static str {
        if self == Self::Models { "GET" } else { "POST" }
    }

    /// Returns whether a model generates output for a request of this API.
    pub fn writes(self) -> bool {
        matches!(self, Self::ChatCompletions | Self::Responses | Self::Messages)
    }

    /// Returns whether no provider charges for a request of this API.
    pub fn is_free(self) -> bool {
        !self.writes() && self != Self::Embeddings
    }

    /// Returns the members that limit the output. Belay sets the first one if a request has none.
    pub fn output_limits(self) -> &'static [&'static str] {
        match self {
            Self::ChatCompletions => &["max_completion_tokens", "max_tokens"],
            Self::Responses => &["max_output_tokens"],
            Self::Messages => &["max_tokens"],
            _ => &[],
        }
    }
}

/// Returns whether a text in a path can be the name of a model, and cannot be another path.
fn is_model(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._:@-".contains(&byte);
    let escaped = name.replace("%2F", "/").replace("%2f", "/").replace("%3A", ":").replace("%3a", ":");
    escaped.split('/').all(|part| !part.is_empty() && part != "." && part != ".." && part.bytes().all(plain))
}

/// The endpoint that serves a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen<'p> {
    /// The base URL.
    pub base: &'p str,
    /// The API that the endpoint speaks.
    pub family: Family,
    /// What the entry allows in addition to what the pack allows for all endpoints.
    pub allow: &'p [Capability],
    /// Whether Belay asks for the usage of streams.
    pub stream_usage: StreamUsage,
}

/// Domains of hosts at which every model accepts the newer output limit, and reasoning models reject the older one.
const NEWER_LIMIT: [&str; 4] =
    ["api.openai.com", "openai.azure.com", "cognitiveservices.azure.com", "services.ai.azure.com"];
/// The first version of Azure's API that knows the newer output limit.
const AZURE_NEWER_LIMIT: &str = "2024-09";

impl Chosen<'_> {
    /// Returns the member that limits the reply of a chat completion at this endpoint, for a model that the catalogue does not know. A
    /// deployment on Azure has any name that its owner chose. All servers other than OpenAI's know the older member. Some of them ignore
    /// the newer member, and a limit that the server ignores is not a limit.
    pub fn limit_field(&self) -> OutputLimitField {
        let (base, query) = self.base.split_once('?').unwrap_or((self.base, ""));
        let authority = base.split('/').nth(2).unwrap_or_default().to_ascii_lowercase();
        let host = authority.rsplit_once(':').map_or(authority.as_str(), |(host, _)| host);
        let is_at =
            |domain: &&str| host.strip_suffix(*domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        // API gateways in front of Azure keep its paths.
        let newer = NEWER_LIMIT.iter().any(is_at) || base.contains("/openai/deployments/");
        let version = query.split('&').find_map(|pair| pair.strip_prefix("api-version="));
        if newer && version.is_none_or(|version| version >= AZURE_NEWER_LIMIT) {
            OutputLimitField::MaxCompletionTokens
        } else {
            OutputLimitField::MaxTokens
        }
    }
}

impl ModelEndpoints {
    /// Returns the endpoints in the order in which they are tried: first those for some models.
    fn all(&self) -> impl Iterator<Item = (Chosen<'_>, &[String])> {
        let some = self.endpoints.iter().map(|entry| {
            let stream_usage = if entry.stream_usage.is_ask() { self.stream_usage } else { entry.stream_usage };
            let chosen = Chosen { base: &entry.url, family: entry.api, allow: &entry.allow, stream_usage };
            (chosen, entry.models.as_slice())
        });
        let all = [(&self.openai, Family::OpenAi), (&self.anthropic, Family::Anthropic)];
        let all = all.into_iter().filter_map(|(base, family)| Some((base.as_deref()?, family)));
        some.chain(
            all.map(|(base, family)| (Chosen { base, family, allow: &[], stream_usage: self.stream_usage }, &[][..])),
        )
    }

    /// Returns the endpoint for a model. `family` is the family of the request's API, if the request determines it. A list of models comes
    /// from the first endpoint that has one.
    pub fn of(&self, family: Option<Family>, model: Option<&str>) -> Option<Chosen<'_>> {
        let speaks = |chosen: &Chosen<'_>| family.is_none_or(|family| chosen.family == family);
        let fits = |models: &[String]| {
            models.is_empty() || model.is_some_and(|model| models.iter().any(|pattern| is_one_of(pattern, model)))
        };
        let fitting = self.all().find(|(chosen, models)| speaks(chosen) && fits(models));
        // A request without the name of a model matches any endpoint.
        let any = || self.all().find(|(chosen, _)| speaks(chosen) && model.is_none());
        fitting.or_else(any).map(|(chosen, _)| chosen)
    }

    /// Returns every URL that a call with this recorded target may go to.
    pub fn urls(&self, target: &str) -> Vec<String> {
        let path = target.split_once('?').map_or(target, |(path, _)| path);
        let Some(api) = Api::of_path(path).filter(|_| path.starts_with("/v1/")) else { return vec![] };
        let speaks = |family: Family| api.family().is_none_or(|own| own == family);
        self.all()
            .filter(|(chosen, _)| speaks(chosen.family))
            .map(|(chosen, _)| url(chosen.base, chosen.family, target))
            .collect()
    }
}

fn is_one_of(pattern: &str, model: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(beginning) => model.starts_with(beginning),
        None => pattern == model,
    }
}

/// Paths at the end of a base URL that show that it is the whole URL of a call.
const ENDS: [&str; 4] = ["/chat/completions", "/responses", "/messages", "/embeddings"];

/// Returns the URL of a target at an endpoint. If the base URL has no version yet, `/v1` is added, as client libraries of the same API do.
/// A base URL can also be the whole URL of a call. The query of the base URL is kept.
///
/// | base | becomes |
/// | --- | --- |
/// | `https://api.openai.com` | `https://api.openai.com/v1/chat/completions` |
/// | `https://api.openai.com/v1` | `https://api.openai.com/v1/chat/completions` |
/// | `https://generativelanguage.googleapis.com/v1beta/openai` | `…/v1beta/openai/chat/completions` |
/// | `https://x.openai.azure.com/openai/deployments/d?api-version=1` | `…/openai/deployments/d/chat/completions?api-version=1` |
/// | `https://api.perplexity.ai/chat/completions` | `https://api.perplexity.ai/chat/completions` |
pub fn url(base: &str, family: Family, target: &str) -> String {
    let (base, own_query) = base.split_once('?').map_or((base, None), |(base, query)| (base, Some(query)));
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
    let base = base.trim_end_matches('/');
    let short = path.strip_prefix("/v1").unwrap_or(path);
    let whole = ENDS.iter().find_map(|end| base.strip_suffix(end));
    let base = whole.unwrap_or(base);
    // The segments after scheme and authority.
    let mut segments = base.split('/').skip(3);
    let has_version = match family {
        Family::OpenAi => segments.any(|segment| is_version(segment) || segment == "deployments"),
        Family::Anthropic => segments.last().is_some_and(is_version),
    };
    let between = if whole.is_some() || has_version { "" } else { "/v1" };
    let queries: Vec<_> = [own_query, query].into_iter().flatten().filter(|query| !query.is_empty()).collect();
    let mark = if queries.is_empty() { "" } else { "?" };
    format!("{base}{between}{short}{mark}{}", queries.join("&"))
}

/// Returns whether a segment of a path is a version: `v1`, `v4`, `v1beta`, `v2alpha1`.
fn is_version(segment: &str) -> bool {
    let Some(rest) = segment.strip_prefix('v') else { return false };
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let stage = rest.get(digits..).unwrap_or_default().trim_end_matches(|letter: char| letter.is_ascii_digit());
    digits > 0 && ["", "alpha", "beta"].contains(&stage)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::policy::config::ModelEndpoint;

    const CHAT: &str = "/v1/chat/completions";

    #[rstest]
    #[case("https://api.openai.com", CHAT, "https://api.openai.com/v1/chat/completions")]
    #[case("https://api.openai.com/", CHAT, "https://api.openai.com/v1/chat/completions")]
    #[case("https://api.openai.com/v1", CHAT, "https://api.openai.com/v1/chat/completions")]
    #[case("https://api.openai.com/v1/", "/v1/models?limit=2", "https://api.openai.com/v1/models?limit=2")]
    #[case("https://api.groq.com/openai", CHAT, "https://api.groq.com/openai/v1/chat/completions")]
    #[case("https://api.groq.com/openai/v1", CHAT, "https://api.groq.com/openai/v1/chat/completions")]
    #[case("https://g.test/v1beta/openai/", CHAT, "https://g.test/v1beta/openai/chat/completions")]
    #[case("https://z.test/api/paas/v4", CHAT, "https://z.test/api/paas/v4/chat/completions")]
    #[case("https://openrouter.ai/api/v1", "/v1/responses", "https://openrouter.ai/api/v1/responses")]
    #[case("http://ollama.test:11434", CHAT, "http://ollama.test:11434/v1/chat/completions")]
    #[case("http://ollama.test:11434/v1", "/v1/embeddings", "http://ollama.test:11434/v1/embeddings")]
    #[case("http://litellm.test:4000", "/v1/models/a/b", "http://litellm.test:4000/v1/models/a/b")]
    #[case(
        "https://x.openai.azure.com/openai/deployments/d?api-version=2024-10-21",
        CHAT,
        "https://x.openai.azure.com/openai/deployments/d/chat/completions?api-version=2024-10-21"
    )]
    #[case(
        "https://x.openai.azure.com/openai/v1/?api-version=preview",
        "/v1/models?limit=1",
        "https://x.openai.azure.com/openai/v1/models?api-version=preview&limit=1"
    )]
    #[case("https://api.perplexity.ai/chat/completions", CHAT, "https://api.perplexity.ai/chat/completions")]
    #[case("https://api.openai.com/v1/responses", CHAT, "https://api.openai.com/v1/chat/completions")]
    #[case("https://vault.test/vx/very", CHAT, "https://vault.test/vx/very/v1/chat/completions")]
    fn bases_of_openai(#[case] base: &str, #[case] target: &str, #[case] expected: &str) {
        assert_eq!(url(base, Family::OpenAi, target), expected);
    }

    #[rstest]
    #[case("https://api.anthropic.com", "https://api.anthropic.com/v1/messages")]
    #[case("https://api.anthropic.com/v1/", "https://api.anthropic.com/v1/messages")]
    #[case("https://api.anthropic.com/v1/messages", "https://api.anthropic.com/v1/messages")]
    #[case("https://api.deepseek.com/anthropic", "https://api.deepseek.com/anthropic/v1/messages")]
    #[case("https://g.test/v1/account/gateway/anthropic", "https://g.test/v1/account/gateway/anthropic/v1/messages")]
    fn bases_of_anthropic(#[case] base: &str, #[case] expected: &str) {
        assert_eq!(url(base, Family::Anthropic, "/v1/messages"), expected);
    }

    #[rstest]
    #[case("/v1/chat/completions", Some(Api::ChatCompletions))]
    #[case("/chat/completions", Some(Api::ChatCompletions))]
    #[case("/messages", Some(Api::Messages))]
    #[case("/v1/messages/count_tokens", Some(Api::CountTokens))]
    #[case("/responses/input_tokens", Some(Api::InputTokens))]
    #[case("/v1/models", Some(Api::Models))]
    #[case("/models/gpt-4o", Some(Api::Models))]
    #[case("/v1/models/openai/gpt-4o:free", Some(Api::Models))]
    #[case("/v1/models/ft%3Agpt%2Fx", Some(Api::Models))]
    #[case("/v1/models/../files", None)]
    #[case("/v1/models/%2e%2e/files", None)]
    #[case("/v1/models/a//b", None)]
    #[case("/v1/models/", None)]
    #[case("/v1/v1/messages", None)]
    #[case("/v1/messages/", None)]
    #[case("/v1//messages", None)]
    #[case("/V1/messages", None)]
    #[case("/v1messages", None)]
    #[case("/v1/files", None)]
    #[case("/v1/responses/resp_1", None)]
    #[case("/v1/messages/batches", None)]
    fn paths(#[case] path: &str, #[case] api: Option<Api>) {
        assert_eq!(Api::of_path(path), api);
    }

    #[test]
    fn only_pages_of_lists_are_passed_on_of_a_query() {
        let target = |query| Api::Models.target("/models", Some(query));
        assert_eq!(target("limit=5&key=secret&after_id=m_1&beta=true&limit=a%26b"), "/v1/models?limit=5&after_id=m_1");
        assert_eq!(target("beta=true"), "/v1/models");
        assert_eq!(Api::Messages.target("/messages", Some("beta=true")), "/v1/messages");
    }

    /// The output limit depends on the server if the model is unknown.
    #[rstest]
    #[case("https://our.openai.azure.com/openai/deployments/ours?api-version=2024-10-21", true)]
    #[case("https://our.openai.azure.com/openai/v1", true)]
    #[case("https://our.openai.azure.com/openai/v1?api-version=preview", true)]
    #[case("https://OUR.OpenAI.Azure.com:443/openai/v1", true)]
    #[case("https://our.cognitiveservices.azure.com/openai/deployments/ours?api-version=2025-04-01-preview", true)]
    #[case("https://our.services.ai.azure.com/openai/v1", true)]
    #[case("https://gateway.test/azure/openai/deployments/ours?a=b&api-version=2024-09-01-preview", true)]
    #[case("https://api.openai.com", true)]
    #[case("https://eu.api.openai.com/v1", true)]
    // Versions of Azure's API before the newer output limit reject it.
    #[case("https://our.openai.azure.com/openai/deployments/ours?api-version=2024-06-01", false)]
    #[case("https://our.openai.azure.com/openai/deployments/ours?api-version=2023-05-15", false)]
    #[case("http://vllm.test:8000/v1", false)]
    #[case("https://api.groq.com/openai", false)]
    #[case("https://generativelanguage.googleapis.com/v1beta/openai", false)]
    #[case("https://notapi.openai.com.evil.test", false)]
    #[case("https://evilopenai.azure.com", false)]
    #[case("", false)]
    fn an_unknown_models_reply_is_limited_as_its_endpoint_has_it(#[case] base: &str, #[case] newer: bool) {
        let models = ModelEndpoints { openai: Some(base.into()), ..ModelEndpoints::default() };
        let field = models.of(Some(Family::OpenAi), Some("ours")).unwrap().limit_field();
        let expected = if newer { OutputLimitField::MaxCompletionTokens } else { OutputLimitField::MaxTokens };
        assert_eq!(field, expected);
    }

    #[test]
    fn a_model_is_asked_where_its_entry_says() {
        let entry = |models: &[&str], api, url: &str| ModelEndpoint {
            models: models.iter().map(|model| (*model).to_owned()).collect(),
            api,
            url: url.into(),
            allow: vec![Capability::WebSearch],
            stream_usage: StreamUsage::AsWritten,
        };
        let models = ModelEndpoints {
            openai: Some("https://rest.test".into()),
            endpoints: vec![
                entry(&["gpt-4o", "o3*"], Family::OpenAi, "https://some.test/v1"),
                entry(&["claude-*"], Family::Anthropic, "https://claude.test"),
                entry(&["claude-*"], Family::OpenAi, "https://proxy.test"),
            ],
            ..ModelEndpoints::default()
        };
        let base = |family, model| models.of(family, model).map(|chosen| chosen.base);
        assert_eq!(base(Some(Family::OpenAi), Some("gpt-4o")), Some("https://some.test/v1"));
        assert_eq!(base(Some(Family::OpenAi), Some("o3-mini")), Some("https://some.test/v1"));
        assert_eq!(base(Some(Family::OpenAi), Some("gpt-4o-mini")), Some("https://rest.test"));
        assert_eq!(base(Some(Family::OpenAi), Some("claude-5")), Some("https://proxy.test"));
        assert_eq!(base(Some(Family::Anthropic), Some("claude-5")), Some("https://claude.test"));
        assert_eq!(base(Some(Family::Anthropic), Some("other")), None);
        assert_eq!(base(Some(Family::Anthropic), None), Some("https://claude.test"));
        assert_eq!(base(None, None), Some("https://rest.test"));
        assert_eq!(models.of(Some(Family::OpenAi), Some("x")).unwrap().allow, []);
        assert_eq!(models.of(Some(Family::OpenAi), Some("o3")).unwrap().allow, [Capability::WebSearch]);
        // The gateway allows each of these URLs, for the paths of its own API.
        assert_eq!(models.urls("/v1/messages"), ["https://claude.test/v1/messages"]);
        assert_eq!(models.urls("/v1/models").len(), 4);
        for target in ["/messages", "/v1/files", "/v1/models/../files", ""] {
            assert_eq!(models.urls(target), Vec::<String>::new(), "{target}");
        }
    }
}
