//! Evaluates an object that is applied.
//!
//! Guarantees: Contracts and packs are checked on their own, as lint does. Tasks are checked together with what they refer to, as the
//! operator does. Deletions and changes of finalizers and labels always pass. A task is never denied because of an object that may still be
//! created.

use futures::FutureExt;
use http::StatusCode;
use kube::{
    Resource,
    core::{
        DynamicObject,
        admission::{AdmissionRequest, AdmissionResponse, AdmissionReview, META_API_VERSION_V1, META_KIND, Operation},
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::{
    api::{AgentTask, PolicyPack, ToolContract},
    operator::{cache::Stores, metrics::Metrics, resolve::Resolved, status},
    render::{Finding, pack, standalone},
};

/// The maximum number of findings in a message. Users do not correct more at a time.
const MOST_FINDINGS: usize = 20;

/// The decision about one object.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    /// The object is allowed.
    Allowed,
    /// The object is allowed, with warnings about what is not known yet or worth knowing.
    Warned(Vec<String>),
    /// The object is denied, with these findings.
    Denied(Vec<Finding>),
}

/// The caches and settings that a replica evaluates objects with.
#[derive(Clone)]
pub struct Judge {
    stores: watch::Receiver<Stores>,
    system_namespace: String,
    metrics: Metrics,
}

impl Judge {
    /// Creates a judge with these caches.
    pub fn new(stores: watch::Receiver<Stores>, system_namespace: String, metrics: Metrics) -> Self {
        Self { stores, system_namespace, metrics }
    }

    /// Answers a review in JSON with a review in JSON.
    ///
    /// # Errors
    /// Returns an error if the body is not a review.
    pub(super) fn answer(&self, body: &[u8]) -> Result<Vec<u8>, String> {
        let refuse = |found: String| {
            format!(
                "expected an {META_KIND} of {META_API_VERSION_V1} with a request, as API servers send it, found {found}"
            )
        };
        let review: AdmissionReview<DynamicObject> =
            serde_json::from_slice(body).map_err(|error| refuse(format!("something else: {error}")))?;
        if review.types.kind != META_KIND || review.types.api_version != META_API_VERSION_V1 {
            return Err(refuse(format!("{} of {}", review.types.kind, review.types.api_version)));
        }
        let request: AdmissionRequest<DynamicObject> =
            review.try_into().map_err(|_| refuse("one without a request".to_owned()))?;
        let verdict = self.judge(&request);
        self.count(&request, &verdict);
        serde_json::to_vec(&response(&request, verdict).into_review()).map_err(|error| error.to_string())
    }

    /// Evaluates the object of a request.
    pub(super) fn judge(&self, request: &AdmissionRequest<DynamicObject>) -> Verdict {
        let Some(object) = news(request) else { return Verdict::Allowed };
        match request.kind.kind.as_str() {
            "ToolContract" => by_itself(object, "a contract", standalone::contract),
            "PolicyPack" => match by_itself(object, "a pack", standalone::pack) {
                Verdict::Allowed => leads_to(object),
                wrong => wrong,
            },
            "AgentTask" => match read::<AgentTask>(object, "a task") {
                Ok(task) => self.task(&task),
                Err(finding) => Verdict::Denied(vec![finding]),
            },
            other => Verdict::Warned(vec![format!(
                "expected an AgentTask, ToolContract or PolicyPack, found {other}, which Belay's webhook does not check; remove it \
                 from the webhook's rules"
            )]),
        }
    }

    fn task(&self, task: &AgentTask) -> Verdict {
        // An empty cache says nothing about the cluster.
        let stores = self.stores.borrow().clone();
        if !matches!(stores.references_ready().now_or_never(), Some(Ok(()))) {
            let why = "the webhook does not know all contracts and packs yet, so it did not check the task: see the task's status";
            return Verdict::Warned(vec![why.to_owned()]);
        }
        let resolved = Resolved::of(task, &stores);
        let missing = resolved.missing(task);
        if !missing.is_empty() {
            return Verdict::Warned(missing.iter().map(Finding::to_string).collect());
        }
        match resolved.validate(task, &self.system_namespace) {
            Ok(_) => Verdict::Allowed,
            Err(findings) => Verdict::Denied(findings),
        }
    }

    fn count(&self, request: &AdmissionRequest<DynamicObject>, verdict: &Verdict) {
        let kinds = [AgentTask::kind(&()), PolicyPack::kind(&()), ToolContract::kind(&())];
        let kind = kinds.iter().find(|kind| ***kind == request.kind.kind).map_or("other", AsRef::as_ref);
        let result = match verdict {
            Verdict::Allowed => "allowed",
            Verdict::Warned(_) => "warned",
            Verdict::Denied(_) => "denied",
        };
        self.metrics.reviews.with_label_values(&[kind, result]).inc();
    }
}

/// Returns the object if it is new or its spec has changed. A finalizer can be removed even if the rest of the object is not valid.
fn news(request: &AdmissionRequest<DynamicObject>) -> Option<&DynamicObject> {
    let object = request.object.as_ref().filter(|object| object.metadata.deletion_timestamp.is_none())?;
    let changed = match request.operation {
        Operation::Create => true,
        Operation::Update => {
            request.old_object.as_ref().is_none_or(|old| old.data.get("spec") != object.data.get("spec"))
        }
        Operation::Delete | Operation::Connect => false,
    };
    changed.then_some(object)
}

/// Warns where model calls go for base URLs of a pack that are more than a host, so that the author of a base URL can check it.
fn leads_to(pack: &DynamicObject) -> Verdict {
    match read::<PolicyPack>(pack, "a pack").map(|pack| pack::bases(&pack)) {
        Ok(bases) if !bases.is_empty() => Verdict::Warned(bases),
        _ => Verdict::Allowed,
    }
}

fn by_itself<K: DeserializeOwned>(object: &DynamicObject, what: &str, judge: fn(&K) -> Vec<Finding>) -> Verdict {
    match read(object, what).map(|typed| judge(&typed)) {
        Ok(findings) if findings.is_empty() => Verdict::Allowed,
        Ok(findings) => Verdict::Denied(findings),
        Err(finding) => Verdict::Denied(vec![finding]),
    }
}

fn read<K: DeserializeOwned>(object: &DynamicObject, what: &str) -> Result<K, Finding> {
    let typed = serde_json::to_value(object).and_then(serde_json::from_value);
    typed.map_err(|error| Finding::unreadable("spec", what, error.to_string()))
}

fn response(request: &AdmissionRequest<DynamicObject>, verdict: Verdict) -> AdmissionResponse {
    let mut response = AdmissionResponse::from(request);
    match verdict {
        Verdict::Allowed => {}
        Verdict::Warned(warnings) => response.warnings = Some(warnings),
        Verdict::Denied(findings) => {
            response = response.deny(status::told(&findings, MOST_FINDINGS));
            response.result.code = StatusCode::FORBIDDEN.as_u16();
            "Forbidden".clone_into(&mut response.result.reason);
        }
    }
    response
}
