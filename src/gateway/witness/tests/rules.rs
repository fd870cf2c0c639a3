//! Every log rule that the witness checks rejects a segment that violates it, and accepts it once the rule is disabled.

use super::*;
use crate::{
    evidence::state::{LogRule, User, tests::case},
    verify::tests::forge,
};

fn refusal(rule: LogRule, off: Option<LogRule>) -> Option<Refused> {
    let case = case(rule);
    let witness = Signer::generate(note::WITNESS_NAME).unwrap();
    let origin = note::origin(testing::UID);
    let (by, before) = (forge::Witness::By(&witness), forge::Before::default());
    let log = forge::sign(forge::written(&case.segments), &origin, &case.keys, by, &before);
    let mut history = History::new(&origin);
    if let Some(off) = off {
        history.switch_off(off);
    }
    let mut extended =
        log.segments.values().try_fold(history, |history, bytes| history.extended(&Segment::parse(bytes).unwrap()));
    extended.as_mut().err().cloned()
}

#[test]
fn a_lie_about_each_rule_is_refused_and_is_not_once_the_rule_is_switched_off() {
    for rule in LogRule::ALL.iter().copied().filter(|rule| rule.is_asked_by(User::Witness)) {
        let expected = case(rule).expected(User::Witness);
        let refused = refusal(rule, None).unwrap_or_else(|| panic!("{rule} is taken"));
        assert_eq!(refused.rule, rule.denial(), "{rule}: {refused}");
        assert!(refused.reason.contains(&expected), "{rule}: expected {expected}, found {refused}");
        let off = refusal(rule, Some(rule));
        assert!(
            !off.as_ref().is_some_and(|off| off.reason.contains(&expected)),
            "{rule} refuses though it is off: {off:?}"
        );
    }
}
