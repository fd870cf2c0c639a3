//! The result of a tool call as the agent gets it.
//!
//! Guarantees: a result that does not match the contract's output schema is withheld, and so is one that cannot be checked in time. The
//! settlement has the commitment to what the upstream answered and the sensitivity of what the agent gets.
//!
//! Non-goals: the forms of replies. Each kind of upstream converts its replies to results of MCP.

use std::sync::Arc;

use rmcp::model::{CallToolResult, ContentBlock};
use serde_json::Value;

use crate::{
    evidence::record::CallOutcome,
    harness::{
        bounds::Bounds,
        gate::{Gate, Settlement},
    },
    policy::{
        config::{Sensitivity, Tool},
        decide::Denial,
        json,
        rule::Rule,
    },
};

/// The longest result that is checked on the thread where it came, in bytes of JSON.
const LONG_RESULT: usize = 64 << 10;

/// A result as the agent gets it, and the call's settlement.
pub(super) type Looked = (Result<CallToolResult, Denial>, Settlement);

/// Returns the result as the agent gets it, and its sensitivity. A result that is long or slow to check is checked on a thread of its
/// own. A result that cannot be checked in time is withheld.
pub(super) async fn check(
    gate: &Arc<Gate>,
    tool: &Tool,
    result: Result<CallToolResult, Denial>,
    mut settlement: Settlement,
) -> Looked {
    let length = result.as_ref().map_or(0, |result| serde_json::to_vec(result).map_or(usize::MAX, |text| text.len()));
    if gate.outputs().is_bounded_cost(tool, length) && length <= LONG_RESULT {
        return look(gate, tool, result, settlement);
    }
    let (tool, seen) = (tool.clone(), settlement.clone());
    let name = tool.name.clone();
    let looked = gate.apart(Bounds::of(&tool).time, move |gate| look(gate, &tool, result, seen)).await;
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

fn look(gate: &Gate, tool: &Tool, result: Result<CallToolResult, Denial>, settlement: Settlement) -> Looked {
    let (result, mut settlement) = check_output(gate, tool, result, settlement);
    settlement.sensitivity = match &result {
        Ok(result) => gate.guard().result(tool, result),
        // The reason may contain the upstream's text of an error.
        Err(denial) if settlement.outcome != CallOutcome::NotApplied => gate.guard().result(tool, &denial.reason),
        Err(_) => Sensitivity::default(),
    };
    (result, settlement)
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
            None => Some("it is not JSON, and the contract has an output schema".to_owned()),
        }
    };
    let bytes = serde_json::to_vec(&result).unwrap_or_default();
    settlement.response_commitment = Some(gate.salt().bytes(&bytes));
    settlement.response_bytes = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    let Some(misfit) = misfit else { return (Ok(result), settlement) };
    settlement.rule = Some(Rule::ToolOutput);
    let reason = format!(
        "{} was called and answered, but its result is withheld: {misfit}. What the call did stays done: do not repeat it",
        tool.name
    );
    (Err(Denial { rule: Rule::ToolOutput, reason }), settlement)
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
pub(super) fn structured_output(result: &CallToolResult) -> Option<Value> {
    if result.is_error == Some(true) {
        return None;
    }
    let text = || match result.content.as_slice() {
        [ContentBlock::Text(text)] => Some(Value::from(text.text.as_str())),
        _ => None,
    };
    result.structured_content.clone().or_else(|| only_json(result)).or_else(text)
}
