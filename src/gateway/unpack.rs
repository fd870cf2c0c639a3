//! Streaming decompression of replies that upstreams compress although they were asked not to.
//!
//! Guarantees: the bytes that are decompressed at a time are bounded for any input, and so is their sum. An event of a stream is passed on
//! as soon as it has arrived, without waiting for the next. A reply that is corrupt or cut off ends with an error and never looks complete.
//!
//! Non-goals: Brotli and Zstandard, which no upstream sends unasked, and replies that are compressed twice. Such a reply is rejected by the
//! name of its encoding.

use std::{
    io::Write,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use flate2::write::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use hyper::body::{Body, Frame};

use super::body::BoxError;

/// Bytes of input that are decompressed at a time. DEFLATE makes at most 1,032 bytes of one.
const STEP: usize = 1 << 10;
/// Maximum bytes of a decompressed reply. Replies of models and tools are shorter.
pub const LARGEST: u64 = 64 << 20;

/// A reply that cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// It is not compressed as it says, or it is cut off.
    #[error("expected a reply in {0}, as its head says, found another encoding or a reply that is cut off: {1}")]
    Broken(&'static str, std::io::Error),
    /// It is too long once it is decompressed.
    #[error("expected a reply of at most {LARGEST} bytes after decompression, found a longer one")]
    TooLong,
}

/// The compression of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// RFC 1952.
    Gzip,
    /// RFC 1950, or bare RFC 1951, which some servers send.
    Deflate,
}

impl Packing {
    /// Returns the compression with this name in `content-encoding`.
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
    /// Returns a decoder. The first byte tells zlib from bare DEFLATE: the zlib header names its method, and no first block of bare DEFLATE
    /// that servers write looks like that.
    fn new(packing: Packing, first: u8) -> Self {
        match packing {
            Packing::Gzip => Self::Gzip(MultiGzDecoder::new(Vec::new())),
            Packing::Deflate if first & 0x0f == 8 => Self::Zlib(ZlibDecoder::new(Vec::new())),
            Packing::Deflate => Self::Raw(DeflateDecoder::new(Vec::new())),
        }
    }

    /// Returns all output for these bytes, without waiting for the next ones.
    fn unpack(&mut self, packed: &[u8]) -> std::io::Result<Vec<u8>> {
        match self {
            Self::Gzip(decoder) => decoder.write_all(packed).and_then(|()| decoder.flush()),
            Self::Zlib(decoder) => decoder.write_all(packed).and_then(|()| decoder.flush()),
            Self::Raw(decoder) => decoder.write_all(packed).and_then(|()| decoder.flush()),
        }?;
        Ok(std::mem::take(self.out()))
    }

    /// Returns the remaining output if the input is complete.
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

/// A body that is decompressed as it streams.
pub struct Unpacked<B> {
    body: Pin<Box<B>>,
    packing: Packing,
    /// `None` before the first byte.
    decoder: Option<Decoder>,
    packed: Bytes,
    made: u64,
    over: bool,
}

impl<B> Unpacked<B> {
    /// Wraps a body with this compression.
    pub fn new(body: B, packing: Packing) -> Self {
        Self { body: Box::pin(body), packing, decoder: None, packed: Bytes::new(), made: 0, over: false }
    }

    /// Decompresses a part of the input that has arrived.
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
            // There was no body, as in a reply to HEAD.
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
