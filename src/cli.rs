//! The `belay` command: `approvals`, `approve`, `completion`, `contract`, `deny`, `disclose`, `incident`, `init`, `lint`, `man`, `prove`, `rollback`, `run`, `verify` and `watch`, also as `kubectl belay`.
//!
//! Promises: one exit code a meaning, and nothing from a log, a task or a cluster reaches the terminal but through
//! `terminal::Safe`. Refuses: to change anything, anywhere, but the folders that `init`, `--save` and `--out` name, one person's decision
//! that `approve` or `deny` adds to one request, the one task that `rollback` makes, and what `run` runs.

use std::{
    ffi::OsString,
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::{
    inherited::Descriptor,
    run::{probe, sandbox, upstream},
};

/// `belay approvals`, `belay approve` and `belay deny`.
mod approve;
/// Where the cluster is and which namespace is meant.
mod cluster;
/// `belay completion`.
mod completion;
/// `belay contract`.
mod contract;
/// Where a task's evidence is.
mod evidence;
/// Folders that are filled for people.
mod folder;
/// `belay incident`.
mod incident;
/// `belay init`.
mod init;
/// `belay lint`.
mod lint;
/// `belay man`.
mod man;
/// `belay prove` and `belay disclose`.
mod prove;
/// The page of the commands.
pub mod reference;
/// `belay rollback`.
mod rollback;
/// `belay run`.
mod run;
/// Text that is safe to show, and colours.
mod terminal;
/// `belay verify`.
mod verify;
/// `belay watch`.
mod watch;

/// Usage, input or output is wrong: nothing is said about the evidence or the task.
const EXIT_ERROR: u8 = 2;

/// Something kept the command from its work.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// What was expected, what was found, what to do.
    #[error("{0}")]
    Message(String),
    /// Several such, a line each.
    #[error("{}", .0.join("\n"))]
    Listed(Vec<String>),
    /// The reader of our output has gone, as in `belay watch … | head`.
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
}

impl CliError {
    fn new(message: impl Into<String>) -> Self {
        Self::Message(message.into())
    }

    /// A part that is not in this build.
    #[cfg(not(all(feature = "s3", feature = "mcp-client")))]
    fn left_out(what: &str) -> Self {
        Self::new(format!(
            "{what}: this `belay` was built without it, to be quick to build; `cargo build --release` builds all of it"
        ))
    }
}

/// Run and watch AI agents, approve their calls, and verify their evidence.
#[derive(Debug, Parser)]
#[command(name = "belay", version, about, long_about = None, propagate_version = true, subcommand_required = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Approvals(approve::List),
    Approve(approve::Approve),
    Completion(completion::Args),
    Contract(contract::Args),
    Deny(approve::Deny),
    Disclose(prove::Disclose),
    Incident(incident::Args),
    Init(init::Args),
    Lint(lint::Args),
    Man(man::Args),
    Prove(prove::Args),
    Rollback(rollback::Args),
    Run(Box<run::Args>),
    Verify(verify::Args),
    Watch(watch::Args),
}

/// Whether this is a process between `belay run` and a sandbox, which has one descriptor from there to hand on: the open filter of system calls.
pub fn hands_on(args: &[OsString]) -> bool {
    args.get(1).is_some_and(|first| first == sandbox::view::VIEW)
}

/// Runs the command line and gives the exit code. Called as `kubectl-belay`, it speaks as `kubectl belay`. `inherited` are the descriptors that
/// this process was started with.
pub async fn run(args: impl IntoIterator<Item = OsString>, inherited: io::Result<Vec<Descriptor>>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    if let Some(code) = within(&args, &inherited).await {
        return code;
    }
    let plugin = args.first().and_then(|name| Path::new(name).file_stem()).is_some_and(|name| name == "kubectl-belay");
    let command = if plugin { Cli::command().bin_name("kubectl belay") } else { Cli::command() };
    let cli = match command.try_get_matches_from(args).and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        // Help and version too; if they cannot be printed, there is nobody to tell.
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(EXIT_ERROR));
        }
    };
    let result = match cli.command {
        Command::Approvals(args) => approve::list(&args, &mut io::stdout().lock(), &mut io::stderr().lock()).await,
        Command::Approve(args) => approve::approve(&args, &mut io::stdout().lock(), &mut io::stderr().lock()).await,
        Command::Deny(args) => approve::deny(&args, &mut io::stdout().lock(), &mut io::stderr().lock()).await,
        Command::Completion(args) => completion::run(&args, Cli::command(), plugin, &mut io::stdout().lock()),
        Command::Contract(args) => contract::run(&args, &mut io::stdout().lock(), &mut io::stderr().lock()).await,
        Command::Disclose(args) => prove::disclose(&args, &mut io::stdout().lock()),
        Command::Incident(args) => incident::run(&args, &mut io::stdout().lock()).await,
        Command::Init(args) => init::run(&args, &mut io::stdout().lock()),
        Command::Lint(args) => lint::run(&args, &mut io::stdout().lock(), &mut io::stderr().lock()),
        Command::Man(args) => man::run(&args, Cli::command(), &mut io::stdout().lock()),
        Command::Prove(args) => prove::run(&args, &mut io::stdout().lock()).await,
        Command::Rollback(args) => rollback::run(&args, &mut io::stdout().lock(), &mut io::stderr().lock()).await,
        Command::Run(args) => run::run(&args).await,
        Command::Verify(args) => verify::run(&args, &mut io::stdout().lock()).await,
        Command::Watch(args) => watch::run(&args).await,
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(CliError::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => ExitCode::from(EXIT_ERROR),
        Err(CliError::Listed(all)) => {
            all.iter().for_each(|one| last_words(one));
            crate::output::stderr().end();
            ExitCode::from(EXIT_ERROR)
        }
        Err(e) => {
            last_words(&e.to_string());
            crate::output::stderr().end();
            ExitCode::from(EXIT_ERROR)
        }
    }
}

/// Says what went wrong. Whoever does not read it does not keep the process.
fn last_words(error: &str) {
    crate::output::stderr().say(format!("error: {}\n", terminal::Safe(error)).into_bytes());
}

/// The subcommands by which `belay run` runs itself, within its sandbox and beside it: nobody else has a use for them.
async fn within(args: &[OsString], inherited: &io::Result<Vec<Descriptor>>) -> Option<ExitCode> {
    let done = match args.get(1)?.to_str()? {
        sandbox::hold::HOLD => sandbox::hold::hold().map(|()| 0).map_err(|error| error.to_string()),
        sandbox::view::VIEW => match sandbox::view::enter(Path::new(args.get(2)?), args.get(3..)?).await {
            Ok(never) => match never {},
            Err(error) => Err(error),
        },
        probe::PROBE => match probe::answer(&args.get(2)?.to_string_lossy(), inherited).await {
            Ok(answer) => writeln!(io::stdout(), "{answer}").map(|()| 0).map_err(|error| error.to_string()),
            Err(error) => Err(error),
        },
        upstream::KEEP => upstream::keep(&args.get(2)?.to_string_lossy()).map_err(|error| error.to_string()),
        _ => return None,
    };
    Some(match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let _ = writeln!(io::stderr().lock(), "{error}");
            ExitCode::from(EXIT_ERROR)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
