//! Checks each task with the contracts that it names and with the pack that governs it.
//!
//! Guarantees: a finding belongs to the object that must be corrected. A task that one of the possible packs admits has no finding.
//!
//! Non-goals: treating a pack or a namespace that is not among the files as an error.

use std::collections::{BTreeMap, BTreeSet};

use kube::ResourceExt;

use super::{
    diagnostic::Severity,
    found::Found,
    object::{Entry, Object, typed},
};
use crate::{
    api::{
        AgentTask, PolicyPack, PolicyPackSpec, ToolContract,
        agent_task::{Limits, Resources},
        policy_pack::{EgressRule, EvidencePolicy, Models, RetentionMode, StatePolicy, WorkflowClass},
    },
    policy::config::{EgressUse, SideEffect},
    render::{Finding, contract, names, pack_among, validated},
};

/// The default namespace of the operator and the gateway, in which no task may run.
const SYSTEM_NAMESPACE: &str = "belay-system";

impl Found<'_> {
    /// Checks each task with the contracts that it names and the pack that governs it.
    pub(super) fn tasks(
        &mut self,
        objects: &[Object<'_>],
        contracts: &[(&Object<'_>, &ToolContract)],
        packs: &[(&Object<'_>, &PolicyPack)],
        namespaces: &BTreeMap<String, BTreeMap<String, String>>,
    ) -> Vec<String> {
        let mut notes = BTreeSet::new();
        let all: Vec<&PolicyPack> = packs.iter().map(|(_, pack)| *pack).collect();
        let broken_pack = objects.iter().any(|object| object.kind == "PolicyPack" && object.typed.is_none());
        let plain_contracts: Vec<&ToolContract> = contracts.iter().map(|(_, contract)| *contract).collect();
        for (object, task) in typed::<AgentTask>(objects) {
            let name = format!("AgentTask {}/{}", object.namespace, object.name);
            let generous = generous(task, &plain_contracts);
            let candidates = match namespaces.get(&object.namespace) {
                _ if all.is_empty() => {
                    if !broken_pack {
                        notes.insert(format!(
                            "{name}: no PolicyPack is among the files, so the limits and rules of a pack are not checked"
                        ));
                    }
                    vec![&generous]
                }
                Some(labels) => match pack_among(labels, all.iter().copied()) {
                    Ok(pack) => vec![pack],
                    // The pack that cannot be read may be the right one.
                    Err(_) if broken_pack => vec![&generous],
                    Err(finding) => {
                        self.add_at_field(&object.entry, Severity::Error, finding);
                        vec![&generous]
                    }
                },
                None => {
                    let names: Vec<_> = all.iter().map(|pack| format!("`{}`", pack.name_any())).collect();
                    notes.insert(format!(
                        "{name}: Namespace `{}` is not among the files, so at least one of the packs has to admit the task: {}",
                        object.namespace,
                        names.join(", ")
                    ));
                    all.clone()
                }
            };
            let judged: Vec<_> = candidates
                .iter()
                .map(|pack| {
                    (*pack, validated::validate(&as_admitted(task), &plain_contracts, pack, SYSTEM_NAMESPACE).err())
                })
                .collect();
            if judged.iter().any(|(_, findings)| findings.is_none()) {
                continue;
            }
            let several = judged.len() > 1;
            for (pack, findings) in judged {
                for finding in findings.into_iter().flatten() {
                    let (entry, mut finding) = self.attribute(object, objects, packs, pack, finding);
                    if self.of_unreadable(object, objects, task, &finding) {
                        continue;
                    }
                    if several {
                        finding.fix = format!("{} (checked against PolicyPack `{}`)", finding.fix, pack.name_any());
                    } else if !std::ptr::eq(entry, &object.entry) {
                        finding.fix = format!("{} (for {name})", finding.fix);
                    }
                    self.add_at_field(entry, Severity::Error, finding);
                }
            }
        }
        notes.into_iter().collect()
    }

    /// Returns the object that a finding about a task belongs to.
    fn attribute<'o, 'n>(
        &self,
        task: &'o Object<'n>,
        objects: &'o [Object<'n>],
        packs: &[(&'o Object<'n>, &PolicyPack)],
        pack: &PolicyPack,
        finding: Finding,
    ) -> (&'o Entry<'n>, Finding) {
        let of_contract = finding.field.strip_prefix("ToolContract/").and_then(|rest| rest.split_once(' '));
        let object = if let Some((name, _)) = of_contract {
            objects.iter().find(|object| {
                object.kind == "ToolContract" && object.name == name && object.namespace == task.namespace
            })
        } else if finding.field.starts_with("PolicyPack") {
            packs.iter().find(|(_, other)| std::ptr::eq(*other, pack)).map(|(object, _)| *object)
        } else {
            None
        };
        match object {
            Some(object) => (&object.entry, finding.own()),
            None => (&task.entry, finding),
        }
    }

    /// Returns whether a contract counts as missing only because it cannot be read, which is already reported.
    fn of_unreadable(&self, object: &Object<'_>, objects: &[Object<'_>], task: &AgentTask, finding: &Finding) -> bool {
        let index = finding.field.strip_prefix("spec.tools[").and_then(|rest| rest.strip_suffix(']'));
        let name = index.and_then(|index| task.spec.tools.get(index.parse::<usize>().ok()?));
        name.is_some_and(|name| {
            objects.iter().any(|other| {
                other.kind == "ToolContract"
                    && other.typed.is_none()
                    && &other.name == name
                    && other.namespace == object.namespace
            })
        })
    }
}

/// Returns a pack that allows everything that the task and its contracts ask for: a finding under this pack holds under any pack.
fn generous(task: &AgentTask, contracts: &[&ToolContract]) -> PolicyPack {
    let hosts = contracts.iter().filter_map(|contract| contract::authority_of(&contract.spec.upstream));
    let egress = hosts.map(|at| EgressRule {
        host: at.host.to_string(),
        ports: vec![at.port.into()],
        uses: vec![EgressUse::Tools],
        credentials: vec![],
    });
    let most = || Some("999999T".to_owned());
    PolicyPack::new(
        "any",
        PolicyPackSpec {
            state: Some(StatePolicy { bucket: "any".into(), prefix: None }),
            environment: "any".into(),
            namespace_selector: Default::default(),
            workflow_classes: vec![WorkflowClass {
                name: task.spec.workflow_class.clone(),
                runtime_class_name: None,
                egress: egress.collect(),
                ignored_hosts: vec![],
                upstream_timeout_seconds: None,
                allowed_effects: vec![SideEffect::Read, SideEffect::Write, SideEffect::External],
                limits: Limits {
                    wall_time_seconds: i64::MAX,
                    tool_calls: i64::MAX,
                    tokens: i64::MAX,
                    denials: None,
                    cost: None,
                    approval_wait_seconds: Some(i64::MAX),
                },
                resources: Resources { cpu: most(), memory: most(), ephemeral_storage: most() },
            }],
            task_classes: task.spec.task_class.iter().cloned().collect(),
            models: Models::default(),
            classification: vec![],
            rules: vec![],
            risk: None,
            approval: None,
            evidence: EvidencePolicy {
                bucket: "any".into(),
                prefix: None,
                mode: RetentionMode::Compliance,
                retention_days: 1,
            },
        },
    )
}

/// Returns the task as admission changes it: with a record of who created it.
fn as_admitted(task: &AgentTask) -> AgentTask {
    let mut task = task.clone();
    let principal = task.spec.principal.clone();
    task.annotations_mut().entry(names::REQUESTED_BY.to_owned()).or_insert(principal);
    task
}
