use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::*;
use crate::render::{
    fixtures::{contracts, pack, surroundings, task},
    network_policy, pod,
    validated::validate,
};

fn planned() -> Pod {
    let validated = validate(&task(), &contracts(), &pack(), "belay-system").unwrap();
    let surroundings = surroundings();
    let attempt = validated.attempt(&surroundings, 1).unwrap();
    let policy = network_policy::build(&attempt);
    pod::build(&attempt, &network_policy::prove(&policy, &policy).unwrap())
}

/// The answer of a Kubernetes 1.36 API server without injectors to a dry run of the planned pod next to it.
fn answered() -> (Pod, Value) {
    let planned = serde_json::from_str(include_str!("planned.json")).unwrap();
    (planned, serde_json::from_str(include_str!("answered.json")).unwrap())
}

/// Applies a change to the answer, by JSON Pointer. `/-` at the end appends to a list.
fn with(mut answer: Value, at: &str, value: Value) -> Value {
    match at.strip_suffix("/-") {
        Some(list) => answer.pointer_mut(list).unwrap().as_array_mut().unwrap().push(value),
        None => {
            let (parent, key) = at.rsplit_once('/').unwrap();
            let key = key.replace("~1", "/");
            let parent = answer.pointer_mut(parent).unwrap_or_else(|| panic!("{at}"));
            match (parent.as_array_mut(), key.parse::<usize>()) {
                (Some(list), Ok(index)) => list.insert(index, value),
                _ => parent[&key] = value,
            }
        }
    }
    answer
}

#[test]
fn what_an_api_server_makes_of_it_is_as_planned() {
    let (planned, answer) = answered();
    assert_eq!(differences(&planned, &answer), Vec::<String>::new());
    assert_eq!(altered(&serde_json::from_value(answer).unwrap()), None);
    // The pod as it is planned now, compared with itself.
    let planned = self::planned();
    assert_eq!(differences(&planned, &serde_json::to_value(&planned).unwrap()), Vec::<String>::new());
    assert_eq!(altered(&planned), None);
}

#[rstest::rstest]
#[case::not_ready("/spec/tolerations/-", json!({"key": "spot", "operator": "Exists"}))]
#[case::label("/metadata/labels/cost-center", json!("x"))]
#[case::annotation("/metadata/annotations/scanner", json!("on"))]
#[case::node("/spec/nodeName", json!("node-1"))]
#[case::node_selector("/spec/nodeSelector", json!({"pool": "agents"}))]
#[case::affinity("/spec/affinity", json!({"nodeAffinity": {}}))]
#[case::spread("/spec/topologySpreadConstraints", json!([{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}]))]
#[case::scheduler("/spec/schedulerName", json!("fargate-scheduler"))]
#[case::gate("/spec/schedulingGates", json!([{"name": "kueue.x-k8s.io/admission"}]))]
#[case::priority("/spec/priority", json!(1000))]
#[case::priority_class("/spec/priorityClassName", json!("low"))]
#[case::overhead("/spec/overhead", json!({"memory": "64Mi"}))]
#[case::pull_secrets("/spec/imagePullSecrets", json!([{"name": "registry"}]))]
#[case::always_pull("/spec/containers/0/imagePullPolicy", json!("Always"))]
#[case::limit_range("/spec/initContainers/1/resources/limits/cpu", json!("500m"))]
#[case::selinux("/spec/securityContext/seLinuxOptions", json!({"level": "s0:c26,c5"}))]
#[case::finalizer("/metadata/finalizers", json!(["kueue.x-k8s.io/managed"]))]
#[case::quantity("/spec/containers/0/resources/limits/cpu", json!("0.5"))]
#[case::scope("/spec/volumes/7/emptyDir/sizeLimit", json!("16384Ki"))]
fn where_it_runs_and_what_it_owes_are_others_business(#[case] at: &str, #[case] value: Value) {
    let (planned, answer) = answered();
    assert_eq!(differences(&planned, &with(answer, at, value)), Vec::<String>::new());
}

/// Each case has a change, what is reported when the pod is created, and what is reported later, by the pod's own digests.
#[rstest::rstest]
#[case::sidecar("/spec/containers/-", json!({"name": "mesh", "image": "localhost/box:1"}),
    "container `mesh` (image `localhost/box:1`) was added", "container `mesh` was added")]
#[case::native_sidecar("/spec/initContainers/-", json!({"name": "proxy", "image": "p", "restartPolicy": "Always"}),
    "init container `proxy` (image `p`) was added", "container `proxy` was added")]
#[case::init_container_first("/spec/initContainers/0", json!({"name": "iptables", "image": "p"}),
    "init container `iptables` (image `p`) was added", "container `iptables` was added")]
#[case::ephemeral_container("/spec/ephemeralContainers", json!([{"name": "debugger", "image": "d"}]),
    "ephemeral container `debugger` (image `d`) was added", "container `debugger` was added")]
#[case::ephemeral_volume("/spec/volumes/-", json!({"name": "data", "ephemeral": {"volumeClaimTemplate": {"spec": {"storageClassName": "fast"}}}}),
    "volume `data` (ephemeral) was added", "volume `data` was added")]
#[case::csi_volume("/spec/volumes/-", json!({"name": "keys", "csi": {"driver": "secrets-store.csi.k8s.io"}}),
    "volume `keys` (csi) was added", "volume `keys` was added")]
#[case::mount("/spec/containers/0/volumeMounts/-", json!({"name": "token", "mountPath": "/var/run/belay"}),
    "in container `agent`, mount `/var/run/belay` (volume `token`) was added", "container `agent` was changed")]
#[case::writable_mount("/spec/containers/0/volumeMounts/0/readOnly", json!(false),
    "`readOnly` of mount `/workspace/input` of container `agent` was removed", "container `agent` was changed")]
#[case::image("/spec/containers/0/image", json!("localhost/box:1"),
    "the image of container `agent` is `localhost/box:1`, not `registry.example.test/agent@sha256:aa`", "container `agent` was changed")]
#[case::harness_image("/spec/initContainers/1/image", json!("mirror/belay"),
    "the image of init container `harness` is `mirror/belay`, not `localhost/belay:dev`", "container `harness` was changed")]
#[case::variable("/spec/containers/0/env/-", json!({"name": "OTEL_X", "value": "secret"}),
    "in container `agent`, variable `OTEL_X` was added", "container `agent` was changed")]
#[case::variable_again("/spec/containers/0/env/-", json!({"name": "HTTP_PROXY", "value": "http://elsewhere"}),
    "in container `agent`, variable `HTTP_PROXY` was added", "container `agent` was changed")]
#[case::variable_changed("/spec/containers/0/env/0/value", json!("http://elsewhere"),
    "in container `agent`, variable `OPENAI_BASE_URL` was changed", "container `agent` was changed")]
#[case::variables_from("/spec/containers/0/envFrom", json!([{"secretRef": {"name": "cloud"}}]),
    "`envFrom` of container `agent` was added", "container `agent` was changed")]
#[case::command("/spec/containers/0/command", json!(["/wrap"]),
    "`command` of container `agent` was added", "container `agent` was changed")]
#[case::arguments("/spec/containers/0/args/-", json!("--quiet"),
    "`args` of container `agent` was changed", "container `agent` was changed")]
#[case::lifecycle("/spec/containers/0/lifecycle", json!({"preStop": {"exec": {"command": ["sleep", "60"]}}}),
    "`lifecycle` of container `agent` was added", "container `agent` was changed")]
#[case::security("/spec/containers/0/securityContext/readOnlyRootFilesystem", json!(false),
    "`securityContext.readOnlyRootFilesystem` of container `agent` was changed from true to false", "container `agent` was changed")]
#[case::user("/spec/containers/0/securityContext/runAsUser", json!(65532),
    "`securityContext.runAsUser` of container `agent` was changed from 1000 to 65532", "container `agent` was changed")]
#[case::capability("/spec/containers/0/securityContext/capabilities/add", json!(["NET_RAW"]),
    "`securityContext.capabilities.add` of container `agent` was added", "container `agent` was changed")]
#[case::host_network("/spec/hostNetwork", json!(true), "`hostNetwork` of the pod was added", "the pod's own settings")]
#[case::processes("/spec/shareProcessNamespace", json!(true),
    "`shareProcessNamespace` of the pod was changed from false to true", "the pod's own settings")]
#[case::name_server("/spec/dnsConfig/options", json!([{"name": "ndots", "value": "2"}]),
    "`dnsConfig.options` of the pod was added", "the pod's own settings")]
#[case::host_alias("/spec/hostAliases", json!([{"ip": "10.0.0.1", "hostnames": ["x"]}]),
    "`hostAliases` of the pod was added", "the pod's own settings")]
#[case::runtime("/spec/runtimeClassName", json!("runc"),
    "`runtimeClassName` of the pod was changed from \"gvisor\" to \"runc\"", "the pod's own settings")]
#[case::account("/spec/serviceAccountName", json!("builder"),
    "`serviceAccountName` of the pod was changed from \"default\" to \"builder\"", "the pod's own settings")]
#[case::group("/spec/securityContext/fsGroup", json!(0), "`securityContext.fsGroup` of the pod was added", "the pod's own settings")]
#[case::volume("/spec/volumes/0/configMap/name", json!("mine"),
    "`configMap.name` of volume `config` was changed from \"triage-2\" to \"mine\"", "volume `config` was changed")]
fn what_runs_or_what_it_sees_is_not(#[case] at: &str, #[case] value: Value, #[case] when: &str, #[case] later: &str) {
    let (planned, answer) = answered();
    let answer = with(answer, at, value);
    let found = differences(&planned, &answer);
    assert!(found.iter().any(|one| one.starts_with(when)), "{found:?}");
    let found = altered(&serde_json::from_value(answer).unwrap()).unwrap_or_default();
    assert!(found.contains(later), "{found}");
}

/// Changes that only an injector can make while the pod is created.
#[rstest::rstest]
#[case::memory("/spec/containers/0/resources/limits/memory", json!("64Gi"), "`resources.limits.memory` of container `agent` was changed")]
#[case::device("/spec/containers/0/resources/claims", json!([{"name": "gpu"}]), "`resources.claims` of container `agent` was added")]
#[case::own_label("/metadata/labels/belay.dev~1attempt", json!("9"), "label `belay.dev/attempt` was changed")]
#[case::our_label("/metadata/labels/belay.dev~1more", json!("9"), "label `belay.dev/more` was added")]
#[case::own_annotation("/metadata/annotations/belay.dev~1plan", json!("{}"), "annotation `belay.dev/plan` was changed")]
#[case::injection("/metadata/labels/sidecar.istio.io~1inject", json!("true"), "label `sidecar.istio.io/inject` was changed")]
#[case::app_armor("/metadata/annotations/container.apparmor.security.beta.kubernetes.io~1agent", json!("unconfined"),
    "annotation `container.apparmor.security.beta.kubernetes.io/agent` was added")]
#[case::second_network("/metadata/annotations/k8s.v1.cni.cncf.io~1networks", json!("other"), "annotation `k8s.v1.cni.cncf.io/networks` was added")]
#[case::source_addresses("/metadata/annotations/cni.projectcalico.org~1allowedSourcePrefixes", json!("[]"),
    "annotation `cni.projectcalico.org/allowedSourcePrefixes` was added")]
#[case::sandbox("/metadata/annotations/dev.gvisor.flag.network", json!("host"), "annotation `dev.gvisor.flag.network` was added")]
#[case::devices("/metadata/annotations/io.kubernetes.cri-o.Devices", json!("/dev/kvm"), "annotation `io.kubernetes.cri-o.Devices` was added")]
#[case::owner("/metadata/ownerReferences", json!([]), "the owner references were changed")]
#[case::deadline("/spec/activeDeadlineSeconds", json!(86400), "`activeDeadlineSeconds` of the pod was changed from 900 to 86400")]
#[case::unknown("/spec/somethingNew", json!({"on": true}), "`somethingNew` of the pod was added")]
#[case::unknown_inside("/spec/containers/0/somethingNew", json!(1), "`somethingNew` of container `agent` was added")]
fn what_is_told_when_it_is_made(#[case] at: &str, #[case] value: Value, #[case] told: &str) {
    let (planned, answer) = answered();
    let found = differences(&planned, &with(answer, at, value));
    assert!(found.iter().any(|one| one.starts_with(told)), "{found:?}");
    // Values of variables may be secrets, so they are never reported.
    assert!(!found.concat().contains("secret"), "{found:?}");
}

#[test]
fn the_order_of_init_containers_counts() {
    let (planned, mut answer) = answered();
    answer["spec"]["initContainers"].as_array_mut().unwrap().reverse();
    assert_eq!(
        differences(&planned, &answer),
        ["the init containers run in another order than containment-probe, harness"]
    );
    assert!(altered(&serde_json::from_value(answer).unwrap()).unwrap().contains("in their order"));
}

#[test]
fn what_is_taken_away_is_told() {
    let (planned, mut answer) = answered();
    answer["spec"]["initContainers"].as_array_mut().unwrap().remove(0);
    answer["spec"]["securityContext"] = Value::Null;
    let found = differences(&planned, &answer);
    assert_eq!(found[0], "init container `containment-probe` was removed");
    assert!(found.contains(&"`securityContext` of the pod was removed".to_owned()), "{found:?}");
    assert!(
        altered(&serde_json::from_value(answer).unwrap())
            .unwrap()
            .contains("container `containment-probe` was removed")
    );
}

/// A pod of an operator version that recorded no plan, or recorded it differently, continues.
#[test]
fn a_pod_without_a_plan_is_not_judged_by_one() {
    let (_, answer) = answered();
    let injected = with(answer, "/spec/containers/-", json!({"name": "mesh", "image": "m"}));
    let altered = |plan: Value| {
        altered(&serde_json::from_value(with(injected.clone(), "/metadata/annotations/belay.dev~1plan", plan)).unwrap())
    };
    assert_eq!(altered(json!("")), None);
    let plan = injected["metadata"]["annotations"]["belay.dev/plan"].as_str().unwrap();
    assert!(altered(json!(plan)).is_some());
    assert_eq!(altered(json!(plan.replace("\"version\":1", "\"version\":2"))), None);
}

#[test]
fn a_cache_that_keeps_no_containers_remembers() {
    let mut live: Pod =
        serde_json::from_value(with(answered().1, "/spec/containers/-", json!({"name": "mesh", "image": "m"})))
            .unwrap();
    let told = altered(&live);
    remember(&mut live);
    live.spec = None;
    assert_eq!((altered(&live), told.as_deref()), (told.clone(), Some("container `mesh` was added")));
    // An annotation that another component wrote is ignored.
    let mut intact = planned();
    intact.annotations_mut().insert(ALTERED.into(), "a lie".into());
    remember(&mut intact);
    intact.spec = None;
    assert_eq!(altered(&intact), None);
}

#[test]
fn who_wrote_a_pod_since_is_told() {
    let fields = json!([
        {"manager": "belay-operator", "operation": "Update", "fieldsV1": {}},
        {"manager": "kubelet", "operation": "Update", "subresource": "status", "fieldsV1": {}},
        {"manager": "kubectl-patch", "operation": "Update", "fieldsV1": {}},
    ]);
    let answer =
        with(with(answered().1, "/spec/containers/0/image", json!("other")), "/metadata/managedFields", fields);
    assert_eq!(
        altered(&serde_json::from_value(answer).unwrap()).unwrap(),
        "container `agent` was changed; written since by kubectl-patch"
    );
}

/// The digests of one pod, as they were when the version was set. A change of their computation, or a Kubernetes version with new defaults,
/// needs a new version number: pods that run while the operator is upgraded must not count as altered.
#[test]
fn digests_of_a_version_stay() {
    let (planned, answer) = answered();
    assert_eq!(VERSION, 1);
    assert_eq!(planned.annotations()[names::PLAN], plan(planned.spec.as_ref().unwrap()));
    let answer: Pod = serde_json::from_value(answer).unwrap();
    assert_eq!(planned.annotations()[names::PLAN], plan(answer.spec.as_ref().unwrap()));
}

/// Collects the paths of all values, so that each field of the answer can be changed.
fn paths(value: &Value, at: &str, into: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(key, field)| paths(field, &format!("{at}/{}", key.replace('/', "~1")), into));
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(index, item)| paths(item, &format!("{at}/{index}"), into));
        }
        _ => into.push(at.to_owned()),
    }
}

proptest::proptest! {
    #[test]
    fn no_change_of_a_planned_value_is_missed(index in 0_usize..10_000, text in "[a-z]{1,8}") {
        let (planned, answer) = answered();
        let mut all = Vec::new();
        paths(&serde_json::to_value(&planned).unwrap()["spec"], "/spec", &mut all);
        let at = &all[index % all.len()];
        let mut changed = answer;
        if let Some(field) = changed.pointer_mut(at) {
            *field = json!(format!("{text}-changed"));
            proptest::prop_assert!(!differences(&planned, &changed).is_empty(), "{at}");
        }
    }

    #[test]
    fn anything_can_be_compared(key in "\\PC{0,12}", depth in 0_usize..4) {
        let (planned, answer) = answered();
        let mut value = json!([{ key.clone(): null }, key]);
        for _ in 0..depth {
            value = json!({ "x": value });
        }
        for at in ["/metadata", "/spec", "/spec/containers", "/spec/containers/0", "/spec/volumes", "/spec/containers/0/env"] {
            let mut changed = answer.clone();
            *changed.pointer_mut(at).unwrap() = value.clone();
            proptest::prop_assert!(!differences(&planned, &changed).is_empty(), "{at}");
        }
    }
}
