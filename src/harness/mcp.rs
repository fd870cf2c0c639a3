//! Tools, as an MCP server to the agent. Each call goes through one pipeline, whatever the upstream speaks.
//!
//! What the agent sees of a tool, its name, description and schemas, comes from the contract. Nothing that an upstream lists is passed on.
//!
//! Supported MCP versions, with the agent and with upstreams alike, over streamable HTTP: 2024-11-05, 2025-03-26, 2025-06-18 and
//! 2025-11-25, which begin with `initialize`, and 2026-07-28, in which each request is independent after `server/discover`. The agent's
//! side is stateless in all of them: there is no session that could be lost and no stream of the server's own. With upstreams, the newest
//! version that both know is used, with one session for each upstream ([`upstream`]).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use rmcp::{
    RoleServer, ServerHandler,
    model::{
        CallToolRequestParams, CallToolResponse, CallToolResult, ContentBlock, ErrorData as McpError, Implementation,
        ListToolsResult, PaginatedRequestParams, ServerCapabilities, ServerConfig, Tool as McpTool, ToolAnnotations,
    },
    service::RequestContext,
};
use serde_json::{Map, Value};

use super::{
    approvals::{Answered, Question},
    bounds::Bounds,
    dedup::{Deduplicator, KeyLease},
    gate::{Call, Decided, Gate, Permit, Settlement},
    http_tool,
    journal::call_id,
};
use crate::{
    canonical,
    evidence::{
        record::{Channel, Effect},
        rollback::{CompensationState, Undo},
    },
    policy::{
        approval::ApprovalSource,
        budget::Spent,
        config::{McpUpstream, Sensitivity, SideEffect, Tool, ToolUsage, Upstream, VerifyRead},
        decide::{Denial, TOOL_RULES},
        json, ledger, redact,
        rule::Rule,
        template::Request,
    },
    wire::PutState,
};

/// Sessions with upstreams.
pub mod upstream;

use upstream::{Ready, Upstreams};

/// How long an upstream's listing is used.
pub const LISTING_AGE: Duration = Duration::from_secs(60);

/// The longest call and result from which a compensation is rendered, in bytes of JSON.
const LONGEST_UNDO: usize = 1 << 20;
/// The longest result that is checked on the thread where it came, in bytes of JSON.
const LONG_RESULT: usize = 64 << 10;
/// The pause before a compensation that waits for approval is called again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// The arguments of a call, parsed before rmcp parses the message around them, with the number of bytes in which the whole message came.
/// They can be taken once.
#[derive(Clone)]
pub struct Read(Arc<Mutex<Option<Measured>>>);

/// Arguments, and the number of bytes in which they came.
type Measured = (Map<String, Value>, usize);

impl Read {
    /// Stores arguments that came in a text of this length.
    pub fn new(arguments: Map<String, Value>, length: usize) -> Self {
        Self(Arc::new(Mutex::new(Some((arguments, length)))))
    }

    fn take(&self) -> Option<(Map<String, Value>, usize)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// An extension of a request: whether its call has reached the pipeline, which records what becomes of it.
#[derive(Clone, Default)]
pub struct Reached(Arc<std::sync::atomic::AtomicBool>);

impl Reached {
    /// Returns whether the call has reached the pipeline.
    pub fn get(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::SeqCst)
    }
}

/// The MCP server that the agent sees.
#[derive(Clone)]
pub struct Tools {
    gate: Arc<Gate>,
    upstreams: Arc<Upstreams>,
}

/// The prepared request of a call.
enum Route {
    Mcp(McpUpstream, Ready),
    Http(Bytes),
}

/// A prepared request, with the facts about it for the intent.
struct PreparedCall {
    route: Route,
    effect: SideEffect,
    definition: Option<String>,
}

/// Whether a call must be made.
enum Dedup {
    /// The tool is not idempotent: each call is made.
    NotIdempotent,
    /// The call must be made, and no duplicate can be made at the same time.
    Execute(KeyLease),
    /// The call was made before, with this result.
    Replay(CallToolResult),
}

/// The result of a call.
struct CallResult {
    result: CallToolResult,
    /// The sequence number of the call's intent, if it was made.
    intent: Option<u64>,
    /// Whether an approval is pending.
    pending: bool,
}

impl CallResult {
    /// Returns the result of a call that was not made now.
    fn unmade(result: CallToolResult) -> Self {
        Self { result, intent: None, pending: false }
    }
}

/// The reason why a call does not leave.
enum NotSent {
    /// The call is denied.
    Denied(Denial),
    /// An approval is pending. The text is for the agent.
    Pending(String),
}

impl From<Denial> for NotSent {
    fn from(denial: Denial) -> Self {
        Self::Denied(denial)
    }
}

impl Tools {
    /// Creates a server for the gate's contracts. `used` is what the log says of the attempt so far. An upstream's listing is used for
    /// `fresh`.
    pub fn new(gate: Arc<Gate>, used: &BTreeMap<String, ToolUsage>, fresh: Duration) -> Self {
        let upstreams = Arc::new(Upstreams::new(gate.clone(), used, fresh));
        Self { gate, upstreams }
    }

    /// Returns the gate that calls go through.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Compensates a call of another task with a call of this contract and these arguments, as planned.
    ///
    /// # Errors
    /// Returns why the call is not compensated, or not for certain.
    pub async fn undo(&self, undoes: &str, undo: &Undo, args: Map<String, Value>) -> Result<(), String> {
        let tool = self.gate.contracts().tools().find(|tool| tool.contract == undo.contract);
        let tool = tool.ok_or_else(|| format!("the rollback does not have the contract {}", undo.contract))?;
        let came = loop {
            match self.call(&tool.name, sized(args.clone()), Some(undoes)).await {
                Ok(came) if came.pending => tokio::time::sleep(ASK_AGAIN).await,
                came => break came,
            }
        };
        let standing = self.gate.standing(undoes);
        match (came, standing) {
            // The outcome is in the log even if the result was lost or withheld.
            (_, Some(CompensationState::Undone)) => Ok(()),
            (Err(denial), _) => Err(format!("{}: {}", denial.rule, denial.reason)),
            (Ok(came), _) if came.result.is_error == Some(true) => Err(format!("{} answered with an error", tool.name)),
            (Ok(_), _) => {
                Err(format!("{} was called with the same arguments before, and was not called again", tool.name))
            }
        }
    }

    /// Makes a call with arguments that came in `length` bytes.
    async fn call(
        &self,
        name: &str,
        (args, length): (Map<String, Value>, usize),
        undoes: Option<&str>,
    ) -> Result<CallResult, Denial> {
        let Decided { verdict, arguments, digest, bytes, needs_approval } =
            self.gate.decide(name, Value::Object(args), length).await;
        // The arguments that were decided on are the ones that are sent.
        let (Value::Object(args), Some(digest)) = (arguments, digest.clone()) else {
            let reason = "the arguments are no JSON object".to_owned();
            let denial = verdict.err().unwrap_or(Denial { rule: Rule::RequestJson, reason });
            return Err(self.gate.deny(Channel::Tool, name, digest, denial).await);
        };
        let tool = match verdict {
            Ok(()) => self.gate.contracts().policy().tool(name),
            Err(denial) => return Err(self.gate.deny(Channel::Tool, name, Some(digest), denial).await),
        };
        let Some(tool) = tool else {
            let reason = "no contract of this task is for it".to_owned();
            let denial = Denial { rule: Rule::ToolUnknown, reason };
            return Err(self.gate.deny(Channel::Tool, name, Some(digest), denial).await);
        };
        // The key is held until the call is settled, so that only one of several duplicates is made.
        let turn = match self.once(tool, &args, &digest).await {
            Ok(Dedup::Replay(result)) => return Ok(CallResult::unmade(result)),
            Ok(Dedup::Execute(turn)) => Some(turn),
            Ok(Dedup::NotIdempotent) => None,
            Err(denial) => return Err(self.gate.deny(Channel::Tool, name, Some(digest), denial).await),
        };
        let key = turn.as_ref().map(|turn| turn.key.clone());
        let undoing = undoes.is_some();
        let undoes = undoes.map(str::to_owned);
        let allowed = self.allow(tool, &args, (&digest, bytes, length), (key.clone(), undoes), needs_approval).await;
        let (route, permit) = match allowed {
            Ok(allowed) => allowed,
            // This is not a denial, so nothing is counted. It is not an error either, because some agents give up after an error. But if
            // the tool has an output schema, clients expect structured content in every result that is not an error.
            Err(NotSent::Pending(told)) => {
                let told = vec![ContentBlock::text(told)];
                let error = tool.output.is_some();
                let told = if error { CallToolResult::error(told) } else { CallToolResult::success(told) };
                return Ok(CallResult { pending: true, ..CallResult::unmade(told) });
            }
            Err(NotSent::Denied(denial)) => {
                return Err(self.gate.deny(Channel::Tool, name, Some(digest), denial).await);
            }
        };
        let (bounds, intent) = (Bounds::of(tool), permit.intent);
        let undone = !self.gate.is_rollback() && tool.compensation().is_some();
        let arguments = (tool.verify.is_some() || undone).then(|| Value::Object(args.clone()));
        let (result, settlement) = match route {
            Route::Mcp(mcp, ready) => self.upstreams.call(tool, &mcp, ready, args, permit.intent, bounds).await,
            Route::Http(arguments) => http_tool::call(self.gate.link(), tool, arguments, permit.intent, bounds).await,
        };
        let (result, mut settlement) = self.looked_at(tool, result, settlement).await;
        let answered = result.as_ref().ok().and_then(structured_output);
        if let Some(output) = &answered {
            self.gate.keep(&tool.name, output);
        }
        // A call that the upstream reports as an error may or may not have had an effect. It gets no compensation, and as a compensation it
        // does not count as applied.
        let error = result.as_ref().is_ok_and(|result| result.is_error == Some(true));
        if error && undoing && settlement.effect == Effect::Applied {
            settlement.effect = Effect::Unknown;
        }
        if let Some(arguments) = arguments.as_ref().filter(|_| undone && !error && settlement.effect == Effect::Applied)
        {
            settlement.undone_by = self.keep_undo(tool, intent, arguments, answered).await;
        }
        if let (Some(_), Ok(result)) = (&key, &result) {
            let digest = settlement.response_digest.as_ref();
            self.gate.once().keep(self.gate.link(), permit.intent, result, digest).await;
        }
        let unknown = settlement.effect == Effect::Unknown;
        permit.settle(settlement);
        let result = match result {
            // The call is over, and its result is denied.
            Err(denial) if denial.rule == Rule::UpstreamSecret => {
                Err(self.gate.deny(Channel::Tool, name, Some(digest), denial).await)
            }
            result => result,
        };
        // The outcome of the call is in no log, so the result is not returned as if it were.
        if let Some(failed) = self.gate.journal().failure() {
            return Err(failed);
        }
        match (result, tool.verify.as_ref().zip(arguments)) {
            (Err(denial), Some((read, arguments))) if unknown => {
                let told = self.resolve(tool, read, &arguments, &call_id(intent)).await;
                let words = told.unwrap_or_else(|why| why);
                Err(Denial { rule: denial.rule, reason: format!("{}. {words}", denial.reason) })
            }
            (result, _) => result.map(|result| CallResult { result, intent: Some(intent), pending: false }),
        }
    }

    /// Stores the arguments of this call's compensation outside the pod, before anything else learns that the call was made. Returns their
    /// commitment. A call whose compensation cannot be rendered or stored is left for manual action: it has taken effect, so stopping here
    /// would not help.
    async fn keep_undo(&self, tool: &Tool, intent: u64, arguments: &Value, result: Option<Value>) -> Option<String> {
        let keep = PutState { intent, arguments: arguments.clone(), result: result.unwrap_or_default() };
        let size = serde_json::to_vec(&keep).map_or(usize::MAX, |text| text.len());
        let kept = match size {
            ..=LONGEST_UNDO => self.gate.link().keep(&keep).await.map_err(|error| error.to_string()),
            _ => Err(format!("call and answer are {size} bytes long, more than {LONGEST_UNDO}")),
        };
        kept.inspect_err(|reason| {
            tracing::error!(
                tool = tool.name,
                reason = redact::plain(reason),
                "the arguments that undo a call are not kept: it is left to people"
            );
        })
        .ok()
    }

    /// Records the outcome of a call that got no reply, as the read that its contract names reports it. Returns the outcome in words.
    ///
    /// # Errors
    /// Returns why the outcome is still unknown.
    async fn resolve(&self, tool: &Tool, read: &VerifyRead, arguments: &Value, call: &str) -> Result<String, String> {
        // The time counts from now on and not from when the call was sent, because the upstream may still be at work.
        let settled = Instant::now() + Duration::from_secs(u64::try_from(read.settle_seconds).unwrap_or_default());
        loop {
            let last = Instant::now() >= settled;
            let came = Box::pin(self.call(&read.tool, sized(read.arguments(arguments)), None)).await;
            let (found, by) = match came.map(|came| (structured_output(&came.result), came.intent)) {
                Ok((Some(found), Some(by))) => (found, by),
                Ok(_) => return Err(format!("{} did not tell what became of it", read.tool)),
                Err(denial) => return Err(format!("{} could not be asked: {}", read.tool, denial.reason)),
            };
            let (effect, words) = match self.applied(tool, arguments, found).await {
                Ok(true) => (Effect::Applied, "it took effect: do not repeat it"),
                Ok(false) if last => (Effect::NotApplied, "it did not take effect: it may be made again"),
                // The upstream may still be at work.
                Ok(false) => {
                    tokio::time::sleep_until(settled.into()).await;
                    continue;
                }
                Err(neither) => return Err(format!("{} does not tell what became of it: {neither}", read.tool)),
            };
            self.gate.resolve(call, effect, by).map_err(|denial| denial.reason)?;
            return Ok(format!("{} tells that {words}", read.tool));
        }
    }

    /// Returns whether the result of the read says that a call took effect.
    ///
    /// # Errors
    /// Returns why the result says neither.
    async fn applied(&self, tool: &Tool, arguments: &Value, read: Value) -> Result<bool, String> {
        let (name, arguments) = (tool.name.clone(), arguments.clone());
        let judged =
            self.gate.apart(Bounds::of(tool).time, move |gate| gate.contracts().applied(&name, &arguments, &read));
        judged.await.unwrap_or_else(|denial| Err(denial.reason))
    }

    /// Waits for the call's idempotency key, if its contract has idempotency.
    async fn once(&self, tool: &Tool, args: &Map<String, Value>, digest: &str) -> Result<Dedup, Denial> {
        let Some(of) = &tool.idempotency else { return Ok(Dedup::NotIdempotent) };
        let uid = &self.gate.contracts().policy().task.uid;
        let key = ledger::key(uid, &tool.name, of, args, (digest, self.gate.salt())).ok_or_else(|| Denial {
            rule: Rule::ToolIdempotency,
            reason: format!(
                "expected the argument {:?}, which tells calls of {} apart, found none",
                of.argument.as_deref().unwrap_or_default(),
                tool.name
            ),
        })?;
        let once = self.gate.once();
        let turn = once.turn(key).await;
        // The call may be of this attempt or of an earlier one. Its contract may name a read that finds out its outcome.
        if let Some((read, call)) =
            tool.verify.as_ref().zip(Deduplicator::unknown(self.gate.journal(), of, &turn, digest))
        {
            let arguments = Value::Object(args.clone());
            if let Err(why) = self.resolve(tool, read, &arguments, &call).await {
                tracing::warn!(call, why, "whether a call took effect is still not known");
            }
        }
        let made = once.answer((self.gate.journal(), self.gate.link()), tool, of, &turn, digest).await?;
        Ok(made.map_or(Dedup::Execute(turn), Dedup::Replay))
    }

    /// Makes all other checks before a call that its contract allows leaves. Returns the call's route once its intent is stored.
    ///
    /// # Errors
    /// Returns the first rule that denies the call, which is not recorded yet, or a pending approval.
    async fn allow(
        &self,
        tool: &Tool,
        args: &Map<String, Value>,
        (digest, bytes, length): (&str, u64, usize),
        (key, undoes): (Option<String>, Option<String>),
        needs_approval: bool,
    ) -> Result<(Route, Permit), NotSent> {
        let name = tool.name.as_str();
        let mut rules = TOOL_RULES.to_vec();
        // This rule is checked first, see [`Contracts::decide`](crate::policy::decide::Contracts::decide).
        rules.extend(tool.limits.request_bytes.map(|_| Rule::ToolRequestBytes));
        let mut way = self.route(tool, args, &mut rules).await?;
        let access = &self.gate.contracts().policy().access;
        rules.extend((!access.rules.is_empty()).then_some(Rule::AccessRule));
        rules.extend(access.risk.as_ref().map(|_| Rule::RiskScore));
        rules.extend(tool.approval.as_ref().or(access.approval.as_ref()).map(|_| Rule::ToolApproval));
        let arguments = Value::Object(args.clone());
        let passed = self.gate.judge(tool, way.effect, &arguments, length).await?;
        let by_contract = tool.approval.as_ref().filter(|_| needs_approval).map(|of| (ApprovalSource::Contract, of));
        let by_pack =
            access.approval.as_ref().filter(|_| !passed.because.is_empty()).map(|of| (ApprovalSource::Pack, of));
        let needs: Vec<_> = by_contract.into_iter().chain(by_pack).collect();
        // Approval comes last, so that approvers do not get calls that another rule denies.
        let (mut approvals, mut because) = (Vec::new(), Vec::new());
        if !needs.is_empty() {
            self.gate.open()?;
            // The gateway decides by what is stored.
            self.gate.journal().caught_up().await?;
            let call = Question {
                tool: name.to_owned(),
                effect: way.effect,
                arguments: text(args)?,
                digest: digest.to_owned(),
            };
            match self.gate.approvals().ask(&call, &needs).await {
                Answered::Approved { names, because: reasons } => {
                    // Approvers take time, and the upstream may have changed the tool's definition meanwhile.
                    way = self.route(tool, args, &mut Vec::new()).await?;
                    (approvals, because) = (names, reasons);
                }
                Answered::Pending(told) => return Err(NotSent::Pending(told)),
                Answered::Refused(denial) => return Err(denial.into()),
            }
        }
        rules.extend(tool.limits.calls.map(|_| Rule::ToolLimitCalls));
        rules.extend(tool.limits.per_minute.map(|_| Rule::ToolRate));
        let call = Call {
            channel: Channel::Tool,
            target: name.to_owned(),
            effect: Some(way.effect),
            definition: way.definition,
            request_digest: Some(digest.to_owned()),
            request_bytes: bytes,
            key,
            approvals,
            because,
            undoes,
            judged: None,
            rules,
            model: None,
            reserve: Spent::default(),
        };
        let permit = self.gate.permit_tool(call, arguments, length, Bounds::of(tool).time).await?;
        Ok((way.route, permit))
    }

    /// Returns the route that a call would take now, and adds the rules that were checked for it.
    ///
    /// # Errors
    /// Returns the first rule that denies the call.
    async fn route(
        &self,
        tool: &Tool,
        args: &Map<String, Value>,
        rules: &mut Vec<Rule>,
    ) -> Result<PreparedCall, Denial> {
        let name = tool.name.as_str();
        let (route, effect, definition) = match &tool.upstream {
            Upstream::Http(http) => {
                let malformed =
                    |error: &dyn std::fmt::Display| Denial { rule: Rule::ToolUrl, reason: error.to_string() };
                let request = Request::parse(http).map_err(|error| malformed(&error))?;
                rules.push(Rule::ToolUrl);
                // The gateway renders the request from the same arguments. Arguments that render no request are denied here.
                request.render(args)?;
                (Route::Http(text(args)?.into()), tool.side_effect, None)
            }
            Upstream::Mcp(mcp) => {
                let ready = self.upstreams.ready(tool, mcp, Bounds::of(tool).time).await?;
                rules.push(Rule::ToolChanged);
                let effect = ready.definition.tightens(tool.side_effect);
                if !self.gate.contracts().policy().allowed_effects.contains(&effect) {
                    return Err(Denial {
                        rule: Rule::ToolEffect,
                        reason: format!(
                            "the contract of {name} says {}, but the upstream itself says that the tool changes something, and the \
                             workflow class does not allow {}",
                            tool.side_effect.as_str(),
                            effect.as_str()
                        ),
                    });
                }
                let digest = ready.definition.digest.clone();
                (Route::Mcp(mcp.clone(), ready), effect, Some(digest))
            }
        };
        Ok(PreparedCall { route, effect, definition })
    }

    /// Returns the result as the agent gets it, and its sensitivity. A result that is long or slow to check is checked on a thread of its
    /// own. A result that cannot be checked in time is withheld.
    async fn looked_at(
        &self,
        tool: &Tool,
        result: Result<CallToolResult, Denial>,
        mut settlement: Settlement,
    ) -> Looked {
        let length =
            result.as_ref().map_or(0, |result| serde_json::to_vec(result).map_or(usize::MAX, |text| text.len()));
        if self.gate.outputs().is_bounded_cost(tool, length) && length <= LONG_RESULT {
            return look(&self.gate, tool, result, settlement);
        }
        let (tool, seen) = (tool.clone(), settlement.clone());
        let name = tool.name.clone();
        let looked = self.gate.apart(Bounds::of(&tool).time, move |gate| look(gate, &tool, result, seen)).await;
        looked.unwrap_or_else(|denial| {
            settlement.rule = Some(Rule::ToolOutput);
            settlement.sensitivity = Sensitivity::Restricted;
            let reason = format!(
                "{name} was called and answered, but its result is withheld: {}. What the call did stays done: do not repeat it",
                denial.reason
            );
            (Err(Denial { rule: Rule::ToolOutput, reason }), settlement)
        })
    }
}

/// A result as the agent gets it, and the call's settlement.
type Looked = (Result<CallToolResult, Denial>, Settlement);

fn look(gate: &Gate, tool: &Tool, result: Result<CallToolResult, Denial>, settlement: Settlement) -> Looked {
    let (result, mut settlement) = check_output(gate, tool, result, settlement);
    settlement.sensitivity = match &result {
        Ok(result) => gate.guard().result(tool, result),
        // The reason may contain the upstream's text of an error.
        Err(denial) if settlement.effect != Effect::NotApplied => gate.guard().result(tool, &denial.reason),
        Err(_) => Sensitivity::default(),
    };
    (result, settlement)
}

/// Returns arguments with the number of bytes of their JSON.
fn sized(args: Map<String, Value>) -> (Map<String, Value>, usize) {
    let length = serde_json::to_vec(&args).map_or(usize::MAX, |text| text.len());
    (args, length)
}

/// Returns the result as the agent gets it, if it matches the contract's output schema, and adds its commitment to the settlement.
fn check_output(
    gate: &Gate,
    tool: &Tool,
    result: Result<CallToolResult, Denial>,
    mut settlement: Settlement,
) -> Looked {
    let Ok(mut result) = result else { return (result, settlement) };
    let outputs = gate.outputs();
    // A result that the upstream reports as an error need not match the output schema.
    let misfit = if result.is_error == Some(true) || !outputs.has(&tool.name) {
        None
    } else {
        match result.structured_content.clone().or_else(|| only_json(&result)) {
            Some(value) => {
                let misfit = outputs.check(&tool.name, &value).err();
                // Clients that know the output schema look for the value here.
                result.structured_content = Some(value);
                misfit
            }
            None => Some("it is no JSON, and the contract has an output schema".to_owned()),
        }
    };
    let bytes = serde_json::to_vec(&result).unwrap_or_default();
    settlement.response_digest = Some(gate.salt().bytes(&bytes));
    settlement.response_bytes = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    let Some(misfit) = misfit else { return (Ok(result), settlement) };
    settlement.rule = Some(Rule::ToolOutput);
    let reason = format!(
        "{} was called and answered, but its result is withheld: {misfit}. What the call did stays done: do not repeat it",
        tool.name
    );
    (Err(Denial { rule: Rule::ToolOutput, reason }), settlement)
}

/// Returns arguments as RFC 8785 JSON.
fn text(args: &Map<String, Value>) -> Result<String, Denial> {
    let unreadable = |reason: String| Denial { rule: Rule::RequestJson, reason };
    let text = canonical::to_bytes(args).map_err(|error| unreadable(error.to_string()))?;
    String::from_utf8(text).map_err(|error| unreadable(error.to_string()))
}

/// Returns the JSON that is a result's only content, if it can be parsed in one way only.
fn only_json(result: &CallToolResult) -> Option<Value> {
    match result.content.as_slice() {
        [ContentBlock::Text(text)] => json::parse(text.text.as_bytes()).ok(),
        _ => None,
    }
}

/// Returns the value that a successful result has for preconditions: its structured content, or else its only text block, parsed if it is
/// JSON.
fn structured_output(result: &CallToolResult) -> Option<Value> {
    if result.is_error == Some(true) {
        return None;
    }
    let text = || match result.content.as_slice() {
        [ContentBlock::Text(text)] => Some(Value::from(text.text.as_str())),
        _ => None,
    };
    result.structured_content.clone().or_else(|| only_json(result)).or_else(text)
}

impl ServerHandler for Tools {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
            .with_server_info(Implementation::new("belay", env!("CARGO_PKG_VERSION")))
            .with_instructions(
                "Every call is checked against its contract. A refusal names the rule; asking again does not help.",
            )
    }

    async fn list_tools(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, McpError> {
        Ok(ListToolsResult::with_all_items(self.gate.contracts().tools().map(advertise).collect()))
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, McpError> {
        let parts = context.extensions.get::<http::request::Parts>();
        if let Some(reached) = parts.and_then(|parts| parts.extensions.get::<Reached>()) {
            reached.0.store(true, std::sync::atomic::Ordering::SeqCst);
        }
        // The arguments were parsed before and are not parsed again.
        let args = match parts.and_then(|parts| parts.extensions.get::<Read>()).and_then(Read::take) {
            Some(args) => args,
            None => sized(request.arguments.unwrap_or_default()),
        };
        // A denial is a result and not a protocol error, because the model must see it and not only the client library.
        let came = self.call(&request.name, args, None).await.map(|came| came.result);
        let result = came.unwrap_or_else(|denial| CallToolResult::error(vec![ContentBlock::text(denial.told("call"))]));
        Ok(CallToolResponse::Complete(result))
    }
}

fn advertise(tool: &Tool) -> McpTool {
    let input = tool.input.as_object().cloned().unwrap_or_default();
    let mut advertised = McpTool::new(tool.name.clone(), tool.description.clone(), Arc::new(input));
    advertised.output_schema = tool.output.as_ref().and_then(|output| output.as_object().cloned()).map(Arc::new);
    advertised.annotations = Some(ToolAnnotations::from_raw(
        None,
        Some(tool.side_effect == SideEffect::Read),
        Some(tool.side_effect != SideEffect::Read),
        None,
        Some(tool.side_effect == SideEffect::External),
    ));
    advertised
}
