//! Checks and renders a pack's rules for tool calls.
//!
//! Guarantees: What is rendered compiles. A call can require approval only if the pack says who approves. A tool that the pack never allows
//! the task's principal to call is found before the task runs.
//!
//! Non-goals: Decisions about calls, see [`access`].

use std::collections::BTreeSet;

use kube::ResourceExt;

use super::{Finding, approval, condition};
use crate::{
    api::PolicyPack,
    policy::{
        access,
        config::{Access, PolicyConfig, RuleDecision},
        sensitivity::Detectors,
    },
};

/// The variables of a pack's expressions.
pub const VARIABLES: [&str; 7] = ["args", "task", "principal", "usage", "tool", "effect", "data"];

/// Renders a pack's rules for tool calls, and collects everything that is wrong with them.
pub fn render(pack: &PolicyPack, findings: &mut Vec<Finding>) -> Access {
    let spec = &pack.spec;
    let at = |field: &str| format!("PolicyPack/{} spec.{field}", pack.name_any());
    let mut rendered = Access {
        classification: spec.classification.clone(),
        rules: spec.rules.clone(),
        risk: spec.risk.clone(),
        approval: None,
    };
    compiles(&rendered, &at, findings);
    thresholds(&rendered, &at, findings);
    if !rendered.rules.is_empty() && rendered.rules.iter().all(|rule| rule.decision == RuleDecision::Deny) {
        findings.push(Finding::new(
            at("rules"),
            "at least one rule that allows calls or requires approval, because a pack with rules denies all other calls",
            "rules that deny only",
            "add a rule with decision Allow for the calls that are to pass",
        ));
    }
    // Without a rule or a risk score that requires approval, the pack's `approval` has no effect. If one requires approval, a rule of the
    // CRD demands `approval`. Without it, such calls are denied.
    let approval = spec.approval.as_ref().map(|approval| approval::render(approval, &at, findings));
    rendered.approval = approval.filter(|_| rendered.may_ask());
    rendered
}

/// Checks whether patterns and expressions compile, and whether names are unique.
fn compiles(rendered: &Access, at: &impl Fn(&str) -> String, findings: &mut Vec<Finding>) {
    for (index, pattern) in rendered.classification.iter().enumerate() {
        if let Err(error) = Detectors::compile(std::slice::from_ref(pattern)) {
            findings.push(Finding::new(
                at(&format!("classification[{index}].pattern")),
                "a regular expression of the regex crate, not too large",
                error.lines().last().unwrap_or_default().trim().to_owned(),
                "correct the pattern",
            ));
        }
    }
    // Each pattern may be small enough on its own, and all together too large.
    if findings.is_empty()
        && let Err(error) = Detectors::compile(&rendered.classification)
    {
        let expected = "patterns that are small enough together";
        findings.push(Finding::new(at("classification"), expected, error, "drop some, or make them simpler"));
    }
    let whens = rendered
        .rules
        .iter()
        .enumerate()
        .filter_map(|(index, rule)| Some((format!("rules[{index}].when"), rule.when.as_deref()?)));
    let terms = rendered.risk.iter().flat_map(|risk| risk.terms.iter().enumerate());
    let terms = terms.map(|(index, term)| (format!("risk.terms[{index}].when"), term.when.as_str()));
    for (field, source) in whens.chain(terms) {
        if let Err(error) = condition::check_among(source, &VARIABLES) {
            findings.push(Finding::new(
                at(&field),
                format!("a CEL expression over {}", VARIABLES.join(", ")),
                error.to_string(),
                "correct the expression",
            ));
        }
    }
    let patterns = rendered.classification.iter().map(|pattern| ("classification", &pattern.name));
    let rules = rendered.rules.iter().map(|rule| ("rules", &rule.name));
    let terms = rendered.risk.iter().flat_map(|risk| &risk.terms).map(|term| ("risk.terms", &term.name));
    let mut seen = BTreeSet::new();
    for (field, name) in patterns.chain(rules).chain(terms) {
        if !seen.insert((field, name)) {
            findings.push(Finding::new(at(field), "unique names", format!("`{name}` twice"), "rename one"));
        }
    }
}

fn thresholds(rendered: &Access, at: &impl Fn(&str) -> String, findings: &mut Vec<Finding>) {
    let Some(risk) = &rendered.risk else { return };
    let most = risk.terms.iter().fold(0_i64, |sum, term| sum.saturating_add(term.points));
    let mut wrong = |field: &str, expected: String, found: i64, fix: &str| {
        let found = found.to_string();
        findings.push(Finding::new(at(&format!("risk.{field}")), expected, found, fix));
    };
    if let Some((approve, deny)) = risk.approve_at.zip(risk.deny_at).filter(|(approve, deny)| approve >= deny) {
        let fix = "lower it, or remove it: as it is, no call needs approval";
        wrong("approveAt", format!("less than denyAt, which is {deny}"), approve, fix);
    }
    for (field, limit) in [("approveAt", risk.approve_at), ("denyAt", risk.deny_at)] {
        if let Some(limit) = limit.filter(|limit| *limit > most) {
            let fix = "lower it: as it is, no call reaches it";
            wrong(field, format!("at most {most}, what all terms add up to"), limit, fix);
        }
    }
}

/// Finds the tools of a task that its principal can never call under its pack. This does not end a task that runs already: its calls are
/// denied.
pub fn unreachable(policy: &PolicyConfig, findings: &mut Vec<Finding>) {
    let (principal, class) = (&policy.task.principal, &policy.task.workflow_class);
    for tool in &policy.tools {
        let Some(why) = access::always_denied(&policy.access, principal, tool) else { continue };
        findings.push(Finding::new(
            format!("ToolContract/{} spec.tool", tool.contract),
            format!("a tool that the pack allows `{principal}` to call in class `{class}`"),
            format!("`{}`: {why}", tool.name),
            "drop the tool from the task, or have the pack's rules changed",
        ));
    }
}
