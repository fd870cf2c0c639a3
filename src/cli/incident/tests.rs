use clap::Parser;

use super::*;
use crate::{
    evidence::{
        record::Event,
        store::{Store, dir::Dir},
    },
    verify::tests::script::Script,
};

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

/// Returns the output of `belay incident` for a log, and its exit code.
async fn incident(script: &Script, output: &str, without: Option<&str>) -> (u8, String) {
    let folder = tempfile::tempdir().unwrap();
    let store = Dir::new(folder.path());
    for (key, bytes) in script.write().objects().filter(|(key, _)| Some(*key) != without) {
        store.put_new(key, bytes.clone(), None).await.unwrap();
    }
    let (path, key) = (folder.path().to_str().unwrap(), script.witness.verifier().to_string());
    let line = Line::parse_from(["incident", path, "--witness-key", &key, "-o", output]);
    let mut out = Vec::new();
    let code = run(&line.args, &mut out).await.unwrap();
    (code, String::from_utf8(out).unwrap().replace(path, "FOLDER").replace(&key, "KEY"))
}

#[tokio::test]
async fn the_run_as_a_timeline() {
    let (code, text) = incident(&Script::good(), "markdown", None).await;
    assert_eq!(code, 0);
    let text = text.lines().map(|line| if line.starts_with("Evidence") { "Evidence: …" } else { line });
    insta::assert_snapshot!(text.collect::<Vec<_>>().join("\n"));
}

/// Each line of the page links to a record on it, and no link leads out.
#[tokio::test]
async fn a_page_by_itself() {
    let (code, page) = incident(&Script::good(), "html", None).await;
    assert_eq!(code, 0);
    for record in 0..13 {
        let (link, place) = (format!("href=\"#r{record}\""), format!("id=\"r{record}\""));
        assert!(page.contains(&link) && page.contains(&place), "{record}");
    }
    for word in ["http:", "https:", "<script", "src=", "url(", "@import"] {
        let out: Vec<_> =
            page.lines().filter(|line| line.contains(word) && !line.contains("models.world.test")).collect();
        assert!(out.is_empty(), "{word}: {out:?}");
    }
    assert!(page.contains("VALID") && page.contains("egress.host") && page.contains("198.51.100.20:443"), "{page}");
}

#[tokio::test]
async fn what_does_not_hold_is_on_top() {
    let (code, text) = incident(&Script::good(), "markdown", Some("segments/0000000003.jsonl")).await;
    assert_eq!(code, 1);
    assert!(text.contains("**INVALID**") && text.contains("- record 6: segment.order: "), "{text}");
    let (code, text) = incident(&Script::good(), "html", Some("summary.dsse.json")).await;
    assert!(code == 3 && text.contains("INCOMPLETE") && text.contains("end.missing"), "{text}");
}

/// Text that an agent wrote stays text, on the page and in the table.
#[tokio::test]
async fn hostile_text_is_text() {
    let mut script = Script::good();
    let Event::Denied(denied) = &mut script.at(4).event else { panic!() };
    denied.target = "<img src=x onerror=alert(1)>|`a`|\u{202e}".into();
    let (_, page) = incident(&script, "html", None).await;
    assert!(!page.contains("<img") && page.contains("&lt;img src=x") && !page.contains('\u{202e}'));
    let (_, text) = incident(&script, "markdown", None).await;
    let inert = r"egress <img src=x onerror=alert(1)>\u{7c}\u{60}a\u{60}\u{7c}\u{202e}`";
    assert!(text.contains(inert) && !text.contains('\u{202e}'), "{text}");
}
