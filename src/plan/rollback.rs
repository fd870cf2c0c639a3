//! The task that undoes another: made of it and its contracts, by the operator when it has failed and by `belay rollback`.

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

/// Ends the name of such a task.
const ENDING: &str = "-rollback";
/// Longest name of a task.
const LONGEST_NAME: usize = 52;

/// Name of the task that undoes another of that name and UID.
pub fn name(of: &str, uid: &str) -> String {
    if of.len().saturating_add(ENDING.len()) <= LONGEST_NAME {
        return format!("{of}{ENDING}");
    }
    // Two names may begin alike.
    let apart = format!("-{}{ENDING}", uid.get(..8).unwrap_or(uid));
    let cut = of.get(..LONGEST_NAME.saturating_sub(apart.len())).unwrap_or(of).trim_end_matches('-');
    format!("{cut}{apart}")
}

/// The contracts of the calls that would undo a task, by its contracts as they are now. `contracts` may hold more than the task names, and of
/// other namespaces.
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

/// The task that undoes another by calls of these contracts: in the same class, on behalf of this principal, asked for by this user, within
/// the same limits but for denials. What its contracts verify by comes along. `None` if there is no such call, or it is a rollback itself.
/// `all` may hold contracts of other namespaces.
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
    // Of several contracts for one tool that of the task that is undone, or else the first.
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
