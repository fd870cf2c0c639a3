//! Replies that upstreams compress though they were asked not to, unpacked as they come.
//!
//! Guarantees: what is unpacked at a time is bounded whatever it was packed by, and so is all of it; an event of a stream that has come is
//! passed on without waiting for the next; a reply whose packing is broken or cut off ends with an error, and never as a whole one.
//! Non-goals: Brotli and Zstandard, which nobody sends unasked, and what is packed twice: such a reply is refused by its name.

use std::{
    io::Write,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use flate2::write::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use hyper::body::{Body, Frame};

use super::body::BoxError;

/// Bytes that are unpacked at a time: DEFLATE makes at most 1,032 of one.
const STEP: usize = 1 << 10;
/// Bytes of a reply, unpacked: no model or tool says that much.
pub const LARGEST: u64 = 64 << 20;

/// A reply that cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// It is not what it says, or is cut off.
    #[error("the reply says that it is packed by {0}, and is not, or is cut off: {1}")]
    Broken(&'static str, std::io::Error),
    /// It becomes too long.
    #[error("expected a reply of at most {LARGEST} bytes once it is unpacked, found a longer one")]
    TooLong,
}

/// How a reply is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// RFC 1952.
    Gzip,
    /// RFC 1950; or RFC 1951 by itself, as some servers have it.
    Deflate,
}

impl Packing {
    /// By its name in `content-encoding`.
    pub fn named(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "gzip" | "x-gzip" => Some(Self::Gzip),
            "deflate" => Some(Self::Deflate),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
        }
    }
}

enum Decoder {
    Gzip(MultiGzDecoder<Vec<u8>>),
    Zlib(ZlibDecoder<Vec<u8>>),
    Raw(DeflateDecoder<Vec<u8>>),
}

impl Decoder {
    /// By the first byte: zlib's header names its method, which no first block of bare DEFLATE that servers write looks like.
    fn new(packing: Packing, first: u8) -> Self {
        match packing {
            Packing::Gzip => Self::Gzip(MultiGzDecoder::new(Vec::new())),
            Packing::Deflate if first & 0x0f == 8 => Self::Zlib(ZlibDecoder::new(Vec::new())),
            Packing::Deflate => Self::Raw(DeflateDecoder::new(Vec::new())),
        }
    }

    /// What these bytes add. All of it: nothing waits for what comes next.
    fn unpack(&mut self, packed: &[u8]) -> std::io::Result<Vec<u8>> {
        match self {
            Self::Gzip(decoder) => decoder.write_all(packed).and_then(|()| decoder.flush()),
            Self::Zlib(decoder) => decoder.write_all(packed).and_then(|()| decoder.flush()),
            Self::Raw(decoder) => decoder.write_all(packed).and_then(|()| decoder.flush()),
        }?;
        Ok(std::mem::take(self.out()))
    }

    /// What is left, if it is whole.
    fn finish(&mut self) -> std::io::Result<Vec<u8>> {
        match self {
            Self::Gzip(decoder) => decoder.try_finish(),
            Self::Zlib(decoder) => decoder.try_finish(),
            Self::Raw(decoder) => decoder.try_finish(),
        }?;
        Ok(std::mem::take(self.out()))
    }

    fn out(&mut self) -> &mut Vec<u8> {
        match self {
            Self::Gzip(decoder) => decoder.get_mut(),
            Self::Zlib(decoder) => decoder.get_mut(),
            Self::Raw(decoder) => decoder.get_mut(),
        }
    }
}

/// A body, unpacked.
pub struct Unpacked<B> {
    body: Pin<Box<B>>,
    packing: Packing,
    /// None before the first byte.
    decoder: Option<Decoder>,
    packed: Bytes,
    made: u64,
    over: bool,
}

impl<B> Unpacked<B> {
    /// Wraps a body that is packed so.
    pub fn new(body: B, packing: Packing) -> Self {
        Self { body: Box::pin(body), packing, decoder: None, packed: Bytes::new(), made: 0, over: false }
    }

    /// Unpacks a little of what has come.
    fn step(&mut self) -> Result<Vec<u8>, UnpackError> {
        let step = self.packed.split_to(self.packed.len().min(STEP));
        let (packing, first) = (self.packing, step.first().copied().unwrap_or_default());
        let made = self.decoder.get_or_insert_with(|| Decoder::new(packing, first)).unpack(&step);
        self.counted(made)
    }

    fn counted(&mut self, made: std::io::Result<Vec<u8>>) -> Result<Vec<u8>, UnpackError> {
        let made = made.map_err(|error| UnpackError::Broken(self.packing.name(), error))?;
        self.made = self.made.saturating_add(u64::try_from(made.len()).unwrap_or(u64::MAX));
        if self.made > LARGEST { Err(UnpackError::TooLong) } else { Ok(made) }
    }

    fn finish(&mut self) -> Result<Vec<u8>, UnpackError> {
        self.over = true;
        match self.decoder.take() {
            Some(mut decoder) => self.counted(decoder.finish()),
            // No body at all, as of a reply to HEAD.
            None => Ok(Vec::new()),
        }
    }
}

impl<B> Body for Unpacked<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        while !this.over {
            let made = if this.packed.is_empty() {
                match ready!(this.body.as_mut().poll_frame(cx)) {
                    Some(Ok(frame)) => {
                        this.packed = frame.into_data().unwrap_or_default();
                        continue;
                    }
                    Some(Err(error)) => {
                        this.over = true;
                        return Poll::Ready(Some(Err(error.into())));
                    }
                    None => this.finish(),
                }
            } else {
                this.step()
            };
            match made {
                Ok(made) if made.is_empty() => {}
                Ok(made) => return Poll::Ready(Some(Ok(Frame::data(made.into())))),
                Err(error) => {
                    (this.over, this.packed) = (true, Bytes::new());
                    return Poll::Ready(Some(Err(error.into())));
                }
            }
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.over
    }
}

#[cfg(test)]
mod tests;
