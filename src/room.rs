//! Room for bodies that are held in memory whole, so that there is only so much of them at a time.
//!
//! Guarantees: whatever is asked for at once, no more bytes are held than there is room for; short bodies never wait for long ones; who
//! waits, waits in order. Non-goals: what is made of a body, which takes as much again, or twice.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Body;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of a short body. Most requests are.
const SHORT: usize = 1 << 20;
/// Bytes of a body that is too long that are read on and forgotten: whoever still sends does not hear the answer.
const FORGOTTEN: usize = 64 << 20;
/// Bytes of one unit of room.
const UNIT: usize = 16 << 10;

/// Room for bodies.
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

/// A part of the room, until it is dropped.
#[derive(Debug)]
pub struct Place {
    _permit: Option<OwnedSemaphorePermit>,
}

/// Why a body is not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unread {
    /// It is longer than may be.
    #[error("expected a body of at most {most} bytes, found a longer one; send less at once")]
    TooLong {
        /// What may be.
        most: usize,
    },
    /// It broke off.
    #[error("the body cannot be read: {0}")]
    Broken(String),
}

impl Room {
    /// Room for so many bytes of short bodies, and so many of others.
    pub fn new(short: usize, long: usize) -> Self {
        Self { short: Lane::new(short), long: Lane::new(long) }
    }

    /// Waits for room for a body of this length, or of `most` bytes where that is not known.
    ///
    /// # Errors
    /// If it is longer than that.
    pub async fn place(&self, body: &impl Body, most: usize) -> Result<Place, Unread> {
        let length = match body.size_hint().exact().map(usize::try_from) {
            Some(Ok(length)) if length <= most => length,
            Some(_) => return Err(Unread::TooLong { most }),
            None => most,
        };
        let lane = if length <= SHORT { &self.short } else { &self.long };
        let units = u32::try_from(length.div_ceil(UNIT).min(lane.units)).unwrap_or(u32::MAX);
        // It is never closed.
        Ok(Place { _permit: lane.places.clone().acquire_many_owned(units).await.ok() })
    }

    /// Reads a body whole, once there is room for it. Of one that is too long nothing is kept, and it is read to its end, as far as that is
    /// near, so that who sends it comes to read the answer.
    ///
    /// # Errors
    /// If it is too long, or breaks off.
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

/// Reads what nobody is to have.
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

    /// Whose length is not said.
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
        // More than there is room for is all of it, and not never.
        assert_eq!(room.read(body(2 * most), 4 * most).await.unwrap().0.len(), 2 * most);
    }
}
