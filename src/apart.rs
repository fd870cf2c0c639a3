//! Runs evaluations on separate threads, so that a caller waits for a limited time only.
//!
//! Guarantees: work runs on its own thread, within an allowance ([`meter`](crate::policy::meter)). The caller gets an answer within the
//! given time, or an error that says that there is none. Work that does not end keeps its place. If no place is left, nothing is evaluated,
//! and calls are denied. No work keeps a process from exiting.
//! Non-goals: ending a thread, because that is not possible.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Semaphore, oneshot},
    time::{Instant, timeout_at},
};

use crate::policy::meter::{self, Allowance};

/// The longest time that a caller waits for an evaluation.
pub const LONGEST: Duration = Allowance::CALL.time;
/// The time that an evaluation has to return after its time is over.
const GRACE: Duration = Duration::from_secs(1);
/// The stack size of the thread. It is enough for a recursive evaluation in a build without optimizations. The memory is committed page by
/// page.
const STACK: usize = 64 << 20;

/// Why an evaluation has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unjudged {
    /// Other evaluations took all places for the whole time.
    #[error("other calls were judged for {0:?}, and this one is not: make it again, and fewer at a time")]
    Busy(Duration),
    /// The evaluation took too long.
    #[error("it takes more than {0:?} to judge this call: send less")]
    Late(Duration),
    /// The evaluation broke off, or its thread could not start.
    #[error("this call could not be judged: please report this")]
    Broken,
}

/// Runs work on its own thread, once a place is free.
///
/// # Errors
/// Returns the reason if there is no answer. The caller must deny the call.
pub async fn judge<T: Send + 'static>(
    places: &Arc<Semaphore>,
    time: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Unjudged> {
    let until = Instant::now() + time;
    let place = timeout_at(until, places.clone().acquire_owned()).await.map_err(|_| Unjudged::Busy(time))?;
    let place = place.map_err(|_| Unjudged::Broken)?;
    let left = until.saturating_duration_since(Instant::now());
    let (answer, answered) = oneshot::channel();
    // The work waits until the thread is detached. glibc's `pthread_detach` reads the thread's descriptor after it has marked it. If the thread
    // ended in between, its stack would be unmapped, because it is larger than glibc's cache, and the process would crash.
    let (detached, begin) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::Builder::new().name("judging".to_owned()).stack_size(STACK).spawn(move || {
        let _place = place;
        let _ = begin.recv();
        // The caller may be gone.
        let _ = answer.send(meter::within(Allowance::CALL.within(left), work));
    });
    drop(thread.map_err(|_| Unjudged::Broken)?);
    drop(detached);
    match timeout_at(until + GRACE, answered).await {
        Ok(answer) => answer.map_err(|_| Unjudged::Broken),
        Err(_) => Err(Unjudged::Late(time)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn what_never_ends_keeps_its_place_and_nobody_waiting() {
        let places = Arc::new(Semaphore::new(1));
        assert_eq!(judge(&places, LONGEST, || 7).await, Ok(7));
        let (end, never) = mpsc::channel::<()>();
        let stuck = judge(&places, SHORT, move || never.recv().is_ok()).await;
        assert_eq!(stuck, Err(Unjudged::Late(SHORT)));
        assert_eq!(judge(&places, SHORT, || 7).await, Err(Unjudged::Busy(SHORT)), "fail closed");
        drop(end);
        assert_eq!(judge(&places, LONGEST, || 7).await, Ok(7), "it has ended after all");
    }

    #[tokio::test]
    async fn what_breaks_off_is_no_answer() {
        let places = Arc::new(Semaphore::new(1));
        assert_eq!(judge(&places, LONGEST, || -> u8 { panic!("while judging") }).await, Err(Unjudged::Broken));
        assert_eq!(judge(&places, LONGEST, || 7).await, Ok(7));
    }

    #[tokio::test]
    async fn work_has_an_allowance() {
        let places = Arc::new(Semaphore::new(1));
        let found = judge(&places, LONGEST, || meter::step(Allowance::CALL.steps + 1)).await;
        assert!(matches!(found, Ok(Err(_))), "{found:?}");
    }
}
