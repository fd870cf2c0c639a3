//! What records say about the end of an attempt and of a task.
//!
//! Guarantees: an end that the log contradicts becomes an unknown end. So does an end that nobody saw and that the log does not confirm.
//!
//! Non-goals: the decision about how a task ended. The operator makes it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::policy::rule::Rule;

/// How an attempt's harness ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttemptClosed {
    /// `agentEnded`, `terminated`, `wallTime`, `denials`, `unapproved` or `parked`. The same attempt may open again only after the first
    /// two.
    pub reason: String,
}

impl AttemptClosed {
    /// The agent ended by itself within its wall time, and the process that ran it waited for its end. The harness in a pod cannot know
    /// this; `belay run` does.
    pub const AGENT_ENDED: &str = "agentEnded";
    /// The harness was told to end within the attempt's wall time. The agent had ended or never ran, or its pod was deleted or evicted. The
    /// pod's status says which of these happened; this value does not.
    pub const TERMINATED: &str = "terminated";
    /// The attempt's wall time was over.
    pub const WALL_TIME: &str = "wallTime";
    /// So many calls were denied that the task is over.
    pub const DENIALS: &str = "denials";
    /// A call that was not approved in time ended the task.
    pub const UNAPPROVED: &str = "unapproved";
    /// Evidence could not be stored for a long time.
    pub const PARKED: &str = "parked";

    /// Returns whether the harness ended within the attempt's wall time, by its own clock, and not for a reason of its own. This
    /// contradicts the statement that the attempt ran out of time. It does not say that the agent succeeded.
    pub fn is_in_time(&self) -> bool {
        matches!(self.reason.as_str(), Self::AGENT_ENDED | Self::TERMINATED)
    }

    /// Returns the rule by which the attempt is over for good. An attempt that was only told to end may open again if its harness restarts.
    pub fn rule(&self) -> Option<Rule> {
        match self.reason.as_str() {
            Self::AGENT_ENDED | Self::TERMINATED => None,
            Self::WALL_TIME => Some(Rule::WallTime),
            Self::DENIALS => Some(Rule::Denials),
            Self::UNAPPROVED => Some(Rule::ToolApproval),
            Self::PARKED => Some(Rule::Evidence),
            _ => Some(Rule::TaskClosed),
        }
    }
}

/// How a task ended, as the operator reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TaskClosed {
    /// `Succeeded` or `Failed`.
    pub phase: String,
    /// The failure class, empty on success. `Unknown` if it is not known how the agent ended.
    pub failure_class: String,
    /// The reason in one word.
    pub reason: String,
    /// The agent's exit code in the last attempt, if it had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// SHA-256, hex, of the images that the kubelet ran in the last attempt, by container, as far as the kubelet reported them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, String>,
}

impl TaskClosed {
    /// The failure class of a task for which it is not known how its agent ended.
    pub const UNKNOWN: &str = "Unknown";
    /// The reason of a task for which it is not known how its agent ended.
    pub const VERDICT_UNKNOWN: &str = "VerdictUnknown";

    /// Returns the end of a task for which it is not known how its agent ended.
    pub fn unknown(self) -> Self {
        let (phase, failure_class) = ("Failed".to_owned(), Self::UNKNOWN.to_owned());
        Self { phase, failure_class, reason: Self::VERDICT_UNKNOWN.to_owned(), ..self }
    }

    /// Returns the end with which a task is sealed if the party that seals it reports this end.
    ///
    /// `presumed` says that nobody saw the agent's end. `began` says whether the last attempt opened the log; no agent runs before that.
    /// `parting` is the reason with which the attempt was closed, if it was. `time_over` says whether its records reach beyond its wall
    /// time.
    ///
    /// The log must confirm a presumed end, or else the end is unknown. There is one exception: if the attempt was closed because its wall
    /// time was over, that is the end, because the log itself reports it. An observed end is unknown, too, if the log contradicts it.
    pub fn borne_out(self, presumed: bool, began: bool, parting: Option<&str>, time_over: bool) -> Self {
        let in_time = |parting: &str| AttemptClosed { reason: parting.to_owned() }.is_in_time();
        let holds = match (self.phase.as_str(), self.failure_class.as_str()) {
            ("Succeeded", _) => {
                let ends = [AttemptClosed::WALL_TIME, AttemptClosed::DENIALS, AttemptClosed::UNAPPROVED];
                !parting.is_some_and(|parting| ends.contains(&parting))
            }
            _ if !presumed => true,
            (_, class) if parting == Some(AttemptClosed::WALL_TIME) && class != "Budget" => {
                return Self { failure_class: "Budget".to_owned(), reason: "DeadlineExceeded".to_owned(), ..self };
            }
            (_, "Budget") => match parting {
                Some(AttemptClosed::WALL_TIME) => true,
                Some(parting) if !in_time(parting) => false,
                _ => time_over,
            },
            // The agent may have succeeded before its pod was gone, and nobody saw it.
            _ => !began || parting.is_some_and(|parting| !in_time(parting)),
        };
        if holds { self } else { self.unknown() }
    }

    /// Returns whether the task failed in a known way, so that it may be rolled back.
    pub fn has_failed(&self) -> bool {
        self.phase == "Failed" && self.failure_class != Self::UNKNOWN && self.failure_class != "Cancelled"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case::seen("Succeeded", "", false, Some("terminated"), "")]
    #[case::seen_and_out_of_time("Succeeded", "", false, Some("wallTime"), "Unknown")]
    #[case::seen_to_fail("Failed", "Agent", false, Some("wallTime"), "Agent")]
    #[case::presumed_out_of_time("Failed", "Budget", true, Some("wallTime"), "Budget")]
    #[case::presumed_though_told_to_end_in_time("Failed", "Budget", true, Some("terminated"), "Unknown")]
    #[case::presumed_without_a_word("Failed", "Budget", true, None, "Unknown")]
    #[case::lost("Failed", "Infrastructure", true, Some("terminated"), "Unknown")]
    #[case::lost_without_a_word("Failed", "Infrastructure", true, None, "Unknown")]
    #[case::lost_after_its_time("Failed", "Infrastructure", true, Some("wallTime"), "Budget")]
    #[case::lost_after_its_denials("Failed", "Infrastructure", true, Some("denials"), "Infrastructure")]
    fn the_log_bears_it_out(
        #[case] phase: &str,
        #[case] class: &str,
        #[case] presumed: bool,
        #[case] parting: Option<&str>,
        #[case] sealed: &str,
    ) {
        let closed = TaskClosed {
            phase: phase.into(),
            failure_class: class.into(),
            reason: "R".into(),
            exit_code: None,
            images: BTreeMap::new(),
        };
        let sealed_as = closed.borne_out(presumed, true, parting, false);
        assert_eq!(sealed_as.failure_class, sealed, "{sealed_as:?}");
    }
}
