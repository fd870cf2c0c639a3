//! Finds the mutating admission that may have changed a pod of Belay when it was created.
//!
//! Guarantees: Every webhook or policy in the result selects the creation of pods, this namespace and these labels.
//!
//! Non-goals: To find out which of several made the change, because only the API server's audit log has that. Plugins that are part of the
//! API server. Match conditions.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::core::{Selector, SelectorExt};
use serde_json::Value;

use super::api::Writer;

const WEBHOOKS: [&str; 1] = ["/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"];
const POLICIES: [&str; 2] = [
    "/apis/admissionregistration.k8s.io/v1/mutatingadmissionpolicies",
    "/apis/admissionregistration.k8s.io/v1beta1/mutatingadmissionpolicies",
];
const BINDINGS: [&str; 2] = [
    "/apis/admissionregistration.k8s.io/v1/mutatingadmissionpolicybindings",
    "/apis/admissionregistration.k8s.io/v1beta1/mutatingadmissionpolicybindings",
];

type Labels = BTreeMap<String, String>;

/// Describes, in words, the mutating admission that may have changed a pod with these labels.
pub async fn of_pod(writer: &Writer, namespace: &Labels, pod: &Labels) -> String {
    let read = async {
        let (webhooks, policies, bindings) =
            tokio::try_join!(writer.list_any(&WEBHOOKS), writer.list_any(&POLICIES), writer.list_any(&BINDINGS))?;
        Ok::<_, kube::Error>(matching(&webhooks, &policies, &bindings, namespace, pod))
    };
    match read.await.as_deref() {
        Ok([]) => "an admission plugin of the API server, or mutating admission that was removed since".to_owned(),
        Ok([one]) => one.clone(),
        Ok(several) => format!("one of {}", several.join(", ")),
        Err(error) => format!("mutating admission that could not be read ({error}); see the API server's audit log"),
    }
}

/// Returns the webhooks and the bound policies that apply.
fn matching(
    webhooks: &[Value],
    policies: &[Value],
    bindings: &[Value],
    namespace: &Labels,
    pod: &Labels,
) -> Vec<String> {
    let name = |object: &Value| object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut found = Vec::new();
    for configuration in webhooks {
        for webhook in list(configuration, "/webhooks") {
            if rules(webhook, "/rules") && selects(webhook, namespace, pod) {
                let own = webhook.get("name").and_then(Value::as_str).unwrap_or_default();
                let of = format!("webhook `{own}` of MutatingWebhookConfiguration `{}`", name(configuration));
                found.push(told(of, &[webhook]));
            }
        }
    }
    for policy in policies {
        let constraints = policy.pointer("/spec/matchConstraints").unwrap_or(&Value::Null);
        if !rules(constraints, "/resourceRules") || !selects(constraints, namespace, pod) {
            continue;
        }
        let bound = bindings
            .iter()
            .filter(|one| one.pointer("/spec/policyName").and_then(Value::as_str) == Some(&name(policy)));
        let resources = |binding: &Value| binding.pointer("/spec/matchResources").cloned().unwrap_or_default();
        let applies = bound.map(resources).find(|resources| {
            (list(resources, "/resourceRules").next().is_none() || rules(resources, "/resourceRules"))
                && selects(resources, namespace, pod)
        });
        if let Some(resources) = applies {
            found.push(told(format!("MutatingAdmissionPolicy `{}`", name(policy)), &[constraints, &resources]));
        }
    }
    found
}

fn list<'a>(of: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    of.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

/// Checks whether one of the rules applies to the creation of pods.
fn rules(of: &Value, pointer: &str) -> bool {
    let has = |rule: &Value, key: &str, wanted: &[&str]| {
        list(rule, key).filter_map(Value::as_str).any(|one| wanted.contains(&one))
    };
    list(of, pointer).any(|rule| {
        has(rule, "/apiGroups", &["", "*"])
            && has(rule, "/resources", &["pods", "*", "*/*"])
            && has(rule, "/operations", &["CREATE", "*"])
    })
}

fn selects(of: &Value, namespace: &Labels, pod: &Labels) -> bool {
    // A selector that cannot be parsed counts as a match, so that its webhook or policy is named.
    let matches = |key: &str, labels: &Labels| selector(of, key).is_none_or(|selector| selector.matches(labels));
    matches("namespaceSelector", namespace) && matches("objectSelector", pod)
}

fn selector(of: &Value, key: &str) -> Option<Selector> {
    let selector: LabelSelector = serde_json::from_value(of.get(key)?.clone()).ok()?;
    Selector::try_from(selector).ok()
}

/// Returns the name with the selectors that select the namespace.
fn told(who: String, of: &[&Value]) -> String {
    let by: Vec<_> =
        of.iter().filter_map(|one| selector(one, "namespaceSelector")).map(|one| one.to_string()).collect();
    let by: Vec<_> = by.into_iter().filter(|one| !one.is_empty()).collect();
    if by.is_empty() { who } else { format!("{who} (for namespaces with {})", by.join(" and ")) }
}

#[cfg(test)]
mod tests;
