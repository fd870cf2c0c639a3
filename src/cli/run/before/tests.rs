//! Tests of options that fit the files, and of options that do not.

use rstest::rstest;

use super::*;
use crate::{cli::lint::Severity, render::fixtures};

fn objects() -> Objects {
    let mut pack = fixtures::pack();
    pack.spec.workflow_classes.iter_mut().flat_map(|class| &mut class.egress).for_each(|rule| {
        if rule.host == "models.world.test" {
            rule.ports = vec![443, 8000];
            rule.credentials = serde_json::from_str(r#"[{"secret": "model-key", "key": "token"}]"#).unwrap();
        }
    });
    Objects {
        task: fixtures::task(),
        contracts: fixtures::contracts(),
        pack,
        namespace: Default::default(),
        config_maps: vec![],
        secrets: vec![],
        credentials: vec![],
    }
}

#[rstest]
#[case("models.world.test=127.0.0.1:8000", true)]
#[case("tickets.world.test=127.0.0.1", true)]
#[case("MODELS.world.test.=127.0.0.1", true)]
#[case("model.world.test.example=127.0.0.1", false)]
#[case("a.b.world.test=127.0.0.1", false)]
#[case("localhost=127.0.0.1", false)]
#[case("world.test=127.0.0.1", false)]
fn an_address_is_for_a_host_that_is_listed(#[case] resolve: &str, #[case] listed: bool) {
    let said = unlisted(&objects(), &[resolve.parse().unwrap()], &[]);
    assert_eq!(said.is_empty(), listed, "{said:?}");
    let server = unlisted(&objects(), &[], &[resolve.replace("127.0.0.1", "python3 x.py ").parse().unwrap()]);
    assert_eq!(server.is_empty(), listed, "{server:?}");
    // The message lists the known hosts.
    for line in said.iter().chain(&server) {
        assert!(line.contains("*.world.test, files.world.test, models.world.test"), "{line}");
    }
}

#[rstest]
#[case("model-key/token=env:A", true)]
#[case("model-key/tokn=env:A", false)]
#[case("modelkey/token=env:A", false)]
fn a_key_that_nothing_uses_is_said_to_be_one(#[case] given: &str, #[case] used: bool) {
    let said = unused(&objects(), &[given.parse().unwrap()]);
    assert_eq!(said.is_empty(), used, "{said:?}");
    assert!(said.iter().all(|line| line.contains("are model-key/token")), "{said:?}");
    let mut others = objects();
    others.task.spec.principal = "bob@example.test".to_owned();
    for rule in others.pack.spec.workflow_classes.iter_mut().flat_map(|class| &mut class.egress) {
        rule.credentials.iter_mut().for_each(|one| one.principals = vec!["alice@example.test".to_owned()]);
    }
    // The key belongs to another principal.
    assert_eq!(unused(&others, &[given.parse().unwrap()]).len(), 1);
}

#[rstest]
#[case::over_tls("https://models.world.test", false, 0)]
#[case::in_the_clear("http://models.world.test:8000/v1", false, 1)]
#[case::on_this_machine("http://models.world.test:8000/v1", true, 0)]
#[case::where_no_key_goes("http://tickets.world.test", false, 0)]
fn a_key_goes_over_tls_or_nowhere_else(#[case] url: &str, #[case] here: bool, #[case] errors: usize) {
    let mut objects = objects();
    objects.pack.spec.models.openai = Some(url.to_owned());
    let warning = Diagnostic {
        file: "pack.yaml".to_owned(),
        line: 17,
        column: 11,
        severity: Severity::Warning,
        field: "spec.workflowClasses[0].egress[2].credentials".to_owned(),
        expected: String::new(),
        found: String::new(),
        mend: String::new(),
    };
    let said = in_the_clear(&objects, &[warning], &|_| here);
    assert_eq!(said.len(), errors, "{said:?}");
    let words = ["pack.yaml:17:11: ", "https only", "spec.models.openai", "--resolve models.world.test=127.0.0.1:PORT"];
    assert!(said.iter().all(|line| words.iter().all(|word| line.contains(word))), "{said:?}");
    // Hosts of another class are not reported.
    objects.task.spec.workflow_class = "another".to_owned();
    assert!(in_the_clear(&objects, &[], &|_| here).is_empty());
}
