use std::{collections::BTreeMap, sync::atomic::Ordering, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};

use super::*;
use crate::{
    canonical,
    evidence::{
        log,
        merkle::leaf_hash,
        note::{self, Checkpoint, Note},
        record::{Actor, CallOutcome, Channel, Event, Intent, Outcome, Record},
        rollback::CompensationState,
        store::Mode,
    },
    gateway::testing::{
        self, Harness, Memory, ROLLBACK, contained, denied, digest, ended, intent, opened_by, outcome, place,
        principal, seal_request,
    },
    policy::{
        commit::Salt,
        config::{ModelPrice, PolicyConfig, RollbackOf, SideEffect, Usage},
    },
    verify,
    wire::{AppendReply, AppendRequest, OpenReply, OpenRequest, Until},
};

/// A bucket, and two replicas of the gateway that use it.
struct Setup {
    bucket: Arc<Memory>,
    key: Vec<u8>,
    a: Arc<Witness>,
    b: Arc<Witness>,
}

fn setup() -> Setup {
    let (bucket, key) = (Arc::new(Memory::default()), testing::witness_key());
    let (a, b) = (testing::replica(&key, &bucket), testing::replica(&key, &bucket));
    Setup { bucket, key, a, b }
}

async fn append(witness: &Arc<Witness>, request: &AppendRequest) -> Result<AppendReply, Rule> {
    let principal = principal(request.attempt);
    witness.append(&place(), &principal, request, Ok(&digest()), None).await.map(|(reply, _)| reply).map_err(|e| e.rule)
}

async fn open(witness: &Arc<Witness>, attempt: i64) -> Result<OpenReply, Rule> {
    let request = OpenRequest { attempt, policy_digest: digest() };
    witness.open(&place(), &principal(attempt), &request, &digest(), None, kept()).await.map_err(|e| e.rule)
}

#[tokio::test]
async fn a_run_over_two_replicas_verifies() {
    let Setup { bucket, key, a, b } = setup();
    let mut harness = Harness::new(1);
    assert_eq!(open(&a, 1).await.unwrap().size, 0);
    let segments = [
        vec![harness.opened(), intent("1", Channel::Tool, "search", 0)],
        vec![outcome("1", 0), denied(), intent("2", Channel::Model, "/v1/chat/completions", 300)],
        vec![outcome("2", 120), Event::ContainmentChecked(contained(true))],
    ];
    for (segment, witness) in segments.into_iter().zip([&a, &b, &a]) {
        let reply = append(witness, &harness.next(segment)).await.unwrap();
        assert_eq!(reply.size, harness.tree.size());
        Note::parse(&reply.checkpoint.unwrap()).unwrap().verify_cosignature(&testing::verifier(&key)).unwrap();
    }
    // The pod dies. The second attempt gets the counters of the first, from the replica that knows fewer records.
    let reply = open(&b, 2).await.unwrap();
    assert_eq!((reply.size, reply.state.usage, reply.open_calls), (harness.tree.size(), harness.usage, 0));
    let frontier = reply.frontier.iter().map(|h| BASE64.decode(h).unwrap().try_into().unwrap()).collect();
    let mut second = Harness::new(2);
    second.tree = crate::evidence::merkle::Tree::from_frontier(reply.size, frontier).unwrap();
    second.usage = reply.state.usage;
    let opened = second.opened();
    append(&a, &second.next(vec![opened, intent("3", Channel::Tool, "write", 0)])).await.unwrap();
    append(&a, &second.next(vec![outcome("3", 0)])).await.unwrap();

    let sealed = b.seal(&place(), &seal_request()).await.unwrap();
    assert_eq!(sealed.usage, second.usage);
    assert_eq!(sealed.size, second.tree.size() + 1);
    assert_eq!(sealed.location, format!("s3://evidence/team/t/{}/", testing::UID));
    assert_eq!(a.seal(&place(), &seal_request()).await.unwrap(), sealed, "sealing again answers the same");
    assert!(bucket.objects.lock().unwrap().values().all(|(_, r)| *r == place().retention));

    let log = log::Log::read(&*bucket, &place().location.prefix, true).await.unwrap();
    let report = verify::verify(&log, &testing::verifier(&key), &verify::Expected::Anything);
    assert_eq!(report.verdict, verify::Verdict::Valid, "{report:?}");
}

#[tokio::test]
async fn a_rollback_goes_by_the_plan_that_the_other_log_makes() {
    let Setup { a, b, .. } = setup();
    let of = ended(&a).await;
    let at = LogLocation {
        location: Location { prefix: format!("team/t/{ROLLBACK}/"), ..of.location.clone() },
        task_uid: ROLLBACK.into(),
        ..of.clone()
    };
    let mut policy = testing::policy();
    (policy.task.uid, policy.allowed_effects) = (ROLLBACK.into(), vec![SideEffect::Read, SideEffect::Write]);
    policy.task.rollback_of = Some(RollbackOf { name: "t".into(), uid: testing::UID.into() });
    // The compensation is a call of the contract `search`, which changes something here.
    policy.tools[0].side_effect = SideEffect::Write;
    let look =
        crate::policy::config::Tool { name: "look".into(), side_effect: SideEffect::Read, ..policy.tools[0].clone() };
    policy.tools.push(look);
    let digest = policy.digest().unwrap();
    let request = OpenRequest { attempt: 1, policy_digest: digest.clone() };
    let early = b.open(&at, &principal(1), &request, &digest, Some(&of), kept()).await.unwrap_err();
    assert_eq!(early.rule, Rule::ToolRollback, "the other task has not ended");
    let mut failed = seal_request();
    (failed.closed.phase, failed.closed.failure_class) = ("Failed".into(), "Agent".into());
    let sealed = a.seal(&of, &failed).await.unwrap();
    assert_eq!(sealed.compensation_commitment, Some(["search".to_owned()].into()));

    let reply = b.open(&at, &principal(1), &request, &digest, Some(&of), kept()).await.unwrap();
    let plan = reply.state.undoing.unwrap().plan;
    assert_eq!(plan.steps.iter().map(|step| step.call.as_str()).collect::<Vec<_>>(), ["2", "1"], "newest first");
    let append = async |request: &AppendRequest| {
        b.append(&at, &principal(1), request, Ok(&digest), Some(&of)).await.map(drop).map_err(|refused| refused.rule)
    };
    let mut shorter = plan.clone();
    shorter.steps.pop();
    for (other, rule) in [(Some(shorter), Rule::ToolRollback), (None, Rule::LogSegment)] {
        let mut liar = Harness::of(ROLLBACK, 1);
        let opened = opened_by(&liar, &policy, other);
        assert_eq!(append(&liar.next(vec![opened])).await, Err(rule));
    }
    let mut liar = Harness::of(ROLLBACK, 1);
    let opened = opened_by(&liar, &policy, Some(plan.clone()));
    let unasked = b.append(&at, &principal(1), &liar.next(vec![opened]), Ok(&digest), None).await.unwrap_err();
    assert_eq!(unasked.rule, Rule::ToolRollback, "the other log could not be asked");
    let mut harness = Harness::of(ROLLBACK, 1);
    let opened = opened_by(&harness, &policy, Some(plan));
    append(&harness.next(vec![opened])).await.unwrap();

    let undo = |call: &str, compensates: Option<&str>, digest: &str, side_effect| {
        let Event::Intent(of) = intent(call, Channel::Tool, "search", 0) else { panic!("another event") };
        let (compensates, request_commitment) = (compensates.map(Into::into), Some(digest.to_owned()));
        Event::Intent(Intent { compensates, request_commitment, side_effect: Some(side_effect), ..of })
    };
    let (write, right, wrong) = (SideEffect::Write, "5a".repeat(32), "5b".repeat(32));
    let (tree, usage, reserved) = (harness.tree.clone(), harness.usage, harness.reserved.clone());
    for refused in [
        undo("9", None, &right, write),
        undo("9", Some("2"), &wrong, write),
        undo("9", Some("3"), &right, write),
        intent("9", Channel::Model, "/v1/chat/completions", 1),
    ] {
        assert_eq!(append(&harness.next(vec![refused])).await, Err(Rule::ToolRollback));
        (harness.tree, harness.usage, harness.reserved) = (tree.clone(), usage, reserved.clone());
    }
    append(&harness.next(vec![undo("9", Some("2"), &right, write), outcome("9", 0)])).await.unwrap();
    let (tree, usage) = (harness.tree.clone(), harness.usage);
    assert_eq!(
        append(&harness.next(vec![undo("10", Some("2"), &right, write)])).await,
        Err(Rule::ToolRollback),
        "twice"
    );
    (harness.tree, harness.usage) = (tree, usage);
    append(&harness.next(vec![intent("10", Channel::Tool, "look", 0), outcome("10", 0)])).await.unwrap();

    // The next attempt continues from there, at any replica.
    let request = OpenRequest { attempt: 2, policy_digest: digest.clone() };
    let undoing =
        a.open(&at, &principal(2), &request, &digest, Some(&of), kept()).await.unwrap().state.undoing.unwrap();
    assert_eq!((undoing.state("2"), undoing.state("1")), (CompensationState::Undone, CompensationState::Due));
}

/// The salt, and that the pack has no place for results.
fn kept() -> (Salt, bool) {
    (testing::salt(), false)
}

#[tokio::test]
async fn of_two_segments_for_one_place_one_wins() {
    for _ in 0..20 {
        let Setup { bucket, a, b, .. } = setup();
        let mut harness = Harness::new(1);
        let opened = harness.opened();
        let first = harness.next(vec![opened]);
        append(&a, &first).await.unwrap();
        open(&b, 1).await.unwrap();
        let mut other = Harness { key: harness.key, tree: harness.tree.clone(), ..Harness::new(1) };
        let right = other.next(vec![intent("r", Channel::Tool, "search", 0)]);
        let mut harness = Harness { tree: tree_of(&first), key: other.key, ..Harness::new(1) };
        let left = harness.next(vec![intent("l", Channel::Tool, "write", 0)]);
        let (l, r) = tokio::join!(append(&a, &left), append(&b, &right));
        match (l, r) {
            (Ok(_), Err(rule)) | (Err(rule), Ok(_)) => assert_eq!(rule, Rule::LogFork),
            other => panic!("{other:?}"),
        }
        let (incidents, segments): (Vec<_>, Vec<_>) =
            bucket.keys().into_iter().partition(|key| key.contains("incidents"));
        assert_eq!((segments.len(), incidents.len()), (2, 1), "what has lost its place is kept beside the log");
    }
}

fn tree_of(request: &AppendRequest) -> crate::evidence::merkle::Tree {
    let segment = Segment::parse(request.segment.as_bytes()).unwrap();
    segment.records.iter().map(|r| leaf_hash(r)).collect()
}

#[tokio::test]
async fn the_same_segment_again_is_answered_the_same_by_any_replica() {
    let Setup { bucket, a, b, .. } = setup();
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    let (first, second) = (harness.next(vec![opened]), harness.next(vec![denied()]));
    let reply = append(&a, &first).await.unwrap();
    append(&a, &second).await.unwrap();
    for witness in [&a, &b] {
        let again = append(witness, &first).await.unwrap();
        assert_eq!((again.size, &again.checkpoint), (reply.size, &reply.checkpoint));
    }
    // Send to both at once, as a harness does whose first attempt has timed out.
    let third = harness.next(vec![denied()]);
    let (l, r) = tokio::join!(append(&a, &third), append(&b, &third));
    assert_eq!(l.unwrap().checkpoint, r.unwrap().checkpoint);
    assert_eq!(bucket.keys().len(), 3);
}

#[tokio::test]
async fn a_lost_reply_of_the_bucket_does_not_fork_the_log() {
    let Setup { bucket, a, b, .. } = setup();
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    let first = harness.next(vec![opened]);
    bucket.lose_reply.store(true, Ordering::SeqCst);
    assert_eq!(append(&a, &first).await.unwrap_err(), Rule::Evidence);
    assert_eq!(append(&b, &first).await.unwrap().size, 1);
    assert_eq!(append(&a, &harness.next(vec![denied()])).await.unwrap().size, 2);
}

#[tokio::test]
async fn without_the_bucket_nothing_is_acknowledged() {
    let Setup { bucket, a, .. } = setup();
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    let first = harness.next(vec![opened]);
    bucket.down.store(true, Ordering::SeqCst);
    assert_eq!(open(&a, 1).await.unwrap_err(), Rule::Evidence);
    assert_eq!(append(&a, &first).await.unwrap_err(), Rule::Evidence);
    assert_eq!(a.seal(&place(), &seal_request()).await.unwrap_err().rule, Rule::Evidence);
    assert_eq!(a.intent(&place(), 0).await.unwrap_err().rule, Rule::Evidence);
    bucket.down.store(false, Ordering::SeqCst);
    append(&a, &first).await.unwrap();
}

/// Appends two segments, of which the second is changed, and returns the rule that rejected it.
async fn refused(
    events: Vec<Event>,
    change: impl Fn(&mut Harness, &mut AppendRequest),
    tamper: fn(&mut Record),
) -> Rule {
    let Setup { bucket, a, .. } = setup();
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    append(&a, &harness.next(vec![opened])).await.unwrap();
    harness.tamper = tamper;
    let mut request = harness.next(events);
    change(&mut harness, &mut request);
    let rule = append(&a, &request).await.unwrap_err();
    assert_eq!(bucket.keys().len(), 1, "a refused segment is not stored");
    rule
}

#[tokio::test]
async fn broken_segments_are_refused() {
    let same = |_: &mut Harness, _: &mut AppendRequest| ();
    let keep: fn(&mut Record) = |_| ();
    let search = |call: &str| intent(call, Channel::Tool, "search", 0);
    let table: Vec<(&str, Rule, Rule)> = vec![
        (
            "another key",
            Rule::LogSegment,
            refused(
                vec![denied()],
                |h, r| {
                    let other = Harness { tree: h.tree.clone(), ..Harness::new(1) };
                    let mut segment = Segment::parse(r.segment.as_bytes()).unwrap();
                    segment.note = Note::sign(&segment.note.checkpoint().unwrap(), &other.key);
                    r.segment = String::from_utf8(segment.to_bytes()).unwrap();
                },
                keep,
            )
            .await,
        ),
        (
            "another root",
            Rule::LogSegment,
            refused(
                vec![denied()],
                |h, r| {
                    let mut segment = Segment::parse(r.segment.as_bytes()).unwrap();
                    let checkpoint = Checkpoint { root: [7; 32], ..segment.note.checkpoint().unwrap() };
                    segment.note = Note::sign(&checkpoint, &h.key);
                    r.segment = String::from_utf8(segment.to_bytes()).unwrap();
                },
                keep,
            )
            .await,
        ),
        (
            "another log",
            Rule::LogSegment,
            refused(
                vec![denied()],
                |h, r| {
                    let mut segment = Segment::parse(r.segment.as_bytes()).unwrap();
                    let checkpoint = Checkpoint { origin: note::origin("other"), ..segment.note.checkpoint().unwrap() };
                    segment.note = Note::sign(&checkpoint, &h.key);
                    r.segment = String::from_utf8(segment.to_bytes()).unwrap();
                },
                keep,
            )
            .await,
        ),
        (
            "signed twice",
            Rule::LogSegment,
            refused(
                vec![denied()],
                |_, r| {
                    let mut segment = Segment::parse(r.segment.as_bytes()).unwrap();
                    let line = segment.note.signatures[0].clone();
                    segment.note.signatures.push(line);
                    r.segment = String::from_utf8(segment.to_bytes()).unwrap();
                },
                keep,
            )
            .await,
        ),
        ("a gap", Rule::LogSegment, refused(vec![denied()], same, |r| r.seq += 1).await),
        ("first disagrees", Rule::LogSegment, refused(vec![denied()], |_, r| r.first = 2, keep).await),
        ("not text", Rule::LogSegment, refused(vec![denied()], |_, r| r.segment.truncate(40), keep).await),
        ("attempt of the request", Rule::IdentityAttempt, {
            let Setup { a, .. } = setup();
            let mut harness = Harness::new(1);
            let opened = harness.opened();
            let request = harness.next(vec![opened]);
            a.append(&place(), &principal(2), &request, Ok(&digest()), None).await.unwrap_err().rule
        }),
        ("attempt of the record", Rule::LogSegment, refused(vec![denied()], same, |r| r.attempt = 2).await),
        ("the gateway's name", Rule::LogSegment, refused(vec![denied()], same, |r| r.actor = Actor::Gateway).await),
        (
            "task.closed by the harness",
            Rule::LogSegment,
            refused(vec![Event::TaskClosed(seal_request().closed)], same, keep).await,
        ),
        ("version", Rule::LogSegment, refused(vec![denied()], same, |r| r.v = 2).await),
        ("time", Rule::LogSegment, refused(vec![denied()], same, |r| r.time = "now".into()).await),
        ("counter too low", Rule::LogSegment, refused(vec![denied()], same, |r| r.usage.denials = 0).await),
        ("counter shrinks", Rule::LogSegment, refused(vec![denied()], same, |r| r.usage.tokens = -1).await),
        ("call twice", Rule::LogSegment, refused(vec![search("1"), search("1")], same, keep).await),
        ("outcome of nothing", Rule::LogSegment, refused(vec![outcome("1", 0)], same, keep).await),
        (
            "two outcomes",
            Rule::LogSegment,
            refused(vec![search("1"), outcome("1", 0), outcome("1", 0)], same, keep).await,
        ),
        (
            "negative reservation",
            Rule::LogSegment,
            refused(vec![intent("1", Channel::Model, "/v1/messages", -1)], same, keep).await,
        ),
        (
            "one tool call more than the limit",
            Rule::ToolCalls,
            refused((0..4).map(|i| search(&i.to_string())).collect(), same, keep).await,
        ),
        (
            "one token more than the limit",
            Rule::Tokens,
            refused(vec![intent("1", Channel::Model, "/v1/messages", 1001)], same, keep).await,
        ),
        (
            "a call after the attempt closed",
            Rule::LogSegment,
            refused(
                vec![
                    Event::AttemptClosed(crate::evidence::record::AttemptClosed { reason: "agentEnded".into() }),
                    search("1"),
                ],
                same,
                keep,
            )
            .await,
        ),
    ];
    for (name, expected, found) in table {
        assert_eq!(found, expected, "{name}");
    }
}

#[tokio::test]
#[allow(clippy::type_complexity, reason = "a table: each row changes the opening in its own way")]
async fn an_attempt_opens_as_itself_contained_and_under_our_policy() {
    type Opening = fn(&mut Harness) -> Event;
    let table: Vec<(&str, Rule, Opening)> = vec![
        ("no opening", Rule::LogSegment, |_| denied()),
        ("another attempt's key", Rule::LogSegment, |h| {
            h.key = Signer::generate(&note::attempt_key_name(testing::UID, 2)).unwrap();
            h.opened()
        }),
        ("another task's key", Rule::LogSegment, |h| {
            h.key = Signer::generate(&note::attempt_key_name("other", 1)).unwrap();
            h.opened()
        }),
        ("not contained", Rule::ContainmentLost, |h| edit(h, |o| o.containment = contained(false))),
        ("another pod", Rule::LogSegment, |h| edit(h, |o| o.pod.uid = "pod-2".into())),
        ("another policy", Rule::ConfigDigest, |h| edit(h, |o| o.policy.limits.tool_calls = 99)),
    ];
    for (name, expected, event) in table {
        let Setup { a, .. } = setup();
        let mut harness = Harness::new(1);
        let event = event(&mut harness);
        assert_eq!(append(&a, &harness.next(vec![event])).await.unwrap_err(), expected, "{name}");
    }
}

#[test]
fn no_call_passes_a_limit_of_denials_or_cost() {
    let priced = |call: &str, cost: i64| {
        let Event::Intent(mut priced) = intent(call, Channel::Model, "/v1/messages", 10) else { panic!() };
        (priced.reserved_cost_micros, priced.model) = (cost, Some("m".into()));
        Event::Intent(priced)
    };
    let table: Vec<(Vec<Event>, Option<Rule>)> = vec![
        (vec![denied(), intent("1", Channel::Tool, "search", 0)], None),
        (vec![denied(), denied(), denied()], None),
        (vec![denied(), denied(), intent("1", Channel::Egress, "a.test:443", 0)], Some(Rule::Denials)),
        (vec![priced("1", 60), priced("2", 40)], None),
        (vec![priced("1", 60), priced("2", 41)], Some(Rule::Cost)),
        (vec![priced("1", 60), outcome("1", 10), priced("2", 100)], None),
        (vec![priced("1", -1)], Some(Rule::LogSegment)),
    ];
    for (events, expected) in table {
        let mut harness = Harness::new(1);
        let opened = edit(&harness, |opened| {
            opened.policy.limits.denials = Some(2);
            opened.policy.limits.cost_micros = Some(100);
            let price = ModelPrice {
                model: "m".into(),
                input_micros: 1_000_000,
                output_micros: 10_000_000,
                ..ModelPrice::default()
            };
            opened.policy.models.prices = vec![price];
        });
        assert_eq!(rule_against(&mut harness, &opened, &events), expected, "{events:?}");
    }
}

fn edit(harness: &Harness, change: impl Fn(&mut crate::evidence::record::AttemptOpened)) -> Event {
    let Event::AttemptOpened(mut opened) = harness.opened() else { panic!() };
    change(&mut opened);
    Event::AttemptOpened(opened)
}

/// Returns the rule that rejects a log of these events, if one does. Each `attempt.opened` among the events stands for a harness that opens
/// the log again.
fn rule_against(harness: &mut Harness, opened: &Event, events: &[Event]) -> Option<Rule> {
    let mut parts = events.split(|event| matches!(event, Event::AttemptOpened(_)));
    let extended = parts.try_fold(History::new(&note::origin(testing::UID)), |history, part| {
        let request = harness.next(std::iter::once(opened.clone()).chain(part.to_vec()).collect());
        let segment = Segment::parse(request.segment.as_bytes()).unwrap();
        history.extended(&segment)
    });
    extended.err().map(|refused| refused.rule)
}

#[tokio::test]
async fn the_newest_incarnation_of_a_harness_signs() {
    let Setup { a, b, .. } = setup();
    let mut old = Harness::new(1);
    let opened = old.opened();
    append(&a, &old.next(vec![opened])).await.unwrap();
    // The harness container restarts: a new key under the same name.
    let mut new = Harness { tree: old.tree.clone(), ..Harness::new(1) };
    let opened = new.opened();
    append(&b, &new.next(vec![opened])).await.unwrap();
    old.tree = new.tree.clone();
    assert_eq!(append(&a, &old.next(vec![denied()])).await.unwrap_err(), Rule::LogSegment);
    append(&a, &new.next(vec![denied()])).await.unwrap();
}

#[tokio::test]
async fn an_older_attempt_is_shut_out() {
    let Setup { a, b, .. } = setup();
    let mut first = Harness::new(1);
    let opened = first.opened();
    append(&a, &first.next(vec![opened])).await.unwrap();
    let mut second = Harness { tree: first.tree.clone(), ..Harness::new(2) };
    let opened = second.opened();
    append(&b, &second.next(vec![opened])).await.unwrap();
    assert_eq!(open(&a, 1).await.unwrap_err(), Rule::IdentityAttempt);
    assert_eq!(append(&a, &first.next(vec![denied()])).await.unwrap_err(), Rule::LogFork);
    first.tree = second.tree.clone();
    assert_eq!(append(&a, &first.next(vec![denied()])).await.unwrap_err(), Rule::IdentityAttempt);
}

#[tokio::test]
async fn nothing_follows_the_end() {
    let Setup { a, b, .. } = setup();
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    append(&a, &harness.next(vec![opened, intent("1", Channel::Tool, "search", 0)])).await.unwrap();
    assert!(a.intent(&place(), 1).await.is_ok());
    let sealed = b.seal(&place(), &seal_request()).await.unwrap();
    assert_eq!(sealed.size, 3);
    let late = harness.next(vec![outcome("1", 0)]);
    assert_eq!(append(&a, &late).await.unwrap_err(), Rule::TaskClosed);
    assert_eq!(append(&b, &late).await.unwrap_err(), Rule::TaskClosed);
    assert_eq!(open(&a, 1).await.unwrap_err(), Rule::TaskClosed);
    assert_eq!(a.intent(&place(), 1).await.unwrap_err().rule, Rule::TaskClosed);
    let after = Harness { tree: harness.tree.clone(), key: harness.key, ..Harness::new(1) }.next(vec![denied()]);
    assert_eq!(append(&a, &after).await.unwrap_err(), Rule::TaskClosed);
}

#[tokio::test]
async fn a_task_that_never_ran_is_sealed_too_and_a_gone_pack_leaves_its_retention() {
    let Setup { bucket, key, a, .. } = setup();
    let sealed = a.seal(&place(), &seal_request()).await.unwrap();
    assert_eq!((sealed.size, sealed.usage), (1, Usage::default()));
    let stored = Segment::parse(&bucket.get(&place().key(0)).await.unwrap()).unwrap();
    assert_eq!(stored.note.signatures.len(), 1);
    stored.note.verify_cosignature(&testing::verifier(&key)).unwrap();

    let Setup { bucket, a, .. } = setup();
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    append(&a, &harness.next(vec![opened])).await.unwrap();
    a.seal(&LogLocation { retention: None, ..place() }, &seal_request()).await.unwrap();
    let expected = Some(Retention { mode: Mode::Compliance, days: 30 });
    assert!(bucket.objects.lock().unwrap().values().all(|(_, r)| *r == expected));
}

#[tokio::test]
async fn seal_and_append_race() {
    for _ in 0..20 {
        let Setup { a, b, bucket, key } = setup();
        let mut harness = Harness::new(1);
        let opened = harness.opened();
        append(&a, &harness.next(vec![opened])).await.unwrap();
        let next = harness.next(vec![denied()]);
        let request = seal_request();
        let place = place();
        let (appended, sealed) = tokio::join!(append(&a, &next), b.seal(&place, &request));
        let sealed = sealed.unwrap();
        assert_eq!(sealed.size, if appended.is_ok() { 3 } else { 2 });
        let log = log::Log::read(&*bucket, &place.location.prefix, true).await.unwrap();
        let report = verify::verify(&log, &testing::verifier(&key), &verify::Expected::Anything);
        assert_eq!(report.summary.records, sealed.size, "{report:?}");
    }
}

#[tokio::test]
async fn an_intent_is_found_by_any_replica_and_only_if_it_is_one() {
    let Setup { a, b, .. } = setup();
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    append(&a, &harness.next(vec![opened, intent("1", Channel::Tool, "write", 0)])).await.unwrap();
    for witness in [&a, &b] {
        let found = witness.intent(&place(), 1).await.unwrap();
        assert_eq!((found.target.as_str(), found.attempt, found.open), ("write", 1, true));
        for seq in [0, 2, u64::MAX] {
            assert_eq!(witness.intent(&place(), seq).await.unwrap_err().rule, Rule::IntentMissing);
        }
    }
    append(&b, &harness.next(vec![outcome("1", 0)])).await.unwrap();
    assert!(!b.intent(&place(), 1).await.unwrap().open);
}

#[tokio::test]
async fn a_bucket_that_was_written_by_somebody_else_is_not_gone_on_from() {
    let Setup { bucket, a, .. } = setup();
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    append(&a, &harness.next(vec![opened])).await.unwrap();
    // The segment is well formed, signed by the attempt, and cosigned by another witness.
    let other = testing::replica(&testing::witness_key(), &Arc::new(Memory::default()));
    let mut segment = Segment::parse(harness.next(vec![denied()]).segment.as_bytes()).unwrap();
    segment.note.cosign(&other.signer, 1);
    bucket.create(&place().key(1), Bytes::from(segment.to_bytes()), None).await.unwrap();
    assert_eq!(open(&a, 1).await.unwrap_err(), Rule::Evidence);
    assert_eq!(a.seal(&place(), &seal_request()).await.unwrap_err().rule, Rule::Evidence);
}

#[tokio::test]
async fn lost_containment_is_recorded_and_no_call_follows_it() {
    let Setup { a, b, .. } = setup();
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    append(&a, &harness.next(vec![opened, intent("1", Channel::Tool, "write", 0)])).await.unwrap();
    assert!(a.intent(&place(), 1).await.is_ok());
    assert!(b.intent(&place(), 1).await.is_ok());
    let lost = Event::ContainmentChecked(contained(false));
    append(&a, &harness.next(vec![lost, intent("2", Channel::Tool, "search", 0)])).await.unwrap();
    for (witness, seq) in [(&a, 1), (&a, 3), (&b, 1), (&b, 3)] {
        assert_eq!(witness.intent(&place(), seq).await.unwrap_err().rule, Rule::ContainmentLost);
    }
    append(&b, &harness.next(vec![outcome("1", 0), outcome("2", 0)])).await.unwrap();
}

/// The pack requires a retention of 30 days in a mode that cannot be shortened.
#[tokio::test(start_paused = true)]
async fn nothing_begins_in_a_bucket_that_does_not_lock() {
    let Setup { bucket, a, .. } = setup();
    bucket.keeps_open.store(true, Ordering::SeqCst);
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    let first = harness.next(vec![opened]);
    assert_eq!(append(&a, &first).await.err(), Some(Rule::Evidence));
    // It is rejected as well when the object exists already. After another second a new cosignature makes other bytes.
    std::thread::sleep(Duration::from_millis(1100));
    for _ in 0..5 {
        assert_eq!(append(&a, &first).await.err(), Some(Rule::Evidence));
    }
    // Once an administrator has locked the object, the same segment is accepted.
    let retention = place().retention;
    bucket.objects.lock().unwrap().values_mut().for_each(|(_, lock)| *lock = retention);
    bucket.keeps_open.store(false, Ordering::SeqCst);
    append(&a, &first).await.unwrap();
}

#[tokio::test]
async fn a_write_is_over_for_a_replica_that_did_not_see_its_outcome() {
    let Setup { a, b, .. } = setup();
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    append(&a, &harness.next(vec![opened, intent("1", Channel::Tool, "write", 0)])).await.unwrap();
    assert!(b.intent(&place(), 1).await.unwrap().open);
    append(&a, &harness.next(vec![outcome("1", 0)])).await.unwrap();
    assert!(!b.intent(&place(), 1).await.unwrap().open);
}

#[rstest::rstest]
#[case("agentEnded", None)]
#[case("terminated", None)]
#[case("wallTime", Some(Rule::WallTime))]
#[case("denials", Some(Rule::Denials))]
#[case("unapproved", Some(Rule::ToolApproval))]
#[case("parked", Some(Rule::Evidence))]
#[case("whatever", Some(Rule::TaskClosed))]
#[tokio::test]
async fn an_attempt_that_is_over_does_not_open_again(#[case] reason: &str, #[case] expected: Option<Rule>) {
    let Setup { a, b, .. } = setup();
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    let closed = Event::AttemptClosed(crate::evidence::record::AttemptClosed { reason: reason.into() });
    append(&a, &harness.next(vec![opened])).await.unwrap();
    append(&a, &harness.next(vec![closed])).await.unwrap();
    // The other replica reads it from the bucket.
    assert_eq!(open(&b, 1).await.err(), expected);
    let opened = harness.opened();
    let again = append(&a, &harness.next(vec![opened])).await.err();
    assert_eq!(again, expected.map(|_| Rule::LogSegment), "whatever the harness has become");
    assert_eq!(open(&b, 2).await.err(), None, "another attempt");
}

/// What even a compromised harness can write about approvals, idempotency keys and handled data.
#[test]
fn one_call_by_an_approval_and_one_effect_under_a_key() {
    use crate::{
        evidence::record::{self, CallOutcome},
        policy::{
            access::Assessment,
            approval::{Answer, ApprovalSource, ApprovalState, Vote},
            config::{Approval, Idempotency, Sensitivity, VerifyRead},
        },
    };
    let vote = |decision| vec![Vote { by: "ana".into(), decision, reason: None }];
    let said = |state| record::Approval {
        name: "a".into(),
        uid: "u".into(),
        requested_by: ApprovalSource::Contract,
        tool: "write".into(),
        request_commitment: wide("d"),
        required: 1,
        expires: "2026-11-24T00:00:00Z".into(),
        reasons: vec![],
        state,
        decisions: match state {
            ApprovalState::Approved => vote(Answer::Approve),
            ApprovalState::Denied => vote(Answer::Deny),
            ApprovalState::Pending | ApprovalState::Expired => vec![],
        },
    };
    let decided = |state| Event::ApprovalDecided(said(state));
    let unvoted = |state| Event::ApprovalDecided(record::Approval { decisions: vec![], ..said(state) });
    let call = |id: &str, tool: &str, approval: Option<&str>, key: Option<&str>, digest: &str| {
        let Event::Intent(mut call) = intent(id, Channel::Tool, tool, 0) else { panic!() };
        (call.approvals, call.idempotency_key) = (approval.map(Into::into).into_iter().collect(), key.map(Into::into));
        call.request_commitment = Some(wide(digest));
        Event::Intent(call)
    };
    let by = |id: &str, approval| call(id, "write", approval, None, "d");
    let under = |id: &str, digest: &str| call(id, "search", None, Some("k"), digest);
    let ended = |id: &str, became: CallOutcome| {
        let Event::Outcome(mut ended) = outcome(id, 0) else { panic!() };
        ended.outcome = became;
        Event::Outcome(ended)
    };
    let given = |id: &str, response: Option<&str>, rule| {
        let Event::Outcome(mut ended) = outcome(id, 0) else { panic!() };
        (ended.response_commitment, ended.rule) = (response.map(wide), rule);
        Event::Outcome(ended)
    };
    let again = |id: &str| {
        Event::Replayed(record::Replayed {
            call: id.into(),
            target: "search".into(),
            idempotency_key: "k".into(),
            request_commitment: wide("d"),
            response_commitment: wide("r"),
        })
    };
    let assessed = |id: &str, arguments, seen| {
        let Event::Intent(mut call) = by(id, None) else { panic!() };
        call.assessment = Some(Assessment { arguments, seen, rules: vec![], risk: None });
        Event::Intent(call)
    };
    let answered = |id: &str, sensitivity| {
        let Event::Outcome(mut ended) = outcome(id, 0) else { panic!() };
        ended.sensitivity = sensitivity;
        Event::Outcome(ended)
    };
    let [plain, internal, secret] = [Sensitivity::Unclassified, Sensitivity::Internal, Sensitivity::Restricted];
    let (yes, no, asked) =
        (ApprovalState::Approved, ApprovalState::Denied, Event::ApprovalRequested(said(ApprovalState::Pending)));
    let table: Vec<(Vec<Event>, Option<Rule>)> = vec![
        (vec![asked.clone(), decided(yes), by("1", Some("a"))], None),
        (vec![asked.clone(), by("1", Some("a"))], Some(Rule::ToolApproval)),
        (vec![by("1", Some("a"))], Some(Rule::ToolApproval)),
        (vec![decided(no), by("1", Some("a"))], Some(Rule::ToolApproval)),
        (vec![decided(no), decided(yes)], Some(Rule::LogSegment)),
        (vec![unvoted(yes)], Some(Rule::LogSegment)),
        (vec![unvoted(no)], Some(Rule::LogSegment)),
        (vec![decided(yes), by("1", Some("a")), by("2", Some("a"))], Some(Rule::ToolApproval)),
        (vec![decided(yes), call("1", "search", Some("a"), Some("k"), "d")], Some(Rule::ToolApproval)),
        (vec![under("1", "d"), given("1", Some("r"), None), again("1")], None),
        (vec![under("1", "d"), given("1", Some("s"), None), again("1")], Some(Rule::LogSegment)),
        (vec![under("1", "d"), given("1", None, None), again("1")], Some(Rule::LogSegment)),
        (vec![under("1", "d"), given("1", Some("r"), Some(Rule::ToolOutput)), again("1")], Some(Rule::LogSegment)),
        (vec![under("1", "d"), again("1")], Some(Rule::LogSegment)),
        (vec![again("1")], Some(Rule::LogSegment)),
        (vec![under("1", "d"), under("2", "d")], Some(Rule::ToolIdempotency)),
        (vec![under("1", "d"), ended("1", CallOutcome::Applied), under("2", "d")], Some(Rule::ToolIdempotency)),
        (vec![under("1", "d"), ended("1", CallOutcome::Unknown), under("2", "d")], Some(Rule::ToolIdempotency)),
        (vec![under("1", "d"), ended("1", CallOutcome::Applied), under("2", "e")], Some(Rule::ToolIdempotency)),
        (vec![under("1", "d"), ended("1", CallOutcome::NotApplied), under("2", "e")], None),
        (vec![call("1", "search", None, None, "d")], Some(Rule::LogSegment)),
        (vec![call("1", "write", None, Some("k"), "d")], Some(Rule::LogSegment)),
        (vec![assessed("1", internal, plain), assessed("2", plain, internal)], None),
        (vec![assessed("1", internal, plain), assessed("2", plain, plain)], Some(Rule::LogSegment)),
        (vec![assessed("1", plain, internal)], Some(Rule::LogSegment)),
        (
            vec![by("1", None), answered("1", secret), assessed("2", internal, secret), assessed("3", plain, secret)],
            None,
        ),
        (vec![by("1", None), answered("1", secret), assessed("2", plain, plain)], Some(Rule::LogSegment)),
    ];
    let resolved =
        |id: &str, outcome, by: &str| Event::Resolved(record::Resolved { call: id.into(), outcome, by: by.into() });
    let lost = |id: &str| vec![by(id, None), ended(id, CallOutcome::Unknown)];
    let asks = |id: &str| call(id, "look", None, None, "d");
    let look = |id: &str, became| vec![asks(id), ended(id, became)];
    let read = |id: &str| look(id, CallOutcome::Applied);
    let listed = |id: &str| vec![intent(id, Channel::Listing, "look", 0), ended(id, CallOutcome::Applied)];
    let told = |id: &str, outcome, by| vec![resolved(id, outcome, by)];
    // Stands for another harness that opens the log at this point.
    let anew = || vec![Harness::new(1).opened()];
    let resolutions: Vec<(Vec<Vec<Event>>, Option<Rule>)> = vec![
        (vec![lost("1"), read("2"), told("1", CallOutcome::Applied, "2")], None),
        (vec![lost("1"), read("2"), told("1", CallOutcome::NotApplied, "2")], None),
        (vec![lost("1"), read("2"), told("1", CallOutcome::Unknown, "2")], Some(Rule::LogSegment)),
        (vec![lost("1"), told("1", CallOutcome::Applied, "2")], Some(Rule::LogSegment)),
        (vec![read("2"), lost("1"), told("1", CallOutcome::Applied, "2")], Some(Rule::LogSegment)),
        (vec![lost("1"), lost("2"), told("1", CallOutcome::Applied, "2")], Some(Rule::LogSegment)),
        (vec![read("1"), read("2"), told("1", CallOutcome::Applied, "2")], Some(Rule::LogSegment)),
        // A read that did not succeed resolves nothing.
        (
            vec![lost("1"), look("2", CallOutcome::NotApplied), told("1", CallOutcome::Applied, "2")],
            Some(Rule::LogSegment),
        ),
        (
            vec![lost("1"), look("2", CallOutcome::Unknown), told("1", CallOutcome::Applied, "2")],
            Some(Rule::LogSegment),
        ),
        (vec![lost("1"), vec![asks("2")], told("1", CallOutcome::Applied, "2")], Some(Rule::LogSegment)),
        (vec![lost("1"), listed("2"), told("1", CallOutcome::Applied, "2")], Some(Rule::LogSegment)),
        // The call gets an outcome after the read.
        (
            vec![
                vec![by("1", None)],
                anew(),
                read("2"),
                vec![ended("1", CallOutcome::Applied)],
                told("1", CallOutcome::Applied, "2"),
            ],
            Some(Rule::LogSegment),
        ),
        (
            vec![
                vec![by("1", None)],
                anew(),
                read("2"),
                vec![ended("1", CallOutcome::Unknown)],
                told("1", CallOutcome::Applied, "2"),
            ],
            Some(Rule::LogSegment),
        ),
        (
            vec![
                vec![by("1", None)],
                anew(),
                vec![ended("1", CallOutcome::Unknown)],
                read("2"),
                told("1", CallOutcome::Applied, "2"),
            ],
            None,
        ),
        // The call was lost with the first harness, and the read is later.
        (vec![vec![by("1", None)], anew(), read("2"), anew(), told("1", CallOutcome::Applied, "2")], None),
        // A name belongs to one call.
        (vec![lost("1"), lost("1")], Some(Rule::LogSegment)),
        (vec![read("1"), anew(), read("1")], Some(Rule::LogSegment)),
        (
            vec![lost("1"), read("2"), told("1", CallOutcome::Applied, "2"), told("1", CallOutcome::NotApplied, "2")],
            Some(Rule::LogSegment),
        ),
        // A call without an outcome is lost only when another harness opens the log.
        (vec![vec![by("1", None)], read("2"), told("1", CallOutcome::Applied, "2")], Some(Rule::LogSegment)),
        (vec![vec![by("1", None)], anew(), read("2"), told("1", CallOutcome::Applied, "2")], None),
        (vec![lost("1"), anew(), read("2"), told("1", CallOutcome::NotApplied, "2")], None),
        (vec![vec![by("1", None)], read("2"), anew(), told("1", CallOutcome::Applied, "2")], Some(Rule::LogSegment)),
        (
            vec![
                vec![by("1", None)],
                anew(),
                read("2"),
                told("1", CallOutcome::Applied, "2"),
                vec![ended("1", CallOutcome::Applied)],
            ],
            Some(Rule::LogSegment),
        ),
    ];
    let resolutions = resolutions.into_iter().map(|(parts, expected)| (parts.concat(), expected));
    for (events, expected) in table.into_iter().chain(resolutions) {
        let mut harness = Harness::new(1);
        let opened = edit(&harness, |opened| {
            opened.policy.limits.tool_calls = 10;
            let mut look = opened.policy.tools[0].clone();
            (look.name, look.idempotency) = ("look".into(), None);
            let write = opened.policy.tools.iter_mut().find(|tool| tool.name == "write").unwrap();
            write.verify = Some(VerifyRead {
                tool: "look".into(),
                arguments: BTreeMap::new(),
                applied: "result".into(),
                settle_seconds: 1,
            });
            write.approval = Some(Approval {
                when: Some("args.amount > 10".into()),
                ..crate::verify::tests::script::approval(&["ana"])
            });
            opened.policy.tools.push(look);
            let search = opened.policy.tools.iter_mut().find(|tool| tool.name == "search").unwrap();
            search.idempotency = Some(Idempotency { argument: Some("id".into()), header: None, window_seconds: 3600 });
        });
        assert_eq!(rule_against(&mut harness, &opened, &events), expected, "{events:?}");
    }
}

/// Returns a hash of a short text, so that tests can name commitments.
fn wide(short: &str) -> String {
    hex::encode(canonical::sha256(short.as_bytes()))
}

fn witnessed(request: AppendRequest) -> AppendRequest {
    AppendRequest { until: Until::Witnessed, ..request }
}

fn read(call: &str) -> Event {
    intent(call, Channel::Tool, "search", 0)
}

/// Opens a log at `a` and then takes its bucket down.
async fn opened_and_down(setup: &Setup) -> Harness {
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    append(&setup.a, &harness.next(vec![opened])).await.unwrap();
    setup.bucket.down.store(true, Ordering::SeqCst);
    harness
}

async fn verdict(setup: &Setup) -> verify::Report {
    let log = log::Log::read(&*setup.bucket, &place().location.prefix, true).await.unwrap();
    verify::verify(&log, &testing::verifier(&setup.key), &verify::Expected::Anything)
}

#[tokio::test(start_paused = true)]
async fn only_reads_and_model_calls_may_leave_before_the_bucket_has_its_intent() {
    let setup = setup();
    let Setup { bucket, a, b, .. } = &setup;
    let mut harness = opened_and_down(&setup).await;
    let reply = append(a, &witnessed(harness.next(vec![read("1")]))).await.unwrap();
    assert_eq!((reply.size, reply.checkpoint), (2, None));
    assert_eq!(a.intent(&place(), 1).await.unwrap().call, "1");
    append(a, &witnessed(harness.next(vec![intent("2", Channel::Tool, "write", 0)]))).await.unwrap();
    append(a, &witnessed(harness.next(vec![intent("3", Channel::Model, "/v1/messages", 1)]))).await.unwrap();
    append(a, &witnessed(harness.next(vec![intent("4", Channel::Egress, "docs.world.test:443", 0)]))).await.unwrap();
    assert_eq!(a.intent(&place(), 3).await.unwrap().reserved.tokens, 1);
    for seq in [2, 4] {
        assert_eq!(a.intent(&place(), seq).await.unwrap_err().rule, Rule::Evidence);
    }
    let stored = harness.next(vec![outcome("1", 0)]);
    assert_eq!(append(a, &stored).await.unwrap_err(), Rule::Evidence, "it is not stored, and that is said");
    // Nothing is sent again, and the taken segments are stored anyway.
    bucket.down.store(false, Ordering::SeqCst);
    a.settle().await;
    assert_eq!(b.intent(&place(), 2).await.unwrap().call, "2");
    let sealed = b.seal(&place(), &seal_request()).await.unwrap();
    assert_eq!(sealed.size, 7);
    let report = verdict(&setup).await;
    assert_eq!(report.verdict, verify::Verdict::Valid, "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn segments_on_their_way_become_one_object_but_for_another_signer() {
    let setup = setup();
    let Setup { bucket, a, b, .. } = &setup;
    let mut harness = opened_and_down(&setup).await;
    let segments: Vec<_> =
        (1..4).map(|n| harness.next(vec![read(&n.to_string()), outcome(&n.to_string(), 0)])).collect();
    for segment in &segments {
        append(a, &witnessed(segment.clone())).await.unwrap();
        append(a, &witnessed(segment.clone())).await.expect("again is as good");
    }
    let mut other = Harness { tree: tree_of_all(&segments[..1]), key: harness.key, ..Harness::new(1) };
    let forked = witnessed(other.next(vec![denied()]));
    assert_eq!(append(a, &forked).await.unwrap_err(), Rule::LogFork);
    // The harness restarts before the bucket is back. Its first segment begins with another key.
    let mut new = Harness { tree: harness.tree.clone(), usage: harness.usage, ..Harness::new(1) };
    let opened = new.opened();
    append(a, &witnessed(new.next(vec![opened]))).await.unwrap();
    append(a, &witnessed(new.next(vec![denied()]))).await.unwrap();
    bucket.down.store(false, Ordering::SeqCst);
    a.settle().await;
    assert_eq!(
        bucket.keys().iter().map(|key| &key[key.len() - 7..]).collect::<Vec<_>>(),
        ["0.jsonl", "1.jsonl", "7.jsonl"]
    );
    for witness in [a, b] {
        for segment in &segments {
            let again = append(witness, segment).await.unwrap();
            assert_eq!(again.size, segment.first + 2);
        }
        assert_eq!(append(witness, &forked).await.unwrap_err(), Rule::LogFork);
    }
    b.seal(&place(), &seal_request()).await.unwrap();
    let report = verdict(&setup).await;
    assert_eq!(report.verdict, verify::Verdict::Valid, "{report:?}");
}

/// Returns the tree over the opening record and these segments.
fn tree_of_all(segments: &[AppendRequest]) -> crate::evidence::merkle::Tree {
    let opening = segments[0].first;
    assert_eq!(opening, 1);
    let mut all = crate::evidence::merkle::Tree::new();
    all.push([0; 32]);
    for request in segments {
        let segment = Segment::parse(request.segment.as_bytes()).unwrap();
        segment.records.iter().for_each(|record| all.push(leaf_hash(record)));
    }
    all
}

#[tokio::test(start_paused = true)]
async fn what_was_on_its_way_when_the_log_went_another_is_refused_when_it_comes_again() {
    let setup = setup();
    let Setup { bucket, a, b, .. } = &setup;
    let mut harness = opened_and_down(&setup).await;
    let mut second = Harness { tree: harness.tree.clone(), ..Harness::new(2) };
    let late = harness.next(vec![read("1")]);
    append(a, &witnessed(late.clone())).await.unwrap();
    let after = harness.next(vec![outcome("1", 0)]);
    append(a, &witnessed(after.clone())).await.unwrap();
    bucket.down.store(false, Ordering::SeqCst);
    let opened = second.opened();
    append(b, &second.next(vec![opened])).await.unwrap();
    a.settle().await;
    assert_eq!(append(a, &late).await.unwrap_err(), Rule::LogFork);
    assert_eq!(append(a, &after).await.unwrap_err(), Rule::LogSegment);
    assert_eq!(a.intent(&place(), 1).await.unwrap_err().rule, Rule::IntentMissing);
    append(a, &second.next(vec![denied(), read("2")])).await.unwrap();
    assert_eq!(a.intent(&place(), 3).await.unwrap().call, "2", "the next attempt's calls leave");
    // A read may have left by its intent, so the segment is stored beside the log.
    let objects = bucket.objects.lock().unwrap().clone();
    let told: Vec<_> =
        objects.iter().filter(|(key, _)| key.contains("/incidents/")).map(|(_, (body, _))| body).collect();
    let told: Vec<serde_json::Value> = told.into_iter().map(|body| serde_json::from_slice(body).unwrap()).collect();
    assert_eq!(told.len(), 2, "{told:#?}");
    assert!(told.iter().any(|told| told["rule"] == "log.fork" && told["segment"] == late.segment), "{told:#?}");
    let report = verdict(&setup).await;
    assert_eq!(report.summary.incidents, 2, "{report:?}");
}

/// A harness sends one segment to one replica and a different segment in the same position to the other. Only one read leaves by it, and an
/// incident is recorded.
#[tokio::test(start_paused = true)]
async fn who_forks_its_own_log_is_let_out_no_more() {
    let setup = setup();
    let Setup { a, b, bucket, .. } = &setup;
    let mut harness = opened_and_down(&setup).await;
    let mut other = Harness { tree: harness.tree.clone(), ..Harness::new(1) };
    append(a, &witnessed(harness.next(vec![read("1")]))).await.unwrap();
    assert!(a.intent(&place(), 1).await.is_ok());
    bucket.down.store(false, Ordering::SeqCst);
    other.key = harness.key;
    append(b, &other.next(vec![read("2")])).await.unwrap();
    a.settle().await;
    append(a, &witnessed(other.next(vec![read("3")]))).await.unwrap();
    for seq in [1, 2] {
        assert_eq!(a.intent(&place(), seq).await.unwrap_err().rule, Rule::LogFork);
    }
    assert_eq!(bucket.keys().iter().filter(|key| key.contains("/incidents/")).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_replica_takes_no_segment_before_those_that_come_first() {
    let setup = setup();
    let Setup { bucket, a, b, .. } = &setup;
    let mut harness = opened_and_down(&setup).await;
    let (first, second) = (harness.next(vec![read("1")]), harness.next(vec![outcome("1", 0)]));
    append(a, &witnessed(first.clone())).await.unwrap();
    bucket.down.store(false, Ordering::SeqCst);
    // The other replica does not know the first segment yet. Its error has the harness send both.
    let refused = b.append(&place(), &principal(1), &witnessed(second.clone()), Ok(&digest()), None).await.unwrap_err();
    assert!(refused.is_retryable() && refused.rule == Rule::Evidence, "{refused}");
    assert!(b.intent(&place(), 1).await.unwrap_err().is_retryable(), "it may be on its way");
    for segment in [&first, &second] {
        append(b, segment).await.unwrap();
    }
    a.settle().await;
    assert_eq!(append(a, &second).await.unwrap().size, 3);
    a.seal(&place(), &seal_request()).await.unwrap();
    let report = verdict(&setup).await;
    assert_eq!(report.verdict, verify::Verdict::Valid, "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn only_so_much_is_on_its_way() {
    let setup = setup();
    let mut harness = opened_and_down(&setup).await;
    let mut taken = 0;
    let refused = loop {
        let request = witnessed(harness.next((0..500).map(|_| denied()).collect()));
        match setup.a.append(&place(), &principal(1), &request, Ok(&digest()), None).await {
            Ok(_) => taken += 500,
            Err(refused) => break refused,
        }
    };
    assert!(refused.is_retryable() && refused.rule == Rule::Busy, "{refused}");
    assert_eq!(taken, 4_000);
    setup.bucket.down.store(false, Ordering::SeqCst);
    setup.a.settle().await;
    assert_eq!(setup.bucket.keys().len(), 2);
    // The number of segments is bounded as well, however short they are.
    let setup = self::setup();
    let mut harness = opened_and_down(&setup).await;
    for _ in 0..64 {
        append(&setup.a, &witnessed(harness.next(vec![denied()]))).await.unwrap();
    }
    assert_eq!(append(&setup.a, &witnessed(harness.next(vec![denied()]))).await.unwrap_err(), Rule::Busy);
}

#[tokio::test(start_paused = true)]
async fn reads_do_not_leave_by_what_has_been_on_its_way_for_long() {
    let setup = setup();
    let mut harness = opened_and_down(&setup).await;
    append(&setup.a, &witnessed(harness.next(vec![read("1")]))).await.unwrap();
    assert!(setup.a.intent(&place(), 1).await.is_ok());
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(setup.a.intent(&place(), 1).await.unwrap_err().rule, Rule::Evidence);
    setup.bucket.down.store(false, Ordering::SeqCst);
    setup.a.settle().await;
    assert!(setup.a.intent(&place(), 1).await.is_ok());
}

mod counted;
mod differential;
mod rules;
