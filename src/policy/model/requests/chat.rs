//! The tables of a request for a chat completion, with the members of compatible servers and proxies.
//!
//! Guarantees: see [`requests`](super).
//! Non-goals: the shapes that other APIs share, which are in [`requests`](super).

use super::{
    CACHE, CACHE_OPTIONS, CACHED, CUSTOM, FORMAT, FUNCTION, IMAGE_URL, INPUT_AUDIO, MODERATION, NAMED_TOOL, REASONING,
    STREAM_OPTIONS, TOOL_CHOICES, data, kinds, plain, row, shape, why,
};
use crate::policy::model::table::{
    Capability::{CodeExecution, DataSources, Fallbacks, FileSearch, Files, ImageGeneration, Mcp, Stored, WebSearch},
    Fate::{Bounded, Named, Passes, Refused},
    Kinds,
    Of::{self, Either, Inline, List, Object, Plain, Switch, Url},
    Shape,
};

static VIDEO_URL: Shape = shape("a video or a sound", &[row("url", Passes(Url))]);
static CHAT_FILE: Shape = shape(
    "a file",
    &[plain("filename format"), row("file_data", Passes(Inline)), row("file_id", Named(Files, why::FILE))],
);
static CHAT_PART: Shape = shape(
    "a part of a message",
    &[
        plain("type text refusal"),
        row("image_url", Passes(Either(&[Object(&IMAGE_URL), Url]))),
        row("video_url audio_url", Passes(Either(&[Object(&VIDEO_URL), Url]))),
        row("input_audio", Passes(Object(&INPUT_AUDIO))),
        row("file", Passes(Object(&CHAT_FILE))),
        row("thinking", Passes(Either(&[List(&Of::Kinds(&CHAT_PARTS)), Plain]))),
        row(CACHED, Passes(Object(&CACHE))),
    ],
);
static CHAT_PARTS: Kinds = kinds(
    "a part of a message",
    &[
        row("text refusal", Passes(Object(&CHAT_PART))),
        row("image_url input_audio video_url audio_url", Passes(Object(&CHAT_PART))),
        row("file", Passes(Object(&CHAT_PART))),
        row("thinking", Passes(Object(&CHAT_PART))),
    ],
);
static CALLED: Shape = shape("a call", &[plain("name"), data("arguments input")]);
static CHAT_CALL: Shape = shape(
    "a call of a tool",
    &[
        plain("id type index"),
        row("function custom", Passes(Object(&CALLED))),
        data("extra_content provider_specific_fields"),
    ],
);
static HEARD: Shape = shape("an earlier reply's sound", &[row("id", Named(Stored, why::CONVERSATION))]);
static CHAT_MESSAGE: Shape = shape(
    "a message",
    &[
        plain("role name tool_call_id refusal prefix partial weight"),
        row("content", Passes(Either(&[List(&Of::Kinds(&CHAT_PARTS)), Plain]))),
        row("tool_calls", Passes(List(&Object(&CHAT_CALL)))),
        row("function_call", Passes(Object(&CALLED))),
        row("audio", Passes(Object(&HEARD))),
        // Data that compatible servers and proxies add to a reply, and that is sent back.
        data(
            "annotations reasoning reasoning_content reasoning_details thinking_blocks extra_content provider_specific_fields",
        ),
        row(CACHED, Passes(Object(&CACHE))),
    ],
);
static CHAT_TOOL: Shape = shape(
    "a tool",
    &[
        plain("type"),
        row("function", Passes(Object(&FUNCTION))),
        row("custom", Passes(Object(&CUSTOM))),
        row(CACHED, Passes(Object(&CACHE))),
    ],
);
static CHAT_TOOLS: Kinds = Kinds {
    are: "a tool",
    rows: &[
        row("function custom", Passes(Object(&CHAT_TOOL))),
        row(
            "web_search* browser_search live_search x_search google_search builtin_function",
            Named(WebSearch, why::SEARCH),
        ),
        row("code_interpreter code_execution", Named(CodeExecution, why::CODE)),
        row("file_search retrieval collections_search", Named(FileSearch, why::FILES)),
        row("image_generation", Named(ImageGeneration, why::IMAGES)),
        row("mcp", Named(Mcp, why::MCP)),
    ],
    untyped: &[row("function", Passes(Object(&CHAT_TOOL)))],
};
static VOICE: Shape = shape("a voice", &[plain("id")]);
static AUDIO: Shape =
    shape("audio options", &[plain("format"), row("voice", Passes(Either(&[Object(&VOICE), Plain])))]);
static GOOGLE: Shape = shape(
    "Gemini's own",
    &[data("thinking_config safety_settings"), row("cached_content", Named(Stored, why::CONVERSATION))],
);
static EXTRA_BODY: Shape = shape("extra members of the request", &[row("google", Passes(Object(&GOOGLE)))]);
static DOCUMENT_TEXT: Shape = shape("a document", &[plain("text title id"), data("data source")]);

/// `POST /chat/completions`.
pub static CHAT_COMPLETIONS: Shape = shape(
    "a request for a chat completion",
    &[
        row("messages", Passes(List(&Object(&CHAT_MESSAGE)))),
        row("tools", Passes(List(&Of::Kinds(&CHAT_TOOLS)))),
        row("functions", Passes(List(&Object(&FUNCTION)))),
        row("tool_choice", Passes(Either(&TOOL_CHOICES))),
        row("function_call", Passes(Either(&[Object(&NAMED_TOOL), Plain]))),
        row(
            "max_completion_tokens max_tokens",
            Bounded(Plain, "the output limit; if there are several, the largest counts"),
        ),
        row("n", Bounded(Plain, "from 1 to 128; the output limit counts for each")),
        row(
            "stream_options",
            Bounded(
                Object(&STREAM_OPTIONS),
                "Belay sets `include_usage` in streams, so that the reply has its usage, unless the pack says `streamUsage: AsWritten`",
            ),
        ),
        plain("model stream temperature top_p frequency_penalty presence_penalty stop seed logprobs top_logprobs"),
        plain("parallel_tool_calls modalities reasoning_effort verbosity service_tier user safety_identifier"),
        plain("prompt_cache_key prompt_cache_retention"),
        data("metadata logit_bias"),
        row("audio", Passes(Object(&AUDIO))),
        row("moderation", Passes(Object(&MODERATION))),
        row("prompt_cache_options", Passes(Object(&CACHE_OPTIONS))),
        row("response_format", Passes(Object(&FORMAT))),
        row("store", Passes(Switch(&Named(Stored, why::STORE)))),
        row("prediction", Refused("rejected predictions are charged beyond the output limit; leave it out")),
        row("web_search_options", Named(WebSearch, why::SEARCH)),
        // Members of compatible servers and proxies: sampling, and the form of the prompt.
        plain(
            "top_k top_a min_p typical_p tfs_z repetition_penalty length_penalty no_repeat_ngram_size early_stopping",
        ),
        plain(
            "min_tokens stop_token_ids include_stop_str_in_output ignore_eos skip_special_tokens spaces_between_special_tokens",
        ),
        plain("add_generation_prompt continue_final_message add_special_tokens echo truncate_prompt_tokens priority"),
        plain("mirostat mirostat_tau mirostat_eta dynatemp_range dynatemp_exponent xtc_probability xtc_threshold"),
        plain("dry_multiplier dry_base dry_allowed_length dry_penalty_last_n repeat_penalty repeat_last_n samplers"),
        plain("safe_prompt random_seed prompt_mode reasoning_format include_reasoning enable_thinking thinking_budget"),
        plain(
            "thinking_token_budget separate_reasoning stream_reasoning return_token_ids prompt_logprobs chat_template",
        ),
        plain(
            "guided_regex guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern grammar regex ebnf",
        ),
        plain("structural_tag citation_options disable_tool_validation keep_alive"),
        data("guided_json json_schema structured_outputs chat_template_kwargs thinking"),
        row("documents", Passes(List(&Object(&DOCUMENT_TEXT)))),
        row("reasoning", Passes(Object(&REASONING))),
        row("usage", Passes(Object(&USAGE))),
        row("extra_body", Passes(Object(&EXTRA_BODY))),
        // Members that make these servers do more.
        row(
            "max_new_tokens max_length max_output_tokens n_predict num_predict max_gen_len max_tokens_to_sample",
            Refused(why::LIMIT),
        ),
        row(
            "best_of num_return_sequences num_generations use_beam_search",
            Refused("the model would make and charge several replies, and show one; use `n`"),
        ),
        row(
            "search_parameters enable_search search_options search_settings search_mode search_domain_filter search_recency_filter include_domains exclude_domains web_search return_images return_related_questions",
            Named(WebSearch, why::SEARCH),
        ),
        row("data_sources plugins file_ids", Named(DataSources, why::SOURCES)),
        row("compound_custom", Named(CodeExecution, why::CODE)),
        row("models route provider transforms fallbacks model_list", Named(Fallbacks, why::OTHER_MODEL)),
        row("mcp_servers", Named(Mcp, why::MCP)),
        row("previous_response_id conversation cached_content session_id", Named(Stored, why::CONVERSATION)),
    ],
);
static USAGE: Shape = shape("usage options", &[plain("include")]);
