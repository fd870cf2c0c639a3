//! Idle connections to upstreams, kept for reuse.
//!
//! Guarantees: an idle connection is stored under the address that was dialled, the name in SNI and whether TLS is used. It is reused only
//! for the same name, if the name still resolves to this address and the address was checked just now. It is stored only after a reply that
//! was read to its end, for a few seconds, in a pool of bounded size.
//!
//! Rejects: connections after an error or an incomplete reply, and those that a login could have bound to a user. Credentials are in the
//! headers of each request, so a connection itself belongs to no user.

use std::{
    collections::HashMap,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{
    HeaderMap, Response,
    header::{PROXY_AUTHENTICATE, WWW_AUTHENTICATE},
};
use hyper::{
    body::{Body, Frame, Incoming, SizeHint},
    client::conn::http1::SendRequest,
};
use parking_lot::Mutex;

use super::body::ReplyBody;
use crate::policy::hostname::Hostname;

/// Maximum time that a connection is idle. Servers that announce no timeout close theirs after five seconds or more, and a request that is
/// sent at that moment has an unknown outcome.
const WAIT: Duration = Duration::from_secs(4);
/// How long before the timeout that a server announces a connection is dropped.
const MARGIN: Duration = Duration::from_secs(1);
/// Maximum age of a connection, because what was checked when it was opened (certificates, authorities) is not trusted longer.
const AGE: Duration = Duration::from_secs(300);
/// Maximum number of idle connections to one upstream.
const EACH: usize = 32;
/// Maximum number of idle connections.
const ALL: usize = 512;
/// Time limit for a connection to become ready again after its reply has ended.
const SETTLE: Duration = Duration::from_secs(1);

/// The other end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// The address that was dialled.
    pub address: SocketAddr,
    /// SHA-256 of the certificate that the peer presented, if TLS is used.
    pub certificate: Option<[u8; 32]>,
}

/// A connection.
pub struct Connection {
    /// Sends requests over the connection.
    pub sender: SendRequest<ReplyBody>,
    /// The other end.
    pub peer: Peer,
    opened: Instant,
}

impl Connection {
    /// Returns a new connection.
    pub fn new(sender: SendRequest<ReplyBody>, peer: Peer) -> Self {
        Self { sender, peer, opened: Instant::now() }
    }

    /// Returns whether the connection belongs to no user after this reply. NTLM and similar schemes authenticate connections.
    pub fn is_shareable(headers: &HeaderMap) -> bool {
        !headers.contains_key(WWW_AUTHENTICATE) && !headers.contains_key(PROXY_AUTHENTICATE)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    address: SocketAddr,
    host: Hostname,
    secure: bool,
}

struct Waiting {
    connection: Connection,
    until: Instant,
}

/// The pool of idle connections.
#[derive(Default)]
pub struct Pool(Mutex<HashMap<Key, Vec<Waiting>>>);

impl Pool {
    /// Returns an idle connection to one of these addresses under this name, if there is one.
    pub fn take(&self, addresses: &[SocketAddr], host: &Hostname, secure: bool) -> Option<Connection> {
        let mut waiting = self.0.lock();
        for address in addresses {
            let key = Key { address: *address, host: host.clone(), secure };
            let Some(stack) = waiting.get_mut(&key) else { continue };
            // Take the newest first, so that the others can expire.
            while let Some(Waiting { connection, until }) = stack.pop() {
                if Instant::now() < until && connection.sender.is_ready() {
                    return Some(connection);
                }
            }
            waiting.remove(&key);
        }
        None
    }

    fn put(&self, key: Key, connection: Connection, wait: Duration) {
        let now = Instant::now();
        let until = (now + wait).min(connection.opened + AGE);
        if until <= now || !connection.sender.is_ready() {
            return;
        }
        let mut waiting = self.0.lock();
        let total: usize = waiting.values().map(Vec::len).sum();
        if total >= ALL {
            waiting.retain(|_, stack| {
                stack.retain(|one| now < one.until && !one.connection.sender.is_closed());
                !stack.is_empty()
            });
        }
        let room = waiting.values().map(Vec::len).sum::<usize>() < ALL;
        let stack = waiting.entry(key).or_default();
        stack.retain(|one| now < one.until && !one.connection.sender.is_closed());
        if room && stack.len() < EACH {
            stack.push(Waiting { connection, until });
        }
    }
}

/// A connection that returns to its pool once its reply has been read to the end.
pub struct Returned {
    pool: Arc<Pool>,
    connection: Connection,
    key: Key,
    wait: Duration,
}

impl Returned {
    /// Returns the guard of a connection whose reply has begun.
    pub fn new<B>(pool: Arc<Pool>, connection: Connection, host: &Hostname, secure: bool, reply: &Response<B>) -> Self {
        let key = Key { address: connection.peer.address, host: host.clone(), secure };
        let wait = promised(reply.headers()).map_or(WAIT, |promised| promised.saturating_sub(MARGIN).min(WAIT));
        Self { pool, connection, key, wait }
    }

    /// Returns the connection to the pool after its reply has ended. It becomes ready a moment later, if the upstream keeps it open.
    fn settle(self) {
        let Self { pool, mut connection, key, wait } = self;
        tokio::spawn(async move {
            if let Ok(Ok(())) = tokio::time::timeout(SETTLE, connection.sender.ready()).await {
                pool.put(key, connection, wait);
            }
        });
    }
}

/// Returns the timeout in a header such as `keep-alive: timeout=5`.
fn promised(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("keep-alive")?.to_str().ok()?;
    let seconds = value.split(',').find_map(|part| part.trim().strip_prefix("timeout="))?;
    seconds.trim().parse().ok().map(Duration::from_secs)
}

/// A reply's body that returns its connection to the pool at the end of the body, and closes the connection otherwise.
pub struct Whole {
    body: Incoming,
    returned: Option<Returned>,
}

impl Whole {
    /// Wraps a body. An empty body has ended already.
    pub fn new(body: Incoming, returned: Option<Returned>) -> Self {
        let mut whole = Self { body, returned };
        whole.over();
        whole
    }

    fn over(&mut self) {
        if self.body.is_end_stream()
            && let Some(returned) = self.returned.take()
        {
            returned.settle();
        }
    }
}

impl Body for Whole {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        match &frame {
            Some(Ok(_)) => this.over(),
            Some(Err(_)) => this.returned = None,
            None => {
                if let Some(returned) = this.returned.take() {
                    returned.settle();
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests;
