//! Streaming bodies: with a bound on silence, a value that they hold until they end, and a search for credentials.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Response, Version, header::CONTENT_LENGTH};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::{Body, Frame, SizeHint};
use memchr::memmem;
use serde_json::Value;
use tokio::time::{Instant, Sleep};

use super::forms::{Arriving, Forms};
use crate::{
    flushed::Flushed,
    wire::{self, Ended},
};

/// Any error of a body.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// A reply's body.
pub type ReplyBody = UnsyncBoxBody<Bytes, BoxError>;

/// The error of a body that was silent for too long.
#[derive(Debug, thiserror::Error)]
#[error("no data came for {0:?}")]
pub struct IdleError(Duration);

/// Returns a body of these bytes.
pub fn full(bytes: impl Into<Bytes>) -> ReplyBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body that fails if no frame arrives for too long. It holds `K` until it ends or is dropped.
pub struct Guarded<B, K> {
    body: Pin<Box<B>>,
    idle: Duration,
    sleep: Pin<Box<Sleep>>,
    _keep: K,
}

impl<B, K> Guarded<B, K> {
    /// Wraps a body.
    pub fn new(body: B, idle: Duration, keep: K) -> Self {
        Self { body: Box::pin(body), idle, sleep: Box::pin(tokio::time::sleep(idle)), _keep: keep }
    }
}

impl<B, K> Body for Guarded<B, K>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
    K: Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        match this.body.as_mut().poll_frame(cx) {
            Poll::Ready(frame) => {
                // Time in which the reader does not poll counts as well: a reader that has stopped is idle, too.
                this.sleep.as_mut().reset(Instant::now() + this.idle);
                Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
            }
            Poll::Pending => {
                ready!(this.sleep.as_mut().poll(cx));
                Poll::Ready(Some(Err(Box::new(IdleError(this.idle)))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Bytes at the end of the received text that wait for the next bytes. It is more than any encoding of any credential.
pub const HELD: usize = 64 << 10;
/// Bytes that are passed on at a time.
pub const PIECE: usize = 64 << 10;
/// Maximum number of paths in events whose text is joined across events.
const PLACES: usize = 64;

/// The error of a reply that repeats the credential of its request.
#[derive(Debug, thiserror::Error)]
#[error("the reply repeats the credential of the request, and ends here")]
pub struct RepeatedError;

/// Callback for a reply that repeats the credential.
pub type Alarm = Box<dyn FnOnce() + Send + Sync>;

/// A reply's body that is searched for a credential before it is passed on, and that ends where it repeats the credential.
///
/// The size and the time of each piece that is passed on depend only on how many bytes have arrived and where their events end: whole
/// events of an event stream, or else pieces of [`PIECE`] bytes, while the last [`HELD`] bytes wait for more bytes or the end. The text
/// itself is never changed, because a mask in it would reveal the position and the length of the credential.
pub struct Watched<B> {
    body: Pin<Box<B>>,
    forms: Arc<Forms>,
    /// The text of the events, if it is an event stream.
    events: Option<Followed>,
    held: BytesMut,
    /// Number of held bytes that contain no end of an event.
    searched: usize,
    over: bool,
    /// The error that ended the upstream's reply early. It is returned after all received bytes were searched and passed on.
    failed: Option<BoxError>,
    alarm: Option<Alarm>,
}

impl<B> Watched<B> {
    /// Wraps a body. `events` is whether it is an event stream.
    pub fn new(body: B, forms: Arc<Forms>, events: bool, alarm: Alarm) -> Self {
        Self {
            body: Box::pin(body),
            events: events.then(Followed::default),
            forms,
            held: BytesMut::new(),
            searched: 0,
            over: false,
            failed: None,
            alarm: Some(alarm),
        }
    }

    /// Returns how many held bytes may be passed on once they are searched.
    fn ready(&mut self) -> usize {
        if self.over {
            return self.held.len();
        }
        if self.events.is_some() {
            let from = self.searched.saturating_sub(2);
            let new = self.held.get(from..).unwrap_or_default();
            let ends = [&b"\n\n"[..], b"\n\r\n", b"\r\r"].into_iter().filter_map(|end| {
                let start = memmem::rfind(new, end)?;
                Some(from.saturating_add(start).saturating_add(end.len()))
            });
            if let Some(end) = ends.max() {
                return end;
            }
            self.searched = self.held.len();
        }
        self.held.len().saturating_sub(HELD) / PIECE * PIECE
    }

    /// Returns whether the held bytes, of which the first `ready` are about to be passed on, repeat the credential.
    fn repeats(&mut self, ready: usize) -> bool {
        // No part of an event is passed on before its end, so what follows the last end is searched later.
        let whole = self.events.is_some() && self.searched < ready;
        let looked = if whole { self.held.get(..ready).unwrap_or(&self.held) } else { &self.held };
        if self.forms.are_in(looked) {
            return true;
        }
        match &mut self.events {
            Some(followed) => followed.repeats(looked, &self.forms),
            None => false,
        }
    }
}

impl<B> Body for Watched<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        loop {
            let ready = this.ready();
            if ready > 0 {
                if this.repeats(ready) {
                    (this.over, this.failed, this.held) = (true, None, BytesMut::new());
                    this.alarm.take().into_iter().for_each(|alarm| alarm());
                    return Poll::Ready(Some(Err(RepeatedError.into())));
                }
                this.searched = 0;
                return Poll::Ready(Some(Ok(Frame::data(this.held.split_to(ready).freeze()))));
            }
            if this.over {
                return Poll::Ready(this.failed.take().map(Err));
            }
            match ready!(this.body.as_mut().poll_frame(cx)) {
                None => this.over = true,
                // Trailers belong to one hop and are not passed on.
                Some(Ok(frame)) => this.held.extend_from_slice(&frame.into_data().unwrap_or_default()),
                Some(Err(error)) => (this.over, this.failed) = (true, Some(error.into())),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.over && self.held.is_empty() && self.failed.is_none()
    }
}

/// A reply's body for a caller over HTTP/2. The caller gets all bytes that have arrived, and the trailer [`wire::ENDED`] if the reply ended
/// early, because HTTP/2 discards the queued bytes of a stream that is reset.
pub struct Carried {
    body: ReplyBody,
    over: bool,
}

impl Carried {
    /// Wraps the reply to a request of this HTTP version.
    pub fn reply(mut reply: Response<ReplyBody>, version: Version) -> Response<ReplyBody> {
        if version != Version::HTTP_2 {
            return reply.map(|body| Flushed::new(body).boxed_unsync());
        }
        // HTTP/2 has its own framing. A wrong length would turn a partial reply into an error.
        if !reply.body().is_end_stream()
            && let Some(length) = reply.headers_mut().remove(CONTENT_LENGTH)
        {
            reply.headers_mut().insert(wire::LENGTH, length);
        }
        reply.map(|body| Self { body, over: false }.boxed_unsync())
    }
}

/// Returns how a reply ended, for the caller.
fn ending(error: &BoxError) -> Ended {
    if error.is::<RepeatedError>() {
        Ended::Repeated
    } else if error.is::<hyper::Error>() {
        Ended::BrokeOff
    } else {
        Ended::GivenUp
    }
}

impl Body for Carried {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(None);
        }
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        Poll::Ready(frame.map(|frame| {
            frame.or_else(|error| {
                this.over = true;
                let ended = HeaderValue::from_static(ending(&error).as_str());
                Ok(Frame::trailers(HeaderMap::from_iter([(HeaderName::from_static(wire::ENDED), ended)])))
            })
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.body.is_end_stream()
    }

    /// hyper sends a known size as the length and checks the frames against it, so none is given.
    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// The text of a stream's events, joined as a reader joins it. If a credential arrives a few letters in each event, the events that were
/// passed on cannot be taken back, but the credential is noticed and its last letters are withheld.
#[derive(Default)]
struct Followed {
    /// The text at each path in events, by a hash of the path.
    texts: HashMap<u64, Arriving>,
}

impl Followed {
    fn repeats(&mut self, events: &[u8], forms: &Forms) -> bool {
        let data = events
            .split(|byte| matches!(byte, b'\n' | b'\r'))
            .filter_map(|line| line.strip_prefix(b"data:"))
            .map(|data| data.strip_prefix(b" ").unwrap_or(data));
        let mut repeats = false;
        for data in data {
            let path = DefaultHasher::new();
            repeats |= match serde_json::from_slice::<Value>(data) {
                Ok(value @ (Value::String(_) | Value::Array(_) | Value::Object(_))) => self.follow(&value, path, forms),
                // Plain text, which may look like a number.
                _ => self.add(path, data, forms),
            };
        }
        repeats
    }

    fn follow(&mut self, value: &Value, path: DefaultHasher, forms: &Forms) -> bool {
        let step = |name: &dyn Fn(&mut DefaultHasher)| {
            let mut path = path.clone();
            name(&mut path);
            path
        };
        match value {
            Value::String(text) => self.add(path, text.as_bytes(), forms),
            Value::Array(values) => {
                values.iter().enumerate().any(|(at, value)| self.follow(value, step(&|path| at.hash(path)), forms))
            }
            Value::Object(members) => {
                members.iter().any(|(name, value)| self.follow(value, step(&|path| name.hash(path)), forms))
            }
            _ => false,
        }
    }

    fn add(&mut self, path: DefaultHasher, text: &[u8], forms: &Forms) -> bool {
        let place = path.finish();
        if self.texts.len() >= PLACES && !self.texts.contains_key(&place) {
            self.texts.clear();
        }
        forms.arrive_in(self.texts.entry(place).or_default(), text)
    }
}

#[cfg(test)]
mod watched;

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use http_body_util::StreamBody;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waits_for_each_frame_and_no_longer() {
        let frames = futures::stream::iter([1, 1, 3]).then(|seconds| async move {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            Ok::<_, std::io::Error>(Frame::data(Bytes::from_static(b"x")))
        });
        let mut body = Guarded::new(StreamBody::new(frames), Duration::from_secs(2), ());
        assert!(body.frame().await.unwrap().is_ok());
        assert!(body.frame().await.unwrap().is_ok());
        assert!(body.frame().await.unwrap().unwrap_err().is::<IdleError>());
    }
}
