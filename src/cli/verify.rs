//! `belay verify`: finds a log, reads it, verifies it and reports what was found.

use std::{
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
};

use clap::ValueEnum;
use serde::Serialize;

use self::text::Shown;
use super::{
    CliError,
    evidence::{self, Source},
    prove,
    terminal::{Paint, safe_json},
};
use crate::verify::{self, Report, Verdict};

mod text;

/// Verify a task's evidence: recompute everything from the recorded bytes.
///
/// Recomputes every hash, signature, counter and limit from the leaves. It trusts only the witness's public key.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay verify tidy -n team-a
      The log of a task, at the location in its status, against the key that the cluster publishes.
      S3 credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or from an AWS profile.
  belay verify tidy -n team-a --save evidence/
      The same, and a copy: the segments and the witness's key.
  belay verify evidence/ --witness-key witness.vkey
      A copy, offline, against a key from a source that you trust.
  belay verify decision.tlog-proof --witness-key witness.vkey
      One record, as `belay prove` exported it.
  belay verify s3://evidence/prod/team-a/tidy/UID --endpoint https://s3.example.com --witness-key witness.vkey
      A log in a bucket, without a cluster.

Exit codes:
  0  VALID       valid signatures cover every byte, every record follows from the ones before, the last one ends the task
  1  INVALID     something does not hold; the findings name the record and the rule
  3  INCOMPLETE  everything holds so far, but the log has no end: the task is running, or its end is missing
  4  NEWER       everything holds up to a part in a later version of the format that this belay does not know
  2  no verdict: the log could not be read, or the command line is wrong")]
pub(super) struct Args {
    #[command(flatten)]
    source: Source,
    /// Format of the output
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// Save a copy of the log to this new or empty folder
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Report which record commits to the field that `belay disclose` opened
    #[arg(long, value_name = "FILE")]
    opening: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// Human-readable text
    Text,
    /// JSON for programs
    Json,
}

/// The report, as JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    target: &'a str,
    witness_key: String,
    #[serde(flatten)]
    report: &'a Report,
}

/// Verifies the log and returns the exit code.
pub(super) async fn run(args: &Args, out: &mut dyn Write) -> Result<u8, CliError> {
    let target = Path::new(&args.source.target);
    if target.extension().is_some_and(|extension| extension == prove::PROOF) {
        return prove::check(target, &args.source.given_key()?, out);
    }
    let evidence = evidence::find(&args.source).await?;
    if let Some(folder) = &args.save {
        evidence::save(&evidence, folder).await?;
    }
    let report = verify::verify(&evidence.log, &evidence.key, &evidence.expected);
    match args.output {
        Output::Text => {
            let paint = Paint::new(std::io::stdout().is_terminal());
            let shown = Shown { report: &report, place: &evidence.place, key: &evidence.key, source: evidence.source };
            text::write(out, &shown, paint)?;
        }
        Output::Json => {
            let document = Document { target: &evidence.place, witness_key: evidence.key.to_string(), report: &report };
            let json = serde_json::to_string_pretty(&document).map_err(|e| CliError::new(e.to_string()))?;
            writeln!(out, "{}", safe_json(&json))?;
        }
    }
    let disclosed = match &args.opening {
        Some(file) if report.verdict != Verdict::Invalid => prove::opened(&evidence.log, file, out)?,
        _ => true,
    };
    out.flush()?;
    Ok(if disclosed { exit_code(report.verdict) } else { exit_code(Verdict::Invalid) })
}

/// Returns the exit code of a verdict.
pub(super) fn exit_code(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Valid => 0,
        Verdict::Invalid => 1,
        Verdict::Incomplete => 3,
        Verdict::Newer => 4,
    }
}

#[cfg(test)]
mod tests;
