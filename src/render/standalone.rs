//! Checks contracts and packs on their own, whatever refers to them.
//!
//! Guarantees: One pass finds everything that makes a contract or a pack useless for every task, and names it by its field inside the
//! object. `belay lint` and the admission webhook report the same findings.
//!
//! Non-goals: Other objects. [`validated`] reports what follows from two objects together.

use kube::core::Selector;

use super::{Finding, contract, pack, types, validated};
use crate::{
    api::{PolicyPack, ToolContract},
    policy::template::Request,
};

/// Returns what is wrong with a contract.
pub fn contract(contract: &ToolContract) -> Vec<Finding> {
    let input = match contract::check_contract(contract) {
        Ok(tool) => tool.input,
        Err(findings) => return findings.into_iter().map(Finding::own).collect(),
    };
    let spec = &contract.spec;
    let preconditions = spec.preconditions.iter().enumerate().map(|(index, condition)| {
        let wrong = types::check(&condition.cel, &input)
            .map_err(|found| format!("{found} (precondition `{}`)", condition.name));
        (format!("spec.preconditions[{index}].cel"), "an expression that can be `true`", wrong, "it denies every call")
    });
    let either = "an expression that can be `true` or `false`";
    let verify = spec.verify.iter().map(|read| {
        let wrong = types::check_read(&read.applied, &input);
        ("spec.verify.applied".to_owned(), either, wrong, "it never tells the outcome of a call")
    });
    let when = spec.approval.iter().filter_map(|approval| approval.when.as_deref()).map(|when| {
        let wrong = types::check(when, &input);
        ("spec.approval.when".to_owned(), either, wrong, "every call needs approval")
    });
    preconditions
        .chain(verify)
        .chain(when)
        .filter_map(|(field, expected, wrong, so)| {
            let mend = format!("correct the expression: as it is, {so}");
            Some(Finding::new(field, expected, wrong.err()?, mend))
        })
        .collect()
}

/// Returns warnings about a contract that works, but probably allows more than its author meant.
pub fn advice(contract: &ToolContract) -> Vec<Finding> {
    /// Formats that the harness checks and whose values contain no segment separator.
    const FORMATS: [&str; 5] = ["uuid", "date", "date-time", "ipv4", "ipv6"];
    let Some(request) = contract.spec.upstream.http.as_ref().and_then(|http| Request::parse(http).ok()) else {
        return Vec::new();
    };
    let properties = contract.spec.input.get("properties");
    let loose = request.path_arguments().filter(|name| {
        let Some(property) = properties.and_then(|all| all.get(name)) else { return false };
        let said = |keyword: &str| property.get(keyword).is_some();
        let format = property.get("format").and_then(|format| format.as_str());
        let told =
            ["pattern", "enum", "const"].into_iter().any(said) || format.is_some_and(|one| FORMATS.contains(&one));
        property.get("type").is_some_and(|kind| kind == "string") && !told
    });
    loose
        .map(|name| {
            Finding::new(
                format!("spec.input.properties.{name}"),
                "a `pattern`, an `enum` or `format: uuid`, because the argument is a part of the path",
                "a text of any form",
                "describe its form, such as `pattern: \"^[A-Za-z0-9-]{1,64}$\"`; without it, the agent chooses what the call reads or changes",
            )
        })
        .collect()
}

/// Returns what is wrong with a pack.
pub fn pack(pack: &PolicyPack) -> Vec<Finding> {
    let mut findings = pack::check_pack(pack);
    findings.extend(pack.spec.workflow_classes.iter().flat_map(validated::check_class));
    if let Err(error) = Selector::try_from(pack.spec.namespace_selector.clone()) {
        findings.push(Finding::new(
            "spec.namespaceSelector",
            "a valid label selector",
            error.to_string(),
            "correct it: as it is, the pack governs nothing",
        ));
    }
    if findings.is_empty() {
        findings = never_true(pack);
    }
    findings.into_iter().map(Finding::own).collect()
}

/// Finds the expressions of a pack that are true for no call.
fn never_true(pack: &PolicyPack) -> Vec<Finding> {
    let rules = pack.spec.rules.iter().enumerate();
    let rules = rules.filter_map(|(index, rule)| Some((format!("spec.rules[{index}].when"), rule.when.as_deref()?)));
    let terms = pack.spec.risk.iter().flat_map(|risk| risk.terms.iter().enumerate());
    let terms = terms.map(|(index, term)| (format!("spec.risk.terms[{index}].when"), term.when.as_str()));
    let wrong = rules.chain(terms).filter_map(|(field, source)| Some((field, types::check_pack(source).err()?)));
    let mend = "correct the expression: as it is, it counts against every call, or allows none";
    wrong
        .map(|(field, found)| Finding::new(field, "an expression that can be `true` or `false`", found, mend))
        .collect()
}
