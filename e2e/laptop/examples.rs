//! The start of a new user: `belay init`, and each folder of examples/, with scripted models under the real host names.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use serde_json::json;

use crate::world::{Ran, World, ended, until};

const SHOP: &str = "tools.test=python3 standin.py";
/// The credential that the providers require, and that agents never see.
const KEY: &str = "sk-example-0123456789";

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")
}

/// Returns the command `belay`, run in another folder than the task's.
fn belay(world: &World, folder: &Path, args: &[&str]) -> Command {
    let mut command = world.belay(args);
    command.current_dir(folder);
    command
}

/// Returns the denied calls with their rules.
fn denied(ran: &Ran) -> Vec<(String, String)> {
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    ran.records("call.denied").iter().map(|one| (text(&one["target"]), text(&one["rule"]))).collect()
}

fn outcomes(ran: &Ran) -> Vec<String> {
    ran.records("call.outcome").iter().map(|one| one["outcome"].as_str().unwrap_or_default().to_owned()).collect()
}

/// Checks the two commands of a first run.
fn hello(world: &World, sandbox: &str) {
    let home = world.task().parent().unwrap().to_owned();
    let made = belay(world, &home, &["init", "hello"]).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    // `belay init` prints a command, and this command works.
    let said = String::from_utf8(made.stdout).unwrap();
    assert!(said.contains("belay run hello/task.yaml --upstream shop.test='python3 hello/standin.py'"), "{said}");
    let upstream = "shop.test=python3 hello/standin.py";
    let args = ["run", "hello/task.yaml", "--upstream", upstream, "--sandbox", sandbox, "--output", "json"];
    let ran = ended(belay(world, &home, &args).output().unwrap());
    assert_eq!(ran.code, 0, "{ran:#?}");
    let refused = denied(&ran);
    let rules: Vec<_> = refused.iter().map(|(_, rule)| rule.as_str()).collect();
    assert_eq!(rules, ["tool.precondition", "tool.unknown", "egress.host"], "{refused:?}");
    assert!(ran.said().contains("Refunded 50 of 80."), "{ran:#?}");
    // The shop refunded 50.
    assert!(ran.said().contains(r#""refunded":50"#) || ran.said().contains(r#""refunded": 50"#), "{ran:#?}");
    let resolved = ran.records("attempt.opened")[0]["local"]["resolved"][0].as_str().unwrap().to_owned();
    assert!(resolved.starts_with("shop.test=127.0.0.1:"), "{resolved}");
    world.is_valid(&world.log());
    world.nobody_is_left();

    let again = belay(world, &home, &["init", "hello"]).output().unwrap();
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert_eq!(again.status.code(), Some(2));
    assert!(said.contains("task.yaml") && said.contains("found all"), "{said}");
}

/// `belay lint` has no findings in the examples.
#[test]
fn the_examples_lint() {
    let lints = |paths: &[&str]| {
        let linted =
            Command::new(env!("CARGO_BIN_EXE_belay")).arg("lint").args(paths).current_dir(examples()).output().unwrap();
        assert!(linted.status.success(), "{linted:?}");
    };
    lints(&["hello"]);
    for name in ["openai-agents", "langgraph", "claude", "shell"] {
        lints(&[name, "policy-pack.yaml", "hello/contracts.yaml"]);
    }
}

/// Checks the same agent with the API of a real model: the files of `belay init` have no lint findings, and the command that it prints
/// needs only the credential. `more` puts a script in the model's place.
fn hello_with(world: &World, model: &[&str], more: &[String], sandbox: &str) {
    let home = world.task().parent().unwrap().to_owned();
    let made = belay(world, &home, &[&["init", "hello", "--model"], model].concat()).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let linted = belay(world, &home, &["lint", "hello"]).output().unwrap();
    assert!(linted.status.success(), "{linted:?}");
    let said = String::from_utf8(made.stdout).unwrap();
    let command = "belay run hello/task.yaml --upstream shop.test='python3 hello/standin.py'";
    let (_, options) = said.split_once(command).unwrap_or_else(|| panic!("{said}"));
    let mut run = belay(world, &home, &["run", "hello/task.yaml", "--sandbox", sandbox, "--output", "json"]);
    run.args(["--upstream", "shop.test=python3 hello/standin.py"]).args(options.split_whitespace()).args(more);
    let ran = ended(run.env("KEY", KEY).env("OPENAI_API_KEY", KEY).env("ANTHROPIC_API_KEY", KEY).output().unwrap());
    assert_eq!(ran.code, 0, "{ran:#?}");
    assert!(ran.said().contains("THE END") && !ran.said().contains(KEY), "{ran:#?}");
    assert_eq!(denied(&ran), [("refund".to_owned(), "tool.precondition".to_owned())], "{ran:#?}");
    assert_eq!(outcomes(&ran), ["applied"; 6], "{ran:#?}");
}

fn hello_with_openai(world: &World, sandbox: &str) {
    hello_with(world, &["openai"], &behind(world, "api.openai.com", "shop"), sandbox);
    world.nobody_is_left();
}

fn hello_with_anthropic(world: &World, sandbox: &str) {
    hello_with(world, &["anthropic"], &behind(world, "api.anthropic.com", "shop"), sandbox);
    world.nobody_is_left();
}

/// Checks a model server of the user's own, which runs already and needs no credential.
fn hello_with_a_server(world: &World, sandbox: &str) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let [python, script] = storyteller();
    let mut server = Command::new(python).args([&script, "shop"]).env("PORT", port.to_string()).spawn().unwrap();
    let asked = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(asked.elapsed() < Duration::from_secs(60), "{:?}", server.try_wait());
        std::thread::sleep(Duration::from_millis(50));
    }
    hello_with(world, &[&format!("http://localhost:{port}/v1"), "--model-name", "qwen3:8b"], &[], sandbox);
    server.kill().unwrap();
    server.wait().unwrap();
    world.nobody_is_left();
}

/// Returns the command of the scripted model: a Python with the packages that it needs, and the script.
fn storyteller() -> [String; 2] {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/laptop/models.py");
    [std::env::var("BELAY_WORLD_PYTHON").unwrap(), script.display().to_string()]
}

/// Returns the options that put a script behind a model's real host name.
fn behind(world: &World, host: &str, story: &str) -> Vec<String> {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed([host.to_owned()]).unwrap();
    let tls = world.task().parent().unwrap().join("tls");
    fs::create_dir_all(&tls).unwrap();
    fs::write(tls.join("crt.pem"), cert.pem()).unwrap();
    fs::write(tls.join("key.pem"), signing_key.serialize_pem()).unwrap();
    let [python, script] = storyteller();
    let model = format!("{host}=exec {python} {script} {story} {0}/crt.pem {0}/key.pem", tls.display());
    vec!["--upstream".to_owned(), model, "--upstream-ca".to_owned(), tls.join("crt.pem").display().to_string()]
}

/// Checks that an error of an upstream's command is reported, and that a killed run leaves no process of the command behind.
fn servers(world: &World, sandbox: &str) {
    let said = |upstream: &str| {
        let args = ["run", "task.yaml", "--sandbox", sandbox, "--upstream", upstream];
        let output = world.belay(&args).stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    world.agent("say('never')", "");
    let broken = said("tools.test=echo what a pity >&2; exit 3");
    assert!(broken.contains("has ended (exit status: 3)") && broken.contains("what a pity"), "{broken}");
    assert!(said("tools.test").contains("expected HOST=COMMAND"), "a value without a command");

    fs::copy(examples().join("hello/standin.py"), world.task().join("standin.py")).unwrap();
    world.agent("say('begun')\ntime.sleep(300)", "");
    let args = ["run", "task.yaml", "--sandbox", sandbox, "--output", "json", "--upstream", SHOP];
    let mut child = world.belay(&args).spawn().unwrap();
    until(&mut child, "begun");
    child.kill().unwrap();
    child.wait().unwrap();
    world.nobody_is_left();
}

/// Runs an example as its README says, but with a scripted model.
fn example(world: &World, name: &str, sandbox: &str) -> Ran {
    let folder = world.task();
    for entry in fs::read_dir(examples().join(name)).unwrap().map(|entry| entry.unwrap().path()) {
        fs::copy(&entry, folder.join(entry.file_name().unwrap())).unwrap();
    }
    // The virtual environment is created once, in another folder. The link leads there, and `--ro` shows that folder in the sandbox.
    let environments = PathBuf::from(std::env::var("BELAY_EXAMPLES").unwrap());
    let mut more = Vec::new();
    if let Ok(environment) = environments.join(name).canonicalize() {
        std::os::unix::fs::symlink(&environment, folder.join(".venv")).unwrap();
        more = vec!["--ro".to_owned(), environment.display().to_string()];
    }
    let host = if name == "claude" { "api.anthropic.com" } else { "api.openai.com" };
    let model = behind(world, host, if name == "shell" { "shell" } else { "shop" });
    let examples = examples();
    let shop = format!("shop.test=exec python3 {}/hello/standin.py", examples.display());
    let credential = if name == "claude" { "anthropic/token=env:KEY" } else { "openai/token=env:KEY" };
    let path = |relative: &str| examples.join(relative).display().to_string();
    let mut command = world.belay(&["run", "task.yaml", "--sandbox", sandbox, "--output", "json"]);
    command.args(["--contracts", &path("hello/contracts.yaml"), "--packs", &path("policy-pack.yaml")]);
    command.args(["--upstream", &shop, "--credential", credential]).args(model).args(more).env("KEY", KEY);
    let ran = ended(command.output().unwrap());
    assert_eq!(ran.code, 0, "{ran:#?}");
    // A46: the model got the credential, and the agent did not.
    assert!(ran.said().contains("THE END") && !ran.said().contains(KEY), "{ran:#?}");
    let tasks = world.state().join("belay/evidence/default").join(name);
    let log = fs::read_dir(tasks).unwrap().next().unwrap().unwrap().path();
    world.is_valid(&log);
    assert!(!String::from_utf8_lossy(&world.all_that_is_kept()).contains(KEY));
    world.nobody_is_left();
    ran
}

/// Checks that the agent reads, that a refund that is too large is denied, and that an allowed refund is made.
fn support(world: &World, name: &str, sandbox: &str) {
    let ran = example(world, name, sandbox);
    assert_eq!(denied(&ran), [("refund".to_owned(), "tool.precondition".to_owned())], "{ran:#?}");
    // These are four model calls, one read and one refund.
    let applied = outcomes(&ran).iter().filter(|effect| *effect == "applied").count();
    assert_eq!(applied, 6, "{ran:#?}");
    let read = ran.records("call.intent").iter().filter(|one| one["target"] == json!("refund")).count();
    assert_eq!(read, 1, "{ran:#?}");
}

/// Checks that the agent runs the commands of the script, and that the sandbox and the rules hold.
fn shell(world: &World, sandbox: &str) {
    let ran = example(world, "shell", sandbox);
    let said = ran.said();
    for wall in ["Read-only file system", "all walls hold", "1000\nLinux"] {
        assert!(said.contains(wall), "{wall}: {said}");
    }
    assert!(
        said.contains("Couldn't connect") || said.contains("Failed to connect") || said.contains("unreachable"),
        "{said}"
    );
    assert_eq!(denied(&ran), [("example.com:443".to_owned(), "egress.host".to_owned())], "{ran:#?}");
}

with_both! {
    hello_story => hello;
    hello_openai => hello_with_openai;
    hello_anthropic => hello_with_anthropic;
    hello_server => hello_with_a_server;
    servers_story => servers;
    openai_agents => |world: &World, sandbox: &str| support(world, "openai-agents", sandbox);
    langgraph => |world: &World, sandbox: &str| support(world, "langgraph", sandbox);
    claude => |world: &World, sandbox: &str| support(world, "claude", sandbox);
    a_shell => shell;
}
