//! Helpers that apply manifests, wait, read results and clean up.

use std::{
    collections::BTreeMap,
    io::Write,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use belay::api::{AgentTask, PolicyPack, agent_task::Phase};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, LogParams, Patch, PatchParams},
};
use serde_json::{Value, json};

/// The system namespace of the chart under test.
pub const SYSTEM: &str = "belay-system";

/// Returns a client, one for each test. rustls needs its provider installed first.
pub async fn client() -> Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::try_default().await.expect("no cluster: run these tests with `make test`")
}

/// Returns a client that impersonates the operator. Admission policies keep all other users, administrators included, from changing the
/// objects of an agent, so tests that break these objects need it.
pub async fn as_operator() -> Client {
    impersonating(format!("system:serviceaccount:{SYSTEM}:belay-operator"), "system:masters").await
}

/// Returns a client that impersonates a node's kubelet: nobody else gets a token with the gateway's audience.
pub async fn as_kubelet(node: &str) -> Client {
    impersonating(format!("system:node:{node}"), "system:nodes").await
}

async fn impersonating(user: String, group: &str) -> Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut config = kube::Config::infer().await.expect("no cluster: run these tests with `make test`");
    config.auth_info.impersonate = Some(user);
    config.auth_info.impersonate_groups = Some(vec![group.into()]);
    Client::try_from(config).expect("the client that just worked")
}

/// Returns the log lines of one of Belay's components since then, from all replicas.
pub async fn system_logs(component: &str, since: jiff::Timestamp) -> Vec<String> {
    let pods: Api<Pod> = Api::namespaced(client().await, SYSTEM);
    let select = ListParams::default().labels(&format!("app.kubernetes.io/name={component}"));
    let mut lines = Vec::new();
    for pod in pods.list(&select).await.expect("no pods of ours") {
        let params = LogParams { since_time: Some(since), ..LogParams::default() };
        let logs = pods.logs(&pod.name_any(), &params).await.expect("no logs of ours");
        lines.extend(logs.lines().map(str::to_owned));
    }
    lines
}

/// Returns the image of the demo's agent. Any image with Python would work.
pub fn agent_image() -> String {
    std::env::var("BELAY_AGENT_IMAGE").unwrap_or_else(|_| "localhost/belay-demo-agent:dev".into())
}

/// Returns a setting that the test runner exports.
pub fn setting(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run these tests with `make test`"))
}

/// Returns the path of a file of the pretend internet.
pub fn in_world(file: &str) -> std::path::PathBuf {
    std::path::Path::new(&setting("BELAY_WORLD")).join(file)
}

/// A namespace and a pack for one test. Both are deleted if the test succeeds. If it fails they stay for inspection, until the next run of
/// the same test.
pub struct World {
    pub client: Client,
    pub namespace: String,
}

impl World {
    /// Creates a namespace with a pack that has these classes.
    pub async fn new(name: &str, classes: Value) -> Self {
        let namespace = format!("belay-e2e-{name}");
        let world = Self::governed(name, &namespace).await;
        let pack = json!({
            "apiVersion": "belay.dev/v1alpha1", "kind": "PolicyPack", "metadata": {"name": namespace},
            "spec": {
                "environment": "e2e",
                "namespaceSelector": {"matchLabels": {"belay.dev/environment": namespace}},
                "workflowClasses": classes,
                "taskClasses": ["incident"],
                "models": {"openai": "https://models.world.test"},
                "evidence": {"bucket": setting("S3_BUCKET"), "prefix": "e2e", "mode": "Governance", "retentionDays": 1},
                "state": {"bucket": setting("S3_STATE_BUCKET"), "prefix": "e2e"},
            },
        });
        Api::<PolicyPack>::all(world.client.clone())
            .patch(&namespace, &PatchParams::apply("e2e"), &Patch::Apply(pack))
            .await
            .expect("cannot make the pack");
        world
    }

    /// Creates a namespace that the pack of an environment governs.
    pub async fn governed(name: &str, environment: &str) -> Self {
        let world = Self { client: client().await, namespace: format!("belay-e2e-{name}") }.fresh().await;
        let manifest = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": world.namespace, "labels": {
                "belay.dev/environment": environment,
                "pod-security.kubernetes.io/enforce": "restricted",
            }},
        });
        Api::<Namespace>::all(world.client.clone())
            .patch(&world.namespace, &PatchParams::apply("e2e"), &Patch::Apply(manifest))
            .await
            .expect("cannot make the namespace");
        world
    }

    /// Creates the demo's own namespace with everything that the demo needs but its task, and deletes all tickets.
    pub async fn demo() -> Self {
        let world = Self { client: client().await, namespace: "belay-demo".into() }.fresh().await;
        world.kubectl_apply(include_str!("../demo/manifests/namespace.yaml"));
        world.kubectl_apply(include_str!("../demo/manifests/contracts.yaml"));
        let authority = std::fs::read_to_string(in_world("ca.crt")).expect("the world is not up");
        world.config_map("world-ca", &[("ca.crt", &authority)]).await;
        std::fs::write(in_world("tickets.jsonl"), "").expect("the world is not up");
        world
    }

    /// Applies manifests with `kubectl apply`, as a user does.
    pub fn kubectl_apply(&self, manifests: &str) {
        let mut kubectl = Command::new("kubectl")
            .args(["apply", "-n", &self.namespace, "-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("no kubectl: run these tests with `make test`");
        kubectl.stdin.take().unwrap().write_all(manifests.as_bytes()).unwrap();
        assert!(kubectl.wait().unwrap().success(), "kubectl apply refused the manifests");
    }

    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Applies a task. `spec` is merged over small defaults.
    pub async fn task(&self, name: &str, spec: Value) -> AgentTask {
        let mut whole = json!({
            "objective": "be watched", "workflowClass": "gvisor", "principal": "e2e",
            // Two of these must fit on a node with two cores, beside Belay and everything else on the node.
            "agent": {"image": agent_image(), "resources": {"cpu": "200m", "memory": "128Mi"}},
            "limits": {"wallTimeSeconds": 300, "toolCalls": 5, "tokens": 1000},
        });
        merge(&mut whole, spec);
        let manifest = json!({
            "apiVersion": "belay.dev/v1alpha1", "kind": "AgentTask", "metadata": {"name": name}, "spec": whole,
        });
        self.api::<AgentTask>()
            .patch(name, &PatchParams::apply("e2e"), &Patch::Apply(manifest))
            .await
            .unwrap_or_else(|error| panic!("cannot apply task {name}: {error}"))
    }

    pub async fn config_map(&self, name: &str, files: &[(&str, &str)]) {
        let data: BTreeMap<&str, &str> = files.iter().copied().collect();
        let manifest = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data});
        self.api::<ConfigMap>()
            .patch(name, &PatchParams::apply("e2e"), &Patch::Apply(manifest))
            .await
            .expect("cannot apply the ConfigMap");
    }

    /// Waits until a task is as wanted, and panics with its status if that takes too long.
    pub async fn wait(&self, name: &str, what: &str, seconds: u64, wanted: impl Fn(&AgentTask) -> bool) -> AgentTask {
        let tasks: Api<AgentTask> = self.api();
        let end = Instant::now() + Duration::from_secs(seconds);
        loop {
            let task = tasks.get(name).await.expect("the task is gone");
            if wanted(&task) {
                return task;
            }
            assert!(
                Instant::now() < end,
                "task {name} was not {what} within {seconds} s; its status is {}",
                serde_json::to_string_pretty(&task.status).unwrap()
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    pub async fn ended(&self, name: &str, seconds: u64) -> AgentTask {
        self.wait(name, "ended", seconds, |task| matches!(phase(task), Some(Phase::Succeeded | Phase::Failed))).await
    }

    /// Waits until a pod is as wanted.
    pub async fn wait_for_pod(&self, name: &str, seconds: u64, wanted: impl Fn(&Pod) -> bool) -> Pod {
        let pods: Api<Pod> = self.api();
        let end = Instant::now() + Duration::from_secs(seconds);
        loop {
            let pod = pods.get_opt(name).await.unwrap();
            if let Some(pod) = pod.filter(|pod| wanted(pod)) {
                return pod;
            }
            assert!(Instant::now() < end, "pod {name} is not as wanted after {seconds} s");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Waits until a pod is ready.
    pub async fn pod_ready(&self, name: &str, seconds: u64) -> Pod {
        self.wait_for_pod(name, seconds, |pod| {
            let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
            conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
        })
        .await
    }

    pub async fn logs(&self, pod: &str, container: &str) -> String {
        let params = LogParams { container: Some(container.into()), ..LogParams::default() };
        self.api::<Pod>()
            .logs(pod, &params)
            .await
            .unwrap_or_else(|error| panic!("no logs of {pod}/{container}: {error}"))
    }

    /// Returns the records of an attempt, as its harness printed them.
    pub async fn records(&self, pod: &str) -> Vec<Value> {
        let logs = self.logs(pod, "harness").await;
        logs.lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|r| r.get("kind").is_some())
            .collect()
    }

    /// Runs `belay verify` of a task, see [`World::report`]. The first time that the log is valid, it saves a copy for the stage
    /// `evidence`.
    pub fn verify(&self, task: &str) -> (i32, Value) {
        let (code, report) = self.report(task);
        let copy = format!("{}/{}-{task}", setting("BELAY_EVIDENCE"), self.namespace);
        if code == 0 && !std::path::Path::new(&copy).exists() {
            belay(&["verify", task, "-n", &self.namespace, "--save", &copy]);
        }
        (code, report)
    }

    /// Runs `belay verify` of a task, and returns the exit code and the report.
    pub fn report(&self, task: &str) -> (i32, Value) {
        let output = belay(&["verify", task, "-n", &self.namespace, "--output", "json"]);
        let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("belay verify said no JSON ({error}): {}", String::from_utf8_lossy(&output.stderr))
        });
        (output.status.code().unwrap_or(-1), report)
    }

    /// Deletes the tasks, the pack and the namespace. Does not wait until the namespace is gone, because each test has its own.
    pub async fn clean(&self) {
        let packs: Api<PolicyPack> = Api::all(self.client.clone());
        let tasks: Api<AgentTask> = self.api();
        let list = async || tasks.list(&ListParams::default()).await.expect("cannot list the tasks").items;
        for task in list().await {
            let _ = tasks.delete(&task.name_any(), &DeleteParams::default()).await;
        }
        let end = Instant::now() + Duration::from_secs(90);
        // The finalizers of tasks need the pack, the contracts and the gateway.
        while !list().await.is_empty() {
            assert!(Instant::now() < end, "the tasks of {} do not go away", self.namespace);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let _ = namespaces.delete(&self.namespace, &DeleteParams::default()).await;
        let _ = packs.delete(&self.namespace, &DeleteParams::default()).await;
    }

    /// Deletes what an earlier run has left, and waits until it is gone.
    async fn fresh(self) -> Self {
        self.clean().await;
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let end = Instant::now() + Duration::from_secs(90);
        while namespaces.get_opt(&self.namespace).await.ok().flatten().is_some() {
            assert!(Instant::now() < end, "namespace {} does not go away", self.namespace);
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        self
    }
}

pub fn phase(task: &AgentTask) -> Option<Phase> {
    task.status.as_ref()?.phase
}

/// Returns the reason and the message of a condition, if it has this status.
pub fn condition(task: &AgentTask, kind: &str, status: &str) -> Option<String> {
    let conditions = &task.status.as_ref()?.conditions;
    conditions.iter().find(|c| c.type_ == kind && c.status == status).map(|c| format!("{}: {}", c.reason, c.message))
}

/// Runs `belay` with the credentials of the store.
pub fn belay(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_belay"))
        .args(args)
        .env("AWS_ACCESS_KEY_ID", setting("S3_ACCESS_KEY"))
        .env("AWS_SECRET_ACCESS_KEY", setting("S3_SECRET_KEY"))
        .env("AWS_REGION", setting("S3_REGION"))
        .output()
        .expect("belay does not run")
}

/// Merges `over` into `under`, object by object.
pub fn merge(under: &mut Value, over: Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (key, value) in over {
                merge(under.entry(key).or_insert(Value::Null), value);
            }
        }
        (under, over) => *under = over,
    }
}

/// Returns a contract for a tool of the ticket service whose arguments are strings; `more` is merged over its spec.
pub fn ticket_contract(name: &str, upstream: &str, arguments: &[&str], more: Value) -> String {
    let text = |name: &&str| ((*name).to_owned(), json!({"type": "string"}));
    let mut spec = json!({
        "tool": name.replace('-', "_"), "description": "A tool.", "sideEffect": "write",
        "upstream": {"mcp": {"url": "https://tickets.world.test/mcp", "tool": upstream}},
        "input": {"type": "object", "properties": arguments.iter().map(text).collect::<serde_json::Map<_, _>>()},
    });
    merge(&mut spec, more);
    json!({"apiVersion": "belay.dev/v1alpha1", "kind": "ToolContract", "metadata": {"name": name}, "spec": spec})
        .to_string()
}

/// Returns a class that allows what the tests need, on a runtime.
pub fn class(name: &str, runtime: &str, egress: Value) -> Value {
    json!({
        "name": name, "runtimeClassName": runtime, "egress": egress,
        "allowedEffects": ["read", "write"],
        "limits": {"wallTimeSeconds": 600, "toolCalls": 100, "tokens": 1_000_000},
        "resources": {"cpu": "1", "memory": "512Mi", "ephemeralStorage": "256Mi"},
    })
}
