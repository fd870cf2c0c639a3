//! Mutating admission changes an agent's pod. Belay rejects the pod, says who changed what, runs no byte of the agent, and creates a pod
//! again when the injector is gone. In each control, the same task succeeds without the injector.

use std::time::{Duration, Instant};

use belay::api::{AgentTask, agent_task::Phase};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::support::{World, class, condition, phase, setting};

/// A MutatingAdmissionPolicy as an injector, for the namespace of one test, and that namespace.
struct Injected {
    world: World,
    policy: String,
}

impl Injected {
    async fn new(name: &str) -> Self {
        let world = World::new(&format!("inject-{name}"), json!([class("gvisor", "gvisor", json!([]))])).await;
        let policy = format!("belay-e2e-inject-{name}");
        let injected = Self { world, policy };
        injected.kubectl(&["delete", "--ignore-not-found", "mutatingadmissionpolicybinding,mutatingadmissionpolicy"]);
        let label = json!({"metadata": {"labels": {"inject": name}}});
        Api::<Namespace>::all(injected.world.client.clone())
            .patch(&injected.world.namespace, &PatchParams::default(), &Patch::Merge(label))
            .await
            .expect("cannot label the namespace");
        injected
    }

    fn kubectl(&self, command: &[&str]) {
        let done = std::process::Command::new("kubectl").args(command).arg(&self.policy).output().expect("no kubectl");
        assert!(done.status.success(), "kubectl {command:?}: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// Creates the injector, and waits until the API server applies it.
    async fn inject(&self, mutation: Value) {
        self.put(mutation);
        self.rehearsed("the injector does not inject", |made, asked| made != asked).await;
    }

    fn put(&self, mutation: Value) {
        let selector = json!({"matchLabels": {"inject": self.world.namespace.trim_start_matches("belay-e2e-inject-")}});
        let pods = json!([{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}]);
        let group = "admissionregistration.k8s.io/v1";
        for manifest in [
            json!({"apiVersion": group, "kind": "MutatingAdmissionPolicy", "metadata": {"name": self.policy}, "spec": {
                "failurePolicy": "Fail", "reinvocationPolicy": "Never",
                "matchConstraints": {"namespaceSelector": selector, "resourceRules": pods},
                "mutations": [mutation],
            }}),
            json!({"apiVersion": group, "kind": "MutatingAdmissionPolicyBinding", "metadata": {"name": self.policy},
                "spec": {"policyName": self.policy}}),
        ] {
            self.world.kubectl_apply(&manifest.to_string());
        }
    }

    async fn stop(&self) {
        self.kubectl(&["delete", "mutatingadmissionpolicybinding,mutatingadmissionpolicy"]);
        self.rehearsed("the injector does not stop", |made, asked| made == asked).await;
    }

    /// Waits until a dry run of a pod gives the wanted result.
    async fn rehearsed(&self, otherwise: &str, wanted: impl Fn(&Value, &Value) -> bool) {
        let confined = json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
        let asked = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "rehearsal", "labels": {"a": "b"}, "annotations": {"a": "b"}}, "spec": {
            "containers": [{"name": "one", "image": "i", "env": [{"name": "A", "value": "a"}], "securityContext": confined}],
            "initContainers": [{"name": "first", "image": "i", "securityContext": confined}],
            "tolerations": [{"key": "a", "operator": "Exists"}],
            "volumes": [{"name": "v", "emptyDir": {}}],
            "securityContext": {"runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "automountServiceAccountToken": false,
        }});
        let parameters = PostParams { dry_run: true, ..PostParams::default() };
        let pod: Pod = serde_json::from_value(asked.clone()).unwrap();
        // Only names and the image are compared, because the API server fills in defaults.
        let summary = |pod: &Value| {
            let names = |list: &str| {
                pod["spec"][list].as_array().map(|all| all.iter().map(|one| one["name"].clone()).collect::<Vec<_>>())
            };
            let images = pod["spec"]["containers"][0]["image"].clone();
            json!([
                names("containers"),
                names("initContainers"),
                names("volumes"),
                images,
                pod["metadata"].get("labels")
            ])
        };
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let made = self.world.api::<Pod>().create(&parameters, &pod).await.expect("no pod can be rehearsed");
            if wanted(&summary(&serde_json::to_value(made).unwrap()), &summary(&asked)) {
                return;
            }
            assert!(Instant::now() < end, "{otherwise}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Creates a task that succeeds within seconds if its pod may run.
    async fn task(&self, name: &str) {
        self.world.task(name, json!({"agent": {"command": ["python3", "-S", "-c"], "args": ["print('done')"]}})).await;
    }

    async fn succeeds(&self, name: &str) -> AgentTask {
        let task = self.world.ended(name, 180).await;
        assert_eq!(phase(&task), Some(Phase::Succeeded), "{:?}", task.status);
        let (code, report) = self.world.verify(name);
        assert_eq!((code, &report["verdict"]), (0, &json!("VALID")), "{report:#}");
        task
    }

    /// Runs the control, then checks that the changed pod is rejected, and that the task succeeds after the injector is gone.
    async fn refused(self, mutation: Value, told: &[&str]) {
        self.task("control").await;
        self.succeeds("control").await;
        self.inject(mutation).await;
        self.task("injected").await;
        let reason = |task: &AgentTask| task.status.as_ref().and_then(|status| status.reason.clone());
        let task =
            self.world.wait("injected", "refused", 60, |task| reason(task).as_deref() == Some("PodAltered")).await;
        assert_eq!(phase(&task), Some(Phase::Pending));
        let message = condition(&task, "Complete", "False").unwrap();
        let by = format!("MutatingAdmissionPolicy `{}`", self.policy);
        for told in
            told.iter().copied().chain([&*by, "NotIn (belay)", &*format!("namespace `{}`", self.world.namespace)])
        {
            assert!(message.contains(told), "expected {told} in: {message}");
        }
        // The task stays as it is: the operator creates no other pod, and writes little.
        let since = jiff::Timestamp::now();
        tokio::time::sleep(Duration::from_secs(8)).await;
        let task = self.world.wait("injected", "there", 1, |_| true).await;
        let made = task.status.as_ref().map(|status| status.attempts.len()).unwrap_or_default();
        assert!(made <= 1, "{:?}", task.status);
        assert_eq!((phase(&task), reason(&task).as_deref()), (Some(Phase::Pending), Some("PodAltered")));
        let posts = audited(&self.world.namespace, since);
        // A pod that the API server itself rejects costs four writes for each attempt to create it. The first of these are a second or two
        // apart.
        assert!(posts.len() <= 16, "{posts:?}");
        let pods = self.world.api::<Pod>().list(&Default::default()).await.unwrap().items;
        let ran =
            pods.iter().flat_map(|pod| pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten()));
        let ran: Vec<_> = ran.filter(|one| one.name == "agent" && one.started == Some(true)).collect();
        assert!(ran.is_empty(), "the agent ran: {ran:?}");

        self.stop().await;
        let task = self.succeeds("injected").await;
        let attempts = task.status.unwrap().attempts;
        let reasons: Vec<_> = attempts.iter().map(|attempt| attempt.reason.as_deref().unwrap_or_default()).collect();
        assert_eq!(reasons[made..], ["AgentSucceeded"]);
        assert!(reasons[..made].iter().all(|reason| *reason == "PodAltered"), "{reasons:?}");
        self.world.clean().await;
    }
}

/// Returns the operator's creations, changes and deletions in a namespace since then, from the audit log. Dry runs are in the log, too.
fn audited(namespace: &str, since: jiff::Timestamp) -> Vec<String> {
    let log = std::fs::read_to_string(setting("BELAY_AUDIT_LOG")).expect("the API server keeps no audit log");
    let events = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let ours = events.filter(|event| {
        let at = event["requestReceivedTimestamp"].as_str().and_then(|at| at.parse::<jiff::Timestamp>().ok());
        event["user"]["username"].as_str().is_some_and(|user| user.ends_with(":belay-operator"))
            && event["objectRef"]["namespace"] == namespace
            && at.is_some_and(|at| at >= since)
    });
    ours.map(|event| format!("{} {}", event["verb"], event["objectRef"]["resource"])).collect()
}

fn patch(operations: &str) -> Value {
    json!({"patchType": "JSONPatch", "jsonPatch": {"expression": operations}})
}

/// Returns a CEL expression for a container of a list of the pod; `more` are further fields.
fn container(list: &str, name: &str, more: &str) -> String {
    let of = format!("Object.spec.{list}");
    let confined = format!(
        "{of}.securityContext{{allowPrivilegeEscalation: false, runAsNonRoot: true, runAsUser: 65532, \
         capabilities: {of}.securityContext.capabilities{{drop: ['ALL']}}}}"
    );
    format!("{of}{{name: '{name}', image: 'localhost/box:1', securityContext: {confined}{more}}}")
}

#[tokio::test]
async fn a_sidecar() {
    let mesh = container("containers", "mesh", ", command: ['sleep', '600']");
    Injected::new("sidecar")
        .await
        .refused(
            patch(&format!("[JSONPatch{{op: 'add', path: '/spec/containers/-', value: {mesh}}}]")),
            &["container `mesh` (image `localhost/box:1`) was added"],
        )
        .await;
}

#[tokio::test]
async fn a_native_sidecar() {
    let mesh = container("initContainers", "mesh", ", command: ['sleep', '600'], restartPolicy: 'Always'");
    Injected::new("native")
        .await
        .refused(
            patch(&format!("[JSONPatch{{op: 'add', path: '/spec/initContainers/0', value: {mesh}}}]")),
            &["init container `mesh` (image `localhost/box:1`) was added"],
        )
        .await;
}

#[tokio::test]
async fn an_init_container() {
    let first = container("initContainers", "first-of-all", ", command: ['true']");
    Injected::new("init")
        .await
        .refused(
            patch(&format!("[JSONPatch{{op: 'add', path: '/spec/initContainers/0', value: {first}}}]")),
            &["init container `first-of-all` (image `localhost/box:1`) was added"],
        )
        .await;
}

#[tokio::test]
async fn another_image_and_a_variable() {
    Injected::new("env")
        .await
        .refused(
            patch(
                "[JSONPatch{op: 'add', path: '/spec/containers/0/env/-', value: Object.spec.containers.env{name: 'OTEL_X', value: '1'}},
                  JSONPatch{op: 'replace', path: '/spec/containers/0/image', value: 'localhost/box:1'}]",
            ),
            &["variable `OTEL_X` was added", "the image of container `agent` is `localhost/box:1`, not `"],
        )
        .await;
}

#[tokio::test]
async fn an_ephemeral_volume() {
    let of = "Object.spec.volumes.ephemeral.volumeClaimTemplate";
    let claim = format!(
        "{of}{{spec: {of}.spec{{accessModes: ['ReadWriteOnce'], resources: {of}.spec.resources{{requests: {{'storage': '1Gi'}}}}}}}}"
    );
    let volume = format!(
        "Object.spec.volumes{{name: 'data', ephemeral: Object.spec.volumes.ephemeral{{volumeClaimTemplate: {claim}}}}}"
    );
    Injected::new("volume")
        .await
        .refused(
            patch(&format!("[JSONPatch{{op: 'add', path: '/spec/volumes/-', value: {volume}}}]")),
            // The admission policy for the operator rejects this pod, so no pod is created.
            &["expected volumes of the kinds configMap, secret and emptyDir", "data"],
        )
        .await;
}

/// Changes that affect neither what runs in the pod nor what it sees are accepted.
#[tokio::test]
async fn a_label_an_annotation_and_a_toleration_are_no_matter() {
    let injected = Injected::new("label").await;
    let more = "[JSONPatch{op: 'add', path: '/metadata/labels/cost-center', value: 'x'},
          JSONPatch{op: 'add', path: '/metadata/annotations/scanner', value: 'on'},
          JSONPatch{op: 'add', path: '/spec/tolerations/-', value: Object.spec.tolerations{key: 'spot', operator: 'Exists'}}]";
    injected.inject(patch(more)).await;
    injected.task("labelled").await;
    injected
        .world
        .wait("labelled", "under way", 60, |task| {
            task.status.as_ref().is_some_and(|status| !status.attempts.is_empty())
        })
        .await;
    let pod = injected.world.api::<Pod>().get("labelled-1").await.unwrap();
    assert_eq!(pod.metadata.labels.unwrap()["cost-center"], "x", "the control: it was injected");
    assert_eq!(pod.spec.unwrap().containers.len(), 1);
    let task = injected.succeeds("labelled").await;
    assert_eq!(task.status.unwrap().attempts.len(), 1);
    injected.kubectl(&["delete", "mutatingadmissionpolicybinding,mutatingadmissionpolicy"]);
    injected.world.clean().await;
}

/// If the injector fails, the API server rejects the pod, and its message names the injector. The task's status has that message.
#[tokio::test]
async fn an_injector_that_fails() {
    let injected = Injected::new("fails").await;
    injected.task("control").await;
    injected.succeeds("control").await;
    let more = "Object{spec: Object.spec{tolerations: [Object.spec.tolerations{key: 'spot', operator: 'Exists'}]}}";
    injected.put(json!({"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": more}}));
    tokio::time::sleep(Duration::from_secs(10)).await;
    injected.task("refused").await;
    let reason = |task: &AgentTask| task.status.as_ref().and_then(|status| status.reason.clone());
    let task =
        injected.world.wait("refused", "refused", 60, |task| reason(task).as_deref() == Some("PodRefused")).await;
    let message = condition(&task, "Complete", "False").unwrap();
    assert!(message.contains(&injected.policy) && message.contains(".spec.tolerations"), "{message}");
    injected.kubectl(&["delete", "mutatingadmissionpolicybinding,mutatingadmissionpolicy"]);
    injected.succeeds("refused").await;
    injected.world.clean().await;
}
