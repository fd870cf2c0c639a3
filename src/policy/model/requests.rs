//! The tables of what a request to a model may contain, for each API.
//!
//! Guarantees: the tables name each member, part and tool that the providers' own SDKs publish, or deny or allow as a whole what contains
//! it. A test compares the two. `docs/model-requests.md` is generated from the tables.
//!
//! How to classify a new entry: does it make the provider fetch, run, remember, ask another party, or charge something that the request's
//! own bytes do not determine? Then a pack has to allow it by name. It matters who runs a tool, not who has defined it.

use super::table::{
    Capability::{
        self, Advisor, Background, CodeExecution, Compaction, DataSources, Fallbacks, FileSearch, Files, HostedShell,
        ImageGeneration, Mcp, Stored, ToolSearch, WebFetch, WebSearch,
    },
    Fate::{self, Bounded, Named, Passes, Refused},
    Kinds,
    Of::{self, Data, Either, Inline, List, Object, Plain, Switch, Url, Words},
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
static TYPE_ONLY: Shape = shape("a tool without settings", &[plain("type allowed_callers")]);
static COMPUTER: Shape = shape("a computer", &[plain("type display_width display_height environment")]);
static SKILL: Shape = shape("a skill", &[plain("name description path")]);
static LOCAL: Shape =
    shape("an environment of the agent's own", &[plain("type"), row("skills", Passes(List(&Object(&SKILL))))]);
static ENVIRONMENT: Kinds = kinds(
    "an environment of a shell",
    &[row("local", Passes(Object(&LOCAL))), row("container_auto container_reference", Named(HostedShell, why::SHELL))],
);
static SHELL: Shape = Shape {
    is: "a shell",
    rows: &[plain("type allowed_callers"), row("environment", Passes(Of::Kinds(&ENVIRONMENT)))],
    needs: Some(("environment", Named(HostedShell, why::SHELL))),
};
static NAMESPACE: Shape = shape(
    "a namespace of tools",
    &[plain("type name description"), row("tools", Passes(List(&Of::Kinds(&RESPONSE_TOOLS))))],
);
static CLIENT_SEARCH: Shape = Shape {
    is: "a search for tools",
    rows: &[
        plain("type description"),
        data("parameters"),
        row("execution", Passes(Words(&["client"], &Named(ToolSearch, why::TOOLS)))),
    ],
    needs: Some(("execution", Named(ToolSearch, why::TOOLS))),
};

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

// ---- Chat completions ----

static IMAGE_URL: Shape = shape("a picture", &[plain("detail format"), row("url", Passes(Url))]);
static VIDEO_URL: Shape = shape("a video or a sound", &[row("url", Passes(Url))]);
static INPUT_AUDIO: Shape = shape("a sound", &[plain("format"), row("data", Passes(Inline))]);
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

// ---- Responses ----

static RESPONSE_PART: Shape = shape(
    "a part of a message",
    &[
        plain("type text refusal detail filename"),
        row("image_url file_url", Passes(Url)),
        row("file_data", Passes(Inline)),
        row("input_audio", Passes(Object(&INPUT_AUDIO))),
        row("file_id", Named(Files, why::FILE)),
        // Data of a reply about its own text.
        data("annotations logprobs"),
        row(CACHED, Passes(Object(&CACHE))),
    ],
);
static RESPONSE_PARTS: Kinds = kinds(
    "a part of a message",
    &[row(
        "input_text input_image input_file input_audio output_text refusal text summary_text reasoning_text computer_screenshot",
        Passes(Object(&RESPONSE_PART)),
    )],
);
static RESPONSE_CONTENT: [Of; 2] = [List(&Of::Kinds(&RESPONSE_PARTS)), Plain];
/// What Codex notes on each item for itself: types of content. No published type has this member.
const OF_CODEX: Row = data("internal_chat_message_metadata_passthrough");
static RESPONSE_MESSAGE: Shape = shape(
    "a message",
    &[plain("type role id status phase name"), OF_CODEX, row("content", Passes(Either(&RESPONSE_CONTENT)))],
);
static CALLER: Shape = shape("the caller of a tool", &[plain("type caller_id")]);
static RESPONSE_CALL: Shape = shape(
    "a call of a tool that the agent runs",
    &[
        plain("type id call_id status name namespace async execution created_by"),
        OF_CODEX,
        data("arguments input"),
        row("caller", Passes(Object(&CALLER))),
    ],
);
static SAFETY_CHECK: Shape = shape("a safety check", &[plain("id code message")]);
static COMPUTER_CALL: Shape = shape(
    "a call of a computer",
    &[
        plain("type id call_id status"),
        row("pending_safety_checks", Passes(List(&Object(&SAFETY_CHECK)))),
        data("action actions"),
    ],
);
static CALL_ACTION: Shape = shape(
    "a call of a shell, or a patch",
    &[
        plain("type id call_id status created_by"),
        data("action operation"),
        row("caller", Passes(Object(&CALLER))),
        row("environment", Passes(Of::Kinds(&ENVIRONMENT))),
    ],
);
static CALL_OUTPUT: Shape = shape(
    "the output of a call",
    &[
        plain("type id call_id status name namespace created_by"),
        OF_CODEX,
        row("output", Passes(Either(&RESPONSE_CONTENT))),
        row("caller", Passes(Object(&CALLER))),
    ],
);
static SHELL_OUTPUT: Shape = shape(
    "the output of a shell",
    &[
        plain("type id call_id status max_output_length created_by"),
        data("output"),
        row("caller", Passes(Object(&CALLER))),
    ],
);
static SCREENSHOT: Shape = shape(
    "a screenshot",
    &[plain("type detail"), row("image_url", Passes(Url)), row("file_id", Named(Files, why::FILE))],
);
static COMPUTER_OUTPUT: Shape = shape(
    "the output of a computer",
    &[
        plain("type id call_id status created_by"),
        row("output", Passes(Object(&SCREENSHOT))),
        row("acknowledged_safety_checks", Passes(List(&Object(&SAFETY_CHECK)))),
    ],
);
static REASONING_ITEM: Shape = shape(
    "the model's reasoning",
    &[
        plain("type id status encrypted_content"),
        OF_CODEX,
        row("summary content", Passes(List(&Of::Kinds(&RESPONSE_PARTS)))),
    ],
);
static FOUND_TOOLS: Shape = shape(
    "tools that were found or added",
    &[
        plain("type id call_id status execution role created_by"),
        row("tools", Passes(List(&Of::Kinds(&RESPONSE_TOOLS)))),
    ],
);
static SEARCHED: Shape =
    shape("a search for tools", &[plain("type id call_id status execution created_by"), data("arguments")]);
static RESPONSE_TEXT: Shape =
    shape("options of the reply's text", &[plain("verbosity"), row("format", Passes(Object(&FORMAT)))]);
static NEW_SETTINGS: Shape = shape(
    "other settings from here on",
    &[plain("type id"), row("reasoning", Passes(Object(&REASONING))), row("text", Passes(Object(&RESPONSE_TEXT)))],
);
static RESPONSE_ITEMS: Kinds = Kinds {
    are: "an item of the input",
    rows: &[
        row("message", Passes(Object(&RESPONSE_MESSAGE))),
        row("function_call custom_tool_call", Passes(Object(&RESPONSE_CALL))),
        row(
            "function_call_output custom_tool_call_output local_shell_call_output apply_patch_call_output",
            Passes(Object(&CALL_OUTPUT)),
        ),
        row("shell_call_output", Passes(Object(&SHELL_OUTPUT))),
        row("local_shell_call shell_call apply_patch_call", Passes(Object(&CALL_ACTION))),
        row("computer_call", Passes(Object(&COMPUTER_CALL))),
        row("computer_call_output", Passes(Object(&COMPUTER_OUTPUT))),
        row("reasoning", Passes(Object(&REASONING_ITEM))),
        row("tool_search_call", Passes(Object(&SEARCHED))),
        row("tool_search_output additional_tools", Passes(Object(&FOUND_TOOLS))),
        row("configuration_update", Passes(Object(&NEW_SETTINGS))),
        row("input_text input_image input_file", Passes(Object(&RESPONSE_PART))),
        row("item_reference", Named(Stored, why::CONVERSATION)),
        row("compaction compaction_summary compaction_trigger", Named(Compaction, why::COMPACT)),
        row("web_search_call", Named(WebSearch, why::SEARCH)),
        row("file_search_call", Named(FileSearch, why::FILES)),
        row("code_interpreter_call program program_output", Named(CodeExecution, why::CODE)),
        row("image_generation_call", Named(ImageGeneration, why::IMAGES)),
        row("mcp_list_tools mcp_approval_request mcp_approval_response mcp_call", Named(Mcp, why::MCP)),
    ],
    untyped: &[row("role", Passes(Object(&RESPONSE_MESSAGE))), row("id", Named(Stored, why::CONVERSATION))],
};
static RESPONSE_TOOLS: Kinds = kinds(
    "a tool",
    &[
        row("function", Passes(Object(&FUNCTION))),
        row("custom", Passes(Object(&CUSTOM))),
        row("local_shell apply_patch", Passes(Object(&TYPE_ONLY))),
        row("shell", Passes(Object(&SHELL))),
        row("computer computer_use_preview*", Passes(Object(&COMPUTER))),
        row("namespace", Passes(Object(&NAMESPACE))),
        row("tool_search", Passes(Object(&CLIENT_SEARCH))),
        row("web_search* x_search", Named(WebSearch, why::SEARCH)),
        row("file_search", Named(FileSearch, why::FILES)),
        row("code_interpreter programmatic_tool_calling", Named(CodeExecution, why::CODE)),
        row("image_generation", Named(ImageGeneration, why::IMAGES)),
        row("mcp", Named(Mcp, why::MCP)),
    ],
);
static COMPACTIONS: Kinds =
    kinds("a way to shorten the conversation", &[row("compaction", Named(Compaction, why::COMPACT))]);
static PICTURES: Shape = shape("image options", &[plain("context_compression")]);

/// `POST /responses`, and `POST /responses/input_tokens`, which counts the prompt of such a request.
pub static RESPONSES: Shape = shape(
    "a request for a response",
    &[
        row("input", Passes(Either(&[List(&Of::Kinds(&RESPONSE_ITEMS)), Plain]))),
        row("tools", Passes(List(&Of::Kinds(&RESPONSE_TOOLS)))),
        row("tool_choice", Passes(Either(&TOOL_CHOICES))),
        row("max_output_tokens", Bounded(Plain, "the output limit")),
        row("stream_options", Passes(Object(&STREAM_OPTIONS))),
        plain("model stream instructions temperature top_p top_logprobs truncation include max_tool_calls personality"),
        plain("parallel_tool_calls service_tier user safety_identifier prompt_cache_key prompt_cache_retention"),
        data("metadata client_metadata access_programs"),
        row("image", Passes(Object(&PICTURES))),
        row("reasoning", Passes(Object(&REASONING))),
        row("text", Passes(Object(&RESPONSE_TEXT))),
        row("moderation", Passes(Object(&MODERATION))),
        row("prompt_cache_options", Passes(Object(&CACHE_OPTIONS))),
        // Storing is the default of the API. A stored reply can be read only by its ID, which is denied, or with the provider's key, which
        // the agent does not have.
        row("store", Bounded(Plain, "as the agent wrote it, or `false` if the pack says `storeReplies: Never`")),
        row("previous_response_id conversation prompt", Named(Stored, why::CONVERSATION)),
        row("background background_options", Named(Background, why::BACKGROUND)),
        row("context_management", Passes(List(&Of::Kinds(&COMPACTIONS)))),
        row("mcp_servers", Named(Mcp, why::MCP)),
        row("plugins", Named(DataSources, why::SOURCES)),
        row("models route provider fallbacks", Named(Fallbacks, why::OTHER_MODEL)),
        row(
            "max_tokens max_completion_tokens max_new_tokens n_predict num_predict",
            Refused("it can be a different output limit than the one that Belay reserves; write max_output_tokens"),
        ),
        row("n best_of", Refused("the model would make and charge several replies; request one at a time")),
    ],
);

// ---- Messages ----

static SOURCE: Shape = shape(
    "the data of a source",
    &[
        plain("type media_type data"),
        row("url", Passes(Url)),
        row("file_id", Named(Files, why::FILE)),
        row("content", Passes(Either(&MESSAGE_CONTENT))),
    ],
);
static SOURCES: Kinds =
    kinds("a source", &[row("base64 text content url", Passes(Object(&SOURCE))), row("file", Named(Files, why::FILE))]);
static CITED: Shape = shape("citation options", &[plain("enabled")]);
static TRANSFORMED: Shape = shape("image options", &[plain("oversized_image")]);
static MESSAGE_BLOCK: Shape = shape(
    "a block of a message",
    &[
        plain("type text id name signature thinking data tool_use_id tool_name toolset_name is_error title context"),
        row("source", Passes(Either(&[Of::Kinds(&SOURCES), Plain]))),
        row("content", Passes(Either(&MESSAGE_CONTENT))),
        row("citations", Passes(Either(&[Object(&CITED), List(&Data)]))),
        row("caller", Passes(Data)),
        row("transformations", Passes(Object(&TRANSFORMED))),
        data("input tabs state_changes"),
        row(CACHED, Passes(Object(&CACHE))),
    ],
);
static CHANGED_TOOL: Shape =
    shape("a tool to add or to remove", &[plain("type name"), row("definition", Passes(Of::Kinds(&MESSAGE_TOOLS)))]);
static CHANGED_TOOLS: Kinds = kinds(
    "a tool to add or to remove",
    &[
        row("tool_reference tool_definition", Passes(Object(&CHANGED_TOOL))),
        row("mcp_tool_reference mcp_toolset_reference", Named(Mcp, why::MCP)),
    ],
);
static TOOL_CHANGE: Shape = shape(
    "a change of tools",
    &[plain("type"), row("tool", Passes(Of::Kinds(&CHANGED_TOOLS))), row(CACHED, Passes(Object(&CACHE)))],
);
static MESSAGE_BLOCKS: Kinds = kinds(
    "a block of a message",
    &[
        row(
            "text image document search_result thinking redacted_thinking tool_use tool_result tool_reference browser_state",
            Passes(Object(&MESSAGE_BLOCK)),
        ),
        row("tool_addition tool_removal", Passes(Object(&TOOL_CHANGE))),
        row("web_search_tool_result", Named(WebSearch, why::SEARCH)),
        row("web_fetch_tool_result", Named(WebFetch, why::FETCH)),
        row("server_tool_use", Passes(Object(&SERVER_TOOL_USE))),
        row("advisor_tool_result", Named(Advisor, why::ADVICE)),
        row(
            "code_execution_tool_result bash_code_execution_tool_result text_editor_code_execution_tool_result",
            Named(CodeExecution, why::CODE),
        ),
        row("tool_search_tool_result", Named(ToolSearch, why::TOOLS)),
        row("mcp_tool_use mcp_tool_result mcp_tool_listing", Named(Mcp, why::MCP)),
        row("container_upload", Named(Files, why::FILE)),
        row("compaction", Named(Compaction, why::COMPACT)),
        row("fallback", Named(Fallbacks, why::OTHER_MODEL)),
    ],
);
/// What the provider did in an earlier reply. The provider does not repeat it.
static SERVER_TOOL_USE: Shape = shape(
    "a call that the provider made",
    &[plain("type id name"), data("input caller"), row(CACHED, Passes(Object(&CACHE)))],
);
static MESSAGE_CONTENT: [Of; 2] = [List(&Of::Kinds(&MESSAGE_BLOCKS)), Plain];
static EFFORT: Shape = shape("an effort setting", &[plain("effort")]);
static MESSAGE: Shape = shape(
    "a message",
    &[
        plain("role clear_at"),
        row("content", Passes(Either(&MESSAGE_CONTENT))),
        row("output_config", Passes(Object(&EFFORT))),
    ],
);
static MESSAGE_TOOL: Shape = shape(
    "a tool that the agent runs",
    &[
        plain("type name description strict defer_loading allowed_callers eager_input_streaming max_characters"),
        plain("display_width_px display_height_px display_number enable_zoom"),
        data("input_schema input_examples configs"),
        row(CACHED, Passes(Object(&CACHE))),
    ],
);
static MESSAGE_TOOLS: Kinds = Kinds {
    are: "a tool",
    rows: &[
        row("custom", Passes(Object(&MESSAGE_TOOL))),
        row("bash_* text_editor_* computer_* memory_* browser_toolset_*", Passes(Object(&MESSAGE_TOOL))),
        row("web_search_*", Named(WebSearch, why::SEARCH)),
        row("web_fetch_*", Named(WebFetch, why::FETCH)),
        row("code_execution_*", Named(CodeExecution, why::CODE)),
        row("tool_search_tool_*", Named(ToolSearch, why::TOOLS)),
        row("advisor_*", Named(Advisor, why::ADVICE)),
        row("mcp_toolset", Named(Mcp, why::MCP)),
    ],
    untyped: &[row("name", Passes(Object(&MESSAGE_TOOL)))],
};
static BUDGET: Shape = shape("a budget of tokens", &[plain("type total remaining")]);
static OUTPUT: Shape = shape(
    "options of the reply's text",
    &[plain("effort"), row("format", Passes(Object(&FORMAT))), row("task_budget", Passes(Object(&BUDGET)))],
);
static BINDING: Shape = shape("a binding of thinking", &[plain("prefix_mismatch_behavior")]);
static THINKING: Shape =
    shape("a thinking setting", &[plain("type budget_tokens display"), row("block_binding", Passes(Object(&BINDING)))]);
static CLEARED: Shape = shape(
    "a rule to clear parts of the conversation",
    &[plain("type clear_tool_inputs exclude_tools"), data("clear_at_least keep trigger")],
);
static EDITS: Kinds = kinds(
    "a change of the conversation",
    &[
        row("clear_tool_uses_* clear_thinking_*", Passes(Object(&CLEARED))),
        row("compact_*", Named(Compaction, why::COMPACT)),
    ],
);
static CONTEXT: Shape = shape("changes of the conversation", &[row("edits", Passes(List(&Of::Kinds(&EDITS))))]);
static LAST_MESSAGE: Shape =
    shape("a diagnostics setting", &[row("previous_message_id", Named(Stored, why::CONVERSATION))]);

/// `POST /messages`, and `POST /messages/count_tokens`, which counts the prompt of such a request.
pub static MESSAGES: Shape = shape(
    "a request for a message",
    &[
        row("messages", Passes(List(&Object(&MESSAGE)))),
        row("system", Passes(Either(&MESSAGE_CONTENT))),
        row("tools", Passes(List(&Of::Kinds(&MESSAGE_TOOLS)))),
        row("tool_choice", Passes(Either(&TOOL_CHOICES))),
        row("max_tokens", Bounded(Plain, "the output limit")),
        plain("model stream stop_sequences temperature top_p top_k service_tier speed inference_geo"),
        plain("betas anthropic_beta anthropic_version"),
        data("metadata"),
        row("output_config", Passes(Object(&OUTPUT))),
        row("output_format", Passes(Object(&FORMAT))),
        row("thinking", Passes(Object(&THINKING))),
        row("context_management", Passes(Object(&CONTEXT))),
        row("diagnostics", Passes(Object(&LAST_MESSAGE))),
        row(CACHED, Passes(Object(&CACHE))),
        row("mcp_servers", Named(Mcp, why::MCP)),
        row("container", Named(CodeExecution, why::CODE)),
        row("compaction", Named(Compaction, why::COMPACT)),
        row("fallbacks fallback_credit_token", Named(Fallbacks, why::OTHER_MODEL)),
        row("thread", Named(Stored, why::CONVERSATION)),
        row("workspace_id user_profile_id billing_policy", Refused(why::ACCOUNT)),
        row(
            "max_output_tokens max_completion_tokens max_tokens_to_sample",
            Refused("it can be a different output limit than the one that Belay reserves; write max_tokens"),
        ),
    ],
);

// ---- Others ----

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
