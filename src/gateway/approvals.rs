//! People's approval of one exact call: asked for, and looked at again before the call leaves.
//!
//! Promises: what people see is what is sent ([`approved`] compares the call with the request's own arguments); a request is made once,
//! under a name that follows from the call, whichever replicas are asked; it is good until it expires. That it is used once is the
//! log's to say (the witness). Refuses: counting a vote of the principal or the requester, and a request that somebody else made up.

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use kube::{Api, Client, Resource, ResourceExt, api::PostParams};
use serde_json::Value;

use super::{
    cluster::{Cluster, Compiled, TASK_LABEL, TASK_UID_LABEL},
    identity::Principal,
    refusal::Refused,
    witness::IntentFacts,
};
use crate::{
    api::{AgentTask, ApprovalRequest, ApprovalRequestSpec, approval_request::ApprovalTask},
    canonical, plan,
    policy::{
        approval::{self, Asked, LONGEST_ARGUMENTS, Standing},
        config::{Approval, PolicyConfig, Tool},
        json,
        rule::Rule,
    },
    wire::{ApprovalAsk, ApprovalReply},
};

/// Longest that a question is held.
const LONGEST_WAIT: Duration = Duration::from_secs(25);
/// Between two looks at the store, which a watch fills.
const STEP: Duration = Duration::from_millis(100);
/// How long the API server may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Where requests are made.
pub trait Create: Send + Sync {
    /// Makes one; where there is one of that name, gives that.
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

/// Where the approval of a call stands, once it was asked for. `made`: how many calls like it were made by an approval before.
///
/// # Errors
/// If the call is none that people approve, or nobody can be asked.
pub async fn ask(
    cluster: &Cluster,
    create: &dyn Create,
    compiled: &Compiled,
    principal: &Principal,
    ask: &ApprovalAsk,
    made: i64,
) -> Result<ApprovalReply, Refused> {
    let (tool, contract) = asked_for(&compiled.policy, ask)?;
    let Principal { namespace, task, task_uid, .. } = principal;
    let name = approval::name(task, task_uid, &tool.name, &ask.request_digest, made);
    let owner = cluster.task(namespace, task, task_uid).ok_or_else(|| {
        Refused::retry(Rule::ToolApproval, format!("the task {namespace}/{task} is not known yet; ask again"))
    })?;
    let wait = Duration::from_secs(u64::try_from(ask.wait).unwrap_or_default()).min(LONGEST_WAIT);
    let until = tokio::time::Instant::now() + wait;
    // What was made here is known before the watch brings it.
    let mut own: Option<Arc<ApprovalRequest>> = None;
    loop {
        let known = match cluster.approval(namespace, &name).or_else(|| own.clone()) {
            Some(known) => known,
            None => {
                let request = request(&compiled.policy, &owner, principal, &name, contract, ask, made);
                let created = tokio::time::timeout(TIMEOUT, create.create(namespace.clone(), request)).await;
                let failed = |e: String| Refused::retry(Rule::ToolApproval, format!("people cannot be asked: {e}"));
                let created = created.map_err(|_| failed("the API server does not answer".into()))?.map_err(failed)?;
                own.insert(Arc::new(created)).clone()
            }
        };
        if !is_for(&known, &compiled.policy, &tool.name, &ask.request_digest) || known.spec.arguments != ask.arguments {
            return Err(Refused::denied(
                Rule::ToolApproval,
                format!("expected ApprovalRequest {name} to be for this call, found one for another; delete it"),
            ));
        }
        let standing = standing(&known, contract);
        if standing != Standing::Pending || tokio::time::Instant::now() >= until {
            return Ok(ApprovalReply {
                name,
                uid: known.uid().unwrap_or_default(),
                required: contract.required,
                expires: known.spec.expires_at.0.to_string(),
                standing,
                decisions: plan::approval::votes(&known).to_vec(),
            });
        }
        tokio::time::sleep(STEP).await;
    }
}

/// Whether an intent's call was approved, where its contract asks for that. Gives the arguments that people saw.
///
/// # Errors
/// [`Rule::ToolApproval`] if it was not.
pub fn approved(
    compiled: &Compiled,
    intent: &IntentFacts,
    request: Option<&ApprovalRequest>,
) -> Result<Option<Value>, Refused> {
    let denied = |reason: String| Err(Refused::denied(Rule::ToolApproval, reason));
    let contract = compiled.policy.tool(&intent.target).and_then(|tool| tool.approval.as_ref());
    let (contract, name) = match (contract, &intent.approval) {
        (None, None) => return Ok(None),
        // With a condition, whether people had to be asked was the harness's to decide: it has what the condition looks at.
        (Some(Approval { when: Some(_), .. }), None) => return Ok(None),
        (Some(Approval { when: None, .. }), None) => {
            return denied(format!("expected an intent of {} by an approval, found one without", intent.target));
        }
        (None, Some(name)) => return denied(format!("{} needs no approval, and was given {name}", intent.target)),
        (Some(contract), Some(name)) => (contract, name),
    };
    let Some(request) = request else {
        return denied(format!(
            "expected ApprovalRequest {name}, found none: it was deleted, or is not known here yet"
        ));
    };
    let digest = intent.request_digest.as_deref().unwrap_or_default();
    if !is_for(request, &compiled.policy, &intent.target, digest) {
        return denied(format!("expected ApprovalRequest {name} to be for this call, found one for another"));
    }
    match standing(request, contract) {
        Standing::Approved => json::parse(request.spec.arguments.as_bytes())
            .map(Some)
            .map_err(|e| Refused::denied(Rule::ToolApproval, e.to_string())),
        other => denied(format!("expected ApprovalRequest {name} to be approved, found it {other:?}")),
    }
}

/// The tool that is asked for, if people approve it and the arguments are what they are said to be.
fn asked_for<'p>(policy: &'p PolicyConfig, ask: &ApprovalAsk) -> Result<(&'p Tool, &'p Approval), Refused> {
    let denied = |reason: String| Refused::denied(Rule::ToolApproval, reason);
    let (tool, contract) = policy
        .tool(&ask.tool)
        .and_then(|tool| Some((tool, tool.approval.as_ref()?)))
        .ok_or_else(|| denied(format!("no contract of the task asks people about the tool {:?}", ask.tool)))?;
    if ask.arguments.len() > LONGEST_ARGUMENTS {
        return Err(denied(format!(
            "expected at most {LONGEST_ARGUMENTS} bytes of arguments, found {}",
            ask.arguments.len()
        )));
    }
    let value = json::parse(ask.arguments.as_bytes()).map_err(|e| denied(format!("the arguments: {e}")))?;
    let canonical = canonical::to_bytes(&value).map_err(|e| denied(format!("the arguments: {e}")))?;
    if canonical != ask.arguments.as_bytes() || hex::encode(canonical::sha256(&canonical)) != ask.request_digest {
        return Err(denied("expected arguments in canonical form, of the digest that is named".into()));
    }
    Ok((tool, contract))
}

fn request(
    policy: &PolicyConfig,
    owner: &AgentTask,
    principal: &Principal,
    name: &str,
    contract: &Approval,
    ask: &ApprovalAsk,
    made: i64,
) -> ApprovalRequest {
    let expires = Timestamp::now().checked_add(SignedDuration::from_secs(contract.timeout_seconds));
    let mut request = ApprovalRequest::new(
        name,
        ApprovalRequestSpec {
            task: ApprovalTask {
                name: principal.task.clone(),
                uid: principal.task_uid.clone(),
                attempt: principal.attempt,
            },
            principal: policy.task.principal.clone(),
            requester: policy.task.requester.clone(),
            tool: ask.tool.clone(),
            arguments: ask.arguments.clone(),
            digest: ask.request_digest.clone(),
            repeats: made,
            approvers: contract.approvers.clone(),
            required: contract.required,
            expires_at: Time(expires.unwrap_or(Timestamp::MIN)),
        },
    );
    request.metadata.labels = Some(
        [(TASK_LABEL, &principal.task), (TASK_UID_LABEL, &principal.task_uid)]
            .map(|(key, value)| (key.to_owned(), value.clone()))
            .into(),
    );
    // Goes with its task; what was decided is in the evidence.
    request.metadata.owner_references = Some(vec![OwnerReference {
        api_version: AgentTask::api_version(&()).into_owned(),
        kind: AgentTask::kind(&()).into_owned(),
        name: owner.name_any(),
        uid: principal.task_uid.clone(),
        ..OwnerReference::default()
    }]);
    request
}

/// Whether a request is this task's for such a call.
fn is_for(request: &ApprovalRequest, policy: &PolicyConfig, tool: &str, digest: &str) -> bool {
    let spec = &request.spec;
    spec.task.uid == policy.task.uid
        && spec.principal == policy.task.principal
        && spec.requester == policy.task.requester
        && spec.tool == tool
        && spec.digest == digest
        && hex::encode(canonical::sha256(spec.arguments.as_bytes())) == digest
}

/// Where it stands now, by the contract as it is now.
fn standing(request: &ApprovalRequest, contract: &Approval) -> Standing {
    let asked = plan::approval::asked(&request.spec);
    let asked = Asked { required: contract.required.max(asked.required), ..asked };
    approval::standing(&asked, plan::approval::votes(request), Timestamp::now())
}
