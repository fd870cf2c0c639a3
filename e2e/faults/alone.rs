//! Runs stories (runs of one test) in namespaces of their own: the test starts this program again for each story, in new namespaces, and
//! there the same test runs the story.
//!
//! So many worlds can use the same addresses at the same time, and the processes of a world end with its first process.

use std::{
    future::Future,
    process::Command,
    sync::{
        Condvar, LazyLock, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// The environment variable with the number of the story that this process runs.
const STORY: &str = "BELAY_FAULTS_STORY";
/// The prefix of the output line with a story's result.
const CAME: &str = "belay-faults: ";
/// The time limit of one story.
const PATIENCE: Duration = Duration::from_secs(240);
/// The maximum number of worlds at a time in [`each`], because they keep a processor busy.
const BUSY: usize = 4;

/// Runs one story in a world of its own.
pub fn once(story: impl AsyncFnOnce()) {
    if std::env::var_os(STORY).is_some() {
        return tell(async {
            story().await;
            true
        });
    }
    if let Err(said) = apart(&name(), 1) {
        panic!("{said}");
    }
}

/// Runs the stories 1, 2, 3 and so on, each in a world of its own, until one returns that it had nothing to do.
pub fn each(story: impl AsyncFn(usize) -> bool) {
    if let Ok(number) = std::env::var(STORY) {
        return tell(story(number.parse().unwrap()));
    }
    let (name, next, beyond) = (name(), AtomicUsize::new(1), AtomicUsize::new(usize::MAX));
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..BUSY {
            scope.spawn(|| {
                loop {
                    let _place = Place::take();
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    if number > beyond.load(Ordering::SeqCst) || !failed.lock().unwrap().is_empty() {
                        return;
                    }
                    match apart(&name, number) {
                        Ok(true) => {}
                        Ok(false) => drop(beyond.fetch_min(number, Ordering::SeqCst)),
                        Err(said) => failed.lock().unwrap().push(format!("story {number}: {said}")),
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    let told = beyond.into_inner() - 1;
    assert!(told > 0, "there was nothing to do at all");
    println!("{name}: {told} stories");
}

/// Returns the name of the running test.
fn name() -> String {
    let name = std::thread::current().name().unwrap_or("main").to_owned();
    assert_ne!(name, "main", "tests have their names on threads of their own: run with --test-threads=2 or more");
    name
}

/// Runs one story in this process.
fn tell(story: impl Future<Output = bool>) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let came = runtime.block_on(async { tokio::time::timeout(PATIENCE, story).await });
    println!("{CAME}{}", came.expect("the story did not end"));
}

/// Runs one story in namespaces of its own. Returns its result, or its output if it failed.
fn apart(name: &str, number: usize) -> Result<bool, String> {
    let told = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"])
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=2"])
        .env(STORY, number.to_string())
        .env("SSL_CERT_FILE", *AUTHORITY)
        .envs(super::world::KEYS)
        .output()
        .map_err(|error| format!("no namespaces: {error}"))?;
    let said = String::from_utf8_lossy(&told.stdout);
    // The line starts with the name of the test.
    let came = said.lines().find_map(|line| Some(line.split_once(CAME)?.1 == "true"));
    came.filter(|_| told.status.success()).ok_or_else(|| {
        let said = format!("{said}\n{}", String::from_utf8_lossy(&told.stderr));
        // The lines are indented, because `e2e/test` counts results at the beginning of a line.
        said.lines().map(|line| format!("  | {line}\n")).collect()
    })
}

/// The only certificate authority in each world, which signs nothing. Some processes spend most of their start on reading all authorities
/// of a machine.
static AUTHORITY: LazyLock<&str> = LazyLock::new(|| {
    let authority = rcgen::generate_simple_self_signed(["nobody.test".to_owned()]).unwrap();
    let path = concat!(env!("CARGO_TARGET_TMPDIR"), "/authority.pem");
    std::fs::write(path, authority.cert.pem()).unwrap();
    path
});

/// One of [`BUSY`] places, which all tests share.
struct Place;

static TAKEN: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

impl Place {
    fn take() -> Self {
        let mut taken = TAKEN.1.wait_while(TAKEN.0.lock().unwrap(), |taken| *taken >= BUSY).unwrap();
        *taken += 1;
        Self
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *TAKEN.0.lock().unwrap() -= 1;
        TAKEN.1.notify_one();
    }
}
