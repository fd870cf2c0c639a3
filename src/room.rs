//! Memory for bodies that are held whole, bounded in total.
//!
//! Guarantees: concurrent requests never hold more bytes than the limit. Short bodies never wait for long ones. Waiting requests are served
//! in order.
//!
//! Non-goals: what is made of a body. It takes as much memory again, or twice as much.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Body;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The longest short body, in bytes. Most requests are short.
const SHORT: usize = 1 << 20;
/// The bytes of a body over the limit that are read and discarded, because a client that is still sending does not read the reply.
const FORGOTTEN: usize = 64 << 20;
/// The bytes of one unit of memory.
const UNIT: usize = 16 << 10;

/// Memory for bodies.
#[derive(Debug)]
pub struct Room {
    short: Lane,
    long: Lane,
}

#[derive(Debug)]
struct Lane {
    places: Arc<Semaphore>,
    units: usize,
}

impl Lane {
    fn new(bytes: usize) -> Self {
        let units = bytes.div_ceil(UNIT);
        Self { places: Arc::new(Semaphore::new(units)), units }
    }
}

/// A reserved part of the memory. It is returned on drop.
#[derive(Debug)]
pub struct Place {
    _permit: Option<OwnedSemaphorePermit>,
}

/// The reason why a body was not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unread {
    /// The body is longer than the limit.
    #[error("expected a body of at most {most} bytes, found a longer one; send less at once")]
    TooLong {
        /// The limit, in bytes.
        most: usize,
    },
    /// The body broke off.
    #[error("the body cannot be read: {0}")]
    Broken(String),
}

impl Room {
    /// Creates memory of `short` bytes for short bodies and `long` bytes for all others.
    pub fn new(short: usize, long: usize) -> Self {
        Self { short: Lane::new(short), long: Lane::new(long) }
    }

    /// Waits for memory for a body of this length, or of `most` bytes if the length is unknown.
    ///
    /// # Errors
    /// Returns an error if the body is longer than `most`.
    pub async fn place(&self, body: &impl Body, most: usize) -> Result<Place, Unread> {
        let length = match body.size_hint().exact().map(usize::try_from) {
            Some(Ok(length)) if length <= most => length,
            Some(_) => return Err(Unread::TooLong { most }),
            None => most,
        };
        let lane = if length <= SHORT { &self.short } else { &self.long };
        let units = u32::try_from(length.div_ceil(UNIT).min(lane.units)).unwrap_or(u32::MAX);
        // The semaphore is never closed.
        Ok(Place { _permit: lane.places.clone().acquire_many_owned(units).await.ok() })
    }

    /// Reads a whole body once there is memory for it. Nothing is kept of a body over the limit. It is read to its end, unless the end is
    /// too far, so that its sender gets to read the reply.
    ///
    /// # Errors
    /// Returns an error if the body is too long or breaks off.
    pub async fn read<B>(&self, mut body: B, most: usize) -> Result<(Bytes, Place), Unread>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: std::error::Error + Send + Sync + 'static,
    {
        let place = match self.place(&body, most).await {
            Ok(place) => place,
            Err(unread) => {
                forget(body).await;
                return Err(unread);
            }
        };
        let read = Limited::new(&mut body, most).collect().await;
        match read {
            Ok(body) => Ok((body.to_bytes(), place)),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => {
                drop(place);
                forget(body).await;
                Err(Unread::TooLong { most })
            }
            Err(error) => Err(Unread::Broken(error.to_string())),
        }
    }
}

/// Reads a body and discards it.
async fn forget<B: Body<Data = Bytes> + Unpin>(mut body: B) {
    let mut read = 0usize;
    while let Some(Ok(frame)) = body.frame().await {
        read = read.saturating_add(frame.data_ref().map_or(0, Bytes::len));
        if read > FORGOTTEN {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, time::Duration};

    use futures::FutureExt;
    use http_body_util::{Full, StreamBody};
    use hyper::body::Frame;

    use super::*;

    fn body(length: usize) -> Full<Bytes> {
        Full::new(Bytes::from(vec![b'a'; length]))
    }

    /// A body of unknown length.
    fn chunked(length: usize) -> impl Body<Data = Bytes, Error = Infallible> + Unpin {
        StreamBody::new(futures::stream::iter(vec![Ok(Frame::data(Bytes::from(vec![b'a'; length])))]))
    }

    #[tokio::test]
    async fn no_more_is_held_than_there_is_room_for_and_short_ones_do_not_wait_for_long_ones() {
        const MOST: usize = 4 << 20;
        let room = Room::new(SHORT, MOST);
        let (first, held) = room.read(body(3 << 20), MOST).await.unwrap();
        assert_eq!(first.len(), 3 << 20);
        assert!(room.read(body(2 << 20), MOST).now_or_never().is_none(), "the second waits");
        assert!(room.read(chunked(10), MOST).now_or_never().is_none(), "so does what may be as long as that");
        for length in [0, 1, SHORT] {
            assert!(room.read(body(length), MOST).now_or_never().is_some(), "{length} does not");
        }
        drop(held);
        let next = tokio::time::timeout(Duration::from_secs(5), room.read(body(2 << 20), MOST)).await;
        assert!(next.unwrap().is_ok());
    }

    #[tokio::test]
    async fn what_is_too_long_is_refused_by_its_length_and_by_what_comes() {
        let room = Room::new(SHORT, 2 << 20);
        let most = 2 << 20;
        assert_eq!(room.read(body(most + 1), most).await.err(), Some(Unread::TooLong { most }));
        assert_eq!(room.read(chunked(most + 1), most).await.err(), Some(Unread::TooLong { most }));
        assert_eq!(room.read(body(most), most).await.unwrap().0.len(), most);
        assert_eq!(room.read(chunked(most), most).await.unwrap().0.len(), most);
        // A body larger than the memory takes all of it, instead of waiting forever.
        assert_eq!(room.read(body(2 * most), 4 * most).await.unwrap().0.len(), 2 * most);
    }
}
