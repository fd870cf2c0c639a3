use super::*;
use crate::{
    evidence::record::{CallOutcome, Channel, Event, Intent, Outcome},
    gateway::testing::{
        self, Harness, Memory, ROLLBACK, ended, intent, opened_by, outcome, place, principal, seal_request,
    },
    policy::config::SideEffect,
    wire::{OpenRequest, SealRequest},
};

/// A bucket, and the state stores of two replicas that use it.
struct Setup {
    bucket: Arc<Memory>,
    a: StateStore,
    b: StateStore,
}

fn setup() -> Setup {
    let (bucket, key) = (Arc::new(Memory::default()), testing::witness_key());
    let (a, b) = (replica(&key, &bucket), replica(&key, &bucket));
    Setup { bucket, a, b }
}

fn replica(key: &[u8], bucket: &Arc<Memory>) -> StateStore {
    testing::state(&testing::replica(key, bucket), bucket)
}

#[tokio::test]
async fn a_call_is_undone_by_one_rollback_and_in_time() {
    let Setup { a, b, .. } = setup();
    let compensates = |call: &str, until: Option<&str>| Compensates { call: call.into(), until: until.map(Into::into) };
    let rollback = |uid: &str| RollbackOf { name: format!("r-{uid}"), uid: uid.into() };
    let nowhere = |of: &RollbackOf| LogLocation { task_uid: of.uid.clone(), ..log_at(&of.uid) };
    a.undo(&place(), &compensates("c7", Some("2126-01-01T00:00:00.000Z")), &rollback("one"), nowhere).await.unwrap();
    b.undo(&place(), &compensates("c7", None), &rollback("one"), nowhere).await.unwrap();
    b.undo(&place(), &compensates("c8", None), &rollback("two"), nowhere).await.unwrap();
    for (call, until) in [("c9", Some("2026-01-01T00:00:00Z")), ("c9", Some("soon")), ("../c9", None), ("", None)] {
        assert!(
            b.undo(&place(), &compensates(call, until), &rollback("one"), nowhere).await.is_err(),
            "{call} {until:?}"
        );
    }
    let refused = b.undo(&place(), &compensates("c7", None), &rollback("two"), nowhere).await.unwrap_err();
    assert_eq!(refused.rule, Rule::ToolRollback);
    assert!(refused.reason.contains("r-one (UID one) has started one and has not ended"), "{}", refused.reason);
}

/// Returns where the log of the task with this UID is stored.
fn log_at(uid: &str) -> LogLocation {
    let location = Location { prefix: format!("team/t/{uid}/"), ..place().location };
    LogLocation { location, task_uid: uid.into(), ..place() }
}

/// If a rollback has ended and certainly did nothing about a call, another rollback may take the call. If it may have compensated the call,
/// no other rollback may.
#[tokio::test]
async fn what_a_rollback_left_another_may_take() {
    let Setup { a, b, .. } = setup();
    let of = ended(&a.witness).await;
    a.witness.seal(&of, &seal_request()).await.unwrap();
    let mut policy = testing::policy();
    policy.task.uid = ROLLBACK.into();
    policy.task.rollback_of = Some(RollbackOf { name: "t".into(), uid: testing::UID.into() });
    policy.tools[0].side_effect = SideEffect::Write;
    let digest = policy.digest().unwrap();
    let at = log_at(ROLLBACK);
    let request = OpenRequest { attempt: 1, policy_digest: digest.clone() };
    let plan = a
        .witness
        .open(&at, &principal(1), &request, &digest, Some(&of), (testing::salt(), false))
        .await
        .unwrap()
        .state
        .undoing
        .unwrap()
        .plan;
    let mut harness = Harness::of(ROLLBACK, 1);
    let undo = |call: &str, compensates: &str| {
        let Event::Intent(of) = intent(call, Channel::Tool, "search", 0) else { panic!("another event") };
        let request_commitment = Some("5a".repeat(32));
        let (compensates, effect) = (Some(compensates.to_owned()), Some(SideEffect::Write));
        Event::Intent(Intent { compensates, request_commitment, side_effect: effect, ..of })
    };
    let ended = |call: &str, effect| {
        let Event::Outcome(of) = outcome(call, 0) else { panic!("another event") };
        Event::Outcome(Outcome { outcome: effect, ..of })
    };
    let events = vec![
        opened_by(&harness, &policy, Some(plan)),
        undo("8", "2"),
        ended("8", CallOutcome::NotApplied),
        undo("9", "1"),
        ended("9", CallOutcome::Unknown),
    ];
    a.witness.append(&at, &principal(1), &harness.next(events), Ok(&digest), Some(&of)).await.unwrap();
    let first = RollbackOf { name: "r".into(), uid: ROLLBACK.into() };
    let second = RollbackOf { name: "s".into(), uid: "second".into() };
    let log = |task: &RollbackOf| log_at(&task.uid);
    let compensates = |call: &str| Compensates { call: call.into(), until: None };
    for call in ["1", "2"] {
        a.undo(&of, &compensates(call), &first, log).await.unwrap();
        assert!(b.undo(&of, &compensates(call), &second, log).await.is_err(), "the first has not ended");
    }
    a.witness.seal(&at, &SealRequest { uid: ROLLBACK.into(), ..seal_request() }).await.unwrap();
    b.undo(&of, &compensates("2"), &second, log).await.unwrap();
    a.undo(&of, &compensates("2"), &second, log).await.unwrap();
    let refused = b.undo(&of, &compensates("1"), &second, log).await.unwrap_err();
    assert!(refused.reason.contains("may have made the compensation"), "{}", refused.reason);
}

#[tokio::test]
async fn what_is_kept_is_there_unlocked() {
    let Setup { bucket, a, b, .. } = setup();
    let at = Location { bucket: "state".into(), prefix: "team/t/u/rollback/".into() };
    a.put(&at, "c7", "00", b"{}".to_vec()).await.unwrap();
    b.put(&at, "c7", "00", b"{}".to_vec()).await.unwrap();
    assert_eq!(b.get(&at, "c7", "00").await.unwrap().as_deref(), Some(&b"{}"[..]));
    for (call, digest) in [("c8", "00"), ("c7", "01"), ("../c7", "00"), ("c7", "../x")] {
        let found = b.get(&at, call, digest).await;
        assert!(found.as_ref().map_or(true, Option::is_none), "{call} {digest}: {found:?}");
    }
    assert!(a.put(&at, "a/b", "00", b"{}".to_vec()).await.is_err());
    assert!(bucket.objects.lock().unwrap().values().all(|(_, retention)| retention.is_none()));
}

/// All replicas use one salt for a task, and each task has its own.
#[tokio::test]
async fn a_salt_is_made_once_and_lies_where_it_can_be_destroyed() {
    let Setup { bucket, a, b, .. } = setup();
    let of = |uid: &str, stored: bool| {
        let location = Location { bucket: "state".into(), prefix: format!("team/t/{uid}/salt/") };
        SaltLocation { task_uid: uid.into(), location: stored.then_some(location) }
    };
    let stored = of("u", true);
    let (one, two) = tokio::join!(a.salt(&stored), b.salt(&stored));
    let salt = one.unwrap();
    assert_eq!((two.unwrap(), a.salt(&of("u", true)).await.unwrap()), (salt.clone(), salt.clone()));
    assert_ne!(a.salt(&of("v", true)).await.unwrap(), salt);
    let stored = bucket.objects.lock().unwrap().get("team/t/u/salt/commitments").cloned().unwrap();
    assert!(stored.1.is_none(), "it is locked");
    assert_eq!(Salt::try_from(String::from_utf8(stored.0.to_vec()).unwrap()).unwrap(), salt);

    // Without a state bucket the salt is derived from the witness's key.
    let derived = a.salt(&of("u", false)).await.unwrap();
    assert_eq!(b.salt(&of("u", false)).await.unwrap(), derived);
    assert!(derived != salt && derived != a.salt(&of("v", false)).await.unwrap());
    let other = replica(&testing::witness_key(), &bucket);
    assert_ne!(other.salt(&of("u", false)).await.unwrap(), derived, "another key's");
}
