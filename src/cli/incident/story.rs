//! The content of an incident report, in the order in which readers need it.

use std::collections::BTreeMap;

use base64::{Engine, prelude::BASE64_STANDARD};
use jiff::Timestamp;

use crate::{
    cli::terminal::{Safe, safe_json},
    evidence::{
        merkle::{Hash, inclusion_proof, leaf_hash},
        record::{CallOutcome, Channel, Event, Outcome, Record, Summary, Tone},
        segment::Segment,
    },
    policy::{config::Usage, price},
    verify::Report,
};

/// The maximum number of records that a page shows in full, with their proofs. `belay prove` exports the others.
const WHOLE: usize = 2000;

/// One line of the timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// The records that it comes from.
    pub(super) records: Vec<u64>,
    /// The time, by the writer's clock.
    pub(super) time: String,
    pub(super) attempt: i64,
    pub(super) tone: Tone,
    /// One word for what was decided or what happened.
    pub(super) word: &'static str,
    pub(super) what: String,
    pub(super) detail: String,
    /// The rules of the decision.
    pub(super) rules: Vec<String>,
}

/// A counter over time, against its limit.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Curve {
    pub(super) name: &'static str,
    pub(super) used: String,
    pub(super) limit: String,
    /// Pairs of a time from 0 to 1, and a use from 0 to 1 or more.
    pub(super) points: Vec<(f64, f64)>,
}

/// A target of calls that were made or denied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) channel: &'static str,
    pub(super) target: String,
    pub(super) addresses: Vec<String>,
    pub(super) sent: u64,
    pub(super) denied: u64,
    pub(super) up: u64,
    pub(super) bytes: u64,
}

/// A record in full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Whole {
    pub(super) seq: u64,
    pub(super) kind: &'static str,
    pub(super) json: String,
    /// The hashes that lead from it to the root, in base64.
    pub(super) proof: Vec<String>,
}

/// The whole incident report.
pub(super) struct Story<'r> {
    pub(super) report: &'r Report,
    pub(super) place: String,
    pub(super) key: String,
    pub(super) objective: String,
    pub(super) class: String,
    pub(super) pack: String,
    pub(super) steps: Vec<Step>,
    pub(super) curves: Vec<Curve>,
    pub(super) network: Vec<Peer>,
    pub(super) records: Vec<Whole>,
}

impl<'r> Story<'r> {
    /// Builds the report from a log's segments with their records, and from the result of the verification.
    pub(super) fn of(report: &'r Report, segments: &[(Segment, Vec<Record>)], place: &str, key: &str) -> Self {
        let records: Vec<&Record> = segments.iter().flat_map(|(_, records)| records).collect();
        let policy = records.iter().rev().find_map(|record| match &record.event {
            Event::AttemptOpened(opened) => Some(&opened.policy),
            _ => None,
        });
        let safe = |text: &str| Safe(text).to_string();
        let mut story = Self {
            report,
            place: safe(place),
            key: safe(key),
            objective: policy.map(|policy| safe(&policy.task.objective)).unwrap_or_default(),
            class: policy.map(|policy| safe(&policy.task.workflow_class)).unwrap_or_default(),
            pack: policy.map(|policy| safe(&policy.pack.name)).unwrap_or_default(),
            steps: Vec::new(),
            curves: curves(report, &records),
            network: network(&records),
            records: whole(segments),
        };
        story.tell(&records);
        story
    }

    fn tell(&mut self, records: &[&Record]) {
        // The line of an intent also shows its outcome.
        let mut open: BTreeMap<&str, usize> = BTreeMap::new();
        for record in records {
            match &record.event {
                Event::Outcome(outcome) if let Some(at) = open.remove(outcome.call.as_str()) => {
                    if let Some(step) = self.steps.get_mut(at) {
                        ended(step, record, outcome);
                    }
                    continue;
                }
                Event::Intent(intent) => drop(open.insert(&intent.call, self.steps.len())),
                _ => {}
            }
            self.steps.push(step(record));
        }
        for at in open.into_values() {
            if let Some(step) = self.steps.get_mut(at) {
                let before = if step.detail.is_empty() { String::new() } else { format!("{}; ", step.detail) };
                step.detail = format!("{before}it has no outcome: {}", CallOutcome::Unknown.words());
                step.tone = Tone::Bad;
            }
        }
    }
}

/// Returns a record as a line.
fn step(record: &Record) -> Step {
    let safe = |text: &str| Safe(text).to_string();
    let Summary { tone, word, what, detail, rules } = record.summary();
    Step {
        records: vec![record.seq],
        time: safe(&record.time),
        attempt: record.attempt,
        tone,
        word,
        what: safe(&what),
        detail: safe(&detail),
        rules: rules.into_iter().map(|rule| rule.as_str().to_owned()).collect(),
    }
}

/// Adds the outcome to an intent's line.
fn ended(step: &mut Step, record: &Record, outcome: &Outcome) {
    step.records.push(record.seq);
    let took = step.time.parse::<Timestamp>().ok().zip(record.time.parse::<Timestamp>().ok());
    let took = took.map(|(from, to)| format!(", {} ms", to.duration_since(from).as_millis())).unwrap_or_default();
    let Summary { tone, detail, .. } = outcome.summary();
    step.tone = if outcome.rule.is_some() { Tone::Bad } else { tone };
    step.rules.extend(outcome.rule.map(|rule| rule.as_str().to_owned()));
    let before = if step.detail.is_empty() { String::new() } else { format!("{}; ", step.detail) };
    step.detail = format!("{before}{}{took}", Safe(&detail));
}

/// Returns the use of each limit over time.
fn curves(report: &Report, records: &[&Record]) -> Vec<Curve> {
    let Some(limits) = report.summary.limits else { return vec![] };
    let times: Vec<i64> =
        records.iter().map(|record| record.time.parse::<Timestamp>().map_or(0, Timestamp::as_millisecond)).collect();
    let (first, last) = (times.first().copied().unwrap_or_default(), times.last().copied().unwrap_or_default());
    let span = last.saturating_sub(first).max(1) as f64;
    let curve = |name, of: fn(&Usage) -> i64, limit: i64, show: fn(i64) -> String| Curve {
        name,
        used: show(of(&report.summary.usage)),
        limit: show(limit),
        points: records
            .iter()
            .zip(&times)
            .map(|(record, time)| {
                let at = (time.saturating_sub(first) as f64 / span).clamp(0.0, 1.0);
                (at, of(&record.usage) as f64 / limit.max(1) as f64)
            })
            .collect(),
    };
    let number = |count: i64| count.to_string();
    let mut curves = vec![
        curve("tool calls", |usage| usage.tool_calls, limits.tool_calls, number),
        curve("tokens", |usage| usage.tokens, limits.tokens, number),
    ];
    curves.extend(limits.cost_micros.map(|limit| curve("cost", |usage| usage.cost_micros, limit, price::show)));
    curves.extend(limits.denials.map(|limit| curve("denials", |usage| usage.denials, limit, number)));
    curves
}

fn network(records: &[&Record]) -> Vec<Peer> {
    let mut peers: BTreeMap<(&str, &str), Peer> = BTreeMap::new();
    let mut calls: BTreeMap<&str, (&str, &str)> = BTreeMap::new();
    let peer = |channel: Channel, target: &str| Peer {
        channel: channel.as_str(),
        target: Safe(target).to_string(),
        ..Peer::default()
    };
    for record in records {
        match &record.event {
            Event::Intent(intent) => {
                let at = (intent.channel.as_str(), intent.target.as_str());
                calls.insert(&intent.call, at);
                let peer = peers.entry(at).or_insert_with(|| peer(intent.channel, &intent.target));
                peer.sent = peer.sent.saturating_add(1);
                peer.up = peer.up.saturating_add(intent.request_bytes);
            }
            Event::Denied(denied) => {
                let at = (denied.channel.as_str(), denied.target.as_str());
                let peer = peers.entry(at).or_insert_with(|| peer(denied.channel, &denied.target));
                peer.denied = peer.denied.saturating_add(denied.calls());
            }
            Event::Outcome(outcome) => {
                let peer = calls.get(outcome.call.as_str()).and_then(|at| peers.get_mut(at));
                let Some(peer) = peer else { continue };
                peer.bytes = peer.bytes.saturating_add(outcome.response_bytes);
                peer.up = peer.up.saturating_add(outcome.sent_bytes.unwrap_or_default());
                if let Some(address) = address(outcome)
                    && !peer.addresses.contains(&address)
                {
                    peer.addresses.push(address);
                }
            }
            _ => {}
        }
    }
    peers.into_values().collect()
}

/// Returns the address of a call, and the start of the digest of the certificate that was shown there. The record has the whole digest.
fn address(outcome: &Outcome) -> Option<String> {
    let address = Safe(outcome.upstream.as_ref()?).to_string();
    let certificate = outcome.certificate.as_ref().map(|digest| digest.chars().take(16).collect::<String>());
    Some(certificate.map_or(address.clone(), |digest| format!("{address} (certificate {digest}…)")))
}

fn whole(segments: &[(Segment, Vec<Record>)]) -> Vec<Whole> {
    let bytes: Vec<&Vec<u8>> = segments.iter().flat_map(|(segment, _)| &segment.records).collect();
    let leaves: Vec<Hash> = bytes.iter().map(|record| leaf_hash(record)).collect();
    let records = segments.iter().flat_map(|(_, records)| records);
    let whole = |(at, (record, bytes)): (usize, (&Record, &&Vec<u8>))| {
        let value: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
        let proof = inclusion_proof(&leaves, at).unwrap_or_default();
        Whole {
            seq: record.seq,
            kind: record.event.kind(),
            json: safe_json(&serde_json::to_string_pretty(&value).unwrap_or_default()),
            proof: proof.iter().map(|hash| BASE64_STANDARD.encode(hash)).collect(),
        }
    };
    records.zip(&bytes).enumerate().take(WHOLE).map(whole).collect()
}
