//! Upstreams of tools, of every kind that a contract can have.
//!
//! A kind is a module with an [`Upstream`]: it prepares a call, and it makes the call once the call has an intent. [`Upstreams`] is the one
//! place that knows all kinds. It selects a kind by an enum and not by `dyn`, for two reasons: what a kind has prepared is of a type of its
//! own, and a kind that is added to contracts does not compile until it is selected here.
//!
//! Guarantees: a call is sent only by [`Upstreams::call`]. What [`Upstreams::prepare`] sends, the listing of an MCP server, is a call of
//! its own in the log.
//!
//! Non-goals: whether a call may be made, see [`tools`](super::tools); connections, see [`gateway_client`](super::gateway_client).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use rmcp::model::CallToolResult;
use serde_json::{Map, Value};

use super::{
    bounds::Bounds,
    gate::{Gate, Settlement},
};
use crate::{
    canonical,
    policy::{
        config::{self, SideEffect, Tool, ToolUsage},
        decide::Denial,
        rule::Rule,
    },
};

mod http;
mod mcp;

pub use mcp::LISTING_AGE;

/// A kind of upstream.
trait Upstream {
    /// The part of a contract that names an upstream of this kind.
    type Terms;
    /// A prepared request, which may leave once it has an intent.
    type Ready;

    /// Prepares a call that would leave now, and adds the rules that were checked for it.
    ///
    /// # Errors
    /// Returns the first rule that denies the call.
    async fn prepare(
        &self,
        tool: &Tool,
        terms: &Self::Terms,
        args: &Map<String, Value>,
        rules: &mut Vec<Rule>,
    ) -> Result<Prepared<Self::Ready>, Denial>;

    /// Makes a call that has this intent. Returns the result and the call's settlement.
    async fn call(
        &self,
        tool: &Tool,
        ready: Self::Ready,
        args: Map<String, Value>,
        intent: u64,
        bounds: Bounds,
    ) -> (Result<CallToolResult, Denial>, Settlement);
}

/// A prepared request, with the facts about it for the intent.
pub(super) struct Prepared<R> {
    /// The request.
    pub(super) ready: R,
    /// What the call may change.
    pub(super) side_effect: SideEffect,
    /// The digest of the upstream's definition of an MCP tool.
    pub(super) definition: Option<String>,
}

/// A prepared request of any kind.
pub(super) enum Ready {
    Mcp(mcp::Ready),
    Http(http::Ready),
}

/// The upstreams of a task.
pub(super) struct Upstreams {
    mcp: mcp::Servers,
    http: http::Http,
}

impl Upstreams {
    /// Creates the upstreams of this gate. `used` is what the log says of the attempt so far. An upstream's listing is used for `fresh`.
    pub(super) fn new(gate: Arc<Gate>, used: &BTreeMap<String, ToolUsage>, fresh: Duration) -> Self {
        let http = http::Http::new(gate.link().clone());
        Self { mcp: mcp::Servers::new(gate, used, fresh), http }
    }

    /// Prepares a call that would leave now, and adds the rules that were checked for it.
    ///
    /// # Errors
    /// Returns the first rule that denies the call.
    pub(super) async fn prepare(
        &self,
        tool: &Tool,
        args: &Map<String, Value>,
        rules: &mut Vec<Rule>,
    ) -> Result<Prepared<Ready>, Denial> {
        Ok(match &tool.upstream {
            config::Upstream::Mcp(terms) => self.mcp.prepare(tool, terms, args, rules).await?.map(Ready::Mcp),
            config::Upstream::Http(terms) => self.http.prepare(tool, terms, args, rules).await?.map(Ready::Http),
        })
    }

    /// Makes a call that has this intent. Returns the result and the call's settlement.
    pub(super) async fn call(
        &self,
        tool: &Tool,
        ready: Ready,
        args: Map<String, Value>,
        intent: u64,
        bounds: Bounds,
    ) -> (Result<CallToolResult, Denial>, Settlement) {
        match ready {
            Ready::Mcp(ready) => self.mcp.call(tool, ready, args, intent, bounds).await,
            Ready::Http(ready) => self.http.call(tool, ready, args, intent, bounds).await,
        }
    }
}

impl<R> Prepared<R> {
    fn map<S>(self, kind: impl FnOnce(R) -> S) -> Prepared<S> {
        let Self { ready, side_effect, definition } = self;
        Prepared { ready: kind(ready), side_effect, definition }
    }
}

/// Returns arguments as RFC 8785 JSON.
pub(super) fn text(args: &Map<String, Value>) -> Result<String, Denial> {
    let unreadable = |reason: String| Denial { rule: Rule::RequestJson, reason };
    let text = canonical::to_bytes(args).map_err(|error| unreadable(error.to_string()))?;
    String::from_utf8(text).map_err(|error| unreadable(error.to_string()))
}
