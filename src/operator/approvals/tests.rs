use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + seconds).unwrap()
}

fn times(created: i64, expires: i64) -> Times {
    Times { created: at(created), expires: at(expires) }
}

fn request(name: &str, required: i64, decisions: &[(&str, &str)]) -> Lenient<ApprovalRequest> {
    let decisions: Vec<_> = decisions.iter().map(|(by, decision)| json!({ "by": by, "decision": decision })).collect();
    let request = json!({
        "apiVersion": "belay.dev/v1alpha1", "kind": "ApprovalRequest",
        "metadata": {
            "name": name, "namespace": "team-a", "creationTimestamp": at(0),
            "labels": { names::TASK: "triage", names::TASK_UID: "u" },
        },
        "spec": {
            "task": { "name": "triage", "uid": "u", "attempt": 1 },
            "principal": "alice", "requester": "ci", "requestedBy": "Contract", "tool": "refund", "arguments": "{}",
            "commitment": "0".repeat(64), "repeats": 0, "approvers": { "users": ["bob", "eve"] }, "required": required, "expiresAt": at(60),
        },
        "status": { "decisions": decisions },
    });
    serde_json::from_value(request).unwrap()
}

#[test]
fn only_undecided_requests_are_kept() {
    let kept = Undecided::default();
    let names = || kept.of("u").into_keys().collect::<Vec<_>>();
    let apply = |request| kept.follow(&watcher::Event::Apply(request));
    apply(request("a", 2, &[]));
    assert_eq!(kept.of("u"), Requests::from([("a".to_owned(), times(0, 60))]));
    assert_eq!(kept.of("other"), Requests::new());
    // One approval of two, and approvals that do not count, decide nothing.
    apply(request("a", 2, &[("bob", "Approve"), ("alice", "Approve"), ("ci", "Approve")]));
    assert_eq!(names(), ["a"]);
    apply(request("a", 2, &[("bob", "Approve"), ("eve", "Approve")]));
    assert_eq!(names(), [""; 0]);
    apply(request("b", 2, &[]));
    apply(request("b", 2, &[("eve", "Deny")]));
    assert_eq!(names(), [""; 0]);
    apply(request("c", 1, &[]));
    apply(request("d", 1, &[]));
    kept.follow(&watcher::Event::Delete(request("c", 1, &[])));
    assert_eq!(names(), ["d"]);
    // A request that this version cannot decode says nothing.
    let unreadable = json!({
        "apiVersion": "belay.dev/v1alpha1", "kind": "ApprovalRequest", "spec": Value::Null,
        "metadata": { "name": "d", "namespace": "team-a", "labels": { names::TASK: "triage", names::TASK_UID: "u" } },
    });
    apply(serde_json::from_value(unreadable).unwrap());
    assert_eq!(names(), [""; 0]);
    assert!(kept.lock().by_task.is_empty(), "a task without requests takes no memory");
}

/// A request counts as soon as it is listed. What a new list does not have is forgotten when the list is complete.
#[tokio::test]
async fn a_list_is_whole_when_it_is_complete() {
    let kept = Undecided::default();
    let ready =
        |kept: Undecided| async move { tokio::time::timeout(Duration::ZERO, kept.wait_until_ready()).await.is_ok() };
    kept.follow(&watcher::Event::Init);
    kept.follow(&watcher::Event::InitApply(request("a", 1, &[])));
    assert!(!ready(kept.clone()).await);
    assert_eq!(kept.of("u").len(), 1);
    kept.follow(&watcher::Event::InitDone);
    assert!(ready(kept.clone()).await);
    assert_eq!(kept.of("u").len(), 1);
    kept.follow(&watcher::Event::Init);
    assert_eq!(kept.of("u").len(), 1);
    kept.follow(&watcher::Event::InitDone);
    assert_eq!(kept.of("u").len(), 0);
}

#[test]
fn a_request_belongs_to_the_task_of_its_labels() {
    let task = task(&request("a", 1, &[])).unwrap();
    assert_eq!((task.name.as_str(), task.namespace.as_deref()), ("triage", Some("team-a")));
}

#[test]
fn a_request_is_told_once_it_has_settled_and_until_it_expires() {
    let requests = Requests::from([("a".to_owned(), times(0, 60))]);
    let told = |now| report(&requests, None, None, at(now));
    assert_eq!(told(4), Report { message: None, until: Some(at(5)) });
    let message = "waits for approvers to decide about ApprovalRequest a (expires at 2023-11-14T22:14:20Z)".to_owned();
    assert_eq!(told(5), Report { message: Some(message), until: Some(at(60)) });
    assert_eq!(told(60), Report { message: None, until: None });
    assert_eq!(report(&Requests::new(), None, None, at(0)), Report { message: None, until: None });
}

#[test]
fn the_most_urgent_five_are_named() {
    let requests: Requests = (0..8).map(|n| (format!("r{n}"), times(0, 100 - n))).collect();
    let message = report(&requests, None, None, at(9)).message.unwrap();
    let order: Vec<_> = ["r7", "r6", "r5", "r4", "r3"].iter().map(|name| message.find(name).unwrap()).collect();
    assert!(order.is_sorted(), "{message}");
    assert!(!message.contains("r2") && message.ends_with(", and 3 more"), "{message}");
}

/// A change within the pause waits for the end of the pause, in both directions.
#[test]
fn changes_are_a_pause_apart() {
    let requests = Requests::from([("a".to_owned(), times(0, 60))]);
    let held = report(&requests, None, Some(at(1)), at(6));
    assert_eq!(held, Report { message: None, until: Some(at(11)) });
    assert!(report(&requests, None, Some(at(1)), at(11)).message.is_some());
    let held = report(&Requests::new(), Some("waits"), Some(at(1)), at(6));
    assert_eq!(held, Report { message: Some("waits".to_owned()), until: Some(at(11)) });
    assert_eq!(report(&Requests::new(), Some("waits"), Some(at(1)), at(11)).message, None);
    assert_eq!(report(&Requests::new(), Some("waits"), None, at(6)).message, None);
}

proptest! {
    /// However requests come and go, changes are a pause apart, every change is made at the time that the report names or at an event, and
    /// in the end the status says what is true.
    #[test]
    fn a_burst_costs_few_changes_and_ends_with_the_truth(
        requests in proptest::collection::vec((0..120_i64, 1..40_i64, 1..400_i64), 0..40)
    ) {
        let (mut says, mut changed, mut due): (Option<String>, Option<Timestamp>, Option<Timestamp>) = (None, None, None);
        let mut changes = Vec::new();
        for now in 0..600 {
            let open: Requests = requests.iter().enumerate()
                .filter(|(_, (created, decided, _))| *created <= now && now < created + decided)
                .map(|(n, (created, _, expires))| (format!("r{n}"), times(*created, created + expires)))
                .collect();
            let event = requests.iter().any(|(created, decided, _)| now == *created || now == created + decided);
            if !event && due.is_none_or(|due| due > at(now)) {
                continue;
            }
            let told = report(&open, says.as_deref(), changed, at(now));
            prop_assert!(told.until.is_none_or(|until| until > at(now)), "{told:?} at {now}");
            due = told.until;
            if told.message != says {
                (says, changed) = (told.message, Some(at(now)));
                changes.push(now);
            }
        }
        prop_assert_eq!(says, None);
        prop_assert!(changes.windows(2).all(|two| two[1] - two[0] >= 10), "{changes:?}");
        prop_assert!(changes.len() <= 18, "{changes:?}");
    }
}
