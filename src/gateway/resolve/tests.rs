use hickory_resolver::proto::{
    op::{Message, MessageType, ResponseCode},
    rr::{RData, Record, RecordType},
};
use tokio::net::UdpSocket;

use super::*;

/// A name server that knows `known.test` and records its queries.
async fn server() -> (SocketAddr, std::sync::Arc<std::sync::Mutex<Vec<String>>>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let asked = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let log = asked.clone();
    tokio::spawn(async move {
        let mut buffer = [0; 1500];
        loop {
            let (read, peer) = socket.recv_from(&mut buffer).await.unwrap();
            let mut message = Message::from_vec(&buffer[..read]).unwrap();
            let query = message.queries[0].clone();
            let name = query.name().to_lowercase().to_string();
            log.lock().unwrap().push(format!("{name} {}", query.query_type()));
            message.metadata.message_type = MessageType::Response;
            match (name.as_str(), query.query_type()) {
                ("known.test.", RecordType::A) => {
                    let data = RData::A("198.51.100.20".parse().unwrap());
                    message.answers.push(Record::from_rdata(query.name().clone(), 60, data));
                }
                ("known.test.", _) => {}
                _ => message.metadata.response_code = ResponseCode::NXDomain,
            }
            socket.send_to(&message.to_vec().unwrap(), peer).await.unwrap();
        }
    });
    (address, asked)
}

#[tokio::test]
async fn asks_for_exactly_the_name_and_remembers_the_answer() {
    let (address, asked) = server().await;
    let dns = Dns::new(&[address]).unwrap();
    let known = Hostname::parse("known.test").unwrap();
    let expected: Vec<IpAddr> = vec!["198.51.100.20".parse().unwrap()];
    assert_eq!(dns.addresses(&known).await.unwrap(), expected);
    assert_eq!(dns.addresses(&known).await.unwrap(), expected);
    assert!(dns.addresses(&Hostname::parse("other.test").unwrap()).await.is_err());
    // No search domain is tried, and `/etc/hosts` is not used.
    assert!(dns.addresses(&Hostname::parse("single").unwrap()).await.is_err());
    let asked = asked.lock().unwrap();
    let names = ["known.test.", "other.test.", "single."];
    assert!(asked.iter().all(|query| names.iter().any(|name| query.starts_with(name))), "{asked:?}");
    assert_eq!(asked.iter().filter(|query| *query == "known.test. A").count(), 1, "{asked:?}");
    assert!(asked.iter().any(|query| query == "known.test. AAAA"), "{asked:?}");
}

/// The answer of a server to a query.
type Answer = fn(&Name, RecordType, &mut Message);

/// Starts a name server that answers with `answer` over UDP, and over TCP if it marks an answer as truncated.
async fn answering(answer: Answer) -> SocketAddr {
    let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(address).await.unwrap();
    let reply = move |question: &[u8]| {
        let mut message = Message::from_vec(question).unwrap();
        let query = message.queries[0].clone();
        message.metadata.message_type = MessageType::Response;
        answer(query.name(), query.query_type(), &mut message);
        message
    };
    tokio::spawn(async move {
        let mut buffer = [0; 1500];
        while let Ok((read, peer)) = udp.recv_from(&mut buffer).await {
            udp.send_to(&reply(&buffer[..read]).to_vec().unwrap(), peer).await.unwrap();
        }
    });
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        while let Ok((mut stream, _)) = tcp.accept().await {
            while let Ok(length) = stream.read_u16().await {
                let mut question = vec![0; length.into()];
                stream.read_exact(&mut question).await.unwrap();
                let mut message = reply(&question);
                // Over TCP the answer is complete.
                message.metadata.truncation = false;
                let message = message.to_vec().unwrap();
                let framed = [&u16::try_from(message.len()).unwrap().to_be_bytes()[..], &message].concat();
                if stream.write_all(&framed).await.is_err() {
                    break;
                }
            }
        }
    });
    address
}

const OWN: &str = "198.51.100.20";
const FOREIGN: &str = "203.0.113.9";

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn address(owner: &Name, address: &str) -> Record {
    let data = match address.parse().unwrap() {
        IpAddr::V4(four) => RData::A(four.into()),
        IpAddr::V6(six) => RData::AAAA(six.into()),
    };
    Record::from_rdata(owner.clone(), 60, data)
}

fn alias(owner: &Name, of: &str) -> Record {
    let of = hickory_resolver::proto::rr::rdata::CNAME(name(of));
    Record::from_rdata(owner.clone(), 60, RData::CNAME(of))
}

/// Adds this number of aliases after the first name, `n0.test`, `n1.test`, …, and then the address.
fn chain(first: &Name, aliases: usize, message: &mut Message) {
    let mut owner = first.clone();
    for step in 0..aliases {
        let next = format!("n{step}.test.");
        message.answers.push(alias(&owner, &next));
        owner = name(&next);
    }
    message.answers.push(address(&owner, OWN));
}

/// The expected addresses.
type Expected = Result<&'static [&'static str], ()>;

const CASES: &[(&str, Answer, Expected)] = &[
    (
        "control its own",
        |n, t, m| {
            if t == RecordType::A {
                m.answers.push(address(n, OWN))
            }
        },
        Ok(&[OWN]),
    ),
    (
        "control sixes",
        |n, t, m| {
            if t == RecordType::AAAA {
                m.answers.push(address(n, "2001:db8::1"))
            }
        },
        Ok(&["2001:db8::1"]),
    ),
    (
        "control by an alias",
        |n, t, m| {
            if t == RecordType::A {
                chain(n, 1, m)
            }
        },
        Ok(&[OWN]),
    ),
    (
        "control by aliases asked for one by one",
        |n, t, m| match n.to_lowercase().to_string().as_str() {
            "poison.test." => m.answers.push(alias(n, "n0.test.")),
            "n0.test." => m.answers.push(alias(n, "n1.test.")),
            _ if t == RecordType::A => m.answers.push(address(n, OWN)),
            _ => {}
        },
        Ok(&[OWN]),
    ),
    (
        "asked for one by one, with an address of another",
        |n, t, m| match n.to_lowercase().to_string().as_str() {
            "poison.test." => m.answers.push(alias(n, "n0.test.")),
            _ if t == RecordType::A => m.answers.extend([address(&name("shop.test."), FOREIGN), address(n, OWN)]),
            _ => {}
        },
        Ok(&[OWN]),
    ),
    (
        "asked for one by one, in a circle",
        |n, _, m| match n.to_lowercase().to_string().as_str() {
            "poison.test." => m.answers.push(alias(n, "n0.test.")),
            _ => m.answers.push(alias(n, "poison.test.")),
        },
        Err(()),
    ),
    (
        "control in capitals",
        |n, t, m| {
            if t == RecordType::A {
                m.answers.push(address(&name(&n.to_string().to_uppercase()), OWN))
            }
        },
        Ok(&[OWN]),
    ),
    (
        "control cut short and asked again",
        |n, t, m| {
            m.metadata.truncation = true;
            if t == RecordType::A {
                m.answers.push(address(n, OWN))
            }
        },
        Ok(&[OWN]),
    ),
    (
        "of another name",
        |_, t, m| {
            if t == RecordType::A {
                m.answers.push(address(&name("shop.test."), FOREIGN))
            }
        },
        Err(()),
    ),
    (
        "of another name beside its own",
        |n, t, m| {
            if t == RecordType::A {
                m.answers.extend([address(&name("shop.test."), FOREIGN), address(n, OWN)])
            }
        },
        Ok(&[OWN]),
    ),
    (
        "sixes of another name",
        |n, t, m| {
            m.answers.push(if t == RecordType::A {
                address(n, OWN)
            } else {
                address(&name("shop.test."), "2001:db8::9")
            })
        },
        Ok(&[OWN]),
    ),
    (
        "sixes in an answer about fours",
        |n, t, m| {
            if t == RecordType::A {
                m.answers.extend([address(n, OWN), address(&name("x.test."), "2001:db8::9")])
            }
        },
        Ok(&[OWN]),
    ),
    (
        "of a name above",
        |n, t, m| {
            if t == RecordType::A {
                m.answers.push(address(&n.base_name(), FOREIGN))
            }
        },
        Err(()),
    ),
    (
        "of a name below",
        |n, t, m| {
            if t == RecordType::A {
                m.answers.push(address(&n.prepend_label("www").unwrap(), FOREIGN))
            }
        },
        Err(()),
    ),
    (
        "of the wildcard itself",
        |_, t, m| {
            if t == RecordType::A {
                m.answers.push(address(&name("*.test."), FOREIGN))
            }
        },
        Err(()),
    ),
    (
        "of an alias of another name",
        |n, t, m| {
            if t == RecordType::A {
                m.answers.extend([
                    alias(&name("shop.test."), "far.test."),
                    address(&name("far.test."), FOREIGN),
                    address(n, OWN),
                ]);
            }
        },
        Ok(&[OWN]),
    ),
    (
        "beside the alias it does not follow",
        |n, t, m| {
            if t == RecordType::A {
                chain(n, 2, m);
                m.answers.push(address(&name("n9.test."), FOREIGN));
            }
        },
        Ok(&[OWN]),
    ),
    (
        "an alias and an address",
        |n, t, m| {
            if t == RecordType::A {
                chain(n, 1, m);
                m.answers.push(address(n, FOREIGN))
            }
        },
        Err(()),
    ),
    (
        "two aliases",
        |n, t, m| {
            if t == RecordType::A {
                chain(n, 1, m);
                m.answers.push(alias(n, "far.test."))
            }
        },
        Err(()),
    ),
    (
        "a circle",
        |n, t, m| {
            if t == RecordType::A {
                m.answers.extend([
                    alias(n, "far.test."),
                    alias(&name("far.test."), "poison.test."),
                    address(&name("x.test."), FOREIGN),
                ]);
            }
        },
        Err(()),
    ),
    (
        "an alias of itself",
        |n, t, m| {
            if t == RecordType::A {
                m.answers.extend([alias(n, "poison.test."), address(n, FOREIGN)])
            }
        },
        Err(()),
    ),
    (
        "too many aliases",
        |n, t, m| {
            if t == RecordType::A {
                chain(n, 40, m)
            }
        },
        Err(()),
    ),
    (
        "confused in one answer of two",
        |n, t, m| {
            if t == RecordType::A {
                m.answers.push(address(n, OWN))
            } else {
                m.answers.extend([
                    alias(n, "far.test."),
                    address(n, "2001:db8::9"),
                    address(&name("far.test."), "2001:db8::9"),
                ]);
            }
        },
        Err(()),
    ),
    (
        "no such name with an address",
        |n, t, m| {
            m.metadata.response_code = ResponseCode::NXDomain;
            if t == RecordType::A {
                m.answers.push(address(n, FOREIGN))
            }
        },
        Err(()),
    ),
    (
        "a failure with an address",
        |n, t, m| {
            m.metadata.response_code = ResponseCode::ServFail;
            if t == RecordType::A {
                m.answers.push(address(n, FOREIGN))
            }
        },
        Err(()),
    ),
    (
        "a refusal with an address",
        |n, t, m| {
            m.metadata.response_code = ResponseCode::Refused;
            if t == RecordType::A {
                m.answers.push(address(n, FOREIGN))
            }
        },
        Err(()),
    ),
    (
        "beside the answer",
        |n, t, m| {
            if t == RecordType::A {
                m.additionals.push(address(&name("shop.test."), FOREIGN));
                m.answers.push(address(n, OWN))
            }
        },
        Ok(&[OWN]),
    ),
    (
        "only beside the answer",
        |_, t, m| {
            if t == RecordType::A {
                m.additionals.push(address(&name("shop.test."), FOREIGN))
            }
        },
        Err(()),
    ),
    (
        "as a name server",
        |n, t, m| {
            if t == RecordType::A {
                let server = hickory_resolver::proto::rr::rdata::NS(name("ns.test."));
                m.authorities.push(Record::from_rdata(n.clone(), 60, RData::NS(server)));
                m.additionals.push(address(&name("ns.test."), FOREIGN));
            }
        },
        Err(()),
    ),
    (
        "of another class",
        |n, t, m| {
            if t == RecordType::A {
                let mut chaos = address(n, FOREIGN);
                chaos.dns_class = DNSClass::CH;
                m.answers.extend([chaos, address(n, OWN)]);
            }
        },
        Err(()),
    ),
];

#[tokio::test]
async fn an_address_counts_only_for_its_owner() {
    for (case, answer, expected) in CASES {
        let dns = Dns::new(&[answering(*answer).await]).unwrap();
        let expected = expected.map(|all| all.iter().map(|one| one.parse().unwrap()).collect::<Vec<IpAddr>>());
        // Query twice, because the cached answer must be the same.
        for _ in 0..2 {
            let found = dns.addresses(&Hostname::parse("poison.test").unwrap()).await;
            assert_eq!(found.clone().map_err(|_| ()), expected, "{case}: {found:?}");
        }
    }
}

/// An answer to another query is ignored. The right answer, which comes after it, counts.
#[tokio::test]
async fn an_answer_to_another_question_is_none() {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let server = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 1500];
        while let Ok((read, peer)) = socket.recv_from(&mut buffer).await {
            let question = Message::from_vec(&buffer[..read]).unwrap();
            let query = question.queries[0].clone();
            let answer = |about: &Name, to: &str, id: u16| {
                let mut message = question.clone();
                message.metadata.message_type = MessageType::Response;
                message.metadata.id = id;
                message.queries[0].set_name(about.clone());
                if query.query_type() == RecordType::A {
                    message.answers.push(address(about, to));
                }
                message.to_vec().unwrap()
            };
            let id = question.metadata.id;
            for forged in [
                answer(&name("shop.test."), FOREIGN, id),
                answer(query.name(), FOREIGN, id.wrapping_add(1)),
                answer(&query.name().to_lowercase(), FOREIGN, id),
            ] {
                socket.send_to(&forged, peer).await.unwrap();
            }
            socket.send_to(&answer(query.name(), OWN, id), peer).await.unwrap();
        }
    });
    let dns = Dns::new(&[server]).unwrap();
    // Long enough that case randomization does not leave all letters small by chance.
    let asked = Hostname::parse("a-name-of-many-letters-to-be-told-apart.test").unwrap();
    let found = dns.addresses(&asked).await;
    assert!(found.as_ref().map_or(true, |found| *found == [OWN.parse::<IpAddr>().unwrap()]), "{found:?}");
}

/// Errors of name servers are reported as plain text, and not in the debug format of the resolver.
#[tokio::test]
async fn why_there_is_no_answer_is_said_in_words() {
    let (address, _) = server().await;
    let none = Dns::new(&[address]).unwrap().addresses(&Hostname::parse("other.test").unwrap()).await.unwrap_err();
    assert_eq!(none, "there is no such name, as its name server says");
    let nothing = answering(|_, _, _| {}).await;
    let none = Dns::new(&[nothing]).unwrap().addresses(&Hostname::parse("other.test").unwrap()).await.unwrap_err();
    assert_eq!(none, "the name server has no address for it");
    let io = NetError::from(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
    for (error, words) in [
        (NetError::Timeout, "in time"),
        (NetError::NoConnections, "no name server can be reached"),
        (io, "no name server can be reached"),
        (NetError::Busy, "busy"),
    ] {
        let said = unanswered(&error);
        assert!(said.contains(words) && !said.contains('{'), "{said}");
    }
}
