//! Tests that the verifier checks each of its rules on whole logs, and does not check a rule that is switched off.

use super::*;
use crate::evidence::state::{LogRule, User, tests::case};

fn report(rule: LogRule, off: Option<LogRule>) -> Report {
    let case = case(rule);
    let witness = Signer::generate(WITNESS_NAME).unwrap();
    let before = Before::default();
    let log =
        forge::sign(forge::written(&case.segments), &note::origin(UID), &case.keys, Witness::By(&witness), &before);
    let mut walk = Walk::new(&witness.verifier(), &Expected::Origin(note::origin(UID)));
    if let Some(off) = off {
        walk.switch_off(off);
    }
    log.segments.iter().for_each(|(key, bytes)| walk.segment(key, bytes));
    walk.finish(&log)
}

#[test]
fn a_lie_about_each_rule_is_found_and_is_not_once_the_rule_is_switched_off() {
    for rule in LogRule::ALL.iter().copied().filter(|rule| rule.is_asked_by(User::Verifier)) {
        let expected = case(rule).expected(User::Verifier);
        let finds = |report: &Report| {
            let last = u64::try_from(case(rule).records().count() - 1).unwrap();
            let is_it = |found: &Finding| {
                found.rule == Check::from(rule)
                    && found.record == Some(last)
                    && found.message.split("found").next() == Some(expected.as_str())
            };
            report.findings.iter().any(is_it)
        };
        let found = report(rule, None);
        assert!(finds(&found) && found.verdict == Verdict::Invalid, "{rule}: {expected}: {:#?}", found.findings);
        let off = report(rule, Some(rule));
        assert!(!finds(&off), "{rule} is found though it is switched off: {:#?}", off.findings);
    }
}
