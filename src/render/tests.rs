use std::collections::BTreeMap;

use kube::ResourceExt;
use serde_json::json;

use super::{
    Finding, config_map,
    fixtures::{contracts, pack, surroundings, task},
    names, network_policy, pack_for, pod, rollback,
    validated::{Validated, validate},
};
use crate::{
    api::{
        AgentTask, PolicyPack, ToolContract,
        agent_task::{Agent, EnvVar},
        policy_pack::StatePolicy,
        tool_contract::{Compensation, Idempotency, Rollback, Upstream, VerifyRead},
    },
    policy::config::{EgressUse, HarnessConfig, HttpUpstream, RollbackOf, SideEffect},
};

fn labels(environment: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("belay.dev/environment".to_owned(), environment.to_owned())])
}

fn agent(task: &mut AgentTask) -> &mut Agent {
    task.spec.agent.as_mut().unwrap()
}

fn valid() -> Validated {
    validate(&task(), &contracts(), &pack(), "belay-system").unwrap()
}

#[test]
fn one_pack_governs_a_namespace() {
    let mut prod = pack();
    prod.metadata.name = Some("prod".into());
    prod.spec.namespace_selector.match_labels = Some(labels("prod"));
    let mut unreadable = pack();
    unreadable.metadata.name = Some("unreadable".into());
    unreadable.spec.namespace_selector =
        super::fixtures::read("matchExpressions: [{ key: a, operator: Matches, values: [b] }]");
    let packs = [pack(), prod, unreadable];
    assert_eq!(pack_for(&labels("dev"), &packs).unwrap().metadata.name.as_deref(), Some("dev"));
    assert_eq!(pack_for(&labels("prod"), &packs).unwrap().metadata.name.as_deref(), Some("prod"));
    insta::assert_snapshot!("no-pack", pack_for(&labels("stage"), &packs).unwrap_err());
    let twice = [pack(), pack()];
    insta::assert_snapshot!("two-packs", pack_for(&labels("dev"), &twice).unwrap_err());
}

#[test]
fn policy_is_rendered() {
    let policy = super::task::render_policy(&task(), &contracts(), &pack()).unwrap();
    insta::assert_json_snapshot!(policy);
}

#[test]
fn limits_that_a_task_leaves_out_are_those_of_its_class() {
    let limits = |asked: Option<(i64, &str)>, most: Option<(i64, &str)>| {
        let (mut task, mut pack) = (task(), pack());
        (task.spec.limits.denials, task.spec.limits.cost) = asked.map(|(n, sum)| (n, sum.to_owned())).unzip();
        let class = &mut pack.spec.workflow_classes[0].limits;
        (class.denials, class.cost) = most.map(|(n, sum)| (n, sum.to_owned())).unzip();
        let limits = super::task::render_policy(&task, &contracts(), &pack).unwrap().limits;
        limits.denials.zip(limits.cost_micros)
    };
    assert_eq!(limits(None, None), None);
    assert_eq!(limits(None, Some((9, "1.5"))), Some((9, 1_500_000)));
    assert_eq!(limits(Some((3, "0.5")), None), Some((3, 500_000)));
    assert_eq!(limits(Some((3, "0.5")), Some((9, "1.5"))), Some((3, 500_000)));
}

#[test]
fn prices_are_rendered_in_their_order() {
    let mut pack = pack();
    let price = |model| serde_json::from_value(json!({"model": model, "input": "1.25", "output": "10"})).unwrap();
    pack.spec.models.prices = vec![price("b*"), price("a")];
    let prices = super::task::render_policy(&task(), &contracts(), &pack).unwrap().models.prices;
    assert_eq!(prices.iter().map(|price| price.model.as_str()).collect::<Vec<_>>(), ["b*", "a"]);
    assert_eq!((prices[0].input_micros, prices[0].output_micros), (1_250_000, 10_000_000));
}

#[test]
fn endpoints_that_a_class_reaches_are_rendered_and_what_they_may_do() {
    let mut pack = pack();
    let models = json!({
        "endpoints": [
            {"models": ["far-*"], "api": "openai", "url": "https://far.test/v1"},
            {"models": ["gpt-*", "o3"], "api": "openai", "url": "https://models.world.test/v1?a=b", "streamUsage": "AsWritten", "allow": ["web_search", "mcp", "web_search"]},
            {"models": ["claude-*"], "api": "anthropic", "url": "https://models.world.test"},
        ],
        "allow": ["stored", "files", "stored"], "unknownMembers": "Pass", "storeReplies": "Never",
        "prices": [{"model": "vllm", "input": "0", "output": "0", "contextTokens": 4096, "maxOutputTokens": 512}],
    });
    pack.spec.models = serde_json::from_value(models).unwrap();
    let models = super::task::render_policy(&task(), &contracts(), &pack).unwrap().models;
    let urls: Vec<_> = models.endpoints.iter().map(|entry| entry.url.as_str()).collect();
    assert_eq!(urls, ["https://models.world.test/v1?a=b", "https://models.world.test"]);
    // Each capability once, in an order that does not depend on the pack's order.
    assert_eq!(serde_json::to_value(&models.endpoints[0].allow).unwrap(), json!(["mcp", "web_search"]));
    assert_eq!(serde_json::to_value(&models.allow).unwrap(), json!(["files", "stored"]));
    assert_eq!(serde_json::to_value(models.unknown_members).unwrap(), "Pass");
    assert_eq!(serde_json::to_value(models.store_replies).unwrap(), "Never");
    let usage: Vec<_> = models.endpoints.iter().map(|entry| entry.stream_usage.is_ask()).collect();
    assert_eq!((usage, models.stream_usage.is_ask()), (vec![false, true], true));
    assert_eq!((models.prices[0].context_tokens, models.prices[0].max_output_tokens), (Some(4096), Some(512)));
    // Fields that the pack does not set are not in the policy, so its digest does not change.
    let policy = super::task::render_policy(&task(), &contracts(), &self::pack()).unwrap();
    assert_eq!(serde_json::to_value(&policy.models).unwrap(), json!({"openai": "https://models.world.test"}));
}

/// Calls are made with the first credential for the principal. Without one, no call leaves.
#[rstest::rstest]
#[case::nobody_in_particular(json!([{"secret": "any", "key": "k"}]), Some("any/k"), false)]
#[case::by_name(json!([{"secret": "a", "key": "k", "principals": ["alice@example.test"]}]), Some("a/k"), false)]
#[case::by_beginning(json!([{"secret": "a", "key": "k", "principals": ["alice@*"]}]), Some("a/k"), false)]
#[case::the_first(json!([{"secret": "a", "key": "k"}, {"secret": "b", "key": "k"}]), Some("a/k"), false)]
#[case::not_the_others(
    json!([{"secret": "b", "key": "k", "principals": ["bob*"]}, {"secret": "a", "key": "k"}]), Some("a/k"), false
)]
#[case::for_others(json!([{"secret": "b", "key": "k", "principals": ["bob*"]}]), None, true)]
#[case::none(json!([]), None, false)]
fn credentials_are_principals(
    #[case] credentials: serde_json::Value,
    #[case] expected: Option<&str>,
    #[case] barred: bool,
) {
    let mut pack = pack();
    let mut extra = pack.spec.workflow_classes[0].egress[0].clone();
    (extra.host, extra.credentials) = ("api.test".into(), serde_json::from_value(credentials).unwrap());
    pack.spec.workflow_classes[0].egress.push(extra);
    let policy = super::task::render_policy(&task(), &contracts(), &pack).unwrap();
    let host = policy.egress.last().unwrap();
    assert_eq!((host.credential.as_deref(), host.barred), (expected, barred));
}

/// A pack that forbids everything stops the task's calls, not its evidence: the gateway still has a policy.
#[test]
fn a_pack_that_forbids_everything_is_still_rendered() {
    let mut pack = pack();
    pack.spec.rules = serde_json::from_value(json!([
        {"name": "all", "decision": "Allow"}, {"name": "freeze", "decision": "Deny"},
    ]))
    .unwrap();
    let policy = super::task::render_policy(&task(), &contracts(), &pack).unwrap();
    assert_eq!(policy.access.rules.len(), 2);
    let found = validate(&task(), &contracts(), &pack, "belay-system").unwrap_err();
    assert!(found.iter().all(|finding| finding.found.contains("rule freeze denies")), "{found:?}");
}

#[test]
fn rendering_does_not_depend_on_order() {
    let policy = super::task::render_policy(&task(), &contracts(), &pack()).unwrap();
    let mut other = task();
    other.spec.tools.reverse();
    let mut reversed = contracts();
    reversed.reverse();
    let again = super::task::render_policy(&other, &reversed, &pack()).unwrap();
    assert_eq!(policy.digest().unwrap(), again.digest().unwrap());
    assert_eq!(policy.digest().unwrap(), valid().policy_digest());
}

#[test]
fn objects_are_built() {
    let (task, surroundings) = (valid(), surroundings());
    let attempt = task.attempt(&surroundings, 2).unwrap();
    let config_map = config_map::build(&attempt);
    let planned = network_policy::build(&attempt);
    let proof = network_policy::prove(&planned, &planned).unwrap();
    insta::assert_yaml_snapshot!("config-map-metadata", config_map.metadata);
    assert_eq!(config_map.immutable, Some(true));
    insta::assert_yaml_snapshot!("network-policy", planned);
    insta::assert_yaml_snapshot!("pod", pod::build(&attempt, &proof));
    let bytes = config_map.data.unwrap().remove(config_map::KEY).unwrap();
    let config: HarnessConfig = serde_json::from_str(&bytes).unwrap();
    insta::assert_json_snapshot!("wiring", config.wiring);
    assert_eq!(bytes.as_bytes(), crate::canonical::to_bytes(&config).unwrap());
    assert_eq!(config.policy.digest().unwrap(), task.policy_digest());
}

#[test]
fn an_altered_network_policy_proves_nothing() {
    let (task, surroundings) = (valid(), surroundings());
    let planned = network_policy::build(&task.attempt(&surroundings, 1).unwrap());
    let mut wider = planned.clone();
    wider.spec.as_mut().unwrap().egress = Some(vec![Default::default()]);
    assert!(network_policy::prove(&planned, &wider).is_err());
    let mut one_way = planned.clone();
    one_way.spec.as_mut().unwrap().policy_types = Some(vec!["Egress".into()]);
    assert!(network_policy::prove(&planned, &one_way).is_err());
    let mut other = planned.clone();
    other.metadata.name = Some("triage-2".into());
    assert!(network_policy::prove(&planned, &other).is_err());
}

#[test]
fn what_runtimes_leave_open_is_covered_unless_declared() {
    let covers = |scopes: &[&str]| {
        let mut task = task();
        task.spec.workspace.mounts.clear();
        let size = |path| serde_json::from_value(json!({"path": path, "size": "1Mi"})).unwrap();
        task.spec.workspace.write_scopes = scopes.iter().map(size).collect();
        let (valid, surroundings) = (validate(&task, &contracts(), &pack(), "belay-system").unwrap(), surroundings());
        let attempt = valid.attempt(&surroundings, 1).unwrap();
        let planned = network_policy::build(&attempt);
        let spec = pod::build(&attempt, &network_policy::prove(&planned, &planned).unwrap()).spec.unwrap();
        let mounts = spec.containers[0].volume_mounts.clone().unwrap();
        let covers = mounts.into_iter().filter(|one| one.name == "cover");
        covers.inspect(|one| assert_eq!(one.read_only, Some(true))).map(|one| one.mount_path).collect::<Vec<_>>()
    };
    assert_eq!(covers(&["/workspace"]), ["/dev/shm", "/tmp"]);
    assert_eq!(covers(&["/tmp"]), ["/dev/shm"]);
    assert_eq!(covers(&["/tmp", "/dev/shm"]), [""; 0]);
}

fn http(method: &str, url: &str, query: &[&str]) -> Option<HttpUpstream> {
    serde_json::from_value(json!({"method": method, "url": url, "query": query})).unwrap()
}

fn over_http(contracts: &mut [ToolContract], method: &str, url: &str, query: &[&str]) {
    contracts[0].spec.upstream = Upstream { mcp: None, http: http(method, url, query) };
}

#[test]
fn an_http_tool_is_rendered() {
    let mut contracts = contracts();
    over_http(&mut contracts, "GET", "https://tickets.world.test/tickets/{title}", &[]);
    contracts[0].spec.output = Some(json!({"type": "object"}));
    contracts[0].spec.limits.calls = Some(3);
    let policy = super::task::render_policy(&task(), &contracts, &pack()).unwrap();
    let tool = serde_json::to_value(&policy.tools[1]).unwrap();
    assert_eq!(
        tool["upstream"],
        json!({"http": {"method": "GET", "url": "https://tickets.world.test/tickets/{title}"}})
    );
    assert_eq!((&tool["output"], &tool["limits"]), (&json!({"type": "object"}), &json!({"calls": 3})));
}

fn asked_by(task: &mut AgentTask) {
    task.annotations_mut().insert(names::REQUESTED_BY.into(), "ci".into());
}

fn idempotency(argument: Option<&str>, header: Option<&str>) -> Option<Idempotency> {
    Some(Idempotency { argument: argument.map(Into::into), header: header.map(Into::into), window_seconds: 60 })
}

/// The approval wait is set only if calls may require approval.
#[test]
fn people_are_given_a_day_unless_somebody_says() {
    let wait = |approval: bool, asked: Option<i64>, most: Option<i64>| {
        let (mut task, mut contracts, mut pack) = (task(), contracts(), pack());
        asked_by(&mut task);
        contracts[0].spec.approval =
            approval.then(|| serde_json::from_value(json!({"approvers": {"groups": ["g"]}})).unwrap());
        task.spec.limits.approval_wait_seconds = asked;
        pack.spec.workflow_classes[0].limits.approval_wait_seconds = most;
        let policy = super::task::render_policy(&task, &contracts, &pack).unwrap();
        assert_eq!(policy.task.requester.as_deref(), Some("ci"));
        policy.limits.approval_wait_seconds
    };
    assert_eq!(wait(false, Some(60), Some(60)), 0);
    assert_eq!(wait(true, None, None), 86_400);
    assert_eq!(wait(true, None, Some(60)), 60);
    assert_eq!(wait(true, Some(30), Some(60)), 30);
}

type Break = fn(&mut AgentTask, &mut Vec<ToolContract>, &mut PolicyPack);

/// What is broken, and the field that a finding must name.
const BROKEN: &[(&str, &str, Break)] = &[
    ("unknown class", "spec.workflowClass", |t, _, _| t.spec.workflow_class = "other".into()),
    ("wall time", "spec.limits.wallTimeSeconds", |t, _, _| t.spec.limits.wall_time_seconds = 3601),
    ("no wall time", "spec.limits.wallTimeSeconds", |t, _, _| t.spec.limits.wall_time_seconds = 0),
    ("calls", "spec.limits.toolCalls", |t, _, _| t.spec.limits.tool_calls = 101),
    ("negative calls", "spec.limits.toolCalls", |t, _, _| t.spec.limits.tool_calls = -1),
    ("tokens", "spec.limits.tokens", |t, _, _| t.spec.limits.tokens = i64::MAX),
    ("denials", "spec.limits.denials", |t, _, p| {
        t.spec.limits.denials = Some(51);
        p.spec.workflow_classes[0].limits.denials = Some(50);
    }),
    ("no denials", "spec.limits.denials", |t, _, _| t.spec.limits.denials = Some(0)),
    ("cost", "spec.limits.cost", |t, _, p| {
        t.spec.limits.cost = Some("2.000001".into());
        p.spec.workflow_classes[0].limits.cost = Some("2".into());
    }),
    ("no sum", "spec.limits.cost", |t, _, _| t.spec.limits.cost = Some("1e3".into())),
    ("no sum of the class", "PolicyPack spec.workflowClasses[incident].limits.cost", |_, _, p| {
        p.spec.workflow_classes[0].limits.cost = Some("-1".into());
    }),
    ("no price", "PolicyPack/dev spec.models.prices[0].output", |_, _, p| {
        p.spec.models.prices =
            vec![serde_json::from_value(json!({"model": "m", "input": "1.25", "output": "ten"})).unwrap()];
    }),
    ("unknown tool", "spec.tools[2]", |t, _, _| t.spec.tools.push("missing".into())),
    ("a contract elsewhere", "spec.tools[0]", |_, c, _| c[0].metadata.namespace = Some("team-b".into())),
    ("same tool twice", "spec.tools[1]", |_, c, _| c[1].spec.tool = "open_ticket".into()),
    ("effect", "ToolContract/tickets spec.sideEffect", |_, c, _| c[0].spec.side_effect = SideEffect::External),
    ("cel", "ToolContract/tickets spec.preconditions[0].cel", |_, c, _| {
        c[0].spec.preconditions[0].cel = "usage.".into()
    }),
    ("cel variable", "ToolContract/tickets spec.preconditions[0].cel", |_, c, _| {
        c[0].spec.preconditions[0].cel = "arguments.x".into();
    }),
    ("schema", "ToolContract/tickets spec.input.properties.title.type", |_, c, _| {
        c[0].spec.input = json!({"type":"object","properties":{"title":{"type":"text"}}});
    }),
    ("schema type", "ToolContract/tickets spec.input.type", |_, c, _| c[0].spec.input = json!({"type":"array"})),
    ("upstream host", "ToolContract/tickets spec.upstream.mcp.url", |_, c, _| {
        c[0].spec.upstream.mcp.as_mut().unwrap().url = "https://evil.test/mcp".into();
    }),
    ("upstream two levels", "ToolContract/tickets spec.upstream.mcp.url", |_, c, _| {
        c[0].spec.upstream.mcp.as_mut().unwrap().url = "https://a.tickets.world.test/mcp".into();
    }),
    ("upstream port", "ToolContract/tickets spec.upstream.mcp.url", |_, c, _| {
        c[0].spec.upstream.mcp.as_mut().unwrap().url = "http://tickets.world.test/mcp".into();
    }),
    ("upstream user", "ToolContract/tickets spec.upstream.mcp.url", |_, c, _| {
        c[0].spec.upstream.mcp.as_mut().unwrap().url = "https://tickets.world.test@evil.test/mcp".into();
    }),
    ("upstream neither", "ToolContract/tickets spec.upstream", |_, c, _| c[0].spec.upstream.mcp = None),
    ("upstream both", "ToolContract/tickets spec.upstream", |_, c, _| {
        c[0].spec.upstream.http = http("GET", "https://tickets.world.test/", &[]);
    }),
    ("idempotency by what may be missing", "ToolContract/tickets spec.idempotency.argument", |_, c, _| {
        c[0].spec.idempotency = idempotency(Some("severity"), None);
    }),
    ("idempotency in a header over mcp", "ToolContract/tickets spec.idempotency.header", |_, c, _| {
        c[0].spec.idempotency = idempotency(None, Some("idempotency-key"));
    }),
    ("idempotency in a header that is taken", "ToolContract/tickets spec.idempotency.header", |_, c, _| {
        over_http(c, "POST", "https://tickets.world.test/", &[]);
        c[0].spec.idempotency = idempotency(None, Some("authorization"));
    }),
    ("approval by nobody", "ToolContract/tickets spec.approval.approvers", |t, c, _| {
        asked_by(t);
        c[0].spec.approval = serde_json::from_value(json!({"approvers": {}})).unwrap();
    }),
    ("approval by no cel", "ToolContract/tickets spec.approval.when", |t, c, _| {
        asked_by(t);
        c[0].spec.approval = serde_json::from_value(json!({"approvers": {"users": ["a"]}, "when": "args."})).unwrap();
    }),
    ("approval by more than there may be", "ToolContract/tickets spec.approval.required", |t, c, _| {
        asked_by(t);
        c[0].spec.approval = serde_json::from_value(json!({"approvers": {"users": ["a"]}, "required": 17})).unwrap();
    }),
    ("approval and nobody who asked", "metadata.annotations[belay.dev/requested-by]", |_, c, _| {
        c[0].spec.approval = serde_json::from_value(json!({"approvers": {"users": ["a"]}})).unwrap();
    }),
    ("more waiting than the class gives", "spec.limits.approvalWaitSeconds", |t, c, p| {
        asked_by(t);
        c[0].spec.approval = serde_json::from_value(json!({"approvers": {"users": ["a"]}})).unwrap();
        t.spec.limits.approval_wait_seconds = Some(61);
        p.spec.workflow_classes[0].limits.approval_wait_seconds = Some(60);
    }),
    ("verification by a tool that the task does not have", "ToolContract/tickets spec.verify.tool", |_, c, _| {
        c[0].spec.verify = serde_json::from_value(json!({"tool": "find", "applied": "result.found"})).unwrap();
    }),
    ("verification by a tool that changes things", "ToolContract/tickets spec.verify.tool", |_, c, _| {
        c[1].spec.side_effect = SideEffect::Write;
        c[0].spec.verify = serde_json::from_value(json!({"tool": "a_read_log", "applied": "result.found"})).unwrap();
    }),
    ("verification by no cel", "ToolContract/tickets spec.verify.applied", |_, c, _| {
        c[0].spec.verify = serde_json::from_value(json!({"tool": "a_read_log", "applied": "result."})).unwrap();
    }),
    ("credentials for others", "ToolContract/tickets spec.upstream.mcp.url", |_, _, p| {
        p.spec.workflow_classes[0].egress[0].credentials =
            serde_json::from_value(json!([{"secret": "s", "key": "k", "principals": ["bob*"]}])).unwrap();
    }),
    ("a tool that no rule allows", "ToolContract/tickets spec.tool", |_, _, p| {
        p.spec.rules =
            serde_json::from_value(json!([{"name": "logs", "tools": ["a_read_log"], "decision": "Allow"}])).unwrap();
    }),
    ("a tool that a rule forbids", "ToolContract/tickets spec.tool", |_, _, p| {
        p.spec.rules = serde_json::from_value(json!([
            {"name": "all", "decision": "Allow"},
            {"name": "alice", "principals": ["alice@*"], "effects": ["write"], "decision": "Deny"},
        ]))
        .unwrap();
    }),
    ("a rule that asks, and nobody who asked", "metadata.annotations[belay.dev/requested-by]", |_, _, p| {
        p.spec.rules = serde_json::from_value(json!([{"name": "all", "decision": "RequireApproval"}])).unwrap();
        p.spec.approval = serde_json::from_value(json!({"approvers": {"users": ["a"]}})).unwrap();
    }),
    ("a rule over results", "PolicyPack/dev spec.rules[0].when", |_, _, p| {
        p.spec.rules =
            serde_json::from_value(json!([{"name": "all", "decision": "Allow", "when": "results.x == 1"}])).unwrap();
    }),
    ("a pattern that is none", "PolicyPack/dev spec.classification[0].pattern", |_, _, p| {
        p.spec.classification =
            serde_json::from_value(json!([{"name": "a", "pattern": "(", "sensitivity": "Internal"}])).unwrap();
    }),
    ("two rules of one name", "PolicyPack/dev spec.rules", |_, _, p| {
        let rule = json!({"name": "all", "decision": "Allow"});
        p.spec.rules = serde_json::from_value(json!([rule, rule])).unwrap();
    }),
    ("pin", "ToolContract/tickets spec.upstream.mcp.digest", |_, c, _| {
        c[0].spec.upstream.mcp.as_mut().unwrap().digest = Some("AB".repeat(32));
    }),
    ("http template", "ToolContract/tickets spec.upstream.http.url", |_, c, _| {
        over_http(c, "POST", "https://tickets.world.test/{title}{title}", &[]);
    }),
    ("http host as an argument", "ToolContract/tickets spec.upstream.http.url", |_, c, _| {
        over_http(c, "POST", "https://{title}.world.test/", &[]);
    }),
    ("http host", "ToolContract/tickets spec.upstream.http.url", |_, c, _| {
        over_http(c, "POST", "https://evil.test/{title}", &[]);
    }),
    ("http argument that is not there", "ToolContract/tickets spec.input.properties.other.type", |_, c, _| {
        over_http(c, "POST", "https://tickets.world.test/{title}", &["other"]);
    }),
    ("http argument that is an object", "ToolContract/tickets spec.input.properties.title.type", |_, c, _| {
        over_http(c, "POST", "https://tickets.world.test/{title}", &[]);
        c[0].spec.input["properties"]["title"] = json!({"type": "object"});
    }),
    ("http path argument that may be missing", "ToolContract/tickets spec.input.required", |_, c, _| {
        over_http(c, "POST", "https://tickets.world.test/{title}", &[]);
        c[0].spec.input["required"] = json!([]);
    }),
    ("http argument without a place", "ToolContract/tickets spec.input.properties.title", |_, c, _| {
        over_http(c, "GET", "https://tickets.world.test/", &[]);
    }),
    ("http schema that allows more", "ToolContract/tickets spec.input.additionalProperties", |_, c, _| {
        over_http(c, "DELETE", "https://tickets.world.test/{title}", &[]);
        c[0].spec.input["additionalProperties"] = json!(true);
    }),
    ("http schema that allows patterns", "ToolContract/tickets spec.input.additionalProperties", |_, c, _| {
        over_http(c, "GET", "https://tickets.world.test/{title}", &[]);
        c[0].spec.input["patternProperties"] = json!({"^x": {"type": "string"}});
    }),
    ("output", "ToolContract/tickets spec.output.type", |_, c, _| c[0].spec.output = Some(json!({"type": "array"}))),
    ("output elsewhere", "ToolContract/tickets spec.output.properties.a.$ref", |_, c, _| {
        c[0].spec.output = Some(json!({"type": "object", "properties": {"a": {"$ref": "https://evil.test/x"}}}));
    }),
    ("limit calls", "ToolContract/tickets spec.limits.calls", |_, c, _| c[0].spec.limits.calls = Some(-1)),
    ("limit rate", "ToolContract/tickets spec.limits.perMinute", |_, c, _| c[0].spec.limits.per_minute = Some(0)),
    ("limit time", "ToolContract/tickets spec.limits.timeoutSeconds", |_, c, _| {
        c[0].spec.limits.timeout_seconds = Some(301);
    }),
    ("limit request", "ToolContract/tickets spec.limits.requestBytes", |_, c, _| {
        c[0].spec.limits.request_bytes = Some(1)
    }),
    ("limit reply", "ToolContract/tickets spec.limits.responseBytes", |_, c, _| {
        c[0].spec.limits.response_bytes = Some(1 << 30);
    }),
    ("upstream for another use", "ToolContract/tickets spec.upstream.mcp.url", |_, _, p| {
        p.spec.workflow_classes[0].egress[0].uses = vec![EgressUse::Direct];
    }),
    ("models out of reach", "PolicyPack/dev spec.models", |_, _, p| {
        p.spec.models.openai = Some("https://other.test".into())
    }),
    ("egress port", "PolicyPack/dev spec.workflowClasses[incident].egress[3].ports", |_, _, p| {
        let mut rule = p.spec.workflow_classes[0].egress[0].clone();
        rule.ports = vec![443, 65536];
        p.spec.workflow_classes[0].egress.push(rule);
    }),
    ("system namespace", "metadata.namespace", |t, c, _| {
        t.metadata.namespace = Some("belay-system".into());
        c.iter_mut().for_each(|contract| contract.metadata.namespace = Some("belay-system".into()));
    }),
    ("memory", "spec.agent.resources.memory", |t, _, _| agent(t).resources.memory = Some("513Mi".into())),
    ("cpu spelling", "spec.agent.resources.cpu", |t, _, _| agent(t).resources.cpu = Some("0.5m".into())),
    ("class quantity", "PolicyPack spec.workflowClasses[incident].resources.cpu", |_, _, p| {
        p.spec.workflow_classes[0].resources.cpu = Some("0".into());
    }),
    ("env openai", "spec.agent.env[0].name", |t, _, _| agent(t).env[0].name = "OPENAI_BASE_URL".into()),
    ("env proxy", "spec.agent.env[0].name", |t, _, _| agent(t).env[0].name = "https_Proxy".into()),
    ("env twice", "spec.agent.env[1].name", |t, _, _| {
        let again = agent(t).env[0].clone();
        agent(t).env.push(again);
    }),
    ("two sources", "spec.workspace.mounts[0]", |t, _, _| t.spec.workspace.mounts[0].secret = Some("x".into())),
    ("within /dev/shm", "spec.workspace.mounts[0].path", |t, _, _| {
        t.spec.workspace.mounts[0].path = "/dev/shm/x".into()
    }),
    ("around /dev/shm", "spec.workspace.mounts[0].path", |t, _, _| t.spec.workspace.mounts[0].path = "/dev".into()),
    ("no source", "spec.workspace.mounts[0]", |t, _, _| t.spec.workspace.mounts[0].config_map = None),
    ("same path", "spec.workspace.mounts[1].path", |t, _, _| {
        t.spec.workspace.mounts[1].path = "/workspace/input".into()
    }),
    ("nested path", "spec.workspace.mounts[1].path", |t, _, _| t.spec.workspace.mounts[1].path = "/workspace".into()),
    ("token path", "spec.workspace.mounts[0].path", |t, _, _| {
        t.spec.workspace.mounts[0].path = "/var/run/belay/x".into()
    }),
    ("parent of a reserved path", "spec.workspace.writeScopes[0].path", |t, _, _| {
        t.spec.workspace.write_scopes[0].path = "/var".into();
    }),
    ("proc", "spec.workspace.writeScopes[0].path", |t, _, _| {
        t.spec.workspace.write_scopes[0].path = "/proc/sys".into()
    }),
    ("dots", "spec.workspace.mounts[0].path", |t, _, _| t.spec.workspace.mounts[0].path = "/workspace/../x".into()),
    ("scope in a mount", "spec.workspace.writeScopes[0].path", |t, _, _| {
        t.spec.workspace.write_scopes[0].path = "/workspace/input/out".into();
    }),
    ("scope size", "spec.workspace.writeScopes[0].size", |t, _, _| {
        t.spec.workspace.write_scopes[0].size = "0Mi".into()
    }),
    ("scopes together", "spec.workspace.writeScopes", |t, _, _| t.spec.workspace.write_scopes[0].size = "257Mi".into()),
    ("too much policy", "spec.tools", |_, c, _| c[0].spec.description = "x".repeat(600 * 1024)),
];

#[test]
fn every_wrong_field_is_named() {
    let mut messages = Vec::new();
    for (what, field, break_it) in BROKEN {
        let (mut task, mut contracts, mut pack) = (task(), contracts(), pack());
        break_it(&mut task, &mut contracts, &mut pack);
        let findings = validate(&task, &contracts, &pack, "belay-system").err().unwrap_or_default();
        assert_eq!(findings.iter().map(|f| f.field.as_str()).collect::<Vec<_>>(), [*field], "{what}: {findings:?}");
        messages.extend(findings.iter().map(Finding::to_string));
    }
    insta::assert_snapshot!("findings", messages.join("\n"));
}

/// A task may set every variable that Belay does not set, including other variables of SDKs.
#[test]
fn variables_of_sdks_are_the_tasks_own_but_for_those_that_belay_sets() {
    let (mut task, contracts, pack) = (task(), contracts(), pack());
    agent(&mut task).env.clear();
    let own = validate(&task, &contracts, &pack, "belay-system").unwrap().agent(1).env;
    let own: Vec<String> = own.into_iter().map(|(name, _)| name).collect();
    assert!(own.len() > 10, "{own:?}");
    for name in own {
        agent(&mut task).env = vec![EnvVar { name: name.clone(), value: "x".into() }];
        let refused = validate(&task, &contracts, &pack, "belay-system").unwrap_err();
        assert!(refused[0].found.contains(&name), "{refused:?}");
    }
    for name in ["OPENAI_MODEL", "OPENAI_AGENTS_DISABLE_TRACING", "ANTHROPIC_MODEL", "ALL_PROXY", "KUBERNETES_X"] {
        agent(&mut task).env = vec![EnvVar { name: name.into(), value: "x".into() }];
        validate(&task, &contracts, &pack, "belay-system").unwrap();
    }
}

#[test]
fn everything_wrong_is_found_at_once() {
    let (mut task, mut contracts, pack) = (task(), contracts(), pack());
    task.spec.limits.tokens = -1;
    agent(&mut task).env[0].name = "BELAY_TASK".into();
    contracts[0].spec.input = json!({});
    contracts[0].spec.side_effect = SideEffect::External;
    assert_eq!(validate(&task, &contracts, &pack, "belay-system").unwrap_err().len(), 4);
}

#[test]
fn a_class_without_models_has_none() {
    let mut pack = pack();
    pack.spec.workflow_classes[0].egress.truncate(2);
    let policy = super::task::render_policy(&task(), &contracts(), &pack).unwrap();
    assert_eq!(policy.models, Default::default());
}

proptest::proptest! {
    /// Accepted paths never hide a reserved path, and no two of them overlap.
    #[test]
    fn accepted_paths_never_overlap(paths in proptest::collection::vec("(/(a|b|etc|proc|run|belay|var|\\.\\.|))|(/(a|b|run)){1,3}", 1..5)) {
        let mut task = task();
        task.spec.workspace.mounts = paths.iter()
            .map(|path| serde_json::from_value(json!({ "path": path, "configMap": "x" })).unwrap()).collect();
        if let Ok(valid) = validate(&task, &contracts(), &pack(), "belay-system") {
            for (i, one) in valid.mounts.iter().enumerate() {
                proptest::prop_assert!(!one.path.0.contains("..") && !one.path.0.starts_with("/etc") && !one.path.0.starts_with("/proc"));
                for other in valid.mounts.iter().skip(i + 1) {
                    let (one, other) = (format!("{}/", one.path.0), format!("{}/", other.path.0));
                    proptest::prop_assert!(!one.starts_with(&other) && !other.starts_with(&one));
                }
            }
        }
    }
}

/// The contract `tickets` with a compensation, and the compensation's contract, which verifies by another tool.
fn undone() -> Vec<ToolContract> {
    let mut all = contracts();
    let (mut close, mut look) = (all[0].clone(), all[1].clone());
    let call = Compensation { contract: "close".into(), arguments: BTreeMap::new(), within_seconds: None };
    all[0].spec.rollback = Some(Rollback { call: Some(call), by_hand: None });
    (close.metadata.name, close.spec.tool) = (Some("close".into()), "close_ticket".into());
    close.spec.verify = Some(VerifyRead {
        tool: "look_at_ticket".into(),
        arguments: BTreeMap::new(),
        applied: "result.closed".into(),
        settle_seconds: 10,
    });
    (look.metadata.name, look.spec.tool) = (Some("look".into()), "look_at_ticket".into());
    // A contract of the same name in another namespace verifies by another tool. A second contract here describes the same tool.
    let (mut elsewhere, mut again) = (close.clone(), look.clone());
    (elsewhere.metadata.namespace, again.metadata.name) = (Some("team-b".into()), Some("look-2".into()));
    elsewhere.spec.verify.as_mut().unwrap().tool = "a_read_log".into();
    all.extend([elsewhere, close, again, look]);
    all
}

#[test]
fn a_task_is_undone_by_a_task_with_what_undoes() {
    let of = task();
    let compensation_commitment =
        |of: &AgentTask, all: &[ToolContract]| rollback::task(of, rollback::contracts(of, all), all, "bob", "ci");
    assert_eq!(compensation_commitment(&of, &contracts()), None, "no contract says how");
    let made = compensation_commitment(&of, &undone()).unwrap();
    assert_eq!(made.spec.tools, ["close", "look"], "what undoes, and one contract for what that verifies by");
    assert_eq!((made.name_any().as_str(), made.namespace().as_deref()), ("triage-rollback", Some("team-a")));
    assert_eq!((made.spec.principal.as_str(), made.spec.limits.tokens), ("bob", 0));
    assert_eq!(made.annotations()[names::REQUESTED_BY], "ci");
    assert_eq!(compensation_commitment(&made, &undone()), None, "a rollback is not rolled back");
    let long = |uid: &str| rollback::name(&"a".repeat(52), uid);
    assert_eq!(long("5d0e9c1a-0000"), format!("{}-5d0e9c1a-rollback", "a".repeat(34)));
    assert_ne!(long("5d0e9c1a-0000"), long("5d0e9c1b-0000"));

    // The rollback task is valid and runs Belay's own image.
    let mut pack = pack();
    pack.spec.state = Some(StatePolicy { bucket: "state".into(), prefix: None });
    let validated = validate(&made, &undone(), &pack, "belay-system").unwrap();
    let surroundings = surroundings();
    let attempt = validated.attempt(&surroundings, 1).unwrap();
    let policy = network_policy::build(&attempt);
    let proof = network_policy::prove(&policy, &policy).unwrap();
    let pod = pod::build(&attempt, &proof);
    let agent = &pod.spec.unwrap().containers[0];
    assert_eq!(
        (agent.image.as_deref(), agent.args.as_deref()),
        (Some(surroundings.image.as_str()), Some(["undo".to_owned()].as_slice()))
    );
}

#[test]
fn what_undoes_needs_a_place_for_its_arguments() {
    let findings = super::task::render_policy(&task(), &undone(), &pack()).unwrap_err();
    assert_eq!(findings[0].field, "ToolContract/tickets spec.rollback.call");
    assert!(findings[0].to_string().contains("a `state` bucket in PolicyPack `dev`"), "{}", findings[0]);
}

#[rstest::rstest]
#[case::both(|task: &mut AgentTask| task.spec.rollback_of = Some(RollbackOf { name: "x".into(), uid: "u".into() }), "both")]
#[case::neither(|task: &mut AgentTask| task.spec.agent = None, "neither")]
fn a_task_has_an_agent_or_undoes_another(#[case] change: fn(&mut AgentTask), #[case] found: &str) {
    let mut task = task();
    change(&mut task);
    let findings = validate(&task, &contracts(), &pack(), "belay-system").unwrap_err();
    assert!(findings.iter().any(|one| one.field == "spec.agent" && one.found == found), "{findings:?}");
}

#[test]
fn state_is_not_locked_away_with_the_evidence() {
    let mut pack = pack();
    pack.spec.state = Some(StatePolicy { bucket: pack.spec.evidence.bucket.clone(), prefix: None });
    assert_eq!(super::pack::check_pack(&pack)[0].field, "spec.state.bucket");
}

/// The task class is a label of metrics, so it must be one of the pack's.
#[test]
fn a_task_class_is_one_of_the_packs() {
    let (mut task, contracts, mut pack) = (task(), contracts(), pack());
    task.spec.task_class = Some("triage".into());
    let findings = super::task::render_policy(&task, &contracts, &pack).unwrap_err();
    assert_eq!(findings.len(), 1);
    assert!(findings[0].to_string().contains("spec.taskClass"), "{}", findings[0]);
    pack.spec.task_classes = vec!["triage".into()];
    let policy = super::task::render_policy(&task, &contracts, &pack).unwrap();
    assert_eq!(policy.task.task_class.as_deref(), Some("triage"));
}
