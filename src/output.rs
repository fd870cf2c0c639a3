//! Output of a process, written by a thread of its own.
//!
//! Guarantees: a process never waits for the reader of its output, for example when the node's disk is full or nothing reads the log. Texts
//! that are lost for that reason are counted, and the count is written where they are missing. Writing the rest at the end takes a bounded
//! time.
//!
//! Non-goals: keeping every text. Evidence has every record.

use std::{
    any::Any,
    collections::VecDeque,
    io::{self, Write},
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};

/// A value that is dropped once its text is written or lost.
pub type Kept = Box<dyn Any + Send>;

/// The most bytes of texts that may wait. Texts with kept values do not count, because those values bound them.
const LONGEST: usize = 4 << 20;
/// The timeout for writing the rest at the end.
const LAST: Duration = Duration::from_secs(2);

#[derive(Default)]
struct Waiting {
    texts: VecDeque<(Vec<u8>, Vec<Kept>)>,
    length: usize,
    lost: u64,
    writing: bool,
    gone: bool,
}

#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

/// An output to which whole texts are written.
#[derive(Clone)]
pub struct Output(Arc<Shared>);

fn missing(lost: u64) -> String {
    format!("{{\"lost\":\"{lost} lines, because earlier output was not read\"}}\n")
}

/// Returns the standard output.
pub fn stdout() -> Output {
    static STDOUT: LazyLock<Output> = LazyLock::new(|| Output::to(io::stdout(), missing));
    STDOUT.clone()
}

/// Returns the standard error.
pub fn stderr() -> Output {
    static STDERR: LazyLock<Output> = LazyLock::new(|| Output::to(io::stderr(), missing));
    STDERR.clone()
}

impl Output {
    /// Creates an output that writes to `out`. If texts are lost, it writes what `missing` returns for their number. Writes nothing without
    /// a thread.
    pub fn to(out: impl Write + Send + 'static, missing: fn(u64) -> String) -> Self {
        let output = Self(Arc::default());
        let writer = output.0.clone();
        // The thread ends with the process, which does not wait for it.
        if std::thread::Builder::new().name("output".to_owned()).spawn(move || writer.write(out, missing)).is_err() {
            output.0.lock().gone = true;
        }
        output
    }

    /// Queues a text of whole lines.
    pub fn say(&self, text: Vec<u8>) {
        self.say_kept(text, vec![]);
    }

    /// Queues a text, and drops `kept` once it is written. If `kept` is not empty, the caller bounds with it how much waits.
    pub fn say_kept(&self, text: Vec<u8>, kept: Vec<Kept>) {
        let mut waiting = self.0.lock();
        if waiting.gone {
            return;
        }
        if kept.is_empty() {
            let length = waiting.length.saturating_add(text.len());
            if length > LONGEST {
                waiting.lost = waiting.lost.saturating_add(1);
                return;
            }
            waiting.length = length;
        }
        waiting.texts.push_back((text, kept));
        self.0.changed.notify_all();
    }

    /// Waits until everything is written, up to a short timeout.
    pub fn end(&self) {
        let until = Instant::now() + LAST;
        let mut waiting = self.0.lock();
        while !waiting.gone && (waiting.writing || !waiting.texts.is_empty()) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            self.0.changed.wait_for(&mut waiting, left);
        }
    }
}

/// For APIs that take a writer.
impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.say(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock()
    }

    fn write(&self, mut out: impl Write, missing: fn(u64) -> String) {
        loop {
            let mut waiting = self.lock();
            while waiting.texts.is_empty() {
                self.changed.wait(&mut waiting);
            }
            let texts = std::mem::take(&mut waiting.texts);
            let lost = std::mem::take(&mut waiting.lost);
            (waiting.length, waiting.writing) = (0, true);
            drop(waiting);
            let mut written = Ok(());
            for (text, kept) in texts {
                written = written.and_then(|()| out.write_all(&text));
                drop(kept);
            }
            if lost > 0 {
                written = written.and_then(|()| out.write_all(missing(lost).as_bytes()));
            }
            let written = written.and_then(|()| out.flush());
            let mut waiting = self.lock();
            waiting.writing = false;
            if written.is_err() {
                *waiting = Waiting { gone: true, ..Waiting::default() };
            }
            let gone = waiting.gone;
            drop(waiting);
            self.changed.notify_all();
            if gone {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A reader that reads only when it gets a message.
    struct Stuck(mpsc::Receiver<()>, mpsc::Sender<Vec<u8>>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            let _ = self.1.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn nobody_waits_for_a_reader_and_what_is_lost_is_counted() {
        let (go, may) = mpsc::channel();
        let (say, said) = mpsc::channel();
        let output = Output::to(Stuck(may, say), missing);
        let started = Instant::now();
        for _ in 0..20 {
            output.say([b"x".repeat(1 << 20), b"\n".to_vec()].concat());
        }
        output.end();
        assert!(started.elapsed() < LAST * 5, "{:?}", started.elapsed());
        drop(go);
        output.end();
        output.say(b"last\n".to_vec());
        output.end();
        let text = String::from_utf8(said.try_iter().flatten().collect()).unwrap();
        let lines: Vec<_> = text.lines().filter(|line| line.len() < 100).collect();
        assert!(lines.iter().any(|line| line.starts_with("{\"lost\":\"")), "{lines:?}");
        assert!(lines.contains(&"last"), "{lines:?}");
    }
}
