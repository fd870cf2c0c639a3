//! The canary: a port that every pod could reach if no NetworkPolicy blocked it.
//!
//! Silence alone would prove nothing to a containment probe. Because the canary answers, its silence means that a NetworkPolicy works.
//!
//! Guarantees: the canary sends one line to each client and closes the connection. Non-goals: reading anything from a client.

use std::{convert::Infallible, sync::Arc, time::Duration};

use tokio::{io::AsyncWriteExt, net::TcpListener, sync::Semaphore};

/// The line that it sends.
const LINE: &[u8] = b"belay-canary\n";
/// Time limit for sending it.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of open connections. Further ones are closed at once.
const CONNECTIONS: usize = 256;
/// Delay after a failed accept, which means that the process has no file descriptor left.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves without end.
pub async fn serve(listener: TcpListener) -> Infallible {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok((mut stream, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else { continue };
        tokio::spawn(async move {
            let say = async {
                stream.write_all(LINE).await?;
                stream.shutdown().await
            };
            // A client need not wait for the line: the connection alone proves that it reaches the canary.
            let _ = tokio::time::timeout(TIMEOUT, say).await;
            drop(slot);
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt, net::TcpStream};

    use super::*;

    #[tokio::test]
    async fn says_its_line_and_closes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener));
        for _ in 0..3 {
            let mut heard = Vec::new();
            TcpStream::connect(address).await.unwrap().read_to_end(&mut heard).await.unwrap();
            assert_eq!(heard, LINE);
        }
    }
}
