use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use http::{Request, Response};
use kube::client::Body;

use super::*;
use crate::verify::tests::script::Script;

/// An answer to the next request, whatever it is.
enum Answer {
    /// An API status.
    Status(u16),
    /// The output so far; the stream ends after it.
    Output(String),
    /// No answer at all: the connection breaks.
    Broken,
}

/// An API server that gives these answers one after the other and then says that there is no such pod. Also returns the requests that it
/// gets.
fn server(answers: Vec<Answer>) -> (Api<Pod>, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = asked.clone();
    let answers = Arc::new(Mutex::new(VecDeque::from(answers)));
    let service = tower::service_fn(move |request: Request<Body>| {
        seen.lock().unwrap().push(request.uri().to_string());
        let answer = answers.lock().unwrap().pop_front().unwrap_or(Answer::Status(404));
        async move {
            let status = |code: u16| {
                let body = serde_json::json!({"kind": "Status", "status": "Failure", "code": code, "message": format!("no: {code}")});
                Response::builder().status(code).body(Body::from(body.to_string().into_bytes())).unwrap()
            };
            match answer {
                Answer::Status(code) => Ok(status(code)),
                Answer::Output(text) => Ok(Response::new(Body::from(text.into_bytes()))),
                Answer::Broken => Err(std::io::Error::other("connection reset")),
            }
        }
    });
    (Api::namespaced(kube::Client::new(service, "team-a"), "team-a"), asked)
}

/// The output of an attempt's harness: records among the lines of its own log.
fn output(attempt: i64, seqs: std::ops::Range<u64>) -> String {
    let mut text = "{\"level\":\"INFO\",\"message\":\"starting\"}\nnot json\n".to_owned();
    for record in Script::good().segments.iter().flatten() {
        if record.attempt == attempt && seqs.contains(&record.seq) {
            let entry = record.encode().unwrap();
            for line in entry.documents.into_iter().chain([entry.record]) {
                text.push_str(&String::from_utf8(line).unwrap());
                text.push('\n');
            }
        }
    }
    text
}

/// Follows a task that ends once its second attempt is requested, and returns the events.
async fn watch(answers: Vec<Answer>) -> Vec<String> {
    let (pods, asked) = server(answers);
    let (progress, seen) = watch::channel(Progress::default());
    let (sender, mut events) = mpsc::channel(4);
    let follower = tokio::spawn(follow(pods, "tidy".to_owned(), seen, sender));
    let steps = tokio::spawn(async move {
        progress.send_replace(Progress { newest: 1, ended: false });
        sleep(Duration::from_millis(1800)).await;
        progress.send_replace(Progress { newest: 2, ended: false });
        sleep(Duration::from_millis(1800)).await;
        progress.send_replace(Progress { newest: 2, ended: true });
    });
    let mut out = Vec::new();
    while let Some(event) = events.recv().await {
        out.push(match event {
            Event::Record { attempt, record } => format!("{attempt} {}", record.seq),
            Event::Notice(notice) => notice,
        });
    }
    follower.await.unwrap();
    steps.await.unwrap();
    for uri in asked.lock().unwrap().iter() {
        assert!(uri.starts_with("/api/v1/namespaces/team-a/pods/tidy-") && uri.contains("container=harness"), "{uri}");
    }
    out
}

#[tokio::test]
async fn pods_come_late_break_and_go() {
    let seen = watch(vec![
        Answer::Status(404),
        Answer::Status(400),
        Answer::Output(output(1, 0..3)),
        // The stream breaks, and the pod is deleted soon after.
        Answer::Output(output(1, 0..7)),
        Answer::Status(404),
        // The pod of the second attempt.
        Answer::Status(404),
        Answer::Output(output(2, 0..9)),
        Answer::Output(output(2, 0..12)),
    ])
    .await;
    let expected: Vec<_> = (0..7).map(|n| format!("1 {n}")).chain((7..12).map(|n| format!("2 {n}"))).collect();
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn hiccups_are_told_once_and_got_over() {
    let seen = watch(vec![
        Answer::Status(503),
        Answer::Status(503),
        Answer::Broken,
        Answer::Output(output(1, 0..3)),
        Answer::Output(output(1, 5..7)),
    ])
    .await;
    assert_eq!(seen.len(), 8, "{seen:?}");
    assert!(seen[0].contains("tidy-1: no: 503") && seen[1].contains("connection reset"), "{seen:?}");
    assert_eq!(seen[2..5], ["1 0", "1 1", "1 2"]);
    assert!(seen[5].contains("records 3 to 4 were not seen"), "{seen:?}");
    assert_eq!(seen[6..], ["1 5", "1 6"]);
}

#[tokio::test]
async fn without_the_right_to_read_logs_the_status_remains() {
    let seen = watch(vec![Answer::Status(403), Answer::Status(403)]).await;
    assert_eq!(seen, ["only the status is shown: no: 403", "only the status is shown: no: 403"]);
}

#[test]
fn only_records_of_the_attempt_count() {
    let text = output(1, 0..1);
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    let (line, before) = lines.split_last().unwrap();
    let last = |count| before.iter().rev().take(count).rev().cloned().collect();
    // The policy is in the line before.
    for (count, is) in [(0, false), (1, true), (2, true)] {
        assert_eq!(parse(line, &last(count), 1).is_some(), is, "{count}");
        assert!(parse(line, &last(count), 2).is_none());
    }
    assert!(parse("{\"level\":\"INFO\"}", &VecDeque::new(), 1).is_none());
    assert!(parse("", &VecDeque::new(), 1).is_none());
}
