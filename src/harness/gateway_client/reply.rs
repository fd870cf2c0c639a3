//! Replies that the gateway forwards.
//!
//! Guarantees: everything that came of a reply is read before its end is reported. The end says whether the upstream ended the reply, the
//! gateway ended it, or the connection to the gateway was lost. Non-goals: looking into the reply.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, Response, header::CONTENT_LENGTH};
use hyper::body::{Body, Frame, Incoming, SizeHint};

use crate::{
    policy::{decide::Denial, rule::Rule},
    wire::{self, Ended},
};

/// The reason why a reply ended early.
#[derive(Debug, thiserror::Error)]
pub enum EndedError {
    /// The upstream broke off the reply. The bytes that came are all that there were.
    #[error("the upstream broke off its reply")]
    BrokeOff,
    /// The reply repeats the credential of its request.
    #[error("the reply repeats the credential of the request, and its rest is withheld")]
    Repeated,
    /// The gateway stopped reading the reply.
    #[error(
        "the upstream was silent for longer than the class allows (upstreamTimeoutSeconds), or its reply could not be read"
    )]
    GivenUp,
    /// The connection to the gateway ended.
    #[error("the connection to the gateway has ended: {0}")]
    Lost(#[from] hyper::Error),
}

impl From<Ended> for EndedError {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::BrokeOff => Self::BrokeOff,
            Ended::Repeated => Self::Repeated,
            Ended::GivenUp => Self::GivenUp,
        }
    }
}

impl EndedError {
    /// Returns the denial of the rest of a reply, if the gateway ended the reply because of its content.
    pub fn denial(error: &(dyn std::error::Error + 'static)) -> Option<Denial> {
        let mut causes = std::iter::successors(Some(error), |error| error.source());
        causes.any(|error| matches!(error.downcast_ref(), Some(Self::Repeated))).then(withheld)
    }
}

/// Returns the denial of a reply that the gateway ended because of its content.
pub fn withheld() -> Denial {
    let reason = "the reply repeats the credential of the request, and its rest is withheld; it is unknown whether the call took effect";
    Denial { rule: Rule::UpstreamSecret, reason: reason.to_owned() }
}

/// A reply's body.
#[derive(Debug)]
pub struct Carried {
    body: Incoming,
    /// The number of bytes that are still to come, as declared by the upstream.
    left: Option<u64>,
}

/// Returns the upstream's reply as it was sent.
pub(super) fn reply(mut reply: Response<Incoming>) -> Response<Carried> {
    let length = reply.headers_mut().remove(wire::LENGTH);
    let left = length.as_ref().and_then(|length| length.to_str().ok()?.parse().ok());
    if let Some(length) = length {
        reply.headers_mut().insert(CONTENT_LENGTH, length);
    }
    reply.map(|body| Carried { body, left })
}

/// Returns how a reply ended, from its trailers. A reply with an unknown value counts as incomplete.
fn ended(trailers: &HeaderMap) -> Option<EndedError> {
    let ended = trailers.get(wire::ENDED)?;
    Some(ended.to_str().ok().and_then(Ended::named).unwrap_or(Ended::GivenUp).into())
}

impl Body for Carried {
    type Data = Bytes;
    type Error = EndedError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, EndedError>>> {
        Poll::Ready(match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            None => None,
            Some(Err(error)) => Some(Err(error.into())),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
                    self.left = self.left.map(|left| left.saturating_sub(length));
                    Some(Ok(Frame::data(data)))
                }
                Err(frame) => frame.trailers_ref().and_then(ended).map(Err),
            },
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match self.left {
            Some(left) if !self.body.is_end_stream() => SizeHint::with_exact(left),
            _ => self.body.size_hint(),
        }
    }
}
