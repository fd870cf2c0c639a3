//! The `belay` command: `approvals`, `approve`, `completion`, `contract`, `deny`, `disclose`, `incident`, `init`, `lint`, `man`, `prove`,
//! `rollback`, `run`, `verify` and `watch`, also as `kubectl belay`.
//!
//! Guarantees: each exit code has one meaning. Text from a log, a task or a cluster reaches the terminal only through `terminal::Safe`. The
//! command changes nothing except the folders that `init`, `--save` and `--out` name, the one decision that `approve` or `deny` adds to one
//! request, the one task that `rollback` creates, and what `run` runs.

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
/// The connection to the cluster, and the namespace.
mod cluster;
/// `belay completion`.
mod completion;
/// `belay contract`.
mod contract;
/// The location of a task's evidence.
mod evidence;
/// Folders that commands fill with files.
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
/// The reference page of the commands.
pub mod reference;
/// `belay rollback`.
mod rollback;
/// `belay run`.
mod run;
/// Text that is safe to show, and colors.
mod terminal;
/// `belay verify`.
mod verify;
/// `belay watch`.
mod watch;

/// The exit code for wrong usage, input or output: it says nothing about the evidence or the task.
const EXIT_ERROR: u8 = 2;

/// Why a command could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// A message: what was expected, what was found, what to do.
    #[error("{0}")]
    Message(String),
    /// Several messages, one a line.
    #[error("{}", .0.join("\n"))]
    Listed(Vec<String>),
    /// The reader of the output is gone, as in `belay watch … | head`.
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
}

impl CliError {
    fn new(message: impl Into<String>) -> Self {
        Self::Message(message.into())
    }

    /// Returns the error for a part that is not in this build.
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

/// Returns whether this process runs between `belay run` and a sandbox. Such a process inherits one descriptor that it passes on: the open
/// system call filter.
pub fn hands_on(args: &[OsString]) -> bool {
    args.get(1).is_some_and(|first| first == sandbox::view::VIEW)
}

/// Runs the command line and returns the exit code. If the program is called `kubectl-belay`, the help says `kubectl belay`. `inherited`
/// are the file descriptors with which this process was started.
pub async fn run(args: impl IntoIterator<Item = OsString>, inherited: io::Result<Vec<Descriptor>>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    if let Some(code) = within(&args, &inherited).await {
        return code;
    }
    let plugin = args.first().and_then(|name| Path::new(name).file_stem()).is_some_and(|name| name == "kubectl-belay");
    let command = if plugin { Cli::command().bin_name("kubectl belay") } else { Cli::command() };
    let cli = match command.try_get_matches_from(args).and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        // Help and version also arrive here. If they cannot be printed, nothing can be reported.
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

/// Reports an error. A reader that does not read it does not block the process.
fn last_words(error: &str) {
    crate::output::stderr().say(format!("error: {}\n", terminal::Safe(error)).into_bytes());
}

/// Runs the hidden subcommands by which `belay run` runs itself, in its sandbox and beside it. Users have no use for them.
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
