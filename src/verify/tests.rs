use bytes::Bytes;
use proptest::prelude::*;
use rstest::rstest;

use self::{
    forge::{Before, Witness, end, put},
    script::{
        Script, UID, approval, attempt_closed, change_intent, change_opened, denied, intent, lose, opened, outcome,
        record, resolved, task_closed,
    },
};
use super::*;
use crate::{
    canonical,
    evidence::{
        dsse::Envelope,
        ending::{PAYLOAD_TYPE, SUMMARY},
        note,
        note::{Note, Signer, WITNESS_NAME},
        record::{self, Actor, CallOutcome, Channel, Denied, Event, Record},
        rollback::{By, Plan, Step, Undo},
        segment::Segment,
        store::Mode,
    },
    policy::{
        access::{Assessment, Score},
        approval::{Answer, ApprovalSource, ApprovalState, Vote},
        config::{
            AccessRule, HttpMethod, HttpUpstream, Idempotency, ModelPrice, Risk, RiskTerm, RollbackOf, RuleDecision,
            Sensitivity, SideEffect, Upstream,
        },
        ledger,
        rule::Rule,
    },
};

mod documents;
pub(crate) mod forge;
mod rules;
pub(crate) mod script;

fn run(script: &Script, log: &Log) -> Report {
    verify(log, &script.witness.verifier(), &Expected::Origin(note::origin(UID)))
}

fn broken(report: &Report) -> Vec<Check> {
    report.findings.iter().filter(|f| f.weight == Weight::Broken).map(|f| f.rule).collect()
}

#[test]
fn a_good_log_is_valid() {
    let script = Script::good();
    let report = run(&script, &script.write());
    // The call that was lost with the first pod is reported, and is not a fault of the log.
    assert_eq!(report.findings.iter().map(|f| (f.rule, f.record)).collect::<Vec<_>>(), [(Check::CallOpen, Some(6))]);
    assert_eq!(report.verdict, Verdict::Valid);
    let summary = &report.summary;
    assert_eq!((summary.segments, summary.records), (7, 13));
    assert_eq!(summary.origin.as_deref(), Some("belay.dev/task/6f9c3c1e-0000-4000-8000-000000000001"));
    assert_eq!((summary.usage.tool_calls, summary.usage.tokens, summary.usage.denials), (3, 120, 1));
    assert_eq!((summary.outcomes.applied, summary.outcomes.open), (3, 1));
    assert_eq!(
        summary.attempts.iter().map(|a| (a.number, a.closed.as_deref())).collect::<Vec<_>>(),
        [(1, None), (2, Some("agentEnded"))]
    );
    assert_eq!(summary.kinds["call.intent"], 4);
    assert_eq!(summary.locks.as_ref().and_then(|l| l.mode), Some(Mode::Compliance));
    assert_eq!(summary.witnessed, Some(1_795_000_012));
}

#[test]
fn a_log_with_listings_tighter_effects_and_limits_that_hold_is_valid() {
    let mut script = Script::good();
    change_opened(&mut script, 7, |o| {
        o.policy.tools[1].limits.calls = Some(2);
        let Upstream::Mcp(mcp) = &mut o.policy.tools[1].upstream else { panic!() };
        mcp.digest = Some("0d".repeat(32));
    });
    let listing = record(2, intent("e", Channel::Listing, "other", 0));
    script.segments[4].extend([listing, record(2, intent("f", Channel::Tool, "search", 0))]);
    script.count();
    // The upstream itself says that the tool changes something.
    change_intent(&mut script, 10, |i| i.side_effect = Some(SideEffect::Write));
    let report = run(&script, &script.write());
    assert_eq!((report.verdict, broken(&report)), (Verdict::Valid, vec![]), "{:?}", report.findings);
    assert_eq!(report.summary.usage.tool_calls, 4);
}

fn ignored() -> Event {
    let Event::Denied(of) = denied("telemetry.world.test:443") else { panic!() };
    Event::Denied(Denied { rule: Rule::EgressIgnored, ..of })
}

#[test]
fn refusals_of_ignored_hosts_end_nothing() {
    let mut script = Script::good();
    for seq in [0, 7] {
        change_opened(&mut script, seq, |o| {
            o.policy.limits.denials = Some(1);
            o.policy.ignored_hosts = vec!["telemetry.world.test".into()];
        });
    }
    // The control is a denial that counts: see `a_call_after_the_last_denial`.
    script.at(4).event = ignored();
    let report = run(&script, &script.write());
    assert_eq!((report.verdict, broken(&report)), (Verdict::Valid, vec![]), "{:?}", report.findings);
    assert_eq!(report.summary.usage.denials, 1);
}

#[test]
fn a_task_that_never_ran_has_a_valid_log_of_one_record() {
    let mut script = Script::good();
    script.segments = vec![vec![record(0, task_closed())]];
    script.count();
    let report = run(&script, &script.write());
    assert_eq!((report.verdict, report.findings.len()), (Verdict::Valid, 0), "{:?}", report.findings);
}

/// Lies that the writers could tell: everything is signed, and one thing does not follow.
#[rstest]
#[case::sequence(Check::SegmentForm, Some(2), |s: &mut Script| s.at(2).seq = 5)]
#[case::version(Check::RecordForm, Some(3), |s: &mut Script| s.at(3).v = 0)]
#[case::time(Check::RecordTime, Some(3), |s: &mut Script| s.at(3).time = "yesterday".into())]
#[case::time_to_the_second(Check::RecordTime, Some(3), |s: &mut Script| s.at(3).time = "2026-11-23T10:00:00Z".into())]
#[case::time_elsewhere(Check::RecordTime, Some(3), |s: &mut Script| s.at(3).time = "2026-11-23T10:00:00.000+00:00".into())]
#[case::a_commitment_that_is_no_digest(Check::RecordForm, Some(6), |s: &mut Script| change_intent(s, 6, |i| i.request_commitment = Some("AB".repeat(32))))]
#[case::actor_gateway(Check::RecordActor, Some(5), |s: &mut Script| s.at(5).actor = Actor::Gateway)]
#[case::actor_harness(Check::RecordActor, Some(12), |s: &mut Script| { s.at(12).actor = Actor::Harness; })]
#[case::gateway_writes_calls(Check::RecordActor, Some(6), |s: &mut Script| s.at(6).actor = Actor::Gateway)]
#[case::attempt_goes_back(Check::AttemptOrder, Some(9), |s: &mut Script| s.segments[5].iter_mut().for_each(|r| r.attempt = 1))]
#[case::attempt_zero(Check::AttemptOrder, Some(0), |s: &mut Script| { let key = Signer::generate(&note::attempt_key_name(UID, 0)).unwrap(); s.at(0).attempt = 0; s.at(0).event = opened(&key, 0); s.keys.insert(0, key); })]
#[case::two_attempts_in_a_segment(Check::AttemptOrder, Some(4), |s: &mut Script| s.at(4).attempt = 2)]
#[case::not_opened(Check::AttemptOpen, Some(0), |s: &mut Script| { s.at(0).event = denied("x"); })]
#[case::opened_within_a_segment(Check::AttemptOpen, Some(9), |s: &mut Script| { let again = s.at(7).event.clone(); s.segments[4].push(record(2, again)); })]
#[case::not_opened_again(Check::AttemptOpen, Some(7), |s: &mut Script| { s.at(7).event = denied("x"); })]
#[case::call_after_closing(Check::AttemptOpen, Some(12), |s: &mut Script| s.segments[5].push(record(2, denied("x"))))]
#[case::not_contained(Check::AttemptContained, Some(0), |s: &mut Script| change_opened(s, 0, |o| o.containment.contained = false))]
#[case::breach_at_opening(Check::AttemptContained, Some(0), |s: &mut Script| change_opened(s, 0, |o| o.containment.breaches = vec!["10.0.0.1:443".into()]))]
#[case::policy_of_another_task(Check::AttemptTask, Some(0), |s: &mut Script| change_opened(s, 0, |o| { o.policy.task.uid = "other".into(); }))]
#[case::key_of_another_attempt(Check::AttemptKey, Some(7), |s: &mut Script| { let key = s.keys[&1].verifier().to_string(); change_opened(s, 7, |o| o.verifier_key = key); })]
#[case::key_unreadable(Check::AttemptKey, Some(0), |s: &mut Script| change_opened(s, 0, |o| o.verifier_key = "none".into()))]
#[case::call_after_containment_was_lost(Check::ContainmentLost, Some(11), |s: &mut Script| {
    s.at(10).event = lost();
    s.segments[5].insert(2, record(2, intent("e", Channel::Tool, "search", 0)));
    s.count();
})]
#[case::same_call_twice(Check::CallUnique, Some(8), |s: &mut Script| s.at(8).event = intent("a", Channel::Tool, "write", 0))]
#[case::outcome_without_intent(Check::CallOutcome, Some(9), |s: &mut Script| s.at(9).event = outcome("z", 0))]
#[case::outcome_before_intent(Check::CallOutcome, Some(1), |s: &mut Script| { s.at(1).event = outcome("a", 0); s.at(3).event = intent("a", Channel::Tool, "search", 0); s.count(); })]
#[case::second_outcome(Check::CallOutcome, Some(4), |s: &mut Script| s.at(4).event = outcome("a", 0))]
#[case::outcome_in_another_attempt(Check::CallOutcome, Some(9), |s: &mut Script| s.at(9).event = outcome("c", 0))]
#[case::unknown_tool(Check::CallPolicy, Some(6), |s: &mut Script| change_intent(s, 6, |i| i.target = "shell".into()))]
#[case::effect_that_the_contract_lacks(Check::CallPolicy, Some(6), |s: &mut Script| change_intent(s, 6, |i| i.side_effect = Some(SideEffect::Read)))]
#[case::no_definition(Check::CallPolicy, Some(6), |s: &mut Script| change_intent(s, 6, |i| i.definition_digest = None))]
#[case::another_definition_in_the_attempt(Check::CallPolicy, Some(9), |s: &mut Script| {
    s.segments[4].push(record(2, intent("e", Channel::Tool, "write", 0)));
    s.count();
    change_intent(s, 9, |i| i.definition_digest = Some("ff".repeat(32)));
})]
#[case::another_definition_than_the_pin(Check::CallPolicy, Some(8), |s: &mut Script| change_opened(s, 7, |o| {
    let Upstream::Mcp(mcp) = &mut o.policy.tools[2].upstream else { panic!() };
    mcp.digest = Some("ff".repeat(32));
}))]
#[case::definition_of_an_http_tool(Check::CallPolicy, Some(8), |s: &mut Script| change_opened(s, 7, |o| {
    let url = "https://tools.world.test/".into();
    o.policy.tools[2].upstream = Upstream::Http(HttpUpstream { method: HttpMethod::Post, url, query: vec![] });
}))]
#[case::too_many_calls_of_a_tool(Check::UsageLimit, Some(8), |s: &mut Script| change_opened(s, 7, |o| {
    o.policy.tools[2].limits.calls = Some(1);
}))]
#[case::too_many_bytes(Check::CallPolicy, Some(6), |s: &mut Script| change_intent(s, 6, |i| i.request_bytes = 4097))]
#[case::effect_that_the_class_forbids(Check::CallPolicy, Some(6), |s: &mut Script| change_intent(s, 6, |i| { i.target = "mail".into(); i.side_effect = Some(SideEffect::External); }))]
#[case::tool_calls_not_counted(Check::UsageCount, Some(6), |s: &mut Script| s.segments.iter_mut().flatten().skip(6).for_each(|r| r.usage.tool_calls -= 1))]
#[case::denials_not_counted(Check::UsageCount, Some(4), |s: &mut Script| s.at(4).usage.denials = 0)]
#[case::tokens_shrink(Check::UsageCount, Some(9), |s: &mut Script| s.at(9).usage.tokens = 0)]
#[case::reservation_not_counted(Check::UsageCount, Some(2), |s: &mut Script| s.at(2).usage.tokens = 0)]
#[case::settlement_not_counted(Check::UsageCount, Some(5), |s: &mut Script| s.at(5).usage.tokens = 300)]
#[case::negative_reservation(Check::UsageCount, Some(2), |s: &mut Script| { change_intent(s, 2, |i| i.reserved_tokens = -5); s.count(); })]
#[case::negative_tokens(Check::UsageCount, Some(5), |s: &mut Script| { s.at(5).event = outcome("b", -1); s.count(); })]
#[case::too_many_tokens(Check::UsageLimit, Some(2), |s: &mut Script| { change_intent(s, 2, |i| i.reserved_tokens = 1001); s.count(); })]
#[case::too_many_calls(Check::UsageLimit, Some(9), |s: &mut Script| {
    for call in ["e", "f"] { s.segments[4].push(record(2, intent(call, Channel::Tool, "search", 0))); }
    s.at(7).event = opened_with(s, |o| o.policy.limits.tool_calls = 3);
    s.count();
})]
#[case::a_call_after_the_last_denial(Check::UsageLimit, Some(8), |s: &mut Script| s.at(7).event = opened_with(s, |o| o.policy.limits.denials = Some(1)))]
#[case::ignored_though_no_host_is(Check::CallPolicy, Some(4), |s: &mut Script| s.at(4).event = ignored())]
#[case::a_model_without_a_price(Check::CallPolicy, Some(8), |s: &mut Script| { priced(s, "x", 300, 100); })]
#[case::a_cost_below_its_price(Check::CallPolicy, Some(8), |s: &mut Script| { priced(s, "m", 300, 299); })]
#[case::a_cost_above_its_price(Check::CallPolicy, Some(8), |s: &mut Script| { priced(s, "m", 300, 601); })]
#[case::too_dear(Check::UsageLimit, Some(8), |s: &mut Script| { priced(s, "m", 300, 501); })]
#[case::a_tool_that_costs(Check::CallPolicy, Some(3), |s: &mut Script| { s.at(3).event = intent("x", Channel::Tool, "write", 0); change_intent(s, 3, |i| i.reserved_cost_micros = 1); s.count(); })]
#[case::negative_cost(Check::UsageCount, Some(2), |s: &mut Script| { change_intent(s, 2, |i| i.reserved_cost_micros = -5); s.count(); })]
#[case::after_the_end(Check::TaskAfterEnd, Some(13), |s: &mut Script| { s.segments.push(vec![record(2, task_closed())]); s.count(); })]
#[case::a_second_end_in_one_segment(Check::TaskAfterEnd, Some(13), |s: &mut Script| { s.segments[6].push(record(2, task_closed())); s.count(); })]
fn lies_of_the_writers_are_found(#[case] rule: Check, #[case] at: Option<u64>, #[case] lie: fn(&mut Script)) {
    let mut script = Script::good();
    lie(&mut script);
    // A case that adds records leaves the numbering to the script, unless the numbering is the lie.
    if rule != Check::SegmentForm && rule != Check::UsageCount {
        script.count();
    }
    let report = run(&script, &script.write());
    assert_eq!(report.verdict, Verdict::Invalid, "{:?}", report.findings);
    let found: Vec<_> = report.findings.iter().filter(|f| f.rule == rule).map(|f| f.record).collect();
    assert!(found.first() == Some(&at), "expected {rule} at {at:?}, found {:#?}", report.findings);
}

/// A writer with a later form says so, and the witness has signed the log, so it is up to a later verifier. Without the witness's signature
/// the log is invalid.
#[test]
fn a_log_that_goes_on_in_a_later_version_is_neither_valid_nor_forged() {
    let mut script = Script::good();
    script.at(3).v = 2;
    let log = script.write();
    let report = run(&script, &log);
    assert_eq!(report.verdict, Verdict::Newer, "{:?}", report.findings);
    let found: Vec<_> = report.findings.iter().map(|f| (f.rule, f.record)).collect();
    assert!(found.contains(&(Check::RecordVersion, Some(3))), "{found:?}");
    let other = Script::good().witness.verifier();
    assert_eq!(verify(&log, &other, &Expected::Anything).verdict, Verdict::Invalid);
    // A violation before the later version stays a violation.
    script.at(1).time = "yesterday".into();
    assert_eq!(run(&script, &script.write()).verdict, Verdict::Invalid);
}

fn lost() -> Event {
    let mut seen = script::contained();
    seen.contained = false;
    seen.breaches = vec!["10.96.0.1:443".to_owned()];
    Event::ContainmentChecked(seen)
}

fn opened_with(script: &Script, change: impl FnOnce(&mut crate::evidence::record::AttemptOpened)) -> Event {
    let Event::AttemptOpened(mut opened) = opened(&script.keys[&2], 2) else { unreachable!() };
    change(&mut opened);
    Event::AttemptOpened(opened)
}

/// The second attempt may spend 500. The model costs 1 for a prompt token and 2 for a reply token. The attempt calls this model.
fn priced(script: &mut Script, model: &str, tokens: i64, cost: i64) {
    script.at(7).event = opened_with(script, |o| {
        o.policy.limits.cost_micros = Some(500);
        let (input_micros, output_micros) = (1_000_000, 2_000_000);
        o.policy.models.prices =
            vec![ModelPrice { model: "m*".into(), input_micros, output_micros, ..ModelPrice::default() }];
    });
    script.at(8).event = intent("d", Channel::Model, "/v1/chat/completions", tokens);
    change_intent(script, 8, |i| {
        i.model = Some(model.to_owned());
        i.reserved_cost_micros = cost;
    });
    script.count();
}

#[test]
fn a_priced_call_is_valid_and_an_overrun_is_a_note() {
    let mut script = Script::good();
    priced(&mut script, "m", 300, 450);
    let Event::Outcome(outcome) = &mut script.at(9).event else { panic!("record 9 is no call.outcome") };
    (outcome.tokens, outcome.cost_micros) = (300, 520);
    script.count();
    let report = run(&script, &script.write());
    assert_eq!(report.verdict, Verdict::Valid, "{:?}", report.findings);
    assert!(report.findings.iter().any(|f| f.rule == Check::UsageOverrun && f.record == Some(9)));
    assert_eq!(report.summary.usage.cost_micros, 520);
}

/// What other parties could do to the stored objects, without the keys or with some of them.
#[rstest]
#[case::foreign_object(Check::StoreKey, |_: &Script, log: &mut Log| { log.segments.insert("segments/notes.txt".into(), Bytes::new()); })]
#[case::incident_renamed(Check::StoreIncident, |_: &Script, log: &mut Log| { log.incidents.insert("incidents/00.json".into(), Bytes::from_static(b"{}")); })]
#[case::second_version(Check::StoreVersions, |_: &Script, log: &mut Log| { let mut v = versions(log)[2].clone(); v.version_id = "later".into(); versions(log).push(v); })]
#[case::delete_marker(Check::StoreDeleted, |_: &Script, log: &mut Log| { let mut v = versions(log)[2].clone(); v.delete_marker = true; v.version_id = "marker".into(); versions(log).push(v); })]
#[case::hidden(Check::StoreDeleted, |_: &Script, log: &mut Log| { let mut v = versions(log)[6].clone(); v.delete_marker = true; versions(log)[6].is_latest = false; versions(log).push(v); log.segments.remove(&Segment::key(12)); })]
#[case::no_lock(Check::StoreRetention, |_: &Script, log: &mut Log| versions(log)[0].retain_until = None)]
#[case::no_mode(Check::StoreRetention, |_: &Script, log: &mut Log| versions(log)[0].mode = None)]
#[case::lock_ended_before_it_began(Check::StoreRetention, |_: &Script, log: &mut Log| versions(log)[0].retain_until = versions(log)[0].written)]
#[case::cut_off(Check::SegmentForm, |_: &Script, log: &mut Log| { let b = log.segments[&Segment::key(3)].clone(); log.segments.insert(Segment::key(3), b.slice(..b.len() - 5)); })]
#[case::renamed(Check::SegmentKey, |_: &Script, log: &mut Log| { let b = log.segments.remove(&Segment::key(12)).unwrap(); log.segments.insert(Segment::key(13), b); })]
#[case::first_missing(Check::SegmentOrder, |_: &Script, log: &mut Log| { log.segments.remove(&Segment::key(0)); })]
#[case::one_missing(Check::SegmentOrder, |_: &Script, log: &mut Log| { log.segments.remove(&Segment::key(3)); })]
#[case::record_changed(Check::CheckpointRoot, |_: &Script, log: &mut Log| edit(log, 3, |s| {
    let mut r: Record = serde_json::from_slice(&s.records[1]).unwrap();
    r.event = denied("elsewhere.world.test:443");
    s.records[1] = canonical::to_bytes(&r).unwrap();
}))]
#[case::record_dropped(Check::CheckpointRoot, |_: &Script, log: &mut Log| edit(log, 3, |s| { s.records.pop(); }))]
#[case::document_changed(Check::SegmentForm, |_: &Script, log: &mut Log| edit_text(log, |text| text.replacen("\"toolCalls\":4", "\"toolCalls\":5", 1)))]
#[case::document_and_its_digest_changed(Check::RecordForm, |_: &Script, log: &mut Log| edit(log, 0, |s| s.documents[0] = b"{}".to_vec()))]
#[case::document_missing(Check::RecordForm, |_: &Script, log: &mut Log| edit(log, 0, |s| s.documents.clear()))]
#[case::document_more(Check::RecordForm, |_: &Script, log: &mut Log| edit(log, 3, |s| s.documents.push(b"{}".to_vec())))]
#[case::document_with_a_field_more(Check::CheckpointRoot, |_: &Script, log: &mut Log| edit_policy(log, |policy| policy["extra"] = true.into()))]
#[case::document_of_another_policy(Check::CheckpointRoot, |_: &Script, log: &mut Log| edit_policy(log, |policy| policy["limits"]["toolCalls"] = 9.into()))]
#[case::checkpoint_of_another_size(Check::CheckpointRoot, |script: &Script, log: &mut Log| edit(log, 3, |s| {
    let checkpoint = note::Checkpoint { size: 7, ..s.note.checkpoint().unwrap() };
    resign(s, &checkpoint, script);
}))]
#[case::checkpoint_of_another_log(Check::CheckpointOrigin, |script: &Script, log: &mut Log| edit(log, 3, |s| {
    let checkpoint = note::Checkpoint { origin: note::origin("other"), ..s.note.checkpoint().unwrap() };
    resign(s, &checkpoint, script);
}))]
#[case::no_witness(Check::CheckpointWitness, |_: &Script, log: &mut Log| edit(log, 3, |s| { s.note.signatures.pop(); }))]
#[case::another_witness(Check::CheckpointWitness, |_: &Script, log: &mut Log| edit(log, 3, |s| { s.note.signatures.pop(); s.note.cosign(&Signer::generate(WITNESS_NAME).unwrap(), 1); }))]
#[case::witness_time_changed(Check::CheckpointWitness, |_: &Script, log: &mut Log| edit(log, 3, |s| s.note.signatures[1].bytes[0] = 1))]
#[case::witness_signature_of_another_segment(Check::CheckpointWitness, |_: &Script, log: &mut Log| { let other = segment(log, 0).note.signatures[1].clone(); edit(log, 3, |s| s.note.signatures[1] = other); })]
#[case::no_attempt_signature(Check::CheckpointAttempt, |_: &Script, log: &mut Log| edit(log, 3, |s| { s.note.signatures.remove(0); }))]
#[case::attempt_signature_of_the_other_attempt(Check::CheckpointAttempt, |script: &Script, log: &mut Log| edit(log, 3, |s| {
    let mut note = Note::sign(&s.note.checkpoint().unwrap(), &script.keys[&2]);
    note.cosign(&script.witness, 1);
    s.note = note;
}))]
#[case::harness_plays_gateway(Check::CheckpointSignatures, |script: &Script, log: &mut Log| edit(log, 12, |s| {
    let mut note = Note::sign(&s.note.checkpoint().unwrap(), &script.keys[&2]);
    note.cosign(&script.witness, 1);
    s.note = note;
}))]
#[case::tile_changed(Check::EndTiles, |_: &Script, log: &mut Log| { let tile = log.ending.get_mut("tlog/tile/0/000.p/13").unwrap(); *tile = Bytes::from(vec![0; tile.len()]); })]
#[case::entries_changed(Check::EndTiles, |_: &Script, log: &mut Log| { let bundle = log.ending.get_mut("tlog/tile/entries/000.p/13").unwrap(); *bundle = bundle.slice(1..); })]
#[case::another_checkpoint(Check::EndTiles, |_: &Script, log: &mut Log| { let earlier = segment(log, 3).note.to_string(); log.ending.insert("tlog/checkpoint".into(), earlier.into()); })]
#[case::a_file_more(Check::EndTiles, |_: &Script, log: &mut Log| { log.ending.insert("tlog/tile/0/000".into(), Bytes::new()); })]
#[case::an_end_before_the_end(Check::EndTiles, |_: &Script, log: &mut Log| { log.segments.remove(&Segment::key(12)); })]
#[case::summary_of_another(Check::EndSummary, |script: &Script, log: &mut Log| { let text = Envelope::sign(PAYLOAD_TYPE, b"{}", &script.witness).to_bytes().unwrap(); log.ending.insert(SUMMARY.into(), text.into()); })]
#[case::summary_by_another(Check::EndSummary, |_: &Script, log: &mut Log| { end(log, Ok(&Signer::generate(WITNESS_NAME).unwrap())); })]
#[case::summary_changed(Check::EndSummary, |_: &Script, log: &mut Log| { let text = log.ending.get_mut(SUMMARY).unwrap(); *text = text.slice(..text.len() - 1); })]
#[case::summary_unlocked(Check::StoreRetention, |_: &Script, log: &mut Log| versions(log).iter_mut().find(|version| version.key == SUMMARY).unwrap().retain_until = None)]
#[case::one_more_signature(Check::CheckpointSignatures, |_: &Script, log: &mut Log| edit(log, 3, |s| s.note.cosign(&Signer::generate("else.example").unwrap(), 1)))]
fn tampering_with_the_store_is_found(#[case] rule: Check, #[case] tamper: fn(&Script, &mut Log)) {
    let script = Script::good();
    let mut log = script.write();
    tamper(&script, &mut log);
    let report = run(&script, &log);
    assert_eq!(report.verdict, Verdict::Invalid, "{:?}", report.findings);
    assert!(broken(&report).contains(&rule), "expected {rule}, found {:#?}", report.findings);
}

fn versions(log: &mut Log) -> &mut Vec<crate::evidence::store::StoredObject> {
    log.versions.as_mut().unwrap()
}

fn segment(log: &Log, first: u64) -> Segment {
    Segment::parse(&log.segments[&Segment::key(first)]).unwrap()
}

fn edit(log: &mut Log, first: u64, change: impl FnOnce(&mut Segment)) {
    let mut segment = segment(log, first);
    change(&mut segment);
    put(log, &segment);
}

/// Changes the first segment as text.
fn edit_text(log: &mut Log, change: impl FnOnce(String) -> String) {
    let key = Segment::key(0);
    let text = change(String::from_utf8(log.segments[&key].to_vec()).unwrap());
    log.segments.insert(key, text.into());
}

/// Changes the policy that the first record names, and its digest wherever it occurs.
fn edit_policy(log: &mut Log, change: impl FnOnce(&mut serde_json::Value)) {
    edit(log, 0, |segment| {
        let mut policy = serde_json::from_slice(&segment.documents[0]).unwrap();
        change(&mut policy);
        let [before, after] = [segment.documents[0].clone(), canonical::to_bytes(&policy).unwrap()]
            .map(|policy| (hex::encode(canonical::sha256(&policy)), policy));
        let record = String::from_utf8(segment.records[0].clone()).unwrap();
        segment.records[0] = record.replace(&before.0, &after.0).into_bytes();
        segment.documents[0] = after.1;
    });
}

fn resign(segment: &mut Segment, checkpoint: &note::Checkpoint, script: &Script) {
    segment.note = Note::sign(checkpoint, &script.keys[&1]);
    segment.note.cosign(&script.witness, 1);
}

#[test]
fn a_field_that_no_record_has_is_refused() {
    let script = Script::good();
    let mut log = script.write();
    // A last segment with a smuggled field, and with a matching root and matching signatures.
    let mut last = segment(&log, 12);
    let text = String::from_utf8(last.records[0].clone()).unwrap().replace("\"v\":1", "\"v\":1,\"w\":0");
    last.records[0] = text.into_bytes();
    let mut tree = crate::evidence::merkle::Tree::new();
    for first in [0, 1, 3, 6, 7, 9] {
        tree = segment(&log, first).extend(&tree).unwrap();
    }
    tree.push(crate::evidence::merkle::leaf_hash(&last.records[0]));
    last.note = Note::unsigned(&note::Checkpoint { origin: note::origin(UID), size: 13, root: tree.root() });
    last.note.cosign(&script.witness, 1);
    put(&mut log, &last);
    let report = run(&script, &log);
    assert_eq!(broken(&report), [Check::RecordForm]);
    assert_eq!(report.findings[0].record, Some(12));
}

#[test]
fn a_log_that_is_not_at_its_end_is_incomplete() {
    let script = Script::good();
    let mut log = script.write();
    log.segments.remove(&Segment::key(12));
    // The tiles and the summary show that the end of the log was removed.
    assert!(broken(&run(&script, &log)).contains(&Check::EndTiles));
    log.ending.clear();
    let report = run(&script, &log);
    assert_eq!(report.verdict, Verdict::Incomplete);
    assert_eq!(report.findings.iter().map(|f| f.rule).collect::<Vec<_>>(), [Check::CallOpen, Check::TaskClosed]);
    let nothing = run(&script, &Log::default());
    assert_eq!((nothing.verdict, nothing.findings[0].rule), (Verdict::Incomplete, Check::LogEmpty));
}

#[test]
fn the_head_in_the_status_is_compared() {
    let script = Script::good();
    let log = script.write();
    let head = segment(&log, 12).note.checkpoint().unwrap();
    let witness = script.witness.verifier();
    assert_eq!(verify(&log, &witness, &Expected::Head(head.clone())).verdict, Verdict::Valid);
    let mut shorter = log.clone();
    shorter.segments.remove(&Segment::key(12));
    shorter.ending.clear();
    assert_eq!(broken(&verify(&shorter, &witness, &Expected::Head(head.clone()))), [Check::LogHead]);
    assert_eq!(broken(&verify(&Log::default(), &witness, &Expected::Head(head.clone()))), [Check::LogHead]);
    let other = note::Checkpoint { origin: note::origin("other"), ..head };
    assert!(broken(&verify(&log, &witness, &Expected::Head(other))).contains(&Check::CheckpointOrigin));
    assert!(broken(&verify(&log, &witness, &Expected::Origin("other".to_owned()))).contains(&Check::CheckpointOrigin));
    assert_eq!(verify(&log, &witness, &Expected::Anything).verdict, Verdict::Valid);
    assert_eq!(
        verify(&log, &Signer::generate(WITNESS_NAME).unwrap().verifier(), &Expected::Anything).verdict,
        Verdict::Invalid
    );
}

#[test]
fn a_restarted_harness_opens_its_attempt_again_with_another_key() {
    let mut script = Script::good();
    let again = Signer::generate(&note::attempt_key_name(UID, 2)).unwrap();
    // The script signs by attempt, so everything of attempt 2 is signed by one key.
    script.segments[4][0].event = opened(&again, 2);
    script.segments[5].insert(0, record(2, opened(&again, 2)));
    script.segments.insert(6, vec![record(2, opened(&again, 2)), record(2, attempt_closed())]);
    script.keys.insert(2, again);
    script.count();
    let report = run(&script, &script.write());
    assert_eq!(report.verdict, Verdict::Valid, "{:?}", report.findings);
    assert_eq!(report.summary.attempts[1].openings, 3);
}

#[test]
fn a_reply_that_costs_more_than_was_left_is_told_and_stops_the_next() {
    let mut script = Script::good();
    script.at(5).event = outcome("b", 1200);
    script.count();
    let report = run(&script, &script.write());
    assert_eq!(report.verdict, Verdict::Valid, "{:?}", report.findings);
    assert!(report.findings.iter().any(|f| f.rule == Check::UsageOverrun && f.record == Some(5)));
    script.at(8).event = intent("d", Channel::Model, "/v1/chat/completions", 1);
    script.count();
    assert_eq!(broken(&run(&script, &script.write())), [Check::UsageLimit]);
}

#[test]
fn a_lost_containment_is_told() {
    let mut script = Script::good();
    script.at(10).event = lost();
    script.count();
    let report = run(&script, &script.write());
    assert_eq!(report.verdict, Verdict::Valid);
    assert!(report.findings.iter().any(|f| f.rule == Check::ContainmentBroken && f.record == Some(10)));
}

#[test]
fn a_flood_of_findings_is_counted_and_not_kept() {
    let script = Script::good();
    let mut log = script.write();
    for i in 0..1500 {
        log.segments.insert(format!("segments/junk-{i}"), Bytes::new());
    }
    let report = run(&script, &log);
    assert_eq!((report.findings.len(), report.more_findings), (1000, 501));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_flipped_bit_is_found(object in 0_usize..11, at in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let script = Script::good();
        let mut log = script.write();
        let (_, object) = log.segments.iter_mut().chain(&mut log.ending).nth(object).unwrap();
        let mut bytes = object.to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= 1_u8 << bit;
        *object = bytes.into();
        prop_assert_eq!(run(&script, &log).verdict, Verdict::Invalid);
    }

    #[test]
    fn any_missing_end_is_found(keep in 0_usize..7, at in any::<prop::sample::Index>()) {
        let script = Script::good();
        let mut log = script.write();
        let keys: Vec<_> = log.segments.keys().skip(keep).cloned().collect();
        for key in &keys {
            log.segments.remove(key);
        }
        prop_assert_eq!(run(&script, &log).verdict, Verdict::Invalid, "its end is still there");
        log.ending.clear();
        prop_assert_eq!(run(&script, &log).verdict, Verdict::Incomplete);
        // The log also gets a part of the next segment.
        let bytes = script.write().segments[&keys[0]].clone();
        log.segments.insert(keys[0].clone(), bytes.slice(..at.index(bytes.len())));
        prop_assert_ne!(run(&script, &log).verdict, Verdict::Valid);
    }

    #[test]
    fn nothing_makes_it_panic(object in 0_usize..8, bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let script = Script::good();
        let mut log = script.write();
        log.segments.insert(Segment::key(object as u64), bytes.into());
        prop_assert_ne!(run(&script, &log).verdict, Verdict::Valid);
    }
}

/// Attempt 2 calls `write` with an approval that is requested, given and used.
fn approved() -> Script {
    let mut script = Script::good();
    change_opened(&mut script, 7, |o| {
        o.policy.tools[2].approval = Some(approval(&["ana", "bob"]));
        o.policy.task.requester = Some("ci".into());
    });
    let vote = |by: &str| Vote { by: by.into(), decision: Answer::Approve, reason: None };
    let said = |state, decisions| record::Approval {
        name: "t-1".into(),
        uid: "u".into(),
        requested_by: ApprovalSource::Contract,
        tool: "write".into(),
        request_commitment: "ab".repeat(32),
        required: 2,
        expires: "2026-11-23T10:01:00Z".into(),
        reasons: vec![],
        state,
        decisions,
    };
    let asked = Event::ApprovalRequested(said(ApprovalState::Pending, vec![]));
    let decided = Event::ApprovalDecided(said(ApprovalState::Approved, vec![vote("ana"), vote("bob")]));
    script.segments[4].splice(1..1, [record(2, asked), record(2, decided)]);
    change_intent(&mut script, 10, |i| i.approvals = vec!["t-1".into()]);
    script.count();
    script
}

fn change_decided(script: &mut Script, change: impl Fn(&mut record::Approval)) {
    let Event::ApprovalDecided(approval) = &mut script.at(9).event else { panic!() };
    change(approval);
}

/// Approvals that the writers could lie about.
#[rstest]
#[case::none_needed(10, |s: &mut Script| change_intent(s, 10, |i| i.approvals.clear()))]
#[case::another(10, |s: &mut Script| change_intent(s, 10, |i| i.approvals = vec!["t-2".into()]))]
#[case::other_arguments(10, |s: &mut Script| change_intent(s, 10, |i| i.request_commitment = Some("cd".repeat(32))))]
#[case::never_given(10, |s: &mut Script| { s.segments[4].remove(2); s.count(); })]
#[case::too_few(9, |s: &mut Script| change_decided(s, |a| drop(a.decisions.pop())))]
#[case::one_twice(9, |s: &mut Script| change_decided(s, |a| a.decisions[1].by = "ana".into()))]
#[case::by_the_principal(9, |s: &mut Script| change_decided(s, |a| a.decisions[1].by = "jane@example.com".into()))]
#[case::by_who_asked(9, |s: &mut Script| change_decided(s, |a| a.decisions[1].by = "ci".into()))]
#[case::a_no_among_them(9, |s: &mut Script| change_decided(s, |a| a.decisions[1].decision = Answer::Deny))]
#[case::fewer_than_the_contract(9, |s: &mut Script| change_decided(s, |a| a.required = 1))]
#[case::for_another_call(9, |s: &mut Script| change_decided(s, |a| a.request_commitment = "cd".repeat(32)))]
#[case::on_another_account(9, |s: &mut Script| change_decided(s, |a| a.requested_by = ApprovalSource::Pack))]
#[case::of_another_tool(9, |s: &mut Script| change_decided(s, |a| a.tool = "search".into()))]
#[case::twice(11, |s: &mut Script| {
    s.segments[4].push(record(2, intent("e", Channel::Tool, "write", 0)));
    s.count();
    change_intent(s, 11, |i| i.approvals = vec!["t-1".into()]);
})]
fn an_approval_that_was_not_given_shows(#[case] at: u64, #[case] lie: fn(&mut Script)) {
    let mut script = approved();
    let report = run(&script, &script.write());
    assert_eq!(report.verdict, Verdict::Valid, "{:?}", report.findings);
    lie(&mut script);
    let report = run(&script, &script.write());
    let found = report.findings.iter().find(|finding| finding.rule == Check::CallApproval);
    // Without its decision the log is one record shorter.
    let at = if script.segments[4].len() == 3 { at - 1 } else { at };
    assert_eq!(found.map(|finding| finding.record), Some(Some(at)), "{:?}", report.findings);
    assert_eq!(report.verdict, Verdict::Invalid);
}

/// Attempt 2 calls `write`, which is idempotent, and then replays its result.
fn replayed() -> Script {
    let mut script = Script::good();
    change_opened(&mut script, 7, |o| {
        o.policy.tools[2].idempotency = Some(Idempotency { argument: None, header: None, window_seconds: 3600 });
    });
    let key = ledger::made_of(UID, "write", &"ab".repeat(32));
    change_intent(&mut script, 8, |i| i.idempotency_key = Some(ledger::made_of(UID, "write", &"ab".repeat(32))));
    let again = Event::Replayed(record::Replayed {
        call: "d".into(),
        target: "write".into(),
        idempotency_key: key,
        request_commitment: "ab".repeat(32),
        response_commitment: "cd".repeat(32),
    });
    script.segments[5].insert(1, record(2, again));
    script.count();
    script
}

fn change_replayed(script: &mut Script, change: impl Fn(&mut record::Replayed)) {
    let Event::Replayed(replayed) = &mut script.at(10).event else { panic!() };
    change(replayed);
}

/// Replays that the writers could lie about.
#[rstest]
#[case::no_key(8, |s: &mut Script| change_intent(s, 8, |i| i.idempotency_key = None))]
#[case::another_key(8, |s: &mut Script| change_intent(s, 8, |i| i.idempotency_key = Some("ee".repeat(32))))]
#[case::another_result(10, |s: &mut Script| change_replayed(s, |r| r.response_commitment = "ee".repeat(32)))]
#[case::another_call(10, |s: &mut Script| change_replayed(s, |r| r.call = "a".into()))]
#[case::other_arguments(10, |s: &mut Script| change_replayed(s, |r| r.request_commitment = "ee".repeat(32)))]
#[case::before_it_was_made(9, |s: &mut Script| { s.segments[5].swap(0, 1); s.count(); })]
#[case::a_second_effect(10, |s: &mut Script| {
    s.at(10).event = intent("e", Channel::Tool, "write", 0);
    s.count();
    change_intent(s, 10, |i| i.idempotency_key = Some(ledger::made_of(UID, "write", &"ab".repeat(32))));
})]
fn a_second_effect_under_one_key_shows(#[case] at: u64, #[case] lie: fn(&mut Script)) {
    let mut script = replayed();
    let report = run(&script, &script.write());
    assert_eq!(report.verdict, Verdict::Valid, "{:?}", report.findings);
    lie(&mut script);
    let report = run(&script, &script.write());
    let found = report.findings.iter().find(|finding| finding.rule == Check::CallIdempotency);
    assert_eq!(found.map(|finding| finding.record), Some(Some(at)), "{:?}", report.findings);
    assert_eq!(report.verdict, Verdict::Invalid);
}

fn change_resolved(script: &mut Script, change: impl Fn(&mut record::Resolved)) {
    let Event::Resolved(resolved) = &mut script.at(12).event else { panic!() };
    change(resolved);
}

#[test]
fn what_was_resolved_counts_as_what_it_was() {
    let script = resolved();
    let report = run(&script, &script.write());
    assert_eq!(report.verdict, Verdict::Valid, "{:?}", report.findings);
    let outcomes = report.summary.outcomes;
    assert_eq!((outcomes.applied, outcomes.not_applied, outcomes.unknown), (4, 0, 0));
}

/// Attempt 1 was lost with its call of `write`, and a read of attempt 2 resolves the call.
#[rstest]
#[case(CallOutcome::Applied, (4, 0, 1, 0))]
#[case(CallOutcome::NotApplied, (3, 1, 1, 0))]
fn what_became_of_a_lost_attempts_call_is_resolved_by_the_next(
    #[case] outcome: CallOutcome,
    #[case] expected: (u64, u64, u64, u64),
) {
    let mut script = resolved();
    change_resolved(&mut script, |resolved| (resolved.call, resolved.outcome) = ("c".into(), outcome));
    let report = run(&script, &script.write());
    assert_eq!(report.verdict, Verdict::Valid, "{:?}", report.findings);
    let found = report.summary.outcomes;
    assert_eq!((found.applied, found.not_applied, found.unknown, found.open), expected);
}

/// Resolutions that the writers could lie about.
#[rstest]
#[case::of_a_call_that_was_answered(|s: &mut Script| change_resolved(s, |r| r.call = "e".into()))]
#[case::of_no_call(|s: &mut Script| change_resolved(s, |r| r.call = "x".into()))]
#[case::of_a_tool_without_a_read(|s: &mut Script| { lose(s, 3); change_resolved(s, |r| r.call = "a".into()); })]
#[case::by_no_call(|s: &mut Script| change_resolved(s, |r| r.by = "x".into()))]
#[case::by_itself(|s: &mut Script| change_resolved(s, |r| r.by = "d".into()))]
#[case::by_a_read_before(|s: &mut Script| change_resolved(s, |r| r.by = "a".into()))]
#[case::by_a_read_that_failed(|s: &mut Script| lose(s, 11))]
#[case::by_a_read_of_another_tool(|s: &mut Script| change_intent(s, 10, |i| (i.target, i.side_effect) = ("write".into(), Some(SideEffect::Write))))]
#[case::to_nothing(|s: &mut Script| change_resolved(s, |r| r.outcome = CallOutcome::Unknown))]
fn a_resolution_that_follows_from_nothing_shows(#[case] lie: fn(&mut Script)) {
    let mut script = resolved();
    lie(&mut script);
    let report = run(&script, &script.write());
    let found = report.findings.iter().find(|finding| finding.rule == Check::CallOutcome);
    assert_eq!(found.map(|finding| finding.record), Some(Some(12)), "{:?}", report.findings);
    assert_eq!(report.verdict, Verdict::Invalid);
}

/// Only the outcome of a read shows what it said. A read that was lost itself resolves nothing.
#[test]
fn a_read_that_was_resolved_itself_resolves_nothing() {
    let mut script = resolved();
    change_opened(&mut script, 7, |o| {
        o.policy.tools[1].verify = o.policy.tools[2].verify.clone();
        o.policy.limits.tool_calls = 9;
    });
    lose(&mut script, 11);
    let told = Event::Resolved(record::Resolved { call: "e".into(), outcome: CallOutcome::Applied, by: "f".into() });
    let read = [intent("f", Channel::Tool, "search", 0), outcome("f", 0), told];
    script.segments[5].splice(3..3, read.map(|event| record(2, event)));
    script.count();
    let report = run(&script, &script.write());
    let found: Vec<_> = report.findings.iter().map(|finding| (finding.rule, finding.record)).collect();
    assert!(found.starts_with(&[(Check::CallOutcome, Some(15))]), "{:?}", report.findings);
}

/// A harness that restarted finds its call without an outcome, and a read resolves the call. After that the call has no outcome.
#[test]
fn no_outcome_follows_what_a_read_has_told() {
    let mut script = resolved();
    let again = script.at(7).event.clone();
    script.at(9).event = again;
    script.count();
    assert_eq!(run(&script, &script.write()).verdict, Verdict::Valid);
    script.segments[5].insert(4, record(2, outcome("d", 0)));
    script.count();
    assert_eq!(broken(&run(&script, &script.write())), [Check::CallOutcome]);
}

/// Attempt 2's `write` passes a pack that allows `write` to change things and finds more risk where data was seen.
fn assessed() -> Script {
    let mut script = Script::good();
    change_opened(&mut script, 7, |o| {
        let rule = |name: &str, decision, when: Option<&str>| AccessRule {
            name: name.into(),
            principals: vec![],
            tools: vec![],
            effects: vec![],
            when: when.map(Into::into),
            decision,
            message: None,
        };
        o.policy.access.rules = vec![
            rule("all", RuleDecision::Allow, None),
            rule("late", RuleDecision::RequireApproval, Some("usage.toolCalls > 5")),
            rule("never", RuleDecision::Deny, Some("args.text == 'never'")),
        ];
        let term = |name: &str, when: &str| RiskTerm { name: name.into(), when: when.into(), points: 10 };
        let terms = vec![term("change", "effect == 'write'"), term("seen", "data.seen == 'Internal'")];
        o.policy.access.risk = Some(Risk { terms, approve_at: None, deny_at: Some(30) });
    });
    change_intent(&mut script, 8, |i| {
        i.assessment = Some(Assessment {
            arguments: Sensitivity::Unclassified,
            seen: Sensitivity::Internal,
            rules: vec!["all".into()],
            risk: Some(Score { score: 20, terms: vec!["change".into(), "seen".into()] }),
        });
    });
    // What attempt 1 read counts as seen in attempt 2.
    let Event::Outcome(outcome) = &mut script.at(3).event else { panic!() };
    outcome.sensitivity = Sensitivity::Internal;
    script
}

fn change_assessment(script: &mut Script, change: impl Fn(&mut Assessment)) {
    change_intent(script, 8, |i| change(i.assessment.as_mut().unwrap()));
}

/// Assessments that are not what the pack finds.
#[rstest]
#[case::nothing(|s: &mut Script| change_intent(s, 8, |i| i.assessment = None))]
#[case::no_rule(|s: &mut Script| change_assessment(s, |a| a.rules.clear()))]
#[case::a_rule_that_does_not_hold(|s: &mut Script| change_assessment(s, |a| a.rules.push("late".into())))]
#[case::a_deny(|s: &mut Script| change_assessment(s, |a| a.rules.push("never".into())))]
#[case::less_risk(|s: &mut Script| change_assessment(s, |a| a.risk = Some(Score { score: 10, terms: vec!["change".into()] })))]
#[case::another_sum(|s: &mut Script| change_assessment(s, |a| a.risk.as_mut().unwrap().score = 10))]
#[case::of_a_model(|s: &mut Script| {
    let Event::Intent(intent) = &mut s.at(2).event else { panic!() };
    intent.approvals.push("x".into());
})]
#[case::nothing_seen(|s: &mut Script| change_assessment(s, |a| a.seen = Sensitivity::Unclassified))]
fn an_assessment_that_the_pack_does_not_make_shows(#[case] lie: fn(&mut Script)) {
    let mut script = assessed();
    let report = run(&script, &script.write());
    assert_eq!(report.verdict, Verdict::Valid, "{:?}", report.findings);
    lie(&mut script);
    let report = run(&script, &script.write());
    let found = report.findings.iter().find(|finding| finding.rule == Check::CallAccess);
    assert!(found.is_some_and(|finding| [Some(2), Some(8)].contains(&finding.record)), "{:?}", report.findings);
    assert_eq!(report.verdict, Verdict::Invalid);
}

/// A result is at least as sensitive as its contract says.
#[test]
fn a_result_that_is_less_than_its_contract_says_shows() {
    let mut script = Script::good();
    change_opened(&mut script, 7, |o| {
        let write = o.policy.tools.iter_mut().find(|tool| tool.name == "write").unwrap();
        write.data.result = Sensitivity::Confidential;
    });
    let none =
        Assessment { arguments: Sensitivity::Unclassified, seen: Sensitivity::Unclassified, rules: vec![], risk: None };
    change_intent(&mut script, 8, |i| i.assessment = Some(none));
    let of = |script: &mut Script, sensitivity| {
        let Event::Outcome(outcome) = &mut script.at(9).event else { panic!() };
        outcome.sensitivity = sensitivity;
    };
    of(&mut script, Sensitivity::Restricted);
    let report = run(&script, &script.write());
    assert_eq!(report.verdict, Verdict::Valid, "{:?}", report.findings);
    of(&mut script, Sensitivity::Internal);
    assert_eq!(broken(&run(&script, &script.write())), [Check::CallAccess]);
}

/// A rollback of two calls of another task: the second attempt compensates one call. The compensation of the other is lost with the first
/// attempt's pod.
fn rollback() -> Script {
    let mut script = Script::good();
    let other = "6f9c3c1e-0000-4000-8000-0000000000ff";
    let step = |call: &str| Step {
        call: call.into(),
        tool: "write".into(),
        by: By::Call(Undo { contract: "write".into(), request_commitment: "ab".repeat(32), until: None }),
    };
    let steps = vec![step("c9"), step("c4")];
    let plan = Plan { origin: note::origin(other), size: 20, root: "r".into(), steps };
    for at in [0, 7] {
        change_opened(&mut script, at, |o| {
            o.policy.task.rollback_of = Some(RollbackOf { name: "other".into(), uid: other.into() });
            o.rollback = Some(plan.clone());
        });
    }
    // A rollback calls no model, and the first attempt's `write` is lost with its pod.
    script.at(2).event = intent("b", Channel::Listing, "search", 0);
    script.at(5).event = outcome("b", 0);
    change_intent(&mut script, 6, |i| i.compensates = Some("c9".into()));
    change_intent(&mut script, 8, |i| i.compensates = Some("c4".into()));
    script.count();
    script
}

#[test]
fn a_rollback_by_its_plan_is_valid_and_says_what_is_left() {
    let script = rollback();
    let report = run(&script, &script.write());
    assert_eq!((report.verdict, broken(&report)), (Verdict::Valid, vec![]), "{:?}", report.findings);
    let summary = report.summary.rollback.unwrap();
    assert_eq!(
        (summary.undone, summary.left.as_slice()),
        (1, ["c9 write: whether it was undone is not known".to_owned()].as_slice())
    );
}

#[rstest]
#[case::of_no_step(8, |s: &mut Script| change_intent(s, 8, |i| i.compensates = Some("c5".into())))]
#[case::other_arguments(8, |s: &mut Script| change_intent(s, 8, |i| i.request_commitment = Some("ac".repeat(32))))]
#[case::what_may_be_undone_already(8, |s: &mut Script| change_intent(s, 8, |i| i.compensates = Some("c9".into())))]
#[case::a_change_that_undoes_nothing(8, |s: &mut Script| change_intent(s, 8, |i| i.compensates = None))]
#[case::a_model(2, |s: &mut Script| s.at(2).event = intent("b", Channel::Model, "/v1/x", 0))]
#[case::another_plan(7, |s: &mut Script| change_opened(s, 7, |o| o.rollback.as_mut().unwrap().steps.clear()))]
#[case::a_plan_of_another(0, |s: &mut Script| change_opened(s, 0, |o| o.rollback.as_mut().unwrap().origin = note::origin("x")))]
#[case::no_plan(0, |s: &mut Script| change_opened(s, 0, |o| o.rollback = None))]
#[case::a_call_that_is_undone_itself(9, |s: &mut Script| {
    let Event::Outcome(outcome) = &mut s.at(9).event else { panic!() };
    outcome.compensation_commitment = Some("ad".repeat(32));
})]
fn a_rollback_that_is_none(#[case] at: u64, #[case] lie: fn(&mut Script)) {
    let mut script = rollback();
    lie(&mut script);
    let report = run(&script, &script.write());
    let found = report.findings.iter().find(|finding| finding.rule == Check::CallRollback);
    assert_eq!(
        (report.verdict, found.and_then(|found| found.record)),
        (Verdict::Invalid, Some(at)),
        "{:?}",
        report.findings
    );
}

#[test]
fn nothing_is_undone_by_what_is_no_rollback() {
    let mut script = Script::good();
    change_intent(&mut script, 8, |i| i.compensates = Some("c4".into()));
    let report = run(&script, &script.write());
    assert!(broken(&report).contains(&Check::CallRollback), "{:?}", report.findings);
}

/// The tiles and the summary are written after the log has ended. Until then the verifier reports them as missing.
#[rstest]
#[case("tlog/checkpoint")]
#[case("tlog/tile/entries/000.p/13")]
#[case(SUMMARY)]
fn an_end_that_is_not_all_there_is_incomplete(#[case] missing: &str) {
    let script = Script::good();
    let mut log = script.write();
    log.ending.remove(missing).unwrap();
    let report = run(&script, &log);
    assert_eq!(report.verdict, Verdict::Incomplete, "{:?}", report.findings);
    let found: Vec<_> = report.findings.iter().filter(|finding| finding.weight != Weight::Note).collect();
    assert!(
        matches!(found.as_slice(), [one] if one.rule == Check::EndMissing && one.object.as_deref() == Some(missing)),
        "{found:?}"
    );
}

/// The summary has the facts of this log, and names the log's tree.
#[test]
fn the_summary_is_of_this_log() {
    let script = Script::good();
    let log = script.write();
    let payload = Envelope::open(&log.ending[SUMMARY], PAYLOAD_TYPE, &script.witness.verifier()).unwrap();
    let statement: serde_json::Value = serde_json::from_slice(&payload).unwrap();
    let root = segment(&log, 12).note.checkpoint().unwrap().root;
    assert_eq!(
        statement["subject"][0],
        serde_json::json!({"name": note::origin(UID), "digest": {"sha256": hex::encode(root)}})
    );
    let said = &statement["predicate"];
    assert_eq!((&said["records"], &said["attempts"]), (&13.into(), &2.into()));
    assert_eq!(said["calls"], serde_json::json!({"applied": 3, "notApplied": 0, "unknown": 0, "open": 1}));
    assert_eq!(said["denials"], serde_json::json!({"egress.host": 1}));
    assert_eq!(said["outcome"]["phase"], "Succeeded");
}

/// A thief with the keys of all attempts rewrites history from any record on, and makes everything that follows fit. But the witness has
/// signed another history.
#[rstest]
#[case(Script::good())]
#[case(approved())]
#[case(replayed())]
#[case(resolved())]
#[case(assessed())]
#[case(rollback())]
fn a_thief_of_the_attempts_keys_is_found_at_the_first_segment_that_he_signs(#[case] script: Script) {
    let (honest, other) = (script.write(), Signer::generate(WITNESS_NAME).unwrap());
    let (before, rewrites) = (Before::of(&honest), forge::rewrites(&script.segments));
    let records = script.segments.iter().flatten().count();
    assert!((0..records - 1).all(|record| rewrites.iter().filter(|(at, _)| *at == record).count() > 10));
    for (turn, (at, rewrite)) in rewrites.iter().enumerate() {
        let witness = [Witness::Left, Witness::Dropped, Witness::By(&other)][turn % 3];
        let forged = script.forge(&forge::rewritten(&script.segments, *at, rewrite).unwrap(), witness, &before);
        let (first, _) = forged.segments.iter().find(|(key, bytes)| honest.segments.get(*key) != Some(bytes)).unwrap();
        let report = run(&script, &forged);
        assert_eq!(report.verdict, Verdict::Invalid, "{at}: {rewrite:?}: {:?}", report.findings);
        let named = |f: &Finding| f.weight == Weight::Broken && f.object.as_ref() == Some(first);
        assert!(report.findings.iter().any(named), "{at}: {rewrite:?}, {first}: {:?}", report.findings);
    }
}
