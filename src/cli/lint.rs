//! `belay lint`: checks manifests offline, before they are applied.
//!
//! Guarantees: the command reads the given files and nothing else, and changes nothing. Its findings are the same as those of the operator,
//! the gateway and the API server, with file and line.
//!
//! Rejects: paths without anything to check.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
};

use clap::ValueEnum;

use self::diagnostic::Outcome;
pub(super) use self::{
    check::lint,
    diagnostic::{Diagnostic, Severity, Source},
};
use super::{
    CliError,
    terminal::{Safe, safe_json},
};
use crate::stack::{self, StackError};

mod check;
mod cost;
mod diagnostic;
pub(super) mod document;
mod found;
mod kustomize;
mod object;
mod schema;
mod single;
mod tasks;
#[cfg(test)]
mod tests;

/// The maximum size of a file. An API server accepts 1.5 MiB for an object.
const LARGEST: u64 = 64 << 20;

/// Check AgentTasks, ToolContracts and PolicyPacks together, offline, with file and line.
///
/// Reads every .yaml, .yml and .json file below the folders, and ignores objects of other kinds. It checks each object as the API server
/// would: types, bounds, unknown fields, rules of the CRD. It checks each contract and pack as operator and gateway would: JSON Schema, CEL
/// and its types. It checks each task with its contracts and with the pack whose namespaceSelector selects its Namespace.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay lint policy-packs/prod teams/incidents
      What one environment will have: its pack, and a team's namespace, contracts and tasks.
  kubectl kustomize overlays/prod | belay lint -
      The output of kustomize, with patches and generators. Line numbers are those of the output.
  belay lint . --output github
      Findings as annotations of a pull request.

If the Namespace is among the files, its labels select the pack. If it is not, a task is valid if any of the packs admits it,
and a note says so. Of a kustomization.yaml, the command uses the namespace, and ignores the patches that it lists.

Each finding is one line:
  FILE:LINE:COLUMN: error|warning: FIELD: expected …, found …; what to do

Exit codes:
  0  no findings
  1  findings: an error, or with --strict a warning
  2  nothing was checked: no such file, no objects of Belay, or the command line is wrong")]
pub(super) struct Args {
    /// Folders and files; - is standard input
    #[arg(required = true, value_name = "DIR|FILE")]
    paths: Vec<PathBuf>,
    /// Namespace of objects without one, if no kustomization.yaml sets it
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Warnings count as errors
    #[arg(long)]
    strict: bool,
    /// Format of the output
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// One line for each finding
    Text,
    /// One JSON array of objects
    Json,
    /// Annotations of GitHub Actions
    Github,
}

/// Checks the files, prints the findings and returns the exit code.
pub(super) fn run(args: &Args, out: &mut dyn Write, notes: &mut dyn Write) -> Result<u8, CliError> {
    let mut sources = Vec::new();
    for path in &args.paths {
        gather(path, &mut sources)?;
    }
    let outcome = on_a_large_stack(&sources, &args.namespace)?;
    if outcome.objects == 0 && outcome.diagnostics.is_empty() {
        return Err(CliError::new(format!(
            "expected an AgentTask, ToolContract or PolicyPack in {}, found none in {} files; name the folder that holds them",
            args.paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "),
            sources.len()
        )));
    }
    print(&outcome.diagnostics, args.output, out)?;
    for note in &outcome.notes {
        writeln!(notes, "note: {}", Safe(note))?;
    }
    let errors = outcome.diagnostics.iter().filter(|found| found.severity == Severity::Error).count();
    let warnings = outcome.diagnostics.len() - errors;
    writeln!(notes, "{} objects in {} files: {errors} errors, {warnings} warnings", outcome.objects, sources.len())?;
    Ok(u8::from(errors > 0 || args.strict && warnings > 0))
}

pub(super) fn on_a_large_stack(sources: &[Source], namespace: &str) -> Result<Outcome, CliError> {
    let outcome = stack::with_large_stack(|| lint(sources, namespace)).map_err(|error| match error {
        StackError::Thread(_) => CliError::new(error.to_string()),
        StackError::BrokeOff => CliError::new(format!("{error}; please report the files that it was given")),
    })?;
    outcome.map_err(CliError::new)
}

fn print(diagnostics: &[Diagnostic], output: Output, out: &mut dyn Write) -> Result<(), CliError> {
    match output {
        Output::Json => {
            let json = serde_json::to_string_pretty(diagnostics).map_err(|error| CliError::new(error.to_string()))?;
            writeln!(out, "{}", safe_json(&json))?;
        }
        Output::Text => {
            for found in diagnostics {
                writeln!(out, "{}", Safe(&found.to_string()))?;
            }
        }
        Output::Github => {
            for found in diagnostics {
                let file = escape(&found.file).replace(':', "%3A").replace(',', "%2C");
                let (kind, line, column) = (found.severity.as_str(), found.line, found.column);
                writeln!(out, "::{kind} file={file},line={line},col={column}::{}", escape(&found.message()))?;
            }
        }
    }
    Ok(())
}

/// Escapes text for a workflow command of GitHub Actions: `%` is its escape character, and a newline would end the command.
fn escape(text: &str) -> String {
    Safe(&text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")).to_string()
}

/// Reads a file, or all manifests below a folder in the order of their names.
pub(super) fn gather(path: &Path, sources: &mut Vec<Source>) -> Result<(), CliError> {
    if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().take(LARGEST).read_to_end(&mut bytes).map_err(|error| unreadable(path, &error))?;
        sources.push(Source { path: "<stdin>".into(), bytes });
        return Ok(());
    }
    let metadata = fs::metadata(path).map_err(|error| unreadable(path, &error))?;
    if !metadata.is_dir() {
        return read(path, metadata.len(), sources);
    }
    let mut entries = fs::read_dir(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| unreadable(path, &error))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (entry.path(), entry.file_name());
        if name.to_string_lossy().starts_with('.') {
            continue;
        }
        let kind = entry.file_type().map_err(|error| unreadable(&path, &error))?;
        let manifest = name == "Kustomization"
            || path.extension().and_then(|extension| extension.to_str()).is_some_and(|extension| {
                ["yaml", "yml", "json"].iter().any(|known| extension.eq_ignore_ascii_case(known))
            });
        // A link to a folder may form a loop. A user can name its target instead.
        if kind.is_dir() {
            gather(&path, sources)?;
        } else if manifest
            && let Ok(metadata) = fs::metadata(&path)
            && metadata.is_file()
        {
            read(&path, metadata.len(), sources)?;
        }
    }
    Ok(())
}

fn read(path: &Path, size: u64, sources: &mut Vec<Source>) -> Result<(), CliError> {
    if size > LARGEST {
        return Err(CliError::new(format!(
            "{}: expected a file of at most {LARGEST} bytes, found {size}; leave it out",
            path.display()
        )));
    }
    let bytes = fs::read(path).map_err(|error| unreadable(path, &error))?;
    sources.push(Source { path: path.to_owned(), bytes });
    Ok(())
}

fn unreadable(path: &Path, error: &std::io::Error) -> CliError {
    CliError::new(format!("{}: cannot be read: {error}", path.display()))
}
