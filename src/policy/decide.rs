//! Decides whether one tool call is allowed or denied, and by which rule.
//!
//! Guarantees: [`Contracts::decide`] is the whole decision, from the bytes of the arguments to their commitment. It is a pure function of
//! the contracts, the call, the counters and the results of earlier calls.
//! Non-goals: changing any state. `decide` only checks the budget. The holder of the budget's lock checks it again and reserves.
//!
//! Everything is compiled once for each attempt ([`Contracts::compile`]). A call adds only its own values to a prepared CEL context
//! ([`Results`]). The order of the rules is fixed, the cheapest first, and the first rule that fails is the answer: denials left, arguments
//! readable, arguments short enough, tool known, side effect, schema, preconditions, calls left. The decision also says whether the call
//! needs approval ([`Decision::needs_approval`]). The harness asks for the approval.

use std::collections::BTreeMap;

use cel::Context;
use serde_json::{Map, Value};

use super::{
    budget::{Budget, Exhausted},
    commit::Salt,
    config::{PolicyConfig, Tool, Usage},
    cost,
    expression::{self, Expression},
    json, meter,
    rule::Rule,
    shape::{Misfit, Shape},
    shorten::{shorten, shorten_to},
};
use crate::canonical;

/// Longest result that preconditions can read, in bytes of JSON.
pub const LONGEST_RESULT: usize = 16 << 10;
/// Maximum size of the results of all tools together, in bytes of JSON.
pub const LONGEST_RESULTS: usize = 256 << 10;
/// Longest arguments of any call, in bytes of canonical JSON. A contract cannot allow more.
pub const LONGEST_ARGUMENTS: usize = 4 << 20;
/// Longest description of a misfit of the arguments, in characters. A schema with several forms takes a sentence for each form.
const LONGEST_MISFIT: usize = 512;
/// Maximum size of an agent's request apart from the arguments, in bytes.
const AROUND: usize = 64 << 10;
/// Longest result from which `verify` or a compensation is evaluated, in bytes of JSON.
pub const LONGEST_ANSWER: usize = 1 << 20;

/// An error of a policy that cannot be enforced. The operator rejects such a task. A harness with such a policy does not start.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The input schema is not a JSON Schema.
    #[error("tool {tool}: input is not a JSON Schema: {reason}")]
    Schema {
        /// The tool.
        tool: String,
        /// The reason.
        reason: String,
    },
    /// A precondition is not a CEL expression.
    #[error("tool {tool}: precondition {name} is not a CEL expression: {reason}")]
    Precondition {
        /// The tool.
        tool: String,
        /// The precondition.
        name: String,
        /// The reason.
        reason: String,
    },
    /// Two tools have the same name.
    #[error("two contracts are for tool {0}: give each contract its own spec.tool")]
    Duplicate(String),
}

/// A denial: the rule, and the reason that the agent gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// The rule that failed.
    pub rule: Rule,
    /// What was expected, what was found, and what to do.
    pub reason: String,
}

impl From<Exhausted> for Denial {
    fn from(exhausted: Exhausted) -> Self {
        Self { rule: exhausted.rule, reason: exhausted.to_string() }
    }
}

/// The rules that an allowed tool call has passed, in the order of their evaluation.
pub const TOOL_RULES: [Rule; 5] =
    [Rule::RequestJson, Rule::ToolUnknown, Rule::ToolEffect, Rule::ToolSchema, Rule::ToolPrecondition];

/// A call's arguments.
#[derive(Clone, Debug)]
pub enum Arguments<'a> {
    /// The text, as the agent wrote it.
    Text(&'a [u8]),
    /// The value, as [`json::parse`] read it from a text of its own or from a part of a larger text.
    Parsed(Value),
}

/// The facts that a decision depends on besides the contracts and the call.
#[derive(Clone, Copy)]
pub struct DecisionInputs<'a> {
    /// The counters.
    pub usage: Usage,
    /// Results of earlier calls.
    pub results: &'a Results,
    /// How many of the denials do not count towards the limit.
    pub ignored: i64,
}

/// The decision about one call.
#[derive(Debug)]
pub struct Decision<'c> {
    /// The tool if the call is allowed, or else the denial.
    pub verdict: Result<&'c Tool, Denial>,
    /// The arguments, or null if they could not be read.
    pub arguments: Value,
    /// The commitment to the arguments (see [`Salt::value`]), or to their bytes if they could not be read.
    pub digest: String,
    /// Bytes of the arguments in canonical form, or as written if they could not be read.
    pub bytes: u64,
    /// Whether approvers must approve the call first. It is allowed otherwise.
    pub needs_approval: bool,
}

/// A task's contracts, compiled.
pub struct Contracts {
    tools: BTreeMap<String, Compiled>,
    /// Whether any precondition reads results.
    uses_results: bool,
    /// The results of a task that has made no call yet.
    nothing: Results,
    policy: PolicyConfig,
}

struct Compiled {
    tool: Tool,
    schema: Shape,
    preconditions: Vec<Condition>,
    /// If this expression is `false`, the call needs no approval.
    approval_when: Option<Expression>,
    /// Whether the result of the read shows that a call took effect.
    applied: Option<Expression>,
    /// The arguments of the compensation, by name.
    undo: Option<Vec<(String, Expression)>>,
    /// Whether evaluation takes microseconds if the arguments are short.
    is_bounded_cost: bool,
    /// Whether any expression reads the arguments, the counters or the results.
    uses_args: bool,
    uses_usage: bool,
    uses_results: bool,
}

struct Condition {
    name: String,
    expression: Expression,
    message: String,
}

/// Returns whether an expression reads nothing but the call and its task.
fn is_of_the_call(expression: &Expression) -> bool {
    !expression.sees("usage") && !expression.sees("results")
}

impl Contracts {
    /// Compiles a policy's tools.
    ///
    /// # Errors
    /// Returns an error if a schema or an expression is invalid, or if two tools have the same name.
    pub fn compile(policy: &PolicyConfig) -> Result<Self, CompileError> {
        let mut tools = BTreeMap::new();
        let mut uses_results = false;
        for tool in &policy.tools {
            let schema = Shape::compile(&tool.input)
                .map_err(|reason| CompileError::Schema { tool: tool.name.clone(), reason })?;
            let mut compiled = Compiled {
                tool: tool.clone(),
                schema,
                preconditions: vec![],
                approval_when: None,
                applied: None,
                undo: None,
                is_bounded_cost: cost::schema(&tool.input),
                uses_args: false,
                uses_usage: false,
                uses_results: false,
            };
            let mut expression = |name: &str, cel: &str| {
                let expression = Expression::compile(cel).map_err(|reason| CompileError::Precondition {
                    tool: tool.name.clone(),
                    name: name.to_owned(),
                    reason,
                })?;
                compiled.is_bounded_cost &= expression.is_bounded_cost();
                compiled.uses_args |= expression.sees("args");
                compiled.uses_usage |= expression.sees("usage");
                compiled.uses_results |= expression.sees("results");
                Ok::<_, CompileError>(expression)
            };
            for condition in &tool.preconditions {
                let expression = expression(&condition.name, &condition.cel)?;
                let (name, message) = (condition.name.clone(), condition.message.clone());
                compiled.preconditions.push(Condition { name, expression, message });
            }
            let when = tool.approval.as_ref().and_then(|approval| approval.when.as_deref());
            compiled.approval_when = when.map(|when| expression("approval.when", when)).transpose()?;
            let applied = tool.verify.as_ref().map(|read| expression("verify.applied", &read.applied));
            compiled.applied = applied.transpose()?;
            let undo = tool.compensation().map(|undo| {
                let arguments = undo.arguments.iter();
                arguments.map(|(name, cel)| Ok((name.clone(), expression("rollback.call.arguments", cel)?))).collect()
            });
            compiled.undo = undo.transpose()?;
            uses_results |= compiled.uses_results;
            if tools.insert(tool.name.clone(), compiled).is_some() {
                return Err(CompileError::Duplicate(tool.name.clone()));
            }
        }
        Ok(Self { tools, uses_results, nothing: shown(policy, BTreeMap::new()), policy: policy.clone() })
    }

    /// Returns the policy that was compiled.
    pub fn policy(&self) -> &PolicyConfig {
        &self.policy
    }

    /// Returns the tools, sorted by name.
    pub fn tools(&self) -> impl Iterator<Item = &Tool> {
        self.tools.values().map(|compiled| &compiled.tool)
    }

    /// Returns the results of a task that has made no call yet.
    pub fn no_results(&self) -> Results {
        shown(&self.policy, BTreeMap::new())
    }

    /// Returns the earlier results, with this result in place of the last result of the tool. A result that is too long, or that does not
    /// fit beside the others, is left out. The result before it is left out too, because a condition must not be evaluated with outdated
    /// data. Returns `None` if no precondition reads results, so the caller does not need to store them.
    pub fn with_result(&self, results: &Results, tool: &str, result: &Value) -> Option<Results> {
        if !self.uses_results {
            return None;
        }
        let mut kept = results.kept.clone();
        kept.remove(tool);
        let size = serde_json::to_vec(result).map_or(usize::MAX, |text| text.len());
        let sum = kept.values().map(|(_, size)| size).fold(size, |sum, size| sum.saturating_add(*size));
        if size <= LONGEST_RESULT && sum <= LONGEST_RESULTS {
            kept.insert(tool.to_owned(), (result.clone(), size));
        }
        Some(shown(&self.policy, kept))
    }

    /// Returns whether the result of the read shows that a call of a tool took effect.
    ///
    /// # Errors
    /// Returns an error with the reason if the result shows neither.
    pub fn applied(&self, tool: &str, arguments: &Value, read: &Value) -> Result<bool, String> {
        let applied = self.tools.get(tool).and_then(|compiled| compiled.applied.as_ref());
        let applied = applied.ok_or_else(|| format!("the contract of {} has no verify", shorten(tool)))?;
        let length = serde_json::to_vec(read).map_or(usize::MAX, |text| text.len());
        if length > LONGEST_ANSWER {
            return Err(format!("the answer is {length} bytes of JSON, more than {LONGEST_ANSWER}; return less"));
        }
        let mut context = self.nothing.context.new_inner_scope();
        context.add_variable_as_val("args", expression::json(arguments));
        context.add_variable_as_val("result", expression::json(read));
        applied.holds(&context)
    }

    /// Returns the arguments of the compensation of a call of a tool.
    ///
    /// # Errors
    /// Returns an error that names the first argument that cannot be evaluated, and the reason.
    pub fn undo(&self, tool: &str, arguments: &Value, result: &Value) -> Result<Map<String, Value>, String> {
        let undo = self.tools.get(tool).and_then(|compiled| compiled.undo.as_ref());
        let undo = undo.ok_or_else(|| format!("the contract of {} has no rollback by a call", shorten(tool)))?;
        let mut context = self.nothing.context.new_inner_scope();
        context.add_variable_as_val("args", expression::json(arguments));
        context.add_variable_as_val("result", expression::json(result));
        let argument = |(name, expression): &(String, Expression)| match expression.value(&context) {
            Ok(value) => Ok((name.clone(), json::whole(value))),
            Err(reason) => Err(format!("{name}: {reason}")),
        };
        meter::metered(|| undo.iter().map(argument).collect())
    }

    /// Decides whether a call is allowed.
    pub fn decide(&self, name: &str, arguments: Arguments<'_>, known: DecisionInputs<'_>, salt: &Salt) -> Decision<'_> {
        let unreadable = |text: &[u8], reason: String| Decision {
            verdict: Err(Denial { rule: Rule::RequestJson, reason }),
            arguments: Value::Null,
            digest: salt.bytes(text),
            bytes: u64::try_from(text.len()).unwrap_or(u64::MAX),
            needs_approval: false,
        };
        let mut budget = Budget::resume(self.policy.limits, known.usage).ignoring(known.ignored);
        let open = budget.open().map_err(Denial::from);
        let (arguments, text) = match arguments {
            Arguments::Text(text) => match json::parse(text) {
                Ok(value) => (value, text),
                Err(ambiguous) => {
                    let mut decision = unreadable(text, ambiguous.to_string());
                    decision.verdict = open.and(decision.verdict);
                    return decision;
                }
            },
            Arguments::Parsed(value) => (value, [].as_slice()),
        };
        let exact = json::exact(&arguments);
        let arguments = json::whole(arguments);
        let committed =
            canonical::to_bytes(&arguments).and_then(|canonical| Ok((canonical.len(), salt.value(&arguments)?)));
        let (bytes, digest) = match committed {
            Ok(committed) => committed,
            Err(error) => return unreadable(text, error.to_string()),
        };
        let verdict = open
            .and_then(|()| exact.map_err(|ambiguous| Denial { rule: Rule::RequestJson, reason: ambiguous.to_string() }))
            .and_then(|()| self.is_short(name, bytes))
            .and_then(|()| self.judge(name, &arguments, known, |_| true))
            .and_then(|judged| {
                budget.reserve_tool_call()?;
                Ok(judged)
            });
        Decision {
            needs_approval: verdict.as_ref().is_ok_and(|(_, needs_approval)| *needs_approval),
            verdict: verdict.map(|(tool, _)| tool),
            arguments,
            digest,
            bytes: u64::try_from(bytes).unwrap_or(u64::MAX),
        }
    }

    /// Checks whether arguments of this length in canonical form are as short as the contract and Belay require. This check comes before
    /// all checks whose time depends on the length.
    ///
    /// # Errors
    /// Returns [`Rule::ToolRequestBytes`] if the arguments are longer.
    pub fn is_short(&self, name: &str, bytes: usize) -> Result<(), Denial> {
        let Some(compiled) = self.tools.get(name) else { return Ok(()) };
        let own = compiled.tool.limits.request_bytes.and_then(|most| usize::try_from(most).ok());
        let most = own.unwrap_or(LONGEST_ARGUMENTS).min(LONGEST_ARGUMENTS);
        if bytes <= most {
            return Ok(());
        }
        let whose = if own.is_some() { "the contract allows" } else { "Belay allows" };
        let reason = format!("the arguments are {bytes} bytes of JSON; {whose} {most}; send less");
        Err(Denial { rule: Rule::ToolRequestBytes, reason })
    }

    /// Returns the length in bytes of the longest request that can hold a call of any of the tools. Each byte of canonical JSON may be
    /// written as six bytes, and the rest of the request needs space as well. A longer request does not need to be read.
    pub fn longest_text(&self) -> usize {
        let of = |compiled: &Compiled| {
            let own = compiled.tool.limits.request_bytes.and_then(|most| usize::try_from(most).ok());
            own.unwrap_or(LONGEST_ARGUMENTS).min(LONGEST_ARGUMENTS)
        };
        let longest = self.tools.values().map(of).max().unwrap_or_default();
        longest.saturating_mul(6).saturating_add(AROUND)
    }

    /// Checks what the call alone determines: what contract and class say about the tool, the side effect and the arguments, without the
    /// counters and results that only a harness has. Returns whether the call certainly needs approval.
    ///
    /// # Errors
    /// Returns the first rule that fails.
    pub fn check_stateless(&self, name: &str, arguments: &Value) -> Result<bool, Denial> {
        let known = DecisionInputs { usage: Usage::default(), ignored: 0, results: &self.nothing };
        self.judge(name, arguments, known, is_of_the_call).map(|(_, needs_approval)| needs_approval)
    }

    /// Returns whether calls of a tool are evaluated in microseconds if the arguments are at most [`cost::SHORT`] bytes.
    pub fn is_bounded_cost(&self, name: &str) -> bool {
        self.tools.get(name).is_none_or(|compiled| compiled.is_bounded_cost)
    }

    /// Returns whether the decision of a tool's contract may change with the counters, and whether it may change with the results of other
    /// calls.
    pub fn sees(&self, name: &str) -> (bool, bool) {
        self.tools.get(name).map_or((true, true), |compiled| (compiled.uses_usage, compiled.uses_results))
    }

    /// Checks again, with what is known now, whether the contract allows a call that was already allowed. Returns whether the call needs
    /// approval. What the call alone determines has not changed and is not checked again.
    ///
    /// # Errors
    /// Returns the first rule that fails.
    pub fn check_stateful(&self, name: &str, arguments: &Value, known: DecisionInputs<'_>) -> Result<bool, Denial> {
        self.tools
            .get(name)
            .ok_or_else(|| self.unknown(name))?
            .conditions(arguments, known, |expression| !is_of_the_call(expression))
    }

    /// Evaluates the contract's own rules. Returns the tool, and whether the call needs approval.
    fn judge(
        &self,
        name: &str,
        arguments: &Value,
        known: DecisionInputs<'_>,
        asked: impl Fn(&Expression) -> bool,
    ) -> Result<(&Tool, bool), Denial> {
        let deny = |rule, reason| Err(Denial { rule, reason });
        let compiled = self.tools.get(name).ok_or_else(|| self.unknown(name))?;
        let effect = compiled.tool.side_effect;
        if !self.policy.allowed_effects.contains(&effect) {
            return deny(
                Rule::ToolEffect,
                format!("{name} has side effect {}, which the workflow class does not allow", effect.as_str()),
            );
        }
        // One allowance covers everything that the contract evaluates.
        meter::metered(|| {
            let misfit = match compiled.schema.check(arguments) {
                Ok(()) => return Ok((&compiled.tool, compiled.conditions(arguments, known, asked)?)),
                Err(Misfit::At { instance, words, .. }) => {
                    let place = if instance.is_empty() { "the arguments".to_owned() } else { shorten(&instance) };
                    // The reason is recorded, and records must not contain arguments.
                    format!("{place}: {}", shorten_to(&words, LONGEST_MISFIT))
                }
                Err(Misfit::Exceeded(exceeded)) => {
                    format!(
                        "the arguments cannot be checked against the input schema: {}",
                        compiled.too_much(&exceeded.to_string())
                    )
                }
            };
            deny(Rule::ToolSchema, misfit)
        })
    }

    fn unknown(&self, name: &str) -> Denial {
        let names = match self.tools.is_empty() {
            true => "none".into(),
            false => self.tools.keys().take(16).map(String::as_str).collect::<Vec<_>>().join(", "),
        };
        let reason = format!("no contract of this task has a tool {:?}; it has {names}", shorten(name));
        Denial { rule: Rule::ToolUnknown, reason }
    }
}

/// Returns results in the form that conditions see.
fn shown(policy: &PolicyConfig, kept: BTreeMap<String, (Value, usize)>) -> Results {
    let mut context = expression::context(&policy.task);
    let values = kept.iter().map(|(tool, (value, _))| (tool.clone(), expression::json_kept(value)));
    context.add_variable_as_val("results", expression::map(values));
    Results { kept, context }
}

impl Compiled {
    /// Describes what to do about an evaluation that exceeds its allowance.
    fn too_much(&self, what: &str) -> String {
        format!(
            "{what}; send less, or have the owner of ToolContract {} limit its arguments with maxItems and maxLength",
            self.tool.contract
        )
    }

    /// Checks the preconditions that `asked` selects, and returns whether the call needs approval. Without `approval.when`, every call
    /// needs approval if the contract requires one. If `asked` does not select `approval.when`, the call does not certainly need approval.
    fn conditions(
        &self,
        arguments: &Value,
        known: DecisionInputs<'_>,
        asked: impl Fn(&Expression) -> bool,
    ) -> Result<bool, Denial> {
        let preconditions = || self.preconditions.iter().filter(|condition| asked(&condition.expression));
        let when = self.approval_when.as_ref().filter(|when| asked(when));
        if preconditions().next().is_none() && when.is_none() {
            return Ok(self.approval_when.is_none() && self.tool.approval.is_some());
        }
        meter::metered(|| self.asked(arguments, known, preconditions(), when))
    }

    fn asked<'c>(
        &'c self,
        arguments: &Value,
        known: DecisionInputs<'_>,
        preconditions: impl Iterator<Item = &'c Condition>,
        when: Option<&Expression>,
    ) -> Result<bool, Denial> {
        let mut context = known.results.context.new_inner_scope();
        if self.uses_args {
            context.add_variable_as_val("args", expression::json(arguments));
        }
        if self.uses_usage {
            context.add_variable_as_val("usage", expression::usage(known.usage));
        }
        for Condition { name, expression, message } in preconditions {
            let why = match expression.holds(&context) {
                Ok(true) => continue,
                Ok(false) => message.clone(),
                Err(neither) if meter::ended_by_itself().is_err() => {
                    format!("{} ({message})", self.too_much(&neither))
                }
                Err(neither) => format!("{neither} ({message})"),
            };
            return Err(Denial {
                rule: Rule::ToolPrecondition,
                reason: format!("precondition {name} does not hold: {why}"),
            });
        }
        Ok(match when {
            // Only `false` makes approval unnecessary. A failed evaluation does not.
            Some(when) => when.holds(&context) != Ok(false),
            None => self.approval_when.is_none() && self.tool.approval.is_some(),
        })
    }
}

/// The last successful result of each tool in this task, and the CEL context that shows them.
///
/// The results exist only in the memory of the harness. After a restart, and in another attempt, there are none, and conditions that need
/// one deny.
pub struct Results {
    /// Each result, with its size in bytes of JSON.
    kept: BTreeMap<String, (Value, usize)>,
    /// `task`, `principal` and `results`, with all functions.
    context: Context<'static, 'static>,
}

#[cfg(test)]
mod reference;
#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::policy::config::*;

    pub(crate) fn salt() -> Salt {
        Salt::new([7; 32])
    }

    /// A policy with one tool: `open_ticket`.
    pub(crate) fn policy(effects: Vec<SideEffect>) -> PolicyConfig {
        PolicyConfig {
            task: TaskIdentity {
                namespace: "demo".into(),
                name: "triage".into(),
                uid: "u".into(),
                objective: "find out".into(),
                workflow_class: "incident".into(),
                task_class: None,
                principal: "ana".into(),
                requester: None,
                image: "i".into(),
                rollback_of: None,
            },
            pack: PackIdentity { name: "dev".into(), uid: "p".into(), environment: "dev".into() },
            limits: Limits {
                wall_time_seconds: 60,
                tool_calls: 4,
                tokens: 100,
                denials: Some(2),
                cost_micros: None,
                approval_wait_seconds: 0,
            },
            allowed_effects: effects,
            tools: vec![Tool {
                contract: "open-ticket".into(),
                name: "open_ticket".into(),
                description: "d".into(),
                upstream: Upstream::Mcp(McpUpstream {
                    url: "https://tickets.test/mcp".into(),
                    tool: "open".into(),
                    digest: None,
                }),
                output: None,
                limits: ToolLimits::default(),
                input: json!({
                    "type": "object",
                    "properties": {"title": {"type": "string", "maxLength": 20}, "severity": {"type": "string"}},
                    "required": ["title"],
                    "additionalProperties": false
                }),
                preconditions: vec![
                    Precondition {
                        name: "severity".into(),
                        cel: "!has(args.severity) || args.severity in ['low', 'high']".into(),
                        message: "critical needs a person".into(),
                    },
                    Precondition {
                        name: "own".into(),
                        cel: "principal == 'ana' && task.namespace == 'demo' && usage.toolCalls < 3".into(),
                        message: "not yours".into(),
                    },
                ],
                idempotency: None,
                verify: None,
                rollback: None,
                approval: None,
                side_effect: SideEffect::Write,
                data: DataClass::default(),
                redact: vec![],
            }],
            models: ModelEndpoints::default(),
            egress: vec![],
            access: Access::default(),
            ignored_hosts: vec![],
            upstream_timeout_seconds: None,
        }
    }

    fn denied(contracts: &Contracts, tool: &str, args: Value, usage: Usage) -> Option<Rule> {
        let results = contracts.no_results();
        let decision = contracts.decide(
            tool,
            Arguments::Parsed(args),
            DecisionInputs { usage, ignored: 0, results: &results },
            &salt(),
        );
        decision.verdict.err().map(|denial| denial.rule)
    }

    #[rstest]
    #[case::allowed("open_ticket", json!({"title": "a"}), 0, None)]
    #[case::allowed_with_severity("open_ticket", json!({"title": "a", "severity": "high"}), 2, None)]
    #[case::unknown("delete_ticket", json!({}), 0, Some(Rule::ToolUnknown))]
    #[case::look_alike("open_tickеt", json!({"title": "a"}), 0, Some(Rule::ToolUnknown))]
    #[case::missing("open_ticket", json!({}), 0, Some(Rule::ToolSchema))]
    #[case::smuggled("open_ticket", json!({"title": "a", "admin": true}), 0, Some(Rule::ToolSchema))]
    #[case::wrong_type("open_ticket", json!({"title": 1}), 0, Some(Rule::ToolSchema))]
    #[case::too_long("open_ticket", json!({"title": "a".repeat(21)}), 0, Some(Rule::ToolSchema))]
    #[case::precondition("open_ticket", json!({"title": "a", "severity": "critical"}), 0, Some(Rule::ToolPrecondition))]
    #[case::used_up("open_ticket", json!({"title": "a"}), 3, Some(Rule::ToolPrecondition))]
    #[case::no_object("open_ticket", json!(["a"]), 0, Some(Rule::ToolSchema))]
    #[case::minus_zero("open_ticket", json!({"title": -0.0}), 0, Some(Rule::RequestJson))]
    #[case::rounded("open_ticket", json!({"title": 9_007_199_254_740_993_i64}), 0, Some(Rule::RequestJson))]
    fn calls(#[case] tool: &str, #[case] args: Value, #[case] used: i64, #[case] denied_by: Option<Rule>) {
        let contracts = Contracts::compile(&policy(vec![SideEffect::Read, SideEffect::Write])).unwrap();
        let usage = Usage { tool_calls: used, ..Usage::default() };
        assert_eq!(denied(&contracts, tool, args, usage), denied_by);
    }

    #[rstest]
    #[case::allowed(r#"{"title":"a"}"#, None)]
    #[case::twice(r#"{"title":"a","title":"a"}"#, Some(Rule::RequestJson))]
    #[case::twice_escaped(r#"{"title":"a","t\u0069tle":"a"}"#, Some(Rule::RequestJson))]
    #[case::nan(r#"{"title":NaN}"#, Some(Rule::RequestJson))]
    #[case::overflow(r#"{"title":1e999}"#, Some(Rule::RequestJson))]
    #[case::look_alike_name(r#"{"title":"a","severity":"low","\u0455everity":"critical"}"#, Some(Rule::ToolSchema))]
    fn arguments_are_read_from_their_bytes(#[case] text: &str, #[case] denied_by: Option<Rule>) {
        let contracts = Contracts::compile(&policy(vec![SideEffect::Write])).unwrap();
        let known = DecisionInputs { usage: Usage::default(), ignored: 0, results: &contracts.no_results() };
        let decision = contracts.decide("open_ticket", Arguments::Text(text.as_bytes()), known, &salt());
        assert_eq!(decision.verdict.err().map(|denial| denial.rule), denied_by);
        assert_eq!(decision.digest.len(), 64);
    }

    #[test]
    fn after_enough_refusals_everything_is_refused_for_that_reason() {
        let contracts = Contracts::compile(&policy(vec![SideEffect::Write])).unwrap();
        let usage = Usage { denials: 2, ..Usage::default() };
        for (tool, args) in [("open_ticket", json!({"title": "a"})), ("nothing", json!({})), ("open_ticket", json!({}))]
        {
            assert_eq!(denied(&contracts, tool, args, usage), Some(Rule::Denials));
        }
    }

    #[test]
    fn no_reason_quotes_an_argument() {
        let mut policy = policy(vec![SideEffect::Write]);
        let conditions =
            ["args.title + 1 > 2", "args.title[0] == 'x'", "int(args.title) == 1", "args.title.nothing == 1"];
        for condition in conditions {
            policy.tools[0].preconditions[0].cel = condition.into();
            let contracts = Contracts::compile(&policy).unwrap();
            for args in
                [json!({"title": "s3cret"}), json!({"title": "s3cret s3cret s3cret"}), json!({"title": ["s3cret"]})]
            {
                let known = DecisionInputs { usage: Usage::default(), ignored: 0, results: &contracts.no_results() };
                let denial =
                    contracts.decide("open_ticket", Arguments::Parsed(args), known, &salt()).verdict.unwrap_err();
                assert!(!denial.reason.contains("s3cret"), "{denial:?}");
            }
        }
    }

    #[test]
    fn the_digest_is_of_what_the_arguments_mean() {
        let contracts = Contracts::compile(&policy(vec![SideEffect::Write])).unwrap();
        let known = DecisionInputs { usage: Usage::default(), ignored: 0, results: &contracts.no_results() };
        let digest =
            |text: &str| contracts.decide("open_ticket", Arguments::Text(text.as_bytes()), known, &salt()).digest;
        let one = digest(r#"{"title":"a","severity":"low"}"#);
        assert_eq!(one, digest(" { \"severity\" : \"l\\u006fw\", \"title\":\"a\" } "));
        assert_ne!(one, digest(r#"{"title":"b","severity":"low"}"#));
    }

    #[test]
    fn preconditions_see_results_of_earlier_calls_and_deny_without_them() {
        let mut policy = policy(vec![SideEffect::Write]);
        policy.tools[0].preconditions = vec![Precondition {
            name: "looked-up".into(),
            cel: "results.lookup.owner == principal && results['lookup'].count + 1 > 1".into(),
            message: "look it up first".into(),
        }];
        let contracts = Contracts::compile(&policy).unwrap();
        let allowed = |results: &Results| {
            let known = DecisionInputs { usage: Usage::default(), ignored: 0, results };
            contracts.decide("open_ticket", Arguments::Parsed(json!({"title": "a"})), known, &salt()).verdict.is_ok()
        };
        let none = contracts.no_results();
        assert!(!allowed(&none));
        let keep = |results: &Results, value: Value| contracts.with_result(results, "lookup", &value).unwrap();
        let mine = keep(&none, json!({"owner": "ana", "count": 1}));
        assert!(allowed(&mine));
        assert!(!allowed(&keep(&mine, json!({"owner": "bob", "count": 1}))), "the last result counts");
        assert!(!allowed(&keep(&mine, json!("ana"))), "a result of another shape denies");
        let long = keep(&mine, json!({"owner": "ana", "count": 1, "more": "x".repeat(LONGEST_RESULT)}));
        assert!(!allowed(&long), "a result that is too long is absent, and so is the one before it");
    }

    #[test]
    fn results_take_no_more_than_their_room() {
        let mut policy = policy(vec![]);
        policy.tools[0].preconditions[0].cel = "results.size() >= 0".into();
        let contracts = Contracts::compile(&policy).unwrap();
        let mut results = contracts.no_results();
        let value = json!("x".repeat(LONGEST_RESULT - 2));
        for n in 0..40 {
            results = contracts.with_result(&results, &format!("t{n}"), &value).unwrap();
        }
        assert_eq!(results.kept.len(), LONGEST_RESULTS / LONGEST_RESULT);
    }

    #[test]
    fn results_that_nobody_looks_at_are_not_kept() {
        let contracts = Contracts::compile(&policy(vec![])).unwrap();
        assert!(contracts.with_result(&contracts.no_results(), "t", &json!(1)).is_none());
    }

    #[rstest]
    #[case::always(None, json!({"title": "a"}), true)]
    #[case::condition(Some("args.title == 'a'"), json!({"title": "a"}), true)]
    #[case::no_condition(Some("args.title == 'a'"), json!({"title": "b"}), false)]
    #[case::error(Some("args.nothing == 1"), json!({"title": "a"}), true)]
    #[case::no_answer(Some("'no'"), json!({"title": "a"}), true)]
    #[case::counters(Some("usage.toolCalls > 0"), json!({"title": "a"}), false)]
    #[case::denied(None, json!({}), false)]
    fn people_are_asked_unless_a_condition_is_false(
        #[case] when: Option<&str>,
        #[case] arguments: Value,
        #[case] expected: bool,
    ) {
        let mut policy = policy(vec![SideEffect::Write]);
        policy.tools[0].preconditions.clear();
        policy.tools[0].approval = Some(Approval {
            when: when.map(Into::into),
            approvers: Default::default(),
            required: 1,
            timeout_seconds: 60,
            on_timeout: OnTimeout::Deny,
            hold_seconds: 0,
        });
        let contracts = Contracts::compile(&policy).unwrap();
        let known = DecisionInputs { usage: Usage::default(), ignored: 0, results: &contracts.no_results() };
        let decision = contracts.decide("open_ticket", Arguments::Parsed(arguments), known, &salt());
        assert_eq!(decision.needs_approval, expected, "{decision:?}");
    }

    #[test]
    fn an_effect_that_the_class_does_not_allow_is_denied() {
        let contracts = Contracts::compile(&policy(vec![SideEffect::Read])).unwrap();
        assert_eq!(denied(&contracts, "open_ticket", json!({}), Usage::default()), Some(Rule::ToolEffect));
    }

    #[test]
    fn an_expression_that_fails_or_is_no_yes_or_no_denies() {
        for cel in ["args.nothing == 1", "1 + 1", "undeclared", "'yes'"] {
            let mut policy = policy(vec![SideEffect::Write]);
            policy.tools[0].preconditions =
                vec![Precondition { name: "odd".into(), cel: cel.into(), message: "m".into() }];
            let contracts = Contracts::compile(&policy).unwrap();
            let found = denied(&contracts, "open_ticket", json!({"title": "a"}), Usage::default());
            assert_eq!(found, Some(Rule::ToolPrecondition), "{cel}");
        }
    }

    #[test]
    fn a_policy_that_cannot_be_enforced_does_not_compile() {
        let mut broken = policy(vec![]);
        broken.tools[0].preconditions[0].cel = "args.".into();
        assert!(Contracts::compile(&broken).is_err());
        let mut broken = policy(vec![]);
        broken.tools[0].input = json!({"type": 7});
        assert!(Contracts::compile(&broken).is_err());
        let mut broken = policy(vec![]);
        broken.tools.push(broken.tools[0].clone());
        assert!(Contracts::compile(&broken).is_err());
    }

    proptest! {
        /// No arguments cause a panic, and no arguments with an undeclared property pass.
        #[test]
        fn any_arguments_are_decided(key in "[a-z]{1,8}", text in ".{0,40}") {
            let contracts = Contracts::compile(&policy(vec![SideEffect::Write])).unwrap();
            let args = json!({"title": "a", key.clone(): text});
            let found = denied(&contracts, "open_ticket", args, Usage::default());
            if key != "title" && key != "severity" {
                prop_assert_eq!(found, Some(Rule::ToolSchema));
            }
        }
    }
}
