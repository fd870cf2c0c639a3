use serde_json::json;

use super::*;

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn webhook(own: Value) -> Value {
    let mut webhook = json!({
        "name": "sidecar.mesh.test",
        "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}],
    });
    webhook.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
    json!({"metadata": {"name": "mesh"}, "webhooks": [webhook]})
}

fn found(webhooks: &[Value]) -> Vec<String> {
    let (namespace, pod) = (labels(&[("inject", "yes")]), labels(&[("app.kubernetes.io/managed-by", "belay")]));
    matching(webhooks, &[], &[], &namespace, &pod)
}

const NAMED: &str = "webhook `sidecar.mesh.test` of MutatingWebhookConfiguration `mesh`";

#[rstest::rstest]
#[case::all(json!({}), Some(""))]
#[case::this_namespace(json!({"namespaceSelector": {"matchLabels": {"inject": "yes"}}}), Some(" (for namespaces with inject=yes)"))]
#[case::any_group(json!({"rules": [{"apiGroups": ["*"], "resources": ["*"], "operations": ["*"]}]}), Some(""))]
#[case::subresources_too(json!({"rules": [{"apiGroups": [""], "resources": ["*/*"], "operations": ["CREATE"]}]}), Some(""))]
#[case::other_namespaces(json!({"namespaceSelector": {"matchLabels": {"inject": "no"}}}), None)]
#[case::leaves_ours_out(
    json!({"objectSelector": {"matchExpressions": [{"key": "app.kubernetes.io/managed-by", "operator": "NotIn", "values": ["belay"]}]}}), None
)]
#[case::deployments(json!({"rules": [{"apiGroups": ["apps"], "resources": ["deployments"], "operations": ["CREATE"]}]}), None)]
#[case::updates(json!({"rules": [{"apiGroups": [""], "resources": ["pods"], "operations": ["UPDATE"]}]}), None)]
#[case::exec(json!({"rules": [{"apiGroups": [""], "resources": ["pods/exec"], "operations": ["CREATE"]}]}), None)]
#[case::unreadable(json!({"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "Matches"}]}}), Some(""))]
fn webhooks_that_apply(#[case] own: Value, #[case] told: Option<&str>) {
    let expected: Vec<String> = told.map(|told| format!("{NAMED}{told}")).into_iter().collect();
    assert_eq!(found(&[webhook(own)]), expected);
}

#[test]
fn policies_apply_where_they_are_bound() {
    let policy = json!({
        "metadata": {"name": "adm-inject"},
        "spec": {"matchConstraints": {
            "namespaceSelector": {"matchLabels": {"inject": "yes"}},
            "resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}],
        }},
    });
    let namespace = labels(&[("inject", "yes"), ("team", "a")]);
    let bound = |spec: Value| {
        matching(&[], std::slice::from_ref(&policy), &[json!({"spec": spec})], &namespace, &Labels::new())
    };
    let named = "MutatingAdmissionPolicy `adm-inject` (for namespaces with inject=yes";
    assert_eq!(bound(json!({"policyName": "adm-inject"})), [format!("{named})")]);
    let team = |team: &str| json!({"policyName": "adm-inject", "matchResources": {"namespaceSelector": {"matchLabels": {"team": team}}}});
    assert_eq!(bound(team("a")), [format!("{named} and team=a)")]);
    assert_eq!(bound(team("b")), Vec::<String>::new());
    assert_eq!(bound(json!({"policyName": "another"})), Vec::<String>::new());
    assert_eq!(matching(&[], &[policy], &[], &namespace, &Labels::new()), Vec::<String>::new());
}
