//! The tables of what a request to a model may contain, for each API.
//!
//! Guarantees: the tables name each member, part and tool that the providers' own SDKs publish, or deny or allow as a whole what contains
//! it. A test compares the two. `docs/model-requests.md` is generated from the tables.
//!
//! How to classify a new entry: does it make the provider fetch, run, remember, ask another party, or charge something that the request's
//! own bytes do not determine? Then a pack has to allow it by name. It matters who runs a tool, not who has defined it.

/// Chat completions.
mod chat;
/// Messages.
mod messages;
/// Responses.
mod responses;

pub use self::{chat::CHAT_COMPLETIONS, messages::MESSAGES, responses::RESPONSES};

use super::table::{
    Capability::{self, Fallbacks, Stored, WebSearch},
    Fate::{self, Named, Passes},
    Kinds,
    Of::{self, Data, Either, Inline, List, Object, Plain, Url},
    Row, Shape,
};

const fn row(names: &'static str, fate: Fate) -> Row {
    Row { names, fate }
}

const fn plain(names: &'static str) -> Row {
    row(names, Passes(Plain))
}

const fn data(names: &'static str) -> Row {
    row(names, Passes(Data))
}

const fn shape(is: &'static str, rows: &'static [Row]) -> Shape {
    Shape { is, rows, needs: None }
}

const fn kinds(are: &'static str, rows: &'static [Row]) -> Kinds {
    Kinds { are, rows, untyped: &[] }
}

/// Reasons for a denial, and what to do.
mod why {
    pub const LIMIT: &str = "it can be a different output limit than the one that Belay reserves; write max_completion_tokens or max_tokens";
    pub const ACCOUNT: &str = "the gateway chooses the account that pays, with the credential; leave it out";
    pub const SEARCH: &str =
        "the provider would search the web itself, without any contract; offer the search as a tool of a contract";
    pub const FETCH: &str =
        "the provider would fetch pages itself, outside the egress hosts; offer it as a tool of a contract";
    pub const CODE: &str =
        "the code would run at the provider, outside the sandbox; run it as a tool of the agent's own";
    pub const SHELL: &str = "the shell would run at the provider, outside the sandbox; run it here, with an `environment` of the type `local`";
    pub const FILE: &str =
        "the provider stores the file, and Belay knows neither its content nor its length; send it in the request";
    pub const FILES: &str = "the provider would search files that it stores; offer the search as a tool of a contract";
    pub const IMAGES: &str =
        "the provider would make pictures, which no limit of tokens bounds; offer it as a tool of a contract";
    pub const MCP: &str = "the provider would call its tools, without their contracts; use BELAY_MCP_URL";
    pub const CONVERSATION: &str = "the provider stores its prompt; send the whole conversation";
    pub const STORE: &str = "the provider would store the call, and others could read it; leave it out";
    pub const BACKGROUND: &str = "its reply would not pass through Belay; wait for the reply instead";
    pub const COMPACT: &str =
        "the provider would shorten the conversation with calls that no limit here bounds; shorten it in the agent";
    pub const TOOLS: &str = "the provider would search the tools in steps that no limit here bounds; offer fewer tools";
    pub const OTHER_MODEL: &str = "another model could answer, at another price; name one model";
    pub const ADVICE: &str =
        "the provider would call another model, at another price; call that model in a call of its own";
    pub const SOURCES: &str =
        "the provider would read from sources that it is connected to; offer them as a tool of a contract";
}

/// Says how long the provider may reuse its work on the start of the prompt. The provider reads the same prompt.
const CACHED: &str = "cache_control prompt_cache_breakpoint";
static CACHE: Shape = shape("a cache mark", &[plain("type ttl mode scope")]);
static REASONING: Shape =
    shape("reasoning options", &[plain("effort summary generate_summary context mode max_tokens exclude enabled")]);
static JSON_SCHEMA: Shape = shape("a schema of the reply", &[plain("name description strict type"), data("schema")]);
static FORMAT: Shape = shape(
    "a format of the reply",
    &[plain("type name description strict grammar"), data("schema"), row("json_schema", Passes(Object(&JSON_SCHEMA)))],
);
static CACHE_OPTIONS: Shape = shape(
    "caching options",
    &[plain("mode ttl prewarm"), row("comparison_response_id", Named(Stored, why::CONVERSATION))],
);
static MODERATION: Shape = shape("moderation options", &[plain("model"), data("policy")]);
static STREAM_OPTIONS: Shape =
    shape("options of the stream", &[plain("include_usage include_obfuscation continuous_usage_stats")]);

// Tools that the agent runs.
static FUNCTION: Shape = shape(
    "a function",
    &[
        plain("name description strict type async defer_loading allowed_callers"),
        data("parameters output_schema"),
        row(CACHED, Passes(Object(&CACHE))),
    ],
);
static GRAMMAR: Shape = shape("a grammar", &[plain("definition syntax type")]);
static INPUT_FORMAT: Shape =
    shape("a format of input", &[plain("type definition syntax"), row("grammar", Passes(Object(&GRAMMAR)))]);
static CUSTOM: Shape = shape(
    "a custom tool",
    &[plain("name description type async defer_loading allowed_callers"), row("format", Passes(Object(&INPUT_FORMAT)))],
);
/// Selects one of the request's tools. A tool that is not in the request cannot be called.
static NAMED_TOOL: Shape = shape("a name of a tool", &[plain("name")]);
static ALLOWED_TOOLS: Shape = shape("names of tools", &[plain("mode"), data("tools")]);
static TOOL_CHOICE: Shape = shape(
    "a choice of tool",
    &[
        plain("type name mode server_label disable_parallel_tool_use"),
        row("function custom", Passes(Object(&NAMED_TOOL))),
        row("allowed_tools", Passes(Object(&ALLOWED_TOOLS))),
        data("tools"),
    ],
);
static TOOL_CHOICES: [Of; 2] = [Object(&TOOL_CHOICE), Plain];

// Pictures and sounds.
static IMAGE_URL: Shape = shape("a picture", &[plain("detail format"), row("url", Passes(Url))]);
static INPUT_AUDIO: Shape = shape("a sound", &[plain("format"), row("data", Passes(Inline))]);

/// A request without a body.
pub static NOTHING: Shape = shape("a request without a body", &[]);

/// `POST /embeddings`.
pub static EMBEDDINGS: Shape = shape(
    "a request for embeddings",
    &[
        row("input", Passes(Either(&[List(&Plain), Plain]))),
        plain("model dimensions encoding_format user"),
        // Members of compatible servers.
        plain("input_type task truncate truncation output_dimension output_dtype truncate_prompt_tokens normalize"),
        data("metadata"),
    ],
);

static MODERATED: Shape =
    shape("an input for moderation", &[plain("type text"), row("image_url", Passes(Object(&IMAGE_URL)))]);
static MODERATED_PARTS: Kinds = kinds("an input for moderation", &[row("text image_url", Passes(Object(&MODERATED)))]);

/// `POST /moderations`.
pub static MODERATIONS: Shape = shape(
    "a request for moderation",
    &[row("input", Passes(Either(&[List(&Either(&[Of::Kinds(&MODERATED_PARTS), Plain])), Plain]))), plain("model")],
);

/// Models that make the provider do more, whatever the request contains. Each is a name in which `*` stands for any text.
pub static MODELS: &[(&str, Capability)] = &[
    ("*:online", WebSearch),
    ("*-search-preview*", WebSearch),
    ("*-search-api*", WebSearch),
    ("*-deep-research*", WebSearch),
    ("sonar*", WebSearch),
    ("perplexity/*", WebSearch),
    ("compound-*", WebSearch),
    ("groq/compound*", WebSearch),
    ("openrouter/auto*", Fallbacks),
];
