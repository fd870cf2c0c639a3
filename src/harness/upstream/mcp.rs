//! MCP upstreams: sessions with servers, their listings, and calls.
//!
//! Guarantees: no upstream waits for another. With each server, the newest version of MCP that both know is used, in one session. A call
//! leaves only with a definition of its tool that was listed within the last minute, that has the contract's pin or else is the first that
//! this attempt saw, and that is in the call's intent. A listing is a call of its own in the log. A listed tool that cannot be read takes
//! away only itself.
//!
//! Non-goals: the bytes of messages, see [`transport`]; rmcp's cache of lists, which outlives failures.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use rmcp::{
    RoleClient, ServiceExt,
    model::{
        CallToolRequestParams, CallToolResult, ClientRequest, Extensions, ListToolsRequest, PaginatedRequestParams,
        ResultType, ServerResult,
    },
    service::RunningService,
    transport::{StreamableHttpClientTransport, streamable_http_client::StreamableHttpClientTransportConfig},
};
use serde_json::{Map, Value};
use tokio::sync::Mutex as AsyncMutex;

use super::{Prepared, Upstream};
use crate::{
    evidence::record::{CallOutcome, Channel},
    harness::{
        bounds::{Bounds, LONGEST_REPLY, late},
        gate::{Call, Gate, Settlement},
        gateway_client,
    },
    listed::Catalogue,
    policy::{
        budget::Spent,
        config::{McpUpstream, Tool, ToolUsage},
        decide::Denial,
        definition::Definition,
        redact, redirect,
        rule::Rule,
        shorten::{shorten, shorten_to},
    },
};

mod answer;
mod events;
mod meaning;
mod transport;

use meaning::Reply;
use transport::{Exchange, Exchanges, GatewayTransport, Stops, marked};

/// How long an upstream's listing is used.
pub const LISTING_AGE: Duration = Duration::from_secs(60);
/// The longest text of an upstream in a reason, in characters.
const LONGEST_WORDS: usize = 1024;
/// The number of messages after which a session is followed by another. The gateway allows 512 by one intent, and a call that is under way
/// needs some.
const MESSAGES: u32 = 256;
/// The maximum number of pages of a list.
const PAGES: usize = 64;

type Session = RunningService<RoleClient, ()>;

/// The MCP servers, by endpoint.
pub struct Servers {
    gate: Arc<Gate>,
    /// How long a server's listing is used.
    fresh: Duration,
    servers: Mutex<HashMap<String, Arc<Server>>>,
    /// The digest of the first definition of each tool that this attempt saw.
    first: Mutex<BTreeMap<String, String>>,
    facts: Exchanges,
}

/// One MCP server.
#[derive(Default)]
struct Server {
    /// Held while a session is opened or tools are listed.
    opening: AsyncMutex<()>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    session: Option<Arc<Session>>,
    /// The number of messages of the session that left by the intent that opened it.
    talked: Arc<AtomicU32>,
    listing: Option<Listing>,
}

/// The tools that a server listed.
struct Listing {
    at: Instant,
    tools: Definitions,
}

/// The definition of a tool, or why the tool is left out.
type Defined = Result<Definition, String>;
/// The definitions of a server's tools by their names.
type Definitions = HashMap<String, Defined>;

impl Server {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn session(&self) -> Option<Arc<Session>> {
        let state = self.state();
        let is_new = state.talked.load(Ordering::Relaxed) < MESSAGES;
        state.session.clone().filter(|session| is_new && !session.is_transport_closed())
    }

    /// Returns the session and the tool's definition in the listing, if the listing is fresh.
    fn fresh(&self, tool: &str, age: Duration) -> Option<(Arc<Session>, Option<Defined>)> {
        let session = self.session()?;
        let state = self.state();
        let listing = state.listing.as_ref().filter(|listing| listing.at.elapsed() < age)?;
        Some((session, listing.tools.get(tool).cloned()))
    }

    /// Drops a session that failed, so that the next call opens another.
    fn drop_session(&self, failed: &Arc<Session>) {
        let mut state = self.state();
        if state.session.as_ref().is_some_and(|session| Arc::ptr_eq(session, failed)) {
            *state = State::default();
        }
    }
}

/// A call that may leave once it has an intent.
pub struct Ready {
    server: Arc<Server>,
    session: Arc<Session>,
    url: String,
    /// The name of the tool in the upstream.
    name: String,
}

impl Upstream for Servers {
    type Ready = Ready;
    type Terms = McpUpstream;

    async fn prepare(
        &self,
        tool: &Tool,
        mcp: &McpUpstream,
        _: &Map<String, Value>,
        rules: &mut Vec<Rule>,
    ) -> Result<Prepared<Ready>, Denial> {
        let (ready, definition) = self.ready(tool, mcp, Bounds::of(tool).time).await?;
        rules.push(Rule::ToolChanged);
        let name = tool.name.as_str();
        let side_effect = definition.tightens(tool.side_effect);

        if !self.gate.contracts().policy().allowed_effects.contains(&side_effect) {
            return Err(Denial {
                rule: Rule::ToolEffect,
                reason: format!(
                    "the contract of {name} says {}, but the upstream itself says that the tool changes something, and the \
                             workflow class does not allow {}",
                    tool.side_effect.as_str(),
                    side_effect.as_str()
                ),
            });
        }

        Ok(Prepared { ready, side_effect, definition: Some(definition.digest) })
    }

    async fn call(
        &self,
        tool: &Tool,
        ready: Ready,
        args: Map<String, Value>,
        intent: u64,
        bounds: Bounds,
    ) -> (Result<CallToolResult, Denial>, Settlement) {
        let facts = Exchange::new(bounds.reply, bounds.time);
        let Stops { too_long, withheld, .. } = facts.stops.clone();
        self.note(intent, facts);
        let mut params = CallToolRequestParams::new(ready.name);
        params.arguments = Some(args);
        params.meta = Some(marked(intent));
        let answer = tokio::select! {
            // These come first because they are the reason why the session ends.
            biased;
            () = too_long.notified() => Err(bounds.too_long(tool)),
            () = withheld.notified() => Err(gateway_client::withheld()),
            // The peer sends a call once. The session itself would send it again with what the server asks for.
            answer = tokio::time::timeout(bounds.time, ready.session.peer().call_tool(params)) => match answer {
                Ok(Ok(result)) => Ok(result),
                Ok(Err(error)) => Err(Denial { rule: Rule::UpstreamReply, reason: format!("no result: {}", quoted(&error)) }),
                Err(_) => Err(late(tool, bounds.time, true)),
            },
        };
        let facts = self.taken(intent);
        let mut settlement = Settlement { status: facts.status, upstream: facts.upstream, ..Settlement::unknown(None) };
        let denial = match answer {
            Ok(mut result) => {
                // Upstreams with an older protocol do not set this, and agents with a newer protocol need it. rmcp removes it for agents
                // that do not know it.
                result.result_type = Some(ResultType::COMPLETE);
                settlement.outcome = Reply::Result.outcome();
                return (Ok(result), settlement);
            }
            Err(denial) => denial,
        };
        ready.server.drop_session(&ready.session);
        let denial = match (facts.undelivered, facts.reply) {
            (Some((denial, certain)), _) => {
                if certain {
                    settlement.outcome = CallOutcome::NotApplied;
                }
                denial
            }
            (None, Some((reply, words))) => {
                settlement.outcome = reply.outcome();
                match (denial.rule, facts.moved) {
                    (Rule::UpstreamReply, Some(location)) => moved(tool, &ready.url, facts.status, &location, reply),
                    (Rule::UpstreamReply, None) => said(tool, facts.status, reply, words.as_deref()),
                    // The server refused the call, and no other session was open in time.
                    (Rule::ToolTimeout, _) if reply.is_sent_again() => late(tool, bounds.time, false),
                    // A denial by another rule says more.
                    _ => denial,
                }
            }
            (None, None) => {
                settlement.outcome = if facts.sent { Reply::Late.outcome() } else { CallOutcome::NotApplied };
                denial
            }
        };
        settlement.rule = Some(denial.rule);
        (Err(denial), settlement)
    }
}

impl Servers {
    /// Creates the servers of this gate. `used` is what the log says of the attempt so far.
    pub fn new(gate: Arc<Gate>, used: &BTreeMap<String, ToolUsage>, fresh: Duration) -> Self {
        let first = used.iter().filter_map(|(tool, used)| Some((tool.clone(), used.definition.clone()?))).collect();
        Self { gate, fresh, servers: Mutex::default(), first: Mutex::new(first), facts: Arc::default() }
    }

    /// Prepares a call: a session, and a definition of the tool that is fresh and approved.
    ///
    /// # Errors
    /// Returns [`Rule::ToolChanged`] if the definition is another one or is gone, and the rule that failed if the upstream cannot be asked.
    async fn ready(&self, tool: &Tool, mcp: &McpUpstream, time: Duration) -> Result<(Ready, Definition), Denial> {
        let server = {
            let mut servers = self.servers.lock();
            servers.entry(mcp.url.clone()).or_default().clone()
        };
        let found = match server.fresh(&mcp.tool, self.fresh) {
            Some(found) => found,
            None => {
                let late = |_| late(tool, time, false);
                let _opening = tokio::time::timeout(time, server.opening.lock()).await.map_err(late)?;
                match server.fresh(&mcp.tool, self.fresh) {
                    Some(found) => found,
                    None => self.list(&server, tool, mcp, time).await?,
                }
            }
        };
        let (session, definition) = found;
        let definition = self.approved(tool, mcp, definition)?;
        Ok((Ready { server, session, url: mcp.url.clone(), name: mcp.tool.clone() }, definition))
    }

    /// Returns the definition if it is the approved one.
    fn approved(
        &self,
        tool: &Tool,
        mcp: &McpUpstream,
        found: Option<Result<Definition, String>>,
    ) -> Result<Definition, Denial> {
        let changed = |reason: String| Denial { rule: Rule::ToolChanged, reason };
        let found = match found {
            Some(Ok(found)) => found,
            Some(Err(reason)) => {
                return Err(changed(format!(
                    "expected {} to list a tool {:?} that can be called, found one that is left out: {reason}; whoever runs the server must \
                     correct its list",
                    mcp.url, mcp.tool
                )));
            }
            None => {
                return Err(changed(format!(
                    "expected {} to list a tool {:?}, found none; the contract `{}` must name a tool of that list",
                    mcp.url, mcp.tool, tool.contract
                )));
            }
        };
        // Readers of the log compare this digest with what the server lists, so it must not be redacted.
        self.gate.redactor().learn(&found.digest);
        if let Some(pin) = &mcp.digest {
            if *pin != found.digest {
                return Err(changed(format!(
                    "expected the definition of {:?} with digest {pin}, which the contract `{}` pins, found {}; have somebody read \
                     what {} lists now, and set spec.upstream.mcp.digest to that if it is right",
                    mcp.tool, tool.contract, found.digest, mcp.url
                )));
            }
            return Ok(found);
        }
        let mut first = self.first.lock();
        let first = first.entry(tool.name.clone()).or_insert_with(|| found.digest.clone());
        if *first != found.digest {
            return Err(changed(format!(
                "expected the definition of {:?} with digest {first}, which this attempt saw first, found {}; have somebody read what \
                 {} lists now, and set spec.upstream.mcp.digest of the contract `{}` to the one that is right",
                mcp.tool, found.digest, mcp.url, tool.contract
            )));
        }
        Ok(found)
    }

    /// Lists a server's tools, over its session or a new one.
    async fn list(
        &self,
        server: &Arc<Server>,
        tool: &Tool,
        mcp: &McpUpstream,
        time: Duration,
    ) -> Result<(Arc<Session>, Option<Result<Definition, String>>), Denial> {
        let call = Call {
            channel: Channel::Listing,
            target: tool.name.clone(),
            side_effect: None,
            definition: None,
            request_commitment: None,
            request_bytes: 0,
            key: None,
            approvals: vec![],
            reasons: vec![],
            compensates: None,
            judged: None,
            rules: vec![Rule::ToolUnknown],
            model: None,
            reserve: Spent::default(),
        };
        let permit = self.gate.permit(call).await?;
        let intent = permit.intent;
        let facts = Exchange::new(LONGEST_REPLY, time);
        let withheld = facts.stops.withheld.clone();
        self.note(intent, facts);
        let listed = async {
            if let Some(session) = server.session()
                && let Ok(tools) = list_over(&session, intent).await
            {
                let talked = server.state().talked.clone();
                return Ok((session, talked, tools));
            }
            // The session may have ended with the server.
            let talked = Arc::default();
            let session = self.open(&mcp.url, intent, &talked).await?;
            let tools = list_over(&session, intent).await?;
            Ok::<_, String>((session, talked, tools))
        };
        let listed = tokio::select! {
            biased;
            () = withheld.notified() => Ok(Err(gateway_client::withheld().reason)),
            listed = tokio::time::timeout(time, listed) => listed,
        };
        let facts = self.taken(intent);
        let seen = Settlement { status: facts.status, upstream: facts.upstream, ..Settlement::unknown(None) };
        let denial = match listed {
            Ok(Ok((session, talked, mut tools))) => {
                permit.settle(Settlement { outcome: CallOutcome::Applied, ..seen });
                tools.extend(vec![], facts.odd);
                let tools = self.defined(tools, server, mcp);
                let definition = tools.get(&mcp.tool).cloned();
                *server.state() = State {
                    session: Some(session.clone()),
                    talked,
                    listing: Some(Listing { at: Instant::now(), tools }),
                };
                return Ok((session, definition));
            }
            Ok(Err(reason)) => match (facts.undelivered, facts.moved) {
                (Some((denial, _)), _) => denial,
                (None, Some(location)) => moved(tool, &mcp.url, facts.status, &location, Reply::Moved),
                (None, None) => Denial { rule: Rule::UpstreamReply, reason },
            },
            Err(_) => late(tool, time, false),
        };
        *server.state() = State::default();
        permit.settle(Settlement { outcome: CallOutcome::NotApplied, rule: Some(denial.rule), ..seen });
        Err(denial)
    }

    /// Returns the definitions of a list. Logs the tools that are left out, unless they were left out before.
    fn defined(&self, listed: Catalogue, server: &Server, mcp: &McpUpstream) -> Definitions {
        let (tools, odd) = listed.finish();
        let define = |tool: &rmcp::model::Tool| -> Result<Definition, String> {
            let value = serde_json::to_value(tool).map_err(|error| error.to_string())?;
            Definition::of(&value).map_err(|error| error.to_string())
        };
        let mut defined: Definitions = tools.iter().map(|tool| (tool.name.to_string(), define(tool))).collect();
        // A name that is listed twice has the later reason.
        defined.extend(odd.into_iter().map(|odd| (odd.name, Err(odd.reason))));
        let state = server.state();
        let before = |name: &String| {
            state.listing.as_ref().is_some_and(|before| before.tools.get(name).is_some_and(Result::is_err))
        };
        for (name, reason) in defined.iter().filter_map(|(name, tool)| Some((name, tool.as_ref().err()?))) {
            if !before(name) {
                let (tool, reason) = (redact::plain(&shorten(name)), redact::plain(reason));
                tracing::warn!(tool, reason, contract_tool = mcp.tool, "an MCP server lists a tool that is left out");
            }
        }
        defined
    }

    /// Opens a session, whose messages are counted.
    async fn open(&self, url: &str, intent: u64, talked: &Arc<AtomicU32>) -> Result<Arc<Session>, String> {
        let (link, facts) = (self.gate.link().clone(), self.facts.clone());
        let wire = GatewayTransport { link, opened_by: intent, facts, talked: talked.clone() };
        let config = StreamableHttpClientTransportConfig::with_uri(url.to_owned());
        let transport = StreamableHttpClientTransport::with_client(wire, config);
        let session =
            ().serve(transport).await.map_err(|error| format!("no MCP session with {url}: {}", quoted(&error)))?;
        Ok(Arc::new(session))
    }

    fn note(&self, intent: u64, facts: Exchange) {
        self.facts.lock().insert(intent, facts);
    }

    fn taken(&self, intent: u64) -> Exchange {
        let facts = self.facts.lock().remove(&intent);
        facts.unwrap_or_else(|| Exchange::new(LONGEST_REPLY, Duration::ZERO))
    }
}

/// Returns a server's tools, from all pages.
async fn list_over(session: &Session, intent: u64) -> Result<Catalogue, String> {
    let mut tools = Catalogue::default();
    let mut cursor = None;
    for _ in 0..PAGES {
        let mut params = PaginatedRequestParams::default().with_cursor(cursor);
        params.meta = Some(marked(intent));
        let request =
            ListToolsRequest { method: Default::default(), params: Some(params), extensions: Extensions::default() };
        let page = match session.send_request(ClientRequest::ListToolsRequest(request)).await {
            Ok(ServerResult::ListToolsResult(page)) => page,
            Ok(_) => return Err("expected a list of tools, found another result".to_owned()),
            Err(error) => return Err(format!("the upstream does not list its tools: {}", quoted(&error))),
        };
        tools.extend(page.tools, vec![]);
        cursor = page.next_cursor;
        if cursor.is_none() {
            return Ok(tools);
        }
    }
    Err(format!("expected a list of at most {PAGES} pages, found more"))
}

/// Returns the denial for a reply without a result.
fn said(tool: &Tool, status: u16, reply: Reply, words: Option<&str>) -> Denial {
    let name = &tool.name;
    let kind = match reply {
        Reply::Unfinished | Reply::NoAnswer | Reply::Unreadable | Reply::BrokeOff => {
            format!(" and {}", reply.meaning().words)
        }
        _ => String::new(),
    };
    let words = words.map(|words| format!(": {}", quoted(&words))).unwrap_or_default();
    let effect = effect(reply);
    let reason = format!("expected a result of {name}, found HTTP {status}{kind}{words}; {effect}");
    Denial { rule: Rule::UpstreamReply, reason }
}

/// Returns the denial for a redirect that is not followed, with the URL for the contract.
fn moved(tool: &Tool, url: &str, status: u16, location: &str, reply: Reply) -> Denial {
    let asks = match redirect::resolve(url, location) {
        Some(to) => {
            // A server behind a proxy that ends TLS often names its own scheme. It is reached as before.
            let secure = to.strip_prefix("http://").filter(|_| url.starts_with("https://"));
            let secure = secure.filter(|rest| url.get("https://".len()..).is_some_and(|own| host(own) == host(rest)));
            let to = secure.map_or_else(|| to.clone(), |rest| format!("https://{rest}"));
            format!(
                "if that is the right server, set spec.upstream.mcp.url of the contract `{}` to {:?}",
                tool.contract,
                shorten(&to)
            )
        }
        None => format!("correct spec.upstream.mcp.url of the contract `{}`", tool.contract),
    };
    let reason = format!(
        "expected an answer of {url}, found HTTP {status} with a redirect to {:?}, which Belay does not follow: it follows one redirect with 307 \
         or 308 to the same scheme, host and port; {}; {asks}",
        shorten(location),
        effect(reply)
    );
    Denial { rule: Rule::UpstreamReply, reason }
}

/// Returns the host of a URL without its scheme.
fn host(rest: &str) -> &str {
    rest.split(['/', '?', '#', ':']).next().unwrap_or_default()
}

/// Says what became of a call.
fn effect(reply: Reply) -> &'static str {
    match reply.outcome() {
        CallOutcome::Applied => "the tool ran: do not repeat the call",
        CallOutcome::NotApplied => "the server did not run the tool",
        CallOutcome::Unknown => "it is unknown whether the call took effect: check before you make it again",
    }
}

/// Quotes an error that may contain an upstream's text.
fn quoted(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    // rmcp puts the Rust type of its transport before the reason.
    let reason = text.rsplit("] error: ").next().unwrap_or(&text);
    format!("{:?}", shorten_to(reason, LONGEST_WORDS))
}
