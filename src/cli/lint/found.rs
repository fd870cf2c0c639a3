//! The findings of a check, each with its position.
//!
//! Guarantees: a field has at most one finding. The findings come out in the order of files and lines.
//!
//! Non-goals: the rules that find something.

use std::collections::HashSet;

use super::{
    diagnostic::{Diagnostic, Severity, Source},
    document::{self, Node, Place},
    object::{Entry, Object},
};
use crate::render::Finding;

/// The findings so far.
pub(super) struct Found<'s> {
    pub(super) sources: &'s [Source],
    list: Vec<(usize, Place, Severity, Finding)>,
    /// Fields that already have a finding. Consequences of it are not reported as well.
    pub(super) taken: HashSet<(usize, Place, String)>,
}

impl<'s> Found<'s> {
    /// Starts a check without findings.
    pub(super) fn new(sources: &'s [Source]) -> Self {
        Self { sources, list: Vec::new(), taken: HashSet::new() }
    }

    pub(super) fn read(&mut self, file: usize, source: &Source) -> Vec<Node> {
        document::read(&source.bytes).unwrap_or_else(|broken| {
            let finding = Finding::new(
                "YAML",
                "a YAML or JSON file",
                broken.reason,
                "correct it; the file is not checked any further",
            );
            self.list.push((file, broken.at, Severity::Error, finding));
            Vec::new()
        })
    }

    pub(super) fn add(&mut self, entry: &Entry<'_>, place: Place, severity: Severity, mut finding: Finding) {
        finding.field = format!("{}{}", entry.prefix, finding.field);
        if self.taken.insert((entry.file, entry.node.at, finding.field.clone())) {
            self.list.push((entry.file, place, severity, finding));
        }
    }

    /// Adds a finding of `render`. Its field gives the position.
    pub(super) fn add_at_field(&mut self, entry: &Entry<'_>, severity: Severity, finding: Finding) {
        self.add(entry, entry.node.at_path(&finding.field), severity, finding);
    }

    /// Adds the findings about an object by itself.
    pub(super) fn alone(&mut self, object: &Object<'_>, findings: Vec<Finding>) {
        findings.into_iter().for_each(|finding| self.add_at_field(&object.entry, Severity::Error, finding));
    }

    pub(super) fn sorted(mut self) -> Vec<Diagnostic> {
        self.list.sort_by(|(file, place, severity, finding), (other_file, other_place, other_severity, other)| {
            (file, place, severity, &finding.field).cmp(&(other_file, other_place, other_severity, &other.field))
        });
        let diagnostic = |(file, place, severity, finding): (usize, Place, Severity, Finding)| Diagnostic {
            file: self.sources.get(file).map(|source| source.path.display().to_string()).unwrap_or_default(),
            line: place.line,
            column: place.column,
            severity,
            field: finding.field,
            expected: finding.expected,
            found: finding.found,
            mend: finding.fix,
        };
        self.list.into_iter().map(diagnostic).collect()
    }
}
