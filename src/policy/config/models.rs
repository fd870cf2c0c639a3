//! The endpoints of models, and the pack's policy for model calls.
//!
//! Guarantees: the choices of a PolicyPack are its own types. Endpoints and prices are not: a PolicyPack writes prices as decimals, and lists
//! endpoints that a class cannot reach.
//! Non-goals: which request may be sent, see [`model`](crate::policy::model), and costs, see [`price`](crate::policy::price).

use serde::{Deserialize, Serialize};

use crate::policy::model::{api::Family, table::Capability};

/// The endpoints of models, and the pack's policy for model calls.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelEndpoints {
    /// The base URL for `/v1/chat/completions` and `/v1/responses`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub openai: Option<String>,
    /// The base URL for `/v1/messages`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anthropic: Option<String>,
    /// Endpoints for some models. The first entry that matches a request takes precedence over `openai` and `anthropic`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<ModelEndpoint>,
    /// Prices and properties of models. The first entry that matches a model's name counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prices: Vec<ModelPrice>,
    /// What providers may do besides answering.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Capability>,
    /// How Belay handles members of requests that it does not know.
    #[serde(default, skip_serializing_if = "UnknownMembers::is_refuse")]
    pub unknown_members: UnknownMembers,
    /// Whether providers may store replies.
    #[serde(default, skip_serializing_if = "StoreReplies::is_as_written")]
    pub store_replies: StoreReplies,
    /// Whether Belay asks for the usage of streamed chat completions.
    #[serde(default, skip_serializing_if = "StreamUsage::is_ask")]
    pub stream_usage: StreamUsage,
}

/// An endpoint for some models.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelEndpoint {
    /// Names of models, as requests write them, or prefixes with `*`.
    pub models: Vec<String>,
    /// The API that the endpoint speaks.
    pub api: Family,
    /// The base URL.
    pub url: String,
    /// What this provider may do besides answering, in addition to what the pack allows for all endpoints.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Capability>,
    /// Whether Belay asks for the usage of this provider's streamed chat completions, if the pack asks at all.
    #[serde(default, skip_serializing_if = "StreamUsage::is_ask")]
    pub stream_usage: StreamUsage,
}

/// How Belay handles members of model requests that it does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum UnknownMembers {
    /// Belay denies the request.
    #[default]
    Refuse,
    /// Belay forwards the members. The intent has the rule `model.unknown`.
    Pass,
}

impl UnknownMembers {
    /// Returns whether it is the default.
    pub fn is_refuse(&self) -> bool {
        *self == Self::Refuse
    }
}

/// Whether providers may store replies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum StoreReplies {
    /// As the agent writes it. The Responses API stores a reply for a month unless the request says otherwise.
    #[default]
    AsWritten,
    /// Belay sets `store: false` in each request whose reply the provider could store.
    Never,
}

impl StoreReplies {
    /// Returns whether it is the default.
    pub fn is_as_written(&self) -> bool {
        *self == Self::AsWritten
    }
}

/// Whether Belay asks for the usage of streamed chat completions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum StreamUsage {
    /// Belay sets `stream_options.include_usage` in each request for a stream.
    #[default]
    Ask,
    /// As the agent writes it. A stream that does not report its usage costs its full reservation.
    AsWritten,
}

impl StreamUsage {
    /// Returns whether it is the default.
    pub fn is_ask(&self) -> bool {
        *self == Self::Ask
    }
}

/// The highest price of a model per million tokens, in millionths of the pack's currency unit, and other properties that the pack sets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelPrice {
    /// The name of a model, as requests write it, or a prefix with `*`.
    pub model: String,
    /// The price of prompt tokens.
    pub input_micros: i64,
    /// The price of reply tokens.
    pub output_micros: i64,
    /// The longest reply of the model, in tokens. The catalogue's value if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_output_tokens: Option<i64>,
    /// The highest number of tokens of prompt and reply together. The catalogue's value if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_tokens: Option<i64>,
    /// The member that limits the reply of a chat completion. The catalogue's value if absent, or else the endpoint's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_limit_field: Option<OutputLimitField>,
    /// How Belay counts the text of a prompt. The catalogue's value if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<Tokenizer>,
}

/// The member that limits the reply of a chat completion on the model's server. It overrides the catalogue. If neither has a value, it is
/// `max_completion_tokens` at OpenAI and Azure, and `max_tokens` elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum OutputLimitField {
    /// The member that all servers know, except OpenAI's own servers for newer models.
    #[default]
    #[serde(rename = "max_tokens")]
    MaxTokens,
    /// The member that OpenAI's own servers know for newer models.
    #[serde(rename = "max_completion_tokens")]
    MaxCompletionTokens,
}

/// How Belay counts the text of a prompt before the call. It overrides the catalogue. `Bytes` reserves much, and no prompt of text costs
/// more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum Tokenizer {
    /// The tokenizer of OpenAI's recent models.
    O200k,
    /// One token per byte. No tokenizer that works on bytes makes more. Belay reserves much, and no prompt can cost more.
    Bytes,
}
