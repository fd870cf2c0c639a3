//! What a process says of itself, by a thread of its own.
//!
//! Guarantees: whoever says something never waits for whoever reads it: a node whose disk is full, a log that nobody takes; what is lost for
//! that is counted where it is missing; at the end what is left has a bounded time.
//! Non-goals: to keep everything. The evidence has it.

use std::{
    any::Any,
    collections::VecDeque,
    io::{self, Write},
    sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// What is let go of once its text is written, or lost.
pub type Kept = Box<dyn Any + Send>;

/// Longest text that waits, in bytes, besides what is bounded by what is kept for it.
const LONGEST: usize = 4 << 20;
/// For what is left at the end.
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

/// Where texts are put to be written, each in one piece.
#[derive(Clone)]
pub struct Output(Arc<Shared>);

fn missing(lost: u64) -> String {
    format!("{{\"lost\":\"{lost} lines, because nobody read what was written before\"}}\n")
}

/// Standard output.
pub fn stdout() -> Output {
    static STDOUT: LazyLock<Output> = LazyLock::new(|| Output::to(io::stdout(), missing));
    STDOUT.clone()
}

/// Standard error.
pub fn stderr() -> Output {
    static STDERR: LazyLock<Output> = LazyLock::new(|| Output::to(io::stderr(), missing));
    STDERR.clone()
}

impl Output {
    /// Writes to `out`, and in place of so many texts what `missing` makes of that. Without a thread to do so, nothing is written.
    pub fn to(out: impl Write + Send + 'static, missing: fn(u64) -> String) -> Self {
        let output = Self(Arc::default());
        let writer = output.0.clone();
        // It ends with the process, which does not wait for it.
        if std::thread::Builder::new().name("output".to_owned()).spawn(move || writer.write(out, missing)).is_err() {
            output.0.lock().gone = true;
        }
        output
    }

    /// Has a text written, whole lines.
    pub fn say(&self, text: Vec<u8>) {
        self.say_kept(text, vec![]);
    }

    /// Has a text written, and lets go of what was kept for it. Where there is such, that is what bounds how much waits.
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

    /// Waits for what is left to be written, but not for long.
    pub fn end(&self) {
        let until = Instant::now() + LAST;
        let mut waiting = self.0.lock();
        while !waiting.gone && (waiting.writing || !waiting.texts.is_empty()) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            waiting = self.0.changed.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// For whoever wants a writer.
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
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, mut out: impl Write, missing: fn(u64) -> String) {
        loop {
            let mut waiting = self.lock();
            while waiting.texts.is_empty() {
                waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
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

    /// A reader that reads once it is let to.
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
