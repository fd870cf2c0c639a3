//! The plan of a rollback, which the first record of the rollback's log names. Data types only.

use serde::{Deserialize, Serialize};

/// The plan of a rollback.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// The origin of the log of the task that is rolled back.
    pub origin: String,
    /// The number of records in that log, which has ended.
    pub size: u64,
    /// The root of that log, base64.
    pub root: String,
    /// The calls in that log that may have changed something, newest first.
    pub steps: Vec<Step>,
}

/// One call to compensate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// The call, by its name in the other log.
    pub call: String,
    /// The tool of the call.
    pub tool: String,
    /// How the call is compensated.
    pub by: By,
}

/// How a call is compensated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum By {
    /// By a compensation.
    Call(Undo),
    /// By manual action. The text gives the reason or the instructions.
    People(String),
}

/// A compensation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Undo {
    /// The name of its ToolContract.
    pub contract: String,
    /// The commitment to its arguments, hex.
    pub request_commitment: String,
    /// Until when it may be made, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
}
