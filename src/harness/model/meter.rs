//! Replies of models, read along and settled.
//!
//! Guarantees: a reply that whoever asked has stopped reading is read on for a while, so that its provider's account is known; after that, or
//! once the attempt ends, what was set aside stays spent. Non-goals: to stop a model. Some do when their reader is gone, and some do not, and none
//! says how much it had thought until then.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt;
use http::{Response, StatusCode, header};
use http_body_util::{BodyDataStream, StreamBody};
use hyper::body::Frame;
use sha2::{Digest, Sha256};

use super::{headers::passed_back, refusal, unasked::Unasked};
use crate::{
    evidence::record::{Channel, Effect},
    harness::{
        body::{Body, BodyError, boxed},
        gate::{Gate, Permit, Settlement},
        link::{Carried, EndedError, Peer},
    },
    policy::{
        budget::Spent,
        config::{ModelPrice, Sensitivity},
        model::{
            api::Api,
            settle::{self, Came, Reported, Reserved},
        },
        rule::Rule,
    },
};

/// Longest part of a reply that is kept to find its usage in: a whole JSON reply, or one line of a stream.
const LONGEST_SCAN: usize = 16 << 20;

/// The media type of a stream, whose letters may be of either case.
const EVENTS: &str = "text/event-stream";
/// How long a reply is read on that nobody wants any more, and how much of it.
pub(super) const READ_ON: Duration = Duration::from_secs(15);
const READ_ON_BYTES: u64 = 16 << 20;

/// Whom to tell of a reply that the gateway has ended, and which call it was.
#[derive(Clone)]
pub(super) struct Told {
    pub(super) gate: Arc<Gate>,
    pub(super) path: String,
    pub(super) digest: String,
    /// Whether the agent has asked for an account of a stream of chat completions, or does not get one.
    pub(super) has_asked: bool,
}

/// The reply, which is settled when it has passed, or when either side hangs up.
pub(super) fn meter(
    reply: Response<Carried>,
    permit: Permit,
    (reserved, price): (Reserved, Option<ModelPrice>),
    told: Told,
) -> Response<Body> {
    let (mut parts, body) = reply.into_parts();
    let streamed = parts
        .headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .and_then(|kind| kind.get(..EVENTS.len()))
        .is_some_and(|kind| kind.eq_ignore_ascii_case(EVENTS));
    let meter = Meter {
        permit: Some(permit),
        rule: None,
        reserved,
        price,
        status: parts.status,
        upstream: Peer::taken(&mut parts.headers),
        streamed,
        hasher: Sha256::new(),
        bytes: 0,
        scan: Vec::new(),
        looked: 0,
        reported: Reported::default(),
        // Whoever reads a reply of known length stops at its last byte, and never asks for its end.
        length: hyper::body::Body::size_hint(&body).exact(),
        came: Came::Unread,
    };
    passed_back(&mut parts.headers);
    let unasked = (streamed && !told.has_asked).then(|| {
        parts.headers.remove(header::CONTENT_LENGTH);
        Unasked::default()
    });
    let body = Some(BodyDataStream::new(body));
    let passing = Passing { body, meter: Some(meter), unasked, end: None, told, is_wanted: true };
    let stream = futures::stream::unfold(passing, async |mut passing| Some((passing.next().await?, passing)));
    Response::from_parts(parts, boxed(StreamBody::new(stream)))
}

/// A reply on its way. Dropped with what is left of it when whoever asked hangs up.
struct Passing {
    body: Option<BodyDataStream<Carried>>,
    meter: Option<Meter>,
    /// What keeps the account from an agent that did not ask for it.
    unasked: Option<Unasked>,
    /// How it ends, once its last bytes have been passed on.
    end: Option<Option<Next>>,
    told: Told,
    /// Whether whoever asked still reads it.
    is_wanted: bool,
}

/// What comes next of a reply.
type Next = Result<Frame<Bytes>, BodyError>;

impl Passing {
    /// What comes next of it.
    async fn next(&mut self) -> Option<Next> {
        if let Some(end) = self.end.take() {
            return end;
        }
        let end = loop {
            match self.body.as_mut()?.next().await {
                Some(Ok(chunk)) => {
                    if let Some(meter) = &mut self.meter {
                        meter.see(&chunk);
                    }
                    let chunk = match &mut self.unasked {
                        Some(unasked) => unasked.pass(&chunk).into(),
                        None => chunk,
                    };
                    if !chunk.is_empty() {
                        return Some(Ok(Frame::data(chunk)));
                    }
                }
                Some(Err(error)) => break Some(self.broke_off(error).await),
                None => {
                    if let Some(mut meter) = self.meter.take() {
                        meter.over();
                    }
                    break None;
                }
            }
        };
        let rest = self.unasked.take().map(Unasked::rest).unwrap_or_default();
        if rest.is_empty() {
            return end;
        }
        self.end = Some(end);
        Some(Ok(Frame::data(rest.into())))
    }

    /// What is passed on last of a reply that broke off.
    async fn broke_off(&mut self, error: EndedError) -> Next {
        let ended = EndedError::denial(&error);
        let streamed = self.meter.as_ref().is_some_and(|meter| meter.streamed);
        if let Some(mut meter) = self.meter.take() {
            meter.rule = ended.as_ref().map(|denial| denial.rule);
            // What has ended on our side of the provider, it may have said to its end.
            if meter.came == Came::Unread && matches!(error, EndedError::BrokeOff) {
                meter.came = Came::Broken;
            }
        }
        if let Some(denial) = ended {
            let Told { gate, path, digest, .. } = &self.told;
            let denial = gate.deny(Channel::Model, path, Some(digest.clone()), denial).await;
            if let Some(api) = Api::of_path(path).filter(|_| streamed) {
                // Whole events have passed so far, and this is the last.
                self.body = None;
                return Ok(Frame::data(refusal::event(api, &denial).into()));
            }
        }
        Err(error.into())
    }

    /// Reads what is left, for its account.
    async fn read_on(mut self) {
        let over = self.told.gate.over();
        let read = async {
            // The rest is no news once the meter is gone, knows the end, or has seen more than was set aside.
            while self.meter.as_ref().is_some_and(Meter::wants_more) && self.next().await.is_some() {}
        };
        tokio::select! {
            () = read => {}
            () = tokio::time::sleep(READ_ON) => {}
            () = over => {}
        }
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        if self.is_wanted && self.meter.as_ref().is_some_and(Meter::wants_more) {
            let (body, meter, told) = (self.body.take(), self.meter.take(), self.told.clone());
            self.told.gate.behind(Self { body, meter, unasked: None, end: None, told, is_wanted: false }.read_on());
        }
    }
}

/// Reads along. Dropped at the end of the reply, or when the agent or the provider hangs up.
struct Meter {
    permit: Option<Permit>,
    /// Why the gateway has ended the reply.
    rule: Option<Rule>,
    reserved: Reserved,
    price: Option<ModelPrice>,
    status: StatusCode,
    upstream: Option<Peer>,
    streamed: bool,
    hasher: Sha256,
    bytes: u64,
    scan: Vec<u8>,
    /// So much of it has no end of a line.
    looked: usize,
    reported: Reported,
    length: Option<u64>,
    came: Came,
}

impl Meter {
    /// Whether more of the reply would tell what it costs.
    fn wants_more(&self) -> bool {
        let had_it_all = self.reported.least_output() >= self.reserved.bound.output;
        self.came == Came::Unread && self.status.is_success() && !had_it_all && self.bytes < READ_ON_BYTES
    }

    fn see(&mut self, chunk: &[u8]) {
        self.hasher.update(chunk);
        self.bytes = self.bytes.saturating_add(chunk.len() as u64);
        if self.scan.len().saturating_add(chunk.len()) <= LONGEST_SCAN {
            self.scan.extend_from_slice(chunk);
        }
        if self.streamed {
            // Each byte is looked at once, however long a line is.
            let from = std::mem::take(&mut self.looked);
            let ends = |scan: &[u8], from: usize| {
                let rest = scan.get(from..).unwrap_or_default();
                rest.iter().position(|byte| *byte == b'\n').map(|end| from.saturating_add(end))
            };
            let mut next = ends(&self.scan, from);
            while let Some(end) = next {
                let line: Vec<u8> = self.scan.drain(..=end).collect();
                next = ends(&self.scan, 0);
                if let Some(data) = line.strip_prefix(b"data:") {
                    match serde_json::from_slice(data) {
                        Ok(event) => self.reported.see(&event),
                        Err(_) if data.trim_ascii() == b"[DONE]" => self.reported.done(),
                        Err(_) => {}
                    }
                }
            }
            self.looked = self.scan.len();
        }
        // Many clients hang up there, and do not wait for the end of the connection's reply.
        if self.reported.ended || (!self.streamed && self.length == Some(self.bytes)) {
            self.came = Came::Whole;
        }
    }

    /// The body is over. A stream may end well before its protocol does, as what a proxy cuts off: it is whole if it is accounted for.
    fn over(&mut self) {
        let is_whole = !self.streamed || !self.status.is_success() || self.reported.ended || self.reported.is_accounted;
        self.came = if is_whole { Came::Whole } else { Came::Broken };
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        let Some(permit) = self.permit.take() else { return };
        if !self.streamed {
            match serde_json::from_slice(&self.scan) {
                Ok(reply) => self.reported.see(&reply),
                // It was written whole before its first byte came.
                Err(_) => {
                    self.reported.written =
                        self.length.and_then(|length| i64::try_from(length).ok()).unwrap_or(i64::MAX);
                }
            }
        }
        let charged = settle::charge(self.reserved, self.status.is_success(), self.came, &self.reported);
        let spent = charged.map(|tokens| Spent::of(tokens, self.price.as_ref()));
        let effect = match (self.came, self.status) {
            (Came::Whole, status) if status.is_success() => Effect::Applied,
            (Came::Whole, status) if status.is_client_error() => Effect::NotApplied,
            _ => Effect::Unknown,
        };
        let response = permit.salt().digested(&self.hasher.clone().finalize().into());
        permit.settle(Settlement {
            effect,
            rule: self.rule,
            status: self.status.as_u16(),
            response_digest: Some(response),
            response_bytes: self.bytes,
            sent_bytes: None,
            spent,
            upstream: self.upstream.take(),
            sensitivity: Sensitivity::default(),
            undone_by: None,
        });
    }
}
