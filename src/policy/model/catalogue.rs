//! The catalogue: a dated list of models that is part of Belay. A pack's own entry overrides it member by member.
//!
//! Guarantees: every name has an answer, and for an unknown model the answer is conservative. The same name and the same pack always give
//! the same answer.
//! Non-goals: what a task pays. The list prices are only for messages. The cost is counted by the pack's prices.

use std::sync::LazyLock;

use serde::Deserialize;

use super::{api::Api, picture::Pictures};
use crate::policy::config::{ModelPrice, OutputLimitField, Tokenizer};

/// The list. The first entry that matches a name counts.
static LIST: LazyLock<Catalogue> = LazyLock::new(|| {
    // A test parses the file. If it could not be parsed, every model would be unknown.
    serde_json::from_str(include_str!("catalogue.json")).unwrap_or_default()
});

/// The output limit of a request without a limit, for a model whose output limit is unknown. All models of recent years accept it.
pub const OUTPUT_UNKNOWN: i64 = 4_096;
/// Tokens per 100 tokens of o200k, for a model whose tokenizer is unknown. The tokenizers of Llama 3, Qwen 3, DeepSeek, Mistral, Gemma, GLM
/// and Kimi make 84 to 157, measured over code, prose, JSON, random hexadecimal digits and rare characters.
const UNKNOWN_PERCENT: i64 = 160;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Catalogue {
    /// The date of the list.
    date: String,
    /// The sources of the list.
    #[allow(dead_code, reason = "for those who read the file")]
    sources: String,
    models: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entry {
    model: String,
    #[serde(default)]
    context_tokens: Option<i64>,
    #[serde(default)]
    max_output_tokens: Option<i64>,
    #[serde(default)]
    input: Option<String>,
    #[serde(default)]
    output: Option<String>,
    #[serde(default)]
    output_limit_field: Option<OutputLimitField>,
    o200k_percent: i64,
    #[serde(default)]
    pictures: Option<Pictures>,
    #[serde(default)]
    page_tokens: Option<i64>,
    #[serde(default)]
    sound_per_second: Option<i64>,
}

/// How the tokens of text are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counting {
    /// This many tokens per 100 tokens of OpenAI's o200k, and never more than one per byte.
    O200k(i64),
    /// One token per byte. No tokenizer that works on bytes makes more.
    Bytes,
}

/// The known properties of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// The longest reply, in tokens.
    pub max_output: Option<i64>,
    /// The longest prompt, in tokens. For many models the reply counts as well.
    pub context: Option<i64>,
    /// The member that limits a reply of chat completions, if it is known for the model.
    pub limit_field: Option<OutputLimitField>,
    /// How text is counted.
    pub counting: Counting,
    /// How pictures are counted.
    pub pictures: Pictures,
    /// Tokens per page of a document, if the provider charges only the picture of the page and not its text.
    pub page: Option<i64>,
    /// Tokens per second of sound.
    pub sound_per_second: i64,
    /// The list prices per million tokens of prompt and reply, in US dollars.
    pub listed: Option<(&'static str, &'static str)>,
}

impl Model {
    /// Returns the properties of the model with this name, from the catalogue and the pack's entry.
    pub fn named(name: &str, pack: Option<&ModelPrice>) -> Self {
        let listed = listed(name);
        let percent = listed.map_or(UNKNOWN_PERCENT, |entry| entry.o200k_percent);
        let price = |entry: &'static Entry| entry.input.as_deref().zip(entry.output.as_deref());
        Self {
            max_output: pack
                .and_then(|pack| pack.max_output_tokens)
                .or(listed.and_then(|entry| entry.max_output_tokens)),
            context: pack.and_then(|pack| pack.context_tokens).or(listed.and_then(|entry| entry.context_tokens)),
            limit_field: pack
                .and_then(|pack| pack.output_limit_field)
                .or(listed.and_then(|entry| entry.output_limit_field)),
            counting: match pack.and_then(|pack| pack.tokenizer) {
                Some(Tokenizer::Bytes) => Counting::Bytes,
                Some(Tokenizer::O200k) => Counting::O200k(100),
                None => Counting::O200k(percent),
            },
            pictures: listed.and_then(|entry| entry.pictures).unwrap_or_default(),
            page: listed.and_then(|entry| entry.page_tokens),
            // The highest rate that a provider publishes.
            sound_per_second: listed.and_then(|entry| entry.sound_per_second).unwrap_or(32),
            listed: listed.and_then(price),
        }
    }

    /// Returns the member that limits a reply in this API. For chat completions, `of_endpoint` is the member of the endpoint. It applies if
    /// the member is not known for the model.
    pub fn limit_member(&self, api: Api, of_endpoint: OutputLimitField) -> Option<&'static str> {
        match (api, self.limit_field.unwrap_or(of_endpoint)) {
            (Api::ChatCompletions, OutputLimitField::MaxTokens) => Some("max_tokens"),
            _ => api.output_limits().first().copied(),
        }
    }
}

/// Returns the date of the list.
pub fn date() -> &'static str {
    &LIST.date
}

/// Returns the entry for a name: as written, without the prefix of a router (`openai/gpt-4o`, `us.anthropic.claude-…`), and with dashes for
/// the dots that some clients write.
fn listed(name: &str) -> Option<&'static Entry> {
    let whole = name.to_ascii_lowercase();
    let last = whole.rsplit('/').next().unwrap_or_default();
    let behind = last.rsplit_once("anthropic.").map_or(last, |(_, name)| name);
    let dashed = behind.replace('.', "-");
    let names = if behind.starts_with("claude") { [dashed.as_str(); 3] } else { [whole.as_str(), last, behind] };
    names.into_iter().find_map(|name| {
        LIST.models.iter().find(|entry| match entry.model.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => entry.model == name,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::price;

    #[test]
    fn the_list_is_read_and_each_of_its_entries_can_be_found() {
        assert!(LIST.models.len() > 150, "{} models", LIST.models.len());
        assert!(jiff::civil::Date::strptime("%Y-%m-%d", date()).is_ok(), "{}", date());
        for entry in &LIST.models {
            let name = entry.model.trim_end_matches('*');
            assert!(std::ptr::eq(listed(name).unwrap(), entry), "{name} is hidden by {}", listed(name).unwrap().model);
            assert!(entry.model.to_ascii_lowercase() == entry.model && entry.o200k_percent >= 100, "{name}");
            for sum in entry.input.iter().chain(&entry.output) {
                assert!(price::parse(sum).is_some(), "{name} {sum}");
            }
            assert_eq!(entry.input.is_some(), entry.output.is_some(), "{name}");
            for tokens in entry.context_tokens.iter().chain(&entry.max_output_tokens) {
                assert!((1_000..=4_000_000).contains(tokens), "{name} {tokens}");
            }
        }
    }

    #[test]
    fn names_are_found_as_clients_and_routers_write_them() {
        for (name, max_output, percent) in [
            ("gpt-4o", Some(16_384), 100),
            ("gpt-4o-2024-08-06", Some(16_384), 100),
            ("gpt-4o-2024-05-13", Some(4_096), 100),
            ("openai/gpt-4o-mini", Some(16_384), 100),
            ("GPT-4o", Some(16_384), 100),
            ("ft:gpt-4o-2024-08-06:acme::abc", Some(16_384), 100),
            ("claude-sonnet-4-5-20250929", Some(64_000), 125),
            ("anthropic/claude-sonnet-4.5", Some(64_000), 125),
            ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", Some(64_000), 125),
            ("gemini/gemini-2.5-flash", Some(65_536), 120),
            ("meta-llama/Llama-3.3-70B-Instruct-Turbo", Some(131_072), 105),
            ("llama3.1:8b", None, 105),
            ("deepseek-chat", Some(8_192), 110),
            ("gpt-99", None, 100),
            ("our-own", None, UNKNOWN_PERCENT),
            ("", None, UNKNOWN_PERCENT),
        ] {
            let model = Model::named(name, None);
            assert_eq!((model.max_output, model.counting), (max_output, Counting::O200k(percent)), "{name}");
        }
    }

    #[test]
    fn the_limit_is_in_the_member_that_the_provider_looks_at() {
        for (name, member) in [
            ("gpt-4o", Some("max_completion_tokens")),
            ("o3-mini", Some("max_completion_tokens")),
            ("gpt-99", Some("max_completion_tokens")),
            ("mistral-large-latest", Some("max_tokens")),
            ("llama3.1:8b", Some("max_tokens")),
            ("our-own", None),
        ] {
            let model = Model::named(name, None);
            for (of_endpoint, unknown) in [
                (OutputLimitField::MaxTokens, "max_tokens"),
                (OutputLimitField::MaxCompletionTokens, "max_completion_tokens"),
            ] {
                let found = model.limit_member(Api::ChatCompletions, of_endpoint);
                assert_eq!(found, Some(member.unwrap_or(unknown)), "{name}");
                assert_eq!(model.limit_member(Api::Responses, of_endpoint), Some("max_output_tokens"));
                assert_eq!(model.limit_member(Api::Messages, of_endpoint), Some("max_tokens"));
            }
        }
    }

    #[test]
    fn the_packs_word_stands_above_the_list() {
        let pack = ModelPrice {
            max_output_tokens: Some(99),
            context_tokens: Some(999),
            output_limit_field: Some(OutputLimitField::MaxTokens),
            tokenizer: Some(Tokenizer::Bytes),
            ..ModelPrice::default()
        };
        let model = Model::named("gpt-4o", Some(&pack));
        assert_eq!((model.max_output, model.context, model.counting), (Some(99), Some(999), Counting::Bytes));
        let member = model.limit_member(Api::ChatCompletions, OutputLimitField::MaxCompletionTokens);
        assert_eq!(member, Some("max_tokens"));
        // Members that the pack's entry does not set come from the catalogue.
        assert_eq!(Model::named("gpt-4o", Some(&ModelPrice::default())), Model::named("gpt-4o", None));
    }
}
