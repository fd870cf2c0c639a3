//! Checks what must be true in a world, whatever happened in it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use belay::{
    evidence::{
        log::Log,
        merkle::Hash,
        note::Checkpoint,
        record::{CallOutcome as Came, Event, Intent, Record},
        segment::Segment,
        store::{Store, log_prefix},
    },
    policy::{commit::Salt, config::SideEffect},
    verify::{Expected, Verdict, verify},
    wire::{self, AppendRequest, SealReply},
};
use jiff::{SignedDuration, Timestamp};

use super::{
    api,
    world::{Told, World},
};

/// The rules of refused calls that may have had an effect.
const UNCERTAIN: [&str; 3] = ["upstream.reply", "upstream.connect", "tool.timeout"];

/// A log in the store that was checked.
pub struct Judged {
    /// The records of the log.
    pub records: Vec<Record>,
}

/// Ends the task, and checks its log, locks and effects.
pub async fn judge(world: &World) -> Judged {
    let sealed = world.end().await;
    let prefix = log_prefix(None, "team", "t", api::UID);
    let log = Log::read(&world.bucket(api::EVIDENCE).await, &prefix, true).await.unwrap();
    valid(world, &log, sealed);
    locked(&log);
    let segments: BTreeMap<String, Segment> =
        log.segments.iter().map(|(key, bytes)| (key.clone(), Segment::parse(bytes).unwrap())).collect();
    acknowledged(world, &log, &segments, &prefix);
    let salt = world.bucket(api::STATE).await.get(&format!("{prefix}salt/commitments")).await.unwrap();
    let salt = Salt::try_from(String::from_utf8(salt.to_vec()).unwrap()).unwrap();
    let records: Vec<(&String, Record)> = segments
        .iter()
        .flat_map(|(key, segment)| segment.decode().unwrap().into_iter().map(move |record| (key, record)))
        .collect();
    effects(world, &records, &salt, &prefix);
    Judged { records: records.into_iter().map(|(_, record)| record).collect() }
}

/// Checks that the verifier has no findings, and that the log ends as the gateway told the operator.
fn valid(world: &World, log: &Log, sealed: SealReply) {
    let root: Hash = BASE64_STANDARD.decode(&sealed.root).unwrap().try_into().unwrap();
    let head = Checkpoint { origin: sealed.origin, size: sealed.size, root };
    let report = verify(log, &world.witness, &Expected::Head(head));
    assert_eq!(report.verdict, Verdict::Valid, "{:#?}", report.findings);
}

/// Checks that every object is locked for as long as the pack says, from its time of writing by the store's clock.
fn locked(log: &Log) {
    for object in log.versions.iter().flatten() {
        let locked = object.retain_until.unwrap().duration_since(object.written.unwrap());
        // The margin of a minute covers times in whole seconds.
        let least = SignedDuration::from_hours(24 * api::RETENTION_DAYS) - SignedDuration::from_mins(1);
        assert!(locked >= least, "{} is locked for {locked:#} only", object.key);
    }
}

/// Checks that nothing acknowledged is lost: neither an object that the store acknowledged, nor a record that the gateway acknowledged.
fn acknowledged(world: &World, log: &Log, segments: &BTreeMap<String, Segment>, prefix: &str) {
    let objects: BTreeMap<&str, &bytes::Bytes> = log.objects().collect();
    for put in world.store.seen().iter().filter(|put| put.method == http::Method::PUT && put.told.is_some()) {
        let Some(key) = put.path.strip_prefix(&format!("/{}/{prefix}", api::EVIDENCE)) else { continue };
        assert_eq!(objects.get(key), Some(&&put.body), "{key} is not as the store took it");
    }
    let there: BTreeSet<&Vec<u8>> = segments.values().flat_map(|segment| &segment.records).collect();
    for append in world.log.seen().iter().filter(|asked| asked.path == wire::LOG_APPEND && asked.told.is_some()) {
        let append: AppendRequest = serde_json::from_slice(&append.body).unwrap();
        let (segment, records) = Segment::read(append.segment.as_bytes()).unwrap();
        for (line, record) in segment.records.iter().zip(&records) {
            assert!(there.contains(line), "record {} was acknowledged and is lost: {record:#?}", record.seq);
        }
    }
}

/// Checks that every effect has an intent that was stored before it, and that what the agent and the log say of each call is true.
fn effects(world: &World, records: &[(&String, Record)], salt: &Salt, prefix: &str) {
    let effects = world.effects.all();
    let mut told: BTreeMap<String, Instant> = BTreeMap::new();
    for exchange in world.store.seen() {
        let reads_or_writes = [http::Method::PUT, http::Method::GET].contains(&exchange.method);
        if let Some(at) = exchange.told.filter(|_| reads_or_writes) {
            told.entry(exchange.path).or_insert(at);
        }
    }
    // Returns when the gateway knew that an object is stored. If the reply to a write is lost, the gateway reads the object.
    let stored = |key: &str| told.get(&format!("/{}/{prefix}{key}", api::EVIDENCE)).copied();
    let mut intents: Vec<(&String, &Intent)> = records
        .iter()
        .filter_map(|(key, record)| match &record.event {
            Event::Intent(intent) if intent.request_commitment.is_some() => Some((*key, intent)),
            _ => None,
        })
        .collect();
    let came = |call: &str| {
        records.iter().find_map(|(_, record)| match &record.event {
            Event::Outcome(outcome) if outcome.call == call => Some(outcome.outcome),
            _ => None,
        })
    };
    for effect in &effects {
        let digest = salt.value(&effect.args).unwrap();
        let is = |(key, intent): &(&String, &Intent)| {
            // If the harness forgets its spool, the spool cannot be checked. But the witness had the intent as well, otherwise it would not
            // be in the log.
            let held = world.forgets || effect.spool.contains(&digest);
            let spooled = intent.side_effect == Some(SideEffect::Read) && held;
            intent.target == effect.tool
                && intent.request_commitment.as_ref() == Some(&digest)
                && (spooled || stored(key).is_some_and(|stored| stored < effect.at))
        };
        let at = intents.iter().position(is);
        let at = at.unwrap_or_else(|| panic!("{effect:#?} has no intent of its own that was there before it"));
        let (_, intent) = intents.swap_remove(at);
        assert_ne!(came(&intent.call), Some(Came::NotApplied), "{effect:#?} is said not to have been");
    }
    // The intents that are left have no effect.
    for (_, intent) in intents {
        assert_ne!(came(&intent.call), Some(Came::Applied), "{intent:#?} is said to have had an effect, and had none");
    }
    for call in world.calls() {
        let count = effects.iter().filter(|effect| effect.tool == call.tool && effect.args == call.args).count();
        match &call.told {
            Told::Result(_) => assert_eq!(count, 1, "{call:#?}"),
            // A duplicate call may be refused because of the effect of the first call.
            Told::Refused(rule, _) if UNCERTAIN.contains(&rule.as_str()) || call.tool == "pay" => {
                assert!(count <= 1, "{call:#?} had {count} effects")
            }
            Told::Refused(..) => assert_eq!(count, 0, "{call:#?}"),
            Told::Nothing => assert!(count <= 1, "{call:#?} had {count} effects"),
        }
    }
}

impl Judged {
    /// Returns the times of the harness's records in the order of the log.
    pub fn times(&self) -> Vec<Timestamp> {
        let times = self.records.iter().filter(|record| !matches!(record.event, Event::TaskClosed(_)));
        times.map(|record| record.time.parse().unwrap()).collect()
    }
}
