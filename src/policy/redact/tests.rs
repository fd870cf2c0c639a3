use base64::{Engine, prelude::BASE64_STANDARD};
use proptest::prelude::*;
use rstest::rstest;
use serde_json::json;

use super::*;
use crate::policy::{
    config::{DataPattern, ModelPrice, SideEffect},
    decide::tests::{policy, salt},
};

fn redactor() -> Redactor {
    let mut policy = policy(vec![SideEffect::Read]);
    policy.task.principal = "ana@example.test".into();
    policy.task.image = "a1b2c3d4e5f6a7b8.cluster.test".into();
    let pattern = DataPattern {
        name: "card".into(),
        pattern: r"\b\d{4} \d{4} \d{4} \d{4}\b".into(),
        sensitivity: Sensitivity::Restricted,
    };
    Redactor::new(&policy, Arc::new(Detectors::compile(&[pattern]).unwrap()))
}

/// The redacted text, with `#` in place of each hidden part.
fn text(text: &str) -> String {
    let shown = redactor().text(text, &salt());
    let mut parts = shown.split("[redacted:");
    let first = parts.next().unwrap().to_owned();
    parts.fold(first, |shown, part| {
        let (hex, rest) = part.split_once(']').unwrap();
        assert_eq!(hex.len(), 64);
        format!("{shown}#{rest}")
    })
}

#[rstest]
#[case::ours(
    "expected host:port, found \"evil.example\": ask for it",
    "expected host:port, found \"evil.example\": ask for it"
)]
#[case::policy("ana@example.test said no to this call", "ana@example.test said no to this call")]
#[case::numbers("record 4096: 3 of 250000 tokens, 10.0.0.1:443", "record 4096: 3 of 250000 tokens, 10.0.0.1:443")]
#[case::time("by 2026-11-26T10:00:00Z", "by 2026-11-26T10:00:00Z")]
#[case::names(
    "gpt-4o-2024-08-06, v1beta2, getHTTPStatus, TOOL.DENIED.Mcp, readLogFile, JavaScriptCore, iPhone, PyPI, McKinsey",
    "gpt-4o-2024-08-06, v1beta2, getHTTPStatus, TOOL.DENIED.Mcp, readLogFile, JavaScriptCore, iPhone, PyPI, McKinsey"
)]
#[case::apostrophe("the task's budget isn't the agent's", "the task's budget isn't the agent's")]
#[case::key("a tool \"AKIAIOSFODNN7EXAMPLE\" is none", "a tool \"#\" is none")]
#[case::base64("a tool \"eNozMTUyVjAzMTdXsD\" is none", "a tool \"#\" is none")]
#[case::unquoted("found AKIAIOSFODNN7EXAMPLE.", "found #")]
#[case::account("no host ana:hunter@evil.example:80", "no host #")]
#[case::parameter("no path /x?password=hunter", "no path #")]
#[case::words("it says \"my name is Ana\"", "it says \"#\"")]
#[case::single("('my name' was unexpected)", "('#' was unexpected)")]
#[case::escaped(r#"it says "a \"b c\" d" there"#, r##"it says "#" there"##)]
#[case::cut("found `8becd25`,d`5b,58be,`8be,8becd25``132 there", "found # there")]
#[case::escaped_name(r"`8becd25\`,d\`5b,58be` is unknown", "`#` is unknown")]
#[case::touching(r#"found ["read","write"], expected [10,"a b"]"#, r##"found ["read","write"], expected #"##)]
#[case::open("it says \"and never ends", "it says \"#")]
#[case::neighbours("found AKIAIOSFODNN7EXAMPLE AKIAIOSFODNN7EXAMPLF there", "found # there")]
#[case::sensitive("pay with 4111 1111 1111 1111", "#")]
#[case::addresses(
    "134744072:443, 0x08080808:443, 010.8.8.8:443, [::ffff:8.8.8.8]:443, fd00::1",
    "134744072:443, 0x08080808:443, 010.8.8.8:443, [::ffff:8.8.8.8]:443, fd00::1"
)]
#[case::host(
    "not to a1b2c3d4e5f6a7b8.cluster.test:443, found a1b2c3d4e5f6a7b9.cluster.test:443",
    "not to a1b2c3d4e5f6a7b8.cluster.test:443, found #"
)]
#[case::nothing("", "")]
#[case::spaces("  a  b ", "  a  b ")]
fn shows_what_reads(#[case] said: &str, #[case] expected: &str) {
    assert_eq!(text(said), expected);
}

#[test]
fn what_is_hidden_is_committed_to() {
    let shown = redactor().text("found AKIAIOSFODNN7EXAMPLE there", &salt());
    assert_eq!(shown, format!("found [redacted:{}] there", salt().bytes(b"AKIAIOSFODNN7EXAMPLE")));
}

#[test]
fn what_we_made_is_learnt() {
    let (redactor, digest) = (redactor(), "ab1".repeat(21));
    assert_ne!(redactor.name(&digest, &salt()), digest);
    redactor.learn(&digest);
    assert_eq!(redactor.name(&digest, &salt()), digest);
}

#[test]
fn a_model_keeps_its_price() {
    let mut policy = policy(vec![]);
    let price =
        |model: &str| ModelPrice { model: model.into(), input_micros: 1, output_micros: 1, ..ModelPrice::default() };
    policy.models.prices = vec![price("gpt-*"), price("*")];
    let redactor = Redactor::new(&policy, Arc::new(Detectors::compile(&[]).unwrap()));
    assert_eq!(redactor.model("gpt-4o", &policy, &salt()), "gpt-4o");
    for model in ["gpt-AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"] {
        let shown = redactor.model(model, &policy, &salt());
        assert!(!shown.contains("AKIA"), "{shown}");
        assert_eq!(price::of(&policy.models.prices, &shown), price::of(&policy.models.prices, model));
    }
}

#[rstest]
#[case("api.example.test:443", true)]
#[case::of_the_policy("a1b2c3d4e5f6a7b8.cluster.test:443", true)]
#[case("akiaiosfodnn7example.example.test:443", false)]
fn a_host_is_a_host_still(#[case] to: &str, #[case] shows: bool) {
    let shown = redactor().authority(&Authority::parse(to, None).unwrap(), &salt());
    assert_eq!(shown == to, shows);
    assert!(Authority::parse(&shown, None).is_ok(), "{shown}");
    assert!(shown.ends_with(".test:443"));
}

/// Wherever a secret is in a text, and however it is written, the result does not contain it. Words are recognized by their form. One in
/// some thousands of secrets in base64 looks like two names with a slash between them.
#[test]
fn no_secret_is_shown() {
    let places = [("", ""), ("the key is ", " of the account"), ("don't say ", ", 'please'"), ("a \"b\" ", "")];
    let mut read_as_words = 0;
    for seed in 0_u64..400 {
        // As random as secrets are.
        let length = 16 + usize::try_from(seed % 17).unwrap();
        let bytes = crate::canonical::sha256(&seed.to_be_bytes())[..length].to_vec();
        let (before, after) = places[usize::try_from(seed).unwrap() % places.len()];
        let shown =
            |secret: &str, quoted: &str| redactor().text(&format!("{before}{quoted}{after}"), &salt()).contains(secret);
        let quoted = |secret: &str| shown(secret, &format!("\"{}\"", secret.escape_debug()));
        let hex = hex::encode(&bytes);
        assert!(!shown(&hex, &hex), "{hex}");
        // Quotation marks inside a secret, in any number, do not cut it into names.
        let marks: Vec<&str> =
            ["`", "\"", "'", "``", "`,`"].into_iter().cycle().skip(length).take(length / 3).collect();
        let pieces = hex.as_bytes().chunks(6).map(|piece| String::from_utf8_lossy(piece).into_owned());
        let cut: String = pieces.zip(marks.iter().chain(&[""; 64])).map(|(piece, mark)| piece + mark).collect();
        assert!(!shown(&cut, &cut), "{cut}");
        for secret in [hex, format!("{bytes:?}"), String::from_utf8_lossy(&bytes).into_owned()] {
            assert!(!quoted(&secret), "{secret}");
        }
        read_as_words += u32::from(quoted(&BASE64_STANDARD.encode(&bytes)));
    }
    assert!(read_as_words <= 1, "{read_as_words} of 400");
}

proptest! {
    /// The parts add up to the text, so nothing is lost except what is hidden.
    #[test]
    fn all_else_stays(text in ".{0,200}") {
        let parts = parts_of(&text, |token| token.len() % 2 == 0);
        let whole: String = parts.iter().map(|part| match part { Part::Shown(text) | Part::Hidden(text) => *text }).collect();
        prop_assert_eq!(whole, text);
    }
}

/// Belay's own messages are readable in the log: the bounds in the messages, and those of the task's own contracts.
#[test]
fn no_constant_of_ours_is_hidden() {
    assert!(OURS.contains(&crate::policy::json::LARGEST.to_string().as_str()));
    for number in [json!(9_007_199_254_740_992_i64), json!(-9_007_199_254_740_993_i64), json!(-0.0), json!(1e300)] {
        let reason = crate::policy::json::exact(&json!({"id": number})).unwrap_err().to_string();
        assert_eq!(text(&reason), reason, "{number}");
    }
    // The control: another number with as many digits may be an account.
    assert_eq!(text("beyond 9007199254740993"), "beyond #");

    let mut policy = policy(vec![SideEffect::Read]);
    policy.tools[0].input =
        json!({"properties": {"account": {"maximum": 120_000_000_000_i64, "multipleOf": 0.000_000_000_1}}});
    let redactor = Redactor::new(&policy, Arc::new(Detectors::compile(&[]).unwrap()));
    let reason = "/account: expected a number of at most 120000000000, found a larger one";
    assert_eq!(redactor.text(reason, &salt()), reason);
    assert!(!redactor.text("of at most 130000000000", &salt()).contains("130000000000"));
}

/// Each text in the sources that becomes a reason is shown unchanged, except for the values in it. Messages for the author of a template,
/// or for a client without a token, are never recorded.
#[test]
fn no_word_of_ours_is_hidden() {
    let mut hidden = Vec::new();
    let mut seen = 0;
    for folder in ["policy", "harness", "gateway"] {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(folder);
        for (path, source) in sources(&folder) {
            for literal in literals(&source) {
                seen += 1;
                let shown = text(&literal);
                if shown.contains('#') {
                    hidden.push(format!("{}: {literal:?} is {shown:?}", path.display()));
                }
            }
        }
    }
    assert!(seen > 300, "{seen} texts");
    assert!(hidden.is_empty(), "{}", hidden.join("\n"));
}

fn sources(folder: &std::path::Path) -> Vec<(std::path::PathBuf, String)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            all.extend(sources(&path));
        } else if name.ends_with(".rs")
            && !["tests.rs", "reference.rs", "testing.rs", "template.rs"].contains(&name.as_str())
            && !path.to_string_lossy().contains("/tests/")
        {
            all.push((path.clone(), std::fs::read_to_string(&path).unwrap()));
        }
    }
    all
}

/// Returns the texts that start as reasons do, with `#` in place of the values.
fn literals(source: &str) -> Vec<String> {
    let code = source.split("#[cfg(test)]").next().unwrap();
    let code: String =
        code.lines().filter(|line| !line.trim_start().starts_with("//")).map(|line| format!("{line}\n")).collect();
    let pattern = regex::Regex::new(r#""((?:[^"\\]|\\.|\\\n)*)""#).unwrap();
    let put_in = regex::Regex::new(r"\{[^{}]*\}").unwrap();
    let joined = regex::Regex::new(r"\\\n\s*").unwrap();
    let found = pattern.captures_iter(&code).map(|text| {
        let text = joined.replace_all(text.get(1).unwrap().as_str(), "").replace("\\\"", "\"");
        put_in.replace_all(&text, "x").into_owned()
    });
    found
        .filter(|text| {
            ["expected ", "the ", "no ", "found "].iter().any(|word| text.starts_with(word))
                && !text.contains('#')
                && !text.contains("<token>")
        })
        .collect()
}
