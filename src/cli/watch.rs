//! `belay watch`: shows a task live until it ends.
//!
//! It has two sources: the AgentTask itself, and the output of the harness in each attempt's pod, which prints every record of the
//! evidence. The display is a convenience. The evidence is in the bucket, and `belay verify` verifies it.

use std::io::IsTerminal;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    core::DeserializeGuard,
    runtime::{WatchStreamExt, watcher::watch_object},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Duration, MissedTickBehavior, interval},
};

use self::{
    logs::{Event, Progress},
    screen::Screen,
    view::View,
};
use super::{
    CliError,
    cluster::{Cluster, explain},
    terminal::Paint,
};
use crate::api::{AgentTask, agent_task::Phase};

mod logs;
pub(super) mod screen;
pub(super) mod view;

/// The time between two redraws of the bars, for the clock in them.
const TICK: Duration = Duration::from_secs(1);
/// The maximum number of records that wait to be shown. The follower waits when there are more.
const WAITING: usize = 256;

/// Watch a task live: every call, every denial, the budgets, and how it ends.
///
/// Follows the task through all attempts until it has succeeded or failed.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay watch tidy -n team-a
  kubectl belay watch tidy -n team-a

Reads AgentTasks (get, list, watch) and the logs of their pods (get pods/log). Without the logs, it shows the status only.

Exit codes:
  0  the task succeeded
  1  the task failed, or was deleted
  2  the task could not be watched, or the command line is wrong")]
pub(super) struct Args {
    /// The task's name
    task: String,
    #[command(flatten)]
    cluster: Cluster,
    /// Plain text even on a terminal; NO_COLOR=1 does the same
    #[arg(long)]
    no_color: bool,
}

/// Watches the task and returns the exit code.
pub(super) async fn run(args: &Args) -> Result<u8, CliError> {
    let (client, namespace) = args.cluster.connect().await?;
    let tasks = Api::<DeserializeGuard<AgentTask>>::namespaced(client.clone(), &namespace);
    let name = &args.task;
    let found = tasks.get_opt(name).await;
    match found.map_err(|e| CliError::new(format!("cannot read AgentTask {namespace}/{name}: {}", explain(&e))))? {
        Some(DeserializeGuard(Ok(_))) => {}
        Some(DeserializeGuard(Err(e))) => {
            let message = format!("this belay cannot read AgentTask {namespace}/{name}: {}", e.error);
            return Err(CliError::new(message));
        }
        None => {
            return Err(CliError::new(format!(
                "there is no AgentTask {name} in namespace {namespace}; give another -n"
            )));
        }
    }

    let stdout = std::io::stdout();
    let terminal = stdout.is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
    let paint = Paint::new(terminal && !args.no_color);
    let mut screen = Screen::new(stdout.lock(), terminal);
    let mut view = View::new(&namespace, name, paint);

    let (progress, seen) = watch::channel(Progress::default());
    let (sender, mut records) = mpsc::channel(WAITING);
    let pods = Api::<Pod>::namespaced(client, &namespace);
    let follower = tokio::spawn(logs::follow(pods, name.clone(), seen, sender));

    let mut updates = std::pin::pin!(watch_object(tasks, name).default_backoff());
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut end = None;
    let code = loop {
        tokio::select! {
            // Records first, because they are older than the status that they led to.
            biased;
            event = records.recv() => match event {
                Some(Event::Record { attempt, record }) => view.record(attempt, &record),
                Some(Event::Notice(notice)) => view.notice(&notice),
                // The follower ends after the task has ended.
                None => break end.unwrap_or(1),
            },
            update = updates.next(), if end.is_none() => match update {
                Some(Ok(Some(DeserializeGuard(Ok(task))))) => {
                    view.task(&task);
                    let status = task.status.unwrap_or_default();
                    end = match status.phase {
                        Some(Phase::Succeeded) => Some(0),
                        Some(Phase::Failed) => Some(1),
                        Some(Phase::Pending | Phase::Running | Phase::Parked) | None => None,
                    };
                    progress.send_replace(Progress { newest: status.attempt.unwrap_or_default(), ended: end.is_some() });
                }
                Some(Ok(Some(DeserializeGuard(Err(e))))) => view.notice(&format!("the task cannot be read: {}", e.error)),
                Some(Ok(None)) => {
                    view.deleted();
                    end = Some(1);
                    progress.send_modify(|p| p.ended = true);
                }
                // The watch continues by itself after a growing pause.
                Some(Err(e)) => view.notice(&format!("the API server: {e}; trying again")),
                None => break 1,
            },
            _ = tick.tick() => {}
        }
        screen.show(&view.take_lines(), &view.panel(screen::width()))?;
    };
    follower.abort();
    view.finish();
    screen.show(&view.take_lines(), &[])?;
    screen.flush()?;
    Ok(code)
}
