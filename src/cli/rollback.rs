//! `belay rollback`: creates the task that rolls back an ended task, once, and reports its state.
//!
//! Guarantees: a task is rolled back by one task, whose name is derived from the name and the UID of the first. Running the command again
//! creates no other task and reports the state of this one.
//!
//! Non-goals: making compensations itself.

use std::io::Write;

use k8s_openapi::api::{authentication::v1::SelfSubjectReview, core::v1::Pod};
use kube::{
    Api, ResourceExt,
    api::{ListParams, PostParams},
};

use super::{
    CliError,
    cluster::{Cluster, explain},
    terminal::Safe,
};
use crate::{
    api::{AgentTask, ToolContract, agent_task::Phase},
    render::{names, rollback},
};

/// Roll back an ended task, as far as its contracts say how.
///
/// Creates a rollback task. It makes the compensation of each call that changed something, newest call first, through contracts, budgets,
/// policy and approvals like any other call. It lists calls that it cannot undo for manual action. Run it again to see the state of the
/// rollback.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay rollback refunds-7 -n payments
  belay rollback refunds-7 -n payments
      Again: the state of the rollback, and what is left for manual action.

Reads AgentTasks, ToolContracts and pods. Creates one AgentTask, TASK-rollback, in your name or, with the verb act-for on agenttasks,
on behalf of --principal. The operator rolls back failed tasks, unless their spec.rollback is OnRequest.

Exit codes:
  0  the rollback task was created or is running, or everything is undone
  1  calls are left for manual action, or there is nothing to undo
  2  the cluster could not be reached, or the command line is wrong")]
pub(super) struct Args {
    /// Name of the ended task
    task: String,
    /// The principal on whose behalf to roll back [default: you]
    #[arg(long, value_name = "NAME")]
    principal: Option<String>,
    #[command(flatten)]
    cluster: Cluster,
}

/// Creates the task or reports its state, and returns the exit code.
pub(super) async fn run(args: &Args, out: &mut dyn Write, notes: &mut dyn Write) -> Result<u8, CliError> {
    let (client, namespace) = args.cluster.connect().await?;
    let tasks: Api<AgentTask> = Api::namespaced(client.clone(), &namespace);
    let failed =
        |what: &str, e: &kube::Error| CliError::new(format!("cannot {what} in namespace {namespace}: {}", explain(e)));
    let of = tasks.get(&args.task).await.map_err(|e| failed(&format!("read AgentTask {}", args.task), &e))?;
    let name = rollback::name(&args.task, &of.uid().unwrap_or_default());
    let known = tasks.get_opt(&name).await.map_err(|e| failed(&format!("read AgentTask {name}"), &e))?;
    if let Some(known) = known {
        let uid = known.spec.rollback_of.as_ref().map(|of| &of.uid);
        if uid != of.metadata.uid.as_ref() {
            return Err(CliError::new(format!(
                "expected AgentTask {name} to roll back {}, found a rollback of another task; delete it after its evidence is sealed",
                args.task
            )));
        }
        return tell(&known, &Api::namespaced(client, &namespace), out).await;
    }
    let phase = of.status.as_ref().and_then(|status| status.phase);
    if !matches!(phase, Some(Phase::Succeeded | Phase::Failed)) {
        let phase = phase.map_or("new".to_owned(), |phase| format!("{phase:?}"));
        return Err(CliError::new(format!(
            "expected a task that has ended, found {} {phase}; wait for its end: belay watch {} -n {namespace}",
            args.task, args.task
        )));
    }
    let contracts: Api<ToolContract> = Api::namespaced(client.clone(), &namespace);
    let contracts = contracts.list(&ListParams::default()).await.map_err(|e| failed("list ToolContracts", &e))?;
    let reviews: Api<SelfSubjectReview> = Api::all(client.clone());
    let review = reviews.create(&PostParams::default(), &SelfSubjectReview::default()).await;
    let status = review.map_err(|e| failed("read your user name", &e))?.status.unwrap_or_default();
    let you = status.user_info.and_then(|user| user.username).unwrap_or_default();
    let principal = args.principal.as_deref().unwrap_or(&you);
    let by = rollback::contracts(&of, &contracts.items);
    let Some(task) = rollback::task(&of, by, &contracts.items, principal, &you) else {
        writeln!(notes, "no call can undo anything: no contract of {} has a rollback.call", Safe(&args.task))?;
        for contract in contracts.items.iter().filter(|contract| of.spec.tools.contains(&contract.name_any())) {
            if let Some(how) = contract.spec.rollback.as_ref().and_then(|rollback| rollback.by_hand.as_ref()) {
                writeln!(notes, "by hand, {}: {}", Safe(&contract.spec.tool), Safe(how))?;
            }
        }
        return Ok(1);
    };
    tasks.create(&PostParams::default(), &task).await.map_err(|e| failed(&format!("create AgentTask {name}"), &e))?;
    writeln!(out, "AgentTask {name} rolls back {}; follow it: belay watch {name} -n {namespace}", Safe(&args.task))?;
    Ok(0)
}

/// Reports the state of a rollback, from its status and the last message of its pod.
async fn tell(task: &AgentTask, pods: &Api<Pod>, out: &mut dyn Write) -> Result<u8, CliError> {
    let status = task.status.clone().unwrap_or_default();
    let phase = status.phase.unwrap_or(Phase::Pending);
    let reason = status.reason.unwrap_or_default();
    writeln!(out, "AgentTask {}: {phase:?} {}", task.name_any(), Safe(&reason))?;
    if let Some(attempt) = status.attempts.last() {
        let pod = pods.get_opt(&attempt.pod).await;
        let pod = pod.map_err(|e| CliError::new(format!("cannot read pod {}: {}", attempt.pod, explain(&e))))?;
        if let Some(said) = pod.as_ref().and_then(said) {
            for line in said.lines() {
                writeln!(out, "{}", Safe(line))?;
            }
        }
    }
    Ok(u8::from(phase == Phase::Failed))
}

/// Returns the last message of the container in the agent's place.
fn said(pod: &Pod) -> Option<String> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    let agent = statuses.iter().find(|status| status.name == names::AGENT)?;
    agent.state.as_ref()?.terminated.as_ref()?.message.clone()
}
