//! The tables of a request for a message.
//!
//! Guarantees: see [`requests`](super).
//! Non-goals: the shapes that other APIs share, which are in [`requests`](super).

use super::{CACHE, CACHED, FORMAT, TOOL_CHOICES, data, kinds, plain, row, shape, why};
use crate::policy::model::table::{
    Capability::{Advisor, CodeExecution, Compaction, Fallbacks, Files, Mcp, Stored, ToolSearch, WebFetch, WebSearch},
    Fate::{Bounded, Named, Passes, Refused},
    Kinds,
    Of::{self, Data, Either, List, Object, Plain, Url},
    Shape,
};

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
