//! Connections to upstreams that wait to be used again.
//!
//! Promises: a connection waits under the address that was dialled, the name that was in SNI and whether there was TLS, and is
//! given out only for the same name to an address that was resolved and checked just now; it waits only after a reply that
//! was read to its end, for a few seconds, among a bounded number. Refuses: connections after an error or a reply that
//! broke off, and those that a login could have bound to somebody: credentials are in the headers of each request, and a
//! connection is nobody's.

use std::{
    collections::HashMap,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
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

use super::body::ReplyBody;
use crate::policy::hostname::Hostname;

/// How long a connection waits. Servers that say nothing close theirs after five seconds or more, and a request that meets
/// that moment has an unknown fate.
const WAIT: Duration = Duration::from_secs(4);
/// How much sooner than a server says that it will close a connection it is given up.
const MARGIN: Duration = Duration::from_secs(1);
/// How old a connection gets: what was checked when it began (certificates, authorities) holds no longer than this.
const AGE: Duration = Duration::from_secs(300);
/// Connections that wait for one upstream.
const EACH: usize = 32;
/// Connections that wait in all.
const ALL: usize = 512;
/// How long a connection whose reply is over may take to be ready again.
const SETTLE: Duration = Duration::from_secs(1);

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// The address that was dialled.
    pub address: SocketAddr,
    /// SHA-256 of the certificate that was shown there, over TLS.
    pub certificate: Option<[u8; 32]>,
}

/// A connection.
pub struct Connection {
    /// What sends over it.
    pub sender: SendRequest<ReplyBody>,
    /// Where it goes.
    pub peer: Peer,
    opened: Instant,
}

impl Connection {
    /// A new one.
    pub fn new(sender: SendRequest<ReplyBody>, peer: Peer) -> Self {
        Self { sender, peer, opened: Instant::now() }
    }

    /// Whether it is still nobody's after this reply. NTLM and its like authenticate connections.
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

/// Waiting connections.
#[derive(Default)]
pub struct Pool(Mutex<HashMap<Key, Vec<Waiting>>>);

impl Pool {
    /// A connection to one of these addresses, under this name.
    pub fn take(&self, addresses: &[SocketAddr], host: &Hostname, secure: bool) -> Option<Connection> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for address in addresses {
            let key = Key { address: *address, host: host.clone(), secure };
            let Some(stack) = waiting.get_mut(&key) else { continue };
            // The newest first, so that the others may end.
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
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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

/// A connection that goes back to its pool once the reply has been read to its end.
pub struct Returned {
    pool: Arc<Pool>,
    connection: Connection,
    key: Key,
    wait: Duration,
}

impl Returned {
    /// Takes care of a connection whose reply has begun.
    pub fn new<B>(pool: Arc<Pool>, connection: Connection, host: &Hostname, secure: bool, reply: &Response<B>) -> Self {
        let key = Key { address: connection.peer.address, host: host.clone(), secure };
        let wait = promised(reply.headers()).map_or(WAIT, |promised| promised.saturating_sub(MARGIN).min(WAIT));
        Self { pool, connection, key, wait }
    }

    /// The reply is over. The connection is ready a moment later, if the upstream keeps it.
    fn settle(self) {
        let Self { pool, mut connection, key, wait } = self;
        tokio::spawn(async move {
            if let Ok(Ok(())) = tokio::time::timeout(SETTLE, connection.sender.ready()).await {
                pool.put(key, connection, wait);
            }
        });
    }
}

/// What `keep-alive: timeout=5` says.
fn promised(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("keep-alive")?.to_str().ok()?;
    let seconds = value.split(',').find_map(|part| part.trim().strip_prefix("timeout="))?;
    seconds.trim().parse().ok().map(Duration::from_secs)
}

/// A reply's body that gives its connection back at its end, and ends it otherwise.
pub struct Whole {
    body: Incoming,
    returned: Option<Returned>,
}

impl Whole {
    /// Wraps a body. One that is empty is over.
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
