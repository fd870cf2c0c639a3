//! The incident report as Markdown.

use std::io::{self, Write};

use super::story::Story;
use crate::evidence::record::Tone;
use crate::{
    cli::terminal::Safe,
    verify::{Verdict, Weight},
};

/// Returns a text from outside for a cell of a table or another place. Renderers find links, user names, footnotes, entities and HTML in
/// plain text. Each finds its own kinds, some of them even behind a backslash. Only in a code span does everything stay as it is. So text
/// that is not plain words goes into a code span, and characters that would end the span or the cell are escaped.
fn cell(text: &str) -> String {
    if is_plain(text) {
        return text.to_owned();
    }
    let mut code = String::with_capacity(text.len() + 2);
    code.push('`');
    for c in text.chars() {
        match c {
            '`' | '|' => code.extend(c.escape_unicode()),
            c => code.push(c),
        }
    }
    code.push('`');
    code
}

/// Returns whether a text has no meaning in any kind of Markdown: words and numbers, and dots and colons that no word follows directly.
fn is_plain(text: &str) -> bool {
    let follows = |at: usize| text.get(at..).and_then(|rest| rest.chars().next());
    let before = |at: usize| text.get(..at).and_then(|all| all.chars().next_back());
    let digits = |at: usize| [before(at), follows(at + 1)].into_iter().all(|c| c.is_some_and(|c| c.is_ascii_digit()));
    // The first character must not start a list or a horizontal rule.
    let begins = |c: char| c.is_alphanumeric();
    text.chars().next().is_none_or(begins)
        && text.char_indices().all(|(at, c)| match c {
            '.' | ':' if digits(at) => true,
            // A number and a dot start a list.
            '.' | ':' => {
                let words = text.get(..at).is_some_and(|all| all.chars().any(|c| !c.is_ascii_digit()));
                words && follows(at + 1).is_none_or(|next| next == ' ')
            }
            ' ' | ',' | ';' | '\'' | '(' | ')' | '-' | '%' => true,
            c => c.is_alphanumeric(),
        })
}

/// Writes the report.
pub(super) fn write(story: &Story<'_>, out: &mut dyn Write) -> io::Result<()> {
    let summary = &story.report.summary;
    let named = |name: &Option<String>| cell(&Safe(name.as_deref().unwrap_or("?")).to_string());
    writeln!(out, "# {}/{}: {}\n", named(&summary.namespace), named(&summary.task), cell(&outcome(story)))?;
    let told = match story.report.verdict {
        Verdict::Valid => "The evidence is **VALID**: complete, and every signature and counter holds.",
        Verdict::Incomplete => "The evidence is **INCOMPLETE**: everything holds so far, but the log has no end.",
        Verdict::Newer => {
            "The evidence is **NEWER** than this belay, which cannot verify all of it: use a later belay."
        }
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
    writeln!(out, "- objective: {}", cell(&story.objective))?;
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
        "\n## Network\n\n| Channel | Target | Addresses | Sent | Denied | Bytes out | Bytes back |\n| --- | --- | --- | --- | --- | --- | --- |"
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
        "\nEvidence: {} records in {}, root {}, witness {}.",
        summary.records,
        cell(&Safe(&story.place).to_string()),
        cell(root),
        cell(&story.key.to_string())
    )?;
    writeln!(out, "One record by itself, with its proof: `belay prove … --record N`.")
}

/// Returns how the task ended.
pub(super) fn outcome(story: &Story<'_>) -> String {
    match &story.report.summary.closed {
        Some(closed) => format!("{} ({})", Safe(&closed.phase), Safe(&closed.reason)),
        None => "not ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts that renderers of GitHub, GitLab and others turn into links, user names, footnotes or markup.
    const ACTIVE: [&str; 22] = [
        "http://evil.test/click",
        "https://evil.test",
        "ftp://evil.test",
        "www.evil.test",
        "see http://evil.test.",
        "evil.test",
        "mailto:a@evil.test",
        "a@evil.test",
        "xmpp:a@evil.test",
        "@everybody",
        "#1",
        "team/repo#1",
        "a[^1]",
        "[a](http://evil.test)",
        "![a](http://evil.test/x.png)",
        "<img src=x>",
        "&lt;b&gt; &#106;",
        ":smile:",
        "$x$",
        "**a** _b_ ~c~",
        "1. a",
        "- a",
    ];

    #[test]
    fn what_agents_write_is_no_markup() {
        for active in ACTIVE {
            assert_eq!(cell(active), format!("`{active}`"), "{active}");
        }
        // Nothing ends the code span or the cell.
        assert_eq!(cell("a`|`http://evil.test"), "`a\\u{60}\\u{7c}\\u{60}http://evil.test`");
        assert_eq!(cell("\\|http://evil.test"), "`\\\\u{7c}http://evil.test`");
        // The control: words stay words.
        for plain in ["", "search", "attempt 2", "10:00, of 3", "Grüße", "a: b. c", "7.5 of 10 (75%)"] {
            assert_eq!(cell(plain), plain);
        }
    }
}
