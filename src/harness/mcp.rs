//! Tools, as an MCP server to the agent and an MCP client to upstreams.
//!
//! What the agent sees of a tool, its name, description and schema, is the contract's. Nothing that an upstream lists is
//! passed on. Spoken with the agent: streamable HTTP, stateless, every protocol version that rmcp negotiates (2024-11-05
//! to 2026-07-28). Spoken with upstreams: the same, one session an upstream, opened by the first call that needs it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use http::{
    HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{ACCEPT, CONTENT_TYPE},
};
use http_body_util::{BodyDataStream, BodyExt, Limited};
use hyper::body::Incoming;
use rmcp::{
    ErrorData, RoleClient, RoleServer, ServerHandler, ServiceExt,
    model::{
        CallToolRequestParams, CallToolResponse, CallToolResult, ClientJsonRpcMessage, ClientRequest, ContentBlock,
        ErrorData as McpError, Implementation, ListToolsResult, PaginatedRequestParams, RequestMetaObject, ResultType,
        ServerCapabilities, ServerConfig, ServerJsonRpcMessage, Tool as McpTool, ToolAnnotations,
    },
    service::{RequestContext, RunningService},
    transport::{
        StreamableHttpClientTransport,
        streamable_http_client::{
            SseError, StreamableHttpClient, StreamableHttpClientTransportConfig, StreamableHttpError,
            StreamableHttpPostResponse,
        },
    },
};
use serde_json::Value;
use sse_stream::{Sse, SseStream};
use tokio::sync::Mutex as AsyncMutex;

use super::{
    gate::{Call, Gate, Settlement},
    link::{Link, Undelivered, upstream_of},
};
use crate::{
    canonical,
    evidence::record::{Channel, Effect},
    policy::{
        budget::Spent,
        config::{SideEffect, Tool},
        decide::{Arguments, Decision, Denial, TOOL_RULES},
        json,
        rule::Rule,
    },
};

/// How long a tool may take.
const TOOL_REPLY: Duration = Duration::from_secs(120);
/// Longest reply that is read.
const LONGEST_REPLY: usize = 16 << 20;
/// Under which key of `_meta` a call's intent travels from the pipeline to the transport. Removed before it leaves.
const INTENT_META: &str = "belay.dev/intent";

/// The MCP server that the agent sees.
#[derive(Clone)]
pub struct Tools {
    gate: Arc<Gate>,
    upstreams: Arc<Upstreams>,
}

impl Tools {
    /// A server for the gate's contracts.
    pub fn new(gate: Arc<Gate>) -> Self {
        let upstreams = Arc::new(Upstreams::new(gate.link().clone()));
        Self { gate, upstreams }
    }

    async fn call(
        &self,
        name: &str,
        args: serde_json::Map<String, serde_json::Value>,
    ) -> Result<CallToolResult, Denial> {
        let Decision { verdict, arguments, digest, bytes } =
            self.gate.decide(name, Arguments::Parsed(Value::Object(args)));
        // What was decided on is what is sent.
        let Value::Object(args) = arguments else {
            let reason = "the arguments are no JSON object".to_owned();
            let denial = verdict.err().unwrap_or(Denial { rule: Rule::RequestJson, reason });
            return Err(self.gate.deny(Channel::Tool, name, Some(digest), denial).await);
        };
        let permit = match verdict.cloned() {
            Ok(tool) => {
                let call = Call {
                    channel: Channel::Tool,
                    target: name.to_owned(),
                    effect: Some(tool.side_effect),
                    request_digest: Some(digest.clone()),
                    request_bytes: bytes,
                    rules: TOOL_RULES.to_vec(),
                    model: None,
                    reserve: Spent::default(),
                };
                self.gate.permit(call).await.map(|permit| (tool, permit))
            }
            Err(denial) => Err(denial),
        };
        let (tool, permit) = match permit {
            Ok(permit) => permit,
            Err(denial) => return Err(self.gate.deny(Channel::Tool, name, Some(digest), denial).await),
        };
        let (result, settlement) = self.upstreams.call(&tool, args, permit.intent).await;
        if let Some(said) = result.as_ref().ok().and_then(said) {
            self.gate.keep(&tool.name, &said);
        }
        permit.settle(settlement);
        result
    }
}

/// What a successful result says to preconditions: its structured content, or else its only block of text, as JSON where
/// that can be read in one way.
fn said(result: &CallToolResult) -> Option<Value> {
    if result.is_error == Some(true) {
        return None;
    }
    if let Some(structured) = &result.structured_content {
        return Some(structured.clone());
    }
    let [ContentBlock::Text(block)] = result.content.as_slice() else { return None };
    Some(json::parse(block.text.as_bytes()).unwrap_or_else(|_| Value::from(block.text.as_str())))
}

impl ServerHandler for Tools {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
            .with_server_info(Implementation::new("belay", env!("CARGO_PKG_VERSION")))
            .with_instructions(
                "Every call is checked against its contract. A refusal names the rule; asking again does not help.",
            )
    }

    async fn list_tools(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        Ok(ListToolsResult::with_all_items(self.gate.contracts().tools().map(advertise).collect()))
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        _: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, McpError> {
        let args = request.arguments.unwrap_or_default();
        // A refusal is a result and not a protocol error: the model has to see it, not the client library.
        let result = self.call(&request.name, args).await.unwrap_or_else(|denial| {
            CallToolResult::error(vec![ContentBlock::text(format!(
                "Belay refused this call. rule: {}. {}",
                denial.rule, denial.reason
            ))])
        });
        Ok(CallToolResponse::Complete(result))
    }
}

fn advertise(tool: &Tool) -> McpTool {
    let input = tool.input.as_object().cloned().unwrap_or_default();
    let mut advertised = McpTool::new(tool.name.clone(), tool.description.clone(), Arc::new(input));
    advertised.annotations = Some(ToolAnnotations::from_raw(
        None,
        Some(tool.side_effect == SideEffect::Read),
        Some(tool.side_effect != SideEffect::Read),
        None,
        Some(tool.side_effect == SideEffect::External),
    ));
    advertised
}

type Session = RunningService<RoleClient, ()>;

/// MCP sessions with upstreams, by endpoint.
struct Upstreams {
    link: Arc<Link>,
    sessions: AsyncMutex<HashMap<String, Arc<Session>>>,
    facts: Arc<Mutex<HashMap<u64, Facts>>>,
}

/// What the transport saw of a call.
#[derive(Clone, Debug, Default)]
struct Facts {
    status: u16,
    upstream: Option<String>,
    undelivered: Option<(Denial, bool)>,
    sent: bool,
}

impl Upstreams {
    fn new(link: Arc<Link>) -> Self {
        Self { link, sessions: AsyncMutex::default(), facts: Arc::default() }
    }

    async fn call(
        &self,
        tool: &Tool,
        args: serde_json::Map<String, serde_json::Value>,
        intent: u64,
    ) -> (Result<CallToolResult, Denial>, Settlement) {
        self.note(intent, Facts::default());
        let answer = tokio::time::timeout(TOOL_REPLY, self.send(tool, args, intent)).await;
        let facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner).remove(&intent).unwrap_or_default();
        let mut settlement = Settlement { status: facts.status, upstream: facts.upstream, ..Settlement::unknown(None) };
        let reason = match answer {
            Ok(Ok(mut result)) => {
                // An upstream of an older protocol says nothing of it, and an agent of a newer one needs it. rmcp takes it
                // out again for agents that do not know it.
                result.result_type = Some(ResultType::COMPLETE);
                let bytes = serde_json::to_vec(&result).unwrap_or_default();
                settlement.effect = Effect::Applied;
                settlement.response_digest = Some(hex::encode(canonical::sha256(&bytes)));
                settlement.response_bytes = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                return (Ok(result), settlement);
            }
            Ok(Err(reason)) => reason,
            Err(_) => format!("{} did not answer within {TOOL_REPLY:?}", tool.name),
        };
        // A session that failed is not used again: the next call opens another.
        self.sessions.lock().await.remove(&tool.url);
        let denial = match facts.undelivered {
            Some((denial, certain)) => {
                if certain {
                    settlement.effect = Effect::NotApplied;
                }
                denial
            }
            None => {
                if !facts.sent {
                    settlement.effect = Effect::NotApplied;
                }
                Denial { rule: Rule::UpstreamReply, reason }
            }
        };
        settlement.rule = Some(denial.rule);
        (Err(denial), settlement)
    }

    async fn send(
        &self,
        tool: &Tool,
        args: serde_json::Map<String, serde_json::Value>,
        intent: u64,
    ) -> Result<CallToolResult, String> {
        let session = self.session(&tool.url, intent).await?;
        let mut params = CallToolRequestParams::new(tool.upstream_tool.clone());
        params.arguments = Some(args);
        let mut meta = RequestMetaObject::new();
        meta.0.0.insert(INTENT_META.into(), intent.into());
        params.meta = Some(meta);
        session.call_tool(params).await.map_err(|error| error.to_string())
    }

    async fn session(&self, url: &str, intent: u64) -> Result<Arc<Session>, String> {
        let mut sessions = self.sessions.lock().await;
        if let Some(session) = sessions.get(url)
            && !session.is_transport_closed()
        {
            return Ok(session.clone());
        }
        let wire = Wire { link: self.link.clone(), opened_by: intent, facts: self.facts.clone() };
        let config = StreamableHttpClientTransportConfig::with_uri(url.to_owned());
        let transport = StreamableHttpClientTransport::with_client(wire, config);
        let session = ().serve(transport).await.map_err(|error| format!("no MCP session with {url}: {error}"))?;
        let session = Arc::new(session);
        sessions.insert(url.to_owned(), session.clone());
        Ok(session)
    }

    fn note(&self, intent: u64, facts: Facts) {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).insert(intent, facts);
    }
}

/// rmcp's transport, over the link.
#[derive(Clone)]
struct Wire {
    link: Arc<Link>,
    /// The intent under which messages of the session itself travel.
    opened_by: u64,
    facts: Arc<Mutex<HashMap<u64, Facts>>>,
}

/// A message that could not be delivered.
#[derive(Debug, thiserror::Error)]
#[error("{}: {}", .0.rule, .0.reason)]
struct WireError(Denial);

impl Wire {
    async fn exchange(
        &self,
        method: Method,
        uri: &str,
        intent: u64,
        session: Option<&str>,
        headers: HashMap<HeaderName, HeaderValue>,
        body: Bytes,
    ) -> Result<Response<Incoming>, Undelivered> {
        let malformed = |reason: String| Undelivered {
            denial: Denial { rule: Rule::Request, reason },
            certain: true,
            upstream: None,
        };
        let mut request = Request::builder()
            .method(method)
            .header(CONTENT_TYPE, "application/json")
            .header(ACCEPT, "application/json, text/event-stream");
        if let Some(session) = session {
            request = request.header("mcp-session-id", session);
        }
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(body).map_err(|error| malformed(error.to_string()))?;
        self.link.forward(Channel::Tool, intent, uri, request).await
    }
}

impl StreamableHttpClient for Wire {
    type Error = WireError;

    async fn post_message(
        &self,
        uri: Arc<str>,
        mut message: ClientJsonRpcMessage,
        session_id: Option<Arc<str>>,
        _: Option<String>,
        custom_headers: HashMap<HeaderName, HeaderValue>,
    ) -> Result<StreamableHttpPostResponse, StreamableHttpError<Self::Error>> {
        let call = take_intent(&mut message);
        let intent = call.unwrap_or(self.opened_by);
        let body = serde_json::to_vec(&message)?.into();
        let update = |change: &dyn Fn(&mut Facts)| {
            let mut facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(facts) = facts.get_mut(&intent) {
                change(facts);
            }
        };
        if call.is_some() {
            update(&|facts| facts.sent = true);
        }
        let reply = self.exchange(Method::POST, &uri, intent, session_id.as_deref(), custom_headers, body).await;
        let reply = match reply {
            Ok(reply) => reply,
            Err(undelivered) => {
                // A session that could not be opened is a call that did not leave.
                let certain = undelivered.certain || call.is_none();
                update(&|facts| {
                    facts.undelivered = Some((undelivered.denial.clone(), certain));
                    facts.upstream.clone_from(&undelivered.upstream);
                });
                return Err(StreamableHttpError::Client(WireError(undelivered.denial)));
            }
        };
        let status = reply.status();
        let upstream = upstream_of(reply.headers());
        update(&|facts| {
            facts.status = status.as_u16();
            facts.upstream.clone_from(&upstream);
        });
        read_reply(reply, &message, session_id.is_some()).await
    }

    async fn delete_session(
        &self,
        uri: Arc<str>,
        session_id: Arc<str>,
        _: Option<String>,
        custom_headers: HashMap<HeaderName, HeaderValue>,
    ) -> Result<(), StreamableHttpError<Self::Error>> {
        self.exchange(Method::DELETE, &uri, self.opened_by, Some(&session_id), custom_headers, Bytes::new())
            .await
            .map(drop)
            .map_err(|undelivered| StreamableHttpError::Client(WireError(undelivered.denial)))
    }

    /// Upstreams have nothing to say that no call asked for.
    async fn get_stream(
        &self,
        _: Arc<str>,
        _: Option<Arc<str>>,
        _: Option<String>,
        _: Option<String>,
        _: HashMap<HeaderName, HeaderValue>,
    ) -> Result<BoxStream<'static, Result<Sse, SseError>>, StreamableHttpError<Self::Error>> {
        Err(StreamableHttpError::ServerDoesNotSupportSse)
    }
}

/// The call's intent, taken out of the message: it is between the pipeline and the transport.
fn take_intent(message: &mut ClientJsonRpcMessage) -> Option<u64> {
    let ClientJsonRpcMessage::Request(request) = message else { return None };
    let ClientRequest::CallToolRequest(call) = &mut request.request else { return None };
    let from_params = call.params.meta.as_mut().and_then(|meta| meta.0.0.remove(INTENT_META));
    let extension = call.extensions.get_mut::<RequestMetaObject>();
    let from_extension = extension.and_then(|meta| meta.0.0.remove(INTENT_META));
    from_params.or(from_extension)?.as_u64()
}

async fn read_reply(
    reply: Response<Incoming>,
    message: &ClientJsonRpcMessage,
    in_session: bool,
) -> Result<StreamableHttpPostResponse, StreamableHttpError<WireError>> {
    let status = reply.status();
    let text = |name: &str| reply.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let session = text("mcp-session-id");
    let kind = text("content-type");
    if status == StatusCode::NOT_FOUND && in_session {
        return Err(StreamableHttpError::SessionExpired);
    }
    if matches!(status, StatusCode::ACCEPTED | StatusCode::NO_CONTENT) {
        return Ok(StreamableHttpPostResponse::Accepted);
    }
    let is = |expected: &str| kind.as_deref().is_some_and(|kind| kind.starts_with(expected));
    if status.is_success() && is("text/event-stream") {
        let events = SseStream::from_bytes_stream(bounded(reply.into_body()));
        return Ok(StreamableHttpPostResponse::Sse(events.boxed(), session));
    }
    let body = Limited::new(reply.into_body(), LONGEST_REPLY)
        .collect()
        .await
        .map_err(|_| StreamableHttpError::ResponseBodyTooLarge { max_size: LONGEST_REPLY })?
        .to_bytes();
    if is("application/json")
        && let Ok(message) = serde_json::from_slice::<ServerJsonRpcMessage>(&body)
    {
        return Ok(StreamableHttpPostResponse::Json(message, session));
    }
    if status.is_success() {
        return Err(StreamableHttpError::UnexpectedContentType(kind));
    }
    // A server of the `initialize` era answers the newer discovery with a plain refusal; rmcp goes on from an error reply.
    if !in_session
        && status.is_client_error()
        && let ClientJsonRpcMessage::Request(request) = message
        && let ClientRequest::DiscoverRequest(_) = request.request
    {
        let error = ErrorData::invalid_request(format!("server/discover refused with {status}"), None);
        return Ok(StreamableHttpPostResponse::Json(
            ServerJsonRpcMessage::error(error, Some(request.id.clone())),
            None,
        ));
    }
    Err(StreamableHttpError::UnexpectedServerResponse(format!("HTTP {status}").into()))
}

/// A body that breaks off once it is longer than anything that is read.
fn bounded(body: Incoming) -> impl futures::Stream<Item = Result<Bytes, std::io::Error>> + Send {
    let mut left = LONGEST_REPLY;
    BodyDataStream::new(body).map(move |chunk| {
        let chunk = chunk.map_err(std::io::Error::other)?;
        left = left
            .checked_sub(chunk.len())
            .ok_or_else(|| std::io::Error::other(format!("the reply is longer than {LONGEST_REPLY} bytes")))?;
        Ok(chunk)
    })
}
