//! The NetworkPolicy of one attempt: nothing in, nothing out but the gateway's pods on one port.
//!
//! Promises: a pod is built only with a [`Proof`] that the API server holds the policy as planned. Refuses: trust in the CNI;
//! that the policy is enforced is the containment probe's to show.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::networking::v1::{
        NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
    },
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};
use kube::ResourceExt;

use super::{evidence::Location, names, owner::Owner, validated::Attempt};
use crate::canonical;

/// A NetworkPolicy that was read back and found to be as planned: its name and the digest of its spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof(String);

impl Proof {
    /// `<name>@sha256:<digest of the spec as read back>`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The API server holds something else than was planned.
#[derive(Debug, thiserror::Error)]
#[error("expected NetworkPolicy `{name}` as it was applied, found another spec; something else writes it")]
pub struct Altered {
    name: String,
}

/// The policy.
pub fn build(attempt: &Attempt<'_>) -> NetworkPolicy {
    let Attempt { task, surroundings, number, .. } = attempt;
    rebuild(&task.owner, *number, &surroundings.system_namespace, &task.evidence)
}

/// The policy, from what is known of an attempt when contracts and pack may have gone.
pub fn rebuild(task: &Owner, attempt: i64, system_namespace: &str, evidence: &Location) -> NetworkPolicy {
    let mut metadata = task.metadata(attempt);
    metadata.annotations = Some(BTreeMap::from([(names::EVIDENCE.to_owned(), evidence.to_string())]));
    NetworkPolicy { metadata, spec: Some(spec(&task.uid, attempt, system_namespace)) }
}

fn spec(uid: &str, attempt: i64, system_namespace: &str) -> NetworkPolicySpec {
    let labelled = |key: &str, value: &str| {
        Some(LabelSelector {
            match_labels: Some(BTreeMap::from([(key.to_owned(), value.to_owned())])),
            ..LabelSelector::default()
        })
    };
    NetworkPolicySpec {
        pod_selector: Some(LabelSelector {
            match_labels: Some(names::selector(uid, attempt)),
            ..LabelSelector::default()
        }),
        policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
        ingress: None,
        egress: Some(vec![NetworkPolicyEgressRule {
            ports: Some(vec![NetworkPolicyPort {
                port: Some(IntOrString::Int(i32::from(names::GATEWAY_PORT))),
                protocol: Some("TCP".to_owned()),
                end_port: None,
            }]),
            to: Some(vec![NetworkPolicyPeer {
                namespace_selector: labelled("kubernetes.io/metadata.name", system_namespace),
                pod_selector: labelled("app.kubernetes.io/name", names::GATEWAY),
                ip_block: None,
            }]),
        }]),
    }
}

/// Whether a live policy is the one of this attempt, as planned.
pub fn is_intact(live: &NetworkPolicy, uid: &str, attempt: i64, system_namespace: &str) -> bool {
    live.spec.as_ref() == Some(&spec(uid, attempt, system_namespace))
}

/// Compares what was read back with what was planned.
///
/// # Errors
/// If they differ.
pub fn prove(planned: &NetworkPolicy, read_back: &NetworkPolicy) -> Result<Proof, Altered> {
    let name = planned.name_any();
    match canonical::digest(&read_back.spec) {
        Ok(digest) if planned.spec == read_back.spec && name == read_back.name_any() => {
            Ok(Proof(format!("{name}@sha256:{}", hex::encode(digest))))
        }
        _ => Err(Altered { name }),
    }
}
