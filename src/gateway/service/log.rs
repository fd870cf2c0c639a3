//! The requests about a task's log: open, append and seal, and the request for an approval, which goes by the log.
//!
//! Guarantees: records of what happened are accepted even while no policy can be compiled. Only a new attempt, and a request for approval,
//! need one. The usage in the task's status follows the log.
//!
//! Non-goals: the checks of a log's content ([`witness`](crate::gateway::witness)) and of an approval
//! ([`approvals`](crate::gateway::approvals)).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::Request;
use hyper::body::Incoming;

use super::{Asked, Gateway, Parts, Served, json, reply};
use crate::{
    evidence::store::{Location, log_prefix},
    gateway::{approvals, compiled::Compiled, identity::HarnessIdentity, refusal::Refused, witness::LogLocation},
    policy::approval::CallKey,
    wire::{AppendRequest, ApprovalAsk, OpenRequest, SealRequest},
};

/// Maximum bytes of an open request, which has two fields.
const LARGEST_OPEN: usize = 16 << 10;
/// Maximum bytes of an append request: a segment with records of many calls, or with a whole policy.
const LARGEST_APPEND: usize = 8 << 20;
/// Maximum bytes of a request for approval: the arguments, escaped as JSON.
const LARGEST_QUESTION: usize = 512 << 10;
/// Maximum bytes of a request to seal.
const LARGEST_SEAL: usize = 64 << 10;
/// How long the gateway waits for its stores to catch up with the operator, which creates an attempt right after rendering its policy.
const LAG: Duration = Duration::from_secs(2);
/// Delay between two looks at the stores.
const LAG_STEP: Duration = Duration::from_millis(100);

impl Gateway {
    pub(super) async fn open(&self, request: Request<Incoming>, asked: Asked) -> Served {
        let Asked { principal, .. } = asked;
        let _share = self.quotas.permit(&principal, |share| &share.log)?;
        let body: OpenRequest = json(request, LARGEST_OPEN).await?;
        let compiled = self.compiled_as(&principal, &body.policy_digest).await?;
        let (place, of) = (compiled.place(), compiled.rollback_target_log());
        let kept = (self.parts.state.salt(&compiled.salt()).await?, compiled.results().is_some());
        reply(&self.parts.witness.open(&place, &principal, &body, &compiled.digest, of.as_ref(), kept).await?)
    }

    /// Returns the compiled policy, after waiting up to [`LAG`] for it to have the digest of the harness's policy.
    async fn compiled_as(&self, principal: &HarnessIdentity, digest: &str) -> Result<Arc<Compiled>, Refused> {
        let started = Instant::now();
        loop {
            let compiled = self.parts.cluster.compiled(principal);
            match &compiled {
                Ok(compiled) if compiled.digest == digest => {}
                _ if started.elapsed() < LAG => {
                    tokio::time::sleep(LAG_STEP).await;
                    continue;
                }
                _ => {}
            }
            return compiled;
        }
    }

    pub(super) async fn append(&self, request: Request<Incoming>, asked: Asked) -> Served {
        let Asked { principal, .. } = asked;
        let _share = self.quotas.permit(&principal, |share| &share.log)?;
        let body: AppendRequest = json(request, LARGEST_APPEND).await?;
        let HarnessIdentity { namespace, task, task_uid, .. } = &principal;
        // Accept records of what happened even while no policy can be compiled. Only a new attempt needs one.
        let compiled = self.parts.cluster.compiled(&principal);
        let place = match &compiled {
            Ok(compiled) => compiled.place(),
            Err(unready) => self.parts.cluster.place(namespace, task, task_uid).ok_or_else(|| unready.clone())?,
        };
        let digest = compiled.as_ref().map(|compiled| compiled.digest.as_str()).map_err(Clone::clone);
        let of = compiled.as_ref().ok().and_then(|compiled| compiled.rollback_target_log());
        let (appended, usage) = self.parts.witness.append(&place, &principal, &body, digest, of.as_ref()).await?;
        if let Some(task) = self.parts.cluster.task(&principal.namespace, &principal.task, &principal.task_uid) {
            let status = self.parts.usage.clone();
            tokio::spawn(async move { status.running(&task, usage).await });
        }
        reply(&appended)
    }

    pub(super) async fn approval(&self, request: Request<Incoming>, asked: Asked) -> Served {
        let Asked { principal, .. } = asked;
        principal.may_call()?;
        let _share = self.quotas.permit(&principal, |share| &share.questions)?;
        let body: ApprovalAsk = json(request, LARGEST_QUESTION).await?;
        let Parts { cluster, requests, witness, state, .. } = &self.parts;
        let compiled = cluster.compiled(&principal)?;
        let call = CallKey { by: body.by, tool: body.tool.clone(), digest: body.request_commitment.clone() };
        let before = witness.before(&compiled.place(), &call).await?;
        let salt = state.salt(&compiled.salt()).await?;
        let places = self.quotas.of(&principal, |share| &share.judged);
        let asking = (&principal, &places);
        reply(&approvals::ask(cluster, requests.as_ref(), &compiled, asking, (&body, &salt), before).await?)
    }

    pub(super) async fn seal(&self, request: Request<Incoming>) -> Served {
        let body: SealRequest = json(request, LARGEST_SEAL).await?;
        let SealRequest { namespace, name, uid, bucket, prefix, .. } = &body;
        let plain = |part: &str| !part.is_empty() && !part.contains('/') && !part.chars().any(char::is_control);
        if ![namespace, name, uid, bucket].into_iter().all(|part| plain(part)) {
            return Err(Refused::malformed("expected namespace, name, uid and bucket without slashes"));
        }
        let place = LogLocation {
            location: Location {
                bucket: bucket.clone(),
                prefix: log_prefix(Some(prefix.trim_matches('/')), namespace, name, uid),
            },
            task_uid: uid.clone(),
            retention: self.parts.cluster.retention(namespace, bucket),
        };
        let sealed = self.parts.witness.seal(&place, &body).await?;
        if let Some(task) = self.parts.cluster.task(namespace, name, uid) {
            // Before the reply, because the operator may delete the task after it.
            self.parts.usage.ended(&task, sealed.usage).await;
        }
        reply(&sealed)
    }
}
