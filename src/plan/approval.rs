//! What manifests say of approvals, checked and rendered, and ApprovalRequests as plain data, for whoever has to know where one stands.

use super::{Finding, condition};
use crate::{
    api::{ApprovalRequest, ApprovalRequestSpec, tool_contract},
    policy::{
        approval::{Asked, Vote},
        config::Approval,
    },
};

/// Who must say yes. Bounds are asked again: rendered contracts may come from elsewhere than an API server.
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

/// What was asked, as far as its standing goes.
pub fn asked(spec: &ApprovalRequestSpec) -> Asked<'_> {
    let barred = [Some(spec.principal.as_str()), spec.requester.as_deref()];
    Asked { required: spec.required, barred, expires: spec.expires_at.0 }
}

/// What people have said.
pub fn votes(request: &ApprovalRequest) -> &[Vote] {
    request.status.as_ref().map_or(&[], |status| &status.decisions)
}
