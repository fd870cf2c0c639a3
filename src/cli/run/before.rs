//! Checks the options against the files, before anything starts.
//!
//! Guarantees: a host that an option names and that no egress list has, or a key that would be sent without TLS, stops the run before it
//! begins. A key that nothing uses is reported.
//!
//! Non-goals: what `belay lint` finds in the files alone.

use std::collections::BTreeSet;

use kube::ResourceExt;

use super::given::{Credential, Resolved, Server};
use crate::{
    api::{ToolContract, policy_pack::WorkflowClass},
    cli::lint::Diagnostic,
    policy::{egress::HostPattern, hostname::Hostname},
    render::pack,
    run::objects::Objects,
};

/// Returns an error for each host that has an address by option but that no call can reach.
pub(super) fn unlisted(objects: &Objects, resolve: &[Resolved], upstream: &[Server]) -> Vec<String> {
    let Ok(class) = pack::class_of(&objects.task, &objects.pack) else { return Vec::new() };
    let named = resolve.iter().map(|one| ("--resolve", &one.host));
    let named = named.chain(upstream.iter().map(|one| ("--upstream", &one.host)));
    let unlisted = named.filter(|(_, host)| !lists(class, host));
    unlisted.map(|(option, host)| unknown(option, host, class)).collect()
}

fn lists(class: &WorkflowClass, host: &Hostname) -> bool {
    class.egress.iter().any(|rule| HostPattern::parse(&rule.host).is_ok_and(|pattern| pattern.matches(host)))
}

fn unknown(option: &str, host: &Hostname, class: &WorkflowClass) -> String {
    let all: BTreeSet<_> = class.egress.iter().map(|rule| rule.host.as_str()).collect();
    let all = if all.is_empty() { "none".to_owned() } else { all.into_iter().collect::<Vec<_>>().join(", ") };
    format!(
        "{option} {host}: expected a host in the egress of class `{}` of the pack (its hosts: {all}), found another; correct the name, or add the host to the class",
        class.name
    )
}

/// Returns the keys that would be sent without TLS, with their position in the pack. Hosts for which `stays_here` is true are left out,
/// because traffic to them stays on this machine. `warnings` are the findings of `belay lint`.
pub(super) fn in_the_clear(
    objects: &Objects,
    warnings: &[Diagnostic],
    stays_here: &dyn Fn(&Hostname) -> bool,
) -> Vec<String> {
    let spec = &objects.task.spec;
    let contracts: Vec<&ToolContract> =
        objects.contracts.iter().filter(|contract| spec.tools.contains(&contract.name_any())).collect();
    let found = pack::in_the_clear(&objects.pack, &contracts);
    let found = found.into_iter().filter(|one| one.class == spec.workflow_class && !stays_here(&one.host));
    let said = found.map(|one| {
        let finding = one.finding.own();
        let at = warnings.iter().find(|warning| warning.field == finding.field);
        let place = at.map(|at| format!("{}:{}:{}: ", at.file, at.line, at.column)).unwrap_or_default();
        format!("{place}{finding}")
    });
    said.collect()
}

/// Returns the keys that options give and that no host of the task's class uses.
pub(super) fn unused(objects: &Objects, given: &[Credential]) -> Vec<String> {
    let Ok(class) = pack::class_of(&objects.task, &objects.pack) else { return Vec::new() };
    let principal = &objects.task.spec.principal;
    let used: BTreeSet<_> = class
        .egress
        .iter()
        .filter_map(|rule| pack::credential_for(rule, principal))
        .map(|one| format!("{}/{}", one.secret, one.key))
        .collect();
    let names = given.iter().map(|one| format!("{}/{}", one.secret, one.key));
    let unused = names.filter(|name| !used.contains(name)).map(|name| {
        let used = used.iter().cloned().collect::<Vec<_>>().join(", ");
        format!(
            "--credential {name}: nothing uses it; the `credentials` of hosts in class `{}` of the pack for {principal} are {}",
            class.name,
            if used.is_empty() { "none" } else { &used }
        )
    });
    unused.collect()
}

#[cfg(test)]
mod tests;
