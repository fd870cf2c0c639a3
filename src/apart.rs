//! Judgments apart from whoever waits for them.
//!
//! Guarantees: work runs on a thread of its own, within an allowance ([`meter`](crate::policy::meter)); whoever asked has an answer in the
//! time that was given, or learns that there is none; work that does not end in spite of all keeps its place, and where no place is left
//! nothing is judged, which refuses calls; no work keeps a process from ending.
//! Non-goals: to end a thread. Nothing can.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Semaphore, oneshot},
    time::{Instant, timeout_at},
};

use crate::policy::meter::{self, Allowance};

/// Longest that anybody waits for a judgment.
pub const LONGEST: Duration = Allowance::CALL.time;
/// What is left to a judgment whose time is over, to come to its end.
const GRACE: Duration = Duration::from_secs(1);
/// For an evaluation that recurses, also where nothing was made small by a compiler. It is taken page by page.
const STACK: usize = 64 << 20;

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unjudged {
    /// Others are judged all the time.
    #[error("other calls were judged for {0:?}, and this one is not: make it again, and fewer at a time")]
    Busy(Duration),
    /// It took too long.
    #[error("it takes more than {0:?} to judge this call: send less")]
    Late(Duration),
    /// It broke off, or could not begin.
    #[error("this call could not be judged: please report this")]
    Broken,
}

/// Has work done on a thread of its own, once one of the places is free.
///
/// # Errors
/// Why there is no answer: it is a refusal.
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
    let thread = std::thread::Builder::new().name("judging".to_owned()).stack_size(STACK).spawn(move || {
        let _place = place;
        // Whoever asked may be gone.
        let _ = answer.send(meter::within(Allowance::CALL.within(left), work));
    });
    thread.map_err(|_| Unjudged::Broken)?;
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
