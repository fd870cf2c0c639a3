//! The response body type.

use bytes::Bytes;
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};

use crate::flushed::Flushed;

/// Any error of a body.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;
/// The body of a response.
pub type Body = UnsyncBoxBody<Bytes, BodyError>;

/// Boxes a body.
pub fn boxed<B>(body: B) -> Body
where
    B: hyper::body::Body<Data = Bytes, Error = BodyError> + Send + 'static,
{
    Flushed::new(body.boxed_unsync()).boxed_unsync()
}
