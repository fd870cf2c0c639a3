//! Reads the messages of an MCP server.
//!
//! Guarantees: an answer of the server reaches the caller in a form that rmcp reads, whatever else the message has. A content block of an
//! unknown type passes as text with its JSON if it is short, and as a note otherwise. The blocks beside it pass unchanged, and so do the
//! tools beside one that cannot be read. An error without
//! the id of the request, as servers send that did not read the request, answers the request if it is the whole reply.
//!
//! Non-goals: what an answer means for the call, see [`meaning`](super::meaning).

use rmcp::model::{
    CallToolResult, ClientJsonRpcMessage, ClientRequest, ContentBlock, ErrorCode, ErrorData, RequestId,
    ServerJsonRpcMessage, ServerResult,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::meaning::{Answer, Finish, is_about_session};
use crate::{
    listed::{self, Odd},
    policy::shorten::shorten,
};

/// The longest unknown content block that passes, in bytes of JSON.
const LONGEST_BLOCK: usize = 64 << 10;
/// The longest text of a server that is kept for a reason, in bytes.
const LONGEST_WORDS: usize = 4096;

/// A message that was sent to a server.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// The id, if the message expects an answer.
    id: Option<RequestId>,
    method: Method,
}

/// What a message asks for, as far as its answer is read differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Call,
    List,
    Discover,
    Other,
}

impl Asked {
    /// Creates it from the message.
    pub(super) fn of(message: &ClientJsonRpcMessage) -> Self {
        let ClientJsonRpcMessage::Request(request) = message else { return Self { id: None, method: Method::Other } };
        let method = match &request.request {
            ClientRequest::CallToolRequest(_) => Method::Call,
            ClientRequest::ListToolsRequest(_) => Method::List,
            ClientRequest::DiscoverRequest(_) => Method::Discover,
            _ => Method::Other,
        };
        Self { id: Some(request.id.clone()), method }
    }

    /// Returns whether the message expects an answer.
    pub(super) fn is_request(&self) -> bool {
        self.id.is_some()
    }

    /// Returns whether the message asks for the versions of a server.
    pub(super) fn discovers(&self) -> bool {
        self.method == Method::Discover
    }

    /// Returns an error that answers the message.
    pub(super) fn error(&self, error: ErrorData) -> ServerJsonRpcMessage {
        ServerJsonRpcMessage::error(error, self.id.clone())
    }

    /// Returns whether a message of a server has the id of this one. Some servers write a number as a text.
    fn is_answered_by(&self, message: &Value) -> bool {
        let (Some(ours), Some(theirs)) = (&self.id, message.get("id")) else { return false };
        RequestId::deserialize(theirs).is_ok_and(|theirs| theirs == *ours || theirs.to_string() == ours.to_string())
    }
}

/// A message of a server.
#[derive(Clone, Debug)]
pub(super) struct Said {
    /// The message for rmcp. It is absent if rmcp cannot use it.
    pub(super) message: Option<ServerJsonRpcMessage>,
    /// The answer, if the message is one to the request.
    pub(super) answer: Option<Answer>,
    /// The server's own words about an error.
    pub(super) words: Option<String>,
    /// The tools of a list that cannot be read.
    pub(super) odd: Vec<Odd>,
}

impl Said {
    fn of(message: Option<ServerJsonRpcMessage>, answer: Option<Answer>, words: Option<String>) -> Self {
        Self { message, answer, words, odd: vec![] }
    }
}

/// Reads the body of a reply that is not an event stream.
pub(super) fn body(asked: &Asked, body: &[u8]) -> Said {
    let text = || cut(&String::from_utf8_lossy(body));
    let no_answer = |words: Option<String>, answer| Said::of(None, Some(answer), words);
    if body.iter().all(u8::is_ascii_whitespace) {
        return no_answer(None, Answer::Nothing);
    }
    let other = || {
        let words = text();
        let about_session = is_about_session(&words);
        no_answer(Some(words), Answer::Other { about_session })
    };
    let Ok(value) = serde_json::from_slice::<Value>(body) else { return other() };
    // MCP 2025-03-26 allowed batches.
    let value = match value {
        Value::Array(all) => all.into_iter().find(|one| asked.is_answered_by(one)).unwrap_or_default(),
        one => one,
    };
    let said = message(asked, value, true);
    if said.answer.is_some() { said } else { Said { message: said.message, ..other() } }
}

/// Reads an event of a stream.
pub(super) fn event(asked: &Asked, data: &str) -> Said {
    let value = serde_json::from_str::<Value>(data).unwrap_or_default();
    message(asked, value, false)
}

/// Reads a message. `is_whole` says whether the message is all that the server replied.
fn message(asked: &Asked, mut value: Value, is_whole: bool) -> Said {
    let is_ours = asked.is_answered_by(&value);
    let has_method = value.get("method").is_some();
    if !has_method && let Some(error) = value.get("error").and_then(error_of) {
        let names_none = value.get("id").is_none_or(Value::is_null);
        if asked.is_request() && (is_ours || names_none || is_whole) {
            let about_session = is_about_session(&error.message);
            let answer = Answer::Error { code: i64::from(error.code.0), has_id: is_ours, about_session };
            let words = Some(cut(&format!("{}: {}", error.code.0, error.message)));
            return Said::of(Some(asked.error(error)), Some(answer), words);
        }
    }
    if is_ours
        && asked.method == Method::Call
        && !has_method
        && let Some(id) = asked.id.clone()
        && let Some(result) = value.get_mut("result").map(Value::take)
    {
        let (result, finish) = match finished(result) {
            Ok(result) => {
                let finish = if result.is_error == Some(true) { Finish::Error } else { Finish::Success };
                (ServerJsonRpcMessage::response(ServerResult::CallToolResult(result), id), finish)
            }
            Err(unfinished) => (asked.error(ErrorData::internal_error(unfinished, None)), Finish::Unfinished),
        };
        return Said::of(Some(result), Some(Answer::Result(finish)), None);
    }
    let odd = if is_ours && asked.method == Method::List { readable(&mut value) } else { vec![] };
    let typed = ServerJsonRpcMessage::deserialize(&value).ok();
    let answer = typed.as_ref().filter(|_| is_ours && !has_method).map(|_| Answer::Result(Finish::Success));
    Said { odd, ..Said::of(typed, answer, None) }
}

/// Removes the tools from a list that cannot be read, and returns them.
fn readable(message: &mut Value) -> Vec<Odd> {
    let Some(tools) = message.pointer_mut("/result/tools").filter(|tools| tools.is_array()) else { return vec![] };
    let (read, odd) = listed::sort(tools.as_array().cloned().unwrap_or_default());
    if let (false, Ok(read)) = (odd.is_empty(), serde_json::to_value(read)) {
        *tools = read;
    }
    odd
}

/// Reads the error of a message.
fn error_of(error: &Value) -> Option<ErrorData> {
    let code = error.get("code")?.as_i64()?;
    // A code beyond JSON-RPC's own range means nothing to anybody, but it is still an error.
    let code = ErrorCode(i32::try_from(code).unwrap_or_default());
    let message = error.get("message").and_then(Value::as_str).unwrap_or_default().to_owned();
    Some(ErrorData::new(code, message, error.get("data").cloned()))
}

/// Reads the result of a call.
///
/// # Errors
/// Returns why the server has not finished the call.
fn finished(result: Value) -> Result<CallToolResult, String> {
    let mut members = match result {
        Value::Object(members) => members,
        other => Map::from_iter([("content".to_owned(), other)]),
    };
    let kind = members.get("resultType").and_then(Value::as_str).unwrap_or("complete");
    if kind != "complete" {
        return Err(format!("expected a complete result, found one of the type {:?}", shorten(kind)));
    }
    let has_some = ["content", "structuredContent", "isError"].iter().any(|name| members.contains_key(*name));
    if !has_some && members.get("task").is_some_and(Value::is_object) {
        return Err("expected a complete result, found a task".to_owned());
    }
    let mut read = CallToolResult::default();
    read.content = match members.remove("content") {
        None | Some(Value::Null) => vec![],
        Some(Value::Array(blocks)) => blocks.into_iter().map(block).collect(),
        Some(other) => vec![block(other)],
    };
    read.structured_content = members.remove("structuredContent");
    // A result whose `isError` cannot be read does not count as a success.
    read.is_error = match members.remove("isError") {
        None | Some(Value::Null) => None,
        Some(Value::Bool(is_error)) => Some(is_error),
        Some(_) => Some(true),
    };
    read.meta = members.remove("_meta").and_then(|meta| serde_json::from_value(meta).ok());
    Ok(read)
}

/// Reads a content block.
fn block(value: Value) -> ContentBlock {
    if let Ok(known) = ContentBlock::deserialize(&value) {
        return known;
    }
    if let Value::String(text) = value {
        return ContentBlock::text(text);
    }
    let json = value.to_string();
    if json.len() <= LONGEST_BLOCK {
        return ContentBlock::text(json);
    }
    let kind = value.get("type").and_then(Value::as_str).unwrap_or_default();
    ContentBlock::text(format!(
        "Belay left out a content block. Expected a block of MCP, or at most {LONGEST_BLOCK} bytes of JSON; found a block of type {:?} with \
         {} bytes.",
        shorten(kind),
        json.len()
    ))
}

fn cut(text: &str) -> String {
    let text = text.trim();
    let end = text.char_indices().map(|(at, _)| at).take_while(|at| *at <= LONGEST_WORDS).last();
    match end {
        Some(end) if text.len() > LONGEST_WORDS => text.get(..end).unwrap_or_default().to_owned(),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn call() -> Asked {
        Asked { id: Some(RequestId::Number(7)), method: Method::Call }
    }

    fn listing() -> Asked {
        Asked { id: Some(RequestId::Number(7)), method: Method::List }
    }

    /// The result of a call as the agent gets it.
    fn result(result: Value) -> Value {
        let said = body(&call(), json!({"jsonrpc": "2.0", "id": 7, "result": result}).to_string().as_bytes());
        let Some(ServerJsonRpcMessage::Response(response)) = said.message else { panic!("{said:?}") };
        serde_json::to_value(response.result).unwrap()
    }

    fn answer(text: &str) -> Option<Answer> {
        body(&call(), text.as_bytes()).answer
    }

    const SUCCESS: Option<Answer> = Some(Answer::Result(Finish::Success));

    #[test]
    fn what_was_asked() {
        let read = |message: Value| Asked::of(&serde_json::from_value::<ClientJsonRpcMessage>(message).unwrap());
        let call = read(json!({"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "t"}}));
        assert!(call.is_request() && call.method == Method::Call);
        let told = read(json!({"jsonrpc": "2.0", "method": "notifications/initialized"}));
        assert!(!told.is_request());
    }

    #[rstest]
    #[case::known(json!([{"type": "text", "text": "done"}]), json!([{"type": "text", "text": "done"}]))]
    #[case::unknown(
        json!([{"type": "text", "text": "done"}, {"type": "json", "json": {"a": 1}}, {"type": "image", "data": "eA==", "mimeType": "image/png"}]),
        json!([
            {"type": "text", "text": "done"}, {"type": "text", "text": r#"{"type":"json","json":{"a":1}}"#},
            {"type": "image", "data": "eA==", "mimeType": "image/png"},
        ])
    )]
    #[case::known_but_wrong(json!([{"type": "image", "data": 1}]), json!([{"type": "text", "text": r#"{"type":"image","data":1}"#}]))]
    #[case::no_object(json!(["done", 1]), json!([{"type": "text", "text": "done"}, {"type": "text", "text": "1"}]))]
    #[case::no_list(json!("done"), json!([{"type": "text", "text": "done"}]))]
    fn blocks_pass(#[case] content: Value, #[case] expected: Value) {
        // The order of members in a block does not matter.
        let parsed = |mut content: Value| {
            for block in content.as_array_mut().unwrap() {
                if let Some(Ok(json @ Value::Object(_))) = block["text"].as_str().map(serde_json::from_str) {
                    block["text"] = json;
                }
            }
            content
        };
        assert_eq!(parsed(result(json!({"content": content}))["content"].take()), parsed(expected));
    }

    #[test]
    fn a_long_unknown_block_leaves_a_note_and_the_others() {
        let long = json!({"type": "video\u{202e}", "data": "x".repeat(LONGEST_BLOCK)});
        let found = result(json!({"content": [{"type": "text", "text": "done"}, long], "isError": true}));
        assert_eq!(found["content"][0]["text"], "done");
        let note = found["content"][1]["text"].as_str().unwrap();
        assert!(note.contains("left out") && note.contains("65536") && !note.contains('\u{202e}'), "{note}");
        assert_eq!(found["isError"], true);
    }

    #[rstest]
    #[case::nothing(json!({}), SUCCESS)]
    #[case::structured(json!({"structuredContent": [1], "content": []}), SUCCESS)]
    #[case::wrong_meta(json!({"content": [], "_meta": 1}), SUCCESS)]
    #[case::bare_text(json!("done"), SUCCESS)]
    #[case::error(json!({"content": [], "isError": true}), Some(Answer::Result(Finish::Error)))]
    #[case::unreadable_error(json!({"content": [], "isError": "yes"}), Some(Answer::Result(Finish::Error)))]
    #[case::input(json!({"resultType": "input_required", "inputRequests": {}}), Some(Answer::Result(Finish::Unfinished)))]
    #[case::task(json!({"task": {"taskId": "1"}}), Some(Answer::Result(Finish::Unfinished)))]
    fn results(#[case] result: Value, #[case] expected: Option<Answer>) {
        for id in [json!(7), json!("7"), json!(7.0)] {
            let text = json!({"jsonrpc": "2.0", "id": id, "result": result}).to_string();
            assert_eq!(answer(&text), expected, "{text}");
            assert_eq!(answer(&format!("[{text}]")), expected, "a batch");
            assert_eq!(event(&call(), &text).answer, expected, "an event");
        }
    }

    /// In each version of MCP. The type of a result came with 2026-07-28.
    #[test]
    fn a_list_with_an_odd_tool_is_a_list() {
        let good = json!({"name": "do", "inputSchema": {"type": "object"}, "annotations": {"readOnlyHint": true}});
        for kind in [Value::Null, json!("complete")] {
            for odd in [vec![], vec![json!({"name": "odd"})]] {
                let tools: Vec<_> = odd.iter().chain([&good]).collect();
                let mut result = json!({"tools": tools, "nextCursor": "2"});
                if kind.is_string() {
                    result["resultType"] = kind.clone();
                }
                let text = json!({"jsonrpc": "2.0", "id": 7, "result": result}).to_string();
                for said in [body(&listing(), text.as_bytes()), event(&listing(), &text)] {
                    assert_eq!(
                        said.odd.iter().map(|odd| odd.name.as_str()).collect::<Vec<_>>(),
                        vec!["odd"; odd.len()]
                    );
                    let Some(ServerJsonRpcMessage::Response(response)) = said.message else { panic!("{text}") };
                    let ServerResult::ListToolsResult(page) = response.result else { panic!("{text}: {response:?}") };
                    assert_eq!(serde_json::to_value(&page.tools).unwrap(), json!([good]));
                    assert_eq!(page.next_cursor.as_deref(), Some("2"));
                }
            }
        }
    }

    #[rstest]
    #[case::ours(json!(7), true, true)]
    #[case::null(json!(null), false, true)]
    #[case::a_word(json!("server-error"), false, false)]
    fn errors_answer_the_request(#[case] id: Value, #[case] has_id: bool, #[case] in_a_stream: bool) {
        let text = json!({"jsonrpc": "2.0", "id": id, "error": {"code": -32000, "message": "No valid session ID"}});
        let expected = Some(Answer::Error { code: -32000, has_id, about_session: true });
        for asked in [call(), listing()] {
            let said = body(&asked, text.to_string().as_bytes());
            assert_eq!(said.answer, expected);
            assert_eq!(said.words.as_deref(), Some("-32000: No valid session ID"));
            let Some(ServerJsonRpcMessage::Error(error)) = said.message else { panic!() };
            assert_eq!(error.id, Some(RequestId::Number(7)), "rmcp finds the request by it");
            assert_eq!(event(&asked, &text.to_string()).answer, expected.filter(|_| in_a_stream));
        }
    }

    #[rstest]
    #[case::empty(" \n", Answer::Nothing)]
    #[case::page("<html>", Answer::Other { about_session: false })]
    #[case::text("Invalid session ID", Answer::Other { about_session: true })]
    #[case::other_json(r#"{"error":"Session not found"}"#, Answer::Other { about_session: true })]
    #[case::another_id(r#"{"jsonrpc":"2.0","id":8,"result":{"content":[]}}"#, Answer::Other { about_session: false })]
    #[case::a_request(r#"{"jsonrpc":"2.0","id":7,"method":"ping"}"#, Answer::Other { about_session: false })]
    #[case::empty_batch("[]", Answer::Other { about_session: false })]
    fn what_is_no_answer(#[case] text: &str, #[case] expected: Answer) {
        assert_eq!(answer(text), Some(expected));
        assert_eq!(event(&call(), text).answer, None);
    }

    proptest::proptest! {
        /// Each block that a server writes is one block for the agent, and text stays as it is.
        #[test]
        fn no_block_is_lost(
            texts in proptest::collection::vec("\\PC{0,20}", 0..4),
            odd in proptest::collection::vec((0..6_usize, "[a-z_]{0,12}"), 0..4),
        ) {
            let odd = odd.iter().map(|(kind, word)| match kind {
                0 => json!({"type": word}),
                1 => json!({"type": "image", "data": word}),
                2 => json!({"type": "resource", "resource": {"uri": word}}),
                3 => json!([word]),
                4 => json!(null),
                _ => json!({"type": "text", "text": 1, word.as_str(): word}),
            });
            let texts: Vec<Value> = texts.iter().map(|text| json!({"type": "text", "text": text})).collect();
            let content: Vec<Value> = texts.iter().cloned().chain(odd).collect();
            let found = result(json!({"content": content}));
            let found = found["content"].as_array().cloned().unwrap_or_default();
            proptest::prop_assert_eq!(found.len(), content.len());
            proptest::prop_assert_eq!(&found[..texts.len()], &texts[..]);
        }

        #[test]
        fn words_are_cut_between_characters(text in "\\PC{0,3000}") {
            let kept = cut(&text);
            proptest::prop_assert!(kept.len() <= LONGEST_WORDS && text.trim().starts_with(&kept));
        }
    }
}
