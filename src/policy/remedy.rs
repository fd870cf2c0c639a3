//! Tells the caller of a denied call who can change the cause, and whether a retry can help.
//!
//! Guarantees: a denial that time cannot change never suggests a retry.
//! Non-goals: changing anything.

use super::{decide::Denial, rule::Rule};

/// Whether the same call may pass later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// Never, unless somebody changes something.
    Never,
    /// Once this attempt has fewer calls in progress.
    Soon,
    /// Once an external dependency works again.
    Later,
}

/// Who can change the cause of a denial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The author of the agent, by another request.
    Agent,
    /// The author of the task, by its limits.
    Task,
    /// The author of the task, by its tools.
    Tools,
    /// The owner of the tool's contract.
    Contract,
    /// The owner of the policy pack.
    Pack,
    /// The owner of the upstream. Otherwise only time helps.
    Upstream,
    /// The administrator of Belay.
    Belay,
}

impl Whose {
    /// Returns a sentence about who can change the cause, for users.
    fn describe(self) -> &'static str {
        match self {
            Self::Agent => "The agent can change this with another request",
            Self::Task => {
                "The author of the task can raise spec.limits of the AgentTask, up to the limits of its class in the PolicyPack"
            }
            Self::Tools => {
                "The author of the task can change this: spec.tools of the AgentTask must name a ToolContract for the tool"
            }
            Self::Contract => "The owner of the tool's ToolContract can change this",
            Self::Pack => "The owner of the PolicyPack can change this",
            Self::Upstream => "The upstream did not answer as expected: check the upstream, or wait",
            Self::Belay => "The administrator of Belay can change this",
        }
    }
}

impl Rule {
    /// Returns who can change the cause of a denial by this rule.
    pub fn whose(self) -> Whose {
        match self {
            Self::ModelRequest | Self::Request | Self::RequestJson | Self::ToolSchema | Self::Busy => Whose::Agent,
            Self::WallTime | Self::ToolCalls | Self::Tokens | Self::Cost | Self::Denials => Whose::Task,
            Self::ToolUnknown => Whose::Tools,
            Self::ToolPrecondition
            | Self::ToolUrl
            | Self::ToolChanged
            | Self::ToolOutput
            | Self::ToolLimitCalls
            | Self::ToolRate
            | Self::ToolTimeout
            | Self::ToolRequestBytes
            | Self::ToolResponseBytes
            | Self::ToolIdempotency
            | Self::ToolApproval
            | Self::ToolRollback => Whose::Contract,
            Self::ToolEffect
            | Self::AccessRule
            | Self::RiskScore
            | Self::ModelEndpoint
            | Self::ModelAllowed
            | Self::ModelUnknown
            | Self::ModelPrice
            | Self::EgressHost
            | Self::EgressPort
            | Self::EgressDirect
            | Self::EgressIgnored
            | Self::UpstreamCredential => Whose::Pack,
            Self::UpstreamResolve
            | Self::UpstreamConnect
            | Self::UpstreamTls
            | Self::UpstreamReply
            | Self::UpstreamSecret => Whose::Upstream,
            Self::IdentityToken
            | Self::IdentitySource
            | Self::IdentityAttempt
            | Self::IntentMissing
            | Self::ConfigDigest
            | Self::LogFork
            | Self::LogSegment
            | Self::TaskClosed
            | Self::ContainmentLost
            // A host of the pack that resolves to addresses that must not be dialled.
            | Self::EgressAddress
            | Self::Evidence
            | Self::Foreign(_) => Whose::Belay,
        }
    }

    /// Returns whether a call that this rule denied may pass later.
    pub fn again(self) -> Again {
        match self {
            Self::Busy | Self::ToolRate => Again::Soon,
            Self::Evidence | Self::UpstreamResolve | Self::UpstreamConnect | Self::UpstreamReply => Again::Later,
            _ => Again::Never,
        }
    }

    /// Returns whether the upstream failed, so that no rule of Belay denied the call.
    pub fn is_upstreams(self) -> bool {
        matches!(self, Self::UpstreamResolve | Self::UpstreamConnect | Self::UpstreamTls | Self::UpstreamReply)
    }

    /// Returns whether the denial follows from a decision of policy, and not from the current state of a system.
    fn is_decided(self) -> bool {
        let fares = matches!(self, Self::Busy | Self::ToolTimeout | Self::ToolOutput | Self::UpstreamSecret);
        self == Self::EgressAddress || !fares && !matches!(self.whose(), Whose::Belay | Whose::Upstream)
    }

    /// Returns what this rule did to a call, or to whatever `what` names.
    fn done_to(self, what: &str) -> String {
        match self {
            // The call may have been made. The message says only that the outcome is unknown.
            Self::UpstreamReply => format!("Belay did not get the whole reply to this {what}"),
            rule if rule.is_upstreams() => format!("Belay could not make this {what}"),
            _ => format!("Belay denied this {what}"),
        }
    }
}

impl Denial {
    /// Returns the denial in words, for a call or whatever `what` names: the rule, the reason, who can change the cause, and whether to
    /// retry.
    pub fn told(&self, what: &str) -> String {
        let Self { rule, reason } = self;
        let reason = reason.trim_end_matches(['.', ' ', '\n']);
        let whose = rule.whose().describe();
        let kind = match rule {
            rule if rule.is_upstreams() => " No policy denied it: the upstream failed.",
            rule if rule.is_decided() => {
                " This is a decision of policy, not an error of the network or of the provider."
            }
            _ => "",
        };
        let again = match rule.again() {
            Again::Never => format!("{whose}. Without a change, a retry fails again"),
            Again::Soon => "A retry in a moment may succeed".to_owned(),
            Again::Later => format!("{whose}. A retry may succeed later"),
        };
        format!("{}. rule: {rule}. {reason}.{kind} {again}.", rule.done_to(what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_by_which_rule_who_can_change_it_and_whether_to_try_again() {
        for (rule, words) in [
            (Rule::Tokens, ["rule: budget.tokens. r. ", "spec.limits", "not an error of the network", "fails again"]),
            (
                Rule::ModelEndpoint,
                ["rule: model.endpoint. r. ", "PolicyPack", "not an error of the network", "fails again"],
            ),
            (Rule::ModelRequest, ["rule: model.request. r. ", "another request", "not an error", "fails again"]),
            (Rule::Busy, ["rule: request.busy. r. ", "A retry", "may succeed", "in a moment"]),
            (Rule::UpstreamReply, ["rule: upstream.reply. r. ", "the upstream failed", "No policy denied it", "later"]),
            (
                Rule::UpstreamConnect,
                ["Belay could not make this call. rule: upstream.connect. r. ", "No policy", "failed", "later"],
            ),
            (
                Rule::ToolUnknown,
                ["Belay denied this call. rule: tool.unknown. r. ", "ToolContract", "spec.tools", "policy"],
            ),
            (
                Rule::EgressAddress,
                ["Belay denied this call. ", "administrator of Belay", "a decision of policy", "fails again"],
            ),
            (Rule::Evidence, ["rule: evidence.unavailable. r. ", "administrator of Belay", "A retry", "later"]),
            (Rule::ToolPrecondition, ["rule: tool.precondition. r. ", "ToolContract", "policy", "fails again"]),
        ] {
            let told = Denial { rule, reason: "r.".into() }.told("call");
            assert!(words.iter().all(|word| told.contains(word)), "{told}");
            // A denial by Belay is not a failure of the upstream, and a failure of the upstream is not a denial.
            assert!(!(told.contains("Belay denied") && told.contains("No policy denied")), "{told}");
            assert_eq!(told.contains("limits of the AgentTask"), rule == Rule::Tokens, "{told}");
        }
    }

    /// A client that retries what cannot pass wastes its time, and each retry counts towards the task's limit on denials.
    #[test]
    fn only_what_time_can_change_is_worth_another_try() {
        let worth: Vec<_> =
            Rule::ALL.iter().filter(|rule| rule.again() != Again::Never).map(|rule| rule.as_str()).collect();
        assert_eq!(
            worth,
            [
                "tool.rate",
                "evidence.unavailable",
                "request.busy",
                "upstream.resolve",
                "upstream.connect",
                "upstream.reply"
            ]
        );
    }
}
