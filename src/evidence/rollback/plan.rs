//! What is to be undone, as the log of a rollback says it first. Data and nothing else.

use serde::{Deserialize, Serialize};

/// What is to be undone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// The origin line of the log of the task that is undone.
    pub origin: String,
    /// Records in it. It has ended.
    pub size: u64,
    /// Its root, base64.
    pub root: String,
    /// Its calls that may have changed something, newest first.
    pub steps: Vec<Step>,
}

/// One call to undo.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// The call, by its name in that log.
    pub call: String,
    /// Its tool.
    pub tool: String,
    /// What undoes it.
    pub by: By,
}

/// What undoes a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum By {
    /// Another call.
    Call(Undo),
    /// People, for the reason or by the instructions that this text gives.
    People(String),
}

/// A call that undoes another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Undo {
    /// Name of its ToolContract.
    pub contract: String,
    /// SHA-256 of its arguments in canonical form, hex.
    pub request_digest: String,
    /// Until when it may be made, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
}
