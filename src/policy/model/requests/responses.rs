//! The tables of a request for a response.
//!
//! Guarantees: see [`requests`](super).
//! Non-goals: the shapes that other APIs share, which are in [`requests`](super).

use super::{
    CACHE, CACHE_OPTIONS, CACHED, CUSTOM, FORMAT, FUNCTION, INPUT_AUDIO, MODERATION, REASONING, STREAM_OPTIONS,
    TOOL_CHOICES, data, kinds, plain, row, shape, why,
};
use crate::policy::model::table::{
    Capability::{
        Background, CodeExecution, Compaction, DataSources, Fallbacks, FileSearch, Files, HostedShell, ImageGeneration,
        Mcp, Stored, ToolSearch, WebSearch,
    },
    Fate::{Bounded, Named, Passes, Refused},
    Kinds,
    Of::{self, Either, Inline, List, Object, Plain, Url, Words},
    Row, Shape,
};

// Tools that the agent runs.
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

// Items of the input.
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
