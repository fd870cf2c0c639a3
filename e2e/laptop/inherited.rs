//! What a sandbox inherits from the caller of `belay run`, and where sockets and files in the folders that it sees lead: only to what is
//! declared.
//!
//! Each story has a control: the same agent in a plain bubblewrap gets what it must not get.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    net::TcpListener,
    os::unix::{
        fs::{PermissionsExt, chown, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use crate::world::{self, Ran, World, ended, until};

/// The program of a caller with many descriptors and settings of its own.
const CALLER: &str = include_str!("inherited.py");
const SERVICE: &str = "127.0.0.1:7801";

/// Writes a task with much time, because these tests do not depend on the speed of the machine.
fn agent(world: &World, python: &str, more: &str) {
    world.agent(python, more);
    change(world, "wallTimeSeconds: 30", "wallTimeSeconds: 300");
}

/// Adds arguments to the agent's command.
fn told(world: &World, arguments: &str) {
    change(world, "agent.py]", &format!("agent.py, {arguments}]"));
}

fn change(world: &World, from: &str, to: &str) {
    let task = fs::read_to_string(world.task().join("task.yaml")).unwrap();
    assert!(task.contains(from), "{task}");
    world.write("task.yaml", &task.replace(from, to));
}

/// Starts a service on the machine's loopback that writes to every connection.
fn service() {
    let listener = TcpListener::bind(SERVICE).unwrap();
    std::thread::spawn(move || {
        let mut all = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            stream.write_all(b"the machine's own").unwrap();
            all.push(stream);
        }
    });
}

/// Runs a command by the caller [`CALLER`].
fn called(world: &World, command: &[&str]) -> Output {
    let file = world.task().parent().unwrap().join("bashrc");
    fs::write(&file, "theirs").unwrap();
    Command::new("python3")
        .args(["-c", CALLER])
        .args(command)
        .current_dir(world.task())
        .envs([("SERVICE", SERVICE), ("SECRET_OF_THE_CALLER", "sesame"), ("USER", "carol")])
        .env("HOME_FILE", &file)
        .env("XDG_STATE_HOME", world.state())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Returns the command of a plain bubblewrap, as people use it: the control.
fn plain(world: &World, binds: &[&str]) -> Vec<String> {
    let task = world.task().display().to_string();
    let mut all: Vec<String> = [
        "bwrap",
        "--unshare-all",
        "--ro-bind",
        "/usr",
        "/usr",
        "--symlink",
        "usr/bin",
        "/bin",
        "--symlink",
        "usr/lib",
        "/lib",
        "--symlink",
        "usr/lib64",
        "/lib64",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--ro-bind",
        &task,
        "/workspace",
    ]
    .map(str::to_owned)
    .to_vec();
    all.extend(binds.iter().map(|one| (*one).to_owned()));
    all.extend(["--chdir", "/workspace", "/usr/bin/python3", "-B", "agent.py"].map(str::to_owned));
    all
}

fn run_by(world: &World, sandbox: &str) -> Ran {
    ended(called(world, &[env!("CARGO_BIN_EXE_belay"), "run", "task.yaml", "--output", "json", "--sandbox", sandbox]))
}

/// An agent that prints what it has inherited from the caller.
const LOOKS: &str = r#"
import array, fcntl, resource, signal, socket
found = []
for fd in sorted(int(name) for name in os.listdir("/proc/self/fd")):
    try: of = os.readlink(f"/proc/self/fd/{fd}")
    except OSError: continue
    if fd > 2: found.append(f"descriptor {fd} {of}")
    elif of.startswith("socket") or "pts" in of: found.append(f"standard {fd} {of}")
    if fd > 2:
        try: found.append("file " + os.read(os.open("etc/passwd", os.O_RDONLY, dir_fd=fd), 4).decode())
        except OSError: pass
        try:
            s = socket.socket(fileno=os.dup(fd)); s.settimeout(1)
            data, rights, _, _ = s.recvmsg(64, 64)
            found.append(f"received {data} {len(rights)}")
        except OSError: pass
for name in ("SECRET_OF_THE_CALLER", "XDG_STATE_HOME", "HOME_FILE"):
    if name in os.environ: found.append(f"variable {name}")
status = dict(line.split(":\t", 1) for line in open("/proc/self/status") if ":\t" in line)
for name in ("SigIgn", "SigBlk"):
    # Python itself ignores SIGPIPE and SIGXFSZ; two are the C library's own.
    mask = int(status.get(name, "0"), 16) & ~(1 << 12 | 1 << 24 | 3 << 31)
    if mask: found.append(f"signals {name} {mask:x}")
mask = os.umask(0); os.umask(mask)
if mask != 0o022: found.append(f"umask {mask:o}")
if resource.getrlimit(resource.RLIMIT_RTPRIO) != (0, 0) and os.uname().version.find("gVisor") < 0: found.append("limit RTPRIO")
try:
    if int(open("/proc/self/oom_score_adj").read()) < 0: found.append("charm")
except OSError: pass
try: open("/dev/tty"); found.append("terminal")
except OSError: pass
try:
    if open("/proc/keys").read(): found.append("keys")
except OSError: pass
say("found " + json.dumps(found))
"#;

fn found(said: &str) -> Vec<String> {
    let line =
        said.lines().find_map(|line| line.strip_prefix("found ")).unwrap_or_else(|| panic!("it did not look: {said}"));
    serde_json::from_str(line).unwrap()
}

#[test]
fn the_control_has_what_its_caller_has() {
    world::once(|world| {
        service();
        agent(world, LOOKS, "");
        let command = plain(world, &[]);
        let output = called(world, &command.iter().map(String::as_str).collect::<Vec<_>>());
        let all = found(&String::from_utf8_lossy(&output.stdout)).join("\n");
        for expected in [
            "descriptor 9 /",
            "descriptor 12 /etc",
            "descriptor 20 socket:",
            "descriptor 30 ",
            "descriptor 100 pipe:",
            "bashrc",
            "[eventfd]",
            "[eventpoll]",
            "[pidfd]",
            "memfd:secret",
            "descriptor 300 socket:",
            "descriptor 900 ",
            "file root",
            "received b\"the machine's own\"",
            "received b'x' 1",
            "standard 0 socket:",
            "variable SECRET_OF_THE_CALLER",
            "signals SigIgn",
            "signals SigBlk",
            "umask 77",
        ] {
            assert!(all.contains(expected), "expected {expected} in:\n{all}");
        }
        // These depend on the machine: whether it allows a real-time priority, and a lower OOM score.
        let may = |program: &str, args: &[&str]| {
            Command::new(program).args(args).output().is_ok_and(|ran| ran.status.success())
        };
        for (may, expected) in [
            (may("prlimit", &["--rtprio=95:95", "true"]), "limit RTPRIO"),
            (may("choom", &["-n", "-900", "--", "true"]), "charm"),
        ] {
            assert_eq!(all.contains(expected), may, "{expected} in:\n{all}");
        }
    });
}

fn nothing_of_the_callers(world: &World, sandbox: &str) {
    service();
    agent(world, LOOKS, "");
    let ran = run_by(world, sandbox);
    assert_eq!(ran.code, 0, "{ran:#?}");
    assert_eq!(found(&ran.said()), Vec::<String>::new(), "{sandbox}");
    world.is_valid(&world.log());
    world.nobody_is_left();
}

/// The same for a user who is not root, with programs in a folder of the user.
fn nothing_of_a_users(world: &World, sandbox: &str) {
    const SOMEBODY: u32 = 1000;
    service();
    agent(world, LOOKS, "");
    let top = world.task().parent().unwrap().to_owned();
    let bin = top.join("bin");
    fs::create_dir_all(&bin).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_belay"), bin.join("belay")).unwrap();
    let found_at = Command::new("sh").args(["-c", &format!("command -v {sandbox}")]).output().unwrap();
    fs::copy(String::from_utf8(found_at.stdout).unwrap().trim(), bin.join(sandbox)).unwrap();
    fs::set_permissions(&top, fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(world.state()).unwrap();
    chown(world.state(), Some(SOMEBODY), Some(SOMEBODY)).unwrap();
    fs::write(top.join("bashrc"), "theirs").unwrap();
    chown(top.join("bashrc"), Some(SOMEBODY), Some(SOMEBODY)).unwrap();
    let output = Command::new("setpriv")
        .args([
            &format!("--reuid={SOMEBODY}"),
            &format!("--regid={SOMEBODY}"),
            "--clear-groups",
            "--bounding-set=-all",
            "--",
        ])
        .args(["python3", "-c", CALLER])
        .arg(bin.join("belay"))
        .args(["run", "task.yaml", "--output", "json", "--sandbox", sandbox])
        .current_dir(world.task())
        .envs([("SERVICE", SERVICE), ("SECRET_OF_THE_CALLER", "sesame")])
        .env("HOME_FILE", top.join("bashrc"))
        .env("XDG_STATE_HOME", world.state())
        .env("PATH", format!("{}:/usr/bin:/bin", bin.display()))
        .output()
        .unwrap();
    let ran = ended(output);
    assert_eq!(ran.code, 0, "{ran:#?}");
    assert_eq!(found(&ran.said()), Vec::<String>::new(), "{sandbox}");
    world.nobody_is_left();
}

/// The command of an upstream runs with the user's rights, but inherits no descriptor of the caller.
#[test]
fn a_server_of_the_users_own_has_no_descriptor_of_the_callers() {
    world::once(|world| {
        service();
        agent(world, "say('ended')", "");
        let server = "\
import os, socket
fds = [os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd') if int(fd) > 2 and os.path.islink(f'/proc/self/fd/{fd}')]
open('seen', 'w').write('\\n'.join(fds))
s = socket.create_server(('127.0.0.1', int(os.environ['PORT'])))
while True: s.accept()
";
        world.write("server.py", server);
        let belay = env!("CARGO_BIN_EXE_belay");
        let output = called(
            world,
            &[
                belay,
                "run",
                "task.yaml",
                "-o",
                "json",
                "--sandbox",
                "bwrap",
                "--upstream",
                "tools.test=python3 server.py",
            ],
        );
        assert_eq!(ended(output).code, 0);
        assert_eq!(fs::read_to_string(world.task().join("seen")).unwrap(), "");
    });
}

/// An agent that looks for two seconds for sockets, FIFOs, devices and locks in the folders that it sees.
const REACHES: &str = r#"
import fcntl, socket, stat
found = set()
def look():
    for top in sys.argv[1:]:
        for folder, _, names in os.walk(top):
            os.chdir(folder)
            for name in names:
                try: mode = os.lstat(name).st_mode
                except OSError: continue
                if stat.S_ISSOCK(mode):
                    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
                        with socket.socket(socket.AF_UNIX, kind) as s:
                            try: s.connect(name); found.add(f"socket {name}")
                            except OSError: pass
                elif stat.S_ISFIFO(mode):
                    for flag in (os.O_WRONLY, os.O_RDONLY):
                        fd = -1
                        try:
                            fd = os.open(name, flag | os.O_NONBLOCK)
                            if flag == os.O_WRONLY: os.write(fd, b"x"); found.add(f"written {name}")
                            elif os.read(fd, 9): found.add(f"read {name}")
                        except OSError: pass
                        finally:
                            if fd >= 0: os.close(fd)
                elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                    try:
                        with open(name, "rb") as file: file.read(1); found.add(f"device {name}")
                    except OSError: pass
                elif name == "lock":
                    with open(name) as file:
                        try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        except OSError: found.add(f"lock {name}")
say("looking")
for _ in range(40):
    look(); time.sleep(0.05)
say("found " + json.dumps(sorted(found)))
"#;

/// Creates sockets, a FIFO and a device of the machine in a folder, and returns what keeps them open.
fn ends(folder: &Path, when: &str) -> Vec<Box<dyn std::any::Any>> {
    fs::create_dir_all(folder).unwrap();
    let socket = UnixListener::bind(folder.join(format!("socket-{when}"))).unwrap();
    let datagrams = std::os::unix::net::UnixDatagram::bind(folder.join(format!("datagrams-{when}"))).unwrap();
    let fifo = folder.join(format!("fifo-{when}"));
    world::run("mkfifo", &["-m", "666", fifo.to_str().unwrap()]);
    let mut held = OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    held.write_all(b"the machine's").unwrap();
    let device = folder.join(format!("device-{when}"));
    // Only root can create devices, so this may fail.
    let _ = Command::new("mknod").args(["-m", "666"]).arg(&device).args(["c", "1", "5"]).output().unwrap();
    // Everybody may use them, so that only the sandbox keeps the agent out.
    for name in [format!("socket-{when}"), format!("datagrams-{when}")] {
        fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o777)).unwrap();
    }
    vec![Box::new(socket), Box::new(datagrams), Box::new(held)]
}

/// Creates the places of sockets and FIFOs: the folder of the task, a folder below it, and a folder beside it that the agent sees too. A
/// link leads to the folder below.
fn places(world: &World) -> Vec<PathBuf> {
    let beside = world.task().parent().unwrap().join("beside");
    fs::create_dir_all(beside.join("deep")).unwrap();
    let task = world.task();
    fs::create_dir_all(task.join("below/.git")).unwrap();
    let _ = symlink("below", task.join("link"));
    vec![task.clone(), task.join("below/.git"), beside.join("deep")]
}

fn all_ends(world: &World, when: &str) -> Vec<Box<dyn std::any::Any>> {
    places(world).iter().flat_map(|place| ends(place, when)).collect()
}

#[test]
fn the_control_reaches_the_machines_processes() {
    world::once(|world| {
        let _before = all_ends(world, "before");
        agent(world, REACHES, "");
        let lock = File::create(world.task().join("below/lock")).unwrap();
        lock.lock().unwrap();
        let mut command = plain(world, &[]);
        command.push("/workspace".to_owned());
        let mut child = Command::new(&command[0])
            .args(&command[1..])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        until(&mut child, "looking");
        let _later = all_ends(world, "later");
        let output = child.wait_with_output().unwrap();
        let all = found(&String::from_utf8_lossy(&output.stdout)).join("\n");
        for expected in [
            "socket socket-before",
            "socket datagrams-before",
            "written fifo-before",
            "read fifo-before",
            "lock lock",
            "socket socket-later",
            "written fifo-later",
        ] {
            assert!(all.contains(expected), "expected {expected} in:\n{all}");
        }
    });
}

fn nobody_outside(world: &World, sandbox: &str) {
    let _before = all_ends(world, "before");
    let beside = world.task().parent().unwrap().join("beside");
    let beside = fs::canonicalize(beside).unwrap().display().to_string();
    agent(world, REACHES, "");
    told(world, &format!("/workspace, {beside}"));
    let lock = File::create(world.task().join("below/lock")).unwrap();
    lock.lock().unwrap();
    let mut child = world.start(sandbox, &["--ro", &beside]);
    let mut seen = until(&mut child, "looking");
    let _later = all_ends(world, "later");
    let mut ran = ended(child.wait_with_output().unwrap());
    seen.extend(ran.events.iter().map(ToString::to_string));
    ran.events = seen.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(ran.code, 0, "{ran:#?}");
    // gVisor opens a device of its own with the same number, and never the machine's.
    let reached: Vec<_> = found(&ran.said())
        .into_iter()
        .filter(|one| sandbox == world::SANDBOXES[0] || !one.starts_with("device "))
        .collect();
    assert_eq!(reached, Vec::<String>::new(), "{sandbox}");
    world.is_valid(&world.log());
}

/// Programs of the agent can still use sockets and FIFOs of their own.
fn ones_own_still_work(world: &World, sandbox: &str) {
    agent(
        world,
        r#"
import multiprocessing, socket, threading
s = socket.socket(socket.AF_UNIX); s.bind("/out/s"); s.listen()
c = socket.socket(socket.AF_UNIX); c.connect("/out/s"); say("socket")
os.mkfifo("/out/f")
threading.Thread(target=lambda: open("/out/f", "w").write("x")).start()
say("fifo " + open("/out/f").read())
m = multiprocessing.Manager(); say("manager " + str(m.dict(a=1)["a"]))
import mmap
fd = os.memfd_create("own"); os.ftruncate(fd, 64 << 20)
with mmap.mmap(fd, 64 << 20) as held: held.write(b"x" * (64 << 20)); time.sleep(0.6)
say("memory")
"#,
        "  workspace: {writeScopes: [{path: /out, size: 1Mi}, {path: /tmp, size: 1Mi}]}\n",
    );
    let ran = world.run(sandbox, &[]);
    assert_eq!(ran.code, 0, "{ran:#?}");
    assert_eq!(ran.said(), "socket\nfifo x\nmanager 1\nmemory\n", "{ran:#?}");
}

/// An agent that searches everything it sees for the secret.
const SEARCHES: &str = r#"
found = set()
say("looking")
for _ in range(60):
    for top in sys.argv[1:]:
        for folder, _, names in os.walk(top):
            for name in names:
                try: text = open(os.path.join(folder, name), "rb").read(1 << 20)
                except OSError: continue
                if b"sesame-" + b"opens" in text: found.add(os.path.join(folder, name))
    time.sleep(0.05)
say("found " + json.dumps(sorted(found)))
"#;

/// Replaces each hidden file or folder, in the ways of editors, of rotated credentials and of people.
fn replace(task: &Path, state: &Path) {
    let secret = fs::read_to_string(task.join("pack.yaml")).unwrap();
    let write = |name: &str| fs::write(task.join(name), &secret).unwrap();
    let renamed = |from: &str, to: &str| fs::rename(task.join(from), task.join(to)).unwrap();
    let exchange = |name: &str| {
        write(".new");
        renamed(".new", name);
    };
    // By rename, twice; by copies beside it; by the files that vim and emacs leave; and away and back.
    exchange("pack.yaml");
    exchange("pack.yaml");
    exchange("key.txt");
    for name in [".pack.yaml.swp", "pack.yaml~", "#pack.yaml#", "4913", "pack.yaml.bak", "other.yaml"] {
        write(name);
    }
    renamed("pack.yaml", "away.yaml");
    renamed("away.yaml", "pack.yaml");
    // By removal and a new file.
    fs::remove_file(task.join("key.txt")).unwrap();
    write("key.txt");
    // As a kubelet does: by a new folder, and a link that is replaced.
    fs::create_dir(task.join("mounted/..new")).unwrap();
    fs::write(task.join("mounted/..new/token"), &secret).unwrap();
    symlink("..new", task.join("mounted/..tmp")).unwrap();
    fs::rename(task.join("mounted/..tmp"), task.join("mounted/..data")).unwrap();
    // By a file in place of a link to it.
    fs::remove_file(task.join("mounted/token")).unwrap();
    fs::write(task.join("mounted/token"), &secret).unwrap();
    // By a new name of the folder that has the file.
    renamed("nested", "nested-elsewhere");
    // By a move of Belay's own state folder, and back.
    fs::write(state.join("belay/note"), &secret).unwrap();
    fs::rename(state, task.join("state-elsewhere")).unwrap();
    fs::rename(task.join("state-elsewhere"), state).unwrap();
    // By a mount.
    fs::create_dir_all(task.join("shown/media")).unwrap();
    world::run("mount", &["-t", "tmpfs", "none", task.join("shown/media").to_str().unwrap()]);
    fs::write(task.join("shown/media/stick"), &secret).unwrap();
}

/// Writes secrets of all kinds into the task's folder, and returns the folder.
fn secrets(world: &World) -> PathBuf {
    let task = fs::canonicalize(world.task()).unwrap();
    let secret = "sesame-opens-nothing-else";
    fs::write(task.join("key.txt"), secret).unwrap();
    fs::write(task.join(".key.txt.swp"), secret).unwrap();
    fs::create_dir_all(task.join("mounted/..old")).unwrap();
    fs::write(task.join("mounted/..old/token"), secret).unwrap();
    symlink("..old", task.join("mounted/..data")).unwrap();
    symlink("..data/token", task.join("mounted/token")).unwrap();
    fs::create_dir_all(task.join("nested/deep")).unwrap();
    fs::write(task.join("nested/deep/key"), secret).unwrap();
    fs::create_dir_all(task.join("shown/media")).unwrap();
    fs::write(task.join("shown/plain"), "seen").unwrap();
    fs::hard_link(task.join("key.txt"), task.join("shown/another-name")).unwrap();
    task
}

#[test]
fn the_control_sees_what_was_hidden_by_its_place() {
    world::once(|world| {
        world::run("mount", &["--make-rshared", "/"]);
        let task = secrets(world);
        agent(world, SEARCHES, "");
        let mut command = plain(
            world,
            &["--ro-bind", "/dev/null", "/workspace/pack.yaml", "--ro-bind", "/dev/null", "/workspace/key.txt"],
        );
        command.push("/workspace".to_owned());
        let state = task.join("state");
        fs::create_dir_all(state.join("belay")).unwrap();
        let mut child = Command::new(&command[0])
            .args(&command[1..])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        until(&mut child, "looking");
        replace(&task, &state);
        let output = child.wait_with_output().unwrap();
        world::run("umount", &[task.join("shown/media").to_str().unwrap()]);
        let all = found(&String::from_utf8_lossy(&output.stdout)).join("\n");
        for expected in [
            "/workspace/pack.yaml",
            "/workspace/key.txt",
            "/workspace/.pack.yaml.swp",
            "/workspace/shown/another-name",
            "/workspace/shown/media/stick",
            "/workspace/state/belay/note",
        ] {
            assert!(all.contains(expected), "expected {expected} in:\n{all}");
        }
    });
}

fn what_is_hidden_stays_hidden(world: &World, sandbox: &str) {
    world::run("mount", &["--make-rshared", "/"]);
    let task = secrets(world);
    let state = task.join("state");
    agent(world, SEARCHES, "");
    told(world, "/workspace");
    let credential =
        |name: &str| format!("tools-key/{}=file:{}", name.replace(['/', '.'], "-"), task.join(name).display());
    let evidence = task.join("evidence").display().to_string();
    let (key, mounted, nested) = (credential("key.txt"), credential("mounted/token"), credential("nested/deep/key"));
    let mut command = world.belay(&[
        "run",
        "task.yaml",
        "--output",
        "json",
        "--sandbox",
        sandbox,
        "--credential",
        &key,
        "--credential",
        &mounted,
        "--credential",
        &nested,
        "--evidence",
        &evidence,
    ]);
    let mut child = command.env("XDG_STATE_HOME", &state).spawn().unwrap();
    let mut seen = until(&mut child, "looking");
    replace(&task, &state);
    let mut ran = ended(child.wait_with_output().unwrap());
    world::run("umount", &[task.join("shown/media").to_str().unwrap()]);
    seen.extend(ran.events.iter().map(ToString::to_string));
    ran.events = seen.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(ran.code, 0, "{ran:#?}");
    assert_eq!(found(&ran.said()), Vec::<String>::new(), "{sandbox}");
    world.is_valid(&PathBuf::from(ran.last()["evidence"].as_str().unwrap()));
    // Files that need not be hidden are visible: Belay does not empty the folder.
    fs::remove_file(task.join("other.yaml")).unwrap();
    agent(world, "say(open('/workspace/shown/plain').read()); say(sorted(os.listdir('/workspace')))", "");
    let ran = ended(
        world
            .belay(&[
                "run",
                "task.yaml",
                "-o",
                "json",
                "--sandbox",
                sandbox,
                "--credential",
                &key,
                "--evidence",
                "evidence",
            ])
            .output()
            .unwrap(),
    );
    assert!(ran.said().starts_with("seen\n[") && ran.said().contains("'agent.py', 'contracts.yaml'"), "{ran:#?}");
    for hidden in ["key.txt", "pack.yaml", "'evidence'"] {
        assert!(!ran.said().contains(hidden), "{ran:#?}");
    }
}

/// Checks that an agent that holds memory without mapping it is ended, for each of these ways.
fn unmapped(world: &World, sandbox: &str) {
    for (name, python) in [
        (
            "files without a name",
            "fds = []\nfor _ in range(24):\n    fd = os.memfd_create('x'); os.write(fd, b'x' * (32 << 20)); fds.append(fd); time.sleep(0.05)\ntime.sleep(2)",
        ),
        (
            "of children",
            "for _ in range(12):\n    if os.fork() == 0:\n        fd = os.memfd_create('x'); os.write(fd, b'x' * (64 << 20)); time.sleep(9)\n    time.sleep(0.1)\ntime.sleep(2)",
        ),
        (
            "open and mapped in part",
            "import mmap\nkept = []\nfor _ in range(12):\n    fd = os.memfd_create('x'); os.write(fd, b'x' * (64 << 20)); kept.append((fd, mmap.mmap(fd, 4096))); time.sleep(0.1)\ntime.sleep(2)",
        ),
        (
            "allocated, never written",
            "fds = []\nfor _ in range(12):\n    fd = os.memfd_create('x'); os.posix_fallocate(fd, 0, 64 << 20); fds.append(fd); time.sleep(0.1)\ntime.sleep(2)",
        ),
    ] {
        agent(world, python, "");
        let ran = world.run(sandbox, &[]);
        // In gVisor, a file that is only allocated has no pages until they are written.
        if sandbox == world::SANDBOXES[1] && name.starts_with("allocated") && ran.code == 0 {
            continue;
        }
        assert_eq!((ran.code, ran.last()["closed"]["reason"].as_str()), (1, Some("OOMKilled")), "{name}: {ran:#?}");
        fs::remove_dir_all(world.log()).unwrap();
    }
}

/// System V shared memory cannot be measured, so the sandbox allows a page in all of it, and no more.
#[test]
fn memory_of_system_v_is_not_to_be_had() {
    world::once(|world| {
        agent(
            world,
            "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n\
             for size in (56, 4096, 4097, 1 << 30): say(libc.shmget(0, ctypes.c_size_t(size), 0o600) >= 0)\n\
             say(libc.msgget(0, 0o600) >= 0); say(libc.semget(0, 1, 0o600) >= 0)",
            "",
        );
        assert_eq!(world.run("bwrap", &[]).said(), "True\nTrue\nFalse\nFalse\nFalse\nFalse\n");
        // The control has no limit.
        let command = plain(world, &[]);
        let output = Command::new(&command[0]).args(&command[1..]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "True\n".repeat(6));
    });
}

/// Runs with a broken sandbox: a program with the sandbox's name runs the code `breaks`, then the real sandbox.
fn broken(world: &World, sandbox: &str, breaks: &str) -> Ran {
    let found = Command::new("sh").args(["-c", &format!("command -v {sandbox}")]).output().unwrap();
    let real = String::from_utf8(found.stdout).unwrap().trim().to_owned();
    let bin = world.task().parent().unwrap().join("bin");
    fs::create_dir_all(&bin).unwrap();
    let program = bin.join(sandbox);
    // With `--version` the program breaks nothing.
    let breaks = breaks.replace('\n', "\n    ");
    let text = format!(
        "#!/usr/bin/python3\nimport os, signal, socket, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_DFL)\nreal, args = {real:?}, sys.argv[1:]\nif '--version' not in args:\n    {breaks}\nos.execv(real, [real, *args])\n"
    );
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    agent(world, "say('the agent has run')", "  retry: {infrastructure: 0}\n");
    let mut command = world.belay(&["run", "task.yaml", "--output", "json", "--sandbox", sandbox]);
    let ran =
        ended(command.env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap())).output().unwrap());
    let _ = fs::remove_dir_all(world.state().join("belay/evidence"));
    ran
}

/// Code that shows the probe's real folder in place of its view.
const UNVIEWED: &str =
    "at = args.index('/.belay/shown') - 1; args[at] = os.path.join(os.path.dirname(args[at]), '../../shown')";

fn a_breach_is_seen(world: &World, sandbox: &str, breaks: &str, expected: &[&str]) {
    let ran = broken(world, sandbox, breaks);
    let end = (ran.code, ran.last()["closed"]["reason"].as_str());
    assert_eq!(end, (6, Some("ContainmentUnproven")), "{breaks}: {ran:#?}");
    let trouble = ran.last()["trouble"].as_str().unwrap();
    for expected in expected {
        assert!(trouble.contains(expected), "expected {expected} in {trouble}");
    }
    assert!(!ran.said().contains("the agent has run"), "{ran:#?}");
}

#[test]
fn a_sandbox_that_does_not_hold_is_no_sandbox() {
    world::once(|world| {
        let inherits = |what: &str, at: u32| format!("os.dup2({what}, {at}); os.set_inheritable({at}, True)");
        let view = format!("if '/.belay/shown' in args:\n    {UNVIEWED}");
        for (breaks, expected) in [
            (inherits("os.open('/', os.O_RDONLY)", 9), &["descriptor 9 is open, of /"][..]),
            (inherits("socket.socketpair()[0].detach()", 77), &["descriptor 77 is open, of socket:"]),
            (inherits("os.pipe()[1]", 700), &["descriptor 700 is open, of pipe:"]),
            (
                view,
                &[
                    "socket socket-before of the machine's leads to a process",
                    "socket socket-later of the machine's leads to a process",
                    "FIFO fifo-before by reading",
                    "FIFO fifo-later by writing",
                    "hidden is seen",
                    "a lock of the machine's holds here",
                ],
            ),
            ("signal.signal(signal.SIGHUP, signal.SIG_IGN)".to_owned(), &["SigIgn is 0000000000000001"]),
            ("i = args.index('--cap-drop'); args[i:i + 2] = ['--cap-add', 'CAP_SYS_ADMIN']".to_owned(), &["CapEff is"]),
        ] {
            a_breach_is_seen(world, "bwrap", &breaks, expected);
        }
        let flag = |name: &str, to: &str| {
            format!("args = ['{name}={to}' if one.startswith('{name}') else one for one in args]")
        };
        // Each of these flags is a control of its own: without it the sandbox reaches the machine's processes, whatever its user.
        a_breach_is_seen(world, "runsc", &flag("--host-uds", "all"), &["socket socket-before of the machine's leads"]);
        // With this flag the sandbox itself waits for the other end of a FIFO: a probe that does not return proves nothing.
        let ran = broken(world, "runsc", &flag("--host-fifo", "open"));
        assert!(ran.code == 6 && !ran.said().contains("the agent has run"), "{ran:#?}");
        // The control: the same program without a break.
        for sandbox in world::SANDBOXES {
            let ran = broken(world, sandbox, "pass");
            assert!(ran.said().contains("the agent has run"), "{ran:#?}");
        }
    });
}

/// Folders that cannot be shown safely are rejected before anything runs, and the message says what to do.
#[test]
fn what_cannot_be_shown_is_said() {
    world::once(|world| {
        agent(world, "say('the agent has run')", "");
        let said = |args: &[&str]| {
            let output = world
                .belay(&[&["run", "task.yaml", "-o", "json", "--sandbox", "bwrap"], args].concat())
                .output()
                .unwrap();
            let said =
                format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(!said.contains("the agent has run"), "{said}");
            assert_ne!(output.status.code(), Some(0));
            said
        };
        let all = said(&["--ro", "/"]);
        assert!(all.contains("which is all of this machine"), "{all}");
        let kernels = said(&["--ro", "/proc/sys"]);
        assert!(kernels.contains("which is the kernel's own (proc)"), "{kernels}");
        // A folder with very many files beside a Secret.
        for n in 0..4200 {
            fs::write(world.task().join(format!("f{n}")), "").unwrap();
        }
        let many = said(&[]);
        assert!(many.contains("move what is hidden") && many.contains("pack.yaml"), "{many}");
    });
}

/// Checks that the agent sees a folder together with what was mounted in it at the start.
fn mounted_folders(world: &World, sandbox: &str) {
    let data = world.task().join("data");
    fs::create_dir_all(data.join("inner/deep")).unwrap();
    fs::write(data.join("plain"), "1").unwrap();
    world::run("mount", &["-t", "tmpfs", "none", data.join("inner/deep").to_str().unwrap()]);
    let _socket = UnixListener::bind(data.join("inner/deep/socket")).unwrap();
    fs::write(data.join("inner/deep/file"), "2").unwrap();
    agent(
        world,
        "import socket\nsay(open('data/plain').read() + open('data/inner/deep/file').read())\n\
         try: socket.socket(socket.AF_UNIX).connect('data/inner/deep/socket'); say('reached')\n\
         except OSError: say('not reached')",
        "",
    );
    let ran = world.run(sandbox, &[]);
    assert_eq!((ran.code, ran.said().as_str()), (0, "12\nnot reached\n"), "{ran:#?}");
}

with_both! {
    caller => nothing_of_the_callers;
    caller_as_a_user => nothing_of_a_users;
    outside => nobody_outside;
    own => ones_own_still_work;
    hidden => what_is_hidden_stays_hidden;
    memory => unmapped;
    mounts => mounted_folders;
}

/// When Belay writes the witness's public key beside a log, it does not follow a link, because others may write in that folder.
#[test]
fn a_key_is_not_written_where_a_link_leads() {
    world::once(|world| {
        agent(world, "say('ran')", "");
        let theirs = world.task().parent().unwrap().join("theirs");
        fs::write(&theirs, "what they have").unwrap();
        assert_eq!(world.run("bwrap", &[]).code, 0);
        let vkey = world.state().join("belay/witness.vkey");
        let key = fs::read_to_string(&vkey).unwrap();
        fs::remove_file(&vkey).unwrap();
        symlink(&theirs, &vkey).unwrap();
        fs::remove_dir_all(world.log()).unwrap();
        assert_eq!(world.run("bwrap", &[]).code, 0);
        assert_eq!(fs::read_to_string(&theirs).unwrap(), "what they have");
        assert_eq!(fs::read_to_string(&vkey).unwrap(), key);
    });
}
