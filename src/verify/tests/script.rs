//! A small log, written by a liar with good keys: whatever the script says is hashed, signed and cosigned.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::{
    canonical,
    evidence::{
        dsse::Envelope,
        ending::{Ending, PAYLOAD_TYPE, SUMMARY},
        log::Log,
        merkle::{self, Tree},
        note::{self, Checkpoint, Note, Signer, WITNESS_NAME},
        record::{
            Actor, AttemptClosed, AttemptOpened, Channel, Containment, Denied, Effect, Event, Intent, Outcome, Pod,
            Record, TaskClosed, VERSION,
        },
        segment::Segment,
        store::{Mode, StoredObject},
    },
    policy::{
        config::{
            Access, DataClass, Limits, McpUpstream, ModelEndpoints, PackIdentity, PolicyConfig, Sensitivity,
            SideEffect, TaskIdentity, Tool, ToolLimits, Upstream, Usage,
        },
        rule::Rule,
    },
};

pub(crate) const UID: &str = "6f9c3c1e-0000-4000-8000-000000000001";
const WITNESSED: u64 = 1_795_000_000;

/// Records, segment by segment, and the keys that sign them.
pub(crate) struct Script {
    pub(crate) segments: Vec<Vec<Record>>,
    pub(crate) witness: Signer,
    /// By attempt.
    pub(crate) keys: BTreeMap<i64, Signer>,
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
            generation: 1,
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
            generation: 3,
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
        models: ModelEndpoints {
            openai: Some("https://models.world.test".to_owned()),
            anthropic: None,
            prices: vec![],
        },
        egress: Vec::new(),
        access: Access::default(),
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

/// A key that signs the first attempt.
pub(crate) fn signer() -> Signer {
    Signer::generate(&note::attempt_key_name(UID, 1)).unwrap()
}

pub(crate) fn opened(key: &Signer, attempt: i64) -> Event {
    let policy = policy();
    Event::AttemptOpened(Box::new(AttemptOpened {
        key: key.verifier().to_string(),
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
    }))
}

pub(crate) fn intent(call: &str, channel: Channel, target: &str, reserved_tokens: i64) -> Event {
    Event::Intent(Intent {
        call: call.to_owned(),
        channel,
        target: target.to_owned(),
        effect: match target {
            "search" => Some(SideEffect::Read),
            "write" => Some(SideEffect::Write),
            _ => None,
        },
        definition: (channel == Channel::Tool).then(|| "0d".repeat(32)),
        request_digest: Some("ab".repeat(32)),
        request_bytes: 120,
        key: None,
        approvals: vec![],
        undoes: None,
        assessment: None,
        rules: vec![Rule::ToolKnown, Rule::ToolSchema],
        model: None,
        reserved_tokens,
        reserved_cost_micros: 0,
    })
}

pub(crate) fn outcome(call: &str, tokens: i64) -> Event {
    Event::Outcome(Outcome {
        call: call.to_owned(),
        effect: Effect::Applied,
        rule: None,
        status: 200,
        response_digest: Some("cd".repeat(32)),
        response_bytes: 640,
        tokens,
        cost_micros: 0,
        upstream: Some("198.51.100.20:443".to_owned()),
        certificate: None,
        sensitivity: Sensitivity::default(),
        undone_by: None,
    })
}

pub(crate) fn denied(target: &str) -> Event {
    Event::Denied(Denied {
        channel: Channel::Egress,
        target: target.to_owned(),
        rule: Rule::EgressHost,
        reason: "expected a host of the class's list, found another".to_owned(),
        request_digest: None,
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

/// A record whose number and counters come later.
pub(crate) fn record(attempt: i64, event: Event) -> Record {
    let actor = if matches!(event, Event::TaskClosed(_)) { Actor::Gateway } else { Actor::Harness };
    let (v, seq, time) = (VERSION, 0, "2026-11-23T10:00:00.000Z".to_owned());
    Record { v, seq, time, attempt, actor, usage: Usage::default(), event }
}

impl Script {
    /// Two attempts: the first is lost with its pod during a call, the second ends well.
    pub(crate) fn good() -> Self {
        let keys: BTreeMap<_, _> =
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

    /// The record of that number.
    pub(crate) fn at(&mut self, seq: usize) -> &mut Record {
        self.segments.iter_mut().flatten().nth(seq).unwrap()
    }

    /// Numbers all records and works out their counters.
    pub(crate) fn count(&mut self) {
        let mut usage = Usage::default();
        let mut reserved = BTreeMap::new();
        for (seq, record) in self.segments.iter_mut().flatten().enumerate() {
            match &record.event {
                Event::Intent(intent) => {
                    usage.tool_calls += i64::from(intent.channel == Channel::Tool);
                    usage.tokens += intent.reserved_tokens;
                    usage.cost_micros += intent.reserved_cost_micros;
                    reserved.insert(intent.call.clone(), (intent.reserved_tokens, intent.reserved_cost_micros));
                }
                Event::Outcome(outcome) => {
                    let (tokens, cost) = reserved.get(&outcome.call).copied().unwrap_or_default();
                    usage.tokens += outcome.tokens - tokens;
                    usage.cost_micros += outcome.cost_micros - cost;
                }
                Event::Denied(denied) => usage.denials += denied.count,
                _ => {}
            }
            record.seq = seq as u64;
            record.usage = usage;
        }
    }

    /// Writes, hashes, signs and cosigns.
    pub(crate) fn write(&self) -> Log {
        let mut tree = Tree::new();
        let mut log = Log { versions: Some(Vec::new()), ..Log::default() };
        for records in &self.segments {
            let first = tree.size();
            let entries: Vec<_> = records.iter().map(|r| r.encode().unwrap()).collect();
            entries.iter().for_each(|entry| tree.push(merkle::leaf_hash(&entry.record)));
            let checkpoint = Checkpoint { origin: note::origin(UID), size: tree.size(), root: tree.root() };
            let mut note = match records[0].actor {
                Actor::Harness => Note::sign(&checkpoint, &self.keys[&records[0].attempt]),
                Actor::Gateway => Note::unsigned(&checkpoint),
            };
            note.cosign(&self.witness, WITNESSED + first);
            put(&mut log, &Segment::new(note, first, entries));
        }
        end(&mut log, &self.witness);
        log
    }
}

/// Writes what the log comes to, if it has ended.
pub(crate) fn end(log: &mut Log, witness: &Signer) {
    let (mut ending, mut files) = (Ending::default(), Vec::new());
    for bytes in log.segments.values() {
        let Ok((segment, records)) = Segment::read(bytes) else { return };
        files.extend(ending.take(&segment, &records).unwrap());
    }
    let Some((last, statement)) = ending.finish() else { return };
    files.extend(last);
    let payload = canonical::to_bytes(&statement).unwrap();
    files.push((SUMMARY.to_owned(), Envelope::sign(PAYLOAD_TYPE, &payload, witness).to_bytes().unwrap()));
    for (key, bytes) in files {
        let object = stored(&key, bytes.len());
        log.versions.get_or_insert_default().push(object);
        log.ending.insert(key, bytes.into());
    }
}

/// An object as a store with locks has it.
fn stored(key: &str, size: usize) -> StoredObject {
    StoredObject {
        key: key.to_owned(),
        version_id: format!("v-{key}"),
        size: size as u64,
        written: Some(jiff::Timestamp::from_second(1_795_000_000).unwrap()),
        retain_until: Some(jiff::Timestamp::from_second(1_795_086_400).unwrap()),
        mode: Some(Mode::Compliance),
        is_latest: true,
        delete_marker: false,
    }
}

/// Writes a segment in place of the one under its key.
pub(crate) fn put(log: &mut Log, segment: &Segment) {
    let (key, bytes) = (Segment::key(segment.first), Bytes::from(segment.to_bytes()));
    let versions = log.versions.get_or_insert_default();
    versions.retain(|v| v.key != key);
    versions.push(stored(&key, bytes.len()));
    log.segments.insert(key, bytes);
}
