//! Renders the policy: what a task may do, from its own spec, its contracts and its pack.
//!
//! Guarantees: The operator and the gateway render the same bytes from the same objects. Tools are sorted by name. Nothing exceeds what the
//! class allows.
//!
//! Non-goals: Image, mounts and resources, because they decide nothing about calls. See [`validated`](crate::render::validated).

use std::{
    borrow::Borrow,
    collections::{BTreeMap, BTreeSet},
};

use kube::ResourceExt;

use super::{Finding, access, approval, condition, names, schema};
use crate::{
    api::{
        AgentTask, PolicyPack, ToolContract,
        policy_pack::{self, Credential, EgressRule, Models, WorkflowClass},
        tool_contract::{self, ToolContractSpec},
    },
    canonical::{self, LARGEST_WHOLE},
    policy::{
        self,
        config::{
            Compensation, EgressHost, EgressUse, HttpUpstream, Idempotency, Limits, McpUpstream, ModelEndpoint,
            ModelEndpoints, ModelPrice, PackIdentity, PolicyConfig, Precondition, Rollback, SideEffect, TaskIdentity,
            Tool, ToolLimits, Upstream, VerifyRead,
        },
        egress::{self, HostPattern, IgnoredHost},
        hostname::{Authority, Hostname},
        model::{
            api::{Api, Family, url},
            table::Capability,
        },
        price,
        rule::Rule,
        template::Request,
    },
};

/// Renders the policy of a task. `contracts` may hold contracts that the task does not name, and contracts of other namespaces. They are
/// ignored.
///
/// # Errors
/// Returns everything that is wrong, at once.
pub fn render_policy<C: Borrow<ToolContract>>(
    task: &AgentTask,
    contracts: &[C],
    pack: &PolicyPack,
) -> Result<PolicyConfig, Vec<Finding>> {
    let class = class_of(task, pack).map_err(|finding| vec![finding])?;
    let mut findings = Vec::new();
    let mut limits = limits(task, class, &mut findings);
    let task_class = task_class(task, pack, &mut findings);
    let principal = Some(task.spec.principal.as_str());
    let egress = egress_hosts(pack, class, principal, &mut findings);
    let tools = tools(task, contracts, class, &egress, &mut findings);
    let models = models(pack, class, &egress, &mut findings);
    let ignored_hosts = ignored_hosts(pack, class, &mut findings);
    let access = access::render(pack, &mut findings);
    verifiable(&tools, &mut findings);
    undoable(&tools, pack, &mut findings);
    if access.approval.is_some() || tools.iter().any(|tool| tool.approval.is_some()) {
        limits.approval_wait_seconds = approval_wait(task, class, &mut findings);
        if requester(task).is_none() {
            findings.push(Finding::new(
                format!("metadata.annotations[{}]", names::REQUESTED_BY),
                "the user who created the task, who may not approve its calls",
                "nothing",
                "create the task again: admission adds it; on clusters without MutatingAdmissionPolicy, add your user name yourself",
            ));
        }
    }
    if !findings.is_empty() {
        return Err(findings);
    }
    let mut allowed_effects = class.allowed_effects.clone();
    allowed_effects.sort();
    allowed_effects.dedup();
    Ok(PolicyConfig {
        task: task_identity(task, task_class),
        pack: pack_identity(pack),
        limits,
        allowed_effects,
        tools,
        models,
        egress,
        access,
        ignored_hosts,
        upstream_timeout_seconds: class.upstream_timeout_seconds,
    })
}

/// Returns the class that the task names.
///
/// # Errors
/// Returns an error if the pack has no such class.
pub fn class_of<'p>(task: &AgentTask, pack: &'p PolicyPack) -> Result<&'p WorkflowClass, Finding> {
    let wanted = &task.spec.workflow_class;
    pack.spec.workflow_classes.iter().find(|class| &class.name == wanted).ok_or_else(|| {
        let classes: Vec<_> = pack.spec.workflow_classes.iter().map(|class| format!("`{}`", class.name)).collect();
        Finding::new(
            "spec.workflowClass",
            format!("a class of PolicyPack `{}`: {}", pack.name_any(), classes.join(", ")),
            format!("`{wanted}`"),
            "name one of them, or have the class added to the pack",
        )
    })
}

/// Checks whether the task's task class is one of the pack's. It is a label of metrics, so the number of values must stay small. A rollback
/// inherits the task class of the original task, and runs without it if the pack no longer has it.
fn task_class(task: &AgentTask, pack: &PolicyPack, findings: &mut Vec<Finding>) -> Option<String> {
    let wanted = task.spec.task_class.as_ref()?;
    if pack.spec.task_classes.contains(wanted) {
        return Some(wanted.clone());
    }
    if task.spec.rollback_of.is_some() {
        return None;
    }
    let known: Vec<_> = pack.spec.task_classes.iter().map(|class| format!("`{class}`")).collect();
    let known = if known.is_empty() { "none: it has no taskClasses".to_owned() } else { known.join(", ") };
    findings.push(Finding::new(
        "spec.taskClass",
        format!("a task class of PolicyPack `{}`: {known}", pack.name_any()),
        format!("`{wanted}`"),
        "name one of them, drop it, or have it added to the pack",
    ));
    None
}

fn task_identity(task: &AgentTask, task_class: Option<String>) -> TaskIdentity {
    TaskIdentity {
        namespace: task.namespace().unwrap_or_default(),
        name: task.name_any(),
        uid: task.uid().unwrap_or_default(),
        objective: task.spec.objective.clone(),
        workflow_class: task.spec.workflow_class.clone(),
        task_class,
        principal: task.spec.principal.clone(),
        requester: requester(task).cloned(),
        image: task.spec.agent.as_ref().map(|agent| agent.image.clone()).unwrap_or_default(),
        rollback_of: task.spec.rollback_of.clone(),
    }
}

fn requester(task: &AgentTask) -> Option<&String> {
    task.annotations().get(names::REQUESTED_BY)
}

fn pack_identity(pack: &PolicyPack) -> PackIdentity {
    PackIdentity {
        name: pack.name_any(),
        uid: pack.uid().unwrap_or_default(),
        environment: pack.spec.environment.clone(),
    }
}

fn limits(task: &AgentTask, class: &WorkflowClass, findings: &mut Vec<Finding>) -> Limits {
    let (asked, most) = (&task.spec.limits, &class.limits);
    let bounds = [
        ("wallTimeSeconds", asked.wall_time_seconds, 1, most.wall_time_seconds),
        ("toolCalls", asked.tool_calls, 0, most.tool_calls),
        ("tokens", asked.tokens, 0, most.tokens),
    ];
    for (field, asked, least, most) in bounds {
        if !(least..=most).contains(&asked) {
            findings.push(Finding::new(
                format!("spec.limits.{field}"),
                format!("{least} to {most}, the limit of class `{}`", class.name),
                asked.to_string(),
                "correct it, or have the class's limit raised in the pack",
            ));
        }
    }
    let costs = (
        sum(asked.cost.as_deref(), || "spec.limits.cost".to_owned(), findings),
        sum(most.cost.as_deref(), || format!("PolicyPack spec.workflowClasses[{}].limits.cost", class.name), findings),
    );
    let denials = lesser("denials", (asked.denials, most.denials), 1, class, |count| count.to_string(), findings);
    Limits {
        wall_time_seconds: countable(asked.wall_time_seconds),
        tool_calls: countable(asked.tool_calls),
        tokens: countable(asked.tokens),
        denials: denials.map(countable),
        cost_micros: lesser("cost", costs, 0, class, price::show, findings).map(countable),
        approval_wait_seconds: 0,
    }
}

/// Returns the seconds for which calls of an attempt may wait for approval without using its wall time: one day if neither task nor class
/// sets it.
fn approval_wait(task: &AgentTask, class: &WorkflowClass, findings: &mut Vec<Finding>) -> i64 {
    const DAY: i64 = 86_400;
    let both = (task.spec.limits.approval_wait_seconds, class.limits.approval_wait_seconds);
    lesser("approvalWaitSeconds", both, 0, class, |count| count.to_string(), findings).unwrap_or(DAY)
}

/// Checks an optional limit of the task against the class's limit, which applies if the task sets none.
fn lesser(
    field: &str,
    (asked, most): (Option<i64>, Option<i64>),
    least: i64,
    class: &WorkflowClass,
    show: fn(i64) -> String,
    findings: &mut Vec<Finding>,
) -> Option<i64> {
    if let Some(asked) = asked.filter(|asked| !(least..=most.unwrap_or(i64::MAX)).contains(asked)) {
        let ceiling = most.map_or_else(
            || " or more".to_owned(),
            |most| format!(" to {}, the limit of class `{}`", show(most), class.name),
        );
        findings.push(Finding::new(
            format!("spec.limits.{field}"),
            format!("{}{ceiling}", show(least)),
            show(asked),
            "correct it, or have the class's limit raised in the pack",
        ));
    }
    asked.or(most)
}

/// Parses an amount of money in millionths. An amount that cannot be parsed is a finding and counts as 0.
fn sum(text: Option<&str>, field: impl Fn() -> String, findings: &mut Vec<Finding>) -> Option<i64> {
    text.map(|text| {
        price::parse(text).unwrap_or_else(|| {
            findings.push(Finding::new(
                field(),
                "digits, and at most six more after a point, such as `12.50`",
                format!("`{text}`"),
                "correct it",
            ));
            0
        })
    })
}

fn tools<C: Borrow<ToolContract>>(
    task: &AgentTask,
    contracts: &[C],
    class: &WorkflowClass,
    egress: &[EgressHost],
    findings: &mut Vec<Finding>,
) -> Vec<Tool> {
    let namespace = task.namespace();
    let mut by_tool: BTreeMap<String, (String, Tool)> = BTreeMap::new();
    for (index, name) in task.spec.tools.iter().enumerate() {
        let field = format!("spec.tools[{index}]");
        let contract = contracts
            .iter()
            .map(Borrow::borrow)
            .find(|contract| contract.metadata.name.as_ref() == Some(name) && contract.namespace() == namespace);
        let Some(contract) = contract else {
            findings.push(contract_missing(index, name, namespace.as_deref().unwrap_or_default()));
            continue;
        };
        let Some(tool) = tool(task, contract, class, egress, findings) else { continue };
        let taken = by_tool.get(&tool.name).map(|(other, _)| other.clone());
        if let Some(other) = taken {
            findings.push(Finding::new(
                field,
                "contracts for different tools",
                format!("`{name}`, which is for tool `{}` as is `{other}`", tool.name),
                "keep one of the two",
            ));
            continue;
        }
        by_tool.insert(tool.name.clone(), (name.clone(), tool));
    }
    by_tool.into_values().map(|(_, tool)| tool).collect()
}

/// Creates the finding about a contract that a task names and that does not exist.
pub fn contract_missing(index: usize, name: &str, namespace: &str) -> Finding {
    Finding::new(
        format!("spec.tools[{index}]"),
        format!("the name of a ToolContract in namespace `{namespace}`"),
        format!("`{name}`, which does not exist"),
        "apply that ToolContract, or drop the tool",
    )
}

/// Renders one tool. Returns `None` if anything is wrong with its contract.
fn tool(
    task: &AgentTask,
    contract: &ToolContract,
    class: &WorkflowClass,
    egress: &[EgressHost],
    findings: &mut Vec<Finding>,
) -> Option<Tool> {
    let (name, spec) = (contract.name_any(), &contract.spec);
    let at = |field: &str| format!("ToolContract/{name} spec.{field}");
    let before = findings.len();
    if !class.allowed_effects.contains(&spec.side_effect) {
        let allowed: Vec<_> = class.allowed_effects.iter().map(|effect| effect.as_str()).collect();
        findings.push(Finding::new(
            at("sideEffect"),
            format!("one of {}, which class `{}` allows", allowed.join(", "), class.name),
            format!("`{}`", spec.side_effect.as_str()),
            "drop the tool from the task, or choose a class that allows the effect",
        ));
    }
    // An invalid URL is found with the contract itself.
    if let Some(authority) = authority_of(&spec.upstream)
        && let Err(denied) = egress::allow(egress, &authority, EgressUse::Tools)
    {
        let (mcp, http) = (spec.upstream.mcp.as_ref(), spec.upstream.http.as_ref());
        let url = mcp.map(|mcp| &mcp.url).or_else(|| http.map(|http| &http.url)).map_or("", String::as_str);
        let field = at(if mcp.is_some() { "upstream.mcp.url" } else { "upstream.http.url" });
        findings.push(if denied.rule == Rule::UpstreamCredential {
            Finding::new(
                field,
                format!("a host for which class `{}` has a credential for `{}`", class.name, task.spec.principal),
                format!("`{url}`, whose credentials are for other principals"),
                "have the principal added to one of the host's credentials in the pack, or drop the tool",
            )
        } else {
            Finding::new(
                field,
                format!("a host and port that class `{}` lists in its egress for `Tools`", class.name),
                format!("`{url}`: {}", denied.reason),
                "use a listed upstream, or have the host added to the class",
            )
        });
    }
    let tool = check_contract(contract).map_err(|found| findings.extend(found)).ok();
    tool.filter(|_| findings.len() == before)
}

/// Checks a contract on its own, whatever names it, and returns the tool as it is enforced.
///
/// # Errors
/// Returns everything that is wrong, at once.
pub fn check_contract(contract: &ToolContract) -> Result<Tool, Vec<Finding>> {
    let (name, spec) = (contract.name_any(), &contract.spec);
    let at = |field: &str| format!("ToolContract/{name} spec.{field}");
    let mut findings = Vec::new();
    let upstream = upstream(spec, &at, &mut findings);
    for (index, condition) in spec.preconditions.iter().enumerate() {
        if let Err(error) = condition::check(&condition.cel) {
            findings.push(Finding::new(
                at(&format!("preconditions[{index}].cel")),
                format!("a CEL expression over {}", condition::VARIABLES.join(", ")),
                format!("{error} (precondition `{}`)", condition.name),
                "correct the expression",
            ));
        }
    }
    let mut judged = |field: &str, judged: Result<serde_json::Value, Vec<schema::SchemaError>>| {
        let wrong = |error: schema::SchemaError| {
            let field = at(&format!("{field}{}", error.pointer.replace('/', ".")));
            Finding::new(field, error.expected, error.found, "correct the schema")
        };
        judged.map_err(|errors| findings.extend(errors.into_iter().map(wrong))).ok()
    };
    let input = judged("input", schema::close(&spec.input));
    let output =
        spec.output.as_ref().and_then(|output| judged("output", schema::check(output).map(|()| output.clone())));
    if let (Some(Upstream::Http(http)), Some(input)) = (&upstream, &input) {
        places(http, input, &at, &mut findings);
    }
    let limits = tool_limits(spec, &at, &mut findings);
    let idempotency = spec.idempotency.as_ref().map(|of| idempotency(of, spec, &at, &mut findings));
    let verify = spec.verify.as_ref().map(|read| verify_read(read, spec, &at, &mut findings));
    let rollback = spec.rollback.as_ref().and_then(|rollback| self::rollback(rollback, spec, &at, &mut findings));
    let approval = spec.approval.as_ref().map(|approval| approval::render(approval, &at, &mut findings));
    let (Some(upstream), Some(input), true) = (upstream, input, findings.is_empty()) else { return Err(findings) };
    Ok(Tool {
        contract: name,
        name: spec.tool.clone(),
        description: spec.description.clone(),
        upstream,
        input,
        output,
        limits,
        preconditions: spec
            .preconditions
            .iter()
            .map(|condition| Precondition {
                name: condition.name.clone(),
                cel: condition.cel.clone(),
                message: condition.message.clone(),
            })
            .collect(),
        idempotency,
        verify,
        rollback,
        approval,
        side_effect: spec.side_effect,
        data: spec.data,
        redact: spec.redact.clone(),
    })
}

/// Renders which calls are duplicates.
fn idempotency(
    of: &tool_contract::Idempotency,
    spec: &ToolContractSpec,
    at: &impl Fn(&str) -> String,
    findings: &mut Vec<Finding>,
) -> Idempotency {
    /// Headers that the request itself or the gateway uses.
    const TAKEN: [&str; 12] = [
        "accept",
        "accept-encoding",
        "authorization",
        "connection",
        "content-length",
        "content-type",
        "cookie",
        "host",
        "te",
        "transfer-encoding",
        "upgrade",
        "user-agent",
    ];
    let required = spec.input.get("required").and_then(serde_json::Value::as_array);
    let requires = |name: &String| required.is_some_and(|all| all.iter().any(|one| one == name));
    if let Some(name) = of.argument.as_ref().filter(|name| !requires(name)) {
        findings.push(Finding::new(
            at("idempotency.argument"),
            "an argument that `input` requires",
            format!("`{name}`"),
            "add it to input.required, or name another",
        ));
    }
    if let Some(header) = &of.header {
        if spec.upstream.http.is_none() {
            findings.push(Finding::new(
                at("idempotency.header"),
                "none, because MCP has no headers for calls",
                format!("`{header}`"),
                "remove it; an MCP tool that deduplicates has an argument for the key",
            ));
        }
        if TAKEN.contains(&header.as_str()) || header.starts_with("belay-") || header.starts_with("proxy-") {
            findings.push(Finding::new(
                at("idempotency.header"),
                "a header that is free, such as `idempotency-key`",
                format!("`{header}`"),
                "use the one that the upstream documents",
            ));
        }
    }
    if !(1..=604_800).contains(&of.window_seconds) {
        let found = of.window_seconds.to_string();
        findings.push(Finding::new(at("idempotency.windowSeconds"), "1 to 604800", found, "correct it"));
    }
    Idempotency { argument: of.argument.clone(), header: of.header.clone(), window_seconds: of.window_seconds }
}

/// Renders the read that shows whether a call took effect.
fn verify_read(
    read: &tool_contract::VerifyRead,
    spec: &ToolContractSpec,
    at: &impl Fn(&str) -> String,
    findings: &mut Vec<Finding>,
) -> VerifyRead {
    let mut wrong = |field: &str, expected: String, found: String, fix: &str| {
        findings.push(Finding::new(at(&format!("verify.{field}")), expected, found, fix));
    };
    if spec.side_effect == SideEffect::Read || read.tool == spec.tool {
        let expected = "the verification of a tool that changes something, by another tool".to_owned();
        wrong("tool", expected, format!("`{}` for `{}`", read.tool, spec.tool), "drop verify, or name another tool");
    }
    if let Err(error) = condition::check_among(&read.applied, &["args", "result"]) {
        wrong("applied", "a CEL expression over args, result".into(), error.to_string(), "correct the expression");
    }
    for (name, pointer) in &read.arguments {
        if !pointer.is_empty() && !pointer.starts_with('/') {
            let field = format!("arguments.{name}");
            wrong(&field, "a JSON Pointer such as `/order`".into(), format!("`{pointer}`"), "begin it with a slash");
        }
    }
    if !(1..=300).contains(&read.settle_seconds) {
        wrong("settleSeconds", "1 to 300".into(), read.settle_seconds.to_string(), "correct it");
    }
    VerifyRead {
        tool: read.tool.clone(),
        arguments: read.arguments.clone(),
        applied: read.applied.clone(),
        settle_seconds: read.settle_seconds,
    }
}

/// Finds tools whose `verify` names a tool that the task does not have, or one that is not a read without approval.
fn verifiable(tools: &[Tool], findings: &mut Vec<Finding>) {
    for tool in tools {
        let Some(read) = &tool.verify else { continue };
        let by = tools.iter().find(|other| other.name == read.tool);
        if !by.is_some_and(|by| by.side_effect == SideEffect::Read && by.approval.is_none()) {
            findings.push(Finding::new(
                format!("ToolContract/{} spec.verify.tool", tool.contract),
                "a tool of the same task with sideEffect `read` and without approval",
                match by {
                    Some(_) => format!("`{}`, which is another", read.tool),
                    None => format!("`{}`, which the task does not have", read.tool),
                },
                "add such a tool to the task, or drop verify",
            ));
        }
    }
}

/// Renders how a call is undone.
fn rollback(
    rollback: &tool_contract::Rollback,
    spec: &ToolContractSpec,
    at: &impl Fn(&str) -> String,
    findings: &mut Vec<Finding>,
) -> Option<Rollback> {
    let mut wrong = |field: String, expected: &str, found: String, fix: &str| {
        findings.push(Finding::new(at(&field), expected, found, fix));
    };
    if spec.side_effect == SideEffect::Read {
        let expected = "the rollback of a tool that changes something";
        wrong("rollback".into(), expected, format!("one of `{}`, which reads", spec.tool), "drop rollback");
    }
    let call = match (&rollback.call, &rollback.by_hand) {
        (Some(call), None) => call,
        (None, Some(how)) => return Some(Rollback::ByHand(how.clone())),
        (call, _) => {
            let found = if call.is_some() { "both" } else { "neither" };
            wrong("rollback".into(), "exactly one of call and byHand", found.into(), "set one of them");
            return None;
        }
    };
    for (name, cel) in &call.arguments {
        if let Err(error) = condition::check_among(cel, &["args", "result"]) {
            let field = format!("rollback.call.arguments.{name}");
            wrong(field, "a CEL expression over args, result", error.to_string(), "correct the expression");
        }
    }
    if let Some(seconds) = call.within_seconds.filter(|seconds| !(1..=31_536_000).contains(seconds)) {
        wrong("rollback.call.withinSeconds".into(), "1 to 31536000", seconds.to_string(), "correct it");
    }
    Some(Rollback::Call(Compensation {
        contract: call.contract.clone(),
        arguments: call.arguments.clone(),
        within_seconds: call.within_seconds,
    }))
}

/// Finds tools with a compensation if the pack has no bucket for the arguments of compensations.
fn undoable(tools: &[Tool], pack: &PolicyPack, findings: &mut Vec<Finding>) {
    if pack.spec.state.is_some() {
        return;
    }
    for tool in tools.iter().filter(|tool| tool.compensation().is_some()) {
        findings.push(Finding::new(
            format!("ToolContract/{} spec.rollback.call", tool.contract),
            format!("a `state` bucket in PolicyPack `{}`, which stores the arguments of such calls", pack.name_any()),
            "none",
            "have spec.state added to the pack, or say byHand how the call is undone",
        ));
    }
}

/// Returns the host and port of a contract's upstream, if the upstream is well formed.
pub fn authority_of(upstream: &tool_contract::Upstream) -> Option<Authority> {
    match (&upstream.mcp, &upstream.http) {
        (Some(mcp), None) => authority(&mcp.url).ok(),
        // The template's host is literal. Its path is not a URL yet.
        (None, Some(http)) => Request::parse(&of_http(http)).ok().map(|request| request.authority().clone()),
        _ => None,
    }
}

pub(super) fn of_http(http: &tool_contract::HttpUpstream) -> HttpUpstream {
    HttpUpstream { method: http.method, url: http.url.clone(), query: http.query.clone() }
}

/// Renders the contract's one upstream, if it is well formed.
fn upstream(spec: &ToolContractSpec, at: &impl Fn(&str) -> String, findings: &mut Vec<Finding>) -> Option<Upstream> {
    match (&spec.upstream.mcp, &spec.upstream.http) {
        (Some(mcp), None) => {
            if let Some(digest) = mcp.digest.as_ref().filter(|digest| !canonical::is_digest(digest)) {
                findings.push(Finding::new(
                    at("upstream.mcp.digest"),
                    "64 lower-case hexadecimal digits",
                    format!("`{digest}`"),
                    "take the digest from a denial by tool.changed or from an intent in the evidence",
                ));
            }
            if let Err(reason) = authority(&mcp.url) {
                findings.push(Finding::new(
                    at("upstream.mcp.url"),
                    "the URL of an MCP server",
                    format!("`{}`: {reason}", mcp.url),
                    "correct it",
                ));
            }
            Some(Upstream::Mcp(McpUpstream {
                url: mcp.url.clone(),
                tool: mcp.tool.clone(),
                digest: mcp.digest.clone(),
            }))
        }
        (None, Some(http)) => {
            let http = of_http(http);
            if let Err(error) = Request::parse(&http) {
                findings.push(Finding::new(
                    at("upstream.http.url"),
                    "a URL with `{name}` in segments of its path only",
                    format!("`{}`: {error}", http.url),
                    "correct the template",
                ));
                return None;
            }
            Some(Upstream::Http(http))
        }
        (mcp, _) => {
            findings.push(Finding::new(
                at("upstream"),
                "exactly one of mcp and http",
                if mcp.is_some() { "both" } else { "neither" },
                "set one of them",
            ));
            None
        }
    }
}

/// Checks whether every argument that the schema allows has a place in the request, and every place has an argument.
fn places(http: &HttpUpstream, input: &serde_json::Value, at: &impl Fn(&str) -> String, findings: &mut Vec<Finding>) {
    let Ok(request) = Request::parse(http) else { return };
    let properties = input.get("properties").and_then(|properties| properties.as_object());
    let required: Vec<_> = input
        .get("required")
        .and_then(|names| names.as_array())
        .into_iter()
        .flatten()
        .filter_map(|n| n.as_str())
        .collect();
    let in_path: Vec<_> = request.path_arguments().collect();
    for name in in_path.iter().copied().chain(request.query_arguments()) {
        let kind =
            properties.and_then(|all| all.get(name)).and_then(|one| one.get("type")).and_then(|kind| kind.as_str());
        if !matches!(kind, Some("string" | "integer" | "boolean")) {
            findings.push(Finding::new(
                at(&format!("input.properties.{name}.type")),
                "\"string\", \"integer\" or \"boolean\", because the argument goes into the URL",
                kind.map_or_else(|| "nothing".to_owned(), |kind| format!("\"{kind}\"")),
                "describe the argument, or take it out of the URL",
            ));
        }
        if in_path.contains(&name) && !required.contains(&name) {
            findings.push(Finding::new(
                at("input.required"),
                format!("`{name}`, because the path needs it"),
                "a list without it",
                "require the argument",
            ));
        }
    }
    if http.method.has_body() {
        return;
    }
    let placed = |name: &str| in_path.contains(&name) || request.query_arguments().any(|other| other == name);
    for name in properties.into_iter().flat_map(|all| all.keys()).filter(|name| !placed(name)) {
        findings.push(Finding::new(
            at(&format!("input.properties.{name}")),
            format!("an argument that has a place in the URL, because {} has no body", http.method.as_str()),
            "one that has none",
            "list it in upstream.http.query, put it into the path, or drop it",
        ));
    }
    if input.get("additionalProperties") != Some(&serde_json::Value::Bool(false))
        || input.get("patternProperties").is_some()
    {
        findings.push(Finding::new(
            at("input.additionalProperties"),
            format!("false and no patternProperties, because {} has no body for more arguments", http.method.as_str()),
            "a schema that allows more",
            "set it to false; with allOf, anyOf, oneOf or $ref it has to be written out",
        ));
    }
}

fn tool_limits(spec: &ToolContractSpec, at: &impl Fn(&str) -> String, findings: &mut Vec<Finding>) -> ToolLimits {
    let asked = &spec.limits;
    let bounds = [
        ("calls", asked.calls, 0, 1_000_000),
        ("perMinute", asked.per_minute, 1, 60_000),
        ("timeoutSeconds", asked.timeout_seconds, 1, 300),
        ("requestBytes", asked.request_bytes, 2, 4 << 20),
        ("responseBytes", asked.response_bytes, 1, 16 << 20),
    ];
    for (field, asked, least, most) in bounds {
        if let Some(asked) = asked.filter(|asked| !(least..=most).contains(asked)) {
            findings.push(Finding::new(
                at(&format!("limits.{field}")),
                format!("{least} to {most}"),
                asked.to_string(),
                "correct the contract",
            ));
        }
    }
    ToolLimits {
        calls: asked.calls.map(countable),
        per_minute: asked.per_minute.map(countable),
        timeout_seconds: asked.timeout_seconds.map(countable),
        request_bytes: asked.request_bytes.map(countable),
        response_bytes: asked.response_bytes.map(countable),
    }
}

/// Caps a limit at the largest number that records can count to. No count reaches it, and readers of the policy may parse a larger number
/// differently.
fn countable(limit: i64) -> i64 {
    limit.min(LARGEST_WHOLE)
}

/// Checks the classes, rules and buckets of a pack on their own, whatever task names them.
pub fn check_pack(pack: &PolicyPack) -> Vec<Finding> {
    let mut findings = Vec::new();
    for class in &pack.spec.workflow_classes {
        let egress = egress_hosts(pack, class, None, &mut findings);
        models(pack, class, &egress, &mut findings);
    }
    access::render(pack, &mut findings);
    if pack.spec.state.as_ref().is_some_and(|state| state.bucket == pack.spec.evidence.bucket) {
        findings.push(Finding::new(
            "spec.state.bucket",
            "another bucket than the evidence bucket, which locks its objects",
            format!("`{}`", pack.spec.evidence.bucket),
            "name a bucket without Object Lock",
        ));
    }
    findings
}

/// An `http://` URL on a host whose calls are made with a credential. The gateway sends no credential over an unencrypted connection,
/// unless the connection stays on the machine.
pub struct InTheClear {
    /// The host of the URL.
    pub host: Hostname,
    /// The class that has the credential.
    pub class: String,
    /// The finding about the pack's entry.
    pub finding: Finding,
}

/// Finds the model endpoints and contracts that a pack's classes would call over unencrypted connections with a credential.
pub fn in_the_clear(pack: &PolicyPack, contracts: &[&ToolContract]) -> Vec<InTheClear> {
    let Models { openai, anthropic, endpoints, .. } = &pack.spec.models;
    let models = [("openai", openai.as_ref()), ("anthropic", anthropic.as_ref())].into_iter();
    let models = models.filter_map(|(field, url)| Some((format!("spec.models.{field}"), url?.clone())));
    let endpoints = endpoints.iter().enumerate();
    let models =
        models.chain(endpoints.map(|(index, one)| (format!("spec.models.endpoints[{index}].url"), one.url.clone())));
    let models = models.map(|(at, url)| (at, authority(&url).ok(), url, EgressUse::Models));
    let tools = contracts.iter().filter_map(|contract| {
        let upstream = &contract.spec.upstream;
        let url = upstream.mcp.as_ref().map(|mcp| &mcp.url).or_else(|| upstream.http.as_ref().map(|http| &http.url))?;
        Some((format!("ToolContract {}", contract.name_any()), authority_of(upstream), url.clone(), EgressUse::Tools))
    });
    let called: Vec<_> = models.chain(tools).filter(|(_, _, url, _)| url.starts_with("http://")).collect();
    let mut found = Vec::new();
    for (index, class) in pack.spec.workflow_classes.iter().enumerate() {
        let egress = egress_hosts(pack, class, None, &mut Vec::new());
        for (at, to, url, purpose) in &called {
            let Some((entry, to)) = to.as_ref().and_then(|to| Some((egress::allow(&egress, to, *purpose).ok()?, to)))
            else {
                continue;
            };
            if class.egress.get(entry).is_none_or(|rule| rule.credentials.is_empty()) {
                continue;
            }
            let finding = Finding::new(
                format!("PolicyPack/{} spec.workflowClasses[{index}].egress[{entry}].credentials", pack.name_any()),
                "a credential for https only, because the gateway sends no credential over plain http",
                format!("one for {}, whose URL in {at} is `{url}`", to.host),
                format!(
                    "write https:// there, or remove the credential; for a server on this machine, use `belay run --resolve {}=127.0.0.1:PORT`",
                    to.host
                ),
            );
            found.push(InTheClear { host: to.host.clone(), class: class.name.clone(), finding });
        }
    }
    found
}

/// Renders the pack's model endpoints that the class may reach. A class that lists hosts for models and reaches no endpoint is a mistake. A
/// class that lists no host for models has no models.
fn models(
    pack: &PolicyPack,
    class: &WorkflowClass,
    egress: &[EgressHost],
    findings: &mut Vec<Finding>,
) -> ModelEndpoints {
    let declared = &pack.spec.models;
    let reachable = |url: &Option<String>| url.clone().filter(|url| allows(egress, url, EgressUse::Models).is_ok());
    let reached = declared.endpoints.iter().filter(|entry| allows(egress, &entry.url, EgressUse::Models).is_ok());
    let models = ModelEndpoints {
        openai: reachable(&declared.openai),
        anthropic: reachable(&declared.anthropic),
        endpoints: reached.map(endpoint).collect(),
        prices: prices(pack, findings),
        allow: sorted(&declared.allow),
        unknown_members: declared.unknown_members,
        store_replies: declared.store_replies,
        stream_usage: declared.stream_usage,
    };
    let lists_models = class.egress.iter().any(|rule| rule.uses.contains(&EgressUse::Models));
    if lists_models && models.openai.is_none() && models.anthropic.is_none() && models.endpoints.is_empty() {
        let urls = declared.openai.iter().chain(&declared.anthropic);
        let endpoints: Vec<_> =
            urls.chain(declared.endpoints.iter().map(|entry| &entry.url)).map(|url| format!("`{url}`")).collect();
        findings.push(Finding::new(
            format!("PolicyPack/{} spec.models", pack.name_any()),
            format!("an endpoint on a host and port that class `{}` lists in its egress for `Models`", class.name),
            if endpoints.is_empty() { "no endpoint".to_owned() } else { endpoints.join(", ") },
            "add the endpoint's host and port to the class, or drop `Models` from the class's egress",
        ));
    }
    models
}

/// Describes, for users, where model calls go for each of the pack's base URLs that is more than a host.
pub fn bases(pack: &PolicyPack) -> Vec<String> {
    let Models { openai, anthropic, endpoints, .. } = &pack.spec.models;
    let one = |field: String, family: Family, base: &str| {
        let host_ends = base.split("://").nth(1).and_then(|rest| rest.trim_end_matches('/').find(['/', '?']));
        let path = if family == Family::Anthropic { Api::Messages } else { Api::ChatCompletions }.path();
        let name = pack.name_any();
        host_ends.map(|_| format!("PolicyPack/{name} spec.models.{field}: {path} goes to {}", url(base, family, path)))
    };
    let both = [("openai", Family::OpenAi, openai), ("anthropic", Family::Anthropic, anthropic)];
    let both = both.into_iter().filter_map(|(field, family, base)| one(field.to_owned(), family, base.as_deref()?));
    let some = endpoints.iter().enumerate();
    both.chain(some.filter_map(|(index, entry)| one(format!("endpoints[{index}].url"), entry.api, &entry.url)))
        .collect()
}

fn endpoint(declared: &policy_pack::ModelEndpoint) -> ModelEndpoint {
    let policy_pack::ModelEndpoint { models, api, url, allow, stream_usage } = declared;
    ModelEndpoint {
        models: models.clone(),
        api: *api,
        url: url.clone(),
        allow: sorted(allow),
        stream_usage: *stream_usage,
    }
}

/// Returns each capability once, in a fixed order.
fn sorted(allow: &[Capability]) -> Vec<Capability> {
    allow.iter().copied().collect::<BTreeSet<_>>().into_iter().collect()
}

fn prices(pack: &PolicyPack, findings: &mut Vec<Finding>) -> Vec<ModelPrice> {
    let mut prices = Vec::new();
    for (index, declared) in pack.spec.models.prices.iter().enumerate() {
        let at = |field: &str| format!("PolicyPack/{} spec.models.prices[{index}].{field}", pack.name_any());
        let input = sum(Some(&declared.input), || at("input"), findings);
        let output = sum(Some(&declared.output), || at("output"), findings);
        if let (Some(input_micros), Some(output_micros)) = (input, output) {
            prices.push(ModelPrice {
                model: declared.model.clone(),
                input_micros,
                output_micros,
                max_output_tokens: declared.max_output_tokens,
                context_tokens: declared.context_tokens,
                output_limit_field: declared.output_limit_field,
                tokenizer: declared.tokenizer,
            });
        }
    }
    prices
}

/// Returns the credential of a host that is used for calls of this principal's tasks.
pub fn credential_for<'p>(rule: &'p EgressRule, principal: &str) -> Option<&'p Credential> {
    rule.credentials.iter().find(|one| policy::access::is_one_of(&one.principals, principal))
}

/// Renders the hosts that a class lists: for tasks of a principal, or for the class on its own if there is no principal.
fn egress_hosts(
    pack: &PolicyPack,
    class: &WorkflowClass,
    principal: Option<&str>,
    findings: &mut Vec<Finding>,
) -> Vec<EgressHost> {
    let mut hosts = Vec::new();
    for (index, rule) in class.egress.iter().enumerate() {
        if let Err(error) = HostPattern::parse(&rule.host) {
            findings.push(Finding::new(
                format!("PolicyPack/{} spec.workflowClasses[{}].egress[{index}].host", pack.name_any(), class.name),
                "a host name, or `*.` and a domain",
                format!("`{}`: {error}", rule.host),
                "correct the pack",
            ));
        }
        let ports: Result<Vec<u16>, i32> =
            rule.ports.iter().map(|port| u16::try_from(*port).map_err(|_| *port)).collect();
        match ports {
            Ok(ports) if !ports.contains(&0) => {
                let credential = principal.and_then(|principal| credential_for(rule, principal));
                hosts.push(EgressHost {
                    host: rule.host.to_ascii_lowercase(),
                    ports,
                    uses: rule.uses.clone(),
                    credential: credential.map(|one| format!("{}/{}", one.secret, one.key)),
                    barred: principal.is_some() && !rule.credentials.is_empty() && credential.is_none(),
                });
            }
            other => findings.push(Finding::new(
                format!("PolicyPack/{} spec.workflowClasses[{}].egress[{index}].ports", pack.name_any(), class.name),
                "ports from 1 to 65535",
                other.map_or_else(|port| port.to_string(), |_| "0".to_owned()),
                "correct the pack",
            )),
        }
    }
    hosts
}

/// Renders the hosts whose denials do not count.
fn ignored_hosts(pack: &PolicyPack, class: &WorkflowClass, findings: &mut Vec<Finding>) -> Vec<String> {
    for (index, host) in class.ignored_hosts.iter().enumerate() {
        if let Err(error) = IgnoredHost::parse(host) {
            findings.push(Finding::new(
                format!("PolicyPack/{} spec.workflowClasses[{}].ignoredHosts[{index}]", pack.name_any(), class.name),
                "a host name, `*.` and a domain, or an address without a port",
                format!("`{host}`: {error}"),
                "correct the pack",
            ));
        }
    }
    class.ignored_hosts.iter().map(|host| host.to_ascii_lowercase()).collect()
}

/// Checks whether the class lists the URL's host and port for this use, as the gateway will decide it. Returns the reason if it does not.
fn allows(egress: &[EgressHost], url: &str, purpose: EgressUse) -> Result<(), String> {
    let authority = authority(url).map_err(|reason| format!("`{url}`: {reason}"))?;
    egress::allow(egress, &authority, purpose).map(|_| ()).map_err(|denied| format!("`{url}`: {}", denied.reason))
}

fn authority(url: &str) -> Result<Authority, String> {
    let uri: http::Uri = url.parse().map_err(|error| format!("not a URL ({error})"))?;
    let default_port = match uri.scheme_str() {
        Some("https") => 443,
        Some("http") => 80,
        _ => return Err("neither http nor https".to_owned()),
    };
    let authority = uri.authority().ok_or("no host")?;
    Authority::parse(authority.as_str(), Some(default_port)).map_err(|error| error.to_string())
}
