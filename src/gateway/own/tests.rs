use std::sync::atomic::{AtomicUsize, Ordering};

use http::{Request, Response};
use kube::client::Body;
use serde_json::json;

use super::*;

/// An API server with two nodes and two API servers. Returns the number of requests as well. With `broken`, it answers nothing.
fn server(broken: bool) -> (Client, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        counted.fetch_add(1, Ordering::SeqCst);
        let answer = match request.uri().path() {
            "/api/v1/nodes" => json!({
                "kind": "NodeList", "apiVersion": "v1", "metadata": {},
                "items": [
                    {"metadata": {"name": "a"}, "status": {"addresses": [
                        {"type": "Hostname", "address": "a"}, {"type": "InternalIP", "address": "10.1.0.1"},
                        {"type": "InternalIP", "address": "fd00::a"}, {"type": "ExternalIP", "address": "198.51.100.1"},
                    ]}},
                    {"metadata": {"name": "b"}},
                ],
            }),
            "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes" => json!({
                "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "metadata": {"name": "kubernetes"},
                "addressType": "IPv4", "endpoints": [{"addresses": ["10.2.0.1"]}, {"addresses": ["10.2.0.2"]}],
            }),
            other => panic!("{other}"),
        };
        async move {
            if broken {
                return Err(std::io::Error::other("connection reset"));
            }
            Ok(Response::new(Body::from(answer.to_string().into_bytes())))
        }
    });
    (Client::new(service, "belay-system"), asked)
}

fn own(client: Client) -> OwnAddresses {
    let agent: IpAddr = "10.3.0.9".parse().unwrap();
    OwnAddresses::new(client, Some("10.96.0.1".parse().unwrap()), move |address| address == agent)
}

#[tokio::test]
async fn each_of_the_clusters_own_addresses_is_recognized() {
    let (client, asked) = server(false);
    let own = own(client);
    let node = Some("a node of the cluster");
    let api = Some("the cluster's API server");
    let expected = [
        ("10.1.0.1", node),
        ("fd00::a", node),
        ("198.51.100.1", node),
        ("10.2.0.1", api),
        ("10.2.0.2", api),
        ("10.96.0.1", api),
        ("10.3.0.9", Some("an agent's pod")),
        ("10.96.0.7", None),
    ];
    let addresses: Vec<IpAddr> = expected.iter().map(|(address, _)| address.parse().unwrap()).collect();
    for _ in 0..3 {
        let found = own.describe(&addresses).await.unwrap();
        assert_eq!(found, expected.map(|(_, what)| what));
    }
    assert_eq!(asked.load(Ordering::SeqCst), 2, "the answers are used for a while");
}

#[tokio::test]
async fn without_an_answer_nothing_is_known() {
    let (client, _) = server(true);
    assert!(own(client).describe(&["10.96.0.7".parse().unwrap()]).await.is_err());
}
