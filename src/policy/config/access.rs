//! A pack's policy for tool calls.
//!
//! Guarantees: the patterns, the rules and the risk score are the types of the PolicyPack.
//! Non-goals: evaluation, see [`access`](crate::policy::access) and [`sensitivity`](crate::policy::sensitivity).

use serde::{Deserialize, Serialize};

use super::{Approval, Sensitivity, SideEffect, strict};

/// The decision of a pack's rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum RuleDecision {
    /// The call may be made, unless another rule requires more.
    Allow,
    /// The call may be made once approvers have approved it.
    RequireApproval,
    /// The call is denied.
    Deny,
}

/// A pack's policy for tool calls. See [`access`](crate::policy::access).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Access {
    /// The patterns that find sensitive data.
    #[serde(default, deserialize_with = "strict::read", skip_serializing_if = "Vec::is_empty")]
    pub classification: Vec<DataPattern>,
    /// The rules about which principals may call which tools.
    #[serde(default, deserialize_with = "strict::read", skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<AccessRule>,
    /// The risk score of a call.
    #[serde(default, deserialize_with = "strict::read", skip_serializing_if = "Option::is_none")]
    pub risk: Option<Risk>,
    /// The approval that a call needs if a rule or the risk score requires it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Approval>,
}

impl Access {
    /// Returns whether the pack says nothing about calls.
    pub fn is_empty(&self) -> bool {
        self.classification.is_empty() && self.rules.is_empty() && self.risk.is_none()
    }

    /// Returns whether the pack can require approval of a call.
    pub fn may_ask(&self) -> bool {
        self.rules.iter().any(|rule| rule.decision == RuleDecision::RequireApproval)
            || self.risk.as_ref().is_some_and(|risk| risk.approve_at.is_some())
    }
}

/// A pattern for sensitive data. Belay searches each text, number and name of arguments and results separately.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DataPattern {
    /// The name.
    #[cfg_attr(
        feature = "kube",
        schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))
    )]
    pub name: String,
    /// A regular expression in the syntax of Rust's `regex` crate, such as `\b\d{4}-\d{4}\b`. Like RE2, it has no look-around and no
    /// back-references.
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 512)))]
    pub pattern: String,
    /// The sensitivity of data that matches.
    pub sensitivity: Sensitivity,
}

/// Who may call what. A rule applies to calls that match all of its fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct AccessRule {
    /// The name, as the evidence shows it.
    #[cfg_attr(
        feature = "kube",
        schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))
    )]
    pub name: String,
    /// Principals, or prefixes with `*`, such as `system:serviceaccount:team-a:*`. All principals if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "kube", schemars(length(max = 64), inner(length(min = 1, max = 253), regex(pattern = r"^[^*]*\*?$")), extend("x-kubernetes-list-type" = "set")))]
    pub principals: Vec<String>,
    /// Names of tools as agents call them, or prefixes with `*`. All tools if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "kube", schemars(length(max = 64), inner(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9_.-]*\*?$")), extend("x-kubernetes-list-type" = "set")))]
    pub tools: Vec<String>,
    /// Side effects. All side effects if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "kube", schemars(length(max = 3), extend("x-kubernetes-list-type" = "set")))]
    pub effects: Vec<SideEffect>,
    /// A CEL expression over `args`, `task`, `principal`, `usage`, `tool` (its name), `effect` and `data`. `data.arguments` is the
    /// sensitivity of the arguments. `data.seen` is the highest sensitivity that the task has handled so far. Both are `'Unclassified'`,
    /// `'Internal'`, `'Confidential'` or `'Restricted'`. If the expression cannot be evaluated, the rule counts against the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 4096)))]
    pub when: Option<String>,
    /// The decision. One `Deny` overrides all other rules.
    pub decision: RuleDecision,
    /// The message to the agent if the rule denies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 253)))]
    pub message: Option<String>,
}

/// The risk score of a tool call: the sum of the points of all terms that are true. The evidence has the score, its terms and the decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "kube", schemars(extend("x-kubernetes-validations" = [{"message": "name a score from which calls need approval (approveAt), are denied (denyAt), or both", "rule": "has(self.approveAt) || has(self.denyAt)"}])))]
#[serde(rename_all = "camelCase")]
pub struct Risk {
    /// The terms of the score.
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"])))]
    pub terms: Vec<RiskTerm>,
    /// From this score on, a call needs approval, as `approval` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(range(min = 1, max = 1_000_000)))]
    pub approve_at: Option<i64>,
    /// From this score on, a call is denied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(range(min = 1, max = 1_000_000)))]
    pub deny_at: Option<i64>,
}

/// One term of the risk score.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RiskTerm {
    /// The name, as the evidence shows it.
    #[cfg_attr(
        feature = "kube",
        schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))
    )]
    pub name: String,
    /// A CEL expression over the same variables as rules. The term counts unless the expression is `false`.
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 4096)))]
    pub when: String,
    /// The points that the term adds.
    #[cfg_attr(feature = "kube", schemars(range(min = 1, max = 10_000)))]
    pub points: i64,
}
