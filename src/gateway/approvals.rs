//! Approval of one exact call: requested here, and checked again before the call leaves.
//!
//! Guarantees: approvers see what is sent, except for what the contract redacts, because [`approved`] compares the call with the request's
//! arguments and digest. Each request is created once, under a name that follows from the call, whichever replica creates it. It is valid
//! until it expires. The witness ensures, by the log, that it is used once.
//!
//! Rejects: an approval by the principal or by the requester, and an ApprovalRequest that is not for this call.

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use kube::{Api, Client, Resource, ResourceExt, api::PostParams};
use serde_json::Value;
use tokio::sync::Semaphore;

use super::{
    authorize::Needed,
    cluster::Cluster,
    compiled::Compiled,
    identity::HarnessIdentity,
    refusal::Refused,
    witness::{Before, IntentFacts},
};
use crate::{
    apart,
    api::{AgentTask, ApprovalRequest, ApprovalRequestSpec, approval_request::ApprovalTask},
    canonical::{self, CanonicalError},
    policy::{
        access,
        approval::{self, ApprovalSource, ApprovalState, ApprovalTerms, CallKey, LONGEST_ARGUMENTS},
        commit::Salt,
        config::{Approval, PolicyConfig},
        json,
        rule::Rule,
    },
    render::{self, names},
    wire::{ApprovalAsk, ApprovalReply},
};

/// Maximum time that a reply is delayed while a request is pending.
const LONGEST_WAIT: Duration = Duration::from_secs(25);
/// Delay between two looks at the store, which a watch fills.
const STEP: Duration = Duration::from_millis(100);
/// Time limit for the API server.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Where ApprovalRequests are created.
pub trait Create: Send + Sync {
    /// Creates a request, or returns the existing one of that name.
    fn create(&self, namespace: String, request: ApprovalRequest) -> BoxFuture<'_, Result<ApprovalRequest, String>>;
}

impl Create for Client {
    fn create(&self, namespace: String, request: ApprovalRequest) -> BoxFuture<'_, Result<ApprovalRequest, String>> {
        let api = Api::<ApprovalRequest>::namespaced(self.clone(), &namespace);
        Box::pin(async move {
            match api.create(&PostParams::default(), &request).await {
                Err(kube::Error::Api(status)) if status.is_already_exists() => {
                    api.get(&request.name_any()).await.map_err(|e| e.to_string())
                }
                made => made.map_err(|e| e.to_string()),
            }
        })
    }
}

/// Requests approval of a call and returns the state of the request.
///
/// # Errors
/// Returns an error if the call needs no approval, or if the request cannot be created.
pub async fn ask(
    cluster: &Cluster,
    create: &dyn Create,
    compiled: &Arc<Compiled>,
    (principal, places): (&HarnessIdentity, &Arc<Semaphore>),
    (ask, salt): (&ApprovalAsk, &Salt),
    before: Before,
) -> Result<ApprovalReply, Refused> {
    let (call, approval, arguments) = asked_for(&compiled.policy, ask, salt)?;
    let reasons = if ask.by == ApprovalSource::Pack {
        // The pack's patterns and expressions look at all arguments, so do not evaluate them on the runtime's own threads.
        let (compiled, ask, arguments) = (compiled.clone(), ask.clone(), arguments.clone());
        let found = apart::judge(places, apart::LONGEST, move || reasons(&compiled, &ask, before, &arguments)).await;
        found.map_err(|unjudged| Refused::retry(Rule::Busy, unjudged.to_string()))??
    } else {
        vec![]
    };
    let HarnessIdentity { namespace, task, task_uid, .. } = principal;
    let name = approval::name(task, task_uid, &call, &reasons, before.made);
    let owner = cluster.task(namespace, task, task_uid).ok_or_else(|| {
        Refused::retry(Rule::ToolApproval, format!("the task {namespace}/{task} is not known yet; ask again"))
    })?;
    let wait = Duration::from_secs(u64::try_from(ask.wait).unwrap_or_default()).min(LONGEST_WAIT);
    let until = tokio::time::Instant::now() + wait;
    // A denial by an approver applies to the call, even if an earlier request had other reasons.
    let same = |other: &ApprovalRequest| {
        let spec = &other.spec;
        spec.requested_by == call.by
            && spec.tool == call.tool
            && spec.commitment == call.digest
            && spec.repeats == before.made
    };
    let mut others = cluster.approvals(namespace, task_uid);
    others.retain(|other| other.name_any() != name && same(other));
    // A request that was created here is known before the watch delivers it.
    let mut own: Option<Arc<ApprovalRequest>> = None;
    loop {
        let known = match cluster.approval(namespace, &name).or_else(|| own.clone()) {
            Some(known) => known,
            None => {
                let spec = spec(&compiled.policy, principal, &call, approval, &arguments, before.made, reasons.clone());
                let request = request(&owner, principal, &name, spec?);
                let created = tokio::time::timeout(TIMEOUT, create.create(namespace.clone(), request)).await;
                let failed = |e: String| {
                    Refused::retry(Rule::ToolApproval, format!("the ApprovalRequest cannot be created: {e}"))
                };
                let created = created.map_err(|_| failed("the API server does not answer".into()))?.map_err(failed)?;
                own.insert(Arc::new(created)).clone()
            }
        };
        let mut newest = others.iter().filter_map(|other| cluster.approval(namespace, &other.name_any()));
        let known = newest.find(|other| state(other, approval) == ApprovalState::Denied).unwrap_or(known);
        if !is_for(&known, &compiled.policy, &call, &arguments) {
            return Err(Refused::denied(
                Rule::ToolApproval,
                format!("expected ApprovalRequest {name} to be for this call, found one for another; delete it"),
            ));
        }
        let state = state(&known, approval);
        if state != ApprovalState::Pending || tokio::time::Instant::now() >= until {
            return Ok(ApprovalReply {
                name: known.name_any(),
                uid: known.uid().unwrap_or_default(),
                required: approval.required,
                expires: known.spec.expires_at.0.to_string(),
                reasons: known.spec.reasons.clone(),
                state,
                decisions: render::approval::votes(&known).to_vec(),
            });
        }
        tokio::time::sleep(STEP).await;
    }
}

/// Checks that a call has every approval that it needs: those that the gateway requires now and those that the intent names. Approvers must
/// have seen every reason for which the pack requires approval now. `find` returns a request by its name.
///
/// # Errors
/// Returns [`Rule::ToolApproval`] if an approval is missing. The error may be retried if a request is not known here yet.
pub fn approved(
    compiled: &Compiled,
    intent: &IntentFacts,
    arguments: &Value,
    needed: &Needed,
    find: impl Fn(&str) -> Option<Arc<ApprovalRequest>>,
) -> Result<(), Refused> {
    let denied = |reason: String| Err(Refused::denied(Rule::ToolApproval, reason));
    let mut given = Vec::new();
    for name in &intent.approvals {
        let Some(request) = find(name) else {
            return Err(Refused::retry(
                Rule::ToolApproval,
                format!("expected ApprovalRequest {name}, found none: it was deleted, or is not known here yet"),
            ));
        };
        let by = request.spec.requested_by;
        let Some(approval) = compiled.policy.approval(&intent.target, by) else {
            return denied(format!(
                "{} needs no approval for the {}, and its call names {name}",
                intent.target,
                by.as_str()
            ));
        };
        let call =
            CallKey { by, tool: intent.target.clone(), digest: intent.request_commitment.clone().unwrap_or_default() };
        if !is_for(&request, &compiled.policy, &call, arguments) {
            return denied(format!("expected ApprovalRequest {name} to be for this call, found one for another"));
        }
        match state(&request, approval) {
            ApprovalState::Approved => {
                let unseen = |reason: &&String| by == ApprovalSource::Pack && !request.spec.reasons.contains(reason);
                if let Some(reason) = needed.reasons.iter().find(unseen) {
                    return denied(format!(
                        "expected an ApprovalRequest that shows the reason {reason}, found {name}, which was created without it"
                    ));
                }
                given.push(by);
            }
            other => return denied(format!("expected ApprovalRequest {name} to be approved, found it {other:?}")),
        }
    }
    let by_contract = needed.by_contract.then_some(ApprovalSource::Contract);
    let by_pack = (!needed.reasons.is_empty()).then_some(ApprovalSource::Pack);
    match by_contract.into_iter().chain(by_pack).find(|by| !given.contains(by)) {
        None => Ok(()),
        Some(by) => denied(format!(
            "expected an intent of {} with the approval that the {} requires, found one without",
            intent.target,
            by.as_str()
        )),
    }
}

/// Returns the call to approve, its approval settings and its arguments, after checking that the arguments match their digest.
fn asked_for<'p>(
    policy: &'p PolicyConfig,
    ask: &ApprovalAsk,
    salt: &Salt,
) -> Result<(CallKey, &'p Approval, Value), Refused> {
    let denied = |reason: String| Refused::denied(Rule::ToolApproval, reason);
    let approval = policy.tool(&ask.tool).and_then(|_| policy.approval(&ask.tool, ask.by)).ok_or_else(|| {
        denied(format!("the {} requires no approval for calls of the tool {:?}", ask.by.as_str(), ask.tool))
    })?;
    if ask.arguments.len() > LONGEST_ARGUMENTS {
        return Err(denied(format!(
            "expected at most {LONGEST_ARGUMENTS} bytes of arguments, found {}",
            ask.arguments.len()
        )));
    }
    let value = json::parse(ask.arguments.as_bytes()).map_err(|e| denied(format!("the arguments: {e}")))?;
    let value = json::whole(value);
    let unwritable = |e: CanonicalError| denied(format!("the arguments: {e}"));
    let canonical = canonical::to_bytes(&value).map_err(unwritable)?;
    if canonical != ask.arguments.as_bytes() || salt.value(&value).map_err(unwritable)? != ask.request_commitment {
        return Err(denied("expected arguments in canonical form that match the given digest".into()));
    }
    Ok((CallKey { by: ask.by, tool: ask.tool.clone(), digest: ask.request_commitment.clone() }, approval, value))
}

/// Returns the reasons for which the pack requires approval, which approvers see.
fn reasons(compiled: &Compiled, ask: &ApprovalAsk, before: Before, arguments: &Value) -> Result<Vec<String>, Refused> {
    let Some(tool) = compiled.policy.tool(&ask.tool) else { return Ok(vec![]) };
    let side_effect = ask.side_effect.max(tool.side_effect);
    let asked = access::AccessRequest { tool, side_effect, usage: before.usage, seen: before.seen };
    let passed = compiled.guard.judge(asked, arguments);
    let reasons = passed.map_err(|denial| Refused::denied(denial.rule, denial.reason))?.reasons;
    if reasons.is_empty() {
        let reason = format!("the pack requires no approval for this call of {}, as the log is now", ask.tool);
        return Err(Refused::denied(Rule::ToolApproval, reason));
    }
    Ok(reasons)
}

fn spec(
    policy: &PolicyConfig,
    principal: &HarnessIdentity,
    call: &CallKey,
    approval: &Approval,
    arguments: &Value,
    repeats: i64,
    reasons: Vec<String>,
) -> Result<ApprovalRequestSpec, Refused> {
    let expires = Timestamp::now().checked_add(SignedDuration::from_secs(approval.timeout_seconds));
    let HarnessIdentity { task, task_uid, attempt, .. } = principal;
    Ok(ApprovalRequestSpec {
        task: ApprovalTask { name: task.clone(), uid: task_uid.clone(), attempt: *attempt },
        principal: policy.task.principal.clone(),
        requester: policy.task.requester.clone(),
        requested_by: call.by,
        reasons,
        tool: call.tool.clone(),
        arguments: shown(policy, &call.tool, arguments).map_err(|e| Refused::denied(Rule::ToolApproval, e))?,
        commitment: call.digest.clone(),
        repeats,
        approvers: approval.approvers.clone(),
        required: approval.required,
        expires_at: Time(expires.unwrap_or(Timestamp::MIN)),
    })
}

fn request(owner: &AgentTask, principal: &HarnessIdentity, name: &str, spec: ApprovalRequestSpec) -> ApprovalRequest {
    let mut request = ApprovalRequest::new(name, spec);
    request.metadata.labels = Some(
        [(names::TASK, &principal.task), (names::TASK_UID, &principal.task_uid)]
            .map(|(key, value)| (key.to_owned(), value.clone()))
            .into(),
    );
    // The request is deleted with its task. The evidence holds the decision.
    request.metadata.owner_references = Some(vec![OwnerReference {
        api_version: AgentTask::api_version(&()).into_owned(),
        kind: AgentTask::kind(&()).into_owned(),
        name: owner.name_any(),
        uid: principal.task_uid.clone(),
        ..OwnerReference::default()
    }]);
    request
}

/// Returns a call's arguments as approvers see them: RFC 8785 JSON without what the contract redacts.
fn shown(policy: &PolicyConfig, tool: &str, arguments: &Value) -> Result<String, String> {
    let redact = policy.tool(tool).map_or(&[][..], |tool| &tool.redact);
    let text = canonical::to_bytes(&approval::redacted(arguments, redact)).map_err(|e| e.to_string())?;
    if text.len() > LONGEST_ARGUMENTS {
        return Err(format!("expected at most {LONGEST_ARGUMENTS} bytes of arguments, found {}", text.len()));
    }
    String::from_utf8(text).map_err(|e| e.to_string())
}

/// Checks that a request is this task's, for this call, and shows its arguments.
fn is_for(request: &ApprovalRequest, policy: &PolicyConfig, call: &CallKey, arguments: &Value) -> bool {
    let spec = &request.spec;
    spec.task.uid == policy.task.uid
        && spec.principal == policy.task.principal
        && spec.requester == policy.task.requester
        && spec.requested_by == call.by
        && spec.tool == call.tool
        && spec.commitment == call.digest
        && shown(policy, &call.tool, arguments).as_ref() == Ok(&spec.arguments)
}

/// Returns the state of a request now. The number of approvals is at least what contract or pack require now.
fn state(request: &ApprovalRequest, approval: &Approval) -> ApprovalState {
    let asked = render::approval::asked(&request.spec);
    let asked = ApprovalTerms { required: approval.required.max(asked.required), ..asked };
    approval::state(&asked, render::approval::votes(request), Timestamp::now())
}
