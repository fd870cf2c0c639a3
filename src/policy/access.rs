//! What a pack says to one tool call: how sensitive its data is, whether its principal may make it, how risky it is.
//!
//! Promises: [`Guard::judge`] is a pure function of pack, call and log, so that harness and gateway come to the same answer, and
//! [`Guard::replay`] finds it again from a record that has no arguments. Once a pack has rules, a call needs one that lets it pass;
//! no rule and no score outweighs a `Deny`; what cannot be evaluated counts against the call: a `Deny` or `RequireApproval` applies, an
//! `Allow` does not, a term of the risk adds its points. Refuses: results of other calls, which only the harness has, and
//! calls of models.

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

/// A pack that cannot be enforced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} of the pack: {reason}")]
pub struct CompileError {
    /// The rule, the term, or all patterns.
    pub what: String,
    /// Why.
    pub reason: String,
}

/// A call, as far as a pack judges it.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    /// The tool.
    pub tool: &'a Tool,
    /// What the call may change: the contract's word, or a tighter one of the upstream's own.
    pub effect: SideEffect,
    /// The counters before it.
    pub usage: Usage,
    /// The most sensitive data that the task has handled before it.
    pub seen: Sensitivity,
}

/// What a pack found of a call that it lets pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Assessment {
    /// How sensitive its arguments are.
    pub arguments: Sensitivity,
    /// The most sensitive data that the task had handled before it.
    pub seen: Sensitivity,
    /// The rules of the pack that are for it, none of them a `Deny`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<String>,
    /// How risky it is, where the pack says how to tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub risk: Option<Score>,
}

/// A risk, and what made it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Score {
    /// The sum.
    pub score: i64,
    /// The terms that hold.
    pub terms: Vec<String>,
}

/// A call that a pack lets pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passed {
    /// What it found; nothing where neither pack nor contracts say anything of data, principals and risk.
    pub assessment: Option<Assessment>,
    /// Why people must say yes first; empty where they need not.
    pub because: Vec<String>,
}

/// A pack's word on the calls of one task, compiled.
pub struct Guard {
    pack: String,
    principal: String,
    base: Context<'static, 'static>,
    detectors: Arc<Detectors>,
    /// Whether the pack has rules, for whomever.
    has_rules: bool,
    /// Those that are for the task's principal.
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

/// Whether a text is one of these, or begins as one of them that ends in `*`. Everything is where there are none.
pub fn is_one_of(patterns: &[String], text: &str) -> bool {
    let fits = |pattern: &String| match pattern.strip_suffix('*') {
        Some(beginning) => text.starts_with(beginning),
        None => pattern == text,
    };
    patterns.is_empty() || patterns.iter().any(fits)
}

impl Guard {
    /// Compiles what a policy's pack says of calls.
    ///
    /// # Errors
    /// If a pattern or an expression is none.
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

    /// The pack's patterns.
    pub fn detectors(&self) -> Arc<Detectors> {
        self.detectors.clone()
    }

    /// How sensitive a tool's result is.
    pub fn result(&self, tool: &Tool, result: &impl Serialize) -> Sensitivity {
        // A result that cannot be written is one that the agent does not get either.
        let found = || serde_json::to_value(result).map_or(Sensitivity::Restricted, |value| self.detectors.of(&value));
        if self.detectors.is_empty() { tool.data.result } else { found().max(tool.data.result) }
    }

    /// Whether it judges in microseconds where arguments are [`super::quick::SHORT`]. Patterns always are: they never look back.
    pub fn is_quick(&self) -> bool {
        self.expressions().all(Expression::is_quick)
    }

    /// Whether it says nothing to any call.
    pub fn is_silent(&self) -> bool {
        self.is_silent
    }

    /// Whether what it says to a call may change with the counters, and with what the task has handled.
    pub fn changes(&self) -> (bool, bool) {
        (self.sees("usage"), !self.is_silent)
    }

    /// What the pack says to a call with these arguments.
    ///
    /// # Errors
    /// [`Rule::AccessRule`] or [`Rule::RiskScore`].
    pub fn judge(&self, asked: Asked<'_>, arguments: &Value) -> Result<Passed, Denial> {
        if self.is_silent {
            return Ok(Passed { assessment: None, because: vec![] });
        }
        let class = self.detectors.of(arguments).max(asked.tool.data.arguments);
        let mut context = self.context(asked, class);
        if self.sees("args") {
            context.add_variable_as_val("args", expression::json(arguments));
        }
        self.weigh(asked, class, |_, expression| expression.holds(&context))
    }

    /// Judges a call again by its record. Where an expression looks at the arguments, what was recorded of it is taken.
    ///
    /// # Errors
    /// Why the call should not have left, or the record is another than this pack makes.
    pub fn replay(&self, asked: Asked<'_>, recorded: Option<&Assessment>) -> Result<Passed, String> {
        let nothing = Assessment { arguments: Sensitivity::default(), seen: asked.seen, rules: vec![], risk: None };
        if self.is_silent && recorded.is_none() {
            return Ok(Passed { assessment: None, because: vec![] });
        }
        let said = recorded.unwrap_or(&nothing);
        let class = said.arguments;
        let floor = asked.tool.data.arguments;
        if class != floor && (class < floor || !self.detectors.finds(class)) {
            return Err(format!("expected arguments of a class that contract or pack give, found {}", class.as_str()));
        }
        let context = self.context(asked, class);
        let again = self.weigh(asked, class, |named, expression| match named {
            _ if !expression.sees("args") => expression.holds(&context),
            Named::Rule(name) => Ok(said.rules.iter().any(|rule| rule == name)),
            Named::Term(name) => Ok(said.risk.iter().flat_map(|risk| &risk.terms).any(|term| term == name)),
        });
        let again = again.map_err(|denial| format!("{}: {}", denial.rule, denial.reason))?;
        if again.assessment.as_ref() == recorded {
            return Ok(again);
        }
        Err(format!("expected the assessment {:?} by the pack, found {recorded:?}", again.assessment))
    }

    /// What expressions see of a call but for its arguments. A map that none of them looks at is not made.
    fn context<'a>(&'a self, asked: Asked<'a>, class: Sensitivity) -> Context<'a, 'a> {
        let mut context = self.base.new_inner_scope();
        context.add_variable_as_val("tool", expression::text(asked.tool.name.as_str()));
        context.add_variable_as_val("effect", expression::text(asked.effect.as_str()));
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

    /// Whether any expression looks at a variable.
    fn sees(&self, variable: &str) -> bool {
        self.expressions().any(|expression| expression.sees(variable))
    }

    fn expressions(&self) -> impl Iterator<Item = &Expression> {
        let terms = self.risk.iter().flat_map(|risk| &risk.terms).map(|(_, when)| when);
        self.rules.iter().filter_map(|ruled| ruled.when.as_ref()).chain(terms)
    }

    /// Rules, then risk, by what is known of each expression.
    fn weigh(
        &self,
        asked: Asked<'_>,
        class: Sensitivity,
        holds: impl Fn(Named<'_>, &Expression) -> Result<bool, String>,
    ) -> Result<Passed, Denial> {
        let mut because = Vec::new();
        let mut matched = Vec::new();
        for Ruled { rule, when } in &self.rules {
            if !covers(rule, asked.tool, asked.effect) {
                continue;
            }
            let held = when.as_ref().map_or(Ok(true), |when| holds(Named::Rule(&rule.name), when));
            if !held.as_ref().map_or(rule.decision != RuleDecision::Allow, |held| *held) {
                continue;
            }
            match rule.decision {
                RuleDecision::Deny => {
                    let told = rule.message.as_deref().unwrap_or("such calls may not be made");
                    let odd = held.err().map(|neither| format!(" ({neither})")).unwrap_or_default();
                    let reason = format!("rule {} of PolicyPack {}: {told}{odd}", rule.name, self.pack);
                    return Err(Denial { rule: Rule::AccessRule, reason });
                }
                RuleDecision::RequireApproval => because.push(format!("rule {}", rule.name)),
                RuleDecision::Allow => {}
            }
            matched.push(rule.name.clone());
        }
        if self.has_rules && matched.is_empty() {
            return Err(Denial {
                rule: Rule::AccessRule,
                reason: format!(
                    "no rule of PolicyPack {} lets {} call {} with effect {} and such arguments",
                    self.pack,
                    self.principal,
                    asked.tool.name,
                    asked.effect.as_str()
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
                    "the risk of this call is {score} ({made}); PolicyPack {} denies from {most} on",
                    self.pack
                );
                return Err(Denial { rule: Rule::RiskScore, reason });
            }
            if limits.approve_at.is_some_and(|most| *score >= most) {
                because.push(format!("risk {score} ({made})"));
            }
        }
        let risk = risk.map(|(_, score, _)| score);
        let assessment = Assessment { arguments: class, seen: asked.seen, rules: matched, risk };
        Ok(Passed { assessment: Some(assessment), because })
    }
}

/// Why no call of a tool can pass a pack's rules, whatever its arguments; nothing where one may.
pub fn never(access: &Access, principal: &str, tool: &Tool) -> Option<String> {
    // What a server may make of its read is let through by what is for writes.
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

/// Whether a rule is for a tool's calls with this effect. One that is against a call is for the contract's own effect as well: what a
/// server says of itself takes no call out of it.
fn covers(rule: &AccessRule, tool: &Tool, effect: SideEffect) -> bool {
    let own = rule.decision != RuleDecision::Allow && rule.effects.contains(&tool.side_effect);
    is_one_of(&rule.tools, &tool.name) && (rule.effects.is_empty() || rule.effects.contains(&effect) || own)
}

/// What an expression belongs to.
enum Named<'a> {
    Rule(&'a str),
    Term(&'a str),
}

#[cfg(test)]
mod tests;
