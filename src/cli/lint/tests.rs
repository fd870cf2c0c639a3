//! Broken files, each with its one finding, and good ones without findings.

use std::path::Path;

use proptest::prelude::*;

use super::*;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn lint_paths(paths: &[&str]) -> Outcome {
    let mut sources = Vec::new();
    for path in paths {
        gather(&Path::new(ROOT).join(path), &mut sources).unwrap();
    }
    on_a_large_stack(&sources, "default").unwrap()
}

fn lint_texts(texts: &[(&str, &str)]) -> Outcome {
    let sources: Vec<_> =
        texts.iter().map(|(path, text)| Source { path: path.into(), bytes: text.as_bytes().to_vec() }).collect();
    on_a_large_stack(&sources, "default").unwrap()
}

/// `file`, linted together with `good.yaml`, has this one finding. The text is a part of what was found, `;` and a part of the fix.
#[rstest::rstest]
#[case("yaml-unclosed.yaml", 13, "YAML", "; correct it")]
#[case("yaml-tab.yaml", 8, "YAML", "tab; correct it")]
#[case("yaml-duplicate-key.yaml", 9, "YAML", "objective; correct it")]
#[case("yaml-alias.yaml", 12, "YAML", "anchor; correct it")]
#[case("json-unclosed.json", 4, "YAML", "; correct it")]
#[case("task-version.yaml", 1, "apiVersion", "v1beta1; use this version")]
#[case("task-no-version.yaml", 1, "apiVersion", "nothing; use this version")]
#[case("task-kind.yaml", 2, "kind", "AgentTsk; write `AgentTask`")]
#[case("task-no-name.yaml", 3, "metadata.name", "nothing; Lower-case letters")]
#[case("task-name.yaml", 4, "metadata.name", "Other_Task; Lower-case letters")]
#[case("task-long-name.yaml", 4, "metadata.name", "aaa; size() <= 52")]
#[case("task-unknown-field.yaml", 12, "spec.tool", "`tool`; write `tools`")]
#[case("task-unknown-metadata.yaml", 5, "metadata.label", "`label`; write `labels`")]
#[case("task-required.yaml", 6, "spec.principal", "nothing; The user or team on whose behalf")]
#[case("task-type.yaml", 13, "spec.limits.toolCalls", "\"5\"; without quotes")]
#[case("task-boolean-text.yaml", 14, "spec.agent.env[0].value", "true; quotes")]
#[case("task-pattern.yaml", 13, "spec.agent.resources.memory", "512MiB; such as `512Mi`")]
#[case("task-maximum.yaml", 13, "spec.limits.wallTimeSeconds", "604801; lower it: Seconds that one attempt can run")]
#[case("task-env-twice.yaml", 14, "spec.agent.env[1].name", "\"A\" again; rename or remove")]
#[case("task-tool-twice.yaml", 12, "spec.tools[1]", "\"read-log\" again; rename or remove")]
#[case("task-mount-rule.yaml", 15, "spec.workspace.mounts[0]", "an object; has(self.configMap)")]
#[case("task-contract-missing.yaml", 14, "spec.tools[1]", "`read-logs`, which does not exist; apply that ToolContract")]
#[case("task-class.yaml", 8, "spec.workflowClass", "`triag`; name one of them")]
#[case("task-task-class.yaml", 9, "spec.taskClass", "`incidents`; name one of them")]
#[case("task-ceiling.yaml", 13, "spec.limits.tokens", "20000; correct it")]
#[case("task-room.yaml", 13, "spec.agent.resources.cpu", "`1`; correct it, or have")]
#[case("task-reserved-env.yaml", 13, "spec.agent.env[0].name", "HTTP_PROXY; another name")]
#[case("task-reserved-path.yaml", 15, "spec.workspace.writeScopes[0].path", "/etc; /workspace")]
#[case("task-scopes-too-large.yaml", 14, "spec.workspace.writeScopes", "209715200 bytes; smaller")]
#[case("task-no-pack.yaml", 5, "metadata.namespace", "none that does; label the namespace")]
#[case("contract-enum.yaml", 8, "spec.sideEffect", "raed; write `read`")]
#[case("contract-empty.yaml", 7, "spec.description", "\"\"; fill it in: The description for the agent")]
#[case("contract-not-object.yaml", 11, "spec.input", "\"object\"; write its fields: JSON Schema")]
#[case("contract-effect.yaml", 9, "spec.sideEffect", "external; choose a class")]
#[case("contract-egress.yaml", 11, "spec.upstream.mcp.url", "logs.example.org; have the host added")]
#[case("contract-port.yaml", 11, "spec.upstream.mcp.url", "8443; have the host added")]
#[case("contract-broken-and-used.yaml", 6, "spec.tool", "nothing; The name under which the agent calls")]
#[case("contract-same-tool.yaml", 35, "spec.tools[1]", "as is `read-log`; keep one")]
#[case("contract-url.yaml", 10, "spec.upstream.mcp.url", "99999; correct it")]
#[case("contract-schema-keyword.yaml", 14, "spec.input.properties.folder.type", "strin; correct the schema")]
#[case("contract-schema-reference.yaml", 14, "spec.input.properties.folder.$ref", "https; correct the schema")]
#[case("contract-schema-type.yaml", 12, "spec.input.type", "array; correct the schema")]
#[case("contract-schema-boolean-key.yaml", 14, "spec.input.properties.true", "boolean; put it in quotes")]
#[case("contract-cel-syntax.yaml", 18, "spec.preconditions[0].cel", "text that is not CEL; correct the expression")]
#[case("contract-cel-variable.yaml", 18, "spec.preconditions[0].cel", "`use`; correct the expression")]
#[case("contract-cel-field.yaml", 18, "spec.preconditions[0].cel", "`foldr`; denies every call")]
#[case("contract-cel-types.yaml", 18, "spec.preconditions[0].cel", "text and a number; denies every call")]
#[case("contract-cel-no-boolean.yaml", 18, "spec.preconditions[0].cel", "text; denies every call")]
#[case("contract-cel-function.yaml", 18, "spec.preconditions[0].cel", "`lower`; denies every call")]
#[case("contract-approval-when-syntax.yaml", 17, "spec.approval.when", "text that is not CEL; correct the expression")]
#[case("contract-approval-when-types.yaml", 17, "spec.approval.when", "text and a number; every call needs approval")]
#[case("contract-idempotency-argument.yaml", 16, "spec.idempotency.argument", "`case`; add it to input.required")]
#[case("contract-verify-variable.yaml", 17, "spec.verify.applied", "`results`; correct the expression")]
#[case("contract-verify-types.yaml", 17, "spec.verify.applied", "text and a number; the outcome of a call")]
#[case("contract-verify-itself.yaml", 16, "spec.verify.tool", "`open_case` for `open_case`; name another tool")]
#[case("contract-rollback-variable.yaml", 19, "spec.rollback.call.arguments.case", "`results`; correct the expression")]
#[case("contract-rollback-read.yaml", 15, "spec.rollback", "`open_case`, which reads; drop rollback")]
#[case("contract-rollback-both.yaml", 15, "spec.rollback", "an object; self.call")]
#[case("contract-approval-nobody.yaml", 18, "spec.approval.approvers", "an object; self.approvers.users")]
#[case(
    "contract-approval-required.yaml",
    18,
    "spec.approval.required",
    "17; lower it: The number of approvals that the call needs"
)]
#[case("approval-request.yaml", 2, "kind", "ApprovalRequest; choose one of them")]
#[case("contract-twice.yaml", 4, "metadata.name", "good.yaml:31; keep one")]
#[case("pack-namespaced.yaml", 5, "metadata.namespace", "team-a; leave it out")]
#[case("pack-credential-rule.yaml", 15, "spec.workflowClasses[0].egress[0]", "an object; self.credential")]
#[case("pack-class-twice.yaml", 19, "spec.workflowClasses[1].name", "\"triage\" again; rename or remove")]
#[case("pack-selector.yaml", 7, "spec.namespaceSelector", "Invalid expression operator; governs nothing")]
#[case("pack-models.yaml", 9, "spec.models", "models.example.com; drop `Models`")]
#[case("pack-quantity.yaml", 18, "spec.workflowClasses[triage].resources.cpu", "`0`; correct the pack")]
#[case("pack-pattern.yaml", 16, "spec.classification[0].pattern", "unclosed group; correct the pattern")]
#[case("pack-rule-syntax.yaml", 17, "spec.rules[1].when", "text that is not CEL; correct the expression")]
#[case("pack-rule-variable.yaml", 17, "spec.rules[1].when", "`results`; correct the expression")]
#[case("pack-rule-types.yaml", 17, "spec.rules[1].when", "text and a number; counts against every call")]
#[case("pack-rules-deny-only.yaml", 15, "spec.rules", "deny only; decision Allow")]
#[case("pack-approval-missing.yaml", 5, "spec", "an object; self.spec.approval")]
#[case("pack-approval-when.yaml", 17, "spec.approval", "an object; self.spec.approval.when")]
#[case("pack-risk-nothing.yaml", 15, "spec.risk", "an object; self.approveAt")]
#[case("pack-risk-order.yaml", 17, "spec.risk.approveAt", "50; no call needs approval")]
#[case("pack-risk-unreachable.yaml", 17, "spec.risk.denyAt", "40; no call reaches it")]
#[case("task-never-allowed.yaml", 33, "spec.tool", "no rule allows it; drop the tool from the task")]
#[case("list.yaml", 11, "items[0].spec.sideEffect", "none; choose one")]
fn one_error(#[case] file: &str, #[case] line: u64, #[case] field: &str, #[case] words: &str) {
    let (found, mend) = words.split_once("; ").unwrap_or(("", words.trim_start_matches("; ")));
    let outcome = lint_paths(&["e2e/lint/good.yaml", &format!("e2e/lint/{file}")]);
    let [one] = outcome.diagnostics.as_slice() else { panic!("{:#?}", outcome.diagnostics) };
    let all = one.message();
    assert_eq!((one.line, one.field.as_str(), one.severity), (line, field, Severity::Error), "{all}");
    assert!(one.file.ends_with(file), "{one:?}");
    assert!(one.found.contains(found) && one.mend.contains(mend), "{all}");
}

#[test]
fn a_contract_that_no_task_names_is_a_warning() {
    let outcome = lint_paths(&["e2e/lint/good.yaml", "e2e/lint/contract-unused.yaml"]);
    let [one] = outcome.diagnostics.as_slice() else { panic!("{:#?}", outcome.diagnostics) };
    assert_eq!((one.line, one.field.as_str(), one.severity), (4, "metadata.name", Severity::Warning));
    assert!(lint_paths(&["e2e/lint/contract-unused.yaml"]).diagnostics.is_empty(), "without tasks nothing is unused");
}

#[test]
fn an_argument_in_a_path_of_which_nothing_is_said_is_a_warning() {
    let outcome = lint_paths(&["e2e/lint/contract-path-argument.yaml"]);
    let found: Vec<_> = outcome.diagnostics.iter().map(|one| (one.line, one.field.as_str(), one.severity)).collect();
    assert_eq!(
        found,
        [(17, "spec.input.properties.id", Severity::Warning), (38, "spec.input.properties.path", Severity::Warning)]
    );
    assert!(outcome.diagnostics.iter().all(|one| one.mend.contains("pattern")), "{outcome:#?}");
}

#[test]
fn a_key_that_would_go_out_in_the_clear_is_a_warning() {
    let with = |url: &str, credentials: &str| {
        let uses = "          uses: [Models, Tools]\n";
        let pack = include_str!("../../../examples/hello/policy-pack.yaml").replace("http://shop.test", url);
        let pack = pack.replace("ports: [80]", "ports: [80, 443]").replace(uses, &format!("{uses}{credentials}"));
        let line = pack.lines().position(|line| line.contains("credentials:")).map_or(0, |line| line as u64 + 1);
        let contracts = include_str!("../../../examples/hello/contracts.yaml");
        (line, lint_texts(&[("pack.yaml", &pack), ("contracts.yaml", contracts)]).diagnostics)
    };
    let key = "          credentials: [{secret: model-key, key: token}]\n";
    let (line, found) = with("http://shop.test", key);
    let [one] = found.as_slice() else { panic!("{found:#?}") };
    assert_eq!((one.file.as_str(), one.line, one.severity), ("pack.yaml", line, Severity::Warning));
    assert_eq!(one.field, "spec.workflowClasses[0].egress[0].credentials");
    assert!(one.found.contains("spec.models.openai is `http://shop.test`") && one.mend.contains("--resolve"), "{one}");
    // The same holds for contracts.
    let (_, found) = with("https://shop.test", key);
    assert!(matches!(found.as_slice(), [one] if one.found.contains("ToolContract read-order")), "{found:#?}");
    assert!(with("http://shop.test", "").1.is_empty(), "without a key nothing goes out");
}

#[test]
fn a_host_that_has_to_be_opened_is_a_note() {
    let notes = |host: &str| {
        let pack = include_str!("../../../examples/hello/policy-pack.yaml").replace("shop.test", host);
        lint_texts(&[("pack.yaml", &pack)]).notes.join("\n")
    };
    let told = notes("shop.team-a.svc.cluster.local");
    assert!(told.contains("shop.team-a.svc.cluster.local are probably private"), "{told}");
    assert!(told.contains("gateway.privateUpstreams") && told.contains("--resolve"), "{told}");
    for public in ["shop.example.com", "mycluster.local.example", "notlocal"] {
        assert!(!notes(public).contains("probably private"), "{public}");
    }
}

/// If two packs select the same namespace, its tasks have no pack: the finding is where the tasks are.
#[test]
fn two_packs_for_one_namespace() {
    let outcome = lint_paths(&["e2e/lint/good.yaml", "e2e/lint/pack-overlap.yaml"]);
    let [one] = outcome.diagnostics.as_slice() else { panic!("{:#?}", outcome.diagnostics) };
    assert_eq!((one.line, one.field.as_str()), (55, "metadata.namespace"));
    assert!(one.found.contains("`dev`, `prod`"), "{one:?}");
}

#[test]
fn no_task_runs_beside_the_gateway() {
    let outcome = lint_paths(&["e2e/lint/good.yaml", "e2e/lint/task-system-namespace.yaml"]);
    let fields: Vec<_> = outcome.diagnostics.iter().map(|found| (found.line, found.field.as_str())).collect();
    assert_eq!(fields, [(5, "metadata.namespace"), (12, "spec.tools[0]")]);
}

#[test]
fn what_we_ship_is_in_order() {
    let together =
        ["config/samples", "policy-packs/dev", "policy-packs/stage", "policy-packs/prod", "e2e/demo/manifests"];
    for paths in [&together[..], &["e2e/lint/good.yaml"]] {
        let outcome = lint_paths(paths);
        assert!(outcome.diagnostics.is_empty() && outcome.notes.is_empty(), "{outcome:#?}");
        assert!(outcome.objects > 2, "{outcome:?}");
    }
}

#[test]
fn every_broken_file_is_in_a_test() {
    let tests = include_str!("tests.rs");
    let entries = fs::read_dir(Path::new(ROOT).join("e2e/lint")).unwrap();
    let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.len() > 30, "{names:?}");
    names.iter().for_each(|name| assert!(tests.contains(name.as_str()), "{name} is in no test"));
}

const CONTRACT: &str = "\
apiVersion: belay.dev/v1alpha1
kind: ToolContract
metadata: {name: read-log}
spec:
  tool: read_log
  description: Reads a log.
  sideEffect: read
  upstream: {mcp: {url: 'https://logs.example.com/mcp', tool: read}}
  input: {type: object}
";
const TASK: &str = "\
apiVersion: belay.dev/v1alpha1
kind: AgentTask
metadata: {name: triage}
spec:
  objective: Find out.
  workflowClass: triage
  principal: ana
  agent: {image: x}
  tools: [read-log]
  limits: {wallTimeSeconds: 1, toolCalls: 1, tokens: 1}
";

#[rstest::rstest]
#[case::both_default(&[("a.yaml", TASK), ("b.yaml", CONTRACT)], true)]
#[case::set_for_both(&[("k/kustomization.yaml", "namespace: x"), ("k/a.yaml", TASK), ("k/b.yaml", CONTRACT)], true)]
#[case::set_around(&[("k/kustomization.yaml", "namespace: x"), ("k/c/a.yaml", TASK), ("./k/b.yaml", CONTRACT)], true)]
#[case::set_for_one(&[("k/kustomization.yaml", "namespace: x"), ("k/a.yaml", TASK), ("b.yaml", CONTRACT)], false)]
#[case::set_over_its_own(&[("k/kustomization.yaml", "namespace: default"), ("k/a.yaml", concat!("# own\n", "---\n")), ("b.yaml", CONTRACT), ("c.yaml", TASK)], true)]
fn a_kustomization_sets_the_namespace(#[case] files: &[(&str, &str)], #[case] found: bool) {
    let outcome = lint_texts(files);
    assert_eq!(outcome.diagnostics.is_empty(), found, "{outcome:#?}");
}

#[test]
fn patches_are_passed_over() {
    let kustomization = "patches: [{path: ../base/patch.yaml}]\npatchesStrategicMerge: [other.yaml]";
    let patch = "apiVersion: belay.dev/v1alpha1\nkind: AgentTask\nmetadata: {name: triage}\n";
    let files = [
        ("k/kustomization.yaml", kustomization),
        ("base/patch.yaml", patch),
        ("k/other.yaml", patch),
        ("b.yaml", CONTRACT),
    ];
    let outcome = lint_texts(&files);
    assert!(outcome.diagnostics.is_empty() && outcome.objects == 1, "{outcome:#?}");
    let files = [("k/kustomization.yaml", ""), ("base/patch.yaml", patch)];
    assert!(!lint_texts(&files).diagnostics.is_empty());
}

/// A task whose Namespace is not among the files is valid if any pack admits it. If no pack admits it, there is a finding for each.
#[test]
fn an_unknown_namespace_is_tried_with_every_pack() {
    let pack = |name: &str, calls: u32| {
        format!(
            "apiVersion: belay.dev/v1alpha1\nkind: PolicyPack\nmetadata: {{name: {name}}}\nspec:\n  environment: {name}\n  \
             namespaceSelector: {{matchLabels: {{e: {name}}}}}\n  workflowClasses:\n  - name: triage\n    allowedEffects: [read]\n    \
             egress: [{{host: logs.example.com, uses: [Tools]}}]\n    limits: {{wallTimeSeconds: 9, toolCalls: {calls}, tokens: 9}}\n    \
             resources: {{}}\n  evidence: {{bucket: abc, mode: Governance, retentionDays: 1}}\n"
        )
    };
    let (tight, wide) = (pack("tight", 0), pack("wide", 5));
    let outcome = lint_texts(&[("t.yaml", TASK), ("c.yaml", CONTRACT), ("p.yaml", &format!("{tight}---\n{wide}"))]);
    assert!(outcome.diagnostics.is_empty(), "{outcome:#?}");
    assert!(outcome.notes.iter().any(|note| note.contains("`tight`, `wide`")), "{:?}", outcome.notes);
    let outcome = lint_texts(&[("t.yaml", TASK), ("c.yaml", CONTRACT), ("p.yaml", &tight)]);
    let [one] = outcome.diagnostics.as_slice() else { panic!("{outcome:#?}") };
    assert_eq!((one.field.as_str(), one.line), ("spec.limits.toolCalls", 10));
    // Without any pack, the linter still finds what no pack could allow.
    let outcome = lint_texts(&[("t.yaml", TASK)]);
    assert_eq!(outcome.diagnostics.first().map(|one| one.field.as_str()), Some("spec.tools[0]"));
    assert!(outcome.notes.iter().any(|note| note.contains("no PolicyPack")), "{:?}", outcome.notes);
}

#[test]
fn where_bases_of_models_lead_is_said() {
    let pack = |models: &str| {
        format!(
            "apiVersion: belay.dev/v1alpha1\nkind: PolicyPack\nmetadata: {{name: p}}\nspec:\n  environment: p\n  \
             namespaceSelector: {{matchLabels: {{e: p}}}}\n  models: {models}\n  workflowClasses:\n  - name: triage\n    allowedEffects: [read]\n    \
             egress: [{{host: a.example.com, uses: [Models]}}]\n    limits: {{wallTimeSeconds: 9, toolCalls: 1, tokens: 9}}\n    \
             resources: {{}}\n  evidence: {{bucket: abc, mode: Governance, retentionDays: 1}}\n"
        )
    };
    let notes = |models: &str| {
        let outcome = lint_texts(&[("p.yaml", &pack(models))]);
        assert!(outcome.diagnostics.is_empty(), "{outcome:#?}");
        outcome.notes.into_iter().filter(|note| note.contains("goes to")).collect::<Vec<_>>()
    };
    assert_eq!(
        notes("{openai: 'https://a.example.com/v1', anthropic: 'https://a.example.com'}"),
        ["PolicyPack/p spec.models.openai: /v1/chat/completions goes to https://a.example.com/v1/chat/completions"]
    );
    let entry = "{endpoints: [{models: ['gpt-*'], api: openai, url: 'https://a.example.com/openai/deployments/d?api-version=1'}]}";
    let azure = "https://a.example.com/openai/deployments/d/chat/completions?api-version=1";
    let [note] = notes(entry).try_into().unwrap();
    assert!(note.contains("spec.models.endpoints[0].url") && note.ends_with(azure), "{note}");
}

#[test]
fn others_are_passed_over_and_namesakes_are_pointed_at() {
    let other = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: UPPER}\n---\n[1, 2]\n---\ntext\n";
    assert!(lint_texts(&[("a.yaml", other)]).diagnostics.is_empty());
    let namesake = TASK.replace("belay.dev/v1alpha1", "agents.example.com/v1");
    let outcome = lint_texts(&[("a.yaml", &namesake)]);
    assert_eq!(outcome.diagnostics.iter().map(|one| one.severity).collect::<Vec<_>>(), [Severity::Warning]);
    let typo = TASK.replace("belay.dev/v1alpha1", "belay.dve/v1alpha1");
    let outcome = lint_texts(&[("a.yaml", &typo)]);
    assert_eq!(outcome.diagnostics.iter().map(|one| one.severity).collect::<Vec<_>>(), [Severity::Error]);
}

/// Runs the command as a pipeline does.
fn command(args: &[&str]) -> (Result<u8, CliError>, String, String) {
    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }
    let cli: Cli = clap::Parser::parse_from([&["lint"], args].concat());
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    let code = run(&cli.args, &mut out, &mut notes);
    (code, String::from_utf8(out).unwrap(), String::from_utf8(notes).unwrap())
}

#[test]
fn speaks_three_ways_and_gives_exit_codes() {
    let at = |path: &str| format!("{ROOT}/{path}");
    let (good, bad, unused) =
        (at("e2e/lint/good.yaml"), at("e2e/lint/task-ceiling.yaml"), at("e2e/lint/contract-unused.yaml"));
    let (code, out, notes) = command(&[&good]);
    assert_eq!((code.unwrap(), out.as_str()), (0, ""));
    assert!(notes.ends_with("3 objects in 1 files: 0 errors, 0 warnings\n"), "{notes}");
    let (code, out, _) = command(&[&good, &bad]);
    assert_eq!(code.unwrap(), 1);
    let line = "13:47: error: spec.limits.tokens: expected 0 to 10000, the limit of class `triage`, found 20000; correct it, or have";
    assert!(out.starts_with(&format!("{bad}:{line}")), "{out}");
    let (_, out, _) = command(&[&good, &bad, "--output", "json"]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&json[0]["line"], &json[0]["severity"], &json[0]["file"]),
        (&13.into(), &"error".into(), &bad.as_str().into())
    );
    let (_, out, _) = command(&[&good, &bad, "--output", "github"]);
    assert!(out.starts_with(&format!("::error file={bad},line=13,col=47::spec.limits.tokens: expected")), "{out}");
    assert_eq!(command(&[&good, &unused]).0.unwrap(), 0);
    assert_eq!(command(&[&good, &unused, "--strict"]).0.unwrap(), 1);
    for nothing in [at("src/bin"), at("no/such/folder")] {
        assert!(command(&[&nothing]).0.is_err());
    }
}

/// The text of manifests with a few bytes changed. Most of it can still be read.
fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let good = fs::read(Path::new(ROOT).join("e2e/lint/good.yaml")).unwrap();
    let change = (
        0..good.len(),
        prop_oneof![
            Just(None),
            any::<u8>().prop_map(Some),
            "[\\[\\]{}:&*!|>'\"#%@`,?-]".prop_map(|s| s.bytes().next())
        ],
    );
    prop::collection::vec(change, 1..6).prop_map(move |changes| {
        let mut bytes = good.clone();
        for (at, change) in changes {
            match change {
                Some(byte) => bytes[at] = byte,
                None => drop(bytes.splice(at..(at + 3).min(good.len()), *b"   ")),
            }
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_panic(bytes in prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        "[a-z:\\-\\[\\]{}&*!|> \n\t'\"#0-9.]{0,200}".prop_map(String::into_bytes),
        mutated(),
        mutated(),
    ]) {
        for path in ["a.yaml", "kustomization.yaml"] {
            lint(&[Source { path: path.into(), bytes: bytes.clone() }], "default").unwrap();
        }
    }
}
