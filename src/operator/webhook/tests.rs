//! Tests each kind: valid, broken and with missing parts, at creation, update and deletion; and the connection.

use k8s_openapi::api::{
    admissionregistration::v1::ValidatingWebhookConfiguration,
    core::v1::{Namespace, Secret},
};
use kube::{
    core::{
        DynamicObject, PartialObjectMeta,
        admission::{AdmissionRequest, AdmissionReview},
    },
    runtime::{
        reflector::{Store, store},
        watcher::Event,
    },
};
use prometheus::Registry;
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::watch,
};
use tokio_rustls::TlsConnector;

use super::{judge::Verdict, *};
use crate::{
    api::{PolicyPack, ToolContract},
    lenient::Lenient,
    operator::{
        approvals::Undecided,
        bootstrap,
        cache::{Attempts, Stores},
        metrics::Metrics,
        tests::cluster::{self, Cluster},
    },
    render::fixtures,
};

/// What the caches hold in addition to the namespace `team-a`, whose pack is `dev`.
#[derive(Clone, Copy, PartialEq)]
enum Cache {
    /// The contracts and the pack.
    Whole,
    /// The pack only.
    NoContracts,
    /// The contracts only.
    NoPack,
    /// The contracts, the pack and another pack that selects the same namespace.
    TwoPacks,
    /// The contracts, one of which cannot be decoded, and the pack.
    Unreadable,
    /// The state before the first list is complete.
    Filling,
}

fn held<K>(objects: Vec<Value>, filled: bool) -> Store<K>
where
    K: kube::Resource<DynamicType = ()> + DeserializeOwned + Clone + 'static,
{
    let (reader, mut writer) = store();
    writer.apply_watcher_event(&Event::Init);
    objects.into_iter().for_each(|object| {
        writer.apply_watcher_event(&Event::InitApply(serde_json::from_value(object).unwrap()));
    });
    if filled {
        writer.apply_watcher_event(&Event::InitDone);
    }
    reader
}

fn values<T: Serialize>(objects: &[T]) -> Vec<Value> {
    objects.iter().map(|object| serde_json::to_value(object).unwrap()).collect()
}

fn judge(cache: Cache) -> Judge {
    Judge::new(watch::channel(stores(cache)).1, "belay-system".to_owned(), Metrics::new(&Registry::new()).unwrap())
}

fn stores(cache: Cache) -> Stores {
    let filled = cache != Cache::Filling;
    let mut contracts = values(&fixtures::contracts());
    let mut packs = values(&[fixtures::pack()]);
    match cache {
        Cache::NoContracts => contracts.clear(),
        Cache::NoPack => packs.clear(),
        Cache::TwoPacks => {
            let mut other = packs[0].clone();
            other["metadata"]["name"] = json!("also");
            packs.push(other);
        }
        Cache::Unreadable => contracts[0]["spec"]["sideEffect"] = json!("none"),
        Cache::Whole | Cache::Filling => {}
    }
    let namespace = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": "team-a", "labels": { "belay.dev/environment": "dev" } },
    });
    Stores {
        tasks: cluster::store().0,
        contracts: held::<Lenient<ToolContract>>(contracts, filled),
        packs: held::<Lenient<PolicyPack>>(packs, filled),
        namespaces: held::<PartialObjectMeta<Namespace>>(vec![namespace], filled),
        pods: cluster::store().0,
        network_policies: cluster::store().0,
        with_pod: Attempts::default(),
        with_network_policy: Attempts::default(),
        approvals: Undecided::default(),
        references_changed: Arc::default(),
        network_policies_changed: Arc::default(),
    }
}

fn task() -> Value {
    let mut task = serde_json::to_value(fixtures::task()).unwrap();
    task.as_object_mut().unwrap().remove("status");
    task
}

fn contract() -> Value {
    serde_json::to_value(&fixtures::contracts()[0]).unwrap()
}

fn pack() -> Value {
    serde_json::to_value(fixtures::pack()).unwrap()
}

/// Returns the object with another value at a JSON Pointer.
fn with(mut object: Value, pointer: &str, value: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match object.pointer_mut(parent).unwrap() {
        Value::Array(items) => items[key.parse::<usize>().unwrap()] = value,
        parent => parent[key] = value,
    }
    object
}

fn review(operation: &str, object: Value, old: Value) -> Value {
    let object_or_old = if object.is_null() { &old } else { &object };
    let kind = object_or_old["kind"].clone();
    json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "5d0e9c1a-0000-4000-8000-00000000000a",
            "kind": { "group": "belay.dev", "version": "v1alpha1", "kind": kind },
            "resource": { "group": "belay.dev", "version": "v1alpha1", "resource": "any" },
            "name": object_or_old["metadata"]["name"],
            "namespace": object_or_old["metadata"]["namespace"],
            "operation": operation,
            "userInfo": { "username": "alice" },
            "object": object, "oldObject": old, "dryRun": false,
        },
    })
}

fn verdict(cache: Cache, operation: &str, object: Value, old: Value) -> Verdict {
    verdict_of(&judge(cache), operation, object, old)
}

fn verdict_of(judge: &Judge, operation: &str, object: Value, old: Value) -> Verdict {
    let review: AdmissionReview<DynamicObject> = serde_json::from_value(review(operation, object, old)).unwrap();
    let request: AdmissionRequest<DynamicObject> = review.try_into().unwrap();
    stack::with_large_stack(|| judge.judge(&request)).unwrap()
}

/// Returns the findings of a denial.
fn denied(verdict: Verdict) -> Vec<String> {
    match verdict {
        Verdict::Denied(findings) => findings.iter().map(ToString::to_string).collect(),
        other => panic!("expected a refusal, found {other:?}"),
    }
}

const CEL: &str = "arg.title == 'x'";

#[rstest::rstest]
#[case::contract(contract(), Cache::Whole)]
#[case::contract_of_no_cache(contract(), Cache::Filling)]
#[case::pack(pack(), Cache::Whole)]
#[case::pack_that_is_new(pack(), Cache::NoPack)]
#[case::task(task(), Cache::Whole)]
fn what_is_in_order_is_created_and_changed(#[case] object: Value, #[case] cache: Cache) {
    assert_eq!(verdict(cache, "CREATE", object.clone(), Value::Null), Verdict::Allowed);
    let old = with(object.clone(), "/spec/description", json!("another"));
    assert_eq!(verdict(cache, "UPDATE", object, old), Verdict::Allowed);
}

#[rstest::rstest]
#[case::cel(
    with(contract(), "/spec/preconditions/0/cel", json!(CEL)),
    &["spec.preconditions[0].cel: expected a CEL expression over args, task, principal, usage, results, found unknown variable `arg` \
       (precondition `few`); correct the expression"]
)]
#[case::cel_types(
    with(contract(), "/spec/preconditions/0/cel", json!("args.titel == 'x'")),
    &["spec.preconditions[0].cel: expected an expression that can be `true`, found `titel`, which does not exist; there is `title` \
       (precondition `few`); correct the expression: as it is, it denies every call"]
)]
#[case::two_things(
    with(with(contract(), "/spec/input/type", json!("array")), "/spec/upstream/mcp/url", json!("tickets")),
    &["spec.upstream.mcp.url: ", "spec.input.type: "]
)]
#[case::not_of_the_type(
    with(contract(), "/spec/sideEffect", json!("none")),
    &["spec: expected a contract that this version of Belay can read, found unknown variant `none`"]
)]
#[case::pack_selector(
    with(pack(), "/spec/namespaceSelector", json!({ "matchExpressions": [{ "key": "a", "operator": "Near" }] })),
    &["spec.namespaceSelector: expected a valid label selector, found "]
)]
#[case::pack_quantity(
    with(pack(), "/spec/workflowClasses/0/resources/cpu", json!("fast")),
    &["spec.workflowClasses[incident].resources.cpu: expected a quantity above zero, such as `500m` or `512Mi`, found "]
)]
#[case::pack_rule(
    with(pack(), "/spec/rules", json!([{ "name": "never", "decision": "Allow", "when": "usage.tokens + 1" }])),
    &["spec.rules[0].when: expected an expression that can be `true` or `false`, found a number, which is never `true`; correct"]
)]
#[case::ceiling(
    with(task(), "/spec/limits/toolCalls", json!(101)),
    &["spec.limits.toolCalls: expected 0 to 100, the limit of class `incident`, found 101; correct it, or have the class's limit \
       raised in the pack"]
)]
#[case::class(
    with(task(), "/spec/workflowClass", json!("inciden")),
    &["spec.workflowClass: expected a class of PolicyPack `dev`: `incident`, found `inciden`; name one of them"]
)]
#[case::path_and_env(
    with(with(task(), "/spec/workspace/writeScopes/0/path", json!("/etc")), "/spec/agent/env/0/name", json!("HTTP_PROXY")),
    &["spec.agent.env[0].name: ", "spec.workspace.writeScopes[0].path: "]
)]
#[case::task_that_cannot_be_read(
    with(task(), "/spec/limits", json!({})),
    &["spec: expected a task that this version of Belay can read, found missing field `wallTimeSeconds`"]
)]
fn what_is_wrong_is_denied_with_every_finding(#[case] object: Value, #[case] expected: &[&str]) {
    let found = denied(verdict(Cache::Whole, "CREATE", object.clone(), Value::Null));
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "expected {expected}, found {found}");
    }
    // The same holds for an update that breaks a valid object, and for one that leaves an invalid object invalid.
    let good = match object["kind"].as_str() {
        Some("AgentTask") => task(),
        Some("ToolContract") => contract(),
        _ => pack(),
    };
    assert_eq!(denied(verdict(Cache::Whole, "UPDATE", object.clone(), good.clone())), found);
    assert_eq!(verdict(Cache::Whole, "UPDATE", good, object), Verdict::Allowed);
}

#[rstest::rstest]
#[case::contracts(Cache::NoContracts, &[
    "spec.tools[0]: expected the name of a ToolContract in namespace `team-a`, found `tickets`, which does not exist; apply that \
     ToolContract, or drop the tool",
    "spec.tools[1]: expected the name of a ToolContract in namespace `team-a`, found `read-log`, which does not exist; apply that \
     ToolContract, or drop the tool",
])]
#[case::pack(Cache::NoPack, &[
    "metadata.namespace: expected a namespace that exactly one PolicyPack selects, found none that does; label the namespace as a \
     pack's namespaceSelector asks, or apply a PolicyPack for it",
])]
#[case::packs_that_overlap(Cache::TwoPacks, &[
    "metadata.namespace: expected a namespace that exactly one PolicyPack selects, found `also`, `dev`; change the packs' \
     namespaceSelectors so that one of them remains",
])]
#[case::everything(Cache::Filling, &[
    "the webhook does not know all contracts and packs yet, so it did not check the task: see the task's status",
])]
fn a_task_whose_parts_may_still_come_is_allowed_with_a_warning(#[case] cache: Cache, #[case] expected: &[&str]) {
    for task in [task(), with(task(), "/spec/limits/toolCalls", json!(101))] {
        let expected = expected.iter().map(ToString::to_string).collect();
        assert_eq!(verdict(cache, "CREATE", task, Value::Null), Verdict::Warned(expected));
    }
}

#[test]
fn a_task_is_denied_for_a_contract_that_is_there_and_cannot_be_read() {
    let found = denied(verdict(Cache::Unreadable, "CREATE", task(), Value::Null));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].starts_with("ToolContract/tickets: expected a contract that this version of Belay can read, found ")
    );
}

#[test]
fn whoever_applies_a_pack_is_told_where_its_bases_lead() {
    let based = |url: &str| with(pack(), "/spec/models", json!({"openai": url}));
    let url = "https://models.world.test/openai/deployments/d?api-version=1";
    let Verdict::Warned(warnings) = verdict(Cache::Whole, "CREATE", based(url), Value::Null) else { panic!() };
    let goes = "https://models.world.test/openai/deployments/d/chat/completions?api-version=1";
    assert!(warnings.len() == 1 && warnings[0].ends_with(goes), "{warnings:?}");
    // The control: a base URL that is only a host needs no warning.
    assert_eq!(verdict(Cache::Whole, "CREATE", based("https://models.world.test"), Value::Null), Verdict::Allowed);
}

#[test]
fn no_task_runs_beside_the_operator() {
    let metrics = Metrics::new(&Registry::new()).unwrap();
    let judge = Judge::new(watch::channel(stores(Cache::Whole)).1, "team-a".to_owned(), metrics);
    let found = denied(verdict_of(&judge, "CREATE", task(), Value::Null));
    assert!(found[0].starts_with("metadata.namespace: expected a namespace for tasks, found `team-a`"), "{found:?}");
}

#[rstest::rstest]
#[case::contract(with(contract(), "/spec/preconditions/0/cel", json!(CEL)))]
#[case::pack(with(pack(), "/spec/workflowClasses/0/resources/cpu", json!("fast")))]
#[case::task(with(task(), "/spec/limits/toolCalls", json!(101)))]
#[case::unreadable(with(task(), "/spec/limits", json!({})))]
fn nothing_holds_up_an_end(#[case] broken: Value) {
    let labelled = with(broken.clone(), "/metadata/labels", json!({ "a": "b" }));
    let bare = with(broken.clone(), "/metadata/finalizers", json!([]));
    let mut ending = with(broken.clone(), "/metadata/deletionTimestamp", json!("2026-01-01T00:00:00Z"));
    ending["spec"]["description"] = json!("another");
    for (operation, object, old) in [
        ("UPDATE", labelled, broken.clone()),
        ("UPDATE", bare, broken.clone()),
        ("UPDATE", ending, broken.clone()),
        ("DELETE", Value::Null, broken.clone()),
        ("CONNECT", broken.clone(), Value::Null),
    ] {
        assert_eq!(verdict(Cache::Whole, operation, object, old), Verdict::Allowed, "{operation}");
    }
}

#[test]
fn of_other_kinds_it_says_that_it_knows_nothing() {
    let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "p" }, "spec": {} });
    let Verdict::Warned(warnings) = verdict(Cache::Whole, "CREATE", pod, Value::Null) else { panic!() };
    assert!(warnings[0].starts_with("expected an AgentTask, ToolContract or PolicyPack, found Pod"), "{warnings:?}");
}

fn answer(body: &[u8]) -> Result<Value, String> {
    let answered = stack::with_large_stack(|| judge(Cache::Whole).answer(body)).unwrap();
    answered.map(|bytes| serde_json::from_slice(&bytes).unwrap())
}

#[test]
fn answers_are_reviews() {
    let good = answer(review("CREATE", contract(), Value::Null).to_string().as_bytes()).unwrap();
    assert_eq!((&good["apiVersion"], &good["kind"]), (&json!("admission.k8s.io/v1"), &json!("AdmissionReview")));
    assert_eq!(good["response"]["uid"], "5d0e9c1a-0000-4000-8000-00000000000a");
    assert_eq!(good["response"]["allowed"], true);
    let bad = with(contract(), "/spec/preconditions/0/cel", json!(CEL));
    let bad = answer(review("CREATE", bad, Value::Null).to_string().as_bytes()).unwrap();
    assert_eq!(bad["response"]["allowed"], false);
    assert_eq!(bad["response"]["status"]["code"], 403);
    assert_eq!(bad["response"]["status"]["reason"], "Forbidden");
    let message = bad["response"]["status"]["message"].as_str().unwrap();
    assert!(message.starts_with("spec.preconditions[0].cel: expected a CEL expression"), "{message}");
    let missing = with(task(), "/spec/tools/0", json!("ticket"));
    let missing = answer(review("CREATE", missing, Value::Null).to_string().as_bytes()).unwrap();
    assert_eq!(missing["response"]["allowed"], true);
    assert!(missing["response"]["warnings"][0].as_str().unwrap().contains("`ticket`, which does not exist"));
}

#[test]
fn findings_are_listed_a_line_each_up_to_a_number() {
    let conditions: Vec<_> =
        (0..30).map(|index| json!({ "name": format!("c{index}"), "cel": CEL, "message": "m" })).collect();
    let many = with(contract(), "/spec/preconditions", json!(conditions));
    let answered = answer(review("CREATE", many, Value::Null).to_string().as_bytes()).unwrap();
    let lines: Vec<_> = answered["response"]["status"]["message"].as_str().unwrap().lines().collect();
    assert_eq!((lines.len(), lines[20]), (21, "and 10 more"));
}

#[rstest::rstest]
#[case(json!({}), "something else: missing field `apiVersion`")]
#[case(json!([1]), "something else: ")]
#[case(json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview" }), "one without a request")]
#[case(json!({ "apiVersion": "admission.k8s.io/v1beta1", "kind": "AdmissionReview" }), "AdmissionReview of admission.k8s.io/v1beta1")]
#[case(json!({ "apiVersion": "v1", "kind": "Pod" }), "Pod of v1")]
fn what_is_no_review_is_refused(#[case] body: Value, #[case] found: &str) {
    let expected = format!(
        "expected an AdmissionReview of admission.k8s.io/v1 with a request, as API servers send it, found {found}"
    );
    let why = answer(body.to_string().as_bytes()).unwrap_err();
    assert!(why.starts_with(&expected), "{why}");
}

/// Starts a webhook with the certificate that the leader created, and returns the authority that the API server gets.
async fn served() -> (std::net::SocketAddr, String, tempfile::TempDir) {
    let _ = ring::default_provider().install_default();
    let cluster = Cluster::default();
    let authority = bootstrap::ensure(&cluster.client(), "belay-system", true, jiff::Timestamp::now()).await.unwrap();
    let secret = cluster.get("/api/v1/namespaces/belay-system/secrets/belay-webhook-tls").unwrap();
    let secret: Secret = serde_json::from_value(secret).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in secret.data.unwrap() {
        std::fs::write(folder.path().join(name), bytes.0).unwrap();
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(listen(listener, folder.path().to_owned(), judge(Cache::Whole)));
    (address, authority, folder)
}

/// Sends a request as an API server does: with its authority, to the name of the Service.
async fn ask(address: std::net::SocketAddr, authority: &str, head: &str, body: &[u8]) -> String {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.as_bytes()).unwrap()).unwrap();
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let name = ServerName::try_from("belay-webhook.belay-system.svc").unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    let head = format!(
        "{head} HTTP/1.1\r\nhost: belay-webhook\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // The webhook may reject a request before it has read the whole body.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn an_api_server_is_answered_over_tls() {
    let (address, authority, _folder) = served().await;
    let asked = review("CREATE", with(contract(), "/spec/preconditions/0/cel", json!(CEL)), Value::Null).to_string();
    let answer = ask(address, &authority, "POST /validate?timeout=5s", asked.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("\"allowed\":false"), "{answer}");
    for (head, body, expected) in [
        ("POST /validate", &b"{"[..], "HTTP/1.1 400 Bad Request"),
        ("POST /mutate", b"{}", "HTTP/1.1 404 Not Found"),
        ("GET /validate", b"", "HTTP/1.1 405 Method Not Allowed"),
        ("POST /validate", &vec![b' '; LARGEST + 1], "HTTP/1.1 413 Payload Too Large"),
    ] {
        let answer = ask(address, &authority, head, body).await;
        assert!(answer.starts_with(expected), "{head}: {answer}");
    }
}

#[tokio::test]
async fn without_a_certificate_callers_are_turned_away_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(listen(listener, folder.path().to_owned(), judge(Cache::Whole)));
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut bytes = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut bytes)).await;
    assert!(ended.is_ok() && bytes.is_empty());
}

#[test]
fn the_api_server_is_told_the_authority_once() {
    let configuration = |bundles: [Option<&str>; 2]| -> ValidatingWebhookConfiguration {
        let webhook = |(index, bundle): (usize, Option<&str>)| {
            json!({
                "name": format!("w{index}.belay.dev"), "admissionReviewVersions": ["v1"], "sideEffects": "None",
                "clientConfig": {
                    "service": { "name": "belay-webhook", "namespace": "belay-system" },
                    "caBundle": bundle.map(|bundle| k8s_openapi::ByteString(bundle.into())),
                },
            })
        };
        let webhooks: Vec<_> = bundles.into_iter().enumerate().map(webhook).collect();
        serde_json::from_value(json!({
            "metadata": { "name": "belay-webhook", "resourceVersion": "7" }, "webhooks": webhooks,
        }))
        .unwrap()
    };
    let told = |name: &str| json!({ "name": name, "clientConfig": { "caBundle": "UEVN" } });
    let metadata = json!({ "resourceVersion": "7" });
    for (bundles, expected) in [
        ([Some("PEM"), Some("PEM")], None),
        ([Some("PEM"), None], Some(json!([told("w1.belay.dev")]))),
        ([Some("old"), None], Some(json!([told("w0.belay.dev"), told("w1.belay.dev")]))),
    ] {
        let expected = expected.map(|webhooks| json!({ "metadata": metadata, "webhooks": webhooks }));
        assert_eq!(super::trust::patch(&configuration(bundles), "PEM"), expected);
    }
}
