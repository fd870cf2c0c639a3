//! Evidence: records → log → checkpoint → segment → store.
//!
//! Promises: a record's bytes are hashed as they are stored; a log only grows; every segment carries a checkpoint over
//! everything before it. Refuses: Kubernetes and, but for `store`'s S3 half, any particular storage.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

/// Envelopes that are signed.
pub mod dsse;
/// What is written once a log has ended.
pub mod ending;
/// What a record has to be by itself, and by its policy.
pub mod fits;
/// A log in a folder that somebody else may have filled.
pub mod folder;
/// A whole log, read from a store.
pub mod log;
/// RFC 6962 Merkle trees that only grow.
pub mod merkle;
/// C2SP signed notes, checkpoints and witness cosignatures.
pub mod note;
/// One record by itself, with what proves that it is in a log.
pub mod proof;
/// What happened: the log's entries.
pub mod record;
/// What undoing a task takes.
pub mod rollback;
/// The unit of storage: records and the checkpoint that covers them.
pub mod segment;
/// What a record does to a task's state, and whether it may follow.
pub mod state;
/// Where segments lie.
pub mod store;
/// A log in the layout of C2SP tlog-tiles.
pub mod tiles;
