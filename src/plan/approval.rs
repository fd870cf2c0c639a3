//! ApprovalRequests as plain data, for whoever has to know where one stands.

use crate::{
    api::{ApprovalRequest, ApprovalRequestSpec},
    policy::approval::{Asked, Vote},
};

/// What was asked, as far as its standing goes.
pub fn asked(spec: &ApprovalRequestSpec) -> Asked<'_> {
    let barred = [Some(spec.principal.as_str()), spec.requester.as_deref()];
    Asked { required: spec.required, barred, expires: spec.expires_at.0 }
}

/// What people have said.
pub fn votes(request: &ApprovalRequest) -> &[Vote] {
    request.status.as_ref().map_or(&[], |status| &status.decisions)
}
