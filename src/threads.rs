//! How a program runs on several runtimes.
//!
//! Guarantees: a program that ends does not shut down the timers of its runtime, which tasks on the threads of another runtime may still
//! poll. Nothing that blocks a thread delays the exit.
//! Non-goals: waiting for tasks that are not part of the program's result.

use std::{future::Future, mem::ManuallyDrop};

use tokio::runtime::Runtime;

/// Runs a program to its end. Its runtime lasts as long as the process.
///
/// The threads that serve agents are a runtime of their own. They last as long as the process, and their tasks wait on timers that were
/// made on this runtime. A task that polls a timer of a runtime that was shut down panics. A runtime that is dropped also waits for threads
/// that block, such as one that writes to a disk that does not answer.
pub fn run_until_exit<F: Future>(runtime: Runtime, program: F) -> F::Output {
    ManuallyDrop::new(runtime).block_on(program)
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc::channel, time::Duration};

    use tokio::{
        runtime::Builder,
        time::{sleep, timeout},
    };

    use super::*;

    #[test]
    fn timers_of_a_program_that_ended_can_be_polled() {
        for program in [Builder::new_current_thread(), Builder::new_multi_thread()] {
            let mut program = program;
            let program = program.enable_all().build().unwrap();
            let agents = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let [timer] = run_until_exit(program, async { [Box::pin(sleep(Duration::from_secs(3600)))] });
            let polled = agents.block_on(agents.spawn(async move { timeout(Duration::from_millis(10), timer).await }));
            assert!(polled.is_ok_and(|ended| ended.is_err()), "the timer must be pending");
        }
    }

    #[test]
    fn a_thread_that_blocks_does_not_delay_the_exit() {
        let (release, released) = channel();
        run_until_exit(Builder::new_multi_thread().build().unwrap(), async {
            tokio::task::spawn_blocking(move || released.recv_timeout(Duration::from_secs(20)));
        });
        assert!(release.send(()).is_ok(), "the thread must still be waiting");
    }
}
