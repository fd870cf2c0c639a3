//! Each rule of the log that the harness checks keeps a record from being written. With the rule switched off, the record is written.

use futures::future::BoxFuture;

use super::*;
use crate::evidence::{
    note,
    state::{
        User,
        tests::{Case, case},
    },
};

/// A witness that accepts everything at once.
struct Takes;

impl Witness for Takes {
    fn append<'a>(&'a self, request: &'a AppendRequest) -> BoxFuture<'a, Result<AppendReply, CallError>> {
        Box::pin(async move { Ok(AppendReply { size: request.first, checkpoint: None }) })
    }
}

/// Writes the last record of a case, in a harness that resumes from the state before it.
fn written(case: &Case, off: Option<LogRule>) -> Result<u64, Denial> {
    let (state, last) = case.last(User::Harness);
    let folder = tempfile::tempdir().unwrap();
    let uid = crate::verify::tests::script::UID;
    let start = Start {
        attempt: last.attempt,
        tree: Tree::default(),
        signer: Signer::generate(&note::attempt_key_name(uid, last.attempt)).unwrap(),
        origin: note::origin(uid),
        state: match off {
            Some(off) => state.without(off),
            None => state,
        },
        spool: Spool::open(folder.path()).unwrap().0,
        follow: Box::new(|_, _| ()),
    };
    Journal::start(start, Arc::new(Takes)).record(|_, _| Ok(last.event))
}

#[tokio::test]
async fn a_lie_about_each_rule_is_not_written_and_is_once_the_rule_is_switched_off() {
    for rule in LogRule::ALL.iter().copied().filter(|rule| rule.is_asked_by(User::Harness)) {
        let case = case(rule);
        let expected = case.expected(User::Harness);
        let is_past = case.records().last().unwrap().event.is_of_the_past();
        let denial = written(&case, None).expect_err(rule.as_str());
        assert!(denial.reason.contains(&expected), "{rule}: expected {expected}, found {denial:?}");
        // A record of what has happened cannot be rejected: a log that cannot take it has failed.
        let refusal = match rule {
            // A record after the end is an exception, because the log has ended in order.
            LogRule::AttemptOpen => Rule::TaskClosed,
            _ if is_past => Rule::Evidence,
            _ => rule.denial(),
        };
        assert_eq!(denial.rule, refusal, "{rule}");
        assert!(written(&case, Some(rule)).is_ok(), "{rule} is refused though it is switched off");
    }
}
