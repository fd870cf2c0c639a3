//! Completion of `kubectl belay`: the real kubectl calls the completion of its plugin.

use std::{fs, os::unix::fs::PermissionsExt, process::Command};

#[test]
fn kubectl_completes_its_plugin() {
    let folder = tempfile::tempdir().unwrap();
    let (plugin, completes) = (folder.path().join("kubectl-belay"), folder.path().join("kubectl_complete-belay"));
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_belay"), &plugin).unwrap();
    let script = Command::new(&plugin).args(["completion", "kubectl"]).output().unwrap().stdout;
    fs::write(&completes, script).unwrap();
    fs::set_permissions(&completes, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    let ask = |words: &[&str]| {
        let output =
            Command::new("kubectl").args([&["__complete", "belay"], words].concat()).env("PATH", &path).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    assert_eq!(ask(&["ver"]), "verify\n:4\n");
    assert_eq!(ask(&["run", "--sandbox", ""]), "auto\nrunsc\nbwrap\n:4\n");
    assert_eq!(ask(&["watch", "tidy", "--name"]), "--namespace\n:4\n");
}
