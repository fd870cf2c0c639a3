//! `belay contract init`: drafts contracts from the tools that an MCP server lists, for review.
//!
//! Guarantees: a draft is never wider than the listed tool. It says which parts of the listed tool it lacks, and it passes `belay lint`. No
//! tool is called and no file is overwritten. If the server redirects, the draft has the URL that the redirects lead to. If the server says
//! that its own tool is harmless, the draft says that this is the server's claim.

use std::{io::Write, path::PathBuf, time::Duration};

use clap::Subcommand;

use self::draft::drafts;
#[cfg(feature = "mcp-client")]
use self::list::list;
use super::{
    CliError, folder,
    lint::{Source, lint},
    terminal::Safe,
};

mod draft;
#[cfg(feature = "mcp-client")]
mod list;
#[cfg(all(test, feature = "mcp-client"))]
mod tests;

/// The time that the server has for the whole list.
const PATIENCE: Duration = Duration::from_secs(60);

/// Work with ToolContracts.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Init(Init),
}

/// Draft a ToolContract for each tool that an MCP server lists.
///
/// Lists the tools and calls none of them. Each draft says what a call may look like and what it may change, as narrowly as the list
/// allows. Arguments that the schema does not name are denied. A tool counts as a write unless the server says otherwise.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay contract init --mcp https://tickets.example.com/mcp --namespace incidents --out contracts/
      One file for each tool. Read each, delete what agents do not need, tighten the rest, then lint and apply.
  kubectl -n tools port-forward svc/tickets 8000:80 &
  belay contract init --mcp http://localhost:8000/mcp --url http://tickets.tools.example.com/mcp > contracts.yaml
      A server through a port-forward. The contracts have the URL by which the gateway will reach it.

What to check in a draft:
  description    the agent reads it, and the server wrote it: it must describe, not instruct
  sideEffect     read if the server says readOnlyHint, external if it says openWorldHint, write otherwise
  input          bounds: maxLength, pattern, enum. An agent can fill what the server left open with anything
  preconditions  a draft has none

Exit codes:
  0  drafts were written
  2  no drafts were written: no such server, no tools, or a file exists already")]
struct Init {
    /// URL of the MCP server (streamable HTTP)
    #[arg(long, value_name = "URL")]
    mcp: String,
    /// URL by which the gateway will reach the server [default: that of --mcp]
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// Namespace of the contracts [default: none; a kustomization or kubectl sets it]
    #[arg(short, long)]
    namespace: Option<String>,
    /// Folder for one file for each tool [default: standard output]
    #[arg(short, long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Bearer token for the server; it is not written anywhere
    #[arg(long, env = "BELAY_MCP_TOKEN", hide_env_values = true)]
    token: Option<String>,
}

/// Runs the command and returns the exit code.
pub(super) async fn run(args: &Args, out: &mut dyn Write, notes: &mut dyn Write) -> Result<u8, CliError> {
    let Command::Init(args) = &args.command;
    let (tools, followed) =
        tokio::time::timeout(PATIENCE, list(&args.mcp, args.token.as_deref())).await.map_err(|_| {
            CliError::new(format!(
                "{}: expected the whole list of tools within {} s, found a part; try again",
                args.mcp,
                PATIENCE.as_secs()
            ))
        })??;
    let (tools, odd) = tools.finish();
    if let Some(to) = &followed {
        let drafts = if args.url.is_some() { "check the path of --url" } else { "the drafts have that URL" };
        writeln!(notes, "{} redirects to {}: {drafts}", Safe(&args.mcp), Safe(to))?;
    }
    // A gateway follows one redirect within an origin. The URL without a redirect is the better one.
    let url = args.url.as_ref().or(followed.as_ref()).unwrap_or(&args.mcp);
    let (drafts, left_out) = drafts(&tools, url, args.namespace.as_deref());
    for odd in odd {
        writeln!(notes, "left out: the tool `{}`: {}", Safe(&odd.name), Safe(&odd.reason))?;
    }
    for reason in &left_out {
        writeln!(notes, "left out: {}", Safe(reason))?;
    }
    if drafts.is_empty() {
        return Err(CliError::new(format!("{}: expected tools, found none that a contract can name", args.mcp)));
    }
    match &args.out {
        Some(folder) => {
            folder::fill(folder, drafts.iter().map(|draft| (format!("{}.yaml", draft.name), draft.text.as_str())))?;
        }
        None => {
            for (index, draft) in drafts.iter().enumerate() {
                write!(out, "{}{}", if index == 0 { "" } else { "---\n" }, draft.text)?;
            }
        }
    }
    // Report what the server cannot fix, such as an address where the gateway expects a name.
    for draft in &drafts {
        let path = format!("{}.yaml", draft.name).into();
        let outcome =
            lint(&[Source { path, bytes: draft.text.clone().into_bytes() }], "default").map_err(CliError::new)?;
        for found in &outcome.diagnostics {
            writeln!(notes, "belay lint will say: {}", Safe(&found.to_string()))?;
        }
    }
    let place = args.out.as_ref().map_or_else(String::new, |folder| format!(" in {}", folder.display()));
    writeln!(notes, "{} drafts{}: review each before you apply it", drafts.len(), Safe(&place))?;
    Ok(0)
}

#[cfg(not(feature = "mcp-client"))]
async fn list(_: &str, _: Option<&str>) -> Result<(crate::listed::Catalogue, Option<String>), CliError> {
    Err(CliError::left_out("contract init"))
}
