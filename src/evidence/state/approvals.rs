//! Approvals: which records about them may follow, and what follows from the decisions.

use std::sync::Arc;

use jiff::Timestamp;

use super::{Findings, LogRule, TaskState};
use crate::{
    evidence::{fits, record::Approval},
    policy::approval::{self, ApprovalState},
};

impl TaskState {
    /// Checks that a record about an approval fits earlier records, the policy, and the decisions that it lists.
    pub(super) fn check_approval(&self, approval: &Approval, found: &mut Findings<'_>) {
        let fits = self.approvals.fits(&approval.name, &approval.call(), approval.state);
        found.expect_ok(LogRule::ApprovalRequest, fits);
        let expires = fits::expiry(&approval.expires);
        found.expect(LogRule::ApprovalTime, expires.is_some(), || {
            format!("expected an RFC 3339 time of expiry, found {:?}", approval.expires)
        });
        found.expect_ok(LogRule::ApprovalVotes, self.voted(approval, expires.unwrap_or(Timestamp::MAX)));
    }

    fn voted(&self, approval: &Approval, expires: Timestamp) -> Result<(), String> {
        let Approval { name, requested_by: by, tool, state, decisions, .. } = approval;
        let Some(policy) = self.config() else { return Ok(()) };
        let Some(needs) = policy.tool(tool).and_then(|_| policy.approval(tool, *by)) else {
            return Err(format!("expected a tool for which the {} requires approval, found {tool}", by.as_str()));
        };
        if approval.required != needs.required {
            let (expected, found) = (needs.required, approval.required);
            return Err(format!("expected {expected} required approvals, found {found}"));
        }
        let barred = [Some(policy.task.principal.as_str()), policy.task.requester.as_deref()];
        let asked = approval::ApprovalTerms { required: needs.required, barred, expires };
        // Only the gateway's clock can say whether a request has expired. This is the state by the decisions alone.
        let voted = approval::state(&asked, decisions, Timestamp::MIN);
        if *state != voted && !(*state == ApprovalState::Expired && voted != ApprovalState::Denied) {
            return Err(format!("expected approval {name} to be {voted:?} by its decisions, found it {state:?}"));
        }
        Ok(())
    }

    pub(super) fn apply_approval(&mut self, approval: &Approval) {
        // A record that does not fit changes nothing.
        let _ = Arc::make_mut(&mut self.approvals).seen(&approval.name, &approval.call(), approval.state);
    }
}
