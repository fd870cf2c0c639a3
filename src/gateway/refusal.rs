//! A refusal on its way to the caller: HTTP status, rule and reason.

use http::StatusCode;

use crate::policy::{egress::EgressDenied, rule::Rule};

/// Why a request was not served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule}: {reason}")]
pub struct Refused {
    /// How: decided against (403), failed on the way (502), or worth another try (503).
    pub status: StatusCode,
    /// The rule.
    pub rule: Rule,
    /// What was expected, what was found, what to do. Goes to the caller: no credential is ever in it.
    pub reason: String,
}

impl Refused {
    /// Decided against: the same request will be refused again.
    pub fn denied(rule: Rule, reason: impl Into<String>) -> Self {
        Self { status: StatusCode::FORBIDDEN, rule, reason: reason.into() }
    }

    /// Something that is needed to decide or to record is away: the same request may pass later.
    pub fn retry(rule: Rule, reason: impl Into<String>) -> Self {
        Self { status: StatusCode::SERVICE_UNAVAILABLE, rule, reason: reason.into() }
    }

    /// Allowed, but the upstream failed.
    pub fn upstream(rule: Rule, reason: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_GATEWAY, rule, reason: reason.into() }
    }

    /// Not a request that means anything.
    pub fn malformed(reason: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, rule: Rule::Request, reason: reason.into() }
    }

    /// Whether trying again may help.
    pub fn is_retryable(&self) -> bool {
        self.status == StatusCode::SERVICE_UNAVAILABLE
    }

    /// What it counts as in metrics: decided against, or failed.
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
