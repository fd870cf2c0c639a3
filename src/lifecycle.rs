//! Decides what happens to a task from the observed state of its pods: what the end of a pod means, whether another attempt starts, and how
//! the log is sealed.
//!
//! Guarantees: The functions are pure. The operator calls them for pods of a cluster, and `belay run` calls them for the one attempt that
//! it runs itself, so the same end has the same failure class in both.
//!
//! Non-goals: Clients and clocks.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

/// Decides what to do next: a pure function.
pub mod decide;
/// Interprets the status of a pod.
pub mod observe;
