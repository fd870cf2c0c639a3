use proptest::prelude::*;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use super::*;

const SILENCE: Duration = Duration::from_secs(300);

/// A real ClientHello.
fn hello(name: &str) -> Vec<u8> {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
    let mut client = ClientConnection::new(std::sync::Arc::new(config), name.to_owned().try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

fn to(port: u16) -> Authority {
    Authority { host: Hostname::parse("docs.world.test").unwrap(), port }
}

async fn opened(bytes: &[u8], port: u16) -> Result<Vec<u8>, Rule> {
    let mut agent = bytes;
    opening(&mut agent, &to(port)).await.map_err(|e| e.rule)
}

#[tokio::test]
async fn on_443_a_tunnel_starts_with_a_hello_for_its_host() {
    let good = hello("docs.world.test");
    assert_eq!(opened(&good, 443).await.unwrap(), good);
    // Bytes after the ClientHello in the same piece are passed on, too.
    let more = [good.clone(), b"early".to_vec()].concat();
    assert_eq!(opened(&more, 443).await.unwrap(), more);
    assert_eq!(opened(&hello("DOCS.world.test"), 443).await.map(|_| ()), Ok(()));
    // A37: another name. A38: no name, because the host is an address. A39, A40: not TLS.
    for bad in [
        hello("evil.world.test"),
        hello("198.51.100.20"),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        b"CONNECT evil.world.test:443 HTTP/1.1\r\n\r\n".to_vec(),
        b"SSH-2.0-x\r\n".to_vec(),
        vec![0; 100_000],
        good[..good.len() - 1].to_vec(),
        // A record that announces more bytes than it may contain.
        [&[0x16, 3, 1, 0xff, 0xff][..], &[1; 70_000]].concat(),
    ] {
        assert_eq!(opened(&bad, 443).await, Err(Rule::EgressHost));
    }
    assert_eq!(opened(b"", 443).await.unwrap(), b"", "who has said nothing is not refused");
}

#[tokio::test]
async fn whoever_asked_is_told_and_hears_it_though_more_was_under_way() {
    let refused = Refused::denied(Rule::EgressHost, "expected another");
    let (mut agent, mut gateway) = tokio::io::duplex(64);
    let telling = tokio::spawn(async move { tell(&mut gateway, Some(&refused)).await });
    agent.write_all(&[0; 100_000]).await.unwrap();
    let mut word = String::new();
    agent.read_to_string(&mut word).await.unwrap();
    assert_eq!(word, "{\"rule\":\"egress.host\",\"reason\":\"expected another\"}\n");
    drop(agent);
    telling.await.unwrap().unwrap();
    let (mut agent, mut gateway) = tokio::io::duplex(64);
    tell(&mut gateway, None).await.unwrap();
    let mut word = [0];
    agent.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"\n");
}

#[tokio::test]
async fn a_hello_may_come_in_pieces() {
    let good = hello("docs.world.test");
    let (mut agent, mut gateway) = tokio::io::duplex(16);
    let sent = good.clone();
    tokio::spawn(async move {
        for piece in sent.chunks(7) {
            agent.write_all(piece).await.unwrap();
        }
        std::future::pending::<()>().await;
    });
    let opened = opening(&mut gateway, &to(443)).await.unwrap();
    assert_eq!(opened, good[..opened.len()]);
}

#[tokio::test(start_paused = true)]
async fn a_hello_does_not_take_for_ever() {
    let (_agent, mut gateway) = tokio::io::duplex(16);
    assert_eq!(opening(&mut gateway, &to(443)).await.unwrap_err().rule, Rule::EgressHost);
    assert_eq!(opening(&mut gateway, &to(80)).await.unwrap(), b"");
}

#[tokio::test(start_paused = true)]
async fn a_silent_tunnel_ends_and_a_forbidden_one_sooner() {
    let ((_a, agent), (_b, upstream)) = (tokio::io::duplex(16), tokio::io::duplex(16));
    assert!(matches!(relay(agent, upstream, (&Traffic::default(), SILENCE), || Ok(())).await, End::Idle));
    let ((_a, agent), (_b, upstream)) = (tokio::io::duplex(16), tokio::io::duplex(16));
    let started = Instant::now();
    let still = || Err(Refused::denied(Rule::IdentityToken, "gone"));
    assert!(matches!(relay(agent, upstream, (&Traffic::default(), SILENCE), still).await, End::Cut(_)));
    assert!(started.elapsed() <= RECHECK * 2);
}

#[tokio::test]
async fn both_ways_are_counted_and_half_closes_are_kept() {
    let ((mut a, agent), (mut b, upstream)) = (tokio::io::duplex(64), tokio::io::duplex(64));
    let traffic = std::sync::Arc::new(Traffic::default());
    let counted = traffic.clone();
    let relayed = tokio::spawn(async move {
        matches!(relay(agent, upstream, (&counted, SILENCE), || Ok(())).await, End::Over(Ok(())))
    });
    a.write_all(b"ask").await.unwrap();
    a.shutdown().await.unwrap();
    let mut asked = String::new();
    b.read_to_string(&mut asked).await.unwrap();
    b.write_all(b"answer").await.unwrap();
    b.shutdown().await.unwrap();
    let mut answered = String::new();
    a.read_to_string(&mut answered).await.unwrap();
    assert_eq!((asked.as_str(), answered.as_str()), ("ask", "answer"));
    assert!(relayed.await.unwrap());
    assert_eq!((traffic.sent.load(Ordering::Relaxed), traffic.received.load(Ordering::Relaxed)), (3, 6));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), flip in 0_usize..300, with: u8) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _ = runtime.block_on(opened(&bytes, 443));
        let mut changed = hello("docs.world.test");
        let index = flip % changed.len();
        changed[index] ^= with;
        let _ = runtime.block_on(opened(&changed, 443));
    }
}
