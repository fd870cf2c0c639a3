//! What a check gets and what it returns: sources, and findings with their positions.
//!
//! Guarantees: a finding says what was expected, what was found, where, and what to do.
//!
//! Non-goals: forms of output, see [`lint`](super).

use std::{fmt, path::PathBuf};

use serde::Serialize;

/// A file that was read.
pub(in crate::cli) struct Source {
    /// The path, as it was given or found.
    pub(in crate::cli) path: PathBuf,
    /// Its bytes.
    pub(in crate::cli) bytes: Vec<u8>,
}

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::cli) enum Severity {
    /// The object will be rejected, or will deny what it was meant to allow.
    Error,
    /// The object works, but is probably not what was meant.
    Warning,
}

impl Severity {
    /// Returns the word for messages.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// One finding: what is wrong, where, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(in crate::cli) struct Diagnostic {
    /// The file.
    pub(in crate::cli) file: String,
    /// The line, from 1.
    pub(in crate::cli) line: u64,
    /// The column, from 1.
    pub(in crate::cli) column: u64,
    /// The severity.
    pub(in crate::cli) severity: Severity,
    /// The path of the field in its document.
    pub(in crate::cli) field: String,
    /// What was expected there.
    pub(in crate::cli) expected: String,
    /// What was found.
    pub(in crate::cli) found: String,
    /// What to do.
    pub(in crate::cli) mend: String,
}

impl Diagnostic {
    /// Returns the message without the position and the severity.
    pub(super) fn message(&self) -> String {
        format!("{}: expected {}, found {}; {}", self.field, self.expected, self.found, self.mend)
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (file, line, column) = (&self.file, self.line, self.column);
        write!(f, "{file}:{line}:{column}: {}: {}", self.severity.as_str(), self.message())
    }
}

/// The result of a check.
#[derive(Debug, Default)]
pub(in crate::cli) struct Outcome {
    /// The findings, in the order of files and lines.
    pub(in crate::cli) diagnostics: Vec<Diagnostic>,
    /// What could not be checked, and what was checked instead.
    pub(in crate::cli) notes: Vec<String>,
    /// The number of AgentTasks, ToolContracts and PolicyPacks that were checked.
    pub(in crate::cli) objects: usize,
}
