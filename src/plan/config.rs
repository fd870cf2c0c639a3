//! The rendered policy: what a task may do, from its own spec, its contracts and its pack.
//!
//! Promises: operator and gateway render the same bytes from the same objects; tools are sorted by name; nothing is wider than
//! the class allows. Refuses: the workload (image, mounts, resources), which decides nothing; see
//! [`validated`](crate::plan::validated).

use std::{borrow::Borrow, collections::BTreeMap};

use kube::{Resource, ResourceExt};

use super::{Finding, condition, schema};
use crate::{
    api::{AgentTask, PolicyPack, ToolContract, policy_pack::WorkflowClass},
    policy::{
        config::{
            EgressHost, EgressUse, Limits, ModelEndpoints, PackIdentity, PolicyConfig, Precondition, TaskIdentity, Tool,
        },
        egress::{self, HostPattern},
        hostname::Authority,
    },
};

/// Renders the policy of a task. `contracts` may hold more than the task names, and of other namespaces: they are passed over.
///
/// # Errors
/// Everything that is wrong, at once.
pub fn render_policy<C: Borrow<ToolContract>>(
    task: &AgentTask,
    contracts: &[C],
    pack: &PolicyPack,
) -> Result<PolicyConfig, Vec<Finding>> {
    let class = class_of(task, pack).map_err(|finding| vec![finding])?;
    let mut findings = Vec::new();
    let limits = limits(task, class, &mut findings);
    let egress = egress_hosts(pack, class, &mut findings);
    let tools = tools(task, contracts, class, &egress, &mut findings);
    let models = models(pack, class, &egress, &mut findings);
    if !findings.is_empty() {
        return Err(findings);
    }
    let mut allowed_effects = class.allowed_effects.clone();
    allowed_effects.sort();
    allowed_effects.dedup();
    Ok(PolicyConfig {
        task: task_identity(task),
        pack: pack_identity(pack),
        limits,
        allowed_effects,
        tools,
        models,
        egress,
    })
}

/// The class that the task names.
///
/// # Errors
/// If the pack has no such class.
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

fn task_identity(task: &AgentTask) -> TaskIdentity {
    TaskIdentity {
        namespace: task.namespace().unwrap_or_default(),
        name: task.name_any(),
        uid: task.uid().unwrap_or_default(),
        generation: task.meta().generation.unwrap_or_default(),
        objective: task.spec.objective.clone(),
        workflow_class: task.spec.workflow_class.clone(),
        principal: task.spec.principal.clone(),
        image: task.spec.agent.image.clone(),
    }
}

fn pack_identity(pack: &PolicyPack) -> PackIdentity {
    PackIdentity {
        name: pack.name_any(),
        uid: pack.uid().unwrap_or_default(),
        generation: pack.meta().generation.unwrap_or_default(),
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
                format!("{least} to {most}, the ceiling of class `{}`", class.name),
                asked.to_string(),
                "ask for less, or have the class's ceiling raised in the pack",
            ));
        }
    }
    Limits { wall_time_seconds: asked.wall_time_seconds, tool_calls: asked.tool_calls, tokens: asked.tokens }
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
            findings.push(Finding::new(
                field,
                format!("the name of a ToolContract in namespace `{}`", namespace.as_deref().unwrap_or_default()),
                format!("`{name}`, which is not there"),
                "apply that ToolContract, or drop the tool",
            ));
            continue;
        };
        let Some(tool) = tool(name, contract, class, egress, findings) else { continue };
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

/// One tool, or what is wrong with its contract.
fn tool(
    name: &str,
    contract: &ToolContract,
    class: &WorkflowClass,
    egress: &[EgressHost],
    findings: &mut Vec<Finding>,
) -> Option<Tool> {
    let spec = &contract.spec;
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
    // A URL that is none is found with the contract itself.
    if authority(&spec.upstream.mcp.url).is_ok()
        && let Err(found) = allows(egress, &spec.upstream.mcp.url, EgressUse::Tools)
    {
        findings.push(Finding::new(
            at("upstream.mcp.url"),
            format!("a host and port that class `{}` lists in its egress for `Tools`", class.name),
            found,
            "use a listed upstream, or have the host added to the class",
        ));
    }
    let input = check_contract(contract).map_err(|found| findings.extend(found)).ok();
    if findings.len() > before {
        return None;
    }
    Some(Tool {
        contract: name.to_owned(),
        name: spec.tool.clone(),
        description: spec.description.clone(),
        url: spec.upstream.mcp.url.clone(),
        upstream_tool: spec.upstream.mcp.tool.clone(),
        input: input?,
        preconditions: spec
            .preconditions
            .iter()
            .map(|condition| Precondition {
                name: condition.name.clone(),
                cel: condition.cel.clone(),
                message: condition.message.clone(),
            })
            .collect(),
        side_effect: spec.side_effect,
    })
}

/// Checks a contract by itself, whatever names it, and gives its input schema as it is enforced.
///
/// # Errors
/// Everything that is wrong, at once.
pub fn check_contract(contract: &ToolContract) -> Result<serde_json::Value, Vec<Finding>> {
    let (name, spec) = (contract.name_any(), &contract.spec);
    let at = |field: &str| format!("ToolContract/{name} spec.{field}");
    let mut findings = Vec::new();
    if let Err(reason) = authority(&spec.upstream.mcp.url) {
        findings.push(Finding::new(
            at("upstream.mcp.url"),
            "the URL of an MCP server",
            format!("`{}`: {reason}", spec.upstream.mcp.url),
            "correct it",
        ));
    }
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
    match schema::close(&spec.input) {
        Ok(input) if findings.is_empty() => Ok(input),
        Ok(_) => Err(findings),
        Err(errors) => {
            findings.extend(errors.into_iter().map(|error| {
                Finding::new(
                    at(&format!("input{}", error.pointer.replace('/', "."))),
                    error.expected,
                    error.found,
                    "correct the schema",
                )
            }));
            Err(findings)
        }
    }
}

/// What is wrong with the classes of a pack by themselves, whatever task names them.
pub fn check_pack(pack: &PolicyPack) -> Vec<Finding> {
    let mut findings = Vec::new();
    for class in &pack.spec.workflow_classes {
        let egress = egress_hosts(pack, class, &mut findings);
        models(pack, class, &egress, &mut findings);
    }
    findings
}

/// The pack's model endpoints, as far as the class may reach them. A class that lists hosts for models and reaches no
/// endpoint is a mistake; one that lists none has no models.
fn models(
    pack: &PolicyPack,
    class: &WorkflowClass,
    egress: &[EgressHost],
    findings: &mut Vec<Finding>,
) -> ModelEndpoints {
    let declared = &pack.spec.models;
    let reachable = |url: &Option<String>| url.clone().filter(|url| allows(egress, url, EgressUse::Models).is_ok());
    let models = ModelEndpoints { openai: reachable(&declared.openai), anthropic: reachable(&declared.anthropic) };
    let lists_models = class.egress.iter().any(|rule| rule.uses.contains(&EgressUse::Models));
    if lists_models && models.openai.is_none() && models.anthropic.is_none() {
        let endpoints: Vec<_> =
            declared.openai.iter().chain(&declared.anthropic).map(|url| format!("`{url}`")).collect();
        findings.push(Finding::new(
            format!("PolicyPack/{} spec.models", pack.name_any()),
            format!("an endpoint on a host and port that class `{}` lists in its egress for `Models`", class.name),
            if endpoints.is_empty() { "no endpoint".to_owned() } else { endpoints.join(", ") },
            "add the endpoint's host and port to the class, or drop `Models` from the class's egress",
        ));
    }
    models
}

fn egress_hosts(pack: &PolicyPack, class: &WorkflowClass, findings: &mut Vec<Finding>) -> Vec<EgressHost> {
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
                hosts.push(EgressHost { host: rule.host.to_ascii_lowercase(), ports, uses: rule.uses.clone() });
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

/// Whether the class lists the URL's host and port for this use, as the gateway will decide it; what was found otherwise.
fn allows(egress: &[EgressHost], url: &str, purpose: EgressUse) -> Result<(), String> {
    let authority = authority(url).map_err(|reason| format!("`{url}`: {reason}"))?;
    egress::allow(egress, &authority, purpose).map(|_| ()).map_err(|denied| format!("`{url}`: {}", denied.reason))
}

fn authority(url: &str) -> Result<Authority, String> {
    let uri: http::Uri = url.parse().map_err(|error| format!("no URL ({error})"))?;
    let default_port = match uri.scheme_str() {
        Some("https") => 443,
        Some("http") => 80,
        _ => return Err("neither http nor https".to_owned()),
    };
    let authority = uri.authority().ok_or("no host")?;
    Authority::parse(authority.as_str(), Some(default_port)).map_err(|error| error.to_string())
}
