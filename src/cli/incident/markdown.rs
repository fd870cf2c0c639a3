//! The story as Markdown.

use std::io::{self, Write};

use super::story::{Story, Tone};
use crate::{
    cli::terminal::Safe,
    verify::{Verdict, Weight},
};

/// A text in a cell of a table.
fn cell(text: &str) -> String {
    let mut cell = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '\\' | '|' | '`' | '*' | '_' | '<' | '>' | '[' | ']' | '#' | '~') {
            cell.push('\\');
        }
        cell.push(c);
    }
    cell
}

/// Writes the story.
pub(super) fn write(story: &Story<'_>, out: &mut dyn Write) -> io::Result<()> {
    let summary = &story.report.summary;
    let named = |name: &Option<String>| cell(&Safe(name.as_deref().unwrap_or("?")).to_string());
    writeln!(out, "# {}/{}: {}\n", named(&summary.namespace), named(&summary.task), outcome(story))?;
    let told = match story.report.verdict {
        Verdict::Valid => "The evidence is **VALID**: complete, and every signature and counter holds.",
        Verdict::Incomplete => "The evidence is **INCOMPLETE**: what is there holds, and its end is not there.",
        Verdict::Invalid => "The evidence is **INVALID**: do not rely on what follows.",
    };
    writeln!(out, "{told}\n")?;
    writeln!(
        out,
        "- on behalf of {}, class {}, pack {}",
        named(&summary.principal),
        cell(&story.class),
        cell(&story.pack)
    )?;
    writeln!(out, "- asked to: {}", cell(&story.objective))?;
    for curve in &story.curves {
        writeln!(out, "- {}: {} of {}", curve.name, curve.used, curve.limit)?;
    }
    let findings: Vec<_> = story.report.findings.iter().filter(|finding| finding.weight != Weight::Note).collect();
    if !findings.is_empty() {
        writeln!(out, "\n## Findings\n")?;
        for finding in findings {
            let at = finding.record.map(|record| format!("record {record}: ")).unwrap_or_default();
            writeln!(out, "- {at}{}: {}", finding.rule, cell(&Safe(&finding.message).to_string()))?;
        }
    }
    writeln!(
        out,
        "\n## Timeline\n\n| Record | Time | Attempt | | What | Rule |\n| --- | --- | --- | --- | --- | --- |"
    )?;
    for step in &story.steps {
        let records: Vec<_> = step.records.iter().map(u64::to_string).collect();
        let sign = match step.tone {
            Tone::Plain => "",
            Tone::Good => "✓ ",
            Tone::Warn => "• ",
            Tone::Bad => "✗ ",
        };
        let detail = if step.detail.is_empty() { String::new() } else { format!(": {}", cell(&step.detail)) };
        writeln!(
            out,
            "| {} | {} | {} | {sign}{} | {}{detail} | {} |",
            records.join(", "),
            cell(&step.time),
            step.attempt,
            step.word,
            cell(&step.what),
            step.rules.join(", ")
        )?;
    }
    writeln!(
        out,
        "\n## Network\n\n| Way | Target | Addresses | Sent | Denied | Bytes out | Bytes back |\n| --- | --- | --- | --- | --- | --- | --- |"
    )?;
    for peer in &story.network {
        let addresses = cell(&peer.addresses.join(", "));
        writeln!(
            out,
            "| {} | {} | {addresses} | {} | {} | {} | {} |",
            peer.channel,
            cell(&peer.target),
            peer.sent,
            peer.denied,
            peer.up,
            peer.bytes
        )?;
    }
    let root = summary.root.as_deref().unwrap_or("none");
    writeln!(
        out,
        "\nEvidence: {} records in `{}`, root `{root}`, witness `{}`.",
        summary.records, story.place, story.key
    )?;
    writeln!(out, "One record by itself, with its proof: `belay prove … --record N`.")
}

/// How the task ended.
pub(super) fn outcome(story: &Story<'_>) -> String {
    match &story.report.summary.closed {
        Some(closed) => format!("{} ({})", Safe(&closed.phase), Safe(&closed.reason)),
        None => "not ended".to_owned(),
    }
}
