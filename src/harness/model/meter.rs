//! Replies of models, read along and settled.

use std::sync::Arc;

use futures::StreamExt;
use http::{Response, StatusCode, header};
use http_body_util::{BodyDataStream, BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use sha2::{Digest, Sha256};

use super::spent;
use crate::{
    evidence::record::{Channel, Effect},
    harness::{
        body::Body,
        gate::{Gate, Permit, Settlement},
        link::{self, Peer},
    },
    policy::{
        config::{ModelPrice, Sensitivity},
        model::{
            Bound,
            settle::{self, Came, Reported},
        },
        rule::Rule,
    },
};

/// Longest part of a reply that is kept to find its usage in: a whole JSON reply, or one line of a stream.
const LONGEST_SCAN: usize = 16 << 20;

/// Whom to tell of a reply that the gateway has ended, and which call it was.
pub(super) struct Told {
    pub(super) gate: Arc<Gate>,
    pub(super) path: String,
    pub(super) digest: String,
}

/// The reply, which is settled when it has passed, or when either side hangs up.
pub(super) fn meter(
    reply: Response<Incoming>,
    permit: Permit,
    (reserved, price): (Bound, Option<ModelPrice>),
    told: Told,
) -> Response<Body> {
    let (mut parts, body) = reply.into_parts();
    let streamed = parts
        .headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.starts_with("text/event-stream"));
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
    for hop in [header::CONNECTION, header::TRANSFER_ENCODING] {
        parts.headers.remove(hop);
    }
    let parts_of = (BodyDataStream::new(body), Some(meter), told);
    let stream = futures::stream::unfold(parts_of, |(mut body, mut meter, told)| async move {
        match body.next().await {
            Some(Ok(chunk)) => {
                if let Some(meter) = &mut meter {
                    meter.see(&chunk);
                }
                Some((Ok(Frame::data(chunk)), (body, meter, told)))
            }
            Some(Err(error)) => {
                let ended = link::ended(&error);
                if let Some(mut meter) = meter.take() {
                    meter.rule = ended.as_ref().map(|denial| denial.rule);
                    // What the gateway has ended, the provider may have said to its end.
                    if meter.came == Came::Unread && ended.is_none() {
                        meter.came = Came::Broken;
                    }
                }
                if let Some(denial) = ended {
                    let Told { gate, path, digest } = &told;
                    gate.deny(Channel::Model, path, Some(digest.clone()), denial).await;
                }
                Some((Err(Box::<dyn std::error::Error + Send + Sync>::from(error)), (body, meter, told)))
            }
            None => {
                if let Some(mut meter) = meter {
                    meter.came = Came::Whole;
                }
                None
            }
        }
    });
    Response::from_parts(parts, BodyExt::boxed_unsync(StreamBody::new(stream)))
}

/// Reads along. Dropped at the end of the reply, or when the agent or the provider hangs up.
struct Meter {
    permit: Option<Permit>,
    /// Why the gateway has ended the reply.
    rule: Option<Rule>,
    reserved: Bound,
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
        if self.reported.ended || self.length == Some(self.bytes) {
            self.came = Came::Whole;
        }
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
        let spent = charged.map(|tokens| spent(tokens, self.price.as_ref()));
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
