//! Room for recursion.
//!
//! Promises: whatever passes our own limits of nesting has room, in a debug build as well. Refuses: to let a panic out; the caller
//! is told that the work broke off.

use std::thread;

/// CEL is compiled and documents are walked by recursion, within limits; this is far beyond them even in a debug build. Of it
/// only what is used becomes memory.
const STACK: usize = 256 << 20;

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    /// No thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// It panicked.
    #[error("the check broke off")]
    BrokeOff,
}

/// Does this on a thread with a large stack, and waits for it.
///
/// # Errors
/// If the thread cannot be started, or panics.
pub fn with_room<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, StackError> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work).map_err(StackError::Thread)?;
        worker.join().map_err(|_| StackError::BrokeOff)
    })
}
