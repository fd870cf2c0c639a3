//! `belay init`: a folder that `belay run` runs at once, to begin from.
//!
//! Promises: what is written is examples/hello, as the tests run it. Refuses: to overwrite anything; nothing is written where a file is
//! there already.

use std::{io::Write, path::PathBuf};

use super::{CliError, folder, terminal::Safe};

/// Name, content, and what it is.
const FILES: [(&str, &str, &str); 5] = [
    ("task.yaml", include_str!("../../examples/hello/task.yaml"), "what the agent is to do, and its limits"),
    (
        "contracts.yaml",
        include_str!("../../examples/hello/contracts.yaml"),
        "its tools, and what calls have to be like",
    ),
    ("policy-pack.yaml", include_str!("../../examples/hello/policy-pack.yaml"), "what tasks like it may do at all"),
    ("agent.py", include_str!("../../examples/hello/agent.py"), "the agent: thirty lines that know nothing of Belay"),
    (
        "standin.py",
        include_str!("../../examples/hello/standin.py"),
        "stands in for a model and a shop, so that no key is needed",
    ),
];

/// Make a folder with a task, contracts, a pack and an agent, which `belay run` runs at once.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay init hello && belay run hello/task.yaml --upstream shop.test='python3 hello/standin.py'
      An agent on its rope: what it may do, it does; what it may not, it is told, and the evidence says so.

Exit codes:
  0  the folder is there
  2  it is not: a file is there already, or cannot be written")]
pub(super) struct Args {
    /// The folder; it is made unless it is there
    #[arg(default_value = "hello")]
    folder: PathBuf,
}

/// Runs the command and gives the exit code.
pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<u8, CliError> {
    folder::fill(&args.folder, FILES.iter().map(|(name, text, _)| (*name, *text)))?;
    for (name, _, what) in FILES {
        let path = args.folder.join(name).display().to_string();
        writeln!(out, "{:<30} {what}", Safe(&path).to_string())?;
    }
    let folder = Safe(&args.folder.display().to_string()).to_string();
    writeln!(out, "\nRun it:\n  belay run {folder}/task.yaml --upstream shop.test='python3 {folder}/standin.py'")?;
    Ok(0)
}
