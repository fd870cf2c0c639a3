//! Bodies that stream, with an end to waiting, something to keep until they are over, and nothing in them that is nobody's to read.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::{Body, Frame, SizeHint};
use memchr::memmem;
use tokio::time::{Instant, Sleep};

/// Whatever went wrong on the way.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// A reply's body.
pub type ReplyBody = UnsyncBoxBody<Bytes, BoxError>;

/// Nothing came for too long.
#[derive(Debug, thiserror::Error)]
#[error("nothing came for {0:?}")]
pub struct IdleError(Duration);

/// A whole body.
pub fn full(bytes: impl Into<Bytes>) -> ReplyBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body that fails when nothing comes for too long, and holds `K` until it is over or dropped.
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
                // The time in which nobody asks for the next frame counts as well: a reader that has stopped is idle, too.
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

/// A body in which a secret, wherever it stands word for word, is struck out: `*` for each byte, so that lengths stay. What may be the
/// beginning of it waits for what comes next, and nothing else does.
pub struct Struck<B> {
    body: Pin<Box<B>>,
    secret: Vec<u8>,
    held: Vec<u8>,
}

impl<B> Struck<B> {
    /// Wraps a body.
    pub fn new(body: B, secret: Vec<u8>) -> Self {
        Self { body: Box::pin(body), secret, held: Vec::new() }
    }

    /// What can be passed on of what is held.
    fn strike(&mut self) -> Bytes {
        let Self { secret, held, .. } = self;
        let found: Vec<usize> = memmem::find_iter(held, secret.as_slice()).collect();
        for start in found {
            if let Some(place) = held.get_mut(start..start.saturating_add(secret.len())) {
                place.fill(b'*');
            }
        }
        let begins = |length: &usize| secret.get(..*length).is_some_and(|beginning| held.ends_with(beginning));
        let kept = (1..secret.len()).rev().find(begins).unwrap_or(0);
        let rest = held.split_off(held.len().saturating_sub(kept));
        Bytes::from(std::mem::replace(held, rest))
    }
}

impl<B: Body<Data = Bytes>> Body for Struck<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.get_mut();
        loop {
            let Some(frame) = ready!(this.body.as_mut().poll_frame(cx)) else {
                let rest = std::mem::take(&mut this.held);
                return Poll::Ready((!rest.is_empty()).then(|| Ok(Frame::data(rest.into()))));
            };
            // Trailers are for one hop, and go no further.
            let Ok(data) = frame?.into_data() else { continue };
            this.held.extend_from_slice(&data);
            let passed = this.strike();
            if !passed.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(passed))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (inner, held) = (self.body.size_hint(), u64::try_from(self.held.len()).unwrap_or(u64::MAX));
        let mut hint = SizeHint::new();
        hint.set_lower(inner.lower().saturating_add(held));
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper.saturating_add(held));
        }
        hint
    }
}

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

    /// What becomes of these chunks.
    async fn struck(chunks: &[&[u8]], secret: &str) -> Vec<Vec<u8>> {
        let frames = chunks.iter().map(|chunk| Ok::<_, std::io::Error>(Frame::data(Bytes::copy_from_slice(chunk))));
        let mut body = Struck::new(StreamBody::new(futures::stream::iter(frames)), secret.into());
        let mut all = Vec::new();
        while let Some(frame) = body.frame().await {
            all.push(frame.unwrap().into_data().unwrap().to_vec());
        }
        assert!(body.held.is_empty());
        all
    }

    #[tokio::test]
    async fn a_secret_is_struck_out_wherever_it_is_cut() {
        let text = b"data: {\"echo\":\"Bearer sesame sesame ses\"}\n\n";
        let expected = b"data: {\"echo\":\"Bearer ****** ****** ses\"}\n\n";
        for first in 0..text.len() {
            for second in first..text.len() {
                let chunks = [&text[..first], &text[first..second], &text[second..]];
                assert_eq!(struck(&chunks, "sesame").await.concat(), expected, "{first} {second}");
            }
        }
    }

    #[tokio::test]
    async fn only_what_may_begin_it_waits() {
        let got = struck(&[b"event: one\n\n", b"event: se", b"cond\n\n", b"sesam"], "sesame").await;
        assert_eq!(got, [&b"event: one\n\n"[..], b"event: ", b"second\n\n", b"sesam"]);
    }
}
