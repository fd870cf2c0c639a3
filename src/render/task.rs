//! Renders the policy of a task: what the task may do, from its own spec, its contracts and its pack.
//!
//! Guarantees: The operator and the gateway render the same bytes from the same objects. Tools are sorted by name. Nothing exceeds what the
//! class allows.
//!
//! Non-goals: Image, mounts and resources, because they decide nothing about calls. See [`validated`](crate::render::validated).

use std::{borrow::Borrow, collections::BTreeMap};

use kube::ResourceExt;

use super::{Finding, access, contract, names, pack};
use crate::{
    api::{AgentTask, PolicyPack, ToolContract, policy_pack::WorkflowClass},
    policy::{
        config::{EgressHost, EgressUse, Limits, PackIdentity, PolicyConfig, SideEffect, TaskIdentity, Tool},
        egress, price,
        rule::Rule,
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
    let class = pack::class_of(task, pack).map_err(|finding| vec![finding])?;
    let mut findings = Vec::new();
    let mut limits = limits(task, class, &mut findings);
    let task_class = task_class(task, pack, &mut findings);
    let principal = Some(task.spec.principal.as_str());
    let egress = pack::egress_hosts(pack, class, principal, &mut findings);
    let tools = tools(task, contracts, class, &egress, &mut findings);
    let models = pack::models(pack, class, &egress, &mut findings);
    let ignored_hosts = pack::ignored_hosts(pack, class, &mut findings);
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
        pack::sum(asked.cost.as_deref(), || "spec.limits.cost".to_owned(), findings),
        pack::sum(
            most.cost.as_deref(),
            || format!("PolicyPack spec.workflowClasses[{}].limits.cost", class.name),
            findings,
        ),
    );
    let denials = lesser("denials", (asked.denials, most.denials), 1, class, |count| count.to_string(), findings);
    Limits {
        wall_time_seconds: contract::countable(asked.wall_time_seconds),
        tool_calls: contract::countable(asked.tool_calls),
        tokens: contract::countable(asked.tokens),
        denials: denials.map(contract::countable),
        cost_micros: lesser("cost", costs, 0, class, price::show, findings).map(contract::countable),
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
    if let Some(authority) = contract::authority_of(&spec.upstream)
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
    let tool = contract::check_contract(contract).map_err(|found| findings.extend(found)).ok();
    tool.filter(|_| findings.len() == before)
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
