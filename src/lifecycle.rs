//! From what is seen of a task's pods to what comes next: what an end means, whether there is another attempt, what the log is sealed with.
//!
//! Promises: pure functions, which the operator asks about pods of a cluster and `belay run` about the one attempt that it runs itself: the
//! same end is of the same class wherever it came about. Refuses: clients and clocks.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

/// What to do next: a pure function.
pub mod decide;
/// What a pod's status means.
pub mod observe;
