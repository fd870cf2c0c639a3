//! `belay incident`: reports a task as a timeline.
//!
//! Guarantees: every line names the record that it comes from. The log is verified first, and the report starts with the result. The page
//! needs no network and runs no script. The report adds nothing that the log does not say.

use std::io::Write;

use clap::ValueEnum;

use super::{
    CliError,
    evidence::{self, Source},
    verify::exit_code,
};
use crate::{evidence::segment::Segment, verify};

mod markdown;
mod page;
mod story;

use story::Story;

/// Report what happened in a task, from its evidence: each decision with its rule, budgets, approvals and network
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay incident tidy -n team-a > tidy.md
  belay incident evidence/ --witness-key witness.vkey -o html > tidy.html
      One file for any browser, without a network. Each line links to its record and the proof that it is in the log.

The command verifies the log first. Its exit codes are those of `belay verify`.")]
pub(super) struct Args {
    #[command(flatten)]
    source: Source,
    /// Format of the report
    #[arg(short, long, value_enum, default_value_t = Output::Markdown)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For tickets and terminals
    Markdown,
    /// One self-contained page
    Html,
}

/// Writes the report and returns the exit code.
pub(super) async fn run(args: &Args, out: &mut dyn Write) -> Result<u8, CliError> {
    let evidence = evidence::find(&args.source).await?;
    let report = verify::verify(&evidence.log, &evidence.key, &evidence.expected);
    // Read the segments as far as possible: the verification has a finding for the first unreadable one.
    let mut segments = Vec::new();
    for bytes in evidence.log.segments.values() {
        let Ok(segment) = Segment::read(bytes) else { break };
        segments.push(segment);
    }
    let story = Story::of(&report, &segments, &evidence.place, &evidence.key.to_string());
    match args.output {
        Output::Markdown => markdown::write(&story, out)?,
        Output::Html => writeln!(out, "{}", page::page(&story).into_string())?,
    }
    out.flush()?;
    Ok(exit_code(report.verdict))
}

#[cfg(test)]
mod tests;
