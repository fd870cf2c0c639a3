//! rmcp's transport over the link to the gateway.
//!
//! Guarantees: each message has the intent of its call or listing, or else the intent that opened the session. A reply that is too long or
//! that the gateway withholds is not read to its end, and the caller that waits for it is notified. The facts about an exchange are stored
//! for the outcome of the call.
//!
//! Non-goals: requests that upstreams send by themselves; sessions and listings.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use http::{
    HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{ACCEPT, CONTENT_TYPE},
};
use http_body_util::{BodyDataStream, BodyExt, LengthLimitError, Limited};
use parking_lot::Mutex;
use rmcp::{
    ErrorData,
    model::{ClientJsonRpcMessage, ClientRequest, RequestMetaObject, ServerJsonRpcMessage},
    transport::streamable_http_client::{
        SseError, StreamableHttpClient, StreamableHttpError, StreamableHttpPostResponse,
    },
};
use sse_stream::{Sse, SseStream};
use tokio::sync::Notify;

use crate::{
    evidence::record::Channel,
    harness::{
        bounds::LONGEST_REPLY,
        gateway_client::{Carried, DeliveryError, EndedError, GatewayClient, Peer},
    },
    policy::{config::SILENCE, decide::Denial, rule::Rule},
};

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
    /// The reasons to stop reading the reply.
    pub(super) stops: Stops,
}

/// The reasons to stop reading a reply, with those to notify, because rmcp would continue to wait.
#[derive(Clone)]
pub(super) struct Stops {
    /// The longest reply that is read, in bytes.
    most: usize,
    /// Notified about a longer reply.
    pub(super) too_long: Arc<Notify>,
    /// Notified about a reply that the gateway withholds.
    pub(super) withheld: Arc<Notify>,
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
    /// Starts an exchange whose reply is read up to this length, in bytes.
    pub(super) fn new(most: usize) -> Self {
        Self { status: 0, upstream: None, undelivered: None, sent: false, stops: Stops::new(most) }
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
            let mut facts = self.facts.lock();
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
            let facts = self.facts.lock();
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
