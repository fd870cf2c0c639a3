//! Pods that mutating admission changes when they are created.

use super::*;

fn inject(path: &str, object: &mut Value) {
    if path.contains("/pods/") {
        let mesh = json!({ "name": "mesh", "image": "localhost/box:1" });
        object["spec"]["containers"].as_array_mut().unwrap().push(mesh);
    }
}

const PODS: &str = "POST /api/v1/namespaces/team-a/pods";

/// Returns the requests about pods since the last call.
fn about_pods(scene: &Scene) -> Vec<String> {
    scene.cluster.requests().into_iter().filter(|request| request.contains("/pods")).collect()
}

/// Makes the watch show the pod and then its deletion.
fn it_is_gone(scene: &Scene) {
    let uid = fixtures::task().metadata.uid.unwrap();
    scene.context.memories.update(&uid, |memory| memory.pod = None);
}

#[tokio::test]
async fn a_pod_that_is_not_the_planned_one_ends_at_once_and_is_told() {
    let mut scene = Scene::new().await;
    let selector = json!({ "matchLabels": { "belay.dev/environment": "dev" } });
    let rules = json!([{ "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"] }]);
    let webhooks = json!([{ "name": "sidecar.mesh.test", "namespaceSelector": selector, "rules": rules }]);
    scene.cluster.put(
        "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
        json!({ "metadata": {}, "items": [{ "metadata": { "name": "mesh" }, "webhooks": webhooks }] }),
    );
    scene.cluster.mutate(inject);
    scene.step().await.unwrap_err();
    assert_eq!(about_pods(&scene), [PODS.to_owned(), format!("DELETE {POD}")]);
    assert_eq!((&scene.status()["phase"], &scene.status()["reason"]), (&json!("Pending"), &json!("PodAltered")));
    let message = scene.condition("Complete")["message"].as_str().unwrap().to_owned();
    for told in [
        "container `mesh` (image `localhost/box:1`) was added",
        "webhook `sidecar.mesh.test` of MutatingWebhookConfiguration `mesh` (for namespaces with belay.dev/environment=dev)",
        "app.kubernetes.io/managed-by NotIn (belay)",
        "namespace `team-a`",
    ] {
        assert!(message.contains(told), "{message}");
    }
    assert_eq!(scene.status()["attempts"][0]["failureClass"], "Infrastructure");

    // The pod may still be ending, and the operator waits for that.
    scene.step().await.unwrap();
    assert_eq!(scene.cluster.writes(), Vec::<String>::new());
    it_is_gone(&scene);

    // Until the injector is gone, no pod and no other object of an attempt is created, and the status is not written again.
    for _ in 0..3 {
        scene.step().await.unwrap_err();
        assert_eq!(scene.cluster.writes(), [PODS]);
    }
    assert_eq!(scene.cluster.get(POD_2), None);
    assert_eq!(scene.condition("Complete")["message"], message);

    // A restarted operator behaves in the same way.
    let mut scene = Scene::over(scene.cluster, 200, &serde_json::to_string(&seal::tests::reply()).unwrap()).await;
    scene.step().await.unwrap_err();
    assert_eq!(scene.cluster.writes(), [PODS]);

    scene.cluster.mutate(|_, _| ());
    scene.step().await.unwrap();
    assert!(scene.cluster.get(POD_2).is_some());
    scene.end_agent(POD_2, 0);
    scene.step().await.unwrap();
    assert_eq!(scene.status()["phase"], "Succeeded");
}

/// The operator is killed after it created the pod and before it compared it, or the pod was changed while it ran. The pod carries the
/// digests of its own plan.
#[rstest::rstest]
#[case::runs(false)]
#[case::succeeded(true)]
#[tokio::test]
async fn a_pod_that_is_found_altered_is_no_success(#[case] succeeded: bool) {
    let mut scene = Scene::new().await;
    scene.step().await.unwrap();
    scene.run_agent(POD);
    scene.step().await.unwrap();
    assert_eq!(scene.status()["phase"], "Running");
    scene.cluster.edit(POD, |pod| pod["spec"]["containers"][0]["image"] = json!("localhost/box:1"));
    if succeeded {
        scene.end_agent(POD, 0);
    }
    scene.step().await.unwrap();
    assert_eq!(scene.status()["attempts"][0]["reason"], "PodAltered");
    assert_eq!(scene.status()["phase"], "Pending");
    assert_eq!(scene.condition("EvidenceSealed")["status"], "False");
    // A pod that has ended stays for debugging, and the next attempt starts.
    assert_eq!(scene.cluster.get(POD).is_some(), succeeded);
    if !succeeded {
        let message = scene.condition("Complete")["message"].as_str().unwrap().to_owned();
        assert!(message.contains("container `agent` was changed"), "{message}");
        scene.step().await.unwrap();
    }
    assert!(scene.cluster.get(POD_2).is_some());
}

#[tokio::test]
async fn an_injector_that_cannot_be_rehearsed_with_is_met_again() {
    let mut scene = Scene::new().await;
    scene.cluster.mutate(inject);
    scene.step().await.unwrap_err();
    it_is_gone(&scene);
    scene.cluster.answer_rehearsals("admission webhook \"x\" does not support dry run");
    scene.step().await.unwrap_err();
    assert!(about_pods(&scene).contains(&format!("DELETE {POD_2}")));
    assert_eq!(scene.status()["attempts"].as_array().unwrap().len(), 2);
    assert_eq!(scene.status()["reason"], "PodAltered");
}

/// The policy that restricts the operator rejects a pod as an injector changed it. No pod was created, and the reason is the same as for an
/// altered pod.
#[tokio::test]
async fn a_pod_that_the_operators_own_policy_refuses_is_told_as_altered() {
    let mut scene = Scene::new().await;
    let refusal = "pods \"triage-1\" is forbidden: ValidatingAdmissionPolicy 'belay-operator' with binding 'belay-operator' denied \
                   request: pods/triage-1: expected volumes of the kinds configMap, secret and emptyDir, found data";
    scene.cluster.fail_with("POST /api/v1/namespaces/team-a/pods", 403, refusal);
    scene.step().await.unwrap_err();
    assert_eq!(scene.status()["reason"], "PodAltered");
    let message = scene.condition("Complete")["message"].as_str().unwrap().to_owned();
    assert!(
        message.contains("found data") && message.contains("app.kubernetes.io/managed-by NotIn (belay)"),
        "{message}"
    );
    scene.cluster.heal();
    scene.step().await.unwrap();
    assert!(scene.cluster.get(POD).is_some(), "its number was never used");
}
