//! Builds the rollback task of a task, from the task and its contracts. The operator creates it when the task has failed, `belay rollback`
//! on request.

use std::{borrow::Borrow, collections::BTreeSet};

use kube::ResourceExt;

use super::names;
use crate::{
    api::{
        AgentTask, ToolContract,
        agent_task::{AgentTaskSpec, Limits, Retry, RollbackWhen, Workspace},
    },
    policy::config::RollbackOf,
};

/// The ending of a rollback task's name.
const ENDING: &str = "-rollback";
/// The longest name of a task.
const LONGEST_NAME: usize = 52;

/// Returns the name of the rollback task of the task with this name and UID.
pub fn name(of: &str, uid: &str) -> String {
    if of.len().saturating_add(ENDING.len()) <= LONGEST_NAME {
        return format!("{of}{ENDING}");
    }
    // Two long names may have the same beginning, so the UID is part of the name.
    let apart = format!("-{}{ENDING}", uid.get(..8).unwrap_or(uid));
    let cut = of.get(..LONGEST_NAME.saturating_sub(apart.len())).unwrap_or(of).trim_end_matches('-');
    format!("{cut}{apart}")
}

/// Returns the contracts of the compensations of a task, by its contracts as they are now. `contracts` may hold contracts that the task
/// does not name, and contracts of other namespaces.
pub fn contracts<C: Borrow<ToolContract>>(of: &AgentTask, contracts: &[C]) -> BTreeSet<String> {
    let named = of_namespace(of, contracts).filter(|contract| of.spec.tools.contains(&contract.name_any()));
    named.filter_map(|contract| Some(contract.spec.rollback.as_ref()?.call.as_ref()?.contract.clone())).collect()
}

fn of_namespace<'c, C: Borrow<ToolContract>>(
    of: &AgentTask,
    contracts: &'c [C],
) -> impl Iterator<Item = &'c ToolContract> {
    let namespace = of.namespace();
    contracts.iter().map(Borrow::borrow).filter(move |contract| contract.namespace() == namespace)
}

/// Builds the rollback task of a task, with compensations by these contracts. It has the same class, acts for this principal, is requested
/// by this user, and has the same limits except for denials. Its tools include the read tools of the contracts' `verify`. Returns `None` if
/// there is no compensation, or if the task is a rollback itself. `all` may hold contracts of other namespaces.
pub fn task<C: Borrow<ToolContract>>(
    of: &AgentTask,
    by: BTreeSet<String>,
    all: &[C],
    principal: &str,
    requester: &str,
) -> Option<AgentTask> {
    if of.spec.rollback_of.is_some() || by.is_empty() {
        return None;
    }
    let undoing = of_namespace(of, all).filter(|contract| by.contains(&contract.name_any()));
    let reads: BTreeSet<&str> =
        undoing.filter_map(|contract| Some(contract.spec.verify.as_ref()?.tool.as_str())).collect();
    // If several contracts describe the tool, use the one that the original task names, or else the first one.
    let reader = |tool: &str| {
        let names = of_namespace(of, all).filter(|one| one.spec.tool == tool).map(ResourceExt::name_any);
        names.min_by_key(|name| (!of.spec.tools.contains(name), name.clone()))
    };
    let readers: Vec<String> = reads.into_iter().filter_map(reader).collect();
    let tools: BTreeSet<String> = by.into_iter().chain(readers).collect();
    let limits = Limits { tokens: 0, cost: None, denials: None, ..of.spec.limits.clone() };
    let uid = of.uid().unwrap_or_default();
    let mut task = AgentTask::new(
        &name(&of.name_any(), &uid),
        AgentTaskSpec {
            objective: format!("Undo what the task {} did.", of.name_any()),
            workflow_class: of.spec.workflow_class.clone(),
            task_class: of.spec.task_class.clone(),
            principal: principal.to_owned(),
            agent: None,
            rollback_of: Some(RollbackOf { name: of.name_any(), uid }),
            rollback: RollbackWhen::OnRequest,
            tools: tools.into_iter().collect(),
            workspace: Workspace::default(),
            limits,
            retry: Retry::default(),
        },
    );
    task.metadata.namespace = of.namespace();
    task.annotations_mut().insert(names::REQUESTED_BY.to_owned(), requester.to_owned());
    Some(task)
}
