use std::os::unix::fs::symlink;

use super::*;

fn program(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A machine where a user has a Python of their own, and a folder of a task.
fn machine(folder: &Path) -> Shown {
    let at = |path: &str| folder.join(path);
    program(&at("usr/bin/python3"), "\x7fELF");
    program(&at("usr/bin/env"), "\x7fELF");
    program(&at("home/me/.pyenv/bin/python3.13"), "\x7fELF");
    symlink("usr/bin", at("bin")).unwrap();
    let task = at("task");
    fs::create_dir_all(task.join(".venv/bin")).unwrap();
    fs::create_dir_all(task.join("theirs/bin")).unwrap();
    symlink("/usr/bin/python3", task.join(".venv/bin/python")).unwrap();
    symlink("python", task.join(".venv/bin/python3")).unwrap();
    symlink(at("home/me/.pyenv/bin/python3.13"), task.join("theirs/bin/python")).unwrap();
    symlink("/usr/bin/gone", task.join("gone")).unwrap();
    symlink("round", task.join("round")).unwrap();
    program(&task.join("script"), "#!/usr/bin/env -S python3 -u\n");
    program(&task.join("direct"), "#!/workspace/.venv/bin/python\n");
    program(&task.join("moved"), &format!("#!{}/.venv/bin/python\n", task.display()));
    program(&task.join("unknown"), "#!/usr/bin/env pyhton3\n");
    fs::write(task.join("agent.py"), "print()").unwrap();
    Shown {
        binds: vec![("/usr".into(), at("usr")), ("/bin".into(), at("bin")), ("/workspace".into(), task)],
        unknown: vec!["/facts".into()],
        cwd: "/workspace".into(),
        path: "/usr/local/bin:/usr/bin:/bin".to_owned(),
    }
}

#[test]
fn a_program_is_looked_for_as_the_sandbox_sees_it() {
    let folder = tempfile::tempdir().unwrap();
    let folder = fs::canonicalize(folder.path()).unwrap();
    let shown = machine(&folder);
    for good in [
        "python3",
        "/usr/bin/python3",
        "/bin/python3",
        ".venv/bin/python",
        ".venv/bin/python3",
        "./.venv/../.venv/bin/python",
        "/workspace/.venv/bin/python",
        "script",
        "./script",
        "./direct",
        "/facts/run",
    ] {
        // A bare name is looked up on PATH, where the script is not.
        let said = shown.wrong(good);
        assert_eq!(said.is_none(), good != "script", "{good}: {said:?}");
    }
    for (bad, words) in [
        ("pyhton3", ["`pyhton3`", "in none of", "/usr/local/bin:/usr/bin:/bin"]),
        ("./missing", ["`./missing`", "nothing at /workspace/missing", "on this machine"]),
        (".venv/bin/pythn", ["`.venv/bin/pythn`", "nothing at", "/workspace/.venv/bin/pythn"]),
        (
            "theirs/bin/python",
            ["a link to ", "home/me/.pyenv/bin/python3.13, which the sandbox does not show", "add --ro "],
        ),
        ("/opt/agent/run", ["/opt/agent/run", "does not show", "add --ro /opt/agent"]),
        ("/home/me/.pyenv/bin/python3.13", ["does not show", "add --ro", "/home/me/.pyenv"]),
        ("./gone", ["a link to", "/usr/bin/gone", "nothing is"]),
        ("./round", ["`./round`", "a link", "in a circle"]),
        ("./agent.py", ["`./agent.py`", "chmod +x", "without the right"]),
        ("./", ["`./`", "a", "folder"]),
        ("./moved", ["`./moved`, a script", ".venv/bin/python", "does not show"]),
        ("./unknown", ["`./unknown`, a script", "`pyhton3`", "in none of"]),
    ] {
        let said = shown.wrong(bad).unwrap_or_else(|| panic!("{bad} passes"));
        assert!(words.iter().all(|word| said.contains(word)), "{bad}: {said}");
    }
    // The advice names the end of the link, and the parent of its `bin` folder.
    let advice = format!("add --ro {}/home/me/.pyenv", folder.display());
    let said = shown.wrong("theirs/bin/python").unwrap();
    assert!(said.contains(&advice) && said.ends_with("/usr/bin/python3 -m venv"), "{said}");
    let mut with = shown;
    with.binds.push((folder.join("home/me/.pyenv"), folder.join("home/me/.pyenv")));
    assert_eq!(with.wrong("theirs/bin/python"), None);
}
