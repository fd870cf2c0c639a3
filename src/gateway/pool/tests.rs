//! A raw upstream that counts connections and requests, reached by the gateway's own dialling and forwarding.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::atomic::{AtomicUsize, Ordering},
};

use futures::future::BoxFuture;
use http::{Method, Request};
use http_body_util::BodyExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::*;
use crate::{
    gateway::{
        authorize::Target,
        body::full,
        dial::{Connect, Dialer, roots},
        forward::{Manner, forward},
        refusal::Refused,
        resolve::Resolve,
    },
    policy::{egress::Blocked, rule::Rule},
};

const MANNER: Manner = Manner { silence: Duration::from_secs(300), unpacks: true };
const A: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 20));
const B: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 21));
const PRIVATE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 5));

/// The upstream's handling of a request.
#[derive(Clone, Copy)]
enum Reply {
    Keep,
    /// Announces a timeout of one second.
    Briefly,
    Challenge,
    /// Closes the connection after the reply, without announcing it.
    Leave,
    /// Closes the connection without a reply.
    Vanish,
    /// Announces a longer body than it sends.
    BreakOff,
}

struct Upstream {
    address: SocketAddr,
    replies: Mutex<Vec<Reply>>,
    connections: AtomicUsize,
    requests: AtomicUsize,
}

impl Upstream {
    /// Replies with these in turn, and then keeps the connection.
    async fn start(replies: &[Reply]) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = Arc::new(Self {
            address: listener.local_addr().unwrap(),
            replies: Mutex::new(replies.iter().rev().copied().collect()),
            connections: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
        });
        let serving = upstream.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                serving.connections.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(serving.clone().serve(stream));
            }
        });
        upstream
    }

    async fn serve(self: Arc<Self>, mut stream: TcpStream) {
        let mut read = Vec::new();
        loop {
            // Requests in these tests have the body `x` or none.
            while !read.windows(4).any(|w| w == b"\r\n\r\n") || (read.starts_with(b"POST") && !read.ends_with(b"x")) {
                match stream.read_buf(&mut read).await {
                    Ok(0) | Err(_) => return,
                    Ok(_) => {}
                }
            }
            read.clear();
            self.requests.fetch_add(1, Ordering::SeqCst);
            let reply = self.replies.lock().pop().unwrap_or(Reply::Keep);
            let (more, body, goes_on) = match reply {
                Reply::Keep => ("", "ok", true),
                Reply::Briefly => ("keep-alive: timeout=1\r\n", "ok", true),
                Reply::Challenge => ("www-authenticate: NTLM\r\n", "ok", true),
                Reply::Leave => ("", "ok", false),
                Reply::Vanish => return,
                Reply::BreakOff => ("", "o", false),
            };
            let text = format!("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n{more}\r\n{body}");
            if stream.write_all(text.as_bytes()).await.is_err() || !goes_on {
                return;
            }
        }
    }

    fn seen(&self) -> (usize, usize) {
        (self.connections.load(Ordering::SeqCst), self.requests.load(Ordering::SeqCst))
    }
}

struct Names(Mutex<Vec<IpAddr>>);

impl Resolve for Names {
    fn addresses<'a>(&'a self, _: &'a Hostname) -> BoxFuture<'a, Result<Vec<IpAddr>, String>> {
        let answer = self.0.lock().clone();
        Box::pin(async move { Ok(answer) })
    }
}

impl Connect for Upstream {
    fn connect(&self, _: SocketAddr) -> BoxFuture<'_, std::io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(self.address))
    }
}

struct Way {
    dialer: Dialer,
    names: Arc<Names>,
    pool: Arc<Pool>,
    upstream: Arc<Upstream>,
}

impl Way {
    async fn to(replies: &[Reply]) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let upstream = Upstream::start(replies).await;
        let names = Arc::new(Names(Mutex::new(vec![A])));
        let dialer = Dialer::new(names.clone(), Blocked::default(), upstream.clone(), roots(None).unwrap());
        Self { dialer, names, pool: Arc::default(), upstream }
    }

    /// Sends one request, reads its reply to the end, and waits a moment for the connection to return to the pool.
    async fn send(&self, method: Method, url: &str, body: &'static str) -> Result<String, Refused> {
        let request = Request::builder().method(method).body(full(body)).unwrap();
        let target = Target::parse(url).unwrap();
        let reply = forward(&self.dialer, Some(&self.pool), &target, None, request, (MANNER, ())).await?;
        let body = reply.into_body().collect().await.map_err(|e| Refused::malformed(e.to_string()))?.to_bytes();
        tokio::time::sleep(Duration::from_millis(30)).await;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    async fn post(&self) -> Result<String, Refused> {
        self.send(Method::POST, "http://a.test/", "x").await
    }
}

#[tokio::test]
async fn a_connection_is_used_again() {
    let way = Way::to(&[]).await;
    for _ in 0..3 {
        assert_eq!(way.post().await.unwrap(), "ok");
        assert_eq!(way.send(Method::GET, "http://a.test/x", "").await.unwrap(), "ok");
    }
    assert_eq!(way.upstream.seen(), (1, 6));
}

#[tokio::test]
async fn what_is_sent_at_once_goes_over_connections_of_its_own_which_all_wait() {
    let way = Way::to(&[]).await;
    for _ in 0..2 {
        let replies = futures::future::join_all((0..3).map(|_| way.post())).await;
        assert!(replies.iter().all(|reply| reply.as_ref().is_ok_and(|text| text == "ok")));
    }
    assert_eq!(way.upstream.seen(), (3, 6));
}

#[tokio::test]
async fn after_an_error_a_challenge_or_an_end_another_is_opened() {
    for (reply, fails) in
        [(Reply::Leave, false), (Reply::Challenge, false), (Reply::Briefly, false), (Reply::BreakOff, true)]
    {
        let way = Way::to(&[reply]).await;
        assert_eq!(way.post().await.is_err(), fails);
        assert_eq!(way.post().await.unwrap(), "ok");
        assert_eq!(way.upstream.seen(), (2, 2));
    }
}

#[tokio::test]
async fn a_request_that_was_written_is_never_written_again() {
    let way = Way::to(&[Reply::Keep, Reply::Vanish]).await;
    assert_eq!(way.post().await.unwrap(), "ok");
    assert_eq!(way.post().await.unwrap_err().rule, Rule::UpstreamReply);
    assert_eq!(way.upstream.seen(), (1, 2), "the second request came once");
    assert_eq!(way.post().await.unwrap(), "ok");
    assert_eq!(way.upstream.seen(), (2, 3));
}

#[tokio::test]
async fn a_reply_that_nobody_reads_to_its_end_ends_its_connection() {
    let way = Way::to(&[]).await;
    let request = Request::post("/").body(full("x")).unwrap();
    let target = Target::parse("http://a.test/").unwrap();
    drop(forward(&way.dialer, Some(&way.pool), &target, None, request, (MANNER, ())).await.unwrap());
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert_eq!(way.post().await.unwrap(), "ok");
    assert_eq!(way.upstream.seen().0, 2);
}

#[tokio::test]
async fn a25_the_resolvers_answer_of_now_decides() {
    let way = Way::to(&[]).await;
    way.post().await.unwrap();
    *way.names.0.lock() = vec![A, PRIVATE];
    assert_eq!(way.post().await.unwrap_err().rule, Rule::EgressAddress);
    *way.names.0.lock() = vec![B];
    way.post().await.unwrap();
    assert_eq!(way.upstream.seen(), (2, 2), "the connection to an address that the name has no more is not used");
    *way.names.0.lock() = vec![B, A];
    way.post().await.unwrap();
    assert_eq!(way.upstream.seen(), (2, 3));
}

#[tokio::test]
async fn another_name_port_or_scheme_is_another_connection() {
    let way = Way::to(&[]).await;
    way.post().await.unwrap();
    way.send(Method::POST, "http://b.test/", "x").await.unwrap();
    way.send(Method::POST, "http://a.test:81/", "x").await.unwrap();
    assert_eq!(way.upstream.seen(), (3, 3));
    // The upstream has no TLS. Over the idle plain connection it would have replied.
    assert_eq!(way.send(Method::POST, "https://a.test:80/", "x").await.unwrap_err().rule, Rule::UpstreamTls);
}

#[tokio::test]
async fn a_body_that_servers_may_overlook_goes_over_a_connection_of_its_own() {
    let way = Way::to(&[]).await;
    way.post().await.unwrap();
    way.send(Method::GET, "http://a.test/", "x").await.unwrap();
    assert_eq!(way.upstream.seen().0, 2);
    way.post().await.unwrap();
    assert_eq!(way.upstream.seen().0, 2, "the first still waits, and the second does not");
}

#[tokio::test]
async fn connections_wait_for_seconds() {
    let way = Way::to(&[]).await;
    way.post().await.unwrap();
    assert!(way.pool.take(&[SocketAddr::new(A, 80)], &Hostname::parse("a.test").unwrap(), false).is_some());
    assert!(
        way.pool.take(&[SocketAddr::new(A, 80)], &Hostname::parse("a.test").unwrap(), false).is_none(),
        "given out once"
    );
    way.post().await.unwrap();
    {
        let mut waiting = way.pool.0.lock();
        waiting.values_mut().flatten().for_each(|one| one.until = Instant::now());
    }
    way.post().await.unwrap();
    assert_eq!(way.upstream.seen().0, 3);
}
