//! A harness, a bucket and a policy for tests.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures::future::BoxFuture;

use super::{
    buckets::Buckets,
    identity::{HarnessIdentity, Standing},
    metrics::Metrics,
    state::StateStore,
    witness::{LogLocation, Witness},
};
use crate::{
    evidence::{
        merkle::{Tree, leaf_hash},
        note::{self, Checkpoint, Note, Signer, VerifierKey, WITNESS_NAME},
        record::{
            Actor, AttemptOpened, CallOutcome, Channel, Containment, Denied, Event, Intent, Outcome, Pod, Record,
            TaskClosed, VERSION,
        },
        rollback::Plan,
        segment::Segment,
        store::{Location, Mode, PutError, Retention, Store, StoreError, StoredObject},
    },
    policy::{
        commit::Salt,
        config::{
            Access, Compensation, DataClass, Limits, McpUpstream, ModelEndpoints, PackIdentity, PolicyConfig, Rollback,
            Sensitivity, SideEffect, TaskIdentity, Tool, ToolLimits, Upstream, Usage,
        },
        rule::Rule,
    },
    wire::{AppendRequest, SealRequest, Until},
};

/// The digest of the definition that an MCP server listed.
pub const DEFINITION: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// The body of model requests and of the agent's own requests.
pub const BODY: &[u8] = b"hello";

/// The body of the request that a model intent commits to.
pub const ASKED: &str = r#"{"model":"m","max_completion_tokens":1,"messages":[]}"#;

/// A reservation of tokens that is enough for [`ASKED`].
pub const ENOUGH: i64 = 200;
pub const UID: &str = "6f9c3c1e-0000-4000-8000-000000000001";

/// An in-memory bucket that can be set to fail.
#[derive(Default)]
pub struct Memory {
    pub objects: Mutex<BTreeMap<String, (Bytes, Option<Retention>)>>,
    pub down: std::sync::atomic::AtomicBool,
    /// Whether the next object is written although the reply reports a failure.
    pub lose_reply: std::sync::atomic::AtomicBool,
    /// Whether the bucket ignores the requested retention.
    pub keeps_open: std::sync::atomic::AtomicBool,
}

impl Memory {
    fn check(&self, action: &'static str, key: &str) -> Result<(), StoreError> {
        if self.down.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(StoreError::Unavailable {
                action,
                key: key.into(),
                place: "memory".into(),
                detail: "down".into(),
            });
        }
        Ok(())
    }

    pub fn keys(&self) -> Vec<String> {
        self.objects.lock().unwrap().keys().cloned().collect()
    }
}

impl Store for Memory {
    fn create<'a>(
        &'a self,
        key: &'a str,
        body: Bytes,
        retention: Option<&'a Retention>,
    ) -> BoxFuture<'a, Result<String, PutError>> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            self.check("write", key)?;
            let mut objects = self.objects.lock().unwrap();
            if objects.contains_key(key) {
                return Err(PutError::Exists);
            }
            let heeded = !self.keeps_open.load(std::sync::atomic::Ordering::SeqCst);
            objects.insert(key.into(), (body, retention.copied().filter(|_| heeded)));
            if self.lose_reply.swap(false, std::sync::atomic::Ordering::SeqCst) {
                let (key, place, detail) = (key.to_owned(), "memory".to_owned(), "reply lost".to_owned());
                return Err(StoreError::Unavailable { action: "write", key, place, detail }.into());
            }
            Ok("v1".into())
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Bytes, StoreError>> {
        Box::pin(async move {
            self.check("read", key)?;
            let object = self.objects.lock().unwrap().get(key).map(|(body, _)| body.clone());
            object.ok_or_else(|| StoreError::NotFound { key: key.into(), place: "memory".into() })
        })
    }

    fn list_versions<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<StoredObject>, StoreError>> {
        Box::pin(async move {
            self.check("list", prefix)?;
            let written: jiff::Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
            let objects = self.objects.lock().unwrap();
            let versions = objects.iter().filter(|(key, _)| key.starts_with(prefix)).map(|(key, (body, retention))| {
                let until = |r: Retention| written + jiff::SignedDuration::from_hours(24 * r.days);
                StoredObject {
                    key: key.clone(),
                    version_id: "v1".into(),
                    size: body.len() as u64,
                    written: Some(written),
                    retain_until: retention.map(until),
                    mode: retention.map(|r| r.mode),
                    is_latest: true,
                    delete_marker: false,
                }
            });
            Ok(versions.collect())
        })
    }

    fn lock<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<StoredObject>, StoreError>> {
        Box::pin(async move { Ok(self.list_versions(key).await?.into_iter().find(|object| object.key == key)) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<String>, StoreError>> {
        Box::pin(async move {
            self.check("list", prefix)?;
            Ok(self.keys().into_iter().filter(|key| key.starts_with(prefix)).collect())
        })
    }
}

/// The same bucket under every name.
pub struct OneBucket(pub Arc<Memory>);

impl Buckets for OneBucket {
    fn bucket<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Arc<dyn Store>, StoreError>> {
        Box::pin(async move { Ok(self.0.clone() as Arc<dyn Store>) })
    }

    fn endpoint(&self) -> Option<String> {
        Some("https://s3.test".into())
    }
}

pub fn metrics() -> Metrics {
    Metrics::new(&prometheus::Registry::new()).unwrap()
}

/// Returns a new witness key, which all replicas of a test share.
pub fn witness_key() -> Vec<u8> {
    note::generate_pkcs8().unwrap()
}

pub fn replica(key: &[u8], bucket: &Arc<Memory>) -> Arc<Witness> {
    let signer = Signer::from_pkcs8(WITNESS_NAME, key).unwrap();
    Arc::new(Witness::new(signer, Arc::new(OneBucket(bucket.clone())), metrics()))
}

/// Returns the state store of a replica.
pub fn state(witness: &Arc<Witness>, bucket: &Arc<Memory>) -> StateStore {
    StateStore::new(Arc::new(OneBucket(bucket.clone())), witness.clone(), metrics())
}

pub fn verifier(key: &[u8]) -> VerifierKey {
    Signer::from_pkcs8(WITNESS_NAME, key).unwrap().verifier()
}

pub fn place() -> LogLocation {
    LogLocation {
        location: Location { bucket: "evidence".into(), prefix: format!("team/t/{UID}/") },
        task_uid: UID.into(),
        retention: Some(Retention { mode: Mode::Compliance, days: 30 }),
    }
}

pub fn principal(attempt: i64) -> HarnessIdentity {
    HarnessIdentity {
        namespace: "team".into(),
        task: "t".into(),
        task_uid: UID.into(),
        attempt,
        pod: format!("t-{attempt}"),
        pod_uid: format!("pod-{attempt}"),
        standing: Standing::Live,
    }
}

pub fn policy() -> PolicyConfig {
    let tool = |name: &str, side_effect| Tool {
        contract: name.into(),
        name: name.into(),
        description: "A tool.".into(),
        upstream: Upstream::Mcp(McpUpstream {
            url: "https://tools.world.test/mcp".into(),
            tool: name.into(),
            digest: None,
        }),
        input: serde_json::json!({"type": "object"}),
        output: None,
        limits: ToolLimits::default(),
        preconditions: vec![],
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
            namespace: "team".into(),
            name: "t".into(),
            uid: UID.into(),
            objective: "Tidy up.".into(),
            workflow_class: "support".into(),
            task_class: None,
            principal: "jane@example.com".into(),
            requester: None,
            image: "localhost/agent:dev".into(),
            rollback_of: None,
        },
        pack: PackIdentity { name: "dev".into(), uid: "pack".into(), environment: "dev".into() },
        limits: Limits {
            wall_time_seconds: 600,
            tool_calls: 3,
            tokens: 1000,
            denials: None,
            cost_micros: None,
            approval_wait_seconds: 0,
        },
        allowed_effects: vec![SideEffect::Read, SideEffect::Write],
        tools: vec![tool("search", SideEffect::Read), tool("write", SideEffect::Write)],
        models: ModelEndpoints {
            openai: Some("https://models.world.test".into()),
            anthropic: Some("https://models.world.test".into()),
            ..Default::default()
        },
        egress: vec![],
        access: Access::default(),
        ignored_hosts: vec![],
        upstream_timeout_seconds: None,
    }
}

/// Returns the salt of the commitments.
pub fn salt() -> Salt {
    Salt::new([7; 32])
}

pub fn digest() -> String {
    policy().digest().unwrap()
}

pub fn intent(call: &str, channel: Channel, target: &str, reserved_tokens: i64) -> Event {
    let side_effect = match target {
        "search" | "look" => Some(SideEffect::Read),
        "write" => Some(SideEffect::Write),
        _ => None,
    };
    Event::Intent(Intent {
        call: call.into(),
        channel,
        target: target.into(),
        side_effect,
        definition_digest: side_effect.map(|_| DEFINITION.into()),
        request_commitment: match channel {
            // The commitment to no arguments.
            Channel::Tool => Some(salt().value(&serde_json::json!({})).unwrap()),
            Channel::Model => Some(salt().bytes(ASKED.as_bytes())),
            Channel::Egress => Some(salt().bytes(BODY)),
            Channel::Listing => None,
        },
        request_bytes: 1,
        idempotency_key: None,
        approvals: vec![],
        compensates: None,
        assessment: None,
        rules: vec![],
        model: (channel == Channel::Model).then(|| "m".into()),
        reserved_tokens,
        reserved_cost_micros: 0,
    })
}

pub fn outcome(call: &str, tokens: i64) -> Event {
    Event::Outcome(Outcome {
        call: call.into(),
        outcome: CallOutcome::Applied,
        rule: None,
        status: 200,
        response_commitment: None,
        response_bytes: 1,
        sent_bytes: None,
        tokens,
        cost_micros: 0,
        upstream: None,
        certificate: None,
        sensitivity: Sensitivity::default(),
        compensation_commitment: None,
    })
}

pub fn denied() -> Event {
    Event::Denied(Denied {
        channel: Channel::Egress,
        target: "evil.test:443".into(),
        rule: Rule::EgressHost,
        reason: "no".into(),
        request_commitment: None,
        count: 1,
    })
}

pub fn contained(contained: bool) -> Containment {
    Containment {
        contained,
        rounds: 3,
        millis: 100,
        reachable: "10.96.0.7:8443".into(),
        unreachable: vec!["10.96.0.1:443".into()],
        breaches: if contained { vec![] } else { vec!["10.96.0.1:443 answered".into()] },
    }
}

/// The state that a harness has between segments.
pub struct Harness {
    pub uid: &'static str,
    pub attempt: i64,
    pub key: Signer,
    pub tree: Tree,
    pub usage: Usage,
    pub reserved: BTreeMap<String, (i64, i64)>,
    /// Changes a record before it is hashed and signed.
    pub tamper: fn(&mut Record),
}

impl Harness {
    pub fn new(attempt: i64) -> Self {
        Self::of(UID, attempt)
    }

    /// Returns a harness of the task with this UID.
    pub fn of(uid: &'static str, attempt: i64) -> Self {
        let key = Signer::generate(&note::attempt_key_name(uid, attempt)).unwrap();
        Self {
            uid,
            attempt,
            key,
            tree: Tree::new(),
            usage: Usage::default(),
            reserved: BTreeMap::new(),
            tamper: |_| (),
        }
    }

    pub fn opened(&self) -> Event {
        Event::AttemptOpened(Box::new(AttemptOpened {
            verifier_key: self.key.verifier().to_string(),
            policy: policy(),
            pod: Pod {
                name: format!("t-{}", self.attempt),
                uid: format!("pod-{}", self.attempt),
                node: "node".into(),
                runtime_class: "gvisor".into(),
                network_policy: "t-1".into(),
            },
            containment: contained(true),
            rollback: None,
            local: None,
        }))
    }

    /// Returns the next signed segment with these events, and updates the harness's state.
    pub fn next(&mut self, events: Vec<Event>) -> AppendRequest {
        let first = self.tree.size();
        let mut entries = vec![];
        for event in events {
            match &event {
                Event::Intent(i) => {
                    self.usage.tool_calls += i64::from(i.channel == Channel::Tool);
                    self.usage.tokens += i.reserved_tokens;
                    self.usage.cost_micros += i.reserved_cost_micros;
                    self.reserved.insert(i.call.clone(), (i.reserved_tokens, i.reserved_cost_micros));
                }
                Event::Outcome(o) => {
                    let (tokens, cost) = self.reserved.remove(&o.call).unwrap_or_default();
                    self.usage.tokens += o.tokens - tokens;
                    self.usage.cost_micros += o.cost_micros - cost;
                }
                Event::Denied(denied) => self.usage.denials += denied.count,
                _ => {}
            }
            let mut record = Record {
                v: VERSION,
                seq: self.tree.size(),
                time: "2026-11-23T10:00:00.000Z".into(),
                attempt: self.attempt,
                actor: Actor::Harness,
                usage: self.usage,
                event,
            };
            (self.tamper)(&mut record);
            let entry = record.encode().unwrap();
            self.tree.push(leaf_hash(&entry.record));
            entries.push(entry);
        }
        let checkpoint = Checkpoint { origin: note::origin(self.uid), size: self.tree.size(), root: self.tree.root() };
        let segment = Segment::new(Note::sign(&checkpoint, &self.key), first, entries);
        let segment = String::from_utf8(segment.to_bytes()).unwrap();
        AppendRequest { attempt: self.attempt, first, segment, until: Until::Stored }
    }
}

pub fn seal_request() -> SealRequest {
    SealRequest {
        namespace: "team".into(),
        name: "t".into(),
        uid: UID.into(),
        attempt: 1,
        bucket: "evidence".into(),
        prefix: String::new(),
        closed: TaskClosed {
            phase: "Succeeded".into(),
            failure_class: String::new(),
            reason: "Completed".into(),
            exit_code: Some(0),
            images: Default::default(),
        },
        presumed: false,
    }
}

/// The UID of a task that rolls back the other.
pub const ROLLBACK: &str = "6f9c3c1e-0000-4000-8000-00000000000b";

/// Returns a policy in which `write` has a compensation, and the commitment to the compensation's arguments.
fn undone() -> (PolicyConfig, String) {
    let mut policy = policy();
    let call = Compensation { contract: "search".into(), arguments: BTreeMap::new(), within_seconds: None };
    policy.tools[1].rollback = Some(Rollback::Call(call));
    (policy, "5a".repeat(32))
}

/// Returns an opening record with this policy and this plan.
pub fn opened_by(harness: &Harness, policy: &PolicyConfig, plan: Option<Plan>) -> Event {
    let Event::AttemptOpened(mut opened) = harness.opened() else { panic!("another event") };
    (opened.policy, opened.rollback) = (policy.clone(), plan);
    Event::AttemptOpened(opened)
}

/// Writes the log of a task that has written twice, at replica `a`. Returns its place.
pub async fn ended(a: &Arc<Witness>) -> LogLocation {
    let (policy, digest) = undone();
    let mut harness = Harness::new(1);
    let applied = |call| {
        let Event::Outcome(of) = outcome(call, 0) else { panic!("another event") };
        Event::Outcome(Outcome { compensation_commitment: Some(digest.clone()), ..of })
    };
    let write = |call| intent(call, Channel::Tool, "write", 0);
    let events = vec![opened_by(&harness, &policy, None), write("1"), applied("1"), write("2"), applied("2")];
    let by = policy.digest().unwrap();
    a.append(&place(), &principal(1), &harness.next(events), Ok(&by), None).await.unwrap();
    place()
}
