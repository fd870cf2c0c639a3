//! Bodies that stream, with an end to waiting and something to keep until they are over.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::{Body, Frame, SizeHint};
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
