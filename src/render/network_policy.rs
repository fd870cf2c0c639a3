//! Builds the NetworkPolicy of one attempt: no ingress, and egress only to one port of the gateway's pods.
//!
//! Guarantees: A pod is built only with a [`Proof`] that the API server has the policy as planned.
//!
//! Non-goals: Whether the CNI enforces the policy. The containment probe tests that.

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

/// Proof that a NetworkPolicy was read back and is as planned: its name and the digest of its spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof(String);

impl Proof {
    /// Returns `<name>@sha256:<digest of the spec as read back>`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The error if the API server has another policy than the planned one.
#[derive(Debug, thiserror::Error)]
#[error("expected NetworkPolicy `{name}` as it was applied, found another spec; something else writes it")]
pub struct Altered {
    name: String,
}

/// Builds the NetworkPolicy of an attempt.
pub fn build(attempt: &Attempt<'_>) -> NetworkPolicy {
    let Attempt { task, surroundings, number, .. } = attempt;
    rebuild(&task.owner, *number, &surroundings.system_namespace, &task.evidence)
}

/// Builds the NetworkPolicy of an attempt from what is known even if contracts and pack are gone.
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

/// Checks whether a live policy is the planned one of this attempt.
pub fn is_intact(live: &NetworkPolicy, uid: &str, attempt: i64, system_namespace: &str) -> bool {
    live.spec.as_ref() == Some(&spec(uid, attempt, system_namespace))
}

/// Compares the policy that was read back with the planned one.
///
/// # Errors
/// Returns an error if they differ.
pub fn prove(planned: &NetworkPolicy, read_back: &NetworkPolicy) -> Result<Proof, Altered> {
    let name = planned.name_any();
    match canonical::digest(&read_back.spec) {
        Ok(digest) if planned.spec == read_back.spec && name == read_back.name_any() => {
            Ok(Proof(format!("{name}@sha256:{}", hex::encode(digest))))
        }
        _ => Err(Altered { name }),
    }
}
