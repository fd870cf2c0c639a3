//! rmcp's transport over the link to the gateway.
//!
//! Guarantees: each message has the intent of its call or listing, or else the intent that opened the session. A reply that is too long or
//! that the gateway withholds is not read to its end, and the caller that waits for it is notified. The facts about an exchange are stored
//! for the outcome of the call. A call of a session that the server has forgotten is sent once more, over a new session, which rmcp opens.
//!
//! Non-goals: requests that upstreams send by themselves; sessions and listings; what a reply means, see [`meaning`](super::meaning).

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::stream::BoxStream;
use http::{
    HeaderName, HeaderValue, Method, Request, Response,
    header::{ACCEPT, CONTENT_TYPE, LOCATION},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use parking_lot::Mutex;
use rmcp::{
    ErrorData,
    model::{ClientJsonRpcMessage, ClientRequest, RequestMetaObject},
    transport::streamable_http_client::{
        SseError, StreamableHttpClient, StreamableHttpError, StreamableHttpPostResponse,
    },
};
use sse_stream::Sse;
use tokio::sync::Notify;

use super::{
    answer::{self, Asked},
    events::Events,
    meaning::{Answer, Reply},
};

use crate::{
    evidence::record::Channel,
    harness::{
        bounds::LONGEST_REPLY,
        gateway_client::{Carried, DeliveryError, EndedError, GatewayClient, Peer},
    },
    listed::Odd,
    policy::{config::SILENCE, decide::Denial, rule::Rule},
};

/// How long an event stream may be resumed that answers a message of the session itself.
const OPENING: Duration = Duration::from_secs(60);
/// The key in `_meta` with which a message's intent goes from the pipeline to the transport. It is removed before the message leaves.
const INTENT_META: &str = "belay.dev/intent";

/// The exchanges of calls and listings that are under way, by their intent.
pub(super) type Exchanges = Arc<Mutex<HashMap<u64, Exchange>>>;

/// Facts that the transport saw about a message.
#[derive(Clone)]
pub(super) struct Exchange {
    /// The upstream's HTTP status; 0 if there is none.
    pub(super) status: u16,
    /// The upstream that the gateway dialled.
    pub(super) upstream: Option<Peer>,
    /// Why the message was not delivered, and whether it certainly did not reach the upstream.
    pub(super) undelivered: Option<(Denial, bool)>,
    /// Whether the call itself was sent.
    pub(super) sent: bool,
    /// What the server replied to the call since it was last sent, and the server's words.
    pub(super) reply: Option<(Reply, Option<String>)>,
    /// The listed tools that cannot be read.
    pub(super) odd: Vec<Odd>,
    /// Where the server redirects to.
    pub(super) moved: Option<String>,
    /// The reasons to stop reading the reply.
    pub(super) stops: Stops,
    /// When nobody waits for the reply any more.
    pub(super) until: Instant,
}

/// The reasons to stop reading a reply, with those to notify, because rmcp would continue to wait.
#[derive(Clone)]
pub(super) struct Stops {
    /// The longest reply that is read, in bytes.
    pub(super) most: usize,
    /// Notified about a longer reply.
    pub(super) too_long: Arc<Notify>,
    /// Notified about a reply that the gateway withholds.
    pub(super) withheld: Arc<Notify>,
}

impl Stops {
    fn new(most: usize) -> Self {
        Self { most, too_long: Arc::default(), withheld: Arc::default() }
    }

    /// Returns what an error in the middle of a reply means, and notifies about a reply that the gateway withholds.
    pub(super) fn see(&self, error: &(dyn std::error::Error + 'static)) -> Reply {
        if EndedError::denial(error).is_none() {
            return Reply::BrokeOff;
        }
        self.withheld.notify_one();
        Reply::Withheld
    }
}

impl Exchange {
    /// Starts an exchange whose reply is read up to this length, in bytes, and for this time.
    pub(super) fn new(most: usize, time: Duration) -> Self {
        let until = Instant::now() + time;
        Self {
            until,
            status: 0,
            upstream: None,
            undelivered: None,
            sent: false,
            reply: None,
            odd: vec![],
            moved: None,
            stops: Stops::new(most),
        }
    }
}

/// Returns the metadata with which a message goes to the transport.
pub(super) fn marked(intent: u64) -> RequestMetaObject {
    let mut meta = RequestMetaObject::new();
    meta.0.0.insert(INTENT_META.into(), intent.into());
    meta
}

/// rmcp's transport over the link to the gateway.
#[derive(Clone)]
pub(super) struct GatewayTransport {
    pub(super) link: Arc<GatewayClient>,
    /// The intent for messages of the session itself.
    pub(super) opened_by: u64,
    pub(super) facts: Exchanges,
    /// The number of messages of the session that left by the intent that opened it.
    pub(super) talked: Arc<AtomicU32>,
}

/// A message whose reply can be resumed.
pub(super) struct Opened {
    transport: GatewayTransport,
    uri: Arc<str>,
    session: Option<Arc<str>>,
    headers: HashMap<HeaderName, HeaderValue>,
    /// When nobody waits for the reply any more.
    pub(super) until: Instant,
}

impl Opened {
    /// Requests the events after this one. The request is a message of the session, because it calls nothing.
    pub(super) async fn after(&self, event: &str) -> Result<Response<Carried>, DeliveryError> {
        let mut headers = self.headers.clone();
        // The id came in a line of a stream, so it has no line break. It may have other characters that no header has.
        let event = HeaderValue::from_str(event).map_err(|error| DeliveryError {
            denial: Denial { rule: Rule::UpstreamReply, reason: format!("the id of an event: {error}") },
            certain: true,
            upstream: None,
        })?;
        headers.insert(HeaderName::from_static("last-event-id"), event);
        let of = (Channel::Listing, self.transport.opened_by);
        self.transport.exchange(Method::GET, &self.uri, of, self.session.as_deref(), headers, Bytes::new()).await
    }
}

/// A message that could not be delivered.
#[derive(Debug, thiserror::Error)]
#[error("{}: {}", .0.rule, .0.reason)]
pub(super) struct WireError(Denial);

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
        if intent == self.opened_by {
            self.talked.fetch_add(1, Ordering::Relaxed);
        }
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
        let asked = Asked::of(&message);
        // A message that is not a call belongs to the session. The gateway checks that it is no call.
        let (channel, intent) = match call {
            Some((channel, intent)) => (channel, intent),
            None => (Channel::Listing, self.opened_by),
        };
        let body = serde_json::to_vec(&message)?.into();
        let update = |change: &dyn Fn(&mut Exchange)| {
            let mut facts = self.facts.lock();
            if let Some(facts) = facts.get_mut(&intent) {
                change(facts);
            }
        };
        if call.is_some() {
            // What came before was for the message before.
            update(&|facts| (facts.sent, facts.reply) = (true, None));
        }
        let reply = self
            .exchange(Method::POST, &uri, (channel, intent), session_id.as_deref(), custom_headers.clone(), body)
            .await;
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
        let location = reply.headers().get(LOCATION).filter(|_| status.is_redirection());
        let moved = location.map(|location| String::from_utf8_lossy(location.as_bytes()).into_owned());
        update(&|facts| {
            facts.status = status.as_u16();
            facts.upstream.clone_from(&upstream);
            facts.moved.clone_from(&moved);
        });
        let (stops, until) = {
            let facts = self.facts.lock();
            let facts = facts.get(&intent).cloned().unwrap_or_else(|| Exchange::new(LONGEST_REPLY, OPENING));
            (facts.stops, facts.until)
        };
        let notes = Notes { facts: self.facts.clone(), call: call.map(|(_, intent)| intent) };
        let in_session = session_id.is_some();
        let opened = Opened { transport: self.clone(), uri, session: session_id, headers: custom_headers, until };
        read_reply(reply, (asked, in_session), (stops, notes), opened).await
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

    /// Upstreams get no stream of their own, because they may send nothing that no call requested. [`Events`] resumes the stream of a reply.
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

/// Where the meaning of a reply is stored.
#[derive(Clone)]
pub(super) struct Notes {
    facts: Exchanges,
    /// The intent of the call or listing, if the message is one.
    call: Option<u64>,
}

impl Notes {
    /// Stores what the server replied.
    pub(super) fn note(&self, reply: Reply, words: Option<String>) {
        self.update(|facts| facts.reply = Some((reply, words)));
    }

    /// Returns whether a stream that has ended may be resumed: it was not given up because of what it contains.
    pub(super) fn may_continue(&self) -> bool {
        let facts = self.facts.lock();
        let seen = self.call.and_then(|intent| facts.get(&intent)?.reply.as_ref()).map(|(reply, _)| *reply);
        !matches!(seen, Some(Reply::TooLong | Reply::Withheld))
    }

    /// Stores the listed tools that cannot be read.
    pub(super) fn leave_out(&self, odd: Vec<Odd>) {
        self.update(|facts| facts.odd.extend(odd));
    }

    fn update(&self, change: impl FnOnce(&mut Exchange)) {
        let mut facts = self.facts.lock();
        if let Some(facts) = self.call.and_then(|intent| facts.get_mut(&intent)) {
            change(facts);
        }
    }
}

async fn read_reply(
    reply: Response<Carried>,
    (asked, in_session): (Asked, bool),
    (stops, notes): (Stops, Notes),
    opened: Opened,
) -> Result<StreamableHttpPostResponse, StreamableHttpError<WireError>> {
    let status = reply.status();
    let text = |name: &str| reply.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let session = text("mcp-session-id");
    let kind = text("content-type");
    let is_stream = kind.as_deref().is_some_and(|kind| kind.starts_with("text/event-stream"));
    if status.is_success() && is_stream {
        let events = Events::new(reply.into_body(), asked, (stops, notes), opened);
        return Ok(StreamableHttpPostResponse::Sse(events.stream(), session));
    }
    let body = match Limited::new(reply.into_body(), stops.most).collect().await {
        Ok(body) => body.to_bytes(),
        // The status of a request that failed says enough.
        Err(error) if !status.is_success() && stops.see(error.as_ref()) != Reply::Withheld => Bytes::new(),
        Err(error) if error.is::<LengthLimitError>() => {
            notes.note(Reply::TooLong, None);
            stops.too_long.notify_one();
            return Err(StreamableHttpError::ResponseBodyTooLarge { max_size: stops.most });
        }
        Err(error) => {
            notes.note(stops.see(error.as_ref()), Some(error.to_string()));
            return Err(StreamableHttpError::UnexpectedServerResponse(error.to_string().into()));
        }
    };
    let said = answer::body(&asked, &body);
    let answer = said.answer.unwrap_or(Answer::Nothing);
    let meaning = Reply::of(status.as_u16(), in_session, answer);
    notes.note(meaning, said.words);
    notes.leave_out(said.odd);
    if meaning.is_sent_again() {
        // rmcp opens another session and sends the message once more.
        return Err(StreamableHttpError::SessionExpired);
    }
    if !asked.is_request() && status.is_success() {
        return Ok(StreamableHttpPostResponse::Accepted);
    }
    if let Some(message) = said.message {
        return Ok(StreamableHttpPostResponse::Json(message, session));
    }
    if status.is_success() {
        return Err(StreamableHttpError::UnexpectedContentType(kind));
    }
    // A server that speaks only `initialize` replies to the newer discovery with a plain HTTP error. rmcp continues after a JSON-RPC error.
    if !in_session && status.is_client_error() && asked.discovers() {
        let error = ErrorData::invalid_request(format!("server/discover refused with {status}"), None);
        return Ok(StreamableHttpPostResponse::Json(asked.error(error), None));
    }
    Err(StreamableHttpError::UnexpectedServerResponse(format!("HTTP {status}").into()))
}
