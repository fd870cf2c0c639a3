use hickory_resolver::proto::{
    op::{Message, MessageType, ResponseCode},
    rr::{RData, Record, RecordType},
};
use tokio::net::UdpSocket;

use super::*;

/// A name server that knows `known.test`, and counts.
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
    // No search domain is tried, and `/etc/hosts` has nothing to say.
    assert!(dns.addresses(&Hostname::parse("single").unwrap()).await.is_err());
    let asked = asked.lock().unwrap();
    let names = ["known.test.", "other.test.", "single."];
    assert!(asked.iter().all(|query| names.iter().any(|name| query.starts_with(name))), "{asked:?}");
    assert_eq!(asked.iter().filter(|query| *query == "known.test. A").count(), 1, "{asked:?}");
    assert!(asked.iter().any(|query| query == "known.test. AAAA"), "{asked:?}");
}
