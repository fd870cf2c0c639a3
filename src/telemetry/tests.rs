use opentelemetry::trace::Tracer;
use tokio::{io::AsyncReadExt, net::TcpListener};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn spans_are_sent_to_the_collector() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let provider = exporter("belay-test", endpoint).unwrap();
    provider.tracer("belay-test").in_span("a span", |_| ());
    let flushing = tokio::task::spawn_blocking(move || drop(Guard(Some(provider))));
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut preface = [0; 14];
    stream.read_exact(&mut preface).await.unwrap();
    assert_eq!(&preface, b"PRI * HTTP/2.0");
    drop(stream);
    flushing.await.unwrap();
}

#[tokio::test]
async fn a_collector_that_is_no_url_is_named() {
    let error = exporter("belay-test", "no url".to_owned()).unwrap_err().to_string();
    assert!(error.contains("no url") && error.contains(ENDPOINT), "{error}");
}

/// Says what [`a_process_that_logs`] logs, where it runs in a process of its own: one process has one log.
const LOGS: &str = "BELAY_TEST_LOGS";
/// What others chose, with everything that could break a line.
const TEXT: &str = "one\ntwo\r\n{\"three\": \"four\"}\t\u{0}\u{1b}[31m\u{2028}\u{1f980}\\";

/// Logs as Belay's processes do. The tests below run it in processes of their own.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_logs() {
    let Ok(what) = std::env::var(LOGS) else { return };
    let guard = init("belay-test").unwrap();
    match what.as_str() {
        "texts" => {
            tracing::info!("{TEXT}");
            let error = std::io::Error::other(TEXT);
            tracing::warn!(%error, debugged = ?TEXT, count = 7, is_last = false, "a warning");
            let span = tracing::info_span!("reconcile", namespace = "team-a", task = TEXT);
            span.in_scope(|| tracing::error!(reason = TEXT, "in a span"));
            tracing::debug!("nobody asked for this");
        }
        #[cfg(feature = "harness")]
        "denial" => {
            use crate::{
                evidence::record::Channel,
                harness::gate::tests::gate_followed_by,
                policy::{
                    decide::{Denial, tests::policy},
                    rule::Rule,
                },
            };
            let gate = gate_followed_by(policy(vec![]), Box::new(|_, _| ()));
            let denial = Denial { rule: Rule::EgressHost, reason: "no class lists this host".to_owned() };
            gate.deny(Channel::Egress, "evil.test:443", None, denial).await;
        }
        other => panic!("{other}"),
    }
    drop(guard);
    crate::output::stderr().end();
}

/// Runs a process that logs this, and returns its lines. Each is one JSON object that can be read in one way only.
fn logged(what: &str, filter: Option<&str>) -> Vec<serde_json::Value> {
    let mut process = std::process::Command::new(std::env::current_exe().unwrap());
    process.args(["--exact", "telemetry::tests::a_process_that_logs", "--nocapture"]).env(LOGS, what);
    process.env_remove("RUST_LOG").env_remove(ENDPOINT);
    if let Some(filter) = filter {
        process.env("RUST_LOG", filter);
    }
    let ended = process.output().unwrap();
    let text = String::from_utf8(ended.stderr).unwrap();
    assert!(ended.status.success(), "{text}");
    assert!(text.ends_with('\n'), "{text:?}");
    let read =
        |line: &str| crate::policy::json::parse(line.as_bytes()).unwrap_or_else(|error| panic!("{error}: {line:?}"));
    let lines: Vec<_> = text.lines().map(read).collect();
    for line in &lines {
        let timestamp = line["timestamp"].as_str().unwrap();
        assert!(timestamp.parse::<jiff::Timestamp>().is_ok(), "{line}");
        assert!(line["target"].as_str().unwrap().starts_with("belay::"), "{line}");
    }
    lines
}

#[test]
fn each_line_of_the_log_is_one_json_object_whatever_it_says() {
    let lines = logged("texts", None);
    let said: Vec<_> =
        lines.iter().map(|line| (line["level"].as_str().unwrap(), line["message"].as_str().unwrap())).collect();
    assert_eq!(said, [("INFO", TEXT), ("WARN", "a warning"), ("ERROR", "in a span")]);
    assert_eq!(
        (&lines[1]["error"], &lines[1]["count"], &lines[1]["is_last"]),
        (&TEXT.into(), &7.into(), &false.into())
    );
    assert_eq!(lines[1]["debugged"].as_str().unwrap(), format!("{TEXT:?}"));
    assert_eq!(lines[2]["reason"], TEXT);
    let span = &lines[2]["span"];
    assert_eq!(
        (&span["name"], &span["namespace"], &span["task"]),
        (&"reconcile".into(), &"team-a".into(), &TEXT.into())
    );
    // Only what is asked for.
    let asked = logged("texts", Some("debug"));
    assert_eq!((asked.len(), asked.last().unwrap()["level"].as_str()), (4, Some("DEBUG")));
    assert_eq!(logged("texts", Some("error")).len(), 1);
}

#[cfg(feature = "harness")]
#[test]
fn a_denial_is_logged_with_what_was_denied_and_why() {
    let lines = logged("denial", None);
    let line = lines.iter().find(|line| line["message"] == "denied").unwrap();
    assert_eq!((&line["rule"], &line["channel"]), (&"egress.host".into(), &"egress".into()), "{line}");
    assert_eq!((&line["reason"], &line["to"]), (&"no class lists this host".into(), &"evil.test:443".into()), "{line}");
}
