//! What the witness accepts verifies, and what it rejects does not: the witness and the verifier are compared over random logs.

use proptest::prelude::*;

use super::*;
use crate::{
    evidence::record::{Replayed, Resolved},
    policy::config::{Idempotency, ModelPrice, VerifyRead},
};

/// A step of a harness that may be wrong in any way: the kind of event, the call, another call or value, and a variant.
type Step = (u8, u8, u8, u8);

fn rich() -> PolicyConfig {
    let mut policy = testing::policy();
    (policy.limits.tool_calls, policy.limits.tokens) = (30, 100);
    (policy.limits.denials, policy.limits.cost_micros) = (Some(6), Some(500));
    policy.models.prices = vec![ModelPrice {
        model: "m".into(),
        input_micros: 1_000_000,
        output_micros: 10_000_000,
        ..ModelPrice::default()
    }];
    let look = VerifyRead { tool: "look".into(), arguments: BTreeMap::new(), applied: "r".into(), settle_seconds: 1 };
    policy.tools[1].verify = Some(look);
    let named = |name: &str| crate::policy::config::Tool { name: name.into(), ..policy.tools[0].clone() };
    let mut once = named("once");
    once.idempotency = Some(Idempotency { argument: Some("id".into()), header: None, window_seconds: 3600 });
    let (look, mut narrow) = (named("look"), named("narrow"));
    (narrow.limits.calls, narrow.limits.request_bytes) = (Some(2), Some(10));
    policy.tools.extend([once, look, narrow]);
    policy
}

fn event((what, call, by, how): Step) -> Option<Event> {
    let name = |n: u8| n.to_string();
    let became = [CallOutcome::Applied, CallOutcome::NotApplied, CallOutcome::Unknown][usize::from(how % 3)];
    let tool = |target: &str, change: &dyn Fn(&mut Intent)| {
        let Event::Intent(mut of) = intent(&name(call), Channel::Tool, target, 0) else { return None };
        of.side_effect = of.side_effect.or(Some(SideEffect::Read));
        of.definition_digest.get_or_insert_with(|| testing::DEFINITION.into());
        change(&mut of);
        Some(Event::Intent(of))
    };
    let model = |tokens: i64, cost: i64| {
        let Event::Intent(of) = intent(&name(call), Channel::Model, "/v1/messages", tokens) else { return None };
        Some(Event::Intent(Intent { model: Some("m".into()), reserved_cost_micros: cost, ..of }))
    };
    let ended = |change: &dyn Fn(&mut Outcome)| {
        let Event::Outcome(mut of) = outcome(&name(call), i64::from(by)) else { return None };
        of.outcome = became;
        change(&mut of);
        Some(Event::Outcome(of))
    };
    let key = |of: &mut Intent| of.idempotency_key = Some(wide(&by.to_string()));
    match what {
        0 | 1 => tool("write", &|_| ()),
        2 | 3 => tool("look", &|_| ()),
        4 => tool("narrow", &|of| of.request_bytes = u64::from(how) * 4),
        5 => tool("unheard", &|_| ()),
        6 => tool("write", &|of| {
            of.side_effect = [None, Some(SideEffect::Read), Some(SideEffect::External)][usize::from(how % 3)]
        }),
        7 => tool("search", &|of| of.definition_digest = (how > 1).then(|| wide(&how.to_string()))),
        8 | 9 => tool("once", &|of| {
            key(of);
            of.request_commitment = Some(wide(if how == 0 { "other" } else { "d" }));
        }),
        10 => tool("search", &key),
        11 => tool("once", &|_| ()),
        12 => model(i64::from(how) * 15, i64::from(by) * 50),
        13 => Some(intent(&name(call), [Channel::Egress, Channel::Listing][usize::from(how % 2)], "look", 0)),
        14..=19 => ended(&|_| ()),
        20 => ended(&|of| of.response_commitment = Some(wide("r"))),
        21 => ended(&|of| of.tokens = i64::from(how) - 2),
        22 => ended(&|of| of.compensation_commitment = Some(wide("u"))),
        23 => ended(&|of| of.response_commitment = Some("no digest".into())),
        24..=27 => Some(Event::Resolved(Resolved { call: name(call), outcome: became, by: name(by) })),
        28 => Some(Event::Replayed(Replayed {
            call: name(call),
            target: "once".into(),
            idempotency_key: wide(&by.to_string()),
            request_commitment: wide("d"),
            response_commitment: wide(if how == 0 { "s" } else { "r" }),
        })),
        29 => {
            let Event::Denied(of) = denied() else { return None };
            let request_commitment = (how == 3).then(|| wide("d"));
            Some(Event::Denied(crate::evidence::record::Denied { count: i64::from(by), request_commitment, ..of }))
        }
        30 => Some(Event::ContainmentChecked(contained(how != 0))),
        31 => {
            let reason = ["agentEnded", "terminated", "denials", "later"][usize::from(how % 4)].to_owned();
            Some(Event::AttemptClosed(crate::evidence::record::AttemptClosed { reason }))
        }
        _ => None,
    }
}

/// One log, as the witness and the verifier see it.
struct Both {
    signer: Signer,
    history: History,
    walk: verify::Walk,
    harness: Harness,
}

impl Both {
    fn new() -> Self {
        let signer = Signer::generate(note::WITNESS_NAME).unwrap();
        let walk = verify::Walk::new(&signer.verifier(), &verify::Expected::Anything);
        Self { signer, history: History::new(&note::origin(testing::UID)), walk, harness: Harness::new(1) }
    }

    /// Sends an event to both. Returns whether the witness accepted it.
    fn step(&mut self, event: Event, what: &dyn std::fmt::Debug) -> Result<bool, TestCaseError> {
        let (tree, usage, reserved) = (self.harness.tree.clone(), self.harness.usage, self.harness.reserved.clone());
        let request = self.harness.next(vec![event]);
        let mut segment = Segment::parse(request.segment.as_bytes()).unwrap();
        let taken = self.history.extended(&segment);
        segment.note.cosign(&self.signer, 1);
        let mut walk = self.walk.clone();
        walk.segment(&Segment::key(segment.first), &segment.to_bytes());
        let report = walk.clone().finish(&log::Log::default());
        let is_valid = report.verdict != verify::Verdict::Invalid;
        match taken {
            Ok(next) if is_valid => {
                (self.history, self.walk) = (next, walk);
                return Ok(true);
            }
            // The witness accepts records of lost containment, because losing them would be worse than an invalid log.
            Ok(_) => {
                let broken = report.findings.iter().filter(|one| one.weight == verify::Weight::Broken);
                let lost = broken.clone().all(|one| one.rule == verify::Check::ContainmentLost);
                prop_assert!(lost, "the witness takes {what:?}, which does not verify: {:#?}", report.findings);
            }
            // Only the witness checks the reason for which an attempt has ended.
            Err(refused) => {
                let stays = refused.reason.contains("stay closed") || refused.reason.contains("in a later attempt");
                prop_assert!(!is_valid || stays, "the witness refuses {what:?}, which verifies: {refused}");
            }
        }
        (self.harness.tree, self.harness.usage, self.harness.reserved) = (tree, usage, reserved);
        Ok(false)
    }

    /// Opens the log as another harness, of the same or of the next attempt, with or without an error in the opening record.
    fn open(&mut self, attempt: i64, how: u8) -> Result<bool, TestCaseError> {
        let (tree, usage) = (self.harness.tree.clone(), self.harness.usage);
        let mut new = Harness { tree, usage, reserved: self.harness.reserved.clone(), ..Harness::new(attempt) };
        std::mem::swap(&mut self.harness, &mut new);
        let opened = edit(&self.harness, |opened| {
            opened.policy = rich();
            match how {
                0 => opened.containment = contained(false),
                1 => opened.policy.task.uid = "another".into(),
                2 => opened.verifier_key = Signer::generate("belay.dev/task/other/1").unwrap().verifier().to_string(),
                _ => {}
            }
        });
        let taken = self.step(opened, &("open", attempt, how))?;
        if !taken {
            self.harness = new;
        }
        Ok(taken)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn what_the_witness_takes_verifies_and_what_it_refuses_does_not(
        steps in prop::collection::vec((0_u8..36, 0_u8..5, 0_u8..5, 0_u8..4), 20..150)
    ) {
        let mut both = Both::new();
        prop_assert!(both.open(1, 9)?);
        for step in steps {
            match step.0 {
                32 | 33 => {
                    both.open(both.harness.attempt, step.3 + step.1 % 4)?;
                }
                34 => {
                    both.open(both.harness.attempt + 1, step.3 + step.1 % 4)?;
                }
                35 => {
                    both.open((both.harness.attempt - 1).max(0), 9)?;
                }
                _ => {
                    if let Some(event) = event(step) {
                        both.step(event, &step)?;
                    }
                }
            }
        }
    }
}

/// The property can fail: steps of each kind are accepted in a valid order and rejected otherwise.
#[test]
fn the_steps_are_taken_and_refused() {
    let mut both = Both::new();
    both.open(1, 9).unwrap();
    let steps: [(Step, bool); 14] = [
        ((0, 1, 0, 0), true),   // write 1
        ((0, 1, 0, 0), false),  // the name exists already
        ((24, 1, 2, 0), false), // there is no read that resolves it
        ((14, 1, 0, 2), true),  // unknown outcome
        ((2, 2, 0, 0), true),   // look 2
        ((24, 1, 2, 0), false), // the read has no outcome yet
        ((14, 2, 0, 0), true),
        ((24, 1, 2, 0), true),
        ((24, 1, 2, 0), false), // resolved already
        ((8, 3, 5, 1), true),   // with an idempotency key
        ((20, 3, 0, 0), true),
        ((28, 3, 5, 1), true), // replayed
        ((28, 3, 5, 0), false),
        ((29, 0, 0, 0), false), // a count of zero denials
    ];
    for (step, taken) in steps {
        assert_eq!(both.step(event(step).unwrap(), &step).unwrap(), taken, "{step:?}");
    }
}
