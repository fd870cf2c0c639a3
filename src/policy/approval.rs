//! Determines whether approvers have approved one exact call.
//!
//! Guarantees: [`state`] depends only on the request, the decisions and the time. One denial by an approver denies the request. Each
//! approver's approval counts once, and an approval by a user on whose behalf the agent acts does not count. [`Approvals`] is the state of
//! approvals in a log: each approval authorizes one call of the same tool with the same arguments.
//! Non-goals: authentication. Admission has bound each decision to its user.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::canonical;

/// Longest arguments of a call that approvers are asked to approve, in bytes of canonical JSON.
pub const LONGEST_ARGUMENTS: usize = 65_536;
/// The placeholder for arguments that approvers do not see.
pub const REDACTED: &str = "[redacted]";
/// Maximum number of undecided requests of one attempt.
pub const PENDING: usize = 32;
/// Maximum number of requests in a log, because each request takes memory.
const REQUESTS: usize = 65_536;

/// The policy that requires the approval: the contract or the pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum ApprovalSource {
    /// The tool's contract.
    Contract,
    /// The pack, by a rule or by the risk score.
    Pack,
}

impl ApprovalSource {
    /// Returns the name that manifests and records use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Contract => "Contract",
            Self::Pack => "Pack",
        }
    }
}

/// Who may decide: any of the users, and any member of any of the groups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Approvers {
    /// Names of users, as the API server authenticates them.
    #[serde(default)]
    #[cfg_attr(feature = "kube", schemars(length(max = 32), inner(length(min = 1, max = 253)), extend("x-kubernetes-list-type" = "set")))]
    pub users: Vec<String>,
    /// Names of groups, as the API server authenticates them.
    #[serde(default)]
    #[cfg_attr(feature = "kube", schemars(length(max = 32), inner(length(min = 1, max = 253)), extend("x-kubernetes-list-type" = "set")))]
    pub groups: Vec<String>,
}

/// The decision of an approver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum Answer {
    /// The call is allowed.
    Approve,
    /// The call is denied.
    Deny,
}

/// The decision of one approver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Vote {
    /// The authenticated user.
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 1024)))]
    pub by: String,
    /// The decision.
    pub decision: Answer,
    /// The reason, for the agent and the evidence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(length(max = 1024)))]
    pub reason: Option<String>,
}

/// The state of an approval request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ApprovalState {
    /// Not enough approvers have decided.
    Pending,
    /// Enough approvers have approved the call.
    Approved,
    /// An approver has denied the call.
    Denied,
    /// The request expired before enough approvers approved the call.
    Expired,
}

/// The facts about a request that its state depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApprovalTerms<'a> {
    /// The number of approvals that the request needs.
    pub required: i64,
    /// The users whose approval does not count: the principal, and the user who created the task.
    pub barred: [Option<&'a str>; 2],
    /// The time at which the request expires.
    pub expires: Timestamp,
}

/// Returns the state of a request at a time. A denial is final. An approval must be used before the request expires.
pub fn state(asked: &ApprovalTerms<'_>, votes: &[Vote], now: Timestamp) -> ApprovalState {
    if votes.iter().any(|vote| vote.decision == Answer::Deny) {
        return ApprovalState::Denied;
    }
    if now >= asked.expires {
        return ApprovalState::Expired;
    }
    let mut yes: Vec<&str> = votes.iter().map(|vote| vote.by.as_str()).collect();
    yes.retain(|by| !asked.barred.contains(&Some(by)));
    yes.sort_unstable();
    yes.dedup();
    let yes = i64::try_from(yes.len()).unwrap_or(i64::MAX);
    if yes >= asked.required.max(1) { ApprovalState::Approved } else { ApprovalState::Pending }
}

/// One exact call, and the policy that requires its approval.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallKey {
    /// The policy that requires the approval.
    pub by: ApprovalSource,
    /// The tool.
    pub tool: String,
    /// The commitment to the arguments, hex.
    pub digest: String,
}

/// Returns the name of the request for one exact call. Every caller gets the same name. The name changes after the call was made, and if
/// the reasons for the approval change.
pub fn name(task: &str, uid: &str, call: &CallKey, reasons: &[String], repeats: i64) -> String {
    let CallKey { by, tool, digest } = call;
    let of = format!("{uid}\n{}\n{tool}\n{digest}\n{repeats}\n{}", by.as_str(), reasons.join("\n"));
    let hash = hex::encode(canonical::sha256(of.as_bytes()));
    format!("{task}-{}", hash.get(..12).unwrap_or(&hash))
}

/// Returns the arguments without the values that these JSON Pointers (RFC 6901) refer to. A pointer to a missing value redacts nothing.
pub fn redacted(arguments: &Value, pointers: &[String]) -> Value {
    let mut shown = arguments.clone();
    for pointer in pointers {
        if let Some(part) = shown.pointer_mut(pointer) {
            *part = Value::from(REDACTED);
        }
    }
    shown
}

/// The state of the approvals in a log.
#[derive(Clone, Debug, Default)]
pub struct Approvals {
    requests: BTreeMap<String, Request>,
    /// How many calls with the same arguments were made with an approval.
    made: BTreeMap<CallKey, i64>,
}

#[derive(Clone, Debug)]
struct Request {
    call: CallKey,
    state: ApprovalState,
    used: bool,
}

impl Approvals {
    /// Returns how many calls like this one were made with an approval.
    pub fn made(&self, call: &CallKey) -> i64 {
        self.made.get(call).copied().unwrap_or_default()
    }

    /// Checks whether a record may say that a request is pending or decided.
    ///
    /// # Errors
    /// Returns an error if the state contradicts the earlier records of the log.
    pub fn fits(&self, name: &str, call: &CallKey, state: ApprovalState) -> Result<(), String> {
        match self.requests.get(name) {
            None if self.requests.len() >= REQUESTS => Err(format!("expected at most {REQUESTS} approval requests")),
            Some(known) if known.call != *call => {
                Err(format!("expected approval {name} to be for the call of its first record, found another call"))
            }
            // A denial is final. Whether an approval has expired depends on the clock of the observer.
            Some(known)
                if known.state == ApprovalState::Denied
                    && matches!(state, ApprovalState::Approved | ApprovalState::Expired) =>
            {
                Err(format!("expected approval {name} to stay denied, found it {state:?}"))
            }
            _ => Ok(()),
        }
    }

    /// Records that a request is pending or decided.
    ///
    /// # Errors
    /// Returns an error if the state contradicts the earlier records of the log. Nothing changes then.
    pub fn seen(&mut self, name: &str, call: &CallKey, state: ApprovalState) -> Result<(), String> {
        self.fits(name, call, state)?;
        match self.requests.get_mut(name) {
            None => {
                self.requests.insert(name.to_owned(), Request { call: call.clone(), state, used: false });
            }
            // A restarted harness asks again.
            Some(_) if state == ApprovalState::Pending => {}
            Some(known) => known.state = state,
        }
        Ok(())
    }

    /// Returns whether the log has a record of a request.
    pub fn knows(&self, name: &str) -> bool {
        self.requests.contains_key(name)
    }

    /// Returns whether a call was made with an approval.
    pub fn is_used(&self, name: &str) -> bool {
        self.requests.get(name).is_some_and(|request| request.used)
    }

    /// Checks whether a call may be made with these approvals. Returns the policies that required the approvals.
    ///
    /// # Errors
    /// Returns an error if an approval is missing, not given, already used, or for another call, or if two approvals are for the same
    /// policy.
    pub fn usable(&self, names: &[String], tool: &str, digest: Option<&str>) -> Result<Vec<ApprovalSource>, String> {
        let mut by = Vec::new();
        for name in names {
            let Some(request) = self.requests.get(name) else {
                return Err(format!("expected approval {name} to be in the log before the call, found none"));
            };
            if request.state != ApprovalState::Approved {
                return Err(format!("expected approval {name} to be approved, found it {:?}", request.state));
            }
            if request.used {
                return Err(format!("expected one call with approval {name}, found a second"));
            }
            if request.call.tool != tool || Some(request.call.digest.as_str()) != digest {
                return Err(format!("expected the call that approval {name} was given for, found another"));
            }
            if by.contains(&request.call.by) {
                return Err(format!("expected one approval that the {} requires, found two", request.call.by.as_str()));
            }
            by.push(request.call.by);
        }
        Ok(by)
    }

    /// Marks these approvals as used by a call. Returns the policies that required the approvals.
    ///
    /// # Errors
    /// Returns an error if the call may not be made. See [`Approvals::usable`].
    pub fn used(&mut self, names: &[String], tool: &str, digest: Option<&str>) -> Result<Vec<ApprovalSource>, String> {
        let by = self.usable(names, tool, digest)?;
        for name in names {
            if let Some(request) = self.requests.get_mut(name) {
                request.used = true;
                let made = self.made.entry(request.call.clone()).or_default();
                *made = made.saturating_add(1);
            }
        }
        Ok(by)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn vote(text: &str) -> Vote {
        let (by, decision) = match text.strip_prefix('!') {
            Some(by) => (by, Answer::Deny),
            None => (text, Answer::Approve),
        };
        Vote { by: by.into(), decision, reason: None }
    }

    #[rstest]
    #[case::nobody(1, &[], 0, ApprovalState::Pending)]
    #[case::one(1, &["ana"], 0, ApprovalState::Approved)]
    #[case::one_of_two(2, &["ana"], 0, ApprovalState::Pending)]
    #[case::two(2, &["ana", "bob"], 0, ApprovalState::Approved)]
    #[case::one_twice(2, &["ana", "ana"], 0, ApprovalState::Pending)]
    #[case::principal(1, &["agent-owner"], 0, ApprovalState::Pending)]
    #[case::requester(1, &["ci"], 0, ApprovalState::Pending)]
    #[case::one_no(1, &["ana", "bob", "!eve"], 0, ApprovalState::Denied)]
    #[case::the_principal_may_say_no(1, &["!agent-owner"], 0, ApprovalState::Denied)]
    #[case::late(1, &[], 100, ApprovalState::Expired)]
    #[case::yes_but_late(1, &["ana"], 100, ApprovalState::Expired)]
    #[case::no_and_late(1, &["!ana"], 100, ApprovalState::Denied)]
    #[case::none_required_is_one(0, &[], 0, ApprovalState::Pending)]
    fn where_it_stands(
        #[case] required: i64,
        #[case] votes: &[&str],
        #[case] now: i64,
        #[case] expected: ApprovalState,
    ) {
        let expires = Timestamp::from_second(100).unwrap();
        let asked = ApprovalTerms { required, barred: [Some("agent-owner"), Some("ci")], expires };
        let votes: Vec<Vote> = votes.iter().map(|text| vote(text)).collect();
        assert_eq!(state(&asked, &votes, Timestamp::from_second(now).unwrap()), expected);
    }

    fn call(by: ApprovalSource, tool: &str, digest: &str) -> CallKey {
        CallKey { by, tool: tool.into(), digest: digest.into() }
    }

    fn pay(digest: &str) -> CallKey {
        call(ApprovalSource::Contract, "pay", digest)
    }

    #[rstest]
    #[case::nothing(&[], r#"{"a":{"b":[1,2]},"c/d":"x"}"#)]
    #[case::one(&["/a/b/1"], r#"{"a":{"b":[1,"[redacted]"]},"c/d":"x"}"#)]
    #[case::whole(&["/a", "/a/b"], r#"{"a":"[redacted]","c/d":"x"}"#)]
    #[case::escaped(&["/c~1d"], r#"{"a":{"b":[1,2]},"c/d":"[redacted]"}"#)]
    #[case::not_there(&["/x/y", "/a/b/7"], r#"{"a":{"b":[1,2]},"c/d":"x"}"#)]
    fn what_people_are_not_shown(#[case] pointers: &[&str], #[case] expected: &str) {
        let arguments = serde_json::json!({"a": {"b": [1, 2]}, "c/d": "x"});
        let pointers: Vec<_> = pointers.iter().map(|pointer| (*pointer).to_owned()).collect();
        assert_eq!(redacted(&arguments, &pointers).to_string(), expected);
    }

    #[test]
    fn a_name_is_the_calls_own() {
        let base = name("t", "uid", &pay("d"), &[], 0);
        assert!(base.starts_with("t-") && base.len() == 14, "{base}");
        for other in [
            name("t", "uid2", &pay("d"), &[], 0),
            name("t", "uid", &call(ApprovalSource::Pack, "pay", "d"), &[], 0),
            name("t", "uid", &call(ApprovalSource::Contract, "pay2", "d"), &[], 0),
            name("t", "uid", &pay("d2"), &[], 0),
            name("t", "uid", &pay("d"), &["risk 30".into()], 0),
            name("t", "uid", &pay("d"), &[], 1),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn an_approval_is_good_for_one_call_of_what_was_asked() {
        let mut log = Approvals::default();
        let a = ["a".to_owned()];
        assert!(log.used(&a, "pay", Some("d")).is_err(), "never asked for");
        log.seen("a", &pay("d"), ApprovalState::Pending).unwrap();
        assert!(log.used(&a, "pay", Some("d")).is_err(), "pending");
        assert!(log.seen("a", &pay("e"), ApprovalState::Approved).is_err(), "another call");
        assert!(
            log.seen("a", &call(ApprovalSource::Pack, "pay", "d"), ApprovalState::Approved).is_err(),
            "on another account"
        );
        log.seen("a", &pay("d"), ApprovalState::Approved).unwrap();
        assert!(log.used(&a, "pay", Some("e")).is_err(), "other arguments");
        assert!(log.used(&a, "mail", Some("d")).is_err(), "another tool");
        assert!(log.used(&a, "pay", None).is_err(), "no digest");
        assert_eq!(log.made(&pay("d")), 0);
        assert_eq!(log.used(&a, "pay", Some("d")), Ok(vec![ApprovalSource::Contract]));
        assert!(log.used(&a, "pay", Some("d")).is_err(), "twice");
        assert_eq!(log.made(&pay("d")), 1);
    }

    #[test]
    fn contract_and_pack_are_asked_each_for_itself() {
        let mut log = Approvals::default();
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        log.seen("a", &pay("d"), ApprovalState::Approved).unwrap();
        log.seen("b", &pay("d"), ApprovalState::Approved).unwrap();
        log.seen("p", &call(ApprovalSource::Pack, "pay", "d"), ApprovalState::Pending).unwrap();
        assert!(log.used(&names(&["a", "p"]), "pay", Some("d")).is_err(), "one of the two is pending");
        assert!(!log.is_used("a"), "all or none");
        log.seen("p", &call(ApprovalSource::Pack, "pay", "d"), ApprovalState::Approved).unwrap();
        assert!(log.usable(&names(&["a", "b"]), "pay", Some("d")).is_err(), "both of one");
        assert_eq!(
            log.used(&names(&["a", "p"]), "pay", Some("d")),
            Ok(vec![ApprovalSource::Contract, ApprovalSource::Pack])
        );
        assert!(log.is_used("a") && log.is_used("p"));
        assert_eq!(log.usable(&[], "pay", Some("d")), Ok(vec![]));
    }

    #[test]
    fn a_no_is_not_taken_back() {
        let mut log = Approvals::default();
        let a = ["a".to_owned()];
        log.seen("a", &pay("d"), ApprovalState::Denied).unwrap();
        assert!(log.seen("a", &pay("d"), ApprovalState::Approved).is_err());
        assert!(log.seen("a", &pay("d"), ApprovalState::Expired).is_err());
        log.seen("a", &pay("d"), ApprovalState::Pending).unwrap();
        assert!(log.used(&a, "pay", Some("d")).is_err(), "asking again is no yes");
        let mut log = Approvals::default();
        log.seen("a", &pay("d"), ApprovalState::Approved).unwrap();
        log.seen("a", &pay("d"), ApprovalState::Expired).unwrap();
        assert!(log.used(&a, "pay", Some("d")).is_err());
        log.seen("a", &pay("d"), ApprovalState::Pending).unwrap();
        log.seen("a", &pay("d"), ApprovalState::Approved).unwrap();
        log.used(&a, "pay", Some("d")).unwrap();
    }

    proptest! {
        /// Whatever the decisions are, an approval needs the required number of different approvers, none of them barred, and no denial.
        #[test]
        fn a_yes_is_enough_peoples(
            votes in proptest::collection::vec((0..6_u8, any::<bool>()), 0..8), required in 0..5_i64, now in 0..200_i64,
        ) {
            let votes: Vec<Vote> = votes
                .iter()
                .map(|(by, yes)| Vote { by: by.to_string(), decision: if *yes { Answer::Approve } else { Answer::Deny }, reason: None })
                .collect();
            let asked = ApprovalTerms { required, barred: [Some("0"), None], expires: Timestamp::from_second(100).unwrap() };
            let people: std::collections::BTreeSet<_> = votes.iter().map(|v| &v.by).filter(|by| *by != "0").collect();
            let expected = now < 100
                && votes.iter().all(|vote| vote.decision == Answer::Approve)
                && people.len() as i64 >= required.max(1);
            let found = state(&asked, &votes, Timestamp::from_second(now).unwrap());
            prop_assert_eq!(found == ApprovalState::Approved, expected);
        }
    }
}
