//! Mistakes of new users: each gets one message that says what is wrong, where, and what to do. Nothing runs.

use crate::world::{self, World, once};

/// Returns the error output of a command that must exit with 2.
fn message(world: &World, args: &[&str], path: Option<&str>) -> String {
    let mut command = world.belay(args);
    if let Some(path) = path {
        command.env("PATH", path);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}{}", String::from_utf8_lossy(&output.stdout));
    said
}

#[test]
fn each_gets_one_message_that_says_what_to_do() {
    once(|world| {
        let task = world::task();
        let run = ["run", "task.yaml", "--sandbox", "bwrap"];
        let with = |change: &[(&str, &str)]| {
            world.agent("", "");
            world.write("task.yaml", &change.iter().fold(task.to_owned(), |text, (from, to)| text.replace(from, to)));
        };
        let said = |args: &[&str], expected: &[&str]| {
            let said = message(world, args, None);
            for expected in expected {
                assert!(said.contains(expected), "expected {expected} in {said}");
            }
            let errors = said.lines().filter(|line| line.starts_with("error: ")).count();
            assert_eq!(errors, 1, "expected one message, found {said}");
        };
        with(&[]);
        said(&["run", "tsak.yaml"], &["tsak.yaml", "No such file"]);
        said(&["run", "."], &["expected the file of an AgentTask, found a folder", "task.yaml"]);
        said(&["run", "contracts.yaml"], &["expected one AgentTask, found 0"]);
        said(&["run", "task.yaml", "--packs", "contracts.yaml"], &["expected a PolicyPack", "--packs"]);
        said(&["run", "task.yaml", "--pack", "prod"], &["PolicyPack `prod`", "found laptop"]);
        said(
            &["run", "task.yaml", "--credential", "tools-key/token=env:NO_SUCH_VARIABLE"],
            &["NO_SUCH_VARIABLE", "set it"],
        );
        said(&["run", "task.yaml", "--root", "no-such-folder"], &["expected a folder", "no-such-folder"]);
        said(&["run", "task.yaml", "--workspace", "task.yaml"], &["expected a folder", "task.yaml"]);
        with(&[("objective:", "objektive:")]);
        // Two lines for two errors: the field that is missing, and the unknown field in its place.
        let both = message(world, &run, None);
        assert!(both.contains("`objektive`; write `objective`"), "{both}");
        assert_eq!(both.lines().filter(|line| line.starts_with("error: task.yaml:")).count(), 2, "{both}");
        with(&[("command: [python3, -B, agent.py]", "args: []")]);
        said(&run, &["spec.agent.command", "command: [python3, agent.py]"]);
        with(&[("tools: [greet, refund]", "tools: [greet, refnud]")]);
        said(&run, &["task.yaml:", "refnud"]);
        with(&[("workflowClass: small", "workflowClass: large")]);
        said(&run, &["task.yaml:", "spec.workflowClass", "`small`"]);
        with(&[("toolCalls: 5", "toolCalls: 5000")]);
        said(&run, &["task.yaml:", "spec.limits.toolCalls", "20"]);
        with(&[("    image: none\n", "")]);
        said(&run, &["task.yaml:", "image"]);
        with(&[("metadata: {name: hello}", "metadata: {name: hello")]);
        said(&run, &["task.yaml:"]);

        // A credential that the pack's class names is missing.
        with(&[]);
        let pack = std::fs::read_to_string(world.task().join("pack.yaml")).unwrap();
        world.write("pack.yaml", pack.split("---").next().unwrap());
        said(&run, &["keyed.test", "--credential tools-key/token=env:"]);
        world.write("pack.yaml", &pack);

        // No sandbox is installed, and there is no way to run without one.
        let folder = tempfile::tempdir().unwrap();
        for tool in ["unshare", "nsenter", "prlimit", "setpriv"] {
            std::os::unix::fs::symlink(format!("/usr/bin/{tool}"), folder.path().join(tool)).unwrap();
        }
        let none = message(world, &["run", "task.yaml"], Some(folder.path().to_str().unwrap()));
        assert!(none.contains("apt-get install bubblewrap") && none.contains("gvisor.dev"), "{none}");
        let nothing = message(world, &["run", "task.yaml"], Some("/nonexistent"));
        assert!(nothing.contains("util-linux"), "{nothing}");

        // Others could read the witness's key.
        assert_eq!(world.run("bwrap", &[]).code, 0);
        world::run("chmod", &["644", world.state().join("belay/witness.pk8").to_str().unwrap()]);
        said(&run, &["witness.pk8", "0600"]);
        assert!(world.asked.lock().unwrap().is_empty());
    });
}
