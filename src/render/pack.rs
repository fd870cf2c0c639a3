//! Checks and renders a pack: its classes, hosts, models and prices.
//!
//! Guarantees: One pass finds everything that is wrong with a class, whatever task names it. A model endpoint that a class cannot reach is
//! not in the policy.
//!
//! Non-goals: The pack's rules for tool calls, see [`access`](crate::render::access), and the resources of pods, see
//! [`validated`](crate::render::validated).

use std::collections::BTreeSet;

use kube::ResourceExt;

use super::{
    Finding, access,
    contract::{authority, authority_of},
};
use crate::{
    api::{
        AgentTask, PolicyPack, ToolContract,
        policy_pack::{self, Credential, EgressRule, Models, WorkflowClass},
    },
    policy::{
        self,
        config::{EgressHost, EgressUse, ModelEndpoint, ModelEndpoints, ModelPrice},
        egress::{self, HostPattern, IgnoredHost},
        hostname::Hostname,
        model::{
            api::{Api, Family, url},
            table::Capability,
        },
        price,
    },
};

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

/// Parses an amount of money in millionths. An amount that cannot be parsed is a finding and counts as 0.
pub(super) fn sum(text: Option<&str>, field: impl Fn() -> String, findings: &mut Vec<Finding>) -> Option<i64> {
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
pub(super) fn models(
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

/// Endings of names that only the name servers of a cluster or of a private network know.
const PRIVATE: [&str; 8] = ["cluster.local", "corp", "home.arpa", "internal", "intranet", "lan", "local", "svc"];

/// Describes, for users, what must be opened before the pack's hosts of a cluster or a private network can be reached.
pub fn private_hosts(pack: &PolicyPack) -> Vec<String> {
    let hosts = pack.spec.workflow_classes.iter().flat_map(|class| &class.egress).map(|rule| rule.host.as_str());
    let is_private =
        |host: &&str| PRIVATE.iter().any(|end| host.strip_suffix(end).is_some_and(|name| name.ends_with('.')));
    let hosts: BTreeSet<_> = hosts.filter(is_private).collect();
    let note = |host| {
        format!(
            "PolicyPack/{}: the addresses of {host} are probably private. The gateway connects to them only if the cluster's administrator \
             opens them with gateway.privateUpstreams of the chart. `belay run` needs their address: --resolve {host}=ADDRESS",
            pack.name_any()
        )
    };
    hosts.into_iter().map(note).collect()
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
pub(super) fn egress_hosts(
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
pub(super) fn ignored_hosts(pack: &PolicyPack, class: &WorkflowClass, findings: &mut Vec<Finding>) -> Vec<String> {
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
