//! What of a request may leave. One whose cost or effect cannot be bounded from its own bytes is refused: state kept at the provider, tools
//! that run at the provider, files by reference.

use serde_json::{Map, Value};

use super::{api::Api, request::Unbounded};

/// # Errors
/// Which member is refused, why, and what to do.
pub(super) fn review(api: Api, body: &Map<String, Value>) -> Result<(), Unbounded> {
    let set = |field: &str| body.get(field).is_some_and(|value| !value.is_null() && *value != Value::Bool(false));
    for (field, why) in [
        ("previous_response_id", "its prompt lies at the provider; send the whole conversation"),
        ("conversation", "its prompt lies at the provider; send the whole conversation"),
        ("prompt", "its prompt lies at the provider; send the whole conversation"),
        ("background", "its reply would not pass here; wait for it instead"),
        ("mcp_servers", "its tools would be called by the provider, past their contracts; use BELAY_MCP_URL"),
        ("container", "its code would run at the provider, outside the sandbox"),
        ("web_search_options", "the search would be made by the provider, past any contract"),
        ("prediction", "rejected predictions are charged beyond the output limit"),
    ] {
        if set(field) {
            return Err(Unbounded(format!("`{field}` is refused: {why}")));
        }
    }
    let Some(tools) = body.get("tools").and_then(Value::as_array) else { return Ok(()) };
    for tool in tools {
        let kind = tool.get("type").and_then(Value::as_str);
        let runs_here = match api {
            Api::ChatCompletions | Api::Responses => matches!(kind, Some("function" | "custom")),
            Api::Messages => matches!(kind, None | Some("custom")),
        };
        if !runs_here {
            return Err(Unbounded(format!(
                "`tools` has one of type {:?}, which the provider would run itself, past its contract; offer it as a function",
                kind.unwrap_or("(none)")
            )));
        }
    }
    Ok(())
}
