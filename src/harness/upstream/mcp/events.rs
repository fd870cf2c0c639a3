//! Replies that are event streams.
//!
//! Guarantees: a stream that ends before the answer is resumed with `GET` and `Last-Event-ID`, as MCP 2025-11-25 says, if the server gave an
//! event id. It is resumed after the pause that the server asks for, up to [`RESUMPTIONS`] times and not after the time of the call. All
//! parts together are at most as long as the limit: a longer stream breaks off, and notifies. What the stream means for the call is stored
//! as soon as the answer has come, or once the stream has ended without one.
//!
//! Non-goals: messages that are no answer. They pass to rmcp.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream::BoxStream};
use http::StatusCode;
use http_body_util::BodyDataStream;
use rmcp::transport::streamable_http_client::SseError;
use sse_stream::{Sse, SseStream};

use super::{
    answer::{self, Asked},
    meaning::Reply,
    transport::{Notes, Opened, Stops},
};
use crate::harness::gateway_client::Carried;

/// The maximum number of times that one reply is resumed. Each takes one of the messages that the gateway allows a session.
const RESUMPTIONS: u32 = 100;
/// The number of times that a reply is resumed as soon as the server allows.
const PROMPT: u32 = 20;
/// The pause if the server names none.
const PAUSE: Duration = Duration::from_secs(1);
/// The shortest pause of the first [`PROMPT`] resumptions, and of those after.
const SHORTEST: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

/// The events of a reply.
pub(super) struct Events {
    stream: BoxStream<'static, Result<Sse, SseError>>,
    /// The bytes that may still come.
    left: Arc<AtomicUsize>,
    asked: Asked,
    notes: Notes,
    stops: Stops,
    opened: Opened,
    /// The id of the last event.
    last: Option<String>,
    pause: Duration,
    resumed: u32,
    is_answered: bool,
}

impl Events {
    /// Creates the events of this body.
    pub(super) fn new(body: Carried, asked: Asked, (stops, notes): (Stops, Notes), opened: Opened) -> Self {
        // If nothing else is noted, the stream has ended without an answer.
        notes.note(Reply::BrokeOff, None);
        let left = Arc::new(AtomicUsize::new(stops.most));
        let stream = events(body, left.clone(), stops.clone(), notes.clone());
        let (last, pause, resumed, is_answered) = (None, PAUSE, 0, false);
        Self { stream, left, asked, notes, stops, opened, last, pause, resumed, is_answered }
    }

    /// Returns the events with messages for rmcp.
    pub(super) fn stream(self) -> BoxStream<'static, Result<Sse, SseError>> {
        futures::stream::unfold(self, |mut events| async move {
            let event = events.next().await?;
            Some((event, events))
        })
        .boxed()
    }

    async fn next(&mut self) -> Option<Result<Sse, SseError>> {
        loop {
            let next = self.stream.next().await;
            let Some(Ok(event)) = next else {
                if !self.is_answered && self.resume().await {
                    continue;
                }
                return next;
            };
            // An empty id means that there is nothing to resume from.
            if let Some(id) = event.id {
                self.last = Some(id).filter(|id| !id.is_empty());
            }
            self.pause = event.retry.map_or(self.pause, Duration::from_millis);
            let is_message = matches!(event.event.as_deref(), None | Some("" | "message"));
            let Some(data) = event.data.filter(|data| is_message && !data.is_empty()) else { continue };
            let said = answer::event(&self.asked, &data);
            if let Some(answer) = said.answer.filter(|_| !self.is_answered) {
                self.is_answered = true;
                self.notes.note(Reply::of(200, false, answer), said.words);
                self.notes.leave_out(said.odd);
            }
            // What rmcp cannot read says nothing to it.
            if let Some(message) = said.message.and_then(|message| serde_json::to_string(&message).ok()) {
                return Some(Ok(Sse::default().data(message)));
            }
        }
    }

    /// Continues the stream after its last event. Returns whether there is more.
    async fn resume(&mut self) -> bool {
        let Some(last) = self.last.clone().filter(|_| self.notes.may_continue()) else { return false };
        loop {
            let shortest = if self.resumed < PROMPT { SHORTEST.0 } else { SHORTEST.1 };
            let pause = self.pause.max(shortest);
            let is_late = Instant::now().checked_add(pause).is_none_or(|then| then >= self.opened.until);
            if self.resumed >= RESUMPTIONS || is_late {
                return false;
            }
            self.resumed = self.resumed.saturating_add(1);
            tokio::time::sleep(pause).await;
            let reply = match self.opened.after(&last).await {
                Ok(reply) => reply,
                Err(undelivered) if undelivered.certain => return false,
                // The upstream may be there again in a moment.
                Err(_) => continue,
            };
            if reply.status().is_server_error() {
                continue;
            }
            let kind = reply.headers().get(http::header::CONTENT_TYPE);
            let is_stream = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
            if reply.status() != StatusCode::OK || !is_stream {
                return false;
            }
            self.stream = events(reply.into_body(), self.left.clone(), self.stops.clone(), self.notes.clone());
            return true;
        }
    }
}

/// Returns the events of a body.
fn events(
    body: Carried,
    left: Arc<AtomicUsize>,
    stops: Stops,
    notes: Notes,
) -> BoxStream<'static, Result<Sse, SseError>> {
    SseStream::from_bytes_stream(bounded(body, left, stops, notes)).boxed()
}

/// Returns the bytes of a body, up to those that are left.
fn bounded(
    body: Carried,
    left: Arc<AtomicUsize>,
    stops: Stops,
    notes: Notes,
) -> impl Stream<Item = Result<Bytes, io::Error>> + Send {
    BodyDataStream::new(body).map(move |chunk| {
        let chunk = chunk.map_err(|error| {
            notes.note(stops.see(&error), Some(error.to_string()));
            io::Error::other(error)
        })?;
        let fits = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(chunk.len()));
        fits.map(|_| chunk).map_err(|_| {
            notes.note(Reply::TooLong, None);
            stops.too_long.notify_one();
            io::Error::other(format!("the reply is longer than {} bytes", stops.most))
        })
    })
}
