//! The MCP client: sessions with upstreams, their listings, and calls.
//!
//! Guarantees: no upstream waits for another. A call leaves only with a definition of its tool that was listed within the last minute, that
//! has the contract's pin or else is the first that this attempt saw, and that is in the call's intent. A listing is a call of its own in
//! the log.
//!
//! Non-goals: requests that upstreams send by themselves, and rmcp's cache of lists, which outlives failures.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use http::{
    HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{ACCEPT, CONTENT_TYPE},
};
use http_body_util::{BodyDataStream, BodyExt, LengthLimitError, Limited};
use rmcp::{
    ErrorData, RoleClient, ServiceExt,
    model::{
        CallToolRequestParams, CallToolResult, ClientJsonRpcMessage, ClientRequest, Extensions, ListToolsRequest,
        PaginatedRequestParams, RequestMetaObject, ResultType, ServerJsonRpcMessage, ServerResult,
    },
    service::RunningService,
    transport::{
        StreamableHttpClientTransport,
        streamable_http_client::{
            SseError, StreamableHttpClient, StreamableHttpClientTransportConfig, StreamableHttpError,
            StreamableHttpPostResponse,
        },
    },
};
use sse_stream::{Sse, SseStream};
use tokio::sync::{Mutex as AsyncMutex, Notify};

use crate::{
    evidence::record::{Channel, Effect},
    harness::{
        bounds::{Bounds, LONGEST_REPLY, late},
        gate::{Call, Gate, Settlement},
        gateway_client::{self, Carried, DeliveryError, EndedError, GatewayClient, Peer},
    },
    policy::{
        budget::Spent,
        config::{McpUpstream, SILENCE, Tool, ToolUsage},
        decide::Denial,
        definition::Definition,
        rule::Rule,
        shorten::{shorten, shorten_to},
    },
};

/// The longest text of an upstream in a reason, in characters.
const LONGEST_WORDS: usize = 1024;
/// The key in `_meta` with which a message's intent goes from the pipeline to the transport. It is removed before the message leaves.
const INTENT_META: &str = "belay.dev/intent";
/// The maximum number of pages of a list.
const PAGES: usize = 64;

type Session = RunningService<RoleClient, ()>;

/// The MCP servers, by endpoint.
pub struct Upstreams {
    gate: Arc<Gate>,
    /// How long a server's listing is used.
    fresh: Duration,
    servers: Mutex<HashMap<String, Arc<Server>>>,
    /// The digest of the first definition of each tool that this attempt saw.
    first: Mutex<BTreeMap<String, String>>,
    facts: Arc<Mutex<HashMap<u64, Exchange>>>,
}

/// One MCP server.
#[derive(Default)]
struct Server {
    /// Held while a session is opened or tools are listed.
    opening: AsyncMutex<()>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    session: Option<Arc<Session>>,
    listing: Option<Listing>,
}

/// The tools that a server listed.
struct Listing {
    at: Instant,
    tools: HashMap<String, Definition>,
}

impl Server {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn session(&self) -> Option<Arc<Session>> {
        self.state().session.clone().filter(|session| !session.is_transport_closed())
    }

    /// Returns the session and the tool's definition in the listing, if the listing is fresh.
    fn fresh(&self, tool: &str, age: Duration) -> Option<(Arc<Session>, Option<Definition>)> {
        let session = self.session()?;
        let state = self.state();
        let listing = state.listing.as_ref().filter(|listing| listing.at.elapsed() < age)?;
        Some((session, listing.tools.get(tool).cloned()))
    }

    /// Drops a session that failed, so that the next call opens another.
    fn drop_session(&self, failed: &Arc<Session>) {
        let mut state = self.state();
        if state.session.as_ref().is_some_and(|session| Arc::ptr_eq(session, failed)) {
            *state = State::default();
        }
    }
}

/// A call that may leave once it has an intent.
pub struct Ready {
    server: Arc<Server>,
    session: Arc<Session>,
    /// The upstream's definition of the tool.
    pub definition: Definition,
}

/// Facts that the transport saw about a message.
#[derive(Clone)]
struct Exchange {
    status: u16,
    upstream: Option<Peer>,
    undelivered: Option<(Denial, bool)>,
    sent: bool,
    stops: Stops,
}

/// The reasons to stop reading a reply, with those to notify, because rmcp would continue to wait.
#[derive(Clone)]
struct Stops {
    /// The longest reply that is read, in bytes.
    most: usize,
    /// Notified about a longer reply.
    too_long: Arc<Notify>,
    /// Notified about a reply that the gateway withholds.
    withheld: Arc<Notify>,
}

impl Stops {
    fn new(most: usize) -> Self {
        Self { most, too_long: Arc::default(), withheld: Arc::default() }
    }

    fn see(&self, error: &(dyn std::error::Error + 'static)) {
        if EndedError::denial(error).is_some() {
            self.withheld.notify_one();
        }
    }
}

impl Exchange {
    fn new(most: usize) -> Self {
        Self { status: 0, upstream: None, undelivered: None, sent: false, stops: Stops::new(most) }
    }
}

impl Upstreams {
    /// Creates the upstreams of this gate. `used` is what the log says of the attempt so far.
    pub fn new(gate: Arc<Gate>, used: &BTreeMap<String, ToolUsage>, fresh: Duration) -> Self {
        let first = used.iter().filter_map(|(tool, used)| Some((tool.clone(), used.definition.clone()?))).collect();
        Self { gate, fresh, servers: Mutex::default(), first: Mutex::new(first), facts: Arc::default() }
    }

    /// Prepares a call: a session, and a definition of the tool that is fresh and approved.
    ///
    /// # Errors
    /// Returns [`Rule::ToolChanged`] if the definition is another one or is gone, and the rule that failed if the upstream cannot be asked.
    pub async fn ready(&self, tool: &Tool, mcp: &McpUpstream, time: Duration) -> Result<Ready, Denial> {
        let server = {
            let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
            servers.entry(mcp.url.clone()).or_default().clone()
        };
        let found = match server.fresh(&mcp.tool, self.fresh) {
            Some(found) => found,
            None => {
                let late = |_| late(tool, time, false);
                let _opening = tokio::time::timeout(time, server.opening.lock()).await.map_err(late)?;
                match server.fresh(&mcp.tool, self.fresh) {
                    Some(found) => found,
                    None => self.list(&server, tool, mcp, time).await?,
                }
            }
        };
        let (session, definition) = found;
        let definition = self.approved(tool, mcp, definition)?;
        Ok(Ready { server, session, definition })
    }

    /// Returns the definition if it is the approved one.
    fn approved(&self, tool: &Tool, mcp: &McpUpstream, found: Option<Definition>) -> Result<Definition, Denial> {
        let changed = |reason: String| Denial { rule: Rule::ToolChanged, reason };
        if let Some(found) = &found {
            // Readers of the log compare this digest with what the server lists, so it must not be redacted.
            self.gate.redactor().learn(&found.digest);
        }
        let Some(found) = found else {
            return Err(changed(format!(
                "expected {} to list a tool {:?}, found none; have the contract `{}` name one that is there",
                mcp.url, mcp.tool, tool.contract
            )));
        };
        if let Some(pin) = &mcp.digest {
            if *pin != found.digest {
                return Err(changed(format!(
                    "expected the definition of {:?} with digest {pin}, which the contract `{}` pins, found {}; have somebody read \
                     what {} lists now, and set spec.upstream.mcp.digest to that if it is right",
                    mcp.tool, tool.contract, found.digest, mcp.url
                )));
            }
            return Ok(found);
        }
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let first = first.entry(tool.name.clone()).or_insert_with(|| found.digest.clone());
        if *first != found.digest {
            return Err(changed(format!(
                "expected the definition of {:?} with digest {first}, which this attempt saw first, found {}; have somebody read what \
                 {} lists now, and set spec.upstream.mcp.digest of the contract `{}` to the one that is right",
                mcp.tool, found.digest, mcp.url, tool.contract
            )));
        }
        Ok(found)
    }

    /// Lists a server's tools, over its session or a new one.
    async fn list(
        &self,
        server: &Arc<Server>,
        tool: &Tool,
        mcp: &McpUpstream,
        time: Duration,
    ) -> Result<(Arc<Session>, Option<Definition>), Denial> {
        let call = Call {
            channel: Channel::Listing,
            target: tool.name.clone(),
            effect: None,
            definition: None,
            request_digest: None,
            request_bytes: 0,
            key: None,
            approvals: vec![],
            because: vec![],
            undoes: None,
            judged: None,
            rules: vec![Rule::ToolUnknown],
            model: None,
            reserve: Spent::default(),
        };
        let permit = self.gate.permit(call).await?;
        let intent = permit.intent;
        let facts = Exchange::new(LONGEST_REPLY);
        let withheld = facts.stops.withheld.clone();
        self.note(intent, facts);
        let listed = async {
            if let Some(session) = server.session()
                && let Ok(tools) = list_over(&session, intent).await
            {
                return Ok((session, tools));
            }
            // The session may have ended with the server.
            let session = self.open(&mcp.url, intent).await?;
            let tools = list_over(&session, intent).await?;
            Ok::<_, String>((session, tools))
        };
        let listed = tokio::select! {
            biased;
            () = withheld.notified() => Ok(Err(gateway_client::withheld().reason)),
            listed = tokio::time::timeout(time, listed) => listed,
        };
        let facts = self.taken(intent);
        let seen = Settlement { status: facts.status, upstream: facts.upstream, ..Settlement::unknown(None) };
        let denial = match listed {
            Ok(Ok((session, tools))) => {
                permit.settle(Settlement { effect: Effect::Applied, ..seen });
                let definition = tools.get(&mcp.tool).cloned();
                *server.state() =
                    State { session: Some(session.clone()), listing: Some(Listing { at: Instant::now(), tools }) };
                return Ok((session, definition));
            }
            Ok(Err(reason)) => match facts.undelivered {
                Some((denial, _)) => denial,
                None => Denial { rule: Rule::UpstreamReply, reason },
            },
            Err(_) => late(tool, time, false),
        };
        *server.state() = State::default();
        permit.settle(Settlement { effect: Effect::NotApplied, rule: Some(denial.rule), ..seen });
        Err(denial)
    }

    /// Makes a call. Returns the result and the call's settlement.
    pub async fn call(
        &self,
        tool: &Tool,
        mcp: &McpUpstream,
        ready: Ready,
        args: serde_json::Map<String, serde_json::Value>,
        intent: u64,
        bounds: Bounds,
    ) -> (Result<CallToolResult, Denial>, Settlement) {
        let facts = Exchange::new(bounds.reply);
        let Stops { too_long, withheld, .. } = facts.stops.clone();
        self.note(intent, facts);
        let mut params = CallToolRequestParams::new(mcp.tool.clone());
        params.arguments = Some(args);
        params.meta = Some(marked(intent));
        let answer = tokio::select! {
            // These come first because they are the reason why the session ends.
            biased;
            () = too_long.notified() => Err(bounds.too_long(tool)),
            () = withheld.notified() => Err(gateway_client::withheld()),
            answer = tokio::time::timeout(bounds.time, ready.session.call_tool(params)) => match answer {
                Ok(Ok(result)) => Ok(result),
                Ok(Err(error)) => Err(Denial { rule: Rule::UpstreamReply, reason: format!("no result: {}", quoted(&error)) }),
                Err(_) => Err(late(tool, bounds.time, true)),
            },
        };
        let facts = self.taken(intent);
        let mut settlement = Settlement { status: facts.status, upstream: facts.upstream, ..Settlement::unknown(None) };
        let denial = match answer {
            Ok(mut result) => {
                // Upstreams with an older protocol do not set this, and agents with a newer protocol need it. rmcp removes it for agents
                // that do not know it.
                result.result_type = Some(ResultType::COMPLETE);
                settlement.effect = Effect::Applied;
                return (Ok(result), settlement);
            }
            Err(denial) => denial,
        };
        ready.server.drop_session(&ready.session);
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
                denial
            }
        };
        settlement.rule = Some(denial.rule);
        (Err(denial), settlement)
    }

    async fn open(&self, url: &str, intent: u64) -> Result<Arc<Session>, String> {
        let wire = GatewayTransport { link: self.gate.link().clone(), opened_by: intent, facts: self.facts.clone() };
        let config = StreamableHttpClientTransportConfig::with_uri(url.to_owned());
        let transport = StreamableHttpClientTransport::with_client(wire, config);
        let session =
            ().serve(transport).await.map_err(|error| format!("no MCP session with {url}: {}", quoted(&error)))?;
        Ok(Arc::new(session))
    }

    fn note(&self, intent: u64, facts: Exchange) {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).insert(intent, facts);
    }

    fn taken(&self, intent: u64) -> Exchange {
        let facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner).remove(&intent);
        facts.unwrap_or_else(|| Exchange::new(LONGEST_REPLY))
    }
}

/// Returns the definitions of a server's tools, from all pages.
async fn list_over(session: &Session, intent: u64) -> Result<HashMap<String, Definition>, String> {
    let mut tools = HashMap::new();
    let mut cursor = None;
    for _ in 0..PAGES {
        let mut params = PaginatedRequestParams::default().with_cursor(cursor);
        params.meta = Some(marked(intent));
        let request =
            ListToolsRequest { method: Default::default(), params: Some(params), extensions: Extensions::default() };
        let page = match session.send_request(ClientRequest::ListToolsRequest(request)).await {
            Ok(ServerResult::ListToolsResult(page)) => page,
            Ok(_) => return Err("expected a list of tools, found another result".to_owned()),
            Err(error) => return Err(format!("the upstream does not list its tools: {}", quoted(&error))),
        };
        for tool in &page.tools {
            let value = serde_json::to_value(tool).map_err(|error| error.to_string())?;
            let definition = Definition::of(&value).map_err(|error| error.to_string())?;
            if tools.insert(tool.name.to_string(), definition).is_some() {
                return Err(format!(
                    "expected each tool once in the upstream's list, found {:?} twice",
                    shorten(&tool.name)
                ));
            }
        }
        cursor = page.next_cursor;
        if cursor.is_none() {
            return Ok(tools);
        }
    }
    Err(format!("expected a list of at most {PAGES} pages, found more"))
}

/// Quotes an error that may contain an upstream's text.
fn quoted(error: &impl std::fmt::Display) -> String {
    format!("{:?}", shorten_to(&error.to_string(), LONGEST_WORDS))
}

fn marked(intent: u64) -> RequestMetaObject {
    let mut meta = RequestMetaObject::new();
    meta.0.0.insert(INTENT_META.into(), intent.into());
    meta
}

/// rmcp's transport over the link to the gateway.
#[derive(Clone)]
struct GatewayTransport {
    link: Arc<GatewayClient>,
    /// The intent for messages of the session itself.
    opened_by: u64,
    facts: Arc<Mutex<HashMap<u64, Exchange>>>,
}

/// A message that could not be delivered.
#[derive(Debug, thiserror::Error)]
#[error("{}: {}", .0.rule, .0.reason)]
struct WireError(Denial);

impl GatewayTransport {
    async fn exchange(
        &self,
        method: Method,
        uri: &str,
        (channel, intent): (Channel, u64),
        session: Option<&str>,
        headers: HashMap<HeaderName, HeaderValue>,
        body: Bytes,
    ) -> Result<Response<Carried>, DeliveryError> {
        let malformed = |reason: String| DeliveryError {
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
        // The caller has a timeout of its own.
        self.link.forward((channel, intent), uri, request, SILENCE).await
    }
}

impl StreamableHttpClient for GatewayTransport {
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
        // A message that is not a call belongs to the session. The gateway checks that it is no call.
        let (channel, intent) = match call {
            Some((channel, intent)) => (channel, intent),
            None => (Channel::Listing, self.opened_by),
        };
        let body = serde_json::to_vec(&message)?.into();
        let update = |change: &dyn Fn(&mut Exchange)| {
            let mut facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(facts) = facts.get_mut(&intent) {
                change(facts);
            }
        };
        if call.is_some() {
            update(&|facts| facts.sent = true);
        }
        let reply =
            self.exchange(Method::POST, &uri, (channel, intent), session_id.as_deref(), custom_headers, body).await;
        let reply = match reply {
            Ok(reply) => reply,
            Err(undelivered) => {
                // If the session could not be opened, the call did not leave.
                let certain = undelivered.certain || call.is_none();
                update(&|facts| {
                    facts.undelivered = Some((undelivered.denial.clone(), certain));
                    facts.upstream.clone_from(&undelivered.upstream);
                });
                return Err(StreamableHttpError::Client(WireError(undelivered.denial)));
            }
        };
        let status = reply.status();
        let upstream = Peer::of(reply.headers());
        update(&|facts| {
            facts.status = status.as_u16();
            facts.upstream.clone_from(&upstream);
        });
        let bound = {
            let facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
            facts.get(&intent).map_or_else(|| Stops::new(LONGEST_REPLY), |facts| facts.stops.clone())
        };
        read_reply(reply, &message, session_id.is_some(), bound).await
    }

    async fn delete_session(
        &self,
        uri: Arc<str>,
        session_id: Arc<str>,
        _: Option<String>,
        custom_headers: HashMap<HeaderName, HeaderValue>,
    ) -> Result<(), StreamableHttpError<Self::Error>> {
        let ends = (Channel::Listing, self.opened_by);
        self.exchange(Method::DELETE, &uri, ends, Some(&session_id), custom_headers, Bytes::new())
            .await
            .map(drop)
            .map_err(|undelivered| StreamableHttpError::Client(WireError(undelivered.denial)))
    }

    /// Upstreams get no stream, because they may send nothing that no call requested.
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

/// Removes the intent of a call or a listing from the message and returns it. It is only for the transport.
fn take_intent(message: &mut ClientJsonRpcMessage) -> Option<(Channel, u64)> {
    let ClientJsonRpcMessage::Request(request) = message else { return None };
    let (channel, params, extensions) = match &mut request.request {
        ClientRequest::CallToolRequest(call) => (Channel::Tool, call.params.meta.as_mut(), &mut call.extensions),
        ClientRequest::ListToolsRequest(list) => {
            (Channel::Listing, list.params.as_mut().and_then(|params| params.meta.as_mut()), &mut list.extensions)
        }
        _ => return None,
    };
    let from_params = params.and_then(|meta| meta.0.0.remove(INTENT_META));
    let extension = extensions.get_mut::<RequestMetaObject>();
    let from_extension = extension.and_then(|meta| meta.0.0.remove(INTENT_META));
    Some((channel, from_params.or(from_extension)?.as_u64()?))
}

async fn read_reply(
    reply: Response<Carried>,
    message: &ClientJsonRpcMessage,
    in_session: bool,
    stops: Stops,
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
        let events = SseStream::from_bytes_stream(bounded(reply.into_body(), stops));
        return Ok(StreamableHttpPostResponse::Sse(events.boxed(), session));
    }
    let body = match Limited::new(reply.into_body(), stops.most).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => {
            stops.too_long.notify_one();
            return Err(StreamableHttpError::ResponseBodyTooLarge { max_size: stops.most });
        }
        Err(error) => {
            stops.see(error.as_ref());
            return Err(StreamableHttpError::UnexpectedServerResponse(error.to_string().into()));
        }
    };
    if is("application/json")
        && let Ok(message) = serde_json::from_slice::<ServerJsonRpcMessage>(&body)
    {
        return Ok(StreamableHttpPostResponse::Json(message, session));
    }
    if status.is_success() {
        return Err(StreamableHttpError::UnexpectedContentType(kind));
    }
    // A server that speaks only `initialize` replies to the newer discovery with a plain HTTP error. rmcp continues after a JSON-RPC error.
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

/// Returns a body that breaks off, and notifies, once it is longer than the limit.
fn bounded(body: Carried, stops: Stops) -> impl futures::Stream<Item = Result<Bytes, std::io::Error>> + Send {
    let mut left = stops.most;
    BodyDataStream::new(body).map(move |chunk| {
        let chunk = chunk.inspect_err(|error| stops.see(error)).map_err(std::io::Error::other)?;
        left = left.checked_sub(chunk.len()).ok_or_else(|| {
            stops.too_long.notify_one();
            std::io::Error::other(format!("the reply is longer than {} bytes", stops.most))
        })?;
        Ok(chunk)
    })
}
