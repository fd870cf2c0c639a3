//! Tests requests against the tables: cases, the types that the providers publish, and requests generated from these types.

use rstest::rstest;
use serde_json::json;

use super::*;

pub(crate) mod published;

fn said(api: Api, body: Value, terms: Terms<'_>) -> Result<Noted, String> {
    review(api, body.as_object().unwrap(), terms).map_err(|unbounded| unbounded.to_string())
}

fn passes(api: Api, body: Value) {
    assert_eq!(said(api, body.clone(), Terms::default()), Ok(Noted::default()), "{body}");
}

fn refused(api: Api, body: Value) -> String {
    said(api, body.clone(), Terms::default()).expect_err(&format!("it passes: {body}"))
}

#[rstest]
#[case::chat(Api::ChatCompletions, json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]}))]
#[case::chat_agent(Api::ChatCompletions, json!({
    "model": "m", "stream": true, "stream_options": {"include_usage": true}, "n": 1, "metadata": {"anything": {"goes": [1]}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": {"$ref": "#/$defs/x", "maximum": 1e308}}},
    "tools": [{"type": "function", "function": {"name": "t", "parameters": {"properties": {"type": {"const": "web_search"}}}}},
              {"type": "custom", "custom": {"name": "c", "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": "x"}}}}],
    "tool_choice": {"type": "function", "function": {"name": "t"}},
    "messages": [
        {"role": "assistant", "content": null, "refusal": null, "audio": null, "annotations": [], "function_call": null,
         "tool_calls": [{"id": "1", "index": 0, "type": "function", "function": {"name": "t", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "DATA:image/png;base64,AAAA", "detail": "low"}},
                                      {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
                                      {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}}]}],
}))]
#[case::what_is_off(Api::ChatCompletions, json!({
    "messages": [], "store": false, "web_search_options": null, "prediction": null, "plugins": [], "enable_search": false, "tools": null
}))]
#[case::client_tools(Api::Messages, json!({"messages": [], "tools": [
    {"name": "a", "input_schema": {}}, {"type": null, "name": "web_search", "input_schema": {}}, {"type": "custom", "name": "b", "input_schema": {}},
    {"type": "bash_20250124", "name": "bash"}, {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool", "max_characters": 9},
    {"type": "computer_20250124", "name": "computer", "display_width_px": 1, "display_height_px": 1}, {"type": "memory_20250818", "name": "memory"},
    {"type": "bash_20991231", "name": "bash"}, {"type": "browser_toolset_20260801", "configs": {"navigate": {"enabled": true}}},
]}))]
#[case::claude_code(Api::Messages, json!({
    "model": "claude", "max_tokens": 32000, "stream": true, "metadata": {"user_id": "u"}, "thinking": {"type": "adaptive"},
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral", "ttl": "1h"}}], "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"},
                                                    {"type": "tool_use", "id": "1", "name": "Bash", "input": {"url": "https://evil.test"}}]},
                 {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [
                     {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}]}]}],
    "tools": [{"name": "Bash", "description": "d", "input_schema": {}, "eager_input_streaming": true}],
}))]
#[case::client_tools_of_responses(Api::Responses, json!({"input": "hi", "tools": [
    {"type": "function", "name": "f", "parameters": {"tools": [{"type": "mcp"}]}}, {"type": "custom", "name": "c"}, {"type": "local_shell"},
    {"type": "shell", "environment": {"type": "local", "skills": [{"name": "s", "path": "/s"}]}}, {"type": "apply_patch"}, {"type": "computer"},
    {"type": "computer_use_preview", "display_width": 1, "display_height": 1, "environment": "linux"}, {"type": "tool_search", "execution": "client"},
    {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}, {"type": "namespace", "tools": [{"type": "custom", "name": "c"}]}]},
]}))]
#[case::codex(Api::Responses, json!({
    "model": "m", "instructions": "i", "store": false, "stream": true, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k",
    "reasoning": {"effort": "low", "summary": "auto"}, "text": {"verbosity": "low"}, "parallel_tool_calls": true, "client_metadata": {"a": "b"},
    "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
              {"type": "message", "role": "developer", "content": [], "internal_chat_message_metadata_passthrough": {"content_item_kinds": ["k"]}},
              {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}], "encrypted_content": "e", "content": null},
              {"type": "reasoning", "summary": [], "internal_chat_message_metadata_passthrough": {"content_item_kinds": ["k"]}},
              {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": [], "logprobs": []}]},
              {"type": "local_shell_call", "call_id": "1", "status": "completed", "action": {"type": "exec", "command": ["ls"]}},
              {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
              {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image", "image_url": "data:image/png;base64,AA"}]},
              {"type": "function_call", "call_id": "2", "name": "f", "arguments": "{}", "internal_chat_message_metadata_passthrough": {}},
              {"type": "function_call_output", "call_id": "2", "output": "", "internal_chat_message_metadata_passthrough": {}},
              {"role": "user", "content": "and now?"}],
}))]
fn what_agents_send_passes(#[case] api: Api, #[case] body: Value) {
    passes(api, body);
}

/// A request with a tool, for a table of tools.
fn tools(api: Api, tool: Value) -> (Api, Value) {
    let prompt = if api == Api::Responses { "input" } else { "messages" };
    (api, json!({prompt: [], "tools": [tool]}))
}

#[test]
fn what_a_provider_would_do_is_refused_and_can_be_allowed_by_name() {
    use Capability as Can;
    let chat = |more: Value| {
        let mut body = json!({"messages": []});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        (Api::ChatCompletions, body)
    };
    let input = |item: Value| (Api::Responses, json!({"input": [item]}));
    let part = |part: Value| (Api::Responses, json!({"input": [{"role": "user", "content": [part]}]}));
    let block = |block: Value| (Api::Messages, json!({"messages": [{"role": "user", "content": [block]}]}));
    let cases = [
        (chat(json!({"web_search_options": {}})), Can::WebSearch, "/web_search_options"),
        (chat(json!({"search_parameters": {"mode": "on"}})), Can::WebSearch, "/search_parameters"),
        (chat(json!({"enable_search": true})), Can::WebSearch, "/enable_search"),
        (chat(json!({"model": "x/y:online"})), Can::WebSearch, "/model"),
        (chat(json!({"model": "GPT-4o-search-preview"})), Can::WebSearch, "/model"),
        (chat(json!({"plugins": [{"id": "web"}]})), Can::DataSources, "/plugins"),
        (chat(json!({"data_sources": [{"type": "azure_search"}]})), Can::DataSources, "/data_sources"),
        (chat(json!({"models": ["a", "b"]})), Can::Fallbacks, "/models"),
        (chat(json!({"store": true})), Can::Stored, "/store"),
        (
            chat(json!({"extra_body": {"google": {"cached_content": "c"}}})),
            Can::Stored,
            "/extra_body/google/cached_content",
        ),
        (
            chat(json!({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]})),
            Can::Files,
            "/messages/0/content/0/file/file_id",
        ),
        (chat(json!({"messages": [{"role": "assistant", "audio": {"id": "a"}}]})), Can::Stored, "/messages/0/audio/id"),
        (
            tools(Api::ChatCompletions, json!({"type": "builtin_function", "function": {"name": "$web_search"}})),
            Can::WebSearch,
            "/tools/0",
        ),
        (tools(Api::Responses, json!({"type": "web_search_2025_08_26"})), Can::WebSearch, "/tools/0"),
        (tools(Api::Responses, json!({"type": "file_search", "vector_store_ids": ["v"]})), Can::FileSearch, "/tools/0"),
        (
            tools(Api::Responses, json!({"type": "code_interpreter", "container": {"type": "auto"}})),
            Can::CodeExecution,
            "/tools/0",
        ),
        (tools(Api::Responses, json!({"type": "image_generation"})), Can::ImageGeneration, "/tools/0"),
        (tools(Api::Responses, json!({"type": "mcp", "server_url": "https://evil.test"})), Can::Mcp, "/tools/0"),
        (tools(Api::Responses, json!({"type": "shell"})), Can::HostedShell, "/tools/0"),
        (
            tools(Api::Responses, json!({"type": "shell", "environment": {"type": "container_auto"}})),
            Can::HostedShell,
            "/tools/0/environment",
        ),
        (tools(Api::Responses, json!({"type": "tool_search"})), Can::ToolSearch, "/tools/0"),
        (
            tools(Api::Responses, json!({"type": "tool_search", "execution": "server"})),
            Can::ToolSearch,
            "/tools/0/execution",
        ),
        (
            tools(
                Api::Responses,
                json!({"type": "namespace", "tools": [{"type": "custom", "name": "x"}, {"type": "web_search"}]}),
            ),
            Can::WebSearch,
            "/tools/0/tools/1",
        ),
        (
            input(json!({"type": "additional_tools", "role": "developer", "tools": [{"type": "mcp"}]})),
            Can::Mcp,
            "/input/0/tools/0",
        ),
        (
            input(json!({"type": "tool_search_output", "tools": [{"type": "code_interpreter"}]})),
            Can::CodeExecution,
            "/input/0/tools/0",
        ),
        (input(json!({"type": "mcp_approval_response", "approve": true})), Can::Mcp, "/input/0"),
        (input(json!({"type": "item_reference", "id": "msg_1"})), Can::Stored, "/input/0"),
        (input(json!({"id": "msg_1"})), Can::Stored, "/input/0"),
        (input(json!({"type": null, "id": "msg_1"})), Can::Stored, "/input/0"),
        (input(json!({"type": "compaction", "encrypted_content": "x"})), Can::Compaction, "/input/0"),
        (
            input(json!({"type": "computer_call_output", "output": {"type": "computer_screenshot", "file_id": "f"}})),
            Can::Files,
            "/input/0/output/file_id",
        ),
        (part(json!({"type": "input_file", "file_id": "f"})), Can::Files, "/input/0/content/0/file_id"),
        ((Api::Responses, json!({"input": "x", "previous_response_id": "r"})), Can::Stored, "/previous_response_id"),
        ((Api::Responses, json!({"input": "x", "conversation": {"id": "c"}})), Can::Stored, "/conversation"),
        ((Api::Responses, json!({"prompt": {"id": "p"}})), Can::Stored, "/prompt"),
        ((Api::Responses, json!({"input": "x", "background": true})), Can::Background, "/background"),
        (
            (
                Api::Responses,
                json!({"input": "x", "context_management": [{"type": "compaction", "compact_threshold": 1}]}),
            ),
            Can::Compaction,
            "/context_management/0",
        ),
        (
            tools(Api::Messages, json!({"type": "web_search_20250305", "name": "web_search"})),
            Can::WebSearch,
            "/tools/0",
        ),
        (tools(Api::Messages, json!({"type": "web_fetch_20990101", "name": "web_fetch"})), Can::WebFetch, "/tools/0"),
        (
            tools(Api::Messages, json!({"type": "code_execution_20250825", "name": "code_execution"})),
            Can::CodeExecution,
            "/tools/0",
        ),
        (
            tools(Api::Messages, json!({"type": "tool_search_tool_regex_20251119", "name": "t"})),
            Can::ToolSearch,
            "/tools/0",
        ),
        (
            tools(Api::Messages, json!({"type": "advisor_20260301", "name": "advisor", "model": "m"})),
            Can::Advisor,
            "/tools/0",
        ),
        (tools(Api::Messages, json!({"type": "mcp_toolset", "mcp_server_name": "m"})), Can::Mcp, "/tools/0"),
        (block(json!({"type": "container_upload", "file_id": "f"})), Can::Files, "/messages/0/content/0"),
        (
            block(json!({"type": "document", "source": {"type": "file", "file_id": "f"}})),
            Can::Files,
            "/messages/0/content/0/source",
        ),
        (
            block(
                json!({"type": "tool_addition", "tool": {"type": "tool_definition", "definition": {"type": "web_fetch_20250910"}}}),
            ),
            Can::WebFetch,
            "/messages/0/content/0/tool/definition",
        ),
        (
            block(
                json!({"type": "tool_result", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]}),
            ),
            Can::Files,
            "/messages/0/content/0/content/0/source",
        ),
        ((Api::Messages, json!({"messages": [], "mcp_servers": [{"type": "url"}]})), Can::Mcp, "/mcp_servers"),
        ((Api::Messages, json!({"messages": [], "container": "c"})), Can::CodeExecution, "/container"),
        ((Api::Messages, json!({"messages": [], "fallbacks": [{"model": "n"}]})), Can::Fallbacks, "/fallbacks"),
        ((Api::Messages, json!({"messages": [], "thread": {"type": "create"}})), Can::Stored, "/thread"),
        (
            (Api::Messages, json!({"messages": [], "context_management": {"edits": [{"type": "compact_20260112"}]}})),
            Can::Compaction,
            "/context_management/edits/0",
        ),
    ];
    for ((api, body), capability, place) in cases {
        let word = refused(api, body.clone());
        assert!(word.contains(&format!(" at {place} is denied")), "{place}: {word}");
        assert!(word.contains(&format!("spec.models.allow: [{}]", capability.as_str())), "{word}");
        let terms = Terms { allow: &[capability], ..Terms::default() };
        let noted = Noted { allowed: BTreeSet::from([capability]), unknown: vec![] };
        assert_eq!(said(api, body.clone(), terms), Ok(noted), "{body}");
        let others: Vec<_> = Capability::ALL.iter().copied().filter(|other| *other != capability).collect();
        let terms = Terms { allow: &others, ..Terms::default() };
        assert!(said(api, body.clone(), terms).is_err(), "another name allows {body}");
    }
}

/// A name that is cut could contain a part of a secret that nobody recognizes.
#[test]
fn a_name_is_quoted_whole_and_once_or_not_at_all() {
    for (length, quoted) in [(5, 1), (256, 1), (257, 0), (100_000, 0)] {
        let name = "x".repeat(length);
        for body in
            [json!({name.clone(): 1}), json!({"messages": [{name.clone(): 1}]}), json!({"tools": [{"type": name}]})]
        {
            let word = refused(Api::ChatCompletions, body);
            assert_eq!(
                (word.matches(&name).count(), word.matches("xxxxx").count() > 0),
                (quoted, quoted == 1),
                "{word}"
            );
            assert!(word.len() < 1_000, "{word}");
        }
    }
}

#[rstest]
#[case(Api::ChatCompletions, json!({"max_tokens": 1, "n_predict": 50000}), "`n_predict` at /n_predict is denied")]
#[case(Api::ChatCompletions, json!({"max_new_tokens": 5}), "write max_completion_tokens")]
#[case(Api::ChatCompletions, json!({"best_of": 100}), "use `n`")]
#[case(Api::ChatCompletions, json!({"prediction": {"type": "content", "content": "x"}}), "rejected predictions")]
#[case(Api::ChatCompletions, json!({"tools": {"type": "web_search"}}), "`tools` at /tools is malformed: expected a list")]
#[case(Api::ChatCompletions, json!({"extra_body": {"tools": [{"type": "web_search"}]}}), "`tools` in /extra_body is unknown")]
#[case(Api::ChatCompletions, json!({"tools": [{"type": "function", "function": {"name": "x"}, "tools": [{"type": "mcp"}]}]}), "`tools` in /tools/0 is unknown")]
#[case(Api::ChatCompletions, json!({"tools": ["web_search"]}), "is malformed")]
#[case(Api::ChatCompletions, json!({"tools": [{"type": ["web_search"]}]}), "/tools/0 is unknown")]
#[case(Api::ChatCompletions, json!({"tools": [{"name": "x"}]}), "/tools/0 is unknown")]
#[case(Api::ChatCompletions, json!({"messages": "hi"}), "/messages is malformed")]
#[case(Api::ChatCompletions, json!({"messages": [{"role": "user", "content": {"type": "text"}}]}), "/messages/0/content is malformed")]
#[case(Api::ChatCompletions, json!({"messages": [{"role": "user", "content": [{"type": "telepathy"}]}]}), "`telepathy` at /messages/0/content/0 is unknown")]
#[case(Api::ChatCompletions, json!({"temperature": {"a": 1}}), "/temperature is malformed")]
#[case(Api::ChatCompletions, json!({"store": "yes"}), "/store is malformed")]
#[case(Api::ChatCompletions, json!({"stop": [["a"]]}), "/stop is malformed")]
#[case(Api::ChatCompletions, json!({"brand~new/": 1}), "`brand~new/` is unknown: expected a member of a request for a chat completion that Belay knows")]
#[case(Api::Responses, json!({"tools": [{"type": "function", "name": "x", "tools": [{"type": "mcp"}]}]}), "`tools` in /tools/0 is unknown")]
#[case(Api::Responses, json!({"input": {"type": "item_reference"}}), "/input is malformed")]
#[case(Api::Responses, json!({"input": [["a"]]}), "/input/0 is malformed")]
#[case(Api::Responses, json!({"input": [{"type": "teleport"}]}), "`teleport` at /input/0 is unknown")]
#[case(Api::Responses, json!({"max_output_tokens": 1, "max_tokens": 9}), "write max_output_tokens")]
#[case(Api::Messages, json!({"workspace_id": "w"}), "the account that pays")]
#[case(Api::Messages, json!({"tools": [{"type": "custom", "name": "x", "server_url": "https://evil.test"}]}), "`server_url` in /tools/0 is unknown")]
#[case(Api::Messages, json!({"system": {"type": "text"}}), "/system is malformed")]
fn what_no_table_has_is_refused_by_name_and_place(#[case] api: Api, #[case] body: Value, #[case] word: &str) {
    let refused = refused(api, body);
    assert!(refused.contains(word), "{refused}");
}

/// All places at which a provider fetches the contents of a URL.
fn fetched(url: &str) -> Vec<(Api, Value)> {
    let chat = |part: Value| (Api::ChatCompletions, json!({"messages": [{"role": "user", "content": [part]}]}));
    let input = |part: Value| (Api::Responses, json!({"input": [{"role": "user", "content": [part]}]}));
    let block = |block: Value| (Api::Messages, json!({"messages": [{"role": "user", "content": [block]}]}));
    vec![
        chat(json!({"type": "image_url", "image_url": {"url": url}})),
        chat(json!({"type": "image_url", "image_url": url})),
        chat(json!({"type": "video_url", "video_url": {"url": url}})),
        chat(json!({"type": "file", "file": {"file_data": url}})),
        chat(json!({"type": "input_audio", "input_audio": {"data": url}})),
        input(json!({"type": "input_image", "image_url": url})),
        input(json!({"type": "input_file", "file_url": url})),
        (
            Api::Responses,
            json!({"input": [{"type": "function_call_output", "output": [{"type": "input_image", "image_url": url}]}]}),
        ),
        (
            Api::Responses,
            json!({"input": [{"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": url}}]}),
        ),
        block(json!({"type": "image", "source": {"type": "url", "url": url}})),
        block(json!({"type": "document", "source": {"type": "url", "url": url}})),
        block(json!({"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": url}}]})),
        block(
            json!({"type": "document", "source": {"type": "content", "content": [{"type": "image", "source": {"type": "url", "url": url}}]}}),
        ),
        (Api::Messages, json!({"system": [{"type": "image", "source": {"type": "url", "url": url}}]})),
    ]
}

#[test]
fn a_provider_fetches_only_from_where_the_agent_may_go_itself() {
    let host = |host: &str, uses: &[EgressUse]| EgressHost {
        host: host.into(),
        ports: vec![443],
        uses: uses.to_vec(),
        credential: None,
        barred: false,
    };
    let egress = [
        host("pictures.test", &[EgressUse::Direct]),
        host("*.cdn.test", &[EgressUse::Direct]),
        host("models.test", &[EgressUse::Models, EgressUse::Tools]),
    ];
    let terms = Terms { egress: &egress, ..Terms::default() };
    for url in [
        "https://pictures.test/a.png?b#c",
        "HTTPS://Pictures.test",
        "https://a.cdn.test:443/x",
        "data:image/png;base64,AA",
    ] {
        for (api, body) in fetched(url) {
            assert_eq!(said(api, body.clone(), terms), Ok(Noted::default()), "{body}");
        }
    }
    for url in [
        "https://evil.test/?secret=1",
        "http://pictures.test/",
        "https://pictures.test:8443/",
        "https://models.test/",
        "https://cdn.test/",
        "https://pictures.test@evil.test/",
        "https://evil.test\\@pictures.test/",
        "https://evil.test/\thttps://pictures.test",
        "https://pictures.test\u{3002}evil.test/",
        "https://[::1]/",
        "https://127.0.0.1/",
        "gs://bucket/x",
        "file:///etc/passwd",
        " https://pictures.test/",
        "https://",
    ] {
        for (api, body) in fetched(url) {
            let word = said(api, body.clone(), terms).expect_err(&format!("it passes: {body}"));
            assert!(word.contains("the provider would fetch it for the agent"), "{word}");
        }
    }
    // Values that are not URLs and are not fetched: text and bytes.
    for text in ["AAAA", "see https://evil.test"] {
        passes(Api::Messages, json!({"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}));
    }
    passes(
        Api::ChatCompletions,
        json!({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "JVBERi0="}}]}]}),
    );
}

#[test]
fn unknown_members_pass_where_the_pack_says_so_and_nothing_else() {
    let terms = Terms { unknown: UnknownMembers::Pass, ..Terms::default() };
    let body = json!({"brand_new": {"a": 1}, "messages": [{"role": "user", "content": "x", "mood": "good"}]});
    let unknown = vec!["/brand_new".to_owned(), "/messages/0/mood".to_owned()];
    assert_eq!(said(Api::ChatCompletions, body, terms), Ok(Noted { unknown, ..Noted::default() }));
    for body in [
        json!({"web_search_options": {}}),
        json!({"n_predict": 5}),
        json!({"tools": [{"type": "brand_new"}]}),
        json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://evil.test"}}]}]}),
    ] {
        assert!(said(Api::ChatCompletions, body.clone(), terms).is_err(), "{body}");
    }
}
