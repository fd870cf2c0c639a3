//! Runs a closure on a thread with a stack of 256 MiB.
//!
//! Guarantees: work within Belay's limits on nesting does not overflow the stack, in a debug build as well. A panic does not spread: the
//! caller gets an error.

use std::thread;

/// The size of the stack. Compiling CEL and walking documents recurse within limits, and this is far more than they need even in a debug
/// build. Only the part that is used takes memory.
const STACK: usize = 256 << 20;

/// The reason why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    /// The thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// The work panicked.
    #[error("the check broke off")]
    BrokeOff,
}

/// Runs `work` on a thread with a large stack and waits for it.
///
/// # Errors
/// Returns an error if the thread cannot be started or panics.
pub fn with_large_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, StackError> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work).map_err(StackError::Thread)?;
        worker.join().map_err(|_| StackError::BrokeOff)
    })
}
