//! Replies that are event streams.
//!
//! Guarantees: the stream breaks off, and notifies, once it is longer than the limit. What it means for the call is stored as soon as the
//! answer has come, or once the stream has ended without one.
//!
//! Non-goals: messages that are no answer. They pass to rmcp.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream::BoxStream};
use http_body_util::BodyDataStream;
use rmcp::transport::streamable_http_client::SseError;
use sse_stream::{Sse, SseStream};

use super::{
    answer::{self, Asked},
    meaning::Reply,
    transport::{Notes, Stops},
};
use crate::harness::gateway_client::Carried;

/// The events of a reply.
pub(super) struct Events {
    stream: BoxStream<'static, Result<Sse, SseError>>,
    asked: Asked,
    notes: Notes,
    is_answered: bool,
}

impl Events {
    /// Creates the events of this body.
    pub(super) fn new(body: Carried, asked: Asked, stops: Stops, notes: Notes) -> Self {
        // If nothing else is noted, the stream has ended without an answer.
        notes.note(Reply::BrokeOff, None);
        let left = Arc::new(AtomicUsize::new(stops.most));
        let stream = SseStream::from_bytes_stream(bounded(body, left, stops, notes.clone())).boxed();
        Self { stream, asked, notes, is_answered: false }
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
            let event = match self.stream.next().await? {
                Ok(event) => event,
                Err(error) => return Some(Err(error)),
            };
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
