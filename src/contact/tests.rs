use std::{
    convert::Infallible,
    sync::atomic::{AtomicBool, Ordering},
};

use futures::StreamExt;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    runtime::{WatchStreamExt, watcher},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::*;

type Reply = Response<BoxBody<Bytes, io::Error>>;

fn whole(status: u16, date: &str, body: &Value) -> Reply {
    let body = Full::new(Bytes::from(body.to_string())).map_err(|never: Infallible| match never {}).boxed();
    Response::builder().status(status).header(DATE, date).body(body).unwrap()
}

/// A watch that brings these events and then nothing, and never ends.
fn watch(date: &str, events: Vec<Value>) -> Reply {
    let events = events.into_iter().map(|event| Ok(Frame::data(Bytes::from(format!("{event}\n")))));
    let body = StreamBody::new(futures::stream::iter(events).chain(futures::stream::pending()));
    Response::builder().header(DATE, date).body(BodyExt::boxed(body)).unwrap()
}

fn pods() -> Value {
    json!({ "apiVersion": "v1", "kind": "PodList", "metadata": { "resourceVersion": "7" }, "items": [] })
}

fn event(kind: &str, version: &str) -> Value {
    json!({ "type": kind, "object": { "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "p", "namespace": "n", "resourceVersion": version } } })
}

const DATED: &str = "Wed, 25 Nov 2026 12:00:00 GMT";

fn dated() -> Timestamp {
    "2026-11-25T12:00:00Z".parse().unwrap()
}

/// A client of an API server that gives this answer. No answer is a connection error.
fn client_of(
    contact: &Arc<Contact>,
    answer: impl Fn(&Request<RequestBody>) -> Option<Reply> + Send + Sync + Clone + 'static,
) -> Client {
    let service = tower::service_fn(move |request: Request<RequestBody>| {
        let reply = answer(&request).ok_or(io::Error::new(io::ErrorKind::ConnectionRefused, "away"));
        async move { reply }
    });
    Client::new(Listening(contact.clone()).layer(service), "default")
}

fn is_watch(request: &Request<RequestBody>) -> bool {
    request.uri().query().is_some_and(|query| query.contains("watch=true"))
}

#[tokio::test(start_paused = true)]
async fn the_time_is_the_api_servers() {
    let contact = Arc::new(Contact::default());
    let client = client_of(&contact, |_| Some(whole(200, DATED, &pods())));
    let list = || async { Api::<Pod>::all(client.clone()).list(&Default::default()).await.unwrap() };
    list().await;
    assert_eq!(contact.now(), dated(), "whatever this machine's clock says");
    tokio::time::advance(Duration::from_secs(2)).await;
    list().await;
    assert_eq!(
        contact.now(),
        dated() + SignedDuration::from_secs(2),
        "an answer that was two seconds on its way turns nothing back"
    );
    tokio::time::advance(Duration::from_secs(60)).await;
    list().await;
    assert_eq!(contact.now(), dated(), "a clock that ran ahead is set back");
}

#[tokio::test(start_paused = true)]
async fn a_break_begins_with_the_first_answer_that_does_not_come_and_ends_with_the_next_that_does() {
    let contact = Arc::new(Contact::default());
    let away = Arc::new(AtomicBool::new(false));
    let down = away.clone();
    let client = client_of(&contact, move |_| (!down.load(Ordering::Relaxed)).then(|| whole(200, "", &pods())));
    let list = || async { Api::<Pod>::all(client.clone()).list(&Default::default()).await };
    tokio::time::advance(Duration::from_secs(100)).await;
    list().await.unwrap();
    let since = |contact: &Contact| contact.now().duration_since(contact.since()).as_secs();
    assert_eq!(since(&contact), 100);
    away.store(true, Ordering::Relaxed);
    list().await.unwrap_err();
    tokio::time::advance(Duration::from_secs(50)).await;
    assert_eq!(since(&contact), 0, "as long as it lasts");
    away.store(false, Ordering::Relaxed);
    list().await.unwrap();
    tokio::time::advance(Duration::from_secs(7)).await;
    assert_eq!(since(&contact), 7);
}

/// However all watches fail, each is back within half a minute and reports its age until then.
#[rstest::rstest]
#[case::refused(|_: &Request<RequestBody>| None)]
#[case::silent(|request: &Request<RequestBody>| is_watch(request).then(|| watch("", vec![])))]
#[case::unavailable(|_: &Request<RequestBody>| Some(whole(503, "", &json!({ "kind": "Status", "status": "Failure", "message": "starting", "reason": "x", "code": 503 }))))]
#[case::expired(|request: &Request<RequestBody>| is_watch(request).then(|| watch("", vec![json!({ "type": "ERROR", "object": { "kind": "Status", "status": "Failure", "message": "too old", "reason": "Expired", "code": 410 } })])))]
#[case::forbidden(|_: &Request<RequestBody>| Some(whole(403, "", &json!({ "kind": "Status", "status": "Failure", "message": "no", "reason": "Forbidden", "code": 403 }))))]
#[case::nonsense(|_: &Request<RequestBody>| Some(whole(200, "", &json!("?"))))]
#[tokio::test(start_paused = true)]
async fn a_watch_is_back_within_half_a_minute(
    #[case] trouble: fn(&Request<RequestBody>) -> Option<Reply>,
    #[values(3, 40, 180, 1000)] seconds: u64,
) {
    let contact = Arc::new(Contact::default());
    let away = Arc::new(AtomicBool::new(false));
    let down = away.clone();
    let client = client_of(&contact, move |request| match (down.load(Ordering::Relaxed), is_watch(request)) {
        (true, _) => trouble(request),
        (false, true) => Some(watch("", vec![event("ADDED", "9")])),
        (false, false) => Some(whole(200, "", &pods())),
    });
    let events = watcher(Api::<Pod>::all(client), watching()).backoff(pauses());
    let mut events = Box::pin(events.filter(|event| std::future::ready(matches!(event, Ok(watcher::Event::Apply(_))))));
    events.next().await.unwrap().unwrap();
    assert!(contact.fresh(OLD).is_ok());

    away.store(true, Ordering::Relaxed);
    // Until then, events come on a connection that was made before.
    let _ = tokio::time::timeout(Duration::from_secs(seconds), async { while events.next().await.is_some() {} }).await;
    away.store(false, Ordering::Relaxed);
    let back = Instant::now();
    events.next().await.unwrap().unwrap();
    assert!(back.elapsed() <= Duration::from_secs(30), "{:?}", back.elapsed());
    assert!(contact.fresh(OLD).is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_not_heard_of_is_old() {
    let contact = Arc::new(Contact::default());
    let client = client_of(&contact, |request| match is_watch(request) {
        true => Some(watch("", vec![event("ADDED", "9")])),
        false => Some(whole(200, "", &pods())),
    });
    let mut events = Box::pin(watcher(Api::<Pod>::all(client), watching()).backoff(pauses()));
    while !matches!(events.next().await, Some(Ok(watcher::Event::Apply(_)))) {}
    // The watch is not polled, as by a controller that pauses.
    tokio::time::advance(OLD + Duration::from_secs(1)).await;
    let old = contact.fresh(OLD).unwrap_err();
    assert!(old.contains("pods") && old.contains("46 s"), "{old}");
    let registry = prometheus::Registry::new();
    registry.register(Box::new(WatchAges::new("age", contact.clone()).unwrap())).unwrap();
    let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
    assert!(text.contains(r#"age{kind="pods"} 46"#), "{text}");
    contact.forget();
    assert!(contact.fresh(OLD).is_ok());
}

/// An answer that a kind may not be watched, or not from that version, is not an event of the watch, however often it comes.
#[rstest::rstest]
#[case::forbidden(403)]
#[case::expired(410)]
#[tokio::test(start_paused = true)]
async fn a_watch_that_is_refused_is_old(#[case] status: u16) {
    let contact = Arc::new(Contact::default());
    let let_us = Arc::new(AtomicBool::new(true));
    let may = let_us.clone();
    let client = client_of(&contact, move |request| match is_watch(request) {
        true if may.load(Ordering::Relaxed) => Some(watch(DATED, vec![])),
        true => {
            let refused = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no", "reason": "no", "code": status });
            Some(whole(status, DATED, &refused))
        }
        false => Some(whole(200, DATED, &pods())),
    });
    let pods = watcher(Api::<Pod>::all(client), watching()).backoff(pauses());
    tokio::spawn(pods.for_each(|_| async {}));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(contact.fresh(OLD), Ok(()));
    let_us.store(false, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(120)).await;
    let old = contact.fresh(OLD).unwrap_err();
    assert!(old.contains("pods"), "{old}");
}

#[tokio::test(start_paused = true)]
async fn a_bookmark_is_news() {
    let contact = Arc::new(Contact::default());
    let bodies = StreamBody::new(futures::stream::unfold((), |()| async {
        tokio::time::sleep(Duration::from_secs(18)).await;
        Some((Ok::<_, io::Error>(Frame::data(Bytes::from_static(b"x"))), ()))
    }));
    let silence = Box::pin(sleep(Duration::from_secs(30)));
    let patience = Duration::from_secs(30);
    let mut heard =
        Heard { inner: Box::pin(bodies), contact: contact.clone(), watched: Some("pods".into()), patience, silence };
    for _ in 0..10 {
        heard.frame().await.unwrap().unwrap();
        assert!(contact.fresh(Duration::from_secs(1)).is_ok());
    }
}

/// A connection over a real socket that is no longer served is given up, although it is never closed.
#[tokio::test]
async fn a_half_open_connection_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // It accepts requests and never answers.
    let server = tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut some = [0; 1024];
            let _ = stream.read(&mut some).await;
            held.push(stream);
        }
    });
    let contact = Arc::new(Contact::default());
    let client = client(Config::new(format!("http://{address}").parse().unwrap()), contact.clone()).unwrap();
    let begun = std::time::Instant::now();
    let error = Api::<Pod>::all(client).list(&Default::default()).await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(30), "{error}");
    assert!(contact.now().duration_since(contact.since()).as_secs() < 2, "that is a break");
    server.abort();
}

/// The same, in the middle of an answer.
#[tokio::test]
async fn an_answer_that_stops_half_way_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut some = [0; 1024];
        let _ = stream.read(&mut some).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{")
            .await
            .unwrap();
        std::future::pending::<()>().await;
    });
    let contact = Arc::new(Contact::default());
    let client = client(Config::new(format!("http://{address}").parse().unwrap()), contact.clone()).unwrap();
    let begun = std::time::Instant::now();
    Api::<Pod>::all(client).list(&Default::default()).await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(30));
    server.abort();
}
