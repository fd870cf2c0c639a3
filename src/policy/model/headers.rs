//! The headers of model calls that are forwarded, as lists.
//!
//! Guarantees: a header that is not in a list is not forwarded, in either direction. The lists contain no headers for credentials.
//! Non-goals: the credential itself, which the gateway adds.

use super::{
    members::Terms,
    table::{
        Capability::{
            Advisor, CodeExecution, Compaction, Fallbacks, Files, Mcp, Stored, ToolSearch, WebFetch, WebSearch,
        },
        Fate::{self, Named, Passes, Refused},
        Of::Plain,
        Row, row,
    },
};
use crate::policy::config::UnknownMembers;

/// Headers that are forwarded, and their purpose.
#[derive(Clone, Copy, Debug)]
pub struct Listed {
    /// The names, separated by spaces, or prefixes with `*`.
    pub names: &'static str,
    /// The purpose of the headers.
    pub says: &'static str,
}

const fn listed(names: &'static str, says: &'static str) -> Listed {
    Listed { names, says }
}

/// Headers of the agent's request that are forwarded to the provider.
pub static REQUEST: &[Listed] = &[
    listed("accept user-agent", "the accepted form of the reply, and the client"),
    listed("anthropic-version openai-version", "the version of the API"),
    listed("anthropic-beta openai-beta", "parts of the API that are new: those that are listed below"),
    listed("idempotency-key", "marks a retry of the same call"),
    listed("x-stainless-*", "what client libraries report about themselves"),
    listed("traceparent tracestate", "the trace that the call is part of"),
    listed("x-client-request-id x-request-id", "the call's name in the provider's logs"),
    listed(
        "originator version session_id session-id conversation_id x-codex-* x-app x-title http-referer",
        "the client program, and its session",
    ),
];

/// Headers of the provider's reply that are forwarded to the agent.
pub static REPLY: &[Listed] = &[
    listed("content-type content-length content-encoding date", "what the reply is"),
    listed("retry-after retry-after-ms x-should-retry", "when to try again"),
    listed("request-id x-request-id x-client-request-id", "the call's name in the provider's logs"),
    listed(
        "openai-* anthropic-* x-ratelimit-* ratelimit-*",
        "the provider's own: the model, the time, and the rest of its limits",
    ),
    listed("server-timing", "how long it took"),
    listed("belay-rule", "Belay's own: the rule of a denial"),
];

/// Returns whether a list contains a header. Names are in lower case.
pub fn has(list: &[Listed], name: &str) -> bool {
    list.iter().flat_map(|one| one.names.split_ascii_whitespace()).any(|known| match known.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => known == name,
    })
}

const fn beta(names: &'static str, fate: Fate) -> Row {
    Row { names, fate }
}

/// Values of `anthropic-beta` and `openai-beta`. The tables check the members that a beta enables. A beta for something that a pack has to
/// allow by name is removed unless the pack allows it. A beta that is not listed is removed unless the pack lets unknown members pass.
pub static BETAS: &[Row] = &[
    beta(
        "computer-use-* output-* dev-full-thinking-* interleaved-thinking-* context-1m-* context-management-* model-context-window-exceeded-* \
         fast-mode-* thinking-* prompt-caching-* pdfs-* token-counting-* token-efficient-tools-* extended-cache-ttl-* structured-outputs-* \
         task-budgets-* mid-conversation-* inline-tools-* effort-* fine-grained-tool-streaming-* tool-examples-* advanced-tool-use-* \
         claude-code-* adaptive-thinking-* redact-thinking-* responses=*",
        Passes(Plain),
    ),
    beta("mcp-*", Named(Mcp, "the provider calls its tools")),
    beta("web-search-*", Named(WebSearch, "the provider searches")),
    beta("web-fetch-*", Named(WebFetch, "the provider fetches")),
    beta("code-execution-* skills-*", Named(CodeExecution, "the provider runs code")),
    beta("files-api-*", Named(Files, "the provider reads files that it stores")),
    beta("tool-search-tool-*", Named(ToolSearch, "the provider searches the tools")),
    beta("advisor-tool-*", Named(Advisor, "the provider calls another model")),
    beta("server-side-fallback-* fallback-credit-*", Named(Fallbacks, "another model answers")),
    beta("compact-*", Named(Compaction, "the provider shortens the conversation")),
    beta(
        "message-threads-* cache-diagnosis-* agent-memory-*",
        Named(Stored, "the provider continues from calls that it stored"),
    ),
    beta(
        "user-profiles-* managed-agents-* dreaming-* spend-limit-reads-* telemetry-destinations-* webhooks-* admin-* analytics-* \
         experimental-* message-batches-* ce-* efs-* google-managed-*",
        Refused("it is for endpoints that Belay does not serve, or for the account that pays"),
    ),
];

/// Returns the part of a request's header that is forwarded to the provider, if any.
pub fn passed(name: &str, value: &[u8], terms: Terms<'_>) -> Option<Vec<u8>> {
    if !has(REQUEST, name) {
        return None;
    }
    if !name.ends_with("-beta") {
        return Some(value.to_vec());
    }
    betas(std::str::from_utf8(value).ok()?, terms).map(String::into_bytes)
}

/// Returns the part of the value of a beta header that is forwarded, if any.
pub fn betas(value: &str, terms: Terms<'_>) -> Option<String> {
    let passes = |beta: &&str| match row(BETAS, beta).map(|row| row.fate) {
        Some(Fate::Passes(_) | Fate::Bounded(..)) => true,
        Some(Fate::Named(capability, _)) => terms.allows(capability),
        Some(Fate::Refused(_)) => false,
        None => terms.unknown == UnknownMembers::Pass,
    };
    let passing: Vec<_> = value.split(',').map(str::trim).filter(passes).collect();
    (!passing.is_empty()).then(|| passing.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_and_accounts_are_in_no_list() {
        for name in [
            "authorization",
            "x-api-key",
            "api-key",
            "x-goog-api-key",
            "cookie",
            "set-cookie",
            "proxy-authorization",
            "openai-organization",
            "openai-project",
            "x-http-method-override",
            "x-forwarded-for",
            "host",
            "content-length",
            "transfer-encoding",
            "anthropic-workspace-id",
            "belay-intent",
            "belay-target",
        ] {
            assert!(!has(REQUEST, name), "{name}");
        }
        for name in ["set-cookie", "set-cookie2", "www-authenticate", "connection", "transfer-encoding", "alt-svc"] {
            assert!(!has(REPLY, name), "{name}");
        }
        for name in ["anthropic-version", "x-stainless-lang", "idempotency-key", "traceparent"] {
            assert!(has(REQUEST, name), "{name}");
        }
    }

    #[test]
    fn betas_pass_by_what_they_make_a_provider_do() {
        let value = "computer-use-2025-01-24, mcp-client-2025-04-04,web-fetch-2025-09-10,brand-new-2027-01-01,user-profiles-2026-03-24";
        assert_eq!(betas(value, Terms::default()).as_deref(), Some("computer-use-2025-01-24"));
        let terms = Terms { allow: &[Mcp], unknown: UnknownMembers::Pass, ..Terms::default() };
        let expected = "computer-use-2025-01-24,mcp-client-2025-04-04,brand-new-2027-01-01";
        assert_eq!(betas(value, terms).as_deref(), Some(expected));
        assert_eq!(betas("mcp-client-2025-04-04", Terms::default()), None);
    }
}
