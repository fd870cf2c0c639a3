use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Mutex,
};

use super::*;

/// Returns these answers in turn, and then the last one again.
struct Answers(Mutex<Vec<Result<Vec<IpAddr>, String>>>);

impl Resolve for Answers {
    fn addresses<'a>(&'a self, _: &'a Hostname) -> BoxFuture<'a, Result<Vec<IpAddr>, String>> {
        let mut answers = self.0.lock().unwrap();
        let answer = if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() };
        Box::pin(async move { answer })
    }
}

/// Records the addresses that it was asked to connect to, and connects to a local listener for all of them.
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

/// A cluster that has one node, or that does not answer.
struct OneNode(bool);

impl Own for OneNode {
    fn describe<'a>(&'a self, addresses: &'a [IpAddr]) -> BoxFuture<'a, Result<Vec<Option<&'static str>>, String>> {
        let node: IpAddr = "10.0.0.1".parse().unwrap();
        let described = addresses.iter().map(|address| (*address == node).then_some("a node of the cluster")).collect();
        Box::pin(async move { if self.0 { Ok(described) } else { Err("503".to_owned()) } })
    }
}

#[tokio::test]
async fn a_private_address_is_dialled_only_for_the_host_that_it_is_opened_to() {
    let opened = |range: &str, answers: bool| Opened {
        entries: vec![format!("a.test={range}").parse().unwrap()],
        own: Arc::new(OneNode(answers)),
    };
    let node: IpAddr = "10.0.0.1".parse().unwrap();
    for (what, range, answer, answers, expected) in [
        ("opened", "10.0.0.0/24", vec![PRIVATE], true, None),
        ("public, as before", "10.0.0.0/24", vec![A], true, None),
        ("another range", "10.0.1.0/24", vec![PRIVATE], true, Some((Rule::EgressAddress, "gateway.privateUpstreams"))),
        ("a public address beside it", "10.0.0.0/24", vec![PRIVATE, A], true, Some((Rule::EgressAddress, "or none"))),
        ("a node", "10.0.0.0/24", vec![node], true, Some((Rule::EgressAddress, "a node of the cluster"))),
        ("a node beside it", "10.0.0.0/24", vec![PRIVATE, node], true, Some((Rule::EgressAddress, "a node"))),
        ("nothing is known", "10.0.0.0/24", vec![PRIVATE], false, Some((Rule::UpstreamResolve, "503"))),
    ] {
        let (dialer, recorder) = dialer(vec![Ok(answer.clone())], vec![]).await;
        let dialled = dialer.opening(opened(range, answers)).dial(&to()).await;
        match (dialled, expected) {
            (Ok((_, address)), None) => assert_eq!(address.ip(), answer[0], "{what}"),
            (Err(refused), Some((rule, words))) => {
                assert!(refused.rule == rule && refused.reason.contains(words), "{what}: {refused:?}");
                assert!(recorder.asked.lock().unwrap().is_empty(), "{what}");
            }
            (dialled, _) => panic!("{what}: {dialled:?}"),
        }
    }
    // Another host with the same address.
    let (dialer, _) = dialer(vec![Ok(vec![PRIVATE])], vec![]).await;
    let other = Authority::parse("b.test:443", None).unwrap();
    let refused = dialer.opening(opened("10.0.0.0/24", true)).dial(&other).await.unwrap_err();
    assert_eq!(refused.rule, Rule::EgressAddress);
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
    // The listener's backlog accepts the connection, but no TLS handshake follows, because the connection is dropped at once.
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

/// On a laptop the error says how to set an address for the name. In a cluster it does not, because its reader cannot do so.
#[tokio::test]
async fn a_name_that_leads_nowhere_is_mended_by_hand_where_it_can_be() {
    for (answer, words) in [
        (
            Err("there is no such name".to_owned()),
            ["cannot resolve a.test", "--resolve a.test=ADDRESS", "--upstream a.test="],
        ),
        (Ok(vec![]), ["no addresses", "--resolve a.test=ADDRESS", "--upstream a.test="]),
        (Ok(vec![A, PRIVATE]), ["which is private", "--resolve a.test=10.0.0.5", "--upstream"]),
        (Ok(vec!["127.0.0.1".parse().unwrap()]), ["which is loopback", "--resolve a.test=127.0.0.1", "--upstream"]),
        (Ok(vec!["::1".parse().unwrap()]), ["which is loopback", "--resolve a.test=::1", "--upstream"]),
    ] {
        let (dialer_, _) = dialer(vec![answer.clone()], vec![]).await;
        let said = dialer_.dial(&to()).await.unwrap_err().reason;
        assert!(said.contains(words[0]) && !said.contains("--resolve"), "{said}");
        let (dialer_, _) = dialer(vec![answer], vec![]).await;
        let said = dialer_.vouching(HashMap::new()).dial(&to()).await.unwrap_err().reason;
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    }
}

/// Data stays on the machine only for a loopback address that was set by hand, and never because of a name server's answer.
#[tokio::test]
async fn what_stays_on_this_machine_is_vouched_for() {
    let (dialer_, _) = dialer(vec![Ok(vec!["127.0.0.1".parse().unwrap()])], vec![]).await;
    assert!(!dialer_.stays_here(&to().host));
    for (address, stays) in [
        ("127.0.0.1:8000", true),
        ("127.9.9.9:0", true),
        ("[::1]:8000", true),
        ("192.168.1.5:8000", false),
        ("0.0.0.0:8000", false),
        ("198.51.100.20:8000", false),
        ("[::ffff:10.0.0.1]:8000", false),
    ] {
        let (dialer_, _) = dialer(vec![Ok(vec![A])], vec![]).await;
        let dialer_ = dialer_.vouching([(to().host, address.parse().unwrap())].into());
        assert_eq!(dialer_.stays_here(&to().host), stays, "{address}");
        assert!(!dialer_.stays_here(&"b.test".parse().unwrap()));
    }
}

/// The error says so if a server answers in plain text or closes the connection where TLS was expected.
#[tokio::test]
async fn a_server_without_tls_is_said_to_be_one() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    for (answer, words) in [
        ("HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n", "another protocol, as a server of plain http"),
        ("<html>Bad request version</html>", "another protocol, as a server of plain http"),
        ("SSH-2.0-OpenSSH_9.2\r\n", "another protocol"),
        ("", "ended the connection before TLS began"),
    ] {
        let (dialer_, recorder) = dialer(vec![Ok(vec![A])], vec![]).await;
        let (stream, _) = dialer_.dial(&to()).await.unwrap();
        let (mut server, _) = recorder.listener.accept().await.unwrap();
        let serving = tokio::spawn(async move {
            let _ = server.read(&mut [0; 4096]).await;
            let _ = server.write_all(answer.as_bytes()).await;
            let _ = server.shutdown().await;
        });
        let refused = dialer_.secure(&to().host, stream).await.unwrap_err();
        assert!(refused.reason.contains(words) && refused.reason.contains("http://"), "{}", refused.reason);
        serving.await.unwrap();
    }
}
