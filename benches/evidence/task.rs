//! The task of the measured evidence: its policy, and its calls with their outcomes, as the harness records them.
//!
//! Of twenty calls, ten are reads over MCP, nine are reads over HTTP, and one is an idempotent write, of which a log has at most 4,096. The
//! pack classifies data and has rules and a risk score, as the pack for prod does. So every call is evaluated, and the verifier evaluates
//! it again.

use anyhow::{Context, anyhow};
use belay::{
    evidence::record::{AttemptOpened, CallOutcome, Channel, Containment, Intent, Outcome, Pod},
    policy::{
        access::{AccessPolicy, AccessRequest},
        commit::Salt,
        config::{PolicyConfig, Sensitivity, SideEffect, Usage},
        decide::{Arguments, Contracts, DecisionInputs, Results, TOOL_RULES},
        ledger,
        rule::Rule,
    },
};
use serde_json::{Value, json};

pub const UID: &str = "6f9c3c1e-0000-4000-8000-0000000000be";
pub const NAMESPACE: &str = "team";
pub const NAME: &str = "triage-inc-4711";
pub const POD: &str = "triage-inc-4711-1";

/// Returns the policy of the task.
pub fn policy() -> anyhow::Result<PolicyConfig> {
    let tool = |name: &str, effect: &str, upstream: Value, input: Value| {
        json!({
            "contract": name, "name": name, "description": "A tool of the team.", "upstream": upstream,
            "input": {"type": "object", "properties": input, "additionalProperties": false},
            "limits": {"timeoutSeconds": 30, "requestBytes": 4096, "responseBytes": 65536},
            "preconditions": [], "sideEffect": effect,
        })
    };
    let text = json!({"type": "string", "maxLength": 400});
    let mcp = |tool: &str| json!({"mcp": {"url": "https://tools.test.example/mcp", "tool": tool}});
    let http = json!({"http": {"method": "GET", "url": "https://api.test.example/items/{id}"}});
    let mut note = tool("note_add", "write", mcp("add_note"), json!({"incident": text, "text": text}));
    note["idempotency"] = json!({"windowSeconds": 86_400});
    Ok(serde_json::from_value(json!({
        "task": {
            "namespace": NAMESPACE, "name": NAME, "uid": UID, "workflowClass": "triage",
            "objective": "Find out why the checkout service answers 503.", "principal": "jane@example.com",
            "image": "registry.example/agent@sha256:0000",
        },
        "pack": {"name": "prod", "uid": "pack", "environment": "prod"},
        "limits": {"wallTimeSeconds": 900, "toolCalls": 1_000_000_000, "tokens": 200_000, "denials": 20},
        "allowedEffects": ["read", "write"],
        "tools": [
            tool("item_get", "read", http, json!({"id": text})),
            tool("logs_search", "read", mcp("search"), json!({"query": text})),
            note,
        ],
        "models": {}, "egress": [],
        "access": {
            "classification": [
                {"name": "access-key", "pattern": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", "sensitivity": "Restricted"},
                {"name": "mail-address", "pattern": r"(?i)\b[a-z0-9._%+-]+@[a-z0-9.-]+\.[a-z]{2,}\b", "sensitivity": "Confidential"},
            ],
            "rules": [
                {"name": "by-contract", "decision": "Allow"},
                {
                    "name": "no-secrets-out", "effects": ["write", "external"], "when": "data.arguments == 'Restricted'",
                    "decision": "Deny", "message": "take access keys out of the text",
                },
            ],
            "risk": {
                "terms": [
                    {"name": "change", "when": "effect != 'read'", "points": 40},
                    {"name": "secrets-seen", "when": "data.seen == 'Restricted'", "points": 40},
                    {"name": "people-seen", "when": "data.seen == 'Confidential'", "points": 20},
                ],
                "approveAt": 80,
            },
        },
    }))?)
}

/// Returns the attempt's first record, under this key.
pub fn opened(key: String) -> anyhow::Result<AttemptOpened> {
    let pod = Pod {
        name: POD.into(),
        uid: POD.into(),
        node: "node-1".into(),
        runtime_class: "gvisor".into(),
        network_policy: POD.into(),
    };
    let containment = Containment {
        contained: true,
        rounds: 3,
        millis: 100,
        reachable: "10.96.0.7:8443".into(),
        unreachable: vec!["10.96.0.1:443".into(), "192.0.2.1:443".into()],
        breaches: vec![],
    };
    Ok(AttemptOpened { verifier_key: key, policy: policy()?, pod, containment, rollback: None, local: None })
}

/// A call as it is recorded, but without its ID.
pub struct Call {
    pub intent: Intent,
    pub outcome: Outcome,
}

/// Makes calls, with the harness's own decision about each.
pub struct Calls {
    contracts: Contracts,
    guard: AccessPolicy,
    results: Results,
    salt: Salt,
}

impl Calls {
    pub fn new() -> anyhow::Result<Self> {
        let policy = policy()?;
        let contracts = Contracts::compile(&policy)?;
        let results = contracts.no_results();
        Ok(Self { contracts, guard: AccessPolicy::compile(&policy)?, results, salt: Salt::new([7; 32]) })
    }

    /// Returns the call with this number.
    pub fn call(&self, number: usize) -> anyhow::Result<Call> {
        let (tool, arguments) = match number % 20 {
            0 => {
                let text = "The checkout service answers 503 since 09:40; the last deploy was at 09:38.";
                ("note_add", json!({"incident": format!("INC-{number}"), "text": text}))
            }
            odd if odd % 2 == 1 => {
                ("logs_search", json!({"query": format!("service:checkout status:503 page:{number}")}))
            }
            _ => ("item_get", json!({"id": number.to_string()})),
        };
        let known = DecisionInputs { usage: Usage::default(), ignored: 0, results: &self.results };
        let decision = self.contracts.decide(tool, Arguments::Parsed(arguments), known, &self.salt);
        let tool = decision.verdict.map_err(|denial| anyhow!("{denial:?}"))?;
        let side_effect = tool.side_effect;
        let asked = AccessRequest { tool, side_effect, usage: Usage::default(), seen: Sensitivity::default() };
        let passed = self.guard.judge(asked, &decision.arguments).map_err(|denial| anyhow!("{denial:?}"))?;
        let reads = side_effect == SideEffect::Read;
        let over_mcp = tool.name != "item_get";
        let key = match &tool.idempotency {
            Some(of) => {
                let arguments = decision.arguments.as_object().context("no arguments")?;
                ledger::key(UID, &tool.name, of, arguments, (&decision.digest, &self.salt))
            }
            None => None,
        };
        let mut rules = TOOL_RULES.to_vec();
        rules.push(Rule::ToolRequestBytes);
        rules.push(if over_mcp { Rule::ToolChanged } else { Rule::ToolUrl });
        rules.extend([Rule::AccessRule, Rule::RiskScore, Rule::WallTime, Rule::Denials]);
        rules.extend(key.as_ref().map(|_| Rule::ToolIdempotency));
        rules.push(Rule::ToolCalls);
        let reply = format!("an answer to call {number}");
        let intent = Intent {
            call: String::new(),
            channel: Channel::Tool,
            target: tool.name.clone(),
            side_effect: Some(side_effect),
            definition_digest: over_mcp.then(|| self.salt.bytes(tool.name.as_bytes())),
            request_commitment: Some(decision.digest),
            request_bytes: decision.bytes,
            rules,
            idempotency_key: key,
            approvals: vec![],
            compensates: None,
            assessment: passed.assessment,
            model: None,
            reserved_tokens: 0,
            reserved_cost_micros: 0,
        };
        let outcome = Outcome {
            call: String::new(),
            outcome: CallOutcome::Applied,
            rule: None,
            status: if reads { 200 } else { 201 },
            response_commitment: Some(self.salt.bytes(reply.as_bytes())),
            response_bytes: 400 + number as u64 % 4_000,
            sent_bytes: None,
            tokens: 0,
            cost_micros: 0,
            upstream: Some("198.51.100.20:443".into()),
            certificate: None,
            sensitivity: Sensitivity::default(),
            compensation_commitment: None,
        };
        Ok(Call { intent, outcome })
    }
}
