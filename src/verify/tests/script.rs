//! A small log, written by a liar with good keys: everything in the script is hashed, signed and cosigned.

use std::collections::BTreeMap;

use super::forge::{self, Before, Keys, Segments, Witness};
use crate::{
    evidence::{
        log::Log,
        note::{self, Signer, WITNESS_NAME},
        record::{
            Actor, AttemptClosed, AttemptOpened, CallOutcome, Channel, Containment, Denied, Event, Intent, Outcome,
            Pod, Record, Resolved, TaskClosed, VERSION,
        },
    },
    policy::{
        approval::Approvers,
        config::{
            Access, Approval, DataClass, Limits, McpUpstream, ModelEndpoints, OnTimeout, PackIdentity, PolicyConfig,
            Sensitivity, SideEffect, TaskIdentity, Tool, ToolLimits, Upstream, Usage, VerifyRead,
        },
        rule::Rule,
    },
};

pub(crate) const UID: &str = "6f9c3c1e-0000-4000-8000-000000000001";

/// Records, segment by segment, and the keys that sign them.
pub(crate) struct Script {
    pub(crate) segments: Segments,
    pub(crate) witness: Signer,
    pub(crate) keys: Keys,
}

pub(crate) fn policy() -> PolicyConfig {
    let tool = |name: &str, side_effect| Tool {
        contract: name.to_owned(),
        name: name.to_owned(),
        description: "A tool.".to_owned(),
        upstream: Upstream::Mcp(McpUpstream {
            url: "https://tools.world.test/mcp".to_owned(),
            tool: name.to_owned(),
            digest: None,
        }),
        input: serde_json::json!({"type": "object"}),
        output: None,
        limits: ToolLimits { request_bytes: Some(4096), ..ToolLimits::default() },
        preconditions: Vec::new(),
        idempotency: None,
        verify: None,
        rollback: None,
        approval: None,
        side_effect,
        data: DataClass::default(),
        redact: vec![],
    };
    PolicyConfig {
        task: TaskIdentity {
            namespace: "team-a".to_owned(),
            name: "tidy".to_owned(),
            uid: UID.to_owned(),
            objective: "Tidy up.".to_owned(),
            workflow_class: "support".to_owned(),
            task_class: None,
            principal: "jane@example.com".to_owned(),
            requester: None,
            image: "localhost/agent:dev".to_owned(),
            rollback_of: None,
        },
        pack: PackIdentity {
            name: "dev".to_owned(),
            uid: "6f9c3c1e-0000-4000-8000-000000000002".to_owned(),
            environment: "dev".to_owned(),
        },
        limits: Limits {
            wall_time_seconds: 600,
            tool_calls: 4,
            tokens: 1000,
            denials: None,
            cost_micros: None,
            approval_wait_seconds: 0,
        },
        allowed_effects: vec![SideEffect::Read, SideEffect::Write],
        tools: vec![
            tool("mail", SideEffect::External),
            tool("search", SideEffect::Read),
            tool("write", SideEffect::Write),
        ],
        models: ModelEndpoints { openai: Some("https://models.world.test".to_owned()), ..Default::default() },
        egress: Vec::new(),
        access: Access::default(),
        ignored_hosts: vec![],
        upstream_timeout_seconds: None,
    }
}

/// Approval by each of these people.
pub(crate) fn approval(users: &[&str]) -> Approval {
    Approval {
        when: None,
        approvers: Approvers { users: users.iter().map(|user| (*user).to_owned()).collect(), groups: vec![] },
        required: users.len() as i64,
        timeout_seconds: 60,
        on_timeout: OnTimeout::Deny,
        hold_seconds: 30,
    }
}

pub(crate) fn contained() -> Containment {
    Containment {
        contained: true,
        rounds: 3,
        millis: 900,
        reachable: "10.96.0.7:8443".to_owned(),
        unreachable: vec!["10.96.0.1:443".to_owned()],
        breaches: Vec::new(),
    }
}

/// Returns a key that signs the first attempt.
pub(crate) fn signer() -> Signer {
    Signer::generate(&note::attempt_key_name(UID, 1)).unwrap()
}

pub(crate) fn opened(key: &Signer, attempt: i64) -> Event {
    let policy = policy();
    Event::AttemptOpened(Box::new(AttemptOpened {
        verifier_key: key.verifier().to_string(),
        policy,
        pod: Pod {
            name: format!("tidy-{attempt}"),
            uid: format!("pod-{attempt}"),
            node: "node-1".to_owned(),
            runtime_class: "gvisor".to_owned(),
            network_policy: "tidy-1 sha256:00".to_owned(),
        },
        containment: contained(),
        rollback: None,
        local: None,
    }))
}

pub(crate) fn intent(call: &str, channel: Channel, target: &str, reserved_tokens: i64) -> Event {
    Event::Intent(Intent {
        call: call.to_owned(),
        channel,
        target: target.to_owned(),
        side_effect: match target {
            "search" => Some(SideEffect::Read),
            "write" => Some(SideEffect::Write),
            _ => None,
        },
        definition_digest: (channel == Channel::Tool).then(|| "0d".repeat(32)),
        request_commitment: Some("ab".repeat(32)),
        request_bytes: 120,
        idempotency_key: None,
        approvals: vec![],
        compensates: None,
        assessment: None,
        rules: vec![Rule::ToolUnknown, Rule::ToolSchema],
        model: None,
        reserved_tokens,
        reserved_cost_micros: 0,
    })
}

pub(crate) fn outcome(call: &str, tokens: i64) -> Event {
    Event::Outcome(Outcome {
        call: call.to_owned(),
        outcome: CallOutcome::Applied,
        rule: None,
        status: 200,
        response_commitment: Some("cd".repeat(32)),
        response_bytes: 640,
        sent_bytes: None,
        tokens,
        cost_micros: 0,
        upstream: Some("198.51.100.20:443".to_owned()),
        certificate: None,
        sensitivity: Sensitivity::default(),
        compensation_commitment: None,
    })
}

pub(crate) fn denied(target: &str) -> Event {
    Event::Denied(Denied {
        channel: Channel::Egress,
        target: target.to_owned(),
        rule: Rule::EgressHost,
        reason: "expected a host of the class's list, found another".to_owned(),
        request_commitment: None,
        count: 1,
    })
}

pub(crate) fn attempt_closed() -> Event {
    Event::AttemptClosed(AttemptClosed { reason: "agentEnded".to_owned() })
}

pub(crate) fn task_closed() -> Event {
    Event::TaskClosed(TaskClosed {
        phase: "Succeeded".to_owned(),
        failure_class: String::new(),
        reason: "Completed".to_owned(),
        exit_code: Some(0),
        images: Default::default(),
    })
}

/// Returns a record whose number and counters are set later.
pub(crate) fn record(attempt: i64, event: Event) -> Record {
    let actor = if matches!(event, Event::TaskClosed(_)) { Actor::Gateway } else { Actor::Harness };
    let (v, seq, time) = (VERSION, 0, "2026-11-23T10:00:00.000Z".to_owned());
    Record { v, seq, time, attempt, actor, usage: Usage::default(), event }
}

impl Script {
    /// Returns two attempts: the first is lost with its pod during a call, the second succeeds.
    pub(crate) fn good() -> Self {
        let keys: Keys =
            [1, 2].map(|n| (n, Signer::generate(&note::attempt_key_name(UID, n)).unwrap())).into_iter().collect();
        let first = |event| record(1, event);
        let second = |event| record(2, event);
        let mut script = Self {
            segments: vec![
                vec![first(opened(&keys[&1], 1))],
                vec![
                    first(intent("a", Channel::Tool, "search", 0)),
                    first(intent("b", Channel::Model, "/v1/chat/completions", 300)),
                ],
                vec![first(outcome("a", 0)), first(denied("evil.world.test:443")), first(outcome("b", 120))],
                vec![first(intent("c", Channel::Tool, "write", 0))],
                vec![second(opened(&keys[&2], 2)), second(intent("d", Channel::Tool, "write", 0))],
                vec![second(outcome("d", 0)), second(Event::ContainmentChecked(contained())), second(attempt_closed())],
                vec![second(task_closed())],
            ],
            witness: Signer::generate(WITNESS_NAME).unwrap(),
            keys,
        };
        script.count();
        script
    }

    /// Returns the record with this number.
    pub(crate) fn at(&mut self, seq: usize) -> &mut Record {
        self.segments.iter_mut().flatten().nth(seq).unwrap()
    }

    /// Numbers all records and computes their counters.
    pub(crate) fn count(&mut self) {
        forge::count(&mut self.segments);
    }

    /// Writes, hashes, signs and cosigns.
    pub(crate) fn write(&self) -> Log {
        self.forge(&self.segments, Witness::By(&self.witness), &Before::default())
    }

    /// Writes other records with the keys of the attempts.
    pub(crate) fn forge(&self, segments: &Segments, witness: Witness<'_>, before: &Before) -> Log {
        forge::sign(forge::written(segments), &note::origin(UID), &self.keys, witness, before)
    }
}

pub(crate) fn change_opened(script: &mut Script, seq: usize, change: impl FnOnce(&mut AttemptOpened)) {
    let Event::AttemptOpened(opened) = &mut script.at(seq).event else { panic!("record {seq} is no attempt.opened") };
    change(opened);
}

pub(crate) fn change_intent(script: &mut Script, seq: usize, change: impl FnOnce(&mut Intent)) {
    let Event::Intent(intent) = &mut script.at(seq).event else { panic!("record {seq} is no call.intent") };
    change(intent);
}

/// Returns a log in which the outcome of attempt 2's call of `write` is unknown until a call of `search` resolves it.
pub(crate) fn resolved() -> Script {
    let mut script = Script::good();
    change_opened(&mut script, 7, |o| {
        let write = o.policy.tools.iter_mut().find(|tool| tool.name == "write").unwrap();
        write.verify = Some(VerifyRead {
            tool: "search".into(),
            arguments: BTreeMap::new(),
            applied: "result".into(),
            settle_seconds: 1,
        });
    });
    let told = Event::Resolved(Resolved { call: "d".into(), outcome: CallOutcome::Applied, by: "e".into() });
    let read = [intent("e", Channel::Tool, "search", 0), outcome("e", 0), told];
    script.segments[5].splice(1..1, read.map(|event| record(2, event)));
    lose(&mut script, 9);
    script.count();
    script
}

pub(crate) fn lose(script: &mut Script, at: usize) {
    let Event::Outcome(outcome) = &mut script.at(at).event else { panic!() };
    outcome.outcome = CallOutcome::Unknown;
}
