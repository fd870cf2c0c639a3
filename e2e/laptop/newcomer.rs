//! Obstacles of new users on the way from a clone to an agent of their own: each is reported before the run, with what to do, or does not
//! exist any more.

use std::{fs, os::unix::fs::symlink};

use crate::world::{self, UPSTREAM, World, ended, once};

/// Returns the error output of a run that must not start.
fn said(world: &World, more: &[&str]) -> String {
    let resolve = format!("tools.test={UPSTREAM}");
    let args = [&["run", "task.yaml", "--sandbox", "bwrap", "--resolve", &resolve][..], more].concat();
    let output = world.belay(&args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}{}", String::from_utf8_lossy(&output.stdout));
    assert!(!world.state().join("belay/evidence/default").exists(), "something ran: {said}");
    said
}

#[test]
fn mistakes_are_said_before_the_run() {
    once(|world| {
        let with = |command: &str| {
            world.agent("", "");
            world.write("task.yaml", &world::task().replace("command: [python3, -B, agent.py]", command));
        };
        let says = |more: &[&str], words: &[&str]| {
            let said = said(world, more);
            assert!(words.iter().all(|word| said.contains(word)), "expected {words:?} in {said}");
        };
        // Hosts that no class lists.
        with("command: [python3, -B, agent.py]");
        says(&["--resolve", "tols.test=127.0.0.1:1"], &["--resolve tols.test", "tools.test", "keyed.test"]);
        says(&["--upstream", "shop.test=exit 1"], &["--upstream shop.test", "class `small`"]);
        // Commands that do not exist in the sandbox.
        with("command: [pyhton3, agent.py]");
        says(&[], &["spec.agent.command", "`pyhton3`", "/usr/bin"]);
        with("command: [.venv/bin/python, agent.py]");
        says(&[], &[".venv/bin/python", "/workspace/.venv", "nothing at"]);
        let elsewhere = tempfile::tempdir().unwrap();
        let python = elsewhere.path().join("pyenv/bin/python3");
        fs::create_dir_all(python.parent().unwrap()).unwrap();
        fs::copy("/usr/bin/python3", &python).unwrap();
        fs::create_dir_all(world.task().join(".venv/bin")).unwrap();
        symlink(&python, world.task().join(".venv/bin/python")).unwrap();
        let root = elsewhere.path().join("pyenv");
        says(&[], &["a link to", python.to_str().unwrap(), "does not show", &format!("--ro {}", root.display())]);
        // The run succeeds with the option that the message names.
        let resolve = format!("tools.test={UPSTREAM}");
        let shown = ["--resolve", &resolve, "--ro", root.to_str().unwrap()];
        let args = [&["run", "task.yaml", "-o", "json", "--sandbox", "bwrap"][..], &shown].concat();
        let ran = ended(world.belay(&args).output().unwrap());
        assert_eq!(ran.code, 0, "{ran:#?}");
    });
}

/// A server on this machine that needs a credential and has no TLS, as vLLM and LiteLLM are started: the server gets the credential, and
/// the agent does not. A server on another machine gets nothing, and the message names the place in the pack.
fn keys_in_the_clear(world: &World, sandbox: &str) {
    let pack = fs::read_to_string(world.task().join("pack.yaml")).unwrap();
    let keyed = "        - host: tools.test\n          ports: [80]\n          uses: [Tools]\n          credentials: [{secret: tools-key, key: token}]\n";
    let plain = "        - host: tools.test\n          ports: [80]\n          uses: [Tools]\n";
    world.write("pack.yaml", &pack.replace(plain, keyed));
    world.agent("say(call('greet', name='you'))", "");
    let refused = world.belay(&["run", "task.yaml", "--resolve", "tools.test=192.0.2.9:80"]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    for word in ["pack.yaml:", "egress[0].credentials", "https", "--resolve tools.test=127.0.0.1"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    let ran = world.run(sandbox, &["--credential", "other/key=file:contracts.yaml"]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    assert!(ran.stderr.contains("--credential other/key: nothing uses it"), "{ran:#?}");
    let asked = world.asked.lock().unwrap().clone();
    assert!(
        matches!(asked.as_slice(), [(_, path, key)] if path == "/greet/you" && key.contains("sesame")),
        "{asked:?}"
    );
    assert!(!ran.said().contains("sesame"), "{ran:#?}");
    world.is_valid(&world.log());
    world.nobody_is_left();
}

/// Checks that the run's output says why a call was not made, what is special about the agent's folder, and has the agent's lines in order.
fn what_is_shown(world: &World, sandbox: &str) {
    world.agent(
        "print('before'); print(call('greet', name='you')); print('after', os.getcwd())",
        "  workspace: {writeScopes: [{path: /workspace/out, size: 1Mi}]}\n",
    );
    let output = world.belay(&["run", "task.yaml", "--sandbox", sandbox]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let at = |text: &str| said.find(text).unwrap_or_else(|| panic!("expected {text} in {said}"));
    assert!(at("the task's folder is /task for the agent") < at("before"), "{said}");
    assert!(said.contains("/workspace/out ends with the run"), "{said}");
    let why = at("cannot resolve tools.test: ");
    assert!(at("before") < why && why < at("after /task"), "{said}");
    assert!(said.contains("--resolve tools.test=ADDRESS") && !said.contains("Query {"), "{said}");
    assert!(said.contains("Belay could not make this call. rule: upstream.resolve."), "{said}");
    world.nobody_is_left();
}

with_both! {
    keys => keys_in_the_clear;
    shown => what_is_shown;
}
