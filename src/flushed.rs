//! Bodies whose frames are written before the error that ends them.
//!
//! Guarantees: over HTTP/1.1, hyper writes all frames of a body before it sees the error that ends the body, as far as the peer's window
//! allows. Without this wrapper hyper closes the connection while the frames are still in its buffer.
//! Non-goals: HTTP/2, which discards the pending data of a stream that is reset.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use hyper::body::{Body, Frame, SizeHint};

/// A body that returns its error one poll later.
pub struct Flushed<B: Body> {
    body: B,
    failed: Option<B::Error>,
}

impl<B: Body> Flushed<B> {
    /// Wraps a body.
    pub fn new(body: B) -> Self {
        Self { body, failed: None }
    }
}

impl<B> Body for Flushed<B>
where
    B: Body + Unpin,
    B::Error: Unpin,
{
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.get_mut();
        if let Some(error) = this.failed.take() {
            return Poll::Ready(Some(Err(error)));
        }
        match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
            Some(Err(error)) => {
                this.failed = Some(error);
                // hyper flushes when it has nothing to write, and then polls again.
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            frame => Poll::Ready(frame),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.failed.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, time::Duration};

    use bytes::Bytes;
    use futures::StreamExt;
    use http::{Request, Response};
    use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
    use hyper::{body::Incoming, service::service_fn};
    use hyper_util::rt::TokioIo;

    use super::*;

    type Whatever = UnsyncBoxBody<Bytes, std::io::Error>;

    /// Returns a body of two frames and an error.
    fn broken() -> Whatever {
        let frame = |text: &'static str| Ok(Frame::data(Bytes::from_static(text.as_bytes())));
        let end = Err(std::io::Error::other("it ends here"));
        StreamBody::new(futures::stream::iter([frame("one "), frame("two"), end]).boxed()).boxed_unsync()
    }

    /// Returns what a client receives of a reply with this body.
    async fn got(body: fn() -> Whatever) -> Option<String> {
        let (client, server) = tokio::io::duplex(64 << 10);
        let service = service_fn(move |_: Request<Incoming>| async move { Ok::<_, Infallible>(Response::new(body())) });
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(server), service));
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(client)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::new(http_body_util::Empty::<Bytes>::new());
        let reply = tokio::time::timeout(Duration::from_secs(10), sender.send_request(request)).await.unwrap().ok()?;
        let (mut body, mut text) = (reply.into_body(), String::new());
        while let Some(Ok(frame)) = body.frame().await {
            text.push_str(std::str::from_utf8(&frame.into_data().unwrap()).unwrap());
        }
        Some(text)
    }

    #[tokio::test]
    async fn what_came_before_the_error_is_written_and_by_itself_it_is_not() {
        assert_eq!(got(|| Flushed::new(broken()).boxed_unsync()).await.as_deref(), Some("one two"));
        assert_eq!(got(broken).await, None, "the control");
    }
}
