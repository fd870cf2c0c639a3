//! Options of `belay run`: other folders, and a user who is not root.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::PathBuf,
    process::Command,
};

use crate::world::{self, World, ended};

/// The UID of an ordinary user.
const SOMEBODY: u32 = 1000;

/// Checks that named folders are at their places and read-only, without the files that only Belay may read.
fn other_folders(world: &World, sandbox: &str) {
    let folder = |name: &str| {
        let path = world.task().parent().unwrap().join(name);
        fs::create_dir_all(&path).unwrap();
        fs::canonicalize(path).unwrap()
    };
    let (data, own) = (folder("data"), folder("own"));
    fs::write(data.join("facts"), "42").unwrap();
    fs::write(data.join("key"), "sesame-opens-nothing-else").unwrap();
    // Belay's state folder is below a folder that the agent sees.
    let state = data.join("state");
    let python = format!(
        r#"
for path in ("{data}/facts", "{data}/key", "{data}/state/belay/witness.pk8", "/workspace/task.yaml", "/workspace/notes"):
    try: say(f"{{path}}: {{open(path).read()!r}}")
    except OSError as error: say(f"{{path}}: ''")
for path in ("{data}/facts", "{data}/more", "/workspace/notes", "/tmp/more"):
    try: open(path, "w"); say("written")
    except OSError: say("not written")
"#,
        data = data.display()
    );
    world.agent(&python, "");
    fs::rename(world.task().join("agent.py"), own.join("agent.py")).unwrap();
    fs::write(own.join("notes"), "mine").unwrap();
    let key = format!("tools-key/token=file:{}", data.join("key").display());
    let (data, own) = (data.to_str().unwrap(), own.to_str().unwrap());
    let args = [
        "run",
        "task.yaml",
        "--output",
        "json",
        "--sandbox",
        sandbox,
        "--ro",
        data,
        "--workspace",
        own,
        "--credential",
        &key,
    ];
    let mut command = world.belay(&args);
    // The run uses no bucket, so the endpoint of the user's buckets does not matter.
    command.env("XDG_STATE_HOME", &state).env("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9");
    let ran = ended(command.output().unwrap());
    assert_eq!(ran.code, 0, "{ran:#?}");
    // Hidden files are empty or cannot be read.
    let expected = format!(
        "{data}/facts: '42'\n{data}/key: ''\n{data}/state/belay/witness.pk8: ''\n\
         /workspace/task.yaml: ''\n/workspace/notes: 'mine'\n{}",
        "not written\n".repeat(4)
    );
    assert_eq!(ran.said(), expected, "{ran:#?}");
    assert!(state.join("belay/witness.pk8").is_file(), "there was nothing to hide");
    world.is_valid(&PathBuf::from(ran.last()["evidence"].as_str().unwrap()));
}

/// Checks that a user without privileges gets the same isolation and the same log.
fn as_a_user(world: &World, sandbox: &str) {
    let top = world.task().parent().unwrap().to_owned();
    fs::set_permissions(&top, fs::Permissions::from_mode(0o755)).unwrap();
    // The test's programs are in folders that the user cannot read, so they are copied.
    let bin = top.join("bin");
    fs::create_dir(&bin).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_belay"), bin.join("belay")).unwrap();
    let found = Command::new("sh").args(["-c", &format!("command -v {sandbox}")]).output().unwrap();
    fs::copy(String::from_utf8(found.stdout).unwrap().trim(), bin.join(sandbox)).unwrap();
    fs::create_dir(world.state()).unwrap();
    chown(world.state(), Some(SOMEBODY), Some(SOMEBODY)).unwrap();
    world.agent(
        "say(call('greet', name='you'))\nopen('/out/file', 'w').write('x')\nsay(os.getuid())",
        "  workspace: {writeScopes: [{path: /out, size: 1Mi}]}\n",
    );
    let output = Command::new("setpriv")
        .args([
            &format!("--reuid={SOMEBODY}"),
            &format!("--regid={SOMEBODY}"),
            "--clear-groups",
            "--inh-caps=-all",
            "--bounding-set=-all",
            "--",
        ])
        .arg(bin.join("belay"))
        .args([
            "run",
            "task.yaml",
            "--output",
            "json",
            "--sandbox",
            sandbox,
            "--resolve",
            &format!("tools.test={}", world::UPSTREAM),
        ])
        .current_dir(world.task())
        .env("XDG_STATE_HOME", world.state())
        .env("PATH", format!("{}:/usr/bin:/bin", bin.display()))
        .output()
        .unwrap();
    let ran = ended(output);
    assert_eq!(ran.code, 0, "{ran:#?}");
    assert!(ran.said().contains("/greet/you") && ran.said().ends_with("1000\n"), "{ran:#?}");
    let key = fs::metadata(world.state().join("belay/witness.pk8")).unwrap();
    assert_eq!((key.uid(), key.permissions().mode() & 0o777), (SOMEBODY, 0o600));
    world.is_valid(&world.log());
    world.nobody_is_left();
}

with_both! {
    folders => other_folders;
    a_user => as_a_user;
}
