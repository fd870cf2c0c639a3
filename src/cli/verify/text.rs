//! A report as text: the verdict first, then what the log says, then the findings.

use std::{
    fmt::Display,
    io::{self, Write},
};

use super::super::terminal::{Paint, Safe};
use crate::{
    cli::evidence::KeySource,
    evidence::{note::VerifierKey, record::Local},
    policy::price,
    verify::{Finding, Report, Summary, Verdict, Weight},
};

/// The content of the report.
pub(super) struct Shown<'a> {
    pub(super) report: &'a Report,
    pub(super) place: &'a str,
    pub(super) key: &'a VerifierKey,
    pub(super) source: KeySource,
}

/// Writes the report.
pub(super) fn write(out: &mut dyn Write, shown: &Shown<'_>, paint: Paint) -> io::Result<()> {
    let Report { verdict, findings, more_findings, summary } = shown.report;
    let word = match verdict {
        Verdict::Valid => paint.good(paint.strong(verdict)),
        Verdict::Incomplete | Verdict::Newer => paint.warn(paint.strong(verdict)),
        Verdict::Invalid => paint.bad(paint.strong(verdict)),
    };
    let origin = summary.origin.as_deref().unwrap_or("no log");
    let reservations: String = summary.reservations().iter().map(|one| format!(", {one}")).collect();
    writeln!(out, "{word}{reservations}  {}  {}", Safe(origin), totals(summary))?;
    match verdict {
        Verdict::Valid => {}
        Verdict::Incomplete => writeln!(out, "{}", paint.warn("Everything holds so far, but the log has no end."))?,
        Verdict::Newer => writeln!(
            out,
            "{}",
            paint.warn(
                "The witness has signed the log. A part is in a later version that this belay does not know: use a later belay."
            )
        )?,
        Verdict::Invalid => writeln!(
            out,
            "{}",
            paint.bad("Do not rely on what this log says: it is shown as far as it could be read.")
        )?,
    }
    writeln!(out)?;
    write_summary(out, shown, paint)?;
    if !findings.is_empty() {
        writeln!(out, "\n{}", paint.strong("Findings"))?;
        for finding in findings {
            write_finding(out, finding, paint)?;
        }
        if *more_findings > 0 {
            writeln!(out, "  and {more_findings} more")?;
        }
    }
    Ok(())
}

/// Returns the totals of the log in one line.
fn totals(summary: &Summary) -> String {
    let usage = summary.usage;
    [
        count(summary.records, "record"),
        count(summary.attempts.len(), "attempt"),
        count(usage.tool_calls, "tool call"),
        count(usage.tokens, "token"),
        count(usage.denials, "denial"),
    ]
    .join(", ")
}

fn count(n: impl Display, noun: &str) -> String {
    let n = n.to_string();
    let plural = if n == "1" { "" } else { "s" };
    format!("{n} {noun}{plural}")
}

fn write_summary(out: &mut dyn Write, shown: &Shown<'_>, paint: Paint) -> io::Result<()> {
    let summary = &shown.report.summary;
    let mut row = |name: &str, text: String| writeln!(out, "{}  {text}", paint.dim(format_args!("{name:<9}")));
    if let (Some(namespace), Some(task)) = (&summary.namespace, &summary.task) {
        let principal = summary.principal.as_deref().unwrap_or("nobody");
        row("task", format!("{}/{}, on behalf of {}", Safe(namespace), Safe(task), Safe(principal)))?;
    }
    if let Some(closed) = &summary.closed {
        let class =
            if closed.failure_class.is_empty() { String::new() } else { format!("{}, ", Safe(&closed.failure_class)) };
        let exit = closed.exit_code.map(|code| format!(", exit code {code}")).unwrap_or_default();
        row("ended", format!("{} ({class}{}){exit}", Safe(&closed.phase), Safe(&closed.reason)))?;
        for (container, digest) in &closed.images {
            row("image", format!("{}: sha256:{}", Safe(container), Safe(digest)))?;
        }
    }
    if let (Some(started), Some(ended)) = (&summary.started, &summary.ended) {
        row("time", format!("{} to {}, by the writers' clocks", Safe(started), Safe(ended)))?;
    }
    for attempt in &summary.attempts {
        let runtime = if attempt.runtime_class.is_empty() { "the default runtime" } else { &attempt.runtime_class };
        let again = if attempt.openings > 1 { format!(", opened {} times", attempt.openings) } else { String::new() };
        let closed = attempt.closed.as_deref().unwrap_or("never closed: the pod was lost or stopped");
        row(
            "attempt",
            format!(
                "{}  {} on {} in {}{again}; {}",
                attempt.number,
                Safe(&attempt.pod),
                Safe(&attempt.node),
                Safe(runtime),
                Safe(closed)
            ),
        )?;
    }
    if let Some(local) = &summary.local {
        let root = if local.root == Local::HOST { "this machine's own programs" } else { &local.root };
        let sandbox = format!("no cluster: {} over {}, evidence to {}", local.sandbox, root, local.store);
        row("sandbox", Safe(&sandbox).to_string())?;
        if !local.resolved.is_empty() {
            row("resolved", format!("by hand: {}", Safe(&local.resolved.join(", "))))?;
        }
    }
    let usage = summary.usage;
    match summary.limits {
        Some(limits) => row(
            "usage",
            format!(
                "{} of {} tool calls, {} of {} tokens, {}{}",
                usage.tool_calls,
                limits.tool_calls,
                usage.tokens,
                limits.tokens,
                match (usage.cost_micros, limits.cost_micros) {
                    (used, Some(limit)) => format!("a cost of {} of {}, ", price::show(used), price::show(limit)),
                    (0, None) => String::new(),
                    (used, None) => format!("a cost of {}, ", price::show(used)),
                },
                match limits.denials {
                    Some(limit) => format!("{} of {}", usage.denials, count(limit, "denial")),
                    None => count(usage.denials, "denial"),
                }
            ),
        )?,
        None => row("usage", "no attempt was opened".to_owned())?,
    }
    let outcomes = summary.outcomes;
    row(
        "outcomes",
        format!(
            "{} applied, {} not applied, {} unknown, {} without an outcome",
            outcomes.applied, outcomes.not_applied, outcomes.unknown, outcomes.open
        ),
    )?;
    if let Some(rollback) = &summary.rollback {
        let calls = count(rollback.undone.saturating_add(rollback.left.len()), "call");
        row("undone", format!("{} of {calls} of {}", rollback.undone, Safe(&rollback.of)))?;
        for left in &rollback.left {
            row("by hand", Safe(left).to_string())?;
        }
    }
    if !summary.denials.is_empty() {
        let rules: Vec<_> = summary.denials.iter().map(|(rule, n)| format!("{rule} {n}")).collect();
        row("denied by", rules.join(", "))?;
    }
    if summary.incidents > 0 {
        row("incidents", format!("{} beside the log, under incidents/", summary.incidents))?;
    }
    match &summary.locks {
        Some(locks) => {
            let mode = locks.mode.map_or("no lock".to_owned(), |mode| format!("{mode:?}").to_uppercase());
            let until = locks.until.map(|until| format!(" until {until} at least")).unwrap_or_default();
            row("locked", format!("{mode}{until}, in {}", Safe(shown.place)))?;
        }
        None => row("locked", format!("not checked: {} is a folder and has no locks", Safe(shown.place)))?,
    }
    let witnessed = summary
        .witnessed
        .and_then(|time| i64::try_from(time).ok())
        .and_then(|time| jiff::Timestamp::from_second(time).ok())
        .map(|time| format!(", last at {time}"))
        .unwrap_or_default();
    let source = match shown.source {
        KeySource::Given => "",
        KeySource::Cluster => "; according to the cluster",
        KeySource::Folder => "; according to the folder: compare it with a key that you trust",
    };
    row("witness", format!("{}{witnessed}{source}", Safe(&shown.key.to_string())))?;
    if let Some(root) = &summary.root {
        row(
            "root",
            format!("{root} over {} in {}", count(summary.records, "record"), count(summary.segments, "segment")),
        )?;
    }
    Ok(())
}

fn write_finding(out: &mut dyn Write, finding: &Finding, paint: Paint) -> io::Result<()> {
    let weight = match finding.weight {
        Weight::Note => paint.dim("note      "),
        Weight::Incomplete => paint.warn("incomplete"),
        Weight::Newer => paint.warn("newer     "),
        Weight::Broken => paint.bad("broken    "),
    };
    let record = finding.record.map(|n| format!("record {n}  ")).unwrap_or_default();
    let object = finding.object.as_deref().map(|key| format!("  {}", Safe(key))).unwrap_or_default();
    writeln!(out, "  {weight}  {record}{}{}", paint.strong(finding.rule), paint.dim(object))?;
    writeln!(out, "              {}", Safe(&finding.message))
}
