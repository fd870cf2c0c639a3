//! Stories in namespaces of their own: the test runs this program again for each, in new ones, and there that very test tells it.
//!
//! Many worlds at a time have the same addresses that way, and end with their first process, whatever became of the others.

use std::{
    future::Future,
    process::Command,
    sync::{
        Condvar, LazyLock, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// Which story of a test is to be told, in the environment of whoever tells it.
const STORY: &str = "BELAY_FAULTS_STORY";
/// Before what came of it, on a line.
const CAME: &str = "belay-faults: ";
/// For one story, whatever it waits for.
const PATIENCE: Duration = Duration::from_secs(240);
/// Worlds at a time that keep a processor busy.
const BUSY: usize = 4;

/// Tells a story in a world of its own.
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

/// Tells the stories 1, 2, 3 and so on, each in a world of its own, up to the first that says that there was nothing to do for it.
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

/// The test that runs now.
fn name() -> String {
    let name = std::thread::current().name().unwrap_or("main").to_owned();
    assert_ne!(name, "main", "tests have their names on threads of their own: run with --test-threads=2 or more");
    name
}

/// Tells one story here.
fn tell(story: impl Future<Output = bool>) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let came = runtime.block_on(async { tokio::time::timeout(PATIENCE, story).await });
    println!("{CAME}{}", came.expect("the story did not end"));
}

/// Has one story told in namespaces of its own; what came of it, or all that was said.
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
    // The name of the test stands on the same line.
    let came = said.lines().find_map(|line| Some(line.split_once(CAME)?.1 == "true"));
    came.filter(|_| told.status.success()).ok_or_else(|| {
        let said = format!("{said}\n{}", String::from_utf8_lossy(&told.stderr));
        // Not at the beginning of a line: results are counted there.
        said.lines().map(|line| format!("  | {line}\n")).collect()
    })
}

/// The one authority in each world, of nobody. To read all of the machine's takes most of the time that some processes take to start.
static AUTHORITY: LazyLock<&str> = LazyLock::new(|| {
    let authority = rcgen::generate_simple_self_signed(["nobody.test".to_owned()]).unwrap();
    let path = concat!(env!("CARGO_TARGET_TMPDIR"), "/authority.pem");
    std::fs::write(path, authority.cert.pem()).unwrap();
    path
});

/// One of [`BUSY`] places, across all tests.
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
