//! Replies of models, metered while they pass and then settled.
//!
//! Guarantees: a reply that its client has stopped reading is read on for a while, so that the usage that the provider reports is known.
//! After that, or once the attempt ends, the reservation stays spent.
//!
//! Non-goals: stopping a model. Some models stop when their reader is gone and some do not, and none reports how much it had thought until
//! then.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt;
use http::{Response, StatusCode, header};
use http_body_util::{BodyDataStream, StreamBody};
use hyper::body::Frame;
use sha2::{Digest, Sha256};

use super::{headers::passed_back, refusal, unasked::Unasked};
use crate::{
    evidence::record::{CallOutcome, Channel},
    harness::{
        body::{Body, BodyError, boxed},
        gate::{Gate, Permit, Settlement},
        gateway_client::{Carried, EndedError, Peer},
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

/// The longest part of a reply that is kept to find its usage, in bytes: a whole JSON reply, or one line of a stream.
const LONGEST_SCAN: usize = 16 << 20;

/// The media type of a stream. It is compared without case.
const EVENTS: &str = "text/event-stream";
/// How long a reply is read on that no client wants any more. `READ_ON_BYTES` limits how much of it is read.
pub(super) const READ_ON: Duration = Duration::from_secs(15);
const READ_ON_BYTES: u64 = 16 << 20;

/// The data of a call that is needed to deny the rest of its reply.
#[derive(Clone)]
pub(super) struct Told {
    pub(super) gate: Arc<Gate>,
    pub(super) path: String,
    pub(super) digest: String,
    /// Whether the agent has asked for the usage of a stream of chat completions. If not, it does not get one.
    pub(super) has_asked: bool,
}

/// Returns the reply. It is settled when it has passed or when either side hangs up.
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
        // A reader of a reply of known length stops at its last byte and never polls for its end.
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

/// A reply on its way to the client. If the client hangs up, it is dropped with the rest.
struct Passing {
    body: Option<BodyDataStream<Carried>>,
    meter: Option<Meter>,
    /// The filter that removes the usage from a stream whose client did not ask for it.
    unasked: Option<Unasked>,
    /// The end of the reply, while its last bytes are being passed on.
    end: Option<Option<Next>>,
    told: Told,
    /// Whether the client still reads the reply.
    is_wanted: bool,
}

/// The next frame of a reply.
type Next = Result<Frame<Bytes>, BodyError>;

impl Passing {
    /// Returns the next frame of the reply.
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

    /// Returns the last frame of a reply that broke off.
    async fn broke_off(&mut self, error: EndedError) -> Next {
        let ended = EndedError::denial(&error);
        let streamed = self.meter.as_ref().is_some_and(|meter| meter.streamed);
        if let Some(mut meter) = self.meter.take() {
            meter.rule = ended.as_ref().map(|denial| denial.rule);
            // If the reply broke off between the provider and the harness, the provider may have sent it to its end.
            if meter.came == Came::Unread && matches!(error, EndedError::BrokeOff) {
                meter.came = Came::Broken;
            }
        }
        if let Some(denial) = ended {
            let Told { gate, path, digest, .. } = &self.told;
            let denial = gate.deny(Channel::Model, path, Some(digest.clone()), denial).await;
            if let Some(api) = Api::of_path(path).filter(|_| streamed) {
                // Only whole events have passed so far, and this is the last one.
                self.body = None;
                return Ok(Frame::data(refusal::event(api, &denial).into()));
            }
        }
        Err(error.into())
    }

    /// Reads the rest of the reply for its usage.
    async fn read_on(mut self) {
        let over = self.told.gate.over();
        let read = async {
            // The rest adds nothing once the meter is gone, knows the end, or has seen as much output as was reserved.
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

/// A meter that reads along. It is dropped at the end of the reply, or when the agent or the provider hangs up.
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
    /// How many bytes of `scan` are known to have no line end.
    looked: usize,
    reported: Reported,
    length: Option<u64>,
    came: Came,
}

impl Meter {
    /// Returns whether more of the reply could change what it costs.
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
            // Each byte is scanned once, however long a line is.
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
        // Many clients hang up at this point and do not wait for the end of the body.
        if self.reported.ended || (!self.streamed && self.length == Some(self.bytes)) {
            self.came = Came::Whole;
        }
    }

    /// Notes that the body is over. A proxy may cut off a stream well before its protocol ends, so a stream is whole only if its usage is
    /// known or its protocol has ended.
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
                // A JSON reply was written as a whole before its first byte came, so its declared length counts.
                Err(_) => {
                    self.reported.written =
                        self.length.and_then(|length| i64::try_from(length).ok()).unwrap_or(i64::MAX);
                }
            }
        }
        let charged = settle::charge(self.reserved, self.status.is_success(), self.came, &self.reported);
        let spent = charged.map(|tokens| Spent::of(tokens, self.price.as_ref()));
        let outcome = match (self.came, self.status) {
            (Came::Whole, status) if status.is_success() => CallOutcome::Applied,
            (Came::Whole, status) if status.is_client_error() => CallOutcome::NotApplied,
            _ => CallOutcome::Unknown,
        };
        let response = permit.salt().digested(&self.hasher.clone().finalize().into());
        permit.settle(Settlement {
            outcome,
            rule: self.rule,
            status: self.status.as_u16(),
            response_commitment: Some(response),
            response_bytes: self.bytes,
            sent_bytes: None,
            spent,
            upstream: self.upstream.take(),
            sensitivity: Sensitivity::default(),
            compensation_commitment: None,
        });
    }
}
