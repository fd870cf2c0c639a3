//! Tunnels: the agent's own connections, which Belay does not look into.
//!
//! Guarantees: a tunnel to port 443 starts with a TLS ClientHello for the very host that was requested, or carries nothing. A tunnel ends
//! within seconds after its pod or its permission does. A client that asks for it is told why a tunnel carries nothing.
//!
//! Non-goals: looking further into a tunnel. Its bytes are counted, not read.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::Instant,
};

use super::refusal::Refused;
use crate::{
    policy::{
        hostname::{Authority, Hostname},
        rule::Rule,
    },
    wire::Refusal,
};

/// The port on which only TLS is allowed.
const HTTPS: u16 = 443;
/// Time limit for the ClientHello.
const HELLO: Duration = Duration::from_secs(10);
/// Maximum bytes that are read of a ClientHello. Post-quantum key shares make one several KiB long.
const LARGEST_HELLO: usize = 32 << 10;
/// Delay between two checks whether the tunnel is still allowed.
const RECHECK: Duration = Duration::from_secs(2);
/// Time limit for reading what the agent had sent when its tunnel was denied.
const LINGER: Duration = Duration::from_secs(2);
/// Bytes that are passed on at a time.
const PIECE: usize = 16 << 10;

/// The bytes of a tunnel.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Bytes from the agent.
    pub sent: AtomicU64,
    /// Bytes to the agent.
    pub received: AtomicU64,
}

impl Traffic {
    fn total(&self) -> u64 {
        self.sent.load(Ordering::Relaxed).wrapping_add(self.received.load(Ordering::Relaxed))
    }
}

/// Returns whether the first bytes of a tunnel to this authority are checked.
pub fn is_looked_at(to: &Authority) -> bool {
    to.port == HTTPS
}

/// Tells the client whether the tunnel was allowed or denied, in the format of [`wire::OPENING`](crate::wire::OPENING).
///
/// # Errors
/// Returns an error if the client cannot be written to.
pub async fn tell<A: AsyncRead + AsyncWrite + Unpin>(agent: &mut A, refused: Option<&Refused>) -> io::Result<()> {
    let Some(Refused { rule, reason, .. }) = refused else {
        agent.write_all(b"\n").await?;
        return agent.flush().await;
    };
    let mut line = serde_json::to_vec(&Refusal { rule: *rule, reason: reason.clone() })?;
    line.push(b'\n');
    agent.write_all(&line).await?;
    agent.shutdown().await?;
    // A connection that is closed with unread bytes is reset, and the client would lose the message.
    let _ = tokio::time::timeout(LINGER, tokio::io::copy(agent, &mut tokio::io::sink())).await;
    Ok(())
}

/// Reads and checks the first bytes from the agent before any of them is passed on. Returns no bytes if none must be checked or if the
/// agent sent none. An agent that closes without sending anything is not denied.
///
/// # Errors
/// Returns [`Rule::EgressHost`] if the bytes on port 443 are not a ClientHello for the host.
pub async fn opening<R: AsyncRead + Unpin>(agent: &mut R, to: &Authority) -> Result<Vec<u8>, Refused> {
    if !is_looked_at(to) {
        return Ok(Vec::new());
    }
    match tokio::time::timeout(HELLO, client_hello(agent, &to.host)).await {
        Ok(hello) => hello,
        Err(_) => Err(denied(&to.host, "found none in time")),
    }
}

async fn client_hello<R: AsyncRead + Unpin>(agent: &mut R, host: &Hostname) -> Result<Vec<u8>, Refused> {
    let mut acceptor = rustls::server::Acceptor::default();
    let mut seen = Vec::new();
    let mut piece = [0; 4096];
    while seen.len() < LARGEST_HELLO {
        let read = agent.read(&mut piece).await.map_err(|e| denied(host, &format!("found an error: {e}")))?;
        let Some(new @ [_, ..]) = piece.get(..read) else {
            if seen.is_empty() {
                return Ok(seen);
            }
            break;
        };
        seen.extend_from_slice(new);
        let mut rest = new;
        while !rest.is_empty() {
            let taken = acceptor.read_tls(&mut rest).map_err(|e| denied(host, &format!("found an error: {e}")))?;
            match acceptor.accept() {
                Ok(Some(accepted)) => {
                    let name = accepted.client_hello().server_name().map(str::to_owned);
                    return match name.as_deref().map(Hostname::parse) {
                        Some(Ok(name)) if name == *host => Ok(seen),
                        Some(_) => Err(denied(host, &format!("found one for {:?}", name.unwrap_or_default()))),
                        None => Err(denied(host, "found one without a server name")),
                    };
                }
                Ok(None) if taken == 0 => return Err(denied(host, "found one that is too long")),
                Ok(None) => {}
                Err((error, _)) => return Err(denied(host, &format!("found something else ({error})"))),
            }
        }
    }
    Err(denied(host, "found its start only"))
}

fn denied(host: &Hostname, found: &str) -> Refused {
    Refused::denied(
        Rule::EgressHost,
        format!("expected a tunnel to port 443 to start with a TLS ClientHello for {host}, {found}"),
    )
}

/// Why a tunnel ended.
#[derive(Debug)]
pub enum End {
    /// Both sides were done, or one of them failed.
    Over(io::Result<()>),
    /// No bytes moved for too long.
    Idle,
    /// The tunnel is not allowed any more.
    Cut(Refused),
}

/// Passes bytes in both directions until both sides are done, no byte has moved for `silence`, or `still` returns a denial.
pub async fn relay<A, U>(
    agent: A,
    upstream: U,
    (traffic, silence): (&Traffic, Duration),
    still: impl Fn() -> Result<(), Refused>,
) -> End
where
    A: AsyncRead + AsyncWrite,
    U: AsyncRead + AsyncWrite,
{
    let (agent_reads, agent_writes) = tokio::io::split(agent);
    let (upstream_reads, upstream_writes) = tokio::io::split(upstream);
    let both = async {
        tokio::try_join!(
            pump(agent_reads, upstream_writes, &traffic.sent),
            pump(upstream_reads, agent_writes, &traffic.received)
        )
        .map(|_| ())
    };
    let watch = async {
        let (mut last, mut moved) = (traffic.total(), Instant::now());
        loop {
            tokio::time::sleep(RECHECK).await;
            if let Err(refused) = still() {
                return End::Cut(refused);
            }
            let total = traffic.total();
            if total != last {
                (last, moved) = (total, Instant::now());
            } else if moved.elapsed() >= silence {
                return End::Idle;
            }
        }
    };
    tokio::select! {
        over = both => End::Over(over),
        end = watch => end,
    }
}

async fn pump(reads: impl AsyncRead, writes: impl AsyncWrite, counter: &AtomicU64) -> io::Result<()> {
    futures::pin_mut!(reads, writes);
    let mut piece = vec![0; PIECE];
    loop {
        let read = reads.read(&mut piece).await?;
        let Some(new @ [_, ..]) = piece.get(..read) else { break };
        writes.write_all(new).await?;
        writes.flush().await?;
        counter.fetch_add(u64::try_from(read).unwrap_or_default(), Ordering::Relaxed);
    }
    // The other direction may still have bytes to send.
    writes.shutdown().await
}

#[cfg(test)]
mod tests;
