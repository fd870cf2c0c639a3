//! The incident report as one page, without a script, a network or other files.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{
    markdown::outcome,
    story::{Curve, Story},
};
use crate::{
    cli::terminal::Safe,
    evidence::record::Tone,
    verify::{Verdict, Weight},
};

const STYLE: &str = include_str!("page.css");
/// The width of a curve's box, in its own units.
const WIDTH: f64 = 340.0;
/// The height of a curve's box, in its own units.
const HEIGHT: f64 = 88.0;

/// Returns the page.
pub(super) fn page(story: &Story<'_>) -> Markup {
    let summary = &story.report.summary;
    let named = |name: &Option<String>| Safe(name.as_deref().unwrap_or("?")).to_string();
    let title = format!("{}/{}: {}", named(&summary.namespace), named(&summary.task), outcome(story));
    let (verdict, told) = match story.report.verdict {
        Verdict::Valid => ("good", "Complete: every byte, signature and counter holds."),
        Verdict::Incomplete => ("warn", "Everything holds so far, but the log has no end."),
        Verdict::Newer => ("warn", "A part is in a later version that this belay does not know: use a later belay."),
        Verdict::Invalid => ("bad", "Something does not hold: do not rely on what follows."),
    };
    let findings: Vec<_> = story.report.findings.iter().filter(|finding| finding.weight != Weight::Note).collect();
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    p.kicker { "Belay incident report" }
                    h1 { (title) }
                    p.objective { "“" (story.objective) "”" }
                    p { "On behalf of " b { (named(&summary.principal)) } ", class " b { (story.class) } ", pack " b { (story.pack) }
                        ". " (named(&summary.started)) " to " (named(&summary.ended)) "." }
                    p.verdict.(verdict) { b { (story.report.verdict) } " " (told) }
                    @if !findings.is_empty() {
                        ul.findings { @for finding in &findings {
                            li { @if let Some(record) = finding.record { "record " (leading(record, story)) " " }
                                code { (finding.rule) } " " (Safe(&finding.message).to_string()) }
                        } }
                    }
                }
                section.tiles {
                    (tile("attempts", &summary.attempts.len().to_string(), ""))
                    (tile("took effect", &summary.outcomes.applied.to_string(), ""))
                    (tile("unknown outcome", &(summary.outcomes.unknown + summary.outcomes.open).to_string(), ""))
                    (tile("denied", &summary.usage.denials.to_string(), ""))
                    (tile("records", &summary.records.to_string(), ""))
                }
                h2 { "Budgets" }
                section.curves { @for curve in &story.curves { (drawn(curve)) } }
                h2 { "Timeline" }
                table.timeline {
                    thead { tr { th { "Record" } th { "Time" } th { "Att." } th { "" } th { "What" } th { "Rules" } } }
                    tbody { @for step in &story.steps { tr.(tone(step.tone)) {
                        td { @for record in &step.records { (leading(*record, story)) " " } }
                        td.time { (clock(&step.time)) }
                        td { (step.attempt) }
                        td { span.word { (step.word) } }
                        td { b { (step.what) } @if !step.detail.is_empty() { br; (step.detail) } }
                        td.rules { @for rule in &step.rules { code { (rule) } " " } }
                    } } }
                }
                h2 { "Network" }
                table {
                    thead { tr { th { "Channel" } th { "Target" } th { "Addresses" } th.number { "Sent" } th.number { "Denied" } th.number { "Bytes out" } th.number { "Bytes back" } } }
                    tbody { @for peer in &story.network { tr.(if peer.denied > 0 { "bad" } else { "plain" }) {
                        td { (peer.channel) } td { b { (peer.target) } } td { (peer.addresses.join(", ")) }
                        td.number { (peer.sent) } td.number { (peer.denied) } td.number { (peer.up) } td.number { (peer.bytes) }
                    } } }
                }
                h2 { "Records and proofs" }
                p { "Each record as it is in the log, and the hashes that lead from it to the root "
                    code { (summary.root.as_deref().unwrap_or("none")) } " over " (summary.records) " records (RFC 6962)." }
                @for record in &story.records {
                    details {
                        summary { "record " (record.seq) " " code { (record.kind) } }
                        // The anchor is inside, because a browser that follows a link to it opens the elements around it.
                        pre id={"r" (record.seq)} { (record.json) }
                        p { "Proof: " @if record.proof.is_empty() { "it is the whole tree" } @for hash in &record.proof { code { (hash) } " " } }
                    }
                }
                @let left = summary.records.saturating_sub(story.records.len() as u64);
                @if left > 0 { p { (left) " more records: " code { "belay prove … --record N" } } }
                footer { p { "Evidence in " code { (story.place) } ", witness " code { (story.key) }
                    ". Check it: " code { "belay verify" } "." } }
            }
        }
    }
}

/// Returns the number of a record. It links to the record if the page has it in full, as it has the first ones.
fn leading(record: u64, story: &Story) -> Markup {
    let is_here = story.records.last().is_some_and(|last| record <= last.seq);
    html! { @if is_here { a href={"#r" (record)} { (record) } } @else { (record) } }
}

fn tile(name: &str, number: &str, class: &str) -> Markup {
    html! { div.tile.(class) { b { (number) } span { (name) } } }
}

fn tone(tone: Tone) -> &'static str {
    match tone {
        Tone::Plain => "plain",
        Tone::Good => "good",
        Tone::Warn => "warn",
        Tone::Bad => "bad",
    }
}

/// Returns the time of day of an RFC 3339 time. Any other text is returned as it is.
fn clock(time: &str) -> &str {
    time.split_once('T').map_or(time, |(_, clock)| clock.trim_end_matches('Z'))
}

/// Draws a limit's use as steps over time, with the limit as a line.
fn drawn(curve: &Curve) -> Markup {
    let top = curve.points.iter().map(|(_, used)| *used).fold(1.0, f64::max);
    let y = |used: f64| HEIGHT - 4.0 - used / top * (HEIGHT - 12.0);
    let mut path = format!("M0 {:.1}", y(0.0));
    let mut before = 0.0;
    for (at, used) in &curve.points {
        let x = at * WIDTH;
        path.push_str(&format!(" L{x:.1} {:.1} L{x:.1} {:.1}", y(before), y(*used)));
        before = *used;
    }
    path.push_str(&format!(" L{WIDTH} {:.1}", y(before)));
    let area = format!("{path} L{WIDTH} {:.1} L0 {:.1} Z", y(0.0), y(0.0));
    let full = if before >= 1.0 {
        "bad"
    } else if before >= 0.8 {
        "warn"
    } else {
        "good"
    };
    html! {
        figure.(full) {
            figcaption { b { (curve.name) } " " (curve.used) " of " (curve.limit) }
            svg viewBox={"0 0 " (WIDTH) " " (HEIGHT)} role="img" aria-label={(curve.name) ": " (curve.used) " of " (curve.limit)} {
                line.limit x1="0" x2=(WIDTH) y1=(y(1.0)) y2=(y(1.0)) {}
                path.area d=(area) {}
                path.line d=(path) {}
            }
        }
    }
}
