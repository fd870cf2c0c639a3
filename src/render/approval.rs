//! Checks and renders the approvals of manifests, and reads ApprovalRequests as plain data.

use super::{Finding, condition};
use crate::{
    api::{ApprovalRequest, ApprovalRequestSpec, tool_contract},
    policy::{
        approval::{ApprovalTerms, Vote},
        config::Approval,
    },
};

/// Renders who must approve. The bounds are checked again, because contracts do not always come from an API server.
pub fn render(
    approval: &tool_contract::Approval,
    at: &impl Fn(&str) -> String,
    findings: &mut Vec<Finding>,
) -> Approval {
    if let Some(Err(error)) = approval.when.as_deref().map(condition::check) {
        findings.push(Finding::new(
            at("approval.when"),
            format!("a CEL expression over {}", condition::VARIABLES.join(", ")),
            error.to_string(),
            "correct the expression",
        ));
    }
    if approval.approvers.users.is_empty() && approval.approvers.groups.is_empty() {
        findings.push(Finding::new(
            at("approval.approvers"),
            "at least one user or group that may decide",
            "none",
            "name those who may approve",
        ));
    }
    let bounds = [
        ("required", approval.required, 1, 16),
        ("timeoutSeconds", approval.timeout_seconds, 5, 604_800),
        ("holdSeconds", approval.hold_seconds, 0, 3_600),
    ];
    for (field, found, least, most) in bounds {
        if !(least..=most).contains(&found) {
            let (expected, found) = (format!("{least} to {most}"), found.to_string());
            findings.push(Finding::new(at(&format!("approval.{field}")), expected, found, "correct it"));
        }
    }
    Approval {
        when: approval.when.clone(),
        approvers: approval.approvers.clone(),
        required: approval.required,
        timeout_seconds: approval.timeout_seconds,
        on_timeout: approval.on_timeout,
        hold_seconds: approval.hold_seconds,
    }
}

/// Returns the part of the request that its state depends on.
pub fn asked(spec: &ApprovalRequestSpec) -> ApprovalTerms<'_> {
    let barred = [Some(spec.principal.as_str()), spec.requester.as_deref()];
    ApprovalTerms { required: spec.required, barred, expires: spec.expires_at.0 }
}

/// Returns the decisions of the approvers.
pub fn votes(request: &ApprovalRequest) -> &[Vote] {
    request.status.as_ref().map_or(&[], |status| &status.decisions)
}
