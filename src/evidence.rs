//! Evidence: records → log → checkpoint → segment → store.
//!
//! Guarantees: a record is hashed over the bytes that are stored; a log only grows; every segment carries a checkpoint over all records up
//! to its last one.
//! Non-goals: Kubernetes and, except for the S3 half of `store`, any particular storage.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

/// Signed envelopes (DSSE).
pub mod dsse;
/// The tiles and the signed summary that are written once a log has ended.
pub mod ending;
/// Checks of a single record, by itself and against its policy.
pub mod fits;
/// Reads a log from a folder that an untrusted party may have filled.
pub mod folder;
/// Reads a whole log from a store.
pub mod log;
/// Append-only RFC 6962 Merkle trees.
pub mod merkle;
/// C2SP signed notes, checkpoints and witness cosignatures.
pub mod note;
/// A single record with the proof that it is in a log.
pub mod proof;
/// The records of a task's log.
pub mod record;
/// The plan and the progress of a rollback.
pub mod rollback;
/// The unit of storage: records and the checkpoint that covers them.
pub mod segment;
/// The state of a task, and the rules for the records that may follow.
pub mod state;
/// Stores for segments.
pub mod store;
/// A log in the layout of C2SP tlog-tiles.
pub mod tiles;
