//! One tool call: allow or deny, and by which rule.
//!
//! Everything is compiled once an attempt ([`Contracts::compile`]); a call builds one CEL context. The order of the rules
//! is fixed, cheapest first, and the first that does not hold is the answer: known, effect, schema, preconditions. Budgets
//! come after, as they change state.

use std::collections::BTreeMap;

use cel::{Context, Program, Value as CelValue};
use serde_json::{Map, Value};

use super::{
    config::{PolicyConfig, TaskIdentity, Tool, Usage},
    rule::Rule,
};

/// A policy that cannot be enforced. The operator refuses such a task; a harness that meets one does not start.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The input schema is not a JSON Schema.
    #[error("tool {tool}: input is not a JSON Schema: {reason}")]
    Schema {
        /// The tool.
        tool: String,
        /// Why not.
        reason: String,
    },
    /// A precondition is not CEL.
    #[error("tool {tool}: precondition {name} is not a CEL expression: {reason}")]
    Precondition {
        /// The tool.
        tool: String,
        /// The precondition.
        name: String,
        /// Why not.
        reason: String,
    },
    /// Two tools have one name.
    #[error("tool {0} is there twice: give each contract its own spec.tool")]
    Duplicate(String),
}

/// A refusal: the rule, and what the agent is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// The rule that does not hold.
    pub rule: Rule,
    /// What was expected, what was found, what to do.
    pub reason: String,
}

/// The rules that an allowed tool call has passed, in the order in which they were asked.
pub const TOOL_RULES: [Rule; 4] = [Rule::ToolKnown, Rule::ToolEffect, Rule::ToolSchema, Rule::ToolPrecondition];

/// A task's contracts, compiled.
pub struct Contracts {
    tools: BTreeMap<String, Compiled>,
    task: CelValue,
    principal: String,
    policy: PolicyConfig,
}

struct Compiled {
    tool: Tool,
    schema: jsonschema::Validator,
    preconditions: Vec<(String, Program, String)>,
}

impl Contracts {
    /// Compiles a policy's tools.
    ///
    /// # Errors
    /// If a schema or an expression is not one, or a name is there twice.
    pub fn compile(policy: &PolicyConfig) -> Result<Self, CompileError> {
        let mut tools = BTreeMap::new();
        for tool in &policy.tools {
            let schema = jsonschema::draft202012::options()
                .build(&tool.input)
                .map_err(|error| CompileError::Schema { tool: tool.name.clone(), reason: error.to_string() })?;
            let mut preconditions = Vec::with_capacity(tool.preconditions.len());
            for condition in &tool.preconditions {
                let program = Program::compile(&condition.cel).map_err(|error| CompileError::Precondition {
                    tool: tool.name.clone(),
                    name: condition.name.clone(),
                    reason: error.to_string(),
                })?;
                preconditions.push((condition.name.clone(), program, condition.message.clone()));
            }
            let compiled = Compiled { tool: tool.clone(), schema, preconditions };
            if tools.insert(tool.name.clone(), compiled).is_some() {
                return Err(CompileError::Duplicate(tool.name.clone()));
            }
        }
        Ok(Self {
            tools,
            task: task_value(&policy.task),
            principal: policy.task.principal.clone(),
            policy: policy.clone(),
        })
    }

    /// The policy that was compiled.
    pub fn policy(&self) -> &PolicyConfig {
        &self.policy
    }

    /// The tools, sorted by name.
    pub fn tools(&self) -> impl Iterator<Item = &Tool> {
        self.tools.values().map(|compiled| &compiled.tool)
    }

    /// Whether a call may leave, budgets aside.
    ///
    /// # Errors
    /// The first rule that does not hold.
    pub fn decide(&self, name: &str, args: &Map<String, Value>, usage: Usage) -> Result<&Tool, Denial> {
        let deny = |rule, reason| Err(Denial { rule, reason });
        let Some(compiled) = self.tools.get(name) else {
            return deny(
                Rule::ToolKnown,
                format!("no contract of this task has a tool {:?}; it has {}", shorten(name), self.names()),
            );
        };
        let effect = compiled.tool.side_effect;
        if !self.policy.allowed_effects.contains(&effect) {
            return deny(
                Rule::ToolEffect,
                format!("{name} has side effect {}, which the workflow class does not allow", effect.as_str()),
            );
        }
        let instance = Value::Object(args.clone());
        if let Err(error) = compiled.schema.validate(&instance) {
            let place = error.instance_path().to_string();
            let place = if place.is_empty() { "the arguments".to_owned() } else { shorten(&place) };
            return deny(Rule::ToolSchema, format!("{place}: {}", shorten(&error.to_string())));
        }
        self.preconditions(compiled, instance, usage)?;
        Ok(&compiled.tool)
    }

    fn preconditions(&self, compiled: &Compiled, args: Value, usage: Usage) -> Result<(), Denial> {
        if compiled.preconditions.is_empty() {
            return Ok(());
        }
        let deny = |name: &str, message: String| Denial {
            rule: Rule::ToolPrecondition,
            reason: format!("precondition {name} does not hold: {message}"),
        };
        let mut context = Context::default();
        let first = || compiled.preconditions.first().map_or("", |(name, _, _)| name.as_str());
        context
            .add_variable("args", args)
            .map_err(|error| deny(first(), format!("the arguments cannot be looked at: {error}")))?;
        context.add_variable_from_value("task", self.task.clone());
        context.add_variable_from_value("principal", self.principal.clone());
        context.add_variable_from_value("usage", usage_value(usage));
        for (name, program, message) in &compiled.preconditions {
            match program.execute(&context) {
                Ok(CelValue::Bool(true)) => {}
                Ok(CelValue::Bool(false)) => return Err(deny(name, message.clone())),
                Ok(_) => return Err(deny(name, format!("it is not a yes or no ({message})"))),
                Err(error) => return Err(deny(name, format!("{} ({message})", shorten(&error.to_string())))),
            }
        }
        Ok(())
    }

    fn names(&self) -> String {
        if self.tools.is_empty() {
            return "none".into();
        }
        self.tools.keys().take(16).map(String::as_str).collect::<Vec<_>>().join(", ")
    }
}

fn task_value(task: &TaskIdentity) -> CelValue {
    let fields = [
        ("namespace", &task.namespace),
        ("name", &task.name),
        ("uid", &task.uid),
        ("objective", &task.objective),
        ("workflowClass", &task.workflow_class),
        ("principal", &task.principal),
    ];
    fields
        .into_iter()
        .map(|(key, value)| (key.to_owned(), CelValue::from(value.as_str())))
        .collect::<std::collections::HashMap<String, CelValue>>()
        .into()
}

fn usage_value(usage: Usage) -> CelValue {
    [("toolCalls", usage.tool_calls), ("tokens", usage.tokens), ("denials", usage.denials)]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), CelValue::Int(value)))
        .collect::<std::collections::HashMap<String, CelValue>>()
        .into()
}

/// At most 256 characters, control characters escaped: agents choose this text, and people read it in terminals.
pub fn shorten(text: &str) -> String {
    const LONGEST: usize = 256;
    let mut short: String = text.chars().flat_map(EscapeControl::new).take(LONGEST).collect();
    if text.chars().count() > LONGEST {
        short.push('…');
    }
    short
}

enum EscapeControl {
    Plain(Option<char>),
    Escaped(std::char::EscapeDefault),
}

impl EscapeControl {
    fn new(c: char) -> Self {
        // Bidirectional overrides and zero-width characters hide text as control characters do.
        let hides =
            matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
        if c.is_control() || hides { Self::Escaped(c.escape_default()) } else { Self::Plain(Some(c)) }
    }
}

impl Iterator for EscapeControl {
    type Item = char;
    fn next(&mut self) -> Option<char> {
        match self {
            Self::Plain(c) => c.take(),
            Self::Escaped(escape) => escape.next(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::policy::config::*;

    /// A policy with one tool: `open_ticket`.
    pub(crate) fn policy(effects: Vec<SideEffect>) -> PolicyConfig {
        PolicyConfig {
            task: TaskIdentity {
                namespace: "demo".into(),
                name: "triage".into(),
                uid: "u".into(),
                generation: 1,
                objective: "find out".into(),
                workflow_class: "incident".into(),
                principal: "ana".into(),
                image: "i".into(),
            },
            pack: PackIdentity { name: "dev".into(), uid: "p".into(), generation: 1, environment: "dev".into() },
            limits: Limits { wall_time_seconds: 60, tool_calls: 3, tokens: 100 },
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
                side_effect: SideEffect::Write,
            }],
            models: ModelEndpoints::default(),
            egress: vec![],
        }
    }

    #[rstest]
    #[case::allowed("open_ticket", json!({"title": "a"}), 0, None)]
    #[case::allowed_with_severity("open_ticket", json!({"title": "a", "severity": "high"}), 2, None)]
    #[case::unknown("delete_ticket", json!({}), 0, Some(Rule::ToolKnown))]
    #[case::look_alike("open_tickеt", json!({"title": "a"}), 0, Some(Rule::ToolKnown))]
    #[case::missing("open_ticket", json!({}), 0, Some(Rule::ToolSchema))]
    #[case::smuggled("open_ticket", json!({"title": "a", "admin": true}), 0, Some(Rule::ToolSchema))]
    #[case::wrong_type("open_ticket", json!({"title": 1}), 0, Some(Rule::ToolSchema))]
    #[case::too_long("open_ticket", json!({"title": "a".repeat(21)}), 0, Some(Rule::ToolSchema))]
    #[case::precondition("open_ticket", json!({"title": "a", "severity": "critical"}), 0, Some(Rule::ToolPrecondition))]
    #[case::used_up("open_ticket", json!({"title": "a"}), 3, Some(Rule::ToolPrecondition))]
    fn calls(#[case] tool: &str, #[case] args: Value, #[case] used: i64, #[case] denied_by: Option<Rule>) {
        let contracts = Contracts::compile(&policy(vec![SideEffect::Read, SideEffect::Write])).unwrap();
        let usage = Usage { tool_calls: used, ..Usage::default() };
        let decision = contracts.decide(tool, args.as_object().unwrap(), usage);
        assert_eq!(decision.err().map(|denial| denial.rule), denied_by);
    }

    #[test]
    fn an_effect_that_the_class_does_not_allow_is_denied() {
        let contracts = Contracts::compile(&policy(vec![SideEffect::Read])).unwrap();
        let denial = contracts.decide("open_ticket", &Map::new(), Usage::default()).unwrap_err();
        assert_eq!(denial.rule, Rule::ToolEffect);
    }

    #[test]
    fn an_expression_that_fails_or_is_no_yes_or_no_denies() {
        for cel in ["args.nothing == 1", "1 + 1", "undeclared", "'yes'"] {
            let mut policy = policy(vec![SideEffect::Write]);
            policy.tools[0].preconditions =
                vec![Precondition { name: "odd".into(), cel: cel.into(), message: "m".into() }];
            let contracts = Contracts::compile(&policy).unwrap();
            let args = json!({"title": "a"});
            let denial = contracts.decide("open_ticket", args.as_object().unwrap(), Usage::default()).unwrap_err();
            assert_eq!(denial.rule, Rule::ToolPrecondition, "{cel}");
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

    #[test]
    fn what_agents_write_cannot_move_a_cursor() {
        assert_eq!(shorten("a\u{1b}[2Jb\nc\u{202e}d"), "a\\u{1b}[2Jb\\nc\\u{202e}d");
        assert_eq!(shorten(&"x".repeat(1000)).chars().count(), 257);
    }

    proptest! {
        /// No arguments panic, and none with an undeclared property pass.
        #[test]
        fn any_arguments_are_decided(key in "[a-z]{1,8}", text in ".{0,40}") {
            let contracts = Contracts::compile(&policy(vec![SideEffect::Write])).unwrap();
            let args = json!({"title": "a", key.clone(): text});
            let decision = contracts.decide("open_ticket", args.as_object().unwrap(), Usage::default());
            if key != "title" && key != "severity" {
                prop_assert_eq!(decision.err().map(|denial| denial.rule), Some(Rule::ToolSchema));
            }
        }
    }
}
