//! Connections between a harness and a gateway that run in one process, as those of `belay run` do.
//!
//! Guarantees: a connection carries the same HTTP as one over TLS, and the gateway serves it in the same way. Only this process can open one.
//!
//! Non-goals: encryption, because nothing leaves the process; and limits on the number of connections, because the only peer is Belay.

use std::io;

use tokio::{
    io::{DuplexStream, duplex},
    runtime::Handle,
    sync::mpsc::{Receiver, Sender, channel},
};

/// Connections that wait until the gateway takes them. Whoever opens more waits as well.
const WAITING: usize = 16;
/// Bytes that a connection holds in each direction until they are read.
const HELD: usize = 64 << 10;

/// A HTTP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.1, for tunnels.
    Http1,
    /// HTTP/2, for everything else.
    Http2,
}

/// The end of a harness.
#[derive(Clone)]
pub struct InProcess {
    threads: Handle,
    opened: Sender<(DuplexStream, Version)>,
}

/// The end of a gateway: the connections that harnesses open.
pub struct Connections(Receiver<(DuplexStream, Version)>);

/// Returns the two ends. Both are to be served on these threads.
pub fn link(threads: Handle) -> (InProcess, Connections) {
    let (opened, connections) = channel(WAITING);
    (InProcess { threads, opened }, Connections(connections))
}

impl InProcess {
    /// Returns the threads that serve the gateway.
    pub fn threads(&self) -> &Handle {
        &self.threads
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// Returns an error if the gateway has ended.
    pub async fn open(&self, version: Version) -> io::Result<DuplexStream> {
        let (ours, theirs) = duplex(HELD);
        let ended = |_| io::Error::new(io::ErrorKind::ConnectionRefused, "the gateway has ended");
        self.opened.send((theirs, version)).await.map_err(ended)?;
        Ok(ours)
    }
}

impl Connections {
    /// Waits for the next connection. Returns `None` if no harness is left.
    pub async fn next(&mut self) -> Option<(DuplexStream, Version)> {
        self.0.recv().await
    }
}
