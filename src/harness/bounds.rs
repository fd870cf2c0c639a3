//! Limits on the time and the bytes of a tool call, whatever its upstream speaks.

use std::time::Duration;

use crate::policy::{config::Tool, decide::Denial, rule::Rule};

/// The timeout of a tool whose contract has none.
const TOOL_REPLY: Duration = Duration::from_secs(120);
/// The longest reply that is read, in bytes.
pub const LONGEST_REPLY: usize = 16 << 20;

/// The limits of one call.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The upstream's timeout.
    pub time: Duration,
    /// The longest reply that is read, in bytes.
    pub reply: usize,
}

impl Bounds {
    /// Returns the contract's limits, or the defaults for those that it does not set.
    pub fn of(tool: &Tool) -> Self {
        let time = tool.limits.timeout_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let reply = tool.limits.response_bytes.and_then(|bytes| usize::try_from(bytes).ok());
        Self {
            time: time.map_or(TOOL_REPLY, Duration::from_secs),
            reply: reply.unwrap_or(LONGEST_REPLY).min(LONGEST_REPLY),
        }
    }

    /// Returns the denial of a reply that is too long.
    pub fn too_long(&self, tool: &Tool) -> Denial {
        let reason =
            format!("the reply of {} is longer than the limit of {} bytes; request less", tool.name, self.reply);
        Denial { rule: Rule::ToolResponseBytes, reason }
    }
}

/// Returns the denial for an upstream that did not reply in the contract's time. `made` says whether the call itself was sent.
pub fn late(tool: &Tool, time: Duration, made: bool) -> Denial {
    let reason = match made {
        true => "it is unknown whether the call took effect: check before you make it again",
        false => "Belay did not make the call",
    };
    Denial { rule: Rule::ToolTimeout, reason: format!("{} did not answer within {time:?}; {reason}", tool.name) }
}
