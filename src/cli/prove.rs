//! `belay prove` and `belay disclose`: export one record with its proof, and one field of a call's arguments.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use super::{
    CliError,
    evidence::{self, Source},
    terminal::{Safe, safe_json},
};
use crate::{
    evidence::{
        log::Log,
        note::VerifierKey,
        proof::{Proof, Proven},
        record::{Event, Record},
        segment::Segment,
    },
    policy::commit::{Opening, Salt},
    verify::{self, Verdict},
};

/// The file extension of a proof.
pub(super) const PROOF: &str = "tlog-proof";

/// Export one record with the proof that it is in the log, as a C2SP tlog-proof
///
/// Verifies the log first. Anyone with the witness's public key can check the proof without the log, with `belay verify FILE.tlog-proof` or
/// any other reader of the format.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay prove tidy -n team-a --record 12 > decision.tlog-proof
  belay verify decision.tlog-proof --witness-key witness.vkey")]
pub(super) struct Args {
    #[command(flatten)]
    source: Source,
    /// Number of the record, as `belay verify` and `belay incident` show it
    #[arg(long, value_name = "N")]
    record: u64,
}

/// Writes the proof and returns the exit code.
pub(super) async fn run(args: &Args, out: &mut dyn Write) -> Result<u8, CliError> {
    let evidence = evidence::find(&args.source).await?;
    let report = verify::verify(&evidence.log, &evidence.key, &evidence.expected);
    if report.verdict == Verdict::Invalid {
        return Err(CliError::new(format!(
            "the log in {} is INVALID and proves nothing; see `belay verify`",
            evidence.place
        )));
    }
    let segments = segments(&evidence.log)?;
    let records: Vec<Vec<u8>> = segments.iter().flat_map(|segment| segment.records.clone()).collect();
    let note = segments.last().map(|segment| segment.note.clone());
    let proof = note.and_then(|note| Proof::of(&records, args.record, note)).ok_or_else(|| {
        CliError::new(format!("there is no record {}: the log has {} of them, from 0", args.record, records.len()))
    })?;
    write!(out, "{proof}")?;
    Ok(0)
}

fn segments(log: &Log) -> Result<Vec<Segment>, CliError> {
    let parse = |(key, bytes): (&String, &bytes::Bytes)| {
        Segment::parse(bytes).map_err(|error| CliError::new(format!("{key}: {error}")))
    };
    log.segments.iter().map(parse).collect()
}

/// Checks a proof and shows what it proves.
pub(super) fn check(file: &Path, key: &VerifierKey, out: &mut dyn Write) -> Result<u8, CliError> {
    let text = fs::read_to_string(file).map_err(|e| CliError::new(format!("cannot read {}: {e}", file.display())))?;
    match text.parse::<Proof>().and_then(|proof| proof.record(key)) {
        Ok(Proven { record, index, head, witnessed }) => {
            let time = i64::try_from(witnessed).ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
            let time = time.map(|time| format!(", as witnessed at {time}")).unwrap_or_default();
            writeln!(out, "PROVEN  record {index} of {} in {}{time}\n", head.size, Safe(&head.origin))?;
            writeln!(out, "{}", safe_json(&String::from_utf8_lossy(&record)))?;
            Ok(0)
        }
        Err(error) => {
            writeln!(out, "INVALID  {}", Safe(&error.to_string()))?;
            Ok(1)
        }
    }
}

/// Disclose one field of a call's arguments, so that anyone can check it against the evidence
///
/// The evidence has commitments instead of arguments. With a call's arguments and the task's salt, you can open one field. `belay verify
/// TARGET --opening FILE` says which record commits to it. The opening discloses the names of the other fields, and nothing else of them.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  aws s3 cp s3://belay-state/team-a/tidy/UID/salt/commitments salt
  belay disclose --arguments call.json --salt salt /order > opening.json
  belay verify tidy -n team-a --opening opening.json")]
pub(super) struct Disclose {
    /// The field: a JSON Pointer, such as /order or /items/0/price
    pointer: String,
    /// File with the call's arguments: JSON
    #[arg(long, value_name = "FILE")]
    arguments: PathBuf,
    /// File with the task's salt, as the state bucket has it
    #[arg(long, value_name = "FILE")]
    salt: PathBuf,
}

/// Writes the opening and returns the exit code.
pub(super) fn disclose(args: &Disclose, out: &mut dyn Write) -> Result<u8, CliError> {
    let read = |file: &Path| {
        fs::read_to_string(file).map_err(|e| CliError::new(format!("cannot read {}: {e}", file.display())))
    };
    let place = args.arguments.display();
    let arguments = crate::policy::json::parse(read(&args.arguments)?.as_bytes());
    let arguments = crate::policy::json::whole(arguments.map_err(|e| CliError::new(format!("{place}: {e}")))?);
    let salt = Salt::try_from(read(&args.salt)?).map_err(|e| CliError::new(format!("{}: {e}", args.salt.display())))?;
    let opening = salt.open(&arguments, &args.pointer).map_err(|e| CliError::new(format!("{place}: {e}")))?;
    let opening = opening.ok_or_else(|| {
        CliError::new(format!(
            "{place} has no single field at {:?}: expected a JSON Pointer to a string, a number, true, false, null, or something empty",
            args.pointer
        ))
    })?;
    let text = serde_json::to_string_pretty(&opening).map_err(|e| CliError::new(e.to_string()))?;
    writeln!(out, "{text}")?;
    Ok(0)
}

/// Reports which records commit to what an opening discloses, and returns whether there is one.
pub(super) fn opened(log: &Log, file: &Path, out: &mut dyn Write) -> Result<bool, CliError> {
    let place = file.display();
    let text = fs::read(file).map_err(|e| CliError::new(format!("cannot read {place}: {e}")))?;
    let opening: Opening = serde_json::from_slice(&text).map_err(|e| CliError::new(format!("{place}: {e}")))?;
    let commitment = match opening.commitment() {
        Ok(commitment) => commitment,
        Err(error) => {
            writeln!(out, "\nopening    INVALID: {}", Safe(&error.to_string()))?;
            return Ok(false);
        }
    };
    let mut found = false;
    for segment in segments(log)? {
        for record in segment.decode().map_err(|e| CliError::new(e.to_string()))? {
            if let Some(what) = commits(&record).filter(|(_, digest)| **digest == commitment).map(|(what, _)| what) {
                if !found {
                    writeln!(out)?;
                }
                found = true;
                let (pointer, value) = (Safe(&opening.pointer).to_string(), opening.value.to_string());
                writeln!(out, "opening    record {}  {}: {pointer} is {}", record.seq, Safe(&what), Safe(&value))?;
            }
        }
    }
    if !found {
        writeln!(out, "\nopening    no record of this log commits to it")?;
    }
    Ok(found)
}

/// Returns a description of a record and its commitment to arguments, if it has one.
fn commits(record: &Record) -> Option<(String, &String)> {
    match &record.event {
        Event::Intent(intent) => {
            Some((format!("call.intent {} to {}", intent.call, intent.target), intent.request_commitment.as_ref()?))
        }
        Event::Denied(denied) => {
            Some((format!("call.denied to {}", denied.target), denied.request_commitment.as_ref()?))
        }
        Event::ApprovalDecided(approval) => {
            Some((format!("approval.decided {}", approval.name), &approval.request_commitment))
        }
        _ => None,
    }
}
