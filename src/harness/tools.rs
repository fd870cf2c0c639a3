//! The pipeline that every tool call goes through, whatever its upstream speaks.
//!
//! ```text
//! decide ─▶ deduplicate ─▶ prepare ─▶ evaluate, approve ─▶ permit ─▶ call ─▶ check the output ─▶ keep ─▶ settle
//! ```
//!
//! Guarantees: a call is sent only with a permit, and with the arguments that were decided on. Duplicate calls of an idempotent tool are
//! made once. What a compensation and a replay need is stored before the outcome is recorded. A call without a reply is resolved by the
//! read that its contract names. A result that breaks the contract is withheld.
//!
//! Non-goals: the protocol of the agent, see [`mcp`](super::mcp), and of upstreams; rules and records, see [`gate`](super::gate).

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use rmcp::model::{CallToolResult, ContentBlock};
use serde_json::{Map, Value};

use super::{
    approvals::{Answered, Question},
    bounds::Bounds,
    dedup::{Deduplicator, KeyLease},
    gate::{Call, Decided, Gate, Permit},
    journal::call_id,
    upstream::{Ready, Upstreams, text},
};
use crate::{
    evidence::{
        record::{CallOutcome, Channel},
        rollback::{CompensationState, Undo},
    },
    policy::{
        approval::ApprovalSource,
        budget::Spent,
        config::{Tool, ToolUsage, VerifyRead},
        decide::{Denial, TOOL_RULES},
        ledger, redact,
        rule::Rule,
    },
    wire::PutState,
};

mod output;

use output::{check, structured_output};

/// The longest call and result from which a compensation is rendered, in bytes of JSON.
const LONGEST_UNDO: usize = 1 << 20;
/// The pause before a compensation that waits for approval is called again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// The tools of the task's contracts.
#[derive(Clone)]
pub struct Tools {
    gate: Arc<Gate>,
    upstreams: Arc<Upstreams>,
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
pub(super) struct CallResult {
    pub(super) result: CallToolResult,
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
    /// Creates the tools of the gate's contracts. `used` is what the log says of the attempt so far. An upstream's listing is used for
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
    pub async fn undo(&self, call: &str, undo: &Undo, args: Map<String, Value>) -> Result<(), String> {
        let tool = self.gate.contracts().tools().find(|tool| tool.contract == undo.contract);
        let tool = tool.ok_or_else(|| format!("the rollback does not have the contract {}", undo.contract))?;
        let came = loop {
            match self.call(&tool.name, sized(args.clone()), Some(call)).await {
                Ok(came) if came.pending => tokio::time::sleep(ASK_AGAIN).await,
                came => break came,
            }
        };
        let state = self.gate.compensation(call);
        match (came, state) {
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
    ///
    /// # Errors
    /// Returns the denial, which is recorded.
    pub(super) async fn call(
        &self,
        name: &str,
        (args, length): (Map<String, Value>, usize),
        compensates: Option<&str>,
    ) -> Result<CallResult, Denial> {
        let Decided { verdict, arguments, digest, bytes, needs_approval } =
            self.gate.decide(name, Value::Object(args), length).await;
        // The arguments that were decided on are the ones that are sent.
        let (Value::Object(args), Some(digest)) = (arguments, digest.clone()) else {
            let reason = "the arguments are not a JSON object".to_owned();
            let denial = verdict.err().unwrap_or(Denial { rule: Rule::RequestJson, reason });
            return Err(self.gate.deny(Channel::Tool, name, digest, denial).await);
        };
        let tool = match verdict {
            Ok(()) => self.gate.contracts().policy().tool(name),
            Err(denial) => return Err(self.gate.deny(Channel::Tool, name, Some(digest), denial).await),
        };
        let Some(tool) = tool else {
            let reason = "no contract of this task is for the tool".to_owned();
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
        let undoing = compensates.is_some();
        let compensates = compensates.map(str::to_owned);
        let allowed =
            self.allow(tool, &args, (&digest, bytes, length), (key.clone(), compensates), needs_approval).await;
        let (ready, permit) = match allowed {
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
        let (result, settlement) = self.upstreams.call(tool, ready, args, permit.intent, bounds).await;
        let (result, mut settlement) = check(&self.gate, tool, result, settlement).await;
        let answered = result.as_ref().ok().and_then(structured_output);
        if let Some(output) = &answered {
            self.gate.keep(&tool.name, output);
        }
        // A call that the upstream reports as an error may or may not have had an effect. It gets no compensation, and as a compensation it
        // does not count as applied.
        let error = result.as_ref().is_ok_and(|result| result.is_error == Some(true));
        if error && undoing && settlement.outcome == CallOutcome::Applied {
            settlement.outcome = CallOutcome::Unknown;
        }
        if let Some(arguments) =
            arguments.as_ref().filter(|_| undone && !error && settlement.outcome == CallOutcome::Applied)
        {
            settlement.compensation_commitment = self.keep_undo(tool, intent, arguments, answered).await;
        }
        if let (Some(_), Ok(result)) = (&key, &result) {
            let digest = settlement.response_commitment.as_ref();
            self.gate.once().keep(self.gate.link(), permit.intent, result, digest).await;
        }
        let unknown = settlement.outcome == CallOutcome::Unknown;
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
        let put = PutState { intent, arguments: arguments.clone(), result: result.unwrap_or_default() };
        let size = serde_json::to_vec(&put).map_or(usize::MAX, |text| text.len());
        let kept = match size {
            ..=LONGEST_UNDO => self.gate.link().put_state(&put).await.map_err(|error| error.to_string()),
            _ => Err(format!("call and answer are {size} bytes long, more than {LONGEST_UNDO}")),
        };
        kept.inspect_err(|reason| {
            tracing::error!(
                tool = tool.name,
                reason = redact::plain(reason),
                "the arguments of a compensation are not stored: the call is left for manual action"
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
                Ok(_) => return Err(format!("{} did not tell the outcome", read.tool)),
                Err(denial) => return Err(format!("{} could not be called: {}", read.tool, denial.reason)),
            };
            let (outcome, words) = match self.applied(tool, arguments, found).await {
                Ok(true) => (CallOutcome::Applied, "the call took effect: do not repeat it"),
                Ok(false) if last => (CallOutcome::NotApplied, "the call did not take effect: you can make it again"),
                // The upstream may still be at work.
                Ok(false) => {
                    tokio::time::sleep_until(settled.into()).await;
                    continue;
                }
                Err(neither) => return Err(format!("{} does not tell the outcome: {neither}", read.tool)),
            };
            self.gate.resolve(call, outcome, by).map_err(|denial| denial.reason)?;
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
                tracing::warn!(call, why, "the outcome of a call is still unknown");
            }
        }
        let made = once.answer((self.gate.journal(), self.gate.link()), tool, of, &turn, digest).await?;
        Ok(made.map_or(Dedup::Execute(turn), Dedup::Replay))
    }

    /// Makes all other checks before a call that its contract allows leaves. Returns the prepared request once its intent is stored.
    ///
    /// # Errors
    /// Returns the first rule that denies the call, which is not recorded yet, or a pending approval.
    async fn allow(
        &self,
        tool: &Tool,
        args: &Map<String, Value>,
        (digest, bytes, length): (&str, u64, usize),
        (key, compensates): (Option<String>, Option<String>),
        needs_approval: bool,
    ) -> Result<(Ready, Permit), NotSent> {
        let name = tool.name.as_str();
        let mut rules = TOOL_RULES.to_vec();
        // This rule is checked first, see [`Contracts::decide`](crate::policy::decide::Contracts::decide).
        rules.extend(tool.limits.request_bytes.map(|_| Rule::ToolRequestBytes));
        let mut prepared = self.upstreams.prepare(tool, args, &mut rules).await?;
        let access = &self.gate.contracts().policy().access;
        rules.extend((!access.rules.is_empty()).then_some(Rule::AccessRule));
        rules.extend(access.risk.as_ref().map(|_| Rule::RiskScore));
        rules.extend(tool.approval.as_ref().or(access.approval.as_ref()).map(|_| Rule::ToolApproval));
        let arguments = Value::Object(args.clone());
        let passed = self.gate.judge(tool, prepared.side_effect, &arguments, length).await?;
        let by_contract = tool.approval.as_ref().filter(|_| needs_approval).map(|of| (ApprovalSource::Contract, of));
        let by_pack =
            access.approval.as_ref().filter(|_| !passed.reasons.is_empty()).map(|of| (ApprovalSource::Pack, of));
        let needs: Vec<_> = by_contract.into_iter().chain(by_pack).collect();
        // Approval comes last, so that approvers do not get calls that another rule denies.
        let (mut approvals, mut reasons) = (Vec::new(), Vec::new());
        if !needs.is_empty() {
            self.gate.open()?;
            // The gateway decides by what is stored.
            self.gate.journal().caught_up().await?;
            let call = Question {
                tool: name.to_owned(),
                side_effect: prepared.side_effect,
                arguments: text(args)?,
                digest: digest.to_owned(),
            };
            match self.gate.approvals().ask(&call, &needs).await {
                Answered::Approved { names, reasons: told } => {
                    // Approvers take time, and the upstream may have changed the tool's definition meanwhile.
                    prepared = self.upstreams.prepare(tool, args, &mut Vec::new()).await?;
                    (approvals, reasons) = (names, told);
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
            side_effect: Some(prepared.side_effect),
            definition: prepared.definition,
            request_commitment: Some(digest.to_owned()),
            request_bytes: bytes,
            key,
            approvals,
            reasons,
            compensates,
            judged: None,
            rules,
            model: None,
            reserve: Spent::default(),
        };
        let permit = self.gate.permit_tool(call, arguments, length, Bounds::of(tool).time).await?;
        Ok((prepared.ready, permit))
    }
}

/// Returns arguments with the number of bytes of their JSON.
pub(super) fn sized(args: Map<String, Value>) -> (Map<String, Value>, usize) {
    let length = serde_json::to_vec(&args).map_or(usize::MAX, |text| text.len());
    (args, length)
}
