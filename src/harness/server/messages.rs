//! The messages that agents post to the MCP server.
//!
//! Guarantees: a message is parsed in one way only. A call that is not made is recorded, whoever rejects it: Belay, or the MCP library. A
//! client that accepts JSON is answered, because every answer is JSON. The messages of a batch, which MCP 2025-03-26 has, are handled one
//! after another, each as if it had come alone.
//!
//! Non-goals: decisions about calls, see [`tools`](crate::harness::tools).

use std::{
    convert::Infallible,
    sync::{Arc, LazyLock},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header, request::Parts};
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use rmcp::transport::streamable_http_server::{StreamableHttpService, session::local::LocalSessionManager};
use serde_json::Value;
use tokio::sync::Semaphore;

use crate::{
    apart,
    evidence::record::Channel,
    harness::{
        body::{Body, boxed},
        gate::Gate,
        mcp::{McpServer, Reached, Read},
    },
    policy::{
        decide::Denial,
        json::{self, Ambiguous},
        rule::Rule,
        shorten::shorten_to,
    },
};

/// The longest body of an MCP request, in bytes.
pub(super) const LONGEST_BODY: usize = 16 << 20;
/// The longest body that is parsed on the thread that received it, in bytes.
const SHORT_BODY: usize = 128 << 10;
/// The number of longer bodies that are parsed at a time, independent of evaluations.
const READINGS: usize = 2;
/// The longest reply of the MCP library that is inspected, in bytes.
const LONGEST_ANSWER: usize = 64 << 10;
/// The maximum number of messages in a batch.
const MOST_MESSAGES: usize = 64;
/// The longest replies to a batch, in bytes. Messages after that are not handled.
const LONGEST_REPLIES: usize = 16 << 20;
/// The header with the version of MCP.
const VERSION: &str = "mcp-protocol-version";
/// The versions of MCP whose clients may send batches. Clients of these versions do not send the header either.
const BATCHES: [&str; 2] = ["2024-11-05", "2025-03-26"];
/// The types that the MCP library requires a client to accept.
const BOTH_TYPES: HeaderValue = HeaderValue::from_static("application/json, text/event-stream");

/// The MCP library's server.
pub(super) type Service = StreamableHttpService<McpServer, LocalSessionManager>;

/// Handles a request to the MCP server.
pub(super) async fn handle(gate: &Arc<Gate>, mcp: &Service, request: Request<Incoming>) -> Response<Body> {
    match readable(gate, request).await {
        Ok((parts, body, Posts::None)) => plain(mcp.handle(Request::from_parts(parts, Full::new(body))).await),
        Ok((parts, _, Posts::One(message))) => one(gate, mcp, parts, message).await,
        Ok((parts, body, Posts::Batch(messages))) => batch(gate, mcp, (parts, body), messages).await,
        Err(refusal) => refusal,
    }
}

/// Handles one message.
async fn one(gate: &Gate, mcp: &Service, mut parts: Parts, message: Message) -> Response<Body> {
    let Message { posted, arguments, text } = message;
    // The library counts the length of what it gets.
    parts.headers.remove(header::CONTENT_LENGTH);
    if let Some(arguments) = arguments {
        parts.extensions.insert(arguments);
    }
    let reached = Reached::default();
    parts.extensions.insert(reached.clone());
    let reply = mcp.handle(Request::from_parts(parts, Full::new(text))).await;
    if reached.get() { plain(reply) } else { unmade(gate, posted, reply).await }
}

/// Handles the messages of a batch, one after another, so that calls of one batch have the order in which the agent wrote them.
async fn batch(gate: &Gate, mcp: &Service, (parts, body): (Parts, Bytes), messages: Vec<Message>) -> Response<Body> {
    let named = parts.headers.get(VERSION).map(|version| version.to_str().unwrap_or_default());
    let found = match named {
        Some(version) if !BATCHES.contains(&version) => {
            Some("one, which MCP 2025-03-26 had and later versions have not")
        }
        _ if messages.is_empty() => Some("none"),
        _ if messages.len() > MOST_MESSAGES => Some("more"),
        _ => None,
    };
    if let Some(found) = found {
        let reason = format!("expected one message, or a batch of up to {MOST_MESSAGES} messages; found {found}");
        let digest = Some(gate.salt().bytes(&body));
        let denial = gate.deny(Channel::Tool, "/mcp", digest, Denial { rule: Rule::Request, reason }).await;
        return refusal(&Value::Null, &denial);
    }
    let mut replies = Vec::new();
    for message in messages {
        let (id, is_request) = (message.posted.id.clone(), message.posted.is_request);
        let reply = if replies.len() < LONGEST_REPLIES {
            one(gate, mcp, parts.clone(), message).await
        } else {
            let reason = format!(
                "expected a batch with replies of up to {LONGEST_REPLIES} bytes, found longer ones; send the rest alone"
            );
            let denial = Denial { rule: Rule::Request, reason };
            let digest = Some(gate.salt().bytes(&message.posted.body));
            refusal(&id, &gate.deny(Channel::Tool, &message.posted.target, digest, denial).await)
        };
        let reply = reply.into_body().collect().await.map(|reply| reply.to_bytes()).unwrap_or_default();
        if !is_request {
            continue;
        }
        replies.extend_from_slice(if replies.is_empty() { b"[" } else { b"," });
        match serde_json::from_slice::<serde::de::IgnoredAny>(&reply) {
            Ok(_) => replies.extend_from_slice(&reply),
            // The library's other replies are texts.
            Err(_) => replies.extend_from_slice(error(&id, -32600, &String::from_utf8_lossy(&reply)).as_bytes()),
        }
    }
    if replies.is_empty() {
        let mut accepted = Response::new(boxed(Empty::new().map_err(|error: Infallible| match error {})));
        *accepted.status_mut() = StatusCode::ACCEPTED;
        return accepted;
    }
    replies.push(b']');
    json(replies.into())
}

/// Returns a reply of the library as it is.
fn plain<B>(reply: Response<B>) -> Response<Body>
where
    B: hyper::body::Body<Data = Bytes, Error = Infallible> + Send + 'static,
{
    reply.map(|body| boxed(body.map_err(|error: Infallible| match error {})))
}

/// Lets a client that accepts JSON in any words pass the library, which requires both types of MCP.
fn accept(headers: &mut HeaderMap) {
    let values: Vec<_> = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    let is_json = |range: &str| {
        let mut parts = range.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
        let is_wanted = parts.all(|part| {
            let weight = part.strip_prefix("q=").or_else(|| part.strip_prefix("Q="));
            weight.and_then(|weight| weight.parse::<f32>().ok()).is_none_or(|weight| weight > 0.0)
        });
        is_wanted && ["*/*", "application/*", "application/json"].contains(&kind.as_str())
    };
    if values.is_empty() || values.iter().flat_map(|value| value.split(',')).any(|range| is_json(range.trim())) {
        headers.insert(header::ACCEPT, BOTH_TYPES);
    }
}

/// Returns the semaphore for parsing long bodies.
fn readings() -> Arc<Semaphore> {
    static PLACES: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(READINGS)));
    PLACES.clone()
}

/// A message that was posted to the MCP server.
struct Posted {
    /// The tool that is called, or the path if the message is no call or its tool is unknown.
    target: String,
    body: Bytes,
    id: Value,
    /// Whether the message expects an answer.
    is_request: bool,
    /// Whether the message is a call or may be one.
    is_call: bool,
}

impl Posted {
    /// Creates it from the message's JSON.
    fn of(body: &Bytes, value: &Value) -> Self {
        let method = value.get("method");
        // A JSON-RPC response is not a call.
        let answers = value.get("result").is_some() || value.get("error").is_some();
        let tool = value.pointer("/params/name").and_then(Value::as_str).filter(|_| method.is_some());
        let id = value.get("id").filter(|id| id.is_string() || id.is_i64()).cloned();
        let is_call = method.map_or(!answers, |method| method == "tools/call");
        // What has neither a method nor an answer is a mistake that the agent must see.
        let is_request = !answers && (method.is_none() || value.get("id").is_some());
        Self {
            target: tool.filter(|_| is_call).unwrap_or("/mcp").to_owned(),
            body: body.clone(),
            id: id.unwrap_or_default(),
            is_request,
            is_call,
        }
    }
}

/// Records a message that the MCP library rejected although it was meant as a call or may have been one. Returns a reply with a rule.
async fn unmade<B>(gate: &Gate, posted: Posted, reply: Response<B>) -> Response<Body>
where
    B: hyper::body::Body<Data = Bytes, Error = Infallible> + Send + 'static,
{
    let (mut parts, body) = reply.into_parts();
    let streams =
        parts.headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/event"));
    // Requests for missing features (prompts, resources, another version) get the protocol's own reply.
    let refuses = matches!(parts.status.as_u16(), 403 | 406 | 411 | 413 | 415);
    if streams || !(posted.is_call || refuses) {
        return Response::from_parts(parts, boxed(body.map_err(|error: Infallible| match error {})));
    }
    let said = Limited::new(body, LONGEST_ANSWER).collect().await.map(|said| said.to_bytes()).unwrap_or_default();
    let parsed: Value = serde_json::from_slice(&said).unwrap_or_default();
    let text = String::from_utf8_lossy(&said);
    let why = parsed.pointer("/error/message").and_then(Value::as_str).unwrap_or(text.trim());
    let reason = match parts.status.as_u16() {
        406 => "expected application/json in the accept header, or both types of MCP".to_owned(),
        415 => "expected application/json in the content-type header, as MCP requires".to_owned(),
        status => format!(
            "expected a valid MCP message, found one that cannot be handled (HTTP {status}): {}",
            if why.is_empty() { "it has no id, so it gets no answer" } else { why }
        ),
    };
    let denial = Denial { rule: Rule::Request, reason: shorten_to(&reason, 1024) };
    let digest = Some(gate.salt().bytes(&posted.body));
    let denial = gate.deny(Channel::Tool, &posted.target, digest, denial).await;
    if parsed.is_object() || said.is_empty() {
        // The library's reply is a JSON-RPC error with a reason, or has no body, so it stays.
        return Response::from_parts(parts, boxed(Full::from(said).map_err(|error: Infallible| match error {})));
    }
    let refusal = refusal(&posted.id, &denial);
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    parts.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(parts, refusal.into_body())
}

/// What a request posts.
enum Posts {
    /// Nothing: it is no POST.
    None,
    One(Message),
    Batch(Vec<Message>),
}

/// Returns the request's head and body, and what it posts, if the body is JSON that can be parsed in one way only. rmcp keeps the last of
/// two members with one name, and what it takes for a call must be the same for every other parser.
///
/// The arguments of a call are taken out as they were parsed, so that they are parsed once.
async fn readable(gate: &Arc<Gate>, request: Request<Incoming>) -> Result<(Parts, Bytes, Posts), Response<Body>> {
    let (mut parts, body) = request.into_parts();
    let body = match Limited::new(body, LONGEST_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => {
            let denial = Denial { rule: Rule::Request, reason: format!("the request cannot be read: {error}") };
            let denial = gate.deny(Channel::Tool, "/mcp", None, denial).await;
            return Err(refusal(&Value::Null, &denial));
        }
    };
    // A request that is not a POST has no body, and rmcp does not act on one.
    if parts.method != Method::POST {
        return Ok((parts, body, Posts::None));
    }
    accept(&mut parts.headers);
    let most = gate.contracts().longest_text();
    if body.len() > most {
        let reason = format!(
            "the request is {} bytes long, and no contract takes arguments that need more than {most}; send less",
            body.len()
        );
        let digest = Some(gate.salt().bytes(&body));
        let denial = gate.deny(Channel::Tool, "/mcp", digest, Denial { rule: Rule::ToolRequestBytes, reason }).await;
        return Err(refusal(&Value::Null, &denial));
    }
    let parsed = match body.len() {
        ..=SHORT_BODY => read(&body),
        _ => {
            let body = body.clone();
            match apart::judge(&readings(), apart::LONGEST, move || read(&body)).await {
                Ok(parsed) => parsed,
                Err(unjudged) => {
                    let denial = Denial { rule: Rule::Busy, reason: unjudged.to_string() };
                    let denial = gate.deny(Channel::Tool, "/mcp", None, denial).await;
                    return Err(refusal(&Value::Null, &denial));
                }
            }
        }
    };
    let ambiguous = match parsed {
        Ok(posts) => return Ok((parts, body, posts)),
        Err(ambiguous) => ambiguous,
    };
    // Only a message that certainly is not a call goes unrecorded.
    let loose = loosely(&body);
    let mut denial = Denial { rule: Rule::RequestJson, reason: ambiguous.to_string() };
    if loose.get("method").is_none_or(|method| method == "tools/call") {
        let tool = loose.pointer("/params/name").and_then(Value::as_str).unwrap_or("/mcp");
        let digest = Some(gate.salt().bytes(&body));
        denial = gate.deny(Channel::Tool, tool, digest, denial).await;
    }
    let id = loose.get("id").filter(|id| id.is_string() || id.is_i64());
    Err(refusal(id.unwrap_or(&Value::Null), &denial))
}

/// Parses what identifies the call of a message, even if the message can be parsed in more than one way.
fn loosely(body: &[u8]) -> Value {
    // A long message could have too many values to build.
    if body.len() > SHORT_BODY { Value::Null } else { serde_json::from_slice(body).unwrap_or_default() }
}

/// A posted message, as it was parsed.
struct Message {
    posted: Posted,
    /// The arguments of a call.
    arguments: Option<Read>,
    /// The message, without the arguments of a call.
    text: Bytes,
}

impl Message {
    /// Reads a message that came in this text.
    fn of(text: Bytes, mut message: Value) -> Result<Self, Ambiguous> {
        let posted = Posted::of(&text, &message);
        let is_call = message.get("method").is_some_and(|method| method == "tools/call");
        let params = message.get_mut("params").filter(|_| is_call).and_then(Value::as_object_mut);
        let Some(Value::Object(arguments)) = params.and_then(|params| params.get_mut("arguments")).map(Value::take)
        else {
            return Ok(Self { posted, arguments: None, text });
        };
        let arguments = Some(Read::new(arguments, text.len()));
        Ok(Self { posted, arguments, text: bytes(&message)? })
    }
}

/// Parses a body.
///
/// # Errors
/// Returns an error if the text is not JSON or can be parsed in two ways.
fn read(body: &Bytes) -> Result<Posts, Ambiguous> {
    match json::parse(body)? {
        Value::Array(all) => {
            // A batch that is too long is denied as a whole.
            let some = all.into_iter().take(MOST_MESSAGES + 1);
            let messages = some.map(|message| Message::of(bytes(&message)?, message));
            Ok(Posts::Batch(messages.collect::<Result<_, _>>()?))
        }
        message => Ok(Posts::One(Message::of(body.clone(), message)?)),
    }
}

fn bytes(message: &Value) -> Result<Bytes, Ambiguous> {
    serde_json::to_vec(message).map(Bytes::from).map_err(|error| Ambiguous(error.to_string()))
}

/// Returns the JSON-RPC error -32700: the message cannot be parsed.
fn refusal(id: &Value, denial: &Denial) -> Response<Body> {
    let mut reply = json(error(id, -32700, &denial.told("request")).into());
    *reply.status_mut() = StatusCode::BAD_REQUEST;
    reply
}

/// Returns a JSON-RPC error.
fn error(id: &Value, code: i32, message: &str) -> String {
    serde_json::json!({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": message}}).to_string()
}

fn json(text: Bytes) -> Response<Body> {
    let mut reply = Response::new(boxed(Full::from(text).map_err(|error: Infallible| match error {})));
    reply.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    reply
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::none(&[], true)]
    #[case::both(&["application/json, text/event-stream"], true)]
    #[case::two_headers(&["text/event-stream", "application/json"], true)]
    #[case::anything(&["*/*"], true)]
    #[case::json(&["application/json; charset=utf-8"], true)]
    #[case::of_a_kind(&["text/html, application/*;q=0.1"], true)]
    #[case::events_alone(&["text/event-stream"], false)]
    #[case::a_page(&["text/html"], false)]
    #[case::not_json(&["application/json;q=0, text/event-stream"], false)]
    #[case::empty(&[""], false)]
    fn who_accepts_json(#[case] values: &[&str], #[case] expected: bool) {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::ACCEPT, value.parse().unwrap());
        }
        let before = headers.clone();
        accept(&mut headers);
        let passes =
            headers.get_all(header::ACCEPT).iter().collect::<Vec<_>>() == ["application/json, text/event-stream"];
        assert_eq!(passes, expected, "{headers:?}");
        assert!(passes || headers == before);
    }

    #[rstest]
    #[case::call(r#"{"id":1,"method":"tools/call","params":{"name":"t","arguments":{"a":1}}}"#, true, true)]
    #[case::list(r#"{"id":1,"method":"tools/list"}"#, true, false)]
    #[case::told(r#"{"method":"notifications/initialized"}"#, false, false)]
    #[case::answer(r#"{"id":1,"result":{}}"#, false, false)]
    #[case::nothing("1", true, true)]
    fn who_waits_for_an_answer(#[case] text: &str, #[case] is_request: bool, #[case] is_call: bool) {
        for text in [text.to_owned(), format!("[{text}]")] {
            let message = match read(&Bytes::from(text)).unwrap() {
                Posts::One(message) => message,
                Posts::Batch(mut messages) => messages.remove(0),
                Posts::None => panic!(),
            };
            assert_eq!((message.posted.is_request, message.posted.is_call), (is_request, is_call));
            assert!(message.arguments.is_none() || !String::from_utf8_lossy(&message.text).contains("\"a\""));
        }
    }
}
