//! The error response to a request: HTTP status, rule and reason.

use http::StatusCode;

use crate::policy::{egress::EgressDenied, rule::Rule};

/// Why a request was not served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule}: {reason}")]
pub struct Refused {
    /// The status: 403 for a denial, 502 for a failed upstream, 503 if a retry may help.
    pub status: StatusCode,
    /// The rule.
    pub rule: Rule,
    /// What was expected, what was found, and what to do. The caller gets it, so it never contains a credential.
    pub reason: String,
}

impl Refused {
    /// Returns a denial: the same request would be denied again.
    pub fn denied(rule: Rule, reason: impl Into<String>) -> Self {
        Self { status: StatusCode::FORBIDDEN, rule, reason: reason.into() }
    }

    /// Returns an error for a request that cannot be decided or recorded now: the same request may succeed later.
    pub fn retry(rule: Rule, reason: impl Into<String>) -> Self {
        Self { status: StatusCode::SERVICE_UNAVAILABLE, rule, reason: reason.into() }
    }

    /// Returns an error for an allowed request whose upstream failed.
    pub fn upstream(rule: Rule, reason: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_GATEWAY, rule, reason: reason.into() }
    }

    /// Returns an error for a malformed request.
    pub fn malformed(reason: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, rule: Rule::Request, reason: reason.into() }
    }

    /// Returns whether a retry may help.
    pub fn is_retryable(&self) -> bool {
        self.status == StatusCode::SERVICE_UNAVAILABLE
    }

    /// Returns the value of the metrics' label `decision`: `denied` or `failed`.
    pub fn decision(&self) -> &'static str {
        match self.status {
            StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE => "failed",
            _ => "denied",
        }
    }
}

impl From<EgressDenied> for Refused {
    fn from(denied: EgressDenied) -> Self {
        Self::denied(denied.rule, denied.reason)
    }
}
