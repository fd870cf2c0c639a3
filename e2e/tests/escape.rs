//! An agent tries to get out of its container, under gVisor and under runc. In the control, the same attempts succeed in a pod without
//! isolation.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

use belay::api::agent_task::Phase;
use k8s_openapi::{
    api::{
        authentication::v1::TokenRequest,
        core::v1::{Pod, Service, ServiceAccount},
    },
    serde_json::{self, Value, json},
};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};

use crate::support::{SYSTEM, World, agent_image, as_kubelet, class, phase, setting};

const PROBE: &str = include_str!("../escape/probe.py");
const LISTEN: &str = include_str!("../escape/listen.py");

/// The cases of the adversarial list that the probe must have tried.
const CASES: &[&str] = &[
    "A1", "A7", "A8", "A9", "A10", "A11", "A12", "A13", "A14", "A15", "A16", "A17", "A18", "A19", "A23", "A24", "A43",
    "A45", "A51",
];
/// Names that resolve to forbidden addresses. The class lists all of them.
const BAD_HOSTS: &[&str] = &["loopback", "private", "cgnat", "metadata", "mixed", "node", "api", "v6-mapped"];

/// One attempt, as the probe prints it.
#[derive(Clone, Debug, serde::Deserialize)]
struct Try {
    case: String,
    tried: String,
    escaped: bool,
    how: String,
}

fn tries(logs: &str) -> Vec<Try> {
    assert!(logs.contains(r#"{"done": true}"#), "the probe did not come to its end:\n{logs}");
    logs.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Listeners at addresses that have no server in this test environment. They end when this is dropped.
struct Listeners(Vec<Child>);

impl Listeners {
    fn start() -> Self {
        let world = [
            "udp 8.8.8.8 443",
            "udp 8.8.8.8 53",
            "tcp 8.8.8.8 53",
            "tcp 8.8.8.8 853",
            "tcp 8.8.8.8 443",
            "tcp 1.1.1.1 443",
            "tcp 169.254.169.254 80",
            "tcp 2001:4860:4860::8888 443",
        ];
        // The test cluster's etcd listens on the node's loopback only. A listener on its port stands in for an etcd that listens on the
        // node's address.
        let node = ["tcp 10.200.0.10 2379", "tcp 10.200.0.10 80", "tcp 10.200.0.10 443"];
        Self([("belay-world", &world[..]), ("belay-node", &node[..])].map(|(netns, words)| listen(netns, words)).into())
    }
}

fn listen(netns: &str, words: &[&str]) -> Child {
    let mut child = Command::new("nsenter")
        .arg(format!("--net=/run/netns/{netns}"))
        .args(["python3", "-c", LISTEN])
        .args(words.iter().flat_map(|word| word.split(' ')))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("nsenter and python3 are needed");
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line.trim(), "listening");
    child
}

impl Drop for Listeners {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

async fn service_address(world: &World, namespace: &str, name: &str) -> String {
    let services: Api<Service> = Api::namespaced(world.client.clone(), namespace);
    services.get(name).await.unwrap().spec.unwrap().cluster_ip.unwrap()
}

/// Returns the probe's environment variables, which are the same with and without isolation.
async fn environment(world: &World) -> BTreeMap<&'static str, String> {
    let gateway = service_address(world, SYSTEM, "belay-gateway").await;
    let api = service_address(world, "default", "kubernetes").await;
    BTreeMap::from([
        ("GATEWAY", format!("{gateway}:8443")),
        ("CANARY", format!("{gateway}:8444")),
        ("API_SERVER", format!("{api}:443")),
        ("NODE_IP", setting("BELAY_NODE_IP")),
    ])
}

/// Serves an echo at the cluster's DNS address, because this test cluster has no DNS. The namespace is shared by these tests, because they
/// share the address.
async fn cluster_dns() -> World {
    let world = World::new("dns", json!([class("none", "runc", json!([]))])).await;
    world.config_map("listen", &[("listen.py", LISTEN)]).await;
    let pods: Api<Pod> = world.api();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "dns", "labels": {"app": "dns"}},
        "spec": {
            "runtimeClassName": "runc", "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": false,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "dns", "image": agent_image(), "stdin": true,
                "command": ["python3", "/listen/listen.py", "udp", "0.0.0.0", "5353", "tcp", "0.0.0.0", "5353"],
                "ports": [{"containerPort": 5353}],
                "readinessProbe": {"tcpSocket": {"port": 5353}, "periodSeconds": 1},
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"name": "listen", "mountPath": "/listen"}],
            }],
            "volumes": [{"name": "listen", "configMap": {"name": "listen"}}],
        },
    });
    pods.patch("dns", &PatchParams::apply("e2e"), &Patch::Apply(pod)).await.unwrap();
    let services: Api<Service> = world.api();
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "dns"},
        "spec": {"clusterIP": "10.96.0.10", "selector": {"app": "dns"}, "ports": [
            {"name": "udp", "protocol": "UDP", "port": 53, "targetPort": 5353},
            {"name": "tcp", "protocol": "TCP", "port": 53, "targetPort": 5353},
        ]},
    });
    services.patch("dns", &PatchParams::apply("e2e"), &Patch::Apply(service)).await.unwrap();
    world.pod_ready("dns", 60).await;
    world
}

/// Returns a token like that of the harness in `pod`: bound to that pod, with the gateway's audience.
async fn token_of(world: &World, pod: &Pod) -> String {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap();
    let accounts: Api<ServiceAccount> = Api::namespaced(as_kubelet(node).await, &world.namespace);
    let request: TokenRequest = serde_json::from_value(json!({
        "metadata": {}, "spec": {"audiences": ["belay-gateway"], "expirationSeconds": 3600, "boundObjectRef": {
            "apiVersion": "v1", "kind": "Pod", "name": pod.metadata.name, "uid": pod.metadata.uid,
        }},
    }))
    .unwrap();
    let made = accounts.create_token_request("default", &PostParams::default(), &request).await.unwrap();
    made.status.unwrap().token
}

fn env_list(environment: &BTreeMap<&'static str, String>) -> Value {
    environment.iter().map(|(name, value)| json!({"name": name, "value": value})).collect()
}

/// Runs all attempts in a task's agent container on one runtime.
async fn contained(runtime: &'static str) {
    let hosts: Value = BAD_HOSTS
        .iter()
        .map(|host| json!({"host": format!("{host}.world.test"), "ports": [443, 80], "uses": ["Direct"]}))
        .collect();
    let world = World::new(&format!("escape-{runtime}"), json!([class("escape", runtime, hosts)])).await;
    let _listeners = Listeners::start();
    let dns = cluster_dns().await;
    world.config_map("probe", &[("probe.py", PROBE), ("x", "not to be changed")]).await;

    // A second task: the attacker has its token, and tries to reach its pod.
    let spec = |args: Value, environment: &BTreeMap<&'static str, String>| {
        json!({
            "workflowClass": "escape",
            "agent": {"command": ["python3"], "args": args, "env": env_list(environment)},
            "workspace": {
                "mounts": [{"path": "/escape", "configMap": "probe"}],
                "writeScopes": [{"path": "/workspace", "size": "16Mi"}],
            },
        })
    };
    let mut environment = environment(&world).await;
    world.task("victim", spec(json!(["-c", "import time; time.sleep(300)"]), &environment)).await;
    world.wait("victim", "running", 60, |task| phase(task) == Some(Phase::Running)).await;
    let victim = world
        .wait_for_pod("victim-1", 60, |pod| {
            pod.status
                .as_ref()
                .is_some_and(|status| status.pod_ip.is_some() && status.phase.as_deref() == Some("Running"))
        })
        .await;
    let address = victim.status.as_ref().unwrap().pod_ip.clone().unwrap();
    environment.insert("PEER", format!("{address}:9901"));
    environment.insert("TOKEN", token_of(&world, &victim).await);
    environment.insert("PROXY", "127.0.0.1:9900".into());
    environment.insert("SCOPE", "/workspace".into());

    world.task("attacker", spec(json!(["/escape/probe.py"]), &environment)).await;
    let task = world.ended("attacker", 240).await;
    let logs = world.logs("attacker-1", "agent").await;
    let tries = tries(&logs);
    let escapes: Vec<&Try> = tries.iter().filter(|one| one.escaped).collect();
    assert!(escapes.is_empty(), "{runtime}: these got through: {escapes:#?}");
    let seen: BTreeSet<&str> = tries.iter().map(|one| one.case.as_str()).collect();
    let missing: Vec<&&str> = CASES.iter().filter(|case| !seen.contains(**case)).collect();
    assert!(missing.is_empty(), "{runtime}: these cases were not tried: {missing:?}");
    assert!(logs.contains(r#"{"scope": "written"}"#), "{runtime}: the declared scope cannot be written:\n{logs}");
    assert_eq!(phase(&task), Some(Phase::Succeeded), "{runtime}: {:?}", task.status);

    recorded(&world, runtime, &tries).await;
    if runtime == "runc" {
        replayed_where_it_belongs(&victim, &environment);
    }
    // The use of the stolen token is an incident of the task that the token was stolen from.
    let (code, report) = world.verify("victim");
    assert_eq!((code, report["verdict"].as_str()), (3, Some("INCOMPLETE")), "{runtime}: it still runs: {report:#}");
    assert!(report["summary"]["incidents"].as_u64() >= Some(1), "{runtime}: no incident of A45: {report:#}");
    let (code, report) = world.verify("attacker");
    assert_eq!(code, 0, "{runtime}: {report:#}");
    world.clean().await;
    dns.clean().await;
}

/// Checks that each attempt through the proxy has a denial in the log, under the expected rule.
async fn recorded(world: &World, runtime: &str, tries: &[Try]) {
    let records = world.records("attacker-1").await;
    let mut rules: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut targets: BTreeMap<String, String> = BTreeMap::new();
    let text = |record: &Value, field: &str| record[field].as_str().unwrap_or_default().to_owned();
    for record in &records {
        match record["kind"].as_str() {
            Some("call.intent") => {
                targets.insert(text(record, "call"), text(record, "target"));
            }
            Some("call.denied") => {
                rules.entry(text(record, "target")).or_default().insert(text(record, "rule"));
            }
            Some("call.outcome") if !text(record, "rule").is_empty() => {
                let target = targets.get(&text(record, "call")).cloned().unwrap_or_default();
                rules.entry(target).or_default().insert(text(record, "rule"));
            }
            _ => {}
        }
    }
    for one in tries.iter().filter(|one| one.tried.starts_with("CONNECT ")) {
        let target = one.tried.trim_start_matches("CONNECT ");
        let expected = if one.case == "A24" { "egress.address" } else { "egress.host" };
        let found = rules.get(target);
        assert!(
            found.is_some_and(|found| found.contains(expected)),
            "{runtime}: {} has no record under {expected}, but {found:?}; the agent saw {}",
            one.tried,
            one.how
        );
    }
}

/// The control of A45: the gateway accepts the same token from its own pod's address. Only runc has this control, because gVisor keeps the
/// address inside its sandbox, where a test cannot run.
fn replayed_where_it_belongs(victim: &Pod, environment: &BTreeMap<&'static str, String>) {
    let uid = victim.metadata.uid.clone().unwrap();
    let pid = std::fs::read_dir("/proc").unwrap().flatten().find(|process| {
        std::fs::read_to_string(process.path().join("cgroup")).is_ok_and(|cgroup| cgroup.contains(&format!("pod{uid}")))
    });
    let pid = pid.expect("no process of the victim's pod on this machine").file_name();
    let output = Command::new("nsenter")
        .args(["--target", pid.to_str().unwrap(), "--net", "python3", "-c", PROBE, "replay"])
        .envs(environment)
        .output()
        .unwrap();
    let one: Try = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("the probe said nothing: {}", String::from_utf8_lossy(&output.stderr)));
    assert!(one.escaped && one.how.contains("HTTP/1.1"), "the token is refused from its own pod, too: {one:?}");
}

#[tokio::test]
async fn nothing_escapes_from_gvisor() {
    contained("gvisor").await;
}

#[tokio::test]
async fn nothing_escapes_from_runc() {
    contained("runc").await;
}

/// The control: without NetworkPolicies, as root, with the capability NET_RAW, a token and a harness in the same process namespace, every
/// attempt succeeds. So each attempt can fail.
#[tokio::test]
async fn the_same_tries_escape_from_a_pod_that_nobody_contains() {
    let world = World::new("control", json!([class("escape", "runc", json!([]))])).await;
    let namespaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(world.client.clone());
    let open = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "privileged"}}});
    namespaces.patch(&world.namespace, &PatchParams::default(), &Patch::Merge(open)).await.unwrap();
    let _listeners = Listeners::start();
    let dns = cluster_dns().await;
    world.config_map("probe", &[("probe.py", PROBE)]).await;
    let mut environment = environment(&world).await;
    let peer = dns.api::<Pod>().get("dns").await.unwrap().status.and_then(|status| status.pod_ip).unwrap();
    environment.insert("PEER", format!("{peer}:5353"));
    for runtime in ["gvisor", "runc"] {
        let name = format!("control-{runtime}");
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {
                "runtimeClassName": runtime, "restartPolicy": "Never", "shareProcessNamespace": true,
                "dnsPolicy": "None", "dnsConfig": {"nameservers": ["198.51.100.53"]},
                "containers": [{
                    "name": "agent", "image": agent_image(), "command": ["python3", "/escape/probe.py"],
                    "env": env_list(&environment),
                    "securityContext": {"runAsUser": 0, "capabilities": {"add": ["NET_RAW"]}},
                    "volumeMounts": [{"name": "probe", "mountPath": "/escape", "readOnly": false},
                                     {"name": "scope", "mountPath": "/workspace"}],
                }],
                "volumes": [
                    {"name": "in", "configMap": {"name": "probe"}}, {"name": "probe", "emptyDir": {}}, {"name": "scope", "emptyDir": {}},
                    // The token has another audience, because admission allows nobody to project one with the gateway's. The attempt is to
                    // read it.
                    {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"audience": "control", "path": "token"}}]}},
                ],
                "initContainers": [{
                    "name": "copy", "image": agent_image(), "command": ["python3", "-c"],
                    "args": ["import shutil; shutil.copy('/in/probe.py', '/escape/probe.py')"],
                    "securityContext": {"runAsUser": 0},
                    "volumeMounts": [{"name": "in", "mountPath": "/in"}, {"name": "probe", "mountPath": "/escape"}],
                }, {
                    "name": "harness", "image": agent_image(), "restartPolicy": "Always",
                    "command": ["python3", "-c", "import time; f = open('/var/run/belay/token'); time.sleep(600)", "belay-harness"],
                    "env": [{"name": "NETWORK_POLICY", "value": "to be found"}],
                    "securityContext": {"runAsUser": 0},
                    "volumeMounts": [{"name": "token", "mountPath": "/var/run/belay"}],
                }],
            },
        });
        let pods: Api<Pod> = world.api();
        pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
        world
            .wait_for_pod(&name, 180, |pod| {
                matches!(pod.status.as_ref().and_then(|status| status.phase.as_deref()), Some("Succeeded" | "Failed"))
            })
            .await;
        let tries = tries(&world.logs(&name, "agent").await);
        let missing: Vec<&&str> =
            CASES.iter().filter(|case| **case != "A45" && tries.iter().all(|one| one.case != **case)).collect();
        assert!(missing.is_empty(), "{runtime}: these cases have no control: {missing:?}");
        let held: Vec<&Try> = tries.iter().filter(|one| !one.escaped && !excused(runtime, one)).collect();
        assert!(
            held.is_empty(),
            "{runtime}: these did not get through without policies, so they show nothing: {held:#?}"
        );
    }
    world.clean().await;
    dns.clean().await;
}

/// Returns whether an attempt cannot succeed on this test cluster even without policies. Each has its reason.
fn excused(runtime: &str, one: &Try) -> bool {
    match one.tried.as_str() {
        // The pod network has IPv4 only, and so has Felix on this cluster.
        "tcp [2001:4860:4860::8888]:443" => true,
        // This test cluster has no DNS, and the Service of its API server has no port 80.
        "CONNECT kubernetes.default.svc:443" | "GET http://api.world.test/" => true,
        // gVisor has packet sockets only with a flag that is not set.
        "packet socket" | "raw icmp socket" => runtime == "gvisor",
        _ => false,
    }
}
