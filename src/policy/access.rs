//! Evaluates what a pack says about one tool call: how sensitive its data is, whether its principal may make it, and how risky it is.
//!
//! Guarantees: [`AccessPolicy::judge`] is a pure function of pack, call and log, so harness and gateway reach the same decision. [`AccessPolicy::replay`]
//! reproduces the decision from a record, which has no arguments. If a pack has rules, a call needs at least one rule that lets it pass. No
//! other rule and no score overrides a `Deny`. An expression that cannot be evaluated counts against the call: a `Deny` or
//! `RequireApproval` rule applies, an `Allow` rule does not apply, and a risk term adds its points.
//! Non-goals: results of other calls, which only the harness has, and model calls.

use std::sync::Arc;

use cel::Context;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    config::{
        Access, AccessRule, PolicyConfig, RiskTerm, RuleDecision, Sensitivity, SideEffect, Tool, Upstream, Usage,
    },
    decide::Denial,
    expression::{self, Expression},
    rule::Rule,
    sensitivity::Detectors,
};

/// An error of a pack that cannot be enforced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} of the pack: {reason}")]
pub struct CompileError {
    /// The rule, the risk term, or the classification as a whole.
    pub what: String,
    /// The reason.
    pub reason: String,
}

/// The facts about a call that a pack evaluates.
#[derive(Clone, Copy)]
pub struct AccessRequest<'a> {
    /// The tool.
    pub tool: &'a Tool,
    /// The side effect of the call: the contract's, or a tighter one from the upstream's definition of the tool.
    pub side_effect: SideEffect,
    /// The counters before the call.
    pub usage: Usage,
    /// The most sensitive data that the task has handled before the call.
    pub seen: Sensitivity,
}

/// The pack's assessment of a call that it lets pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Assessment {
    /// The sensitivity of the arguments.
    pub arguments: Sensitivity,
    /// The most sensitive data that the task had handled before the call.
    pub seen: Sensitivity,
    /// The rules of the pack that matched the call. None of them is a `Deny`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<String>,
    /// The risk score, if the pack defines risk terms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub risk: Option<Score>,
}

/// A risk score and the terms that contributed to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Score {
    /// The sum of the points.
    pub score: i64,
    /// The names of the terms that are true.
    pub terms: Vec<String>,
}

/// A call that a pack lets pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessDecision {
    /// The assessment. Absent if neither the pack nor the contracts say anything about data, principals and risk.
    pub assessment: Option<Assessment>,
    /// The reasons why approvers must approve the call first. Empty if the pack does not require approval.
    pub reasons: Vec<String>,
}

/// The compiled policy of a pack for the calls of one task.
pub struct AccessPolicy {
    pack: String,
    principal: String,
    base: Context<'static, 'static>,
    detectors: Arc<Detectors>,
    /// Whether the pack has rules for any principal.
    has_rules: bool,
    /// The rules that apply to the task's principal.
    rules: Vec<Ruled>,
    risk: Option<Weighed>,
    is_silent: bool,
}

struct Ruled {
    rule: AccessRule,
    when: Option<Expression>,
}

struct Weighed {
    terms: Vec<(RiskTerm, Expression)>,
    approve_at: Option<i64>,
    deny_at: Option<i64>,
}

/// Checks whether a text equals one of the patterns, or starts with the prefix of a pattern that ends with `*`. An empty list matches
/// everything.
pub fn is_one_of(patterns: &[String], text: &str) -> bool {
    let fits = |pattern: &String| match pattern.strip_suffix('*') {
        Some(beginning) => text.starts_with(beginning),
        None => pattern == text,
    };
    patterns.is_empty() || patterns.iter().any(fits)
}

impl AccessPolicy {
    /// Compiles the pack's policy for calls.
    ///
    /// # Errors
    /// Returns an error if a pattern or an expression is invalid.
    pub fn compile(policy: &PolicyConfig) -> Result<Self, CompileError> {
        let access = &policy.access;
        let failed = |what: String| move |reason| CompileError { what, reason };
        let detectors = Detectors::compile(&access.classification).map_err(failed("the classification".into()))?;
        let mine = access.rules.iter().filter(|rule| is_one_of(&rule.principals, &policy.task.principal));
        let rules = mine.map(|rule| {
            let when = rule.when.as_deref().map(Expression::compile).transpose();
            Ok::<_, CompileError>(Ruled {
                when: when.map_err(failed(format!("rule {}", rule.name)))?,
                rule: rule.clone(),
            })
        });
        let risk = access.risk.as_ref().map(|risk| {
            let terms = risk.terms.iter().map(|term| {
                let when = Expression::compile(&term.when).map_err(failed(format!("risk term {}", term.name)))?;
                Ok::<_, CompileError>((term.clone(), when))
            });
            let terms = terms.collect::<Result<_, _>>()?;
            Ok::<_, CompileError>(Weighed { terms, approve_at: risk.approve_at, deny_at: risk.deny_at })
        });
        Ok(Self {
            pack: policy.pack.name.clone(),
            principal: policy.task.principal.clone(),
            base: expression::context(&policy.task),
            detectors: Arc::new(detectors),
            has_rules: !access.rules.is_empty(),
            rules: rules.collect::<Result<_, _>>()?,
            risk: risk.transpose()?,
            is_silent: access.is_empty() && policy.tools.iter().all(|tool| tool.data.is_unclassified()),
        })
    }

    /// Returns the pack's patterns.
    pub fn detectors(&self) -> Arc<Detectors> {
        self.detectors.clone()
    }

    /// Returns the sensitivity of a tool's result.
    pub fn result(&self, tool: &Tool, result: &impl Serialize) -> Sensitivity {
        // A result that cannot be serialized does not reach the agent either.
        let found = || serde_json::to_value(result).map_or(Sensitivity::Restricted, |value| self.detectors.of(&value));
        if self.detectors.is_empty() { tool.data.result } else { found().max(tool.data.result) }
    }

    /// Returns whether all expressions evaluate in microseconds when the arguments are at most [`super::cost::SHORT`] bytes. The patterns
    /// of the classification are always fast, because they never backtrack.
    pub fn is_bounded_cost(&self) -> bool {
        self.expressions().all(Expression::is_bounded_cost)
    }

    /// Returns whether the pack says nothing about any call.
    pub fn is_silent(&self) -> bool {
        self.is_silent
    }

    /// Returns whether the decision may change with the counters, and whether it may change with the data that the task has handled.
    pub fn changes(&self) -> (bool, bool) {
        (self.sees("usage"), !self.is_silent)
    }

    /// Evaluates the pack for a call with these arguments.
    ///
    /// # Errors
    /// Returns [`Rule::AccessRule`] or [`Rule::RiskScore`] if the pack denies the call.
    pub fn judge(&self, asked: AccessRequest<'_>, arguments: &Value) -> Result<AccessDecision, Denial> {
        if self.is_silent {
            return Ok(AccessDecision { assessment: None, reasons: vec![] });
        }
        let class = self.detectors.of(arguments).max(asked.tool.data.arguments);
        let mut context = self.context(asked, class);
        if self.sees("args") {
            context.add_variable_as_val("args", expression::json(arguments));
        }
        self.evaluate(asked, class, |_, expression| expression.holds(&context))
    }

    /// Evaluates a call again from its record. For an expression that reads the arguments, the recorded result is used.
    ///
    /// # Errors
    /// Returns an error if the pack denies the call, or if the record differs from the assessment that this pack makes.
    pub fn replay(&self, asked: AccessRequest<'_>, recorded: Option<&Assessment>) -> Result<AccessDecision, String> {
        let nothing = Assessment { arguments: Sensitivity::default(), seen: asked.seen, rules: vec![], risk: None };
        if self.is_silent && recorded.is_none() {
            return Ok(AccessDecision { assessment: None, reasons: vec![] });
        }
        let said = recorded.unwrap_or(&nothing);
        let class = said.arguments;
        let floor = asked.tool.data.arguments;
        if class != floor && (class < floor || !self.detectors.finds(class)) {
            return Err(format!(
                "expected a sensitivity of the arguments that contract or pack give, found {}",
                class.as_str()
            ));
        }
        let context = self.context(asked, class);
        let again = self.evaluate(asked, class, |named, expression| match named {
            _ if !expression.sees("args") => expression.holds(&context),
            Named::Rule(name) => Ok(said.rules.iter().any(|rule| rule == name)),
            Named::Term(name) => Ok(said.risk.iter().flat_map(|risk| &risk.terms).any(|term| term == name)),
        });
        let again = again.map_err(|denial| format!("{}: {}", denial.rule, denial.reason))?;
        if again.assessment.as_ref() == recorded {
            return Ok(again);
        }
        Err(format!("expected the pack's assessment {:?}, found {recorded:?}", again.assessment))
    }

    /// Returns the variables that expressions see, except for the arguments. A map that no expression reads is not built.
    fn context<'a>(&'a self, asked: AccessRequest<'a>, class: Sensitivity) -> Context<'a, 'a> {
        let mut context = self.base.new_inner_scope();
        context.add_variable_as_val("tool", expression::text(asked.tool.name.as_str()));
        context.add_variable_as_val("effect", expression::text(asked.side_effect.as_str()));
        if self.sees("usage") {
            context.add_variable_as_val("usage", expression::usage(asked.usage));
        }
        if self.sees("data") {
            let data = [("arguments", class), ("seen", asked.seen)];
            let data = data.map(|(name, level)| (name, expression::text(level.as_str())));
            context.add_variable_as_val("data", expression::map(data));
        }
        context
    }

    /// Returns whether any expression reads a variable.
    fn sees(&self, variable: &str) -> bool {
        self.expressions().any(|expression| expression.sees(variable))
    }

    fn expressions(&self) -> impl Iterator<Item = &Expression> {
        let terms = self.risk.iter().flat_map(|risk| &risk.terms).map(|(_, when)| when);
        self.rules.iter().filter_map(|ruled| ruled.when.as_ref()).chain(terms)
    }

    /// Evaluates the rules, then the risk score. `holds` gives the value of each expression.
    fn evaluate(
        &self,
        asked: AccessRequest<'_>,
        class: Sensitivity,
        holds: impl Fn(Named<'_>, &Expression) -> Result<bool, String>,
    ) -> Result<AccessDecision, Denial> {
        let mut reasons = Vec::new();
        let mut matched = Vec::new();
        for Ruled { rule, when } in &self.rules {
            if !covers(rule, asked.tool, asked.side_effect) {
                continue;
            }
            let held = when.as_ref().map_or(Ok(true), |when| holds(Named::Rule(&rule.name), when));
            if !held.as_ref().map_or(rule.decision != RuleDecision::Allow, |held| *held) {
                continue;
            }
            match rule.decision {
                RuleDecision::Deny => {
                    let told = rule.message.as_deref().unwrap_or("such calls are denied");
                    let odd = held.err().map(|neither| format!(" ({neither})")).unwrap_or_default();
                    let reason = format!("rule {} of PolicyPack {}: {told}{odd}", rule.name, self.pack);
                    return Err(Denial { rule: Rule::AccessRule, reason });
                }
                RuleDecision::RequireApproval => reasons.push(format!("rule {}", rule.name)),
                RuleDecision::Allow => {}
            }
            matched.push(rule.name.clone());
        }
        if self.has_rules && matched.is_empty() {
            return Err(Denial {
                rule: Rule::AccessRule,
                reason: format!(
                    "no rule of PolicyPack {} allows {} to call {} with side effect {} and these arguments",
                    self.pack,
                    self.principal,
                    asked.tool.name,
                    asked.side_effect.as_str()
                ),
            });
        }
        let risk = self.risk.as_ref().map(|risk| {
            let counts = |(term, when): &&(RiskTerm, Expression)| holds(Named::Term(&term.name), when) != Ok(false);
            let counted: Vec<_> = risk.terms.iter().filter(counts).map(|(term, _)| term).collect();
            let score = counted.iter().fold(0_i64, |sum, term| sum.saturating_add(term.points));
            let made: Vec<_> = counted.iter().map(|term| format!("{} {}", term.name, term.points)).collect();
            let terms = counted.iter().map(|term| term.name.clone()).collect();
            (risk, Score { score, terms }, made.join(" + "))
        });
        if let Some((limits, Score { score, .. }, made)) = &risk {
            if let Some(most) = limits.deny_at.filter(|most| score >= most) {
                let reason = format!(
                    "the risk score of this call is {score} ({made}); PolicyPack {} denies calls from {most} on",
                    self.pack
                );
                return Err(Denial { rule: Rule::RiskScore, reason });
            }
            if limits.approve_at.is_some_and(|most| *score >= most) {
                reasons.push(format!("risk {score} ({made})"));
            }
        }
        let risk = risk.map(|(_, score, _)| score);
        let assessment = Assessment { arguments: class, seen: asked.seen, rules: matched, risk };
        Ok(AccessDecision { assessment: Some(assessment), reasons })
    }
}

/// Returns the reason why the pack's rules deny every call of a tool, whatever its arguments, or `None` if a call may pass.
pub fn always_denied(access: &Access, principal: &str, tool: &Tool) -> Option<String> {
    // If the upstream's definition makes a read a write, an `Allow` rule for writes lets the call pass.
    let may_be_write = tool.side_effect == SideEffect::Read && matches!(tool.upstream, Upstream::Mcp(_));
    let allows = |rule: &AccessRule| {
        rule.decision == RuleDecision::Allow && may_be_write && covers(rule, tool, SideEffect::Write)
    };
    let applies = |rule: &&AccessRule| {
        is_one_of(&rule.principals, principal) && (covers(rule, tool, tool.side_effect) || allows(rule))
    };
    let mut rules = access.rules.iter().filter(applies);
    if let Some(deny) = rules.clone().find(|rule| rule.decision == RuleDecision::Deny && rule.when.is_none()) {
        return Some(format!("rule {} denies every call", deny.name));
    }
    let lets = access.rules.is_empty() || rules.any(|rule| rule.decision != RuleDecision::Deny);
    (!lets).then(|| "no rule allows it or requires approval".to_owned())
}

/// Returns whether a rule applies to a tool's calls with this side effect. A `Deny` or `RequireApproval` rule also applies if it lists the
/// contract's own side effect, so an upstream's definition cannot exempt a call from it.
fn covers(rule: &AccessRule, tool: &Tool, side_effect: SideEffect) -> bool {
    let own = rule.decision != RuleDecision::Allow && rule.effects.contains(&tool.side_effect);
    is_one_of(&rule.tools, &tool.name) && (rule.effects.is_empty() || rule.effects.contains(&side_effect) || own)
}

/// The rule or the risk term that an expression belongs to.
enum Named<'a> {
    Rule(&'a str),
    Term(&'a str),
}

#[cfg(test)]
mod tests;
