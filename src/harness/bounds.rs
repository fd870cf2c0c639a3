//! What a tool call may take, of time and of bytes, whatever its upstream speaks.

use std::time::Duration;

use crate::policy::{config::Tool, decide::Denial, rule::Rule};

/// How long a tool may take whose contract does not say.
const TOOL_REPLY: Duration = Duration::from_secs(120);
/// Longest reply that is read.
pub const LONGEST_REPLY: usize = 16 << 20;

/// What a call may take.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// How long the upstream may take.
    pub time: Duration,
    /// Longest reply that is read.
    pub reply: usize,
}

impl Bounds {
    /// What the contract says, and ours where it says nothing.
    pub fn of(tool: &Tool) -> Self {
        let time = tool.limits.timeout_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let reply = tool.limits.response_bytes.and_then(|bytes| usize::try_from(bytes).ok());
        Self {
            time: time.map_or(TOOL_REPLY, Duration::from_secs),
            reply: reply.unwrap_or(LONGEST_REPLY).min(LONGEST_REPLY),
        }
    }

    /// A reply that is longer than it may be.
    pub fn too_long(&self, tool: &Tool) -> Denial {
        let reason =
            format!("the reply of {} is longer than the {} bytes that are taken; ask for less", tool.name, self.reply);
        Denial { rule: Rule::ToolResponseBytes, reason }
    }
}

/// An upstream that did not answer in the contract's time. `made`: whether the call itself had gone out.
pub fn late(tool: &Tool, time: Duration, made: bool) -> Denial {
    let reason = match made {
        true => "whether the call took effect is not known: look before it is made again",
        false => "the call was not made",
    };
    Denial { rule: Rule::ToolTimeout, reason: format!("{} did not answer within {time:?}; {reason}", tool.name) }
}
