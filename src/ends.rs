//! The table of ends: what the end of an attempt is called and what follows from it, everywhere that Belay names it.
//!
//! Guarantees:
//!
//! - Each end that Belay itself decides has one row: its exit code, the reason in `attempt.closed`, the rule that denies calls after it,
//!   and the failure class and the reason in the task's status.
//! - Each failure class has one row: its retries, and the exit code of `belay run`.
//! - The tables are exhaustive: a new end or class does not compile until its row is complete.
//!
//! Non-goals: Ends that a kubelet reports, such as an eviction. `lifecycle::observe` reads them, because they depend on a pod's status.

use serde::{Deserialize, Serialize};

use crate::policy::rule::Rule;

/// Which limit on retries a failure counts against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retries {
    /// None: another attempt would fail in the same way, or nobody wants one.
    Never,
    /// `spec.retry.agent`.
    Agent,
    /// `spec.retry.infrastructure`.
    Infrastructure,
    /// No limit, because the cause recovers at some time and lies outside the task.
    Unlimited,
}

macro_rules! classes {
    ($($(#[$doc:meta])* $class:ident: $retries:ident, $exit:literal;)+) => {
        /// The cause of a failure. Each class has one rule for retries.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
        pub enum FailureClass {
            $($(#[$doc])* $class,)+
        }

        impl FailureClass {
            /// All classes.
            pub const ALL: &[Self] = &[$(Self::$class),+];

            /// Returns the name in records, status and metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$class => stringify!($class),)+ }
            }

            /// Returns which limit on retries a failure of this class counts against.
            pub const fn retries(self) -> Retries {
                match self { $(Self::$class => Retries::$retries,)+ }
            }

            /// Returns the exit code of `belay run` for a task that failed with this class.
            pub const fn exit_code(self) -> u8 {
                match self { $(Self::$class => $exit,)+ }
            }
        }
    };
}

classes! {
    /// The task asks for something that its pack does not allow, or its agent was denied too often.
    Policy: Never, 4;
    /// Eviction, preemption, a lost node, a failed image pull, isolation that could not be proven.
    Infrastructure: Infrastructure, 6;
    /// The evidence bucket or the gateway was unavailable for long. The task is parked and retried without end.
    Dependency: Unlimited, 6;
    /// The agent exited with an error or ran out of memory.
    Agent: Agent, 1;
    /// The wall time is over.
    Budget: Never, 5;
    /// The task was deleted before it ended.
    Cancelled: Never, 130;
    /// The end of the attempt is not known: the clock and the log disagree, or the log says nothing. A person decides.
    Unknown: Never, 2;
}

impl FailureClass {
    /// Returns the class with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|class| class.name() == name)
    }
}

macro_rules! ends {
    ($($(#[$doc:meta])* $end:ident: $exit:literal, $closed:expr, $rule:expr, $status:expr;)+) => {
        /// An end of an attempt that Belay itself decides: the harness, or the containment probe before it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum AttemptEnd {
            $($(#[$doc])* $end,)+
        }

        impl AttemptEnd {
            /// All ends.
            pub const ALL: &[Self] = &[$(Self::$end),+];

            /// Returns the exit code of the container that decides the end.
            pub const fn exit_code(self) -> u8 {
                match self { $(Self::$end => $exit,)+ }
            }

            /// Returns the reason in the record `attempt.closed`. `None` means that no record can be written.
            pub const fn closed(self) -> Option<&'static str> {
                match self { $(Self::$end => $closed,)+ }
            }

            /// Returns the rule that denies calls after this end. `None` means that the attempt may open again.
            pub const fn rule(self) -> Option<Rule> {
                match self { $(Self::$end => $rule,)+ }
            }

            /// Returns the failure class and the reason in the task's status. `None` means that the pod's status tells how the agent ended.
            pub const fn status(self) -> Option<(FailureClass, &'static str)> {
                match self { $(Self::$end => $status,)+ }
            }
        }
    };
}

ends! {
    /// The agent ended by itself within its wall time, and the process that ran it waited for its end. The harness in a pod cannot know
    /// this; `belay run` does.
    AgentEnded: 0, Some("agentEnded"), None, None;
    /// The harness was told to end within the attempt's wall time. The agent had ended or never ran, or its pod was deleted or evicted. The
    /// pod's status says which of these happened; this end does not.
    Terminated: 0, Some("terminated"), None, None;
    /// The containment probe did not prove containment. No agent ran.
    ContainmentUnproven: 42, None, None, Some((FailureClass::Infrastructure, "ContainmentUnproven"));
    /// The limit on denials was reached.
    TooManyDenials: 43, Some("denials"), Some(Rule::Denials), Some((FailureClass::Policy, "TooManyDenials"));
    /// The attempt's wall time is over.
    WallTime: 44, Some("wallTime"), Some(Rule::WallTime), Some(TIME_OVER);
    /// A request for approval expired and ended the task.
    Unapproved: 45, Some("unapproved"), Some(Rule::ToolApproval), Some((FailureClass::Policy, "ApprovalExpired"));
    /// Evidence could not be stored, or the log could not be opened, for so long that the task must be retried later.
    Parked: 46, Some("parked"), Some(Rule::Evidence), Some((FailureClass::Dependency, "EvidenceUnavailable"));
    /// The log failed. What happened since is in no log, so Belay does not retry, whatever the task's `retry` says: another attempt would
    /// continue from less than what was used, and the witness would reject the same segment again.
    LogFailed: 47, None, None, Some((FailureClass::Infrastructure, "LogFailed"));
}

impl AttemptEnd {
    /// Returns the end that this exit code reports. `None` means that the container ended for another reason, or in order.
    pub fn of_exit_code(code: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|end| code != 0 && end.exit_code() == code)
    }

    /// Returns the end with this reason in `attempt.closed`.
    pub fn of_closed(reason: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|end| end.closed() == Some(reason))
    }

    /// Returns the end after which this rule denies calls and the log does not open again for an agent. A parked task opens its log again.
    pub fn of_rule(rule: Rule) -> Option<Self> {
        let for_good = |end: &Self| *end != Self::Parked && end.rule() == Some(rule);
        Self::ALL.iter().copied().find(for_good)
    }

    /// Returns whether the harness ended within the attempt's wall time, by its own clock, and not for a reason of its own. This contradicts
    /// the statement that the attempt ran out of time. It does not say that the agent succeeded.
    pub fn is_in_time(self) -> bool {
        matches!(self, Self::AgentEnded | Self::Terminated)
    }
}

/// The failure class and the reason of an attempt whose wall time is over, whoever says so: the harness, the kubelet or the clock.
pub const TIME_OVER: (FailureClass, &str) = (FailureClass::Budget, "DeadlineExceeded");
/// The reason of an attempt whose pod was not the planned pod.
pub const POD_ALTERED: &str = "PodAltered";

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_end_is_told_apart_by_its_exit_code_its_reason_and_its_rule() {
        let failed: Vec<_> = AttemptEnd::ALL.iter().filter(|end| end.status().is_some()).collect();
        let codes: BTreeSet<_> = failed.iter().map(|end| end.exit_code()).collect();
        assert_eq!(codes.len(), failed.len(), "{codes:?}");
        assert!(!codes.contains(&0) && !codes.contains(&1), "0 is success, and 1 any other error");
        for &end in AttemptEnd::ALL {
            assert_eq!(AttemptEnd::of_exit_code(end.exit_code()), end.status().map(|_| end));
            if let Some(reason) = end.closed() {
                assert_eq!(AttemptEnd::of_closed(reason), Some(end));
            }
            if let Some(rule) = end.rule().filter(|_| end != AttemptEnd::Parked) {
                assert_eq!(AttemptEnd::of_rule(rule), Some(end));
            }
        }
    }

    #[test]
    fn a_class_is_found_by_its_name_and_serialized_as_it() {
        for &class in FailureClass::ALL {
            assert_eq!(FailureClass::named(class.name()), Some(class));
            assert_eq!(serde_json::to_value(class).unwrap(), class.name());
        }
        assert_eq!(FailureClass::named(""), None);
        assert_eq!(FailureClass::named("policy"), None);
    }
}
