use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Mutex,
};

use super::*;

/// Answers in turn; the last one for ever.
struct Answers(Mutex<Vec<Result<Vec<IpAddr>, String>>>);

impl Resolve for Answers {
    fn addresses<'a>(&'a self, _: &'a Hostname) -> BoxFuture<'a, Result<Vec<IpAddr>, String>> {
        let mut answers = self.0.lock().unwrap();
        let answer = if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() };
        Box::pin(async move { answer })
    }
}

/// Remembers what it was asked to connect to; a listener on loopback stands for the whole internet.
struct Recorder {
    asked: Mutex<Vec<SocketAddr>>,
    listener: tokio::net::TcpListener,
    refuse: Vec<IpAddr>,
}

impl Connect for Recorder {
    fn connect(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>> {
        self.asked.lock().unwrap().push(address);
        Box::pin(async move {
            if self.refuse.contains(&address.ip()) {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            TcpStream::connect(self.listener.local_addr()?).await
        })
    }
}

const A: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 20));
const B: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 21));
const PRIVATE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 5));

async fn dialer(answers: Vec<Result<Vec<IpAddr>, String>>, refuse: Vec<IpAddr>) -> (Dialer, Arc<Recorder>) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let recorder = Arc::new(Recorder { asked: Mutex::default(), listener, refuse });
    let resolve = Arc::new(Answers(Mutex::new(answers)));
    (Dialer::new(resolve, Blocked::default(), recorder.clone(), roots(None).unwrap()), recorder)
}

fn to() -> Authority {
    Authority::parse("a.test:443", None).unwrap()
}

#[tokio::test]
async fn dials_an_address_that_it_checked() {
    let (dialer, recorder) = dialer(vec![Ok(vec![A, B])], vec![A]).await;
    let (stream, address) = dialer.dial(&to()).await.unwrap();
    assert_eq!(address, SocketAddr::new(B, 443));
    assert!(rustix::net::sockopt::socket_keepalive(&stream).unwrap(), "whatever is between forgets it");
    assert_eq!(*recorder.asked.lock().unwrap(), [SocketAddr::new(A, 443), SocketAddr::new(B, 443)]);
}

#[tokio::test]
async fn a24_a26_a_blocked_answer_is_never_dialled_nor_its_neighbours() {
    for answer in [vec![PRIVATE], vec![A, PRIVATE], vec![PRIVATE, A], vec!["::1".parse().unwrap(), A]] {
        let (dialer, recorder) = dialer(vec![Ok(answer)], vec![]).await;
        assert_eq!(dialer.dial(&to()).await.unwrap_err().rule, Rule::EgressAddress);
        assert!(recorder.asked.lock().unwrap().is_empty());
    }
}

#[tokio::test]
async fn a25_each_answer_is_checked_anew() {
    let (dialer, recorder) = dialer(vec![Ok(vec![A]), Ok(vec![PRIVATE])], vec![]).await;
    dialer.dial(&to()).await.unwrap();
    assert_eq!(dialer.dial(&to()).await.unwrap_err().rule, Rule::EgressAddress);
    assert_eq!(*recorder.asked.lock().unwrap(), [SocketAddr::new(A, 443)]);
}

#[tokio::test]
async fn failures_have_their_rules() {
    let (dialer_, _) = dialer(vec![Err("NXDOMAIN".into())], vec![]).await;
    assert_eq!(dialer_.dial(&to()).await.unwrap_err().rule, Rule::UpstreamResolve);
    let (dialer_, _) = dialer(vec![Ok(vec![])], vec![]).await;
    assert_eq!(dialer_.dial(&to()).await.unwrap_err().rule, Rule::UpstreamResolve);
    let (dialer_, _) = dialer(vec![Ok(vec![A])], vec![A]).await;
    assert_eq!(dialer_.dial(&to()).await.unwrap_err().rule, Rule::UpstreamConnect);
    // The listener's backlog takes the connection, and nobody shakes hands: dropped at once.
    let (dialer_, recorder) = dialer(vec![Ok(vec![A])], vec![]).await;
    let (stream, _) = dialer_.dial(&to()).await.unwrap();
    drop(recorder.listener.accept().await.unwrap());
    let refused = dialer_.secure(&to().host, stream).await.unwrap_err();
    assert_eq!(refused.rule, Rule::UpstreamTls);
}

#[test]
fn authorities_must_be_certificates() {
    assert!(roots(Some(b"nothing")).is_err());
    assert!(!roots(None).unwrap().is_empty());
}
