//! `make bench ONLY=decision`: measures the whole decision about one tool call, at 10, 100 and 1,000 contracts. Cedar and Regorus decide
//! with the same rules on the same bytes for comparison. It needs no cluster.
//!
//! Belay's side is what the harness does before it records an intent: strict JSON, schema, preconditions, budget and the digest of the
//! arguments. The others do less: they parse JSON as their libraries do, have no budget and hash nothing. The rules of each contract are a
//! separate policy, looked up in a map by the tool's name, so that the other engines do not evaluate a thousand policies for one call.
//! Before anything is measured, all sides must agree on every input. Then sides and sizes take turns, call by call.
#![allow(clippy::print_stdout, reason = "a program that prints a table")]

#[path = "../../measure.rs"]
mod measure;

use std::{collections::HashMap, hint::black_box, path::Path, time::Instant};

use anyhow::{Context as _, ensure};
use belay::policy::{
    budget::Budget,
    commit::Salt,
    config::{PolicyConfig, Usage},
    decide::{Arguments, Contracts, DecisionInputs, Results},
};
use measure::{Measure, percentile};
use serde_json::{Value, json};

const SIZES: [usize; 3] = [10, 100, 1_000];
/// The number of calls for each side and size.
const CALLS: usize = 40_000;
/// The number of calls before those, which are not counted.
const WARM_UP: usize = 2_000;
/// The goal for the 99th percentile of a decision, in microseconds.
const GOAL: f64 = 50.0;
/// The goal for the time at 1,000 contracts relative to that at 10. It allows for colder caches, and for nothing that grows with the number
/// of contracts.
const FLAT: f64 = 1.5;

/// An engine that decides whether a call is allowed.
trait Side {
    fn allows(&self, tool: &str, args: &str) -> bool;
}

/// Returns the maximum of `count` in a contract. Each contract has its own.
fn most(n: usize) -> usize {
    10 + n % 7
}

struct Belay {
    contracts: Contracts,
    results: Results,
    salt: Salt,
}

impl Belay {
    fn new(size: usize) -> anyhow::Result<Self> {
        let tool = |n: usize| {
            json!({
                "contract": format!("tool-{n}"), "name": format!("tool_{n}"), "description": "d",
                "upstream": {"mcp": {"url": "https://tools.test/mcp", "tool": "t"}}, "limits": {},
                "input": {
                    "type": "object", "required": ["title", "count"], "additionalProperties": false,
                    "properties": {
                        "title": {"type": "string"}, "severity": {"type": "string"},
                        "count": {"type": "integer"}, "note": {"type": "string"}
                    }
                },
                "preconditions": [
                    {"name": "few", "cel": format!("args.count >= 0 && args.count <= {}", most(n)), "message": "m"},
                    {"name": "calm", "cel": "!has(args.severity) || args.severity in ['low', 'high']", "message": "m"},
                    {"name": "own", "cel": "principal == 'ana' && task.namespace == 'demo' && usage.toolCalls < 50", "message": "m"}
                ],
                "sideEffect": "write"
            })
        };
        let policy: PolicyConfig = serde_json::from_value(json!({
            "task": {
                "namespace": "demo", "name": "t", "uid": "u", "objective": "o", "workflowClass": "c",
                "principal": "ana", "image": "i"
            },
            "pack": {"name": "p", "uid": "p", "environment": "dev"},
            "limits": {"wallTimeSeconds": 60, "toolCalls": 100, "tokens": 0, "denials": 100, "costMicros": 0},
            "allowedEffects": ["read", "write"], "tools": (0..size).map(tool).collect::<Vec<_>>(),
            "models": {}, "egress": []
        }))?;
        let contracts = Contracts::compile(&policy)?;
        let results = contracts.no_results();
        Ok(Self { contracts, results, salt: Salt::new([7; 32]) })
    }
}

impl Side for Belay {
    fn allows(&self, tool: &str, args: &str) -> bool {
        let usage = Usage { tool_calls: 7, ..Usage::default() };
        let known = DecisionInputs { usage, ignored: 0, results: &self.results };
        let decision = black_box(self.contracts.decide(tool, Arguments::Text(args.as_bytes()), known, &self.salt));
        let mut budget = Budget::resume(self.contracts.policy().limits, usage);
        decision.verdict.is_ok() && budget.reserve_tool_call().is_ok()
    }
}

struct Cedar {
    authorizer: cedar_policy::Authorizer,
    schema: cedar_policy::Schema,
    policies: HashMap<String, cedar_policy::PolicySet>,
    principal: cedar_policy::EntityUid,
    action: cedar_policy::EntityUid,
    entities: cedar_policy::Entities,
}

impl Cedar {
    fn new(size: usize) -> anyhow::Result<Self> {
        let (schema, _) = cedar_policy::Schema::from_cedarschema_str(
            r#"
            entity User; entity Tool;
            action call appliesTo {
                principal: User, resource: Tool,
                context: {
                    args: {title: String, count: Long, severity?: String, note?: String},
                    usage: {toolCalls: Long}, task: {namespace: String}
                }
            };
            "#,
        )?;
        let policies = (0..size)
            .map(|n| {
                let source = format!(
                    r#"
                    permit(principal == User::"ana", action == Action::"call", resource == Tool::"tool_{n}") when {{
                        context.args.count >= 0 && context.args.count <= {} &&
                        (!(context.args has severity) || ["low", "high"].contains(context.args.severity)) &&
                        context.task.namespace == "demo" && context.usage.toolCalls < 50
                    }};
                    "#,
                    most(n)
                );
                Ok((format!("tool_{n}"), source.parse()?))
            })
            .collect::<anyhow::Result<_>>()?;
        Ok(Self {
            authorizer: cedar_policy::Authorizer::new(),
            schema,
            policies,
            principal: r#"User::"ana""#.parse()?,
            action: r#"Action::"call""#.parse()?,
            entities: cedar_policy::Entities::empty(),
        })
    }

    fn decide(&self, tool: &str, args: &str) -> anyhow::Result<bool> {
        let policies = self.policies.get(tool).context("no such tool")?;
        let args: Value = serde_json::from_str(args)?;
        let context = json!({"args": args, "usage": {"toolCalls": 7}, "task": {"namespace": "demo"}});
        let context = cedar_policy::Context::from_json_value(context, Some((&self.schema, &self.action)))?;
        let kind = "Tool".parse()?;
        let resource = cedar_policy::EntityUid::from_type_name_and_id(kind, cedar_policy::EntityId::new(tool));
        let (principal, action) = (self.principal.clone(), self.action.clone());
        let request = cedar_policy::Request::new(principal, action, resource, context, Some(&self.schema))?;
        let answer = self.authorizer.is_authorized(&request, policies, &self.entities);
        Ok(answer.decision() == cedar_policy::Decision::Allow)
    }
}

impl Side for Cedar {
    fn allows(&self, tool: &str, args: &str) -> bool {
        self.decide(tool, args).unwrap_or(false)
    }
}

struct Regorus {
    policies: HashMap<String, regorus::CompiledPolicy>,
    rest: regorus::Value,
}

impl Regorus {
    fn new(size: usize) -> anyhow::Result<Self> {
        let policies = (0..size)
            .map(|n| {
                let source = format!(
                    r#"
                    package belay
                    import rego.v1
                    default allow := false
                    allow if {{
                        is_object(input.args)
                        every name, value in input.args {{ name in {{"title", "severity", "count", "note"}} }}
                        is_string(input.args.title)
                        is_number(input.args.count)
                        floor(input.args.count) == input.args.count
                        is_string(object.get(input.args, "severity", ""))
                        is_string(object.get(input.args, "note", ""))
                        input.args.count >= 0
                        input.args.count <= {}
                        object.get(input.args, "severity", "low") in {{"low", "high"}}
                        input.principal == "ana"
                        input.task.namespace == "demo"
                        input.usage.toolCalls < 50
                    }}
                    "#,
                    most(n)
                );
                let mut engine = regorus::Engine::new();
                engine.add_policy("belay.rego".into(), source)?;
                Ok((format!("tool_{n}"), engine.compile_with_entrypoint(&"data.belay.allow".into())?))
            })
            .collect::<anyhow::Result<_>>()?;
        let rest = r#"{"principal": "ana", "task": {"namespace": "demo"}, "usage": {"toolCalls": 7}}"#;
        Ok(Self { policies, rest: regorus::Value::from_json_str(rest)? })
    }

    fn decide(&self, tool: &str, args: &str) -> anyhow::Result<bool> {
        let policy = self.policies.get(tool).context("no such tool")?;
        let mut input = self.rest.clone();
        input.as_object_mut()?.insert("args".into(), regorus::Value::from_json_str(args)?);
        Ok(policy.eval_with_input(input)? == regorus::Value::from(true))
    }
}

impl Side for Regorus {
    fn allows(&self, tool: &str, args: &str) -> bool {
        self.decide(tool, args).unwrap_or(false)
    }
}

/// Returns the calls as bytes, and whether they are to be allowed. Three of four are.
fn inputs(size: usize) -> Vec<(String, String, bool)> {
    let note = "The checkout service answers 503 since 09:40; the last deploy was at 09:38. ".repeat(4);
    let mut inputs = Vec::new();
    for n in 0..64 {
        let at = n * size / 64;
        let tool = |at: usize| format!("tool_{at}");
        let (count, beyond) = (most(at), most(at) + 1);
        inputs.extend([
            (tool(at), format!(r#"{{"title": "disk full", "count": {count}}}"#), true),
            (tool(at), format!(r#"{{"title": "disk full", "count": 3, "severity": "high", "note": "{note}"}}"#), true),
            (tool(at), r#"{"severity": "low", "title": "\u0064isk full", "count": 0}"#.to_owned(), true),
        ]);
        inputs.push(match n % 6 {
            0 => (tool(at), format!(r#"{{"title": "disk full", "count": {beyond}}}"#), false),
            1 => (tool(at), r#"{"title": "disk full", "count": 1, "severity": "critical"}"#.to_owned(), false),
            2 => (tool(at), r#"{"title": "disk full", "count": 1, "admin": "yes"}"#.to_owned(), false),
            3 => (tool(at), r#"{"title": 7, "count": 1}"#.to_owned(), false),
            4 => (tool(at), r#"{"title": "disk full"}"#.to_owned(), false),
            _ => (tool(size), r#"{"title": "disk full", "count": 1}"#.to_owned(), false),
        });
    }
    inputs
}

/// The sides at one number of contracts, with their inputs and the times that each side took.
struct Bout {
    size: usize,
    sides: [Box<dyn Side>; 3],
    inputs: Vec<(String, String, bool)>,
    took: [Vec<f64>; 3],
}

/// The names, in the order of [`Bout::sides`].
const NAMES: [&str; 3] = ["belay", "cedar", "regorus"];

impl Bout {
    fn new(size: usize) -> anyhow::Result<Self> {
        let sides: [Box<dyn Side>; 3] =
            [Box::new(Belay::new(size)?), Box::new(Cedar::new(size)?), Box::new(Regorus::new(size)?)];
        let inputs = inputs(size);
        for (tool, args, expected) in &inputs {
            for (name, side) in NAMES.iter().zip(&sides) {
                let found = side.allows(tool, args);
                ensure!(
                    found == *expected,
                    "{name}, {size} contracts: {tool} {args}: expected {expected}, found {found}"
                );
            }
        }
        Ok(Self { size, sides, inputs, took: [const { Vec::new() }; 3] })
    }

    fn round(&mut self, call: usize) {
        let (tool, args, _) = &self.inputs[call % self.inputs.len()];
        // The first side finds colder caches, so the sides take turns to be first.
        for turn in 0..self.sides.len() {
            let at = (call + turn) % self.sides.len();
            let begun = Instant::now();
            black_box(self.sides[at].allows(black_box(tool), black_box(args)));
            let took = begun.elapsed();
            if call >= WARM_UP {
                self.took[at].push(took.as_secs_f64() * 1e6);
            }
        }
    }
}

fn main() -> anyhow::Result<()> {
    let only = std::env::var("ONLY").unwrap_or_default();
    let wanted = |size: &usize| {
        let name = format!("decision.{size}");
        name.starts_with(&only) || only.strip_prefix(&name).is_some_and(|rest| rest.starts_with('.'))
    };
    let mut bouts = SIZES.into_iter().filter(wanted).map(Bout::new).collect::<anyhow::Result<Vec<_>>>()?;
    ensure!(!bouts.is_empty(), "no measure begins with {only:?}; there are: decision.10, decision.100, decision.1000");
    for call in 0..CALLS + WARM_UP {
        bouts.iter_mut().for_each(|bout| bout.round(call));
    }
    let mut measures = Vec::new();
    let mut ends = Vec::new();
    for bout in &mut bouts {
        for percent in [50.0, 99.0] {
            let [belay, cedar, regorus] = bout.took.each_mut().map(|took| percentile(took, percent));
            for (peer, baseline) in [("cedar", cedar), ("regorus", regorus)] {
                let name = format!("decision.{}.p{percent}.{peer}", bout.size);
                measures.push(Measure::absolute(name, belay, "µs", CALLS, GOAL).beside(baseline));
            }
            ends.push((bout.size, percent, belay));
        }
    }
    for percent in [50.0, 99.0] {
        let at = |size: usize| ends.iter().find(|end| (end.0, end.1) == (size, percent)).map(|end| end.2);
        if let (Some(few), Some(many)) = (at(SIZES[0]), at(SIZES[2])) {
            measures.push(Measure::against(format!("decision.flat.p{percent}"), many, "µs", CALLS, few, FLAT));
        }
    }
    measure::report(&measures, Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/bench.jsonl")))
}
