use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
};

use http::{Method, Request, Response};
use http_body_util::BodyExt;
use kube::client::Body;

use super::*;
use crate::cli::terminal::hidden;

const EXPIRES: &str = "2126-01-01T01:00:00Z";

fn vote(text: &str) -> Vote {
    let (text, decision) = text.strip_prefix('!').map_or((text, Answer::Approve), |text| (text, Answer::Deny));
    let (by, reason) = text.split_once(':').map_or((text, None), |(by, reason)| (by, Some(reason.to_owned())));
    Vote { by: by.into(), decision, reason }
}

fn request(required: i64, decisions: &[&str]) -> Value {
    let arguments = r#"{"amount":100,"to":"x"}"#;
    json!({
        "apiVersion": "belay.dev/v1alpha1",
        "kind": "ApprovalRequest",
        "metadata": {"name": "refund-1", "namespace": "payments", "uid": "u", "resourceVersion": "7"},
        "spec": {
            "task": {"name": "refund", "uid": "t", "attempt": 2},
            "principal": "alice", "requester": "ci", "requestedBy": "Contract", "tool": "pay", "arguments": arguments,
            "commitment": hex::encode(canonical::sha256(arguments.as_bytes())),
            "repeats": 0, "approvers": {"users": ["ana", "alice", "ci"], "groups": ["finance"]},
            "required": required, "expiresAt": EXPIRES,
        },
        "status": {"decisions": decisions.iter().map(|text| vote(text)).collect::<Vec<_>>()},
    })
}

fn typed(value: Value) -> ApprovalRequest {
    serde_json::from_value(value).unwrap()
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn before() -> Timestamp {
    at("2126-01-01T00:00:00Z")
}

fn person(name: &str, groups: &[&str]) -> Person {
    Person { name: name.into(), groups: groups.iter().map(|group| (*group).to_owned()).collect() }
}

#[rstest::rstest]
#[case::pending(2, &[], "pending, 0 of 2 approvals")]
#[case::one_of_two(2, &["ana"], "pending, 1 of 2 approvals")]
#[case::approved(1, &["ana"], "approved, 1 of 1 approval")]
#[case::more_than_enough(1, &["ana", "bob"], "approved, 2 of 1 approval")]
#[case::barred_do_not_count(1, &["alice", "ci"], "pending, 0 of 1 approval")]
#[case::denied(1, &["ana", "!bob", "!eve"], "denied by bob, eve")]
fn says_where_it_stands(#[case] required: i64, #[case] votes: &[&str], #[case] expected: &str) {
    assert_eq!(words(&typed(request(required, votes)), before()), expected);
}

#[test]
fn an_expired_one_says_what_it_had() {
    assert_eq!(words(&typed(request(2, &["ana"])), at(EXPIRES)), "expired, 1 of 2 approvals");
}

#[rstest::rstest]
#[case::listed("ana", &[], &[], Answer::Approve, None)]
#[case::listed_denies("ana", &[], &[], Answer::Deny, None)]
#[case::member("bob", &["x", "finance"], &["ana"], Answer::Approve, None)]
#[case::stranger("eve", &["x"], &[], Answer::Approve, Some("user ana, alice, ci or group finance), found eve"))]
#[case::stranger_denies("eve", &[], &[], Answer::Deny, Some("have an approver decide"))]
#[case::principal("alice", &[], &[], Answer::Approve, Some("on whose behalf the agent acts"))]
#[case::principal_denies("alice", &[], &[], Answer::Deny, None)]
#[case::requester("ci", &["finance"], &[], Answer::Approve, Some("who created the task"))]
#[case::requester_denies("ci", &[], &[], Answer::Deny, None)]
#[case::again("ana", &[], &["ana"], Answer::Approve, Some("found Approve; a decision is final"))]
#[case::other_mind("ana", &[], &["ana"], Answer::Deny, Some("found Approve"))]
#[case::denied("ana", &[], &["!bob"], Answer::Approve, Some("found it denied by bob"))]
#[case::denied_twice("ana", &[], &["!bob"], Answer::Deny, Some("nothing left to decide"))]
#[case::approved("ana", &[], &["bob", "eve"], Answer::Approve, Some("found it approved, 2 of 2 approvals"))]
#[case::approved_and_denied("ana", &[], &["bob", "eve"], Answer::Deny, None)]
fn refuses_what_admission_would(
    #[case] name: &str,
    #[case] groups: &[&str],
    #[case] votes: &[&str],
    #[case] answer: Answer,
    #[case] expected: Option<&str>,
) {
    let found = refusal(&typed(request(2, votes)), &person(name, groups), answer, before());
    match (&found, expected) {
        (None, None) => {}
        (Some(why), Some(words)) if why.contains(words) => {}
        _ => panic!("expected {expected:?}, found {found:?}"),
    }
}

#[test]
fn refuses_what_is_too_late() {
    let late = refusal(&typed(request(2, &[])), &person("ana", &[]), Answer::Approve, at(EXPIRES)).unwrap();
    assert!(late.contains("expired, 0 of 2 approvals"), "{late}");
}

#[test]
fn shows_all_that_is_decided_on() {
    let mut value = request(2, &["ana:the order was cancelled", "!bob"]);
    value["spec"]["repeats"] = 2.into();
    value["spec"]["requestedBy"] = "Pack".into();
    value["spec"]["reasons"] = json!(["rule payments", "risk 40 (change 40)"]);
    let shown = describe(&typed(value), before(), Paint::none());
    let expected = "\
refund-1  denied by bob
  task       refund, attempt 2, on behalf of alice
  created by ci
  tool       pay; the same call was approved and made 2 times before
  required   by the pack
  reason     rule payments
  reason     risk 40 (change 40)
  arguments  {
               \"amount\": 100,
               \"to\": \"x\"
             }
  may decide user ana, alice, ci or group finance
  decided    approved by ana: the order was cancelled
  decided    denied by bob
  expires    in 1h, at 2126-01-01T01:00:00Z
";
    assert_eq!(shown, expected);
}

#[test]
fn nothing_hidden_gets_to_the_terminal() {
    let nasty = "a\u{1b}[2J\u{202e}\r\nb";
    let mut value = request(2, &[&format!("{nasty}:{nasty}")]);
    let arguments = String::from_utf8(canonical::to_bytes(&json!({ nasty: nasty })).unwrap()).unwrap();
    value["spec"]["arguments"] = arguments.as_str().into();
    for field in ["principal", "requester", "tool"] {
        value["spec"][field] = nasty.into();
    }
    value["spec"]["approvers"]["users"] = json!([nasty]);
    value["spec"]["reasons"] = json!([nasty]);
    value["metadata"]["name"] = nasty.into();
    let shown = describe(&typed(value), before(), Paint::none());
    assert!(!shown.chars().any(|c| c != '\n' && hidden(c)), "{shown}");
    // There is no extra line: no text can look like another line of Belay.
    assert_eq!(shown.lines().count(), 12, "{shown}");
}

#[rstest::rstest]
#[case::number_that_reads_otherwise("{\"a\":1.0}", "{\"a\":1.0}")]
#[case::no_json("{\"a\"\n", "{\"a\"\\n")]
#[case::name_twice("{\"a\":1,\"a\":2}", "{\"a\":1,\"a\":2}")]
#[case::canonical("{\"a\":[1e+21]}", "{\n  \"a\": [\n    1e+21\n  ]\n}")]
fn arguments_that_would_read_otherwise_stay_as_they_are(#[case] text: &str, #[case] expected: &str) {
    assert_eq!(arguments(text), expected);
}

#[rstest::rstest]
#[case("  why \n", Ok("why"))]
#[case(" ", Err("leave --reason out"))]
#[case(&"é".repeat(1025), Err("found 1025"))]
fn a_reason_is_one_that_the_api_server_takes(#[case] text: &str, #[case] expected: Result<&str, &str>) {
    match (reason(text), expected) {
        (Ok(found), Ok(expected)) => assert_eq!(found, expected),
        (Err(found), Err(words)) => assert!(found.contains(words), "{found}"),
        (found, expected) => panic!("expected {expected:?}, found {found:?}"),
    }
}

/// An API server with these requests. It authenticates the client as ana, and checks versions.
#[derive(Clone, Default)]
struct Server(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    requests: Vec<Value>,
    /// Decisions of other approvers that arrive just before each write.
    meanwhile: Vec<&'static str>,
    /// The answer of admission to any write.
    admission: Option<&'static str>,
    writes: Vec<Value>,
}

impl Server {
    fn with(requests: Vec<Value>) -> Self {
        Self(Arc::new(Mutex::new(State { requests, ..State::default() })))
    }

    fn client(&self) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move {
                let (head, body) = request.into_parts();
                let body = body.collect().await.unwrap().to_bytes();
                let body = serde_json::from_slice(&body).unwrap_or_default();
                let (code, answer) = server.answer(&head.method, head.uri.path(), head.uri.query(), body);
                let answer = Body::from(answer.to_string().into_bytes());
                Ok::<_, Infallible>(Response::builder().status(code).body(answer).unwrap())
            }
        });
        Client::new(service, "payments")
    }

    fn answer(&self, method: &Method, path: &str, query: Option<&str>, body: Value) -> (u16, Value) {
        const REQUESTS: &str = "/apis/belay.dev/v1alpha1/namespaces/payments/approvalrequests";
        let mut state = self.0.lock().unwrap();
        let status = |code: u16, reason: &str, message: &str| {
            let status =
                json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message});
            (code, status)
        };
        match (method, path) {
            (&Method::POST, "/apis/authentication.k8s.io/v1/selfsubjectreviews") => {
                let user = json!({"username": "ana", "groups": ["system:authenticated"]});
                (201, json!({"metadata": {}, "status": {"userInfo": user}}))
            }
            // Two pages.
            (&Method::GET, REQUESTS) => {
                let (first, rest) = state.requests.split_at(1);
                let second = query.is_some_and(|query| query.contains("continue=more"));
                let (items, token) = if second { (rest, "") } else { (first, "more") };
                (200, json!({"metadata": {"continue": token}, "items": items}))
            }
            (&Method::GET, path) => {
                let name = path.strip_prefix(REQUESTS).unwrap().trim_start_matches('/');
                match state.requests.iter().find(|request| request["metadata"]["name"] == name) {
                    Some(request) => (200, request.clone()),
                    None => status(404, "NotFound", "not found"),
                }
            }
            (&Method::PATCH, path) => {
                assert_eq!(path, format!("{REQUESTS}/refund-1/status"));
                let meanwhile = state.meanwhile.pop();
                let admission = state.admission;
                let request = &mut state.requests[0];
                let version = request["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
                let next = json!(format!("{version}1"));
                if let Some(other) = meanwhile {
                    request["status"]["decisions"].as_array_mut().unwrap().push(json!(vote(other)));
                    request["metadata"]["resourceVersion"] = next.clone();
                }
                if request["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"] {
                    return status(409, "Conflict", "the object has been modified");
                }
                if let Some(why) = admission {
                    return status(403, "Forbidden", why);
                }
                request["status"] = body["status"].clone();
                request["metadata"]["resourceVersion"] = next;
                let after = request.clone();
                state.writes.push(body["status"]["decisions"].clone());
                (200, after)
            }
            other => panic!("{other:?}"),
        }
    }

    async fn cast(&self, name: &str, answer: Answer, reason: Option<&str>) -> (Result<u8, CliError>, String, String) {
        let ballot = Ballot { namespace: "payments", name, answer, reason };
        let (mut out, mut notes) = (Vec::new(), Vec::new());
        let code = ballot.cast(self.client(), Paint::none(), &mut out, &mut notes).await;
        (code, String::from_utf8(out).unwrap(), String::from_utf8(notes).unwrap())
    }

    async fn list(&self, all: bool) -> (Result<u8, CliError>, String, String) {
        let requests = Api::namespaced(self.client(), "payments");
        let (mut out, mut notes) = (Vec::new(), Vec::new());
        let code = listed(&requests, "payments", all, Paint::none(), &mut out, &mut notes).await;
        (code, String::from_utf8(out).unwrap(), String::from_utf8(notes).unwrap())
    }

    fn writes(&self) -> Vec<Value> {
        self.0.lock().unwrap().writes.clone()
    }
}

#[tokio::test]
async fn a_decision_is_added_to_those_of_others() {
    let server = Server::with(vec![request(2, &["bob"])]);
    let (code, out, _) = server.cast("refund-1", Answer::Approve, Some("fine")).await;
    assert_eq!(code.unwrap(), 0);
    assert!(out.contains("\"amount\": 100"), "{out}");
    assert!(out.ends_with("your decision is written; it is now approved, 2 of 2 approvals\n"), "{out}");
    assert_eq!(server.writes(), [json!([vote("bob"), vote("ana:fine")])]);
}

#[tokio::test]
async fn others_may_decide_at_the_same_time() {
    let server = Server::with(vec![request(2, &[])]);
    server.0.lock().unwrap().meanwhile = vec!["bob"];
    let (code, out, _) = server.cast("refund-1", Answer::Approve, None).await;
    assert_eq!(code.unwrap(), 0);
    assert!(out.ends_with("it is now approved, 2 of 2 approvals\n"), "{out}");
    assert_eq!(server.writes(), [json!([vote("bob"), vote("ana")])]);
}

#[tokio::test]
async fn a_denial_meanwhile_leaves_nothing_to_approve() {
    let server = Server::with(vec![request(1, &[])]);
    server.0.lock().unwrap().meanwhile = vec!["!bob"];
    let (code, _, notes) = server.cast("refund-1", Answer::Approve, None).await;
    assert_eq!(code.unwrap(), 1);
    assert!(notes.contains("found it denied by bob"), "{notes}");
    assert!(server.writes().is_empty());
}

#[tokio::test]
async fn admission_has_the_last_word() {
    let server = Server::with(vec![request(1, &[])]);
    server.0.lock().unwrap().admission = Some("no:\u{1b}[2J");
    let (code, _, notes) = server.cast("refund-1", Answer::Deny, None).await;
    assert_eq!((code.unwrap(), notes.as_str()), (1, "not written: no:\\u{1b}[2J\n"));
}

#[tokio::test]
async fn a_request_that_is_not_there_is_said_so() {
    let server = Server::with(vec![request(1, &[])]);
    let (code, out, _) = server.cast("refund-2", Answer::Deny, None).await;
    let error = code.unwrap_err().to_string();
    assert!(error.contains("no ApprovalRequest refund-2 in namespace payments"), "{error}");
    assert!(out.is_empty(), "{out}");
}

#[tokio::test]
async fn lists_what_waits_the_most_urgent_first() {
    let named = |name: &str, expires: &str, votes: &[&str]| {
        let mut one = request(2, votes);
        one["metadata"]["name"] = name.into();
        one["spec"]["expiresAt"] = expires.into();
        one
    };
    let server = Server::with(vec![
        named("later", "2126-01-02T00:00:00Z", &["ana"]),
        named("soon", "2126-01-01T00:00:00Z", &[]),
        named("over", "2026-01-01T00:00:00Z", &[]),
        named("denied", "2126-01-03T00:00:00Z", &["!bob"]),
        json!({"metadata": {"name": "odd\u{1b}"}, "spec": {}}),
    ]);
    let heads = |out: &str| -> Vec<String> {
        out.lines().filter(|line| !line.is_empty() && !line.starts_with(' ')).map(str::to_owned).collect()
    };
    let (code, out, notes) = server.list(false).await;
    assert_eq!(code.unwrap(), 0);
    assert_eq!(heads(&out), ["soon  pending, 0 of 2 approvals", "later  pending, 1 of 2 approvals"]);
    assert!(notes.contains("left out: this belay cannot read ApprovalRequest payments/odd\\u{1b}"), "{notes}");
    assert!(notes.ends_with("2 in namespace payments\n"), "{notes}");
    let (_, out, _) = server.list(true).await;
    let names: Vec<_> = heads(&out).iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect();
    assert_eq!(names, ["over", "soon", "later", "denied"]);
}

#[tokio::test]
async fn nothing_to_list_is_said() {
    let server = Server::with(vec![request(1, &["!bob"])]);
    let (code, out, notes) = server.list(false).await;
    assert_eq!(
        (code.unwrap(), out.as_str(), notes.as_str()),
        (0, "", "no pending ApprovalRequests in namespace payments\n")
    );
}
