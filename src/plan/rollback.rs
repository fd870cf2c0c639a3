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

/// Name of the task that undoes another of that name.
pub fn name(of: &str) -> String {
    let room = LONGEST_NAME.saturating_sub(ENDING.len());
    let cut = of.get(..room).unwrap_or(of).trim_end_matches('-');
    format!("{cut}{ENDING}")
}

/// The task that undoes another: in the same class, on behalf of this principal, asked for by this user, within the same limits, with the
/// contracts of the calls that undo. `None` if none of its contracts names such a call, or it is a rollback itself. `contracts` may hold more than
/// the task names, and of other namespaces.
pub fn task<C: Borrow<ToolContract>>(
    of: &AgentTask,
    contracts: &[C],
    principal: &str,
    requester: &str,
) -> Option<AgentTask> {
    if of.spec.rollback_of.is_some() {
        return None;
    }
    let named = contracts
        .iter()
        .map(Borrow::borrow)
        .filter(|contract| contract.namespace() == of.namespace() && of.spec.tools.contains(&contract.name_any()));
    let undoing = named.filter_map(|contract| Some(contract.spec.rollback.as_ref()?.call.as_ref()?.contract.clone()));
    let mut tools: BTreeSet<String> = undoing.collect();
    // What they verify by is named by the tool: every contract of the task that has it comes along.
    let reads = contracts.iter().map(Borrow::borrow).filter(|contract| tools.contains(&contract.name_any()));
    let reads: BTreeSet<String> =
        reads.filter_map(|contract| Some(contract.spec.verify.as_ref()?.tool.clone())).collect();
    let readers = contracts
        .iter()
        .map(Borrow::borrow)
        .filter(|contract| contract.namespace() == of.namespace() && reads.contains(&contract.spec.tool));
    if tools.is_empty() {
        return None;
    }
    tools.extend(readers.map(ResourceExt::name_any));
    let limits = Limits { tokens: 0, cost: None, ..of.spec.limits.clone() };
    let mut task = AgentTask::new(
        &name(&of.name_any()),
        AgentTaskSpec {
            objective: format!("Undo what the task {} did.", of.name_any()),
            workflow_class: of.spec.workflow_class.clone(),
            principal: principal.to_owned(),
            agent: None,
            rollback_of: Some(RollbackOf { name: of.name_any(), uid: of.uid().unwrap_or_default() }),
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
