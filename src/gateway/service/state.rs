//! The requests about data of a task's calls: arguments of compensations, and results of idempotent calls.
//!
//! Guarantees: data is stored only for a call whose intent is in the log, under the commitment that the gateway itself makes. The arguments
//! of a compensation follow from the contract and from the very arguments of the call.
//!
//! Non-goals: the truth of a result, for which the harness is trusted as it is for the record.

use std::sync::Arc;

use http::Request;
use hyper::body::Incoming;

use super::{Asked, Gateway, Served, json, reply};
use crate::{
    canonical,
    evidence::store::Location,
    gateway::{authorize, compiled::Compiled, identity::HarnessIdentity, refusal::Refused},
    policy::rule::Rule,
    wire,
};

/// Maximum bytes of a request for stored data, which has two fields.
const LARGEST_REFERENCE: usize = 16 << 10;
/// Maximum bytes of a call and its result, from which the arguments of its compensation are made.
const LARGEST_PUT: usize = 2 << 20;

impl Gateway {
    /// Stores the result of an idempotent call. The harness is trusted for the result, as it is for the record.
    pub(super) async fn put_result(&self, request: Request<Incoming>, asked: Asked) -> Served {
        let Asked { principal, .. } = &asked;
        let (compiled, at) = self.state(principal, Compiled::results, Rule::ToolIdempotency)?;
        let _share = self.quotas.permit(principal, |share| &share.log)?;
        let wire::PutResult { intent, result } = json(request, LARGEST_PUT).await?;
        let refused = |reason: String| Refused::denied(Rule::ToolIdempotency, reason);
        if result.len() > wire::LONGEST_RESULT {
            let (most, found) = (wire::LONGEST_RESULT, result.len());
            return Err(refused(format!("expected a result of at most {most} bytes, found {found}")));
        }
        let intent = self.parts.witness.intent(&compiled.place(), intent).await?;
        authorize::resolve_tool(&compiled, principal.attempt, &intent)?;
        if intent.key.is_none() {
            return Err(refused(format!("expected a call under an idempotency key, found {} without", intent.call)));
        }
        let digest = self.parts.state.salt(&compiled.salt()).await?.bytes(result.as_bytes());
        self.parts.state.put(&at, &intent.call, &digest, result.into()).await?;
        reply(&wire::PutReply { digest })
    }

    /// Returns a stored result. The log names the result's commitment, which the caller checks.
    pub(super) async fn get_result(&self, request: Request<Incoming>, asked: Asked) -> Served {
        let (_, at) = self.state(&asked.principal, Compiled::results, Rule::ToolIdempotency)?;
        let _share = self.quotas.permit(&asked.principal, |share| &share.log)?;
        let of = json(request, LARGEST_REFERENCE).await?;
        reply(&wire::ResultReply { result: self.text(&at, &of, Rule::ToolIdempotency).await? })
    }

    /// Makes the arguments of a call's compensation, by its contract and from the very arguments of the call, and stores them. The harness
    /// is trusted for the call's result.
    pub(super) async fn put_state(&self, request: Request<Incoming>, asked: Asked) -> Served {
        let Asked { principal, .. } = &asked;
        let (compiled, at) = self.state(principal, Compiled::compensation_location, Rule::ToolRollback)?;
        let _share = self.quotas.permit(principal, |share| &share.log)?;
        let wire::PutState { intent, arguments, result } = json(request, LARGEST_PUT).await?;
        let intent = self.parts.witness.intent(&compiled.place(), intent).await?;
        authorize::resolve_tool(&compiled, principal.attempt, &intent)?;
        if compiled.policy.task.rollback_of.is_some() {
            return Err(Refused::denied(
                Rule::ToolRollback,
                "expected an agent's task, found a rollback: a rollback is not rolled back",
            ));
        }
        let salt = self.parts.state.salt(&compiled.salt()).await?;
        authorize::are_intended(&intent, &salt, &arguments)?;
        // Tenants write these expressions, so evaluate them on a thread of their own, as calls are.
        let target = intent.target.clone();
        let made = self.quotas.apart(principal, move || {
            let undo = compiled.contracts.undo(&target, &arguments, &result)?;
            let undo = serde_json::Value::Object(undo);
            let made = canonical::to_bytes(&undo).and_then(|bytes| Ok((salt.value(&undo)?, bytes)));
            made.map_err(|error| error.to_string())
        });
        let (digest, made) = made.await?.map_err(|reason| Refused::denied(Rule::ToolRollback, reason))?;
        self.parts.state.put(&at, &intent.call, &digest, made).await?;
        reply(&wire::PutReply { digest })
    }

    pub(super) async fn get_state(&self, request: Request<Incoming>, asked: Asked) -> Served {
        let (compiled, at) = self.state(&asked.principal, Compiled::compensation_location, Rule::ToolRollback)?;
        let _share = self.quotas.permit(&asked.principal, |share| &share.log)?;
        let of = json(request, LARGEST_REFERENCE).await?;
        if compiled.rollback_target_log().is_none() {
            return Err(Refused::denied(Rule::ToolRollback, "expected a rollback, found another task"));
        }
        reply(&wire::Undo { arguments: self.text(&at, &of, Rule::ToolRollback).await? })
    }

    /// Returns where data of a task's calls is stored.
    fn state(
        &self,
        principal: &HarnessIdentity,
        of: fn(&Compiled) -> Option<Location>,
        rule: Rule,
    ) -> Result<(Arc<Compiled>, Location), Refused> {
        principal.may_call()?;
        let compiled = self.parts.cluster.compiled(principal)?;
        let state = of(&compiled).ok_or_else(|| {
            Refused::denied(rule, "expected a state bucket in the pack, found none: the gateway stores nothing")
        })?;
        Ok((compiled, state))
    }

    async fn text(&self, at: &Location, of: &wire::StateRef, rule: Rule) -> Result<String, Refused> {
        let text =
            self.parts.state.get(at, &of.call, &of.digest).await?.ok_or_else(|| {
                Refused::denied(rule, format!("expected an object of {} in {at}, found none", of.call))
            })?;
        String::from_utf8(text).map_err(|e| Refused::malformed(e.to_string()))
    }
}
