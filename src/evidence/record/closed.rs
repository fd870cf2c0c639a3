//! What records say about the end of an attempt and of a task.
//!
//! Guarantees: an end that the log contradicts becomes an unknown end. So does an end that nobody saw and that the log does not confirm.
//!
//! Non-goals: the decision about how a task ended. The operator makes it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::summary::{Summary, Tone};
use crate::{
    ends::{AttemptEnd, FailureClass, TIME_OVER},
    policy::rule::Rule,
};

/// How an attempt's harness ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttemptClosed {
    /// `agentEnded`, `terminated`, `wallTime`, `denials`, `unapproved` or `parked`. The same attempt may open again only after the first
    /// two.
    pub reason: String,
}

impl AttemptClosed {
    /// Returns the end, or `None` if the reason is of another version.
    pub fn end(&self) -> Option<AttemptEnd> {
        AttemptEnd::of_closed(&self.reason)
    }

    /// Returns the rule by which the attempt is over for good. An attempt that was only told to end may open again if its harness restarts.
    pub fn rule(&self) -> Option<Rule> {
        self.end().map_or(Some(Rule::TaskClosed), AttemptEnd::rule)
    }

    pub(super) fn summary(&self, attempt: i64) -> Summary {
        Summary::new(Tone::Plain, "closed", format!("attempt {attempt}"), self.reason.clone())
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
    /// The reason of a task for which it is not known how its agent ended.
    pub const VERDICT_UNKNOWN: &str = "VerdictUnknown";
    const SUCCEEDED: &str = "Succeeded";
    const FAILED: &str = "Failed";

    /// Returns the end of a task for which it is not known how its agent ended.
    pub fn unknown(self) -> Self {
        let closed = Self::failed(FailureClass::Unknown, Self::VERDICT_UNKNOWN);
        Self { exit_code: self.exit_code, images: self.images, ..closed }
    }

    /// Returns the end of a task that succeeded, without exit code and images.
    pub fn succeeded(reason: &str) -> Self {
        let (phase, reason) = (Self::SUCCEEDED.to_owned(), reason.to_owned());
        Self { phase, failure_class: String::new(), reason, exit_code: None, images: BTreeMap::new() }
    }

    /// Returns the end of a task that failed, without exit code and images.
    pub fn failed(class: FailureClass, reason: &str) -> Self {
        let (phase, reason) = (Self::FAILED.to_owned(), reason.to_owned());
        Self { phase, failure_class: class.name().to_owned(), reason, exit_code: None, images: BTreeMap::new() }
    }

    /// Returns whether the task succeeded.
    pub fn has_succeeded(&self) -> bool {
        self.phase == Self::SUCCEEDED
    }

    /// Returns the failure class. It is `None` on success, and if the class is of another version.
    pub fn class(&self) -> Option<FailureClass> {
        FailureClass::named(&self.failure_class)
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
        use AttemptEnd::{TooManyDenials, Unapproved, WallTime};
        let end = parting.and_then(AttemptEnd::of_closed);
        let in_time = end.is_some_and(AttemptEnd::is_in_time);
        let budget = self.class() == Some(FailureClass::Budget);
        let holds = if self.has_succeeded() {
            !matches!(end, Some(WallTime | TooManyDenials | Unapproved))
        } else if !presumed {
            true
        } else if end == Some(WallTime) && !budget {
            let (class, reason) = TIME_OVER;
            return Self { failure_class: class.name().to_owned(), reason: reason.to_owned(), ..self };
        } else if budget {
            // Of an end that is not the wall time, the log must show that the time was over.
            end == Some(WallTime) || (parting.is_none() || in_time) && time_over
        } else {
            // The agent may have succeeded before its pod was gone, and nobody saw it.
            !began || parting.is_some() && !in_time
        };
        if holds { self } else { self.unknown() }
    }

    /// Returns whether the task failed in a known way, so that it may be rolled back.
    pub fn has_failed(&self) -> bool {
        let unknown = [FailureClass::Unknown, FailureClass::Cancelled].map(FailureClass::name);
        self.phase == Self::FAILED && !unknown.contains(&self.failure_class.as_str())
    }

    pub(super) fn summary(&self) -> Summary {
        let tone = if self.has_succeeded() { Tone::Good } else { Tone::Bad };
        let code = self.exit_code.map(|code| format!(", exit code {code}")).unwrap_or_default();
        let class = if self.failure_class.is_empty() { String::new() } else { format!("{}: ", self.failure_class) };
        Summary::new(tone, "ended", self.phase.clone(), format!("{class}{}{code}", self.reason))
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
