//! The canary: a port that everybody could reach, were it not for the NetworkPolicies.
//!
//! A containment probe that sees only silence proves nothing: the canary answers, so that its silence is a policy's doing.
//! Promises: says one line to whoever connects, and closes. Refuses: listening to anybody.

use std::{convert::Infallible, sync::Arc, time::Duration};

use tokio::{io::AsyncWriteExt, net::TcpListener, sync::Semaphore};

/// What it says.
const LINE: &[u8] = b"belay-canary\n";
/// For saying it.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Connections at a time.
const CONNECTIONS: usize = 256;
/// After a failed accept, which means that the process has no file left to open.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers for ever.
pub async fn sing(listener: TcpListener) -> Infallible {
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
            // Whoever does not wait for it has heard enough: a connection is proof.
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
        tokio::spawn(sing(listener));
        for _ in 0..3 {
            let mut heard = Vec::new();
            TcpStream::connect(address).await.unwrap().read_to_end(&mut heard).await.unwrap();
            assert_eq!(heard, LINE);
        }
    }
}
