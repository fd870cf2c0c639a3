//! A lie for every rule, checked as each of the rule's users. [`case`] is also for the tests of these users.

use std::collections::BTreeMap;

use super::*;
use crate::{
    evidence::{
        note::{self, Signer},
        record::{self, AttemptClosed, AttemptOpened, Channel, Intent, Outcome, Resolved},
        rollback::Plan,
    },
    policy::{
        access::Assessment,
        approval::{ApprovalSource, ApprovalState},
        config::{AccessRule, DataPattern, Idempotency, ModelPrice, RuleDecision},
        ledger,
    },
    verify::tests::{
        forge::{self, Keys, Segments},
        script::{UID, approval, attempt_closed, contained, denied, intent, opened, outcome, record, task_closed},
    },
};

/// A log that breaks one rule with its last record.
pub(crate) struct Case {
    pub(crate) rule: LogRule,
    pub(crate) segments: Segments,
    pub(crate) keys: Keys,
}

impl Case {
    pub(crate) fn records(&self) -> impl Iterator<Item = &Record> {
        self.segments.iter().flatten()
    }

    /// Returns the state before the last record, and that record.
    pub(crate) fn last(&self, user: User) -> (TaskState, Record) {
        let mut state = TaskState::new(user, &note::origin(UID));
        let mut records: Vec<_> = self.records().cloned().collect();
        let last = records.pop().unwrap();
        for record in records {
            assert_eq!(state.check(&record), [], "{}: {record:?}", self.rule);
            state.apply(&record);
        }
        (state, last)
    }

    /// Returns what the violation of the last record expects. The part after "found" may differ each time, such as keys.
    pub(crate) fn expected(&self, user: User) -> String {
        let (state, last) = self.last(user);
        let found = state.check(&last);
        let violation = found.iter().find(|violation| violation.rule == self.rule);
        let violation = violation.unwrap_or_else(|| panic!("{user:?} does not find {}: {found:?}", self.rule));
        violation.message.split("found").next().unwrap().to_owned()
    }
}

/// A harness or a gateway that lies.
struct Liar {
    policy: PolicyConfig,
    keys: Keys,
}

impl Liar {
    fn new() -> Self {
        let keys = [1, 2].map(|n| (n, Signer::generate(&note::attempt_key_name(UID, n)).unwrap()));
        let mut policy = crate::verify::tests::script::policy();
        policy.models.prices = vec![ModelPrice {
            model: "m".into(),
            input_micros: 1_000_000,
            output_micros: 2_000_000,
            ..ModelPrice::default()
        }];
        Self { policy, keys: keys.into_iter().collect() }
    }

    /// Returns a liar whose attempts run under a changed policy.
    fn by(change: &dyn Fn(&mut PolicyConfig)) -> Self {
        let mut liar = Self::new();
        change(&mut liar.policy);
        liar
    }

    fn opening(&self, attempt: i64, change: impl FnOnce(&mut AttemptOpened)) -> Event {
        let Event::AttemptOpened(mut it) = opened(&self.keys[&attempt], attempt) else { panic!() };
        it.policy = self.policy.clone();
        change(&mut it);
        Event::AttemptOpened(it)
    }

    /// Returns a log of these events in their attempts, without an opening. `change` changes the last record after all are counted.
    fn writes(self, rule: LogRule, events: Vec<(i64, Event)>, change: impl FnOnce(&mut Record)) -> Case {
        let mut segments: Segments = Vec::new();
        for (attempt, event) in events {
            let ends = matches!(event, Event::TaskClosed(_));
            let record = record(attempt, event);
            match segments.last_mut() {
                // Two ends in sequence have the same writer.
                Some(last) if ends && matches!(last[0].event, Event::TaskClosed(_)) => last.push(record),
                _ => segments.push(vec![record]),
            }
        }
        forge::count(&mut segments);
        change(segments.last_mut().unwrap().last_mut().unwrap());
        Case { rule, segments, keys: self.keys }
    }

    /// Returns a log of one attempt with these events.
    fn tells(self, rule: LogRule, events: Vec<Event>) -> Case {
        self.tells_but(rule, events, |_| ())
    }

    fn tells_but(self, rule: LogRule, events: Vec<Event>, change: impl FnOnce(&mut Record)) -> Case {
        let first = (1, self.opening(1, |_| ()));
        let events = std::iter::once(first).chain(events.into_iter().map(|event| (1, event))).collect();
        self.writes(rule, events, change)
    }

    /// Returns a log whose first record is a wrong opening.
    fn opens(self, rule: LogRule, change: impl FnOnce(&mut AttemptOpened)) -> Case {
        let opening = self.opening(1, change);
        self.writes(rule, vec![(1, opening)], |_| ())
    }
}

fn tool(call: &str, target: &str, change: impl FnOnce(&mut Intent)) -> Event {
    let Event::Intent(mut of) = intent(call, Channel::Tool, target, 0) else { panic!() };
    change(&mut of);
    Event::Intent(of)
}

fn model(call: &str, tokens: i64, change: impl FnOnce(&mut Intent)) -> Event {
    let Event::Intent(mut of) = intent(call, Channel::Model, "/v1/chat/completions", tokens) else { panic!() };
    of.model = Some("m".into());
    of.reserved_cost_micros = tokens.max(0);
    change(&mut of);
    Event::Intent(of)
}

fn ended(call: &str, change: impl FnOnce(&mut Outcome)) -> Event {
    let Event::Outcome(mut of) = outcome(call, 0) else { panic!() };
    change(&mut of);
    Event::Outcome(of)
}

fn refused(change: impl FnOnce(&mut Denied)) -> Event {
    let Event::Denied(mut of) = denied("x") else { panic!() };
    change(&mut of);
    Event::Denied(of)
}

fn hex(two: &str) -> String {
    two.repeat(32)
}

fn asked(change: impl FnOnce(&mut record::Approval)) -> Event {
    let mut approval = record::Approval {
        name: "t-1".into(),
        uid: "u".into(),
        requested_by: ApprovalSource::Contract,
        tool: "write".into(),
        request_commitment: hex("ab"),
        required: 1,
        expires: "2026-11-23T10:01:00Z".into(),
        reasons: vec![],
        state: ApprovalState::Pending,
        decisions: vec![],
    };
    change(&mut approval);
    Event::ApprovalRequested(approval)
}

fn assessed(seen: Sensitivity, rules: &[&str]) -> Option<Assessment> {
    let rules = rules.iter().map(|rule| (*rule).to_owned()).collect();
    Some(Assessment { arguments: Sensitivity::default(), seen, rules, risk: None })
}

/// Returns a log that breaks this rule and no other.
pub(crate) fn case(rule: LogRule) -> Case {
    let (new, by) = (Liar::new, Liar::by);
    let search = |call: &str| tool(call, "search", |_| ());
    let write = |call: &str| tool(call, "write", |_| ());
    let once = |policy: &mut PolicyConfig| {
        // The harness writes its records now, and those before are older. The window must reach back to them.
        policy.tools[2].idempotency = Some(Idempotency { argument: None, header: None, window_seconds: 1 << 40 });
    };
    let approved = |policy: &mut PolicyConfig| policy.tools[2].approval = Some(approval(&["ana"]));
    let keyed =
        |call: &str| tool(call, "write", |of| of.idempotency_key = Some(ledger::made_of(UID, "write", &hex("ab"))));
    match rule {
        LogRule::RecordVersion => new().tells_but(rule, vec![denied("x")], |record| record.v = 0),
        LogRule::RecordTime => new().tells_but(rule, vec![denied("x")], |record| record.time = "yesterday".into()),
        LogRule::RecordDigest => {
            new().tells(rule, vec![tool("a", "search", |of| of.request_commitment = Some(hex("AB")))])
        }
        LogRule::AfterEnd => new().tells(rule, vec![task_closed(), task_closed()]),
        LogRule::Writer => new().tells_but(rule, vec![denied("x")], |record| record.actor = Actor::Gateway),
        LogRule::AttemptOrder => {
            let liar = new();
            let events = vec![(2, liar.opening(2, |_| ())), (1, liar.opening(1, |_| ()))];
            liar.writes(rule, events, |_| ())
        }
        LogRule::AttemptOpen => new().tells(rule, vec![attempt_closed(), denied("x")]),
        LogRule::AttemptOver => {
            let liar = new();
            let over = Event::AttemptClosed(AttemptClosed { reason: "denials".into() });
            let again = liar.opening(1, |_| ());
            liar.tells(rule, vec![over, again])
        }
        LogRule::AttemptKey => {
            let liar = new();
            let other = liar.keys[&2].verifier().to_string();
            liar.opens(rule, |opened| opened.verifier_key = other)
        }
        LogRule::AttemptContained => new().opens(rule, |opened| opened.containment.contained = false),
        LogRule::AttemptTask => new().opens(rule, |opened| opened.policy.task.uid = "another".into()),
        LogRule::AttemptPolicy => new().opens(rule, |opened| {
            let sensitivity = Sensitivity::Internal;
            let pattern = DataPattern { name: "p".into(), pattern: "(".into(), sensitivity };
            opened.policy.access.classification = vec![pattern];
        }),
        LogRule::RollbackPlan => new().opens(rule, |opened| {
            let origin = note::origin("other");
            opened.rollback = Some(Plan { origin, size: 1, root: String::new(), steps: vec![] });
        }),
        LogRule::CallBounds => new().tells(rule, vec![search(&"a".repeat(4097))]),
        LogRule::CallReservation => new().tells(rule, vec![model("a", 0, |of| of.reserved_tokens = -5)]),
        LogRule::CallUnique => new().tells(rule, vec![search("a"), search("a")]),
        LogRule::ContainmentLost => {
            let lost = record::Containment { contained: false, ..contained() };
            new().tells(rule, vec![Event::ContainmentChecked(lost), search("a")])
        }
        LogRule::LimitToolCalls => {
            by(&|policy| policy.limits.tool_calls = 1).tells(rule, vec![search("a"), search("b")])
        }
        LogRule::LimitTokens => new().tells(rule, vec![model("a", 1001, |_| ())]),
        LogRule::LimitTool => {
            by(&|policy| policy.tools[1].limits.calls = Some(1)).tells(rule, vec![search("a"), search("b")])
        }
        LogRule::CallDefinition => {
            let other = tool("b", "search", |of| of.definition_digest = Some(hex("0e")));
            new().tells(rule, vec![search("a"), other])
        }
        LogRule::LimitCost => {
            by(&|policy| policy.limits.cost_micros = Some(5)).tells(rule, vec![model("a", 6, |_| ())])
        }
        LogRule::LimitDenials => {
            by(&|policy| policy.limits.denials = Some(1)).tells(rule, vec![denied("x"), search("a")])
        }
        LogRule::CallPolicy => new().tells(rule, vec![tool("a", "search", |of| of.request_bytes = 4097)]),
        LogRule::KeyMade => new().tells(rule, vec![keyed("a")]),
        LogRule::KeyFree => by(&once).tells(rule, vec![keyed("a"), keyed("b")]),
        LogRule::RollbackCall => new().tells(rule, vec![tool("a", "write", |of| of.compensates = Some("x".into()))]),
        LogRule::ApprovalUsed => new().tells(rule, vec![tool("a", "search", |of| of.approvals = vec!["t-9".into()])]),
        LogRule::CallAccess => new().tells(rule, vec![model("a", 0, |of| of.approvals = vec!["t-9".into()])]),
        LogRule::DataSeen | LogRule::CallAssessment => {
            let seen = assessed(Sensitivity::Restricted, &[]);
            new().tells(rule, vec![tool("a", "search", |of| of.assessment = seen)])
        }
        LogRule::ApprovalByContract => by(&approved).tells(rule, vec![write("a")]),
        LogRule::ApprovalByPack => by(&|policy| {
            let rule = AccessRule {
                name: "ask".into(),
                principals: vec![],
                tools: vec![],
                effects: vec![],
                when: None,
                decision: RuleDecision::RequireApproval,
                message: None,
            };
            (policy.access.rules, policy.access.approval) = (vec![rule], Some(approval(&["ana"])));
        })
        .tells(rule, vec![tool("a", "search", |of| of.assessment = assessed(Sensitivity::default(), &["ask"]))]),
        LogRule::OutcomeOpen => new().tells(rule, vec![outcome("z", 0)]),
        LogRule::OutcomeAmount => new().tells(rule, vec![model("a", 10, |_| ()), ended("a", |of| of.tokens = -1)]),
        LogRule::OutcomeData => {
            let assessed = tool("a", "search", |of| of.assessment = assessed(Sensitivity::default(), &[]));
            by(&|policy| policy.tools[1].data.result = Sensitivity::Internal)
                .tells(rule, vec![assessed, outcome("a", 0)])
        }
        LogRule::OutcomeUndo => {
            new().tells(rule, vec![write("a"), ended("a", |of| of.compensation_commitment = Some(hex("0f")))])
        }
        LogRule::Replayed => new().tells(
            rule,
            vec![
                write("a"),
                outcome("a", 0),
                Event::Replayed(record::Replayed {
                    call: "a".into(),
                    target: "write".into(),
                    idempotency_key: "k".into(),
                    request_commitment: hex("ab"),
                    response_commitment: hex("cd"),
                }),
            ],
        ),
        LogRule::Resolved => {
            let resolved = Resolved { call: "a".into(), outcome: record::CallOutcome::Applied, by: "a".into() };
            new().tells(rule, vec![write("a"), outcome("a", 0), Event::Resolved(resolved)])
        }
        LogRule::DenialCount => new().tells(rule, vec![refused(|of| of.count = 0)]),
        LogRule::DenialIgnored => new().tells(rule, vec![refused(|of| of.rule = Rule::EgressIgnored)]),
        LogRule::ApprovalRequest => {
            by(&approved).tells(rule, vec![asked(|_| ()), asked(|of| of.request_commitment = hex("ef"))])
        }
        LogRule::ApprovalTime => by(&approved).tells(rule, vec![asked(|of| of.expires = "soon".into())]),
        LogRule::ApprovalVotes => by(&approved).tells(rule, vec![asked(|of| of.required = 2)]),
        LogRule::Counters => new().tells_but(rule, vec![denied("x")], |record| record.usage.denials = 0),
    }
}

/// The users in the table check each rule, and no other user does. The lie about a rule breaks no other rule, so that its test fails once
/// the rule is switched off.
#[test]
fn every_rule_is_asked_by_those_whom_the_table_names() {
    for rule in LogRule::ALL.iter().copied() {
        let case = case(rule);
        for user in User::ALL {
            let (state, last) = case.last(user);
            let found: Vec<_> = state.check(&last).into_iter().map(|violation| violation.rule).collect();
            let others: Vec<_> = found.iter().filter(|found| **found != rule).collect();
            assert!(found.contains(&rule) == rule.is_asked_by(user), "{rule} {user:?}: {found:?}");
            // The pack's assessment includes the data that the task has seen.
            let same = [LogRule::DataSeen, LogRule::CallAssessment];
            assert!(others.iter().all(|_| same.contains(&rule)), "{rule} {user:?}: {found:?}");
            let found = state.without(rule).check(&last);
            assert!(found.iter().all(|found| found.rule != rule), "{rule} {user:?}: {found:?}");
        }
    }
}

/// Calls of earlier attempts count for whichever harness continues.
#[test]
fn calls_of_earlier_attempts_count() {
    let case = case(LogRule::LimitTool);
    let (state, last) = case.last(User::Witness);
    let mut resumed = TaskState::resume(&note::origin(UID), state.snapshot(2));
    let key = Signer::generate(&note::attempt_key_name(UID, 2)).unwrap();
    let Event::AttemptOpened(mut opened) = opened(&key, 2) else { panic!() };
    opened.policy.tools[1].limits.calls = Some(1);
    let opening = Record { seq: 2, usage: state.usage(), ..record(2, Event::AttemptOpened(opened)) };
    assert_eq!(resumed.check(&opening), []);
    resumed.apply(&opening);
    let found = resumed.check(&Record { attempt: 2, ..last });
    assert_eq!(found.iter().map(|found| found.rule).collect::<Vec<_>>(), [LogRule::LimitTool]);
}

/// A harness that continues from a snapshot evaluates a repeat, a resolution and a limit like the witness, which has seen the whole log.
#[test]
fn a_snapshot_is_enough_for_the_next_harness() {
    let mut policy = crate::verify::tests::script::policy();
    policy.tools[2].idempotency = Some(Idempotency { argument: None, header: None, window_seconds: 3600 });
    policy.tools[2].verify = Some(crate::policy::config::VerifyRead {
        tool: "search".into(),
        arguments: BTreeMap::new(),
        applied: "result".into(),
        settle_seconds: 1,
    });
    let keyed =
        |call: &str| tool(call, "write", |of| of.idempotency_key = Some(ledger::made_of(UID, "write", &hex("ab"))));
    let resolved =
        |by: &str| Event::Resolved(Resolved { call: "a".into(), outcome: record::CallOutcome::Applied, by: by.into() });
    let open = |attempt: i64| {
        let key = Signer::generate(&note::attempt_key_name(UID, attempt)).unwrap();
        let Event::AttemptOpened(mut it) = opened(&key, attempt) else { panic!() };
        it.policy = policy.clone();
        (attempt, Event::AttemptOpened(it))
    };
    let origin = note::origin(UID);
    let mut witness = TaskState::new(User::Witness, &origin);
    let mut harness = TaskState::new(User::Harness, &origin);
    let steps = vec![
        (open(1), true),
        ((1, keyed("a")), true),
        // The harness of the call is gone.
        (open(2), true),
        ((2, keyed("b")), false),
        ((2, resolved("a")), false),
        ((2, tool("c", "search", |_| ())), true),
        ((2, resolved("c")), false),
        ((2, outcome("c", 0)), true),
        ((2, resolved("c")), true),
        ((2, resolved("c")), false),
        ((2, keyed("d")), false),
    ];
    let mut seq = 0;
    for ((attempt, event), holds) in steps {
        if matches!(event, Event::AttemptOpened(_)) {
            harness = TaskState::resume(&origin, witness.snapshot(attempt));
        }
        let record = Record { seq, usage: witness.usage_after(&event), ..record(attempt, event) };
        let rules = |state: &TaskState| state.check(&record).into_iter().map(|found| found.rule).collect::<Vec<_>>();
        assert_eq!(rules(&harness), rules(&witness), "{record:?}");
        assert_eq!(rules(&witness).is_empty(), holds, "{record:?}: {:?}", rules(&witness));
        if holds {
            witness.apply(&record);
            harness.apply(&record);
            seq += 1;
        }
    }
}
