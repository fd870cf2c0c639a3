//! Replies that the gateway carries.
//!
//! Guarantees: all that has come of a reply is read before its end is told, and how it ended is told apart: at the upstream, by the gateway, or
//! because the gateway is gone. Non-goals: to look into it.

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

/// Why a reply has ended before it was over.
#[derive(Debug, thiserror::Error)]
pub enum EndedError {
    /// The upstream broke it off: what has come is all that there was.
    #[error("the upstream broke off its reply")]
    BrokeOff,
    /// It repeats the credential that it was asked for with.
    #[error("the reply repeats the credential that the request was made with, and its rest is withheld")]
    Repeated,
    /// The gateway has stopped to read it.
    #[error(
        "the upstream was silent for longer than the class allows (upstreamTimeoutSeconds), or its reply could not be read"
    )]
    GivenUp,
    /// The connection to the gateway has ended.
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
    /// The refusal of what is left of a reply that the gateway has ended because of what is in it.
    pub fn denial(error: &(dyn std::error::Error + 'static)) -> Option<Denial> {
        let mut causes = std::iter::successors(Some(error), |error| error.source());
        causes.any(|error| matches!(error.downcast_ref(), Some(Self::Repeated))).then(withheld)
    }
}

/// Of a reply that the gateway has ended because of what is in it.
pub fn withheld() -> Denial {
    let reason = "the reply repeats the credential that the request was made with, and its rest is withheld; whether the call took effect is not known";
    Denial { rule: Rule::UpstreamSecret, reason: reason.to_owned() }
}

/// A reply's body.
#[derive(Debug)]
pub struct Carried {
    body: Incoming,
    /// Bytes that are still to come, by the upstream's word.
    left: Option<u64>,
}

/// The upstream's reply, as it was sent.
pub(super) fn reply(mut reply: Response<Incoming>) -> Response<Carried> {
    let length = reply.headers_mut().remove(wire::LENGTH);
    let left = length.as_ref().and_then(|length| length.to_str().ok()?.parse().ok());
    if let Some(length) = length {
        reply.headers_mut().insert(CONTENT_LENGTH, length);
    }
    reply.map(|body| Carried { body, left })
}

/// How a reply ended, by its trailers. One that is not known is no whole reply, whatever it is.
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
